//! CloudCore's part, played from the protocol: an enrolment listener and a hub with TLS, on ports of their own.
//!
//! Each test speaks the hub's lines itself; this only carries them.

use bytes::Bytes;
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
use skerry_protocol::{Message, Operation};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message as Frame;
use tokio_tungstenite::tungstenite::handshake::server::{Request as Opening, Response as Accepted};

/// Longest wait for a state; a test that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Cloud {
    ca: Arc<CertifiedIssuer<'static, KeyPair>>,
    hub: TcpListener,
    hub_tls: TlsAcceptor,
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
        Self { ca, hub, hub_tls, enrol_port, requests }
    }

    pub(crate) fn hub_port(&self) -> u16 {
        self.hub.local_addr().expect("bound").port()
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
                return Session { socket, path, headers, seen: Vec::new() };
            }
        };
        tokio::time::timeout(PATIENCE, accept).await.expect("the node dials")
    }
}

/// One connection of the node.
pub(crate) struct Session {
    socket: WebSocketStream<TlsStream<TcpStream>>,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    /// `operation resource` of every message so far.
    pub(crate) seen: Vec<String>,
}

impl Session {
    pub(crate) async fn send(&mut self, message: &Message) {
        self.socket.send(Frame::text(message.encode())).await.expect("the link is up");
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

    pub(crate) async fn next(&mut self) -> Message {
        let next = async {
            loop {
                let frame = self.socket.next().await.expect("the link is up").expect("a frame");
                if let Frame::Text(text) = frame {
                    assert!(text.ends_with('\n'), "a line feed ends each message");
                    return Message::decode(text.as_bytes()).expect("a message");
                }
            }
        };
        let message = tokio::time::timeout(PATIENCE, next).await.expect("the node says something");
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

    /// Reads until the acknowledgement of `id`.
    pub(crate) async fn until_ack(&mut self, id: &str) -> Message {
        self.until_match(|message| message.header.parent_msg_id == id).await
    }

    /// Reads until a message says this somewhere.
    pub(crate) async fn until_text(&mut self, text: &str) -> Message {
        self.until_match(|message| message.content.get().contains(text)).await
    }

    async fn until_match(&mut self, wanted: impl Fn(&Message) -> bool) -> Message {
        loop {
            let message = self.next().await;
            if wanted(&message) {
                return message;
            }
            self.serve(&message).await;
        }
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
