//! What a node reports about its devices: twins and state, into the DeviceStatus.
//!
//! At most one write per device and interval ([`skerry_cloudcore_core::upstream::reports`]). A report that is written at
//! once is answered by its handler, one that waits for others by the task that writes them.
//!
//! Only the node on which a device is may report it: the Device is read, or the hub's memory of it, when a report is
//! written. So a node that a device has left is refused from the moment on at which the Device names another one.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/devicecontroller/controller/upstream.go.

use super::answer::{self, Refused};
use super::rest::{self, Done, Merge, Rest};
use super::{Outcome, Upstream, content};
use crate::hub::Hub;
use serde_json::{Map, Value, json};
use skerry_cloudcore_core::downstream::{Key, Kind};
use skerry_cloudcore_core::upstream::answer::ErrStatus;
use skerry_cloudcore_core::upstream::device::{self as rules, Report};
use skerry_cloudcore_core::upstream::reports::{Reports, Taken, Write};
use skerry_protocol::{Message, Operation};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const ROOT: &str = "/apis/devices.kubeedge.io/v1beta1";
const SOURCE: &str = "devicecontroller";
const GROUP: &str = "twin";
/// Resource of every answer about devices.
const RESOURCE: &str = "twin";
/// How often a report is merged anew when somebody else wrote in between.
const CONFLICTS_MAX: usize = 3;
/// How often a write that waited is tried again while the API does not answer, and the first pause.
const TRIES_MAX: u32 = 4;
const PAUSE: Duration = Duration::from_millis(500);

/// Reports of all nodes, and the way to the DeviceStatus.
#[derive(Clone)]
pub(super) struct Devices(Arc<Inner>);

struct Inner {
    client: kube::Client,
    hub: Hub,
    reports: Mutex<Reports>,
}

impl Upstream {
    /// `device/<ns>/<name>/twin/edge_updated` and `device/<ns>/<name>/state/update`.
    pub(super) async fn device(&self, node: &str, request: &Message) -> Outcome {
        let parsed = rules::parse(&request.route.resource);
        let (Some((namespace, name, report)), Some(Operation::Update)) =
            (parsed, request.operation())
        else {
            return Outcome::unsupported(request);
        };
        let write = match read(node, report, request) {
            Ok(write) => write,
            Err(refused) => return outcome(node, name, request, &Err(refused)),
        };
        let id = format!("{namespace}/{name}");
        match self.devices.take(&id, write) {
            Taken::Now(write) => {
                let done = self.devices.write(&id, &write).await;
                self.devices.written(&id, done.is_ok());
                outcome(node, name, request, &done)
            }
            Taken::At(at) => {
                let devices = self.devices.clone();
                tokio::spawn(async move { devices.write_when_due(&id, at).await });
                Outcome::Nothing
            }
            Taken::Joined => Outcome::Nothing,
        }
    }
}

fn read(node: &str, report: Report, request: &Message) -> Result<Write, Refused> {
    let mut said: Value = content(request)?;
    if let Value::String(text) = &said {
        said = serde_json::from_str(text)
            .map_err(|error| Refused::Invalid(format!("the content is no JSON: {error}")))?;
    }
    let mut write = Write {
        node: node.into(),
        epoch: said["epoch"].as_str().unwrap_or_default().to_owned(),
        requests: vec![request.clone()],
        ..Write::default()
    };
    match report {
        Report::State => {
            let state = rules::state_status(&said)
                .ok_or_else(|| Refused::Invalid("the report names no state".into()))?;
            write.state = Some(state);
        }
        Report::Twins => {
            write.twins = match said.get_mut("twin").map(Value::take) {
                Some(Value::Object(twins)) => twins,
                _ => Map::new(),
            };
        }
    }
    // Only the identity and the route are needed for the answer.
    write.requests[0].content = skerry_protocol::message::raw(&());
    Ok(write)
}

/// KubeEdge says nothing about what it did not take, and its edge sends the value again with the next one; an error
/// would be dropped there. Who wants receipts gets it.
fn outcome(node: &str, device: &str, request: &Message, done: &Result<(), Refused>) -> Outcome {
    let message = Box::new(reply(node, device, request, done));
    match done {
        Ok(()) => Outcome::Message(message),
        Err(_) => Outcome::Receipt(message),
    }
}

fn reply(node: &str, device: &str, request: &Message, done: &Result<(), Refused>) -> Message {
    let mut message = match done {
        Ok(()) => request.response(answer::now_ms(), "OK"),
        Err(refused) => {
            tracing::debug!(node, device, error = %refused, "a report about a device was refused");
            request.response(answer::now_ms(), &ErrStatus { status: refused.to_status() })
        }
    };
    message.route.source = SOURCE.into();
    message.route.group = GROUP.into();
    message.route.resource = RESOURCE.into();
    message
}

impl Devices {
    pub(super) fn new(client: kube::Client, hub: Hub) -> Self {
        Self(Arc::new(Inner { client, hub, reports: Mutex::default() }))
    }

    fn take(&self, id: &str, write: Write) -> Taken {
        self.0.reports.lock().expect("never held over a panic").take(Instant::now(), id, write)
    }

