//! The link over QUIC: between our own ends only, with the frames of [`skerry_protocol::frame`].
//!
//! The edge opens a control stream and says who it is; then each class of messages has a stream of its own in each
//! direction, opened when it is first needed, so that a large object does not stand before an acknowledgement, and a
//! lost packet holds up its own class only. Beats are datagrams. The socket is bound to no address, so that a node
//! whose address changes goes on sending, and the hub follows it; a NAT that forgets the flow is followed the same way.
//!
//! No 0-RTT: what is sent in it can be played to the hub again by anybody who saw it.

use super::websocket::until;
use super::{
    Counters, Ended, Outgoing, Session, SessionError, bounded_retry, chain, deliver, deliver_batch,
};
use crate::config::{Endpoint, PROJECT_ID};
use bytes::{Bytes, BytesMut};
use quinn::congestion::BbrConfig;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{
    ClientConfig, Connection, ConnectionError, IdleTimeout, MtuDiscoveryConfig, RecvStream,
    SendStream, TransportConfig, VarInt,
};
use skerry_protocol::capability::{BEAT_GRACE, Capabilities};
use skerry_protocol::frame::{self, ALPN, Decoder, HELLO_LEN_MAX, Hello, HelloReply, Kind};
use skerry_protocol::message::MESSAGE_LEN_MAX;
use skerry_protocol::{Class, batch};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

/// Time for the handshake with one address.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 2;
/// Time for the hub's hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(20);
/// Time for an answer after the network has changed under the connection; a lost probe is repeated within it.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the hub may keep an acknowledgement back, and what a busy machine adds to it.
const ACKNOWLEDGEMENT_DELAY: Duration = Duration::from_millis(150);
/// How long after a beat its answer is looked for.
const ECHO_WAIT: Duration = Duration::from_secs(2);
/// Time between two tries to find a larger packet size on the same path. Each costs some packets that carry nothing,
/// and a node stays where it is; a link that begins anew looks anyway.
const MTU_INTERVAL: Duration = Duration::from_secs(7 * 24 * 3600);
/// First guess of the round trip, so that a lost first packet is repeated after half a second.
const INITIAL_RTT: Duration = Duration::from_millis(170);
/// Bytes that may be on their way to us on one stream, and on all: enough for 1 MiB a second at half a second.
const STREAM_WINDOW: u32 = 512 * 1024;
const WINDOW: u32 = 1024 * 1024;
/// Bytes written and not yet acknowledged.
const SEND_WINDOW: u64 = 512 * 1024;
/// Streams that the hub may have open: one per class, and some that are just ending.
const STREAMS_MAX: u32 = 16;
/// Messages of one class that may wait for its stream; the uplink holds the rest, where it can be overtaken.
const CLASS_QUEUE_MAX: usize = 32;
/// The largest frame: a message, or a batch that has not become smaller by compression.
const FRAME_LEN_MAX: usize = MESSAGE_LEN_MAX + 1024;
/// Read at a time.
const CHUNK_LEN: usize = 64 * 1024;

/// Why there is no QUIC.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error("could not find the address of {0}")]
    Resolve(Endpoint, #[source] std::io::Error),
    #[error("{0} has no address")]
    NoAddress(Endpoint),
    #[error("could not open a UDP socket")]
    Socket(#[source] std::io::Error),
    #[error("QUIC cannot be used with this certificate: {0}")]
    Config(String),
    #[error("no QUIC at {hub}: nothing answered within {} s", HANDSHAKE_TIMEOUT.as_secs())]
    Timeout { hub: Endpoint },
    #[error(
        "{0} speaks another QUIC, such as KubeEdge's, which is Google's of 2018 and does not check who the node is"
    )]
    Foreign(Endpoint),
    #[error("QUIC failed: {0}")]
    Connection(String),
    #[error("the hub's hello is not valid: {0}")]
    Hello(String),
    #[error("the hub refused the connection: {text}")]
    Refused { text: String, retry_after: Option<Duration> },
}

/// A connection on which nothing was said yet.
pub(super) struct Dialled {
    connection: Connection,
    /// The socket lives as long as this.
    endpoint: quinn::Endpoint,
}

