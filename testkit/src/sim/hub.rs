//! One hub: the real `Downstream`, and a real `Delivery` per connection.

use super::cluster::{Change, Cluster, SyncChange, SyncName, SyncRecord};
use serde_json::Value;
use skerry_cloudcore_core::downstream::{Downstream, Input, Key, Kind, Output, SessionId};
use skerry_cloudcore_core::objectsync::{Scope, Word, Write};
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
    /// Watches that broke and read a list again; `None` is the one of records.
    pub(super) lists: BTreeMap<Option<Kind>, List>,
    list_count: u64,
    next_session: SessionId,
}

/// A list that is being read.
pub(super) struct List {
    /// A broken list is begun again under another number.
    pub(super) number: u64,
    /// How far the log is that it shows, once it has been read.
    seen: Option<usize>,
    objects: Vec<(Key, Value)>,
    records: Vec<(SyncName, SyncRecord)>,
    keys: BTreeSet<Key>,
}

/// What the world has to do for a hub.
#[derive(Debug)]
pub(super) enum Task {
    Close {
        conn: u64,
    },
    Fetch(Key),
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
            lists: BTreeMap::new(),
            list_count: 0,
            next_session: epoch * 1_000_000 + 1,
        };
        // Records of what KubeEdge nodes hold come first, as they are read first.
        let records: Vec<_> =
            cluster.syncs.iter().map(|(name, of)| (name.clone(), of.clone())).collect();
        hub.tell_records(&records, now, now_ms);
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

    /// The watch of a kind, or of records, breaks and begins anew with a list. Returns the list's number.
    pub(super) fn begin_list(&mut self, of: Option<Kind>, now: Instant, now_ms: i64) -> u64 {
        self.list_count += 1;
        let (objects, records, keys) = (Vec::new(), Vec::new(), BTreeSet::new());
        let list = List { number: self.list_count, seen: None, objects, records, keys };
        self.lists.insert(of, list);
        match of {
            Some(kind) => self.input(Input::Listing(kind), now, now_ms),
            None => {
                for scope in [Scope::Namespaced, Scope::Cluster] {
                    self.input(Input::Sync(Word::Listing(scope)), now, now_ms);
                }
            }
        }
        self.list_count
    }

    /// The next thing happens to a list: the API reads it, a part of it arrives, or the last part. Returns whether it is
    /// complete.
    pub(super) fn go_on_with_list(
        &mut self,
        of: Option<Kind>,
        cluster: &Cluster,
        now: Instant,
        now_ms: i64,
    ) -> bool {
        let Some(mut list) = self.lists.remove(&of) else { return true };
        let Some(seen) = list.seen else {
            match of {
                Some(kind) => {
                    let objects = cluster.objects().filter(|(key, _)| key.kind() == kind);
                    list.objects = objects.map(|(key, of)| (key.clone(), of.clone())).collect();
                    list.keys = list.objects.iter().map(|(key, _)| key.clone()).collect();
                    list.seen = Some(cluster.log.len());
                }
                None => {
                    let records = cluster.syncs.iter();
                    list.records = records.map(|(name, of)| (name.clone(), of.clone())).collect();
                    list.seen = Some(cluster.sync_log.len());
                }
            }
            self.lists.insert(of, list);
            return false;
        };
        let Some(kind) = of else {
            self.sync_seen = seen;
            self.tell_records(&list.records, now, now_ms);
            return true;
        };
        // In two parts, and other things happen in between.
        let is_last = list.objects.len() <= 1;
        let part = list.objects.len().div_ceil(2);
        for (_, object) in list.objects.drain(..part) {
            self.input(Input::Changed(kind, object), now, now_ms);
        }
        if is_last {
            self.seen.insert(kind, seen);
            self.input(Input::Listed(kind, list.keys), now, now_ms);
        } else {
            self.lists.insert(of, list);
        }
        is_last
    }

    /// A complete list of records.
    fn tell_records(&mut self, records: &[(SyncName, SyncRecord)], now: Instant, now_ms: i64) {
        let mut listed: BTreeMap<bool, BTreeSet<(Option<Arc<str>>, Arc<str>)>> = BTreeMap::new();
        for (name, record) in records {
            let of: (Option<Arc<str>>, Arc<str>) =
                (name.0.as_deref().map(Arc::from), name.1.as_str().into());
            listed.entry(of.0.is_some()).or_default().insert(of);
            self.input(Input::Sync(seen(name, record, true)), now, now_ms);
        }
        for (scope, namespaced) in [(Scope::Namespaced, true), (Scope::Cluster, false)] {
            let names = listed.remove(&namespaced).unwrap_or_default();
            self.input(Input::Sync(Word::Listed(scope, names)), now, now_ms);
        }
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
    pub(super) fn watch_sync(&mut self, change: &SyncChange, now: Instant, now_ms: i64) {
        let word = match change.deleted {
            false => seen(&change.name, &change.record, false),
            true => {
                let (namespace, name) = &change.name;
                let (namespace, name) = (namespace.as_deref().map(Arc::from), name.as_str().into());
                Word::Gone { name, namespace, at: change.record.at }
            }
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

fn seen((namespace, name): &SyncName, record: &SyncRecord, is_in_list: bool) -> Word {
    Word::Seen {
        name: name.as_str().into(),
        namespace: namespace.as_deref().map(Arc::from),
        spec: record.spec.clone(),
        version: record.version.clone(),
        at: record.at,
        is_in_list,
    }
}
