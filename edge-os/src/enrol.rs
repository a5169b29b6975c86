//! How the node gets, keeps and renews its certificate.
//!
//! First: fetch the CA without trust, compare it with the fingerprint in the join token, make a key here, ask for a
//! certificate with the token. Later: ask with the certificate itself, between 70 and 90 percent of its life. The key
//! never leaves the machine; files are 0600, written whole or not at all.
//!
//! Source: kubeedge/kubeedge, edge/pkg/edgehub/certificate/certmanager.go (sequence, headers, subject).

use crate::config::{Config, Endpoint, TokenSource};
use crate::tls::{self, Identity, TlsError};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::ClientConfig;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use skerry_edge_core::backoff::Random;
use skerry_protocol::enrol::{
    CA_PATH, CERTIFICATE_PATH, JoinToken, NODE_NAME_HEADER, NODE_ORGANIZATION, TokenFormatError,
    common_name,
};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The largest answer of the enrolment listener; a certificate has about one KiB.
const ANSWER_LEN_MAX: usize = 64 * 1024;
/// Time for one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// CA and certificate of the node, in a directory of their own.
#[derive(Debug, Clone)]
pub struct Pki {
    dir: PathBuf,
}

/// What TLS needs, from the disk.
#[derive(Clone)]
pub struct Credentials {
    /// CA certificate, DER.
    pub ca: Vec<u8>,
    /// The node's certificate and key.
    pub identity: Identity,
}

/// Why the node has no certificate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnrolError {
    /// Nothing to join with.
    #[error("node `{node}` has no certificate and no join token")]
    NoToken {
        /// Whose.
        node: String,
    },
    /// The token file cannot be read.
    #[error("could not read join token from `{path}`")]
    TokenFile {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not a token.
    #[error("the join token is not valid")]
    TokenFormat(#[from] TokenFormatError),
    /// The listener shows another CA than the token was made for.
    #[error("the CA at {endpoint} has fingerprint {found}, the join token was made for {expected}")]
    ForeignCa {
        /// Where.
        endpoint: Endpoint,
        /// Of the CA there.
        found: String,
        /// Of the token.
        expected: String,
    },
    /// The listener said no: expired, used or foreign token, another node's name.
    #[error("{endpoint} refused a certificate for node `{node}`: {text}")]
    Refused {
        /// Where.
        endpoint: Endpoint,
        /// For whom.
        node: String,
        /// Its words.
        text: String,
    },
    /// The listener failed.
    #[error("{endpoint} answered {status}: {text}")]
    Failed {
        /// Where.
        endpoint: Endpoint,
        /// HTTP status.
        status: StatusCode,
        /// Its words.
        text: String,
    },
    /// No connection.
    #[error("could not reach the enrolment listener")]
    Connect(#[from] TlsError),
    /// The connection broke, or the answer is no HTTP.
    #[error("request to {endpoint} failed: {text}")]
    Http {
        /// Where.
        endpoint: Endpoint,
        /// What went wrong.
        text: String,
    },
    /// A key or certificate request could not be made.
    #[error("could not make a key and certificate request")]
    Request(#[source] rcgen::Error),
    /// A file could not be read or written.
    #[error("could not use `{path}`")]
    File {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl EnrolError {
    /// Whether the same request may succeed later, with nothing changed by a person.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Connect(_) | Self::Failed { .. } | Self::Http { .. } | Self::File { .. }
        )
    }

    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            // The hub's own is better: it knows what is wrong with the token.
            Self::Refused { text, .. } if text.contains("hint: ") => None,
            Self::NoToken { node } | Self::Refused { node, .. } => Some(format!(
                "run `skerry token create {node}` and put the token into `token` or `tokenFile` of the configuration"
            )),
            Self::TokenFormat(_) => Some("copy the whole token: four parts joined by dots".into()),
            Self::ForeignCa { .. } => {
                Some("the address is another cluster's, or somebody is in between; make a new token there".into())
            }
            Self::Connect(_) => Some("check `enrol` in the configuration and the way to it".into()),
            _ => None,
        }
    }
}

impl Pki {
    /// Files in `dir`, which is made when needed.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Reads the credentials of `node`; `None` when there are none, or another node's.
    ///
    /// # Errors
    ///
    /// [`EnrolError::File`] when a file cannot be read, [`EnrolError::Connect`] when it holds something else.
    pub fn load(&self, node: &str) -> Result<Option<Credentials>, EnrolError> {
        let (Some(ca), Some(pem)) = (self.read("ca.crt")?, self.read("edge.pem")?) else {
            return Ok(None);
        };
        let ca_path = self.dir.join("ca.crt");
        let ca = CertificateDer::from_pem_slice(ca.as_bytes())
            .map_err(|error| TlsError::Certificate { path: ca_path, reason: error.to_string() })?;
        let identity = Identity::parse(&self.dir.join("edge.pem"), pem)?;
        let mine = identity.common_name == common_name(node);
        Ok(mine.then(|| Credentials { ca: ca.to_vec(), identity }))
    }

    fn read(&self, name: &str) -> Result<Option<String>, EnrolError> {
        let path = self.dir.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(EnrolError::File { path, source }),
        }
    }

    fn save(&self, name: &str, text: &str) -> Result<(), EnrolError> {
        let path = self.dir.join(name);
        let write = || -> std::io::Result<()> {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
            let next = path.with_extension("next");
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&next)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&next, &path)?;
            fs::File::open(&self.dir)?.sync_all()
        };
        write().map_err(|source| EnrolError::File { path: path.clone(), source })
    }
}

