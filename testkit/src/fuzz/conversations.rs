//! Targets that take a whole conversation: what a peer says in any order, with what happens between.
//!
//! The input is read as a list of choices. Objects have few names, uids and versions, so that they meet; now and then a
//! part of one is something else.

use super::corpus;
use serde_json::{Value, json};
use skerry_cloudcore_core::downstream::{
    Downstream, EDGE_LABEL, Input, Key, Kind, OUTSTANDING_MAX, Output, PUSHED_MAX, SessionId,
    Watched,
};
use skerry_cloudcore_core::objectsync::{Outcome, Scope, SyncSpec, Word, Write};
use skerry_edge_core::Now;
use skerry_edge_core::meta::{Meta, OBJECTS_MAX, Row, TOMBSTONES_MAX, Tombstone, Write as Stored};
use skerry_edge_core::node::{Facts, Health};
use skerry_edge_core::uplink::Uplink;
use skerry_protocol::capability::Capabilities;
use skerry_protocol::delivery::{Delivery, Event, Settings};
use skerry_protocol::digest::{self, Digest, Held};
use skerry_protocol::{Message, Operation, ResourcePath};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Choices of one conversation, so that one input does not take the time of many.
const CHOICES_MAX: usize = 1500;
/// Messages of the other end that are kept, so that some come again, or are answered late.
const KEPT_MAX: usize = 64;
const NODES: [&str; 3] = ["edge1", "edge2", "cloud1"];
const TOKENS: [&str; 8] = [
    "pod",
    "configmap",
    "secret",
    "node",
    "device",
    "devicemodel",
    "serviceaccountaccess",
    "lease",
];

/// The choices that are left.
struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self(&bytes[..bytes.len().min(CHOICES_MAX)])
    }

    fn byte(&mut self) -> u8 {
        let Some((byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *byte
    }

    fn below(&mut self, count: usize) -> usize {
        usize::from(self.byte()) % count
    }

    fn one_of<'b>(&mut self, of: &[&'b str]) -> &'b str {
        of[self.below(of.len())]
    }

    /// A value that stands where another one should.
    fn odd(&mut self) -> Value {
        match self.below(8) {
            0 => Value::Null,
            1 => json!([]),
            2 => json!({}),
            3 => json!(7),
            4 => json!("a/b"),
            5 => json!([null, {"name": []}]),
            6 => json!({"": {}}),
            _ => json!(true),
        }
    }

    fn version(&mut self) -> String {
        match self.below(16) {
            0 => String::new(),
            1 => "x1".into(),
            2 => u64::MAX.to_string(),
            version => version.to_string(),
        }
    }

    /// An object, nearly always of a shape that an API would give.
    fn object(&mut self, token: &str, name: &str) -> Value {
        let uid = format!("u{}", self.below(4));
        let mut object = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "uid": uid, "resourceVersion": self.version()},
            "data": {"k": self.below(3).to_string()}});
        match token {
            "pod" => {
                let config = format!("n{}", self.below(3));
                object["spec"] = json!({"nodeName": self.one_of(&NODES), "containers": [
                    {"name": "c", "image": "i", "envFrom": [{"configMapRef": {"name": config}}]}]});
                if self.below(6) == 0 {
                    object["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
                }
            }
            "device" => {
                let model = format!("n{}", self.below(3));
                object["spec"] =
                    json!({"nodeName": self.one_of(&NODES), "deviceModelRef": {"name": model}});
            }
            "node" => {
                object["metadata"]["name"] = self.one_of(&NODES).into();
                if self.below(2) == 0 {
                    object["metadata"]["labels"] = json!({EDGE_LABEL: ""});
                }
            }
            _ => {}
        }
        if self.below(8) == 0 {
            let part = self.one_of(&[
                "/metadata",
                "/metadata/uid",
                "/metadata/name",
                "/metadata/resourceVersion",
                "/metadata/labels",
                "/spec",
                "/spec/nodeName",
                "/spec/containers",
                "/spec/containers/0/envFrom",
                "/spec/deviceModelRef",
                "",
            ]);
            let odd = self.odd();
            if let Some(part) = object.pointer_mut(part) {
                *part = odd;
            }
        }
        object
    }

    fn name(&mut self) -> String {
        format!("n{}", self.below(3))
    }

    fn path(&mut self) -> (String, &'static str, String) {
        let token = self.one_of(&TOKENS);
        let name = if token == "node" { self.one_of(&NODES).to_owned() } else { self.name() };
        let namespace = if token == "node" { "null" } else { "default" };
        (format!("{namespace}/{token}/{name}"), token, name)
    }

    fn kind(&mut self) -> Kind {
        Kind::ALL[self.below(Kind::ALL.len())]
    }

    fn capabilities(&mut self) -> Capabilities {
        if self.below(3) > 0 { Capabilities::OURS } else { Capabilities::default() }
    }
}

