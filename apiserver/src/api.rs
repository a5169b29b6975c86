//! The API as a function from a request to an answer, the same for sockets and for the in-process client.

use crate::auth::{Access, Attributes, Tokens, User};
use crate::http::{Answer, BODY_MAX, Call, Response, refused};
use crate::nodes::NodeStreams;
use crate::route::{Query, Route};
use crate::service_tokens::{ISSUER, ServiceTokens};
use crate::store::{Key, Range, Store, StoreError};
use bytes::Bytes;
use http::Method;
use http_body_util::{BodyExt, Limited};
use serde_json::Value;
use skerry_apiserver_core::catalog::{Catalog, Resource};
use skerry_apiserver_core::status::ApiError;
use std::sync::{Arc, RwLock};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// A client that sends slower than this is cut off, so that it cannot hold a connection for ever.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// Everything that a request needs.
pub(crate) struct Api {
    pub(crate) store: Store,
    pub(crate) tokens: Tokens,
    pub(crate) service_tokens: ServiceTokens,
    pub(crate) node_streams: Option<Arc<dyn NodeStreams>>,
    /// Ends the streams when the server stops.
    pub(crate) stop: CancellationToken,
    catalog: RwLock<Catalog>,
    /// Held while the catalogue is read from the store and swapped, so that an older reading never wins.
    swap: tokio::sync::Mutex<()>,
    /// Held from the choice of a Service's addresses to their commit.
    pub(crate) addresses: tokio::sync::Mutex<()>,
}

/// Notes that go with an answer as `Warning` headers.
pub(crate) type Warnings = Vec<String>;

