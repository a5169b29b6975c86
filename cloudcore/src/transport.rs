//! One connection of a node, whatever carries it: messages in, messages out, a farewell.
//!
//! A transport has no task of its own and is polled by its session. It holds what is not written yet, which the session
//! keeps below [`OUT_HIGH`], and at most one message that has not arrived whole.

use crate::quic::Quic;
use crate::websocket::WebSocket;
use bytes::Bytes;
use skerry_protocol::message::UPSTREAM_LEN_MAX;
use skerry_protocol::{Class, Message};
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// With this many bytes not written, no more is taken from the queue: what is more urgent can still overtake there.
pub(crate) const OUT_HIGH: usize = 256 * 1024;
/// How long, and how much, is still read from a peer that is told to go, so that it sees why.
pub(crate) const FAREWELL_TIMEOUT: Duration = Duration::from_secs(2);
pub(crate) const FAREWELL_LEN_MAX: usize = 64 * 1024 * 1024;

/// What carries a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    WebSocket,
    Quic,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::WebSocket => "websocket",
            Self::Quic => "quic",
        }
    }
}

/// What came.
#[derive(Debug)]
pub(crate) enum Received {
    /// The JSON of one message.
    Message(Bytes),
    /// Several messages in one compressed frame.
    Batch(Bytes),
    /// A sign of life without content.
    Beat,
    /// The node ended the connection in order.
    Closed,
}

/// Why a transport is of no more use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransportError {
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("a message is over the bound of {UPSTREAM_LEN_MAX} bytes")]
    OverBound,
    #[error("the node breaks the framing: {0}")]
    Malformed(String),
}

/// What a node is told at the end: a close code of RFC 6455 (on QUIC the application's error code) and a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Farewell {
    pub(crate) code: u16,
    pub(crate) reason: String,
    /// The peer may be in the middle of a long write, and sees the reason only after that.
    pub(crate) talks: bool,
}

/// A WebSocket or a QUIC connection.
pub(crate) enum Transport {
    WebSocket(Box<WebSocket>),
    Quic(Box<Quic>),
}

impl Transport {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::WebSocket(_) => Kind::WebSocket,
            Self::Quic(_) => Kind::Quic,
        }
    }

    /// The next thing that came. After an error, or [`Received::Closed`], there is nothing more to ask for.
    pub(crate) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Received, TransportError>> {
        match self {
            Self::WebSocket(socket) => socket.poll_receive(cx),
            Self::Quic(quic) => quic.poll_receive(cx),
        }
    }

    /// Takes messages of one class to be written, as a batch when there are several.
    pub(crate) fn send(
        &mut self,
        class: Class,
        messages: &[Arc<Message>],
    ) -> Result<(), TransportError> {
        match self {
            Self::WebSocket(socket) => socket.send(messages),
            Self::Quic(quic) => quic.send(class, messages)?,
        }
        Ok(())
    }

    /// Writes; ready when nothing is left to write.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TransportError>> {
        match self {
            Self::WebSocket(socket) => socket.poll_flush(cx),
            Self::Quic(quic) => quic.poll_flush(cx),
        }
    }

    /// Bytes that are not written yet.
    pub(crate) fn unwritten(&self) -> usize {
        match self {
            Self::WebSocket(socket) => socket.unwritten(),
            Self::Quic(quic) => quic.unwritten(),
        }
    }

    /// Bytes that have been written and read, in this order.
    pub(crate) fn traffic(&self) -> (u64, u64) {
        match self {
            Self::WebSocket(socket) => socket.traffic(),
            Self::Quic(quic) => quic.traffic(),
        }
    }

    /// When the last byte came, as far as is known at `now`.
    pub(crate) fn heard(&mut self, now: Instant) -> Instant {
        match self {
            Self::WebSocket(socket) => socket.heard(),
            Self::Quic(quic) => quic.heard(now),
        }
    }

    /// Asks the node for a sign of life where that makes lost messages go again sooner; a TCP connection repeats them by
    /// itself.
    pub(crate) fn probe(&self) {
        match self {
            Self::WebSocket(_) => {}
            Self::Quic(quic) => quic.probe(),
        }
    }

    /// The round trip that the transport itself has measured, and the peer's present address, where they can change.
    pub(crate) fn path(&self) -> Option<(Duration, SocketAddr)> {
        match self {
            Self::WebSocket(_) => None,
            Self::Quic(quic) => Some(quic.path()),
        }
    }

    /// Ends the connection; the node is told why, where there is still a way to tell.
    pub(crate) async fn close(self, farewell: Option<Farewell>) {
        match self {
            Self::WebSocket(socket) => socket.close(farewell).await,
            Self::Quic(quic) => quic.close(farewell),
        }
    }
}
