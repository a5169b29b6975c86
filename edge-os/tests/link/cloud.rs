//! CloudCore's part, played from the protocol: an enrolment listener and a hub with TLS and QUIC, on ports of their own.
//!
//! Each test speaks the hub's lines itself; this only carries them. WebSocket is a library's, so that our own codec
//! meets another one.

use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;
use skerry_protocol::enrol::{Claims, JoinToken};
use skerry_protocol::frame::{self, Hello, HelloReply, Kind};
use skerry_protocol::message::MESSAGE_LEN_MAX;
use skerry_protocol::{Class, Message, Operation, batch};
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message as Frame;
use tokio_tungstenite::tungstenite::handshake::server::{Request as Opening, Response as Accepted};

/// Longest wait for a state; a test that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Cloud {
    ca: Arc<CertifiedIssuer<'static, KeyPair>>,
    pub(crate) hub: TcpListener,
    pub(crate) hub_tls: TlsAcceptor,
    quic: quinn::Endpoint,
    pub(crate) enrol_port: u16,
    /// Requests for certificates so far: bearer token and node name.
    pub(crate) requests: Arc<Mutex<Vec<(String, String)>>>,
}

impl Cloud {
    /// `refusal` is what the enrolment listener says to everybody, if it is to refuse.
    pub(crate) async fn start(refusal: Option<&'static str>) -> Self {
        skerry_edge::tls::install_provider();
        let ca = Arc::new(authority());
        let enrol = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let enrol_port = enrol.local_addr().expect("bound").port();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let tls = TlsAcceptor::from(Arc::new(server_config(&ca, false)));
        tokio::spawn(serve_enrolment(enrol, tls, ca.clone(), requests.clone(), refusal));
        let hub = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let hub_tls = TlsAcceptor::from(Arc::new(server_config(&ca, true)));
        let mut tls = server_config(&ca, true);
        tls.alpn_protocols = vec![frame::ALPN.to_vec()];
        let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls).expect("TLS 1.3");
        let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        let any = "127.0.0.1:0".parse().expect("an address");
        let quic = quinn::Endpoint::server(config, any).expect("a port");
        Self { ca, hub, hub_tls, quic, enrol_port, requests }
    }

    pub(crate) fn quic_address(&self) -> SocketAddr {
        self.quic.local_addr().expect("bound")
    }

    /// Waits for the node to dial over QUIC, and answers its hello.
    pub(crate) async fn accept_quic(&self, reply: &HelloReply) -> (Hello, Session) {
        self.accept_quic_after(reply, || {}).await
    }

    /// As [`Self::accept_quic`]; `before` is called when the hello was read and is not answered yet.
    pub(crate) async fn accept_quic_after(
        &self,
        reply: &HelloReply,
        mut before: impl FnMut(),
    ) -> (Hello, Session) {
        let accept = async {
            loop {
                let incoming = self.quic.accept().await.expect("the endpoint is open");
                let Ok(connection) = incoming.await else { continue };
                let Ok((mut send, mut receive)) = connection.accept_bi().await else { continue };
                let mut bytes = BytesMut::new();
                let decoder = frame::Decoder::new(frame::HELLO_LEN_MAX);
                let hello = loop {
                    if let Some(frame) = decoder.decode(&mut bytes).expect("a frame") {
                        break Hello::decode(&frame).expect("a hello");
                    }
                    let chunk = receive.read_chunk(4096, true).await.expect("readable");
                    bytes.extend_from_slice(&chunk.expect("more").bytes);
                };
                before();
                tokio::time::sleep(Duration::from_millis(50)).await; // so that what it does is seen first
                send.write_all(&reply.encode()).await.expect("the link is up");
                let (heard, messages) = mpsc::channel(256);
                tokio::spawn(read_streams(connection.clone(), heard));
                let wire = Quic {
                    connection,
                    _control: (send, receive),
                    streams: HashMap::new(),
                    messages,
                };
                let session = Session {
                    wire: Wire::Quic(wire),
                    path: String::new(),
                    headers: HeaderMap::new(),
                    seen: Vec::new(),
                    classes: Vec::new(),
                    waiting: VecDeque::new(),
                };
                return (hello, session);
            }
        };
        tokio::time::timeout(PATIENCE, accept).await.expect("the node dials over QUIC")
    }

    pub(crate) fn hub_port(&self) -> u16 {
        self.hub.local_addr().expect("bound").port()
    }

    /// The CA certificate, DER.
    pub(crate) fn ca_der(&self) -> &[u8] {
        self.ca.der()
    }

    /// A join token for this cloud's CA; nobody here checks its signature.
    pub(crate) fn token(&self) -> String {
        let claims = Claims { exp: i64::MAX, node: Some("edge1".into()), jti: None };
        JoinToken::new(self.ca.der(), claims.sign(|_| [0; 32])).to_string()
    }

    /// Waits for the node to dial; `capabilities` is what the hub announces.
    pub(crate) async fn accept(&self, capabilities: Option<&'static str>) -> Session {
        let accept = async {
            loop {
                let (tcp, _) = self.hub.accept().await.expect("a connection");
                // A connection that was in the backlog when the agent was stopped fails here.
                let Ok(tls) = self.hub_tls.accept(tcp).await else { continue };
                let mut opening = None;
                let callback = |request: &Opening, mut response: Accepted| {
                    opening = Some((request.uri().path().to_owned(), request.headers().clone()));
                    if let Some(value) = capabilities {
                        let value = value.parse().expect("a header value");
                        response.headers_mut().insert("Skerry-Capabilities", value);
                    }
                    Ok(response)
                };
                let Ok(socket) = tokio_tungstenite::accept_hdr_async(tls, callback).await else {
                    continue;
                };
                let (path, headers) = opening.expect("the callback ran");
                let (seen, classes) = (Vec::new(), Vec::new());
                let waiting = VecDeque::new();
                return Session {
                    wire: Wire::WebSocket(socket),
                    path,
                    headers,
                    seen,
                    classes,
                    waiting,
                };
            }
        };
        tokio::time::timeout(PATIENCE, accept).await.expect("the node dials")
    }
}

