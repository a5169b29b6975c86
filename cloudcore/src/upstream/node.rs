//! A node's word about its own Node: registration, status, labels.

use super::answer::{self, Refused};
use super::rest::{self, Done, Merge};
use super::{Outcome, Upstream, content, content_object, content_patch, own};
use serde_json::Value;
use skerry_cloudcore_core::upstream::answer::{Status, without_type};
use skerry_cloudcore_core::upstream::node as rules;
use skerry_protocol::{Message, Operation, ResourcePath};

/// How often a legacy status is merged anew when somebody else wrote in between.
const CONFLICTS_MAX: usize = 3;

impl Upstream {
    pub(super) async fn node(&self, node: &str, path: &ResourcePath, request: &Message) -> Outcome {
        let name = path.name().unwrap_or_default();
        match request.operation() {
            Some(Operation::Insert) => {
                Outcome::Object { done: self.register(node, name, request).await, version: false }
            }
            Some(Operation::Update) => Outcome::Ok(self.update_node(node, name, request).await),
            Some(Operation::Query) => Outcome::Read(self.query_node(node, name).await),
            _ => Outcome::unsupported(request),
        }
    }

    pub(super) async fn patch_node(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Outcome {
        let patched = async {
            own(node, path.name().unwrap_or_default(), "node")?;
            let mut patch = content_patch(request)?;
            log_labels(node, &rules::restrict_patch(&mut patch));
            let path = format!("{}/status", node_path(node)?);
            let patched = self.rest(node).patch(&path, Merge::Strategic, &patch).await?;
            Ok(without_type(patched))
        };
        Outcome::Object { done: patched.await, version: true }
    }

    /// The form of edges before patches: `insert` registers, `update` carries the whole status. The answers are about
    /// type `node`.
    pub(super) async fn legacy_node_status(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Outcome {
        let name = path.name().unwrap_or_default();
        let resource = format!("{}/node/{name}", path.namespace());
        let mut message = match request.operation() {
            Some(Operation::Insert) => match self.register(node, name, request).await {
                Err(refused) if !refused.is_already_exists() => {
                    answer::reply(request, &format!("create node {name} error: {refused}"))
                }
                _ => answer::reply(request, "OK"),
            },
            Some(Operation::Update) => match self.replace_status(node, name, request).await {
                Ok(written) => {
                    let version = written["metadata"]["resourceVersion"].as_str();
                    answer::reply(request, "OK").with_version(version.unwrap_or_default())
                }
                Err(refused) => answer::failed(request, &refused),
            },
            _ => return Outcome::unsupported(request),
        };
        message.route.resource = resource;
        Outcome::Message(Box::new(message))
    }

    async fn register(&self, node: &str, name: &str, request: &Message) -> Done {
        own(node, name, "node")?;
        let object = content_object(request)?;
        own(node, object["metadata"]["name"].as_str().unwrap_or(node), "node")?;
        let cloud = self.settings.address.as_deref();
        let (mut object, refused) = rules::registration(object, node, cloud);
        log_labels(node, &refused);
        // A node's own rights do not reach that far; ours do, so that one request is enough.
        let later = self.settings.impersonate.then(|| rules::split_reserved(&mut object)).flatten();
        let mut created = self.rest(node).create(&rest::core("", "nodes", "")?, &object).await?;
        if let Some(labels) = later {
            created = self.own_rest().patch(&node_path(node)?, Merge::Json, &labels).await?;
        }
        tracing::info!(node, "node registered");
        Ok(without_type(created))
    }

    async fn update_node(&self, node: &str, name: &str, request: &Message) -> Done {
        own(node, name, "node")?;
        let mut object = content_object(request)?;
        let (patch, refused) = rules::update_patch(&mut object);
        log_labels(node, &refused);
        self.rest(node).patch(&node_path(node)?, Merge::Strategic, &patch).await
    }

    async fn query_node(&self, node: &str, name: &str) -> Done {
        own(node, name, "node")?;
        let found = self.rest(node).get(&node_path(node)?).await;
        found.map_err(|refused| match refused.is_not_found() {
            true => Refused::Api(Box::new(Status::not_found_in_cache("", "node", name))),
            false => refused,
        })
    }

    async fn replace_status(&self, node: &str, name: &str, request: &Message) -> Done {
        own(node, name, "node")?;
        let report: Value = content(request)?;
        let path = node_path(node)?;
        let now = jiff::Timestamp::now();
        let is_old = |time: &str| {
            time.parse::<jiff::Timestamp>().map_or(true, |time| {
                now.duration_since(time).as_secs() > rules::HEARTBEAT_AGE_MAX_S
            })
        };
        let text = seconds(now);
        let mut conflicts = 0;
        loop {
            let current = self.rest(node).get(&path).await?;
            let merged = rules::with_legacy_status(current, &report, is_old, &text);
            match self.rest(node).replace(&format!("{path}/status"), &merged).await {
                Err(refused) if refused.is_conflict() && conflicts < CONFLICTS_MAX => {
                    conflicts += 1
                }
                done => return done,
            }
        }
    }
}

/// RFC 3339 with whole seconds, as Kubernetes writes times.
pub(crate) fn seconds(now: jiff::Timestamp) -> String {
    now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn node_path(node: &str) -> Result<String, Refused> {
    rest::core("", "nodes", node)
}

fn log_labels(node: &str, refused: &[String]) {
    if !refused.is_empty() {
        tracing::debug!(
            node,
            labels = refused.join(" "),
            "labels that a node may not set were left out"
        );
    }
}
