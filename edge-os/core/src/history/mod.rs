//! What devices were: samples of properties, thinned as somebody asked, gathered into blocks that go to the disk.
//!
//! ```text
//! report ─► thin (deadband, interval) ─► open block ─► sealed block ─► disk      one row per block
//!                                            └───────► tail ─────────► disk      one row per property, replaced
//! ```
//!
//! A property is kept when the configuration wants all of them, or when the Device or its DeviceModel has the annotation
//! [`ANNOTATION`]; the words of the device count before those of the model, and those before the configuration. A value
//! that is the same as the last one kept is kept again only every [`REPEAT_MS`], so that a line that is straight and one
//! that ended can be told apart.
//!
//! What is not written yet is lost in a power cut: at most [`TAIL_INTERVAL`] of it. Whatever else is lost is counted in
//! [`Lost`], and the count is kept with the blocks.
//!
//! No I/O, no clock. The twin task of the agent is the only caller; `history_store.rs` writes and reads the rows.

mod bits;
pub mod block;
pub mod query;

use crate::twin::Id;
use block::{Sample, Value, differs, same_class};
use serde::{Deserialize, Serialize};
use skerry_protocol::ResourcePath;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Annotation of a Device or DeviceModel: which properties are kept, and how; see [`Wanted`].
pub const ANNOTATION: &str = "fleet.skerry.dev/history";
/// Properties of one node whose history is kept.
pub const SERIES_MAX: usize = 10_000;
/// Longest value that is kept, in bytes.
pub const VALUE_LEN_MAX: usize = 1024;
/// Samples after which a block is sealed.
pub const SEAL_AT: usize = 512;
/// Bytes of samples that are in memory only (12 MiB); then every open block is sealed, and if the disk does not take
/// them, samples are lost and counted.
pub const OPEN_BYTES_MAX: usize = 12 * 1024 * 1024;
/// Time between two writes of what is in open blocks.
pub const TAIL_INTERVAL: Duration = Duration::from_secs(120);
/// Time after which the same value is kept again, in milliseconds.
pub const REPEAT_MS: i64 = 10 * 60 * 1000;
/// Rows written at once.
const WRITES_MAX: usize = 128;
/// Time after which a failed write is tried again.
const RETRY: Duration = Duration::from_secs(10);
/// A clock that is so far behind the last sample was set back; samples of mappers may be ahead by 5 minutes.
const SET_BACK_MS: i64 = 6 * 60 * 1000;
/// Longest annotation that is read, in bytes.
const ANNOTATION_LEN_MAX: usize = 64 * 1024;
const DAY_MS: f64 = 86_400_000.0;
/// Longest time that samples are kept: ten years.
const DAYS_MAX: f64 = 3650.0;
/// Longest interval between samples, in seconds: a day.
const INTERVAL_MAX_S: f64 = 86_400.0;

/// How a property is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Keeping {
    /// Least time between two samples, in milliseconds.
    pub interval_ms: i64,
    /// A number that differs by no more from the last one kept is no other one.
    pub deadband: f64,
    /// Age at which samples go, in milliseconds.
    pub keep_ms: i64,
}

impl Default for Keeping {
    fn default() -> Self {
        Self { interval_ms: 1000, deadband: 0.0, keep_ms: 30 * 86_400_000 }
    }
}

/// What an annotation says of one property; absent fields are as elsewhere.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    /// Least time between two samples, in seconds, up to a day.
    #[serde(default)]
    pub interval: Option<f64>,
    /// See [`Keeping::deadband`].
    #[serde(default)]
    pub deadband: Option<f64>,
    /// Days after which samples go, up to ten years.
    #[serde(default)]
    pub days: Option<f64>,
    /// `false` keeps nothing.
    #[serde(default)]
    pub keep: Option<bool>,
}

/// An annotation: `{"temperature": {"deadband": 0.2, "interval": 5, "days": 90}, "*": {}}`; `*` stands for all others.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wanted(BTreeMap<String, Wish>);

