//! Join tokens and the records that make each good for its nodes, once.
//!
//! A record is a Secret `join-token-<id>` beside KubeEdge's own: keys `node` (a name or a pattern), `uses`, `created`
//! and `expires` (RFC 3339) and, once used, `used-by` (JSON: node to fingerprint of the key that it showed). Deleting the
//! Secret revokes the token.
//!
//! KubeEdge's shared token (Secret `tokensecret`) is written, and accepted, only where the operator switched it on:
//! every holder may join as any node until it expires, and nobody can revoke it.
//!
//! Source of `tokensecret`: kubeedge/kubeedge, pkg/security/token/token.go and
//! cloud/pkg/cloudhub/servers/httpserver/pre_server.go.

use crate::api;
use crate::authority::{AuthorityError, CertificateAuthority, NAMESPACE, chain, opaque};
use crate::gate::Gate;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde::Serialize;
use serde_json::json;
use skerry_cloudcore_core::enrol::{
    self, Admission, EnrolError, NodePattern, TokenRecord, USES_MAX,
};
use skerry_protocol::enrol::{Claims, JoinToken};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const LABEL: &str = "skerry.dev/join-token";
const NODE: &str = "node";
const CREATED: &str = "created";
const EXPIRES: &str = "expires";
const USES: &str = "uses";
const USED_BY: &str = "used-by";
/// A record outlives its token by this, so that a late node is told `expired` and not `revoked`.
const RECORD_KEPT: Duration = Duration::from_secs(24 * 3600);
/// Attempts to write a record that somebody else writes at the same time.
const WRITE_ATTEMPTS: usize = 16;

/// Name and key of KubeEdge's shared token.
const SHARED_SECRET: &str = "tokensecret";
const SHARED_KEY: &str = "tokendata";
/// Life of the shared token, and the time after which it is replaced: KubeEdge's.
const SHARED_LIFE: Duration = Duration::from_secs(24 * 3600);
const SHARED_REFRESH: Duration = Duration::from_secs(12 * 3600);
/// Wait after a refresh that failed. KubeEdge stops refreshing for good then.
const SHARED_RETRY: Duration = Duration::from_secs(30);

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The name is none that a node can have.
    #[error("`{0}` is no node name: lower-case letters, digits, `-` and `.`; `*` in a pattern")]
    NodeName(String),
    /// The CA could not be read.
    #[error("could not read the certificate authority")]
    Authority(#[from] AuthorityError),
    /// The lifetime is out of the range of dates.
    #[error("a token cannot live for {} s", .0.as_secs())]
    Lifetime(Duration),
    /// No use at all, or more than a record can list.
    #[error("a token is good for 1 to {USES_MAX} nodes, not for {0}")]
    Uses(u32),
    /// One name cannot be many nodes.
    #[error("a token for the single node `{0}` has one use; name a pattern with `*` for more")]
    UsesOfOne(String),
    /// The record of the token could not be written or removed.
    #[error("could not write the record of the token")]
    Record(#[source] Box<kube::Error>),
}

/// A new token.
#[derive(Debug, Clone)]
pub struct NewToken {
    /// What the node needs.
    pub token: JoinToken,
    /// Under which it is listed and revoked.
    pub id: String,
    /// The node, or the pattern.
    pub node: String,
    /// When it expires.
    pub expires: Timestamp,
}

/// A token as its record has it; the token itself is kept nowhere.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenInfo {
    /// Under which it is revoked.
    pub id: String,
    /// The node, or the pattern.
    pub node: String,
    /// Nodes that it admits.
    pub uses_max: u32,
    /// Nodes that have used it.
    pub used_by: Vec<String>,
    /// RFC 3339; absent for tokens of an older version.
    pub created: Option<String>,
    /// RFC 3339.
    pub expires: Option<String>,
    /// Whether that time is over.
    pub expired: bool,
}

/// Makes a token with which `node` may join, once, within `ttl`.
///
/// # Errors
///
/// [`TokenError`]; [`AuthorityError::Missing`] in it when CloudCore has never been started on this cluster.
pub async fn create_token(
    client: &kube::Client,
    node: &str,
    ttl: Duration,
) -> Result<JoinToken, TokenError> {
    enrol::node_name(Some(node)).map_err(|_| TokenError::NodeName(node.into()))?;
    Ok(create_batch_token(client, node, 1, ttl).await?.token)
}

