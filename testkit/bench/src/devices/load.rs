//! A mapper that reports as many devices as it is told to, each once a second, and says how long that takes. It reads
//! orders from a file and questions from standard input, one a line, and answers each with a line of JSON:
//!
//! ```text
//! register              {"devices": how many it was given}
//! load SECONDS ROUNDS   reports for so long; meanwhile each rule is made to begin so often
//! ```
//!
//! Times run from the moment at which a report was due, not from the one at which it was sent: a slow agent cannot make
//! itself look better by keeping the load back.

use super::percentile;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use skerry_dmi::v1beta1 as dmi;
use skerry_dmi::v1beta1::device_manager_service_client::DeviceManagerServiceClient;
use skerry_dmi::v1beta1::device_mapper_service_server::{
    DeviceMapperService, DeviceMapperServiceServer,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

/// The protocol of the bench's devices.
pub(crate) const PROTOCOL: &str = "bench";
/// Property that rules watch.
pub(crate) const TRIGGER: &str = "trigger";
/// Property that rules set.
pub(crate) const SWITCH: &str = "switch";
/// Time between two reports of a device.
const PERIOD: Duration = Duration::from_secs(1);
/// Longest wait for a mapper call that a rule causes.
const RULE_PATIENCE: Duration = Duration::from_secs(10);
/// Pause between two rules that are made to begin, and between two rounds: rules cool down for a second.
const RULE_PAUSE: Duration = Duration::from_millis(60);
const ROUND_PAUSE: Duration = Duration::from_millis(1500);

/// What to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Orders {
    /// The agent's socket.
    pub(crate) edgecore: PathBuf,
    /// The mapper's own.
    pub(crate) socket: PathBuf,
    pub(crate) namespace: String,
    pub(crate) devices: usize,
    pub(crate) properties: usize,
    /// So many of the devices have a rule.
    pub(crate) rules: usize,
}

/// Name of a property that the load reports.
pub(crate) fn property(index: usize) -> String {
    format!("p-{index:02}")
}

/// Whether the load reports a property of this name.
pub(crate) fn is_loaded(name: &str) -> bool {
    name.starts_with("p-")
}

/// Runs until standard input ends.
pub(crate) async fn run(orders: &Path) -> Result<()> {
    let orders: Orders = serde_json::from_slice(&std::fs::read(orders)?)?;
    let heard = Arc::new(Heard::default());
    let listener = skerry_dmi::bind(&orders.socket)?;
    let service = DeviceMapperServiceServer::new(Service { heard: Arc::clone(&heard) });
    tokio::spawn(skerry_dmi::serve(listener, service, std::future::pending()));
    let client = DeviceManagerServiceClient::new(skerry_dmi::connect(&orders.edgecore))
        .max_decoding_message_size(skerry_dmi::MESSAGE_MAX);
    let load = Arc::new(Load { orders, client, heard });
    let (questions, mut asked) = tokio::sync::mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if questions.blocking_send(line).is_err() {
                return;
            }
        }
    });
    let mut round = 0;
    while let Some(line) = asked.recv().await {
        let words: Vec<&str> = line.split(' ').collect();
        let answer = match words[..] {
            ["register"] => load.register().await?,
            ["load", seconds, rounds] => {
                Arc::clone(&load).load(&mut round, seconds.parse()?, rounds.parse()?).await?
            }
            _ => json!({"error": "unknown question"}),
        };
        println!("{answer}");
    }
    Ok(())
}

struct Load {
    orders: Orders,
    client: DeviceManagerServiceClient<Channel>,
    heard: Arc<Heard>,
}

impl Load {
    async fn register(&self) -> Result<Value> {
        let mapper = dmi::MapperInfo {
            name: PROTOCOL.into(),
            version: "1".into(),
            api_version: "v1.0.0".into(),
            protocol: PROTOCOL.into(),
            address: self.orders.socket.as_os_str().as_encoded_bytes().to_vec(),
            state: "ok".into(),
        };
        let request = dmi::MapperRegisterRequest { with_data: true, mapper: Some(mapper) };
        let answer = self.client.clone().mapper_register(request).await?.into_inner();
        let mut devices = self.heard.devices.lock().expect("no holder panics");
        devices.extend(answer.device_list.into_iter().map(|device| device.name));
        Ok(json!({"devices": devices.len()}))
    }

