//! Node jobs: what a cloud asks of nodes beside their pods, and what they report.
//!
//! Two versions are on the wire. A job of `v1alpha2` is told once, with its first action and its whole `spec`; the node
//! goes through a fixed flow of actions by itself and reports each. A task of `v1alpha1`, which edges before KubeEdge
//! 1.21 know, is told stage by stage, and the node reports an event for each. None of these messages is acknowledged.
//!
//! CloudCore tells and takes reports (`cloudcore/core/src/jobs.rs`), EdgeCore the other way round
//! (`edge-os/core/src/jobs.rs`).
//!
//! Source: kubeedge/kubeedge, pkg/nodetask/{message,actionflow}, cloud/pkg/taskmanager, common/types/types.go,
//! staging/src/github.com/kubeedge/api/apis/fsm/v1alpha1.

use crate::message::{Message, Operation};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Group and version of the newer jobs, as it begins their resource paths.
pub const V1ALPHA2: &str = "operations.kubeedge.io/v1alpha2";
/// Group and version of the older tasks.
pub const V1ALPHA1: &str = "operations.kubeedge.io/v1alpha1";
/// `route.source` and `route.group` of what goes down.
pub const MODULE: &str = "taskmanager";
/// `route.source` and `route.group` of an upgrade for edges before KubeEdge 1.16.
pub const OLD_UPGRADES: &str = "nodeupgradejobcontroller";
/// `route.source` of reports.
pub const REPORT_SOURCE: &str = "websocket";
/// `route.group` of reports.
pub const REPORT_GROUP: &str = "hub";

/// The kinds of node jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A new version of the edge.
    NodeUpgrade,
    /// Images fetched before they are needed.
    ImagePrePull,
    /// A change of the edge's configuration.
    ConfigUpdate,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::NodeUpgrade, Self::ImagePrePull, Self::ConfigUpdate];

    /// By its name in a resource path.
    pub fn parse(token: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.token() == token)
    }

    /// By the operation of an older task.
    pub fn of_task(operation: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.task().is_some_and(|task| task.as_str() == operation))
    }

    /// Its name in a resource path.
    pub fn token(self) -> &'static str {
        match self {
            Self::NodeUpgrade => "nodeupgradejob",
            Self::ImagePrePull => "imageprepulljob",
            Self::ConfigUpdate => "configupdatejob",
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

    /// Kind in the API.
    pub fn api_kind(self) -> &'static str {
        match self {
            Self::NodeUpgrade => "NodeUpgradeJob",
            Self::ImagePrePull => "ImagePrePullJob",
            Self::ConfigUpdate => "ConfigUpdateJob",
        }
    }

    /// Operation of the older task of this kind, if there is one.
    pub fn task(self) -> Option<Operation> {
        match self {
            Self::NodeUpgrade => Some(Operation::Upgrade),
            Self::ImagePrePull => Some(Operation::Prepull),
            Self::ConfigUpdate => None,
        }
    }

    /// The actions in their order, and the one that undoes the last.
    pub fn flow(self) -> (&'static [Operation], Option<Operation>) {
        use Operation::{
            JobBackUp, JobCheck, JobConfirm, JobPull, JobRollBack, JobUpdate, JobUpgrade,
        };
        match self {
            Self::NodeUpgrade => {
                (&[JobCheck, JobConfirm, JobBackUp, JobUpgrade], Some(JobRollBack))
            }
            Self::ImagePrePull => (&[JobCheck, JobPull], None),
            Self::ConfigUpdate => (&[JobCheck, JobBackUp, JobUpdate], Some(JobRollBack)),
        }
    }

    /// What follows `action` when it went as `succeeded` says: `Some(None)` is the end, `None` no action of this kind.
    pub fn after(self, action: &str, succeeded: bool) -> Option<Option<Operation>> {
        let (flow, undo) = self.flow();
        let Some(index) = flow.iter().position(|known| known.as_str() == action) else {
            return undo.is_some_and(|undo| undo.as_str() == action).then_some(None);
        };
        Some(match succeeded {
            true => flow.get(index + 1).copied(),
            // Only the last action has something to undo.
            false => undo.filter(|_| index + 1 == flow.len()),
        })
    }
}

/// The resource of a job's messages, down and up.
pub fn path(kind: Kind, job: &str, node: &str) -> String {
    format!("{V1ALPHA2}/{}/{job}/node/{node}", kind.token())
}

