//! Log streams over the tunnel.

mod support;

use futures::{SinkExt, StreamExt};
use skerry_cloudcore::StreamError;
use skerry_protocol::capability::Capabilities;
use skerry_protocol::tunnel::{
    ADDRESS_HEADER, Connect, DATA_LEN_MAX, DEMAND, Frame, FrameKind, NODE_HEADER, PATH,
};
use skerry_protocol::websocket::{Message as Ws, Opcode};
use support::own::{BEAT, Own, Raw};
use support::{Cluster, Identity, PATIENCE};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error as WsError, Message as WsMessage};

type Socket = WebSocketStream<TlsStream<TcpStream>>;

async fn open(cluster: &Cluster, identity: &Identity, node: &str) -> Result<Socket, WsError> {
    let address = cluster.cloud.tunnel_addr();
    let stream = identity.tls(cluster.ca().await, address).await?;
    let mut request = format!("wss://{address}{PATH}").into_client_request().expect("a URL");
    request.headers_mut().insert(NODE_HEADER, node.parse().expect("a value"));
    Ok(tokio_tungstenite::client_async(request, stream).await?.0)
}

async fn frame(socket: &mut Socket) -> Frame {
    let read = async {
        loop {
            match socket.next().await.expect("open").expect("readable") {
                // As KubeEdge's cloud sends it, until the node has shown that it prefers Binary.
                WsMessage::Text(text) => return Frame::decode(text.as_bytes()).expect("a frame"),
                WsMessage::Binary(bytes) => return Frame::decode(&bytes).expect("a frame"),
                _ => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect("a frame in time")
}

async fn send(socket: &mut Socket, frame: Frame) {
    socket.send(WsMessage::binary(frame.encode())).await.expect("sent");
}

#[tokio::test]
async fn logs_come_through_the_tunnel_and_end() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let streams = cluster.cloud.streams();
    let path = "/containerLogs/default/web/c?follow=true";
    let offline = streams.open("edge1", path).await.err().expect("offline");
    assert_eq!(offline.to_string(), "node `edge1` is not connected");
    let mut socket = open(&cluster, &identity, "edge1").await.expect("a tunnel");
    while streams.nodes().is_empty() {
        tokio::task::yield_now().await;
    }
    let exec = streams.open("edge1", "/exec/default/web/c").await.err().expect("not yet");
    assert!(matches!(exec, StreamError::Unsupported { .. }));

    let mut stream = streams.open("edge1", path).await.expect("a stream");
    let connect = frame(&mut socket).await;
    assert_eq!((connect.connection, connect.kind), (1, FrameKind::LogsConnect));
    let request: Connect = serde_json::from_slice(&connect.data).expect("json");
    assert_eq!((request.connection, request.path_and_query().as_str()), (1, path));

    let mut other = streams.open("edge1", "/containerLogs/default/web/d").await.expect("a stream");
    assert_eq!(frame(&mut socket).await.connection, 2);
    send(&mut socket, Frame::new(2, FrameKind::Data, *b"two")).await;
    send(&mut socket, Frame::new(1, FrameKind::Data, *b"\xff\x00one")).await;
    send(&mut socket, Frame::new(9, FrameKind::Data, *b"nobody's")).await;
    send(&mut socket, Frame::new(1, FrameKind::RemoveConnect, [])).await;
    assert_eq!(stream.next().await.expect("data").expect("good")[..], *b"\xff\x00one");
    assert!(stream.next().await.is_none());
    assert_eq!(other.next().await.expect("data").expect("good")[..], *b"two");

    // A reader that goes away ends the stream on the node, once.
    drop(other);
    let removed = frame(&mut socket).await;
    assert_eq!((removed.connection, removed.kind), (2, FrameKind::RemoveConnect));

    // A tunnel that breaks is an error, not an end.
    let mut cut = streams.open("edge1", path).await.expect("a stream");
    drop(socket);
    assert!(cut.next().await.expect("told").is_err());
    cluster.stop().await;
}

#[tokio::test]
async fn node_of_ours_opens_its_tunnel_when_somebody_wants_a_stream() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let path = "/containerLogs/default/web/c";
    let streams = cluster.cloud.streams();
    // Nobody to ask.
    assert!(matches!(streams.open("edge1", path).await, Err(StreamError::NotConnected { .. })));
    let mut node = Own::websocket(&cluster, &identity, Capabilities::ours(BEAT)).await;
    let opening = tokio::spawn(async move { streams.open("edge1", path).await });
    let demand = node.until("get", DEMAND).await;
    assert!(!skerry_protocol::delivery::ack_required(&demand));
    let mut socket = open(&cluster, &identity, "edge1").await.expect("a tunnel");
    assert_eq!(frame(&mut socket).await.kind, FrameKind::LogsConnect);
    assert!(opening.await.expect("no panic").is_ok());
    cluster.stop().await;
}

#[tokio::test]
async fn tunnel_under_another_name_is_refused() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    match open(&cluster, &identity, "edge2").await.expect_err("refused") {
        WsError::Http(response) => assert_eq!(response.status(), 403),
        other => panic!("{other}"),
    }
    cluster.stop().await;
}

