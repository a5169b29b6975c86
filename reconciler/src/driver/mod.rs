//! The loop: commits, changes in the cluster and the clock come in, one owner acts on them. Nothing else holds state,
//! so there is no lock.
//!
//! A commit is rendered, every release of it is applied, then what left it is pruned, then all of it is reported. A
//! change in the cluster makes the release concerned be judged again, and applied again if somebody else changed one
//! of its objects. Whatever fails is tried again with a growing pause; the others go on.

mod bring_up;
mod judge;
mod look;
mod start;

use crate::cluster::Cluster;
use crate::git::{Commit, GitError, Remote, chain};
use crate::live::{Change, Live, Version};
use crate::qualification::{self, Profiles};
use crate::release::Failure;
use crate::report::{self, Mood};
use serde_json::Value;
use skerry_api::fleet::v1alpha1::{FleetStatus, GROUP, ReleaseStatus, SiteOs, SiteStatus};
use skerry_reconciler_core::network::Choice;
use skerry_reconciler_core::{Inventory, ObjectId, ReleaseKey, Rendered, RenderedSite};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// Releases that are applied at the same time.
const RELEASES_AT_ONCE: usize = 8;
/// Everything is applied again this often: it undoes what the watches missed. An apply that changes nothing is cheap.
const RESYNC: Duration = Duration::from_secs(60);
/// Changes in the cluster are collected for this long before they are judged.
const SETTLE: Duration = Duration::from_millis(50);
/// A release is not applied again for a foreign change more often than this: two owners of one field would fight.
const DRIFT_PAUSE: Duration = Duration::from_secs(5);
/// Pauses before a failed release is tried again: doubled from the first to the last.
const RETRY_FIRST: Duration = Duration::from_secs(2);
const RETRY_LAST: Duration = Duration::from_secs(300);
const RETRY_LAST_TRANSIENT: Duration = Duration::from_secs(15);
/// Budgets run out without any event, so sites are judged at least this often.
const JUDGE_SITES: Duration = Duration::from_secs(15);
/// How long the first commit waits for the nodes and their reports.
const SYNC_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) struct Driver {
    cluster: Cluster,
    live: Live,
    changes: mpsc::Receiver<Change>,
    remote: String,
    branch: String,
    current: Option<Current>,
    releases: BTreeMap<ReleaseKey, ReleaseState>,
    sites: BTreeMap<String, SiteState>,
    fleet: FleetReport,
    /// The commit that an earlier run had in force.
    revision_before: Option<String>,
    dirty: BTreeSet<ReleaseKey>,
    judge_at: Option<Instant>,
    judge_sites_at: Instant,
    resync_at: Instant,
    /// Set while something outside a release (a namespace, a removal, a report) has to be tried again.
    retry_rest: Option<(Instant, u32)>,
}

/// The commit in force.
struct Current {
    revision: String,
    rendered: Arc<Rendered>,
    profiles: Arc<Profiles>,
}

#[derive(Default)]
struct ReleaseState {
    inventory: Inventory,
    /// As it should be, apart from the verdict of [`Driver::judge`].
    status: ReleaseStatus,
    /// As last written.
    written: Option<ReleaseStatus>,
    versions: BTreeMap<ObjectId, Version>,
    failure: Option<Failure>,
    attempts: u32,
    retry_at: Option<Instant>,
    last_drift: Option<Instant>,
    /// The stored inventory could not be read: nothing may be pruned for this release.
    unreadable: bool,
}

#[derive(Default)]
struct SiteState {
    /// What the Site object was made from; its namespace is there then, too.
    prepared: Option<RenderedSite>,
    status: Option<SiteStatus>,
    /// The network that it gets; nothing when it asks for none.
    network: Option<Choice>,
    /// How its nodes are with their OS; nothing when it follows no channel.
    os: Option<SiteOs>,
    /// `status` has to be written again, even if it is the same: somebody may have deleted or changed the object.
    rewrite: bool,
}

