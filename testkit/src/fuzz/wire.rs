//! Targets that read one thing.

use bytes::BytesMut;
use serde_json::{Value, json};
use skerry_cloudcore_core::downstream::{Key, Kind};
use skerry_cloudcore_core::enrol;
use skerry_cloudcore_core::upstream::{answer, device, event, job, node, pod};
use skerry_protocol::bus;
use skerry_protocol::certificate::{Bundle, CertificateReply, CertificateRequest};
use skerry_protocol::delivery::ack_required;
use skerry_protocol::digest::Digest;
use skerry_protocol::enrol::{Claims, JoinToken};
use skerry_protocol::frame::{self, Hello, HelloReply};
use skerry_protocol::job as jobs;
use skerry_protocol::message::UPSTREAM_LEN_MAX;
use skerry_protocol::priority::Class;
use skerry_protocol::tunnel::{Connect, Frame};
use skerry_protocol::websocket::{self, Role};
use skerry_protocol::{Capabilities, Message, ResourcePath, batch as batches, certificate};
use std::str::FromStr;

pub(super) fn message(bytes: &[u8]) {
    let Ok(message) = Message::decode(bytes) else { return };
    check_message(&message);
    let again = Message::decode(message.encode().as_bytes()).expect("what was read can be written");
    assert_eq!(message, again, "it reads as it was written");
}

/// Everything that looks at a message before anybody has checked it.
fn check_message(message: &Message) {
    let _ = (ack_required(message), Class::of(message), message.operation());
    let _ = (message.content_as::<Value>(), message.len_hint());
    let _ = certificate::request_node(&message.route.resource);
    let _ = certificate::bundle_node(&message.route.resource);
    let ack = message.ack(0);
    assert_eq!(ack.header.parent_msg_id, message.header.msg_id);
    assert!(!ack_required(&ack), "an acknowledgement wants none");
}

/// The first byte says where the others are cut in two: a decoder must not care how bytes arrive.
fn split(bytes: &[u8]) -> (&[u8], &[u8]) {
    let Some((at, rest)) = bytes.split_first() else { return (&[], &[]) };
    rest.split_at((*at as usize * 7).min(rest.len()))
}

pub(super) fn websocket(bytes: &[u8]) {
    let (first, second) = split(bytes);
    for role in [Role::Client, Role::Server] {
        let read = |parts: &[&[u8]]| {
            let mut decoder = websocket::Decoder::new(role, UPSTREAM_LEN_MAX);
            let (mut buffer, mut messages, mut arrived) = (BytesMut::new(), Vec::new(), 0);
            for part in parts {
                buffer.extend_from_slice(part);
                arrived += part.len();
                loop {
                    match decoder.decode(&mut buffer) {
                        Ok(Some(message)) => messages.push(message),
                        Ok(None) => break,
                        Err(error) => {
                            let _ = error.close_code();
                            return (messages, Some(error.to_string()));
                        }
                    }
                    assert!(decoder.held_len() <= arrived, "no more is held than has arrived");
                }
            }
            (messages, None)
        };
        let whole = read(&[&[first, second].concat()]);
        assert_eq!(whole, read(&[first, second]), "{role:?}: it does not matter how bytes arrive");
    }
}

pub(super) fn handshake(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.split("\r\n");
    let mut first = lines.next().unwrap_or_default().split(' ');
    let headers: Vec<(&str, &str)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name, value.trim()))
        .collect();
    let method = first.next().unwrap_or_default();
    let status = first.next().and_then(|code| code.parse().ok()).unwrap_or(0);
    let _ = websocket::check_request(method, headers.iter().copied());
    let _ = websocket::check_response(status, "QIU4kV6PX8/UazljV5pQNA==", headers.iter().copied());
    for (_, value) in &headers {
        let _ = Capabilities::parse(Some(value));
        let _ = (enrol::node_name(Some(value)).is_ok(), enrol::bearer(Some(value)).is_ok());
    }
}

pub(super) fn frame(bytes: &[u8]) {
    let (first, second) = split(bytes);
    let read = |parts: &[&[u8]]| {
        let decoder = frame::Decoder::new(UPSTREAM_LEN_MAX);
        let (mut buffer, mut frames) = (BytesMut::new(), Vec::new());
        for part in parts {
            buffer.extend_from_slice(part);
            loop {
                match decoder.decode(&mut buffer) {
                    Ok(Some(frame)) => frames.push((frame.kind as u8, frame.payload)),
                    Ok(None) => break,
                    Err(error) => return (frames, Some(error.to_string())),
                }
            }
        }
        (frames, None)
    };
    let whole = read(&[&[first, second].concat()]);
    assert_eq!(whole, read(&[first, second]), "it does not matter how bytes arrive");
}

pub(super) fn batch(bytes: &[u8]) {
    let Ok(messages) = batches::decode(bytes, UPSTREAM_LEN_MAX) else { return };
    assert!(messages.len() <= batches::MESSAGES_MAX);
    messages.iter().for_each(check_message);
    let again = batches::decode(&batches::encode(&messages), UPSTREAM_LEN_MAX);
    assert_eq!(again.expect("what was read can be written"), messages);
}

pub(super) fn hello(bytes: &[u8]) {
    let mut buffer = BytesMut::from(bytes);
    let Ok(Some(frame)) = frame::Decoder::new(frame::HELLO_LEN_MAX).decode(&mut buffer) else {
        return;
    };
    let _ = (Hello::decode(&frame).is_ok(), HelloReply::decode(&frame).is_ok());
}

