//! Kubernetes events on their way into the outbox: repeated ones are counted, not repeated.
//!
//! An event becomes an outbox row when it happens for the first time. A repetition changes the count of that row while
//! it waits, or becomes a patch once the cluster has the event; at most one of either in [`REPEAT_INTERVAL`], later and
//! without a link far less often, so that a pod which crashes for days costs the disk little. A count that was not
//! written yet is lost with the process.
//!
//! Source: kubernetes/client-go tools/record/events_cache.go (aggregation); kubeedge/kubeedge,
//! edge/pkg/metamanager/client/event.go (messages).

use crate::Now;
use crate::outbox::{Item, Kind};
use serde_json::{Value, json};
use skerry_protocol::Operation;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Events that a repetition is counted on; older ones start again.
pub const KNOWN_MAX: usize = 128;
/// Shortest time between two rows for the repetitions of one event, for the first [`REPEATS_OFTEN`] of them.
pub const REPEAT_INTERVAL: Duration = Duration::from_secs(10);
/// Repetitions after which kubelet's limit for one object holds.
pub const REPEATS_OFTEN: u32 = 25;
/// The same after that, as kubelet's limit.
pub const REPEAT_INTERVAL_MANY: Duration = Duration::from_secs(300);
/// The same while there is no link: nobody sees the count, it is only to outlive a power cut.
pub const REPEAT_INTERVAL_OFFLINE: Duration = Duration::from_secs(600);

/// Something that happened to an object of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventReport {
    /// Kind of the object: `Pod`, `Node` or `DeviceRule`.
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

impl EventReport {
    fn api_version(&self) -> &'static str {
        if self.kind == "DeviceRule" { "fleet.skerry.dev/v1alpha1" } else { "v1" }
    }
}

#[derive(Debug)]
struct Known {
    report: EventReport,
    resource: String,
    name: String,
    first: String,
    last: String,
    count: u32,
    /// The count of the newest row; 0 before the first.
    written: u32,
    written_at: Instant,
    /// Whether the cluster has the event.
    told: bool,
}

impl Known {
    /// When its repetitions may be written.
    fn next_row(&self, connected: bool) -> Instant {
        let interval = match connected {
            true if self.count <= REPEATS_OFTEN => REPEAT_INTERVAL,
            true => REPEAT_INTERVAL_MANY,
            false => REPEAT_INTERVAL_OFFLINE,
        };
        self.written_at + interval
    }
}

/// The events of one node.
#[derive(Debug)]
pub struct Events {
    node: String,
    known: VecDeque<Known>,
    names: u64,
}

impl Events {
    /// None yet. `seed` keeps names of two runs apart.
    pub fn new(node: &str, seed: u64) -> Self {
        Self { node: node.into(), known: VecDeque::new(), names: seed }
    }

    /// Takes one; [`Self::poll_item`] has to be drained after it.
    pub fn push(&mut self, now: Now, report: EventReport) {
        let time = format!("{:.0}", now.wall);
        if let Some(known) = self.known.iter_mut().find(|known| known.report == report) {
            known.count = known.count.saturating_add(1);
            known.last = time;
            return;
        }
        self.names = self.names.wrapping_add(1);
        let unique = (now.wall.as_nanosecond() as u64) ^ self.names.rotate_left(40);
        let name = format!("{}.{unique:016x}", report.name);
        let known = Known {
            resource: format!("{}/event/{name}", namespace(&report)),
            report,
            name,
            first: time.clone(),
            last: time,
            count: 1,
            written: 0,
            written_at: now.mono,
            told: false,
        };
        self.known.push_back(known);
        if self.known.len() > KNOWN_MAX {
            // The oldest with nothing left to write, else the oldest, whose last repetitions are then not counted.
            let oldest = self.known.iter().position(|known| known.count == known.written);
            self.known.remove(oldest.unwrap_or(0));
        }
    }

    /// Returns the next row for the outbox, whose key is its resource. A row that `is_in_flight` is left alone: what
    /// comes after it depends on its answer.
    pub fn poll_item(
        &mut self,
        now: Instant,
        connected: bool,
        is_in_flight: impl Fn(&str) -> bool,
    ) -> Option<Item> {
        let due = |known: &&mut Known| {
            known.count > known.written
                && (known.written == 0 || now >= known.next_row(connected))
                && !is_in_flight(&known.resource)
        };
        let known = self.known.iter_mut().find(due)?;
        known.written = known.count;
        known.written_at = now;
        let event = event(&self.node, known);
        let (operation, content) = if known.told {
            let patch = json!({"count": known.count, "lastTimestamp": known.last});
            (Operation::Patch, json!({"event": event, "patchData": patch.to_string()}))
        } else {
            (Operation::Insert, event)
        };
        Some(Item {
            key: known.resource.clone(),
            kind: Kind::Event,
            operation,
            resource: known.resource.clone(),
            content: content.to_string().into(),
        })
    }

