//! What nodes report about devices and jobs, against the embedded API.

mod support;

use http_body_util::Full;
use serde_json::{Value, json};
use skerry_protocol::capability::Capabilities;
use skerry_protocol::{Message, Operation};
use support::{Cluster, Identity, Link, fetch};

const DEVICES: &str = "/apis/devices.kubeedge.io/v1beta1/namespaces/default";
const JOBS: &str = "/apis/operations.kubeedge.io";

async fn connected(cluster: &Cluster, node: &str, receipts: bool) -> Link {
    cluster.install_kubeedge_kinds().await;
    let identity = cluster.enrolled(node).await;
    let capabilities = Capabilities { receipts, ..Capabilities::default() };
    let mut link = identity.open(cluster, node, capabilities).await.expect("connected");
    link.register().await;
    link
}

async fn create_device(cluster: &Cluster, name: &str, node: &str) -> Value {
    let device = json!({"apiVersion": "devices.kubeedge.io/v1beta1", "kind": "Device", "metadata": {"name": name},
        "spec": {"nodeName": node, "properties": [{"name": "temperature"}]}});
    cluster.create(&format!("{DEVICES}/devices"), &device).await
}

#[tokio::test(flavor = "multi_thread")]
async fn reports_about_devices_reach_their_status() {
    let cluster = Cluster::start().await;
    let mut link = connected(&cluster, "edge1", true).await;
    let device = create_device(&cluster, "fridge", "edge1").await;
    create_device(&cluster, "foreign", "edge2").await;
    let twin = |value: &str| {
        json!({"event_id": "e", "timestamp": 1, "twin": {"temperature": {
        "actual": {"value": value, "metadata": {"timestamp": 7}}, "metadata": {"type": "float"}}}})
    };
    let report = |resource: &str, content: &Value| {
        Message::new(0, "twin", "resource", Operation::Update, resource, content)
    };
    for value in ["5.1", "5.2"] {
        let answer = link
            .ask_message(&report("device/default/fridge/twin/edge_updated", &twin(value)))
            .await;
        let route = &answer.route;
        assert_eq!(
            [&route.source, &route.group, &route.operation, &route.resource],
            ["devicecontroller", "twin", "response", "twin"]
        );
        assert_eq!(answer.content.get(), "\"OK\"");
    }
    // State comes as JSON in a string.
    let state =
        json!({"event_id": "e", "device": {"state": "online", "lastOnlineTime": "t"}}).to_string();
    let request = Message::new(
        0,
        "twin",
        "resource",
        Operation::Update,
        "device/default/fridge/state/update",
        &state,
    );
    assert_eq!(link.ask_message(&request).await.content.get(), "\"OK\"");
    let stored = cluster.read(&format!("{DEVICES}/devicestatuses/fridge")).await.expect("made");
    assert_eq!(
        stored["status"],
        json!({"state": "online", "lastOnlineTime": "t", "twins": [{"propertyName": "temperature",
            "reported": {"value": "5.2", "metadata": {"timestamp": "7", "type": "float"}}}]})
    );
    assert_eq!(stored["metadata"]["ownerReferences"][0]["uid"], device["metadata"]["uid"]);

    for (name, code) in [("foreign", 403), ("none", 404)] {
        let resource = format!("device/default/{name}/twin/edge_updated");
        let answer = link.ask_message(&report(&resource, &twin("1"))).await;
        let content: Value = answer.content_as().expect("json");
        assert_eq!(content["ErrStatus"]["code"], code, "{content}");
    }
    assert_eq!(cluster.read(&format!("{DEVICES}/devicestatuses/foreign")).await, None);
    cluster.stop().await;
}

