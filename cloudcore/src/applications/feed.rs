//! The task that follows what applications watch, and pushes it to their nodes.
//!
//! One watch of the API per resource, for as long as a node listens; `core/applications/watches.rs` decides who gets
//! what. What a node gets goes through the hub, which bounds it and sees to its delivery; a node that has enough to do
//! is left alone until it has taken some.

use crate::hub::{Hub, sleep_until};
use crate::upstream::answer::Refused;
use futures::StreamExt;
use kube::api::{Api, ApiResource, DynamicObject};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use serde_json::Value;
use skerry_cloudcore_core::applications::Resource;
use skerry_cloudcore_core::applications::topology::Topology;
use skerry_cloudcore_core::applications::watches::{Listener, Output, Push, Watches, key_of};
use skerry_cloudcore_core::downstream::{Input, Key, PUSHED_LEN_MAX};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Words on their way to the task. Those who send wait when it is full.
const WORDS_MAX: usize = 256;
/// Word of the API on its way; the watches wait when it is full.
const CHANGES_MAX: usize = 256;
/// When a node that had no room is looked at again.
const ROOM_PAUSE: Duration = Duration::from_millis(100);
/// What one node is given at once, in objects and in bytes of their bodies; far below what the hub keeps for it.
const SHARE: usize = 256;
const SHARE_LEN: usize = PUSHED_LEN_MAX / 4;

enum Word {
    Add {
        node: String,
        listener: Listener,
        kind: String,
        answer: oneshot::Sender<Result<(), String>>,
    },
    Remove {
        node: String,
        id: String,
    },
    Ids {
        node: String,
        answer: oneshot::Sender<BTreeSet<String>>,
    },
    Connected(String),
    Disconnected(String),
}

/// What a watch of the API says.
enum Change {
    Changed(Resource, Value),
    Deleted(Resource, Value),
    Listed(Resource, BTreeSet<Key>),
    /// Of a node or Service: plural, object, whether it is gone.
    Topology(String, Value, bool),
    TopologyListed(String),
}

/// The way to the task.
#[derive(Clone)]
pub(super) struct Feed {
    words: mpsc::Sender<Word>,
}

impl Feed {
    pub(super) fn spawn(
        client: kube::Client,
        hub: Hub,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Self {
        let (words, received) = mpsc::channel(WORDS_MAX);
        let (sender, changes) = mpsc::channel(CHANGES_MAX);
        let owner = Owner {
            watches: Watches::default(),
            kinds: BTreeMap::new(),
            sources: BTreeMap::new(),
            topology: None,
            client,
            hub,
            changes: sender,
            tasks: tasks.clone(),
            stop: stop.clone(),
        };
        tasks.spawn(owner.run(received, changes));
        Self { words }
    }

    /// Adds a watch. `kind` is that of the resource's objects.
    pub(super) async fn add(
        &self,
        node: &str,
        listener: Listener,
        kind: String,
    ) -> Result<(), Refused> {
        let (answer, received) = oneshot::channel();
        let node = node.to_owned();
        let word = Word::Add { node, listener, kind, answer };
        self.words.send(word).await.map_err(|_| Refused::Stopping)?;
        received.await.map_err(|_| Refused::Stopping)?.map_err(Refused::Forbidden)
    }

    pub(super) async fn remove(&self, node: &str, id: &str) {
        let _ = self.words.send(Word::Remove { node: node.into(), id: id.into() }).await;
    }

    /// Ids of the watches of a node; `None` when the task has ended.
    pub(super) async fn ids(&self, node: &str) -> Option<BTreeSet<String>> {
        let (answer, received) = oneshot::channel();
        self.words.send(Word::Ids { node: node.into(), answer }).await.ok()?;
        received.await.ok()
    }

    pub(super) async fn connected(&self, node: &str) {
        let _ = self.words.send(Word::Connected(node.into())).await;
    }

    pub(super) async fn disconnected(&self, node: &str) {
        let _ = self.words.send(Word::Disconnected(node.into())).await;
    }
}

struct Owner {
    watches: Watches,
    /// Kinds of the resources that are or were watched.
    kinds: BTreeMap<Resource, String>,
    sources: BTreeMap<Resource, CancellationToken>,
    /// The watches of nodes and Services, while somebody watches endpoints.
    topology: Option<CancellationToken>,
    client: kube::Client,
    hub: Hub,
    changes: mpsc::Sender<Change>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Owner {
    async fn run(mut self, mut words: mpsc::Receiver<Word>, mut changes: mpsc::Receiver<Change>) {
        let mut look_again = None;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                word = words.recv() => match word {
                    Some(word) => self.take(word),
                    None => return,
                },
                change = changes.recv() => self.change(change.expect("the owner holds a sender")),
                () = sleep_until(look_again) => {}
            }
            self.drain();
            look_again = self.push().await.then(|| Instant::now() + ROOM_PAUSE);
        }
    }

