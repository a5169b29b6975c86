//! What happens when a node connects: finding out what it holds, and the answer when it has everything.

use super::flow::Session;
use super::version::Version;
use super::{DIGEST_WAIT, Downstream, Key, Kind, Known, Output, SessionId, SharedState, Wanted};
use skerry_protocol::Message;
use skerry_protocol::capability::Capabilities;
use skerry_protocol::digest::{Digest, Held};
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
        if was_foreign || !capabilities.digest {
            self.relist(&name);
        }
        if was_foreign {
            // Neither its pods nor its Node were kept.
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
        let held = self.held_keys(&name, &digest);
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
                self.relist(&name);
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
        let is_told = |kind| {
            let is_known = self.listed.contains(&kind) || self.unavailable.contains(&kind);
            is_known && !self.listing.contains_key(&kind)
        };
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
        let (held, disputed) = match phase {
            Some(Phase::AwaitingLists { digest: Some((digest, _)) }) => {
                let digest = digest.clone();
                (self.held_keys(name, &digest), self.told_keys(digest.disputed.iter()))
            }
            _ => (known, BTreeMap::new()),
        };
        let behind: BTreeSet<Key> = held
            .iter()
            .chain(&disputed)
            .filter(|(key, known)| self.is_behind(name, key, known.resource_version.as_deref()))
            .map(|(key, _)| key.clone())
            .collect();
        if is_stock && let Some(node) = self.nodes.get_mut(name) {
            node.known = held;
        }
        for key in &behind {
            self.read_again(name, key);
        }
        behind.is_empty()
    }

    /// Whether `name`, which holds `key` in version `held` or may hold some version, may be ahead of the watch: another
    /// CloudCore, which it has left, may have been further.
    pub(super) fn is_behind(&self, name: &str, key: &Key, held: Option<&str>) -> bool {
        let held = held.and_then(super::number);
        let progress = self.progress.get(&key.kind()).copied().unwrap_or(0);
        // Of what was never acknowledged nobody knows how new it is.
        let is_ahead = held.is_none_or(|held| held > progress);
        let is_own = key.kind() != Kind::Node || key.name() == name;
        let is_older = |of: &Version| held > super::number(&of.resource_version);
        match key.kind() {
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
        }
    }

    /// Reads what [`Self::is_behind`] found: all pods of the node, or this object. Nothing about it goes to the node
    /// before the answer, which marks it.
    pub(super) fn read_again(&mut self, name: &Arc<str>, key: &Key) {
        if key.kind() == Kind::Pod {
            return self.relist(name);
        }
        let session = self.nodes.get_mut(name).and_then(|node| node.session.as_deref_mut());
        let Some(session) = session else { return };
        session.doubts.insert(key.clone());
        self.doubting.insert(Arc::clone(name));
        if let Some(shared) = self.shared.get_mut(key) {
            shared.state.doubt();
        }
        self.fetch(key);
    }

    /// `key` has been read.
    pub(super) fn end_doubt(&mut self, key: &Key) {
        let mut ended = Vec::new();
        for name in &self.doubting {
            let session = self.nodes.get_mut(name).and_then(|node| node.session.as_deref_mut());
            let Some(session) = session else { continue };
            if session.doubts.remove(key) {
                ended.push((Arc::clone(name), session.doubts.is_empty()));
            }
        }
        for (name, was_last) in &ended {
            if *was_last {
                self.doubting.remove(name);
            }
            self.mark(name, key);
        }
        if !ended.is_empty() {
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
                let held = self.held_keys(name, &digest);
                let disputed = self.told_keys(digest.disputed.iter());
                let node = self.nodes.get_mut(name).expect("was found just now");
                node.known = held;
                for (key, of) in disputed {
                    let held = node.known.entry(key).or_insert_with(|| Known::some(of.uid.clone()));
                    if held.uid == of.uid {
                        held.resource_version = None;
                    }
                }
                if let Some(session) = node.session.as_deref_mut() {
                    session.tell_watched(digest.watched);
                }
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

    /// What a node that tells nothing should have, it may have: it gets that as `update`, as after every outage of
    /// KubeEdge's. Of devices and accesses it has to be told that they are new.
    fn assume(&mut self, name: &Arc<str>, keys: &BTreeSet<Key>) {
        for key in keys.iter().filter(|key| !key.kind().is_custom()) {
            let Wanted::Present(version) = self.wanted(name, key) else { continue };
            let uid = Arc::clone(&version.uid);
            let Some(node) = self.nodes.get_mut(name) else { return };
            node.known.entry(key.clone()).or_insert(Known::some(uid));
        }
    }

    /// What a digest tells about objects of the kinds that go down; the rest is not ours to judge. What `name` holds for
    /// an application that watches it counts where it should have it anyway, and is no reason to take it away.
    fn held_keys(&self, name: &str, digest: &Digest) -> BTreeMap<Key, Known> {
        let is_needed = |path: &&String| {
            let key = path.parse().ok().and_then(|path| Key::of_path(&path));
            key.is_some_and(|key| !matches!(self.wanted(name, &key), Wanted::Absent))
        };
        let watched = digest.watched.iter().filter(|(path, _)| is_needed(path));
        self.told_keys(watched.chain(&digest.objects))
    }

    fn told_keys<'a>(
        &self,
        told: impl Iterator<Item = (&'a String, &'a Held)>,
    ) -> BTreeMap<Key, Known> {
        let held = told.filter_map(|(path, held)| {
            let key = Key::of_path(&path.parse().ok()?)?;
            // The key as it is held already, so that all who keep it share it.
            let key = match self.placed.get_key_value(&key) {
                Some((held, _)) => held.clone(),
                None => self.shared.get_key_value(&key).map_or(key, |(held, _)| held.clone()),
            };
            let resource_version = Some(held.rv.as_str().into());
            let uid = held.uid.as_str().into();
            Some((key, Known { uid, resource_version, is_told: true }))
        });
        held.collect()
    }
}
