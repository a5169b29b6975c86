//! What each mapper of the node should know, what it knows, and the calls between the two.
//!
//! A mapper serves one protocol. It should know every device of that protocol and their models, and nothing else; the
//! difference becomes calls, one at a time per mapper, of which only the latest state matters: what was changed three
//! times meanwhile is one call, what came and went is none. What leaves goes first, a model comes before its devices and
//! leaves after them. A call that failed is made again with growing pauses, for that object alone when the mapper
//! answered, for all of them when it did not. So a mapper that hangs costs its own devices time, and nobody else's.
//!
//! What a mapper knows is kept through restarts ([`Change`]): a device that was deleted while its mapper was away is
//! taken from it when it is back, although nothing else is left of the device by then.
//!
//! No I/O, no clock. Caller: [`super::Twin`].
//!
//! Source: kubeedge/kubeedge, edge/pkg/devicetwin/dtmanager/dmiworker.go, dmiclient/client.go; the mapper framework for
//! what its answers mean.

use super::policy::Policies;
use super::{Id, merge};
use crate::backoff::Backoff;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Mappers of one node, each with another protocol.
pub const MAPPERS_MAX: usize = 64;
/// How long one call may take; slow buses need more than KubeEdge's 10 s.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Pauses between tries.
const RETRY_MIN: Duration = Duration::from_secs(1);
/// In place of a digest: the mapper may know the object in some form, or not.
const DOUBT: &str = "?";
/// The same, and it is not to be told as a change but as new: the other has just been refused.
const DOUBT_NEW: &str = "!";
/// Longest pause between tries.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// What a mapper says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The version of the interface that it speaks.
    pub api_version: String,
    /// Which devices are its own.
    pub protocol: String,
    /// Path of its Unix socket.
    pub address: String,
    /// What it says of its state; nobody looks at it.
    pub state: String,
}

/// Something to tell a mapper.
#[derive(Debug, Clone, PartialEq)]
pub enum Tell {
    /// Here is a model.
    CreateModel(Value),
    /// A model is different.
    UpdateModel(Value),
    /// A model has gone.
    RemoveModel,
    /// Here is a device.
    RegisterDevice(Value),
    /// A device is different.
    UpdateDevice(Value),
    /// A device has gone.
    RemoveDevice,
}

/// A call to be made, with [`CALL_TIMEOUT`].
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// For [`super::Input::Called`].
    pub number: u64,
    /// The protocol of the mapper.
    pub protocol: String,
    /// Path of its socket.
    pub address: String,
    /// `namespace/name` of the device or model.
    pub id: Id,
    /// What to say.
    pub tell: Tell,
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Called {
    /// It was done.
    Done,
    /// The mapper said no.
    Refused(String),
    /// There was no answer.
    Unreachable(String),
}

/// A change of what is kept about mappers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A mapper, in place of the one of the same protocol. What that one knew is to be forgotten.
    Mapper(Info),
    /// What a mapper knows of an object by now; `None` for nothing.
    Knows {
        /// The mapper's protocol.
        protocol: String,
        /// The object.
        of: Object,
        /// Digest of what it was told.
        digest: Option<String>,
    },
}

/// A device or a model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Object {
    /// By `namespace/name`.
    Device(Id),
    /// By `namespace/name`.
    Model(Id),
}

/// The objects of the node.
#[derive(Debug, Default)]
pub(super) struct Objects {
    pub(super) devices: BTreeMap<Id, Placed>,
    /// JSON texts.
    pub(super) models: BTreeMap<Id, Arc<str>>,
}

/// A Device object.
#[derive(Debug)]
pub(super) struct Placed {
    /// The object without bookkeeping, as JSON.
    pub(super) text: Arc<str>,
    pub(super) protocol: String,
    pub(super) model: Option<Id>,
    /// Names of its properties.
    pub(super) names: Box<[String]>,
    /// Who decides what its properties should be.
    pub(super) policies: Policies,
    /// What somebody at the node wants instead of the hub.
    pub(super) overrides: BTreeMap<String, String>,
}

