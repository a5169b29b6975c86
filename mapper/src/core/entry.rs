//! One device in the core: its driver's state, its properties' schedules, what is to be reported.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use skerry_dmi::v1beta1 as dmi;

use super::{Counts, DriverError, HEARTBEAT, Output, ReportFault, Sample, State, backoff};
use crate::device::{Device, Property};
use crate::value::Value;

/// First pause before a refused report of a device is repeated; doubled up to [`REFUSED_MAX`].
const REFUSED: Duration = Duration::from_secs(5);
const REFUSED_MAX: Duration = Duration::from_secs(300);

/// Most values of one report; what is over goes with the next. A Skerry EdgeCore takes 1,000.
const TWINS_MAX: usize = 500;

#[derive(Debug)]
pub(super) struct Entry {
    /// As EdgeCore sent it.
    pub(super) source: dmi::Device,
    pub(super) device: Arc<Device>,
    /// Of the driver that is open or being opened; 0 before the first one.
    pub(super) generation: u64,
    pub(super) state: State,
    pub(super) wake: Option<Instant>,
    pub(super) queued: bool,
    /// The driver has to be let go.
    pub(super) lost: bool,
    link: Link,
    tries: u32,
    /// The device says that it is away; the driver stays, to hear when it is back.
    absent: bool,
    slots: BTreeMap<String, Slot>,
    /// A report of this device is under way, with these properties.
    telling: Option<Vec<String>>,
    state_told: Option<State>,
    state_due: Option<Instant>,
    refusals: u32,
    silent_until: Option<Instant>,
}

#[derive(Debug)]
enum Link {
    Closed { retry: Instant },
    Opening,
    Idle,
    Busy,
}

/// One property's schedule.
#[derive(Debug)]
struct Slot {
    /// `None`: the driver pushes it.
    next_read: Option<Instant>,
    latest: Option<(Value, Instant)>,
    /// The newest value is to be reported, not before this.
    pending: Option<Instant>,
    next_report: Instant,
    told: Option<(Value, Instant)>,
    failed: bool,
    /// The desired text that the device took.
    applied: Option<String>,
    write: Write,
}

#[derive(Debug)]
enum Write {
    None,
    Due { at: Instant, tries: u32 },
}

impl Slot {
    fn new(now: Instant) -> Self {
        Self {
            next_read: Some(now),
            latest: None,
            pending: None,
            next_report: now,
            told: None,
            failed: false,
            applied: None,
            write: Write::None,
        }
    }

    /// Sets the write that the property's desired value asks for; returns why it asks for none.
    fn wish(&mut self, property: &Property, now: Instant) -> Option<String> {
        self.write = Write::None;
        let desired = property.desired.as_ref()?;
        if self.applied.as_ref() == Some(desired) {
            return None;
        }
        let name = &property.name;
        if !property.writable {
            return Some(format!("property `{name}` cannot be written, its desired value is left"));
        }
        match property.desired_value(desired) {
            Ok(_) => {
                self.write = Write::Due { at: now, tries: 0 };
                None
            }
            Err(why) => Some(format!("property `{name}`: desired value is left: {why}")),
        }
    }

    /// Whether a new value has to be told, as the property wants it.
    fn is_news(&self, property: &Property, value: &Value, now: Instant) -> bool {
        let Some((told, at)) = &self.told else { return true };
        if now.saturating_duration_since(*at) >= HEARTBEAT {
            return true;
        }
        match (property.deadband, told.number(), value.number()) {
            (Some(deadband), Some(told), Some(value)) => (told - value).abs() >= deadband,
            _ => !property.on_change || told != value,
        }
    }
}

impl Entry {
    pub(super) fn new(source: dmi::Device, device: Arc<Device>, now: Instant) -> Self {
        let mut entry = Self {
            source,
            device,
            generation: 0,
            state: State::Unknown,
            wake: None,
            queued: false,
            lost: false,
            link: Link::Closed { retry: now },
            tries: 0,
            absent: false,
            slots: BTreeMap::new(),
            telling: None,
            state_told: None,
            state_due: None,
            refusals: 0,
            silent_until: None,
        };
        // What cannot be written is said when the driver is open.
        entry.fill(now);
        entry
    }

    /// Takes another desired value or cycle; the driver stays.
    pub(super) fn change(
        &mut self,
        source: dmi::Device,
        device: Arc<Device>,
        now: Instant,
    ) -> Vec<String> {
        self.source = source;
        self.device = device;
        self.state_due = self.device.state_cycle.map(|cycle| now + cycle);
        self.fill(now)
    }

