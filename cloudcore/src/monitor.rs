//! What an operator can look at: every link as it is now, and counters.
//!
//! Each session has a [`LinkState`] that it writes while it runs, without a lock; [`Links`] is the list of them. They are
//! served as JSON (`GET /links`) and, summed up, as Prometheus text (`GET /metrics`) on a listener of their own, which
//! has no authentication and therefore belongs on a loopback address. It also passes questions on to nodes about what
//! their devices were: that is kept there and nowhere else.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/cloudhub/common/monitor, whose listener is 127.0.0.1:9091 as well.

use crate::hub::Hub;
use crate::transport::Kind;
use crate::tunnel::{StreamError, Streams};
use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use skerry_protocol::capability::Capabilities;
use skerry_protocol::tunnel::HISTORY_PATH;
use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Connections to the monitor at a time.
const CONNECTIONS_MAX: usize = 16;
/// A request may not take longer than this.
const REQUEST_MAX: Duration = Duration::from_secs(10);
/// How long a node may take for its answer.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// The longest answer of a node, in bytes: a page has at most 256 KiB of values.
const HISTORY_LEN_MAX: usize = 1024 * 1024;

/// One node's link, as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LinkInfo {
    /// The node's name.
    pub node: String,
    /// `websocket` or `quic`.
    pub transport: &'static str,
    /// The address that the node's packets come from now.
    pub peer: SocketAddr,
    /// When the link came up, Unix milliseconds.
    pub since: i64,
    /// Smoothed time from the write of a message to its acknowledgement, or QUIC's own round trip; in milliseconds,
    /// absent before the first measurement.
    pub rtt_ms: Option<u32>,
    /// How many messages may be unacknowledged at a time.
    pub window: u32,
    /// How many messages are written and not acknowledged.
    pub in_flight: u32,
    /// How many messages wait to be written.
    pub backlog: u32,
    /// Their bytes.
    pub backlog_bytes: u64,
    /// How many objects differ and wait in the hub for room among the messages above.
    pub waiting: u64,
    /// Requests of the node that are not answered yet.
    pub requests: u32,
    /// Bytes of frames from the node, without TLS and IP; with QUIC the datagrams.
    pub bytes_in: u64,
    /// Bytes of frames to the node, likewise.
    pub bytes_out: u64,
    /// Messages from the node.
    pub messages_in: u64,
    /// Messages to the node.
    pub messages_out: u64,
    /// How long ago the last byte of the node came, in milliseconds.
    pub last_byte_ms_ago: u64,
    /// When the node's certificate expires, Unix seconds.
    pub certificate_not_after: i64,
    /// What both ends can do beyond KubeEdge; empty for a KubeEdge edge.
    pub capabilities: String,
}

/// A number that only grows, or that follows something; written by one task, read by others.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What has happened since the start, over all links.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// TLS and QUIC handshakes that came to nothing.
    pub(crate) handshakes_failed: Counter,
    pub(crate) accepted_websocket: Counter,
    pub(crate) accepted_quic: Counter,
    /// Told to come back later.
    pub(crate) refused_admission: Counter,
    /// Not who they say, revoked, or malformed.
    pub(crate) refused_identity: Counter,
    pub(crate) messages_in: Counter,
    pub(crate) messages_out: Counter,
    pub(crate) bytes_in: Counter,
    pub(crate) bytes_out: Counter,
    /// What was no message.
    pub(crate) junk: Counter,
    /// Cut off, because too much of it came.
    pub(crate) cut_for_junk: Counter,
    pub(crate) over_bound: Counter,
    /// How often reading from a node was stopped for a while.
    pub(crate) slowed: Counter,
    pub(crate) silent: Counter,
    pub(crate) slow_readers: Counter,
}

/// One session's numbers.
#[derive(Debug)]
pub(crate) struct LinkState {
    pub(crate) node: Arc<str>,
    pub(crate) kind: Kind,
    pub(crate) capabilities: Capabilities,
    since_ms: i64,
    peer: Mutex<SocketAddr>,
    not_after_s: AtomicI64,
    rtt_ms: AtomicU32,
    window: AtomicU32,
    in_flight: AtomicU32,
    backlog: AtomicU32,
    requests: AtomicU32,
    backlog_bytes: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    messages_in: AtomicU64,
    messages_out: AtomicU64,
    last_byte_ms: AtomicI64,
}

/// No round trip was measured yet.
const NO_RTT: u32 = u32::MAX;

/// The numbers that a session writes at once.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Numbers {
    pub(crate) rtt: Option<Duration>,
    pub(crate) in_flight: usize,
    pub(crate) backlog: usize,
    pub(crate) backlog_bytes: usize,
    pub(crate) requests: usize,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    pub(crate) messages_in: u64,
    pub(crate) messages_out: u64,
}

