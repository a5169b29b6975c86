//! How many pods a ReplicaSet makes or deletes, which ones, and its status.
//!
//! Source: the documented behaviour of ReplicaSet, with its order of scale-down (pods without a node first, then
//! pending, then not ready, then by deletion cost, crowding, youth and restarts).

use super::object::{
    Claim, availability, claim, condition, created, earliest, generation, is_active, is_deleting,
    is_ready, labels, name, number, phase, ready_since, restarts, stamp, text,
};
use crate::selector::LabelSelector;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::HashMap;

/// Pods made or deleted in one go; the rest follows with the next event.
pub const BURST_MAX: usize = 500;
/// Annotation that makes a pod cheaper (lower) or dearer to delete.
pub const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// What to do with the pods.
#[derive(Debug, Default)]
pub struct Plan<'a> {
    /// Pods to take.
    pub adopt: Vec<&'a Value>,
    /// Pods to let go.
    pub release: Vec<&'a Value>,
    /// Pods to make from the template.
    pub create: usize,
    /// Pods to delete, cheapest first.
    pub delete: Vec<&'a Value>,
}

/// Returns the steps that bring the pods of `replica_set` to its replica count.
pub fn plan<'a>(
    replica_set: &Value,
    selector: &LabelSelector,
    pods: impl IntoIterator<Item = &'a Value>,
    now: Timestamp,
) -> Plan<'a> {
    let Claim { mine, adopt, release } = claim(replica_set, selector, pods);
    // An ended pod is no reason to take it, and it counts for nobody.
    let adopt: Vec<&Value> = adopt.into_iter().filter(|pod| is_active(pod)).collect();
    let active: Vec<&Value> = mine.into_iter().filter(|pod| is_active(pod)).collect();
    let mut plan = Plan { release, ..Plan::default() };
    if is_deleting(replica_set) {
        return plan;
    }
    let wanted = usize::try_from(replicas(replica_set)).unwrap_or(0);
    let have = active.len() + adopt.len();
    plan.create = wanted.saturating_sub(have).min(BURST_MAX);
    let surplus = have.saturating_sub(wanted).min(BURST_MAX);
    if surplus > 0 {
        let mut all = active;
        all.extend(&adopt);
        plan.delete = cheapest(all, surplus, now);
    }
    plan.adopt = adopt;
    plan
}

/// `spec.replicas`, 1 when absent.
pub fn replicas(object: &Value) -> i64 {
    number(object, "/spec/replicas").unwrap_or(1).max(0)
}

/// The `count` pods whose loss hurts least.
fn cheapest(mut pods: Vec<&Value>, count: usize, now: Timestamp) -> Vec<&Value> {
    let mut crowd: HashMap<&str, usize> = HashMap::new();
    for pod in &pods {
        *crowd.entry(text(pod, "/spec/nodeName")).or_default() += 1;
    }
    pods.sort_by_cached_key(|pod| {
        let node = text(pod, "/spec/nodeName");
        let stage = match phase(pod) {
            "Running" => 2,
            "Unknown" => 1,
            _ => 0,
        };
        let cost: i64 = super::object::annotation(pod, DELETION_COST)
            .and_then(|cost| cost.parse().ok())
            .unwrap_or(0);
        // Ages compare by order of magnitude elsewhere; exact ages keep the choice stable here.
        let ready_for = ready_since(pod).map_or(0, |since| seconds(since, now));
        (
            !node.is_empty(),
            stage,
            is_ready(pod),
            cost,
            std::cmp::Reverse(crowd.get(node).copied().unwrap_or(0)),
            ready_for,
            -restarts(pod),
            seconds(created(pod), now),
            name(pod).to_owned(),
        )
    });
    pods.truncate(count);
    pods
}

fn seconds(since: Timestamp, now: Timestamp) -> i64 {
    now.as_second().saturating_sub(since.as_second())
}