    /// The row with this key is done with: the cluster has the event.
    pub fn handle_told(&mut self, key: &str) {
        if let Some(known) = self.known.iter_mut().find(|known| known.resource == key) {
            known.told = true;
        }
    }

    /// When to poll again: when the next repetition may be written.
    pub fn poll_timeout(
        &self,
        connected: bool,
        is_in_flight: impl Fn(&str) -> bool,
    ) -> Option<Instant> {
        let waiting = self
            .known
            .iter()
            .filter(|known| known.count > known.written && !is_in_flight(&known.resource));
        waiting.map(|known| known.next_row(connected)).min()
    }
}

fn namespace(report: &EventReport) -> &str {
    if report.namespace.is_empty() { "default" } else { &report.namespace }
}

fn event(node: &str, known: &Known) -> Value {
    let report = &known.report;
    let mut object = json!({
        "kind": report.kind, "apiVersion": report.api_version(), "name": report.name, "uid": report.uid,
    });
    if !report.namespace.is_empty() {
        object["namespace"] = json!(report.namespace);
    }
    if !report.field_path.is_empty() {
        object["fieldPath"] = json!(report.field_path);
    }
    json!({
        "kind": "Event", "apiVersion": "v1",
        "metadata": {"name": known.name, "namespace": namespace(report)},
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

    fn content(item: &Item) -> Value {
        serde_json::from_str(&item.content).expect("JSON")
    }

    #[test]
    fn repeated_event_is_counted_in_one_object() {
        let now = now();
        let later = |s| now.mono + Duration::from_secs(s);
        let mut events = Events::new("edge1", 0);
        events.push(now, report("x"));
        events.push(now, report("x"));
        let insert = events.poll_item(now.mono, true, |_| false).expect("an event");
        assert_eq!(insert.operation, Operation::Insert);
        assert_eq!(content(&insert)["count"], 2);
        assert_eq!(content(&insert)["lastTimestamp"], "2026-11-22T16:23:31Z");
        // Repeated while it waits for the link: the same row with a higher count, but not each time.
        events.push(now, report("x"));
        assert_eq!(events.poll_item(now.mono, true, |_| false), None);
        assert_eq!(events.poll_timeout(true, |_| false), Some(now.mono + REPEAT_INTERVAL));
        let again = events.poll_item(later(10), true, |_| false).expect("the count");
        assert_eq!((&again.key, again.operation), (&insert.key, Operation::Insert));
        assert_eq!(content(&again)["count"], 3);
        // Repeated while it is on its way: nothing until the answer, then a patch.
        events.push(now, report("x"));
        assert_eq!(events.poll_item(later(20), true, |key| key == insert.key), None);
        events.handle_told(&insert.key);
        let patch = events.poll_item(later(20), true, |_| false).expect("a patch");
        assert_eq!((&patch.key, patch.operation), (&insert.key, Operation::Patch));
        assert_eq!(
            content(&patch)["patchData"],
            r#"{"count":4,"lastTimestamp":"2026-11-22T16:23:31Z"}"#
        );
        assert_eq!(events.poll_timeout(true, |_| false), None);
    }

    #[test]
    fn event_that_repeats_for_ever_is_written_now_and_then_and_at_once_when_there_is_a_link() {
        let start = now();
        let mut events = Events::new("edge1", 0);
        let mut rows = [0, 0];
        for (connected, rows) in [true, false].into_iter().zip(&mut rows) {
            for s in 0..3600 {
                let wait = Duration::from_secs(s + if connected { 0 } else { 3600 });
                events.push(Now { mono: start.mono + wait, wall: start.wall + wait }, report("x"));
                while let Some(item) = events.poll_item(start.mono + wait, connected, |_| false) {
                    events.handle_told(&item.key);
                    *rows += 1;
                }
            }
        }
        assert!((10..=15).contains(&rows[0]) && rows[1] <= 6, "an hour with and without: {rows:?}");
        let back = start.mono + Duration::from_secs(7200 + 300);
        let item = events.poll_item(back, true, |_| false).expect("the newest count");
        let patch = content(&item)["patchData"].as_str().expect("a text").to_owned();
        assert!(patch.contains(r#""count":7200"#), "{patch}");
    }

    #[test]
    fn memory_of_repetitions_is_bounded_and_each_event_is_written_once() {
        let now = now();
        let mut events = Events::new("edge1", 0);
        for n in 0..1000 {
            events.push(now, report(&n.to_string()));
            let item = events.poll_item(now.mono, true, |_| false).expect("a row");
            assert_eq!(content(&item)["message"], n.to_string());
            assert_eq!(events.poll_item(now.mono, true, |_| false), None);
        }
        assert_eq!(events.known.len(), KNOWN_MAX);
    }
}
