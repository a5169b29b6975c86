//! The mapper's calls to EdgeCore: registration, kept up, and reports.
//!
//! Called by the runtime. A registration is made again when EdgeCore's socket is another one than
//! before (it makes a new one at each start) or when a report finds EdgeCore away.
//!
//! Source: kubeedge/kubeedge, edge/pkg/devicetwin/dmiserver/server.go (calls, the words of the limit).

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use skerry_dmi::v1beta1 as dmi;
use skerry_dmi::v1beta1::device_manager_service_client::DeviceManagerServiceClient;
use tokio::sync::{Notify, mpsc};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::config::Config;
use crate::core::{Input, ReportFault, Sample, State};
use crate::device::DeviceId;

/// Deadline of a registration; its answer carries every device.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(30);
/// Deadline of a report.
const REPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest pause before a registration is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// How often the socket is looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// EdgeCore as a mapper sees it. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Edge {
    client: DeviceManagerServiceClient<Channel>,
    socket: PathBuf,
    away: Arc<Notify>,
    encode_values: bool,
}

impl Edge {
    pub(crate) fn new(config: &Config) -> Self {
        let socket = config.common.edgecore_sock.clone();
        let client = DeviceManagerServiceClient::new(skerry_dmi::connect(&socket))
            .max_decoding_message_size(skerry_dmi::MESSAGE_MAX)
            .max_encoding_message_size(skerry_dmi::MESSAGE_MAX);
        let away = Arc::new(Notify::new());
        Self { client, socket, away, encode_values: config.common.encode_values }
    }

