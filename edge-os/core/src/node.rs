//! The Node object: what the machine is, how it is, and when to tell.
//!
//! States: `Unregistered` --insert taken or "already exists"--> `Registered`; "not found" on a status patch leads
//! back, so that a Node deleted in the cluster comes back by itself (a KubeEdge node does not, until it is restarted).
//! A status is sent when something besides the heartbeat changed, when the cluster holds the node for unknown, and
//! every 5 minutes; every hour to a hub that renews the Lease itself, which is then the sign of life.
//!
//! Whether something is due is asked many times a second and answered from what was made when the machine was looked at
//! last; a message is made only when it leaves.
//!
//! Source: kubeedge/kubeedge, pkg/kubelet kubelet_node_status.go and nodestatus/setters.go; golden session, `node` and
//! `nodepatch` messages.

use crate::Now;
use crate::backoff::Backoff;
use serde_json::{Map, Value, json};
use skerry_protocol::{MessageId, Operation};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time between two looks at the machine.
pub const COMPUTE_INTERVAL: Duration = Duration::from_secs(10);
/// Time after which an unchanged status is sent again.
pub const REPORT_INTERVAL: Duration = Duration::from_secs(300);
/// The same towards a hub that renews the node's Lease.
pub const REPORT_INTERVAL_OURS: Duration = Duration::from_secs(3600);
/// `status.capacity.pods`.
pub const PODS_MAX: u32 = 110;
/// Port of the loopback kubelet API in `daemonEndpoints`; the cluster reaches it through the tunnel only.
pub const KUBELET_PORT: u16 = 10350;
/// Memory that is not given to pods: kubelet's hard eviction threshold `memory.available` (100 Mi).
const MEMORY_RESERVED_KIB: u64 = 100 * 1024;
/// How long the reply to a registration or a status may take.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(20);

/// What the machine is; changes seldom.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Name of the Node.
    pub name: String,
    /// Labels from the configuration, beside the usual ones.
    pub labels: BTreeMap<String, String>,
    /// Annotations of ours, beside the usual one.
    pub annotations: BTreeMap<String, String>,
    /// `InternalIP` addresses, in order.
    pub addresses: Vec<String>,
    /// Logical CPUs.
    pub cpus: u64,
    /// `MemTotal`.
    pub memory_kib: u64,
    /// Size of the filesystem with pod data.
    pub storage_kib: u64,
    /// Pre-allocated bytes by page size in KiB.
    pub hugepages: BTreeMap<u64, u64>,
    /// `/etc/machine-id`.
    pub machine_id: String,
    /// DMI product uuid; the machine id where there is none.
    pub system_uuid: String,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// `uname -r`.
    pub kernel: String,
    /// `PRETTY_NAME` of `/etc/os-release`.
    pub os_image: String,
    /// `containerd://1.6.20`.
    pub runtime: String,
    /// Go's name: `amd64`, `arm64`, `arm`.
    pub architecture: String,
    /// Version of this agent.
    pub agent: String,
    /// The largest images, as `status.images` wants them.
    pub images: Vec<Value>,
}

/// How the machine is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Health {
    /// Too little memory.
    pub memory_pressure: bool,
    /// Too little disk.
    pub disk_pressure: bool,
    /// Too few process ids.
    pub pid_pressure: bool,
    /// Why the node cannot run pods, in kubelet's words; empty when it can.
    pub not_ready: Vec<String>,
    /// Whether the local database was lost and the hub has not yet told everything again.
    pub rebuilding: bool,
    /// What is wrong with the appliance around this agent; none on every other machine.
    pub appliance: Option<Vec<String>>,
    /// What the kernel was seen to carry; none before it was judged.
    pub kernel: Option<KernelCondition>,
}

/// The condition `KernelQualified`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelCondition {
    /// Whether it holds; none: nobody can say.
    pub holds: Option<bool>,
    /// One word.
    pub reason: String,
    /// A sentence.
    pub message: String,
}

