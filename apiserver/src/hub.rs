//! Committed changes on their way to watchers.
//!
//! The store's writer publishes after each commit, in revision order; every watch request subscribes to its resource,
//! the upkeep tasks to everything. A ring per resource holds what the slowest subscriber has not read; one that falls
//! behind by more than the ring is told so and has to start again from the log. Nothing here blocks the writer.

use crate::store::Key;
use serde_json::Value;
use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::broadcast;

/// Changes that a watcher may be behind before its watch ends; the objects are shared, not copied.
const RING: usize = 1024;
/// The same for the upkeep tasks, which resynchronise from the store when they lose events.
const FIREHOSE_RING: usize = 4096;

/// What happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    /// Created or changed.
    Put,
    /// Removed; the object is its last state with the revision of the removal.
    Delete,
}

/// One committed change.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) key: Key,
    pub(crate) revision: i64,
    pub(crate) op: Op,
    pub(crate) object: Arc<Value>,
    /// State before the change; `None` for a creation.
    pub(crate) before: Option<Arc<Value>>,
}

type Sender = broadcast::Sender<Arc<Event>>;
/// A subscriber's end.
pub(crate) type Receiver = broadcast::Receiver<Arc<Event>>;

/// Where the writer publishes and watchers subscribe.
pub(crate) struct Hub {
    resources: Mutex<HashMap<(Arc<str>, Arc<str>), Sender>>,
    firehose: Sender,
    published: AtomicI64,
}

impl Hub {
    pub(crate) fn new() -> Self {
        Self {
            resources: Mutex::default(),
            firehose: broadcast::channel(FIREHOSE_RING).0,
            published: AtomicI64::new(0),
        }
    }

    /// Changes of one resource from now on. Subscribe first, then read the store: what is in both has a revision that
    /// the reader has seen already.
    pub(crate) fn subscribe(&self, group: &Arc<str>, resource: &Arc<str>) -> Receiver {
        let mut resources = self.resources.lock().expect("no panic while held");
        resources
            .entry((group.clone(), resource.clone()))
            .or_insert_with(|| broadcast::channel(RING).0)
            .subscribe()
    }

    /// All changes from now on.
    pub(crate) fn subscribe_all(&self) -> Receiver {
        self.firehose.subscribe()
    }

    /// Newest revision of which every change has been handed to the subscribers.
    pub(crate) fn published(&self) -> i64 {
        self.published.load(Ordering::Acquire)
    }

    pub(crate) fn publish(&self, event: Event) {
        let event = Arc::new(event);
        let mut resources = self.resources.lock().expect("no panic while held");
        let place = (event.key.group.clone(), event.key.resource.clone());
        if let Some(sender) = resources.get(&place) {
            if sender.receiver_count() == 0 {
                resources.remove(&place); // nobody watches any more: give the ring's memory back
            } else {
                sender.send(event.clone()).ok();
            }
        }
        drop(resources);
        self.firehose.send(event).ok(); // an error means that nobody listens
    }

    pub(crate) fn advance(&self, revision: i64) {
        self.published.store(revision, Ordering::Release);
    }
}
