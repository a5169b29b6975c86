//! Which nodes run a DaemonSet's pod, how an update moves over them, and the status.
//!
//! Pods are made with a required node affinity on the node's name and bound by the scheduler, as in Kubernetes, and get
//! the tolerations that Kubernetes adds: they stay on nodes that are not ready or unreachable, and start on cordoned ones.

use super::object::{
    availability, created, earliest, generation, is_active, is_deleting, is_ready, is_terminal,
    label, list, name, namespace, normal_template, number, owner_reference, pod_from_template,
    scaled, short_hash, text,
};
use super::schedule::{matches_node, taints};
use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Label with the hash of the template a pod was made from.
pub const HASH_LABEL: &str = "controller-revision-hash";
/// Pods made or deleted in one go.
pub const BURST_MAX: usize = 250;

/// What to do for one DaemonSet.
#[derive(Debug, Default)]
pub struct Plan<'a> {
    /// Pods to create.
    pub create: Vec<Value>,
    /// Pods to delete.
    pub delete: Vec<&'a Value>,
    /// Pods among [`Plan::delete`] that had failed: reason for an event.
    pub failed: Vec<&'a Value>,
    /// The ControllerRevision of the current template, if it does not exist yet.
    pub revision: Option<Value>,
    /// Number to give to the existing ControllerRevision of the current template: name and number.
    pub renumber: Option<(String, i64)>,
    /// ControllerRevisions past the history limit.
    pub forget: Vec<String>,
    /// The status.
    pub status: Value,
    /// When an unavailable pod becomes available by itself.
    pub again_at: Option<Timestamp>,
}

/// Returns what `daemon_set` needs now. `pods` and `revisions` are those that it controls.
pub fn plan<'a>(
    daemon_set: &Value,
    nodes: &[&Value],
    pods: &'a [Value],
    revisions: &[Value],
    now: Timestamp,
) -> Plan<'a> {
    let mut plan = Plan::default();
    let template =
        normal_template(daemon_set.pointer("/spec/template").unwrap_or(&Value::Null), "");
    let hash = short_hash(&template, number(daemon_set, "/status/collisionCount").unwrap_or(0));
    let minimum = number(daemon_set, "/spec/minReadySeconds").unwrap_or(0);
    let is_new = |pod: &Value| label(pod, HASH_LABEL) == Some(hash.as_str());

    let mut by_node: BTreeMap<&str, Vec<&'a Value>> = BTreeMap::new();
    for pod in pods {
        by_node.entry(target(pod)).or_default().push(pod);
    }
    let probe = pod(daemon_set, "", &hash);
    let (mut desired, mut current, mut misplaced, mut ready, mut available, mut updated) =
        (0i64, 0i64, 0i64, 0i64, 0i64, 0i64);
    let mut old: Vec<(&'a Value, bool)> = Vec::new();
    let mut fresh_unavailable = 0i64;
    for node in nodes {
        let here = by_node.remove(name(node)).unwrap_or_default();
        let runs = should_run(&probe, node);
        let (ended, living): (Vec<&Value>, Vec<&Value>) =
            here.iter().copied().partition(|pod| is_terminal(pod));
        for pod in ended.into_iter().filter(|pod| !is_deleting(pod)) {
            plan.failed.push(pod);
            plan.delete.push(pod);
        }
        let mut active: Vec<&Value> = living.iter().copied().filter(|pod| is_active(pod)).collect();
        if !runs.start {
            misplaced += i64::from(!active.is_empty());
            if !runs.stay {
                plan.delete.extend(&active);
            }
            continue;
        }
        desired += 1;
        // The oldest of several stays, a bound one before one that still waits.
        active.sort_by_key(|pod| (text(pod, "/spec/nodeName").is_empty(), created(pod), name(pod)));
        let Some((kept, extra)) = active.split_first() else {
            // A pod that is still leaving has to be gone first.
            if living.is_empty() {
                plan.create.push(pod(daemon_set, name(node), &hash));
            }
            continue;
        };
        plan.delete.extend(extra);
        current += 1;
        ready += i64::from(is_ready(kept));
        let is_available = match availability(kept, minimum, now) {
            Ok(is) => is,
            Err(at) => {
                plan.again_at = earliest(plan.again_at, Some(at));
                false
            }
        };
        available += i64::from(is_available);
        if is_new(kept) {
            updated += 1;
            fresh_unavailable += i64::from(!is_available);
        } else {
            old.push((kept, is_available));
        }
    }
    // Nodes without a pod count as unavailable for the update as well.
    let missing = desired - current;
    for pods in by_node.values() {
        plan.delete.extend(pods.iter().filter(|pod| is_active(pod)));
    }
    if text(daemon_set, "/spec/updateStrategy/type") != "OnDelete" {
        let allowed = max_unavailable(daemon_set, desired);
        let mut room = allowed - fresh_unavailable - missing;
        // An old pod that does not work can be replaced at no loss.
        for (pod, is_available) in &old {
            if !is_available {
                plan.delete.push(pod);
                room -= 1;
            }
        }
        for (pod, _) in old.iter().filter(|(_, is_available)| *is_available) {
            if room <= 0 {
                break;
            }
            plan.delete.push(pod);
            room -= 1;
        }
    }
    plan.create.truncate(BURST_MAX);
    plan.delete.truncate(BURST_MAX);
    if is_deleting(daemon_set) {
        plan.create.clear();
        plan.delete.clear();
    } else {
        keep_revisions(daemon_set, &hash, pods, revisions, &mut plan);
    }

    let mut status = json!({
        "currentNumberScheduled": current, "desiredNumberScheduled": desired,
        "numberMisscheduled": misplaced, "numberReady": ready,
        "observedGeneration": generation(daemon_set),
    });
    for (field, count) in [
        ("updatedNumberScheduled", updated),
        ("numberAvailable", available),
        ("numberUnavailable", (desired - available).max(0)),
    ] {
        if count > 0 {
            status[field] = json!(count);
        }
    }
    for field in ["collisionCount", "conditions"] {
        if let Some(value) = daemon_set.pointer(&format!("/status/{field}")) {
            status[field] = value.clone();
        }
    }
    plan.status = status;
    plan
}