/// The Node of this machine.
#[derive(Debug)]
pub struct NodeReports {
    facts: Facts,
    health: Health,
    registered: bool,
    uid: Option<String>,
    /// Status and last transition, by type.
    transitions: BTreeMap<&'static str, (Option<bool>, String)>,
    /// The status as it is now, without heartbeats; made anew by whatever changes it.
    status: Arc<Value>,
    /// What the cluster took last of it. Where nothing has changed since it is the same value.
    reported: Option<Arc<Value>>,
    reported_at: Option<Instant>,
    report_interval: Duration,
    /// Labels that the cluster's Node lacks.
    labels_owed: BTreeMap<String, String>,
    /// What the cluster has of our labels, once it has told.
    labels_told: Option<BTreeMap<String, String>>,
    /// Annotations that it lacks.
    annotations_owed: BTreeMap<String, String>,
    /// What the cluster has of [`Facts::annotations`].
    annotations_told: BTreeMap<String, String>,
    flight: Option<Flight>,
    next_try: Option<Instant>,
    backoff: Backoff,
}

#[derive(Debug)]
struct Flight {
    id: MessageId,
    kind: Kind,
    deadline: Instant,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Insert,
    Labels,
    Patch(Arc<Value>),
}

/// What the cluster is to be told next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Registration,
    Status,
    Labels,
}

/// What came of a reply, as far as others care.
#[derive(Debug, PartialEq, Eq)]
pub enum NodeVerdict {
    /// All is as it should be.
    Fine,
    /// Refused; tried again, but somebody should know.
    Refused(String),
}

impl NodeReports {
    /// Nothing was told yet.
    pub fn new(facts: Facts, seed: u64) -> Self {
        Self {
            facts,
            health: Health::default(),
            registered: false,
            uid: None,
            transitions: BTreeMap::new(),
            status: Arc::default(),
            reported: None,
            reported_at: None,
            report_interval: REPORT_INTERVAL,
            labels_owed: BTreeMap::new(),
            labels_told: None,
            annotations_owed: BTreeMap::new(),
            annotations_told: BTreeMap::new(),
            flight: None,
            next_try: None,
            backoff: Backoff::between(Duration::from_millis(100), Duration::from_secs(7), seed),
        }
    }

    /// `metadata.uid` of the Node, once the cluster has told it.
    pub fn uid(&self) -> Option<&str> {
        self.uid.as_deref()
    }

    /// Whether the cluster has taken the Node in this run.
    pub fn is_registered(&self) -> bool {
        self.registered
    }

    /// Takes what the machine looks like now. Returns whether `Ready` changed, and to what.
    pub fn update(&mut self, now: Now, facts: Facts, health: Health) -> Option<bool> {
        self.facts = facts;
        self.health = health;
        let time = format!("{:.0}", now.wall);
        let ready = self.health.not_ready.is_empty();
        let was = self.transitions.get("Ready").and_then(|(status, _)| *status);
        let appliance = self.health.appliance.as_ref();
        let appliance = appliance.map(|wrong| ("ApplianceHealthy", Some(wrong.is_empty())));
        let kernel = self.health.kernel.as_ref().map(|kernel| ("KernelQualified", kernel.holds));
        let usual = [
            ("MemoryPressure", Some(self.health.memory_pressure)),
            ("DiskPressure", Some(self.health.disk_pressure)),
            ("PIDPressure", Some(self.health.pid_pressure)),
            ("Ready", Some(ready)),
        ];
        for (kind, status) in usual.into_iter().chain(appliance).chain(kernel) {
            let known = self.transitions.entry(kind).or_insert_with(|| (status, time.clone()));
            if known.0 != status {
                *known = (status, time.clone());
            }
        }
        self.annotations_owed = owed(&self.facts.annotations, |key| self.annotations_told.get(key));
        if let Some(told) = &self.labels_told {
            self.labels_owed = owed(&labels(&self.facts), |key| told.get(key));
        }
        self.look();
        (was != Some(ready)).then_some(ready)
    }

