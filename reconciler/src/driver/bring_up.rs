//! Takes the cluster to the commit in force: sites, releases, removals, node labels, in this order.

use super::{Driver, RELEASES_AT_ONCE, RETRY_LAST, RETRY_LAST_TRANSIENT, SETTLE, pause, short};
use crate::cluster::{ClusterError, Marks, Pruned, within};
use crate::os;
use crate::release::{self, Done, Failure, Work};
use crate::report::{self, Mood};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::Namespace;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams};
use skerry_api::fleet::os::ORDER_ANNOTATION;
use skerry_api::fleet::v1alpha1::{
    self as fleet, MANAGED_BY, MANAGED_BY_LABEL, Problem, SITE_LABEL, site_namespace,
};
use skerry_reconciler_core::os::judge;
use skerry_reconciler_core::{
    CompleteRender, ObjectId, ReleaseKey, Rendered, Roster, plan, plan_removals, resync,
};
use std::collections::{BTreeSet, HashMap};
use tokio::time::Instant;

/// Reason of a release whose site is stopped at the gate.
const GATE: &str = "NetworkNotQualified";

impl Driver {
    /// Takes the cluster to the current commit: all of it, or only some releases.
    pub(super) async fn bring_up(&mut self, only: Option<BTreeSet<ReleaseKey>>, everything: bool) {
        let Some(current) = &self.current else { return };
        let (revision, rendered) = (current.revision.clone(), current.rendered.clone());
        self.choose_networks();
        let mut rest_ok = self.prepare_sites(&rendered).await;
        let wanted = |key: &ReleaseKey| only.as_ref().is_none_or(|only| only.contains(key));

        let mut works = Vec::new();
        for (key, outcome) in rendered.releases.iter().filter(|(key, _)| wanted(key)) {
            self.releases.entry(key.clone()).or_default();
            match outcome {
                Ok(render) if self.is_stopped(key, render) => {
                    let failure = self.gate_failure(&key.site);
                    self.note_failure(key, &revision, failure).await;
                    if let Some(state) = self.releases.get_mut(key) {
                        state.retry_at = None; // a new report opens the gate, no time does
                    }
                }
                Ok(render) => {
                    let state = self.releases.entry(key.clone()).or_default();
                    let claimed = rendered.claimed(key);
                    let steps = match everything {
                        true => resync(render, &state.inventory, &claimed),
                        false => plan(render, &state.inventory, &claimed),
                    };
                    works.push(Work {
                        key: key.clone(),
                        rendered: rendered.clone(),
                        inventory: state.inventory.clone(),
                        status: state.status.clone(),
                        steps,
                    });
                }
                Err(problems) => {
                    let more = if problems.len() > 1 {
                        format!(" (and {} more)", problems.len() - 1)
                    } else {
                        String::new()
                    };
                    let message = problems
                        .first()
                        .map(|problem| format!("{problem}{more}"))
                        .unwrap_or_default();
                    let failure = Failure { reason: "RenderFailed", message, transient: false };
                    self.note_failure(key, &revision, Some(failure)).await;
                    if let Some(state) = self.releases.get_mut(key) {
                        state.retry_at = None; // the same commit renders the same
                    }
                }
            }
        }
        if only.is_none() {
            self.note_held(&rendered, &revision).await;
        }
        let mut kinds = Vec::new();
        for (id, object) in works.iter().flat_map(|work| work.render().objects()) {
            kinds.push((
                id.clone(),
                object.value["apiVersion"].as_str().unwrap_or_default().to_owned(),
            ));
        }
        self.watch_kinds(kinds).await;

        let cluster = &self.cluster;
        let mut running: Vec<BoxFuture<'_, (Work, Done)>> = Vec::with_capacity(works.len());
        for work in works {
            running.push(
                async move {
                    let done = release::apply(cluster, &work).await;
                    (work, done)
                }
                .boxed(),
            );
        }
        let applied: Vec<_> =
            futures::stream::iter(running).buffer_unordered(RELEASES_AT_ONCE).collect().await;

        // Only now, when every release has what it needs, does anything go.
        for (work, mut done) in applied {
            let mut pruned = Vec::new();
            let readable = self.releases.get(&work.key).is_none_or(|state| !state.unreadable);
            if done.failure.is_none() && rendered.prune && readable {
                let (deleted, failure) =
                    release::prune(&self.cluster, &work.key, &work.steps, &mut done.inventory)
                        .await;
                pruned = deleted;
                done.failure = failure;
            }
            self.note_done(&work, done, pruned, &revision).await;
        }
        if only.is_none() {
            rest_ok &= self.remove_what_left(&rendered).await;
            rest_ok &= self.mark_nodes(&rendered).await;
            if rest_ok {
                self.retry_rest = None;
            } else {
                self.schedule_rest();
            }
        }
        self.judge().await;
        self.report_fleet().await;
    }

