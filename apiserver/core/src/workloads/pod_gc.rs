//! Which pods are left over: bound to a node that is gone, or ended long ago in too large a number.

use super::object::{created, is_deleting, is_terminal, name, text, time, uid};
use jiff::Timestamp;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Time that a node has to be gone before its pods go, in seconds.
pub const QUARANTINE_SECONDS: i64 = 40;
/// Ended pods kept in the whole cluster. Lower than Kubernetes' 12500: everything here shares one small process.
pub const TERMINATED_MAX: usize = 1000;

/// Remembers since when nodes that pods name are missing.
#[derive(Debug)]
pub struct Quarantine {
    seconds: i64,
    missing: BTreeMap<String, Timestamp>,
}

impl Quarantine {
    /// A quarantine of so many seconds, usually [`QUARANTINE_SECONDS`].
    pub fn new(seconds: i64) -> Self {
        Self { seconds, missing: BTreeMap::new() }
    }

    /// The pods whose node has been gone for the quarantine, and when to look again.
    pub fn orphans<'a>(
        &mut self,
        nodes: impl IntoIterator<Item = &'a Value>,
        pods: impl IntoIterator<Item = &'a Value>,
        now: Timestamp,
    ) -> (Vec<&'a Value>, Option<Timestamp>) {
        let present: BTreeSet<&str> = nodes.into_iter().map(name).collect();
        let bound: Vec<&Value> = pods
            .into_iter()
            .filter(|pod| {
                let node = text(pod, "/spec/nodeName");
                !node.is_empty() && !present.contains(node)
            })
            .collect();
        let named: BTreeSet<&str> = bound.iter().map(|pod| text(pod, "/spec/nodeName")).collect();
        self.missing.retain(|node, _| named.contains(node.as_str()));
        for node in named {
            self.missing.entry(node.to_owned()).or_insert(now);
        }
        let seconds = self.seconds;
        let due = |since: &Timestamp| super::object::later(*since, seconds);
        let next = self.missing.values().map(due).filter(|at| *at > now).min();
        let orphans = bound
            .into_iter()
            .filter(|pod| {
                self.missing.get(text(pod, "/spec/nodeName")).is_some_and(|since| due(since) <= now)
            })
            .collect();
        (orphans, next)
    }
}

/// The oldest ended pods above [`TERMINATED_MAX`].
pub fn surplus<'a>(pods: impl IntoIterator<Item = &'a Value>, max: usize) -> Vec<&'a Value> {
    let mut ended: Vec<&Value> =
        pods.into_iter().filter(|pod| is_terminal(pod) && !is_deleting(pod)).collect();
    ended.sort_by_cached_key(|pod| {
        (time(pod, "/status/startTime").unwrap_or_else(|| created(pod)), uid(pod).to_owned())
    });
    ended.truncate(ended.len().saturating_sub(max));
    ended
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workloads::object::later;
    use serde_json::json;

    #[test]
    fn pods_of_a_missing_node_go_after_the_quarantine() {
        let start: Timestamp = "2026-01-01T00:00:00Z".parse().expect("a time");
        let node = json!({"metadata": {"name": "here"}});
        let pods = [
            json!({"metadata": {"name": "a"}, "spec": {"nodeName": "here"}}),
            json!({"metadata": {"name": "b"}, "spec": {"nodeName": "gone"}}),
            json!({"metadata": {"name": "c"}, "spec": {}}),
        ];
        let mut quarantine = Quarantine::new(QUARANTINE_SECONDS);
        let (orphans, next) = quarantine.orphans([&node], &pods, start);
        assert!(orphans.is_empty());
        assert_eq!(next, Some(later(start, 40)));
        let (orphans, next) = quarantine.orphans([&node], &pods, later(start, 40));
        assert_eq!(orphans.iter().map(|pod| name(pod)).collect::<Vec<_>>(), ["b"]);
        assert_eq!(next, None);
        let back = json!({"metadata": {"name": "gone"}});
        assert!(quarantine.orphans([&node, &back], &pods, later(start, 50)).0.is_empty());
        assert!(quarantine.orphans([&node], &pods, later(start, 60)).0.is_empty(), "counted anew");
    }

    #[test]
    fn the_oldest_ended_pods_above_the_limit_go() {
        let pod = |name: &str, hour: u8, phase: &str| {
            json!({"metadata": {"name": name, "creationTimestamp": format!("2026-01-01T0{hour}:00:00Z")},
                "status": {"phase": phase}})
        };
        let pods = [pod("new", 3, "Failed"), pod("old", 1, "Succeeded"), pod("runs", 0, "Running")];
        assert_eq!(surplus(&pods, 1).iter().map(|pod| name(pod)).collect::<Vec<_>>(), ["old"]);
        assert!(surplus(&pods, 2).is_empty());
    }
}
