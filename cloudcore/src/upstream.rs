//! What a node asks for: registration, status, leases, events, and reads.
//!
//! A node may act only for itself: on its own Node and Lease, on pods bound to it, on ConfigMaps and Secrets that those
//! refer to. Everything else is answered with an error that says so.
//!
//! Answers have KubeEdge's shapes: `{"Object": …, "Err": …}` where its edge wants that, the object itself for reads, and
//! `"OK"` for deletes. A failed read is answered with the operation `error`, because a KubeEdge edge would store an
//! error body as if it were the object.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/edgecontroller/controller/upstream.go.

use crate::api;
use crate::hub::Hub;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions,
};
use serde_json::{Value, json};
use skerry_cloudcore_core::downstream::{Access, Key, Kind};
use skerry_protocol::{Message, Operation, ResourcePath};

const SOURCE: &str = "edgecontroller";
const GROUP: &str = "resource";
const LEASE_NAMESPACE: &str = "kube-node-lease";
/// Marks a pod that exists because its node has it in a file.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

/// Answers the requests of nodes.
pub(crate) struct Upstream {
    client: kube::Client,
    hub: Hub,
}

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
enum Refused {
    /// The API said no; it goes to the node as it is.
    #[error("{}", .0.message)]
    Api(Box<kube::core::Status>),
    /// The API did not answer.
    #[error("the Kubernetes API is not available: {0}")]
    Unavailable(kube::Error),
    /// The node asks for what is not its own.
    #[error("{0}")]
    Forbidden(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
}

impl From<kube::Error> for Refused {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::Api(status),
            other => Self::Unavailable(other),
        }
    }
}

impl Refused {
    /// In the form in which KubeEdge writes an API error, which its edge turns back into one.
    fn to_err(&self) -> Value {
        let (message, reason, code) = match self {
            Self::Api(status) => {
                let mut status = serde_json::to_value(status).expect("string keys");
                status["metadata"] = json!({});
                status["status"] = "Failure".into();
                return json!({"ErrStatus": status});
            }
            Self::Unavailable(_) => (self.to_string(), "ServiceUnavailable", 503),
            Self::Forbidden(message) => (message.clone(), "Forbidden", 403),
            Self::Invalid(message) => (message.clone(), "BadRequest", 400),
        };
        json!({"ErrStatus": {"metadata": {}, "status": "Failure", "message": message,
            "reason": reason, "code": code}})
    }
}

type Done = Result<Value, Refused>;

impl Upstream {
    pub(crate) fn new(client: kube::Client, hub: Hub) -> Self {
        Self { client, hub }
    }

    /// Does what `request` asks for, as `node`. `None` when no answer is due.
    pub(crate) async fn answer(&self, node: &str, request: &Message) -> Option<Message> {
        let route = &request.route;
        let Ok(path) = route.resource.parse::<ResourcePath>() else {
            tracing::info!(
                node,
                operation = route.operation,
                resource = route.resource,
                "unknown request of a node, ignored"
            );
            return None;
        };
        let name = path.name().unwrap_or_default();
        let operation = request.operation();
        use Operation::{Delete, Insert, Patch, Query, Update};
        let answer = match (operation, path.kind()) {
            (Some(Insert), "node") => {
                object(request, self.insert_node(node, name, request).await, false)
            }
            (Some(Patch), "nodepatch") => {
                object(request, self.patch_node(node, name, request).await, true)
            }
            (Some(Update), "node") => self.ok(request, self.update_node(node, name, request).await),
            (Some(Query), "node") => self.read(node, request, self.query_node(node, name).await),
            (Some(Patch), "podpatch") => {
                object(request, self.patch_pod(node, &path, request).await, true)
            }
            (Some(Insert), "pod") => {
                object(request, self.insert_pod(node, &path, request).await, true)
            }
            (Some(Delete), "pod") => match self.delete_pod(node, &path, request).await {
                Ok(()) => reply(request, &"OK"),
                Err(refused) => reply(request, &refused.to_err()),
            },
            (Some(Query | Insert | Update), "lease") => {
                object(request, self.lease(node, &path, request).await, false)
            }
            (Some(Query), "configmap" | "secret") => {
                self.read(node, request, self.query_config(node, &path).await)
            }
            (Some(Insert | Update | Patch), "event") => {
                if let Err(refused) = self.event(node, &path, request).await {
                    tracing::info!(node, resource = route.resource, error = %refused,
                        "an event of the node was not recorded");
                }
                return None;
            }
            (Some(Query), "serviceaccounttoken") => failed(
                request,
                "service account tokens are not supported yet; set `automountServiceAccountToken: false` in the pod",
            ),
            (Some(_), kind) if !["device", "membership", "watchapp"].contains(&kind) => {
                failed(request, &format!("`{}` of `{kind}` is not supported yet", route.operation))
            }
            _ => {
                tracing::debug!(
                    node,
                    operation = route.operation,
                    resource = route.resource,
                    "request of a node that has no answer yet, ignored"
                );
                return None;
            }
        };
        Some(answer)
    }

