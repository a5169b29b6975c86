//! Pod statuses over a link that is cut, against a cloud that fails now and then; a seed decides everything.
//!
//! At the end the cloud has the last status of every pod, never an older one after a newer one, and every finished pod
//! was deleted once, after its last status.

use serde_json::{Value, json};
use skerry_edge_core::Now;
use skerry_edge_core::backoff::Random;
use skerry_edge_core::event::EventReport;
use skerry_edge_core::node::{Facts, Health};
use skerry_edge_core::status::PodKey;
use skerry_edge_core::uplink::{KEEPALIVE_INTERVAL, LOOKUP_TIMEOUT, Output, Uplink};
use skerry_protocol::{Message, Operation};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::{Duration, Instant};

#[derive(Default)]
struct Cloud {
    statuses: BTreeMap<String, u64>,
    deleted: BTreeMap<String, u32>,
    node: bool,
    lease: bool,
}

impl Cloud {
    fn answer(&mut self, random: &mut Random, message: &Message) -> Option<Message> {
        let name = message.route.resource.rsplit('/').next().unwrap_or_default().to_owned();
        let kind = message.route.resource.split('/').nth(1).unwrap_or_default();
        if random.below(10) == 0 {
            let err =
                json!({"ErrStatus": {"code": 500, "reason": "InternalError", "message": "no"}});
            return Some(message.response(0, &json!({"Object": null, "Err": err})));
        }
        let missing = json!({"Object": null, "Err": {"ErrStatus": {"code": 404, "reason": "NotFound", "message": "gone"}}});
        let fine = |object: Value| json!({"Object": object, "Err": null});
        let content = match (message.operation()?, kind) {
            (Operation::Insert, "node") => {
                self.node = true;
                fine(json!({"metadata": {"name": name, "uid": "n"}}))
            }
            (Operation::Patch, "nodepatch") if self.node => fine(json!({})),
            (Operation::Update, "node") => json!("OK"),
            (Operation::Query, "lease") if !self.lease => missing,
            (Operation::Query | Operation::Insert | Operation::Update, "lease") => {
                self.lease = true;
                fine(json!({"metadata": {"name": name, "resourceVersion": "1"}, "spec": {}}))
            }
            (Operation::Patch, "podpatch") => {
                let patch: String = message.content_as().expect("a text");
                let patch: Value = serde_json::from_str(&patch).expect("a patch");
                let version: u64 = patch["status"]["message"].as_str()?.parse().ok()?;
                let old = self.statuses.insert(name.clone(), version);
                assert!(old.is_none_or(|old| old <= version), "{name} went back");
                assert!(
                    !self.deleted.contains_key(&name),
                    "{name} was deleted before its last status"
                );
                fine(json!({"metadata": {"name": name, "uid": name}}))
            }
            (Operation::Delete, "pod") => {
                *self.deleted.entry(name).or_default() += 1;
                json!("OK")
            }
            _ => missing,
        };
        Some(message.response(0, &content))
    }
}

fn facts() -> Facts {
    Facts { name: "edge1".into(), ..Facts::default() }
}

#[test]
fn last_status_of_every_pod_arrives_whatever_happens_to_the_link() {
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let mut cloud = Cloud::default();
        let mut now = Now { mono: Instant::now(), wall: jiff::Timestamp::UNIX_EPOCH };
        let mut uplink = Uplink::new(facts(), now, seed);
        uplink.update_node(now, facts(), Health::default());
        let mut version = 0;
        let mut last: BTreeMap<String, u64> = BTreeMap::new();
        let mut ended: BTreeMap<String, ()> = BTreeMap::new();
        let mut replies: Vec<(Instant, Message)> = Vec::new();
        for round in 0..400 {
            let working = round < 300;
            if working && random.below(20) == 0 {
                uplink.handle_disconnected();
                replies.clear();
            }
            if !uplink.is_connected() && (!working || random.below(4) == 0) {
                uplink.handle_connected(now, None);
            }
            if working {
                let name = format!("p{}", random.below(5));
                if let Entry::Vacant(end) = ended.entry(name.clone()) {
                    version += 1;
                    let status = json!({"phase": "Running", "message": version.to_string()});
                    uplink.report_pod(PodKey::new("default", &name, &name), status, || None);
                    last.insert(name.clone(), version);
                    if random.below(40) == 0 {
                        uplink.finish_pod(PodKey::new("default", &name, &name));
                        end.insert(());
                    }
                }
            }
            while let Some(message) = uplink.poll_transmit(now) {
                // The cloud does what arrives; its reply takes a while, and is lost with the link.
                if let Some(reply) = cloud.answer(&mut random, &message) {
                    replies.push((now.mono + Duration::from_millis(random.below(3000)), reply));
                }
            }
            let (due, later): (Vec<_>, Vec<_>) =
                replies.into_iter().partition(|(at, _)| *at <= now.mono);
            replies = later;
            for (_, reply) in due {
                uplink.handle_reply(now, &reply);
            }
            while let Some(output) = uplink.poll_output(now) {
                if let Output::Reconnect(_) = output {
                    uplink.handle_disconnected();
                    replies.clear();
                }
            }
            let step = Duration::from_millis(100 + random.below(1500));
            now = Now { mono: now.mono + step, wall: now.wall + step };
        }
        assert_eq!(cloud.statuses, last, "seed {seed}");
        let deleted: Vec<_> = cloud.deleted.keys().collect();
        assert_eq!(deleted, ended.keys().collect::<Vec<_>>(), "seed {seed}");
        assert!(cloud.node && cloud.lease, "seed {seed}");
    }
}

