//! How a Job runs pods to completion, exactly counted.
//!
//! Every pod carries the finalizer [`FINALIZER`]. An ended pod is first written into `status.uncountedTerminatedPods`,
//! then loses its finalizer, and only then moves into the counts: whatever write is lost, no pod counts twice or never.
//!
//! Source: the documented behaviour of Jobs (tracking with finalizers, conditions SuccessCriteriaMet and FailureTarget
//! before Complete and Failed, back-off of 10 s doubling to 10 min). Not done, and said by an event: `podFailurePolicy`,
//! `successPolicy`, `backoffLimitPerIndex`.

use super::cron_job::Note;
use super::object::{
    annotation, condition, created, earliest, flag, has_condition, is_active, is_deleting,
    is_ready, is_terminal, later, list, name, number, phase, pod_from_template, restarts,
    set_condition, stamp, text, time, uid,
};
use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Keeps an ended pod until it is counted.
pub const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
/// Annotation and label with the index of a pod of an Indexed Job.
pub const INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// Pods made or deleted in one go.
pub const BURST_MAX: usize = 500;
/// Uncounted pods in one status.
const UNCOUNTED_MAX: usize = 500;
/// First pause after a failed pod; it doubles with each further one.
const BACKOFF_SECONDS: i64 = 10;
/// Longest pause after a failed pod.
const BACKOFF_MAX_SECONDS: i64 = 600;

/// What to do for one Job, in this order: status, finalizers, deletions, creations.
#[derive(Debug, Default)]
pub struct Plan<'a> {
    /// The status.
    pub status: Value,
    /// Pods that lose their finalizer once the status is written.
    pub release: Vec<&'a Value>,
    /// Pods to delete; they lose their finalizer first, and so count for nothing.
    pub delete: Vec<&'a Value>,
    /// Pods to create.
    pub create: Vec<Value>,
    /// Whether the Job itself has outlived its `ttlSecondsAfterFinished`.
    pub expired: bool,
    /// Events.
    pub notes: Vec<Note>,
    /// When time alone changes something: deadline, back-off, expiry.
    pub again_at: Option<Timestamp>,
}

/// Whether the Job has ended.
pub fn is_finished(job: &Value) -> bool {
    has_condition(job, "Complete") || has_condition(job, "Failed")
}

/// Whether a pod still holds the Job's finalizer.
pub fn is_tracked(pod: &Value) -> bool {
    list(pod, "/metadata/finalizers").iter().any(|finalizer| finalizer == FINALIZER)
}

/// Returns what `job` needs now; `pods` are those that it controls.
pub fn plan<'a>(job: &Value, pods: &'a [Value], now: Timestamp) -> Plan<'a> {
    let mut plan = Plan::default();
    let mut tally = Tally::new(job);
    tally.settle(pods);
    if is_finished(job) {
        finished(job, pods, tally, now, &mut plan);
        return plan;
    }
    tally.collect(job, pods);
    let active: Vec<&'a Value> = pods.iter().filter(|pod| is_active(pod)).collect();
    let terminating = pods.iter().filter(|pod| is_deleting(pod) && !is_terminal(pod)).count();

    let mut status = job.get("status").filter(|s| s.is_object()).cloned().unwrap_or(json!({}));
    let mut conditions = list(job, "/status/conditions").to_vec();
    let suspended = flag(job, "/spec/suspend");
    if !suspended && status.get("startTime").is_none() {
        status["startTime"] = json!(stamp(now));
        plan.notes.extend(unsupported(job));
    }

    let verdict = verdict(job, &conditions, &tally, &active, &status, now, &mut plan.again_at);
    let mut remaining = active.clone();
    match verdict {
        Verdict::Go if suspended => {
            plan.delete = std::mem::take(&mut remaining);
            let message = "Job suspended";
            if set_condition(&mut conditions, "Suspended", "True", "JobSuspended", message, now) {
                plan.notes.push(note(false, "Suspended", message.to_owned()));
            }
            if let Some(map) = status.as_object_mut() {
                map.remove("startTime");
            }
        }
        Verdict::Go => {
            if conditions
                .iter()
                .any(|c| text(c, "/type") == "Suspended" && text(c, "/status") == "True")
            {
                let message = "Job resumed";
                set_condition(&mut conditions, "Suspended", "False", "JobResumed", message, now);
                plan.notes.push(note(false, "Resumed", message.to_owned()));
                status["startTime"] = json!(stamp(now));
            }
            if !is_deleting(job) {
                balance(job, pods, &active, terminating, &tally, now, &mut plan);
                remaining.retain(|pod| !plan.delete.iter().any(|gone| uid(gone) == uid(pod)));
            }
        }
        Verdict::Done | Verdict::Failed { .. } => {
            plan.delete = std::mem::take(&mut remaining);
            let quiet = tally.uncounted() == 0 && active.is_empty() && terminating == 0;
            conclude(&verdict, quiet, &mut conditions, &mut status, &mut plan.notes, now);
        }
    }
    plan.delete.truncate(BURST_MAX);
    plan.create.truncate(BURST_MAX);
    plan.release = tally.releasable(pods);

    let ready = remaining.iter().filter(|pod| is_ready(pod)).count();
    tally.write(&mut status);
    status["active"] = json!(remaining.len());
    status["ready"] = json!(ready);
    status["terminating"] = json!(terminating);
    status["conditions"] = json!(conditions);
    tidy(&mut status);
    plan.status = status;
    plan
}

