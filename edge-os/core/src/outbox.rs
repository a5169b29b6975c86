//! What this node owes the cluster and must still owe after a power cut.
//!
//! A row is durable before its message may be sent, and is forgotten when the hub has answered it, or, with a hub that
//! answers nothing, when it was written to the socket. What can be told again from the machine itself has no row: the
//! node's status, and the status of every pod whose object is still stored here. The last status of a pod that is
//! gone cannot, so it has one.
//!
//! States of a row: waiting for the disk -> waiting for the link -> in flight -> (answer) gone, or, when the cluster
//! could not take it now or the link was lost, waiting for the link again. A put with the key of a row replaces it;
//! the answer to the older content then leaves the newer in place.
//!
//! Rows about the same resource leave one at a time and in order. Removals are written with the next put, or after
//! [`REMOVE_DELAY`]: a row that comes back after a power cut in between is sent once more, which the cluster takes as
//! what it has already.
//!
//! No I/O: the owner writes what [`Outbox::take_changes`] returns in one transaction and says how that went. The
//! uplink is the only caller; `outbox/tests.rs` is the model that this is checked against.

use crate::backoff::Backoff;
use skerry_protocol::{MessageId, Operation};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Events kept; days of a node whose pods crash.
pub const EVENTS_MAX: usize = 10_000;
/// Bytes of events kept (8 MiB).
pub const EVENT_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Rows in flight at once: enough to empty a long queue over a slow link.
pub const WINDOW: usize = 64;
/// How long an answer may take before the row is sent again.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time that a removal waits for a put that it can be written with.
pub const REMOVE_DELAY: Duration = Duration::from_secs(5);
/// Removals that may wait; then they are written at once.
const REMOVES_MAX: usize = 256;
/// Time after which a failed write is tried again.
const STORE_RETRY: Duration = Duration::from_secs(10);
/// Bodies kept in memory beside the database, in bytes; the usual row is sent right after it was stored.
const BODIES_MAX: usize = 64 * 1024;

/// What a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Sent in order; the oldest are dropped over [`EVENTS_MAX`] and [`EVENT_BYTES_MAX`].
    Event,
    /// Sent in order, never dropped.
    Effect,
    /// Kept for its owner, who reads it after a restart; not sent from here, never dropped.
    Note,
}

impl Kind {
    /// The kind as the database has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Effect => "effect",
            Self::Note => "note",
        }
    }

    /// The kind with this name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Event, Self::Effect, Self::Note].into_iter().find(|kind| kind.as_str() == name)
    }
}

/// Something to be kept until it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// A later item with the same key replaces this one.
    pub key: String,
    /// What it is.
    pub kind: Kind,
    /// `route.operation` of its message.
    pub operation: Operation,
    /// `route.resource` of its message.
    pub resource: String,
    /// JSON of the message's content.
    pub content: Arc<str>,
}

/// A row as the database returns it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Number; rows leave in this order.
    pub seq: u64,
    /// See [`Item::key`].
    pub key: String,
    /// See [`Item::kind`].
    pub kind: Kind,
    /// See [`Item::operation`].
    pub operation: Operation,
    /// See [`Item::resource`].
    pub resource: String,
    /// Length of the content, in bytes.
    pub len: usize,
}

/// A change for the database. All changes of one [`Outbox::take_changes`] belong into one transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Insert the row, or replace the one with this number.
    Put {
        /// Number of the row.
        seq: u64,
        /// What it holds.
        item: Item,
    },
    /// Delete the row.
    Remove {
        /// Number of the row.
        seq: u64,
    },
}

/// What became of a row that was in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The cluster has it.
    Taken,
    /// The cluster will never take it.
    Refused,
    /// The cluster could not now.
    Later,
}

/// A row that may be sent now.
#[derive(Debug, PartialEq, Eq)]
pub struct Due {
    /// For [`Outbox::sent`].
    pub seq: u64,
    /// See [`Item::operation`].
    pub operation: Operation,
    /// See [`Item::resource`].
    pub resource: String,
    /// See [`Item::content`].
    pub content: Arc<str>,
}

