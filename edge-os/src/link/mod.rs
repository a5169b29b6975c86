//! The link to the hub: dial, keep alive, hand messages over, dial again.
//!
//! This file owns dialling; `race` decides between QUIC and WebSocket, `quic` and `websocket` carry messages, `network`
//! tells when the way out has changed. Each connection has its own channel for messages up, so that nothing written
//! for one connection can go out on the next; dropping its sender ends the connection. What the messages mean is the
//! agent's business.
//!
//! States: no link (dial the hubs in turn) -> link -> no link. A link over WebSocket looks for QUIC now and then; when
//! QUIC is up and accepted, the agent gets a second [`LinkEvent::Connected`] and the old connection ends after that.
//! A link that is in doubt, because nothing comes although something should, stays while another one is dialled beside
//! it; whichever speaks first is kept. So a cut costs little more than its own time, and not the waits that both ends
//! have doubled meanwhile.
//!
//! Waiting after a failure: what the hub says, to the millisecond, as it spreads its nodes; else a drawn time, short
//! at first, because most cuts are. When the network comes back nobody waits.

pub mod facts;
mod netlink;
mod network;
mod quic;
mod race;
pub(crate) mod tcp;
pub(crate) mod websocket;

use crate::config::{Config, Endpoint};
use crate::enrol::{self, Credentials, EnrolError};
use crate::objects::LookupRequest;
use crate::tls::{self, TlsError};
use network::{LOOK_INTERVAL_DOWN, LOOK_INTERVAL_UP, Network};
use race::{Memory, RETRY_MIN, Won};
use serde::{Deserialize, Serialize};
use skerry_edge_core::backoff::{Backoff, Random};
use skerry_protocol::batch::{self, BatchError};
use skerry_protocol::capability::Capabilities;
use skerry_protocol::{Message, MessageError, MessageId, certificate};
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Header of a refusal: milliseconds after which the node may dial again.
pub const RETRY_AFTER_HEADER: &str = "Skerry-Retry-After-Ms";
/// The longest wait that a hub may ask for.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(30 * 60);
/// Messages that may wait for the agent; then the socket is not read.
pub const INCOMING_MAX: usize = 32;
/// Time for a message to leave; as KubeEdge's write deadline.
const WRITE_TIMEOUT: Duration = Duration::from_secs(15);
/// Messages that may wait for the socket. Few: what waits here can no longer be overtaken by a lease, nor replaced by
/// a newer status.
const OUTGOING_MAX: usize = 16;
/// Messages of one batch, at most.
const GATHER_MAX: usize = 64;
/// A single message is worth compressing from this length on, in bytes.
const BATCH_WORTH_LEN: usize = 1024;
/// Time between two pings to a hub that has no beats; as often as KubeEdge's keepalive messages.
const STOCK_PING_INTERVAL: Duration = Duration::from_secs(15);
/// Beats when the hub has announced none, on a transport where there is nothing else.
const BEAT_UNAGREED: Duration = Duration::from_secs(25);
/// Time after which a refused token is looked at again; a person has to act first.
const REFUSED_INTERVAL: Duration = Duration::from_secs(60);
/// A link that lasted as long was a good one.
const GOOD_LINK: Duration = Duration::from_secs(25);
/// Tries with a short wait after a good link: about ten seconds, which is longer than most cuts.
const SHORT_WAITS: u32 = 20;
/// How long an answer may take on a link that has just been asked for one, in round trips and at least.
const ANSWER_ROUND_TRIPS: f64 = 1.5;
const ANSWER_WAIT_MIN: Duration = Duration::from_millis(150);
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(3);
/// The round trip of a link of which it is not known yet.
const ROUND_TRIP_UNKNOWN: Duration = Duration::from_millis(200);
/// Time between two probes of a silent link, and between two dials beside it, at first.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);
/// Later it is this part of the silence: an outage of a minute is noticed to be over within eight seconds, and costs some
/// thirty small packets.
const PROBE_SHARE: u32 = 8;
/// Dials at a time of a link in doubt. The oldest goes for a new one: its packets are repeated too seldom by now.
const DIALS_MAX: usize = 4;
/// Pause after a hub has not accepted a connection that was to take the place of one in doubt.
const REPLACE_PAUSE: Duration = Duration::from_secs(2);
/// How long a connection that has to move gets, when the old one is gone already.
const MOVE_TIMEOUT: Duration = Duration::from_secs(5);

