//! What a broken or hostile node can do to the hub: little, and nothing to others.
//!
//! Bounds are asserted on counters and on the answers of the hub, never on time.

mod support;

use bytes::BytesMut;
use serde_json::{Value, json};
use skerry_protocol::capability::{self, Capabilities};
use skerry_protocol::delivery::STOCK_WINDOW;
use skerry_protocol::message::UPSTREAM_LEN_MAX;
use skerry_protocol::websocket::{self, Opcode, Role};
use skerry_protocol::{Message, Operation, batch, digest};
use std::collections::BTreeSet;
use support::own::{BEAT, Own, Raw, pieces};
use support::{Cluster, PATIENCE};
use tokio::io::AsyncWriteExt;

const STOCK: [(&str, &str); 1] = [("ConnectionUse", "msg")];
const OURS: &str = "digest,window,batch,lease,receipts,renew,qualify,history,beat=60";

async fn raw(cluster: &Cluster, node: &str, capabilities: Option<&str>) -> Raw {
    let identity = cluster.enrolled(node).await;
    let mut headers = STOCK.to_vec();
    headers.push(("node_id", node));
    headers.extend(capabilities.map(|text| (capability::HEADER, text)));
    Raw::open(cluster, &identity, &headers).await.expect("accepted")
}

fn message(operation: Operation, resource: &str, content: &Value) -> Message {
    Message::new(0, "edged", "meta", operation, resource, content)
}

/// Whether the hub still answers on this connection.
async fn is_served(raw: &mut Raw, node: &str) -> bool {
    let query = message(Operation::Query, &format!("null/node/{node}"), &Value::Null);
    if raw.write(Opcode::Text, query.encode().as_bytes()).await.is_err() {
        return false;
    }
    loop {
        match raw.read().await {
            Some(websocket::Message::Text(text)) => {
                let answer = Message::decode(&text).expect("a message");
                if answer.header.parent_msg_id == query.header.msg_id {
                    return true;
                }
            }
            Some(websocket::Message::Close(_)) | None => return false,
            Some(_) => {}
        }
    }
}

#[tokio::test]
async fn kubeedge_edge_gets_a_window_and_may_acknowledge_in_any_order() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    link.register().await;
    let count = 2 * STOCK_WINDOW + 3;
    for index in 0..count {
        cluster.create_config(&format!("page-{index}"), "one").await;
        cluster.create_pod(&format!("web-{index}"), "edge1", &format!("page-{index}")).await;
    }
    // As many come as may be unacknowledged, and no more.
    let mut unacknowledged = Vec::new();
    while unacknowledged.len() < STOCK_WINDOW {
        unacknowledged.push(link.next_unacknowledged().await);
    }
    let ids: BTreeSet<_> =
        unacknowledged.iter().map(|message| message.header.msg_id.clone()).collect();
    assert_eq!(ids.len(), STOCK_WINDOW, "each once");
    let links = cluster.links_until(|links| links[0].in_flight as usize == STOCK_WINDOW).await;
    assert_eq!(links[0].window as usize, STOCK_WINDOW);

    // The last one first, an old one twice, one that never was.
    let mut keys = BTreeSet::new();
    let stray = message(Operation::Query, "a/b/c", &Value::Null);
    while let Some(pushed) = unacknowledged.pop() {
        link.write(&pushed.ack(0)).await;
        link.write(&pushed.ack(0)).await;
        link.write(&stray.ack(0)).await;
        keys.insert(pushed.route.resource);
    }
    while keys.len() < 2 * count {
        keys.insert(link.next().await.route.resource);
    }
    cluster.links_until(|links| links[0].in_flight == 0 && links[0].backlog == 0).await;
    cluster.stop().await;
}

