//! Streams from nodes: the tunnel listener, and the log streams that run over it.
//!
//! A node has one WebSocket open; every stream is a numbered connection in it. A KubeEdge edge keeps it open for ever;
//! ours opens it when the link says that somebody wants a stream, and closes it some time after the last one. A KubeEdge
//! edge puts arbitrary bytes into Text messages, and gets Text messages as from its own cloud; ours sends Binary messages, and gets what it sends.
//! Both kinds are read from both.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/cloudstream.

use crate::admission::{Denied, Door};
use crate::hub::Hub;
use crate::listen::Place;
use crate::monitor::Links;
use crate::transport::{Farewell, TransportError};
use crate::websocket::{self, Arrived, OpenError, Refused, WebSocket};
use bytes::Bytes;
use futures::Stream;
use http::StatusCode;
use serde_json::Value;
use skerry_cloudcore_core::identity::Standing;
use skerry_protocol::tunnel::{
    Connect, DATA_LEN_MAX, DEMAND, Frame, FrameKind, HISTORY_PATH, NODE_HEADER, PATH,
};
use skerry_protocol::websocket::Opcode;
use skerry_protocol::{Message, Operation};
use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

/// A node pings every 5 s; a tunnel without a word for this long is dead.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Frames of one stream that its reader has not taken yet.
const STREAM_FRAMES_MAX: usize = 256;
/// A reader that takes nothing for this long loses its stream, as it holds up all others of the node.
const READER_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams of one node at a time.
const STREAMS_MAX: usize = 256;
/// How long a node of ours may take to open its tunnel when it is asked to: a few round trips.
const DEMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests to one tunnel that it has not taken yet.
const COMMANDS_MAX: usize = 64;
const WRITE_TIMEOUT: Duration = Duration::from_secs(15);
/// The longest message: a frame with its two numbers.
const MESSAGE_LEN_MAX: usize = DATA_LEN_MAX + 20;

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The node has no tunnel open; it may be offline.
    #[error("node `{node}` is not connected")]
    NotConnected {
        /// Its name.
        node: String,
    },
    /// Only container logs and what devices were, for now.
    #[error(
        "`{path}` is not available over the tunnel yet, only /containerLogs and /deviceHistory are"
    )]
    Unsupported {
        /// What was asked for.
        path: String,
    },
    /// It is another agent, or an older one.
    #[error("node `{node}` keeps no history of its devices that can be asked for")]
    NoHistory {
        /// Its name.
        node: String,
    },
    /// The node has as many streams open as it may.
    #[error("node `{node}` has {STREAMS_MAX} streams open already")]
    TooMany {
        /// Its name.
        node: String,
    },
}

/// Opens streams from connected nodes. Cheap to clone.
#[derive(Clone, Default)]
pub struct Streams {
    tunnels: Arc<Mutex<Tunnels>>,
}

#[derive(Default)]
struct Tunnels {
    next: u64,
    by_node: HashMap<String, (u64, mpsc::Sender<Command>)>,
    /// Changes when a tunnel is opened.
    opened: watch::Sender<u64>,
    /// The way to nodes without a tunnel.
    asker: Option<Asker>,
}

/// Asks nodes, over their links, to open a tunnel.
#[derive(Clone)]
struct Asker {
    links: Links,
    hub: Hub,
}

enum Command {
    Open { path_and_query: String, answer: oneshot::Sender<Option<NodeStream>> },
    Remove(u64),
}

/// Bytes of one stream, in order, until the node ends it. Dropping it ends the stream on the node.
pub struct NodeStream {
    connection: u64,
    commands: mpsc::Sender<Command>,
    data: mpsc::Receiver<Bytes>,
    /// Why the stream ended before the node said so.
    cut: Arc<OnceLock<&'static str>>,
    told: bool,
}

impl Stream for NodeStream {
    type Item = io::Result<Bytes>;

