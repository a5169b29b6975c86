//! The devices of this node: what they are, what they should be, who is told.
//!
//! Three sides talk about a device. The hub says that it is here (its Device object, and nothing else, decides that) and
//! what it should be; mappers and clients of the broker say what it is; all three want to know. [`Twin`] holds what is
//! true of each device and makes of every word an answer, rows to keep, and what follows for the others:
//!
//! ```text
//! hub ── Device, DeviceModel ──► Twin ── calls ──────────────► mapper      (mapper.rs)
//!  ▲                              │ ▲ ◄─ values, state ───────── mapper
//!  └── reports, one per interval ─┘ │ ── result, document, delta ─► broker
//!      (hub.rs)                     └─── update, get ────────────── broker  (topic.rs, payload.rs)
//! ```
//!
//! No side waits for another one: what cannot be told now is a difference that is still there later.
//!
//! # What is on the disk, and when
//!
//! One row per device, one per mapper, one per object that a mapper knows. [`Twin::take_changes`] returns what is to be
//! written, [`Twin::handle_stored`] says that it was. What the hub wants, a state, a device that comes or goes and
//! everything about mappers is written at once. A value that a quiet device reports is written after
//! [`PERSIST_DELAY`], those of a device that always changes every [`PERSIST_INTERVAL`], and before the hub is told of
//! them. An orderly end writes all. So a power cut can cost the last seconds of values that nobody but the broker had
//! seen, and a restart costs nothing.
//!
//! # Differs from KubeEdge
//!
//! - An object is taken whoever sent it, so a mapper hears what was changed while the node was away.
//! - The same value again is no change. All types of the CRD and any text up to 256 KiB are values.
//! - Only the hub speaks for the hub: `twin/cloud_updated` from the broker is nothing.
//! - What the hub wants is also told to the broker, as document and delta.
//! - A device is gone when it is gone; its mapper is told until it knows.
//! - Errors are published where the sender listens, with its `event_id`.
//!
//! KubeEdge's cloud loses the first report of every property, so with such a cloud each is told twice, once per
//! connection.
//!
//! No I/O, no clock. The twin task of the agent is the only caller.
//!
//! Source: kubeedge/kubeedge, edge/pkg/devicetwin; which of its losses are mended here: the rows of its issue tracker
//! named in docs/devices.md.

mod hub;
pub mod mapper;
pub mod merge;
pub mod payload;
pub mod policy;
mod store;
pub mod topic;
pub mod value;

pub use hub::{ANSWER_TIMEOUT, WINDOW};
pub use store::{DeviceRow, Kept, Write};

use crate::Now;
use crate::uplink::reply_object;
use hub::{Reports, Told};
use mapper::{Call, Called, Info, Mappers, Objects};
use payload::Base;
use serde_json::{Value, json};
use skerry_protocol::{Capabilities, Message, Operation, ResourcePath};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use value::{Change, Origin, Properties};

/// Devices of one node.
pub const DEVICES_MAX: usize = 5_000;
/// Time between two reports about a device to the hub, unless configured otherwise.
pub const REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// How long a first change waits for others of the same device before the hub is told.
pub const REPORT_DELAY: Duration = Duration::from_millis(250);
/// How long a value waits for others before it is written.
pub const PERSIST_DELAY: Duration = Duration::from_millis(200);
/// Time between two rows of a device that always changes.
pub const PERSIST_INTERVAL: Duration = Duration::from_secs(5);
/// Rows written at once.
const PERSIST_BATCH: usize = 128;
/// Time after which a failed write is tried again.
const STORE_RETRY: Duration = Duration::from_secs(10);
/// When a property is told once more to a cloud that loses the first report.
const REPEAT_AFTER: Duration = Duration::from_secs(2);
/// A sample's own time is believed this far ahead of this node's clock.
const AHEAD_MAX_MS: i64 = 5 * 60 * 1000;
/// And this far back.
const BEHIND_MAX_MS: i64 = 30 * 24 * 3600 * 1000;
/// States that a device can have; KubeEdge's edge takes no others.
const STATES: [&str; 5] = ["online", "offline", "ok", "unknown", "unhealthy"];

