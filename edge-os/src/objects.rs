//! ConfigMaps, Secrets and tokens for the pod engine: from the database, else from the hub.
//!
//! The engine calls; lookups go to the agent as [`LookupRequest`]s, because only the agent may touch the link and the
//! store's rows. Offline a lookup fails at once; it never keeps a pod waiting for a link.

use crate::meta_store::Store;
use crate::pods::{FetchError, ObjectKind, Objects, ServiceAccountToken, TokenQuery};
use futures::future::BoxFuture;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use skerry_protocol::ResourcePath;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, oneshot};

/// Tokens kept; a node has a few per pod.
const TOKENS_MAX: usize = 512;

/// Result of a lookup: the object, `None` when the cluster has none, or why nobody knows.
pub type Found = Result<Option<Value>, String>;

/// Asks the agent for an object of the cluster.
#[derive(Debug)]
pub struct LookupRequest {
    /// What.
    pub path: ResourcePath,
    /// Body of the query: null, or a TokenRequest.
    pub content: Value,
    /// Where to.
    pub answer: oneshot::Sender<Found>,
}

/// The engine's view of the database.
pub struct StoredObjects {
    store: Arc<Store>,
    lookups: mpsc::Sender<LookupRequest>,
    tokens: Mutex<HashMap<TokenQuery, CachedToken>>,
}

struct CachedToken {
    token: ServiceAccountToken,
    refresh_at: Timestamp,
}

impl StoredObjects {
    /// Reads from `store`, asks through `lookups`.
    pub fn new(store: Arc<Store>, lookups: mpsc::Sender<LookupRequest>) -> Self {
        Self { store, lookups, tokens: Mutex::default() }
    }

    fn read<T: DeserializeOwned>(&self, kind: &str, namespace: &str, name: &str) -> Option<Arc<T>> {
        let path = format!("{namespace}/{kind}/{name}");
        let json = self.store.read(&path)?;
        let parsed = serde_json::from_str(&json);
        let parsed = parsed.inspect_err(|error| {
            tracing::error!(resource = path, %error, "a stored object cannot be used");
        });
        parsed.ok().map(Arc::new)
    }

    async fn lookup(&self, path: ResourcePath, content: Value) -> Found {
        let (answer, found) = oneshot::channel();
        let stopped = || "the agent is stopping".to_owned();
        let request = LookupRequest { path, content, answer };
        self.lookups.send(request).await.map_err(|_| stopped())?;
        found.await.unwrap_or_else(|_| Err(stopped()))
    }

    async fn request_token(&self, query: &TokenQuery) -> Result<ServiceAccountToken, FetchError> {
        let now = Timestamp::now();
        if let Some(cached) = self.tokens.lock().expect("never held over a panic").get(query)
            && now < cached.refresh_at
        {
            return Ok(cached.token.clone());
        }
        let path =
            ResourcePath::new(&query.namespace, "serviceaccounttoken", &query.service_account)
                .map_err(|error| FetchError(error.to_string()))?;
        let content = json!({
            "kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1",
            "metadata": {"name": query.service_account, "namespace": query.namespace},
            "spec": {
                "audiences": query.audiences,
                "expirationSeconds": query.expiration_seconds,
                "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": query.pod_name, "uid": query.pod_uid},
            },
        });
        let answer = match self.lookup(path, content).await {
            Ok(Some(answer)) => answer,
            Ok(None) => {
                let account = &query.service_account;
                return Err(FetchError(format!("serviceaccounts \"{account}\" not found")));
            }
            Err(text) => {
                // Offline an old token is better than none; whoever checks it decides.
                let tokens = self.tokens.lock().expect("never held over a panic");
                return match tokens.get(query) {
                    Some(cached) => Ok(cached.token.clone()),
                    None => Err(FetchError(text)),
                };
            }
        };
        let status = &answer["status"];
        let expires = status["expirationTimestamp"].as_str().and_then(|time| time.parse().ok());
        let (Some(token), Some(expires)) = (status["token"].as_str(), expires) else {
            return Err(FetchError("the cloud's answer holds no token".into()));
        };
        let token = ServiceAccountToken { token: token.to_owned(), expires };
        // kubelet's rule: at 80 % of the life, at the latest after a day.
        let life_s = (expires.as_second() - now.as_second()).max(0);
        let refresh_s = now.as_second() + (life_s / 10 * 8).min(24 * 3600);
        let refresh_at = Timestamp::from_second(refresh_s).unwrap_or(expires);
        let mut tokens = self.tokens.lock().expect("never held over a panic");
        if tokens.len() >= TOKENS_MAX {
            tokens.retain(|_, cached| cached.token.expires > now);
        }
        if tokens.len() < TOKENS_MAX {
            tokens.insert(query.clone(), CachedToken { token: token.clone(), refresh_at });
        }
        Ok(token)
    }
}

impl Objects for StoredObjects {
    fn config_map(&self, namespace: &str, name: &str) -> Option<Arc<ConfigMap>> {
        self.read("configmap", namespace, name)
    }

    fn secret(&self, namespace: &str, name: &str) -> Option<Arc<Secret>> {
        self.read("secret", namespace, name)
    }

    fn fetch<'a>(
        &'a self,
        kind: ObjectKind,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<(), FetchError>> {
        Box::pin(async move {
            let kind = match kind {
                ObjectKind::ConfigMap => "configmap",
                ObjectKind::Secret => "secret",
            };
            let path = ResourcePath::new(namespace, kind, name)
                .map_err(|error| FetchError(error.to_string()))?;
            match self.lookup(path, Value::Null).await {
                Ok(Some(_)) => Ok(()),
                Ok(None) => Err(FetchError(format!("{kind} \"{name}\" not found"))),
                Err(text) => Err(FetchError(text)),
            }
        })
    }

    fn token<'a>(
        &'a self,
        query: &'a TokenQuery,
    ) -> BoxFuture<'a, Result<ServiceAccountToken, FetchError>> {
        Box::pin(self.request_token(query))
    }
}
