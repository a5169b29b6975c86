//! When a CronJob starts its next Job, which old ones go, and its status.
//!
//! The name of a Job is made from its scheduled minute, so that one time can never start two. Schedules are read in
//! UTC; another `timeZone` is refused with an event, and nothing is started.

use super::cron::Schedule;
use super::object::{
    created, flag, has_condition, is_deleting, name, namespace, number, owner_reference, stamp,
    text, time, uid,
};
use jiff::Timestamp;
use serde_json::{Value, json};

/// Annotation of a Job with the time it was meant for.
pub const SCHEDULED_AT: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";
/// Missed starts above which a warning is due.
const MISSED_MAX: usize = 100;

/// An event to record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Whether the type is `Warning`.
    pub warning: bool,
    /// Reason, such as `SawCompletedJob`.
    pub reason: &'static str,
    /// For a person.
    pub message: String,
}

/// What to do for one CronJob.
#[derive(Debug, Default)]
pub struct Plan<'a> {
    /// Jobs to delete: replaced, or past a history limit.
    pub delete: Vec<&'a Value>,
    /// The Job to create.
    pub create: Option<Value>,
    /// The status.
    pub status: Value,
    /// Events.
    pub notes: Vec<Note>,
    /// When the next start is due.
    pub again_at: Option<Timestamp>,
}

/// Returns what `cron_job` needs now; `jobs` are those that it controls.
pub fn plan<'a>(cron_job: &Value, jobs: &'a [Value], now: Timestamp) -> Plan<'a> {
    let mut plan = Plan::default();
    let mut status = cron_job.get("status").filter(|s| s.is_object()).cloned().unwrap_or(json!({}));
    let was_active: Vec<&str> = super::object::list(cron_job, "/status/active")
        .iter()
        .map(|reference| text(reference, "/uid"))
        .collect();
    let mut active: Vec<&Value> = jobs.iter().filter(|job| !is_finished(job)).collect();
    for job in jobs.iter().filter(|job| is_finished(job) && was_active.contains(&uid(job))) {
        let word = if has_condition(job, "Complete") { "Complete" } else { "Failed" };
        plan.notes.push(Note {
            warning: false,
            reason: "SawCompletedJob",
            message: format!("Saw completed job: {}, condition: {word}", name(job)),
        });
    }
    let success = jobs
        .iter()
        .filter(|job| has_condition(job, "Complete"))
        .filter_map(|job| time(job, "/status/completionTime"))
        .chain(time(cron_job, "/status/lastSuccessfulTime"))
        .max();
    if let Some(success) = success {
        status["lastSuccessfulTime"] = json!(stamp(success));
    }
    plan.delete = history(cron_job, jobs);

    if !is_deleting(cron_job) && !flag(cron_job, "/spec/suspend") {
        start(cron_job, jobs, &mut active, &mut status, &mut plan, now);
    }

    let references: Vec<Value> = active.iter().map(|job| reference(job)).collect();
    match status.as_object_mut() {
        Some(map) if references.is_empty() => drop(map.remove("active")),
        _ => status["active"] = json!(references),
    }
    plan.status = status;
    plan
}

/// The reference to a Job in `status.active`.
pub fn reference(job: &Value) -> Value {
    json!({"apiVersion": "batch/v1", "kind": "Job", "name": name(job), "namespace": namespace(job),
        "uid": uid(job)})
}

fn is_finished(job: &Value) -> bool {
    has_condition(job, "Complete") || has_condition(job, "Failed")
}

