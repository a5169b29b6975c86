//! What ObjectSync and ClusterObjectSync objects say about nodes of KubeEdge, and what has to be written.
//!
//! A KubeEdge edge cannot tell what it holds, so what it acknowledged is kept in the cluster: one object per node and
//! object, named `<node>.<uid>`, whose status holds the resource version acknowledged last, `"0"` before the first
//! time. A CloudCore that starts, ours or KubeEdge's, finds there what the node has, and deletes what has gone
//! meanwhile. Nodes of ours tell it themselves, so nothing is written for them, and what an earlier life as a KubeEdge
//! node left is removed.
//!
//! [`Syncs`] holds, per record, what the cluster has and what it should have. Only the newest wish counts: ten
//! acknowledgements of one object are one write when they come faster than the API answers. At most [`WRITES_MAX`]
//! writes are under way; a failed one is tried again after a pause. There is no queue that could overflow: a wish
//! costs a mark on its record, and records are as many as the objects that those nodes hold.
//!
//! [`crate::downstream::Downstream`] owns it and is the only caller. No I/O, no clock.
//!
//! An object that a node may not have had yet is sent only when its record is there ([`Syncs::is_there`]): so whatever
//! a node may hold has a record, and no crash leaves an object on a node that nobody remembers. Everything after that
//! is written beside the sending, where KubeEdge takes no next message before a write is done.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/synccontroller, cloud/pkg/cloudhub/session/node_session.go.

use crate::downstream::number;
use skerry_api::reliablesyncs::v1alpha1::{NEVER_ACKED, object_sync_name, parse_object_sync_name};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Writes under way at the same time.
pub const WRITES_MAX: usize = 8;
/// First pause after a failed write; it doubles up to [`PAUSE_MAX`].
pub const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Longest pause after a failed write.
pub const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Where a record lives, and the uid in its name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SyncId {
    /// Namespace of an ObjectSync; `None` is a ClusterObjectSync.
    pub namespace: Option<Arc<str>>,
    /// Uid of the object.
    pub uid: Arc<str>,
}

/// Which object a record is about: the `spec` of a (Cluster)ObjectSync.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncSpec {
    /// `objectAPIVersion`.
    pub api_version: Arc<str>,
    /// `objectKind`.
    pub kind: Arc<str>,
    /// `objectName`.
    pub name: Arc<str>,
}

/// One of the two kinds of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// ObjectSync.
    Namespaced,
    /// ClusterObjectSync.
    Cluster,
}

/// What the cluster said about records.
#[derive(Debug)]
pub enum Word {
    /// This record is there.
    Seen {
        /// `metadata.name`.
        name: Arc<str>,
        /// `metadata.namespace`; `None` for a ClusterObjectSync.
        namespace: Option<Arc<str>>,
        /// `spec`.
        spec: SyncSpec,
        /// `status.objectResourceVersion`; `None` when it is absent or empty.
        version: Option<Arc<str>>,
    },
    /// This record is there no longer.
    Gone {
        /// `metadata.name`.
        name: Arc<str>,
        /// `metadata.namespace`; `None` for a ClusterObjectSync.
        namespace: Option<Arc<str>>,
    },
    /// A list is complete and held these, by name; each was given as [`Word::Seen`].
    Listed(Scope, BTreeSet<(Option<Arc<str>>, Arc<str>)>),
    /// The cluster knows no such kind; until the next [`Word::Listed`] nothing is written.
    Unavailable,
    /// What became of a [`Write`].
    Written {
        /// Name of the node.
        node: Arc<str>,
        /// Which record.
        id: SyncId,
        /// How it went.
        outcome: Outcome,
    },
}

/// How a write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The cluster has what was wanted.
    Done,
    /// There is no such record; it has to be created first.
    Missing,
    /// The cluster will never take it: its namespace is gone, or it is not valid.
    Refused,
    /// The API did not answer, or had a bad moment.
    Failed,
}

