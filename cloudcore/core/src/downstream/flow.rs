//! The flow of differences to one connection: what waits as a key, what is with the connection, and the message that
//! takes a node from what it has to what it should have.

use super::membership::Members;
use super::records::{pushed_spec, sync_id};
use super::resume::{Barrier, Phase};
use super::version::{Version, Watched, delete_message};
use super::{Backlog, Downstream, Key, Kind, Known, Output, SessionId, Wanted};
use crate::objectsync::{Sent, SyncId};
use skerry_protocol::capability::Capabilities;
use skerry_protocol::digest::Held;
use skerry_protocol::{Message, MessageId, Operation};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Messages with one connection that are not acknowledged. Twice the window of our own delivery, so that the window is
/// full while an acknowledgement is on its way through the hub.
pub const OUTSTANDING_MAX: usize = 512;
/// Bytes of the bodies of those; the last of them may go over it, so that an object of any size gets through.
pub const OUTSTANDING_LEN_MAX: usize = 1024 * 1024;
/// Objects that applications on one node watch and that wait for room.
pub const PUSHED_MAX: usize = 4096;
/// Bytes of those. A list of everything in a small cluster fits.
pub const PUSHED_LEN_MAX: usize = 4 * 1024 * 1024;

/// Kinds that a node sees cut down to its own group, which changes without their version.
const NARROWED_KINDS: [&str; 2] = ["Endpoints", "EndpointSlice"];

/// One connection of a node.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) capabilities: Capabilities,
    pub(super) phase: Phase,
    /// What the node told, or is recorded to hold, has been looked at for what the watches do not know yet.
    pub(super) is_checked: bool,
    /// Objects that are being read because the node may be ahead of the watch; nothing about them goes out before.
    pub(super) doubts: BTreeSet<Key>,
    /// Objects that may differ, in the order in which they go out.
    dirty: BTreeSet<(Rank, Key)>,
    /// Messages handed over and not acknowledged; at most one per object.
    flights: BTreeMap<Key, Flight>,
    flights_len: usize,
    /// Watched objects that the node told to hold and of which nothing was said since; at most [`PUSHED_MAX`].
    told: BTreeMap<String, Held>,
    /// Watched objects that have not gone out.
    pushed: BTreeMap<Key, Pushed>,
    pushed_len: usize,
    /// What leaves when those that need it have left, which are under way.
    held: BTreeSet<Key>,
    /// Objects that wait for their records to say what they should before the message goes.
    pub(super) parked: BTreeMap<SyncId, Key>,
    /// Objects whose records the cluster does not take; they go without.
    pub(super) unrecorded: BTreeSet<SyncId>,
    /// Requests whose answer says that the node has everything.
    pub(super) barrier: Option<Box<Barrier>>,
    /// In the list of nodes that may have something to send.
    is_touched: bool,
}

/// Place in the order: by kind, and what others need leaves after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    InOrder,
    Last,
}

#[derive(Debug)]
struct Flight {
    id: MessageId,
    len: usize,
    what: What,
    /// The object has changed meanwhile, so it is compared again after the acknowledgement.
    is_stale: bool,
}

#[derive(Debug)]
pub(super) enum What {
    /// The node gets this version; it held an object of another uid before, when `former` says so.
    Put {
        uid: Arc<str>,
        resource_version: Arc<str>,
        former: Option<Arc<str>>,
    },
    /// The node loses this object.
    Delete {
        uid: Arc<str>,
    },
    Pushed(Pushed),
}

/// One watched object on its way.
#[derive(Debug)]
pub(super) struct Pushed {
    pub(super) object: Arc<Watched>,
    pub(super) operation: Operation,
    /// Uid of the object that was under this key before.
    pub(super) former: Option<Arc<str>>,
}