    /// Takes the Node as the cluster has it: identity, labels that it lacks, times of transitions before our start.
    pub fn handle_own_node(&mut self, node: &Value) {
        if let Some(uid) = node["metadata"]["uid"].as_str() {
            self.uid = Some(uid.into());
        }
        let text =
            |(key, value): (&String, &Value)| Some((key.clone(), value.as_str()?.to_owned()));
        let texts = |field: &str| -> BTreeMap<String, String> {
            let theirs = node["metadata"][field].as_object();
            theirs.into_iter().flatten().filter_map(text).collect()
        };
        let wanted = labels(&self.facts);
        let mut told = texts("labels");
        self.labels_owed = owed(&wanted, |key| told.get(key));
        // Others' are none of our business; those that we may want later are.
        told.retain(|key, _| wanted.contains_key(key) || is_of_kernel(key));
        self.labels_told = Some(told);
        self.annotations_told = texts("annotations");
        self.annotations_told
            .retain(|key, _| self.facts.annotations.contains_key(key) || is_of_kernel(key));
        self.annotations_owed = owed(&self.facts.annotations, |key| self.annotations_told.get(key));
        let unknown =
            |condition: &Value| condition["type"] == "Ready" && condition["status"] == "Unknown";
        let conditions = node["status"]["conditions"].as_array();
        // The cluster missed us for a while. It believes a status only, however fresh the Lease is.
        if self.flight.is_none() && conditions.is_some_and(|all| all.iter().any(unknown)) {
            self.reported = None;
        }
        if self.reported.is_some() {
            return;
        }
        for condition in node["status"]["conditions"].as_array().into_iter().flatten() {
            let (kind, status) = (condition["type"].as_str(), condition["status"].as_str());
            let mine = self.transitions.iter_mut().find(|(mine, _)| Some(**mine) == kind);
            if let (Some((_, mine)), Some(time)) = (mine, condition["lastTransitionTime"].as_str())
                && status == Some(truth(mine.0))
            {
                mine.1 = time.into();
            }
        }
        self.look();
    }

    /// Makes the status anew. One that says the same stays the same value, so that comparing it later costs nothing.
    fn look(&mut self) {
        let status = self.without_heartbeat();
        match &self.reported {
            Some(reported) if **reported == status => self.status = Arc::clone(reported),
            _ => self.status = Arc::new(status),
        }
    }

    /// The cluster has no Node for us.
    pub fn handle_gone(&mut self) {
        self.registered = false;
        self.uid = None;
        self.reported = None;
        self.next_try = None;
    }

    /// The link is new. An unchanged status is sent every `interval`; unless the cluster is `known` to have missed
    /// nothing, it is told everything again, as it may hold us for unknown by now.
    pub fn handle_connected(&mut self, interval: Duration, known: bool) {
        self.flight = None;
        self.next_try = None;
        self.report_interval = interval;
        if !known {
            self.reported = None;
        }
        self.backoff.reset();
    }

    /// Returns operation, type token and content of what is due; the caller sends it and calls [`Self::sent`].
    pub fn poll(&mut self, now: Now) -> Option<(Operation, &'static str, Value)> {
        if self.flight.is_some() || self.next_try.is_some_and(|at| at > now.mono) {
            return None;
        }
        let (kind, message) = self.message(self.due(now)?, now);
        self.flight = Some(Flight { id: String::new(), kind, deadline: now.mono + REPLY_TIMEOUT });
        Some(message)
    }

    /// The message of the last poll is on its way as `id`.
    pub fn sent(&mut self, id: MessageId) {
        if let Some(flight) = &mut self.flight {
            flight.id = id;
        }
    }

    /// Whether `parent` is the message in flight.
    pub fn is_mine(&self, parent: &str) -> bool {
        self.flight.as_ref().is_some_and(|flight| flight.id == parent)
    }

    /// Takes the reply to the message in flight: the Node, or code and text of the refusal.
    pub fn handle_reply(
        &mut self,
        now: Instant,
        reply: Result<Value, (u16, String)>,
    ) -> NodeVerdict {
        let Some(flight) = self.flight.take() else { return NodeVerdict::Fine };
        let refusal = match (flight.kind, reply) {
            (Kind::Insert, Ok(node)) => {
                self.registered = true;
                self.handle_own_node(&node);
                None
            }
            (Kind::Insert, Err((409, _))) => {
                self.registered = true;
                None
            }
            (Kind::Labels, Ok(_)) => {
                let labels = std::mem::take(&mut self.labels_owed);
                self.labels_told.get_or_insert_default().extend(labels);
                self.annotations_told.append(&mut self.annotations_owed);
                None
            }
            (Kind::Patch(told), Ok(_)) => {
                self.reported = Some(told);
                self.reported_at = Some(now);
                None
            }
            (Kind::Patch(_), Err((404, _))) => {
                self.handle_gone();
                None
            }
            (_, Err((_, text))) => Some(text),
        };
        match refusal {
            None => {
                self.backoff.reset();
                self.next_try = None;
                NodeVerdict::Fine
            }
            Some(text) => {
                self.next_try =
                    Some(now + self.backoff.next_wait().max(Duration::from_millis(100)));
                NodeVerdict::Refused(text)
            }
        }
    }

    /// Whether a request has waited for its reply for too long: the other end may hold the socket open without serving
    /// it. The request counts as lost.
    pub fn take_overdue(&mut self, now: Instant) -> bool {
        self.flight.take_if(|flight| flight.deadline <= now).is_some()
    }

