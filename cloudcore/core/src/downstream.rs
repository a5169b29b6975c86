//! What each node should have, and the messages that take it there.
//!
//! A node should have its own Node object, the pods bound to it, and the ConfigMaps and Secrets that its live pods
//! refer to; nothing else, and nothing of another node. [`Downstream`] holds that, and beside it what each connected
//! node is known to hold. Every input that changes one side compares the two for the objects concerned, and the
//! difference goes out. There is no log of events, so a lost event cannot be missed twice.
//!
//! A change that matters to no node is not sent: `metadata.resourceVersion`, `managedFields` and `generation`, and the
//! status, which the node itself writes (except conditions that are readiness gates, which others write). KubeEdge
//! sends those echoes; its edge does not need them.
//!
//! # After a reconnect
//!
//! - Our own edge tells what it holds ([`skerry_protocol::digest`]). Until then, at most [`DIGEST_WAIT`], nothing is
//!   pushed; then only differences are, deletes included, and at the end the response to the digest.
//! - A KubeEdge edge tells nothing, so every live object is pushed again as `update`. Objects that went away while it
//!   was gone are deleted as far as this process knows what that node had been sent. **After a restart of CloudCore
//!   that knowledge is gone**: a KubeEdge edge then keeps what was deleted during its absence, until ObjectSync
//!   objects are read (a later part). Our own edge is not affected.
//!
//! The hub task of `cloudcore/` is the caller: it calls [`Downstream::handle`] and then drains
//! [`Downstream::poll_output`]. No I/O, no clock.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/edgecontroller/controller/downstream.go; golden file
//! `protocol/golden/session.jsonl` for operations, resources and sources.

use crate::references;
use serde_json::Value;
use serde_json::value::RawValue;
use skerry_protocol::capability::Capabilities;
use skerry_protocol::digest::Digest;
use skerry_protocol::{Message, MessageId, Operation, ResourcePath};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a new connection of our own edge may take to send its digest before everything is pushed.
pub const DIGEST_WAIT: Duration = Duration::from_secs(5);

/// The label that makes a Node an edge node for KubeEdge.
pub const EDGE_LABEL: &str = "node-role.kubernetes.io/edge";

const SOURCE: &str = "edgecontroller";
const GROUP: &str = "resource";

/// The kinds that go down, in the order in which a node should get them: a pod comes last, so that what it refers to
/// is there when it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The node's own Node.
    Node,
    /// ConfigMaps that live pods refer to.
    ConfigMap,
    /// Secrets that live pods refer to.
    Secret,
    /// Pods bound to the node.
    Pod,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Node, Self::ConfigMap, Self::Secret, Self::Pod];

    /// Type segment on the wire.
    pub fn token(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::ConfigMap => "configmap",
            Self::Secret => "secret",
            Self::Pod => "pod",
        }
    }

    /// Kind in the Kubernetes API; all are of `v1`.
    pub fn api_kind(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::ConfigMap => "ConfigMap",
            Self::Secret => "Secret",
            Self::Pod => "Pod",
        }
    }
}

/// One object. Displays as its wire path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    kind: Kind,
    namespace: String,
    name: String,
}

impl Key {
    /// `None` when a name cannot be part of a path. The namespace of a Node is ignored.
    pub fn new(kind: Kind, namespace: &str, name: &str) -> Option<Self> {
        let namespace = match kind {
            Kind::Node => skerry_protocol::resource::CLUSTER_SCOPE,
            _ => namespace,
        };
        ResourcePath::new(namespace, kind.token(), name).ok()?;
        Some(Self { kind, namespace: namespace.into(), name: name.into() })
    }

    /// The object named by a wire path, if it is of a kind that goes down.
    pub fn of_path(path: &ResourcePath) -> Option<Self> {
        let kind = Kind::ALL.into_iter().find(|kind| kind.token() == path.kind())?;
        Self::new(kind, path.namespace(), path.name()?)
    }

