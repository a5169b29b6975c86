//! Addresses of the configured time servers, some of which are names.
//!
//! One question is on the way at a time, to one name server after the other, IPv4 first and IPv6
//! when there is none. Names are looked up again every [`FRESH_FOR`], and while they have no
//! address after growing pauses. The service polls the socket and calls
//! [`Lookup::handle_readable`].

use super::dns::{self, Kind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// Time servers of one site that are used.
pub const NAMES_MAX: usize = 8;
/// How long addresses are used before the name is asked for again.
pub const FRESH_FOR: Duration = Duration::from_secs(3600);
/// How long one name server may take.
const ANSWER_WAIT: Duration = Duration::from_secs(2);
/// First pause after a name that nobody knew; doubled up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_secs(2);
const PAUSE_MAX: Duration = Duration::from_secs(128);

#[derive(Debug)]
struct Entry {
    name: String,
    addresses: Vec<IpAddr>,
    due: Duration,
    pause: Duration,
}

#[derive(Debug)]
struct Flight {
    entry: usize,
    kind: Kind,
    server: usize,
    question: Vec<u8>,
    socket: UdpSocket,
    until: Duration,
}

/// The names and what is known of them.
#[derive(Debug, Default)]
pub struct Lookup {
    entries: Vec<Entry>,
    servers: Vec<SocketAddr>,
    flight: Option<Flight>,
}

impl Lookup {
    /// Takes names or addresses.
    pub fn new(names: &[String]) -> Self {
        let entries = names.iter().take(NAMES_MAX).map(|name| {
            let literal: Option<IpAddr> = name.parse().ok();
            Entry {
                name: name.clone(),
                addresses: literal.into_iter().collect(),
                due: if literal.is_some() { Duration::MAX } else { Duration::ZERO },
                pause: PAUSE_FIRST,
            }
        });
        Self { entries: entries.collect(), ..Self::default() }
    }

    /// Whether there is anything to look up or to use.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Takes the name servers; with new ones, names without address are asked for at once.
    pub fn set_servers(&mut self, now: Duration, servers: &[SocketAddr]) {
        if self.servers == servers {
            return;
        }
        self.servers = servers.to_vec();
        self.flight = None;
        for entry in self.entries.iter_mut().filter(|entry| entry.addresses.is_empty()) {
            entry.due = now;
            entry.pause = PAUSE_FIRST;
        }
    }

    /// All addresses that are known: one of each name, then the others.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let mut found = Vec::new();
        for at in 0..dns::ADDRESSES_MAX {
            for ip in self.entries.iter().filter_map(|entry| entry.addresses.get(at)) {
                if !found.contains(ip) {
                    found.push(*ip);
                }
            }
        }
        found
    }

    /// The socket on which an answer is expected.
    pub fn source(&self) -> Option<BorrowedFd<'_>> {
        self.flight.as_ref().map(|flight| flight.socket.as_fd())
    }

    /// When [`Lookup::advance`] has something to do.
    pub fn poll_timeout(&self) -> Option<Duration> {
        if let Some(flight) = &self.flight {
            return Some(flight.until);
        }
        let due = self.entries.iter().map(|entry| entry.due).min()?;
        (!self.servers.is_empty() && due < Duration::MAX).then_some(due)
    }

    /// Sends the next question if one is due; `random` gives numbers for questions.
    pub fn advance(&mut self, now: Duration, random: impl Fn() -> u64) {
        if let Some(flight) = self.flight.take_if(|flight| flight.until <= now) {
            self.next(now, flight, Vec::new(), false, &random);
        }
        if self.flight.is_none()
            && !self.servers.is_empty()
            && let Some(entry) = self.entries.iter().position(|entry| entry.due <= now)
        {
            self.ask(now, entry, Kind::A, 0, &random);
        }
    }

    /// Reads the answer that has come.
    pub fn handle_readable(&mut self, now: Duration, random: impl Fn() -> u64) {
        let Some(flight) = &self.flight else { return };
        let mut buffer = [0; dns::MESSAGE_LEN_MAX];
        let read = match flight.socket.recv(&mut buffer) {
            Ok(len) => dns::read_answer(&flight.question, &buffer[..len]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
            // Nobody listens there.
            Err(_) => {
                let flight = self.flight.take().expect("it was looked at");
                self.next(now, flight, Vec::new(), false, &random);
                return;
            }
        };
        if let Some(addresses) = read {
            let flight = self.flight.take().expect("it was looked at");
            self.next(now, flight, addresses, true, &random);
        }
    }

    /// Goes on after a question: with the other kind, with the next server, or with the result.
    fn next(
        &mut self,
        now: Duration,
        flight: Flight,
        addresses: Vec<IpAddr>,
        answered: bool,
        random: &impl Fn() -> u64,
    ) {
        let entry = &mut self.entries[flight.entry];
        if !addresses.is_empty() {
            entry.addresses = addresses;
            entry.due = now + FRESH_FOR;
            entry.pause = PAUSE_FIRST;
        } else if answered && flight.kind == Kind::A {
            self.ask(now, flight.entry, Kind::Aaaa, flight.server, random);
        } else if flight.server + 1 < self.servers.len() {
            self.ask(now, flight.entry, Kind::A, flight.server + 1, random);
        } else {
            entry.due = now + entry.pause;
            entry.pause = (entry.pause * 2).min(PAUSE_MAX);
        }
    }

    fn ask(
        &mut self,
        now: Duration,
        entry: usize,
        kind: Kind,
        server: usize,
        random: &impl Fn() -> u64,
    ) {
        let name = &self.entries[entry].name;
        let Some(question) = dns::write_question((random() >> 48) as u16, name, kind) else {
            self.entries[entry].due = Duration::MAX; // no name at all
            return;
        };
        let sent = open(self.servers[server]).and_then(|socket| {
            socket.send(&question)?;
            Ok(socket)
        });
        match sent {
            Ok(socket) => {
                let until = now + ANSWER_WAIT;
                self.flight = Some(Flight { entry, kind, server, question, socket, until });
            }
            // No way there; the next server may have one.
            Err(_) if server + 1 < self.servers.len() => {
                self.ask(now, entry, kind, server + 1, random);
            }
            Err(_) => {
                let entry = &mut self.entries[entry];
                entry.due = now + entry.pause;
                entry.pause = (entry.pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

/// Opens a socket that speaks with `peer` alone and never waits.
pub(super) fn open(peer: SocketAddr) -> std::io::Result<UdpSocket> {
    let any: SocketAddr =
        if peer.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    connect(any, peer)
}

/// The same, from an address and a port of ours.
pub(super) fn open_from(
    from: Ipv4Addr,
    port: u16,
    to: Ipv4Addr,
    to_port: u16,
) -> std::io::Result<UdpSocket> {
    connect((from, port).into(), (to, to_port).into())
}

fn connect(from: SocketAddr, to: SocketAddr) -> std::io::Result<UdpSocket> {
    let socket = UdpSocket::bind(from)?;
    socket.connect(to)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_need_no_lookup_and_names_wait_for_a_server() {
        let names = ["192.0.2.1".to_owned(), "pool.example".to_owned()];
        let mut lookup = Lookup::new(&names);
        lookup.advance(Duration::ZERO, || 0);
        assert_eq!(lookup.addresses(), [IpAddr::from([192, 0, 2, 1])]);
        assert!(lookup.source().is_none());
        assert_eq!(lookup.poll_timeout(), None);
    }

    #[test]
    fn a_server_that_says_nothing_is_waited_for_and_asked_again_later() {
        let mut lookup = Lookup::new(&["pool.example".to_owned()]);
        // Nothing answers on that port of the loopback, or it says so at once; both end in a pause.
        lookup.set_servers(Duration::ZERO, &[([127, 0, 0, 9], 53).into()]);
        let mut now = Duration::ZERO;
        for _ in 0..20 {
            lookup.advance(now, || 7);
            lookup.handle_readable(now, || 7);
            now = lookup.poll_timeout().expect("it goes on").max(now);
        }
        assert!(now > Duration::from_secs(10), "{now:?}");
        assert!(now < Duration::from_secs(20 * 130), "{now:?}");
    }
}
