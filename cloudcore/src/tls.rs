//! TLS for the listeners, and the identity in a peer's certificate.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/cloudhub/servers/server.go.

use crate::authority::Authority;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use skerry_cloudcore_core::enrol::Subject;
use std::sync::Arc;
use x509_parser::prelude::{FromDer, X509Certificate, X509Name};

/// What a listener asks of its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clients {
    /// A certificate of the CA, or no connection.
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

pub(crate) fn server_config(
    authority: &Authority,
    clients: Clients,
) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = provider();
    let verifier = verifier(authority)?;
    let verifier: Arc<dyn ClientCertVerifier> = match clients {
        Clients::Required => verifier,
        Clients::VerifiedLater => Arc::new(VerifiedLater(verifier)),
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Certificates)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(authority.server_chain(), authority.server_key())
        .map_err(TlsError::Certificates)?;
    if clients == Clients::VerifiedLater {
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    }
    Ok(Arc::new(config))
}

/// Checks a client certificate against the CA, as a listener with [`Clients::Required`] does.
pub(crate) fn verify_client(
    authority: &Authority,
    certificate: &CertificateDer<'_>,
) -> Result<(), String> {
    let verifier = verifier(authority).map_err(|error| error.to_string())?;
    verifier
        .verify_client_cert(certificate, &[], UnixTime::now())
        .map(|_| ())
        .map_err(|error| error.to_string())
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

/// The node named by a peer's verified certificate.
pub(crate) fn peer_node(connection: &rustls::ServerConnection) -> Option<String> {
    let subject = subject(connection.peer_certificates()?.first()?)?;
    let node = skerry_protocol::enrol::node_of_common_name(subject.common_name.as_deref()?)?;
    subject
        .organizations
        .iter()
        .any(|name| name == skerry_protocol::enrol::NODE_ORGANIZATION)
        .then(|| node.to_owned())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn verifier(authority: &Authority) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.ca_der().clone()).map_err(TlsError::Certificates)?;
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(TlsError::Verifier)
}

#[derive(Debug)]
struct VerifiedLater(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for VerifiedLater {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
