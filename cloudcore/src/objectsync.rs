//! ObjectSync and ClusterObjectSync objects in the cluster: finds them, watches them, writes them.
//!
//! `cloudcore/core` decides what is written ([`skerry_cloudcore_core::objectsync`]); the hub's task is the caller of
//! [`Writer::write`]. A cluster without the two definitions gets them, if CloudCore may create definitions. Where it may
//! not, one line in the log says so, and nodes of KubeEdge get everything again after each reconnect. Nodes of ours need
//! none of this.

use crate::api;
use crate::definitions;
use crate::hub::Hub;
use crate::watch::{LOOK_INTERVAL, is_over};
use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use serde::de::DeserializeOwned;
use serde_json::json;
use skerry_api::reliablesyncs::v1alpha1::{
    ClusterObjectSync, ObjectSync, ObjectSyncSpec, ObjectSyncStatus, crds,
};
use skerry_cloudcore_core::downstream::Input;
use skerry_cloudcore_core::objectsync::{Action, Outcome, Scope, SyncSpec, Word, Write};
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Time until a definition that has just been created has to be served.
const SERVED_TIMEOUT: Duration = Duration::from_secs(10);
const SERVED_INTERVAL: Duration = Duration::from_millis(100);
/// Pause after a look that the API did not answer.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// Starts to tell the hub what the cluster has.
pub(crate) fn spawn(
    client: &kube::Client,
    hub: &Hub,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    let watch = Watch { client: client.clone(), hub: hub.clone() };
    let stop = stop.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = watch.run() => {}
        }
    });
}

/// Either of the two kinds, as far as they differ.
trait Record:
    kube::Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static
{
    const SCOPE: Scope;
    fn into_parts(self) -> (ObjectMeta, ObjectSyncSpec, Option<ObjectSyncStatus>);
}

impl Record for ObjectSync {
    const SCOPE: Scope = Scope::Namespaced;

    fn into_parts(self) -> (ObjectMeta, ObjectSyncSpec, Option<ObjectSyncStatus>) {
        (self.metadata, self.spec, self.status)
    }
}

impl Record for ClusterObjectSync {
    const SCOPE: Scope = Scope::Cluster;

    fn into_parts(self) -> (ObjectMeta, ObjectSyncSpec, Option<ObjectSyncStatus>) {
        (self.metadata, self.spec, self.status)
    }
}

struct Watch {
    client: kube::Client,
    hub: Hub,
}

impl Watch {
    async fn run(self) {
        let mut is_told = false;
        loop {
            match self.look().await {
                Ok(true) => {
                    is_told = false;
                    // Either returns when the cluster no longer has the kind.
                    tokio::select! {
                        () = self.watch::<ObjectSync>() => {}
                        () = self.watch::<ClusterObjectSync>() => {}
                    }
                    self.hub.input(Input::Sync(Word::Unavailable)).await;
                }
                Ok(false) => {
                    let installed = self.install().await;
                    if installed.is_ok() {
                        continue;
                    }
                    if let Err(error) = installed
                        && !std::mem::replace(&mut is_told, true)
                    {
                        tracing::warn!(
                            %error,
                            "the cluster has no ObjectSync kinds and they cannot be created: nodes of KubeEdge get all \
                             objects again after each reconnect, and keep what is deleted while cloudcore is down"
                        );
                        self.hub.input(Input::Sync(Word::Unavailable)).await;
                    }
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "could not look for the ObjectSync kinds, trying again");
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
    }

    /// Whether the cluster has both kinds.
    async fn look(&self) -> kube::Result<bool> {
        let namespaced = Api::<ObjectSync>::all(self.client.clone());
        let cluster = Api::<ClusterObjectSync>::all(self.client.clone());
        let (namespaced, cluster) =
            futures::join!(definitions::is_there(&namespaced), definitions::is_there(&cluster));
        Ok(namespaced? && cluster?)
    }

    /// Creates the two definitions and waits until they are served.
    async fn install(&self) -> Result<(), InstallError> {
        definitions::create(&self.client, crds()).await.map_err(InstallError::Create)?;
        let served = async {
            while !matches!(self.look().await, Ok(true)) {
                tokio::time::sleep(SERVED_INTERVAL).await;
            }
        };
        tokio::time::timeout(SERVED_TIMEOUT, served).await.map_err(|_| InstallError::NotServed)
    }

    async fn watch<K: Record>(&self) {
        let objects = Api::<K>::all(self.client.clone());
        let mut events =
            std::pin::pin!(watcher::watcher(objects, watcher::Config::default()).default_backoff());
        let mut names = BTreeSet::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => {
                    names.clear();
                    self.hub.input(Input::Sync(Word::Listing(K::SCOPE))).await;
                }
                Ok(Event::InitApply(record)) => {
                    if let Some(word) = seen(record, true) {
                        if let Word::Seen { name, namespace, .. } = &word {
                            names.insert((namespace.clone(), Arc::clone(name)));
                        }
                        self.hub.input(Input::Sync(word)).await;
                    }
                }
                Ok(Event::InitDone) => {
                    let word = Word::Listed(K::SCOPE, std::mem::take(&mut names));
                    self.hub.input(Input::Sync(word)).await;
                }
                Ok(Event::Apply(record)) => {
                    if let Some(word) = seen(record, false) {
                        self.hub.input(Input::Sync(word)).await;
                    }
                }
                Ok(Event::Delete(record)) => {
                    if let Some(Word::Seen { name, namespace, at, .. }) = seen(record, false) {
                        self.hub.input(Input::Sync(Word::Gone { name, namespace, at })).await;
                    }
                }
                Err(error) if is_over(&error) => return,
                Err(error) => {
                    tracing::warn!(kind = %K::kind(&()), %error, "watch failed, trying again");
                }
            }
        }
    }
}

