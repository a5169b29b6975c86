//! Verdicts on releases, sites and the fleet, and their reports.

use super::{Driver, RELEASES_AT_ONCE, RETRY_FIRST, short};
use crate::cluster::ClusterError;
use crate::live::{Version, to_value};
use crate::report;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use kube::ResourceExt;
use serde_json::{Value, json};
use skerry_api::fleet::v1alpha1::{
    self as fleet, FleetStatus, PROBLEMS_MAX, Problem, ReleaseStatus, SITE_LABEL, SiteNetwork,
    SiteStatus,
};
use skerry_reconciler_core::health::{self, NodeState, ReleaseWord, SiteWord};
use skerry_reconciler_core::{ObjectId, ReleaseKey, RenderedSite};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

impl Driver {
    /// Judges every release that something happened to, and reports it if the verdict is another one.
    pub(super) async fn judge(&mut self) {
        self.judge_at = None;
        let keys = std::mem::take(&mut self.dirty);
        let mut words: BTreeMap<String, (SiteWord, String)> = BTreeMap::new();
        let mut verdicts = Vec::new();
        let mut kind_gone = false;
        for key in keys {
            let site =
                words.entry(key.site.clone()).or_insert_with(|| self.site_word(&key.site)).clone();
            let Some(mut status) = self.release_status(&key, site) else { continue };
            let state = self.releases.get(&key).expect("it has a status");
            let as_now = |written: &ReleaseStatus| ReleaseStatus {
                observed_at: status.observed_at.clone(),
                ..written.clone()
            };
            if state.written.as_ref().is_some_and(|written| as_now(written) == status) {
                continue;
            }
            if as_now(&state.status) == status {
                // Nothing new was observed; it is only written again.
                status.observed_at.clone_from(&state.status.observed_at);
            }
            verdicts.push((key, status));
        }
        let cluster = &self.cluster;
        let mut running: Vec<BoxFuture<'_, _>> = Vec::with_capacity(verdicts.len());
        for (key, status) in verdicts {
            running.push(
                async move {
                    let result = report::release(cluster, &key, &status).await;
                    (key, status, result)
                }
                .boxed(),
            );
        }
        let written: Vec<_> =
            futures::stream::iter(running).buffer_unordered(RELEASES_AT_ONCE).collect().await;
        for (key, status, result) in written {
            match result {
                Ok(()) => {
                    if let Some(state) = self.releases.get_mut(&key) {
                        state.status = status.clone();
                        state.written = Some(status);
                    }
                }
                Err(error) => {
                    tracing::warn!(release = %key, %error, "the release's report could not be written; trying again");
                    kind_gone |= matches!(error, ClusterError::UnknownKind { .. });
                    self.dirty.insert(key);
                    self.judge_at = Some(Instant::now() + RETRY_FIRST);
                }
            }
        }
        if kind_gone {
            self.install_definitions().await;
        }
    }

    fn release_status(
        &self,
        key: &ReleaseKey,
        (site, site_message): (SiteWord, String),
    ) -> Option<ReleaseStatus> {
        let state = self.releases.get(key)?;
        let mut objects = Vec::new();
        for (id, _) in
            state.inventory.objects.iter().filter(|(_, item)| !item.digest.as_str().is_empty())
        {
            let Ok(live) = self.live.get(id) else { continue };
            let mut value = live.as_deref().map(to_value);
            let behind = live
                .as_deref()
                .zip(state.versions.get(id))
                .is_some_and(|(live, applied)| Version::of(live).resource < applied.resource);
            if let Some(value) = value.as_mut().filter(|_| behind) {
                // The picture is older than our own apply; its status must not be taken for the new one's.
                value["metadata"]["generation"] = json!(i64::MAX);
            }
            objects.push((id.to_string(), value));
        }
        let pods: Vec<Value> = self
            .live
            .all("", "Pod")
            .iter()
            .filter(|pod| {
                let labels = pod.labels();
                labels.get(SITE_LABEL) == Some(&key.site)
                    && labels.get(fleet::APP_LABEL) == Some(&key.app)
            })
            .map(|pod| to_value(pod))
            .collect();
        let judged = health::release(
            objects.iter().map(|(name, value)| (name.clone(), value.as_ref())),
            &pods,
            (site, &site_message),
        );
        let now = report::now();
        let (word, reason, message) = match &state.failure {
            Some(failure) => (ReleaseWord::Stalled, failure.reason, failure.message.clone()),
            None => {
                let reason = match judged.word {
                    ReleaseWord::Ready => "Applied",
                    ReleaseWord::Progressing => "Progressing",
                    ReleaseWord::Pending => "SiteUnreachable",
                    ReleaseWord::Failed | ReleaseWord::Stalled => "WorkloadFailed",
                };
                (judged.word, reason, judged.message)
            }
        };
        Some(ReleaseStatus {
            health: word.as_str().to_owned(),
            conditions: health::conditions(word, reason, &message, &state.status.conditions, &now),
            message,
            pods_ready: judged.pods_ready,
            pods_total: judged.pods_total,
            observed_at: Some(now),
            inventory: state.inventory.entries(),
            ..state.status.clone()
        })
    }

