//! One node: the real `Meta` and `Uplink` over a modelled disk and a modelled container runtime.
//!
//! The order of things is the agent's: durable, then acknowledged, then known to the engine. A kill may come between any
//! two of them; containers and disk survive it.

use super::{Sabotage, Violation};
use serde_json::{Value, json};
use skerry_edge_core::Now;
use skerry_edge_core::event::EventReport;
use skerry_edge_core::meta::{Effect, Meta, Row, Step, TOMBSTONES_MAX, Tombstone, Write};
use skerry_edge_core::node::{Facts, Health};
use skerry_edge_core::outbox::{self, Change, Item};
use skerry_edge_core::status::PodKey;
use skerry_edge_core::uplink::{Output, Uplink};
use skerry_protocol::Message;
use skerry_protocol::capability::Capabilities;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// What outlives the agent.
#[derive(Debug, Default)]
pub(super) struct Disk {
    pub(super) rows: BTreeMap<String, Row>,
    tombstones: VecDeque<Tombstone>,
    outbox: BTreeMap<u64, Item>,
    /// The hub has told everything since the rows began.
    complete: bool,
    /// Writes fail for the time being.
    pub(super) full: bool,
    /// Versions above this that are even are lost: the cluster was restored from a backup.
    pub(super) lost_from: Option<u64>,
    /// Versions that were durable at some time since the disk was new, by path and uid.
    durable: BTreeMap<(String, String), u64>,
    removed: BTreeSet<String>,
}

/// A container of the runtime; it lives without the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Container {
    pub(super) namespace: String,
    pub(super) name: String,
    /// Its pod is told to end.
    pub(super) ending: bool,
}

/// The agent while it lives.
struct Agent {
    meta: Meta,
    uplink: Uplink,
    told_all: bool,
    applied: BTreeMap<String, String>,
    reports: u64,
}

/// A node.
pub(super) struct Edge {
    pub(super) name: String,
    pub(super) ours: bool,
    sabotage: Sabotage,
    pub(super) disk: Disk,
    pub(super) containers: BTreeMap<String, Container>,
    agent: Option<Agent>,
    /// Number of the agent's life; what was meant for an earlier one is void.
    pub(super) life: u64,
    /// Pods to look at later: the engine's work takes time.
    pub(super) work: Vec<String>,
    /// Pods that were taken away; none may come back.
    gone: BTreeSet<String>,
    /// Pods that a restored cluster has, which may come back until the node hears of an end that came after it.
    revived: BTreeSet<String>,
    /// Those of them that were taken away just now.
    left: Vec<String>,
    /// Events that were durable.
    pub(super) owed: Vec<String>,
    /// Pushed and not durable yet.
    fresh: Vec<String>,
    /// Statuses last told by the engine, by uid.
    pub(super) statuses: BTreeMap<String, Value>,
    events: u64,
    seed: u64,
}

/// What the agent wants of its link after a call.
#[derive(Debug, Default)]
pub(super) struct Wants {
    pub(super) messages: Vec<Message>,
    pub(super) reconnect: bool,
}