    /// A stream that was cut ends with an error, so that it is not taken for a whole one.
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(data) = std::task::ready!(self.data.poll_recv(cx)) {
            return Poll::Ready(Some(Ok(data)));
        }
        let reason = self.cut.get().copied().filter(|_| !self.told);
        self.told = true;
        let cut = |reason| Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason));
        Poll::Ready(reason.map(cut))
    }
}

impl Drop for NodeStream {
    fn drop(&mut self) {
        // When the tunnel is too busy to take this, it notices at the stream's next frame.
        let _ = self.commands.try_send(Command::Remove(self.connection));
    }
}

impl Streams {
    /// Opens a stream for a path of the node's kubelet API, such as `/containerLogs/ns/pod/container?follow=true`.
    ///
    /// What the node answers comes as bytes of the stream, a refusal included: the tunnel carries no status.
    ///
    /// # Errors
    ///
    /// [`StreamError`]; without a word to the node, unless it is one of ours that did not open its tunnel in time.
    pub async fn open(&self, node: &str, path_and_query: &str) -> Result<NodeStream, StreamError> {
        let not_connected = || StreamError::NotConnected { node: node.into() };
        if path_and_query.starts_with(HISTORY_PATH) {
            // A KubeEdge edge would look for a pod of that name.
            match self.asker().and_then(|asker| asker.links.capabilities(node)) {
                None => return Err(not_connected()),
                Some(both) if !both.history => {
                    return Err(StreamError::NoHistory { node: node.into() });
                }
                Some(_) => {}
            }
        } else if !path_and_query.starts_with("/containerLogs/") {
            return Err(StreamError::Unsupported { path: path_and_query.into() });
        }
        let commands = match self.commands(node) {
            Some(commands) => commands,
            None => self.demand(node).await.ok_or_else(not_connected)?,
        };
        let (answer, opened) = oneshot::channel();
        let open = Command::Open { path_and_query: path_and_query.into(), answer };
        commands.send(open).await.map_err(|_| not_connected())?;
        match opened.await {
            Ok(Some(stream)) => Ok(stream),
            Ok(None) => Err(StreamError::TooMany { node: node.into() }),
            Err(_) => Err(not_connected()),
        }
    }

    fn commands(&self, node: &str) -> Option<mpsc::Sender<Command>> {
        let tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
        tunnels.by_node.get(node).map(|(_, commands)| commands.clone())
    }

    /// Gives the way to nodes that open their tunnel when they are asked to.
    pub(crate) fn set_links(&self, links: Links, hub: Hub) {
        let mut tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
        tunnels.asker = Some(Asker { links, hub });
    }

    fn asker(&self) -> Option<Asker> {
        let tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
        tunnels.asker.clone()
    }

    /// Asks a node of ours for its tunnel, and waits for it.
    async fn demand(&self, node: &str) -> Option<mpsc::Sender<Command>> {
        let (asker, mut opened) = {
            let tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
            (tunnels.asker.clone()?, tunnels.opened.subscribe())
        };
        if !asker.links.is_own(node) {
            return None;
        }
        let now_ms = jiff::Timestamp::now().as_millisecond();
        let demand =
            Message::new(now_ms, "cloudstream", "stream", Operation::Get, DEMAND, &Value::Null);
        asker.hub.send(node, demand).await;
        let open = async {
            loop {
                if let Some(commands) = self.commands(node) {
                    return Some(commands);
                }
                opened.changed().await.ok()?;
            }
        };
        tokio::time::timeout(DEMAND_TIMEOUT, open).await.ok().flatten()
    }

    /// The nodes with an open tunnel.
    pub fn nodes(&self) -> Vec<String> {
        let tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
        tunnels.by_node.keys().cloned().collect()
    }