/// One write that is due.
#[derive(Debug, Clone)]
pub struct Write {
    /// Name of the node.
    pub node: Arc<str>,
    /// Which record.
    pub id: SyncId,
    /// What it is about.
    pub spec: SyncSpec,
    /// What to do.
    pub action: Action,
}

impl Write {
    /// `metadata.name` of the record.
    pub fn name(&self) -> String {
        object_sync_name(&self.node, &self.id.uid)
    }
}

/// What to do with a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Create it, or take the one that is there, and write `status.objectResourceVersion`.
    Create(Arc<str>),
    /// Write `status.objectResourceVersion` of the one that is there.
    Status(Arc<str>),
    /// Delete it; one that is gone already is fine.
    Delete,
}

/// All records.
#[derive(Debug, Default)]
pub struct Syncs {
    nodes: BTreeMap<Arc<str>, BTreeMap<SyncId, Record>>,
    is_listed: [bool; 2],
    is_unavailable: bool,
    due: VecDeque<(Arc<str>, SyncId)>,
    /// Removals that nobody waits for; they go when nothing else is due.
    lazy: VecDeque<(Arc<str>, SyncId)>,
    writing: usize,
    pause: Option<Pause>,
    writes: u64,
}

#[derive(Debug)]
struct Pause {
    until: Instant,
    len: Duration,
}

#[derive(Debug)]
struct Record {
    spec: SyncSpec,
    /// What the cluster has, as far as is known.
    stored: Stored,
    /// Whether the cluster is sure to have the record; `stored` runs ahead while a write is under way.
    is_there: bool,
    /// What it should have; `None` when the record should go.
    wanted: Option<Arc<str>>,
    /// Only the cluster has said that it should be: it may be the echo of one that we have removed since.
    is_hearsay: bool,
    progress: Progress,
}

#[derive(Debug, PartialEq, Eq)]
enum Stored {
    Absent,
    /// There, and its status is not written yet.
    Bare,
    Version(Arc<str>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Idle,
    Due,
    Writing,
}

impl Record {
    fn is_settled(&self) -> bool {
        match (&self.stored, &self.wanted) {
            (Stored::Absent, None) => true,
            (Stored::Version(stored), Some(wanted)) => self.is_there && stored == wanted,
            _ => false,
        }
    }
}

impl Syncs {
    /// Whether the records of every node are known, or will not be.
    pub fn is_ready(&self) -> bool {
        self.is_unavailable || self.is_available()
    }

    /// Whether records are kept at all.
    pub fn is_available(&self) -> bool {
        self.is_listed == [true; 2] && !self.is_unavailable
    }

    /// Writes done since the start.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Records known, and how many of them wait for a write.
    pub fn len(&self) -> (usize, usize) {
        let records = self.nodes.values().map(BTreeMap::len).sum();
        (records, self.due.len() + self.lazy.len() + self.writing)
    }

    /// Nodes that have records.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<str>> {
        self.nodes.keys()
    }

    /// What `node` holds or may hold: place, object and version acknowledged last, `None` before the first time. What
    /// has no record in the cluster yet has not been sent.
    pub fn held(
        &self,
        node: &str,
    ) -> impl Iterator<Item = (&SyncId, &SyncSpec, Option<&Arc<str>>)> {
        let records = self.nodes.get(node).into_iter().flatten();
        records.filter(|(_, record)| record.is_there).filter_map(|(id, record)| {
            let version = record.wanted.as_ref()?;
            Some((id, &record.spec, Some(version).filter(|version| ***version != *NEVER_ACKED)))
        })
    }

    /// `node` is not connected here: if somebody removes this record now, it is the one that serves the node, and no
    /// record that this process has written stands against that.
    pub fn let_go(&mut self, node: &str, id: &SyncId) {
        if let Some(record) = self.record(node, id) {
            record.is_hearsay |= record.progress == Progress::Idle;
        }
    }

