//! Thousands of simulated nodes in one process, so that a hub can be measured on one machine.
//!
//! Each is a real TLS connection with a certificate of its own and speaks the link of our own edge: digest, window,
//! acknowledgements, beats. What it holds is kept in memory; what a real agent does with it is not simulated.
//!
//! Questions on standard input, each answered with one line of JSON: `connect`, `cut`, `stats`, `want VALUE`, `times`.

use crate::hostile::Hostile;
use anyhow::{Context, Result, bail, ensure};
use bytes::BytesMut;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use skerry_protocol::capability::{self, Capabilities};
use skerry_protocol::delivery::ack_required;
use skerry_protocol::digest::{self, Digest, Held};
use skerry_protocol::message::MESSAGE_LEN_MAX;
use skerry_protocol::websocket::{self, Decoder, Message as Frame, Opcode, Role};
use skerry_protocol::{Message, Operation, batch};
use std::io::BufRead;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// The config map that every node is sent, and the key in it that is watched.
pub(crate) const CONFIG: &str = "default/configmap/shared";
/// Key of the value that `want` waits for.
pub(crate) const VALUE: &str = "value";
/// Dials at once, of all nodes together; the rest wait, as they would for their own processors.
const DIALS_MAX: usize = 64;
/// Between two beats of one node.
const BEAT: Duration = Duration::from_secs(60);
/// Times that are kept until somebody asks for them.
const TIMES_MAX: usize = 1_000_000;
/// Longest wait before a node dials again when the hub says nothing.
const BACKOFF_MAX: Duration = Duration::from_secs(4);

/// What the process is told on its command line, in a file.
#[derive(Serialize, Deserialize)]
pub(crate) struct Orders {
    /// The hub.
    pub(crate) hub: SocketAddr,
    /// CA, DER in base64.
    pub(crate) ca: String,
    /// The key of all nodes, PKCS #8 in base64.
    pub(crate) key: String,
    /// Name and certificate of each.
    pub(crate) nodes: Vec<(String, String)>,
    /// What they do instead of what they should.
    #[serde(default)]
    pub(crate) hostile: Option<Hostile>,
}

struct Fleet {
    hub: SocketAddr,
    dials: Semaphore,
    connected: AtomicUsize,
    synced: AtomicUsize,
    dialled: AtomicUsize,
    refused: AtomicUsize,
    wanted: Mutex<String>,
    at_wanted: AtomicUsize,
    /// When the wanted value was named, and how long each node then took to have it, in seconds.
    times: Mutex<(Instant, Vec<f64>)>,
    hostile: Option<Hostile>,
}

/// Runs until standard input ends.
pub(crate) async fn run(orders: Orders) -> Result<()> {
    use base64::Engine;
    let decode = |text: &str| base64::engine::general_purpose::STANDARD.decode(text);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(decode(&orders.ca)?))?;
    let roots = Arc::new(roots);
    let key = decode(&orders.key)?;
    let fleet = Arc::new(Fleet {
        hub: orders.hub,
        dials: Semaphore::new(DIALS_MAX),
        connected: AtomicUsize::new(0),
        synced: AtomicUsize::new(0),
        dialled: AtomicUsize::new(0),
        refused: AtomicUsize::new(0),
        wanted: Mutex::new(String::new()),
        at_wanted: AtomicUsize::new(0),
        times: Mutex::new((Instant::now(), Vec::new())),
        hostile: orders.hostile,
    });
    let (link, links) = watch::channel(false);
    for (name, certificate) in orders.nodes {
        let chain = vec![CertificateDer::from(decode(&certificate)?)];
        let key = PrivateKeyDer::try_from(key.clone()).map_err(anyhow::Error::msg)?;
        let mut config = rustls::ClientConfig::builder()
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain, key)?;
        config.resumption = rustls::client::Resumption::in_memory_sessions(1);
        let node = Node {
            fleet: Arc::clone(&fleet),
            tls: TlsConnector::from(Arc::new(config)),
            name,
            held: Digest::default(),
            value: String::new(),
        };
        tokio::spawn(node.run(links.clone()));
    }
    println!("{}", json!({"ready": true}));
    // Standard input blocks, and nothing else may wait for it.
    tokio::task::spawn_blocking(move || {
        for line in std::io::stdin().lock().lines() {
            let line = line?;
            match line.split_once(' ').unwrap_or((&line, "")) {
                ("connect", _) => drop(link.send(true)),
                ("cut", _) => drop(link.send(false)),
                ("want", value) => {
                    let mut wanted = fleet.wanted.lock().expect("no holder panics");
                    value.clone_into(&mut wanted);
                    fleet.at_wanted.store(0, Ordering::SeqCst);
                    fleet.times.lock().expect("no holder panics").0 = Instant::now();
                }
                ("times", _) => {
                    let times = &mut fleet.times.lock().expect("no holder panics").1;
                    println!("{}", json!({"times": std::mem::take(times)}));
                    continue;
                }
                ("stats", _) => {}
                _ => bail!("unknown question `{line}`"),
            }
            let count = |count: &AtomicUsize| count.load(Ordering::SeqCst);
            println!(
                "{}",
                json!({"connected": count(&fleet.connected), "synced": count(&fleet.synced),
                    "dialled": count(&fleet.dialled), "refused": count(&fleet.refused),
                    "at_wanted": count(&fleet.at_wanted)})
            );
        }
        Ok(())
    })
    .await?
}