    /// Serves one connection of the tunnel listener.
    pub(crate) async fn serve(
        self,
        door: Arc<Door>,
        stream: TlsStream<TcpStream>,
        peer: SocketAddr,
        mut place: Place,
        stop: CancellationToken,
    ) {
        let certificates = stream.get_ref().1.peer_certificates().map(<[_]>::to_vec);
        let check = |request: &http::Request<hyper::body::Incoming>| {
            if request.uri().path() != PATH {
                let text = format!("there is only {PATH} here");
                return Err(Refused::new(StatusCode::NOT_FOUND, text));
            }
            let header = request.headers().get(NODE_HEADER).and_then(|value| value.to_str().ok());
            if header.is_none() {
                let text = format!("header `{NODE_HEADER}` is missing");
                return Err(Refused::new(StatusCode::BAD_REQUEST, text));
            }
            match door.identify(certificates.as_deref(), header) {
                Ok((identity, Standing::Full)) => Ok((identity, Vec::new())),
                Ok((identity, Standing::RenewOnly)) => {
                    Err(Denied::CannotRenew { node: identity.node }.into_answer())
                }
                Err(denied) => Err(denied.into_answer()),
            }
        };
        let opened = Box::pin(websocket::open(stream, MESSAGE_LEN_MAX, check)).await;
        place.opened();
        let (socket, identity) = match opened {
            Ok(opened) => opened,
            Err(error @ OpenError::Refused { .. }) => {
                tracing::warn!(listener = "tunnel", %peer, reason = %error, "tunnel refused");
                return;
            }
            Err(error) => {
                tracing::debug!(listener = "tunnel", %peer, %error, "opening handshake failed");
                return;
            }
        };
        let node = identity.node.clone();
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        let id = {
            let mut tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
            tunnels.next += 1;
            let id = tunnels.next;
            // A later tunnel takes the place of an earlier one, which sees that nobody can ask it any more.
            tunnels.by_node.insert(node.clone(), (id, commands.clone()));
            tunnels.opened.send_replace(id);
            id
        };
        tracing::info!(node, tunnel = id, %peer, "tunnel open");
        let mut tunnel = Tunnel {
            socket: Box::new(socket),
            opcode: Opcode::Text,
            commands: commands.downgrade(),
            streams: HashMap::new(),
            next: 1,
        };
        drop(commands);
        let mut cuts = door.revocations();
        let run = tunnel.run(received, &stop);
        let cut = async {
            // Asked again whenever a decision changed; the tunnel ends with the node's certificate.
            loop {
                let wait = identity.not_after_s.saturating_sub(jiff::Timestamp::now().as_second());
                let wait = Duration::from_secs(u64::try_from(wait).unwrap_or(0).min(86_400));
                tokio::select! {
                    changed = cuts.changed() => if changed.is_err() {
                        std::future::pending::<()>().await;
                    },
                    () = tokio::time::sleep(wait) => {}
                }
                if !matches!(door.standing(&identity), Ok(Standing::Full)) {
                    return "the certificate of the node does not count any more";
                }
            }
        };
        let reason = tokio::select! {
            reason = run => reason,
            reason = cut => reason,
        };
        for (_, reader) in tunnel.streams.drain() {
            let _ = reader.cut.set(reason);
        }
        tunnel
            .socket
            .close(Some(Farewell { code: 1000, reason: reason.into(), talks: false }))
            .await;
        {
            let mut tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
            if tunnels.by_node.get(&node).is_some_and(|(current, _)| *current == id) {
                tunnels.by_node.remove(&node);
            }
        }
        tracing::info!(node, tunnel = id, reason, "tunnel closed");
        drop(place);
    }
}

/// The owner of one tunnel.
struct Tunnel {
    socket: Box<WebSocket>,
    /// What the node sends its frames as, and gets them as; a KubeEdge edge takes both, until it has sent anything.
    opcode: Opcode,
    /// Weak, so that the tunnel ends when nobody can open a stream on it and none is open.
    commands: mpsc::WeakSender<Command>,
    streams: HashMap<u64, Reader>,
    next: u64,
}

/// The reader of one stream.
struct Reader {
    data: mpsc::Sender<Bytes>,
    cut: Arc<OnceLock<&'static str>>,
}

