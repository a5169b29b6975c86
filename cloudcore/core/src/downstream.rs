//! What each node should have, and the messages that take it there.
//!
//! A node should have its own Node object, the pods bound to it, the ConfigMaps, Secrets and ServiceAccountAccesses
//! that its live pods refer to, the devices placed on it and their models; nothing else, and nothing of another node.
//! [`Downstream`] holds that, and beside it what each connected node is known to hold. Every input that changes one
//! side marks the objects concerned, and the difference goes out. There is no log of events, so a lost event cannot be
//! missed twice.
//!
//! A change that matters to no node is not sent: `metadata.resourceVersion`, `managedFields` and `generation`, and the
//! status, which the node itself writes (except conditions that are readiness gates, which others write). KubeEdge
//! sends those echoes; its edge does not need them. A Node goes without `status.images`, which the node reported.
//!
//! # Flow
//!
//! At most [`OUTSTANDING_MAX`] messages and [`OUTSTANDING_LEN_MAX`] bytes are with a connection and not acknowledged,
//! and at most one of them per object. Everything else that differs waits as a key, in the order of [`Kind`], and is
//! written from the state of the moment when acknowledgements make room: a node that does not answer costs keys, ten
//! changes meanwhile are one message later, and what came and went meanwhile is none. What a pod or a device needs goes
//! before it and leaves after it. Objects that an application watches ([`Input::Pushed`]) are not state of ours and
//! wait with their text, up to [`PUSHED_MAX`] and [`PUSHED_LEN_MAX`] per node; a node beyond that is cut.
//!
//! # After a reconnect
//!
//! - Our own edge tells what it holds ([`skerry_protocol::digest`]). Until then, at most [`DIGEST_WAIT`], nothing is
//!   pushed; then only differences are, deletes included, and the response to the digest when all that differed is
//!   acknowledged. What it disputes differs in any case: it will not take that otherwise.
//! - A KubeEdge edge tells nothing. What it acknowledged is kept in ObjectSync objects ([`crate::objectsync`]), by this
//!   process and by those before it, KubeEdge's CloudCore among them; what is newer or gone goes out. Its own Node goes
//!   out in any case: an edge that lost its store could not register otherwise. Its devices are told once more as a
//!   list, because word of a device that joined or left is never acknowledged.
//! - Before anything goes to an edge that has told nothing, its pods are read from the API: another CloudCore may have
//!   taken one away, and written so, and neither watch has shown it yet. It would run again what had ended. Our own edge
//!   remembers what was deleted.
//! - What a node holds is not judged by a watch that lags behind: another CloudCore, which the node has left, may have
//!   been further. When a node names an object in a newer version than the watch has shown, or one that the watch has
//!   never got to, that object (all pods of the node, if it is one) is read from the API first. What is then older or
//!   absent is so in the cluster, which may have been restored from a backup. What the watch tells later of the time
//!   before the read is left out. Until the answer nothing about that object, or about any pod of the node, goes out:
//!   the watch may still show the predecessor of the pod that the node runs.
//! - Two versions of an object are the same to a node when nothing that matters changed between them. Of a version that
//!   this process has sent it knows that; one that a node tells, or a record, may be of a time that the cluster has
//!   lost since, and is the same only if the watch or a read has shown that very version with that content
//!   ([`version`]).
//! - While a watch reads a list again, new connections wait for it. The list counts also where it shows what is older
//!   than what was known when it was begun ([`listing`]): the cluster went back. Connected nodes of ours are cut then,
//!   because they take an older version only in answer to a digest.
//! - Where the cluster has no ObjectSync kinds, all that a KubeEdge edge should have is pushed again as `update`, and
//!   objects that went away are deleted only as far as this process knows what that node had been sent: after a restart
//!   of CloudCore such an edge keeps what was deleted during its absence.
//!
//! # A Node object that is deleted
//!
//! That is how an operator removes a node, so CloudCore never creates it again. Our own edge is told and decides: it
//! registers anew while its certificate is good. A KubeEdge edge is cut, as KubeEdge does, and may connect again; it
//! registers again when it restarts.
//!
//! # Kinds that a cluster lacks
//!
//! While the API knows no such kind ([`Input::Unavailable`]) nothing of it is judged: what a node holds of it stays.
//!
//! Node jobs (`operations.kubeedge.io/v1alpha2`) are no state of a node and do not go through here: their messages are
//! not acknowledged, and the controller that owns them gives them to the node's connection itself.
//!
//! The hub task of `cloudcore/` is the caller: it calls [`Downstream::handle`] and then drains
//! [`Downstream::poll_output`]. No I/O, no clock.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/edgecontroller/controller/downstream.go, cloud/pkg/devicecontroller/controller,
//! cloud/pkg/policycontroller/manager, cloud/pkg/synccontroller; golden file `protocol/golden/session.jsonl` for
//! operations, resources and sources.

mod flow;
mod key;
mod listing;
mod membership;
mod records;
mod resume;
mod version;

pub use flow::{OUTSTANDING_LEN_MAX, OUTSTANDING_MAX, PUSHED_LEN_MAX, PUSHED_MAX};
pub use key::{Key, Kind};
pub use version::Watched;
pub(crate) use version::number;

use crate::objectsync::{Syncs, Word, Write};
use crate::references;
use flow::Session;
use listing::Listing;
use resume::Phase;
use serde_json::Value;
use skerry_protocol::capability::Capabilities;
use skerry_protocol::digest::Digest;
use skerry_protocol::message::Content;
use skerry_protocol::{Message, Operation};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use version::Version;

/// How long a new connection of our own edge may take to send its digest before everything is pushed.
pub const DIGEST_WAIT: Duration = Duration::from_secs(5);

