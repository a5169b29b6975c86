//! What mutation begins with.

use bytes::BytesMut;
use serde_json::Value;
use skerry_edge_core::backoff::Random;
use skerry_protocol::certificate::{Bundle, CertificateReply, CertificateRequest, Der};
use skerry_protocol::enrol::{Claims, JoinToken};
use skerry_protocol::frame::{self, Hello, HelloReply};
use skerry_protocol::tunnel::{Connect, Frame, FrameKind};
use skerry_protocol::websocket::{self, Opcode, Role};
use skerry_protocol::{Message, batch};

const SESSION: &str = include_str!("../../../protocol/golden/session.jsonl");
/// Conversations to begin with.
const CHOICES: u64 = 12;

fn session(kind: &str) -> impl Iterator<Item = Value> {
    let lines = SESSION
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("the recorded session is JSON"));
    lines.filter(move |line| line["kind"] == *kind)
}

pub(super) fn messages() -> Vec<Vec<u8>> {
    let text = |line: Value| line["data"].as_str().unwrap_or_default().as_bytes().to_vec();
    session("msg").map(text).collect()
}

/// The recorded messages, read.
pub(super) fn read_messages() -> Vec<Message> {
    messages().iter().map(|text| Message::decode(text).expect("it was recorded")).collect()
}

pub(super) fn contents() -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> =
        read_messages().iter().map(|message| message.content.get().as_bytes().to_vec()).collect();
    let request = CertificateRequest { csr: Der(vec![0x30, 0x03, 2, 1, 1]) };
    let reply = CertificateReply {
        certificate: Der(vec![0x30, 0x03, 2, 1, 1]),
        bundle: vec![Der(vec![0x30, 0])],
    };
    let bundle = Bundle { bundle: vec![Der(vec![0x30, 0]), Der(vec![0x30, 0])] };
    all.push(serde_json::to_vec(&request).expect("texts only"));
    all.push(serde_json::to_vec(&reply).expect("texts only"));
    all.push(serde_json::to_vec(&bundle).expect("texts only"));
    all.push(br#"{"objects":{"default/pod/web":{"uid":"u1","rv":"12"},"null/node/edge1":{"uid":"n","rv":"3"}}}"#.to_vec());
    all.push(br#"{"action":"Upgrade","succ":true,"finishTime":"2026-01-01T00:00:00Z","reason":"","extend":"1,2"}"#.to_vec());
    all.push(br#"{"node":"edge1","event":"Upgrade","action":"Success","reason":"","external_message":"[]"}"#.to_vec());
    all.push(
        br#"{"state":"online","twin":{"t":{"actual":{"value":"1"},"metadata":{"type":"int"}}}}"#
            .to_vec(),
    );
    all
}

fn masked(role: Role, opcode: Opcode, payload: &[u8], out: &mut BytesMut) {
    websocket::encode(role, opcode, payload, [1, 2, 3, 4], out);
}

pub(super) fn websocket() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for role in [Role::Client, Role::Server] {
        let mut out = BytesMut::new();
        out.extend_from_slice(&[7]); // where the bytes are cut in two
        for message in messages().iter().take(3) {
            masked(role, Opcode::Text, message, &mut out);
            masked(role, Opcode::Ping, b"beat", &mut out);
        }
        masked(role, Opcode::Binary, &[0; 70_000], &mut out);
        websocket::encode_close(role, websocket::CloseCode::NORMAL, "bye", [0; 4], &mut out);
        all.push(out.to_vec());
    }
    // Fragments, with a ping between them.
    all.push(vec![1, 0x01, 2, b'a', b'b', 0x89, 0, 0x00, 1, b'c', 0x80, 0]);
    all.push(vec![3, 0x82, 0x7e, 0, 126, 0, 0, 0x82, 0x7f, 0, 0, 0, 0, 0, 1, 0, 0]);
    all
}

pub(super) fn handshakes() -> Vec<Vec<u8>> {
    session("http").map(|line| line["data"].as_str().unwrap_or_default().into()).collect()
}

pub(super) fn frames() -> Vec<Vec<u8>> {
    let mut out = BytesMut::new();
    out.extend_from_slice(&[9]);
    for message in read_messages().iter().take(4) {
        frame::encode(frame::Kind::Message, message.encode().as_bytes(), &mut out);
    }
    frame::encode(frame::Kind::Batch, &batch::encode(&read_messages()[..4]), &mut out);
    let mut all = vec![out.to_vec()];
    for hello in hellos() {
        all.push([&[3][..], &hello].concat());
    }
    all
}

pub(super) fn batches() -> Vec<Vec<u8>> {
    let messages = read_messages();
    vec![batch::encode(&messages), batch::encode(&messages[..1]), batch::encode::<Message>(&[])]
}

pub(super) fn hellos() -> Vec<Vec<u8>> {
    let node = r#"{"node":"edge1","project":"e632aba9","capabilities":"digest, window, beat=25"}"#;
    let replies = [r#"{"capabilities":"digest"}"#, r#"{"refused":"no","retry_after_ms":5000}"#];
    let mut all = Vec::new();
    if let Ok(hello) = serde_json::from_str::<Hello>(node) {
        all.push(hello.encode().to_vec());
    }
    for reply in replies {
        if let Ok(reply) = serde_json::from_str::<HelloReply>(reply) {
            all.push(reply.encode().to_vec());
        }
        let mut out = BytesMut::new();
        frame::encode(frame::Kind::Hello, reply.as_bytes(), &mut out);
        all.push(out.to_vec());
    }
    all
}

pub(super) fn tunnel() -> Vec<Vec<u8>> {
    let connect = Connect::get(7, "/containerLogs/default/web/c?follow=true&tailLines=5");
    let connect = serde_json::to_vec(&connect).expect("texts and numbers");
    vec![
        Frame::new(7, FrameKind::LogsConnect, connect.clone()).encode(),
        Frame::new(u64::MAX, FrameKind::Data, vec![0xff; 100]).encode(),
        connect,
    ]
}

pub(super) fn resources() -> Vec<Vec<u8>> {
    let resources = read_messages().into_iter().map(|message| message.route.resource.into_bytes());
    let mut all: Vec<_> = resources.collect();
    all.sort();
    all.dedup();
    all
}

pub(super) fn capabilities() -> Vec<Vec<u8>> {
    ["digest, window, batch, lease, receipts, renew, beat=25", "beat=0", "beat=", "digest;x=1,,"]
        .map(Into::into)
        .to_vec()
}

pub(super) fn tokens() -> Vec<Vec<u8>> {
    let claims = Claims { exp: 4_000_000_000, node: Some("edge1".into()), jti: Some("t".into()) };
    let jwt = claims.sign(|_| [0; 32]);
    let token = JoinToken::new(b"der", jwt.clone()).to_string();
    vec![token.into(), jwt.into(), b"CN=system:node:edge1".to_vec(), b"edge-*".to_vec()]
}

pub(super) fn choices() -> Vec<Vec<u8>> {
    let mut random = Random::new(7);
    let mut one = |len| (0..len).map(|_| random.below(256) as u8).collect();
    (0..CHOICES).map(|index| one(60 + index * 60)).collect()
}
