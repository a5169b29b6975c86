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
use skerry_protocol::job::{ActionReport, ImageStatus, Kind, TaskReport};

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

/// Writes a report into `job` (of `v1alpha2`).
///
/// The same report twice, as after a lost answer, is written once.
///
/// # Errors
///
/// [`Denied`], when the flow has no such action or the job does not name the node.
pub fn apply(kind: Kind, job: &mut Value, node: &str, report: &ActionReport) -> Result<(), Denied> {
    let goes_on = kind
        .after(&report.action, report.succ)
        .ok_or_else(|| Denied::Action(report.action.clone()))?
        .is_some();
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
    let task = task_of(job, node).ok_or_else(|| Denied::Node(node.into()))?;
    if kind == Kind::ImagePrePull && task.get("phase").is_some_and(|phase| phase == "Successful") {
        // Told again on a new link while its first reports were on their way; the images are there.
        return Ok(());
    }
    let mut entry = json!({"action": report.action, "time": report.finish_time,
        "status": if report.succ { "True" } else { "False" }});
    if !report.succ && !report.reason.is_empty() {
        entry["reason"] = report.reason.clone().into();
    }
    let flow = task.entry("actionFlow").or_insert_with(|| json!([]));
    let Some(flow) = flow.as_array_mut() else { return Err(Denied::Extend) };
    if flow.contains(&entry) {
        // Told again; whatever came after it counts.
        return Ok(());
    }
    flow.push(entry);
    let phase = match (goes_on, report.succ) {
        (true, _) => "InProgress",
        (false, true) => "Successful",
        (false, false) => "Failure",
    };
    task.insert("phase".into(), phase.into());
    task.extend(extension);
    Ok(())
}

/// Whether `job` is kept in the form of `v1alpha2`, whatever its nodes speak. KubeEdge's cloud keeps one form for the
/// whole cluster, by a switch; a job that it began in the older form is finished in that.
pub fn is_current(job: &Value) -> bool {
    job["status"]["phase"].as_str().is_some_and(|phase| !phase.is_empty())
}

/// An older task's report about a job that is kept in the form of `v1alpha2`.
///
/// # Errors
///
/// [`Denied`], as [`apply`], and for an event that the flow of this kind has not.
pub fn apply_older(
    kind: Kind,
    job: &mut Value,
    node: &str,
    report: &TaskReport,
    now: &str,
) -> Result<(), Denied> {
    let succ = report.action == "Success";
    let action = match report.event.as_str() {
        // Only says that the node is there.
        "Init" if succ => {
            return task_of(job, node).map(drop).ok_or_else(|| Denied::Node(node.into()));
        }
        "Init" | "Check" => "Check",
        "Backup" => "BackUp",
        "Pull" => "Pull",
        "Upgrade" => "Upgrade",
        "Rollback" => "RollBack",
        other => return Err(Denied::Action(other.into())),
    };
    let mut extend = String::new();
    if kind == Kind::ImagePrePull && !report.external_message.is_empty() {
        let images: Vec<OlderImage> =
            serde_json::from_str(&report.external_message).map_err(|_| Denied::Extend)?;
        let images: Vec<ImageStatus> = images
            .into_iter()
            .map(|image| ImageStatus {
                status: if image.state == "Successful" { "True" } else { "False" }.into(),
                image: image.image,
                reason: image.reason,
            })
            .collect();
        extend = serde_json::to_string(&images).map_err(|_| Denied::Extend)?;
    }
    let report = ActionReport {
        action: action.into(),
        succ,
        finish_time: now.into(),
        reason: report.reason.clone(),
        extend,
    };
    apply(kind, job, node, &report)
}

/// An image in an older task's report.
#[derive(Deserialize)]
struct OlderImage {
    #[serde(default)]
    image: String,
    #[serde(default)]
    state: String,
    #[serde(default)]
    reason: String,
}

fn task_of<'a>(job: &'a mut Value, node: &str) -> Option<&'a mut Map<String, Value>> {
    job.pointer_mut("/status/nodeStatus")?
        .as_array_mut()?
        .iter_mut()
        .find(|task| task["nodeName"] == node)?
        .as_object_mut()
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
    fn an_older_nodes_report_enters_a_job_of_the_newer_form() {
        let mut job =
            json!({"status": {"phase": "InProgress", "nodeStatus": [{"nodeName": "edge1"}]}});
        assert!(is_current(&job) && !is_current(&json!({"status": {"state": "Pulling"}})));
        let step = |job: &mut Value, event: &str, action: &str, images: &str| {
            let report = TaskReport {
                event: event.into(),
                action: action.into(),
                external_message: images.into(),
                ..TaskReport::default()
            };
            apply_older(Kind::ImagePrePull, job, "edge1", &report, "now")
        };
        step(&mut job, "Init", "Success", "").expect("taken");
        assert_eq!(job["status"]["nodeStatus"][0], json!({"nodeName": "edge1"}));
        step(&mut job, "Check", "Success", "").expect("taken");
        let images =
            r#"[{"image":"a","state":"Successful"},{"image":"b","state":"Failed","reason":"r"}]"#;
        step(&mut job, "Pull", "Failure", images).expect("taken");
        let task = &job["status"]["nodeStatus"][0];
        assert_eq!(
            (&task["phase"], task["actionFlow"].as_array().map(Vec::len)),
            (&json!("Failure"), Some(2))
        );
        assert_eq!(
            task["imageStatus"],
            json!([{"image": "a", "status": "True"}, {"image": "b", "status": "False", "reason": "r"}])
        );
        assert_eq!(step(&mut job, "Dance", "Success", ""), Err(Denied::Action("Dance".into())));
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
