//! Deletes pods that are left over: their node is gone, or they ended long ago and are too many.
//!
//! Reads pods and nodes; deletes pods.

use super::cache::{Change, Key, Kind};
use super::cluster::{ClusterError, PODS};
use super::{Controller, World, whole};
use jiff::Timestamp;
use serde_json::{Value, json};
use skerry_apiserver_core::workloads::object::{list, set_condition, text, until};
use skerry_apiserver_core::workloads::pod_gc::{Quarantine, TERMINATED_MAX, surplus};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Time between two rounds.
const ROUND: Duration = Duration::from_secs(20);

pub(super) struct PodGc {
    world: World,
    quarantine: Mutex<Quarantine>,
}

impl PodGc {
    pub(super) fn new(world: &World) -> Self {
        Self {
            world: world.clone(),
            quarantine: Mutex::new(Quarantine::new(world.settings.quarantine_seconds)),
        }
    }
}

impl Controller for PodGc {
    const NAME: &'static str = "podgc";
    const WORKERS: usize = 1;
    const KIND: Option<Kind> = None;

    fn keys(&self, change: &Change<'_>) -> Vec<Key> {
        // A node that went starts its quarantine now; everything else waits for the next round.
        if change.kind == Kind::Node && change.new.is_none() { vec![whole()] } else { Vec::new() }
    }

    async fn sync(&self, _: &Key) -> Result<Option<Duration>, ClusterError> {
        let World { cluster, caches, .. } = &self.world;
        let now = Timestamp::now();
        let (pods, nodes) = (caches.all(Kind::Pod), caches.all(Kind::Node));
        let (orphans, next) = {
            let mut quarantine = self.quarantine.lock().unwrap_or_else(PoisonError::into_inner);
            let (orphans, next) = quarantine.orphans(
                nodes.iter().map(|node| &**node),
                pods.iter().map(|pod| &**pod),
                now,
            );
            (orphans.into_iter().cloned().collect::<Vec<Value>>(), next)
        };
        for pod in &orphans {
            // The cache may be behind: a node with this name may be back.
            let node = text(pod, "/spec/nodeName");
            if cluster.get(&super::cluster::NODES, "", node).await?.is_some() {
                continue;
            }
            let mut conditions = list(pod, "/status/conditions").to_vec();
            let message = "PodGC: node no longer exists";
            set_condition(
                &mut conditions,
                "DisruptionTarget",
                "True",
                "DeletionByPodGC",
                message,
                now,
            );
            let patch = json!({"status": {"conditions": conditions}});
            match cluster.merge(&PODS, pod, "status", patch).await {
                Err(error) if error.is_conflict() || error.is_not_found() => continue,
                other => drop(other?),
            }
            cluster.delete(&PODS, pod, Some(0)).await?;
            tracing::info!(pod = %Key::of(pod), node, "pod of a missing node deleted");
        }
        for pod in surplus(pods.iter().map(|pod| &**pod), TERMINATED_MAX) {
            cluster.delete(&PODS, pod, Some(0)).await?;
        }
        Ok(Some(next.map_or(ROUND, |at| until(now, at).min(ROUND))))
    }
}