#[derive(Debug)]
struct Entry {
    key: Arc<str>,
    kind: Kind,
    operation: Operation,
    resource: String,
    len: usize,
    /// Present until stored, and for a while after.
    body: Option<Arc<str>>,
    /// This content is on the disk, or the disk does not take it: it may be sent.
    settled: bool,
    /// Some content of this row may be on the disk.
    on_disk: bool,
    flight: Option<Flight>,
    /// Replaced since it was sent.
    stale: bool,
    next_try: Option<Instant>,
}

#[derive(Debug)]
struct Flight {
    id: MessageId,
    deadline: Instant,
}

/// The outbox of one node.
#[derive(Debug)]
pub struct Outbox {
    entries: BTreeMap<u64, Entry>,
    by_key: HashMap<Arc<str>, u64>,
    in_flight: HashMap<MessageId, u64>,
    last_seq: u64,
    events: usize,
    event_bytes: usize,
    body_bytes: usize,
    dropped: u64,
    /// Rows to put, not yet on the disk.
    puts: BTreeSet<u64>,
    /// Rows to remove that are on the disk.
    removes: BTreeSet<u64>,
    remove_at: Option<Instant>,
    store_at: Option<Instant>,
    /// What the last [`Self::take_changes`] returned, until it is said how that went.
    writing: Option<(Vec<u64>, Vec<u64>)>,
    backoff: Backoff,
}

impl Outbox {
    /// Takes the rows of the database, oldest first; `seed` decides the jitter of retries.
    pub fn restore(rows: impl IntoIterator<Item = Row>, seed: u64) -> Self {
        let mut outbox = Self {
            entries: BTreeMap::new(),
            by_key: HashMap::new(),
            in_flight: HashMap::new(),
            last_seq: 0,
            events: 0,
            event_bytes: 0,
            body_bytes: 0,
            dropped: 0,
            puts: BTreeSet::new(),
            removes: BTreeSet::new(),
            remove_at: None,
            store_at: None,
            writing: None,
            backoff: Backoff::new(seed),
        };
        for row in rows {
            let key: Arc<str> = row.key.into();
            outbox.last_seq = outbox.last_seq.max(row.seq);
            outbox.by_key.insert(key.clone(), row.seq);
            if row.kind == Kind::Event {
                outbox.events += 1;
                outbox.event_bytes += row.len;
            }
            let entry = Entry {
                key,
                kind: row.kind,
                operation: row.operation,
                resource: row.resource,
                len: row.len,
                body: None,
                settled: true,
                on_disk: true,
                flight: None,
                stale: false,
                next_try: None,
            };
            outbox.entries.insert(row.seq, entry);
        }
        outbox
    }

    /// Rows, notes included.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is owed.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the row with this key is on its way.
    pub fn is_in_flight(&self, key: &str) -> bool {
        self.by_key.get(key).is_some_and(|seq| self.entries[seq].flight.is_some())
    }

    /// Whether a row with this key is here.
    pub fn contains(&self, key: &str) -> bool {
        self.by_key.contains_key(key)
    }

    /// Takes an item, in place of the row with the same key if there is one.
    pub fn put(&mut self, item: Item) {
        let len = item.content.len();
        let seq = match self.by_key.get(item.key.as_str()) {
            Some(seq) => *seq,
            None => {
                self.last_seq += 1;
                self.last_seq
            }
        };
        let old = self.entries.remove(&seq);
        if let Some(old) = &old {
            self.forget_sizes(old);
        }
        let (flight, next_try, on_disk) =
            old.map_or((None, None, false), |old| (old.flight, old.next_try, old.on_disk));
        let key: Arc<str> = item.key.into();
        if item.kind == Kind::Event {
            self.events += 1;
            self.event_bytes += len;
        }
        self.body_bytes += len;
        let entry = Entry {
            key: key.clone(),
            kind: item.kind,
            operation: item.operation,
            resource: item.resource,
            len,
            body: Some(item.content),
            settled: false,
            on_disk,
            stale: flight.is_some(),
            flight,
            next_try,
        };
        self.by_key.insert(key, seq);
        self.entries.insert(seq, entry);
        self.puts.insert(seq);
        self.removes.remove(&seq);
        self.enforce_bounds();
    }

    /// Forgets the row with this key; nothing happens when there is none.
    pub fn remove(&mut self, now: Instant, key: &str) {
        if let Some(seq) = self.by_key.get(key).copied() {
            self.forget(now, seq);
        }
    }

