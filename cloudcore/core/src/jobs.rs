//! Node jobs, cloud half: which nodes a job is for, which of them are told now, and when a job has ended.
//!
//! One [`Job`] per object. [`Job::turn`] looks at the object as the API has it, at the nodes and at the links, and says
//! what its status becomes and who is told; the shell (`cloudcore/src/jobs`) writes the status before it tells
//! anybody, so that a cloud that dies in between tells again and never forgets. Reports of nodes change the object by
//! themselves ([`crate::upstream::job`]); the next turn sees them.
//!
//! As with KubeEdge, whose status this is: a task is `Pending`, `InProgress`, `Successful`, `Failure` or `Unknown` (no
//! word in time), a job `Init`, `InProgress`, `Completed` or `Failure`. Differences, on purpose: a node that is not
//! connected is waited for as long as the job's timeout, not failed at once; the time of a node counts from when it
//! could be told, not from when the job was made; once more nodes have failed than the job tolerates, no other is
//! told; a node that comes back is told again what may safely be done twice. A node of KubeEdge before 1.21 is told in
//! the older form, stage by stage, and its reports enter the same status.
//!
//! No I/O and no clock.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/controllermanager/nodetask, cloud/pkg/taskmanager/{executor,downstream} and
//! cloud/pkg/taskmanager/v1alpha1/manager/executor.go.

use crate::upstream::job::is_current;
use serde_json::{Value, json};
use skerry_protocol::Message;
use skerry_protocol::job::{self, Kind, TaskReport};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long a node may take from one report to the next when the job does not say, in seconds.
pub const TIMEOUT_S: u64 = 300;
/// Nodes of one job at most; each costs a line in one object, and an object has at most about 1.5 MiB.
pub const NODES_MAX: usize = 5_000;
/// Label with the role of an edge node.
const EDGE_ROLE: &str = "node-role.kubernetes.io/edge";
/// First release of KubeEdge whose edge knows jobs of `v1alpha2`.
const CURRENT: (u32, u32) = (1, 21);
/// First release of KubeEdge whose edge knows the older tasks; before, there were upgrades only.
const STAGED: (u32, u32) = (1, 16);

/// What a job has to know about a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    is_edge: bool,
    is_ready: bool,
    labels: BTreeMap<String, String>,
    /// Major and minor release of its KubeEdge; none for other edges, ours among them.
    release: Option<(u32, u32)>,
}

impl Node {
    /// Reads a Node.
    pub fn read(object: &Value) -> Option<Self> {
        let metadata = &object["metadata"];
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let labels: BTreeMap<String, String> = metadata["labels"]
            .as_object()
            .into_iter()
            .flatten()
            .filter_map(|(key, value)| Some((key.clone(), text(value)?)))
            .collect();
        let conditions = object["status"]["conditions"].as_array();
        let is_ready = conditions
            .into_iter()
            .flatten()
            .any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
        let version = object["status"]["nodeInfo"]["kubeletVersion"].as_str();
        Some(Self {
            name: text(&metadata["name"])?,
            is_edge: labels.get(EDGE_ROLE).is_some_and(String::is_empty),
            is_ready,
            labels,
            release: version.and_then(release),
        })
    }

    fn refusal(&self) -> Option<&'static str> {
        match (self.is_edge, self.is_ready) {
            (false, _) => Some("the node is not an edge node"),
            (true, false) => Some("the node is not ready"),
            (true, true) => None,
        }
    }
}