#[tokio::test]
async fn messages_that_make_no_sense_are_answered_or_ignored_and_the_link_stays() {
    let cluster = Cluster::start().await;
    for (name, capabilities) in [("edge1", None), ("edge2", Some(OURS))] {
        let mut node = raw(&cluster, name, capabilities).await;
        let other = json!({"metadata": {"name": "other"}});
        let senseless = [
            message(Operation::Insert, "null/node/other", &other),
            message(Operation::Patch, "null/nodepatch/other", &json!("{}")),
            message(Operation::Patch, "null/nodepatch/other", &json!(17)),
            message(Operation::Delete, "default/pod/none", &json!([1, 2])),
            message(Operation::Query, "default/secret/none", &json!({"a": {}})),
            message(Operation::Query, "no/such/thing/at/all", &Value::Null),
            message(Operation::Update, "", &Value::Null),
            message(Operation::Query, "skerry/certificate/other", &json!({"csr": "AAAA"})),
            message(Operation::Query, "skerry/certificate", &Value::Null),
            message(Operation::Query, "skerry/bundle/other", &json!(false)),
            message(Operation::Query, digest::RESOURCE, &json!("no digest")),
            message(Operation::Response, "default/pod/none", &json!("OK")),
            message(Operation::Error, "default/pod/none", &json!("it went wrong")),
        ];
        for senseless in senseless {
            node.write(Opcode::Text, senseless.encode().as_bytes()).await.expect("sent");
            let mut odd = senseless.clone();
            odd.route.operation = "dance".into();
            odd.header.parent_msg_id = "nobody's".into();
            node.write(Opcode::Binary, odd.encode().as_bytes()).await.expect("sent");
        }
        let wrong_types = [
            r#"{"header":{"msg_id":7},"route":{},"content":1}"#,
            r#"{"header":{"msg_id":"a","timestamp":"now"},"route":{},"content":1}"#,
            r#"{"header":{},"route":{"operation":["insert"]}}"#,
            r#"{"header":{"timestamp":1e400},"route":{}}"#,
            r#""insert""#,
            "\u{feff}{}",
        ];
        for text in wrong_types {
            node.write(Opcode::Text, text.as_bytes()).await.expect("sent");
        }
        node.write(Opcode::Text, b"\xff\xfe\x00").await.expect("sent");
        node.write(Opcode::Ping, b"still here").await.expect("sent");
        assert!(is_served(&mut node, name).await, "{name}");
        let nodes = cluster.nodes();
        assert!(nodes.get_opt("other").await.expect("readable").is_none());
    }
    assert!(cluster.metric("skerry_unreadable_messages_total").await >= 12);
    assert_eq!(cluster.metric("skerry_cut_links_total{reason=\"junk\"}").await, 0);
    cluster.stop().await;
}

#[tokio::test]
async fn junk_at_full_speed_is_cut_off_soon_and_others_do_not_notice() {
    let cluster = Cluster::start().await;
    let mut bystander = cluster.enrolled("edge9").await.connect(&cluster).await;
    bystander.register().await;
    let junk = vec![b'['; 1024 * 1024];
    for (name, opcode) in [("edge1", Opcode::Text), ("edge2", Opcode::Binary)] {
        let mut node = raw(&cluster, name, Some(OURS)).await;
        let mut written = 0;
        while written < 64 && node.write(opcode, &junk).await.is_ok() {
            written += 1;
            if cluster.metric("skerry_cut_links_total{reason=\"junk\"}").await > 0
                && name == "edge1"
            {
                break;
            }
        }
        let (code, reason) = node.closed().await;
        assert_eq!(code, 1008);
        assert!(reason.starts_with("too much of what the node sends is no message: "), "{reason}");
    }
    // A megabyte at a time is too much after a few; what was read beyond that was thrown away.
    let read = cluster.metric("skerry_bytes_total{direction=\"up\"}").await;
    assert!(read < 16 * 1024 * 1024, "{read} bytes were taken");
    assert_eq!(cluster.metric("skerry_cut_links_total{reason=\"junk\"}").await, 2);
    // Small junk as well.
    let mut node = raw(&cluster, "edge3", None).await;
    for _ in 0..200 {
        if node.write(Opcode::Text, b"no").await.is_err() {
            break;
        }
    }
    assert_eq!(node.closed().await.0, 1008);
    cluster.create_config("page", "one").await;
    cluster.create_pod("web", "edge9", "page").await;
    bystander.until("insert", "default/pod/web").await;
    cluster.stop().await;
}