    /// When to poll again, if nothing else happens.
    pub fn poll_timeout(&self, now: Now) -> Instant {
        if let Some(flight) = &self.flight {
            return flight.deadline;
        }
        if let Some(at) = self.next_try {
            return at;
        }
        match self.due(now) {
            Some(_) => now.mono,
            None => self.reported_at.unwrap_or(now.mono) + self.report_interval,
        }
    }

    fn due(&self, now: Now) -> Option<Due> {
        let is_old = || self.reported_at.is_none_or(|at| now.mono >= at + self.report_interval);
        if self.transitions.is_empty() {
            None // nobody has looked at the machine yet
        } else if !self.registered {
            Some(Due::Registration)
        } else if is_old() || self.reported.as_ref() != Some(&self.status) {
            Some(Due::Status)
        } else if !self.labels_owed.is_empty() || !self.annotations_owed.is_empty() {
            Some(Due::Labels)
        } else {
            None
        }
    }

    fn message(&self, due: Due, now: Now) -> (Kind, (Operation, &'static str, Value)) {
        match due {
            Due::Registration => (Kind::Insert, (Operation::Insert, "node", self.node(now))),
            Due::Status => {
                let patch = Value::String(self.patch(now).to_string());
                let told = Arc::clone(&self.status);
                (Kind::Patch(told), (Operation::Patch, "nodepatch", patch))
            }
            Due::Labels => {
                let mut node = json!({"metadata": {"name": self.facts.name}});
                for (field, owed) in
                    [("labels", &self.labels_owed), ("annotations", &self.annotations_owed)]
                {
                    if !owed.is_empty() {
                        node["metadata"][field] = json!(owed);
                    }
                }
                (Kind::Labels, (Operation::Update, "node", node))
            }
        }
    }

    /// The whole Node, to register.
    fn node(&self, now: Now) -> Value {
        let mut status = (*self.status).clone();
        status["conditions"] = self.conditions(Some(now)).into();
        status["daemonEndpoints"] = json!({"kubeletEndpoint": {"Port": KUBELET_PORT}});
        let mut annotations = self.facts.annotations.clone();
        let usual = "volumes.kubernetes.io/controller-managed-attach-detach";
        annotations.insert(usual.into(), "true".into());
        json!({
            "metadata": {
                "name": self.facts.name,
                "labels": labels(&self.facts),
                "annotations": annotations,
            },
            "spec": {},
            "status": status,
        })
    }

    /// What a status patch holds: all conditions, and of the rest what the cluster does not know yet.
    fn patch(&self, now: Now) -> Value {
        let mut status = Map::new();
        for (field, value) in self.status.as_object().into_iter().flatten() {
            if self.reported.as_ref().and_then(|reported| reported.get(field)) != Some(value) {
                status.insert(field.clone(), value.clone());
            }
        }
        let conditions = self.conditions(Some(now));
        let order: Vec<_> = conditions.iter().map(|one| json!({"type": one["type"]})).collect();
        status.insert("conditions".into(), conditions.into());
        status.insert("$setElementOrder/conditions".into(), order.into());
        json!({ "status": status })
    }

    fn without_heartbeat(&self) -> Value {
        let facts = &self.facts;
        let mut capacity = BTreeMap::from([
            ("cpu".to_owned(), facts.cpus.to_string()),
            ("memory".to_owned(), format!("{}Ki", facts.memory_kib)),
            ("ephemeral-storage".to_owned(), format!("{}Ki", facts.storage_kib)),
            ("pods".to_owned(), PODS_MAX.to_string()),
        ]);
        for (size_kib, bytes) in &facts.hugepages {
            let size = match size_kib {
                kib if kib % (1 << 20) == 0 => format!("{}Gi", kib >> 20),
                kib if kib % (1 << 10) == 0 => format!("{}Mi", kib >> 10),
                kib => format!("{kib}Ki"),
            };
            capacity.insert(format!("hugepages-{size}"), quantity(*bytes));
        }
        let huge_kib = facts.hugepages.values().sum::<u64>() / 1024;
        let memory_kib = facts.memory_kib.saturating_sub(MEMORY_RESERVED_KIB + huge_kib);
        // kubelet keeps a tenth of the filesystem back (`nodefs.available`), and computes it from a 32-bit 0.1.
        let storage = facts.storage_kib * 1024;
        let storage = storage - (storage as f64 * f64::from(0.1_f32)) as u64;
        let mut allocatable = capacity.clone();
        allocatable.insert("memory".into(), format!("{memory_kib}Ki"));
        allocatable.insert("ephemeral-storage".into(), storage.to_string());

        let internal =
            facts.addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip}));
        let hostname = json!({"type": "Hostname", "address": facts.name});
        let addresses: Vec<_> = internal.chain([hostname]).collect();
        let mut status = json!({
            "capacity": capacity,
            "allocatable": allocatable,
            "addresses": addresses,
            "conditions": self.conditions(None),
            "nodeInfo": {
                "machineID": facts.machine_id,
                "systemUUID": facts.system_uuid,
                "bootID": facts.boot_id,
                "kernelVersion": facts.kernel,
                "osImage": facts.os_image,
                "containerRuntimeVersion": facts.runtime,
                "kubeletVersion": kubelet_version(&facts.agent),
                "kubeProxyVersion": "",
                "operatingSystem": "linux",
                "architecture": facts.architecture,
            },
        });
        if !facts.images.is_empty() {
            status["images"] = facts.images.clone().into();
        }
        status
    }

    fn conditions(&self, heartbeat: Option<Now>) -> Vec<Value> {
        let health = &self.health;
        let ready = match health.not_ready.as_slice() {
            [] if health.rebuilding => "edge is posting ready status; the local database was lost and is being rebuilt from the hub".to_owned(),
            [] => "edge is posting ready status".to_owned(),
            [one] => one.clone(),
            several => format!("[{}]", several.join(", ")),
        };
        let wrong = health.appliance.as_deref().unwrap_or_default().join("; ");
        let unknown = KernelCondition::default();
        let kernel = health.kernel.as_ref().unwrap_or(&unknown);
        let words = [
            (
                "MemoryPressure",
                ["KubeletHasSufficientMemory", "KubeletHasInsufficientMemory"],
                [
                    "kubelet has sufficient memory available",
                    "kubelet has insufficient memory available",
                ],
            ),
            (
                "DiskPressure",
                ["KubeletHasNoDiskPressure", "KubeletHasDiskPressure"],
                ["kubelet has no disk pressure", "kubelet has disk pressure"],
            ),
            (
                "PIDPressure",
                ["KubeletHasSufficientPID", "KubeletHasInsufficientPID"],
                ["kubelet has sufficient PID available", "kubelet has insufficient PID available"],
            ),
            ("Ready", ["KubeletNotReady", "EdgeReady"], [&ready, &ready]),
            // Not there on other machines: it has no transition then.
            (
                "ApplianceHealthy",
                ["ApplianceProblem", "ApplianceFine"],
                [&wrong, "the appliance is as it should be"],
            ),
            (
                "KernelQualified",
                [kernel.reason.as_str(), kernel.reason.as_str()],
                [&kernel.message, &kernel.message],
            ),
        ];
        words
            .into_iter()
            .filter_map(|(kind, reasons, messages)| {
                let (status, since) = self.transitions.get(kind)?;
                let mut condition = json!({
                    "type": kind,
                    "status": truth(*status),
                    "lastTransitionTime": since,
                    "reason": reasons[usize::from(*status == Some(true))],
                    "message": messages[usize::from(*status == Some(true))],
                });
                if let Some(now) = heartbeat {
                    condition["lastHeartbeatTime"] = json!(format!("{:.0}", now.wall));
                }
                Some(condition)
            })
            .collect()
    }
}

