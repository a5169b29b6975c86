//! What the kernel says about interfaces, addresses and default routes: a routing socket, and its messages read.
//!
//! [`Listener`] is the socket, [`Seen`] remembers what was said so that a repeated announcement (a renewed lease, a
//! router that advertises itself every few minutes) is no news. `network` is the only caller. Nothing is ever sent.
//!
//! Source: rtnetlink(7), netlink(7).

use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket,
};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsRawFd;
use tokio::net::UnixDatagram;

/// Groups of the socket: links, IPv4 addresses and routes, IPv6 addresses and routes.
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;
/// The kernel's longest message of this kind is a page.
const BUFFER_LEN: usize = 16 * 1024;
/// Facts that are remembered of each kind. A node has a few; a machine with more has each told as news, at worst.
const FACTS_MAX: usize = 4096;
const HEADER_LEN: usize = 16;

const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;

const LINK_NAME: u16 = 3;
const ADDRESS_ADDRESS: u16 = 1;
const ADDRESS_LOCAL: u16 = 2;
const ROUTE_OUT: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;

/// The interface is up and has a carrier.
const FLAG_UP: u32 = 0x1;
const FLAG_RUNNING: u32 = 0x40;
const TABLE_MAIN: u8 = 254;
const SCOPE_UNIVERSE: u8 = 0;

/// What is new.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum News {
    /// This interface has a carrier again.
    Link(String),
    /// There is an address, or a default route, that was not there before.
    Way,
    /// Something was lost; what is left may lead elsewhere.
    Less,
}

/// The socket. It is no Unix socket, but it gives datagrams as one does, and that is all that is asked of it.
pub(super) struct Listener(UnixDatagram);

impl Listener {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// Whatever the system says: a container may have no such sockets.
    pub(super) fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkRoute;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
        Ok(Self(UnixDatagram::from_std(fd.into())?))
    }

    /// Waits for the next messages, and says what is new in them; often nothing.
    ///
    /// # Errors
    ///
    /// Whatever the system says; the socket is of no more use then.
    pub(super) async fn next(&self, seen: &mut Seen) -> io::Result<Vec<News>> {
        let mut buffer = vec![0; BUFFER_LEN];
        match self.0.recv(&mut buffer).await {
            Ok(len) => Ok(seen.handle(&buffer[..len])),
            // More was said than the socket can hold: anything may be new.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {
                *seen = Seen::default();
                Ok(vec![News::Way])
            }
            Err(error) => Err(error),
        }
    }
}

/// Addresses and default routes that the kernel has announced, and which interfaces run.
#[derive(Debug, Default)]
pub(super) struct Seen {
    running: BTreeMap<i32, bool>,
    /// Kind, interface, and what it is.
    ways: BTreeSet<(u16, i32, Vec<u8>)>,
}

impl Seen {
    /// Reads one datagram of the kernel; what cannot be read is passed over.
    fn handle(&mut self, mut bytes: &[u8]) -> Vec<News> {
        let mut news = Vec::new();
        while let Some(header) = bytes.get(..HEADER_LEN) {
            let len = u32_at(header, 0) as usize;
            let kind = u16::from_ne_bytes([header[4], header[5]]);
            let Some(body) = bytes.get(HEADER_LEN..len) else { break };
            news.extend(self.handle_message(kind, body));
            bytes = bytes.get(aligned(len)..).unwrap_or_default();
        }
        news
    }

    fn handle_message(&mut self, kind: u16, body: &[u8]) -> Option<News> {
        if self.running.len() > FACTS_MAX || self.ways.len() > FACTS_MAX {
            *self = Self::default();
        }
        match kind {
            NEW_LINK | DELETE_LINK if body.len() >= 16 => {
                let index = i32::from_ne_bytes(body[4..8].try_into().ok()?);
                let flags = u32_at(body, 8);
                let runs =
                    kind == NEW_LINK && flags & (FLAG_UP | FLAG_RUNNING) == FLAG_UP | FLAG_RUNNING;
                // One that was never heard of has been there, most likely.
                let ran = self.running.insert(index, runs).unwrap_or(true);
                if kind == DELETE_LINK {
                    self.running.remove(&index);
                }
                if !runs {
                    // Its routes go without a word of their own.
                    self.ways.retain(|(_, interface, _)| *interface != index);
                    return ran.then_some(News::Less);
                }
                let name = attribute(&body[16..], LINK_NAME)?;
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                (!ran).then(|| News::Link(String::from_utf8_lossy(name).into_owned()))
            }
            NEW_ADDRESS | DELETE_ADDRESS if body.len() >= 8 && body[3] == SCOPE_UNIVERSE => {
                let interface = i32::from_ne_bytes(body[4..8].try_into().ok()?);
                let attributes = &body[8..];
                let address = attribute(attributes, ADDRESS_LOCAL)
                    .or_else(|| attribute(attributes, ADDRESS_ADDRESS))?;
                self.note(kind == NEW_ADDRESS, (NEW_ADDRESS, interface, address.to_vec()))
            }
            NEW_ROUTE | DELETE_ROUTE
                if body.len() >= 12 && body[1] == 0 && body[4] == TABLE_MAIN =>
            {
                let attributes = &body[12..];
                let out = attribute(attributes, ROUTE_OUT)?;
                let out = i32::from_ne_bytes(out.try_into().ok()?);
                let gateway = attribute(attributes, ROUTE_GATEWAY).unwrap_or_default();
                self.note(kind == NEW_ROUTE, (NEW_ROUTE, out, gateway.to_vec()))
            }
            _ => None,
        }
    }

