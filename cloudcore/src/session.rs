//! One node's connection: the opening handshake, and the task that owns it until it ends.
//!
//! A connection that is refused gets an HTTP status and a text; KubeEdge leaves such a connection open and silent.
//! Beside the owner run a reader, which turns WebSocket messages into messages, and a worker, which answers requests
//! one after the other, so that two patches of one node cannot overtake each other.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/cloudhub/handler and cloud/pkg/cloudhub/session.

use crate::hub::{Hub, sleep_until};
use crate::listen::HANDSHAKE_TIMEOUT;
use crate::tls;
use crate::upstream::Upstream;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, StatusCode};
use skerry_cloudcore_core::downstream::{Input, SessionId};
use skerry_protocol::capability::{self, Capabilities};
use skerry_protocol::delivery::{Delivery, Event, WAITING_MAX};
use skerry_protocol::message::MESSAGE_LEN_MAX;
use skerry_protocol::{Message, MessageError, Operation, digest};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::CapacityError;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as WsError, Message as WsMessage};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A connection without a keepalive for this long is dead; other traffic does not count. KubeEdge's
/// `cloudHub.keepaliveInterval`; nodes send one every 15 s.
pub(crate) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(30);
/// One message has to be on its way by then.
const WRITE_TIMEOUT: Duration = Duration::from_secs(15);
/// Messages read and not yet looked at; the reader waits when it is full.
const INCOMING_MAX: usize = 64;
/// Requests of one node not yet answered; more are refused with an error message.
const REQUESTS_MAX: usize = 256;
/// How long, and how much, is still read from a peer that is told to go, so that it sees why.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(2);
const FAREWELL_LEN_MAX: u64 = 64 * 1024 * 1024;

/// What the hub tells a session.
pub(crate) enum Command {
    /// Deliver this.
    Send(Box<Message>),
    /// End, for this reason.
    Close(&'static str),
}

type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// The settings of every WebSocket: bounded messages, small buffers, as a hub has many of them.
pub(crate) fn websocket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(8 * 1024)
        .write_buffer_size(0)
        .max_write_buffer_size(2 * MESSAGE_LEN_MAX)
        .max_message_size(Some(MESSAGE_LEN_MAX))
        .max_frame_size(Some(MESSAGE_LEN_MAX))
}

/// Makes sessions of accepted connections.
#[derive(Clone)]
pub(crate) struct Acceptor {
    hub: Hub,
    upstream: Arc<Upstream>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Acceptor {
    pub(crate) fn new(
        hub: Hub,
        upstream: Arc<Upstream>,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        Self { hub, upstream, tasks, stop }
    }

    pub(crate) async fn serve(self, stream: TlsStream<TcpStream>, peer: SocketAddr) {
        let certificate_node = tls::peer_node(stream.get_ref().1);
        let mut greeting = None;
        let handshake = tokio_tungstenite::accept_hdr_async_with_config(
            stream,
            |request: &Request, mut response: Response| match Greeting::read(
                request.headers(),
                certificate_node.as_deref(),
            ) {
                Ok(read) => {
                    if read.capabilities != Capabilities::default() {
                        let ours = Capabilities::OURS.to_string();
                        let value = HeaderValue::from_str(&ours).expect("names are ASCII");
                        response.headers_mut().insert(capability::HEADER, value);
                    }
                    greeting = Some(read);
                    Ok(response)
                }
                Err(refusal) => Err(refused(&refusal)),
            },
            Some(websocket_config()),
        );
        let socket = match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(Ok(socket)) => socket,
            Ok(Err(error)) => {
                tracing::warn!(%peer, certificate = certificate_node, %error, "connection refused");
                return;
            }
            Err(_) => {
                tracing::info!(%peer, "opening handshake took too long");
                return;
            }
        };
        let Greeting { node, capabilities } = greeting.expect("set before the answer was sent");
        let (commands, received) = mpsc::channel(WAITING_MAX);
        let Some(id) = self.hub.connected(&node, capabilities, commands).await else { return };
        tracing::info!(node, session = id, %peer, digest = capabilities.digest, "node connected");

        let (sink, stream) = socket.split();
        let (incoming, read) = mpsc::channel(INCOMING_MAX);
        let reader = tokio::spawn(read_all(stream, incoming));
        let (requests, worker_requests) = mpsc::channel(REQUESTS_MAX);
        let (answers, worker_answers) = mpsc::channel(REQUESTS_MAX);
        self.tasks.spawn(work(
            Arc::clone(&self.upstream),
            node.clone(),
            worker_requests,
            answers,
            self.stop.clone(),
        ));
        let mut session = Session {
            node: node.clone(),
            id,
            hub: self.hub.clone(),
            sink,
            delivery: Delivery::default(),
            requests,
            keepalive_until: Instant::now() + KEEPALIVE_TIMEOUT,
            too_fast: false,
            garbled: false,
        };
        let end = session.run(received, read, worker_answers, &self.stop).await;
        self.hub.input(Input::Disconnected { node: node.clone(), session: id }).await;
        tracing::info!(node, session = id, reason = %end, "node disconnected");
        session.say_farewell(end, reader).await;
    }
}