enum Verdict {
    Go,
    Done,
    Failed { reason: &'static str, message: &'static str },
}

/// Whether the Job goes on.
fn verdict(
    job: &Value,
    conditions: &[Value],
    tally: &Tally,
    active: &[&Value],
    status: &Value,
    now: Timestamp,
    again_at: &mut Option<Timestamp>,
) -> Verdict {
    const BACKOFF: Verdict = Verdict::Failed {
        reason: "BackoffLimitExceeded",
        message: "Job has reached the specified backoff limit",
    };
    const DEADLINE: Verdict = Verdict::Failed {
        reason: "DeadlineExceeded",
        message: "Job was active longer than specified deadline",
    };
    // A verdict once given stands until its pods are gone.
    let given = |kind: &str| conditions.iter().find(|c| text(c, "/type") == kind);
    if let Some(target) = given("FailureTarget") {
        return if text(target, "/reason") == "DeadlineExceeded" { DEADLINE } else { BACKOFF };
    }
    if given("SuccessCriteriaMet").is_some() {
        return Verdict::Done;
    }
    let limit = number(job, "/spec/backoffLimit").unwrap_or(6);
    if tally.failed() > limit {
        return BACKOFF;
    }
    if text(job, "/spec/template/spec/restartPolicy") == "OnFailure" {
        let restarts: i64 = active.iter().map(|pod| restarts(pod)).sum();
        if restarts > 0 && restarts >= limit {
            return BACKOFF;
        }
    }
    if let Some(seconds) = number(job, "/spec/activeDeadlineSeconds")
        && let Some(start) = time(status, "/startTime")
        && !flag(job, "/spec/suspend")
    {
        let due = later(start, seconds);
        if due <= now {
            return DEADLINE;
        }
        *again_at = earliest(*again_at, Some(due));
    }
    let done = match number(job, "/spec/completions") {
        Some(completions) => tally.succeeded() >= completions,
        None => tally.succeeded() > 0 && active.is_empty(),
    };
    if done { Verdict::Done } else { Verdict::Go }
}

/// Writes the verdict: the target condition at once, the final one when all pods are gone and counted.
fn conclude(
    verdict: &Verdict,
    quiet: bool,
    conditions: &mut Vec<Value>,
    status: &mut Value,
    notes: &mut Vec<Note>,
    now: Timestamp,
) {
    let (target, last, reason, message) = match verdict {
        Verdict::Failed { reason, message } => ("FailureTarget", "Failed", *reason, *message),
        _ => {
            let message = "Reached expected number of succeeded pods";
            ("SuccessCriteriaMet", "Complete", "CompletionsReached", message)
        }
    };
    set_condition(conditions, target, "True", reason, message, now);
    if !quiet {
        return;
    }
    set_condition(conditions, last, "True", reason, message, now);
    if last == "Complete" {
        status["completionTime"] = json!(stamp(now));
        notes.push(note(false, "Completed", "Job completed".to_owned()));
    } else {
        notes.push(note(true, reason, message.to_owned()));
    }
    // The Jobs' API has both times on every condition.
    for condition in conditions.iter_mut() {
        condition["lastProbeTime"] = condition["lastTransitionTime"].clone();
    }
}

