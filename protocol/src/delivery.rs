//! Delivery of messages from the cloud to one node over one connection.
//!
//! A message that wants an acknowledgement is written, written again every [`Settings::retry`], and put back at the end
//! of the queue when [`Settings::writes_max`] writes have stayed unanswered. Many such messages are in flight at once,
//! up to the window, but only one per key (`route.resource`), so a node sees the versions of one object in the order
//! they were queued, whatever a connection or a node does to the order of different ones. Among the keys that are free
//! the one of the most urgent [`Class`] goes first, then the one that waits longest. A queued version of an object that
//! has not been written yet is replaced by the next version of the same object.
//!
//! Messages that want no acknowledgement do not count in the window and leave at once, or towards a stock node at the
//! pace of [`Settings::pace`]; but for the response to a digest: it tells the node that it holds everything, so it
//! leaves when everything queued before it is acknowledged.
//!
//! No I/O and no clock: call [`Delivery::queue`] and [`Delivery::handle_ack`], then drain [`Delivery::poll_transmit`]
//! and [`Delivery::poll_event`], then sleep until [`Delivery::poll_timeout`]. The hub's session task is the caller in
//! production, the tests are the other one. It never reads an object beyond `metadata.uid`, and it does not outlive a
//! connection: what was not acknowledged when the link broke is found again by the next resume. An idle one is a few
//! words: a hub has one per node. Every call takes logarithmic time in what waits.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/cloudhub/session/node_session.go and
//! cloud/pkg/cloudhub/dispatcher/message_dispatcher.go. Ours differs in two points on purpose: the class is read from
//! the type segment, not from any substring of the resource, so a ConfigMap named `membership` is acknowledged; and a
//! stock node has a window too, as it acknowledges by parent and in any order. Its reader keeps 100 messages and drops
//! the oldest of more (edge/pkg/edgehub), which bounds the window and the pace towards it.

use crate::message::{Message, MessageId, Operation};
use crate::priority::Class;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time between two writes of the same message to a stock node.
pub const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Writes of one message, the first one included, before the next message gets its turn.
pub const WRITES_MAX: u32 = 5;
/// Messages in flight to a stock node: far below the 100 that its reader keeps, as messages without acknowledgement
/// come beside them.
pub const STOCK_WINDOW: usize = 16;
/// Messages without acknowledgement that a stock node gets at once; with the window still below the 100 of its reader.
pub const STOCK_BURST: u32 = 64;
/// Time after which it gets one more.
pub const STOCK_PACE: Duration = Duration::from_millis(5);
/// Time between two writes of the same message to a node of ours. The transport is reliable, so this is for a node that
/// lost a message after it was delivered, such as by a failed write to its disk.
pub const OUR_RETRY_INTERVAL: Duration = Duration::from_secs(30);
/// Messages in flight to a node of ours.
pub const OUR_WINDOW: usize = 256;
/// Bytes in flight, whatever the window in messages is. At 200 ms of round trip this is 5 MiB/s.
pub const WINDOW_BYTES: usize = 1024 * 1024;
/// Messages waiting for one node. A node runs about a hundred pods, so this is reached only by a node that has stopped
/// answering while its objects come and go; [`Delivery::queue`] refuses more, and the owner ends the session.
pub const WAITING_MAX: usize = 10_000;
/// Bytes waiting for one node, see [`WAITING_MAX`]; a single message may be larger.
pub const WAITING_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How a node is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Messages in flight, at least 1.
    pub window: usize,
    /// Bytes in flight. A single message may be larger: it is in flight alone.
    pub window_bytes: usize,
    /// Time between two writes of the same message.
    pub retry: Duration,
    /// Writes of one message, the first one included, before it goes to the end of the queue; at least 1.
    pub writes_max: u32,
    /// Time per message without acknowledgement, on average; zero for no limit.
    pub pace: Duration,
    /// Messages without acknowledgement that may leave at once, at least 1.
    pub pace_burst: u32,
}

