use super::*;
use proptest::prelude::*;

const MAX: usize = 1024;
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

/// Everything in `bytes`, which arrive in pieces that end at `cuts`, and what went wrong in the end.
fn decode_in_pieces(
    role: Role,
    bytes: &[u8],
    cuts: impl IntoIterator<Item = usize>,
) -> (Vec<Message>, Option<FrameError>) {
    let mut decoder = Decoder::new(role, MAX);
    let mut arrived = BytesMut::new();
    let mut messages = Vec::new();
    let mut start = 0;
    for end in cuts.into_iter().chain([bytes.len()]) {
        arrived.extend_from_slice(&bytes[start..end]);
        start = end;
        loop {
            assert!(decoder.held_len() <= 4 * start + 64, "more is held than has arrived");
            match decoder.decode(&mut arrived) {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(decoder.decode(&mut arrived), Err(error), "it stays broken");
                    return (messages, Some(error));
                }
            }
        }
    }
    (messages, None)
}

fn decode(role: Role, bytes: &[u8]) -> Result<Vec<Message>, FrameError> {
    match decode_in_pieces(role, bytes, []) {
        (messages, None) => Ok(messages),
        (_, Some(error)) => Err(error),
    }
}

fn text(payload: &'static str) -> Message {
    Message::Text(Bytes::from_static(payload.as_bytes()))
}

/// One frame as a client or a server sends it, with any first byte.
fn frame(sender: Role, first: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    encode(sender, Opcode::Binary, payload, MASK, &mut out);
    out[0] = first;
    out.to_vec()
}

