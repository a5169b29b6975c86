//! DHCP for IPv4: asks for an address, keeps it, and says when it is gone.
//!
//! ```text
//!             link up, nothing remembered                link up, address remembered
//!        ┌────────────────────────────── Down ───────────────────────────────┐
//!        ▼                                                                   ▼
//!    Selecting ──offer──► Requesting ──ack──► Probing ──free──► Bound ◄─ack─ Rebooting
//!        ▲  ▲                 │ silence, nak      │ taken: decline  │ T1          │ silence, nak
//!        │  └─────────────────┴──── Waiting ◄─────┘                 ▼             │
//!        │                             ▲                        Renewing          │
//!        │                             │ nak                        │ T2          │
//!        └──────── expired ────────────┴───────────────────────  Rebinding        │
//!        └────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! No socket and no clock: the service feeds [`Client::handle_message`] with UDP payloads, drains
//! [`Client::poll_transmit`] and [`Client::poll_event`], and comes back at
//! [`Client::poll_timeout`]. Times are durations since any fixed moment. It asks for ever: after
//! one minute without an answer, about once a minute. While the link is down nothing is sent and a
//! lease runs on.
//!
//! Source: RFC 2131 (the client), RFC 2132 (options), RFC 3396 (long options), RFC 3442 (classless
//! routes), RFC 5227 (probing).

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;
use std::time::Duration;

/// First wait for an answer; doubled after every request, up to [`RETRY_MAX`].
pub const RETRY_FIRST: Duration = Duration::from_secs(4);
/// Longest wait between two requests of a client without an address.
pub const RETRY_MAX: Duration = Duration::from_secs(64);
/// Each wait is longer or shorter by up to this, so that a site after a power cut does not ask in step.
pub const JITTER: Duration = Duration::from_secs(1);
/// Requests for an offered address before the client looks for another offer.
pub const REQUESTS_MAX: u32 = 4;
/// Requests for the remembered address before the client takes what it gets.
pub const REBOOT_REQUESTS_MAX: u32 = 2;
/// Shortest wait between two requests to extend a lease.
pub const RENEW_RETRY_MIN: Duration = Duration::from_secs(60);
/// Wait after a declined address.
pub const DECLINE_WAIT: Duration = Duration::from_secs(10);
/// First wait after a refusal; doubled, up to [`RETRY_MAX`], until an address is accepted.
pub const NAK_WAIT_FIRST: Duration = Duration::from_secs(1);
/// Questions whether somebody has the new address, and the time between them.
pub const PROBES: u32 = 2;
/// Time that an answer to a probe may take.
pub const PROBE_WAIT: Duration = Duration::from_millis(200);
/// Shortest lease that is taken as it is; shorter ones count as this long.
pub const LEASE_MIN: Duration = Duration::from_secs(10);
/// Entries of a list option that are used.
pub const LIST_MAX: usize = 16;
/// Longest message that is read.
pub const MESSAGE_LEN_MAX: usize = 1500;
/// Events that wait for the caller; older ones are dropped.
const EVENTS_MAX: usize = 16;

const MAGIC: [u8; 4] = [99, 130, 83, 99];
const HEADER_LEN: usize = 236;
/// BOOTP relays drop shorter ones.
const MESSAGE_LEN_MIN: usize = 300;

const OPTION_MASK: u8 = 1;
const OPTION_ROUTERS: u8 = 3;
const OPTION_DNS: u8 = 6;
const OPTION_HOSTNAME: u8 = 12;
const OPTION_DOMAIN: u8 = 15;
const OPTION_MTU: u8 = 26;
const OPTION_NTP: u8 = 42;
const OPTION_ADDRESS: u8 = 50;
const OPTION_LEASE_TIME: u8 = 51;
const OPTION_OVERLOAD: u8 = 52;
const OPTION_TYPE: u8 = 53;
const OPTION_SERVER: u8 = 54;
const OPTION_WANTED: u8 = 55;
const OPTION_LEN_MAX: u8 = 57;
const OPTION_RENEW_AFTER: u8 = 58;
const OPTION_REBIND_AFTER: u8 = 59;
const OPTION_CLIENT_ID: u8 = 61;
const OPTION_ROUTES: u8 = 121;
const OPTION_END: u8 = 255;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const DECLINE: u8 = 4;
const ACK: u8 = 5;
const NAK: u8 = 6;

