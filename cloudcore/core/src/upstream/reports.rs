//! Reports about devices on their way to the cluster: at most one write per device and interval, with the last value.
//!
//! A report of a device that was quiet is written at once. What follows within [`WRITE_INTERVAL`] is merged, newest value
//! of each property, and written together when the interval ends; every request that is in a write is answered by it,
//! since an edge may forget what was answered. Our own edge sends about as seldom by itself; KubeEdge's sends every value.
//!
//! Bounds: [`REQUESTS_MAX`] requests per device wait for an answer, the oldest goes without (its edge asks again), and
//! devices that have been quiet are forgotten.
//!
//! No I/O, no clock. The handler of `cloudcore/` is the caller.

use serde_json::{Map, Value};
use skerry_protocol::Message;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Time between two writes about one device.
pub const WRITE_INTERVAL: Duration = Duration::from_secs(10);
/// Requests of one device that wait for the same write.
pub const REQUESTS_MAX: usize = 64;
/// How much earlier than that a report of an edge that keeps the interval may come.
const JITTER: Duration = Duration::from_millis(500);
/// Devices looked at before quiet ones are forgotten.
const PRUNE_EVERY: usize = 256;

/// What is to be written about one device.
#[derive(Debug, Clone, Default)]
pub struct Write {
    /// Who reports.
    pub node: String,
    /// Which device, in which run of numbers, if the node says so.
    pub epoch: String,
    /// KubeEdge's twins by property, the newest of each.
    pub twins: Map<String, Value>,
    /// Fields of the status, if a state was reported.
    pub state: Option<Value>,
    /// To be answered with what comes of it.
    pub requests: Vec<Message>,
}

/// What to do with a report.
#[derive(Debug)]
pub enum Taken {
    /// Write this now, then [`Reports::written`].
    Now(Box<Write>),
    /// Ask [`Reports::due`] at that time. Once per write that is not made now.
    At(Instant),
    /// It goes with another one.
    Joined,
}

#[derive(Debug, Default)]
struct Device {
    last: Option<Instant>,
    /// A write is under way.
    writing: bool,
    waiting: Option<Box<Write>>,
}

/// Reports of all nodes.
#[derive(Debug, Default)]
pub struct Reports {
    devices: BTreeMap<String, Device>,
    since_prune: usize,
}

impl Reports {
    /// Takes a report about the device `id`.
    pub fn take(&mut self, now: Instant, id: &str, report: Write) -> Taken {
        self.prune(now);
        let device = self.devices.entry(id.into()).or_default();
        if let Some(waiting) = &mut device.waiting {
            waiting.join(report);
            return Taken::Joined;
        }
        let next = device.last.map_or(now, |last| last + WRITE_INTERVAL);
        if next > now + JITTER || device.writing {
            device.waiting = Some(Box::new(report));
            return Taken::At(next.max(now));
        }
        // One that comes a little early counts as one in time, or all that do would be more than one per interval.
        device.last = Some(next.max(now));
        device.writing = true;
        Taken::Now(Box::new(report))
    }

    /// What is due about a device; `Err` with the time when it is, if that is later.
    pub fn due(&mut self, now: Instant, id: &str) -> Option<Result<Box<Write>, Instant>> {
        let device = self.devices.get_mut(id)?;
        let next = device.last.map_or(now, |last| last + WRITE_INTERVAL);
        if device.waiting.is_some() && (device.writing || next > now) {
            return Some(Err(next.max(now + JITTER)));
        }
        let write = device.waiting.take()?;
        device.last = Some(now);
        device.writing = true;
        Some(Ok(write))
    }

    /// The write has ended. One that was refused does not make the next report wait.
    pub fn written(&mut self, id: &str, done: bool) {
        if let Some(device) = self.devices.get_mut(id) {
            device.writing = false;
            if !done {
                device.last = None;
            }
        }
    }

