//! How objects, releases and sites fare, judged from live objects. The words for objects are kstatus'.
//!
//! A site that cannot answer says nothing about its workloads: its releases are [`ReleaseWord::Pending`], never
//! `Failed`.

use serde_json::Value;
use skerry_api::fleet::v1alpha1::Condition;
use std::time::Duration;

/// How one object fares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// One word.
    pub word: Word,
    /// A sentence, empty if there is nothing to say.
    pub message: String,
}

/// How an object fares, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Word {
    /// As desired.
    Current,
    /// On its way.
    InProgress,
    /// Being deleted.
    Terminating,
    /// Needs a person.
    Failed,
}

/// How a release fares, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReleaseWord {
    /// Everything is as the commit says.
    Ready,
    /// On its way.
    Progressing,
    /// Applied, but the site cannot answer.
    Pending,
    /// Something at the site needs a person.
    Failed,
    /// The commit could not be applied; what ran before runs on.
    Stalled,
}

impl ReleaseWord {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Progressing => "Progressing",
            Self::Pending => "Pending",
            Self::Failed => "Failed",
            Self::Stalled => "Stalled",
        }
    }
}

/// How a site's nodes fare, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SiteWord {
    /// At least one node is ready.
    Connected,
    /// Silent, inside the offline budget.
    Disconnected,
    /// Silent, past the budget.
    Overdue,
    /// No node has joined yet.
    Unknown,
}

impl SiteWord {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connected => "Connected",
            Self::Disconnected => "Disconnected",
            Self::Overdue => "Overdue",
            Self::Unknown => "Unknown",
        }
    }

    /// Whether the site can tell how its workloads fare.
    pub fn can_answer(self) -> bool {
        self == Self::Connected
    }
}

/// What is known of one node that a site names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeState {
    /// Ready.
    Ready,
    /// Joined, and not ready for this long.
    Silent(Duration),
    /// Has not joined.
    Absent,
}

/// Judges a site by its nodes.
pub fn site(nodes: &[NodeState], budget: Duration) -> (SiteWord, String) {
    let total = nodes.len();
    let ready = nodes.iter().filter(|node| **node == NodeState::Ready).count();
    let silent = nodes.iter().filter_map(|node| match node {
        NodeState::Silent(silent) => Some(*silent),
        _ => None,
    });
    if ready > 0 {
        return (SiteWord::Connected, format!("{ready} of {total} nodes ready"));
    }
    match silent.min() {
        None if total == 0 => (SiteWord::Unknown, "the site names no nodes".to_owned()),
        None => (SiteWord::Unknown, format!("none of {total} nodes has joined yet")),
        // No age in here: the message is stored, and would have to be stored again each minute.
        Some(silent) if silent <= budget => {
            (SiteWord::Disconnected, format!("none of {total} nodes ready"))
        }
        Some(_) => (
            SiteWord::Overdue,
            format!("none of {total} nodes ready for longer than {}", age(budget)),
        ),
    }
}

/// A length of time in its largest unit: `45s`, `12m`, `7h`, `3d`.
pub fn age(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// What a release's live objects say together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseHealth {
    /// One word; never [`ReleaseWord::Stalled`], which only the executor knows.
    pub word: ReleaseWord,
    /// A sentence.
    pub message: String,
    /// Pods that are ready.
    pub pods_ready: i64,
    /// Pods that should be.
    pub pods_total: i64,
}

/// Judges a release.
///
/// `objects` are its live objects with the name each is known by, `None` for one that is missing; `pods` are its live
/// pods, for reasons that only they know.
pub fn release<'a>(
    objects: impl IntoIterator<Item = (String, Option<&'a Value>)>,
    pods: impl IntoIterator<Item = &'a Value>,
    (site, site_message): (SiteWord, &str),
) -> ReleaseHealth {
    let (mut pods_ready, mut pods_total) = (0, 0);
    let mut worst = Health { word: Word::Current, message: String::new() };
    for (name, live) in objects {
        let Some(live) = live else {
            if worst.word < Word::InProgress {
                worst =
                    Health { word: Word::InProgress, message: format!("{name} is not there yet") };
            }
            continue;
        };
        let (ready, total) = replicas(live);
        pods_ready += ready;
        pods_total += total;
        let health = object(live);
        if health.word > worst.word {
            worst = Health { message: format!("{name}: {}", health.message), ..health };
        }
    }
    if !site.can_answer() {
        let message = format!("site is {}: {site_message}", site.as_str());
        return ReleaseHealth { word: ReleaseWord::Pending, message, pods_ready: 0, pods_total };
    }
    let word = match worst.word {
        Word::Current => ReleaseWord::Ready,
        Word::InProgress | Word::Terminating => ReleaseWord::Progressing,
        Word::Failed => ReleaseWord::Failed,
    };
    let mut message = worst.message;
    if word != ReleaseWord::Ready
        && let Some(trouble) = pods.into_iter().find_map(pod_trouble)
    {
        message = format!("{message}; {trouble}");
    }
    if word == ReleaseWord::Ready {
        message = match pods_total {
            0 => "as in the commit".to_owned(),
            _ => format!("{pods_ready} of {pods_total} pods ready"),
        };
    }
    ReleaseHealth { word, message, pods_ready, pods_total }
}

