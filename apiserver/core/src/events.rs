//! The two forms of an Event: `v1` (core) and `events.k8s.io/v1`. Both are one object under different field names.
//!
//! The HTTP server stores the core form and converts at the edge for resources with
//! [`stored_in_core`](crate::catalog::Resource::stored_in_core).
//!
//! Source: Kubernetes, `pkg/apis/events/v1/conversion.go`.

use serde_json::Value;

/// Field of `events.k8s.io/v1`, field of `v1`. Fields that are not here have the same name in both.
const NAMES: &[(&str, &str)] = &[
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
];

/// An `events.k8s.io/v1` Event as a `v1` Event.
pub fn to_core(mut event: Value) -> Value {
    for (new, core) in NAMES {
        rename(&mut event, new, core);
    }
    event["apiVersion"] = "v1".into();
    event
}

/// A `v1` Event as an `events.k8s.io/v1` Event.
pub fn from_core(mut event: Value) -> Value {
    for (new, core) in NAMES {
        rename(&mut event, core, new);
    }
    event["apiVersion"] = "events.k8s.io/v1".into();
    event
}

fn rename(event: &mut Value, from: &str, to: &str) {
    if let Some(fields) = event.as_object_mut()
        && let Some(value) = fields.remove(from)
    {
        fields.insert(to.into(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn events_keep_everything_on_the_way_to_core_and_back() {
        let event = json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e"},
            "regarding": {"kind": "Pod", "name": "p"}, "note": "started", "reason": "Started",
            "reportingController": "edged", "reportingInstance": "n", "action": "Start",
            "eventTime": "2026-03-01T12:00:00.000000Z", "deprecatedCount": 2,
        });
        let core = to_core(event.clone());
        assert_eq!(core["apiVersion"], "v1");
        assert_eq!(core["involvedObject"]["name"], "p");
        assert_eq!(core["message"], "started");
        assert_eq!(core["count"], 2);
        assert_eq!(core.get("note"), None);
        assert_eq!(from_core(core), event);
    }
}
