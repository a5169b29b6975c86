//! What the records of a KubeEdge node mean for what it is sent, and what its acknowledgements mean for the records.
//!
//! All that [`super::Downstream`] does with ObjectSync records is here; [`crate::objectsync`] has the rules and the
//! records themselves. Per node and object there are three moments:
//!
//! - Before a message: [`Downstream::is_recorded`] says whether the record allows it, and parks the object if not.
//! - After its acknowledgement: [`Downstream::record`] says what the record should be.
//! - When another CloudCore has written: [`Downstream::revise`] doubts what was believed of the object, which goes out
//!   once more, as an update or as a delete.
//!
//! What a connection starts from is what the records say then ([`Downstream::recall`]).

use super::flow::{Pushed, What};
use super::resume::Phase;
use super::version::Watched;
use super::{Downstream, Key, Kind, Known, NodeObject, Wanted};
use crate::objectsync::{Outcome, SyncId, SyncSpec, Word};
use skerry_api::reliablesyncs::v1alpha1::parse_object_sync_name;
use skerry_protocol::Operation;
use skerry_protocol::resource::CLUSTER_SCOPE;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

impl Downstream {
    /// Whether the record of an object allows the next message about it: one that brings it, or one that takes it away
    /// (`leaves`). If not, the object waits for its record.
    pub(super) fn is_recorded(
        &mut self,
        name: &Arc<str>,
        key: &Key,
        uid: &Arc<str>,
        leaves: bool,
    ) -> bool {
        let session = self.nodes.get(name).and_then(|node| node.session.as_deref());
        let Some(session) = session.filter(|session| session.is_stock()) else { return true };
        let id = sync_id(key, uid);
        if session.unrecorded.contains(&id) {
            return true;
        }
        let is_ready = match leaves {
            // A pod never returns under its uid, so its record may be late.
            true if key.kind() == Kind::Pod => true,
            true => self.syncs.prepare_delete(name, &id, || sync_spec(key)),
            false => self.syncs.prepare(name, &id, || sync_spec(key)),
        };
        let session = self.nodes.get_mut(name).and_then(|node| node.session.as_deref_mut());
        let Some(session) = session else { return is_ready };
        if is_ready {
            // What it waited for before may not come any more.
            session.parked.remove(&id);
        } else {
            session.parked.insert(id, key.clone());
        }
        is_ready
    }

    /// Goes on with an object whose record has been written, or will not be.
    fn unpark(&mut self, name: &Arc<str>, id: &SyncId, is_refused: bool) {
        let Some(session) = self.nodes.get_mut(name).and_then(super::Node::live) else { return };
        let Some(key) = session.parked.remove(id) else { return };
        session.release();
        if is_refused {
            session.unrecorded.insert(id.clone());
        }
        let is_wanted = matches!(self.wanted(name, &key), Wanted::Present(of) if of.uid == id.uid);
        let known = self.nodes.get(name).and_then(|node| node.known.get(&key));
        if !is_wanted && known.is_none_or(|known| known.uid != id.uid) {
            // It went before it was sent.
            self.syncs.removed(name, id);
        }
        self.mark(name, &key);
    }

    /// Goes on with all objects that wait for records: there will be none.
    fn unpark_all(&mut self) {
        let mut marks = Vec::new();
        for (name, node) in &mut self.nodes {
            let Some(session) = node.live() else { continue };
            let parked = std::mem::take(&mut session.parked);
            session.release();
            marks.extend(parked.into_values().map(|key| (Arc::clone(name), key)));
        }
        for (name, key) in marks {
            self.mark(&name, &key);
        }
    }

