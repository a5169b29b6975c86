//! A fleet in one thread: [`Downstream`] and [`Delivery`] over links that are cut, with a hub that restarts and watches
//! that lag, against an edge that only stores. Time is virtual and every choice comes from a seed.
//!
//! Replay one run with `SKERRY_SEED=<seed>`; a failure prints its seed.

#![expect(
    clippy::disallowed_methods,
    reason = "a test starts its clock somewhere and takes its seed from outside"
)]

use serde_json::{Value, json};
use skerry_cloudcore_core::downstream::{Downstream, Input, Key, Kind, Output, SessionId};
use skerry_protocol::capability::Capabilities;
use skerry_protocol::delivery::{Delivery, Event, ack_required};
use skerry_protocol::digest::{self, Digest, Held};
use skerry_protocol::{Message, Operation};
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::time::{Duration, Instant};

const NODES: [&str; 3] = ["edge1", "edge2", "edge3"];
const CONFIGS: [&str; 3] = ["a", "b", "c"];
const SEEDS: u64 = 150;
const STEPS: usize = 600;
/// Steps after the last change until everything has to be settled.
const SETTLE_STEPS: usize = 20_000;

#[test]
fn nodes_of_ours_converge_through_cuts_and_hub_restarts() {
    run_seeds(Fleet::Ours);
}

#[test]
fn stock_nodes_converge_through_cuts() {
    run_seeds(Fleet::Stock);
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

/// Which edges take part. A hub restart loses what it knows of stock edges, so there it is left out.
#[derive(Clone, Copy, PartialEq)]
enum Fleet {
    Ours,
    Stock,
}

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
            match self.random.below(40) {
                0..=3 => self.change_config(),
                4..=7 => self.change_pod(),
                8 => self.delete_config(),
                9..=10 => self.delete_pod(),
                11 => self.cut(),
                12..=14 => self.connect(),
                15 if self.fleet == Fleet::Ours && self.random.below(10) == 0 => self.restart_hub(),
                16 => self.now += Duration::from_millis(self.random.below(7_000) as u64),
                17 => self.touch_node(),
                _ => self.move_something(),
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
    }

    fn is_settled(&mut self) -> bool {
        self.drain_hub();
        self.watches.values().all(VecDeque::is_empty)
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
        for (pod_key, pod) in &self.api {
            if pod_key.kind() == Kind::Pod && pod["spec"]["nodeName"] == node {
                keys.insert(pod_key.clone());
                keys.extend(skerry_cloudcore_core::references::of_pod(pod));
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
        self.hub = Downstream::default();
        for kind in Kind::ALL {
            let of_kind: Vec<_> = self.api.iter().filter(|(key, _)| key.kind() == kind).collect();
            let keys = of_kind.iter().map(|(key, _)| (*key).clone()).collect();
            let mut events: VecDeque<_> =
                of_kind.iter().map(|(_, object)| Input::Changed(kind, (*object).clone())).collect();
            events.push_back(Input::Listed(kind, keys));
            self.watches.insert(kind, events);
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
                    assert_eq!(*owner, node);
                    delivery.queue(*message).expect("there is room");
                }
                Output::Close { node, session, .. } => {
                    self.sessions.remove(&session);
                    let edge = self.edges.get_mut(&node).expect("an edge");
                    edge.link.take_if(|link| link.session == session);
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
        self.sessions.insert(session, (name.into(), Delivery::default()));
        let ours = self.fleet == Fleet::Ours;
        let capabilities = Capabilities { digest: ours };
        self.input(Input::Connected { node: name.into(), session, capabilities });
        let edge = self.edges.get_mut(name).expect("an edge");
        let mut link = Link { session, down: VecDeque::new(), up: VecDeque::new() };
        if ours {
            let held = Digest { objects: edge.stored.clone() };
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
        match self.random.below(4) {
            0 => {
                let kind = Kind::ALL[self.random.below(4)];
                if let Some(event) = self.watches.get_mut(&kind).and_then(VecDeque::pop_front) {
                    self.input(event);
                }
            }
            1 => match self.reads.pop_front() {
                Some(Output::Fetch(key)) => {
                    let object = self.api.get(&key).cloned();
                    self.input(Input::Fetched(key, object));
                }
                Some(Output::Relist(node)) => {
                    let is_of = |pod: &&Value| pod["spec"]["nodeName"] == node.as_str();
                    let pods = self.api.values().filter(is_of).cloned().collect();
                    self.input(Input::Relisted(node, pods));
                }
                _ => self.input(Input::Tick),
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
        while let Some(message) = delivery.poll_transmit(self.now) {
            link.down.push_back((*message).clone());
        }
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
        delivery.handle_ack(&message.header.parent_msg_id);
        let mut acked = Vec::new();
        while let Some(event) = delivery.poll_event() {
            if let Event::Delivered(message) = event {
                acked.push(message);
            }
        }
        for message in acked {
            self.input(Input::Acked { node: name.into(), session, message });
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
        if let Some(old) = self.stored.get(&path).filter(|old| old.uid == new.uid) {
            let number = |held: &Held| held.rv.parse::<u64>().expect("a number");
            assert!(number(old) <= number(&new), "{path} went back");
        }
        self.stored.insert(path, new);
    }
}

fn held(object: &Value) -> Held {
    let text = |name: &str| object["metadata"][name].as_str().unwrap_or_default().to_owned();
    Held { uid: text("uid"), rv: text("resourceVersion") }
}

fn key(kind: Kind, name: &str) -> Key {
    Key::new(kind, "default", name).expect("names are good")
}