/// `namespace/name` of a device or a model.
pub type Id = Arc<str>;

/// What the world did.
#[derive(Debug)]
pub enum Input {
    /// The node has this object, in this form. Any sender.
    Object {
        /// `namespace/device/name` or `namespace/devicemodel/name`.
        path: ResourcePath,
        /// The object.
        object: Value,
    },
    /// The node has this object no more.
    Gone(ResourcePath),
    /// Every object that the node has was given: what is kept of others is to go.
    Restored,
    /// A message of the hub for the twin: membership, or a value that it wants.
    Hub(Box<Message>),
    /// An answer of the hub.
    Reply(Box<Message>),
    /// A message on the broker.
    Mqtt {
        /// Its topic.
        topic: String,
        /// Its bytes.
        payload: Vec<u8>,
    },
    /// A connection to the hub is up, or has moved.
    Connected(Capabilities),
    /// It is gone.
    Disconnected,
    /// What came of a call.
    Called {
        /// From [`Call`].
        protocol: String,
        /// From [`Call`].
        number: u64,
        /// What came of it.
        what: Called,
    },
    /// The socket of a mapper is another file than before.
    MapperRestarted(String),
    /// Nobody has listened at the mapper's socket for a while.
    MapperLost(String),
    /// Nothing but time.
    Tick,
}

/// How much a message on the broker matters when not all can be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// The newest of its topic is all that is wanted.
    Latest,
    /// The oldest are dropped first.
    Each,
}

/// What the owner has to do.
#[derive(Debug, PartialEq)]
pub enum Output {
    /// Publish this.
    Publish {
        /// Where.
        topic: String,
        /// JSON.
        payload: Vec<u8>,
        /// What may be dropped.
        weight: Weight,
    },
    /// Somebody said what a device is; only after [`Twin::follow`].
    Reported {
        /// Which one.
        id: Id,
        /// Property, value, and when it was so in Unix milliseconds.
        values: Vec<(String, String, i64)>,
    },
    /// Data of an application for a rule of the cloud.
    Upload {
        /// The topic on which it came.
        topic: String,
        /// The data.
        payload: Vec<u8>,
    },
    /// Of no use; for the log.
    Ignored {
        /// Topic or resource.
        what: String,
        /// Why.
        reason: String,
    },
}

/// One twin of a report.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reported {
    /// The property.
    pub name: String,
    /// What it is.
    pub actual: Option<String>,
    /// Which wanted value the mapper has seen.
    pub observed: Option<String>,
    /// When, Unix milliseconds, by the mapper's clock.
    pub timestamp: Option<i64>,
    /// Type, if the mapper says one.
    pub kind: Option<String>,
}

/// Why a mapper's word is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// The node has no such device.
    #[error("device `{0}` is not on this node")]
    Unknown(String),
    /// A state that nobody knows.
    #[error("state `{0}` is not known; known: online, offline, ok, unknown, unhealthy")]
    State(String),
    /// A bad name, or more than fits.
    #[error(transparent)]
    Refused(#[from] value::Refused),
}

/// Why a mapper is not registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// It serves nothing.
    #[error("the mapper names no protocol")]
    NoProtocol,
    /// It cannot be called.
    #[error("the mapper's address `{0}` is no path of a socket")]
    NoAddress(String),
    /// There are [`mapper::MAPPERS_MAX`] others.
    #[error("this node has {} mappers already", mapper::MAPPERS_MAX)]
    Full,
}

/// What a mapper gets when it registers, in the form of custom resources.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Registered {
    /// Its devices.
    pub devices: Vec<Value>,
    /// Their models, each once.
    pub models: Vec<Value>,
}

#[derive(Debug)]
struct Device {
    row: DeviceRow,
    /// When its row is due.
    persist_at: Option<Instant>,
    persisted: Option<Instant>,
    /// The row is being written.
    writing: bool,
    /// Changed since it was last handed out for writing.
    unwritten: bool,
}

