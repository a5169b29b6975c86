//! How the node gets, keeps and renews its certificate.
//!
//! First: fetch the CA without trust, compare it with the fingerprint in the join token, make a key here, ask for a
//! certificate with the token. Later: ask with the certificate itself, between 50 and 70 percent of its life, over the
//! link when the hub can, else over HTTPS as KubeEdge's edge does. The key never leaves the machine; files are 0600,
//! written whole or not at all.
//!
//! An expired certificate is not thrown away: the hub takes it as proof of the key and renews it (amnesty). A token in
//! the configuration that has not been used yet is a person's wish to join again, and is tried when it appears and when
//! renewal is refused.
//!
//! The link shell calls [`ensure`] and runs [`keep_renewed`]; the agent hands pushes of the hub to [`handle_push`].
//!
//! Source: kubeedge/kubeedge, edge/pkg/edgehub/certificate/certmanager.go (sequence, headers, subject).

use crate::config::{Config, Endpoint, TokenSource};
use crate::objects::LookupRequest;
use crate::tls::{self, Identity, TlsError, Trust};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::ClientConfig;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use skerry_edge_core::backoff::{Backoff, Random};
use skerry_protocol::capability::{self, Capabilities};
use skerry_protocol::certificate::{
    Bundle, CertificateReply, CertificateRequest, Der, bundle_node, bundle_resource, request_node,
    request_resource,
};
use skerry_protocol::enrol::{
    CA_PATH, CERTIFICATE_PATH, JoinToken, NODE_NAME_HEADER, NODE_ORGANIZATION, TokenFormatError,
    common_name,
};
use skerry_protocol::{Message, ResourcePath};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;

/// The largest answer of the enrolment listener; a certificate has about one KiB.
const ANSWER_LEN_MAX: usize = 64 * 1024;
/// Time for one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The wall clock may jump, so the time of renewal is looked at again now and then.
const LOOK_INTERVAL: Duration = Duration::from_secs(600);
/// Bounds of the wait after a renewal that failed.
const RETRY_BASE: Duration = Duration::from_secs(30);
const RETRY_CAP: Duration = Duration::from_secs(3600);
/// After a renewal, nobody may ask for the next one for this long: a hub that refuses a fresh certificate has another
/// reason, which no renewal removes.
const ASK_INTERVAL: Duration = Duration::from_secs(600);
/// A renewal that the CAs in force ask for begins within this time, so that a fleet does not come at once.
const FOLLOW_MAX: Duration = Duration::from_secs(60);
/// The time file is written again when a certificate proves a time later than it by this much.
const TIME_STEP_S: i64 = 86_400;

const CA_FILE: &str = "ca.crt";
const PAIR_FILE: &str = "edge.pem";
/// Fingerprint of the token with which the node joined last.
const TOKEN_FILE: &str = "joined-with";
/// The latest time that a certificate has proven, Unix seconds.
const TIME_FILE: &str = "time";

/// CA and certificate of the node, in a directory of their own.
#[derive(Debug, Clone)]
pub struct Pki {
    dir: PathBuf,
}

/// What TLS needs, from the disk.
#[derive(Clone)]
pub struct Credentials {
    /// The CAs, and what they prove of the time.
    pub ca: Trust,
    /// The node's certificate and key.
    pub identity: Identity,
    renewal: Arc<Notify>,
    tls: OnceLock<Arc<ClientConfig>>,
}

impl Credentials {
    fn new(ca: Trust, identity: Identity, renewal: Arc<Notify>) -> Self {
        ca.prove(identity.not_before);
        Self { ca, identity, renewal, tls: OnceLock::new() }
    }

    /// The TLS configuration for these credentials, the same one each time, so that sessions are resumed. Clone it to
    /// set another ALPN; the clone resumes too.
    ///
    /// # Errors
    ///
    /// [`TlsError::Config`] when the parts do not fit.
    pub fn client_config(&self) -> Result<Arc<ClientConfig>, TlsError> {
        if let Some(config) = self.tls.get() {
            return Ok(config.clone());
        }
        let config = tls::client_config(&self.ca, Some(&self.identity))?;
        Ok(self.tls.get_or_init(|| config).clone())
    }

