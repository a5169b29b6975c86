//! What a mapper does and when: which device to open, read, write and report at which time.
//!
//! No I/O and no clock: the shell hands in an [`Input`] with the time, drains [`Core::poll_output`],
//! and sleeps until [`Core::poll_timeout`]. Tests are the other caller, in virtual time.
//!
//! A device's driver has one order at a time. A write of a desired value comes before reads; reads
//! that are due together go out together, and so do the reports of one device. Reports of all
//! devices share one [`Budget`], first come first served, so that no device starves; a value that
//! has to wait is replaced by a newer one of the same property.
//!
//! ```text
//!             opened                  order            answer
//! Closed ──► Opening ──► Idle ──────────────► Busy ──────────► Idle
//!   ▲           │ failed                        │ connection lost
//!   └───────────┴──────── backoff 1 s … 60 s ◄──┘
//! ```

mod budget;
mod entry;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use skerry_dmi::v1beta1 as dmi;

use self::budget::Budget;
use self::entry::Entry;
use crate::device::{Device, DeviceId};
use crate::value::{Kind, Value};

/// Most devices that one mapper serves.
pub const DEVICES_MAX: usize = 10_000;
/// Most models that one mapper keeps.
pub const MODELS_MAX: usize = 10_000;
/// First and longest pause before something that failed is tried again.
pub const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Reports that may be under way at once.
pub const REPORTS_MAX: usize = 8;
/// A value that stays the same is reported at least this often, also with `reportOnChange`.
pub const HEARTBEAT: Duration = Duration::from_secs(600);
/// Reads that are due within this time of each other go out together.
const TOGETHER: Duration = Duration::from_millis(5);

/// State of a device, in the words that EdgeCore accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nothing was tried yet.
    Unknown,
    /// Everything asked for was answered.
    Online,
    /// It answers, but not for every property.
    Unhealthy,
    /// It cannot be reached.
    Offline,
}

impl State {
    /// The word on the wire.
    pub fn word(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Online => "online",
            Self::Unhealthy => "unhealthy",
            Self::Offline => "offline",
        }
    }
}

/// Why a driver did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The connection is gone or the device does not answer; it is opened again.
    #[error("{0}")]
    Lost(String),
    /// The device or the settings say no to this one property; the rest is served on.
    #[error("{0}")]
    Refused(String),
}

impl From<crate::settings::SettingError> for DriverError {
    fn from(error: crate::settings::SettingError) -> Self {
        Self::Refused(error.to_string())
    }
}

/// Why EdgeCore did not take a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportFault {
    /// Too many calls; all reports pause.
    Busy,
    /// EdgeCore is away; reports wait for the next registration.
    Away,
    /// It refuses this device's report.
    Refused(String),
}

/// Everything that can happen to a mapper.
#[derive(Debug)]
pub enum Input {
    /// EdgeCore took the registration and named everything there is; what is not named is gone.
    Registered {
        /// All models.
        models: Vec<dmi::DeviceModel>,
        /// All devices of the mapper's protocol.
        devices: Vec<dmi::Device>,
    },
    /// EdgeCore is away; what has to be reported waits.
    EdgeCoreLost,
    /// A model is new or changed.
    PutModel(dmi::DeviceModel),
    /// A model is gone; devices keep what they know of it.
    RemoveModel(DeviceId),
    /// A device is new or changed.
    PutDevice(dmi::Device),
    /// A device is gone.
    RemoveDevice(DeviceId),
    /// A driver was opened or not; on success the properties that it pushes by itself.
    Opened {
        /// Whose.
        device: DeviceId,
        /// Of which [`Output::Open`].
        generation: u64,
        /// What came of it.
        result: Result<BTreeSet<String>, DriverError>,
    },
    /// A read ended.
    Read {
        /// Whose.
        device: DeviceId,
        /// Of which [`Output::Open`].
        generation: u64,
        /// Per property that was asked for.
        values: Vec<(String, Result<Value, DriverError>)>,
    },
    /// A write ended.
    Wrote {
        /// Whose.
        device: DeviceId,
        /// Of which [`Output::Open`].
        generation: u64,
        /// Which property.
        property: String,
        /// The text that was desired when the write began.
        desired: String,
        /// What came of it.
        result: Result<(), DriverError>,
    },
    /// A driver pushed values, lost its device while nothing was asked of it, or heard that it left or came back.
    Pushed {
        /// Whose.
        device: DeviceId,
        /// Of which [`Output::Open`].
        generation: u64,
        /// Newest value per property.
        values: BTreeMap<String, Result<Value, DriverError>>,
        /// Whether the device is there, if it has said so.
        present: Option<bool>,
    },
    /// A report of values ended.
    Reported {
        /// Whose.
        device: DeviceId,
        /// What came of it.
        result: Result<(), ReportFault>,
    },
    /// A report of a state ended.
    StateReported {
        /// Whose.
        device: DeviceId,
        /// What came of it.
        result: Result<(), ReportFault>,
    },
    /// Nothing but the time passed.
    Tick,
}

