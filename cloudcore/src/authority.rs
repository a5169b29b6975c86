//! The KubeEdge CA and the server certificate, as Secrets in the cluster.
//!
//! Names, keys and encodings of the Secrets are KubeEdge's, so that either CloudCore can take over from the other
//! without a node having to join again. Unlike KubeEdge's, the server certificate is made anew when the names under
//! which nodes reach the server have changed.
//!
//! Certificates of nodes carry the client usage only and no names beside the subject. KubeEdge grants what the request
//! asks for, which lets a node present itself as a server to other nodes.
//!
//! A CA is replaced while both are trusted. [`rotate_ca`] makes the new one and has the old one sign its key; from then
//! on the server shows its new certificate with that signature, which nodes of either age can verify, and certificates
//! of nodes come from the new CA. [`finish_ca`] ends the trust in certificates of the old one. `casecret` always holds
//! the CA that signs; everything about the other one is in the Secret [`ROTATION_SECRET`]. What this server trusts and
//! shows is [`State`], replaced as a whole when a Secret changes.
//!
//! Source: kubeedge/kubeedge, pkg/security/certs and cloud/pkg/cloudhub/servers/httpserver/pre_server.go.

use crate::gate::{self, NodeIdentity};
use crate::{api, tls};
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Namespace, Node, Secret};
use kube::api::{Api, ListParams, ObjectMeta, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer};
use serde::Serialize;
use sha2::{Digest, Sha256};
use skerry_cloudcore_core::identity::{Fingerprint, hex};
use skerry_protocol::enrol::{Claims, JwtError, NODE_ORGANIZATION, common_name};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, RwLock};
use time::{Duration, OffsetDateTime};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Where KubeEdge keeps its things.
pub(crate) const NAMESPACE: &str = "kubeedge";

const CA_SECRET: &str = "casecret";
const CA_KEYS: [&str; 2] = ["cadata", "cakeydata"];
const SERVER_SECRET: &str = "cloudcoresecret";
const SERVER_KEYS: [&str; 2] = ["cloudcoredata", "cloudcorekeydata"];
/// The Secret of a rotation of the CA; see [`Rotation`].
const ROTATION_SECRET: &str = "skerry-ca-rotation";
const PREVIOUS_KEYS: [&str; 2] = ["previouscadata", "previouscakeydata"];
const NEXT_KEYS: [&str; 2] = ["nextcadata", "nextcakeydata"];
const CROSS: &str = "crossdata";
const STARTED: &str = "started";
const FINISHED: &str = "finished";
/// Validity of the CA and of the server certificate.
const LONG_VALIDITY: Duration = Duration::days(364 * 100);
/// Certificates of CAs and servers begin this long ago, for nodes whose clock is behind. Those of nodes begin at once:
/// their first second is compared with the time of a revocation, and is proof of the time to the node.
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
    /// The certificates are of no use for TLS.
    #[error("the certificates in the cluster are of no use for TLS")]
    Tls(#[from] tls::TlsError),
}

/// Why the CA was not replaced.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RotationError {
    /// The CA or its Secrets.
    #[error("could not use the certificate authority")]
    Authority(#[from] AuthorityError),
    /// The nodes or their records could not be read.
    #[error("could not read the nodes")]
    Nodes(#[source] Box<kube::Error>),
    /// A rotation has begun already.
    #[error("a rotation is in progress since {started}")]
    InProgress {
        /// When it began.
        started: String,
    },
    /// Nothing to finish.
    #[error("no rotation is in progress")]
    NotInProgress,
    /// Somebody else changed the CA at the same time.
    #[error("the certificate authority was changed by somebody else at the same time")]
    Conflict,
    /// Connected nodes would be locked out.
    #[error("{} connected node(s) have not followed yet: {}", nodes.len(), nodes.join(", "))]
    Behind {
        /// Which ones.
        nodes: Vec<String>,
    },
}

impl RotationError {
    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::InProgress { .. } => "`skerry ca status` shows who has followed, `skerry ca finish` ends it".into(),
            Self::NotInProgress => "`skerry ca rotate` begins one".into(),
            Self::Conflict => "run it again".into(),
            Self::Behind { .. } => {
                "wait; stock KubeEdge nodes follow when they renew. --force leaves them out: they need a new token then".into()
            }
            Self::Authority(AuthorityError::Missing) => {
                "start CloudCore first; it makes the certificate authority at its first start".into()
            }
            _ => return None,
        })
    }
}