/// Hands over every message of every stream, with the class that the stream says.
async fn read_streams(connection: quinn::Connection, heard: mpsc::Sender<(Class, Message)>) {
    while let Ok(mut stream) = connection.accept_uni().await {
        let heard = heard.clone();
        tokio::spawn(async move {
            let mut class = [0];
            stream.read_exact(&mut class).await.expect("a class");
            let class = Class::try_from(class[0]).expect("a known class");
            let (mut bytes, decoder) = (BytesMut::new(), frame::Decoder::new(MESSAGE_LEN_MAX));
            while let Ok(Some(chunk)) = stream.read_chunk(65536, true).await {
                bytes.extend_from_slice(&chunk.bytes);
                while let Some(frame) = decoder.decode(&mut bytes).expect("a frame") {
                    let messages = match frame.kind {
                        Kind::Message => vec![Message::decode(&frame.payload).expect("a message")],
                        Kind::Batch => {
                            batch::decode(&frame.payload, MESSAGE_LEN_MAX).expect("a batch")
                        }
                        Kind::Hello => panic!("one hello is enough"),
                    };
                    for message in messages {
                        if heard.send((class, message)).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
    }
}

/// What carries a session.
enum Wire {
    WebSocket(WebSocketStream<TlsStream<TcpStream>>),
    Quic(Quic),
}

struct Quic {
    connection: quinn::Connection,
    _control: (quinn::SendStream, quinn::RecvStream),
    streams: HashMap<u8, quinn::SendStream>,
    messages: mpsc::Receiver<(Class, Message)>,
}

/// One connection of the node.
pub(crate) struct Session {
    wire: Wire,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    /// `operation resource` of every message so far.
    pub(crate) seen: Vec<String>,
    /// Class of the stream of every message so far; QUIC only.
    pub(crate) classes: Vec<Class>,
    /// Messages of a batch that were not asked for yet.
    waiting: VecDeque<Message>,
}

impl Session {
    pub(crate) async fn send(&mut self, message: &Message) {
        match &mut self.wire {
            Wire::WebSocket(_) => self.send_raw(Frame::text(message.encode())).await,
            Wire::Quic(_) => {
                self.send_frame(Class::of(message), Kind::Message, message.encode().as_bytes())
                    .await;
            }
        }
    }

    /// Several messages in one compressed frame.
    pub(crate) async fn send_batch(&mut self, messages: &[Message]) {
        let bytes = batch::encode(messages);
        match &self.wire {
            Wire::WebSocket(_) => self.send_raw(Frame::binary(bytes)).await,
            Wire::Quic(_) => self.send_frame(Class::of(&messages[0]), Kind::Batch, &bytes).await,
        }
    }

    /// Any frame; WebSocket only.
    pub(crate) async fn send_raw(&mut self, frame: Frame) {
        let Wire::WebSocket(socket) = &mut self.wire else { panic!("not a WebSocket") };
        socket.send(frame).await.expect("the link is up");
    }

    /// Any bytes under the WebSocket; what they are is the caller's business.
    pub(crate) async fn send_bytes(&mut self, bytes: &[u8]) {
        use tokio::io::AsyncWriteExt;
        let Wire::WebSocket(socket) = &mut self.wire else { panic!("not a WebSocket") };
        socket.get_mut().write_all(bytes).await.expect("the link is up");
        socket.get_mut().flush().await.expect("the link is up");
    }

    /// One frame on the stream of a class; QUIC only.
    pub(crate) async fn send_frame(&mut self, class: Class, kind: Kind, payload: &[u8]) {
        let mut bytes = BytesMut::new();
        frame::encode(kind, payload, &mut bytes);
        self.send_stream_bytes(class, &bytes).await;
    }

    /// Any bytes on the stream of a class; QUIC only.
    pub(crate) async fn send_stream_bytes(&mut self, class: Class, bytes: &[u8]) {
        let Wire::Quic(quic) = &mut self.wire else { panic!("not QUIC") };
        let number = u8::from(class);
        if !quic.streams.contains_key(&number) {
            let mut stream = quic.connection.open_uni().await.expect("the link is up");
            stream.write_all(&[number]).await.expect("the link is up");
            quic.streams.insert(number, stream);
        }
        let stream = quic.streams.get_mut(&number).expect("just there");
        stream.write_all(bytes).await.expect("the link is up");
    }

    /// Where the node's datagrams come from; QUIC only.
    pub(crate) fn remote(&self) -> SocketAddr {
        let Wire::Quic(quic) = &self.wire else { panic!("not QUIC") };
        quic.connection.remote_address()
    }

    /// Waits until the node has gone.
    pub(crate) async fn ended(mut self) {
        let ended = async {
            match &mut self.wire {
                Wire::WebSocket(socket) => while let Some(Ok(_)) = socket.next().await {},
                Wire::Quic(quic) => drop(quic.connection.closed().await),
            }
        };
        tokio::time::timeout(PATIENCE, ended).await.expect("the node goes");
    }

    /// A push; returns its id.
    pub(crate) async fn push(
        &mut self,
        operation: Operation,
        resource: &str,
        content: &Value,
    ) -> String {
        let message = Message::new(1, "edgecontroller", "resource", operation, resource, content);
        self.send(&message).await;
        message.header.msg_id
    }

    pub(crate) async fn answer(&mut self, request: &Message, content: &Value) {
        let mut reply = request.response(1, content);
        reply.route.source = "edgecontroller".into();
        reply.route.group = "resource".into();
        self.send(&reply).await;
    }

    /// The next text or binary frame, as it is; WebSocket only.
    pub(crate) async fn next_frame(&mut self) -> Frame {
        let Wire::WebSocket(socket) = &mut self.wire else { panic!("not a WebSocket") };
        let next = async {
            loop {
                let frame = socket.next().await.expect("the link is up").expect("a frame");
                if frame.is_text() || frame.is_binary() {
                    return frame;
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect("the node says something")
    }

    pub(crate) async fn next(&mut self) -> Message {
        if let Some(message) = self.waiting.pop_front() {
            return self.note(message);
        }
        let message = match &mut self.wire {
            Wire::WebSocket(_) => match self.next_frame().await {
                Frame::Text(text) => {
                    assert!(text.ends_with('\n'), "a line feed ends each message");
                    Message::decode(text.as_bytes()).expect("a message")
                }
                Frame::Binary(bytes) => {
                    self.waiting.extend(batch::decode(&bytes, MESSAGE_LEN_MAX).expect("a batch"));
                    self.waiting.pop_front().expect("a batch is not empty")
                }
                other => panic!("{other:?}"),
            },
            Wire::Quic(quic) => {
                let next = tokio::time::timeout(PATIENCE, quic.messages.recv()).await;
                let (class, message) =
                    next.expect("the node says something").expect("the link is up");
                self.classes.push(class);
                message
            }
        };
        self.note(message)
    }

    fn note(&mut self, message: Message) -> Message {
        self.seen.push(format!("{} {}", message.route.operation, message.route.resource));
        message
    }

    /// Reads until a message with this operation and resource comes; serves lease and node meanwhile.
    pub(crate) async fn until(&mut self, operation: Operation, resource: &str) -> Message {
        self.until_match(|message| {
            message.operation() == Some(operation) && message.route.resource == resource
        })
        .await
    }

    /// Reads until such a message about something whose name begins like this.
    pub(crate) async fn next_of(&mut self, operation: Operation, resource: &str) -> Message {
        self.until_match(|message| {
            message.operation() == Some(operation) && message.route.resource.starts_with(resource)
        })
        .await
    }

    /// Reads until the acknowledgement of `id`.
    pub(crate) async fn until_ack(&mut self, id: &str) -> Message {
        self.until_match(|message| message.header.parent_msg_id == id).await
    }

    /// Reads until a message says this somewhere.
    pub(crate) async fn until_text(&mut self, text: &str) -> Message {
        self.until_match(|message| message.content.get().contains(text)).await
    }

    async fn until_match(&mut self, wanted: impl Fn(&Message) -> bool) -> Message {
        let search = async {
            loop {
                let message = self.next().await;
                if wanted(&message) {
                    return message;
                }
                self.serve(&message).await;
            }
        };
        let found = tokio::time::timeout(PATIENCE, search).await;
        found.unwrap_or_else(|_| panic!("it never came: {:?}", self.seen))
    }

    /// Answers what every node asks for.
    pub(crate) async fn serve(&mut self, message: &Message) {
        let object = |object: Value| serde_json::json!({"Object": object, "Err": null});
        let kind = message.route.resource.split('/').nth(1).unwrap_or_default();
        match (message.operation(), kind) {
            (Some(Operation::Insert), "node") => {
                let mut node: Value = message.content_as().expect("a Node");
                node["metadata"]["uid"] = "n".into();
                node["metadata"]["resourceVersion"] = "1".into();
                self.answer(message, &object(node)).await;
            }
            (Some(Operation::Patch), "nodepatch") => {
                self.answer(message, &object(Value::Null)).await;
            }
            (Some(Operation::Query | Operation::Update | Operation::Insert), "lease") => {
                let lease = serde_json::json!({"metadata": {"name": "edge1"}, "spec": {}});
                self.answer(message, &object(lease)).await;
            }
            _ => {}
        }
    }
}

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "KubeEdge");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    CertifiedIssuer::self_signed(params, key()).expect("a CA")
}

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key")
}

fn server_config(ca: &CertifiedIssuer<'static, KeyPair>, mutual: bool) -> ServerConfig {
    let key = key();
    let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("a name");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let certificate = params.signed_by(&key, ca).expect("a certificate");
    let chain = vec![certificate.der().clone()];
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let builder = if mutual {
        let mut roots = RootCertStore::empty();
        roots.add(ca.der().clone()).expect("a CA");
        let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build().expect("a verifier");
        ServerConfig::builder().with_client_cert_verifier(verifier)
    } else {
        ServerConfig::builder().with_no_client_auth()
    };
    builder.with_single_cert(chain, der).expect("they fit")
}

async fn serve_enrolment(
    listener: TcpListener,
    tls: TlsAcceptor,
    ca: Arc<CertifiedIssuer<'static, KeyPair>>,
    requests: Arc<Mutex<Vec<(String, String)>>>,
    refusal: Option<&'static str>,
) {
    loop {
        let (tcp, _) = listener.accept().await.expect("a connection");
        let Ok(stream) = tls.accept(tcp).await else { continue };
        let (ca, requests) = (ca.clone(), requests.clone());
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let (ca, requests) = (ca.clone(), requests.clone());
            async move {
                if request.uri().path() == "/ca.crt" {
                    let der = Bytes::copy_from_slice(ca.der());
                    return Ok::<_, std::convert::Infallible>(Response::new(Full::new(der)));
                }
                let header = |name: &str| {
                    let value = request.headers().get(name).and_then(|value| value.to_str().ok());
                    value.unwrap_or_default().to_owned()
                };
                let asked = (header("Authorization"), header("NodeName"));
                requests.lock().expect("no panic").push(asked);
                if let Some(text) = refusal {
                    let mut response =
                        Response::new(Full::new(Bytes::from_static(text.as_bytes())));
                    *response.status_mut() = StatusCode::UNAUTHORIZED;
                    return Ok(response);
                }
                let body = request.into_body().collect().await.expect("a body").to_bytes();
                let csr = CertificateSigningRequestParams::from_der(&body.to_vec().into());
                let mut csr = csr.expect("a request in DER");
                csr.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
                let certificate = csr.signed_by(&ca).expect("a certificate");
                let der = Bytes::copy_from_slice(certificate.der());
                Ok(Response::new(Full::new(der)))
            }
        });
        tokio::spawn(
            hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service),
        );
    }
}

/// A way for datagrams and connections that can be closed, and whose outer address can change, like that of a NAT.
pub(crate) struct Way {
    pub(crate) port: u16,
    open: watch::Sender<bool>,
    rebound: watch::Sender<u64>,
    tasks: Vec<AbortHandle>,
}

impl Way {
    /// Carries datagrams to `hub`; one node at a time.
    pub(crate) async fn datagrams(hub: SocketAddr) -> Self {
        let inner = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("a port"));
        let port = inner.local_addr().expect("bound").port();
        let (open, opened) = watch::channel(true);
        let (rebound, mut rebinds) = watch::channel(0u64);
        let task = tokio::spawn(async move {
            let mut node = None;
            let mut outer = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
            let (mut up, mut down) = (vec![0; 65536], vec![0; 65536]);
            loop {
                tokio::select! {
                    Ok((len, from)) = inner.recv_from(&mut up) => {
                        node = Some(from);
                        if *opened.borrow() {
                            let _ = outer.send_to(&up[..len], hub).await;
                        }
                    }
                    Ok((len, _)) = outer.recv_from(&mut down) => {
                        if let Some(node) = node.filter(|_| *opened.borrow()) {
                            let _ = inner.send_to(&down[..len], node).await;
                        }
                    }
                    Ok(()) = rebinds.changed() => {
                        outer = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
                    }
                }
            }
        });
        Self { port, open, rebound, tasks: vec![task.abort_handle()] }
    }

    /// Carries connections to `hub`. Closed, it keeps them open and carries nothing: half-open.
    pub(crate) async fn connections(hub: SocketAddr) -> Self {
        let inner = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = inner.local_addr().expect("bound").port();
        let (open, opened) = watch::channel(true);
        let (rebound, _) = watch::channel(0u64);
        let task = tokio::spawn(async move {
            while let Ok((node, _)) = inner.accept().await {
                let mut opened = opened.clone();
                tokio::spawn(async move {
                    let Ok(hub) = TcpStream::connect(hub).await else { return };
                    let ((mut from_node, mut to_node), (mut from_hub, mut to_hub)) =
                        (node.into_split(), hub.into_split());
                    let other = opened.clone();
                    let up = async { carry(&mut from_node, &mut to_hub, &mut opened).await };
                    let mut other = other;
                    let down = async { carry(&mut from_hub, &mut to_node, &mut other).await };
                    tokio::select! { () = up => {} () = down => {} }
                });
            }
        });
        Self { port, open, rebound, tasks: vec![task.abort_handle()] }
    }

    pub(crate) fn set_open(&self, open: bool) {
        self.open.send_replace(open);
    }

    /// From now on the hub sees another address.
    pub(crate) fn rebind(&self) {
        self.rebound.send_modify(|count| *count += 1);
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

async fn carry(
    from: &mut (impl tokio::io::AsyncRead + Unpin),
    to: &mut (impl tokio::io::AsyncWrite + Unpin),
    open: &mut watch::Receiver<bool>,
) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut bytes = vec![0; 16384];
    loop {
        if open.wait_for(|open| *open).await.is_err() {
            return;
        }
        match from.read(&mut bytes).await {
            Ok(0) | Err(_) => return,
            Ok(len) => {
                if open.wait_for(|open| *open).await.is_err() {
                    return;
                }
                if to.write_all(&bytes[..len]).await.is_err() {
                    return;
                }
            }
        }
    }
}
