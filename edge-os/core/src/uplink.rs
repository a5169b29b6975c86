//! Everything that goes up: requests with their replies, the node's sign of life, statuses, events.
//!
//! One value per node. `handle_*` says what the link did, verbs say what the agent wants; then the agent drains
//! [`Uplink::take_changes`], [`Uplink::poll_transmit`] and [`Uplink::poll_output`] and sleeps until
//! [`Uplink::poll_timeout`].
//!
//! Order of sending: acknowledgements and lookups (a container waits for them), lease, node, pods, then what the
//! outbox holds. Nothing is sent twice unless its reply is overdue or the link is new; what must not get lost stays
//! wanted until its reply. What has to outlive this process is in the outbox, see [`crate::outbox`].
//!
//! What both ends can do beyond KubeEdge changes this much: with `lease` no lease messages, and an unchanged status
//! of the node every hour only; with `beat` no keepalive messages; with `receipts` events wait for an answer, and
//! replies that carry nothing to store are not acknowledged.
//!
//! Source: kubeedge/kubeedge, edge/pkg/metamanager/client; golden session.

use crate::Now;
use crate::backoff::Random;
use crate::event::{EventReport, Events};
use crate::lease::{self, Lease};
use crate::node::{Facts, Health, NodeReports, NodeVerdict, REPORT_INTERVAL, REPORT_INTERVAL_OURS};
use crate::outbox::{self, Change, Item, Kind, Outbox};
use crate::status::{PodKey, PodReports, Report, Verdict};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use skerry_protocol::delivery::ack_required;
use skerry_protocol::digest::{self, Digest};
use skerry_protocol::{Capabilities, Message, MessageId, Operation, ResourcePath};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time between two keepalives; the hub closes the connection after 30 s without one.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// Pod reports in flight at once: enough to fill a slow link, few enough that a lease is never far behind.
pub const POD_REPORTS_MAX: usize = 16;
/// Lookups waiting at once; the pod engine asks for a handful.
pub const LOOKUPS_MAX: usize = 256;
/// How long a lookup may take.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the hub may be silent while it sends the differences of a digest.
const DIGEST_TIMEOUT: Duration = Duration::from_secs(120);
/// Rows of the outbox written at once to a hub that does not answer them.
const UNANSWERED_BURST: u32 = 25;
/// Time to earn one more; a Go cloud takes 30 messages a second from a Go edge.
const UNANSWERED_INTERVAL: Duration = Duration::from_millis(50);
/// Longest cut after which the cluster cannot have missed a node whose Lease the hub renews; less than
/// [`lease::DURATION_S`].
const UNNOTICED_CUT: Duration = Duration::from_secs(lease::DURATION_S as u64 - 10);

/// Number of a lookup, for whoever waits.
pub type Ticket = u64;

/// Something for the agent to do or to know.
#[derive(Debug)]
pub enum Output {
    /// A lookup has ended. The agent stores the object, then sends `ack`, then tells whoever waits.
    Answer {
        /// From [`Uplink::lookup`].
        ticket: Ticket,
        /// What was asked for.
        path: ResourcePath,
        /// The object; `None` when the cluster has none; text when nobody knows.
        found: Result<Option<Value>, String>,
        /// To be sent when the object is stored.
        ack: Option<Message>,
    },
    /// The cluster returned an object with its reply; the row at `path` may be brought up to date.
    Object {
        /// Where it belongs.
        path: ResourcePath,
        /// The object.
        object: Value,
    },
    /// The hub has told every difference.
    DigestAnswered,
    /// A pod's delete was taken; its row stays until the hub pushes the delete.
    PodFinished(PodKey),
    /// The hub refused something; tried again or given up, but a person may want to know.
    Refused {
        /// `route.resource`.
        resource: String,
        /// The hub's words.
        reason: String,
    },
    /// Events were dropped because the queue was full.
    EventsDropped(u64),
    /// The hub holds the connection open without serving it: dial again.
    Reconnect(&'static str),
}

/// The way up of one node.
#[derive(Debug)]
pub struct Uplink {
    node: String,
    connected: bool,
    acks: VecDeque<Message>,
    lease: Lease,
    reports: NodeReports,
    pods: BTreeMap<String, (PodKey, PodReports)>,
    events: Events,
    outbox: Outbox,
    /// What the peer of the present link can do.
    peer: Capabilities,
    disconnected_at: Option<Instant>,
    unanswered: Bucket,
    lookups: BTreeMap<Ticket, Lookup>,
    last_ticket: Ticket,
    digest: Option<(Digest, Option<(MessageId, Instant)>)>,
    /// When another digest is due, for which the link has to be new.
    digest_due: Option<Instant>,
    keepalive: Instant,
    outputs: VecDeque<Output>,
    /// Number of the last upload of this run, and which run that is.
    last_upload: u64,
    uploads_of: u64,
    random: Random,
}

/// A bucket of tokens, each for one row to a hub that answers none.
#[derive(Debug)]
struct Bucket {
    tokens: u32,
    refilled: Instant,
}

/// What the outbox keeps of a pod that is gone, until its object is.
#[derive(Debug, Serialize, Deserialize)]
struct Gone {
    namespace: String,
    name: String,
    uid: String,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    status: Value,
}

#[derive(Debug)]
struct Lookup {
    path: ResourcePath,
    content: Value,
    id: Option<MessageId>,
    deadline: Instant,
}

impl Uplink {
    /// Not connected, nothing owed; `seed` decides all jitter.
    pub fn new(facts: Facts, now: Now, seed: u64) -> Self {
        Self::restore(facts, now, seed, [], |_| None)
    }