    /// The object's own identity, read from its metadata.
    pub fn of_object(kind: Kind, object: &Value) -> Option<Self> {
        let metadata = &object["metadata"];
        let namespace = metadata["namespace"].as_str().unwrap_or_default();
        Self::new(kind, namespace, metadata["name"].as_str()?)
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Namespace; `null` for a Node.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.namespace, self.kind.token(), self.name)
    }
}

/// Number of a connection, never used twice; a late word about an old connection is told from one about the new.
pub type SessionId = u64;

/// What the world did.
#[derive(Debug)]
pub enum Input {
    /// The API has this object in this version.
    Changed(Kind, Value),
    /// The API has this object no longer.
    Deleted(Key, Value),
    /// A list of this kind is complete and held these objects, each already given as [`Input::Changed`].
    Listed(Kind, BTreeSet<Key>),
    /// What [`Output::Fetch`] asked for; `None` when there is no such object.
    Fetched(Key, Option<Value>),
    /// What [`Output::Relist`] asked for.
    Relisted(String, Vec<Value>),
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
        node: String,
        /// The connection.
        session: SessionId,
        /// The message.
        message: Box<Message>,
    },
    /// End this connection.
    Close {
        /// The node's name.
        node: String,
        /// The connection.
        session: SessionId,
        /// Why, for the log and the close frame.
        reason: &'static str,
    },
    /// Read one object and give it as [`Input::Fetched`]; try again until the API answers.
    Fetch(Key),
    /// List the pods of this node and give them as [`Input::Relisted`]; try again until the API answers.
    Relist(String),
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
        object: Box<RawValue>,
    },
    /// There is no such object.
    Absent,
    /// A pod refers to it and it has not been read yet.
    Unknown,
}

/// What every node should have and what every connected node has.
#[derive(Debug, Default)]
pub struct Downstream {
    pods: BTreeMap<Key, Pod>,
    configs: BTreeMap<Key, Config>,
    nodes: BTreeMap<String, Node>,
    listed: BTreeSet<Kind>,
    outputs: VecDeque<Output>,
}

#[derive(Debug)]
struct Pod {
    node: String,
    references: BTreeSet<Key>,
    version: Version,
}

/// A ConfigMap or Secret that some pod refers to; others are not kept.
#[derive(Debug)]
struct Config {
    /// Live pods that refer to it, counted by node.
    users: BTreeMap<String, usize>,
    state: ConfigState,
}

#[derive(Debug)]
enum ConfigState {
    /// Not read yet.
    Unknown,
    Absent,
    Present(Version),
}

#[derive(Debug, Default)]
struct Node {
    /// The Node object; for a node that is no edge node its text is not kept.
    object: NodeObject,
    /// It carries the label of an edge node, or it has been connected.
    edge: bool,
    session: Option<Session>,
    /// What the node holds or has been sent.
    known: BTreeMap<Key, Known>,
    /// Objects whose delete has not been acknowledged, by uid.
    deleting: BTreeMap<(Key, String), MessageId>,
    /// Pods deleted while a list of this node's pods is under way; that list may still show them.
    relisting: Option<BTreeSet<Key>>,
}

#[derive(Debug, Default)]
enum NodeObject {
    #[default]
    Absent,
    /// It is there and is no edge node.
    Foreign,
    Present(Version),
}

#[derive(Debug)]
struct Session {
    id: SessionId,
    capabilities: Capabilities,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// Our own edge has not told yet what it holds.
    AwaitingDigest { until: Instant },
    /// The API has not told yet what there is.
    AwaitingLists { digest: Option<(Digest, Box<Message>)> },
    /// Differences go out at once.
    Live,
}

/// The version of an object that a node holds or has been sent last.
#[derive(Debug, PartialEq, Eq)]
struct Known {
    uid: String,
    resource_version: String,
}

/// One version of an object, ready to be sent.
#[derive(Debug)]
struct Version {
    uid: String,
    resource_version: String,
    /// The oldest version known to differ in nothing that matters.
    since: String,
    /// Of everything that matters.
    fingerprint: u64,
    text: Box<RawValue>,
    terminating: bool,
}

enum Wanted<'a> {
    Unknown,
    Absent,
    Present(&'a Version),
}

