//! The enrolment listener: CA certificate, node certificates, and whether a node exists.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/cloudhub/servers/httpserver.

use crate::authority::Authority;
use crate::{tls, token};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use rcgen::CertificateSigningRequestParams;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use sha2::{Digest, Sha256};
use skerry_cloudcore_core::enrol::{self, EnrolError};
use skerry_protocol::enrol::{
    CA_PATH, CERTIFICATE_PATH, Claims, NODE_NAME_HEADER, REQUEST_LEN_MAX,
};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer, X509CertificationRequest};

/// A connection may not take longer than this as a whole; joining takes two short requests.
const CONNECTION_MAX: Duration = Duration::from_secs(60);

/// Serves the connections of the enrolment listener.
#[derive(Clone)]
pub(crate) struct Enrolment {
    client: kube::Client,
    authority: Arc<Authority>,
    stop: CancellationToken,
}

type Answer = Response<Full<Bytes>>;

impl Enrolment {
    pub(crate) fn new(
        client: kube::Client,
        authority: Arc<Authority>,
        stop: CancellationToken,
    ) -> Self {
        Self { client, authority, stop }
    }

    pub(crate) async fn serve(self, stream: TlsStream<TcpStream>, peer: SocketAddr) {
        let certificate = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|chain| chain.first())
            .map(|certificate| certificate.clone().into_owned());
        let stop = self.stop.clone();
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
            () = tokio::time::sleep(CONNECTION_MAX) => {}
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
        let known = path == CA_PATH || path == CERTIFICATE_PATH || path.starts_with("/node/");
        if !known {
            return text(StatusCode::NOT_FOUND, "404 page not found");
        }
        if request.method() != Method::GET {
            return text(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed");
        }
        if path == CA_PATH {
            return binary(self.authority.ca_der());
        }
        if let Some(name) = path.strip_prefix("/node/") {
            return self.node(name).await;
        }
        let node = header(request.headers(), NODE_NAME_HEADER).unwrap_or_default().to_owned();
        match self.certificate(request, certificate).await {
            Ok(issued) => {
                tracing::info!(node, %peer, "node certificate issued");
                binary(&issued)
            }
            Err(error) => {
                tracing::warn!(node, %peer, %error, "node certificate refused");
                let status = StatusCode::from_u16(error.status()).expect("one of our constants");
                text(status, &error.body())
            }
        }
    }

    async fn certificate(
        &self,
        request: Request<Incoming>,
        certificate: Option<&CertificateDer<'_>>,
    ) -> Result<CertificateDer<'static>, EnrolError> {
        let (head, body) = request.into_parts();
        let node = enrol::node_name(header(&head.headers, NODE_NAME_HEADER))?.to_owned();
        // Who asks comes first; a stranger's body is not even read.
        let claims = match certificate {
            Some(certificate) => {
                tls::verify_client(&self.authority, certificate)
                    .map_err(|reason| EnrolError::Certificate { node: node.clone(), reason })?;
                let subject = tls::subject(certificate).unwrap_or_default();
                enrol::check_renewal(&subject, &node)?;
                None
            }
            None => {
                let jwt = enrol::bearer(header(&head.headers, "authorization"))?;
                let now_s = jiff::Timestamp::now().as_second();
                let claims = Claims::verify(jwt, now_s, self.authority.ca().hmac())
                    .map_err(|source| EnrolError::Jwt { source })?;
                enrol::token_id(&claims, &node)?;
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
        let der = body.to_bytes();
        let (_, parsed) = X509CertificationRequest::from_der(&der)
            .map_err(|error| refuse(format!("the body is no CSR in DER: {error}")))?;
        let subject = tls::subject_of(&parsed.certification_request_info.subject);
        enrol::check_request(&subject, &node)?;
        let key_fingerprint: String =
            Sha256::digest(parsed.certification_request_info.subject_pki.raw)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
        let csr =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(&*der))
                .map_err(|error| refuse(format!("the CSR: {error}")))?;
        if let Some(claims) = claims {
            let id = enrol::token_id(&claims, &node)?;
            token::redeem(&self.client, id, &node, &key_fingerprint).await?;
        }
        self.authority
            .issue(&node, &csr.public_key)
            .map_err(|error| EnrolError::Cluster { node: node.clone(), reason: error.to_string() })
    }

    async fn node(&self, name: &str) -> Answer {
        let nodes: Api<Node> = Api::all(self.client.clone());
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
