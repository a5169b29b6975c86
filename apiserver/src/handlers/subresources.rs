//! Paths below an object: status, scale, binding, eviction, log, finalize.

use super::delete::DeleteOptions;
use super::write::{Options, Writer};
use super::{body, shape};
use crate::api::{Api, Warnings, key};
use crate::auth::Attributes;
use crate::http::{Answer, Call};
use crate::nodes::NodeStreamError;
use crate::route::Target;
use futures::StreamExt;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use skerry_apiserver_core::catalog::{Catalog, Resource, ScalePaths};
use skerry_apiserver_core::patch;
use skerry_apiserver_core::status::{ApiError, FieldError};
use std::sync::Arc;

/// Parameters of `pods/log` that the node's kubelet server understands under the same name.
const LOG_PARAMETERS: [&str; 8] = [
    "follow",
    "previous",
    "sinceSeconds",
    "sinceTime",
    "timestamps",
    "tailLines",
    "limitBytes",
    "stream",
];

impl Api {
    pub(super) async fn subresource(
        self: &Arc<Self>,
        call: Call,
        catalog: Catalog,
        resource: Arc<Resource>,
        target: Target,
        verb: &'static str,
        warnings: &mut Warnings,
    ) -> Result<Answer, ApiError> {
        let first = target.subresource.split('/').next().unwrap_or_default().to_owned();
        let known = resource.subresource(&first).ok_or_else(ApiError::unknown_path)?;
        if !known.verbs.contains(&verb) {
            return Err(ApiError::method_not_allowed(verb));
        }
        if resource.namespaced && target.namespace.is_none() {
            return Err(ApiError::unknown_path());
        }
        match (&*resource.group, &*resource.plural, first.as_str(), verb) {
            (.., "status", "get") => self.get(&call, &resource, &target).await,
            (.., "status", "update" | "patch") => {
                self.change(&call, &catalog, &resource, &target, warnings).await
            }
            (.., "scale", _) => self.scale(&call, &catalog, &resource, &target).await,
            ("", "pods", "binding", "create") => {
                let body = body::read(&call)?;
                let name = target.name.clone().unwrap_or_default();
                self.bind(&call, &catalog, &resource, &target, &name, &body).await
            }
            ("", "pods", "eviction", "create") => self.evict(&call, &resource, &target).await,
            ("", "serviceaccounts", "token", "create") => {
                self.request_token(&call, &resource, &target).await
            }
            ("certificates.k8s.io", _, "approval", "get") => {
                self.get(&call, &resource, &target).await
            }
            ("certificates.k8s.io", _, "approval", _) => {
                self.approve(&call, &catalog, &resource, &target, warnings).await
            }
            ("", "pods", "log", "get") => self.log(&call, &resource, &target).await,
            ("", "namespaces", "finalize", "update") => {
                self.finalize(&call, &catalog, &resource, &target).await
            }
            ("", "pods", "ephemeralcontainers" | "resize", "get") => {
                self.get(&call, &resource, &target).await
            }
            _ => Err(ApiError::not_yet(&format!("{}/{first}", resource.plural))),
        }
    }

    async fn scale(
        &self,
        call: &Call,
        catalog: &Catalog,
        resource: &Resource,
        target: &Target,
    ) -> Result<Answer, ApiError> {
        let paths = scale_paths(resource);
        let name = target.name.as_deref().unwrap_or_default();
        let key = key(resource, target.namespace.as_deref(), name);
        if matches!(call.method, Method::GET | Method::HEAD) {
            let live = shape::served(resource, self.get_stored(resource, &key).await?);
            return Ok(Answer::ok(scale_of(&paths, &live)));
        }
        let (is_put, body) = match call.method {
            Method::PUT => (true, body::read(call)?),
            _ => (false, body::read_patch(call)?.1),
        };
        let json_patch = body.is_array();
        let insists = body.pointer("/metadata/resourceVersion").is_some();
        let options = Options::of(call)?;
        let writer = Writer { api: self, catalog, resource, options: &options };
        let written = writer
            .modify(&key, "scale", !insists, |live| {
                let scale = scale_of(&paths, live);
                let wanted = match (is_put, json_patch) {
                    (true, _) => body.clone(),
                    (false, true) => patch::json_patch(&scale, &body)?,
                    (false, false) => patch::merge_patch(&scale, &body),
                };
                let replicas = wanted["spec"]["replicas"].as_i64().unwrap_or(0);
                if replicas < 0 {
                    let error = FieldError {
                        field: "spec.replicas".into(),
                        reason: "FieldValueInvalid",
                        message: format!(
                            "Invalid value: {replicas}: must be greater than or equal to 0"
                        ),
                    };
                    return Err(ApiError::invalid("autoscaling", "Scale", name, &[error]));
                }
                let mut new = live.clone();
                let revision = &wanted["metadata"]["resourceVersion"];
                if revision.as_str().is_some_and(|revision| !revision.is_empty()) {
                    new["metadata"]["resourceVersion"] = revision.clone();
                }
                set_at(&mut new, &paths.spec_replicas, replicas.into());
                Ok(new)
            })
            .await?;
        let object = shape::served(resource, (*written).clone());
        Ok(Answer::ok(scale_of(&paths, &object)))
    }