impl Downstream {
    /// Takes one input. `now_ms` is Unix time in milliseconds and goes into messages only.
    pub fn handle(&mut self, input: Input, now: Instant, now_ms: i64) {
        match input {
            Input::Changed(kind, object) => self.change(kind, object, now_ms),
            Input::Deleted(key, last) => self.delete(&key, Some(&last), now_ms),
            Input::Listed(kind, keys) => self.list(kind, &keys, now_ms),
            Input::Fetched(key, object) => self.fetched(&key, object, now_ms),
            Input::Relisted(node, pods) => self.relisted(&node, pods, now_ms),
            Input::Connected { node, session, capabilities } => {
                self.connect(&node, session, capabilities, now, now_ms);
            }
            Input::Digest { node, session, digest, request } => {
                self.digest(&node, session, digest, request, now_ms);
            }
            Input::Acked { node, session, message } => self.acked(&node, session, &message),
            Input::Disconnected { node, session } => {
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.session.take_if(|current| current.id == session);
                }
            }
            Input::Tick => {}
        }
        self.stop_waiting(now, now_ms);
    }

    /// Returns the next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Input::Tick`] is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let until = |node: &Node| match node.session.as_ref()?.phase {
            Phase::AwaitingDigest { until } => Some(until),
            _ => None,
        };
        self.nodes.values().filter_map(until).min()
    }

    /// Whether `node` may read this ConfigMap or Secret, and the object when it is held.
    pub fn access(&self, node: &str, key: &Key) -> Access {
        match self.configs.get(key).filter(|config| config.users.contains_key(node)) {
            None => Access::Denied,
            Some(Config { state: ConfigState::Unknown, .. }) => Access::Unknown,
            Some(Config { state: ConfigState::Absent, .. }) => Access::Absent,
            Some(Config { state: ConfigState::Present(version), .. }) => Access::Held {
                resource_version: version.resource_version.clone(),
                object: version.text.clone(),
            },
        }
    }

    /// The node to which a pod is bound, and the pod's uid, if the pod is of an edge node.
    pub fn binding(&self, pod: &Key) -> Option<(&str, &str)> {
        self.pods.get(pod).map(|pod| (pod.node.as_str(), pod.version.uid.as_str()))
    }

    /// The connection of a node.
    pub fn session(&self, node: &str) -> Option<SessionId> {
        self.nodes.get(node)?.session.as_ref().map(|session| session.id)
    }

    fn change(&mut self, kind: Kind, object: Value, now_ms: i64) {
        let Some(key) = Key::of_object(kind, &object) else { return };
        match kind {
            Kind::Pod => self.change_pod(key, object, now_ms),
            Kind::Node => self.change_node(&key, object, now_ms),
            Kind::ConfigMap | Kind::Secret => self.change_config(&key, object, now_ms),
        }
    }

    fn change_pod(&mut self, key: Key, object: Value, now_ms: i64) {
        let Some(node) = object["spec"]["nodeName"].as_str().filter(|node| !node.is_empty()) else {
            return;
        };
        let node = node.to_owned();
        if self.nodes.get(&node).is_some_and(Node::is_foreign) {
            if self.pods.get(&key).is_some_and(|old| object["metadata"]["uid"] != *old.version.uid)
            {
                self.delete(&key, None, now_ms);
            }
            return;
        }
        let references = references::of_pod(&object);
        let old = self.pods.get(&key);
        let Some(version) = Version::read(Kind::Pod, object, old.map(|old| &old.version)) else {
            return;
        };
        let old_references = old.map(|old| old.references.clone()).unwrap_or_default();
        let old_node = old.map(|old| old.node.clone()).filter(|old_node| *old_node != node);
        if let Some(old_node) = &old_node {
            // Another pod under the same name: binding is for life.
            self.pods.remove(&key);
            self.release(old_node, &old_references, now_ms);
            self.compare(old_node, &key, None, now_ms);
        }
        // What the pod refers to goes first.
        let kept = if old_node.is_some() { BTreeSet::new() } else { old_references };
        for reference in references.difference(&kept) {
            self.refer(&node, reference, now_ms);
        }
        let gone: BTreeSet<_> = kept.difference(&references).cloned().collect();
        self.pods.insert(key.clone(), Pod { node: node.clone(), references, version });
        self.compare(&node, &key, None, now_ms);
        self.release(&node, &gone, now_ms);
    }

    fn change_node(&mut self, key: &Key, object: Value, now_ms: i64) {
        let label = object["metadata"]["labels"].get(EDGE_LABEL).is_some();
        let node = self.nodes.entry(key.name.clone()).or_default();
        let was_foreign = node.is_foreign();
        node.edge |= label;
        if !node.edge {
            node.object = NodeObject::Foreign;
            self.forget_pods(&key.name, now_ms);
            return;
        }
        let old = match &node.object {
            NodeObject::Present(version) => Some(version),
            _ => None,
        };
        if let Some(version) = Version::read(Kind::Node, object, old) {
            node.object = NodeObject::Present(version);
        }
        if was_foreign {
            self.relist(&key.name);
        }
        self.compare(&key.name, key, None, now_ms);
    }

    fn change_config(&mut self, key: &Key, object: Value, now_ms: i64) {
        // What no pod refers to is not kept; it is fetched when one does.
        let Some(config) = self.configs.get_mut(key) else { return };
        let old = match &config.state {
            ConfigState::Present(version) => Some(version),
            _ => None,
        };
        let Some(version) = Version::read(key.kind, object, old) else { return };
        config.state = ConfigState::Present(version);
        self.compare_users(key, None, now_ms);
    }

    fn delete(&mut self, key: &Key, last: Option<&Value>, now_ms: i64) {
        let last_uid = last.and_then(|last| last["metadata"]["uid"].as_str());
        // A late word about an object whose successor is already known.
        let is_other = |version: &Version| last_uid.is_some_and(|uid| uid != version.uid);
        match key.kind {
            Kind::Pod => {
                for node in self.nodes.values_mut() {
                    if let Some(deleted) = &mut node.relisting {
                        deleted.insert(key.clone());
                    }
                }
                if self.pods.get(key).is_none_or(|pod| is_other(&pod.version)) {
                    return;
                }
                let mut pod = self.pods.remove(key).expect("was found just now");
                if let Some(last) = last.cloned()
                    && let Some(last) = Version::read(Kind::Pod, last, None)
                {
                    pod.version = last;
                }
                self.compare(&pod.node, key, Some(&pod.version), now_ms);
                self.release(&pod.node, &pod.references, now_ms);
            }
            Kind::Node => {
                let Some(node) = self.nodes.get_mut(&key.name) else { return };
                if matches!(node.object, NodeObject::Present(ref version) if is_other(version)) {
                    return;
                }
                let old = std::mem::take(&mut node.object);
                match &node.session {
                    Some(_) if matches!(old, NodeObject::Absent) => {}
                    None => {
                        if !self.pods.values().any(|pod| pod.node == key.name) {
                            self.nodes.remove(&key.name);
                        }
                    }
                    // As KubeEdge does: its edge finds out by itself that its Node is gone, if at all.
                    Some(session) if !session.capabilities.digest => {
                        let reason = "the Node object was deleted";
                        let (node, session) = (key.name.clone(), session.id);
                        self.outputs.push_back(Output::Close { node, session, reason });
                    }
                    Some(_) => self.compare(&key.name, key, None, now_ms),
                }
            }
            Kind::ConfigMap | Kind::Secret => {
                let Some(config) = self.configs.get_mut(key) else { return };
                if matches!(&config.state, ConfigState::Present(version) if is_other(version)) {
                    return;
                }
                let state = std::mem::replace(&mut config.state, ConfigState::Absent);
                let last = match &state {
                    ConfigState::Present(version) => Some(version),
                    _ => None,
                };
                self.compare_users(key, last, now_ms);
            }
        }
    }

    fn list(&mut self, kind: Kind, keys: &BTreeSet<Key>, now_ms: i64) {
        let held: Vec<Key> = match kind {
            Kind::Pod => self.pods.keys().cloned().collect(),
            Kind::Node => {
                self.nodes.keys().filter_map(|name| Key::new(Kind::Node, "", name)).collect()
            }
            _ => self.configs.keys().filter(|key| key.kind == kind).cloned().collect(),
        };
        for key in &held {
            if !keys.contains(key) {
                self.delete(key, None, now_ms);
            } else if let Some(Config { state: ConfigState::Unknown, .. }) = self.configs.get(key) {
                // It was listed before a pod referred to it.
                self.outputs.push_back(Output::Fetch(key.clone()));
            }
        }
        self.listed.insert(kind);
        if self.listed.len() == Kind::ALL.len() {
            self.end_list_wait(now_ms);
        }
    }

    fn fetched(&mut self, key: &Key, object: Option<Value>, now_ms: i64) {
        if key.kind == Kind::Node {
            let is_missing = |node: &Node| matches!(node.object, NodeObject::Foreign) && node.edge;
            if let Some(object) = object
                && self.nodes.get(&key.name).is_some_and(is_missing)
            {
                self.change_node(key, object, now_ms);
            }
            return;
        }
        // Whatever the watch has said since is newer.
        if !matches!(self.configs.get(key), Some(Config { state: ConfigState::Unknown, .. })) {
            return;
        }
        match object {
            Some(object) => self.change_config(key, object, now_ms),
            None => self.delete(key, None, now_ms),
        }
    }

    fn relist(&mut self, name: &str) {
        let node = self.nodes.entry(name.into()).or_default();
        if node.relisting.is_none() {
            node.relisting = Some(BTreeSet::new());
            self.outputs.push_back(Output::Relist(name.into()));
        }
    }

    fn relisted(&mut self, name: &str, pods: Vec<Value>, now_ms: i64) {
        let Some(deleted) = self.nodes.get_mut(name).and_then(|node| node.relisting.take()) else {
            return;
        };
        for pod in pods {
            let is_live = |key: &Key| !deleted.contains(key);
            let is_ours = pod["spec"]["nodeName"] == name;
            if let Some(key) = Key::of_object(Kind::Pod, &pod).filter(is_live)
                && is_ours
            {
                self.change_pod(key, pod, now_ms);
            }
        }
        // A connection that waited for this list.
        self.end_list_wait(now_ms);
    }

    fn connect(
        &mut self,
        name: &str,
        id: SessionId,
        capabilities: Capabilities,
        now: Instant,
        now_ms: i64,
    ) {
        let node = self.nodes.entry(name.into()).or_default();
        let was_foreign = node.is_foreign();
        node.edge = true;
        let phase = if capabilities.digest {
            Phase::AwaitingDigest { until: now + DIGEST_WAIT }
        } else {
            Phase::AwaitingLists { digest: None }
        };
        let old = node.session.replace(Session { id, capabilities, phase });
        if let Some(old) = old {
            self.outputs.push_back(Output::Close {
                node: name.into(),
                session: old.id,
                reason: "the node opened a new connection",
            });
        }
        if was_foreign {
            // Neither its pods nor its Node were kept.
            self.relist(name);
            self.outputs.extend(Key::new(Kind::Node, "", name).map(Output::Fetch));
        }
        self.end_list_wait(now_ms);
    }

    fn digest(
        &mut self,
        name: &str,
        id: SessionId,
        digest: Digest,
        request: Box<Message>,
        now_ms: i64,
    ) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let Some(session) = node.session.as_mut().filter(|session| session.id == id) else {
            return;
        };
        match session.phase {
            Phase::AwaitingDigest { .. } | Phase::AwaitingLists { .. } => {
                session.phase = Phase::AwaitingLists { digest: Some((digest, request)) };
                self.end_list_wait(now_ms);
            }
            Phase::Live => {
                // It came after everything had been pushed; it can still tell of objects that are gone.
                let mut extra = Vec::new();
                for (key, held) in held_keys(&digest) {
                    if !node.known.contains_key(&key) {
                        node.known.insert(key.clone(), held);
                        extra.push(key);
                    }
                }
                for key in extra {
                    self.compare(name, &key, None, now_ms);
                }
                self.send(name, request.response(now_ms, "OK"));
            }
        }
    }

    fn acked(&mut self, name: &str, id: SessionId, message: &Message) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if node.session.as_ref().is_none_or(|session| session.id != id) {
            return;
        }
        if message.operation() == Some(Operation::Delete)
            && let Ok(path) = message.route.resource.parse()
            && let Some(key) = Key::of_path(&path)
        {
            node.deleting.retain(|(of, _), id| *of != key || *id != message.header.msg_id);
        }
    }

    /// Ends the wait for a digest that did not come.
    fn stop_waiting(&mut self, now: Instant, now_ms: i64) {
        let mut ended = false;
        for session in self.nodes.values_mut().filter_map(|node| node.session.as_mut()) {
            if matches!(session.phase, Phase::AwaitingDigest { until } if until <= now) {
                session.phase = Phase::AwaitingLists { digest: None };
                ended = true;
            }
        }
        if ended {
            self.end_list_wait(now_ms);
        }
    }

    /// Begins to serve the connections that have told what they hold, once the API has told what there is.
    fn end_list_wait(&mut self, now_ms: i64) {
        if self.listed.len() < Kind::ALL.len() {
            return;
        }
        let is_waiting = |node: &Node| {
            let waits = |session: &Session| matches!(session.phase, Phase::AwaitingLists { .. });
            node.session.as_ref().is_some_and(waits) && node.relisting.is_none()
        };
        let waiting: Vec<String> = self
            .nodes
            .iter()
            .filter(|(_, node)| is_waiting(node))
            .map(|(name, _)| name.clone())
            .collect();
        for name in waiting {
            self.go_live(&name, now_ms);
        }
    }

    fn go_live(&mut self, name: &str, now_ms: i64) {
        let node = self.nodes.get_mut(name).expect("the caller found it");
        let session = node.session.as_mut().expect("the caller found it");
        let phase = std::mem::replace(&mut session.phase, Phase::Live);
        let Phase::AwaitingLists { digest } = phase else { return };
        let request = match digest {
            Some((digest, request)) => {
                node.known = held_keys(&digest).collect();
                node.deleting.clear();
                Some(request)
            }
            None => {
                // Whatever it has, it gets again; what it has been sent earlier and is gone, is deleted.
                for known in node.known.values_mut() {
                    known.resource_version.clear();
                }
                None
            }
        };
        let deleting: Vec<_> = node.deleting.keys().cloned().collect();
        let mut keys: BTreeSet<Key> = node.known.keys().cloned().collect();
        keys.extend(Key::new(Kind::Node, "", name));
        for (key, pod) in &self.pods {
            if pod.node == name {
                keys.insert(key.clone());
                keys.extend(pod.references.iter().cloned());
            }
        }
        for (key, uid) in deleting {
            // A config that is wanted again comes as an update below.
            if !matches!(self.wanted(name, &key), Wanted::Present(version) if version.uid == uid) {
                self.send_delete(name, &key, &uid, None, now_ms);
            }
        }
        for key in keys {
            if request.is_none()
                && let Wanted::Present(version) = self.wanted(name, &key)
            {
                // As if it held some version, so that the push is an `update`, as after every outage of KubeEdge's.
                let uid = version.uid.clone();
                let node = self.nodes.get_mut(name).expect("the caller found it");
                node.known.entry(key.clone()).or_insert_with(|| Known::of_version_unknown(uid));
            }
            self.compare(name, &key, None, now_ms);
        }
        if let Some(request) = request {
            self.send(name, request.response(now_ms, "OK"));
        }
    }

    /// Drops the pods of a node that is no edge node.
    fn forget_pods(&mut self, name: &str, now_ms: i64) {
        let keys: Vec<Key> = self
            .pods
            .iter()
            .filter(|(_, pod)| pod.node == name)
            .map(|(key, _)| key.clone())
            .collect();
        for key in keys {
            let pod = self.pods.remove(&key).expect("was found just now");
            self.release(name, &pod.references, now_ms);
        }
    }

    /// A live pod of `node` refers to `key`.
    fn refer(&mut self, node: &str, key: &Key, now_ms: i64) {
        let listed = self.listed.contains(&key.kind);
        let config = self.configs.entry(key.clone()).or_insert_with(|| {
            // Before the first list is complete the list itself brings the object.
            if listed {
                self.outputs.push_back(Output::Fetch(key.clone()));
            }
            Config { users: BTreeMap::new(), state: ConfigState::Unknown }
        });
        *config.users.entry(node.into()).or_default() += 1;
        self.compare(node, key, None, now_ms);
    }

    /// A live pod of `node` refers to these no longer.
    fn release(&mut self, node: &str, keys: &BTreeSet<Key>, now_ms: i64) {
        for key in keys {
            let Some(config) = self.configs.get_mut(key) else { continue };
            if let Some(count) = config.users.get_mut(node) {
                *count -= 1;
                if *count == 0 {
                    config.users.remove(node);
                }
            }
            if config.users.is_empty() {
                self.configs.remove(key);
            }
            self.compare(node, key, None, now_ms);
        }
    }

    fn compare_users(&mut self, key: &Key, last: Option<&Version>, now_ms: i64) {
        let users: Vec<String> = self
            .configs
            .get(key)
            .map(|config| config.users.keys().cloned().collect())
            .unwrap_or_default();
        for node in users {
            self.compare(&node, key, last, now_ms);
        }
    }

    /// What `node` should have under `key`.
    fn wanted(&self, node: &str, key: &Key) -> Wanted<'_> {
        match key.kind {
            Kind::Pod => match self.pods.get(key).filter(|pod| pod.node == node) {
                Some(pod) => Wanted::Present(&pod.version),
                None => Wanted::Absent,
            },
            Kind::Node if key.name != node => Wanted::Absent,
            Kind::Node => match self.nodes.get(node).map(|node| &node.object) {
                Some(NodeObject::Present(version)) => Wanted::Present(version),
                Some(NodeObject::Foreign) => Wanted::Unknown,
                _ => Wanted::Absent,
            },
            _ => match self.configs.get(key).filter(|config| config.users.contains_key(node)) {
                None => Wanted::Absent,
                Some(config) => match &config.state {
                    ConfigState::Unknown => Wanted::Unknown,
                    ConfigState::Absent => Wanted::Absent,
                    ConfigState::Present(version) => Wanted::Present(version),
                },
            },
        }
    }

    /// Sends what takes `node` from what it has under `key` to what it should have, if it is live.
    ///
    /// `last` is the object that has just gone, for the body of the delete.
    fn compare(&mut self, name: &str, key: &Key, last: Option<&Version>, now_ms: i64) {
        let Some(node) = self.nodes.get(name) else { return };
        let Some(Session { phase: Phase::Live, .. }) = node.session else { return };
        let known = node.known.get(key);
        let version = match (self.wanted(name, key), known) {
            (Wanted::Unknown, _) | (Wanted::Absent, None) => return,
            (Wanted::Absent, Some(known)) => {
                let uid = known.uid.clone();
                self.nodes.get_mut(name).expect("was found just now").known.remove(key);
                return self.send_delete(name, key, &uid, last, now_ms);
            }
            (Wanted::Present(version), _) => version,
        };
        let is_same =
            |known: &Known| known.uid == version.uid && version.is_same_as(&known.resource_version);
        if known.is_some_and(is_same) {
            return;
        }
        // Containers belong to a uid, so the old pod has to go first.
        let replaced = known
            .filter(|known| key.kind == Kind::Pod && known.uid != version.uid)
            .map(|known| known.uid.clone());
        let operation = match key.kind {
            Kind::Node | Kind::Secret => Operation::Update,
            _ if version.terminating => Operation::Update,
            _ if known.is_some() && replaced.is_none() => Operation::Update,
            _ => Operation::Insert,
        };
        let message = version.message(key, operation, now_ms);
        let now_known =
            Known { uid: version.uid.clone(), resource_version: version.resource_version.clone() };
        if let Some(uid) = replaced {
            self.send_delete(name, key, &uid, None, now_ms);
        }
        let node = self.nodes.get_mut(name).expect("was found just now");
        node.known.insert(key.clone(), now_known);
        self.send(name, message);
    }

    fn send_delete(
        &mut self,
        name: &str,
        key: &Key,
        uid: &str,
        last: Option<&Version>,
        now_ms: i64,
    ) {
        let message = delete_message(key, uid, last, now_ms);
        if let Some(node) = self.nodes.get_mut(name) {
            node.deleting.insert((key.clone(), uid.into()), message.header.msg_id.clone());
        }
        self.send(name, message);
    }

    fn send(&mut self, name: &str, message: Message) {
        if let Some(session) = self.session(name) {
            let message = Box::new(message);
            self.outputs.push_back(Output::Send { node: name.into(), session, message });
        }
    }
}

