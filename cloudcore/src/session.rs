//! One node's connection, from the moment that it is admitted until it ends: one task that owns the transport, the
//! queue of messages and the node's quotas.
//!
//! The task polls everything that can happen to the session, in this order: what ends it, what the hub has, the answer
//! to the request at work, room to write, what the node sent, time. Requests are answered one after the other, so that
//! two patches of one node cannot overtake each other; the future that answers exists only while there is a request.
//! An idle session so has one task, no channel with room to speak of and no buffer.
//!
//! # Bounds
//!
//! A node that sends faster than its quota is read more slowly. A node whose requests are not answered yet is not read
//! at all, beyond [`REQUESTS_MAX`] of them or [`REQUEST_BYTES_MAX`]. What is no message is charged to a small quota of
//! its own, and a node that uses that up is cut off and told so. A node that does not read, or asks for more and more
//! without acknowledging the answers, is cut off after [`WRITE_TIMEOUT`] without progress; until then it costs what [`skerry_protocol::delivery`] and
//! [`crate::transport::OUT_HIGH`] allow.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/cloudhub/handler and cloud/pkg/cloudhub/session.

mod quota;

use crate::gate::Gate;
use crate::hub::Hub;
use crate::leases::Leases;
use crate::listen::Place;
use crate::monitor::{Counters, LinkState, Links, Listed, Numbers};
use crate::renewal::Renewals;
use crate::tls::Peer;
use crate::transport::{Farewell, Kind, OUT_HIGH, Received, Transport, TransportError};
use crate::upstream::Upstream;
use bytes::Bytes;
use quota::Quota;
use serde::Deserialize;
use skerry_cloudcore_core::downstream::{Input, SessionId};
use skerry_cloudcore_core::identity::Standing;
use skerry_protocol::capability::Capabilities;
use skerry_protocol::delivery::{Delivery, Event, Settings};
use skerry_protocol::message::{Header, Route, UPSTREAM_LEN_MAX, raw};
use skerry_protocol::{Class, Message, Operation, batch, certificate, digest};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A connection of a KubeEdge edge without a keepalive for this long is dead; other traffic does not count. KubeEdge's
/// `cloudHub.keepaliveInterval`; nodes send one every 15 s.
pub(crate) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(30);
/// A node that takes no byte for this long, while something waits for it, is cut off.
const WRITE_TIMEOUT: Duration = Duration::from_secs(15);
/// Commands of the hub that the session has not taken; with more, the hub ends the session.
const COMMANDS_MAX: usize = 1024;
/// Commands taken at once, so that they can leave in one frame.
const COMMANDS_AT_ONCE: usize = 256;
/// Requests of one node not yet answered; the node is not read while there are as many.
const REQUESTS_MAX: usize = 256;
/// Their bytes, likewise. One request may be as long as [`UPSTREAM_LEN_MAX`].
const REQUEST_BYTES_MAX: usize = 512 * 1024;
/// Bytes of a message that a node makes itself: registration, statuses, events, requests. A Node with fifty images has
/// 30 KiB. What is parsed into values takes several times as much memory.
const PLAIN_LEN_MAX: usize = 512 * 1024;
/// Bytes of a digest: ten thousand objects.
const DIGEST_LEN_MAX: usize = 1024 * 1024;
/// With this much waiting for the node, its next request waits as well: its answer would only make it more.
const ANSWER_BACKLOG_MAX: usize = 1024 * 1024;
/// Bytes of messages in one batch, before compression, from which it is sent.
const BATCH_LEN: usize = skerry_protocol::batch::BATCH_LEN;
/// Messages with less than this together go one by one: compressing them costs more than they do.
const BATCH_LEN_MIN: usize = 1024;
/// Messages in one batch; the reader takes [`batch::MESSAGES_MAX`].
const BATCH_MESSAGES: usize = 512;
/// The lease of a node needs no more signs of life than one in this time.
const LEASE_BEAT_MIN: Duration = Duration::from_secs(1);
/// Time between two probes of a silent QUIC connection that owes acknowledgements, at first; QUIC itself asks less and
/// less often, and would find a healed path only after as long as it was broken.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);
/// Later it is this part of the silence.
const PROBE_SHARE: u32 = 8;
/// Looks that find a sign of life, until there are no more for the same messages.
const PROBE_ANSWERS: u32 = 4;
/// How long a node may take to acknowledge, beyond two round trips, before it counts as silent: it writes to its disk
/// before.
const PROBE_PATIENCE: Duration = Duration::from_millis(300);
/// A session that may only renew its certificate has to be done by then.
const RENEWAL_TIME: Duration = Duration::from_secs(60);
/// And goes away this long after its new certificate.
const RENEWED_TIME: Duration = Duration::from_secs(5);

