//! Kinds that are answered and not stored: what may I do, who am I, bind this pod.

use super::body;
use super::service_accounts::texts;
use crate::api::Api;
use crate::auth::{Attributes, User, rules_of};
use crate::http::{Answer, Call};
use crate::route::Target;
use crate::service_tokens::ISSUER;
use serde_json::{Value, json};
use skerry_apiserver_core::catalog::{Catalog, Resource};
use skerry_apiserver_core::status::ApiError;

impl Api {
    pub(super) async fn create_unstored(
        &self,
        call: &Call,
        catalog: &Catalog,
        resource: &Resource,
        target: &Target,
    ) -> Result<Answer, ApiError> {
        if call.method != http::Method::POST {
            return Err(ApiError::method_not_allowed(call.method.as_str()));
        }
        let mut review = body::read(call)?;
        body::expect_kind(&mut review, resource)?;
        match (&*resource.group, &*resource.plural) {
            ("authorization.k8s.io", "selfsubjectaccessreviews") => {
                review["status"] = self.verdict(&call.user, &review["spec"]);
            }
            ("authorization.k8s.io", "subjectaccessreviews" | "localsubjectaccessreviews") => {
                let groups: Vec<&str> = review["spec"]["groups"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_str)
                    .collect();
                let user = User::new(review["spec"]["user"].as_str().unwrap_or_default(), &groups);
                review["status"] = self.verdict(&user, &review["spec"]);
            }
            ("authorization.k8s.io", "selfsubjectrulesreviews") => {
                let (resources, paths) = rules_of(&call.user);
                review["status"] = json!({
                    "resourceRules": resources, "nonResourceRules": paths, "incomplete": false,
                });
            }
            ("authentication.k8s.io", "selfsubjectreviews") => {
                review["status"] = json!({"userInfo": call.user.to_value()});
            }
            ("authentication.k8s.io", "tokenreviews") => {
                let token = review["spec"]["token"].as_str().unwrap_or_default();
                let mut audiences = texts(&review["spec"]["audiences"]);
                if audiences.is_empty() {
                    audiences.push(ISSUER.into());
                }
                let user = match self.tokens.user(token) {
                    Some(user) => Some(user),
                    None => self.service_account(token, &audiences).await,
                };
                review["status"] = match user {
                    Some(user) => json!({
                        "authenticated": true, "user": user.to_value(), "audiences": audiences,
                    }),
                    None => json!({"authenticated": false, "error": "token is not known"}),
                };
            }
            ("", "bindings") => {
                let pods = catalog.find("", "v1", "pods").ok_or_else(ApiError::unknown_path)?;
                let name = review["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                return self.bind(call, catalog, &pods, target, &name, &review).await;
            }
            _ => return Err(ApiError::not_yet(&resource.plural)),
        }
        Ok(Answer::created(review))
    }

    fn verdict(&self, user: &User, spec: &Value) -> Value {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (object, path) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
        let wanted = if object.is_object() {
            Attributes {
                verb: text(&object["verb"]),
                group: text(&object["group"]),
                resource: text(&object["resource"]),
                subresource: text(&object["subresource"]),
                namespace: text(&object["namespace"]),
                name: text(&object["name"]),
                path: None,
            }
        } else {
            Attributes {
                verb: text(&path["verb"]),
                path: Some(text(&path["path"])),
                ..Attributes::default()
            }
        };
        json!({"allowed": self.allows(user, &wanted)})
    }
}