fn recorded() -> &'static [Message] {
    static RECORDED: OnceLock<Vec<Message>> = OnceLock::new();
    RECORDED.get_or_init(corpus::read_messages)
}

/// An edge and a hub that says anything in any order. What is on the disk is what the edge says that it holds, at every
/// step, also when writes fail and after restarts; and nothing grows without a bound.
pub(super) fn edge(bytes: &[u8]) {
    let mut choices = Choices::new(bytes);
    let base = Instant::now();
    let mut now = Now { mono: base, wall: jiff::Timestamp::UNIX_EPOCH };
    let facts = || Facts { name: "edge1".into(), ..Facts::default() };
    let mut meta = Meta::restore("edge1", [], []).0;
    let mut uplink = Uplink::new(facts(), now, 1);
    uplink.update_node(now, facts(), Health::default());
    let mut rows: BTreeMap<String, Row> = BTreeMap::new();
    let mut tombstones: VecDeque<Tombstone> = VecDeque::new();
    let mut sent: VecDeque<Message> = VecDeque::new();
    let mut heard: VecDeque<Message> = VecDeque::new();
    while !choices.0.is_empty() {
        match choices.below(12) {
            0 => {
                let peer = choices.capabilities();
                let digest = peer.digest.then(|| meta.start_digest());
                uplink.handle_connected(now, peer, digest);
            }
            1 => {
                meta.link_lost();
                uplink.handle_disconnected(now);
            }
            2 => now.mono += Duration::from_millis(1 << choices.below(18)),
            3 => {
                let stored = rows.values().cloned().collect::<Vec<_>>();
                let stones = tombstones.clone();
                meta = Meta::restore("edge1", stored, stones).0;
                uplink = Uplink::new(facts(), now, 2);
                uplink.update_node(now, facts(), Health::default());
            }
            4 => {
                if let Ok(path) = choices.path().0.parse() {
                    uplink.lookup(now, path, Value::Null);
                }
            }
            5 | 6 => {
                // An answer to something that was asked, or to nothing.
                let index = choices.below(sent.len().max(1));
                let request = sent.get(index).unwrap_or(&recorded()[0]).clone();
                let (_, token, name) = choices.path();
                let object = choices.object(token, &name);
                let content = match choices.below(6) {
                    0 => json!("OK"),
                    1 => {
                        json!({"Object": null, "Err": {"ErrStatus": {"code": 404, "reason": "NotFound"}}})
                    }
                    2 => json!({"Object": object, "Err": null}),
                    3 => json!({"Object": object, "Err": choices.odd()}),
                    4 => choices.odd(),
                    _ => object,
                };
                let answer = match choices.below(5) {
                    0 => request.error(0, "edgecontroller", "resource", "web not found"),
                    _ => request.response(0, &content),
                };
                uplink.handle_reply(now, &answer);
            }
            kind => {
                let message = match kind {
                    7 => recorded()[choices.below(recorded().len())].clone(),
                    8 if !heard.is_empty() => heard[choices.below(heard.len())].clone(),
                    _ => {
                        let (path, token, name) = choices.path();
                        let object = choices.object(token, &name);
                        let operation = [Operation::Insert, Operation::Update, Operation::Delete]
                            [choices.below(3)];
                        let source = choices.one_of(&["edgecontroller", "dynamiccontroller", ""]);
                        let group = choices
                            .one_of(&["resource", "resource", "resource", "twin", "func", "x"]);
                        Message::new(0, source, group, operation, &path, &object)
                    }
                };
                heard.push_back(message.clone());
                heard.truncate(KEPT_MAX);
                uplink.handle_push(now);
                let step = meta.handle_push(now, &message);
                if choices.below(6) == 0 && step.write.is_some() {
                    continue; // the write failed
                }
                store(&mut rows, &mut tombstones, step.write.as_ref());
                let (ack, _) = meta.commit(step);
                if let Some(ack) = ack {
                    uplink.acknowledge(ack);
                }
            }
        }
        while let Some(output) = uplink.poll_output(now) {
            use skerry_edge_core::uplink::Output;
            let (path, object) = match output {
                Output::Answer { path, found: Ok(Some(object)), .. } => (path, object),
                Output::Object { path, object } => (path, object),
                Output::DigestAnswered => {
                    meta.digest_answered();
                    continue;
                }
                _ => continue,
            };
            take_answer(&mut meta, &path, object, &mut rows, &mut tombstones);
        }
        uplink.take_changes(now);
        uplink.handle_stored(now, true);
        for _ in 0..8 {
            let Some(message) = uplink.poll_transmit(now, |_| None) else { break };
            sent.push_front(message);
        }
        sent.truncate(KEPT_MAX);
        uplink.want_digest(meta.digest_due());
        let _ = uplink.poll_timeout(now);
        check_edge(&meta, &rows, &tombstones);
    }
}

