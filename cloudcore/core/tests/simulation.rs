//! A fleet in one thread: [`Downstream`] and [`Delivery`] over links that are cut, with a hub that restarts, watches
//! that lag and records that are written late or never, against an edge that only stores. Time is virtual and every
//! choice comes from a seed.
//!
//! Replay one run with `SKERRY_SEED=<seed>`; a failure prints its seed.

#![expect(
    clippy::disallowed_methods,
    reason = "a test starts its clock somewhere and takes its seed from outside"
)]

use serde_json::{Value, json};
use skerry_cloudcore_core::downstream::{Downstream, Input, Key, Kind, Output, SessionId};
use skerry_cloudcore_core::objectsync::{Action, Outcome, Scope, SyncSpec, Word, Write};
use skerry_cloudcore_core::references;
use skerry_protocol::capability::Capabilities;
use skerry_protocol::delivery::{Delivery, Event, Settings, ack_required};
use skerry_protocol::digest::{self, Digest, Held};
use skerry_protocol::{Message, Operation};
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

const NODES: [&str; 3] = ["edge1", "edge2", "edge3"];
const CONFIGS: [&str; 3] = ["a", "b", "c"];
const MODELS: [&str; 2] = ["m", "n"];
const SEEDS: u64 = 60;
const STEPS: usize = 600;
/// Steps after the last change until everything has to be settled.
const SETTLE_STEPS: usize = 20_000;

#[test]
fn nodes_of_ours_converge_through_cuts_and_hub_restarts() {
    run_seeds(Fleet::Ours);
}

#[test]
fn stock_nodes_converge_through_cuts_and_hub_restarts() {
    run_seeds(Fleet::Stock);
}

#[test]
fn stock_nodes_converge_through_cuts_where_nothing_is_recorded() {
    run_seeds(Fleet::StockUnrecorded);
}

fn run_seeds(fleet: Fleet) {
    let seeds = match std::env::var("SKERRY_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 0..SEEDS,
    };
    for seed in seeds {
        println!("seed {seed}");
        World::new(seed, fleet).run();
    }
}

/// Which edges take part. Without records a hub restart loses what it knows of stock edges, so there it is left out.
#[derive(Clone, Copy, PartialEq)]
enum Fleet {
    Ours,
    Stock,
    StockUnrecorded,
}

/// Records in the cluster, by namespace and name.
type Records = BTreeMap<RecordId, Record>;
type RecordId = (Option<Arc<str>>, Arc<str>);
/// What it is about, the version that it says, and its own version.
type Record = (SyncSpec, Option<Arc<str>>, u64);

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }
}

struct World {
    random: Random,
    fleet: Fleet,
    now: Instant,
    version: u64,
    /// The Kubernetes API.
    api: BTreeMap<Key, Value>,
    /// Watch events on their way to the hub, per kind.
    watches: BTreeMap<Kind, VecDeque<Input>>,
    /// Reads that the hub asked for.
    reads: VecDeque<Output>,
    /// What each node has acknowledged, as the cluster has it.
    records: Records,
    record_version: u64,
    /// Words about records on their way to the hub.
    words: VecDeque<Word>,
    /// Writes of records that the hub asked for.
    writes: VecDeque<Write>,
    hub: Downstream,
    sessions: BTreeMap<SessionId, (String, Delivery)>,
    next_session: SessionId,
    edges: BTreeMap<String, Edge>,
}

#[derive(Default)]
struct Edge {
    stored: BTreeMap<String, Held>,
    /// Pods of these uids are gone for good.
    deleted: HashSet<String>,
    link: Option<Link>,
}

struct Link {
    session: SessionId,
    down: VecDeque<Message>,
    up: VecDeque<Message>,
}

