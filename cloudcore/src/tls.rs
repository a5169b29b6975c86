//! TLS for the listeners, and the identity in a peer's certificate.
//!
//! Every configuration made here looks at the [`Authority`]'s current state in each handshake: a new server
//! certificate, or another set of CAs, needs no restart and no new configuration.
//!
//! An expired certificate of the CA gets through the handshake; everything else about it is checked (chain, usage,
//! signature, possession of its key). Whether it is good for anything is for [`crate::gate::Gate`] to say, on each
//! connection and in words: an alert would tell the node nothing. A session that is resumed by ticket carries the
//! certificate that was shown first, so [`peer`] and the gate look at it again; tickets die when a CA goes.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/cloudhub/servers/server.go.

use crate::authority::Authority;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ProducesTickets, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use sha2::{Digest, Sha256};
use skerry_cloudcore_core::enrol::Subject;
pub(crate) use skerry_cloudcore_core::identity::Peer;
use skerry_cloudcore_core::identity::hex;
use skerry_protocol::enrol::{NODE_ORGANIZATION, node_of_common_name};
use std::fmt;
use std::sync::{Arc, RwLock};
use std::time::Duration;
use x509_parser::prelude::{FromDer, X509Certificate, X509Name};

/// ALPN of the WebSocket listeners. KubeEdge's edge offers none and speaks HTTP/1.1.
pub(crate) const ALPN_WEBSOCKET: &[&[u8]] = &[b"http/1.1"];
/// ALPN of the enrolment listener.
pub(crate) const ALPN_ENROLMENT: &[&[u8]] = &[b"h2", b"http/1.1"];

/// What a listener asks of its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clients {
    /// A certificate of a CA in force, or no connection.
    Required,
    /// A certificate may be shown; only the proof of its key is checked in the handshake, so that a bad one gets an
    /// answer in words ([`verify_client`]).
    VerifiedLater,
}

/// Why there is no TLS configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The CA certificate, the server certificate or its key is of no use.
    #[error("certificates are of no use for TLS")]
    Certificates(#[source] rustls::Error),
    /// No verifier for client certificates.
    #[error("the CA certificate cannot verify clients")]
    Verifier(#[source] rustls::server::VerifierBuilderError),
}

/// A configuration for a listener, also for one of QUIC.
///
/// `alpn` is what the listener speaks, best first; a client that offers none is served all the same. Resumption is by
/// ticket, so that an idle hub keeps nothing per client; tickets of one listener are worth nothing at another.
///
/// # Errors
///
/// [`TlsError`] when the TLS library refuses its own defaults.
pub(crate) fn server_config(
    authority: &Arc<Authority>,
    clients: Clients,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = provider();
    let verifier = DynamicVerifier {
        authority: Arc::clone(authority),
        clients,
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Certificates)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(CurrentCertificate(Arc::clone(authority))));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    match clients {
        // One ticket: a node dials again once at a time, and a ticket carries the whole client certificate.
        Clients::Required => {
            config.ticketer = Arc::new(Tickets::new(Arc::clone(authority))?);
            config.send_tls13_tickets = 1;
        }
        // A ticket would carry a certificate that was never verified.
        Clients::VerifiedLater => config.send_tls13_tickets = 0,
    }
    Ok(Arc::new(config))
}

/// Checks a client certificate against the CAs, as a listener with [`Clients::Required`] does.
pub(crate) fn verify_client(
    authority: &Authority,
    certificate: &CertificateDer<'_>,
) -> Result<(), String> {
    let verified = verify_without_end(authority, certificate, &[], UnixTime::now());
    verified.map(|_| ()).map_err(|error| error.to_string())
}