    /// Assigns a pod to a node.
    pub(super) async fn bind(
        &self,
        call: &Call,
        catalog: &Catalog,
        resource: &Resource,
        target: &Target,
        name: &str,
        body: &Value,
    ) -> Result<Answer, ApiError> {
        let node = body["target"]["name"].as_str().unwrap_or_default().to_owned();
        if node.is_empty() {
            let error = FieldError {
                field: "target.name".into(),
                reason: "FieldValueRequired",
                message: "Required value".into(),
            };
            return Err(ApiError::invalid("", "Binding", name, &[error]));
        }
        let key = key(resource, target.namespace.as_deref(), name);
        let options = Options::of(call)?;
        let writer = Writer { api: self, catalog, resource, options: &options };
        let uid = body["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        writer
            .modify(&key, "binding", true, |live| {
                let conflict = |why: String| ApiError::conflict("", "pods/binding", name, &why);
                if let Some(bound) =
                    live["spec"]["nodeName"].as_str().filter(|node| !node.is_empty())
                {
                    return Err(conflict(format!(
                        "pod {name} is already assigned to node \"{bound}\""
                    )));
                }
                if live["metadata"]["deletionTimestamp"].is_string() {
                    return Err(conflict(format!(
                        "pod {name} is being deleted, cannot be assigned to a host"
                    )));
                }
                if !uid.is_empty() && live["metadata"]["uid"] != uid {
                    return Err(conflict(format!("pod {name} is another pod now")));
                }
                let mut new = live.clone();
                new["spec"]["nodeName"] = node.as_str().into();
                let condition = json!({
                    "type": "PodScheduled", "status": "True", "lastProbeTime": null,
                    "lastTransitionTime": super::write::now(),
                });
                let conditions = &mut new["status"]["conditions"];
                match conditions.as_array_mut() {
                    Some(list) => {
                        list.retain(|one| one["type"] != "PodScheduled");
                        list.push(condition);
                    }
                    None => *conditions = json!([condition]),
                }
                Ok(new)
            })
            .await?;
        Ok(Answer::created(success()))
    }

    /// Writes a decision on a signing request, if the user may decide for its signer.
    async fn approve(
        &self,
        call: &Call,
        catalog: &Catalog,
        resource: &Resource,
        target: &Target,
        warnings: &mut Warnings,
    ) -> Result<Answer, ApiError> {
        let name = target.name.as_deref().unwrap_or_default();
        let live = self.get_stored(resource, &key(resource, None, name)).await?;
        let wanted = Attributes {
            verb: "approve".into(),
            group: target.group.clone(),
            resource: "signers".into(),
            name: live["spec"]["signerName"].as_str().unwrap_or_default().into(),
            ..Attributes::default()
        };
        self.allow(&call.user, &wanted)?;
        self.change(call, catalog, resource, target, warnings).await
    }

    /// Deletes a pod the polite way. There are no disruption budgets yet, so nothing is ever refused.
    async fn evict(
        &self,
        call: &Call,
        resource: &Resource,
        target: &Target,
    ) -> Result<Answer, ApiError> {
        let body = body::read(call)?;
        let options = DeleteOptions::parse(&body["deleteOptions"], call)?;
        let name = target.name.as_deref().unwrap_or_default();
        let key = key(resource, target.namespace.as_deref(), name);
        self.delete_object(resource, &key, &options).await?;
        Ok(Answer::created(success()))
    }

    async fn finalize(
        &self,
        call: &Call,
        catalog: &Catalog,
        resource: &Resource,
        target: &Target,
    ) -> Result<Answer, ApiError> {
        let body = body::read(call)?;
        let name = target.name.as_deref().unwrap_or_default();
        let options = Options::of(call)?;
        let writer = Writer { api: self, catalog, resource, options: &options };
        let written = writer
            .modify(&key(resource, None, name), "finalize", true, |live| {
                let mut new = live.clone();
                let finalizers = body["spec"]["finalizers"].clone();
                new["spec"]["finalizers"] =
                    if finalizers.is_null() { json!([]) } else { finalizers };
                Ok(new)
            })
            .await?;
        Ok(Answer::ok(shape::served(resource, (*written).clone())))
    }

    async fn log(
        &self,
        call: &Call,
        resource: &Resource,
        target: &Target,
    ) -> Result<Answer, ApiError> {
        let name = target.name.as_deref().unwrap_or_default();
        let namespace = target.namespace.as_deref().unwrap_or_default();
        let pod = self.get_stored(resource, &key(resource, Some(namespace), name)).await?;
        let names = |field: &str| -> Vec<String> {
            let list = pod["spec"][field].as_array();
            list.into_iter()
                .flatten()
                .filter_map(|c| c["name"].as_str().map(str::to_owned))
                .collect()
        };
        let (main, init) = (names("containers"), names("initContainers"));
        let container = match call.query.get("container") {
            Some(wanted) if main.iter().chain(&init).any(|one| one == wanted) => wanted.to_owned(),
            Some(wanted) => {
                return Err(ApiError::bad_request(format!(
                    "container {wanted} is not valid for pod {name}"
                )));
            }
            None => match main.as_slice() {
                [one] => one.clone(),
                many => {
                    return Err(ApiError::bad_request(format!(
                        "a container name must be specified for pod {name}, choose one of: [{}]",
                        many.join(" ")
                    )));
                }
            },
        };
        let Some(node) = pod["spec"]["nodeName"].as_str().filter(|node| !node.is_empty()) else {
            return Err(ApiError::bad_request(format!("pod {name} does not have a host assigned")));
        };
        let Some(streams) = &self.node_streams else {
            return Err(ApiError::not_yet("pods/log without a connection to nodes"));
        };
        let mut path = format!("/containerLogs/{namespace}/{name}/{container}");
        let mut separator = '?';
        for (key, value) in call.query.pairs().filter(|(key, _)| LOG_PARAMETERS.contains(key)) {
            let value = utf8_percent_encode(value, NON_ALPHANUMERIC);
            path.push_str(&format!("{separator}{key}={value}"));
            separator = '&';
        }
        let stream = streams.open(node, &path).await.map_err(|error| match error {
            NodeStreamError::NotConnected { .. } => {
                ApiError::new(503, "ServiceUnavailable", format!("logs of pod `{name}`: {error}"))
            }
            NodeStreamError::Failed { .. } => {
                ApiError::internal(format!("logs of pod `{name}`: {error}"))
            }
        })?;
        let stop = self.stop.clone();
        let chunks = stream
            .body
            .take_until(async move { stop.cancelled().await })
            .map(|chunk| chunk.map(http_body::Frame::data));
        let mut response = http::Response::new(StreamBody::new(chunks).boxed_unsync());
        *response.status_mut() =
            StatusCode::from_u16(stream.status).unwrap_or(StatusCode::BAD_GATEWAY);
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        Ok(Answer::Written(response))
    }
}

fn success() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})
}

