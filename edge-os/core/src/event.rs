//! Kubernetes events on their way up: repeated ones are counted, not repeated; the queue is bounded.
//!
//! An event has no reply and is worth less than anything else on the link. While the link is down the newest
//! [`QUEUE_MAX`] are kept; how many were dropped is told.
//!
//! Source: kubernetes/client-go tools/record/events_cache.go (aggregation); kubeedge/kubeedge,
//! edge/pkg/metamanager/client/event.go (messages).

use crate::Now;
use serde_json::{Value, json};
use skerry_protocol::Operation;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Events that wait for the link; more than two hours of a pod in crash loop.
pub const QUEUE_MAX: usize = 256;
/// Events that a repetition is counted on; older ones start again.
pub const KNOWN_MAX: usize = 128;
/// Events written at once.
const BURST: u32 = 25;
/// Time to earn one more.
const REFILL_INTERVAL: Duration = Duration::from_millis(200);

/// Something that happened to an object of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventReport {
    /// Kind of the object: `Pod` or `Node`.
    pub kind: &'static str,
    /// `metadata.namespace`, empty for a Node.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`; of a Node its name, as kubelet does.
    pub uid: String,
    /// `spec.containers{x}`, or empty.
    pub field_path: String,
    /// `Warning` rather than `Normal`.
    pub warning: bool,
    /// Machine-readable reason.
    pub reason: String,
    /// Text for people.
    pub message: String,
}

#[derive(Debug)]
struct Known {
    report: EventReport,
    name: String,
    first: String,
    last: String,
    count: u32,
    /// How often the cluster has been told; 0 while the insert waits.
    told: u32,
    queued: bool,
}

/// The events of one node.
#[derive(Debug)]
pub struct Events {
    node: String,
    known: VecDeque<Known>,
    queue: VecDeque<String>,
    dropped: u64,
    tokens: u32,
    refilled: Instant,
    names: u64,
}

impl Events {
    /// None yet. `seed` keeps names of two runs apart.
    pub fn new(node: &str, now: Instant, seed: u64) -> Self {
        Self {
            node: node.into(),
            known: VecDeque::new(),
            queue: VecDeque::new(),
            dropped: 0,
            tokens: BURST,
            refilled: now,
            names: seed,
        }
    }

    /// Takes one.
    pub fn push(&mut self, now: Now, report: EventReport) {
        let time = format!("{:.0}", now.wall);
        if let Some(known) = self.known.iter_mut().find(|known| known.report == report) {
            known.count = known.count.saturating_add(1);
            known.last = time;
            if !known.queued {
                known.queued = true;
                let name = known.name.clone();
                self.enqueue(name);
            }
            return;
        }
        self.names = self.names.wrapping_add(1);
        let unique = (now.wall.as_nanosecond() as u64) ^ self.names.rotate_left(40);
        let name = format!("{}.{unique:016x}", report.name);
        let (first, last) = (time.clone(), time);
        let known =
            Known { report, name: name.clone(), first, last, count: 1, told: 0, queued: true };
        self.known.push_back(known);
        if self.known.len() > KNOWN_MAX {
            // The oldest that waits for nothing, else the oldest.
            let oldest = self.known.iter().position(|known| !known.queued).unwrap_or(0);
            if let Some(lost) = self.known.remove(oldest)
                && lost.queued
            {
                self.queue.retain(|name| *name != lost.name);
                self.dropped += 1;
            }
        }
        self.enqueue(name);
    }

