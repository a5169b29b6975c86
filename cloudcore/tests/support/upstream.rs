//! Words for tests of what a node asks for.

use super::{Cluster, Link, PATIENCE};
use serde_json::Value;
use skerry_protocol::Operation;
use std::time::Duration;

impl Cluster {
    /// One request of the administrator; the status and the body.
    pub async fn admin_request(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> (u16, Value) {
        let content_type = match method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", content_type)
            .body(body.map(|body| body.to_string().into_bytes()).unwrap_or_default())
            .expect("a request");
        match self.admin.request::<Value>(request).await {
            Ok(object) => (200, object),
            Err(kube::Error::Api(status)) => {
                (status.code, serde_json::to_value(status).expect("json"))
            }
            Err(error) => panic!("{method} {path}: {error}"),
        }
    }

    pub async fn create(&self, path: &str, object: &Value) -> Value {
        let (status, created) = self.admin_request("POST", path, Some(object)).await;
        assert_eq!(status, 200, "POST {path}: {created}");
        created
    }

    pub async fn read(&self, path: &str) -> Option<Value> {
        let (status, object) = self.admin_request("GET", path, None).await;
        (status == 200).then_some(object)
    }

    pub async fn remove(&self, path: &str) {
        let (status, answer) = self.admin_request("DELETE", path, None).await;
        assert_eq!(status, 200, "DELETE {path}: {answer}");
    }

    /// Reads an object until it is as wanted.
    pub async fn read_until(&self, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut last = None;
        let waiting = async {
            loop {
                if let Some(object) = self.read(path).await {
                    if wanted(&object) {
                        return object;
                    }
                    last = Some(object);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(object) => object,
            Err(_) => panic!("{path} stays {last:?}"),
        }
    }

    /// KubeEdge's kinds of devices and jobs.
    pub async fn install_kubeedge_kinds(&self) {
        for crd in skerry_api::kubeedge::crds() {
            let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
            let (status, answer) = self.admin_request("POST", path, Some(&crd)).await;
            assert!(status == 200 || status == 409, "{answer}");
        }
        for path in [
            "/apis/devices.kubeedge.io/v1beta1/devices",
            "/apis/operations.kubeedge.io/v1alpha2/nodeupgradejobs",
        ] {
            self.read_until(path, |_| true).await;
        }
    }
}

impl Link {
    /// A request whose answer has to be a success; its content.
    pub async fn must<T: serde::Serialize>(
        &mut self,
        operation: Operation,
        resource: &str,
        content: &T,
    ) -> Value {
        let (answered, content) = self.ask(operation, resource, content).await;
        assert!(answered == "response" && refusal(&content).is_none(), "{resource}: {content}");
        content
    }

    /// A request that has to be refused; why.
    pub async fn refused<T: serde::Serialize>(
        &mut self,
        operation: Operation,
        resource: &str,
        content: &T,
    ) -> String {
        let (answered, content) = self.ask(operation, resource, content).await;
        if answered == "error" {
            return content.as_str().expect("a text").to_owned();
        }
        let status = refusal(&content).unwrap_or_else(|| panic!("{resource} was done: {content}"));
        status["message"].as_str().expect("a text").to_owned()
    }
}

/// The failure in an answer, in either shape.
pub fn refusal(content: &Value) -> Option<&Value> {
    let err = content.get("Err").unwrap_or(content);
    err.get("ErrStatus")
}