    /// Asks [`keep_renewed`] for a new certificate now: the hub has said that this one is no longer good. Calls soon
    /// after a renewal, and while the wait after a failed one is not over, cost nothing.
    pub fn ask_renewal(&self) {
        self.renewal.notify_one();
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({} until {})", self.identity.common_name, self.identity.not_after)
    }
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
    /// The hub did not renew over the link.
    #[error("the hub did not renew the certificate over the link: {text}")]
    Link {
        /// Its words, or why there were none.
        text: String,
    },
    /// What came as CA certificates is none.
    #[error("the hub sent a bundle of CA certificates that is not usable: {text}")]
    Bundle {
        /// What is wrong.
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
            Self::Connect(_)
                | Self::Failed { .. }
                | Self::Http { .. }
                | Self::Link { .. }
                | Self::File { .. }
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
        let (Some(ca), Some(pem)) = (self.read(CA_FILE)?, self.read(PAIR_FILE)?) else {
            return Ok(None);
        };
        let bad = |reason: String| {
            EnrolError::from(TlsError::Certificate { path: self.dir.join(CA_FILE), reason })
        };
        let cas: Vec<Vec<u8>> = CertificateDer::pem_slice_iter(ca.as_bytes())
            .map(|ca| ca.map(|ca| ca.to_vec()))
            .collect::<Result<_, _>>()
            .map_err(|error| bad(error.to_string()))?;
        if cas.is_empty() {
            return Err(bad("it holds no certificate".into()));
        }
        let identity = Identity::parse(&self.dir.join(PAIR_FILE), pem)?;
        // A time that is not readable proves nothing; the certificate itself proves enough.
        let proven_s = self.read(TIME_FILE).ok().flatten();
        let proven_s = proven_s.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        let mine = identity.common_name == common_name(node);
        let trust = Trust::new(cas, proven_s);
        Ok(mine.then(|| Credentials::new(trust, identity, Arc::default())))
    }

    fn save_cas(&self, cas: &[Vec<u8>]) -> Result<(), EnrolError> {
        self.save(CA_FILE, &cas.iter().map(|ca| pem("CERTIFICATE", ca)).collect::<String>())
    }

