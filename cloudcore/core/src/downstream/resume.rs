//! What happens when a node connects: finding out what it holds, and the answer when it has everything.

use super::flow::Session;
use super::version::Version;
use super::{
    DIGEST_WAIT, Downstream, Key, Kind, Known, NodeObject, Output, SessionId, SharedState, Wanted,
};
use crate::objectsync::{Outcome, SyncId, Word};
use skerry_api::reliablesyncs::v1alpha1::parse_object_sync_name;
use skerry_protocol::Message;
use skerry_protocol::capability::Capabilities;
use skerry_protocol::digest::Digest;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

/// Requests of one connection that wait for the same answer; a node sends one, and sends it again when it doubts.
const REQUESTS_MAX: usize = 4;

/// How far a connection is.
#[derive(Debug)]
pub(super) enum Phase {
    /// Our own edge has not told yet what it holds.
    AwaitingDigest { until: Instant },
    /// The API has not told yet what there is.
    AwaitingLists { digest: Option<(Digest, Box<Message>)> },
    /// Differences go out at once.
    Live,
}

/// Requests that are answered when the node has everything that it lacked when it asked.
#[derive(Debug)]
pub(super) struct Barrier {
    /// What it lacked and still does.
    pub(super) keys: BTreeSet<Key>,
    pub(super) requests: Vec<Message>,
}

impl Downstream {
    pub(super) fn connect(
        &mut self,
        name: &str,
        id: SessionId,
        capabilities: Capabilities,
        now: Instant,
    ) {
        self.cut(name, "the node opened a new connection");
        let name = self.intern_node(name);
        let node = self.nodes.entry(Arc::clone(&name)).or_default();
        let was_foreign = node.is_foreign();
        node.edge = true;
        node.removed = false;
        let phase = if capabilities.digest {
            let until = now + DIGEST_WAIT;
            self.awaiting_digest.insert((until, Arc::clone(&name)));
            // It tells itself what it holds; what an earlier life as a KubeEdge node left is of no use.
            self.syncs.forget(&name);
            Phase::AwaitingDigest { until }
        } else {
            self.awaiting_lists.insert(Arc::clone(&name));
            Phase::AwaitingLists { digest: None }
        };
        node.session = Some(Box::new(Session::new(id, capabilities, phase)));
        if was_foreign {
            // Neither its pods nor its Node were kept.
            self.relist(&name);
            if let Some(key) = Key::new(Kind::Node, "", &name) {
                self.fetch(&key);
            }
        }
        self.end_list_wait();
    }

    pub(super) fn digest(
        &mut self,
        name: &str,
        id: SessionId,
        digest: Digest,
        request: Box<Message>,
    ) {
        let name = self.intern_node(name);
        let Some(node) = self.nodes.get_mut(&name) else { return };
        let Some(session) = node.session.as_deref_mut().filter(|session| session.id == id) else {
            return;
        };
        if let Phase::AwaitingDigest { until } = session.phase {
            self.awaiting_digest.remove(&(until, Arc::clone(&name)));
        }
        if !matches!(session.phase, Phase::Live) {
            session.phase = Phase::AwaitingLists { digest: Some((digest, request)) };
            self.awaiting_lists.insert(name);
            return self.end_list_wait();
        }
        // It came after everything had been pushed; it can still tell of objects that are gone.
        let held = self.held_keys(&digest);
        let Some(node) = self.nodes.get_mut(&name) else { return };
        let Some(session) = node.session.as_deref() else { return };
        let mut keys: BTreeSet<Key> = session.unsettled().cloned().collect();
        for (key, held) in held {
            if !node.known.contains_key(&key) && !session.is_under_way(&key) {
                node.known.insert(key.clone(), held);
                keys.insert(key);
            }
        }
        self.answer_after(&name, keys, *request);
    }

    /// Marks `keys`, and answers `request` when the node has all of them.
    fn answer_after(&mut self, name: &Arc<str>, keys: BTreeSet<Key>, request: Message) {
        for key in &keys {
            self.mark(name, key);
        }
        let Some(session) = self.nodes.get_mut(name).and_then(super::Node::live) else { return };
        let barrier = session.barrier.get_or_insert_with(|| {
            Box::new(Barrier { keys: BTreeSet::new(), requests: Vec::new() })
        });
        barrier.keys.extend(keys);
        if barrier.requests.len() == REQUESTS_MAX {
            barrier.requests.remove(0);
        }
        barrier.requests.push(request);
        self.touch(name);
    }

