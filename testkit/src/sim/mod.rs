//! One world from one seed.
//!
//! Two hubs watch one cluster, each with a lag of its own; a few nodes, ours and KubeEdge-like ones, dial either. For a
//! while objects change and things break: links are cut or fall silent, classes of messages overtake each other,
//! messages come twice, readers are slow or never read, hubs restart or lag, their watches break and begin anew with a
//! list, agents are killed, disks are full or lost, wall clocks jump, and some clusters are restored from a backup. Then
//! the faults stop, and everything has to come to rest.
//!
//! A cluster is restored only where all nodes are ours: what a KubeEdge node holds of the time that was lost is known to
//! no hub that started after it. What it had lost and has again, pods that ended in the lost time among it, has to come
//! back to the nodes too.
//!
//! Checked at every step: what a node acknowledged is on its disk; on nodes of ours versions of an object only grow
//! (a KubeEdge node takes what comes, and a hub that lags cannot know what it has not acknowledged); nothing is given to
//! the engine twice; nothing that was deleted comes back; queues stay within their bounds. Checked at the end: every
//! node holds exactly what it should, the cluster knows the last status of every pod and every event, and nothing waits.

mod cluster;
mod edge;
mod hub;

use cluster::{Backup, Change, Cluster, SyncChange};
use edge::Edge;
use hub::{Hub, Task};
use serde_json::{Value, json};
use skerry_cloudcore_core::downstream::{
    EDGE_LABEL, Input, Key, Kind, OUTSTANDING_LEN_MAX, OUTSTANDING_MAX,
};
use skerry_edge_core::Now;
use skerry_edge_core::backoff::Random;
use skerry_protocol::priority::Class;
use skerry_protocol::{Message, Operation};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two beats of our own nodes.
pub(crate) const BEAT: Duration = Duration::from_secs(25);
/// Silence after which an end gives a connection up: two beats and a grace of 5 s; KubeEdge's 30 s is close enough.
const SILENCE_MAX: Duration = Duration::from_secs(55);
/// How long faults happen.
const STORM: Duration = Duration::from_secs(180);
/// How long the world may take to come to rest: the longest timers are the hub's records (60 s) and an unanswered
/// row of an outbox (60 s), each of which may have to pass twice.
const REST: Duration = Duration::from_secs(900);
/// Messages that a connection holds before its writer waits, as the buffers of a socket do.
const PIPE_MAX: usize = 32;
/// Steps between two looks whether everything has come to rest.
const REST_LOOK_EVERY: u64 = 128;
/// Steps of one world, beyond which something runs in a circle.
const STEPS_MAX: u64 = 2_000_000;
/// Size of the largest object of a world.
const OBJECT_LEN_MAX: usize = 16 * 1024;
/// Objects of one node that may wait as keys: those that it should have and those that it should no longer have.
const KEYS_MAX: usize = 256;
/// Answers of a hub to a node's requests that may wait beside what `OUTSTANDING_MAX` bounds.
const ANSWERS_MAX: usize = 256;

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    what: String,
}

impl Violation {
    fn new(what: String) -> Self {
        Self { what }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Violation {}

/// What a world was like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Steps of the world.
    pub steps: u64,
    /// Messages that arrived, both ways.
    pub messages: u64,
    /// Faults that happened.
    pub faults: u64,
}

/// Something that an end does wrong on purpose, to see that the simulation finds it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sabotage {
    /// Nothing; this is how a world is judged.
    #[default]
    None,
    /// The agent acknowledges what it could not write.
    AcksBeforeItWrites,
    /// The agent's disk keeps no tombstones.
    KeepsNoTombstones,
    /// The agent's disk keeps no outbox.
    KeepsNoOutbox,
    /// The agent never asks whether what it refuses for its version is true.
    DisputesNothing,
    /// The hub loses deletes, and believes that they were acknowledged.
    LosesDeletes,
    /// The hub reads from what its watch has shown, where it should ask the API.
    ReadsFromItsCache,
}

/// Runs the world of this seed.
///
/// # Errors
///
/// [`Violation`], the first promise that was broken.
pub fn run(seed: u64) -> Result<Summary, Violation> {
    World::new(seed, Sabotage::None).run()
}

/// Runs the world of this seed with one end that does something wrong.
///
/// # Errors
///
/// As [`run`], and that is what should come of it.
pub fn run_sabotaged(seed: u64, sabotage: Sabotage) -> Result<Summary, Violation> {
    World::new(seed, sabotage).run()
}

/// The same, and prints every step to standard error.
///
/// # Errors
///
/// As [`run`].
pub fn run_aloud(seed: u64) -> Result<Summary, Violation> {
    let mut world = World::new(seed, Sabotage::None);
    world.aloud = true;
    world.run()
}

#[derive(Debug)]
enum Event {
    /// A user or a controller does something to the cluster, or something breaks.
    Life,
    /// A hub sees the next entry of the log.
    Watch {
        hub: usize,
        epoch: u64,
    },
    HubTimer {
        hub: usize,
        epoch: u64,
    },
    Fetched {
        hub: usize,
        epoch: u64,
        key: Key,
    },
    Relisted {
        hub: usize,
        epoch: u64,
        node: String,
    },
    /// The next thing happens to a list that a hub reads, of a kind or of records.
    List {
        hub: usize,
        epoch: u64,
        of: Option<Kind>,
        number: u64,
    },
    Synced {
        hub: usize,
        epoch: u64,
        write: skerry_cloudcore_core::objectsync::Write,
    },
    Request {
        hub: usize,
        epoch: u64,
        conn: u64,
        message: Box<Message>,
    },
    EdgeTimer {
        edge: usize,
        life: u64,
    },
    Dial {
        edge: usize,
        life: u64,
    },
    Start {
        edge: usize,
    },
    Engine {
        edge: usize,
        life: u64,
        uid: String,
    },
    /// The head of a stream arrives.
    Down {
        conn: u64,
        class: usize,
    },
    Up {
        conn: u64,
        class: usize,
    },
    /// An end looks whether the other is still there.
    Silence {
        conn: u64,
    },
}