    /// Not connected; `rows` is what the outbox in the database holds, `read` returns the content of a row.
    pub fn restore(
        facts: Facts,
        now: Now,
        seed: u64,
        rows: impl IntoIterator<Item = outbox::Row>,
        mut read: impl FnMut(u64) -> Option<Arc<str>>,
    ) -> Self {
        let mut random = Random::new(seed);
        let node = facts.name.clone();
        let mut pods = BTreeMap::new();
        let rows = rows.into_iter().inspect(|row| {
            let gone = (row.kind == Kind::Note).then(|| read(row.seq)).flatten();
            let gone = gone.and_then(|text| serde_json::from_str::<Gone>(&text).ok());
            if let Some(gone) = gone {
                let mut pod = PodReports::new(&gone.uid, None, seed ^ row.seq);
                if !gone.status.is_null() {
                    pod.report(gone.status);
                }
                pod.finish();
                let key = PodKey::new(&gone.namespace, &gone.name, &gone.uid);
                pods.insert(gone.uid, (key, pod));
            }
        });
        let outbox = Outbox::restore(rows, random.next_u64());
        Self {
            connected: false,
            acks: VecDeque::new(),
            lease: Lease::new(&node, now.mono),
            reports: NodeReports::new(facts, random.next_u64()),
            pods,
            events: Events::new(&node, random.next_u64()),
            outbox,
            peer: Capabilities::default(),
            disconnected_at: None,
            unanswered: Bucket { tokens: UNANSWERED_BURST, refilled: now.mono },
            lookups: BTreeMap::new(),
            last_ticket: 0,
            digest: None,
            digest_due: None,
            keepalive: now.mono,
            outputs: VecDeque::new(),
            node,
            last_upload: 0,
            uploads_of: random.next_u64(),
            random,
        }
    }

    /// Whether a link is up.
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// The node's own state.
    pub fn node(&self) -> &NodeReports {
        &self.reports
    }

    /// When the cluster took the lease last.
    pub fn lease_renewed(&self) -> Option<Instant> {
        self.lease.renewed()
    }

    /// What is owed to the cluster and durable.
    pub fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Pods that are gone on this node and not yet in the cluster.
    pub fn gone_pods(&self) -> impl Iterator<Item = &PodKey> {
        self.pods.values().filter(|(_, pod)| pod.is_finished()).map(|(key, _)| key)
    }

    /// A link is up, or has moved to another connection: what was on the way is sent again. `peer` is what both ends
    /// can do, `digest` is given when the peer takes part in the exchange.
    pub fn handle_connected(&mut self, now: Now, peer: Capabilities, digest: Option<Digest>) {
        let cut = self.disconnected_at.map(|at| now.mono.saturating_duration_since(at));
        let unnoticed = self.connected || cut.is_some_and(|cut| cut < UNNOTICED_CUT);
        let interval = if peer.lease { REPORT_INTERVAL_OURS } else { REPORT_INTERVAL };
        // Only a hub that renewed the Lease before, too, can have kept the cluster from noticing.
        let unnoticed = unnoticed && peer.lease && self.peer.lease;
        self.connected = true;
        self.disconnected_at = None;
        self.peer = peer;
        self.keepalive = now.mono;
        self.acks.clear();
        self.lease.handle_connected(now.mono);
        self.reports.handle_connected(interval, unnoticed);
        self.pods.values_mut().for_each(|(_, pod)| pod.handle_connected());
        self.outbox.handle_connected();
        self.lookups.values_mut().for_each(|lookup| lookup.id = None);
        self.digest = digest.map(|digest| (digest, None));
    }

