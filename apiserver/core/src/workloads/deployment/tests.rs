//! Tables and a simulated cluster: ReplicaSets follow their size at once, pods become available when the seed says so.

use super::*;
use proptest::prelude::*;

fn deployment(replicas: i64, surge: Value, unavailable: Value) -> Value {
    json!({"metadata": {"name": "web", "namespace": "default", "uid": "d", "generation": 1},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
            "revisionHistoryLimit": 2, "progressDeadlineSeconds": 600,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"image": "a"}}}})
}

fn now() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().expect("a time")
}

/// A cluster of one Deployment. Pods are counts: total and available per ReplicaSet.
struct Cluster {
    deployment: Value,
    sets: Vec<Value>,
    now: Timestamp,
}

impl Cluster {
    fn new(deployment: Value) -> Self {
        Self { deployment, sets: Vec::new(), now: now() }
    }

    /// Plans and executes once; returns whether anything was to be done.
    fn step(&mut self) -> bool {
        let old_pods_run = self.sets.iter().any(|set| {
            label(set, HASH_LABEL) != Some(&template_hash(&self.deployment))
                && number(set, "/status/replicas").unwrap_or(0) > 0
        });
        let plan = plan(
            Observed { deployment: &self.deployment, replica_sets: &self.sets, old_pods_run },
            self.now,
        );
        let busy = !plan.steps.is_empty() || plan.status != self.deployment["status"];
        self.deployment["status"] = plan.status;
        for step in plan.steps {
            match step {
                Step::Create(mut set) => {
                    self.now = later(self.now, 1);
                    set["metadata"]["creationTimestamp"] = json!(stamp(self.now));
                    set["metadata"]["generation"] = json!(1);
                    set["status"] = json!({"observedGeneration": 1});
                    assert!(self.sets.iter().all(|other| name(other) != name(&set)), "made twice");
                    self.sets.push(set);
                }
                Step::Scale { name, from, to, annotations } => {
                    let set = self.set(&name);
                    assert_eq!(replicas(set), from);
                    assert_ne!(from, to);
                    set["spec"]["replicas"] = json!(to);
                    annotate(set, annotations);
                }
                Step::Annotate { name, annotations, .. } => annotate(self.set(&name), annotations),
                Step::Delete { name: gone } => {
                    assert_eq!(replicas(self.set(&gone)), 0);
                    self.sets.retain(|set| name(set) != gone);
                }
                Step::Revision(number) => {
                    self.deployment["metadata"]["annotations"] = json!({REVISION: number});
                }
            }
        }
        busy
    }

    fn set(&mut self, wanted: &str) -> &mut Value {
        self.sets.iter_mut().find(|set| name(set) == wanted).expect("the ReplicaSet exists")
    }

    /// The ReplicaSet controller and the nodes: makes pods, deletes unavailable ones first, readies up to `ready`.
    fn pods(&mut self, index: usize, ready: i64) {
        let Some(set) = self.sets.get_mut(index) else { return };
        let size = replicas(set);
        let available = number(set, "/status/availableReplicas").unwrap_or(0).min(size);
        let available = (available + ready).min(size);
        set["status"] = json!({"replicas": size, "availableReplicas": available, "readyReplicas": available,
            "observedGeneration": 1});
    }

    fn settle(&mut self) {
        for _ in 0..200 {
            let busy = self.step();
            for index in 0..self.sets.len() {
                self.pods(index, 100);
            }
            if !busy && !self.step() {
                return;
            }
        }
        panic!("the rollout did not end");
    }

    fn available(&self) -> i64 {
        self.sets
            .iter()
            .map(|set| number(set, "/status/availableReplicas").unwrap_or(0).min(replicas(set)))
            .sum()
    }

    fn total(&self) -> i64 {
        self.sets.iter().map(replicas).sum()
    }

    fn progressing(&self) -> &str {
        text(condition(&self.deployment, "Progressing").expect("a condition"), "/reason")
    }
}

fn annotate(set: &mut Value, annotations: Map<String, Value>) {
    for (key, value) in annotations {
        set["metadata"]["annotations"][key] = value;
    }
}

#[test]
fn a_new_deployment_gets_one_replica_set_of_full_size() {
    let mut cluster = Cluster::new(deployment(3, json!("25%"), json!("25%")));
    cluster.step();
    assert_eq!(cluster.progressing(), "NewReplicaSetCreated");
    let set = &cluster.sets[0];
    assert_eq!(replicas(set), 3);
    let hash = label(set, HASH_LABEL).expect("a hash").to_owned();
    assert_eq!(name(set), format!("web-{hash}"));
    assert_eq!(set["spec"]["selector"]["matchLabels"], json!({"app": "web", HASH_LABEL: hash}));
    assert_eq!(annotation(set, REVISION), Some("1"));
    assert_eq!(annotation(&cluster.deployment, REVISION), Some("1"));
    cluster.settle();
    let status = &cluster.deployment["status"];
    assert_eq!(status["availableReplicas"], 3);
    assert_eq!(status["updatedReplicas"], 3);
    assert_eq!(status.get("unavailableReplicas"), None);
    assert_eq!(cluster.progressing(), "NewReplicaSetAvailable");
    assert!(super::super::object::has_condition(&cluster.deployment, "Available"));
}