/// The identity in the certificates of a connection, for `peer_certificates()` of rustls and for quinn's
/// `peer_identity()`; `None` when they name no node.
///
/// The certificate has been verified when the connection is one of a listener with [`Clients::Required`].
pub(crate) fn peer(
    authority: &Authority,
    certificates: Option<&[CertificateDer<'_>]>,
) -> Option<Peer> {
    let der = certificates?.first()?;
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = subject_of(certificate.subject());
    let node = node_of_common_name(subject.common_name.as_deref()?)?;
    if !subject.organizations.iter().any(|name| name == NODE_ORGANIZATION) {
        return None;
    }
    let not_after_s = certificate.validity().not_after.timestamp();
    Some(Peer {
        node: node.to_owned(),
        serial: hex(certificate.raw_serial()),
        not_before_s: certificate.validity().not_before.timestamp(),
        not_after_s,
        expired: not_after_s < jiff::Timestamp::now().as_second(),
        key_fingerprint: Sha256::digest(certificate.public_key().raw).into(),
        issuer: authority.state().issuer_of(&certificate),
    })
}

/// The names in a certificate.
pub(crate) fn subject(certificate: &CertificateDer<'_>) -> Option<Subject> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    Some(subject_of(certificate.subject()))
}

pub(crate) fn subject_of(name: &X509Name<'_>) -> Subject {
    let texts =
        |values: &mut dyn Iterator<Item = &x509_parser::x509::AttributeTypeAndValue<'_>>| {
            values.filter_map(|value| value.as_str().ok().map(str::to_owned)).collect::<Vec<_>>()
        };
    let mut names = texts(&mut name.iter_common_name());
    let common_name = if names.len() == 1 { names.pop() } else { None };
    Subject { common_name, organizations: texts(&mut name.iter_organization()) }
}

/// The server certificate with its key, as TLS wants them.
pub(crate) fn certified_key(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<CertifiedKey>, TlsError> {
    let key = CertifiedKey::from_der(chain, key, &provider()).map_err(TlsError::Certificates)?;
    Ok(Arc::new(key))
}

/// A verifier of client certificates that were signed by one of `roots`.
pub(crate) fn verifier<'a>(
    roots: impl IntoIterator<Item = &'a CertificateDer<'static>>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).map_err(TlsError::Certificates)?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider())
        .build()
        .map_err(TlsError::Verifier)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Verifies everything but the present time: the certificate is looked at on a day of its own validity.
fn verify_without_end(
    authority: &Authority,
    certificate: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<ClientCertVerified, rustls::Error> {
    let verifier = Arc::clone(authority.state().verifier());
    let at = match X509Certificate::from_der(certificate) {
        Ok((_, parsed)) => {
            let second =
                |time: &x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
            let validity = parsed.validity();
            // A certificate that ends before it begins is refused by the verifier.
            let at_s = now.as_secs().min(second(&validity.not_after));
            UnixTime::since_unix_epoch(Duration::from_secs(at_s.max(second(&validity.not_before))))
        }
        // The verifier says what is wrong with it.
        Err(_) => now,
    };
    verifier.verify_client_cert(certificate, intermediates, at)
}

/// Verifies with the CAs that are in force at the time of the handshake.
struct DynamicVerifier {
    authority: Arc<Authority>,
    clients: Clients,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for DynamicVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DynamicVerifier({:?})", self.clients)
    }
}

impl ClientCertVerifier for DynamicVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.clients == Clients::Required
    }

    /// None: the set changes with a rotation, and a node has only one certificate to choose from.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        match self.clients {
            Clients::Required => {
                verify_without_end(&self.authority, end_entity, intermediates, now)
            }
            Clients::VerifiedLater => Ok(ClientCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Shows the server certificate that is in force at the time of the handshake.
struct CurrentCertificate(Arc<Authority>);

impl fmt::Debug for CurrentCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CurrentCertificate")
    }
}

impl ResolvesServerCert for CurrentCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(self.0.state().server()))
    }
}

/// Tickets that are good for as long as the set of CAs is the same: a resumed handshake does not verify the client's
/// certificate again.
struct Tickets {
    authority: Arc<Authority>,
    current: RwLock<(u64, Arc<dyn ProducesTickets>)>,
}

impl Tickets {
    fn new(authority: Arc<Authority>) -> Result<Self, TlsError> {
        let fresh = rustls::crypto::ring::Ticketer::new().map_err(TlsError::Certificates)?;
        let current = RwLock::new((authority.state().trust_generation(), fresh));
        Ok(Self { authority, current })
    }

    fn current(&self) -> Option<Arc<dyn ProducesTickets>> {
        let generation = self.authority.state().trust_generation();
        {
            let current = self.current.read().expect("never held over a panic");
            if current.0 == generation {
                return Some(Arc::clone(&current.1));
            }
        }
        // Without random numbers there are no tickets, and handshakes are full ones.
        let fresh = rustls::crypto::ring::Ticketer::new().ok()?;
        let mut current = self.current.write().expect("never held over a panic");
        if current.0 != generation {
            *current = (generation, fresh);
        }
        Some(Arc::clone(&current.1))
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tickets")
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        self.current().map_or(0, |tickets| tickets.lifetime())
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.current()?.encrypt(plain)
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        self.current()?.decrypt(cipher)
    }
}
