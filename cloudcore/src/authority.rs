//! The KubeEdge CA and the server certificate, as Secrets in the cluster.
//!
//! Names, keys and encodings of the Secrets are KubeEdge's, so that either CloudCore can take over from the other
//! without a node having to join again. Unlike KubeEdge's, the server certificate is made anew when the names under
//! which nodes reach the server have changed.
//!
//! Certificates of nodes carry the client usage only and no names beside the subject. KubeEdge grants what the request
//! asks for, which lets a node present itself as a server to other nodes.
//!
//! Source: kubeedge/kubeedge, pkg/security/certs and cloud/pkg/cloudhub/servers/httpserver/pre_server.go.

use crate::api;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Namespace, Secret};
use kube::api::{Api, ObjectMeta, PostParams};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer};
use skerry_protocol::enrol::{NODE_ORGANIZATION, common_name};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Where KubeEdge keeps its things.
pub(crate) const NAMESPACE: &str = "kubeedge";

const CA_SECRET: &str = "casecret";
const CA_KEYS: [&str; 2] = ["cadata", "cakeydata"];
const SERVER_SECRET: &str = "cloudcoresecret";
const SERVER_KEYS: [&str; 2] = ["cloudcoredata", "cloudcorekeydata"];
/// Validity of the CA and of the server certificate.
const LONG_VALIDITY: Duration = Duration::days(364 * 100);
/// Validity of a node's certificate. It is renewed when 70 to 90 % have gone by; a node that is offline for longer
/// than the rest has to join again.
const NODE_VALIDITY: Duration = Duration::days(365);
/// Certificates begin this long ago, for nodes whose clock is behind.
const CLOCK_TOLERANCE: Duration = Duration::minutes(10);

