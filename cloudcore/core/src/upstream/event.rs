//! Which events a node may record: those about its own Node and about pods bound to it.

use serde_json::Value;

/// What an event is about.
#[derive(Debug, PartialEq, Eq)]
pub enum Subject {
    /// The node that reports.
    Node,
    /// A pod; the caller has to see that it is bound to the node.
    Pod {
        /// Namespace.
        namespace: String,
        /// Name.
        name: String,
        /// Uid; empty when the event does not say.
        uid: String,
    },
}

/// Why a node may not record an event.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// It claims to come from elsewhere.
    #[error("node `{node}` may not report events of `{host}`")]
    Host {
        /// The node.
        node: String,
        /// Who the event says reports it.
        host: String,
    },
    /// It is about something that is not the node's.
    #[error("node `{node}` may not report events about {kind} `{name}`")]
    Subject {
        /// The node.
        node: String,
        /// `involvedObject.kind`.
        kind: String,
        /// `involvedObject.name`.
        name: String,
    },
    /// Event and subject are in different namespaces.
    #[error("an event in namespace `{namespace}` cannot be about an object in `{subject}`")]
    Namespace {
        /// The event's.
        namespace: String,
        /// The subject's.
        subject: String,
    },
    /// An existing event may be of another object.
    #[error("event `{event}` is not named after `{subject}`")]
    Name {
        /// The event's name.
        event: String,
        /// The subject's name.
        subject: String,
    },
    /// A patch that is more than a repetition.
    #[error("a patch of an event may not change `{field}`")]
    Patch {
        /// The field.
        field: String,
    },
}

/// Fields that a repetition of an event changes.
const PATCHABLE: [&str; 8] = [
    "count",
    "firstTimestamp",
    "lastTimestamp",
    "eventTime",
    "message",
    "series",
    "kind",
    "apiVersion",
];

/// Checks an event of `node` in `namespace`, and says what it is about.
///
/// # Errors
///
/// [`Denied`], when it is not about this node or a pod, or claims another reporter.
pub fn subject(node: &str, namespace: &str, event: &Value) -> Result<Subject, Denied> {
    for host in [&event["source"]["host"], &event["reportingInstance"]] {
        let host = text(host);
        if !host.is_empty() && host != node {
            return Err(Denied::Host { node: node.into(), host: host.into() });
        }
    }
    let involved = &event["involvedObject"];
    let (kind, name) = (text(&involved["kind"]), text(&involved["name"]));
    let group = text(&involved["apiVersion"]);
    let core = matches!(group, "" | "v1");
    match kind {
        "Node" if core && name == node => Ok(Subject::Node),
        "Pod" if core => {
            let subject = text(&involved["namespace"]);
            if subject != namespace {
                let (namespace, subject) = (namespace.into(), subject.into());
                return Err(Denied::Namespace { namespace, subject });
            }
            let (namespace, name) = (namespace.into(), name.into());
            Ok(Subject::Pod { namespace, name, uid: text(&involved["uid"]).into() })
        }
        _ => Err(Denied::Subject { node: node.into(), kind: kind.into(), name: name.into() }),
    }
}

/// Checks that an existing event may be changed: it bears the name of its subject, as client libraries name them.
///
/// # Errors
///
/// [`Denied::Name`]; the event could be of anything.
pub fn check_name(event: &str, subject: &Value) -> Result<(), Denied> {
    let subject = text(&subject["involvedObject"]["name"]);
    let rest = event.strip_prefix(subject).filter(|_| !subject.is_empty());
    match rest.is_some_and(|rest| rest.starts_with('.')) {
        true => Ok(()),
        false => Err(Denied::Name { event: event.into(), subject: subject.into() }),
    }
}

/// Checks that a patch only counts an event again.
///
/// # Errors
///
/// [`Denied::Patch`].
pub fn check_patch(patch: &Value) -> Result<(), Denied> {
    let fields = patch.as_object().into_iter().flatten();
    for (field, value) in fields {
        let harmless = PATCHABLE.contains(&field.as_str())
            || field.starts_with('$')
            || (field == "metadata" && only_version(value));
        if !harmless {
            return Err(Denied::Patch { field: field.clone() });
        }
    }
    Ok(())
}

fn only_version(metadata: &Value) -> bool {
    let mut fields = metadata.as_object().into_iter().flatten();
    metadata.is_object()
        && fields.all(|(field, _)| ["resourceVersion", "uid"].contains(&field.as_str()))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(event: Value) -> Result<Subject, Denied> {
        subject("edge1", "default", &event)
    }

    #[test]
    fn a_node_reports_about_itself_and_about_pods() {
        assert_eq!(
            check(json!({"involvedObject": {"kind": "Node", "name": "edge1"}})),
            Ok(Subject::Node)
        );
        let pod = json!({"source": {"host": "edge1"}, "involvedObject": {"kind": "Pod", "namespace": "default",
            "name": "p", "uid": "u", "apiVersion": "v1"}});
        let expected =
            Subject::Pod { namespace: "default".into(), name: "p".into(), uid: "u".into() };
        assert_eq!(check(pod), Ok(expected));
        assert!(matches!(
            check(json!({"involvedObject": {"kind": "Node", "name": "edge2"}})),
            Err(Denied::Subject { .. })
        ));
        let deployment =
            json!({"involvedObject": {"kind": "Deployment", "name": "d", "namespace": "default"}});
        assert!(matches!(check(deployment), Err(Denied::Subject { .. })));
        let custom = json!({"involvedObject": {"kind": "Pod", "apiVersion": "x.io/v1", "namespace": "default"}});
        assert!(matches!(check(custom), Err(Denied::Subject { .. })));
        let elsewhere =
            json!({"involvedObject": {"kind": "Pod", "name": "p", "namespace": "kube-system"}});
        assert!(matches!(check(elsewhere), Err(Denied::Namespace { .. })));
        let other = json!({"source": {"host": "edge2"}, "involvedObject": {"kind": "Node", "name": "edge1"}});
        assert!(matches!(check(other), Err(Denied::Host { .. })));
        assert!(matches!(check(json!({})), Err(Denied::Subject { .. })));
    }

    #[test]
    fn an_existing_event_is_only_counted_again() {
        let event = json!({"involvedObject": {"name": "web"}});
        assert_eq!(check_name("web.17a", &event), Ok(()));
        for name in ["web", "web2.17a", "other.17a"] {
            assert!(check_name(name, &event).is_err(), "{name}");
        }
        assert!(check_name(".17a", &json!({})).is_err());
        let patch =
            json!({"count": 2, "lastTimestamp": "t", "metadata": {"resourceVersion": null}});
        assert_eq!(check_patch(&patch), Ok(()));
        assert!(check_patch(&json!({"involvedObject": {}})).is_err());
        assert!(check_patch(&json!({"metadata": {"namespace": "x"}})).is_err());
    }
}