    fn take(&mut self, word: Word) {
        match word {
            Word::Add { node, listener, kind, answer } => {
                self.kinds.insert(listener.resource.clone(), kind);
                let added = self.watches.add(&node, listener);
                let _ = answer.send(added.map_err(|error| error.to_string()));
            }
            Word::Remove { node, id } => self.watches.remove(&node, &id),
            Word::Ids { node, answer } => {
                let _ = answer.send(self.watches.ids(&node).map(str::to_owned).collect());
            }
            Word::Connected(node) => self.watches.connected(&node),
            Word::Disconnected(node) => self.watches.disconnected(&node),
        }
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::Changed(resource, object) => self.watches.changed(&resource, object),
            Change::Deleted(resource, object) => self.watches.deleted(&resource, object),
            Change::Listed(resource, keys) => self.watches.listed(&resource, &keys),
            Change::Topology(plural, object, is_gone) => {
                self.watches.topology_changed(&plural, &object, is_gone);
            }
            Change::TopologyListed(plural) => self.watches.topology_listed(&plural),
        }
    }

    fn drain(&mut self) {
        while let Some(output) = self.watches.poll_output() {
            match output {
                Output::Start(resource) => {
                    let stop = self.stop.child_token();
                    if let Some(old) = self.sources.insert(resource.clone(), stop.clone()) {
                        old.cancel();
                    }
                    let kind = self.kinds.get(&resource).cloned().unwrap_or_default();
                    let source = Source {
                        client: self.client.clone(),
                        resource,
                        kind,
                        changes: self.changes.clone(),
                    };
                    self.tasks.spawn(async move {
                        tokio::select! {
                            () = stop.cancelled() => {}
                            () = source.run() => {}
                        }
                    });
                }
                Output::Follow(wanted) => {
                    if let Some(stop) = self.topology.take() {
                        stop.cancel();
                    }
                    if wanted {
                        self.follow_topology();
                    }
                }
                Output::Stop(resource) => {
                    self.kinds.remove(&resource);
                    if let Some(stop) = self.sources.remove(&resource) {
                        stop.cancel();
                    }
                }
            }
        }
    }

    fn follow_topology(&mut self) {
        let stop = self.stop.child_token();
        for resource in Topology::sources() {
            let (stop, client, changes) = (stop.clone(), self.client.clone(), self.changes.clone());
            self.tasks.spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = follow(client, resource, changes) => {}
                }
            });
        }
        self.topology = Some(stop);
    }

    /// Gives to the hub what nodes have room for. Returns whether something is left.
    async fn push(&mut self) -> bool {
        let mut left = false;
        for node in self.watches.waiting() {
            // Pods and what they need go first. A node that is not there has just gone; its session says so in a moment.
            let backlog = self.hub.backlog(&node).await;
            if backlog.is_none_or(|backlog| backlog.waiting > 0) {
                tracing::debug!(node = &*node, ?backlog, "watched objects wait");
                left = true;
                continue;
            }
            let pushes = self.watches.take(&node, SHARE, SHARE_LEN);
            tracing::debug!(node = &*node, objects = pushes.len(), "watched objects go to the hub");
            left = true;
            for Push { key, object, operation } in pushes {
                let node = node.to_string();
                self.hub.input(Input::Pushed { node, key, object, operation }).await;
            }
        }
        left
    }
}

/// Follows nodes or Services for the topology.
async fn follow(client: kube::Client, resource: Resource, changes: mpsc::Sender<Change>) {
    let plural = resource.plural.clone();
    let objects: Api<DynamicObject> = Api::all_with(client, &topology_resource(&resource));
    let mut events =
        std::pin::pin!(watcher::watcher(objects, watcher::Config::default()).default_backoff());
    while let Some(event) = events.next().await {
        let change = match event {
            Ok(Event::Init) => continue,
            Ok(Event::InitApply(object) | Event::Apply(object)) => {
                Change::Topology(plural.clone(), crate::api::to_json(object), false)
            }
            Ok(Event::Delete(object)) => {
                Change::Topology(plural.clone(), crate::api::to_json(object), true)
            }
            Ok(Event::InitDone) => Change::TopologyListed(plural.clone()),
            Err(error) => {
                tracing::warn!(%resource, %error, "a watch for the topology of services failed, trying again");
                continue;
            }
        };
        if changes.send(change).await.is_err() {
            return;
        }
    }
}

/// A source of the topology, as the client wants it.
pub(super) fn topology_resource(resource: &Resource) -> ApiResource {
    let kind = if resource.plural == "nodes" { "Node" } else { "Service" };
    ApiResource {
        group: resource.group.clone(),
        version: resource.version.clone(),
        api_version: resource.api_version(),
        kind: kind.into(),
        plural: resource.plural.clone(),
    }
}

/// One watch of the API.
struct Source {
    client: kube::Client,
    resource: Resource,
    kind: String,
    changes: mpsc::Sender<Change>,
}

impl Source {
    async fn run(self) {
        let Resource { group, version, plural } = &self.resource;
        let api_version = self.resource.api_version();
        let resource = ApiResource {
            group: group.clone(),
            version: version.clone(),
            api_version: api_version.clone(),
            kind: self.kind.clone(),
            plural: plural.clone(),
        };
        let objects: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let mut events =
            std::pin::pin!(watcher::watcher(objects, watcher::Config::default()).default_backoff());
        let mut keys = BTreeSet::new();
        while let Some(event) = events.next().await {
            let read = |object: DynamicObject| {
                let mut object = crate::api::to_json(object);
                object["kind"] = self.kind.as_str().into();
                object["apiVersion"] = api_version.as_str().into();
                object
            };
            let resource = self.resource.clone();
            let change = match event {
                Ok(Event::Init) => {
                    tracing::debug!(%resource, "lists for applications");
                    keys.clear();
                    continue;
                }
                Ok(Event::InitApply(object)) => {
                    let object = read(object);
                    keys.extend(key_of(&resource, &object));
                    Change::Changed(resource, object)
                }
                Ok(Event::InitDone) => {
                    tracing::debug!(%resource, objects = keys.len(), "listed for applications");
                    Change::Listed(resource, std::mem::take(&mut keys))
                }
                Ok(Event::Apply(object)) => Change::Changed(resource, read(object)),
                Ok(Event::Delete(object)) => Change::Deleted(resource, read(object)),
                Err(error) => {
                    tracing::warn!(%resource, %error, "a watch for applications failed, trying again");
                    continue;
                }
            };
            if self.changes.send(change).await.is_err() {
                return;
            }
        }
    }
}