pub(super) fn tunnel(bytes: &[u8]) {
    if let Ok(frame) = Frame::decode(bytes) {
        let again = Frame::decode(&frame.encode()).expect("what was read can be written");
        assert_eq!(again, frame);
        connect(&frame.data);
    }
    connect(bytes);
}

fn connect(bytes: &[u8]) {
    if let Ok(connect) = serde_json::from_slice::<Connect>(bytes) {
        let _ = connect.path_and_query();
    }
}

pub(super) fn resource(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(path) = ResourcePath::from_str(&text) {
        let again = ResourcePath::from_str(&path.to_string()).expect("what was read can be read");
        assert_eq!(again, path);
        if let Some(key) = Key::of_path(&path)
            && key.kind() != Kind::Node
        {
            assert_eq!(key.path(), path.to_string(), "a key is its path");
        }
    }
    let _ = (jobs::parse_path(&text), jobs::parse_task_path(&text), device::parse(&text));
    let _ = jobs::parse_stage_path(&text);
    let _ = (certificate::request_node(&text), certificate::bundle_node(&text));
}

pub(super) fn capabilities(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let peer = Capabilities::parse(Some(&text));
    let both = peer.and(Capabilities::OURS);
    let _ = both.silence_max();
    let again = Capabilities::parse(Some(&peer.to_string()));
    assert_eq!(again, peer, "it reads as it was written");
}

pub(super) fn contents(bytes: &[u8]) {
    let digest = serde_json::from_slice::<Digest>(bytes);
    let _ = serde_json::from_slice::<CertificateRequest>(bytes);
    let _ = serde_json::from_slice::<CertificateReply>(bytes);
    let _ = serde_json::from_slice::<Bundle>(bytes);
    let _ = serde_json::from_slice::<jobs::ActionReport>(bytes);
    let _ = serde_json::from_slice::<jobs::TaskReport>(bytes);
    let _ = serde_json::from_slice::<jobs::TaskRequest>(bytes);
    let _ = serde_json::from_slice::<bus::Call>(bytes);
    let _ = serde_json::from_slice::<bus::CallResult>(bytes);
    if let Ok(digest) = digest {
        for path in digest.objects.keys() {
            resource(path.as_bytes());
        }
    }
}

pub(super) fn token(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    // A signature that is always good, so that what is behind it is reached.
    let hmac = |_: &[u8]| [0; 32];
    if let Ok(token) = JoinToken::from_str(&text) {
        assert_eq!(JoinToken::from_str(&token.to_string()).expect("our own"), token);
        let _ = Claims::verify(token.jwt(), 0, hmac);
    }
    let _ = Claims::verify(&text, 0, hmac);
    if let Ok(pattern) = enrol::NodePattern::from_str(&text) {
        let _ = (pattern.exact(), pattern.matches("edge1"), pattern.matches(&text));
    }
    let _ = (enrol::node_name(Some(&text)).is_ok(), enrol::bearer(Some(&text)).is_ok());
}

/// What the hub makes of the content of messages that go up, each part with each content. What comes from the API has
/// the shape that the API gives it.
pub(super) fn upstream(bytes: &[u8]) {
    const NOW: &str = "2026-01-01T00:00:00Z";
    let Ok(content) = serde_json::from_slice::<Value>(bytes) else { return };
    let inner = content.as_str().and_then(|text| serde_json::from_str(text).ok());
    for object in [Some(content), inner].into_iter().flatten() {
        let copy = || object.clone();
        let kept = json!({"metadata": {"name": "web", "uid": "u", "resourceVersion": "3"},
            "spec": {"nodeName": "edge1"}, "status": {"phase": "Running"}});
        let _ = answer::Status::read(bytes);
        let _ = (answer::version(&object).len(), answer::without_type(copy()));
        let _ = (device::state_status(&object), merged(&object));
        let _ = device::new_status(&kept, copy());
        let _ = (event::subject("edge1", "default", &object).is_ok(), event::check_patch(&object));
        let _ = event::check_name("web.1", &object);
        let _ = node::registration(copy(), "edge1", Some("cloud"));
        let (mut first, mut second, mut third) = (copy(), copy(), copy());
        let _ = (node::split_reserved(&mut first), node::update_patch(&mut second));
        let _ = (node::restrict_patch(&mut third), node::retain_allowed(&mut first));
        let _ = node::with_legacy_status(kept.clone(), &object, |_| true, NOW);
        let _ = (pod::check_mirror("edge1", &object), pod::check_bound("edge1", &object));
        let _ = (pod::token_pod("edge1", &object).is_ok(), pod::claims_of(&object));
        let _ = pod::check_token("edge1", "account", "uid", &object);
        let _ = pod::with_legacy_status(kept, copy(), NOW);
        let _ = (pod::legacy_reports(copy()).is_some(), pod::has_ended(&object));
        let report = serde_json::from_value(copy());
        let task = serde_json::from_value(copy());
        for kind in jobs::Kind::ALL {
            let job = json!({"status": {"nodeStatus": [{"nodeName": "edge1", "actionFlow": []}]}});
            if let Ok(report) = &report {
                let _ = job::apply(kind, &mut job.clone(), "edge1", report);
            }
            if let Ok(task) = &task {
                let _ = job::apply_task(kind, &mut job.clone(), "edge1", task, NOW);
            }
        }
    }
}
/// A report about a device, merged into nothing.
fn merged(object: &Value) -> Value {
    let twins = object["twin"].as_object().cloned().unwrap_or_default();
    let epoch = object["epoch"].as_str().unwrap_or_default();
    device::merged_twins(&json!([{"name": "t"}]), &json!([]), &twins, epoch)
}
