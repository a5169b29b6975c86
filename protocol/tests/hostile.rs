//! Bytes of the recorded session, damaged in every way that a link or a peer can damage them: no parser panics, what
//! is decoded is within its bounds, and a decoder holds no more than has arrived.

use bytes::{Bytes, BytesMut};
use skerry_protocol::capability::Capabilities;
use skerry_protocol::certificate::{Bundle, CertificateReply, CertificateRequest};
use skerry_protocol::delivery::ack_required;
use skerry_protocol::digest::Digest;
use skerry_protocol::frame::{self, Kind};
use skerry_protocol::message::{MESSAGE_LEN_MAX, UPSTREAM_LEN_MAX};
use skerry_protocol::websocket::{self, Opcode, Role};
use skerry_protocol::{Class, Message, Operation, ResourcePath, batch, enrol, tunnel};

const SESSION: &str = include_str!("../golden/session.jsonl");

/// Every flip is tried on messages up to this length; on longer ones one of many.
const SHORT_LEN: usize = 200;

fn recorded() -> Vec<String> {
    let lines = SESSION
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("a recorded line"));
    let messages = lines.filter(|line| line["kind"] == "msg");
    messages.map(|line| line["data"].as_str().expect("a text").to_owned()).collect()
}

/// Calls `check` with each bit of `bytes` flipped, and with each end cut off.
fn damage(bytes: &[u8], mut check: impl FnMut(&[u8])) {
    let step = if bytes.len() <= SHORT_LEN { 1 } else { 1 + bytes.len() / 20 };
    let mut damaged = bytes.to_vec();
    for bit in (0..bytes.len() * 8).step_by(step) {
        damaged[bit / 8] ^= 1 << (bit % 8);
        check(&damaged);
        damaged[bit / 8] ^= 1 << (bit % 8);
    }
    for len in (0..bytes.len()).step_by(step) {
        check(&bytes[..len]);
    }
}

/// All that a hub or an edge reads of a message before it trusts anything.
fn look_at(message: &Message) {
    let again = Message::decode(message.encode().as_bytes()).expect("our own encoding");
    assert_eq!(again, *message);
    let _ = message.operation();
    let _ = ack_required(message);
    let _ = Class::of(message);
    let _ = message.route.resource.parse::<ResourcePath>();
    let _ = message.content_as::<Digest>();
    let _ = message.content_as::<CertificateRequest>();
    let _ = message.content_as::<CertificateReply>();
    let _ = message.content_as::<Bundle>();
}

#[test]
fn flipped_and_truncated_messages_are_decoded_or_refused() {
    for text in recorded() {
        damage(text.as_bytes(), |bytes| {
            if let Ok(message) = Message::decode(bytes) {
                look_at(&message);
            }
        });
    }
}

#[test]
fn flipped_and_truncated_websocket_frames_are_decoded_or_refused() {
    for text in recorded() {
        let mut sent = BytesMut::new();
        websocket::encode(Role::Client, Opcode::Text, text.as_bytes(), [1, 2, 3, 4], &mut sent);
        damage(&sent, |bytes| {
            let mut decoder = websocket::Decoder::new(Role::Server, UPSTREAM_LEN_MAX);
            let mut arrived = BytesMut::from(bytes);
            while let Ok(Some(message)) = decoder.decode(&mut arrived) {
                if let websocket::Message::Text(text) | websocket::Message::Binary(text) = message {
                    assert!(text.len() <= bytes.len());
                    let _ = Message::decode(&text);
                }
                assert!(decoder.held_len() <= 2 * bytes.len() + 64);
            }
        });
    }
}

#[test]
fn flipped_and_truncated_stream_frames_are_decoded_or_refused() {
    for text in recorded() {
        let mut sent = BytesMut::new();
        frame::encode(Kind::Message, text.as_bytes(), &mut sent);
        damage(&sent, |bytes| {
            let mut arrived = BytesMut::from(bytes);
            let decoder = frame::Decoder::new(UPSTREAM_LEN_MAX);
            while let Ok(Some(frame)) = decoder.decode(&mut arrived) {
                assert!(frame.payload.len() <= bytes.len());
                let _ = frame::Hello::decode(&frame);
                let _ = frame::HelloReply::decode(&frame);
            }
        });
    }
}

#[test]
fn flipped_and_truncated_batches_are_decoded_or_refused() {
    let messages: Vec<_> = recorded()
        .iter()
        .take(8)
        .map(|text| Message::decode(text.as_bytes()).expect("recorded"))
        .collect();
    let sent = batch::encode(&messages);
    let len_max = 64 * 1024;
    damage(&sent, |bytes| {
        if let Ok(messages) = batch::decode(bytes, len_max) {
            let len: usize = messages.iter().map(|message| message.content.get().len()).sum();
            assert!(len <= len_max);
        }
    });
}

