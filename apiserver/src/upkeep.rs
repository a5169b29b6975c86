//! What keeps the stored objects consistent, close to the storage: first objects, contents of namespaces, objects of
//! removed definitions, owner references, expiry, compaction.
//!
//! One task, one queue of jobs without duplicates. It is fed by every committed change; when it has missed some it
//! asks the store what is unfinished. A job that cannot finish yet (a pod that still stops, a finalizer of somebody
//! else) is tried again when something happens to what it waits for, and every few seconds.

use crate::api::{Api, place, store_failed};
use crate::handlers::body;
use crate::handlers::delete::{DeleteOptions, FOREGROUND, ORPHAN, Propagation};
use crate::handlers::kinds::{API_ADDRESS, CRD_FINALIZER};
use crate::handlers::write::{Options, Writer, namespace_key};
use crate::hub::{Event, Op};
use crate::store::{Key, Range};
use serde_json::{Value, json};
use skerry_apiserver_core::catalog::{Catalog, Resource};
use skerry_apiserver_core::status::ApiError;
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;

/// Name under which these writes own fields.
const MANAGER: &str = "skerry-apiserver";
/// Jobs that could not finish are tried again after this.
const RETRY: Duration = Duration::from_secs(2);
/// Time between two rounds of expiry and compaction.
const SWEEP: Duration = Duration::from_secs(60);
/// Expired objects removed in one round; the next round takes the rest.
const EXPIRED_MAX: usize = 500;
const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];
const ROOT_CA: &str = "kube-root-ca.crt";

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Job {
    /// Look at an object's owners, or at its dependents if it is being deleted.
    Collect(Key),
    /// Complete a namespace, or empty it.
    Namespace(String),
    /// Remove the objects of a CustomResourceDefinition that is being deleted.
    Definition(String),
}

/// Whether a job is over.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    Done,
    Waiting,
}

/// Makes the objects that clients expect in every cluster.
pub(crate) async fn bootstrap(api: &Arc<Api>, port: u16) -> Result<(), ApiError> {
    for name in NAMESPACES {
        create(api, "", "v1", "namespaces", None, json!({"metadata": {"name": name}})).await?;
    }
    let service = json!({
        "metadata": {"name": "kubernetes", "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {
            "clusterIP": API_ADDRESS, "type": "ClusterIP",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}],
        },
    });
    create(api, "", "v1", "services", Some("default"), service).await
}

/// Works until `stop`.
pub(crate) async fn run(api: Arc<Api>, root_ca: String, stop: CancellationToken) {
    let mut changes = api.store.hub().subscribe_all();
    let mut upkeep = Upkeep { api, root_ca, jobs: BTreeSet::new(), waiting: BTreeSet::new() };
    upkeep.resynchronize().await;
    let mut sweep = tokio::time::interval(SWEEP);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut retry = tokio::time::interval(RETRY);
    retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        if let Some(job) = upkeep.jobs.pop_first() {
            // Take what has happened in the meantime first, so that one job serves many changes.
            loop {
                match changes.try_recv() {
                    Ok(event) => upkeep.notice(&event).await,
                    Err(tokio::sync::broadcast::error::TryRecvError::Lagged(_)) => {
                        upkeep.resynchronize().await;
                    }
                    Err(_) => break,
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = upkeep.work(job) => {}
            }
            continue;
        }
        tokio::select! {
            () = stop.cancelled() => return,
            event = changes.recv() => match event {
                Ok(event) => upkeep.notice(&event).await,
                Err(RecvError::Lagged(_)) => upkeep.resynchronize().await,
                Err(RecvError::Closed) => return,
            },
            _ = retry.tick(), if !upkeep.waiting.is_empty() => {
                upkeep.jobs.append(&mut upkeep.waiting);
            }
            _ = sweep.tick() => upkeep.sweep().await,
        }
    }
}

struct Upkeep {
    api: Arc<Api>,
    root_ca: String,
    jobs: BTreeSet<Job>,
    waiting: BTreeSet<Job>,
}

impl Upkeep {
    /// Asks the store for everything that may have to be done.
    async fn resynchronize(&mut self) {
        match self.api.store.unfinished().await {
            Ok(keys) => self.jobs.extend(keys.into_iter().map(job_of)),
            Err(error) => tracing::error!(%error, "unfinished deletions were not read"),
        }
        let range = Range::all("".into(), "namespaces".into(), Some(String::new()));
        match self.api.store.list(range, |_| true).await {
            Ok(listing) => {
                let names = listing.items.iter().filter_map(|one| one["metadata"]["name"].as_str());
                self.jobs.extend(names.map(|name| Job::Namespace(name.into())));
            }
            Err(error) => tracing::error!(%error, "namespaces were not read"),
        }
    }