/// The label that makes a Node an edge node for KubeEdge.
pub const EDGE_LABEL: &str = "node-role.kubernetes.io/edge";

/// Deleted objects of one node that are kept whole until the node has acknowledged the delete; a delete beyond that
/// carries only the object's identity, as KubeEdge's deletes after an outage do.
const GRAVES_MAX: usize = 64;

/// Objects of one kind that a read did not find and that are remembered; one beyond that may come back for the moment by
/// which a watch lags.
const ABSENT_MAX: usize = 1024;

/// Number of a connection, never used twice; a late word about an old connection is told from one about the new.
pub type SessionId = u64;

/// What the world did.
#[derive(Debug)]
pub enum Input {
    /// The API has this object in this version.
    Changed(Kind, Value),
    /// The API has this object no longer.
    Deleted(Key, Value),
    /// The watch of this kind is about to read a list, at first or because it broke; what the API has at this moment or
    /// later follows as [`Input::Changed`], then [`Input::Listed`]. New connections wait for that.
    Listing(Kind),
    /// A list of this kind is complete and held these objects, each already given as [`Input::Changed`].
    Listed(Kind, BTreeSet<Key>),
    /// The API knows no such kind, or does not show it to us.
    Unavailable(Kind),
    /// What [`Output::Fetch`] asked for, one answer to each; `None` when there is no such object. Last the resource
    /// version of the API at the read, if it is told.
    Fetched(Key, Option<Value>, Option<u64>),
    /// What [`Output::Relist`] asked for, and the resource version of that list, if it is told.
    Relisted(String, Vec<Value>, Option<u64>),
    /// What the cluster said about ObjectSync objects, answers to [`Output::Sync`] included.
    Sync(Word),
    /// A node opened a connection.
    Connected {
        /// Its name, proven by its certificate.
        node: String,
        /// The new connection.
        session: SessionId,
        /// What both ends can do.
        capabilities: Capabilities,
    },
    /// A node told what it holds.
    Digest {
        /// Its name.
        node: String,
        /// The connection on which it came.
        session: SessionId,
        /// What it holds.
        digest: Digest,
        /// The message to answer.
        request: Box<Message>,
    },
    /// A node acknowledged a message.
    Acked {
        /// Its name.
        node: String,
        /// The connection on which it came.
        session: SessionId,
        /// The message.
        message: Arc<Message>,
    },
    /// A message stayed without an acknowledgement through all of its writes. Optional: without this word a newer
    /// version of an object waits until the older one is acknowledged or the connection ends.
    Unanswered {
        /// The node's name.
        node: String,
        /// The connection.
        session: SessionId,
        /// The message.
        message: Arc<Message>,
        /// Whether it will not be written again.
        dropped: bool,
    },
    /// An application on a node watches this object. A node that is not connected gets nothing: the watches are
    /// somebody else's, and that owner gives everything again when the node is back. What the node gets anyway, has
    /// acknowledged in this version, or tells to hold in this version, is not sent.
    Pushed {
        /// The node's name.
        node: String,
        /// From [`Key::watched`].
        key: Key,
        /// The object; its last state for a delete.
        object: Arc<Watched>,
        /// `insert`, `update` or `delete`.
        operation: Operation,
    },
    /// A connection ended.
    Disconnected {
        /// The node's name.
        node: String,
        /// The connection.
        session: SessionId,
    },
    /// Nothing but time.
    Tick,
}

/// What the owner has to do.
#[derive(Debug)]
pub enum Output {
    /// Give a message to the delivery of this connection.
    Send {
        /// The node's name.
        node: Arc<str>,
        /// The connection.
        session: SessionId,
        /// The message.
        message: Box<Message>,
    },
    /// End this connection.
    Close {
        /// The node's name.
        node: Arc<str>,
        /// The connection.
        session: SessionId,
        /// Why, for the log and the close frame.
        reason: &'static str,
    },
    /// Read one object, not from a cache, and give it as [`Input::Fetched`]; try again until the API answers.
    Fetch(Key),
    /// List the pods of this node, not from a cache, and give them as [`Input::Relisted`]; try again until the API answers.
    Relist(String),
    /// Write an ObjectSync object and say as [`Word::Written`] how it went.
    Sync(Write),
}

/// A node's right to one ConfigMap or Secret.
#[derive(Debug, Clone)]
pub enum Access {
    /// No live pod of the node refers to it.
    Denied,
    /// The object as last seen.
    Held {
        /// `metadata.resourceVersion`.
        resource_version: String,
        /// The object.
        object: Content,
    },
    /// There is no such object.
    Absent,
    /// A pod refers to it and it has not been read yet.
    Unknown,
    /// The pods have not been listed yet, so nobody can tell.
    Unlisted,
}

/// How much there is, for the monitor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Edge nodes known.
    pub nodes: usize,
    /// Nodes that are connected.
    pub connected: usize,
    /// Pods and devices of edge nodes.
    pub placed: usize,
    /// ConfigMaps, Secrets, models and accesses held.
    pub shared: usize,
    /// Messages with connections and not acknowledged.
    pub outstanding: usize,
    /// Their bodies, in bytes.
    pub outstanding_bytes: usize,
    /// Objects that differ and wait for room.
    pub waiting: usize,
    /// ObjectSync records known.
    pub syncs: usize,
    /// ObjectSync writes waiting or under way.
    pub syncs_due: usize,
    /// ObjectSync writes done since the start.
    pub sync_writes: u64,
}

/// What one connection has to do, for the list of links.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Messages with the connection and not acknowledged.
    pub outstanding: usize,
    /// Their bodies, in bytes.
    pub outstanding_bytes: usize,
    /// Objects that differ and wait for room.
    pub waiting: usize,
}