#[tokio::test]
async fn mangled_frames_end_their_own_connection_at_most() {
    let cluster = Cluster::start().await;
    let mut identities = Vec::new();
    for name in ["edge1", "edge2", "edge3", "edge4"] {
        identities.push(cluster.enrolled(name).await);
    }
    let mut good = BytesMut::new();
    let keepalive = message(Operation::Keepalive, "node", &json!("ping"));
    let query = message(Operation::Query, "null/node/edge1", &Value::Null);
    let several = batch::encode(&[keepalive.clone(), query.clone()]);
    let text = keepalive.encode();
    for (opcode, payload) in
        [(Opcode::Text, text.as_bytes()), (Opcode::Binary, &several), (Opcode::Ping, b"x")]
    {
        websocket::encode(Role::Client, opcode, payload, [9, 8, 7, 6], &mut good);
    }
    let mut seed: u64 = 0x5eed;
    let mut random = |bound: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % bound
    };
    for round in 0..60 {
        let identity = &identities[round % identities.len()];
        let node = identity.node.as_str();
        let headers = [("node_id", node), ("ConnectionUse", "msg"), (capability::HEADER, OURS)];
        let mut raw = Raw::open(&cluster, identity, &headers).await.expect("accepted");
        let mut bytes = good.to_vec();
        for _ in 0..1 + round % 4 {
            let at = random(bytes.len());
            bytes[at] ^= 1 << random(8);
        }
        bytes.truncate(bytes.len() - random(bytes.len()));
        // In odd pieces, and cut off at the end.
        for piece in pieces(&bytes, 1 + random(50)) {
            if raw.stream.write_all(&piece).await.is_err() {
                break;
            }
        }
        let _ = raw.stream.shutdown().await;
    }
    // The node is served as before, and nothing of the others is left.
    let mut node = Own::websocket(&cluster, &identities[0], Capabilities::ours(BEAT)).await;
    cluster.links_until(|links| links.len() == 1).await;
    let answer = node.ask(Operation::Query, "null/node/edge1", &Value::Null).await;
    assert_eq!(answer.header.parent_msg_id.len(), 36);
    cluster.stop().await;
}