/// What the shell has to do.
#[derive(Debug, PartialEq)]
pub enum Output {
    /// Open a driver; answer with [`Input::Opened`].
    Open {
        /// All that is known of it.
        device: Arc<Device>,
        /// Counts the drivers of this mapper; answers carry it.
        generation: u64,
    },
    /// Let go of a driver, whatever it is doing.
    Close {
        /// Whose.
        device: DeviceId,
        /// Of which [`Output::Open`].
        generation: u64,
    },
    /// The same driver serves on with other cycles or wishes.
    Change {
        /// All that is known of it now.
        device: Arc<Device>,
        /// Of which [`Output::Open`].
        generation: u64,
    },
    /// Read properties; answer with [`Input::Read`].
    Read {
        /// Whose.
        device: DeviceId,
        /// Of which [`Output::Open`].
        generation: u64,
        /// Their names.
        properties: Vec<String>,
    },
    /// Write a property; answer with [`Input::Wrote`].
    Write {
        /// Whose.
        device: DeviceId,
        /// Of which [`Output::Open`].
        generation: u64,
        /// Its name.
        property: String,
        /// What to write.
        value: Value,
        /// The text that it comes from, for the answer.
        desired: String,
    },
    /// Report values; answer with [`Input::Reported`].
    Report {
        /// Whose.
        device: DeviceId,
        /// All that is due of this device.
        twins: Vec<Sample>,
    },
    /// Report a state; answer with [`Input::StateReported`].
    ReportState {
        /// Whose.
        device: DeviceId,
        /// The state.
        state: State,
    },
    /// Something a person may want to know.
    Note {
        /// Whose.
        device: DeviceId,
        /// What.
        text: String,
    },
}

/// One value on the way to EdgeCore.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Which property.
    pub property: String,
    /// Its type.
    pub kind: Kind,
    /// What was read.
    pub value: Value,
    /// When.
    pub at: Instant,
    /// The desired value that the device has taken; empty if none.
    pub observed_desired: String,
}

/// Numbers for metrics; they only grow, but for `devices` and `online`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Devices served.
    pub devices: usize,
    /// Devices whose state is online.
    pub online: usize,
    /// Values read or pushed.
    pub reads: u64,
    /// Reads that gave no value.
    pub read_errors: u64,
    /// Desired values written.
    pub writes: u64,
    /// Writes that failed.
    pub write_errors: u64,
    /// Values that EdgeCore took.
    pub reported: u64,
    /// Reports that EdgeCore did not take.
    pub report_errors: u64,
    /// Values that a newer one replaced before they were reported.
    pub replaced: u64,
    /// Devices refused because [`DEVICES_MAX`] was reached.
    pub refused: u64,
}

/// One mapper's devices and their schedules.
#[derive(Debug)]
pub struct Core {
    entries: BTreeMap<DeviceId, Entry>,
    models: BTreeMap<DeviceId, dmi::DeviceModel>,
    /// Devices whose model has not come.
    waiting: BTreeMap<DeviceId, dmi::Device>,
    /// When a device has something to do; at most one entry per device.
    wakes: BTreeSet<(Instant, DeviceId)>,
    /// Devices with something to report, in the order in which it became due.
    queue: VecDeque<DeviceId>,
    under_way: usize,
    connected: bool,
    budget: Budget,
    generation: u64,
    outputs: VecDeque<Output>,
    counts: Counts,
}

impl Core {
    /// Makes a mapper without devices that may make `reports_per_second` calls on average.
    pub fn new(reports_per_second: f64, now: Instant) -> Self {
        Self {
            entries: BTreeMap::new(),
            models: BTreeMap::new(),
            waiting: BTreeMap::new(),
            wakes: BTreeSet::new(),
            queue: VecDeque::new(),
            under_way: 0,
            connected: false,
            budget: Budget::new(reports_per_second, now),
            generation: 0,
            outputs: VecDeque::new(),
            counts: Counts::default(),
        }
    }

