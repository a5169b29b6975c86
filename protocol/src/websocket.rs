//! WebSocket (RFC 6455) without a socket: frames in both directions, and the checks of the opening handshake.
//!
//! The link's WebSocket transport and the stream tunnel are the callers, on both ends: they read bytes from TLS into a
//! [`BytesMut`], take messages from a [`Decoder`], and write what [`encode`] appended. Own code and no library because
//! KubeEdge's tunnel sends arbitrary bytes in Text frames, which libraries refuse: Text is not checked for UTF-8 here.
//! For the rest this is as strict as the RFC: masks where they have to be, no reserved bits, no extensions, shortest
//! lengths, short unfragmented control frames.
//!
//! A message that came in one frame is handed over without a copy. A decoder never holds more than has arrived, and
//! refuses a message by its announced length before it has arrived.
//!
//! Source: RFC 6455, sections 1.3, 4 and 5; kubeedge/kubeedge uses gorilla/websocket, which writes messages over
//! 4 KiB in fragments and may end them with an empty one.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use sha1::{Digest as _, Sha1};

/// Fragments of one message. At 4 KiB each, as the Go peers write them, the largest message has about 8,200; the bound
/// is for a peer that sends empty ones for ever.
pub const FRAGMENTS_MAX: u32 = 16_384;
/// The most bytes that a ping, pong or close frame carries.
pub const CONTROL_LEN_MAX: usize = 125;
/// The longest header: two bytes, eight of length, four of mask.
pub const HEADER_LEN_MAX: usize = 14;

/// Appended to the client's key before it is hashed.
const ACCEPT_SALT: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Which end of the connection we are. A client masks what it sends and takes only unmasked frames, a server the other
/// way round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// We dialled.
    Client,
    /// We were dialled.
    Server,
}

/// What a frame is, with its number on the wire. Fragments are put together by the [`Decoder`] and never written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Opcode {
    /// A text, or in KubeEdge's tunnel any bytes.
    Text = 0x1,
    /// Any bytes.
    Binary = 0x2,
    /// The end; empty, or a [`CloseCode`] in two bytes and a text.
    Close = 0x8,
    /// Asks for a pong with the same bytes.
    Ping = 0x9,
    /// Answers a ping, or comes by itself.
    Pong = 0xa,
}

/// One message from the peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A text that nobody has checked for UTF-8.
    Text(Bytes),
    /// Any bytes.
    Binary(Bytes),
    /// To be answered by a pong with the same bytes, at most [`CONTROL_LEN_MAX`].
    Ping(Bytes),
    /// Any bytes, at most [`CONTROL_LEN_MAX`].
    Pong(Bytes),
    /// The peer sends no more. To be answered by a close frame, once.
    Close(Close),
}

/// Why a peer closes the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Close {
    /// `None` when the peer said nothing.
    pub code: Option<CloseCode>,
    /// Text for people, not checked for UTF-8, at most 123 bytes.
    pub reason: Bytes,
}

/// Number in a close frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CloseCode(pub u16);

impl CloseCode {
    /// The work is done.
    pub const NORMAL: Self = Self(1000);
    /// The program ends.
    pub const GOING_AWAY: Self = Self(1001);
    /// The peer broke the rules of this page.
    pub const PROTOCOL: Self = Self(1002);
    /// The peer sent a kind of message that is not understood.
    pub const UNSUPPORTED: Self = Self(1003);
    /// The content of a message is not what it claims to be.
    pub const INVALID: Self = Self(1007);
    /// Refused for a reason that has no other number, such as an unknown node.
    pub const POLICY: Self = Self(1008);
    /// A message is over the bound.
    pub const TOO_LONG: Self = Self(1009);
    /// We failed.
    pub const INTERNAL: Self = Self(1011);
    /// We restart; dial again.
    pub const RESTART: Self = Self(1012);
    /// Too busy; dial again later.
    pub const TRY_LATER: Self = Self(1013);

    /// Whether this number may stand in a close frame (RFC 6455, section 7.4, and its registry).
    pub fn is_allowed(self) -> bool {
        matches!(self.0, 1000..=1003 | 1007..=1014 | 3000..=4999)
    }
}

