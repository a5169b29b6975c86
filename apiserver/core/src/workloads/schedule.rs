//! Which node a pod goes to, and why not another.
//!
//! A [`Snapshot`] holds what the nodes can give and what the pods on them take; [`Snapshot::place`] filters and scores,
//! [`Snapshot::assume`] books a decision so that the next pod sees it before the API shows it. The scheduler of the
//! server is the caller. There is no preemption, and volumes do not limit the choice.
//!
//! Filters and wording: the plugins of kube-scheduler (NodeName, NodeUnschedulable, NodeAffinity, TaintToleration,
//! NodePorts, NodeResourcesFit, InterPodAffinity). Scores are simpler: preferred node affinity, then taints of effect
//! PreferNoSchedule, then spread of an owner's pods, then the fewest pods.

use super::object::{
    controller_of, is_terminal, label, labels, list, name, namespace, number, text,
};
use super::quantity::{self, Amounts};
use crate::selector::LabelSelector;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap, HashSet};

/// The scheduler's own name in `spec.schedulerName`.
pub const DEFAULT_SCHEDULER: &str = "default-scheduler";

/// Why a pod could not be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unschedulable {
    /// Nodes looked at.
    pub nodes: usize,
    /// Reason to number of nodes.
    pub reasons: BTreeMap<String, usize>,
}

impl std::fmt::Display for Unschedulable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.nodes == 0 {
            return f.write_str("no nodes available to schedule pods");
        }
        let mut parts: Vec<String> =
            self.reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        parts.sort();
        write!(f, "0/{} nodes are available: {}.", self.nodes, parts.join(", "))
    }
}

/// What a pod holds of its node.
#[derive(Debug, Clone)]
struct Resident {
    uid: String,
    namespace: String,
    labels: serde_json::Map<String, Value>,
    anti_affinity: Vec<Value>,
    owner: Option<String>,
    requests: Amounts,
    ports: Vec<HostPort>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct HostPort {
    ip: String,
    protocol: String,
    port: i64,
}

impl HostPort {
    fn collides(&self, other: &Self) -> bool {
        let any = |ip: &str| ip.is_empty() || ip == "0.0.0.0";
        self.port == other.port
            && self.protocol == other.protocol
            && (any(&self.ip) || any(&other.ip) || self.ip == other.ip)
    }
}

#[derive(Debug)]
struct Host {
    node: std::sync::Arc<Value>,
    allocatable: Amounts,
    used: Amounts,
    residents: Vec<Resident>,
}

/// The nodes and what runs on them.
#[derive(Debug, Default)]
pub struct Snapshot {
    hosts: Vec<Host>,
    by_name: HashMap<String, usize>,
    present: HashSet<String>,
}

impl Snapshot {
    /// Takes the nodes and all pods; pods without a node and ended pods hold nothing.
    pub fn new<'a>(
        nodes: impl IntoIterator<Item = std::sync::Arc<Value>>,
        pods: impl IntoIterator<Item = &'a Value>,
    ) -> Self {
        let mut snapshot = Self::default();
        for node in nodes {
            let allocatable = node
                .pointer("/status/allocatable")
                .or_else(|| node.pointer("/status/capacity"))
                .map_or_else(Amounts::new, |list| quantity::amounts(Some(list)));
            snapshot.by_name.insert(name(&node).to_owned(), snapshot.hosts.len());
            snapshot.hosts.push(Host {
                node,
                allocatable,
                used: Amounts::new(),
                residents: Vec::new(),
            });
        }
        for pod in pods {
            let node = text(pod, "/spec/nodeName");
            if !node.is_empty() && !is_terminal(pod) {
                snapshot.assume(pod, node);
            }
        }
        snapshot
    }

    /// Books `pod` on `node`; does nothing for an unknown node or a pod already booked.
    pub fn assume(&mut self, pod: &Value, node: &str) {
        let Some(&index) = self.by_name.get(node) else { return };
        let resident = Resident::of(pod);
        if !self.present.insert(resident.uid.clone()) {
            return;
        }
        let host = &mut self.hosts[index];
        quantity::add(&mut host.used, &resident.requests);
        host.residents.push(resident);
    }

