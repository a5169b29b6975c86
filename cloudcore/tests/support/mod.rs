//! A cluster with the embedded API, and a node that speaks the protocol by hand.

// Each test file uses a part of it.
#![allow(dead_code, unreachable_pub)]

pub mod own;
pub mod upstream;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Secret};
use kube::api::{Api, PostParams};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::RootCertStore;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use skerry_apiserver::{ApiServer, Durability};
use skerry_cloudcore::{CloudCore, Config, JoinToken, LinkInfo, Rate, create_token};
use skerry_protocol::capability::{self, Capabilities};
use skerry_protocol::delivery::ack_required;
use skerry_protocol::message::MESSAGE_LEN_MAX;
use skerry_protocol::{Message, Operation, batch};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error as WsError, Message as WsMessage};

/// No step of a test takes longer on a working machine.
pub const PATIENCE: Duration = Duration::from_secs(20);
pub const ANY: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

/// An API server, CloudCore, and an administrator.
pub struct Cluster {
    pub api: ApiServer,
    pub cloud: CloudCore,
    pub admin: kube::Client,
    _dir: tempfile::TempDir,
}

impl Cluster {
    pub async fn start() -> Self {
        Self::start_with(|_| ()).await
    }

    /// With another configuration of CloudCore.
    ///
    /// What CloudCore logs is shown when `RUST_LOG` says so.
    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        if let Ok(filter) = std::env::var("RUST_LOG") {
            let logging = tracing_subscriber::fmt().with_env_filter(filter);
            // The second cluster of a test program finds it done.
            let _ = logging.with_writer(std::io::stderr).try_init();
        }
        let dir = tempfile::tempdir().expect("a folder");
        let config = skerry_apiserver::Config {
            dir: dir.path().into(),
            listen: ANY.into(),
            hostnames: vec!["127.0.0.1".into()],
            node_streams: None,
            durability: Durability::Relaxed,
            controllers: false,
        };
        let api = ApiServer::start(config).await.expect("the API starts");
        let admin = api.client("admin", &["system:masters"]);
        let cloud = start_cloud(&api, &["127.0.0.1"], change).await;
        Self { api, cloud, admin, _dir: dir }
    }

    /// Stops CloudCore and starts it again, with these names.
    pub async fn restart_cloud(self, advertise: &[&str]) -> Self {
        self.restart_cloud_after(advertise, async |_| ()).await
    }

    /// The same, with something that happens while no CloudCore runs.
    pub async fn restart_cloud_after(
        self,
        advertise: &[&str],
        meanwhile: impl AsyncFnOnce(&kube::Client),
    ) -> Self {
        let Self { api, cloud, admin, _dir } = self;
        cloud.shutdown().await;
        meanwhile(&admin).await;
        let cloud = start_cloud(&api, advertise, |_| ()).await;
        Self { api, cloud, admin, _dir }
    }

    /// The same, with another rate of new links.
    pub async fn start_with_rate(admission: Rate) -> Self {
        let cluster = Self::start().await;
        let Self { api, cloud, admin, _dir } = cluster;
        cloud.shutdown().await;
        let config = Config { admission, ..config(&["127.0.0.1"]) };
        let client = api.client("cloudcore", &["skerry:cloudcore"]);
        let cloud = CloudCore::start(client, config).await.expect("cloudcore starts");
        Self { api, cloud, admin, _dir }
    }

    /// Waits until the links are as wanted, and returns them.
    pub async fn links_until(&self, wanted: impl Fn(&[LinkInfo]) -> bool) -> Vec<LinkInfo> {
        let waiting = async {
            loop {
                let links = self.cloud.links().await;
                if wanted(&links) {
                    return links;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(links) => links,
            Err(_) => panic!("the links stay {:#?}", self.cloud.links().await),
        }
    }

    /// One page of the monitor.
    pub async fn monitor(&self, path: &str) -> (u16, String) {
        let address = self.cloud.monitor_addr().expect("the monitor is on");
        let stream = TcpStream::connect(address).await.expect("it listens");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
        tokio::spawn(connection);
        let request = http::Request::get(path).header("host", "monitor");
        let request = request.body(Full::<Bytes>::default()).expect("a request");
        let response = sender.send_request(request).await.expect("an answer");
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.expect("a body").to_bytes();
        (status, String::from_utf8(body.to_vec()).expect("a text"))
    }

    /// The value of a counter or gauge, by its name and labels as they stand there.
    pub async fn metric(&self, name: &str) -> u64 {
        let (_, text) = self.monitor("/metrics").await;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().expect("a number")
    }

    pub async fn stop(self) {
        self.cloud.shutdown().await;
        self.api.shutdown().await;
    }

    pub async fn token(&self, node: &str) -> JoinToken {
        create_token(&self.admin, node, Duration::from_secs(600)).await.expect("a token")
    }

    /// A node with a certificate.
    pub async fn enrolled(&self, node: &str) -> Identity {
        let token = self.token(node).await;
        let identity = Identity::new(node);
        let answer = identity.join(self, &token).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        identity.with_certificate(answer.body)
    }

    pub async fn ca(&self) -> CertificateDer<'static> {
        let request = http::Request::get("/ca.crt").body(Full::default()).expect("a request");
        CertificateDer::from(fetch(self.cloud.enrol_addr(), None, request).await.body.to_vec())
    }

    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.admin.clone(), "default")
    }

    pub fn configs(&self) -> Api<ConfigMap> {
        Api::namespaced(self.admin.clone(), "default")
    }

    pub fn secrets(&self, namespace: &str) -> Api<Secret> {
        Api::namespaced(self.admin.clone(), namespace)
    }

    pub fn nodes(&self) -> Api<Node> {
        Api::all(self.admin.clone())
    }

    pub async fn create_pod(&self, name: &str, node: &str, config: &str) {
        let pod = from(json!({"metadata": {"name": name}, "spec": {
            "nodeName": node, "automountServiceAccountToken": false,
            "containers": [{"name": "c", "image": "busybox",
                "envFrom": [{"configMapRef": {"name": config}}]}]}}));
        self.pods().create(&PostParams::default(), &pod).await.expect("the pod is created");
    }

    pub async fn create_config(&self, name: &str, value: &str) {
        let config = from(json!({"metadata": {"name": name}, "data": {"key": value}}));
        let created = self.configs().create(&PostParams::default(), &config).await;
        created.expect("the config is created");
    }
}