fn start<'a>(
    cron_job: &Value,
    jobs: &'a [Value],
    active: &mut Vec<&'a Value>,
    status: &mut Value,
    plan: &mut Plan<'a>,
    now: Timestamp,
) {
    let mut warn = |reason, message| plan.notes.push(Note { warning: true, reason, message });
    let zone = text(cron_job, "/spec/timeZone");
    if !matches!(zone, "" | "UTC" | "Etc/UTC" | "Etc/Universal" | "Etc/Zulu" | "GMT" | "Etc/GMT") {
        let message = format!("time zone `{zone}` is not supported by this server, only UTC is");
        return warn("UnknownTimeZone", message);
    }
    let written = text(cron_job, "/spec/schedule");
    let schedule = match Schedule::parse(written) {
        Ok(schedule) => schedule,
        Err(error) => {
            return warn(
                "UnparseableSchedule",
                format!("unparseable schedule `{written}`: {error}"),
            );
        }
    };
    let last = time(cron_job, "/status/lastScheduleTime");
    let mut after = last.unwrap_or_else(|| created(cron_job));
    let deadline = number(cron_job, "/spec/startingDeadlineSeconds");
    if let Some(seconds) = deadline {
        // Times before the deadline can never start any more.
        after = after.max(super::object::later(now, -seconds));
    }
    let next = schedule.next(after.max(now));
    plan.again_at = next.filter(|next| *next > now);
    let Some(due) = schedule.last(after, now) else { return };
    let job_name = format!("{}-{}", name(cron_job), due.as_second().div_euclid(60));
    if jobs.iter().any(|job| name(job) == job_name) || last.is_some_and(|last| due <= last) {
        status["lastScheduleTime"] = json!(stamp(due));
        return;
    }
    if deadline.is_none() {
        let mut missed = 0;
        let mut at = schedule.next(after);
        while missed <= MISSED_MAX && at.is_some_and(|at| at <= now) {
            missed += 1;
            at = at.and_then(|at| schedule.next(at));
        }
        if missed > MISSED_MAX {
            let message = "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew";
            warn("TooManyMissedTimes", message.to_owned());
        }
    }
    match text(cron_job, "/spec/concurrencyPolicy") {
        "Forbid" if !active.is_empty() => {
            plan.notes.push(Note {
                warning: false,
                reason: "JobAlreadyActive",
                message: "Not starting job because prior execution is running and concurrency policy is Forbid"
                    .to_owned(),
            });
            return;
        }
        "Replace" => plan.delete.append(active),
        _ => {}
    }
    plan.create = Some(job(cron_job, &job_name, due));
    status["lastScheduleTime"] = json!(stamp(due));
}

fn job(cron_job: &Value, job_name: &str, due: Timestamp) -> Value {
    let template = |field: &str| {
        cron_job
            .pointer(&format!("/spec/jobTemplate/metadata/{field}"))
            .cloned()
            .filter(Value::is_object)
            .unwrap_or_else(|| json!({}))
    };
    let mut annotations = template("annotations");
    annotations[SCHEDULED_AT] = json!(stamp(due));
    json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {
            "name": job_name, "namespace": namespace(cron_job), "labels": template("labels"),
            "annotations": annotations,
            "ownerReferences": [owner_reference(cron_job, "batch/v1", "CronJob")],
        },
        "spec": cron_job.pointer("/spec/jobTemplate/spec").cloned().unwrap_or_else(|| json!({})),
    })
}

