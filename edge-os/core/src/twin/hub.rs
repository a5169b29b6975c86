//! What the hub is told of devices, and when.
//!
//! What it should know is in the properties themselves, so nothing waits here but the names of devices: a value that
//! changed a thousand times is told once, as it is at that moment, and an old one can never follow a new one. Per device
//! there is one report per interval, one in flight, and what was not confirmed is told again with growing pauses, as it
//! is then. Before a number is told it is on the disk, so that it cannot be given to another value after a power cut.
//!
//! Callers: [`super::Twin`].

use super::Id;
use crate::backoff::Backoff;
use skerry_protocol::MessageId;
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// Reports in flight at once.
pub const WINDOW: usize = 32;
/// How long an answer may take before the device is told again.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// First and longest pause after a report that was not taken.
const RETRY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// What a report said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Told {
    /// Properties, each with the number of its last change.
    Twins(Vec<(String, u64)>),
    /// The state, with its number.
    State(u64),
}

#[derive(Debug)]
struct Flight {
    id: Id,
    told: Told,
    deadline: Instant,
}

/// When a device may be told.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    /// Not before.
    next: Option<Instant>,
    /// In [`Reports::due`] under this time.
    due: Option<Instant>,
    in_flight: usize,
    backoff: Option<Backoff>,
}

/// The way up.
#[derive(Debug)]
pub(super) struct Reports {
    pub(super) connected: bool,
    /// The hub is ours.
    pub(super) ours: bool,
    /// Number of the connection.
    pub(super) session: u64,
    interval: Duration,
    due: BTreeSet<(Instant, Id)>,
    flights: HashMap<MessageId, Flight>,
    schedules: HashMap<Id, Schedule>,
}

impl Reports {
    pub(super) fn new(interval: Duration) -> Self {
        Self {
            connected: false,
            ours: false,
            session: 0,
            interval,
            due: BTreeSet::new(),
            flights: HashMap::new(),
            schedules: HashMap::new(),
        }
    }

    /// What was in flight is lost.
    pub(super) fn handle_connected(&mut self, ours: bool) {
        (self.connected, self.ours) = (true, ours);
        self.session += 1;
        self.end_flights();
    }

    pub(super) fn handle_disconnected(&mut self) {
        self.connected = false;
        self.end_flights();
        self.due.clear();
        self.schedules.values_mut().for_each(|schedule| schedule.due = None);
    }

    fn end_flights(&mut self) {
        self.flights.clear();
        for schedule in self.schedules.values_mut() {
            schedule.in_flight = 0;
            if schedule.backoff.take().is_some() {
                schedule.next = None;
            }
        }
    }

    /// The device has something to tell; not before `wait`, which is 0 unless more is likely to follow.
    pub(super) fn want(&mut self, now: Instant, id: &Id, wait: Duration) {
        if !self.connected {
            return;
        }
        let schedule = self.schedules.entry(id.clone()).or_default();
        if schedule.in_flight > 0 {
            return; // asked again when that has ended
        }
        let at = schedule.next.map_or(now + wait, |next| next.max(now + wait));
        if schedule.due.is_some_and(|due| due <= at) {
            return;
        }
        if let Some(due) = schedule.due.replace(at) {
            self.due.remove(&(due, id.clone()));
        }
        self.due.insert((at, id.clone()));
    }

    pub(super) fn forget(&mut self, id: &Id) {
        if let Some(schedule) = self.schedules.remove(id)
            && let Some(due) = schedule.due
        {
            self.due.remove(&(due, id.clone()));
        }
        self.flights.retain(|_, flight| flight.id != *id);
    }

    /// A device that may be told now; it is not asked for again before [`Self::sent`] or [`Self::want`].
    pub(super) fn poll(&mut self, now: Instant) -> Option<Id> {
        if !self.connected || self.flights.len() >= WINDOW {
            return None;
        }
        let (at, id) = self.due.first()?.clone();
        if at > now {
            return None;
        }
        self.due.pop_first();
        self.schedules.entry(id.clone()).or_default().due = None;
        Some(id)
    }

    pub(super) fn sent(&mut self, now: Instant, id: &Id, message: MessageId, told: Told) {
        let schedule = self.schedules.entry(id.clone()).or_default();
        schedule.in_flight += 1;
        schedule.next = Some(now + self.interval);
        let deadline = now + ANSWER_TIMEOUT;
        self.flights.insert(message, Flight { id: id.clone(), told, deadline });
    }

    /// The device has more to tell with what was just sent.
    pub(super) fn ready(&mut self, now: Instant, id: &Id) {
        if let Some(schedule) = self.schedules.get_mut(id) {
            schedule.due = Some(now);
            self.due.insert((now, id.clone()));
        }
    }

    /// Whether this state is on its way.
    pub(super) fn is_state_in_flight(&self, id: &Id, edge: u64) -> bool {
        let told = Told::State(edge);
        self.flights.values().any(|flight| flight.id == *id && flight.told == told)
    }

    /// Takes what became of a report. Returns the device and what it was told, if the message was one of these.
    pub(super) fn answered(
        &mut self,
        now: Instant,
        message: &str,
        taken: bool,
    ) -> Option<(Id, Told)> {
        let Flight { id, told, .. } = self.flights.remove(message)?;
        let seed = self.session ^ id.len() as u64;
        let schedule = self.schedules.entry(id.clone()).or_default();
        schedule.in_flight = schedule.in_flight.saturating_sub(1);
        match taken {
            true => schedule.backoff = None,
            false => {
                let backoff = || Backoff::between(RETRY.0, RETRY.1, seed);
                let wait = schedule.backoff.get_or_insert_with(backoff).next_wait().max(RETRY.0);
                schedule.next = schedule.next.max(Some(now + wait));
            }
        }
        Some((id, told))
    }

    /// A report whose answer is overdue.
    pub(super) fn poll_overdue(&mut self, now: Instant) -> Option<(Id, Told)> {
        let (message, _) = self.flights.iter().find(|(_, flight)| flight.deadline <= now)?;
        let message = message.clone();
        self.answered(now, &message, false)
    }

    /// The device may be told again at this moment already.
    pub(super) fn hasten(&mut self, id: &Id, at: Instant) {
        if let Some(schedule) = self.schedules.get_mut(id) {
            schedule.next = schedule.next.min(Some(at));
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        if !self.connected {
            return None;
        }
        let full = self.flights.len() >= WINDOW;
        let due = self.due.first().filter(|_| !full).map(|(at, _)| *at);
        self.flights.values().map(|flight| flight.deadline).chain(due).min()
    }
}
