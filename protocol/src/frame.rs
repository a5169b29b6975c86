//! Frames of a QUIC stream between our own ends.
//!
//! The edge opens one bidirectional control stream and writes a [`Hello`]; the hub answers a [`HelloReply`] on it. Then
//! each end opens unidirectional streams, one per priority class when it is first needed; the first byte of such a
//! stream is the class's number ([`crate::Class`]), and frames follow. Beats are datagrams and no frames. The QUIC
//! transports of CloudCore and EdgeCore are the callers.
//!
//! Layout, big endian: payload length (4 bytes), kind (1), payload. KubeEdge's own QUIC is another protocol (Google
//! QUIC, without client authentication) and is not offered.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

/// Protocol name of the TLS handshake below.
pub const ALPN: &[u8] = b"skerry/1";
/// Bytes before the payload.
pub const HEADER_LEN: usize = 5;
/// The most bytes that a [`Hello`] or a [`HelloReply`] takes; the decoder of a control stream gets this bound.
pub const HELLO_LEN_MAX: usize = 4096;

/// What the payload of a frame is, with its number on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// One message in JSON.
    Message = 0,
    /// Several messages; see [`crate::batch`].
    Batch = 1,
    /// A [`Hello`] or a [`HelloReply`].
    Hello = 2,
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What the payload is.
    pub kind: Kind,
    /// Within the decoder's bound.
    pub payload: Bytes,
}

/// Why a stream holds no frame. The stream cannot be used after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A kind that nobody has defined.
    #[error("stream frame has the unknown kind {0}")]
    Kind(u8),
    /// The announced payload is over the bound.
    #[error("stream frame of {len} bytes is over the bound of {max} bytes")]
    TooLong {
        /// Announced length of the payload, in bytes.
        len: u32,
        /// The bound, in bytes.
        max: usize,
    },
}

/// Takes frames out of the bytes of one stream. Holds nothing itself.
#[derive(Debug, Clone, Copy)]
pub struct Decoder {
    payload_len_max: usize,
}

impl Decoder {
    /// A decoder for one stream; `payload_len_max` bounds a frame, in bytes.
    pub fn new(payload_len_max: usize) -> Self {
        Self { payload_len_max }
    }

    /// Takes the next frame out of `bytes`, without a copy; `None` when more has to arrive first. An oversized frame is
    /// refused by its header.
    ///
    /// # Errors
    ///
    /// [`FrameError`]; nothing is taken, so every later call returns the same.
    pub fn decode(&self, bytes: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        let Some(&[a, b, c, d, kind]) = bytes.first_chunk() else { return Ok(None) };
        let len = u32::from_be_bytes([a, b, c, d]);
        let kind = match kind {
            0 => Kind::Message,
            1 => Kind::Batch,
            2 => Kind::Hello,
            unknown => return Err(FrameError::Kind(unknown)),
        };
        let max = self.payload_len_max;
        let payload_len = usize::try_from(len).ok().filter(|len| *len <= max);
        let payload_len = payload_len.ok_or(FrameError::TooLong { len, max })?;
        if bytes.len() - HEADER_LEN < payload_len {
            return Ok(None);
        }
        bytes.advance(HEADER_LEN);
        Ok(Some(Frame { kind, payload: bytes.split_to(payload_len).freeze() }))
    }
}

/// Appends one frame to `out`. A payload is far below the 4 GiB that the length field can tell: every decoder's bound
/// is smaller.
pub fn encode(kind: Kind, payload: &[u8], out: &mut BytesMut) {
    out.reserve(HEADER_LEN + payload.len());
    out.put_slice(&encode_header(kind, payload.len()));
    out.put_slice(payload);
}

/// The header of a frame whose payload the caller writes itself.
pub fn encode_header(kind: Kind, payload_len: usize) -> [u8; HEADER_LEN] {
    let len = u32::try_from(payload_len).expect("a payload is within the bound of a decoder");
    let [a, b, c, d] = len.to_be_bytes();
    [a, b, c, d, kind as u8]
}

