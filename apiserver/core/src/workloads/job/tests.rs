//! Tables, and a simulated cluster in which writes get lost and pods end as the seed says.

use super::*;
use proptest::prelude::*;

fn job(spec: Value) -> Value {
    let mut job = json!({"metadata": {"name": "j", "namespace": "default", "uid": "j",
        "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"parallelism": 1, "completions": 1, "backoffLimit": 6,
            "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c"}]}}}});
    for (key, value) in spec.as_object().expect("an object") {
        job["spec"][key] = value.clone();
    }
    job
}

fn start() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().expect("a time")
}

/// What of a plan gets executed before the controller is killed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cut {
    None,
    AfterStatus,
    AfterRelease,
}

struct Cluster {
    job: Value,
    pods: Vec<Value>,
    serial: u32,
    now: Timestamp,
    deleted_by_plan: usize,
    notes: Vec<Note>,
    expired: bool,
}

impl Cluster {
    fn new(job: Value) -> Self {
        let (pods, notes) = (Vec::new(), Vec::new());
        Self { job, pods, serial: 0, now: start(), deleted_by_plan: 0, notes, expired: false }
    }

    fn step(&mut self, cut: Cut) {
        let pods = self.pods.clone();
        let plan = plan(&self.job, &pods, self.now);
        let active = plan.create.len() + pods.iter().filter(|pod| is_active(pod)).count();
        let parallelism = number(&self.job, "/spec/parallelism").expect("a number");
        assert!(plan.create.is_empty() || active as i64 <= parallelism, "{active} active");
        self.expired = plan.expired;
        self.notes.extend(plan.notes);
        self.job["status"] = plan.status;
        if cut == Cut::AfterStatus {
            return;
        }
        for pod in &plan.release {
            self.untrack(uid(pod));
        }
        if cut == Cut::AfterRelease {
            return;
        }
        for pod in &plan.delete {
            self.untrack(uid(pod));
            self.pods.retain(|other| uid(other) != uid(pod));
            self.deleted_by_plan += 1;
        }
        for mut pod in plan.create {
            self.serial += 1;
            pod["metadata"]["uid"] = json!(format!("u{}", self.serial));
            pod["metadata"]["creationTimestamp"] = json!(stamp(self.now));
            pod["status"] = json!({"phase": "Running"});
            self.pods.push(pod);
        }
    }

    fn untrack(&mut self, id: &str) {
        for pod in self.pods.iter_mut().filter(|pod| uid(pod) == id) {
            pod["metadata"]["finalizers"] = json!([]);
        }
    }

    /// Ends one active pod; returns whether there was one.
    fn end(&mut self, index: usize, phase: &str) -> bool {
        let finished = stamp(self.now);
        let mut active: Vec<&mut Value> =
            self.pods.iter_mut().filter(|pod| is_active(pod)).collect();
        if active.is_empty() {
            return false;
        }
        let index = index % active.len();
        active[index]["status"] = json!({"phase": phase, "containerStatuses":
            [{"state": {"terminated": {"finishedAt": finished}}}]});
        true
    }

    fn settle(&mut self) {
        for _ in 0..6 {
            self.step(Cut::None);
        }
    }

    fn count(&self, field: &str) -> i64 {
        number(&self.job, &format!("/status/{field}")).unwrap_or(0)
    }

    fn reason(&self, kind: &str) -> Option<&str> {
        condition(&self.job, kind).map(|condition| text(condition, "/reason"))
    }
}

#[test]
fn a_job_runs_its_pods_and_completes() {
    let mut cluster = Cluster::new(job(json!({"parallelism": 2, "completions": 3})));
    cluster.settle();
    assert_eq!(cluster.pods.len(), 2);
    assert_eq!(cluster.count("active"), 2);
    assert!(is_tracked(&cluster.pods[0]));
    for _ in 0..3 {
        cluster.end(0, "Succeeded");
        cluster.settle();
    }
    assert_eq!(cluster.count("succeeded"), 3);
    assert_eq!(cluster.count("active"), 0);
    assert_eq!(cluster.reason("Complete"), Some("CompletionsReached"));
    assert_eq!(cluster.reason("SuccessCriteriaMet"), Some("CompletionsReached"));
    assert!(time(&cluster.job, "/status/completionTime").is_some());
    assert!(cluster.pods.iter().all(|pod| !is_tracked(pod)));
    assert_eq!(cluster.notes.last().map(|note| note.reason), Some("Completed"));
}

#[test]
fn too_many_failures_fail_the_job_after_growing_pauses() {
    let mut cluster = Cluster::new(job(json!({"backoffLimit": 2})));
    cluster.settle();
    for pause in [10, 20] {
        cluster.end(0, "Failed");
        cluster.settle();
        cluster.now = later(cluster.now, pause - 1);
        cluster.settle();
        assert_eq!(cluster.count("active"), 0, "still in back-off");
        cluster.now = later(cluster.now, 1);
        cluster.settle();
        assert_eq!(cluster.count("active"), 1);
    }
    cluster.end(0, "Failed");
    cluster.settle();
    assert_eq!(cluster.count("failed"), 3);
    assert_eq!(cluster.reason("Failed"), Some("BackoffLimitExceeded"));
    assert_eq!(cluster.reason("Complete"), None);
}

