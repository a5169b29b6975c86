//! Service account tokens for a node's pods.

use super::answer::Refused;
use super::rest::{self, Done};
use super::{Outcome, Upstream, content};
use serde_json::Value;
use skerry_cloudcore_core::upstream::pod;
use skerry_protocol::{Message, Operation, ResourcePath};

impl Upstream {
    /// The content is a TokenRequest, bound to a pod of the node; the name in the path is the service account.
    pub(super) async fn token(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Outcome {
        match request.operation() {
            Some(Operation::Query) => Outcome::Read(self.create_token(node, path, request).await),
            _ => Outcome::unsupported(request),
        }
    }

    async fn create_token(&self, node: &str, path: &ResourcePath, request: &Message) -> Done {
        let forbidden = |denied: pod::Denied| Refused::Forbidden(denied.to_string());
        let account = rest::segment(path.name().unwrap_or_default())?;
        let mut wanted: Value = content(request)?;
        let (name, uid) = pod::token_pod(node, &wanted).map_err(forbidden)?;
        let place = rest::core(path.namespace(), "pods", rest::segment(name)?)?;
        // The account of the pod decides, and the hub does not keep it; a token is asked for once an hour.
        let found = self.rest(node).get(&place).await?;
        pod::check_token(node, account, uid, &found).map_err(forbidden)?;
        wanted["kind"] = "TokenRequest".into();
        wanted["apiVersion"] = "authentication.k8s.io/v1".into();
        let place = rest::core(path.namespace(), "serviceaccounts", account)?;
        self.rest(node).create(&format!("{place}/token"), &wanted).await
    }
}
