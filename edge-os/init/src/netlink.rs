//! Netlink: messages of attributes, and a socket that asks the kernel and waits for its answer.
//!
//! [`route`] speaks of links, addresses, routes and neighbours, [`nft`] of nf_tables and
//! [`conntrack`] of tracked connections; all three are built from the writer and the readers here.
//! The network service and the CNI plugins are the callers. Nothing here decides anything, and
//! nothing here keeps a thread.
//!
//! Why not `netlink-packet-route`: it has neither nf_tables nor the router advertisement options
//! that carry name servers (`RTM_NEWNDUSEROPT`), so that a writer of attributes was needed beside
//! it; with that writer, its typed messages would have saved a few tables of constants.
//!
//! Source: Linux, include/uapi/linux/netlink.h; man 7 netlink.

pub mod conntrack;
pub mod nft;
pub mod route;
pub(crate) mod sys;

use socket2::{Domain, Protocol, Type};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// Length of the header of every message.
pub const HEADER_LEN: usize = 16;
/// Largest datagram that is read; the kernel's own dumps stay below 32 KiB.
pub const DATAGRAM_MAX: usize = 64 * 1024;
/// Answers of one dump that are read before it counts as endless.
const DATAGRAMS_MAX: usize = 4096;
/// How long the kernel may take to answer. It answers at once, except while it loads a module.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Room for notices while the service is busy. A burst beyond it ends in [`io::ErrorKind`] `ENOBUFS`
/// and the caller asks for everything again.
const RECEIVE_BUFFER: usize = 1024 * 1024;

pub(crate) const NLM_F_REQUEST: u16 = 1;
pub(crate) const NLM_F_ACK: u16 = 4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_REPLACE: u16 = 0x100;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Attribute that holds attributes.
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;

/// Why the kernel did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetlinkError {
    /// The socket could not be made or used.
    #[error("netlink socket: could not {what}")]
    Socket { what: &'static str, source: io::Error },
    /// The kernel refused.
    #[error("kernel refused to {what}")]
    Refused { what: String, source: io::Error },
    /// What came back is no answer to the question.
    #[error("kernel's answer to `{what}` cannot be read")]
    Answer { what: String },
}

impl NetlinkError {
    /// Returns the kernel's error number, if it was the kernel that refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the thing to make exists already.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(nix::libc::EEXIST)
    }

    /// Whether the thing to look at or to remove is not there.
    pub fn is_absent(&self) -> bool {
        use nix::libc::{EADDRNOTAVAIL, ENODEV, ENOENT, ESRCH};
        matches!(self.errno(), Some(ENOENT | ENODEV | ESRCH | EADDRNOTAVAIL))
    }
}

/// A request that is being written: header, the family's own header, attributes.
#[derive(Debug, Clone)]
pub struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// Starts a message of `kind` with `flags` (`NLM_F_REQUEST` is added) and the family's header.
    pub fn new(kind: u16, flags: u16, family_header: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER_LEN];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend_from_slice(family_header);
        let mut this = Self { bytes };
        this.align();
        this
    }

    /// Appends an attribute.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let len = u16::try_from(value.len() + 4).expect("attributes are written from short values");
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.align();
        self
    }

    /// Appends a number in the host's byte order (rtnetlink).
    pub fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// Appends a number in network byte order (nf_tables).
    pub fn number_be(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attribute(kind, &value.to_be_bytes())
    }

    /// Appends a text that ends with a zero byte.
    pub fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    /// Appends an attribute whose value is what `inside` writes: attributes, or a header and
    /// attributes.
    pub fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.attribute(kind | NLA_F_NESTED, &[]);
        inside(self);
        let len = u16::try_from(self.bytes.len() - start).expect("nests are shorter than 64 KiB");
        self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self
    }

    /// Appends bytes that are no attribute, such as a header within a nest.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self.align();
        self
    }

    /// Returns the message with its length and `sequence` filled in.
    pub fn finish(mut self, sequence: u32) -> Vec<u8> {
        let len = u32::try_from(self.bytes.len()).expect("messages are short");
        self.bytes[0..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }

    fn flags_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[6..8]
    }

    fn add_flags(&mut self, flags: u16) {
        let old = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]);
        self.flags_mut().copy_from_slice(&(old | flags).to_ne_bytes());
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// One message of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// Type of the message.
    pub kind: u16,
    /// Its `NLM_F_` flags.
    pub flags: u16,
    /// Number of the request that it answers; 0 for a notice.
    pub sequence: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

