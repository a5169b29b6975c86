//! Requests of the controllers, over JSON: what a typed client would do, without a type per kind.

use http::{Method, Request};
use kube::Client;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use skerry_apiserver_core::workloads::object::{name, namespace, text, uid};

/// One kind, as requests need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Resource {
    pub(super) group: &'static str,
    pub(super) version: &'static str,
    pub(super) kind: &'static str,
    pub(super) plural: &'static str,
}

const fn core(kind: &'static str, plural: &'static str) -> Resource {
    Resource { group: "", version: "v1", kind, plural }
}

const fn grouped(group: &'static str, kind: &'static str, plural: &'static str) -> Resource {
    Resource { group, version: "v1", kind, plural }
}

pub(super) const PODS: Resource = core("Pod", "pods");
pub(super) const NODES: Resource = core("Node", "nodes");
pub(super) const SERVICES: Resource = core("Service", "services");
pub(super) const ENDPOINTS: Resource = core("Endpoints", "endpoints");
pub(super) const EVENTS: Resource = core("Event", "events");
pub(super) const LEASES: Resource = grouped("coordination.k8s.io", "Lease", "leases");
pub(super) const REPLICA_SETS: Resource = grouped("apps", "ReplicaSet", "replicasets");
pub(super) const DEPLOYMENTS: Resource = grouped("apps", "Deployment", "deployments");
pub(super) const DAEMON_SETS: Resource = grouped("apps", "DaemonSet", "daemonsets");
pub(super) const REVISIONS: Resource = grouped("apps", "ControllerRevision", "controllerrevisions");
pub(super) const JOBS: Resource = grouped("batch", "Job", "jobs");
pub(super) const CRON_JOBS: Resource = grouped("batch", "CronJob", "cronjobs");
pub(super) const SLICES: Resource = grouped("discovery.k8s.io", "EndpointSlice", "endpointslices");

impl Resource {
    pub(super) fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    fn path(&self, namespace: &str, name: &str, subresource: &str) -> String {
        let mut path = if self.group.is_empty() {
            format!("/api/{}", self.version)
        } else {
            format!("/apis/{}/{}", self.group, self.version)
        };
        for part in [if namespace.is_empty() { "" } else { "namespaces" }, namespace, self.plural] {
            if !part.is_empty() {
                path.push('/');
                path.push_str(part);
            }
        }
        for part in [name, subresource] {
            if !part.is_empty() {
                path.push('/');
                path.push_str(part);
            }
        }
        path
    }
}

/// A request that failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClusterError {
    /// The API refused, or was not there.
    #[error("could not {verb} `{path}`")]
    Request { verb: &'static str, path: String, source: Box<kube::Error> },
    /// An object that the API accepted cannot be acted on.
    #[error("`{name}` has a selector that cannot be read")]
    Selector { name: String },
}

impl ClusterError {
    fn status(&self) -> Option<&kube::core::Status> {
        match self {
            Self::Request { source, .. } => match &**source {
                kube::Error::Api(status) => Some(status),
                _ => None,
            },
            Self::Selector { .. } => None,
        }
    }

    /// The object changed, or a precondition failed: the next look decides anew.
    pub(super) fn is_conflict(&self) -> bool {
        self.status().is_some_and(|status| status.code == 409 && status.reason != "AlreadyExists")
    }

    pub(super) fn already_exists(&self) -> bool {
        self.status().is_some_and(|status| status.reason == "AlreadyExists")
    }

    pub(super) fn is_not_found(&self) -> bool {
        self.status().is_some_and(|status| status.code == 404)
    }

    /// The namespace is being deleted: nothing can be made there any more.
    pub(super) fn is_namespace_gone(&self) -> bool {
        self.status().is_some_and(|status| {
            status.code == 403
                && status.details.as_ref().is_some_and(|details| {
                    details.causes.iter().any(|cause| cause.reason == "NamespaceTerminating")
                })
        })
    }

    /// The API's own words, for events.
    pub(super) fn text(&self) -> String {
        match (self.status(), self) {
            (Some(status), _) => status.message.clone(),
            (None, Self::Request { source, .. }) => format!("{self}: {source}"),
            (None, _) => self.to_string(),
        }
    }
}

/// The API as the controllers see it.
#[derive(Clone)]
pub(super) struct Cluster {
    client: Client,
    /// Name under which written fields are owned.
    manager: &'static str,
}

