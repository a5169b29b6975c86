//! A list that a watch reads when it begins, and again when it broke.
//!
//! A list is begun after [`super::Input::Listing`] and is consistent, so it is at least as new as all that had been seen
//! by then (`floor`), be it told by the watch or by a read. So:
//!
//! - What it shows in an older version than one that was known before, the cluster has set back: it was restored from a
//!   backup. The older version counts, and nodes that hold the newer one get it. Of what any node was sent before nobody
//!   knows any more whether its version is of the time that was lost ([`Known::is_told`]).
//! - What it shows in an older version than one that was read while the list was under way may be overtaken: it is read
//!   once more.
//! - When it is complete, nothing that was read before it has to be held against the watch any more: the watch goes on
//!   from there.
//!
//! What a cluster forgot when it was restored nobody can tell afterwards where versions are given out twice; Kubernetes'
//! own instructions raise the revision when a backup is restored.

#[cfg(doc)]
use super::Known;
use super::{Downstream, Key, Kind, NodeObject, SharedState};
use std::collections::BTreeSet;
use std::sync::Arc;

/// A list that is being read.
#[derive(Debug)]
pub(super) struct Listing {
    /// The highest version of the kind that had been seen when the list was begun.
    pub(super) floor: u64,
    /// The highest version in the list.
    newest: u64,
    /// Objects that the cluster has set back.
    set_back: BTreeSet<Key>,
    /// Objects that were read in a newer version meanwhile.
    overtaken: BTreeSet<Key>,
}

impl Downstream {
    pub(super) fn begin_list(&mut self, kind: Kind) {
        let floor = self.newest.get(&kind).copied().unwrap_or(0);
        let (set_back, overtaken) = (BTreeSet::new(), BTreeSet::new());
        self.listing.insert(kind, Listing { floor, newest: 0, set_back, overtaken });
    }

    /// A watch or a read has shown this version.
    pub(super) fn show(&mut self, kind: Kind, version: u64) {
        let newest = self.newest.entry(kind).or_default();
        *newest = (*newest).max(version);
    }

    /// Takes what a list shows of `key`, bound to `node` if it is a pod. Returns whether it counts.
    pub(super) fn take_listed(&mut self, key: &Key, version: u64, node: &str) -> bool {
        let held = self.held_version(key);
        let read_at = match key.kind() {
            Kind::Pod => self.nodes.get(node).map_or(0, |node| node.read_at),
            _ => 0,
        };
        let absent_at = self.absent.get(&key.kind()).and_then(|absent| absent.get(key)).copied();
        let Some(listing) = self.listing.get_mut(&key.kind()) else { return true };
        listing.newest = listing.newest.max(version);
        let is_overtaken = |at: u64| at > listing.floor && at > version;
        if held.is_some_and(is_overtaken)
            || absent_at.is_some_and(is_overtaken)
            || (held.is_none() && is_overtaken(read_at))
        {
            listing.overtaken.insert(key.clone());
            return false;
        }
        if held.is_some_and(|held| held > version) {
            listing.set_back.insert(key.clone());
            self.void(key);
        }
        true
    }

    /// The list is complete, and what it lacks has been taken away.
    pub(super) fn end_list(&mut self, kind: Kind, listing: Listing) {
        let Listing { floor, newest, set_back, overtaken } = listing;
        self.progress.insert(kind, newest);
        if !set_back.is_empty() {
            self.newest.insert(kind, newest);
            let known = self.nodes.values_mut().flat_map(|node| &mut node.known);
            for (_, known) in known.filter(|(key, _)| key.kind() == kind) {
                known.is_told = true;
            }
        }
        if let Some(absent) = self.absent.get_mut(&kind) {
            absent.retain(|_, at| *at > floor);
        }
        if kind == Kind::Pod {
            for node in self.nodes.values_mut().filter(|node| node.read_at <= floor) {
                node.read_at = 0;
            }
        }
        for key in overtaken {
            self.read_once_more(&key);
        }
        let has_newer = |node: &super::Node| {
            let session = node.session.as_deref().is_some_and(|session| !session.is_stock());
            session && set_back.iter().any(|key| node.known.contains_key(key))
        };
        let cut: Vec<Arc<str>> = self
            .nodes
            .iter_mut()
            .filter(|(_, node)| has_newer(node))
            .filter_map(|(name, node)| node.live().map(|_| Arc::clone(name)))
            .collect();
        for name in cut {
            self.cut(&name, "the cluster went back to an earlier state");
        }
    }

    fn read_once_more(&mut self, key: &Key) {
        match key.kind() {
            Kind::Pod => {
                let name = self.placed.get(key).map(|placed| Arc::clone(&placed.node));
                let names: Vec<Arc<str>> = match name {
                    Some(name) => vec![name],
                    // Read as absent; the list does not say any more where it was.
                    None => {
                        let is_read = |node: &super::Node| node.read_at > 0;
                        let nodes = self.nodes.iter().filter(|(_, node)| is_read(node));
                        nodes.map(|(name, _)| Arc::clone(name)).collect()
                    }
                };
                names.iter().for_each(|name| self.relist(name));
            }
            Kind::Device | Kind::Node => self.fetch(key),
            _ => {
                if let Some(shared) = self.shared.get_mut(key) {
                    shared.state.doubt();
                    self.fetch(key);
                }
            }
        }
    }

    fn held_version(&self, key: &Key) -> Option<u64> {
        let version = match key.kind() {
            Kind::Pod | Kind::Device => &self.placed.get(key)?.version,
            Kind::Node => match &self.nodes.get(key.name())?.object {
                NodeObject::Present(version) => version,
                _ => return None,
            },
            _ => match &self.shared.get(key)?.state {
                SharedState::Present(version) | SharedState::Unknown(Some(version)) => version,
                _ => return None,
            },
        };
        super::number(&version.resource_version)
    }

    /// Whatever comes next is newer than what is held of `key`.
    fn void(&mut self, key: &Key) {
        match key.kind() {
            Kind::Pod | Kind::Device => {
                if let Some(placed) = self.placed.get_mut(key) {
                    placed.version = placed.version.voided();
                }
            }
            Kind::Node => {
                let node = self.nodes.get_mut(key.name());
                if let Some(NodeObject::Present(version)) = node.map(|node| &mut node.object) {
                    *version = version.voided();
                }
            }
            _ => {
                let state = self.shared.get_mut(key).map(|shared| &mut shared.state);
                if let Some(SharedState::Present(version) | SharedState::Unknown(Some(version))) =
                    state
                {
                    *version = version.voided();
                }
            }
        }
    }
}