#[tokio::test]
async fn fragments_for_ever_and_bombs_are_refused() {
    let cluster = Cluster::start().await;
    // Fragments whose sum is over the bound; each alone is small.
    let mut node = raw(&cluster, "edge1", None).await;
    let fragment = vec![b' '; 64 * 1024];
    let mut sent = 0;
    let mut first = true;
    while sent <= UPSTREAM_LEN_MAX + fragment.len() {
        let mut frame = BytesMut::new();
        websocket::encode(Role::Client, Opcode::Text, &fragment, [0; 4], &mut frame);
        frame[0] = if first { 0x01 } else { 0x00 };
        first = false;
        if node.stream.write_all(&frame).await.is_err() {
            break;
        }
        sent += fragment.len();
    }
    let _ = node.stream.flush().await;
    let reason = format!("a message is over the bound of {UPSTREAM_LEN_MAX} bytes");
    assert_eq!(node.closed().await, (1009, reason));

    // 5 MiB of spaces in a few kilobytes.
    let mut node = raw(&cluster, "edge2", Some(OURS)).await;
    let padded = message(Operation::Keepalive, "node", &json!(" ".repeat(5 * 1024 * 1024)));
    let bomb = batch::encode(&[padded]);
    assert!(bomb.len() < 64 * 1024, "{}", bomb.len());
    node.write(Opcode::Binary, &bomb).await.expect("sent");
    assert!(is_served(&mut node, "edge2").await, "one is junk, no more");
    for _ in 0..100 {
        if node.write(Opcode::Binary, &bomb).await.is_err() {
            break;
        }
    }
    let (code, reason) = node.closed().await;
    assert_eq!(code, 1008, "{reason}");

    // A frame that a server must not take, and one that says it is endless.
    for header in [
        &[0x81, 0x01, b'x'][..],
        &[0x81, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
    ] {
        let mut node = raw(&cluster, "edge3", None).await;
        node.stream.write_all(header).await.expect("sent");
        node.stream.flush().await.expect("sent");
        assert!([1002, 1009].contains(&node.closed().await.0));
    }
    cluster.stop().await;
}

#[tokio::test]
async fn node_that_asks_and_never_reads_is_bounded_and_then_cut() {
    let cluster = Cluster::start().await;
    // Answers of a hundred kilobytes, so that the socket is full soon.
    cluster.create_config("page", &"x".repeat(100_000)).await;
    cluster.create_pod("web", "edge1", "page").await;
    let mut node = raw(&cluster, "edge1", Some(OURS)).await;
    let query = message(Operation::Query, "default/configmap/page", &Value::Null);
    let writing = async {
        // Until the hub does not read any more, or has cut the connection.
        loop {
            let mut query = query.clone();
            query.header.msg_id = next_number().to_string();
            if node.write(Opcode::Text, query.encode().as_bytes()).await.is_err() {
                return;
            }
        }
    };
    let watching = async {
        let mut most = (0, 0);
        loop {
            let links = cluster.cloud.links().await;
            let Some(link) = links.first() else { return most };
            most.0 = most.0.max(link.requests);
            most.1 = most.1.max(link.backlog_bytes);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let both = async {
        tokio::select! {
            most = watching => most,
            () = async { writing.await; std::future::pending::<()>().await } => unreachable!(),
        }
    };
    let (requests, backlog_bytes) =
        tokio::time::timeout(2 * PATIENCE, both).await.expect("cut in time");
    assert!(requests <= 257, "{requests} requests were held");
    assert!(backlog_bytes < 3 * 1024 * 1024, "{backlog_bytes} bytes waited");
    assert_eq!(cluster.metric("skerry_cut_links_total{reason=\"slow\"}").await, 1);
    assert!(cluster.metric("skerry_slowed_total").await >= 1);
    cluster.stop().await;
}

/// A number that no message had before.
fn next_number() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[tokio::test]
async fn node_over_its_quota_is_read_more_slowly_and_stays() {
    let cluster = Cluster::start().await;
    let mut node = raw(&cluster, "edge1", None).await;
    // 500 keepalives at once, where a KubeEdge edge may have a burst of 200 and then 60 a second.
    let keepalive = message(Operation::Keepalive, "node", &json!("ping")).encode();
    for _ in 0..500 {
        node.write(Opcode::Text, keepalive.as_bytes()).await.expect("sent");
    }
    let slowed = async {
        while cluster.metric("skerry_slowed_total").await == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, slowed).await.expect("slowed");
    let links = cluster.cloud.links().await;
    assert!(links[0].messages_in < 400, "{} messages were taken at once", links[0].messages_in);
    // All of it comes through in the end.
    cluster.links_until(|links| links[0].messages_in >= 500).await;
    assert!(is_served(&mut node, "edge1").await);
    cluster.stop().await;
}

#[tokio::test]
async fn node_that_dials_all_the_time_is_put_off_and_others_come_in() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let other = cluster.enrolled("edge2").await;
    let headers = [("node_id", "edge1"), ("ConnectionUse", "msg")];
    let mut accepted = 0;
    let refused = loop {
        match Raw::open(&cluster, &identity, &headers).await {
            Ok(_) => accepted += 1,
            Err(refused) => break refused,
        }
        assert!(accepted < 100, "{accepted} connections were accepted");
    };
    assert!(accepted >= 20, "{accepted}");
    assert_eq!((refused.status, refused.headers["retry-after"].as_str()), (503, "1"));
    assert!(refused.body.starts_with("node `edge1` connects again and again"), "{}", refused.body);
    let mut other = Own::websocket(&cluster, &other, Capabilities::ours(BEAT)).await;
    other.ask(Operation::Query, "null/node/edge2", &Value::Null).await;
    cluster.stop().await;
}

#[tokio::test]
async fn monitor_shows_links_and_counters() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    link.register().await;
    let (status, body) = cluster.monitor("/links").await;
    let links: Value = serde_json::from_str(&body).expect("json");
    assert_eq!((status, links.as_array().map(Vec::len)), (200, Some(1)));
    let link = &links[0];
    assert_eq!((&link["node"], &link["transport"]), (&json!("edge1"), &json!("websocket")));
    assert_eq!((&link["capabilities"], &link["window"]), (&json!(""), &json!(STOCK_WINDOW)));
    for key in ["since", "bytes_in", "bytes_out", "last_byte_ms_ago", "certificate_not_after"] {
        assert!(link[key].is_u64(), "{key} in {link}");
    }
    assert_eq!(cluster.metric("skerry_connected_nodes{transport=\"websocket\"}").await, 1);
    assert_eq!(cluster.metric("skerry_connected_nodes{transport=\"quic\"}").await, 0);
    assert!(cluster.metric("skerry_messages_total{direction=\"up\"}").await >= 2);
    assert_eq!(cluster.monitor("/").await.0, 404);
    cluster.stop().await;
}