/// What every node should have and what every connected node has.
#[derive(Debug, Default)]
pub struct Downstream {
    /// Pods and devices of edge nodes.
    placed: BTreeMap<Key, Placed>,
    /// What those refer to.
    shared: BTreeMap<Key, Shared>,
    nodes: BTreeMap<Arc<str>, Node>,
    listed: BTreeSet<Kind>,
    /// Lists that are being read.
    listing: BTreeMap<Kind, Listing>,
    /// How far each watch is: the highest resource version that it has shown, where versions are numbers.
    progress: BTreeMap<Kind, u64>,
    /// The highest resource version that a watch or a read has shown.
    newest: BTreeMap<Kind, u64>,
    unavailable: BTreeSet<Kind>,
    /// Nodes whose pods are being listed.
    relisting: BTreeMap<Arc<str>, Relisting>,
    /// Reads of one object that are under way; only the answer to the last one is sure to be new enough.
    fetching: BTreeMap<Key, u32>,
    /// Objects that a read did not find, with its version, until the watch of the kind is as far: one that lags behind
    /// may still tell of them. At most [`ABSENT_MAX`] of a kind.
    absent: BTreeMap<Kind, BTreeMap<Key, u64>>,
    /// Pods that a read has shown to be gone, by their uids, likewise.
    gone: BTreeMap<(Key, Arc<str>), u64>,
    /// Connections in [`Phase::AwaitingDigest`], by when that ends.
    awaiting_digest: BTreeSet<(Instant, Arc<str>)>,
    /// Nodes that have records and seem to be gone, and are being read.
    collecting: BTreeSet<Key>,
    /// Nodes whose connection is in [`Phase::AwaitingLists`].
    awaiting_lists: BTreeSet<Arc<str>>,
    /// Nodes whose connection has an object in doubt that is being read.
    doubting: BTreeSet<Arc<str>>,
    /// Nodes whose connection may have something to send, each once.
    touched: VecDeque<Arc<str>>,
    outputs: VecDeque<Output>,
    syncs: Syncs,
    now: Option<Instant>,
    now_ms: i64,
}

/// Reads of the pods of one node that are under way. Only when all are answered has one been answered that began after
/// the last word that made them necessary.
#[derive(Debug, Default)]
struct Relisting {
    reads: u32,
    /// The newest answer so far.
    newest: u64,
    /// Pods deleted meanwhile, which an answer may still show.
    deleted: BTreeSet<(Key, Arc<str>)>,
}

/// A pod or a device.
#[derive(Debug)]
struct Placed {
    node: Arc<str>,
    references: Box<[Key]>,
    version: Arc<Version>,
}

/// A ConfigMap or Secret that some pod refers to (others are not kept), or any model or access.
#[derive(Debug)]
struct Shared {
    /// Live pods and devices that refer to it, counted by node.
    users: BTreeMap<Arc<str>, u32>,
    state: SharedState,
}

#[derive(Debug)]
enum SharedState {
    /// Not read yet, or not believed. A read under way is newer than anything that a node has been sent, which a watch
    /// that lags behind is not: what the watch says meanwhile is only kept.
    Unknown(Option<Arc<Version>>),
    Absent,
    Present(Arc<Version>),
}

impl SharedState {
    /// It is not believed any more; what was seen last is kept until the read that the caller asks for.
    fn doubt(&mut self) {
        let seen = match std::mem::replace(self, Self::Absent) {
            Self::Present(version) => Some(version),
            Self::Unknown(seen) => seen,
            Self::Absent => None,
        };
        *self = Self::Unknown(seen);
    }
}

#[derive(Debug, Default)]
struct Node {
    /// The Node object; for a node that is no edge node its text is not kept.
    object: NodeObject,
    /// It carries the label of an edge node, or it has been connected.
    edge: bool,
    /// Its Node object was deleted and it has not been seen since.
    removed: bool,
    session: Option<Box<Session>>,
    /// Pods and devices of this node.
    placed: BTreeSet<Key>,
    /// Its pods have been read at this version; what the watch tells of them up to there is old.
    read_at: u64,
    /// What the node holds or has been sent.
    known: BTreeMap<Key, Known>,
    /// Last state of objects that the node holds and should not; at most [`GRAVES_MAX`].
    graves: BTreeMap<Key, Arc<Version>>,
}

#[derive(Debug, Default)]
enum NodeObject {
    #[default]
    Absent,
    /// It is there and is no edge node.
    Foreign,
    Present(Arc<Version>),
}

/// The version of an object that a node holds or has been sent last.
#[derive(Debug)]
struct Known {
    uid: Arc<str>,
    /// `None` when it holds some version, or may hold it: the next comparison sends the object.
    resource_version: Option<Arc<str>>,
    /// The node or a record says so; this process has not sent it, or the cluster has gone back since.
    is_told: bool,
}

impl Known {
    /// Some version, nobody knows which.
    fn some(uid: Arc<str>) -> Self {
        Self { uid, resource_version: None, is_told: false }
    }

    fn is_same_as(&self, version: &Version) -> bool {
        self.uid == version.uid
            && self.resource_version.as_deref().is_some_and(|held| match self.is_told {
                true => version.is_exactly(held),
                false => version.is_same_as(held),
            })
    }
}

enum Wanted<'a> {
    /// Being read; its key is marked when it is known.
    Unknown,
    /// Not for us to judge now.
    Unjudged,
    Absent,
    Present(&'a Arc<Version>),
}