    /// The link is gone; whoever waits is told.
    pub fn handle_disconnected(&mut self, now: Now) {
        if std::mem::take(&mut self.connected) {
            self.disconnected_at = Some(now.mono);
        }
        self.acks.clear();
        self.digest = None;
        self.outbox.handle_connected(); // nothing is on the way any more
        for (ticket, lookup) in std::mem::take(&mut self.lookups) {
            self.answer(ticket, lookup.path, Err("connection to the cloud was lost".into()), None);
        }
    }

    /// Takes what the machine looks like. Returns whether `Ready` changed, and to what.
    pub fn update_node(&mut self, now: Now, facts: Facts, health: Health) -> Option<bool> {
        self.reports.update(now, facts, health)
    }

    /// Takes the own Node as the cluster has it.
    pub fn handle_own_node(&mut self, node: &Value) {
        self.reports.handle_own_node(node);
    }

    /// The own Node was deleted in the cluster.
    pub fn handle_own_node_gone(&mut self) {
        self.reports.handle_gone();
    }

    /// Reports the status of a pod. `stored` is `status` of its row, which is what the cluster has.
    pub fn report_pod(
        &mut self,
        key: PodKey,
        status: Value,
        stored: impl FnOnce() -> Option<Value>,
    ) {
        let seed = self.random.next_u64();
        let uid = key.uid.clone();
        let (_, pod) = self.pods.entry(uid.clone()).or_insert_with(|| {
            let stored = stored();
            (key, PodReports::new(&uid, stored, seed))
        });
        pod.report(status);
    }

    /// Nothing is left of a deleted pod on this node. From now on its last status is nowhere but in the outbox.
    pub fn finish_pod(&mut self, key: PodKey) {
        let seed = self.random.next_u64();
        let uid = key.uid.clone();
        let (key, pod) = self.pods.entry(uid.clone()).or_insert_with(|| {
            let pod = PodReports::new(&uid, None, seed);
            (key, pod)
        });
        if pod.is_finished() {
            return;
        }
        pod.finish();
        let gone = Gone {
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            uid: uid.clone(),
            status: pod.owed().cloned().unwrap_or_default(),
        };
        let content = serde_json::to_string(&gone).expect("a pod's status has only string keys");
        self.outbox.put(Item {
            key: note_key(&uid),
            kind: Kind::Note,
            operation: Operation::Delete,
            resource: format!("{}/pod/{}", key.namespace, key.name),
            content: content.into(),
        });
    }

    /// The cluster has no such pod any more.
    pub fn forget_pod(&mut self, now: Now, uid: &str) {
        self.pods.remove(uid);
        self.outbox.remove(now.mono, &note_key(uid));
    }

    /// Takes an event. It is durable once [`Self::take_changes`] is written.
    pub fn push_event(&mut self, now: Now, report: EventReport) {
        self.events.push(now, report);
        self.move_events(now.mono);
    }

    /// Takes something else that the cluster must get: sent in the order of the calls, one at a time per resource,
    /// until it is answered. A later one with the same key replaces an earlier one that was not sent yet.
    pub fn push_effect(
        &mut self,
        key: String,
        operation: Operation,
        resource: String,
        content: &Value,
    ) {
        let content = content.to_string().into();
        self.outbox.put(Item { key, kind: Kind::Effect, operation, resource, content });
    }

    /// Takes data of an application for a rule of the cloud. The oldest are dropped when too much waits, as with events.
    pub fn push_upload(&mut self, topic: String, text: String) {
        self.last_upload += 1;
        // Unlike those of the last run, which may still wait.
        let key = format!("upload/{:x}/{}", self.uploads_of, self.last_upload);
        let content = Value::from(text).to_string().into();
        let operation = Operation::Upload;
        self.outbox.put(Item { key, kind: Kind::Event, operation, resource: topic, content });
    }

