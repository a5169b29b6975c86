//! One version of an object as it goes to nodes, and what tells two versions apart.

use super::key::{Key, Kind};
use serde_json::{Value, json};
use skerry_protocol::message::{Content, raw};
use skerry_protocol::{Message, Operation};
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;

const GROUP: &str = "resource";

/// Versions of the same content that an object remembers beside its own; a node that holds an earlier one gets the
/// object again when it connects. Status reports make them, and of the last one the node knows the version.
const SEEN_MAX: usize = 7;

/// One version of an object, ready to be sent; every message about it shares the text.
#[derive(Debug)]
pub(super) struct Version {
    pub(super) uid: Arc<str>,
    pub(super) resource_version: Arc<str>,
    /// The oldest version known to differ in nothing that matters.
    since: Option<u64>,
    /// Versions that were seen with this content, this one and up to [`SEEN_MAX`] before it.
    seen: Box<[u64]>,
    /// Of everything that matters.
    fingerprint: u64,
    pub(super) text: Content,
    pub(super) terminating: bool,
}

impl Version {
    /// Reads `object`. `None` when it is no object, or older than `old`.
    pub(super) fn read(kind: Kind, mut object: Value, old: Option<&Self>) -> Option<Arc<Self>> {
        let metadata = object.get_mut("metadata")?.as_object_mut()?;
        metadata.remove("managedFields");
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(Arc::<str>::from);
        let uid = text(metadata.get("uid"))?;
        let resource_version = text(metadata.get("resourceVersion"))?;
        let terminating = metadata.contains_key("deletionTimestamp");
        // Also of another uid: a watch that lags behind a read still tells of the object's predecessor.
        if let Some(old) = old
            && let (Some(held), Some(new)) =
                (number(&old.resource_version), number(&resource_version))
            && new < held
        {
            return None;
        }
        let old = old.filter(|old| old.uid == uid);
        object["kind"] = kind.api_kind().into();
        object["apiVersion"] = kind.api_version().into();
        match kind {
            // The node reported them itself, and they are most of a Node's text.
            Kind::Node => {
                if let Some(status) = object.get_mut("status").and_then(Value::as_object_mut) {
                    status.remove("images");
                }
            }
            // It names other nodes, which are none of this node's business.
            Kind::ServiceAccountAccess => {
                if let Some(status) = object.get_mut("status").and_then(Value::as_object_mut) {
                    status.insert("nodeList".into(), json!([]));
                }
            }
            _ => {}
        }
        let fingerprint = fingerprint(kind, &object);
        let same = old.filter(|old| old.fingerprint == fingerprint);
        let since = same.and_then(|old| old.since).or_else(|| number(&resource_version));
        let before = same.map(|old| &*old.seen).unwrap_or_default();
        let before = before.iter().copied().filter(|of| number(&resource_version) != Some(*of));
        let skipped = before.clone().count().saturating_sub(SEEN_MAX);
        let seen = before.skip(skipped).chain(number(&resource_version)).collect();
        // Objects that stay the same under a new version, as those with a lease in them do, keep their strings.
        let uid = old.map_or(uid, |old| Arc::clone(&old.uid));
        let text = raw(&object);
        Some(Arc::new(Self { uid, resource_version, since, seen, fingerprint, text, terminating }))
    }

    /// The same as something that no version is older than: the cluster went back to a time before it.
    pub(super) fn voided(&self) -> Arc<Self> {
        Arc::new(Self {
            uid: Arc::clone(&self.uid),
            resource_version: "".into(),
            since: None,
            seen: Box::default(),
            fingerprint: self.fingerprint,
            text: self.text.clone(),
            terminating: self.terminating,
        })
    }

    /// Whether the object had this content in `resource_version`, as far as is remembered.
    pub(super) fn is_exactly(&self, resource_version: &str) -> bool {
        *self.resource_version == *resource_version
            || number(resource_version).is_some_and(|of| self.seen.contains(&of))
    }

    /// Whether a node that was sent `resource_version` of the same object, when that was its newest, has everything that
    /// matters.
    pub(super) fn is_same_as(&self, resource_version: &str) -> bool {
        if *self.resource_version == *resource_version {
            return true;
        }
        let between = || {
            let held = number(resource_version)?;
            Some(self.since? <= held && held <= number(&self.resource_version)?)
        };
        between().unwrap_or(false)
    }

