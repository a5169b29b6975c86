//! What nodes say of their OS, read from their Nodes: the shell around `skerry_reconciler_core::os`.

use crate::live::Live;
use kube::ResourceExt;
use skerry_api::fleet::os::{OsOrder, OsProgress, PROGRESS_ANNOTATION, VERSION_ANNOTATION};
use skerry_reconciler_core::ObjectId;
use skerry_reconciler_core::os::NodeOs;

/// What a node says of its OS.
pub(crate) fn said(live: &Live, name: &str) -> NodeOs {
    let node = live.get(&ObjectId::new("v1", "Node", "", name)).ok().flatten();
    let annotation =
        |key: &str| node.as_ref().and_then(|node| node.annotations().get(key).cloned());
    NodeOs {
        name: name.to_owned(),
        // `2 (debug)` is version 2.
        version: annotation(VERSION_ANNOTATION)
            .map(|text| text.split(' ').next().unwrap_or_default().to_owned()),
        progress: progress(annotation(PROGRESS_ANNOTATION).as_deref()),
    }
}

/// How far a node is, from its annotation; a text of another form says nothing.
pub(crate) fn progress(text: Option<&str>) -> OsProgress {
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// An order as the annotation has it.
pub(crate) fn text(order: &OsOrder) -> String {
    serde_json::to_string(order).expect("texts and numbers")
}
