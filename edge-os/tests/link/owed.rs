//! What the agent sends by itself: to a stock hub byte for byte what KubeEdge's edge sends, to ours less; and what it
//! owes the cluster over cuts and restarts.

use crate::cloud::{Cloud, Session};
use crate::{Node, OURS, joined};
use base64::Engine;
use serde_json::{Value, json};
use skerry_protocol::{Message, Operation};
use std::path::Path;
use std::time::Duration;
use tokio_tungstenite::tungstenite::Message as Frame;

const SESSION: &str = include_str!("../../../protocol/golden/session.jsonl");
const PATIENCE: Duration = Duration::from_secs(30);

/// Contents of the outbox in the database.
fn owed(dir: &Path) -> Vec<String> {
    // The agent may still be making it.
    let Ok(database) = rusqlite::Connection::open(dir.join("edge/state.db")) else {
        return Vec::new();
    };
    let Ok(mut query) = database.prepare("SELECT content FROM outbox ORDER BY seq") else {
        return Vec::new();
    };
    let rows = query.query_map([], |row| row.get(0)).expect("readable");
    rows.collect::<Result<_, _>>().unwrap_or_default()
}

async fn until(what: &str, mut state: impl FnMut() -> bool) {
    let wait = async {
        while !state() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{what}"));
}

fn is_event(message: &Message) -> bool {
    message.route.resource.split('/').nth(1) == Some("event")
}

/// Serves until an event comes.
async fn next_event(session: &mut Session) -> Message {
    loop {
        let message = session.next().await;
        if is_event(&message) {
            return message;
        }
        session.serve(&message).await;
    }
}

#[tokio::test]
async fn stock_hub_gets_the_bytes_that_kubeedge_sends() {
    let recorded = SESSION.lines().find_map(|line| {
        let line: Value = serde_json::from_str(line).expect("a recorded line");
        let data = line["data"].as_str()?.to_owned();
        data.contains("\"keepalive\"").then_some(data)
    });
    let recorded = Message::decode(recorded.expect("EdgeCore sends keepalives").as_bytes())
        .expect("a message");
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let (node, mut session) = joined(dir.path(), &cloud, None).await;
    let Frame::Text(text) = session.next_frame().await else { panic!("KubeEdge sends Text") };
    let mine = Message::decode(text.as_bytes()).expect("a message");
    // Only what is new each time differs.
    let mut expected = recorded.clone();
    expected.header.msg_id.clone_from(&mine.header.msg_id);
    expected.header.timestamp = mine.header.timestamp;
    assert_eq!(text.as_str(), expected.encode());
    assert!(text.ends_with("\"content\":\"ping\"}\n"), "{text}");
    // A reply is acknowledged there, and the lease is the node's business.
    let insert = session.until(Operation::Insert, "null/node/edge1").await;
    session.serve(&insert).await;
    session.until(Operation::Query, "kube-node-lease/lease/edge1").await;
    assert!(session.seen.contains(&"response null/node/edge1".to_owned()), "{:?}", session.seen);
    node.stop().await;
}

#[tokio::test]
async fn our_hub_gets_no_keepalives_no_leases_and_no_acknowledgements_of_replies() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let (node, mut session) = joined(dir.path(), &cloud, Some(OURS)).await;
    let digest = session.until(Operation::Query, "skerry/digest").await;
    session.answer(&digest, &json!("OK")).await;
    let patch = session.until(Operation::Patch, "null/nodepatch/edge1").await;
    session.serve(&patch).await;
    let rest = async {
        loop {
            let message = session.next().await;
            session.serve(&message).await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(2), rest).await;
    for seen in &session.seen {
        let allowed = [
            "insert null/node/",
            "patch null/nodepatch/",
            "query skerry/",
            "insert default/event/",
        ];
        assert!(allowed.iter().any(|start| seen.starts_with(start)), "{:?}", session.seen);
    }
    node.stop().await;
}

#[tokio::test]
async fn events_of_a_node_without_a_link_arrive_in_order_when_there_is_one() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    // Three starts that the cluster does not see: nobody accepts the connection.
    let starts =
        || owed(dir.path()).iter().filter(|event| event.contains("Starting edgecore.")).count();
    for start in 1..=3 {
        let node = Node::start(dir.path(), &cloud);
        until("the event is durable", || starts() == start).await;
        node.stop().await;
    }
    let before = owed(dir.path());

    // The hub takes them and does not answer: they stay owed, and come again.
    let (node, mut session) = joined(dir.path(), &cloud, Some(OURS)).await;
    for owed in &before {
        assert_eq!(next_event(&mut session).await.content.get(), owed);
    }
    drop(session);
    let mut session = cloud.accept(Some(OURS)).await;
    for owed in &before {
        let event = next_event(&mut session).await;
        assert_eq!(event.content.get(), owed);
        session.answer(&event, &json!("OK")).await;
    }
    // What this process has to say comes after that. When all is answered, nothing is left on the disk.
    let rest = async {
        loop {
            let event = next_event(&mut session).await;
            assert!(!before.iter().any(|owed| owed == event.content.get()), "answered already");
            session.answer(&event, &json!("OK")).await;
        }
    };
    tokio::select! {
        () = rest => {}
        () = until("nothing is owed", || owed(dir.path()).is_empty()) => {}
    }
    node.stop().await;
}

#[tokio::test]
async fn stock_hub_that_answers_no_events_gets_each_of_them_once() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let node = Node::start(dir.path(), &cloud);
    until("the event is durable", || !owed(dir.path()).is_empty()).await;
    node.stop().await;
    let (node, mut session) = joined(dir.path(), &cloud, None).await;
    let (first, second) = (next_event(&mut session).await, next_event(&mut session).await);
    assert_ne!(first.route.resource, second.route.resource);
    until("nothing is owed", || owed(dir.path()).is_empty()).await;
    drop(session);
    let mut session = cloud.accept(None).await;
    session.until(Operation::Patch, "null/nodepatch/edge1").await;
    assert!(!session.seen.iter().any(|seen| seen.contains("/event/")), "{:?}", session.seen);
    node.stop().await;
}

#[tokio::test]
async fn authorities_that_the_hub_pushes_are_stored_before_the_push_is_acknowledged() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let (node, mut session) = joined(dir.path(), &cloud, Some(OURS)).await;
    let other = Cloud::start(None).await;
    let base64 = |der: &[u8]| base64::engine::general_purpose::STANDARD.encode(der);
    let bundle = json!({"bundle": [base64(cloud.ca_der()), base64(other.ca_der())]});
    let id = session.push(Operation::Update, "skerry/bundle/edge1", &bundle).await;
    session.until_ack(&id).await;
    let stored = std::fs::read_to_string(dir.path().join("edge/pki/ca.crt")).expect("a file");
    assert_eq!(stored.matches("BEGIN CERTIFICATE").count(), 2);
    node.stop().await;
}
