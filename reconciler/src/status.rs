//! What `skerry status` shows, read from the Fleet, Site and Release objects of a cluster.

use crate::cluster::{ClusterError, within};
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};
use serde::Serialize;
use skerry_api::fleet::v1alpha1::{
    FLEET_NAME, Fleet, Problem, Release, SYSTEM_NAMESPACE, Site, SiteNetwork, SiteOs,
};
use skerry_reconciler_core::health::age;
use std::time::Duration;

/// The fleet at a glance.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FleetStatus {
    /// Whether everything is as the newest commit says.
    pub ready: bool,
    /// A sentence about it.
    pub message: String,
    /// Where the repository is.
    pub remote: String,
    /// The branch in force.
    pub branch: String,
    /// The newest commit that was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// What is wrong in the repository, with hints.
    pub problems: Vec<Problem>,
    /// Sites, by name.
    pub sites: Vec<SiteRow>,
    /// Releases, by site and app.
    pub releases: Vec<ReleaseRow>,
}

/// One site.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SiteRow {
    /// Name.
    pub site: String,
    /// `Connected`, `Disconnected`, `Overdue` or `Unknown`.
    pub health: String,
    /// Nodes that are ready.
    pub nodes_ready: i64,
    /// Nodes that the site names.
    pub nodes_total: i64,
    /// How long it has been so: `45s`, `3h`.
    pub age: String,
    /// A sentence about it.
    pub message: String,
    /// The network that it gets, when it asks for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<SiteNetwork>,
    /// The OS that its nodes should run, when it follows a channel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub os: Option<SiteOs>,
}

/// One app on one site.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReleaseRow {
    /// Name of the site.
    pub site: String,
    /// Name of the app.
    pub app: String,
    /// `Ready`, `Progressing`, `Pending`, `Failed` or `Stalled`.
    pub health: String,
    /// Commit whose objects are all applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Pods that are ready.
    pub pods_ready: i64,
    /// Pods that should be.
    pub pods_total: i64,
    /// How long ago this content was applied; empty if it never was.
    pub age: String,
    /// A sentence about it.
    pub message: String,
}

/// Why the status could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StatusError {
    /// The cluster has never seen a reconciler.
    #[error("this cluster has no fleet")]
    NoFleet,
    /// The API could not be asked.
    #[error("the cluster could not be asked: {0}")]
    Cluster(String),
}

impl StatusError {
    /// What to do about it, shown after the error as `hint: …`.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoFleet => Some("start the reconciler, or check the kubeconfig".to_owned()),
            Self::Cluster(_) => Some("check the kubeconfig and that the API is up".to_owned()),
        }
    }
}

impl From<ClusterError> for StatusError {
    fn from(error: ClusterError) -> Self {
        // Without our definitions the API does not know the path.
        if error.is_not_found() { Self::NoFleet } else { Self::Cluster(error.to_string()) }
    }
}

/// Reads the fleet's status.
///
/// # Errors
///
/// [`StatusError`] if there is no fleet in the cluster or it cannot be asked.
pub async fn status(client: Client) -> Result<FleetStatus, StatusError> {
    let fleets: Api<Fleet> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let fleet = within(fleets.get_opt(FLEET_NAME)).await?.ok_or(StatusError::NoFleet)?;
    let sites = within(Api::<Site>::all(client.clone()).list(&ListParams::default())).await?;
    let releases = within(Api::<Release>::all(client).list(&ListParams::default())).await?;

    let mut sites: Vec<_> = sites
        .into_iter()
        .map(|site| {
            let status = site.status.clone().unwrap_or_default();
            SiteRow {
                site: site.name_any(),
                health: if status.health.is_empty() { "Unknown".to_owned() } else { status.health },
                nodes_ready: status.nodes_ready,
                nodes_total: status.nodes_total,
                age: since(status.since.as_deref()),
                // A site that gets nothing new says why before it says how its nodes are.
                message: match &status.network {
                    Some(network) if network.stopped => {
                        format!("stopped at the gate: {}", network.message)
                    }
                    _ => match status.os.as_ref().filter(|os| os.hint.is_some()) {
                        Some(os) => format!("{}; OS: {}", status.message, os.message),
                        None => status.message,
                    },
                },
                network: status.network,
                os: status.os,
            }
        })
        .collect();
    sites.sort_by(|a, b| a.site.cmp(&b.site));
    let mut releases: Vec<_> = releases
        .into_iter()
        .map(|release| {
            let status = release.status.unwrap_or_default();
            ReleaseRow {
                site: release.spec.site,
                app: release.spec.app,
                health: if status.health.is_empty() {
                    "Progressing".to_owned()
                } else {
                    status.health
                },
                revision: status.revision,
                pods_ready: status.pods_ready,
                pods_total: status.pods_total,
                age: since(status.applied_at.as_deref()),
                message: status.message,
            }
        })
        .collect();
    releases.sort_by(|a, b| (&a.site, &a.app).cmp(&(&b.site, &b.app)));

    let status = fleet.status.unwrap_or_default();
    let ready = status.conditions.iter().find(|condition| condition.kind == "Ready");
    let unready = releases.iter().filter(|release| release.health != "Ready").count();
    let fleet_ready = ready.is_some_and(|ready| ready.status == "True");
    let message = match unready {
        0 => ready.map(|ready| ready.message.clone()).unwrap_or_default(),
        _ if !fleet_ready => ready.map(|ready| ready.message.clone()).unwrap_or_default(),
        _ => format!("{unready} of {} releases are not ready", releases.len()),
    };
    Ok(FleetStatus {
        ready: fleet_ready && unready == 0,
        message,
        remote: status.remote,
        branch: status.branch,
        revision: status.revision,
        problems: status.problems,
        sites,
        releases,
    })
}

fn since(time: Option<&str>) -> String {
    let Some(time) = time.and_then(|time| time.parse::<jiff::Timestamp>().ok()) else {
        return String::new();
    };
    age(Duration::try_from(jiff::Timestamp::now().duration_since(time)).unwrap_or_default())
}
