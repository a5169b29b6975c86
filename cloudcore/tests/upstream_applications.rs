//! What applications on a node ask for through it, against the embedded API.

mod support;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use skerry_protocol::{Message, Operation};
use std::collections::BTreeMap;
use support::{Cluster, Link};

fn application(id: &str, verb: &str, key: &str, option: &Value) -> Value {
    json!({"ID": id, "Key": key, "Verb": verb, "Nodename": "someone-else", "Option": STANDARD.encode(option.to_string()),
        "ReqBody": null, "Subresource": "", "RespBody": null, "Status": "InApplying", "Reason": "",
        "Error": {"ErrStatus": {"metadata": {}}}, "Timestamp": "0001-01-01T00:00:00Z"})
}

async fn ask(link: &mut Link, application: &Value) -> Value {
    let request = Message::new(
        0,
        "metaserver",
        "dynamiccontroller",
        Operation::Application,
        "null",
        application,
    );
    let answer = link.ask_message(&request).await;
    let route = &answer.route;
    assert_eq!(
        [&route.source, &route.group, &route.operation, &route.resource],
        ["dynamiccontroller", "resource", "applicationResponse", "ignore/Application/ignore"]
    );
    answer.content_as().expect("json")
}

fn body(answer: &Value) -> Value {
    assert_eq!(answer["Status"], "Approved", "{answer}");
    let body = STANDARD.decode(answer["RespBody"].as_str().expect("a body")).expect("base64");
    serde_json::from_slice(&body).expect("json")
}

fn rejected(answer: &Value) -> &Value {
    assert_eq!(answer["Status"], "Rejected", "{answer}");
    &answer["Error"]["ErrStatus"]
}

async fn node_with_pod(cluster: &Cluster) -> Link {
    let mut link = cluster.enrolled("edge1").await.connect(cluster).await;
    link.register().await;
    cluster.create_config("used", "v").await;
    cluster.create_pod("web", "edge1", "used").await;
    link.until("insert", "default/pod/web").await;
    link
}

fn service(name: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": {"ports": [{"port": 80}]}})
}

const SERVICES: &str = "/api/v1/namespaces/default/services";