    /// Ends the wait for digests that did not come.
    pub(super) fn stop_waiting(&mut self, now: Instant) {
        let mut has_ended = false;
        while self.awaiting_digest.first().is_some_and(|(until, _)| *until <= now) {
            let (_, name) = self.awaiting_digest.pop_first().expect("was there just now");
            if let Some(session) =
                self.nodes.get_mut(&name).and_then(|node| node.session.as_deref_mut())
            {
                session.phase = Phase::AwaitingLists { digest: None };
                self.awaiting_lists.insert(name);
                has_ended = true;
            }
        }
        if has_ended {
            self.end_list_wait();
        }
    }

    /// Goes on with the connections that waited for the API to tell what there is.
    pub(super) fn end_list_wait(&mut self) {
        let is_told = |kind| self.listed.contains(&kind) || self.unavailable.contains(&kind);
        if self.awaiting_lists.is_empty() || !Kind::ALL.into_iter().all(is_told) {
            return;
        }
        let mut ready = Vec::new();
        for name in &self.awaiting_lists {
            let session = self.nodes.get(name).and_then(|node| node.session.as_ref());
            let needs_syncs = session.is_some_and(|session| session.is_stock());
            let is_read = !self.relisting.contains_key(name)
                && session.is_none_or(|session| session.doubts.is_empty());
            if is_read && (!needs_syncs || self.syncs.is_ready()) {
                ready.push(Arc::clone(name));
            }
        }
        for name in ready {
            if self.check(&name) {
                self.awaiting_lists.remove(&name);
                self.go_live(&name);
            }
        }
    }

    /// Whether the watches are as far as what a node tells; if not, reads what is in doubt.
    fn check(&mut self, name: &Arc<str>) -> bool {
        let Some(session) = self.nodes.get_mut(name).and_then(|node| node.session.as_deref_mut())
        else {
            return true;
        };
        if std::mem::replace(&mut session.is_checked, true) {
            return true;
        }
        let is_stock = session.is_stock();
        if is_stock {
            if !self.syncs.is_available() {
                return true; // all that is known of it came from here
            }
            self.recall(name);
        }
        let Some(node) = self.nodes.get_mut(name) else { return true };
        let known = std::mem::take(&mut node.known);
        let phase = node.session.as_deref().map(|session| &session.phase);
        let held = match phase {
            Some(Phase::AwaitingLists { digest: Some((digest, _)) }) => {
                let digest = digest.clone();
                self.held_keys(&digest)
            }
            _ => known,
        };
        let mut doubts = Vec::new();
        for (key, known) in &held {
            let held = known.resource_version.as_deref().and_then(super::number);
            let progress = self.progress.get(&key.kind()).copied().unwrap_or(0);
            // Of what was never acknowledged nobody knows how new it is.
            let is_ahead = held.is_none_or(|held| held > progress);
            let is_own = key.kind() != Kind::Node || key.name() == &**name;
            let is_older = |of: &Version| held > super::number(&of.resource_version);
            let is_doubtful = match key.kind() {
                _ if self.unavailable.contains(&key.kind()) => false,
                Kind::Pod | Kind::Device | Kind::Node => match self.wanted(name, key) {
                    Wanted::Present(version) => is_older(version),
                    Wanted::Absent => is_ahead && is_own,
                    Wanted::Unknown => is_ahead,
                    Wanted::Unjudged => false,
                },
                // Also where no pod of the node is known to refer to it: one that is read now may.
                _ => match self.shared.get(key).map(|shared| &shared.state) {
                    Some(SharedState::Present(version)) => is_older(version),
                    // A read that began earlier may be too old.
                    Some(SharedState::Absent | SharedState::Unknown(_)) => is_ahead,
                    None => false,
                },
            };
            if is_doubtful {
                doubts.push(key.clone());
            }
        }
        let node = self.nodes.get_mut(name).expect("was found just now");
        let session = node.session.as_deref_mut().expect("was found just now");
        if is_stock {
            node.known = held;
        }
        let (pods, others): (Vec<_>, Vec<_>) =
            doubts.into_iter().partition(|key| key.kind() == Kind::Pod);
        session.doubts.extend(others.iter().cloned());
        let is_clear = pods.is_empty() && others.is_empty();
        if !pods.is_empty() {
            self.relist(name);
        }
        for key in &others {
            if let Some(shared) = self.shared.get_mut(key) {
                let seen = match std::mem::replace(&mut shared.state, SharedState::Absent) {
                    SharedState::Present(version) => Some(version),
                    SharedState::Unknown(seen) => seen,
                    SharedState::Absent => None,
                };
                shared.state = SharedState::Unknown(seen);
            }
            self.fetch(key);
        }
        is_clear
    }

