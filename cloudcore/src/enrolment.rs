//! The enrolment listener: CA certificate, node certificates, whether a node exists, reports of node jobs, and versions of
//! the appliance's OS ([`os`]).
//!
//! Paths, methods and texts are KubeEdge's, so that `keadm join` and Go EdgeCore work with it. A certificate is given
//! for a join token, or for the node's current certificate, which may have expired (amnesty, [`crate::gate`]). The
//! header with wished key usages is not read: a node's certificate is for clients only.
//!
//! Reports of jobs come without any proof of their sender, as `keadm` sends none; [`JobReport::certified`] says when
//! there was one, and what becomes of the others is for whoever takes the reports.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/cloudhub/servers/httpserver.

use crate::authority::Authority;
use crate::gate::Gate;
use crate::renewal::{Edge, Issuing};
use crate::{os, tls, token};
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use rustls_pki_types::CertificateDer;
use serde_json::Value;
use skerry_cloudcore_core::enrol::{self, EnrolError, TokenKind};
use skerry_protocol::capability::{self, Capabilities};
use skerry_protocol::enrol::{CA_PATH, CERTIFICATE_PATH, NODE_NAME_HEADER, REQUEST_LEN_MAX};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

/// The largest report of a job, in bytes; KubeEdge's.
const REPORT_LEN_MAX: usize = 3 * 1024 * 1024;
/// A connection may not take longer than this as a whole; joining takes two short requests.
const CONNECTION_MAX: Duration = Duration::from_secs(60);
/// The same for a node with a certificate that counts, which may be fetching an OS over a thin line.
const NODE_CONNECTION_MAX: Duration = Duration::from_secs(3600);

/// What a node, or `keadm` on it, reports about a job over HTTPS.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct JobReport {
    /// `nodeupgrade` for the older of the two paths, otherwise the kind in the path.
    pub(crate) kind: String,
    /// The job. KubeEdge's listener loses it on the older path, where it is `UpgradeID` of the body.
    pub(crate) job: String,
    /// The node.
    pub(crate) node: String,
    /// The node whose valid certificate the sender showed, if it did.
    pub(crate) certified: Option<String>,
    /// The body, JSON.
    pub(crate) body: Value,
}

/// Takes reports of jobs. An error is a text for the sender, who gets status 400.
pub(crate) trait JobReports: Send + Sync + 'static {
    fn report(&self, report: JobReport) -> BoxFuture<'_, Result<(), String>>;
}

/// Serves the connections of the enrolment listener.
#[derive(Clone)]
pub(crate) struct Enrolment(Arc<Inner>);

/// What an [`Enrolment`] needs.
pub(crate) struct Inner {
    pub(crate) client: kube::Client,
    pub(crate) authority: Arc<Authority>,
    pub(crate) gate: Gate,
    pub(crate) issuing: Issuing,
    /// Whether KubeEdge's shared token is accepted.
    pub(crate) shared_token: bool,
    /// Where reports of jobs go; without it they are answered 501.
    pub(crate) jobs: Option<Arc<dyn JobReports>>,
    /// Versions of the appliance's OS; without it there are none.
    pub(crate) os: Option<os::Store>,
    pub(crate) stop: CancellationToken,
}

type Answer = Response<Full<Bytes>>;