/// One connection: a stream each way per class (one for all classes with a KubeEdge-like node).
struct Conn {
    edge: usize,
    life: u64,
    hub: usize,
    epoch: u64,
    /// What is sent no longer arrives, and nobody was told.
    silent: bool,
    /// Which end still has it open.
    edge_open: bool,
    hub_open: bool,
    down: Vec<Stream>,
    up: Vec<Stream>,
    /// The edge does not read before.
    slow_until: Duration,
}

#[derive(Default)]
struct Stream {
    queue: VecDeque<Message>,
    last: Duration,
}

struct World {
    aloud: bool,
    /// How far the logs of the cluster have been printed.
    told: (usize, usize),
    sabotage: Sabotage,
    random: Random,
    base: Instant,
    now: Duration,
    wall_jump_ms: i64,
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    events: BTreeMap<u64, Event>,
    sequence: u64,
    cluster: Cluster,
    hubs: Vec<Hub>,
    watch_stopped_until: [Duration; 2],
    /// Whether this cluster may be restored, and its backup.
    may_go_back: bool,
    backup: Option<Backup>,
    edges: Vec<Edge>,
    conns: BTreeMap<u64, Conn>,
    current: Vec<Option<u64>>,
    next_conn: u64,
    summary: Summary,
    names: u64,
    /// When the timer of a hub (0, 1) or a node (from 2) fires, by its life.
    timers: BTreeMap<(usize, u64), Duration>,
}

/// Operation and resource of a message, and which object in which version it carries.
fn in_short(message: &Message) -> String {
    let route = &message.route;
    let object: Value = message.content_as().unwrap_or_default();
    let object = object.get("Object").unwrap_or(&object);
    let metadata = &object["metadata"];
    let mut text = format!("{} {}", route.operation, route.resource);
    for field in ["uid", "resourceVersion", "deletionTimestamp"] {
        if let Some(value) = metadata[field].as_str() {
            text.extend([" ", if field == "deletionTimestamp" { "ending" } else { value }]);
        }
    }
    text
}

impl World {
    fn new(seed: u64, sabotage: Sabotage) -> Self {
        let mut random = Random::new(seed);
        let base = Instant::now();
        let cluster = Cluster::default();
        let hubs = (0..2).map(|index| Hub::start(index + 1, &cluster, base, 0)).collect();
        let count = 2 + random.below(2) as usize;
        let may_go_back = random.below(5) == 0;
        let edges: Vec<Edge> = (0..count)
            .map(|index| {
                let ours = may_go_back || index != 1;
                Edge::new(format!("edge{index}"), ours, random.next_u64(), sabotage)
            })
            .collect();
        Self {
            aloud: false,
            told: (0, 0),
            sabotage,
            random,
            base,
            now: Duration::ZERO,
            wall_jump_ms: 0,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            sequence: 0,
            cluster,
            hubs,
            watch_stopped_until: [Duration::ZERO; 2],
            may_go_back,
            backup: None,
            current: vec![None; edges.len()],
            edges,
            conns: BTreeMap::new(),
            next_conn: 1,
            summary: Summary::default(),
            names: 0,
            timers: BTreeMap::new(),
        }
    }

    fn run(mut self) -> Result<Summary, Violation> {
        for edge in 0..self.edges.len() {
            self.after(0, Event::Start { edge });
        }
        self.after(1000, Event::Life);
        while let Some(Reverse((time, id))) = self.queue.pop() {
            if self.now < STORM && time >= STORM {
                self.calm();
            }
            self.now = self.now.max(time);
            if self.now > STORM + REST {
                break;
            }
            let event = self.events.remove(&id).expect("queued with it");
            if self.aloud {
                self.tell(&event);
            }
            self.summary.steps += 1;
            if self.summary.steps > STEPS_MAX {
                return Err(Violation::new(format!("more than {STEPS_MAX} steps")));
            }
            let done = self.handle(event);
            if self.aloud {
                self.tell_changes();
            }
            done?;
            self.check_bounds()?;
            let is_time = self.summary.steps.is_multiple_of(REST_LOOK_EVERY);
            if self.now > STORM && is_time && self.at_rest().is_ok() {
                return Ok(self.summary);
            }
        }
        self.at_rest()?;
        Ok(self.summary)
    }

    /// Prints what happens now.
    fn tell(&self, event: &Event) {
        let what = match event {
            Event::Synced { hub, write, .. } => {
                format!(
                    "hub {hub} writes record {} {:?} at {}",
                    write.name(),
                    write.action,
                    write.at
                )
            }
            Event::Request { hub, message, .. } => {
                format!("hub {hub} asks the API for {}", in_short(message))
            }
            other => format!("{other:?}"),
        };
        eprintln!("{:>9.3} s  {what}", self.now.as_secs_f64());
    }