    /// Returns what the database must have before it may be sent, to be written in one transaction; then
    /// [`Self::handle_stored`].
    pub fn take_changes(&mut self, now: Now) -> Vec<Change> {
        self.move_events(now.mono);
        self.outbox.take_changes(now.mono)
    }

    /// Takes whether the changes of [`Self::take_changes`] are on the disk.
    pub fn handle_stored(&mut self, now: Now, stored: bool) {
        self.outbox.handle_stored(now.mono, stored);
    }

    /// A message has left this machine, as far as anybody can tell: with a hub that answers no events, this is all
    /// that there is.
    pub fn handle_written(&mut self, now: Now, id: &str) {
        if !self.peer.receipts {
            self.settle(now.mono, id, outbox::Verdict::Taken);
        }
    }

    /// Whether [`Self::handle_written`] has to be called for this message.
    pub fn wants_written(&self, id: &str) -> bool {
        !self.peer.receipts && self.outbox.is_mine(id)
    }

    fn settle(&mut self, now: Instant, id: &str, verdict: outbox::Verdict) -> bool {
        let Some(key) = self.outbox.handle_answer(now, id, verdict) else { return false };
        if verdict != outbox::Verdict::Later {
            self.events.handle_told(&key);
        }
        true
    }

    fn move_events(&mut self, now: Instant) {
        let outbox = &mut self.outbox;
        while let Some(item) =
            self.events.poll_item(now, self.connected, |key| outbox.is_in_flight(key))
        {
            outbox.put(item);
        }
        let dropped = outbox.take_dropped();
        if dropped > 0 {
            self.outputs.push_back(Output::EventsDropped(dropped));
        }
    }

    /// Asks the hub for an object; `content` is null, or a TokenRequest. Ends in one [`Output::Answer`], at once when
    /// there is no link.
    pub fn lookup(&mut self, now: Now, path: ResourcePath, content: Value) -> Ticket {
        self.last_ticket += 1;
        let ticket = self.last_ticket;
        if !self.connected {
            self.answer(ticket, path, Err("there is no connection to the cloud".into()), None);
        } else if self.lookups.len() >= LOOKUPS_MAX {
            self.answer(ticket, path, Err("too many objects are being looked up".into()), None);
        } else {
            let deadline = now.mono + LOOKUP_TIMEOUT;
            self.lookups.insert(ticket, Lookup { path, content, id: None, deadline });
        }
        ticket
    }

    /// When the hub has to be told once more what this node holds ([`crate::meta::Meta::digest_due`]). That takes a new
    /// link, and a hub that takes digests.
    pub fn want_digest(&mut self, due: Option<Instant>) {
        self.digest_due = due.filter(|_| self.connected && self.peer.digest);
    }

    /// Queues a message that answers the hub.
    pub fn acknowledge(&mut self, ack: Message) {
        if self.connected {
            self.acks.push_back(ack);
        }
    }

    /// A push came: the hub is at work on the digest, however long all of it takes.
    pub fn handle_push(&mut self, now: Now) {
        if let Some((_, Some((_, deadline)))) = &mut self.digest {
            *deadline = now.mono + DIGEST_TIMEOUT;
        }
    }

