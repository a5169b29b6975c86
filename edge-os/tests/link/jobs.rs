//! Node jobs and data for the buses, over a real session with a stock hub.

use crate::cloud::{Cloud, Session};
use crate::{Node, joined};
use serde_json::{Value, json};
use skerry_edge::agent::{self, AgentError};
use skerry_edge::config::Config;
use skerry_protocol::bus::{self, Call, CallResult};
use skerry_protocol::job::{self, Kind, TaskReport};
use skerry_protocol::{Message, Operation};
use std::path::Path;
use tokio_util::sync::CancellationToken;

/// Serves until a message of this operation comes.
async fn next_of(session: &mut Session, operation: Operation) -> Message {
    loop {
        let message = session.next().await;
        if message.operation() == Some(operation) {
            return message;
        }
        session.serve(&message).await;
    }
}

async fn reported(session: &mut Session) -> (String, bool, Value) {
    let report = next_of(session, Operation::UpdateNodeActionStatus).await;
    assert_eq!((report.route.source.as_str(), report.route.group.as_str()), ("websocket", "hub"));
    let content: Value = report.content_as().expect("a report");
    let action = content["action"].as_str().expect("an action").to_owned();
    (action, content["succ"] == true, content)
}

#[tokio::test]
async fn jobs_are_done_or_refused_and_each_action_is_reported() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let (node, mut session) = joined(dir.path(), &cloud, None).await;
    // There is no runtime, so the check goes well and the image cannot be fetched.
    let spec = json!({"imagePrePullTemplate": {"images": ["a:1"], "nodeNames": ["edge1"]}});
    session.send(&job::order(5, Kind::ImagePrePull, "p", "edge1", &spec)).await;
    let (action, succ, _) = reported(&mut session).await;
    assert_eq!((action.as_str(), succ), ("Check", true));
    let (action, succ, content) = reported(&mut session).await;
    assert_eq!((action.as_str(), succ), ("Pull", false));
    assert!(
        content["extend"].as_str().is_some_and(|images| images.contains("\"a:1\"")),
        "{content}"
    );

    session.send(&job::order(5, Kind::NodeUpgrade, "u", "edge1", &json!({"version": "v9"}))).await;
    let (action, succ, content) = reported(&mut session).await;
    assert_eq!((action.as_str(), succ), ("Check", false));
    assert!(content["reason"].as_str().is_some_and(|why| why.contains("OsRelease")), "{content}");

    let stage =
        job::stage(5, Kind::ImagePrePull, "old", "edge1", "Init", json!({})).expect("a task");
    session.send(&stage).await;
    let report = next_of(&mut session, Operation::Prepull).await;
    assert_eq!(report.route.resource, "task/old/node/edge1");
    let report: TaskReport = report.content_as().expect("a report");
    assert_eq!((report.event.as_str(), report.action.as_str()), ("Init", "Success"));

    let published = bus::publish(5, "default/lamp", "on");
    session.send(&published).await;
    let answer = next_of(&mut session, Operation::Error).await;
    assert_eq!(answer.header.parent_msg_id, published.header.msg_id);
    assert!(answer.content.get().contains("no event bus"));
    let call = Call { method: "GET".into(), ..Call::default() };
    session.send(&bus::call(5, "80", "/", &call).expect("a call")).await;
    let answer = next_of(&mut session, Operation::Upload).await;
    assert_eq!(answer.content_as::<CallResult>().expect("a result").status_code, 501);
    node.stop().await;
}

/// An agent whose configuration is a file, until it ends.
async fn run(file: &Path) -> tokio::task::JoinHandle<Result<(), AgentError>> {
    let config = Config::read(file).expect("a configuration");
    tokio::spawn(agent::run(config, CancellationToken::new()))
}

#[tokio::test]
async fn a_new_configuration_is_started_with_and_told_as_done_on_the_next_link() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let file = dir.path().join("edgecore.yaml");
    std::fs::write(&file, Node::text(dir.path(), &cloud, "beat: 25")).expect("written");
    let first = run(&file).await;
    let mut session = cloud.accept(None).await;
    let order = |name: &str, fields: Value| {
        job::order(5, Kind::ConfigUpdate, name, "edge1", &json!({"updateFields": fields}))
    };
    session.send(&order("refused", json!({"nodeName": "edge2"}))).await;
    let (action, succ, content) = reported(&mut session).await;
    assert!(action == "Check" && !succ, "{content}");
    session.send(&order("taken", json!({"beat": "30", "labels.floor": "2nd"}))).await;
    for expected in ["Check", "BackUp"] {
        let (action, succ, _) = reported(&mut session).await;
        assert_eq!((action.as_str(), succ), (expected, true));
    }
    let ended = first.await.expect("no panic");
    assert!(matches!(ended, Err(AgentError::Restart)), "{ended:?}");
    let config = Config::read(&file).expect("a configuration");
    assert_eq!((config.beat.as_secs(), config.labels["floor"].as_str()), (30, "2nd"));
    let second = run(&file).await;
    let mut session = cloud.accept(None).await;
    let (action, succ, _) = reported(&mut session).await;
    assert_eq!((action.as_str(), succ), ("Update", true));
    second.abort();
}
