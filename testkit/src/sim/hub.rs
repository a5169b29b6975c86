//! One hub: the real `Downstream`, and a real `Delivery` per connection.

use super::cluster::{Change, Cluster, SyncName};
use serde_json::json;
use skerry_cloudcore_core::downstream::{Downstream, Input, Kind, Output, SessionId};
use skerry_cloudcore_core::objectsync::{Action, Outcome, Scope, Word, Write};
use skerry_protocol::capability::Capabilities;
use skerry_protocol::delivery::{Delivery, Event, Settings};
use skerry_protocol::{Message, Operation};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

/// A connection as the hub has it.
pub(super) struct Session {
    pub(super) node: String,
    pub(super) conn: u64,
    pub(super) delivery: Delivery,
}

/// A hub process.
pub(super) struct Hub {
    pub(super) downstream: Downstream,
    pub(super) sessions: BTreeMap<SessionId, Session>,
    /// Number of the process; what was meant for an earlier one is void.
    pub(super) epoch: u64,
    /// Entries of the cluster's log that it has seen.
    pub(super) seen: BTreeMap<Kind, usize>,
    /// The same for the log of records.
    pub(super) sync_seen: usize,
    next_session: SessionId,
}

/// What the world has to do for a hub.
#[derive(Debug)]
pub(super) enum Task {
    Close {
        conn: u64,
    },
    Fetch(skerry_cloudcore_core::downstream::Key),
    Relist(String),
    Sync(Write),
    /// An object was acknowledged by a node.
    Acked {
        node: String,
        message: Arc<Message>,
    },
}

impl Hub {
    /// Starts with complete lists of what the cluster has now.
    pub(super) fn start(epoch: u64, cluster: &Cluster, now: Instant, now_ms: i64) -> Self {
        let mut hub = Self {
            downstream: Downstream::default(),
            sessions: BTreeMap::new(),
            epoch,
            seen: Kind::ALL.into_iter().map(|kind| (kind, cluster.log.len())).collect(),
            sync_seen: cluster.sync_log.len(),
            next_session: epoch * 1_000_000 + 1,
        };
        // Records of what KubeEdge nodes hold come first, as they are read first.
        let mut listed: BTreeMap<bool, BTreeSet<(Option<Arc<str>>, Arc<str>)>> = BTreeMap::new();
        for ((namespace, name), (spec, version)) in &cluster.syncs {
            let namespace: Option<Arc<str>> = namespace.as_deref().map(Arc::from);
            let name: Arc<str> = name.as_str().into();
            listed
                .entry(namespace.is_some())
                .or_default()
                .insert((namespace.clone(), Arc::clone(&name)));
            let word = Word::Seen {
                name,
                namespace,
                spec: read_spec(spec),
                version: version.as_deref().map(Arc::from),
            };
            hub.input(Input::Sync(word), now, now_ms);
        }
        for (scope, namespaced) in [(Scope::Namespaced, true), (Scope::Cluster, false)] {
            let names = listed.remove(&namespaced).unwrap_or_default();
            hub.input(Input::Sync(Word::Listed(scope, names)), now, now_ms);
        }
        for kind in Kind::ALL {
            let of_kind: Vec<_> = cluster.objects().filter(|(key, _)| key.kind() == kind).collect();
            let keys: BTreeSet<_> = of_kind.iter().map(|(key, _)| (*key).clone()).collect();
            for (_, object) in of_kind {
                hub.input(Input::Changed(kind, object.clone()), now, now_ms);
            }
            hub.input(Input::Listed(kind, keys), now, now_ms);
        }
        hub
    }

    pub(super) fn input(&mut self, input: Input, now: Instant, now_ms: i64) {
        self.downstream.handle(input, now, now_ms);
    }

    pub(super) fn watch(&mut self, change: &Change, now: Instant, now_ms: i64) {
        let object = change.object.clone();
        let input = match change.deleted {
            true => Input::Deleted(change.key.clone(), object),
            false => Input::Changed(change.key.kind(), object),
        };
        self.input(input, now, now_ms);
    }

    /// A record was written by somebody, or is gone.
    pub(super) fn watch_sync(
        &mut self,
        cluster: &Cluster,
        of: &SyncName,
        now: Instant,
        now_ms: i64,
    ) {
        let name: Arc<str> = of.1.as_str().into();
        let namespace: Option<Arc<str>> = of.0.as_deref().map(Arc::from);
        let word = match cluster.syncs.get(of) {
            None => Word::Gone { name, namespace },
            Some((spec, version)) => Word::Seen {
                name,
                namespace,
                spec: read_spec(spec),
                version: version.as_deref().map(Arc::from),
            },
        };
        self.input(Input::Sync(word), now, now_ms);
    }

    pub(super) fn connect(
        &mut self,
        node: &str,
        conn: u64,
        capabilities: Capabilities,
        now: Instant,
        now_ms: i64,
    ) {
        let session = self.next_session;
        self.next_session += 1;
        let settings = if capabilities.window { Settings::ours() } else { Settings::stock() };
        let delivery = Delivery::new(settings);
        self.sessions.insert(session, Session { node: node.into(), conn, delivery });
        let node = node.to_owned();
        self.input(Input::Connected { node, session, capabilities }, now, now_ms);
    }