/// Finished Jobs past the history limits, oldest first.
fn history<'a>(cron_job: &Value, jobs: &'a [Value]) -> Vec<&'a Value> {
    let mut gone = Vec::new();
    for (condition, field, default) in
        [("Complete", "successfulJobsHistoryLimit", 3), ("Failed", "failedJobsHistoryLimit", 1)]
    {
        let limit = number(cron_job, &format!("/spec/{field}")).unwrap_or(default).max(0);
        let mut done: Vec<&Value> =
            jobs.iter().filter(|job| has_condition(job, condition) && !is_deleting(job)).collect();
        done.sort_by_cached_key(|job| {
            (time(job, "/status/startTime").unwrap_or_else(|| created(job)), name(job).to_owned())
        });
        let surplus = done.len().saturating_sub(usize::try_from(limit).unwrap_or(usize::MAX));
        gone.extend(&done[..surplus]);
    }
    gone
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cron(spec: Value, status: Value) -> Value {
        let mut cron = json!({"metadata": {"name": "tick", "namespace": "default", "uid": "c",
            "creationTimestamp": "2026-01-01T00:00:30Z"},
            "spec": {"schedule": "*/5 * * * *", "jobTemplate": {"spec": {"template": {}}}}, "status": status});
        for (key, value) in spec.as_object().expect("an object") {
            cron["spec"][key] = value.clone();
        }
        cron
    }

    fn job(name: &str, state: &str, start: &str) -> Value {
        json!({"metadata": {"name": name, "uid": name, "creationTimestamp": start}, "status": {
            "startTime": start, "completionTime": start, "conditions": [{"type": state, "status": "True"}]}})
    }

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    #[test]
    fn a_due_time_starts_one_job_named_after_its_minute() {
        let cron = cron(json!({}), json!({}));
        let early = plan(&cron, &[], at("2026-01-01T00:04:59Z"));
        assert!(early.create.is_none());
        assert_eq!(early.again_at, Some(at("2026-01-01T00:05:00Z")));
        let due = plan(&cron, &[], at("2026-01-01T00:05:01Z"));
        let job = due.create.expect("a job");
        assert_eq!(name(&job), "tick-29453765");
        assert_eq!(due.status["lastScheduleTime"], "2026-01-01T00:05:00Z");
        assert_eq!(due.again_at, Some(at("2026-01-01T00:10:00Z")));
        let jobs = [job];
        let again = plan(&cron, &jobs, at("2026-01-01T00:05:02Z"));
        assert!(again.create.is_none(), "the same time starts no second job");
        let cron = self::cron(json!({}), due.status);
        assert!(plan(&cron, &[], at("2026-01-01T00:06:00Z")).create.is_none());
    }

    #[test]
    fn after_a_long_pause_only_the_last_missed_time_starts() {
        let cron = cron(json!({}), json!({"lastScheduleTime": "2026-01-01T00:00:00Z"}));
        let plan = plan(&cron, &[], at("2026-01-03T00:01:00Z"));
        assert_eq!(plan.status["lastScheduleTime"], "2026-01-03T00:00:00Z");
        assert_eq!(plan.notes[0].reason, "TooManyMissedTimes");
        assert!(plan.create.is_some());
    }

    #[test]
    fn a_start_past_its_deadline_is_skipped() {
        let spec = json!({"startingDeadlineSeconds": 60});
        let cron = cron(spec, json!({}));
        assert!(plan(&cron, &[], at("2026-01-01T00:05:59Z")).create.is_some());
        assert!(plan(&cron, &[], at("2026-01-01T00:06:30Z")).create.is_none());
    }

    #[test]
    fn the_concurrency_policy_decides_about_a_running_job() {
        let running = [job("tick-1", "Suspended", "2026-01-01T00:00:00Z")];
        let now = at("2026-01-01T00:05:00Z");
        let with = |policy: &str| cron(json!({"concurrencyPolicy": policy}), json!({}));
        let allow = plan(&with("Allow"), &running, now).create;
        assert!(allow.is_some());
        let forbid = with("Forbid");
        let forbid = plan(&forbid, &running, now);
        assert!(forbid.create.is_none());
        assert_eq!(forbid.notes[0].reason, "JobAlreadyActive");
        assert_eq!(forbid.status["active"][0]["name"], "tick-1");
        let replace = plan(&with("Replace"), &running, now);
        assert!(replace.create.is_some());
        assert_eq!(replace.delete.iter().map(|job| name(job)).collect::<Vec<_>>(), ["tick-1"]);
    }

    #[test]
    fn a_suspended_or_mistaken_schedule_starts_nothing_and_says_why() {
        let now = at("2026-01-01T00:05:00Z");
        let check = |spec: Value, reason: Option<&str>| {
            let cron = cron(spec, json!({}));
            let plan = plan(&cron, &[], now);
            assert!(plan.create.is_none());
            assert_eq!(plan.notes.first().map(|note| note.reason), reason);
        };
        check(json!({"suspend": true}), None);
        check(json!({"timeZone": "Europe/Lisbon"}), Some("UnknownTimeZone"));
        check(json!({"schedule": "x"}), Some("UnparseableSchedule"));
    }

    #[test]
    fn finished_jobs_past_the_limits_go_oldest_first() {
        let jobs = [
            job("c", "Complete", "2026-01-01T00:03:00Z"),
            job("a", "Complete", "2026-01-01T00:01:00Z"),
            job("b", "Complete", "2026-01-01T00:02:00Z"),
            job("f", "Failed", "2026-01-01T00:02:00Z"),
        ];
        let cron = cron(json!({"successfulJobsHistoryLimit": 1, "suspend": true}), json!({}));
        let plan = plan(&cron, &jobs, at("2026-01-01T00:05:00Z"));
        assert_eq!(plan.delete.iter().map(|job| name(job)).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(plan.status["lastSuccessfulTime"], "2026-01-01T00:03:00Z");
    }
}
