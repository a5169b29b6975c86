//! Resume by digest: what the edge holds, told to the hub right after the link is up.
//!
//! Ours only, used when both ends announced [`crate::capability::DIGEST`]. The edge sends one `query` message for
//! [`RESOURCE`] with a [`Digest`] as content (source `metamanager`, group `meta`); the hub answers with the
//! differences as ordinary pushes (`update` and `delete`, acknowledged like any other) and then with a `response`,
//! parent set, content `"OK"`, which the hub sends when the edge has acknowledged all of them. Only then may the edge
//! conclude that what it does not hold is not wanted.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `route.resource` of the exchange.
pub const RESOURCE: &str = "skerry/digest";

/// Objects held by the edge, by wire resource path (`namespace/type/name`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest {
    /// Path to identity: what the hub gave because the node needs it.
    pub objects: BTreeMap<String, Held>,
    /// The same for what it gave because an application on the node watches it. A hub that does not read this gives all
    /// of it again.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub watched: BTreeMap<String, Held>,
    /// What the hub, or the one before it, sent in an older version than the edge holds or has deleted: the uid, and the
    /// lowest version that the edge takes by itself. The hub sends each of these again, or deletes it, as the API shows
    /// it in a read that is sure to be newer than that version, if it has such versions; the edge believes that.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disputed: BTreeMap<String, Held>,
}

/// Identity of one object that the edge holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.resourceVersion`.
    pub rv: String,
}