    /// Writes down what a KubeEdge edge has acknowledged.
    pub(super) fn record(&mut self, name: &Arc<str>, key: &Key, what: What) {
        let former = match what {
            What::Put { uid, resource_version, former } => {
                self.syncs.acked(name, &sync_id(key, &uid), || sync_spec(key), &resource_version);
                former
            }
            What::Delete { uid } => {
                self.syncs.removed(name, &sync_id(key, &uid));
                return self.look_for_another(name, key);
            }
            What::Pushed(Pushed { object, operation, former }) => {
                let id = sync_id(key, &object.uid);
                if operation == Operation::Delete {
                    self.syncs.removed(name, &id);
                } else {
                    let spec = || pushed_spec(key, &object);
                    self.syncs.acked(name, &id, spec, &object.resource_version);
                }
                former
            }
        };
        if let Some(former) = former {
            self.syncs.removed(name, &sync_id(key, &former));
        }
    }

    /// An object has left. Where two records were about one name, the node may have held the other one.
    fn look_for_another(&mut self, name: &Arc<str>, key: &Key) {
        let mut held = self.syncs.held(name);
        let is_same = |id: &SyncId, spec: &SyncSpec| {
            *spec.name == *key.name()
                && *spec.kind == *key.kind().api_kind()
                && sync_id(key, &id.uid) == *id
        };
        let Some((id, ..)) = held.find(|(id, spec, _)| is_same(id, spec)) else { return };
        let known = Known::some(Arc::clone(&id.uid));
        drop(held);
        if let Some(node) = self.nodes.get_mut(name) {
            node.known.entry(key.clone()).or_insert(known);
            self.mark(name, key);
        }
    }

    /// `name` has what it should. Its record may have been taken back for a delete that is not needed any more.
    pub(super) fn restate(&mut self, name: &Arc<str>, key: &Key) {
        let Some(node) = self.nodes.get(name) else { return };
        let session = node.session.as_deref().filter(|session| session.is_stock());
        let (Some(session), Some(known)) = (session, node.known.get(key)) else { return };
        let id = sync_id(key, &known.uid);
        if let Some(version) = &known.resource_version
            && !session.is_under_way(key)
            && !session.unrecorded.contains(&id)
        {
            self.syncs.acked(name, &id, || sync_spec(key), version);
        }
    }

    /// Takes what the records of `name` say for what it holds. What this process remembers and no record says, another
    /// CloudCore may have taken away: it is sent or deleted once more.
    pub(super) fn recall(&mut self, name: &Arc<str>) {
        let mut recalled: BTreeMap<Key, Known> = BTreeMap::new();
        let mut pointless = Vec::new();
        for (id, spec, version) in self.syncs.held(name) {
            let Some(key) = key_of(name, id, spec) else { continue };
            // What this process sent and was acknowledged since is known better than by the record's word.
            let sent = self.nodes.get(name).and_then(|node| node.known.get(&key));
            let is_sent = |sent: &Known| {
                !sent.is_told && sent.uid == id.uid && sent.resource_version.as_ref() == version
            };
            let known = Known {
                uid: Arc::clone(&id.uid),
                resource_version: version.cloned(),
                is_told: !sent.is_some_and(is_sent),
            };
            let known = match recalled.remove(&key) {
                None => known,
                Some(other) => {
                    let (winner, loser) = self.choose(name, &key, other, known);
                    pointless.extend(loser.map(|loser| sync_id(&key, &loser.uid)));
                    winner
                }
            };
            recalled.insert(key, known);
        }
        for id in pointless {
            self.syncs.removed(name, &id);
        }
        let Some(node) = self.nodes.get_mut(name) else { return };
        for (key, mut known) in std::mem::take(&mut node.known) {
            known.resource_version = None;
            recalled.entry(key).or_insert(known);
        }
        node.known = recalled;
    }

