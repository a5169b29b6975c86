//! A node's reports about its share of a node job, as changes of the job's status.
//!
//! A job of `v1alpha2` goes through a fixed flow of actions, and keeps all that were reported. A task of `v1alpha1` has
//! a state, an event and a result, and a table says what comes next. In both, a node can write about itself only, and
//! only when the job names it.
//!
//! Source: kubeedge/kubeedge, pkg/nodetask/actionflow, cloud/pkg/taskmanager/status and
//! staging/src/github.com/kubeedge/api/apis/fsm/v1alpha1.

use serde::Deserialize;
use serde_json::{Map, Value, json};

/// Group and version of the newer jobs, as it begins their resource paths.
pub const V1ALPHA2: &str = "operations.kubeedge.io/v1alpha2";
/// Group and version of the older tasks.
pub const V1ALPHA1: &str = "operations.kubeedge.io/v1alpha1";

/// The kinds of node jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A new version of the edge.
    NodeUpgrade,
    /// Images fetched before they are needed.
    ImagePrePull,
    /// A change of the edge's configuration.
    ConfigUpdate,
}

impl Kind {
    /// By its name in a resource path.
    pub fn parse(token: &str) -> Option<Self> {
        match token {
            "nodeupgradejob" => Some(Self::NodeUpgrade),
            "imageprepulljob" => Some(Self::ImagePrePull),
            "configupdatejob" => Some(Self::ConfigUpdate),
            _ => None,
        }
    }

    /// By the operation of an older task.
    pub fn of_task(operation: &str) -> Option<Self> {
        match operation {
            "upgrade" => Some(Self::NodeUpgrade),
            "prepull" => Some(Self::ImagePrePull),
            _ => None,
        }
    }

    /// Plural in the API; all are cluster-scoped.
    pub fn plural(self) -> &'static str {
        match self {
            Self::NodeUpgrade => "nodeupgradejobs",
            Self::ImagePrePull => "imageprepulljobs",
            Self::ConfigUpdate => "configupdatejobs",
        }
    }

    /// Whether the flow goes on after `action`; `None` when it has no such action.
    fn goes_on(self, action: &str, succeeded: bool) -> Option<bool> {
        let (flow, rollback): (&[&str], bool) = match self {
            Self::NodeUpgrade => (&["Check", "WaitingConfirmation", "BackUp", "Upgrade"], true),
            Self::ImagePrePull => (&["Check", "Pull"], false),
            Self::ConfigUpdate => (&["Check", "BackUp", "Update"], true),
        };
        let last = flow.len() - 1;
        match flow.iter().position(|known| *known == action) {
            // Only the last action has something to undo.
            Some(index) if index == last => Some(!succeeded && rollback),
            Some(_) => Some(succeeded),
            None => (rollback && action == "RollBack").then_some(false),
        }
    }
}

/// Why a report changes nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The flow of this kind has no such action.
    #[error("a job of this kind has no action `{0}`")]
    Action(String),
    /// The job is not for this node.
    #[error("the job has no task for node `{0}`")]
    Node(String),
    /// What the node adds is not readable.
    #[error("`extend` of the report is not readable")]
    Extend,
    /// From this state that event leads nowhere.
    #[error("a task in state `{state}` cannot take `{event}` with `{action}`")]
    Transition {
        /// Where the task is.
        state: String,
        /// What happened.
        event: String,
        /// How it went.
        action: String,
    },
}

/// The content of an `UpdateNodeActionStatus` message.
#[derive(Debug, Clone, Deserialize)]
pub struct ActionReport {
    /// The action that ended.
    pub action: String,
    /// Whether it went well.
    #[serde(default)]
    pub succ: bool,
    /// When, RFC 3339.
    #[serde(default, rename = "finishTime")]
    pub finish_time: String,
    /// Why it failed.
    #[serde(default)]
    pub reason: String,
    /// `from,to` of an upgrade; a JSON array of image results of a pre-pull.
    #[serde(default)]
    pub extend: String,
}

