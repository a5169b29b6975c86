//! The hub over real TLS and WebSocket, with the embedded API behind it.

mod support;

use futures::SinkExt;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Event;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use skerry_protocol::capability::Capabilities;
use skerry_protocol::digest::{self, Digest, Held};
use skerry_protocol::message::UPSTREAM_LEN_MAX;
use skerry_protocol::{Message, Operation};
use support::{Cluster, Identity, from};
use tokio_tungstenite::tungstenite::{Error as WsError, Message as WsMessage};

fn held(message: &Message) -> (String, Held) {
    let object: Value = message.content_as().expect("an object");
    let text = |name: &str| object["metadata"][name].as_str().expect(name).to_owned();
    (message.route.resource.clone(), Held { uid: text("uid"), rv: text("resourceVersion") })
}

#[tokio::test]
async fn node_joins_and_gets_its_pod_with_what_that_needs() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    let answer = link.register().await;
    assert_eq!(answer["Err"], Value::Null);
    assert_eq!(answer["Object"]["metadata"]["name"], "edge1");
    let node = cluster.nodes().get("edge1").await.expect("registered");
    assert!(node.metadata.labels.expect("labels").contains_key("node-role.kubernetes.io/edge"));

    cluster.create_config("page", "one").await;
    cluster.create_pod("web", "edge1", "page").await;
    cluster.create_pod("other", "edge2", "page").await;
    let mut pushed: Vec<String> = Vec::new();
    while pushed.len() < 2 {
        let message = link.next().await;
        pushed.push(format!("{} {}", message.route.operation, message.route.resource));
    }
    pushed.sort();
    assert_eq!(pushed, ["insert default/configmap/page", "insert default/pod/web"]);

    let patch = json!({"data": {"key": "two"}});
    let patch = Patch::Merge(&patch);
    cluster.configs().patch("page", &PatchParams::default(), &patch).await.expect("patched");
    let (update, before) = link.until("update", "default/configmap/page").await;
    assert_eq!(before, Vec::<String>::new(), "nothing of another node in between");
    let object: Value = update.content_as().expect("an object");
    assert_eq!((&object["data"]["key"], &object["kind"]), (&json!("two"), &json!("ConfigMap")));
    assert_eq!(update.header.resourceversion, object["metadata"]["resourceVersion"]);
    cluster.stop().await;
}

#[tokio::test]
async fn node_reports_its_status_and_that_of_its_pods() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    link.register().await;
    cluster.create_config("page", "one").await;
    cluster.create_pod("web", "edge1", "page").await;
    cluster.create_pod("other", "edge2", "page").await;
    link.until("insert", "default/pod/web").await;

    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True",
        "reason": "EdgeReady", "message": "ok", "lastHeartbeatTime": "2026-01-01T00:00:00Z",
        "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
    let (_, answer) = link.ask(Operation::Patch, "null/nodepatch/edge1", &ready.to_string()).await;
    assert_eq!(answer["Err"], Value::Null, "{answer}");
    let node = cluster.nodes().get("edge1").await.expect("the node");
    assert_eq!(node.status.expect("status").conditions.expect("conditions")[0].status, "True");

    let uid = cluster.pods().get("web").await.expect("the pod").metadata.uid.expect("uid");
    let running = json!({"metadata": {"uid": uid}, "status": {"phase": "Running"}});
    let (_, answer) =
        link.ask(Operation::Patch, "default/podpatch/web", &running.to_string()).await;
    assert_eq!(answer["Object"]["status"]["phase"], "Running", "{answer}");

    // Another pod under the name, another node's pod, another node.
    let stale = json!({"metadata": {"uid": "former"}, "status": {"phase": "Failed"}});
    let (_, answer) = link.ask(Operation::Patch, "default/podpatch/web", &stale.to_string()).await;
    assert_eq!(answer["Err"]["ErrStatus"]["reason"], "Conflict", "{answer}");
    let foreign = json!({"status": {"phase": "Failed"}}).to_string();
    let (_, answer) = link.ask(Operation::Patch, "default/podpatch/other", &foreign).await;
    assert_eq!(answer["Err"]["ErrStatus"]["message"], "pod `other` is not bound to node `edge1`");
    let (_, answer) = link.ask(Operation::Patch, "null/nodepatch/edge2", &foreign).await;
    assert_eq!(answer["Err"]["ErrStatus"]["code"], 403);
    let (_, answer) = link.ask(Operation::Patch, "default/podpatch/none", &foreign).await;
    assert_eq!(answer["Err"]["ErrStatus"]["reason"], "NotFound", "{answer}");

    // Deletion: announced, confirmed by the node, done.
    cluster.pods().delete("web", &DeleteParams::default()).await.expect("deleted");
    let (announced, _) = link.until("update", "default/pod/web").await;
    let object: Value = announced.content_as().expect("an object");
    assert!(object["metadata"]["deletionTimestamp"].is_string(), "{object}");
    let options = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": uid}});
    let (operation, answer) = link.ask(Operation::Delete, "default/pod/web", &options).await;
    assert_eq!((operation.as_str(), answer), ("response", json!("OK")));
    assert!(cluster.pods().get_opt("web").await.expect("readable").is_none());
    let (operation, answer) = link.ask(Operation::Delete, "default/pod/web", &options).await;
    assert_eq!((operation.as_str(), answer), ("response", json!("OK")), "once more is fine");
    cluster.stop().await;
}

