//! The work of one controller: keys without duplicates, some of them for later.
//!
//! A key that is added while it is being worked on is given out again afterwards, never twice at the same time.

use super::cache::Key;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Keys waiting at once. Far above the objects that one process holds; beyond it the periodic look at everything
/// brings the key back.
const KEYS_MAX: usize = 200_000;
/// First pause after a failure; it doubles with each further one. Conflicts are usual and over at once.
const RETRY_FIRST: Duration = Duration::from_millis(5);
/// Longest pause after a failure.
const RETRY_MAX: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Key>,
    /// Keys in `ready`, or to be put there when their work is done.
    wanted: HashSet<Key>,
    busy: HashSet<Key>,
    later: BTreeSet<(Instant, Key)>,
    due: HashMap<Key, Instant>,
    failures: HashMap<Key, u32>,
}

/// A queue of keys.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Notify,
}

impl Queue {
    /// Asks for a look at `key` as soon as possible.
    pub(super) fn add(&self, key: Key) {
        let mut state = self.lock();
        if state.wanted.len() >= KEYS_MAX || !state.wanted.insert(key.clone()) {
            return;
        }
        if !state.busy.contains(&key) {
            state.ready.push_back(key);
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Asks for a look at `key` after `delay`; of several times the earliest counts.
    pub(super) fn add_after(&self, key: Key, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        let at = Instant::now() + delay;
        let mut state = self.lock();
        if let Some(due) = state.due.get(&key).copied() {
            if due <= at {
                return;
            }
            state.later.remove(&(due, key.clone()));
        } else if state.due.len() >= KEYS_MAX {
            return;
        }
        state.due.insert(key.clone(), at);
        state.later.insert((at, key));
        drop(state);
        self.changed.notify_one();
    }

    /// The next key; to be given back with [`Queue::done`].
    pub(super) async fn next(&self) -> Key {
        loop {
            let changed = self.changed.notified();
            let sleep = {
                let mut state = self.lock();
                state.promote(Instant::now());
                if let Some(key) = state.ready.pop_front() {
                    state.wanted.remove(&key);
                    state.busy.insert(key.clone());
                    if !state.ready.is_empty() {
                        // One notice may stand for several keys: pass it on to the next worker.
                        self.changed.notify_one();
                    }
                    return key;
                }
                state.later.first().map(|(at, _)| *at)
            };
            match sleep {
                Some(at) => {
                    let _ = tokio::time::timeout_at(at.into(), changed).await;
                }
                None => changed.await,
            }
        }
    }

    /// The work on `key` is over. After a failure it is tried again; returns after which pause.
    pub(super) fn done(&self, key: Key, failed: bool) -> Option<Duration> {
        let mut state = self.lock();
        state.busy.remove(&key);
        let pause = if failed {
            let count = state.failures.entry(key.clone()).or_default();
            *count = count.saturating_add(1);
            Some((RETRY_FIRST * 2u32.pow((*count - 1).min(14))).min(RETRY_MAX))
        } else {
            state.failures.remove(&key);
            None
        };
        if state.wanted.contains(&key) {
            state.ready.push_back(key.clone());
            drop(state);
            self.changed.notify_one();
        } else {
            drop(state);
        }
        if let Some(pause) = pause {
            self.add_after(key, pause);
        }
        pause
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn promote(&mut self, now: Instant) {
        while let Some((at, _)) = self.later.first()
            && *at <= now
        {
            let Some((_, key)) = self.later.pop_first() else { return };
            self.due.remove(&key);
            if self.wanted.insert(key.clone()) && !self.busy.contains(&key) {
                self.ready.push_back(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::new("", name)
    }

    #[tokio::test]
    async fn a_key_is_given_out_once_however_often_it_was_added() {
        let queue = Queue::default();
        for name in ["a", "b", "a"] {
            queue.add(key(name));
        }
        assert_eq!(queue.next().await, key("a"));
        assert_eq!(queue.next().await, key("b"));
        queue.add(key("a"));
        assert!(queue.lock().ready.is_empty(), "it is being worked on");
        queue.done(key("a"), false);
        assert_eq!(queue.next().await, key("a"));
    }

    #[tokio::test]
    async fn a_later_key_comes_at_its_earliest_time() {
        let queue = Queue::default();
        queue.add_after(key("a"), Duration::from_secs(3600));
        queue.add_after(key("a"), Duration::from_millis(10));
        queue.add_after(key("a"), Duration::from_secs(60));
        assert_eq!(queue.next().await, key("a"));
        assert!(queue.lock().later.is_empty());
    }

    #[tokio::test]
    async fn failures_make_the_pause_grow_and_a_success_forgets_them() {
        let queue = Queue::default();
        queue.add(key("a"));
        let key = queue.next().await;
        assert_eq!(queue.done(key.clone(), true), Some(RETRY_FIRST));
        assert_eq!(queue.done(key.clone(), true), Some(RETRY_FIRST * 2));
        for _ in 0..30 {
            queue.done(key.clone(), true);
        }
        assert_eq!(queue.done(key.clone(), true), Some(RETRY_MAX));
        assert_eq!(queue.done(key.clone(), false), None);
        assert_eq!(queue.done(key, true), Some(RETRY_FIRST));
    }

    #[tokio::test]
    async fn one_notice_wakes_as_many_workers_as_there_are_keys() {
        let queue = std::sync::Arc::new(Queue::default());
        let worker = || {
            let queue = queue.clone();
            tokio::spawn(async move { queue.next().await })
        };
        let (first, second) = (worker(), worker());
        tokio::task::yield_now().await;
        queue.add(key("a"));
        queue.add(key("b"));
        let mut names = [first.await.expect("a key"), second.await.expect("a key")];
        names.sort();
        assert_eq!(names, [key("a"), key("b")]);
    }
}