/// Why the definitions could not be created.
#[derive(Debug, thiserror::Error)]
enum InstallError {
    #[error(transparent)]
    Create(kube::Error),
    #[error("the new definitions are not served after {} s", SERVED_TIMEOUT.as_secs())]
    NotServed,
}

fn seen<K: Record>(record: K, is_in_list: bool) -> Option<Word> {
    let (metadata, spec, status) = record.into_parts();
    let version = status.map(|status| status.object_resource_version);
    let version = version.filter(|version| !version.is_empty());
    Some(Word::Seen {
        at: at(&metadata),
        is_in_list,
        name: metadata.name?.into(),
        namespace: metadata.namespace.map(Into::into),
        spec: SyncSpec {
            api_version: spec.object_api_version.into(),
            kind: spec.object_kind.into(),
            name: spec.object_name.into(),
        },
        version: version.map(Into::into),
    })
}

/// Resource version of a record, 0 when it is no number.
fn at(metadata: &ObjectMeta) -> u64 {
    let version = metadata.resource_version.as_deref();
    version.and_then(|version| version.parse().ok()).unwrap_or(0)
}

/// Writes records.
pub(crate) struct Writer {
    client: kube::Client,
    /// Whether the log says already that the API refuses some.
    has_refused: AtomicBool,
}

impl Writer {
    pub(crate) fn new(client: kube::Client) -> Self {
        Self { client, has_refused: AtomicBool::new(false) }
    }

    /// Does `write`, in at most two requests, if the record is still as `write` says that it was seen.
    pub(crate) async fn write(&self, write: &Write) -> Outcome {
        let done = match &write.id.namespace {
            Some(namespace) => {
                let api = Api::<ObjectSync>::namespaced(self.client.clone(), namespace);
                apply(&api, write, |metadata, spec| ObjectSync { metadata, spec, status: None })
                    .await
            }
            None => {
                let api = Api::<ClusterObjectSync>::all(self.client.clone());
                let new = |metadata, spec| ClusterObjectSync { metadata, spec, status: None };
                apply(&api, write, new).await
            }
        };
        let error = match done {
            Ok(outcome) => return outcome,
            Err(error) => error,
        };
        let outcome = match &error {
            kube::Error::Api(status) if (400..500).contains(&status.code) => match status.code {
                409 => Outcome::Conflict,
                // Too many requests, a timeout: the next attempt may go through.
                408 | 429 => Outcome::Failed,
                401 => Outcome::Failed,
                _ => Outcome::Refused,
            },
            _ => Outcome::Failed,
        };
        if outcome == Outcome::Conflict {
            tracing::debug!(
                name = write.name(),
                "another CloudCore has written this record of delivery"
            );
        } else if outcome == Outcome::Refused && self.has_refused.swap(true, Ordering::Relaxed) {
            // Once is enough: a namespace that goes away refuses every record in it.
            tracing::debug!(name = write.name(), %error, "the API refuses a record of delivery");
        } else {
            tracing::warn!(name = write.name(), %error, ?outcome, "could not write a record of delivery");
        }
        outcome
    }
}

async fn apply<K>(
    api: &Api<K>,
    write: &Write,
    new: impl FnOnce(ObjectMeta, ObjectSyncSpec) -> K,
) -> kube::Result<Outcome>
where
    K: Record + serde::Serialize,
{
    let name = write.name();
    let (version, seen_at) = match &write.action {
        Action::Delete => {
            let seen = (write.at > 0)
                .then(|| Preconditions { resource_version: Some(write.at.to_string()), uid: None });
            let params = DeleteParams { preconditions: seen, ..DeleteParams::default() };
            return match api.delete(&name, &params).await {
                Err(error) if !api::is_not_found(&error) => Err(error),
                _ => Ok(Outcome::Done(0)),
            };
        }
        Action::Status(version) => (version, write.at),
        Action::Create(version) => {
            let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
            let spec = ObjectSyncSpec {
                object_api_version: write.spec.api_version.as_ref().to_owned(),
                object_kind: write.spec.kind.as_ref().to_owned(),
                object_name: write.spec.name.as_ref().to_owned(),
            };
            match api.create(&PostParams::default(), &new(metadata, spec)).await {
                Ok(created) => (version, at(&created.into_parts().0)),
                Err(error) if api::is_already_exists(&error) => {
                    return Ok(match api.get_opt(&name).await? {
                        None => Outcome::Failed,
                        Some(found) => {
                            let (metadata, _, status) = found.into_parts();
                            let version = status.map(|status| status.object_resource_version);
                            let version = version.filter(|version| !version.is_empty());
                            Outcome::Found { version: version.map(Into::into), at: at(&metadata) }
                        }
                    });
                }
                Err(error) => return Err(error),
            }
        }
    };
    let mut status = json!({"status": {"objectResourceVersion": &**version}});
    if seen_at > 0 {
        status["metadata"] = json!({"resourceVersion": seen_at.to_string()});
    }
    match api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await {
        Ok(written) => Ok(Outcome::Done(at(&written.into_parts().0))),
        Err(error) if api::is_not_found(&error) => Ok(Outcome::Conflict),
        Err(error) => Err(error),
    }
}
