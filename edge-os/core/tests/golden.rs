//! The edge half of the recorded session between KubeEdge's own peers (`protocol/golden/session.jsonl`): our machines
//! are given what CloudCore sent, and answer what EdgeCore answered.

use serde::Deserialize;
use serde_json::{Value, json};
use skerry_edge_core::Now;
use skerry_edge_core::meta::{Effect, Meta};
use skerry_edge_core::node::{Facts, Health, labels};
use skerry_edge_core::status::PodKey;
use skerry_edge_core::uplink::{Output, Uplink};
use skerry_protocol::{Capabilities, Message, Operation};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const SESSION: &str = include_str!("../../../protocol/golden/session.jsonl");

#[derive(Deserialize)]
struct Line {
    kind: String,
    #[serde(default)]
    dir: String,
    data: String,
}

fn messages(dir: &str) -> Vec<Message> {
    let lines = SESSION.lines().map(|line| serde_json::from_str(line).expect("a recorded line"));
    lines
        .filter(|line: &Line| line.kind == "msg" && line.dir == dir)
        .map(|line| Message::decode(line.data.as_bytes()).expect("a recorded message"))
        .collect()
}

/// CloudCore's answer to the first recorded request with this operation and resource, as an answer to `request`.
fn recorded_reply(request: &Message) -> Message {
    // Renewals of the lease are left out of the recording; their answer is that of the insert.
    let renewal = request.route.resource.contains("/lease/") && request.route.operation == "update";
    let operation = if renewal { "insert" } else { &request.route.operation };
    let recorded = messages("edge->cloud").into_iter().find(|message| {
        let (mine, theirs) = (&request.route, &message.route);
        (operation, &mine.resource, &mine.source, &mine.group)
            == (theirs.operation.as_str(), &theirs.resource, &theirs.source, &theirs.group)
    });
    let recorded = recorded.unwrap_or_else(|| panic!("EdgeCore never sent {:?}", request.route));
    let id = recorded.header.msg_id;
    let mut replies = messages("cloud->edge").into_iter();
    let mut reply = replies.find(|message| message.header.parent_msg_id == id).expect("a reply");
    reply.header.parent_msg_id = request.header.msg_id.clone();
    reply
}

fn now() -> Now {
    Now { mono: Instant::now(), wall: "2026-11-22T16:23:21Z".parse().expect("a time") }
}

fn facts() -> Facts {
    Facts { name: "edge1".into(), architecture: "amd64".into(), ..Facts::default() }
}

#[test]
fn every_push_is_acknowledged_as_edgecore_did() {
    let acks: BTreeMap<_, _> = messages("edge->cloud")
        .into_iter()
        .filter(|message| !message.header.parent_msg_id.is_empty())
        .map(|ack| (ack.header.parent_msg_id.clone(), ack))
        .collect();
    let mut meta = Meta::restore("edge1", [], []).0;
    let mut effects = Vec::new();
    let mut pushes = 0;
    for push in messages("cloud->edge") {
        if !push.header.parent_msg_id.is_empty() || push.route.group != "resource" {
            continue;
        }
        pushes += 1;
        let step = meta.handle_push(now(), &push);
        let (mine, new) = meta.commit(step);
        let mine = mine.expect("an acknowledgement");
        let theirs = acks.get(&push.header.msg_id).expect("EdgeCore acknowledged it");
        assert_eq!(mine.header.parent_msg_id, theirs.header.parent_msg_id);
        assert_eq!(mine.content.get(), theirs.content.get());
        assert_eq!(mine.route.operation, theirs.route.operation);
        // EdgeCore hands a device to another module first, which then signs the acknowledgement.
        if push.route.source == "edgecontroller" {
            assert_eq!(mine.route, theirs.route);
        }
        effects.extend(new);
    }
    assert!(pushes > 15, "the recording is there");

    let words: Vec<_> = effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::PodUpsert(pod) => {
                let deleted = pod.metadata.deletion_timestamp.is_some();
                let verb = if deleted { "end" } else { "run" };
                Some(format!("{verb} {}", pod.metadata.name.as_deref().unwrap_or_default()))
            }
            Effect::PodRemove { name, .. } => Some(format!("remove {name}")),
            Effect::ObjectChanged { kind, name, .. } => Some(format!("{kind} {name}")),
            Effect::Ignored { resource, reason } => panic!("{resource}: {reason}"),
            Effect::OwnNode(_) | Effect::OwnNodeGone | Effect::HandOn(_) => None,
        })
        .collect();
    // Created, label changed; a device with its model; configmap changed before and during the cut; second pod; delete,
    // which first sets a deletion timestamp, then a grace period of 0; the device is gone.
    let expected = [
        "run web",
        "configmap web",
        "run web",
        "devicemodel thermometer",
        "device fridge-1",
        "device fridge-1",
        "configmap web",
        "run web2",
        "end web",
        "end web",
        "remove web",
        "devicemodel thermometer",
        "device fridge-1",
    ];
    assert_eq!(words, expected);
    let left: Vec<_> = meta.paths("pod").collect();
    assert_eq!(left, ["default/pod/web2"]);
}