/// Splits `operations.kubeedge.io/v1alpha2/<type>/<job>/node/<node>`.
pub fn parse_path(resource: &str) -> Option<(Kind, &str, &str)> {
    let mut segments = resource.strip_prefix(V1ALPHA2)?.strip_prefix('/')?.split('/');
    let (kind, job) = (Kind::parse(segments.next()?)?, segments.next()?);
    let (word, node) = (segments.next()?, segments.next()?);
    let whole = segments.next().is_none() && word == "node" && !job.is_empty();
    whole.then_some((kind, job, node))
}

/// Splits `task/<job>/node/<node>`, the resource of an older task's report.
pub fn parse_task_path(resource: &str) -> Option<(&str, &str)> {
    let mut segments = resource.strip_prefix("task/")?.split('/');
    let (job, word, node) = (segments.next()?, segments.next()?, segments.next()?);
    (segments.next().is_none() && word == "node" && !job.is_empty()).then_some((job, node))
}

/// Splits `<task>/<job>/node/<node>`, the resource of an older task.
pub fn parse_stage_path(resource: &str) -> Option<(Kind, &str, &str)> {
    let (task, rest) = resource.split_once('/')?;
    let (job, rest) = rest.split_once('/')?;
    let node = rest.strip_prefix("node/")?;
    let whole = !job.is_empty() && !node.is_empty() && !node.contains('/');
    whole.then_some((Kind::of_task(task)?, job, node))
}

/// Tells a node its job: the first action, with the whole `spec`.
pub fn order(now_ms: i64, kind: Kind, job: &str, node: &str, spec: &Value) -> Message {
    let first = kind.flow().0[0];
    Message::new(now_ms, MODULE, MODULE, first, path(kind, job, node), spec)
}

/// Tells a node a stage of an older task; `None` for a kind that has none.
pub fn stage(
    now_ms: i64,
    kind: Kind,
    job: &str,
    node: &str,
    state: &str,
    item: Value,
) -> Option<Message> {
    let task = kind.task()?;
    let request =
        TaskRequest { task_id: job.into(), kind: task.as_str().into(), state: state.into(), item };
    let resource = format!("{}/{job}/node/{node}", task.as_str());
    Some(Message::new(now_ms, MODULE, MODULE, task, resource, &request))
}

/// The content of an `UpdateNodeActionStatus` message: how one action went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActionReport {
    /// The action that ended.
    pub action: String,
    /// Whether it went well.
    #[serde(default)]
    pub succ: bool,
    /// When, RFC 3339. KubeEdge's edge leaves it empty for changes of its configuration.
    #[serde(default, rename = "finishTime")]
    pub finish_time: String,
    /// Why it failed.
    #[serde(default)]
    pub reason: String,
    /// `from,to` of an upgrade; a JSON array of [`ImageStatus`] of a pre-pull.
    #[serde(default)]
    pub extend: String,
}

/// What became of one image of a pre-pull.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStatus {
    /// Its name, as the job has it.
    pub image: String,
    /// `True` or `False`.
    pub status: String,
    /// Why it was not fetched.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// The content of a stage of an older task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskRequest {
    /// Name of the job.
    #[serde(rename = "TaskID", default)]
    pub task_id: String,
    /// `upgrade` or `prepull`.
    #[serde(rename = "Type", default)]
    pub kind: String,
    /// The stage: empty or `Init`, `Checking`, then `Pulling`, or `BackingUp` and `Upgrading`.
    #[serde(rename = "State", default)]
    pub state: String,
    /// What the stage needs to know.
    #[serde(rename = "Item", default)]
    pub item: Value,
}