/// How a peer broke the framing. The connection is of no use after that; see [`FrameError::close_code`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A client sent a frame without a mask.
    #[error("WebSocket frame of a client is not masked")]
    NotMasked,
    /// A server sent a frame with a mask.
    #[error("WebSocket frame of a server is masked")]
    Masked,
    /// A bit is set that only an extension could give a meaning.
    #[error("WebSocket frame has reserved bits set")]
    ReservedBits,
    /// An opcode that nobody has defined.
    #[error("WebSocket frame has the unknown opcode {0:#x}")]
    Opcode(u8),
    /// A length is not written in the shortest form, or has more than 63 bits.
    #[error("WebSocket frame has a malformed length")]
    Length,
    /// A ping, pong or close frame in fragments or over [`CONTROL_LEN_MAX`].
    #[error("WebSocket control frame is fragmented or over {CONTROL_LEN_MAX} bytes")]
    Control,
    /// A continuation of nothing.
    #[error("WebSocket continuation frame continues no message")]
    Continuation,
    /// A new message before the last fragment of the one before it.
    #[error("WebSocket message begins inside another one")]
    Interrupted,
    /// More than [`FRAGMENTS_MAX`].
    #[error("WebSocket message has more than {FRAGMENTS_MAX} fragments")]
    Fragments,
    /// The message is over the decoder's bound.
    #[error("WebSocket message of at least {len} bytes is over the bound of {max} bytes")]
    TooLong {
        /// Announced length of what has been seen of it, in bytes.
        len: u64,
        /// The bound, in bytes.
        max: usize,
    },
    /// A close frame of one byte or with a number that must not be sent.
    #[error("WebSocket close frame is malformed")]
    Close,
}

impl FrameError {
    /// What to tell the peer.
    pub fn close_code(self) -> CloseCode {
        match self {
            Self::TooLong { .. } => CloseCode::TOO_LONG,
            _ => CloseCode::PROTOCOL,
        }
    }
}

/// Takes messages out of the bytes of one connection.
#[derive(Debug)]
pub struct Decoder {
    role: Role,
    message_len_max: usize,
    /// The message whose fragments are coming in.
    partial: Option<Partial>,
    end: Option<End>,
}

#[derive(Debug)]
struct Partial {
    binary: bool,
    fragments: u32,
    payload: BytesMut,
}

#[derive(Debug, Clone, Copy)]
enum End {
    Closed,
    Failed(FrameError),
}

/// What stands before the payload of one frame.
struct FrameHeader {
    last: bool,
    kind: FrameKind,
    mask: Option<[u8; 4]>,
    /// Length of the header itself.
    len: usize,
    payload_len: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FrameKind {
    Continuation,
    Start(Opcode),
    Control(Opcode),
}

impl Decoder {
    /// A decoder for our end of a connection. `message_len_max` bounds one message, in bytes, all fragments together.
    /// Nothing is allocated before fragments arrive.
    pub fn new(role: Role, message_len_max: usize) -> Self {
        Self { role, message_len_max, partial: None, end: None }
    }

    /// Takes the next message out of `bytes`, which is what has arrived and was not taken yet. `None` when more has to
    /// arrive first; after a close frame that is for ever, and `bytes` is emptied.
    ///
    /// # Errors
    ///
    /// [`FrameError`] when the peer broke the rules; every later call returns the same.
    pub fn decode(&mut self, bytes: &mut BytesMut) -> Result<Option<Message>, FrameError> {
        match self.end {
            Some(End::Failed(error)) => return Err(error),
            Some(End::Closed) => {
                bytes.clear();
                return Ok(None);
            }
            None => {}
        }
        let decoded = self.decode_open(bytes);
        match &decoded {
            Ok(Some(Message::Close(_))) => self.finish(End::Closed),
            Err(error) => self.finish(End::Failed(*error)),
            Ok(_) => {}
        }
        decoded
    }

    /// Bytes of an unfinished message that are held here, beside those in the caller's buffer.
    pub fn held_len(&self) -> usize {
        self.partial.as_ref().map_or(0, |partial| partial.payload.capacity())
    }

    fn finish(&mut self, end: End) {
        self.partial = None;
        self.end = Some(end);
    }

