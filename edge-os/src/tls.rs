//! TLS towards the cloud: who we trust, who we are, and what time it is.
//!
//! The node's certificate and key live in one file, so that a renewal replaces both or none.
//!
//! A machine without a battery starts in 1970, and one with a broken clock may stand in 2100. Neither may lock it out,
//! so the system's clock never refuses a server: a certificate is refused as expired only when its end lies before the
//! latest time that is proven, and what proves a time is the first second of a certificate that a trusted CA signed
//! ([`Trust::proven_s`]). A server certificate that our clock calls expired, and no proof does, is accepted with a
//! warning; docs/decisions/0006-identity.md has the reasons.

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
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

/// The CAs whose servers are trusted, and the latest time that their certificates have proven. Clones share the time.
#[derive(Debug, Clone)]
pub struct Trust {
    /// CA certificates, DER. The first one signs new certificates.
    pub cas: Vec<Vec<u8>>,
    proven_s: Arc<AtomicI64>,
}

impl Trust {
    /// `proven_s` is a time in Unix seconds that is certainly over; 0 when none is known.
    pub fn new(cas: Vec<Vec<u8>>, proven_s: i64) -> Self {
        Self { cas, proven_s: Arc::new(AtomicI64::new(proven_s)) }
    }

    /// The latest time that is certainly over, Unix seconds.
    pub fn proven_s(&self) -> i64 {
        self.proven_s.load(Ordering::Relaxed)
    }

    /// Takes the first second of a certificate that one of the CAs signed.
    pub fn prove(&self, not_before_s: i64) {
        self.proven_s.fetch_max(not_before_s, Ordering::Relaxed);
    }

    /// The same time, with other CAs.
    #[must_use]
    pub fn with_cas(&self, cas: Vec<Vec<u8>>) -> Self {
        Self { cas, proven_s: Arc::clone(&self.proven_s) }
    }
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

/// Trusts exactly the CAs of `trust`, and shows `identity` if there is one.
///
/// A configuration remembers sessions: dial with the same one (or a clone) again to resume.
///
/// # Errors
///
/// [`TlsError::Config`] when the parts do not fit.
pub fn client_config(
    trust: &Trust,
    identity: Option<&Identity>,
) -> Result<Arc<ClientConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    for ca in &trust.cas {
        roots.add(CertificateDer::from(ca.clone())).map_err(TlsError::Config)?;
    }
    if let Some(identity) = identity {
        trust.prove(identity.not_before);
    }
    let provider = Arc::new(ring::default_provider());
    let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| TlsError::Config(rustls::Error::General(error.to_string())))?;
    let verifier = ProvenTime { inner, trust: trust.clone(), warned: AtomicBool::new(false) };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Config)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
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
        let tcp = match &endpoint.via {
            None => TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await?,
            Some(proxy) => through(proxy, endpoint).await?,
        };
        tcp.set_nodelay(true)?;
        crate::link::tcp::tune(&tcp);
        TlsConnector::from(config).connect(name, tcp).await
    };
    match tokio::time::timeout(CONNECT_TIMEOUT, dial).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(TlsError::Connect { endpoint: endpoint.clone(), source }),
        Err(_) => Err(TlsError::Timeout { endpoint: endpoint.clone() }),
    }
}

/// Has a proxy connect to an endpoint; what follows on the stream is between the endpoint and us.
async fn through(proxy: &Endpoint, endpoint: &Endpoint) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect((proxy.host.as_str(), proxy.port)).await?;
    let request = format!("CONNECT {endpoint} HTTP/1.1\r\nHost: {endpoint}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    // A byte at a time: what comes behind the head is not ours to take.
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == PROXY_HEAD_LEN_MAX {
            return Err(io::Error::other(format!("proxy `{proxy}` does not answer as one")));
        }
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head);
    let first = head.lines().next().unwrap_or_default();
    match first.split_whitespace().nth(1) {
        Some(code) if code.starts_with('2') => Ok(stream),
        _ => Err(io::Error::other(format!("proxy `{proxy}` refused: {first}"))),
    }
}

/// Longest answer of a proxy.
const PROXY_HEAD_LEN_MAX: usize = 8 * 1024;

/// Checks chain, usage and name of a server certificate as usual, and its validity at the latest proven time.
#[derive(Debug)]
struct ProvenTime {
    inner: Arc<WebPkiServerVerifier>,
    trust: Trust,
    /// Whether the log says already that the clock and the server's certificate do not agree.
    warned: AtomicBool,
}

