//! Pod statuses over a link that is cut, against a cloud that fails now and then; a seed decides everything.
//!
//! At the end the cloud has the last status of every pod, never an older one after a newer one, and every finished pod
//! was deleted once, after its last status.

use serde_json::{Value, json};
use skerry_edge_core::Now;
use skerry_edge_core::backoff::Random;
use skerry_edge_core::event::EventReport;
use skerry_edge_core::node::{Facts, Health};
use skerry_edge_core::outbox::{Change, Item, Kind, Row};
use skerry_edge_core::status::PodKey;
use skerry_edge_core::uplink::{KEEPALIVE_INTERVAL, LOOKUP_TIMEOUT, Output, Uplink};
use skerry_protocol::{Capabilities, Message, Operation};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
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
                uplink.handle_disconnected(now);
                replies.clear();
            }
            if !uplink.is_connected() && (!working || random.below(4) == 0) {
                uplink.handle_connected(now, Capabilities::default(), None);
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
            while let Some(message) = uplink.poll_transmit(now, |_| None) {
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
                    uplink.handle_disconnected(now);
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

/// The outbox table: what was committed.
type Disk = BTreeMap<u64, Item>;

fn rows(disk: &Disk) -> Vec<Row> {
    let row = |(seq, item): (&u64, &Item)| Row {
        seq: *seq,
        key: item.key.clone(),
        kind: item.kind,
        operation: item.operation,
        resource: item.resource.clone(),
        len: item.content.len(),
    };
    disk.iter().map(row).collect()
}

fn event(n: u64) -> EventReport {
    EventReport {
        kind: "Pod",
        namespace: "default".into(),
        name: "web".into(),
        uid: "web".into(),
        field_path: String::new(),
        warning: false,
        reason: "Test".into(),
        message: n.to_string(),
    }
}

/// The agent with its database, through cuts, moves to another connection, and power cuts.
#[test]
fn durable_events_and_ends_of_pods_arrive_over_power_cuts_with_any_hub() {
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let (mut now, mut disk) =
            (Now { mono: Instant::now(), wall: jiff::Timestamp::UNIX_EPOCH }, Disk::new());
        let peer = match seed % 2 {
            0 => Capabilities::OURS,
            _ => Capabilities::default(),
        };
        let mut uplink = Uplink::new(facts(), now, seed);
        let mut replies: Vec<Message> = Vec::new();
        // What is on the disk must arrive; what a power cut takes before that never was.
        let (mut durable, mut ended) = (BTreeSet::new(), BTreeSet::new());
        let (mut got, mut deleted, mut statuses) =
            (Vec::<u64>::new(), BTreeSet::new(), BTreeMap::<String, String>::new());
        let mut next = 0;
        for round in 0..500 {
            let working = round < 300;
            let dice = random.below(if working { 12 } else { 4 });
            match dice {
                0 if !uplink.is_connected() => uplink.handle_connected(now, peer, None),
                1..=3 => {}
                4 | 5 => {
                    next += 1;
                    uplink.push_event(now, event(next));
                }
                6 if random.below(3) == 0 => {
                    next += 1;
                    let name = format!("p{next}");
                    let key = || PodKey::new("default", &name, &name);
                    let status = json!({"phase": "Failed", "message": format!("end of {name}")});
                    uplink.report_pod(key(), status, || None);
                    uplink.finish_pod(key());
                }
                7 if random.below(4) == 0 => {
                    uplink.handle_disconnected(now);
                    replies.clear();
                }
                8 if uplink.is_connected() && random.below(4) == 0 => {
                    replies.clear();
                    uplink.handle_connected(now, peer, None);
                }
                9 if random.below(6) == 0 => {
                    replies.clear();
                    let read = |seq| disk.get(&seq).map(|item: &Item| item.content.clone());
                    uplink = Uplink::restore(facts(), now, random.next_u64(), rows(&disk), read);
                }
                _ => {}
            }
            let changes = uplink.take_changes(now);
            if !changes.is_empty() {
                if working && random.below(15) == 0 {
                    // The power goes with the transaction.
                    replies.clear();
                    let read = |seq| disk.get(&seq).map(|item: &Item| item.content.clone());
                    uplink = Uplink::restore(facts(), now, random.next_u64(), rows(&disk), read);
                    continue;
                }
                for change in changes {
                    match change {
                        Change::Put { seq, item } => {
                            let content: Value = serde_json::from_str(&item.content).expect("JSON");
                            match item.kind {
                                Kind::Note => drop(ended.insert(content["name"].to_string())),
                                _ => drop(durable.insert(content["message"].to_string())),
                            }
                            disk.insert(seq, item);
                        }
                        Change::Remove { seq } => drop(disk.remove(&seq)),
                    }
                }
                uplink.handle_stored(now, true);
            }
            for _ in 0..8 {
                let read = |seq| disk.get(&seq).map(|item: &Item| item.content.clone());
                let Some(message) = uplink.poll_transmit(now, read) else { break };
                let name = message.route.resource.rsplit('/').next().unwrap_or_default().to_owned();
                let content: Value = message.content_as().expect("JSON");
                match message.route.resource.split('/').nth(1).unwrap_or_default() {
                    "event" => {
                        got.push(
                            content["message"].as_str().expect("a text").parse().expect("a number"),
                        );
                        if peer.receipts {
                            replies.push(message.response(0, "OK"));
                        } else {
                            assert!(uplink.wants_written(&message.header.msg_id));
                            uplink.handle_written(now, &message.header.msg_id);
                        }
                    }
                    "podpatch" => {
                        let patch: Value =
                            serde_json::from_str(content.as_str().expect("a text")).expect("JSON");
                        let said = patch["status"]["message"].as_str().expect("a text").to_owned();
                        statuses.insert(name, said);
                        replies.push(message.response(0, &json!({"Object": {}, "Err": null})));
                    }
                    "pod" => {
                        assert!(
                            statuses.contains_key(&name),
                            "seed {seed}: {name} went before its last status"
                        );
                        deleted.insert(json!(name).to_string());
                        replies.push(message.response(0, "OK"));
                    }
                    _ => {}
                }
            }
            let count = random.below(replies.len() as u64 + 1) as usize;
            for reply in replies.drain(..count) {
                assert!(uplink.handle_reply(now, &reply), "seed {seed}: somebody waits for it");
            }
            while uplink.poll_output(now).is_some() {}
            let step = Duration::from_millis(random.below(700));
            now = Now { mono: now.mono + step, wall: now.wall + step };
        }
        let arrived: BTreeSet<_> = got.iter().map(|n| json!(n.to_string()).to_string()).collect();
        assert!(
            durable.is_subset(&arrived),
            "seed {seed}: lost {:?}",
            durable.difference(&arrived)
        );
        assert_eq!(deleted, ended, "seed {seed}");
        assert!(disk.is_empty() && uplink.outbox().is_empty(), "seed {seed}: {disk:?}");
        // First arrivals are in the order of the events.
        let mut first = got.clone();
        let mut seen = BTreeSet::new();
        first.retain(|n| seen.insert(*n));
        assert!(first.is_sorted(), "seed {seed}: {first:?}");
    }
}

#[test]
fn with_our_hub_there_are_no_leases_and_no_keepalives_and_a_move_keeps_lookups() {
    let now = Now { mono: Instant::now(), wall: jiff::Timestamp::UNIX_EPOCH };
    let mut uplink = Uplink::new(facts(), now, 1);
    uplink.update_node(now, facts(), Health::default());
    let peer = Capabilities::ours(Duration::from_secs(25));
    uplink.handle_connected(now, peer, None);
    uplink.lookup(now, "default/secret/pw".parse().expect("a path"), Value::Null);
    let drain = |uplink: &mut Uplink| -> Vec<_> {
        std::iter::from_fn(|| uplink.poll_transmit(now, |_| None)).collect()
    };
    let words = |sent: &[Message]| -> Vec<_> {
        sent.iter().map(|one| format!("{} {}", one.route.operation, one.route.resource)).collect()
    };
    let sent = drain(&mut uplink);
    assert_eq!(words(&sent), ["query default/secret/pw", "insert null/node/edge1"]);
    // The link moves to another connection: what was asked is asked there, nobody is told of a cut.
    uplink.handle_connected(now, peer, None);
    let sent = drain(&mut uplink);
    assert_eq!(words(&sent), ["query default/secret/pw", "insert null/node/edge1"]);
    let node = json!({"metadata": {"name": "edge1", "uid": "n"}});
    uplink.handle_reply(now, &sent[1].response(0, &json!({"Object": node, "Err": null})));
    uplink.handle_reply(now, &sent[0].response(0, &json!({"kind": "Secret"})));
    let answers = std::iter::from_fn(|| uplink.poll_output(now));
    let found =
        answers.filter(|output| matches!(output, Output::Answer { found: Ok(Some(_)), .. }));
    assert_eq!(found.count(), 1);
    // The reply about the node is not acknowledged; its status follows, and then there is silence for an hour.
    let sent = drain(&mut uplink);
    assert_eq!(words(&sent), ["update null/node/edge1", "patch null/nodepatch/edge1"][1..]);
    uplink.handle_reply(now, &sent[0].response(0, &json!({"Object": node, "Err": null})));
    let sent = drain(&mut uplink);
    assert_eq!(words(&sent), ["update null/node/edge1"], "labels that the cluster lacks");
    uplink.handle_reply(now, &sent[0].response(0, "OK"));
    while uplink.poll_output(now).is_some() {}
    for minute in 1..60 {
        let wait = Duration::from_secs(60 * minute);
        let later = Now { mono: now.mono + wait, wall: now.wall + wait };
        assert!(uplink.poll_transmit(later, |_| None).is_none(), "minute {minute}");
    }
}

#[test]
fn keepalive_goes_out_before_anything_else_and_every_15_s() {
    let now = Now { mono: Instant::now(), wall: jiff::Timestamp::UNIX_EPOCH };
    let mut uplink = Uplink::new(facts(), now, 1);
    uplink.update_node(now, facts(), Health::default());
    uplink.handle_connected(now, Capabilities::default(), None);
    let first = uplink.poll_transmit(now, |_| None).expect("a keepalive");
    assert_eq!(first.operation(), Some(Operation::Keepalive));
    assert_eq!(first.content.get(), "\"ping\"");
    let later = Now { mono: now.mono + KEEPALIVE_INTERVAL, ..now };
    assert!(uplink.poll_timeout(now) <= later.mono);
    let again = uplink.poll_transmit(later, |_| None).expect("the next one");
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
    uplink.handle_connected(now, Capabilities::default(), None);
    uplink.lookup(now, path(), Value::Null);
    assert!(uplink.poll_output(now).is_none());
    let later = Now { mono: now.mono + LOOKUP_TIMEOUT, ..now };
    assert_eq!(text(&mut uplink, later), "no answer from the cloud within 20 s");
    uplink.lookup(later, path(), Value::Null);
    uplink.handle_disconnected(later);
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
        uplink.handle_connected(now, Capabilities::default(), None);
        uplink.lookup(now, "default/secret/pw".parse().expect("a path"), Value::Null);
        let query = std::iter::from_fn(|| uplink.poll_transmit(now, |_| None))
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
    assert_eq!(uplink.take_changes(now).len(), 1, "durable before anything else");
    uplink.handle_stored(now, true);
    uplink.handle_connected(now, Capabilities::default(), None);
    let sent: Vec<_> = std::iter::from_fn(|| uplink.poll_transmit(now, |_| None))
        .map(|message| format!("{} {}", message.route.operation, message.route.resource))
        .collect();
    assert_eq!(sent[..2], ["keepalive node", "insert null/node/edge1"]);
    assert!(sent[2].starts_with("insert default/event/edge1."), "{sent:?}");
}
