//! Our own nodes, over WebSocket and over QUIC: the same messages, and what only one of the two can do.

mod support;

use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use skerry_cloudcore::{Rate, revoke_node};
use skerry_protocol::capability::{self, Capabilities};
use skerry_protocol::digest::{self, Digest, Held};
use skerry_protocol::frame::{self, HelloReply};
use skerry_protocol::message::UPSTREAM_LEN_MAX;
use skerry_protocol::{Class, Message, Operation};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::own::{BEAT, Own, Quic, Raw, greet, hello, quic_connect, quic_endpoint};
use support::{Cluster, Identity, PATIENCE, server_name};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

fn ours() -> Capabilities {
    Capabilities::ours(BEAT)
}

async fn register(node: &mut Own, name: &str) {
    let object = json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": name,
        "labels": {"kubernetes.io/hostname": name, "node-role.kubernetes.io/edge": ""}},
        "status": {"capacity": {"cpu": "2", "memory": "1Gi", "pods": "110"}}});
    let answer = node.ask(Operation::Insert, &format!("null/node/{name}"), &object).await;
    let answer: Value = answer.content_as().expect("json");
    assert_eq!(answer["Err"], Value::Null);
}

/// Tells the hub that the node holds nothing, and reads until the answer.
async fn resume(node: &mut Own, digest: &Digest) -> Vec<Message> {
    let id = node.send(Operation::Query, digest::RESOURCE, digest).await;
    let mut pushed = Vec::new();
    loop {
        let message = node.next().await;
        if message.header.parent_msg_id == id {
            assert_eq!(message.content.get(), "\"OK\"");
            return pushed;
        }
        pushed.push(message);
    }
}

#[tokio::test]
async fn both_transports_deliver_acknowledge_and_resume() {
    let cluster = Cluster::start().await;
    for name in ["edge1", "edge2"] {
        cluster.create_config(&format!("page-{name}"), "one").await;
        cluster.create_pod(&format!("web-{name}"), name, &format!("page-{name}")).await;
    }
    for name in ["edge1", "edge2"] {
        let identity = cluster.enrolled(name).await;
        let mut node = match name {
            "edge1" => Own::websocket(&cluster, &identity, ours()).await,
            _ => Own::quic(&cluster, &identity, ours()).await,
        };
        register(&mut node, name).await;
        let mut held = Digest::default();
        let config = format!("default/configmap/page-{name}");
        // The hub may still be reading what there is when the node asks for the first time.
        while !held.objects.contains_key(&config) {
            for message in resume(&mut node, &held).await {
                let object: Value = message.content_as().expect("an object");
                let text = |key: &str| object["metadata"][key].as_str().expect(key).to_owned();
                let version = Held { uid: text("uid"), rv: text("resourceVersion") };
                held.objects.insert(message.route.resource.clone(), version);
            }
        }
        assert!(held.objects.contains_key(&format!("default/pod/web-{name}")), "{held:?}");
        // What the node holds is not pushed again.
        let again: Vec<_> = resume(&mut node, &held).await;
        assert!(again.iter().all(|message| message.route.resource.contains("/node/")), "{again:?}");

        let patch = json!({"data": {"key": "two"}});
        let patch = Patch::Merge(&patch);
        let configs = cluster.configs();
        configs
            .patch(&format!("page-{name}"), &PatchParams::default(), &patch)
            .await
            .expect("patched");
        let update = node.until("update", &config).await;
        let object: Value = update.content_as().expect("an object");
        assert_eq!(object["data"]["key"], "two");

        // Several requests in one compressed frame; an error has another class than an object and may come first.
        let query =
            |resource: &str| Message::new(0, "edged", "meta", Operation::Query, resource, &());
        let requests = [query(&config), query("default/configmap/none")];
        node.write_batch(&requests).await;
        let mut open: Vec<_> = requests.iter().map(|request| &request.header.msg_id).collect();
        while !open.is_empty() {
            let message = node.next().await;
            open.retain(|id| **id != message.header.parent_msg_id);
        }
        node.beat().await;
        let links = cluster.links_until(|links| {
            links
                .iter()
                .any(|link| link.node == name && link.in_flight == 0 && link.rtt_ms.is_some())
        });
        let links = links.await;
        let link = links.iter().find(|link| link.node == name).expect("the node's");
        assert_eq!(link.transport, if name == "edge1" { "websocket" } else { "quic" });
        assert_eq!(link.capabilities, ours().to_string());
        assert_eq!((link.window, link.backlog), (256, 0));
        assert!(link.bytes_in > 500 && link.bytes_out > 500, "{link:?}");
        assert!(link.certificate_not_after > jiff::Timestamp::now().as_second(), "{link:?}");
        drop(node);
        cluster.links_until(<[_]>::is_empty).await;
    }
    cluster.stop().await;
}

