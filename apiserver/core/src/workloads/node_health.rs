//! Whether a node is alive, what its taints say about it, and which of its pods have to go.
//!
//! [`NodeHealth`] remembers when a node was last *seen* to beat, by the clock of the caller, so that a node with a wrong
//! clock is judged fairly. Nodes with the label [`EDGE_LABEL`] are autonomous: while they are not ready or
//! unreachable, their pods are neither evicted nor marked as not ready, because they go on running there.
//!
//! Source: the node lifecycle and taint eviction controllers as documented (grace period 40 s, taints
//! `node.kubernetes.io/not-ready` and `unreachable`, pods tolerate them for `tolerationSeconds`), and KubeEdge's rule
//! that an offline edge keeps its pods.

use super::object::{
    condition, created, flag, is_deleting, label, later, list, number, stamp, text, time,
};
use super::schedule::Taint;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Time without a beat after which a node is unreachable, in seconds: four missed beats.
pub const GRACE_SECONDS: i64 = 40;
/// Label of nodes that keep their pods while they are out of reach.
pub const EDGE_LABEL: &str = "node-role.kubernetes.io/edge";
/// Taint of a node that says it is not ready.
pub const NOT_READY: &str = "node.kubernetes.io/not-ready";
/// Taint of a node that says nothing.
pub const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
/// Conditions that the node reports and that become unknown with it.
const REPORTED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];
/// Taints that this module alone sets and removes.
const OWN_TAINTS: [&str; 7] = [
    NOT_READY,
    UNREACHABLE,
    "node.kubernetes.io/memory-pressure",
    "node.kubernetes.io/disk-pressure",
    "node.kubernetes.io/pid-pressure",
    "node.kubernetes.io/network-unavailable",
    "node.kubernetes.io/unschedulable",
];
/// First two bytes of pod networks; each node gets one /24, so there are 256 before the pool is empty.
const POD_NETWORK: (u8, u8) = (10, 244);

/// When one node was last seen to beat.
#[derive(Debug, Clone)]
pub struct NodeHealth {
    beat: (String, String),
    seen_at: Timestamp,
}

impl NodeHealth {
    /// Starts watching: the node counts as seen now, so that a restart of the controller condemns nobody.
    pub fn new(node: &Value, lease: Option<&Value>, now: Timestamp) -> Self {
        Self { beat: beat(node, lease), seen_at: now }
    }

    /// Takes what the API shows now.
    pub fn observe(&mut self, node: &Value, lease: Option<&Value>, now: Timestamp) {
        let beat = beat(node, lease);
        if beat != self.beat {
            *self = Self { beat, seen_at: now };
        }
    }

    /// When the node is out of reach unless it beats before. A node that never beat has half as much time again as
    /// `grace_seconds`.
    pub fn deadline(&self, node: &Value, grace_seconds: i64) -> Timestamp {
        let never = self.beat.0.is_empty() && self.beat.1.is_empty();
        if never {
            return later(self.seen_at.max(created(node)), grace_seconds + grace_seconds / 2);
        }
        later(self.seen_at, grace_seconds)
    }
}

/// The node's two signs of life: the lease's renewal and the heartbeat in the status.
fn beat(node: &Value, lease: Option<&Value>) -> (String, String) {
    let renewed = lease.map_or("", |lease| text(lease, "/spec/renewTime"));
    // A status written by this module carries the old heartbeat on, so it is no sign of life.
    let heartbeat = condition(node, "Ready").map_or("", |ready| text(ready, "/lastHeartbeatTime"));
    (renewed.to_owned(), heartbeat.to_owned())
}

/// Whether the pods of a node stay while it is out of reach.
pub fn is_autonomous(node: &Value) -> bool {
    label(node, EDGE_LABEL).is_some()
}