#[derive(Default)]
struct FleetReport {
    fetch_error: Option<(String, &'static str, Option<String>)>,
    written: Option<(Value, FleetStatus)>,
}

/// What the look at the remote found.
enum Look {
    Commit(Box<Commit>),
    Unchanged,
    Failed(GitError),
}

impl Driver {
    /// Runs until `stop`.
    pub(crate) async fn run(mut self, mut remote: Remote, poll: Duration, stop: CancellationToken) {
        if let Some(revision) = &self.revision_before {
            remote.remember(revision);
        }
        let (sender, mut looks) = mpsc::channel(1);
        let watcher = tokio::spawn(look::look(remote, poll, sender, stop.clone()));
        loop {
            let deadline = self.deadline();
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(look) = looks.recv() => self.handle_look(look).await,
                Some(change) = self.changes.recv() => self.handle_change(change),
                () = sleep_until(deadline) => self.handle_time().await,
            }
        }
        watcher.abort();
    }

    fn deadline(&self) -> Instant {
        let retries = self.releases.values().filter_map(|state| state.retry_at);
        let rest = self.retry_rest.map(|(at, _)| at);
        let first = retries.chain(rest).chain(self.judge_at).min();
        first.unwrap_or(self.resync_at).min(self.resync_at).min(self.judge_sites_at)
    }

    async fn handle_look(&mut self, look: Look) {
        match look {
            Look::Unchanged => {
                if self.fleet.fetch_error.take().is_some() {
                    tracing::info!(remote = %self.remote, "the remote answers again");
                    self.report_fleet().await;
                }
            }
            Look::Failed(error) => {
                let message = chain(&error);
                if self.fleet.fetch_error.as_ref().is_none_or(|(known, ..)| *known != message) {
                    tracing::warn!(remote = %self.remote, error = %message, "the remote cannot be read; what was applied stays");
                    self.fleet.fetch_error = Some((message, error.reason(), error.hint()));
                    self.report_fleet().await;
                }
            }
            Look::Commit(commit) => {
                self.fleet.fetch_error = None;
                self.take_commit(*commit).await;
            }
        }
    }

    async fn take_commit(&mut self, commit: Commit) {
        let Commit { revision, source, rewritten } = commit;
        let (rendered, profiles) = match tokio::task::spawn_blocking(move || {
            let mut rendered = skerry_reconciler_core::render(&source);
            let profiles = Profiles::new(&mut rendered);
            (rendered, profiles)
        })
        .await
        {
            Ok((rendered, profiles)) => (Arc::new(rendered), Arc::new(profiles)),
            Err(error) => {
                tracing::error!(%revision, %error, "rendering broke off; please report this commit");
                return;
            }
        };
        tracing::info!(%revision, releases = rendered.releases.len(), problems = rendered.all_problems().len(), "new commit");
        if rewritten {
            let message = format!(
                "history of `{}` was rewritten; {} is in force now",
                self.branch,
                short(&revision)
            );
            tracing::warn!(%revision, "history was rewritten");
            report::event(
                &self.cluster,
                &report::fleet_id(),
                Mood::Warning,
                "HistoryRewritten",
                &message,
            )
            .await;
        }
        // What happened while no reconciler ran is undone at once, and from then on changes by others can be told.
        let first = self.current.is_none();
        if first {
            // What is not known of nodes yet must not open a gate.
            for (group, kind) in [("", "Node"), (GROUP, qualification::KIND)] {
                self.live.synced(group, kind, SYNC_TIMEOUT).await;
            }
        }
        self.current = Some(Current { revision, rendered, profiles });
        self.retry_rest = None;
        self.bring_up(None, first).await;
    }

    /// Makes every report be written again; one that is as it should be stays untouched in the cluster.
    fn forget_reports(&mut self) {
        for state in self.sites.values_mut() {
            state.prepared = None;
            state.rewrite = true;
        }
        self.releases.values_mut().for_each(|state| state.written = None);
        self.dirty.extend(self.releases.keys().cloned());
        self.fleet.written = None;
    }

