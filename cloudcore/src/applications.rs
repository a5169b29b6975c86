//! What applications on a node ask of the cluster through it: KubeEdge's MetaServer protocol, cloud half.
//!
//! Reads and writes go to the API and come back whole. A watch is given to the task in [`feed`], which pushes objects
//! to the node from then on. With impersonation the API decides what a node may have; without, the rules of
//! `skerry_cloudcore_core::applications` do, and nothing is written.
//!
//! [`crate::upstream`] is the caller. Answers leave `metadata.managedFields` out, which KubeEdge sends along.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/dynamiccontroller/application/application.go.

mod feed;

use crate::hub::Hub;
use crate::upstream::answer::{self, Refused};
use crate::upstream::rest::{self, Rest};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use feed::Feed;
use http::Method;
use kube::api::{Api, DynamicObject, ListParams};
use serde_json::{Value, json};
use skerry_cloudcore_core::applications::selector::Selector;
use skerry_cloudcore_core::applications::topology::Topology;
use skerry_cloudcore_core::applications::watches::Listener;
use skerry_cloudcore_core::applications::{self as rules, Application, Resource, Target, filter};
use skerry_cloudcore_core::downstream::{Access, Key};
use skerry_cloudcore_core::upstream::answer::Status;
use skerry_protocol::application::is_discovery;
use skerry_protocol::{Message, Operation, ResourcePath};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Resource of the message that names all watches of a node.
pub(crate) const SYNC: &str = "watchapp/sync";
const SOURCE: &str = "dynamiccontroller";
const GROUP: &str = "resource";
/// Resource of every answer to one application.
const RESOURCE: &str = "ignore/Application/ignore";
/// Applications that are answered at the same time, for all nodes: a list can be large, and KubeEdge takes one after
/// the other.
const AT_ONCE_MAX: usize = 4;
/// An edge waits this long for an answer; a later one only keeps its node's next request waiting.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Services and nodes asked for at once, so that no answer is too long.
const TOPOLOGY_PAGE: u32 = 250;
/// Patch types by their names in Go.
const PATCH_TYPES: [&str; 4] = [
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];

/// Answers applications.
#[derive(Clone)]
pub(crate) struct Applications {
    client: kube::Client,
    hub: Hub,
    impersonate: bool,
    feed: Feed,
    turns: Arc<Semaphore>,
}

/// A result, as the API gave it; `None` for verbs without.
type Result = std::result::Result<Option<Vec<u8>>, Refused>;

