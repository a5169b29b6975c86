//! Judges nodes by their leases, taints them, and evicts pods from those that are lost.
//!
//! Reads nodes, leases and pods; writes node conditions, taints and pod networks, the Ready condition of pods on lost
//! nodes, and deletes pods. Autonomous nodes (the edge) keep their pods, see `workloads::node_health`.

use super::cache::{Change, Key, Kind};
use super::cluster::{ClusterError, NODES, PODS};
use super::events::Weight;
use super::{Controller, World};
use jiff::Timestamp;
use serde_json::{Value, json};
use skerry_apiserver_core::workloads::node_health::{
    NodeHealth, Stay, free_pod_cidr, is_autonomous, is_hub_cut, lost_conditions,
    lost_pod_conditions, stay, wanted_taints,
};
use skerry_apiserver_core::workloads::object::{
    condition, earliest, has_condition, list, name, namespace, set_condition, text, uid, until,
};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// While most of the fleet is lost nobody is evicted; then it is looked at again after this.
const HUB_CUT_PAUSE: Duration = Duration::from_secs(10);

pub(super) struct Nodes {
    world: World,
    /// When each node was last seen to beat: uid to health.
    seen: Mutex<HashMap<String, NodeHealth>>,
}

impl Nodes {
    pub(super) fn new(world: &World) -> Self {
        let mut world = world.clone();
        world.recorder = world.recorder.with_component("node-controller");
        Self { world, seen: Mutex::new(HashMap::new()) }
    }

    /// When the node is lost unless it beats before.
    fn deadline(&self, node: &Value, now: Timestamp) -> Timestamp {
        let lease = self.world.caches.get(Kind::Lease, &Key::new("kube-node-lease", name(node)));
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let health = seen.entry(uid(node).to_owned()).or_insert_with(|| {
            let message = format!("Node {0} event: Registered Node {0} in Controller", name(node));
            self.world.recorder.record(&NODES, node, Weight::Normal, "RegisteredNode", message);
            NodeHealth::new(node, lease.as_deref(), now)
        });
        health.observe(node, lease.as_deref(), now);
        health.deadline(node, self.world.settings.node_grace_seconds)
    }

    fn pods_on(&self, node: &str) -> Vec<Arc<Value>> {
        let mut pods = self.world.caches.all(Kind::Pod);
        pods.retain(|pod| text(pod, "/spec/nodeName") == node);
        pods
    }

    /// Marks the pods of a lost node as not ready, so that services stop sending there.
    async fn mark_pods(&self, node: &Value, now: Timestamp) -> Result<(), ClusterError> {
        for pod in self.pods_on(name(node)) {
            let Some(conditions) = lost_pod_conditions(&pod, now) else { continue };
            let patch = json!({"status": {"conditions": conditions}});
            forgive(self.world.cluster.merge(&PODS, &pod, "status", patch).await)?;
            let message = "Node is not ready";
            self.world.recorder.record(&PODS, &pod, Weight::Warning, "NodeNotReady", message);
        }
        Ok(())
    }

    /// Deletes pods whose time on the node is over; returns when the next one's is.
    async fn evict(&self, node: &Value, now: Timestamp) -> Result<Option<Timestamp>, ClusterError> {
        if !list(node, "/spec/taints").iter().any(|taint| text(taint, "/effect") == "NoExecute") {
            return Ok(None);
        }
        let mut next = None;
        for pod in self.pods_on(name(node)) {
            match stay(node, &pod) {
                Stay::Forever => {}
                Stay::Until(at) if at > now => next = earliest(next, Some(at)),
                Stay::Until(_) => {
                    let nodes = self.world.caches.all(Kind::Node);
                    // A taint put by a person is obeyed also then.
                    if !has_condition(node, "Ready") && is_hub_cut(nodes.iter().map(|node| &**node))
                    {
                        let pause = i64::try_from(HUB_CUT_PAUSE.as_secs()).unwrap_or(i64::MAX);
                        let at = skerry_apiserver_core::workloads::object::later(now, pause);
                        return Ok(earliest(next, Some(at)));
                    }
                    self.evict_pod(&pod, now).await?;
                }
            }
        }
        Ok(next)
    }