/// Splits `operations.kubeedge.io/v1alpha2/<type>/<job>/node/<node>`.
pub fn parse_path(resource: &str) -> Option<(Kind, &str, &str)> {
    let mut segments = resource.strip_prefix(V1ALPHA2)?.strip_prefix('/')?.split('/');
    let (kind, job) = (Kind::parse(segments.next()?)?, segments.next()?);
    let (word, node) = (segments.next()?, segments.next()?);
    let whole = segments.next().is_none() && word == "node" && !job.is_empty();
    whole.then_some((kind, job, node))
}

/// Splits `task/<job>/node/<node>`.
pub fn parse_task_path(resource: &str) -> Option<(&str, &str)> {
    let mut segments = resource.strip_prefix("task/")?.split('/');
    let (job, word, node) = (segments.next()?, segments.next()?, segments.next()?);
    (segments.next().is_none() && word == "node" && !job.is_empty()).then_some((job, node))
}

/// Writes a report into `job` (of `v1alpha2`).
///
/// The same report twice, as after a lost answer, is written once.
///
/// # Errors
///
/// [`Denied`], when the flow has no such action or the job does not name the node.
pub fn apply(kind: Kind, job: &mut Value, node: &str, report: &ActionReport) -> Result<(), Denied> {
    let goes_on = kind
        .goes_on(&report.action, report.succ)
        .ok_or_else(|| Denied::Action(report.action.clone()))?;
    let mut extension = Map::new();
    if !report.extend.is_empty() {
        match kind {
            Kind::NodeUpgrade => {
                let (from, to) = report.extend.split_once(',').ok_or(Denied::Extend)?;
                extension.insert("historicVersion".into(), from.into());
                extension.insert("currentVersion".into(), to.into());
            }
            Kind::ImagePrePull => {
                let images: Value =
                    serde_json::from_str(&report.extend).map_err(|_| Denied::Extend)?;
                extension.insert("imageStatus".into(), images);
            }
            Kind::ConfigUpdate => {}
        }
    }
    let task = job
        .pointer_mut("/status/nodeStatus")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
        .find(|task| task["nodeName"] == node)
        .and_then(Value::as_object_mut)
        .ok_or_else(|| Denied::Node(node.into()))?;
    let mut entry = json!({"action": report.action, "time": report.finish_time,
        "status": if report.succ { "True" } else { "False" }});
    if !report.succ && !report.reason.is_empty() {
        entry["reason"] = report.reason.clone().into();
    }
    let flow = task.entry("actionFlow").or_insert_with(|| json!([]));
    let Some(flow) = flow.as_array_mut() else { return Err(Denied::Extend) };
    if flow.last() != Some(&entry) {
        flow.push(entry);
    }
    let phase = match (goes_on, report.succ) {
        (true, _) => "InProgress",
        (false, true) => "Successful",
        (false, false) => "Failure",
    };
    task.insert("phase".into(), phase.into());
    task.extend(extension);
    Ok(())
}

/// The content of an older task's report, on the link or over HTTPS.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TaskReport {
    /// Who reports; the caller compares it with the path.
    pub node_name: String,
    /// What happened, such as `Check`.
    pub event: String,
    /// How it went: `Success`, `Failure`.
    pub action: String,
    /// Why.
    pub reason: String,
    /// Results by image of a pre-pull, as JSON.
    pub external_message: String,
}