    /// Writes the latest proven time when it is much later than what is there.
    fn save_time(&self, trust: &Trust) -> Result<(), EnrolError> {
        let saved = self.read(TIME_FILE).ok().flatten();
        let saved_s = saved.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        if trust.proven_s() < TIME_STEP_S.saturating_add(saved_s) {
            return Ok(());
        }
        self.save(TIME_FILE, &trust.proven_s().to_string())
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

/// Reads the credentials, or joins with the token. With credentials there, a token that has not been used yet is tried
/// first; when it does not hold, the credentials are good enough, also expired ones.
///
/// # Errors
///
/// [`EnrolError`]; see [`EnrolError::is_transient`].
pub async fn ensure(config: &Config) -> Result<Credentials, EnrolError> {
    let pki = Pki::new(config.pki());
    let Some(current) = pki.load(&config.node_name)? else {
        let token = read_token(config)?
            .ok_or_else(|| EnrolError::NoToken { node: config.node_name.clone() })?;
        return join(&pki, config, &token, Arc::default()).await;
    };
    if pki.read(TOKEN_FILE).ok().flatten().is_none() {
        // Joined with an older version, or taken over from KubeEdge: the token that is there now counts as used.
        let token = read_token(config).ok().flatten().unwrap_or_default();
        if let Err(error) = pki.save(TOKEN_FILE, &token_fingerprint(&token)) {
            // A full disk keeps no node from its hub.
            tracing::warn!(error = crate::link::chain(&error), "the join token could not be noted");
        }
    }
    match join_again(config, &pki, &current).await {
        Some(Ok(next)) => Ok(next),
        Some(Err(error)) => {
            let error = crate::link::chain(&error);
            tracing::warn!(
                error,
                "the new join token was of no use; going on with the certificate"
            );
            Ok(current)
        }
        None => Ok(current),
    }
}

/// Joins with the token of the configuration if it is another one than the node joined with; `None` when it is not.
async fn join_again(
    config: &Config,
    pki: &Pki,
    current: &Credentials,
) -> Option<Result<Credentials, EnrolError>> {
    let token = new_token(config, pki)?;
    tracing::info!(node = config.node_name, "there is a new join token, joining again");
    Some(join(pki, config, &token, current.renewal.clone()).await)
}

/// The token of the configuration, unless the node joined with it.
fn new_token(config: &Config, pki: &Pki) -> Option<String> {
    // A token file that is gone was used and removed.
    let token = read_token(config).ok().flatten()?;
    let used = pki.read(TOKEN_FILE).ok().flatten()?;
    (used.trim() != token_fingerprint(&token)).then_some(token)
}

fn read_token(config: &Config) -> Result<Option<String>, EnrolError> {
    Ok(match &config.token {
        None => None,
        Some(TokenSource::Text(text)) => Some(text.trim().to_owned()),
        Some(TokenSource::File(path)) => {
            match fs::read_to_string(path) {
                Ok(text) => Some(text.trim().to_owned()),
                // It was used and removed, or there never was one; both are told as what they mean.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                Err(source) => {
                    return Err(EnrolError::TokenFile { path: path.clone(), source });
                }
            }
        }
    })
}

fn token_fingerprint(token: &str) -> String {
    skerry_protocol::enrol::ca_hash(token.as_bytes())
}

async fn join(
    pki: &Pki,
    config: &Config,
    text: &str,
    renewal: Arc<Notify>,
) -> Result<Credentials, EnrolError> {
    let (endpoint, node) = (&config.enrol, config.node_name.as_str());
    let token: JoinToken = text.parse()?;
    // Our listener has the CA of an older token too while a new CA is being introduced; KubeEdge's ignores the question.
    let request = Request::get(format!("{CA_PATH}?sha256={}", token.ca_hash()));
    let ca = fetch(endpoint, tls::unverified_config(), request, Bytes::new(), node).await?;
    if !token.is_for_ca(&ca) {
        return Err(EnrolError::ForeignCa {
            endpoint: endpoint.clone(),
            found: skerry_protocol::enrol::ca_hash(&ca),
            expected: token.ca_hash().to_owned(),
        });
    }
    let trust = Trust::new(vec![ca.to_vec()], 0);
    let trusted = tls::client_config(&trust, None)?;
    let bearer = Some(format!("Bearer {}", token.jwt()));
    let identity = request_certificate(endpoint, trusted, node, bearer).await?;
    // The CA first: a certificate without it would never be looked at.
    pki.save_cas(&trust.cas)?;
    pki.save(PAIR_FILE, &identity.pem)?;
    pki.save(TOKEN_FILE, &token_fingerprint(text))?;
    tracing::info!(node, %endpoint, "joined the cluster");
    Ok(Credentials::new(trust, identity, renewal))
}

/// Gets a new certificate with a new key over HTTPS, shown the current one.
///
/// # Errors
///
/// [`EnrolError`]; the current certificate stays then.
pub async fn renew(config: &Config, current: &Credentials) -> Result<Credentials, EnrolError> {
    let tls = current.client_config()?;
    let identity = request_certificate(&config.enrol, tls, &config.node_name, None).await?;
    let pki = Pki::new(config.pki());
    pki.save(PAIR_FILE, &identity.pem)?;
    Ok(Credentials::new(current.ca.clone(), identity, current.renewal.clone()))
}

/// The same over the link; with the certificate come the CAs in force.
async fn renew_on_link(
    config: &Config,
    current: &Credentials,
    lookups: &mpsc::Sender<LookupRequest>,
) -> Result<Credentials, EnrolError> {
    let node = &config.node_name;
    let (key, csr) = key_and_request(node)?;
    let content = CertificateRequest { csr: Der(csr) };
    let reply = ask(lookups, &request_resource(node), &content).await?;
    let reply: CertificateReply = serde_json::from_value(reply)
        .map_err(|error| EnrolError::Link { text: format!("its answer is not valid: {error}") })?;
    let identity = identity_of(&key, &reply.certificate.0, Path::new("the link"))?;
    let cas = checked_bundle(reply.bundle.into_iter().map(|ca| ca.0).collect())?;
    let refused = |text: &str| EnrolError::Link { text: text.into() };
    if identity.common_name != common_name(node) {
        return Err(refused("it sent another node's certificate"));
    }
    if !is_signed_by_any(&reply.certificate.0, &cas) {
        return Err(refused("it sent a certificate of a CA that is not in its bundle"));
    }
    let next = Credentials::new(current.ca.with_cas(cas), identity, current.renewal.clone());
    // Fails when certificate and key do not belong together; better here than on the disk.
    next.client_config()?;
    let pki = Pki::new(config.pki());
    if next.ca.cas != current.ca.cas {
        pki.save_cas(&next.ca.cas)?;
    }
    pki.save(PAIR_FILE, &next.identity.pem)?;
    Ok(next)
}

/// Asks the hub over the link, through the agent.
async fn ask(
    lookups: &mpsc::Sender<LookupRequest>,
    resource: &str,
    content: &impl serde::Serialize,
) -> Result<serde_json::Value, EnrolError> {
    let failed = |text: String| EnrolError::Link { text };
    let path: ResourcePath = resource
        .parse()
        .map_err(|error: skerry_protocol::ResourceError| failed(error.to_string()))?;
    let content = serde_json::to_value(content).expect("bodies have only string keys");
    let (answer, found) = oneshot::channel();
    let exchange = async {
        let request = LookupRequest { path, content, answer };
        lookups.send(request).await.map_err(|_| "the agent is stopping".to_owned())?;
        found.await.unwrap_or_else(|_| Err("the agent is stopping".to_owned()))
    };
    match tokio::time::timeout(REQUEST_TIMEOUT, exchange).await {
        Ok(Ok(Some(answer))) => Ok(answer),
        Ok(Ok(None)) => Err(failed("it knows nothing of certificates".into())),
        Ok(Err(text)) => Err(failed(text)),
        Err(_) => Err(failed(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()))),
    }
}