/// Reads the credentials, or joins with the token.
///
/// # Errors
///
/// [`EnrolError`]; see [`EnrolError::is_transient`].
pub async fn ensure(config: &Config) -> Result<Credentials, EnrolError> {
    let pki = Pki::new(config.pki());
    if let Some(credentials) = pki.load(&config.node_name)? {
        let expired = credentials.identity.not_after <= jiff::Timestamp::now().as_second();
        // An expired one is still worth a try when there is nothing else: the clock may be wrong.
        if !expired || config.token.is_none() {
            return Ok(credentials);
        }
        tracing::warn!(
            node = config.node_name,
            "the node's certificate has expired, joining again"
        );
    }
    let token = match &config.token {
        None => return Err(EnrolError::NoToken { node: config.node_name.clone() }),
        Some(TokenSource::Text(text)) => text.clone(),
        Some(TokenSource::File(path)) => fs::read_to_string(path)
            .map_err(|source| EnrolError::TokenFile { path: path.clone(), source })?,
    };
    join(&pki, &config.enrol, &config.node_name, &token.parse()?).await
}

async fn join(
    pki: &Pki,
    endpoint: &Endpoint,
    node: &str,
    token: &JoinToken,
) -> Result<Credentials, EnrolError> {
    let request = Request::get(CA_PATH);
    let ca = fetch(endpoint, tls::unverified_config(), request, Bytes::new(), node).await?;
    if !token.is_for_ca(&ca) {
        return Err(EnrolError::ForeignCa {
            endpoint: endpoint.clone(),
            found: skerry_protocol::enrol::ca_hash(&ca),
            expected: token.ca_hash().to_owned(),
        });
    }
    let trusted = tls::client_config(&ca, None)?;
    let bearer = Some(format!("Bearer {}", token.jwt()));
    let identity = request_certificate(endpoint, trusted, node, bearer).await?;
    // The CA first: a certificate without it would never be looked at.
    pki.save("ca.crt", &pem("CERTIFICATE", &ca))?;
    pki.save("edge.pem", &identity.pem)?;
    tracing::info!(node, %endpoint, "joined the cluster");
    Ok(Credentials { ca: ca.to_vec(), identity })
}

/// Gets a new certificate with a new key, shown the current one.
///
/// # Errors
///
/// [`EnrolError`]; the current certificate stays then.
pub async fn renew(config: &Config, current: &Credentials) -> Result<Credentials, EnrolError> {
    let tls = tls::client_config(&current.ca, Some(&current.identity))?;
    let identity = request_certificate(&config.enrol, tls, &config.node_name, None).await?;
    Pki::new(config.pki()).save("edge.pem", &identity.pem)?;
    Ok(Credentials { ca: current.ca.clone(), identity })
}

/// When to renew, in Unix seconds: evenly drawn between 70 and 90 percent of the lifetime.
pub fn renewal_time_s(identity: &Identity, random: &mut Random) -> i64 {
    let lifetime_s = (identity.not_after - identity.not_before).max(0);
    let permille = 700 + i64::try_from(random.below(201)).unwrap_or(0);
    identity.not_before + lifetime_s / 1000 * permille
}