    /// `key` has been read.
    pub(super) fn end_doubt(&mut self, key: &Key) {
        let mut has_ended = false;
        for name in &self.awaiting_lists {
            let session = self.nodes.get_mut(name).and_then(|node| node.session.as_deref_mut());
            has_ended |= session.is_some_and(|session| session.doubts.remove(key));
        }
        if has_ended {
            self.end_list_wait();
        }
    }

    fn go_live(&mut self, name: &Arc<str>) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let Some(session) = node.session.as_deref_mut() else { return };
        let is_stock = session.is_stock();
        let Phase::AwaitingLists { digest } = std::mem::replace(&mut session.phase, Phase::Live)
        else {
            return;
        };
        let request = match digest {
            Some((digest, request)) => {
                let held = self.held_keys(&digest);
                let node = self.nodes.get_mut(name).expect("was found just now");
                node.known = held;
                Some(request)
            }
            None => {
                if !(is_stock && self.syncs.is_available()) {
                    let node = self.nodes.get_mut(name).expect("was found just now");
                    // Whatever it has, it gets again; what it has been sent earlier and is gone, is deleted.
                    for known in node.known.values_mut() {
                        known.resource_version = None;
                    }
                }
                None
            }
        };
        let own = Key::new(Kind::Node, "", name);
        let node = self.nodes.get_mut(name).expect("was found just now");
        if let Some(known) = own.as_ref().and_then(|own| node.known.get_mut(own))
            && is_stock
        {
            known.resource_version = None;
        }
        let mut keys: BTreeSet<Key> = node.known.keys().cloned().collect();
        keys.extend(own);
        for key in &node.placed {
            keys.insert(key.clone());
            keys.extend(
                self.placed.get(key).into_iter().flat_map(|of| of.references.iter().cloned()),
            );
        }
        if is_stock && keys.iter().any(|key| key.kind() == Kind::Device) {
            let message = Box::new(self.membership(name, self.now_ms));
            let session = self.session(name).expect("was found just now");
            self.outputs.push_back(Output::Send { node: Arc::clone(name), session, message });
        }
        if request.is_none() {
            self.assume(name, &keys);
        }
        match request {
            Some(request) => self.answer_after(name, keys, *request),
            None => keys.iter().for_each(|key| self.mark(name, key)),
        }
        self.mark_pushed(name);
    }

    /// Takes what the records of `name` say for what it holds, where this process does not know better.
    fn recall(&mut self, name: &Arc<str>) {
        let mut recalled: BTreeMap<Key, Known> = BTreeMap::new();
        let mut pointless = Vec::new();
        for (id, spec, version) in self.syncs.held(name) {
            let Some(kind) = Kind::of_api(&spec.api_version, &spec.kind) else { continue };
            let namespace = id.namespace.as_deref().unwrap_or_default();
            let Some(key) = Key::new(kind, namespace, &spec.name) else { continue };
            let known = Known { uid: Arc::clone(&id.uid), resource_version: version.cloned() };
            let current = match self.wanted(name, &key) {
                Wanted::Present(version) => Some(Arc::clone(&version.uid)),
                _ => None,
            };
            // Two objects under one name, one after the other. A pod or a device that is gone has to be deleted before
            // its successor comes; of all others only the newest counts, as nodes tell them apart by name.
            let wants_former = matches!(key.kind(), Kind::Pod | Kind::Device);
            let is_wanted = |known: &Known| (Some(&known.uid) == current.as_ref()) != wants_former;
            let loser = match recalled.remove(&key) {
                None => {
                    recalled.insert(key, known);
                    continue;
                }
                Some(other) if is_wanted(&other) => {
                    recalled.insert(key, other);
                    known
                }
                Some(other) => {
                    recalled.insert(key, known);
                    other
                }
            };
            if !wants_former {
                pointless.push(SyncId { uid: loser.uid, namespace: id.namespace.clone() });
            }
        }
        for id in pointless {
            self.syncs.removed(name, &id);
        }
        let Some(node) = self.nodes.get_mut(name) else { return };
        // What has no record any more another CloudCore may have taken away; it is sent or deleted once more.
        for (key, known) in &mut node.known {
            if !recalled.contains_key(key) {
                known.resource_version = None;
            }
        }
        for (key, recalled) in recalled {
            match node.known.get_mut(&key) {
                None => {
                    node.known.insert(key, recalled);
                }
                // Another CloudCore has served the node meanwhile.
                Some(known) if known.uid == recalled.uid => {
                    let number = |known: &Known| {
                        known.resource_version.as_deref().and_then(super::version::number)
                    };
                    if number(known) < number(&recalled) {
                        known.resource_version = recalled.resource_version;
                    }
                }
                // Its record would be there if the node still held what this process sent.
                Some(known) => *known = recalled,
            }
        }
    }

    /// What a node that tells nothing should have, it may have: it gets that as `update`, as after every outage of
    /// KubeEdge's. Of devices and accesses it has to be told that they are new.
    fn assume(&mut self, name: &Arc<str>, keys: &BTreeSet<Key>) {
        for key in keys.iter().filter(|key| !key.kind().is_custom()) {
            let Wanted::Present(version) = self.wanted(name, key) else { continue };
            let uid = Arc::clone(&version.uid);
            let Some(node) = self.nodes.get_mut(name) else { return };
            node.known.entry(key.clone()).or_insert(Known { uid, resource_version: None });
        }
    }

    /// Takes what the cluster said about records.
    pub(super) fn hear(&mut self, word: Word, now: Instant) {
        let was_available = self.syncs.is_available();
        let seen = match &word {
            Word::Seen { name, namespace, .. } => Some((Arc::clone(name), namespace.clone())),
            _ => None,
        };
        let is_change = matches!(word, Word::Listed(..) | Word::Unavailable);
        let written = match &word {
            Word::Written { node, id, outcome } => Some((node.clone(), id.clone(), *outcome)),
            _ => None,
        };
        if let Word::Gone { name, namespace } = &word
            && let Some((node, uid)) = parse_object_sync_name(name)
            && self.session(node).is_none()
        {
            self.syncs.let_go(node, &SyncId { namespace: namespace.clone(), uid: uid.into() });
        }
        self.syncs.handle(word, now);
        if let Some((node, id, outcome)) = written {
            self.unpark(&node, &id, outcome == Outcome::Refused);
        }
        if let Some((name, namespace)) = seen
            && let Some((node, uid)) = parse_object_sync_name(&name)
        {
            let node = self.intern_node(node);
            if self.tells_itself(&node) {
                self.syncs.forget(&node);
            } else {
                let id = SyncId { namespace, uid: uid.into() };
                self.unpark(&node, &id, false);
                self.adopt(&node, &id);
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

    /// Takes up an object of which another CloudCore wrote down, later than this one was asked, that `name` may hold it.
    fn adopt(&mut self, name: &Arc<str>, id: &SyncId) {
        let Some(spec) = self.syncs.get(name, id) else { return };
        let Some(kind) = Kind::of_api(&spec.api_version, &spec.kind) else { return };
        let namespace = id.namespace.as_deref().unwrap_or_default();
        let Some(key) = Key::new(kind, namespace, &spec.name) else { return };
        // The word may be a late one, so no version is believed.
        let known = Known { uid: Arc::clone(&id.uid), resource_version: None };
        let Some(node) = self.nodes.get_mut(name) else { return };
        let is_under_way = |session: &Session| session.is_under_way(&key);
        if node.known.contains_key(&key) || node.session.as_deref().is_some_and(is_under_way) {
            return;
        }
        if node.live().is_none() {
            return;
        }
        let uid = Arc::clone(&known.uid);
        node.known.insert(key.clone(), known);
        let is_wanted = matches!(self.wanted(name, &key), Wanted::Present(of) if of.uid == uid);
        if key.kind() == Kind::Pod && !is_wanted {
            // The watch of records may be further than that of pods.
            self.relist(name);
        } else {
            self.mark(name, &key);
        }
    }

    fn tells_itself(&self, name: &str) -> bool {
        let session = self.nodes.get(name).and_then(|node| node.session.as_ref());
        session.is_some_and(|session| !session.is_stock())
    }

    /// Removes the records of nodes that are gone, and of those that tell themselves what they hold.
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
            self.syncs.forget(&name);
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
                    let id = super::flow::sync_id(key, &known.uid);
                    self.syncs.acked(name, id, || super::flow::sync_spec(key), version);
                }
            }
        }
    }

    /// What a digest tells about objects of the kinds that go down; the rest is not ours to judge.
    fn held_keys(&self, digest: &Digest) -> BTreeMap<Key, Known> {
        let held = digest.objects.iter().filter_map(|(path, held)| {
            let key = Key::of_path(&path.parse().ok()?)?;
            // The key as it is held already, so that all who keep it share it.
            let key = match self.placed.get_key_value(&key) {
                Some((held, _)) => held.clone(),
                None => self.shared.get_key_value(&key).map_or(key, |(held, _)| held.clone()),
            };
            let resource_version = Some(held.rv.as_str().into());
            Some((key, Known { uid: held.uid.as_str().into(), resource_version }))
        });
        held.collect()
    }
}
