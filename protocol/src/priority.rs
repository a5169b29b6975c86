//! Which messages go first when a link cannot carry all of them at once.
//!
//! [`crate::delivery`] writes by class; over QUIC every class has a stream of its own. Messages about one key (a
//! resource path) are always in the same class, so that their order holds although classes overtake each other. The
//! answers that nobody orders by key (acknowledgements, errors, replies without an object to store) are the exception:
//! they are matched by their parent and are all in [`Class::Lease`].

use crate::delivery::ack_required;
use crate::message::{Message, Operation};

/// A class of messages, the most urgent one first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Class {
    /// What keeps the link and the node alive: leases, acknowledgements, answers, certificates.
    Lease = 0,
    /// Pods and what they need before they can start: ConfigMaps, Secrets, tokens, volumes.
    Pod = 1,
    /// The Node object, its status, and the digest.
    Node = 2,
    /// Devices, their models, twins and membership.
    Twin = 3,
    /// Events.
    Event = 4,
    /// Everything else: watched objects, service account accesses, jobs, data of applications.
    Bulk = 5,
}

/// A number that is no class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there is no priority class {0}")]
pub struct ClassError(pub u8);

impl Class {
    /// Every class, the most urgent one first; each at the index of its number.
    pub const ALL: [Self; 6] =
        [Self::Lease, Self::Pod, Self::Node, Self::Twin, Self::Event, Self::Bulk];

    /// The class of a message.
    pub fn of(message: &Message) -> Self {
        let route = &message.route;
        let class = Self::of_key(&route.group, &route.resource);
        let answers = matches!(message.operation(), Some(Operation::Response | Operation::Error));
        if answers && route.resource != crate::digest::RESOURCE && !ack_required(message) {
            return match class {
                // The result of a call of an application can be as large as any other data of it.
                Self::Bulk if route.group == "user" => Self::Bulk,
                _ => Self::Lease,
            };
        }
        class
    }

    /// The class of every message that carries a state of this key, whatever its operation is.
    ///
    /// Resources of group `user` are names given by applications, not keys.
    pub fn of_key(group: &str, resource: &str) -> Self {
        if group == "user" {
            return Self::Bulk;
        }
        match resource {
            "node" => return Self::Lease,
            "k8s/ca.crt" | crate::digest::RESOURCE => return Self::Node,
            "membership" | "membership/detail" | "twin" => return Self::Twin,
            _ => {}
        }
        let mut segments = resource.split('/');
        let first = segments.next().unwrap_or_default();
        let kind = segments.next().unwrap_or_default();
        // `namespace/type[/name]` has no more; jobs have, and may be named `pod`.
        if segments.nth(1).is_some() {
            return if first == "device" { Self::Twin } else { Self::Bulk };
        }
        match kind {
            "lease" => Self::Lease,
            "certificate" | "bundle" if first == crate::certificate::NAMESPACE => Self::Lease,
            "pod"
            | "podpatch"
            | "podstatus"
            | "podlist"
            | "configmap"
            | "secret"
            | "serviceaccounttoken"
            | "persistentvolume"
            | "persistentvolumeclaim"
            | "volumeattachment"
            | "volume" => Self::Pod,
            "node" | "nodepatch" | "nodestatus" | "certificatesigningrequest" => Self::Node,
            "device" | "devicemodel" | "devicerule" => Self::Twin,
            "event" => Self::Event,
            _ => Self::Bulk,
        }
    }
}

impl From<Class> for u8 {
    fn from(class: Class) -> Self {
        class as Self
    }
}

impl TryFrom<u8> for Class {
    type Error = ClassError;

    fn try_from(number: u8) -> Result<Self, ClassError> {
        Self::ALL.get(usize::from(number)).copied().ok_or(ClassError(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn classes_are_numbered_from_the_most_urgent_one() {
        for (number, class) in (0u8..).zip(Class::ALL) {
            assert_eq!(u8::from(class), number);
            assert_eq!(Class::try_from(number), Ok(class));
        }
        assert_eq!(Class::try_from(6), Err(ClassError(6)));
        assert!(Class::ALL.is_sorted());
    }

    #[test]
    fn resources_of_the_protocol_have_their_class() {
        let check = |resource: &str, class| {
            assert_eq!(Class::of_key("resource", resource), class, "{resource}");
        };
        check("node", Class::Lease);
        check("kube-node-lease/lease/edge1", Class::Lease);
        check("skerry/certificate/edge1", Class::Lease);
        check("skerry/bundle/edge1", Class::Lease);
        check("default/pod/web", Class::Pod);
        check("default/configmap/web", Class::Pod);
        check("default/secret/web", Class::Pod);
        check("default/podstatus", Class::Pod);
        check("null/node/edge1", Class::Node);
        check("null/nodepatch/edge1", Class::Node);
        check(crate::digest::RESOURCE, Class::Node);
        check("membership", Class::Twin);
        check("default/device/thermometer", Class::Twin);
        check("device/default/thermometer/twin/edge_updated", Class::Twin);
        check("default/event/web.1", Class::Event);
        check("default/serviceaccountaccess/a", Class::Bulk);
        check("default/endpointslice/a", Class::Bulk);
        check("null", Class::Bulk);
        check("", Class::Bulk);
        check("operations.kubeedge.io/v1alpha2/nodeupgradejob/j/node/edge1", Class::Bulk);
        check("prepull/pod/node/edge1", Class::Bulk);
        check("device/pod/web", Class::Pod);
        check("skerry/pod/web", Class::Pod);
        assert_eq!(Class::of_key("user", "default/pod/web"), Class::Bulk);
    }

    #[test]
    fn key_has_one_class_for_every_operation_that_carries_its_state() {
        for resource in ["default/pod/a", "default/configmap/a", "null/node/n", "default/device/d"]
        {
            let classes = Operation::ALL.iter().map(|operation| {
                let body = json!({"metadata": {"uid": "u"}});
                Message::new(0, "edgecontroller", "resource", *operation, resource, &body)
            });
            let of_key = Class::of_key("resource", resource);
            for message in classes.filter(ack_required) {
                assert_eq!(Class::of(&message), of_key, "{:?}", message.route);
            }
        }
    }

    #[test]
    fn acknowledgements_and_replies_do_not_wait_behind_objects() {
        let push = Message::new(
            0,
            "edgecontroller",
            "resource",
            Operation::Update,
            "a/thing/b",
            &json!({}),
        );
        assert_eq!(Class::of(&push), Class::Bulk);
        assert_eq!(Class::of(&push.ack(0)), Class::Lease);
        let mut reply = push.response(0, &json!({"metadata": {}}));
        assert_eq!(Class::of(&reply), Class::Bulk, "an object to store");
        reply.route.group = "user".into();
        assert_eq!(Class::of(&reply), Class::Bulk, "data of an application");
        let digest =
            Message::new(0, "metamanager", "meta", Operation::Query, crate::digest::RESOURCE, "");
        assert_eq!(Class::of(&digest.ack(0)), Class::Node);
    }
}