/// Makes a token with which up to `uses` nodes may join within `ttl`, each once: those whose names match `pattern`.
///
/// # Errors
///
/// [`TokenError`], as of [`create_token`].
pub async fn create_batch_token(
    client: &kube::Client,
    pattern: &str,
    uses: u32,
    ttl: Duration,
) -> Result<NewToken, TokenError> {
    let pattern: NodePattern =
        pattern.parse().map_err(|_| TokenError::NodeName(pattern.chars().take(300).collect()))?;
    if !(1..=USES_MAX).contains(&uses) {
        return Err(TokenError::Uses(uses));
    }
    if let Some(node) = pattern.exact().filter(|_| uses != 1) {
        return Err(TokenError::UsesOfOne(node.into()));
    }
    let ca = CertificateAuthority::read(client).await?;
    let now = Timestamp::now();
    let expires = jiff::SignedDuration::try_from(ttl)
        .ok()
        .and_then(|ttl| now.checked_add(ttl).ok())
        .ok_or(TokenError::Lifetime(ttl))?;
    let id = uuid::Uuid::new_v4().simple().to_string()[..12].to_owned();

    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let failed = |source| TokenError::Record(Box::new(source));
    let data = [
        (NODE, pattern.to_string()),
        (USES, uses.to_string()),
        (CREATED, now.to_string()),
        (EXPIRES, expires.to_string()),
    ];
    let data = data.map(|(key, value)| (key.into(), ByteString(value.into_bytes())));
    let mut secret = opaque(&secret_name(&id), data.into());
    secret.metadata.labels = Some(BTreeMap::from([(LABEL.into(), String::new())]));
    secrets.create(&PostParams::default(), &secret).await.map_err(failed)?;
    remove_old(&secrets, now).await;
    let node = pattern.exact().map(str::to_owned);
    let claims = Claims { exp: expires.as_second(), node, jti: Some(id.clone()) };
    let token = JoinToken::new(ca.der(), claims.sign(ca.hmac()));
    Ok(NewToken { token, id, node: pattern.to_string(), expires })
}

/// All tokens that have not been revoked, by expiry.
///
/// # Errors
///
/// [`TokenError::Record`] when the cluster refuses.
pub async fn list_tokens(client: &kube::Client) -> Result<Vec<TokenInfo>, TokenError> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let list = secrets.list(&ListParams::default().labels(LABEL)).await;
    let list = list.map_err(|source| TokenError::Record(Box::new(source)))?;
    let now = Timestamp::now();
    let mut tokens: Vec<TokenInfo> = list
        .iter()
        .filter_map(|secret| {
            let id = secret.metadata.name.as_deref()?.strip_prefix("join-token-")?.to_owned();
            let record = record(secret)?;
            let expires = text(secret, EXPIRES);
            let end: Option<Timestamp> = expires.as_ref().and_then(|text| text.parse().ok());
            Some(TokenInfo {
                id,
                node: record.nodes.to_string(),
                uses_max: record.uses_max,
                used_by: record.used_by.into_keys().collect(),
                created: text(secret, CREATED),
                expired: end.is_none_or(|end| end <= now),
                expires,
            })
        })
        .collect();
    tokens.sort_by(|a, b| (&a.expires, &a.id).cmp(&(&b.expires, &b.id)));
    Ok(tokens)
}

/// Makes a token of this id useless. Returns whether there was one.
///
/// # Errors
///
/// [`TokenError::Record`] when the cluster refuses.
pub async fn revoke_token(client: &kube::Client, id: &str) -> Result<bool, TokenError> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    match secrets.delete(&secret_name(id), &DeleteParams::default()).await {
        Ok(_) => Ok(true),
        Err(error) if api::is_not_found(&error) => Ok(false),
        Err(error) => Err(TokenError::Record(Box::new(error))),
    }
}