    async fn insert_node(&self, node: &str, name: &str, request: &Message) -> Done {
        own(node, name, "node")?;
        let object = content_object(request)?;
        own(node, object["metadata"]["name"].as_str().unwrap_or_default(), "node")?;
        let created = self.nodes().create(&PostParams::default(), &typed(object, "Node")?).await?;
        tracing::info!(node, "node registered");
        Ok(api::to_json(created))
    }

    async fn patch_node(&self, node: &str, name: &str, request: &Message) -> Done {
        own(node, name, "node")?;
        let patch = content_patch(request)?;
        let params = PatchParams::default();
        let patched = self.nodes().patch_status(node, &params, &Patch::Strategic(patch)).await?;
        Ok(api::to_json(patched))
    }

    /// Labels and annotations only, as KubeEdge does.
    async fn update_node(&self, node: &str, name: &str, request: &Message) -> Done {
        own(node, name, "node")?;
        let object = content_object(request)?;
        let metadata = &object["metadata"];
        let patch = json!({"metadata": {"labels": metadata["labels"], "annotations": metadata["annotations"]}});
        let params = PatchParams::default();
        let patched = self.nodes().patch(node, &params, &Patch::Strategic(patch)).await?;
        Ok(api::to_json(patched))
    }

    async fn query_node(&self, node: &str, name: &str) -> Done {
        own(node, name, "node")?;
        Ok(api::to_json(self.nodes().get(node).await?))
    }

    async fn patch_pod(&self, node: &str, path: &ResourcePath, request: &Message) -> Done {
        let patch = content_patch(request)?;
        let wanted_uid = patch["metadata"]["uid"].as_str();
        self.check_pod(node, path, wanted_uid).await?;
        let pods = api::objects(&self.client, Kind::Pod, path.namespace());
        let name = path.name().unwrap_or_default();
        let patched =
            pods.patch_status(name, &PatchParams::default(), &Patch::Strategic(&patch)).await?;
        Ok(api::to_json(patched))
    }

    async fn insert_pod(&self, node: &str, path: &ResourcePath, request: &Message) -> Done {
        let object = content_object(request)?;
        own(node, object["spec"]["nodeName"].as_str().unwrap_or_default(), "pod of node")?;
        if object["metadata"]["annotations"].get(MIRROR_ANNOTATION).is_none() {
            let reason = "a node may create mirror pods only".to_owned();
            return Err(Refused::Forbidden(reason));
        }
        let pods = api::objects(&self.client, Kind::Pod, path.namespace());
        Ok(api::to_json(pods.create(&PostParams::default(), &typed(object, "Pod")?).await?))
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
        let grace = options["gracePeriodSeconds"].as_u64().unwrap_or(0);
        match self.check_pod(node, path, None).await {
            Err(Refused::Api(status)) if status.code == 404 => return Ok(()),
            checked => checked?,
        }
        let params = DeleteParams {
            grace_period_seconds: Some(u32::try_from(grace).unwrap_or(0)),
            preconditions: uid
                .map(|uid| Preconditions { uid: Some(uid.into()), resource_version: None }),
            ..DeleteParams::default()
        };
        let pods = api::objects(&self.client, Kind::Pod, path.namespace());
        match pods.delete(path.name().unwrap_or_default(), &params).await {
            Err(error) if !api::is_not_found(&error) && !api::is_conflict(&error) => {
                Err(error.into())
            }
            _ => Ok(()),
        }
    }