    /// Takes other settings; a new driver is needed, which is told every desired value.
    pub(super) fn replace(&mut self, source: dmi::Device, device: Arc<Device>, now: Instant) {
        self.source = source;
        self.device = device;
        self.slots.clear();
        self.link = Link::Closed { retry: now };
        self.tries = 0;
        self.fill(now);
    }

    /// Makes the slots those of the device's properties.
    fn fill(&mut self, now: Instant) -> Vec<String> {
        let mut notes = Vec::new();
        let device = self.device.clone();
        self.slots.retain(|name, _| device.property(name).is_some());
        for property in &device.properties {
            let slot = self.slots.entry(property.name.clone()).or_insert_with(|| Slot::new(now));
            if let Some(next) = slot.next_read {
                slot.next_read = Some(next.min(now + property.collect));
            }
            slot.next_report = slot.next_report.min(now + property.report);
            notes.extend(slot.wish(property, now));
        }
        notes
    }

    /// The device as it was sent, with the newest values as status.
    pub(super) fn message(&self) -> dmi::Device {
        let mut message = self.source.clone();
        let twin = |(name, slot): (&String, &Slot)| {
            let (value, _) = slot.latest.as_ref()?;
            let property = |value: String| Some(dmi::TwinProperty { value, ..Default::default() });
            Some(dmi::Twin {
                property_name: name.clone(),
                observed_desired: property(slot.applied.clone().unwrap_or_default()),
                reported: property(value.to_string()),
            })
        };
        message.status.get_or_insert_default().twins = self.slots.iter().filter_map(twin).collect();
        message
    }

    pub(super) fn handle_opened(
        &mut self,
        result: Result<BTreeSet<String>, DriverError>,
        now: Instant,
    ) -> Vec<String> {
        if !matches!(self.link, Link::Opening) {
            return Vec::new();
        }
        match result {
            Ok(pushed) => {
                self.link = Link::Idle;
                self.absent = false;
                for (name, slot) in &mut self.slots {
                    slot.next_read = (!pushed.contains(name)).then_some(now);
                }
                // The first answer decides; a device of which everything is pushed is there once it is open.
                if self.slots.values().all(|slot| slot.next_read.is_none()) {
                    self.tries = 0;
                    self.state = State::Online;
                }
                let device = self.device.clone();
                let wish = |property: &Property| {
                    self.slots.get_mut(&property.name).and_then(|slot| slot.wish(property, now))
                };
                device.properties.iter().filter_map(wish).collect()
            }
            Err(error) => self.close(&error.to_string(), now),
        }
    }

    /// Takes values that were read (`asked`) or pushed.
    pub(super) fn handle_values(
        &mut self,
        values: impl IntoIterator<Item = (String, Result<Value, DriverError>)>,
        asked: bool,
        now: Instant,
        counts: &mut Counts,
    ) -> Vec<String> {
        if asked {
            if !matches!(self.link, Link::Busy) {
                return Vec::new();
            }
            self.link = Link::Idle;
        }
        let device = self.device.clone();
        let mut notes = Vec::new();
        let mut lost = None;
        let mut answered = false;
        for (name, result) in values {
            let (Some(slot), Some(property)) = (self.slots.get_mut(&name), device.property(&name))
            else {
                continue;
            };
            let result = result.and_then(|value| {
                value
                    .into_kind(property.kind)
                    .map_err(|error| DriverError::Refused(error.to_string()))
            });
            match result {
                Ok(value) => {
                    counts.reads += 1;
                    answered = true;
                    if slot.failed {
                        notes.push(format!("property `{name}` can be read again"));
                    }
                    slot.failed = false;
                    if property.to_cloud && slot.is_news(property, &value, now) {
                        counts.replaced += u64::from(slot.pending.is_some());
                        slot.pending = Some(slot.next_report.max(now));
                    }
                    slot.latest = Some((value, now));
                }
                Err(error) => {
                    counts.read_errors += 1;
                    if let DriverError::Lost(why) = error {
                        lost = Some(why);
                        continue;
                    }
                    answered = true;
                    if !slot.failed {
                        notes.push(format!("property `{name}` cannot be read: {error}"));
                    }
                    slot.failed = true;
                }
            }
        }
        if let Some(why) = lost {
            notes.extend(self.close(&why, now));
            self.lost = true;
        } else if answered {
            self.tries = 0;
            self.state = self.state_of_slots();
        }
        notes
    }