/// Judges one object by its kind; kinds without a rule by the conditions `Ready`, `Reconciling` and `Stalled`, and as
/// current if they have none.
pub fn object(live: &Value) -> Health {
    let health = |word, message: String| Health { word, message };
    if !live["metadata"]["deletionTimestamp"].is_null() {
        return health(Word::Terminating, "being deleted".to_owned());
    }
    let generation = live["metadata"]["generation"].as_i64();
    let observed = live["status"]["observedGeneration"].as_i64();
    let kind = live["kind"].as_str().unwrap_or_default();
    let workload = matches!(kind, "Deployment" | "DaemonSet" | "StatefulSet" | "ReplicaSet");
    if (workload || observed.is_some()) && observed.unwrap_or(0) < generation.unwrap_or(0) {
        return health(Word::InProgress, "the change has not been taken up yet".to_owned());
    }
    let status = |field: &str| live["status"][field].as_i64().unwrap_or(0);
    let wanted = live["spec"]["replicas"].as_i64().unwrap_or(1);
    let counts = |pairs: &[(&str, i64, i64)]| {
        let short = pairs.iter().find(|(_, have, want)| have < want);
        short.map(|(what, have, want)| health(Word::InProgress, format!("{have} of {want} {what}")))
    };
    let found = match kind {
        "Deployment" => {
            if let Some(progressing) = condition(live, "Progressing")
                && progressing["reason"] == "ProgressDeadlineExceeded"
            {
                return health(
                    Word::Failed,
                    text(&progressing["message"], "progress deadline exceeded"),
                );
            }
            let old = status("replicas") - status("updatedReplicas");
            counts(&[("updated", status("updatedReplicas"), wanted)])
                .or_else(|| {
                    (old > 0).then(|| {
                        health(Word::InProgress, format!("{old} old pods are still there"))
                    })
                })
                .or_else(|| counts(&[("available", status("availableReplicas"), wanted)]))
        }
        "ReplicaSet" => counts(&[("available", status("availableReplicas"), wanted)]),
        "StatefulSet" => counts(&[
            ("updated", status("updatedReplicas"), wanted),
            ("ready", status("readyReplicas"), wanted),
        ]),
        "DaemonSet" => {
            let wanted = status("desiredNumberScheduled");
            counts(&[
                ("updated", status("updatedNumberScheduled"), wanted),
                ("available", status("numberAvailable"), wanted),
            ])
        }
        "Job" => {
            if let Some(failed) =
                condition(live, "Failed").filter(|failed| failed["status"] == "True")
            {
                return health(Word::Failed, text(&failed["message"], "the job failed"));
            }
            let complete =
                condition(live, "Complete").is_some_and(|complete| complete["status"] == "True");
            (!complete)
                .then(|| health(Word::InProgress, "the job has not completed yet".to_owned()))
        }
        "Pod" => match live["status"]["phase"].as_str() {
            Some("Succeeded") => None,
            Some("Failed") => {
                Some(health(Word::Failed, text(&live["status"]["message"], "the pod failed")))
            }
            Some("Running") if is_true(live, "Ready") => None,
            phase => Some(health(
                Word::InProgress,
                format!("pod is {}", phase.unwrap_or("Pending").to_lowercase()),
            )),
        },
        "PersistentVolumeClaim" if live["status"]["phase"] != "Bound" => {
            Some(health(Word::InProgress, "not bound yet".to_owned()))
        }
        _ => by_conditions(live),
    };
    found.unwrap_or_else(|| health(Word::Current, String::new()))
}

fn by_conditions(live: &Value) -> Option<Health> {
    let found = |kind: &str, status: &str| {
        condition(live, kind).filter(|condition| condition["status"] == status)
    };
    if let Some(stalled) = found("Stalled", "True") {
        return Some(Health { word: Word::Failed, message: text(&stalled["message"], "stalled") });
    }
    let waiting = found("Reconciling", "True").or_else(|| found("Ready", "False"))?;
    Some(Health { word: Word::InProgress, message: text(&waiting["message"], "not ready yet") })
}