fn take_answer(
    meta: &mut Meta,
    path: &ResourcePath,
    object: Value,
    rows: &mut BTreeMap<String, Row>,
    tombstones: &mut VecDeque<Tombstone>,
) {
    let step = meta.handle_answer(path, object);
    store(rows, tombstones, step.write.as_ref());
    meta.commit(step);
}

fn store(
    rows: &mut BTreeMap<String, Row>,
    tombstones: &mut VecDeque<Tombstone>,
    write: Option<&Stored>,
) {
    match write {
        Some(Stored::Put(row)) => {
            tombstones.retain(|known| known.uid != row.uid);
            rows.insert(row.path.clone(), row.clone());
        }
        Some(Stored::Remove { path, tombstone }) => {
            rows.remove(path);
            if let Some(tombstone) = tombstone {
                tombstones.retain(|known| known.uid != tombstone.uid);
                tombstones.push_back(tombstone.clone());
                if tombstones.len() > TOMBSTONES_MAX {
                    tombstones.pop_front();
                }
            }
        }
        None => {}
    }
}

fn check_edge(meta: &Meta, rows: &BTreeMap<String, Row>, tombstones: &VecDeque<Tombstone>) {
    assert!(meta.len() <= OBJECTS_MAX && tombstones.len() <= TOMBSTONES_MAX);
    assert_eq!(meta.len(), rows.len(), "what is held is on the disk");
    for (path, row) in rows {
        let held = meta.held(path).expect("what is on the disk is held");
        assert_eq!(held.uid, row.uid, "{path}");
        let path: ResourcePath = path.parse().expect("only good paths are stored");
        assert!(path.name().is_some(), "only objects are stored");
    }
}

/// A hub, with nodes, an API and a peer that say anything in any order. Queues stay within their bounds, messages go
/// only to the node that they are for, and reads are asked for only as often as they are answered.
pub(super) fn hub(bytes: &[u8]) {
    let mut choices = Choices::new(bytes);
    let mut hub = Hub::default();
    let mut now = Instant::now();
    if choices.below(8) > 0 {
        for kind in Kind::ALL {
            hub.handle(Input::Listed(kind, BTreeSet::new()), now);
        }
        for scope in [Scope::Namespaced, Scope::Cluster] {
            hub.handle(Input::Sync(Word::Listed(scope, BTreeSet::new())), now);
        }
    }
    while !choices.0.is_empty() {
        if choices.below(4) == 0 {
            now += Duration::from_millis(1 << choices.below(16));
        }
        hub.step(&mut choices, now);
        hub.drain(now);
    }
}

#[derive(Default)]
struct Hub {
    downstream: Downstream,
    deliveries: BTreeMap<SessionId, (String, Delivery)>,
    last_session: SessionId,
    fetches: Vec<Key>,
    relists: Vec<String>,
    writes: Vec<Write>,
    written: VecDeque<(SessionId, Arc<Message>)>,
}

impl Hub {
    fn handle(&mut self, input: Input, now: Instant) {
        self.downstream.handle(input, now, 0);
    }

    fn session(&mut self, choices: &mut Choices) -> SessionId {
        // Also of connections that are gone, and that never were.
        self.last_session.saturating_sub(choices.below(4) as u64)
    }