/// What the opening handshake tells.
#[derive(Debug)]
struct Greeting {
    node: String,
    capabilities: Capabilities,
}

/// Why an opening handshake is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Refusal {
    #[error("header `node_id` is missing")]
    NoNode,
    #[error("the client certificate names no node")]
    NoIdentity,
    #[error("the client certificate is for node `{certificate}`, not for node `{node}`")]
    ForeignNode { certificate: String, node: String },
    #[error("header `ConnectionUse` is `{found}` instead of `msg`")]
    Use { found: String },
}

impl Greeting {
    /// Header names are compared without case; of a repeated header the first counts, as a KubeEdge edge adds
    /// `ConnectionUse` again for each attempt.
    fn read(headers: &HeaderMap, certificate_node: Option<&str>) -> Result<Self, Refusal> {
        let value = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let node = value("node_id").filter(|node| !node.is_empty()).ok_or(Refusal::NoNode)?;
        match certificate_node {
            None => return Err(Refusal::NoIdentity),
            Some(certificate) if certificate != node => {
                return Err(Refusal::ForeignNode {
                    certificate: certificate.into(),
                    node: node.into(),
                });
            }
            Some(_) => {}
        }
        match value("ConnectionUse") {
            Some("msg") => {}
            found => return Err(Refusal::Use { found: found.unwrap_or_default().into() }),
        }
        let capabilities = Capabilities::parse(value(capability::HEADER)).and(Capabilities::OURS);
        Ok(Self { node: node.into(), capabilities })
    }
}

