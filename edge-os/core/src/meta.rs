//! What the hub wants of this node, as rows that outlive a power cut.
//!
//! A push becomes a [`Step`]: the row to write, and what follows from it. The caller makes the row durable first and
//! then hands the step to [`Meta::commit`], which gives the acknowledgement and the effects. A step whose write failed
//! is dropped: nothing is acknowledged, so the hub sends the object again.
//!
//! Guarantees, per object: in order, once, and never back after a delete. The rows themselves live in the store;
//! only identities are kept here.
//!
//! # When the cluster goes back
//!
//! A version that is older than the held one, or than a delete, is late word as a rule: of a hub whose watch lags, or
//! of a message that was written twice. After the cluster was restored from a backup it is the truth. Only the API can
//! tell the two apart, and a hub asks it when a digest names a newer version than its watch has shown
//! (`cloudcore/core/src/downstream.rs`). So:
//!
//! 1. What is refused for its version is in dispute, unless it says the same as what is held.
//! 2. A dispute that no later word of the hub has ended within [`DISPUTE_WAIT`] needs another digest
//!    ([`Meta::digest_due`]), and the caller opens a new connection for it: on the old one more late word may be on
//!    its way.
//! 3. That digest names what is in dispute. What comes in answer is believed, be it older than what is held and was
//!    named, or than a delete that was in dispute; what became newer since is not touched.
//! 4. What has come back is held like anything else, and its delete is forgotten.
//! 5. A pod that had been told to end and comes back without an end begins anew: it is removed and run again.
//!
//! A cloud that takes no digest, KubeEdge's, cannot be asked; what it gives below a delete stays refused.
//!
//! Every kind of object is stored: those that this agent acts on, those that parts still to come will, and whatever the
//! node's own API watches. Who sent it matters only for foreign pods and nodes, which are stored when they were watched
//! and refused otherwise; all else is decided by type, because a hub replays some kinds under another sender.
//!
//! Differs from KubeEdge: a push of an object that this agent cannot use is acknowledged all the same, because one
//! unanswered message delays everything behind it by 25 s; an object older than the held one is not applied.
//!
//! Source: kubeedge/kubeedge, edge/pkg/metamanager/process.go, edge/pkg/edged/edged.go,
//! edge/pkg/edgehub/messagehandler; which messages want an acknowledgement: cloud/pkg/cloudhub/dispatcher.

use crate::Now;
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use skerry_protocol::digest::{Digest, Held};
use skerry_protocol::resource::CLUSTER_SCOPE;
use skerry_protocol::{Message, Operation, ResourcePath};
use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

/// Objects held at most; a node runs about a hundred pods, so this is reached only by a hub gone wrong.
pub const OBJECTS_MAX: usize = 10_000;
/// Deletes remembered, oldest forgotten first; more than a node sees while a stale message can still be on its way.
pub const TOMBSTONES_MAX: usize = 512;

/// Objects of one kind held at most, so that a watch of a large cluster leaves room for what the node needs.
pub const KIND_OBJECTS_MAX: usize = 5_000;

/// Objects in dispute at most; what is refused beyond that is in dispute when it is refused again.
pub const DISPUTES_MAX: usize = 512;
/// How long the hub has to end a dispute by itself: as long as a watch lags and a message is under way.
pub const DISPUTE_WAIT: Duration = Duration::from_secs(20);

/// Types that are no objects but requests and reports about some, and events, which nobody reads on a node.
const UNSTORED_KINDS: [&str; 10] = [
    "certificatesigningrequest",
    "event",
    "nodepatch",
    "nodestatus",
    "podlist",
    "podpatch",
    "podstatus",
    "rulestatus",
    "serviceaccounttoken",
    "volume",
];
/// Type token, `apiVersion` and `kind` of the objects that a cloud gives without saying what they are.
const UNNAMED_TYPES: [(&str, &str, &str); 7] = [
    ("pod", "v1", "Pod"),
    ("node", "v1", "Node"),
    ("configmap", "v1", "ConfigMap"),
    ("secret", "v1", "Secret"),
    ("persistentvolume", "v1", "PersistentVolume"),
    ("persistentvolumeclaim", "v1", "PersistentVolumeClaim"),
    ("volumeattachment", "storage.k8s.io/v1", "VolumeAttachment"),
];
/// Types of what the hub gives because the node needs it.
const PLACED_KINDS: [&str; 8] = [
    "node",
    "configmap",
    "secret",
    "pod",
    "devicemodel",
    "device",
    "devicerule",
    "serviceaccountaccess",
];
/// Who pushes what the node's own API watches.
const WATCH_SOURCE: &str = "dynamiccontroller";
/// Volume requests of the cloud's CSI driver.
const VOLUME_OPERATIONS: [&str; 4] =
    ["createvolume", "deletevolume", "controllerpublishvolume", "controllerunpublishvolume"];
