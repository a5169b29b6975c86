//! Certificates for nodes: issued at the end of an enrolment, renewed there or on the live link.
//!
//! [`Issuing`] is the one place where a request for a certificate is checked and signed. [`Renewals`] speaks the
//! exchange of `protocol/src/certificate.rs`; a session hands it every upstream message of
//! `skerry/certificate/<node>` and `skerry/bundle/<node>`, and sends what [`Renewals::bundle`] has for its node after
//! connecting and whenever [`Renewals::bundle_changes`] wakes.
//!
//! An edge confirms a bundle by querying `skerry/bundle/<node>` with the bundle that it has stored.

use crate::authority::{Authority, bundle_fingerprint};
use crate::gate::Gate;
use crate::tls;
use jiff::Timestamp;
use rcgen::{CertificateSigningRequestParams, SubjectPublicKeyInfo};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use sha2::{Digest, Sha256};
use skerry_cloudcore_core::enrol::{self, EnrolError, KeyKind};
use skerry_cloudcore_core::identity::{Peer, hex};
use skerry_protocol::certificate::{
    Bundle, CertificateReply, CertificateRequest, Der, bundle_node, bundle_resource, request_node,
};
use skerry_protocol::{Message, Operation};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509CertificationRequest};
use x509_parser::public_key::PublicKey;

/// Life of a certificate for our own edges, which renew it on the link when 50 to 70 % have gone by.
pub const NODE_CERTIFICATE_TTL: Duration = Duration::from_secs(30 * 86_400);
/// Life of a certificate for KubeEdge's edges, its `edgeCertSigningDuration`.
pub(crate) const KUBEEDGE_CERTIFICATE_TTL: Duration = Duration::from_secs(365 * 86_400);
/// The shortest life that is issued: less than the time that a renewal may take to succeed would cut nodes off.
pub(crate) const CERTIFICATE_TTL_MIN: Duration = Duration::from_secs(10);
/// Sender of our answers and pushes; KubeEdge has no module for this.
const SOURCE: &str = "edgecontroller";
const GROUP: &str = "resource";

/// Checks requests and signs certificates.
#[derive(Clone)]
pub(crate) struct Issuing {
    authority: Arc<Authority>,
    gate: Gate,
    ttl: Duration,
}

/// A certificate request that is well formed and is for the node that asks.
pub(crate) struct Checked {
    node: String,
    key: SubjectPublicKeyInfo,
    /// Of its key, hex.
    pub(crate) key_fingerprint: String,
}

/// Who asks, which decides how long the certificate lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Edge {
    /// Renews over the link.
    Ours,
    /// Renews over HTTPS, late.
    KubeEdge,
}

impl Issuing {
    /// `ttl` is the life of certificates for our own edges, at least [`CERTIFICATE_TTL_MIN`].
    pub(crate) fn new(authority: Arc<Authority>, gate: Gate, ttl: Duration) -> Self {
        Self { authority, gate, ttl: ttl.max(CERTIFICATE_TTL_MIN) }
    }

    /// Checks a PKCS#10 request (DER) of `node`: signature, subject, kind of key, and that no other node has that key.
    ///
    /// # Errors
    ///
    /// [`EnrolError::Request`] and [`EnrolError::KeyOfAnother`].
    pub(crate) fn check(&self, node: &str, der: &[u8]) -> Result<Checked, EnrolError> {
        let refuse = |reason: String| EnrolError::Request { node: node.into(), reason };
        let (rest, request) = X509CertificationRequest::from_der(der)
            .map_err(|error| refuse(format!("the body is no CSR in DER: {error}")))?;
        if !rest.is_empty() {
            return Err(refuse(format!("{} bytes follow the CSR", rest.len())));
        }
        let subject = tls::subject_of(&request.certification_request_info.subject);
        enrol::check_request(&subject, node)?;
        let public = &request.certification_request_info.subject_pki;
        let kind = match public.parsed() {
            Ok(PublicKey::RSA(key)) => KeyKind::Rsa { bits: key.key_size() },
            Ok(PublicKey::EC(point)) => KeyKind::Ec { bits: point.key_size() },
            _ => {
                let ed25519 =
                    public.algorithm.algorithm == x509_parser::oid_registry::OID_SIG_ED25519;
                if ed25519 { KeyKind::Ed25519 } else { KeyKind::Other }
            }
        };
        enrol::check_key_kind(kind, node)?;
        // Reads it once more, checks the signature, and knows the extensions that a request may have.
        CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der))
            .map_err(|error| refuse(format!("the CSR: {error}")))?;
        let key = SubjectPublicKeyInfo::from_der(public.raw)
            .map_err(|error| refuse(format!("the key of the CSR: {error}")))?;
        let fingerprint = Sha256::digest(public.raw).into();
        self.gate.check_key(node, &fingerprint)?;
        Ok(Checked { node: node.into(), key, key_fingerprint: hex(&fingerprint) })
    }

    /// Signs a checked request and records the certificate. `joined` when a token was the reason. Returns the
    /// certificate, and the identity that it proves.
    ///
    /// # Errors
    ///
    /// [`EnrolError::Cluster`]; no certificate is handed out then.
    pub(crate) async fn issue(
        &self,
        request: &Checked,
        edge: Edge,
        joined: bool,
    ) -> Result<(CertificateDer<'static>, Peer), EnrolError> {
        let node = &request.node;
        let failed = |reason: String| EnrolError::Cluster { node: node.clone(), reason };
        let ttl = match edge {
            Edge::Ours => self.ttl,
            Edge::KubeEdge => KUBEEDGE_CERTIFICATE_TTL,
        };
        let issued = self.authority.issue(node, &request.key, ttl);
        let issued = issued.map_err(|error| failed(error.to_string()))?;
        let identity = tls::peer(&self.authority, Some(std::slice::from_ref(&issued)))
            .expect("certificates that we issue name a node");
        self.gate
            .record_issue(&identity, joined)
            .await
            .map_err(|error| failed(format!("could not record the certificate: {error}")))?;
        Ok((issued, identity))
    }
}