impl World {
    fn new(seed: u64, fleet: Fleet) -> Self {
        let mut world = Self {
            random: Random(seed),
            fleet,
            now: Instant::now(),
            version: 0,
            api: BTreeMap::new(),
            watches: BTreeMap::new(),
            reads: VecDeque::new(),
            records: Records::new(),
            record_version: 0,
            words: VecDeque::new(),
            writes: VecDeque::new(),
            hub: Downstream::default(),
            sessions: BTreeMap::new(),
            next_session: 1,
            edges: NODES.iter().map(|name| ((*name).into(), Edge::default())).collect(),
        };
        world.restart_hub();
        world
    }

    fn run(mut self) {
        for _ in 0..STEPS {
            match self.random.below(44) {
                0..=3 => self.change_config(),
                4..=7 => self.change_pod(),
                8 => self.delete_config(),
                9..=10 => self.delete_pod(),
                11 => self.cut(),
                12..=14 => self.connect(),
                15 if self.fleet != Fleet::StockUnrecorded && self.random.below(10) == 0 => {
                    self.restart_hub();
                }
                16 => self.now += Duration::from_millis(self.random.below(7_000) as u64),
                17 => self.touch_node(),
                18..=20 => self.change_device(),
                21 => self.change_model(),
                22 => self.delete_some(Kind::Device, "dev"),
                23 => self.delete_model(),
                _ => self.move_something(),
            }
        }
        // A device without its model is in between; with all models there, every device has its place.
        for name in MODELS {
            if !self.api.contains_key(&key(Kind::DeviceModel, name)) {
                self.write_model(name);
            }
        }
        for _ in 0..SETTLE_STEPS {
            if self.is_settled() {
                break;
            }
            self.connect_all();
            self.move_something();
            self.now += Duration::from_millis(20);
        }
        for name in NODES {
            assert_eq!(self.edges[name].stored, self.desired(name), "what `{name}` holds");
        }
        if self.fleet == Fleet::Stock {
            let held = self.edges.iter().flat_map(|(name, edge)| {
                edge.stored
                    .values()
                    .map(move |held| (format!("{name}.{}", held.uid), held.rv.clone()))
            });
            let recorded = self.records.iter().map(|((_, name), (_, version, _))| {
                (name.to_string(), version.as_deref().unwrap_or_default().to_owned())
            });
            let held: BTreeMap<_, _> = held.collect();
            let mut recorded: BTreeMap<_, _> = recorded.collect();
            // One of an object that went may stay until the node's next connection, which deletes the object once more.
            recorded.retain(|name, _| held.contains_key(name));
            assert_eq!(recorded, held, "what is recorded");
        }
    }

    fn is_settled(&mut self) -> bool {
        self.drain_hub();
        self.words.is_empty()
            && self.writes.is_empty()
            && self.watches.values().all(VecDeque::is_empty)
            && self.reads.is_empty()
            && self.hub.poll_timeout().is_none()
            && self.sessions.values().all(|(_, delivery)| delivery.is_empty())
            && self.edges.values().all(|edge| {
                edge.link.as_ref().is_some_and(|link| link.down.is_empty() && link.up.is_empty())
            })
    }

    /// What a node should hold. Versions that differ in nothing that matters count as equal, so the body says which.
    fn desired(&self, node: &str) -> BTreeMap<String, Held> {
        let mut desired = BTreeMap::new();
        let mut keys = BTreeSet::from([key(Kind::Node, node)]);
        for (placed, object) in &self.api {
            let references = match placed.kind() {
                Kind::Pod => references::of_pod(object),
                Kind::Device => references::of_device(object),
                _ => continue,
            };
            if object["spec"]["nodeName"] == node {
                keys.insert(placed.clone());
                keys.extend(references);
            }
        }
        for key in keys {
            if let Some(object) = self.api.get(&key) {
                desired.insert(key.to_string(), held(object));
            }
        }
        desired
    }

    // The API

    fn write(&mut self, kind: Kind, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let key = Key::of_object(kind, &object).expect("names are good");
        self.api.insert(key, object.clone());
        self.watches.entry(kind).or_default().push_back(Input::Changed(kind, object));
    }