/// The node's conditions once it is out of reach; `None` if they say so already.
pub fn lost_conditions(node: &Value, now: Timestamp) -> Option<Vec<Value>> {
    let mut conditions = list(node, "/status/conditions").to_vec();
    let mut changed = false;
    for kind in REPORTED {
        let known = conditions.iter_mut().find(|condition| text(condition, "/type") == kind);
        let Some(known) = known else {
            // Only Ready has to exist; the others are the node's to report.
            if kind == "Ready" {
                changed = true;
                conditions.push(json!({"type": kind, "status": "Unknown", "reason": "NodeStatusNeverUpdated",
                    "message": "Kubelet never posted node status.", "lastTransitionTime": stamp(now)}));
            }
            continue;
        };
        if text(known, "/status") != "Unknown" {
            changed = true;
            known["status"] = json!("Unknown");
            known["reason"] = json!("NodeStatusUnknown");
            known["message"] = json!("Kubelet stopped posting node status.");
            known["lastTransitionTime"] = json!(stamp(now));
        }
    }
    changed.then_some(conditions)
}

/// The taints that fit the node's conditions, with everyone else's kept; `None` if it has them already.
pub fn wanted_taints(node: &Value, now: Timestamp) -> Option<Vec<Value>> {
    let status = |kind| condition(node, kind).map_or("", |condition| text(condition, "/status"));
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    match status("Ready") {
        "True" => {}
        "Unknown" => wanted.extend([(UNREACHABLE, "NoSchedule"), (UNREACHABLE, "NoExecute")]),
        _ => wanted.extend([(NOT_READY, "NoSchedule"), (NOT_READY, "NoExecute")]),
    }
    for (kind, key) in [
        ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
        ("DiskPressure", "node.kubernetes.io/disk-pressure"),
        ("PIDPressure", "node.kubernetes.io/pid-pressure"),
        ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
    ] {
        if status(kind) == "True" {
            wanted.push((key, "NoSchedule"));
        }
    }
    if flag(node, "/spec/unschedulable") {
        wanted.push(("node.kubernetes.io/unschedulable", "NoSchedule"));
    }

    let current = list(node, "/spec/taints");
    let pair = |taint: &Value| (text(taint, "/key").to_owned(), text(taint, "/effect").to_owned());
    let is_own = |taint: &&Value| OWN_TAINTS.contains(&text(taint, "/key"));
    let have: BTreeSet<(String, String)> = current.iter().filter(is_own).map(pair).collect();
    let want: BTreeSet<(String, String)> =
        wanted.iter().map(|(key, effect)| ((*key).to_owned(), (*effect).to_owned())).collect();
    if have == want {
        return None;
    }
    let mut taints: Vec<Value> = current
        .iter()
        .filter(|taint| !is_own(taint) || want.contains(&pair(taint)))
        .cloned()
        .collect();
    for (key, effect) in want.difference(&have) {
        taints.push(json!({"key": key, "effect": effect, "timeAdded": stamp(now)}));
    }
    Some(taints)
}

/// What the taints of a node mean for one of its pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stay {
    /// The pod may stay.
    Forever,
    /// The pod has to go at this time, unless the taints go first.
    Until(Timestamp),
}

/// How long `pod` may stay on `node`.
pub fn stay(node: &Value, pod: &Value) -> Stay {
    if is_deleting(pod) {
        return Stay::Forever;
    }
    let tolerations = list(pod, "/spec/tolerations");
    let mut limit: Option<Timestamp> = None;
    for taint in list(node, "/spec/taints") {
        let parsed = Taint {
            key: text(taint, "/key"),
            value: text(taint, "/value"),
            effect: text(taint, "/effect"),
        };
        if parsed.effect != "NoExecute" {
            continue;
        }
        if matches!(parsed.key, NOT_READY | UNREACHABLE) && is_autonomous(node) {
            continue;
        }
        let added = time(taint, "/timeAdded").unwrap_or(Timestamp::UNIX_EPOCH);
        // Among the tolerations that cover a taint, the shortest counts; none at all means at once.
        let covering: Vec<Option<i64>> = tolerations
            .iter()
            .filter(|toleration| parsed.tolerated_by(toleration))
            .map(|toleration| number(toleration, "/tolerationSeconds"))
            .collect();
        let at = if covering.is_empty() {
            Some(Timestamp::UNIX_EPOCH)
        } else {
            covering.into_iter().flatten().min().map(|seconds| later(added, seconds.max(0)))
        };
        limit = super::object::earliest(limit, at);
    }
    limit.map_or(Stay::Forever, Stay::Until)
}

