//! How many calls a mapper may make to EdgeCore.
//!
//! KubeEdge's EdgeCore takes one call per second on average from all mappers of a node together,
//! registrations included, and refuses the rest; so that is the default, with a small stock for
//! bursts. An EdgeCore that refuses anyway is left alone for a while, longer each time.
//!
//! Source: kubeedge/kubeedge, edge/pkg/devicetwin/dmiserver/server.go (limiter: 1/s, burst 100).

use std::time::{Duration, Instant};

/// Seconds' worth of calls that may be saved up, and at least [`STOCK_MIN`] calls.
const STOCK: Duration = Duration::from_secs(5);
/// Smallest stock.
const STOCK_MIN: f64 = 5.0;
/// First and longest pause after "too many request".
const PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// A token bucket with a pause.
#[derive(Debug)]
pub(super) struct Budget {
    per_second: f64,
    tokens: f64,
    at: Instant,
    paused_until: Option<Instant>,
    pause: Duration,
}

impl Budget {
    pub(super) fn new(per_second: f64, now: Instant) -> Self {
        let per_second = per_second.clamp(0.01, 100_000.0);
        let tokens = (per_second * STOCK.as_secs_f64()).max(STOCK_MIN);
        Self { per_second, tokens, at: now, paused_until: None, pause: PAUSE.0 }
    }

    /// Takes one call's worth, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        if self.paused_until.is_some_and(|until| now < until) {
            return false;
        }
        self.paused_until = None;
        let stock = (self.per_second * STOCK.as_secs_f64()).max(STOCK_MIN);
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        self.tokens = (self.tokens + earned).min(stock);
        self.at = self.at.max(now);
        // A timer may be a nanosecond early by rounding; that must not cost a turn.
        if self.tokens < 1.0 - 1e-6 {
            return false;
        }
        self.tokens = (self.tokens - 1.0).max(0.0);
        true
    }

    /// Undoes a [`Budget::take`] that no call came of.
    pub(super) fn give_back(&mut self) {
        self.tokens += 1.0;
    }

    /// When the next call may be made.
    pub(super) fn next(&self) -> Instant {
        let missing = (1.0 - self.tokens).max(0.0) / self.per_second;
        let earned = self.at + Duration::from_secs_f64(missing);
        self.paused_until.map_or(earned, |until| until.max(earned))
    }

    /// EdgeCore refused for want of room.
    pub(super) fn handle_busy(&mut self, now: Instant) {
        if self.paused_until.is_none_or(|until| until <= now) {
            self.paused_until = Some(now + self.pause);
            self.pause = (self.pause * 2).min(PAUSE.1);
        }
        self.tokens = 0.0;
        self.at = self.at.max(now);
    }

    /// EdgeCore took a call.
    pub(super) fn handle_taken(&mut self) {
        self.pause = PAUSE.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_a_long_time_no_more_calls_are_made_than_allowed() {
        let start = Instant::now();
        let mut budget = Budget::new(1.0, start);
        let mut calls = 0;
        let mut now = start;
        while now < start + Duration::from_secs(600) {
            calls += u32::from(budget.take(now));
            now += Duration::from_millis(10);
        }
        assert!((600..=605).contains(&calls), "{calls}");
    }

    #[test]
    fn a_refusal_pauses_longer_each_time_until_a_call_is_taken() {
        let start = Instant::now();
        let mut budget = Budget::new(10.0, start);
        budget.handle_busy(start);
        assert_eq!(budget.next(), start + Duration::from_secs(2));
        // Answers of calls that were under way are the same refusal.
        budget.handle_busy(start);
        assert_eq!(budget.next(), start + Duration::from_secs(2));
        let later = start + Duration::from_secs(2);
        assert!(budget.take(later));
        budget.handle_busy(later);
        assert_eq!(budget.next(), later + Duration::from_secs(4));
        budget.handle_taken();
        let last = later + Duration::from_secs(4);
        assert!(budget.take(last));
        budget.handle_busy(last);
        assert_eq!(budget.next(), last + Duration::from_secs(2));
    }
}