/// What whoever asks for such a thing is told.
const NO_VOLUMES: &str = "CSI volume operations are not supported by this edge agent";

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
    /// Insert or replace; a delete of the same object that is remembered is to be forgotten.
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
    /// An object that is neither pod nor node has another content, or is gone.
    ObjectChanged {
        /// Type token: `configmap`, `secret`, `device`, anything that is watched.
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
    /// A message for the device twin, the buses, node jobs or the node's own API, as it came; it wants no acknowledgement.
    HandOn(Box<Message>),
    /// Of no use.
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
    dispute: Option<(String, Option<Dispute>)>,
    effects: Vec<Effect>,
}

/// The hub has sent an object in a version that was refused, and has not said anything else of it since.
#[derive(Debug, Clone)]
struct Dispute {
    /// What is held, or what was deleted and in which version at least it may come back.
    held: Held,
    since: Instant,
    /// It was in the digest that the hub answers now.
    told: bool,
}

#[derive(Debug, Clone)]
struct Entry {
    held: Held,
    /// Whether it is this node's business: not a pod or Node of another node that is only watched.
    own: bool,
    /// The hub gave it because an application watches it. After a restart nobody remembers; then only what is never
    /// given otherwise counts as that.
    watched: bool,
    /// The hub was told of this very version in the digest that it answers now.
    told: bool,
    /// A pod that was told to end.
    ending: bool,
    /// Of what a user or controller writes: metadata and spec, or data. Not of status and version.
    desired: u64,
}

/// Identities of everything stored for one node.
#[derive(Debug)]
pub struct Meta {
    node: String,
    entries: BTreeMap<String, Entry>,
    /// Number of entries by kind.
    counts: BTreeMap<String, usize>,
    tombstones: VecDeque<Tombstone>,
    /// By path; at most [`DISPUTES_MAX`].
    disputes: BTreeMap<String, Dispute>,
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
            counts: BTreeMap::new(),
            tombstones: tombstones.into_iter().collect(),
            disputes: BTreeMap::new(),
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
            let own = is_own(node, &path, &value);
            let held = Held { uid: row.uid, rv: row.rv };
            let (ending, desired) = (is_ending(&value), desired_digest(&value));
            let watched = !own || !PLACED_KINDS.contains(&path.kind());
            let entry = Entry { held, own, watched, told: false, ending, desired };
            match path.kind() {
                "pod" if own => match serde_json::from_value(value) {
                    Ok(pod) => effects.push(Effect::PodUpsert(Box::new(pod))),
                    // Not held then, so that the hub gives it again.
                    Err(error) => {
                        effects.push(ignored(&row.path, &error.to_string()));
                        continue;
                    }
                },
                "node" if own => effects.push(Effect::OwnNode(Box::new(value))),
                _ => {}
            }
            meta.insert(row.path, entry);
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

    fn insert(&mut self, path: String, entry: Entry) {
        let kind = kind_of(&path).to_owned();
        if self.entries.insert(path, entry).is_none() {
            *self.counts.entry(kind).or_default() += 1;
        }
    }

    fn remove(&mut self, path: &str) {
        if self.entries.remove(path).is_some()
            && let Some(count) = self.counts.get_mut(kind_of(path))
        {
            *count -= 1;
        }
    }

    /// What to tell the hub after the link is up: every kind, since only the hub knows which it keeps, and what is in
    /// dispute. Until [`Self::digest_answered`] the hub is believed also when it sends an older version of that.
    pub fn start_digest(&mut self) -> Digest {
        self.resyncing = true;
        self.entries.values_mut().for_each(|entry| entry.told = true);
        self.disputes.values_mut().for_each(|dispute| dispute.told = true);
        let held = |(path, entry): (&String, &Entry)| (path.clone(), entry.held.clone());
        let (watched, placed): (Vec<_>, Vec<_>) =
            self.entries.iter().partition(|(_, entry)| entry.watched);
        let disputes = self.disputes.iter().map(|(path, of)| (path.clone(), of.held.clone()));
        Digest {
            objects: placed.into_iter().map(held).collect(),
            watched: watched.into_iter().map(held).collect(),
            disputed: disputes.collect(),
        }
    }

