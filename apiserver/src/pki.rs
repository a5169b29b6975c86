//! Who the server is and how clients prove who they are: a certificate authority of its own, made at the first start
//! and kept in `dir/pki`.
//!
//! The authority signs the server's certificate and the client certificates in kubeconfigs (CN is the user, O the
//! groups). Key files have mode 0600. The server's certificate is renewed when it nears its end or when the names that
//! it has to carry have changed; the authority never is, because every kubeconfig out there pins it.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use time::OffsetDateTime;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Life of the authority: longer than a machine's.
const AUTHORITY_DAYS: i64 = 3650;
/// Life of the server's and of clients' certificates.
const LEAF_DAYS: i64 = 365;
/// The server's certificate is made anew at a start when it has less than this left.
const RENEW_DAYS: i64 = 60;
/// Between groups in the one O of a certificate with several.
const GROUP_SEPARATOR: &str = ",";
/// Clocks of clients may be behind ours.
const BACKDATE_HOURS: i64 = 1;

/// Why the certificates could not be loaded or made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PkiError {
    /// A file cannot be read or written.
    #[error("`{}` could not be read or written", .path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// A file is not what it should be; it is not replaced, because clients pin the authority.
    #[error("`{}` is not a usable certificate or key: {detail}; put a backup in its place, or remove the folder to make a new authority (every kubeconfig has to be made again then)", .path.display())]
    Damaged { path: PathBuf, detail: String },
    /// A certificate could not be made.
    #[error("certificate for `{name}` could not be made")]
    Make { name: String, source: rcgen::Error },
    /// The TLS library refuses our own certificate.
    #[error("TLS could not be set up: {detail}")]
    Tls { detail: String },
}

/// The authority and the server's certificate.
pub(crate) struct Pki {
    authority_pem: String,
    issuer: Issuer<'static, KeyPair>,
    server_chain: Vec<CertificateDer<'static>>,
    server_key: PrivateKeyDer<'static>,
    authority: CertificateDer<'static>,
}

/// A certificate with its key, as PEM.
pub(crate) struct Identity {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Pki {
    /// Loads the authority from `dir`, or makes it, and sees to a server certificate that carries `names`.
    pub(crate) fn open(dir: &Path, names: &BTreeSet<String>) -> Result<Self, PkiError> {
        fs::create_dir_all(dir).map_err(|source| PkiError::Io { path: dir.into(), source })?;
        let (certificate_path, key_path) = (dir.join("ca.crt"), dir.join("ca.key"));
        if !certificate_path.exists() && !key_path.exists() {
            let made = make_authority()?;
            write_private(&key_path, &made.key)?;
            write_public(&certificate_path, &made.certificate)?;
        }
        let authority_pem = read(&certificate_path)?;
        let damaged = |path: &Path, detail: String| PkiError::Damaged { path: path.into(), detail };
        let authority = CertificateDer::from_pem_slice(authority_pem.as_bytes())
            .map_err(|error| damaged(&certificate_path, error.to_string()))?;
        let key = KeyPair::from_pem(&read(&key_path)?)
            .map_err(|error| damaged(&key_path, error.to_string()))?;
        let issuer = Issuer::from_ca_cert_der(&authority, key)
            .map_err(|error| damaged(&certificate_path, error.to_string()))?;

        let (certificate_path, key_path) = (dir.join("server.crt"), dir.join("server.key"));
        if !(key_path.exists() && is_current(&certificate_path, names)) {
            let made = issue(&issuer, "skerry-apiserver", &[], names, true)?;
            write_private(&key_path, &made.key)?;
            write_public(&certificate_path, &made.certificate)?;
        }
        let server = CertificateDer::from_pem_slice(read(&certificate_path)?.as_bytes())
            .map_err(|error| damaged(&certificate_path, error.to_string()))?;
        let server_key = PrivateKeyDer::from_pem_slice(read(&key_path)?.as_bytes())
            .map_err(|error| damaged(&key_path, error.to_string()))?;
        Ok(Self { authority_pem, issuer, server_chain: vec![server], server_key, authority })
    }

    /// The authority's certificate.
    pub(crate) fn authority_pem(&self) -> &str {
        &self.authority_pem
    }

    /// A client certificate for `user` in `groups`.
    pub(crate) fn client(&self, user: &str, groups: &[&str]) -> Result<Identity, PkiError> {
        issue(&self.issuer, user, groups, &BTreeSet::new(), false)
    }

    /// A certificate for somebody else's key, as PEM. `usages` are those of a CertificateSigningRequest; `life_s` is
    /// cut to the life of every certificate here.
    pub(crate) fn sign(
        &self,
        request: &CertificateSigningRequestDer<'_>,
        usages: &[&str],
        life_s: Option<i64>,
    ) -> Result<String, PkiError> {
        let make = |source| PkiError::Make { name: "signing request".into(), source };
        let mut request = CertificateSigningRequestParams::from_der(request).map_err(make)?;
        let params = &mut request.params;
        let has = |usage: &str| usages.contains(&usage);
        params.is_ca = IsCa::NoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = [
            ("digital signature", KeyUsagePurpose::DigitalSignature),
            ("key encipherment", KeyUsagePurpose::KeyEncipherment),
        ]
        .into_iter()
        .filter_map(|(name, usage)| has(name).then_some(usage))
        .collect();
        params.extended_key_usages = [
            ("server auth", ExtendedKeyUsagePurpose::ServerAuth),
            ("client auth", ExtendedKeyUsagePurpose::ClientAuth),
        ]
        .into_iter()
        .filter_map(|(name, usage)| has(name).then_some(usage))
        .collect();
        let longest = time::Duration::days(LEAF_DAYS);
        let life = life_s.map_or(longest, |life_s| time::Duration::seconds(life_s).min(longest));
        let now = OffsetDateTime::now_utc();
        params.not_before = now - time::Duration::hours(BACKDATE_HOURS);
        params.not_after = now + life;
        Ok(request.signed_by(&self.issuer).map_err(make)?.pem())
    }