#[tokio::test]
async fn node_behind_a_nat_that_rebinds_keeps_its_connection() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let mut node = Own::quic(&cluster, &identity, ours()).await;
    register(&mut node, "edge1").await;
    resume(&mut node, &Digest::default()).await;
    let before = cluster.links_until(|links| links.len() == 1).await[0].clone();
    let Own::Quic(quic, _) = &mut node else { unreachable!() };
    let socket =
        std::net::UdpSocket::bind(std::net::SocketAddr::from(support::ANY)).expect("a socket");
    let moved_to = socket.local_addr().expect("bound");
    quic.endpoint.rebind(socket).expect("moved");
    node.beat().await;
    let after = cluster.links_until(|links| links.iter().any(|link| link.peer == moved_to)).await;
    assert_eq!((after.len(), after[0].since), (1, before.since), "the same link");
    assert_ne!(before.peer, moved_to);
    // Both directions go on.
    cluster.create_config("page", "one").await;
    cluster.create_pod("web", "edge1", "page").await;
    node.until("insert", "default/pod/web").await;
    let answer = node.ask(Operation::Query, "default/configmap/page", &()).await;
    assert_eq!(answer.route.operation, "response");
    cluster.stop().await;
}

/// Carries datagrams to the hub, and back when `answers`; counts the hub's packets of type Retry (RFC 9000, 17.2.5).
async fn relay(hub: SocketAddr, answers: bool) -> (SocketAddr, Arc<AtomicUsize>) {
    let near = UdpSocket::bind(SocketAddr::from(support::ANY)).await.expect("a socket");
    let far = UdpSocket::bind(SocketAddr::from(support::ANY)).await.expect("a socket");
    far.connect(hub).await.expect("the hub is there");
    let (address, retries) = (near.local_addr().expect("bound"), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&retries);
    tokio::spawn(async move {
        let mut client = None;
        let (mut up, mut down) = ([0; 2048], [0; 2048]);
        loop {
            tokio::select! {
                Ok((len, from)) = near.recv_from(&mut up) => {
                    client = Some(from);
                    let _ = far.send(&up[..len]).await;
                }
                Ok(len) = far.recv(&mut down) => {
                    if down[0] & 0xf0 == 0xf0 {
                        seen.fetch_add(1, Ordering::SeqCst);
                    }
                    if let (Some(client), true) = (client, answers) {
                        let _ = near.send_to(&down[..len], client).await;
                    }
                }
            }
        }
    });
    (address, retries)
}

#[tokio::test]
async fn while_many_handshakes_hang_a_node_proves_its_address_and_comes_in() {
    let cluster = Cluster::start().await;
    let hub = cluster.cloud.quic_addr().expect("QUIC is on");
    let identity = cluster.enrolled("edge1").await;
    // They hear nothing of the hub, so that their handshakes last as long as the hub lets them.
    let (deaf, _) = relay(hub, false).await;
    let stranger = quic_endpoint(&cluster, &identity).await;
    let _hanging: Vec<_> =
        (0..40).map(|_| stranger.connect(deaf, "127.0.0.1").expect("a good address")).collect();
    let (near, retries) = relay(hub, true).await;
    let came_in = async {
        loop {
            let endpoint = quic_endpoint(&cluster, &identity).await;
            let connection = quic_connect(&endpoint, near).await.expect("connected");
            if retries.load(Ordering::SeqCst) > 0 {
                return (endpoint, connection);
            }
            connection.close(0u32.into(), b"");
        }
    };
    let (_endpoint, connection) =
        tokio::time::timeout(PATIENCE, came_in).await.expect("asked for a proof");
    let (reply, _control) =
        greet(&connection, &hello("edge1", ours()).encode()).await.expect("answered");
    assert!(matches!(reply, HelloReply::Accepted { .. }), "{reply:?}");
    cluster.stop().await;
}

