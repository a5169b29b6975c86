//! A node's word about its pods: status, mirror pods, and that a deleted one has ended.

use super::answer::{self, Refused};
use super::node::seconds;
use super::rest::{self, Done, Merge};
use super::{Outcome, Upstream, content, content_object, content_patch};
use serde_json::{Map, Value, json};
use skerry_cloudcore_core::downstream::{Key, Kind};
use skerry_cloudcore_core::upstream::answer::{Status, without_type};
use skerry_cloudcore_core::upstream::pod as rules;
use skerry_protocol::{Message, Operation, ResourcePath};

/// Reports in one legacy message; a node has at most a few hundred pods.
const REPORTS_MAX: usize = 1024;
/// How often a legacy status is merged anew when somebody else wrote in between.
const CONFLICTS_MAX: usize = 3;

impl Upstream {
    pub(super) async fn pod(&self, node: &str, path: &ResourcePath, request: &Message) -> Outcome {
        match request.operation() {
            Some(Operation::Insert) => {
                Outcome::Object { done: self.insert_pod(node, path, request).await, version: true }
            }
            Some(Operation::Delete) => Outcome::Done(self.delete_pod(node, path, request).await),
            _ => Outcome::unsupported(request),
        }
    }

    pub(super) async fn patch_pod(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Outcome {
        let patched = async {
            let mut patch = content_patch(request)?;
            self.check_pod(node, path, patch["metadata"]["uid"].as_str()).await?;
            // A status patch can reach metadata too; labels of a pod choose its Services.
            if let Some(metadata) = patch.get_mut("metadata").and_then(Value::as_object_mut) {
                metadata.retain(|field, _| field == "uid" || field == "resourceVersion");
            }
            let path = format!("{}/status", pod_path(path)?);
            let patched = self.rest(node).patch(&path, Merge::Strategic, &patch).await?;
            Ok(without_type(patched))
        };
        Outcome::Object { done: patched.await, version: true }
    }

    async fn insert_pod(&self, node: &str, path: &ResourcePath, request: &Message) -> Done {
        let mut pod = content_object(request)?;
        rules::check_mirror(node, &pod).map_err(|denied| Refused::Forbidden(denied.to_string()))?;
        pod["kind"] = "Pod".into();
        pod["apiVersion"] = "v1".into();
        let created =
            self.rest(node).create(&rest::core(path.namespace(), "pods", "")?, &pod).await?;
        Ok(without_type(created))
    }

    /// The content is a DeleteOptions object, or the pod's uid from older edges. A pod that is gone, or that is another
    /// pod by now, counts as deleted.
    async fn delete_pod(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Result<(), Refused> {
        let options: Value = content(request)?;
        let uid = options.as_str().or_else(|| options["preconditions"]["uid"].as_str());
        match self.check_pod(node, path, uid).await {
            Err(refused) if refused.is_not_found() || refused.is_conflict() => return Ok(()),
            checked => checked?,
        }
        let grace = options["gracePeriodSeconds"].as_u64().unwrap_or(0);
        let mut fields = Map::from_iter([("gracePeriodSeconds".to_owned(), grace.into())]);
        if let Some(uid) = uid {
            fields.insert("preconditions".into(), json!({ "uid": uid }));
        }
        match self.rest(node).delete(&pod_path(path)?, fields.into()).await {
            Err(refused) if !refused.is_not_found() && !refused.is_conflict() => Err(refused),
            _ => Ok(()),
        }
    }

    /// The form of edges before patches: whole statuses, of one pod or of several.
    ///
    /// KubeEdge answers once per pod; here there is one answer, the first failure if there is one, as the edge waits for
    /// one. A pod that the cluster does not have is deleted on the edge.
    pub(super) async fn legacy_pod_status(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Outcome {
        if request.operation() != Some(Operation::Update) {
            return Outcome::unsupported(request);
        }
        let reports = match content::<Value>(request).map(rules::legacy_reports) {
            Ok(Some(reports)) if reports.len() <= REPORTS_MAX => reports,
            Ok(_) => {
                let reason = "the content is no pod status and no list of them".to_owned();
                return Outcome::Done(Err(Refused::Invalid(reason)));
            }
            Err(refused) => return Outcome::Done(Err(refused)),
        };
        let mut done = Ok(());
        for report in reports {
            let one = self.replace_pod_status(node, path.namespace(), report).await;
            if done.is_ok() {
                done = one;
            }
        }
        Outcome::Done(done)
    }

    async fn replace_pod_status(
        &self,
        node: &str,
        namespace: &str,
        report: rules::LegacyReport,
    ) -> Result<(), Refused> {
        let path = rest::core(namespace, "pods", &report.name)?;
        let now = seconds(jiff::Timestamp::now());
        let mut conflicts = 0;
        let written = loop {
            let pod = match self.rest(node).get(&path).await {
                Err(refused) if !refused.is_not_found() => return Err(refused),
                Ok(pod) if pod["metadata"]["uid"] == *report.uid => pod,
                _ => return self.remove_from_edge(node, namespace, &report.name).await,
            };
            rules::check_bound(node, &pod)
                .map_err(|denied| Refused::Forbidden(denied.to_string()))?;
            let merged = rules::with_legacy_status(pod, report.status.clone(), &now);
            match self.rest(node).replace(&format!("{path}/status"), &merged).await {
                Err(refused) if refused.is_conflict() && conflicts < CONFLICTS_MAX => {
                    conflicts += 1
                }
                written => break written?,
            }
        };
        if rules::has_ended(&written) {
            let options = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": report.uid}});
            match self.rest(node).delete(&path, options).await {
                Err(refused) if !refused.is_not_found() && !refused.is_conflict() => {
                    tracing::warn!(node, pod = report.name, error = %refused,
                        "a pod that has ended was not deleted; its node's next report tries again");
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn remove_from_edge(
        &self,
        node: &str,
        namespace: &str,
        name: &str,
    ) -> Result<(), Refused> {
        let resource = format!("{namespace}/pod/{name}");
        let stub = rules::stub(namespace, name);
        let push = Message::new(
            answer::now_ms(),
            answer::SOURCE,
            answer::GROUP,
            Operation::Delete,
            resource,
            &stub,
        );
        self.hub.send(node, push).await;
        Ok(())
    }

    /// Checks that a pod is bound to `node`, and that it has `uid` when one is given. No request when the hub knows.
    pub(super) async fn check_pod(
        &self,
        node: &str,
        path: &ResourcePath,
        uid: Option<&str>,
    ) -> Result<(), Refused> {
        let name = path.name().unwrap_or_default();
        let key = Key::new(Kind::Pod, path.namespace(), name)
            .ok_or_else(|| Refused::Invalid(format!("`{path}` is no pod")))?;
        // The watch may be behind, for a mirror pod that the node has just created for one.
        let is_this = |(_, known): &(String, String)| uid.is_none_or(|uid| uid == known);
        let (bound_to, found) = match self.hub.binding(&key).await.filter(is_this) {
            Some(binding) => binding,
            None => {
                let pod = self.rest(node).get(&pod_path(path)?).await?;
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                (text(&pod["spec"]["nodeName"]), text(&pod["metadata"]["uid"]))
            }
        };
        if uid.is_some_and(|uid| uid != found) {
            // Whose it is now is none of this node's business.
            let message = format!("pod `{name}` is another pod by now");
            return Err(Refused::Api(Box::new(Status::new(409, "Conflict", message))));
        }
        match bound_to == node {
            true => Ok(()),
            false => Err(Refused::Forbidden(format!("pod `{name}` is not bound to node `{node}`"))),
        }
    }
}

fn pod_path(path: &ResourcePath) -> Result<String, Refused> {
    let name = rest::segment(path.name().unwrap_or_default())?;
    rest::core(path.namespace(), "pods", name)
}