impl Session {
    pub(super) fn new(id: SessionId, capabilities: Capabilities, phase: Phase) -> Self {
        Self {
            id,
            capabilities,
            phase,
            is_checked: false,
            doubts: BTreeSet::new(),
            dirty: BTreeSet::new(),
            flights: BTreeMap::new(),
            flights_len: 0,
            told: BTreeMap::new(),
            pushed: BTreeMap::new(),
            pushed_len: 0,
            held: BTreeSet::new(),
            parked: BTreeMap::new(),
            unrecorded: BTreeSet::new(),
            barrier: None,
            is_touched: false,
        }
    }

    /// Whether the other end is a KubeEdge edge.
    pub(super) fn is_stock(&self) -> bool {
        !self.capabilities.digest
    }

    pub(super) fn backlog(&self) -> Backlog {
        Backlog {
            outstanding: self.flights.len(),
            outstanding_bytes: self.flights_len,
            waiting: self.dirty.len() + self.parked.len() + self.held.len(),
        }
    }

    /// Everything that differs or is under way.
    pub(super) fn unsettled(&self) -> impl Iterator<Item = &Key> {
        self.dirty.iter().map(|(_, key)| key).chain(self.flights.keys()).chain(&self.held)
    }

    /// Versions under way, which nobody knows to have arrived.
    pub(super) fn is_under_way(&self, key: &Key) -> bool {
        self.flights.contains_key(key)
    }

    fn has_room(&self) -> bool {
        self.flights.len() < OUTSTANDING_MAX && self.flights_len < OUTSTANDING_LEN_MAX
    }

    /// Whether something that may need an object of this kind is still on its way out.
    fn is_needed(&self, kind: Kind) -> bool {
        let dependent = match kind {
            Kind::ConfigMap | Kind::Secret => Kind::Pod,
            Kind::DeviceModel => Kind::Device,
            _ => return false,
        };
        let leaves =
            |flight: &Flight| flight.is_stale || matches!(flight.what, What::Delete { .. });
        self.flights.iter().any(|(key, flight)| key.kind() == dependent && leaves(flight))
            || self.parked.values().any(|key| key.kind() == dependent)
    }

    /// Takes what the node told of watched objects.
    pub(super) fn tell_watched(&mut self, told: BTreeMap<String, Held>) {
        self.told = told.into_iter().take(PUSHED_MAX).collect();
    }

    /// Whether the node has this watched object as it is. What it told counts once: the next word is a change.
    fn has_watched(&mut self, key: &Key, pushed: &Pushed) -> bool {
        let Some(told) = self.told.remove(key.path()) else { return false };
        let Watched { uid, resource_version, kind, .. } = &*pushed.object;
        pushed.operation != Operation::Delete
            && !NARROWED_KINDS.contains(&&**kind)
            && (&*told.uid, &*told.rv) == (&**uid, &**resource_version)
    }

    fn depart(&mut self, key: &Key, message: &Message, what: What) {
        let len = message.content.get().len();
        self.flights_len += len;
        let id = message.header.msg_id.clone();
        self.flights.insert(key.clone(), Flight { id, len, what, is_stale: false });
    }

    fn arrive(&mut self, key: &Key, id: &str) -> Option<Flight> {
        if self.flights.get(key).is_none_or(|flight| flight.id != id) {
            return None;
        }
        let flight = self.flights.remove(key)?;
        self.flights_len -= flight.len;
        self.rest();
        Some(flight)
    }

    /// Lets go of memory that an empty map keeps: most connections have nothing under way most of the time.
    fn rest(&mut self) {
        if self.flights.is_empty() {
            self.flights = BTreeMap::new();
        }
        if self.dirty.is_empty() {
            self.dirty = BTreeSet::new();
        }
        if self.pushed.is_empty() {
            self.pushed = BTreeMap::new();
        }
        if self.parked.is_empty() {
            self.parked = BTreeMap::new();
        }
    }

    /// Looks again at what waits for others to leave.
    pub(super) fn release(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let held = std::mem::take(&mut self.held);
        self.dirty.extend(held.into_iter().map(|key| (Rank::Last, key)));
    }

    fn settle(&mut self, key: &Key) {
        if let Some(barrier) = &mut self.barrier {
            barrier.keys.remove(key);
        }
    }
}