/// A message without its content.
#[derive(Deserialize)]
struct Envelope {
    #[serde(default)]
    header: Header,
    #[serde(default)]
    route: Route,
}

/// Bytes of a message of a node, by what it is: what applications write or upload may be long.
fn len_max(route: &Route) -> usize {
    match Operation::parse(&route.operation) {
        Some(Operation::Application | Operation::Upload) => UPSTREAM_LEN_MAX,
        _ if route.group == "user" => UPSTREAM_LEN_MAX,
        _ if route.resource == digest::RESOURCE => DIGEST_LEN_MAX,
        _ => PLAIN_LEN_MAX,
    }
}

/// What the hub tells a session.
pub(crate) enum Command {
    /// Deliver this.
    Send(Box<Message>),
    /// End, for this reason.
    Close(&'static str),
}

/// What all sessions share.
pub(crate) struct Shared {
    pub(crate) hub: Hub,
    pub(crate) upstream: Arc<Upstream>,
    pub(crate) leases: Leases,
    pub(crate) gate: Gate,
    pub(crate) renewals: Renewals,
    /// Wakes when a certificate may not count any more, and when the set of CAs changes.
    pub(crate) identity_changes: watch::Receiver<u64>,
    pub(crate) links: Links,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
}

/// A connection whose node is known and admitted.
pub(crate) struct Opened {
    pub(crate) transport: Transport,
    pub(crate) identity: Peer,
    pub(crate) standing: Standing,
    pub(crate) capabilities: Capabilities,
    pub(crate) address: SocketAddr,
    pub(crate) place: Option<Place>,
}

/// How a node that owes acknowledgements is asked for a sign of life.
#[derive(Clone, Copy)]
struct Probe {
    since: Instant,
    /// The next time; none once it has answered often enough: QUIC knows then what was lost, and a node that only
    /// acknowledges packets must not be kept alive by them.
    at: Option<Instant>,
    answered: u32,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the node closed the connection")]
    Closed,
    #[error("{0}")]
    Transport(#[from] TransportError),
    #[error("{0}")]
    Hub(&'static str),
    #[error("{0}")]
    Refused(String),
    #[error("the certificate expired; renew it and connect again")]
    Expired,
    #[error("the time for a renewal is over")]
    RenewalOver,
    #[error("the node does not take its messages")]
    Slow,
    #[error("no keepalive for {} s", KEEPALIVE_TIMEOUT.as_secs())]
    NoKeepalive,
    #[error("no byte for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("too much of what the node sends is no message: {0}")]
    Junk(String),
    #[error("cloudcore is stopping")]
    Stopping,
}

impl End {
    fn farewell(&self) -> Option<Farewell> {
        let (code, talks) = match self {
            Self::Closed | Self::Transport(TransportError::Broken(_)) => return None,
            Self::Transport(TransportError::OverBound) => (1009, true),
            Self::Transport(TransportError::Malformed(_)) => (1002, true),
            Self::Junk(_) => (1008, true),
            Self::Hub(_)
            | Self::Refused(_)
            | Self::Expired
            | Self::RenewalOver
            | Self::Slow
            | Self::NoKeepalive
            | Self::Silent(_) => (1008, false),
            Self::Stopping => (1001, false),
        };
        Some(Farewell { code, reason: self.to_string(), talks })
    }

    fn count(&self, counters: &Counters) {
        match self {
            Self::Junk(_) | Self::Transport(TransportError::Malformed(_)) => {
                counters.cut_for_junk.add(1);
            }
            Self::Transport(TransportError::OverBound) => counters.over_bound.add(1),
            Self::Slow => counters.slow_readers.add(1),
            Self::NoKeepalive | Self::Silent(_) => counters.silent.add(1),
            _ => {}
        }
    }
}

/// What the next step of a session is about.
enum Happened {
    End(End),
    Command(Command),
    /// The request at work has this answer.
    Answer(Answer),
    /// Certificates or CAs changed.
    Identity,
    /// There is room to write again.
    Room,
    Received(Received),
    Tick,
}

/// What became of a request: the message that answers it, and the end of the node's new certificate if it has one now.
type Answer = (Option<Message>, Option<Peer>);
type Answering = Pin<Box<dyn Future<Output = Answer> + Send>>;
type Change = Pin<Box<dyn Future<Output = watch::Receiver<u64>> + Send>>;

/// Starts the session of an admitted node, in a task of its own.
pub(crate) fn spawn(shared: &Arc<Shared>, opened: Opened) {
    let shared = Arc::clone(shared);
    // Boxed whole: the task's room is then one allocation of the size of a session, and not of everything that led to it.
    shared.tasks.clone().spawn(Box::pin(run(shared, opened)));
}

async fn run(shared: Arc<Shared>, opened: Opened) {
    let Opened { transport, identity, standing, capabilities, address, place } = opened;
    let node: Arc<str> = identity.node.as_str().into();
    let (commands, id) = match standing {
        Standing::RenewOnly => (None, None),
        Standing::Full => {
            let (sender, commands) = mpsc::channel(COMMANDS_MAX);
            let Some(id) = shared.hub.connected(&node, capabilities, sender).await else { return };
            (Some(commands), Some(id))
        }
    };
    let kind = transport.kind();
    tracing::info!(
        node = &*node, session = id, transport = kind.name(), peer = %address, %capabilities, "node connected"
    );
    let mut session =
        Session::new(&shared, transport, identity, capabilities, address, commands, id, node);
    let node = Arc::clone(&session.node);
    if id.is_some() {
        if capabilities.lease {
            shared.leases.up(&node).await;
        }
        shared.upstream.connected(&node).await;
    }
    let end = session.run().await;
    if let Some(session) = id {
        if capabilities.lease {
            shared.leases.down(&node).await;
        }
        let node = node.to_string();
        shared.hub.input(Input::Disconnected { node, session }).await;
    }
    end.count(&shared.links.counters);
    tracing::info!(node = &*node, session = id, reason = %end, "node disconnected");
    let Session { transport, answering, requests, listed, identity, .. } = session;
    drop(listed);
    // A newer connection of the node may be there already, or come while this is said.
    if id.is_some() && !shared.links.has(&node) {
        shared.upstream.disconnected(&node).await;
        if shared.links.has(&node) {
            shared.upstream.connected(&node).await;
        }
    }
    if answering.is_some() {
        // Nobody waits for the answers, but what the node asked for before it went is still done.
        shared.tasks.spawn(finish(Arc::clone(&shared), identity, answering, requests));
    }
    Box::pin(transport.close(end.farewell())).await;
    drop(place);
}

async fn finish(
    shared: Arc<Shared>,
    identity: Arc<Peer>,
    answering: Option<Answering>,
    requests: VecDeque<Request>,
) {
    let all = async {
        if let Some(answering) = answering {
            answering.await;
        }
        for request in requests {
            answer(&shared, &identity, &request.message, false).await;
        }
    };
    tokio::select! {
        () = shared.stop.cancelled() => {}
        () = all => {}
    }
}

struct Request {
    message: Message,
    len: usize,
}

/// The owner of one connection.
struct Session {
    shared: Arc<Shared>,
    node: Arc<str>,
    identity: Arc<Peer>,
    capabilities: Capabilities,
    /// The hub's number for it; `None` while only a renewal is allowed.
    id: Option<SessionId>,
    transport: Transport,
    delivery: Delivery,
    commands: Option<mpsc::Receiver<Command>>,
    requests: VecDeque<Request>,
    /// Bytes of `requests` and of the one at work.
    request_bytes: usize,
    answering: Option<Answering>,
    answering_len: usize,
    change: Change,
    /// The set of CAs that the node was told last.
    told_cas: Option<u64>,
    quota: Quota,
    listed: Listed,
    /// Messages that wait for room to be written.
    starved: bool,
    /// Since when nothing has been written although something waits, and how much waited then.
    stalled: Option<(Instant, usize)>,
    heard: Instant,
    /// When the task that keeps leases was told last that the node is alive.
    lease_told: Instant,
    /// When the node is given up unless it is heard before.
    alive_until: Instant,
    /// The node is not read before this.
    slowed_until: Option<Instant>,
    /// The node was not read at the last look, because of its requests.
    full: bool,
    /// Since when its requests wait because it does not take the answers to earlier ones.
    choked: Option<Instant>,
    ends_at: Option<Instant>,
    /// While the node owes acknowledgements. QUIC only.
    probe: Option<Probe>,
    timer: Pin<Box<Sleep>>,
    messages_in: u64,
    messages_out: u64,
    /// Whether the log says already that this node sends what is no message, or reports errors.
    garbled: bool,
    complained: bool,
}

impl Session {
    #[expect(clippy::too_many_arguments, reason = "one caller, which has just got them all")]
    fn new(
        shared: &Arc<Shared>,
        transport: Transport,
        identity: Peer,
        capabilities: Capabilities,
        address: SocketAddr,
        commands: Option<mpsc::Receiver<Command>>,
        id: Option<SessionId>,
        node: Arc<str>,
    ) -> Self {
        let now = Instant::now();
        let (now_s, now_ms) = clock();
        let settings = if capabilities.window { Settings::ours() } else { Settings::stock() };
        let window = settings.window;
        let state = LinkState::new(
            Arc::clone(&node),
            transport.kind(),
            address,
            capabilities,
            window,
            identity.not_after_s,
            now_ms,
        );
        let counters = &shared.links.counters;
        match transport.kind() {
            Kind::WebSocket => counters.accepted_websocket.add(1),
            Kind::Quic => counters.accepted_quic.add(1),
        }
        let ends_at = match id {
            Some(_) => in_seconds(now, identity.not_after_s.saturating_sub(now_s)),
            None => Some(now + RENEWAL_TIME),
        };
        Self {
            listed: shared.links.enter(state, id.is_some()),
            shared: Arc::clone(shared),
            node,
            identity: Arc::new(identity),
            capabilities,
            id,
            transport,
            delivery: Delivery::new(settings),
            commands,
            requests: VecDeque::new(),
            request_bytes: 0,
            answering: None,
            answering_len: 0,
            change: next_change(shared.identity_changes.clone()),
            told_cas: None,
            quota: Quota::new(capabilities, now),
            starved: false,
            stalled: None,
            heard: now,
            lease_told: now,
            alive_until: now + silence_max(capabilities),
            slowed_until: None,
            full: false,
            choked: None,
            ends_at,
            probe: None,
            timer: Box::pin(tokio::time::sleep_until(now.into())),
            messages_in: 0,
            messages_out: 0,
            garbled: false,
            complained: false,
        }
    }

    async fn run(&mut self) -> End {
        let shared = Arc::clone(&self.shared);
        let mut stopped = pin!(shared.stop.cancelled());
        if let Err(end) = self.begin() {
            return end;
        }
        loop {
            let happened = poll_fn(|cx| {
                if stopped.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Happened::End(End::Stopping));
                }
                self.poll_happened(cx)
            })
            .await;
            // On the heap while it runs: an idle session does not keep room for what it may have to do.
            if let Err(end) = Box::pin(self.handle(happened)).await {
                return end;
            }
            if let Err(end) = self.fill() {
                return end;
            }
            while let Some(event) = self.delivery.poll_event() {
                Box::pin(self.report(event)).await;
            }
            self.tell_numbers();
        }
    }