    /// Takes a message with a parent. Returns whether somebody waited for it.
    pub fn handle_reply(&mut self, now: Now, message: &Message) -> bool {
        let parent = message.header.parent_msg_id.as_str();
        let mono = now.mono;
        if self.lease.is_mine(parent) {
            let reply = reply_object(message).map_err(|(code, text)| {
                if code != 404 && code != 409 {
                    self.refuse(message, text);
                }
                code
            });
            self.lease.handle_reply(mono, reply);
            self.acknowledge_reply(now, message);
            return true;
        }
        if self.reports.is_mine(parent) {
            let reply = reply_object(message);
            let object = reply.as_ref().ok().filter(|node| node.is_object()).cloned();
            if message.operation() != Some(Operation::Error) {
                self.acknowledge_reply(now, message);
            }
            if let NodeVerdict::Refused(text) = self.reports.handle_reply(mono, reply) {
                self.refuse(message, text);
            }
            if let (Some(object), Ok(path)) =
                (object, ResourcePath::new("null", "node", &self.node))
            {
                self.outputs.push_back(Output::Object { path, object });
            }
            return true;
        }
        if let Some((_, sent)) = &self.digest
            && sent.as_ref().is_some_and(|(id, _)| id == parent)
        {
            self.digest = None;
            match reply_object(message) {
                Ok(_) => self.outputs.push_back(Output::DigestAnswered),
                // Nothing may be concluded from what is not here; the next connection asks again.
                Err((_, text)) => self.refuse(message, text),
            }
            return true;
        }
        let ticket = self.lookups.iter().find(|(_, lookup)| lookup.id.as_deref() == Some(parent));
        if let Some((ticket, _)) = ticket {
            let ticket = *ticket;
            let lookup = self.lookups.remove(&ticket).expect("found just now");
            let found = match reply_object(message) {
                Ok(object) if object.is_object() => Ok(Some(object)),
                Ok(_) => Err("the answer of the hub is not an object".into()),
                Err((404, _)) => Ok(None),
                Err((_, text)) => Err(text),
            };
            let answered = message.operation() == Some(Operation::Response);
            let wanted = !self.peer.receipts || ack_required(message);
            let ack = (answered && wanted).then(|| message.ack(now.unix_ms()));
            self.answer(ticket, lookup.path, found, ack);
            return true;
        }
        if self.outbox.is_mine(parent) {
            let verdict = match reply_object(message) {
                Ok(_) => outbox::Verdict::Taken,
                // A hub refuses what is about somebody else's object; nobody can mend that later.
                Err((code, text)) if is_final(code) || code == 403 => {
                    self.refuse(message, text);
                    outbox::Verdict::Refused
                }
                Err(_) => outbox::Verdict::Later,
            };
            return self.settle(mono, parent, verdict);
        }
        self.handle_pod_reply(mono, message)
    }

    /// KubeEdge's edge acknowledges these replies and its cloud does not look; ours need not be told.
    fn acknowledge_reply(&mut self, now: Now, message: &Message) {
        if !self.peer.receipts {
            self.acks.push_back(message.ack(now.unix_ms()));
        }
    }

    fn handle_pod_reply(&mut self, now: Instant, message: &Message) -> bool {
        let parent = message.header.parent_msg_id.as_str();
        let Some((uid, (key, pod))) =
            self.pods.iter_mut().find(|(_, (_, pod))| pod.is_mine(parent))
        else {
            return false;
        };
        let (uid, key) = (uid.clone(), key.clone());
        let reply = reply_object(message);
        let verdict = match &reply {
            Ok(_) => Verdict::Taken,
            Err((code, _)) if is_final(*code) => Verdict::Refused,
            Err(_) => Verdict::Later,
        };
        let done = pod.handle_reply(now, parent, verdict);
        if done {
            self.pods.remove(&uid);
            self.outbox.remove(now, &note_key(&uid));
            self.outputs.push_back(Output::PodFinished(key));
            return true;
        }
        match reply {
            Ok(object) if object.is_object() => {
                if let Ok(path) = ResourcePath::new(&key.namespace, "pod", &key.name) {
                    self.outputs.push_back(Output::Object { path, object });
                }
            }
            Ok(_) => {}
            Err((_, text)) => self.refuse(message, text),
        }
        true
    }

    /// Returns the next message to write; `read` returns the content of an outbox row from the database.
    pub fn poll_transmit(
        &mut self,
        now: Now,
        read: impl FnMut(u64) -> Option<Arc<str>>,
    ) -> Option<Message> {
        if !self.connected {
            return None;
        }
        if self.peer.beat.is_none() && now.mono >= self.keepalive {
            self.keepalive = now.mono + KEEPALIVE_INTERVAL;
            let keepalive = Operation::Keepalive;
            return Some(Message::new(
                now.unix_ms(),
                "websocket",
                "resource",
                keepalive,
                "node",
                "ping",
            ));
        }
        if let Some(ack) = self.acks.pop_front() {
            return Some(ack);
        }
        if let Some((digest, sent @ None)) = &mut self.digest {
            let query = Operation::Query;
            let message =
                Message::new(now.unix_ms(), "metamanager", "meta", query, digest::RESOURCE, digest);
            *sent = Some((message.header.msg_id.clone(), now.mono + DIGEST_TIMEOUT));
            return Some(message);
        }
        if let Some(lookup) = self.lookups.values_mut().find(|lookup| lookup.id.is_none()) {
            let message = request(now, Operation::Query, lookup.path.to_string(), &lookup.content);
            lookup.id = Some(message.header.msg_id.clone());
            return Some(message);
        }
        // A lease without a Node would have no owner and stay behind when the Node goes.
        if !self.peer.lease
            && self.reports.is_registered()
            && let Some((operation, content)) = self.lease.poll(now, self.reports.uid())
        {
            let resource = format!("kube-node-lease/lease/{}", self.node);
            let message = request(now, operation, resource, &content);
            self.lease.sent(message.header.msg_id.clone(), now.mono);
            return Some(message);
        }
        if let Some((operation, token, content)) = self.reports.poll(now) {
            let resource = format!("null/{token}/{}", self.node);
            let message = request(now, operation, resource, &content);
            self.reports.sent(message.header.msg_id.clone());
            return Some(message);
        }
        if let Some(message) = self.poll_pod(now) {
            return Some(message);
        }
        self.poll_outbox(now, read)
    }

