//! What a node says of its kernel, into the NodeQualification of its name.
//!
//! Written in CloudCore's own name, after the check that the node speaks of itself: no right of a node reaches to these
//! objects, so that what a gate reads is a node's own word and nobody else's. The object goes away with its Node.

use super::answer::Refused;
use super::rest;
use super::{Outcome, Upstream, content, is, own};
use crate::definitions;
use serde_json::{Value, json};
use skerry_api::fleet::v1alpha1::{API_VERSION, NodeQualificationStatus, node_qualification_crd};
use skerry_protocol::qualification::CONTENT_LEN_MAX;
use skerry_protocol::{Message, Operation, ResourcePath};

const ROOT: &str = "/apis/fleet.skerry.dev/v1alpha1";
const PLURAL: &str = "nodequalifications";

impl Upstream {
    /// `null/nodequalification/<node>`.
    pub(super) async fn qualification(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Outcome {
        if !is(request, Operation::Update) {
            return Outcome::unsupported(request);
        }
        Outcome::Done(self.keep_qualification(node, path, request).await)
    }

    async fn keep_qualification(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Result<(), Refused> {
        own(node, path.name().unwrap_or_default(), "node")?;
        let said: Value = content(request)?;
        if said.to_string().len() > CONTENT_LEN_MAX {
            return Err(Refused::TooLong);
        }
        // Only the fields that we know, each of its type.
        let status: NodeQualificationStatus = serde_json::from_value(said)
            .map_err(|error| Refused::Invalid(format!("this is no qualification: {error}")))?;
        let own_node = self.own_rest().get(&rest::core("", "nodes", node)?).await?;
        let metadata = json!({"name": node, "ownerReferences": [{"apiVersion": "v1", "kind": "Node",
            "name": node, "uid": own_node["metadata"]["uid"]}]});
        let mut object = json!({"apiVersion": API_VERSION, "kind": "NodeQualification",
            "metadata": metadata, "spec": {"node": node}, "status": status});
        let place = rest::path(ROOT, "", PLURAL, node)?;
        let all = rest::path(ROOT, "", PLURAL, "")?;
        match self.own_rest().create(&all, &object).await {
            Err(refused) if refused.is_already_exists() => {
                // What an earlier kernel had and this one has not must go, so nothing is merged.
                let known = self.own_rest().get(&place).await?;
                object["metadata"]["resourceVersion"] =
                    known["metadata"]["resourceVersion"].clone();
                self.own_rest().replace(&place, &object).await?;
            }
            Err(refused) if refused.is_not_found() => {
                let created = definitions::create(&self.client, vec![node_qualification_crd()]);
                created.await.map_err(|error| Refused::Unready(error.to_string()))?;
                // The API serves it in a moment; the node asks again.
                return Err(Refused::Unready("the kind was defined just now".into()));
            }
            created => {
                created?;
            }
        }
        tracing::info!(node, verdict = status.verdict, kernel = status.kernel, "kernel qualified");
        Ok(())
    }
}
