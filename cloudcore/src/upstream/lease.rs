//! The Lease of a node that keeps it itself, as every KubeEdge edge does. For the others see [`crate::leases`].

use super::answer::Refused;
use super::rest::{self, Done};
use super::{Outcome, Upstream, content_object, own};
use skerry_cloudcore_core::upstream::answer::{Status, without_type};
use skerry_protocol::{Message, Operation, ResourcePath};

/// The namespace of all node Leases.
pub(crate) const NAMESPACE: &str = "kube-node-lease";
/// Group and version of Leases in the API.
pub(crate) const ROOT: &str = "/apis/coordination.k8s.io/v1";

impl Upstream {
    pub(super) async fn lease(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Outcome {
        let done = match request.operation() {
            Some(Operation::Query) => self.query_lease(node, path).await,
            Some(Operation::Insert | Operation::Update) => {
                self.write_lease(node, path, request).await
            }
            _ => return Outcome::unsupported(request),
        };
        Outcome::Object { done, version: false }
    }

    async fn query_lease(&self, node: &str, path: &ResourcePath) -> Done {
        check(node, path)?;
        let found = self.rest(node).get(&lease_path(node)?).await;
        found.map_err(|refused| match refused.is_not_found() {
            // As from a cache, where KubeEdge looks.
            true => Refused::Api(Box::new(Status::not_found_in_cache(
                "coordination.k8s.io",
                "lease",
                node,
            ))),
            false => refused,
        })
    }

    async fn write_lease(&self, node: &str, path: &ResourcePath, request: &Message) -> Done {
        check(node, path)?;
        let mut lease = content_object(request)?;
        own(node, lease["metadata"]["name"].as_str().unwrap_or_default(), "lease")?;
        for owner in lease["metadata"]["ownerReferences"].as_array().into_iter().flatten() {
            own(node, owner["name"].as_str().unwrap_or_default(), "lease owned by node")?;
        }
        lease["kind"] = "Lease".into();
        lease["apiVersion"] = "coordination.k8s.io/v1".into();
        let written = match request.operation() {
            Some(Operation::Insert) => {
                let place = rest::path(ROOT, NAMESPACE, "leases", "")?;
                self.rest(node).create(&place, &lease).await
            }
            _ => self.rest(node).replace(&lease_path(node)?, &lease).await,
        };
        written.map(without_type)
    }
}

/// The path of a node's Lease in the API.
pub(crate) fn lease_path(node: &str) -> Result<String, Refused> {
    rest::path(ROOT, NAMESPACE, "leases", rest::segment(node)?)
}

fn check(node: &str, path: &ResourcePath) -> Result<(), Refused> {
    if path.namespace() != NAMESPACE {
        let found = path.namespace();
        return Err(Refused::Forbidden(format!(
            "node `{node}` may use leases in `{NAMESPACE}` only, not in `{found}`"
        )));
    }
    own(node, path.name().unwrap_or_default(), "lease")
}