    fn poll_outbox(
        &mut self,
        now: Now,
        mut read: impl FnMut(u64) -> Option<Arc<str>>,
    ) -> Option<Message> {
        if !self.peer.receipts && !self.unanswered.has_token(now.mono) {
            return None;
        }
        loop {
            let due = self.outbox.poll_transmit(now.mono, &mut read)?;
            let Ok(content) = RawValue::from_string(due.content.as_ref().to_owned()) else {
                // Damaged in a way that the database does not notice.
                self.outbox.drop_row(now.mono, due.seq);
                continue;
            };
            let mut message = request(now, due.operation, due.resource, &*content);
            if due.operation == Operation::Upload {
                message.route.source = skerry_protocol::bus::EVENT_BUS.into();
                message.route.group = skerry_protocol::bus::GROUP.into();
            }
            use Operation::{Prepull, UpdateNodeActionStatus, Upgrade};
            if matches!(due.operation, UpdateNodeActionStatus | Prepull | Upgrade) {
                message.route.source = skerry_protocol::job::REPORT_SOURCE.into();
                message.route.group = skerry_protocol::job::REPORT_GROUP.into();
            }
            self.outbox.sent(due.seq, message.header.msg_id.clone(), now.mono);
            if !self.peer.receipts {
                self.unanswered.tokens -= 1;
            }
            return Some(message);
        }
    }

    fn poll_pod(&mut self, now: Now) -> Option<Message> {
        let in_flight = self.pods.values().filter(|(_, pod)| pod.is_in_flight(now.mono)).count();
        if in_flight >= POD_REPORTS_MAX {
            return None;
        }
        self.pods.values_mut().find_map(|(key, pod)| {
            let (namespace, name) = (&key.namespace, &key.name);
            let message = match pod.poll(now.mono)? {
                Report::Patch(patch) => {
                    let resource = format!("{namespace}/podpatch/{name}");
                    request(now, Operation::Patch, resource, &patch)
                }
                Report::Delete(options) => {
                    let resource = format!("{namespace}/pod/{name}");
                    request(now, Operation::Delete, resource, &options)
                }
            };
            pod.sent(message.header.msg_id.clone(), now.mono);
            Some(message)
        })
    }

    /// Returns the next thing for the agent to do; also looks for what is overdue.
    pub fn poll_output(&mut self, now: Now) -> Option<Output> {
        if self.connected {
            if self.reports.take_overdue(now.mono) {
                return Some(Output::Reconnect("the hub does not answer the node's requests"));
            }
            if let Some((_, Some((_, deadline)))) = &self.digest
                && *deadline <= now.mono
            {
                self.digest = None;
                return Some(Output::Reconnect("the hub does not answer the digest"));
            }
            if self.digest_due.take_if(|due| *due <= now.mono).is_some() {
                let reason = "the hub says what another one, or its cluster before a restore, said otherwise";
                return Some(Output::Reconnect(reason));
            }
        }
        let overdue = self.lookups.iter().find(|(_, lookup)| lookup.deadline <= now.mono);
        if let Some(ticket) = overdue.map(|(ticket, _)| *ticket) {
            let lookup = self.lookups.remove(&ticket).expect("found just now");
            let wait_s = LOOKUP_TIMEOUT.as_secs();
            let text = format!("no answer from the cloud within {wait_s} s");
            self.answer(ticket, lookup.path, Err(text), None);
        }
        self.outputs.pop_front()
    }

