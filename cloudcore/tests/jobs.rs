//! Node jobs and rules of the router: from the embedded API over a real session to the node and back.

mod support;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use skerry_cloudcore::RouterConfig;
use skerry_protocol::bus::{Call, CallResult};
use skerry_protocol::capability::Capabilities;
use skerry_protocol::job::TaskRequest;
use skerry_protocol::{Message, Operation};
use std::convert::Infallible;
use std::net::SocketAddr;
use support::{ANY, Cluster, Identity, Link};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

const JOBS: &str = "/apis/operations.kubeedge.io/v1alpha2";
const RULES: &str = "/apis/rules.kubeedge.io/v1";

/// A node that is ready, as an edge with this version of its kubelet would be.
async fn ready(cluster: &Cluster, name: &str, version: &str, receipts: bool) -> Link {
    let identity = cluster.enrolled(name).await;
    let capabilities = Capabilities { receipts, ..Capabilities::default() };
    let mut link = identity.open(cluster, name, capabilities).await.expect("connected");
    link.register().await;
    let status = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}],
        "nodeInfo": {"kubeletVersion": version}}});
    let place = format!("/api/v1/nodes/{name}/status");
    assert_eq!(cluster.admin_request("PATCH", &place, Some(&status)).await.0, 200);
    link
}

/// The next message of a group.
async fn next_of(link: &mut Link, group: &str) -> Message {
    loop {
        let message = link.next().await;
        if message.route.group == group {
            return message;
        }
    }
}

async fn create_job(cluster: &Cluster, kind: &str, plural: &str, spec: Value) -> String {
    let place = format!("{JOBS}/{plural}");
    cluster.read_until(&place, |_| true).await;
    let job = json!({"apiVersion": "operations.kubeedge.io/v1alpha2", "kind": kind,
        "metadata": {"name": "j"}, "spec": spec});
    cluster.create(&place, &job).await;
    format!("{place}/j")
}