    fn decode_open(&mut self, bytes: &mut BytesMut) -> Result<Option<Message>, FrameError> {
        loop {
            let Some(header) = self.header(bytes)? else { return Ok(None) };
            // The sum cannot overflow: the payload is within the bound.
            if bytes.len() < header.len + header.payload_len {
                return Ok(None);
            }
            bytes.advance(header.len);
            let mut payload = bytes.split_to(header.payload_len);
            if let Some(mask) = header.mask {
                apply_mask(&mut payload, mask);
            }
            if let Some(message) = self.handle_frame(header.last, header.kind, payload)? {
                return Ok(Some(message));
            }
        }
    }

    /// Reads and checks a frame's header without taking it; `None` while it is incomplete.
    fn header(&self, bytes: &[u8]) -> Result<Option<FrameHeader>, FrameError> {
        let &[first, second, ref rest @ ..] = bytes else { return Ok(None) };
        if first & 0x70 != 0 {
            return Err(FrameError::ReservedBits);
        }
        let last = first & 0x80 != 0;
        let kind = match first & 0x0f {
            0x0 => FrameKind::Continuation,
            0x1 => FrameKind::Start(Opcode::Text),
            0x2 => FrameKind::Start(Opcode::Binary),
            0x8 => FrameKind::Control(Opcode::Close),
            0x9 => FrameKind::Control(Opcode::Ping),
            0xa => FrameKind::Control(Opcode::Pong),
            unknown => return Err(FrameError::Opcode(unknown)),
        };
        match (kind, &self.partial) {
            (FrameKind::Continuation, None) => return Err(FrameError::Continuation),
            (FrameKind::Start(_), Some(_)) => return Err(FrameError::Interrupted),
            (FrameKind::Continuation, Some(partial)) if partial.fragments >= FRAGMENTS_MAX => {
                return Err(FrameError::Fragments);
            }
            _ => {}
        }
        let masked = second & 0x80 != 0;
        match self.role {
            Role::Server if !masked => return Err(FrameError::NotMasked),
            Role::Client if masked => return Err(FrameError::Masked),
            _ => {}
        }
        let short = second & 0x7f;
        if matches!(kind, FrameKind::Control(_)) && (!last || usize::from(short) > CONTROL_LEN_MAX)
        {
            return Err(FrameError::Control);
        }
        let (payload_len, rest) = match short {
            126 => match rest.split_first_chunk() {
                Some((len, rest)) => (u64::from(u16::from_be_bytes(*len)), rest),
                None => return Ok(None),
            },
            127 => match rest.split_first_chunk() {
                Some((len, rest)) => (u64::from_be_bytes(*len), rest),
                None => return Ok(None),
            },
            short => (u64::from(short), rest),
        };
        let shortest = match short {
            126 => payload_len > 125,
            127 => payload_len > u64::from(u16::MAX) && payload_len < 1 << 63,
            _ => true,
        };
        if !shortest {
            return Err(FrameError::Length);
        }
        if !matches!(kind, FrameKind::Control(_)) {
            let held = self.partial.as_ref().map_or(0, |partial| partial.payload.len());
            let len = payload_len.saturating_add(held as u64);
            if len > self.message_len_max as u64 {
                return Err(FrameError::TooLong { len, max: self.message_len_max });
            }
        }
        let (mask, rest) = match rest.split_first_chunk() {
            _ if !masked => (None, rest),
            Some((mask, rest)) => (Some(*mask), rest),
            None => return Ok(None),
        };
        Ok(Some(FrameHeader {
            last,
            kind,
            mask,
            len: bytes.len() - rest.len(),
            payload_len: payload_len as usize,
        }))
    }