    /// What a node is told before it says anything.
    fn begin(&mut self) -> Result<(), End> {
        if self.id.is_none() {
            // Its clock may be wrong, so that it does not know that its certificate has expired.
            let demand = self.shared.renewals.demand(&self.node);
            self.deliver(demand)?;
        }
        self.look_at_identity()?;
        self.fill()
    }

    fn poll_happened(&mut self, cx: &mut Context<'_>) -> Poll<Happened> {
        if let Poll::Ready(changes) = self.change.as_mut().poll(cx) {
            self.change = next_change(changes);
            return Poll::Ready(Happened::Identity);
        }
        if let Some(commands) = &mut self.commands
            && let Poll::Ready(command) = commands.poll_recv(cx)
        {
            // The hub drops the sender of a session whose commands it could not pass on.
            return Poll::Ready(command.map_or(Happened::End(End::Slow), Happened::Command));
        }
        if let Some(answering) = &mut self.answering
            && let Poll::Ready(answer) = answering.as_mut().poll(cx)
        {
            return Poll::Ready(Happened::Answer(answer));
        }
        let before = self.transport.unwritten();
        match self.transport.poll_flush(cx) {
            Poll::Ready(Err(error)) => return Poll::Ready(Happened::End(error.into())),
            Poll::Ready(Ok(())) => self.stalled = None,
            Poll::Pending => {
                let left = self.transport.unwritten();
                if left < before || self.stalled.is_none_or(|(_, waited)| left < waited) {
                    self.stalled = Some((Instant::now(), left));
                }
            }
        }
        if self.starved && self.transport.unwritten() < OUT_HIGH / 2 {
            return Poll::Ready(Happened::Room);
        }
        let is_read = self.slowed_until.is_none() && !self.full;
        if is_read && let Poll::Ready(received) = self.transport.poll_receive(cx) {
            return Poll::Ready(match received {
                Ok(received) => Happened::Received(received),
                Err(error) => Happened::End(error.into()),
            });
        }
        let deadline = self.deadline();
        if self.timer.deadline() != deadline.into() {
            self.timer.as_mut().reset(deadline.into());
        }
        self.timer.as_mut().poll(cx).map(|()| Happened::Tick)
    }