impl Settings {
    /// For a Go EdgeCore.
    pub const fn stock() -> Self {
        Self {
            window: STOCK_WINDOW,
            window_bytes: WINDOW_BYTES,
            retry: RETRY_INTERVAL,
            writes_max: WRITES_MAX,
            pace: STOCK_PACE,
            pace_burst: STOCK_BURST,
        }
    }

    /// For a node that announced [`crate::capability::WINDOW`].
    pub const fn ours() -> Self {
        Self {
            window: OUR_WINDOW,
            retry: OUR_RETRY_INTERVAL,
            pace: Duration::ZERO,
            ..Self::stock()
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self::stock()
    }
}

/// What became of a message.
#[derive(Debug, Clone)]
pub enum Event {
    /// The node acknowledged it.
    Delivered(Arc<Message>),
    /// Every write stayed unanswered; the message is at the end of the queue again.
    Unanswered(Arc<Message>),
    /// Every write stayed unanswered and nobody needs it any more: a newer version of the object is queued, or it was
    /// the answer to a request that the node has given up by now.
    Dropped(Arc<Message>),
}

/// More than [`WAITING_MAX`] messages or [`WAITING_BYTES_MAX`] bytes wait for this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {WAITING_MAX} messages or {WAITING_BYTES_MAX} bytes wait for the node")]
pub struct QueueFull;

/// One connection's queue and what is in flight on it.
#[derive(Debug, Default)]
pub struct Delivery {
    settings: Settings,
    rtt: Option<Duration>,
    /// When a message without acknowledgement could have left, had each taken its time.
    paced: Option<Instant>,
    /// Absent while nothing waits, nothing is in flight and no event is to be told.
    busy: Option<Box<Busy>>,
}

/// Everything about messages that are not done with.
#[derive(Debug, Default)]
struct Busy {
    /// Counts messages; a place in the queue.
    next_place: u64,
    /// Messages that want no acknowledgement.
    passing: BTreeMap<(Class, u64), Arc<Message>>,
    /// Answers to digests, by place.
    barriers: BTreeMap<u64, Arc<Message>>,
    /// Messages that want an acknowledgement, by key. None is empty.
    lanes: HashMap<Arc<str>, Lane>,
    /// Lanes with nothing in flight, in the order in which they are served: class, place.
    ready: BTreeMap<(Class, u64), Arc<str>>,
    /// When each lane with something in flight is written again, or given up; with the place in the order of writes.
    due: BTreeMap<(Instant, u64), Arc<str>>,
    /// Lane of each message that was written and not acknowledged.
    written: HashMap<MessageId, Arc<str>>,
    /// What barriers wait for: [`Waiting::since`] of every message in a lane.
    unacked: BTreeSet<u64>,
    in_flight: usize,
    in_flight_bytes: usize,
    waiting: usize,
    waiting_bytes: usize,
    events: VecDeque<Event>,
}

/// The messages about one key.
#[derive(Debug)]
struct Lane {
    class: Class,
    /// Place of the lane's last unanswered message: nothing of the lane is served before it.
    not_before: u64,
    flight: Option<Flight>,
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    message: Arc<Message>,
    kind: Kind,
    bytes: usize,
    /// Place in the queue.
    place: u64,
    /// Place of the oldest message that this one stands for; a barrier behind it waits.
    since: u64,
    /// It is in [`Busy::written`]: its acknowledgement may still come.
    written: bool,
}

#[derive(Debug)]
struct Flight {
    waiting: Waiting,
    writes: u32,
    /// When it was written, while an acknowledgement can only be for that write.
    only_write: Option<Instant>,
    /// Key in [`Busy::due`].
    due: (Instant, u64),
}

/// What a message means to others about the same resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A version of an object; a newer one makes it pointless.
    Version,
    /// The end of an object; nothing may take its place.
    Delete,
    /// The answer to one request; somebody waits for exactly this message.
    Answer,
}

impl Delivery {
    /// An empty queue for one connection.
    pub fn new(settings: Settings) -> Self {
        let Settings { window, writes_max, pace_burst, .. } = settings;
        let writes = window > 0 && writes_max > 0 && pace_burst > 0;
        assert!(writes, "every message is written at least once");
        Self { settings, ..Self::default() }
    }