    pub(super) fn message(&self, key: &Key, operation: Operation, now_ms: i64) -> Message {
        message(key, operation, &self.text, now_ms).with_version(&*self.resource_version)
    }
}

/// An object that an application on a node watches, shared by all nodes that watch it.
#[derive(Debug)]
pub struct Watched {
    pub(super) api_version: Arc<str>,
    pub(super) kind: Arc<str>,
    pub(super) uid: Arc<str>,
    pub(super) resource_version: Arc<str>,
    pub(super) text: Content,
}

impl Watched {
    /// Reads `object`, whose `apiVersion` and `kind` have to be there; `metadata.managedFields` are left out. `None`
    /// when it has no `metadata.uid` or no `metadata.resourceVersion`, as an object of a Kubernetes API always has.
    pub fn read(mut object: Value) -> Option<Arc<Self>> {
        object.get_mut("metadata")?.as_object_mut()?.remove("managedFields");
        let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(Arc::from);
        Some(Arc::new(Self {
            api_version: text(&object["apiVersion"])?,
            kind: text(&object["kind"])?,
            uid: text(&object["metadata"]["uid"])?,
            resource_version: text(&object["metadata"]["resourceVersion"])?,
            text: raw(&object),
        }))
    }

    /// The object as it goes to nodes.
    pub fn text(&self) -> &Content {
        &self.text
    }

    pub(super) fn len(&self) -> usize {
        self.text.get().len()
    }

    pub(super) fn message(&self, key: &Key, operation: Operation, now_ms: i64) -> Message {
        message(key, operation, &self.text, now_ms).with_version(&*self.resource_version)
    }
}

/// A delete with the last object, or with a stub that names it. `absent_at` is a version at which a pod is known to have
/// been gone: our own edge takes no earlier one after that, which another hub that lags behind may still send.
pub(super) fn delete_message(
    key: &Key,
    uid: &str,
    last: Option<&Version>,
    absent_at: Option<u64>,
    now_ms: i64,
) -> Message {
    if let Some(last) = last.filter(|last| *last.uid == *uid) {
        return last.message(key, Operation::Delete, now_ms);
    }
    let mut metadata = json!({"name": key.name(), "uid": uid});
    if key.kind() != Kind::Node {
        metadata["namespace"] = key.namespace().into();
    }
    if let Some(at) = absent_at {
        metadata["resourceVersion"] = at.to_string().into();
    }
    let stub = match key.kind().is_custom() {
        // A KubeEdge edge removes its copy of these only when it can tell the type.
        true => json!({"apiVersion": key.kind().api_version(), "kind": key.kind().api_kind(),
            "metadata": metadata}),
        false => json!({"metadata": metadata}),
    };
    message(key, Operation::Delete, &raw(&stub), now_ms)
}

fn message(key: &Key, operation: Operation, content: &Content, now_ms: i64) -> Message {
    let mut message = Message::new(now_ms, key.kind().source(), GROUP, operation, key.path(), &());
    message.content = content.clone();
    message
}

/// Hash of everything in an object that a node cares about.
fn fingerprint(kind: Kind, object: &Value) -> u64 {
    let mut hasher = DefaultHasher::new();
    let fields = object.as_object().into_iter().flatten();
    for (name, value) in fields {
        match (name.as_str(), kind) {
            ("metadata", _) => {
                let left_out = ["resourceVersion", "managedFields", "generation"];
                let metadata = value.as_object().into_iter().flatten();
                for (name, value) in metadata.filter(|(name, _)| !left_out.contains(&name.as_str()))
                {
                    hasher.write(name.as_bytes());
                    hasher.write(value.to_string().as_bytes());
                }
            }
            ("status", Kind::Pod) => {
                let gates = &object["spec"]["readinessGates"];
                let gates = gates.as_array().into_iter().flatten();
                let gates: Vec<&Value> = gates.map(|gate| &gate["conditionType"]).collect();
                let conditions = value["conditions"].as_array().into_iter().flatten();
                for condition in conditions.filter(|condition| gates.contains(&&condition["type"]))
                {
                    hasher.write(condition.to_string().as_bytes());
                }
            }
            ("status", _) => {}
            _ => {
                hasher.write(name.as_bytes());
                hasher.write(value.to_string().as_bytes());
            }
        }
    }
    hasher.finish()
}

/// Resource versions of a Kubernetes API are decimal numbers that grow; anything else is only compared for equality.
pub(crate) fn number(resource_version: &str) -> Option<u64> {
    resource_version.parse().ok()
}
