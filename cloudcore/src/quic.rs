//! QUIC from our own edges: the listener, the first frames, and one connection as a transport.
//!
//! IETF QUIC with mutual TLS 1.3 and the ALPN `skerry/1`. The edge opens one bidirectional stream and says who it is and
//! what it can do ([`skerry_protocol::frame::Hello`]); after the answer each side opens a unidirectional stream per
//! priority class when it first needs it. Datagrams of the edge are beats, ours are probes; they are not answered, their
//! acknowledgement by QUIC is the answer. A client whose address changes keeps its connection.
//!
//! KubeEdge's own QUIC is another protocol (Google QUIC of 2018) and asks no client for a certificate, so that anybody
//! can be any node; it is not offered here, on no port.
//!
//! # Bounds
//!
//! A client may have sent [`RECEIVE_WINDOW`] bytes that nobody has read, in at most one bidirectional and one
//! unidirectional stream per class; what we have sent and it has not acknowledged is at most [`SEND_WINDOW`]. While
//! more than [`UNPROVED_MAX`] handshakes run, a client has to prove its address first (retry), and above
//! [`HANDSHAKES_MAX`] new ones are refused; so are those above as many open ones as a TCP listener has.

use crate::admission::Door;
use crate::listen::{CONNECTIONS_MAX, HANDSHAKE_TIMEOUT, Place};
use crate::session::{self, Opened, Shared};
use crate::transport::{Farewell, Received, Transport, TransportError};
use bytes::{Buf, Bytes, BytesMut};
use futures::FutureExt;
use quinn::congestion::BbrConfig;
use quinn::{
    Connection, ConnectionError, Endpoint, EndpointConfig, MtuDiscoveryConfig, ReadError,
    RecvStream, SendStream, ServerConfig, TransportConfig, VarInt,
};
use rustls_pki_types::CertificateDer;
use skerry_protocol::capability::Capabilities;
use skerry_protocol::frame::{
    Decoder, HEADER_LEN, HELLO_LEN_MAX, Hello, HelloReply, Kind, encode, encode_header,
};
use skerry_protocol::message::UPSTREAM_LEN_MAX;
use skerry_protocol::{Class, Message, batch};
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// Bytes that a client may have sent on one stream without our having read them.
const STREAM_RECEIVE_WINDOW: u32 = 256 * 1024;
/// The same for all streams of a connection.
const RECEIVE_WINDOW: u32 = 512 * 1024;
/// Bytes sent and not acknowledged: enough for 5 MB/s at 200 ms.
const SEND_WINDOW: u64 = 1024 * 1024;
/// Handshakes at a time.
const HANDSHAKES_MAX: usize = 256;
/// Handshakes at a time of clients that have not proved their address.
const UNPROVED_MAX: usize = 32;
/// Connection attempts that wait for us to look at them, and the bytes that each may bring along.
const INCOMING_MAX: usize = 4096;
const INCOMING_BUFFER_LEN: u64 = 16 * 1024;
const INCOMING_BUFFERS_LEN: u64 = 16 * 1024 * 1024;
/// Bytes of datagrams that wait for us; a beat has at most one.
const DATAGRAM_BUFFER_LEN: usize = 2048;
/// The path's largest packet is looked for again after this; each look costs some of the largest packets.
const MTU_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// The system's receive buffer, as far as it lets us: all nodes share one socket.
const SOCKET_BUFFER_LEN: usize = 4 * 1024 * 1024;
/// How long a refused client may take to read why.
const REFUSAL_TIME: Duration = Duration::from_secs(1);
/// How long the end of the listener waits for the last packets.
const CLOSE_TIME: Duration = Duration::from_millis(500);
/// What is read at once.
const READ_LEN: usize = 16 * 1024;
const CLASSES: usize = Class::ALL.len();