/// First frame of an edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The node's name; the same as in its certificate.
    pub node: String,
    /// KubeEdge's project id.
    #[serde(default)]
    pub project: String,
    /// In the form of [`crate::capability::HEADER`].
    #[serde(default)]
    pub capabilities: String,
}

/// First frame of a hub.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum HelloReply {
    /// The edge has to go away; the hub closes the connection.
    Refused {
        /// Why, for people.
        refused: String,
        /// Milliseconds after which it may dial again; the edge's own back-off when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_after_ms: Option<u64>,
    },
    /// The link is up.
    Accepted {
        /// In the form of [`crate::capability::HEADER`].
        capabilities: String,
    },
}

/// Why a first frame is none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HelloError {
    /// The stream begins with another frame.
    #[error("stream begins with a frame of kind {0:?} instead of a hello")]
    Kind(Kind),
    /// Over [`HELLO_LEN_MAX`].
    #[error("hello of {0} bytes is over the bound of {HELLO_LEN_MAX} bytes")]
    TooLong(usize),
    /// Not the JSON of a hello.
    #[error("hello is not valid")]
    Invalid(#[source] serde_json::Error),
}

impl Hello {
    /// The frame on the wire.
    pub fn encode(&self) -> BytesMut {
        encode_json(self)
    }

    /// Reads the first frame of a control stream.
    ///
    /// # Errors
    ///
    /// [`HelloError`] when it is something else.
    pub fn decode(frame: &Frame) -> Result<Self, HelloError> {
        decode_json(frame)
    }
}

impl HelloReply {
    /// The frame on the wire.
    pub fn encode(&self) -> BytesMut {
        encode_json(self)
    }

    /// Reads the answer on a control stream.
    ///
    /// # Errors
    ///
    /// [`HelloError`] when it is something else.
    pub fn decode(frame: &Frame) -> Result<Self, HelloError> {
        decode_json(frame)
    }
}

fn encode_json<T: Serialize>(value: &T) -> BytesMut {
    let payload = serde_json::to_vec(value).expect("a hello has only texts and numbers");
    let mut out = BytesMut::new();
    encode(Kind::Hello, &payload, &mut out);
    out
}