    /// Brings back the definitions of our own kinds, in case somebody deleted them.
    async fn install_definitions(&self) {
        if let Err(error) = start::install(&self.cluster).await {
            tracing::warn!(%error, "the definitions of Fleet, Site and Release could not be installed");
        }
    }

    fn handle_change(&mut self, change: Change) {
        self.judge_at.get_or_insert(Instant::now() + SETTLE);
        match change {
            Change::Node => self.judge_sites_at = Instant::now() + SETTLE,
            Change::Synced => {
                self.dirty.extend(self.releases.keys().cloned());
                self.judge_sites_at = Instant::now() + SETTLE;
            }
            Change::ReportGone { site: Some(site), app: Some(app) } => {
                let key = ReleaseKey { site, app };
                if let Some(state) = self.releases.get_mut(&key) {
                    tracing::info!(release = %key, "the release's report was deleted; writing it again");
                    state.written = None;
                    self.dirty.insert(key);
                }
            }
            Change::ReportGone { site: Some(site), app: None } => {
                if let Some(state) = self.sites.get_mut(&site) {
                    state.prepared = None;
                    state.rewrite = true;
                    self.schedule_rest();
                }
            }
            Change::ReportGone { .. } => {
                self.fleet.written = None;
                self.schedule_rest();
            }
            Change::Object { release, id, version, deleted } => {
                let current = self
                    .current
                    .as_ref()
                    .and_then(|current| current.rendered.releases.get(&release));
                let desired = current
                    .and_then(|outcome| outcome.as_ref().ok())
                    .is_some_and(|render| render.objects().contains_key(&id));
                let Some(state) = self.releases.get_mut(&release) else { return };
                let drifted = match state.versions.get(&id) {
                    Some(applied) if deleted => version.resource >= applied.resource,
                    Some(applied) => version.drifted_from(*applied),
                    None => deleted,
                };
                if drifted && desired && state.failure.is_none() && state.retry_at.is_none() {
                    tracing::info!(release = %release, object = %id, deleted, "changed by somebody else; applying again");
                    let now = Instant::now();
                    let earliest = state.last_drift.map_or(now, |last| last + DRIFT_PAUSE);
                    state.retry_at = Some(earliest.max(now + SETTLE));
                    state.last_drift = Some(earliest.max(now));
                }
                self.dirty.insert(release);
            }
        }
    }

    async fn handle_time(&mut self) {
        let now = Instant::now();
        if self.judge_sites_at <= now {
            self.judge_sites_at = now + JUDGE_SITES;
            if let Some(rendered) = self.current.as_ref().map(|current| current.rendered.clone())
                && !self.mark_nodes(&rendered).await
            {
                self.schedule_rest();
            }
            self.judge_sites().await;
        }
        if self.resync_at <= now {
            self.resync_at = now + RESYNC;
            self.forget_reports();
            self.install_definitions().await;
            self.bring_up(None, true).await;
        }
        if self.retry_rest.is_some_and(|(at, _)| at <= now) {
            self.bring_up(None, false).await;
        }
        let due: BTreeSet<ReleaseKey> = self
            .releases
            .iter_mut()
            .filter(|(_, state)| state.retry_at.is_some_and(|at| at <= now))
            .map(|(key, state)| {
                state.retry_at = None;
                key.clone()
            })
            .collect();
        if !due.is_empty() {
            self.bring_up(Some(due), true).await;
        }
        if self.judge_at.is_some_and(|at| at <= now) {
            self.judge().await;
        }
    }
}

fn pause(attempts: u32, last: Duration) -> Duration {
    RETRY_FIRST.saturating_mul(2_u32.saturating_pow(attempts.min(16))).min(last)
}

/// The first eight characters of a commit id.
fn short(revision: &str) -> String {
    revision.chars().take(8).collect()
}