/// What a server gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Our address.
    pub address: Ipv4Addr,
    /// Bits of the network.
    pub prefix_len: u8,
    /// Who gave it.
    pub server: Ipv4Addr,
    /// Default routers, the best first; empty when `routes` says it better.
    pub routers: Vec<Ipv4Addr>,
    /// Classless routes: network, bits, next hop (0.0.0.0 is the link itself).
    pub routes: Vec<(Ipv4Addr, u8, Ipv4Addr)>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Domain to look names up in.
    pub domain: Option<String>,
    /// Size of packets.
    pub mtu: Option<u16>,
    /// Time servers.
    pub ntp: Vec<Ipv4Addr>,
    /// How long it may be used; `None` for ever.
    pub duration: Option<Duration>,
    /// When to ask its server to extend it.
    pub renew_after: Duration,
    /// When to ask any server.
    pub rebind_after: Duration,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Hardware address, also the client id.
    pub mac: [u8; 6],
    /// Name for the server's list.
    pub hostname: Option<String>,
    /// The address of the last time.
    pub remembered: Option<Ipv4Addr>,
}

/// What has to be sent now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transmit {
    /// A DHCP message from 0.0.0.0 to everybody on the link.
    Broadcast(Vec<u8>),
    /// A DHCP message from our address to that server.
    Unicast { from: Ipv4Addr, to: Ipv4Addr, message: Vec<u8> },
    /// The question who has this address.
    Probe(Ipv4Addr),
    /// The statement that this address is ours.
    Announce(Ipv4Addr),
}

/// What happened to the address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It is ours, or still ours and the rest may have changed.
    Bound(Lease),
    /// It must not be used any more.
    Lost(Loss),
}

/// Why an address is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Nobody extended it in time.
    Expired,
    /// A server refused it.
    Refused,
    /// Somebody else answers for it.
    Conflict,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Down,
    Waiting { until: Duration },
    Selecting(Try),
    Requesting { offer: Offer, at: Try },
    Rebooting { address: Ipv4Addr, at: Try },
    Probing { held: Held, sent: u32, next: Duration },
    Bound,
    Renewing { next: Duration },
    Rebinding { next: Duration },
}

/// Repeated sending: how often, and when the next one is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Try {
    sent: u32,
    next: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Offer {
    address: Ipv4Addr,
    server: Ipv4Addr,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    lease: Lease,
    since: Duration,
}

impl Held {
    fn end(&self) -> Option<Duration> {
        self.lease.duration.map(|duration| self.since + duration)
    }
}