#[tokio::test]
async fn deleted_objects_are_deleted_on_the_node() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    link.register().await;
    cluster.create_config("page", "one").await;
    cluster.create_pod("web", "edge1", "page").await;
    // In either order: each waits for its own record of delivery.
    let both = vec!["default/pod/web".to_owned(), "default/configmap/page".to_owned()];
    link.until_all("insert", both.clone()).await;
    cluster.pods().delete("web", &DeleteParams::default().grace_period(0)).await.expect("deleted");
    link.until_all("delete", both).await;
    cluster.stop().await;
}

#[tokio::test]
async fn leases_and_events_are_the_nodes_own() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    link.register().await;
    let path = "kube-node-lease/lease/edge1";
    let (_, answer) = link.ask(Operation::Query, path, &()).await;
    assert_eq!(answer["Object"], Value::Null);
    assert_eq!(answer["Err"]["ErrStatus"]["reason"], "NotFound", "{answer}");
    let lease = json!({"metadata": {"name": "edge1", "namespace": "kube-node-lease"},
        "spec": {"holderIdentity": "edge1", "leaseDurationSeconds": 40}});
    let (_, answer) = link.ask(Operation::Insert, path, &lease).await;
    assert_eq!(answer["Err"], Value::Null, "{answer}");
    let mut renewed = answer["Object"].clone();
    renewed["spec"]["renewTime"] = json!("2026-01-01T00:00:00.000000Z");
    let (_, answer) = link.ask(Operation::Update, path, &renewed).await;
    assert_eq!(answer["Err"], Value::Null, "{answer}");
    let (_, answer) = link.ask(Operation::Update, path, &renewed).await;
    assert_eq!(answer["Err"]["ErrStatus"]["reason"], "Conflict", "{answer}");
    let (_, answer) = link.ask(Operation::Query, "kube-node-lease/lease/edge2", &()).await;
    assert_eq!(answer["Err"]["ErrStatus"]["code"], 403);
    let leases: Api<Lease> = Api::namespaced(cluster.admin.clone(), "kube-node-lease");
    let stored = leases.get("edge1").await.expect("the lease").spec.expect("spec");
    assert!(stored.renew_time.is_some());

    let event = |host: &str| {
        json!({"metadata": {"name": format!("web.{host}"), "namespace": "default"},
            "involvedObject": {"kind": "Pod", "namespace": "default", "name": "web"},
            "reason": "Started", "message": "started", "type": "Normal",
            "source": {"component": "kubelet", "host": host}})
    };
    for host in ["edge2", "edge1"] {
        let path = format!("default/event/web.{host}");
        link.send(Operation::Insert, &path, &event(host)).await;
    }
    // Requests are done in order, so the answer to a later one says that both events are done.
    link.ask(Operation::Query, path, &()).await;
    let events: Api<Event> = Api::namespaced(cluster.admin.clone(), "default");
    assert!(events.get_opt("web.edge1").await.expect("readable").is_some());
    assert!(events.get_opt("web.edge2").await.expect("readable").is_none());
    cluster.stop().await;
}