    /// Takes what a device said of itself, if it did.
    pub(super) fn handle_presence(&mut self, present: Option<bool>) {
        let Some(present) = present else { return };
        self.absent = !present;
        if matches!(self.link, Link::Idle | Link::Busy) {
            self.state = self.state_of_slots();
        }
    }

    fn state_of_slots(&self) -> State {
        if self.absent {
            return State::Offline;
        }
        let failed = self.slots.values().any(|slot| slot.failed);
        if failed { State::Unhealthy } else { State::Online }
    }

    pub(super) fn handle_wrote(
        &mut self,
        name: &str,
        desired: &str,
        result: Result<(), DriverError>,
        now: Instant,
        counts: &mut Counts,
    ) -> Vec<String> {
        if !matches!(self.link, Link::Busy) {
            return Vec::new();
        }
        self.link = Link::Idle;
        let device = self.device.clone();
        let (Some(slot), Some(property)) = (self.slots.get_mut(name), device.property(name)) else {
            return Vec::new();
        };
        match result {
            Ok(()) => {
                counts.writes += 1;
                slot.applied = Some(desired.to_owned());
                // What the device made of it is read at once, and told even if it is the old value:
                // the report carries the desired value that was taken.
                if slot.next_read.is_some() {
                    slot.next_read = Some(now);
                }
                slot.told = None;
                slot.next_report = now;
                if slot.next_read.is_none() && slot.latest.is_some() && property.to_cloud {
                    slot.pending = Some(now);
                }
                // Something else may have been desired meanwhile.
                slot.wish(property, now).into_iter().collect()
            }
            Err(DriverError::Lost(why)) => {
                counts.write_errors += 1;
                self.lost = true;
                self.close(&why, now)
            }
            Err(DriverError::Refused(why)) => {
                counts.write_errors += 1;
                // A wish that changed meanwhile is due already, with no tries behind it.
                if property.desired.as_deref() == Some(desired)
                    && let Write::Due { at, tries } = &mut slot.write
                {
                    *tries += 1;
                    *at = now + backoff(*tries);
                }
                vec![format!("property `{name}` could not be written, trying again: {why}")]
            }
        }
    }

    pub(super) fn handle_reported(
        &mut self,
        result: Result<&(), &ReportFault>,
        now: Instant,
        counts: &mut Counts,
    ) {
        let names = self.telling.take().unwrap_or_default();
        if result.is_ok() {
            counts.reported += names.len() as u64;
            self.refusals = 0;
            self.silent_until = None;
            return;
        }
        counts.report_errors += 1;
        for name in names {
            if let Some(slot) = self.slots.get_mut(&name) {
                slot.told = None;
                slot.pending = slot.pending.or(Some(now));
            }
        }
        self.handle_refusal(result, now);
    }

    pub(super) fn handle_state_reported(
        &mut self,
        result: Result<&(), &ReportFault>,
        now: Instant,
        counts: &mut Counts,
    ) {
        self.telling = None;
        if result.is_err() {
            counts.report_errors += 1;
            self.state_told = None;
            self.handle_refusal(result, now);
        }
    }

    fn handle_refusal(&mut self, result: Result<&(), &ReportFault>, now: Instant) {
        if let Err(ReportFault::Refused(_)) = result {
            let pause = REFUSED.saturating_mul(1 << self.refusals.min(8)).min(REFUSED_MAX);
            self.refusals += 1;
            self.silent_until = Some(now + pause);
        }
    }

    /// Makes everything that is known due for EdgeCore.
    pub(super) fn tell_again(&mut self, now: Instant) {
        self.state_told = None;
        self.silent_until = None;
        self.refusals = 0;
        let device = self.device.clone();
        for (name, slot) in &mut self.slots {
            slot.told = None;
            if slot.latest.is_some() && device.property(name).is_some_and(|p| p.to_cloud) {
                slot.pending = Some(now);
            }
        }
    }