    /// When there is something to do although nothing happens.
    fn deadline(&self) -> Instant {
        let stalled = self.stalled.map(|(since, _)| since + WRITE_TIMEOUT);
        let silent = (!self.full).then_some(self.alive_until);
        // While what is due cannot be written, its time does not matter.
        let due = self.delivery.poll_timeout().filter(|_| !self.starved);
        let choked = self.choked.map(|since| since + WRITE_TIMEOUT);
        let probe = self.probe.and_then(|probe| probe.at);
        let all = [stalled, choked, silent, due, self.slowed_until, self.ends_at, probe];
        all.into_iter().flatten().min().unwrap_or_else(|| Instant::now() + KEEPALIVE_TIMEOUT)
    }

    async fn handle(&mut self, happened: Happened) -> Result<(), End> {
        match happened {
            Happened::End(end) => Err(end),
            Happened::Command(command) => self.obey(command),
            Happened::Identity => self.look_at_identity(),
            Happened::Answer((answer, renewed)) => {
                self.answering = None;
                self.request_bytes -= std::mem::take(&mut self.answering_len);
                if let Some(identity) = renewed {
                    self.renewed(identity);
                }
                match answer {
                    Some(answer) => self.deliver(answer),
                    None => Ok(()),
                }
            }
            Happened::Room => Ok(()),
            Happened::Received(received) => self.receive(received).await,
            Happened::Tick => self.tick(),
        }
    }