async fn request_certificate(
    endpoint: &Endpoint,
    tls: Arc<ClientConfig>,
    node: &str,
    bearer: Option<String>,
) -> Result<Identity, EnrolError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(EnrolError::Request)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, NODE_ORGANIZATION);
    params.distinguished_name.push(DnType::CommonName, common_name(node));
    let csr = params.serialize_request(&key).map_err(EnrolError::Request)?;
    let csr = Bytes::copy_from_slice(csr.der());

    let mut request = Request::get(CERTIFICATE_PATH).header(NODE_NAME_HEADER, node);
    if let Some(bearer) = bearer {
        request = request.header(http::header::AUTHORIZATION, bearer);
    }
    let der = fetch(endpoint, tls, request, csr, node).await?;
    let both = format!("{}{}", key.serialize_pem(), pem("CERTIFICATE", &der));
    let from = PathBuf::from(format!("https://{endpoint}{CERTIFICATE_PATH}"));
    let identity = Identity::parse(&from, both)?;
    if identity.common_name != common_name(node) {
        return Err(EnrolError::Refused {
            endpoint: endpoint.clone(),
            node: node.into(),
            text: format!("it sent a certificate for `{}`", identity.common_name),
        });
    }
    Ok(identity)
}

/// One GET, with a body if there is one (KubeEdge's listener takes the request for a certificate that way).
async fn fetch(
    endpoint: &Endpoint,
    tls: Arc<ClientConfig>,
    request: http::request::Builder,
    body: Bytes,
    node: &str,
) -> Result<Bytes, EnrolError> {
    let stream = tls::connect(endpoint, tls).await?;
    let failed = |text: String| EnrolError::Http { endpoint: endpoint.clone(), text };
    let exchange = async {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let request = request
            .header(http::header::HOST, endpoint.to_string())
            .body(Full::new(body))
            .expect("method, path and headers are checked texts");
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_LEN_MAX).collect().await;
        driver.abort();
        Ok::<_, hyper::Error>((status, body.map(http_body_util::Collected::to_bytes)))
    };
    let (status, body) = match tokio::time::timeout(REQUEST_TIMEOUT, exchange).await {
        Ok(Ok((status, Ok(body)))) => (status, body),
        Ok(Ok((_, Err(error)))) => return Err(failed(error.to_string())),
        Ok(Err(error)) => return Err(failed(error.to_string())),
        Err(_) => return Err(failed(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()))),
    };
    if status.is_success() {
        return Ok(body);
    }
    let text = String::from_utf8_lossy(&body).trim().to_owned();
    let endpoint = endpoint.clone();
    Err(match status.is_client_error() {
        true => EnrolError::Refused { endpoint, node: node.into(), text },
        false => EnrolError::Failed { endpoint, status, text },
    })
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let base64 = base64::engine::general_purpose::STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in base64.as_bytes().chunks(64) {
        text.push_str(&String::from_utf8_lossy(line));
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

/// Removes the node's certificate, so that the next start joins again.
///
/// # Errors
///
/// [`EnrolError::File`].
pub fn forget(dir: &Path) -> Result<(), EnrolError> {
    match fs::remove_file(dir.join("edge.pem")) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(EnrolError::File { path: dir.join("edge.pem"), source })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_drawn_between_70_and_90_percent_of_the_life() {
        let identity = Identity {
            pem: String::new(),
            common_name: String::new(),
            not_before: 1000,
            not_after: 101_000,
        };
        for seed in 0..500 {
            let at = renewal_time_s(&identity, &mut Random::new(seed));
            assert!((71_000..=91_000).contains(&at), "{at}");
        }
    }

    #[test]
    fn files_are_for_the_owner_only_and_another_nodes_certificate_is_not_used() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a directory");
        let pki = Pki::new(dir.path().join("pki"));
        assert!(pki.load("edge1").expect("no files").is_none());
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, common_name("edge1"));
        let certificate = params.self_signed(&key).expect("a certificate");
        pki.save("ca.crt", &certificate.pem()).expect("written");
        pki.save("edge.pem", &(key.serialize_pem() + &certificate.pem())).expect("written");
        assert!(pki.load("edge1").expect("readable").is_some());
        assert!(pki.load("edge2").expect("readable").is_none());
        let mode = |name| fs::metadata(pki.dir.join(name)).expect("a file").permissions().mode();
        assert_eq!(mode("edge.pem") & 0o777, 0o600);
        assert_eq!(mode("") & 0o777, 0o700);
    }
}