    /// How the node is written to.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Takes one more message for the node.
    ///
    /// # Errors
    ///
    /// [`QueueFull`] at the bound; the message is not taken, and the owner has to end the session, because a resume
    /// finds what was missed and a gap would not be noticed otherwise.
    pub fn queue(&mut self, message: Message) -> Result<(), QueueFull> {
        let message = Arc::new(message);
        let bytes = message.len_hint();
        let busy = self.busy.get_or_insert_default();
        if is_barrier(&message) {
            busy.make_room(bytes)?;
            let place = busy.take_place();
            busy.count_waiting(bytes);
            busy.barriers.insert(place, message);
            return Ok(());
        }
        let class = Class::of(&message);
        if !ack_required(&message) {
            busy.make_room(bytes)?;
            let place = busy.take_place();
            busy.count_waiting(bytes);
            busy.passing.insert((class, place), message);
            return Ok(());
        }
        busy.queue_in_lane(class, message, bytes)
    }

    /// Takes the acknowledgement of `parent` at `now`. One for anything that is not in flight or waiting is late and
    /// changes nothing.
    pub fn handle_ack(&mut self, parent: &str, now: Instant) {
        let Some(busy) = &mut self.busy else { return };
        if let Some(sample) = busy.handle_ack(parent, now) {
            // As TCP smooths it (RFC 6298, section 2).
            self.rtt = Some(self.rtt.map_or(sample, |rtt| rtt * 7 / 8 + sample / 8));
        }
    }

    /// Returns the next message to write at `now`, if one is due and the window has room for it.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Arc<Message>> {
        let may_pass = self.next_pass().is_none_or(|at| at <= now);
        let (next, passed) = self.busy.as_mut()?.poll_transmit(&self.settings, now, may_pass)?;
        if passed && !self.settings.pace.is_zero() {
            self.paced = Some(self.paced.map_or(now, |at| at.max(now)) + self.settings.pace);
        }
        self.rest();
        Some(next)
    }

    /// Returns what became of a message, oldest first.
    pub fn poll_event(&mut self) -> Option<Event> {
        let event = self.busy.as_mut()?.events.pop_front();
        self.rest();
        event
    }

    /// When [`Self::poll_transmit`] has something to do next; `None` when only an input can change that. It is meant to
    /// be asked right after [`Self::poll_transmit`] returned `None`: then nothing waits unless something is in flight, or
    /// has to keep to the pace.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let busy = self.busy.as_ref()?;
        let due = busy.due.first_key_value().map(|((at, _), _)| *at);
        let pass = self.next_pass().filter(|_| !busy.passing.is_empty());
        due.into_iter().chain(pass).min()
    }

    /// Messages that wait or are in flight.
    pub fn len(&self) -> usize {
        self.backlog_len() + self.in_flight()
    }

    /// Whether nothing waits and nothing is in flight.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Messages that were written and are not acknowledged or given up.
    pub fn in_flight(&self) -> usize {
        self.busy.as_ref().map_or(0, |busy| busy.in_flight)
    }

    /// Bytes of the messages in flight, about what they take on the wire.
    pub fn in_flight_bytes(&self) -> usize {
        self.busy.as_ref().map_or(0, |busy| busy.in_flight_bytes)
    }

    /// Messages that wait.
    pub fn backlog_len(&self) -> usize {
        self.busy.as_ref().map_or(0, |busy| busy.waiting)
    }

    /// Bytes of the messages that wait, about what they will take on the wire. Bodies can be shared with other nodes.
    pub fn backlog_bytes(&self) -> usize {
        self.busy.as_ref().map_or(0, |busy| busy.waiting_bytes)
    }

    /// Time from a write to its acknowledgement, smoothed; only messages that were written once count. It has the time
    /// in it that the node takes to store an object. `None` before the first one.
    pub fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// When the pace lets the next message without acknowledgement leave; `None` for at once.
    fn next_pass(&self) -> Option<Instant> {
        self.paced?.checked_sub(self.settings.pace * (self.settings.pace_burst - 1))
    }

    /// Lets go of all memory when there is nothing to remember.
    fn rest(&mut self) {
        self.busy.take_if(|busy| busy.is_done());
    }
}