#[test]
fn examples_of_the_rfc_are_read_and_written() {
    let check = |sender, opcode, payload: &'static [u8], bytes: &[u8], expected: Message| {
        let receiver = if sender == Role::Client { Role::Server } else { Role::Client };
        assert_eq!(decode(receiver, bytes), Ok(vec![expected]));
        let mut out = BytesMut::new();
        encode(sender, opcode, payload, MASK, &mut out);
        assert_eq!(out, bytes);
    };
    let hello = Bytes::from_static(b"Hello");
    check(Role::Server, Opcode::Text, b"Hello", b"\x81\x05Hello", text("Hello"));
    check(
        Role::Client,
        Opcode::Text,
        b"Hello",
        b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58",
        text("Hello"),
    );
    check(Role::Server, Opcode::Ping, b"Hello", b"\x89\x05Hello", Message::Ping(hello.clone()));
    check(
        Role::Client,
        Opcode::Pong,
        b"Hello",
        b"\x8a\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58",
        Message::Pong(hello),
    );
    let fragments = b"\x01\x03Hel\x80\x02lo";
    assert_eq!(decode(Role::Client, fragments), Ok(vec![text("Hello")]));
    assert_eq!(frame(Role::Server, 0x82, &[7; 256])[..4], *b"\x82\x7e\x01\x00");
    assert_eq!(
        frame(Role::Server, 0x82, &[7; 65536])[..10],
        *b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00"
    );
    assert_eq!(accept_key("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
}

#[test]
fn lengths_around_each_form_are_read_and_written() {
    for len in [0, 1, 7, 8, 9, 125, 126, 127, 1000, 65_535, 65_536, 65_537] {
        for sender in [Role::Client, Role::Server] {
            let receiver = if sender == Role::Client { Role::Server } else { Role::Client };
            let payload: Vec<u8> = (0..len).map(|n| (n * 31) as u8).collect();
            let mut bytes = BytesMut::from(&frame(sender, 0x82, &payload)[..]);
            let message = Decoder::new(receiver, len).decode(&mut bytes);
            assert_eq!(message, Ok(Some(Message::Binary(payload.into()))), "{len}");
            assert!(bytes.is_empty());
        }
    }
}

#[test]
fn message_of_one_frame_is_not_copied() {
    let mut arrived = BytesMut::from(&frame(Role::Client, 0x82, &[7; 600])[..]);
    let memory = arrived.as_ptr() as usize..arrived.as_ptr() as usize + arrived.len();
    let message = Decoder::new(Role::Server, MAX).decode(&mut arrived);
    let Ok(Some(Message::Binary(payload))) = message else { panic!("{message:?}") };
    assert!(memory.contains(&(payload.as_ptr() as usize)));
    assert_eq!(payload, vec![7; 600]);
}

#[test]
fn text_is_any_bytes() {
    let bytes = frame(Role::Server, 0x81, b"\x01\x03\xff\xfe\x00");
    assert_eq!(
        decode(Role::Client, &bytes),
        Ok(vec![Message::Text(Bytes::from_static(b"\x01\x03\xff\xfe\x00"))])
    );
}

#[test]
fn stream_reads_the_same_wherever_it_is_cut() {
    let stream = [
        frame(Role::Client, 0x81, b"one"),
        frame(Role::Client, 0x02, &[7; 300]),
        frame(Role::Client, 0x89, b"between"),
        frame(Role::Client, 0x00, b""),
        frame(Role::Client, 0x00, &[8; 126]),
        frame(Role::Client, 0x8a, b""),
        frame(Role::Client, 0x80, b""),
        frame(Role::Client, 0x88, b"\x03\xe9bye"),
        b"never looked at".to_vec(),
    ]
    .concat();
    let bytes = Bytes::from_static;
    let expected = vec![
        text("one"),
        Message::Ping(bytes(b"between")),
        Message::Pong(bytes(b"")),
        Message::Binary([vec![7; 300], vec![8; 126]].concat().into()),
        Message::Close(Close { code: Some(CloseCode::GOING_AWAY), reason: bytes(b"bye") }),
    ];
    for cut in 0..=stream.len() {
        let (messages, error) = decode_in_pieces(Role::Server, &stream, [cut]);
        assert_eq!((messages, error), (expected.clone(), None), "cut at {cut}");
    }
    let (messages, error) = decode_in_pieces(Role::Server, &stream, 0..stream.len());
    assert_eq!((messages, error), (expected, None), "byte by byte");
}

#[test]
fn broken_frames_are_refused_with_the_reason() {
    let check = |role, bytes: &[u8], expected: FrameError| {
        assert_eq!(decode(role, bytes), Err(expected), "{bytes:x?}");
    };
    let server = |bytes: &[u8], expected| check(Role::Client, bytes, expected);
    check(Role::Server, b"\x81\x05Hello", FrameError::NotMasked);
    check(Role::Server, b"\x81\x00", FrameError::NotMasked);
    server(b"\x81\x85\x37\xfa\x21\x3d", FrameError::Masked);
    for bits in [0x40, 0x20, 0x10, 0x70] {
        server(&[0x81 | bits, 0], FrameError::ReservedBits);
    }
    for opcode in [0x3, 0x7, 0xb, 0xf] {
        server(&[0x80 | opcode, 0], FrameError::Opcode(opcode));
    }
    server(b"\x80\x00", FrameError::Continuation);
    server(b"\x01\x01a\x81\x01b", FrameError::Interrupted);
    server(b"\x01\x01a\x02\x01b", FrameError::Interrupted);
    server(b"\x81\x01a\x80\x01b", FrameError::Continuation);
    server(b"\x09\x00", FrameError::Control);
    server(b"\x89\x7e\x00\x7e", FrameError::Control);
    server(b"\x88\x7f", FrameError::Control);
    server(b"\x82\x7e\x00\x7d", FrameError::Length);
    server(b"\x82\x7f\x00\x00\x00\x00\x00\x00\xff\xff", FrameError::Length);
    server(b"\x82\x7f\x80\x00\x00\x00\x00\x00\x00\x00", FrameError::Length);
    server(b"\x88\x01\x03", FrameError::Close);
    for code in [0u16, 999, 1004, 1005, 1006, 1015, 2999, 5000] {
        let payload = code.to_be_bytes();
        server(&[0x88, 2, payload[0], payload[1]], FrameError::Close);
    }
}

#[test]
fn length_is_refused_before_anything_of_it_has_arrived() {
    let check = |bytes: &[u8], len| {
        let error = FrameError::TooLong { len, max: MAX };
        assert_eq!(decode(Role::Client, bytes), Err(error));
        assert_eq!(error.close_code(), CloseCode::TOO_LONG);
    };
    check(b"\x82\x7e\x04\x01", 1025);
    check(b"\x82\x7f\x7f\xff\xff\xff\xff\xff\xff\xff", (1 << 63) - 1);
    let part = frame(Role::Server, 0x02, &[0; 1000]);
    check(&[&part[..], b"\x00\x19"].concat(), 1025);
    check(&[&part[..], b"\x00\x7f\x7f\xff\xff\xff\xff\xff\xff\xff"].concat(), (1 << 63) + 999);
    let whole = [&part[..], &frame(Role::Server, 0x80, &[0; 24])].concat();
    assert_eq!(decode(Role::Client, &whole).expect("just fits").len(), 1);
}

#[test]
fn announced_length_takes_no_memory() {
    let mut decoder = Decoder::new(Role::Client, 32 * 1024 * 1024);
    let mut arrived = BytesMut::from(&b"\x82\x7f\x00\x00\x00\x00\x02\x00\x00\x00abc"[..]);
    let capacity = arrived.capacity();
    assert_eq!(decoder.decode(&mut arrived), Ok(None));
    assert_eq!((decoder.held_len(), arrived.capacity()), (0, capacity));
    assert!(size_of::<Decoder>() <= 104, "there is one per connection");
}

#[test]
fn endless_fragments_end() {
    let mut decoder = Decoder::new(Role::Client, MAX);
    let mut arrived = BytesMut::from(&b"\x02\x00"[..]);
    for _ in 1..FRAGMENTS_MAX {
        arrived.extend_from_slice(b"\x00\x00");
    }
    assert_eq!(decoder.decode(&mut arrived), Ok(None));
    assert_eq!(decoder.held_len(), 0);
    arrived.extend_from_slice(b"\x80\x00");
    assert_eq!(decoder.decode(&mut arrived), Err(FrameError::Fragments));
}

#[test]
fn control_frames_that_we_write_are_never_too_long() {
    let check = |reason: &str, expected: &str| {
        let mut out = BytesMut::new();
        encode_close(Role::Client, CloseCode::POLICY, reason, MASK, &mut out);
        let reason = Bytes::copy_from_slice(expected.as_bytes());
        let close = Close { code: Some(CloseCode::POLICY), reason };
        assert_eq!(decode(Role::Server, &out), Ok(vec![Message::Close(close)]));
    };
    check("", "");
    check("node `edge1` is denied", "node `edge1` is denied");
    check(&"ä".repeat(80), &"ä".repeat(61));
    let mut out = BytesMut::new();
    encode(Role::Server, Opcode::Ping, &[1; 300], MASK, &mut out);
    assert_eq!(out.len(), 2 + CONTROL_LEN_MAX);
    assert_eq!(
        decode(Role::Client, b"\x88\x00"),
        Ok(vec![Message::Close(Close { code: None, reason: Bytes::new() })])
    );
}

const REQUEST: [(&str, &str); 5] = [
    ("host", "hub"),
    ("Connection", "keep-alive, Upgrade"),
    ("Upgrade", "WebSocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

/// `headers` with one of them replaced, or removed when there is no new value.
fn with<'a>(
    headers: &[(&'a str, &'a str)],
    name: &'a str,
    value: Option<&'a str>,
) -> Vec<(&'a str, &'a str)> {
    let kept = headers.iter().filter(|(header, _)| *header != name).copied();
    kept.chain(value.map(|value| (name, value))).collect()
}

#[test]
fn request_is_answered_only_when_it_asks_for_a_websocket() {
    assert_eq!(check_request("GET", REQUEST), Ok("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".into()));
    let twice = [&REQUEST[..], &[("connection", "close")]].concat();
    assert!(check_request("GET", twice).is_ok(), "a repeated header");
    assert_eq!(check_request("POST", REQUEST), Err(HandshakeError::Method("POST".into())));
    let check = |name, value| {
        let refused = check_request("GET", with(&REQUEST, name, value));
        assert_eq!(refused, Err(HandshakeError::Header(name)), "{value:?}");
    };
    check("Connection", None);
    check("Connection", Some("close"));
    check("Upgrade", Some("h2c"));
    check("Sec-WebSocket-Version", Some("8"));
    check("Sec-WebSocket-Key", None);
    check("Sec-WebSocket-Key", Some("c2hvcnQ="));
    check("Sec-WebSocket-Key", Some("AAAAAAAAAAAAAAAAAAAAAAA="));
    check("Sec-WebSocket-Key", Some(&"A".repeat(4096)));
}

#[test]
fn answer_is_checked_against_the_key() {
    let key = client_key([7; 16]);
    assert!(is_client_key(&key));
    let request = [&request_headers(&key)[..], &[("Host", "hub")]].concat();
    let accept = check_request("GET", request).expect("our own request");
    let answer = [
        ("upgrade", "websocket"),
        ("connection", "upgrade"),
        ("sec-websocket-accept", accept.as_str()),
    ];
    assert_eq!(check_response(101, &key, answer), Ok(()));
    assert_eq!(check_response(403, &key, answer), Err(HandshakeError::Status(403)));
    let check = |name, value, expected| {
        assert_eq!(check_response(101, &key, with(&answer, name, value)), Err(expected));
    };
    check("upgrade", None, HandshakeError::Header("Upgrade"));
    check("connection", Some("close"), HandshakeError::Header("Connection"));
    let wrong = HandshakeError::Header("Sec-WebSocket-Accept");
    check("sec-websocket-accept", None, wrong.clone());
    check("sec-websocket-accept", Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), wrong);
    let deflate = HandshakeError::NotOffered("Sec-WebSocket-Extensions");
    check("sec-websocket-extensions", Some("permessage-deflate"), deflate);
    let protocol = HandshakeError::NotOffered("Sec-WebSocket-Protocol");
    check("sec-websocket-protocol", Some("chat"), protocol);
}

/// A message, or a control frame between fragments.
#[derive(Debug, Clone)]
enum Sent {
    Data { binary: bool, fragments: Vec<Vec<u8>> },
    Ping(Vec<u8>),
}

fn sent() -> impl Strategy<Value = Sent> {
    let bytes = |len: usize| proptest::collection::vec(any::<u8>(), 0..len);
    prop_oneof![
        3 => (any::<bool>(), proptest::collection::vec(bytes(200), 1..5))
            .prop_map(|(binary, fragments)| Sent::Data { binary, fragments }),
        1 => bytes(126).prop_map(Sent::Ping),
    ]
}

proptest! {
    #[test]
    fn messages_come_out_as_they_went_in_however_they_are_cut(
        sent in proptest::collection::vec(sent(), 0..6),
        client in any::<bool>(),
        pieces in proptest::collection::vec(1..90usize, 1..20),
    ) {
        let (sender, receiver) =
            if client { (Role::Client, Role::Server) } else { (Role::Server, Role::Client) };
        let mut stream = Vec::new();
        let mut expected = Vec::new();
        for message in sent {
            match message {
                Sent::Ping(payload) => {
                    stream.extend(frame(sender, 0x89, &payload));
                    expected.push(Message::Ping(payload.into()));
                }
                Sent::Data { binary, fragments } => {
                    for (index, fragment) in fragments.iter().enumerate() {
                        let opcode = match index {
                            0 if binary => 0x2,
                            0 => 0x1,
                            _ => 0x0,
                        };
                        let last = if index + 1 == fragments.len() { 0x80 } else { 0 };
                        stream.extend(frame(sender, opcode | last, fragment));
                    }
                    expected.push(data(binary, fragments.concat().into()));
                }
            }
        }
        let mut cuts = Vec::new();
        let mut end = 0;
        for piece in pieces.iter().cycle().take(10_000) {
            end += piece;
            if end >= stream.len() {
                break;
            }
            cuts.push(end);
        }
        prop_assert_eq!(decode_in_pieces(receiver, &stream, cuts), (expected, None));
    }

    #[test]
    fn any_bytes_never_panic_and_break_at_the_same_place_however_they_are_cut(
        bytes in proptest::collection::vec(
            prop_oneof![any::<u8>(), (0..0x8bu8), Just(0x80), Just(0x81), Just(0)],
            0..200,
        ),
        cut in any::<proptest::sample::Index>(),
        client in any::<bool>(),
    ) {
        let role = if client { Role::Client } else { Role::Server };
        let whole = decode_in_pieces(role, &bytes, []);
        prop_assert_eq!(decode_in_pieces(role, &bytes, [cut.index(bytes.len() + 1)]), whole);
    }

    #[test]
    fn any_handshake_never_panics(
        method in "GET|[A-Z]{0,20}",
        headers in proptest::collection::vec(("(?i)upgrade|connection|sec-websocket-(key|accept|version|extensions)", "[ -~]{0,30}|upgrade|websocket|13"), 0..8),
    ) {
        let headers: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let _ = check_request(&method, headers.clone());
        let _ = check_response(101, "key", headers);
    }
}