/// The key under which the object of a watched key goes where the node needs it, if it is of such a kind.
fn own_key(watched: &Key) -> Option<Key> {
    watched.path().parse().ok().and_then(|path| Key::of_path(&path))
}

/// What a comparison found to do.
enum Step {
    /// Nothing, and nothing will come of it.
    Settled,
    /// Nothing yet.
    Unknown,
    /// It leaves, after those that need it.
    Later,
    Delete {
        uid: Arc<str>,
        then_again: bool,
    },
    Put {
        version: Arc<Version>,
        operation: Operation,
        former: Option<Arc<str>>,
        is_new: bool,
    },
}

impl Downstream {
    /// The object may differ between `name` and the API.
    pub(super) fn mark(&mut self, name: &Arc<str>, key: &Key) {
        let Some(session) = self.nodes.get_mut(name).and_then(super::Node::live) else { return };
        if let Some(flight) = session.flights.get_mut(key) {
            flight.is_stale = true;
            return;
        }
        session.dirty.insert((Rank::InOrder, key.clone()));
        self.touch(name);
    }

    pub(super) fn touch(&mut self, name: &Arc<str>) {
        let Some(session) = self.nodes.get_mut(name).and_then(super::Node::live) else { return };
        if !std::mem::replace(&mut session.is_touched, true) {
            self.touched.push_back(Arc::clone(name));
        }
    }

    /// Makes messages of what differs, as far as there is room.
    pub(super) fn flush(&mut self, name: &Arc<str>) {
        let mut messages = Vec::new();
        let mut members = Members::default();
        loop {
            let Some(session) = self.nodes.get_mut(name).and_then(super::Node::live) else {
                return;
            };
            session.is_touched = false;
            if !session.has_room() {
                break;
            }
            let Some((rank, key)) = session.dirty.pop_first() else { break };
            messages.extend(match key.kind() {
                Kind::Watched => self.render_pushed(name, &key),
                _ => self.render(name, rank, &key, &mut members),
            });
        }
        let now_ms = self.now_ms;
        let Some(session) = self.nodes.get_mut(name).and_then(super::Node::live) else { return };
        if session.is_stock() {
            // Before the objects: a KubeEdge edge makes its own record of a device from this word.
            messages.splice(0..0, members.message(now_ms));
        }
        if session.barrier.as_ref().is_some_and(|barrier| barrier.keys.is_empty()) {
            let barrier = session.barrier.take().expect("was there just now");
            let answers = barrier.requests.iter().map(|request| request.response(now_ms, "OK"));
            messages.extend(answers);
        }
        session.rest();
        let id = session.id;
        self.outputs.extend(messages.into_iter().map(|message| Output::Send {
            node: Arc::clone(name),
            session: id,
            message: Box::new(message),
        }));
    }

