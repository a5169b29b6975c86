//! Word of which devices are on a node, for the DeviceTwin of a KubeEdge edge.
//!
//! That part of the edge takes a device's twin only when it has been told of the device, in a message that nobody
//! acknowledges. So a device that joins or leaves is told before its object goes, and after each reconnect the whole
//! list is told: it adds what is missing there and removes what is too much. Our own edge needs neither.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/devicecontroller/types/device.go, edge/pkg/devicetwin/dtmanager/membership.go.

use super::{Downstream, Key, Kind};
use serde_json::{Value, json};
use skerry_protocol::message::{Content, raw};
use skerry_protocol::{Message, Operation};

const SOURCE: &str = "devicecontroller";
const GROUP: &str = "twin";
/// `route.resource` of what joins and leaves.
const UPDATE: &str = "membership";
/// `route.resource` of the whole list.
const DETAIL: &str = "membership/detail";

/// Devices that join or leave a node now.
#[derive(Debug, Default)]
pub(super) struct Members {
    added: Vec<Value>,
    removed: Vec<Value>,
}

impl Members {
    pub(super) fn add(&mut self, key: &Key, text: &Content) {
        self.added.push(device(key, text));
    }

    pub(super) fn remove(&mut self, key: &Key) {
        let id = id(key);
        self.removed.push(json!({"id": id, "name": key.name()}));
    }

    /// One message for all of them, if there are any.
    pub(super) fn message(self, now_ms: i64) -> Option<Message> {
        if self.added.is_empty() && self.removed.is_empty() {
            return None;
        }
        let list = |devices: Vec<Value>| match devices.is_empty() {
            true => Value::Null,
            false => devices.into(),
        };
        let (added, removed) = (list(self.added), list(self.removed));
        let body = json!({"added_devices": added, "removed_devices": removed});
        Some(message(UPDATE, body, now_ms))
    }
}

impl Downstream {
    /// The list of all devices of a node, as an answer to a KubeEdge edge that asks for it and for one that has just
    /// connected. It has no parent: an answer with one would not reach the DeviceTwin there.
    pub fn membership(&self, node: &str, now_ms: i64) -> Message {
        let devices: Vec<Value> = self
            .nodes
            .get(node)
            .into_iter()
            .flat_map(|node| &node.placed)
            .filter(|key| key.kind() == Kind::Device)
            .filter_map(|key| Some(device(key, &self.placed.get(key)?.version.text)))
            .collect();
        message(DETAIL, json!({"devices": devices}), now_ms)
    }
}

fn message(resource: &str, mut body: Value, now_ms: i64) -> Message {
    let mut message = Message::new(now_ms, SOURCE, GROUP, Operation::Update, resource, &());
    body["event_id"] = message.header.msg_id.as_str().into();
    body["timestamp"] = now_ms.into();
    message.content = raw(&body);
    message
}

/// With an empty twin: an edge of KubeEdge that finds none there writes one that it cannot read again.
fn device(key: &Key, text: &Content) -> Value {
    let object: Value = serde_json::from_str(text.get()).unwrap_or_default();
    let mut device = json!({"id": id(key), "name": key.name(), "twin": {}});
    if let Some(description) = object["metadata"]["labels"]["description"].as_str() {
        device["description"] = description.into();
    }
    device
}

fn id(key: &Key) -> String {
    format!("{}/{}", key.namespace(), key.name())
}
