//! The start: our definitions are installed, what earlier runs left is read, the watches begin.

use super::{
    Driver, FleetReport, JUDGE_SITES, RESYNC, RETRY_LAST_TRANSIENT, ReleaseState, SiteState,
};
use crate::Config;
use crate::cluster::{Cluster, ClusterError, within};
use crate::git::without_credentials;
use crate::live::{CHANGES_MAX, Live};
use crate::qualification;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};
use skerry_api::fleet::v1alpha1::{
    self as fleet, FLEET_NAME, Fleet, Release, SYSTEM_NAMESPACE, Site, site_namespace,
};
use skerry_reconciler_core::{Inventory, ObjectId, ReleaseKey};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

impl Driver {
    /// Connects to the cluster: installs our definitions, reads what earlier runs left, starts the watches. Tries until
    /// it works or `stop`.
    pub(crate) async fn start(
        client: Client,
        config: &Config,
        stop: &CancellationToken,
    ) -> Option<Self> {
        let cluster = Cluster::new(client.clone());
        let mut pause = Duration::from_millis(200);
        loop {
            let attempt = async {
                install(&cluster).await?;
                cluster.ensure_namespace(SYSTEM_NAMESPACE, None).await?;
                load(&cluster).await
            };
            let result = tokio::select! {
                () = stop.cancelled() => return None,
                result = attempt => result,
            };
            match result {
                Ok(Loaded { releases, sites, revision_before }) => {
                    let (sender, changes) = mpsc::channel(CHANGES_MAX);
                    let now = Instant::now();
                    let mut driver = Self {
                        live: Live::new(client, sender),
                        cluster,
                        changes,
                        remote: without_credentials(&config.remote),
                        branch: config.branch.clone(),
                        current: None,
                        dirty: releases.keys().cloned().collect(),
                        releases,
                        sites,
                        fleet: FleetReport::default(),
                        revision_before,
                        judge_at: None,
                        judge_sites_at: now + JUDGE_SITES,
                        resync_at: now + RESYNC,
                        retry_rest: None,
                    };
                    driver.watch_basics().await;
                    return Some(driver);
                }
                Err(error) => {
                    tracing::warn!(%error, retry_s = pause.as_secs_f32(), "the cluster is not ready for the reconciler");
                    tokio::select! {
                        () = stop.cancelled() => return None,
                        () = tokio::time::sleep(pause) => {}
                    }
                    pause = (pause * 2).min(RETRY_LAST_TRANSIENT);
                }
            }
        }
    }

    async fn watch_basics(&mut self) {
        let own = ["Fleet", "Site", "Release", qualification::KIND]
            .map(|kind| (fleet::API_VERSION, kind));
        let basics = [("v1", "Node"), ("v1", "Pod")]
            .into_iter()
            .chain(own)
            .map(|(version, kind)| (ObjectId::new(version, kind, "", ""), version.to_owned()));
        let owned = self.releases.values().flat_map(|state| {
            state.inventory.objects.iter().map(|(id, item)| (id.clone(), item.api_version.clone()))
        });
        let kinds: Vec<_> = basics.chain(owned).collect();
        self.watch_kinds(kinds).await;
    }

    pub(super) async fn watch_kinds(&mut self, kinds: Vec<(ObjectId, String)>) {
        let mut asked = BTreeSet::new();
        for (id, api_version) in kinds {
            if self.live.has(&id.group, &id.kind)
                || !asked.insert((api_version.clone(), id.kind.clone()))
            {
                continue;
            }
            match self.cluster.resolve(&api_version, &id.kind).await {
                Ok((resource, _)) => self.live.watch(resource),
                Err(error) => {
                    tracing::debug!(kind = %id.kind, %error, "kind cannot be watched yet")
                }
            }
        }
    }
}

/// Installs the definitions of Fleet, Site, Release and NodeQualification, and waits until they are served.
pub(super) async fn install(cluster: &Cluster) -> Result<(), ClusterError> {
    let api: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    for crd in fleet::crds() {
        let name = crd["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let id = ObjectId::new("apiextensions.k8s.io/v1", "CustomResourceDefinition", "", &name);
        match cluster.apply(&id, &crd, false).await {
            Ok(_) => {}
            // Somebody with more rights may have installed them.
            Err(ClusterError::Rejected { reason, message }) if reason == "Forbidden" => {
                if within(api.get_opt(&name)).await?.is_none() {
                    return Err(ClusterError::Rejected { reason, message });
                }
            }
            Err(error) => return Err(error),
        }
    }
    for kind in ["Fleet", "Site", "Release", qualification::KIND] {
        cluster.resolve(fleet::API_VERSION, kind).await?;
    }
    Ok(())
}

struct Loaded {
    releases: BTreeMap<ReleaseKey, ReleaseState>,
    sites: BTreeMap<String, SiteState>,
    revision_before: Option<String>,
}

/// What earlier runs left in the cluster.
async fn load(cluster: &Cluster) -> Result<Loaded, ClusterError> {
    let mut releases = BTreeMap::new();
    let api: Api<Release> = Api::all(cluster.client.clone());
    for release in within(api.list(&ListParams::default())).await? {
        let key = ReleaseKey { site: release.spec.site.clone(), app: release.spec.app.clone() };
        if release.namespace().as_deref() != Some(&site_namespace(&key.site)) {
            continue;
        }
        let status = release.status.unwrap_or_default();
        let inventory = Inventory::from_entries(&status.inventory);
        if let Err(error) = &inventory {
            tracing::error!(release = %key, %error, "the stored inventory is damaged; nothing of this release will be pruned");
        }
        let state = ReleaseState {
            unreadable: inventory.is_err(),
            inventory: inventory.unwrap_or_default(),
            written: Some(status.clone()),
            status,
            ..ReleaseState::default()
        };
        releases.insert(key, state);
    }
    let mut sites = BTreeMap::new();
    let api: Api<Site> = Api::all(cluster.client.clone());
    for site in within(api.list(&ListParams::default())).await? {
        sites.insert(site.name_any(), SiteState { status: site.status, ..SiteState::default() });
    }
    let api: Api<Fleet> = Api::namespaced(cluster.client.clone(), SYSTEM_NAMESPACE);
    let fleet = within(api.get_opt(FLEET_NAME)).await?;
    let revision_before = fleet.and_then(|fleet| fleet.status?.revision);
    Ok(Loaded { releases, sites, revision_before })
}