/// Ready and wanted pods of a workload; jobs come and go and are not counted.
fn replicas(live: &Value) -> (i64, i64) {
    let status = |field: &str| live["status"][field].as_i64().unwrap_or(0);
    match live["kind"].as_str().unwrap_or_default() {
        "Deployment" | "StatefulSet" | "ReplicaSet" => {
            (status("readyReplicas"), live["spec"]["replicas"].as_i64().unwrap_or(1))
        }
        "DaemonSet" => (status("numberReady"), status("desiredNumberScheduled")),
        "Pod" => (i64::from(is_true(live, "Ready")), 1),
        _ => (0, 0),
    }
}

/// Why a pod does not run, in the words of its container's state.
fn pod_trouble(pod: &Value) -> Option<String> {
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let statuses = ["initContainerStatuses", "containerStatuses"]
        .into_iter()
        .flat_map(|field| pod["status"][field].as_array().into_iter().flatten());
    for status in statuses {
        let waiting = &status["state"]["waiting"];
        let reason = waiting["reason"].as_str().unwrap_or_default();
        if !matches!(reason, "" | "ContainerCreating" | "PodInitializing") {
            let message = waiting["message"].as_str().unwrap_or_default();
            let message = message.lines().next().unwrap_or_default();
            return Some(format!(
                "pod {name}: {reason}{}{message}",
                if message.is_empty() { "" } else { ": " }
            ));
        }
    }
    let scheduled = condition(pod, "PodScheduled")?;
    (scheduled["status"] == "False")
        .then(|| format!("pod {name}: {}", text(&scheduled["message"], "not scheduled")))
}

fn condition<'a>(live: &'a Value, kind: &str) -> Option<&'a Value> {
    live["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == kind)
}

fn is_true(live: &Value, kind: &str) -> bool {
    condition(live, kind).is_some_and(|condition| condition["status"] == "True")
}

fn text(value: &Value, otherwise: &str) -> String {
    value.as_str().filter(|text| !text.is_empty()).unwrap_or(otherwise).to_owned()
}

/// The three conditions of a release, with the transition times of `before` where the status stayed.
pub fn conditions(
    word: ReleaseWord,
    reason: &str,
    message: &str,
    before: &[Condition],
    now: &str,
) -> Vec<Condition> {
    let status = |yes: bool| if yes { "True" } else { "False" };
    let ready = status(word == ReleaseWord::Ready);
    let reconciling = status(matches!(word, ReleaseWord::Progressing | ReleaseWord::Pending));
    let stalled = status(matches!(word, ReleaseWord::Stalled | ReleaseWord::Failed));
    [("Ready", ready), ("Reconciling", reconciling), ("Stalled", stalled)]
        .map(|(kind, status)| condition_from(kind, status, reason, message, before, now))
        .to_vec()
}

