//! Just enough netlink to ask: requests with attributes, the errno and the kernel's words that come back.
//!
//! Facts: include/uapi/linux/netlink.h and the headers of the families that net.rs names.

use super::sys::{self, Errno};
use std::os::fd::OwnedFd;

/// Request and acknowledge.
pub(super) const ASK: u16 = 0x1 | 0x4;
/// Create, and fail when it is there.
pub(super) const CREATE: u16 = 0x400 | 0x200;
/// All of them.
pub(super) const DUMP: u16 = 0x300;

/// Longest answer that is looked at.
const ANSWER_LEN: usize = 64 << 10;
/// Longest wait for one answer, milliseconds; the run has its own bound beside this.
const ANSWER_MS: i32 = 5_000;

/// A refusal: errno and the kernel's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    /// The errno.
    pub(super) errno: Errno,
    /// The extended acknowledgement's text.
    pub(super) text: String,
}

impl Refused {
    /// For evidence.
    pub(super) fn words(&self) -> String {
        match self.text.is_empty() {
            true => sys::errno_text(self.errno),
            false => format!("{}: {}", sys::errno_text(self.errno), self.text),
        }
    }
}

/// A message being built.
pub(super) struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    /// A message of a type, with its fixed header.
    pub(super) fn new(kind: u16, flags: u16, header: &[u8]) -> Self {
        Self { kind, flags, body: header.to_vec() }
    }

    /// With an attribute.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.body.extend(attribute(kind, value));
        self
    }

    /// Its bytes, with a sequence number.
    pub(super) fn bytes(&self, sequence: u32) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16 + self.body.len());
        bytes.extend(((16 + self.body.len()) as u32).to_ne_bytes());
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend(self.flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(&self.body);
        bytes
    }
}

/// An attribute, padded.
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = 4 + value.len();
    let mut bytes = (len as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(len.next_multiple_of(4), 0);
    bytes
}

/// Attributes inside an attribute.
pub(super) fn nest(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | 0x8000, &parts.concat())
}

/// A text with its NUL.
pub(super) fn text(value: &str) -> Vec<u8> {
    [value.as_bytes(), b"\0"].concat()
}

/// The attributes in `bytes`: (kind, value). What is damaged ends the list.
pub(super) fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while bytes.len() >= 4 {
        let len = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
        let kind = u16::from_ne_bytes([bytes[2], bytes[3]]) & 0x3fff;
        if len < 4 || len > bytes.len() {
            break;
        }
        found.push((kind, &bytes[4..len]));
        bytes = &bytes[len.next_multiple_of(4).min(bytes.len())..];
    }
    found
}

/// A netlink socket of a family.
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// What one request got: the bodies of its answers, headers of the family included.
pub(super) type Answers = Vec<(u16, Vec<u8>)>;

impl Netlink {
    /// Opens one; `protocol` is 0 (route), 12 (netfilter), 16 (generic), ….
    pub(super) fn open(protocol: i32) -> Result<Self, Errno> {
        let socket = sys::socket(16, 3, protocol)?;
        // Extended acknowledgements: kernels before 4.12 have none.
        let _ = sys::set_option(&socket, 270, 11, &1u32.to_ne_bytes());
        sys::bind(&socket, &[16u16.to_ne_bytes().as_slice(), &[0; 10]].concat())?;
        Ok(Self { socket, sequence: 1 })
    }

    /// Sends one request and reads until its acknowledgement or the end of its answers.
    pub(super) fn ask(&mut self, message: &Message) -> Result<Answers, Refused> {
        self.batch(std::slice::from_ref(message), 0)
    }