/// Why there is no certificate authority.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// The cluster did not let us read or write a Secret.
    #[error("could not {action} secret `{NAMESPACE}/{secret}`")]
    Secret {
        /// `read` or `write`.
        action: &'static str,
        /// Its name.
        secret: &'static str,
        /// What the API said.
        source: Box<kube::Error>,
    },
    /// A Secret is there, but is not what KubeEdge writes.
    #[error("secret `{NAMESPACE}/{secret}` is not usable: {reason}")]
    Content {
        /// Its name.
        secret: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The CA has not been made yet.
    #[error("secret `{NAMESPACE}/{CA_SECRET}` does not exist; start cloudcore first")]
    Missing,
    /// A certificate could not be made.
    #[error("could not make a certificate")]
    Certificate(#[from] rcgen::Error),
    /// A name to advertise is neither an address nor a DNS name.
    #[error("`{0}` is neither an address nor a DNS name")]
    Advertise(String),
}

/// The CA with its key.
pub(crate) struct CertificateAuthority {
    der: CertificateDer<'static>,
    /// SEC 1; its bytes are also the key of join tokens.
    key_sec1: Vec<u8>,
    issuer: Issuer<'static, KeyPair>,
}

/// The CA, and the server certificate of this CloudCore.
pub(crate) struct Authority {
    ca: CertificateAuthority,
    server_der: CertificateDer<'static>,
    server_key_sec1: Vec<u8>,
}

impl CertificateAuthority {
    /// Reads the CA of the cluster.
    pub(crate) async fn read(client: &kube::Client) -> Result<Self, AuthorityError> {
        let secret = read(client, CA_SECRET).await?.ok_or(AuthorityError::Missing)?;
        Self::of_secret(&secret)
    }

    async fn open(client: &kube::Client) -> Result<Self, AuthorityError> {
        if let Some(secret) = read(client, CA_SECRET).await? {
            return Self::of_secret(&secret);
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params("KubeEdge", None, LONG_VALIDITY);
        params.serial_number = Some(SerialNumber::from(1024));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages.push(KeyUsagePurpose::KeyCertSign);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.self_signed(&key)?;
        let pair = [certificate.der().to_vec(), sec1_of_key(&key)];
        // Another CloudCore may have been faster; its CA is the one that counts then.
        let secret = write(client, CA_SECRET, CA_KEYS, pair, None).await?;
        Self::of_secret(&secret)
    }

    fn of_secret(secret: &Secret) -> Result<Self, AuthorityError> {
        let [der, key_sec1] = pair(secret, CA_SECRET, CA_KEYS)?;
        let unusable = |reason: String| AuthorityError::Content { secret: CA_SECRET, reason };
        let pkcs8 = pkcs8_of_sec1(&key_sec1).ok_or_else(|| {
            unusable("the key is no SEC 1 key on P-256 with its public part".into())
        })?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(
            &PrivatePkcs8KeyDer::from(pkcs8),
            &PKCS_ECDSA_P256_SHA256,
        )
        .map_err(|error| unusable(format!("the key: {error}")))?;
        let der = CertificateDer::from(der);
        let issuer = Issuer::from_ca_cert_der(&der, key)
            .map_err(|error| unusable(format!("the certificate: {error}")))?;
        Ok(Self { der, key_sec1, issuer })
    }

    pub(crate) fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// HMAC-SHA256 under the key of join tokens.
    pub(crate) fn hmac(&self) -> impl Fn(&[u8]) -> [u8; 32] {
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &self.key_sec1);
        move |bytes| {
            let mut tag = [0; 32];
            tag.copy_from_slice(ring::hmac::sign(&key, bytes).as_ref());
            tag
        }
    }
}

impl Authority {
    /// Reads the CA and the server certificate of the cluster, or makes them.
    pub(crate) async fn open(
        client: &kube::Client,
        advertise: &[String],
    ) -> Result<Self, AuthorityError> {
        ensure_namespace(client).await?;
        let ca = CertificateAuthority::open(client).await?;
        let names = alternative_names(advertise)?;
        let old = read(client, SERVER_SECRET).await?;
        if let Some(secret) = &old {
            let [der, key] = pair(secret, SERVER_SECRET, SERVER_KEYS)?;
            if is_usable(&der, &ca, &names) {
                return Ok(Self { ca, server_der: der.into(), server_key_sec1: key });
            }
            tracing::info!("the server certificate is made anew, as the advertised names changed");
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params("KubeEdge", Some("KubeEdge"), LONG_VALIDITY);
        params.subject_alt_names = names;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &ca.issuer)?;
        let pair_new = [certificate.der().to_vec(), sec1_of_key(&key)];
        let secret = write(client, SERVER_SECRET, SERVER_KEYS, pair_new, old).await?;
        let [der, key] = pair(&secret, SERVER_SECRET, SERVER_KEYS)?;
        Ok(Self { ca, server_der: der.into(), server_key_sec1: key })
    }

    pub(crate) fn ca(&self) -> &CertificateAuthority {
        &self.ca
    }

    pub(crate) fn ca_der(&self) -> &CertificateDer<'static> {
        &self.ca.der
    }

    pub(crate) fn server_chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.server_der.clone()]
    }

    pub(crate) fn server_key(&self) -> PrivateKeyDer<'static> {
        PrivateSec1KeyDer::from(self.server_key_sec1.clone()).into()
    }

    /// Issues the certificate of `node` for this public key.
    pub(crate) fn issue(
        &self,
        node: &str,
        key: &impl PublicKeyData,
    ) -> Result<CertificateDer<'static>, rcgen::Error> {
        let mut params = params(&common_name(node), Some(NODE_ORGANIZATION), NODE_VALIDITY);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params.signed_by(key, &self.ca.issuer)?.der().clone())
    }
}

fn params(name: &str, organization: Option<&str>, validity: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    if let Some(organization) = organization {
        subject.push(DnType::OrganizationName, organization);
    }
    subject.push(DnType::CommonName, name);
    params.distinguished_name = subject;
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_TOLERANCE;
    params.not_after = now + validity;
    params.serial_number = Some(SerialNumber::from(rand::random::<u64>() >> 1));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params
}