impl Node {
    /// Known to be there and to be no edge node, so that nothing of it is kept.
    fn is_foreign(&self) -> bool {
        matches!(self.object, NodeObject::Foreign) && !self.edge
    }
}

impl Known {
    /// Held in a version that is none, so that the next comparison sends the object.
    fn of_version_unknown(uid: String) -> Self {
        Self { uid, resource_version: String::new() }
    }
}

impl Version {
    /// Reads `object`. `None` when it is no object, or older than `old`.
    fn read(kind: Kind, mut object: Value, old: Option<&Self>) -> Option<Self> {
        let metadata = object.get_mut("metadata")?.as_object_mut()?;
        metadata.remove("managedFields");
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
        let uid = text(metadata.get("uid"))?;
        let resource_version = text(metadata.get("resourceVersion"))?;
        let terminating = metadata.contains_key("deletionTimestamp");
        let old = old.filter(|old| old.uid == uid);
        if let Some(old) = old
            && let (Some(held), Some(new)) =
                (number(&old.resource_version), number(&resource_version))
            && new < held
        {
            return None;
        }
        object["kind"] = kind.api_kind().into();
        object["apiVersion"] = "v1".into();
        let fingerprint = fingerprint(kind, &object);
        let since = match old.filter(|old| old.fingerprint == fingerprint) {
            Some(old) => old.since.clone(),
            None => resource_version.clone(),
        };
        let text = skerry_protocol::message::raw(&object);
        Some(Self { uid, resource_version, since, fingerprint, text, terminating })
    }