    /// Which object a record of [`Self::held`] is about.
    pub fn get(&self, node: &str, id: &SyncId) -> Option<&SyncSpec> {
        let record = self.nodes.get(node)?.get(id)?;
        (record.is_there && record.wanted.is_some()).then_some(&record.spec)
    }

    /// Whether `node` has acknowledged this object in `version` or a newer one.
    pub fn is_acked(&self, node: &str, id: &SyncId, version: &str) -> bool {
        let record = self.nodes.get(node).and_then(|records| records.get(id));
        let acked = record.and_then(|record| record.wanted.as_deref()).and_then(number);
        matches!((acked, number(version)), (Some(acked), Some(version)) if acked >= version)
    }

    /// Whether this record is in the cluster and stays.
    pub fn is_there(&self, node: &str, id: &SyncId) -> bool {
        let record = self.nodes.get(node).and_then(|records| records.get(id));
        record.is_some_and(|record| record.is_there && record.wanted.is_some())
    }

    /// An object is about to go to `node`, which may never have had it.
    pub fn sent(&mut self, node: &Arc<str>, id: SyncId, spec: impl FnOnce() -> SyncSpec) {
        match self.record(node, &id).filter(|record| record.wanted.is_some()) {
            None => self.want(node, id, spec, NEVER_ACKED.into()),
            Some(record) if record.is_there => {}
            Some(record) => {
                record.is_hearsay = false;
                self.schedule(node, &id, false);
            }
        }
    }

    /// `node` has acknowledged this version.
    pub fn acked(
        &mut self,
        node: &Arc<str>,
        id: SyncId,
        spec: impl FnOnce() -> SyncSpec,
        version: &Arc<str>,
    ) {
        self.want(node, id, spec, Arc::clone(version));
    }

    /// `node` holds this object no longer.
    pub fn removed(&mut self, node: &Arc<str>, id: &SyncId) {
        self.unwant(node, id, false);
    }

    /// Nothing is kept about `node`: it is gone, or it tells itself what it holds.
    pub fn forget(&mut self, node: &Arc<str>) {
        let ids: Vec<SyncId> = self
            .nodes
            .get(node)
            .map(|records| records.keys().cloned().collect())
            .unwrap_or_default();
        for id in ids {
            self.unwant(node, &id, true);
        }
    }

    /// Takes what the cluster said.
    pub fn handle(&mut self, word: Word, now: Instant) {
        match word {
            Word::Seen { name, namespace, spec, version } => {
                self.seen(&name, namespace, spec, version);
            }
            Word::Gone { name, namespace } => {
                if let Some((node, uid)) = parse_object_sync_name(&name) {
                    self.gone(node, &SyncId { namespace, uid: uid.into() });
                }
            }
            Word::Listed(scope, names) => self.listed(scope, &names),
            Word::Unavailable => {
                self.is_unavailable = true;
                self.is_listed = [false; 2];
            }
            Word::Written { node, id, outcome } => self.written(&node, &id, outcome, now),
        }
    }

    /// Returns the next write that is due.
    pub fn poll_write(&mut self, now: Instant) -> Option<Write> {
        if !self.is_available() || self.writing >= WRITES_MAX {
            return None;
        }
        if self.pause.as_ref().is_some_and(|pause| pause.until > now) {
            return None;
        }
        while let Some((node, id)) = self.due.pop_front().or_else(|| self.lazy.pop_front()) {
            let Some(record) = self.record(&node, &id) else { continue };
            if record.progress != Progress::Due {
                continue;
            }
            record.progress = Progress::Idle;
            if record.is_settled() {
                self.tidy(&node, &id);
                continue;
            }
            let action = match (&record.stored, &record.wanted) {
                (_, None) => Action::Delete,
                (Stored::Absent, Some(version)) => Action::Create(Arc::clone(version)),
                (_, Some(version)) => Action::Status(Arc::clone(version)),
            };
            record.progress = Progress::Writing;
            // What it will be when the write is done; `written` takes it back if it is not.
            record.stored = match &record.wanted {
                None => Stored::Absent,
                Some(version) => Stored::Version(Arc::clone(version)),
            };
            record.is_there &= record.wanted.is_some();
            let spec = record.spec.clone();
            self.writing += 1;
            return Some(Write { node, id, spec, action });
        }
        None
    }