    /// The hub has sent every difference; what it was asked about is settled.
    pub fn digest_answered(&mut self) {
        if std::mem::take(&mut self.resyncing) {
            self.disputes.retain(|_, dispute| !dispute.told);
        }
    }

    /// The link is gone, or is one to a hub that takes no digest.
    pub fn link_lost(&mut self) {
        self.resyncing = false;
    }

    /// When the hub has to be asked what is true, over a new connection.
    pub fn digest_due(&self) -> Option<Instant> {
        let since = self.disputes.values().map(|dispute| dispute.since).min();
        since.filter(|_| !self.resyncing).map(|since| since + DISPUTE_WAIT)
    }

    /// Decides about a message without parent, of any group.
    pub fn handle_push(&self, now: Now, message: &Message) -> Step {
        let route = &message.route;
        let only = |effect| Step { effects: vec![effect], ..Step::default() };
        match route.group.as_str() {
            "resource" | "func" => {}
            "twin" | "user" | "taskmanager" | "nodeupgradejobcontroller" => {
                return only(Effect::HandOn(Box::new(message.clone())));
            }
            group => {
                return only(ignored(&route.resource, &format!("group `{group}` is not known")));
            }
        }
        match route.operation.as_str() {
            "insert" | "update" | "delete" => {}
            operation if VOLUME_OPERATIONS.contains(&operation) => {
                let answer = message.error(now.unix_ms(), "metamanager", "resource", NO_VOLUMES);
                let effects = vec![ignored(&route.resource, NO_VOLUMES)];
                return Step { ack: Some(answer), effects, ..Step::default() };
            }
            "applicationResponse" => return only(Effect::HandOn(Box::new(message.clone()))),
            operation => {
                let reason = format!("operation `{operation}` is not known here");
                return only(ignored(&route.resource, &reason));
            }
        }
        if route.resource.split('/').any(|segment| segment == "membership") {
            return only(Effect::HandOn(Box::new(message.clone())));
        }
        let mut step = self
            .decide_push(now.mono, message)
            .unwrap_or_else(|reason| only(ignored(&route.resource, &reason)));
        step.ack = Some(message.ack(now.unix_ms()));
        step
    }