/// A connection that the hub has accepted.
pub(super) struct Opened {
    dialled: Dialled,
    /// Open as long as the link is.
    control: (SendStream, RecvStream),
}

/// What every dial with the same certificate shares: tickets to resume with, and tokens that prove the address.
pub(super) fn client_config(
    tls: &rustls::ClientConfig,
    silence_max: Duration,
) -> Result<ClientConfig, OpenError> {
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.enable_early_data = false;
    // Tickets of TCP connections are no good here.
    tls.resumption = rustls::client::Resumption::in_memory_sessions(4);
    let crypto =
        QuicClientConfig::try_from(tls).map_err(|error| OpenError::Config(error.to_string()))?;
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.interval(MTU_INTERVAL);
    let mut transport = TransportConfig::default();
    // The beats decide when the link is dead; this only clears away what is left of it.
    let idle = IdleTimeout::try_from(silence_max * 2).unwrap_or(VarInt::MAX.into());
    transport
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(None)
        .congestion_controller_factory(Arc::new(BbrConfig::default()))
        .mtu_discovery_config(Some(mtu))
        .initial_rtt(INITIAL_RTT)
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(WINDOW.into())
        .send_window(SEND_WINDOW)
        .max_concurrent_bidi_streams(0u32.into())
        .max_concurrent_uni_streams(STREAMS_MAX.into())
        .datagram_receive_buffer_size(Some(1024))
        .datagram_send_buffer_size(1024);
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

/// Finds the hub and shakes hands.
///
/// # Errors
///
/// [`OpenError`].
pub(super) async fn dial(hub: &Endpoint, config: ClientConfig) -> Result<Dialled, OpenError> {
    let found = tokio::net::lookup_host((hub.host.as_str(), hub.port)).await;
    let found = found.map_err(|error| OpenError::Resolve(hub.clone(), error))?;
    let mut last = OpenError::NoAddress(hub.clone());
    for address in found.take(ADDRESSES_MAX) {
        match dial_address(hub, address, config.clone()).await {
            Ok(dialled) => return Ok(dialled),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn dial_address(
    hub: &Endpoint,
    address: SocketAddr,
    config: ClientConfig,
) -> Result<Dialled, OpenError> {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let endpoint = quinn::Endpoint::client(any).map_err(OpenError::Socket)?;
    let connecting = endpoint
        .connect_with(config, address, &hub.host)
        .map_err(|error| OpenError::Connection(error.to_string()))?;
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
        Ok(Ok(connection)) => Ok(Dialled { connection, endpoint }),
        Ok(Err(ConnectionError::VersionMismatch)) => Err(OpenError::Foreign(hub.clone())),
        Ok(Err(ConnectionError::TimedOut)) | Err(_) => Err(OpenError::Timeout { hub: hub.clone() }),
        Ok(Err(error)) => Err(OpenError::Connection(error.to_string())),
    }
}

/// Says who we are, and waits until the hub agrees.
///
/// # Errors
///
/// [`OpenError`].
pub(super) async fn open(
    dialled: Dialled,
    node: &str,
    ours: Capabilities,
) -> Result<(Opened, Capabilities), OpenError> {
    let lost = |error: &dyn std::error::Error| OpenError::Connection(chain(error));
    let exchange = async {
        let (mut send, mut receive) =
            dialled.connection.open_bi().await.map_err(|error| lost(&error))?;
        let hello =
            Hello { node: node.into(), project: PROJECT_ID.into(), capabilities: ours.to_string() };
        send.write_all(&hello.encode()).await.map_err(|error| lost(&error))?;
        let decoder = Decoder::new(HELLO_LEN_MAX);
        let mut bytes = BytesMut::new();
        let frame = loop {
            let found = decoder.decode(&mut bytes);
            if let Some(frame) = found.map_err(|error| OpenError::Hello(error.to_string()))? {
                break frame;
            }
            let chunk = receive.read_chunk(HELLO_LEN_MAX, true).await;
            match chunk.map_err(|error| lost(&error))? {
                Some(chunk) => bytes.extend_from_slice(&chunk.bytes),
                None => return Err(OpenError::Hello("the stream ends before it".into())),
            }
        };
        let reply = HelloReply::decode(&frame).map_err(|error| OpenError::Hello(chain(&error)))?;
        Ok((reply, (send, receive)))
    };
    let timeout = Err(OpenError::Hello(format!("none came within {} s", HELLO_TIMEOUT.as_secs())));
    let (reply, control) =
        tokio::time::timeout(HELLO_TIMEOUT, exchange).await.unwrap_or(timeout)?;
    match reply {
        HelloReply::Accepted { capabilities } => {
            let agreed = ours.and(Capabilities::parse(Some(&capabilities)));
            Ok((Opened { dialled, control }, agreed))
        }
        HelloReply::Refused { refused, retry_after_ms } => Err(OpenError::Refused {
            text: refused,
            retry_after: retry_after_ms.map(bounded_retry),
        }),
    }
}

/// Carries messages until the connection ends; returns why it did.
pub(super) async fn run(
    opened: Opened,
    session: &Arc<Session>,
    mut to_send: mpsc::Receiver<Outgoing>,
    mut network: watch::Receiver<u64>,
) -> Ended {
    let Opened { dialled: Dialled { connection, endpoint }, control } = opened;
    let _control = control;
    let _close = CloseOnDrop(&connection);
    let beat = session.capabilities.beat.unwrap_or(super::BEAT_UNAGREED);
    let silence_max = session.capabilities.silence_max().unwrap_or(beat * 2 + BEAT_GRACE);
    let mut tasks: JoinSet<Result<(), SessionError>> = JoinSet::new();
    let mut writers: [Option<mpsc::Sender<Outgoing>>; Class::ALL.len()] = Default::default();
    // Waits for room in its class. A class that is stuck holds up the others only after as many messages as the uplink
    // has on the way.
    let mut held: Option<(mpsc::Sender<Outgoing>, Outgoing)> = None;
    let mut ticks = tokio::time::interval_at(Instant::now() + beat, beat);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut traffic = Traffic::of(&connection);
    let mut silence = Silence::new(&traffic, silence_max);
    loop {
        let now_traffic = Traffic::of(&connection);
        now_traffic.count(&traffic, &session.counters);
        if now_traffic.datagrams_in != traffic.datagrams_in {
            session.set_rtt(connection.rtt());
            session.set_doubt(false);
            silence.handle_heard(&now_traffic, silence_max);
        }
        traffic = now_traffic;
        tokio::select! {
            error = connection.closed() => return Err(ended(error)),
            stream = connection.accept_uni() => {
                let stream = stream.map_err(ended)?;
                tasks.spawn(read(stream, session.clone()));
            }
            // The hub wants to be acknowledged, which has been done by now.
            probe = connection.read_datagram() => drop(probe.map_err(ended)?),
            message = to_send.recv(), if held.is_none() => {
                let Some(outgoing) = message else { return Err(SessionError::Dropped) };
                let class = Class::of(&outgoing.message);
                let writer = writers[usize::from(u8::from(class))].get_or_insert_with(|| {
                    let (writer, queue) = mpsc::channel(CLASS_QUEUE_MAX);
                    tasks.spawn(write(connection.clone(), class, queue, session.clone()));
                    writer
                });
                held = Some((writer.clone(), outgoing));
            }
            permit = room(&held) => {
                // Without a permit the writer has failed, which its task says.
                if let (Ok(permit), Some((_, outgoing))) = (permit, held.take()) {
                    permit.send(outgoing);
                    silence.look_in(acknowledgement_wait(&connection));
                }
            }
            Some(done) = tasks.join_next() => match (done, connection.close_reason()) {
                (Ok(Ok(())), _) => {}
                (_, Some(reason)) => return Err(ended(reason)),
                (Ok(Err(error)), None) => return Err(error),
                (Err(error), None) => return Err(SessionError::Framing(error.to_string())),
            },
            () = until(silence.look_at) => {
                // What came in this very moment is seen when the loop begins anew.
                let now = Traffic::of(&connection);
                if now.datagrams_in == traffic.datagrams_in && silence.handle_look(&now) {
                    send_beat(&connection);
                }
            }
            () = until(silence.doubt_at) => {
                silence.doubt_at = None;
                if Traffic::of(&connection).datagrams_in == traffic.datagrams_in {
                    session.set_doubt(true);
                    silence.look_in(super::PROBE_INTERVAL);
                }
            }
            () = tokio::time::sleep_until(silence.deadline) => {
                if Traffic::of(&connection).datagrams_in == traffic.datagrams_in {
                    return Err(SessionError::Silent(silence.heard.elapsed()));
                }
            }
            _ = ticks.tick() => {
                send_beat(&connection);
                silence.look_in(acknowledgement_wait(&connection).max(ECHO_WAIT));
            }
            Ok(()) = network.changed() => {
                tracing::debug!(local = ?endpoint.local_addr(), "the network has changed under a QUIC link");
                rebind(&endpoint);
                send_beat(&connection);
                let now = Instant::now();
                silence.doubt_at = Some(now + super::answer_wait(connection.rtt()));
                silence.deadline = silence.deadline.min(now + PROBE_TIMEOUT);
            }
        }
    }
}

/// A new socket. The hub sees the node come from another port and asks at once whether it is the same node; with the
/// answer it also learns what was lost, which it would find out only much later by itself. What a NAT has forgotten is
/// no matter then either.
fn rebind(endpoint: &quinn::Endpoint) {
    let renewed = endpoint.local_addr().and_then(|mut local| {
        local.set_port(0);
        endpoint.rebind(std::net::UdpSocket::bind(local)?)
    });
    if let Err(error) = renewed {
        tracing::debug!(%error, "the QUIC link keeps its socket");
    }
}

/// How long an acknowledgement may take; the hub may keep it back for a moment, and be busy.
fn acknowledgement_wait(connection: &Connection) -> Duration {
    (connection.rtt() * 2 + ACKNOWLEDGEMENT_DELAY).min(super::ANSWER_WAIT_MAX)
}

/// Since when nothing came, and what is done about it when something should have.
struct Silence {
    heard: Instant,
    /// When the link is given up.
    deadline: Instant,
    /// When to look whether something came; `None` while nothing is expected.
    look_at: Option<Instant>,
    /// When to doubt the link, after the network has changed.
    doubt_at: Option<Instant>,
    /// What had been sent when something came last, of what has to be acknowledged.
    eliciting: u64,
    /// Since when something should have come.
    since: Option<Instant>,
}

impl Silence {
    fn new(traffic: &Traffic, max: Duration) -> Self {
        let heard = Instant::now();
        Self {
            heard,
            deadline: heard + max,
            look_at: Some(heard + ECHO_WAIT),
            doubt_at: None,
            eliciting: traffic.eliciting,
            since: None,
        }
    }

    fn handle_heard(&mut self, traffic: &Traffic, max: Duration) {
        *self = Self { look_at: None, ..Self::new(traffic, max) };
    }

    fn look_in(&mut self, wait: Duration) {
        let at = Instant::now() + wait;
        self.look_at = Some(self.look_at.map_or(at, |look| look.min(at)));
    }

    /// Nothing has come. Whether to ask for an acknowledgement; QUIC itself asks less and less often.
    fn handle_look(&mut self, traffic: &Traffic) -> bool {
        let is_expected = traffic.eliciting != self.eliciting;
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        self.look_at = is_expected.then(|| now + super::probe_wait(now - since));
        is_expected
    }
}

async fn room(
    held: &Option<(mpsc::Sender<Outgoing>, Outgoing)>,
) -> Result<mpsc::OwnedPermit<Outgoing>, mpsc::error::SendError<()>> {
    match held {
        Some((writer, _)) => writer.clone().reserve_owned().await,
        None => std::future::pending().await,
    }
}

/// Asks for an acknowledgement. A beat that finds no room in the buffer is none: something else is on its way then.
fn send_beat(connection: &Connection) {
    if let Err(error) = connection.send_datagram(Bytes::new()) {
        tracing::debug!(%error, "no beat");
    }
}

fn ended(error: ConnectionError) -> SessionError {
    match error {
        ConnectionError::ApplicationClosed(close) if close.reason.is_empty() => {
            SessionError::Closed
        }
        ConnectionError::ApplicationClosed(close) => {
            SessionError::ClosedWith(String::from_utf8_lossy(&close.reason).into_owned())
        }
        error => SessionError::Quic(error.to_string()),
    }
}

struct CloseOnDrop<'a>(&'a Connection);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close(VarInt::from_u32(0), b"");
    }
}

