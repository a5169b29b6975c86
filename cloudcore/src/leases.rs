//! Keeps the Leases of nodes that leave that to the hub.
//!
//! A session says when its node is up, when it beats and when it is gone; one task owns the
//! [`Schedule`](skerry_cloudcore_core::leases::Schedule) and writes. A renewal is one patch of what a renewal changes,
//! without a version: nobody else writes these fields, so there is nothing to conflict with. A Lease that is not there is
//! made, with the Node as its owner, so that it goes when the Node goes.

use crate::hub::{Hub, sleep_until};
use crate::upstream::answer::Refused;
use crate::upstream::lease;
use crate::upstream::rest::{self, Merge, Rest};
use serde_json::{Value, json};
use skerry_cloudcore_core::downstream::{Key, Kind};
use skerry_cloudcore_core::leases::{Renewal, Schedule};
use std::time::Instant;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Words of sessions on their way; a beat beyond that is not needed, and others wait.
const WORDS_MAX: usize = 4096;

enum Word {
    Up(String),
    Beat(String),
    Down(String),
}

/// The way to the task that keeps Leases.
#[derive(Clone)]
pub(crate) struct Leases {
    words: mpsc::Sender<Word>,
}

impl Leases {
    /// Starts the task.
    pub(crate) fn spawn(
        client: kube::Client,
        hub: Hub,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Self {
        let (words, received) = mpsc::channel(WORDS_MAX);
        tasks.spawn(run(client, hub, received, stop.clone()));
        Self { words }
    }

    /// A connection of `node` is up. Its Lease is kept until there have been as many calls of [`Leases::down`].
    pub(crate) async fn up(&self, node: &str) {
        let _ = self.words.send(Word::Up(node.to_owned())).await;
    }

    /// `node` is alive.
    pub(crate) fn beat(&self, node: &str) {
        // The next one will do as well.
        let _ = self.words.try_send(Word::Beat(node.to_owned()));
    }

    /// A connection of `node` has ended.
    pub(crate) async fn down(&self, node: &str) {
        let _ = self.words.send(Word::Down(node.to_owned())).await;
    }
}

async fn run(
    client: kube::Client,
    hub: Hub,
    mut words: mpsc::Receiver<Word>,
    stop: CancellationToken,
) {
    let mut schedule = Schedule::default();
    // Bounded by the schedule.
    let mut writes = JoinSet::new();
    loop {
        while let Some(renewal) = schedule.poll(Instant::now()) {
            let (client, hub) = (client.clone(), hub.clone());
            writes.spawn(async move {
                let ok = write(&client, &hub, &renewal).await;
                (renewal.node, ok)
            });
        }
        let timeout = schedule.poll_timeout();
        tokio::select! {
            () = stop.cancelled() => return,
            word = words.recv() => match word {
                None => return,
                Some(Word::Up(node)) => schedule.up(&node, Instant::now()),
                Some(Word::Beat(node)) => schedule.beat(&node, Instant::now()),
                Some(Word::Down(node)) => schedule.down(&node),
            },
            Some(done) = writes.join_next() => {
                let (node, ok) = done.expect("a write does not panic and is not aborted");
                schedule.done(&node, ok, Instant::now());
            }
            () = sleep_until(timeout) => {}
        }
    }
}

/// Whether the Lease is renewed.
async fn write(client: &kube::Client, hub: &Hub, renewal: &Renewal) -> bool {
    match renew(client, hub, renewal).await {
        Ok(renewed) => renewed,
        Err(error) => {
            tracing::warn!(node = renewal.node, %error, "a lease could not be renewed, trying again");
            false
        }
    }
}

/// `false` when there is no Node yet.
async fn renew(client: &kube::Client, hub: &Hub, renewal: &Renewal) -> Result<bool, Refused> {
    let api = Rest::new(client);
    let node = renewal.node.as_str();
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string();
    let spec = json!({"holderIdentity": node, "renewTime": now,
        "leaseDurationSeconds": renewal.duration.as_secs()});
    match api.patch(&lease::lease_path(node)?, Merge::Json, &json!({ "spec": spec })).await {
        Err(refused) if refused.is_not_found() => create(api, hub, node, &spec).await,
        done => done.map(|_| true),
    }
}

async fn create(api: Rest<'_>, hub: &Hub, node: &str, spec: &Value) -> Result<bool, Refused> {
    // Without its Node a Lease would stay for ever; a node registers before it needs one.
    let Some(uid) = uid(api, hub, node).await? else { return Ok(false) };
    let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": node, "namespace": lease::NAMESPACE, "ownerReferences": [{
            "apiVersion": "v1", "kind": "Node", "name": node, "uid": uid}]},
        "spec": spec});
    match api.create(&rest::path(lease::ROOT, lease::NAMESPACE, "leases", "")?, &lease).await {
        // An edge that keeps its own was faster.
        Err(refused) if refused.is_already_exists() => Ok(true),
        done => done.map(|_| true),
    }
}

/// The node's uid, which the hub knows from its watch, most of the time; `None` when there is no Node.
async fn uid(api: Rest<'_>, hub: &Hub, node: &str) -> Result<Option<String>, Refused> {
    if let Some(key) = Key::new(Kind::Node, "", node)
        && let Some((_, uid)) = hub.binding(&key).await
    {
        return Ok(Some(uid));
    }
    match api.get(&rest::core("", "nodes", node)?).await {
        Err(refused) if refused.is_not_found() => Ok(None),
        found => Ok(found?["metadata"]["uid"].as_str().map(str::to_owned)),
    }
}
