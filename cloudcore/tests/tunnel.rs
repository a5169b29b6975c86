//! Log streams over the tunnel.

mod support;

use futures::{SinkExt, StreamExt};
use skerry_cloudcore::StreamError;
use skerry_protocol::tunnel::{Connect, Frame, FrameKind, NODE_HEADER, PATH};
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
            if let WsMessage::Binary(bytes) = socket.next().await.expect("open").expect("readable")
            {
                return Frame::decode(&bytes).expect("a frame");
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