impl Edge {
    pub(super) fn new(name: String, ours: bool, seed: u64, sabotage: Sabotage) -> Self {
        Self {
            name,
            ours,
            sabotage,
            disk: Disk::default(),
            containers: BTreeMap::new(),
            agent: None,
            life: 0,
            work: Vec::new(),
            gone: BTreeSet::new(),
            revived: BTreeSet::new(),
            left: Vec::new(),
            owed: Vec::new(),
            fresh: Vec::new(),
            statuses: BTreeMap::new(),
            events: 0,
            seed,
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        self.agent.is_some()
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        match self.ours {
            true => Capabilities::ours(super::BEAT),
            false => Capabilities::default(),
        }
    }

    fn facts(&self) -> Facts {
        Facts { name: self.name.clone(), ..Facts::default() }
    }

    /// Starts the agent from the disk.
    pub(super) fn start(&mut self, now: Now) -> Result<(), Violation> {
        self.life += 1;
        match self.sabotage {
            Sabotage::KeepsNoTombstones => self.disk.tombstones.clear(),
            Sabotage::KeepsNoOutbox => self.disk.outbox.clear(),
            _ => {}
        }
        let rows = self.disk.rows.values().cloned().collect::<Vec<_>>();
        let tombstones = self.disk.tombstones.clone();
        let deleted: BTreeSet<String> = tombstones.iter().map(|stone| stone.uid.clone()).collect();
        let (meta, effects) = Meta::restore(&self.name, rows, tombstones);
        let stored = self.disk.outbox.iter().map(|(seq, item)| outbox::Row {
            seq: *seq,
            key: item.key.clone(),
            kind: item.kind,
            operation: item.operation,
            resource: item.resource.clone(),
            len: item.content.len(),
        });
        let stored: Vec<_> = stored.collect();
        let contents = &self.disk.outbox;
        let mut uplink = Uplink::restore(self.facts(), now, self.seed ^ self.life, stored, |seq| {
            contents.get(&seq).map(|item| Arc::clone(&item.content))
        });
        uplink.update_node(now, self.facts(), Health::default());
        let reports = self.life * 1_000_000;
        let applied = BTreeMap::new();
        self.agent = Some(Agent { meta, uplink, told_all: false, applied, reports });
        self.fresh.clear();
        self.work.clear();
        for uid in
            self.containers.keys().filter(|uid| deleted.contains(*uid)).cloned().collect::<Vec<_>>()
        {
            self.containers.remove(&uid);
        }
        for effect in effects {
            self.take(now, effect)?;
        }
        Ok(())
    }

    /// The agent is killed. `torn`: the disk is lost as well.
    pub(super) fn kill(&mut self, torn: bool) {
        self.agent = None;
        self.work.clear();
        if torn {
            // What was owed and what was removed is nowhere any more.
            let Disk { full, lost_from, .. } = self.disk;
            self.disk = Disk { full, lost_from, ..Disk::default() };
            self.gone.clear();
            self.owed.clear();
            self.statuses.clear();
        }
    }

    pub(super) fn connected(&mut self, now: Now) {
        let capabilities = self.capabilities();
        let Some(agent) = &mut self.agent else { return };
        let digest = capabilities.digest.then(|| agent.meta.start_digest());
        if digest.is_none() {
            agent.meta.link_lost();
        }
        agent.uplink.handle_connected(now, capabilities, digest);
    }

    pub(super) fn disconnected(&mut self, now: Now) {
        if let Some(agent) = &mut self.agent {
            agent.meta.link_lost();
            agent.uplink.handle_disconnected(now);
        }
    }

    /// The cluster went back to `version` and has these pods now.
    pub(super) fn restored(&mut self, version: u64, pods: BTreeSet<String>) {
        self.disk.lost_from = Some(version);
        self.gone.retain(|uid| !pods.contains(uid));
        self.revived = pods;
    }

    /// Which of the pods that were taken away may not come back: those that the cluster does not have.
    pub(super) fn settle_left(&mut self, has_pod: impl Fn(&str) -> bool) {
        for uid in self.left.drain(..).filter(|uid| !has_pod(uid)) {
            self.revived.remove(&uid);
            self.gone.insert(uid);
        }
    }

    /// A message of the hub arrived.
    pub(super) fn receive(&mut self, now: Now, message: &Message) -> Result<(), Violation> {
        let Some(agent) = &mut self.agent else { return Ok(()) };
        if !message.header.parent_msg_id.is_empty() {
            agent.uplink.handle_reply(now, message);
            return Ok(());
        }
        agent.uplink.handle_push(now);
        if !self.ours {
            // KubeEdge's edge takes whatever comes; ours does so only until its digest is answered.
            agent.meta.start_digest();
        }
        let step = agent.meta.handle_push(now, message);
        self.carry_out(now, step).map(drop)
    }

    fn carry_out(&mut self, now: Now, step: Step) -> Result<bool, Violation> {
        if let Some(write) = &step.write {
            match (self.disk.full, self.sabotage) {
                (true, Sabotage::AcksBeforeItWrites) => {}
                (true, _) => return Ok(false),
                (false, _) => self.disk.write(write, self.ours)?,
            }
        }
        let agent = self.agent.as_mut().expect("the caller has it");
        let (ack, effects) = agent.meta.commit(step);
        if let Some(ack) = ack {
            agent.uplink.acknowledge(ack);
        }
        let began_anew = |uid: &str| {
            let mut pods = effects.iter().filter_map(|effect| match effect {
                Effect::PodUpsert(pod) => pod.metadata.uid.as_deref(),
                _ => None,
            });
            pods.any(|of| of == uid)
        };
        // KubeEdge's edge knows no such rule, and what a hub that lags sends may say that a pod does not end after all.
        let left_out = |effect: &Effect| match effect {
            Effect::PodRemove { uid, .. } => !self.ours && began_anew(uid),
            _ => false,
        };
        let left_out: Vec<bool> = effects.iter().map(left_out).collect();
        for (effect, _) in effects.into_iter().zip(left_out).filter(|(_, is_out)| !is_out) {
            self.take(now, effect)?;
        }
        Ok(true)
    }

    fn take(&mut self, now: Now, effect: Effect) -> Result<(), Violation> {
        let agent = self.agent.as_mut().expect("the caller has it");
        match effect {
            Effect::PodUpsert(pod) => {
                let metadata = &pod.metadata;
                let uid = metadata.uid.clone().unwrap_or_default();
                let version = metadata.resource_version.clone().unwrap_or_default();
                if self.gone.contains(&uid) {
                    return Err(Violation::new(format!(
                        "{}: pod {uid} was taken away and is back",
                        self.name
                    )));
                }
                if agent.applied.insert(uid.clone(), version.clone()) == Some(version.clone()) {
                    return Err(Violation::new(format!(
                        "{}: pod {uid} in version {version} is given to the engine twice",
                        self.name
                    )));
                }
                let container = self.containers.entry(uid.clone()).or_insert_with(|| Container {
                    namespace: metadata.namespace.clone().unwrap_or_default(),
                    name: metadata.name.clone().unwrap_or_default(),
                    ending: false,
                });
                container.ending |= metadata.deletion_timestamp.is_some();
                self.work.push(uid);
            }
            Effect::PodRemove { uid, .. } => {
                agent.uplink.forget_pod(now, &uid);
                self.containers.remove(&uid);
                self.statuses.remove(&uid);
                agent.applied.remove(&uid);
                match self.revived.contains(&uid) {
                    true => self.left.push(uid),
                    false => drop(self.gone.insert(uid)),
                }
            }
            Effect::OwnNode(node) => agent.uplink.handle_own_node(&node),
            Effect::OwnNodeGone => agent.uplink.handle_own_node_gone(),
            Effect::ObjectChanged { .. } | Effect::Ignored { .. } | Effect::HandOn(_) => {}
        }
        Ok(())
    }

    /// The engine did its work on a pod: it runs, or nothing is left of it.
    pub(super) fn engine(&mut self, uid: &str) {
        let Some(agent) = &mut self.agent else { return };
        let Some(container) = self.containers.get(uid) else { return };
        let key = PodKey::new(&container.namespace, &container.name, uid);
        let path = format!("{}/pod/{}", container.namespace, container.name);
        if agent.meta.held(&path).is_none_or(|held| held.uid != uid) {
            return;
        }
        if container.ending {
            agent.uplink.finish_pod(key);
            self.statuses.remove(uid);
            return;
        }
        agent.reports += 1;
        let status = json!({"phase": "Running", "message": format!("report {}", agent.reports)});
        self.statuses.insert(uid.to_owned(), status.clone());
        let rows = &self.disk.rows;
        agent.uplink.report_pod(key, status, || {
            let row: Value = serde_json::from_str(&rows.get(&path)?.json).ok()?;
            row.get("status").cloned()
        });
    }

    /// Something happens on the node that the cluster must hear of.
    pub(super) fn event(&mut self, now: Now) {
        let Some(agent) = &mut self.agent else { return };
        self.events += 1;
        let text = format!("{} event {}", self.name, self.events);
        self.fresh.push(text.clone());
        agent.uplink.push_event(
            now,
            EventReport {
                kind: "Node",
                namespace: String::new(),
                name: self.name.clone(),
                uid: self.name.clone(),
                field_path: String::new(),
                warning: false,
                reason: format!("Sim{}", self.events),
                message: text,
            },
        );
    }

    /// Carries out what the uplink asks for, as the agent's loop does before it sleeps. At most `room` messages leave.
    pub(super) fn drain(&mut self, now: Now, room: usize) -> Result<Wants, Violation> {
        let mut wants = Wants::default();
        if let Some(agent) = &mut self.agent
            && self.sabotage != Sabotage::DisputesNothing
        {
            agent.uplink.want_digest(agent.meta.digest_due());
        }
        while let Some(agent) = &mut self.agent {
            let Some(output) = agent.uplink.poll_output(now) else { break };
            match output {
                Output::Answer { path, found, ack, .. } => {
                    if let Ok(Some(object)) = &found {
                        let step = agent.meta.handle_answer(&path, object.clone());
                        self.carry_out(now, step)?;
                    }
                    if let (Some(ack), Some(agent)) = (ack, &mut self.agent) {
                        agent.uplink.acknowledge(ack);
                    }
                }
                Output::Object { path, object } => {
                    let step = agent.meta.handle_answer(&path, object);
                    self.carry_out(now, step)?;
                }
                Output::DigestAnswered => self.digest_answered(),
                Output::Reconnect(_) => wants.reconnect = true,
                Output::PodFinished(_) | Output::Refused { .. } => {}
                Output::EventsDropped(count) => {
                    return Err(Violation::new(format!("{}: {count} events dropped", self.name)));
                }
            }
        }
        let Some(agent) = &mut self.agent else { return Ok(wants) };
        let changes = agent.uplink.take_changes(now);
        if !changes.is_empty() {
            let stored = !self.disk.full;
            if stored {
                for change in changes {
                    match change {
                        Change::Put { seq, item } => drop(self.disk.outbox.insert(seq, item)),
                        Change::Remove { seq } => drop(self.disk.outbox.remove(&seq)),
                    }
                }
                self.owed.append(&mut self.fresh);
            }
            agent.uplink.handle_stored(now, stored);
        }
        while wants.messages.len() < room {
            let contents = &self.disk.outbox;
            let read = |seq| contents.get(&seq).map(|item: &Item| Arc::clone(&item.content));
            let Some(message) = agent.uplink.poll_transmit(now, read) else { break };
            if agent.uplink.wants_written(&message.header.msg_id) {
                // Without receipts the socket's word is the last that is heard; what is lost with it is lost.
                agent.uplink.handle_written(now, &message.header.msg_id);
            }
            wants.messages.push(message);
        }
        Ok(wants)
    }

    fn digest_answered(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        agent.meta.digest_answered();
        self.disk.complete = true;
        if !std::mem::replace(&mut agent.told_all, true) {
            // From now on what is not in the database is not wanted.
            let meta = &agent.meta;
            self.containers.retain(|uid, container| {
                let path = format!("{}/pod/{}", container.namespace, container.name);
                meta.held(&path).is_some_and(|held| held.uid == *uid)
            });
        }
    }

    /// When the agent wants to be called again.
    pub(super) fn timeout(&self, now: Now) -> Option<std::time::Instant> {
        self.agent.as_ref().map(|agent| agent.uplink.poll_timeout(now))
    }

    /// Whether the agent owes nothing.
    pub(super) fn owes(&self) -> usize {
        self.agent.as_ref().map_or(usize::MAX, |agent| agent.uplink.outbox().len())
    }

    /// Whether this version of an object, or its end, has ever been durable on this disk.
    pub(super) fn has_had(&self, path: &str, uid: &str, version: u64) -> bool {
        self.disk.removed.contains(uid)
            || self
                .disk
                .durable
                .get(&(path.to_owned(), uid.to_owned()))
                .is_some_and(|held| *held >= version)
    }
}

impl Disk {
    /// `is_strict`: versions only grow. A KubeEdge node takes whatever comes, and what it has not acknowledged to one hub,
    /// another hub that lags may not know yet, so there they may go back for a moment.
    fn write(&mut self, write: &Write, is_strict: bool) -> Result<(), Violation> {
        match write {
            Write::Put(row) => {
                let version = row.rv.parse().unwrap_or(0);
                let of = (row.path.clone(), row.uid.clone());
                if let Some(held) = self.rows.get(&row.path).filter(|held| held.uid == row.uid) {
                    let before: u64 = held.rv.parse().unwrap_or(0);
                    let is_lost = self
                        .lost_from
                        .is_some_and(|from| before > from && before.is_multiple_of(2));
                    if version <= before && is_strict && !is_lost {
                        return Err(Violation::new(format!(
                            "{} goes from version {before} to {version}",
                            row.path
                        )));
                    }
                }
                let durable = self.durable.entry(of).or_default();
                *durable = version.max(*durable);
                self.tombstones.retain(|known| known.uid != row.uid);
                self.rows.insert(row.path.clone(), row.clone());
            }
            Write::Remove { path, tombstone } => {
                if let Some(row) = self.rows.remove(path) {
                    self.removed.insert(row.uid);
                }
                if let Some(tombstone) = tombstone {
                    self.removed.insert(tombstone.uid.clone());
                    self.tombstones.retain(|known| known.uid != tombstone.uid);
                    self.tombstones.push_back(tombstone.clone());
                    if self.tombstones.len() > TOMBSTONES_MAX {
                        self.tombstones.pop_front();
                    }
                }
            }
        }
        Ok(())
    }
}