fn report(action: &str, succ: bool, extend: &str) -> Value {
    json!({"action": action, "succ": succ, "finishTime": "2026-01-01T00:00:00Z", "reason": "why", "extend": extend})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pre_pull_goes_to_the_nodes_that_it_selects_and_ends_with_their_reports() {
    let cluster = Cluster::start().await;
    let mut first = ready(&cluster, "edge1", "v1.32.10-kubeedge-v1.23.0", true).await;
    let mut second = ready(&cluster, "edge2", "v1.32.10-skerry-0.1.0", true).await;
    let secret = json!({"metadata": {"name": "pull", "namespace": "default"}, "type": "Opaque", "stringData": {"a": "b"}});
    cluster.create("/api/v1/namespaces/default/secrets", &secret).await;
    assert!(first.refused(Operation::Query, "default/secret/pull", &()).await.contains("no pod"));
    let spec = json!({"imagePrePullTemplate": {"images": ["a:1"], "labelSelector": {"matchLabels": {
        "node-role.kubernetes.io/edge": ""}}, "imageSecrets": "default/pull"}});
    let place = create_job(&cluster, "ImagePrePullJob", "imageprepulljobs", spec.clone()).await;

    // One after the other: the job allows no more.
    let order = next_of(&mut first, "taskmanager").await;
    assert_eq!(order.route.source, "taskmanager");
    assert_eq!(order.route.operation, "Check");
    let resource = "operations.kubeedge.io/v1alpha2/imageprepulljob/j/node/edge1";
    assert_eq!(order.route.resource, resource);
    assert_eq!(order.content_as::<Value>().expect("json"), spec);
    let stored = cluster.read_until(&place, |job| job["status"]["phase"] == "InProgress").await;
    assert_eq!(stored["status"]["nodeStatus"][1], json!({"nodeName": "edge2", "phase": "Pending"}));
    // While it works, it may read the job's secret.
    let secret = first.must(Operation::Query, "default/secret/pull", &()).await;
    assert_eq!(secret["kind"], "Secret");
    assert!(second.refused(Operation::Query, "default/secret/pull", &()).await.contains("no pod"));

    let send = Operation::UpdateNodeActionStatus;
    first.must(send, resource, &report("Check", true, "")).await;
    let images = r#"[{"image":"a:1","status":"True"}]"#;
    first.must(send, resource, &report("Pull", true, images)).await;
    let order = next_of(&mut second, "taskmanager").await;
    let resource = "operations.kubeedge.io/v1alpha2/imageprepulljob/j/node/edge2";
    assert_eq!(order.route.resource, resource);
    second.must(send, resource, &report("Check", true, "")).await;
    second.must(send, resource, &report("Pull", false, images)).await;
    let stored = cluster.read_until(&place, |job| job["status"]["phase"] == "Failure").await;
    let status = &stored["status"];
    assert!(status["reason"].as_str().is_some_and(|why| why.starts_with("1 of 2")), "{status}");
    assert_eq!(status["nodeStatus"][0]["phase"], "Successful");
    assert_eq!(status["nodeStatus"][0]["imageStatus"], json!([{"image": "a:1", "status": "True"}]));
    assert_eq!(status["nodeStatus"][1]["phase"], "Failure");
    assert!(first.refused(Operation::Query, "default/secret/pull", &()).await.contains("no pod"));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_told_again_on_its_next_link_and_after_a_restart_of_cloudcore() {
    let cluster = Cluster::start().await;
    let mut link = ready(&cluster, "edge1", "v1.32.10-kubeedge-v1.23.0", false).await;
    let spec = json!({"updateFields": {"modules.edgeHub.heartbeat": "20"}, "nodeNames": ["edge1"]});
    let place = create_job(&cluster, "ConfigUpdateJob", "configupdatejobs", spec).await;
    let order = next_of(&mut link, "taskmanager").await;
    assert_eq!(
        order.route.resource,
        "operations.kubeedge.io/v1alpha2/configupdatejob/j/node/edge1"
    );
    drop(link);
    let identity = cluster.enrolled("edge1").await;
    let mut link =
        identity.open(&cluster, "edge1", Capabilities::default()).await.expect("connected");
    let again = next_of(&mut link, "taskmanager").await;
    assert_eq!(again.content.get(), order.content.get());
    let cluster = cluster.restart_cloud(&["127.0.0.1"]).await;
    let mut link =
        identity.open(&cluster, "edge1", Capabilities::default()).await.expect("connected");
    next_of(&mut link, "taskmanager").await;
    // Once it has begun it is not begun again.
    link.send(Operation::UpdateNodeActionStatus, &order.route.resource, &report("Check", true, ""))
        .await;
    cluster
        .read_until(&place, |job| {
            job["status"]["nodeStatus"][0]["actionFlow"][0]["action"] == "Check"
        })
        .await;
    for action in ["BackUp", "Update"] {
        link.send(
            Operation::UpdateNodeActionStatus,
            &order.route.resource,
            &report(action, true, ""),
        )
        .await;
    }
    cluster.read_until(&place, |job| job["status"]["phase"] == "Completed").await;
    cluster.remove(&place).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_edge_is_told_stage_by_stage() {
    let cluster = Cluster::start().await;
    let mut link = ready(&cluster, "edge1", "v1.29.6-kubeedge-v1.20.0", false).await;
    let spec = json!({"imagePrePullTemplate": {"images": ["a:1"], "nodeNames": ["edge1"], "checkItems": ["disk"]}});
    let place = create_job(&cluster, "ImagePrePullJob", "imageprepulljobs", spec).await;
    let images = r#"[{"image":"a:1","state":"Successful"}]"#;
    let mut told: Vec<String> = Vec::new();
    for (state, event, message) in
        [("Init", "Init", ""), ("Checking", "Check", ""), ("Pulling", "Pull", images)]
    {
        let mut stage = next_of(&mut link, "taskmanager").await;
        // A stage is told again until the node's report has come, and what is told again may overtake the next one.
        while told.contains(&stage.content_as::<TaskRequest>().expect("a stage").state) {
            stage = next_of(&mut link, "taskmanager").await;
        }
        told.push(state.to_owned());
        assert_eq!(
            (stage.route.operation.as_str(), stage.route.resource.as_str()),
            ("prepull", "prepull/j/node/edge1")
        );
        let request: TaskRequest = stage.content_as().expect("a stage");
        assert_eq!((request.state.as_str(), request.task_id.as_str()), (state, "j"));
        let done = json!({"NodeName": "edge1", "State": "", "Event": event, "Action": "Success", "Reason": "",
            "Time": "", "ExternalMessage": message});
        link.send(Operation::Prepull, "task/j/node/edge1", &done).await;
    }
    let stored = cluster.read_until(&place, |job| job["status"]["phase"] == "Completed").await;
    let task = &stored["status"]["nodeStatus"][0];
    assert_eq!(task["imageStatus"], json!([{"image": "a:1", "status": "True"}]));
    assert_eq!(task["actionFlow"].as_array().map(Vec::len), Some(2));
    cluster.stop().await;
}

async fn create_rule(
    cluster: &Cluster,
    name: &str,
    source: (&str, &str, Value),
    target: (&str, &str, Value),
) {
    for (kind, port) in [(source.0, source.1), (target.0, target.1)] {
        let place = format!("{RULES}/namespaces/default/ruleendpoints");
        cluster.read_until(&place, |_| true).await;
        let mut spec = json!({"ruleEndpointType": kind});
        if !port.is_empty() {
            spec["properties"] = json!({"service_port": port});
        }
        let endpoint = json!({"apiVersion": "rules.kubeedge.io/v1", "kind": "RuleEndpoint",
            "metadata": {"name": kind}, "spec": spec});
        let (status, answer) = cluster.admin_request("POST", &place, Some(&endpoint)).await;
        assert!(status == 200 || status == 409, "{answer}");
    }
    let rule = json!({"apiVersion": "rules.kubeedge.io/v1", "kind": "Rule", "metadata": {"name": name}, "spec": {
        "source": source.0, "sourceResource": source.2, "target": target.0, "targetResource": target.2}});
    cluster.create(&format!("{RULES}/namespaces/default/rules"), &rule).await;
}

/// One request to the router, until a rule takes it.
async fn ask(address: SocketAddr, method: &str, path: &str, body: &'static str) -> (u16, String) {
    loop {
        let stream = TcpStream::connect(address).await.expect("it listens");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
        tokio::spawn(connection);
        let request = http::Request::builder().method(method).uri(path).header("host", "router");
        let request = request.body(Full::<Bytes>::from(body)).expect("a request");
        let response = sender.send_request(request).await.expect("an answer");
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.expect("a body").to_bytes();
        let text = String::from_utf8(body.to_vec()).expect("a text");
        // The watch of the rules is not there yet.
        if status == 404 && text.contains("no rule") {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            continue;
        }
        return (status, text);
    }
}

/// An HTTP server that says yes and gives on what it gets: path, node and body.
async fn sink() -> (SocketAddr, mpsc::Receiver<(String, String, String)>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let (sender, received) = mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let sender = sender.clone();
            let service =
                hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                    let sender = sender.clone();
                    async move {
                        let path = request.uri().path().to_owned();
                        let node =
                            request.headers().get("NodeName").and_then(|node| node.to_str().ok());
                        let node = node.unwrap_or_default().to_owned();
                        let body = request.into_body().collect().await.expect("a body").to_bytes();
                        let body = String::from_utf8_lossy(&body).into_owned();
                        sender.send((path, node, body)).await.expect("the test listens");
                        Ok::<_, Infallible>(http::Response::new(Full::<Bytes>::from("taken")))
                    }
                });
            tokio::spawn(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    (address, received)
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_join_http_in_the_cloud_to_the_buses_of_a_node() {
    let cluster = Cluster::start_with(|config| {
        config.router = Some(RouterConfig { listen: ANY.into(), open: true })
    })
    .await;
    let address = cluster.cloud.router_addr().expect("the router is on");
    let mut link = ready(&cluster, "edge1", "v1.32.10-kubeedge-v1.23.0", false).await;
    let (server, mut received) = sink().await;

    // HTTP to the event bus.
    create_rule(
        &cluster,
        "down",
        ("rest", "", json!({"path": "/lamp"})),
        ("eventbus", "", json!({"topic": "/lamp/set"})),
    )
    .await;
    assert_eq!(
        ask(address, "POST", "/edge1/default/lamp/red", "on").await,
        (200, "message delivered".into())
    );
    let message = next_of(&mut link, "user").await;
    let route = &message.route;
    assert_eq!(
        [&route.source, &route.operation, &route.resource],
        ["router_eventbus", "publish", "/lamp/set/red"]
    );
    assert_eq!(message.content_as::<String>().expect("a text"), "on");
    assert_eq!(ask(address, "POST", "/none/default/lamp", "on").await.0, 500);

    // HTTP to the service bus, and its answer back.
    create_rule(
        &cluster,
        "call",
        ("rest", "", json!({"path": "/door"})),
        ("servicebus", "8080", json!({"path": "/open"})),
    )
    .await;
    let asked =
        tokio::spawn(async move { ask(address, "PUT", "/edge1/default/door?x=1", "{}").await });
    let message = next_of(&mut link, "user").await;
    assert_eq!(
        (message.route.operation.as_str(), message.route.resource.as_str()),
        ("PUT", "8080:/open?x=1")
    );
    let call: Call = message.content_as().expect("a call");
    assert_eq!((call.method.as_str(), call.body.as_slice()), ("PUT", b"{}".as_slice()));
    let result = CallResult { status_code: 202, body: b"opened".to_vec(), ..CallResult::default() };
    link.write(&skerry_protocol::bus::result(5, &message, &result)).await;
    assert_eq!(asked.await.expect("no panic"), (202, "opened".into()));

    // The event bus to HTTP.
    let url = format!("http://{server}/up");
    create_rule(
        &cluster,
        "up",
        ("eventbus", "", json!({"topic": "lamp/state", "node_name": "edge1"})),
        ("rest", "", json!({"resource": url})),
    )
    .await;
    let message = next_of(&mut link, "user").await;
    assert_eq!(
        (message.route.operation.as_str(), message.route.resource.as_str()),
        ("subscribe", "default/lamp/state")
    );
    link.write(&Message::new(5, "bus", "user", Operation::Upload, "default/lamp/state", "off"))
        .await;
    assert_eq!(
        received.recv().await.expect("a request"),
        ("/up".into(), "edge1".into(), "off".into())
    );
    let place = format!("{RULES}/namespaces/default/rules/up");
    cluster.read_until(&place, |rule| rule["status"]["successMessages"] == 1).await;

    // The service bus to HTTP, with an answer.
    let url = format!("http://{server}/calls");
    let calls = json!({"target_url": "http://cloud/a", "node_name": "edge1"});
    create_rule(
        &cluster,
        "calls",
        ("servicebus", "8080", calls),
        ("rest", "", json!({"resource": url})),
    )
    .await;
    let message = next_of(&mut link, "user").await;
    assert_eq!(
        (message.route.operation.as_str(), message.route.resource.as_str()),
        ("start", "http://cloud/a")
    );
    // Go writes bytes as base64.
    let upload = Message::new(5, "servicebus", "user", Operation::Upload, "http://cloud/a", "aGk=");
    let answer = link.ask_message(&upload).await;
    assert_eq!(
        (answer.route.group.as_str(), answer.route.operation.as_str()),
        ("user", "response")
    );
    assert_eq!(answer.content_as::<String>().expect("a text"), "taken");
    assert_eq!(received.recv().await.expect("a request").2, "hi");

    // Without a rule it is an error, and a rule that goes is told.
    let upload = Message::new(5, "bus", "user", Operation::Upload, "default/none", "x");
    let answer = link.ask_message(&upload).await;
    assert!(answer.content_as::<String>().expect("a text").contains("no rule takes"));
    cluster.remove(&place).await;
    let message = next_of(&mut link, "user").await;
    assert_eq!(
        (message.route.operation.as_str(), message.route.resource.as_str()),
        ("unsubscribe", "default/lamp/state")
    );

    // A new link is told again what is followed.
    drop(link);
    let identity = cluster.enrolled("edge1").await;
    let mut link =
        identity.open(&cluster, "edge1", Capabilities::default()).await.expect("connected");
    let message = next_of(&mut link, "user").await;
    assert_eq!(
        (message.route.operation.as_str(), message.route.resource.as_str()),
        ("start", "http://cloud/a")
    );
    cluster.stop().await;
}

/// One request over TLS, with a token or without, until a rule takes it.
async fn ask_tls(
    cluster: &Cluster,
    address: SocketAddr,
    token: Option<&str>,
    path: &str,
) -> (u16, String) {
    loop {
        let stream = Identity::new("nobody").tls(cluster.ca().await, address).await.expect("TLS");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
        tokio::spawn(connection);
        let mut request = http::Request::put(path).header("host", "router").header("x-own", "1");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(Full::<Bytes>::from("{}")).expect("a request");
        let response = sender.send_request(request).await.expect("an answer");
        let status = response.status().as_u16();
        assert_eq!(status == 401, response.headers().contains_key("www-authenticate"));
        let body = response.into_body().collect().await.expect("a body").to_bytes();
        let text = String::from_utf8(body.to_vec()).expect("a text");
        if status == 404 && text.contains("no rule") {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            continue;
        }
        return (status, text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn router_takes_requests_over_tls_from_those_whom_the_cluster_lets_and_keeps_their_tokens() {
    let router = RouterConfig { listen: ANY.into(), open: false };
    let cluster = Cluster::start_with(|config| config.router = Some(router)).await;
    let address = cluster.cloud.router_addr().expect("the router is on");
    let mut link = ready(&cluster, "edge1", "v1.32.10-kubeedge-v1.23.0", false).await;
    create_rule(
        &cluster,
        "call",
        ("rest", "", json!({"path": "/door"})),
        ("servicebus", "8080", json!({"path": "/open"})),
    )
    .await;
    let path = "/edge1/default/door";
    let token = |user: &str, group: &str| cluster.api.token(user, &[group]).expect("a token");
    let (ann, bob) = (token("ann", "system:masters"), token("bob", "skerry:viewer"));

    assert_eq!(ask_tls(&cluster, address, None, path).await.0, 401);
    assert_eq!(ask_tls(&cluster, address, Some("invented"), path).await.0, 401);
    let (status, text) = ask_tls(&cluster, address, Some(&bob), path).await;
    assert_eq!(status, 403);
    assert_eq!(text, "`bob` may not create `rules/messages` named `call` in namespace `default`");
    let plain = TcpStream::connect(address).await.expect("it listens");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(plain)).await.expect("no bytes yet");
    tokio::spawn(connection);
    let request = http::Request::get(path).header("host", "router");
    let request = request.body(Full::<Bytes>::default()).expect("a request");
    assert!(sender.send_request(request).await.is_err(), "nothing is taken without TLS");

    let asked = ask_tls(&cluster, address, Some(&ann), path);
    let answering = async {
        let message = next_of(&mut link, "user").await;
        let call: Call = message.content_as().expect("a call");
        let result =
            CallResult { status_code: 200, body: b"open".to_vec(), ..CallResult::default() };
        link.write(&skerry_protocol::bus::result(5, &message, &result)).await;
        call
    };
    let (answer, call) = tokio::join!(asked, answering);
    assert_eq!(answer, (200, "open".into()));
    assert!(call.header.contains_key("x-own"), "{:?}", call.header);
    assert!(!call.header.contains_key("authorization"), "a node gets no token of the cluster");
    cluster.stop().await;
}