/// Counters of a connection.
#[derive(Clone, Copy)]
struct Traffic {
    datagrams_in: u64,
    bytes_in: u64,
    bytes_out: u64,
    /// Frames sent that have to be acknowledged, of the kinds that a link sends.
    eliciting: u64,
}

impl Traffic {
    fn of(connection: &Connection) -> Self {
        let stats = connection.stats();
        Self {
            datagrams_in: stats.udp_rx.datagrams,
            bytes_in: stats.udp_rx.bytes,
            bytes_out: stats.udp_tx.bytes,
            eliciting: stats.frame_tx.stream + stats.frame_tx.datagram,
        }
    }

    fn count(&self, before: &Self, counters: &Counters) {
        counters.add_in(self.bytes_in.saturating_sub(before.bytes_in) as usize);
        counters.add_out(self.bytes_out.saturating_sub(before.bytes_out) as usize);
    }
}

/// Reads one stream of the hub to its end.
async fn read(mut stream: RecvStream, session: Arc<Session>) -> Result<(), SessionError> {
    let decoder = Decoder::new(FRAME_LEN_MAX);
    let mut bytes = BytesMut::new();
    let mut class = None;
    loop {
        let chunk = stream.read_chunk(CHUNK_LEN, true).await;
        let Some(chunk) = chunk.map_err(|error| SessionError::Quic(chain(&error)))? else {
            return Ok(());
        };
        let mut chunk = chunk.bytes;
        if class.is_none() && !chunk.is_empty() {
            let number = chunk.split_to(1)[0];
            let found = Class::try_from(number);
            class = Some(found.map_err(|error| SessionError::Framing(error.to_string()))?);
        }
        bytes.extend_from_slice(&chunk);
        loop {
            let frame = decoder.decode(&mut bytes);
            let frame = frame.map_err(|error| SessionError::Framing(error.to_string()))?;
            match frame {
                None => break,
                Some(frame) => match frame.kind {
                    Kind::Message => deliver(&session, &frame.payload).await?,
                    Kind::Batch => deliver_batch(&session, &frame.payload).await?,
                    Kind::Hello => return Err(SessionError::Framing("a second hello".into())),
                },
            }
        }
        if bytes.is_empty() {
            bytes = BytesMut::new(); // what a large message took is given back
        }
    }
}