    fn compare(&self, name: &str, rank: Rank, key: &Key) -> Step {
        let node = self.nodes.get(name);
        let session = node.and_then(|node| node.session.as_deref());
        if session.is_some_and(|session| session.doubts.contains(key)) {
            return Step::Unknown;
        }
        // A KubeEdge edge would keep it for ever and do nothing with it.
        if key.kind() == Kind::DeviceRule && session.is_some_and(Session::is_stock) {
            return Step::Settled;
        }
        let known = node.and_then(|node| node.known.get(key));
        let version = match (self.wanted(name, key), known) {
            (Wanted::Unknown, _) => return Step::Unknown,
            (Wanted::Unjudged, _) | (Wanted::Absent, None) => return Step::Settled,
            // The list says what there is, be it absent, newer, or another pod under the name; then all pods are marked.
            _ if key.kind() == Kind::Pod && self.relisting.contains_key(name) => {
                return Step::Unknown;
            }
            (Wanted::Absent, Some(known)) => {
                let is_needed =
                    matches!(key.kind(), Kind::ConfigMap | Kind::Secret | Kind::DeviceModel);
                if is_needed && rank == Rank::InOrder {
                    return Step::Later;
                }
                return Step::Delete { uid: Arc::clone(&known.uid), then_again: false };
            }
            (Wanted::Present(version), _) => version,
        };
        let former = known.filter(|known| known.uid != version.uid);
        if let Some(former) = former
            && matches!(key.kind(), Kind::Pod | Kind::Device)
        {
            // Containers and connections to devices belong to a uid, so the old object has to go first.
            return Step::Delete { uid: Arc::clone(&former.uid), then_again: true };
        }
        if known.is_some_and(|known| known.is_same_as(version)) {
            return Step::Settled;
        }
        if key.kind() == Kind::Device && !self.has_models(name, key) {
            // Marked again when its model goes out.
            return Step::Unknown;
        }
        let operation = match key.kind() {
            Kind::Node | Kind::Secret => Operation::Update,
            _ if version.terminating || known.is_some() => Operation::Update,
            _ => Operation::Insert,
        };
        Step::Put {
            version: Arc::clone(version),
            operation,
            former: former.map(|known| Arc::clone(&known.uid)),
            is_new: known.is_none(),
        }
    }

    /// Whether the models of a device are on `name` for sure, or on their way.
    fn has_models(&self, name: &str, device: &Key) -> bool {
        let (Some(node), Some(placed)) = (self.nodes.get(name), self.placed.get(device)) else {
            return false;
        };
        let is_sent = |known: &Known| known.resource_version.is_some();
        let mut models = placed.references.iter().filter(|key| key.kind() == Kind::DeviceModel);
        models.all(|model| node.known.get(model).is_some_and(is_sent))
    }

    fn render(
        &mut self,
        name: &Arc<str>,
        rank: Rank,
        key: &Key,
        members: &mut Members,
    ) -> Option<Message> {
        let step = self.compare(name, rank, key);
        let now_ms = self.now_ms;
        let progress = self.progress.get(&key.kind()).copied().unwrap_or(0);
        let is_held_back = self.nodes.get(name)?.session.as_ref()?.is_needed(key.kind());
        let is_recorded = match &step {
            Step::Put { version, .. } => self.is_recorded(name, key, &version.uid, false),
            Step::Delete { uid, .. } if !is_held_back => self.is_recorded(name, key, uid, true),
            _ => true,
        };
        if !is_recorded {
            return None;
        }
        let node = self.nodes.get_mut(name)?;
        let session = node.session.as_deref_mut()?;
        match step {
            Step::Unknown => None,
            Step::Settled => {
                session.settle(key);
                node.graves.remove(key);
                self.restate(name, key);
                None
            }
            Step::Later => {
                session.dirty.insert((Rank::Last, key.clone()));
                None
            }
            Step::Delete { .. } if is_held_back => {
                session.held.insert(key.clone());
                None
            }
            Step::Delete { uid, then_again } => {
                node.known.remove(key);
                let last = node.graves.get(key).map(|version| &**version);
                let absent_at = node.read_at.max(progress);
                let absent_at = (key.kind() == Kind::Pod && absent_at > 0).then_some(absent_at);
                let message = delete_message(key, &uid, last, absent_at, now_ms);
                session.depart(key, &message, What::Delete { uid });
                if then_again && let Some(flight) = session.flights.get_mut(key) {
                    flight.is_stale = true;
                }
                if key.kind() == Kind::Device {
                    members.remove(key);
                }
                Some(message)
            }
            Step::Put { version, operation, former, is_new } => {
                let message = version.message(key, operation, now_ms);
                let uid = Arc::clone(&version.uid);
                let resource_version = Arc::clone(&version.resource_version);
                let known = Known {
                    uid: Arc::clone(&uid),
                    resource_version: Some(resource_version.clone()),
                    is_told: false,
                };
                node.known.insert(key.clone(), known);
                node.graves.remove(key);
                if is_new && key.kind() == Kind::Device {
                    members.add(key, &version.text);
                }
                session.depart(key, &message, What::Put { uid, resource_version, former });
                if key.kind() == Kind::DeviceModel {
                    self.mark_devices(name, key);
                }
                Some(message)
            }
        }
    }