impl Busy {
    fn is_done(&self) -> bool {
        self.waiting == 0 && self.in_flight == 0 && self.events.is_empty()
    }

    fn take_place(&mut self) -> u64 {
        self.next_place += 1;
        self.next_place
    }

    fn make_room(&self, bytes: usize) -> Result<(), QueueFull> {
        let full = self.waiting >= WAITING_MAX
            || (self.waiting > 0 && self.waiting_bytes + bytes > WAITING_BYTES_MAX);
        if full { Err(QueueFull) } else { Ok(()) }
    }

    fn count_waiting(&mut self, bytes: usize) {
        self.waiting += 1;
        self.waiting_bytes += bytes;
    }

    fn uncount_waiting(&mut self, bytes: usize) {
        self.waiting -= 1;
        self.waiting_bytes -= bytes;
    }

    fn queue_in_lane(
        &mut self,
        class: Class,
        message: Arc<Message>,
        bytes: usize,
    ) -> Result<(), QueueFull> {
        let kind = Kind::of(&message);
        let key = self.lanes.get_key_value(message.route.resource.as_str());
        let key = key.map(|(key, _)| Arc::clone(key));
        if let Some(key) = &key
            && let Some(lane) = self.lanes.get_mut(key)
            && let Some(older) = lane.waiting.back_mut()
            && kind.replaces(&message, older.kind, &older.message)
        {
            // It keeps the place, so that an object that changes all the time is served at all.
            if older.written {
                self.written.remove(&older.message.header.msg_id);
            }
            self.waiting_bytes = self.waiting_bytes - older.bytes + bytes;
            let (place, since) = (older.place, older.since);
            *older = Waiting { message, kind, bytes, place, since, written: false };
            return Ok(());
        }
        self.make_room(bytes)?;
        let key = key.unwrap_or_else(|| message.route.resource.as_str().into());
        let place = self.take_place();
        self.count_waiting(bytes);
        self.unacked.insert(place);
        let waiting = Waiting { message, kind, bytes, place, since: place, written: false };
        let lane = self.lanes.entry(Arc::clone(&key)).or_insert_with(|| Lane {
            class,
            not_before: 0,
            flight: None,
            waiting: VecDeque::with_capacity(1),
        });
        lane.waiting.push_back(waiting);
        if lane.flight.is_none() && lane.waiting.len() == 1 {
            self.ready.insert((lane.class, place), key);
        }
        Ok(())
    }

    /// Returns a sample of the round trip, if this acknowledgement gives one.
    fn handle_ack(&mut self, parent: &str, now: Instant) -> Option<Duration> {
        let key = self.written.remove(parent)?;
        let lane = self.lanes.get_mut(&key).expect("what was written has a lane");
        let mut sample = None;
        let acked = match lane.flight.take() {
            Some(flight) if flight.waiting.message.header.msg_id == parent => {
                self.due.remove(&flight.due);
                self.in_flight -= 1;
                self.in_flight_bytes -= flight.waiting.bytes;
                sample = flight.only_write.map(|at| now.saturating_duration_since(at));
                flight.waiting
            }
            flight => {
                // The last write of a message that went back to the queue was answered after all. Such a message is
                // the first of its lane.
                assert!(flight.is_none(), "a lane has one written message");
                let waiting = lane.waiting.pop_front().expect("a written message is in its lane");
                self.ready.remove(&(lane.class, lane.not_before.max(waiting.place)));
                self.waiting -= 1;
                self.waiting_bytes -= waiting.bytes;
                waiting
            }
        };
        self.unacked.remove(&acked.since);
        self.events.push_back(Event::Delivered(acked.message));
        self.free(key);
        sample
    }