    fn current_site(&self, name: &str) -> Option<&RenderedSite> {
        self.current.as_ref()?.rendered.sites.get(name)
    }

    fn site_word(&self, name: &str) -> (SiteWord, String) {
        let Some(site) = self.current_site(name) else {
            // Before the first commit is read, or while the site's file is broken: what was said last.
            let status = self.sites.get(name).and_then(|state| state.status.as_ref());
            let word = match status.map(|status| status.health.as_str()) {
                Some("Connected") => SiteWord::Connected,
                Some("Disconnected") => SiteWord::Disconnected,
                Some("Overdue") => SiteWord::Overdue,
                _ => SiteWord::Unknown,
            };
            return (word, status.map(|status| status.message.clone()).unwrap_or_default());
        };
        let states: Vec<NodeState> =
            site.spec.nodes.iter().map(|node| self.node_state(node)).collect();
        health::site(&states, site.offline_budget)
    }

    fn node_state(&self, name: &str) -> NodeState {
        let Ok(Some(node)) = self.live.get(&ObjectId::new("v1", "Node", "", name)) else {
            return NodeState::Absent;
        };
        let conditions = node.data["status"]["conditions"].as_array();
        let ready = conditions.into_iter().flatten().find(|condition| condition["type"] == "Ready");
        match ready {
            Some(ready) if ready["status"] == "True" => NodeState::Ready,
            Some(ready) => {
                let since = ready["lastTransitionTime"]
                    .as_str()
                    .and_then(|text| text.parse::<jiff::Timestamp>().ok());
                let silent = since.and_then(|since| {
                    Duration::try_from(jiff::Timestamp::now().duration_since(since)).ok()
                });
                NodeState::Silent(silent.unwrap_or_default())
            }
            None => NodeState::Silent(Duration::ZERO),
        }
    }

    pub(super) async fn judge_sites(&mut self) {
        let Some(rendered) = self.current.as_ref().map(|current| current.rendered.clone()) else {
            return;
        };
        self.choose_networks();
        self.judge_os();
        for (name, site) in &rendered.sites {
            let (word, message) = self.site_word(name);
            let ready = site
                .spec
                .nodes
                .iter()
                .filter(|node| self.node_state(node) == NodeState::Ready)
                .count();
            let state = self.sites.entry(name.clone()).or_default();
            let before = state.status.as_ref();
            let same_word = before.filter(|before| before.health == word.as_str());
            let status = SiteStatus {
                health: word.as_str().to_owned(),
                nodes_ready: i64::try_from(ready).unwrap_or(i64::MAX),
                nodes_total: i64::try_from(site.spec.nodes.len()).unwrap_or(i64::MAX),
                message,
                since: same_word
                    .and_then(|before| before.since.clone())
                    .or_else(|| Some(report::now())),
                network: state.network.as_ref().map(|network| SiteNetwork {
                    cni: network.cni.clone(),
                    proxy: network.proxy.clone(),
                    stopped: network.stop.is_some(),
                    message: network
                        .stop
                        .as_ref()
                        .map_or_else(|| network.message.clone(), |stop| stop.message.clone()),
                    hint: network.stop.as_ref().map(|stop| stop.hint.clone()),
                }),
                os: state.os.clone(),
            };
            if before == Some(&status) && !state.rewrite {
                continue;
            }
            if same_word.is_none() {
                tracing::info!(site = %name, health = %status.health, "site");
            }
            match report::site_status(&self.cluster, name, &status).await {
                Ok(()) => {
                    state.status = Some(status);
                    state.rewrite = false;
                }
                Err(error) => {
                    tracing::debug!(site = %name, %error, "the site's report could not be written")
                }
            }
            self.dirty.extend(self.releases.keys().filter(|key| key.site == *name).cloned());
        }
        self.judge().await;
    }