    /// Takes what happened at `now`, and everything that became due until then.
    pub fn handle(&mut self, input: Input, now: Instant) {
        match input {
            Input::Registered { models, devices } => self.handle_registered(models, devices, now),
            Input::EdgeCoreLost => self.connected = false,
            Input::PutModel(model) => self.put_model(model, now),
            Input::RemoveModel(id) => drop(self.models.remove(&id)),
            Input::PutDevice(device) => self.put_device(device, now),
            Input::RemoveDevice(id) => self.remove_device(&id),
            Input::Opened { device, generation, result } => {
                self.with(&device, generation, now, |entry, _| entry.handle_opened(result, now));
            }
            Input::Read { device, generation, values } => {
                self.with(&device, generation, now, |entry, counts| {
                    entry.handle_values(values, true, now, counts)
                });
            }
            Input::Pushed { device, generation, values, present } => {
                self.with(&device, generation, now, |entry, counts| {
                    let notes = entry.handle_values(values, false, now, counts);
                    entry.handle_presence(present);
                    notes
                });
            }
            Input::Wrote { device, generation, property, desired, result } => {
                self.with(&device, generation, now, |entry, counts| {
                    entry.handle_wrote(&property, &desired, result, now, counts)
                });
            }
            Input::Reported { device, result } => {
                self.handle_answer(&result, now);
                if let Some(entry) = self.entries.get_mut(&device) {
                    entry.handle_reported(result.as_ref(), now, &mut self.counts);
                    self.advance(&device, now);
                }
            }
            Input::StateReported { device, result } => {
                self.handle_answer(&result, now);
                if let Some(entry) = self.entries.get_mut(&device) {
                    entry.handle_state_reported(result.as_ref(), now, &mut self.counts);
                    self.advance(&device, now);
                }
            }
            Input::Tick => {}
        }
        // Each device at most once: what becomes due again at once waits for the next call.
        let due: Vec<_> = self.wakes.iter().take_while(|(due, _)| *due <= now).cloned().collect();
        for (due, id) in due {
            if !self.wakes.remove(&(due, id.clone())) {
                continue;
            }
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.wake = None;
            }
            self.advance(&id, now);
        }
        self.send_reports(now);
    }

    /// Returns what has to be done next, if anything.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Core::handle`] has to be called again at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let wake = self.wakes.first().map(|(due, _)| *due);
        let sendable = self.connected && !self.queue.is_empty() && self.under_way < REPORTS_MAX;
        let report = sendable.then(|| self.budget.next());
        wake.into_iter().chain(report).min()
    }

    /// Numbers for metrics.
    pub fn counts(&self) -> Counts {
        let online = self.entries.values().filter(|entry| entry.state == State::Online).count();
        Counts { devices: self.entries.len() + self.waiting.len(), online, ..self.counts }
    }

    /// A device as it was handed over, with its newest values as status.
    pub fn device(&self, id: &DeviceId) -> Option<dmi::Device> {
        match self.entries.get(id) {
            Some(entry) => Some(entry.message()),
            None => self.waiting.get(id).cloned(),
        }
    }

    /// Whether a model is known.
    pub fn has_model(&self, id: &DeviceId) -> bool {
        self.models.contains_key(id)
    }

    fn handle_registered(
        &mut self,
        models: Vec<dmi::DeviceModel>,
        devices: Vec<dmi::Device>,
        now: Instant,
    ) {
        self.connected = true;
        for model in models {
            self.put_model(model, now);
        }
        let named: BTreeSet<DeviceId> =
            devices.iter().map(|device| DeviceId::new(&device.namespace, &device.name)).collect();
        let known: Vec<DeviceId> =
            self.entries.keys().chain(self.waiting.keys()).cloned().collect();
        for id in known.iter().filter(|id| !named.contains(id)) {
            self.remove_device(id);
        }
        for device in devices {
            self.put_device(device, now);
        }
        // A new EdgeCore may know nothing: everything is told again, newest only.
        let all: Vec<DeviceId> = self.entries.keys().cloned().collect();
        for id in all {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.tell_again(now);
            }
            self.advance(&id, now);
        }
    }

    fn put_model(&mut self, model: dmi::DeviceModel, now: Instant) {
        let id = DeviceId::new(&model.namespace, &model.name);
        if self.models.get(&id) == Some(&model) {
            return;
        }
        if self.models.len() >= MODELS_MAX && !self.models.contains_key(&id) {
            self.note(&id, format!("model left out: more than {MODELS_MAX} models"));
            return;
        }
        self.models.insert(id.clone(), model);
        let of_model = |device: &dmi::Device| model_of(device) == id;
        let waiting: Vec<DeviceId> =
            self.waiting.iter().filter(|(_, d)| of_model(d)).map(|(id, _)| id.clone()).collect();
        let served = self.entries.values().filter(|entry| of_model(&entry.source));
        let mut again: Vec<dmi::Device> = served.map(|entry| entry.source.clone()).collect();
        again.extend(waiting.iter().filter_map(|id| self.waiting.remove(id)));
        for device in again {
            self.put_device(device, now);
        }
    }

    fn put_device(&mut self, source: dmi::Device, now: Instant) {
        let id = DeviceId::new(&source.namespace, &source.name);
        let served = self.entries.contains_key(&id);
        if !served
            && !self.waiting.contains_key(&id)
            && self.entries.len() + self.waiting.len() >= DEVICES_MAX
        {
            self.counts.refused += 1;
            self.note(&id, format!("left out: this mapper serves {DEVICES_MAX} devices already"));
            return;
        }
        let Some(model) = self.models.get(&model_of(&source)) else {
            if !served {
                self.note(&id, format!("waits for its model `{}`", model_of(&source)));
                self.waiting.insert(id, source);
            }
            return;
        };
        self.waiting.remove(&id);
        let device = Arc::new(Device::parse(&source, model));
        let known = self.entries.get(&id).map(|entry| entry.device.clone());
        if known.as_ref().is_none_or(|known| known.notes != device.notes) {
            for text in &device.notes {
                self.outputs.push_back(Output::Note { device: id.clone(), text: text.clone() });
            }
        }
        match self.entries.get_mut(&id) {
            Some(entry) if entry.device == device => entry.source = source,
            Some(entry) if entry.device.same_driver(&device) => {
                let notes = entry.change(source, device.clone(), now);
                let generation = entry.generation;
                let note = |text| Output::Note { device: id.clone(), text };
                self.outputs.extend(notes.into_iter().map(note));
                self.outputs.push_back(Output::Change { device, generation });
            }
            Some(entry) => {
                let generation = entry.generation;
                self.outputs.push_back(Output::Close { device: id.clone(), generation });
                entry.replace(source, device, now);
            }
            None => drop(self.entries.insert(id.clone(), Entry::new(source, device, now))),
        }
        self.advance(&id, now);
    }

    fn remove_device(&mut self, id: &DeviceId) {
        self.waiting.remove(id);
        if let Some(entry) = self.entries.remove(id) {
            if let Some(wake) = entry.wake {
                self.wakes.remove(&(wake, id.clone()));
            }
            self.queue.retain(|queued| queued != id);
            if entry.generation > 0 {
                let generation = entry.generation;
                self.outputs.push_back(Output::Close { device: id.clone(), generation });
            }
        }
    }

    /// Lets a device take an answer, unless the answer is of a driver that was let go.
    fn with(
        &mut self,
        id: &DeviceId,
        generation: u64,
        now: Instant,
        take: impl FnOnce(&mut Entry, &mut Counts) -> Vec<String>,
    ) {
        let Some(entry) = self.entries.get_mut(id).filter(|entry| entry.generation == generation)
        else {
            return;
        };
        for text in take(entry, &mut self.counts) {
            self.outputs.push_back(Output::Note { device: id.clone(), text });
        }
        if entry.lost {
            entry.lost = false;
            self.outputs.push_back(Output::Close { device: id.clone(), generation });
        }
        self.advance(id, now);
    }

    /// Gives a device's driver its next order, queues its reports and sets its wake.
    fn advance(&mut self, id: &DeviceId, now: Instant) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        if let Some(output) = entry.next_order(now, TOGETHER, &mut self.generation) {
            self.outputs.push_back(output);
        }
        if !entry.queued && entry.has_report(now) {
            entry.queued = true;
            self.queue.push_back(id.clone());
        }
        let wake = entry.next_wake();
        if wake != entry.wake {
            if let Some(old) = entry.wake.take() {
                self.wakes.remove(&(old, id.clone()));
            }
            entry.wake = wake;
            self.wakes.extend(wake.map(|wake| (wake, id.clone())));
        }
    }

    fn send_reports(&mut self, now: Instant) {
        while self.connected && self.under_way < REPORTS_MAX && !self.queue.is_empty() {
            if !self.budget.take(now) {
                return;
            }
            let Some(id) = self.queue.pop_front() else { return };
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            entry.queued = false;
            match entry.take_report(now) {
                Some(output) => {
                    self.under_way += 1;
                    self.outputs.push_back(output);
                }
                None => self.budget.give_back(),
            }
            self.advance(&id, now);
        }
    }

    fn handle_answer(&mut self, result: &Result<(), ReportFault>, now: Instant) {
        self.under_way = self.under_way.saturating_sub(1);
        match result {
            Ok(()) => self.budget.handle_taken(),
            Err(ReportFault::Busy) => self.budget.handle_busy(now),
            Err(ReportFault::Away) => self.connected = false,
            Err(ReportFault::Refused(_)) => {}
        }
    }

    fn note(&mut self, device: &DeviceId, text: String) {
        self.outputs.push_back(Output::Note { device: device.clone(), text });
    }
}

/// Name of a device's model; models are in the device's namespace.
fn model_of(device: &dmi::Device) -> DeviceId {
    let name = device.spec.as_ref().map_or("", |spec| &spec.device_model_reference);
    DeviceId::new(&device.namespace, name)
}

/// The pause before try number `tries` (1 is the first repetition).
fn backoff(tries: u32) -> Duration {
    let (first, longest) = BACKOFF;
    first.saturating_mul(1_u32 << tries.saturating_sub(1).min(16)).min(longest)
}

#[cfg(test)]
mod tests;