impl Device {
    fn new(row: DeviceRow) -> Self {
        Self { row, persist_at: None, persisted: None, writing: false, unwritten: false }
    }
}

/// What is being written, without the rows themselves: those are long.
#[derive(Debug)]
enum Mark {
    Device(Id),
    Forget(Id),
    Mapper(mapper::Change),
}

impl Mark {
    fn of(write: &Write) -> Self {
        match write {
            Write::Device(id, _) => Self::Device(id.clone()),
            Write::Forget(id) => Self::Forget(id.clone()),
            Write::Mapper(change) => Self::Mapper(change.clone()),
        }
    }
}

/// All devices of one node.
#[derive(Debug)]
pub struct Twin {
    node: String,
    objects: Objects,
    devices: BTreeMap<Id, Device>,
    mappers: Mappers,
    reports: Reports,
    /// Devices whose row is due, by when.
    persist: BTreeSet<(Instant, Id)>,
    /// Rows to remove.
    removed: BTreeSet<Id>,
    /// What the last [`Self::take_changes`] returned.
    writing: Option<Vec<Mark>>,
    store_at: Option<Instant>,
    /// Somebody may listen on a broker.
    has_broker: bool,
    /// Somebody wants [`Output::Reported`].
    is_followed: bool,
    /// Asks the cloud which devices this node has.
    ask_membership: bool,
    outputs: VecDeque<Output>,
}

impl Twin {
    /// Takes what was kept; then every object has to be given, and [`Input::Restored`].
    pub fn restore(node: &str, kept: Kept, interval: Duration) -> Self {
        let mut devices = BTreeMap::new();
        for (id, row) in kept.devices {
            devices.insert(Id::from(id), Device::new(row));
        }
        Self {
            node: node.into(),
            objects: Objects::default(),
            devices,
            mappers: Mappers::restore(kept.mappers, kept.knows),
            reports: Reports::new(interval),
            persist: BTreeSet::new(),
            removed: BTreeSet::new(),
            writing: None,
            store_at: None,
            has_broker: true,
            is_followed: false,
            ask_membership: false,
            outputs: VecDeque::new(),
        }
    }

    /// The same for a node without a broker: nothing is made to be published.
    #[must_use]
    pub fn without_broker(self) -> Self {
        Self { has_broker: false, ..self }
    }

    /// Whether everything that is reported is handed out as [`Output::Reported`].
    pub fn follow(&mut self, wanted: bool) {
        self.is_followed = wanted;
    }