    pub(super) async fn report_fleet(&mut self) {
        let now = report::now();
        let before = self
            .fleet
            .written
            .as_ref()
            .map(|(_, status)| status.conditions.clone())
            .unwrap_or_default();
        let rendered = self.current.as_ref().map(|current| &current.rendered);
        let mut problems = rendered.map(|rendered| rendered.all_problems()).unwrap_or_default();
        let count = problems.len();
        problems.truncate(PROBLEMS_MAX);
        let stalled = self.releases.values().filter(|state| state.failure.is_some()).count();
        let condition = |kind: &str, status: bool, reason: &str, message: &str| {
            health::condition_from(
                kind,
                if status { "True" } else { "False" },
                reason,
                message,
                &before,
                &now,
            )
        };
        let fetched = match &self.fleet.fetch_error {
            Some((message, reason, hint)) => {
                if problems.len() < PROBLEMS_MAX {
                    problems.insert(
                        0,
                        Problem {
                            message: message.clone(),
                            hint: hint.clone(),
                            ..Problem::default()
                        },
                    );
                }
                condition("Fetched", false, reason, message)
            }
            None => condition("Fetched", true, "RemoteAnswers", "the remote answers"),
        };
        let revision = self.current.as_ref().map(|current| current.revision.clone());
        let (ready, reason, message) = match (&self.fleet.fetch_error, &revision) {
            (Some((message, reason, _)), _) => (false, *reason, message.clone()),
            (None, None) => (false, "Waiting", "no commit has been read yet".to_owned()),
            (None, Some(_)) if count > 0 => {
                let message = format!("{} in the repository", counted(count, "problem"));
                (false, "Problems", message)
            }
            (None, Some(_)) if stalled > 0 => {
                let message = format!("{} could not be applied", counted(stalled, "release"));
                (false, "Stalled", message)
            }
            (None, Some(revision)) => (true, "Applied", format!("{} is applied", short(revision))),
        };
        let conditions = vec![
            condition("Ready", ready, reason, &message),
            fetched,
            condition("Stalled", !ready && reason != "Waiting", reason, &message),
        ];
        let status = FleetStatus {
            remote: self.remote.clone(),
            branch: self.branch.clone(),
            revision,
            conditions,
            problems,
            sites: rendered
                .map_or(0, |rendered| i64::try_from(rendered.sites.len()).unwrap_or(i64::MAX)),
            releases: rendered
                .map_or(0, |rendered| i64::try_from(rendered.releases.len()).unwrap_or(i64::MAX)),
        };
        let spec = match rendered {
            Some(rendered) if rendered.fleet.is_some() => {
                json!({"name": rendered.fleet, "prune": rendered.prune})
            }
            _ => json!({}),
        };
        let report = (spec, status);
        if self.fleet.written.as_ref() == Some(&report) {
            return;
        }
        match report::fleet(&self.cluster, &report.0, &report.1).await {
            Ok(()) => self.fleet.written = Some(report),
            Err(error) => {
                tracing::warn!(%error, "the fleet's report could not be written; trying again");
                self.schedule_rest();
            }
        }
    }
}

/// `1 problem`, `2 problems`.
fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}
