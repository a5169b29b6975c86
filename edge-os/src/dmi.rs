//! Mappers: what they call here, and what they are told.
//!
//! The server takes registrations and reports on a Unix socket and hands each to the twin task, with a bound on how many
//! wait and how long. A call to a mapper is one connection, one request, one deadline. Nothing that a mapper does or does
//! not do holds up anything but the calls to itself.
//!
//! The twin task is the only caller; the messages and the way over the socket are `skerry-dmi`'s.
//!
//! Source: kubeedge/kubeedge, edge/pkg/devicetwin/dmiserver/server.go, dmiclient/client.go.

mod convert;

use serde_json::Value;
use skerry_dmi::v1beta1 as dmi;
use skerry_dmi::v1beta1::device_manager_service_server::{
    DeviceManagerService, DeviceManagerServiceServer,
};
use skerry_dmi::v1beta1::device_mapper_service_client::DeviceMapperServiceClient;
use skerry_edge_core::twin::mapper::{CALL_TIMEOUT, Call, Called, Info, Tell};
use skerry_edge_core::twin::{RegisterError, Registered, ReportError, Reported};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

/// Where mappers look for EdgeCore unless they are told otherwise.
pub const SOCKET: &str = "/etc/kubeedge/dmi.sock";
/// Requests of mappers that wait for the twin.
pub const REQUESTS_MAX: usize = 1024;
/// Twins that all mappers together may report in a second; a thousand devices of fifty properties, and a little.
pub const TWINS_PER_SECOND: u32 = 60_000;
/// Twins in one report.
const TWINS_MAX: usize = 1000;
/// How long a mapper's request may take here.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Devices of a mapper's registration after which memory is given back: its answer is tens of megabytes, once.
const LARGE_REGISTRATION: usize = 50;
/// Time between two looks at the sockets of mappers.
pub const PROBE_INTERVAL: Duration = Duration::from_secs(10);
/// Looks in vain after which nobody knows how a mapper's devices are.
const MISSES_MAX: u32 = 3;
/// How long a look may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Time after which a socket that could not be made is tried again.
const BIND_RETRY: Duration = Duration::from_secs(10);
/// The namespace of mappers that name none.
const NAMESPACE: &str = "default";

/// What a mapper asks for; each is answered.
#[derive(Debug)]
pub enum FromMapper {
    /// It says who it is.
    Register {
        /// Who.
        info: Info,
        /// It wants its devices and models with the answer.
        with_data: bool,
        /// The answer.
        answer: oneshot::Sender<Result<Registered, RegisterError>>,
    },
    /// It says what a device is.
    Twins {
        /// `namespace/name`.
        id: String,
        /// What.
        twins: Vec<Reported>,
        /// The answer.
        answer: oneshot::Sender<Result<(), ReportError>>,
    },
    /// It says in which state a device is.
    State {
        /// `namespace/name`.
        id: String,
        /// Which.
        state: String,
        /// The answer.
        answer: oneshot::Sender<Result<(), ReportError>>,
    },
}

/// Serves mappers at `socket` until `stop`.
pub async fn run(socket: PathBuf, twin: mpsc::Sender<FromMapper>, stop: CancellationToken) {
    let mut told = false;
    let listener = loop {
        match skerry_dmi::bind(&socket) {
            Ok(listener) => break listener,
            Err(error) if !told => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(%error, cause, "mappers cannot connect; trying again. hint: make its directory, writable for this agent");
                told = true;
            }
            Err(_) => {}
        }
        let wait = tokio::time::sleep(BIND_RETRY);
        if stop.run_until_cancelled(wait).await.is_none() {
            return;
        }
    };
    tracing::info!(socket = %socket.display(), "mappers can connect");
    let bucket = Mutex::new((f64::from(TWINS_PER_SECOND), Instant::now()));
    let service = DeviceManagerServiceServer::new(Service { twin, bucket })
        .max_decoding_message_size(4 << 20)
        .max_encoding_message_size(skerry_dmi::MESSAGE_MAX);
    skerry_dmi::serve(listener, service, stop.cancelled_owned()).await;
}

struct Service {
    twin: mpsc::Sender<FromMapper>,
    /// Twins that may be reported now, and when that was.
    bucket: Mutex<(f64, Instant)>,
}

