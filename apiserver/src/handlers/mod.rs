//! One generic handler per verb, over JSON values and the catalogue; what is special to a kind is in [`kinds`].

pub(crate) mod body;
pub(crate) mod delete;
mod documents;
pub(crate) mod kinds;
mod read;
mod reviews;
mod service_accounts;
mod shape;
mod subresources;
mod watch;
pub(crate) mod write;

use crate::api::{Api, Warnings};
use crate::auth::Attributes;
use crate::http::{Answer, Call};
use crate::route::Target;
use http::Method;
use skerry_apiserver_core::status::ApiError;
use std::sync::Arc;

impl Api {
    /// Answers a request below a version of a group.
    pub(crate) async fn resource(
        self: &Arc<Self>,
        call: Call,
        target: Target,
        warnings: &mut Warnings,
    ) -> Result<Answer, ApiError> {
        let verb = verb(&call, &target)?;
        self.allow(&call.user, &Attributes::of(verb, &target))?;

        let catalog = self.catalog();
        let resource = catalog
            .find(&target.group, &target.version, &target.resource)
            .ok_or_else(ApiError::unknown_path)?;
        if !resource.namespaced && target.namespace.is_some() {
            return Err(ApiError::unknown_path());
        }
        if !resource.is_stored() {
            return self.create_unstored(&call, &catalog, &resource, &target).await;
        }
        if !target.subresource.is_empty() {
            return self.subresource(call, catalog, resource, target, verb, warnings).await;
        }
        if !resource.verbs.contains(&verb) {
            return Err(ApiError::method_not_allowed(verb));
        }
        if resource.namespaced && target.namespace.is_none() && !matches!(verb, "list" | "watch") {
            return Err(ApiError::method_not_allowed(verb));
        }
        match verb {
            "get" => self.get(&call, &resource, &target).await,
            "list" => self.list(&call, &resource, &target).await,
            "watch" => self.watch(&call, resource, &target).await,
            "create" => self.create(&call, &catalog, &resource, &target, warnings).await,
            "update" | "patch" => self.change(&call, &catalog, &resource, &target, warnings).await,
            "delete" => self.delete_one(&call, &resource, &target).await,
            "deletecollection" => self.delete_collection(&call, &resource, &target).await,
            _ => Err(ApiError::method_not_allowed(verb)),
        }
    }
}

/// The verb of a request, in the words of authorization.
fn verb(call: &Call, target: &Target) -> Result<&'static str, ApiError> {
    let named = target.name.is_some();
    Ok(match call.method {
        Method::GET | Method::HEAD if call.query.flag("watch") && target.subresource.is_empty() => {
            "watch"
        }
        Method::GET | Method::HEAD if named => "get",
        Method::GET | Method::HEAD => "list",
        Method::POST => "create",
        Method::PUT if named => "update",
        Method::PATCH if named => "patch",
        Method::DELETE if named => "delete",
        Method::DELETE => "deletecollection",
        _ => return Err(ApiError::method_not_allowed(call.method.as_str())),
    })
}