    fn step(&mut self, choices: &mut Choices, now: Instant) {
        let node = choices.one_of(&NODES).to_owned();
        let (path, token, name) = choices.path();
        match choices.below(20) {
            0 => {
                self.last_session += 1;
                let session = self.last_session;
                let capabilities = choices.capabilities();
                let settings =
                    if capabilities.window { Settings::ours() } else { Settings::stock() };
                self.deliveries.insert(session, (node.clone(), Delivery::new(settings)));
                self.handle(Input::Connected { node, session, capabilities }, now);
            }
            1 => {
                let session = self.session(choices);
                self.deliveries.remove(&session);
                self.handle(Input::Disconnected { node, session }, now);
            }
            2 | 3 => {
                let session = self.session(choices);
                let mut digest = Digest::default();
                for _ in 0..choices.below(6) {
                    let (path, ..) = choices.path();
                    let path = if choices.below(12) == 0 { "//?".into() } else { path };
                    let uid = format!("u{}", choices.below(4));
                    let of = match choices.below(5) {
                        0 => &mut digest.watched,
                        1 => &mut digest.disputed,
                        _ => &mut digest.objects,
                    };
                    of.insert(path, Held { uid, rv: choices.version() });
                }
                let request = Message::new(
                    0,
                    "metamanager",
                    "meta",
                    Operation::Query,
                    digest::RESOURCE,
                    &digest,
                );
                self.handle(
                    Input::Digest { node, session, digest, request: Box::new(request) },
                    now,
                );
            }
            4..8 => {
                // An acknowledgement, by the delivery or by nobody who was asked.
                let Some((session, message)) =
                    self.written.get(choices.below(self.written.len().max(1))).cloned()
                else {
                    return;
                };
                match choices.below(8) {
                    0 => self.handle(Input::Acked { node, session, message }, now),
                    1 => {
                        let dropped = choices.below(2) == 0;
                        self.handle(Input::Unanswered { node, session, message, dropped }, now);
                    }
                    _ => {
                        if let Some((_, delivery)) = self.deliveries.get_mut(&session) {
                            delivery.handle_ack(&message.header.msg_id, now);
                        }
                    }
                }
            }
            8..11 => {
                let object = choices.object(token, &name);
                let kind = choices.kind();
                let kind = Kind::ALL.into_iter().find(|of| of.token() == token).unwrap_or(kind);
                self.handle(Input::Changed(kind, object), now);
            }
            11 => {
                let Some(key) = path.parse().ok().and_then(|path| Key::of_path(&path)) else {
                    return;
                };
                let last = choices.object(token, &name);
                self.handle(Input::Deleted(key, last), now);
            }
            12 => {
                let kind = choices.kind();
                let mut keys = BTreeSet::new();
                for _ in 0..choices.below(4) {
                    let key = choices.path().0.parse().ok().and_then(|path| Key::of_path(&path));
                    keys.extend(key.filter(|key| key.kind() == kind));
                }
                self.handle(Input::Listed(kind, keys), now);
            }
            13 => {
                let kind = choices.kind();
                self.handle(Input::Unavailable(kind), now);
            }
            14 if !self.fetches.is_empty() => {
                let key = self.fetches.swap_remove(choices.below(self.fetches.len()));
                let object = choices.object(key.kind().token(), key.name());
                let object = (choices.below(3) > 0).then_some(object);
                let at = choices.version().parse().ok();
                self.handle(Input::Fetched(key, object, at), now);
            }
            15 if !self.relists.is_empty() => {
                let node = self.relists.swap_remove(choices.below(self.relists.len()));
                let pods = (0..choices.below(4)).map(|_| {
                    let name = choices.name();
                    choices.object("pod", &name)
                });
                let pods = pods.collect();
                let at = choices.version().parse().ok();
                self.handle(Input::Relisted(node, pods, at), now);
            }
            16 => {
                let uid = format!("u{}", choices.below(4));
                let name: Arc<str> = match choices.below(8) {
                    0 => "no name".into(),
                    _ => format!("{node}.{uid}").into(),
                };
                let namespace = (choices.below(4) > 0).then(|| "default".into());
                let word = match choices.below(5) {
                    0 => Word::Gone { name, namespace, at: choices.below(8) as u64 },
                    1 => match choices.below(2) {
                        0 => Word::Unavailable,
                        _ => Word::Listing([Scope::Namespaced, Scope::Cluster][choices.below(2)]),
                    },
                    2 => {
                        let scope = [Scope::Namespaced, Scope::Cluster][choices.below(2)];
                        Word::Listed(scope, BTreeSet::from([(namespace, name)]))
                    }
                    _ => {
                        let kind = choices.kind();
                        let (api_version, kind) =
                            (kind.api_version().into(), kind.api_kind().into());
                        let spec = SyncSpec { api_version, kind, name: choices.name().into() };
                        let version = choices.version();
                        let version = (!version.is_empty()).then(|| version.into());
                        let (at, is_in_list) = (choices.below(8) as u64, choices.below(4) == 0);
                        Word::Seen { name, namespace, spec, version, at, is_in_list }
                    }
                };
                self.handle(Input::Sync(word), now);
            }
            17 if !self.writes.is_empty() => {
                let write = self.writes.swap_remove(choices.below(self.writes.len()));
                let at = choices.below(8) as u64;
                let outcome = match choices.below(5) {
                    0 => Outcome::Done(at),
                    1 => Outcome::Failed,
                    2 => Outcome::Conflict,
                    3 => Outcome::Refused,
                    _ => Outcome::Found { version: Some(choices.version().into()), at },
                };
                let word = Word::Written { node: write.node, id: write.id, outcome };
                self.handle(Input::Sync(word), now);
            }
            19 => {
                // A watch that breaks, and what its list shows; the end may come, late or never.
                let kind = choices.kind();
                self.handle(Input::Listing(kind), now);
                let mut keys = BTreeSet::new();
                for _ in 0..choices.below(4) {
                    let name = choices.name();
                    let object = choices.object(kind.token(), &name);
                    keys.extend(Key::of_object(kind, &object));
                    self.handle(Input::Changed(kind, object), now);
                }
                if choices.below(3) > 0 {
                    self.handle(Input::Listed(kind, keys), now);
                }
            }
            18 => {
                let object = choices.object(token, &name);
                let key = path.parse().ok().and_then(|path| Key::watched(&path));
                let (Some(key), Some(object)) = (key, Watched::read(object)) else { return };
                let operation =
                    [Operation::Insert, Operation::Update, Operation::Delete][choices.below(3)];
                self.handle(Input::Pushed { node, key, object, operation }, now);
            }
            _ => self.handle(Input::Tick, now),
        }
    }