#[test]
fn an_undo_gives_the_old_replica_set_a_new_revision() {
    let mut cluster = Cluster::new(deployment(2, json!(1), json!(0)));
    cluster.settle();
    cluster.deployment["spec"]["template"]["spec"]["image"] = json!("b");
    cluster.settle();
    assert_eq!(annotation(&cluster.deployment, REVISION), Some("2"));
    cluster.deployment["spec"]["template"]["spec"]["image"] = json!("a");
    cluster.settle();
    assert_eq!(cluster.sets.len(), 2);
    assert_eq!(revision(&cluster.sets[0]), 3);
    assert_eq!(annotation(&cluster.sets[0], REVISION_HISTORY), Some("1"));
    assert_eq!((replicas(&cluster.sets[0]), replicas(&cluster.sets[1])), (2, 0));
}

#[test]
fn old_replica_sets_past_the_limit_are_deleted() {
    let mut cluster = Cluster::new(deployment(1, json!(1), json!(0)));
    for image in ["a", "b", "c", "d", "e"] {
        cluster.deployment["spec"]["template"]["spec"]["image"] = json!(image);
        cluster.settle();
    }
    assert_eq!(cluster.sets.iter().map(revision).collect::<Vec<_>>(), [3, 4, 5]);
}

#[test]
fn recreate_waits_for_the_old_pods_to_end() {
    let mut cluster = Cluster::new(deployment(2, Value::Null, Value::Null));
    cluster.deployment["spec"]["strategy"] = json!({"type": "Recreate"});
    cluster.settle();
    cluster.deployment["spec"]["template"]["spec"]["image"] = json!("b");
    cluster.step();
    assert_eq!((cluster.sets.len(), replicas(&cluster.sets[0])), (1, 0));
    cluster.step();
    assert_eq!(cluster.sets.len(), 1, "two old pods still run");
    cluster.pods(0, 0);
    cluster.step();
    assert_eq!((cluster.sets.len(), replicas(&cluster.sets[1])), (2, 2));
}

#[test]
fn a_rollout_that_stands_still_times_out_and_recovers() {
    let mut cluster = Cluster::new(deployment(2, json!(1), json!(0)));
    while cluster.step() {}
    cluster.pods(0, 0);
    while cluster.step() {}
    cluster.now = later(cluster.now, 602);
    cluster.step();
    assert_eq!(cluster.progressing(), "ProgressDeadlineExceeded");
    cluster.pods(0, 1);
    cluster.step();
    assert_eq!(cluster.progressing(), "ReplicaSetUpdated");
    cluster.settle();
    assert_eq!(cluster.progressing(), "NewReplicaSetAvailable");
}

#[test]
fn a_paused_deployment_is_scaled_but_not_rolled() {
    let mut cluster = Cluster::new(deployment(2, json!(1), json!(0)));
    cluster.settle();
    cluster.deployment["spec"]["paused"] = json!(true);
    cluster.deployment["spec"]["template"]["spec"]["image"] = json!("b");
    cluster.deployment["spec"]["replicas"] = json!(5);
    cluster.settle();
    assert_eq!((cluster.sets.len(), replicas(&cluster.sets[0])), (1, 5));
    assert_eq!(cluster.progressing(), "DeploymentPaused");
    cluster.deployment["spec"]["paused"] = json!(false);
    cluster.settle();
    assert_eq!(
        (cluster.sets.len(), replicas(&cluster.sets[0]), replicas(&cluster.sets[1])),
        (2, 0, 5)
    );
}

#[test]
fn defaults_added_to_the_stored_template_make_no_new_revision() {
    let mut cluster = Cluster::new(deployment(1, json!(1), json!(0)));
    cluster.settle();
    cluster.sets[0]["spec"]["template"]["spec"]["dnsPolicy"] = json!("ClusterFirst");
    cluster.settle();
    assert_eq!(cluster.sets.len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn a_rolling_update_keeps_its_bounds_and_ends(
        replicas in 0i64..12,
        surge in 0i64..4,
        unavailable in 0i64..4,
        percent in any::<bool>(),
        events in proptest::collection::vec((0usize..4, 0i64..3, 0u8..20), 0..80),
    ) {
        let of = |n: i64| if percent { json!(format!("{}%", n * 20)) } else { json!(n) };
        let mut cluster = Cluster::new(deployment(replicas, of(surge), of(unavailable)));
        cluster.settle();
        cluster.deployment["spec"]["template"]["spec"]["image"] = json!("b");
        let (surge, unavailable) = limits(&cluster.deployment, replicas);
        for (set, ready, action) in events {
            if action == 0 {
                cluster.deployment["spec"]["template"]["spec"]["image"] = json!(format!("c{ready}"));
            }
            cluster.step();
            prop_assert!(cluster.total() <= replicas + surge, "{} pods", cluster.total());
            cluster.pods(set, ready);
            prop_assert!(cluster.available() >= replicas - unavailable, "{} available", cluster.available());
        }
        cluster.settle();
        let current = cluster.sets.iter().filter(|set| super::replicas(set) > 0).count();
        prop_assert!(current <= 1);
        prop_assert_eq!(cluster.total(), replicas);
    }

    #[test]
    fn scaling_in_the_middle_of_a_rollout_ends_at_the_new_size(
        first in 1i64..12,
        second in 0i64..20,
        ready in proptest::collection::vec((0usize..3, 0i64..3), 0..20),
    ) {
        let mut cluster = Cluster::new(deployment(first, json!("25%"), json!("25%")));
        cluster.settle();
        cluster.deployment["spec"]["template"]["spec"]["image"] = json!("b");
        for (set, count) in ready {
            cluster.step();
            cluster.pods(set, count);
        }
        cluster.deployment["spec"]["replicas"] = json!(second);
        cluster.settle();
        prop_assert_eq!(cluster.total(), second);
        prop_assert_eq!(&cluster.deployment["status"]["observedGeneration"], &json!(1));
    }
}