/// `maxUnavailable`, rounded up, at least one: a surge is not done here, so that zero would never move.
fn max_unavailable(daemon_set: &Value, desired: i64) -> i64 {
    let value = daemon_set.pointer("/spec/updateStrategy/rollingUpdate/maxUnavailable");
    scaled(value, desired, true).unwrap_or(1).max(1)
}

struct Runs {
    start: bool,
    stay: bool,
}

fn should_run(probe: &Value, node: &Value) -> Runs {
    let only = text(probe, "/spec/nodeName");
    if (!only.is_empty() && only != name(node)) || !matches_selector(probe, node) {
        return Runs { start: false, stay: false };
    }
    let tolerations = list(probe, "/spec/tolerations");
    let bars = |effects: &[&str]| {
        taints(node).any(|taint| effects.contains(&taint.effect) && !taint.tolerated(tolerations))
    };
    Runs { start: !bars(&["NoSchedule", "NoExecute"]), stay: !bars(&["NoExecute"]) }
}

/// The template's own node selector and affinity, without the node name that [`pod`] adds.
fn matches_selector(probe: &Value, node: &Value) -> bool {
    let mut probe = probe.clone();
    set_node(&mut probe, name(node));
    matches_node(&probe, node)
}

/// The node a pod is bound to, or meant for.
fn target(pod: &Value) -> &str {
    let bound = text(pod, "/spec/nodeName");
    if !bound.is_empty() {
        return bound;
    }
    let terms = "/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms";
    list(pod, terms)
        .iter()
        .flat_map(|term| list(term, "/matchFields"))
        .find(|field| text(field, "/key") == "metadata.name")
        .map_or("", |field| text(field, "/values/0"))
}

/// The pod for one node.
fn pod(daemon_set: &Value, node: &str, hash: &str) -> Value {
    let template = daemon_set.pointer("/spec/template").cloned().unwrap_or_default();
    let mut pod = pod_from_template(daemon_set, "apps/v1", "DaemonSet", &template);
    pod["metadata"]["labels"][HASH_LABEL] = json!(hash);
    pod["metadata"]["labels"]["pod-template-generation"] =
        json!(generation(daemon_set).to_string());
    let host_network = super::object::flag(&pod, "/spec/hostNetwork");
    let mut tolerations = list(&pod, "/spec/tolerations").to_vec();
    let mut add = |key: &str, effect: &str| {
        let key = format!("node.kubernetes.io/{key}");
        let same = |t: &Value| text(t, "/key") == key && text(t, "/effect") == effect;
        if !tolerations.iter().any(same) {
            tolerations.push(json!({"key": key, "operator": "Exists", "effect": effect}));
        }
    };
    add("not-ready", "NoExecute");
    add("unreachable", "NoExecute");
    for key in ["disk-pressure", "memory-pressure", "pid-pressure", "unschedulable"] {
        add(key, "NoSchedule");
    }
    if host_network {
        add("network-unavailable", "NoSchedule");
    }
    pod["spec"]["tolerations"] = json!(tolerations);
    if !node.is_empty() {
        set_node(&mut pod, node);
    }
    pod
}