impl Service {
    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> FromMapper,
    ) -> Result<T, Status> {
        let (answer, answered) = oneshot::channel();
        self.twin.try_send(request(answer)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => exhausted("too many requests wait"),
            mpsc::error::TrySendError::Closed(_) => Status::unavailable("the agent is ending"),
        })?;
        match tokio::time::timeout(ANSWER_TIMEOUT, answered).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(Status::unavailable("the agent is ending")),
            Err(_) => Err(Status::deadline_exceeded("the agent is busy")),
        }
    }

    fn take_tokens(&self, twins: usize) -> Result<(), Status> {
        let mut bucket = self.bucket.lock().expect("nobody panics with it");
        let now = Instant::now();
        let earned = (now - bucket.1).as_secs_f64() * f64::from(TWINS_PER_SECOND);
        let tokens = (bucket.0 + earned).min(f64::from(TWINS_PER_SECOND));
        let wanted = twins.max(1) as f64;
        *bucket = (tokens, now);
        if tokens < wanted {
            return Err(exhausted("more twins are reported in a second than this node takes"));
        }
        bucket.0 -= wanted;
        Ok(())
    }
}

#[tonic::async_trait]
impl DeviceManagerService for Service {
    async fn mapper_register(
        &self,
        request: Request<dmi::MapperRegisterRequest>,
    ) -> Result<Response<dmi::MapperRegisterResponse>, Status> {
        let request = request.into_inner();
        let Some(mapper) = request.mapper else {
            return Err(Status::invalid_argument("`mapper` is missing"));
        };
        let address = String::from_utf8(mapper.address)
            .map_err(|_| Status::invalid_argument("`mapper.address` is no text"))?;
        let address = address.strip_prefix("unix://").unwrap_or(&address).to_owned();
        let info = Info {
            name: mapper.name,
            version: mapper.version,
            api_version: mapper.api_version,
            protocol: mapper.protocol,
            address,
            state: mapper.state,
        };
        tracing::info!(
            name = info.name,
            protocol = info.protocol,
            address = info.address,
            "a mapper registers"
        );
        let with_data = request.with_data;
        let registered = self
            .ask(|answer| FromMapper::Register { info, with_data, answer })
            .await?
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let is_large = registered.devices.len() > LARGE_REGISTRATION;
        // One by one: each object goes when its message is made.
        let models = registered.models.into_iter().map(|model| convert::model(&model));
        let model_list = models.collect();
        let devices = registered.devices.into_iter().map(|device| convert::device(&device));
        let device_list = devices.collect();
        if is_large {
            tokio::spawn(async {
                tokio::time::sleep(ANSWER_TIMEOUT).await;
                crate::heap::give_back();
            });
        }
        Ok(Response::new(dmi::MapperRegisterResponse { model_list, device_list }))
    }

    async fn report_device_status(
        &self,
        request: Request<dmi::ReportDeviceStatusRequest>,
    ) -> Result<Response<dmi::ReportDeviceStatusResponse>, Status> {
        let request = request.into_inner();
        let id = id_of(&request.device_namespace, &request.device_name)?;
        let Some(reported) = request.reported_device.filter(|device| !device.twins.is_empty())
        else {
            return Err(Status::invalid_argument("`reportedDevice` has no twins"));
        };
        if reported.twins.len() > TWINS_MAX {
            return Err(exhausted("a report has at most 1000 twins"));
        }
        self.take_tokens(reported.twins.len())?;
        let twins = reported.twins.into_iter().map(reported_twin).collect();
        self.ask(|answer| FromMapper::Twins { id, twins, answer }).await?.map_err(refusal)?;
        Ok(Response::new(dmi::ReportDeviceStatusResponse {}))
    }

    async fn report_device_states(
        &self,
        request: Request<dmi::ReportDeviceStatesRequest>,
    ) -> Result<Response<dmi::ReportDeviceStatesResponse>, Status> {
        let request = request.into_inner();
        let id = id_of(&request.device_namespace, &request.device_name)?;
        if request.state.is_empty() {
            return Err(Status::invalid_argument("`state` is missing"));
        }
        self.take_tokens(1)?;
        let state = request.state;
        self.ask(|answer| FromMapper::State { id, state, answer }).await?.map_err(refusal)?;
        Ok(Response::new(dmi::ReportDeviceStatesResponse {}))
    }
}

fn id_of(namespace: &str, name: &str) -> Result<String, Status> {
    if name.is_empty() {
        return Err(Status::invalid_argument("`deviceName` is missing"));
    }
    let namespace = if namespace.is_empty() { NAMESPACE } else { namespace };
    Ok(format!("{namespace}/{name}"))
}

fn reported_twin(twin: dmi::Twin) -> Reported {
    let metadata = twin.reported.as_ref().map(|reported| reported.metadata.clone());
    let metadata = metadata.unwrap_or_default();
    Reported {
        name: twin.property_name,
        actual: twin.reported.map(|reported| reported.value),
        observed: twin.observed_desired.map(|desired| desired.value),
        timestamp: metadata.get("timestamp").and_then(|text| text.parse().ok()),
        kind: metadata.get("type").filter(|kind| !kind.is_empty()).cloned(),
    }
}

fn refusal(error: ReportError) -> Status {
    match error {
        ReportError::Unknown(_) => Status::not_found(error.to_string()),
        _ => Status::invalid_argument(error.to_string()),
    }
}