/// Whether so many nodes are lost that the fault is more likely on this side: all of them, or more than two that make
/// up 55 % of the fleet. Nobody is evicted meanwhile.
pub fn is_hub_cut<'a>(nodes: impl IntoIterator<Item = &'a Value>) -> bool {
    let (mut all, mut lost) = (0u32, 0u32);
    for node in nodes {
        all += 1;
        lost += u32::from(condition(node, "Ready").is_none_or(|r| text(r, "/status") != "True"));
    }
    lost > 0 && (lost == all || (lost > 2 && lost * 100 >= all * 55))
}

/// A free pod network for a node without one; `None` when all 256 are given.
pub fn free_pod_cidr<'a>(nodes: impl IntoIterator<Item = &'a Value>) -> Option<String> {
    let taken: BTreeSet<String> =
        nodes.into_iter().map(|node| text(node, "/spec/podCIDR").to_owned()).collect();
    let (a, b) = POD_NETWORK;
    (0..=u8::MAX).map(|n| format!("{a}.{b}.{n}.0/24")).find(|cidr| !taken.contains(cidr))
}

/// A pod's conditions once its node is lost: not ready. `None` if they say so already or never said otherwise.
pub fn lost_pod_conditions(pod: &Value, now: Timestamp) -> Option<Vec<Value>> {
    let mut conditions = list(pod, "/status/conditions").to_vec();
    let ready = conditions
        .iter_mut()
        .find(|c| text(c, "/type") == "Ready" && text(c, "/status") == "True")?;
    ready["status"] = json!("False");
    ready["reason"] = json!("NodeNotReady");
    ready["lastTransitionTime"] = json!(stamp(now));
    Some(conditions)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        later("2026-01-01T00:00:00Z".parse().expect("a time"), seconds)
    }

    fn node(ready: &str, labels: Value) -> Value {
        json!({"metadata": {"name": "n", "labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"taints": [{"key": "mine", "effect": "NoSchedule"}]},
            "status": {"conditions": [
                {"type": "Ready", "status": ready, "reason": "KubeletReady", "lastHeartbeatTime": "h"},
                {"type": "DiskPressure", "status": "False"}]}})
    }

    fn lease(renewed: &str) -> Value {
        json!({"spec": {"renewTime": renewed}})
    }

    fn keys(taints: &[Value]) -> Vec<String> {
        taints.iter().map(|t| format!("{}:{}", text(t, "/key"), text(t, "/effect"))).collect()
    }

    #[test]
    fn a_node_is_lost_forty_seconds_after_its_last_new_beat() {
        let node = node("True", json!({}));
        let mut health = NodeHealth::new(&node, Some(&lease("a")), at(0));
        health.observe(&node, Some(&lease("b")), at(10));
        health.observe(&node, Some(&lease("b")), at(30));
        assert_eq!(health.deadline(&node, GRACE_SECONDS), at(50));
        let silent = json!({"metadata": {"name": "n"}});
        assert_eq!(NodeHealth::new(&silent, None, at(0)).deadline(&silent, GRACE_SECONDS), at(60));
    }

    #[test]
    fn a_lost_node_becomes_unknown_and_unreachable_and_comes_back() {
        let mut node = node("True", json!({}));
        assert_eq!(wanted_taints(&node, at(0)), None);
        let conditions = lost_conditions(&node, at(40)).expect("a change");
        node["status"]["conditions"] = json!(conditions);
        let ready = condition(&node, "Ready").expect("a condition");
        assert_eq!(text(ready, "/status"), "Unknown");
        assert_eq!(text(ready, "/reason"), "NodeStatusUnknown");
        assert_eq!(text(ready, "/message"), "Kubelet stopped posting node status.");
        assert_eq!(text(ready, "/lastHeartbeatTime"), "h");
        assert_eq!(lost_conditions(&node, at(41)), None);
        let taints = wanted_taints(&node, at(40)).expect("taints");
        assert_eq!(
            keys(&taints),
            [
                "mine:NoSchedule".to_owned(),
                format!("{UNREACHABLE}:NoExecute"),
                format!("{UNREACHABLE}:NoSchedule")
            ]
        );
        node["spec"]["taints"] = json!(taints);
        assert_eq!(wanted_taints(&node, at(41)), None);
        node["status"]["conditions"][0]["status"] = json!("True");
        assert_eq!(keys(&wanted_taints(&node, at(50)).expect("taints")), ["mine:NoSchedule"]);
    }

    #[test]
    fn a_new_node_is_not_ready_until_it_says_so() {
        let node = json!({"metadata": {"name": "n"}, "spec": {"unschedulable": true}});
        assert_eq!(
            keys(&wanted_taints(&node, at(0)).expect("taints")),
            [
                format!("{NOT_READY}:NoExecute"),
                format!("{NOT_READY}:NoSchedule"),
                "node.kubernetes.io/unschedulable:NoSchedule".to_owned()
            ]
        );
    }

    #[test]
    fn pods_leave_a_lost_node_after_their_toleration_and_an_edge_never() {
        let taint = json!({"key": UNREACHABLE, "effect": "NoExecute", "timeAdded": stamp(at(40))});
        let tolerant = json!({"spec": {"tolerations": [{"key": UNREACHABLE, "operator": "Exists",
            "effect": "NoExecute", "tolerationSeconds": 300}]}});
        let forever =
            json!({"spec": {"tolerations": [{"key": UNREACHABLE, "operator": "Exists"}]}});
        let plain = json!({"spec": {}});
        let mut cloud = node("Unknown", json!({}));
        cloud["spec"]["taints"] = json!([taint]);
        assert_eq!(stay(&cloud, &tolerant), Stay::Until(at(340)));
        assert_eq!(stay(&cloud, &forever), Stay::Forever);
        assert_eq!(stay(&cloud, &plain), Stay::Until(Timestamp::UNIX_EPOCH));
        let mut edge = node("Unknown", json!({EDGE_LABEL: ""}));
        edge["spec"]["taints"] = json!([taint]);
        assert_eq!(stay(&edge, &plain), Stay::Forever);
        edge["spec"]["taints"] = json!([{"key": "drain", "effect": "NoExecute"}]);
        assert_eq!(stay(&edge, &plain), Stay::Until(Timestamp::UNIX_EPOCH));
    }

    #[test]
    fn a_cut_of_most_nodes_is_our_own() {
        let up = node("True", json!({}));
        let down = node("Unknown", json!({}));
        assert!(!is_hub_cut([&up, &down]));
        assert!(is_hub_cut([&down]));
        assert!(is_hub_cut([&down, &down, &down, &up]));
        assert!(!is_hub_cut([&up, &up, &up, &down, &down, &down]));
        assert!(!is_hub_cut([]));
    }

    #[test]
    fn pod_networks_are_given_once() {
        let nodes: Vec<Value> = [0, 2]
            .iter()
            .map(|n| json!({"spec": {"podCIDR": format!("10.244.{n}.0/24")}}))
            .collect();
        assert_eq!(free_pod_cidr(&nodes).as_deref(), Some("10.244.1.0/24"));
    }
}