    /// Number of devices.
    pub fn len(&self) -> usize {
        self.devices.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// The properties of a device.
    pub fn properties(&self, id: &str) -> Option<&Properties> {
        self.devices.get(id).map(|device| &device.row.twins)
    }

    /// The state of a device.
    pub fn state(&self, id: &str) -> Option<&str> {
        self.devices.get(id).map(|device| device.row.state.as_str())
    }

    /// Every mapper, for whoever looks after their sockets.
    pub fn mappers(&self) -> impl Iterator<Item = &Info> {
        self.mappers.infos()
    }

    /// Takes one input.
    pub fn handle(&mut self, now: Now, input: Input) {
        match input {
            Input::Object { path, object } => self.take_object(now, &path, &object),
            Input::Gone(path) => self.lose_object(now, &path),
            Input::Restored => self.restored(now),
            Input::Hub(message) => self.hear_hub(now, &message),
            Input::Reply(message) => self.hear_reply(now, &message),
            Input::Mqtt { topic, payload } => self.hear_broker(now, topic, payload),
            Input::Connected(capabilities) => self.connected(now, capabilities),
            Input::Disconnected => self.reports.handle_disconnected(),
            Input::Called { protocol, number, what } => {
                if let Called::Refused(reason) = &what {
                    self.ignore(&protocol, format!("the mapper refused a call: {reason}"));
                }
                self.mappers.called(now.mono, &protocol, number, &what, &self.objects);
            }
            Input::MapperRestarted(protocol) => self.mappers.restarted(&protocol, &self.objects),
            Input::MapperLost(protocol) => self.lose_mapper(now, &protocol),
            Input::Tick => {}
        }
        while let Some((id, _)) = self.reports.poll_overdue(now.mono) {
            self.reports.want(now.mono, &id, Duration::ZERO);
        }
    }

    /// A mapper says who it is.
    ///
    /// # Errors
    ///
    /// [`RegisterError`].
    pub fn register_mapper(
        &mut self,
        info: Info,
        with_data: bool,
    ) -> Result<Registered, RegisterError> {
        if info.protocol.is_empty() {
            return Err(RegisterError::NoProtocol);
        }
        if !info.address.starts_with('/') {
            return Err(RegisterError::NoAddress(info.address));
        }
        let (devices, models) =
            self.mappers.register(info, with_data, &self.objects).ok_or(RegisterError::Full)?;
        Ok(Registered { devices, models })
    }

    /// A mapper says what a device is.
    ///
    /// # Errors
    ///
    /// [`ReportError`]; nothing of it is taken then.
    pub fn report_twins(
        &mut self,
        now: Now,
        id: &str,
        twins: Vec<Reported>,
    ) -> Result<(), ReportError> {
        let now_ms = now.unix_ms();
        let sane = |time: &i64| (now_ms - BEHIND_MAX_MS..=now_ms + AHEAD_MAX_MS).contains(time);
        let changes = twins.into_iter().map(|twin| {
            let change = Change {
                expected: twin.observed,
                actual: twin.actual,
                timestamp: twin.timestamp.filter(sane),
                optional: None,
                kind: twin.kind,
            };
            (twin.name, Some(change))
        });
        let changes: BTreeMap<_, _> = changes.collect();
        let unknown = || ReportError::Unknown(id.into());
        let (id, device) = self.devices.get_key_value(id).ok_or_else(unknown)?;
        debug_assert!(device.row.twins.0.len() <= value::PROPERTIES_MAX);
        let id = id.clone();
        self.update(now, &id, Origin::Mapper, &changes, &id.clone(), &Base::default())?;
        Ok(())
    }

    /// A mapper says in which state a device is.
    ///
    /// # Errors
    ///
    /// [`ReportError`].
    pub fn report_state(&mut self, now: Now, id: &str, state: &str) -> Result<(), ReportError> {
        let unknown = || ReportError::Unknown(id.into());
        let id = self.devices.get_key_value(id).ok_or_else(unknown)?.0.clone();
        self.set_state(now, &id, state, &id.clone(), &Base::default())
    }

    /// Returns the next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Returns the next call to a mapper; each mapper has at most one at a time.
    pub fn poll_call(&mut self, now: Instant) -> Option<Call> {
        self.mappers.poll_call(now, &self.objects)
    }

    /// Returns what is to be written now, in one transaction; then [`Self::handle_stored`]. With `all` everything that is
    /// not written yet.
    pub fn take_changes(&mut self, now: Instant, all: bool) -> Vec<Write> {
        if self.writing.is_some() || (!all && self.store_at.is_some_and(|at| at > now)) {
            return Vec::new();
        }
        let mut writes: Vec<Write> =
            std::mem::take(&mut self.removed).into_iter().map(Write::Forget).collect();
        writes.extend(self.mappers.take_changes().into_iter().map(Write::Mapper));
        while (all || writes.len() < PERSIST_BATCH)
            && let Some((at, id)) = self.persist.first().cloned()
            && (all || at <= now)
        {
            self.persist.pop_first();
            let Some(device) = self.devices.get_mut(&id) else { continue };
            (device.persist_at, device.persisted) = (None, Some(now));
            (device.writing, device.unwritten) = (true, false);
            writes.push(Write::Device(id, device.row.clone()));
        }
        if !writes.is_empty() {
            self.writing = Some(writes.iter().map(Mark::of).collect());
        }
        self.store_at = None;
        writes
    }

    /// Takes whether the changes of the last [`Self::take_changes`] are on the disk. If not they are offered again after a
    /// while, and the hub may be told meanwhile: the link may well work while the disk does not.
    pub fn handle_stored(&mut self, now: Instant, stored: bool) {
        let Some(marks) = self.writing.take() else { return };
        for mark in marks {
            match mark {
                Mark::Device(id) => {
                    let Some(device) = self.devices.get_mut(&id) else { continue };
                    device.writing = false;
                    if !stored {
                        self.persist_soon(&id, now + STORE_RETRY);
                    }
                }
                Mark::Forget(id) if !stored && !self.devices.contains_key(&id) => {
                    self.removed.insert(id);
                }
                Mark::Mapper(change) if !stored => self.mappers.keep(change),
                _ => {}
            }
        }
        if !stored {
            self.store_at = Some(now + STORE_RETRY);
        }
    }

    /// Returns the next message for the hub.
    pub fn poll_transmit(&mut self, now: Now) -> Option<Message> {
        if !self.reports.connected {
            return None;
        }
        if std::mem::take(&mut self.ask_membership) {
            let content = json!({"event_type": "group_membership_event", "event_id": new_id(),
                "group_id": self.node, "operation": "detail", "timestamp": now.unix_ms()});
            let get = Operation::Get;
            return Some(Message::new(
                now.unix_ms(),
                "twin",
                "resource",
                get,
                "membership/detail",
                &content,
            ));
        }
        loop {
            let id = self.reports.poll(now.mono)?;
            let Some(device) = self.devices.get_mut(&id) else { continue };
            if device.writing || (device.unwritten && self.store_at.is_none()) {
                // Its numbers go to the disk first, at once.
                if device.unwritten {
                    if let Some(at) = device.persist_at {
                        self.persist.remove(&(at, id.clone()));
                    }
                    device.persist_at = Some(now.mono);
                    self.persist.insert((now.mono, id.clone()));
                }
                self.reports.want(now.mono, &id, Duration::from_millis(1));
                continue;
            }
            let row = &device.row;
            let name = id.split('/').next_back().unwrap_or_default();
            let message = |path: &str, content: &Value| {
                let resource = format!("device/{id}/{path}");
                let update = Operation::Update;
                Message::new(now.unix_ms(), "twin", "resource", update, resource, content)
            };
            let state_owed = row.state_told < row.state_edge;
            if state_owed && !self.reports.is_state_in_flight(&id, row.state_edge) {
                let mut content = payload::state_message(
                    &new_id(),
                    now.unix_ms(),
                    name,
                    &row.state,
                    &row.last_online,
                );
                let epoch = row.epoch();
                if !epoch.is_empty() {
                    content["epoch"] = epoch.into();
                }
                let message = message("state/update", &content);
                let told = Told::State(row.state_edge);
                let more = row.twins.0.values().any(value::Property::is_dirty);
                self.reports.sent(now.mono, &id, message.header.msg_id.clone(), told);
                if more {
                    // State and values are one report in two messages.
                    self.reports.ready(now.mono, &id);
                }
                return Some(message);
            }
            let dirty = || row.twins.0.iter().filter(|(_, property)| property.is_dirty());
            let told: Vec<_> =
                dirty().map(|(name, property)| (name.clone(), property.edge)).collect();
            if told.is_empty() {
                continue;
            }
            let properties = dirty().map(|(name, property)| (name.as_str(), property));
            let content = payload::report(&new_id(), now.unix_ms(), &row.epoch(), properties);
            let message = message("twin/edge_updated", &content);
            self.reports.sent(now.mono, &id, message.header.msg_id.clone(), Told::Twins(told));
            return Some(message);
        }
    }

    /// When to poll again, if nothing else happens.
    pub fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        let store = match self.writing {
            Some(_) => None,
            None => {
                let due = self.persist.first().map(|(at, _)| *at);
                let at_once = !self.removed.is_empty() || self.mappers.has_changes();
                let due = if at_once { Some(now) } else { due };
                due.map(|due| self.store_at.map_or(due, |at| at.max(due)))
            }
        };
        [store, self.reports.poll_timeout(), self.mappers.poll_timeout(now)]
            .into_iter()
            .flatten()
            .min()
    }