/// Writes a report into `job` (of `v1alpha1`). `now` is RFC 3339.
///
/// # Errors
///
/// [`Denied`], when the job does not name the node or its task cannot take this step.
pub fn apply_task(
    kind: Kind,
    job: &mut Value,
    node: &str,
    report: &TaskReport,
    now: &str,
) -> Result<(), Denied> {
    let images = match (kind, report.external_message.as_str()) {
        (Kind::ImagePrePull, text) if !text.is_empty() => {
            Some(serde_json::from_str::<Value>(text).map_err(|_| Denied::Extend)?)
        }
        _ => None,
    };
    let list = if kind == Kind::ImagePrePull { "status" } else { "nodeStatus" };
    let nested = kind == Kind::ImagePrePull;
    let is_of_node = |task: &Value| {
        let task = if nested { &task["nodeStatus"] } else { task };
        task["nodeName"] == node
    };
    let entry = job
        .pointer_mut(&format!("/status/{list}"))
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
        .find(|task| is_of_node(task))
        .ok_or_else(|| Denied::Node(node.into()))?;
    let state = if nested { &entry["nodeStatus"]["state"] } else { &entry["state"] };
    let state = state.as_str().filter(|state| !state.is_empty()).unwrap_or("Init").to_owned();
    let next = next_state(kind, &state, &report.event, &report.action).ok_or_else(|| {
        Denied::Transition { state, event: report.event.clone(), action: report.action.clone() }
    })?;
    let status = json!({"nodeName": node, "state": next, "event": report.event,
        "action": report.action, "time": now, "reason": report.reason});
    if nested {
        entry["nodeStatus"] = status;
        if let Some(images) = images {
            entry["imageStatus"] = images;
        }
    } else {
        *entry = status;
    }
    Ok(())
}

