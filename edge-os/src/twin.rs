//! The owner of the devices: one task between the agent, the broker, the mappers and the database.
//!
//! It owns [`Twin`] and nothing else does. What the agent learns from the hub comes in as [`Event`], what is for the hub
//! goes out through a channel with a bound; neither side ever waits for the broker or a mapper, nor for the disk: rows are
//! written while the next input is taken. A call to a mapper is made when what it stands on is on the disk.
//!
//! The agent is the only caller.

use crate::bus::{self, BusConfig, Queue, Received};
use crate::config::HistoryConfig;
use crate::dmi::{self, FromMapper, Probes, Seen};
use crate::history::{Ask, Keeper};
use crate::meta_store::{Store, WriteError};
use crate::rules::{Doing, Ruler};
use jiff::Timestamp;
use serde_json::Value;
use skerry_edge_core::Now;
use skerry_edge_core::event::EventReport;
use skerry_edge_core::history::query::Page;
use skerry_edge_core::rules::RuleLimits;
use skerry_edge_core::twin::mapper::{Call, Called};
use skerry_edge_core::twin::{Id, Input, Output, Twin, Weight};
use skerry_protocol::{Capabilities, Message, Operation, ResourcePath};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Events of the agent that wait; then the agent waits, as it does for the disk.
pub(crate) const EVENTS_MAX: usize = 256;
/// Messages for the hub that wait for the agent.
pub(crate) const UP_MAX: usize = 32;
/// Inputs that are taken before outputs are looked at again.
const BATCH_MAX: usize = 64;
/// Data of applications that may go to the cloud in a second, and at once.
const UPLOADS_PER_SECOND: f64 = 100.0;
const UPLOADS_BURST: f64 = 1000.0;
/// Longest wait for the last rows when the agent ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// What the agent learns from the hub.
#[derive(Debug)]
pub(crate) enum Event {
    /// An object of a device or model is in the database in another form, or not any more.
    Object(ResourcePath, Option<Value>),
    /// A message of group `twin`.
    Hub(Box<Message>),
    /// A message of group `user` for the event bus.
    Bus(Box<Message>),
    /// An answer that nobody else waits for.
    Reply(Box<Message>),
    /// A connection is up, or has moved.
    Connected(Capabilities),
    /// It is gone.
    Disconnected,
    /// What came of an [`Up::Restart`] or an [`Up::Limit`].
    RuleDone {
        /// From there.
        rule: Id,
        /// What it was, for people.
        what: String,
        /// A reason for people, when nothing came of it.
        done: Result<(), String>,
    },
}

/// What goes to the hub.
#[derive(Debug)]
pub(crate) enum Up {
    /// As it is, while the link is up.
    Message(Box<Message>),
    /// Data of an application, to be kept until the hub has it.
    Upload {
        /// The topic on which it came.
        topic: String,
        /// The data; what is no text is replaced, as in KubeEdge.
        text: String,
    },
    /// Something for the cluster to know.
    Event(Box<EventReport>),
    /// A rule limits what runs here, or does so no more; answered with [`Event::RuleDone`].
    Limit(RuleLimits),
    /// A rule wants the containers of a workload to be restarted; answered with [`Event::RuleDone`].
    Restart {
        /// `namespace/name` of the rule.
        rule: Id,
        /// A pod of the rule's namespace, or what owns some.
        workload: String,
    },
}

/// What the twin needs.
pub(crate) struct Parts {
    pub(crate) node: String,
    pub(crate) store: Arc<Store>,
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) up: mpsc::Sender<Up>,
    /// The broker, if there is one.
    pub(crate) bus: Option<BusConfig>,
    /// Where mappers connect, if they may.
    pub(crate) socket: Option<PathBuf>,
    /// Time between two reports about a device.
    pub(crate) interval: Duration,
    /// What is kept of what devices were, if anything.
    pub(crate) history: Option<HistoryConfig>,
    /// Where that is kept, and what rules did.
    pub(crate) dir: PathBuf,
    /// What the hub asks about it.
    pub(crate) asks: mpsc::Receiver<Ask>,
}