    /// Devices of which something is remembered.
    pub fn len(&self) -> usize {
        self.devices.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    fn prune(&mut self, now: Instant) {
        self.since_prune += 1;
        if self.since_prune < PRUNE_EVERY.max(self.devices.len() / 2) {
            return;
        }
        self.since_prune = 0;
        self.devices.retain(|_, device| {
            let recent = device.last.is_some_and(|last| now < last + WRITE_INTERVAL);
            recent || device.writing || device.waiting.is_some()
        });
    }
}

impl Write {
    fn join(&mut self, newer: Self) {
        if (&self.node, &self.epoch) != (&newer.node, &newer.epoch) {
            // It was moved, or is another one by now: which of both is right is found out when it is written, and what
            // the other one said is not asked for again by anybody who may say it.
            *self = newer;
            return;
        }
        self.twins.extend(
            newer
                .twins
                .into_iter()
                .map(|(name, said)| {
                    // A report may say one side only.
                    match (self.twins.get(&name), said) {
                        (Some(Value::Object(known)), Value::Object(said)) => {
                            let mut both = known.clone();
                            both.extend(said);
                            (name, Value::Object(both))
                        }
                        (_, said) => (name, said),
                    }
                })
                .collect::<Vec<_>>(),
        );
        self.state = newer.state.or(self.state.take());
        self.requests.extend(newer.requests);
        let many = self.requests.len().saturating_sub(REQUESTS_MAX);
        self.requests.drain(..many);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn report(node: &str, twins: Value) -> Write {
        let request =
            Message::new(0, "twin", "resource", skerry_protocol::Operation::Update, "x", &());
        Write {
            node: node.into(),
            twins: twins.as_object().cloned().unwrap_or_default(),
            requests: vec![request],
            ..Write::default()
        }
    }

    fn actual(value: u32) -> Value {
        json!({"t": {"actual": {"value": value.to_string()}}})
    }

    #[test]
    fn an_edge_that_is_always_a_little_early_gets_no_more_than_one_write_per_interval() {
        let start = Instant::now();
        let mut reports = Reports::default();
        let (mut writes, mut due) = (0, None);
        // 9.6 s between reports, for 16 minutes.
        for number in 0..100_u32 {
            let now = start + Duration::from_millis(9_600) * number;
            if let Some(at) = due
                && at <= now
            {
                assert!(matches!(reports.due(at, "a/d"), Some(Ok(_))));
                due = None;
                reports.written("a/d", true);
                writes += 1;
            }
            match reports.take(now, "a/d", report("n", actual(number))) {
                Taken::Now(_) => {
                    reports.written("a/d", true);
                    writes += 1;
                }
                Taken::At(at) => due = Some(at),
                Taken::Joined => {}
            }
        }
        assert!((90..=97).contains(&writes), "{writes} writes in 950 s");
    }

    #[test]
    fn a_flood_of_reports_is_one_write_per_interval_and_the_last_value_is_right() {
        let start = Instant::now();
        let mut reports = Reports::default();
        let mut due = None;
        let mut writes = Vec::new();
        let mut answered = 0;
        for tick in 0..1000_u32 {
            let now = start + Duration::from_millis(100) * tick;
            if due.is_some_and(|at| at <= now) {
                match reports.due(now, "a/d") {
                    Some(Ok(write)) => {
                        writes.push((now, write));
                        reports.written("a/d", true);
                        due = None;
                    }
                    Some(Err(at)) => due = Some(at),
                    None => panic!("something waits"),
                }
            }
            match reports.take(now, "a/d", report("n", actual(tick))) {
                Taken::Now(write) => {
                    writes.push((now, write));
                    reports.written("a/d", true);
                }
                Taken::At(at) => due = Some(at),
                Taken::Joined => {}
            }
        }
        let end = start + Duration::from_secs(200);
        writes.push((end, reports.due(end, "a/d").expect("the rest").expect("due")));
        for pair in writes.windows(2) {
            assert!(pair[1].0 - pair[0].0 >= WRITE_INTERVAL - JITTER);
        }
        for (_, write) in &writes {
            answered += write.requests.len();
            assert!(write.requests.len() <= REQUESTS_MAX);
        }
        assert_eq!(writes.len(), 11);
        assert!(answered < 1000 && answered > 10 * (REQUESTS_MAX - 1));
        assert_eq!(writes.last().expect("some").1.twins["t"]["actual"]["value"], "999");
    }

    #[test]
    fn sides_and_state_are_merged_and_another_node_replaces_what_waits() {
        let now = Instant::now();
        let mut reports = Reports::default();
        assert!(matches!(reports.take(now, "a/d", report("n", actual(1))), Taken::Now(_)));
        assert!(
            matches!(reports.take(now, "a/d", report("n", actual(2))), Taken::At(_)),
            "one at a time"
        );
        let expected = json!({"t": {"expected": {"value": "5"}}, "u": null});
        assert!(matches!(reports.take(now, "a/d", report("n", expected)), Taken::Joined));
        let state = Write { state: Some(json!({"state": "ok"})), ..report("n", json!({})) };
        assert!(matches!(reports.take(now, "a/d", state), Taken::Joined));
        reports.written("a/d", true);
        assert!(matches!(reports.due(now, "a/d"), Some(Err(_))));
        let write = reports.due(now + WRITE_INTERVAL, "a/d").expect("waits").expect("due");
        assert_eq!(write.twins["t"], json!({"actual": {"value": "2"}, "expected": {"value": "5"}}));
        assert_eq!((write.state, write.requests.len()), (Some(json!({"state": "ok"})), 3));
        assert!(matches!(
            reports.take(now + WRITE_INTERVAL, "a/d", report("n", actual(3))),
            Taken::At(_)
        ));
        assert!(matches!(
            reports.take(now + WRITE_INTERVAL, "a/d", report("m", actual(4))),
            Taken::Joined
        ));
        reports.written("a/d", true);
        let write = reports.due(now + WRITE_INTERVAL * 2, "a/d").expect("waits").expect("due");
        assert_eq!((write.node.as_str(), write.requests.len()), ("m", 1));
    }

    #[test]
    fn a_refused_write_does_not_make_the_next_report_wait() {
        let now = Instant::now();
        let mut reports = Reports::default();
        for _ in 0..3 {
            assert!(matches!(reports.take(now, "a/d", report("n", actual(1))), Taken::Now(_)));
            reports.written("a/d", false);
        }
    }

    #[test]
    fn quiet_devices_are_forgotten() {
        let start = Instant::now();
        let mut reports = Reports::default();
        for number in 0..2000_u32 {
            let now = start + Duration::from_millis(100) * number;
            let id = format!("a/{number}");
            assert!(matches!(reports.take(now, &id, report("n", actual(1))), Taken::Now(_)));
            reports.written(&id, true);
        }
        assert!(reports.len() < 800, "{}", reports.len());
    }
}