/// Why an annotation is of no use.
#[derive(Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum WantedError {
    /// Not the JSON that it should be.
    #[error(
        "annotation `{ANNOTATION}` is not like `{{\"temperature\": {{\"deadband\": 0.2}}}}`: {0}"
    )]
    Json(String),
    /// A number that makes no sense.
    #[error("annotation `{ANNOTATION}`: `{field}` of `{property}` is out of range")]
    Range {
        /// The property.
        property: String,
        /// The field.
        field: &'static str,
    },
}

impl Wanted {
    /// Reads the annotation.
    ///
    /// # Errors
    ///
    /// [`WantedError`].
    pub fn parse(text: &str) -> Result<Self, WantedError> {
        if text.len() > ANNOTATION_LEN_MAX {
            return Err(WantedError::Json("it is too long".into()));
        }
        let wishes: BTreeMap<String, Wish> =
            serde_json::from_str(text).map_err(|error| WantedError::Json(error.to_string()))?;
        for (property, wish) in &wishes {
            let within =
                |number: Option<f64>, most| number.is_none_or(|n| (0.0..=most).contains(&n));
            for (fits, field) in [
                (within(wish.interval, INTERVAL_MAX_S), "interval"),
                (within(wish.deadband, f64::MAX), "deadband"),
                (within(wish.days, DAYS_MAX), "days"),
            ] {
                if !fits {
                    return Err(WantedError::Range { property: property.clone(), field });
                }
            }
        }
        Ok(Self(wishes))
    }

    fn of(&self, property: &str) -> Option<&Wish> {
        self.0.get(property).or_else(|| self.0.get("*"))
    }
}

/// What was lost since the history began, in samples unless said otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lost {
    /// Older than one that was kept already.
    pub late: u64,
    /// Longer than [`VALUE_LEN_MAX`].
    pub long: u64,
    /// Of properties beyond [`SERIES_MAX`].
    pub many: u64,
    /// The disk did not take them, and memory was full.
    pub unwritten: u64,
    /// The oldest ones, because the history has only so much room on the disk.
    pub room: u64,
    /// In blocks that could not be read.
    pub unreadable: u64,
    /// Ends without a last write, such as power cuts; each may have cost what came in [`TAIL_INTERVAL`].
    pub cuts: u64,
}

impl Lost {
    /// Adds what another count says.
    pub fn add(&mut self, other: &Self) {
        self.late += other.late;
        self.long += other.long;
        self.many += other.many;
        self.unwritten += other.unwritten;
        self.room += other.room;
        self.unreadable += other.unreadable;
        self.cuts += other.cuts;
    }
}

/// A run of samples for the disk.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// `namespace/name` of the device.
    pub device: Id,
    /// The property.
    pub property: Arc<str>,
    /// One class, rising times, at most [`SEAL_AT`].
    pub samples: Arc<[Sample]>,
    /// Age at which they go, in milliseconds.
    pub keep_ms: i64,
    /// More samples may follow: the next run of this property replaces it. Else it stays.
    pub is_tail: bool,
}

/// What is to be written in one transaction.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Changes {
    /// In this order.
    pub runs: Vec<Run>,
    /// To be added to what is there.
    pub lost: Lost,
}

impl Changes {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty() && self.lost == Lost::default()
    }
}

#[derive(Debug)]
struct Series {
    keeping: Option<Keeping>,
    /// The last one that was kept.
    last: Option<Sample>,
    /// One that came too soon after that; kept if nothing follows.
    held: Option<Sample>,
    open: Vec<Sample>,
    /// Samples in `open` that no write has had.
    unwritten: usize,
    /// In [`History::tails`] under this time.
    due: Option<Instant>,
}

#[derive(Debug)]
struct Placed {
    own: Wanted,
    model: Option<Id>,
}