    /// The link is new: what was on the way counts as lost.
    pub fn handle_connected(&mut self) {
        self.in_flight.clear();
        for entry in self.entries.values_mut() {
            entry.flight = None;
            entry.stale = false;
            entry.next_try = None;
        }
        self.backoff.reset();
    }

    /// Returns the next row to send, if one may be sent at `now`; the caller sends it and calls [`Self::sent`].
    /// `read` returns the content of a row from the database; a row that cannot be read is dropped and counted.
    pub fn poll_transmit(
        &mut self,
        now: Instant,
        mut read: impl FnMut(u64) -> Option<Arc<str>>,
    ) -> Option<Due> {
        if self.entries.is_empty() {
            return None;
        }
        self.expire(now);
        loop {
            let seq = self.next_sendable(now)?;
            let entry = &self.entries[&seq];
            let Some(content) = entry.body.clone().or_else(|| read(seq)) else {
                self.drop_row(now, seq);
                continue;
            };
            return Some(Due {
                seq,
                operation: entry.operation,
                resource: entry.resource.clone(),
                content,
            });
        }
    }

    /// Drops a row that cannot be used, and counts it.
    pub fn drop_row(&mut self, now: Instant, seq: u64) {
        self.dropped += 1;
        self.forget(now, seq);
    }