/// The client of one interface.
#[derive(Debug)]
pub struct Client {
    identity: Identity,
    state: State,
    /// The address in use; it outlives a link that goes away.
    held: Option<Held>,
    /// Number of this exchange; changes with every new one.
    exchange: u32,
    /// When the client began to look for what it has not got.
    began: Duration,
    naks: u32,
    random: u64,
    extra: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

impl Client {
    /// A client whose link is down. `seed` makes its waits and numbers differ from others'.
    pub fn new(identity: Identity, seed: u64) -> Self {
        Self {
            identity,
            state: State::Down,
            held: None,
            exchange: 0,
            began: Duration::ZERO,
            naks: 0,
            random: seed | 1,
            extra: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// The lease in use.
    pub fn lease(&self) -> Option<&Lease> {
        self.held.as_ref().map(|held| &held.lease)
    }

    /// Whether the lease's own server is being asked to extend it.
    pub fn is_renewing(&self) -> bool {
        matches!(self.state, State::Renewing { .. })
    }

    /// How long the client has been looking for an address in vain.
    pub fn waiting_for(&self, now: Duration) -> Option<Duration> {
        let waits = self.held.is_none() && self.state != State::Down;
        waits.then(|| now.saturating_sub(self.began))
    }

    /// The link has a carrier: asks for the last address, or for any.
    pub fn handle_link_up(&mut self, now: Duration) {
        if self.state != State::Down {
            return;
        }
        self.began = now;
        let last = self.held.as_ref().map(|held| held.lease.address);
        match last.or(self.identity.remembered) {
            Some(address) => {
                self.new_exchange();
                self.state = State::Rebooting { address, at: Try { sent: 0, next: now } };
            }
            None => self.select(now),
        }
    }

    /// The link has lost its carrier.
    pub fn handle_link_down(&mut self) {
        self.state = State::Down;
        self.extra.clear();
    }

    /// Somebody on the link answered for `address`.
    pub fn handle_conflict(&mut self, now: Duration, address: Ipv4Addr) {
        let State::Probing { held, .. } = &self.state else { return };
        if held.lease.address != address {
            return;
        }
        let server = held.lease.server;
        let mut message = self.message(now, DECLINE, Ipv4Addr::UNSPECIFIED);
        put_address(&mut message, OPTION_ADDRESS, address);
        put_address(&mut message, OPTION_SERVER, server);
        self.extra.push_back(Transmit::Broadcast(finish(message)));
        self.identity.remembered = None;
        if self.held.take().is_some() {
            self.push_event(Event::Lost(Loss::Conflict));
        }
        self.state = State::Waiting { until: now + DECLINE_WAIT };
    }

    /// Takes a UDP payload that came to port 68; what is not an answer to us changes nothing.
    pub fn handle_message(&mut self, now: Duration, bytes: &[u8]) {
        let Some(answer) = Answer::read(bytes) else { return };
        if answer.exchange != self.exchange || answer.mac != self.identity.mac {
            return;
        }
        match (answer.kind, &self.state) {
            (OFFER, State::Selecting(_)) => {
                let Some(server) = answer.server() else { return };
                if !is_host(answer.address) {
                    return;
                }
                let offer = Offer { address: answer.address, server };
                self.state = State::Requesting { offer, at: Try { sent: 0, next: now } };
            }
            (ACK, State::Requesting { offer, .. }) => {
                // Without the server's name in it an answer is from the one that was asked.
                let server = answer.server().unwrap_or(offer.server);
                if server != offer.server || answer.address != offer.address {
                    return;
                }
                let Some(lease) = answer.lease(server) else { return };
                self.state =
                    State::Probing { held: Held { lease, since: now }, sent: 0, next: now };
            }
            (ACK, State::Rebooting { address, .. }) if answer.address == *address => {
                let server = answer.server().unwrap_or(Ipv4Addr::BROADCAST);
                let Some(lease) = answer.lease(server) else { return };
                self.bind(Held { lease, since: now });
            }
            (ACK, State::Renewing { .. } | State::Rebinding { .. }) => {
                let Some(old) = &self.held else { return };
                let server = answer.server().unwrap_or(old.lease.server);
                if answer.address != old.lease.address {
                    return;
                }
                let Some(lease) = answer.lease(server) else { return };
                self.bind(Held { lease, since: now });
            }
            (NAK, State::Requesting { offer, .. }) => {
                if answer.server().is_none_or(|server| server == offer.server) {
                    self.refused(now);
                }
            }
            (NAK, State::Rebooting { .. } | State::Renewing { .. } | State::Rebinding { .. }) => {
                self.refused(now);
            }
            _ => {}
        }
    }

    /// Returns what has to be sent at `now`; call until there is nothing.
    pub fn poll_transmit(&mut self, now: Duration) -> Option<Transmit> {
        self.advance(now);
        if let Some(transmit) = self.extra.pop_front() {
            return Some(transmit);
        }
        match self.state.clone() {
            State::Selecting(at) if at.next <= now => {
                let mut message = self.message(now, DISCOVER, Ipv4Addr::UNSPECIFIED);
                if let Some(address) = self.identity.remembered {
                    put_address(&mut message, OPTION_ADDRESS, address);
                }
                self.state = State::Selecting(self.later(at, now));
                Some(Transmit::Broadcast(finish(message)))
            }
            State::Requesting { offer, at } if at.next <= now => {
                let mut message = self.message(now, REQUEST, Ipv4Addr::UNSPECIFIED);
                put_address(&mut message, OPTION_ADDRESS, offer.address);
                put_address(&mut message, OPTION_SERVER, offer.server);
                self.state = State::Requesting { offer, at: self.later(at, now) };
                Some(Transmit::Broadcast(finish(message)))
            }
            State::Rebooting { address, at } if at.next <= now => {
                let mut message = self.message(now, REQUEST, Ipv4Addr::UNSPECIFIED);
                put_address(&mut message, OPTION_ADDRESS, address);
                self.state = State::Rebooting { address, at: self.later(at, now) };
                Some(Transmit::Broadcast(finish(message)))
            }
            State::Probing { held, sent, next } if next <= now => {
                let address = held.lease.address;
                self.state = State::Probing { held, sent: sent + 1, next: now + PROBE_WAIT };
                Some(Transmit::Probe(address))
            }
            State::Renewing { next } if next <= now => {
                let held = self.held.as_ref()?;
                let (from, to) = (held.lease.address, held.lease.server);
                let until = held.since + held.lease.rebind_after;
                self.state = State::Renewing { next: halfway(now, until) };
                let message = finish(self.message(now, REQUEST, from));
                Some(Transmit::Unicast { from, to, message })
            }
            State::Rebinding { next } if next <= now => {
                let held = self.held.as_ref()?;
                let from = held.lease.address;
                let until = held.end()?;
                self.state = State::Rebinding { next: halfway(now, until) };
                let message = finish(self.message(now, REQUEST, from));
                Some(Transmit::Broadcast(message))
            }
            _ => None,
        }
    }

    /// Returns what has happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Returns when something is due: call [`Client::poll_transmit`] then.
    pub fn poll_timeout(&self) -> Option<Duration> {
        if !self.extra.is_empty() {
            return Some(Duration::ZERO);
        }
        let end = self.held.as_ref().and_then(Held::end);
        let own = match &self.state {
            State::Down => None,
            State::Waiting { until } => Some(*until),
            State::Selecting(at) => Some(at.next),
            State::Requesting { at, .. } | State::Rebooting { at, .. } => Some(at.next),
            State::Probing { next, .. } => Some(*next),
            State::Bound => self
                .held
                .as_ref()
                .and_then(|held| held.lease.duration.map(|_| held.since + held.lease.renew_after)),
            State::Renewing { next } | State::Rebinding { next } => {
                let held = self.held.as_ref();
                let rebind = held.map(|held| held.since + held.lease.rebind_after);
                let is_renewing = matches!(self.state, State::Renewing { .. });
                rebind.filter(|_| is_renewing).into_iter().chain([*next]).min()
            }
        };
        own.into_iter().chain(end).min()
    }

    /// Changes of state that only time makes.
    fn advance(&mut self, now: Duration) {
        if let Some(held) = &self.held
            && held.end().is_some_and(|end| end <= now)
        {
            self.identity.remembered = Some(held.lease.address);
            self.held = None;
            self.push_event(Event::Lost(Loss::Expired));
            if matches!(self.state, State::Bound | State::Renewing { .. } | State::Rebinding { .. })
            {
                self.began = now;
                self.select(now);
            }
        }
        match &self.state {
            State::Waiting { until } if *until <= now => self.select(now),
            State::Requesting { at, .. } if at.sent >= REQUESTS_MAX && at.next <= now => {
                self.select(now);
            }
            State::Rebooting { at, .. } if at.sent >= REBOOT_REQUESTS_MAX && at.next <= now => {
                // The lease may still run: its address stays while the client looks for servers.
                self.select(now);
            }
            State::Probing { held, sent, next } if *sent >= PROBES && *next <= now => {
                let held = held.clone();
                self.extra.push_back(Transmit::Announce(held.lease.address));
                self.bind(held);
            }
            State::Bound => {
                let held = self.held.as_ref().filter(|held| held.lease.duration.is_some());
                let due = held.is_some_and(|held| held.since + held.lease.renew_after <= now);
                if due {
                    self.new_exchange();
                    self.began = now;
                    self.state = State::Renewing { next: now };
                }
            }
            State::Renewing { .. } => {
                let held = self.held.as_ref();
                if held.is_some_and(|held| held.since + held.lease.rebind_after <= now) {
                    self.state = State::Rebinding { next: now };
                }
            }
            _ => {}
        }
    }

    fn select(&mut self, now: Duration) {
        self.new_exchange();
        self.state = State::Selecting(Try { sent: 0, next: now });
    }

    fn bind(&mut self, held: Held) {
        self.naks = 0;
        self.identity.remembered = Some(held.lease.address);
        if self.held.as_ref().is_some_and(|old| old.lease.address != held.lease.address) {
            self.push_event(Event::Lost(Loss::Refused));
        }
        self.push_event(Event::Bound(held.lease.clone()));
        self.held = Some(held);
        self.state = State::Bound;
    }

    fn refused(&mut self, now: Duration) {
        self.identity.remembered = None;
        if self.held.take().is_some() {
            self.push_event(Event::Lost(Loss::Refused));
            self.began = now;
        }
        let wait = NAK_WAIT_FIRST.saturating_mul(1 << self.naks.min(6)).min(RETRY_MAX);
        self.naks += 1;
        self.state = State::Waiting { until: now + wait };
    }

    fn later(&mut self, at: Try, now: Duration) -> Try {
        let wait = RETRY_FIRST.saturating_mul(1 << at.sent.min(4)).min(RETRY_MAX);
        let span = 2 * JITTER.as_millis() as u64;
        let jitter = Duration::from_millis(self.next_random() % (span + 1));
        Try { sent: at.sent.saturating_add(1), next: now + wait + jitter - JITTER }
    }

    fn new_exchange(&mut self) {
        self.exchange = (self.next_random() >> 16) as u32;
    }

    /// xorshift64*: enough to differ from others, no secret.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn push_event(&mut self, event: Event) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Everything up to the options that differ.
    fn message(&self, now: Duration, kind: u8, own: Ipv4Addr) -> Vec<u8> {
        let seconds = now.saturating_sub(self.began).as_secs();
        let seconds = u16::try_from(seconds).unwrap_or(u16::MAX);
        let mut bytes = vec![0; HEADER_LEN];
        bytes[..4].copy_from_slice(&[1, 1, 6, 0]);
        bytes[4..8].copy_from_slice(&self.exchange.to_be_bytes());
        bytes[8..10].copy_from_slice(&seconds.to_be_bytes());
        bytes[12..16].copy_from_slice(&own.octets());
        bytes[28..34].copy_from_slice(&self.identity.mac);
        bytes.extend(MAGIC);
        bytes.extend([OPTION_TYPE, 1, kind]);
        bytes.extend([OPTION_CLIENT_ID, 7, 1]);
        bytes.extend(self.identity.mac);
        if kind != DECLINE {
            bytes.extend([OPTION_LEN_MAX, 2]);
            bytes.extend((MESSAGE_LEN_MAX as u16).to_be_bytes());
            let wanted = [
                OPTION_MASK,
                OPTION_ROUTES,
                OPTION_ROUTERS,
                OPTION_DNS,
                OPTION_DOMAIN,
                OPTION_MTU,
                OPTION_NTP,
                OPTION_LEASE_TIME,
                OPTION_SERVER,
                OPTION_RENEW_AFTER,
                OPTION_REBIND_AFTER,
            ];
            bytes.extend([OPTION_WANTED, wanted.len() as u8]);
            bytes.extend(wanted);
            if let Some(name) = &self.identity.hostname {
                let name = &name.as_bytes()[..name.len().min(63)];
                bytes.extend([OPTION_HOSTNAME, name.len() as u8]);
                bytes.extend(name);
            }
        }
        bytes
    }
}

fn put_address(message: &mut Vec<u8>, option: u8, address: Ipv4Addr) {
    message.extend([option, 4]);
    message.extend(address.octets());
}

fn finish(mut message: Vec<u8>) -> Vec<u8> {
    message.push(OPTION_END);
    if message.len() < MESSAGE_LEN_MIN {
        message.resize(MESSAGE_LEN_MIN, 0);
    }
    message
}

fn halfway(now: Duration, until: Duration) -> Duration {
    now + (until.saturating_sub(now) / 2).max(RENEW_RETRY_MIN)
}

fn is_host(address: Ipv4Addr) -> bool {
    !address.is_unspecified()
        && !address.is_broadcast()
        && !address.is_multicast()
        && !address.is_loopback()
}

/// A server's message, as far as a client reads it.
#[derive(Debug)]
struct Answer {
    kind: u8,
    exchange: u32,
    mac: [u8; 6],
    address: Ipv4Addr,
    options: BTreeMap<u8, Vec<u8>>,
}

impl Answer {
    fn read(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > MESSAGE_LEN_MAX || bytes.len() < HEADER_LEN + 4 {
            return None;
        }
        let (header, rest) = bytes.split_at(HEADER_LEN);
        let options = rest.strip_prefix(&MAGIC)?;
        // A reply about an Ethernet address.
        if header[..3] != [2, 1, 6] {
            return None;
        }
        let mut found = BTreeMap::new();
        read_options(options, &mut found);
        match found.get(&OPTION_OVERLOAD).and_then(|value| value.first()) {
            Some(1) => read_options(&header[108..236], &mut found),
            Some(2) => read_options(&header[44..108], &mut found),
            Some(3) => {
                read_options(&header[108..236], &mut found);
                read_options(&header[44..108], &mut found);
            }
            _ => {}
        }
        Some(Self {
            kind: *found.get(&OPTION_TYPE)?.first()?,
            exchange: u32::from_be_bytes(*header[4..].first_chunk()?),
            mac: *header[28..].first_chunk()?,
            address: Ipv4Addr::from(*header[16..].first_chunk::<4>()?),
            options: found,
        })
    }

    fn server(&self) -> Option<Ipv4Addr> {
        self.addresses(OPTION_SERVER).into_iter().next().filter(|address| is_host(*address))
    }

    fn addresses(&self, option: u8) -> Vec<Ipv4Addr> {
        let bytes = self.options.get(&option).map(Vec::as_slice).unwrap_or_default();
        let (whole, _) = bytes.as_chunks::<4>();
        whole.iter().take(LIST_MAX).map(|octets| Ipv4Addr::from(*octets)).collect()
    }

    fn seconds(&self, option: u8) -> Option<u32> {
        self.options.get(&option)?.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes))
    }