    /// Takes a command of the hub, and those behind it.
    fn obey(&mut self, first: Command) -> Result<(), End> {
        let mut next = Some(first);
        for _ in 0..COMMANDS_AT_ONCE {
            match next {
                Some(Command::Send(message)) => self.deliver(*message)?,
                Some(Command::Close(reason)) => return Err(End::Hub(reason)),
                None => break,
            }
            next = self.commands.as_mut().and_then(|commands| commands.try_recv().ok());
        }
        match next {
            Some(Command::Send(message)) => self.deliver(*message),
            Some(Command::Close(reason)) => Err(End::Hub(reason)),
            None => Ok(()),
        }
    }

    /// Ends the session of a certificate that does not count any more, and tells the node of new CAs.
    fn look_at_identity(&mut self) -> Result<(), End> {
        if let Err(refusal) = self.shared.gate.check(&self.identity) {
            return Err(End::Refused(refusal.to_string()));
        }
        let cas = *self.shared.renewals.bundle_changes().borrow();
        if self.capabilities.renew && self.id.is_some() && self.told_cas != Some(cas) {
            self.told_cas = Some(cas);
            if let Some(bundle) = self.shared.renewals.bundle(&self.node) {
                return self.deliver(bundle);
            }
        }
        Ok(())
    }

    /// The node has a new certificate.
    fn renewed(&mut self, identity: Peer) {
        let not_after_s = identity.not_after_s;
        self.identity = Arc::new(identity);
        let now = Instant::now();
        self.listed.state.certificate(not_after_s);
        self.ends_at = match self.id {
            Some(_) => in_seconds(now, not_after_s.saturating_sub(clock().0)),
            // Time to read the answer and to dial with it.
            None => Some(now + RENEWED_TIME),
        };
    }

    fn deliver(&mut self, message: Message) -> Result<(), End> {
        self.delivery.queue(message).map_err(|_| End::Slow)
    }

    async fn receive(&mut self, received: Received) -> Result<(), End> {
        let now = Instant::now();
        self.is_alive(now);
        match received {
            Received::Closed => Err(End::Closed),
            Received::Beat => {
                self.slow(now, 1, 0);
                if self.probe.is_some() {
                    // The path is open again, and with the next acknowledgement it is known what was lost.
                    self.transport.probe();
                }
                Ok(())
            }
            Received::Message(bytes) => {
                self.slow(now, 0, bytes.len());
                self.read(bytes, now).await
            }
            Received::Batch(bytes) if !self.capabilities.batch => {
                self.slow(now, 1, bytes.len());
                self.read(bytes, now).await
            }
            Received::Batch(bytes) => {
                self.slow(now, 0, bytes.len());
                match batch::decode(&bytes, UPSTREAM_LEN_MAX) {
                    Ok(messages) => {
                        for message in messages {
                            let len = message.len_hint();
                            self.take(message, len, now).await?;
                        }
                        Ok(())
                    }
                    Err(error) => self.junk(now, bytes.len(), &error),
                }
            }
        }
    }