    /// The node that suits `pod` best.
    ///
    /// # Errors
    ///
    /// [`Unschedulable`] with one reason or more for each node.
    pub fn place(&self, pod: &Value) -> Result<&str, Unschedulable> {
        let wants = Resident::of(pod);
        let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
        let mut best: Option<(Score, &str)> = None;
        for host in &self.hosts {
            let refused = self.refusals(host, pod, &wants);
            if refused.is_empty() {
                let candidate = (host.score(pod, &wants), name(&host.node));
                if best.as_ref().is_none_or(|best| candidate < *best) {
                    best = Some(candidate);
                }
            }
            for reason in refused {
                *reasons.entry(reason).or_default() += 1;
            }
        }
        best.map(|(_, node)| node).ok_or(Unschedulable { nodes: self.hosts.len(), reasons })
    }

    /// The reasons of the first filter that refuses the node; none if it is fit.
    fn refusals(&self, host: &Host, pod: &Value, wants: &Resident) -> Vec<String> {
        let node = &*host.node;
        let only = text(pod, "/spec/nodeName");
        if !only.is_empty() && only != name(node) {
            return vec!["node(s) didn't match the requested node name".to_owned()];
        }
        let tolerations = list(pod, "/spec/tolerations");
        let unschedulable =
            Taint { key: "node.kubernetes.io/unschedulable", value: "", effect: "NoSchedule" };
        if super::object::flag(node, "/spec/unschedulable") && !unschedulable.tolerated(tolerations)
        {
            return vec!["node(s) were unschedulable".to_owned()];
        }
        let untolerated = taints(node)
            .filter(|taint| matches!(taint.effect, "NoSchedule" | "NoExecute"))
            .find(|taint| !taint.tolerated(tolerations));
        if let Some(taint) = untolerated {
            return vec![format!(
                "node(s) had untolerated taint {{{}: {}}}",
                taint.key, taint.value
            )];
        }
        if !matches_node(pod, node) {
            return vec!["node(s) didn't match Pod's node affinity/selector".to_owned()];
        }
        let taken = |port: &HostPort| {
            host.residents.iter().flat_map(|resident| &resident.ports).any(|p| p.collides(port))
        };
        if wants.ports.iter().any(taken) {
            return vec!["node(s) didn't have free ports for the requested pod ports".to_owned()];
        }
        let short = host.shortages(wants);
        if !short.is_empty() {
            return short;
        }
        self.neighbours(host, pod, wants).map_or_else(Vec::new, |reason| vec![reason.to_owned()])
    }

    /// Pod affinity and anti-affinity, in both directions.
    fn neighbours(&self, host: &Host, pod: &Value, wants: &Resident) -> Option<&'static str> {
        let residents_in = |key: &str| {
            let domain = label(&host.node, key).map(str::to_owned);
            let key = key.to_owned();
            self.hosts
                .iter()
                .filter(move |other| {
                    domain.is_some() && label(&other.node, &key) == domain.as_deref()
                })
                .flat_map(|other| &other.residents)
        };
        let required = "requiredDuringSchedulingIgnoredDuringExecution";
        for term in list(pod, &format!("/spec/affinity/podAffinity/{required}")) {
            let key = text(term, "/topologyKey");
            let met = residents_in(key).any(|r| r.selected_by(term, &wants.namespace));
            // The first pod of a group that wants its own company may go anywhere in a domain.
            let nobody = !self
                .hosts
                .iter()
                .flat_map(|other| &other.residents)
                .any(|r| r.selected_by(term, &wants.namespace));
            let first = nobody && wants.selected_by(term, &wants.namespace);
            if !(met || (first && label(&host.node, key).is_some())) {
                return Some("node(s) didn't match pod affinity rules");
            }
        }
        for term in &wants.anti_affinity {
            if residents_in(text(term, "/topologyKey"))
                .any(|r| r.selected_by(term, &wants.namespace))
            {
                return Some("node(s) didn't match pod anti-affinity rules");
            }
        }
        let resented = self.hosts.iter().any(|other| {
            other.residents.iter().any(|resident| {
                resident.anti_affinity.iter().any(|term| {
                    let key = text(term, "/topologyKey");
                    label(&other.node, key).is_some()
                        && label(&other.node, key) == label(&host.node, key)
                        && wants.selected_by(term, &resident.namespace)
                })
            })
        });
        resented.then_some("node(s) didn't satisfy existing pods anti-affinity rules")
    }
}