    pub(super) fn disconnect(&mut self, conn: u64, now: Instant, now_ms: i64) {
        let found = self.sessions.iter().find(|(_, session)| session.conn == conn);
        let Some(id) = found.map(|(id, _)| *id) else { return };
        let session = self.sessions.remove(&id).expect("found just now");
        self.input(Input::Disconnected { node: session.node, session: id }, now, now_ms);
    }

    /// A message of a node that is a digest or an acknowledgement; returns others.
    pub(super) fn receive(
        &mut self,
        conn: u64,
        message: Message,
        now: Instant,
        now_ms: i64,
    ) -> Option<Message> {
        use skerry_protocol::digest;
        let (id, session) = self.sessions.iter_mut().find(|(_, session)| session.conn == conn)?;
        match message.operation() {
            Some(Operation::Keepalive) => None,
            Some(Operation::Response) => {
                session.delivery.handle_ack(&message.header.parent_msg_id, now);
                None
            }
            Some(Operation::Error) => None,
            _ if message.route.resource == digest::RESOURCE => {
                let (node, session) = (session.node.clone(), *id);
                let digest = message.content_as().ok()?;
                let request = Box::new(message);
                self.input(Input::Digest { node, session, digest, request }, now, now_ms);
                None
            }
            _ => Some(message),
        }
    }

    /// Passes on what the decisions and the deliveries have to say; returns what the world must do.
    /// `loses_deletes` is [`super::Sabotage::LosesDeletes`].
    pub(super) fn drain(&mut self, now: Instant, now_ms: i64, loses_deletes: bool) -> Vec<Task> {
        let mut tasks = Vec::new();
        loop {
            let mut has_worked = false;
            while let Some(output) = self.downstream.poll_output() {
                has_worked = true;
                match output {
                    Output::Send { node, session, message }
                        if loses_deletes && message.operation() == Some(Operation::Delete) =>
                    {
                        let (node, message) = (node.to_string(), Arc::new(*message));
                        self.input(Input::Acked { node, session, message }, now, now_ms);
                    }
                    Output::Send { session, message, .. } => {
                        let Some(open) = self.sessions.get_mut(&session) else { continue };
                        if open.delivery.queue(*message).is_err() {
                            tasks.push(Task::Close { conn: open.conn });
                        }
                    }
                    Output::Close { session, .. } => {
                        if let Some(closed) = self.sessions.remove(&session) {
                            tasks.push(Task::Close { conn: closed.conn });
                        }
                    }
                    Output::Fetch(key) => tasks.push(Task::Fetch(key)),
                    Output::Relist(node) => tasks.push(Task::Relist(node)),
                    Output::Sync(write) => tasks.push(Task::Sync(write)),
                }
            }
            let mut words = Vec::new();
            for (id, session) in &mut self.sessions {
                while let Some(event) = session.delivery.poll_event() {
                    words.push((*id, session.node.clone(), event));
                }
            }
            for (session, node, event) in words {
                has_worked = true;
                let input = match event {
                    Event::Delivered(message) => {
                        tasks.push(Task::Acked { node: node.clone(), message: message.clone() });
                        Input::Acked { node, session, message }
                    }
                    Event::Unanswered(message) => {
                        Input::Unanswered { node, session, message, dropped: false }
                    }
                    Event::Dropped(message) => {
                        Input::Unanswered { node, session, message, dropped: true }
                    }
                };
                self.input(input, now, now_ms);
            }
            if !has_worked {
                return tasks;
            }
        }
    }

    /// When something is due by itself.
    pub(super) fn timeout(&self) -> Option<Instant> {
        let deliveries = self.sessions.values().filter_map(|open| open.delivery.poll_timeout());
        deliveries.chain(self.downstream.poll_timeout()).min()
    }
}

/// Carries out a write of an ObjectSync record, as the API would.
pub(super) fn write_sync(cluster: &mut Cluster, write: &Write) -> Outcome {
    let of = (write.id.namespace.as_deref().map(str::to_owned), write.name());
    let spec = json!({"objectAPIVersion": &*write.spec.api_version,
        "objectKind": &*write.spec.kind, "objectName": &*write.spec.name});
    cluster.sync_log.push(of.clone());
    match &write.action {
        Action::Create(version) => {
            cluster.syncs.insert(of, (spec, Some(version.to_string())));
            Outcome::Done
        }
        Action::Status(version) => match cluster.syncs.get_mut(&of) {
            Some((_, held)) => {
                *held = Some(version.to_string());
                Outcome::Done
            }
            None => Outcome::Missing,
        },
        Action::Delete => {
            cluster.syncs.remove(&of);
            Outcome::Done
        }
    }
}

fn read_spec(spec: &serde_json::Value) -> skerry_cloudcore_core::objectsync::SyncSpec {
    let text = |name: &str| spec[name].as_str().unwrap_or_default().into();
    skerry_cloudcore_core::objectsync::SyncSpec {
        api_version: text("objectAPIVersion"),
        kind: text("objectKind"),
        name: text("objectName"),
    }
}