    async fn evict_pod(&self, pod: &Value, now: Timestamp) -> Result<(), ClusterError> {
        let mut conditions = list(pod, "/status/conditions").to_vec();
        let message = "Taint manager: deleting due to NoExecute taint";
        set_condition(
            &mut conditions,
            "DisruptionTarget",
            "True",
            "DeletionByTaintManager",
            message,
            now,
        );
        let patch = json!({"status": {"conditions": conditions}});
        forgive(self.world.cluster.merge(&PODS, pod, "status", patch).await)?;
        let message = format!("Marking for deletion Pod {}/{}", namespace(pod), name(pod));
        self.world.recorder.record(&PODS, pod, Weight::Normal, "TaintManagerEviction", message);
        self.world.cluster.delete(&PODS, pod, None).await
    }

    /// Writes what the node lacks; returns the node as it is then.
    async fn correct(
        &self,
        node: &Value,
        lost: bool,
        now: Timestamp,
    ) -> Result<Value, ClusterError> {
        let cluster = &self.world.cluster;
        let mut node = node.clone();
        if lost && let Some(conditions) = lost_conditions(&node, now) {
            // From the API, not from the cache: what is written is the whole status.
            let Some(mut fresh) = cluster.get(&NODES, "", name(&node)).await? else {
                return Ok(node);
            };
            if condition(&fresh, "Ready") != condition(&node, "Ready") {
                // The node has spoken meanwhile; its change comes here as well.
                return Ok(fresh);
            }
            fresh["status"]["conditions"] = json!(conditions);
            node = cluster.replace_status(&NODES, &fresh).await?;
            let message = format!("Node {} status is now: NodeNotReady", name(&node));
            self.world.recorder.record(&NODES, &node, Weight::Normal, "NodeNotReady", message);
        }
        if let Some(taints) = wanted_taints(&node, now) {
            node = cluster.merge(&NODES, &node, "", json!({"spec": {"taints": taints}})).await?;
        }
        if text(&node, "/spec/podCIDR").is_empty() {
            let nodes = cluster.list(&NODES, "", "").await?;
            if let Some(cidr) = free_pod_cidr(&nodes) {
                let patch = json!({"spec": {"podCIDR": cidr, "podCIDRs": [cidr]}});
                node = cluster.merge(&NODES, &node, "", patch).await?;
            } else {
                self.world.recorder.record(
                    &NODES,
                    &node,
                    Weight::Warning,
                    "CIDRNotAvailable",
                    "Node has no pod network: all are taken",
                );
            }
        }
        Ok(node)
    }
}

impl Controller for Nodes {
    const NAME: &'static str = "node";
    /// One, so that a pod network is given once.
    const WORKERS: usize = 1;
    const KIND: Option<Kind> = Some(Kind::Node);

    fn keys(&self, change: &Change<'_>) -> Vec<Key> {
        let Some(object) = change.object() else { return Vec::new() };
        match change.kind {
            Kind::Node | Kind::Lease => vec![Key::new("", name(object))],
            Kind::Pod => {
                let node = Key::new("", text(object, "/spec/nodeName"));
                let moved = change.old.is_none_or(|old| {
                    text(old, "/spec/nodeName") != &*node.name || old["spec"] != object["spec"]
                });
                let tainted = || {
                    self.world.caches.get(Kind::Node, &node).is_some_and(|node| {
                        list(&node, "/spec/taints")
                            .iter()
                            .any(|t| text(t, "/effect") == "NoExecute")
                    })
                };
                if moved && !node.name.is_empty() && tainted() { vec![node] } else { Vec::new() }
            }
            _ => Vec::new(),
        }
    }

    async fn sync(&self, key: &Key) -> Result<Option<Duration>, ClusterError> {
        let Some(node) = self.world.caches.get(Kind::Node, key) else {
            let nodes = self.world.caches.all(Kind::Node);
            self.seen
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .retain(|id, _| nodes.iter().any(|node| uid(node) == id));
            return Ok(None);
        };
        let now = Timestamp::now();
        let deadline = self.deadline(&node, now);
        let lost = deadline <= now;
        let node = match self.correct(&node, lost, now).await {
            Err(error) if error.is_not_found() => return Ok(None),
            other => other?,
        };
        if !has_condition(&node, "Ready") && !is_autonomous(&node) {
            self.mark_pods(&node, now).await?;
        }
        let eviction = self.evict(&node, now).await?;
        let next = earliest(eviction, (!lost).then_some(deadline));
        Ok(next.map(|at| until(now, at)))
    }
}

/// A pod that changed or went meanwhile brings its node here again.
fn forgive(result: Result<Value, ClusterError>) -> Result<(), ClusterError> {
    match result {
        Err(error) if error.is_conflict() || error.is_not_found() => Ok(()),
        other => other.map(drop),
    }
}