/// What carries the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TLS over TCP.
    WebSocket,
    /// UDP.
    Quic,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WebSocket => "WebSocket",
            Self::Quic => "QUIC",
        })
    }
}

/// A message on its way to the hub.
#[derive(Debug)]
pub struct Outgoing {
    /// What is sent.
    pub message: Message,
    /// Whether [`LinkEvent::Written`] is to follow.
    pub report: bool,
}

impl Outgoing {
    fn take_report(&mut self) -> Option<MessageId> {
        std::mem::take(&mut self.report).then(|| self.message.header.msg_id.clone())
    }
}

/// Something from the hub that is no message.
#[derive(Debug, thiserror::Error)]
pub enum Garbled {
    /// By itself.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// In a batch.
    #[error(transparent)]
    Batch(#[from] BatchError),
}

/// What the link tells the agent.
#[derive(Debug)]
pub enum LinkEvent {
    /// The hub has accepted us; also when the link has moved to a better connection, without an end in between.
    Connected {
        /// What carries it.
        transport: Transport,
        /// What both ends can do beyond KubeEdge.
        capabilities: Capabilities,
        /// The way up of this connection; dropping it closes the connection.
        outgoing: mpsc::Sender<Outgoing>,
    },
    /// A message came.
    Message(Box<Message>),
    /// This message has left, as far as anybody can tell.
    Written(MessageId),
    /// Something came that is no message.
    Garbled(Garbled),
    /// The connection is gone; the next one is being dialled.
    Disconnected {
        /// Why, for the log.
        reason: String,
    },
    /// There is no certificate, and trying again will not help.
    NotEnrolled(EnrolError),
}

/// How the link is; kept in a channel for whoever shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LinkFacts {
    /// Absent while there is no link.
    pub transport: Option<Transport>,
    /// Address of the hub, as configured.
    pub hub: String,
    /// Since when, Unix seconds; of the present state.
    pub since_s: i64,
    /// Round trip in milliseconds, once known.
    pub rtt_ms: Option<u64>,
    /// What both ends can do, in the form of the handshake's header.
    pub capabilities: String,
    /// Bytes of this connection, without TLS and TCP, but with UDP's payload.
    pub bytes_in: u64,
    /// The other direction.
    pub bytes_out: u64,
    /// Why there is no link.
    pub reason: String,
}

/// What the link is given.
pub struct LinkParts {
    /// For the agent.
    pub events: mpsc::Sender<LinkEvent>,
    /// The credentials in use, for the tunnel and for renewal.
    pub credentials: watch::Sender<Option<Arc<Credentials>>>,
    /// The agent's lookups; certificates are renewed through them.
    pub lookups: mpsc::Sender<LookupRequest>,
    /// How the link is.
    pub facts: watch::Sender<LinkFacts>,
    /// Decides all jitter.
    pub seed: u64,
    /// What tests make shorter.
    pub timing: Timing,
}

/// Times that are not in the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// First time after which a link over WebSocket looks for QUIC.
    pub quic_retry: Duration,
    /// Time between two pings to a hub that has no beats.
    pub stock_ping: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self { quic_retry: RETRY_MIN, stock_ping: STOCK_PING_INTERVAL }
    }
}

/// Runs until `stop`; publishes the credentials it uses.
pub async fn run(config: Arc<Config>, parts: LinkParts, stop: CancellationToken) {
    let LinkParts { events, credentials, lookups, facts, seed, timing } = parts;
    let link = Link {
        config,
        events,
        credentials,
        lookups,
        facts,
        random: Random::new(seed),
        tls: None,
        timing,
    };
    stop.run_until_cancelled_owned(link.run()).await;
}

struct Link {
    config: Arc<Config>,
    events: mpsc::Sender<LinkEvent>,
    credentials: watch::Sender<Option<Arc<Credentials>>>,
    lookups: mpsc::Sender<LookupRequest>,
    facts: watch::Sender<LinkFacts>,
    random: Random,
    /// Made from the credentials beside it; keeps what is needed to resume.
    tls: Option<Tls>,
    timing: Timing,
}

