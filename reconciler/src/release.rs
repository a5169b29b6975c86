//! Executes the plan of one release: try everything first, then apply, then (when every release of the commit has had
//! its turn) prune.
//!
//! Nothing is half-applied by a manifest that the API refuses: all changed objects of the release go through a dry run
//! before the first one is written.

use crate::cluster::{Cluster, ClusterError, Pruned};
use crate::live::Version;
use crate::report;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use skerry_api::fleet::v1alpha1::ReleaseStatus;
use skerry_reconciler_core::{CompleteRender, Inventory, ObjectId, ReleaseKey, Rendered, Step};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Dry runs of one release at a time.
const DRY_RUNS_AT_ONCE: usize = 8;

/// What one release needs.
pub(crate) struct Work {
    pub(crate) key: ReleaseKey,
    /// The commit; it has a complete render of `key`.
    pub(crate) rendered: Arc<Rendered>,
    pub(crate) inventory: Inventory,
    /// Status as last written; the inventory in it is replaced here.
    pub(crate) status: ReleaseStatus,
    pub(crate) steps: Vec<Step>,
}

impl Work {
    pub(crate) fn render(&self) -> &CompleteRender {
        let outcome =
            self.rendered.releases.get(&self.key).and_then(|outcome| outcome.as_ref().ok());
        outcome.expect("work is made only for a complete render")
    }
}

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Done {
    pub(crate) inventory: Inventory,
    /// What the API made of each applied object.
    pub(crate) versions: BTreeMap<ObjectId, Version>,
    pub(crate) applied: usize,
    pub(crate) failure: Option<Failure>,
}

/// Why a release is not as the commit says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// One word.
    pub(crate) reason: &'static str,
    /// A sentence, with file and object.
    pub(crate) message: String,
    /// Whether it may pass by itself soon.
    pub(crate) transient: bool,
}

impl Failure {
    fn new(work: &Work, id: &ObjectId, error: &ClusterError) -> Self {
        let place = work
            .render()
            .objects()
            .get(id)
            .map(|object| format!("{}:{}: ", object.file, object.line));
        let transient = matches!(error, ClusterError::Unreachable(_));
        // A Job's template, a Deployment's selector: only another object can have another one.
        let immutable = matches!(error, ClusterError::Rejected { message, .. } if message.contains("immutable"));
        let hint = if immutable { "; give the object a new name" } else { "" };
        Self {
            reason: error.reason(),
            message: format!("{}{id}: {error}{hint}", place.unwrap_or_default()),
            transient,
        }
    }
}

/// Applies; prunes are left for later.
pub(crate) async fn apply(cluster: &Cluster, work: &Work) -> Done {
    let mut done = Done { inventory: work.inventory.clone(), ..Done::default() };
    let applies: Vec<(&Step, &ObjectId)> = work
        .steps
        .iter()
        .filter_map(|step| match step {
            Step::Apply(id) => Some((step, id)),
            Step::Prune { .. } => None,
        })
        .collect();
    if applies.is_empty() {
        return done;
    }
    let objects = work.render().objects();
    let stored = &work.inventory.objects;
    let changed =
        |id: &ObjectId| stored.get(id).is_none_or(|item| item.digest != objects[id].digest);
    // What is only applied again was accepted before.
    if applies.iter().any(|(_, id)| changed(id)) {
        // Boxed one by one: a stream over a closure that borrows does not pass for `Send` in a spawned task.
        let mut attempts: Vec<BoxFuture<'_, _>> = Vec::with_capacity(applies.len());
        for (_, id) in &applies {
            let (id, value) = (*id, &objects[*id].value);
            attempts.push(async move { (id, cluster.apply(id, value, true).await) }.boxed());
        }
        let results: Vec<_> =
            futures::stream::iter(attempts).buffered(DRY_RUNS_AT_ONCE).collect().await;
        let refused: Vec<_> =
            results.iter().filter_map(|(id, result)| Some((*id, result.as_ref().err()?))).collect();
        if let Some((id, error)) = refused.first() {
            let mut failure = Failure::new(work, id, error);
            if refused.len() > 1 {
                failure.message += &format!(" (and {} more)", refused.len() - 1);
            }
            done.failure = Some(failure);
            return done;
        }
    }
    let planned = work.inventory.with_planned(work.render());
    if planned.objects.len() != work.inventory.objects.len() {
        let status = ReleaseStatus { inventory: planned.entries(), ..work.status.clone() };
        if let Err(error) = report::release(cluster, &work.key, &status).await {
            done.failure = Some(Failure {
                reason: error.reason(),
                message: format!("the inventory could not be stored: {error}"),
                transient: matches!(error, ClusterError::Unreachable(_)),
            });
            return done;
        }
        done.inventory = planned;
    }
    for (step, id) in applies {
        match cluster.apply(id, &objects[id].value, false).await {
            Ok(live) => {
                done.versions.insert(id.clone(), Version::of(&live));
                done.inventory.record(step, Some(work.render()));
                done.applied += 1;
            }
            Err(error) => {
                done.failure = Some(Failure::new(work, id, &error));
                return done;
            }
        }
    }
    done
}

/// Prunes what the steps say; returns what was really deleted.
pub(crate) async fn prune(
    cluster: &Cluster,
    key: &ReleaseKey,
    steps: &[Step],
    inventory: &mut Inventory,
) -> (Vec<ObjectId>, Option<Failure>) {
    let mut deleted = Vec::new();
    for step in steps {
        let Step::Prune { id, api_version } = step else { continue };
        match cluster.prune(id, api_version, key).await {
            Ok(pruned) => {
                if pruned == Pruned::Deleted {
                    deleted.push(id.clone());
                }
                inventory.record(step, None);
            }
            Err(error) => {
                let transient = matches!(error, ClusterError::Unreachable(_));
                let message = format!("{id} could not be deleted: {error}");
                return (deleted, Some(Failure { reason: "PruneFailed", message, transient }));
            }
        }
    }
    (deleted, None)
}
