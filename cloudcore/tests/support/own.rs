//! A node of our own, by hand: over a WebSocket whose frames are written byte by byte, or over QUIC.

// Each test file uses a part of it.
#![allow(dead_code, unreachable_pub)]

use super::{Cluster, Identity, PATIENCE, server_name};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use quinn::{Connection, Endpoint, RecvStream, SendStream, VarInt};
use skerry_protocol::capability::{self, Capabilities};
use skerry_protocol::delivery::ack_required;
use skerry_protocol::frame::{self, Hello, HelloReply};
use skerry_protocol::message::MESSAGE_LEN_MAX;
use skerry_protocol::websocket::{self, Close, Opcode, Role};
use skerry_protocol::{Class, Message, Operation, batch};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

/// A beat that no test waits for.
pub const BEAT: Duration = Duration::from_secs(60);

/// What a hub answered instead of opening a WebSocket.
#[derive(Debug)]
pub struct Refused {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

/// A WebSocket, frame by frame.
pub struct Raw {
    pub stream: TlsStream<TcpStream>,
    decoder: websocket::Decoder,
    input: BytesMut,
    pub headers: BTreeMap<String, String>,
}

impl Raw {
    /// Opens the hub's WebSocket with these headers beside those of the handshake.
    pub async fn open(
        cluster: &Cluster,
        identity: &Identity,
        headers: &[(&str, &str)],
    ) -> Result<Self, Refused> {
        let address = cluster.cloud.hub_addr();
        let stream = identity.tls(cluster.ca().await, address).await.expect("TLS");
        Self::open_on(stream, "/p/n/events", headers).await
    }