/// The history of the devices of one node.
#[derive(Debug)]
pub struct History {
    /// For all properties, also those that nobody named.
    all: bool,
    defaults: Keeping,
    devices: BTreeMap<Id, Placed>,
    models: BTreeMap<Id, Wanted>,
    series: BTreeMap<Id, BTreeMap<Arc<str>, Series>>,
    count: usize,
    /// Samples in `open` and `sealed`, as bytes.
    bytes: usize,
    /// Wait for the disk, oldest first.
    sealed: VecDeque<Run>,
    /// What the last [`Self::take_changes`] returned.
    writing: Option<Changes>,
    lost: Lost,
    /// Properties whose open block is due.
    tails: BTreeSet<(Instant, Id, Arc<str>)>,
    retry_at: Option<Instant>,
}

impl History {
    /// Nothing is kept yet. With `all`, every property is; else those that an annotation names.
    pub fn new(all: bool, defaults: Keeping) -> Self {
        Self {
            all,
            defaults,
            devices: BTreeMap::new(),
            models: BTreeMap::new(),
            series: BTreeMap::new(),
            count: 0,
            bytes: 0,
            sealed: VecDeque::new(),
            writing: None,
            lost: Lost::default(),
            tails: BTreeSet::new(),
            retry_at: None,
        }
    }

    /// The node has this object, in this form.
    ///
    /// # Errors
    ///
    /// [`WantedError`] when its annotation is of no use; it then counts as absent.
    pub fn handle_object(
        &mut self,
        path: &ResourcePath,
        object: &serde_json::Value,
    ) -> Result<(), WantedError> {
        let Some(name) = path.name() else { return Ok(()) };
        let id = Id::from(format!("{}/{name}", path.namespace()));
        let text = object["metadata"]["annotations"][ANNOTATION].as_str();
        let (wanted, fault) = match text.map(Wanted::parse) {
            None => (Wanted::default(), None),
            Some(Ok(wanted)) => (wanted, None),
            Some(Err(fault)) => (Wanted::default(), Some(fault)),
        };
        match path.kind() {
            "devicemodel" => {
                self.models.insert(id, wanted);
                self.plan_again(None);
            }
            "device" => {
                let model = object["spec"]["deviceModelRef"]["name"].as_str();
                let model = model.map(|name| Id::from(format!("{}/{name}", path.namespace())));
                self.devices.insert(id.clone(), Placed { own: wanted, model });
                self.plan_again(Some(&id));
            }
            _ => {}
        }
        fault.map_or(Ok(()), Err)
    }

    /// The node has this object no more. What was kept of a device stays until it is old.
    pub fn handle_gone(&mut self, path: &ResourcePath) {
        let Some(name) = path.name() else { return };
        let id = Id::from(format!("{}/{name}", path.namespace()));
        match path.kind() {
            "devicemodel" if self.models.remove(&id).is_some() => self.plan_again(None),
            "device" if self.devices.remove(&id).is_some() => {
                let properties = self.series.remove(&id).unwrap_or_default();
                self.count -= properties.len();
                for (property, mut series) in properties {
                    let keep_ms = series.keeping.unwrap_or(self.defaults).keep_ms;
                    self.sealed.extend(series.seal(&id, &property, keep_ms));
                }
            }
            _ => {}
        }
    }

    /// Whether anything is kept of any device: if not, nobody needs to report.
    pub fn is_wanted(&self) -> bool {
        self.all
            || self.devices.values().any(|device| !device.own.0.is_empty())
            || self.models.values().any(|model| !model.0.is_empty())
    }

