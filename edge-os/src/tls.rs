//! TLS towards the cloud: who we trust, who we are, and what time it is.
//!
//! The node's certificate and key live in one file, so that a renewal replaces both or none.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::config::Endpoint;

/// Time for TCP and TLS together; a satellite link needs about four.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// The certificate of this node, with its key.
#[derive(Clone)]
pub struct Identity {
    /// PEM of the key, then of the certificate.
    pub pem: String,
    /// Common name of the subject.
    pub common_name: String,
    /// Unix seconds.
    pub not_before: i64,
    /// Unix seconds.
    pub not_after: i64,
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A certificate or key that cannot be read.
    #[error("`{path}` does not hold a usable certificate: {reason}")]
    Certificate {
        /// Where it came from.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Certificate and key do not fit, or the CA is not one.
    #[error("could not use the node's certificate for TLS")]
    Config(#[source] rustls::Error),
    /// Not a name or address.
    #[error("`{0}` is not a host name or address")]
    Host(String),
    /// No TCP or TLS.
    #[error("could not connect to {endpoint}")]
    Connect {
        /// Where.
        endpoint: Endpoint,
        /// What the system or the TLS library said.
        source: std::io::Error,
    },
    /// Neither yes nor no.
    #[error("no connection to {endpoint} within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout {
        /// Where.
        endpoint: Endpoint,
    },
}

impl Identity {
    /// Reads PEM of a key and a certificate; `path` is for messages.
    ///
    /// # Errors
    ///
    /// [`TlsError::Certificate`] when a part is missing or broken.
    pub fn parse(path: &Path, pem: String) -> Result<Self, TlsError> {
        let bad = |reason: String| TlsError::Certificate { path: path.to_owned(), reason };
        PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|error| bad(error.to_string()))?;
        let der = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| bad(error.to_string()))?;
        let (_, certificate) =
            x509_parser::parse_x509_certificate(&der).map_err(|error| bad(error.to_string()))?;
        let common_name = certificate.subject().iter_common_name().next();
        let common_name = common_name.and_then(|name| name.as_str().ok()).unwrap_or_default();
        let validity = certificate.validity();
        Ok(Self {
            common_name: common_name.into(),
            not_before: validity.not_before.timestamp(),
            not_after: validity.not_after.timestamp(),
            pem,
        })
    }
}

/// Trusts exactly `ca` (DER), and shows `identity` if there is one.
///
/// The clock of a machine without battery starts in 1970; our own certificate proves that it is at least as late as
/// its first day.
///
/// # Errors
///
/// [`TlsError::Config`] when the parts do not fit.
pub fn client_config(
    ca: &[u8],
    identity: Option<&Identity>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(ca.to_vec())).map_err(TlsError::Config)?;
    let floor_s = identity.map_or(0, |identity| u64::try_from(identity.not_before).unwrap_or(0));
    let time = Arc::new(NotBefore(UnixTime::since_unix_epoch(Duration::from_secs(floor_s))));
    let builder = ClientConfig::builder_with_details(Arc::new(ring::default_provider()), time)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Config)?
        .with_root_certificates(roots);
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let broken = |_| TlsError::Config(rustls::Error::General("broken PEM".into()));
            let pem = identity.pem.as_bytes();
            let certificate = CertificateDer::from_pem_slice(pem).map_err(broken)?;
            let key = PrivateKeyDer::from_pem_slice(pem).map_err(broken)?;
            builder.with_client_auth_cert(vec![certificate], key).map_err(TlsError::Config)?
        }
    };
    Ok(Arc::new(config))
}

/// Trusts anybody: only for fetching the CA, whose fingerprint is then compared with the token's.
pub fn unverified_config() -> Arc<ClientConfig> {
    let provider = ring::default_provider();
    let verifier = Arc::new(Unverified(provider.signature_verification_algorithms));
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .expect("ring has suites for the default versions")
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Arc::new(config)
}

/// Dials and shakes hands, in bounded time.
///
/// # Errors
///
/// [`TlsError::Connect`] and [`TlsError::Timeout`] may be gone the next time.
pub async fn connect(
    endpoint: &Endpoint,
    config: Arc<ClientConfig>,
) -> Result<TlsStream<TcpStream>, TlsError> {
    let name = ServerName::try_from(endpoint.host.clone())
        .map_err(|_| TlsError::Host(endpoint.host.clone()))?;
    let dial = async {
        let tcp = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await?;
        tcp.set_nodelay(true)?;
        TlsConnector::from(config).connect(name, tcp).await
    };
    match tokio::time::timeout(CONNECT_TIMEOUT, dial).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(TlsError::Connect { endpoint: endpoint.clone(), source }),
        Err(_) => Err(TlsError::Timeout { endpoint: endpoint.clone() }),
    }
}

/// The system's clock, but not before a known time.
#[derive(Debug)]
struct NotBefore(UnixTime);

impl TimeProvider for NotBefore {
    fn current_time(&self) -> Option<UnixTime> {
        let now = UnixTime::now();
        Some(if now.as_secs() < self.0.as_secs() { self.0 } else { now })
    }
}

/// Checks that the server holds the key of the certificate it shows, and nothing about the certificate.
#[derive(Debug)]
struct Unverified(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

/// Installs the one TLS library of this program; called first thing in `main`, and in tests.
pub fn install_provider() {
    // A second call finds it installed already, which is what it wants.
    let _ = CryptoProvider::install_default(ring::default_provider());
}