    async fn notice(&mut self, event: &Event) {
        let metadata = &event.object["metadata"];
        let key = &event.key;
        let is = |group: &str, resource: &str| &*key.group == group && &*key.resource == resource;
        if event.op == Op::Put {
            let deleting = metadata["deletionTimestamp"].is_string();
            let owners = &metadata["ownerReferences"];
            let new_owners = match &event.before {
                None => owners.is_array(),
                Some(before) => before["metadata"]["ownerReferences"] != *owners,
            };
            let appeared = event.before.is_none();
            if is("", "namespaces") {
                if deleting || appeared {
                    self.jobs.insert(Job::Namespace(key.name.clone()));
                }
            } else if deleting || new_owners {
                self.jobs.insert(job_of(key.clone()));
            }
            return;
        }
        if let Some(uid) = metadata["uid"].as_str() {
            match self.api.store.dependents(uid).await {
                Ok(keys) => self.jobs.extend(keys.into_iter().map(Job::Collect)),
                Err(error) => tracing::error!(%error, "dependents were not read"),
            }
        }
        // Somebody may have waited for this object to go.
        for owner in metadata["ownerReferences"].as_array().into_iter().flatten() {
            if let Some(uid) = owner["uid"].as_str()
                && let Ok(Some(owner)) = self.api.store.find_uid(uid).await
            {
                self.jobs.insert(job_of(owner));
            }
        }
        let of_namespace = Job::Namespace(key.namespace.clone());
        let vital = (is("", "serviceaccounts") && key.name == "default")
            || (is("", "configmaps") && key.name == ROOT_CA);
        if vital || self.waiting.remove(&of_namespace) {
            self.jobs.insert(of_namespace);
        }
        let of_definition = Job::Definition(format!("{}.{}", key.resource, key.group));
        if self.waiting.remove(&of_definition) {
            self.jobs.insert(of_definition);
        }
    }

    async fn work(&mut self, job: Job) {
        let outcome = match &job {
            Job::Collect(key) => self.collect(key).await,
            Job::Namespace(name) => self.namespace(name).await,
            Job::Definition(name) => self.definition(name).await,
        };
        match outcome {
            Ok(Progress::Done) => {}
            Ok(Progress::Waiting) => {
                self.waiting.insert(job);
            }
            Err(error) => {
                tracing::warn!(?job, error = error.message, "upkeep will be tried again");
                self.waiting.insert(job);
            }
        }
    }

    async fn collect(&self, key: &Key) -> Result<Progress, ApiError> {
        let catalog = self.api.catalog();
        let Some(resource) = stored_as(&catalog, key) else { return Ok(Progress::Done) };
        let Some(live) = self.api.store.get(key).await.map_err(store_failed)? else {
            return Ok(Progress::Done);
        };
        if live["metadata"]["deletionTimestamp"].is_string() {
            return self.release(&catalog, &resource, key, &live).await;
        }
        let owners = live["metadata"]["ownerReferences"].as_array().cloned().unwrap_or_default();
        let mut gone = HashSet::new();
        for owner in &owners {
            let uid = owner["uid"].as_str().unwrap_or_default();
            let found = self.api.store.find_uid(uid).await.map_err(store_failed)?;
            let reachable = found.is_some_and(|owner| {
                owner.namespace.is_empty() || owner.namespace == key.namespace
            });
            if !reachable {
                gone.insert(uid.to_owned());
            }
        }
        if gone.is_empty() {
            return Ok(Progress::Done);
        }
        if owners.iter().all(|owner| gone.contains(owner["uid"].as_str().unwrap_or_default())) {
            let options = DeleteOptions {
                uid: live["metadata"]["uid"].as_str().map(str::to_owned),
                ..DeleteOptions::default()
            };
            self.delete(&resource, key, &options).await?;
        } else {
            self.disown(&catalog, &resource, key, &gone).await?;
        }
        Ok(Progress::Done)
    }

