//! `serviceaccounts/token`: a TokenRequest is answered with a signed token; and the way back, from a token to a user.
//!
//! A token is bound to its account, and to a pod, secret or node if the request says so: it ends when one of them does.
//!
//! Source: Kubernetes 1.36, authentication/v1 TokenRequest and TokenReview.

use super::body;
use super::write::now;
use crate::api::{Api, key, store_failed};
use crate::auth::User;
use crate::http::{Answer, Call};
use crate::route::Target;
use crate::service_tokens::{Claims, ISSUER, subject};
use crate::store::Key;
use serde_json::{Value, json};
use skerry_apiserver_core::catalog::Resource;
use skerry_apiserver_core::status::{ApiError, FieldError};
use std::collections::BTreeMap;

/// Life of a token whose request says nothing, in seconds.
const LIFE_DEFAULT_S: i64 = 3600;
/// Shortest life that a request may ask for, in seconds.
const LIFE_MIN_S: i64 = 600;
/// Longest life that a request may ask for, in seconds.
const LIFE_MAX_S: i64 = 1 << 32;

impl Api {
    /// Makes a token for the account that the URL names.
    pub(super) async fn request_token(
        &self,
        call: &Call,
        resource: &Resource,
        target: &Target,
    ) -> Result<Answer, ApiError> {
        let mut request = body::read(call)?;
        if !request.is_object() {
            return Err(ApiError::bad_request("the body is no TokenRequest"));
        }
        let name = target.name.as_deref().unwrap_or_default();
        let namespace = target.namespace.as_deref().unwrap_or_default();
        let account = self.get_stored(resource, &key(resource, Some(namespace), name)).await?;

        let life_s = request["spec"]["expirationSeconds"].as_i64().unwrap_or(LIFE_DEFAULT_S);
        if !(LIFE_MIN_S..=LIFE_MAX_S).contains(&life_s) {
            let detail = match life_s < LIFE_MIN_S {
                true => "may not specify a duration less than 10 minutes",
                false => "may not specify a duration larger than 2^32 seconds",
            };
            let error = FieldError {
                field: "spec.expirationSeconds".into(),
                reason: "FieldValueInvalid",
                message: format!("Invalid value: {life_s}: {detail}"),
            };
            return Err(ApiError::invalid("authentication.k8s.io", "TokenRequest", name, &[error]));
        }
        let mut audiences = texts(&request["spec"]["audiences"]);
        if audiences.is_empty() {
            audiences.push(ISSUER.into());
        }
        let (bound, node) =
            self.bound_object(namespace, &request["spec"]["boundObjectRef"]).await?;
        let issued_s = jiff::Timestamp::now().as_second();
        let claims = Claims {
            audiences: audiences.clone(),
            namespace: namespace.into(),
            account: (name.into(), text(&account["metadata"]["uid"])),
            bound,
            node,
            issued_s,
            expires_s: issued_s + life_s,
        };
        let token = self.service_tokens.sign(&claims);
        let token = token.ok_or_else(|| ApiError::internal("the token could not be signed"))?;
        let expires = jiff::Timestamp::from_second(claims.expires_s)
            .map(|time| time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
            .map_err(|error| ApiError::internal(error.to_string()))?;
        request["apiVersion"] = "authentication.k8s.io/v1".into();
        request["kind"] = "TokenRequest".into();
        request["metadata"] = json!({
            "name": name, "namespace": namespace, "creationTimestamp": now(),
        });
        request["spec"]["audiences"] = audiences.into();
        request["spec"]["expirationSeconds"] = life_s.into();
        request["status"] = json!({"token": token, "expirationTimestamp": expires});
        Ok(Answer::created(request))
    }

    /// The user behind a service account's token, if the token is meant for one of `audiences` and what it names still
    /// exists.
    pub(crate) async fn service_account(&self, token: &str, audiences: &[String]) -> Option<User> {
        let claims = self.service_tokens.verify(token, jiff::Timestamp::now().as_second())?;
        if !claims.audiences.iter().any(|one| audiences.contains(one)) {
            return None;
        }
        let (name, uid) = &claims.account;
        self.lives("serviceaccounts", &claims.namespace, name, uid).await?;
        let mut extra = BTreeMap::new();
        if let Some((resource, name, uid)) = &claims.bound {
            let namespace = if *resource == "nodes" { "" } else { &claims.namespace };
            self.lives(resource, namespace, name, uid).await?;
            let mut note = |what: &str, name: &str, uid: &str| {
                extra
                    .insert(format!("authentication.kubernetes.io/{what}-name"), vec![name.into()]);
                extra.insert(format!("authentication.kubernetes.io/{what}-uid"), vec![uid.into()]);
            };
            if *resource != "secrets" {
                note(resource.trim_end_matches('s'), name, uid);
            }
            if let Some((name, uid)) = &claims.node {
                note("node", name, uid);
            }
        }
        let namespace = &claims.namespace;
        let groups =
            ["system:serviceaccounts".into(), format!("system:serviceaccounts:{namespace}")];
        let mut user = User::new(&subject(namespace, name), &groups);
        user.uid.clone_from(uid);
        user.extra = extra;
        Some(user)
    }

    /// Checks the object that a token is to be bound to, and finds the node of a pod.
    async fn bound_object(
        &self,
        namespace: &str,
        reference: &Value,
    ) -> Result<(Option<(&'static str, String, String)>, Option<(String, String)>), ApiError> {
        if !reference.is_object() {
            return Ok((None, None));
        }
        let resource = match (
            text(&reference["apiVersion"]).as_str(),
            text(&reference["kind"]).as_str(),
        ) {
            ("v1" | "", "Pod") => "pods",
            ("v1" | "", "Secret") => "secrets",
            ("v1" | "", "Node") => "nodes",
            (version, kind) => {
                return Err(ApiError::bad_request(format!(
                    "cannot bind token for serviceaccount to an object of kind {kind} in {version}"
                )));
            }
        };
        let name = text(&reference["name"]);
        let namespace = if resource == "nodes" { "" } else { namespace };
        let found = self.store.get(&core_key(resource, namespace, &name)).await;
        let found = found.map_err(store_failed)?;
        let found = found.ok_or_else(|| ApiError::not_found("", resource, &name))?;
        let uid = text(&found["metadata"]["uid"]);
        let wanted = text(&reference["uid"]);
        if !wanted.is_empty() && wanted != uid {
            let why = format!(
                "the UID in the bound object reference ({wanted}) does not match the UID in record. \
                 The object might have been deleted and then recreated"
            );
            return Err(ApiError::conflict("", resource, &name, &why));
        }
        let node = text(&found["spec"]["nodeName"]);
        let node = match resource == "pods" && !node.is_empty() {
            true => {
                let found = self.store.get(&core_key("nodes", "", &node)).await;
                let uid = found.map_err(store_failed)?.map(|found| text(&found["metadata"]["uid"]));
                Some((node, uid.unwrap_or_default()))
            }
            false => None,
        };
        Ok((Some((resource, name, uid)), node))
    }

    /// `Some` if the object exists and is the one that was meant.
    async fn lives(&self, resource: &str, namespace: &str, name: &str, uid: &str) -> Option<()> {
        let found = self.store.get(&core_key(resource, namespace, name)).await.ok()??;
        (found["metadata"]["uid"] == uid).then_some(())
    }
}

fn core_key(resource: &str, namespace: &str, name: &str) -> Key {
    Key {
        group: "".into(),
        resource: resource.into(),
        namespace: namespace.into(),
        name: name.into(),
    }
}

pub(super) fn texts(value: &Value) -> Vec<String> {
    let list = value.as_array().into_iter().flatten();
    list.filter_map(|one| one.as_str().map(str::to_owned)).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