    fn connected(&mut self, now: Now, capabilities: Capabilities) {
        let ours = capabilities != Capabilities::default();
        self.reports.handle_connected(ours);
        self.ask_membership = !ours;
        let dirty: Vec<Id> = self
            .devices
            .iter()
            .filter(|(_, device)| device.row.is_dirty())
            .map(|(id, _)| id.clone())
            .collect();
        dirty.iter().for_each(|id| self.reports.want(now.mono, id, Duration::ZERO));
    }

    fn hear_reply(&mut self, now: Now, message: &Message) {
        let parent = message.header.parent_msg_id.as_str();
        let reply = reply_object(message);
        let Some((id, told)) = self.reports.answered(now.mono, parent, reply.is_ok()) else {
            return;
        };
        if let Err((_, reason)) = reply {
            self.ignore(&id, format!("the hub did not take a report: {reason}"));
            self.want_report(now, &id, Duration::ZERO);
            return;
        }
        let (session, repeats) = (self.reports.session, !self.reports.ours);
        let Some(device) = self.devices.get_mut(&id) else { return };
        let mut repeat = false;
        match told {
            Told::State(edge) => device.row.state_told = device.row.state_told.max(edge),
            Told::Twins(told) => {
                for (name, edge) in told {
                    let Some(property) = device.row.twins.0.get_mut(&name) else { continue };
                    property.told = property.told.max(edge);
                    if repeats && property.repeated_in != session && !property.deleted {
                        property.repeated_in = session;
                        property.edge += 1;
                        repeat = true;
                    }
                }
            }
        }
        // What was told twice is the same to the hub, so this row is in no hurry.
        self.changed(now, &id, PERSIST_INTERVAL);
        if repeat {
            self.reports.hasten(&id, now.mono + REPEAT_AFTER);
            self.want_report(now, &id, REPEAT_AFTER);
        } else {
            self.want_report(now, &id, Duration::ZERO);
        }
    }