impl Cluster {
    pub(super) fn new(client: Client, manager: &'static str) -> Self {
        Self { client, manager }
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// The same API under another name of owner.
    pub(super) fn with_manager(&self, manager: &'static str) -> Self {
        Self { client: self.client.clone(), manager }
    }

    /// The object, or `None` if there is none.
    pub(super) async fn get(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Value>, ClusterError> {
        let path = resource.path(namespace, name, "");
        match self.send("get", Method::GET, path, None, "").await {
            Ok(object) => Ok(Some(object)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The objects of a namespace (all of them if it is empty) with matching labels.
    pub(super) async fn list(
        &self,
        resource: &Resource,
        namespace: &str,
        selector: &str,
    ) -> Result<Vec<Value>, ClusterError> {
        let mut path = resource.path(namespace, "", "");
        if !selector.is_empty() {
            path.push_str("?labelSelector=");
            path.extend(utf8_percent_encode(selector, NON_ALPHANUMERIC));
        }
        let mut list = self.send("list", Method::GET, path, None, "").await?;
        Ok(match list.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) => items,
            _ => Vec::new(),
        })
    }

    pub(super) async fn create(
        &self,
        resource: &Resource,
        object: &Value,
    ) -> Result<Value, ClusterError> {
        let path = self.managed(resource.path(namespace(object), "", ""));
        self.send("create", Method::POST, path, Some(object), JSON).await
    }

    /// Binds a pod to a node.
    pub(super) async fn bind(&self, pod: &Value, node: &str) -> Result<(), ClusterError> {
        let path = self.managed(PODS.path(namespace(pod), name(pod), "binding"));
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding",
            "metadata": {"name": name(pod), "namespace": namespace(pod), "uid": uid(pod)},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        self.send("bind", Method::POST, path, Some(&binding), JSON).await.map(drop)
    }

    /// Replaces the whole object, if it is still the one that was read.
    pub(super) async fn replace(
        &self,
        resource: &Resource,
        object: &Value,
    ) -> Result<Value, ClusterError> {
        let path = self.managed(resource.path(namespace(object), name(object), ""));
        self.send("replace", Method::PUT, path, Some(&typed(resource, object)), JSON).await
    }

    /// Replaces the status, if the object is still the one that was read.
    pub(super) async fn replace_status(
        &self,
        resource: &Resource,
        object: &Value,
    ) -> Result<Value, ClusterError> {
        let path = self.managed(resource.path(namespace(object), name(object), "status"));
        self.send("replace status of", Method::PUT, path, Some(&typed(resource, object)), JSON)
            .await
    }

    /// Merges `patch` into the object, if it is still the one that was read.
    pub(super) async fn merge(
        &self,
        resource: &Resource,
        object: &Value,
        subresource: &str,
        mut patch: Value,
    ) -> Result<Value, ClusterError> {
        let path = self.managed(resource.path(namespace(object), name(object), subresource));
        patch["metadata"]["resourceVersion"] = json!(text(object, "/metadata/resourceVersion"));
        // A name can be taken again: the uid makes sure that it is this object.
        patch["metadata"]["uid"] = json!(uid(object));
        self.send("patch", Method::PATCH, path, Some(&patch), MERGE).await
    }

    /// Merges `patch` into whatever is stored under the name.
    pub(super) async fn merge_any(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        patch: &Value,
    ) -> Result<Value, ClusterError> {
        let path = self.managed(resource.path(namespace, name, ""));
        self.send("patch", Method::PATCH, path, Some(patch), MERGE).await
    }

    /// Deletes exactly this object; one that is gone already is no error. `grace` in seconds, or the object's own.
    pub(super) async fn delete(
        &self,
        resource: &Resource,
        object: &Value,
        grace: Option<u32>,
    ) -> Result<(), ClusterError> {
        let path = resource.path(namespace(object), name(object), "");
        let mut options = json!({
            "apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background",
            "preconditions": {"uid": uid(object)},
        });
        if let Some(grace) = grace {
            options["gracePeriodSeconds"] = json!(grace);
        }
        match self.send("delete", Method::DELETE, path, Some(&options), JSON).await {
            Err(error) if !error.is_not_found() && !error.is_conflict() => Err(error),
            _ => Ok(()),
        }
    }

    fn managed(&self, path: String) -> String {
        format!("{path}?fieldManager={}", self.manager)
    }

    async fn send(
        &self,
        verb: &'static str,
        method: Method,
        path: String,
        body: Option<&Value>,
        content_type: &str,
    ) -> Result<Value, ClusterError> {
        let mut request = Request::builder().method(method).uri(&path);
        if body.is_some() {
            request = request.header(http::header::CONTENT_TYPE, content_type);
        }
        let body = body.map_or_else(Vec::new, |body| body.to_string().into_bytes());
        let failed = |source| ClusterError::Request { verb, path, source: Box::new(source) };
        let request = match request.body(body) {
            Ok(request) => request,
            Err(error) => return Err(failed(kube::Error::HttpError(error))),
        };
        self.client.request(request).await.map_err(failed)
    }
}

const JSON: &str = "application/json";
const MERGE: &str = "application/merge-patch+json";

/// Items of lists come without their type; a PUT needs it.
fn typed(resource: &Resource, object: &Value) -> Value {
    let mut object = object.clone();
    object["apiVersion"] = json!(resource.api_version());
    object["kind"] = json!(resource.kind);
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_follow_group_namespace_and_subresource() {
        assert_eq!(PODS.path("a", "b", "status"), "/api/v1/namespaces/a/pods/b/status");
        assert_eq!(NODES.path("", "n", ""), "/api/v1/nodes/n");
        assert_eq!(JOBS.path("", "", ""), "/apis/batch/v1/jobs");
    }
}