impl LinkState {
    pub(crate) fn new(
        node: Arc<str>,
        kind: Kind,
        peer: SocketAddr,
        capabilities: Capabilities,
        window: usize,
        not_after_s: i64,
        now_ms: i64,
    ) -> Self {
        Self {
            node,
            kind,
            capabilities,
            since_ms: now_ms,
            peer: Mutex::new(peer),
            not_after_s: AtomicI64::new(not_after_s),
            rtt_ms: AtomicU32::new(NO_RTT),
            window: AtomicU32::new(count(window)),
            in_flight: AtomicU32::new(0),
            backlog: AtomicU32::new(0),
            requests: AtomicU32::new(0),
            backlog_bytes: AtomicU64::new(0),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            messages_in: AtomicU64::new(0),
            messages_out: AtomicU64::new(0),
            last_byte_ms: AtomicI64::new(now_ms),
        }
    }

    pub(crate) fn heard(&self, now_ms: i64) {
        self.last_byte_ms.store(now_ms, Ordering::Relaxed);
    }

    pub(crate) fn moved(&self, peer: SocketAddr) {
        *self.peer.lock().unwrap_or_else(PoisonError::into_inner) = peer;
    }

    pub(crate) fn certificate(&self, not_after_s: i64) {
        self.not_after_s.store(not_after_s, Ordering::Relaxed);
    }

    /// Writes the session's numbers, and adds what is new to the sums.
    pub(crate) fn write(&self, numbers: &Numbers, sums: &Counters) {
        if let Some(rtt) = numbers.rtt {
            let rtt_ms = u32::try_from(rtt.as_millis()).unwrap_or(NO_RTT - 1).min(NO_RTT - 1);
            self.rtt_ms.store(rtt_ms, Ordering::Relaxed);
        }
        self.in_flight.store(count(numbers.in_flight), Ordering::Relaxed);
        self.backlog.store(count(numbers.backlog), Ordering::Relaxed);
        self.backlog_bytes.store(numbers.backlog_bytes as u64, Ordering::Relaxed);
        self.requests.store(count(numbers.requests), Ordering::Relaxed);
        for (link, now, sum) in [
            (&self.bytes_in, numbers.bytes_in, &sums.bytes_in),
            (&self.bytes_out, numbers.bytes_out, &sums.bytes_out),
            (&self.messages_in, numbers.messages_in, &sums.messages_in),
            (&self.messages_out, numbers.messages_out, &sums.messages_out),
        ] {
            let before = link.swap(now, Ordering::Relaxed);
            if now != before {
                sum.add(now.saturating_sub(before));
            }
        }
    }

    fn info(&self, now_ms: i64) -> LinkInfo {
        let rtt_ms = self.rtt_ms.load(Ordering::Relaxed);
        let ago = now_ms.saturating_sub(self.last_byte_ms.load(Ordering::Relaxed));
        LinkInfo {
            node: self.node.to_string(),
            transport: self.kind.name(),
            peer: *self.peer.lock().unwrap_or_else(PoisonError::into_inner),
            since: self.since_ms,
            rtt_ms: (rtt_ms != NO_RTT).then_some(rtt_ms),
            window: self.window.load(Ordering::Relaxed),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            backlog: self.backlog.load(Ordering::Relaxed),
            backlog_bytes: self.backlog_bytes.load(Ordering::Relaxed),
            waiting: 0,
            requests: self.requests.load(Ordering::Relaxed),
            bytes_in: self.bytes_in.load(Ordering::Relaxed),
            bytes_out: self.bytes_out.load(Ordering::Relaxed),
            messages_in: self.messages_in.load(Ordering::Relaxed),
            messages_out: self.messages_out.load(Ordering::Relaxed),
            last_byte_ms_ago: u64::try_from(ago).unwrap_or(0),
            certificate_not_after: self.not_after_s.load(Ordering::Relaxed),
            capabilities: self.capabilities.to_string(),
        }
    }
}