    async fn load(self: Arc<Self>, round: &mut u64, seconds: u64, rounds: usize) -> Result<Value> {
        let triggers = tokio::spawn(Arc::clone(&self).trigger(rounds));
        let (orders, start) = (&self.orders, Instant::now());
        let step = PERIOD / u32::try_from(orders.devices).context("too many devices")?;
        let times = Arc::new(Mutex::new(Times::default()));
        let mut calls = JoinSet::new();
        for beat in 0..u32::try_from(seconds).context("too many seconds")? {
            *round += 1;
            let value = format!("{}.5", *round % 100_000);
            for index in 0..orders.devices {
                let due = start + PERIOD * beat + step * u32::try_from(index)?;
                tokio::time::sleep_until(due.into()).await;
                while calls.try_join_next().is_some() {}
                let twins = (0..orders.properties).map(|index| twin(property(index), &value));
                let request = self.report(&super::device_name(index), twins.collect());
                let (mut client, times) = (self.client.clone(), Arc::clone(&times));
                calls.spawn(async move {
                    let done = client.report_device_status(request).await;
                    let mut times = times.lock().expect("no holder panics");
                    match done {
                        Ok(_) => times.ms.push(due.elapsed().as_secs_f64() * 1000.0),
                        Err(error) => times.failed.push(error.to_string()),
                    }
                });
            }
        }
        while calls.join_next().await.is_some() {}
        let (sent, told) = triggers.await??;
        let mut times = times.lock().expect("no holder panics");
        let Times { ms, failed } = &mut *times;
        Ok(json!({
            "calls": ms.len(), "failed": failed.len(), "error": failed.first(),
            "p50_ms": percentile(ms, 50.0), "p99_ms": percentile(ms, 99.0), "max_ms": percentile(ms, 100.0),
            "last": format!("{}.5", *round % 100_000), "sent": sent, "told_ms": told,
        }))
    }

    /// Makes every rule begin, and returns when each was, and after which time the mapper was told.
    async fn trigger(self: Arc<Self>, rounds: usize) -> Result<(Vec<(String, f64)>, Vec<f64>)> {
        let (mut sent, mut told) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            for index in 0..self.orders.rules {
                let name = super::device_name(index);
                self.set_trigger(&name, "0").await?;
                let request = self.report(&name, vec![twin(TRIGGER.into(), "60")]);
                let (start, wall) = (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH)?);
                sent.push((name.clone(), wall.as_secs_f64() * 1000.0));
                self.client.clone().report_device_status(request).await?;
                let at = self.heard.until(&name, "on", start).await;
                let at =
                    at.with_context(|| format!("nobody is told what the rule of {name} sets"))?;
                told.push((at - start).as_secs_f64() * 1000.0);
                tokio::time::sleep(RULE_PAUSE).await;
            }
            for index in 0..self.orders.rules {
                self.set_trigger(&super::device_name(index), "0").await?;
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
        Ok((sent, told))
    }

    async fn set_trigger(&self, name: &str, value: &str) -> Result<()> {
        let request = self.report(name, vec![twin(TRIGGER.into(), value)]);
        self.client.clone().report_device_status(request).await?;
        Ok(())
    }

    fn report(&self, name: &str, twins: Vec<dmi::Twin>) -> dmi::ReportDeviceStatusRequest {
        dmi::ReportDeviceStatusRequest {
            device_name: name.into(),
            device_namespace: self.orders.namespace.clone(),
            reported_device: Some(dmi::DeviceStatus { twins, ..Default::default() }),
        }
    }
}

fn twin(property_name: String, value: &str) -> dmi::Twin {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let metadata = BTreeMap::from([
        ("timestamp".to_owned(), now.to_string()),
        ("type".to_owned(), "float".to_owned()),
    ]);
    dmi::Twin {
        property_name,
        observed_desired: Some(dmi::TwinProperty::default()),
        reported: Some(dmi::TwinProperty { value: value.to_owned(), metadata }),
    }
}