fn alternative_names(advertise: &[String]) -> Result<Vec<SanType>, AuthorityError> {
    let mut names = Vec::new();
    for name in advertise.iter().filter(|name| !name.is_empty()) {
        let san = match name.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => {
                let bad = || AuthorityError::Advertise(name.clone());
                let is_dns = name
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-.*_".contains(&byte));
                if !is_dns {
                    return Err(bad());
                }
                SanType::DnsName(name.as_str().try_into().map_err(|_| bad())?)
            }
        };
        if !names.contains(&san) {
            names.push(san);
        }
    }
    Ok(names)
}

/// Whether a server certificate is of this CA, is valid for another month at least, and has exactly these names.
fn is_usable(der: &[u8], ca: &CertificateAuthority, names: &[SanType]) -> bool {
    let (Ok((_, certificate)), Ok((_, issuer))) =
        (X509Certificate::from_der(der), X509Certificate::from_der(&ca.der))
    else {
        return false;
    };
    let soon = OffsetDateTime::now_utc() + Duration::days(30);
    if certificate.issuer().as_raw() != issuer.subject().as_raw()
        || certificate.verify_signature(Some(issuer.public_key())).is_err()
        || certificate.validity().not_after.to_datetime() < soon
    {
        return false;
    }
    let wanted: BTreeSet<String> = names
        .iter()
        .map(|name| match name {
            SanType::IpAddress(address) => address.to_string(),
            SanType::DnsName(name) => name.as_str().to_owned(),
            _ => String::new(),
        })
        .collect();
    let general = certificate.subject_alternative_name().ok().flatten();
    let found: BTreeSet<String> = general
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => match <[u8; 4]>::try_from(*bytes) {
                Ok(v4) => Some(IpAddr::from(v4).to_string()),
                Err(_) => <[u8; 16]>::try_from(*bytes).ok().map(|v6| IpAddr::from(v6).to_string()),
            },
            _ => None,
        })
        // KubeEdge's default configuration puts an empty name there.
        .filter(|name| !name.is_empty())
        .collect();
    found == wanted
}

async fn ensure_namespace(client: &kube::Client) -> Result<(), AuthorityError> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let failed = |source| AuthorityError::Secret {
        action: "make the namespace of",
        secret: CA_SECRET,
        source: Box::new(source),
    };
    if namespaces.get_opt(NAMESPACE).await.map_err(failed)?.is_some() {
        return Ok(());
    }
    let metadata = ObjectMeta { name: Some(NAMESPACE.into()), ..ObjectMeta::default() };
    let namespace = Namespace { metadata, ..Namespace::default() };
    match namespaces.create(&PostParams::default(), &namespace).await {
        Err(error) if !api::is_already_exists(&error) => Err(failed(error)),
        _ => Ok(()),
    }
}

async fn read(client: &kube::Client, name: &'static str) -> Result<Option<Secret>, AuthorityError> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    secrets.get_opt(name).await.map_err(|source| AuthorityError::Secret {
        action: "read",
        secret: name,
        source: Box::new(source),
    })
}

/// Writes a certificate and its key, over `old` when there is one. Returns what the cluster has afterwards, which is
/// somebody else's pair when they were faster.
async fn write(
    client: &kube::Client,
    name: &'static str,
    keys: [&str; 2],
    pair: [Vec<u8>; 2],
    old: Option<Secret>,
) -> Result<Secret, AuthorityError> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let failed =
        |source| AuthorityError::Secret { action: "write", secret: name, source: Box::new(source) };
    let data: BTreeMap<String, ByteString> = keys
        .into_iter()
        .zip(pair)
        .map(|(key, bytes)| (key.to_owned(), ByteString(bytes)))
        .collect();
    let written = match old {
        Some(old) => {
            let secret = Secret { data: Some(data), string_data: None, ..old };
            secrets.replace(name, &PostParams::default(), &secret).await
        }
        None => {
            let metadata = ObjectMeta {
                name: Some(name.into()),
                namespace: Some(NAMESPACE.into()),
                ..ObjectMeta::default()
            };
            let type_ = Some("Opaque".into());
            let secret = Secret { metadata, data: Some(data), type_, ..Secret::default() };
            secrets.create(&PostParams::default(), &secret).await
        }
    };
    match written {
        Err(error) if api::is_already_exists(&error) || api::is_conflict(&error) => {
            secrets.get(name).await.map_err(failed)
        }
        written => written.map_err(failed),
    }
}