/// A CA with its key.
pub(crate) struct CertificateAuthority {
    der: CertificateDer<'static>,
    fingerprint: Fingerprint,
    /// SEC 1; its bytes are also the key of join tokens.
    key_sec1: Vec<u8>,
    issuer: Issuer<'static, KeyPair>,
}

impl CertificateAuthority {
    /// Reads the CA of the cluster that signs.
    pub(crate) async fn read(client: &kube::Client) -> Result<Self, AuthorityError> {
        let secret = read(client, CA_SECRET).await?.ok_or(AuthorityError::Missing)?;
        Self::of_secret(&secret)
    }

    async fn open(client: &kube::Client) -> Result<Self, AuthorityError> {
        if let Some(secret) = read(client, CA_SECRET).await? {
            return Self::of_secret(&secret);
        }
        let (certificate, key) = Self::generate(Some(1024))?;
        let pair = [certificate.to_vec(), sec1_of_key(&key)];
        // Another CloudCore may have been faster; its CA is the one that counts then.
        let secret = write(client, CA_SECRET, CA_KEYS, pair, None).await?;
        Self::of_secret(&secret)
    }

    /// A new CA. The first one has KubeEdge's subject and serial number; a later one a subject of its own, so that
    /// whoever builds a chain need not try keys.
    fn generate(serial: Option<u64>) -> Result<(CertificateDer<'static>, KeyPair), rcgen::Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let name = match serial {
            Some(_) => "KubeEdge".to_owned(),
            None => format!("KubeEdge {}", &hex(&Sha256::digest(key.public_key_raw()))[..8]),
        };
        let mut params = Self::params(&name);
        params.serial_number = serial.map(SerialNumber::from).or(params.serial_number);
        Ok((params.self_signed(&key)?.der().clone(), key))
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = params(name, None, LONG_VALIDITY, CLOCK_TOLERANCE);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages.push(KeyUsagePurpose::KeyCertSign);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params
    }

    /// Signs the key of another CA, under that CA's name.
    fn cross_sign(&self, next: &Self) -> Result<CertificateDer<'static>, rcgen::Error> {
        let name = X509Certificate::from_der(&next.der).ok().and_then(|(_, certificate)| {
            let name = certificate.subject().iter_common_name().next()?;
            Some(name.as_str().ok()?.to_owned())
        });
        let params = Self::params(&name.unwrap_or_default());
        Ok(params.signed_by(next.issuer.key(), &self.issuer)?.der().clone())
    }

    fn of_secret(secret: &Secret) -> Result<Self, AuthorityError> {
        let [der, key_sec1] = pair(secret, CA_SECRET, CA_KEYS)?;
        Self::of_pair(CA_SECRET, der, key_sec1)
    }

    fn of_pair(
        secret: &'static str,
        der: Vec<u8>,
        key_sec1: Vec<u8>,
    ) -> Result<Self, AuthorityError> {
        let unusable = |reason: String| AuthorityError::Content { secret, reason };
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
        let fingerprint = Sha256::digest(&der).into();
        Ok(Self { der, fingerprint, key_sec1, issuer })
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

/// A replacement of the CA, as its Secret has it.
struct Rotation {
    previous_der: CertificateDer<'static>,
    /// Gone once the rotation is finished.
    previous: Option<CertificateAuthority>,
    next: CertificateAuthority,
    /// The certificate of the next CA's key that the previous CA signed.
    cross: CertificateDer<'static>,
    started: String,
    finished: Option<String>,
    secret: Secret,
}

impl Rotation {
    async fn read(client: &kube::Client) -> Result<Option<Self>, AuthorityError> {
        let Some(secret) = read(client, ROTATION_SECRET).await? else { return Ok(None) };
        let value = |key: &str| Some(secret.data.as_ref()?.get(key)?.0.clone());
        let needed = |key: &str| {
            value(key).ok_or_else(|| AuthorityError::Content {
                secret: ROTATION_SECRET,
                reason: format!("key `{key}` is missing"),
            })
        };
        let text = |key: &str| value(key).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let [previous_der, next_der] = [needed(PREVIOUS_KEYS[0])?, needed(NEXT_KEYS[0])?];
        let previous = match value(PREVIOUS_KEYS[1]) {
            Some(key) => {
                Some(CertificateAuthority::of_pair(ROTATION_SECRET, previous_der.clone(), key)?)
            }
            None => None,
        };
        let next = CertificateAuthority::of_pair(ROTATION_SECRET, next_der, needed(NEXT_KEYS[1])?)?;
        Ok(Some(Self {
            previous_der: previous_der.into(),
            previous,
            next,
            cross: needed(CROSS)?.into(),
            started: text(STARTED).unwrap_or_default(),
            finished: text(FINISHED),
            secret,
        }))
    }
}

/// What this server signs with, trusts and shows, at one time.
pub(crate) struct State {
    active: CertificateAuthority,
    /// Trusted beside the active one.
    others: Vec<CertificateAuthority>,
    server: Arc<CertifiedKey>,
    verifier: Arc<dyn ClientCertVerifier>,
    trust_generation: u64,
}

impl State {
    async fn read(client: &kube::Client, names: &[SanType]) -> Result<Self, AuthorityError> {
        let active = CertificateAuthority::open(client).await?;
        let (mut others, mut cross) = (Vec::new(), None);
        if let Some(rotation) = Rotation::read(client).await? {
            let Rotation { previous_der, previous, next, cross: signed, finished, .. } = rotation;
            if active.der == next.der {
                // Also when finished: nodes that were away trust the old CA only, and it costs nothing.
                cross = Some(signed);
                others.extend(previous.filter(|_| finished.is_none()));
            } else if active.der == previous_der && finished.is_none() {
                others.push(next);
            } else {
                tracing::warn!(
                    secret = ROTATION_SECRET,
                    "the secret is about other certificate authorities than the one in force and does not count"
                );
            }
        }
        let mut chain = server_certificate(client, &active, names).await?;
        chain.0.extend(cross);
        let roots = std::iter::once(&active).chain(&others).map(|ca| &ca.der);
        let verifier = tls::verifier(roots)?;
        let server = tls::certified_key(chain.0, PrivateSec1KeyDer::from(chain.1).into())?;
        Ok(Self { active, others, server, verifier, trust_generation: 0 })
    }

    /// The CA that signs, and whose fingerprint is in new join tokens.
    pub(crate) fn active(&self) -> &CertificateAuthority {
        &self.active
    }

    fn all(&self) -> impl Iterator<Item = &CertificateAuthority> {
        std::iter::once(&self.active).chain(&self.others)
    }

    /// The CA certificates in force, the active one first.
    pub(crate) fn bundle(&self) -> Vec<CertificateDer<'static>> {
        self.all().map(|ca| ca.der.clone()).collect()
    }

    /// Names [`Self::bundle`].
    pub(crate) fn bundle_fingerprint(&self) -> Fingerprint {
        bundle_fingerprint(self.all().map(|ca| ca.fingerprint))
    }

    /// Whether the CA with this fingerprint is in force.
    pub(crate) fn trusts(&self, issuer: &Fingerprint) -> bool {
        self.all().any(|ca| ca.fingerprint == *issuer)
    }

    /// The CA certificate in force with this SHA-256 in hex.
    pub(crate) fn ca_with(&self, fingerprint: &str) -> Option<&CertificateDer<'static>> {
        self.all().find(|ca| hex(&ca.fingerprint) == fingerprint).map(|ca| &ca.der)
    }

    /// The CA that signed a certificate; the active one when none of the others did.
    pub(crate) fn issuer_of(&self, certificate: &X509Certificate<'_>) -> Fingerprint {
        let signed = |ca: &&CertificateAuthority| is_signed_by(certificate, &ca.der);
        self.others.iter().find(signed).unwrap_or(&self.active).fingerprint
    }

    /// Checks the JWT of a join token at `now_s` with the keys of all CAs in force: tokens outlive the begin of a
    /// rotation.
    pub(crate) fn verify_token(&self, jwt: &str, now_s: i64) -> Result<Claims, JwtError> {
        let mut outcome = Claims::verify(jwt, now_s, self.active.hmac());
        for other in &self.others {
            if !matches!(outcome, Err(JwtError::Signature)) {
                break;
            }
            outcome = Claims::verify(jwt, now_s, other.hmac());
        }
        outcome
    }

    /// Certificate and key of this server.
    pub(crate) fn server(&self) -> &Arc<CertifiedKey> {
        &self.server
    }

    /// Verifies chain, usage and validity of client certificates.
    pub(crate) fn verifier(&self) -> &Arc<dyn ClientCertVerifier> {
        &self.verifier
    }

    /// Changes with the set of CAs.
    pub(crate) fn trust_generation(&self) -> u64 {
        self.trust_generation
    }
}