/// When to renew, in Unix seconds: evenly drawn between 50 and 70 percent of the lifetime.
pub fn renewal_time_s(identity: &Identity, random: &mut Random) -> i64 {
    let lifetime_s = (identity.not_after - identity.not_before).max(0);
    let permille = 500 + i64::try_from(random.below(201)).unwrap_or(0);
    identity
        .not_before
        .saturating_add(lifetime_s / 1000 * permille + lifetime_s % 1000 * permille / 1000)
}

/// When a certificate is to be renewed, by a clock that may be wrong: what counts is the time that this process has
/// held it, by the steady clock and by the wall clock, whichever says more (only one of them goes on in a suspended
/// machine, and only the other is right).
#[derive(Debug, Clone, Copy)]
struct Schedule {
    held_since: Instant,
    held_since_wall_s: i64,
    /// Age of the certificate then, seconds.
    age_s: i64,
    /// Age at which it is due, seconds.
    due_s: i64,
}

impl Schedule {
    /// `fresh` says that the certificate was issued just now, so that its age needs no clock.
    fn new(
        identity: &Identity,
        trust: &Trust,
        fresh: bool,
        wall_s: i64,
        random: &mut Random,
    ) -> Self {
        let now_s = wall_s.max(trust.proven_s());
        Self {
            held_since: Instant::now(),
            held_since_wall_s: wall_s,
            age_s: if fresh { 0 } else { now_s.saturating_sub(identity.not_before).max(0) },
            due_s: renewal_time_s(identity, random).saturating_sub(identity.not_before),
        }
    }

    /// The same, but due within `limit` from now.
    fn sooner(self, limit: Duration, wall_s: i64, random: &mut Random) -> Self {
        let ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let wait_s = i64::try_from(random.below(ms + 1) / 1000).unwrap_or(i64::MAX);
        let now = Instant::now();
        Self { due_s: self.due_s.min(self.age(now, wall_s).saturating_add(wait_s)), ..self }
    }

    fn age(&self, now: Instant, wall_s: i64) -> i64 {
        let steady_s = i64::try_from((now - self.held_since).as_secs()).unwrap_or(i64::MAX);
        let wall_s = wall_s.saturating_sub(self.held_since_wall_s);
        self.age_s.saturating_add(steady_s.max(wall_s))
    }

    /// Time until it is due.
    fn left(&self, now: Instant, wall_s: i64) -> Duration {
        let left_s = self.due_s.saturating_sub(self.age(now, wall_s));
        Duration::from_secs(u64::try_from(left_s).unwrap_or(0))
    }
}