#[tokio::test]
async fn message_too_long_for_its_kind_is_refused_and_the_link_stays() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let mut node = Own::websocket(&cluster, &identity, ours()).await;
    register(&mut node, "edge1").await;
    let long = "x".repeat(600 * 1024);
    for (operation, resource) in
        [(Operation::Patch, "default/nodepatch/edge1"), (Operation::Insert, "default/event/e")]
    {
        let answer = node.ask(operation, resource, &long).await;
        assert_eq!(answer.route.operation, "error");
        assert!(answer.content.get().contains("over the bound of 524288 bytes"), "{answer:?}");
    }
    let answer = node.ask(Operation::Query, "null/node/edge1", &Value::Null).await;
    assert_eq!(answer.route.operation, "response");
    cluster.stop().await;
}

#[tokio::test]
async fn better_transport_takes_over_from_the_other_one() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let mut first = Own::websocket(&cluster, &identity, ours()).await;
    register(&mut first, "edge1").await;
    let mut second = Own::quic(&cluster, &identity, ours()).await;
    assert_eq!(first.closed().await, (1008, "the node opened a new connection".into()));
    resume(&mut second, &Digest::default()).await;
    let mut third = Own::websocket(&cluster, &identity, ours()).await;
    assert_eq!(second.closed().await, (1008, "the node opened a new connection".into()));
    resume(&mut third, &Digest::default()).await;
    let links = cluster.links_until(|links| links.len() == 1).await;
    assert_eq!(links[0].transport, "websocket");
    cluster.stop().await;
}

#[tokio::test]
async fn hub_that_stops_says_goodbye_on_both_transports() {
    let cluster = Cluster::start().await;
    let mut websocket = {
        let identity = cluster.enrolled("edge1").await;
        Own::websocket(&cluster, &identity, ours()).await
    };
    let mut quic = {
        let identity = cluster.enrolled("edge2").await;
        Own::quic(&cluster, &identity, ours()).await
    };
    cluster.links_until(|links| links.len() == 2).await;
    let goodbye = (1001, "cloudcore is stopping".to_owned());
    let stop = tokio::spawn(cluster.stop());
    assert_eq!(websocket.closed().await, goodbye);
    assert_eq!(quic.closed().await, goodbye);
    tokio::time::timeout(PATIENCE, stop).await.expect("in time").expect("stopped");
}

#[tokio::test]
async fn revoked_certificate_cuts_the_live_link() {
    let cluster = Cluster::start().await;
    let mut nodes = Vec::new();
    for name in ["edge1", "edge2", "edge3"] {
        let identity = cluster.enrolled(name).await;
        nodes.push(match name {
            "edge2" => Own::quic(&cluster, &identity, ours()).await,
            _ => Own::websocket(&cluster, &identity, ours()).await,
        });
    }
    cluster.links_until(|links| links.len() == 3).await;
    for name in ["edge1", "edge2"] {
        revoke_node(&cluster.admin, name).await.expect("revoked");
    }
    for (node, name) in nodes.iter_mut().zip(["edge1", "edge2"]) {
        let reason = format!("the certificate of node `{name}` was revoked");
        assert_eq!(node.closed().await, (1008, reason));
    }
    let links = cluster.links_until(|links| links.len() == 1).await;
    assert_eq!(links[0].node, "edge3");
    cluster.stop().await;
}

