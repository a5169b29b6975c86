//! The outbox against a model: a disk that keeps whole transactions or none, a cluster that writes down what comes,
//! and a seed that decides what happens next.

use super::*;
use crate::backoff::Random;

/// The database: what was committed.
#[derive(Default, Clone)]
struct Disk(BTreeMap<u64, Item>);

impl Disk {
    fn apply(&mut self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Put { seq, item } => drop(self.0.insert(*seq, item.clone())),
                Change::Remove { seq } => drop(self.0.remove(seq)),
            }
        }
    }

    fn rows(&self) -> Vec<Row> {
        let row = |(seq, item): (&u64, &Item)| Row {
            seq: *seq,
            key: item.key.clone(),
            kind: item.kind,
            operation: item.operation,
            resource: item.resource.clone(),
            len: item.content.len(),
        };
        self.0.iter().map(row).collect()
    }
}

fn item(kind: Kind, key: &str, resource: &str, version: u64) -> Item {
    Item {
        key: key.into(),
        kind,
        operation: Operation::Insert,
        resource: resource.into(),
        content: version.to_string().into(),
    }
}

/// One run.
struct World {
    random: Random,
    now: Instant,
    disk: Disk,
    outbox: Outbox,
    connected: bool,
    /// Messages on the way: id, resource, version.
    wire: Vec<(String, String, u64)>,
    sent_at: HashMap<String, Instant>,
    ids: u64,
    /// What the owner put and the disk has had: newest version by key of a row that compacts.
    durable_last: BTreeMap<String, u64>,
    /// Versions of rows that never compact, by resource, in order, once they were durable.
    durable_all: BTreeMap<String, Vec<u64>>,
    /// Versions that the cluster got, by resource.
    got: BTreeMap<String, Vec<u64>>,
    refused: BTreeSet<u64>,
    /// A store has failed since the last start: rows may be sent before they are on the disk.
    failing: bool,
    ever_failed: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            now: Instant::now(),
            disk: Disk::default(),
            outbox: Outbox::restore([], seed),
            connected: false,
            wire: Vec::new(),
            sent_at: HashMap::new(),
            ids: 0,
            durable_last: BTreeMap::new(),
            durable_all: BTreeMap::new(),
            got: BTreeMap::new(),
            refused: BTreeSet::new(),
            failing: false,
            ever_failed: false,
        }
    }

    fn put(&mut self, version: u64) {
        let n = self.random.below(4);
        let item = match self.random.below(3) {
            0 => item(Kind::Event, &format!("event{n}"), &format!("default/event/{n}"), version),
            1 => item(Kind::Effect, &format!("job{version}"), &format!("jobs/job/{n}"), version),
            _ => item(Kind::Note, &format!("note{n}"), "", version),
        };
        self.outbox.put(item);
    }

    /// Writes what is due. The power may fail before, after, or instead of the commit.
    fn store(&mut self, faults: bool) {
        let changes = self.outbox.take_changes(self.now);
        if changes.is_empty() {
            return;
        }
        match self.random.below(if faults { 12 } else { 1 }) {
            1 => return self.crash(), // torn: nothing of the transaction is there
            2 => {
                self.commit(&changes);
                return self.crash();
            }
            3 => {
                self.failing = true;
                self.ever_failed = true;
                self.outbox.handle_stored(self.now, false);
                return;
            }
            _ => {}
        }
        self.commit(&changes);
        self.outbox.handle_stored(self.now, true);
    }

    fn commit(&mut self, changes: &[Change]) {
        self.disk.apply(changes);
        for change in changes {
            let Change::Put { item, .. } = change else { continue };
            let version: u64 = item.content.parse().expect("a number");
            match item.kind {
                Kind::Effect => {
                    let all = self.durable_all.entry(item.resource.clone()).or_default();
                    if !all.contains(&version) {
                        all.push(version);
                    }
                }
                _ => drop(self.durable_last.insert(item.key.clone(), version)),
            }
        }
    }

    fn crash(&mut self) {
        let seed = self.random.next_u64();
        self.outbox = Outbox::restore(self.disk.rows(), seed);
        self.wire.clear();
        self.connected = false;
        self.failing = false;
    }

    fn send(&mut self) {
        // What was not answered for so long is lost.
        let (now, sent_at) = (self.now, &self.sent_at);
        self.wire.retain(|(id, ..)| now < sent_at[id] + ANSWER_TIMEOUT);
        while self.connected && self.wire.len() < 8 {
            let disk = self.disk.0.clone();
            let read = |seq| disk.get(&seq).map(|item| item.content.clone());
            let Some(due) = self.outbox.poll_transmit(self.now, read) else { return };
            let on_disk = disk.get(&due.seq).is_some_and(|item| item.content == due.content);
            assert!(on_disk || self.failing, "sent before it was durable: {due:?}");
            assert!(
                self.wire.iter().all(|(_, resource, _)| *resource != due.resource),
                "two of one resource on the way: {due:?}"
            );
            self.ids += 1;
            let id = format!("m{}", self.ids);
            self.outbox.sent(due.seq, id.clone(), self.now);
            self.sent_at.insert(id.clone(), self.now);
            self.wire.push((id, due.resource, due.content.parse().expect("a number")));
        }
    }

    /// The cluster takes one message, which is now done whether or not its answer arrives.
    fn answer(&mut self, faults: bool) {
        if self.wire.is_empty() {
            return;
        }
        let at = self.random.below(self.wire.len() as u64) as usize;
        let (id, resource, version) = self.wire.remove(at);
        let verdict = match self.random.below(if faults { 10 } else { 1 }) {
            1 => Verdict::Later,
            2 => {
                self.refused.insert(version);
                Verdict::Refused
            }
            _ => Verdict::Taken,
        };
        if verdict == Verdict::Taken {
            self.got.entry(resource).or_default().push(version);
        }
        self.outbox.handle_answer(self.now, &id, verdict);
        assert_eq!(
            self.outbox.handle_answer(self.now, &id, Verdict::Taken),
            None,
            "answered twice"
        );
    }

    fn check_end(&self, seed: u64) {
        for (key, version) in &self.durable_last {
            let Some(n) = key.strip_prefix("event") else { continue };
            let got = self.got.get(&format!("default/event/{n}"));
            let last = got.and_then(|got| got.last()).copied();
            // While the disk takes nothing, a newer one may have been sent that never was on it.
            let newest = got.and_then(|got| got.iter().max()).copied();
            let settled =
                newest >= Some(*version) || self.refused.range(version..).next().is_some();
            let fine = last == Some(*version) || self.ever_failed && settled;
            assert!(
                fine || self.refused.contains(version),
                "seed {seed}: {key} ended at {last:?}, not at {version}"
            );
        }
        for (resource, versions) in &self.durable_all {
            let got = self.got.get(resource).cloned().unwrap_or_default();
            let mut first_seen: Vec<u64> = Vec::new();
            for version in got {
                if !first_seen.contains(&version) {
                    first_seen.push(version);
                }
            }
            let wanted: Vec<_> =
                versions.iter().filter(|version| !self.refused.contains(version)).collect();
            let mut arrived = first_seen.iter().filter(|version| versions.contains(version));
            for version in wanted {
                assert!(
                    arrived.any(|one| one == version),
                    "seed {seed}: {version} of {resource} is lost or out of order: {first_seen:?}"
                );
            }
        }
    }
}

