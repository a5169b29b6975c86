//! Who may open a link, and when: the door that both transports of the hub share.
//!
//! A connection is judged after TLS: by its certificate and what [`Gate`] says of that, by the node that it claims to
//! be, and by the rate at which links may come up ([`skerry_cloudcore_core::admission`]). A refused client is told why,
//! and one that has to wait is told for how long.

use crate::authority::Authority;
use crate::gate::Gate;
use crate::monitor::Counters;
use crate::session::{Opened, Shared};
use crate::tls::{self, Peer};
use crate::transport::Transport;
use crate::websocket::{self, OpenError, Refused};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use rand::Rng;
use rustls_pki_types::CertificateDer;
use skerry_cloudcore_core::admission::{Admission, Rate, Verdict, Visits};
use skerry_cloudcore_core::identity::{Refusal, Standing};
use skerry_protocol::capability::{self, Capabilities};
use skerry_protocol::message::UPSTREAM_LEN_MAX;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// The header with the wait in milliseconds; `Retry-After` has whole seconds.
pub(crate) const RETRY_AFTER_HEADER: &str = "skerry-retry-after-ms";
/// New links a second, and at once: 10,000 nodes that were cut are back in ten seconds. A full handshake takes less than
/// a millisecond of one core, a resumed one a third of that.
pub const RATE: Rate = Rate { per_s: 1000, burst: 2000 };
/// New links of one node. It needs one, and one more when it moves to a better transport.
const VISIT_RATE: Rate = Rate { per_s: 1, burst: 20 };
/// The beat that we announce; it only says that we know beats, the edge's value is in force.
const BEAT: Duration = Duration::from_secs(60);

/// Why a connection does not become a link.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Denied {
    #[error("header `node_id` is missing")]
    NoNode,
    #[error("the client certificate names no node")]
    NoIdentity,
    #[error("the client certificate is for node `{certificate}`, not for node `{node}`")]
    ForeignNode { certificate: String, node: String },
    #[error("header `ConnectionUse` is `{found}` instead of `msg`")]
    Use { found: String },
    #[error("{0}; {hint}", hint = .0.hint())]
    Refused(Refusal),
    #[error(
        "the certificate of node `{node}` has expired, and this edge does not renew on the link"
    )]
    CannotRenew { node: String },
    #[error("node `{node}` connects again and again; come back in {} ms", .wait.as_millis())]
    Often { node: String, wait: Duration },
    #[error("too many nodes connect at once; come back in {} ms", .0.as_millis())]
    Later(Duration),
}

impl Denied {
    /// How long to wait before the same connection can succeed.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Later(wait) | Self::Often { wait, .. } => Some(*wait),
            _ => None,
        }
    }

    pub(crate) fn into_answer(self) -> Refused {
        let status = match self {
            Self::NoIdentity
            | Self::ForeignNode { .. }
            | Self::CannotRenew { .. }
            | Self::Refused(_) => StatusCode::FORBIDDEN,
            Self::NoNode | Self::Use { .. } => StatusCode::BAD_REQUEST,
            Self::Later(_) | Self::Often { .. } => StatusCode::SERVICE_UNAVAILABLE,
        };
        let mut refused = Refused::new(status, self.to_string());
        if let Some(wait) = self.retry_after() {
            let seconds = wait.as_millis().div_ceil(1000) as u64;
            refused.headers.push((header::RETRY_AFTER, HeaderValue::from(seconds)));
            let name = HeaderName::from_static(RETRY_AFTER_HEADER);
            refused.headers.push((name, HeaderValue::from(wait.as_millis() as u64)));
        }
        refused
    }
}

/// The door of the hub.
pub(crate) struct Door {
    authority: Arc<Authority>,
    gate: Gate,
    admission: Mutex<Admission>,
    visits: Mutex<Visits>,
    counters: Arc<Counters>,
}

impl Door {
    pub(crate) fn new(
        authority: Arc<Authority>,
        gate: Gate,
        rate: Rate,
        counters: Arc<Counters>,
    ) -> Self {
        let admission = Mutex::new(Admission::new(rate, Instant::now()));
        let visits = Mutex::new(Visits::new(VISIT_RATE));
        Self { authority, gate, admission, visits, counters }
    }

    /// What the hub can do.
    pub(crate) fn capabilities(&self) -> Capabilities {
        Capabilities::ours(BEAT)
    }