fn scale_paths(resource: &Resource) -> ScalePaths {
    resource.scale_paths.clone().unwrap_or(ScalePaths {
        spec_replicas: ".spec.replicas".into(),
        status_replicas: ".status.replicas".into(),
        selector: None,
    })
}

fn scale_of(paths: &ScalePaths, object: &Value) -> Value {
    let metadata = &object["metadata"];
    let mut scale = json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": metadata["name"], "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],
            "creationTimestamp": metadata["creationTimestamp"],
        },
        "spec": {"replicas": at(object, &paths.spec_replicas).as_i64().unwrap_or(0)},
        "status": {"replicas": at(object, &paths.status_replicas).as_i64().unwrap_or(0)},
    });
    if let Some(namespace) = metadata["namespace"].as_str() {
        scale["metadata"]["namespace"] = namespace.into();
    }
    let selector = match &paths.selector {
        Some(path) => at(object, path).clone(),
        None => object["spec"]["selector"].clone(),
    };
    let text = match &selector {
        Value::String(text) => text.clone(),
        selector => selector_text(selector),
    };
    if !text.is_empty() {
        scale["status"]["selector"] = text.into();
    }
    scale
}

/// A LabelSelector, or a plain map of labels, as text.
fn selector_text(selector: &Value) -> String {
    let is_labels = selector["matchLabels"].is_object() || selector["matchExpressions"].is_array();
    let labels = if is_labels { &selector["matchLabels"] } else { selector };
    let mut parts: Vec<String> = labels
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some(format!("{key}={}", value.as_str()?)))
        .collect();
    for expression in selector["matchExpressions"].as_array().into_iter().flatten() {
        let key = expression["key"].as_str().unwrap_or_default();
        let values: Vec<&str> = expression["values"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        match expression["operator"].as_str() {
            Some("In") => parts.push(format!("{key} in ({})", values.join(","))),
            Some("NotIn") => parts.push(format!("{key} notin ({})", values.join(","))),
            Some("Exists") => parts.push(key.into()),
            Some("DoesNotExist") => parts.push(format!("!{key}")),
            _ => {}
        }
    }
    parts.join(",")
}

/// The value at a path such as `.spec.replicas`.
fn at<'a>(object: &'a Value, path: &str) -> &'a Value {
    path.split('.').filter(|part| !part.is_empty()).fold(object, |value, part| &value[part])
}

fn set_at(object: &mut Value, path: &str, new: Value) {
    let mut place = object;
    for part in path.split('.').filter(|part| !part.is_empty()) {
        if !place.is_object() && !place.is_null() {
            return;
        }
        place = &mut place[part];
    }
    *place = new;
}