/// Makes or deletes pods until as many are active as there should be.
fn balance<'a>(
    job: &Value,
    pods: &'a [Value],
    active: &[&'a Value],
    terminating: usize,
    tally: &Tally,
    now: Timestamp,
    plan: &mut Plan<'a>,
) {
    let parallelism = number(job, "/spec/parallelism").unwrap_or(1).max(0);
    let have = i64::try_from(active.len()).unwrap_or(i64::MAX);
    let wanted = match number(job, "/spec/completions") {
        Some(completions) => parallelism.min(completions - tally.succeeded()).max(0),
        // A work queue: after the first success no pod is added.
        None if tally.succeeded() > 0 => have.min(parallelism),
        None => parallelism,
    };
    if have > wanted {
        let mut surplus: Vec<&'a Value> = active.to_vec();
        surplus.sort_by_cached_key(|pod| {
            (
                is_ready(pod),
                phase(pod) == "Running",
                -created(pod).as_second(),
                name(pod).to_owned(),
            )
        });
        surplus.truncate(usize::try_from(have - wanted).unwrap_or(0));
        plan.delete = surplus;
        return;
    }
    let held = if text(job, "/spec/podReplacementPolicy") == "Failed" { terminating } else { 0 };
    let room = usize::try_from(wanted - have).unwrap_or(0).saturating_sub(held);
    if room == 0 {
        return;
    }
    if let Some(due) = backoff(pods, now).filter(|due| *due > now) {
        plan.again_at = earliest(plan.again_at, Some(due));
        return;
    }
    let indexed = text(job, "/spec/completionMode") == "Indexed";
    if indexed {
        let taken: BTreeSet<i64> = active.iter().filter_map(|pod| index(pod)).collect();
        let all = 0..number(job, "/spec/completions").unwrap_or(0);
        plan.create = all
            .filter(|index| !taken.contains(index) && !tally.indexes.contains(index))
            .take(room.min(BURST_MAX))
            .map(|index| new_pod(job, Some(index)))
            .collect();
    } else {
        plan.create = (0..room.min(BURST_MAX)).map(|_| new_pod(job, None)).collect();
    }
}

/// When the next pod may be made after failures without a success in between.
fn backoff(pods: &[Value], now: Timestamp) -> Option<Timestamp> {
    let finish = |pod: &Value| {
        list(pod, "/status/containerStatuses")
            .iter()
            .filter_map(|status| time(status, "/state/terminated/finishedAt"))
            .max()
            .or_else(|| time(pod, "/metadata/deletionTimestamp"))
            .unwrap_or_else(|| created(pod))
            .min(now)
    };
    let success = pods.iter().filter(|pod| phase(pod) == "Succeeded").map(finish).max();
    let failures: Vec<Timestamp> = pods
        .iter()
        .filter(|pod| phase(pod) == "Failed")
        .map(finish)
        .filter(|at| success.is_none_or(|success| *at > success))
        .collect();
    let last = *failures.iter().max()?;
    let doublings = u32::try_from(failures.len() - 1).unwrap_or(u32::MAX).min(10);
    Some(later(last, (BACKOFF_SECONDS << doublings).min(BACKOFF_MAX_SECONDS)))
}

fn index(pod: &Value) -> Option<i64> {
    annotation(pod, INDEX)?.parse().ok()
}