impl Applications {
    /// Starts the task that follows what is watched.
    pub(crate) fn spawn(
        client: kube::Client,
        hub: Hub,
        impersonate: bool,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Self {
        let feed = Feed::spawn(client.clone(), hub.clone(), tasks, stop);
        let turns = Arc::new(Semaphore::new(AT_ONCE_MAX));
        Self { client, hub, impersonate, feed, turns }
    }

    pub(crate) async fn connected(&self, node: &str) {
        self.feed.connected(node).await;
    }

    pub(crate) async fn disconnected(&self, node: &str) {
        self.feed.disconnected(node).await;
    }

    /// Does what one application asks for.
    ///
    /// # Errors
    ///
    /// [`Refused::Invalid`] when the request holds no application; every other failure is in the answer.
    pub(crate) async fn answer(
        &self,
        node: &str,
        request: &Message,
    ) -> std::result::Result<Message, Refused> {
        let mut application: Application =
            request.content_as().map_err(|error| Refused::Invalid(error.to_string()))?;
        application.nodename = node.into();
        let acting = async {
            let _turn = self.turns.acquire().await.map_err(|_| Refused::Stopping)?;
            self.act(node, &application).await
        };
        let acted = tokio::time::timeout(ANSWER_TIMEOUT, acting).await;
        let answered = match acted.unwrap_or(Err(Refused::Slow)) {
            Ok(body) => application.approved(body.map(|body| STANDARD.encode(body))),
            Err(refused) => {
                tracing::debug!(node, key = application.key, verb = application.verb, error = %refused,
                    "a request of an application was refused");
                application.rejected(refused.to_status())
            }
        };
        Ok(response(request, RESOURCE, &answered))
    }

    /// Takes the list of all watches that a node has: adds and ends what differs. The answer holds the rejected ones.
    ///
    /// # Errors
    ///
    /// [`Refused::Invalid`] when the request holds no such list.
    pub(crate) async fn sync(
        &self,
        node: &str,
        request: &Message,
    ) -> std::result::Result<Message, Refused> {
        let wanted: BTreeMap<String, Application> =
            request.content_as().map_err(|error| Refused::Invalid(error.to_string()))?;
        let known: BTreeSet<String> = self.feed.ids(node).await.ok_or(Refused::Stopping)?;
        for id in known.iter().filter(|id| !wanted.contains_key(*id)) {
            self.feed.remove(node, id).await;
        }
        let mut rejected = BTreeMap::new();
        for (id, mut application) in wanted.into_iter().filter(|(id, _)| !known.contains(id)) {
            application.id.clone_from(&id);
            application.nodename = node.into();
            if let Err(refused) = self.watch(node, &application).await {
                rejected.insert(id, application.rejected(refused.to_status()));
            }
        }
        Ok(response(request, SYNC, &rejected))
    }

    async fn act(&self, node: &str, application: &Application) -> Result {
        let verb = application.verb.as_str();
        if verb == "get" && is_discovery(&application.key) {
            return self.rest(node).bytes(Method::GET, &application.key, None).await.map(Some);
        }
        if verb == "watch" {
            return self.watch(node, application).await.map(|()| None);
        }
        let mut target = target(application)?;
        let options = decoded(application.option.as_deref())?.unwrap_or_else(|| json!({}));
        let mut subresource = application.subresource.clone();
        match verb {
            "patch" => {
                // Name and subresources of a patch are among its options.
                if let Some(name) = options["Name"].as_str().filter(|name| !name.is_empty()) {
                    target.name = rest::segment(name)?.to_owned();
                }
                let names = options["Subresources"].as_array().into_iter().flatten();
                let names: Vec<&str> = names.filter_map(Value::as_str).collect();
                subresource = names.join("/");
            }
            "updatestatus" => subresource = "status".into(),
            _ => {}
        }
        self.check(node, verb, &target, &subresource, &options).await?;
        let bad = || Refused::Invalid(format!("`{}` is no key of an object", application.key));
        let place = target.path(&subresource).ok_or_else(bad)?;
        let rest = self.rest(node);
        let named = !target.name.is_empty();
        match verb {
            "get" if named => {
                let place = with_query(&place, &options, &["resourceVersion"]);
                shown(self.near(node, &target, rest.get(&place).await?).await?)
            }
            "list" => {
                let place = with_query(&place, &options, &LIST_OPTIONS);
                let list = typed_items(rest.get(&place).await?);
                shown(self.near(node, &target, list).await?)
            }
            "create" => {
                // A name is part of the path only for a subresource of an existing object.
                let object = body(application)?;
                let name = match subresource.as_str() {
                    "" => "",
                    _ => {
                        rest::segment(object["metadata"]["name"].as_str().unwrap_or(&target.name))?
                    }
                };
                let target = Target { name: name.to_owned(), ..target };
                let place = target.path(&subresource).ok_or_else(bad)?;
                shown(rest.create(&with_query(&place, &options, &WRITE_OPTIONS), &object).await?)
            }
            "update" | "updatestatus" => {
                let object = body(application)?;
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                let target = Target { name: rest::segment(name)?.to_owned(), ..target };
                let place = target.path(&subresource).ok_or_else(bad)?;
                shown(rest.replace(&with_query(&place, &options, &WRITE_OPTIONS), &object).await?)
            }
            "patch" if named => {
                let kind = options["PatchType"].as_str().unwrap_or_default();
                if !PATCH_TYPES.contains(&kind) {
                    return Err(Refused::Invalid(format!("`{kind}` is no type of patch")));
                }
                let data = STANDARD
                    .decode(options["Data"].as_str().unwrap_or_default())
                    .map_err(|error| Refused::Invalid(format!("`Data` is no base64: {error}")))?;
                let place = with_query(&place, &options["Options"], &WRITE_OPTIONS);
                let answer = rest.bytes(Method::PATCH, &place, Some((kind, data))).await?;
                let object = serde_json::from_slice(&answer)
                    .map_err(|error| Refused::Unreadable(error.to_string()))?;
                shown(object)
            }
            "delete" if named => rest.delete(&place, options).await.map(|_| None),
            "get" | "patch" | "delete" => Err(bad()),
            _ => Err(Refused::Unsupported(format!("verb `{verb}` is not supported"))),
        }
    }

    /// Takes endpoints out that a node is not to see.
    async fn near(
        &self,
        node: &str,
        target: &Target,
        mut content: Value,
    ) -> std::result::Result<Value, Refused> {
        if !Topology::concerns(&target.resource) {
            return Ok(content);
        }
        let mut topology = Topology::default();
        // Services first: mostly none of them stays within a group, and the nodes are not asked for.
        let [nodes, services] = Topology::sources();
        for resource in [services, nodes] {
            let of = feed::topology_resource(&resource);
            let objects: Api<DynamicObject> = match (resource.plural.as_str(), &*target.namespace) {
                ("services", namespace) if !namespace.is_empty() => {
                    Api::namespaced_with(self.client.clone(), namespace, &of)
                }
                _ => Api::all_with(self.client.clone(), &of),
            };
            let mut params = ListParams::default().limit(TOPOLOGY_PAGE);
            loop {
                let page = objects.list(&params).await.map_err(Refused::Unavailable)?;
                for object in page.items {
                    topology.changed(&resource.plural, &crate::api::to_json(object));
                }
                match page.metadata.continue_.filter(|token| !token.is_empty()) {
                    Some(token) => params.continue_token = Some(token),
                    None => break,
                }
            }
            if !topology.has_ranges() {
                return Ok(content);
            }
        }
        topology.narrow_all(node, &mut content);
        Ok(content)
    }

    async fn watch(
        &self,
        node: &str,
        application: &Application,
    ) -> std::result::Result<(), Refused> {
        let target = target(application)?;
        let options = decoded(application.option.as_deref())?.unwrap_or_else(|| json!({}));
        let text = |field: &str| options[field].as_str().unwrap_or_default();
        let selector = Selector::parse(text("labelSelector"), text("fieldSelector"))
            .map_err(|error| Refused::Invalid(error.to_string()))?;
        let mut selector = selector.within(&target.namespace);
        if !target.name.is_empty() {
            selector = selector.named(&target.name);
        }
        if application.id.is_empty() {
            return Err(Refused::Invalid("a watch needs an id".into()));
        }
        if self.impersonate {
            self.review(node, &target).await?;
        } else {
            self.check(node, "watch", &target, "", &options).await?;
        }
        let kind = self.kind(&target.resource).await?;
        let listener = Listener { id: application.id.clone(), resource: target.resource, selector };
        self.feed.add(node, listener, kind).await
    }

    /// Whether a node may have this. With impersonation every request is judged by the API.
    async fn check(
        &self,
        node: &str,
        verb: &str,
        target: &Target,
        subresource: &str,
        options: &Value,
    ) -> std::result::Result<(), Refused> {
        if self.impersonate {
            return Ok(());
        }
        let fields = options["fieldSelector"].as_str().unwrap_or_default();
        let has_pods =
            !target.namespace.is_empty() && self.hub.has_pods(node, &target.namespace).await;
        let mut refers = false;
        if target.resource.group.is_empty() && target.resource.plural == "secrets" {
            let path = ResourcePath::new(&target.namespace, "secret", &target.name);
            if let Some(key) = path.ok().and_then(|path| Key::of_path(&path)) {
                let access = self.hub.access(node, &key).await;
                refers = !matches!(access, None | Some(Access::Denied | Access::Unlisted));
            }
        }
        rules::check(node, verb, target, subresource, fields, has_pods, refers)
            .map_err(|status| Refused::Api(Box::new(status)))
    }

    /// Asks the API whether a node may watch this: the watch itself is CloudCore's.
    async fn review(&self, node: &str, target: &Target) -> std::result::Result<(), Refused> {
        let Target { resource, namespace, name } = target;
        let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {"user": format!("system:node:{node}"), "groups": ["system:nodes"],
                "resourceAttributes": {"verb": "watch", "group": resource.group,
                    "version": resource.version, "resource": resource.plural,
                    "namespace": namespace, "name": name}}});
        let place = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        let reviewed = Rest::new(&self.client).create(place, &review).await?;
        match reviewed["status"]["allowed"].as_bool() {
            Some(true) => Ok(()),
            _ => Err(Refused::Forbidden(format!(
                "{resource} is forbidden: User \"system:node:{node}\" cannot watch it"
            ))),
        }
    }

    /// The kind of a resource's objects, which lists do not name.
    async fn kind(&self, resource: &Resource) -> std::result::Result<String, Refused> {
        let place = match resource.group.as_str() {
            "" => format!("/api/{}", resource.version),
            group => format!("/apis/{group}/{}", resource.version),
        };
        let listed = Rest::new(&self.client).get(&place).await?;
        let mut found = listed["resources"].as_array().into_iter().flatten();
        found
            .find(|one| one["name"] == resource.plural.as_str())
            .and_then(|one| one["kind"].as_str())
            .map(str::to_owned)
            .ok_or_else(|| {
                let message =
                    format!("the server could not find the requested resource `{resource}`");
                Refused::Api(Box::new(Status::new(404, "NotFound", message)))
            })
    }

    fn rest<'a>(&'a self, node: &'a str) -> Rest<'a> {
        match self.impersonate {
            true => Rest::as_node(&self.client, node),
            false => Rest::new(&self.client),
        }
    }
}