fn decode_json<T: for<'de> Deserialize<'de>>(frame: &Frame) -> Result<T, HelloError> {
    match frame.kind {
        Kind::Hello if frame.payload.len() > HELLO_LEN_MAX => {
            Err(HelloError::TooLong(frame.payload.len()))
        }
        Kind::Hello => serde_json::from_slice(&frame.payload).map_err(HelloError::Invalid),
        kind => Err(HelloError::Kind(kind)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode_all(decoder: Decoder, bytes: &[u8]) -> Result<Vec<Frame>, FrameError> {
        let mut bytes = BytesMut::from(bytes);
        let mut frames = Vec::new();
        while let Some(frame) = decoder.decode(&mut bytes)? {
            frames.push(frame);
        }
        Ok(frames)
    }

    #[test]
    fn frame_has_length_kind_and_payload() {
        let mut out = BytesMut::new();
        encode(Kind::Batch, b"abc", &mut out);
        assert_eq!(&out[..], b"\x00\x00\x00\x03\x01abc");
        let expected = Frame { kind: Kind::Batch, payload: Bytes::from_static(b"abc") };
        assert_eq!(decode_all(Decoder::new(3), &out), Ok(vec![expected]));
        assert_eq!(out.len(), HEADER_LEN + 3);
    }

    #[test]
    fn frame_over_the_bound_is_refused_by_its_header() {
        let check = |max, bytes: &[u8], expected| {
            assert_eq!(decode_all(Decoder::new(max), bytes), Err(expected));
        };
        check(2, b"\x00\x00\x00\x03\x01", FrameError::TooLong { len: 3, max: 2 });
        check(9, b"\xff\xff\xff\xff\x00", FrameError::TooLong { len: u32::MAX, max: 9 });
        check(9, b"\x00\x00\x00\x01\x03", FrameError::Kind(3));
    }

    #[test]
    fn hello_and_its_replies_have_one_form() {
        let frame = |bytes: BytesMut| {
            decode_all(Decoder::new(HELLO_LEN_MAX), &bytes).expect("a frame").remove(0)
        };
        let hello = Hello {
            node: "edge1".into(),
            project: "p".into(),
            capabilities: "digest,beat=60".into(),
        };
        let text = r#"{"node":"edge1","project":"p","capabilities":"digest,beat=60"}"#;
        assert_eq!(&frame(hello.encode()).payload[..], text.as_bytes());
        assert_eq!(Hello::decode(&frame(hello.encode())).expect("ours"), hello);

        let check = |reply: HelloReply, text: &str| {
            assert_eq!(&frame(reply.encode()).payload[..], text.as_bytes());
            assert_eq!(HelloReply::decode(&frame(reply.encode())).expect("ours"), reply);
        };
        check(
            HelloReply::Accepted { capabilities: "digest".into() },
            r#"{"capabilities":"digest"}"#,
        );
        let refused = "unknown node".to_owned();
        check(
            HelloReply::Refused { refused: refused.clone(), retry_after_ms: Some(250) },
            r#"{"refused":"unknown node","retry_after_ms":250}"#,
        );
        check(
            HelloReply::Refused { refused, retry_after_ms: None },
            r#"{"refused":"unknown node"}"#,
        );
    }

    #[test]
    fn what_is_no_hello_is_refused_with_the_reason() {
        let check = |kind, payload: &[u8], expected: &str| {
            let frame = Frame { kind, payload: Bytes::copy_from_slice(payload) };
            let error = Hello::decode(&frame).expect_err("no hello").to_string();
            assert_eq!(error, expected);
            HelloReply::decode(&frame).expect_err("no reply either");
        };
        check(
            Kind::Message,
            b"{}",
            "stream begins with a frame of kind Message instead of a hello",
        );
        check(Kind::Hello, b"{}", "hello is not valid");
        check(Kind::Hello, b"{\"node\":[1]}", "hello is not valid");
        let long = vec![b' '; HELLO_LEN_MAX + 1];
        check(Kind::Hello, &long, "hello of 4097 bytes is over the bound of 4096 bytes");
    }

    #[test]
    fn refusal_wins_over_an_acceptance_in_the_same_reply() {
        let payload = Bytes::from_static(br#"{"capabilities":"digest","refused":"no"}"#);
        let reply = HelloReply::decode(&Frame { kind: Kind::Hello, payload }).expect("a reply");
        assert_eq!(reply, HelloReply::Refused { refused: "no".into(), retry_after_ms: None });
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            frames in proptest::collection::vec(
                (0..3u8, proptest::collection::vec(any::<u8>(), 0..40)),
                0..5,
            ),
            pieces in proptest::collection::vec(1..30usize, 1..40),
        ) {
            let mut stream = BytesMut::new();
            let mut expected = Vec::new();
            for (kind, payload) in frames {
                let kind = [Kind::Message, Kind::Batch, Kind::Hello][usize::from(kind)];
                encode(kind, &payload, &mut stream);
                expected.push(Frame { kind, payload: payload.into() });
            }
            let decoder = Decoder::new(40);
            let mut arrived = BytesMut::new();
            let mut found = Vec::new();
            for piece in pieces.into_iter().cycle() {
                if stream.is_empty() {
                    break;
                }
                arrived.extend_from_slice(&stream.split_to(piece.min(stream.len())));
                while let Some(frame) = decoder.decode(&mut arrived).expect("ours") {
                    found.push(frame);
                }
            }
            prop_assert_eq!(found, expected);
            prop_assert!(arrived.is_empty());
        }

        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            for frame in decode_all(Decoder::new(32), &bytes).unwrap_or_default() {
                prop_assert!(frame.payload.len() <= 32);
                let _ = Hello::decode(&frame);
                let _ = HelloReply::decode(&frame);
            }
        }
    }
}