fn new_pod(job: &Value, index: Option<i64>) -> Value {
    let template = job.pointer("/spec/template").cloned().unwrap_or_default();
    let mut pod = pod_from_template(job, "batch/v1", "Job", &template);
    let mut finalizers = list(&pod, "/metadata/finalizers").to_vec();
    finalizers.push(json!(FINALIZER));
    pod["metadata"]["finalizers"] = json!(finalizers);
    // The API puts these on the template; a manual selector leaves them out there.
    for prefix in ["", "batch.kubernetes.io/"] {
        pod["metadata"]["labels"][format!("{prefix}controller-uid")] = json!(uid(job));
        pod["metadata"]["labels"][format!("{prefix}job-name")] = json!(name(job));
    }
    if let Some(index) = index {
        let index = index.to_string();
        pod["metadata"]["generateName"] = json!(format!("{}-{index}-", name(job)));
        pod["metadata"]["annotations"][INDEX] = json!(index);
        pod["metadata"]["labels"][INDEX] = json!(index);
        pod["spec"]["hostname"] = json!(format!("{}-{index}", name(job)));
        for kind in ["containers", "initContainers"] {
            for container in
                pod["spec"].get_mut(kind).and_then(Value::as_array_mut).into_iter().flatten()
            {
                let mut env = list(container, "/env").to_vec();
                if !env.iter().any(|var| text(var, "/name") == "JOB_COMPLETION_INDEX") {
                    env.push(json!({"name": "JOB_COMPLETION_INDEX", "value": index}));
                    container["env"] = json!(env);
                }
            }
        }
    }
    pod
}

/// A Job that has ended: lets go of its pods, finishes the counts, and expires.
fn finished<'a>(job: &Value, pods: &'a [Value], tally: Tally, now: Timestamp, plan: &mut Plan<'a>) {
    let mut status = job.get("status").cloned().unwrap_or_default();
    tally.write(&mut status);
    tidy(&mut status);
    plan.status = status;
    plan.release = pods.iter().filter(|pod| is_tracked(pod)).collect();
    plan.delete = pods.iter().filter(|pod| is_active(pod)).take(BURST_MAX).collect();
    let Some(ttl) = number(job, "/spec/ttlSecondsAfterFinished") else { return };
    let ended = ["Complete", "Failed"]
        .iter()
        .filter_map(|kind| condition(job, kind))
        .find_map(|condition| time(condition, "/lastTransitionTime"));
    if let Some(ended) = ended {
        let due = later(ended, ttl.max(0));
        plan.expired = due <= now && !is_deleting(job);
        if due > now {
            plan.again_at = Some(due);
        }
    }
}

/// The counts of one Job.
#[derive(Debug, Default)]
struct Tally {
    succeeded: i64,
    failed: i64,
    waiting_succeeded: Vec<String>,
    waiting_failed: Vec<String>,
    indexes: BTreeSet<i64>,
    indexed: bool,
}

impl Tally {
    fn new(job: &Value) -> Self {
        let waiting = |kind: &str| {
            list(job, &format!("/status/uncountedTerminatedPods/{kind}"))
                .iter()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect()
        };
        Self {
            succeeded: number(job, "/status/succeeded").unwrap_or(0),
            failed: number(job, "/status/failed").unwrap_or(0),
            waiting_succeeded: waiting("succeeded"),
            waiting_failed: waiting("failed"),
            indexes: parse_indexes(text(job, "/status/completedIndexes")),
            indexed: text(job, "/spec/completionMode") == "Indexed",
        }
    }

    /// Counts the waiting pods that no longer hold the finalizer.
    fn settle(&mut self, pods: &[Value]) {
        let held = |waiting: &String| pods.iter().any(|pod| uid(pod) == waiting && is_tracked(pod));
        let before = (self.waiting_succeeded.len(), self.waiting_failed.len());
        self.waiting_succeeded.retain(held);
        self.waiting_failed.retain(held);
        let moved = |before: usize, after: usize| i64::try_from(before - after).unwrap_or(0);
        self.succeeded += moved(before.0, self.waiting_succeeded.len());
        self.failed += moved(before.1, self.waiting_failed.len());
    }

    /// Takes in pods that have ended since.
    fn collect(&mut self, job: &Value, pods: &[Value]) {
        let wait_for_end = text(job, "/spec/podReplacementPolicy") == "Failed";
        for pod in pods.iter().filter(|pod| is_tracked(pod)) {
            let id = uid(pod).to_owned();
            if self.uncounted() >= UNCOUNTED_MAX
                || self.waiting_succeeded.contains(&id)
                || self.waiting_failed.contains(&id)
            {
                continue;
            }
            match phase(pod) {
                "Succeeded" => {
                    if let Some(index) = index(pod).filter(|_| self.indexed) {
                        self.indexes.insert(index);
                    }
                    self.waiting_succeeded.push(id);
                }
                "Failed" => self.waiting_failed.push(id),
                // A pod deleted by someone else may never reach an end, so it counts as failed.
                _ if is_deleting(pod) && !wait_for_end => self.waiting_failed.push(id),
                _ => {}
            }
        }
    }