#[test]
fn keepalive_goes_out_before_anything_else_and_every_15_s() {
    let now = Now { mono: Instant::now(), wall: jiff::Timestamp::UNIX_EPOCH };
    let mut uplink = Uplink::new(facts(), now, 1);
    uplink.update_node(now, facts(), Health::default());
    uplink.handle_connected(now, None);
    let first = uplink.poll_transmit(now).expect("a keepalive");
    assert_eq!(first.operation(), Some(Operation::Keepalive));
    assert_eq!(first.content.get(), "\"ping\"");
    let later = Now { mono: now.mono + KEEPALIVE_INTERVAL, ..now };
    assert!(uplink.poll_timeout(now) <= later.mono);
    let again = uplink.poll_transmit(later).expect("the next one");
    assert_eq!(again.operation(), Some(Operation::Keepalive));
}

#[test]
fn lookup_ends_offline_at_once_in_silence_after_a_while_and_with_the_link() {
    let now = Now { mono: Instant::now(), wall: jiff::Timestamp::UNIX_EPOCH };
    let mut uplink = Uplink::new(facts(), now, 1);
    let path = || "default/secret/pw".parse().expect("a path");
    let text = |uplink: &mut Uplink, now| match uplink.poll_output(now) {
        Some(Output::Answer { found: Err(text), .. }) => text,
        other => panic!("{other:?}"),
    };
    uplink.lookup(now, path(), Value::Null);
    assert_eq!(text(&mut uplink, now), "there is no connection to the cloud");
    uplink.handle_connected(now, None);
    uplink.lookup(now, path(), Value::Null);
    assert!(uplink.poll_output(now).is_none());
    let later = Now { mono: now.mono + LOOKUP_TIMEOUT, ..now };
    assert_eq!(text(&mut uplink, later), "no answer from the cloud within 20 s");
    uplink.lookup(later, path(), Value::Null);
    uplink.handle_disconnected();
    assert_eq!(text(&mut uplink, later), "connection to the cloud was lost");
}

#[test]
fn refusals_are_told_apart_in_all_their_forms() {
    let now = Now { mono: Instant::now(), wall: jiff::Timestamp::UNIX_EPOCH };
    let not_found = json!({"ErrStatus": {"status": "Failure", "reason": "NotFound", "code": 404, "message": "none"}});
    for (content, expected) in [
        (not_found.clone(), "none"),
        (json!({"Object": null, "Err": not_found}), "none"),
        (json!({"Object": null, "Err": {}}), "error: the cloud failed and did not say why"),
        (
            json!({"Object": null, "Err": {"ErrStatus": {"code": 403, "message": "no"}}}),
            "error: no",
        ),
        (json!("OK"), "error: the answer of the hub is not an object"),
        (json!({"kind": "Secret"}), "found"),
    ] {
        let mut uplink = Uplink::new(facts(), now, 1);
        uplink.handle_connected(now, None);
        uplink.lookup(now, "default/secret/pw".parse().expect("a path"), Value::Null);
        let query = std::iter::from_fn(|| uplink.poll_transmit(now))
            .find(|message| message.operation() == Some(Operation::Query))
            .expect("a query");
        uplink.handle_reply(now, &query.response(0, &content));
        let found = match uplink.poll_output(now) {
            Some(Output::Answer { found, .. }) => found,
            other => panic!("{other:?}"),
        };
        let words = match found {
            Ok(Some(_)) => "found".to_owned(),
            Ok(None) => "none".to_owned(),
            Err(text) => format!("error: {text}"),
        };
        assert_eq!(words, expected, "{content}");
    }
}

#[test]
fn events_go_last_and_are_kept_while_the_link_is_down() {
    let now = Now { mono: Instant::now(), wall: jiff::Timestamp::UNIX_EPOCH };
    let mut uplink = Uplink::new(facts(), now, 1);
    uplink.update_node(now, facts(), Health::default());
    let report = EventReport {
        kind: "Node",
        namespace: String::new(),
        name: "edge1".into(),
        uid: "edge1".into(),
        field_path: String::new(),
        warning: false,
        reason: "Starting".into(),
        message: "Starting edgecore.".into(),
    };
    uplink.push_event(now, report);
    uplink.handle_connected(now, None);
    let sent: Vec<_> = std::iter::from_fn(|| uplink.poll_transmit(now))
        .map(|message| format!("{} {}", message.route.operation, message.route.resource))
        .collect();
    assert_eq!(sent[..2], ["keepalive node", "insert null/node/edge1"]);
    assert!(sent[2].starts_with("insert default/event/edge1."), "{sent:?}");
}