fn refused(refusal: &Refusal) -> ErrorResponse {
    let mut response = ErrorResponse::new(Some(refusal.to_string()));
    *response.status_mut() = match refusal {
        Refusal::NoIdentity | Refusal::ForeignNode { .. } => StatusCode::FORBIDDEN,
        Refusal::NoNode | Refusal::Use { .. } => StatusCode::BAD_REQUEST,
    };
    response
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the node closed the connection")]
    Closed,
    #[error("the connection broke: {0}")]
    Broken(WsError),
    #[error("{0}")]
    TooLong(MessageError),
    #[error("message is over the bound of {MESSAGE_LEN_MAX} bytes")]
    OverBound,
    #[error("{0}")]
    Hub(&'static str),
    #[error("the node does not take its messages")]
    Slow,
    #[error("no keepalive for {} s", KEEPALIVE_TIMEOUT.as_secs())]
    Silent,
    #[error("cloudcore is stopping")]
    Stopping,
}

impl End {
    fn close_code(&self) -> Option<CloseCode> {
        match self {
            Self::Closed | Self::Broken(_) => None,
            Self::TooLong(_) | Self::OverBound => Some(CloseCode::Size),
            Self::Hub(_) | Self::Slow | Self::Silent => Some(CloseCode::Policy),
            Self::Stopping => Some(CloseCode::Away),
        }
    }
}

/// What the reader found.
enum Incoming {
    Message(Box<Message>),
    /// Not a message; the connection goes on.
    Unreadable(MessageError),
    End(End),
}

async fn read_all(
    mut stream: SplitStream<Socket>,
    incoming: mpsc::Sender<Incoming>,
) -> SplitStream<Socket> {
    loop {
        let found = match stream.next().await {
            None | Some(Ok(WsMessage::Close(_))) => Incoming::End(End::Closed),
            Some(Ok(WsMessage::Ping(_) | WsMessage::Pong(_) | WsMessage::Frame(_))) => continue,
            Some(Ok(WsMessage::Text(text))) => parse(text.as_bytes()),
            Some(Ok(WsMessage::Binary(bytes))) => parse(&bytes),
            Some(Err(WsError::Capacity(CapacityError::MessageTooLong { size, .. }))) => {
                Incoming::End(End::TooLong(MessageError::TooLong { len: size }))
            }
            Some(Err(WsError::Capacity(_))) => Incoming::End(End::OverBound),
            Some(Err(WsError::ConnectionClosed | WsError::AlreadyClosed)) => {
                Incoming::End(End::Closed)
            }
            Some(Err(error)) => Incoming::End(End::Broken(error)),
        };
        let is_end = matches!(found, Incoming::End(_));
        if incoming.send(found).await.is_err() || is_end {
            return stream;
        }
    }
}

fn parse(bytes: &[u8]) -> Incoming {
    match Message::decode(bytes) {
        Ok(message) => Incoming::Message(Box::new(message)),
        Err(error) => Incoming::Unreadable(error),
    }
}

/// Answers the requests of one node, one after the other, until its session drops the sender.
async fn work(
    upstream: Arc<Upstream>,
    node: String,
    mut requests: mpsc::Receiver<Message>,
    answers: mpsc::Sender<Message>,
    stop: CancellationToken,
) {
    while let Some(request) = requests.recv().await {
        let answer = tokio::select! {
            () = stop.cancelled() => return,
            answer = upstream.answer(&node, &request) => answer,
        };
        if let Some(answer) = answer {
            // Without a session nobody waits for it; the request itself has been done.
            let _ = answers.send(answer).await;
        }
    }
}

/// The owner of one connection.
struct Session {
    node: String,
    id: SessionId,
    hub: Hub,
    sink: SplitSink<Socket, WsMessage>,
    delivery: Delivery,
    requests: mpsc::Sender<Message>,
    keepalive_until: Instant,
    /// Whether the log says already that this node asks for too much, or sends what is no message.
    too_fast: bool,
    garbled: bool,
}

impl Session {
    async fn run(
        &mut self,
        mut commands: mpsc::Receiver<Command>,
        mut incoming: mpsc::Receiver<Incoming>,
        mut answers: mpsc::Receiver<Message>,
        stop: &CancellationToken,
    ) -> End {
        loop {
            // In order: what ends the session first, then what the hub and the worker have, then the node.
            let step = tokio::select! {
                biased;
                () = stop.cancelled() => Err(End::Stopping),
                () = sleep_until(Some(self.keepalive_until)) => Err(End::Silent),
                command = commands.recv() => match command {
                    Some(Command::Send(message)) => self.queue(*message),
                    Some(Command::Close(reason)) => Err(End::Hub(reason)),
                    // The hub drops the sender of a session whose commands it could not pass on.
                    None => Err(End::Slow),
                },
                Some(answer) = answers.recv() => self.queue(answer),
                found = incoming.recv() => match found {
                    Some(Incoming::Message(message)) => self.receive(*message).await,
                    Some(Incoming::Unreadable(error)) => {
                        if !std::mem::replace(&mut self.garbled, true) {
                            tracing::warn!(node = self.node, %error, "a message of the node was not readable");
                        }
                        Ok(())
                    }
                    Some(Incoming::End(end)) => Err(end),
                    None => Err(End::Closed),
                },
                () = sleep_until(self.delivery.poll_timeout()) => Ok(()),
            };
            let step = match step {
                Ok(()) => self.drain().await,
                end => end,
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    fn queue(&mut self, message: Message) -> Result<(), End> {
        self.delivery.queue(message).map_err(|_| End::Slow)
    }

    async fn receive(&mut self, message: Message) -> Result<(), End> {
        let route = &message.route;
        tracing::debug!(
            node = self.node,
            msg_id = message.header.msg_id,
            operation = route.operation,
            resource = route.resource,
            "received"
        );
        match message.operation() {
            Some(Operation::Keepalive) => {
                self.keepalive_until = Instant::now() + KEEPALIVE_TIMEOUT;
            }
            Some(Operation::Response) => self.delivery.handle_ack(&message.header.parent_msg_id),
            Some(Operation::Error) => {
                tracing::warn!(
                    node = self.node,
                    resource = route.resource,
                    error = message.content.get(),
                    "the node reports an error"
                );
            }
            _ if route.resource == digest::RESOURCE => match message.content_as() {
                Ok(digest) => {
                    let (node, session) = (self.node.clone(), self.id);
                    let request = Box::new(message);
                    self.hub.input(Input::Digest { node, session, digest, request }).await;
                }
                Err(error) => {
                    tracing::warn!(node = self.node, %error, "the node's digest is not readable");
                    let answer = error_answer(&message, &error.to_string());
                    return self.queue(answer);
                }
            },
            _ => {
                if let Err(error) = self.requests.try_send(message) {
                    let message = error.into_inner();
                    if !std::mem::replace(&mut self.too_fast, true) {
                        // Once, not for each message: a node must not fill the hub's log.
                        tracing::warn!(
                            node = self.node,
                            resource = message.route.resource,
                            "the node asks faster than the API answers; what is too much is refused"
                        );
                    }
                    return self
                        .queue(error_answer(&message, "too many requests wait for an answer"));
                }
            }
        }
        Ok(())
    }

    /// Writes what is due and passes on what became of messages.
    async fn drain(&mut self) -> Result<(), End> {
        while let Some(message) = self.delivery.poll_transmit(Instant::now()) {
            tracing::debug!(
                node = self.node,
                msg_id = message.header.msg_id,
                operation = message.route.operation,
                resource = message.route.resource,
                "sent"
            );
            let write = self.sink.send(WsMessage::text(message.encode()));
            match tokio::time::timeout(WRITE_TIMEOUT, write).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(End::Broken(error)),
                Err(_) => return Err(End::Slow),
            }
        }
        while let Some(event) = self.delivery.poll_event() {
            match event {
                Event::Delivered(message) => {
                    let (node, session) = (self.node.clone(), self.id);
                    self.hub.input(Input::Acked { node, session, message }).await;
                }
                Event::Unanswered(message) | Event::Dropped(message) => {
                    tracing::warn!(
                        node = self.node,
                        msg_id = message.header.msg_id,
                        resource = message.route.resource,
                        "the node did not acknowledge a message"
                    );
                }
            }
        }
        Ok(())
    }

    /// Tells the node why, where there is still a way to tell.
    async fn say_farewell(self, end: End, reader: tokio::task::JoinHandle<SplitStream<Socket>>) {
        let Self { mut sink, .. } = self;
        let Some(code) = end.close_code() else {
            reader.abort();
            return;
        };
        // A close frame holds at most 123 bytes of text.
        let reason: String = end.to_string().chars().take(120).collect();
        let frame = CloseFrame { code, reason: reason.into() };
        let close = async {
            sink.send(WsMessage::Close(Some(frame))).await.ok()?;
            if !matches!(end, End::TooLong(_) | End::OverBound) {
                reader.abort();
                return None;
            }
            // A peer in the middle of a long message sees the close frame only after it has written all of it; with
            // unread bytes in our buffers the system would reset the connection instead.
            let stream = reader.await.ok()?;
            let mut socket = sink.reunite(stream).ok()?.into_inner();
            socket.shutdown().await.ok()?;
            let mut rest = socket.take(FAREWELL_LEN_MAX);
            let mut buffer = vec![0; 16 * 1024];
            while rest.read(&mut buffer).await.ok()? > 0 {}
            Some(())
        };
        let _ = tokio::time::timeout(FAREWELL_TIMEOUT, close).await;
    }
}

fn error_answer(request: &Message, text: &str) -> Message {
    let now_ms = jiff::Timestamp::now().as_millisecond();
    request.error(now_ms, "edgecontroller", "resource", text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn repeated_use_header_and_any_case_are_fine() {
        let retried = headers(&[
            ("Node_id", "edge1"),
            ("Project_id", "p"),
            ("Connectionuse", "msg"),
            ("Connectionuse", "msg"),
        ]);
        let greeting = Greeting::read(&retried, Some("edge1")).expect("a KubeEdge edge");
        assert_eq!(greeting.node, "edge1");
        assert!(!greeting.capabilities.digest);
    }

    #[test]
    fn a_node_may_only_be_itself() {
        let both = headers(&[("node_id", "edge1"), ("ConnectionUse", "msg")]);
        let foreign = Greeting::read(&both, Some("edge2")).expect_err("another node");
        assert_eq!(
            foreign.to_string(),
            "the client certificate is for node `edge2`, not for node `edge1`"
        );
        assert_eq!(refused(&foreign).status(), StatusCode::FORBIDDEN);
        assert_eq!(Greeting::read(&both, None).expect_err("no node"), Refusal::NoIdentity);
        let silent = headers(&[("node_id", "edge1")]);
        let refusal = Greeting::read(&silent, Some("edge1")).expect_err("half-dead");
        assert_eq!(refused(&refusal).status(), StatusCode::BAD_REQUEST);
        let empty = headers(&[]);
        assert_eq!(Greeting::read(&empty, Some("edge1")).expect_err("nobody"), Refusal::NoNode);
    }
}