impl Tunnel {
    async fn run(
        &mut self,
        mut commands: mpsc::Receiver<Command>,
        stop: &CancellationToken,
    ) -> &'static str {
        loop {
            let idle = tokio::time::sleep(IDLE_TIMEOUT);
            let step = tokio::select! {
                () = stop.cancelled() => Err("cloudcore is stopping"),
                command = commands.recv() => match command {
                    Some(Command::Open { path_and_query, answer }) => self.open(&path_and_query, answer).await,
                    Some(Command::Remove(connection)) => self.remove(connection).await,
                    None => Err("the node opened a new tunnel"),
                },
                arrived = poll_fn(|cx| self.socket.poll_message(cx)) => match arrived {
                    Ok(Arrived::Text(bytes)) => {
                        self.opcode = Opcode::Text;
                        self.receive(&bytes).await
                    }
                    Ok(Arrived::Binary(bytes)) => {
                        self.opcode = Opcode::Binary;
                        self.receive(&bytes).await
                    }
                    // A ping has its pong ready.
                    Ok(Arrived::Beat) => self.flush().await,
                    Ok(Arrived::Closed) => Err("the node closed it"),
                    Err(TransportError::OverBound) => Err("a frame is over the bound"),
                    Err(error) => {
                        tracing::info!(%error, "a tunnel broke");
                        Err("the connection broke")
                    }
                },
                () = idle => Err("the node is silent"),
            };
            if let Err(reason) = step {
                return reason;
            }
        }
    }

    async fn open(
        &mut self,
        path_and_query: &str,
        answer: oneshot::Sender<Option<NodeStream>>,
    ) -> Result<(), &'static str> {
        let Some(commands) = self.commands.upgrade() else { return Ok(()) };
        if self.streams.len() >= STREAMS_MAX {
            let _ = answer.send(None);
            return Ok(());
        }
        let connection = self.next;
        self.next += 1;
        let (sender, data) = mpsc::channel(STREAM_FRAMES_MAX);
        let cut = Arc::new(OnceLock::new());
        self.streams.insert(connection, Reader { data: sender, cut: Arc::clone(&cut) });
        let connect = Connect::get(connection, path_and_query);
        let json = serde_json::to_vec(&connect).expect("string keys");
        self.write(Frame::new(connection, FrameKind::LogsConnect, json)).await?;
        // When nobody waits any more, dropping the stream removes it again.
        let _ = answer.send(Some(NodeStream { connection, commands, data, cut, told: false }));
        Ok(())
    }

    /// Ends a stream that has no reader any more; the node is told once.
    async fn remove(&mut self, connection: u64) -> Result<(), &'static str> {
        if self.streams.remove(&connection).is_none() {
            return Ok(());
        }
        self.write(Frame::new(connection, FrameKind::RemoveConnect, [])).await
    }

    async fn receive(&mut self, bytes: &[u8]) -> Result<(), &'static str> {
        let frame = match Frame::decode(bytes) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::warn!(%error, "a frame of a tunnel was not readable");
                return Ok(());
            }
        };
        match frame.kind {
            FrameKind::Data => {
                let Some(reader) = self.streams.get(&frame.connection) else { return Ok(()) };
                let write = reader.data.send(Bytes::from(frame.data));
                match tokio::time::timeout(READER_TIMEOUT, write).await {
                    Ok(Ok(())) => return Ok(()),
                    Ok(Err(_)) => {}
                    Err(_) => {
                        let _ = reader.cut.set("the reader was too slow");
                    }
                }
                self.remove(frame.connection).await
            }
            FrameKind::RemoveConnect => {
                self.streams.remove(&frame.connection);
                Ok(())
            }
            FrameKind::CloseConnect => Err("the node ended it"),
            _ => Ok(()),
        }
    }

    async fn write(&mut self, frame: Frame) -> Result<(), &'static str> {
        self.socket.write(self.opcode, &frame.encode());
        self.flush().await
    }

    async fn flush(&mut self) -> Result<(), &'static str> {
        let written = poll_fn(|cx| self.socket.poll_flush(cx));
        match tokio::time::timeout(WRITE_TIMEOUT, written).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err("the connection broke"),
            Err(_) => Err("the node does not read"),
        }
    }
}