    /// Whether the site's gate keeps this from being applied. What is applied already is kept as it is: a gate is passed
    /// once, and what runs must not rot behind it.
    fn is_stopped(&self, key: &ReleaseKey, render: &CompleteRender) -> bool {
        let network = self.sites.get(&key.site).and_then(|site| site.network.as_ref());
        let applied = self.releases.get(key).and_then(|state| state.status.digest.as_deref());
        network.is_some_and(|network| network.stop.is_some())
            && applied != Some(render.digest().as_str())
    }

    fn gate_failure(&self, site: &str) -> Option<Failure> {
        let stop = self.sites.get(site)?.network.as_ref()?.stop.as_ref()?;
        let message = format!("stopped at the gate: {}; hint: {}", stop.message, stop.hint);
        Some(Failure { reason: GATE, message, transient: false })
    }

    /// What every site's network is now. Releases behind a gate that has opened are applied.
    pub(super) fn choose_networks(&mut self) {
        let Some(current) = &self.current else { return };
        let (rendered, profiles) = (current.rendered.clone(), current.profiles.clone());
        for (name, site) in &rendered.sites {
            let network = profiles.choose(site, &self.live, &rendered);
            let open = network.as_ref().is_none_or(|network| network.stop.is_none());
            let state = self.sites.entry(name.clone()).or_default();
            let was_open = state.network.as_ref().is_none_or(|network| network.stop.is_none());
            if state.network == network {
                continue;
            }
            if let Some(network) = &network {
                let (cni, message) = (network.cni.as_deref().unwrap_or("none"), &network.message);
                tracing::info!(site = %name, cni, stopped = !open, message, "network");
            }
            state.network = network;
            if open == was_open && open {
                continue;
            }
            for (_, release) in self.releases.iter_mut().filter(|(key, release)| {
                key.site == *name && release.failure.as_ref().is_some_and(|f| f.reason == GATE)
            }) {
                // Open: it goes through. Still closed: it says the present reason.
                release.retry_at = Some(Instant::now());
            }
        }
    }

    /// Releases that the commit says nothing about, because a file that could name them is broken: they stay as they
    /// are, and that has to be said where people look.
    async fn note_held(&mut self, rendered: &Rendered, revision: &str) {
        let held: Vec<ReleaseKey> = self
            .releases
            .keys()
            .filter(|key| !rendered.releases.contains_key(key))
            .filter(|key| rendered.roster.as_ref().is_none_or(|roster| roster.has_release(key)))
            .cloned()
            .collect();
        for key in held {
            let concerns = |problem: &&Problem| {
                problem.app.as_ref() == Some(&key.app)
                    || problem.site.as_ref() == Some(&key.site)
                    || problem.file == format!("sites/{}.yaml", key.site)
            };
            let problems = &rendered.problems;
            let Some(problem) = problems.iter().find(concerns).or(problems.first()) else {
                continue;
            };
            let message = format!("held back by {problem}");
            let failure = Failure { reason: "RenderFailed", message, transient: false };
            self.note_failure(&key, revision, Some(failure)).await;
            if let Some(state) = self.releases.get_mut(&key) {
                state.retry_at = None; // the same commit renders the same
            }
        }
    }

    pub(super) fn schedule_rest(&mut self) {
        let attempts = self.retry_rest.map_or(0, |(_, attempts)| attempts);
        self.retry_rest =
            Some((Instant::now() + pause(attempts, RETRY_LAST_TRANSIENT), attempts + 1));
    }

    /// Namespaces and Site objects.
    async fn prepare_sites(&mut self, rendered: &Rendered) -> bool {
        let mut fine = true;
        let prepared =
            |name: &String| self.sites.get(name).and_then(|state| state.prepared.as_ref());
        let fresh: Vec<_> =
            rendered.sites.iter().filter(|(name, site)| prepared(name) != Some(*site)).collect();
        let cluster = &self.cluster;
        let mut running: Vec<BoxFuture<'_, (String, Result<(), ClusterError>)>> =
            Vec::with_capacity(fresh.len());
        for (name, site) in fresh {
            running.push(
                async move {
                    let namespace =
                        cluster.ensure_namespace(&site_namespace(name), Some(name)).await;
                    let result = match namespace {
                        Ok(()) => report::site(cluster, name, site).await,
                        Err(error) => Err(error),
                    };
                    (name.clone(), result)
                }
                .boxed(),
            );
        }
        let results: Vec<_> =
            futures::stream::iter(running).buffer_unordered(RELEASES_AT_ONCE).collect().await;
        for (name, result) in results {
            let state = self.sites.entry(name.clone()).or_default();
            state.prepared = result.is_ok().then(|| rendered.sites[&name].clone());
            // A Site object that was not there a moment ago has no status yet.
            state.rewrite |= state.prepared.is_some();
            self.judge_sites_at = self.judge_sites_at.min(Instant::now() + SETTLE);
            if let Err(error) = result {
                fine = false;
                tracing::warn!(site = %name, %error, "the site's namespace could not be prepared");
            }
        }
        fine
    }