struct Node {
    fleet: Arc<Fleet>,
    tls: TlsConnector,
    name: String,
    held: Digest,
    value: String,
}

/// The hub does not let the node in now.
#[derive(Debug, thiserror::Error)]
#[error("refused for {0:?}")]
struct Refused(Duration);

impl Node {
    async fn run(mut self, mut links: watch::Receiver<bool>) {
        let mut wait = Duration::ZERO;
        loop {
            if links.wait_for(|up| *up).await.is_err() {
                return;
            }
            let pause = wait.mul_f64(rand::random());
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = links.wait_for(|up| !*up) => { wait = Duration::ZERO; continue }
            }
            let ended = tokio::select! {
                ended = self.session() => ended,
                _ = links.wait_for(|up| !*up) => Ok(()),
            };
            wait = match ended {
                Ok(()) => Duration::ZERO,
                Err(error) => match error.downcast_ref::<Refused>() {
                    Some(Refused(told)) => {
                        self.fleet.refused.fetch_add(1, Ordering::SeqCst);
                        *told
                    }
                    None => (wait * 2).clamp(Duration::from_millis(250), BACKOFF_MAX),
                },
            };
        }
    }

    async fn session(&mut self) -> Result<()> {
        let mut bytes = BytesMut::new();
        let (stream, _counted) = {
            let _turn = self.fleet.dials.acquire().await?;
            self.fleet.dialled.fetch_add(1, Ordering::SeqCst);
            (self.dial(&mut bytes).await?, Counted::new(&self.fleet, |fleet| &fleet.connected))
        };
        match self.fleet.hostile {
            Some(hostile) => hostile.talk(stream, &self.name).await,
            None => self.talk(stream, bytes).await,
        }
    }

    async fn dial(&self, bytes: &mut BytesMut) -> Result<TlsStream<TcpStream>> {
        let socket = TcpStream::connect(self.fleet.hub).await?;
        socket.set_nodelay(true)?;
        let name = ServerName::from(self.fleet.hub.ip());
        let mut stream = self.tls.connect(name, socket).await?;
        let key = websocket::client_key(rand::random());
        let capabilities = Capabilities::ours(BEAT).to_string();
        let mut request =
            format!("GET /p/{}/events HTTP/1.1\r\nHost: {}\r\n", self.name, self.fleet.hub);
        let own = [
            ("node_id", self.name.as_str()),
            ("project_id", "p"),
            ("ConnectionUse", "msg"),
            (capability::HEADER, &capabilities),
        ];
        for (header, value) in websocket::request_headers(&key).into_iter().chain(own) {
            request.push_str(&format!("{header}: {value}\r\n"));
        }
        request.push_str("\r\n");
        stream.write_all(request.as_bytes()).await?;
        let head_len = loop {
            ensure!(stream.read_buf(bytes).await? > 0, "closed during the opening handshake");
            ensure!(bytes.len() < 64 * 1024, "an answer without end");
            if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
        };
        let head = bytes.split_to(head_len);
        let head = std::str::from_utf8(&head)?;
        if head.starts_with("HTTP/1.1 101") {
            return Ok(stream);
        }
        let told = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("Skerry-Retry-After-Ms").then(|| value.trim().parse().ok())?
        });
        match told {
            Some(wait_ms) => Err(Refused(Duration::from_millis(wait_ms)).into()),
            None => bail!("no upgrade: {}", head.lines().next().unwrap_or_default()),
        }
    }

    async fn talk(&mut self, mut stream: TlsStream<TcpStream>, mut bytes: BytesMut) -> Result<()> {
        let mut out = BytesMut::new();
        let query = Message::new(
            now_ms(),
            "metamanager",
            "meta",
            Operation::Query,
            digest::RESOURCE,
            &self.held,
        );
        let asked = query.header.msg_id.clone();
        text(&query, &mut out);
        let mut synced = None;
        let mut decoder = Decoder::new(Role::Client, MESSAGE_LEN_MAX);
        let mut beat = tokio::time::interval(BEAT);
        beat.reset();
        loop {
            while let Some(frame) = decoder.decode(&mut bytes)? {
                let messages = match frame {
                    Frame::Text(json) => vec![Message::decode(&json)?],
                    Frame::Binary(packed) => batch::decode(&packed, MESSAGE_LEN_MAX)?,
                    Frame::Ping(payload) => {
                        websocket::encode(
                            Role::Client,
                            Opcode::Pong,
                            &payload,
                            rand::random(),
                            &mut out,
                        );
                        continue;
                    }
                    Frame::Pong(_) => continue,
                    Frame::Close(close) => bail!("closed by the hub: {:?}", close.reason),
                };
                for message in messages {
                    if message.header.parent_msg_id == asked {
                        synced.get_or_insert_with(|| {
                            Counted::new(&self.fleet, |fleet| &fleet.synced)
                        });
                    } else if message.header.parent_msg_id.is_empty() && ack_required(&message) {
                        self.hold(&message);
                        text(&message.ack(now_ms()), &mut out);
                    }
                }
            }
            if bytes.is_empty() {
                // What an idle node keeps is what limits how many fit on a machine.
                bytes = BytesMut::new();
            }
            if !out.is_empty() {
                stream.write_all(&out).await?;
                out = BytesMut::new();
            }
            tokio::select! {
                read = stream.read_buf(&mut bytes) => ensure!(read? > 0, "closed by the hub"),
                _ = beat.tick() => {
                    websocket::encode(Role::Client, Opcode::Ping, &[], rand::random(), &mut out);
                }
            }
        }
    }

    fn hold(&mut self, message: &Message) {
        let resource = &message.route.resource;
        if message.operation() == Some(Operation::Delete) {
            self.held.objects.remove(resource);
            return;
        }
        let object: Value = message.content_as().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let metadata = &object["metadata"];
        let held = Held { uid: text(&metadata["uid"]), rv: text(&metadata["resourceVersion"]) };
        self.held.objects.insert(resource.clone(), held);
        if resource == CONFIG {
            let value = text(&object["data"][VALUE]);
            let wanted = self.fleet.wanted.lock().expect("no holder panics");
            if value == *wanted && value != self.value {
                self.fleet.at_wanted.fetch_add(1, Ordering::SeqCst);
                let mut times = self.fleet.times.lock().expect("no holder panics");
                let took = times.0.elapsed().as_secs_f64();
                if times.1.len() < TIMES_MAX {
                    times.1.push(took);
                }
            }
            self.value = value;
        }
    }
}

/// Counts one while it lives.
struct Counted {
    fleet: Arc<Fleet>,
    count: fn(&Fleet) -> &AtomicUsize,
}

impl Counted {
    fn new(fleet: &Arc<Fleet>, count: fn(&Fleet) -> &AtomicUsize) -> Self {
        count(fleet).fetch_add(1, Ordering::SeqCst);
        Self { fleet: Arc::clone(fleet), count }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        (self.count)(&self.fleet).fetch_sub(1, Ordering::SeqCst);
    }
}

pub(crate) fn text(message: &Message, out: &mut BytesMut) {
    let json = message.encode();
    websocket::encode(Role::Client, Opcode::Text, json.as_bytes(), rand::random(), out);
}

pub(crate) fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

/// Reads the orders and runs.
pub(crate) async fn run_file(path: &std::path::Path) -> Result<()> {
    let file = std::fs::read(path).context("no orders")?;
    run(serde_json::from_slice(&file)?).await
}