/// The CAs, and the server certificate of this CloudCore.
pub(crate) struct Authority {
    client: kube::Client,
    names: Vec<SanType>,
    current: RwLock<Arc<State>>,
    generations: watch::Sender<u64>,
}

impl Authority {
    /// Reads the CA and the server certificate of the cluster, or makes them.
    pub(crate) async fn open(
        client: &kube::Client,
        advertise: &[String],
    ) -> Result<Self, AuthorityError> {
        ensure_namespace(client).await?;
        let names = alternative_names(advertise)?;
        let state = State::read(client, &names).await?;
        Ok(Self {
            client: client.clone(),
            names,
            current: RwLock::new(Arc::new(state)),
            generations: watch::Sender::new(0),
        })
    }

    /// What is in force now.
    pub(crate) fn state(&self) -> Arc<State> {
        Arc::clone(&self.current.read().expect("never held over a panic"))
    }

    /// Tells when the set of CAs has changed.
    pub(crate) fn trust_changes(&self) -> watch::Receiver<u64> {
        self.generations.subscribe()
    }

    /// Reads the Secrets again, and puts what they say into force.
    pub(crate) async fn reload(&self) -> Result<(), AuthorityError> {
        let mut state = State::read(&self.client, &self.names).await?;
        let mut current = self.current.write().expect("never held over a panic");
        state.trust_generation = current.trust_generation;
        let changed = state.bundle() != current.bundle();
        if changed {
            state.trust_generation += 1;
        }
        let generation = state.trust_generation;
        *current = Arc::new(state);
        drop(current);
        if changed {
            tracing::info!(generation, "the set of certificate authorities in force has changed");
            self.generations.send_replace(generation);
        }
        Ok(())
    }