    /// Releases and sites that the commit does not have any more.
    async fn remove_what_left(&mut self, rendered: &Rendered) -> bool {
        let Some(roster) = rendered.roster.as_ref().filter(|_| rendered.prune) else { return true };
        let mut fine = true;
        let readable = self.releases.iter().filter(|(_, state)| !state.unreadable);
        let existing =
            readable.map(|(key, state)| (key.clone(), state.inventory.clone())).collect();
        for removal in plan_removals(roster, rendered, &existing) {
            let key = removal.release;
            let mut inventory = existing.get(&key).cloned().unwrap_or_default();
            let (deleted, failure) =
                release::prune(&self.cluster, &key, &removal.steps, &mut inventory).await;
            if let Some(failure) = failure {
                fine = false;
                tracing::warn!(release = %key, error = %failure.message, "a removed release could not be pruned; trying again");
                if let Some(state) = self.releases.get_mut(&key) {
                    state.inventory = inventory;
                }
                continue;
            }
            let names = deleted.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            report::event(
                &self.cluster,
                &report::release_id(&key),
                Mood::Normal,
                "Pruned",
                &format!("removed with its app: {names}"),
            )
            .await;
            let deleted = self
                .cluster
                .delete(fleet::API_VERSION, &report::release_id(&key), &DeleteParams::default())
                .await;
            match deleted {
                Ok(_) => {
                    tracing::info!(release = %key, objects = removal.steps.len(), "removed");
                    self.releases.remove(&key);
                    self.dirty.remove(&key);
                }
                Err(error) => {
                    fine = false;
                    tracing::warn!(release = %key, %error, "a removed release's report could not be deleted");
                }
            }
        }
        match self.remove_sites(roster).await {
            Ok(()) => fine,
            Err(error) => {
                tracing::warn!(%error, "a removed site could not be deleted; trying again");
                false
            }
        }
    }

    async fn remove_sites(&mut self, roster: &Roster) -> Result<(), ClusterError> {
        let api: Api<Namespace> = Api::all(self.cluster.client.clone());
        let params =
            ListParams::default().labels(&format!("{MANAGED_BY_LABEL}={MANAGED_BY},{SITE_LABEL}"));
        for namespace in within(api.list(&params)).await? {
            let Some(site) = namespace.labels().get(SITE_LABEL).cloned() else { continue };
            let ours = namespace.name_any() == site_namespace(&site);
            let busy = self.releases.keys().any(|key| key.site == site);
            if roster.has_site(&site)
                || !ours
                || busy
                || namespace.metadata.deletion_timestamp.is_some()
            {
                continue;
            }
            let name = namespace.name_any();
            self.cluster
                .delete(fleet::API_VERSION, &report::site_id(&site), &DeleteParams::default())
                .await?;
            let id = ObjectId::new("v1", "Namespace", "", &name);
            if self.cluster.delete("v1", &id, &DeleteParams::default()).await? == Pruned::Deleted {
                tracing::info!(%site, namespace = %name, "site removed");
            }
            self.sites.remove(&site);
        }
        Ok(())
    }

    /// How every site's nodes are with their OS.
    pub(super) fn judge_os(&mut self) {
        let Some(rendered) = self.current.as_ref().map(|current| current.rendered.clone()) else {
            return;
        };
        for (name, site) in &rendered.sites {
            let network = self.sites.get(name).and_then(|state| state.network.as_ref());
            let networks: Vec<&str> = network
                .into_iter()
                .flat_map(|network| [&network.cni, &network.proxy])
                .filter_map(|profile| profile.as_deref())
                .collect();
            let judged = site.os.as_ref().map(|target| {
                let nodes: Vec<_> =
                    site.spec.nodes.iter().map(|node| os::said(&self.live, node)).collect();
                judge(target, &networks, &nodes)
            });
            let state = self.sites.entry(name.clone()).or_default();
            if state.os != judged
                && let Some(os) = &judged
            {
                tracing::info!(site = %name, version = os.version, stopped = os.stopped, message = os.message, "os");
            }
            state.os = judged;
        }
    }