    fn delete(&mut self, key: &Key) {
        if let Some(mut object) = self.api.remove(key) {
            self.version += 1;
            object["metadata"]["resourceVersion"] = self.version.to_string().into();
            let event = Input::Deleted(key.clone(), object);
            self.watches.entry(key.kind()).or_default().push_back(event);
        }
    }

    fn change_config(&mut self) {
        let key = key(Kind::ConfigMap, CONFIGS[self.random.below(CONFIGS.len())]);
        let mark = self.version + 1;
        let mut object = self.api.get(&key).cloned().unwrap_or_else(|| self.fresh(&key));
        object["data"] = json!({"mark": mark});
        self.write(Kind::ConfigMap, object);
    }

    fn change_pod(&mut self) {
        let name = format!("pod{}", self.random.below(5));
        let key = key(Kind::Pod, &name);
        let mark = self.version + 1;
        let mut object = match self.api.get(&key) {
            Some(object) => object.clone(),
            None => {
                let mut object = self.fresh(&key);
                let from: Vec<_> = CONFIGS
                    .iter()
                    .filter(|_| self.random.below(2) == 0)
                    .map(|name| json!({"configMapRef": {"name": name}}))
                    .collect();
                let node = NODES[self.random.below(NODES.len())];
                object["spec"] = json!({"nodeName": node, "containers": [{"envFrom": from}]});
                object
            }
        };
        object["metadata"]["labels"] = json!({"mark": mark.to_string()});
        self.write(Kind::Pod, object);
    }

    fn change_device(&mut self) {
        let name = format!("dev{}", self.random.below(4));
        let key = key(Kind::Device, &name);
        let mark = self.version + 1;
        let mut object = self.api.get(&key).cloned().unwrap_or_else(|| self.fresh(&key));
        let is_new = object.get("spec").is_none();
        if is_new || self.random.below(4) == 0 {
            // A device may move; that of a pod never changes.
            object["spec"]["nodeName"] = NODES[self.random.below(NODES.len())].into();
            let model = MODELS[self.random.below(MODELS.len())];
            object["spec"]["deviceModelRef"]["name"] = model.into();
        }
        object["spec"]["mark"] = mark.into();
        self.write(Kind::Device, object);
    }

    fn change_model(&mut self) {
        let name = MODELS[self.random.below(MODELS.len())];
        self.write_model(name);
    }

    fn write_model(&mut self, name: &str) {
        let key = key(Kind::DeviceModel, name);
        let mark = self.version + 1;
        let mut object = self.api.get(&key).cloned().unwrap_or_else(|| self.fresh(&key));
        object["spec"] = json!({"mark": mark});
        self.write(Kind::DeviceModel, object);
    }

    fn delete_model(&mut self) {
        let name = MODELS[self.random.below(MODELS.len())];
        self.delete(&key(Kind::DeviceModel, name));
    }

    fn delete_some(&mut self, kind: Kind, prefix: &str) {
        let name = format!("{prefix}{}", self.random.below(4));
        self.delete(&key(kind, &name));
    }

    fn touch_node(&mut self) {
        let name = NODES[self.random.below(NODES.len())];
        let key = key(Kind::Node, name);
        let mark = self.version + 1;
        let mut object = self.api.get(&key).cloned().unwrap_or_else(|| self.fresh(&key));
        object["metadata"]["labels"] =
            json!({"node-role.kubernetes.io/edge": "", "mark": mark.to_string()});
        self.write(Kind::Node, object);
    }

    fn fresh(&self, key: &Key) -> Value {
        json!({"metadata": {"name": key.name(), "namespace": "default",
            "uid": format!("{}-{}", key.name(), self.version + 1)}})
    }

    fn delete_config(&mut self) {
        let name = CONFIGS[self.random.below(CONFIGS.len())];
        self.delete(&key(Kind::ConfigMap, name));
    }