/// Serves devices until `stop`, then writes what is not written yet.
pub(crate) async fn run(parts: Parts, stop: CancellationToken) {
    let Parts { node, store, events, up, bus, socket, interval, history, dir, asks } = parts;
    let twin = Twin::restore(&node, store.read_twins(), interval);
    let twin = if bus.is_some() { twin } else { twin.without_broker() };
    let mut tasks = JoinSet::new();
    let queue = bus.is_some().then(Arc::<Queue>::default);
    let followed: BTreeSet<String> = store.read_followed().into_iter().collect();
    let (topics, topics_seen) = watch::channel(followed);
    let (incoming, from_bus) = mpsc::channel(bus::INCOMING_MAX);
    if let (Some(config), Some(queue)) = (bus, &queue) {
        tasks.spawn(bus::run(config, queue.clone(), incoming, topics_seen, stop.clone()));
    }
    let (requests, from_mappers) = mpsc::channel(dmi::REQUESTS_MAX);
    if let Some(socket) = socket {
        tasks.spawn(dmi::run(socket, requests, stop.clone()));
    }
    let mappers = twin.mappers().map(|info| (info.protocol.clone(), info.address.clone()));
    let (probes, mappers_to_probe) = watch::channel(mappers.collect());
    let (seen, from_probes) = mpsc::channel(16);
    tasks.spawn(probe(mappers_to_probe, seen, stop.clone()));
    let owner = Owner {
        twin,
        store,
        up,
        queue,
        topics,
        probes,
        calls: Vec::new(),
        calling: JoinSet::new(),
        writing: None,
        uploads: (UPLOADS_BURST, Instant::now()),
        uploads_dropped: 0,
        dropped_told: 0,
        keeper: history.map(|config| Keeper::new(&config, &dir)),
        ruler: Ruler::new(&node, &dir),
        limits: BTreeMap::new(),
    };
    let inbox = Inbox { events, from_bus, from_mappers, from_probes, asks };
    owner.run(inbox, stop).await;
    while tasks.join_next().await.is_some() {}
}

async fn probe(
    mappers: watch::Receiver<Vec<(String, String)>>,
    seen: mpsc::Sender<Seen>,
    stop: CancellationToken,
) {
    let mut probes = Probes::default();
    let mut tick = tokio::time::interval(dmi::PROBE_INTERVAL);
    loop {
        if stop.run_until_cancelled(tick.tick()).await.is_none() {
            return;
        }
        let now = mappers.borrow().clone();
        for one in probes.look(&now).await {
            if seen.send(one).await.is_err() {
                return;
            }
        }
    }
}

type Writing = Pin<Box<dyn Future<Output = Result<(), WriteError>> + Send>>;

/// Everything that the owner waits for.
struct Inbox {
    events: mpsc::Receiver<Event>,
    from_bus: mpsc::Receiver<Received>,
    from_mappers: mpsc::Receiver<FromMapper>,
    from_probes: mpsc::Receiver<Seen>,
    asks: mpsc::Receiver<Ask>,
}

struct Owner {
    /// The history, if it is kept.
    keeper: Option<Keeper>,
    ruler: Ruler,
    /// Limits of rules that wait for room on the way to the agent; at most one per rule.
    limits: BTreeMap<Id, RuleLimits>,
    twin: Twin,
    store: Arc<Store>,
    up: mpsc::Sender<Up>,
    queue: Option<Arc<Queue>>,
    /// Topics that rules of the cloud want.
    topics: watch::Sender<BTreeSet<String>>,
    probes: watch::Sender<Vec<(String, String)>>,
    /// Calls that wait for the disk; at most one per mapper.
    calls: Vec<Call>,
    calling: JoinSet<(Call, Called)>,
    writing: Option<Writing>,
    /// Uploads that may go now, and when that was.
    uploads: (f64, Instant),
    uploads_dropped: u64,
    dropped_told: u64,
}