/// Renews the certificate when its time has come, when the hub asks for it ([`Credentials::ask_renewal`]), and when the
/// CA that signs is another one than it is from; whoever dials next shows the new one. Also confirms to the hub which
/// CAs are stored.
///
/// Ends when nobody holds the credentials any more.
pub async fn keep_renewed(
    config: Arc<Config>,
    credentials: watch::Sender<Option<Arc<Credentials>>>,
    lookups: mpsc::Sender<LookupRequest>,
    seed: u64,
) {
    let mut random = Random::new(seed);
    let mut changes = credentials.subscribe();
    let current = changes.wait_for(Option::is_some).await.ok().and_then(|found| (*found).clone());
    let Some(mut current) = current else { return };
    let pki = Pki::new(config.pki());
    let mut backoff = Backoff::between(RETRY_BASE, RETRY_CAP, random.next_u64());
    let mut schedule = Schedule::new(&current.identity, &current.ca, false, wall_s(), &mut random);
    if !is_of_active_ca(&current) {
        schedule = schedule.sooner(FOLLOW_MAX, wall_s(), &mut random);
    }
    let (mut not_before, mut asked_not_before) = (Instant::now(), Instant::now());
    // `ensure` has just tried what is there.
    let mut tried = new_token(&config, &pki);
    loop {
        if let Err(error) = pki.save_time(&current.ca) {
            let error = crate::link::chain(&error);
            tracing::warn!(error, "the latest known time could not be written");
        }
        let wait = schedule.left(Instant::now(), wall_s()).min(LOOK_INTERVAL);
        tokio::select! {
            () = tokio::time::sleep(wait) => {
                if let Some(token) = new_token(&config, &pki).filter(|new| tried.as_ref() != Some(new)) {
                    tried = Some(token);
                    match join_again(&config, &pki, &current).await {
                        Some(Ok(next)) => {
                            credentials.send_replace(Some(Arc::new(next)));
                        }
                        Some(Err(error)) => {
                            let hint = error.hint().unwrap_or_default();
                            let error = crate::link::chain(&error);
                            tracing::warn!(error, hint, "the new join token was of no use");
                        }
                        None => {}
                    }
                    continue;
                }
                if !schedule.left(Instant::now(), wall_s()).is_zero() {
                    continue;
                }
            }
            () = current.renewal.notified() => {
                if Instant::now() < not_before.max(asked_not_before) {
                    // Whoever asks does so again with the next refusal.
                    continue;
                }
            }
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                // A renewal of ours, or a push; also one of what is stored already, when the hub has no note of it.
                let newest = changes.borrow_and_update().clone();
                if let Some(newest) = newest.filter(|newest| !Arc::ptr_eq(newest, &current)) {
                    if newest.identity.pem != current.identity.pem {
                        let (identity, trust) = (&newest.identity, &newest.ca);
                        schedule = Schedule::new(identity, trust, true, wall_s(), &mut random);
                    }
                    current = newest;
                    if !is_of_active_ca(&current) {
                        schedule = schedule.sooner(FOLLOW_MAX, wall_s(), &mut random);
                    }
                }
                confirm(&config, &current, &lookups).await;
                continue;
            }
        }
        tokio::time::sleep_until(not_before).await;
        match renew_any_way(&config, &pki, &current, &lookups).await {
            Ok(next) => {
                let valid_until_s = next.identity.not_after;
                tracing::info!(valid_until_s, "renewed the node's certificate");
                schedule = Schedule::new(&next.identity, &next.ca, true, wall_s(), &mut random);
                current = Arc::new(next);
                credentials.send_replace(Some(current.clone()));
                backoff.reset();
                asked_not_before = Instant::now() + ASK_INTERVAL;
            }
            Err(error) => {
                let wait = backoff.next_wait();
                let hint = error.hint().unwrap_or_default();
                let error = crate::link::chain(&error);
                tracing::warn!(error, hint, ?wait, "could not renew the node's certificate");
                not_before = Instant::now() + wait;
            }
        }
    }
}