/// One condition, with the transition time of `before` if the status stayed.
pub fn condition_from(
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
    before: &[Condition],
    now: &str,
) -> Condition {
    let same = before.iter().find(|old| old.kind == kind && old.status == status);
    Condition {
        kind: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        last_transition_time: same
            .map_or_else(|| now.to_owned(), |old| old.last_transition_time.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CONNECTED: (SiteWord, &str) = (SiteWord::Connected, "");

    fn deployment(replicas: i64, updated: i64, available: i64) -> Value {
        json!({
            "kind": "Deployment",
            "metadata": {"name": "web", "generation": 2},
            "spec": {"replicas": replicas},
            "status": {
                "observedGeneration": 2, "replicas": replicas, "updatedReplicas": updated,
                "availableReplicas": available, "readyReplicas": available,
            },
        })
    }

    fn check(live: Value, word: Word, message: &str) {
        assert_eq!(object(&live), Health { word, message: message.to_owned() }, "{live}");
    }

    #[test]
    fn a_deployment_is_current_when_every_wanted_pod_is_new_and_available() {
        check(deployment(2, 2, 2), Word::Current, "");
        check(deployment(2, 1, 2), Word::InProgress, "1 of 2 updated");
        check(deployment(2, 2, 1), Word::InProgress, "1 of 2 available");
        check(deployment(0, 0, 0), Word::Current, "");
        let mut unseen = deployment(2, 2, 2);
        unseen["metadata"]["generation"] = json!(3);
        check(unseen, Word::InProgress, "the change has not been taken up yet");
        let mut late = deployment(2, 1, 1);
        late["status"]["conditions"] = json!([{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "too slow"}]);
        check(late, Word::Failed, "too slow");
    }

    #[test]
    fn other_kinds_have_their_own_evidence() {
        check(json!({"kind": "ConfigMap", "metadata": {}}), Word::Current, "");
        check(
            json!({"kind": "Job", "metadata": {}}),
            Word::InProgress,
            "the job has not completed yet",
        );
        let done = json!({"conditions": [{"type": "Complete", "status": "True"}]});
        check(json!({"kind": "Job", "metadata": {}, "status": done}), Word::Current, "");
        check(
            json!({"kind": "Pod", "metadata": {}, "status": {"phase": "Pending"}}),
            Word::InProgress,
            "pod is pending",
        );
        check(
            json!({"kind": "Pod", "metadata": {}, "status": {"phase": "Failed"}}),
            Word::Failed,
            "the pod failed",
        );
        let ready =
            json!({"conditions": [{"type": "Ready", "status": "False", "message": "wait"}]});
        check(json!({"kind": "Widget", "metadata": {}, "status": ready}), Word::InProgress, "wait");
        let set =
            json!({"desiredNumberScheduled": 2, "updatedNumberScheduled": 2, "numberAvailable": 1});
        check(
            json!({"kind": "DaemonSet", "metadata": {}, "status": set}),
            Word::InProgress,
            "1 of 2 available",
        );
        check(
            json!({"kind": "X", "metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}),
            Word::Terminating,
            "being deleted",
        );
    }

    #[test]
    fn a_site_that_cannot_answer_is_pending_and_never_failed() {
        let mut late = deployment(2, 1, 1);
        late["status"]["conditions"] = json!([{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}]);
        let objects = || [("Deployment web".to_owned(), Some(&late))];
        assert_eq!(release(objects(), [], CONNECTED).word, ReleaseWord::Failed);
        for word in [SiteWord::Disconnected, SiteWord::Overdue, SiteWord::Unknown] {
            let health = release(objects(), [], (word, "silent for 3h"));
            assert_eq!(health.word, ReleaseWord::Pending);
            assert_eq!(health.message, format!("site is {}: silent for 3h", word.as_str()));
        }
    }

    #[test]
    fn a_release_tells_the_worst_object_and_the_reason_that_its_pod_gives() {
        let bad = deployment(1, 1, 0);
        let pod = json!({
            "metadata": {"name": "web-1"},
            "status": {"containerStatuses": [{"state": {"waiting": {"reason": "ErrImageNeverPull", "message": "no such image"}}}]},
        });
        let objects =
            [("ConfigMap page".to_owned(), None), ("Deployment web".to_owned(), Some(&bad))];
        let health = release(objects, [&pod], CONNECTED);
        assert_eq!(health.word, ReleaseWord::Progressing);
        assert_eq!(
            health.message,
            "ConfigMap page is not there yet; pod web-1: ErrImageNeverPull: no such image"
        );
        assert_eq!((health.pods_ready, health.pods_total), (0, 1));

        let good = deployment(2, 2, 2);
        let health = release([("Deployment web".to_owned(), Some(&good))], [], CONNECTED);
        assert_eq!(
            (health.word, health.message.as_str()),
            (ReleaseWord::Ready, "2 of 2 pods ready")
        );
    }

    #[test]
    fn a_site_is_judged_by_its_nodes_and_its_budget() {
        let hour = Duration::from_secs(3_600);
        let check = |nodes: &[NodeState], word: SiteWord, message: &str| {
            assert_eq!(site(nodes, 72 * hour), (word, message.to_owned()));
        };
        check(&[], SiteWord::Unknown, "the site names no nodes");
        check(&[NodeState::Absent], SiteWord::Unknown, "none of 1 nodes has joined yet");
        check(&[NodeState::Ready, NodeState::Absent], SiteWord::Connected, "1 of 2 nodes ready");
        check(
            &[NodeState::Silent(hour), NodeState::Absent],
            SiteWord::Disconnected,
            "none of 2 nodes ready",
        );
        check(
            &[NodeState::Silent(73 * hour)],
            SiteWord::Overdue,
            "none of 1 nodes ready for longer than 3d",
        );
    }

    #[test]
    fn a_condition_keeps_its_time_until_its_status_changes() {
        let first = conditions(ReleaseWord::Progressing, "Applied", "a", &[], "t1");
        let second = conditions(ReleaseWord::Ready, "Applied", "b", &first, "t2");
        let third = conditions(ReleaseWord::Ready, "Applied", "c", &second, "t3");
        let times: Vec<_> =
            third.iter().map(|condition| condition.last_transition_time.as_str()).collect();
        assert_eq!(times, ["t2", "t2", "t1"]);
        assert_eq!(third[0].status, "True");
    }
}