    /// A property of a device was `text` at `at_ms`; all times are Unix milliseconds.
    pub fn report(
        &mut self,
        now_mono: Instant,
        now_ms: i64,
        id: &Id,
        property: &str,
        text: &str,
        at_ms: i64,
    ) {
        let known = self.series.get(id).is_some_and(|properties| properties.contains_key(property));
        if !known {
            let keeping = self.keeping(id, property);
            if keeping.is_some() && self.count >= SERIES_MAX {
                self.lost.many += 1;
                return;
            }
            if keeping.is_none() {
                return;
            }
            let series = Series {
                keeping,
                last: None,
                held: None,
                open: Vec::new(),
                unwritten: 0,
                due: None,
            };
            self.series.entry(id.clone()).or_default().insert(property.into(), series);
            self.count += 1;
        }
        let properties = self.series.get_mut(id).expect("made just now");
        let (name, _) = properties.get_key_value(property).expect("made just now");
        let name = name.clone();
        let series = properties.get_mut(property).expect("made just now");
        let Some(keeping) = series.keeping else { return };
        if text.len() > VALUE_LEN_MAX {
            self.lost.long += 1;
            return;
        }
        let sample = Sample { at_ms, value: Value::of(text) };
        let is_settled =
            |held: &mut Sample| at_ms.saturating_sub(held.at_ms) >= keeping.interval_ms.max(1);
        if let Some(held) = series.held.take_if(is_settled) {
            self.push(now_mono, id, &name, held);
        }
        let Some(series) = self.series.get_mut(id).and_then(|all| all.get_mut(&name)) else {
            return;
        };
        if let Some(last) = &series.last {
            let other = differs(&last.value, &sample.value, keeping.deadband);
            if at_ms <= last.at_ms {
                if now_ms + SET_BACK_MS < last.at_ms {
                    // The clock was set back: a new block, which queries put into order.
                    self.sealed.extend(series.seal(id, &name, keeping.keep_ms));
                    (series.last, series.held) = (None, None);
                } else {
                    self.lost.late += u64::from(other);
                    return;
                }
            } else if !other && at_ms - last.at_ms < REPEAT_MS {
                // Back at the last one kept: what came in between was too short.
                series.held = None;
                return;
            } else if at_ms - last.at_ms < keeping.interval_ms {
                if series.held.as_ref().is_none_or(|held| held.at_ms < at_ms) {
                    series.held = Some(sample);
                    if series.due.is_none() {
                        series.due = Some(now_mono + TAIL_INTERVAL);
                        self.tails.insert((now_mono + TAIL_INTERVAL, id.clone(), name));
                    }
                }
                return;
            }
        }
        series.held = None;
        self.push(now_mono, id, &name, sample);
    }

    fn push(&mut self, now: Instant, id: &Id, name: &Arc<str>, sample: Sample) {
        let Some(series) = self.series.get_mut(id).and_then(|all| all.get_mut(name)) else {
            return;
        };
        let keep_ms = series.keeping.unwrap_or(self.defaults).keep_ms;
        if series.open.last().is_some_and(|last| !same_class(&last.value, &sample.value)) {
            self.sealed.extend(series.seal(id, name, keep_ms));
        }
        self.bytes += size(&sample);
        series.last = Some(sample.clone());
        series.open.push(sample);
        series.unwritten += 1;
        if series.due.is_none() {
            series.due = Some(now + TAIL_INTERVAL);
            self.tails.insert((now + TAIL_INTERVAL, id.clone(), name.clone()));
        }
        if series.open.len() >= SEAL_AT {
            self.sealed.extend(series.seal(id, name, keep_ms));
        }
        if self.bytes > OPEN_BYTES_MAX {
            self.seal_all();
        }
        while self.bytes > OPEN_BYTES_MAX * 2
            && let Some(run) = self.sealed.pop_front()
        {
            // The disk takes nothing.
            self.bytes -= run.samples.iter().map(size).sum::<usize>();
            self.lost.unwritten += run.samples.len() as u64;
        }
    }

    fn seal_all(&mut self) {
        for (id, properties) in &mut self.series {
            for (name, series) in properties {
                let keep_ms = series.keeping.unwrap_or(self.defaults).keep_ms;
                self.sealed.extend(series.seal(id, name, keep_ms));
            }
        }
    }