    /// The row is on its way as message `id`.
    pub fn sent(&mut self, seq: u64, id: MessageId, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&seq) {
            self.in_flight.insert(id.clone(), seq);
            entry.flight = Some(Flight { id, deadline: now + ANSWER_TIMEOUT });
            entry.stale = false;
        }
    }

    /// Takes what became of message `id`. Returns the key of the row if the message was one of these; a late answer
    /// changes nothing.
    pub fn handle_answer(&mut self, now: Instant, id: &str, verdict: Verdict) -> Option<String> {
        let seq = self.in_flight.remove(id)?;
        let entry = self.entries.get_mut(&seq)?;
        let key = entry.key.to_string();
        entry.flight = None;
        match verdict {
            Verdict::Later => {
                entry.stale = false;
                entry.next_try = Some(now + self.backoff.next_wait());
            }
            Verdict::Taken | Verdict::Refused => {
                self.backoff.reset();
                if !std::mem::take(&mut entry.stale) {
                    self.forget(now, seq);
                }
            }
        }
        Some(key)
    }

    /// Whether message `id` is a row in flight.
    pub fn is_mine(&self, id: &str) -> bool {
        self.in_flight.contains_key(id)
    }

    /// Returns what is to be written now, in one transaction; empty when nothing is. The caller says how it went with
    /// [`Self::handle_stored`] before it asks again.
    pub fn take_changes(&mut self, now: Instant) -> Vec<Change> {
        let removes_due =
            self.removes.len() >= REMOVES_MAX || self.remove_at.is_some_and(|at| at <= now);
        if self.writing.is_some()
            || self.store_at.is_some_and(|at| at > now)
            || (self.puts.is_empty() && !removes_due)
        {
            return Vec::new();
        }
        let mut changes = Vec::with_capacity(self.puts.len() + self.removes.len());
        changes.extend(self.removes.iter().map(|seq| Change::Remove { seq: *seq }));
        for seq in &self.puts {
            let entry = &self.entries[seq];
            let item = Item {
                key: entry.key.to_string(),
                kind: entry.kind,
                operation: entry.operation,
                resource: entry.resource.clone(),
                content: entry.body.clone().expect("kept until it is stored"),
            };
            changes.push(Change::Put { seq: *seq, item });
        }
        let puts = std::mem::take(&mut self.puts).into_iter().collect();
        let removes = std::mem::take(&mut self.removes).into_iter().collect();
        self.writing = Some((puts, removes));
        self.remove_at = None;
        self.store_at = None;
        changes
    }

    /// Takes whether the changes of the last [`Self::take_changes`] are on the disk. If not, they are offered again
    /// after a while, and their rows may be sent meanwhile: the link may well work while the disk does not.
    pub fn handle_stored(&mut self, now: Instant, stored: bool) {
        let Some((puts, removes)) = self.writing.take() else { return };
        for seq in puts {
            // Removed while it was written: the removal is planned already.
            let Some(entry) = self.entries.get_mut(&seq) else { continue };
            if self.puts.contains(&seq) {
                entry.on_disk = true; // replaced while it was written
                continue;
            }
            entry.settled = true;
            entry.on_disk = true; // a failed transaction may have got there all the same
            if !stored {
                self.puts.insert(seq);
            } else if (entry.kind == Kind::Note || self.body_bytes > BODIES_MAX)
                && entry.body.take().is_some()
            {
                self.body_bytes -= entry.len;
            }
        }
        if !stored {
            self.removes.extend(removes);
            self.store_at = Some(now + STORE_RETRY);
            self.remove_at = self.remove_at.or((!self.removes.is_empty()).then_some(now));
        }
    }

    /// When to ask again, if nothing else happens. `connected` is whether rows can be sent.
    pub fn poll_timeout(&self, now: Instant, connected: bool) -> Option<Instant> {
        let write = match (self.puts.is_empty(), self.remove_at) {
            (false, _) => Some(self.store_at.unwrap_or(now)),
            (true, Some(at)) => Some(self.store_at.map_or(at, |store| store.max(at))),
            (true, None) => None,
        };
        let send = match connected {
            true => {
                let deadlines = self
                    .in_flight
                    .values()
                    .filter_map(|seq| Some(self.entries.get(seq)?.flight.as_ref()?.deadline));
                let ready = self.next_sendable(now).map(|_| now);
                let retries = self.entries.values().take(WINDOW).filter_map(|entry| entry.next_try);
                deadlines.chain(retries.filter(|at| *at > now)).chain(ready).min()
            }
            false => None,
        };
        write.into_iter().chain(send).min()
    }

    /// Returns how many rows were dropped since the last call.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    /// The oldest row that may be sent; looks at no more rows than the window has, however long the queue is.
    fn next_sendable(&self, now: Instant) -> Option<u64> {
        let mut busy: Vec<&str> = Vec::new();
        for (seq, entry) in &self.entries {
            if entry.kind == Kind::Note {
                continue;
            }
            if busy.len() >= WINDOW {
                return None;
            }
            let free = entry.flight.is_none()
                && entry.next_try.is_none_or(|at| at <= now)
                && entry.settled
                && !busy.contains(&entry.resource.as_str());
            if free {
                return Some(*seq);
            }
            busy.push(&entry.resource);
        }
        None
    }

    fn expire(&mut self, now: Instant) {
        let entries = &mut self.entries;
        self.in_flight.retain(|_, seq| {
            let Some(entry) = entries.get_mut(seq) else { return false };
            let overdue = entry.flight.as_ref().is_some_and(|flight| flight.deadline <= now);
            if overdue {
                entry.flight = None;
                entry.stale = false;
            }
            !overdue
        });
    }

    fn enforce_bounds(&mut self) {
        while self.events > EVENTS_MAX || self.event_bytes > EVENT_BYTES_MAX {
            let oldest = self
                .entries
                .iter()
                .find(|(_, entry)| entry.kind == Kind::Event && entry.flight.is_none());
            let Some((seq, _)) = oldest else { return };
            let seq = *seq;
            self.dropped += 1;
            self.forget_row(seq);
        }
    }

    fn forget(&mut self, now: Instant, seq: u64) {
        self.forget_row(seq);
        if !self.removes.is_empty() {
            self.remove_at.get_or_insert(now + REMOVE_DELAY);
        }
    }

    /// The removal is written with the next put; [`Self::forget`] gives it a time of its own.
    fn forget_row(&mut self, seq: u64) {
        let Some(entry) = self.entries.remove(&seq) else { return };
        self.forget_sizes(&entry);
        self.by_key.remove(&entry.key);
        if let Some(flight) = &entry.flight {
            self.in_flight.remove(&flight.id);
        }
        self.puts.remove(&seq);
        let written = self.writing.as_ref().is_some_and(|(puts, _)| puts.contains(&seq));
        // A row that never was on the disk need not be taken from it.
        if entry.on_disk || written {
            self.removes.insert(seq);
        }
    }

    fn forget_sizes(&mut self, entry: &Entry) {
        if entry.kind == Kind::Event {
            self.events -= 1;
            self.event_bytes -= entry.len;
        }
        if entry.body.is_some() {
            self.body_bytes -= entry.len;
        }
    }
}

#[cfg(test)]
mod tests;