    /// Which of two objects under one name, one after the other, counts as the one that `name` holds, and the one whose
    /// record means nothing then. A pod or a device that is gone has to be deleted before its successor comes; of all
    /// others only the newest counts, as nodes tell them apart by name.
    fn choose(&self, name: &str, key: &Key, one: Known, other: Known) -> (Known, Option<Known>) {
        let current = match self.wanted(name, key) {
            Wanted::Present(version) => Some(&version.uid),
            _ => None,
        };
        let wants_former = matches!(key.kind(), Kind::Pod | Kind::Device);
        let is_one = (Some(&one.uid) == current) != wants_former;
        let (winner, loser) = if is_one { (one, other) } else { (other, one) };
        (winner, Some(loser).filter(|_| !wants_former))
    }

    /// Takes what the cluster said about records.
    pub(super) fn hear(&mut self, word: Word, now: Instant) {
        let was_available = self.syncs.is_available();
        let is_change = matches!(word, Word::Listed(..) | Word::Unavailable);
        let about = match &word {
            Word::Seen { name, namespace, .. } | Word::Gone { name, namespace, .. } => {
                parse_object_sync_name(name).map(|(node, uid)| {
                    let id = SyncId { namespace: namespace.clone(), uid: uid.into() };
                    (self.intern_node(node), id, None)
                })
            }
            Word::Written { node, id, outcome } => {
                Some((Arc::clone(node), id.clone(), Some(outcome.clone())))
            }
            Word::Listing(_) | Word::Listed(..) | Word::Unavailable => None,
        };
        let news = self.syncs.handle(word, now);
        let is_news = !news.is_empty();
        for (name, id) in news {
            if is_change {
                self.keep_in_mind(&name, &id);
            }
            self.revise(&name, &id);
        }
        if let Some((name, id, outcome)) = about {
            match outcome {
                // It is tried again.
                Some(Outcome::Failed) => {}
                // The word of the one who was first tells more.
                Some(Outcome::Conflict) if !is_news => {}
                outcome => self.unpark(&name, &id, outcome == Some(Outcome::Refused)),
            }
        }
        if !is_change {
            return;
        }
        self.collect_syncs();
        if !was_available && self.syncs.is_available() {
            self.record_known();
        }
        if was_available && !self.syncs.is_available() {
            self.unpark_all();
        }
        self.end_list_wait();
    }

    /// Another CloudCore has written the record of an object: what this one believed of it may be wrong, and its word may
    /// be a late one, so nothing is believed. The object goes out once more and its acknowledgement tells.
    fn revise(&mut self, name: &Arc<str>, id: &SyncId) {
        let name = &self.intern_node(name);
        if self.tells_itself(name) {
            return self.syncs.forget(name);
        }
        if let Some((spec, held)) = self.syncs.get(name, id) {
            let key = key_of(name, id, spec);
            let held = held.map(|version| version.cloned());
            if let Some(key) = key {
                self.disbelieve(name, &key, id, held);
            }
        }
        if self.nodes.get(name).is_some_and(|node| !matches!(node.object, NodeObject::Absent)) {
            self.syncs.mend(name, id);
        }
        self.syncs.settle(name, id);
    }

