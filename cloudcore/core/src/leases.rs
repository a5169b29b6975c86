//! When the hub renews the Leases of its nodes.
//!
//! A node with the `lease` capability sends no lease messages: as long as its connection lives, the hub writes its
//! Lease. [`Schedule`] says which one is due. Every node has its turn each [`RENEW_INTERVAL`]; when that would be more
//! than [`WRITES_PER_S`] writes, turns come less often, and a Lease says for how long it holds. Writes are spread: no
//! two are due at the same instant, and never more than [`WRITES_IN_FLIGHT_MAX`] are unanswered.
//!
//! The caller is the owner task in `cloudcore/src/leases.rs`: it drains [`Schedule::poll`], writes, calls
//! [`Schedule::done`], and sleeps until [`Schedule::poll_timeout`]. No I/O, no clock.

use skerry_protocol::capability::{BEAT_GRACE, BEAT_MAX};
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// Time between two renewals of a Lease, as kubelet's: a quarter of [`LEASE_DURATION`].
pub const RENEW_INTERVAL: Duration = Duration::from_secs(10);
/// How long a Lease holds at least, `spec.leaseDurationSeconds`.
pub const LEASE_DURATION: Duration = Duration::from_secs(40);
/// Lease writes in one second, for all nodes of this hub. A Kubernetes API takes thousands, the embedded one
/// some eight hundred beside ten thousand links on two cores (`cargo xtask bench link`, `lease_writes_per_s`); the rest
/// is for others. Three thousand nodes so have kubelet's interval, and twelve thousand one that is
/// within the grace of 40 s after which a cluster's controllers call a node unreachable, whatever its Lease says.
pub const WRITES_PER_S: u32 = 300;
/// Writes that wait for the API at the same time.
pub const WRITES_IN_FLIGHT_MAX: usize = 16;
/// First pause after a failed write; it doubles up to [`RENEW_INTERVAL`].
pub const RETRY_MIN: Duration = Duration::from_secs(1);
/// A node without a beat for this long gets no renewal any more, even if nobody said that it is gone: two of the
/// longest beats that a peer may announce, and the grace.
pub const SILENCE_MAX: Duration =
    Duration::from_secs(2 * BEAT_MAX.as_secs() + BEAT_GRACE.as_secs());

/// A write that is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewal {
    /// Whose Lease.
    pub node: String,
    /// `spec.leaseDurationSeconds`, in whole seconds.
    pub duration: Duration,
}

/// Whose Lease is to be renewed when.
#[derive(Debug, Default)]
pub struct Schedule {
    nodes: HashMap<String, Node>,
    /// Turns, in order. The number keeps two of the same instant apart.
    turns: BTreeMap<(Instant, u64), String>,
    next_turn: u64,
    /// No write before this: the budget.
    next_write: Option<Instant>,
    in_flight: usize,
}

#[derive(Debug)]
struct Node {
    /// A new connection may be there before the old one is known to be gone.
    connections: u32,
    last_beat: Instant,
    state: State,
}

#[derive(Debug)]
enum State {
    Waiting {
        turn: (Instant, u64),
        failures: u32,
    },
    /// Written; `failures` before that.
    Writing {
        failures: u32,
    },
    /// No beats; waits for one.
    Silent,
}

impl Schedule {
    /// A connection of `node` has come up. Its Lease is due at once, within the budget.
    pub fn up(&mut self, node: &str, now: Instant) {
        if let Some(known) = self.nodes.get_mut(node) {
            known.connections += 1;
            self.beat(node, now);
            return;
        }
        let turn = self.turn(node, now);
        let state = State::Waiting { turn, failures: 0 };
        self.nodes.insert(node.into(), Node { connections: 1, last_beat: now, state });
    }

    /// A connection of `node` has ended. Its Lease runs out when it was the last one.
    pub fn down(&mut self, node: &str) {
        let Some(known) = self.nodes.get_mut(node) else { return };
        known.connections -= 1;
        if known.connections > 0 {
            return;
        }
        if let State::Waiting { turn, .. } = &known.state {
            self.turns.remove(turn);
        }
        self.nodes.remove(node);
    }

