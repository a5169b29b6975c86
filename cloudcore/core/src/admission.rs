//! How many may come, and how fast they may talk: token buckets, and the turn of those who are told to come back.
//!
//! [`Bucket`] bounds a rate and allows a burst. [`Admission`] lets new connections in at a rate, and gives each one that
//! it refuses a time to wait: every refusal moves the end of an imagined queue by one place, and the refused one is told
//! its turn in that queue, a fifth more or less at random. A fleet that was cut at once so comes back as a stream and
//! not as a second storm. (A time drawn between now and the end of the queue, as clients do that know nothing of each
//! other, brings too many back too early: the first second would again see three times the rate.)
//!
//! The listeners and sessions of `cloudcore/` are the callers. No I/O and no clock, and no random numbers either: the
//! draw comes in as an argument.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// The shortest wait that a refused connection is told.
pub const RETRY_AFTER_MIN: Duration = Duration::from_millis(250);
/// The longest wait that a refused connection is told, however many wait.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(300);

/// By how much a turn is moved at random, as a part of the wait.
const JITTER: f64 = 0.2;

/// A rate with a burst, in whatever is counted: messages, bytes, connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// How many a second, for ever. At least 1.
    pub per_s: u32,
    /// How many at once after a quiet time. At least 1.
    pub burst: u32,
}

/// A bucket of tokens that fills at a [`Rate`]. It can be in debt, so that what has come already is charged in full.
#[derive(Debug, Clone, Copy)]
pub struct Bucket {
    rate: Rate,
    /// Tokens at `at`, in thousandths.
    level_milli: i64,
    at: Instant,
}

impl Bucket {
    /// A full bucket.
    pub fn new(rate: Rate, now: Instant) -> Self {
        let rate = Rate { per_s: rate.per_s.max(1), burst: rate.burst.max(1) };
        Self { rate, level_milli: i64::from(rate.burst) * 1000, at: now }
    }

    /// Takes one token if there is one.
    pub fn try_take(&mut self, now: Instant) -> bool {
        self.refill(now);
        let has = self.level_milli >= 1000;
        if has {
            self.level_milli -= 1000;
        }
        has
    }

    /// Takes `count` tokens, there or not.
    pub fn charge(&mut self, count: usize, now: Instant) {
        self.refill(now);
        let count = i64::try_from(count).unwrap_or(i64::MAX / 2000);
        self.level_milli = self.level_milli.saturating_sub(count.saturating_mul(1000));
    }

    /// How long until the debt is paid; `None` without one.
    pub fn debt(&mut self, now: Instant) -> Option<Duration> {
        self.refill(now);
        if self.level_milli >= 0 {
            return None;
        }
        let per_s = u64::from(self.rate.per_s);
        Some(Duration::from_millis((self.level_milli.unsigned_abs() / per_s).max(1)))
    }

    /// Whole tokens in the bucket; 0 in debt.
    pub fn level(&mut self, now: Instant) -> u32 {
        self.refill(now);
        u32::try_from(self.level_milli.max(0) / 1000).unwrap_or(u32::MAX)
    }

    fn refill(&mut self, now: Instant) {
        let elapsed_ms = now.saturating_duration_since(self.at).as_millis();
        // Time below a millisecond stays on the account.
        let Ok(elapsed_ms) = i64::try_from(elapsed_ms) else { return };
        if elapsed_ms == 0 {
            return;
        }
        self.at += Duration::from_millis(elapsed_ms.unsigned_abs());
        let gained = elapsed_ms.saturating_mul(i64::from(self.rate.per_s));
        let full = i64::from(self.rate.burst) * 1000;
        self.level_milli = self.level_milli.saturating_add(gained).min(full);
    }
}

/// How often each node may come, so that one that dials all the time takes no places from others.
#[derive(Debug)]
pub struct Visits {
    rate: Rate,
    nodes: HashMap<Box<str>, Bucket>,
    /// With this many nodes, those that have not come lately are forgotten.
    prune_at: usize,
}

/// Nodes that are remembered before the first pruning.
const VISITS_PRUNE_MIN: usize = 1024;

impl Visits {
    /// Nobody has come yet.
    pub fn new(rate: Rate) -> Self {
        Self { rate, nodes: HashMap::new(), prune_at: VISITS_PRUNE_MIN }
    }

    /// Counts one visit of `node`, whose name has been proved; the wait before its next one when it comes too often.
    pub fn visit(&mut self, node: &str, now: Instant) -> Option<Duration> {
        if self.nodes.len() >= self.prune_at {
            let burst = self.rate.burst;
            self.nodes.retain(|_, bucket| bucket.level(now) < burst);
            self.prune_at = (2 * self.nodes.len()).max(VISITS_PRUNE_MIN);
        }
        let rate = self.rate;
        let bucket = match self.nodes.get_mut(node) {
            Some(bucket) => bucket,
            None => self.nodes.entry(node.into()).or_insert_with(|| Bucket::new(rate, now)),
        };
        if bucket.try_take(now) {
            return None;
        }
        let wait = Duration::from_secs(1) / rate.per_s.max(1);
        Some(wait.max(RETRY_AFTER_MIN))
    }

    /// How many nodes are remembered.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether nobody is remembered.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }
}

/// What a new connection is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Come in.
    Admitted,
    /// Come back after this.
    RetryAfter(Duration),
}

/// Admits new connections at a rate.
#[derive(Debug)]
pub struct Admission {
    bucket: Bucket,
    /// When the last of those who were refused could be in, if all came in turn.
    queue_end: Instant,
    refused: u64,
}

