//! Waiting between attempts: exponential growth, full jitter, from a seed.
//!
//! KubeEdge waits a fixed 30 s after every failure, so that a hub which comes back meets all its nodes in the same
//! second. Here a wait is drawn evenly from zero to the current ceiling, and the first attempt is made at once.

use std::time::Duration;

/// Ceiling of the first wait.
pub const BASE: Duration = Duration::from_secs(1);
/// Highest ceiling: what a person who watches a node come back will still wait for.
pub const CAP: Duration = Duration::from_secs(30);

/// The waits of one thing that is tried again and again.
#[derive(Debug, Clone)]
pub struct Backoff {
    random: Random,
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// Between [`BASE`] and [`CAP`]; `seed` decides the jitter.
    pub fn new(seed: u64) -> Self {
        Self::between(BASE, CAP, seed)
    }

    /// With other bounds.
    pub fn between(base: Duration, cap: Duration, seed: u64) -> Self {
        Self { random: Random::new(seed), base, cap, failures: 0 }
    }

    /// Attempts that failed since the last [`Self::reset`].
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Returns how long to wait after one more failure.
    pub fn next_wait(&mut self) -> Duration {
        let ceiling = self.base.saturating_mul(1 << self.failures.min(16)).min(self.cap);
        self.failures = self.failures.saturating_add(1);
        let ms = u64::try_from(ceiling.as_millis()).unwrap_or(u64::MAX);
        Duration::from_millis(self.random.below(ms + 1))
    }

    /// Starts again from the base; call it when an attempt has succeeded.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// A small generator (SplitMix64) for jitter; not for secrets.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, or 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64().checked_rem(bound).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_stay_under_a_ceiling_that_doubles_from_one_second_to_thirty() {
        let mut backoff = Backoff::new(7);
        for ceiling_s in [1, 2, 4, 8, 16, 30, 30, 30] {
            assert!(backoff.next_wait() <= Duration::from_secs(ceiling_s));
        }
        backoff.reset();
        assert!(backoff.next_wait() <= BASE);
    }

    #[test]
    fn nodes_with_different_seeds_do_not_come_back_together() {
        let mut waits: Vec<_> = (0..1000)
            .map(|seed| {
                let mut backoff = Backoff::new(seed);
                (0..6).map(|_| backoff.next_wait()).last().expect("six waits").as_millis() / 1000
            })
            .collect();
        waits.sort_unstable();
        let busiest = waits.chunk_by(|a, b| a == b).map(<[_]>::len).max().expect("waits");
        assert!(busiest < 80, "{busiest} of 1000 nodes dial in the same second of thirty");
    }
}