    /// What the commit says about nodes, on the Nodes: the label of their site, and the OS that they should run.
    pub(super) async fn mark_nodes(&mut self, rendered: &Rendered) -> bool {
        self.judge_os();
        let mut site_of: HashMap<&str, &str> = HashMap::new();
        for (name, site) in &rendered.sites {
            site_of.extend(site.spec.nodes.iter().map(|node| (node.as_str(), name.as_str())));
        }
        let mut fine = true;
        for node in self.live.all("", "Node") {
            let name = node.name_any();
            let site = site_of.get(name.as_str()).copied();
            let mut marks = Marks::default();
            // A mark is only taken away when all names are known.
            if site.is_some() || rendered.roster.is_some() {
                if node.labels().get(SITE_LABEL).map(String::as_str) != site {
                    marks.site = Some(site.map(str::to_owned));
                }
                let order = site.and_then(|site| rendered.sites[site].os.as_ref());
                let stopped = site
                    .and_then(|site| self.sites.get(site)?.os.as_ref())
                    .is_some_and(|os| os.stopped);
                let order = order.map(|target| os::text(&target.order));
                // Behind the gate a node keeps the order that it has.
                if !stopped && node.annotations().get(ORDER_ANNOTATION) != order.as_ref() {
                    marks.os = Some(order);
                }
            }
            if marks == Marks::default() {
                continue;
            }
            match self.cluster.mark_node(&name, &marks).await {
                Ok(()) => {
                    tracing::info!(node = %name, site = site.unwrap_or("none"), os = marks.os.is_some(), "node marked")
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => {
                    fine = false;
                    tracing::warn!(node = %name, %error, "node could not be marked");
                }
            }
        }
        fine
    }

    async fn note_done(&mut self, work: &Work, done: Done, pruned: Vec<ObjectId>, revision: &str) {
        let state = self.releases.entry(work.key.clone()).or_default();
        state.inventory = done.inventory;
        state.versions.extend(done.versions);
        let known = &state.inventory.objects;
        state.versions.retain(|id, _| known.contains_key(id));
        let digest = work.render().digest().as_str();
        let fresh = state.status.digest.as_deref() != Some(digest);
        if done.failure.is_none() {
            state.status.revision = Some(revision.to_owned());
            state.status.revision_short = Some(short(revision));
            if fresh {
                state.status.digest = Some(digest.to_owned());
                state.status.applied_at = Some(report::now());
            }
        }
        let failed = done.failure.is_some();
        self.note_failure(&work.key, revision, done.failure).await;
        let about = report::release_id(&work.key);
        if fresh && !failed {
            tracing::info!(release = %work.key, %revision, objects = done.applied, "applied");
            // The report comes first: an event may wait for a slow disk, the person who watches should not.
            self.judge().await;
            let message = format!("applied {} objects of {}", done.applied, short(revision));
            report::event(&self.cluster, &about, Mood::Normal, "Applied", &message).await;
        }
        if !pruned.is_empty() {
            let names = pruned.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            report::event(
                &self.cluster,
                &about,
                Mood::Normal,
                "Pruned",
                &format!("removed {names}"),
            )
            .await;
        }
    }

    async fn note_failure(&mut self, key: &ReleaseKey, revision: &str, failure: Option<Failure>) {
        let state = self.releases.entry(key.clone()).or_default();
        state.status.attempted_revision = Some(revision.to_owned());
        self.dirty.insert(key.clone());
        let news = failure.is_some() && state.failure != failure;
        match &failure {
            None => {
                state.attempts = 0;
                state.retry_at = None;
            }
            Some(failure) => {
                let last = if failure.transient { RETRY_LAST_TRANSIENT } else { RETRY_LAST };
                state.retry_at = Some(Instant::now() + pause(state.attempts, last));
                state.attempts += 1;
            }
        }
        state.failure = failure.clone();
        if let Some(failure) = failure.filter(|_| news) {
            tracing::warn!(release = %key, %revision, reason = failure.reason, error = %failure.message, "not applied");
            if failure.reason == "Rejected" && failure.message.contains("namespaces") {
                // Somebody may have deleted the namespace.
                if let Some(site) = self.sites.get_mut(&key.site) {
                    site.prepared = None;
                }
            }
            report::event(
                &self.cluster,
                &report::release_id(key),
                Mood::Warning,
                "Stalled",
                &failure.message,
            )
            .await;
        }
    }
}
