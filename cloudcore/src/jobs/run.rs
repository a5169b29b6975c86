//! The task that carries node jobs out: it follows them in the API, and tells nodes.
//!
//! `skerry_cloudcore_core::jobs` decides. A job's status is written before anybody is told, with the version that was
//! read; when somebody else was faster, the decision is made anew. Reports of nodes are written by [`super::Jobs`] and
//! come back through the watch.
//!
//! Jobs are rare and small, so one task does them one after the other. It never waits for a node.

use super::Jobs;
use crate::api;
use crate::definitions::{self, Kinds};
use crate::hub::sleep_until;
use crate::upstream::answer::{Refused, now_ms};
use crate::upstream::rest::{self, Merge, Rest};
use crate::watch::is_over;
use futures::StreamExt;
use kube::api::{Api, ApiResource, DynamicObject, ListParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use serde_json::{Value, json};
use skerry_cloudcore_core::jobs::{Job, Node};
use skerry_protocol::job::{Kind, V1ALPHA2};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Word of the API on its way; the watches wait when it is full.
const CHANGES_MAX: usize = 64;
/// Jobs that are followed; more are told to a person, and taken when others are deleted and the watch begins anew.
const JOBS_MAX: usize = 1_000;
/// Pause after something that the API did not answer.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Decisions about one job in a row; each but the last changes its status.
const TURNS_MAX: usize = 8;
/// Nodes asked for at once, so that no answer is too long.
const PAGE: u32 = 250;

/// What the watches say.
enum Change {
    Seen(Kind, Value),
    Gone(Kind, String),
    Listed(Kind, BTreeSet<String>),
}

pub(super) fn spawn(jobs: Jobs, tasks: &TaskTracker, stop: &CancellationToken) {
    let (sender, changes) = mpsc::channel(CHANGES_MAX);
    let watch = Watch { client: jobs.client.clone(), changes: sender.clone() };
    let stopped = stop.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = stopped.cancelled() => {}
            () = definitions::follow(&watch) => {}
        }
    });
    let owner = Owner { jobs, entries: BTreeMap::new(), _changes: sender };
    let stop = stop.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = owner.run(changes) => {}
        }
    });
}

struct Entry {
    job: Job,
    object: Value,
    /// The nodes of the cluster, read when the job was first looked at.
    nodes: Option<BTreeMap<String, Node>>,
    due: Option<Instant>,
}

struct Owner {
    jobs: Jobs,
    entries: BTreeMap<(Kind, String), Entry>,
    /// So that `changes` never ends.
    _changes: mpsc::Sender<Change>,
}

impl Owner {
    async fn run(mut self, mut changes: mpsc::Receiver<Change>) {
        loop {
            let next = self.entries.values().filter_map(|entry| entry.due).min();
            tokio::select! {
                change = changes.recv() => self.take(change.expect("the owner holds a sender")),
                () = self.jobs.linked.notified() => {
                    let now = Some(Instant::now());
                    self.entries.values_mut().filter(|entry| Job::is_open(&entry.object)).for_each(|entry| entry.due = now);
                }
                () = sleep_until(next) => {}
            }
            while let Ok(change) = changes.try_recv() {
                self.take(change);
            }
            let now = Instant::now();
            let due = |(_, entry): &(_, &Entry)| entry.due.is_some_and(|due| due <= now);
            let due: Vec<_> = self.entries.iter().filter(due).map(|(key, _)| key.clone()).collect();
            for key in due {
                if let Err(refused) = self.look(&key).await {
                    tracing::warn!(job = key.1, kind = key.0.api_kind(), error = %refused, "a node job waits, trying again");
                    if let Some(entry) = self.entries.get_mut(&key) {
                        // Nobody was told what was decided.
                        entry.job = Job::new(key.0, &key.1);
                        entry.due = Some(Instant::now() + RETRY_INTERVAL);
                    }
                }
            }
            self.jobs
                .grant(self.entries.values().filter_map(|entry| entry.job.secret(&entry.object)));
        }
    }

    fn take(&mut self, change: Change) {
        match change {
            Change::Seen(kind, object) => {
                let Some(name) = object["metadata"]["name"].as_str().map(str::to_owned) else {
                    return;
                };
                let due = Some(Instant::now());
                let key = (kind, name);
                if let Some(entry) = self.entries.get_mut(&key) {
                    if entry.object["metadata"]["uid"] != object["metadata"]["uid"] {
                        entry.job = Job::new(kind, &key.1);
                        entry.nodes = None;
                    }
                    (entry.object, entry.due) = (object, due);
                } else if self.entries.len() < JOBS_MAX {
                    let job = Job::new(kind, &key.1);
                    self.entries.insert(key, Entry { job, object, nodes: None, due });
                } else {
                    tracing::warn!(
                        job = key.1,
                        "there are {JOBS_MAX} node jobs already, this one is not begun; delete old ones"
                    );
                }
            }
            Change::Gone(kind, name) => drop(self.entries.remove(&(kind, name))),
            Change::Listed(of, names) => {
                self.entries.retain(|(kind, name), _| *kind != of || names.contains(name));
            }
        }
    }