/// Reads `v1.32.10-kubeedge-v1.23.0`.
fn release(version: &str) -> Option<(u32, u32)> {
    let (_, kubeedge) = version.split_once("-kubeedge-v")?;
    let mut numbers = kubeedge.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// Links of nodes by name: a number that is another for each connection.
pub type Links = BTreeMap<String, u64>;

/// What the shell has to do about one job.
#[derive(Debug, Default)]
pub struct Turn {
    /// The new `status`, to be written before anybody is told; nothing is to be told when that fails.
    pub status: Option<Value>,
    /// Who is to be told what.
    pub orders: Vec<(String, Message)>,
    /// Finalizers that are left, when one of KubeEdge's stands in the way of a deletion.
    pub finalizers: Option<Vec<Value>>,
    /// When to look again, at the latest.
    pub next: Option<Instant>,
}

/// One job, with what its object does not say.
#[derive(Debug)]
pub struct Job {
    kind: Kind,
    name: String,
    tasks: BTreeMap<String, Task>,
}

#[derive(Debug)]
struct Task {
    /// Actions that were reported when we looked last, and whether it was told.
    seen: (usize, bool),
    /// Since when that has not changed.
    since: Instant,
    /// The link on which it was told last.
    told: Option<u64>,
}

impl Job {
    /// A job of this name.
    pub fn new(kind: Kind, name: &str) -> Self {
        Self { kind, name: name.into(), tasks: BTreeMap::new() }
    }

    /// Whether `object` needs the list of nodes: it has not begun, or goes on.
    pub fn is_open(object: &Value) -> bool {
        let phase = object["status"]["phase"].as_str().unwrap_or_default();
        let is_older = object["status"]["state"].as_str().is_some_and(|state| !state.is_empty());
        match phase {
            "" => !is_older,
            "Completed" => false,
            // An upgrade that failed may still be undone; its nodes report that.
            "Failure" => object["status"]["nodeStatus"]
                .as_array()
                .is_some_and(|tasks| tasks.iter().any(|task| !is_final(phase_of(task)))),
            _ => true,
        }
    }

    /// Looks at the job. `nodes` are all edge nodes of the cluster, by name, or those that the job names.
    pub fn turn(
        &mut self,
        object: &Value,
        nodes: &BTreeMap<String, Node>,
        links: &Links,
        now: Instant,
        now_ms: i64,
    ) -> Turn {
        if object["metadata"]["deletionTimestamp"].is_string() {
            return Turn { finalizers: self.finalizers_left(object), ..Turn::default() };
        }
        if !Self::is_open(object) {
            return Turn::default();
        }
        let mut status = object["status"].clone();
        if !is_current(object) {
            status = self.begin(object, nodes);
            return Turn { status: Some(status), next: Some(now), ..Turn::default() };
        }
        let mut turn = Turn::default();
        let spec = template(self.kind, object);
        let Some(mut tasks) = status["nodeStatus"].as_array().cloned() else { return turn };
        self.see(&tasks, now);
        let timeout = match spec["timeoutSeconds"].as_u64() {
            None | Some(0) => Duration::from_secs(TIMEOUT_S),
            Some(seconds) => Duration::from_secs(seconds),
        };
        self.end_overdue(&mut tasks, links, timeout, now);
        self.stop_when_too_many_failed(&mut tasks, spec);
        self.tell_again(object, &tasks, nodes, links, now_ms, &mut turn);
        self.tell_next(object, &mut tasks, nodes, links, (now, now_ms), &mut turn);
        let (phase, reason) = phase(&tasks, spec);
        turn.next = self.tasks.values().map(|task| task.since + timeout).min();
        status["nodeStatus"] = tasks.into();
        status["phase"] = phase.into();
        match reason {
            Some(reason) => status["reason"] = reason.into(),
            None => drop(status.as_object_mut().and_then(|status| status.remove("reason"))),
        }
        turn.status = (status != object["status"]).then_some(status);
        turn
    }

    /// The next stage of an older task, after a node has reported.
    pub fn next_stage(
        &self,
        object: &Value,
        node: &str,
        report: &TaskReport,
        now_ms: i64,
    ) -> Option<Message> {
        let spec = template(self.kind, object);
        let state = match (report.event.as_str(), report.action.as_str()) {
            ("Init", "Success") => "Checking",
            ("Check", "Success") if self.kind == Kind::ImagePrePull => "Pulling",
            ("Check", "Success") => "BackingUp",
            ("Backup", "Success") => "Upgrading",
            _ => return None,
        };
        let item = match state {
            "Checking" => json!({"CheckItem": spec["checkItems"]}),
            _ => self.older_request(spec),
        };
        job::stage(now_ms, self.kind, &self.name, node, state, item)
    }

    /// The pull secret that the nodes of this job may read while it goes on, as (namespace, name), and these nodes.
    pub fn secret<'a>(&self, object: &'a Value) -> Option<(&'a str, &'a str, Vec<&'a str>)> {
        if self.kind != Kind::ImagePrePull || !Self::is_open(object) {
            return None;
        }
        let (namespace, name) =
            template(self.kind, object)["imageSecrets"].as_str()?.split_once('/')?;
        let tasks = object["status"]["nodeStatus"].as_array()?;
        let working = tasks.iter().filter(|task| phase_of(task) == "InProgress");
        let nodes = working.filter_map(|task| task["nodeName"].as_str()).collect();
        Some((namespace, name, nodes))
    }

    /// The status of a job that nobody has looked at.
    fn begin(&self, object: &Value, nodes: &BTreeMap<String, Node>) -> Value {
        match select(template(self.kind, object), nodes) {
            Err(reason) => json!({"phase": "Failure", "reason": reason}),
            Ok(selected) => {
                let tasks: Vec<Value> = selected
                    .into_iter()
                    .map(|(name, refusal)| match refusal {
                        None => json!({"nodeName": name, "phase": "Pending"}),
                        Some(reason) => {
                            json!({"nodeName": name, "phase": "Failure", "reason": reason})
                        }
                    })
                    .collect();
                json!({"phase": "Init", "nodeStatus": tasks})
            }
        }
    }

    /// Notes since when each task that goes on is as it is.
    fn see(&mut self, tasks: &[Value], now: Instant) {
        let mut open = BTreeMap::new();
        for task in tasks.iter().filter(|task| !is_final(phase_of(task))) {
            let Some(name) = task["nodeName"].as_str() else { continue };
            let seen = (actions_of(task), phase_of(task) == "InProgress");
            let known = self.tasks.remove(name);
            let told = known.as_ref().and_then(|known| known.told);
            let since = known.filter(|known| known.seen == seen).map_or(now, |known| known.since);
            open.insert(name.to_owned(), Task { seen, since, told });
        }
        self.tasks = open;
    }

    fn end_overdue(&mut self, tasks: &mut [Value], links: &Links, timeout: Duration, now: Instant) {
        let running = tasks.iter().any(|task| phase_of(task) == "InProgress");
        for task in tasks.iter_mut() {
            let Some(name) = task["nodeName"].as_str() else { continue };
            let Some(known) = self.tasks.get_mut(name) else { continue };
            let seconds = timeout.as_secs();
            let waits = !known.seen.1;
            // Its turn has not come: others go first, or it is about to be told.
            if waits && (running || links.contains_key(name)) {
                known.since = now;
            }
            if known.since + timeout > now {
                continue;
            }
            let (phase, reason) = match waits {
                true => ("Failure", format!("the node was not connected for {seconds} s")),
                false => ("Unknown", format!("the node did not report within {seconds} s")),
            };
            self.tasks.remove(name);
            end(task, phase, &reason);
        }
    }

    fn stop_when_too_many_failed(&mut self, tasks: &mut [Value], spec: &Value) {
        // What never began says nothing about the others.
        let began = |task: &&Value| {
            matches!(phase_of(task), "Failure" | "Unknown") && actions_of(task) > 0
                || phase_of(task) == "Unknown"
        };
        let failed = tasks.iter().filter(began).count();
        if failed == 0 || !exceeds(failed, tasks.len(), spec) {
            return;
        }
        for task in tasks.iter_mut().filter(|task| phase_of(task) == "Pending") {
            if let Some(name) = task["nodeName"].as_str() {
                self.tasks.remove(name);
            }
            end(task, "Failure", "not begun: more nodes have failed than the job tolerates");
        }
    }

    /// A node that was told on another link may not have heard.
    fn tell_again(
        &mut self,
        object: &Value,
        tasks: &[Value],
        nodes: &BTreeMap<String, Node>,
        links: &Links,
        now_ms: i64,
        turn: &mut Turn,
    ) {
        for task in tasks.iter().filter(|task| phase_of(task) == "InProgress") {
            let Some(name) = task["nodeName"].as_str() else { continue };
            let Some(link) = links.get(name) else { continue };
            let Some(known) = self.tasks.get_mut(name).filter(|known| known.told != Some(*link))
            else {
                continue;
            };
            known.told = Some(*link);
            // To fetch an image twice does no harm; whatever else has begun is not begun again.
            if self.kind == Kind::ImagePrePull || actions_of(task) == 0 {
                let order = self.order(object, nodes.get(name), name, now_ms);
                turn.orders.extend(order.ok().map(|message| (name.to_owned(), message)));
            }
        }
    }

    fn tell_next(
        &mut self,
        object: &Value,
        tasks: &mut [Value],
        nodes: &BTreeMap<String, Node>,
        links: &Links,
        (now, now_ms): (Instant, i64),
        turn: &mut Turn,
    ) {
        let spec = template(self.kind, object);
        let at_once = spec["concurrency"].as_u64().unwrap_or(0).max(1);
        let at_once = usize::try_from(at_once).unwrap_or(usize::MAX);
        let mut running = tasks.iter().filter(|task| phase_of(task) == "InProgress").count();
        for task in tasks.iter_mut() {
            if running >= at_once {
                break;
            }
            if phase_of(task) != "Pending" {
                continue;
            }
            let Some(name) = task["nodeName"].as_str().map(str::to_owned) else { continue };
            let Some(link) = links.get(&name) else { continue };
            match self.order(object, nodes.get(&name), &name, now_ms) {
                Ok(message) => {
                    task["phase"] = "InProgress".into();
                    let told = Task { seen: (0, true), since: now, told: Some(*link) };
                    self.tasks.insert(name.clone(), told);
                    turn.orders.push((name, message));
                    running += 1;
                }
                Err(reason) => {
                    self.tasks.remove(&name);
                    end(task, "Failure", reason);
                }
            }
        }
    }

    /// What a node is told first; in the words of its release.
    fn order(
        &self,
        object: &Value,
        node: Option<&Node>,
        name: &str,
        now_ms: i64,
    ) -> Result<Message, &'static str> {
        let release = node.and_then(|node| node.release).filter(|release| *release < CURRENT);
        let Some(release) = release else {
            return Ok(job::order(now_ms, self.kind, &self.name, name, &object["spec"]));
        };
        let spec = template(self.kind, object);
        let item = self.older_request(spec);
        if release < STAGED {
            if self.kind != Kind::NodeUpgrade {
                return Err("the node's KubeEdge is older than 1.16 and has no such jobs");
            }
            let mut message = job::stage(now_ms, self.kind, &self.name, name, "", Value::Null)
                .ok_or("no task")?;
            message.route.source = job::OLD_UPGRADES.into();
            message.route.group = job::OLD_UPGRADES.into();
            message.content = skerry_protocol::message::raw(&item);
            return Ok(message);
        }
        job::stage(now_ms, self.kind, &self.name, name, "Init", item)
            .ok_or("the node's KubeEdge is older than 1.21 and has no such jobs")
    }

    fn older_request(&self, spec: &Value) -> Value {
        match self.kind {
            Kind::ImagePrePull => json!({
                "Images": spec["images"], "NodeName": "",
                "Secret": spec["imageSecrets"].as_str().unwrap_or_default(),
                "RetryTimes": spec["retryTimes"].as_i64().unwrap_or(0),
                "CheckItems": spec["checkItems"],
            }),
            _ => json!({
                "UpgradeID": self.name, "HistoryID": self.name,
                "Version": spec["version"].as_str().unwrap_or_default(), "UpgradeTool": "keadm",
                "Image": spec["image"].as_str().unwrap_or_default(), "ImageDigest": "",
                "RequireConfirmation": spec["requireConfirmation"].as_bool().unwrap_or(false),
            }),
        }
    }

    fn finalizers_left(&self, object: &Value) -> Option<Vec<Value>> {
        let own = format!("kubeedge.io/{}-controller", self.kind.token());
        let all = object["metadata"]["finalizers"].as_array()?;
        let left: Vec<Value> = all.iter().filter(|one| **one != own.as_str()).cloned().collect();
        (left.len() < all.len()).then_some(left)
    }
}

