//! What nodes ask for, against the embedded API: the golden session of a Go edge, the forms of older edges, and what a
//! node may not have.

mod support;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};
use serde_json::{Value, json};
use skerry_protocol::capability::Capabilities;
use skerry_protocol::{Message, Operation};
use std::collections::BTreeMap;
use support::{Cluster, Link};

const GOLDEN: &str = include_str!("../../protocol/golden/session.jsonl");
const POD: &str = "/api/v1/namespaces/default/pods";

fn pod(name: &str, node: &str, spec: Value) -> Value {
    let mut pod = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": name}, "spec": {
        "nodeName": node, "automountServiceAccountToken": false,
        "containers": [{"name": "c", "image": "busybox"}]}});
    for (field, value) in spec.as_object().into_iter().flatten() {
        pod["spec"][field] = value.clone();
    }
    pod
}

async fn registered(cluster: &Cluster, node: &str) -> Link {
    let identity = cluster.enrolled(node).await;
    let mut link = identity.connect(cluster).await;
    link.register().await;
    link
}

/// Every request of the recorded Go edge is answered as the recorded Go cloud did: same route, same shape, and the
/// same text where it does not hold what only that cluster had.
#[tokio::test(flavor = "multi_thread")]
async fn the_golden_session_gets_the_answers_of_a_go_cloud() {
    let cluster = Cluster::start().await;
    cluster.install_kubeedge_kinds().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    let mut session = Golden::default();
    let mut compared = BTreeMap::<String, usize>::new();
    for line in GOLDEN.lines() {
        let entry: Value = serde_json::from_str(line).expect("json");
        let data = entry["data"].as_str().expect("a text");
        if entry["kind"] == "step" {
            session.step(&cluster, data).await;
            continue;
        }
        if entry["kind"] != "msg" || entry["dir"] != "edge->cloud" {
            continue;
        }
        let recorded: Message = serde_json::from_str(data).expect("a message");
        let route = &recorded.route;
        let quiet = ["response", "keepalive", "get"].contains(&route.operation.as_str());
        let Some(expected) = session.answer_to(&recorded.header.msg_id).filter(|_| !quiet) else {
            continue;
        };
        let request: Message =
            serde_json::from_str(&session.translated(data)).expect("still a message");
        let answer = link.ask_message(&request).await;
        session.compare(&expected, &answer);
        *compared.entry(format!("{} {}", route.operation, route.resource)).or_default() += 1;
    }
    for kind in [
        "insert null/node/edge1",
        "patch null/nodepatch/edge1",
        "query kube-node-lease/lease/edge1",
        "insert kube-node-lease/lease/edge1",
        "patch default/podpatch/web",
        "delete default/pod/web",
        "query default/configmap/web",
        "query default/secret/pw",
        "update device/default/fridge-1/twin/edge_updated",
    ] {
        assert!(compared.contains_key(kind), "{kind} is not in {compared:?}");
    }
    let status = "/apis/devices.kubeedge.io/v1beta1/namespaces/default/devicestatuses/fridge-1";
    let twins = cluster.read(status).await.expect("a status")["status"]["twins"].clone();
    assert_eq!(twins[0]["reported"]["value"], "5.1", "{twins}");
    cluster.stop().await;
}

/// What the recorded cluster had, in terms of ours.
#[derive(Default)]
struct Golden {
    ours: BTreeMap<String, String>,
}

impl Golden {
    fn answer_to(&self, id: &str) -> Option<Message> {
        GOLDEN.lines().find_map(|line| {
            let entry: Value = serde_json::from_str(line).expect("json");
            let down = entry["kind"] == "msg" && entry["dir"] == "cloud->edge";
            let data = entry["data"].as_str().filter(|_| down)?;
            let message: Message = serde_json::from_str(data).expect("a message");
            (message.header.parent_msg_id == id).then_some(message)
        })
    }

