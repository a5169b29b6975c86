//! What requests cost at the API, and in whose name they are made: an API that only writes down what it is asked.

use super::*;
use crate::hub;
use http::{Request, Response};
use kube::client::Body;
use serde_json::json;
use skerry_cloudcore_core::downstream::{Input, Kind};
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// `METHOD path` of each request, with the user in whose name it was made.
type Asked = Arc<Mutex<Vec<String>>>;

struct World {
    upstream: Upstream,
    asked: Asked,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl World {
    async fn new(impersonate: bool) -> Self {
        let asked = Asked::default();
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let notes = Arc::clone(&asked);
        let service = tower::service_fn(move |request: Request<Body>| {
            let user =
                request.headers().get("impersonate-user").and_then(|user| user.to_str().ok());
            let note =
                format!("{} {} {}", request.method(), request.uri().path(), user.unwrap_or("-"));
            notes.lock().expect("no panic while held").push(note);
            let object = json!({"kind": "X", "apiVersion": "v1", "status": {"allowed": false},
                "metadata": {"name": "web", "uid": "u", "resourceVersion": "9"},
                "resources": [{"name": "services", "kind": "Service"}]});
            let body = Body::from(object.to_string().into_bytes());
            std::future::ready(Ok::<_, Infallible>(Response::new(body)))
        });
        let client = kube::Client::new(service, "default");
        let (hub, events) = hub::Hub::new();
        tasks.spawn(hub::run(events, hub.clone(), client.clone(), stop.clone()));
        let node = json!({"metadata": {"name": "edge1", "uid": "n", "resourceVersion": "1",
            "labels": {"node-role.kubernetes.io/edge": ""}}});
        let pod = json!({"metadata": {"name": "web", "namespace": "default", "uid": "u", "resourceVersion": "2"},
            "spec": {"nodeName": "edge1", "containers": [{"envFrom": [{"configMapRef": {"name": "c"}}]}]}});
        let config = json!({"metadata": {"name": "c", "namespace": "default", "uid": "c", "resourceVersion": "3"}});
        for (kind, object) in [(Kind::Node, node), (Kind::Pod, pod), (Kind::ConfigMap, config)] {
            hub.input(Input::Changed(kind, object)).await;
        }
        hub.input(Input::Listed(Kind::Secret, BTreeSet::new())).await;
        let jobs = Jobs::new(client.clone(), hub.clone(), false);
        let applications =
            Applications::spawn(client.clone(), hub.clone(), impersonate, &tasks, &stop);
        let settings = Settings { impersonate, ..Settings::default() };
        let upstream = Upstream::new(client, hub, jobs, applications, settings);
        Self { upstream, asked, stop, tasks }
    }

    async fn ask(&self, operation: Operation, resource: &str, content: &Value) -> Option<Message> {
        let request = Message::new(0, "edged", "meta", operation, resource, content);
        self.upstream.answer("edge1", &request).await
    }

    /// What was asked since the last look, without what the hub reads by itself.
    fn asked(&self) -> Vec<String> {
        let mut asked = std::mem::take(&mut *self.asked.lock().expect("no panic while held"));
        asked.retain(|note| !note.starts_with("GET /api/v1/namespaces/default/configmaps/c "));
        asked
    }

    async fn end(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
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

#[tokio::test]
async fn frequent_requests_cost_one_request_of_the_api_or_none() {
    let world = World::new(false).await;
    let patch = json!({"metadata": {"uid": "u"}, "status": {"phase": "Running"}});
    let lease = json!({"metadata": {"name": "edge1", "resourceVersion": "1"}, "spec": {}});
    let event = json!({"metadata": {"name": "web.1"}, "involvedObject": {"kind": "Pod", "name": "web", "namespace": "default", "uid": "u"}});
    let node =
        json!({"metadata": {"name": "edge1", "labels": {"kubernetes.io/hostname": "edge1"}}});
    let pods = "/api/v1/namespaces/default/pods/web";
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/edge1";
    use Operation::{Delete, Insert, Patch, Query, Update};
    for (operation, resource, content, expected) in [
        (Patch, "default/podpatch/web", &patch, format!("PATCH {pods}/status -")),
        (Patch, "null/nodepatch/edge1", &patch, "PATCH /api/v1/nodes/edge1/status -".into()),
        (Update, "kube-node-lease/lease/edge1", &lease, format!("PUT {leases} -")),
        (Insert, "default/event/web.1", &event, "POST /api/v1/namespaces/default/events -".into()),
        (Delete, "default/pod/web", &json!({"gracePeriodSeconds": 0}), format!("DELETE {pods} -")),
        (Insert, "null/node/edge1", &node, "POST /api/v1/nodes -".into()),
        (Update, "null/node/edge1", &node, "PATCH /api/v1/nodes/edge1 -".into()),
    ] {
        world.ask(operation, resource, content).await;
        assert_eq!(world.asked(), [expected], "{resource}");
    }
    let answer = world.ask(Query, "default/configmap/c", &json!(null)).await.expect("an answer");
    assert_eq!(
        (answer.route.operation.as_str(), answer.header.resourceversion.as_str()),
        ("response", "3")
    );
    assert_eq!(world.asked(), Vec::<String>::new(), "from the hub's memory");
    for (operation, resource) in
        [(Patch, "null/nodepatch/edge2"), (Query, "kube-node-lease/lease/edge2")]
    {
        world.ask(operation, resource, &json!({})).await;
        assert_eq!(world.asked(), Vec::<String>::new(), "{resource} is refused here");
    }
    world.end().await;
}

#[tokio::test]
async fn before_the_pods_are_listed_the_api_says_what_a_node_may_read() {
    let world = World::new(false).await;
    let answer = world.ask(Operation::Query, "default/secret/s", &json!(null)).await;
    assert_eq!(
        answer.expect("an answer").route.operation,
        "error",
        "no pod of the list refers to it"
    );
    assert_eq!(world.asked(), ["GET /api/v1/namespaces/default/pods -"]);
    world.upstream.hub.input(Input::Listed(Kind::Pod, BTreeSet::new())).await;
    world.ask(Operation::Query, "default/secret/s", &json!(null)).await;
    assert_eq!(world.asked(), Vec::<String>::new(), "now the hub knows");
    world.end().await;
}

#[tokio::test]
async fn whatever_a_node_sends_is_answered_and_nothing_panics() {
    let world = World::new(false).await;
    let contents = [
        json!(null),
        json!(1),
        json!("x"),
        json!("{}"),
        json!("[1]"),
        json!([]),
        json!([1, {"UID": 1}]),
        json!({}),
        json!({"metadata": 1}),
        json!({"metadata": {}}),
        json!({"metadata": {"name": 1, "labels": 1, "annotations": [], "ownerReferences": [1]}, "spec": 1, "status": "x"}),
        json!({"metadata": {"name": "edge1", "uid": "u"}, "spec": {"nodeName": "edge1", "volumes": [1, {"secret": 1}]}}),
        json!({"UID": "u", "Name": "web", "Status": {"conditions": [1, "x"], "daemonEndpoints": "x", "containerStatuses": 1}}),
        json!({"event": 1, "patchData": 1}),
        json!({"event": {"metadata": {}, "involvedObject": {"kind": "Node", "name": "edge1"}}, "patchData": "{"}),
        json!({"spec": {"boundObjectRef": {"kind": "Pod", "name": "web", "uid": "u"}}}),
        json!({"spec": {"signerName": "kubernetes.io/kubelet-serving", "usages": [1], "request": "!"}}),
        json!({"twin": {"a": 1}, "device": 1}),
        json!({"action": "Check", "succ": true, "extend": "{"}),
        json!({"ID": "x", "Key": "/core/v1/services/default/web", "Verb": "patch", "Option": "!", "ReqBody": "e30="}),
        json!({"ID": "x", "Key": "/core/v1/services/default/web", "Verb": "get", "Option": "bnVsbA=="}),
        json!({"w": {"Key": "/", "Verb": "watch"}, "v": {"Key": "/core/v1/services/null/null"}}),
    ];
    let resources = [
        "null/node/edge1",
        "null/nodepatch/edge1",
        "default/nodestatus/edge1",
        "default/pod/web",
        "default/podpatch/web",
        "default/podstatus/web",
        "default/podstatus",
        "default/pod",
        "kube-node-lease/lease/edge1",
        "default/event/web.1",
        "default/configmap/c",
        "default/secret/s",
        "null/persistentvolume/v",
        "default/persistentvolumeclaim/c",
        "default/volumeattachment/a",
        "default/serviceaccounttoken/default",
        "default/certificatesigningrequest/c",
        "k8s/ca.crt",
        "device/default/d/twin/edge_updated",
        "device/default/d/state/update",
        "task/j/node/edge1",
        "operations.kubeedge.io/v1alpha2/nodeupgradejob/j/node/edge1",
        "null",
        "watchapp/sync",
        "",
        "x",
        "a/b/c/d/e",
    ];
    use Operation::{
        Application, Delete, Insert, JobCheck, Patch, Prepull, Query, Update, Upgrade, Upload,
    };
    let operations = [
        Insert,
        Update,
        Delete,
        Patch,
        Query,
        Upload,
        Application,
        Upgrade,
        Prepull,
        JobCheck,
        Operation::UpdateNodeActionStatus,
    ];
    for content in &contents {
        for resource in resources {
            for operation in operations {
                let request = Message::new(0, "edged", "meta", operation, resource, content);
                let answer = world.upstream.receipt("edge1", &request).await;
                let answer = answer.unwrap_or_else(|| panic!("{operation:?} {resource} {content}"));
                assert_eq!(answer.header.parent_msg_id, request.header.msg_id);
                // The list of rejected watches may be empty; of anything else a Go edge takes that for success.
                assert!(answer.content.get() != "{}" || resource == "watchapp/sync");
            }
        }
    }
    world.end().await;
}

#[tokio::test]
async fn with_impersonation_requests_are_made_in_the_nodes_name() {
    let world = World::new(true).await;
    let node = json!({"metadata": {"name": "edge1", "labels": {"a": "b", "kubernetes.io/hostname": "edge1"}}});
    world.ask(Operation::Insert, "null/node/edge1", &node).await;
    // What a node's rights do not reach is added with CloudCore's.
    let expected = ["POST /api/v1/nodes system:node:edge1", "PATCH /api/v1/nodes/edge1 -"];
    assert_eq!(world.asked(), expected);
    let application = |verb: &str, key: &str| json!({"ID": "x", "Key": key, "Verb": verb});
    let ask = |application: Value| {
        let request =
            Message::new(0, "metaserver", "d", Operation::Application, "null", &application);
        let upstream = &world.upstream;
        async move { upstream.answer("edge1", &request).await.expect("an answer") }
    };
    ask(application("delete", "/core/v1/pods/default/web")).await;
    let expected = ["DELETE /api/v1/namespaces/default/pods/web system:node:edge1"];
    assert_eq!(world.asked(), expected);
    // The watch itself is CloudCore's, so it asks first whether the node may.
    let answer = ask(application("watch", "/core/v1/services/default/null")).await;
    assert_eq!(world.asked(), ["POST /apis/authorization.k8s.io/v1/subjectaccessreviews -"]);
    let answer: Value = answer.content_as().expect("json");
    assert_eq!(answer["Error"]["ErrStatus"]["reason"], "Forbidden");
    world.end().await;
}