    /// Does what the propagation policy of an object under deletion asks for.
    async fn release(
        &self,
        catalog: &Catalog,
        resource: &Resource,
        key: &Key,
        live: &Value,
    ) -> Result<Progress, ApiError> {
        let has = |finalizer: &str| {
            let list = live["metadata"]["finalizers"].as_array();
            list.is_some_and(|list| list.iter().any(|one| one == finalizer))
        };
        let uid = live["metadata"]["uid"].as_str().unwrap_or_default();
        if has(ORPHAN) {
            let uids = HashSet::from([uid.to_owned()]);
            for dependent in self.api.store.dependents(uid).await.map_err(store_failed)? {
                if let Some(kind) = stored_as(catalog, &dependent) {
                    self.disown(catalog, &kind, &dependent, &uids).await?;
                }
            }
            self.api.drop_finalizer(catalog, resource, key, ORPHAN).await?;
        }
        if !has(FOREGROUND) {
            return Ok(Progress::Done);
        }
        let mut blocked = false;
        for dependent in self.api.store.dependents(uid).await.map_err(store_failed)? {
            let Some(kind) = stored_as(catalog, &dependent) else { continue };
            let found = self.api.store.get(&dependent).await.map_err(store_failed)?;
            let Some(object) = found else { continue };
            let owners = object["metadata"]["ownerReferences"].as_array();
            let blocks = owners
                .into_iter()
                .flatten()
                .any(|owner| owner["uid"] == uid && owner["blockOwnerDeletion"] == true);
            if object["metadata"]["deletionTimestamp"].is_null() {
                let own = object["metadata"]["uid"].as_str().unwrap_or_default();
                let has_own =
                    !self.api.store.dependents(own).await.map_err(store_failed)?.is_empty();
                let options = DeleteOptions {
                    propagation: has_own.then_some(Propagation::Foreground),
                    uid: Some(own.to_owned()),
                    ..DeleteOptions::default()
                };
                self.delete(&kind, &dependent, &options).await?;
                let left = self.api.store.get(&dependent).await.map_err(store_failed)?;
                blocked |= blocks && left.is_some();
            } else {
                blocked |= blocks;
            }
        }
        if blocked {
            return Ok(Progress::Waiting);
        }
        self.api.drop_finalizer(catalog, resource, key, FOREGROUND).await?;
        Ok(Progress::Done)
    }

    async fn namespace(&self, name: &str) -> Result<Progress, ApiError> {
        let key = namespace_key(name);
        let Some(live) = self.api.store.get(&key).await.map_err(store_failed)? else {
            return Ok(Progress::Done);
        };
        if live["metadata"]["deletionTimestamp"].is_null() {
            let account = json!({"metadata": {"name": "default"}});
            create(&self.api, "", "v1", "serviceaccounts", Some(name), account).await?;
            let authority = json!({
                "metadata": {"name": ROOT_CA}, "data": {"ca.crt": self.root_ca},
            });
            create(&self.api, "", "v1", "configmaps", Some(name), authority).await?;
            return Ok(Progress::Done);
        }
        let catalog = self.api.catalog();
        let mut seen = HashSet::new();
        let mut left = 0;
        for resource in catalog.resources().filter(|one| one.namespaced && one.is_stored()) {
            if seen.insert(place(resource)) {
                left += self.delete_all(resource, Some(name.to_owned())).await?;
            }
        }
        if left > 0 {
            return Ok(Progress::Waiting);
        }
        let Some(resource) = catalog.find("", "v1", "namespaces") else {
            return Ok(Progress::Done);
        };
        let options = Options::internal(MANAGER);
        let writer =
            Writer { api: &self.api, catalog: &catalog, resource: &resource, options: &options };
        let outcome = writer
            .modify(&key, "finalize", true, |live| {
                let mut new = live.clone();
                if let Some(list) = new["spec"]["finalizers"].as_array_mut() {
                    list.retain(|one| one != "kubernetes");
                }
                Ok(new)
            })
            .await;
        match outcome {
            Err(error) if error.code != 404 => Err(error),
            _ => Ok(Progress::Done),
        }
    }

    async fn definition(&self, name: &str) -> Result<Progress, ApiError> {
        let catalog = self.api.catalog();
        let Some(definitions) =
            catalog.find("apiextensions.k8s.io", "v1", "customresourcedefinitions")
        else {
            return Ok(Progress::Done);
        };
        let key = crate::api::key(&definitions, None, name);
        let Some(live) = self.api.store.get(&key).await.map_err(store_failed)? else {
            return Ok(Progress::Done);
        };
        let finalizers = live["metadata"]["finalizers"].as_array();
        let ours = finalizers.is_some_and(|list| list.iter().any(|one| one == CRD_FINALIZER));
        if live["metadata"]["deletionTimestamp"].is_null() || !ours {
            return Ok(Progress::Done);
        }
        let (plural, group) = name.split_once('.').unwrap_or((name, ""));
        let served = catalog
            .resources()
            .find(|one| one.custom && &*one.plural == plural && &*one.group == group)
            .cloned();
        if let Some(resource) = served
            && self.delete_all(&resource, None).await? > 0
        {
            return Ok(Progress::Waiting);
        }
        self.api.drop_finalizer(&catalog, &definitions, &key, CRD_FINALIZER).await?;
        Ok(Progress::Done)
    }