    fn render_pushed(&mut self, name: &Arc<str>, key: &Key) -> Option<Message> {
        let has_own = self.has_own(name, key);
        let now_ms = self.now_ms;
        let node = self.nodes.get_mut(name)?;
        let session = node.session.as_deref_mut()?;
        let pushed = session.pushed.remove(key)?;
        session.pushed_len -= pushed.object.len();
        if session.has_watched(key, &pushed) || has_own {
            return None;
        }
        if let Some(own) = own_key(key).filter(|_| pushed.operation != Operation::Delete) {
            // What it holds there is what it watches; it is not taken away as something that no pod needs.
            node.known.remove(&own);
        }
        let message = pushed.object.message(key, pushed.operation, now_ms);
        if session.is_stock() && pushed.operation != Operation::Delete {
            let id = sync_id(key, &pushed.object.uid);
            // It goes without waiting: an application that lists again finds out what it missed.
            self.syncs.prepare(name, &id, || pushed_spec(key, &pushed.object));
        }
        session.depart(key, &message, What::Pushed(pushed));
        Some(message)
    }

    pub(super) fn acked(&mut self, name: &str, id: SessionId, message: &Message) {
        let Some((name, key)) = self.flight_of(name, id, message) else { return };
        let Some(node) = self.nodes.get_mut(&name) else { return };
        let Some(session) = node.session.as_deref_mut() else { return };
        let Some(flight) = session.arrive(&key, &message.header.msg_id) else { return };
        if flight.is_stale {
            session.dirty.insert((Rank::InOrder, key.clone()));
        } else {
            session.settle(&key);
        }
        if matches!(flight.what, What::Delete { .. }) {
            node.graves.remove(&key);
        }
        session.release();
        if session.is_stock() {
            self.record(&name, &key, flight.what);
        }
        self.touch(&name);
    }

    /// A newer version takes the place of one that the node does not acknowledge: it may be the one that the node can
    /// take. A delete is never given up.
    pub(super) fn unanswered(
        &mut self,
        name: &str,
        id: SessionId,
        message: &Message,
        dropped: bool,
    ) {
        let Some((name, key)) = self.flight_of(name, id, message) else { return };
        let Some(node) = self.nodes.get_mut(&name) else { return };
        let Some(session) = node.session.as_deref_mut() else { return };
        let msg_id = &message.header.msg_id;
        let gives_up = |flight: &Flight| {
            flight.id == *msg_id
                && (dropped || (flight.is_stale && !matches!(flight.what, What::Delete { .. })))
        };
        if !session.flights.get(&key).is_some_and(gives_up) {
            return;
        }
        let flight = session.arrive(&key, msg_id).expect("was found just now");
        match flight.what {
            What::Put { .. } => {
                if let Some(known) = node.known.get_mut(&key) {
                    known.resource_version = None;
                }
            }
            What::Delete { uid } => {
                node.known.insert(key.clone(), Known::some(uid));
            }
            What::Pushed(pushed) if !session.pushed.contains_key(&key) => {
                session.pushed_len += pushed.object.len();
                session.pushed.insert(key.clone(), pushed);
            }
            What::Pushed(_) => {}
        }
        session.dirty.insert((Rank::InOrder, key));
        session.release();
        self.touch(&name);
    }

    fn flight_of(&self, name: &str, id: SessionId, message: &Message) -> Option<(Arc<str>, Key)> {
        let (name, node) = self.nodes.get_key_value(name)?;
        let session = node.session.as_ref().filter(|session| session.id == id)?;
        let path = message.route.resource.parse().ok()?;
        let key = if message.route.source == Kind::Watched.source() {
            Key::watched(&path)?
        } else {
            Key::of_path(&path)?
        };
        session.flights.get_key_value(&key).map(|(key, _)| (Arc::clone(name), key.clone()))
    }