    /// Returns what is to be written now, in one transaction; then [`Self::handle_stored`]. With `all` everything that is
    /// not written yet.
    pub fn take_changes(&mut self, now: Instant, now_ms: i64, all: bool) -> Changes {
        if self.writing.is_some() || (!all && self.retry_at.is_some_and(|at| at > now)) {
            return Changes::default();
        }
        self.retry_at = None;
        if all {
            self.settle_all(now);
        }
        let count = if all { self.sealed.len() } else { self.sealed.len().min(WRITES_MAX) };
        let mut runs: Vec<Run> = self.sealed.drain(..count).collect();
        while (all || runs.len() < WRITES_MAX)
            && self.tails.first().is_some_and(|(at, ..)| all || *at <= now)
        {
            let Some((_, id, name)) = self.tails.pop_first() else { break };
            self.settle(now, now_ms, &id, &name);
            let Some(series) = self.series.get_mut(&id).and_then(|all| all.get_mut(&name)) else {
                continue;
            };
            if series.unwritten == 0 || series.open.is_empty() {
                series.unwritten = 0;
                continue; // sealed meanwhile
            }
            series.unwritten = 0;
            let keep_ms = series.keeping.unwrap_or(self.defaults).keep_ms;
            let samples = series.open.as_slice().into();
            runs.push(Run { device: id, property: name, samples, keep_ms, is_tail: true });
        }
        let changes = Changes { runs, lost: std::mem::take(&mut self.lost) };
        if !changes.is_empty() {
            self.writing = Some(changes.clone());
        }
        changes
    }

    /// Takes whether the changes of the last [`Self::take_changes`] are on the disk. If not they are offered again.
    pub fn handle_stored(&mut self, now: Instant, stored: bool) {
        let Some(Changes { runs, lost }) = self.writing.take() else { return };
        if stored {
            let written = runs.iter().filter(|run| !run.is_tail);
            self.bytes -= written.flat_map(|run| run.samples.iter()).map(size).sum::<usize>();
            return;
        }
        self.lost.add(&lost);
        self.retry_at = Some(now + RETRY);
        for run in runs.into_iter().rev() {
            if !run.is_tail {
                self.sealed.push_front(run);
            } else if let Some(series) =
                self.series.get_mut(&run.device).and_then(|all| all.get_mut(&run.property))
                && series.unwritten == 0
                && !series.open.is_empty()
            {
                series.unwritten = 1;
                if series.due.is_none() {
                    series.due = Some(now + RETRY);
                    self.tails.insert((now + RETRY, run.device, run.property));
                }
            }
        }
    }