    /// Takes one complete frame. Returns the message that it completes, if it does.
    fn handle_frame(
        &mut self,
        last: bool,
        kind: FrameKind,
        payload: BytesMut,
    ) -> Result<Option<Message>, FrameError> {
        match kind {
            FrameKind::Control(opcode) => control(opcode, payload.freeze()).map(Some),
            FrameKind::Start(opcode) => {
                let binary = opcode == Opcode::Binary;
                if last {
                    return Ok(Some(data(binary, payload.freeze())));
                }
                // A copy, so that the message grows in its own memory and not in a slice of what was read.
                let payload = BytesMut::from(&payload[..]);
                self.partial = Some(Partial { binary, fragments: 1, payload });
                Ok(None)
            }
            FrameKind::Continuation => {
                let partial = self.partial.as_mut().ok_or(FrameError::Continuation)?;
                partial.fragments += 1;
                partial.payload.extend_from_slice(&payload);
                let complete = self.partial.take_if(|_| last);
                Ok(complete.map(|complete| data(complete.binary, complete.payload.freeze())))
            }
        }
    }
}

fn data(binary: bool, payload: Bytes) -> Message {
    if binary { Message::Binary(payload) } else { Message::Text(payload) }
}

fn control(opcode: Opcode, mut payload: Bytes) -> Result<Message, FrameError> {
    match opcode {
        Opcode::Ping => Ok(Message::Ping(payload)),
        Opcode::Pong => Ok(Message::Pong(payload)),
        _ if payload.is_empty() => Ok(Message::Close(Close { code: None, reason: payload })),
        _ if payload.len() < 2 => Err(FrameError::Close),
        _ => match CloseCode(payload.get_u16()) {
            code if code.is_allowed() => {
                Ok(Message::Close(Close { code: Some(code), reason: payload }))
            }
            _ => Err(FrameError::Close),
        },
    }
}

/// Appends one unfragmented frame to `out`. `mask` is used when `role` is [`Role::Client`] and has to be unpredictable
/// for whoever chooses the payload; TLS below makes that a formality. The payload of a control frame is cut to
/// [`CONTROL_LEN_MAX`] bytes.
pub fn encode(role: Role, opcode: Opcode, payload: &[u8], mask: [u8; 4], out: &mut BytesMut) {
    let control = opcode as u8 & 0x8 != 0;
    let payload = match payload.get(..CONTROL_LEN_MAX) {
        Some(head) if control => head,
        _ => payload,
    };
    out.reserve(HEADER_LEN_MAX + payload.len());
    encode_header(role, opcode, payload.len(), mask, out);
    let start = out.len();
    out.put_slice(payload);
    if role == Role::Client {
        apply_mask(&mut out[start..], mask);
    }
}

/// Appends the header of one unfragmented frame to `out`, for a payload that the caller writes itself. A client's has
/// to be masked by [`apply_mask`] first.
pub fn encode_header(
    role: Role,
    opcode: Opcode,
    payload_len: usize,
    mask: [u8; 4],
    out: &mut BytesMut,
) {
    out.put_u8(0x80 | opcode as u8);
    let mask_bit = if role == Role::Client { 0x80 } else { 0 };
    match payload_len {
        0..=125 => out.put_u8(mask_bit | payload_len as u8),
        126..=0xffff => {
            out.put_u8(mask_bit | 126);
            out.put_u16(payload_len as u16);
        }
        _ => {
            out.put_u8(mask_bit | 127);
            out.put_u64(payload_len as u64);
        }
    }
    if role == Role::Client {
        out.put_slice(&mask);
    }
}

/// Appends a close frame to `out`; `reason` is cut to what fits, at a character's end.
pub fn encode_close(role: Role, code: CloseCode, reason: &str, mask: [u8; 4], out: &mut BytesMut) {
    let reason = &reason[..reason.floor_char_boundary(CONTROL_LEN_MAX - 2)];
    let mut payload = Vec::with_capacity(CONTROL_LEN_MAX);
    payload.put_u16(code.0);
    payload.put_slice(reason.as_bytes());
    encode(role, Opcode::Close, &payload, mask, out);
}

/// Masks `payload`, or unmasks it: both are the same.
pub fn apply_mask(payload: &mut [u8], mask: [u8; 4]) {
    let [a, b, c, d] = mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (chunks, rest) = payload.as_chunks_mut::<8>();
    for chunk in chunks {
        *chunk = (u64::from_ne_bytes(*chunk) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.into_iter().cycle()) {
        *byte ^= mask;
    }
}

/// Why an opening handshake is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The request is no GET.
    #[error("WebSocket handshake with method `{0}` instead of `GET`")]
    Method(String),
    /// The server answered with another status than 101.
    #[error("WebSocket handshake was answered with status {0}")]
    Status(u16),
    /// A header is missing or has another value than it must have.
    #[error("WebSocket handshake has no valid header `{0}`")]
    Header(&'static str),
    /// The server wants something that was not offered.
    #[error("WebSocket handshake was answered with the header `{0}` that was not asked for")]
    NotOffered(&'static str),
}

/// A fresh value for the client's `Sec-WebSocket-Key`, from 16 random bytes.
pub fn client_key(random: [u8; 16]) -> String {
    BASE64.encode(random)
}

/// The value of `Sec-WebSocket-Accept` that answers `key`.
pub fn accept_key(key: &str) -> String {
    let mut hash = Sha1::new();
    hash.update(key.trim().as_bytes());
    hash.update(ACCEPT_SALT.as_bytes());
    BASE64.encode(hash.finalize())
}

/// Headers of the client's request that ask for a WebSocket; the caller adds `Host` and its own.
pub fn request_headers(key: &str) -> [(&'static str, &str); 4] {
    [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", key),
    ]
}

/// Checks a request for a WebSocket and returns the value of `Sec-WebSocket-Accept` for the answer, which has status
/// 101 and the headers `Connection: Upgrade` and `Upgrade: websocket` beside it. Offered extensions and subprotocols
/// are not looked at, and not granted. `headers` are all headers whose values are texts; a header may come twice.
///
/// # Errors
///
/// [`HandshakeError`]; status 400 answers it, with `Sec-WebSocket-Version: 13`.
pub fn check_request<'a>(
    method: &str,
    headers: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<String, HandshakeError> {
    if method != "GET" {
        return Err(HandshakeError::Method(method.chars().take(16).collect()));
    }
    let found = Found::of(headers);
    found.check_upgrade()?;
    if !found.version_13 {
        return Err(HandshakeError::Header("Sec-WebSocket-Version"));
    }
    let key = found.key.filter(|key| is_client_key(key));
    key.map(accept_key).ok_or(HandshakeError::Header("Sec-WebSocket-Key"))
}

/// Checks the server's answer to a request with `key` that offered no extension and no subprotocol.
///
/// # Errors
///
/// [`HandshakeError`]; with [`HandshakeError::Status`] the answer is an ordinary one, and its body may say more.
pub fn check_response<'a>(
    status: u16,
    key: &str,
    headers: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<(), HandshakeError> {
    if status != 101 {
        return Err(HandshakeError::Status(status));
    }
    let found = Found::of(headers);
    found.check_upgrade()?;
    if found.accept != Some(accept_key(key).as_str()) {
        return Err(HandshakeError::Header("Sec-WebSocket-Accept"));
    }
    match (found.extensions, found.protocol) {
        (true, _) => Err(HandshakeError::NotOffered("Sec-WebSocket-Extensions")),
        (_, true) => Err(HandshakeError::NotOffered("Sec-WebSocket-Protocol")),
        _ => Ok(()),
    }
}

/// Whether `key` is 16 bytes in base64.
pub fn is_client_key(key: &str) -> bool {
    let mut decoded = [0; 18];
    matches!(BASE64.decode_slice(key, &mut decoded), Ok(16))
}

/// What the headers of a handshake say.
#[derive(Default)]
struct Found<'a> {
    upgrade: bool,
    connection: bool,
    version_13: bool,
    extensions: bool,
    protocol: bool,
    key: Option<&'a str>,
    accept: Option<&'a str>,
}

impl<'a> Found<'a> {
    fn of(headers: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut found = Self::default();
        let has = |value: &str, token: &str| {
            value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token))
        };
        for (name, value) in headers {
            let is = |other: &str| name.eq_ignore_ascii_case(other);
            if is("upgrade") {
                found.upgrade |= has(value, "websocket");
            } else if is("connection") {
                found.connection |= has(value, "upgrade");
            } else if is("sec-websocket-version") {
                found.version_13 |= has(value, "13");
            } else if is("sec-websocket-key") {
                found.key = found.key.or(Some(value.trim()));
            } else if is("sec-websocket-accept") {
                found.accept = found.accept.or(Some(value.trim()));
            } else if is("sec-websocket-extensions") {
                found.extensions |= !value.trim().is_empty();
            } else if is("sec-websocket-protocol") {
                found.protocol |= !value.trim().is_empty();
            }
        }
        found
    }

    fn check_upgrade(&self) -> Result<(), HandshakeError> {
        match (self.upgrade, self.connection) {
            (false, _) => Err(HandshakeError::Header("Upgrade")),
            (_, false) => Err(HandshakeError::Header("Connection")),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