    pub(super) fn push(
        &mut self,
        name: &str,
        key: Key,
        object: Arc<Watched>,
        operation: Operation,
    ) {
        if key.kind() != Kind::Watched || self.has_own(name, &key) {
            return;
        }
        let name = self.intern_node(name);
        let Some(session) = self.nodes.get_mut(&name).and_then(|node| node.session.as_deref_mut())
        else {
            return;
        };
        let id = sync_id(&key, &object.uid);
        let is_delete = operation == Operation::Delete;
        if session.is_stock()
            && !is_delete
            && !session.pushed.contains_key(&key)
            && !session.flights.contains_key(&key)
            && self.syncs.is_acked(&name, &id, &object.resource_version)
        {
            return;
        }
        let waiting = session.pushed.remove(&key);
        if let Some(waiting) = &waiting {
            session.pushed_len -= waiting.object.len();
        }
        let (operation, former) = match waiting {
            None => (operation, None),
            Some(waiting) => {
                let is_first = waiting.operation == Operation::Insert && !is_delete;
                let other = Some(waiting.object.uid.clone()).filter(|uid| *uid != object.uid);
                let operation = if is_first { Operation::Insert } else { operation };
                (operation, waiting.former.or(other))
            }
        };
        session.pushed_len += object.len();
        session.pushed.insert(key.clone(), Pushed { object, operation, former });
        if session.pushed.len() > PUSHED_MAX || session.pushed_len > PUSHED_LEN_MAX {
            return self.cut(&name, "the node does not take the objects that it watches");
        }
        self.mark(&name, &key);
    }

    /// Whether the node gets the object under a watched key anyway.
    fn has_own(&self, name: &str, key: &Key) -> bool {
        own_key(key).is_some_and(|own| !matches!(self.wanted(name, &own), Wanted::Absent))
    }

    /// Marks the watched objects that came before the connection was ready for them.
    pub(super) fn mark_pushed(&mut self, name: &Arc<str>) {
        let Some(session) = self.nodes.get(name).and_then(|node| node.session.as_ref()) else {
            return;
        };
        for key in session.pushed.keys().cloned().collect::<Vec<_>>() {
            self.mark(name, &key);
        }
    }

    /// Ends the connection of a node, if it has one.
    pub(super) fn cut(&mut self, name: &str, reason: &'static str) {
        let name = self.intern_node(name);
        if let Some(session) = self.session(&name) {
            self.end_session(&name);
            self.outputs.push_back(Output::Close { node: name, session, reason });
        }
    }

    /// Takes the connection from its node; what was under way may or may not have arrived.
    pub(super) fn end_session(&mut self, name: &str) {
        let Some((name, _)) = self.nodes.get_key_value(name) else { return };
        let name = Arc::clone(name);
        let Some(node) = self.nodes.get_mut(&name) else { return };
        let Some(session) = node.session.take() else { return };
        self.awaiting_lists.remove(&name);
        self.doubting.remove(&name);
        if let Phase::AwaitingDigest { until } = session.phase {
            self.awaiting_digest.remove(&(until, Arc::clone(&name)));
        }
        if !session.is_stock() {
            // The next connection tells what it holds.
            node.known.clear();
            node.graves.clear();
            return;
        }
        for (key, flight) in session.flights {
            match flight.what {
                What::Put { uid, resource_version, .. } => {
                    let sent = Sent::Version(resource_version);
                    self.syncs.doubt(&name, &sync_id(&key, &uid), sent);
                    if let Some(known) = node.known.get_mut(&key) {
                        known.resource_version = None;
                    }
                }
                What::Delete { uid } => {
                    self.syncs.doubt(&name, &sync_id(&key, &uid), Sent::Delete);
                    node.known.insert(key, Known::some(uid));
                }
                What::Pushed(_) => {}
            }
        }
        // Without its last state a mapper never hears that its device is gone; all others need the identity only.
        node.graves.retain(|key, _| key.kind() == Kind::Device);
    }
}
