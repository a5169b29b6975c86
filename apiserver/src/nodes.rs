//! The way to a node: what CloudCore's tunnel gives the API for `pods/log`.

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

/// Opens kubelet paths on nodes, through whatever connection there is.
pub trait NodeStreams: Send + Sync {
    /// Sends `GET path_and_query` to the node's kubelet server, such as
    /// `/containerLogs/default/web/nginx?follow=true`.
    fn open(
        &self,
        node: &str,
        path_and_query: &str,
    ) -> BoxFuture<'static, Result<NodeStream, NodeStreamError>>;
}

/// A node's answer, as it arrives.
pub struct NodeStream {
    /// HTTP status that the node gave.
    pub status: u16,
    /// The body; it ends when the node ends it or the connection is lost.
    pub body: BoxStream<'static, std::io::Result<Bytes>>,
}

/// Why a node did not answer.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum NodeStreamError {
    /// No connection to the node now.
    #[error("node `{node}` is not connected")]
    NotConnected { node: String },
    /// The node or the way to it failed.
    #[error("node `{node}` did not answer: {detail}")]
    Failed { node: String, detail: String },
}