#[test]
fn what_was_durable_arrives_in_order_whatever_happens() {
    for seed in 0..120 {
        let mut world = World::new(seed);
        for step in 1..=400 {
            let faults = step < 300;
            match world.random.below(8) {
                0 | 1 if faults => world.put(step),
                2 | 3 => world.store(faults),
                4 => world.send(),
                5 => world.answer(faults),
                6 if faults && world.random.below(6) == 0 => {
                    world.connected = false;
                    world.wire.clear();
                }
                7 if !world.connected => {
                    world.connected = true;
                    world.wire.clear();
                    world.outbox.handle_connected();
                }
                _ => world.now += Duration::from_millis(world.random.below(4000)),
            }
        }
        // Calm: all that is owed leaves, and the disk is left with the notes.
        world.connected = true;
        world.wire.clear();
        world.outbox.handle_connected();
        for _ in 0..200 {
            world.now += STORE_RETRY;
            world.store(false);
            world.send();
            while !world.wire.is_empty() {
                world.answer(false);
            }
        }
        world.check_end(seed);
        assert!(world.outbox.in_flight.is_empty(), "seed {seed}");
        assert!(world.disk.0.values().all(|item| item.kind == Kind::Note), "seed {seed}");
        assert_eq!(world.outbox.len(), world.disk.0.len(), "seed {seed}");
        let bodies = world.outbox.entries.values().filter_map(|entry| entry.body.as_ref());
        assert_eq!(
            world.outbox.body_bytes,
            bodies.map(|body| body.len()).sum::<usize>(),
            "seed {seed}"
        );
        assert_eq!((world.outbox.events, world.outbox.event_bytes), (0, 0), "seed {seed}");
    }
}

#[test]
fn undisturbed_row_is_sent_once_and_the_idle_disk_is_left_alone() {
    let mut world = World::new(1);
    world.connected = true;
    for version in 1..=50 {
        world.put(version);
        world.store(false);
        world.send();
        while !world.wire.is_empty() {
            world.answer(false);
        }
    }
    world.now += REMOVE_DELAY;
    world.store(false);
    for versions in world.got.values() {
        assert!(versions.is_sorted_by(|a, b| a < b), "once each: {versions:?}");
    }
    assert_eq!(world.outbox.poll_timeout(world.now, true), None);
    world.now += Duration::from_secs(3600);
    assert_eq!(world.outbox.take_changes(world.now), []);
}

