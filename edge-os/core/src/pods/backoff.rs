//! Growing delays between tries: container restarts and image pulls.
//!
//! The first try after a success is free; the delay then starts at [`DELAY_MIN`] and doubles up to
//! a bound. An entry that was not used for twice the bound starts over.
//!
//! Source: kubernetes/client-go util/flowcontrol/backoff.go, kubernetes/kubernetes
//! pkg/kubelet/kuberuntime (`doBackOff`).

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// Delay before the second retry.
pub const DELAY_MIN: Duration = Duration::from_secs(10);

/// Longest delay unless the node says otherwise.
pub const DELAY_MAX: Duration = Duration::from_secs(300);

/// What is kept of a container's restarts while the agent or the machine is down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartRecord {
    pub pod_uid: String,
    pub container: String,
    /// Number of the newest instance; the first one has 0.
    pub restart_count: u32,
    /// Hash of the container's definition the delay belongs to.
    pub hash: String,
    /// Delay before the next start, in seconds; 0 if the next one is free.
    pub delay_secs: u64,
    /// When the delay was last raised.
    pub raised_at: Option<Timestamp>,
}

/// A delay and when it was last raised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub delay: Duration,
    pub raised_at: Timestamp,
}

/// Delays by key.
#[derive(Debug, Clone)]
pub struct Backoff {
    entries: BTreeMap<String, Entry>,
    max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new(DELAY_MAX)
    }
}

impl Backoff {
    /// Returns an empty set of delays that grow up to `max`.
    pub fn new(max: Duration) -> Self {
        Self { entries: BTreeMap::new(), max }
    }

    /// Returns when the next try is allowed after a failure at `since`, if that is after `now`.
    pub fn blocked_until(&self, key: &str, since: Timestamp, now: Timestamp) -> Option<Timestamp> {
        let entry = self.entries.get(key).filter(|entry| !self.expired(entry, since))?;
        let until = add(since, entry.delay);
        (until > now).then_some(until)
    }

    /// Returns the delay that is now in force for `key`.
    pub fn delay(&self, key: &str) -> Option<Duration> {
        self.entries.get(key).map(|entry| entry.delay)
    }

    /// Raises the delay of `key` because of a failure at `since`.
    pub fn raise(&mut self, key: &str, since: Timestamp, now: Timestamp) -> Entry {
        let fresh = Entry { delay: DELAY_MIN.min(self.max), raised_at: now };
        let entry = match self.entries.get(key) {
            Some(entry) if !self.expired(entry, since) => {
                Entry { delay: (entry.delay * 2).min(self.max), raised_at: now }
            }
            _ => fresh,
        };
        self.entries.insert(key.to_owned(), entry);
        entry
    }

    /// Puts back a delay that was stored.
    pub fn restore(&mut self, key: &str, entry: Entry) {
        self.entries.insert(key.to_owned(), Entry { delay: entry.delay.min(self.max), ..entry });
    }

    /// Forgets `key`: the next try is free.
    pub fn reset(&mut self, key: &str) {
        self.entries.remove(key);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    fn expired(&self, entry: &Entry, since: Timestamp) -> bool {
        since.duration_since(entry.raised_at) > signed(self.max * 2)
    }
}

pub(crate) fn add(time: Timestamp, delay: Duration) -> Timestamp {
    time.checked_add(signed(delay)).unwrap_or(Timestamp::MAX)
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("valid time")
    }

    #[test]
    fn delays_double_from_10_s_to_300_s_and_the_first_retry_is_free() {
        let mut backoff = Backoff::default();
        let mut now = 0;
        let mut delays = Vec::new();
        for _ in 0..7 {
            let until = backoff.blocked_until("c", at(now), at(now));
            delays.push(until.map_or(0, |until| until.as_second() - now));
            now = until.map_or(now, |until| until.as_second());
            backoff.raise("c", at(now), at(now));
        }
        assert_eq!(delays, [0, 10, 20, 40, 80, 160, 300]);
    }

    #[test]
    fn ten_quiet_minutes_make_the_next_retry_free() {
        let mut backoff = Backoff::default();
        backoff.raise("c", at(0), at(0));
        backoff.raise("c", at(10), at(10));
        assert_eq!(backoff.blocked_until("c", at(609), at(609)), Some(at(629)));
        assert_eq!(backoff.blocked_until("c", at(611), at(611)), None);
        assert_eq!(backoff.raise("c", at(611), at(611)).delay, DELAY_MIN);
    }
}
