//! Rolls Deployments out over ReplicaSets.
//!
//! Reads Deployments, ReplicaSets and, for `Recreate`, pods; writes ReplicaSets, the revision annotation and the
//! status of the Deployment.

use super::cache::{Change, Key, Kind};
use super::cluster::{ClusterError, DEPLOYMENTS, PODS, REPLICA_SETS};
use super::events::Weight;
use super::replica_set::{adopt, owners, release, selector};
use super::{Controller, World};
use jiff::Timestamp;
use serde_json::{Value, json};
use skerry_apiserver_core::workloads::deployment::{self, Observed, Step};
use skerry_apiserver_core::workloads::object::{
    Claim, claim, controller_of, is_controlled_by, is_terminal, labels, name, namespace, number,
    text, uid, until,
};
use std::time::Duration;

pub(super) struct Deployments {
    world: World,
}

impl Deployments {
    pub(super) fn new(world: &World) -> Self {
        let mut world = world.clone();
        world.recorder = world.recorder.with_component("deployment-controller");
        Self { world }
    }

    /// Executes one step; returns the Deployment if the step changed it.
    async fn execute(
        &self,
        deployment: &Value,
        sets: &[Value],
        step: &Step,
    ) -> Result<Option<Value>, ClusterError> {
        let cluster = &self.world.cluster;
        let find = |wanted: &str| sets.iter().find(|set| name(set) == wanted);
        match step {
            Step::Create(set) => match cluster.create(&REPLICA_SETS, set).await {
                Ok(set) => {
                    let size = number(&set, "/spec/replicas").unwrap_or(0);
                    self.say(deployment, name(&set), 0, size);
                }
                Err(error) if error.already_exists() => {
                    return self.collide(deployment, name(set)).await.map(Some);
                }
                Err(error) => {
                    if !error.is_namespace_gone() {
                        let message = format!("Failed to create new replica set: {}", error.text());
                        self.world.recorder.record(
                            &DEPLOYMENTS,
                            deployment,
                            Weight::Warning,
                            "ReplicaSetCreateError",
                            message,
                        );
                    }
                    return Err(error);
                }
            },
            Step::Scale { name, from, to, annotations } => {
                let Some(set) = find(name) else { return Ok(None) };
                let patch = json!({
                    "metadata": {"annotations": annotations}, "spec": {"replicas": to},
                });
                cluster.merge(&REPLICA_SETS, set, "", patch).await?;
                self.say(deployment, name, *from, *to);
            }
            Step::Annotate { name, annotations, min_ready_seconds } => {
                let Some(set) = find(name) else { return Ok(None) };
                let mut patch = json!({"metadata": {"annotations": annotations}});
                if let Some(seconds) = min_ready_seconds {
                    patch["spec"] = json!({"minReadySeconds": seconds});
                }
                cluster.merge(&REPLICA_SETS, set, "", patch).await?;
            }
            Step::Delete { name } => {
                if let Some(set) = find(name) {
                    cluster.delete(&REPLICA_SETS, set, None).await?;
                }
            }
            Step::Revision(number) => {
                let patch = json!({"metadata": {"annotations": {deployment::REVISION: number}}});
                return cluster.merge(&DEPLOYMENTS, deployment, "", patch).await.map(Some);
            }
        }
        Ok(None)
    }

    /// The name of the new ReplicaSet is taken. If it is not ours, the hash has to become another one.
    async fn collide(&self, deployment: &Value, taken: &str) -> Result<Value, ClusterError> {
        let cluster = &self.world.cluster;
        let other = cluster.get(&REPLICA_SETS, namespace(deployment), taken).await?;
        if other.is_none_or(|other| deployment::is_own(deployment, &other)) {
            return Ok(deployment.clone());
        }
        let mut deployment = deployment.clone();
        let count = number(&deployment, "/status/collisionCount").unwrap_or(0);
        deployment["status"]["collisionCount"] = json!(count + 1);
        cluster.replace_status(&DEPLOYMENTS, &deployment).await
    }