#[test]
fn node_joins_with_the_recorded_answers_of_cloudcore() {
    let start = now();
    let mut uplink = Uplink::new(facts(), start, 1);
    uplink.update_node(start, facts(), Health::default());
    uplink.handle_connected(start, Capabilities::default(), None);

    let mut sent = Vec::new();
    let mut now = start;
    while now.mono < start.mono + Duration::from_secs(25) {
        while let Some(message) = uplink.poll_transmit(now, |_| None) {
            sent.push(format!("{} {}", message.route.operation, message.route.resource));
            let expects_reply =
                !matches!(message.operation(), Some(Operation::Keepalive | Operation::Response));
            if expects_reply {
                assert!(uplink.handle_reply(now, &recorded_reply(&message)));
            }
        }
        while let Some(output) = uplink.poll_output(now) {
            match output {
                Output::Object { path, .. } => assert_eq!(path.to_string(), "null/node/edge1"),
                Output::Refused { resource, reason } if resource.contains("lease") => {
                    panic!("{reason}")
                }
                _ => {}
            }
        }
        let next = uplink.poll_timeout(now);
        let step = next.saturating_duration_since(now.mono).max(Duration::from_millis(1));
        now = Now { mono: now.mono + step, wall: now.wall + step };
    }
    let keepalives = sent.iter().filter(|text| *text == "keepalive node").count();
    assert_eq!(keepalives, 2);
    let lease = "kube-node-lease/lease/edge1";
    let wanted = [
        "insert null/node/edge1".to_owned(),
        format!("query {lease}"),
        format!("insert {lease}"),
        "patch null/nodepatch/edge1".to_owned(),
        format!("update {lease}"),
        format!("update {lease}"),
    ];
    let requests: Vec<_> = sent
        .iter()
        .filter(|text| !text.starts_with("response") && !text.starts_with("keepalive"))
        .collect();
    assert_eq!(requests, wanted.iter().collect::<Vec<_>>());
    assert_eq!(uplink.node().uid(), Some("7eb0c978-6b4e-4036-89e7-797cc640d0bc"));
    assert!(uplink.lease_renewed().is_some());
}

#[test]
fn objects_are_looked_up_and_statuses_reported_with_the_recorded_answers() {
    let now = now();
    let mut uplink = Uplink::new(facts(), now, 1);
    uplink.handle_connected(now, Capabilities::default(), None);
    let path = "default/configmap/web".parse().expect("a path");
    let ticket = uplink.lookup(now, path, Value::Null);
    let key = PodKey::new("default", "web", "de2f6723-e462-4c20-8674-b46348fe9d51");
    uplink.report_pod(key.clone(), json!({"phase": "Pending"}), || None);
    uplink.finish_pod(key);

    let mut answered = None;
    let mut finished = false;
    let mut sent = Vec::new();
    for _ in 0..20 {
        while let Some(message) = uplink.poll_transmit(now, |_| None) {
            if message.operation() == Some(Operation::Keepalive) {
                continue;
            }
            sent.push(format!("{} {}", message.route.operation, message.route.resource));
            if message.operation() != Some(Operation::Response) {
                assert!(uplink.handle_reply(now, &recorded_reply(&message)));
            }
        }
        while let Some(output) = uplink.poll_output(now) {
            match output {
                Output::Answer { ticket: mine, found, ack, .. } => {
                    assert_eq!(mine, ticket);
                    uplink.acknowledge(ack.expect("CloudCore wants it acknowledged"));
                    answered = found.expect("an answer");
                }
                Output::PodFinished(_) => finished = true,
                _ => {}
            }
        }
    }
    assert_eq!(answered.expect("an object")["kind"], "ConfigMap");
    assert!(finished);
    let expected = [
        "query default/configmap/web",
        "patch default/podpatch/web",
        "response default/configmap/web",
        "delete default/pod/web",
    ];
    sent.sort();
    let mut expected = expected.to_vec();
    expected.sort_unstable();
    assert_eq!(sent, expected);
}

#[test]
fn labels_are_those_of_edgecore() {
    let insert = messages("edge->cloud")
        .into_iter()
        .find(|message| message.operation() == Some(Operation::Insert))
        .expect("a registration");
    let node: Value = insert.content_as().expect("a Node");
    assert_eq!(json!(labels(&facts())), node["metadata"]["labels"]);
}