fn next_state(kind: Kind, state: &str, event: &str, action: &str) -> Option<&'static str> {
    let failed = matches!(action, "Failure");
    let upgrade = kind == Kind::NodeUpgrade;
    match (state, event, action) {
        ("Init", "Init", "Success") => Some("Checking"),
        ("Init" | "Checking", "TimeOut", "Failure") | ("Init", "Init", "Failure") => Some("Failed"),
        ("Checking", "Check", "Failure") => Some("Failed"),
        ("Checking", "Check", "Success") => Some(if upgrade { "BackingUp" } else { "Pulling" }),
        ("Init", "Upgrade", "Success") if upgrade => Some("Successful"),
        ("BackingUp", "Backup", "Success") if upgrade => Some("Upgrading"),
        ("BackingUp", "Backup" | "TimeOut", _) if upgrade && failed => Some("Failed"),
        ("Upgrading", "Upgrade", "Success") if upgrade => Some("Successful"),
        ("Upgrading", "Upgrade" | "TimeOut", _) if upgrade && failed => Some("Failed"),
        ("RollingBack", "TimeOut", "Failure") if upgrade => Some("Failed"),
        // A node that rolled back has failed, however well that went.
        ("RollingBack" | "Upgrading" | "Init", "Rollback", "Success" | "Failure") if upgrade => {
            Some("Failed")
        }
        ("Pulling", "Pull", "Success") if !upgrade => Some("Successful"),
        ("Pulling", "Pull" | "TimeOut", _) if !upgrade && failed => Some("Failed"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(action: &str, succ: bool, extend: &str) -> ActionReport {
        let reason = if succ { "" } else { "why" };
        let (action, extend, reason) = (action.into(), extend.into(), reason.into());
        ActionReport { action, succ, finish_time: "t".into(), reason, extend }
    }

    #[test]
    fn a_job_keeps_every_action_once_and_ends_with_its_flow() {
        let mut job =
            json!({"status": {"nodeStatus": [{"nodeName": "edge2"}, {"nodeName": "edge1"}]}});
        let steps = [
            ("Check", true, "InProgress"),
            ("Check", true, "InProgress"),
            ("BackUp", true, "InProgress"),
            ("Upgrade", false, "InProgress"),
            ("RollBack", true, "Successful"),
        ];
        for (action, succ, phase) in steps {
            apply(Kind::NodeUpgrade, &mut job, "edge1", &report(action, succ, "")).expect("taken");
            assert_eq!(job["status"]["nodeStatus"][1]["phase"], phase, "{action}");
        }
        let task = &job["status"]["nodeStatus"][1];
        assert_eq!(task["actionFlow"].as_array().map(Vec::len), Some(4));
        assert_eq!(
            task["actionFlow"][2],
            json!({"action": "Upgrade", "status": "False", "reason": "why", "time": "t"})
        );
        apply(Kind::NodeUpgrade, &mut job, "edge1", &report("Upgrade", true, "v1,v2"))
            .expect("taken");
        assert_eq!(job["status"]["nodeStatus"][1]["currentVersion"], "v2");
        assert_eq!(job["status"]["nodeStatus"][0], json!({"nodeName": "edge2"}));
    }

    #[test]
    fn reports_that_do_not_belong_are_refused() {
        let mut job = json!({"status": {"nodeStatus": [{"nodeName": "edge1"}]}});
        let before = job.clone();
        let refused = |job: &mut Value, kind, node: &str, report| {
            apply(kind, job, node, &report).expect_err("refused")
        };
        let job = &mut job;
        assert_eq!(
            refused(job, Kind::NodeUpgrade, "edge2", report("Check", true, "")),
            Denied::Node("edge2".into())
        );
        assert_eq!(
            refused(job, Kind::ImagePrePull, "edge1", report("RollBack", true, "")),
            Denied::Action("RollBack".into())
        );
        assert_eq!(
            refused(job, Kind::ImagePrePull, "edge1", report("Pull", true, "{")),
            Denied::Extend
        );
        assert_eq!(*job, before);
    }

    #[test]
    fn paths_are_taken_apart() {
        let path = "operations.kubeedge.io/v1alpha2/imageprepulljob/j/node/edge1";
        assert_eq!(parse_path(path), Some((Kind::ImagePrePull, "j", "edge1")));
        assert_eq!(parse_path("operations.kubeedge.io/v1alpha2/x/j/node/edge1"), None);
        assert_eq!(parse_path("operations.kubeedge.io/v1alpha2/nodeupgradejob/j/edge1"), None);
        assert_eq!(parse_task_path("task/j/node/edge1"), Some(("j", "edge1")));
        assert_eq!(parse_task_path("task/j/edge1"), None);
    }

    #[test]
    fn an_older_task_steps_through_its_table() {
        let mut job = json!({"status": {"nodeStatus": [{"nodeName": "edge1"}]}});
        let step = |job: &mut Value, event: &str, action: &str| {
            let report =
                TaskReport { event: event.into(), action: action.into(), ..TaskReport::default() };
            apply_task(Kind::NodeUpgrade, job, "edge1", &report, "now")
        };
        for (event, state) in [
            ("Init", "Checking"),
            ("Check", "BackingUp"),
            ("Backup", "Upgrading"),
            ("Upgrade", "Successful"),
        ] {
            step(&mut job, event, "Success").expect("taken");
            assert_eq!(job["status"]["nodeStatus"][0]["state"], state);
        }
        assert!(matches!(step(&mut job, "Upgrade", "Success"), Err(Denied::Transition { .. })));
        let mut pull = json!({"status": {"status": [{"nodeStatus": {"nodeName": "edge1", "state": "Pulling"}}]}});
        let report = TaskReport {
            event: "Pull".into(),
            action: "Success".into(),
            external_message: r#"[{"image":"a"}]"#.into(),
            ..TaskReport::default()
        };
        apply_task(Kind::ImagePrePull, &mut pull, "edge1", &report, "now").expect("taken");
        let entry = &pull["status"]["status"][0];
        assert_eq!(entry["nodeStatus"]["state"], "Successful");
        assert_eq!(entry["imageStatus"], json!([{"image": "a"}]));
        assert_eq!(
            apply_task(Kind::ImagePrePull, &mut pull, "edge2", &report, "now"),
            Err(Denied::Node("edge2".into()))
        );
    }
}
