//! A picture of the objects that carry our label, kept by one watch per kind.
//!
//! The driver starts a watch for each kind that a release owns, and for pods and nodes. Each change comes back as a
//! [`Change`]; the objects themselves are in the picture. What nobody reads (managed fields, the content of ConfigMaps
//! and Secrets, a node's image list) is dropped on arrival.

use crate::qualification;
use futures::StreamExt;
use kube::api::{Api, ApiResource, DynamicObject};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::{self, Event, watcher};
use kube::runtime::{WatchStreamExt, reflector as reflect};
use kube::{Client, ResourceExt};
use serde_json::Value;
use skerry_api::fleet::os::{ORDER_ANNOTATION, PROGRESS_ANNOTATION, VERSION_ANNOTATION};
use skerry_api::fleet::v1alpha1::{
    self as fleet, APP_LABEL, MANAGED_BY, MANAGED_BY_LABEL, SITE_LABEL,
};
use skerry_reconciler_core::{ObjectId, ReleaseKey};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Changes that wait for the driver; a watch waits when there are more.
pub(crate) const CHANGES_MAX: usize = 1024;

/// Something changed in the cluster.
#[derive(Debug)]
pub(crate) enum Change {
    /// An object of a release.
    Object { release: ReleaseKey, id: ObjectId, version: Version, deleted: bool },
    /// A node, or what it reported of its kernel.
    Node,
    /// One of our own reports was deleted: a Release has site and app, a Site has a site, a Fleet has neither.
    ReportGone { site: Option<String>, app: Option<String> },
    /// A watch has its first full picture, or a new one.
    Synced,
}

/// State of an object that tells a change of ours from one of somebody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Version {
    /// `metadata.resourceVersion`, if it is a number (it is in every Kubernetes server).
    pub(crate) resource: u64,
    /// `metadata.generation`; kinds without a status have none.
    pub(crate) generation: Option<i64>,
}

impl Version {
    pub(crate) fn of(object: &DynamicObject) -> Self {
        let resource =
            object.resource_version().and_then(|version| version.parse().ok()).unwrap_or_default();
        Self { resource, generation: object.metadata.generation }
    }

    /// Whether `self` shows that what `applied` left was changed since.
    pub(crate) fn drifted_from(self, applied: Self) -> bool {
        self.resource > applied.resource
            && (self.generation.is_none() || self.generation != applied.generation)
    }
}

/// The picture.
pub(crate) struct Live {
    client: Client,
    changes: mpsc::Sender<Change>,
    watches: HashMap<(String, String), Watch>,
}

struct Watch {
    resource: ApiResource,
    store: Store<DynamicObject>,
    task: AbortHandle,
}

impl Live {
    pub(crate) fn new(client: Client, changes: mpsc::Sender<Change>) -> Self {
        Self { client, changes, watches: HashMap::new() }
    }

    /// Whether a kind is watched.
    pub(crate) fn has(&self, group: &str, kind: &str) -> bool {
        self.watches.contains_key(&(group.to_owned(), kind.to_owned()))
    }

    /// Starts to watch a kind; does nothing if it is watched.
    pub(crate) fn watch(&mut self, resource: ApiResource) {
        let key = (resource.group.clone(), resource.kind.clone());
        if self.watches.contains_key(&key) {
            return;
        }
        let is_node = key == (String::new(), "Node".to_owned());
        let is_kernel = qualification::is_report(&resource.group, &resource.kind);
        let is_report = resource.group == fleet::GROUP && !is_kernel;
        let selector = format!("{MANAGED_BY_LABEL}={MANAGED_BY}");
        let config = if is_node || is_kernel {
            watcher::Config::default()
        } else {
            watcher::Config::default().labels(&selector)
        };
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let writer = reflector::store::Writer::new(resource.clone());
        let store = writer.as_reader();
        let stream = watcher(api, config).default_backoff().modify(slim);
        let api_version = resource.api_version.clone();
        let kind = resource.kind.clone();
        let changes = self.changes.clone();
        let task = tokio::spawn(async move {
            let mut stream = std::pin::pin!(reflect(writer, stream));
            while let Some(event) = stream.next().await {
                let change = match event {
                    Ok(Event::Apply(_) | Event::Delete(_)) if is_node || is_kernel => {
                        Some(Change::Node)
                    }
                    Ok(Event::Delete(object)) if is_report => {
                        let label = |name: &str| object.labels().get(name).cloned();
                        Some(Change::ReportGone { site: label(SITE_LABEL), app: label(APP_LABEL) })
                    }
                    Ok(Event::Apply(_) | Event::InitApply(_)) if is_report => None,
                    Ok(Event::Delete(object)) => change(&api_version, &kind, &object, true),
                    Ok(Event::Apply(object) | Event::InitApply(object)) => {
                        change(&api_version, &kind, &object, false)
                    }
                    Ok(Event::InitDone) => Some(Change::Synced),
                    Ok(Event::Init) => None,
                    Err(error) => {
                        tracing::debug!(resource = %kind, error = %crate::git::chain(&error), "watch interrupted");
                        None
                    }
                };
                if let Some(change) = change
                    && changes.send(change).await.is_err()
                {
                    return;
                }
            }
        });
        self.watches.insert(key, Watch { resource, store, task: task.abort_handle() });
    }