    /// `node` is alive.
    pub fn beat(&mut self, node: &str, now: Instant) {
        let Some(known) = self.nodes.get_mut(node) else { return };
        known.last_beat = now;
        if matches!(known.state, State::Silent) {
            let turn = self.turn(node, now);
            if let Some(known) = self.nodes.get_mut(node) {
                known.state = State::Waiting { turn, failures: 0 };
            }
        }
    }

    /// The next write that is due at `now`.
    pub fn poll(&mut self, now: Instant) -> Option<Renewal> {
        let duration = self.duration();
        while self.in_flight < WRITES_IN_FLIGHT_MAX && self.next_write.is_none_or(|at| at <= now) {
            let first = self.turns.first_entry().filter(|entry| entry.key().0 <= now)?;
            let node = first.remove();
            let known = self.nodes.get_mut(&node).expect("a turn belongs to a node");
            if now.duration_since(known.last_beat) > SILENCE_MAX {
                known.state = State::Silent;
                continue;
            }
            let failures = match known.state {
                State::Waiting { failures, .. } => failures,
                _ => 0,
            };
            known.state = State::Writing { failures };
            self.in_flight += 1;
            // From the last slot, not from now, so that a late wake-up costs no budget; a pause gives no burst.
            let slot = Duration::from_secs(1) / WRITES_PER_S;
            let base =
                self.next_write.map_or(now, |at| at.max(now.checked_sub(slot).unwrap_or(now)));
            self.next_write = Some(base + slot);
            return Some(Renewal { node, duration });
        }
        None
    }

    /// A write given by [`Schedule::poll`] has been answered; `ok` when the Lease is renewed.
    pub fn done(&mut self, node: &str, ok: bool, now: Instant) {
        self.in_flight = self.in_flight.saturating_sub(1);
        let interval = self.interval();
        let Some(known) = self.nodes.get(node) else { return };
        // Of a node that left and came back in between there is a turn already.
        let State::Writing { failures } = known.state else { return };
        let (pause, failures) = match ok {
            true => (interval, 0),
            false => {
                let pause = RETRY_MIN.saturating_mul(1 << failures.min(8));
                (pause.min(RENEW_INTERVAL), failures.saturating_add(1))
            }
        };
        let turn = self.turn(node, now + pause);
        if let Some(known) = self.nodes.get_mut(node) {
            known.state = State::Waiting { turn, failures };
        }
    }