async fn start_cloud(
    api: &ApiServer,
    advertise: &[&str],
    change: impl FnOnce(&mut Config),
) -> CloudCore {
    let mut config = config(advertise);
    change(&mut config);
    let client = api.client("cloudcore", &["skerry:cloudcore"]);
    CloudCore::start(client, config).await.expect("cloudcore starts")
}

fn config(advertise: &[&str]) -> Config {
    Config {
        hub: ANY.into(),
        quic: Some(ANY.into()),
        monitor: Some(ANY.into()),
        admission: skerry_cloudcore::ADMISSION_RATE,
        enrol: ANY.into(),
        tunnel: ANY.into(),
        advertise: advertise.iter().map(|name| (*name).into()).collect(),
        os_store: None,
        node_certificate_ttl: skerry_cloudcore::NODE_CERTIFICATE_TTL,
        shared_token: false,
        router: None,
        impersonate: false,
    }
}

pub fn from<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("the test's own object")
}

/// A node's key, and its certificate once it has one.
pub struct Identity {
    pub node: String,
    pub key: KeyPair,
    pub certificate: Option<CertificateDer<'static>>,
}

/// An HTTP answer.
pub struct Answer {
    pub status: u16,
    pub body: Bytes,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Identity {
    pub fn new(node: &str) -> Self {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key");
        Self { node: node.into(), key, certificate: None }
    }

    pub fn with_certificate(self, der: Bytes) -> Self {
        Self { certificate: Some(CertificateDer::from(der.to_vec())), ..self }
    }

    /// A CSR with KubeEdge's subject for this node.
    pub fn csr(&self, common_name: &str) -> Vec<u8> {
        let mut params = CertificateParams::default();
        let mut subject = DistinguishedName::new();
        subject.push(DnType::CountryName, "CN");
        subject.push(DnType::OrganizationName, "system:nodes");
        subject.push(DnType::CommonName, common_name);
        params.distinguished_name = subject;
        params.serialize_request(&self.key).expect("a CSR").der().to_vec()
    }

    /// Asks for a certificate as a new node does.
    pub async fn join(&self, cluster: &Cluster, token: &JoinToken) -> Answer {
        let bearer = format!("Bearer {}", token.jwt());
        let csr = self.csr(&format!("system:node:{}", self.node));
        self.ask(cluster, Some(&bearer), csr).await
    }

    pub async fn ask(
        &self,
        cluster: &Cluster,
        authorization: Option<&str>,
        csr: Vec<u8>,
    ) -> Answer {
        let mut request = http::Request::get("/edge.crt").header("NodeName", &self.node);
        if let Some(authorization) = authorization {
            request = request.header("Authorization", authorization);
        }
        let request = request.body(Full::from(csr)).expect("a request");
        let trust = (cluster.ca().await, self);
        fetch(cluster.cloud.enrol_addr(), Some(trust), request).await
    }

    pub fn client(&self, ca: CertificateDer<'static>) -> TlsConnector {
        TlsConnector::from(Arc::new(self.client_config(ca)))
    }

    pub fn client_config(&self, ca: CertificateDer<'static>) -> rustls::ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(ca).expect("a CA");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots);
        match &self.certificate {
            None => config.with_no_client_auth(),
            Some(certificate) => {
                let key = PrivatePkcs8KeyDer::from(self.key.serialize_der());
                let key = PrivateKeyDer::from(key);
                config.with_client_auth_cert(vec![certificate.clone()], key).expect("a key pair")
            }
        }
    }

    pub async fn tls(
        &self,
        ca: CertificateDer<'static>,
        address: SocketAddr,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(address).await?;
        self.client(ca).connect(server_name(), stream).await
    }

    /// Opens the hub's WebSocket as `node_id`.
    pub async fn open(
        &self,
        cluster: &Cluster,
        node_id: &str,
        capabilities: Capabilities,
    ) -> Result<Link, WsError> {
        let address = cluster.cloud.hub_addr();
        let stream = self.tls(cluster.ca().await, address).await?;
        let url = format!("wss://{address}/e632aba927ea4ac2b575ec1603d56f10/{node_id}/events");
        let mut request = url.into_client_request().expect("a URL");
        let headers = request.headers_mut();
        for (name, value) in [("Node_id", node_id), ("Project_id", "p"), ("Connectionuse", "msg")] {
            headers.append(name, value.parse().expect("a value"));
        }
        if capabilities != Capabilities::default() {
            headers.append(capability::HEADER, capabilities.to_string().parse().expect("a value"));
        }
        let (socket, response) = tokio_tungstenite::client_async(request, stream).await?;
        let theirs =
            response.headers().get(capability::HEADER).and_then(|value| value.to_str().ok());
        assert_eq!(capabilities.and(Capabilities::parse(theirs)), capabilities);
        let mut link = Link {
            node: node_id.into(),
            socket,
            arrived: VecDeque::new(),
            earlier: VecDeque::new(),
        };
        link.send(Operation::Keepalive, "node", &"ping").await;
        Ok(link)
    }

    pub async fn connect(&self, cluster: &Cluster) -> Link {
        self.open(cluster, &self.node, Capabilities::default()).await.expect("connected")
    }
}

pub fn server_name() -> ServerName<'static> {
    ServerName::try_from("127.0.0.1").expect("a name")
}