/// `status.nodeInfo.kubeletVersion`: the Kubernetes release whose kubelet this agent behaves like, then its own.
pub fn kubelet_version(agent: &str) -> String {
    format!("v1.32.10-skerry-{agent}")
}

/// The labels of the Node: kubelet's, the two roles of KubeEdge, then those of the configuration.
pub fn labels(facts: &Facts) -> BTreeMap<String, String> {
    let own = [
        ("kubernetes.io/hostname", facts.name.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", &facts.architecture),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", &facts.architecture),
        ("node-role.kubernetes.io/edge", ""),
        ("node-role.kubernetes.io/agent", ""),
    ];
    let own = own.map(|(key, value)| (key.to_owned(), value.to_owned()));
    own.into_iter().chain(facts.labels.clone()).collect()
}

/// What of `wanted` the cluster has not, or has otherwise.
fn owed<'a>(
    wanted: &BTreeMap<String, String>,
    told: impl Fn(&str) -> Option<&'a String>,
) -> BTreeMap<String, String> {
    let missing = |(key, value): &(&String, &String)| told(key) != Some(value);
    wanted.iter().filter(missing).map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Labels and annotations that tell of the kernel; known only after it was judged.
fn is_of_kernel(key: &str) -> bool {
    key.starts_with("qualification.skerry.dev/") || key.starts_with("feature.node.kubernetes.io/")
}

fn truth(status: Option<bool>) -> &'static str {
    match status {
        Some(true) => "True",
        Some(false) => "False",
        None => "Unknown",
    }
}