/// The content of an older task's report, on the link or over HTTPS. All keys are written, as Go does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TaskReport {
    /// Who reports; the receiver compares it with the path.
    pub node_name: String,
    /// Not used by KubeEdge's edge.
    pub state: String,
    /// What happened, such as `Check`.
    pub event: String,
    /// How it went: `Success`, `Failure`.
    pub action: String,
    /// Why.
    pub reason: String,
    /// Not used by KubeEdge's edge.
    pub time: String,
    /// Results by image of a pre-pull, as JSON.
    pub external_message: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn wire(mut message: Message) -> String {
        message.header.msg_id = "id".into();
        message.encode().trim_end().to_owned()
    }

    #[test]
    fn paths_are_taken_apart_and_put_together() {
        for kind in Kind::ALL {
            assert_eq!(parse_path(&path(kind, "j", "edge1")), Some((kind, "j", "edge1")));
        }
        assert_eq!(parse_path("operations.kubeedge.io/v1alpha2/x/j/node/edge1"), None);
        assert_eq!(parse_path("operations.kubeedge.io/v1alpha2/nodeupgradejob/j/edge1"), None);
        assert_eq!(parse_task_path("task/j/node/edge1"), Some(("j", "edge1")));
        assert_eq!(parse_task_path("task/j/edge1"), None);
        let stage = parse_stage_path("prepull/j/node/edge1");
        assert_eq!(stage, Some((Kind::ImagePrePull, "j", "edge1")));
        for bad in
            ["rest/j/node/edge1", "prepull/j/node/", "prepull//node/a", "prepull/j/node/a/b", ""]
        {
            assert_eq!(parse_stage_path(bad), None, "{bad}");
        }
    }

    #[test]
    fn flows_are_kubeedges() {
        use Operation::{JobBackUp, JobConfirm, JobPull, JobRollBack};
        for (kind, action, succeeded, next) in [
            (Kind::ImagePrePull, "Check", true, Some(Some(JobPull))),
            (Kind::ImagePrePull, "Check", false, Some(None)),
            (Kind::ImagePrePull, "Pull", true, Some(None)),
            (Kind::ImagePrePull, "Pull", false, Some(None)),
            (Kind::ImagePrePull, "RollBack", true, None),
            (Kind::NodeUpgrade, "Check", true, Some(Some(JobConfirm))),
            (Kind::NodeUpgrade, "Upgrade", false, Some(Some(JobRollBack))),
            (Kind::NodeUpgrade, "Upgrade", true, Some(None)),
            (Kind::NodeUpgrade, "BackUp", false, Some(None)),
            (Kind::ConfigUpdate, "Check", true, Some(Some(JobBackUp))),
            (Kind::ConfigUpdate, "Update", false, Some(Some(JobRollBack))),
            (Kind::ConfigUpdate, "RollBack", false, Some(None)),
            (Kind::ConfigUpdate, "Dance", true, None),
        ] {
            assert_eq!(kind.after(action, succeeded), next, "{kind:?} {action} {succeeded}");
        }
    }

    #[test]
    fn a_job_goes_down_as_kubeedges_task_manager_writes_it() {
        let spec = json!({"imagePrePullTemplate": {"images": ["a:1"], "nodeNames": ["edge1"]}});
        assert_eq!(
            wire(order(5, Kind::ImagePrePull, "j", "edge1", &spec)),
            r#"{"header":{"msg_id":"id","timestamp":5},"route":{"source":"taskmanager","group":"taskmanager","operation":"Check","resource":"operations.kubeedge.io/v1alpha2/imageprepulljob/j/node/edge1"},"content":{"imagePrePullTemplate":{"images":["a:1"],"nodeNames":["edge1"]}}}"#
        );
        let item = json!({"CheckItem": ["disk"]});
        let stage = stage(5, Kind::ImagePrePull, "j", "edge1", "Checking", item).expect("a task");
        assert_eq!(
            wire(stage),
            r#"{"header":{"msg_id":"id","timestamp":5},"route":{"source":"taskmanager","group":"taskmanager","operation":"prepull","resource":"prepull/j/node/edge1"},"content":{"TaskID":"j","Type":"prepull","State":"Checking","Item":{"CheckItem":["disk"]}}}"#
        );
    }

    #[test]
    fn reports_have_gos_keys_in_gos_order() {
        let report = ActionReport {
            action: "Pull".into(),
            succ: true,
            finish_time: "2026-01-01T00:00:00Z".into(),
            reason: String::new(),
            extend: serde_json::to_string(&[ImageStatus {
                image: "a:1".into(),
                status: "True".into(),
                reason: String::new(),
            }])
            .expect("json"),
        };
        assert_eq!(
            serde_json::to_string(&report).expect("json"),
            r#"{"action":"Pull","succ":true,"finishTime":"2026-01-01T00:00:00Z","reason":"","extend":"[{\"image\":\"a:1\",\"status\":\"True\"}]"}"#
        );
        let report = TaskReport { node_name: "edge1".into(), ..TaskReport::default() };
        assert_eq!(
            serde_json::to_string(&report).expect("json"),
            r#"{"NodeName":"edge1","State":"","Event":"","Action":"","Reason":"","Time":"","ExternalMessage":""}"#
        );
    }
}