    /// Takes one message. What is too long for its kind is refused before any of it is copied.
    async fn read(&mut self, bytes: Bytes, now: Instant) -> Result<(), End> {
        let len = bytes.len();
        if len > PLAIN_LEN_MAX
            && let Ok(Envelope { header, route }) = serde_json::from_slice(&bytes)
            && len > len_max(&route)
        {
            drop(bytes);
            self.messages_in += 1;
            self.slow(now, 1, 0);
            return self.refuse_long(Message { header, route, content: raw(&()) }, len);
        }
        let decoded = Message::decode(&bytes);
        drop(bytes);
        match decoded {
            Ok(message) => self.take(message, len, now).await,
            Err(error) => self.junk(now, len, &error),
        }
    }

    fn refuse_long(&mut self, message: Message, len: usize) -> Result<(), End> {
        self.shared.links.counters.over_bound.add(1);
        let route = &message.route;
        let text = format!(
            "`{}` of `{}` with {len} bytes is over the bound of {} bytes",
            route.operation,
            route.resource,
            len_max(route)
        );
        self.deliver(refusal(&message, &text))
    }

    /// Charges the node's quotas.
    fn slow(&mut self, now: Instant, messages: usize, bytes: usize) {
        let Some(until) = self.quota.charge(messages, bytes, now) else { return };
        if self.slowed_until.is_none() {
            self.shared.links.counters.slowed.add(1);
        }
        self.slowed_until = Some(until);
    }

    /// Charges something that is no message. A node that sends too much of it is cut off.
    fn junk(&mut self, now: Instant, len: usize, error: &dyn std::error::Error) -> Result<(), End> {
        self.shared.links.counters.junk.add(1);
        if !std::mem::replace(&mut self.garbled, true) {
            tracing::warn!(node = &*self.node, %error, "a message of the node was not readable");
        }
        match self.quota.junk(len, now) {
            true => Ok(()),
            false => Err(End::Junk(error.to_string())),
        }
    }

    async fn take(&mut self, message: Message, len: usize, now: Instant) -> Result<(), End> {
        self.messages_in += 1;
        let route = &message.route;
        tracing::debug!(
            node = &*self.node,
            msg_id = message.header.msg_id,
            operation = route.operation,
            resource = route.resource,
            "received"
        );
        if len > PLAIN_LEN_MAX && len > len_max(&message.route) {
            self.slow(now, 1, 0);
            return self.refuse_long(message, len);
        }
        let operation = message.operation();
        let answers = matches!(operation, Some(Operation::Response | Operation::Keepalive));
        if self.id.is_none() && !answers && !Renewals::is_for(&message) {
            self.slow(now, 1, 0);
            let text = "the certificate has expired: only its renewal is possible here";
            return self.deliver(refusal(&message, text));
        }
        match operation {
            Some(Operation::Keepalive) => {
                self.slow(now, 1, 0);
                self.alive_until = now + silence_max(self.capabilities);
            }
            Some(Operation::Response) => {
                // An acknowledgement that was asked for is free, all else is charged.
                let before = self.delivery.len();
                self.delivery.handle_ack(&message.header.parent_msg_id, now);
                if self.delivery.len() == before {
                    self.slow(now, 1, 0);
                }
            }
            Some(Operation::Error) => {
                self.slow(now, 1, 0);
                if !std::mem::replace(&mut self.complained, true) {
                    let error: String = message.content.get().chars().take(500).collect();
                    let resource = &route.resource;
                    tracing::warn!(
                        node = &*self.node,
                        resource,
                        error,
                        "the node reports an error"
                    );
                }
            }
            _ if route.resource == digest::RESOURCE => {
                self.slow(now, 1, 0);
                match message.content_as() {
                    Ok(digest) => {
                        let Some(session) = self.id else { return Ok(()) };
                        let node = self.node.to_string();
                        let request = Box::new(message);
                        let input = Input::Digest { node, session, digest, request };
                        self.shared.hub.input(input).await;
                    }
                    Err(error) => {
                        tracing::warn!(node = &*self.node, %error, "the node's digest is not readable");
                        return self.deliver(refusal(&message, &error.to_string()));
                    }
                }
            }
            _ => {
                self.slow(now, 1, 0);
                self.request_bytes += len;
                self.requests.push_back(Request { message, len });
            }
        }
        Ok(())
    }