fn exhausted(text: &str) -> Status {
    let mut status = Status::resource_exhausted(text);
    status.metadata_mut().insert("retry-after", tonic::metadata::MetadataValue::from_static("1"));
    status
}

/// Makes a call; ends after [`CALL_TIMEOUT`] at the latest.
pub async fn call(call: Call) -> (Call, Called) {
    let made = make(&call);
    let called = match tokio::time::timeout(CALL_TIMEOUT, made).await {
        Ok(Ok(())) => Called::Done,
        Ok(Err(status)) => match status.code() {
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {
                Called::Unreachable(status.message().to_owned())
            }
            // A mapper that does not know a call, or failed at it, has answered.
            _ => Called::Refused(format!("{}: {}", status.code(), status.message())),
        },
        Err(_) => Called::Unreachable(format!("no answer within {} s", CALL_TIMEOUT.as_secs())),
    };
    (call, called)
}

async fn make(call: &Call) -> Result<(), Status> {
    let mut client = DeviceMapperServiceClient::new(skerry_dmi::connect(&call.address));
    let (namespace, name) = call.id.split_once('/').unwrap_or(("", &call.id));
    let (namespace, name) = (namespace.to_owned(), name.to_owned());
    let device = |object: &Value| Some(convert::device(object));
    let model = |object: &Value| Some(convert::model(object));
    match &call.tell {
        Tell::RegisterDevice(object) => {
            let request = dmi::RegisterDeviceRequest { device: device(object) };
            client.register_device(request).await.map(drop)
        }
        Tell::UpdateDevice(object) => {
            let request = dmi::UpdateDeviceRequest { device: device(object) };
            client.update_device(request).await.map(drop)
        }
        Tell::RemoveDevice => {
            let request =
                dmi::RemoveDeviceRequest { device_name: name, device_namespace: namespace };
            client.remove_device(request).await.map(drop)
        }
        Tell::CreateModel(object) => {
            let request = dmi::CreateDeviceModelRequest { model: model(object) };
            client.create_device_model(request).await.map(drop)
        }
        Tell::UpdateModel(object) => {
            let request = dmi::UpdateDeviceModelRequest { model: model(object) };
            client.update_device_model(request).await.map(drop)
        }
        Tell::RemoveModel => {
            let request =
                dmi::RemoveDeviceModelRequest { model_name: name, model_namespace: namespace };
            client.remove_device_model(request).await.map(drop)
        }
    }
}

/// What a look at the sockets of mappers has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// The socket of this protocol's mapper is another file.
    Restarted(String),
    /// Nobody has listened for a while.
    Lost(String),
}

/// Looks after the sockets of mappers, as these say nothing when they end.
#[derive(Debug, Default)]
pub struct Probes {
    /// Inode and looks in vain, by protocol and address.
    known: HashMap<(String, String), (Option<u64>, u32)>,
}

impl Probes {
    /// Looks at each socket once.
    pub async fn look(&mut self, mappers: &[(String, String)]) -> Vec<Seen> {
        self.known.retain(|key, _| mappers.contains(key));
        let mut seen = Vec::new();
        for key in mappers {
            let path = Path::new(&key.1);
            let inode = std::fs::metadata(path).ok().map(|metadata| metadata.ino());
            let connect = tokio::time::timeout(PROBE_TIMEOUT, UnixStream::connect(path));
            let listens = matches!(connect.await, Ok(Ok(_)));
            let (known, misses) = self.known.entry(key.clone()).or_default();
            if !listens {
                *misses = misses.saturating_add(1);
                if *misses == MISSES_MAX {
                    seen.push(Seen::Lost(key.0.clone()));
                }
                continue;
            }
            if known.is_some() && *known != inode {
                seen.push(Seen::Restarted(key.0.clone()));
            }
            (*known, *misses) = (inode, 0);
        }
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn a_mapper_that_begins_anew_or_is_gone_is_noticed_by_its_socket() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("m.sock");
        let mappers = [("modbus".to_owned(), path.display().to_string())];
        let mut probes = Probes::default();
        assert!(probes.look(&mappers).await.is_empty(), "it may still be starting");
        let listener = UnixListener::bind(&path).expect("a socket");
        assert!(probes.look(&mappers).await.is_empty());
        let aside = dir.path().join("old");
        std::fs::rename(&path, &aside).expect("renamed"); // so that the inode is not used again at once
        drop(listener);
        for look in 1..=MISSES_MAX + 1 {
            let seen = probes.look(&mappers).await;
            assert_eq!(seen.is_empty(), look != MISSES_MAX, "look {look}");
        }
        let _listener = UnixListener::bind(&path).expect("a socket");
        assert_eq!(probes.look(&mappers).await, [Seen::Restarted("modbus".into())]);
        assert!(probes.look(&mappers).await.is_empty());
    }
}
