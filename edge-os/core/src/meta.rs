//! What the hub wants of this node, as rows that outlive a power cut.
//!
//! A push becomes a [`Step`]: the row to write, and what follows from it. The caller makes the row durable first and
//! then hands the step to [`Meta::commit`], which gives the acknowledgement and the effects. A step whose write failed
//! is dropped: nothing is acknowledged, so the hub sends the object again.
//!
//! Guarantees, per object: in order, once, and never back after a delete. The rows themselves live in the store;
//! only identities are kept here.
//!
//! Differs from KubeEdge: a push of an object that this agent cannot use is acknowledged all the same, because one
//! unanswered message delays everything behind it by 25 s; an object older than the held one is not applied.
//!
//! Source: kubeedge/kubeedge, edge/pkg/metamanager/process.go, edge/pkg/edged/edged.go.

use crate::Now;
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use skerry_protocol::digest::{Digest, Held};
use skerry_protocol::resource::CLUSTER_SCOPE;
use skerry_protocol::{Message, Operation, ResourcePath};
use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

/// Objects held at most; a node runs about a hundred pods, so this is reached only by a hub gone wrong.
pub const OBJECTS_MAX: usize = 10_000;
/// Deletes remembered, oldest forgotten first; more than a node sees while a stale message can still be on its way.
pub const TOMBSTONES_MAX: usize = 512;

/// Kinds that are stored. Those after `node` are kept for parts of the agent that are still to come, so that a hub
/// which counts them as delivered is right.
const STORED_KINDS: [&str; 7] =
    ["pod", "configmap", "secret", "node", "device", "devicemodel", "serviceaccountaccess"];
/// Kinds of the digest exchange.
const DIGEST_KINDS: [&str; 4] = ["pod", "configmap", "secret", "node"];