    fn delete_pod(&mut self) {
        let name = format!("pod{}", self.random.below(5));
        self.delete(&key(Kind::Pod, &name));
    }

    // The hub

    fn restart_hub(&mut self) {
        for name in NODES {
            self.cut_link(name);
        }
        self.sessions.clear();
        self.reads.clear();
        // What was under way may have been done, and nobody hears of it.
        while let Some(write) = self.writes.pop_front() {
            if self.random.below(2) == 0 {
                self.write_record(&write);
            }
        }
        self.words.clear();
        self.hub = Downstream::default();
        if self.fleet == Fleet::StockUnrecorded {
            self.words.push_back(Word::Unavailable);
        } else {
            for (id, record) in &self.records {
                self.words.push_back(seen(id, record, true));
            }
            for scope in [Scope::Namespaced, Scope::Cluster] {
                let of_scope =
                    |namespace: &Option<_>| namespace.is_none() == (scope == Scope::Cluster);
                let names = self.records.keys().filter(|(namespace, _)| of_scope(namespace));
                self.words.push_back(Word::Listed(scope, names.cloned().collect()));
            }
        }
        for kind in Kind::ALL {
            let of_kind: Vec<_> = self.api.iter().filter(|(key, _)| key.kind() == kind).collect();
            let keys = of_kind.iter().map(|(key, _)| (*key).clone()).collect();
            let mut events: VecDeque<_> =
                of_kind.iter().map(|(_, object)| Input::Changed(kind, (*object).clone())).collect();
            events.push_back(Input::Listed(kind, keys));
            self.watches.insert(kind, events);
        }
    }

    /// What the API does for a write.
    fn write_record(&mut self, write: &Write) -> Outcome {
        let id = (write.id.namespace.clone(), Arc::from(write.name()));
        let is_seen = |at: u64| write.at == 0 || write.at == at;
        let version = match &write.action {
            Action::Delete => {
                match self.records.get(&id) {
                    None => return Outcome::Done(0),
                    Some((_, _, at)) if !is_seen(*at) => return Outcome::Conflict,
                    Some(_) => {}
                }
                self.records.remove(&id);
                self.record_version += 1;
                let ((namespace, name), at) = (id, self.record_version);
                self.words.push_back(Word::Gone { name, namespace, at });
                return Outcome::Done(0);
            }
            Action::Create(version) => {
                if let Some((_, version, at)) = self.records.get(&id) {
                    return Outcome::Found { version: version.clone(), at: *at };
                }
                self.record_version += 1;
                let record = (write.spec.clone(), None, self.record_version);
                self.words.push_back(seen(&id, &record, false));
                self.records.insert(id.clone(), record);
                if self.random.below(8) == 0 {
                    // The API had a bad moment between the two requests.
                    return Outcome::Failed;
                }
                version
            }
            Action::Status(version) => version,
        };
        let is_new = matches!(write.action, Action::Create(_));
        let Some(record) = self.records.get_mut(&id) else { return Outcome::Conflict };
        if !is_new && !is_seen(record.2) {
            return Outcome::Conflict;
        }
        self.record_version += 1;
        (record.1, record.2) = (Some(Arc::clone(version)), self.record_version);
        let word = seen(&id, record, false);
        self.words.push_back(word);
        // The answer of a write that was done may be lost.
        match self.random.below(8) {
            0 => Outcome::Failed,
            _ => Outcome::Done(self.record_version),
        }
    }

    fn input(&mut self, input: Input) {
        self.hub.handle(input, self.now, 0);
        self.drain_hub();
    }

    fn drain_hub(&mut self) {
        while let Some(output) = self.hub.poll_output() {
            match output {
                Output::Send { node, session, message } => {
                    let (owner, delivery) = self.sessions.get_mut(&session).expect("a session");
                    assert_eq!(**owner, *node);
                    delivery.queue(*message).expect("there is room");
                }
                Output::Close { node, session, .. } => {
                    self.sessions.remove(&session);
                    let edge = self.edges.get_mut(&*node).expect("an edge");
                    edge.link.take_if(|link| link.session == session);
                }
                Output::Sync(write) => {
                    assert!(self.fleet == Fleet::Stock, "no record without need: {write:?}");
                    self.writes.push_back(write);
                }
                read @ (Output::Fetch(_) | Output::Relist(_)) => self.reads.push_back(read),
            }
        }
    }