    /// When [`Self::poll_write`] has something to do again, if only time is missing.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let waits = !self.due.is_empty() || !self.lazy.is_empty();
        let has_room = self.is_available() && self.writing < WRITES_MAX;
        self.pause.as_ref().filter(|_| waits && has_room).map(|pause| pause.until)
    }

    fn record(&mut self, node: &str, id: &SyncId) -> Option<&mut Record> {
        self.nodes.get_mut(node)?.get_mut(id)
    }

    fn want(
        &mut self,
        node: &Arc<str>,
        id: SyncId,
        spec: impl FnOnce() -> SyncSpec,
        version: Arc<str>,
    ) {
        if !self.is_available() {
            return;
        }
        let records = self.nodes.entry(Arc::clone(node)).or_default();
        let record = records.entry(id.clone()).or_insert_with(|| Record {
            spec: spec(),
            stored: Stored::Absent,
            is_there: false,
            wanted: None,
            is_hearsay: false,
            progress: Progress::Idle,
        });
        record.wanted = Some(version);
        record.is_hearsay = false;
        self.schedule(node, &id, false);
    }

    fn unwant(&mut self, node: &Arc<str>, id: &SyncId, is_lazy: bool) {
        if let Some(record) = self.record(node, id) {
            record.wanted = None;
            self.schedule(node, id, is_lazy);
        }
    }

    fn schedule(&mut self, node: &Arc<str>, id: &SyncId, is_lazy: bool) {
        let Some(record) = self.record(node, id) else { return };
        if record.progress != Progress::Idle {
            return;
        }
        if record.is_settled() {
            return self.tidy(node, id);
        }
        record.progress = Progress::Due;
        let queue = if is_lazy { &mut self.lazy } else { &mut self.due };
        queue.push_back((Arc::clone(node), id.clone()));
    }

    /// Drops a record that neither is there nor should be.
    fn tidy(&mut self, node: &str, id: &SyncId) {
        let Some(records) = self.nodes.get_mut(node) else { return };
        let is_over = |record: &Record| {
            record.stored == Stored::Absent
                && record.wanted.is_none()
                && record.progress == Progress::Idle
        };
        if records.get(id).is_some_and(is_over) {
            records.remove(id);
        }
        if records.is_empty() {
            self.nodes.remove(node);
        }
    }

    fn seen(
        &mut self,
        name: &str,
        namespace: Option<Arc<str>>,
        spec: SyncSpec,
        version: Option<Arc<str>>,
    ) {
        let Some((node, uid)) = parse_object_sync_name(name) else { return };
        let id = SyncId { namespace, uid: uid.into() };
        let node = match self.nodes.get_key_value(node) {
            Some((node, _)) => Arc::clone(node),
            None => node.into(),
        };
        let stored = version.clone().map_or(Stored::Bare, Stored::Version);
        match self.record(&node, &id) {
            None => {
                let wanted = Some(version.unwrap_or_else(|| NEVER_ACKED.into()));
                let progress = Progress::Idle;
                let is_hearsay = true;
                let record = Record { spec, stored, is_there: true, wanted, is_hearsay, progress };
                self.nodes.entry(Arc::clone(&node)).or_default().insert(id.clone(), record);
            }
            // The answer to our own write says more than the echo of an earlier one.
            Some(record) if record.progress == Progress::Writing => {}
            Some(record) => {
                let newer = match (&record.stored, &stored) {
                    (Stored::Version(old), Stored::Version(new)) => number(old) < number(new),
                    (Stored::Version(_), _) => false,
                    _ => true,
                };
                if newer {
                    // Another CloudCore has served the node; what it wrote is what the node has.
                    let is_idle = record.progress == Progress::Idle;
                    if is_idle && let Stored::Version(version) = &stored {
                        record.wanted = Some(Arc::clone(version));
                    }
                    record.stored = stored;
                    record.is_there = true;
                }
            }
        }
    }

    fn gone(&mut self, node: &str, id: &SyncId) {
        let Some(record) = self.record(node, id) else { return };
        if record.progress == Progress::Writing {
            return;
        }
        record.stored = Stored::Absent;
        record.is_there = false;
        if record.is_hearsay {
            record.wanted = None;
        }
        // What this process has seen acknowledged stays: somebody else removed it, or it is the echo of an earlier end.
        let node = Arc::<str>::from(node);
        self.schedule(&node, id, false);
        self.tidy(&node, id);
    }

    fn listed(&mut self, scope: Scope, names: &BTreeSet<(Option<Arc<str>>, Arc<str>)>) {
        let mut missing = Vec::new();
        // A record without a status would keep KubeEdge's CloudCore from ever sending the object. A list tells of these;
        // what a watch tells may be the echo of a write of ours that has been finished since.
        let mut bare = Vec::new();
        for (node, records) in &self.nodes {
            for (id, record) in records {
                let of_scope = id.namespace.is_none() == (scope == Scope::Cluster);
                let is_settled = record.progress == Progress::Idle;
                let name = || (id.namespace.clone(), object_sync_name(node, &id.uid).into());
                if !of_scope || !is_settled {
                    continue;
                }
                if !names.contains(&name()) {
                    missing.push((Arc::clone(node), id.clone()));
                } else if record.stored == Stored::Bare {
                    bare.push((Arc::clone(node), id.clone()));
                }
            }
        }
        for (node, id) in missing {
            self.gone(&node, &id);
        }
        for (node, id) in bare {
            self.schedule(&node, &id, true);
        }
        self.is_unavailable = false;
        self.is_listed[usize::from(scope == Scope::Cluster)] = true;
    }

    fn written(&mut self, node: &Arc<str>, id: &SyncId, outcome: Outcome, now: Instant) {
        self.writing = self.writing.saturating_sub(1);
        let Some(record) = self.record(node, id) else { return };
        record.progress = Progress::Idle;
        match outcome {
            Outcome::Done => {
                record.is_there = record.stored != Stored::Absent;
                self.writes += 1;
                self.pause = None;
            }
            Outcome::Missing => {
                record.stored = Stored::Absent;
                record.is_there = false;
                if record.is_hearsay {
                    record.wanted = None;
                }
            }
            Outcome::Refused => {
                record.stored = Stored::Absent;
                record.is_there = false;
                record.wanted = None;
            }
            Outcome::Failed => {
                // Nothing is known; a status write finds out, and creates when it has to.
                record.stored = Stored::Bare;
                let len = self.pause.as_ref().map_or(PAUSE_MIN, |pause| pause.len * 2);
                let len = len.min(PAUSE_MAX);
                self.pause = Some(Pause { until: now + len, len });
            }
        }
        self.schedule(node, id, false);
        self.tidy(node, id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(uid: &str) -> SyncId {
        SyncId { namespace: Some("default".into()), uid: uid.into() }
    }

    fn spec() -> SyncSpec {
        SyncSpec { api_version: "v1".into(), kind: "Pod".into(), name: "web".into() }
    }

    fn available() -> Syncs {
        let mut syncs = Syncs::default();
        for scope in [Scope::Namespaced, Scope::Cluster] {
            syncs.handle(Word::Listed(scope, BTreeSet::new()), Instant::now());
        }
        syncs
    }

    fn node() -> Arc<str> {
        "edge.lisbon".into()
    }

    fn written(syncs: &mut Syncs, uid: &str, outcome: Outcome, now: Instant) {
        syncs.handle(Word::Written { node: node(), id: id(uid), outcome }, now);
    }

    fn seen(syncs: &mut Syncs, uid: &str, version: Option<&str>) {
        let name = format!("edge.lisbon.{uid}").into();
        let namespace = Some("default".into());
        let version = version.map(Arc::from);
        let word = Word::Seen { name, namespace, spec: spec(), version };
        syncs.handle(word, Instant::now());
    }

    fn gone(uid: &str) -> Word {
        let name = format!("edge.lisbon.{uid}").into();
        Word::Gone { name, namespace: Some("default".into()) }
    }

    /// The record `u` is in a new list, and its status is not written.
    fn relisted_without_status(syncs: &mut Syncs) {
        seen(syncs, "u", None);
        let names = BTreeSet::from([(Some("default".into()), "edge.lisbon.u".into())]);
        syncs.handle(Word::Listed(Scope::Namespaced, names), Instant::now());
    }

    #[test]
    fn many_acks_of_one_object_are_one_write_after_the_first() {
        let (mut syncs, now) = (available(), Instant::now());
        syncs.sent(&node(), id("u"), spec);
        let write = syncs.poll_write(now).expect("a record for what was sent");
        assert!(!syncs.is_there("edge.lisbon", &id("u")));
        assert_eq!(
            (write.name().as_str(), write.action),
            ("edge.lisbon.u", Action::Create("0".into()))
        );
        for version in 1..=10 {
            syncs.acked(&node(), id("u"), spec, &version.to_string().into());
        }
        assert!(syncs.poll_write(now).is_none(), "one write of a record at a time");
        written(&mut syncs, "u", Outcome::Done, now);
        assert!(syncs.is_there("edge.lisbon", &id("u")));
        let write = syncs.poll_write(now).expect("the newest version");
        assert_eq!(write.action, Action::Status("10".into()));
        written(&mut syncs, "u", Outcome::Done, now);
        assert!(syncs.poll_write(now).is_none());
        assert_eq!(syncs.writes(), 2);
    }

    #[test]
    fn acked_delete_removes_the_record_and_one_that_never_was_costs_nothing() {
        let (mut syncs, now) = (available(), Instant::now());
        syncs.sent(&node(), id("u"), spec);
        syncs.removed(&node(), &id("u"));
        assert!(syncs.poll_write(now).is_none());
        assert_eq!(syncs.len(), (0, 0));
        seen(&mut syncs, "v", Some("7"));
        syncs.removed(&node(), &id("v"));
        assert_eq!(syncs.poll_write(now).expect("a write").action, Action::Delete);
        written(&mut syncs, "v", Outcome::Done, now);
        assert_eq!(syncs.len(), (0, 0));
    }

    #[test]
    fn what_the_cluster_has_is_what_the_node_holds() {
        let mut syncs = available();
        seen(&mut syncs, "u", Some("7"));
        seen(&mut syncs, "v", Some("0"));
        let held: Vec<_> = syncs
            .held("edge.lisbon")
            .map(|(id, _, version)| (&*id.uid, version.map(|version| &**version)))
            .collect();
        assert_eq!(held, [("u", Some("7")), ("v", None)]);
        assert!(syncs.is_acked("edge.lisbon", &id("u"), "7"));
        assert!(!syncs.is_acked("edge.lisbon", &id("u"), "8"));
    }

    #[test]
    fn late_echo_of_an_older_write_changes_nothing() {
        let (mut syncs, now) = (available(), Instant::now());
        seen(&mut syncs, "u", Some("7"));
        syncs.acked(&node(), id("u"), spec, &"9".into());
        syncs.poll_write(now).expect("a write");
        seen(&mut syncs, "u", Some("8"));
        written(&mut syncs, "u", Outcome::Done, now);
        seen(&mut syncs, "u", Some("8"));
        assert!(syncs.is_acked("edge.lisbon", &id("u"), "9"));
        assert!(syncs.poll_write(now).is_none());
    }

    #[test]
    fn record_without_status_gets_one() {
        let (mut syncs, now) = (available(), Instant::now());
        relisted_without_status(&mut syncs);
        assert_eq!(syncs.poll_write(now).expect("a write").action, Action::Status("0".into()));
    }

    #[test]
    fn late_echo_of_a_record_that_we_removed_does_not_bring_it_back() {
        let (mut syncs, now) = (available(), Instant::now());
        seen(&mut syncs, "v", None);
        assert!(syncs.poll_write(now).is_none(), "a watch may lag behind us");
        syncs.handle(gone("v"), now);
        relisted_without_status(&mut syncs);
        assert_eq!(syncs.poll_write(now).expect("a write").action, Action::Status("0".into()));
        written(&mut syncs, "u", Outcome::Missing, now);
        assert!(syncs.poll_write(now).is_none());
        assert_eq!(syncs.len(), (0, 0));
    }

    #[test]
    fn record_that_somebody_removed_is_created_again() {
        let (mut syncs, now) = (available(), Instant::now());
        seen(&mut syncs, "u", Some("7"));
        syncs.acked(&node(), id("u"), spec, &"9".into());
        assert_eq!(syncs.poll_write(now).expect("a write").action, Action::Status("9".into()));
        written(&mut syncs, "u", Outcome::Missing, now);
        assert_eq!(syncs.poll_write(now).expect("again").action, Action::Create("9".into()));
    }

    #[test]
    fn failed_write_pauses_all_and_is_tried_again() {
        let (mut syncs, now) = (available(), Instant::now());
        syncs.sent(&node(), id("u"), spec);
        syncs.poll_write(now).expect("a write");
        written(&mut syncs, "u", Outcome::Failed, now);
        assert!(syncs.poll_write(now).is_none());
        let later = syncs.poll_timeout().expect("a pause");
        assert_eq!(later, now + PAUSE_MIN);
        assert_eq!(syncs.poll_write(later).expect("a write").action, Action::Status("0".into()));
        written(&mut syncs, "u", Outcome::Failed, later);
        assert_eq!(syncs.poll_timeout(), Some(later + 2 * PAUSE_MIN));
    }

    #[test]
    fn refused_record_is_given_up() {
        let (mut syncs, now) = (available(), Instant::now());
        syncs.sent(&node(), id("u"), spec);
        syncs.poll_write(now).expect("a write");
        written(&mut syncs, "u", Outcome::Refused, now);
        assert_eq!(syncs.len(), (0, 0));
    }

    #[test]
    fn only_a_few_writes_are_under_way_and_removals_of_no_hurry_go_last() {
        let (mut syncs, now) = (available(), Instant::now());
        seen(&mut syncs, "old", Some("1"));
        syncs.forget(&node());
        for number in 0..2 * WRITES_MAX {
            syncs.sent(&node(), id(&format!("u{number:02}")), spec);
        }
        let first: Vec<_> = std::iter::from_fn(|| syncs.poll_write(now)).collect();
        assert_eq!(first.len(), WRITES_MAX);
        let mut last = None;
        for write in first {
            written(&mut syncs, &write.id.uid, Outcome::Done, now);
        }
        while let Some(write) = syncs.poll_write(now) {
            written(&mut syncs, &write.id.uid, Outcome::Done, now);
            last = Some(write);
        }
        assert_eq!(last.expect("writes").action, Action::Delete);
    }

    #[test]
    fn nothing_is_written_without_the_kinds() {
        let (mut syncs, now) = (Syncs::default(), Instant::now());
        assert!(!syncs.is_ready());
        syncs.handle(Word::Unavailable, now);
        assert!(syncs.is_ready());
        syncs.sent(&node(), id("u"), spec);
        assert!(syncs.poll_write(now).is_none());
        assert_eq!(syncs.len(), (0, 0));
    }

    #[test]
    fn record_missing_from_a_new_list_is_gone() {
        let mut syncs = available();
        seen(&mut syncs, "u", Some("7"));
        syncs.handle(Word::Listed(Scope::Cluster, BTreeSet::new()), Instant::now());
        assert_eq!(syncs.len().0, 1);
        syncs.handle(Word::Listed(Scope::Namespaced, BTreeSet::new()), Instant::now());
        assert_eq!(syncs.len().0, 0);
    }
}