#[test]
fn json_of_another_shape_is_refused() {
    let check = |text: &str| {
        Message::decode(text.as_bytes()).expect_err(text);
    };
    for part in ["1", "\"\"", "[]", "true", "null"] {
        check(part);
        check(&format!(r#"{{"header":{part},"route":{{}}}}"#));
        check(&format!(r#"{{"header":{{}},"route":{part}}}"#));
    }
    for part in ["{}", "[]", "1", "true"] {
        check(&format!(r#"{{"header":{{"msg_id":{part}}},"route":{{}}}}"#));
        check(&format!(r#"{{"header":{{}},"route":{{"operation":{part}}}}}"#));
    }
    check(r#"{"header":{"timestamp":99999999999999999999},"route":{}}"#);
    check(r#"{"header":{},"route":{},"route":{}}"#);
    check(r#"{"header":{},"route":{},"content":"#);
    check(r#"{"header":{},"route":{}} {"#);
    check(r#"[{"msg_id":"1"},{},null]"#);
    check("");
    assert!(Message::decode(b"{\"header\":{\"msg_id\":\"\xff\"},\"route\":{}}").is_err());
}

/// A body of brackets would take a stack frame each in a parser that recurses.
#[test]
fn deeply_nested_bodies_neither_panic_nor_overflow_the_stack() {
    for depth in [100, 1_000_000] {
        let text = format!(
            r#"{{"header":{{}},"route":{{"resource":"a/pod/b"}},"content":{}{}}}"#,
            "[".repeat(depth),
            "]".repeat(depth)
        );
        if let Ok(message) = Message::decode(text.as_bytes()) {
            let _ = ack_required(&message);
            let _ = message.content_as::<serde_json::Value>();
            let _ = message.content_as::<Digest>();
        }
    }
}

#[test]
fn unknown_operations_are_kept_and_have_a_class() {
    let text = r#"{"header":{"msg_id":"1","timestamp":0},"route":{"operation":"dance","resource":"a/pod/b"},"content":null}"#;
    let message = Message::decode(text.as_bytes()).expect("lenient");
    assert_eq!(message.operation(), None);
    assert_eq!(Class::of(&message), Class::Pod);
    assert_eq!(message.encode().trim_end(), text);
}

#[test]
fn every_operation_has_one_name() {
    let names: std::collections::BTreeSet<_> =
        Operation::ALL.iter().map(|operation| operation.as_str()).collect();
    assert_eq!(names.len(), Operation::ALL.len());
    for operation in Operation::ALL {
        assert_eq!(Operation::parse(operation.as_str()), Some(*operation));
    }
    for reserved in ["config", "ping", "pong", "", "INSERT"] {
        assert_eq!(Operation::parse(reserved), None, "{reserved}");
    }
}

#[test]
fn length_bounds_are_those_of_the_roles() {
    assert_eq!(MESSAGE_LEN_MAX, 32 << 20);
    assert_eq!(UPSTREAM_LEN_MAX, 3_211_264);
    let mut header = BytesMut::new();
    websocket::encode_header(Role::Client, Opcode::Text, UPSTREAM_LEN_MAX + 1, [0; 4], &mut header);
    let mut decoder = websocket::Decoder::new(Role::Server, UPSTREAM_LEN_MAX);
    decoder.decode(&mut header).expect_err("over the bound of a hub");
    let mut header = BytesMut::from(&frame::encode_header(Kind::Message, MESSAGE_LEN_MAX + 1)[..]);
    frame::Decoder::new(MESSAGE_LEN_MAX)
        .decode(&mut header)
        .expect_err("over the bound of an edge");
}

#[test]
fn texts_of_strangers_are_read_or_refused() {
    for line in SESSION.lines() {
        damage(&line.as_bytes()[..line.len().min(SHORT_LEN)], |bytes| {
            let text = String::from_utf8_lossy(bytes);
            let _ = Capabilities::parse(Some(&text));
            let _ = text.parse::<ResourcePath>();
            let _ = websocket::check_request("GET", [("Upgrade", &*text), ("Connection", &*text)]);
            let _ = tunnel::Frame::decode(bytes);
            let _ = text.parse::<enrol::JoinToken>();
        });
        let payload = Bytes::copy_from_slice(line.as_bytes());
        let _ = frame::Hello::decode(&frame::Frame { kind: Kind::Hello, payload });
    }
}