    /// Does what was done to the recorded cluster, as far as requests depend on it.
    async fn step(&mut self, cluster: &Cluster, step: &str) {
        if step.starts_with("configmap, secret and a pod") {
            let map = json!({"metadata": {"name": "web"}, "data": {"a": "b"}});
            cluster.create("/api/v1/namespaces/default/configmaps", &map).await;
            let secret = json!({"metadata": {"name": "pw"}, "stringData": {"a": "b"}});
            cluster.create("/api/v1/namespaces/default/secrets", &secret).await;
            self.create_pod(cluster, "web").await;
        } else if step.starts_with("link is cut") {
            self.create_pod(cluster, "web2").await;
        } else if step.starts_with("device model and device") {
            let device = json!({"apiVersion": "devices.kubeedge.io/v1beta1", "kind": "Device",
                "metadata": {"name": "fridge-1"}, "spec": {"nodeName": "edge1",
                    "deviceModelRef": {"name": "thermometer"},
                    "properties": [{"name": "temperature"}, {"name": "limit"}]}});
            let path = "/apis/devices.kubeedge.io/v1beta1/namespaces/default/devices";
            cluster.create(path, &device).await;
        } else if step.starts_with("first pod is deleted") {
            let (status, _) = cluster.admin_request("DELETE", &format!("{POD}/web"), None).await;
            assert_eq!(status, 200);
        }
    }

    async fn create_pod(&mut self, cluster: &Cluster, name: &str) {
        let envs = json!({"containers": [{"name": "c", "image": "busybox",
            "envFrom": [{"configMapRef": {"name": "web"}}, {"secretRef": {"name": "pw"}}]}]});
        let created = cluster.create(POD, &pod(name, "edge1", envs)).await;
        // The uid in the recorded patches of this pod.
        let theirs = GOLDEN.lines().find_map(|line| {
            let entry: Value = serde_json::from_str(line).expect("json");
            let message: Message = serde_json::from_str(entry["data"].as_str()?).ok()?;
            let of_pod = message.route.resource == format!("default/podpatch/{name}");
            let patch: String = message.content_as().ok().filter(|_| of_pod)?;
            let patch: Value = serde_json::from_str(&patch).ok()?;
            patch["metadata"]["uid"].as_str().map(str::to_owned)
        });
        let ours = created["metadata"]["uid"].as_str().expect("a uid");
        self.ours.insert(theirs.expect("in the session"), ours.to_owned());
    }

    fn translated(&self, data: &str) -> String {
        let replace = |text: String, (theirs, ours): (&String, &String)| text.replace(theirs, ours);
        self.ours.iter().fold(data.to_owned(), replace)
    }

    fn compare(&mut self, expected: &Message, answer: &Message) {
        let resource = &expected.route.resource;
        assert_eq!(answer.route, expected.route);
        assert_eq!(
            answer.header.resourceversion.is_empty(),
            expected.header.resourceversion.is_empty(),
            "version of the answer to {resource}"
        );
        let read = |message: &Message| message.content_as::<Value>().expect("json");
        let (theirs, ours) = (read(expected), read(answer));
        if theirs.is_string() || !theirs["Err"].is_null() {
            assert_eq!(answer.content.get(), expected.content.get(), "{resource}");
            return;
        }
        assert_eq!(shape(&ours), shape(&theirs), "{resource}: {ours}");
        let object = |content: &Value| match content.get("Object") {
            Some(object) => object.clone(),
            None => content.clone(),
        };
        let (theirs, ours) = (object(&theirs), object(&ours));
        assert_eq!(shape(&ours), shape(&theirs), "object of {resource}: {ours}");
        assert_eq!(ours["metadata"]["name"], theirs["metadata"]["name"]);
        for field in ["uid", "resourceVersion"] {
            let text = |object: &Value| object["metadata"][field].as_str().map(str::to_owned);
            let (theirs, ours) = (text(&theirs).expect("set"), text(&ours).expect("set"));
            // As a whole JSON value: a number may be part of another.
            self.ours.insert(format!("\"{theirs}\""), format!("\"{ours}\""));
        }
    }
}