/// Opens the listener.
pub(crate) fn bind(
    address: SocketAddr,
    tls: Arc<rustls::ServerConfig>,
) -> std::io::Result<Endpoint> {
    let crypto =
        quinn::crypto::rustls::QuicServerConfig::try_from(tls).map_err(std::io::Error::other)?;
    let mut transport = TransportConfig::default();
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.interval(MTU_INTERVAL);
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(CLASSES as u32))
        .stream_receive_window(VarInt::from_u32(STREAM_RECEIVE_WINDOW))
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER_LEN))
        .datagram_send_buffer_size(DATAGRAM_BUFFER_LEN)
        .mtu_discovery_config(Some(mtu))
        // The session knows the node's beat and gives it up; QUIC's own keep-alives would only cost traffic.
        .max_idle_timeout(None)
        .keep_alive_interval(None)
        .congestion_controller_factory(Arc::new(BbrConfig::default()));
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(Arc::new(transport))
        .migration(true)
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(INCOMING_BUFFER_LEN)
        .incoming_buffer_size_total(INCOMING_BUFFERS_LEN);
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, Some(socket2::Protocol::UDP))?;
    // Less than asked for is what the system gives without a right to more.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_LEN);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_LEN);
    socket.bind(&address.into())?;
    let runtime = Arc::new(quinn::TokioRuntime);
    Endpoint::new(EndpointConfig::default(), Some(config), socket.into(), runtime)
}

/// Accepts until `stop`, then closes the listener.
pub(crate) async fn accept(endpoint: Endpoint, door: Arc<Door>, shared: Arc<Shared>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let open = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let incoming = tokio::select! {
            () = shared.stop.cancelled() => break,
            incoming = endpoint.accept() => incoming,
        };
        let Some(incoming) = incoming else { break };
        let running = HANDSHAKES_MAX - handshakes.available_permits();
        if running >= UNPROVED_MAX && !incoming.remote_address_validated() {
            // It may always be retried while it is not validated.
            let _ = incoming.retry();
            continue;
        }
        let handshake = Arc::clone(&handshakes).try_acquire_owned();
        let place = Arc::clone(&open).try_acquire_owned();
        let (Ok(handshake), Ok(place)) = (handshake, place) else {
            shared.links.counters.refused_admission.add(1);
            incoming.refuse();
            continue;
        };
        let (door, shared) = (Arc::clone(&door), Arc::clone(&shared));
        let peer = incoming.remote_address();
        shared.tasks.clone().spawn(async move {
            let _handshake = handshake;
            let handshake = async {
                let connection = incoming.await?;
                Ok::<_, ConnectionError>(connection)
            };
            let greeted = async {
                match handshake.await {
                    Ok(connection) => greet(connection, &door, peer).await,
                    Err(error) => {
                        shared.links.counters.handshakes_failed.add(1);
                        tracing::info!(listener = "quic", %peer, %error, "QUIC handshake failed");
                        None
                    }
                }
            };
            let greeted = tokio::select! {
                () = shared.stop.cancelled() => None,
                greeted = tokio::time::timeout(HANDSHAKE_TIMEOUT, greeted) => greeted.ok().flatten(),
            };
            if let Some(mut opened) = greeted {
                opened.place = Some(Place::of(place));
                session::spawn(&shared, opened);
            }
        });
    }
    endpoint.set_server_config(None);
    // Each session closes its own connection and says why.
    let _ = tokio::time::timeout(CLOSE_TIME, endpoint.wait_idle()).await;
    endpoint.close(VarInt::from_u32(1001), b"cloudcore is stopping");
}

