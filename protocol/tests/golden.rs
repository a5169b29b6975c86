//! The recorded session between KubeEdge's own peers (`golden/session.jsonl`): our codec reads and writes its bytes.

use proptest::prelude::*;
use serde::Deserialize;
use skerry_protocol::delivery::ack_required;
use skerry_protocol::{Message, Operation, ResourcePath};
use std::collections::BTreeSet;

const SESSION: &str = include_str!("../golden/session.jsonl");

#[derive(Deserialize)]
struct Line {
    kind: String,
    #[serde(default)]
    dir: String,
    data: String,
}

fn session() -> Vec<Line> {
    SESSION.lines().map(|line| serde_json::from_str(line).expect("a recorded line")).collect()
}

fn messages() -> Vec<(String, String)> {
    let is_message = |line: &Line| line.kind == "msg";
    session().into_iter().filter(is_message).map(|line| (line.dir, line.data)).collect()
}

#[test]
fn every_recorded_message_is_written_again_byte_for_byte() {
    let messages = messages();
    assert!(messages.len() > 70, "the recording is there");
    for (_, text) in messages {
        let message = Message::decode(text.as_bytes()).expect(&text);
        assert_eq!(message.encode(), text);
    }
}

#[test]
fn recorded_resources_of_objects_are_resource_paths() {
    for (_, text) in messages() {
        let message = Message::decode(text.as_bytes()).expect(&text);
        let resource = &message.route.resource;
        let other = ["node", "membership", "twin"].contains(&resource.as_str())
            || resource.starts_with("device/");
        match resource.parse::<ResourcePath>() {
            Ok(path) => assert_eq!(path.to_string(), *resource),
            Err(error) => assert!(other, "{error}"),
        }
    }
}

/// The Go edge acknowledges what it files, and some answers that nobody waits to hear about; so every message that we
/// would repeat until it is acknowledged has to have been acknowledged in the recording.
#[test]
fn every_message_that_we_would_repeat_was_acknowledged_by_the_recorded_edge() {
    let mut acked = BTreeSet::new();
    let mut wanted = Vec::new();
    for (dir, text) in messages() {
        let message = Message::decode(text.as_bytes()).expect(&text);
        match dir.as_str() {
            "edge->cloud" if message.operation() == Some(Operation::Response) => {
                acked.insert(message.header.parent_msg_id);
            }
            "cloud->edge" if ack_required(&message) => wanted.push(message),
            _ => {}
        }
    }
    assert!(wanted.len() > 15, "the recording has pushes");
    for message in wanted {
        assert!(acked.contains(&message.header.msg_id), "{:?}", message.route);
    }
}

#[test]
fn our_answers_have_the_shape_of_the_recorded_ones() {
    let messages: Vec<_> = messages()
        .into_iter()
        .map(|(dir, text)| (dir, Message::decode(text.as_bytes()).expect(&text)))
        .collect();
    let push = messages
        .iter()
        .find(|(dir, message)| dir == "cloud->edge" && message.route.resource == "default/pod/web")
        .map(|(_, message)| message)
        .expect("the pod is pushed");
    let recorded = messages
        .iter()
        .find(|(_, message)| message.header.parent_msg_id == push.header.msg_id)
        .map(|(_, message)| message)
        .expect("the pod is acknowledged");

    let mut ours = push.ack(recorded.header.timestamp);
    ours.header.msg_id.clone_from(&recorded.header.msg_id);

    assert_eq!(ours.encode(), recorded.encode());
}

#[test]
fn opening_handshake_carries_node_project_and_use() {
    let session = session();
    let request = session
        .iter()
        .find(|line| line.kind == "http" && line.dir == "edge->cloud")
        .map(|line| line.data.to_lowercase())
        .expect("recorded");
    assert!(request.starts_with("get /e632aba927ea4ac2b575ec1603d56f10/edge1/events http/1.1"));
    for header in ["connectionuse: msg", "node_id: edge1", "sec-websocket-version: 13"] {
        assert!(request.contains(header), "{header}");
    }
    assert!(!request.contains("sec-websocket-protocol") && !request.contains("extensions"));
}

#[test]
fn messages_over_the_bound_are_refused_before_they_are_parsed() {
    let long = vec![b' '; skerry_protocol::message::MESSAGE_LEN_MAX + 1];
    let error = Message::decode(&long).expect_err("too long");
    assert_eq!(error.to_string(), "message of 33554433 bytes is over the bound of 33554432 bytes");
}

#[test]
fn absent_parts_are_read_as_empty() {
    let message = Message::decode(br#"{"header":{},"route":{},"unknown":1}"#).expect("lenient");
    assert_eq!(message.content.get(), "null");
    assert_eq!(message.operation(), None);
}

proptest! {
    #[test]
    fn mangled_recorded_bytes_never_panic(
        which in any::<proptest::sample::Index>(),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<proptest::sample::Index>(),
    ) {
        let messages = messages();
        let mut bytes = which.get(&messages).1.clone().into_bytes();
        for (position, byte) in changes {
            let position = position.index(bytes.len());
            bytes[position] = byte;
        }
        bytes.truncate(cut.index(bytes.len()) + 1);
        if let Ok(message) = Message::decode(&bytes) {
            let again = Message::decode(message.encode().as_bytes()).expect("our own encoding");
            prop_assert_eq!(&again.header, &message.header);
            let _ = ack_required(&message);
        }
    }

    #[test]
    fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        let _ = Message::decode(&bytes);
    }
}