    // The links

    fn connect(&mut self) {
        let name = NODES[self.random.below(NODES.len())];
        // Now and then the old connection is not known to be dead yet.
        if self.edges[name].link.is_none() || self.random.below(10) == 0 {
            self.open_link(name);
        }
    }

    fn connect_all(&mut self) {
        for name in NODES {
            if self.edges[name].link.is_none() {
                self.open_link(name);
            }
        }
    }

    fn open_link(&mut self, name: &str) {
        let session = self.next_session;
        self.next_session += 1;
        let ours = self.fleet == Fleet::Ours;
        let settings = if ours { Settings::ours() } else { Settings::stock() };
        self.sessions.insert(session, (name.into(), Delivery::new(settings)));
        let capabilities = Capabilities { digest: ours, ..Capabilities::default() };
        self.input(Input::Connected { node: name.into(), session, capabilities });
        let edge = self.edges.get_mut(name).expect("an edge");
        let mut link = Link { session, down: VecDeque::new(), up: VecDeque::new() };
        if ours {
            let held = Digest { objects: edge.stored.clone(), ..Digest::default() };
            let source = "metamanager";
            link.up.push_back(Message::new(
                0,
                source,
                "meta",
                Operation::Query,
                digest::RESOURCE,
                &held,
            ));
        }
        edge.link = Some(link);
    }

    fn cut(&mut self) {
        let name = NODES[self.random.below(NODES.len())];
        self.cut_link(name);
    }

    /// What is on its way in either direction is lost; a prefix of it may have arrived.
    fn cut_link(&mut self, name: &str) {
        let Some(link) = self.edges.get_mut(name).and_then(|edge| edge.link.take()) else { return };
        self.sessions.remove(&link.session);
        self.input(Input::Disconnected { node: name.into(), session: link.session });
    }

    // Something that is on its way arrives.

    fn move_something(&mut self) {
        match self.random.below(6) {
            0 => {
                let kind = Kind::ALL[self.random.below(Kind::ALL.len())];
                if let Some(event) = self.watches.get_mut(&kind).and_then(VecDeque::pop_front) {
                    self.input(event);
                }
            }
            1 => match self.reads.pop_front() {
                Some(Output::Fetch(key)) => {
                    let object = self.api.get(&key).cloned();
                    self.input(Input::Fetched(key, object, Some(self.version)));
                }
                Some(Output::Relist(node)) => {
                    let pods = self.api.iter().filter(|(key, _)| key.kind() == Kind::Pod);
                    let pods = pods.map(|(_, pod)| pod.clone());
                    let pods =
                        pods.filter(|pod| pod["spec"]["nodeName"] == node.as_str()).collect();
                    self.input(Input::Relisted(node, pods, Some(self.version)));
                }
                _ => self.input(Input::Tick),
            },
            2 => match self.random.below(2) {
                0 => {
                    if let Some(word) = self.words.pop_front() {
                        self.input(Input::Sync(word));
                    }
                }
                _ => {
                    if let Some(write) = self.writes.pop_front() {
                        let outcome = self.write_record(&write);
                        let Write { node, id, .. } = write;
                        self.input(Input::Sync(Word::Written { node, id, outcome }));
                    }
                }
            },
            _ => {
                let name = NODES[self.random.below(NODES.len())];
                self.transmit(name);
                if self.random.below(2) == 0 {
                    self.receive_down(name);
                } else {
                    self.receive_up(name);
                }
            }
        }
    }