    /// What an acknowledgement gives; `None` when it is of no use.
    fn lease(&self, server: Ipv4Addr) -> Option<Lease> {
        if !is_host(self.address) {
            return None;
        }
        let seconds = self.seconds(OPTION_LEASE_TIME)?;
        let duration =
            (seconds != u32::MAX).then(|| Duration::from_secs(seconds.into()).max(LEASE_MIN));
        let whole = duration.unwrap_or(Duration::MAX);
        let read = |option| self.seconds(option).map(|value| Duration::from_secs(value.into()));
        let (half, most) = (whole / 2, whole / 8 * 7);
        let (renew_after, rebind_after) =
            match (read(OPTION_RENEW_AFTER), read(OPTION_REBIND_AFTER)) {
                (Some(renew), Some(rebind)) if renew < rebind && rebind < whole => (renew, rebind),
                (Some(renew), None) if renew < most => (renew, most),
                _ => (half, most),
            };
        let mask = self.addresses(OPTION_MASK).into_iter().next();
        let prefix_len = match mask.map(|mask| mask.to_bits()) {
            // The bits have to be in one piece.
            Some(bits) if bits.leading_ones() + bits.trailing_zeros() >= 32 && bits != 0 => {
                bits.leading_ones() as u8
            }
            _ => match self.address.octets()[0] {
                0..128 => 8,
                128..192 => 16,
                _ => 24,
            },
        };
        let hosts = |option| {
            let mut list = self.addresses(option);
            list.retain(|address| is_host(*address));
            list
        };
        let routes = self.options.get(&OPTION_ROUTES).map(|bytes| read_routes(bytes));
        let routes = routes.unwrap_or_default();
        let domain = self.options.get(&OPTION_DOMAIN).and_then(|bytes| {
            let text = std::str::from_utf8(bytes).ok()?.trim_end_matches('\0');
            let fits = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-' || c == '_';
            (!text.is_empty() && text.len() <= 253 && text.chars().all(fits))
                .then(|| text.to_owned())
        });
        let mtu = self.options.get(&OPTION_MTU).and_then(|bytes| {
            let mtu = u16::from_be_bytes(*bytes.first_chunk()?);
            (mtu >= 576).then_some(mtu)
        });
        Some(Lease {
            address: self.address,
            prefix_len,
            server,
            // A server that gives classless routes means those alone (RFC 3442).
            routers: if routes.is_empty() { hosts(OPTION_ROUTERS) } else { Vec::new() },
            routes,
            dns: hosts(OPTION_DNS),
            domain,
            mtu,
            ntp: hosts(OPTION_NTP),
            duration,
            renew_after,
            rebind_after,
        })
    }
}

/// Reads options up to the end mark; parts of one option are put together.
fn read_options(mut bytes: &[u8], found: &mut BTreeMap<u8, Vec<u8>>) {
    while let [code, rest @ ..] = bytes {
        if *code == 0 {
            bytes = rest;
            continue;
        }
        if *code == OPTION_END {
            return;
        }
        let Some((len, rest)) = rest.split_first() else { return };
        let Some((value, rest)) = rest.split_at_checked(usize::from(*len)) else { return };
        found.entry(*code).or_default().extend_from_slice(value);
        bytes = rest;
    }
}

/// Reads classless routes: bits, as many octets of the network as they need, next hop.
fn read_routes(mut bytes: &[u8]) -> Vec<(Ipv4Addr, u8, Ipv4Addr)> {
    let mut routes = Vec::new();
    while let [bits, rest @ ..] = bytes {
        let significant = usize::from(bits.div_ceil(8));
        if *bits > 32 || rest.len() < significant + 4 || routes.len() == LIST_MAX {
            break;
        }
        let mut network = [0; 4];
        network[..significant].copy_from_slice(&rest[..significant]);
        let mask = u32::MAX.checked_shl(32 - u32::from(*bits)).unwrap_or(0);
        let network = Ipv4Addr::from(u32::from_be_bytes(network) & mask);
        let next_hop = rest[significant..].first_chunk::<4>().expect("the length was looked at");
        routes.push((network, *bits, Ipv4Addr::from(*next_hop)));
        bytes = &rest[significant + 4..];
    }
    routes
}

#[cfg(test)]
#[path = "dhcp_tests.rs"]
mod tests;
