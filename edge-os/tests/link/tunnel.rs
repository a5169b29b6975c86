//! The stream tunnel against a cloud that is played from the protocol, byte for byte as a Go cloud has it.

use crate::Node;
use crate::cloud::Cloud;
use bytes::BytesMut;
use skerry_protocol as protocol;
use skerry_protocol::tunnel::{Connect, DEMAND, Frame, FrameKind};
use skerry_protocol::websocket::{self, Decoder, Message, Opcode, Role};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::server::TlsStream;

const PATIENCE: Duration = Duration::from_secs(30);

struct Tunnel {
    stream: TlsStream<TcpStream>,
    decoder: Decoder,
    bytes: BytesMut,
    request: String,
}

impl Tunnel {
    async fn accept(cloud: &Cloud, listener: &TcpListener) -> Self {
        let (tcp, _) = listener.accept().await.expect("a connection");
        let mut stream = cloud.hub_tls.accept(tcp).await.expect("TLS");
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(stream.read_u8().await.expect("the request goes on"));
        }
        let request = String::from_utf8(request).expect("a text");
        let headers = request.lines().filter_map(|line| line.split_once(": "));
        let accept = websocket::check_request("GET", headers).expect("a WebSocket");
        // The first frame comes with the answer: nothing behind an upgrade may get lost.
        let mut answer = BytesMut::from(
            format!("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n").as_str(),
        );
        websocket::encode(Role::Server, Opcode::Ping, b"early", [0; 4], &mut answer);
        stream.write_all(&answer).await.expect("the tunnel is up");
        let mut tunnel = Self {
            stream,
            decoder: Decoder::new(Role::Server, 2 << 20),
            bytes: BytesMut::new(),
            request,
        };
        loop {
            match tunnel.message().await {
                Message::Pong(bytes) => {
                    assert_eq!(&bytes[..], b"early");
                    return tunnel;
                }
                Message::Ping(bytes) => assert_eq!(&bytes[..], b"ping you"),
                other => panic!("{other:?}"),
            }
        }
    }

    async fn message(&mut self) -> Message {
        let next = async {
            loop {
                if let Some(message) = self.decoder.decode(&mut self.bytes).expect("frames") {
                    return message;
                }
                assert_ne!(self.stream.read_buf(&mut self.bytes).await.expect("readable"), 0);
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect("the node says something")
    }

    /// The next frame of the tunnel, which has to be Text: a Go cloud takes nothing else.
    async fn next(&mut self) -> Frame {
        loop {
            match self.message().await {
                Message::Text(bytes) => return Frame::decode(&bytes).expect("a frame"),
                Message::Ping(_) | Message::Pong(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn send(&mut self, opcode: Opcode, frame: &Frame) {
        let mut bytes = BytesMut::new();
        websocket::encode(Role::Server, opcode, &frame.encode(), [0; 4], &mut bytes);
        self.stream.write_all(&bytes).await.expect("the tunnel is up");
        self.stream.flush().await.expect("the tunnel is up");
    }

    async fn connect(&mut self, connection: u64, kind: FrameKind, path: &str) {
        let connect = serde_json::to_vec(&Connect::get(connection, path)).expect("JSON");
        self.send(Opcode::Text, &Frame::new(connection, kind, connect)).await;
    }
}

#[tokio::test]
async fn streams_that_cannot_be_served_end_with_words_and_nothing_holds_up_the_reader() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let node = Node::start_with(dir.path(), &cloud, &format!("tunnel: wss://127.0.0.1:{port}\n"));
    // A hub that cannot ask for a tunnel has it from the beginning.
    let _session = cloud.accept(None).await;
    let accept = Tunnel::accept(&cloud, &listener);
    let mut tunnel = tokio::time::timeout(PATIENCE, accept).await.expect("the node dials");
    for line in [
        "GET /v1/kubeedge/connect HTTP/1.1",
        "Sessionhostnameoverride: edge1",
        "Sessioninternalip: 192.0.2.2",
    ] {
        assert!(tunnel.request.contains(line), "{}", tunnel.request);
    }

    tunnel.connect(1, FrameKind::LogsConnect, "/containerLogs/default/nobody/c").await;
    let words = tunnel.next().await;
    assert_eq!((words.connection, words.kind), (1, FrameKind::Data));
    assert!(String::from_utf8_lossy(&words.data).contains("nobody"), "{words:?}");
    assert_eq!(tunnel.next().await, Frame::new(1, FrameKind::RemoveConnect, []));

    for (connection, kind, verb) in
        [(2, FrameKind::ExecConnect, "exec"), (300, FrameKind::AttachConnect, "attach")]
    {
        tunnel.connect(connection, kind, "/exec/default/web/c?command=sh").await;
        let answer = tunnel.next().await;
        assert_eq!((answer.connection, answer.kind), (connection, FrameKind::Data));
        let answer = String::from_utf8(answer.data).expect("a text");
        assert!(answer.starts_with("HTTP/1.1 501 Not Implemented\r\n"), "{answer}");
        assert!(
            answer.ends_with(&format!("\r\n\r\n{verb} is not supported on this node yet\n")),
            "{answer}"
        );
        assert_eq!(tunnel.next().await, Frame::new(connection, FrameKind::RemoveConnect, []));
    }

    // A Go cloud repeats this as fast as it can; what has ended is not answered again.
    for _ in 0..3000 {
        tunnel.send(Opcode::Text, &Frame::new(2, FrameKind::RemoveConnect, [])).await;
    }
    // Bytes that are no text, of a stream that is over; then no frame at all.
    tunnel.send(Opcode::Text, &Frame::new(2, FrameKind::Data, [0xff, 0xfe, 0x00])).await;
    tunnel.send(Opcode::Binary, &Frame::new(9, FrameKind::Data, [0xc3])).await;
    let mut junk = BytesMut::new();
    websocket::encode(Role::Server, Opcode::Text, b"\xff\xff", [0; 4], &mut junk);
    tunnel.stream.write_all(&junk).await.expect("the tunnel is up");

    tunnel.connect(5, FrameKind::MetricConnect, "/metrics").await;
    assert_eq!(
        tunnel.next().await,
        Frame::new(5, FrameKind::Data, *b"# metrics are not supported on this node yet\n")
    );
    assert_eq!(tunnel.next().await, Frame::new(5, FrameKind::RemoveConnect, []));
    node.stop().await;
}

#[tokio::test]
async fn our_hub_gets_the_tunnel_when_it_asks_and_again_when_it_has_lost_it() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let node = Node::start_with(dir.path(), &cloud, &format!("tunnel: wss://127.0.0.1:{port}\n"));
    let mut session = cloud.accept(Some("window,receipts,beat=60")).await;
    for _ in 0..2 {
        let demand = protocol::Message::new(
            0,
            "cloudstream",
            "stream",
            protocol::Operation::Get,
            DEMAND,
            &serde_json::Value::Null,
        );
        session.send(&demand).await;
        let accept = Tunnel::accept(&cloud, &listener);
        let mut tunnel = tokio::time::timeout(PATIENCE, accept).await.expect("the node dials");
        tunnel.connect(1, FrameKind::LogsConnect, "/containerLogs/default/nobody/c").await;
        assert_eq!(tunnel.next().await.kind, FrameKind::Data);
    }
    node.stop().await;
}