    fn written(&self, id: &str, done: bool) {
        self.0.reports.lock().expect("never held over a panic").written(id, done);
    }

    /// Waits until what waits for a device may be written, writes it, and answers everybody whose report is in it. A
    /// refusal goes unanswered: KubeEdge's edge knows no other way, and ours asks again.
    async fn write_when_due(&self, id: &str, mut at: Instant) {
        let write = loop {
            tokio::time::sleep_until(at.into()).await;
            let due =
                self.0.reports.lock().expect("never held over a panic").due(Instant::now(), id);
            match due {
                Some(Ok(write)) => break write,
                Some(Err(later)) => at = later,
                None => return,
            }
        };
        let mut pause = PAUSE;
        let mut done = self.write(id, &write).await;
        for _ in 1..TRIES_MAX {
            if !done.as_ref().is_err_and(Refused::is_transient) {
                break;
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
            done = self.write(id, &write).await;
        }
        self.written(id, done.is_ok());
        for request in &write.requests {
            let message = reply(&write.node, id, request, &done);
            if done.is_ok() {
                self.0.hub.send(&write.node, message).await;
            }
        }
    }

    async fn write(&self, id: &str, write: &Write) -> Result<(), Refused> {
        let Some((namespace, name)) = id.split_once('/') else {
            return Err(Refused::Invalid(format!("`{id}` names no device")));
        };
        let name = rest::segment(name)?;
        let node = write.node.as_str();
        let device = match write.twins.is_empty() {
            true => self.own_device(node, namespace, name).await?,
            false => self.read_device(node, namespace, name).await?,
        };
        let uid = device["metadata"]["uid"].as_str().unwrap_or_default();
        if !rules::is_about(&write.epoch, uid) {
            let reason = format!("the report is about an earlier device of the name `{id}`");
            return Err(Refused::Forbidden(reason));
        }
        if write.twins.is_empty() {
            let Some(state) = write.state.clone() else { return Ok(()) };
            return self.write_status(namespace, name, &device, state, None).await;
        }
        self.merge(namespace, name, &device, write).await
    }

    fn rest(&self) -> Rest<'_> {
        Rest::new(&self.0.client)
    }

    /// What the owner of a DeviceStatus has to be called; from the hub's memory when it knows the device.
    async fn own_device(&self, node: &str, namespace: &str, name: &str) -> Done {
        if let Some(key) = Key::new(Kind::Device, namespace, name)
            && let Some((bound_to, uid)) = self.0.hub.binding(&key).await
            && bound_to == node
        {
            return Ok(json!({"metadata": {"namespace": namespace, "name": name, "uid": uid}}));
        }
        self.read_device(node, namespace, name).await
    }

    async fn read_device(&self, node: &str, namespace: &str, name: &str) -> Done {
        let device = self.rest().get(&rest::path(ROOT, namespace, "devices", name)?).await?;
        if device["spec"]["nodeName"] == node {
            return Ok(device);
        }
        Err(Refused::Forbidden(format!("device `{namespace}/{name}` is not on node `{node}`")))
    }

    async fn merge(
        &self,
        namespace: &str,
        name: &str,
        device: &Value,
        write: &Write,
    ) -> Result<(), Refused> {
        let place = rest::path(ROOT, namespace, "devicestatuses", name)?;
        let mut conflicts = 0;
        loop {
            let known = match self.rest().get(&place).await {
                Err(refused) if refused.is_not_found() => Value::Null,
                known => known?,
            };
            let properties = &device["spec"]["properties"];
            let held = &known["status"]["twins"];
            let twins = rules::merged_twins(properties, held, &write.twins, &write.epoch);
            if twins == *held && write.state.is_none() {
                return Ok(()); // nothing is news
            }
            // A list is replaced whole, so it must be the list that was read.
            let version = known["metadata"]["resourceVersion"].as_str();
            let mut status = json!({ "twins": twins });
            if let (Some(fields), Some(Value::Object(state))) =
                (status.as_object_mut(), write.state.clone())
            {
                fields.extend(state);
            }
            match self.write_status(namespace, name, device, status, version).await {
                Err(refused)
                    if (refused.is_conflict() || refused.is_already_exists())
                        && conflicts < CONFLICTS_MAX =>
                {
                    conflicts += 1;
                }
                done => return done,
            }
        }
    }

    /// Merges `status`; makes the DeviceStatus when the device has none.
    async fn write_status(
        &self,
        namespace: &str,
        name: &str,
        device: &Value,
        status: Value,
        version: Option<&str>,
    ) -> Result<(), Refused> {
        let place = rest::path(ROOT, namespace, "devicestatuses", name)?;
        let mut patch = json!({ "status": status });
        if let Some(version) = version {
            patch["metadata"] = json!({ "resourceVersion": version });
        }
        match self.rest().patch(&place, Merge::Json, &patch).await {
            Err(refused) if refused.is_not_found() => {
                let all = rest::path(ROOT, namespace, "devicestatuses", "")?;
                let object = rules::new_status(device, patch["status"].take());
                self.rest().create(&all, &object).await.map(drop)
            }
            done => done.map(drop),
        }
    }
}
