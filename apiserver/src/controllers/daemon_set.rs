//! Keeps the pods of DaemonSets on their nodes.
//!
//! Reads DaemonSets, nodes, their pods and ControllerRevisions; writes pods, ControllerRevisions and the status.

use super::cache::{Change, Key, Kind};
use super::cluster::{ClusterError, DAEMON_SETS, PODS, REVISIONS};
use super::events::Weight;
use super::replica_set::{
    adopt, create_pods, delete_pods, forgive_namespace, owners, release, selector, strays,
};
use super::{Controller, World};
use jiff::Timestamp;
use serde_json::{Value, json};
use skerry_apiserver_core::workloads::daemon_set::plan;
use skerry_apiserver_core::workloads::object::{
    claim, earliest, is_controlled_by, later, name, text, uid, until,
};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Pause before a pod that failed on a node is replaced the second time; it doubles with each further one.
const REPLACE_SECONDS: i64 = 1;
/// Longest such pause; the count is forgotten after twice this time.
const REPLACE_MAX_SECONDS: i64 = 900;

/// How often a pod failed on one node.
struct Failures {
    count: u32,
    last: Timestamp,
}

impl Failures {
    fn pause_until(&self) -> Timestamp {
        let seconds = REPLACE_SECONDS << self.count.saturating_sub(1).min(10);
        later(self.last, seconds.min(REPLACE_MAX_SECONDS))
    }
}

pub(super) struct DaemonSets {
    world: World,
    /// By uid of the DaemonSet and name of the node.
    failures: Mutex<HashMap<(String, String), Failures>>,
}

impl DaemonSets {
    pub(super) fn new(world: &World) -> Self {
        let mut world = world.clone();
        world.recorder = world.recorder.with_component("daemonset-controller");
        Self { world, failures: Mutex::new(HashMap::new()) }
    }

    /// When the failed pod may be replaced; `None` for now, which counts.
    fn hold(&self, set: &Value, pod: &Value, now: Timestamp) -> Option<Timestamp> {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.retain(|_, failures| later(failures.last, 2 * REPLACE_MAX_SECONDS) > now);
        let key = (uid(set).to_owned(), text(pod, "/spec/nodeName").to_owned());
        let failures = failures.entry(key).or_insert(Failures { count: 0, last: now });
        if failures.count > 0 && failures.pause_until() > now {
            return Some(failures.pause_until());
        }
        failures.count += 1;
        failures.last = now;
        None
    }
}

impl Controller for DaemonSets {
    const NAME: &'static str = "daemonset";
    const WORKERS: usize = 2;
    const KIND: Option<Kind> = Some(Kind::DaemonSet);

    fn keys(&self, change: &Change<'_>) -> Vec<Key> {
        match change.kind {
            Kind::DaemonSet => change.new.map(Key::of).into_iter().collect(),
            Kind::Pod => owners(&self.world.caches, change, Kind::DaemonSet),
            Kind::Node => {
                let same = |pointer: &str| match (change.old, change.new) {
                    (Some(old), Some(new)) => old.pointer(pointer) == new.pointer(pointer),
                    _ => false,
                };
                if same("/spec") && same("/metadata/labels") {
                    return Vec::new();
                }
                self.world.caches.keys(Kind::DaemonSet)
            }
            _ => Vec::new(),
        }
    }

    async fn sync(&self, key: &Key) -> Result<Option<Duration>, ClusterError> {
        let World { cluster, recorder, caches, .. } = &self.world;
        let Some(mut set) = cluster.get(&DAEMON_SETS, &key.namespace, &key.name).await? else {
            return Ok(None);
        };
        let (selector, query) = selector(&set)?;
        let mut pods = cluster.list(&PODS, &key.namespace, &query).await?;
        pods.extend(strays(caches, &set, &pods));
        let claimed = claim(&set, &selector, &pods);
        release(cluster, &PODS, &set, &claimed.release).await?;
        adopt(cluster, &PODS, &set, &DAEMON_SETS, &claimed.adopt).await?;
        let mine: Vec<Value> = claimed.mine.into_iter().chain(claimed.adopt).cloned().collect();
        let mut revisions = cluster.list(&REVISIONS, &key.namespace, &query).await?;
        revisions.retain(|revision| is_controlled_by(revision, &set));
        let nodes = caches.all(Kind::Node);
        let nodes: Vec<&Value> = nodes.iter().map(|node| &**node).collect();
        let now = Timestamp::now();
        let mut plan = plan(&set, &nodes, &mine, &revisions, now);

        if let Some(revision) = &plan.revision {
            match cluster.create(&REVISIONS, revision).await {
                Err(error) if error.already_exists() => {}
                Err(error) if error.is_namespace_gone() => return Ok(None),
                other => drop(other?),
            }
        }
        if let Some((wanted, number)) = &plan.renumber
            && let Some(revision) = revisions.iter().find(|revision| name(revision) == wanted)
        {
            cluster.merge(&REVISIONS, revision, "", json!({"revision": number})).await?;
        }
        for revision in
            revisions.iter().filter(|r| plan.forget.iter().any(|name| name == self::name(r)))
        {
            cluster.delete(&REVISIONS, revision, None).await?;
        }
        for pod in &plan.failed {
            match self.hold(&set, pod, now) {
                Some(at) => {
                    plan.delete.retain(|other| uid(other) != uid(pod));
                    plan.again_at = earliest(plan.again_at, Some(at));
                }
                None => {
                    let message = format!(
                        "Found failed daemon pod {}/{} on node {}, will try to kill it",
                        key.namespace,
                        name(pod),
                        text(pod, "/spec/nodeName")
                    );
                    recorder.record(
                        &DAEMON_SETS,
                        &set,
                        Weight::Warning,
                        "FailedDaemonPod",
                        message,
                    );
                }
            }
        }
        delete_pods(cluster, recorder, &DAEMON_SETS, &set, &plan.delete).await?;
        let (_, made) = create_pods(cluster, recorder, &DAEMON_SETS, &set, plan.create).await;
        if set.get("status") != Some(&plan.status) {
            set["status"] = plan.status;
            cluster.replace_status(&DAEMON_SETS, &set).await?;
        }
        forgive_namespace(made)?;
        Ok(plan.again_at.map(|at| until(now, at)))
    }
}