const LIST_OPTIONS: [&str; 7] = [
    "labelSelector",
    "fieldSelector",
    "resourceVersion",
    "resourceVersionMatch",
    "limit",
    "continue",
    "timeoutSeconds",
];
const WRITE_OPTIONS: [&str; 4] = ["dryRun", "fieldManager", "fieldValidation", "force"];

fn target(application: &Application) -> std::result::Result<Target, Refused> {
    Target::parse(&application.key)
        .ok_or_else(|| Refused::Invalid(format!("`{}` is no key of an object", application.key)))
}

/// JSON inside base64; `None` when there is none.
fn decoded(text: Option<&str>) -> std::result::Result<Option<Value>, Refused> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    let bytes = STANDARD
        .decode(text)
        .map_err(|error| Refused::Invalid(format!("the options are no base64: {error}")))?;
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|error| Refused::Invalid(format!("the options are no JSON: {error}")))?;
    match value {
        Value::Null => Ok(None),
        Value::Object(_) => Ok(Some(value)),
        _ => Err(Refused::Invalid("the options are no JSON object".into())),
    }
}

fn body(application: &Application) -> std::result::Result<Value, Refused> {
    decoded(application.req_body.as_deref())?
        .ok_or_else(|| Refused::Invalid("there is no object to write".into()))
}

