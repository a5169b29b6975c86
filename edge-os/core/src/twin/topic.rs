//! KubeEdge's MQTT topics about devices and nodes, taken apart segment by segment.
//!
//! A device is `<namespace>/<name>`, two levels of a topic; before KubeEdge 1.17 it was one, and programs of that time
//! are still understood ([`Place::Legacy`]). Names are compared as whole segments: a namespace that is called `device`
//! or `e` is one like any other.
//!
//! Callers: [`super::Twin`] for what comes in and goes out, the bus for what to follow.
//!
//! Source: kubeedge/kubeedge, edge/pkg/eventbus/mqtt, edge/pkg/devicetwin/dtcommon/common.go.

use std::fmt;

/// What the bus follows on the broker beside the topics of rules.
pub const FOLLOWED: [&str; 8] = [
    "$hw/events/device/+/+/twin/+",
    "$hw/events/device/+/+/state/update",
    "$hw/events/device/+/twin/+",
    "$hw/events/device/+/state/update",
    "$hw/events/node/+/membership/get",
    "$hw/events/upload/#",
    "SYS/dis/upload_records",
    "+/user/#",
];
/// First levels of everything about devices.
pub const DEVICES: &str = "$hw/events/device";
/// First levels of everything about the node.
pub const NODES: &str = "$hw/events/node";

/// How a topic names a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place<'a> {
    /// `<namespace>/<name>`
    Device {
        /// `metadata.namespace`.
        namespace: &'a str,
        /// `metadata.name`.
        name: &'a str,
    },
    /// `<name>`, as before KubeEdge 1.17.
    Legacy(&'a str),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device { namespace, name } => write!(f, "{namespace}/{name}"),
            Self::Legacy(name) => f.write_str(name),
        }
    }
}

/// What a message on the broker wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request<'a> {
    /// Values of properties.
    TwinUpdate(Place<'a>),
    /// All properties.
    TwinGet(Place<'a>),
    /// The state of the device.
    StateUpdate(Place<'a>),
    /// The devices of the node.
    MembershipGet,
    /// It is about devices or the node and nothing that is taken from the broker.
    Unknown,
    /// It is not about devices: data for a rule of the cloud.
    Upload,
}

/// Reads a topic.
pub fn parse(topic: &str) -> Request<'_> {
    let segments: Vec<&str> = topic.split('/').collect();
    match segments.as_slice() {
        ["$hw", "events", "node", node, "membership", "get"] if !node.is_empty() => {
            Request::MembershipGet
        }
        ["$hw", "events", "device", rest @ ..] => device(rest),
        ["$hw", "events", "node", ..] => Request::Unknown,
        _ => Request::Upload,
    }
}

fn device<'a>(rest: &[&'a str]) -> Request<'a> {
    let (place, verb) = match rest {
        [namespace, name, about, verb] => (Place::Device { namespace, name }, [*about, *verb]),
        [name, about, verb] => (Place::Legacy(name), [*about, *verb]),
        _ => return Request::Unknown,
    };
    let named = match place {
        Place::Device { namespace, name } => !namespace.is_empty() && !name.is_empty(),
        Place::Legacy(name) => !name.is_empty(),
    };
    match verb {
        ["twin", "update"] if named => Request::TwinUpdate(place),
        ["twin", "get"] if named => Request::TwinGet(place),
        ["state", "update"] if named => Request::StateUpdate(place),
        // `twin/cloud_updated` is the hub's voice and no client of the broker may speak with it.
        _ => Request::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_are_read_by_segment_whatever_the_names_are() {
        for namespace in ["device", "e", "events", "$hw", "twin"] {
            let topic = format!("$hw/events/device/{namespace}/twin/twin/update");
            let place = Place::Device { namespace, name: "twin" };
            assert_eq!(parse(&topic), Request::TwinUpdate(place));
        }
        let place = Place::Device { namespace: "a", name: "b" };
        assert_eq!(parse("$hw/events/device/a/b/twin/get"), Request::TwinGet(place));
        assert_eq!(parse("$hw/events/device/a/b/state/update"), Request::StateUpdate(place));
        let old = Place::Legacy("b");
        assert_eq!(parse("$hw/events/device/b/twin/update"), Request::TwinUpdate(old));
        assert_eq!(parse("$hw/events/node/n/membership/get"), Request::MembershipGet);
    }

    #[test]
    fn nobody_on_the_broker_speaks_for_the_hub() {
        for topic in [
            "$hw/events/device/a/b/twin/cloud_updated",
            "$hw/events/device/b/twin/cloud_updated",
            "$hw/events/node/n/membership/updated",
            "$hw/events/device//b/twin/update",
            "$hw/events/device/a/b/twin/update/result",
            "$hw/events/device",
        ] {
            assert_eq!(parse(topic), Request::Unknown, "{topic}");
        }
        for topic in ["plant/user/x", "$hw/events/upload/x", "SYS/dis/upload_records", ""] {
            assert_eq!(parse(topic), Request::Upload, "{topic}");
        }
    }
}