    /// Returns operation, resource and content of the next message, if one may be sent.
    pub fn poll(&mut self, now: Instant) -> Option<(Operation, String, Value)> {
        let earned = (now.saturating_duration_since(self.refilled).as_millis()
            / REFILL_INTERVAL.as_millis()) as u32;
        if earned > 0 {
            self.tokens = self.tokens.saturating_add(earned).min(BURST);
            self.refilled = now;
        }
        if self.tokens == 0 {
            return None;
        }
        loop {
            let name = self.queue.pop_front()?;
            let Some(known) = self.known.iter_mut().find(|known| known.name == name) else {
                continue;
            };
            known.queued = false;
            self.tokens -= 1;
            let event = event(&self.node, known);
            let namespace = event["metadata"]["namespace"].as_str().unwrap_or("default").to_owned();
            let resource = format!("{namespace}/event/{name}");
            let first = known.told == 0;
            known.told = known.count;
            if first {
                return Some((Operation::Insert, resource, event));
            }
            let patch = json!({"count": known.count, "lastTimestamp": known.last});
            let content = json!({"event": event, "patchData": patch.to_string()});
            return Some((Operation::Patch, resource, content));
        }
    }

    /// When to poll again.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let wait = if self.tokens > 0 { Duration::ZERO } else { REFILL_INTERVAL };
        (!self.queue.is_empty()).then(|| self.refilled + wait)
    }

    /// Returns how many were dropped since the last call.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    fn enqueue(&mut self, name: String) {
        self.queue.push_back(name);
        if self.queue.len() > QUEUE_MAX {
            self.queue.pop_front();
            self.dropped += 1;
        }
    }
}

fn event(node: &str, known: &Known) -> Value {
    let report = &known.report;
    let namespace = if report.namespace.is_empty() { "default" } else { report.namespace.as_str() };
    let mut object = json!({
        "kind": report.kind, "apiVersion": "v1", "name": report.name, "uid": report.uid,
    });
    if !report.namespace.is_empty() {
        object["namespace"] = json!(report.namespace);
    }
    if !report.field_path.is_empty() {
        object["fieldPath"] = json!(report.field_path);
    }
    json!({
        "kind": "Event", "apiVersion": "v1",
        "metadata": {"name": known.name, "namespace": namespace},
        "involvedObject": object,
        "type": if report.warning { "Warning" } else { "Normal" },
        "reason": report.reason,
        "message": report.message,
        "source": {"component": "kubelet", "host": node},
        "reportingComponent": "kubelet",
        "reportingInstance": node,
        "firstTimestamp": known.first,
        "lastTimestamp": known.last,
        "count": known.count,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(message: &str) -> EventReport {
        EventReport {
            kind: "Pod",
            namespace: "default".into(),
            name: "web".into(),
            uid: "u".into(),
            field_path: "spec.containers{c}".into(),
            warning: true,
            reason: "BackOff".into(),
            message: message.into(),
        }
    }

    fn now() -> Now {
        Now { mono: Instant::now(), wall: "2026-11-22T16:23:31Z".parse().expect("a time") }
    }

    #[test]
    fn repeated_event_is_counted_in_one_object() {
        let now = now();
        let mut events = Events::new("edge1", now.mono, 0);
        events.push(now, report("x"));
        events.push(now, report("x"));
        let (operation, resource, content) = events.poll(now.mono).expect("an event");
        assert_eq!(operation, Operation::Insert);
        assert_eq!(content["count"], 2);
        assert_eq!(content["lastTimestamp"], "2026-11-22T16:23:31Z");
        events.push(now, report("x"));
        let (operation, again, content) = events.poll(now.mono).expect("a patch");
        assert_eq!((operation, again), (Operation::Patch, resource));
        assert_eq!(content["patchData"], r#"{"count":3,"lastTimestamp":"2026-11-22T16:23:31Z"}"#);
        assert_eq!(events.poll(now.mono), None);
    }

    #[test]
    fn flood_is_bounded_and_what_was_dropped_is_told() {
        let now = now();
        let mut events = Events::new("edge1", now.mono, 0);
        for n in 0..1000 {
            events.push(now, report(&n.to_string()));
        }
        assert_eq!(events.take_dropped(), 1000 - KNOWN_MAX as u64);
        let mut sent = 0;
        while events.poll(now.mono).is_some() {
            sent += 1;
        }
        assert_eq!(sent, BURST);
        let later = events.poll_timeout().expect("more wait");
        let (.., newest_kept) = events.poll(later).expect("one token was earned");
        assert_eq!(newest_kept["message"], (1000 - KNOWN_MAX + BURST as usize).to_string());
    }
}