    async fn lease(&self, node: &str, path: &ResourcePath, request: &Message) -> Done {
        if path.namespace() != LEASE_NAMESPACE {
            let found = path.namespace();
            return Err(Refused::Forbidden(format!(
                "node `{node}` may use leases in `{LEASE_NAMESPACE}` only, not in `{found}`"
            )));
        }
        own(node, path.name().unwrap_or_default(), "lease")?;
        let resource = ApiResource {
            group: "coordination.k8s.io".into(),
            version: "v1".into(),
            api_version: "coordination.k8s.io/v1".into(),
            kind: "Lease".into(),
            plural: "leases".into(),
        };
        let leases: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), LEASE_NAMESPACE, &resource);
        if request.operation() == Some(Operation::Query) {
            return Ok(api::to_json(leases.get(node).await?));
        }
        let mut object = content_object(request)?;
        own(node, object["metadata"]["name"].as_str().unwrap_or_default(), "lease")?;
        object["apiVersion"] = "coordination.k8s.io/v1".into();
        let lease = typed_as(object, "Lease")?;
        let params = PostParams::default();
        let written = match request.operation() {
            Some(Operation::Insert) => leases.create(&params, &lease).await?,
            _ => leases.replace(node, &params, &lease).await?,
        };
        Ok(api::to_json(written))
    }

    async fn query_config(&self, node: &str, path: &ResourcePath) -> Done {
        let key =
            Key::of_path(path).ok_or_else(|| Refused::Invalid(format!("`{path}` is no object")))?;
        let gone = || Refused::Unavailable(kube::Error::Service("cloudcore is stopping".into()));
        match self.hub.access(node, &key).await.ok_or_else(gone)? {
            Access::Denied => {
                Err(Refused::Forbidden(format!("no pod of node `{node}` refers to `{path}`")))
            }
            Access::Held { object, .. } => serde_json::from_str(object.get())
                .map_err(|error| Refused::Invalid(error.to_string())),
            Access::Absent | Access::Unknown => {
                let objects = api::objects(&self.client, key.kind(), key.namespace());
                let mut object = api::to_json(objects.get(key.name()).await?);
                object["kind"] = key.kind().api_kind().into();
                object["apiVersion"] = "v1".into();
                Ok(object)
            }
        }
    }

    async fn event(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Result<(), Refused> {
        let mut object: Value = content(request)?;
        // A patch comes as the event with the patch beside it.
        let patch = object.get_mut("patchData").map(Value::take);
        if let Some(event) = object.get_mut("event").map(Value::take) {
            object = event;
        }
        for host in [&object["source"]["host"], &object["reportingInstance"]] {
            if let Some(host) = host.as_str().filter(|host| !host.is_empty()) {
                own(node, host, "events of node")?;
            }
        }
        let resource = api::resource("Event", "events");
        let events: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), path.namespace(), &resource);
        let name = path.name().unwrap_or_default();
        if let Some(patch) = patch {
            let patch = patch_of(patch)?;
            events.patch(name, &PatchParams::default(), &Patch::Strategic(patch)).await?;
            return Ok(());
        }
        let event = typed(object, "Event")?;
        let params = PostParams::default();
        let written = match request.operation() {
            Some(Operation::Insert) => events.create(&params, &event).await,
            _ => events.replace(name, &params, &event).await,
        };
        match written {
            Err(error) if !api::is_already_exists(&error) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Checks that a pod is bound to `node`, and that it has `uid` when one is given.
    async fn check_pod(
        &self,
        node: &str,
        path: &ResourcePath,
        uid: Option<&str>,
    ) -> Result<(), Refused> {
        let key = Key::of_path(
            &ResourcePath::new(
                path.namespace(),
                Kind::Pod.token(),
                path.name().unwrap_or_default(),
            )
            .map_err(|error| Refused::Invalid(error.to_string()))?,
        )
        .ok_or_else(|| Refused::Invalid(format!("`{path}` is no pod")))?;
        let known = self.hub.binding(&key).await;
        // The watch may be behind, for a mirror pod that the node has just created for one.
        let is_this = |(_, known_uid): &(String, String)| uid.is_none_or(|uid| uid == known_uid);
        let (bound_to, found_uid) = match known.filter(is_this) {
            Some(binding) => binding,
            None => {
                let pods = api::objects(&self.client, Kind::Pod, key.namespace());
                let pod = pods.get(key.name()).await?;
                let bound_to = pod.data["spec"]["nodeName"].as_str().unwrap_or_default();
                (bound_to.to_owned(), pod.metadata.uid.unwrap_or_default())
            }
        };
        if bound_to != node {
            let name = key.name();
            return Err(Refused::Forbidden(format!("pod `{name}` is not bound to node `{node}`")));
        }
        match uid {
            Some(uid) if uid != found_uid => {
                let message = format!(
                    "pod `{}` has uid {found_uid}, not {uid}; it is another pod by now",
                    key.name()
                );
                let status = json!({"status": "Failure", "message": message,
                    "reason": "Conflict", "code": 409});
                Err(Refused::Api(serde_json::from_value(status).expect("a status")))
            }
            _ => Ok(()),
        }
    }

    fn nodes(&self) -> Api<DynamicObject> {
        api::objects(&self.client, Kind::Node, "")
    }

    fn ok(&self, request: &Message, done: Done) -> Message {
        match done {
            Ok(object) => reply(request, &"OK").with_version(version(&object)),
            Err(refused) => failed(request, &refused.to_string()),
        }
    }

    fn read(&self, node: &str, request: &Message, done: Done) -> Message {
        match done {
            Ok(object) => reply(request, &object).with_version(version(&object)),
            Err(refused) => {
                tracing::info!(node, resource = request.route.resource, error = %refused,
                    "a read of the node was refused");
                failed(request, &refused.to_string())
            }
        }
    }
}