impl Api {
    pub(crate) fn new(
        store: Store,
        tokens: Tokens,
        service_tokens: ServiceTokens,
        node_streams: Option<Arc<dyn NodeStreams>>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            store,
            tokens,
            service_tokens,
            node_streams,
            stop,
            catalog: RwLock::new(Catalog::builtin()),
            swap: tokio::sync::Mutex::default(),
            addresses: tokio::sync::Mutex::default(),
        }
    }

    /// The resources served at this moment.
    pub(crate) fn catalog(&self) -> Catalog {
        self.catalog.read().expect("no panic while held").clone()
    }

    /// Makes the catalogue follow the stored CustomResourceDefinitions.
    pub(crate) async fn reload_catalog(&self) -> Result<(), StoreError> {
        let _swapping = self.swap.lock().await;
        let range =
            Range::all("apiextensions.k8s.io".into(), "customresourcedefinitions".into(), None);
        let crds = self.store.list(range, |_| true).await?.items;
        let catalog = Catalog::with_crds(&crds);
        *self.catalog.write().expect("no panic while held") = catalog;
        Ok(())
    }

    /// Answers `request` for `user`; every failure is a Status.
    pub(crate) async fn serve<B>(
        self: Arc<Self>,
        user: Option<User>,
        request: http::Request<B>,
    ) -> Response
    where
        B: http_body::Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (head, body) = request.into_parts();
        let headers = head.headers;
        let mut warnings = Warnings::new();
        let answer = async {
            let user = self.authenticate(user, &headers).await?;
            let user = self.impersonate(user, &headers)?;
            let body = Limited::new(body, BODY_MAX).collect();
            let body = tokio::time::timeout(BODY_TIMEOUT, body).await.map_err(|_| {
                ApiError::new(408, "Timeout", "the request body took too long to arrive")
            })?;
            let body = body.map_err(|error| {
                if error.is::<http_body_util::LengthLimitError>() {
                    ApiError::too_large(BODY_MAX)
                } else {
                    ApiError::bad_request(format!("the request body could not be read: {error}"))
                }
            })?;
            let call = Call {
                user,
                method: head.method,
                path: head.uri.path().to_owned(),
                query: Query::parse(head.uri.query().unwrap_or_default()),
                headers: headers.clone(),
                body: body.to_bytes(),
            };
            self.answer(call, &mut warnings).await
        }
        .await;
        let answer = answer.unwrap_or_else(|error: ApiError| {
            // 501, 503 and 504 are answers, and of a full disk the store speaks; this one is ours to look at.
            if error.code == 500 && !self.stop.is_cancelled() {
                tracing::warn!(code = error.code, message = error.message, "request failed");
            }
            refused(&error)
        });
        answer.into_response(&headers, &warnings)
    }

    async fn authenticate(
        &self,
        user: Option<User>,
        headers: &http::HeaderMap,
    ) -> Result<User, ApiError> {
        if let Some(user) = user {
            return Ok(user);
        }
        let Some(credentials) = headers.get(http::header::AUTHORIZATION) else {
            return Ok(User::anonymous());
        };
        let token = credentials.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
        let token = token.ok_or_else(ApiError::unauthorized)?.trim();
        if let Some(user) = self.tokens.user(token) {
            return Ok(user);
        }
        let account = self.service_account(token, &[ISSUER.to_owned()]).await;
        account.ok_or_else(ApiError::unauthorized)
    }

    /// The user that a request with `Impersonate-…` headers acts as, if its sender may.
    ///
    /// Source: kubernetes.io, "User impersonation".
    fn impersonate(&self, sender: User, headers: &http::HeaderMap) -> Result<User, ApiError> {
        let all = |name: &str| -> Vec<String> {
            let values = headers.get_all(name).iter();
            values.filter_map(|value| value.to_str().ok().map(str::to_owned)).collect()
        };
        let mut groups = all("impersonate-group");
        let other = headers.keys().any(|name| {
            name == "impersonate-uid" || name.as_str().starts_with("impersonate-extra-")
        });
        let Some(name) = all("impersonate-user").pop().filter(|name| !name.is_empty()) else {
            if groups.is_empty() && !other {
                return Ok(sender);
            }
            return Err(ApiError::bad_request("impersonation needs the header Impersonate-User"));
        };
        if other {
            // Ignored, it would widen or narrow rights without a word.
            return Err(ApiError::not_yet("impersonation of a uid or of extra fields"));
        }
        let wanted = |resource: &str, name: &str| Attributes {
            verb: "impersonate".into(),
            resource: resource.into(),
            name: name.into(),
            ..Attributes::default()
        };
        self.allow(&sender, &wanted("users", &name))?;
        for group in &groups {
            self.allow(&sender, &wanted("groups", group))?;
        }
        if let Some(account) = name.strip_prefix("system:serviceaccount:")
            && let Some((namespace, _)) = account.split_once(':')
            && groups.is_empty()
        {
            groups = vec![
                "system:serviceaccounts".into(),
                format!("system:serviceaccounts:{namespace}"),
            ];
        }
        Ok(User::new(&name, &groups))
    }

    async fn answer(
        self: &Arc<Self>,
        call: Call,
        warnings: &mut Warnings,
    ) -> Result<Answer, ApiError> {
        match Route::parse(&call.path) {
            Route::Resource(target) => self.resource(call, target, warnings).await,
            route => {
                let verb = if call.method == Method::GET || call.method == Method::HEAD {
                    "get".to_owned()
                } else {
                    call.method.as_str().to_ascii_lowercase()
                };
                let wanted = Attributes { verb, path: Some(call.path.clone()), ..<_>::default() };
                self.allow(&call.user, &wanted)?;
                self.document(&call, &route).await
            }
        }
    }

    pub(crate) fn allow(&self, user: &User, wanted: &Attributes) -> Result<(), ApiError> {
        let catalog = self.catalog();
        access(&catalog, |access| access.check(user, wanted))
    }

    pub(crate) fn allows(&self, user: &User, wanted: &Attributes) -> bool {
        let catalog = self.catalog();
        access(&catalog, |access| access.allows(user, wanted))
    }

    pub(crate) async fn get_stored(
        &self,
        resource: &Resource,
        key: &Key,
    ) -> Result<Value, ApiError> {
        let found = self.store.get(key).await.map_err(store_failed)?;
        found.ok_or_else(|| ApiError::not_found(&resource.group, &resource.plural, &key.name))
    }
}

fn access<T>(catalog: &Catalog, decide: impl FnOnce(Access<'_>) -> T) -> T {
    let namespaced = |group: &str, plural: &str| {
        catalog
            .resources()
            .find(|one| &*one.group == group && &*one.plural == plural)
            .map(|one| one.namespaced)
    };
    decide(Access { namespaced: &namespaced })
}

/// Where objects of `resource` are stored.
pub(crate) fn place(resource: &Resource) -> (Arc<str>, Arc<str>) {
    let group = if resource.stored_in_core { "".into() } else { resource.group.clone() };
    (group, resource.plural.clone())
}

pub(crate) fn key(resource: &Resource, namespace: Option<&str>, name: &str) -> Key {
    let (group, plural) = place(resource);
    Key {
        group,
        resource: plural,
        namespace: namespace.unwrap_or_default().into(),
        name: name.into(),
    }
}

/// The answer to a failure of the store; conflicts are handled where they arise.
pub(crate) fn store_failed(error: StoreError) -> ApiError {
    match &error {
        StoreError::Compacted { after, floor } => {
            ApiError::expired(format!("too old resource version: {after} ({floor})"))
        }
        StoreError::Future { wanted, current } => ApiError::revision_too_large(*wanted, *current),
        StoreError::Full { .. } => ApiError::new(507, "InsufficientStorage", error.to_string()),
        StoreError::Conflict { .. } => ApiError::new(409, "Conflict", error.to_string()),
        _ => ApiError::internal(error.to_string()),
    }
}