    /// Follows the Secrets until `stop`. While they cannot be read, what was read last is in force.
    pub(crate) async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), NAMESPACE);
        let mut events =
            std::pin::pin!(watcher::watcher(secrets, watcher::Config::default()).default_backoff());
        let run = async {
            while let Some(event) = events.next().await {
                let is_ours = |secret: &Secret| {
                    let name = secret.metadata.name.as_deref().unwrap_or_default();
                    [CA_SECRET, SERVER_SECRET, ROTATION_SECRET].contains(&name)
                };
                let matters = match &event {
                    Ok(Event::Apply(secret) | Event::Delete(secret)) => is_ours(secret),
                    Ok(Event::InitDone) => true,
                    Ok(_) => false,
                    Err(error) => {
                        tracing::warn!(%error, "the watch of the certificate authority failed, trying again");
                        false
                    }
                };
                if matters && let Err(error) = self.reload().await {
                    let error = chain(&error);
                    tracing::error!(error, "the certificate authority could not be read again");
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = run => {}
        }
    }

    /// Issues the certificate of `node` for this public key, good for `validity` from now.
    pub(crate) fn issue(
        &self,
        node: &str,
        key: &impl PublicKeyData,
        validity: std::time::Duration,
    ) -> Result<CertificateDer<'static>, rcgen::Error> {
        let validity = Duration::try_from(validity).unwrap_or(LONG_VALIDITY).min(LONG_VALIDITY);
        let mut params =
            params(&common_name(node), Some(NODE_ORGANIZATION), validity, Duration::ZERO);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params.signed_by(key, &self.state().active.issuer)?.der().clone())
    }
}