    /// Prints what has become of the cluster since the last time.
    fn tell_changes(&mut self) {
        for change in &self.cluster.log[self.told.0..] {
            let Change { key, object, deleted } = &**change;
            let metadata = &object["metadata"];
            let (uid, version) = (&metadata["uid"], &metadata["resourceVersion"]);
            let how = match metadata.get("deletionTimestamp") {
                _ if *deleted => "deleted",
                Some(_) => "told to end",
                None => "changed",
            };
            eprintln!("             cluster: {key} {uid} {how} at {version}");
        }
        for change in &self.cluster.sync_log[self.told.1..] {
            let SyncChange { name: (_, name), record, deleted } = &**change;
            let (of, version) = (&record.spec.name, record.version.as_deref());
            let how = if *deleted { "deleted" } else { "written" };
            eprintln!(
                "             cluster: record {name} of {of}, {version:?}, {how} at {}",
                record.at
            );
        }
        self.told = (self.cluster.log.len(), self.cluster.sync_log.len());
    }

    fn mono(&self) -> Instant {
        self.base + self.now
    }

    fn now_ms(&self) -> i64 {
        1_700_000_000_000 + i64::try_from(self.now.as_millis()).unwrap_or(0)
    }

    fn edge_now(&self) -> Now {
        let wall = jiff::Timestamp::from_millisecond(self.now_ms() + self.wall_jump_ms);
        Now { mono: self.mono(), wall: wall.expect("jumps are small beside the range of dates") }
    }

    fn at(&mut self, time: Duration, event: Event) {
        self.sequence += 1;
        self.queue.push(Reverse((time.max(self.now), self.sequence)));
        self.events.insert(self.sequence, event);
    }

    fn after(&mut self, delay_ms: u64, event: Event) {
        self.at(self.now + Duration::from_millis(delay_ms), event);
    }

    fn storming(&self) -> bool {
        self.now < STORM
    }

    fn chance(&mut self, in_thousand: u64) -> bool {
        self.random.below(1000) < in_thousand
    }