impl Objects {
    /// The device as its mapper gets it, and a digest of that; `None` while it or its model is not here.
    fn device(&self, id: &str, protocol: &str) -> Option<(Value, String)> {
        let placed = self.devices.get(id).filter(|placed| placed.protocol == protocol)?;
        let model = self.models.get(placed.model.as_ref()?)?;
        let mut own: Value = serde_json::from_str(&placed.text).ok()?;
        let properties = own["spec"]["properties"].as_array_mut();
        for property in properties.into_iter().flatten().filter(|one| one.is_object()) {
            let name = property["name"].as_str().unwrap_or_default();
            if let Some(value) = placed.overrides.get(name) {
                let value = value.as_str().into();
                match &mut property["desired"] {
                    Value::Object(desired) => drop(desired.insert("value".into(), value)),
                    desired => *desired = serde_json::json!({"value": value}),
                }
            }
        }
        let merged = merge::device(&own, &serde_json::from_str(model).ok()?);
        let digest = digest(&merged);
        Some((merged, digest))
    }

    /// The model as a mapper of this protocol gets it; `None` when no device of the protocol uses it.
    fn model(&self, id: &str, protocol: &str) -> Option<(Value, String)> {
        let uses =
            |placed: &&Placed| placed.protocol == protocol && placed.model.as_deref() == Some(id);
        let mut users = self.devices.values().filter(uses).peekable();
        users.peek()?;
        let names = users.flat_map(|placed| placed.names.iter().map(String::as_str));
        let model = serde_json::from_str(self.models.get(id)?).ok()?;
        let merged = merge::model(&model, names);
        let digest = digest(&merged);
        Some((merged, digest))
    }
}

/// Order of calls.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    RemoveDevice(Id),
    Model(Id),
    Device(Id),
    RemoveModel(Id),
}

#[derive(Debug)]
struct Mapper {
    info: Info,
    knows: BTreeMap<Object, String>,
    /// What may differ.
    pending: BTreeSet<Work>,
    /// What differs and has to wait after a refusal.
    later: BTreeSet<(Instant, Work)>,
    refusals: BTreeMap<Work, Backoff>,
    call: Option<(u64, Work, String)>,
    unreachable: Backoff,
    next_try: Option<Instant>,
}

/// All mappers of the node.
#[derive(Debug, Default)]
pub(super) struct Mappers {
    by_protocol: BTreeMap<String, Mapper>,
    last_call: u64,
    changes: Vec<Change>,
}

impl Mappers {
    /// Takes what was kept.
    pub(super) fn restore(
        rows: impl IntoIterator<Item = Info>,
        knows: impl IntoIterator<Item = (String, Object, String)>,
    ) -> Self {
        let mut mappers = Self::default();
        for info in rows {
            mappers.by_protocol.insert(info.protocol.clone(), Mapper::new(info));
        }
        for (protocol, object, digest) in knows {
            if let Some(mapper) = mappers.by_protocol.get_mut(&protocol) {
                mapper.knows.insert(object, digest);
            }
        }
        mappers
    }

    pub(super) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// A change that could not be written; what came after it is newer.
    pub(super) fn keep(&mut self, change: Change) {
        let (keeps, of) = match &change {
            Change::Mapper(info) => (&info.protocol, None),
            Change::Knows { protocol, of, .. } => (protocol, Some(of)),
        };
        let is_replaced = self.changes.iter().any(|newer| match newer {
            Change::Mapper(info) => info.protocol == *keeps,
            Change::Knows { protocol, of: about, .. } => protocol == keeps && Some(about) == of,
        });
        if !is_replaced {
            self.changes.insert(0, change);
        }
    }