/// Exchanges the first frames. `None` when the client is refused; it has been told, and is gone.
async fn greet(connection: Connection, door: &Door, address: SocketAddr) -> Option<Opened> {
    let certificates = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
    let closed = |error: &dyn std::error::Error| {
        tracing::info!(listener = "quic", peer = %address, %error, "the node did not say hello");
        connection.close(VarInt::from_u32(1002), error.to_string().as_bytes());
    };
    let (mut sender, mut receiver) = match connection.accept_bi().await {
        Ok(streams) => streams,
        Err(error) => {
            closed(&error);
            return None;
        }
    };
    let hello = match read_hello(&mut receiver).await {
        Ok(hello) => hello,
        Err(error) => {
            closed(&error);
            return None;
        }
    };
    let capabilities = Capabilities::parse(Some(&hello.capabilities)).and(door.capabilities());
    let certificates = certificates.as_deref().map(Vec::as_slice);
    let judged = door.judge(certificates, Some(&hello.node), capabilities);
    let reply = match &judged {
        Ok(_) => HelloReply::Accepted { capabilities: door.capabilities().to_string() },
        Err(denied) => HelloReply::Refused {
            refused: denied.to_string(),
            retry_after_ms: denied.retry_after().map(|wait| wait.as_millis() as u64),
        },
    };
    let told = sender.write_all(&reply.encode()).await;
    match (judged, told) {
        (Ok((identity, standing)), Ok(())) => {
            let quic = Quic::new(connection, sender, receiver);
            Some(Opened {
                transport: Transport::Quic(Box::new(quic)),
                identity,
                standing,
                capabilities,
                address,
                place: None,
            })
        }
        (Err(denied), _) => {
            if denied.retry_after().is_some() {
                tracing::debug!(listener = "quic", peer = %address, reason = %denied, "connection put off");
            } else {
                tracing::warn!(
                    listener = "quic", node = hello.node, peer = %address, reason = %denied, "connection refused"
                );
            }
            let _ = sender.finish();
            // Closing throws away what has not arrived.
            let _ = tokio::time::timeout(REFUSAL_TIME, sender.stopped()).await;
            let code = if denied.retry_after().is_some() { 1013 } else { 1008 };
            connection.close(VarInt::from_u32(code), denied.to_string().as_bytes());
            None
        }
        (Ok(_), Err(error)) => {
            closed(&error);
            None
        }
    }
}