/// Where a job says whom it is for and how it is done.
fn template(kind: Kind, object: &Value) -> &Value {
    match kind {
        Kind::ImagePrePull => &object["spec"]["imagePrePullTemplate"],
        _ => &object["spec"],
    }
}

/// Names of the nodes that a job names or selects, each once, with what speaks against it.
fn select(
    spec: &Value,
    nodes: &BTreeMap<String, Node>,
) -> Result<Vec<(String, Option<&'static str>)>, String> {
    let names: Vec<&str> =
        spec["nodeNames"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let selector = &spec["labelSelector"];
    let selected: BTreeMap<String, Option<&'static str>> = match (names.is_empty(), selector) {
        (false, Value::Null) => names
            .into_iter()
            .map(|name| {
                let refusal = nodes.get(name).map_or(Some("there is no such node"), Node::refusal);
                (name.to_owned(), refusal)
            })
            .collect(),
        (false, _) => return Err("both nodeNames and labelSelector are given".into()),
        (true, Value::Object(_)) => {
            let mut found = BTreeMap::new();
            for node in nodes.values() {
                if matches(selector, &node.labels)? {
                    found.insert(node.name.clone(), node.refusal());
                }
            }
            found
        }
        (true, _) => return Err("neither nodeNames nor labelSelector is given".into()),
    };
    match selected.len() {
        0 => Err("no node has the labels of labelSelector".into()),
        NODES_MAX.. => {
            Err(format!("the job is for more than {NODES_MAX} nodes; make several of it"))
        }
        _ => Ok(selected.into_iter().collect()),
    }
}