    fn releasable<'a>(&self, pods: &'a [Value]) -> Vec<&'a Value> {
        let waits = |id: &str| {
            self.waiting_succeeded.iter().chain(&self.waiting_failed).any(|waiting| waiting == id)
        };
        pods.iter().filter(|pod| is_tracked(pod) && waits(uid(pod))).collect()
    }

    fn uncounted(&self) -> usize {
        self.waiting_succeeded.len() + self.waiting_failed.len()
    }

    fn succeeded(&self) -> i64 {
        if self.indexed {
            return i64::try_from(self.indexes.len()).unwrap_or(i64::MAX);
        }
        self.succeeded + i64::try_from(self.waiting_succeeded.len()).unwrap_or(0)
    }

    fn failed(&self) -> i64 {
        self.failed + i64::try_from(self.waiting_failed.len()).unwrap_or(0)
    }

    fn write(&self, status: &mut Value) {
        let succeeded = if self.indexed { self.succeeded() } else { self.succeeded };
        status["succeeded"] = json!(succeeded);
        status["failed"] = json!(self.failed);
        let mut uncounted = json!({});
        if !self.waiting_succeeded.is_empty() {
            uncounted["succeeded"] = json!(self.waiting_succeeded);
        }
        if !self.waiting_failed.is_empty() {
            uncounted["failed"] = json!(self.waiting_failed);
        }
        status["uncountedTerminatedPods"] = uncounted;
        if self.indexed {
            status["completedIndexes"] = json!(write_indexes(&self.indexes));
        }
    }
}

/// Leaves out zero counts, as the API would.
fn tidy(status: &mut Value) {
    let Some(map) = status.as_object_mut() else { return };
    for field in ["active", "succeeded", "failed"] {
        if map.get(field).and_then(Value::as_i64) == Some(0) {
            map.remove(field);
        }
    }
    for field in ["conditions", "completedIndexes"] {
        let empty = |v: &Value| v.as_array().is_some_and(Vec::is_empty) || v == "";
        if map.get(field).is_some_and(empty) {
            map.remove(field);
        }
    }
}

/// Reads `1,3-5`; malformed parts are left out.
fn parse_indexes(text: &str) -> BTreeSet<i64> {
    let mut set = BTreeSet::new();
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(from), Ok(to)) = (from.parse::<i64>(), to.parse::<i64>()) {
            // The API allows 100 000 indexes.
            set.extend(from..=to.min(from.saturating_add(100_000)));
        }
    }
    set
}

fn write_indexes(set: &BTreeSet<i64>) -> String {
    let mut parts: Vec<(i64, i64)> = Vec::new();
    for index in set {
        match parts.last_mut() {
            Some((_, to)) if *to + 1 == *index => *to = *index,
            _ => parts.push((*index, *index)),
        }
    }
    let written: Vec<String> = parts
        .iter()
        .map(|(from, to)| match to - from {
            0 => from.to_string(),
            1 => format!("{from},{to}"),
            _ => format!("{from}-{to}"),
        })
        .collect();
    written.join(",")
}

/// Fields that this controller does not act on.
fn unsupported(job: &Value) -> Option<Note> {
    let fields: Vec<&str> = ["podFailurePolicy", "successPolicy", "backoffLimitPerIndex"]
        .into_iter()
        .filter(|field| job.pointer(&format!("/spec/{field}")).is_some_and(|v| !v.is_null()))
        .collect();
    (!fields.is_empty()).then(|| {
        let message = format!("this server does not act on `{}`", fields.join("`, `"));
        note(true, "UnsupportedField", message)
    })
}

fn note(warning: bool, reason: &'static str, message: String) -> Note {
    Note { warning, reason, message }
}

#[cfg(test)]
mod tests;