/// Why there is no first frame.
#[derive(Debug, thiserror::Error)]
enum HelloFailed {
    #[error("the stream broke before the hello")]
    Read(#[from] ReadError),
    #[error("the stream ended before the hello")]
    Ended,
    #[error("{0}")]
    Frame(#[from] skerry_protocol::frame::FrameError),
    #[error("{0}")]
    Hello(#[from] skerry_protocol::frame::HelloError),
}

async fn read_hello(receiver: &mut RecvStream) -> Result<Hello, HelloFailed> {
    let decoder = Decoder::new(HELLO_LEN_MAX);
    let mut input = BytesMut::new();
    loop {
        if let Some(frame) = decoder.decode(&mut input)? {
            return Ok(Hello::decode(&frame)?);
        }
        let chunk = receiver.read_chunk(HELLO_LEN_MAX, true).await?.ok_or(HelloFailed::Ended)?;
        input.extend_from_slice(&chunk.bytes);
    }
}

type Next<T> = Pin<Box<dyn Future<Output = Result<T, ConnectionError>> + Send>>;

/// Our end of one connection.
pub(crate) struct Quic {
    connection: Connection,
    /// Open for as long as the connection is; nothing more is said on it.
    _control: (SendStream, RecvStream),
    next_stream: Next<RecvStream>,
    next_datagram: Next<Bytes>,
    inbound: Vec<Inbound>,
    outbound: [Option<Box<Outbound>>; CLASSES],
    frames_seen: u64,
    heard: Instant,
}

struct Inbound {
    /// Unknown before the first byte.
    class: Option<Class>,
    stream: RecvStream,
    /// What has been read and is no whole frame yet.
    input: BytesMut,
}

struct Outbound {
    stream: SendStream,
    out: BytesMut,
}

impl Quic {
    fn new(connection: Connection, sender: SendStream, receiver: RecvStream) -> Self {
        Self {
            next_stream: next_stream(&connection),
            next_datagram: next_datagram(&connection),
            connection,
            _control: (sender, receiver),
            inbound: Vec::new(),
            outbound: [const { None }; CLASSES],
            frames_seen: 0,
            heard: Instant::now(),
        }
    }

    pub(crate) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Received, TransportError>> {
        if let Poll::Ready(beat) = self.next_datagram.as_mut().poll(cx) {
            self.next_datagram = next_datagram(&self.connection);
            return Poll::Ready(match beat {
                Ok(_) => Ok(Received::Beat),
                Err(error) => ended(error),
            });
        }
        while let Poll::Ready(stream) = self.next_stream.as_mut().poll(cx) {
            self.next_stream = next_stream(&self.connection);
            match stream {
                Ok(stream) => {
                    self.inbound.push(Inbound { class: None, stream, input: BytesMut::new() });
                }
                Err(error) => return Poll::Ready(ended(error)),
            }
        }
        let mut index = 0;
        while let Some(inbound) = self.inbound.get_mut(index) {
            match inbound.poll(cx) {
                Poll::Pending => index += 1,
                Poll::Ready(Ok(Some(received))) => return Poll::Ready(Ok(received)),
                // The node has ended this stream, and may open another one of its class.
                Poll::Ready(Ok(None)) => {
                    self.inbound.remove(index);
                }
                Poll::Ready(Err(Failed::Class(class))) => {
                    let twice = self.inbound.iter().filter(|other| other.class == Some(class));
                    if twice.count() > 1 {
                        let text = format!("two streams of class {class:?}");
                        return Poll::Ready(Err(TransportError::Malformed(text)));
                    }
                    // What is more urgent is read first.
                    self.inbound.sort_by_key(|inbound| inbound.class);
                    index = 0;
                }
                Poll::Ready(Err(Failed::Stream(error))) => return Poll::Ready(error),
            }
        }
        Poll::Pending
    }

    pub(crate) fn send(
        &mut self,
        class: Class,
        messages: &[Arc<Message>],
    ) -> Result<(), TransportError> {
        let place = &mut self.outbound[usize::from(u8::from(class))];
        let outbound = match place {
            Some(outbound) => outbound,
            None => {
                let opened = self.connection.open_uni().now_or_never();
                let stream = match opened {
                    Some(Ok(stream)) => stream,
                    Some(Err(error)) => return Err(TransportError::Broken(error.to_string())),
                    None => {
                        let text = "it allows no stream for each class".to_owned();
                        return Err(TransportError::Malformed(text));
                    }
                };
                let priority = CLASSES as i32 - i32::from(u8::from(class));
                // Fails when the stream is closed, which the next write shows.
                let _ = stream.set_priority(priority);
                let out = BytesMut::from(&[u8::from(class)][..]);
                place.insert(Box::new(Outbound { stream, out }))
            }
        };
        match messages {
            [] => {}
            [message] => {
                let mut json = BytesMut::new();
                message.encode_to(&mut json);
                outbound.out.extend_from_slice(&encode_header(Kind::Message, json.len()));
                outbound.out.unsplit(json);
            }
            several => encode(Kind::Batch, &batch::encode(several), &mut outbound.out),
        }
        Ok(())
    }

    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TransportError>> {
        let mut blocked = false;
        for outbound in self.outbound.iter_mut().flatten() {
            while !outbound.out.is_empty() {
                match Pin::new(&mut outbound.stream).poll_write(cx, &outbound.out) {
                    Poll::Ready(Ok(written)) => outbound.out.advance(written),
                    Poll::Ready(Err(error)) => {
                        return Poll::Ready(Err(TransportError::Broken(error.to_string())));
                    }
                    Poll::Pending => {
                        blocked = true;
                        break;
                    }
                }
            }
            if outbound.out.is_empty() && outbound.out.capacity() > 0 {
                outbound.out = BytesMut::new();
            }
        }
        if blocked { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    pub(crate) fn unwritten(&self) -> usize {
        self.outbound.iter().flatten().map(|outbound| outbound.out.len()).sum()
    }

    pub(crate) fn traffic(&self) -> (u64, u64) {
        let stats = self.connection.stats();
        (stats.udp_tx.bytes, stats.udp_rx.bytes)
    }

    /// Only what was decrypted counts: packets of strangers are not the node.
    pub(crate) fn heard(&mut self, now: Instant) -> Instant {
        let frames = self.connection.stats().frame_rx;
        let seen = frames.acks + frames.datagram + frames.stream + frames.ping;
        if seen != self.frames_seen {
            self.frames_seen = seen;
            self.heard = now;
        }
        self.heard
    }

    /// Asks the client for an acknowledgement, which also tells what of the messages was lost. Without room for it
    /// something else is on its way.
    pub(crate) fn probe(&self) {
        let _ = self.connection.send_datagram(Bytes::new());
    }

    pub(crate) fn path(&self) -> (Duration, SocketAddr) {
        (self.connection.rtt(), self.connection.remote_address())
    }

    pub(crate) fn close(self, farewell: Option<Farewell>) {
        let (code, reason) = match farewell {
            Some(Farewell { code, reason, .. }) => (code, reason),
            None => (1000, String::new()),
        };
        self.connection.close(VarInt::from_u32(code.into()), reason.as_bytes());
    }
}

/// What a stream is, other than more messages.
enum Failed {
    /// It has just said which class it is of.
    Class(Class),
    Stream(Result<Received, TransportError>),
}

impl Inbound {
    /// The next frame; `None` at the end of the stream.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Received>, Failed>> {
        let malformed = |text: String| Failed::Stream(Err(TransportError::Malformed(text)));
        loop {
            if self.class.is_some() {
                match Decoder::new(UPSTREAM_LEN_MAX).decode(&mut self.input) {
                    Ok(Some(frame)) => {
                        if self.input.is_empty() {
                            self.input = BytesMut::new();
                        }
                        return Poll::Ready(match frame.kind {
                            Kind::Message => Ok(Some(Received::Message(frame.payload))),
                            Kind::Batch => Ok(Some(Received::Batch(frame.payload))),
                            Kind::Hello => Err(malformed("a second hello".into())),
                        });
                    }
                    Ok(None) => {}
                    Err(skerry_protocol::frame::FrameError::TooLong { .. }) => {
                        return Poll::Ready(Err(Failed::Stream(Err(TransportError::OverBound))));
                    }
                    Err(error) => return Poll::Ready(Err(malformed(error.to_string()))),
                }
            }
            let mut chunk = [0; READ_LEN];
            match self.stream.poll_read(cx, &mut chunk) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(0)) if self.input.is_empty() => return Poll::Ready(Ok(None)),
                Poll::Ready(Ok(0)) => {
                    return Poll::Ready(Err(malformed("a stream ends inside a frame".into())));
                }
                Poll::Ready(Ok(read)) => {
                    if self.input.capacity() - self.input.len() < read {
                        // Room for the whole frame at once, whose length the decoder has found to be within its bound:
                        // grown bit by bit, a long one is there twice for a moment.
                        let len =
                            self.input.first_chunk().map_or(0, |len| u32::from_be_bytes(*len));
                        let whole =
                            if self.class.is_some() { len as usize + HEADER_LEN } else { 0 };
                        self.input.reserve(whole.saturating_sub(self.input.len()).max(read));
                    }
                    self.input.extend_from_slice(&chunk[..read]);
                }
                Poll::Ready(Err(ReadError::ConnectionLost(error))) => {
                    return Poll::Ready(Err(Failed::Stream(ended(error))));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(malformed(error.to_string()))),
            }
            if self.class.is_none() {
                let class = match Class::try_from(self.input.get_u8()) {
                    Ok(class) => class,
                    Err(error) => return Poll::Ready(Err(malformed(error.to_string()))),
                };
                self.class = Some(class);
                return Poll::Ready(Err(Failed::Class(class)));
            }
        }
    }
}

fn next_stream(connection: &Connection) -> Next<RecvStream> {
    let connection = connection.clone();
    Box::pin(async move { connection.accept_uni().await })
}

fn next_datagram(connection: &Connection) -> Next<Bytes> {
    let connection = connection.clone();
    Box::pin(async move { connection.read_datagram().await })
}

fn ended(error: ConnectionError) -> Result<Received, TransportError> {
    match error {
        ConnectionError::ApplicationClosed(_)
        | ConnectionError::ConnectionClosed(_)
        | ConnectionError::LocallyClosed => Ok(Received::Closed),
        other => Err(TransportError::Broken(other.to_string())),
    }
}