/// Over the link; else over HTTPS; else with a new token, if there is one.
async fn renew_any_way(
    config: &Config,
    pki: &Pki,
    current: &Credentials,
    lookups: &mpsc::Sender<LookupRequest>,
) -> Result<Credentials, EnrolError> {
    match renew_on_link(config, current, lookups).await {
        Ok(next) => return Ok(next),
        Err(error) => {
            let error = crate::link::chain(&error);
            tracing::debug!(error, "no renewal over the link, trying HTTPS");
        }
    }
    match renew(config, current).await {
        Err(error) if !error.is_transient() => match join_again(config, pki, current).await {
            Some(joined) => joined,
            None => Err(error),
        },
        renewed => renewed,
    }
}

/// Tells the hub which CAs are stored. When that fails, the hub has no note of it and pushes them again.
async fn confirm(config: &Config, current: &Credentials, lookups: &mpsc::Sender<LookupRequest>) {
    let bundle = Bundle { bundle: current.ca.cas.iter().map(|ca| Der(ca.clone())).collect() };
    if let Err(error) = ask(lookups, &bundle_resource(&config.node_name), &bundle).await {
        tracing::debug!(error = crate::link::chain(&error), "the stored CAs are not confirmed yet");
    }
}

/// Takes a push of the hub about certificates: new CAs are stored and used from the next dial on, a demand wakes
/// [`keep_renewed`]. `None` when the message is about something else. Acknowledge it only when this succeeded.
///
/// # Errors
///
/// [`EnrolError`]; nothing has changed then.
pub fn handle_push(
    config: &Config,
    credentials: &watch::Sender<Option<Arc<Credentials>>>,
    message: &Message,
) -> Option<Result<(), EnrolError>> {
    let resource = message.route.resource.as_str();
    if bundle_node(resource) == Some(&config.node_name) {
        return Some(store_bundle(config, credentials, message));
    }
    if request_node(resource) == Some(&config.node_name) {
        if let Some(current) = &*credentials.borrow() {
            current.ask_renewal();
        }
        return Some(Ok(()));
    }
    None
}

/// Stores the CAs that the hub pushed, and uses them from the next dial on.
///
/// # Errors
///
/// [`EnrolError::Bundle`] and [`EnrolError::File`]; nothing has changed then.
pub fn store_bundle(
    config: &Config,
    credentials: &watch::Sender<Option<Arc<Credentials>>>,
    message: &Message,
) -> Result<(), EnrolError> {
    let bundle: Bundle =
        message.content_as().map_err(|error| EnrolError::Bundle { text: error.to_string() })?;
    let cas = checked_bundle(bundle.bundle.into_iter().map(|ca| ca.0).collect())?;
    let Some(current) = credentials.borrow().clone() else { return Ok(()) };
    if current.ca.cas == cas {
        // Sent again, so the hub does not know that it is here: a change without a difference makes it be confirmed.
        credentials.send_modify(|_| {});
        return Ok(());
    }
    Pki::new(config.pki()).save_cas(&cas)?;
    tracing::info!(
        authorities = cas.len(),
        "the hub has told which certificate authorities are in force"
    );
    let trust = current.ca.with_cas(cas);
    let next = Credentials::new(trust, current.identity.clone(), current.renewal.clone());
    credentials.send_replace(Some(Arc::new(next)));
    Ok(())
}

fn checked_bundle(cas: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, EnrolError> {
    let bad = |text: String| EnrolError::Bundle { text };
    if cas.is_empty() {
        return Err(bad("it is empty".into()));
    }
    for ca in &cas {
        let (_, certificate) =
            x509_parser::parse_x509_certificate(ca).map_err(|error| bad(error.to_string()))?;
        if !certificate.is_ca() {
            return Err(bad(format!("`{}` is no CA", certificate.subject())));
        }
    }
    Ok(cas)
}

fn is_of_active_ca(credentials: &Credentials) -> bool {
    let der = CertificateDer::from_pem_slice(credentials.identity.pem.as_bytes());
    // With one CA there is nothing to follow, whoever signed.
    credentials.ca.cas.len() < 2
        || der.is_ok_and(|der| is_signed_by_any(&der, &credentials.ca.cas[..1]))
}

fn is_signed_by_any(certificate: &[u8], cas: &[Vec<u8>]) -> bool {
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(certificate) else {
        return false;
    };
    cas.iter().any(|ca| {
        x509_parser::parse_x509_certificate(ca)
            .is_ok_and(|(_, ca)| certificate.verify_signature(Some(ca.public_key())).is_ok())
    })
}

fn wall_s() -> i64 {
    jiff::Timestamp::now().as_second()
}

fn key_and_request(node: &str) -> Result<(KeyPair, Vec<u8>), EnrolError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(EnrolError::Request)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, NODE_ORGANIZATION);
    params.distinguished_name.push(DnType::CommonName, common_name(node));
    let csr = params.serialize_request(&key).map_err(EnrolError::Request)?;
    Ok((key, csr.der().to_vec()))
}