#[test]
fn a_deadline_ends_the_job_and_its_pods() {
    let mut cluster = Cluster::new(job(json!({"activeDeadlineSeconds": 30})));
    cluster.step(Cut::None);
    cluster.step(Cut::None);
    let again = plan(&cluster.job, &cluster.pods, cluster.now).again_at;
    assert_eq!(again, Some(later(start(), 30)));
    cluster.now = later(start(), 30);
    cluster.settle();
    assert_eq!(cluster.reason("Failed"), Some("DeadlineExceeded"));
    assert!(cluster.pods.is_empty());
}

#[test]
fn suspending_removes_pods_without_counting_them() {
    let mut cluster = Cluster::new(job(json!({"parallelism": 2, "completions": 4})));
    cluster.settle();
    cluster.job["spec"]["suspend"] = json!(true);
    cluster.settle();
    assert!(cluster.pods.is_empty());
    assert_eq!(cluster.count("failed"), 0);
    assert_eq!(cluster.reason("Suspended"), Some("JobSuspended"));
    cluster.job["spec"]["suspend"] = json!(false);
    cluster.settle();
    assert_eq!(cluster.pods.len(), 2);
    assert_eq!(cluster.reason("Suspended"), Some("JobResumed"));
}

#[test]
fn a_finished_job_expires_after_its_time() {
    let mut cluster = Cluster::new(job(json!({"ttlSecondsAfterFinished": 5})));
    cluster.settle();
    cluster.end(0, "Succeeded");
    cluster.settle();
    assert!(!cluster.expired);
    assert_eq!(plan(&cluster.job, &[], cluster.now).again_at, Some(later(start(), 5)));
    cluster.now = later(start(), 5);
    cluster.settle();
    assert!(cluster.expired);
}

#[test]
fn a_deleted_pod_counts_as_failed_and_is_replaced() {
    let mut cluster = Cluster::new(job(json!({})));
    cluster.settle();
    cluster.pods[0]["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    cluster.settle();
    assert_eq!(cluster.count("failed"), 1);
    assert_eq!(cluster.count("active"), 1);
}

#[test]
fn an_indexed_job_runs_each_index_until_it_succeeds() {
    let mut cluster =
        Cluster::new(job(json!({"completionMode": "Indexed", "parallelism": 3, "completions": 5})));
    cluster.settle();
    assert_eq!(cluster.pods.iter().filter_map(index).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(cluster.pods[1]["spec"]["hostname"], "j-1");
    cluster.end(1, "Succeeded");
    cluster.settle();
    assert_eq!(text(&cluster.job, "/status/completedIndexes"), "1");
    for _ in 0..4 {
        cluster.end(0, "Succeeded");
        cluster.settle();
    }
    assert_eq!(text(&cluster.job, "/status/completedIndexes"), "0-4");
    assert_eq!(cluster.count("succeeded"), 5);
    assert_eq!(cluster.reason("Complete"), Some("CompletionsReached"));
}

#[test]
fn a_work_queue_ends_with_its_last_pod() {
    let mut cluster = Cluster::new(job(json!({"completions": null, "parallelism": 3})));
    cluster.settle();
    cluster.end(0, "Succeeded");
    cluster.settle();
    assert_eq!(cluster.count("active"), 2);
    cluster.end(0, "Succeeded");
    cluster.end(0, "Succeeded");
    cluster.settle();
    assert_eq!(cluster.count("succeeded"), 3);
    assert!(cluster.reason("Complete").is_some());
}

#[test]
fn indexes_are_written_as_ranges() {
    for text in ["", "3", "1,2", "0-2,5,7-9"] {
        assert_eq!(write_indexes(&parse_indexes(text)), text);
    }
}

#[test]
fn fields_without_effect_are_named_in_an_event() {
    let job = job(json!({"podFailurePolicy": {"rules": []}}));
    let notes = plan(&job, &[], start()).notes;
    assert_eq!(notes[0].message, "this server does not act on `podFailurePolicy`");
}

proptest! {
    #[test]
    fn pods_are_counted_once_whatever_write_is_lost(
        parallelism in 1i64..4,
        completions in 1i64..6,
        events in proptest::collection::vec((0usize..4, any::<bool>(), 0u8..3, any::<bool>()), 1..60),
    ) {
        let spec = json!({"parallelism": parallelism, "completions": completions, "backoffLimit": 1000});
        let mut cluster = Cluster::new(job(spec));
        let (mut succeeded, mut failed) = (0, 0);
        for (pod, success, cut, removed) in events {
            cluster.step([Cut::None, Cut::AfterStatus, Cut::AfterRelease][usize::from(cut)]);
            if cluster.end(pod, if success { "Succeeded" } else { "Failed" }) {
                if success { succeeded += 1 } else { failed += 1 }
            }
            if removed {
                // Somebody deletes ended pods; only the finalizer keeps them.
                cluster.pods.retain(|pod| !is_terminal(pod) || is_tracked(pod));
            }
            cluster.now = later(cluster.now, 601);
        }
        let ended_early = cluster.deleted_by_plan;
        cluster.settle();
        let more_than_needed = is_finished(&cluster.job) && ended_early > 0;
        if !more_than_needed {
            prop_assert_eq!(cluster.count("succeeded"), succeeded);
            prop_assert_eq!(cluster.count("failed"), failed);
        }
        prop_assert_eq!(is_finished(&cluster.job), succeeded >= completions);
    }
}