fn with_query(place: &str, options: &Value, names: &[&str]) -> String {
    let mut query = Query(String::new());
    for name in names {
        match &options[name] {
            Value::String(text) if !text.is_empty() => query.push(name, text),
            Value::Array(list) => {
                list.iter().filter_map(Value::as_str).for_each(|text| query.push(name, text));
            }
            other @ (Value::Number(_) | Value::Bool(_)) => query.push(name, &other.to_string()),
            _ => {}
        }
    }
    match query.0.is_empty() {
        true => place.to_owned(),
        false => format!("{place}?{}", query.0),
    }
}

/// A query string under construction.
struct Query(String);

impl Query {
    fn push(&mut self, name: &str, value: &str) {
        if !self.0.is_empty() {
            self.0.push('&');
        }
        self.0.push_str(name);
        self.0.push('=');
        for byte in value.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    self.0.push(char::from(byte));
                }
                _ => self.0.push_str(&format!("%{byte:02X}")),
            }
        }
    }
}

/// Items with their kind, as Go's dynamic client fills it in.
fn typed_items(mut list: Value) -> Value {
    let kind = list["kind"].as_str().and_then(|kind| kind.strip_suffix("List")).map(str::to_owned);
    let api_version = list["apiVersion"].clone();
    for item in list["items"].as_array_mut().into_iter().flatten() {
        if let (true, Some(kind)) = (item["kind"].is_null(), &kind) {
            item["kind"] = kind.as_str().into();
            item["apiVersion"] = api_version.clone();
        }
        if let Some(metadata) = item.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
    }
    list
}

fn shown(mut object: Value) -> Result {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    filter::apply(&mut object);
    Ok(Some(object.to_string().into_bytes()))
}

fn response<T: serde::Serialize>(request: &Message, resource: &str, content: &T) -> Message {
    let mut message = request.response(answer::now_ms(), content);
    message.route.source = SOURCE.into();
    message.route.group = GROUP.into();
    message.route.operation = Operation::ApplicationResponse.as_str().into();
    message.route.resource = resource.into();
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_become_a_query_that_says_the_same() {
        let options = json!({"labelSelector": "a in (b,c)", "limit": 5, "resourceVersion": "", "watch": true,
            "fieldManager": "m"});
        assert_eq!(
            with_query("/api/v1/pods", &options, &LIST_OPTIONS),
            "/api/v1/pods?labelSelector=a%20in%20%28b%2Cc%29&limit=5"
        );
        let dry = json!({"dryRun": ["All"], "force": true});
        assert_eq!(with_query("/x", &dry, &WRITE_OPTIONS), "/x?dryRun=All&force=true");
        assert_eq!(with_query("/x", &Value::Null, &WRITE_OPTIONS), "/x");
    }

    #[test]
    fn items_of_a_list_get_their_kind() {
        let list = json!({"kind": "PodList", "apiVersion": "v1", "items": [{"metadata": {"managedFields": []}}]});
        assert_eq!(
            typed_items(list)["items"],
            json!([{"kind": "Pod", "apiVersion": "v1", "metadata": {}}])
        );
    }

    #[test]
    fn options_are_json_objects_in_base64() {
        assert_eq!(decoded(None).expect("nothing"), None);
        assert_eq!(decoded(Some("")).expect("nothing"), None);
        assert_eq!(decoded(Some(&STANDARD.encode("null"))).expect("nothing"), None);
        assert_eq!(
            decoded(Some(&STANDARD.encode("{\"a\":1}"))).expect("an object"),
            Some(json!({"a": 1}))
        );
        for wrong in ["%", &STANDARD.encode("x"), &STANDARD.encode("[]")] {
            assert!(decoded(Some(wrong)).is_err(), "{wrong}");
        }
    }
}