impl Message<'_> {
    /// Returns the error number of an error message: 0 is an acknowledgement, others are negative.
    fn error(&self) -> Option<i32> {
        let code = self.payload.first_chunk::<4>()?;
        (self.kind == NLMSG_ERROR).then(|| i32::from_ne_bytes(*code))
    }
}

/// Reads the messages of a datagram; stops at the first that is not whole.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let header = bytes.first_chunk::<HEADER_LEN>()?;
        let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
        let len = usize::try_from(len).ok()?;
        let payload = bytes.get(HEADER_LEN..len)?;
        let message = Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
            payload,
        };
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// Reads attributes as type and value; stops at the first that is not whole.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & NLA_TYPE_MASK;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Returns the value of the first attribute of type `kind`.
pub fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// Reads a number of four bytes in the host's order.
pub fn number(value: &[u8]) -> Option<u32> {
    value.first_chunk::<4>().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// Reads a number of four bytes in network order.
pub fn number_be(value: &[u8]) -> Option<u32> {
    value.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes))
}

/// Reads a text up to its zero byte.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// Which part of the kernel a socket speaks with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Links, addresses, routes, neighbours.
    Route,
    /// nf_tables and connection tracking.
    Netfilter,
}

/// A socket to the kernel, of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Socket {
    socket: socket2::Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket for questions.
    pub fn open(family: Family) -> Result<Self, NetlinkError> {
        let this = Self::bind(family, 0)?;
        this.socket
            .set_read_timeout(Some(ANSWER_TIMEOUT))
            .map_err(|source| NetlinkError::Socket { what: "set its timeout", source })?;
        Ok(this)
    }

    /// Opens a socket that hears the notices of `groups` (a mask) and never waits.
    pub fn listen(family: Family, groups: u32) -> Result<Self, NetlinkError> {
        let this = Self::bind(family, groups)?;
        // The bound is the kernel's when we may not raise it; a burst then costs a fresh dump.
        let _ = this.socket.set_recv_buffer_size(RECEIVE_BUFFER);
        this.socket
            .set_nonblocking(true)
            .map_err(|source| NetlinkError::Socket { what: "set it to non-blocking", source })?;
        Ok(this)
    }

    fn bind(family: Family, groups: u32) -> Result<Self, NetlinkError> {
        let protocol = match family {
            Family::Route => nix::libc::NETLINK_ROUTE,
            Family::Netfilter => nix::libc::NETLINK_NETFILTER,
        };
        let domain = Domain::from(nix::libc::AF_NETLINK);
        let socket = socket2::Socket::new(domain, Type::RAW, Some(Protocol::from(protocol)))
            .map_err(|source| NetlinkError::Socket { what: "open it", source })?;
        socket
            .bind(&sys::netlink_address(groups))
            .map_err(|source| NetlinkError::Socket { what: "bind it", source })?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; DATAGRAM_MAX] })
    }

    /// Sends `request` and waits until the kernel says that it is done.
    pub fn execute(&mut self, what: &str, mut request: Request) -> Result<(), NetlinkError> {
        request.add_flags(NLM_F_ACK);
        self.ask(what, request, |_| ())
    }

    /// Sends `request` for a dump and hands every object that comes back to `take`.
    ///
    /// A dump that changed while it was read is read again, so `take` may see an object twice.
    pub fn dump(
        &mut self,
        what: &str,
        mut request: Request,
        mut take: impl FnMut(&Message<'_>),
    ) -> Result<(), NetlinkError> {
        request.add_flags(NLM_F_DUMP);
        for _ in 0..3 {
            let mut interrupted = false;
            self.ask(what, request.clone(), |message| {
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                take(message);
            })?;
            if !interrupted {
                break;
            }
        }
        Ok(())
    }

    /// Sends `request` and returns the payload of the single object that answers it.
    pub fn get(&mut self, what: &str, request: Request) -> Result<Vec<u8>, NetlinkError> {
        let mut found = None;
        let mut request = request;
        request.add_flags(NLM_F_ACK);
        self.ask(what, request, |message| found = Some(message.payload.to_vec()))?;
        found.ok_or_else(|| NetlinkError::Answer { what: what.to_owned() })
    }

    /// Sends messages that the kernel takes or refuses together (an nf_tables batch); the first
    /// and the last are its frame.
    pub fn execute_batch(
        &mut self,
        what: &str,
        requests: Vec<Request>,
    ) -> Result<(), NetlinkError> {
        let first = self.sequence.wrapping_add(1);
        let count = requests.len();
        let mut bytes = Vec::new();
        for (at, mut request) in requests.into_iter().enumerate() {
            // The message before the end of the batch is the last one that is acknowledged.
            if at + 2 == count {
                request.add_flags(NLM_F_ACK);
            }
            self.sequence = self.sequence.wrapping_add(1);
            bytes.extend(request.finish(self.sequence));
        }
        let acknowledged = self.sequence.wrapping_sub(1);
        self.send(&bytes)?;
        for _ in 0..DATAGRAMS_MAX {
            let len = self.receive(what)?;
            for message in messages(&self.buffer[..len]) {
                if message.sequence.wrapping_sub(first) >= count as u32 {
                    continue; // an answer to an earlier question
                }
                match message.error() {
                    Some(0) if message.sequence == acknowledged => return Ok(()),
                    Some(0) | None => {}
                    Some(code) => {
                        // Later errors of the batch follow; they are skipped by their number.
                        let source = io::Error::from_raw_os_error(code.wrapping_neg());
                        return Err(NetlinkError::Refused { what: what.to_owned(), source });
                    }
                }
            }
        }
        Err(NetlinkError::Answer { what: what.to_owned() })
    }

    fn ask(
        &mut self,
        what: &str,
        request: Request,
        mut take: impl FnMut(&Message<'_>),
    ) -> Result<(), NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let bytes = request.finish(sequence);
        self.send(&bytes)?;
        for _ in 0..DATAGRAMS_MAX {
            let len = self.receive(what)?;
            for message in messages(&self.buffer[..len]) {
                if message.sequence != sequence {
                    continue;
                }
                match (message.kind, message.error()) {
                    (NLMSG_DONE, _) | (_, Some(0)) => return Ok(()),
                    (NLMSG_NOOP, _) => {}
                    (_, Some(code)) => {
                        let source = io::Error::from_raw_os_error(code.wrapping_neg());
                        return Err(NetlinkError::Refused { what: what.to_owned(), source });
                    }
                    (NLMSG_ERROR, None) => {
                        return Err(NetlinkError::Answer { what: what.to_owned() });
                    }
                    _ => take(&message),
                }
            }
        }
        Err(NetlinkError::Answer { what: what.to_owned() })
    }

    /// Reads the next datagram of notices; `None` when there is none.
    ///
    /// # Errors
    ///
    /// `ENOBUFS` when notices were lost; the caller has to look at everything again.
    pub fn next_notices(&mut self) -> io::Result<Option<&[u8]>> {
        match (&self.socket).read(&mut self.buffer) {
            Ok(len) => Ok(Some(&self.buffer[..len])),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        self.socket
            .send_to(bytes, &sys::netlink_address(0))
            .map(|_| ())
            .map_err(|source| NetlinkError::Socket { what: "send", source })
    }

    fn receive(&mut self, what: &str) -> Result<usize, NetlinkError> {
        loop {
            match (&self.socket).read(&mut self.buffer) {
                Ok(len) => return Ok(len),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(NetlinkError::Answer { what: what.to_owned() });
                }
                Err(source) => return Err(NetlinkError::Socket { what: "receive", source }),
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_reads_back_as_it_was_written() {
        let mut request = Request::new(16, 0, &[7; 16]);
        request.text(3, "eth0").nest(18, |nest| {
            nest.text(1, "veth").number(2, 9);
        });
        let bytes = request.finish(5);
        let read: Vec<_> = messages(&bytes).collect();
        assert_eq!(read.len(), 1);
        assert_eq!((read[0].kind, read[0].sequence), (16, 5));
        assert_eq!(read[0].payload[..16], [7; 16]);
        let body = &read[0].payload[16..];
        assert_eq!(attribute(body, 3).map(text).as_deref(), Some("eth0"));
        let nest = attribute(body, 18).expect("the nest is there");
        assert_eq!(attribute(nest, 1).map(text).as_deref(), Some("veth"));
        assert_eq!(attribute(nest, 2).and_then(number), Some(9));
    }

    #[test]
    fn readers_end_on_every_cut_and_every_flipped_byte() {
        let mut request = Request::new(16, 0, &[0; 16]);
        request.text(3, "eth0").nest(18, |nest| {
            nest.text(1, "veth").number(2, 9);
        });
        let bytes = request.finish(5);
        let read = |bytes: &[u8]| {
            for message in messages(bytes) {
                for (_, value) in attributes(message.payload.get(16..).unwrap_or_default()) {
                    let _ = (attributes(value).count(), text(value), number(value));
                }
            }
        };
        for cut in 0..bytes.len() {
            read(&bytes[..cut]);
        }
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut broken = bytes.clone();
                broken[at] ^= 1 << bit;
                read(&broken);
            }
        }
        // Lengths of zero must not make a reader turn for ever.
        read(&[0; 64]);
    }
}