    pub async fn open_on(
        mut stream: TlsStream<TcpStream>,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<Self, Refused> {
        let key = websocket::client_key([7; 16]);
        let mut request = format!("GET {path} HTTP/1.1\r\nHost: hub\r\n");
        for (name, value) in websocket::request_headers(&key).iter().chain(headers) {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut input = BytesMut::new();
        let end = loop {
            if let Some(end) = input.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                break end + 4;
            }
            let read = tokio::time::timeout(PATIENCE, stream.read_buf(&mut input)).await;
            assert!(read.expect("in time").expect("readable") > 0, "closed: {input:?}");
        };
        let head = String::from_utf8(input.split_to(end).to_vec()).expect("a text");
        let mut lines = head.lines();
        let status = lines.next().expect("a status").split(' ').nth(1).expect("a number");
        let status: u16 = status.parse().expect("a number");
        let headers: BTreeMap<String, String> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let texts = headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        if websocket::check_response(status, &key, texts).is_err() {
            let mut body = input.to_vec();
            let _ = stream.read_to_end(&mut body).await;
            let body = String::from_utf8_lossy(&body).into_owned();
            return Err(Refused { status, headers, body });
        }
        let decoder = websocket::Decoder::new(Role::Client, MESSAGE_LEN_MAX);
        Ok(Self { stream, decoder, input, headers })
    }

    pub async fn write(&mut self, opcode: Opcode, payload: &[u8]) -> std::io::Result<()> {
        let mut out = BytesMut::new();
        websocket::encode(Role::Client, opcode, payload, [1, 2, 3, 4], &mut out);
        self.stream.write_all(&out).await?;
        self.stream.flush().await
    }

    /// The next message; `None` at the end of the connection.
    pub async fn read(&mut self) -> Option<websocket::Message> {
        let read = async {
            loop {
                if let Some(message) = self.decoder.decode(&mut self.input).expect("good frames") {
                    return Some(message);
                }
                match self.stream.read_buf(&mut self.input).await {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
            }
        };
        tokio::time::timeout(PATIENCE, read).await.expect("in time")
    }

    /// The close frame with which the hub ends the link.
    pub async fn closed(&mut self) -> (u16, String) {
        loop {
            match self.read().await {
                Some(websocket::Message::Close(Close { code, reason })) => {
                    let code = code.map_or(0, |code| code.0);
                    return (code, String::from_utf8(reason.to_vec()).expect("a text"));
                }
                Some(_) => {}
                None => panic!("no close frame"),
            }
        }
    }
}

/// A node of ours on the hub's QUIC listener.
pub struct Quic {
    pub endpoint: Endpoint,
    pub connection: Connection,
    control: (SendStream, RecvStream),
    outbound: BTreeMap<Class, SendStream>,
    inbound: Vec<(Class, RecvStream, BytesMut)>,
}

/// The client's end of QUIC, without a connection.
pub async fn quic_endpoint(cluster: &Cluster, identity: &Identity) -> Endpoint {
    quic_endpoint_for(identity, cluster.ca().await)
}

pub fn quic_endpoint_for(
    identity: &Identity,
    ca: rustls_pki_types::CertificateDer<'static>,
) -> Endpoint {
    let mut tls = identity.client_config(ca);
    tls.alpn_protocols = vec![frame::ALPN.to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).expect("TLS 1.3");
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    let mut transport = quinn::TransportConfig::default();
    transport.max_concurrent_uni_streams(VarInt::from_u32(6)).max_idle_timeout(None);
    config.transport_config(Arc::new(transport));
    let mut endpoint = Endpoint::client(super::ANY.into()).expect("a socket");
    endpoint.set_default_client_config(config);
    endpoint
}

pub async fn quic_connect(
    endpoint: &Endpoint,
    address: SocketAddr,
) -> Result<Connection, quinn::ConnectionError> {
    let name = match server_name() {
        rustls_pki_types::ServerName::IpAddress(_) => "127.0.0.1",
        _ => "localhost",
    };
    let connecting = endpoint.connect(address, name).expect("a good address");
    tokio::time::timeout(PATIENCE, connecting).await.expect("in time")
}

pub fn hello(node: &str, capabilities: Capabilities) -> Hello {
    Hello { node: node.into(), project: "p".into(), capabilities: capabilities.to_string() }
}

/// Says hello and returns the answer.
pub async fn greet(
    connection: &Connection,
    hello: &[u8],
) -> Result<(HelloReply, (SendStream, RecvStream)), quinn::ConnectionError> {
    let (mut sender, mut receiver) = connection.open_bi().await?;
    sender.write_all(hello).await.expect("sent");
    let decoder = frame::Decoder::new(frame::HELLO_LEN_MAX);
    let mut input = BytesMut::new();
    loop {
        if let Some(frame) = decoder.decode(&mut input).expect("a frame") {
            let reply = HelloReply::decode(&frame).expect("a reply");
            return Ok((reply, (sender, receiver)));
        }
        let chunk = tokio::time::timeout(PATIENCE, receiver.read_chunk(4096, true)).await;
        match chunk.expect("in time") {
            Ok(Some(chunk)) => input.extend_from_slice(&chunk.bytes),
            _ => return Err(connection.closed().await),
        }
    }
}

impl Quic {
    pub async fn open(cluster: &Cluster, identity: &Identity, capabilities: Capabilities) -> Self {
        let endpoint = quic_endpoint(cluster, identity).await;
        let address = cluster.cloud.quic_addr().expect("QUIC is on");
        let connection = quic_connect(&endpoint, address).await.expect("connected");
        let hello = hello(&identity.node, capabilities).encode();
        let (reply, control) = greet(&connection, &hello).await.expect("answered");
        match reply {
            HelloReply::Accepted { capabilities: theirs } => {
                let both = capabilities.and(Capabilities::parse(Some(&theirs)));
                assert_eq!(both, capabilities);
            }
            HelloReply::Refused { refused, .. } => panic!("refused: {refused}"),
        }
        Self { endpoint, connection, control, outbound: BTreeMap::new(), inbound: Vec::new() }
    }

    pub async fn write(&mut self, message: &Message) {
        self.write_frame(Class::of(message), frame::Kind::Message, message.encode().as_bytes())
            .await;
    }

    pub async fn write_frame(&mut self, class: Class, kind: frame::Kind, payload: &[u8]) {
        let mut out = BytesMut::new();
        frame::encode(kind, payload, &mut out);
        self.write_bytes(class, &out).await.expect("sent");
    }

    pub async fn write_bytes(
        &mut self,
        class: Class,
        bytes: &[u8],
    ) -> Result<(), quinn::WriteError> {
        if !self.outbound.contains_key(&class) {
            let mut stream = self.connection.open_uni().await.expect("a stream");
            stream.write_all(&[u8::from(class)]).await?;
            self.outbound.insert(class, stream);
        }
        self.outbound.get_mut(&class).expect("just made").write_all(bytes).await
    }

    /// The next messages of any stream, with their class.
    async fn read(&mut self) -> Result<(Class, frame::Kind, Bytes), quinn::ConnectionError> {
        loop {
            for (class, _, input) in &mut self.inbound {
                let decoder = frame::Decoder::new(MESSAGE_LEN_MAX);
                if let Some(frame) = decoder.decode(input).expect("a frame") {
                    return Ok((*class, frame.kind, frame.payload));
                }
            }
            let reads = self.inbound.iter_mut().map(|(_, stream, input)| {
                Box::pin(async move {
                    let chunk = stream.read_chunk(64 * 1024, true).await;
                    if let Ok(Some(chunk)) = chunk {
                        input.put_slice(&chunk.bytes);
                    }
                })
            });
            let reads: Vec<_> = reads.collect();
            let any = async {
                if reads.is_empty() {
                    std::future::pending::<()>().await;
                }
                futures::future::select_all(reads).await;
            };
            tokio::select! {
                stream = self.connection.accept_uni() => {
                    let mut stream = stream?;
                    let mut first = [0];
                    stream.read_exact(&mut first).await.expect("a class");
                    let class = Class::try_from(first[0]).expect("a class");
                    self.inbound.push((class, stream, BytesMut::new()));
                }
                () = any => {
                    if let Some(reason) = self.connection.close_reason() {
                        return Err(reason);
                    }
                }
            }
        }
    }

    /// What comes next, with the class of its stream.
    pub async fn next(&mut self, arrived: &mut VecDeque<(Class, Message)>) -> (Class, Message) {
        loop {
            if let Some(next) = arrived.pop_front() {
                return next;
            }
            let read = tokio::time::timeout(PATIENCE, self.read()).await.expect("in time");
            let (class, kind, payload) = read.expect("the link is up");
            match kind {
                frame::Kind::Message => {
                    arrived.push_back((class, Message::decode(&payload).expect("a message")));
                }
                frame::Kind::Batch => {
                    let several = batch::decode(&payload, MESSAGE_LEN_MAX).expect("a batch");
                    arrived.extend(several.into_iter().map(|message| (class, message)));
                }
                frame::Kind::Hello => panic!("a second hello"),
            }
        }
    }

    /// The code and the reason with which the hub closes the connection.
    pub async fn closed(&self) -> (u64, String) {
        let closed = tokio::time::timeout(PATIENCE, self.connection.closed()).await;
        match closed.expect("closed in time") {
            quinn::ConnectionError::ApplicationClosed(close) => {
                let reason = String::from_utf8(close.reason.to_vec()).expect("a text");
                (close.error_code.into_inner(), reason)
            }
            other => panic!("{other}"),
        }
    }
}

/// A node of ours on either transport.
pub enum Own {
    WebSocket(Box<Raw>, VecDeque<(Class, Message)>),
    Quic(Box<Quic>, VecDeque<(Class, Message)>),
}

impl Own {
    pub async fn websocket(cluster: &Cluster, identity: &Identity, ours: Capabilities) -> Self {
        let text = ours.to_string();
        let headers = [
            ("node_id", identity.node.as_str()),
            ("ConnectionUse", "msg"),
            (capability::HEADER, text.as_str()),
        ];
        let raw = Raw::open(cluster, identity, &headers).await.expect("accepted");
        Self::WebSocket(Box::new(raw), VecDeque::new())
    }

    pub async fn quic(cluster: &Cluster, identity: &Identity, ours: Capabilities) -> Self {
        Self::Quic(Box::new(Quic::open(cluster, identity, ours).await), VecDeque::new())
    }

    pub async fn write(&mut self, message: &Message) {
        match self {
            Self::WebSocket(raw, _) => {
                raw.write(Opcode::Text, message.encode().as_bytes()).await.expect("sent");
            }
            Self::Quic(quic, _) => quic.write(message).await,
        }
    }

    /// Sends several messages in one compressed frame.
    pub async fn write_batch(&mut self, messages: &[Message]) {
        let bytes = batch::encode(messages);
        match self {
            Self::WebSocket(raw, _) => raw.write(Opcode::Binary, &bytes).await.expect("sent"),
            Self::Quic(quic, _) => {
                quic.write_frame(Class::Bulk, frame::Kind::Batch, &bytes).await;
            }
        }
    }

    pub async fn send<T: serde::Serialize>(
        &mut self,
        operation: Operation,
        resource: &str,
        content: &T,
    ) -> String {
        let message = Message::new(0, "edged", "meta", operation, resource, content);
        self.write(&message).await;
        message.header.msg_id
    }

    pub async fn beat(&mut self) {
        match self {
            Self::WebSocket(raw, _) => raw.write(Opcode::Ping, b"").await.expect("sent"),
            Self::Quic(quic, _) => {
                quic.connection.send_datagram(Bytes::new()).expect("datagrams are on");
            }
        }
    }

    pub async fn next_unacknowledged(&mut self) -> Message {
        match self {
            Self::WebSocket(raw, arrived) => loop {
                if let Some((_, message)) = arrived.pop_front() {
                    return message;
                }
                match raw.read().await.expect("open") {
                    websocket::Message::Text(text) => {
                        return Message::decode(&text).expect("a message");
                    }
                    websocket::Message::Binary(bytes) => {
                        let several = batch::decode(&bytes, MESSAGE_LEN_MAX).expect("a batch");
                        arrived.extend(several.into_iter().map(|message| (Class::Bulk, message)));
                    }
                    websocket::Message::Close(close) => panic!("closed: {close:?}"),
                    _ => {}
                }
            },
            Self::Quic(quic, arrived) => {
                let (class, message) = quic.next(arrived).await;
                assert_eq!(class, Class::of(&message), "each class has its stream");
                message
            }
        }
    }

    /// The next message; pushes are acknowledged.
    pub async fn next(&mut self) -> Message {
        let message = self.next_unacknowledged().await;
        if ack_required(&message) {
            self.write(&message.ack(0)).await;
        }
        message
    }

    pub async fn until(&mut self, operation: &str, resource: &str) -> Message {
        loop {
            let message = self.next().await;
            if message.route.operation == operation && message.route.resource == resource {
                return message;
            }
        }
    }

    /// Sends a request and returns its answer, whatever comes between.
    pub async fn ask<T: serde::Serialize>(
        &mut self,
        operation: Operation,
        resource: &str,
        content: &T,
    ) -> Message {
        let id = self.send(operation, resource, content).await;
        loop {
            let message = self.next().await;
            if message.header.parent_msg_id == id {
                return message;
            }
        }
    }

    pub async fn closed(&mut self) -> (u64, String) {
        match self {
            Self::WebSocket(raw, _) => {
                let (code, reason) = raw.closed().await;
                (code.into(), reason)
            }
            Self::Quic(quic, _) => quic.closed().await,
        }
    }
}

/// Cuts `bytes` into pieces of a peer that writes badly.
pub fn pieces(mut bytes: &[u8], len: usize) -> Vec<Bytes> {
    let mut all = Vec::new();
    while bytes.has_remaining() {
        let piece = bytes.len().min(len);
        all.push(Bytes::copy_from_slice(&bytes[..piece]));
        bytes.advance(piece);
    }
    all
}