    /// Registers, and again whenever that is needed; never returns.
    pub(crate) async fn keep_registered(self, config: Arc<Config>, inputs: mpsc::Sender<Input>) {
        let mut pause = RETRY.0;
        loop {
            // Taken before the call: a socket that is replaced during it is noticed afterwards.
            let socket = inode(&self.socket);
            match self.register(&config).await {
                Ok(answer) => {
                    let (models, devices) = (answer.model_list, answer.device_list);
                    tracing::info!(
                        devices = devices.len(),
                        models = models.len(),
                        protocol = config.common.protocol,
                        "registered with edgecore"
                    );
                    pause = RETRY.0;
                    if inputs.send(Input::Registered { models, devices }).await.is_err() {
                        return;
                    }
                    self.until_stale(socket).await;
                    tracing::warn!("edgecore is away or was restarted, registering again");
                    if inputs.send(Input::EdgeCoreLost).await.is_err() {
                        return;
                    }
                }
                Err(status) => {
                    tracing::warn!(
                        code = ?status.code(),
                        error = status.message(),
                        again_in = ?pause,
                        "could not register with edgecore"
                    );
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
    }

    async fn register(&self, config: &Config) -> Result<dmi::MapperRegisterResponse, Status> {
        let common = &config.common;
        let mapper = dmi::MapperInfo {
            name: common.name.clone(),
            version: common.version.clone(),
            api_version: common.api_version.clone(),
            protocol: common.protocol.clone(),
            address: config.grpc_server.socket_path.as_os_str().as_encoded_bytes().to_vec(),
            state: "ok".to_owned(),
        };
        let request = dmi::MapperRegisterRequest { with_data: true, mapper: Some(mapper) };
        let mut client = self.client.clone();
        within(REGISTER_TIMEOUT, client.mapper_register(request)).await
    }

    /// Returns once the socket is another one, or a report has found nobody.
    async fn until_stale(&self, socket: Option<(u64, u64)>) {
        loop {
            tokio::select! {
                () = self.away.notified() => return,
                () = tokio::time::sleep(WATCH_INTERVAL) => {}
            }
            let now = inode(&self.socket);
            if now.is_some() && now != socket {
                return;
            }
        }
    }

    /// Reports values of one device.
    pub(crate) async fn report(&self, device: DeviceId, twins: Vec<Sample>) -> Input {
        let twin = |sample: Sample| {
            let mut metadata = std::collections::BTreeMap::new();
            metadata.insert("timestamp".to_owned(), unix_milliseconds(sample.at).to_string());
            metadata.insert("type".to_owned(), sample.kind.word().to_owned());
            let mut value = sample.value.to_string();
            if self.encode_values && !is_plain(&value) {
                metadata.insert("encoding".to_owned(), "base64url".to_owned());
                value = URL_SAFE_NO_PAD.encode(value);
            }
            let property = |value, metadata| Some(dmi::TwinProperty { value, metadata });
            dmi::Twin {
                property_name: sample.property,
                // KubeEdge's EdgeCore needs both, also when nothing is desired.
                observed_desired: property(sample.observed_desired, Default::default()),
                reported: property(value, metadata),
            }
        };
        let reported = dmi::DeviceStatus {
            twins: twins.into_iter().map(twin).collect(),
            ..Default::default()
        };
        let request = dmi::ReportDeviceStatusRequest {
            device_name: device.name.clone(),
            device_namespace: device.namespace.clone(),
            reported_device: Some(reported),
        };
        let mut client = self.client.clone();
        let answer = within(REPORT_TIMEOUT, client.report_device_status(request)).await;
        let result = self.judge(answer.map(drop));
        Input::Reported { device, result }
    }

    /// Reports the state of one device.
    pub(crate) async fn report_state(&self, device: DeviceId, state: State) -> Input {
        let request = dmi::ReportDeviceStatesRequest {
            device_name: device.name.clone(),
            device_namespace: device.namespace.clone(),
            state: state.word().to_owned(),
        };
        let mut client = self.client.clone();
        let answer = within(REPORT_TIMEOUT, client.report_device_states(request)).await;
        let result = self.judge(answer.map(drop));
        Input::StateReported { device, result }
    }

    fn judge(&self, answer: Result<(), Status>) -> Result<(), ReportFault> {
        let fault = answer.map_err(|status| fault(&status));
        if fault == Err(ReportFault::Away) {
            self.away.notify_one();
        }
        fault
    }
}

/// Sorts a refusal: the limit of KubeEdge's EdgeCore has no code of its own, only words.
fn fault(status: &Status) -> ReportFault {
    match status.code() {
        Code::ResourceExhausted => ReportFault::Busy,
        _ if status.message().contains("too many request") => ReportFault::Busy,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => ReportFault::Away,
        _ => ReportFault::Refused(status.message().to_owned()),
    }
}

async fn within<T>(
    deadline: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(deadline, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!("no answer in {} s", deadline.as_secs()))),
    }
}

/// Whether KubeEdge's EdgeCore takes a value: it checks these characters and this length, and says nothing if not.
///
/// Source: kubeedge/kubeedge, edge/pkg/devicetwin/dtcommon/util.go.
fn is_plain(value: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.,:/@#".contains(&byte);
    value.len() <= 512 && value.bytes().all(plain)
}

/// Which file a path leads to now; a socket that was made again is another one.
pub(crate) fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The wall clock's idea of an instant that has passed.
fn unix_milliseconds(at: Instant) -> u128 {
    let age = Instant::now().saturating_duration_since(at);
    let then = SystemTime::now().checked_sub(age).unwrap_or(UNIX_EPOCH);
    then.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_kubeedge_drops_are_known() {
        for plain in ["", "-4.5", "a:b/c@d#e,f_g", &"x".repeat(512)] {
            assert!(is_plain(plain), "{plain}");
        }
        for other in ["a b", "{}", "a=b", "+1", "\u{e9}", &"x".repeat(513)] {
            assert!(!is_plain(other), "{other}");
        }
    }

    #[test]
    fn the_limit_of_kubeedge_is_known_by_its_words() {
        let words = "fail to report device status because of too many request: fridge";
        assert_eq!(fault(&Status::unknown(words)), ReportFault::Busy);
        assert_eq!(fault(&Status::resource_exhausted("later")), ReportFault::Busy);
        assert_eq!(fault(&Status::unavailable("down")), ReportFault::Away);
        assert_eq!(fault(&Status::not_found("x")), ReportFault::Refused("x".to_owned()));
    }
}