impl Owner {
    async fn run(mut self, inbox: Inbox, stop: CancellationToken) {
        let Inbox { mut events, mut from_bus, mut from_mappers, mut from_probes, mut asks } = inbox;
        for kind in ["devicemodel", "device", "devicerule"] {
            for text in self.store.read_kind(kind) {
                if let Some((path, object)) = stored(kind, &text) {
                    self.tell_followers(&path, Some(&object));
                    self.twin.handle(now(), Input::Object { path, object });
                }
            }
        }
        self.twin.handle(now(), Input::Restored);
        for limits in self.store.read_limits() {
            self.ruler.rules.resume(&limits);
        }
        loop {
            let blocked = self.drain();
            let wait = self.twin.poll_timeout(now().mono);
            let tail = self.keeper.as_ref().and_then(|keeper| keeper.poll_timeout(now().mono));
            let wait = [wait, tail, self.ruler.poll_timeout()].into_iter().flatten().min();
            let may_ask = self.keeper.as_ref().is_none_or(Keeper::has_room);
            let kept = async {
                match &mut self.keeper {
                    Some(keeper) => keeper.progress().await,
                    None => std::future::pending().await,
                }
            };
            let timer = async {
                match wait {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let up = self.up.clone();
            let room = async {
                match blocked {
                    true => drop(up.reserve().await),
                    false => std::future::pending().await,
                }
            };
            let written = async {
                match &mut self.writing {
                    Some(writing) => writing.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => break,
                written = written => {
                    self.writing = None;
                    self.twin.handle_stored(now().mono, written.is_ok()); // failures are logged by the store
                }
                () = kept => {}
                Some(ask) = asks.recv(), if may_ask => self.take_ask(ask),
                Some(event) = events.recv() => {
                    self.take_event(event).await;
                    for _ in 1..BATCH_MAX {
                        let Ok(event) = events.try_recv() else { break };
                        self.take_event(event).await;
                    }
                }
                Some(request) = from_mappers.recv() => {
                    self.take_request(request);
                    for _ in 1..BATCH_MAX {
                        let Ok(request) = from_mappers.try_recv() else { break };
                        self.take_request(request);
                    }
                }
                Some(message) = from_bus.recv() => {
                    let Received { topic, payload } = message;
                    self.twin.handle(now(), Input::Mqtt { topic, payload });
                }
                Some(seen) = from_probes.recv() => {
                    tracing::warn!(?seen, "a look at a mapper's socket");
                    let input = match seen {
                        Seen::Restarted(protocol) => Input::MapperRestarted(protocol),
                        Seen::Lost(protocol) => Input::MapperLost(protocol),
                    };
                    self.twin.handle(now(), input);
                }
                Some(done) = self.calling.join_next() => {
                    if let Ok((call, what)) = done {
                        tracing::debug!(mapper = call.protocol, device = &*call.id, ?what, "called");
                        let (protocol, number) = (call.protocol, call.number);
                        self.twin.handle(now(), Input::Called { protocol, number, what });
                    }
                }
                () = room => {}
                () = timer => {
                    self.ruler.rules.handle_time(now().mono);
                    self.twin.handle(now(), Input::Tick);
                }
            }
        }
        self.flush().await;
    }

    /// Carries out what the twin asks for. Returns whether messages wait for room on the way to the hub.
    fn drain(&mut self) -> bool {
        self.carry_out_rules();
        while let Some(output) = self.twin.poll_output() {
            match output {
                Output::Publish { topic, payload, weight } => {
                    if let Some(queue) = &self.queue {
                        queue.push(topic, payload, weight);
                    }
                }
                Output::Upload { topic, payload } => self.upload(topic, &payload),
                Output::Reported { id, values } => {
                    let now = now();
                    for (property, value, at_ms) in values {
                        self.ruler.rules.report(now.mono, &id, &property, &value);
                        if let Some(keeper) = &mut self.keeper {
                            keeper.report(now, &id, &property, &value, at_ms);
                        }
                    }
                    // What a rule sets is one of the next outputs; there is a bound on how often.
                    self.carry_out_rules();
                }
                Output::Ignored { what, reason } => {
                    tracing::debug!(what, reason, "of no use here");
                }
            }
        }
        if let Some(keeper) = &mut self.keeper {
            keeper.drain(now());
        }
        while let Some(call) = self.twin.poll_call(now().mono) {
            self.calls.push(call);
        }
        if self.writing.is_none() {
            let changes = self.twin.take_changes(now().mono, false);
            if changes.is_empty() {
                for call in self.calls.drain(..) {
                    self.calling.spawn(dmi::call(call));
                }
            } else {
                let store = self.store.clone();
                self.writing = Some(Box::pin(async move { store.write_twins(changes).await }));
            }
        }
        self.tell_dropped();
        while let Some((rule, limits)) = self.limits.pop_first() {
            if let Err(error) = self.up.try_send(Up::Limit(limits)) {
                if let mpsc::error::TrySendError::Full(Up::Limit(limits)) = error {
                    self.limits.insert(rule, limits);
                }
                return !self.up.is_closed();
            }
        }
        loop {
            let Ok(permit) = self.up.try_reserve() else { return !self.up.is_closed() };
            match self.twin.poll_transmit(now()) {
                Some(message) => permit.send(Up::Message(Box::new(message))),
                None => return false,
            }
        }
    }

    /// History and rules follow objects, too.
    fn tell_followers(&mut self, path: &ResourcePath, object: Option<&Value>) {
        if let Some(keeper) = &mut self.keeper {
            keeper.take_object(path, object);
        }
        self.ruler.take_object(path, object);
        let is_kept = self.keeper.as_ref().is_some_and(Keeper::is_wanted);
        self.twin.follow(is_kept || !self.ruler.rules.is_empty());
    }

    /// Does what rules ask for, and tells what came of it.
    fn carry_out_rules(&mut self) {
        while let Some(doing) = self.ruler.poll() {
            let (rule, what, done) = match doing {
                Doing::Tell(report) => {
                    // It is in the log of the node in any case.
                    if self.up.try_send(Up::Event(report)).is_err() {
                        tracing::warn!("the cluster is not told what a rule did: too much waits");
                    }
                    continue;
                }
                Doing::Set { rule, device, property, value } => {
                    let what = format!("set {property} of {device} to `{value}`");
                    let done = self.twin.wish(now(), &device, &property, &value);
                    (rule, what, done.map_err(|error| error.to_string()))
                }
                Doing::Publish { rule, topic, payload } => {
                    let what = format!("published on {topic}");
                    let done = match &self.queue {
                        Some(queue) => {
                            queue.push(topic, payload.into_bytes(), Weight::Each);
                            Ok(())
                        }
                        None => Err("this node has no broker".to_owned()),
                    };
                    (rule, what, done)
                }
                Doing::Limit(limits) => {
                    // Of each rule the newest word; it waits for room, for nobody else would lift a limit.
                    self.limits.insert(limits.rule.clone(), limits);
                    continue;
                }
                Doing::Restart { rule, workload } => {
                    let up = Up::Restart { rule: rule.clone(), workload: workload.clone() };
                    if self.up.try_send(up).is_ok() {
                        continue; // what came of it is an event
                    }
                    let what = format!("restarted {workload}");
                    (rule, what, Err("too much waits for the agent".to_owned()))
                }
            };
            self.ruler.rules.done(&rule, &what, done);
        }
    }

    fn take_ask(&mut self, ask: Ask) {
        match &mut self.keeper {
            Some(keeper) => keeper.ask(ask),
            None => {
                let error = Some("the configuration of this node keeps no history".to_owned());
                // Whoever asked may have gone.
                let _ = ask.answer.send(Page { error, ..Page::default() });
            }
        }
    }

    async fn take_event(&mut self, event: Event) {
        if let Event::Object(path, object) = &event {
            self.tell_followers(path, object.as_ref());
        }
        let input = match event {
            Event::Object(path, Some(object)) => Input::Object { path, object },
            Event::Object(path, None) => Input::Gone(path),
            Event::Hub(message) => Input::Hub(message),
            Event::Reply(message) => Input::Reply(message),
            Event::Connected(capabilities) => Input::Connected(capabilities),
            Event::Disconnected => Input::Disconnected,
            Event::Bus(message) => return self.take_bus(&message).await,
            Event::RuleDone { rule, what, done } => {
                return self.ruler.rules.done(&rule, &what, done);
            }
        };
        self.twin.handle(now(), input);
    }

    fn take_request(&mut self, request: FromMapper) {
        // A mapper that has given up is not told.
        match request {
            FromMapper::Register { info, with_data, answer } => {
                let _ = answer.send(self.twin.register_mapper(info, with_data));
                let mappers =
                    self.twin.mappers().map(|info| (info.protocol.clone(), info.address.clone()));
                self.probes.send_replace(mappers.collect());
            }
            FromMapper::Twins { id, twins, answer } => {
                let _ = answer.send(self.twin.report_twins(now(), &id, twins));
            }
            FromMapper::State { id, state, answer } => {
                let _ = answer.send(self.twin.report_state(now(), &id, &state));
            }
        }
    }

    /// What rules of the cloud want of the broker.
    async fn take_bus(&mut self, message: &Message) {
        let topic = message.route.resource.as_str();
        match message.operation() {
            Some(Operation::Publish) => {
                let text = match message.content_as::<Value>() {
                    Ok(Value::String(text)) => text,
                    _ => message.content.get().to_owned(),
                };
                if let Some(queue) = &self.queue {
                    queue.push(topic.to_owned(), text.into_bytes(), Weight::Each);
                }
            }
            Some(operation @ (Operation::Subscribe | Operation::Unsubscribe)) => {
                let topic = topic.trim_end_matches('/').to_owned();
                let wanted = operation == Operation::Subscribe;
                let known = self.topics.borrow().len();
                if !bus::is_filter(&topic) || (wanted && known >= bus::TOPICS_MAX) {
                    tracing::warn!(topic, "this topic is not followed: no filter, or too many");
                    return;
                }
                let changed = self.topics.send_if_modified(|topics| match wanted {
                    true => topics.insert(topic.clone()),
                    false => topics.remove(&topic),
                });
                if changed {
                    let _ = self.store.write_followed(topic, wanted).await; // logged by the store
                }
            }
            _ => tracing::warn!(topic, operation = message.route.operation, "of no use here"),
        }
    }

    fn upload(&mut self, topic: String, payload: &[u8]) {
        let now = Instant::now();
        let earned = (now - self.uploads.1).as_secs_f64() * UPLOADS_PER_SECOND;
        self.uploads = ((self.uploads.0 + earned).min(UPLOADS_BURST), now);
        let text = String::from_utf8_lossy(payload).into_owned();
        // Reports about devices keep their places in the channel.
        let room = self.up.capacity() > UP_MAX / 2 && self.uploads.0 >= 1.0;
        if room && self.up.try_send(Up::Upload { topic, text }).is_ok() {
            self.uploads.0 -= 1.0;
        } else {
            self.uploads_dropped += 1;
        }
    }

    fn tell_dropped(&mut self) {
        let published = self.queue.as_ref().map_or(0, |queue| queue.dropped());
        let all = published + self.uploads_dropped;
        // Each time it has doubled, so that a flood is not followed by another one in the log.
        if all > self.dropped_told * 2 {
            tracing::warn!(
                published,
                uploads = self.uploads_dropped,
                "messages of the broker were dropped: more than the queues hold"
            );
            self.dropped_told = all;
        }
    }

    /// Makes everything durable at an orderly end.
    async fn flush(&mut self) {
        let all = async {
            if let Some(writing) = self.writing.take() {
                let written = writing.await;
                self.twin.handle_stored(now().mono, written.is_ok());
            }
            let changes = self.twin.take_changes(now().mono, true);
            if !changes.is_empty() {
                let _ = self.store.write_twins(changes).await; // logged by the store
            }
        };
        if tokio::time::timeout(FLUSH_TIMEOUT, all).await.is_err() {
            tracing::warn!("the last values of devices were not written: the disk is too slow");
        }
        if let Some(keeper) = &mut self.keeper {
            keeper.close().await;
        }
    }
}

/// Where a stored object belongs, and the object.
fn stored(kind: &str, text: &str) -> Option<(ResourcePath, Value)> {
    let object: Value = serde_json::from_str(text).ok()?;
    let metadata = &object["metadata"];
    let (namespace, name) = (metadata["namespace"].as_str()?, metadata["name"].as_str()?);
    let path = ResourcePath::new(namespace, kind, name).ok()?;
    Some((path, object))
}

fn now() -> Now {
    Now { mono: Instant::now(), wall: Timestamp::now() }
}
