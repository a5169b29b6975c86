//! Events about what the controllers did, for `kubectl describe` and `kubectl get events`.
//!
//! They are written by a task of their own, so that nobody waits for them, and are lost when they come too fast. The
//! same thing said again raises the count of the first event.

use super::cluster::{Cluster, EVENTS, Resource};
use jiff::Timestamp;
use serde_json::{Value, json};
use skerry_apiserver_core::workloads::object::{name, namespace, short_hash, stamp, text, uid};
use std::collections::{HashMap, VecDeque};
use tokio::sync::mpsc;

/// Events waiting to be written; more are dropped.
const WAITING_MAX: usize = 512;
/// Events remembered for counting.
const KNOWN_MAX: usize = 2048;
/// Longest message of an event, in bytes.
const MESSAGE_LEN_MAX: usize = 1024;

/// Whether an event is good news.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Weight {
    Normal,
    Warning,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Said {
    about: String,
    component: &'static str,
    weight: Weight,
    reason: String,
    message: String,
}

#[derive(Debug)]
struct Notice {
    said: Said,
    involved: Value,
    namespace: String,
    name: String,
    at: Timestamp,
}

/// Where one controller says what it did.
#[derive(Debug, Clone)]
pub(super) struct Recorder {
    sender: mpsc::Sender<Notice>,
    component: &'static str,
}

impl Recorder {
    /// A recorder and the task that writes; it ends with the last recorder.
    pub(super) fn new(cluster: Cluster) -> (Self, impl Future<Output = ()> + Send) {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        (Self { sender, component: "skerry" }, write(cluster, receiver))
    }

    /// The same, speaking for another component.
    pub(super) fn with_component(&self, component: &'static str) -> Self {
        Self { sender: self.sender.clone(), component }
    }

    /// Records an event about `object`.
    pub(super) fn record(
        &self,
        resource: &Resource,
        object: &Value,
        weight: Weight,
        reason: &str,
        message: impl Into<String>,
    ) {
        let mut message: String = message.into();
        if message.len() > MESSAGE_LEN_MAX {
            let end = (0..=MESSAGE_LEN_MAX - 3).rev().find(|at| message.is_char_boundary(*at));
            message.truncate(end.unwrap_or(0));
            message.push_str("...");
        }
        let notice = Notice {
            said: Said {
                about: uid(object).to_owned(),
                component: self.component,
                weight,
                reason: reason.to_owned(),
                message,
            },
            involved: json!({
                "apiVersion": resource.api_version(), "kind": resource.kind, "name": name(object),
                "namespace": namespace(object), "uid": uid(object),
                "resourceVersion": text(object, "/metadata/resourceVersion"),
            }),
            namespace: match namespace(object) {
                "" => "default".to_owned(),
                namespace => namespace.to_owned(),
            },
            name: name(object).to_owned(),
            at: Timestamp::now(),
        };
        if self.sender.try_send(notice).is_err() {
            tracing::debug!(reason, "event dropped");
        }
    }
}

async fn write(cluster: Cluster, mut receiver: mpsc::Receiver<Notice>) {
    let mut known: HashMap<Said, (String, i64)> = HashMap::new();
    let mut order: VecDeque<Said> = VecDeque::new();
    let mut serial = 0i64;
    while let Some(notice) = receiver.recv().await {
        if let Some((event, count)) = known.get_mut(&notice.said) {
            *count += 1;
            let patch = json!({"count": *count, "lastTimestamp": stamp(notice.at)});
            match cluster.merge_any(&EVENTS, &notice.namespace, event, &patch).await {
                Ok(_) => continue,
                Err(error) if error.is_not_found() => {}
                Err(error) => {
                    tracing::debug!(%error, "event not counted");
                    continue;
                }
            }
        }
        serial += 1;
        let hash = short_hash(&json!([notice.said.about, notice.at.to_string()]), serial);
        let mut stem = notice.name.clone();
        // Names have at most 253 bytes.
        stem.truncate(253 - hash.len() - 1);
        let event = json!({
            "apiVersion": "v1", "kind": "Event",
            "metadata": {"name": format!("{stem}.{hash}"), "namespace": notice.namespace},
            "involvedObject": notice.involved,
            "type": match notice.said.weight {
                Weight::Normal => "Normal",
                Weight::Warning => "Warning",
            },
            "reason": notice.said.reason, "message": notice.said.message,
            "source": {"component": notice.said.component},
            "reportingComponent": notice.said.component, "reportingInstance": "",
            "firstTimestamp": stamp(notice.at), "lastTimestamp": stamp(notice.at), "count": 1,
        });
        match cluster.create(&EVENTS, &event).await {
            Ok(created) => {
                if known.insert(notice.said.clone(), (name(&created).to_owned(), 1)).is_none() {
                    order.push_back(notice.said);
                }
                if order.len() > KNOWN_MAX
                    && let Some(oldest) = order.pop_front()
                {
                    known.remove(&oldest);
                }
            }
            Err(error) if error.is_namespace_gone() || error.is_not_found() => {}
            Err(error) => tracing::debug!(%error, "event not written"),
        }
    }
}