    fn say(&self, deployment: &Value, set: &str, from: i64, to: i64) {
        let direction = if to >= from { "up" } else { "down" };
        let message = format!("Scaled {direction} replica set {set} from {from} to {to}");
        self.world.recorder.record(
            &DEPLOYMENTS,
            deployment,
            Weight::Normal,
            "ScalingReplicaSet",
            message,
        );
    }
}

impl Controller for Deployments {
    const NAME: &'static str = "deployment";
    const WORKERS: usize = 4;
    const KIND: Option<Kind> = Some(Kind::Deployment);

    fn keys(&self, change: &Change<'_>) -> Vec<Key> {
        match change.kind {
            Kind::Deployment => change.new.map(Key::of).into_iter().collect(),
            Kind::ReplicaSet => owners(&self.world.caches, change, Kind::Deployment),
            // The end of a pod matters to `Recreate`, which waits for it.
            Kind::Pod if change.new.is_none_or(is_terminal) => {
                let Some(pod) = change.old else { return Vec::new() };
                let owner = controller_of(pod)
                    .filter(|owner| text(owner, "/kind") == "ReplicaSet")
                    .map(|owner| Key::new(namespace(pod), text(owner, "/name")));
                let set = owner.and_then(|key| self.world.caches.get(Kind::ReplicaSet, &key));
                let deployment = set.as_deref().and_then(controller_of);
                deployment
                    .map(|owner| Key::new(namespace(pod), text(owner, "/name")))
                    .into_iter()
                    .collect()
            }
            _ => Vec::new(),
        }
    }

    async fn sync(&self, key: &Key) -> Result<Option<Duration>, ClusterError> {
        let cluster = &self.world.cluster;
        let Some(mut deployment) = cluster.get(&DEPLOYMENTS, &key.namespace, &key.name).await?
        else {
            return Ok(None);
        };
        let (selector, query) = selector(&deployment)?;
        let listed = cluster.list(&REPLICA_SETS, &key.namespace, &query).await?;
        let Claim { adopt: orphans, release: strangers, .. } =
            claim(&deployment, &selector, &listed);
        release(cluster, &REPLICA_SETS, &deployment, &strangers).await?;
        adopt(cluster, &REPLICA_SETS, &deployment, &DEPLOYMENTS, &orphans).await?;
        if !orphans.is_empty() {
            // They come back as changed, and then count.
            return Ok(None);
        }
        let sets: Vec<Value> = listed
            .into_iter()
            .filter(|set| is_controlled_by(set, &deployment) && selector.matches(labels(set)))
            .collect();

        let mut old_pods_run = false;
        if text(&deployment, "/spec/strategy/type") == "Recreate" {
            let current = deployment::current(&deployment, &sets).map(|set| uid(set).to_owned());
            old_pods_run = cluster
                .list(&PODS, &key.namespace, &query)
                .await?
                .iter()
                .filter(|pod| !is_terminal(pod))
                .filter_map(|pod| controller_of(pod).map(|owner| text(owner, "/uid")))
                .any(|owner| {
                    Some(owner) != current.as_deref() && sets.iter().any(|set| uid(set) == owner)
                });
        }
        let now = Timestamp::now();
        let observed = Observed { deployment: &deployment, replica_sets: &sets, old_pods_run };
        let plan = deployment::plan(observed, now);
        for step in &plan.steps {
            match self.execute(&deployment, &sets, step).await {
                Ok(Some(changed)) => deployment = changed,
                Ok(None) => {}
                Err(error) if error.is_namespace_gone() => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        let collisions = deployment.pointer("/status/collisionCount");
        if collisions != plan.status.get("collisionCount") {
            // The name was taken; the next look plans with the new hash.
            return Ok(None);
        }
        if deployment.get("status") != Some(&plan.status) {
            deployment["status"] = plan.status;
            cluster.replace_status(&DEPLOYMENTS, &deployment).await?;
        }
        Ok(plan.again_at.map(|at| until(now, at)))
    }
}