#[tokio::test]
async fn later_tunnel_takes_the_place_of_the_earlier_one() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let mut first = open(&cluster, &identity, "edge1").await.expect("a tunnel");
    let _second = open(&cluster, &identity, "edge1").await.expect("a tunnel");
    let closed = async { while let Some(Ok(_)) = first.next().await {} };
    tokio::time::timeout(PATIENCE, closed).await.expect("the first one is closed");
    assert_eq!(cluster.cloud.streams().nodes(), ["edge1"]);
    cluster.stop().await;
}

/// A KubeEdge edge: arbitrary bytes in Text messages, pings with a text, and every opcode taken.
#[tokio::test]
async fn logs_of_a_kubeedge_edge_come_as_the_bytes_that_they_are() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let address = cluster.cloud.tunnel_addr();
    let stream = identity.tls(cluster.ca().await, address).await.expect("TLS");
    let headers = [(NODE_HEADER, "edge1"), (ADDRESS_HEADER, "10.0.0.7")];
    let mut socket = Raw::open_on(stream, PATH, &headers).await.expect("accepted");
    let names: Vec<_> = socket.headers.keys().map(String::as_str).collect();
    assert_eq!(names, ["connection", "sec-websocket-accept", "upgrade"], "as gorilla answers");
    socket.write(Opcode::Ping, b"ping you").await.expect("sent");
    assert!(matches!(socket.read().await, Some(Ws::Pong(text)) if text[..] == *b"ping you"));

    let streams = cluster.cloud.streams();
    let mut stream = streams.open("edge1", "/containerLogs/default/web/c").await.expect("a stream");
    match socket.read().await.expect("open") {
        Ws::Text(bytes) => {
            let connect = Frame::decode(&bytes).expect("a frame");
            assert_eq!((connect.connection, connect.kind), (1, FrameKind::LogsConnect));
        }
        other => panic!("a Go edge is sent Text: {other:?}"),
    }
    let bytes: Vec<u8> = (0..=255).collect();
    for part in [&bytes[..100], &bytes[100..]] {
        let frame = Frame::new(1, FrameKind::Data, part).encode();
        socket.write(Opcode::Text, &frame).await.expect("sent");
    }
    // What is no frame, or of nobody, ends nothing.
    socket.write(Opcode::Text, b"").await.expect("sent");
    socket.write(Opcode::Text, &[0xff; 12]).await.expect("sent");
    socket.write(Opcode::Text, &[1, 99]).await.expect("sent");
    let end = Frame::new(1, FrameKind::RemoveConnect, []).encode();
    socket.write(Opcode::Text, &end).await.expect("sent");
    let mut read = Vec::new();
    while let Some(part) = stream.next().await {
        read.extend_from_slice(&part.expect("good"));
    }
    assert_eq!(read, bytes);

    // A frame over KubeEdge's bound ends the tunnel, and with it what runs there.
    let mut cut = streams.open("edge1", "/containerLogs/default/web/c").await.expect("a stream");
    let long = vec![b'x'; DATA_LEN_MAX + 100];
    let _ = socket.write(Opcode::Text, &long).await;
    assert!(cut.next().await.expect("told").is_err());
    cluster.stop().await;
}

#[tokio::test]
async fn tunnel_needs_its_header_and_a_certificate_that_counts() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let address = cluster.cloud.tunnel_addr();
    let dial = async |path, headers: &[(&str, &str)]| {
        let stream = identity.tls(cluster.ca().await, address).await.expect("TLS");
        Raw::open_on(stream, path, headers).await
    };
    let refused = dial(PATH, &[]).await.err().expect("no header");
    assert_eq!(
        (refused.status, refused.body.as_str()),
        (400, "header `SessionHostNameOverride` is missing")
    );
    let refused = dial("/", &[(NODE_HEADER, "edge1")]).await.err().expect("another path");
    assert_eq!(refused.status, 404);
    let mut socket = dial(PATH, &[(NODE_HEADER, "edge1")]).await.expect("accepted");
    skerry_cloudcore::revoke_node(&cluster.admin, "edge1").await.expect("revoked");
    assert_eq!(
        socket.closed().await,
        (1000, "the certificate of the node does not count any more".into())
    );
    let refused = dial(PATH, &[(NODE_HEADER, "edge1")]).await.err().expect("revoked");
    assert_eq!(refused.status, 403);
    assert!(refused.body.contains("was revoked"), "{}", refused.body);
    cluster.stop().await;
}