/// One HTTPS request. Without `trust` the server is not verified, as a node does to get the CA.
pub async fn fetch(
    address: SocketAddr,
    trust: Option<(CertificateDer<'static>, &Identity)>,
    mut request: http::Request<Full<Bytes>>,
) -> Answer {
    let tls = match trust {
        Some((ca, identity)) => identity.client(ca),
        None => {
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let verifier = Arc::new(Anyone(Arc::clone(&provider)));
            let config = rustls::ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .expect("versions")
                .dangerous()
                .with_custom_certificate_verifier(verifier)
                .with_no_client_auth();
            TlsConnector::from(Arc::new(config))
        }
    };
    let stream = TcpStream::connect(address).await.expect("it listens");
    let stream = tls.connect(server_name(), stream).await.expect("TLS");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
    tokio::spawn(connection);
    request.headers_mut().insert("host", address.to_string().parse().expect("a value"));
    let response = sender.send_request(request).await.expect("an answer");
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    Answer { status, body }
}

#[derive(Debug)]
struct Anyone(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A node's end of the link.
pub struct Link {
    pub node: String,
    pub socket: WebSocketStream<TlsStream<TcpStream>>,
    /// The rest of a batch.
    pub arrived: VecDeque<Message>,
    /// What came before an answer; acknowledged.
    pub earlier: VecDeque<Message>,
}

impl Link {
    pub async fn send<T: serde::Serialize>(
        &mut self,
        operation: Operation,
        resource: &str,
        content: &T,
    ) -> String {
        let message = Message::new(0, "edged", "meta", operation, resource, content);
        let id = message.header.msg_id.clone();
        self.write(&message).await;
        id
    }

    pub async fn write(&mut self, message: &Message) {
        self.socket.send(WsMessage::text(message.encode())).await.expect("the link is up");
    }

    /// The next message; pushes are acknowledged.
    pub async fn next(&mut self) -> Message {
        match self.earlier.pop_front() {
            Some(message) => message,
            None => self.next_from_hub().await,
        }
    }

    async fn next_from_hub(&mut self) -> Message {
        let message = self.next_unacknowledged().await;
        if ack_required(&message) {
            self.write(&message.ack(0)).await;
        }
        message
    }

    /// The next message, without a word back.
    pub async fn next_unacknowledged(&mut self) -> Message {
        let message = tokio::time::timeout(PATIENCE, async {
            loop {
                if let Some(message) = self.arrived.pop_front() {
                    return message;
                }
                match self.socket.next().await.expect("open").expect("readable") {
                    WsMessage::Text(text) => {
                        return Message::decode(text.as_bytes()).expect("a message");
                    }
                    WsMessage::Binary(bytes) => {
                        let several = batch::decode(&bytes, MESSAGE_LEN_MAX).expect("a batch");
                        assert!(several.len() > 1, "one message comes as text");
                        self.arrived.extend(several);
                    }
                    WsMessage::Close(frame) => panic!("closed: {frame:?}"),
                    _ => {}
                }
            }
        });
        message.await.expect("a message in time")
    }

    /// Reads until this comes; everything before it is acknowledged and given back as short lines.
    pub async fn until(&mut self, operation: &str, resource: &str) -> (Message, Vec<String>) {
        let mut before = Vec::new();
        loop {
            let message = self.next().await;
            let route = &message.route;
            if route.operation == operation && route.resource == resource {
                return (message, before);
            }
            before.push(format!("{} {}", route.operation, route.resource));
        }
    }

    /// Reads until all of these have come.
    pub async fn until_all(&mut self, operation: &str, mut resources: Vec<String>) {
        while !resources.is_empty() {
            let route = self.next().await.route;
            if route.operation == operation {
                resources.retain(|resource| *resource != route.resource);
            }
        }
    }

    /// Sends a request and returns the content of its answer, whatever comes between.
    pub async fn ask<T: serde::Serialize>(
        &mut self,
        operation: Operation,
        resource: &str,
        content: &T,
    ) -> (String, Value) {
        let id = self.send(operation, resource, content).await;
        loop {
            let message = self.next().await;
            if message.header.parent_msg_id == id {
                let content = message.content_as().expect("json");
                return (message.route.operation, content);
            }
        }
    }

    /// Sends a request as it is and returns its answer. What comes before that is kept for [`Link::next`]: a push may
    /// overtake it.
    pub async fn ask_message(&mut self, request: &Message) -> Message {
        self.write(request).await;
        loop {
            let message = self.next_from_hub().await;
            if message.header.parent_msg_id == request.header.msg_id {
                return message;
            }
            self.earlier.push_back(message);
        }
    }

    pub async fn register(&mut self) -> Value {
        let node = json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": self.node,
            "labels": {"kubernetes.io/hostname": self.node, "node-role.kubernetes.io/edge": ""}},
            "status": {"capacity": {"cpu": "2", "memory": "1Gi", "pods": "110"}}});
        let resource = format!("null/node/{}", self.node);
        let id = self.send(Operation::Insert, &resource, &node).await;
        let (mut answer, mut pushed) = (None, false);
        // The new Node comes back as a push as well, before or after the answer.
        while answer.is_none() || !pushed {
            let message = self.next().await;
            if message.header.parent_msg_id == id {
                assert_eq!(message.route.operation, "response");
                answer = Some(message.content_as().expect("json"));
            } else {
                pushed |= message.route.resource == resource;
            }
        }
        answer.expect("seen")
    }

    /// The close frame with which the hub ends the link.
    pub async fn closed(mut self) -> String {
        tokio::time::timeout(PATIENCE, async {
            loop {
                match self.socket.next().await {
                    Some(Ok(WsMessage::Close(Some(frame)))) => return frame.reason.to_string(),
                    Some(Ok(_)) => {}
                    other => panic!("no close frame: {other:?}"),
                }
            }
        })
        .await
        .expect("closed in time")
    }
}