/// Answers nodes that renew on the link.
#[derive(Clone)]
pub(crate) struct Renewals {
    issuing: Issuing,
}

impl Renewals {
    pub(crate) fn new(issuing: Issuing) -> Self {
        Self { issuing }
    }

    /// Whether an upstream message is for [`Self::answer`].
    pub(crate) fn is_for(message: &Message) -> bool {
        let resource = message.route.resource.as_str();
        request_node(resource).is_some() || bundle_node(resource).is_some()
    }

    /// Answers a request of the node that `peer` names. With a new certificate comes the identity that it proves, which
    /// is the session's from then on: its end is the session's end, and a revocation of the old one no longer its
    /// business. A session that was there only to renew may be closed after the answer has left, so that the node dials
    /// with the new certificate.
    pub(crate) async fn answer(&self, peer: &Peer, message: &Message) -> (Message, Option<Peer>) {
        let resource = message.route.resource.as_str();
        let now_ms = Timestamp::now().as_millisecond();
        let refuse = |text: &str| message.error(now_ms, SOURCE, GROUP, text);
        if message.operation() != Some(Operation::Query) {
            return (refuse("only `query` is known here"), None);
        }
        // Looked at again: the decision may be newer than the connection.
        if let Err(refusal) = self.issuing.gate.check(peer) {
            return (refuse(&format!("{refusal}\nhint: {}", refusal.hint())), None);
        }
        if let Some(node) = request_node(resource).filter(|node| *node == peer.node) {
            return match self.renew(node, message).await {
                Ok((reply, identity)) => {
                    let not_after_s = identity.not_after_s;
                    tracing::info!(node, not_after_s, "node certificate renewed on the link");
                    (respond(message, now_ms, &reply), Some(identity))
                }
                Err(error) => {
                    tracing::warn!(node, %error, "node certificate not renewed on the link");
                    (refuse(&error.body()), None)
                }
            };
        }
        if let Some(node) = bundle_node(resource).filter(|node| *node == peer.node) {
            let Ok(stored) = message.content_as::<Bundle>() else {
                return (refuse("the body is no bundle"), None);
            };
            let fingerprints = stored.bundle.iter().map(|der| Sha256::digest(&der.0).into());
            let stored = bundle_fingerprint(fingerprints);
            if self.issuing.gate.confirmed_bundle(node).as_ref() != Some(&stored)
                && let Err(error) = self.issuing.gate.record_bundle(node, &stored).await
            {
                tracing::warn!(node, %error, "could not record the trust bundle of the node");
                return (refuse("the confirmation could not be recorded"), None);
            }
            return (respond(message, now_ms, &self.bundle_in_force()), None);
        }
        (refuse(&format!("the resource is not of node `{}`", peer.node)), None)
    }

    async fn renew(
        &self,
        node: &str,
        message: &Message,
    ) -> Result<(CertificateReply, Peer), EnrolError> {
        let refuse = |reason: String| EnrolError::Request { node: node.into(), reason };
        let CertificateRequest { csr } =
            message.content_as().map_err(|error| refuse(crate::authority::chain(&error)))?;
        let checked = self.issuing.check(node, &csr.0)?;
        let (certificate, identity) = self.issuing.issue(&checked, Edge::Ours, false).await?;
        let bundle = self.bundle_in_force().bundle;
        Ok((CertificateReply { certificate: Der(certificate.to_vec()), bundle }, identity))
    }

    fn bundle_in_force(&self) -> Bundle {
        let bundle = self.issuing.authority.state().bundle();
        Bundle { bundle: bundle.iter().map(|der| Der(der.to_vec())).collect() }
    }

    /// The push of the CAs in force for a node that announced `renew`; `None` when it has confirmed them.
    pub(crate) fn bundle(&self, node: &str) -> Option<Message> {
        let state = self.issuing.authority.state();
        if self.issuing.gate.confirmed_bundle(node).as_ref() == Some(&state.bundle_fingerprint()) {
            return None;
        }
        let now_ms = Timestamp::now().as_millisecond();
        let resource = bundle_resource(node);
        Some(Message::new(
            now_ms,
            SOURCE,
            GROUP,
            Operation::Update,
            resource,
            &self.bundle_in_force(),
        ))
    }

    /// A push that asks a node to renew now: it holds an expired certificate and does not know, as its clock may be
    /// wrong.
    pub(crate) fn demand(&self, node: &str) -> Message {
        let now_ms = Timestamp::now().as_millisecond();
        let resource = skerry_protocol::certificate::request_resource(node);
        Message::new(now_ms, SOURCE, GROUP, Operation::Update, resource, &())
    }

    /// Wakes when the CAs in force change.
    pub(crate) fn bundle_changes(&self) -> watch::Receiver<u64> {
        self.issuing.authority.trust_changes()
    }
}

fn respond<T: serde::Serialize>(message: &Message, now_ms: i64, content: &T) -> Message {
    let mut answer = message.response(now_ms, content);
    answer.route.source = SOURCE.into();
    answer.route.group = GROUP.into();
    answer
}