/// Writes the messages of one class, in order, on a stream of their own.
async fn write(
    connection: Connection,
    class: Class,
    mut queue: mpsc::Receiver<Outgoing>,
    session: Arc<Session>,
) -> Result<(), SessionError> {
    let lost = |error: &dyn std::error::Error| SessionError::Quic(chain(error));
    let mut stream = connection.open_uni().await.map_err(|error| lost(&error))?;
    // quinn sends the highest number first.
    let urgency = i32::try_from(Class::ALL.len()).unwrap_or(0) - i32::from(u8::from(class));
    let _ = stream.set_priority(urgency);
    let mut out = BytesMut::from(&[u8::from(class)][..]);
    while let Some(first) = queue.recv().await {
        let mut due = super::gather(first, &mut queue);
        let ids: Vec<_> = due.iter_mut().filter_map(Outgoing::take_report).collect();
        if session.capabilities.batch && super::is_worth_a_batch(&due) {
            let messages: Vec<_> = due.into_iter().map(|outgoing| outgoing.message).collect();
            frame::encode(Kind::Batch, &batch::encode(&messages), &mut out);
        } else {
            for outgoing in due {
                let mut text = BytesMut::new();
                outgoing.message.encode_to(&mut text);
                frame::encode(Kind::Message, &text, &mut out);
            }
        }
        stream.write_all(&out).await.map_err(|error| lost(&error))?;
        out.clear();
        for id in ids {
            session.tell(super::LinkEvent::Written(id)).await?;
        }
    }
    Ok(())
}
