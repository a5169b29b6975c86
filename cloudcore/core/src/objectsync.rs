//! What ObjectSync and ClusterObjectSync objects say about nodes of KubeEdge, and what has to be written.
//!
//! A KubeEdge edge cannot tell what it holds, so what it acknowledged is kept in the cluster: one object per node and
//! object, named `<node>.<uid>`, whose status holds the resource version acknowledged last, `"0"` while nobody knows
//! one. A CloudCore that starts, ours or KubeEdge's, finds there what the node has, and deletes what has gone meanwhile.
//! Nodes of ours tell it themselves, so nothing is written for them, and what an earlier life as a KubeEdge node left is
//! removed.
//!
//! Several CloudCores may serve a node one after the other, each with a watch that lags, with writes that are late, and
//! without knowing of the others. What they write together stays true by these rules:
//!
//! 1. What a node may hold has a record: an object goes out when its record is there ([`Syncs::prepare`]).
//! 2. A record never says more than the node has: a version is written after its acknowledgement, and before an object
//!    leaves a node to which it may return under the same uid, its record goes back to `"0"`, also where another
//!    CloudCore has removed it ([`Syncs::prepare_delete`]).
//! 3. A record is written only as it was seen last: each write names the resource version of the record, and the API
//!    refuses one that comes too late. A CloudCore that the node has left cannot overwrite what its successor wrote.
//! 4. Words about a record are ordered by its resource version, so the echo of an own write is told from the word of
//!    another CloudCore. A list counts whatever its versions are: the cluster may have been restored from a backup.
//! 5. A word of another CloudCore cancels what this one wanted of that record. The caller then doubts what it believed
//!    of the object and sends it once more; only the acknowledgement of that is written.
//! 6. A CloudCore whose watches lag may have sent an older version than the record of another says, or have taken the
//!    object away. It finds that out late: its own write is refused, or it hears of the other's when its connection with
//!    the node has ended. Until it has written something of that record again, it takes every such word back to `"0"`
//!    ([`Syncs::mend`]), so that whoever serves the node sends the object once more.
//!
//! [`Syncs`] holds, per record, what the cluster has and what it should have. Only the newest wish counts: ten
//! acknowledgements of one object are one write when they come faster than the API answers. At most [`WRITES_MAX`]
//! writes are under way; a failed one is tried again after a pause. There is no queue that could overflow: a wish
//! costs a mark on its record, and records are as many as the objects that those nodes hold.
//!
//! [`crate::downstream::Downstream`] owns it and is the only caller. No I/O, no clock.
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

/// What the cluster said about records. `at` is the resource version of the record itself, 0 when it is no number.
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
        /// `metadata.resourceVersion`.
        at: u64,
        /// It was said by a list that is not complete yet, not by a watch.
        is_in_list: bool,
    },
    /// This record is there no longer.
    Gone {
        /// `metadata.name`.
        name: Arc<str>,
        /// `metadata.namespace`; `None` for a ClusterObjectSync.
        namespace: Option<Arc<str>>,
        /// `metadata.resourceVersion` of its last state.
        at: u64,
    },
    /// The watch is about to read a list; connections of KubeEdge nodes wait for it.
    Listing(Scope),
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The cluster has what was wanted; the record's resource version now, 0 for one that was deleted.
    Done(u64),
    /// [`Action::Create`] only: there is such a record.
    Found {
        /// `status.objectResourceVersion`; `None` when it is absent or empty.
        version: Option<Arc<str>>,
        /// `metadata.resourceVersion`.
        at: u64,
    },
    /// The record is not, or no longer, as [`Write`] says that it was seen.
    Conflict,
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
    /// `metadata.resourceVersion` that the record must still have; 0 when it is not known, and for a new one.
    pub at: u64,
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
    /// Create it with this `status.objectResourceVersion`.
    Create(Arc<str>),
    /// Write `status.objectResourceVersion`.
    Status(Arc<str>),
    /// Delete it; one that is gone already is fine.
    Delete,
}

/// All records.
#[derive(Debug, Default)]
pub struct Syncs {
    nodes: BTreeMap<Arc<str>, BTreeMap<SyncId, Record>>,
    is_listed: [bool; 2],
    /// A list is being read once more.
    is_listing: [bool; 2],
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

/// What is known and wanted of one record. It outlives the record until the word of its end has come, so that an older
/// word does not bring it back.
#[derive(Debug)]
struct Record {
    spec: SyncSpec,
    /// What the cluster has, as far as is known.
    stored: Stored,
    /// Resource version at which it had that.
    at: u64,
    /// What it should have.
    wish: Wish,
    /// The wish that is being written.
    writing: Option<Writing>,
    is_queued: bool,
    /// The record went back with its cluster, and the node may hold more than it says.
    is_doubted: bool,
    /// What this process did last to the object on the node, and no record says: nobody acknowledged it, or the write was
    /// cancelled. So this process, and only this one, knows less than the record says.
    unsure: Option<Sent>,
}

/// What a message did to an object on a node, if it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sent {
    /// The node has this version.
    Version(Arc<str>),
    /// The node has the object no longer.
    Delete,
}