/// Lower is better, field by field.
type Score = (i64, usize, usize, usize);

impl Host {
    fn score(&self, pod: &Value, wants: &Resident) -> Score {
        let preferred =
            "/spec/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution";
        let weight: i64 = list(pod, preferred)
            .iter()
            .filter(|term| {
                term.get("preference")
                    .is_some_and(|preference| term_matches(preference, &self.node))
            })
            .filter_map(|term| number(term, "/weight"))
            .sum();
        let tolerations = list(pod, "/spec/tolerations");
        let shunned = taints(&self.node)
            .filter(|taint| taint.effect == "PreferNoSchedule" && !taint.tolerated(tolerations))
            .count();
        let siblings = match &wants.owner {
            Some(owner) => {
                self.residents.iter().filter(|r| r.owner.as_ref() == Some(owner)).count()
            }
            None => 0,
        };
        (-weight, shunned, siblings, self.residents.len())
    }

    fn shortages(&self, wants: &Resident) -> Vec<String> {
        let mut short = Vec::new();
        let pods_max = self.allocatable.get("pods").copied().unwrap_or(0);
        let pods = i128::try_from(self.residents.len() + 1).unwrap_or(i128::MAX);
        if pods.saturating_mul(1000) > pods_max {
            short.push("Too many pods".to_owned());
        }
        for (resource, amount) in &wants.requests {
            let used = self.used.get(resource).copied().unwrap_or(0);
            let available = self.allocatable.get(resource).copied().unwrap_or(0);
            if *amount > 0 && used.saturating_add(*amount) > available {
                short.push(format!("Insufficient {resource}"));
            }
        }
        short
    }
}

impl Resident {
    fn of(pod: &Value) -> Self {
        let anti = "/spec/affinity/podAntiAffinity/requiredDuringSchedulingIgnoredDuringExecution";
        // Only what keeps running holds a port: containers and sidecars.
        let sidecars =
            list(pod, "/spec/initContainers").iter().filter(|c| c.get("restartPolicy").is_some());
        let ports = list(pod, "/spec/containers")
            .iter()
            .chain(sidecars)
            .flat_map(|container| list(container, "/ports"))
            .filter_map(|port| {
                let number = number(port, "/hostPort").filter(|number| *number > 0)?;
                let protocol = text(port, "/protocol");
                Some(HostPort {
                    ip: text(port, "/hostIP").to_owned(),
                    protocol: if protocol.is_empty() { "TCP" } else { protocol }.to_owned(),
                    port: number,
                })
            })
            .collect();
        Self {
            uid: super::object::uid(pod).to_owned(),
            namespace: namespace(pod).to_owned(),
            labels: labels(pod).cloned().unwrap_or_default(),
            anti_affinity: list(pod, anti).to_vec(),
            owner: controller_of(pod).map(|owner| text(owner, "/uid").to_owned()),
            requests: requests(pod),
            ports,
        }
    }