    /// Lets the next message of a lane with nothing in flight be served, or forgets the lane.
    fn free(&mut self, key: Arc<str>) {
        let Some(lane) = self.lanes.get(&key) else { return };
        match lane.waiting.front() {
            Some(next) => {
                self.ready.insert((lane.class, lane.not_before.max(next.place)), key);
            }
            None => {
                self.lanes.remove(&key);
            }
        }
    }

    /// Returns the next message to write, and whether it has to keep to the pace.
    fn poll_transmit(
        &mut self,
        settings: &Settings,
        now: Instant,
        may_pass: bool,
    ) -> Option<(Arc<Message>, bool)> {
        // What was written and is late comes first: there is never more of it than the window.
        while let Some((due, _)) = self.due.first_key_value().filter(|((at, _), _)| *at <= now) {
            let due = *due;
            let key = self.due.remove(&due).expect("just seen");
            if let Some(message) = self.write_again(settings, now, key) {
                return Some((message, false));
            }
        }
        let passing = self.passing.first_key_value().filter(|_| may_pass);
        let passing = passing.map(|((class, _), _)| *class);
        let barrier = self.barriers.first_key_value().and_then(|(place, message)| {
            let before = self.unacked.first().is_some_and(|oldest| oldest < place);
            (!before).then(|| Class::of(message))
        });
        let ready = self.next_ready(settings);
        let next = [passing, barrier, ready].into_iter().flatten().min()?;
        if passing == Some(next) {
            let (_, message) = self.passing.pop_first()?;
            self.uncount_waiting(message.len_hint());
            return Some((message, true));
        }
        if barrier == Some(next) {
            let (_, message) = self.barriers.pop_first()?;
            self.uncount_waiting(message.len_hint());
            return Some((message, false));
        }
        let (_, key) = self.ready.pop_first()?;
        Some((self.write(settings, now, key), false))
    }

    /// Class of the first lane that may be served, when the window has room for its message.
    fn next_ready(&self, settings: &Settings) -> Option<Class> {
        let ((class, _), key) = self.ready.first_key_value()?;
        if self.in_flight >= settings.window {
            return None;
        }
        let next = self.lanes.get(key)?.waiting.front()?;
        let fits = self.in_flight_bytes + next.bytes <= settings.window_bytes;
        // A smaller one behind it does not overtake, or a large object would wait for ever.
        (fits || self.in_flight == 0).then_some(*class)
    }

    /// Writes the first message of a lane for the first time, or for the first time since it was given up.
    fn write(&mut self, settings: &Settings, now: Instant, key: Arc<str>) -> Arc<Message> {
        let lane = self.lanes.get_mut(&key).expect("a ready lane is there");
        let mut waiting = lane.waiting.pop_front().expect("a ready lane has a message");
        self.waiting -= 1;
        self.waiting_bytes -= waiting.bytes;
        self.in_flight += 1;
        self.in_flight_bytes += waiting.bytes;
        // One that was given up before may be answered for an older write.
        let only_write = (!waiting.written).then_some(now);
        if !std::mem::replace(&mut waiting.written, true) {
            self.written.insert(waiting.message.header.msg_id.clone(), Arc::clone(&key));
        }
        let message = Arc::clone(&waiting.message);
        self.next_place += 1;
        let due = (now + settings.retry, self.next_place);
        lane.flight = Some(Flight { waiting, writes: 1, only_write, due });
        self.due.insert(due, key);
        message
    }