/// Whether labels match a LabelSelector object; one without any condition matches everything.
fn matches(selector: &Value, labels: &BTreeMap<String, String>) -> Result<bool, String> {
    let wanted = selector["matchLabels"].as_object().into_iter().flatten();
    let mut all = wanted
        .into_iter()
        .all(|(key, value)| labels.get(key).map(String::as_str) == value.as_str());
    for term in selector["matchExpressions"].as_array().into_iter().flatten() {
        let key = term["key"].as_str().unwrap_or_default();
        let found = labels.get(key);
        let values = || term["values"].as_array().into_iter().flatten();
        let listed = || found.is_some_and(|found| values().any(|value| value == found.as_str()));
        all &= match term["operator"].as_str().unwrap_or_default() {
            "In" => listed(),
            "NotIn" => !listed(),
            "Exists" => found.is_some(),
            "DoesNotExist" => found.is_none(),
            other => return Err(format!("labelSelector has no operator `{other}`")),
        };
    }
    Ok(all)
}

/// The phase of a job with these tasks, and why it failed.
fn phase(tasks: &[Value], spec: &Value) -> (&'static str, Option<String>) {
    if tasks.iter().any(|task| !is_final(phase_of(task))) {
        return ("InProgress", None);
    }
    let failed = tasks.iter().filter(|task| phase_of(task) != "Successful").count();
    if failed > 0 && exceeds(failed, tasks.len(), spec) {
        let all = tasks.len();
        return (
            "Failure",
            Some(format!("{failed} of {all} nodes failed, which is more than the job tolerates")),
        );
    }
    ("Completed", None)
}

/// Whether so many are more than the share that the job tolerates; without a word of the job, one is. The share is
/// compared with two decimals, as KubeEdge does.
fn exceeds(failed: usize, all: usize, spec: &Value) -> bool {
    let tolerated = spec["failureTolerate"].as_str().and_then(|share| share.parse().ok());
    let hundredths = (200 * failed + all) / (2 * all.max(1));
    let hundredths = u32::try_from(hundredths).unwrap_or(u32::MAX);
    f64::from(hundredths) / 100.0 > tolerated.unwrap_or(0.0)
}

fn end(task: &mut Value, phase: &str, reason: &str) {
    task["phase"] = phase.into();
    task["reason"] = reason.into();
}

fn phase_of(task: &Value) -> &str {
    match task["phase"].as_str() {
        None | Some("") => "Pending",
        Some(phase) => phase,
    }
}

fn actions_of(task: &Value) -> usize {
    task["actionFlow"].as_array().map_or(0, Vec::len)
}

fn is_final(phase: &str) -> bool {
    matches!(phase, "Successful" | "Failure" | "Unknown")
}

#[cfg(test)]
mod tests;
