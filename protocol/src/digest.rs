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

/// Objects held by the edge, by wire resource path (`namespace/type/name`). Types: pod, configmap, secret, node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest {
    /// Path to identity.
    pub objects: BTreeMap<String, Held>,
}

/// Identity of one object that the edge holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.resourceVersion`.
    pub rv: String,
}