#[derive(Default)]
struct Times {
    ms: Vec<f64>,
    failed: Vec<String>,
}

/// What the agent said.
#[derive(Default)]
struct Heard {
    devices: Mutex<BTreeSet<String>>,
    /// By device: the value that is desired of its switch, and since when.
    switches: Mutex<HashMap<String, (String, Instant)>>,
    changed: Notify,
}

impl Heard {
    fn take(&self, device: Option<dmi::Device>) -> (String, String) {
        let device = device.unwrap_or_default();
        let properties = device.spec.iter().flat_map(|spec| &spec.properties);
        let switch = properties.filter(|property| property.name == SWITCH);
        if let Some(desired) = switch.filter_map(|property| property.desired.clone()).next() {
            let mut switches = self.switches.lock().expect("no holder panics");
            let is_new = switches.get(&device.name).is_none_or(|(old, _)| *old != desired.value);
            if is_new {
                switches.insert(device.name.clone(), (desired.value, Instant::now()));
            }
        }
        self.devices.lock().expect("no holder panics").insert(device.name.clone());
        self.changed.notify_waiters();
        (device.name, device.namespace)
    }

    /// When a switch became `value`, after `start`.
    async fn until(&self, device: &str, value: &str, start: Instant) -> Option<Instant> {
        let end = tokio::time::Instant::from_std(start + RULE_PATIENCE);
        loop {
            let changed = self.changed.notified();
            let now = self.switches.lock().expect("no holder panics").get(device).cloned();
            match now {
                Some((is, at)) if is == value && at >= start => return Some(at),
                _ => tokio::time::timeout_at(end, changed).await.ok()?,
            }
        }
    }
}

struct Service {
    heard: Arc<Heard>,
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl DeviceMapperService for Service {
    async fn register_device(
        &self,
        request: Request<dmi::RegisterDeviceRequest>,
    ) -> Answer<dmi::RegisterDeviceResponse> {
        let (device_name, device_namespace) = self.heard.take(request.into_inner().device);
        Ok(Response::new(dmi::RegisterDeviceResponse { device_name, device_namespace }))
    }

    async fn update_device(
        &self,
        request: Request<dmi::UpdateDeviceRequest>,
    ) -> Answer<dmi::UpdateDeviceResponse> {
        self.heard.take(request.into_inner().device);
        Ok(Response::new(dmi::UpdateDeviceResponse {}))
    }

    async fn remove_device(
        &self,
        request: Request<dmi::RemoveDeviceRequest>,
    ) -> Answer<dmi::RemoveDeviceResponse> {
        let name = request.into_inner().device_name;
        self.heard.devices.lock().expect("no holder panics").remove(&name);
        Ok(Response::new(dmi::RemoveDeviceResponse {}))
    }

    async fn create_device_model(
        &self,
        request: Request<dmi::CreateDeviceModelRequest>,
    ) -> Answer<dmi::CreateDeviceModelResponse> {
        let model = request.into_inner().model.unwrap_or_default();
        Ok(Response::new(dmi::CreateDeviceModelResponse {
            device_model_name: model.name,
            device_model_namespace: model.namespace,
        }))
    }

    async fn remove_device_model(
        &self,
        _: Request<dmi::RemoveDeviceModelRequest>,
    ) -> Answer<dmi::RemoveDeviceModelResponse> {
        Ok(Response::new(dmi::RemoveDeviceModelResponse {}))
    }

    async fn update_device_model(
        &self,
        _: Request<dmi::UpdateDeviceModelRequest>,
    ) -> Answer<dmi::UpdateDeviceModelResponse> {
        Ok(Response::new(dmi::UpdateDeviceModelResponse {}))
    }

    async fn get_device(
        &self,
        _: Request<dmi::GetDeviceRequest>,
    ) -> Answer<dmi::GetDeviceResponse> {
        Err(Status::not_found("a bench keeps no devices"))
    }
}