    /// When to poll again, if nothing else happens; at most a minute away.
    pub fn poll_timeout(&self, now: Now) -> Instant {
        let mut next = now.mono + Duration::from_secs(60);
        if !self.outputs.is_empty() {
            return now.mono;
        }
        let events = self.events.poll_timeout(self.connected, |key| self.outbox.is_in_flight(key));
        let outbox = self.outbox.poll_timeout(now.mono, self.connected);
        let outbox = outbox.map(|at| match self.peer.receipts || !self.connected {
            true => at,
            false => at.max(self.unanswered.next(now.mono)),
        });
        next = events.into_iter().chain(outbox).fold(next, Instant::min);
        if self.connected {
            next = next.min(self.reports.poll_timeout(now));
            next = self.digest_due.map_or(next, |due| due.min(next));
            if self.peer.beat.is_none() {
                next = next.min(self.keepalive);
            }
            if !self.peer.lease && self.reports.is_registered() {
                next = next.min(self.lease.poll_timeout());
            }
            let pods = self.pods.values().filter_map(|(_, pod)| pod.poll_timeout(now.mono));
            next = pods.fold(next, Instant::min);
            if let Some((_, Some((_, deadline)))) = &self.digest {
                next = next.min(*deadline);
            }
        }
        self.lookups.values().map(|lookup| lookup.deadline).fold(next, Instant::min)
    }

    fn answer(
        &mut self,
        ticket: Ticket,
        path: ResourcePath,
        found: Result<Option<Value>, String>,
        ack: Option<Message>,
    ) {
        self.outputs.push_back(Output::Answer { ticket, path, found, ack });
    }

    fn refuse(&mut self, message: &Message, reason: String) {
        self.outputs
            .push_back(Output::Refused { resource: message.route.resource.clone(), reason });
    }
}

impl Bucket {
    fn has_token(&mut self, now: Instant) -> bool {
        let waited = now.saturating_duration_since(self.refilled).as_millis();
        let earned = u32::try_from(waited / UNANSWERED_INTERVAL.as_millis()).unwrap_or(u32::MAX);
        if earned > 0 {
            self.tokens = self.tokens.saturating_add(earned).min(UNANSWERED_BURST);
            self.refilled = now;
        }
        self.tokens > 0
    }

    /// When there is a token.
    fn next(&self, now: Instant) -> Instant {
        if self.tokens > 0 { now } else { self.refilled + UNANSWERED_INTERVAL }
    }
}

fn note_key(uid: &str) -> String {
    format!("gone/{uid}")
}

/// Whether a refusal will be the same the next time: gone, another uid, or not to be taken in any form. 401 and 403
/// may be mended by a person; 408 and 429 ask for patience.
fn is_final(code: u16) -> bool {
    (400..=499).contains(&code) && ![401, 403, 408, 429].contains(&code)
}

fn request<T: Serialize + ?Sized>(
    now: Now,
    operation: Operation,
    resource: String,
    content: &T,
) -> Message {
    Message::new(now.unix_ms(), "edged", "meta", operation, resource, content)
}

/// What a reply says: an object (or `"OK"`), or the code and text of a refusal. The code is 0 when nobody knows.
///
/// Forms: `{"Object": …, "Err": …}`, a bare object, a bare `ErrStatus`, a text; or operation `error` with a text.
pub fn reply_object(message: &Message) -> Result<Value, (u16, String)> {
    let content: Value = message.content_as().map_err(|error| (0, error.to_string()))?;
    if message.operation() == Some(Operation::Error) {
        let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        let code = if text.ends_with("not found") { 404 } else { 0 };
        return Err((code, text));
    }
    if content.get("ErrStatus").is_some() {
        return Err(refusal(&content));
    }
    let (Some(object), Some(err)) = (content.get("Object"), content.get("Err")) else {
        return Ok(content);
    };
    match err {
        Value::Null => Ok(object.clone()),
        // An error that Go could not put into JSON.
        Value::Object(fields) if fields.is_empty() && object.is_null() => {
            Err((0, "the cloud failed and did not say why".into()))
        }
        Value::Object(fields) if fields.is_empty() => Ok(object.clone()),
        err => Err(refusal(err)),
    }
}

fn refusal(err: &Value) -> (u16, String) {
    let status = &err["ErrStatus"];
    let code = status["code"].as_u64().and_then(|code| u16::try_from(code).ok()).unwrap_or(0);
    let code = match status["reason"].as_str() {
        Some("NotFound") => 404,
        Some("AlreadyExists" | "Conflict") => 409,
        _ => code,
    };
    let text = status["message"].as_str().map_or_else(|| err.to_string(), str::to_owned);
    (code, text)
}