    /// Whether an affinity term of a pod in `home` means this pod.
    fn selected_by(&self, term: &Value, home: &str) -> bool {
        let namespaces = list(term, "/namespaces");
        let here = if namespaces.is_empty() {
            // An empty namespaceSelector means all namespaces; others need the namespaces' labels, which are not here.
            self.namespace == home
                || term.get("namespaceSelector").is_some_and(|s| *s == serde_json::json!({}))
        } else {
            namespaces.iter().any(|name| name.as_str() == Some(&self.namespace))
        };
        let selector = term.get("labelSelector").and_then(|s| LabelSelector::from_object(s).ok());
        here && selector.is_some_and(|selector| selector.matches(Some(&self.labels)))
    }
}

/// What a pod asks of its node: the larger of what its containers need together and what an init container needs while
/// the sidecars started before it run, plus the overhead.
pub fn requests(pod: &Value) -> Amounts {
    let mut running = Amounts::new();
    let mut peak = Amounts::new();
    for container in list(pod, "/spec/initContainers") {
        let mut step = container_requests(container);
        if text(container, "/restartPolicy") == "Always" {
            quantity::add(&mut running, &step);
            quantity::raise(&mut peak, &running);
        } else {
            quantity::add(&mut step, &running);
            quantity::raise(&mut peak, &step);
        }
    }
    for container in list(pod, "/spec/containers") {
        quantity::add(&mut running, &container_requests(container));
    }
    quantity::raise(&mut running, &peak);
    quantity::add(&mut running, &quantity::amounts(pod.pointer("/spec/overhead")));
    running
}

fn container_requests(container: &Value) -> Amounts {
    let mut amounts = quantity::amounts(container.pointer("/resources/limits"));
    amounts.extend(quantity::amounts(container.pointer("/resources/requests")));
    amounts
}

/// One taint of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taint<'a> {
    /// Key, such as `node.kubernetes.io/unreachable`.
    pub key: &'a str,
    /// Value, often empty.
    pub value: &'a str,
    /// `NoSchedule`, `PreferNoSchedule` or `NoExecute`.
    pub effect: &'a str,
}

impl Taint<'_> {
    /// Whether one of a pod's tolerations covers this taint.
    pub fn tolerated(&self, tolerations: &[Value]) -> bool {
        tolerations.iter().any(|toleration| self.tolerated_by(toleration))
    }

    /// Whether this toleration covers this taint.
    pub fn tolerated_by(&self, toleration: &Value) -> bool {
        let (key, effect) = (text(toleration, "/key"), text(toleration, "/effect"));
        let exists = text(toleration, "/operator") == "Exists";
        (effect.is_empty() || effect == self.effect)
            && (key == self.key || (key.is_empty() && exists))
            && (exists || text(toleration, "/value") == self.value)
    }
}

/// The taints of a node.
pub fn taints(node: &Value) -> impl Iterator<Item = Taint<'_>> {
    list(node, "/spec/taints").iter().map(|taint| Taint {
        key: text(taint, "/key"),
        value: text(taint, "/value"),
        effect: text(taint, "/effect"),
    })
}

/// Whether a pod's node selector and required node affinity accept the node.
pub fn matches_node(pod: &Value, node: &Value) -> bool {
    if let Some(selector) = pod.pointer("/spec/nodeSelector").and_then(Value::as_object) {
        let meets = |(key, value): (&String, &Value)| label(node, key) == value.as_str();
        if !selector.iter().all(meets) {
            return false;
        }
    }
    let required = "/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution";
    match pod.pointer(required) {
        None | Some(Value::Null) => true,
        Some(required) => {
            list(required, "/nodeSelectorTerms").iter().any(|term| term_matches(term, node))
        }
    }
}

/// Whether one node selector term accepts the node; an empty term accepts none.
fn term_matches(term: &Value, node: &Value) -> bool {
    let expressions = list(term, "/matchExpressions");
    let fields = list(term, "/matchFields");
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let field = |key: &str| (key == "metadata.name").then(|| name(node));
    expressions.iter().all(|e| expression_matches(e, label(node, text(e, "/key"))))
        && fields.iter().all(|e| expression_matches(e, field(text(e, "/key"))))
}