    /// Decides about one job until nothing is left to decide now.
    async fn look(&mut self, key: &(Kind, String)) -> Result<(), Refused> {
        let client = self.jobs.client.clone();
        let api = Rest::new(&client);
        let place =
            rest::path(&format!("/apis/{V1ALPHA2}"), "", key.0.plural(), rest::segment(&key.1)?)?;
        for _ in 0..TURNS_MAX {
            let Some(entry) = self.entries.get_mut(key) else { return Ok(()) };
            entry.due = None;
            let is_deleted = entry.object["metadata"]["deletionTimestamp"].is_string();
            if !is_deleted && !Job::is_open(&entry.object) {
                entry.nodes = None;
                return Ok(());
            }
            if entry.nodes.is_none() && !is_deleted {
                entry.nodes = Some(nodes(&client).await?);
            }
            let none = BTreeMap::new();
            let nodes = entry.nodes.as_ref().unwrap_or(&none);
            let links = self.jobs.links();
            let turn = entry.job.turn(&entry.object, nodes, &links, Instant::now(), now_ms());
            if let Some(left) = turn.finalizers {
                let patch = json!({"metadata": {"finalizers": left}});
                api.patch(&place, Merge::Json, &patch).await?;
                return Ok(());
            }
            entry.due = turn.next;
            let is_changed = turn.status.is_some();
            if let Some(status) = turn.status {
                let mut object = entry.object.clone();
                object["status"] = status;
                match api.replace(&format!("{place}/status"), &object).await {
                    Ok(written) => entry.object = written,
                    Err(refused) if refused.is_not_found() => {
                        self.entries.remove(key);
                        return Ok(());
                    }
                    Err(refused) if refused.is_conflict() => {
                        entry.job = Job::new(key.0, &key.1);
                        entry.object = api.get(&place).await?;
                        continue;
                    }
                    Err(refused) => return Err(refused),
                }
            }
            for (node, message) in turn.orders {
                tracing::info!(
                    job = key.1,
                    kind = key.0.api_kind(),
                    node,
                    "a node is told its job"
                );
                self.jobs.hub.send(&node, message).await;
            }
            if !is_changed {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// All nodes of the cluster.
async fn nodes(client: &kube::Client) -> Result<BTreeMap<String, Node>, Refused> {
    let all = api::all_objects(client, skerry_cloudcore_core::downstream::Kind::Node);
    let mut found = BTreeMap::new();
    let mut params = ListParams::default().limit(PAGE);
    loop {
        let page = all.list(&params).await.map_err(Refused::Unavailable)?;
        let read = page.items.into_iter().map(api::to_json).filter_map(|node| Node::read(&node));
        found.extend(read.map(|node| (node.name.clone(), node)));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok(found),
        }
    }
}

struct Watch {
    client: kube::Client,
    changes: mpsc::Sender<Change>,
}

impl Kinds for Watch {
    fn what(&self) -> String {
        format!("node jobs of `{V1ALPHA2}`")
    }

    fn client(&self) -> &kube::Client {
        &self.client
    }

    fn definitions(&self) -> Vec<Value> {
        skerry_api::kubeedge::operations()
    }

    async fn look(&self) -> kube::Result<bool> {
        for kind in Kind::ALL {
            if !definitions::is_there(&self.objects(kind)).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn watch(&self) {
        tokio::select! {
            () = self.watch_kind(Kind::NodeUpgrade) => {}
            () = self.watch_kind(Kind::ImagePrePull) => {}
            () = self.watch_kind(Kind::ConfigUpdate) => {}
        }
    }
}

impl Watch {
    fn objects(&self, kind: Kind) -> Api<DynamicObject> {
        let (group, version) = V1ALPHA2.split_once('/').expect("a group and a version");
        let resource = ApiResource {
            group: group.into(),
            version: version.into(),
            api_version: V1ALPHA2.into(),
            kind: kind.api_kind().into(),
            plural: kind.plural().into(),
        };
        Api::all_with(self.client.clone(), &resource)
    }

    /// Returns when the cluster no longer has the kind.
    async fn watch_kind(&self, kind: Kind) {
        let events = watcher::watcher(self.objects(kind), watcher::Config::default());
        let mut events = std::pin::pin!(events.default_backoff());
        let mut names = BTreeSet::new();
        while let Some(event) = events.next().await {
            let change = match event {
                Ok(Event::Init) => {
                    names.clear();
                    continue;
                }
                Ok(Event::InitApply(object)) => {
                    names.extend(object.metadata.name.clone());
                    Change::Seen(kind, whole(kind, object))
                }
                Ok(Event::InitDone) => Change::Listed(kind, std::mem::take(&mut names)),
                Ok(Event::Apply(object)) => Change::Seen(kind, whole(kind, object)),
                Ok(Event::Delete(object)) => {
                    Change::Gone(kind, object.metadata.name.unwrap_or_default())
                }
                Err(error) if is_over(&error) => return,
                Err(error) => {
                    tracing::warn!(kind = kind.api_kind(), %error, "watch failed, trying again");
                    continue;
                }
            };
            if self.changes.send(change).await.is_err() {
                return;
            }
        }
    }
}

/// Objects of a list carry no kind; a write needs it.
fn whole(kind: Kind, object: DynamicObject) -> Value {
    let mut object = api::to_json(object);
    object["kind"] = kind.api_kind().into();
    object["apiVersion"] = V1ALPHA2.into();
    object
}