    /// The faults stop.
    fn calm(&mut self) {
        self.now = STORM;
        self.watch_stopped_until = [Duration::ZERO; 2];
        for edge in 0..self.edges.len() {
            self.edges[edge].disk.full = false;
            if !self.edges[edge].is_alive() {
                self.after(0, Event::Start { edge });
            }
        }
        let silent: Vec<u64> =
            self.conns.iter().filter(|(_, conn)| conn.silent).map(|(id, _)| *id).collect();
        for conn in silent {
            self.after(1, Event::Silence { conn });
        }
        for conn in self.conns.values_mut() {
            conn.slow_until = Duration::ZERO;
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), Violation> {
        match event {
            Event::Life => self.live(),
            Event::Watch { hub, epoch } => return self.watch(hub, epoch),
            Event::HubTimer { hub, epoch } => {
                if self.is_due((hub, epoch)) && self.hubs[hub].epoch == epoch {
                    let (now, now_ms) = (self.mono(), self.now_ms());
                    self.hubs[hub].input(Input::Tick, now, now_ms);
                    return self.drain_hub(hub);
                }
            }
            Event::Fetched { hub, epoch, key } => {
                if self.hubs[hub].epoch == epoch {
                    let (object, at) = match self.sabotage {
                        Sabotage::ReadsFromItsCache => {
                            let seen = self.hubs[hub].seen[&key.kind()];
                            self.cluster.get_at(&key, seen)
                        }
                        _ => (self.cluster.get(&key).cloned(), self.cluster.version),
                    };
                    let (now, now_ms) = (self.mono(), self.now_ms());
                    let at = Some(at);
                    self.hubs[hub].input(Input::Fetched(key, object, at), now, now_ms);
                    return self.drain_hub(hub);
                }
            }
            Event::Relisted { hub, epoch, node } => {
                if self.hubs[hub].epoch == epoch {
                    let (pods, at) = match self.sabotage {
                        Sabotage::ReadsFromItsCache => {
                            self.cluster.pods_at(&node, self.hubs[hub].seen[&Kind::Pod])
                        }
                        _ => {
                            let pods = self.cluster.pods(&node);
                            let pods = pods.into_iter().map(|(_, pod)| pod.clone()).collect();
                            (pods, self.cluster.version)
                        }
                    };
                    let (now, now_ms) = (self.mono(), self.now_ms());
                    let at = Some(at);
                    self.hubs[hub].input(Input::Relisted(node, pods, at), now, now_ms);
                    return self.drain_hub(hub);
                }
            }
            Event::List { hub, epoch, of, number } => {
                let list = self.hubs[hub].lists.get(&of).map(|list| list.number);
                if self.hubs[hub].epoch == epoch && list == Some(number) {
                    let (now, now_ms) = (self.mono(), self.now_ms());
                    if !self.hubs[hub].go_on_with_list(of, &self.cluster, now, now_ms) {
                        let pause = if self.storming() { 1500 } else { 50 };
                        let delay = 2 + self.random.below(pause);
                        self.after(delay, Event::List { hub, epoch, of, number });
                    }
                    let lag = self.random.below(200);
                    self.after(lag, Event::Watch { hub, epoch });
                    return self.drain_hub(hub);
                }
            }
            Event::Synced { hub, epoch, write } => {
                use skerry_cloudcore_core::objectsync::{Outcome, Word};
                // A bad moment of the API: nothing was done, the half of it was, or all and the answer is lost.
                let bad = if self.storming() { self.random.below(60) } else { 60 };
                let outcome = match bad {
                    0 => Outcome::Failed,
                    bad => match (self.cluster.write_sync(&write, bad == 1), bad) {
                        (_, 2) => Outcome::Failed,
                        (outcome, _) => outcome,
                    },
                };
                for hub in [0, 1] {
                    let (lag, epoch) = (self.random.below(300), self.hubs[hub].epoch);
                    self.after(lag, Event::Watch { hub, epoch });
                }
                if self.hubs[hub].epoch == epoch {
                    let word = Word::Written { node: write.node, id: write.id, outcome };
                    let (now, now_ms) = (self.mono(), self.now_ms());
                    self.hubs[hub].input(Input::Sync(word), now, now_ms);
                    return self.drain_hub(hub);
                }
            }
            Event::Request { hub, epoch, conn, message } => {
                return self.request(hub, epoch, conn, &message);
            }
            Event::EdgeTimer { edge, life } => {
                if self.is_due((2 + edge, life)) && self.edges[edge].life == life {
                    return self.drain_edge(edge);
                }
            }
            Event::Dial { edge, life } => return self.dial(edge, life),
            Event::Start { edge } => {
                if !self.edges[edge].is_alive() {
                    let now = self.edge_now();
                    self.edges[edge].start(now)?;
                    let (life, delay) = (self.edges[edge].life, self.random.below(2000));
                    self.after(delay, Event::Dial { edge, life });
                    return self.drain_edge(edge);
                }
            }
            Event::Engine { edge, life, uid } => {
                if self.edges[edge].life == life {
                    self.edges[edge].engine(&uid);
                    return self.drain_edge(edge);
                }
            }
            Event::Down { conn, class } => return self.arrive_down(conn, class),
            Event::Up { conn, class } => return self.arrive_up(conn, class),
            Event::Silence { conn } => return self.give_up(conn),
        }
        Ok(())
    }

    // What users, controllers and bad luck do.

    fn live(&mut self) {
        if !self.storming() {
            return;
        }
        for _ in 0..=self.random.below(3) {
            self.change();
        }
        if self.chance(350) {
            self.break_something();
        }
        if self.may_go_back {
            self.go_back();
        }
        let pause = 200 + self.random.below(3000);
        self.after(pause, Event::Life);
        for (hub, epoch) in [0, 1].map(|hub| (hub, self.hubs[hub].epoch)) {
            let lag = self.random.below(300);
            self.after(lag, Event::Watch { hub, epoch });
        }
    }

    fn change(&mut self) {
        let node = format!("edge{}", self.random.below(self.edges.len() as u64));
        let config = |random: &mut Random| {
            let kind = if random.below(3) == 0 { Kind::Secret } else { Kind::ConfigMap };
            Key::new(kind, "default", &format!("c{}", random.below(6))).expect("a good name")
        };
        let pods: Vec<Key> =
            self.cluster.pods(&node).into_iter().map(|(key, _)| key.clone()).collect();
        let pod = pods.get(self.random.below(pods.len() as u64) as usize).cloned();
        match self.random.below(12) {
            0..3 => {
                // A new name, or the name of a pod that was there before.
                let name = match self.chance(300) {
                    true => self.random.below(self.names + 1),
                    false => {
                        self.names += 1;
                        self.names
                    }
                };
                let key = Key::new(Kind::Pod, "default", &format!("p{name}")).expect("a good name");
                if self.cluster.get(&key).is_none() && pods.len() < 40 {
                    let sources: Vec<Value> = (0..self.random.below(3))
                        .map(|_| {
                            let of = config(&mut self.random);
                            match of.kind() {
                                Kind::Secret => json!({"secretRef": {"name": of.name()}}),
                                _ => json!({"configMapRef": {"name": of.name()}}),
                            }
                        })
                        .collect();
                    let containers = json!([{"name": "c", "image": "i", "envFrom": sources}]);
                    self.cluster.put(
                        &key,
                        json!({"metadata": {}, "spec": {"nodeName": node, "containers": containers}, "status": {}}),
                    );
                }
            }
            3 | 4 => {
                // Told to end: the node ends it and deletes the object.
                if let Some(pod) = pod {
                    self.cluster.change(&pod, |pod| {
                        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
                    });
                }
            }
            5 => {
                if let Some(pod) = pod {
                    self.cluster.delete(&pod); // by force
                }
            }
            6 => {
                let label = self.random.below(1000).to_string();
                if let Some(pod) = pod {
                    self.cluster.change(&pod, |pod| pod["metadata"]["labels"]["l"] = label.into());
                }
            }
            7 => {
                let key = config(&mut self.random);
                self.cluster.delete(&key);
            }
            8 => {
                let edge = self.random.below(self.edges.len() as u64) as usize;
                let now = self.edge_now();
                self.edges[edge].event(now);
                let life = self.edges[edge].life;
                let soon = self.now;
                self.wake(soon, Event::EdgeTimer { edge, life });
            }
            9 => {
                // The engine has another status to tell.
                let edge = self.random.below(self.edges.len() as u64) as usize;
                let uids: Vec<String> = self.edges[edge].containers.keys().cloned().collect();
                let uid = uids.get(self.random.below(uids.len() as u64) as usize).cloned();
                if let Some(uid) = uid {
                    let life = self.edges[edge].life;
                    self.after(0, Event::Engine { edge, life, uid });
                }
            }
            _ => {
                let key = config(&mut self.random);
                let value = self.random.below(1_000_000).to_string();
                self.cluster.put(&key, json!({"metadata": {}, "data": {"value": value}}));
            }
        }
    }

    fn break_something(&mut self) {
        self.summary.faults += 1;
        let edge = self.random.below(self.edges.len() as u64) as usize;
        let hub = self.random.below(2) as usize;
        let fault = self.random.below(11);
        if self.aloud {
            eprintln!("{:>9.3} s  fault {fault} (edge{edge}, hub {hub})", self.now.as_secs_f64());
        }
        match fault {
            0 => {
                if let Some(conn) = self.current[edge] {
                    self.cut(conn);
                }
            }
            1 => {
                // A NAT forgot it, or a cable was pulled: both ends find out by silence.
                if let Some(conn) = self.current[edge]
                    && let Some(open) = self.conns.get_mut(&conn)
                {
                    open.silent = true;
                    let wait = SILENCE_MAX.as_millis() as u64 / 2
                        + self.random.below(SILENCE_MAX.as_millis() as u64 / 2);
                    self.after(wait, Event::Silence { conn });
                }
            }
            2 => {
                if let Some(open) = self.current[edge].and_then(|conn| self.conns.get_mut(&conn)) {
                    open.slow_until = self.now + Duration::from_secs(1 + self.random.below(40));
                }
            }
            3 | 4 => {
                // KubeEdge's protocol has no cure for a KubeEdge node whose disk is lost: its hub trusts what it recorded.
                let torn = fault == 4 && self.edges[edge].ours && self.chance(300);
                self.kill_edge(edge, torn);
            }
            5 => self.restart_hub(hub),
            6 => {
                let until = self.now + Duration::from_secs(1 + self.random.below(30));
                self.watch_stopped_until[hub] = until;
            }
            7 => {
                let full = !self.edges[edge].disk.full;
                self.edges[edge].disk.full = full;
            }
            8 => {
                // Some watches of a hub break, as when an API server restarts.
                let records = [None];
                for of in Kind::ALL.into_iter().map(Some).chain(records) {
                    if self.chance(400) {
                        self.break_watch(hub, of);
                    }
                }
            }
            9 => {
                // It never reads again, and says that it is there all the same.
                if let Some(open) = self.current[edge].and_then(|conn| self.conns.get_mut(&conn)) {
                    open.slow_until = STORM;
                }
            }
            _ => {
                let days = self.random.below(20_000) as i64 - 19_000;
                self.wall_jump_ms = days * 24 * 3600 * 1000;
            }
        }
    }

    fn break_watch(&mut self, hub: usize, of: Option<Kind>) {
        let (now, now_ms) = (self.mono(), self.now_ms());
        let number = self.hubs[hub].begin_list(of, now, now_ms);
        let (epoch, delay) = (self.hubs[hub].epoch, 2 + self.random.below(3000));
        self.after(delay, Event::List { hub, epoch, of, number });
    }

    /// A backup is made, or the cluster is restored from it: versions go back, and all watches break.
    fn go_back(&mut self) {
        let Some(backup) = self.backup.take() else {
            let is_registered = |edge: &Edge| {
                let key = Key::new(Kind::Node, "", &edge.name).expect("a good name");
                self.cluster.get(&key).is_some()
            };
            if self.edges.iter().all(is_registered) && self.chance(50) {
                self.backup = Some(self.cluster.backup());
            }
            return;
        };
        if !self.chance(60) {
            self.backup = Some(backup);
            return;
        }
        self.summary.faults += 1;
        self.may_go_back = false;
        if self.aloud {
            eprintln!(
                "{:>9.3} s  restored from {} to {}",
                self.now.as_secs_f64(),
                self.cluster.version,
                backup.version
            );
        }
        let version = backup.version;
        self.cluster.restore(backup);
        for edge in &mut self.edges {
            edge.restored(version, self.cluster.pod_uids());
        }
        for hub in [0, 1] {
            for of in Kind::ALL.into_iter().map(Some).chain([None]) {
                self.break_watch(hub, of);
            }
        }
        // The statuses that the cluster forgot are told when the engine has news.
        for edge in 0..self.edges.len() {
            let life = self.edges[edge].life;
            for uid in self.edges[edge].containers.keys().cloned().collect::<Vec<_>>() {
                let delay = self.random.below(40_000);
                self.after(delay, Event::Engine { edge, life, uid });
            }
        }
    }

    fn kill_edge(&mut self, edge: usize, torn: bool) {
        self.edges[edge].kill(torn);
        if let Some(conn) = self.current[edge].take() {
            if let Some(open) = self.conns.get_mut(&conn) {
                open.edge_open = false;
            }
            self.cut(conn);
        }
        let pause = self.random.below(20_000);
        self.after(pause, Event::Start { edge });
    }

    fn restart_hub(&mut self, hub: usize) {
        let open: Vec<u64> =
            self.conns.iter().filter(|(_, conn)| conn.hub == hub).map(|(id, _)| *id).collect();
        let epoch = self.hubs[hub].epoch + 2;
        let (now, now_ms) = (self.mono(), self.now_ms());
        self.hubs[hub] = Hub::start(epoch, &self.cluster, now, now_ms);
        for conn in open {
            if let Some(open) = self.conns.get_mut(&conn) {
                open.hub_open = false;
            }
            self.cut(conn);
        }
    }

    // The network.

    fn dial(&mut self, edge: usize, life: u64) -> Result<(), Violation> {
        if self.edges[edge].life != life
            || !self.edges[edge].is_alive()
            || self.current[edge].is_some()
        {
            return Ok(());
        }
        if self.storming() && self.chance(200) {
            let wait = self.random.below(8000);
            self.after(wait, Event::Dial { edge, life });
            return Ok(());
        }
        // The first hub, or the other one while the first is not reached.
        let hub = usize::from(self.storming() && self.chance(300));
        let conn = self.next_conn;
        self.next_conn += 1;
        let classes = if self.edges[edge].ours { Class::ALL.len() } else { 1 };
        let streams = || (0..classes).map(|_| Stream::default()).collect();
        self.conns.insert(
            conn,
            Conn {
                edge,
                life,
                hub,
                epoch: self.hubs[hub].epoch,
                silent: false,
                edge_open: true,
                hub_open: true,
                down: streams(),
                up: streams(),
                slow_until: Duration::ZERO,
            },
        );
        self.current[edge] = Some(conn);
        let capabilities = self.edges[edge].capabilities();
        let name = self.edges[edge].name.clone();
        let (now, now_ms) = (self.mono(), self.now_ms());
        self.hubs[hub].connect(&name, conn, capabilities, now, now_ms);
        let now = self.edge_now();
        self.edges[edge].connected(now);
        self.drain_hub(hub)?;
        self.drain_edge(edge)
    }

    /// Both ends are told that the connection is gone, each when word reaches it.
    fn cut(&mut self, conn: u64) {
        if let Some(open) = self.conns.get_mut(&conn) {
            open.silent = true;
        }
        let wait = self.random.below(3000);
        self.after(wait, Event::Silence { conn });
    }

    fn give_up(&mut self, conn: u64) -> Result<(), Violation> {
        let Some(open) = self.conns.remove(&conn) else { return Ok(()) };
        let (now, now_ms) = (self.mono(), self.now_ms());
        if open.hub_open && self.hubs[open.hub].epoch == open.epoch {
            self.hubs[open.hub].disconnect(conn, now, now_ms);
            self.drain_hub(open.hub)?;
        }
        if self.current[open.edge] == Some(conn) {
            self.current[open.edge] = None;
        }
        if open.edge_open && self.edges[open.edge].life == open.life {
            let now = self.edge_now();
            self.edges[open.edge].disconnected(now);
            let wait = self.random.below(3000);
            let (edge, life) = (open.edge, open.life);
            self.after(wait, Event::Dial { edge, life });
            self.drain_edge(edge)?;
        }
        Ok(())
    }

    fn push(&mut self, conn: u64, message: Message, down: bool) {
        let delay = Duration::from_millis(5 + self.random.below(120));
        let twice = self.storming() && down && self.chance(10);
        let Some(open) = self.conns.get_mut(&conn) else { return };
        let streams = if down { &mut open.down } else { &mut open.up };
        let class = match streams.len() {
            1 => 0,
            _ => Class::of(&message) as usize,
        };
        let stream = &mut streams[class];
        // A stream keeps its order; different streams overtake each other.
        stream.last = stream.last.max(self.now + delay);
        let time = stream.last;
        let copies = if twice { 2 } else { 1 };
        for _ in 0..copies {
            stream.queue.push_back(message.clone());
        }
        for _ in 0..copies {
            let event = if down { Event::Down { conn, class } } else { Event::Up { conn, class } };
            self.at(time, event);
        }
    }

    fn arrive_down(&mut self, conn: u64, class: usize) -> Result<(), Violation> {
        let Some(open) = self.conns.get_mut(&conn) else { return Ok(()) };
        if open.slow_until > self.now {
            let time = open.slow_until;
            self.at(time, Event::Down { conn, class });
            return Ok(());
        }
        let Some(message) = open.down[class].queue.pop_front() else { return Ok(()) };
        let (edge, life, hub, lost) = (open.edge, open.life, open.hub, open.silent);
        if lost || self.edges[edge].life != life || self.current[edge] != Some(conn) {
            return Ok(());
        }
        self.summary.messages += 1;
        if self.aloud {
            eprintln!("             down {} {}", self.edges[edge].name, in_short(&message));
        }
        let now = self.edge_now();
        self.edges[edge].receive(now, &message)?;
        self.edges[edge].settle_left(|uid| self.cluster.has_pod(uid));
        if self.storming() && self.chance(3) {
            // Right after the write, before anybody hears of it.
            self.kill_edge(edge, false);
            return Ok(());
        }
        self.drain_edge(edge)?;
        self.drain_hub(hub)
    }

    fn arrive_up(&mut self, conn: u64, class: usize) -> Result<(), Violation> {
        let Some(open) = self.conns.get_mut(&conn) else { return Ok(()) };
        let Some(message) = open.up[class].queue.pop_front() else { return Ok(()) };
        let (edge, hub, epoch, lost) = (open.edge, open.hub, open.epoch, open.silent);
        if lost || self.hubs[hub].epoch != epoch {
            return Ok(());
        }
        self.summary.messages += 1;
        if self.aloud {
            eprintln!("             up {} {}", self.edges[edge].name, in_short(&message));
        }
        let (now, now_ms) = (self.mono(), self.now_ms());
        if let Some(request) = self.hubs[hub].receive(conn, message, now, now_ms) {
            let delay = 2 + self.random.below(50);
            let message = Box::new(request);
            self.after(delay, Event::Request { hub, epoch, conn, message });
        }
        self.drain_hub(hub)?;
        self.drain_edge(edge)
    }

    /// The API has done what a node asked for.
    fn request(
        &mut self,
        hub: usize,
        epoch: u64,
        conn: u64,
        message: &Message,
    ) -> Result<(), Violation> {
        let Some(open) = self.conns.get(&conn) else { return Ok(()) };
        let (node, receipts) =
            (self.edges[open.edge].name.clone(), self.edges[open.edge].capabilities().receipts);
        let now_ms = self.now_ms();
        let answer = self.cluster.answer(&node, message, receipts, now_ms);
        for hub in [0, 1] {
            let (lag, epoch) = (self.random.below(200), self.hubs[hub].epoch);
            self.after(lag, Event::Watch { hub, epoch });
        }
        if self.hubs[hub].epoch == epoch
            && let Some(answer) = answer
        {
            let session = self.hubs[hub].sessions.values_mut().find(|open| open.conn == conn);
            if let Some(session) = session
                && session.delivery.queue(answer).is_err()
            {
                self.cut(conn);
            }
            self.drain_hub(hub)?;
        }
        Ok(())
    }

    fn watch(&mut self, hub: usize, epoch: u64) -> Result<(), Violation> {
        if self.hubs[hub].epoch != epoch {
            return Ok(());
        }
        if self.watch_stopped_until[hub] > self.now {
            let time = self.watch_stopped_until[hub];
            self.at(time, Event::Watch { hub, epoch });
            return Ok(());
        }
        let (now, now_ms) = (self.mono(), self.now_ms());
        let end = self.cluster.log.len();
        // Each kind is watched by itself and may lag by itself.
        for kind in Kind::ALL {
            if self.hubs[hub].lists.contains_key(&Some(kind)) {
                continue;
            }
            let seen = self.hubs[hub].seen.insert(kind, end).unwrap_or(0);
            if seen < end && self.storming() && self.chance(100) {
                self.hubs[hub].seen.insert(kind, seen);
                let lag = self.random.below(2000);
                self.after(lag, Event::Watch { hub, epoch });
                continue;
            }
            for change in &self.cluster.log[seen..end] {
                if change.key.kind() == kind {
                    self.hubs[hub].watch(change, now, now_ms);
                }
            }
        }
        if self.hubs[hub].lists.contains_key(&None) {
            return self.drain_hub(hub);
        }
        let seen = std::mem::replace(&mut self.hubs[hub].sync_seen, self.cluster.sync_log.len());
        for at in seen..self.cluster.sync_log.len() {
            let change = Arc::clone(&self.cluster.sync_log[at]);
            self.hubs[hub].watch_sync(&change, now, now_ms);
        }
        self.drain_hub(hub)
    }

    fn drain_hub(&mut self, hub: usize) -> Result<(), Violation> {
        let (now, now_ms) = (self.mono(), self.now_ms());
        let epoch = self.hubs[hub].epoch;
        loop {
            let loses_deletes = self.sabotage == Sabotage::LosesDeletes;
            let tasks = self.hubs[hub].drain(now, now_ms, loses_deletes);
            let had_none = tasks.is_empty();
            for task in tasks {
                let delay = 2 + self.random.below(80);
                match task {
                    Task::Close { conn } => {
                        if let Some(open) = self.conns.get_mut(&conn) {
                            open.hub_open = false;
                        }
                        self.cut(conn);
                    }
                    Task::Fetch(key) => self.after(delay, Event::Fetched { hub, epoch, key }),
                    Task::Relist(node) => self.after(delay, Event::Relisted { hub, epoch, node }),
                    Task::Sync(write) => self.after(delay, Event::Synced { hub, epoch, write }),
                    Task::Acked { node, message } => self.check_acked(&node, &message)?,
                }
            }
            if had_none {
                break;
            }
        }
        // What the sockets have room for.
        let mut written = Vec::new();
        for session in self.hubs[hub].sessions.values_mut() {
            let Some(open) = self.conns.get(&session.conn) else { continue };
            let held: usize = open.down.iter().map(|stream| stream.queue.len()).sum();
            for _ in held..PIPE_MAX {
                let Some(message) = session.delivery.poll_transmit(now) else { break };
                written.push((session.conn, (*message).clone()));
            }
        }
        for (conn, message) in written {
            self.push(conn, message, true);
        }
        if let Some(at) = self.hubs[hub].timeout() {
            let time = at.saturating_duration_since(self.base);
            self.wake(time, Event::HubTimer { hub, epoch });
        }
        Ok(())
    }

    fn drain_edge(&mut self, edge: usize) -> Result<(), Violation> {
        if !self.edges[edge].is_alive() {
            return Ok(());
        }
        let conn = self.current[edge];
        let open = conn.and_then(|conn| self.conns.get(&conn));
        let held = open.map_or(PIPE_MAX, |open| open.up.iter().map(|up| up.queue.len()).sum());
        let now = self.edge_now();
        let wants = self.edges[edge].drain(now, PIPE_MAX.saturating_sub(held))?;
        for message in wants.messages {
            if let Some(conn) = conn {
                self.push(conn, message, false);
            }
        }
        let life = self.edges[edge].life;
        for uid in std::mem::take(&mut self.edges[edge].work) {
            let delay = 20 + self.random.below(2000);
            self.after(delay, Event::Engine { edge, life, uid });
        }
        if let (true, Some(conn)) = (wants.reconnect, conn) {
            self.cut(conn);
        }
        let now = self.edge_now();
        if let Some(at) = self.edges[edge].timeout(now) {
            let time = at.saturating_duration_since(self.base);
            self.wake(time, Event::EdgeTimer { edge, life });
        }
        Ok(())
    }

    /// A timer, unless an earlier one is set. One that is due already is given a moment, so that a full pipe does not
    /// make the world spin.
    fn wake(&mut self, time: Duration, event: Event) {
        let of = match &event {
            Event::HubTimer { hub, epoch } => (*hub, *epoch),
            Event::EdgeTimer { edge, life } => (2 + *edge, *life),
            _ => unreachable!("only timers are set here"),
        };
        let time = time.max(self.now + Duration::from_millis(20));
        let set = self.timers.entry(of).or_insert(Duration::MAX);
        if time < *set {
            *set = time;
            self.at(time, event);
        }
    }

    /// Whether a timer that fires is the one that is set; one that an earlier timer replaced is not.
    fn is_due(&mut self, of: (usize, u64)) -> bool {
        let now = self.now;
        self.timers.remove_entry(&of).is_some_and(|(of, time)| {
            if time > now {
                self.timers.insert(of, time);
            }
            time <= now
        })
    }

    // What has to hold.

    fn check_acked(&self, node: &str, message: &Message) -> Result<(), Violation> {
        let Ok(version) = message.header.resourceversion.parse::<u64>() else { return Ok(()) };
        let insert = matches!(message.operation(), Some(Operation::Insert | Operation::Update));
        if !insert || !message.header.parent_msg_id.is_empty() {
            return Ok(());
        }
        let resource = &message.route.resource;
        if resource.starts_with("null/node/") {
            return Ok(()); // its echoes are not written: each status report would cost a flash write
        }
        let object: Value = message.content_as().unwrap_or_default();
        let uid = object["metadata"]["uid"].as_str().unwrap_or_default();
        let edge = self.edges.iter().find(|edge| edge.name == node).expect("every node is known");
        match edge.has_had(resource, uid, version) {
            true => Ok(()),
            false => Err(Violation::new(format!(
                "{node} acknowledged {resource} {version} ({uid}) and does not have it"
            ))),
        }
    }

    fn check_bounds(&self) -> Result<(), Violation> {
        for hub in &self.hubs {
            for session in hub.sessions.values() {
                let len = session.delivery.len();
                let backlog = hub.downstream.backlog(&session.node).unwrap_or_default();
                if len > OUTSTANDING_MAX + ANSWERS_MAX
                    || backlog.outstanding > OUTSTANDING_MAX
                    || backlog.outstanding_bytes > OUTSTANDING_LEN_MAX + OBJECT_LEN_MAX
                    || backlog.waiting > KEYS_MAX
                {
                    let node = &session.node;
                    let what = format!("{len} messages wait for {node}, which has {backlog:?}");
                    return Err(Violation::new(what));
                }
            }
        }
        Ok(())
    }

    /// Whether everything is as it should be for ever; says what is not.
    fn at_rest(&self) -> Result<(), Violation> {
        let err = |what: String| Err(Violation::new(format!("at the end, {what}")));
        for (index, edge) in self.edges.iter().enumerate() {
            let name = &edge.name;
            let Some(conn) = self.current[index].and_then(|conn| self.conns.get(&conn)) else {
                return err(format!("{name} is not connected"));
            };
            if conn.silent || !edge.is_alive() {
                return err(format!("{name} has no link"));
            }
            let mut wanted = BTreeMap::new();
            for (key, pod) in self.cluster.pods(name) {
                if pod["metadata"].get("deletionTimestamp").is_some() {
                    return err(format!("{key} was told to end and is still there"));
                }
                wanted.insert(key.path().to_owned(), pod);
                for source in
                    pod["spec"]["containers"][0]["envFrom"].as_array().into_iter().flatten()
                {
                    let (kind, of) = match source.get("secretRef") {
                        Some(of) => (Kind::Secret, of),
                        None => (Kind::ConfigMap, &source["configMapRef"]),
                    };
                    let of = of["name"].as_str().unwrap_or_default();
                    let key = Key::new(kind, "default", of).expect("a good name");
                    if let Some(object) = self.cluster.get(&key) {
                        wanted.insert(key.path().to_owned(), object);
                    }
                }
            }
            let held: BTreeSet<&String> =
                edge.disk.rows.keys().filter(|path| !path.starts_with("null/node/")).collect();
            let expected: BTreeSet<&String> = wanted.keys().collect();
            if held != expected {
                return err(format!("{name} holds {held:?} instead of {expected:?}"));
            }
            for (path, object) in &wanted {
                let row: Value =
                    serde_json::from_str(&edge.disk.rows[path].json).unwrap_or_default();
                for part in ["spec", "data"] {
                    if row[part] != object[part] {
                        return err(format!("{name} has another {part} of {path}"));
                    }
                }
                let same = |of: &str| row["metadata"][of] == object["metadata"][of];
                if !same("uid") || !same("labels") {
                    return err(format!("{name} has an old {path}"));
                }
            }
            let running: BTreeSet<&String> = edge.containers.keys().collect();
            let pods = self.cluster.pods(name);
            let bound: BTreeSet<String> = pods
                .iter()
                .filter_map(|(_, pod)| pod["metadata"]["uid"].as_str().map(str::to_owned))
                .collect();
            if running != bound.iter().collect() {
                return err(format!("{name} runs {running:?} instead of {bound:?}"));
            }
            for (key, pod) in pods {
                let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
                let told = edge.statuses.get(uid).map(|status| &status["message"]);
                if told.is_none_or(|told| pod["status"]["message"] != *told) {
                    return err(format!(
                        "{key} has the status {} instead of {told:?}",
                        pod["status"]["message"]
                    ));
                }
            }
            let lost = || edge.owed.iter().find(|text| !self.cluster.texts.contains(*text));
            if edge.ours
                && let Some(text) = lost()
            {
                return err(format!("`{text}` never arrived"));
            }
            if edge.owes() > 0 {
                return err(format!("{name} still owes {} rows", edge.owes()));
            }
            let node = Key::new(Kind::Node, "", name).expect("a good name");
            if self
                .cluster
                .get(&node)
                .is_none_or(|node| node["metadata"]["labels"].get(EDGE_LABEL).is_none())
            {
                return err(format!("{name} is not registered"));
            }
        }
        for hub in &self.hubs {
            for session in hub.sessions.values() {
                if self.conns.contains_key(&session.conn) && !session.delivery.is_empty() {
                    return err(format!("messages wait for {}", session.node));
                }
            }
        }
        Ok(())
    }
}