    fn is_alive(&mut self, now: Instant) {
        self.heard = now;
        self.listed.state.heard(clock().1);
        if let Some(silence_max) = self.capabilities.silence_max() {
            self.alive_until = now + silence_max;
        }
        if self.capabilities.lease && self.id.is_some() && now >= self.lease_told + LEASE_BEAT_MIN {
            self.lease_told = now;
            self.shared.leases.beat(&self.node);
        }
    }

    fn tick(&mut self) -> Result<(), End> {
        let now = Instant::now();
        if self.slowed_until.is_some_and(|until| until <= now) {
            self.slowed_until = None;
            // What the node sent meanwhile is still on its way to us.
            self.alive_until = self.alive_until.max(now + KEEPALIVE_TIMEOUT);
        }
        if self.probe.and_then(|probe| probe.at).is_some_and(|at| at <= now) {
            self.ask(now);
        }
        let since = [self.stalled.map(|(since, _)| since), self.choked];
        if since.into_iter().flatten().any(|since| since + WRITE_TIMEOUT <= now) {
            return Err(End::Slow);
        }
        if self.ends_at.is_some_and(|end| end <= now) {
            return Err(if self.id.is_some() { End::Expired } else { End::RenewalOver });
        }
        if self.alive_until <= now && !self.full {
            let Some(silence_max) = self.capabilities.silence_max() else {
                return Err(End::NoKeepalive);
            };
            // Bytes that are no message yet, and acknowledgements of QUIC, are signs of life as well.
            let heard = self.transport.heard(now);
            if heard + silence_max <= now {
                return Err(End::Silent(silence_max));
            }
            self.alive_until = heard + silence_max;
        }
        Ok(())
    }

    /// Looks whether the node has said anything since it was given messages, and asks it to when it has not.
    fn ask(&mut self, now: Instant) {
        let Some(mut probe) = self.probe else { return };
        if self.transport.heard(now) > probe.since {
            probe.answered += 1;
            probe.since = now;
            let wait = self.probe_wait() * (1 << probe.answered);
            probe.at = (probe.answered < PROBE_ANSWERS).then(|| now + wait);
        } else {
            self.transport.probe();
            probe.at = Some(now + ((now - probe.since) / PROBE_SHARE).max(PROBE_INTERVAL));
        }
        self.probe = Some(probe);
    }

    fn probe_wait(&self) -> Duration {
        let rtt = self.transport.path().map_or(Duration::ZERO, |(rtt, _)| rtt);
        rtt * 2 + PROBE_PATIENCE
    }

    /// Moves what is due from the queue to the transport, as far as there is room, and the next request to work.
    fn fill(&mut self) -> Result<(), End> {
        let now = Instant::now();
        let mut due: Vec<Arc<Message>> = Vec::new();
        let mut class = Class::Lease;
        let mut len = 0;
        let is_quic = self.transport.kind() == Kind::Quic;
        let sent_before = self.messages_out;
        self.starved = false;
        loop {
            if self.transport.unwritten() + len >= OUT_HIGH {
                self.starved = true;
                break;
            }
            let Some(message) = self.delivery.poll_transmit(now) else { break };
            tracing::debug!(
                node = &*self.node,
                msg_id = message.header.msg_id,
                operation = message.route.operation,
                resource = message.route.resource,
                "sent"
            );
            self.messages_out += 1;
            // One WebSocket carries all classes, in the order in which they are due.
            let next = if is_quic { Class::of(&message) } else { class };
            let whole = len >= BATCH_LEN || due.len() >= BATCH_MESSAGES;
            if next != class || whole || !self.capabilities.batch {
                self.send(class, &mut due, &mut len)?;
            }
            class = next;
            len += message.len_hint();
            due.push(message);
        }
        self.send(class, &mut due, &mut len)?;
        if is_quic {
            let asks = self.probe.is_some_and(|probe| probe.at.is_some());
            if self.delivery.in_flight() == 0 {
                self.probe = None;
            } else if self.messages_out != sent_before && !asks {
                // What came up to now is no answer.
                self.transport.heard(now);
                let at = Some(now + self.probe_wait());
                self.probe = Some(Probe { since: now, at, answered: 0 });
            }
        }
        if self.answering.is_none()
            && self.delivery.backlog_bytes() < ANSWER_BACKLOG_MAX
            && let Some(Request { message, len }) = self.requests.pop_front()
        {
            let (shared, identity) = (Arc::clone(&self.shared), Arc::clone(&self.identity));
            self.answering_len = len;
            let receipts = self.capabilities.receipts;
            self.answering =
                Some(Box::pin(async move { answer(&shared, &identity, &message, receipts).await }));
        }
        if self.requests.is_empty() {
            self.requests = VecDeque::new();
        }
        let full = self.requests.len() >= REQUESTS_MAX || self.request_bytes >= REQUEST_BYTES_MAX;
        if self.full && !full {
            self.alive_until = self.alive_until.max(now + silence_max(self.capabilities));
        }
        if full && !self.full {
            self.shared.links.counters.slowed.add(1);
        }
        self.full = full;
        // Not read, it cannot acknowledge either: one that has let it come to that has to start over.
        let choked = full && self.answering.is_none();
        self.choked = choked.then(|| self.choked.unwrap_or(now));
        Ok(())
    }