#[tokio::test]
async fn node_reads_what_its_pods_refer_to_and_nothing_else() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    link.register().await;
    cluster.create_config("page", "one").await;
    cluster.create_config("private", "x").await;
    cluster.create_pod("web", "edge1", "page").await;
    link.until("insert", "default/pod/web").await;
    let (operation, answer) = link.ask(Operation::Query, "default/configmap/page", &()).await;
    assert_eq!((operation.as_str(), &answer["data"]["key"]), ("response", &json!("one")));
    assert_eq!((&answer["kind"], &answer["apiVersion"]), (&json!("ConfigMap"), &json!("v1")));
    let (operation, answer) = link.ask(Operation::Query, "default/configmap/private", &()).await;
    assert_eq!(operation, "error");
    assert_eq!(answer, json!("no pod of node `edge1` refers to `default/configmap/private`"));
    let (operation, _) = link.ask(Operation::Query, "kubeedge/secret/casecret", &()).await;
    assert_eq!(operation, "error");
    let (operation, answer) =
        link.ask(Operation::Query, "default/serviceaccounttoken/default", &json!({})).await;
    assert_eq!(operation, "error");
    assert!(
        answer.as_str().is_some_and(|text| text.contains("bound to one of its pods")),
        "{answer}"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn connection_under_another_name_is_refused() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let refused = identity.open(&cluster, "edge2", Capabilities::default()).await;
    match refused.err().expect("refused") {
        WsError::Http(response) => {
            assert_eq!(response.status(), 403);
            let body = response.body().as_deref().unwrap_or_default();
            assert_eq!(
                String::from_utf8_lossy(body),
                "the client certificate is for node `edge1`, not for node `edge2`"
            );
        }
        other => panic!("{other}"),
    }
    let nobody = Identity::new("edge1");
    assert!(nobody.open(&cluster, "edge1", Capabilities::default()).await.is_err());
    cluster.stop().await;
}

#[tokio::test]
async fn message_over_the_bound_ends_the_connection_with_the_reason() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    let long = "x".repeat(UPSTREAM_LEN_MAX + 1);
    // The hub may hang up in the middle of it.
    let _ = link.socket.send(WsMessage::text(long)).await;
    assert_eq!(link.closed().await, "a message is over the bound of 3211264 bytes");
    cluster.stop().await;
}

#[tokio::test]
async fn unreadable_message_does_not_end_the_connection() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    for text in
        ["", "{", "[]", r#"{"header":1}"#, r#"{"header":{},"route":{"resource":"a/b/c/d"}}"#]
    {
        link.socket.send(WsMessage::text(text)).await.expect("sent");
    }
    link.socket.send(WsMessage::binary(vec![0xff, 0xfe])).await.expect("sent");
    assert_eq!(link.register().await["Err"], Value::Null);
    cluster.stop().await;
}

#[tokio::test]
async fn new_connection_replaces_the_old_one() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let first = identity.connect(&cluster).await;
    let mut second = identity.connect(&cluster).await;
    assert_eq!(first.closed().await, "the node opened a new connection");
    assert_eq!(second.register().await["Err"], Value::Null);
    cluster.stop().await;
}