#[tokio::test]
async fn strangers_are_refused_with_words() {
    let cluster = Cluster::start().await;
    let address = cluster.cloud.quic_addr().expect("QUIC is on");
    let identity = cluster.enrolled("edge1").await;

    // Another node's name.
    let endpoint = quic_endpoint(&cluster, &identity).await;
    let connection = quic_connect(&endpoint, address).await.expect("a certificate of the CA");
    let (reply, _) = greet(&connection, &hello("edge2", ours()).encode()).await.expect("answered");
    let text = "the client certificate is for node `edge1`, not for node `edge2`";
    let refused = HelloReply::Refused { refused: text.into(), retry_after_ms: None };
    assert_eq!(reply, refused);
    let reason = tokio::time::timeout(PATIENCE, connection.closed()).await.expect("closed");
    assert!(reason.to_string().contains(text), "{reason}");

    // No certificate, or one of another CA: not even TLS.
    let nobody = Identity::new("edge1");
    let other = Cluster::start().await;
    let stranger = other.enrolled("edge1").await;
    for identity in [&nobody, &stranger] {
        let endpoint = quic_endpoint(&cluster, identity).await;
        let refused = match quic_connect(&endpoint, address).await {
            Err(_) => true,
            // TLS 1.3 tells the client of it after its side of the handshake is done.
            Ok(connection) => greet(&connection, &hello("edge1", ours()).encode()).await.is_err(),
        };
        assert!(refused);
        let refused = match identity.tls(cluster.ca().await, cluster.cloud.hub_addr()).await {
            Err(_) => true,
            Ok(mut stream) => stream.read_u8().await.is_err(),
        };
        assert!(refused);
    }
    assert!(cluster.cloud.links().await.is_empty());
    assert!(cluster.metric("skerry_rejected_connections_total{reason=\"identity\"}").await >= 1);
    assert!(cluster.metric("skerry_rejected_connections_total{reason=\"handshake\"}").await >= 4);
    other.stop().await;
    cluster.stop().await;
}