    /// Deletes all objects of a resource and says how many are still there.
    async fn delete_all(
        &self,
        resource: &Resource,
        namespace: Option<String>,
    ) -> Result<usize, ApiError> {
        let (group, plural) = place(resource);
        let range = Range::all(group, plural, namespace);
        let listing = self.api.store.list(range.clone(), |_| true).await.map_err(store_failed)?;
        if listing.items.is_empty() {
            return Ok(0);
        }
        for object in &listing.items {
            let metadata = &object["metadata"];
            if metadata["deletionTimestamp"].is_null() {
                let name = metadata["name"].as_str().unwrap_or_default();
                let key = crate::api::key(resource, metadata["namespace"].as_str(), name);
                self.delete(resource, &key, &DeleteOptions::default()).await?;
            }
        }
        Ok(self.api.store.list(range, |_| true).await.map_err(store_failed)?.items.len())
    }

    /// Deletes an object; that it is gone or another one now is fine.
    async fn delete(
        &self,
        resource: &Resource,
        key: &Key,
        options: &DeleteOptions,
    ) -> Result<(), ApiError> {
        match self.api.delete_object(resource, key, options).await {
            Err(error) if !matches!(error.code, 404 | 409) => Err(error),
            _ => Ok(()),
        }
    }

    /// Takes the owners `uids` off an object.
    async fn disown(
        &self,
        catalog: &Catalog,
        resource: &Resource,
        key: &Key,
        uids: &HashSet<String>,
    ) -> Result<(), ApiError> {
        let options = Options::internal(MANAGER);
        let writer = Writer { api: &self.api, catalog, resource, options: &options };
        let outcome = writer
            .modify(key, "owners", true, |live| {
                let mut new = live.clone();
                if let Some(list) = new["metadata"]["ownerReferences"].as_array_mut() {
                    list.retain(|owner| !uids.contains(owner["uid"].as_str().unwrap_or_default()));
                    if list.is_empty()
                        && let Some(metadata) = new["metadata"].as_object_mut()
                    {
                        metadata.remove("ownerReferences");
                    }
                }
                Ok(new)
            })
            .await;
        match outcome {
            Err(error) if error.code != 404 => Err(error),
            _ => Ok(()),
        }
    }

    async fn sweep(&self) {
        let now = jiff::Timestamp::now().as_second();
        match self.api.store.expired(now, EXPIRED_MAX).await {
            Ok(keys) => {
                let catalog = self.api.catalog();
                for key in keys {
                    let Some(resource) = stored_as(&catalog, &key) else { continue };
                    let options = DeleteOptions::default();
                    if let Err(error) = self.delete(&resource, &key, &options).await {
                        tracing::warn!(?key, error = error.message, "expired object stays");
                    }
                }
            }
            Err(error) => tracing::error!(%error, "expired objects were not read"),
        }
        if let Err(error) = self.api.store.compact(Instant::now()).await {
            tracing::error!(%error, "history was not compacted");
        }
    }
}

fn job_of(key: Key) -> Job {
    match (&*key.group, &*key.resource) {
        ("", "namespaces") => Job::Namespace(key.name),
        ("apiextensions.k8s.io", "customresourcedefinitions") => Job::Definition(key.name),
        _ => Job::Collect(key),
    }
}

/// The resource under whose name `key` is stored, in its preferred version.
fn stored_as(catalog: &Catalog, key: &Key) -> Option<Arc<Resource>> {
    let found = catalog.resources().find(|one| {
        !one.stored_in_core
            && one.group == key.group
            && one.plural == key.resource
            && one.is_stored()
    });
    found.cloned()
}

/// Creates an object unless it exists.
async fn create(
    api: &Arc<Api>,
    group: &str,
    version: &str,
    plural: &str,
    namespace: Option<&str>,
    mut object: Value,
) -> Result<(), ApiError> {
    let catalog = api.catalog();
    let resource = catalog.find(group, version, plural).ok_or_else(ApiError::unknown_path)?;
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let key = crate::api::key(&resource, namespace, name);
    if api.store.get(&key).await.map_err(store_failed)?.is_some() {
        return Ok(());
    }
    body::expect_kind(&mut object, &resource)?;
    let options = Options::internal(MANAGER);
    let writer = Writer { api, catalog: &catalog, resource: &resource, options: &options };
    match writer.create(namespace, None, object, &mut Vec::new()).await {
        Err(error) if error.reason != "AlreadyExists" => Err(error),
        _ => Ok(()),
    }
}