    /// Judges a client by its certificate, the node that it says to be, and the rate of new links.
    pub(crate) fn judge(
        &self,
        certificates: Option<&[CertificateDer<'_>]>,
        node: Option<&str>,
        capabilities: Capabilities,
    ) -> Result<(Peer, Standing), Denied> {
        let judged = self.identify(certificates, node).and_then(|(peer, standing)| {
            if standing == Standing::RenewOnly && !capabilities.renew {
                return Err(Denied::CannotRenew { node: peer.node });
            }
            Ok((peer, standing))
        });
        let (peer, standing) = match judged {
            Ok(judged) => judged,
            Err(denied) => {
                self.counters.refused_identity.add(1);
                return Err(denied);
            }
        };
        let wait = {
            let mut visits = self.visits.lock().unwrap_or_else(PoisonError::into_inner);
            visits.visit(&peer.node, Instant::now())
        };
        if let Some(wait) = wait {
            self.counters.refused_admission.add(1);
            return Err(Denied::Often { node: peer.node, wait });
        }
        let verdict = {
            let mut admission = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
            admission.admit(Instant::now(), rand::rng().random())
        };
        match verdict {
            Verdict::Admitted => Ok((peer, standing)),
            Verdict::RetryAfter(wait) => {
                self.counters.refused_admission.add(1);
                Err(Denied::Later(wait))
            }
        }
    }

    /// What the gate says of a client that was let in before.
    pub(crate) fn standing(&self, peer: &Peer) -> Result<Standing, Refusal> {
        self.gate.check(peer)
    }

    /// Wakes when [`Self::standing`] may say something else than before.
    pub(crate) fn revocations(&self) -> tokio::sync::watch::Receiver<u64> {
        self.gate.revoked()
    }

    /// Judges a client by its certificate and its name alone.
    pub(crate) fn identify(
        &self,
        certificates: Option<&[CertificateDer<'_>]>,
        node: Option<&str>,
    ) -> Result<(Peer, Standing), Denied> {
        let node = node.filter(|node| !node.is_empty()).ok_or(Denied::NoNode)?;
        let peer = tls::peer(&self.authority, certificates).ok_or(Denied::NoIdentity)?;
        if peer.node != node {
            return Err(Denied::ForeignNode { certificate: peer.node, node: node.into() });
        }
        let standing = self.gate.check(&peer).map_err(Denied::Refused)?;
        Ok((peer, standing))
    }
}

/// Answers the opening request of the hub's WebSocket listener. `None` when the client is refused; it has been told.
pub(crate) async fn open(
    door: &Door,
    stream: TlsStream<TcpStream>,
    address: SocketAddr,
) -> Option<Opened> {
    let certificates = stream.get_ref().1.peer_certificates().map(<[_]>::to_vec);
    let check = |request: &http::Request<hyper::body::Incoming>| {
        greet(door, certificates.as_deref(), request.headers()).map_err(Denied::into_answer)
    };
    let opened = Box::pin(websocket::open(stream, UPSTREAM_LEN_MAX, check)).await;
    match opened {
        Ok((socket, (identity, standing, capabilities))) => Some(Opened {
            transport: Transport::WebSocket(Box::new(socket)),
            identity,
            standing,
            capabilities,
            address,
            place: None,
        }),
        // Thousands at once, and each comes back; the monitor counts them.
        Err(OpenError::Refused { status: StatusCode::SERVICE_UNAVAILABLE, text }) => {
            tracing::debug!(listener = "hub", peer = %address, reason = text, "connection put off");
            None
        }
        Err(error @ OpenError::Refused { .. }) => {
            tracing::warn!(listener = "hub", peer = %address, reason = %error, "connection refused");
            None
        }
        Err(error) => {
            door.counters.handshakes_failed.add(1);
            tracing::info!(listener = "hub", peer = %address, %error, "opening handshake failed");
            None
        }
    }
}

type Greeted = ((Peer, Standing, Capabilities), Vec<(HeaderName, HeaderValue)>);

/// Header names are compared without case; of a repeated header the first counts, as a KubeEdge edge adds
/// `ConnectionUse` again for each attempt.
fn greet(
    door: &Door,
    certificates: Option<&[CertificateDer<'_>]>,
    headers: &HeaderMap,
) -> Result<Greeted, Denied> {
    let value = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    match value("ConnectionUse") {
        Some("msg") => {}
        found => {
            door.identify(certificates, value("node_id"))?;
            return Err(Denied::Use { found: found.unwrap_or_default().into() });
        }
    }
    let announced = value(capability::HEADER);
    let ours = door.capabilities();
    let capabilities = Capabilities::parse(announced).and(ours);
    let (peer, standing) = door.judge(certificates, value("node_id"), capabilities)?;
    let mut answer = Vec::new();
    // A KubeEdge edge announces nothing and is told nothing.
    if announced.is_some() {
        let name = HeaderName::from_bytes(capability::HEADER.as_bytes()).expect("a name");
        let text = HeaderValue::from_str(&ours.to_string()).expect("names are ASCII");
        answer.push((name, text));
    }
    Ok(((peer, standing, capabilities), answer))
}

/// Serves one connection of the hub's WebSocket listener.
pub(crate) async fn serve(
    door: Arc<Door>,
    shared: Arc<Shared>,
    stream: TlsStream<TcpStream>,
    address: SocketAddr,
    mut place: crate::listen::Place,
) {
    if let Some(mut opened) = Box::pin(open(&door, stream, address)).await {
        place.opened();
        opened.place = Some(place);
        crate::session::spawn(&shared, opened);
    }
}