fn count(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Every link that is up. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Links {
    list: Arc<Mutex<List>>,
    pub(crate) counters: Arc<Counters>,
}

#[derive(Default)]
struct List {
    next: u64,
    links: HashMap<u64, Arc<LinkState>>,
    /// How many links that are good for more than a renewal each node has.
    by_node: HashMap<Arc<str>, u32>,
}

/// A place in the list, until it is dropped.
pub(crate) struct Listed {
    links: Links,
    number: u64,
    full: bool,
    pub(crate) state: Arc<LinkState>,
}

impl Links {
    pub(crate) fn enter(&self, state: LinkState, full: bool) -> Listed {
        let state = Arc::new(state);
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.next += 1;
        let number = list.next;
        list.links.insert(number, Arc::clone(&state));
        if full {
            *list.by_node.entry(Arc::clone(&state.node)).or_default() += 1;
        }
        Listed { links: self.clone(), number, full, state }
    }

    /// Whether a node has a link that is good for more than a renewal.
    pub(crate) fn has(&self, node: &str) -> bool {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.by_node.contains_key(node)
    }

    /// Whether a node has a link that says more than KubeEdge's do.
    pub(crate) fn is_own(&self, node: &str) -> bool {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let own = |link: &Arc<LinkState>| {
            *link.node == *node && link.capabilities != Capabilities::default()
        };
        list.links.values().any(own)
    }

    /// What both ends of a node's link can do; of its newest link that is good for more than a renewal.
    pub(crate) fn capabilities(&self, node: &str) -> Option<Capabilities> {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.by_node.get(node)?;
        let of_node = list.links.iter().filter(|(_, link)| *link.node == *node);
        of_node.max_by_key(|(number, _)| **number).map(|(_, link)| link.capabilities)
    }

    /// All links, by node name, with what the hub has for each.
    pub(crate) async fn with_waiting(&self, hub: &Hub) -> Vec<LinkInfo> {
        let mut infos = self.infos();
        for info in &mut infos {
            let backlog = hub.backlog(&info.node).await;
            info.waiting = backlog.map_or(0, |backlog| backlog.waiting as u64);
        }
        infos
    }

    /// All links, by node name.
    fn infos(&self) -> Vec<LinkInfo> {
        let now_ms = jiff::Timestamp::now().as_millisecond();
        let states: Vec<_> = {
            let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
            list.links.values().map(Arc::clone).collect()
        };
        let mut infos: Vec<_> = states.iter().map(|state| state.info(now_ms)).collect();
        infos.sort_by(|a, b| (&a.node, a.since).cmp(&(&b.node, b.since)));
        infos
    }

    fn metrics(&self) -> String {
        let infos = self.infos();
        let sum = |of: fn(&LinkInfo) -> u64| infos.iter().map(of).sum::<u64>();
        let on = |name: &str| infos.iter().filter(|link| link.transport == name).count() as u64;
        let own = infos.iter().filter(|link| !link.capabilities.is_empty()).count() as u64;
        let all = &self.counters;
        let mut text = String::new();
        let mut put = |name: &str, kind: &str, help: &str, values: &[(&str, u64)]| {
            let _ = writeln!(text, "# HELP skerry_{name} {help}\n# TYPE skerry_{name} {kind}");
            for (labels, value) in values {
                let _ = writeln!(text, "skerry_{name}{labels} {value}");
            }
        };
        put(
            "connected_nodes",
            "gauge",
            "Links that are up.",
            &[
                ("{transport=\"websocket\"}", on(Kind::WebSocket.name())),
                ("{transport=\"quic\"}", on(Kind::Quic.name())),
            ],
        );
        put("connected_own_nodes", "gauge", "Links to nodes that are no KubeEdge.", &[("", own)]);
        put(
            "in_flight_messages",
            "gauge",
            "Messages written and not acknowledged.",
            &[("", sum(|link| link.in_flight.into()))],
        );
        put(
            "backlog_messages",
            "gauge",
            "Messages that wait to be written.",
            &[("", sum(|link| link.backlog.into()))],
        );
        put(
            "backlog_bytes",
            "gauge",
            "Bytes of messages that wait to be written.",
            &[("", sum(|link| link.backlog_bytes))],
        );
        put(
            "waiting_requests",
            "gauge",
            "Requests of nodes that are not answered yet.",
            &[("", sum(|link| link.requests.into()))],
        );
        put(
            "connections_total",
            "counter",
            "Links that came up.",
            &[
                ("{transport=\"websocket\"}", all.accepted_websocket.get()),
                ("{transport=\"quic\"}", all.accepted_quic.get()),
            ],
        );
        put(
            "rejected_connections_total",
            "counter",
            "Connections that did not become links.",
            &[
                ("{reason=\"handshake\"}", all.handshakes_failed.get()),
                ("{reason=\"admission\"}", all.refused_admission.get()),
                ("{reason=\"identity\"}", all.refused_identity.get()),
            ],
        );
        put(
            "cut_links_total",
            "counter",
            "Links that the hub ended because of what the node did.",
            &[
                ("{reason=\"junk\"}", all.cut_for_junk.get()),
                ("{reason=\"bound\"}", all.over_bound.get()),
                ("{reason=\"silent\"}", all.silent.get()),
                ("{reason=\"slow\"}", all.slow_readers.get()),
            ],
        );
        let (out, into) = (all.messages_out.get(), all.messages_in.get());
        put(
            "messages_total",
            "counter",
            "Messages by direction.",
            &[("{direction=\"down\"}", out), ("{direction=\"up\"}", into)],
        );
        let (out, into) = (all.bytes_out.get(), all.bytes_in.get());
        put(
            "bytes_total",
            "counter",
            "Bytes of frames by direction.",
            &[("{direction=\"down\"}", out), ("{direction=\"up\"}", into)],
        );
        put(
            "unreadable_messages_total",
            "counter",
            "Messages of nodes that were no messages.",
            &[("", all.junk.get())],
        );
        put(
            "slowed_total",
            "counter",
            "How often reading from a node was stopped for a while.",
            &[("", all.slowed.get())],
        );
        text
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut list = self.links.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.links.remove(&self.number);
        if self.full
            && let Some(count) = list.by_node.get_mut(&self.state.node)
        {
            *count -= 1;
            if *count == 0 {
                list.by_node.remove(&self.state.node);
            }
        }
    }
}

/// Serves `GET /links`, `GET /metrics` and what devices were (`GET /nodes/<node>/history/<namespace>/<device>?…`)
/// until `stop`.
pub(crate) async fn serve(
    socket: TcpListener,
    links: Links,
    hub: Hub,
    streams: Streams,
    stop: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = Arc::clone(&places).acquire_owned().await.expect("never closed");
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = socket.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(200)).await;
            continue;
        };
        let (links, hub, stop) = (links.clone(), hub.clone(), stop.clone());
        let streams = streams.clone();
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(|request: Request<Incoming>| {
                let (links, hub, streams) = (links.clone(), hub.clone(), streams.clone());
                async move { Ok::<_, Infallible>(answer(&request, &links, &hub, &streams).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(REQUEST_MAX)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = stop.cancelled() => {}
                _ = tokio::time::timeout(REQUEST_MAX + ANSWER_MAX, connection) => {}
            }
        });
    }
}