    pub(super) fn has_changes(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Every mapper.
    pub(super) fn infos(&self) -> impl Iterator<Item = &Info> {
        self.by_protocol.values().map(|mapper| &mapper.info)
    }

    /// A mapper said who it is. Returns the devices and models that it gets with the answer, if it wants them; what it
    /// does not get that way it is told. `None` when there are [`MAPPERS_MAX`] already.
    pub(super) fn register(
        &mut self,
        info: Info,
        with_data: bool,
        objects: &Objects,
    ) -> Option<(Vec<Value>, Vec<Value>)> {
        if self.by_protocol.len() >= MAPPERS_MAX && !self.by_protocol.contains_key(&info.protocol) {
            return None;
        }
        let protocol = info.protocol.clone();
        self.changes.push(Change::Mapper(info.clone()));
        let mut mapper = Mapper::new(info);
        let (mut devices, mut models) = (Vec::new(), Vec::new());
        if with_data {
            let mut told = BTreeSet::new();
            for (id, placed) in objects.devices.iter().filter(|(_, of)| of.protocol == protocol) {
                let (Some((device, digest)), Some(model_id)) =
                    (objects.device(id, &protocol), &placed.model)
                else {
                    continue;
                };
                devices.push(device);
                self.changes.extend(mapper.learn(Object::Device(id.clone()), Some(digest)));
                if told.insert(model_id.clone())
                    && let Some((model, digest)) = objects.model(model_id, &protocol)
                {
                    models.push(model);
                    self.changes
                        .extend(mapper.learn(Object::Model(model_id.clone()), Some(digest)));
                }
            }
        }
        mapper.look_at_all(objects);
        self.by_protocol.insert(protocol, mapper);
        Some((devices, models))
    }

    /// Everything may differ: after a start.
    pub(super) fn look_at_all(&mut self, objects: &Objects) {
        self.by_protocol.values_mut().for_each(|mapper| mapper.look_at_all(objects));
    }

    /// A device is another one, or has come or gone. `models` are those that it used and uses.
    pub(super) fn device_changed(&mut self, id: &Id, models: &[&Id]) {
        for mapper in self.by_protocol.values_mut() {
            models.iter().for_each(|model| mapper.look_at_model(model));
            mapper.look_at_device(id);
        }
    }

    /// A model has come, gone or is different.
    pub(super) fn model_changed(&mut self, id: &Id, objects: &Objects) {
        for mapper in self.by_protocol.values_mut() {
            mapper.look_at_model(id);
            let users =
                objects.devices.iter().filter(|(_, placed)| placed.model.as_ref() == Some(id));
            users.for_each(|(device, _)| mapper.look_at_device(device));
        }
    }

    /// A mapper's socket is another one, so the mapper may have begun anew without saying so: it is told everything.
    pub(super) fn restarted(&mut self, protocol: &str, objects: &Objects) {
        let Some(mapper) = self.by_protocol.get_mut(protocol) else { return };
        let info = mapper.info.clone();
        self.changes.push(Change::Mapper(info.clone()));
        *mapper = Mapper::new(info);
        mapper.look_at_all(objects);
    }

    pub(super) fn called(
        &mut self,
        now: Instant,
        protocol: &str,
        number: u64,
        what: &Called,
        objects: &Objects,
    ) {
        // An answer to the call of a mapper that has registered anew since is about another one.
        if let Some(mapper) = self.by_protocol.get_mut(protocol)
            && let Some((_, work, digest)) = mapper.call.take_if(|(known, ..)| *known == number)
        {
            let model = match &work {
                Work::Device(id) => objects.devices.get(id).and_then(|placed| placed.model.clone()),
                _ => None,
            };
            self.changes.extend(mapper.called(now, work, model, digest, what));
        }
    }

    pub(super) fn poll_call(&mut self, now: Instant, objects: &Objects) -> Option<Call> {
        let last_call = &mut self.last_call;
        let changes = &mut self.changes;
        self.by_protocol.values_mut().find_map(|mapper| {
            let (work, id, tell, digest) = mapper.next(now, objects, changes)?;
            *last_call += 1;
            mapper.call = Some((*last_call, work, digest));
            Some(Call {
                number: *last_call,
                protocol: mapper.info.protocol.clone(),
                address: mapper.info.address.clone(),
                id,
                tell,
            })
        })
    }

    pub(super) fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        let due = |mapper: &Mapper| {
            if mapper.call.is_some() {
                return None;
            }
            let first = match mapper.pending.is_empty() {
                false => Some(now),
                true => mapper.later.first().map(|(at, _)| *at),
            }?;
            Some(mapper.next_try.map_or(first, |at| at.max(first)))
        };
        self.by_protocol.values().filter_map(due).min()
    }
}