/// The status that `replica_set` should have, and when it changes by itself next.
///
/// `failure` is the error of a pod that could not be made or deleted: reason and message.
pub fn status<'a>(
    replica_set: &Value,
    pods: impl IntoIterator<Item = &'a Value>,
    failure: Option<(&str, &str)>,
    now: Timestamp,
) -> (Value, Option<Timestamp>) {
    let minimum = number(replica_set, "/spec/minReadySeconds").unwrap_or(0);
    let template = replica_set
        .pointer("/spec/template/metadata/labels")
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_default();
    let (mut total, mut labelled, mut ready, mut available) = (0, 0, 0, 0);
    let mut next = None;
    for pod in pods.into_iter().filter(|pod| is_active(pod)) {
        total += 1;
        let carries =
            |(key, value)| labels(pod).is_some_and(|labels| labels.get(key) == Some(value));
        labelled += i64::from(template.iter().all(carries));
        ready += i64::from(is_ready(pod));
        match availability(pod, minimum, now) {
            Ok(is) => available += i64::from(is),
            Err(at) => next = earliest(next, Some(at)),
        }
    }
    let mut status = json!({"replicas": total, "observedGeneration": generation(replica_set)});
    for (field, count) in [
        ("fullyLabeledReplicas", labelled),
        ("readyReplicas", ready),
        ("availableReplicas", available),
    ] {
        if count > 0 {
            status[field] = json!(count);
        }
    }
    if let Some((reason, message)) = failure {
        let since = condition(replica_set, "ReplicaFailure")
            .filter(|old| text(old, "/reason") == reason)
            .and_then(|old| old.get("lastTransitionTime").cloned())
            .unwrap_or_else(|| json!(stamp(now)));
        status["conditions"] = json!([{"type": "ReplicaFailure", "status": "True", "reason": reason,
            "message": message, "lastTransitionTime": since}]);
    }
    (status, next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workloads::object::later;

    fn set(replicas: i64) -> Value {
        json!({"metadata": {"name": "web", "uid": "web", "generation": 3},
            "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
                "template": {"metadata": {"labels": {"app": "web"}}}}})
    }

    fn pod(name: &str, owner: Option<&str>, state: &str) -> Value {
        let (phase, ready) = match state {
            "ready" => ("Running", "True"),
            "ended" => ("Failed", "False"),
            "running" => ("Running", "False"),
            _ => ("Pending", "False"),
        };
        let owners: Vec<Value> =
            owner.iter().map(|uid| json!({"uid": uid, "controller": true})).collect();
        json!({"metadata": {"name": name, "uid": name, "labels": {"app": "web"}, "ownerReferences": owners,
                "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"nodeName": if state == "unbound" { "" } else { "n" }},
            "status": {"phase": phase, "conditions": [{"type": "Ready", "status": ready,
                "lastTransitionTime": "2026-01-01T00:00:10Z"}]}})
    }

    fn check(replicas: i64, pods: &[Value], create: usize, delete: &[&str], adopt: &[&str]) {
        let set = set(replicas);
        let selector = LabelSelector::from_object(&set["spec"]["selector"]).expect("a selector");
        let now = "2026-01-01T01:00:00Z".parse().expect("a time");
        let plan = plan(&set, &selector, pods, now);
        assert_eq!(plan.create, create);
        assert_eq!(plan.delete.iter().map(|pod| name(pod)).collect::<Vec<_>>(), delete);
        assert_eq!(plan.adopt.iter().map(|pod| name(pod)).collect::<Vec<_>>(), adopt);
    }

    #[test]
    fn missing_pods_are_made_and_ended_ones_do_not_count() {
        check(3, &[], 3, &[], &[]);
        check(3, &[pod("a", Some("web"), "ready"), pod("b", Some("web"), "ended")], 2, &[], &[]);
    }

    #[test]
    fn orphans_are_adopted_before_pods_are_made_and_other_owners_are_left_alone() {
        let pods = [pod("a", None, "ready"), pod("b", Some("other"), "ready")];
        check(2, &pods, 1, &[], &["a"]);
    }

    #[test]
    fn scale_down_takes_the_pods_that_serve_least() {
        let pods = [
            pod("ready", Some("web"), "ready"),
            pod("running", Some("web"), "running"),
            pod("pending", Some("web"), "pending"),
            pod("unbound", Some("web"), "unbound"),
        ];
        check(1, &pods, 0, &["unbound", "pending", "running"], &[]);
        let mut dear = pod("dear", Some("web"), "ready");
        dear["metadata"]["annotations"] = json!({DELETION_COST: "10"});
        check(1, &[dear, pod("plain", Some("web"), "ready")], 0, &["plain"], &[]);
    }

    #[test]
    fn a_ready_pod_becomes_available_after_the_minimum_time() {
        let mut set = set(1);
        set["spec"]["minReadySeconds"] = json!(30);
        let ready: Timestamp = "2026-01-01T00:00:10Z".parse().expect("a time");
        let pods = [pod("a", Some("web"), "ready")];
        let (early, next) = status(&set, &pods, None, later(ready, 29));
        assert_eq!(
            early,
            json!({"replicas": 1, "fullyLabeledReplicas": 1, "readyReplicas": 1, "observedGeneration": 3})
        );
        assert_eq!(next, Some(later(ready, 30)));
        let (late, next) = status(&set, &pods, None, later(ready, 30));
        assert_eq!(late["availableReplicas"], 1);
        assert_eq!(next, None);
    }
}