/// One stored object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// `namespace/type/name`, the key.
    pub path: String,
    /// Type token.
    pub kind: String,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.resourceVersion`.
    pub rv: String,
    /// The object, without `metadata.managedFields`; of the own Node also without `status`.
    pub json: String,
}

/// A delete to remember.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tombstone {
    /// `metadata.uid` of the deleted object.
    pub uid: String,
    /// Lowest version with which the same object may come back.
    pub version_min: u64,
}

/// A change of the store; has to be durable before the step is committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Insert or replace.
    Put(Row),
    /// Remove the row of this path, if there is one, and remember the delete.
    Remove {
        /// Key of the row.
        path: String,
        /// Absent when neither the message nor the row told the uid.
        tombstone: Option<Tombstone>,
    },
}

/// What the rest of the agent has to know.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Run this pod, or run it in this new form.
    PodUpsert(Box<Pod>),
    /// Stop this pod and forget it.
    PodRemove {
        /// `metadata.namespace`.
        namespace: String,
        /// `metadata.name`.
        name: String,
        /// `metadata.uid`; another pod of the same name is not meant.
        uid: String,
    },
    /// A ConfigMap or Secret that pods may use has another content, or is gone.
    ObjectChanged {
        /// `configmap` or `secret`.
        kind: String,
        /// `metadata.namespace`.
        namespace: String,
        /// `metadata.name`.
        name: String,
    },
    /// The own Node as the cluster sees it.
    OwnNode(Box<Value>),
    /// The cluster has no Node for us any more.
    OwnNodeGone,
    /// Acknowledged, but of no use.
    Ignored {
        /// `route.resource`.
        resource: String,
        /// Why, for the log.
        reason: String,
    },
}

/// What to do about one message; see the head of this file.
#[derive(Debug, Default)]
pub struct Step {
    /// To be made durable first.
    pub write: Option<Write>,
    ack: Option<Message>,
    entry: Option<(String, Option<Entry>)>,
    effects: Vec<Effect>,
}

#[derive(Debug, Clone)]
struct Entry {
    held: Held,
    /// Of what a user or controller writes: metadata and spec, or data. Not of status and version.
    desired: u64,
}

/// Identities of everything stored for one node.
#[derive(Debug)]
pub struct Meta {
    node: String,
    entries: BTreeMap<String, Entry>,
    tombstones: VecDeque<Tombstone>,
    resyncing: bool,
}

impl Meta {
    /// Takes over what the store holds; returns the pods to run, without waiting for anybody.
    pub fn restore(
        node: &str,
        rows: impl IntoIterator<Item = Row>,
        tombstones: impl IntoIterator<Item = Tombstone>,
    ) -> (Self, Vec<Effect>) {
        let mut meta = Self {
            node: node.into(),
            entries: BTreeMap::new(),
            tombstones: tombstones.into_iter().collect(),
            resyncing: false,
        };
        let mut effects = Vec::new();
        for row in rows {
            let Ok(path) = row.path.parse::<ResourcePath>() else {
                effects.push(ignored(&row.path, "stored under a bad key"));
                continue;
            };
            let Ok(value) = serde_json::from_str::<Value>(&row.json) else {
                effects.push(ignored(&row.path, "stored content is not JSON"));
                continue;
            };
            let entry =
                Entry { held: Held { uid: row.uid, rv: row.rv }, desired: desired_digest(&value) };
            match path.kind() {
                "pod" => match serde_json::from_value(value) {
                    Ok(pod) => effects.push(Effect::PodUpsert(Box::new(pod))),
                    // Not held then, so that the hub gives it again.
                    Err(error) => {
                        effects.push(ignored(&row.path, &error.to_string()));
                        continue;
                    }
                },
                "node" if path.name() == Some(node) => {
                    effects.push(Effect::OwnNode(Box::new(value)));
                }
                _ => {}
            }
            meta.entries.insert(row.path, entry);
        }
        (meta, effects)
    }

    /// Number of objects held.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Paths of all objects of a kind.
    pub fn paths<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a str> {
        let is_kind = move |path: &&str| path.split('/').nth(1) == Some(kind);
        self.entries.keys().map(String::as_str).filter(is_kind)
    }

    /// Identity of the object at this path, if one is held.
    pub fn held(&self, path: &str) -> Option<&Held> {
        self.entries.get(path).map(|entry| &entry.held)
    }

    /// What to tell the hub after the link is up. Until [`Self::digest_answered`] the hub is believed also when it
    /// sends an older version: the cluster may have been restored from a backup.
    pub fn start_digest(&mut self) -> Digest {
        self.resyncing = true;
        let of_digest = |path: &str| {
            path.parse::<ResourcePath>().is_ok_and(|path| DIGEST_KINDS.contains(&path.kind()))
        };
        let objects = self
            .entries
            .iter()
            .filter(|(path, _)| of_digest(path))
            .map(|(path, entry)| (path.clone(), entry.held.clone()))
            .collect();
        Digest { objects }
    }

    /// The hub has sent every difference, or the link is gone.
    pub fn digest_answered(&mut self) {
        self.resyncing = false;
    }

    /// Decides about a message without parent in group `resource`.
    pub fn handle_push(&self, now: Now, message: &Message) -> Step {
        let mut step = self.decide_push(message).unwrap_or_else(|reason| Step {
            effects: vec![ignored(&message.route.resource, &reason)],
            ..Step::default()
        });
        step.ack = Some(message.ack(now.unix_ms()));
        step
    }

    /// Decides about an object that the hub gave as an answer; `path` is where it belongs.
    pub fn handle_answer(&self, path: &ResourcePath, object: Value) -> Step {
        let step = match path.kind() {
            // A status patch returns the pod: the row is brought up to date, but an answer never creates or replaces.
            "pod" if self.uid_at(path) != uid_of(&object) => Ok(Step::default()),
            _ => self.decide_put(path, object),
        };
        step.unwrap_or_else(|reason| Step {
            effects: vec![ignored(&path.to_string(), &reason)],
            ..Step::default()
        })
    }

    /// Takes over a step whose write is durable; returns the acknowledgement to send and what follows.
    pub fn commit(&mut self, step: Step) -> (Option<Message>, Vec<Effect>) {
        if let Some(Write::Remove { tombstone: Some(tombstone), .. }) = step.write {
            self.tombstones.retain(|known| known.uid != tombstone.uid);
            self.tombstones.push_back(tombstone);
            if self.tombstones.len() > TOMBSTONES_MAX {
                self.tombstones.pop_front();
            }
        }
        match step.entry {
            Some((path, Some(entry))) => {
                self.entries.insert(path, entry);
            }
            Some((path, None)) => {
                self.entries.remove(&path);
            }
            None => {}
        }
        (step.ack, step.effects)
    }

    fn decide_push(&self, message: &Message) -> Result<Step, String> {
        let path: ResourcePath =
            message.route.resource.parse().map_err(|error| format!("{error}"))?;
        if path.name().is_none() {
            return Err("a collection cannot be pushed".into());
        }
        match message.operation() {
            Some(Operation::Insert | Operation::Update) => {
                let object = message.content_as().map_err(|error| error.to_string())?;
                self.decide_put(&path, object)
            }
            Some(Operation::Delete) => {
                Ok(self.decide_delete(&path, &message.content_as().unwrap_or(Value::Null)))
            }
            _ => Err(format!("operation `{}` is not known here", message.route.operation)),
        }
    }

    fn decide_put(&self, path: &ResourcePath, mut object: Value) -> Result<Step, String> {
        let key = path.to_string();
        let kind = path.kind();
        if !STORED_KINDS.contains(&kind) {
            return Err(format!("objects of type `{kind}` have no use here"));
        }
        if !object.get("metadata").is_some_and(Value::is_object) {
            return Err("content is not an object with metadata".into());
        }
        let uid = uid_of(&object).unwrap_or_default().to_owned();
        let rv = text(&object, "/metadata/resourceVersion").to_owned();
        if text(&object, "/metadata/name") != path.name().unwrap_or_default() {
            return Err("name in the content is another than in the resource path".into());
        }
        match kind {
            "pod" if text(&object, "/spec/nodeName") != self.node => {
                return Err(format!(
                    "pod is for node `{}`, this is `{}`",
                    text(&object, "/spec/nodeName"),
                    self.node
                ));
            }
            "pod" if uid.is_empty() => return Err("pod has no uid".into()),
            "node" if path.name() != Some(&self.node) => {
                return Err(format!("this is node `{}`", self.node));
            }
            _ => {}
        }

        let known = self.entries.get(&key);
        if known.is_none() && self.entries.len() >= OBJECTS_MAX {
            return Err(format!("{OBJECTS_MAX} objects are held already"));
        }
        if let (Some(tombstone), Ok(version)) =
            (self.tombstones.iter().find(|tombstone| tombstone.uid == uid), rv.parse::<u64>())
            && version < tombstone.version_min
        {
            return Err(format!("version {rv} of an object that was deleted since"));
        }
        if let Some(known) = known.filter(|known| known.held.uid == uid) {
            if known.held.rv == rv {
                return Ok(Step::default()); // a repeated message
            }
            if !self.resyncing && is_older(&rv, &known.held.rv) {
                return Err(format!("version {rv} is older than {} held here", known.held.rv));
            }
        }

        if let Some(metadata) = object.pointer_mut("/metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
        let mut effects = Vec::new();
        let desired = desired_digest(&object);
        let changed = known.is_none_or(|known| known.held.uid != uid || known.desired != desired);
        match kind {
            "pod" => {
                if let Some(old) = known.filter(|known| known.held.uid != uid) {
                    effects.push(pod_remove(path, old.held.uid.clone()));
                }
                let pod: Pod =
                    serde_json::from_value(object.clone()).map_err(|error| error.to_string())?;
                if changed {
                    effects.push(Effect::PodUpsert(Box::new(pod)));
                }
            }
            "configmap" | "secret" if changed => effects.push(object_changed(path)),
            "node" => {
                effects.push(Effect::OwnNode(Box::new(object.clone())));
                if let Some(fields) = object.as_object_mut() {
                    fields.remove("status");
                }
            }
            _ => {}
        }
        let held = Held { uid: uid.clone(), rv: rv.clone() };
        // Each status report comes back as a Node with another version; a flash chip need not hear of that.
        let echo = kind == "node" && !changed;
        let write = (!echo).then(|| {
            let row =
                Row { path: key.clone(), kind: kind.into(), uid, rv, json: object.to_string() };
            Write::Put(row)
        });
        Ok(Step { write, ack: None, entry: Some((key, Some(Entry { held, desired }))), effects })
    }

    fn decide_delete(&self, path: &ResourcePath, object: &Value) -> Step {
        let key = path.to_string();
        let named = uid_of(object);
        let known = self.entries.get(&key);
        let hits = known.filter(|known| match path.kind() {
            "pod" => named.is_none_or(|uid| known.held.uid == uid),
            _ => true,
        });
        let version = text(object, "/metadata/resourceVersion").parse::<u64>().ok();
        let uid = named.or(hits.map(|known| known.held.uid.as_str())).filter(|uid| !uid.is_empty());
        let tombstone = uid.map(|uid| {
            let held = hits.and_then(|known| known.held.rv.parse::<u64>().ok());
            // A hub takes a ConfigMap away when no pod uses it and gives the same version again when one does. A pod
            // that was deleted with its last state never comes back; one that was only named may have been a mistake
            // of a hub that had not read everything yet.
            let version_min = match (path.kind(), version) {
                ("pod", Some(version)) => version.max(held.unwrap_or(0)) + 1,
                _ => version.or(held).unwrap_or(0),
            };
            Tombstone { uid: uid.to_owned(), version_min }
        });
        let Some(hit) = hits else {
            // Nothing to take away, but a late message may still try to bring it.
            let fresh =
                tombstone.filter(|new| !self.tombstones.iter().any(|old| old.uid == new.uid));
            let write = fresh.map(|tombstone| Write::Remove {
                path: format!("{key}?"), // no row has this key: another uid lives at the path
                tombstone: Some(tombstone),
            });
            return Step { write, ..Step::default() };
        };
        let effects = match path.kind() {
            "pod" => vec![pod_remove(path, hit.held.uid.clone())],
            "configmap" | "secret" => vec![object_changed(path)],
            "node" => vec![Effect::OwnNodeGone],
            _ => Vec::new(),
        };
        let write = Some(Write::Remove { path: key.clone(), tombstone });
        Step { write, ack: None, entry: Some((key, None)), effects }
    }

    fn uid_at(&self, path: &ResourcePath) -> Option<&str> {
        self.entries.get(&path.to_string()).map(|entry| entry.held.uid.as_str())
    }
}

fn pod_remove(path: &ResourcePath, uid: String) -> Effect {
    let (namespace, name) = (path.namespace().into(), path.name().unwrap_or_default().into());
    Effect::PodRemove { namespace, name, uid }
}

fn object_changed(path: &ResourcePath) -> Effect {
    let namespace =
        if path.namespace() == CLUSTER_SCOPE { String::new() } else { path.namespace().into() };
    Effect::ObjectChanged {
        kind: path.kind().into(),
        namespace,
        name: path.name().unwrap_or_default().into(),
    }
}

fn ignored(resource: &str, reason: &str) -> Effect {
    Effect::Ignored { resource: resource.into(), reason: reason.into() }
}

fn uid_of(object: &Value) -> Option<&str> {
    object.pointer("/metadata/uid").and_then(Value::as_str).filter(|uid| !uid.is_empty())
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// Whether both versions are numbers and `rv` is the lower one.
fn is_older(rv: &str, than: &str) -> bool {
    matches!((rv.parse::<u64>(), than.parse::<u64>()), (Ok(rv), Ok(than)) if rv < than)
}

/// Digest of an object without status, version and bookkeeping; only for comparisons inside this run.
fn desired_digest(object: &Value) -> u64 {
    const BOOKKEEPING: [&str; 3] = ["resourceVersion", "managedFields", "generation"];
    let mut hasher = DefaultHasher::new();
    for (key, value) in object.as_object().into_iter().flatten() {
        match (key.as_str(), value.as_object()) {
            ("status" | "kind" | "apiVersion", _) => {}
            ("metadata", Some(fields)) => fields
                .iter()
                .filter(|(field, _)| !BOOKKEEPING.contains(&field.as_str()))
                .for_each(|(field, value)| (field, value.to_string()).hash(&mut hasher)),
            _ => (key, value.to_string()).hash(&mut hasher),
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backoff::Random;
    use serde_json::json;

    fn now() -> Now {
        Now { mono: std::time::Instant::now(), wall: jiff::Timestamp::UNIX_EPOCH }
    }

    fn pod(name: &str, uid: &str, rv: u64) -> Value {
        json!({"kind": "Pod", "apiVersion": "v1",
            "metadata": {"name": name, "namespace": "default", "uid": uid, "resourceVersion": rv.to_string()},
            "spec": {"nodeName": "edge1", "containers": [{"name": "c", "image": "i"}]}})
    }

    fn configmap(rv: u64, value: &str) -> Value {
        json!({"kind": "ConfigMap", "apiVersion": "v1", "data": {"k": value},
            "metadata": {"name": "web", "namespace": "default", "uid": "cm", "resourceVersion": rv.to_string()}})
    }

    fn push(operation: Operation, resource: &str, content: &Value) -> Message {
        Message::new(0, "edgecontroller", "resource", operation, resource, content)
    }

    /// Applies a push whose write succeeds; returns the effects in short words.
    fn apply(
        meta: &mut Meta,
        operation: Operation,
        resource: &str,
        content: &Value,
    ) -> Vec<String> {
        let message = push(operation, resource, content);
        let step = meta.handle_push(now(), &message);
        let (ack, effects) = meta.commit(step);
        let ack = ack.expect("every push is acknowledged");
        assert_eq!(ack.header.parent_msg_id, message.header.msg_id);
        assert_eq!(ack.content.get(), "\"OK\"");
        effects.iter().map(short).collect()
    }

    fn short(effect: &Effect) -> String {
        match effect {
            Effect::PodUpsert(pod) => {
                format!("run {}", pod.metadata.uid.clone().unwrap_or_default())
            }
            Effect::PodRemove { uid, .. } => format!("stop {uid}"),
            Effect::ObjectChanged { kind, name, .. } => format!("changed {kind} {name}"),
            Effect::OwnNode(_) => "node".into(),
            Effect::OwnNodeGone => "node gone".into(),
            Effect::Ignored { .. } => "ignored".into(),
        }
    }

    fn empty() -> Meta {
        Meta::restore("edge1", [], []).0
    }

    #[test]
    fn insert_and_update_mean_the_same() {
        for operation in [Operation::Insert, Operation::Update] {
            let mut meta = empty();
            assert_eq!(
                apply(&mut meta, operation, "default/pod/web", &pod("web", "a", 5)),
                ["run a"]
            );
        }
    }

    #[test]
    fn repeated_and_late_messages_are_acknowledged_and_change_nothing() {
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, "default/configmap/web", &configmap(5, "new"));
        let again = push(Operation::Insert, "default/configmap/web", &configmap(5, "new"));
        assert_eq!(meta.handle_push(now(), &again).write, None);
        let late =
            apply(&mut meta, Operation::Update, "default/configmap/web", &configmap(4, "old"));
        assert_eq!(late, ["ignored"]);
        assert_eq!(meta.held("default/configmap/web").map(|held| held.rv.as_str()), Some("5"));
    }

    #[test]
    fn an_older_version_is_believed_while_the_hub_answers_a_digest() {
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, "default/configmap/web", &configmap(5, "new"));
        assert_eq!(meta.start_digest().objects.len(), 1);
        let restored =
            apply(&mut meta, Operation::Update, "default/configmap/web", &configmap(4, "old"));
        assert_eq!(restored, ["changed configmap web"]);
    }

    #[test]
    fn status_echo_of_a_pod_is_stored_and_wakes_nobody() {
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", "a", 5));
        let mut echo = pod("web", "a", 6);
        echo["status"] = json!({"phase": "Running"});
        let message = push(Operation::Update, "default/pod/web", &echo);
        let step = meta.handle_push(now(), &message);
        assert!(matches!(&step.write, Some(Write::Put(row)) if row.json.contains("Running")));
        assert_eq!(meta.commit(step).1, []);
    }

    #[test]
    fn node_echo_without_a_change_is_not_written() {
        let node = |rv: &str, beat: &str| {
            json!({"metadata": {"name": "edge1", "uid": "n", "resourceVersion": rv},
                "status": {"conditions": [{"type": "Ready", "lastHeartbeatTime": beat}]}})
        };
        let mut meta = empty();
        let first = push(Operation::Update, "null/node/edge1", &node("1", "a"));
        let step = meta.handle_push(now(), &first);
        assert!(step.write.is_some());
        meta.commit(step);
        let echo = push(Operation::Update, "null/node/edge1", &node("2", "b"));
        let step = meta.handle_push(now(), &echo);
        assert_eq!(step.write, None);
        meta.commit(step);
        assert_eq!(meta.held("null/node/edge1").map(|held| held.rv.as_str()), Some("2"));
    }

    #[test]
    fn deleted_pod_never_comes_back_with_an_old_version() {
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", "a", 5));
        let gone = apply(&mut meta, Operation::Delete, "default/pod/web", &pod("web", "a", 7));
        assert_eq!(gone, ["stop a"]);
        for rv in [5, 6, 7] {
            let late = apply(&mut meta, Operation::Update, "default/pod/web", &pod("web", "a", rv));
            assert_eq!(late, ["ignored"]);
        }
        let next = apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", "b", 9));
        assert_eq!(next, ["run b"]);
    }

    #[test]
    fn tombstones_survive_a_restart() {
        let tombstone = Tombstone { uid: "a".into(), version_min: 8 };
        let (mut meta, _) = Meta::restore("edge1", [], [tombstone]);
        let late = apply(&mut meta, Operation::Update, "default/pod/web", &pod("web", "a", 7));
        assert_eq!(late, ["ignored"]);
    }

    #[test]
    fn configmap_taken_away_may_be_given_again_in_the_same_version() {
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, "default/configmap/web", &configmap(5, "x"));
        apply(&mut meta, Operation::Delete, "default/configmap/web", &configmap(5, "x"));
        let again =
            apply(&mut meta, Operation::Update, "default/configmap/web", &configmap(5, "x"));
        assert_eq!(again, ["changed configmap web"]);
    }

    #[test]
    fn delete_of_another_uid_leaves_the_pod_and_its_row() {
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", "b", 9));
        let stub = json!({"metadata": {"name": "web", "namespace": "default", "uid": "a"}});
        assert_eq!(apply(&mut meta, Operation::Delete, "default/pod/web", &stub), [] as [&str; 0]);
        assert!(meta.held("default/pod/web").is_some());
        assert_eq!(
            apply(&mut meta, Operation::Delete, "default/pod/web", &Value::Null),
            ["stop b"]
        );
    }

    #[test]
    fn recreated_pod_stops_the_old_one_first() {
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", "a", 5));
        let effects = apply(&mut meta, Operation::Update, "default/pod/web", &pod("web", "b", 8));
        assert_eq!(effects, ["stop a", "run b"]);
    }

    #[test]
    fn what_cannot_be_used_is_acknowledged_and_not_stored() {
        let mut meta = empty();
        let mut foreign = pod("web", "a", 5);
        foreign["spec"]["nodeName"] = json!("edge2");
        let mut broken = pod("web", "a", 5);
        broken["spec"]["containers"] = json!("none");
        for (resource, content) in [
            ("default/pod/web", foreign),
            ("default/pod/web", broken),
            ("default/pod/other", pod("web", "a", 5)),
            ("default/pod/web", json!("OK")),
            ("default/pod/web", Value::Null),
            ("default/rollout/web", json!({"metadata": {"name": "web"}})),
            ("null/node/edge2", json!({"metadata": {"name": "edge2"}})),
            ("default/pod", Value::Null),
            ("", Value::Null),
        ] {
            assert_eq!(
                apply(&mut meta, Operation::Insert, resource, &content),
                ["ignored"],
                "{resource}"
            );
        }
        assert!(meta.is_empty());
    }

    #[test]
    fn a_failed_write_leaves_everything_as_it_was() {
        let meta = empty();
        let message = push(Operation::Insert, "default/pod/web", &pod("web", "a", 5));
        drop(meta.handle_push(now(), &message));
        assert!(meta.is_empty());
    }

    #[test]
    fn answers_never_create_a_pod() {
        let meta = empty();
        let path = "default/pod/web".parse().expect("path");
        assert_eq!(meta.handle_answer(&path, pod("web", "a", 5)).write, None);
    }

    #[test]
    fn tombstones_are_bounded() {
        let mut meta = empty();
        for n in 0..(TOMBSTONES_MAX + 10) {
            let uid = format!("u{n}");
            apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", &uid, 5));
            apply(&mut meta, Operation::Delete, "default/pod/web", &pod("web", &uid, 6));
        }
        assert_eq!(meta.tombstones.len(), TOMBSTONES_MAX);
    }

    /// A hub with a few objects and a link that repeats; a store that fails; an agent that is killed. After the hub
    /// has sent everything once more, both agree, and no pod was ever run again after its delete.
    #[test]
    fn any_history_with_repeats_failures_and_kills_ends_in_agreement() {
        for seed in 0..100 {
            let mut random = Random::new(seed);
            let mut hub: BTreeMap<String, Value> = BTreeMap::new();
            let mut sent: Vec<Message> = Vec::new();
            let mut rows: BTreeMap<String, Row> = BTreeMap::new();
            let mut tombstones: Vec<Tombstone> = Vec::new();
            let mut meta = empty();
            let mut stopped: Vec<String> = Vec::new();
            let mut rv = 10;

            let mut deliver = |meta: &mut Meta, message: &Message, fails: bool| {
                let step = meta.handle_push(now(), message);
                if fails && step.write.is_some() {
                    return false;
                }
                match &step.write {
                    Some(Write::Put(row)) => drop(rows.insert(row.path.clone(), row.clone())),
                    Some(Write::Remove { path, tombstone }) => {
                        rows.remove(path);
                        tombstones.extend(tombstone.clone());
                    }
                    None => {}
                }
                for effect in meta.commit(step).1 {
                    match effect {
                        Effect::PodUpsert(pod) => {
                            let uid = pod.metadata.uid.unwrap_or_default();
                            assert!(!stopped.contains(&uid), "seed {seed}: {uid} came back");
                        }
                        Effect::PodRemove { uid, .. } => stopped.push(uid),
                        _ => {}
                    }
                }
                if random_kill(seed, rows.len()) {
                    *meta = Meta::restore("edge1", rows.values().cloned(), tombstones.clone()).0;
                }
                true
            };
            for _ in 0..60 {
                let name = format!("p{}", random.below(3));
                let path = format!("default/pod/{name}");
                rv += 1;
                let message = match (hub.get(&path).cloned(), random.below(3)) {
                    (Some(mut object), 0) => {
                        object["metadata"]["resourceVersion"] = json!(rv.to_string());
                        hub.remove(&path);
                        push(Operation::Delete, &path, &object)
                    }
                    (Some(mut object), _) => {
                        object["metadata"]["resourceVersion"] = json!(rv.to_string());
                        hub.insert(path.clone(), object.clone());
                        push(Operation::Update, &path, &object)
                    }
                    (None, _) => {
                        let object = pod(&name, &format!("{name}-{rv}"), rv);
                        hub.insert(path.clone(), object.clone());
                        push(Operation::Insert, &path, &object)
                    }
                };
                // The hub repeats until it is acknowledged; then a stale copy may still arrive.
                while !deliver(&mut meta, &message, random.below(4) == 0) {}
                sent.push(message);
                if random.below(2) == 0 {
                    let old = random.below(sent.len() as u64) as usize;
                    let stale = &sent[old];
                    if stale.operation() != Some(Operation::Delete) {
                        deliver(&mut meta, &sent[old].clone(), false);
                    }
                }
            }
            let mine: Vec<_> = meta.start_digest().objects.into_iter().collect();
            let theirs: Vec<_> = hub
                .iter()
                .map(|(path, object)| {
                    let held = Held {
                        uid: text(object, "/metadata/uid").into(),
                        rv: text(object, "/metadata/resourceVersion").into(),
                    };
                    (path.clone(), held)
                })
                .collect();
            assert_eq!(mine, theirs, "seed {seed}");
        }
    }

    fn random_kill(seed: u64, rows: usize) -> bool {
        (seed + rows as u64).is_multiple_of(3)
    }
}