/// Uses a token for `node` and the key of this fingerprint: records the use, and only then admits.
pub(crate) async fn redeem(
    client: &kube::Client,
    gate: &Gate,
    id: &str,
    node: &str,
    key_fingerprint: &str,
) -> Result<(), EnrolError> {
    let cluster = |reason: String| EnrolError::Cluster { node: node.into(), reason };
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    for attempt in 0..WRITE_ATTEMPTS {
        let found = secrets
            .get_opt(&secret_name(id))
            .await
            .map_err(|error| cluster(format!("could not read the token's record: {error}")))?;
        let created = found.as_ref().and_then(|secret| text(secret, CREATED)?.parse().ok());
        let admission = enrol::admit(id, found.as_ref().and_then(record), node, key_fingerprint)?;
        gate.may_join(node, created.map(Timestamp::as_millisecond))
            .map_err(|refusal| EnrolError::Barred { node: node.into(), refusal })?;
        let Admission::Record(record) = admission else { return Ok(()) };
        let mut secret = found.expect("a record was admitted");
        let used_by = serde_json::to_vec(&record.used_by).expect("only string keys");
        secret.data.get_or_insert_default().insert(USED_BY.into(), ByteString(used_by));
        // The resource version that was read goes along: of two nodes with the same token one loses.
        match secrets.replace(&secret_name(id), &PostParams::default(), &secret).await {
            Ok(_) => return Ok(()),
            // The nodes of a batch come together; each turn lets one of them through.
            Err(error) if api::is_conflict(&error) || api::is_not_found(&error) => {
                let pause = rand::random_range(1..=20) * (attempt as u64 + 1);
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            Err(error) => return Err(cluster(format!("could not record the use: {error}"))),
        }
    }
    Err(cluster("the token's record is being changed by somebody else".into()))
}

/// Keeps KubeEdge's shared token fresh until `stop`: for `keadm` and for whoever reads `tokensecret`. A new CA, which
/// `trust_changes` tells, needs a new token at once.
pub(crate) async fn keep_shared(
    client: kube::Client,
    mut trust_changes: watch::Receiver<u64>,
    stop: CancellationToken,
) {
    let run = async {
        loop {
            let wait = match write_shared(&client).await {
                Ok(()) => SHARED_REFRESH,
                Err(error) => {
                    let error = chain(&error);
                    tracing::error!(
                        error,
                        ?SHARED_RETRY,
                        "the shared join token was not refreshed, trying again"
                    );
                    SHARED_RETRY
                }
            };
            // An error says that cloudcore is ending.
            let _ = tokio::time::timeout(wait, trust_changes.changed()).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = run => {}
    }
}

async fn write_shared(client: &kube::Client) -> Result<(), TokenError> {
    let ca = CertificateAuthority::read(client).await?;
    let exp = Timestamp::now().as_second() + SHARED_LIFE.as_secs() as i64;
    let claims = Claims { exp, node: None, jti: None };
    let token = JoinToken::new(ca.der(), claims.sign(ca.hmac())).to_string();
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let data = BTreeMap::from([(SHARED_KEY.to_owned(), ByteString(token.into_bytes()))]);
    let patch = json!({"data": data});
    let patch = Patch::Merge(&patch);
    let written = match secrets.patch(SHARED_SECRET, &PatchParams::default(), &patch).await {
        Err(error) if api::is_not_found(&error) => {
            secrets.create(&PostParams::default(), &opaque(SHARED_SECRET, data)).await
        }
        patched => patched,
    };
    written.map(|_| ()).map_err(|source| TokenError::Record(Box::new(source)))
}

fn secret_name(id: &str) -> String {
    format!("join-token-{id}")
}

fn text(secret: &Secret, key: &str) -> Option<String> {
    String::from_utf8(secret.data.as_ref()?.get(key)?.0.clone()).ok()
}

/// `None` when it is no record that we can read; the token is good for nothing then.
fn record(secret: &Secret) -> Option<TokenRecord> {
    let nodes: NodePattern = text(secret, NODE)?.parse().ok()?;
    let uses_max = match text(secret, USES) {
        Some(uses) => uses.parse().ok()?,
        None => 1,
    };
    let used_by = match text(secret, USED_BY) {
        None => BTreeMap::new(),
        Some(json) if json.starts_with('{') => serde_json::from_str(&json).ok()?,
        // An older version wrote the fingerprint alone.
        Some(key) => BTreeMap::from([(nodes.exact()?.to_owned(), key)]),
    };
    Some(TokenRecord { nodes, uses_max, used_by })
}

/// Removes records of tokens that expired long ago. Failure costs nothing but room.
async fn remove_old(secrets: &Api<Secret>, now: Timestamp) {
    let Ok(list) = secrets.list(&ListParams::default().labels(LABEL)).await else { return };
    for secret in list {
        let expires = text(&secret, EXPIRES).and_then(|expires| expires.parse().ok());
        let is_old = |expires: Timestamp| {
            now.as_second() - expires.as_second() > RECORD_KEPT.as_secs() as i64
        };
        if expires.is_some_and(is_old)
            && let Some(name) = secret.metadata.name
            && let Err(error) = secrets.delete(&name, &DeleteParams::default()).await
        {
            tracing::debug!(secret = name, %error, "could not remove an old token record");
        }
    }
}