#[tokio::test]
async fn node_that_says_nothing_is_given_up_after_two_beats_and_one_that_beats_is_not() {
    let cluster = Cluster::start().await;
    let quick = Capabilities::ours(Duration::from_secs(1));
    let mut silent = Vec::new();
    let mut alive = Vec::new();
    for name in ["edge1", "edge2", "edge3", "edge4"] {
        let identity = cluster.enrolled(name).await;
        let node = match name {
            "edge1" | "edge2" => Own::websocket(&cluster, &identity, quick).await,
            _ => Own::quic(&cluster, &identity, quick).await,
        };
        if matches!(name, "edge1" | "edge3") { silent.push(node) } else { alive.push(node) }
    }
    let beats = async {
        loop {
            for node in &mut alive {
                node.beat().await;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    let given_up = async {
        assert_eq!(silent[0].closed().await, (1008, "no byte for 7 s".into()));
        assert_eq!(silent[1].closed().await, (1008, "no byte for 7 s".into()));
    };
    tokio::select! {
        () = beats => {}
        () = given_up => {}
    }
    let links = cluster.links_until(|links| links.len() == 2).await;
    assert_eq!([links[0].node.as_str(), links[1].node.as_str()], ["edge2", "edge4"]);
    assert_eq!(cluster.metric("skerry_cut_links_total{reason=\"silent\"}").await, 2);
    cluster.stop().await;
}

#[tokio::test]
async fn second_connection_of_a_node_resumes_its_tls_session() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let tls =
        tokio_rustls::TlsConnector::from(Arc::new(identity.client_config(cluster.ca().await)));
    let headers = [("node_id", "edge1"), ("ConnectionUse", "msg"), (capability::HEADER, "batch")];
    let mut kinds = Vec::new();
    for _ in 0..2 {
        let stream = TcpStream::connect(cluster.cloud.hub_addr()).await.expect("it listens");
        let stream = tls.connect(server_name(), stream).await.expect("TLS");
        // The ticket comes with the first bytes.
        let raw = Raw::open_on(stream, "/", &headers).await.expect("accepted");
        kinds.push(raw.stream.get_ref().1.handshake_kind().expect("done"));
    }
    assert_eq!(kinds, [rustls::HandshakeKind::Full, rustls::HandshakeKind::Resumed]);
    cluster.stop().await;
}

#[tokio::test]
async fn nodes_over_the_rate_are_told_when_to_come_back() {
    let cluster = Cluster::start_with_rate(Rate { per_s: 1, burst: 1 }).await;
    let identity = cluster.enrolled("edge1").await;
    let headers = [("node_id", "edge1"), ("ConnectionUse", "msg")];
    let mut first = Raw::open(&cluster, &identity, &headers).await.expect("the first comes in");
    let refused =
        Raw::open(&cluster, &identity, &headers).await.err().expect("the second has to wait");
    assert_eq!(refused.status, 503);
    let wait_ms: u64 = refused.headers["skerry-retry-after-ms"].parse().expect("a number");
    assert!((250..=3000).contains(&wait_ms), "{wait_ms}");
    assert_eq!(refused.headers["retry-after"], wait_ms.div_ceil(1000).to_string());
    assert!(refused.body.contains("too many nodes connect at once"), "{}", refused.body);

    let endpoint = quic_endpoint(&cluster, &identity).await;
    let address = cluster.cloud.quic_addr().expect("QUIC is on");
    let connection = quic_connect(&endpoint, address).await.expect("TLS is fine");
    match greet(&connection, &hello("edge1", ours()).encode()).await.expect("answered").0 {
        HelloReply::Refused { retry_after_ms: Some(wait_ms), .. } => {
            assert!((250..=5000).contains(&wait_ms), "{wait_ms}");
        }
        other => panic!("{other:?}"),
    }
    // The refused ones have not touched the link that is there, and later there is room again.
    first.write(skerry_protocol::websocket::Opcode::Ping, b"x").await.expect("up");
    assert!(
        matches!(first.read().await, Some(skerry_protocol::websocket::Message::Pong(x)) if &x[..] == b"x")
    );
    tokio::time::timeout(PATIENCE, async {
        while Raw::open(&cluster, &identity, &headers).await.is_err() {
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        }
    })
    .await
    .expect("let in when told");
    assert!(cluster.metric("skerry_rejected_connections_total{reason=\"admission\"}").await >= 2);
    cluster.stop().await;
}

#[tokio::test]
async fn broken_quic_peers_are_cut_off_and_told_why() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let open = || Quic::open(&cluster, &identity, ours());

    let mut long = open().await;
    let header = frame::encode_header(frame::Kind::Message, UPSTREAM_LEN_MAX + 1);
    long.write_bytes(Class::Pod, &header).await.expect("sent");
    let (code, reason) = long.closed().await;
    assert_eq!((code, reason.as_str()), (1009, "a message is over the bound of 3211264 bytes"));

    let mut unknown = open().await;
    unknown.write_bytes(Class::Pod, &[0, 0, 0, 1, 9, 9]).await.expect("sent");
    let (code, reason) = unknown.closed().await;
    assert_eq!(
        (code, reason.as_str()),
        (1002, "the node breaks the framing: stream frame has the unknown kind 9")
    );

    let classless = open().await;
    let mut stream = classless.connection.open_uni().await.expect("a stream");
    stream.write_all(&[77]).await.expect("sent");
    let (code, reason) = classless.closed().await;
    assert_eq!(
        (code, reason.as_str()),
        (1002, "the node breaks the framing: there is no priority class 77")
    );

    let twice = open().await;
    for _ in 0..2 {
        let mut stream = twice.connection.open_uni().await.expect("a stream");
        stream.write_all(&[1, 0]).await.expect("sent");
        std::mem::forget(stream);
    }
    assert_eq!(twice.closed().await.0, 1002);

    let cut = open().await;
    let mut stream = cut.connection.open_uni().await.expect("a stream");
    stream.write_all(&[1, 0, 0, 0, 9, 0, b'{']).await.expect("sent");
    stream.finish().expect("open");
    assert_eq!(cut.closed().await.0, 1002);

    // A hello that is none.
    let endpoint = quic_endpoint(&cluster, &identity).await;
    let address = cluster.cloud.quic_addr().expect("QUIC is on");
    for bad in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0, 0, 0, 2, 2, b'{', b'}'], &[0, 0, 0, 2, 0, b'{', b'}']]
    {
        let connection = quic_connect(&endpoint, address).await.expect("TLS is fine");
        assert!(greet(&connection, bad).await.is_err());
    }
    cluster.links_until(<[_]>::is_empty).await;
    cluster.stop().await;
}

#[tokio::test]
async fn half_written_requests_do_not_hold_the_listener() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let mut stream = identity.tls(cluster.ca().await, cluster.cloud.hub_addr()).await.expect("TLS");
    stream.write_all(b"GET / HTTP/1.1\r\nHost: h\r\nnode_id: ed").await.expect("sent");
    // Another one is served meanwhile, and the server's patience has an end.
    let node = Own::websocket(&cluster, &identity, ours()).await;
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "closed by the server");
    drop(node);
    cluster.stop().await;
}