fn quantity(bytes: u64) -> String {
    match bytes {
        0 => "0".into(),
        bytes if bytes % (1 << 30) == 0 => format!("{}Gi", bytes >> 30),
        bytes if bytes % (1 << 20) == 0 => format!("{}Mi", bytes >> 20),
        bytes => format!("{}Ki", bytes >> 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            name: "edge1".into(),
            addresses: vec!["192.0.2.2".into()],
            cpus: 2,
            memory_kib: 24_684_096,
            storage_kib: 264_212_084,
            hugepages: BTreeMap::from([(2048, 0), (1 << 20, 0)]),
            machine_id: "00000000000000000000000000000001".into(),
            architecture: "amd64".into(),
            agent: "0.1.0".into(),
            ..Facts::default()
        }
    }

    fn now() -> Now {
        Now { mono: Instant::now(), wall: "2026-11-22T16:23:21Z".parse().expect("a time") }
    }

    fn after(now: Now, wait: Duration) -> Now {
        Now { mono: now.mono + wait, wall: now.wall + wait }
    }

    fn send(node: &mut NodeReports, now: Now) -> Option<(Operation, &'static str, Value)> {
        let message = node.poll(now);
        node.sent("m".into());
        message
    }

    fn registered(now: Now) -> NodeReports {
        let mut node = NodeReports::new(facts(), 1);
        node.update(now, facts(), Health::default());
        assert_eq!(send(&mut node, now).map(|(operation, ..)| operation), Some(Operation::Insert));
        node.handle_reply(
            now.mono,
            Ok(json!({"metadata": {"uid": "n", "labels": labels(&facts())}})),
        );
        let (operation, token, _) = send(&mut node, now).expect("the first patch");
        assert_eq!((operation, token), (Operation::Patch, "nodepatch"));
        node.handle_reply(now.mono, Ok(json!({})));
        node
    }

    #[test]
    fn appliance_has_a_condition_and_annotations_of_its_own_and_tells_what_changes() {
        let now = now();
        let with = |version: &str, wrong: &[&str]| {
            let annotations = [("skerry.dev/image-version".to_owned(), version.to_owned())].into();
            let wrong = wrong.iter().map(|one| (*one).to_owned()).collect();
            let health = Health { appliance: Some(wrong), ..Health::default() };
            (Facts { annotations, ..facts() }, health)
        };
        let mut node = NodeReports::new(facts(), 1);
        let (facts, health) = with("1.0", &[]);
        node.update(now, facts, health);
        let (.., object) = send(&mut node, now).expect("a registration");
        assert_eq!(object["metadata"]["annotations"]["skerry.dev/image-version"], "1.0");
        assert_eq!(object["status"]["conditions"][4]["type"], "ApplianceHealthy");
        assert_eq!(object["status"]["conditions"][4]["status"], "True");
        let taken = json!({"metadata": {"uid": "n", "annotations": object["metadata"]["annotations"],
            "labels": object["metadata"]["labels"]}});
        node.handle_reply(now.mono, Ok(taken));
        send(&mut node, now).expect("the first patch");
        node.handle_reply(now.mono, Ok(json!({})));
        assert_eq!(send(&mut node, now), None);
        let (facts, health) = with("1.1", &["the disk is full"]);
        node.update(now, facts, health);
        let (operation, _, patch) = send(&mut node, now).expect("a patch");
        assert_eq!(operation, Operation::Patch);
        assert!(patch.as_str().expect("text").contains("the disk is full"));
        node.handle_reply(now.mono, Ok(json!({})));
        let (operation, _, update) = send(&mut node, now).expect("an update");
        assert_eq!(operation, Operation::Update);
        assert_eq!(update["metadata"]["annotations"], json!({"skerry.dev/image-version": "1.1"}));
        node.handle_reply(now.mono, Ok(json!({})));
        assert_eq!(send(&mut node, now), None);
    }

    #[test]
    fn labels_and_condition_of_a_kernel_that_was_judged_after_the_registration_follow() {
        let now = now();
        let mut node = registered(now);
        assert_eq!(send(&mut node, now), None);
        let judged = |word: &str, holds| {
            let labels = [("qualification.skerry.dev/cilium".to_owned(), word.to_owned())].into();
            let kernel =
                KernelCondition { holds, reason: word.to_owned(), message: "why".to_owned() };
            (Facts { labels, ..facts() }, Health { kernel: Some(kernel), ..Health::default() })
        };
        for (word, holds, status) in [
            ("qualified", Some(true), "True"),
            ("unsupported", Some(false), "False"),
            ("unknown", None, "Unknown"),
        ] {
            let (facts, health) = judged(word, holds);
            node.update(now, facts, health);
            let (operation, _, patch) = send(&mut node, now).expect("a patch");
            assert_eq!(operation, Operation::Patch);
            let patch: Value = serde_json::from_str(patch.as_str().expect("text")).expect("JSON");
            let condition = &patch["status"]["conditions"][4];
            assert_eq!(
                (&condition["type"], &condition["status"], &condition["reason"]),
                (&json!("KernelQualified"), &json!(status), &json!(word))
            );
            node.handle_reply(now.mono, Ok(json!({})));
            let (operation, _, update) = send(&mut node, now).expect("labels");
            assert_eq!(operation, Operation::Update);
            assert_eq!(
                update["metadata"],
                json!({"name": "edge1", "labels": {"qualification.skerry.dev/cilium": word}})
            );
            node.handle_reply(now.mono, Ok(json!("OK")));
            assert_eq!(send(&mut node, now), None, "everything is told");
        }
        // The agent starts again: the cluster has the labels already.
        let mut node = NodeReports::new(facts(), 1);
        let (later, health) = judged("unknown", None);
        node.update(now, facts(), Health::default());
        send(&mut node, now);
        node.handle_reply(now.mono, Err((409, "already exists".into())));
        let mut theirs = labels(&later);
        theirs.insert("someone".into(), "else".into());
        node.handle_own_node(&json!({"metadata": {"uid": "n", "labels": theirs}}));
        node.update(now, later, health);
        send(&mut node, now).expect("a patch");
        node.handle_reply(now.mono, Ok(json!({})));
        assert_eq!(send(&mut node, now), None, "no label is missing");
    }

    #[test]
    fn node_has_kubelets_conditions_in_order_and_the_measured_amounts() {
        let now = now();
        let mut node = NodeReports::new(facts(), 1);
        assert_eq!(node.poll(now), None, "nobody has looked at the machine");
        node.update(now, facts(), Health::default());
        let (.., object) = node.poll(now).expect("a registration");
        let conditions = object["status"]["conditions"].as_array().expect("conditions");
        let order: Vec<_> =
            conditions.iter().map(|one| one["type"].as_str().unwrap_or("")).collect();
        assert_eq!(order, ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"]);
        assert_eq!(conditions[3]["reason"], "EdgeReady");
        assert_eq!(conditions[3]["message"], "edge is posting ready status");
        assert_eq!(conditions[3]["lastHeartbeatTime"], "2026-11-22T16:23:21Z");
        // Values of the golden session for the same machine.
        let allocatable = &object["status"]["allocatable"];
        assert_eq!(allocatable["ephemeral-storage"], "243497856212");
        assert_eq!(allocatable["memory"], "24581696Ki");
        assert_eq!(object["status"]["capacity"]["hugepages-1Gi"], "0");
        assert_eq!(object["metadata"]["labels"]["node-role.kubernetes.io/edge"], "");
        assert_eq!(object["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"], 10350);
    }

    #[test]
    fn unchanged_status_is_sent_every_five_minutes_only() {
        let start = now();
        let mut node = registered(start);
        for s in (10..300).step_by(10) {
            let now = after(start, Duration::from_secs(s));
            node.update(now, facts(), Health::default());
            assert_eq!(node.poll(now), None, "{s} s");
        }
        let now = after(start, REPORT_INTERVAL);
        let (.., patch) = send(&mut node, now).expect("a heartbeat");
        let patch: Value = serde_json::from_str(patch.as_str().expect("a text")).expect("JSON");
        assert_eq!(patch["status"].get("capacity"), None, "what the cluster knows is not repeated");
        assert_eq!(patch["status"]["conditions"][0]["lastHeartbeatTime"], "2026-11-22T16:28:21Z");
    }

    #[test]
    fn hub_that_renews_the_lease_gets_an_unchanged_status_every_hour() {
        let start = now();
        let mut node = registered(start);
        node.handle_connected(REPORT_INTERVAL_OURS, true);
        assert_eq!(node.poll(start), None, "the cluster has missed nothing");
        assert_eq!(node.poll_timeout(start), start.mono + REPORT_INTERVAL_OURS);
        assert_eq!(node.poll(after(start, Duration::from_secs(3599))), None);
        assert!(node.poll(after(start, REPORT_INTERVAL_OURS)).is_some());
        let mut node = registered(start);
        node.handle_connected(REPORT_INTERVAL_OURS, false);
        assert!(node.poll(start).is_some());
    }

    #[test]
    fn node_that_the_cluster_holds_for_unknown_tells_its_status_again() {
        let now = now();
        let mut node = registered(now);
        let seen = |status: &str| {
            json!({"metadata": {"uid": "n", "labels": labels(&facts())},
                "status": {"conditions": [{"type": "Ready", "status": status}]}})
        };
        node.handle_own_node(&seen("True"));
        assert_eq!(node.poll(now), None);
        node.handle_own_node(&seen("Unknown"));
        assert_eq!(send(&mut node, now).map(|(_, token, _)| token), Some("nodepatch"));
        node.handle_own_node(&seen("Unknown")); // an older echo; the patch is on its way
        node.handle_reply(now.mono, Ok(json!({})));
        assert_eq!(node.poll(now), None);
    }

    #[test]
    fn change_is_sent_at_once_with_its_time_of_transition() {
        let start = now();
        let mut node = registered(start);
        let later = after(start, Duration::from_secs(10));
        let health = Health { not_ready: vec!["a".into(), "b".into()], ..Health::default() };
        assert_eq!(node.update(later, facts(), health), Some(false));
        let (.., patch) = send(&mut node, later).expect("a patch");
        let patch: Value = serde_json::from_str(patch.as_str().expect("a text")).expect("JSON");
        let ready = &patch["status"]["conditions"][3];
        assert_eq!(ready["message"], "[a, b]");
        assert_eq!(ready["reason"], "KubeletNotReady");
        assert_eq!(ready["lastTransitionTime"], "2026-11-22T16:23:31Z");
        assert_eq!(patch["status"]["conditions"][0]["lastTransitionTime"], "2026-11-22T16:23:21Z");
    }

    #[test]
    fn existing_node_is_taken_over_with_its_transition_times_and_given_its_labels() {
        let now = now();
        let mut node = NodeReports::new(facts(), 1);
        let mut labelled = facts();
        labelled.labels.insert("site".into(), "lisbon".into());
        node.update(now, labelled, Health::default());
        send(&mut node, now);
        node.handle_reply(now.mono, Err((409, "already exists".into())));
        node.handle_own_node(&json!({"metadata": {"uid": "n", "labels": labels(&facts())},
            "status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}}));
        let (.., patch) = send(&mut node, now).expect("a patch");
        assert!(patch.as_str().expect("a text").contains("2026-01-01T00:00:00Z"));
        node.handle_reply(now.mono, Ok(json!({})));
        let (operation, token, content) = send(&mut node, now).expect("labels");
        assert_eq!((operation, token), (Operation::Update, "node"));
        assert_eq!(content["metadata"]["labels"], json!({"site": "lisbon"}));
        node.handle_reply(now.mono, Ok(json!("OK")));
        assert_eq!(node.poll(now), None);
    }

    #[test]
    fn node_deleted_in_the_cluster_is_registered_again() {
        let start = now();
        let mut node = registered(start);
        let later = after(start, REPORT_INTERVAL);
        send(&mut node, later);
        node.handle_reply(later.mono, Err((404, "not found".into())));
        assert_eq!(node.poll(later).map(|(operation, ..)| operation), Some(Operation::Insert));
    }

    #[test]
    fn refused_registration_is_tried_again_but_not_in_a_tight_loop() {
        let now = now();
        let mut node = NodeReports::new(facts(), 1);
        node.update(now, facts(), Health::default());
        send(&mut node, now);
        let verdict = node.handle_reply(now.mono, Err((500, "no".into())));
        assert_eq!(verdict, NodeVerdict::Refused("no".into()));
        assert_eq!(node.poll(now), None);
        assert!(node.poll_timeout(now) >= now.mono + Duration::from_millis(100));
    }
}