    /// Decides about an object that the hub gave as an answer; `path` is where it belongs.
    pub fn handle_answer(&self, path: &ResourcePath, object: Value) -> Step {
        let step = match path.kind() {
            // A status patch returns the pod: the row is brought up to date, but an answer never creates or replaces.
            "pod" if self.uid_at(path) != uid_of(&object) => Ok(Step::default()),
            // Who asked knows how old the answer may be, so a refused one is not in dispute.
            _ => self.decide_put(None, path, object, false),
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
        match step.dispute {
            Some((path, Some(dispute))) => {
                if self.disputes.len() < DISPUTES_MAX || self.disputes.contains_key(&path) {
                    self.disputes.insert(path, dispute);
                }
            }
            Some((path, None)) => drop(self.disputes.remove(&path)),
            None => {}
        }
        match step.entry {
            Some((path, Some(entry))) => {
                self.tombstones.retain(|tombstone| tombstone.uid != entry.held.uid);
                self.insert(path, entry);
            }
            Some((path, None)) => self.remove(&path),
            None => {}
        }
        (step.ack, step.effects)
    }

    fn decide_push(&self, now: Instant, message: &Message) -> Result<Step, String> {
        let path: ResourcePath =
            message.route.resource.parse().map_err(|error| format!("{error}"))?;
        if path.name().is_none() {
            return Err("a collection cannot be pushed".into());
        }
        match message.operation() {
            Some(Operation::Insert | Operation::Update) => {
                let object = message.content_as().map_err(|error| error.to_string())?;
                let watched = message.route.source == WATCH_SOURCE;
                // What an application watches the hub tells from its own memory, and every digest makes it tell all.
                self.decide_put((!watched).then_some(now), &path, object, watched)
            }
            Some(Operation::Delete) => {
                Ok(self.decide_delete(&path, &message.content_as().unwrap_or(Value::Null)))
            }
            _ => Err(format!("operation `{}` is not known here", message.route.operation)),
        }
    }

    /// `now` for what the hub pushed, which may have to be disputed.
    fn decide_put(
        &self,
        now: Option<Instant>,
        path: &ResourcePath,
        mut object: Value,
        watched: bool,
    ) -> Result<Step, String> {
        let key = path.to_string();
        let kind = path.kind();
        if UNSTORED_KINDS.contains(&kind) {
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
        let own = is_own(&self.node, path, &object);
        match kind {
            _ if watched => {}
            "pod" if !own => {
                return Err(format!(
                    "pod is for node `{}`, this is `{}`",
                    text(&object, "/spec/nodeName"),
                    self.node
                ));
            }
            "node" if !own => return Err(format!("this is node `{}`", self.node)),
            _ => {}
        }
        if kind == "pod" && uid.is_empty() {
            return Err("pod has no uid".into());
        }

        let known = self.entries.get(&key);
        if known.is_none() && self.entries.len() >= OBJECTS_MAX {
            return Err(format!("{OBJECTS_MAX} objects are held already"));
        }
        if known.is_none() && self.counts.get(kind).is_some_and(|count| *count >= KIND_OBJECTS_MAX)
        {
            return Err(format!("{KIND_OBJECTS_MAX} objects of type `{kind}` are held already"));
        }
        let dispute = self.disputes.get(&key).filter(|dispute| dispute.held.uid == uid);
        let refused = |reason: String, held: Held| {
            let since = dispute.map(|dispute| dispute.since).or(now);
            let disputed = since.map(|since| Dispute { held, since, told: false });
            Step {
                effects: vec![ignored(&key, &reason)],
                dispute: disputed.map(|disputed| (key.clone(), Some(disputed))),
                ..Step::default()
            }
        };
        let is_asked = self.resyncing && dispute.is_some_and(|dispute| dispute.told);
        if let (Some(tombstone), Ok(version)) =
            (self.tombstones.iter().find(|tombstone| tombstone.uid == uid), rv.parse::<u64>())
            && version < tombstone.version_min
            && !is_asked
        {
            let reason = format!("version {rv} of an object that was deleted since");
            return Ok(refused(reason, Held { uid, rv: tombstone.version_min.to_string() }));
        }
        let desired = desired_digest(&object);
        let settled = dispute.map(|_| (key.clone(), None));
        if let Some(known) = known.filter(|known| known.held.uid == uid) {
            if known.held.rv == rv {
                return Ok(Step { dispute: settled, ..Step::default() }); // a repeated message
            }
            // What came since the digest is newer than what the hub makes of it.
            if !(self.resyncing && known.told) && is_older(&rv, &known.held.rv) {
                let reason = format!("version {rv} is older than {} held here", known.held.rv);
                if known.desired == desired {
                    let effects = vec![ignored(&key, &reason)];
                    return Ok(Step { effects, dispute: settled, ..Step::default() });
                }
                return Ok(refused(reason, known.held.clone()));
            }
        }

        if let Some(metadata) = object.pointer_mut("/metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
        name_type(kind, &mut object);
        let mut effects = Vec::new();
        let ending = is_ending(&object);
        let changed = known.is_none_or(|known| known.held.uid != uid || known.desired != desired);
        match kind {
            "pod" if own => {
                let begins_anew =
                    |known: &&Entry| known.held.uid != uid || (known.ending && !ending);
                if let Some(old) = known.filter(|known| known.own).filter(begins_anew) {
                    effects.push(pod_remove(path, old.held.uid.clone()));
                }
                let pod: Pod =
                    serde_json::from_value(object.clone()).map_err(|error| error.to_string())?;
                if changed {
                    effects.push(Effect::PodUpsert(Box::new(pod)));
                }
            }
            "node" if own => {
                effects.push(Effect::OwnNode(Box::new(object.clone())));
                if let Some(fields) = object.as_object_mut() {
                    fields.remove("status");
                }
            }
            "pod" | "node" => {}
            _ if changed => effects.push(object_changed(path)),
            _ => {}
        }
        let held = Held { uid: uid.clone(), rv: rv.clone() };
        // Each status report comes back as a Node with another version; a flash chip need not hear of that.
        let echo = kind == "node" && own && !changed;
        let write = (!echo).then(|| {
            let row =
                Row { path: key.clone(), kind: kind.into(), uid, rv, json: object.to_string() };
            Write::Put(row)
        });
        // An answer says nothing of why the node has it.
        let watched = match now {
            None if !watched => known.is_some_and(|known| known.watched),
            _ => watched,
        };
        let entry = Entry { held, own, watched, told: false, ending, desired };
        Ok(Step { write, ack: None, entry: Some((key, Some(entry))), dispute: settled, effects })
    }

    fn decide_delete(&self, path: &ResourcePath, object: &Value) -> Step {
        let key = path.to_string();
        let named = uid_of(object);
        let known = self.entries.get(&key);
        let hits = known.filter(|known| match path.kind() {
            "pod" => named.is_none_or(|uid| known.held.uid == uid),
            _ => true,
        });
        let dispute = self.disputes.get(&key);
        let dispute = dispute.filter(|dispute| named.is_none_or(|uid| dispute.held.uid == uid));
        let dispute = dispute.map(|_| (key.clone(), None));
        let version = text(object, "/metadata/resourceVersion").parse::<u64>().ok();
        let uid = named.or(hits.map(|known| known.held.uid.as_str())).filter(|uid| !uid.is_empty());
        let tombstone = uid.map(|uid| {
            let held = hits.and_then(|known| known.held.rv.parse::<u64>().ok());
            // A hub takes a ConfigMap away when no pod uses it and gives the same version again when one does. A pod
            // that was deleted with its last state never comes back; one that was only named may have been a mistake
            // of a hub that had not read everything yet.
            let version_min = match (path.kind(), version) {
                ("pod", Some(version)) => version.max(held.unwrap_or(0)).saturating_add(1),
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
            return Step { write, dispute, ..Step::default() };
        };
        let effects = match path.kind() {
            "pod" | "node" if !hit.own => Vec::new(),
            "pod" => vec![pod_remove(path, hit.held.uid.clone())],
            "node" => vec![Effect::OwnNodeGone],
            _ => vec![object_changed(path)],
        };
        let write = Some(Write::Remove { path: key.clone(), tombstone });
        Step { write, ack: None, entry: Some((key, None)), dispute, effects }
    }

    fn uid_at(&self, path: &ResourcePath) -> Option<&str> {
        self.entries.get(&path.to_string()).map(|entry| entry.held.uid.as_str())
    }
}

/// Fills in `kind` and `apiVersion` where they are missing: KubeEdge's answers to reports leave them out.
fn name_type(kind: &str, object: &mut Value) {
    let known = UNNAMED_TYPES.iter().find(|(token, ..)| *token == kind);
    if let (Some((_, api_version, name)), Some(fields)) = (known, object.as_object_mut()) {
        for (key, text) in [("kind", name), ("apiVersion", api_version)] {
            let field = fields.entry(key).or_insert(Value::Null);
            if field.as_str().is_none_or(str::is_empty) {
                *field = Value::from(*text);
            }
        }
    }
}

/// Type token of a stored path.
fn kind_of(path: &str) -> &str {
    path.split('/').nth(1).unwrap_or_default()
}

/// Whether the object is `node`'s business: everything but the pods and Nodes of others.
fn is_own(node: &str, path: &ResourcePath, object: &Value) -> bool {
    match path.kind() {
        "pod" => text(object, "/spec/nodeName") == node,
        "node" => path.name() == Some(node),
        _ => true,
    }
}

/// Whether a pod was told to end.
fn is_ending(object: &Value) -> bool {
    object.pointer("/metadata/deletionTimestamp").is_some_and(|time| !time.is_null())
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
            Effect::HandOn(message) => format!("hand on {}", message.route.resource),
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
    fn an_older_version_is_not_believed_when_a_newer_one_came_after_the_digest() {
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", "a", 5));
        meta.start_digest();
        let path = "default/pod/web".parse().expect("path");
        let answer = meta.handle_answer(&path, pod("web", "a", 8));
        meta.commit(answer);
        let late = apply(&mut meta, Operation::Update, "default/pod/web", &pod("web", "a", 6));
        assert_eq!(late, ["ignored"]);
        assert_eq!(meta.held("default/pod/web").map(|held| held.rv.as_str()), Some("8"));
    }

    #[test]
    fn a_delete_in_the_highest_version_is_a_delete() {
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", "a", 5));
        apply(&mut meta, Operation::Delete, "default/pod/web", &pod("web", "a", u64::MAX));
        let late = apply(&mut meta, Operation::Update, "default/pod/web", &pod("web", "a", 6));
        assert_eq!(late, ["ignored"]);
    }

    #[test]
    fn pod_that_a_restored_cluster_has_again_is_asked_for_and_then_runs() {
        let mut meta = empty();
        let old = pod("web", "a", 5);
        apply(&mut meta, Operation::Insert, "default/pod/web", &old);
        apply(&mut meta, Operation::Delete, "default/pod/web", &pod("web", "a", 7));
        let start = std::time::Instant::now();
        assert_eq!(apply(&mut meta, Operation::Insert, "default/pod/web", &old), ["ignored"]);
        let due = meta.digest_due().expect("only the API can tell whether that was late");
        assert!(due >= start + DISPUTE_WAIT);
        let digest = meta.start_digest();
        let held = Held { uid: "a".into(), rv: "8".into() };
        assert_eq!(digest.disputed, BTreeMap::from([("default/pod/web".to_owned(), held)]));
        assert!(digest.objects.is_empty());
        assert_eq!(meta.digest_due(), None, "the hub is at work on it");
        assert_eq!(apply(&mut meta, Operation::Update, "default/pod/web", &old), ["run a"]);
        meta.digest_answered();
        assert_eq!((meta.digest_due(), meta.tombstones.len()), (None, 0));
        let late = apply(&mut meta, Operation::Update, "default/pod/web", &pod("web", "a", 4));
        assert_eq!(late, ["ignored"], "its version counts again");
    }

    #[test]
    fn what_was_not_asked_for_does_not_come_back_in_answer_to_a_digest() {
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", "a", 5));
        apply(&mut meta, Operation::Delete, "default/pod/web", &pod("web", "a", 7));
        meta.start_digest();
        let late = apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", "a", 5));
        assert_eq!(late, ["ignored"], "of a hub whose watch lags");
        meta.digest_answered();
        assert!(meta.digest_due().is_some());
    }

    #[test]
    fn dispute_ends_with_the_next_word_that_settles_it() {
        let label = |rv: u64, label: &str| {
            let mut pod = pod("web", "a", rv);
            pod["metadata"]["labels"] = json!({"l": label});
            pod
        };
        let path = "default/pod/web";
        for settling in [label(8, "new"), label(9, "newer"), label(7, "new")] {
            let mut meta = empty();
            apply(&mut meta, Operation::Insert, path, &label(8, "new"));
            apply(&mut meta, Operation::Update, path, &label(6, "old"));
            assert!(meta.digest_due().is_some(), "older, and it says something else");
            apply(&mut meta, Operation::Update, path, &settling);
            assert_eq!(meta.digest_due(), None);
        }
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, path, &label(8, "new"));
        apply(&mut meta, Operation::Delete, path, &label(9, "new"));
        apply(&mut meta, Operation::Update, path, &label(8, "new"));
        assert!(meta.digest_due().is_some());
        apply(&mut meta, Operation::Delete, path, &label(9, "new"));
        assert_eq!(meta.digest_due(), None, "the hub has seen the end of it too");
    }

    #[test]
    fn dispute_is_told_again_when_the_link_went_before_the_answer() {
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", "a", 5));
        apply(&mut meta, Operation::Delete, "default/pod/web", &pod("web", "a", 7));
        apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", "a", 5));
        let told = meta.start_digest();
        meta.link_lost();
        assert_eq!(meta.start_digest(), told);
        meta.digest_answered();
        assert!(meta.start_digest().disputed.is_empty());
    }

    #[test]
    fn older_word_about_what_an_application_watches_is_not_in_dispute() {
        let mut meta = empty();
        for (rv, value) in [(5, "new"), (4, "old")] {
            let mut message =
                push(Operation::Update, "default/configmap/web", &configmap(rv, value));
            message.route.source = WATCH_SOURCE.into();
            let step = meta.handle_push(now(), &message);
            meta.commit(step);
        }
        assert_eq!(meta.digest_due(), None);
    }

    #[test]
    fn disputes_are_bounded() {
        let mut meta = empty();
        for n in 0..DISPUTES_MAX + 10 {
            let (name, path) = (format!("c{n}"), format!("default/configmap/c{n}"));
            let object = |rv: u64| {
                let mut object = configmap(rv, &rv.to_string());
                object["metadata"]["name"] = json!(name);
                object
            };
            apply(&mut meta, Operation::Insert, &path, &object(5));
            apply(&mut meta, Operation::Update, &path, &object(4));
        }
        assert_eq!(meta.disputes.len(), DISPUTES_MAX);
    }

    #[test]
    fn pod_whose_end_a_restored_cluster_has_forgotten_begins_anew() {
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", "a", 5));
        let mut ending = pod("web", "a", 7);
        ending["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert_eq!(apply(&mut meta, Operation::Update, "default/pod/web", &ending), ["run a"]);
        meta.start_digest();
        let before = apply(&mut meta, Operation::Update, "default/pod/web", &pod("web", "a", 5));
        assert_eq!(before, ["stop a", "run a"]);
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
            ("default/podpatch/web", json!({"metadata": {"name": "web"}})),
            ("default/event/web", json!({"metadata": {"name": "web"}})),
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

    /// Applies a message of any sender, group and operation; returns its answer and the effects in short words.
    fn send(
        meta: &mut Meta,
        from: (&str, &str),
        operation: &str,
        resource: &str,
        content: &Value,
    ) -> (Option<Message>, Vec<String>) {
        let mut message = Message::new(0, from.0, from.1, Operation::Insert, resource, content);
        message.route.operation = operation.into();
        let step = meta.handle_push(now(), &message);
        let (answer, effects) = meta.commit(step);
        (answer, effects.iter().map(short).collect())
    }

    #[test]
    fn every_kind_of_object_is_stored_acknowledged_and_told_to_the_hub() {
        let mut meta = empty();
        for (source, resource) in [
            ("devicecontroller", "default/device/lamp"),
            ("edgecontroller", "default/devicemodel/lamps"),
            ("policycontroller", "default/serviceaccountaccess/reader"),
            ("edgecontroller", "null/persistentvolume/disk"),
            ("edgecontroller", "default/persistentvolumeclaim/disk"),
            ("edgecontroller", "default/volumeattachment/disk"),
            ("edgecontroller", "default/rule/up"),
            ("edgecontroller", "default/ruleendpoint/up"),
            ("dynamiccontroller", "default/service/web"),
            ("dynamiccontroller", "default/endpointslice/web-x"),
            ("dynamiccontroller", "null/namespace/default"),
        ] {
            let path: ResourcePath = resource.parse().expect("a path");
            let (kind, name) = (path.kind(), path.name().expect("an object"));
            let object =
                json!({"metadata": {"name": name, "uid": resource, "resourceVersion": "x5"}});
            let (ack, effects) = send(&mut meta, (source, "resource"), "update", resource, &object);
            assert_eq!(ack.expect("an answer").content.get(), "\"OK\"", "{resource}");
            assert_eq!(effects, [format!("changed {kind} {name}")]);
        }
        let digest = meta.start_digest();
        let watched: Vec<_> = digest.watched.keys().map(String::as_str).collect();
        let expected =
            ["default/endpointslice/web-x", "default/service/web", "null/namespace/default"];
        assert_eq!(watched, expected);
        assert_eq!(digest.objects.len() + watched.len(), meta.len());
        assert_eq!(meta.held("default/rule/up").map(|held| held.rv.as_str()), Some("x5"));
        let stub = json!({"metadata": {"name": "web", "namespace": "default", "uid": "u"}});
        let (ack, effects) =
            send(&mut meta, ("edgecontroller", "resource"), "delete", "default/service/web", &stub);
        assert!(ack.is_some());
        assert_eq!(effects, ["changed service web"]);
        assert!(meta.held("default/service/web").is_none());
    }

    #[test]
    fn what_is_only_watched_is_told_apart_until_the_node_needs_it() {
        let page = "default/configmap/web";
        let mut meta = empty();
        let told = |meta: &mut Meta| {
            let digest = meta.start_digest();
            (digest.objects.contains_key(page), digest.watched.contains_key(page))
        };
        let watch = ("dynamiccontroller", "resource");
        send(&mut meta, watch, "insert", page, &configmap(5, "a"));
        assert_eq!(told(&mut meta), (false, true));
        let answer = meta.handle_answer(&page.parse().expect("path"), configmap(6, "b"));
        meta.commit(answer);
        assert_eq!(told(&mut meta), (false, true), "an answer does not say why");
        send(&mut meta, ("edgecontroller", "resource"), "update", page, &configmap(7, "c"));
        assert_eq!(told(&mut meta), (true, false));
    }

    #[test]
    fn pods_and_nodes_of_others_are_stored_when_watched_and_never_run_or_told() {
        let mut foreign = pod("web", "a", 5);
        foreign["spec"]["nodeName"] = json!("edge2");
        let node = json!({"metadata": {"name": "edge2", "uid": "n", "resourceVersion": "1"}});
        let mut meta = empty();
        let watch = ("dynamiccontroller", "resource");
        for (resource, object) in [("default/pod/web", &foreign), ("null/node/edge2", &node)] {
            let (ack, effects) = send(&mut meta, watch, "insert", resource, object);
            assert!(ack.is_some() && effects.is_empty(), "{resource}: {effects:?}");
        }
        let digest = meta.start_digest();
        assert_eq!((meta.len(), digest.objects.len(), digest.watched.len()), (2, 0, 2));
        let row = Row {
            path: "default/pod/web".into(),
            kind: "pod".into(),
            uid: "a".into(),
            rv: "5".into(),
            json: foreign.to_string(),
        };
        let (mut meta, effects) = Meta::restore("edge1", [row], []);
        assert_eq!((meta.len(), effects.len()), (1, 0));
        assert_eq!(send(&mut meta, watch, "delete", "default/pod/web", &foreign).1.len(), 0);
        assert!(meta.is_empty());
    }

    #[test]
    fn messages_for_twin_and_buses_are_handed_on_and_not_acknowledged() {
        let mut meta = empty();
        for (from, operation, resource) in [
            (("devicecontroller", "twin"), "update", "membership"),
            (("devicecontroller", "twin"), "response", "twin"),
            (("edgecontroller", "resource"), "update", "membership"),
            (("router_eventbus", "user"), "publish", "node/topic"),
            (("taskmanager", "taskmanager"), "prepull", "prepull/j/node/edge1"),
        ] {
            let (answer, effects) = send(&mut meta, from, operation, resource, &json!({"a": 1}));
            assert!(answer.is_none(), "{from:?}");
            assert_eq!(effects, [format!("hand on {resource}")]);
        }
        let (answer, effects) = send(&mut meta, ("x", "y"), "update", "a/b/c", &Value::Null);
        assert!(answer.is_none());
        assert_eq!(effects, ["ignored"]);
    }

    #[test]
    fn what_is_not_supported_is_answered_and_says_so() {
        let mut meta = empty();
        let csi = ("cloudhub", "resource");
        let (answer, _) = send(&mut meta, csi, "createvolume", "default/volume/v1", &json!("{}"));
        let answer = answer.expect("an answer");
        assert_eq!(answer.route.operation, "error");
        assert_eq!(answer.route.resource, "default/volume/v1");
        assert!(!answer.header.parent_msg_id.is_empty());
        assert!(answer.content.get().contains("not supported"));
    }

    #[test]
    fn one_kind_cannot_take_the_room_of_the_others() {
        let mut meta = empty();
        let watch = ("dynamiccontroller", "resource");
        let service =
            |n: usize| json!({"metadata": {"name": format!("s{n}"), "uid": format!("{n}")}});
        for n in 0..KIND_OBJECTS_MAX {
            send(&mut meta, watch, "insert", &format!("default/service/s{n}"), &service(n));
        }
        let (ack, effects) =
            send(&mut meta, watch, "insert", "default/service/s9999", &service(9999));
        assert!(ack.is_some());
        assert_eq!(effects, ["ignored"]);
        let pod = pod("web", "a", 5);
        assert_eq!(apply(&mut meta, Operation::Insert, "default/pod/web", &pod), ["run a"]);
        send(&mut meta, watch, "delete", "default/service/s0", &service(0));
        let (_, effects) =
            send(&mut meta, watch, "insert", "default/service/s9999", &service(9999));
        assert_eq!(effects, ["changed service s9999"]);
    }

    #[test]
    fn a_failed_write_leaves_everything_as_it_was() {
        let meta = empty();
        let message = push(Operation::Insert, "default/pod/web", &pod("web", "a", 5));
        drop(meta.handle_push(now(), &message));
        assert!(meta.is_empty());
    }

    #[test]
    fn answer_to_a_status_report_is_stored_with_its_kind() {
        let mut meta = empty();
        apply(&mut meta, Operation::Insert, "default/pod/web", &pod("web", "a", 5));
        let mut answer = pod("web", "a", 6);
        answer.as_object_mut().expect("an object").retain(|key, _| key != "kind");
        answer["apiVersion"] = json!("");
        let path = "default/pod/web".parse().expect("path");
        let step = meta.handle_answer(&path, answer);
        let Some(Write::Put(row)) = &step.write else { panic!("nothing to write") };
        let stored: Value = serde_json::from_str(&row.json).expect("JSON");
        assert_eq!((&stored["kind"], &stored["apiVersion"]), (&json!("Pod"), &json!("v1")));
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