impl Admission {
    /// Nobody has come yet.
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self { bucket: Bucket::new(rate, now), queue_end: now, refused: 0 }
    }

    /// Judges one connection. `draw` is a random number from 0 to 1.
    pub fn admit(&mut self, now: Instant, draw: f64) -> Verdict {
        if self.bucket.try_take(now) {
            return Verdict::Admitted;
        }
        self.refused += 1;
        let place = Duration::from_secs(1) / self.bucket.rate.per_s;
        let end = self.queue_end.max(now) + place;
        // Beyond the longest wait, more refusals do not make the queue longer.
        self.queue_end = end.min(now + RETRY_AFTER_MAX);
        let jitter = 1.0 - JITTER + 2.0 * JITTER * draw.clamp(0.0, 1.0);
        let wait = self.queue_end.saturating_duration_since(now).mul_f64(jitter);
        Verdict::RetryAfter((RETRY_AFTER_MIN + wait).min(RETRY_AFTER_MAX))
    }

    /// How many are expected to come back, by the length of the imagined queue.
    pub fn backlog(&self, now: Instant) -> u64 {
        let length = self.queue_end.saturating_duration_since(now).as_secs_f64();
        (length * f64::from(self.bucket.rate.per_s)).round() as u64
    }

    /// How many were told to come back, ever.
    pub fn refused(&self) -> u64 {
        self.refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn bucket_gives_its_burst_and_then_its_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Rate { per_s: 10, burst: 3 }, start);
        let taken = |bucket: &mut Bucket, at| (0..10).filter(|_| bucket.try_take(at)).count();
        assert_eq!(taken(&mut bucket, start), 3);
        assert_eq!(taken(&mut bucket, start + 99 * MS), 0);
        assert_eq!(taken(&mut bucket, start + 100 * MS), 1);
        assert_eq!(
            taken(&mut bucket, start + 60_000 * MS),
            3,
            "it does not hold more than its burst"
        );
        // A clock that goes back changes nothing.
        assert_eq!(taken(&mut bucket, start), 0);
    }

    #[test]
    fn slow_refills_lose_no_time_between_the_looks() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Rate { per_s: 1, burst: 1 }, start);
        assert!(bucket.try_take(start));
        let micros = Duration::from_micros(700);
        let taken = (1..=2000u32).filter(|step| bucket.try_take(start + micros * *step)).count();
        assert_eq!(taken, 1, "1.4 s have passed");
    }

    #[test]
    fn debt_is_paid_at_the_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Rate { per_s: 1000, burst: 500 }, start);
        assert_eq!(bucket.debt(start), None);
        bucket.charge(1500, start);
        assert_eq!((bucket.debt(start), bucket.level(start)), (Some(1000 * MS), 0));
        assert_eq!(bucket.debt(start + 400 * MS), Some(600 * MS));
        assert_eq!(bucket.debt(start + 1000 * MS), None);
        bucket.charge(usize::MAX, start + 1000 * MS);
        assert!(bucket.debt(start + 1000 * MS).is_some(), "no overflow");
    }

    #[test]
    fn node_that_dials_all_the_time_waits_and_others_do_not() {
        let start = Instant::now();
        let mut visits = Visits::new(Rate { per_s: 1, burst: 5 });
        let came = (0..100).filter(|_| visits.visit("edge1", start).is_none()).count();
        assert_eq!(came, 5);
        assert_eq!(visits.visit("edge1", start), Some(1000 * MS));
        assert_eq!(visits.visit("edge2", start), None);
        assert_eq!(visits.visit("edge1", start + 1000 * MS), None);
        // Those who came long ago are forgotten, the busy one is not.
        for number in 0..10_000u32 {
            let at = start + 2000 * MS * number;
            visits.visit(&format!("node{number}"), at);
            visits.visit("edge1", at);
            assert!(visits.len() <= 2 * VISITS_PRUNE_MIN, "{}", visits.len());
        }
        assert!(!visits.is_empty());
    }

    #[test]
    fn a_storm_comes_back_as_a_stream() {
        let start = Instant::now();
        let rate = Rate { per_s: 500, burst: 1000 };
        let mut admission = Admission::new(rate, start);
        let mut admitted = 0;
        // Each refused one comes back when it was told; the draws go through the interval evenly.
        let mut arrivals: BinaryHeap<Reverse<Duration>> =
            vec![Reverse(Duration::ZERO); 10_000].into();
        let (mut draw, mut tries, mut last) = (0.0, 0, Duration::ZERO);
        while let Some(Reverse(at)) = arrivals.pop() {
            draw = (draw + 0.618_033_988_75) % 1.0;
            tries += 1;
            match admission.admit(start + at, draw) {
                Verdict::Admitted => {
                    admitted += 1;
                    last = at;
                }
                Verdict::RetryAfter(wait) => {
                    assert!((RETRY_AFTER_MIN..=RETRY_AFTER_MAX).contains(&wait));
                    arrivals.push(Reverse(at + wait));
                }
            }
            if tries % 4000 == 0 {
                assert!(admission.backlog(start + at) < 60_000);
            }
        }
        assert_eq!(admitted, 10_000);
        // 18 s would be perfect, with everybody's first or second try.
        assert!(last < Duration::from_secs(25), "the last one came in after {last:?}");
        assert!(tries < 25_000, "{tries} tries for 10,000 connections");
    }
}
