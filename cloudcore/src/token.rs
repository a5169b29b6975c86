//! Join tokens and the records that make each good for one node, once.
//!
//! A record is a Secret `join-token-<id>` beside KubeEdge's own: keys `node`, `expires` (RFC 3339) and, once used,
//! `used-by` (fingerprint of the key that the node showed). Deleting the Secret revokes the token.

use crate::api;
use crate::authority::{AuthorityError, CertificateAuthority, NAMESPACE};
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, PostParams};
use skerry_cloudcore_core::enrol::{self, Admission, EnrolError, TokenRecord};
use skerry_protocol::enrol::{Claims, JoinToken};
use std::collections::BTreeMap;
use std::time::Duration;

const LABEL: &str = "skerry.dev/join-token";
const NODE: &str = "node";
const EXPIRES: &str = "expires";
const USED_BY: &str = "used-by";
/// A record outlives its token by this, so that a late node is told `expired` and not `revoked`.
const RECORD_KEPT: Duration = Duration::from_secs(24 * 3600);
/// Attempts to write a record that somebody else writes at the same time.
const WRITE_ATTEMPTS: usize = 4;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The name is none that a node can have.
    #[error("`{0}` is no node name: lower-case letters, digits, `-` and `.`")]
    NodeName(String),
    /// The CA could not be read.
    #[error("could not read the certificate authority")]
    Authority(#[from] AuthorityError),
    /// The lifetime is out of the range of dates.
    #[error("a token cannot live for {} s", .0.as_secs())]
    Lifetime(Duration),
    /// The record of the token could not be written or removed.
    #[error("could not write the record of the token")]
    Record(#[source] Box<kube::Error>),
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
    let ca = CertificateAuthority::read(client).await?;
    let now = Timestamp::now();
    let expires = jiff::SignedDuration::try_from(ttl)
        .ok()
        .and_then(|ttl| now.checked_add(ttl).ok())
        .ok_or(TokenError::Lifetime(ttl))?;
    let id = uuid::Uuid::new_v4().simple().to_string()[..12].to_owned();

    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    let failed = |source| TokenError::Record(Box::new(source));
    let data = [(NODE, node.to_owned()), (EXPIRES, expires.to_string())];
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(secret_name(&id)),
            namespace: Some(NAMESPACE.into()),
            labels: Some(BTreeMap::from([(LABEL.into(), String::new())])),
            ..ObjectMeta::default()
        },
        data: Some(data.map(|(key, value)| (key.into(), ByteString(value.into_bytes()))).into()),
        type_: Some("Opaque".into()),
        ..Secret::default()
    };
    secrets.create(&PostParams::default(), &secret).await.map_err(failed)?;
    remove_old(&secrets, now).await;
    let claims = Claims { exp: expires.as_second(), node: Some(node.into()), jti: Some(id) };
    Ok(JoinToken::new(ca.der(), claims.sign(ca.hmac())))
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
    id: &str,
    node: &str,
    key_fingerprint: &str,
) -> Result<(), EnrolError> {
    let cluster = |reason: String| EnrolError::Cluster { node: node.into(), reason };
    let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
    for _ in 0..WRITE_ATTEMPTS {
        let found = secrets
            .get_opt(&secret_name(id))
            .await
            .map_err(|error| cluster(format!("could not read the token's record: {error}")))?;
        let record = found.as_ref().map(record);
        let Admission::Record(record) = enrol::admit(id, record, node, key_fingerprint)? else {
            return Ok(());
        };
        let mut secret = found.expect("a record was admitted");
        let used_by = ByteString(record.used_by.unwrap_or_default().into_bytes());
        secret.data.get_or_insert_default().insert(USED_BY.into(), used_by);
        // The resource version that was read goes along: of two nodes with the same token one loses.
        match secrets.replace(&secret_name(id), &PostParams::default(), &secret).await {
            Ok(_) => return Ok(()),
            Err(error) if api::is_conflict(&error) || api::is_not_found(&error) => {}
            Err(error) => return Err(cluster(format!("could not record the use: {error}"))),
        }
    }
    Err(cluster("the token's record is being changed by somebody else".into()))
}

fn secret_name(id: &str) -> String {
    format!("join-token-{id}")
}

fn record(secret: &Secret) -> TokenRecord {
    let value = |key: &str| {
        let bytes = secret.data.as_ref()?.get(key)?;
        String::from_utf8(bytes.0.clone()).ok()
    };
    TokenRecord { node: value(NODE).unwrap_or_default(), used_by: value(USED_BY) }
}

/// Removes records of tokens that expired long ago. Failure costs nothing but room.
async fn remove_old(secrets: &Api<Secret>, now: Timestamp) {
    let Ok(list) = secrets.list(&ListParams::default().labels(LABEL)).await else { return };
    for secret in list {
        let expires = secret
            .data
            .as_ref()
            .and_then(|data| std::str::from_utf8(&data.get(EXPIRES)?.0).ok()?.parse().ok());
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