/// Names a list of CAs, of which the first one signs.
pub(crate) fn bundle_fingerprint(
    fingerprints: impl IntoIterator<Item = Fingerprint>,
) -> Fingerprint {
    Sha256::digest(fingerprints.into_iter().collect::<Vec<_>>().concat()).into()
}

/// The certificates in force, and who has followed a rotation.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CaStatus {
    /// The CAs, the one that signs first.
    pub authorities: Vec<CaInfo>,
    /// When the rotation in progress began, RFC 3339.
    pub rotating_since: Option<String>,
    /// When the last rotation was finished, RFC 3339.
    pub finished: Option<String>,
    /// Nodes of the cluster and nodes with a certificate of ours.
    pub nodes: Vec<CaNode>,
}

/// One CA.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CaInfo {
    /// `active` signs; `previous` and `next` are trusted as well; `retired` is not.
    pub role: &'static str,
    /// Hex SHA-256 of the certificate, as in join tokens.
    pub fingerprint: String,
    /// Its subject.
    pub subject: String,
    /// End of its validity, RFC 3339.
    pub not_after: String,
}

/// How far one node has followed.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CaNode {
    /// Its name.
    pub node: String,
    /// Whether its Node is Ready.
    pub ready: bool,
    /// Whether its last certificate is of the CA that signs; `None` when this CloudCore issued none.
    pub certificate_is_new: Option<bool>,
    /// Whether it has confirmed the trust bundle in force; `None` for a node that never confirms, as KubeEdge's.
    pub bundle_is_new: Option<bool>,
}

impl CaNode {
    /// Whether finishing the rotation would lock it out.
    pub fn is_behind(&self) -> bool {
        self.certificate_is_new != Some(true) || self.bundle_is_new == Some(false)
    }
}

/// Tells which CAs are in force and which nodes have followed.
///
/// # Errors
///
/// [`RotationError::Authority`] and [`RotationError::Nodes`].
pub async fn ca_status(client: &kube::Client) -> Result<CaStatus, RotationError> {
    let active = CertificateAuthority::read(client).await?;
    let rotation = Rotation::read(client).await?;
    let mut authorities = vec![info("active", &active.der)];
    let mut fingerprints = vec![active.fingerprint];
    let (mut rotating_since, mut finished) = (None, None);
    if let Some(rotation) = &rotation {
        finished.clone_from(&rotation.finished);
        let (role, other) = if rotation.next.der == active.der {
            ("previous", &rotation.previous_der)
        } else {
            ("next", &rotation.next.der)
        };
        if finished.is_none() {
            rotating_since = Some(rotation.started.clone());
            authorities.push(info(role, other));
            fingerprints.push(Sha256::digest(other).into());
        } else if role == "previous" {
            authorities.push(info("retired", other));
        }
    }
    let bundle = hex(&bundle_fingerprint(fingerprints));
    let issuer = hex(&active.fingerprint);
    let failed = |source| RotationError::Nodes(Box::new(source));
    let nodes: Api<Node> = Api::all(client.clone());
    let list = nodes.list(&ListParams::default()).await.map_err(failed)?;
    let mut found: BTreeMap<String, CaNode> = BTreeMap::new();
    let unknown = |node: &str, ready| CaNode {
        node: node.into(),
        ready,
        certificate_is_new: None,
        bundle_is_new: None,
    };
    // Only nodes that come through CloudCore; others never show a certificate of this CA.
    let edge = |node: &&Node| {
        node.metadata.labels.as_ref().is_some_and(|map| map.contains_key(EDGE_LABEL))
    };
    for node in list.items.iter().filter(edge) {
        let name = node.metadata.name.clone().unwrap_or_default();
        let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
        let ready = conditions
            .into_iter()
            .flatten()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True");
        found.insert(name.clone(), unknown(&name, ready));
    }
    for NodeIdentity { node, record } in gate::identities(client).await.map_err(failed)? {
        if record.serial.is_none() {
            continue;
        }
        let entry = found.entry(node.clone()).or_insert_with(|| unknown(&node, false));
        entry.certificate_is_new = Some(record.issuer.as_deref() == Some(&issuer));
        entry.bundle_is_new = record.bundle.map(|confirmed| confirmed == bundle);
    }
    let nodes = found.into_values().collect();
    Ok(CaStatus { authorities, rotating_since, finished, nodes })
}