impl Mapper {
    fn new(info: Info) -> Self {
        let seed = info
            .protocol
            .bytes()
            .fold(7, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
        Self {
            info,
            knows: BTreeMap::new(),
            pending: BTreeSet::new(),
            later: BTreeSet::new(),
            refusals: BTreeMap::new(),
            call: None,
            unreachable: Backoff::between(RETRY_MIN, RETRY_MAX, seed),
            next_try: None,
        }
    }

    fn look_at_all(&mut self, objects: &Objects) {
        for (id, placed) in &objects.devices {
            if placed.protocol == self.info.protocol {
                self.look_at_device(id);
                if let Some(model) = &placed.model {
                    self.look_at_model(model);
                }
            }
        }
        let known: Vec<Object> = self.knows.keys().cloned().collect();
        for object in known {
            match object {
                Object::Device(id) => self.look_at_device(&id),
                Object::Model(id) => self.look_at_model(&id),
            }
        }
    }

    fn look_at_device(&mut self, id: &Id) {
        self.look_at(Work::RemoveDevice(id.clone()));
        self.look_at(Work::Device(id.clone()));
    }

    fn look_at_model(&mut self, id: &Id) {
        self.look_at(Work::Model(id.clone()));
        self.look_at(Work::RemoveModel(id.clone()));
    }

    /// News of an object end its pause.
    fn look_at(&mut self, work: Work) {
        if self.refusals.remove(&work).is_some() {
            self.later.retain(|(_, waiting)| *waiting != work);
        }
        self.pending.insert(work);
    }

    fn learn(&mut self, of: Object, digest: Option<String>) -> Option<Change> {
        let known = match &digest {
            Some(digest) => self.knows.insert(of.clone(), digest.clone()),
            None => self.knows.remove(&of),
        };
        let protocol = self.info.protocol.clone();
        (known != digest).then_some(Change::Knows { protocol, of, digest })
    }

    /// The next call. What turns out to be as it should is passed over.
    fn next(
        &mut self,
        now: Instant,
        objects: &Objects,
        changes: &mut Vec<Change>,
    ) -> Option<(Work, Id, Tell, String)> {
        if self.call.is_some() || self.next_try.is_some_and(|at| at > now) {
            return None;
        }
        while self.later.first().is_some_and(|(at, _)| *at <= now) {
            let (_, work) = self.later.pop_first().expect("looked at just now");
            self.pending.insert(work);
        }
        let protocol = self.info.protocol.clone();
        while let Some(work) = self.pending.pop_first() {
            let next = match &work {
                Work::RemoveDevice(id) => {
                    let wanted = objects.devices.get(id).is_some_and(|of| of.protocol == protocol);
                    let known = self.knows.contains_key(&Object::Device(id.clone()));
                    (known && !wanted).then(|| (id.clone(), Tell::RemoveDevice, String::new()))
                }
                Work::RemoveModel(id) => {
                    let wanted = objects
                        .devices
                        .values()
                        .any(|of| of.protocol == protocol && of.model.as_ref() == Some(id));
                    let known = self.knows.contains_key(&Object::Model(id.clone()));
                    (known && !wanted).then(|| (id.clone(), Tell::RemoveModel, String::new()))
                }
                Work::Model(id) => objects.model(id, &protocol).and_then(|(model, digest)| {
                    match self.knows.get(&Object::Model(id.clone())) {
                        Some(known) if *known == digest => None,
                        Some(known) if known != DOUBT_NEW => {
                            Some((id.clone(), Tell::UpdateModel(model), digest))
                        }
                        _ => Some((id.clone(), Tell::CreateModel(model), digest)),
                    }
                }),
                Work::Device(id) => objects.device(id, &protocol).and_then(|(device, digest)| {
                    // Without its model the mapper would refuse it; the model comes first, and after a refusal later.
                    let model = objects.devices[id].model.clone()?;
                    let sure = self.knows.get(&Object::Model(model.clone()));
                    if sure.is_none_or(|known| known == DOUBT || known == DOUBT_NEW) {
                        let model = Work::Model(model);
                        let waits = self.later.iter().find(|(_, of)| *of == model);
                        match waits.map(|(at, _)| *at) {
                            Some(at) => drop(self.later.insert((at, work.clone()))),
                            None => self.pending.extend([model, work.clone()]),
                        }
                        return None;
                    }
                    match self.knows.get(&Object::Device(id.clone())) {
                        Some(known) if *known == digest => None,
                        Some(known) if known != DOUBT_NEW => {
                            Some((id.clone(), Tell::UpdateDevice(device), digest))
                        }
                        _ => Some((id.clone(), Tell::RegisterDevice(device), digest)),
                    }
                }),
            };
            if let Some((id, tell, digest)) = next {
                // From the first try on nothing may count on it being there, nor on its not being there: the answer may
                // get lost.
                let doubtful = match tell {
                    Tell::RemoveDevice | Tell::RegisterDevice(_) => {
                        Some(Object::Device(id.clone()))
                    }
                    Tell::CreateModel(_) => Some(Object::Model(id.clone())),
                    _ => None,
                };
                if let Some(object) = doubtful {
                    changes.extend(self.learn(object, Some(DOUBT.into())));
                }
                return Some((work, id, tell, digest));
            }
        }
        None
    }

    fn called(
        &mut self,
        now: Instant,
        work: Work,
        model: Option<Id>,
        digest: String,
        what: &Called,
    ) -> Vec<Change> {
        if let Called::Unreachable(_) = what {
            self.next_try = Some(now + self.unreachable.next_wait().max(RETRY_MIN));
            self.pending.insert(work);
            return Vec::new();
        }
        self.unreachable.reset();
        self.next_try = None;
        let refused = matches!(what, Called::Refused(_));
        let changes = match &work {
            // It does not know it: just what is wanted.
            Work::RemoveDevice(id) => {
                // It may have come back meanwhile.
                self.pending.insert(Work::Device(id.clone()));
                vec![self.learn(Object::Device(id.clone()), None)]
            }
            Work::RemoveModel(id) => {
                self.pending.insert(Work::Model(id.clone()));
                vec![self.learn(Object::Model(id.clone()), None)]
            }
            Work::Model(id) if !refused => {
                vec![self.learn(Object::Model(id.clone()), Some(digest))]
            }
            Work::Device(id) if !refused => {
                vec![self.learn(Object::Device(id.clone()), Some(digest))]
            }
            // It does not know it, or has a bad day: the other way next time.
            Work::Model(id) => vec![self.doubt(Object::Model(id.clone()))],
            // It may also lack the model.
            Work::Device(id) => {
                let model =
                    model.and_then(|model| self.learn(Object::Model(model), Some(DOUBT.into())));
                vec![model, self.doubt(Object::Device(id.clone()))]
            }
        };
        if refused && matches!(work, Work::Model(_) | Work::Device(_)) {
            let seed = self.last_seed();
            let backoff = self
                .refusals
                .entry(work.clone())
                .or_insert_with(|| Backoff::between(RETRY_MIN, RETRY_MAX, seed));
            let wait = backoff.next_wait().max(RETRY_MIN);
            self.later.insert((now + wait, work));
        } else {
            self.refusals.remove(&work);
            // The object may have changed while the call was under way.
            if matches!(work, Work::Model(_) | Work::Device(_)) {
                self.pending.insert(work);
            }
        }
        changes.into_iter().flatten().collect()
    }

    /// A change was refused: it may not know the object. A new one was: it may know it after all.
    fn doubt(&mut self, object: Object) -> Option<Change> {
        let next = match (self.knows.get(&object).map(String::as_str), &object) {
            // A device that it has in an older form would not be taken in the new one as new.
            (Some(known), Object::Device(_)) if ![DOUBT, DOUBT_NEW].contains(&known) => {
                return None;
            }
            (Some(DOUBT_NEW) | None, _) => DOUBT,
            (Some(_), _) => DOUBT_NEW,
        };
        self.learn(object, Some(next.into()))
    }

    fn last_seed(&self) -> u64 {
        self.refusals.len() as u64 + 1
    }
}

/// The same for equal objects in every version of this program: FNV-1a of the JSON, whose keys are in order.
fn digest(object: &Value) -> String {
    let hash = object.to_string().bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("{hash:016x}")
}
