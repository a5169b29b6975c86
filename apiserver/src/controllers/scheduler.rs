//! Binds pods to nodes.
//!
//! Reads pods and nodes; writes `pods/binding` and the condition PodScheduled. One pass places all waiting pods, so
//! that each sees the decisions before it; a decision that the cache does not show yet is kept as assumed.

use super::cache::{Change, Key, Kind};
use super::cluster::{ClusterError, PODS};
use super::events::Weight;
use super::{Controller, World, together, whole};
use jiff::Timestamp;
use serde_json::{Value, json};
use skerry_apiserver_core::workloads::object::{
    condition, is_terminal, list, name, namespace, set_condition, text, uid,
};
use skerry_apiserver_core::workloads::schedule::{Snapshot, Unschedulable, is_pending};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub(super) struct Scheduler {
    world: World,
    /// Pods bound by an earlier pass whose binding the cache does not show yet: uid to node.
    assumed: Mutex<HashMap<String, String>>,
}

impl Scheduler {
    pub(super) fn new(world: &World) -> Self {
        let mut world = world.clone();
        world.cluster = world.cluster.with_manager("kube-scheduler");
        world.recorder = world.recorder.with_component("default-scheduler");
        Self { world, assumed: Mutex::new(HashMap::new()) }
    }

    async fn bind(&self, pod: &Value, node: &str) {
        match self.world.cluster.bind(pod, node).await {
            Ok(()) => {
                let message =
                    format!("Successfully assigned {}/{} to {node}", namespace(pod), name(pod));
                self.world.recorder.record(&PODS, pod, Weight::Normal, "Scheduled", message);
            }
            Err(error) => {
                self.assumed.lock().unwrap_or_else(PoisonError::into_inner).remove(uid(pod));
                if error.is_conflict() || error.is_not_found() {
                    tracing::debug!(pod = %Key::of(pod), "pod was bound or deleted meanwhile");
                } else {
                    let text = error.text();
                    tracing::warn!(pod = %Key::of(pod), "pod not bound: {text}");
                    self.world.recorder.record(
                        &PODS,
                        pod,
                        Weight::Warning,
                        "FailedScheduling",
                        text,
                    );
                }
            }
        }
    }

    async fn explain(&self, pod: &Value, why: &Unschedulable) -> Result<(), ClusterError> {
        let message = why.to_string();
        let said = condition(pod, "PodScheduled");
        if said.is_some_and(|said| {
            text(said, "/status") == "False" && text(said, "/message") == message
        }) {
            return Ok(());
        }
        let mut conditions = list(pod, "/status/conditions").to_vec();
        let now = Timestamp::now();
        set_condition(&mut conditions, "PodScheduled", "False", "Unschedulable", &message, now);
        self.world.recorder.record(&PODS, pod, Weight::Warning, "FailedScheduling", message);
        let patch = json!({"status": {"conditions": conditions}});
        match self.world.cluster.merge(&PODS, pod, "status", patch).await {
            // The change that caused the conflict brings the pod here again.
            Err(error) if error.is_conflict() || error.is_not_found() => Ok(()),
            other => other.map(drop),
        }
    }
}

impl Controller for Scheduler {
    const NAME: &'static str = "scheduler";
    const WORKERS: usize = 1;
    const KIND: Option<Kind> = None;

    fn keys(&self, change: &Change<'_>) -> Vec<Key> {
        let relevant = match change.kind {
            Kind::Pod => {
                let appeared = change.new.is_some_and(is_pending)
                    && change.old.is_none_or(|old| {
                        !is_pending(old) || old["spec"] != change.object().unwrap_or(old)["spec"]
                    });
                // Room came back: a bound pod is gone or has ended.
                let freed = change.old.is_some_and(|old| {
                    !text(old, "/spec/nodeName").is_empty()
                        && !is_terminal(old)
                        && change.new.is_none_or(is_terminal)
                });
                appeared || freed
            }
            Kind::Node => match (change.old, change.new) {
                (_, None) => false,
                (None, Some(_)) => true,
                (Some(old), Some(new)) => ["/spec", "/metadata/labels", "/status/allocatable"]
                    .iter()
                    .any(|pointer| old.pointer(pointer) != new.pointer(pointer)),
            },
            _ => false,
        };
        if relevant { vec![whole()] } else { Vec::new() }
    }

    async fn sync(&self, _: &Key) -> Result<Option<Duration>, ClusterError> {
        let pods = self.world.caches.all(Kind::Pod);
        let mut waiting: Vec<Arc<Value>> =
            pods.iter().filter(|pod| is_pending(pod)).cloned().collect();
        let mut snapshot =
            Snapshot::new(self.world.caches.all(Kind::Node), pods.iter().map(|pod| &**pod));
        {
            let mut assumed = self.assumed.lock().unwrap_or_else(PoisonError::into_inner);
            assumed.retain(|id, _| waiting.iter().any(|pod| uid(pod) == id));
            waiting.retain(|pod| match assumed.get(uid(pod)) {
                Some(node) => {
                    snapshot.assume(pod, node);
                    false
                }
                None => true,
            });
        }
        drop(pods);
        // First come, first served; a higher priority goes first.
        waiting.sort_by_cached_key(|pod| {
            (
                std::cmp::Reverse(pod.pointer("/spec/priority").and_then(Value::as_i64)),
                text(pod, "/metadata/creationTimestamp").to_owned(),
                Key::of(pod),
            )
        });
        let mut bindings = Vec::new();
        let mut refusals = Vec::new();
        for pod in waiting {
            match snapshot.place(&pod).map(str::to_owned) {
                Ok(node) => {
                    snapshot.assume(&pod, &node);
                    self.assumed
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .insert(uid(&pod).to_owned(), node.clone());
                    bindings.push((pod, node));
                }
                Err(why) => refusals.push((pod, why)),
            }
        }
        drop(snapshot);
        together(bindings.iter().map(|(pod, node)| self.bind(pod, node)).collect()).await;
        for (pod, why) in refusals {
            self.explain(&pod, &why).await?;
        }
        Ok(None)
    }
}