async fn begun_in_the_older_form(admin: &kube::Client, place: &str, job: &Value, state: &str) {
    let send = async |method: &str, path: &str, content_type: &str, body: &Value| {
        let request = http::Request::builder().method(method).uri(path);
        let request =
            request.header("content-type", content_type).body(body.to_string().into_bytes());
        admin.request::<Value>(request.expect("a request")).await.expect("done")
    };
    send("POST", place, "application/json", job).await;
    let status =
        json!({"status": {"state": state, "nodeStatus": [{"nodeName": "edge1", "state": state}]}});
    let name = job["metadata"]["name"].as_str().expect("a name");
    send("PATCH", &format!("{place}/{name}/status"), "application/merge-patch+json", &status).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reports_about_jobs_reach_the_nodes_part_of_them() {
    let cluster = Cluster::start().await;
    let mut link = connected(&cluster, "edge1", true).await;
    let kind = |version: &str, kind: &str, name: &str| json!({"apiVersion": format!("operations.kubeedge.io/{version}"), "kind": kind, "metadata": {"name": name}, "spec": {}});
    let status = |path: String, status: Value| {
        let cluster = &cluster;
        async move {
            let (code, answer) = cluster
                .admin_request("PATCH", &format!("{path}/status"), Some(&json!({"status": status})))
                .await;
            assert_eq!(code, 200, "{answer}");
        }
    };
    let pulls = format!("{JOBS}/v1alpha2/imageprepulljobs");
    cluster.create(&pulls, &kind("v1alpha2", "ImagePrePullJob", "pull")).await;
    status(format!("{pulls}/pull"), json!({"phase": "InProgress", "nodeStatus": [{"nodeName": "edge2"}, {"nodeName": "edge1", "phase": "Pending"}]})).await;
    let report = |action: &str, extend: &str| json!({"action": action, "succ": true, "finishTime": "2026-01-01T00:00:00Z", "reason": "", "extend": extend});
    let of =
        |node: &str| format!("operations.kubeedge.io/v1alpha2/imageprepulljob/pull/node/{node}");
    let send = Operation::UpdateNodeActionStatus;
    assert_eq!(link.must(send, &of("edge1"), &report("Check", "")).await, "OK");
    let images = r#"[{"image":"a","status":"True"}]"#;
    assert_eq!(link.must(send, &of("edge1"), &report("Pull", images)).await, "OK");
    let stored = cluster.read(&format!("{pulls}/pull")).await.expect("there");
    let task = &stored["status"]["nodeStatus"][1];
    assert_eq!(
        (&task["phase"], task["actionFlow"].as_array().map(Vec::len)),
        (&json!("Successful"), Some(2))
    );
    assert_eq!(task["imageStatus"], json!([{"image": "a", "status": "True"}]));
    assert_eq!(stored["status"]["nodeStatus"][0], json!({"nodeName": "edge2"}));
    assert!(
        link.refused(send, &of("edge2"), &report("Check", "")).await.contains("may not report")
    );
    assert!(link.refused(send, &of("edge1"), &report("Dance", "")).await.contains("no action"));
    assert!(
        link.refused(send, "operations.kubeedge.io/v1alpha2/x", &report("Check", ""))
            .await
            .contains("no path")
    );

    // A job that KubeEdge's cloud has begun in the older form.
    let upgrades = format!("{JOBS}/v1alpha1/nodeupgradejobs");
    let (place, older) = (upgrades.clone(), kind("v1alpha1", "NodeUpgradeJob", "up"));
    let cluster = cluster
        .restart_cloud_after(&["127.0.0.1"], async move |admin| {
            begun_in_the_older_form(admin, &place, &older, "Upgrading").await;
        })
        .await;
    let capabilities = Capabilities { receipts: true, ..Capabilities::default() };
    let identity = cluster.enrolled("edge1").await;
    let mut link = identity.open(&cluster, "edge1", capabilities).await.expect("connected");
    let done = json!({"NodeName": "edge1", "Event": "Upgrade", "Action": "Success", "Reason": "r"});
    assert_eq!(link.must(Operation::Upgrade, "task/up/node/edge1", &done).await, "OK");
    let stored = cluster.read(&format!("{upgrades}/up")).await.expect("there");
    assert_eq!(stored["status"]["nodeStatus"][0]["state"], "Successful");
    assert!(
        link.refused(Operation::Upgrade, "task/up/node/edge2", &done)
            .await
            .contains("may not report")
    );
    assert!(
        link.refused(Operation::Upgrade, "task/up/node/edge1", &done).await.contains("cannot take")
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reports_over_https_need_the_nodes_certificate() {
    let cluster = Cluster::start().await;
    cluster.install_kubeedge_kinds().await;
    let upgrades = format!("{JOBS}/v1alpha1/nodeupgradejobs");
    let job = json!({"apiVersion": "operations.kubeedge.io/v1alpha1", "kind": "NodeUpgradeJob", "metadata": {"name": "up"}, "spec": {}});
    let place = format!("{upgrades}/up/status");
    let all = upgrades.clone();
    let cluster = cluster
        .restart_cloud_after(&["127.0.0.1"], async move |admin| {
            begun_in_the_older_form(admin, &all, &job, "Init").await;
        })
        .await;
    let identity = cluster.enrolled("edge1").await;
    let stranger = Identity::new("edge1");
    let post = |path: &str, body: Value| {
        http::Request::post(path).body(Full::from(body.to_string())).expect("a request")
    };
    let checked = json!({"NodeName": "edge1", "Event": "Init", "Action": "Success"});
    let path = "/task/upgrade/name/up/node/edge1/status";
    let address = cluster.cloud.enrol_addr();
    let ca = cluster.ca().await;
    let refused = fetch(address, Some((ca.clone(), &stranger)), post(path, checked.clone())).await;
    assert_eq!(refused.status, 400);
    assert!(refused.text().contains("certificate"), "{}", refused.text());
    let taken = fetch(address, Some((ca.clone(), &identity)), post(path, checked)).await;
    assert_eq!((taken.status, taken.text().as_str()), (200, "ok"));
    let state = |job: &Value| job["status"]["nodeStatus"][0]["state"].clone();
    let stored = cluster.read(&format!("{upgrades}/up")).await.expect("there");
    assert_eq!(state(&stored), "Checking");
    // The older path, with the job in the body.
    let status = json!({"status": {"nodeStatus": [{"nodeName": "edge1", "state": "Upgrading"}]}});
    assert_eq!(cluster.admin_request("PATCH", &place, Some(&status)).await.0, 200);
    let body = json!({"UpgradeID": "up", "NodeName": "edge1", "Status": "upgrade_success"});
    let taken = fetch(address, Some((ca, &identity)), post("/nodeupgrade", body)).await;
    assert_eq!(taken.status, 200, "{}", taken.text());
    let stored = cluster.read(&format!("{upgrades}/up")).await.expect("there");
    assert_eq!(state(&stored), "Successful");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn user_data_is_refused_and_nothing_is_said_where_kubeedge_says_nothing() {
    let cluster = Cluster::start().await;
    let mut link = connected(&cluster, "edge1", false).await;
    let upload = Message::new(0, "bus", "user", Operation::Upload, "some/topic", "data");
    let answer = link.ask_message(&upload).await;
    assert_eq!(answer.route.operation, "error");
    assert!(answer.content_as::<String>().expect("a text").contains("no router"));
    // None of these gets an answer; the next answer is that of the lease.
    let event = json!({"metadata": {"name": "edge1.1"}, "involvedObject": {"kind": "Node", "name": "edge1"}});
    link.send(Operation::Insert, "default/event/edge1.1", &event).await;
    link.send(Operation::Get, "membership/detail", &"{}").await;
    link.send(Operation::Update, "device/default/none/twin/edge_updated", &json!({"twin": {}}))
        .await;
    link.send(
        Operation::UpdateNodeActionStatus,
        "operations.kubeedge.io/v1alpha2/nodeupgradejob/none/node/edge1",
        &json!({"action": "Check", "succ": true}),
    )
    .await;
    let id = link.send(Operation::Query, "kube-node-lease/lease/edge1", &()).await;
    loop {
        let message = link.next().await;
        if message.header.parent_msg_id == id {
            break;
        }
        assert!(message.header.parent_msg_id.is_empty(), "{message:?}");
    }
    cluster.read_until("/api/v1/namespaces/default/events/edge1.1", |_| true).await;
    cluster.stop().await;
}