fn expression_matches(expression: &Value, actual: Option<&str>) -> bool {
    let values = list(expression, "/values");
    let listed = |actual: &str| values.iter().any(|value| value.as_str() == Some(actual));
    let compare = |accept: fn(&i64, &i64) -> bool| {
        let bound = values.first().and_then(Value::as_str).and_then(|v| v.parse::<i64>().ok());
        let actual = actual.and_then(|v| v.parse::<i64>().ok());
        matches!((actual, bound), (Some(actual), Some(bound)) if accept(&actual, &bound))
    };
    match text(expression, "/operator") {
        "In" => actual.is_some_and(listed),
        "NotIn" => !actual.is_some_and(listed),
        "Exists" => actual.is_some(),
        "DoesNotExist" => actual.is_none(),
        "Gt" => compare(i64::gt),
        "Lt" => compare(i64::lt),
        _ => false,
    }
}

/// Whether the default scheduler has to find a node for the pod now.
pub fn is_pending(pod: &Value) -> bool {
    let scheduler = text(pod, "/spec/schedulerName");
    text(pod, "/spec/nodeName").is_empty()
        && (scheduler.is_empty() || scheduler == DEFAULT_SCHEDULER)
        && list(pod, "/spec/schedulingGates").is_empty()
        && super::object::is_active(pod)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::sync::Arc;

    fn node(name: &str, extra: Value) -> Arc<Value> {
        let mut node = json!({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "spec": {}, "status": {"allocatable": {"cpu": "2", "memory": "1Gi", "pods": "3"}}});
        for (key, value) in extra.as_object().expect("an object") {
            match key.as_str() {
                "labels" => {
                    let labels = node["metadata"]["labels"].as_object_mut().expect("labels");
                    labels.extend(value.as_object().expect("an object").clone());
                }
                other => node["spec"][other] = value.clone(),
            }
        }
        Arc::new(node)
    }

    fn pod(name: &str, spec: Value) -> Value {
        json!({"metadata": {"name": name, "uid": name, "namespace": "default", "labels": {"app": "a"},
            "ownerReferences": [{"uid": "rs", "controller": true}]}, "spec": spec})
    }

    fn check(nodes: &[Arc<Value>], pods: &[Value], wanted: Value, expected: Result<&str, &str>) {
        let snapshot = Snapshot::new(nodes.iter().cloned(), pods);
        let placed = snapshot.place(&pod("new", wanted)).map_err(|error| error.to_string());
        assert_eq!(placed, expected.map_err(str::to_owned));
    }

    #[test]
    fn refusals_are_counted_in_kubernetes_words() {
        let nodes = [
            node("a", json!({"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]})),
            node("b", json!({})),
            node("c", json!({})),
        ];
        check(
            &nodes,
            &[],
            json!({"nodeSelector": {"site": "x"}}),
            Err("0/3 nodes are available: 1 node(s) had untolerated taint {k: v}, \
                 2 node(s) didn't match Pod's node affinity/selector."),
        );
        check(
            &nodes[1..],
            &[],
            json!({"containers": [{"resources": {"requests": {"cpu": "3", "memory": "2Gi"}}}]}),
            Err("0/2 nodes are available: 2 Insufficient cpu, 2 Insufficient memory."),
        );
        check(&[], &[], json!({}), Err("no nodes available to schedule pods"));
        check(
            &[node("a", json!({"unschedulable": true}))],
            &[],
            json!({}),
            Err("0/1 nodes are available: 1 node(s) were unschedulable."),
        );
    }

    #[test]
    fn a_toleration_opens_a_tainted_node() {
        let taints = json!([{"key": "node.kubernetes.io/unreachable", "effect": "NoSchedule"},
            {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}]);
        let nodes = [node("a", json!({"taints": taints}))];
        let reason = "0/1 nodes are available: \
            1 node(s) had untolerated taint {node.kubernetes.io/unreachable: }.";
        check(&nodes, &[], json!({}), Err(reason));
        let one = json!([{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}]);
        check(&nodes, &[], json!({"tolerations": one}), Err(reason));
        let both = json!([{"key": "node.kubernetes.io/unreachable", "operator": "Exists"}]);
        check(&nodes, &[], json!({"tolerations": both}), Ok("a"));
        check(&nodes, &[], json!({"tolerations": [{"operator": "Exists"}]}), Ok("a"));
    }

    #[test]
    fn the_affinity_operators_compare_labels_and_names() {
        let nodes =
            [node("a", json!({"labels": {"n": "5"}})), node("b", json!({"labels": {"n": "7"}}))];
        let spec = |kind: &str, expression: Value| {
            json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                {"nodeSelectorTerms": [{kind: [expression]}]}}}})
        };
        let labelled = |operator: &str, values: Value| {
            spec("matchExpressions", json!({"key": "n", "operator": operator, "values": values}))
        };
        check(&nodes, &[], labelled("In", json!(["7"])), Ok("b"));
        check(&nodes, &[], labelled("NotIn", json!(["7"])), Ok("a"));
        check(&nodes, &[], labelled("Gt", json!(["6"])), Ok("b"));
        check(&nodes, &[], labelled("Lt", json!(["6"])), Ok("a"));
        let by_name = json!({"key": "metadata.name", "operator": "In", "values": ["b"]});
        check(&nodes, &[], spec("matchFields", by_name), Ok("b"));
        let none = "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.";
        check(&nodes, &[], labelled("DoesNotExist", json!([])), Err(none));
    }

    #[test]
    fn pods_of_one_owner_spread_and_full_nodes_are_left_alone() {
        let nodes = [node("a", json!({})), node("b", json!({}))];
        let mut snapshot = Snapshot::new(nodes, []);
        let mut placed = Vec::new();
        for index in 0..6 {
            let pod = pod(&format!("p{index}"), json!({}));
            let node = snapshot.place(&pod).expect("room").to_owned();
            snapshot.assume(&pod, &node);
            placed.push(node);
        }
        assert_eq!(placed, ["a", "b", "a", "b", "a", "b"]);
        let full = snapshot.place(&pod("p7", json!({}))).expect_err("three pods fit on each");
        assert_eq!(full.to_string(), "0/2 nodes are available: 2 Too many pods.");
    }

    #[test]
    fn a_host_port_is_given_once_per_node() {
        let spec = json!({"containers": [{"ports": [{"hostPort": 80, "containerPort": 80}]}], "nodeName": "a"});
        let wanted = json!({"containers": [{"ports": [{"hostPort": 80, "protocol": "TCP"}]}]});
        let nodes = [node("a", json!({}))];
        let reason = "0/1 nodes are available: \
            1 node(s) didn't have free ports for the requested pod ports.";
        check(&nodes, &[pod("old", spec)], wanted, Err(reason));
    }

    #[test]
    fn anti_affinity_holds_in_both_directions() {
        let anti = json!({"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "a"}}}]}});
        let nodes = [node("a", json!({})), node("b", json!({}))];
        let plain = pod("old", json!({"nodeName": "a"}));
        check(&nodes, std::slice::from_ref(&plain), json!({"affinity": anti}), Ok("b"));
        let averse = pod("old", json!({"nodeName": "a", "affinity": anti}));
        check(&nodes, std::slice::from_ref(&averse), json!({}), Ok("b"));
        let reason = "0/1 nodes are available: \
            1 node(s) didn't satisfy existing pods anti-affinity rules.";
        check(&nodes[..1], &[averse], json!({}), Err(reason));
    }

    #[test]
    fn init_containers_count_at_their_peak() {
        let cpu = |amount: &str| json!({"resources": {"requests": {"cpu": amount}}});
        let mut sidecar = cpu("100m");
        sidecar["restartPolicy"] = json!("Always");
        let pod = pod(
            "p",
            json!({"initContainers": [sidecar, cpu("1")], "containers": [cpu("200m"), cpu("300m")]}),
        );
        assert_eq!(requests(&pod).get("cpu"), Some(&1_100));
    }
}