impl ServerCertVerifier for ProvenTime {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verify = |at| {
            self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, at)
        };
        let Ok((_, certificate)) = x509_parser::parse_x509_certificate(end_entity) else {
            return verify(now); // which says what is wrong with it
        };
        let (begin_s, end_s) = (
            certificate.validity().not_before.timestamp(),
            certificate.validity().not_after.timestamp(),
        );
        // Its own begin is proof enough that this time is over, once the signature is found to be good.
        let at_s = self.trust.proven_s().max(begin_s);
        let at_s = u64::try_from(at_s).unwrap_or(0);
        let verified = verify(UnixTime::since_unix_epoch(Duration::from_secs(at_s)))?;
        self.trust.prove(begin_s);
        let now_s = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        if !(begin_s..=end_s).contains(&now_s) && !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                clock_s = now_s,
                begin_s,
                end_s,
                "by this machine's clock the server's certificate is not valid, which nothing else confirms; \
                 connecting all the same. hint: set the clock"
            );
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
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

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
        SanType, date_time_ymd,
    };

    #[tokio::test]
    async fn proxy_connects_to_the_endpoint_or_says_why_not() {
        for (answer, refused) in [
            ("HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\nhello", None),
            ("HTTP/1.1 403 Forbidden\r\n\r\n", Some("403 Forbidden")),
            (&*"x".repeat(PROXY_HEAD_LEN_MAX + 1), Some("does not answer as one")),
        ] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binds");
            let port = listener.local_addr().expect("bound").port();
            let proxy = Endpoint { host: "127.0.0.1".into(), port, via: None };
            let hub = Endpoint { host: "hub.example".into(), port: 10000, via: None };
            let serve = async {
                let (mut near, _) = listener.accept().await.expect("comes");
                let mut request = vec![0; 63];
                near.read_exact(&mut request).await.expect("a request");
                near.write_all(answer.as_bytes()).await.expect("taken");
                (String::from_utf8(request).expect("text"), near)
            };
            let ((request, _near), answered) = tokio::join!(serve, through(&proxy, &hub));
            assert!(request.starts_with("CONNECT hub.example:10000 HTTP/1.1\r\nHost: hub.example"));
            match (answered, refused) {
                (Ok(mut stream), None) => {
                    let mut rest = [0; 5];
                    stream.read_exact(&mut rest).await.expect("what came behind the head");
                    assert_eq!(&rest, b"hello");
                }
                (Err(error), Some(words)) => assert!(error.to_string().contains(words), "{error}"),
                (answered, _) => panic!("{answered:?} for {answer}"),
            }
        }
    }

    struct Ca {
        der: Vec<u8>,
        issuer: Issuer<'static, KeyPair>,
    }

    fn ca() -> Ca {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2020, 2, 1);
        let der = params.self_signed(&key).expect("a CA").der().to_vec();
        Ca { der, issuer: Issuer::new(params, key) }
    }

    impl Ca {
        /// A server certificate for 127.0.0.1, valid from one year to another; with the empty name that KubeEdge's
        /// default configuration puts beside the addresses.
        fn server(&self, years: std::ops::Range<i32>) -> CertificateDer<'static> {
            let key = KeyPair::generate().expect("a key");
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![
                SanType::DnsName("".try_into().expect("ASCII")),
                SanType::IpAddress([127, 0, 0, 1].into()),
                SanType::DnsName("hub.example".try_into().expect("ASCII")),
            ];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            params.not_before = date_time_ymd(years.start, 1, 1);
            params.not_after = date_time_ymd(years.end, 1, 1);
            params.signed_by(&key, &self.issuer).expect("signed").der().clone()
        }
    }

    fn second(year: i32) -> i64 {
        date_time_ymd(year, 1, 1).unix_timestamp()
    }

    /// Verifies as a node whose clock stands at this year and which has proof that `proven` is over.
    fn verify(
        trust: &Ca,
        server: &CertificateDer<'_>,
        name: &str,
        clock: i32,
        proven: i32,
    ) -> Result<i64, rustls::Error> {
        let trust = Trust::new(vec![trust.der.clone()], second(proven));
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(trust.cas[0].clone())).expect("a root");
        let provider = Arc::new(ring::default_provider());
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider);
        let inner = inner.build().expect("a verifier");
        let verifier = ProvenTime { inner, trust: trust.clone(), warned: AtomicBool::new(false) };
        let now_s = u64::try_from(second(clock)).unwrap_or(0);
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now_s));
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        verifier.verify_server_cert(server, &[], &name, &[], now)?;
        Ok(trust.proven_s())
    }

    #[test]
    fn clock_in_1970_or_2100_does_not_lock_the_node_out() {
        let ca = ca();
        let server = ca.server(2024..2030);
        for clock in [1970, 2023, 2026, 2031, 2100] {
            let proven_s = verify(&ca, &server, "127.0.0.1", clock, 1970).expect("accepted");
            assert_eq!(proven_s, second(2024), "the certificate proves its first day");
        }
    }

    #[test]
    fn server_that_had_expired_at_a_proven_time_is_refused_whatever_the_clock_says() {
        let ca = ca();
        let server = ca.server(2024..2030);
        for clock in [1970, 2026, 2031] {
            let error = verify(&ca, &server, "127.0.0.1", clock, 2031).expect_err("expired");
            let rustls::Error::InvalidCertificate(reason) = error else { panic!("{error}") };
            assert!(format!("{reason:?}").contains("Expired"), "{reason:?}");
        }
    }

    #[test]
    fn another_ca_and_another_name_are_refused_and_prove_nothing() {
        let (ours, theirs) = (ca(), ca());
        let server = theirs.server(2024..2030);
        assert!(verify(&ours, &server, "127.0.0.1", 2026, 2025).is_err());
        let server = ours.server(2024..2030);
        assert!(verify(&ours, &server, "127.0.0.2", 2026, 2025).is_err());
        assert!(verify(&ours, &server, "other.example", 2026, 2025).is_err());
        verify(&ours, &server, "hub.example", 2026, 2025).expect("the empty name does no harm");
    }
}