#[derive(Debug)]
struct Writing {
    wish: Wish,
    /// The newest word that came meanwhile: the echo of this write, or another's.
    heard: Option<(u64, Stored)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stored {
    Absent,
    /// There, and its status is not written yet.
    Bare,
    Version(Arc<str>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Wish {
    /// Nothing; it is as it is.
    None,
    Hold(Arc<str>),
    Remove,
}

impl Stored {
    fn new(version: Option<Arc<str>>) -> Self {
        version.map_or(Self::Bare, Self::Version)
    }

    /// The version that it says was acknowledged.
    fn acked(&self) -> Option<&Arc<str>> {
        match self {
            Self::Version(version) if **version != *NEVER_ACKED => Some(version),
            _ => None,
        }
    }
}

impl Record {
    fn absent(spec: SyncSpec) -> Self {
        Self {
            spec,
            stored: Stored::Absent,
            at: 0,
            wish: Wish::None,
            writing: None,
            is_queued: false,
            is_doubted: false,
            unsure: None,
        }
    }

    /// The wish that comes last, whether it is being written or not.
    fn last_wish(&self) -> &Wish {
        match (&self.wish, &self.writing) {
            (Wish::None, Some(writing)) => &writing.wish,
            (wish, _) => wish,
        }
    }

    /// What the node holds by this record and by what is about to be written: `None` when it has not been sent or has
    /// left, `Some(None)` when it may hold some version.
    fn held(&self) -> Option<Option<&Arc<str>>> {
        let is_there = self.stored != Stored::Absent;
        match self.last_wish() {
            Wish::Remove => None,
            Wish::Hold(version) if **version != *NEVER_ACKED => Some(Some(version)),
            Wish::Hold(_) => is_there.then_some(None),
            Wish::None => is_there.then(|| self.stored.acked()),
        }
    }

    /// Wishes for a version, or for nothing when that is what the cluster has.
    fn hold(&mut self, version: Arc<str>) {
        let is_so = match &self.writing {
            Some(writing) => matches!(&writing.wish, Wish::Hold(of) if *of == version),
            None => matches!(&self.stored, Stored::Version(of) if *of == version),
        };
        self.wish = if is_so { Wish::None } else { Wish::Hold(version) };
    }

    /// Takes a word that is newer than all before. Returns whether another CloudCore said something new.
    fn hear(&mut self, at: u64, stored: Stored) -> bool {
        if let Some(writing) = &mut self.writing {
            writing.heard = Some((at, stored));
            return false;
        }
        // After its end the next record of that name begins anew.
        self.at = if stored == Stored::Absent { 0 } else { at };
        if self.stored == stored {
            return false;
        }
        self.stored = stored;
        let wish = std::mem::replace(&mut self.wish, Wish::None);
        self.give_up(wish);
        self.is_doubted = false;
        true
    }

    /// A wish will not be written, because another CloudCore has written.
    fn give_up(&mut self, wish: Wish) {
        match wish {
            Wish::Hold(version) if *version != *NEVER_ACKED => {
                self.unsure = Some(Sent::Version(version));
            }
            Wish::Remove => self.unsure = Some(Sent::Delete),
            Wish::Hold(_) | Wish::None => {}
        }
    }

    /// Whether the cluster's word says more than the node may have after what this process has done.
    fn is_untrue(&self) -> bool {
        match (&self.unsure, &self.stored) {
            (None, _) | (_, Stored::Bare) | (Some(Sent::Delete), Stored::Absent) => false,
            (Some(Sent::Version(_)), Stored::Absent) => true,
            (_, Stored::Version(stored)) if **stored == *NEVER_ACKED => false,
            (Some(Sent::Delete), Stored::Version(_)) => true,
            (Some(Sent::Version(sent)), Stored::Version(stored)) => {
                let numbers = number(sent).zip(number(stored));
                sent != stored && numbers.is_none_or(|(sent, stored)| sent < stored)
            }
        }
    }
}

impl Syncs {
    /// Whether the records of every node are known, or will not be.
    pub fn is_ready(&self) -> bool {
        self.is_unavailable || (self.is_available() && self.is_listing == [false; 2])
    }

    /// Whether records are kept at all.
    pub fn is_available(&self) -> bool {
        self.is_listed == [true; 2] && !self.is_unavailable
    }

    /// Writes done since the start.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Records that are there or will be, and how many wait for a write.
    pub fn len(&self) -> (usize, usize) {
        let records = self.nodes.values().flat_map(BTreeMap::values);
        let is_there =
            |record: &&Record| record.stored != Stored::Absent || record.last_wish() != &Wish::None;
        (records.filter(is_there).count(), self.due.len() + self.lazy.len() + self.writing)
    }

    /// Nodes that have records.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<str>> {
        self.nodes.keys()
    }

    /// What `node` holds or may hold: place, object and version acknowledged last, `None` when nobody knows one. What
    /// has no record in the cluster yet has not been sent.
    pub fn held(
        &self,
        node: &str,
    ) -> impl Iterator<Item = (&SyncId, &SyncSpec, Option<&Arc<str>>)> {
        let records = self.nodes.get(node).into_iter().flatten();
        records.filter_map(|(id, record)| {
            let is_believed = !record.is_doubted && record.unsure.is_none();
            let version = record.held()?.filter(|_| is_believed);
            Some((id, &record.spec, version))
        })
    }

    /// The object that a record is about, and what it says as [`Self::held`] does; `None` for the version when the node
    /// does not hold it.
    pub fn get(&self, node: &str, id: &SyncId) -> Option<(&SyncSpec, Option<Option<&Arc<str>>>)> {
        let record = self.nodes.get(node)?.get(id)?;
        Some((&record.spec, record.held()))
    }

    /// Whether `node` has acknowledged this object in `version` or a newer one.
    pub fn is_acked(&self, node: &str, id: &SyncId, version: &str) -> bool {
        let record = self.nodes.get(node).and_then(|records| records.get(id));
        let acked = record.and_then(|record| number(record.held()??));
        matches!((acked, number(version)), (Some(acked), Some(version)) if acked >= version)
    }

    /// An object is about to go to `node`, which may not have it. Returns whether it can: its record is in the cluster
    /// and stays. If not, a [`Word::Written`] about it will come.
    pub fn prepare(
        &mut self,
        node: &Arc<str>,
        id: &SyncId,
        spec: impl FnOnce() -> SyncSpec,
    ) -> bool {
        if !self.is_available() {
            return true;
        }
        let record = self.record_or_absent(node, id, spec);
        let is_there = record.stored != Stored::Absent;
        let is_leaving = matches!(&record.writing, Some(Writing { wish: Wish::Remove, .. }));
        match &record.wish {
            Wish::None | Wish::Hold(_) if is_there && !is_leaving => return true,
            Wish::Hold(_) => {}
            Wish::None if record.writing.is_some() && !is_leaving => {}
            // Also where it was about to go: it has to say first that the node may hold the object.
            Wish::None | Wish::Remove => {
                record.hold(NEVER_ACKED.into());
                if record.wish == Wish::None && record.writing.is_none() {
                    return true;
                }
            }
        }
        self.schedule(node, id, false);
        false
    }

    /// An object is about to leave `node`, to which it may return under the same uid. Returns whether it can: its record
    /// is there and does not say that the node holds some version. If not, a [`Word::Written`] about it will come.
    pub fn prepare_delete(
        &mut self,
        node: &Arc<str>,
        id: &SyncId,
        spec: impl FnOnce() -> SyncSpec,
    ) -> bool {
        if !self.is_available() {
            return true;
        }
        let record = self.record_or_absent(node, id, spec);
        // Without a record nobody would know of the object if the delete were lost with this process.
        let is_there = record.stored != Stored::Absent;
        if record.writing.is_none() && is_there && record.stored.acked().is_none() {
            if matches!(record.wish, Wish::Hold(_)) {
                record.wish = Wish::None;
            }
            return true;
        }
        record.hold(NEVER_ACKED.into());
        self.schedule(node, id, false);
        false
    }

    /// `node` has acknowledged this version.
    pub fn acked(
        &mut self,
        node: &Arc<str>,
        id: &SyncId,
        spec: impl FnOnce() -> SyncSpec,
        version: &Arc<str>,
    ) {
        if !self.is_available() {
            return;
        }
        let record = self.record_or_absent(node, id, spec);
        record.is_doubted = false;
        record.unsure = None;
        record.hold(Arc::clone(version));
        self.schedule(node, id, false);
    }

    /// `node` holds this object no longer.
    pub fn removed(&mut self, node: &Arc<str>, id: &SyncId) {
        self.remove(node, id, false);
    }

    /// A message about this object was lost with its connection; what `node` holds of it is not known here.
    pub fn doubt(&mut self, node: &str, id: &SyncId, sent: Sent) {
        let Some(record) = self.record(node, id) else { return };
        // A delete that was lost leaves what an earlier message may have brought.
        if sent != Sent::Delete || record.unsure.is_none() {
            record.unsure = Some(sent);
        }
    }

    /// Takes a record back to `"0"` that says more than `node` may have since this process sent something, or creates it.
    pub fn mend(&mut self, node: &Arc<str>, id: &SyncId) {
        let is_available = self.is_available();
        let Some(record) = self.record(node, id).filter(|_| is_available) else { return };
        if record.is_untrue() && record.wish == Wish::None && record.writing.is_none() {
            record.hold(NEVER_ACKED.into());
            self.schedule(node, id, false);
        }
    }

    /// Nothing is kept about `node`: it tells itself what it holds.
    pub fn forget(&mut self, node: &Arc<str>) {
        self.forget_until(node, u64::MAX);
    }

    /// Nothing that was written up to this resource version is kept about `node`: it was gone then, and what is newer is
    /// about a node that has come back.
    pub fn forget_until(&mut self, node: &Arc<str>, version: u64) {
        let records = self.nodes.get(node).into_iter().flatten();
        let old = records.filter(|(_, record)| record.at <= version);
        for id in old.map(|(id, _)| id.clone()).collect::<Vec<SyncId>>() {
            self.remove(node, &id, true);
        }
    }

    /// Takes what the cluster said. Returns the records of which another CloudCore has said something new; each has to be
    /// given to [`Self::settle`] when that has been taken up.
    pub fn handle(&mut self, word: Word, now: Instant) -> Vec<(Arc<str>, SyncId)> {
        match word {
            Word::Seen { name, namespace, spec, version, at, is_in_list } => {
                let Some((node, uid)) = parse_object_sync_name(&name) else { return Vec::new() };
                let id = SyncId { namespace, uid: uid.into() };
                self.seen(node, id, spec, Stored::new(version), at, is_in_list)
            }
            Word::Gone { name, namespace, at } => {
                let Some((node, uid)) = parse_object_sync_name(&name) else { return Vec::new() };
                self.gone(node, SyncId { namespace, uid: uid.into() }, at)
            }
            Word::Listing(scope) => {
                self.is_listing[usize::from(scope == Scope::Cluster)] = true;
                Vec::new()
            }
            Word::Listed(scope, names) => self.listed(scope, &names),
            Word::Unavailable => {
                self.is_listing = [false; 2];
                self.is_unavailable = true;
                self.is_listed = [false; 2];
                // They are gone with their kind, and answers to what is under way mean nothing.
                self.nodes.clear();
                self.due.clear();
                self.lazy.clear();
                Vec::new()
            }
            Word::Written { node, id, outcome } => self.written(&node, id, outcome, now),
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
            record.is_queued = false;
            if record.writing.is_some() {
                continue; // scheduled again by its answer
            }
            let action = match (&record.stored, &record.wish) {
                (_, Wish::None) | (Stored::Absent, Wish::Remove) => {
                    record.wish = Wish::None;
                    self.tidy(&node, &id);
                    continue;
                }
                (_, Wish::Remove) => Action::Delete,
                (Stored::Absent, Wish::Hold(version)) => Action::Create(Arc::clone(version)),
                (_, Wish::Hold(version)) => Action::Status(Arc::clone(version)),
            };
            let wish = std::mem::replace(&mut record.wish, Wish::None);
            record.writing = Some(Writing { wish, heard: None });
            let at = if matches!(action, Action::Create(_)) { 0 } else { record.at };
            let spec = record.spec.clone();
            self.writing += 1;
            return Some(Write { node, id, spec, action, at });
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

    fn record_or_absent(
        &mut self,
        node: &Arc<str>,
        id: &SyncId,
        spec: impl FnOnce() -> SyncSpec,
    ) -> &mut Record {
        let records = self.nodes.entry(Arc::clone(node)).or_default();
        records.entry(id.clone()).or_insert_with(|| Record::absent(spec()))
    }

    fn remove(&mut self, node: &Arc<str>, id: &SyncId, is_lazy: bool) {
        let Some(record) = self.record(node, id) else { return };
        let is_over = record.stored == Stored::Absent && record.writing.is_none();
        record.wish = if is_over { Wish::None } else { Wish::Remove };
        self.schedule(node, id, is_lazy);
        self.tidy(node, id);
    }

    fn schedule(&mut self, node: &Arc<str>, id: &SyncId, is_lazy: bool) {
        let Some(record) = self.record(node, id) else { return };
        if record.wish == Wish::None || record.writing.is_some() || record.is_queued {
            return;
        }
        record.is_queued = true;
        let queue = if is_lazy { &mut self.lazy } else { &mut self.due };
        queue.push_back((Arc::clone(node), id.clone()));
    }

    /// What another CloudCore said of this record has been taken up.
    pub fn settle(&mut self, node: &str, id: &SyncId) {
        self.tidy(node, id);
    }

    /// Drops a record that neither is there nor should be, and of which no word is missing.
    fn tidy(&mut self, node: &str, id: &SyncId) {
        let Some(records) = self.nodes.get_mut(node) else { return };
        let is_over = |record: &Record| {
            record.stored == Stored::Absent
                && record.at == 0
                && record.wish == Wish::None
                && record.writing.is_none()
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
        node: &str,
        id: SyncId,
        spec: SyncSpec,
        stored: Stored,
        at: u64,
        is_in_list: bool,
    ) -> Vec<(Arc<str>, SyncId)> {
        let node = match self.nodes.get_key_value(node) {
            Some((node, _)) => Arc::clone(node),
            None => node.into(),
        };
        let record = self.record_or_absent(&node, &id, || spec);
        let last = match &record.writing {
            Some(Writing { heard: Some((at, _)), .. }) => *at,
            _ => record.at,
        };
        let is_old = if is_in_list { at == last } else { at <= last };
        if is_old && at != 0 {
            return Vec::new();
        }
        let is_under_way = record.writing.is_some();
        let is_news = record.hear(at, stored);
        // The cluster was restored from a backup, and the node may hold more than the record knows of.
        let went_back = at < last && !is_under_way;
        record.is_doubted |= went_back;
        if is_news || went_back { vec![(node, id)] } else { Vec::new() }
    }

    fn gone(&mut self, node: &str, id: SyncId, at: u64) -> Vec<(Arc<str>, SyncId)> {
        let Some(record) = self.record(node, &id) else { return Vec::new() };
        if at != 0 && at < record.at {
            return Vec::new();
        }
        let is_news = record.hear(at, Stored::Absent);
        let node = Arc::<str>::from(node);
        self.schedule(&node, &id, false);
        if is_news {
            return vec![(node, id)];
        }
        self.tidy(&node, &id);
        Vec::new()
    }

    fn listed(
        &mut self,
        scope: Scope,
        names: &BTreeSet<(Option<Arc<str>>, Arc<str>)>,
    ) -> Vec<(Arc<str>, SyncId)> {
        let mut missing = Vec::new();
        // A record without a status would keep KubeEdge's CloudCore from ever sending the object. A list tells of these;
        // what a watch tells may be the half of a creation that is under way.
        let mut bare = Vec::new();
        for (node, records) in &self.nodes {
            for (id, record) in records {
                let of_scope = id.namespace.is_none() == (scope == Scope::Cluster);
                if !of_scope || record.writing.is_some() {
                    continue;
                }
                let name = (id.namespace.clone(), object_sync_name(node, &id.uid).into());
                if !names.contains(&name) {
                    missing.push((Arc::clone(node), id.clone()));
                } else if record.stored == Stored::Bare && record.wish == Wish::None {
                    bare.push((Arc::clone(node), id.clone()));
                }
            }
        }
        let mut news = Vec::new();
        for (node, id) in missing {
            news.extend(self.gone(&node, id, 0));
        }
        for (node, id) in bare {
            if let Some(record) = self.record(&node, &id) {
                record.hold(NEVER_ACKED.into());
            }
            self.schedule(&node, &id, true);
        }
        self.is_unavailable = false;
        self.is_listed[usize::from(scope == Scope::Cluster)] = true;
        self.is_listing[usize::from(scope == Scope::Cluster)] = false;
        news
    }

    fn written(
        &mut self,
        node: &Arc<str>,
        id: SyncId,
        outcome: Outcome,
        now: Instant,
    ) -> Vec<(Arc<str>, SyncId)> {
        self.writing = self.writing.saturating_sub(1);
        let Some(record) = self.record(node, &id) else { return Vec::new() };
        let Some(Writing { wish, heard }) = record.writing.take() else { return Vec::new() };
        let mut heard = heard;
        let mut is_news = false;
        match outcome {
            Outcome::Done(at) => {
                match wish {
                    Wish::Hold(version) => {
                        (record.stored, record.at) = (Stored::Version(version), at);
                        heard = heard.filter(|(of, _)| at == 0 || *of == 0 || *of > at);
                    }
                    Wish::Remove | Wish::None => {
                        record.stored = Stored::Absent;
                        // Until the word of its end has come, `at` tells older words from newer ones.
                        heard = heard.filter(|(of, _)| *of == 0 || *of > record.at);
                        if matches!(&heard, Some((_, Stored::Absent))) {
                            record.at = 0;
                            heard = None;
                        }
                    }
                }
                record.unsure = None;
                self.writes += 1;
                self.pause = None;
            }
            Outcome::Found { version, at } => {
                record.give_up(wish);
                let is_older = heard.as_ref().is_some_and(|(of, _)| *of != 0 && *of < at);
                if heard.is_none() || is_older {
                    heard = Some((at, Stored::new(version)));
                }
            }
            // What another CloudCore wrote is on its way here, or has been heard.
            Outcome::Conflict => {
                let next = std::mem::replace(&mut record.wish, Wish::None);
                record.give_up(wish);
                record.give_up(next);
                is_news = heard.is_some();
            }
            Outcome::Refused => {
                *record = Record::absent(record.spec.clone());
                heard = None;
            }
            Outcome::Failed => {
                // Nothing is known. If it was done, the next attempt is refused, and the word of it is another's.
                if record.wish == Wish::None {
                    record.wish = wish;
                }
                let len = self.pause.as_ref().map_or(PAUSE_MIN, |pause| pause.len * 2);
                let len = len.min(PAUSE_MAX);
                self.pause = Some(Pause { until: now + len, len });
            }
        }
        if let Some((at, stored)) = heard
            && let Some(record) = self.record(node, &id)
        {
            is_news |= record.hear(at, stored);
        }
        self.schedule(node, &id, false);
        if is_news {
            return vec![(Arc::clone(node), id)];
        }
        self.tidy(node, &id);
        Vec::new()
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

    /// Returns whether it was news.
    fn written(syncs: &mut Syncs, uid: &str, outcome: Outcome, now: Instant) -> bool {
        !syncs.handle(Word::Written { node: node(), id: id(uid), outcome }, now).is_empty()
    }

    /// The record `uid` is there in its version `at` and says `version`. Returns whether it was news.
    fn seen(syncs: &mut Syncs, uid: &str, version: Option<&str>, at: u64) -> bool {
        let name = format!("edge.lisbon.{uid}").into();
        let namespace = Some("default".into());
        let version = version.map(Arc::from);
        let word = Word::Seen { name, namespace, spec: spec(), version, at, is_in_list: false };
        !syncs.handle(word, Instant::now()).is_empty()
    }

    fn gone(syncs: &mut Syncs, uid: &str, at: u64) -> bool {
        let name = format!("edge.lisbon.{uid}").into();
        let word = Word::Gone { name, namespace: Some("default".into()), at };
        !syncs.handle(word, Instant::now()).is_empty()
    }

    fn listed(syncs: &mut Syncs, uids: &[&str]) -> usize {
        let names = uids
            .iter()
            .map(|uid| (Some("default".into()), Arc::from(format!("edge.lisbon.{uid}"))));
        syncs.handle(Word::Listed(Scope::Namespaced, names.collect()), Instant::now()).len()
    }

    /// What the records say that the node holds.
    fn held(syncs: &Syncs) -> Vec<(&str, Option<&str>)> {
        let held = syncs.held("edge.lisbon");
        held.map(|(id, _, version)| (&*id.uid, version.map(|version| &**version))).collect()
    }

    #[test]
    fn many_acks_of_one_object_are_one_write_after_the_first() {
        let (mut syncs, now) = (available(), Instant::now());
        assert!(!syncs.prepare(&node(), &id("u"), spec));
        let write = syncs.poll_write(now).expect("a record for what was sent");
        assert_eq!(
            (write.name().as_str(), write.action),
            ("edge.lisbon.u", Action::Create("0".into()))
        );
        assert!(!syncs.prepare(&node(), &id("u"), spec), "not before the answer");
        for version in 1..=10 {
            syncs.acked(&node(), &id("u"), spec, &version.to_string().into());
        }
        assert!(syncs.poll_write(now).is_none(), "one write of a record at a time");
        written(&mut syncs, "u", Outcome::Done(5), now);
        assert!(syncs.prepare(&node(), &id("u"), spec));
        let write = syncs.poll_write(now).expect("the newest version");
        assert_eq!((write.action, write.at), (Action::Status("10".into()), 5));
        written(&mut syncs, "u", Outcome::Done(6), now);
        assert!(syncs.poll_write(now).is_none());
        assert_eq!(syncs.writes(), 2);
    }

    #[test]
    fn acked_delete_removes_the_record_as_it_was_seen_last() {
        let (mut syncs, now) = (available(), Instant::now());
        assert!(seen(&mut syncs, "v", Some("7"), 3));
        syncs.removed(&node(), &id("v"));
        assert!(held(&syncs).is_empty());
        let write = syncs.poll_write(now).expect("a write");
        assert_eq!((write.action, write.at), (Action::Delete, 3));
        written(&mut syncs, "v", Outcome::Done(0), now);
        assert_eq!(syncs.len(), (0, 0));
        assert!(!seen(&mut syncs, "v", Some("7"), 3), "an old word");
        assert!(!gone(&mut syncs, "v", 4), "the echo");
        assert!(syncs.nodes.is_empty());
        assert!(seen(&mut syncs, "v", Some("0"), 5), "another's new record");
    }

    #[test]
    fn what_the_cluster_has_is_what_the_node_holds() {
        let mut syncs = available();
        seen(&mut syncs, "u", Some("7"), 1);
        seen(&mut syncs, "v", Some("0"), 2);
        assert_eq!(held(&syncs), [("u", Some("7")), ("v", None)]);
        assert!(syncs.is_acked("edge.lisbon", &id("u"), "7"));
        assert!(!syncs.is_acked("edge.lisbon", &id("u"), "8"));
        syncs.doubt("edge.lisbon", &id("u"), Sent::Version("9".into()));
        assert_eq!(held(&syncs), [("u", None), ("v", None)]);
    }

    #[test]
    fn echo_of_an_own_write_is_no_news_before_and_after_the_answer() {
        let (mut syncs, now) = (available(), Instant::now());
        seen(&mut syncs, "u", Some("7"), 1);
        for (version, at) in [("9", 2), ("11", 3)] {
            syncs.acked(&node(), &id("u"), spec, &version.into());
            syncs.poll_write(now).expect("a write");
            if at == 2 {
                assert!(!seen(&mut syncs, "u", Some(version), at));
            }
            assert!(!written(&mut syncs, "u", Outcome::Done(at), now));
        }
        assert!(!seen(&mut syncs, "u", Some("9"), 2));
        assert!(!seen(&mut syncs, "u", Some("11"), 3));
        assert!(syncs.is_acked("edge.lisbon", &id("u"), "11"));
        assert!(syncs.poll_write(now).is_none());
    }

    #[test]
    fn word_of_another_counts_also_when_it_says_less_and_cancels_what_was_wanted() {
        let (mut syncs, now) = (available(), Instant::now());
        seen(&mut syncs, "u", Some("7"), 1);
        syncs.acked(&node(), &id("u"), spec, &"9".into());
        assert!(seen(&mut syncs, "u", Some("0"), 2), "removed and created again");
        assert!(syncs.poll_write(now).is_none());
        assert_eq!(held(&syncs), [("u", None)]);
    }

    #[test]
    fn write_that_comes_too_late_is_given_up_and_the_word_of_the_other_is_taken() {
        let (mut syncs, now) = (available(), Instant::now());
        for is_heard_first in [false, true] {
            let at = if is_heard_first { 10 } else { 1 };
            seen(&mut syncs, "u", Some("7"), at);
            syncs.acked(&node(), &id("u"), spec, &"9".into());
            syncs.poll_write(now).expect("a write");
            if is_heard_first {
                assert!(!seen(&mut syncs, "u", Some("0"), at + 1));
            }
            assert_eq!(written(&mut syncs, "u", Outcome::Conflict, now), is_heard_first);
            if !is_heard_first {
                assert!(seen(&mut syncs, "u", Some("0"), at + 1));
            }
            assert!(syncs.poll_write(now).is_none());
            assert_eq!(held(&syncs), [("u", None)]);
        }
    }

    /// The next write, without what it is about.
    fn action(syncs: &mut Syncs) -> Option<(Action, u64)> {
        syncs.poll_write(Instant::now()).map(|write| (write.action, write.at))
    }

    #[test]
    fn record_that_says_more_than_the_node_has_since_an_own_message_goes_back() {
        let now = Instant::now();
        let zero = |at| Some((Action::Status("0".into()), at));
        // The write comes too late: another has made the node hold 9 before this one gave it 7 again.
        for is_refused in [true, false] {
            let mut syncs = available();
            seen(&mut syncs, "u", Some("3"), 1);
            syncs.acked(&node(), &id("u"), spec, &"7".into());
            if is_refused {
                syncs.poll_write(now).expect("a write");
                written(&mut syncs, "u", Outcome::Conflict, now);
            }
            assert!(seen(&mut syncs, "u", Some("7"), 2));
            syncs.mend(&node(), &id("u"));
            assert_eq!(action(&mut syncs), None, "that is true");
            assert!(seen(&mut syncs, "u", Some("9"), 3));
            assert_eq!(held(&syncs), [("u", None)]);
            syncs.mend(&node(), &id("u"));
            assert_eq!(action(&mut syncs), zero(3));
            // Another word came first; the next attempt is about that one.
            assert!(!seen(&mut syncs, "u", Some("11"), 4));
            assert!(written(&mut syncs, "u", Outcome::Conflict, now));
            syncs.mend(&node(), &id("u"));
            assert_eq!(action(&mut syncs), zero(4));
            written(&mut syncs, "u", Outcome::Done(5), now);
            assert!(seen(&mut syncs, "u", Some("13"), 6));
            syncs.mend(&node(), &id("u"));
            assert_eq!(action(&mut syncs), None, "once is enough");
        }
    }

    #[test]
    fn message_that_was_lost_makes_the_record_of_another_go_back_too() {
        for sent in [Sent::Version("7".into()), Sent::Delete] {
            let mut syncs = available();
            seen(&mut syncs, "u", Some("3"), 1);
            syncs.doubt("edge.lisbon", &id("u"), sent.clone());
            assert!(seen(&mut syncs, "u", Some("9"), 2));
            syncs.mend(&node(), &id("u"));
            assert_eq!(action(&mut syncs), Some((Action::Status("0".into()), 2)), "{sent:?}");
        }
        // What may be on the node needs a record, and what was taken away does not.
        for (sent, expected) in [
            (Sent::Version("7".into()), Some((Action::Create("0".into()), 0))),
            (Sent::Delete, None),
        ] {
            let mut syncs = available();
            seen(&mut syncs, "u", Some("3"), 1);
            syncs.doubt("edge.lisbon", &id("u"), sent);
            assert!(gone(&mut syncs, "u", 2));
            syncs.mend(&node(), &id("u"));
            assert_eq!(action(&mut syncs), expected);
        }
    }

    #[test]
    fn object_leaves_only_when_a_record_tells_that_it_may_be_there() {
        let (mut syncs, now) = (available(), Instant::now());
        seen(&mut syncs, "u", Some("3"), 1);
        syncs.doubt("edge.lisbon", &id("u"), Sent::Version("7".into()));
        syncs.doubt("edge.lisbon", &id("u"), Sent::Delete);
        assert!(gone(&mut syncs, "u", 2));
        syncs.mend(&node(), &id("u"));
        assert!(!syncs.prepare_delete(&node(), &id("u"), spec));
        assert_eq!(action(&mut syncs), Some((Action::Create("0".into()), 0)));
        assert!(!syncs.prepare_delete(&node(), &id("u"), spec));
        written(&mut syncs, "u", Outcome::Done(3), now);
        assert!(syncs.prepare_delete(&node(), &id("u"), spec));
        syncs.removed(&node(), &id("u"));
        assert_eq!(action(&mut syncs), Some((Action::Delete, 3)));
    }

    #[test]
    fn object_without_a_record_gets_one_before_it_leaves() {
        let (mut syncs, now) = (available(), Instant::now());
        assert!(!syncs.prepare_delete(&node(), &id("u"), spec));
        assert_eq!(action(&mut syncs), Some((Action::Create("0".into()), 0)));
        written(&mut syncs, "u", Outcome::Done(3), now);
        assert!(syncs.prepare_delete(&node(), &id("u"), spec));
    }

    #[test]
    fn acknowledgement_after_a_lost_message_settles_it() {
        let mut syncs = available();
        seen(&mut syncs, "u", Some("3"), 1);
        syncs.doubt("edge.lisbon", &id("u"), Sent::Version("7".into()));
        syncs.acked(&node(), &id("u"), spec, &"7".into());
        let now = Instant::now();
        assert_eq!(action(&mut syncs), Some((Action::Status("7".into()), 1)));
        written(&mut syncs, "u", Outcome::Done(2), now);
        assert!(seen(&mut syncs, "u", Some("9"), 3));
        syncs.mend(&node(), &id("u"));
        assert_eq!(action(&mut syncs), None);
    }

    #[test]
    fn record_that_another_created_first_is_news_and_enough() {
        let (mut syncs, now) = (available(), Instant::now());
        assert!(!syncs.prepare(&node(), &id("u"), spec));
        syncs.poll_write(now).expect("a write");
        let found = Outcome::Found { version: Some("7".into()), at: 4 };
        assert!(written(&mut syncs, "u", found, now));
        assert!(syncs.prepare(&node(), &id("u"), spec));
        assert!(!seen(&mut syncs, "u", Some("7"), 4));
        assert!(syncs.poll_write(now).is_none());
    }

    #[test]
    fn object_leaves_when_its_record_says_no_version() {
        let (mut syncs, now) = (available(), Instant::now());
        seen(&mut syncs, "u", Some("7"), 1);
        assert!(!syncs.prepare_delete(&node(), &id("u"), spec));
        let write = syncs.poll_write(now).expect("a write");
        assert_eq!(write.action, Action::Status("0".into()));
        assert!(!syncs.prepare_delete(&node(), &id("u"), spec));
        written(&mut syncs, "u", Outcome::Done(2), now);
        assert!(syncs.prepare_delete(&node(), &id("u"), spec));
        // And when it is wanted again before the record has gone, the record stays as it is.
        syncs.removed(&node(), &id("u"));
        assert!(syncs.prepare(&node(), &id("u"), spec));
        assert!(syncs.poll_write(now).is_none());
    }

    #[test]
    fn object_that_returns_waits_until_its_record_has_gone_and_come() {
        let (mut syncs, now) = (available(), Instant::now());
        seen(&mut syncs, "u", Some("0"), 1);
        syncs.removed(&node(), &id("u"));
        syncs.poll_write(now).expect("a write");
        assert!(!syncs.prepare(&node(), &id("u"), spec));
        written(&mut syncs, "u", Outcome::Done(0), now);
        assert_eq!(syncs.poll_write(now).expect("a write").action, Action::Create("0".into()));
        assert!(!gone(&mut syncs, "u", 2));
        written(&mut syncs, "u", Outcome::Done(3), now);
        assert!(syncs.prepare(&node(), &id("u"), spec));
    }

    #[test]
    fn record_without_status_gets_one_when_a_list_shows_it() {
        let (mut syncs, now) = (available(), Instant::now());
        seen(&mut syncs, "u", None, 1);
        assert!(syncs.poll_write(now).is_none(), "another may be about to write it");
        listed(&mut syncs, &["u"]);
        assert_eq!(syncs.poll_write(now).expect("a write").action, Action::Status("0".into()));
    }

    #[test]
    fn record_that_another_removed_is_created_again_by_the_next_acknowledgement_only() {
        let (mut syncs, now) = (available(), Instant::now());
        seen(&mut syncs, "u", Some("7"), 1);
        syncs.acked(&node(), &id("u"), spec, &"9".into());
        syncs.poll_write(now).expect("a write");
        assert!(!gone(&mut syncs, "u", 2));
        assert!(written(&mut syncs, "u", Outcome::Conflict, now));
        assert!(syncs.poll_write(now).is_none());
        syncs.acked(&node(), &id("u"), spec, &"9".into());
        assert_eq!(syncs.poll_write(now).expect("a write").action, Action::Create("9".into()));
    }

    #[test]
    fn failed_write_pauses_all_and_is_tried_again() {
        let (mut syncs, now) = (available(), Instant::now());
        syncs.prepare(&node(), &id("u"), spec);
        syncs.poll_write(now).expect("a write");
        written(&mut syncs, "u", Outcome::Failed, now);
        assert!(syncs.poll_write(now).is_none());
        let later = syncs.poll_timeout().expect("a pause");
        assert_eq!(later, now + PAUSE_MIN);
        assert_eq!(syncs.poll_write(later).expect("a write").action, Action::Create("0".into()));
        written(&mut syncs, "u", Outcome::Failed, later);
        assert_eq!(syncs.poll_timeout(), Some(later + 2 * PAUSE_MIN));
    }

    #[test]
    fn refused_record_is_given_up() {
        let (mut syncs, now) = (available(), Instant::now());
        syncs.prepare(&node(), &id("u"), spec);
        syncs.poll_write(now).expect("a write");
        written(&mut syncs, "u", Outcome::Refused, now);
        assert_eq!(syncs.len(), (0, 0));
        assert!(syncs.nodes.is_empty());
    }

    #[test]
    fn only_a_few_writes_are_under_way_and_removals_of_no_hurry_go_last() {
        let (mut syncs, now) = (available(), Instant::now());
        seen(&mut syncs, "old", Some("1"), 1);
        syncs.forget(&node());
        for number in 0..2 * WRITES_MAX {
            syncs.prepare(&node(), &id(&format!("u{number:02}")), spec);
        }
        let first: Vec<_> = std::iter::from_fn(|| syncs.poll_write(now)).collect();
        assert_eq!(first.len(), WRITES_MAX);
        let mut last = None;
        for write in first {
            written(&mut syncs, &write.id.uid, Outcome::Done(2), now);
        }
        while let Some(write) = syncs.poll_write(now) {
            written(&mut syncs, &write.id.uid, Outcome::Done(3), now);
            last = Some(write);
        }
        assert_eq!(last.expect("writes").action, Action::Delete);
    }

    #[test]
    fn nothing_is_written_without_the_kinds_and_nothing_waits() {
        let (mut syncs, now) = (Syncs::default(), Instant::now());
        assert!(!syncs.is_ready());
        syncs.handle(Word::Unavailable, now);
        assert!(syncs.is_ready());
        assert!(syncs.prepare(&node(), &id("u"), spec));
        assert!(syncs.poll_write(now).is_none());
        assert_eq!(syncs.len(), (0, 0));
    }

    #[test]
    fn record_missing_from_a_new_list_is_gone() {
        let mut syncs = available();
        seen(&mut syncs, "u", Some("7"), 1);
        syncs.handle(Word::Listed(Scope::Cluster, BTreeSet::new()), Instant::now());
        assert_eq!(syncs.len().0, 1);
        assert_eq!(listed(&mut syncs, &[]), 1);
        assert_eq!(syncs.len().0, 0);
    }

    #[test]
    fn list_of_a_cluster_that_went_back_counts() {
        let mut syncs = available();
        seen(&mut syncs, "u", Some("70"), 71);
        let name: Arc<str> = "edge.lisbon.u".into();
        let (namespace, version) = (Some("default".into()), Some("7".into()));
        let word = Word::Seen { name, namespace, spec: spec(), version, at: 8, is_in_list: true };
        assert_eq!(syncs.handle(word, Instant::now()).len(), 1);
        // Nobody knows any more what the node has acknowledged since.
        assert_eq!(held(&syncs), [("u", None)]);
        assert!(syncs.is_acked("edge.lisbon", &id("u"), "7"));
    }
}