#[test]
fn removals_are_written_with_the_next_put_or_after_a_while() {
    let now = Instant::now();
    let mut outbox = Outbox::restore([], 1);
    outbox.put(item(Kind::Event, "a", "a", 1));
    assert_eq!(outbox.take_changes(now).len(), 1);
    assert_eq!(outbox.take_changes(now), [], "one transaction at a time");
    outbox.handle_stored(now, true);
    let due = outbox.poll_transmit(now, |_| None).expect("kept in memory");
    outbox.sent(due.seq, "m".into(), now);
    assert_eq!(outbox.handle_answer(now, "m", Verdict::Taken).as_deref(), Some("a"));
    assert_eq!(outbox.take_changes(now), []);
    assert_eq!(outbox.poll_timeout(now, true), Some(now + REMOVE_DELAY));
    outbox.put(item(Kind::Event, "b", "b", 2));
    let changes = outbox.take_changes(now);
    assert!(matches!(changes[..], [Change::Remove { seq: 1 }, Change::Put { seq: 2, .. }]));
}

#[test]
fn event_that_was_never_stored_costs_no_write_when_it_is_replaced_or_dropped() {
    let now = Instant::now();
    let mut outbox = Outbox::restore([], 1);
    outbox.put(item(Kind::Event, "a", "a", 1));
    outbox.put(item(Kind::Event, "a", "a", 2));
    outbox.remove(now, "a");
    assert_eq!(outbox.take_changes(now + REMOVE_DELAY), []);
    outbox.put(item(Kind::Event, "a", "a", 3));
    let changes = outbox.take_changes(now);
    assert!(matches!(&changes[..], [Change::Put { item, .. }] if &*item.content == "3"));
}

#[test]
fn oldest_events_are_dropped_and_counted_but_nothing_else_is() {
    let mut outbox = Outbox::restore([], 1);
    outbox.put(item(Kind::Effect, "job", "job", 0));
    outbox.put(item(Kind::Note, "note", "", 0));
    for n in 0..EVENTS_MAX as u64 + 5 {
        outbox.put(item(Kind::Event, &format!("e{n}"), &format!("e{n}"), n));
    }
    assert_eq!(outbox.take_dropped(), 5);
    assert!(!outbox.contains("e4") && outbox.contains("e5"));
    let large =
        Item { content: "x".repeat(EVENT_BYTES_MAX / 2).into(), ..item(Kind::Event, "l", "l", 1) };
    outbox.put(large.clone());
    outbox.put(Item { key: "m".into(), ..large });
    assert!(outbox.event_bytes <= EVENT_BYTES_MAX);
    assert!(outbox.contains("job") && outbox.contains("note") && outbox.contains("m"));
}

#[test]
fn full_disk_does_not_keep_a_working_link_from_being_used() {
    let now = Instant::now();
    let mut outbox = Outbox::restore([], 1);
    outbox.put(item(Kind::Event, "a", "a", 1));
    assert_eq!(outbox.poll_transmit(now, |_| None), None, "durable first");
    assert_eq!(outbox.take_changes(now).len(), 1);
    outbox.handle_stored(now, false);
    let due = outbox.poll_transmit(now, |_| None).expect("it may be sent now");
    outbox.sent(due.seq, "m".into(), now);
    assert_eq!(outbox.take_changes(now), [], "not in a tight loop");
    assert_eq!(outbox.poll_timeout(now, false), Some(now + STORE_RETRY));
    outbox.handle_answer(now, "m", Verdict::Taken);
    // It may have reached the disk all the same.
    assert_eq!(outbox.take_changes(now + STORE_RETRY), [Change::Remove { seq: 1 }]);
}

#[test]
fn unanswered_row_is_sent_again_after_a_while() {
    let now = Instant::now();
    let rows = [Row {
        seq: 7,
        key: "a".into(),
        kind: Kind::Event,
        operation: Operation::Patch,
        resource: "a".into(),
        len: 1,
    }];
    let mut outbox = Outbox::restore(rows, 1);
    let due = outbox.poll_transmit(now, |seq| (seq == 7).then(|| "1".into())).expect("a row");
    assert_eq!((due.operation, &*due.content), (Operation::Patch, "1"));
    outbox.sent(due.seq, "m1".into(), now);
    assert_eq!(outbox.poll_timeout(now, true), Some(now + ANSWER_TIMEOUT));
    let later = now + ANSWER_TIMEOUT;
    let due = outbox.poll_transmit(later, |_| Some("1".into())).expect("again");
    outbox.sent(due.seq, "m2".into(), later);
    assert_eq!(outbox.handle_answer(later, "m1", Verdict::Taken), None, "too late");
    assert!(outbox.handle_answer(later, "m2", Verdict::Taken).is_some());
    assert!(outbox.is_empty());
    // A row that the database cannot return is no reason to stop.
    outbox.put(item(Kind::Event, "b", "b", 2));
    outbox.take_changes(later);
    outbox.handle_stored(later, true);
    outbox.entries.values_mut().for_each(|entry| entry.body = None);
    assert_eq!(outbox.poll_transmit(later, |_| None), None);
    assert_eq!(outbox.take_dropped(), 1);
}