/// Refuses what is of another node.
fn own(node: &str, found: &str, what: &str) -> Result<(), Refused> {
    if node == found {
        return Ok(());
    }
    Err(Refused::Forbidden(format!("node `{node}` may not act for {what} `{found}`")))
}

/// The answer `{"Object": …, "Err": …}`; both keys are always there.
fn object(request: &Message, done: Done, with_version: bool) -> Message {
    match done {
        Ok(object) => {
            let answer = reply(request, &json!({"Object": object, "Err": null}));
            if with_version { answer.with_version(version(&object)) } else { answer }
        }
        Err(refused) => reply(request, &json!({"Object": null, "Err": refused.to_err()})),
    }
}

fn reply<T: serde::Serialize>(request: &Message, content: &T) -> Message {
    let mut answer = request.response(jiff::Timestamp::now().as_millisecond(), content);
    answer.route.source = SOURCE.into();
    answer.route.group = GROUP.into();
    answer
}

fn failed(request: &Message, text: &str) -> Message {
    request.error(jiff::Timestamp::now().as_millisecond(), SOURCE, GROUP, text)
}

fn version(object: &Value) -> &str {
    object["metadata"]["resourceVersion"].as_str().unwrap_or_default()
}

fn content<T: serde::de::DeserializeOwned>(request: &Message) -> Result<T, Refused> {
    request.content_as().map_err(|error| Refused::Invalid(error.to_string()))
}

fn content_object(request: &Message) -> Result<Value, Refused> {
    let object: Value = content(request)?;
    match object["metadata"].is_object() {
        true => Ok(object),
        false => {
            Err(Refused::Invalid(format!("content of `{}` is no object", request.route.resource)))
        }
    }
}

/// A patch comes as a string that holds JSON; an object is taken as well.
fn content_patch(request: &Message) -> Result<Value, Refused> {
    patch_of(content(request)?)
}

fn patch_of(patch: Value) -> Result<Value, Refused> {
    let patch = match patch {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| Refused::Invalid(format!("the patch is no JSON: {error}")))?,
        other => other,
    };
    match patch {
        Value::Object(_) => Ok(patch),
        _ => Err(Refused::Invalid("the patch is no JSON object".into())),
    }
}

/// An object of `v1` for the client.
fn typed(mut object: Value, kind: &str) -> Result<DynamicObject, Refused> {
    object["apiVersion"] = "v1".into();
    typed_as(object, kind)
}

fn typed_as(mut object: Value, kind: &str) -> Result<DynamicObject, Refused> {
    object["kind"] = kind.into();
    serde_json::from_value(object)
        .map_err(|error| Refused::Invalid(format!("the {kind} is not readable: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_with_an_object_always_have_both_keys() {
        let request = Message::new(0, "edged", "meta", Operation::Insert, "null/node/edge1", &());
        let done = object(&request, Ok(json!({"metadata": {"resourceVersion": "7"}})), true);
        assert_eq!(
            done.content.get(),
            r#"{"Err":null,"Object":{"metadata":{"resourceVersion":"7"}}}"#
        );
        assert_eq!(
            (done.header.resourceversion.as_str(), done.route.source.as_str()),
            ("7", SOURCE)
        );
        let refused = object(&request, own("edge1", "edge2", "node").map(|()| Value::Null), true);
        let body: Value = refused.content_as().expect("json");
        assert_eq!(body["Object"], Value::Null);
        assert_eq!(body["Err"]["ErrStatus"]["code"], 403);
        assert_eq!(
            body["Err"]["ErrStatus"]["message"],
            "node `edge1` may not act for node `edge2`"
        );
    }

    #[test]
    fn patches_come_as_text_or_as_an_object() {
        let check = |content: Value| {
            let request =
                Message::new(0, "edged", "meta", Operation::Patch, "null/nodepatch/n", &content);
            content_patch(&request).map_err(|refused| refused.to_string())
        };
        assert_eq!(check(json!("{\"status\":{}}")), Ok(json!({"status": {}})));
        assert_eq!(check(json!({"status": {}})), Ok(json!({"status": {}})));
        assert!(check(json!("{")).is_err_and(|text| text.starts_with("the patch is no JSON")));
        assert!(check(json!([])).is_err());
    }
}