impl Downstream {
    /// Takes one input. `now_ms` is Unix time in milliseconds and goes into messages only.
    pub fn handle(&mut self, input: Input, now: Instant, now_ms: i64) {
        (self.now, self.now_ms) = (Some(now), now_ms);
        match input {
            Input::Changed(kind, object) => self.change(kind, object),
            Input::Deleted(key, last) => self.delete(&key, Some(last)),
            Input::Listing(kind) => self.begin_list(kind),
            Input::Listed(kind, keys) => self.list(kind, &keys),
            Input::Unavailable(kind) => {
                self.listing.remove(&kind);
                self.unavailable.insert(kind);
                self.end_list_wait();
            }
            Input::Fetched(key, object, at) => self.fetched(&key, object, at),
            Input::Relisted(node, pods, at) => self.relisted(&node, pods, at),
            Input::Sync(word) => self.hear(word, now),
            Input::Connected { node, session, capabilities } => {
                self.connect(&node, session, capabilities, now);
            }
            Input::Digest { node, session, digest, request } => {
                self.digest(&node, session, digest, request);
            }
            Input::Acked { node, session, message } => self.acked(&node, session, &message),
            Input::Unanswered { node, session, message, dropped } => {
                self.unanswered(&node, session, &message, dropped);
            }
            Input::Pushed { node, key, object, operation } => {
                self.push(&node, key, object, operation);
            }
            Input::Disconnected { node, session } => {
                if self.session(&node) == Some(session) {
                    self.end_session(&node);
                    self.tidy_node(&node);
                }
            }
            Input::Tick => {}
        }
        self.stop_waiting(now);
    }

    /// Returns the next thing to do. Messages are made here, one node after the other, so that a change that concerns
    /// every node does not have to be held for all of them at once.
    pub fn poll_output(&mut self) -> Option<Output> {
        loop {
            if let Some(output) = self.outputs.pop_front() {
                return Some(output);
            }
            let Some(name) = self.touched.pop_front() else { break };
            self.flush(&name);
        }
        self.syncs.poll_write(self.now?).map(Output::Sync)
    }