/// What is asked, from method and path.
#[derive(Debug, PartialEq, Eq)]
enum Ask<'a> {
    Ca,
    Certificate,
    Node(&'a str),
    NodeUpgrade,
    Task { kind: &'a str, job: &'a str, node: &'a str },
}

impl<'a> Ask<'a> {
    /// The question and the method that it takes.
    fn of_path(path: &'a str) -> Option<(Self, Method)> {
        let segments: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
        Some(match segments[..] {
            _ if path == CA_PATH => (Self::Ca, Method::GET),
            _ if path == CERTIFICATE_PATH => (Self::Certificate, Method::GET),
            ["node", name] => (Self::Node(name), Method::GET),
            ["nodeupgrade"] => (Self::NodeUpgrade, Method::POST),
            ["task", kind, "name", job, "node", node, "status"] => {
                (Self::Task { kind, job, node }, Method::POST)
            }
            _ => return None,
        })
    }
}

impl Enrolment {
    pub(crate) fn new(inner: Inner) -> Self {
        Self(Arc::new(inner))
    }

    pub(crate) async fn serve(self, stream: TlsStream<TcpStream>, peer: SocketAddr) {
        let certificate = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|chain| chain.first())
            .map(|certificate| certificate.clone().into_owned());
        let stop = self.0.stop.clone();
        let limit = match self.certified(certificate.as_ref()) {
            Some(_) => NODE_CONNECTION_MAX,
            None => CONNECTION_MAX,
        };
        let service = service_fn(move |request| {
            let (enrolment, certificate) = (self.clone(), certificate.clone());
            async move {
                let answer = enrolment.answer(request, certificate.as_ref(), peer).await;
                Ok::<_, Infallible>(answer)
            }
        });
        let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(crate::listen::HANDSHAKE_TIMEOUT);
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(limit) => {}
            ended = connection => if let Err(error) = ended {
                tracing::debug!(%peer, %error, "an enrolment connection ended badly");
            },
        }
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
        certificate: Option<&CertificateDer<'_>>,
        peer: SocketAddr,
    ) -> Answer {
        let path = request.uri().path().to_owned();
        if path.split('/').nth(1) == Some(os::PREFIX) {
            return match (&self.0.os, self.certified(certificate)) {
                _ if request.method() != Method::GET => {
                    text(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed")
                }
                (_, None) => os::unknown_peer(),
                (None, Some(_)) => os::no_store(),
                (Some(store), Some(_)) => store.answer(&request).await,
            };
        }
        let Some((ask, method)) = Ask::of_path(&path) else {
            return text(StatusCode::NOT_FOUND, "404 page not found");
        };
        if *request.method() != method {
            return text(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed");
        }
        match ask {
            Ask::Ca => self.ca(request.uri().query()),
            Ask::Node(name) => self.node(name).await,
            Ask::NodeUpgrade | Ask::Task { .. } => {
                self.report(&ask, request, certificate).await.unwrap_or_else(|answer| answer)
            }
            Ask::Certificate => {
                let node =
                    header(request.headers(), NODE_NAME_HEADER).unwrap_or_default().to_owned();
                match self.certificate(request, certificate).await {
                    Ok(issued) => {
                        tracing::info!(node, %peer, "node certificate issued");
                        binary(&issued)
                    }
                    Err(error) => {
                        tracing::warn!(node, %peer, %error, "node certificate refused");
                        let status =
                            StatusCode::from_u16(error.status()).expect("one of our constants");
                        text(status, &error.body())
                    }
                }
            }
        }
    }

    /// The CA that new tokens name; with `?sha256=<hex>`, which our own edges send, the one of an older token while it
    /// is in force.
    fn ca(&self, query: Option<&str>) -> Answer {
        let state = self.0.authority.state();
        let wanted = query.and_then(|query| query.strip_prefix("sha256="));
        let der = wanted.and_then(|wanted| state.ca_with(wanted));
        binary(der.unwrap_or_else(|| state.active().der()))
    }

    async fn certificate(
        &self,
        request: Request<Incoming>,
        certificate: Option<&CertificateDer<'_>>,
    ) -> Result<CertificateDer<'static>, EnrolError> {
        let Inner { authority, gate, issuing, .. } = &*self.0;
        let (head, body) = request.into_parts();
        let node = enrol::node_name(header(&head.headers, NODE_NAME_HEADER))?.to_owned();
        // Who asks comes first; a stranger's body is not even read.
        let claims = match certificate {
            Some(certificate) => {
                tls::verify_client(authority, certificate)
                    .map_err(|reason| EnrolError::Certificate { node: node.clone(), reason })?;
                let subject = tls::subject(certificate).unwrap_or_default();
                enrol::check_renewal(&subject, &node)?;
                let peer = tls::peer(authority, Some(std::slice::from_ref(certificate)))
                    .expect("its subject names the node");
                // Expired and in amnesty is good enough here.
                gate.check(&peer)
                    .map_err(|refusal| EnrolError::Refused { node: node.clone(), refusal })?;
                None
            }
            None => {
                let jwt = enrol::bearer(header(&head.headers, "authorization"))?;
                let now_s = jiff::Timestamp::now().as_second();
                let claims = authority
                    .state()
                    .verify_token(jwt, now_s)
                    .map_err(|source| EnrolError::Jwt { source })?;
                enrol::token_kind(&claims, &node, self.0.shared_token)?;
                Some(claims)
            }
        };
        let refuse = |reason: String| EnrolError::Request { node: node.clone(), reason };
        let body = Limited::new(body, REQUEST_LEN_MAX).collect().await.map_err(|error| {
            refuse(if error.is::<LengthLimitError>() {
                format!("the request is over the bound of {REQUEST_LEN_MAX} bytes")
            } else {
                format!("the request did not arrive: {error}")
            })
        })?;
        let checked = issuing.check(&node, &body.to_bytes())?;
        if let Some(claims) = &claims {
            match enrol::token_kind(claims, &node, self.0.shared_token)? {
                TokenKind::Recorded(id) => {
                    let key = &checked.key_fingerprint;
                    token::redeem(&self.0.client, gate, id, &node, key).await?;
                }
                TokenKind::Shared => gate
                    .may_join(&node, None)
                    .map_err(|refusal| EnrolError::Barred { node: node.clone(), refusal })?,
            }
        }
        let capabilities = Capabilities::parse(header(&head.headers, capability::HEADER));
        let edge = if capabilities.renew { Edge::Ours } else { Edge::KubeEdge };
        let (issued, _) = issuing.issue(&checked, edge, claims.is_some()).await?;
        Ok(issued)
    }

    async fn report(
        &self,
        ask: &Ask<'_>,
        request: Request<Incoming>,
        certificate: Option<&CertificateDer<'_>>,
    ) -> Result<Answer, Answer> {
        let bad = |reason: &str| text(StatusCode::BAD_REQUEST, reason);
        let Some(jobs) = &self.0.jobs else {
            let reason = "this cloudcore takes no reports of node jobs over HTTPS";
            return Err(text(StatusCode::NOT_IMPLEMENTED, reason));
        };
        let certified = self.certified(certificate);
        let body = Limited::new(request.into_body(), REPORT_LEN_MAX).collect().await;
        let body = body.map_err(|error| bad(&format!("the report did not arrive: {error}")))?;
        let body: Value = serde_json::from_slice(&body.to_bytes())
            .map_err(|error| bad(&format!("the report is no JSON: {error}")))?;
        let field = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
        let (kind, job, node) = match ask {
            Ask::Task { kind, job, node } => {
                ((*kind).to_owned(), (*job).to_owned(), (*node).to_owned())
            }
            _ => ("nodeupgrade".to_owned(), field("UpgradeID"), field("NodeName")),
        };
        if job.is_empty() || enrol::node_name(Some(&node)).is_err() {
            return Err(bad("the report names no job, or no node"));
        }
        if certified.as_ref().is_some_and(|certified| *certified != node) {
            let reason = "the client certificate is another node's";
            return Err(text(StatusCode::FORBIDDEN, reason));
        }
        jobs.report(JobReport { kind, job, node, certified, body })
            .await
            .map_err(|reason| bad(&reason))?;
        Ok(text(StatusCode::OK, "ok"))
    }

    /// The node whose certificate this is, if it counts now.
    fn certified(&self, certificate: Option<&CertificateDer<'_>>) -> Option<String> {
        let certificate = certificate?;
        tls::verify_client(&self.0.authority, certificate).ok()?;
        let peer = tls::peer(&self.0.authority, Some(std::slice::from_ref(certificate)))?;
        self.0.gate.check(&peer).is_ok().then_some(peer.node)
    }

    async fn node(&self, name: &str) -> Answer {
        let nodes: Api<Node> = Api::all(self.0.client.clone());
        if enrol::node_name(Some(name)).is_err() {
            return text(StatusCode::NOT_FOUND, "Node not found");
        }
        match nodes.get_metadata_opt(name).await {
            Ok(Some(_)) => text(StatusCode::OK, "Node found"),
            Ok(None) => text(StatusCode::NOT_FOUND, "Node not found"),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn text(status: StatusCode, body: &str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body.to_owned())));
    *answer.status_mut() = status;
    let kind = http::HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    answer
}

fn binary(body: &[u8]) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::copy_from_slice(body)));
    let kind = http::HeaderValue::from_static("application/octet-stream");
    answer.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_kubeedge() {
        let check = |path: &str, expected: Option<(Ask<'_>, Method)>| {
            assert_eq!(Ask::of_path(path), expected, "{path}");
        };
        check("/ca.crt", Some((Ask::Ca, Method::GET)));
        check("/edge.crt", Some((Ask::Certificate, Method::GET)));
        check("/node/edge1", Some((Ask::Node("edge1"), Method::GET)));
        check("/nodeupgrade", Some((Ask::NodeUpgrade, Method::POST)));
        let task = Ask::Task { kind: "upgrade", job: "j", node: "n" };
        check("/task/upgrade/name/j/node/n/status", Some((task, Method::POST)));
        for other in ["", "/", "/node", "/node/a/b", "/task/upgrade/name/j", "/CA.crt"] {
            check(other, None);
        }
    }
}