#[derive(Clone)]
struct Tls {
    credentials: Arc<Credentials>,
    websocket: Arc<rustls::ClientConfig>,
    quic: quinn::ClientConfig,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    WebSocket(#[from] websocket::OpenError),
    #[error(transparent)]
    Quic(#[from] quic::OpenError),
    #[error("{websocket}; {quic}")]
    Both { quic: Box<DialError>, websocket: Box<DialError> },
}

impl DialError {
    /// When the hub wants to see us again, if it has said so.
    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::WebSocket(websocket::OpenError::Refused { retry_after, .. })
            | Self::Quic(quic::OpenError::Refused { retry_after, .. }) => *retry_after,
            Self::Both { quic, websocket } => quic.retry_after().or(websocket.retry_after()),
            _ => None,
        }
    }

    fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::WebSocket(websocket::OpenError::Refused { .. })
                | Self::Quic(quic::OpenError::Refused { .. })
        )
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("the connection broke")]
    Io(#[source] std::io::Error),
    #[error("the connection broke: {0}")]
    Quic(String),
    #[error("the hub broke the protocol: {0}")]
    Framing(String),
    #[error("nothing came for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("a message did not leave within {} s", WRITE_TIMEOUT.as_secs())]
    Stuck,
    #[error("the hub closed the connection")]
    Closed,
    #[error("the hub closed the connection: {0}")]
    ClosedWith(String),
    #[error("the certificate was renewed")]
    Renewed,
    #[error("closed by this agent")]
    Dropped,
}

type Ended = Result<Infallible, SessionError>;

/// A connection on which nothing was said yet.
type Dialled = Won<quic::Dialled, tokio_rustls::client::TlsStream<tokio::net::TcpStream>>;

/// A connection that the hub has accepted.
enum Opened {
    WebSocket(websocket::Opened),
    Quic(quic::Opened),
}

/// What a connection needs beside its socket.
struct Session {
    capabilities: Capabilities,
    events: mpsc::Sender<LinkEvent>,
    facts: watch::Sender<LinkFacts>,
    counters: Counters,
    stock_ping: Duration,
    /// The hub wants another certificate before it serves this node.
    renewal_asked: AtomicBool,
    /// Nothing came although something should: whether another connection is worth its while.
    doubt: watch::Sender<bool>,
}

/// Bytes of one connection.
#[derive(Default)]
struct Counters {
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
}

impl Counters {
    fn add_in(&self, len: usize) {
        self.bytes_in.fetch_add(len as u64, Ordering::Relaxed);
    }

    fn add_out(&self, len: usize) {
        self.bytes_out.fetch_add(len as u64, Ordering::Relaxed);
    }
}

impl Session {
    async fn tell(&self, event: LinkEvent) -> Result<(), SessionError> {
        self.events.send(event).await.map_err(|_| SessionError::Dropped)
    }

    fn set_doubt(&self, doubt: bool) {
        let changed = |known: &mut bool| std::mem::replace(known, doubt) != doubt;
        if self.doubt.send_if_modified(changed) {
            tracing::debug!(doubt, "whether the link is still there");
        }
    }

    /// How long an answer to what is sent now may take.
    fn answer_wait(&self) -> Duration {
        let known = self.facts.borrow().rtt_ms.map(Duration::from_millis);
        answer_wait(known.unwrap_or(ROUND_TRIP_UNKNOWN))
    }

    fn set_rtt(&self, rtt: Duration) {
        let rtt_ms = u64::try_from(rtt.as_millis()).ok();
        self.facts.send_modify(|facts| {
            facts.rtt_ms = rtt_ms;
            self.counters.copy_to(facts);
        });
    }
}

fn answer_wait(rtt: Duration) -> Duration {
    rtt.mul_f64(ANSWER_ROUND_TRIPS).clamp(ANSWER_WAIT_MIN, ANSWER_WAIT_MAX)
}

/// Time until a link that is silent for `silence` is probed again.
fn probe_wait(silence: Duration) -> Duration {
    (silence / PROBE_SHARE).max(PROBE_INTERVAL)
}

impl Counters {
    fn copy_to(&self, facts: &mut LinkFacts) {
        facts.bytes_in = self.bytes_in.load(Ordering::Relaxed);
        facts.bytes_out = self.bytes_out.load(Ordering::Relaxed);
    }
}

