//! The Kubernetes API as paths and JSON.
//!
//! What a node sends goes to the API as it came, so a request here is a path and a body and no typed object. Every
//! request is bounded in time, and can be made in a node's own name (Kubernetes impersonation), with a node's rights.
//!
//! The files of [`crate::upstream`], of [`crate::applications`], and [`crate::leases`] and [`crate::jobs`] are the
//! callers.

use super::answer::Refused;
use http::{Method, header};
use http_body_util::BodyExt;
use kube::client::Body;
use serde_json::{Value, json};
use skerry_cloudcore_core::upstream::answer::Status;
use skerry_cloudcore_core::upstream::is_segment;
use std::time::Duration;

/// A request that takes longer has failed. KubeEdge's edge waits 60 s for an answer.
pub(crate) const API_TIMEOUT: Duration = Duration::from_secs(30);
/// The largest answer that is read, in bytes. An object has at most about 3 MiB; a longer list has to be asked for in
/// parts, so that no node can make the hub hold more.
pub(crate) const ANSWER_LEN_MAX: usize = 8 * 1024 * 1024;

/// How a patch is merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Merge {
    /// Lists merge by key, for built-in types.
    Strategic,
    /// RFC 7396.
    Json,
}

/// The API in somebody's name.
#[derive(Clone, Copy)]
pub(crate) struct Rest<'a> {
    client: &'a kube::Client,
    /// The node in whose name requests are made; CloudCore's own without.
    node: Option<&'a str>,
}

/// The answer of a request: the object, without `metadata.managedFields`.
pub(crate) type Done = Result<Value, Refused>;

impl<'a> Rest<'a> {
    /// In CloudCore's own name.
    pub(crate) fn new(client: &'a kube::Client) -> Self {
        Self { client, node: None }
    }

    /// In the name of `node`.
    pub(crate) fn as_node(client: &'a kube::Client, node: &'a str) -> Self {
        Self { client, node: Some(node) }
    }

    pub(crate) async fn get(self, path: &str) -> Done {
        self.json(Method::GET, path, None).await
    }

    pub(crate) async fn create(self, path: &str, object: &Value) -> Done {
        self.json(Method::POST, path, Some(("application/json", object))).await
    }

    pub(crate) async fn replace(self, path: &str, object: &Value) -> Done {
        self.json(Method::PUT, path, Some(("application/json", object))).await
    }

    pub(crate) async fn patch(self, path: &str, merge: Merge, patch: &Value) -> Done {
        let content_type = match merge {
            Merge::Strategic => "application/strategic-merge-patch+json",
            Merge::Json => "application/merge-patch+json",
        };
        self.json(Method::PATCH, path, Some((content_type, patch))).await
    }

    /// `options` are fields of DeleteOptions.
    pub(crate) async fn delete(self, path: &str, mut options: Value) -> Done {
        options["kind"] = json!("DeleteOptions");
        options["apiVersion"] = json!("v1");
        self.json(Method::DELETE, path, Some(("application/json", &options))).await
    }

    async fn json(self, method: Method, path: &str, body: Option<(&str, &Value)>) -> Done {
        let body = body.map(|(content_type, body)| (content_type, body.to_string().into_bytes()));
        let answer = self.bytes(method, path, body).await?;
        let mut object: Value = serde_json::from_slice(&answer)
            .map_err(|error| Refused::Unreadable(error.to_string()))?;
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
        Ok(object)
    }

    /// The answer as it came. `path` may have a query; `body` comes with its type.
    pub(crate) async fn bytes(
        self,
        method: Method,
        path: &str,
        body: Option<(&str, Vec<u8>)>,
    ) -> Result<Vec<u8>, Refused> {
        let mut request = http::Request::builder()
            .method(method)
            .uri(path)
            .header(header::ACCEPT, "application/json");
        if let Some(node) = self.node {
            request = request
                .header("Impersonate-User", format!("system:node:{node}"))
                .header("Impersonate-Group", "system:nodes");
        }
        let body = match body {
            Some((content_type, body)) => {
                request = request.header(header::CONTENT_TYPE, content_type);
                Body::from(body)
            }
            None => Body::empty(),
        };
        let request = request
            .body(body)
            .map_err(|error| Refused::Invalid(format!("`{path}` is no path: {error}")))?;
        let exchange = async {
            let response = self.client.send(request).await.map_err(Refused::Unavailable)?;
            let status = response.status();
            let body = http_body_util::Limited::new(response.into_body(), ANSWER_LEN_MAX);
            let body = body.collect().await.map_err(|error| match error
                .downcast_ref::<http_body_util::LengthLimitError>(
            ) {
                Some(_) => Refused::TooLong,
                None => Refused::Unreadable(error.to_string()),
            })?;
            Ok((status, body.to_bytes()))
        };
        let (status, body) =
            tokio::time::timeout(API_TIMEOUT, exchange).await.map_err(|_| Refused::Slow)??;
        if status.is_success() {
            return Ok(body.into());
        }
        let said = Status::read(&body).unwrap_or_else(|| {
            let text: String = String::from_utf8_lossy(&body).trim().chars().take(500).collect();
            let reason = status.canonical_reason().unwrap_or_default().replace(' ', "");
            Status::new(status.as_u16(), &reason, text)
        });
        Err(Refused::Api(Box::new(said)))
    }
}

/// A segment of a path, from a node's message.
pub(crate) fn segment(text: &str) -> Result<&str, Refused> {
    match is_segment(text) {
        true => Ok(text),
        false => Err(Refused::Invalid(format!("`{text}` is no name"))),
    }
}

/// The path of a resource of the core group; empty `namespace` for a cluster-scoped one, empty `name` for all of them.
pub(crate) fn core(namespace: &str, plural: &str, name: &str) -> Result<String, Refused> {
    path("/api/v1", namespace, plural, name)
}

/// The path of a resource below `root`, such as `/apis/apps/v1`.
pub(crate) fn path(
    root: &str,
    namespace: &str,
    plural: &str,
    name: &str,
) -> Result<String, Refused> {
    let mut path = root.to_owned();
    if !namespace.is_empty() {
        path = format!("{path}/namespaces/{}", segment(namespace)?);
    }
    path = format!("{path}/{plural}");
    if !name.is_empty() {
        path = format!("{path}/{}", segment(name)?);
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_a_node_cannot_leave_their_place_in_a_path() {
        assert_eq!(core("a", "pods", "b").expect("a path"), "/api/v1/namespaces/a/pods/b");
        assert_eq!(core("", "nodes", "").expect("a path"), "/api/v1/nodes");
        for name in ["..", "b/status", "b?x=y", "b#x", "b%2f", "b c"] {
            assert!(matches!(core("a", "pods", name), Err(Refused::Invalid(_))), "{name}");
            assert!(matches!(core(name, "pods", "b"), Err(Refused::Invalid(_))), "{name}");
        }
    }
}
