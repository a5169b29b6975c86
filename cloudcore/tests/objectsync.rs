//! ObjectSync objects as KubeEdge's CloudCore writes and expects them, in both directions, and what of it nodes of ours
//! get to see: nothing. Also devices, whose kinds a cluster may lack.

mod support;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams,
};
use serde_json::{Value, json};
use skerry_api::reliablesyncs::v1alpha1::{ClusterObjectSync, ObjectSync};
use skerry_protocol::capability::Capabilities;
use skerry_protocol::digest::{self, Digest};
use skerry_protocol::{Message, Operation};
use std::collections::BTreeMap;
use std::time::Duration;
use support::{Cluster, Link, PATIENCE, from};

/// Records by name: kind and name of the object, acknowledged version.
type Records = BTreeMap<String, (String, String, String)>;

async fn records(cluster: &Cluster) -> Records {
    let none = ListParams::default();
    let namespaced = Api::<ObjectSync>::namespaced(cluster.admin.clone(), "default");
    let cluster_wide = Api::<ClusterObjectSync>::all(cluster.admin.clone());
    let namespaced = namespaced.list(&none).await.expect("a list").items.into_iter();
    let cluster_wide = cluster_wide.list(&none).await.expect("a list").items.into_iter();
    let namespaced = namespaced.map(|sync| (sync.metadata, sync.spec, sync.status));
    let all = namespaced.chain(cluster_wide.map(|sync| (sync.metadata, sync.spec, sync.status)));
    all.map(|(metadata, spec, status)| {
        let version = status.map(|status| status.object_resource_version).unwrap_or_default();
        (metadata.name.expect("a name"), (spec.object_kind, spec.object_name, version))
    })
    .collect()
}

