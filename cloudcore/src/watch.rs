//! Feeds the hub with what the Kubernetes API says, one watch per kind.
//!
//! ConfigMaps and Secrets are watched only once the pods have been listed: then most of what the pods refer to comes
//! with the list, and the rest is never kept. Kinds that are not built into Kubernetes are watched while the cluster
//! has them: one that it lacks is looked for every minute, and the hub does not judge what nodes hold of it meanwhile. The
//! kinds of devices are defined where they are not there at the first look.

use crate::api;
use crate::definitions;
use crate::hub::Hub;
use futures::StreamExt;
use kube::api::ListParams;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use skerry_cloudcore_core::downstream::{Input, Key, Kind};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Time between two looks for a kind that the cluster lacks.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// How long an API is given to serve a kind that was just defined.
const SERVED_WAIT: Duration = Duration::from_secs(1);
/// Pause after a look that the API did not answer.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Looks in vain until a kind that was there counts as removed, and its objects with it. An API that starts may
/// deny a kind for a moment, and nodes must not lose their devices for that.
const LOOKS_MAX: u32 = 10;

/// Starts a watch for every kind.
pub(crate) fn spawn_all(
    client: &kube::Client,
    hub: &Hub,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    let (listed, pods_listed) = watch::channel(false);
    for kind in Kind::ALL {
        let watch = Watch { client: client.clone(), hub: hub.clone(), kind };
        let (stop, mut pods_listed) = (stop.clone(), pods_listed.clone());
        let listed = (kind == Kind::Pod).then(|| listed.clone());
        tasks.spawn(async move {
            let run = async {
                if kind.is_custom() {
                    return watch.run_when_there().await;
                }
                if matches!(kind, Kind::ConfigMap | Kind::Secret) {
                    let _ = pods_listed.wait_for(|listed| *listed).await;
                }
                watch.run(listed.as_ref()).await;
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = run => {}
            }
        });
    }
}

struct Watch {
    client: kube::Client,
    hub: Hub,
    kind: Kind,
}

impl Watch {
    /// Watches the kind whenever the cluster has it.
    async fn run_when_there(self) {
        let kind = self.kind;
        let mut looks = 0;
        let mut was_there = false;
        loop {
            let objects = api::all_objects(&self.client, kind);
            match objects.list(&ListParams::default().limit(1)).await {
                Ok(_) => {
                    tracing::info!(
                        kind = kind.api_kind(),
                        "the cluster has this kind, watching it"
                    );
                    (looks, was_there) = (0, true);
                    self.run(None).await;
                }
                Err(error) if api::is_kind_missing(&error) => {
                    if looks == 0 {
                        tracing::info!(
                            kind = kind.api_kind(),
                            api_version = kind.api_version(),
                            %error,
                            "the cluster does not have this kind, looking again every {} s",
                            LOOK_INTERVAL.as_secs()
                        );
                        self.hub.input(Input::Unavailable(kind)).await;
                    }
                    looks += 1;
                    // One that somebody took away stays away.
                    if looks == 1 && !was_there && self.make().await {
                        continue;
                    }
                    if looks == LOOKS_MAX && std::mem::take(&mut was_there) {
                        self.hub.input(Input::Listed(kind, BTreeSet::new())).await;
                    }
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
                Err(error) => {
                    tracing::warn!(kind = kind.api_kind(), %error, "could not look for a kind, trying again");
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
    }

    /// Makes the definitions of devices in a cluster that lacks them. Returns whether that was worth another look soon.
    async fn make(&self) -> bool {
        let definitions = match self.kind {
            Kind::Device | Kind::DeviceModel => skerry_api::kubeedge::devices(),
            Kind::DeviceRule => vec![skerry_api::fleet::rules::device_rule_crd()],
            _ => return false,
        };
        match definitions::create(&self.client, definitions).await {
            Ok(()) => {
                tokio::time::sleep(SERVED_WAIT).await;
                true
            }
            Err(error) => {
                tracing::warn!(kind = self.kind.api_kind(), %error, "could not make the definition of a kind");
                false
            }
        }
    }

    /// Returns when the cluster no longer has the kind.
    async fn run(&self, listed: Option<&watch::Sender<bool>>) {
        let kind = self.kind;
        let objects = api::all_objects(&self.client, kind);
        let mut events =
            std::pin::pin!(watcher::watcher(objects, watcher::Config::default()).default_backoff());
        let mut keys = BTreeSet::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => {
                    keys.clear();
                    self.hub.input(Input::Listing(kind)).await;
                }
                Ok(Event::InitApply(object)) => {
                    let object = api::to_json(object);
                    keys.extend(Key::of_object(kind, &object));
                    self.hub.input(Input::Changed(kind, object)).await;
                }
                Ok(Event::InitDone) => {
                    self.hub.input(Input::Listed(kind, std::mem::take(&mut keys))).await;
                    if let Some(listed) = listed {
                        listed.send_replace(true);
                    }
                }
                Ok(Event::Apply(object)) => {
                    self.hub.input(Input::Changed(kind, api::to_json(object))).await;
                }
                Ok(Event::Delete(object)) => {
                    let object = api::to_json(object);
                    if let Some(key) = Key::of_object(kind, &object) {
                        self.hub.input(Input::Deleted(key, object)).await;
                    }
                }
                Err(error) if kind.is_custom() && is_over(&error) => return,
                Err(error) => {
                    tracing::warn!(kind = kind.api_kind(), %error, "watch failed, trying again");
                }
            }
        }
    }
}

/// Whether a watch failed because the cluster does not have the kind.
pub(crate) fn is_over(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => api::is_kind_missing(error),
        watcher::Error::WatchError(status) => status.code == 404,
        watcher::Error::NoResourceVersion => false,
    }
}