    /// Whether a node that holds `resource_version` of the same object has everything that matters.
    fn is_same_as(&self, resource_version: &str) -> bool {
        if self.resource_version == resource_version {
            return true;
        }
        let between = || {
            let held = number(resource_version)?;
            Some(number(&self.since)? <= held && held <= number(&self.resource_version)?)
        };
        between().unwrap_or(false)
    }

    fn message(&self, key: &Key, operation: Operation, now_ms: i64) -> Message {
        Message::new(now_ms, SOURCE, GROUP, operation, key.to_string(), &self.text)
            .with_version(&self.resource_version)
    }
}

/// A delete with the last object, or with a stub that names it.
fn delete_message(key: &Key, uid: &str, last: Option<&Version>, now_ms: i64) -> Message {
    if let Some(last) = last.filter(|last| last.uid == uid) {
        return last.message(key, Operation::Delete, now_ms);
    }
    let mut metadata = serde_json::json!({"name": key.name, "uid": uid});
    if key.kind != Kind::Node {
        metadata["namespace"] = key.namespace.as_str().into();
    }
    let stub = serde_json::json!({"metadata": metadata});
    Message::new(now_ms, SOURCE, GROUP, Operation::Delete, key.to_string(), &stub)
}

/// What a digest tells about objects of the kinds that go down; the rest is not ours to judge.
fn held_keys(digest: &Digest) -> impl Iterator<Item = (Key, Known)> + '_ {
    digest.objects.iter().filter_map(|(path, held)| {
        let key = Key::of_path(&path.parse().ok()?)?;
        let known = Known { uid: held.uid.clone(), resource_version: held.rv.clone() };
        Some((key, known))
    })
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
fn number(resource_version: &str) -> Option<u64> {
    resource_version.parse().ok()
}

#[cfg(test)]
mod tests;