    fn disbelieve(
        &mut self,
        name: &Arc<str>,
        key: &Key,
        id: &SyncId,
        held: Option<Option<Arc<str>>>,
    ) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        // A connection that has not been checked starts from the records anyway.
        if node.session.as_deref().is_none_or(|session| !session.is_checked) {
            return;
        }
        let known = Known::some(Arc::clone(&id.uid));
        let Some(version) = held else {
            if let Some(held) = node.known.get_mut(key).filter(|held| held.uid == id.uid) {
                held.resource_version = None;
                self.mark(name, key);
            }
            return;
        };
        let known = match node.known.remove(key) {
            Some(other) if other.uid != known.uid => {
                let other = Known { resource_version: None, ..other };
                let (winner, loser) = self.choose(name, key, other, known);
                if let Some(loser) = loser {
                    self.syncs.removed(name, &sync_id(key, &loser.uid));
                }
                winner
            }
            _ => known,
        };
        let Some(node) = self.nodes.get_mut(name) else { return };
        node.known.insert(key.clone(), known);
        if self.is_behind(name, key, version.as_deref()) {
            self.read_again(name, key);
        }
        self.mark(name, key);
    }

    /// A list lacks the record of an object: another CloudCore removed it while nobody watched, or the cluster lost it with
    /// the time since a backup. In the latter case only this process knows that `name` may hold the object.
    fn keep_in_mind(&mut self, name: &Arc<str>, id: &SyncId) {
        let Some((spec, None)) = self.syncs.get(name, id) else { return };
        let Some(key) = key_of(name, id, spec) else { return };
        let Some(node) = self.nodes.get_mut(name) else { return };
        let is_fresh = node.session.as_deref().is_none_or(|session| !session.is_checked);
        if is_fresh {
            let known = Known::some(Arc::clone(&id.uid));
            node.known.entry(key).or_insert(known);
        }
    }

    fn tells_itself(&self, name: &str) -> bool {
        let session = self.nodes.get(name).and_then(|node| node.session.as_ref());
        session.is_some_and(|session| !session.is_stock())
    }

    /// Removes the records of nodes that are gone, and of those that tell themselves what they hold. A node that only seems
    /// to be gone is read first: it may have registered with another CloudCore, and the watch of Nodes not have got there.
    pub(super) fn collect_syncs(&mut self) {
        if !self.listed.contains(&Kind::Node) {
            return;
        }
        let is_gone = |name: &str| match self.nodes.get(name) {
            None => true,
            Some(node) => matches!(node.object, NodeObject::Absent) && node.session.is_none(),
        };
        let names: Vec<Arc<str>> = self
            .syncs
            .nodes()
            .filter(|name| is_gone(name) || self.tells_itself(name))
            .cloned()
            .collect();
        for name in names {
            let key = Key::new(Kind::Node, "", &name).filter(|_| !self.tells_itself(&name));
            match key {
                Some(key) if self.collecting.insert(key.clone()) => self.fetch(&key),
                Some(_) => {}
                None => self.syncs.forget(&name),
            }
        }
    }

    /// Writes down what connected KubeEdge edges hold: until now there was no place for it.
    fn record_known(&mut self) {
        let live = |node: &&super::Node| {
            let session = node.session.as_ref();
            session
                .is_some_and(|session| session.is_stock() && matches!(session.phase, Phase::Live))
        };
        for (name, node) in self.nodes.iter().filter(|(_, node)| live(node)) {
            let session = node.session.as_ref().expect("the filter found it");
            for (key, known) in node.known.iter().filter(|(key, _)| !session.is_under_way(key)) {
                if let Some(version) = &known.resource_version {
                    let id = sync_id(key, &known.uid);
                    self.syncs.acked(name, &id, || sync_spec(key), version);
                }
            }
        }
    }
}

/// The object of a record of `name`, if it is one that goes down by itself. A Node of another name is watched there.
fn key_of(name: &str, id: &SyncId, spec: &SyncSpec) -> Option<Key> {
    let kind = Kind::of_api(&spec.api_version, &spec.kind)?;
    if kind == Kind::Node && *spec.name != *name {
        return None;
    }
    Key::new(kind, id.namespace.as_deref().unwrap_or_default(), &spec.name)
}

/// The place of the record of an object.
pub(super) fn sync_id(key: &Key, uid: &Arc<str>) -> SyncId {
    let namespace = key.namespace();
    let namespace = (namespace != CLUSTER_SCOPE).then(|| namespace.into());
    SyncId { namespace, uid: Arc::clone(uid) }
}

fn sync_spec(key: &Key) -> SyncSpec {
    SyncSpec {
        api_version: key.kind().api_version().into(),
        kind: key.kind().api_kind().into(),
        name: key.name().into(),
    }
}

pub(super) fn pushed_spec(key: &Key, object: &Watched) -> SyncSpec {
    SyncSpec {
        api_version: Arc::clone(&object.api_version),
        kind: Arc::clone(&object.kind),
        name: key.name().into(),
    }
}