#[tokio::test]
async fn digest_after_a_cut_and_a_restart_brings_only_differences() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let mut link = identity.connect(&cluster).await;
    link.register().await;
    for config in ["same", "changed"] {
        cluster.create_config(config, "one").await;
        cluster.create_pod(config, "edge1", config).await;
    }
    cluster.create_pod("gone", "edge1", "same").await;
    let mut digest = Digest::default();
    let node = cluster.nodes().get("edge1").await.expect("the node").metadata;
    let node =
        Held { uid: node.uid.expect("uid"), rv: node.resource_version.expect("resourceVersion") };
    digest.objects.insert("null/node/edge1".into(), node);
    while digest.objects.len() < 6 {
        let message = link.next().await;
        let is_answer = !message.header.parent_msg_id.is_empty();
        if !is_answer {
            digest.objects.extend([held(&message)]);
        }
    }
    drop(link);

    let patch = json!({"data": {"key": "two"}});
    let patch = Patch::Merge(&patch);
    cluster.configs().patch("changed", &PatchParams::default(), &patch).await.expect("patched");
    let gone = DeleteParams::default().grace_period(0);
    cluster.pods().delete("gone", &gone).await.expect("deleted");
    cluster.create_pod("new", "edge1", "same").await;
    let cluster = cluster.restart_cloud(&["127.0.0.1"]).await;

    let mut link = identity.open(&cluster, "edge1", Capabilities::OURS).await.expect("connected");
    let id = link.send(Operation::Query, digest::RESOURCE, &digest).await;
    let mut pushed = Vec::new();
    let mut answered = false;
    while pushed.len() < 3 || !answered {
        let message = link.next().await;
        if message.header.parent_msg_id == id {
            assert_eq!(message.content.get(), "\"OK\"");
            answered = true;
        } else if !message.route.resource.starts_with("skerry/") {
            pushed.push(format!("{} {}", message.route.operation, message.route.resource));
        }
    }
    pushed.sort();
    assert_eq!(
        pushed,
        ["delete default/pod/gone", "insert default/pod/new", "update default/configmap/changed"]
    );
    // From here on changes come at once.
    let label = json!({"metadata": {"labels": {"a": "b"}}});
    let patch = Patch::Merge(&label);
    cluster.pods().patch("same", &PatchParams::default(), &patch).await.expect("patched");
    let (_, before) = link.until("update", "default/pod/same").await;
    assert_eq!(before, Vec::<String>::new());
    cluster.stop().await;
}

#[tokio::test]
async fn unacknowledged_push_comes_again_with_the_same_id() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    link.register().await;
    cluster.create_config("page", "one").await;
    cluster.create_pod("web", "edge1", "page").await;
    let first = link.next_unacknowledged().await;
    let second = link.next_unacknowledged().await;
    assert_ne!(first.header.msg_id, second.header.msg_id, "both are in the window");
    let mut again = Vec::new();
    while again.len() < 2 {
        let message = link.next_unacknowledged().await;
        again.push(message.header.msg_id);
    }
    again.sort();
    let mut both = [first.header.msg_id, second.header.msg_id];
    both.sort();
    assert_eq!(again, both);
    cluster.stop().await;
}

#[tokio::test]
async fn mirror_pods_may_be_created_and_other_pods_not() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    link.register().await;
    let pod = |name: &str, annotations: Value, node: &str| {
        json!({"metadata": {"name": name, "namespace": "default", "annotations": annotations},
            "spec": {"nodeName": node, "containers": [{"name": "c", "image": "busybox"}]}})
    };
    let mirror =
        json!({"kubernetes.io/config.mirror": "hash", "kubernetes.io/config.hash": "hash"});
    let plain = pod("plain", json!({}), "edge1");
    let (_, answer) = link.ask(Operation::Insert, "default/pod/plain", &plain).await;
    assert_eq!(answer["Err"]["ErrStatus"]["message"], "a node may create mirror pods only");
    let foreign = pod("foreign", mirror.clone(), "edge2");
    let (_, answer) = link.ask(Operation::Insert, "default/pod/foreign", &foreign).await;
    assert_eq!(answer["Err"]["ErrStatus"]["code"], 403);
    // What the API says is passed on as it is; the embedded one lets CloudCore create no pods.
    let static_pod = pod("static-edge1", mirror, "edge1");
    let (_, answer) = link.ask(Operation::Insert, "default/pod/static-edge1", &static_pod).await;
    let created = cluster.pods().get_opt("static-edge1").await.expect("readable").is_some();
    assert_eq!(answer["Err"].is_null(), created, "{answer}");
    cluster.stop().await;
}

#[tokio::test]
async fn secrets_of_pods_go_to_the_node() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    link.register().await;
    let secret = from(json!({"metadata": {"name": "pw"}, "data": {"key": "czNjcmV0"}}));
    cluster.secrets("default").create(&PostParams::default(), &secret).await.expect("created");
    let pod = from(json!({"metadata": {"name": "web"}, "spec": {"nodeName": "edge1",
        "containers": [{"name": "c", "image": "busybox"}],
        "volumes": [{"name": "v", "secret": {"secretName": "pw"}}]}}));
    cluster.pods().create(&PostParams::default(), &pod).await.expect("created");
    let (push, _) = link.until("update", "default/secret/pw").await;
    let object: Value = push.content_as().expect("an object");
    assert_eq!(object["data"]["key"], "czNjcmV0");
    cluster.stop().await;
}
