//! Runs Jobs to completion.
//!
//! Reads Jobs and their pods; writes pods (create, delete, the tracking finalizer) and the Job's status, in the order
//! that the planner's counts rely on.

use super::cache::{Change, Key, Kind};
use super::cluster::{ClusterError, JOBS, PODS};
use super::events::Weight;
use super::replica_set::{create_pods, delete_pods, forgive_namespace, owners, selector};
use super::{Controller, World, together};
use jiff::Timestamp;
use serde_json::{Value, json};
use skerry_apiserver_core::workloads::job::{FINALIZER, is_tracked, plan};
use skerry_apiserver_core::workloads::object::{
    controller_of, is_controlled_by, list, text, uid, until,
};
use std::sync::Arc;
use std::time::Duration;

pub(super) struct Jobs {
    world: World,
}

impl Jobs {
    pub(super) fn new(world: &World) -> Self {
        let mut world = world.clone();
        world.recorder = world.recorder.with_component("job-controller");
        Self { world }
    }

    /// Takes the finalizer off a pod; one that is gone or changed already is looked at again by its own change.
    async fn untrack(&self, pod: &Value) -> Result<(), ClusterError> {
        if !is_tracked(pod) {
            return Ok(());
        }
        let finalizers: Vec<&Value> = list(pod, "/metadata/finalizers")
            .iter()
            .filter(|finalizer| **finalizer != FINALIZER)
            .collect();
        let patch = json!({"metadata": {"finalizers": finalizers}});
        match self.world.cluster.merge(&PODS, pod, "", patch).await {
            Err(error) if error.is_not_found() => Ok(()),
            other => other.map(drop),
        }
    }

    async fn untrack_all(&self, pods: &[&Value]) -> Result<(), ClusterError> {
        let requests = pods.iter().map(|pod| self.untrack(pod)).collect();
        together(requests).await.into_iter().collect()
    }

    /// Lets go of pods whose Job is gone, so that the collection of garbage can end.
    async fn untrack_orphans(&self, key: &Key, job: Option<&Value>) -> Result<(), ClusterError> {
        let orphans: Vec<Arc<Value>> = self
            .world
            .caches
            .within(Kind::Pod, &key.namespace)
            .into_iter()
            .filter(|pod| is_tracked(pod))
            .filter(|pod| {
                controller_of(pod).is_some_and(|owner| {
                    text(owner, "/kind") == "Job"
                        && text(owner, "/name") == &*key.name
                        && job.is_none_or(|job| text(owner, "/uid") != uid(job))
                })
            })
            .collect();
        self.untrack_all(&orphans.iter().map(|pod| &**pod).collect::<Vec<_>>()).await
    }
}

impl Controller for Jobs {
    const NAME: &'static str = "job";
    const WORKERS: usize = 4;
    const KIND: Option<Kind> = Some(Kind::Job);

    fn keys(&self, change: &Change<'_>) -> Vec<Key> {
        match change.kind {
            Kind::Job => change.object().map(Key::of).into_iter().collect(),
            Kind::Pod => owners(&self.world.caches, change, Kind::Job),
            _ => Vec::new(),
        }
    }

    async fn sync(&self, key: &Key) -> Result<Option<Duration>, ClusterError> {
        let World { cluster, recorder, .. } = &self.world;
        let job = cluster.get(&JOBS, &key.namespace, &key.name).await?;
        self.untrack_orphans(key, job.as_ref()).await?;
        let Some(mut job) = job else { return Ok(None) };
        let manager = text(&job, "/spec/managedBy");
        if !matches!(manager, "" | "kubernetes.io/job-controller") {
            return Ok(None);
        }
        let query = match selector(&job) {
            Ok((_, query)) => query,
            // The API generates a selector; the label below is on every pod that is made here.
            Err(_) => format!("batch.kubernetes.io/controller-uid={}", uid(&job)),
        };
        let mut pods = cluster.list(&PODS, &key.namespace, &query).await?;
        pods.retain(|pod| is_controlled_by(pod, &job));
        let now = Timestamp::now();
        let plan = plan(&job, &pods, now);

        if plan.expired {
            cluster.delete(&JOBS, &job, None).await?;
            return Ok(None);
        }
        if job.get("status") != Some(&plan.status) {
            job["status"] = plan.status;
            job = cluster.replace_status(&JOBS, &job).await?;
        }
        for note in &plan.notes {
            let weight = if note.warning { Weight::Warning } else { Weight::Normal };
            recorder.record(&JOBS, &job, weight, note.reason, note.message.clone());
        }
        self.untrack_all(&plan.release).await?;
        self.untrack_all(&plan.delete).await?;
        delete_pods(cluster, recorder, &JOBS, &job, &plan.delete).await?;
        let (_, made) = create_pods(cluster, recorder, &JOBS, &job, plan.create).await;
        forgive_namespace(made)?;
        Ok(plan.again_at.map(|at| until(now, at)))
    }
}