fn identity_of(key: &KeyPair, der: &[u8], from: &Path) -> Result<Identity, EnrolError> {
    Ok(Identity::parse(from, format!("{}{}", key.serialize_pem(), pem("CERTIFICATE", der)))?)
}

async fn request_certificate(
    endpoint: &Endpoint,
    tls: Arc<ClientConfig>,
    node: &str,
    bearer: Option<String>,
) -> Result<Identity, EnrolError> {
    let (key, csr) = key_and_request(node)?;
    // Says that we renew in time, so that a short life is no danger; KubeEdge's listener does not look.
    let mut request = Request::get(CERTIFICATE_PATH)
        .header(NODE_NAME_HEADER, node)
        .header(capability::HEADER, Capabilities::OURS.to_string());
    if let Some(bearer) = bearer {
        request = request.header(http::header::AUTHORIZATION, bearer);
    }
    let der = fetch(endpoint, tls, request, Bytes::from(csr), node).await?;
    let from = PathBuf::from(format!("https://{endpoint}{CERTIFICATE_PATH}"));
    let identity = identity_of(&key, &der, &from)?;
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

/// Removes the node's certificate, so that the next start joins again, with whatever token there is.
///
/// # Errors
///
/// [`EnrolError::File`].
pub fn forget(dir: &Path) -> Result<(), EnrolError> {
    for name in [PAIR_FILE, TOKEN_FILE, TIME_FILE] {
        match fs::remove_file(dir.join(name)) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(EnrolError::File { path: dir.join(name), source });
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_drawn_between_50_and_70_percent_of_the_life() {
        for seed in 0..500 {
            let at = renewal_time_s(&identity(), &mut Random::new(seed));
            assert!((51_000..=71_000).contains(&at), "{at}");
        }
    }

    fn identity() -> Identity {
        Identity {
            pem: String::new(),
            common_name: String::new(),
            not_before: 1000,
            not_after: 101_000,
        }
    }

    #[test]
    fn wrong_clock_makes_a_renewal_early_at_worst_and_never_again_and_again() {
        let mut random = Random::new(1);
        let trust = Trust::new(Vec::new(), 0);
        let mut left = |fresh: bool, wall_s: i64, later_s: u64, later_wall_s: i64| {
            let schedule = Schedule::new(&identity(), &trust, fresh, wall_s, &mut random);
            let later = schedule.held_since + Duration::from_secs(later_s);
            schedule.left(later, later_wall_s).as_secs()
        };
        // A right clock.
        assert!((50_000..=70_000).contains(&left(false, 1000, 0, 1000)));
        assert_eq!(left(false, 90_000, 0, 90_000), 0);
        // In 1970 the life is counted from when this process got hold of it; set right, it counts at once.
        assert!((49_000..=70_000).contains(&left(false, 0, 1000, 1000)));
        assert_eq!(left(false, 0, 10, 90_000), 0);
        // In 2100 an old certificate is renewed at once, the new one is not.
        let in_2100 = 4_102_444_800;
        assert_eq!(left(false, in_2100, 0, in_2100), 0);
        assert!((49_000..=70_000).contains(&left(true, in_2100, 1000, in_2100 + 1000)));
        // Set back from there, nothing happens either.
        assert!((49_000..=70_000).contains(&left(true, in_2100, 1000, 2000)));
    }

    #[test]
    fn proven_time_counts_where_the_clock_knows_less() {
        let trust = Trust::new(Vec::new(), 95_000);
        let schedule = Schedule::new(&identity(), &trust, false, 0, &mut Random::new(1));
        assert!(schedule.left(Instant::now(), 0).is_zero());
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