impl Link {
    async fn run(mut self) {
        let credentials = Arc::new(self.enrolled().await);
        self.credentials.send_replace(Some(credentials));
        let renewal = enrol::keep_renewed(
            self.config.clone(),
            self.credentials.clone(),
            self.lookups.clone(),
            self.random.next_u64(),
        );
        tokio::join!(self.dial_for_ever(), renewal);
    }

    async fn dial_for_ever(&mut self) {
        let mut backoff = Backoff::new(self.random.next_u64());
        let mut short = Backoff::between(
            Duration::from_secs(1),
            Duration::from_secs(1),
            self.random.next_u64(),
        );
        let mut memory = Memory::new(self.timing.quic_retry);
        let mut network = Network::look();
        for place in (0..self.config.hubs.len()).cycle() {
            let started = Instant::now();
            let connected = loop {
                let before = memory;
                tokio::select! {
                    connected = self.connect(place, &mut memory) => break connected,
                    // What was sent before that is repeated too seldom by now.
                    () = network.changed(LOOK_INTERVAL_DOWN) => memory = before,
                }
            };
            let (reason, told) = match connected {
                Ok((opened, capabilities)) => {
                    let error =
                        self.serve(place, opened, capabilities, &mut memory, &mut network).await;
                    (chain(&error), None)
                }
                Err(error) => {
                    let told = error.retry_after();
                    if error.is_refusal() && told.is_none() {
                        // Revoked, perhaps: a new certificate, or a new token, is the only way back.
                        self.credentials.borrow().iter().for_each(|current| current.ask_renewal());
                    }
                    (chain(&error), told)
                }
            };
            // A hub that lets us in and throws us out again must not be hammered either.
            if started.elapsed() > GOOD_LINK {
                backoff.reset();
                short.reset();
            }
            let wait = match told {
                Some(told) => told,
                None if short.failures() < SHORT_WAITS => short.next_wait(),
                None => backoff.next_wait(),
            };
            self.facts.send_modify(|facts| {
                if facts.transport.take().is_some() {
                    facts.since_s = jiff::Timestamp::now().as_second();
                }
                facts.rtt_ms = None;
                facts.reason.clone_from(&reason);
            });
            let reason = format!("{reason}; dialling again in {wait:.1?}");
            if self.events.send(LinkEvent::Disconnected { reason }).await.is_err() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // What the hub has told is for its own sake.
                () = network.changed(LOOK_INTERVAL_DOWN), if told.is_none() => {
                    memory = Memory::new(self.timing.quic_retry);
                    backoff.reset();
                    short.reset();
                }
            }
        }
    }

    async fn enrolled(&mut self) -> Credentials {
        let mut backoff = Backoff::new(self.random.next_u64());
        loop {
            let wait = match enrol::ensure(&self.config).await {
                Ok(credentials) => return credentials,
                Err(error) if error.is_transient() => {
                    let wait = backoff.next_wait();
                    tracing::warn!(error = chain(&error), ?wait, "no certificate yet");
                    self.facts.send_modify(|facts| facts.reason = chain(&error));
                    wait
                }
                Err(error) => {
                    let _ = self.events.send(LinkEvent::NotEnrolled(error)).await;
                    REFUSED_INTERVAL
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// The configurations for the credentials of now; those of the last dial, as long as the credentials are the same.
    fn tls(&self) -> Result<Tls, DialError> {
        let credentials = self.credentials.borrow().clone().expect("set before the first dial");
        let kept = self.tls.as_ref().filter(|tls| Arc::ptr_eq(&tls.credentials, &credentials));
        if let Some(tls) = kept {
            return Ok(tls.clone());
        }
        let websocket = credentials.client_config()?;
        let silence_max = self.ours().silence_max().unwrap_or(BEAT_UNAGREED * 2);
        let quic = quic::client_config(&websocket, silence_max)?;
        Ok(Tls { credentials, websocket, quic })
    }

    fn ours(&self) -> Capabilities {
        Capabilities::ours(self.config.beat)
    }

    /// Dials one hub, over QUIC and WebSocket side by side, until it has accepted us.
    async fn connect(
        &mut self,
        place: usize,
        memory: &mut Memory,
    ) -> Result<(Opened, Capabilities), DialError> {
        let tls = self.tls()?;
        self.tls = Some(tls.clone());
        match self.dial(place, tls.clone(), memory.head_start()).await? {
            Won::Quic(dialled) => match self.open(place, Won::Quic(dialled)).await {
                Ok(opened) => {
                    memory.handle_success(self.timing.quic_retry);
                    Ok(opened)
                }
                Err(error) if error.is_refusal() => Err(error),
                Err(error) => {
                    memory.handle_failure();
                    tracing::debug!(error = chain(&error), "QUIC is up but of no use");
                    let hub = &self.config.hubs[place];
                    let stream = tls::connect(hub, tls.websocket).await?;
                    self.open(place, Won::WebSocket(stream)).await
                }
            },
            stream @ Won::WebSocket(_) => {
                if self.config.quic_of(place).is_some() {
                    memory.handle_failure();
                }
                self.open(place, stream).await
            }
        }
    }

    /// A connection to one hub on which nothing was said yet.
    async fn dial(
        &self,
        place: usize,
        tls: Tls,
        head_start: Duration,
    ) -> Result<Dialled, DialError> {
        let hub = &self.config.hubs[place];
        let Some(quic_hub) = self.config.quic_of(place) else {
            return Ok(Won::WebSocket(tls::connect(hub, tls.websocket).await?));
        };
        let quic = async { quic::dial(&quic_hub, tls.quic).await.map_err(DialError::from) };
        let websocket = async { tls::connect(hub, tls.websocket).await.map_err(DialError::from) };
        let won = race::race(quic, head_start, websocket).await;
        won.map_err(|(quic, websocket)| DialError::Both {
            quic: Box::new(quic),
            websocket: Box::new(websocket),
        })
    }

    /// Says who we are, and waits until the hub agrees.
    async fn open(
        &self,
        place: usize,
        dialled: Dialled,
    ) -> Result<(Opened, Capabilities), DialError> {
        match dialled {
            Won::Quic(dialled) => {
                let opened = quic::open(dialled, &self.config.node_name, self.ours()).await;
                let (opened, agreed) = opened?;
                Ok((Opened::Quic(opened), agreed))
            }
            Won::WebSocket(stream) => self.open_websocket(&self.config.hubs[place], stream).await,
        }
    }

    async fn open_websocket(
        &self,
        hub: &Endpoint,
        stream: tokio_rustls::client::TlsStream<tokio::net::TcpStream>,
    ) -> Result<(Opened, Capabilities), DialError> {
        let node = &self.config.node_name;
        let (opened, agreed) = websocket::open(hub, stream, node, self.ours()).await?;
        Ok((Opened::WebSocket(opened), agreed))
    }

    /// Carries messages until there is no connection any more; moves from WebSocket to QUIC when it can.
    async fn serve(
        &mut self,
        place: usize,
        mut opened: Opened,
        mut capabilities: Capabilities,
        memory: &mut Memory,
        network: &mut Network,
    ) -> SessionError {
        let hub = self.config.hubs[place].to_string();
        let (changes, network_seen) = watch::channel(0);
        loop {
            let transport = opened.transport();
            let (outgoing, to_send) = mpsc::channel(OUTGOING_MAX);
            self.facts.send_replace(LinkFacts {
                transport: Some(transport),
                hub: hub.clone(),
                since_s: jiff::Timestamp::now().as_second(),
                capabilities: capabilities.to_string(),
                ..LinkFacts::default()
            });
            let session = Arc::new(Session {
                capabilities,
                events: self.events.clone(),
                facts: self.facts.clone(),
                counters: Counters::default(),
                stock_ping: self.timing.stock_ping,
                renewal_asked: AtomicBool::new(false),
                doubt: watch::Sender::new(false),
            });
            let connected = LinkEvent::Connected { transport, capabilities, outgoing };
            if let Err(error) = session.tell(connected).await {
                return error;
            }
            let seen = network_seen.clone();
            // A stock hub has no such QUIC, and one that becomes ours has to restart for it.
            let quic_hub = self.config.quic_of(place).filter(|_| {
                transport == Transport::WebSocket && capabilities != Capabilities::default()
            });
            let renewed = renewed(self.credentials.subscribe(), &session);
            let asked = AtomicBool::new(false);
            let moved = {
                let carry = async {
                    match opened {
                        Opened::WebSocket(opened) => {
                            websocket::run(opened, &session, to_send, seen).await
                        }
                        Opened::Quic(opened) => quic::run(opened, &session, to_send, seen).await,
                    }
                };
                let watch_network = async {
                    loop {
                        network.changed(LOOK_INTERVAL_UP).await;
                        changes.send_modify(|count| *count += 1);
                    }
                };
                let doubt = session.doubt.subscribe();
                let head_start = memory.head_start();
                let other = self.replace(place, head_start, doubt, changes.subscribe(), &asked);
                let better = self.find_quic(quic_hub, memory, changes.subscribe(), &asked);
                let better = async {
                    tokio::select! {
                        other = other => other,
                        better = better => better,
                    }
                };
                let (mut carry, mut better) = (std::pin::pin!(carry), std::pin::pin!(better));
                tokio::select! {
                    biased;
                    better = &mut better => Ok(better),
                    Err(error) = &mut carry => match asked.load(Ordering::Relaxed) || *session.doubt.borrow() {
                        // The hub ends the old connection when it takes the new one, and may be faster with that.
                        true => match tokio::time::timeout(MOVE_TIMEOUT, better).await {
                            Ok(better) => Ok(better),
                            Err(_) => Err(error),
                        },
                        false => Err(error),
                    },
                    () = renewed => Err(SessionError::Renewed),
                    () = watch_network => unreachable!("looks for ever"),
                }
            };
            let (bytes_in, bytes_out) = (
                session.counters.bytes_in.load(Ordering::Relaxed),
                session.counters.bytes_out.load(Ordering::Relaxed),
            );
            tracing::debug!(%transport, bytes_in, bytes_out, "a connection has ended");
            match moved {
                Ok((better, agreed)) => {
                    let next = better.transport();
                    tracing::info!(
                        "the link moves from {transport} to {}",
                        match next == transport {
                            true => "another connection".to_owned(),
                            false => next.to_string(),
                        }
                    );
                    if next == Transport::Quic {
                        memory.handle_success(self.timing.quic_retry);
                    }
                    opened = better;
                    capabilities = agreed;
                }
                Err(error) => {
                    self.facts.send_modify(|facts| session.counters.copy_to(facts));
                    return error;
                }
            }
        }
    }

    /// Whenever the link is in doubt: dials beside it, until the link speaks again or the hub has accepted another
    /// connection.
    async fn replace(
        &self,
        place: usize,
        head_start: Duration,
        mut doubt: watch::Receiver<bool>,
        changes: watch::Receiver<u64>,
        asked: &AtomicBool,
    ) -> (Opened, Capabilities) {
        loop {
            if doubt.wait_for(|doubt| *doubt).await.is_err() {
                return std::future::pending().await;
            }
            let dialled = tokio::select! {
                dialled = self.dial_again_and_again(place, head_start, changes.clone()) => dialled,
                _ = doubt.wait_for(|doubt| !*doubt) => continue,
            };
            asked.store(true, Ordering::Relaxed);
            let pause = match self.open(place, dialled).await {
                Ok(opened) => return opened,
                Err(error) => {
                    tracing::debug!(error = chain(&error), "no other connection");
                    error.retry_after().unwrap_or(REPLACE_PAUSE)
                }
            };
            asked.store(false, Ordering::Relaxed);
            tokio::time::sleep(pause).await;
        }
    }

    /// Begins a new dial now and then, less and less often, until one of them is up. Each begins with packets of its own,
    /// so that the first one that gets through is not long after the way is open.
    async fn dial_again_and_again(
        &self,
        place: usize,
        head_start: Duration,
        mut changes: watch::Receiver<u64>,
    ) -> Dialled {
        let started = Instant::now();
        let mut dials = std::collections::VecDeque::new();
        loop {
            match self.tls() {
                Ok(tls) => {
                    if dials.len() == DIALS_MAX {
                        dials.pop_front();
                    }
                    dials.push_back(Box::pin(self.dial(place, tls, head_start)));
                }
                Err(error) => tracing::debug!(error = chain(&error), "no dial"),
            }
            let mut next = std::pin::pin!(tokio::time::sleep(probe_wait(started.elapsed())));
            loop {
                let up = std::future::poll_fn(|cx| {
                    for index in 0..dials.len() {
                        if let Poll::Ready(done) = dials[index].as_mut().poll(cx) {
                            drop(dials.remove(index));
                            return Poll::Ready(done);
                        }
                    }
                    Poll::Pending
                });
                tokio::select! {
                    done = up => match done {
                        Ok(dialled) => return dialled,
                        Err(error) => tracing::debug!(error = chain(&error), "a dial failed"),
                    },
                    () = &mut next => break,
                    Ok(()) = changes.changed() => break,
                }
            }
        }
    }

    /// Waits until QUIC is up and the hub has accepted us there; never ends without a hub to ask. `asked` is set while
    /// the hub may move the link.
    async fn find_quic(
        &self,
        hub: Option<Endpoint>,
        memory: &mut Memory,
        mut changes: watch::Receiver<u64>,
        asked: &AtomicBool,
    ) -> (Opened, Capabilities) {
        let Some(hub) = hub else { return std::future::pending().await };
        loop {
            let wait = memory.next_retry();
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                Ok(()) = changes.changed() => *memory = Memory::new(self.timing.quic_retry),
            }
            let dialled = async { Ok::<_, DialError>(quic::dial(&hub, self.tls()?.quic).await?) };
            let dialled = match dialled.await {
                Ok(dialled) => dialled,
                Err(error) => {
                    tracing::debug!(error = chain(&error), "still no QUIC");
                    continue;
                }
            };
            asked.store(true, Ordering::Relaxed);
            match quic::open(dialled, &self.config.node_name, self.ours()).await {
                Ok((found, agreed)) => return (Opened::Quic(found), agreed),
                Err(error) => tracing::debug!(error = chain(&error), "QUIC is up but of no use"),
            }
            asked.store(false, Ordering::Relaxed);
        }
    }
}

impl Opened {
    fn transport(&self) -> Transport {
        match self {
            Self::WebSocket(_) => Transport::WebSocket,
            Self::Quic(_) => Transport::Quic,
        }
    }
}

/// Ends when there is a new certificate and the old one was of limited use: it had run out, or the hub has said so.
async fn renewed(mut credentials: watch::Receiver<Option<Arc<Credentials>>>, session: &Session) {
    let now_s = jiff::Timestamp::now().as_second();
    let used = credentials.borrow_and_update().as_ref().map(|used| used.identity.clone());
    let Some(used) = used else { return std::future::pending().await };
    let limited = || used.not_after <= now_s || session.renewal_asked.load(Ordering::Relaxed);
    let replaced = |now: &Option<Arc<Credentials>>| {
        now.as_ref().is_some_and(|now| now.identity.pem != used.pem) && limited()
    };
    if credentials.wait_for(replaced).await.is_err() {
        std::future::pending().await
    }
}

async fn deliver(session: &Session, bytes: &[u8]) -> Result<(), SessionError> {
    let event = match Message::decode(bytes) {
        Ok(message) => return deliver_message(session, message).await,
        Err(error) => LinkEvent::Garbled(error.into()),
    };
    session.tell(event).await
}

async fn deliver_message(session: &Session, message: Message) -> Result<(), SessionError> {
    let asked = message.header.parent_msg_id.is_empty()
        && certificate::request_node(&message.route.resource).is_some();
    if asked {
        session.renewal_asked.store(true, Ordering::Relaxed);
    }
    session.tell(LinkEvent::Message(Box::new(message))).await
}

async fn deliver_batch(session: &Session, bytes: &[u8]) -> Result<(), SessionError> {
    match batch::decode(bytes, skerry_protocol::message::MESSAGE_LEN_MAX) {
        Ok(messages) => {
            for message in messages {
                deliver_message(session, message).await?;
            }
            Ok(())
        }
        Err(error) => session.tell(LinkEvent::Garbled(error.into())).await,
    }
}

/// `first`, and what else is due, up to the bounds of a batch.
fn gather(first: Outgoing, more: &mut mpsc::Receiver<Outgoing>) -> Vec<Outgoing> {
    let mut len = first.message.len_hint();
    let mut due = vec![first];
    while due.len() < GATHER_MAX && len < batch::BATCH_LEN {
        let Ok(next) = more.try_recv() else { break };
        len += next.message.len_hint();
        due.push(next);
    }
    due
}

fn is_worth_a_batch(due: &[Outgoing]) -> bool {
    due.len() > 1 || due.iter().any(|one| one.message.len_hint() >= BATCH_WORTH_LEN)
}

fn bounded_retry(ms: u64) -> Duration {
    Duration::from_millis(ms).min(RETRY_AFTER_MAX)
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}