    fn want_report(&mut self, now: Now, id: &Id, wait: Duration) {
        if self.devices.get(id).is_some_and(|device| device.row.is_dirty()) {
            self.reports.want(now.mono, id, wait);
        }
    }

    /// The row of a device is another one; it is written after `delay`, and not more often than that makes sense.
    fn changed(&mut self, now: Now, id: &Id, delay: Duration) {
        let Some(device) = self.devices.get_mut(id) else { return };
        device.unwritten = true;
        let usual = device.persisted.map_or(now.mono, |at| at + PERSIST_INTERVAL);
        let at = match delay.is_zero() {
            true => now.mono,
            false => usual.max(now.mono + delay),
        };
        self.persist_soon(id, at);
    }

    fn persist_soon(&mut self, id: &Id, at: Instant) {
        let Some(device) = self.devices.get_mut(id) else { return };
        device.unwritten = true;
        if device.persist_at.is_some_and(|due| due <= at) {
            return;
        }
        if let Some(due) = device.persist_at.replace(at) {
            self.persist.remove(&(due, id.clone()));
        }
        self.persist.insert((at, id.clone()));
    }

    fn publish(&mut self, device: &str, verb: &str, payload: &Value, weight: Weight) {
        if !self.has_broker {
            return;
        }
        let topic = format!("{}/{device}/{verb}", topic::DEVICES);
        let payload = payload.to_string().into_bytes();
        self.outputs.push_back(Output::Publish { topic, payload, weight });
    }

    fn ignore(&mut self, what: &str, reason: impl Into<String>) {
        let (what, reason) = (what.to_owned(), reason.into());
        self.outputs.push_back(Output::Ignored { what, reason });
    }
}

fn new_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

mod broker;
mod object;

#[cfg(test)]
mod tests;