    /// TLS settings of the server: client certificates of our authority are accepted, not demanded.
    pub(crate) fn server_config(&self) -> Result<ServerConfig, PkiError> {
        let tls = |error: &dyn std::fmt::Display| PkiError::Tls { detail: error.to_string() };
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.clone()).map_err(|error| tls(&error))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .allow_unauthenticated()
                .build()
                .map_err(|error| tls(&error))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| tls(&error))?
            .with_client_cert_verifier(clients)
            .with_single_cert(self.server_chain.clone(), self.server_key.clone_key())
            .map_err(|error| tls(&error))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// User (CN) and groups (O) of a client certificate that TLS has verified.
pub(crate) fn subject(certificate: &CertificateDer<'_>) -> Option<(String, Vec<String>)> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let subject = certificate.subject();
    let user = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups = subject.iter_organization().filter_map(|o| o.as_str().ok());
    Some((user, groups.flat_map(|o| o.split(GROUP_SEPARATOR)).map(str::to_owned).collect()))
}

fn make_authority() -> Result<Identity, PkiError> {
    let name = "skerry-ca";
    let make = |source| PkiError::Make { name: name.into(), source };
    let mut params = params(name, &[], AUTHORITY_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(make)?;
    let certificate = params.self_signed(&key).map_err(make)?;
    Ok(Identity { certificate: certificate.pem(), key: key.serialize_pem() })
}

fn issue(
    issuer: &Issuer<'static, KeyPair>,
    user: &str,
    groups: &[&str],
    names: &BTreeSet<String>,
    server: bool,
) -> Result<Identity, PkiError> {
    let make = |source| PkiError::Make { name: user.into(), source };
    let mut params = params(user, groups, LEAF_DAYS);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![match server {
        true => ExtendedKeyUsagePurpose::ServerAuth,
        false => ExtendedKeyUsagePurpose::ClientAuth,
    }];
    params.use_authority_key_identifier_extension = true;
    for name in names {
        params.subject_alt_names.push(match name.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(name.as_str().try_into().map_err(make)?),
        });
    }
    let key = KeyPair::generate().map_err(make)?;
    let certificate = params.signed_by(&key, issuer).map_err(make)?;
    Ok(Identity { certificate: certificate.pem(), key: key.serialize_pem() })
}

fn params(name: &str, organizations: &[&str], days: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    if !organizations.is_empty() {
        // The library keeps one value per attribute; `subject` splits it again.
        subject.push(DnType::OrganizationName, organizations.join(GROUP_SEPARATOR));
    }
    params.distinguished_name = subject;
    let now = OffsetDateTime::now_utc();
    params.not_before = now - time::Duration::hours(BACKDATE_HOURS);
    params.not_after = now + time::Duration::days(days);
    params
}

/// Whether the server's certificate carries exactly `names` and lives long enough.
fn is_current(path: &Path, names: &BTreeSet<String>) -> bool {
    let Ok(pem) = fs::read(path) else { return false };
    let Ok(der) = CertificateDer::from_pem_slice(&pem) else { return false };
    let Ok((_, certificate)) = X509Certificate::from_der(&der) else { return false };
    let left =
        certificate.validity().not_after.timestamp() - OffsetDateTime::now_utc().unix_timestamp();
    let Ok(Some(carried)) = certificate.subject_alternative_name() else { return false };
    let carried: BTreeSet<String> = carried
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => match <[u8; 4]>::try_from(*bytes) {
                Ok(v4) => Some(IpAddr::from(v4).to_string()),
                Err(_) => <[u8; 16]>::try_from(*bytes).ok().map(|v6| IpAddr::from(v6).to_string()),
            },
            _ => None,
        })
        .collect();
    left > RENEW_DAYS * 86_400 && carried == *names
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::Io { path: path.into(), source })
}

fn write_public(path: &Path, text: &str) -> Result<(), PkiError> {
    write(path, text, 0o644)
}

pub(crate) fn write_private(path: &Path, text: &str) -> Result<(), PkiError> {
    write(path, text, 0o600)
}

/// Replaces a file as a whole: a crash leaves the old or the new one.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let io = |source| PkiError::Io { path: path.into(), source };
    let fresh = path.with_extension("new");
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
        _ => {}
    }
    let mut file =
        fs::OpenOptions::new().create_new(true).write(true).mode(mode).open(&fresh).map_err(io)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io)?;
    fs::rename(&fresh, path).map_err(io)
}