    /// The driver's next order, if it is free and something is due.
    pub(super) fn next_order(
        &mut self,
        now: Instant,
        together: Duration,
        generation: &mut u64,
    ) -> Option<Output> {
        match self.link {
            Link::Closed { retry } if retry <= now => {
                *generation += 1;
                self.generation = *generation;
                self.link = Link::Opening;
                let device = self.device.clone();
                return Some(Output::Open { device, generation: self.generation });
            }
            Link::Idle => {}
            _ => return None,
        }
        let (device, generation) = (self.device.id.clone(), self.generation);
        for property in &self.device.properties {
            let Some(slot) = self.slots.get(&property.name) else { continue };
            if !matches!(slot.write, Write::Due { at, .. } if at <= now) {
                continue;
            }
            let Some(desired) = property.desired.clone() else { continue };
            let Ok(value) = property.desired_value(&desired) else { continue };
            self.link = Link::Busy;
            let property = property.name.clone();
            return Some(Output::Write { device, generation, property, value, desired });
        }
        let due = |slot: &Slot, by: Instant| slot.next_read.is_some_and(|next| next <= by);
        if !self.slots.values().any(|slot| due(slot, now)) {
            return None;
        }
        let mut properties = Vec::new();
        for property in &self.device.properties {
            let Some(slot) = self.slots.get_mut(&property.name) else { continue };
            if due(slot, now + together) {
                let planned = slot.next_read.unwrap_or(now);
                // Cycles that were missed are not made up for.
                let next = planned + property.collect;
                slot.next_read = Some(if next > now { next } else { now + property.collect });
                properties.push(property.name.clone());
            }
        }
        self.link = Link::Busy;
        Some(Output::Read { device, generation, properties })
    }

    /// Whether something may be told now.
    pub(super) fn has_report(&self, now: Instant) -> bool {
        if self.telling.is_some() || self.silent_until.is_some_and(|until| now < until) {
            return false;
        }
        self.state_is_due(now) || self.slots.values().any(|s| s.pending.is_some_and(|at| at <= now))
    }

    fn state_is_due(&self, now: Instant) -> bool {
        self.state != State::Unknown
            && (self.state_told != Some(self.state) || self.state_due.is_some_and(|due| due <= now))
    }

    /// Takes what is due as one call: the state first, then all values together.
    pub(super) fn take_report(&mut self, now: Instant) -> Option<Output> {
        if !self.has_report(now) {
            return None;
        }
        let device = self.device.id.clone();
        if self.state_is_due(now) {
            self.telling = Some(Vec::new());
            self.state_told = Some(self.state);
            self.state_due = self.device.state_cycle.map(|cycle| now + cycle);
            return Some(Output::ReportState { device, state: self.state });
        }
        let mut twins = Vec::new();
        for property in &self.device.properties {
            let Some(slot) = self.slots.get_mut(&property.name) else { continue };
            if twins.len() == TWINS_MAX {
                break;
            }
            if slot.pending.is_none_or(|at| at > now) {
                continue;
            }
            slot.pending = None;
            let Some((value, at)) = slot.latest.clone() else { continue };
            slot.next_report = now + property.report;
            slot.told = Some((value.clone(), now));
            let observed_desired = slot.applied.clone().unwrap_or_default();
            twins.push(Sample {
                property: property.name.clone(),
                kind: property.kind,
                value,
                at,
                observed_desired,
            });
        }
        self.telling = Some(twins.iter().map(|twin| twin.property.clone()).collect());
        Some(Output::Report { device, twins })
    }

    /// When something of this device becomes due; what waits for an answer is not counted.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        let order = match self.link {
            Link::Closed { retry } => Some(retry),
            Link::Opening | Link::Busy => None,
            Link::Idle => self
                .slots
                .values()
                .flat_map(|slot| {
                    let write = match slot.write {
                        Write::Due { at, .. } => Some(at),
                        Write::None => None,
                    };
                    slot.next_read.into_iter().chain(write)
                })
                .min(),
        };
        let state_due = self.state_due.filter(|_| self.state != State::Unknown);
        let report = if self.queued || self.telling.is_some() {
            None
        } else {
            let due = self.slots.values().filter_map(|slot| slot.pending).chain(state_due).min();
            match (due, self.silent_until) {
                (Some(due), Some(until)) => Some(due.max(until)),
                // A state that was refused waits without a value behind it.
                (None, Some(until)) if self.state_told.is_none() => Some(until),
                (due, _) => due,
            }
        };
        order.into_iter().chain(report).min()
    }

    fn close(&mut self, why: &str, now: Instant) -> Vec<String> {
        self.tries += 1;
        self.link = Link::Closed { retry: now + backoff(self.tries) };
        let first = self.tries == 1;
        self.state = State::Offline;
        if first { vec![format!("cannot be reached, trying again: {why}")] } else { Vec::new() }
    }
}