    fn transmit(&mut self, name: &str) {
        let edge = self.edges.get_mut(name).expect("an edge");
        let Some(link) = &mut edge.link else { return };
        let Some((_, delivery)) = self.sessions.get_mut(&link.session) else { return };
        let session = link.session;
        while let Some(message) = delivery.poll_transmit(self.now) {
            link.down.push_back((*message).clone());
        }
        self.report(name, session);
    }

    fn receive_down(&mut self, name: &str) {
        let edge = self.edges.get_mut(name).expect("an edge");
        let Some(message) = edge.link.as_mut().and_then(|link| link.down.pop_front()) else {
            return;
        };
        if !ack_required(&message) {
            return;
        }
        edge.store(name, &message);
        if self.random.below(20) == 0 {
            // Stored, and the acknowledgement does not come this time.
            return;
        }
        let link = edge.link.as_mut().expect("it delivered just now");
        link.up.push_back(message.ack(0));
    }

    fn receive_up(&mut self, name: &str) {
        let edge = self.edges.get_mut(name).expect("an edge");
        let Some(link) = &mut edge.link else { return };
        let session = link.session;
        let Some(message) = link.up.pop_front() else { return };
        if message.route.resource == digest::RESOURCE {
            let digest = message.content_as().expect("a digest");
            let request = Box::new(message);
            return self.input(Input::Digest { node: name.into(), session, digest, request });
        }
        let Some((_, delivery)) = self.sessions.get_mut(&session) else { return };
        delivery.handle_ack(&message.header.parent_msg_id, self.now);
        self.report(name, session);
    }

    /// Tells the hub what became of messages.
    fn report(&mut self, name: &str, session: SessionId) {
        let Some((_, delivery)) = self.sessions.get_mut(&session) else { return };
        let events: Vec<_> = std::iter::from_fn(|| delivery.poll_event()).collect();
        for event in events {
            let node = name.to_owned();
            self.input(match event {
                Event::Delivered(message) => Input::Acked { node, session, message },
                Event::Unanswered(message) => {
                    Input::Unanswered { node, session, message, dropped: false }
                }
                Event::Dropped(message) => {
                    Input::Unanswered { node, session, message, dropped: true }
                }
            });
        }
    }
}

impl Edge {
    fn store(&mut self, name: &str, message: &Message) {
        let object: Value = message.content_as().expect("an object");
        let path = message.route.resource.clone();
        let new = held(&object);
        let is_pod = path.contains("/pod/");
        if message.operation() == Some(Operation::Delete) {
            if is_pod {
                self.deleted.insert(new.uid.clone());
            }
            // As KubeEdge's edge does: only a pod is compared by uid.
            self.stored.retain(|stored, held| *stored != path || (is_pod && held.uid != new.uid));
            return;
        }
        if is_pod {
            assert_eq!(object["spec"]["nodeName"], name, "a pod of another node");
            assert!(!self.deleted.contains(&new.uid), "{path} {} came back", new.uid);
        }
        let model = &object["spec"]["deviceModelRef"]["name"];
        if let Some(model) = model.as_str()
            && self.stored.get(&path) != Some(&new)
        {
            let model = format!("default/devicemodel/{model}");
            assert!(self.stored.contains_key(&model), "{path} came before its model");
        }
        if let Some(old) = self.stored.get(&path).filter(|old| old.uid == new.uid) {
            let number = |held: &Held| held.rv.parse::<u64>().expect("a number");
            assert!(number(old) <= number(&new), "{path} went back");
        }
        self.stored.insert(path, new);
    }
}

fn seen(id: &RecordId, record: &Record, is_in_list: bool) -> Word {
    let ((namespace, name), (spec, version, at)) = (id.clone(), record.clone());
    Word::Seen { name, namespace, spec, version, at, is_in_list }
}

fn held(object: &Value) -> Held {
    let text = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
    Held { uid: text("uid"), rv: text("resourceVersion") }
}

fn key(kind: Kind, name: &str) -> Key {
    Key::new(kind, "default", name).expect("names are good")
}