    /// The live object; `None` if it is not there, `Err` if its kind is not watched or not known yet.
    pub(crate) fn get(&self, id: &ObjectId) -> Result<Option<Arc<DynamicObject>>, NotWatched> {
        let watch = self.watches.get(&(id.group.clone(), id.kind.clone())).ok_or(NotWatched)?;
        let mut reference = ObjectRef::new_with(&id.name, watch.resource.clone());
        if !id.namespace.is_empty() {
            reference = reference.within(&id.namespace);
        }
        Ok(watch.store.get(&reference))
    }

    /// Waits until the first full picture of a kind is there, for at most `longest`. Returns at once when it is not watched.
    pub(crate) async fn synced(&self, group: &str, kind: &str, longest: Duration) {
        let Some(watch) = self.watches.get(&(group.to_owned(), kind.to_owned())) else { return };
        let store = watch.store.clone();
        let _ = tokio::time::timeout(longest, store.wait_until_ready()).await;
    }

    /// All live objects of a kind.
    pub(crate) fn all(&self, group: &str, kind: &str) -> Vec<Arc<DynamicObject>> {
        self.watches
            .get(&(group.to_owned(), kind.to_owned()))
            .map(|watch| watch.store.state())
            .unwrap_or_default()
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        for watch in self.watches.values() {
            watch.task.abort();
        }
    }
}

/// A kind that no watch covers.
#[derive(Debug)]
pub(crate) struct NotWatched;

fn change(api_version: &str, kind: &str, object: &DynamicObject, deleted: bool) -> Option<Change> {
    let labels = object.labels();
    let release =
        ReleaseKey { site: labels.get(SITE_LABEL)?.clone(), app: labels.get(APP_LABEL)?.clone() };
    let id = ObjectId::new(
        api_version,
        kind,
        &object.namespace().unwrap_or_default(),
        &object.name_any(),
    );
    Some(Change::Object { release, id, version: Version::of(object), deleted })
}

/// Drops what nobody reads.
fn slim(object: &mut DynamicObject) {
    object.metadata.managed_fields = None;
    // Those that say what a node should run, and what it does.
    let kept = |key: &String| {
        [ORDER_ANNOTATION, PROGRESS_ANNOTATION, VERSION_ANNOTATION].contains(&key.as_str())
    };
    if let Some(annotations) = &mut object.metadata.annotations {
        annotations.retain(|key, _| kept(key));
    }
    if object.types.as_ref().is_some_and(|types| types.kind == qualification::KIND) {
        qualification::slim(object);
        return;
    }
    let is_report =
        object.types.as_ref().is_some_and(|types| types.api_version == fleet::API_VERSION);
    if let Some(fields) = object.data.as_object_mut() {
        if is_report {
            fields.clear();
        }
        fields.remove("data");
        fields.remove("stringData");
        fields.remove("binaryData");
    }
    if let Some(status) = object.data.get_mut("status").and_then(Value::as_object_mut) {
        status.remove("images");
    }
}

/// The object as the judges of health read it.
pub(crate) fn to_value(object: &DynamicObject) -> Value {
    serde_json::to_value(object).unwrap_or_default()
}