#[tokio::test(flavor = "multi_thread")]
async fn applications_read_what_is_near_the_nodes_pods() {
    let cluster = Cluster::start().await;
    let mut link = node_with_pod(&cluster).await;
    cluster.create(SERVICES, &service("web")).await;
    let none = json!({});
    let got =
        ask(&mut link, &application("1", "get", "/core/v1/services/default/web", &none)).await;
    assert_eq!((&got["ID"], &got["Nodename"]), (&json!("1"), &json!("edge1")));
    assert_eq!(got["Error"], json!({"ErrStatus": {"metadata": {}}}));
    assert_eq!(body(&got)["metadata"]["name"], "web");
    let option = json!({"labelSelector": "app in (web)", "limit": 500});
    let listed = body(
        &ask(&mut link, &application("2", "list", "/core/v1/services/null/null", &option)).await,
    );
    assert_eq!(listed["kind"], "ServiceList");
    let items = listed["items"].as_array().expect("items");
    assert_eq!(
        (items.len(), &items[0]["kind"], &items[0]["apiVersion"]),
        (1, &json!("Service"), &json!("v1"))
    );
    assert_eq!(items[0]["metadata"]["managedFields"], Value::Null);

    let missing =
        ask(&mut link, &application("3", "get", "/core/v1/services/default/none", &none)).await;
    assert_eq!(
        (&rejected(&missing)["reason"], &rejected(&missing)["code"]),
        (&json!("NotFound"), &json!(404))
    );
    for (verb, key) in [
        ("list", "/core/v1/secrets/default/null"),
        ("get", "/core/v1/secrets/default/x"),
        ("list", "/core/v1/pods/null/null"),
        ("get", "/core/v1/configmaps/kube-system/x"),
        ("delete", "/core/v1/pods/default/web"),
        ("create", "/core/v1/pods/default/null"),
        ("patch", "/core/v1/pods/default/web"),
    ] {
        let answer = ask(&mut link, &application("4", verb, key, &none)).await;
        assert_eq!(rejected(&answer)["reason"], "Forbidden", "{verb} {key}: {answer}");
    }
    for (verb, key) in [("get", "/core/v1/pods/../x"), ("get", "nonsense"), ("list", "/core/v1")] {
        let answer = ask(&mut link, &application("5", verb, key, &none)).await;
        assert_eq!(rejected(&answer)["reason"], "BadRequest", "{verb} {key}: {answer}");
    }
    let verb =
        ask(&mut link, &application("5", "dance", "/core/v1/services/default/web", &none)).await;
    assert_eq!(verb["Status"], "Rejected");
    let mine = json!({"fieldSelector": "spec.nodeName=edge1"});
    let pods =
        body(&ask(&mut link, &application("6", "list", "/core/v1/pods/null/null", &mine)).await);
    assert_eq!(pods["items"].as_array().map(Vec::len), Some(1));
    let discovery = body(&ask(&mut link, &application("7", "get", "/api/v1", &Value::Null)).await);
    assert_eq!(discovery["kind"], "APIResourceList");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watched_objects_are_pushed_until_the_watch_is_given_up() {
    let cluster = Cluster::start().await;
    let mut link = node_with_pod(&cluster).await;
    cluster.create(SERVICES, &service("old")).await;
    cluster.create(SERVICES, &service("other")).await;
    let option = json!({"labelSelector": "app in (old,new)"});
    let watch = application("w1", "watch", "/core/v1/services/default/null", &option);
    let answer = ask(&mut link, &watch).await;
    assert_eq!((&answer["Status"], &answer["RespBody"]), (&json!("Approved"), &Value::Null));
    let (pushed, _) = link.until("insert", "default/service/old").await;
    assert_eq!(pushed.route.source, "dynamiccontroller");
    assert!(!pushed.header.resourceversion.is_empty());
    let object: Value = pushed.content_as().expect("json");
    assert_eq!((&object["kind"], &object["apiVersion"]), (&json!("Service"), &json!("v1")));
    cluster.create(SERVICES, &service("new")).await;
    let (_, before) = link.until("insert", "default/service/new").await;
    assert!(!before.iter().any(|line| line.contains("other")), "{before:?}");
    let labels = json!({"metadata": {"labels": {"x": "y"}}});
    let (status, _) =
        cluster.admin_request("PATCH", &format!("{SERVICES}/new"), Some(&labels)).await;
    assert_eq!(status, 200);
    link.until("update", "default/service/new").await;
    cluster.remove(&format!("{SERVICES}/new")).await;
    link.until("delete", "default/service/new").await;

    // The list of all watches: this one goes, a new one comes, and one that cannot be is named.
    let mut all = BTreeMap::new();
    all.insert("w2", application("w2", "watch", "/core/v1/nodes/null/null", &json!({})));
    all.insert("w3", application("w3", "watch", "/core/v1/secrets/default/null", &json!({})));
    all.insert("w4", application("w4", "watch", "/core/v1/nonsense/default/null", &json!({})));
    let request = Message::new(
        0,
        "metaserver",
        "dynamiccontroller",
        Operation::Application,
        "watchapp/sync",
        &all,
    );
    let answer = link.ask_message(&request).await;
    assert_eq!(
        (answer.route.operation.as_str(), answer.route.resource.as_str()),
        ("applicationResponse", "watchapp/sync")
    );
    let failed: BTreeMap<String, Value> = answer.content_as().expect("json");
    assert_eq!(failed.keys().collect::<Vec<_>>(), ["w3", "w4"]);
    assert_eq!(rejected(&failed["w3"])["reason"], "Forbidden");
    assert_eq!(rejected(&failed["w4"])["reason"], "NotFound");
    cluster.create(SERVICES, &service("new")).await;
    cluster.create("/api/v1/nodes", &json!({"metadata": {"name": "elsewhere"}})).await;
    let (_, before) = link.until("insert", "null/node/elsewhere").await;
    assert!(!before.iter().any(|line| line.contains("service")), "{before:?}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_comes_back_is_told_what_changed_meanwhile() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let mut link = identity.connect(&cluster).await;
    link.register().await;
    for name in ["stays", "goes"] {
        cluster.create(SERVICES, &service(name)).await;
    }
    let watch = application("w", "watch", "/core/v1/services/null/null", &json!({}));
    assert_eq!(ask(&mut link, &watch).await["Status"], "Approved");
    let mut seen = Vec::new();
    while !["stays", "goes"].iter().all(|name| seen.contains(&format!("default/service/{name}"))) {
        seen.push(link.next().await.route.resource);
    }
    drop(link);
    cluster.links_until(<[_]>::is_empty).await;
    cluster.remove(&format!("{SERVICES}/goes")).await;
    cluster.create(SERVICES, &service("comes")).await;
    let mut link = identity.connect(&cluster).await;
    let mut left = vec!["delete default/service/goes", "insert default/service/comes"];
    while !left.is_empty() {
        let route = link.next().await.route;
        let line = format!("{} {}", route.operation, route.resource);
        left.retain(|wanted| *wanted != line);
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_of_a_ranged_service_are_those_of_the_nodes_group() {
    let cluster = Cluster::start().await;
    let mut link = node_with_pod(&cluster).await;
    let group =
        |name: &str| json!({"metadata": {"labels": {"apps.kubeedge.io/belonging-to": name}}});
    assert_eq!(
        cluster.admin_request("PATCH", "/api/v1/nodes/edge1", Some(&group("a"))).await.0,
        200
    );
    for (node, name) in [("edge2", "a"), ("edge3", "b")] {
        let mut node = json!({"metadata": {"name": node}});
        node["metadata"]["labels"] = group(name)["metadata"]["labels"].clone();
        cluster.create("/api/v1/nodes", &node).await;
    }
    let mut web = service("web");
    web["metadata"]["annotations"] =
        json!({"apps.kubeedge.io/service-topology": "range-nodegroup"});
    cluster.create(SERVICES, &web).await;
    let endpoint = |address: &str, node: &str| json!({"addresses": [address], "nodeName": node});
    let slice = json!({"metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"port": 80}],
        "endpoints": [endpoint("10.0.0.2", "edge2"), endpoint("10.0.0.3", "edge3")]});
    cluster.create("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", &slice).await;
    let near = json!([endpoint("10.0.0.2", "edge2")]);
    let none = json!({});
    let key = "/discovery.k8s.io/v1/endpointslices/default";
    let got = body(&ask(&mut link, &application("1", "get", &format!("{key}/web-1"), &none)).await);
    assert_eq!(got["endpoints"], near);
    let listed =
        body(&ask(&mut link, &application("2", "list", &format!("{key}/null"), &none)).await);
    assert_eq!(listed["items"][0]["endpoints"], near);
    let watch = application("3", "watch", "/discovery.k8s.io/v1/endpointslices/null/null", &none);
    let watched = ask(&mut link, &watch).await;
    assert_eq!(watched["Status"], "Approved", "{watched}");
    let (message, _) = link.until("insert", "default/endpointslice/web-1").await;
    assert_eq!(message.content_as::<Value>().expect("json")["endpoints"], near);
    cluster.stop().await;
}