    /// Gives messages of one class to the transport: as one batch, unless that would not be worth its while.
    fn send(
        &mut self,
        class: Class,
        due: &mut Vec<Arc<Message>>,
        len: &mut usize,
    ) -> Result<(), End> {
        if std::mem::take(len) < BATCH_LEN_MIN {
            for message in due.iter() {
                self.transport.send(class, std::slice::from_ref(message))?;
            }
        } else if !due.is_empty() {
            self.transport.send(class, due)?;
        }
        due.clear();
        Ok(())
    }

    /// Passes on what became of a message.
    async fn report(&mut self, event: Event) {
        let (message, dropped) = match event {
            Event::Delivered(message) => {
                let Some(session) = self.id else { return };
                // Not the hub's: it came from here.
                if certificate::bundle_node(&message.route.resource).is_none() {
                    let node = self.node.to_string();
                    self.shared.hub.input(Input::Acked { node, session, message }).await;
                }
                return;
            }
            Event::Unanswered(message) => (message, false),
            Event::Dropped(message) => (message, true),
        };
        tracing::warn!(
            node = &*self.node,
            msg_id = message.header.msg_id,
            resource = message.route.resource,
            "the node did not acknowledge a message"
        );
        let Some(session) = self.id else { return };
        let node = self.node.to_string();
        self.shared.hub.input(Input::Unanswered { node, session, message, dropped }).await;
    }

    /// Writes the session's numbers where others can read them.
    fn tell_numbers(&mut self) {
        let (bytes_out, bytes_in) = self.transport.traffic();
        let path = self.transport.path();
        if let Some((_, address)) = path {
            self.listed.state.moved(address);
        }
        let numbers = Numbers {
            rtt: path.map(|(rtt, _)| rtt).or_else(|| self.delivery.rtt()),
            in_flight: self.delivery.in_flight(),
            backlog: self.delivery.backlog_len(),
            backlog_bytes: self.delivery.backlog_bytes(),
            requests: self.requests.len() + usize::from(self.answering.is_some()),
            bytes_in,
            bytes_out,
            messages_in: self.messages_in,
            messages_out: self.messages_out,
        };
        self.listed.state.write(&numbers, &self.shared.links.counters);
    }
}

async fn answer(shared: &Shared, identity: &Peer, request: &Message, receipts: bool) -> Answer {
    if Renewals::is_for(request) {
        let (answer, renewed) = shared.renewals.answer(identity, request).await;
        return (Some(answer), renewed);
    }
    let answer = match receipts {
        true => shared.upstream.receipt(&identity.node, request).await,
        false => shared.upstream.answer(&identity.node, request).await,
    };
    (answer, None)
}

fn next_change(mut changes: watch::Receiver<u64>) -> Change {
    Box::pin(async move {
        if changes.changed().await.is_err() {
            // Nobody will tell any more: cloudcore is about to stop.
            std::future::pending::<()>().await;
        }
        changes
    })
}

/// How long a node may say nothing (or, for a KubeEdge edge, send no keepalive).
fn silence_max(capabilities: Capabilities) -> Duration {
    capabilities.silence_max().unwrap_or(KEEPALIVE_TIMEOUT)
}

/// Seconds and milliseconds of Unix time.
fn clock() -> (i64, i64) {
    let now = jiff::Timestamp::now();
    (now.as_second(), now.as_millisecond())
}

fn in_seconds(now: Instant, seconds: i64) -> Option<Instant> {
    now.checked_add(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

fn refusal(request: &Message, text: &str) -> Message {
    request.error(clock().1, "edgecontroller", "resource", text)
}