    /// When to poll again, if nothing else happens.
    pub fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        if self.writing.is_some() {
            return None;
        }
        let tail = self.tails.first().map(|(at, ..)| *at);
        let sealed = (!self.sealed.is_empty()).then_some(now);
        let due = [tail, sealed].into_iter().flatten().min()?;
        Some(self.retry_at.map_or(due, |retry| retry.max(due)))
    }

    /// Everything of a property that is not on the disk for good yet, in the order in which it came.
    pub fn recent(&self, id: &str, property: &str) -> Vec<Vec<Sample>> {
        let writing = self.writing.iter().flat_map(|changes| &changes.runs);
        let waiting = writing.filter(|run| !run.is_tail).chain(&self.sealed);
        let of = |run: &&Run| &*run.device == id && &*run.property == property;
        let mut runs: Vec<Vec<Sample>> =
            waiting.filter(of).map(|run| run.samples.to_vec()).collect();
        if let Some(series) = self.series.get(id).and_then(|all| all.get(property)) {
            let mut open = series.open.clone();
            let held = series.held.clone().into_iter();
            let class = |held: &Sample| open.last().is_none_or(|last| last.at_ms < held.at_ms);
            let held: Vec<_> = held.filter(class).collect();
            open.extend(held);
            runs.push(open);
        }
        runs.retain(|run| !run.is_empty());
        runs
    }

    /// What was held back is the last word when nothing has followed for as long as the interval.
    fn settle(&mut self, now: Instant, now_ms: i64, id: &Id, name: &Arc<str>) {
        let Some(series) = self.series.get_mut(id).and_then(|all| all.get_mut(name)) else {
            return;
        };
        series.due = None;
        let interval_ms = series.keeping.unwrap_or(self.defaults).interval_ms;
        let is_old = |held: &mut Sample| held.at_ms.saturating_add(interval_ms) <= now_ms;
        if let Some(held) = series.held.take_if(is_old) {
            self.push(now, id, name, held);
            if let Some(series) = self.series.get_mut(id).and_then(|all| all.get_mut(name))
                && let Some(due) = series.due.take()
            {
                self.tails.remove(&(due, id.clone(), name.clone()));
            }
        } else if series.held.is_some() {
            series.due = Some(now + TAIL_INTERVAL);
            self.tails.insert((now + TAIL_INTERVAL, id.clone(), name.clone()));
        }
    }

    /// Nothing follows any more.
    fn settle_all(&mut self, now: Instant) {
        let held: Vec<(Id, Arc<str>, Sample)> = self
            .series
            .iter_mut()
            .flat_map(|(id, all)| all.iter_mut().map(move |(name, series)| (id, name, series)))
            .filter_map(|(id, name, series)| Some((id.clone(), name.clone(), series.held.take()?)))
            .collect();
        for (id, name, sample) in held {
            self.push(now, &id, &name, sample);
        }
    }

    fn plan_again(&mut self, of: Option<&Id>) {
        let ids: Vec<Id> =
            self.series.keys().filter(|id| of.is_none_or(|of| of == *id)).cloned().collect();
        for id in ids {
            let names: Vec<Arc<str>> = self.series[&id].keys().cloned().collect();
            for name in names {
                let keeping = self.keeping(&id, &name);
                let series = self.series.get_mut(&id).and_then(|all| all.get_mut(&name));
                series.expect("listed just now").keeping = keeping;
            }
        }
    }

    fn keeping(&self, id: &Id, property: &str) -> Option<Keeping> {
        let device = self.devices.get(id);
        let model = device.and_then(|device| self.models.get(device.model.as_ref()?));
        let model = model.and_then(|model| model.of(property));
        let own = device.and_then(|device| device.own.of(property));
        let first = |of: fn(&Wish) -> Option<f64>| own.and_then(of).or_else(|| model.and_then(of));
        let named = own.is_some() || model.is_some();
        let keep = own.and_then(|wish| wish.keep).or_else(|| model.and_then(|wish| wish.keep));
        #[allow(clippy::cast_possible_truncation)] // the ranges were checked
        keep.unwrap_or(self.all || named).then(|| Keeping {
            interval_ms: first(|wish| wish.interval)
                .map_or(self.defaults.interval_ms, |seconds| (seconds * 1000.0) as i64),
            deadband: first(|wish| wish.deadband).unwrap_or(self.defaults.deadband),
            keep_ms: first(|wish| wish.days)
                .map_or(self.defaults.keep_ms, |days| (days * DAY_MS) as i64),
        })
    }
}

impl Series {
    fn seal(&mut self, id: &Id, name: &Arc<str>, keep_ms: i64) -> Option<Run> {
        self.unwritten = 0;
        if self.open.is_empty() {
            return None;
        }
        let samples = std::mem::take(&mut self.open).into();
        Some(Run { device: id.clone(), property: name.clone(), samples, keep_ms, is_tail: false })
    }
}

fn size(sample: &Sample) -> usize {
    size_of::<Sample>()
        + match &sample.value {
            Value::Number(_) => 0,
            Value::Text(text) => text.len() + 16,
        }
}

#[cfg(test)]
mod tests;