async fn records_until(cluster: &Cluster, wanted: impl Fn(&Records) -> bool) -> Records {
    let mut last = Records::new();
    let settled = tokio::time::timeout(PATIENCE, async {
        loop {
            last = records(cluster).await;
            if wanted(&last) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(settled.is_ok(), "{last:#?}");
    last
}

/// Uid and resource version of the object in a push.
fn identity(message: &Message) -> (String, String) {
    let object: Value = message.content_as().expect("an object");
    let text = |name: &str| object["metadata"][name].as_str().expect(name).to_owned();
    (text("uid"), text("resourceVersion"))
}

/// Everything that comes before a pod that is created now.
async fn until_marker(cluster: &Cluster, link: &mut Link, marker: &str) -> Vec<String> {
    cluster.create_pod(marker, &link.node.clone(), "none").await;
    let path = format!("default/pod/{marker}");
    let mut lines = Vec::new();
    loop {
        let message = link.next().await;
        if message.route.resource == path {
            return lines;
        }
        lines.push(format!("{} {}", message.route.operation, message.route.resource));
    }
}

#[tokio::test]
async fn records_of_a_stock_node_say_what_it_has_acknowledged() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    link.register().await;
    cluster.create_config("page", "one").await;
    cluster.create_pod("web", "edge1", "page").await;

    // Not acknowledged yet: the record is there and says so.
    let pod = loop {
        let message = link.next_unacknowledged().await;
        if message.route.resource == "default/pod/web" {
            break message;
        }
        link.write(&message.ack(0)).await;
    };
    let (uid, version) = identity(&pod);
    let name = format!("edge1.{uid}");
    let record = records(&cluster).await.remove(&name).expect("a record before the message");
    assert_eq!(record, ("Pod".into(), "web".into(), "0".into()));
    link.write(&pod.ack(0)).await;
    let all = records_until(&cluster, |all| all.get(&name).is_some_and(|of| of.2 == version)).await;
    assert!(all.values().any(|of| of.0 == "Node" && of.1 == "edge1"), "{all:#?}");

    // A record of each object that it holds, and they follow.
    let patch = Patch::Merge(json!({"data": {"key": "two"}}));
    cluster.configs().patch("page", &PatchParams::default(), &patch).await.expect("changed");
    let (update, _) = link.until("update", "default/configmap/page").await;
    let (uid, version) = identity(&update);
    let config = format!("edge1.{uid}");
    records_until(&cluster, |all| all.get(&config).is_some_and(|of| of.2 == version)).await;
    let sync = Api::<ObjectSync>::namespaced(cluster.admin.clone(), "default");
    let sync = sync.get(&config).await.expect("a record");
    assert_eq!(sync.spec.object_api_version, "v1");

    cluster.pods().delete("web", &DeleteParams::default().grace_period(0)).await.expect("deleted");
    link.until("delete", "default/pod/web").await;
    link.until("delete", "default/configmap/page").await;
    records_until(&cluster, |all| !all.contains_key(&name) && !all.contains_key(&config)).await;

    cluster.nodes().delete("edge1", &DeleteParams::default()).await.expect("deleted");
    records_until(&cluster, Records::is_empty).await;
    cluster.stop().await;
}

#[tokio::test]
async fn after_a_restart_a_stock_node_gets_what_it_missed_and_nothing_else() {
    let cluster = Cluster::start().await;
    let identity_of_node = cluster.enrolled("edge1").await;
    let mut link = identity_of_node.connect(&cluster).await;
    link.register().await;
    cluster.create_config("page", "one").await;
    for name in ["stays", "goes"] {
        cluster.create_pod(name, "edge1", "page").await;
        link.until("insert", &format!("default/pod/{name}")).await;
    }
    records_until(&cluster, |all| all.len() == 4 && all.values().all(|of| of.2 != "0")).await;
    drop(link);

    let (pods, configs) = (cluster.pods(), cluster.configs());
    let meanwhile = async |_: &kube::Client| {
        pods.delete("goes", &DeleteParams::default().grace_period(0)).await.expect("deleted");
        let patch = Patch::Merge(json!({"data": {"key": "two"}}));
        configs.patch("page", &PatchParams::default(), &patch).await.expect("changed");
    };
    let cluster = cluster.restart_cloud_after(&["127.0.0.1"], meanwhile).await;
    let mut link = identity_of_node.connect(&cluster).await;
    let mut lines = until_marker(&cluster, &mut link, "marker").await;
    lines.sort();
    let expected =
        ["delete default/pod/goes", "update default/configmap/page", "update null/node/edge1"];
    assert_eq!(lines, expected);
    cluster.stop().await;
}

#[tokio::test]
async fn cloudcore_takes_over_from_what_kubeedge_has_recorded() {
    let cluster = Cluster::start().await;
    let identity_of_node = cluster.enrolled("edge1").await;
    let mut link = identity_of_node.connect(&cluster).await;
    link.register().await;
    drop(link);
    while cluster.metric("skerry_hub_nodes_connected").await > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for name in ["current", "older", "never"] {
        cluster.create_pod(name, "edge1", "none").await;
    }
    // As KubeEdge's CloudCore leaves them.
    let syncs = Api::<ObjectSync>::namespaced(cluster.admin.clone(), "default");
    let mut expected = Records::new();
    for (name, version) in [("current", None), ("older", Some("1")), ("never", Some("0"))] {
        let pod = cluster.pods().get(name).await.expect("a pod").metadata;
        let (uid, current) = (pod.uid.expect("uid"), pod.resource_version.expect("version"));
        record(&syncs, &format!("edge1.{uid}"), name, version.unwrap_or(&current)).await;
        expected.insert(format!("edge1.{uid}"), ("Pod".into(), name.into(), current));
    }
    record(&syncs, "edge1.long-gone", "gone", "7").await;
    record(&syncs, "edge9.web", "web", "7").await;
    let cluster = cluster.restart_cloud(&["127.0.0.1"]).await;

    let mut link = identity_of_node.connect(&cluster).await;
    let mut stub = None;
    let mut lines = Vec::new();
    while lines.len() < 4 {
        let message = link.next().await;
        lines.push(format!("{} {}", message.route.operation, message.route.resource));
        if message.route.operation == "delete" {
            stub = Some(message.content_as::<Value>().expect("an object"));
        }
    }
    lines.sort();
    assert_eq!(
        lines,
        [
            "delete default/pod/gone",
            "update default/pod/never",
            "update default/pod/older",
            "update null/node/edge1"
        ]
    );
    // KubeEdge's stub, and the version at which the object was gone, which its edge does not look at.
    let mut stub = stub.expect("a delete");
    let metadata = stub["metadata"].as_object_mut().expect("metadata");
    assert!(metadata.remove("resourceVersion").is_some_and(|version| version.is_string()));
    let metadata = json!({"name": "gone", "namespace": "default", "uid": "long-gone"});
    assert_eq!(stub, json!({"metadata": metadata}));
    let only_pods = |all: &Records| -> Records {
        all.clone().into_iter().filter(|(_, of)| of.0 == "Pod").collect()
    };
    records_until(&cluster, |all| only_pods(all) == expected).await;
    cluster.stop().await;
}

async fn record(syncs: &Api<ObjectSync>, name: &str, object: &str, version: &str) {
    let sync: ObjectSync = from(json!({"metadata": {"name": name},
        "spec": {"objectAPIVersion": "v1", "objectKind": "Pod", "objectName": object}}));
    syncs.create(&PostParams::default(), &sync).await.expect("created");
    let status = Patch::Merge(json!({"status": {"objectResourceVersion": version}}));
    syncs.patch_status(name, &PatchParams::default(), &status).await.expect("written");
}

#[tokio::test]
async fn nodes_of_ours_have_no_records_and_lose_those_of_an_earlier_life() {
    let cluster = Cluster::start().await;
    let identity_of_node = cluster.enrolled("edge1").await;
    let mut link = identity_of_node.connect(&cluster).await;
    link.register().await;
    records_until(&cluster, |all| all.len() == 1).await;
    drop(link);

    let ours = Capabilities { digest: true, ..Capabilities::default() };
    let mut link = identity_of_node.open(&cluster, "edge1", ours).await.expect("connected");
    link.send(Operation::Query, digest::RESOURCE, &Digest::default()).await;
    link.until("response", digest::RESOURCE).await;
    cluster.create_pod("web", "edge1", "none").await;
    link.until("insert", "default/pod/web").await;
    records_until(&cluster, Records::is_empty).await;
    cluster.stop().await;
}

#[tokio::test]
async fn device_comes_after_its_model_and_after_word_of_it() {
    let cluster = Cluster::start().await;
    for (kind, plural) in [("DeviceModel", "devicemodels"), ("Device", "devices")] {
        define(&cluster, kind, plural).await;
    }
    // Kinds are looked for at the start and then once a minute.
    let cluster = cluster.restart_cloud(&["127.0.0.1"]).await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    link.register().await;
    create(
        &cluster,
        "Device",
        "devices",
        "d",
        json!({"nodeName": "edge1",
        "deviceModelRef": {"name": "m"}, "protocol": {"protocolName": "modbus"}}),
    )
    .await;
    create(&cluster, "DeviceModel", "devicemodels", "m", json!({})).await;
    let (model, _) = link.until("insert", "default/devicemodel/m").await;
    assert_eq!(model.route.source, "devicecontroller");
    let (_, before) = link.until("insert", "default/device/d").await;
    assert_eq!(before, ["update membership"]);
    let devices = Api::<DynamicObject>::namespaced_with(
        cluster.admin.clone(),
        "default",
        &resource("Device", "devices"),
    );
    devices.delete("d", &DeleteParams::default()).await.expect("deleted");
    let (gone, before) = link.until("delete", "default/device/d").await;
    assert_eq!(before, ["update membership"]);
    let object: Value = gone.content_as().expect("an object");
    assert_eq!(object["spec"]["protocol"]["protocolName"], "modbus", "a mapper is told by it");
    link.until("delete", "default/devicemodel/m").await;
    cluster.stop().await;
}

fn resource(kind: &str, plural: &str) -> ApiResource {
    ApiResource {
        group: "devices.kubeedge.io".into(),
        version: "v1beta1".into(),
        api_version: "devices.kubeedge.io/v1beta1".into(),
        kind: kind.into(),
        plural: plural.into(),
    }
}

async fn define(cluster: &Cluster, kind: &str, plural: &str) {
    let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let definition: CustomResourceDefinition = from(json!({
        "metadata": {"name": format!("{plural}.devices.kubeedge.io")},
        "spec": {"group": "devices.kubeedge.io", "scope": "Namespaced",
            "names": {"kind": kind, "listKind": format!("{kind}List"), "plural": plural,
                "singular": kind.to_lowercase()},
            "versions": [{"name": "v1beta1", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": schema}}]}}));
    let definitions = Api::<CustomResourceDefinition>::all(cluster.admin.clone());
    match definitions.create(&PostParams::default(), &definition).await {
        Err(kube::Error::Api(status)) if status.code == 409 => {} // CloudCore was faster
        defined => drop(defined.expect("defined")),
    }
}

async fn create(cluster: &Cluster, kind: &str, plural: &str, name: &str, spec: Value) {
    let resource = resource(kind, plural);
    let objects = Api::namespaced_with(cluster.admin.clone(), "default", &resource);
    let object: DynamicObject = from(json!({"apiVersion": resource.api_version, "kind": kind,
        "metadata": {"name": name}, "spec": spec}));
    objects.create(&PostParams::default(), &object).await.expect("created");
}