/// The keys, in order of the alphabet.
fn shape(object: &Value) -> Vec<String> {
    let mut keys: Vec<String> = object.as_object().expect("an object").keys().cloned().collect();
    keys.sort();
    keys
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_keeps_what_a_node_may_say_and_names_this_cloud() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    let node = json!({"metadata": {"name": "edge1", "finalizers": ["x.io/keep"], "labels": {
        "site": "lisbon", "kubernetes.io/hostname": "edge1", "node-role.kubernetes.io/edge": "",
        "node-role.kubernetes.io/control-plane": ""}}, "spec": {}, "status": {}});
    let created = link.must(Operation::Insert, "null/node/edge1", &node).await;
    assert_eq!(created["Err"], Value::Null);
    assert!(created["Object"].get("kind").is_none(), "as Go's typed client gives it: {created}");
    let stored = cluster.read("/api/v1/nodes/edge1").await.expect("registered");
    let metadata = &stored["metadata"];
    assert_eq!(metadata["labels"]["site"], "lisbon");
    assert_eq!(metadata["labels"]["node-role.kubernetes.io/edge"], "");
    assert_eq!(metadata["labels"]["node-role.kubernetes.io/control-plane"], Value::Null);
    assert_eq!(metadata["annotations"]["cloudcore"], "127.0.0.1");
    assert_eq!(metadata["finalizers"], Value::Null);

    let again = link.ask(Operation::Insert, "null/node/edge1", &node).await;
    assert_eq!(again.1["Err"]["ErrStatus"]["reason"], "AlreadyExists");

    let update = json!({"metadata": {"name": "edge1", "labels": {"rack": "7", "k8s.io/x": "y"}, "annotations": {"a": "b"}}});
    let request = Message::new(0, "edged", "meta", Operation::Update, "null/node/edge1", &update);
    let answer = link.ask_message(&request).await;
    assert_eq!((answer.content.get(), answer.header.resourceversion.is_empty()), ("\"OK\"", false));
    let stored = cluster.read("/api/v1/nodes/edge1").await.expect("there");
    let labels = &stored["metadata"]["labels"];
    assert_eq!(
        (&labels["rack"], &labels["site"], &labels["k8s.io/x"]),
        (&json!("7"), &json!("lisbon"), &Value::Null)
    );
    assert_eq!(stored["metadata"]["annotations"]["cloudcore"], "127.0.0.1");

    // The first patch of a Go edge may be empty, and one may reach for more than the status.
    link.must(Operation::Patch, "null/nodepatch/edge1", &"{}").await;
    let patch = r#"{"metadata":{"ownerReferences":[],"labels":{"k8s.io/x":"y"}},"status":{"phase":"Running"}}"#;
    link.must(Operation::Patch, "null/nodepatch/edge1", &patch).await;
    let read = link.must(Operation::Query, "null/node/edge1", &Value::Null).await;
    assert_eq!((&read["kind"], &read["status"]["phase"]), (&json!("Node"), &json!("Running")));
    assert_eq!(read["metadata"]["labels"]["k8s.io/x"], Value::Null);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_renews_its_lease_and_hears_of_conflicts() {
    let cluster = Cluster::start().await;
    let mut link = registered(&cluster, "edge1").await;
    let path = "kube-node-lease/lease/edge1";
    let lease = |time: &str, version: Option<&Value>| {
        json!({"metadata": {"name": "edge1", "namespace": "kube-node-lease", "resourceVersion": version},
            "spec": {"holderIdentity": "edge1", "renewTime": time}})
    };
    let made =
        link.must(Operation::Insert, path, &lease("2026-01-01T00:00:00.000000Z", None)).await;
    let version = made["Object"]["metadata"]["resourceVersion"].clone();
    let next = lease("2026-01-01T00:00:10.000000Z", Some(&version));
    let request = Message::new(0, "edged", "meta", Operation::Update, path, &next);
    let answer = link.ask_message(&request).await;
    // No version in the header, and no kind in the object, as in the golden session before renewals were left out.
    assert_eq!(answer.header.resourceversion, "");
    let content: Value = answer.content_as().expect("json");
    assert_eq!(content["Err"], Value::Null);
    assert_eq!(shape(&content["Object"]), ["metadata", "spec"]);
    let (_, stale) = link.ask(Operation::Update, path, &next).await;
    assert_eq!(stale["Err"]["ErrStatus"]["reason"], "Conflict");
    assert_eq!(stale["Object"], Value::Null);
    let read = link.must(Operation::Query, path, &()).await;
    assert_eq!(read["Object"]["kind"], "Lease");
    assert_eq!(read["Object"]["spec"]["renewTime"], "2026-01-01T00:00:10.000000Z");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn older_edges_report_status_whole() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("old1").await.connect(&cluster).await;
    // Registration, and once more: both are fine.
    for _ in 0..2 {
        let node =
            json!({"metadata": {"name": "old1", "labels": {"node-role.kubernetes.io/edge": ""}}});
        let request =
            Message::new(0, "edged", "meta", Operation::Insert, "default/nodestatus/old1", &node);
        let answer = link.ask_message(&request).await;
        assert_eq!(
            (answer.content.get(), answer.route.resource.as_str()),
            ("\"OK\"", "default/node/old1")
        );
    }
    let (status, _) = cluster
        .admin_request(
            "PATCH",
            "/api/v1/nodes/old1/status",
            Some(&json!({"status": {
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10351}}}})),
        )
        .await;
    assert_eq!(status, 200);
    let report = json!({"UID": "x", "Status": {"phase": "Running", "daemonEndpoints": {"kubeletEndpoint": {"Port": 10350}},
        "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": "2020-01-01T00:00:00Z"}]}});
    let request =
        Message::new(0, "edged", "meta", Operation::Update, "default/nodestatus/old1", &report);
    let answer = link.ask_message(&request).await;
    assert_eq!((answer.content.get(), answer.header.resourceversion.is_empty()), ("\"OK\"", false));
    let node = cluster.read("/api/v1/nodes/old1").await.expect("there");
    assert_eq!(node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"], 10351);
    let beat = node["status"]["conditions"][0]["lastHeartbeatTime"].as_str().expect("a time");
    assert!(beat > "2026", "{beat}");

    let mut uids = Vec::new();
    for name in ["a", "b"] {
        let created = cluster.create(POD, &pod(name, "old1", json!({}))).await;
        uids.push(created["metadata"]["uid"].as_str().expect("a uid").to_owned());
        link.until("insert", &format!("default/pod/{name}")).await;
    }
    let status =
        |phase: &str| json!({"phase": phase, "conditions": [{"type": "Ready", "status": "True"}]});
    let one = json!({"UID": uids[0], "Name": "a", "Status": status("Running")});
    assert_eq!(link.must(Operation::Update, "default/podstatus/a", &one).await, "OK");
    let stored = cluster.read(&format!("{POD}/a")).await.expect("there");
    assert_eq!(stored["status"]["phase"], "Running");
    assert!(stored["status"]["startTime"].is_string());

    // An array, with one that the cluster does not have: that one is deleted on the edge.
    let several = json!([{"UID": uids[1], "Name": "b", "Status": status("Running")},
        {"UID": "gone", "Name": "c", "Status": status("Running")}]);
    let id = link.send(Operation::Update, "default/podstatus", &several).await;
    let (mut answered, mut stub) = (None, None);
    while answered.is_none() || stub.is_none() {
        let message = link.next().await;
        if message.header.parent_msg_id == id {
            answered = Some(message);
        } else if message.route.operation == "delete" {
            stub = Some(message);
        }
    }
    assert_eq!(answered.expect("seen").content.get(), "\"OK\"");
    let stub = stub.expect("seen");
    assert_eq!(stub.route.resource, "default/pod/c");
    let stub: Value = stub.content_as().expect("json");
    assert_eq!((&stub["metadata"]["name"], &stub["metadata"]["uid"]), (&json!("c"), &Value::Null));

    // A pod that is being deleted and has ended goes.
    let (code, _) = cluster.admin_request("DELETE", &format!("{POD}/a"), None).await;
    assert_eq!(code, 200);
    let ended = json!({"phase": "Failed", "containerStatuses": [{"name": "c", "image": "busybox", "imageID": "",
        "ready": false, "restartCount": 0, "state": {"terminated": {"exitCode": 0}}}]});
    let one = json!({"UID": uids[0], "Name": "a", "Status": ended});
    assert_eq!(link.must(Operation::Update, "default/podstatus/a", &one).await, "OK");
    assert_eq!(cluster.read(&format!("{POD}/a")).await, None);

    // A delete whose content is the uid: another pod's first, which changes nothing.
    assert_eq!(link.must(Operation::Delete, "default/pod/b", &"other").await, "OK");
    assert!(cluster.read(&format!("{POD}/b")).await.is_some());
    assert_eq!(link.must(Operation::Delete, "default/pod/b", &uids[1]).await, "OK");
    assert_eq!(cluster.read(&format!("{POD}/b")).await, None);
    assert_eq!(link.must(Operation::Delete, "default/pod/b", &uids[1]).await, "OK");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_sees_and_reports_only_its_own() {
    let cluster = Cluster::start().await;
    let mut other = registered(&cluster, "edge2").await;
    let mut link = registered(&cluster, "edge1").await;
    let envs = json!({"containers": [{"name": "c", "image": "busybox", "envFrom": [{"configMapRef": {"name": "theirs"}}]}]});
    let foreign = cluster.create(POD, &pod("foreign", "edge2", envs)).await;
    let uid = foreign["metadata"]["uid"].as_str().expect("a uid");
    other.until("insert", "default/pod/foreign").await;
    for (kind, name) in [("configmaps", "theirs"), ("secrets", "theirs")] {
        let object = json!({"metadata": {"name": name}});
        cluster.create(&format!("/api/v1/namespaces/default/{kind}"), &object).await;
    }
    let node = json!({"metadata": {"name": "edge2"}});
    let lease = json!({"metadata": {"name": "edge2"}, "spec": {}});
    let event = json!({"metadata": {"name": "foreign.1"}, "involvedObject": {"kind": "Pod", "name": "foreign", "namespace": "default", "uid": uid}});
    let patch = json!({"event": event, "patchData": "{\"count\":2}"});
    let mirror = pod("m", "edge2", json!({}));
    let plain = pod("p", "edge1", json!({}));
    let token = json!({"spec": {"audiences": [], "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "foreign", "uid": uid}}});
    let unbound = json!({"spec": {"audiences": []}});
    let status = json!({"UID": uid, "Name": "foreign", "Status": {"phase": "Failed"}});
    let node_status = json!({"Status": {}});
    use Operation::{Delete, Insert, Patch, Query, Update};
    let cases: Vec<(Operation, &str, Value)> = vec![
        (Insert, "null/node/edge2", node.clone()),
        (Insert, "null/node/edge1", node.clone()),
        (Update, "null/node/edge2", node.clone()),
        (Query, "null/node/edge2", Value::Null),
        (Patch, "null/nodepatch/edge2", json!("{\"status\":{\"phase\":\"x\"}}")),
        (Update, "default/nodestatus/edge2", node_status),
        (Query, "kube-node-lease/lease/edge2", Value::Null),
        (Insert, "kube-node-lease/lease/edge2", lease.clone()),
        (Insert, "kube-node-lease/lease/edge1", lease.clone()),
        (Update, "kube-node-lease/lease/edge2", lease),
        (Query, "default/lease/edge1", Value::Null),
        (
            Patch,
            "default/podpatch/foreign",
            json!({"metadata": {"uid": uid}, "status": {"phase": "Failed"}}),
        ),
        (Update, "default/podstatus/foreign", status),
        (Delete, "default/pod/foreign", json!({"gracePeriodSeconds": 0})),
        (Delete, "default/pod/foreign", json!(uid)),
        (Insert, "default/pod/m", mirror),
        (Insert, "default/pod/p", plain),
        (Query, "default/configmap/theirs", Value::Null),
        (Query, "default/secret/theirs", Value::Null),
        (Query, "default/persistentvolumeclaim/c", Value::Null),
        (Query, "default/serviceaccounttoken/default", token),
        (Query, "default/serviceaccounttoken/default", unbound),
        (Query, "default/configmap/..", Value::Null),
        (Query, "default/pod/foreign", Value::Null),
        (Query, "default/unheard/x", Value::Null),
        (Update, "device/default/d/unheard/x", json!({})),
        (Delete, "null/node/edge1", Value::Null),
        (Query, "x", Value::Null),
    ];
    for (operation, resource, content) in cases {
        let why = link.refused(operation, resource, &content).await;
        assert!(!why.is_empty(), "{resource}");
    }
    // A pod of that name was this node's once: done, as far as this node is concerned.
    let once = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": "of-an-earlier-one"}});
    assert_eq!(link.must(Delete, "default/pod/foreign", &once).await, "OK");
    let stored = cluster.read(&format!("{POD}/foreign")).await.expect("still there");
    assert_ne!(stored["status"]["phase"], "Failed");

    // Events get no answer from KubeEdge; a peer with receipts learns what became of each.
    let capabilities = Capabilities { receipts: true, ..Capabilities::default() };
    let identity = cluster.enrolled("edge3").await;
    let mut link = identity.open(&cluster, "edge3", capabilities).await.expect("connected");
    link.register().await;
    let own = json!({"metadata": {"name": "edge3.1"}, "reason": "Started", "involvedObject": {"kind": "Node", "name": "edge3"}});
    for _ in 0..2 {
        // The second is the outbox that did not hear the first answer.
        assert_eq!(link.must(Insert, "default/event/edge3.1", &own).await, "OK");
    }
    let again = json!({"event": own, "patchData": "{\"count\":2}"});
    assert_eq!(link.must(Patch, "default/event/edge3.1", &again).await, "OK");
    let stored = cluster.read("/api/v1/namespaces/default/events/edge3.1").await.expect("recorded");
    assert_eq!(stored["count"], 2);
    assert!(link.refused(Insert, "default/event/foreign.1", &event).await.contains("not bound"));
    assert!(link.refused(Patch, "default/event/foreign.1", &patch).await.contains("not bound"));
    let elsewhere = json!({"event": own, "patchData": "{\"count\":3}"});
    assert!(
        link.refused(Patch, "default/event/foreign.1", &elsewhere)
            .await
            .contains("not named after")
    );
    let stolen = json!({"event": own, "patchData": "{\"involvedObject\":{\"name\":\"x\"}}"});
    assert!(link.refused(Patch, "default/event/edge3.1", &stolen).await.contains("involvedObject"));
    let forgotten = json!({"metadata": {"name": "edge3.2"}, "involvedObject": {"kind": "Node", "name": "edge3"}});
    assert_eq!(link.must(Update, "default/event/edge3.2", &forgotten).await, "OK");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_open_what_they_use() {
    let cluster = Cluster::start().await;
    let mut link = registered(&cluster, "edge1").await;
    let claim = json!({"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"], "volumeName": "disk",
        "resources": {"requests": {"storage": "1Gi"}}}});
    cluster.create("/api/v1/namespaces/default/persistentvolumeclaims", &claim).await;
    for (name, claim) in [("disk", "data"), ("other", "others")] {
        let volume = json!({"metadata": {"name": name}, "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"],
            "hostPath": {"path": "/x"}, "claimRef": {"namespace": "default", "name": claim}}});
        cluster.create("/api/v1/persistentvolumes", &volume).await;
    }
    for (name, node) in [("mine", "edge1"), ("theirs", "edge2")] {
        let attachment = json!({"metadata": {"name": name}, "spec": {"attacher": "a", "nodeName": node,
            "source": {"persistentVolumeName": "disk"}}});
        cluster.create("/apis/storage.k8s.io/v1/volumeattachments", &attachment).await;
    }
    assert!(
        link.refused(Operation::Query, "default/persistentvolumeclaim/data", &())
            .await
            .contains("no pod")
    );
    let volumes =
        json!({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]});
    let created = cluster.create(POD, &pod("user", "edge1", volumes)).await;
    let found = link.must(Operation::Query, "default/persistentvolumeclaim/data", &()).await;
    assert_eq!(
        (&found["kind"], &found["metadata"]["name"]),
        (&json!("PersistentVolumeClaim"), &json!("data"))
    );
    let found = link.must(Operation::Query, "null/persistentvolume/disk", &()).await;
    assert_eq!(found["kind"], "PersistentVolume");
    assert!(
        link.refused(Operation::Query, "null/persistentvolume/other", &()).await.contains("no pod")
    );
    let found = link.must(Operation::Query, "default/volumeattachment/mine", &()).await;
    assert_eq!(found["apiVersion"], "storage.k8s.io/v1");
    assert!(
        link.refused(Operation::Query, "default/volumeattachment/theirs", &())
            .await
            .contains("no pod")
    );
    assert!(
        link.refused(Operation::Query, "default/volumeattachment/none", &())
            .await
            .ends_with("not found")
    );

    let uid = &created["metadata"]["uid"];
    let request = json!({"spec": {"audiences": [], "expirationSeconds": 3600,
        "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "user", "uid": uid}}});
    let token = link.must(Operation::Query, "default/serviceaccounttoken/default", &request).await;
    assert!(token["status"]["token"].as_str().is_some_and(|token| token.len() > 20), "{token}");
    let why = link.refused(Operation::Query, "default/serviceaccounttoken/admin", &request).await;
    assert!(why.contains("runs as service account `default`"), "{why}");

    let request = Message::new(0, "metamanager", "meta", Operation::Query, "k8s/ca.crt", &());
    let answer = link.ask_message(&request).await;
    assert_eq!(
        (answer.route.source.as_str(), answer.route.group.as_str()),
        ("cloudhub", "resource")
    );
    assert!(
        answer.content_as::<String>().expect("a text").starts_with("-----BEGIN CERTIFICATE-----")
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_its_own_serving_certificate_approved() {
    let cluster = Cluster::start().await;
    let mut link = registered(&cluster, "edge1").await;
    let csr = |common: &str, addresses: &[[u8; 4]]| {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
        params.distinguished_name.push(DnType::CommonName, common);
        params.subject_alt_names =
            addresses.iter().map(|address| SanType::IpAddress((*address).into())).collect();
        let key = KeyPair::generate().expect("a key");
        let pem = params.serialize_request(&key).expect("a request").pem().expect("text");
        json!({"metadata": {"name": "c"}, "spec": {"signerName": "kubernetes.io/kubelet-serving",
            "usages": ["digital signature", "server auth"], "request": STANDARD.encode(pem)},
            "status": {"conditions": [{"type": "Denied", "status": "True"}]}})
    };
    let approved = |object: &Value| {
        let conditions = object["status"]["conditions"].as_array();
        conditions.into_iter().flatten().any(|condition| condition["type"] == "Approved")
    };
    let path = |name: &str| format!("default/certificatesigningrequest/{name}");
    let local = [[127, 0, 0, 1], [169, 254, 30, 10]];
    link.must(Operation::Insert, &path("c"), &csr("system:node:edge1", &local)).await;
    let read = link.must(Operation::Query, &path("c"), &()).await;
    assert!(approved(&read) && read["kind"] == "CertificateSigningRequest", "{read}");

    let why = link.refused(Operation::Insert, &path("d"), &csr("system:node:edge2", &local)).await;
    assert!(why.contains("may not ask"), "{why}");
    // Another machine's address: made, but an administrator has to look at it.
    link.must(Operation::Insert, &path("e"), &csr("system:node:edge1", &[[10, 0, 0, 7]])).await;
    assert!(!approved(&link.must(Operation::Query, &path("e"), &()).await));
    let mut other = registered(&cluster, "edge2").await;
    assert!(other.refused(Operation::Query, &path("c"), &()).await.contains("is not of node"));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hub_keeps_the_lease_of_a_node_that_leaves_it_to_the_hub() {
    let cluster = Cluster::start().await;
    let capabilities = Capabilities { lease: true, ..Capabilities::default() };
    let identity = cluster.enrolled("edge1").await;
    let mut link = identity.open(&cluster, "edge1", capabilities).await.expect("connected");
    let registered = link.register().await;
    let path = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/edge1";
    let lease = cluster.read_until(path, |_| true).await;
    let owner = &lease["metadata"]["ownerReferences"][0];
    assert_eq!(owner["uid"], registered["Object"]["metadata"]["uid"]);
    assert_eq!(
        (&lease["spec"]["holderIdentity"], &lease["spec"]["leaseDurationSeconds"]),
        (&json!("edge1"), &json!(40))
    );
    // A new connection renews at once, whatever the Lease says by then.
    drop(link);
    let (status, _) = cluster
        .admin_request(
            "PATCH",
            path,
            Some(&json!({"spec": {"renewTime": "2020-01-01T00:00:00.000000Z"}})),
        )
        .await;
    assert_eq!(status, 200);
    cluster.links_until(<[_]>::is_empty).await;
    let _link = identity.open(&cluster, "edge1", capabilities).await.expect("connected");
    cluster
        .read_until(path, |lease| {
            lease["spec"]["renewTime"].as_str().is_some_and(|time| time > "2026")
        })
        .await;
    cluster.stop().await;
}

/// A node's report of its kernel becomes the object of its name, whole and anew each time; another's never does.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_keeps_the_qualification_of_its_own_kernel_only() {
    let cluster = Cluster::start().await;
    let mut link = registered(&cluster, "edge1").await;
    let report = |kernel: &str, profile: &str| {
        json!({"kernel": kernel, "arch": "x86_64", "digest": "sha256:1", "verdict": "Qualified",
            "advice": {"cni": profile}, "observedAt": "2026-11-23T02:48:09Z",
            "profiles": [{"profile": profile, "verdict": "qualified"}],
            "report": {"facts": {"bpf.btf": {"state": "present"}}}, "unknown": 1})
    };
    let path = "/apis/fleet.skerry.dev/v1alpha1/nodequalifications";
    // The first one defines the kind; a node asks again until it is served.
    let mut answer = Value::Null;
    for _ in 0..200 {
        let said = report("6.1.0", "cilium");
        (_, answer) = link.ask(Operation::Update, "null/nodequalification/edge1", &said).await;
        if answer == "OK" {
            break;
        }
        assert_eq!(answer["ErrStatus"]["code"], 503, "{answer}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(answer, "OK");
    let said = report("6.12.0", "flannel-vxlan");
    let answer = link.must(Operation::Update, "null/nodequalification/edge1", &said).await;
    assert_eq!(answer, "OK");
    let kept = cluster.read(&format!("{path}/edge1")).await.expect("kept");
    let node = cluster.read("/api/v1/nodes/edge1").await.expect("registered");
    assert_eq!(kept["spec"]["node"], "edge1");
    assert_eq!(kept["status"]["kernel"], "6.12.0");
    assert_eq!(
        kept["status"]["profiles"],
        json!([{"profile": "flannel-vxlan", "verdict": "qualified"}])
    );
    assert_eq!(kept["status"]["report"]["facts"]["bpf.btf"]["state"], "present");
    assert_eq!(kept["metadata"]["ownerReferences"][0]["uid"], node["metadata"]["uid"]);

    let (_, others) = link.ask(Operation::Update, "null/nodequalification/edge2", &said).await;
    assert_eq!(others["ErrStatus"]["code"], 403, "{others}");
    let wrong = json!({"kernel": 6});
    let (_, wrong) = link.ask(Operation::Update, "null/nodequalification/edge1", &wrong).await;
    assert_eq!(wrong["ErrStatus"]["code"], 400, "{wrong}");
    let long = json!({"kernel": "6.1", "report": {"x": "y".repeat(600 * 1024)}});
    let (_, long) = link.ask(Operation::Update, "null/nodequalification/edge1", &long).await;
    // The link has a bound of its own, which is as long as the one for this kind.
    assert!(long.to_string().contains("over the bound"), "{long}");
    assert!(cluster.read(&format!("{path}/edge2")).await.is_none());
    let kept = cluster.read(&format!("{path}/edge1")).await.expect("kept");
    assert_eq!(kept["status"]["kernel"], "6.12.0", "what was refused changed nothing");
}