    /// When [`Schedule::poll`] has something again; `None` while only an answer can change that.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.in_flight >= WRITES_IN_FLIGHT_MAX {
            return None;
        }
        let ((first, _), _) = self.turns.first_key_value()?;
        Some(self.next_write.map_or(*first, |at| at.max(*first)))
    }

    /// Nodes whose Leases are kept.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether no Lease is kept.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Time between two renewals of one Lease with as many nodes as there are now.
    pub fn interval(&self) -> Duration {
        let fleet = Duration::from_secs(1)
            .saturating_mul(u32::try_from(self.nodes.len()).unwrap_or(u32::MAX))
            / WRITES_PER_S;
        fleet.max(RENEW_INTERVAL)
    }

    /// Four intervals, so that a Lease outlives three failed renewals.
    fn duration(&self) -> Duration {
        let seconds = (self.interval() * 4).as_secs_f64().ceil();
        Duration::from_secs_f64(seconds).max(LEASE_DURATION)
    }

    fn turn(&mut self, node: &str, at: Instant) -> (Instant, u64) {
        self.next_turn += 1;
        let turn = (at, self.next_turn);
        self.turns.insert(turn, node.to_owned());
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the schedule for a while with an API that answers at once; returns the writes with their times.
    fn run(
        schedule: &mut Schedule,
        start: Instant,
        lasts: Duration,
        mut answer: impl FnMut(&str) -> bool,
    ) -> Vec<(Duration, String)> {
        let mut writes = Vec::new();
        let mut now = start;
        while now <= start + lasts {
            while let Some(renewal) = schedule.poll(now) {
                let ok = answer(&renewal.node);
                schedule.done(&renewal.node, ok, now);
                writes.push((now - start, renewal.node));
            }
            match schedule.poll_timeout() {
                Some(next) => now = next.max(now),
                None => break,
            }
        }
        writes
    }

    #[test]
    fn a_lease_is_written_at_once_and_every_ten_seconds_until_the_connection_ends() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        schedule.up("edge1", start);
        let writes = run(&mut schedule, start, Duration::from_secs(35), |_| true);
        let times: Vec<_> = writes.iter().map(|(at, _)| at.as_secs()).collect();
        assert_eq!(times, [0, 10, 20, 30]);
        schedule.down("edge1");
        assert!(schedule.is_empty());
        assert_eq!(schedule.poll_timeout(), None);
    }

    #[test]
    fn a_new_connection_before_the_end_of_the_old_one_keeps_the_lease() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        schedule.up("edge1", start);
        schedule.up("edge1", start);
        schedule.down("edge1");
        assert!(schedule.poll(start).is_some());
        assert_eq!(schedule.poll(start), None, "one write for two connections");
        schedule.down("edge1");
        assert!(schedule.is_empty());
        schedule.done("edge1", true, start);
        assert_eq!(schedule.poll_timeout(), None);
    }

    #[test]
    fn ten_thousand_nodes_that_come_at_once_stay_within_the_budget_and_all_get_their_turn() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        (0..10_000).for_each(|n| schedule.up(&format!("edge{n}"), start));
        assert_eq!(schedule.interval().as_secs(), 33);
        let writes = run(&mut schedule, start, Duration::from_secs(300), |_| true);
        let mut per_second = HashMap::<u64, u32>::new();
        let mut per_node = HashMap::<&str, u32>::new();
        for (at, node) in &writes {
            *per_second.entry(at.as_secs()).or_default() += 1;
            *per_node.entry(node).or_default() += 1;
        }
        assert!(per_second.values().all(|writes| *writes <= WRITES_PER_S + 1));
        assert_eq!(per_node.len(), 10_000);
        assert!(per_node.values().all(|writes| (8..=10).contains(writes)));
        // The lease has to hold until its next turn.
        assert!(schedule.duration() >= schedule.interval() * 4);
    }

    #[test]
    fn a_failed_write_is_tried_again_with_pauses_that_grow() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        schedule.up("edge1", start);
        let mut left = 5;
        let writes = run(&mut schedule, start, Duration::from_secs(40), |_| {
            left -= 1;
            left < 0
        });
        let times: Vec<_> = writes.iter().map(|(at, _)| at.as_secs()).collect();
        assert_eq!(times, [0, 1, 3, 7, 15, 25, 35]);
    }

    #[test]
    fn an_api_that_does_not_answer_holds_a_bounded_number_of_writes() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        (0..100).for_each(|n| schedule.up(&format!("edge{n}"), start));
        let later = start + Duration::from_secs(5);
        let mut given = Vec::new();
        for step in 0..1000 {
            given.extend(schedule.poll(later + Duration::from_millis(10 * step)));
        }
        assert_eq!(given.len(), WRITES_IN_FLIGHT_MAX);
        assert_eq!(schedule.poll_timeout(), None);
        let after = later + Duration::from_secs(20);
        schedule.done(&given[0].node, true, after);
        assert!(schedule.poll(after).is_some());
    }

    #[test]
    fn a_silent_node_is_not_kept_alive_and_a_beat_brings_it_back() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        schedule.up("edge1", start);
        let lasts = SILENCE_MAX + Duration::from_secs(60);
        let writes = run(&mut schedule, start, lasts, |_| true);
        let (last, _) = writes.last().expect("some");
        assert!(*last <= SILENCE_MAX, "{last:?}");
        let now = start + lasts;
        assert_eq!(schedule.poll(now), None);
        schedule.beat("edge1", now);
        assert!(schedule.poll(now).is_some());
    }

    #[test]
    fn words_about_unknown_nodes_change_nothing() {
        let now = Instant::now();
        let mut schedule = Schedule::default();
        schedule.down("edge1");
        schedule.beat("edge1", now);
        schedule.done("edge1", true, now);
        assert!(schedule.is_empty() && schedule.poll(now).is_none());
    }
}