/// Label of the nodes behind CloudCore.
const EDGE_LABEL: &str = "node-role.kubernetes.io/edge";

fn info(role: &'static str, der: &CertificateDer<'_>) -> CaInfo {
    let fingerprint = hex(&Sha256::digest(der));
    let (mut subject, mut not_after) = (String::new(), String::new());
    if let Ok((_, certificate)) = X509Certificate::from_der(der) {
        subject = certificate.subject().to_string();
        not_after = Timestamp::from_second(certificate.validity().not_after.timestamp())
            .map(|time| time.to_string())
            .unwrap_or_default();
    }
    CaInfo { role, fingerprint, subject, not_after }
}

/// Begins to replace the CA: makes a new one beside the old and lets it sign from now on. A call that broke off is
/// continued by the next.
///
/// # Errors
///
/// [`RotationError::InProgress`] until [`finish_ca`]; otherwise the old CA stays in force.
pub async fn rotate_ca(client: &kube::Client) -> Result<CaStatus, RotationError> {
    let secret = read(client, CA_SECRET).await?.ok_or(AuthorityError::Missing)?;
    let active = CertificateAuthority::of_secret(&secret)?;
    let old = Rotation::read(client).await?;
    let next = match old {
        Some(old) if old.finished.is_none() && old.previous_der == active.der => old.next,
        Some(old) if old.finished.is_none() && old.next.der == active.der => {
            return Err(RotationError::InProgress { started: old.started });
        }
        old => {
            let (der, key) = CertificateAuthority::generate(None).map_err(AuthorityError::from)?;
            let next =
                CertificateAuthority::of_pair(ROTATION_SECRET, der.to_vec(), sec1_of_key(&key))?;
            let cross = active.cross_sign(&next).map_err(AuthorityError::from)?;
            let data = [
                (PREVIOUS_KEYS[0], active.der.to_vec()),
                (PREVIOUS_KEYS[1], active.key_sec1.clone()),
                (NEXT_KEYS[0], next.der.to_vec()),
                (NEXT_KEYS[1], next.key_sec1.clone()),
                (CROSS, cross.to_vec()),
                (STARTED, Timestamp::now().to_string().into_bytes()),
            ];
            put(client, ROTATION_SECRET, data.into(), old.map(|old| old.secret)).await?;
            next
        }
    };
    // Last, with the version that was read: two rotations at once would leave a CA that nobody trusts.
    let data = [(CA_KEYS[0], next.der.to_vec()), (CA_KEYS[1], next.key_sec1)];
    put(client, CA_SECRET, data.into(), Some(secret)).await?;
    ca_status(client).await
}

/// Ends the trust in certificates of the previous CA, and forgets its key. With `force` also when connected nodes have
/// not followed; these have to join again.
///
/// # Errors
///
/// [`RotationError::Behind`] and [`RotationError::NotInProgress`]; nothing has changed then.
pub async fn finish_ca(client: &kube::Client, force: bool) -> Result<CaStatus, RotationError> {
    let status = ca_status(client).await?;
    let active = CertificateAuthority::read(client).await?;
    let rotation = Rotation::read(client).await?;
    let Some(rotation) = rotation.filter(|rotation| rotation.finished.is_none()) else {
        return Err(RotationError::NotInProgress);
    };
    if rotation.next.der != active.der {
        return Err(RotationError::NotInProgress);
    }
    let behind = status.nodes.iter().filter(|node| node.ready && node.is_behind());
    let nodes: Vec<String> = behind.map(|node| node.node.clone()).collect();
    if !nodes.is_empty() && !force {
        return Err(RotationError::Behind { nodes });
    }
    let data = [
        (PREVIOUS_KEYS[0], rotation.previous_der.to_vec()),
        (NEXT_KEYS[0], rotation.next.der.to_vec()),
        (NEXT_KEYS[1], rotation.next.key_sec1.clone()),
        (CROSS, rotation.cross.to_vec()),
        (STARTED, rotation.started.into_bytes()),
        (FINISHED, Timestamp::now().to_string().into_bytes()),
    ];
    put(client, ROTATION_SECRET, data.into(), Some(rotation.secret)).await?;
    ca_status(client).await
}

