//! Writes what people look at: Release, Site and Fleet objects, and Kubernetes events. Nothing else reports.

use crate::cluster::{Cluster, ClusterError, MANAGER, within};
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Api, PostParams};
use serde_json::{Value, json};
use skerry_api::fleet::v1alpha1::{
    API_VERSION, APP_LABEL, FLEET_NAME, FleetStatus, MANAGED_BY, MANAGED_BY_LABEL, ReleaseStatus,
    SITE_LABEL, SYSTEM_NAMESPACE, SiteStatus, site_namespace,
};
use skerry_reconciler_core::{ObjectId, ReleaseKey, RenderedSite};

/// Longest note of an event, in bytes; the API refuses longer ones.
const NOTE_MAX: usize = 1024;

/// Now, as Kubernetes writes it.
pub(crate) fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Writes a Release's status; makes the object first if it is not there.
pub(crate) async fn release(
    cluster: &Cluster,
    key: &ReleaseKey,
    status: &ReleaseStatus,
) -> Result<(), ClusterError> {
    let id = release_id(key);
    let value = json!({
        "apiVersion": API_VERSION,
        "kind": "Release",
        "metadata": {"name": key.app, "namespace": id.namespace},
        "status": status,
    });
    match cluster.apply_status(&id, &value).await {
        Err(error) if error.is_not_found() => {
            let object = json!({
                "apiVersion": API_VERSION,
                "kind": "Release",
                "metadata": {
                    "name": key.app,
                    "namespace": id.namespace,
                    "labels": {SITE_LABEL: key.site, APP_LABEL: key.app, MANAGED_BY_LABEL: MANAGED_BY},
                },
                "spec": {"app": key.app, "site": key.site},
            });
            cluster.apply(&id, &object, false).await?;
            cluster.apply_status(&id, &value).await.map(drop)
        }
        result => result.map(drop),
    }
}

/// Writes a Site object, without its status.
pub(crate) async fn site(
    cluster: &Cluster,
    name: &str,
    site: &RenderedSite,
) -> Result<(), ClusterError> {
    let id = site_id(name);
    let mut labels = json!(site.labels);
    labels[SITE_LABEL] = Value::from(name);
    labels[MANAGED_BY_LABEL] = Value::from(MANAGED_BY);
    let object = json!({
        "apiVersion": API_VERSION,
        "kind": "Site",
        "metadata": {"name": name, "namespace": id.namespace, "labels": labels},
        "spec": site.spec,
    });
    cluster.apply(&id, &object, false).await.map(drop)
}

/// Writes a Site's status.
pub(crate) async fn site_status(
    cluster: &Cluster,
    name: &str,
    status: &SiteStatus,
) -> Result<(), ClusterError> {
    let id = site_id(name);
    let object = json!({
        "apiVersion": API_VERSION,
        "kind": "Site",
        "metadata": {"name": name, "namespace": id.namespace},
        "status": status,
    });
    cluster.apply_status(&id, &object).await.map(drop)
}

/// Writes the Fleet object, status included; makes it and its namespace first if they are not there.
pub(crate) async fn fleet(
    cluster: &Cluster,
    spec: &Value,
    status: &FleetStatus,
) -> Result<(), ClusterError> {
    let id = fleet_id();
    let labels = json!({MANAGED_BY_LABEL: MANAGED_BY});
    let metadata = json!({"name": FLEET_NAME, "namespace": SYSTEM_NAMESPACE, "labels": labels});
    let object =
        json!({"apiVersion": API_VERSION, "kind": "Fleet", "metadata": metadata, "spec": spec});
    match cluster.apply(&id, &object, false).await {
        Err(error) if error.is_not_found() => {
            cluster.ensure_namespace(SYSTEM_NAMESPACE, None).await?;
            cluster.apply(&id, &object, false).await?;
        }
        result => drop(result?),
    }
    let object = json!({"apiVersion": API_VERSION, "kind": "Fleet", "metadata": {"name": FLEET_NAME, "namespace": SYSTEM_NAMESPACE}, "status": status});
    cluster.apply_status(&id, &object).await.map(drop)
}

pub(crate) fn release_id(key: &ReleaseKey) -> ObjectId {
    ObjectId::new(API_VERSION, "Release", &site_namespace(&key.site), &key.app)
}

pub(crate) fn site_id(name: &str) -> ObjectId {
    ObjectId::new(API_VERSION, "Site", &site_namespace(name), name)
}

pub(crate) fn fleet_id() -> ObjectId {
    ObjectId::new(API_VERSION, "Fleet", SYSTEM_NAMESPACE, FLEET_NAME)
}

/// Whether an event is good news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    Normal,
    Warning,
}

/// Notes an event at one of our objects. A lost event is logged and forgotten: the status has the same facts.
pub(crate) async fn event(
    cluster: &Cluster,
    about: &ObjectId,
    mood: Mood,
    reason: &str,
    message: &str,
) {
    let timestamp = jiff::Timestamp::now();
    let time = Time(timestamp);
    let mut note = message.to_owned();
    if note.len() > NOTE_MAX {
        let end = (0..=NOTE_MAX - 3).rev().find(|end| note.is_char_boundary(*end)).unwrap_or(0);
        note.truncate(end);
        note.push('…');
    }
    let event = Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{:x}", about.name, timestamp.as_nanosecond())),
            namespace: Some(about.namespace.clone()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some(API_VERSION.to_owned()),
            kind: Some(about.kind.clone()),
            name: Some(about.name.clone()),
            namespace: Some(about.namespace.clone()),
            ..ObjectReference::default()
        },
        type_: Some(if mood == Mood::Normal { "Normal" } else { "Warning" }.to_owned()),
        reason: Some(reason.to_owned()),
        message: Some(note),
        source: Some(EventSource { component: Some(MANAGER.to_owned()), host: None }),
        first_timestamp: Some(time.clone()),
        last_timestamp: Some(time),
        count: Some(1),
        ..Event::default()
    };
    let api: Api<Event> = Api::namespaced(cluster.client.clone(), &about.namespace);
    if let Err(error) = within(api.create(&PostParams::default(), &event)).await {
        tracing::debug!(object = %about, %error, "event lost");
    }
}