    /// When [`Input::Tick`] is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let digest = self.awaiting_digest.first().map(|(until, _)| *until);
        [digest, self.syncs.poll_timeout()].into_iter().flatten().min()
    }

    /// Whether `node` may read this ConfigMap or Secret, and the object when it is held.
    pub fn access(&self, node: &str, key: &Key) -> Access {
        match self.shared.get(key).filter(|shared| shared.users.contains_key(node)) {
            None if !self.listed.contains(&Kind::Pod) => Access::Unlisted,
            None => Access::Denied,
            Some(Shared { state: SharedState::Unknown(_), .. }) => Access::Unknown,
            Some(Shared { state: SharedState::Absent, .. }) => Access::Absent,
            Some(Shared { state: SharedState::Present(version), .. }) => Access::Held {
                resource_version: version.resource_version.as_ref().to_owned(),
                object: version.text.clone(),
            },
        }
    }

    /// The node to which a pod or a device is bound, and its uid, if that is an edge node. A Node is bound to itself.
    pub fn binding(&self, key: &Key) -> Option<(&str, &str)> {
        if key.kind() == Kind::Node {
            let (name, node) = self.nodes.get_key_value(key.name())?;
            let NodeObject::Present(version) = &node.object else { return None };
            return Some((name, &version.uid));
        }
        self.placed.get(key).map(|placed| (&*placed.node, &*placed.version.uid))
    }

    /// Whether a node has pods in this namespace.
    pub fn has_pods(&self, node: &str, namespace: &str) -> bool {
        let is_pod = |key: &&Key| key.kind() == Kind::Pod && key.namespace() == namespace;
        self.nodes.get(node).is_some_and(|node| node.placed.iter().any(|key| is_pod(&key)))
    }

    /// The connection of a node.
    pub fn session(&self, node: &str) -> Option<SessionId> {
        self.nodes.get(node)?.session.as_ref().map(|session| session.id)
    }

    /// What waits for a node; `None` when it is not connected.
    pub fn backlog(&self, node: &str) -> Option<Backlog> {
        Some(self.nodes.get(node)?.session.as_ref()?.backlog())
    }

    /// Counts everything; takes a moment per node.
    pub fn totals(&self) -> Totals {
        let (syncs, syncs_due) = self.syncs.len();
        let mut totals = Totals {
            placed: self.placed.len(),
            shared: self.shared.len(),
            syncs,
            syncs_due,
            sync_writes: self.syncs.writes(),
            ..Totals::default()
        };
        for node in self.nodes.values().filter(|node| node.edge) {
            totals.nodes += 1;
            let Some(session) = &node.session else { continue };
            let backlog = session.backlog();
            totals.connected += 1;
            totals.outstanding += backlog.outstanding;
            totals.outstanding_bytes += backlog.outstanding_bytes;
            totals.waiting += backlog.waiting;
        }
        totals
    }

    fn change(&mut self, kind: Kind, object: Value) {
        let Some(key) = Key::of_object(kind, &object) else { return };
        let version = object["metadata"]["resourceVersion"].as_str().and_then(number);
        if let Some(version) = version
            && self.listing.contains_key(&kind)
        {
            let node = object["spec"]["nodeName"].as_str().unwrap_or_default();
            if !self.take_listed(&key, version, node) {
                return;
            }
        } else if let Some(version) = version {
            let progress = self.progress.entry(kind).or_default();
            *progress = (*progress).max(version);
            self.show(kind, version);
            let progress = self.progress[&kind];
            if let Some(absent) = self.absent.get_mut(&kind) {
                absent.retain(|_, at| *at > progress);
                if absent.get(&key).is_some_and(|at| version <= *at) {
                    return;
                }
            }
            if kind == Kind::Pod && !self.gone.is_empty() {
                self.gone.retain(|_, at| *at > progress);
                let uid = object["metadata"]["uid"].as_str().unwrap_or_default();
                if self.gone.contains_key(&(key.clone(), uid.into())) {
                    return;
                }
            }
            // A read has shown a later one, perhaps another object under the name, on another node.
            let is_newer = |placed: &Placed| {
                number(&placed.version.resource_version).is_some_and(|of| of > version)
            };
            if self.placed.get(&key).is_some_and(is_newer) {
                return;
            }
            if kind == Kind::Pod
                && let Some(node) = object["spec"]["nodeName"].as_str()
                && self.nodes.get(node).is_some_and(|node| version <= node.read_at)
            {
                return;
            }
        }
        match kind {
            Kind::Pod | Kind::Device => self.change_placed(key, object),
            Kind::Node => self.change_node(&key, object),
            _ => self.change_shared(&key, object),
        }
    }

    fn change_placed(&mut self, key: Key, object: Value) {
        let name = object["spec"]["nodeName"].as_str().filter(|node| !node.is_empty());
        let Some(name) = name.map(|node| self.intern_node(node)) else {
            // A device that was taken from its node; a pod never is.
            if key.kind() == Kind::Device && self.placed.contains_key(&key) {
                self.displace(&key, None);
            }
            return;
        };
        if key.kind() == Kind::Pod && self.nodes.get(&name).is_some_and(Node::is_foreign) {
            let old = self.placed.get(&key);
            if old.is_some_and(|old| object["metadata"]["uid"] != *old.version.uid) {
                self.displace(&key, None);
            }
            return;
        }
        let references = match key.kind() {
            Kind::Pod => references::of_pod(&object),
            _ => references::of_device(&object),
        };
        let old = self.placed.get(&key);
        let has_moved = old.is_some_and(|old| old.node != name);
        let Some(version) = Version::read(key.kind(), object, old.map(|old| &*old.version)) else {
            return;
        };
        if has_moved {
            // A device that moved, or another pod under the same name: a pod's binding is for life.
            self.displace(&key, None);
        }
        let node = self.nodes.entry(Arc::clone(&name)).or_default();
        node.placed.insert(key.clone());
        // The new references count before the old ones stop to, so that what stays is not dropped in between.
        let references = references.iter().map(|key| self.refer(&name, key)).collect();
        let placed = Placed { node: Arc::clone(&name), references, version };
        let old = self.placed.insert(key.clone(), placed);
        self.mark(&name, &key);
        if let Some(old) = old {
            self.release(&name, &old.references);
        }
    }

    /// Takes a pod or a device from its node. `last` is its last state, when that is known to be newer than ours.
    fn displace(&mut self, key: &Key, last: Option<Arc<Version>>) {
        let Some(placed) = self.placed.remove(key) else { return };
        let name = placed.node;
        if let Some(node) = self.nodes.get_mut(&name) {
            node.placed.remove(key);
        }
        self.bury(&name, key, &last.unwrap_or(placed.version));
        self.mark(&name, key);
        self.release(&name, &placed.references);
        self.tidy_node(&name);
    }

    fn change_node(&mut self, key: &Key, object: Value) {
        let label = object["metadata"]["labels"].get(EDGE_LABEL).is_some();
        let name = self.intern_node(key.name());
        let node = self.nodes.entry(Arc::clone(&name)).or_default();
        let was_foreign = node.is_foreign();
        node.edge |= label;
        node.removed = false;
        if !node.edge {
            node.object = NodeObject::Foreign;
            self.forget_pods(&name);
            return;
        }
        let old = match &node.object {
            NodeObject::Present(version) => Some(&**version),
            _ => None,
        };
        if let Some(version) = Version::read(Kind::Node, object, old) {
            node.object = NodeObject::Present(version);
        }
        if was_foreign {
            self.relist(&name);
        }
        self.mark(&name, key);
    }

    fn change_shared(&mut self, key: &Key, object: Value) {
        // What no pod refers to is not kept; it is fetched when one does. Models and accesses are few and all kept.
        if key.kind().is_custom() {
            self.shared.entry(key.clone()).or_insert_with(Shared::unknown);
        }
        let is_read = self.fetching.contains_key(key);
        let Some(shared) = self.shared.get_mut(key) else { return };
        let old = match &shared.state {
            SharedState::Present(version) | SharedState::Unknown(Some(version)) => Some(&**version),
            _ => None,
        };
        let Some(version) = Version::read(key.kind(), object, old) else { return };
        if is_read && matches!(shared.state, SharedState::Unknown(_)) {
            shared.state = SharedState::Unknown(Some(version));
            return;
        }
        shared.state = SharedState::Present(version);
        self.mark_users(key);
    }

    fn delete(&mut self, key: &Key, last: Option<Value>) {
        let last_uid = last.as_ref().and_then(|last| last["metadata"]["uid"].as_str());
        // A late word about an object whose successor is already known.
        let is_other = |version: &Version| last_uid.is_some_and(|uid| *uid != *version.uid);
        match key.kind() {
            Kind::Pod | Kind::Device => {
                let uid = last_uid.map(Arc::<str>::from);
                let uid = uid.or_else(|| Some(Arc::clone(&self.placed.get(key)?.version.uid)));
                // Without a uid whatever the list shows under this name is in doubt; the watch will tell.
                let uid = uid.unwrap_or_default();
                for relisting in self.relisting.values_mut() {
                    relisting.deleted.insert((key.clone(), Arc::clone(&uid)));
                }
                if self.placed.get(key).is_some_and(|placed| !is_other(&placed.version)) {
                    let last = last.and_then(|last| Version::read(key.kind(), last, None));
                    self.displace(key, last);
                }
            }
            Kind::Node => {
                let name = self.intern_node(key.name());
                let Some(node) = self.nodes.get_mut(&name) else { return };
                if matches!(&node.object, NodeObject::Present(version) if is_other(version)) {
                    return;
                }
                let version = last.as_ref().and_then(|last| {
                    number(last["metadata"]["resourceVersion"].as_str().unwrap_or_default())
                });
                let old = std::mem::take(&mut node.object);
                node.removed = !matches!(old, NodeObject::Absent);
                let stock = node.session.as_ref().map(|session| !session.capabilities.digest);
                if let Some(version) = version.filter(|_| stock.is_none() || node.removed) {
                    self.syncs.forget_until(&name, version);
                }
                match stock {
                    // It has not registered yet.
                    Some(_) if matches!(old, NodeObject::Absent) => {}
                    Some(true) => self.cut(&name, "the Node object was deleted"),
                    _ => self.mark(&name, key),
                }
                self.tidy_node(&name);
                if version.is_none() {
                    self.collect_syncs();
                }
            }
            _ => {
                let Some(shared) = self.shared.get_mut(key) else { return };
                if matches!(&shared.state, SharedState::Present(version) if is_other(version)) {
                    return;
                }
                if self.fetching.contains_key(key)
                    && let SharedState::Unknown(seen) = &mut shared.state
                {
                    // The read may have been before this; then another one finds out.
                    *seen = None;
                    return self.fetch(key);
                }
                let state = std::mem::replace(&mut shared.state, SharedState::Absent);
                let users: Vec<Arc<str>> = shared.users.keys().cloned().collect();
                if users.is_empty() {
                    self.shared.remove(key);
                }
                for name in users {
                    if let SharedState::Present(version) = &state {
                        self.bury(&name, key, version);
                    }
                    self.mark(&name, key);
                }
            }
        }
    }

    fn list(&mut self, kind: Kind, keys: &BTreeSet<Key>) {
        let listing = self.listing.remove(&kind);
        let floor = listing.as_ref().map(|listing| listing.floor);
        let held: Vec<Key> = match kind {
            Kind::Pod | Kind::Device => {
                self.placed.keys().filter(|key| key.kind() == kind).cloned().collect()
            }
            Kind::Node => {
                self.nodes.keys().filter_map(|name| Key::new(Kind::Node, "", name)).collect()
            }
            _ => self.shared.keys().filter(|key| key.kind() == kind).cloned().collect(),
        };
        for key in &held {
            let is_unknown = self
                .shared
                .get(key)
                .is_some_and(|shared| matches!(shared.state, SharedState::Unknown(_)));
            if is_unknown && self.fetching.contains_key(key) {
                // The read says it.
            } else if !keys.contains(key) {
                match self.read_since_list(key, floor) {
                    Some(name) => self.relist(&name),
                    None => self.delete(key, None),
                }
            } else if is_unknown {
                // It was listed before a pod referred to it.
                self.fetch(key);
            }
        }
        self.listed.insert(kind);
        if let Some(listing) = listing {
            self.end_list(kind, listing);
        }
        if self.unavailable.remove(&kind) {
            self.judge(kind);
        }
        if kind == Kind::Node {
            self.collect_syncs();
        }
        self.end_list_wait();
    }

    /// The node of a pod that a read has shown, when that read may be newer than a list that lacks the pod.
    /// `floor` is what had been seen when the list was begun.
    fn read_since_list(&self, key: &Key, floor: Option<u64>) -> Option<Arc<str>> {
        let progress = self.progress.get(&key.kind()).copied().unwrap_or(0);
        let progress = floor.unwrap_or(progress);
        let name = &self.placed.get(key).filter(|_| key.kind() == Kind::Pod)?.node;
        let read_at = self.nodes.get(name)?.read_at;
        (read_at > progress).then(|| Arc::clone(name))
    }

    /// Marks everything of a kind on every node: nothing of it has been compared while the API did not know it.
    fn judge(&mut self, kind: Kind) {
        let mut marks = Vec::new();
        for (name, node) in &self.nodes {
            let of_kind = node.known.keys().chain(&node.placed).filter(|key| key.kind() == kind);
            marks.extend(of_kind.map(|key| (Arc::clone(name), key.clone())));
        }
        for (key, shared) in self.shared.iter().filter(|(key, _)| key.kind() == kind) {
            marks.extend(shared.users.keys().map(|name| (Arc::clone(name), key.clone())));
        }
        for (name, key) in marks {
            self.mark(&name, &key);
        }
    }

    /// Asks for one object as it is now.
    fn fetch(&mut self, key: &Key) {
        *self.fetching.entry(key.clone()).or_default() += 1;
        self.outputs.push_back(Output::Fetch(key.clone()));
    }

    fn fetched(&mut self, key: &Key, object: Option<Value>, at: Option<u64>) {
        if let Some(count) = self.fetching.get_mut(key) {
            *count -= 1;
            if *count > 0 {
                return; // a newer read is under way
            }
            self.fetching.remove(key);
        }
        let version =
            |object: &Value| object["metadata"]["resourceVersion"].as_str().and_then(number);
        let at = at.or_else(|| version(object.as_ref()?)).unwrap_or(0);
        self.show(key.kind(), at);
        // What the watch has said up to the read is old, whatever it was.
        let is_newer = |of: &Version| number(&of.resource_version).is_some_and(|of| of > at);
        if object.is_none() {
            self.note_absent(key, at);
        }
        if self.collecting.remove(key) && object.is_none() {
            let name = self.intern_node(key.name());
            if self.session(&name).is_none() {
                self.syncs.forget_until(&name, at);
            }
        }
        match key.kind() {
            Kind::Node => self.fetched_node(key, object, is_newer),
            Kind::Pod | Kind::Device => match object {
                Some(object) => {
                    self.note_gone(key, object["metadata"]["uid"].as_str(), at);
                    self.change_placed(key.clone(), object);
                }
                None => {
                    if self.placed.get(key).is_some_and(|placed| !is_newer(&placed.version)) {
                        self.displace(key, None);
                    }
                }
            },
            _ => {
                let Some(Shared { state: state @ SharedState::Unknown(_), .. }) =
                    self.shared.get_mut(key)
                else {
                    // Nothing refers to it any more.
                    return self.end_doubt(key);
                };
                let SharedState::Unknown(seen) = std::mem::replace(state, SharedState::Absent)
                else {
                    return self.end_doubt(key);
                };
                let seen = seen.filter(|seen| is_newer(seen));
                let read =
                    object.and_then(|object| Version::read(key.kind(), object, seen.as_deref()));
                if let Some(version) = read.or(seen) {
                    *state = SharedState::Present(version);
                }
                self.mark_users(key);
            }
        }
        self.end_doubt(key);
    }

    /// A read at version `at` did not find it: what a watch that is not as far says of it is old.
    fn note_absent(&mut self, key: &Key, at: u64) {
        if self.progress.get(&key.kind()).is_some_and(|of| *of >= at) {
            return;
        }
        let absent = self.absent.entry(key.kind()).or_default();
        absent.insert(key.clone(), at);
        if absent.len() > ABSENT_MAX {
            absent.pop_first();
        }
    }

    /// A read at version `at` has shown `successor` or nothing where another object was placed: that one is gone for good,
    /// whatever a watch that is not as far says of it. It may name it only after the successor has gone as well.
    fn note_gone(&mut self, key: &Key, successor: Option<&str>, at: u64) {
        let Some(placed) = self.placed.get(key) else { return };
        let uid = &placed.version.uid;
        let is_behind = self.progress.get(&key.kind()).is_none_or(|of| *of < at);
        if key.kind() != Kind::Pod || successor == Some(&**uid) || !is_behind {
            return;
        }
        self.gone.insert((key.clone(), Arc::clone(uid)), at);
        if self.gone.len() > ABSENT_MAX {
            self.gone.pop_first();
        }
    }

    fn fetched_node(
        &mut self,
        key: &Key,
        object: Option<Value>,
        is_newer: impl Fn(&Version) -> bool,
    ) {
        let name = self.intern_node(key.name());
        let Some(node) = self.nodes.get_mut(&name).filter(|node| node.edge) else { return };
        match object {
            Some(object) => self.change_node(key, object),
            None if matches!(&node.object, NodeObject::Present(held) if is_newer(held)) => {}
            None => {
                node.object = NodeObject::Absent;
                self.mark(&name, key);
            }
        }
    }

    /// Asks for the pods of a node as they are now. A read that is under way may be of a moment ago.
    fn relist(&mut self, name: &Arc<str>) {
        let outputs = &self.outputs;
        let is_next = |output: &Output| matches!(output, Output::Relist(of) if **of == **name);
        let relisting = self.relisting.entry(Arc::clone(name)).or_default();
        if relisting.reads > 0 && outputs.iter().any(is_next) {
            return;
        }
        relisting.reads += 1;
        self.outputs.push_back(Output::Relist(name.as_ref().to_owned()));
    }

    fn relisted(&mut self, name: &str, pods: Vec<Value>, at: Option<u64>) {
        let Some(relisting) = self.relisting.get_mut(name) else { return };
        let version =
            |pod: &Value| number(pod["metadata"]["resourceVersion"].as_str().unwrap_or_default());
        let at = at.or_else(|| pods.iter().filter_map(version).max()).unwrap_or(0);
        relisting.reads -= 1;
        let is_last = relisting.reads == 0;
        let is_overtaken = at < relisting.newest;
        relisting.newest = relisting.newest.max(at);
        if !is_overtaken {
            let deleted = relisting.deleted.clone();
            self.take_pods(name, pods, at, &deleted);
        }
        if !is_last {
            return;
        }
        self.relisting.remove(name);
        // Everything that waited for this list, and then a connection that did.
        let name = self.intern_node(name);
        let node = self.nodes.get(&name).into_iter();
        let keys = node.flat_map(|node| node.known.keys().chain(&node.placed));
        for key in keys.filter(|key| key.kind() == Kind::Pod).cloned().collect::<Vec<_>>() {
            self.mark(&name, &key);
        }
        self.end_list_wait();
    }

    /// Takes a list of the pods of a node, read at version `at`.
    fn take_pods(
        &mut self,
        name: &str,
        pods: Vec<Value>,
        at: u64,
        deleted: &BTreeSet<(Key, Arc<str>)>,
    ) {
        let mut listed = BTreeSet::new();
        for pod in pods {
            if pod["spec"]["nodeName"] != name {
                continue;
            }
            let Some(key) = Key::of_object(Kind::Pod, &pod) else { continue };
            let text = |field: &str| pod["metadata"][field].as_str().unwrap_or_default();
            let is_deleted = |uid: &str| deleted.contains(&(key.clone(), uid.into()));
            if is_deleted(text("uid")) || is_deleted("") {
                continue;
            }
            listed.insert(key.clone());
            self.note_gone(&key, Some(text("uid")), at);
            self.change_placed(key, pod);
        }
        self.show(Kind::Pod, at);
        if let Some(node) = self.nodes.get_mut(name) {
            node.read_at = at;
            let is_old = |key: &&Key| {
                let version = self.placed.get(key).map(|placed| &placed.version.resource_version);
                key.kind() == Kind::Pod
                    && !listed.contains(*key)
                    && version.and_then(|version| number(version)).is_some_and(|of| of <= at)
            };
            let gone: Vec<Key> = node.placed.iter().filter(is_old).cloned().collect();
            for key in gone {
                self.note_gone(&key, None, at);
                self.displace(&key, None);
            }
        }
    }

    /// Drops the pods of a node that is no edge node.
    fn forget_pods(&mut self, name: &Arc<str>) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let of_node = std::mem::take(&mut node.placed);
        let (pods, others) = of_node.into_iter().partition(|key| key.kind() == Kind::Pod);
        node.placed = others;
        let pods: BTreeSet<Key> = pods;
        for key in pods {
            if let Some(placed) = self.placed.remove(&key) {
                self.release(name, &placed.references);
            }
        }
    }

    /// Something live on `name` refers to `key`. Returns the key as it is held.
    fn refer(&mut self, name: &Arc<str>, key: &Key) -> Key {
        let key = match self.shared.get_key_value(key) {
            Some((held, _)) => held.clone(),
            None => {
                let mut shared = Shared::unknown();
                if self.listed.contains(&key.kind()) {
                    if key.kind().is_custom() {
                        shared.state = SharedState::Absent;
                    } else {
                        // Before the first list is complete the list itself brings the object.
                        self.fetch(key);
                    }
                }
                self.shared.insert(key.clone(), shared);
                key.clone()
            }
        };
        let shared = self.shared.get_mut(&key).expect("was found or made just now");
        *shared.users.entry(Arc::clone(name)).or_default() += 1;
        self.mark(name, &key);
        key
    }

    /// Something live on `name` refers to these no longer.
    fn release(&mut self, name: &Arc<str>, keys: &[Key]) {
        for key in keys {
            let Some(shared) = self.shared.get_mut(key) else { continue };
            if let Some(count) = shared.users.get_mut(name) {
                *count -= 1;
                if *count == 0 {
                    shared.users.remove(name);
                }
            }
            let is_present = matches!(shared.state, SharedState::Present(_));
            if shared.users.is_empty() && !(key.kind().is_custom() && is_present) {
                self.shared.remove(key);
            }
            self.mark(name, key);
        }
    }

    /// Marks `key` on every node that uses it.
    fn mark_users(&mut self, key: &Key) {
        let Some(shared) = self.shared.get(key) else { return };
        let users: Vec<Arc<str>> = shared.users.keys().cloned().collect();
        for name in users {
            self.mark(&name, key);
        }
    }

    /// Marks the devices of a node that wait for this model.
    fn mark_devices(&mut self, name: &Arc<str>, model: &Key) {
        let placed = self.nodes.get(name).into_iter().flat_map(|node| &node.placed);
        let refers = |of: &&Key| {
            of.kind() == Kind::Device
                && self.placed.get(of).is_some_and(|device| device.references.contains(model))
        };
        for device in placed.filter(refers).cloned().collect::<Vec<_>>() {
            self.mark(name, &device);
        }
    }

    /// What `node` should have under `key`, which is not [`Kind::Watched`].
    fn wanted(&self, node: &str, key: &Key) -> Wanted<'_> {
        if self.unavailable.contains(&key.kind()) {
            return Wanted::Unjudged;
        }
        match key.kind() {
            Kind::Pod | Kind::Device => {
                match self.placed.get(key).filter(|placed| *placed.node == *node) {
                    Some(placed) if self.is_complete(placed) => Wanted::Present(&placed.version),
                    Some(_) => Wanted::Unjudged,
                    None => Wanted::Absent,
                }
            }
            Kind::Node if key.name() != node => Wanted::Absent,
            Kind::Node => match self.nodes.get(node).map(|node| &node.object) {
                Some(NodeObject::Present(version)) => Wanted::Present(version),
                Some(NodeObject::Foreign) => Wanted::Unknown,
                _ => Wanted::Absent,
            },
            _ => match self.shared.get(key).filter(|shared| shared.users.contains_key(node)) {
                None => Wanted::Absent,
                Some(shared) => match &shared.state {
                    SharedState::Unknown(_) => Wanted::Unknown,
                    SharedState::Absent => Wanted::Absent,
                    SharedState::Present(version) => Wanted::Present(version),
                },
            },
        }
    }

    /// Whether it can be sent: a device is of no use before its model is there. A pod is; it waits on the node.
    fn is_complete(&self, placed: &Placed) -> bool {
        placed.references.iter().filter(|key| key.kind() == Kind::DeviceModel).all(|key| {
            let shared = self.shared.get(key);
            shared.is_some_and(|shared| matches!(shared.state, SharedState::Present(_)))
        })
    }

    /// Keeps the last state of an object that `name` holds and should not; while it is away, only of devices, whose
    /// mappers have to be told with it.
    fn bury(&mut self, name: &str, key: &Key, version: &Arc<Version>) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let is_told = node.session.is_some() || key.kind() == Kind::Device;
        if is_told && node.known.contains_key(key) && node.graves.len() < GRAVES_MAX {
            node.graves.insert(key.clone(), Arc::clone(version));
        }
    }

    /// The name as it is held, so that all who keep it share it.
    fn intern_node(&self, name: &str) -> Arc<str> {
        self.nodes.get_key_value(name).map_or_else(|| name.into(), |(name, _)| Arc::clone(name))
    }

    /// Drops a node of which nothing is left. What a removed node holds is forgotten with it, as its records are.
    fn tidy_node(&mut self, name: &str) {
        let is_over = |node: &Node| {
            matches!(node.object, NodeObject::Absent)
                && node.session.is_none()
                && node.placed.is_empty()
                && (node.removed || node.known.is_empty())
        };
        if self.nodes.get(name).is_some_and(is_over) {
            self.nodes.remove(name);
        }
    }
}

impl Node {
    /// Known to be there and to be no edge node, so that nothing of it is kept.
    fn is_foreign(&self) -> bool {
        matches!(self.object, NodeObject::Foreign) && !self.edge
    }

    /// Its connection, once differences go out.
    fn live(&mut self) -> Option<&mut Session> {
        self.session.as_deref_mut().filter(|session| matches!(session.phase, Phase::Live))
    }
}

impl Shared {
    fn unknown() -> Self {
        Self { users: BTreeMap::new(), state: SharedState::Unknown(None) }
    }
}

#[cfg(test)]
mod tests;