    fn drain(&mut self, now: Instant) {
        loop {
            let mut is_done = true;
            while let Some(output) = self.downstream.poll_output() {
                match output {
                    Output::Send { node, session, message } => {
                        let Some((owner, delivery)) = self.deliveries.get_mut(&session) else {
                            continue;
                        };
                        assert_eq!(*owner, *node, "a message goes to the node that it is for");
                        // One that an application watches may be any; one that is deleted was held.
                        let is_own = message.operation() != Some(Operation::Delete)
                            && message.route.source == "edgecontroller";
                        if let Some(name) = message.route.resource.strip_prefix("null/node/")
                            && is_own
                        {
                            assert_eq!(name, &*node, "no node is told of another");
                        }
                        delivery.queue(*message).expect("what is outstanding is bounded far below");
                    }
                    Output::Close { session, .. } => drop(self.deliveries.remove(&session)),
                    Output::Fetch(key) => self.fetches.push(key),
                    Output::Relist(node) => self.relists.push(node),
                    Output::Sync(write) => self.writes.push(write),
                }
            }
            let mut events = Vec::new();
            for (session, (node, delivery)) in &mut self.deliveries {
                while let Some(message) = delivery.poll_transmit(now) {
                    self.written.push_front((*session, message));
                }
                while let Some(event) = delivery.poll_event() {
                    events.push((*session, node.clone(), event));
                }
                assert!(delivery.len() <= OUTSTANDING_MAX + 64, "{} wait", delivery.len());
                let _ = delivery.poll_timeout();
            }
            self.written.truncate(KEPT_MAX);
            for (session, node, event) in events {
                is_done = false;
                self.handle(
                    match event {
                        Event::Delivered(message) => Input::Acked { node, session, message },
                        Event::Unanswered(message) => {
                            Input::Unanswered { node, session, message, dropped: false }
                        }
                        Event::Dropped(message) => {
                            Input::Unanswered { node, session, message, dropped: true }
                        }
                    },
                    now,
                );
            }
            if is_done {
                break;
            }
        }
        let _ = (self.downstream.poll_timeout(), self.downstream.totals());
        for node in NODES {
            if let Some(backlog) = self.downstream.backlog(node) {
                assert!(backlog.outstanding <= OUTSTANDING_MAX, "{backlog:?}");
                assert!(backlog.waiting <= PUSHED_MAX + 1000, "{backlog:?}");
            }
        }
    }
}