/// The server certificate of the cluster and its key (SEC 1); made, or made anew, when it does not serve.
async fn server_certificate(
    client: &kube::Client,
    ca: &CertificateAuthority,
    names: &[SanType],
) -> Result<(Vec<CertificateDer<'static>>, Vec<u8>), AuthorityError> {
    let old = read(client, SERVER_SECRET).await?;
    if let Some(secret) = &old {
        let [der, key] = pair(secret, SERVER_SECRET, SERVER_KEYS)?;
        if is_usable(&der, ca, names) {
            return Ok((vec![der.into()], key));
        }
        tracing::info!("the server certificate is made anew: other names, another CA, or too old");
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = params("KubeEdge", Some("KubeEdge"), LONG_VALIDITY, CLOCK_TOLERANCE);
    params.subject_alt_names = names.to_vec();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let certificate = params.signed_by(&key, &ca.issuer)?;
    let pair_new = [certificate.der().to_vec(), sec1_of_key(&key)];
    let secret = write(client, SERVER_SECRET, SERVER_KEYS, pair_new, old).await?;
    let [der, key] = pair(&secret, SERVER_SECRET, SERVER_KEYS)?;
    Ok((vec![der.into()], key))
}

/// Writes a Secret whose version must still be the one of `old`.
async fn put(
    client: &kube::Client,
    name: &'static str,
    data: BTreeMap<&str, Vec<u8>>,
    old: Option<Secret>,
) -> Result<(), RotationError> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let data = data.into_iter().map(|(key, bytes)| (key.to_owned(), ByteString(bytes))).collect();
    let written = match old {
        Some(old) => {
            let secret = Secret { data: Some(data), string_data: None, ..old };
            secrets.replace(name, &PostParams::default(), &secret).await
        }
        None => secrets.create(&PostParams::default(), &opaque(name, data)).await,
    };
    match written {
        Ok(_) => Ok(()),
        Err(error) if api::is_conflict(&error) || api::is_already_exists(&error) => {
            Err(RotationError::Conflict)
        }
        Err(source) => {
            let (action, source) = ("write", Box::new(source));
            Err(AuthorityError::Secret { action, secret: name, source }.into())
        }
    }
}

pub(crate) fn opaque(name: &str, data: BTreeMap<String, ByteString>) -> Secret {
    let metadata = ObjectMeta {
        name: Some(name.into()),
        namespace: Some(NAMESPACE.into()),
        ..ObjectMeta::default()
    };
    Secret { metadata, data: Some(data), type_: Some("Opaque".into()), ..Secret::default() }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn is_signed_by(certificate: &X509Certificate<'_>, ca: &[u8]) -> bool {
    X509Certificate::from_der(ca).is_ok_and(|(_, ca)| {
        certificate.issuer().as_raw() == ca.subject().as_raw()
            && certificate.verify_signature(Some(ca.public_key())).is_ok()
    })
}

fn params(
    name: &str,
    organization: Option<&str>,
    validity: Duration,
    begun: Duration,
) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    if let Some(organization) = organization {
        subject.push(DnType::OrganizationName, organization);
    }
    subject.push(DnType::CommonName, name);
    params.distinguished_name = subject;
    let now = OffsetDateTime::now_utc();
    params.not_before = now - begun;
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
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return false };
    let soon = OffsetDateTime::now_utc() + Duration::days(30);
    if !is_signed_by(&certificate, &ca.der) || certificate.validity().not_after.to_datetime() < soon
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
        None => secrets.create(&PostParams::default(), &opaque(name, data)).await,
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