    /// Sends messages in one datagram; answers and acknowledgement are those of message `of`.
    pub(super) fn batch(&mut self, messages: &[Message], of: usize) -> Result<Answers, Refused> {
        let first = self.sequence;
        self.sequence += messages.len() as u32;
        let refused = |errno| Refused { errno, text: String::new() };
        let bytes: Vec<u8> = messages
            .iter()
            .enumerate()
            .flat_map(|(i, message)| message.bytes(first + i as u32))
            .collect();
        sys::send(&self.socket, &bytes).map_err(refused)?;
        let wanted = first + of as u32;
        let mut answers = Vec::new();
        let mut buffer = vec![0u8; ANSWER_LEN];
        loop {
            if !sys::readable(&self.socket, ANSWER_MS) {
                return Err(Refused { errno: 110, text: "the kernel does not answer".into() });
            }
            let got = sys::receive(&self.socket, &mut buffer).map_err(refused)?;
            let mut rest = &buffer[..got];
            while rest.len() >= 16 {
                let u32_at = |at: usize| {
                    u32::from_ne_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]])
                };
                let len = (u32_at(0) as usize).clamp(16, rest.len());
                let kind = u16::from_ne_bytes([rest[4], rest[5]]);
                let (sequence, body) = (u32_at(8), &rest[16..len]);
                match kind {
                    // Another message of the batch failed: the whole batch did.
                    2 if sequence == wanted || error_of(body) != 0 => {
                        return acknowledged(body, answers);
                    }
                    2 => {}
                    3 if sequence == wanted => return Ok(answers),
                    _ if sequence == wanted => answers.push((kind, body.to_vec())),
                    _ => {}
                }
                rest = &rest[len.next_multiple_of(4).min(rest.len())..];
            }
        }
    }
}

fn error_of(body: &[u8]) -> i32 {
    body.get(..4).map_or(0, |b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

fn acknowledged(body: &[u8], answers: Answers) -> Result<Answers, Refused> {
    match error_of(body) {
        0 => Ok(answers),
        error => {
            // The request's header follows, whole or capped; the words come in attributes behind it.
            let words = body
                .get(20..)
                .map(|rest| {
                    let whole = body
                        .get(4..8)
                        .map_or(0, |l| u32::from_ne_bytes([l[0], l[1], l[2], l[3]]) as usize);
                    let capped = attributes(rest);
                    let after = body
                        .get(4 + whole.next_multiple_of(4)..)
                        .map(attributes)
                        .unwrap_or_default();
                    let texts = capped.into_iter().chain(after).filter(|(kind, _)| *kind == 1);
                    texts
                        .filter_map(|(_, text)| std::str::from_utf8(text).ok())
                        .map(|text| text.trim_end_matches('\0').to_owned())
                        .find(|text| text.len() > 3 && text.chars().all(|c| !c.is_control()))
                        .unwrap_or_default()
                })
                .unwrap_or_default();
            Err(Refused { errno: -error, text: words })
        }
    }
}

/// The number of a generic netlink family.
pub(super) fn family(name: &str) -> Result<u16, Refused> {
    let mut netlink = Netlink::open(16).map_err(|errno| Refused { errno, text: String::new() })?;
    let ask = Message::new(16, ASK, &[3, 1, 0, 0]).with(2, &text(name));
    let answers = netlink.ask(&ask)?;
    let found = answers.iter().flat_map(|(_, body)| attributes(body.get(4..).unwrap_or_default()));
    let id = found
        .filter(|(kind, _)| *kind == 1)
        .find_map(|(_, id)| Some(u16::from_ne_bytes([*id.first()?, *id.get(1)?])));
    id.ok_or(Refused { errno: 2, text: "the answer has no number".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_written() {
        let bytes = [attribute(3, b"ab"), nest(5, &[attribute(1, &[7])])].concat();
        assert_eq!(bytes.len() % 4, 0);
        let read = attributes(&bytes);
        assert_eq!(read[0], (3, &b"ab"[..]));
        assert_eq!(attributes(read[1].1), [(1, &[7][..])]);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_attributes(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..80)) {
            attributes(&bytes);
            let _ = acknowledged(&bytes, Vec::new());
        }
    }
}