fn pair(
    secret: &Secret,
    name: &'static str,
    keys: [&str; 2],
) -> Result<[Vec<u8>; 2], AuthorityError> {
    let value = |key: &str| {
        let found = secret.data.as_ref().and_then(|data| data.get(key));
        found.map(|value| value.0.clone()).ok_or_else(|| AuthorityError::Content {
            secret: name,
            reason: format!("key `{key}` is missing"),
        })
    };
    Ok([value(keys[0])?, value(keys[1])?])
}

/// ECPrivateKey on P-256 up to the secret: SEQUENCE of 0x77 bytes, version 1, OCTET STRING of 32 bytes.
const SEC1_HEAD: [u8; 7] = [0x30, 0x77, 0x02, 0x01, 0x01, 0x04, 0x20];
/// `[0]` with the curve's name, prime256v1.
const SEC1_CURVE: [u8; 12] =
    [0xa0, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
/// `[1]` with a BIT STRING of 65 bytes, the public point.
const SEC1_POINT: [u8; 5] = [0xa1, 0x44, 0x03, 0x42, 0x00];
/// PKCS #8 up to the inner ECPrivateKey, which has no curve's name there.
const PKCS8_HEAD: [u8; 29] = [
    0x30, 0x81, 0x87, 0x02, 0x01, 0x00, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02,
    0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x04, 0x6d,
];
/// The inner ECPrivateKey up to the secret.
const PKCS8_INNER_HEAD: [u8; 7] = [0x30, 0x6b, 0x02, 0x01, 0x01, 0x04, 0x20];

/// The SEC 1 form of a key on P-256, as Go's `x509.MarshalECPrivateKey` writes it (RFC 5915).
fn sec1_of_key(key: &KeyPair) -> Vec<u8> {
    let pkcs8 = key.serialized_der();
    let start = PKCS8_HEAD.len() + PKCS8_INNER_HEAD.len();
    let secret = &pkcs8[start..start + 32];
    [&SEC1_HEAD[..], secret, &SEC1_CURVE, &SEC1_POINT, key.public_key_raw()].concat()
}

fn pkcs8_of_sec1(sec1: &[u8]) -> Option<Vec<u8>> {
    let rest = sec1.strip_prefix(&SEC1_HEAD)?;
    let (secret, rest) = rest.split_at_checked(32)?;
    let point = rest.strip_prefix(&SEC1_CURVE)?.strip_prefix(&SEC1_POINT)?;
    if point.len() != 65 {
        return None;
    }
    Some([&PKCS8_HEAD[..], &PKCS8_INNER_HEAD, secret, &SEC1_POINT, point].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_the_way_through_sec1() {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key");
        let sec1 = sec1_of_key(&key);
        assert_eq!(sec1.len(), 121);
        let pkcs8 = pkcs8_of_sec1(&sec1).expect("our own form");
        assert_eq!(pkcs8, key.serialized_der());
        for end in 0..sec1.len() {
            assert!(pkcs8_of_sec1(&sec1[..end]).is_none());
        }
    }

    #[test]
    fn names_to_advertise_are_addresses_or_dns_names() {
        let names = ["127.0.0.1", "::1", "hub.example", "", "127.0.0.1"].map(String::from);
        assert_eq!(alternative_names(&names).expect("good").len(), 3);
        let bad = alternative_names(&["https://hub".into()]).expect_err("a URL");
        assert_eq!(bad.to_string(), "`https://hub` is neither an address nor a DNS name");
    }
}