    /// Writes what a lane has in flight once more, or gives it up.
    fn write_again(
        &mut self,
        settings: &Settings,
        now: Instant,
        key: Arc<str>,
    ) -> Option<Arc<Message>> {
        self.next_place += 1;
        let place = self.next_place;
        let lane = self.lanes.get_mut(&key).expect("a lane that is due is there");
        let flight = lane.flight.as_mut().expect("a lane that is due has something in flight");
        if flight.writes < settings.writes_max {
            flight.writes += 1;
            flight.only_write = None;
            flight.due = (now + settings.retry, place);
            self.due.insert(flight.due, key);
            return Some(Arc::clone(&flight.waiting.message));
        }
        let mut unanswered = lane.flight.take().expect("just seen").waiting;
        self.in_flight -= 1;
        self.in_flight_bytes -= unanswered.bytes;
        let message = Arc::clone(&unanswered.message);
        let next = lane.waiting.front_mut();
        let newer = next
            .filter(|next| next.kind.replaces(&next.message, unanswered.kind, &unanswered.message));
        // Everything else about the same resource stays behind the unanswered message: the order per resource holds,
        // and a node that cannot take this resource still gets all others.
        lane.not_before = place;
        if newer.is_some() || unanswered.kind == Kind::Answer {
            self.written.remove(&message.header.msg_id);
            self.unacked.remove(&unanswered.since);
            if let Some(newer) = newer {
                // The node does not have the object, and a barrier speaks about that.
                self.unacked.remove(&newer.since);
                newer.since = unanswered.since;
                self.unacked.insert(newer.since);
            }
            self.events.push_back(Event::Dropped(message));
        } else {
            unanswered.place = place;
            self.waiting += 1;
            self.waiting_bytes += unanswered.bytes;
            lane.waiting.push_front(unanswered);
            self.events.push_back(Event::Unanswered(message));
        }
        self.free(key);
        None
    }
}

impl Kind {
    fn of(message: &Message) -> Self {
        if !message.header.parent_msg_id.is_empty() {
            return Self::Answer;
        }
        match message.operation() {
            Some(Operation::Delete) => Self::Delete,
            _ => Self::Version,
        }
    }

    /// Whether `message`, of this kind, makes an older one of the same resource pointless.
    fn replaces(self, message: &Message, older: Self, older_message: &Message) -> bool {
        match (older, self) {
            (Self::Version, Self::Version) => true,
            (Self::Version | Self::Delete, Self::Delete) => uid(older_message) == uid(message),
            _ => false,
        }
    }
}

/// `metadata.uid` of the object in the body, empty when there is none.
fn uid(message: &Message) -> String {
    #[derive(Deserialize)]
    struct Object {
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    struct Metadata {
        #[serde(default)]
        uid: String,
    }
    message.content_as::<Object>().map(|object| object.metadata.uid).unwrap_or_default()
}

/// Whether a message speaks about all that were queued before it.
fn is_barrier(message: &Message) -> bool {
    let route = &message.route;
    route.resource == crate::digest::RESOURCE && message.operation() == Some(Operation::Response)
}

/// Whether the node acknowledges this message, so that it has to be written again until it does.
pub fn ack_required(message: &Message) -> bool {
    let route = &message.route;
    let never = [
        "membership",
        "membership/detail",
        "k8s/ca.crt",
        crate::digest::RESOURCE,
        crate::tunnel::DEMAND,
    ];
    if never.contains(&route.resource.as_str())
        || route.resource.ends_with("/twin/cloud_updated")
        || route.group == "user"
        || ["taskmanager", "nodeupgradejobcontroller"].contains(&route.source.as_str())
    {
        return false;
    }
    let operation = message.operation();
    let once = |operation: Operation| {
        operation.is_volume()
            || matches!(operation, Operation::ApplicationResponse | Operation::Error)
    };
    if operation.is_some_and(once) {
        return false;
    }
    let is_certificate = || crate::certificate::request_node(&route.resource).is_some();
    if operation == Some(Operation::Response)
        && (is_ok_or_error(message.content.get()) || is_certificate())
    {
        return false;
    }
    // The wire form is `namespace/type[/name]`; the second segment decides, whatever the name is.
    match route.resource.split('/').nth(1).unwrap_or_default() {
        "podlist" | "serviceaccounttoken" => false,
        _ if route.source != "edgecontroller" => true,
        "lease" | "nodepatch" | "podpatch" | "podstatus" | "certificatesigningrequest" => false,
        "node" => operation == Some(Operation::Update),
        "pod" => operation != Some(Operation::Response),
        _ => true,
    }
}

fn is_ok_or_error(content: &str) -> bool {
    content == "\"OK\"" || content == "{}" || content.starts_with("{\"ErrStatus\"")
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
