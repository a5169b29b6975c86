//! Feeds the hub with what the Kubernetes API says, one watch per kind.
//!
//! ConfigMaps and Secrets are watched only once the pods have been listed: then most of what the pods refer to comes
//! with the list, and the rest is never kept.

use crate::api;
use crate::hub::Hub;
use futures::StreamExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use skerry_cloudcore_core::downstream::{Input, Key, Kind};
use std::collections::BTreeSet;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

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
                if matches!(kind, Kind::ConfigMap | Kind::Secret) {
                    let _ = pods_listed.wait_for(|listed| *listed).await;
                }
                watch.run(listed).await;
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
    async fn run(self, listed: Option<watch::Sender<bool>>) {
        let kind = self.kind;
        let objects = api::all_objects(&self.client, kind);
        let mut events =
            std::pin::pin!(watcher::watcher(objects, watcher::Config::default()).default_backoff());
        let mut keys = BTreeSet::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => keys.clear(),
                Ok(Event::InitApply(object)) => {
                    let object = api::to_json(object);
                    keys.extend(Key::of_object(kind, &object));
                    self.hub.input(Input::Changed(kind, object)).await;
                }
                Ok(Event::InitDone) => {
                    self.hub.input(Input::Listed(kind, std::mem::take(&mut keys))).await;
                    if let Some(listed) = &listed {
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
                Err(error) => {
                    tracing::warn!(kind = kind.api_kind(), %error, "watch failed, trying again");
                }
            }
        }
    }
}