    fn note(&mut self, is_new: bool, way: (u16, i32, Vec<u8>)) -> Option<News> {
        match is_new {
            true => self.ways.insert(way).then_some(News::Way),
            false => {
                self.ways.remove(&way);
                Some(News::Less)
            }
        }
    }
}

/// The value of the first attribute of this kind.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let header = bytes.get(..4)?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = bytes.get(4..len)?;
        if u16::from_ne_bytes([header[2], header[3]]) == wanted {
            return Some(value);
        }
        bytes = bytes.get(aligned(len)..)?;
    }
}

fn aligned(len: usize) -> usize {
    len.next_multiple_of(4).max(4)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, fixed: &[u8], attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = fixed.to_vec();
        for (kind, value) in attributes {
            body.extend(u16::try_from(4 + value.len()).expect("short").to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(*value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        let mut bytes =
            u32::try_from(HEADER_LEN + body.len()).expect("short").to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(HEADER_LEN, 0);
        bytes.extend(body);
        bytes
    }

    fn link(kind: u16, flags: u32) -> Vec<u8> {
        let mut fixed = [0; 16];
        fixed[4..8].copy_from_slice(&3i32.to_ne_bytes());
        fixed[8..12].copy_from_slice(&flags.to_ne_bytes());
        message(kind, &fixed, &[(LINK_NAME, b"eth0\0")])
    }

    fn route(kind: u16, prefix: u8) -> Vec<u8> {
        let fixed = [2, prefix, 0, 0, TABLE_MAIN, 3, 0, 1, 0, 0, 0, 0];
        let out = 3i32.to_ne_bytes();
        message(kind, &fixed, &[(ROUTE_GATEWAY, &[10, 0, 0, 1]), (ROUTE_OUT, &out)])
    }

    fn address(kind: u16, scope: u8) -> Vec<u8> {
        message(kind, &[2, 24, 0, scope, 3, 0, 0, 0], &[(ADDRESS_LOCAL, &[10, 0, 0, 2])])
    }

    #[test]
    fn cable_that_is_pulled_and_put_back_is_news_and_so_is_the_route_that_comes_with_it() {
        let mut seen = Seen::default();
        let up = FLAG_UP | FLAG_RUNNING;
        assert_eq!(seen.handle(&link(NEW_LINK, up)), [], "it was up all the time");
        assert_eq!(seen.handle(&route(NEW_ROUTE, 0)), [News::Way]);
        assert_eq!(seen.handle(&link(NEW_LINK, FLAG_UP)), [News::Less]);
        assert_eq!(seen.handle(&link(NEW_LINK, FLAG_UP)), []);
        let both = [link(NEW_LINK, up), route(NEW_ROUTE, 0)].concat();
        assert_eq!(seen.handle(&both), [News::Link("eth0".into()), News::Way]);
        assert_eq!(seen.handle(&link(DELETE_LINK, up)), [News::Less]);
    }

    #[test]
    fn renewed_lease_and_routes_to_pods_are_no_news() {
        let mut seen = Seen::default();
        assert_eq!(seen.handle(&address(NEW_ADDRESS, 0)), [News::Way]);
        assert_eq!(seen.handle(&address(NEW_ADDRESS, 0)), []);
        assert_eq!(seen.handle(&address(NEW_ADDRESS, 253)), [], "of this link only");
        assert_eq!(seen.handle(&address(DELETE_ADDRESS, 0)), [News::Less]);
        assert_eq!(seen.handle(&address(NEW_ADDRESS, 0)), [News::Way]);
        assert_eq!(seen.handle(&route(NEW_ROUTE, 0)), [News::Way]);
        assert_eq!(seen.handle(&route(NEW_ROUTE, 0)), []);
        assert_eq!(seen.handle(&route(NEW_ROUTE, 24)), []);
    }

    #[test]
    fn mangled_messages_are_passed_over() {
        let good = [link(NEW_LINK, 0), route(NEW_ROUTE, 0), address(NEW_ADDRESS, 0)].concat();
        for len in 0..good.len() {
            Seen::default().handle(&good[..len]);
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            Seen::default().handle(&bad);
        }
    }

    #[tokio::test]
    async fn socket_opens() {
        assert!(Listener::open().is_ok());
    }
}
