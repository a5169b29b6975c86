//! Starts Jobs on schedule.
//!
//! Reads CronJobs and their Jobs; writes Jobs (create, delete) and the CronJob's status.

use super::cache::{Change, Key, Kind};
use super::cluster::{CRON_JOBS, ClusterError, JOBS};
use super::events::Weight;
use super::replica_set::owners;
use super::{Controller, World};
use jiff::Timestamp;
use serde_json::{Value, json};
use skerry_apiserver_core::workloads::cron_job::{plan, reference};
use skerry_apiserver_core::workloads::object::{is_controlled_by, list, name, until};
use std::time::Duration;

pub(super) struct CronJobs {
    world: World,
}

impl CronJobs {
    pub(super) fn new(world: &World) -> Self {
        let mut world = world.clone();
        world.recorder = world.recorder.with_component("cronjob-controller");
        Self { world }
    }
}

impl Controller for CronJobs {
    const NAME: &'static str = "cronjob";
    const WORKERS: usize = 2;
    const KIND: Option<Kind> = Some(Kind::CronJob);

    fn keys(&self, change: &Change<'_>) -> Vec<Key> {
        match change.kind {
            Kind::CronJob => change.new.map(Key::of).into_iter().collect(),
            // CronJobs have no selector, so that this finds those that own the Job and no others.
            Kind::Job => owners(&self.world.caches, change, Kind::CronJob),
            _ => Vec::new(),
        }
    }

    async fn sync(&self, key: &Key) -> Result<Option<Duration>, ClusterError> {
        let World { cluster, recorder, .. } = &self.world;
        let Some(mut cron_job) = cluster.get(&CRON_JOBS, &key.namespace, &key.name).await? else {
            return Ok(None);
        };
        let mut jobs = cluster.list(&JOBS, &key.namespace, "").await?;
        jobs.retain(|job| is_controlled_by(job, &cron_job));
        let now = Timestamp::now();
        let plan = plan(&cron_job, &jobs, now);

        for job in &plan.delete {
            cluster.delete(&JOBS, job, None).await?;
            let message = format!("Deleted job {}", name(job));
            recorder.record(&CRON_JOBS, &cron_job, Weight::Normal, "SuccessfulDelete", message);
        }
        let mut status = plan.status;
        if let Some(job) = &plan.create {
            match cluster.create(&JOBS, job).await {
                Ok(job) => {
                    let message = format!("Created job {}", name(&job));
                    recorder.record(
                        &CRON_JOBS,
                        &cron_job,
                        Weight::Normal,
                        "SuccessfulCreate",
                        message,
                    );
                    let mut active = list(&status, "/active").to_vec();
                    active.push(reference(&job));
                    status["active"] = json!(active);
                }
                // Started by the look before this one.
                Err(error) if error.already_exists() => {}
                Err(error) if error.is_namespace_gone() => return Ok(None),
                Err(error) => {
                    let message = format!("Error creating job: {}", error.text());
                    recorder.record(
                        &CRON_JOBS,
                        &cron_job,
                        Weight::Warning,
                        "FailedCreate",
                        message,
                    );
                    return Err(error);
                }
            }
        }
        for note in &plan.notes {
            let weight = if note.warning { Weight::Warning } else { Weight::Normal };
            recorder.record(&CRON_JOBS, &cron_job, weight, note.reason, note.message.clone());
        }
        if cron_job.get("status").unwrap_or(&Value::Null) != &status
            && !(cron_job.get("status").is_none() && status == json!({}))
        {
            cron_job["status"] = status;
            cluster.replace_status(&CRON_JOBS, &cron_job).await?;
        }
        Ok(plan.again_at.map(|at| until(now, at)))
    }
}