/// Adds the node's name to every required affinity term.
fn set_node(pod: &mut Value, node: &str) {
    let field = json!({"key": "metadata.name", "operator": "In", "values": [node]});
    let required = "requiredDuringSchedulingIgnoredDuringExecution";
    let at = format!("/spec/affinity/nodeAffinity/{required}/nodeSelectorTerms");
    let mut terms = list(pod, &at).to_vec();
    if terms.is_empty() {
        terms.push(json!({}));
    }
    for term in &mut terms {
        term["matchFields"] = json!([field]);
    }
    for pointer in ["affinity", "nodeAffinity"] {
        let parent =
            if pointer == "affinity" { &mut pod["spec"] } else { &mut pod["spec"]["affinity"] };
        if !parent[pointer].is_object() {
            parent[pointer] = json!({});
        }
    }
    pod["spec"]["affinity"]["nodeAffinity"][required] = json!({"nodeSelectorTerms": terms});
}

/// Makes the history that `kubectl rollout history|undo` read.
fn keep_revisions(
    daemon_set: &Value,
    hash: &str,
    pods: &[Value],
    revisions: &[Value],
    plan: &mut Plan<'_>,
) {
    let number_of = |revision: &Value| number(revision, "/revision").unwrap_or(0);
    let newest = revisions.iter().map(number_of).max().unwrap_or(0);
    let revision_name = format!("{}-{hash}", name(daemon_set));
    match revisions.iter().find(|revision| label(revision, HASH_LABEL) == Some(hash)) {
        Some(own) if number_of(own) < newest => {
            plan.renumber = Some((name(own).to_owned(), newest + 1));
        }
        Some(_) => {}
        None => {
            let mut template = daemon_set.pointer("/spec/template").cloned().unwrap_or_default();
            template["$patch"] = json!("replace");
            let mut labels = daemon_set
                .pointer("/spec/template/metadata/labels")
                .cloned()
                .filter(Value::is_object)
                .unwrap_or_else(|| json!({}));
            labels[HASH_LABEL] = json!(hash);
            plan.revision = Some(json!({
                "apiVersion": "apps/v1", "kind": "ControllerRevision",
                "metadata": {
                    "name": revision_name, "namespace": namespace(daemon_set), "labels": labels,
                    "ownerReferences": [owner_reference(daemon_set, "apps/v1", "DaemonSet")],
                },
                "data": {"spec": {"template": template}}, "revision": newest + 1,
            }));
        }
    }
    let limit = number(daemon_set, "/spec/revisionHistoryLimit").unwrap_or(10).max(0);
    let mut idle: Vec<&Value> = revisions
        .iter()
        .filter(|revision| {
            let own = label(revision, HASH_LABEL);
            own != Some(hash) && !pods.iter().any(|pod| label(pod, HASH_LABEL) == own)
        })
        .collect();
    idle.sort_by_key(|revision| number_of(revision));
    let surplus = idle.len().saturating_sub(usize::try_from(limit).unwrap_or(usize::MAX));
    plan.forget = idle[..surplus].iter().map(|revision| name(revision).to_owned()).collect();
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(image: &str) -> Value {
        json!({"metadata": {"name": "agent", "namespace": "default", "uid": "ds", "generation": 1},
            "spec": {"selector": {"matchLabels": {"app": "agent"}},
                "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
                "template": {"metadata": {"labels": {"app": "agent"}}, "spec": {"image": image}}}})
    }

    fn node(name: &str) -> Value {
        json!({"metadata": {"name": name, "labels": {"site": name}}, "spec": {}})
    }

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().expect("a time")
    }

    /// Stores the pods to create as the API and a node would.
    fn store(pods: &mut Vec<Value>, plan: Vec<Value>, ready: bool, serial: &mut u32) {
        for mut pod in plan {
            *serial += 1;
            pod["metadata"]["name"] = json!(format!("agent-{serial}"));
            pod["metadata"]["uid"] = json!(serial.to_string());
            pod["spec"]["nodeName"] = json!(target(&pod).to_owned());
            pod["status"] = json!({"phase": "Running", "conditions": [
                {"type": "Ready", "status": if ready { "True" } else { "False" }}]});
            pods.push(pod);
        }
    }

    #[test]
    fn every_matching_node_gets_one_pod_meant_for_it() {
        let (mut a, b, mut c) = (node("a"), node("b"), node("c"));
        a["spec"]["taints"] =
            json!([{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]);
        c["spec"]["taints"] = json!([{"key": "gpu", "effect": "NoSchedule"}]);
        let plan = plan(&set("a"), &[&a, &b, &c], &[], &[], now());
        let targets: Vec<&str> = plan.create.iter().map(target).collect();
        assert_eq!(targets, ["a", "b"]);
        assert!(matches_node(&plan.create[0], &a));
        assert!(!matches_node(&plan.create[0], &b));
        assert_eq!(plan.status["desiredNumberScheduled"], 2);
        assert_eq!(plan.revision.expect("a revision")["revision"], 1);
    }

    #[test]
    fn a_node_selector_is_kept_beside_the_node_name() {
        let mut set = set("a");
        set["spec"]["template"]["spec"]["affinity"] = json!({"nodeAffinity":
            {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                {"matchExpressions": [{"key": "site", "operator": "In", "values": ["b"]}]}]}}});
        let (a, b) = (node("a"), node("b"));
        let plan = plan(&set, &[&a, &b], &[], &[], now());
        assert_eq!(plan.create.iter().map(target).collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn pods_leave_nodes_that_no_longer_match_and_failed_ones_are_replaced() {
        let (a, b) = (node("a"), node("b"));
        let (mut pods, mut serial) = (Vec::new(), 0);
        store(&mut pods, plan(&set("a"), &[&a, &b], &[], &[], now()).create, true, &mut serial);
        let mut selected = set("a");
        selected["spec"]["template"]["spec"]["nodeSelector"] = json!({"site": "a"});
        let selected = plan(&selected, &[&a, &b], &pods, &[], now());
        assert!(selected.delete.iter().any(|pod| target(pod) == "b"));
        pods[0]["status"]["phase"] = json!("Failed");
        let failed = plan(&set("a"), &[&a, &b], &pods, &[], now());
        assert_eq!(failed.failed.len(), 1);
        assert_eq!(failed.status["numberReady"], 1);
    }

    #[test]
    fn an_old_template_that_returns_gets_the_newest_number() {
        let first = plan(&set("a"), &[], &[], &[], now()).revision.expect("a revision");
        let revisions = [first];
        let second = plan(&set("b"), &[], &[], &revisions, now()).revision.expect("a revision");
        assert_eq!(second["revision"], 2);
        let [first] = revisions;
        let back_name = name(&first).to_owned();
        let back = plan(&set("a"), &[], &[], &[first, second], now());
        assert_eq!(back.renumber, Some((back_name, 3)));
        assert!(back.revision.is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn an_update_never_takes_more_than_the_limit_and_ends(
            count in 1usize..8,
            limit in 1i64..4,
            lag in proptest::collection::vec(any::<bool>(), 60),
        ) {
            let nodes: Vec<Value> = (0..count).map(|n| node(&format!("n{n}"))).collect();
            let nodes: Vec<&Value> = nodes.iter().collect();
            let (mut pods, mut serial) = (Vec::new(), 0);
            store(&mut pods, plan(&set("a"), &nodes, &[], &[], now()).create, true, &mut serial);
            let mut set = set("b");
            set["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"] = json!(limit);
            for ready in lag.into_iter().chain([true; 40]) {
                let plan = plan(&set, &nodes, &pods, &[], now());
                let gone: Vec<String> = plan.delete.iter().map(|pod| name(pod).to_owned()).collect();
                let create = plan.create;
                pods.retain(|pod| !gone.contains(&name(pod).to_owned()));
                store(&mut pods, create, false, &mut serial);
                let available = pods.iter().filter(|pod| is_ready(pod)).count();
                prop_assert!(available as i64 >= count as i64 - limit, "{available} of {count}");
                if ready {
                    for pod in &mut pods {
                        pod["status"]["conditions"][0]["status"] = json!("True");
                    }
                }
            }
            let last = plan(&set, &nodes, &pods, &[], now());
            prop_assert_eq!(&last.status["updatedNumberScheduled"], &json!(count));
            prop_assert!(last.create.is_empty() && last.delete.is_empty());
        }
    }
}