async fn answer(
    request: &Request<Incoming>,
    links: &Links,
    hub: &Hub,
    streams: &Streams,
) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET".into());
    }
    match request.uri().path() {
        "/links" => {
            let body = serde_json::to_string(&links.with_waiting(hub).await).expect("string keys");
            text(StatusCode::OK, "application/json", body)
        }
        "/metrics" => {
            let of_hub = hub.metrics().await.map(|metrics| metrics.to_string());
            let body = links.metrics() + &of_hub.unwrap_or_default();
            text(StatusCode::OK, "text/plain; version=0.0.4", body)
        }
        path => match history_of(path) {
            Some((node, device)) => {
                let query = request.uri().query().unwrap_or_default();
                history(streams, node, &format!("{HISTORY_PATH}{device}?{query}")).await
            }
            None => {
                let all = "there are /links, /metrics and /nodes/<node>/history/<namespace>/<device> here";
                text(StatusCode::NOT_FOUND, "text/plain", all.into())
            }
        },
    }
}

/// Node, and namespace with device, of a path about what a device was.
fn history_of(path: &str) -> Option<(&str, &str)> {
    let (node, device) = path.strip_prefix("/nodes/")?.split_once("/history/")?;
    let (namespace, name) = device.split_once('/')?;
    let plain = |segment: &str| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
        !segment.is_empty() && segment.bytes().all(allowed)
    };
    [node, namespace, name].into_iter().all(plain).then_some((node, device))
}

/// Asks a node what a device was, and passes on its answer.
async fn history(streams: &Streams, node: &str, path_and_query: &str) -> Response<Full<Bytes>> {
    let fault = |status, error: String| text(status, "text/plain", error);
    let ask = async {
        let mut stream = match streams.open(node, path_and_query).await {
            Ok(stream) => stream,
            Err(error @ StreamError::NotConnected { .. }) => {
                return fault(StatusCode::SERVICE_UNAVAILABLE, error.to_string());
            }
            Err(error) => return fault(StatusCode::BAD_GATEWAY, error.to_string()),
        };
        let mut bytes = Vec::new();
        while let Some(part) = stream.next().await {
            match part {
                Ok(part) if bytes.len() + part.len() <= HISTORY_LEN_MAX => bytes.extend(&part),
                Ok(_) => {
                    let error = format!("the answer of node `{node}` is too long");
                    return fault(StatusCode::BAD_GATEWAY, error);
                }
                Err(error) => {
                    let error = format!("the answer of node `{node}` was cut off: {error}");
                    return fault(StatusCode::BAD_GATEWAY, error);
                }
            }
        }
        text(StatusCode::OK, "application/json", String::from_utf8_lossy(&bytes).into_owned())
    };
    tokio::time::timeout(ANSWER_MAX, ask).await.unwrap_or_else(|_| {
        fault(StatusCode::GATEWAY_TIMEOUT, format!("node `{node}` did not answer in time"))
    })
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    let kind = http::HeaderValue::from_static(kind);
    answer.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    answer
}
