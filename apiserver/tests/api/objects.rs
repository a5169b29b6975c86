//! Create, read, update, delete, list.

use crate::support::*;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Event, Secret, Service};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, VersionMatch};
use serde_json::{Value, json};

#[tokio::test]
async fn object_is_created_read_replaced_and_deleted() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    let created = maps.create(&PostParams::default(), &config_map("a", "1")).await.unwrap();
    assert!(created.uid().is_some() && created.creation_timestamp().is_some());
    assert_eq!(maps.get("a").await.unwrap(), created);

    let mut changed = created.clone();
    changed.data.as_mut().unwrap().insert("key".into(), "2".into());
    let replaced = maps.replace("a", &PostParams::default(), &changed).await.unwrap();
    assert_ne!(replaced.resource_version(), created.resource_version());
    assert_eq!(replaced.uid(), created.uid());

    let stale = refused(maps.replace("a", &PostParams::default(), &created).await);
    assert_eq!((stale.0, stale.1.as_str()), (409, "Conflict"));
    assert!(stale.2.contains("the object has been modified"), "{}", stale.2);

    let deleted = maps.delete("a", &DeleteParams::default()).await.unwrap();
    assert!(deleted.right().unwrap().is_success());
    let missing = refused(maps.get("a").await);
    assert_eq!((missing.0, missing.2.as_str()), (404, "configmaps \"a\" not found"));
}

#[tokio::test]
async fn second_creation_is_refused_and_generated_names_differ() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    create(&maps, json!({"metadata": {"name": "a"}})).await;
    let again = refused(maps.create(&PostParams::default(), &config_map("a", "1")).await);
    assert_eq!((again.0, again.1.as_str()), (409, "AlreadyExists"));

    let first = create(&maps, json!({"metadata": {"generateName": "g-"}})).await;
    let second = create(&maps, json!({"metadata": {"generateName": "g-"}})).await;
    assert_ne!(first.name_any(), second.name_any());
    assert!(first.name_any().starts_with("g-") && first.name_any().len() == 7);
}

#[tokio::test]
async fn write_that_changes_nothing_keeps_the_revision() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    let created = maps.create(&PostParams::default(), &config_map("a", "1")).await.unwrap();
    let same = maps.replace("a", &PostParams::default(), &created).await.unwrap();
    assert_eq!(same.resource_version(), created.resource_version());
    let patch = Patch::Merge(json!({"data": {"key": "1"}}));
    let same = maps.patch("a", &PatchParams::default(), &patch).await.unwrap();
    assert_eq!(same.resource_version(), created.resource_version());
}

#[tokio::test]
async fn dry_run_answers_and_stores_nothing() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    assert!(maps.create(&dry, &config_map("a", "1")).await.unwrap().uid().is_some());
    assert!(maps.get_opt("a").await.unwrap().is_none());
    create(&maps, json!({"metadata": {"name": "b"}})).await;
    maps.delete("b", &DeleteParams::default().dry_run()).await.unwrap();
    assert!(maps.get_opt("b").await.unwrap().is_some());
}

#[tokio::test]
async fn three_patch_types_change_what_they_name() {
    let server = Server::start().await;
    let deployments: Api<Deployment> = Api::namespaced(server.admin(), "default");
    create(
        &deployments,
        json!({"metadata": {"name": "web"}, "spec": {
            "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [
                {"name": "a", "image": "a:1"}, {"name": "b", "image": "b:1"}]}}}}),
    )
    .await;
    let none = PatchParams::default();
    let strategic = Patch::Strategic(
        json!({"spec": {"template": {"spec": {"containers": [{"name": "b", "image": "b:2"}]}}}}),
    );
    let web = deployments.patch("web", &none, &strategic).await.unwrap();
    let images: Vec<_> = web.spec.unwrap().template.spec.unwrap().containers;
    let images: Vec<_> = images.iter().map(|one| one.image.as_deref().unwrap()).collect();
    assert_eq!(images, ["a:1", "b:2"]);

    let merge = Patch::Merge(json!({"spec": {"replicas": 3}, "metadata": {"labels": {"x": "y"}}}));
    let web = deployments.patch("web", &none, &merge).await.unwrap();
    assert_eq!((web.spec.as_ref().unwrap().replicas, web.labels()["x"].as_str()), (Some(3), "y"));
    assert_eq!(web.metadata.generation, Some(3));

    let failing = json!([{"op": "test", "path": "/spec/replicas", "value": 1}]);
    let failing = Patch::Json::<()>(serde_json::from_value(failing).unwrap());
    assert_eq!(refused(deployments.patch("web", &none, &failing).await).0, 422);
    let json_patch = json!([{"op": "replace", "path": "/spec/replicas", "value": 5}]);
    let json_patch = Patch::Json::<()>(serde_json::from_value(json_patch).unwrap());
    let web = deployments.patch("web", &none, &json_patch).await.unwrap();
    assert_eq!(web.spec.unwrap().replicas, Some(5));
}

#[tokio::test]
async fn status_and_spec_are_written_on_their_own_paths() {
    let server = Server::start().await;
    let pods = pods(&server.admin());
    let mut with_status = pod("p");
    with_status["status"] = json!({"phase": "Running"});
    let created = create(&pods, with_status).await;
    assert_eq!(created.status.unwrap().phase.as_deref(), Some("Pending"));

    let patch =
        Patch::Merge(json!({"status": {"phase": "Running"}, "metadata": {"labels": {"a": "b"}}}));
    let none = PatchParams::default();
    let after = pods.patch_status("p", &none, &patch).await.unwrap();
    assert_eq!(after.status.as_ref().unwrap().phase.as_deref(), Some("Running"));
    assert!(after.labels().is_empty());
    let after = pods.patch("p", &none, &Patch::Merge(json!({"status": {"phase": "Failed"}}))).await;
    assert_eq!(after.unwrap().status.unwrap().phase.as_deref(), Some("Running"));
}

#[tokio::test]
async fn scale_changes_replicas_and_answers_a_scale() {
    let server = Server::start().await;
    let deployments: Api<Deployment> = Api::namespaced(server.admin(), "default");
    create(
        &deployments,
        json!({"metadata": {"name": "web"}, "spec": {
            "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "a", "image": "a:1"}]}}}}),
    )
    .await;
    let patch = Patch::Merge(json!({"spec": {"replicas": 4}}));
    let scale = deployments.patch_scale("web", &PatchParams::default(), &patch).await.unwrap();
    assert_eq!(scale.spec.unwrap().replicas, Some(4));
    assert_eq!(scale.status.unwrap().selector.as_deref(), Some("app=web"));
    assert_eq!(deployments.get("web").await.unwrap().spec.unwrap().replicas, Some(4));
}

#[tokio::test]
async fn selectors_choose_by_labels_and_fields() {
    let server = Server::start().await;
    let pods = pods(&server.admin());
    for (name, tier) in [("a", "web"), ("b", "db"), ("c", "web")] {
        let mut object = pod(name);
        object["metadata"]["labels"] = json!({"tier": tier, name: "yes"});
        create(&pods, object).await;
    }
    let names = async |params: ListParams| -> Vec<String> {
        pods.list(&params).await.unwrap().iter().map(ResourceExt::name_any).collect()
    };
    let labels = |text: &str| ListParams::default().labels(text);
    assert_eq!(names(labels("tier=web")).await, ["a", "c"]);
    assert_eq!(names(labels("tier in (db,x),b")).await, ["b"]);
    assert_eq!(names(labels("tier!=web")).await, ["b"]);
    assert_eq!(names(labels("!a")).await, ["b", "c"]);
    let fields = |text: &str| ListParams::default().fields(text);
    assert_eq!(names(fields("metadata.name=b")).await, ["b"]);
    assert_eq!(names(fields("status.phase=Pending,metadata.name!=b")).await, ["a", "c"]);
    assert_eq!(names(fields("spec.nodeName=n1")).await, Vec::<String>::new());
    let unknown = refused(pods.list(&fields("spec.color=red")).await);
    assert_eq!(unknown.0, 400);
    assert!(unknown.2.contains("field label not supported"), "{}", unknown.2);
}

#[tokio::test]
async fn pages_show_the_state_of_the_first_page() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    for name in ["a", "b", "c", "d", "e"] {
        create(&maps, json!({"metadata": {"name": name, "labels": {"page": "yes"}}})).await;
    }
    let params = ListParams::default().limit(2).labels("page=yes");
    let first = maps.list(&params).await.unwrap();
    maps.delete("c", &DeleteParams::default()).await.unwrap();
    maps.delete("e", &DeleteParams::default()).await.unwrap();
    create(&maps, json!({"metadata": {"name": "d2", "labels": {"page": "yes"}}})).await;

    let mut names: Vec<_> = first.iter().map(ResourceExt::name_any).collect();
    let mut token = first.metadata.continue_.clone();
    while let Some(next) = token.filter(|token| !token.is_empty()) {
        let page = maps.list(&params.clone().continue_token(&next)).await.unwrap();
        assert_eq!(page.metadata.resource_version, first.metadata.resource_version);
        names.extend(page.iter().map(ResourceExt::name_any));
        token = page.metadata.continue_;
    }
    assert_eq!(names, ["a", "b", "c", "d", "e"]);
}

#[tokio::test]
async fn page_whose_revision_is_compacted_is_answered_with_410_and_a_way_on() {
    let server = Server::start().await;
    let client = server.admin();
    let maps = config_maps(&client);
    for name in ["a", "b", "c"] {
        create(&maps, json!({"metadata": {"name": name}})).await;
    }
    let first = maps.list(&ListParams::default().limit(1)).await.unwrap();
    create(&maps, json!({"metadata": {"name": "d"}})).await;
    server.api.compact().await.unwrap();
    let token = first.metadata.continue_.unwrap();
    let path = format!("/api/v1/namespaces/default/configmaps?limit=1&continue={token}");
    let (code, _, status) = send(&client, "GET", &path, &[], b"").await;
    assert_eq!((code, status["reason"].as_str()), (410, Some("Expired")));
    let token = status["metadata"]["continue"].as_str().unwrap();
    let path = format!("/api/v1/namespaces/default/configmaps?continue={token}");
    let (code, _, rest) = send(&client, "GET", &path, &[], b"").await;
    assert_eq!((code, rest["items"][0]["metadata"]["name"].as_str()), (200, Some("b")));
}

#[tokio::test]
async fn list_is_read_at_the_revision_that_is_asked_for() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    let a = create(&maps, json!({"metadata": {"name": "a"}})).await;
    create(&maps, json!({"metadata": {"name": "b"}})).await;
    let revision = a.resource_version().unwrap();
    let names = async |params: ListParams| -> Vec<String> {
        let list = maps.list(&params).await.unwrap();
        let names = list.iter().map(ResourceExt::name_any);
        names.filter(|name| name.len() == 1).collect()
    };
    let at = |revision: &str| ListParams::default().at(revision);
    assert_eq!(names(at(&revision).matching(VersionMatch::Exact)).await, ["a"]);
    assert_eq!(names(at(&revision).matching(VersionMatch::NotOlderThan)).await, ["a", "b"]);
    assert_eq!(names(at("0")).await, ["a", "b"]);
    let future = refused(maps.list(&at("999999")).await);
    assert_eq!(future.0, 504);
    assert!(future.2.starts_with("Too large resource version"), "{}", future.2);
}

#[tokio::test]
async fn bodies_are_checked_against_the_path() {
    let server = Server::start().await;
    let client = server.admin();
    let path = "/api/v1/namespaces/default/configmaps";
    let json = [("content-type", "application/json")];
    for (body, expected) in [
        (r#"{"kind":"Secret","metadata":{"name":"a"}}"#, 400),
        (r#"{"metadata":{"name":"a","namespace":"other"}}"#, 400),
        (r#"{"metadata":{"name":"a","resourceVersion":"1"}}"#, 400),
        (r#"{"metadata":{"name":"Not_A_Name"}}"#, 422),
        (r#"{"metadata":{}}"#, 422),
        (r#"{"metadata":"#, 400),
        ("[]", 400),
    ] {
        let (code, _, status) = send(&client, "POST", path, &json, body.as_bytes()).await;
        assert_eq!((code, status["kind"].as_str()), (expected, Some("Status")), "{body}: {status}");
    }
    let (code, ..) = send(&client, "POST", path, &[("content-type", "text/html")], b"x").await;
    assert_eq!(code, 415);
    let large = vec![b' '; 4 << 20];
    assert_eq!(send(&client, "POST", path, &json, &large).await.0, 413);
    let missing = "/api/v1/namespaces/nowhere/configmaps";
    let (code, _, status) =
        send(&client, "POST", missing, &json, br#"{"metadata":{"name":"a"}}"#).await;
    assert_eq!((code, status["message"].as_str()), (404, Some("namespaces \"nowhere\" not found")));
    assert_eq!(send(&client, "GET", "/apis/no.such/v1/things", &[], b"").await.0, 404);
}

#[tokio::test]
async fn unknown_fields_are_dropped_warned_about_or_refused() {
    let server = Server::start().await;
    let client = server.admin();
    let body = br#"{"metadata":{"name":"a"},"dada":{"x":"y"}}"#;
    let json = [("content-type", "application/json")];
    let path = "/api/v1/namespaces/default/configmaps?fieldValidation=";
    let strict = send(&client, "POST", &format!("{path}Strict"), &json, body).await;
    assert_eq!(strict.0, 400);
    let message = strict.2["message"].as_str().unwrap();
    assert!(message.contains("strict decoding error: unknown field \"dada\""), "{message}");

    let (code, headers, created) = send(&client, "POST", &format!("{path}Warn"), &json, body).await;
    assert_eq!((code, &created["dada"]), (201, &Value::Null));
    assert_eq!(headers["warning"], "299 - \"unknown field \\\"dada\\\"\"");
}

#[tokio::test]
async fn answers_come_as_tables_metadata_yaml_and_compressed() {
    let server = Server::start().await;
    let client = server.admin();
    let path = "/api/v1/namespaces";
    let table = [("accept", "application/json;as=Table;v=v1;g=meta.k8s.io,application/json")];
    let (_, _, value) = send(&client, "GET", path, &table, b"").await;
    assert_eq!(value["kind"], "Table");
    assert_eq!(value["rows"][0]["cells"][0], "default");

    let metadata = [("accept", "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1")];
    let (_, _, value) = send(&client, "GET", path, &metadata, b"").await;
    assert_eq!(value["items"][0]["kind"], "PartialObjectMetadata");
    assert!(value["items"][0].get("status").is_none());

    let (_, headers, value) =
        send(&client, "GET", path, &[("accept", "application/yaml")], b"").await;
    assert_eq!(headers["content-type"], "application/yaml");
    assert!(value.as_str().unwrap().contains("kind: NamespaceList"));

    let protobuf = [("accept", "application/vnd.kubernetes.protobuf")];
    assert_eq!(send(&client, "GET", path, &protobuf, b"").await.0, 406);
    let gzip = [("accept-encoding", "gzip")];
    let (_, headers, _) = send(&client, "GET", "/openapi/v3/api/v1", &gzip, b"").await;
    assert_eq!(headers["content-encoding"], "gzip");
}

#[tokio::test]
async fn yaml_bodies_are_read() {
    let server = Server::start().await;
    let client = server.admin();
    let body = b"apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: from-yaml\ndata:\n  a: 'yes'\nimmutable: no\n";
    let yaml = [("content-type", "application/yaml")];
    let path = "/api/v1/namespaces/default/configmaps";
    let (code, _, value) = send(&client, "POST", path, &yaml, body).await;
    assert_eq!((code, value["data"]["a"].as_str()), (201, Some("yes")));
}

#[tokio::test]
async fn services_get_addresses_of_their_own() {
    let server = Server::start().await;
    let services: Api<Service> = Api::namespaced(server.admin(), "default");
    let object = |name: &str, spec: Value| json!({"metadata": {"name": name}, "spec": spec});
    let ports = json!([{"port": 80}]);
    let a = create(&services, object("a", json!({"ports": ports}))).await;
    let b = create(&services, object("b", json!({"ports": ports, "type": "NodePort"}))).await;
    let (a, b) = (a.spec.unwrap(), b.spec.unwrap());
    assert!(a.cluster_ip.as_deref().unwrap().starts_with("10.96."));
    assert_ne!(a.cluster_ip, b.cluster_ip);
    assert!((30000..=32767).contains(&b.ports.unwrap()[0].node_port.unwrap()));
    let headless =
        create(&services, object("c", json!({"ports": ports, "clusterIP": "None"}))).await;
    assert_eq!(headless.spec.unwrap().cluster_ip.as_deref(), Some("None"));
    let taken = parse(object("d", json!({"ports": ports, "clusterIP": a.cluster_ip})));
    assert_eq!(refused(services.create(&PostParams::default(), &taken).await).0, 422);
}

#[tokio::test]
async fn secrets_keep_their_text_and_events_are_one_list_in_both_groups() {
    let server = Server::start().await;
    let client = server.admin();
    let secrets: Api<Secret> = Api::namespaced(client.clone(), "default");
    create(&secrets, json!({"metadata": {"name": "s"}, "stringData": {"a": "b"}})).await;
    let found = secrets.get("s").await.unwrap();
    assert_eq!(found.data.unwrap()["a"].0, b"b");
    assert_eq!(found.type_.as_deref(), Some("Opaque"));

    let events: Api<Event> = Api::namespaced(client.clone(), "default");
    create(
        &events,
        json!({"metadata": {"name": "e"}, "reason": "Test", "message": "hello", "type": "Normal",
            "involvedObject": {"kind": "Pod", "name": "p", "namespace": "default"}}),
    )
    .await;
    let selected = ListParams::default().fields("involvedObject.name=p,reason=Test");
    assert_eq!(events.list(&selected).await.unwrap().items.len(), 1);
    let path = "/apis/events.k8s.io/v1/namespaces/default/events/e";
    let (code, _, value) = send(&client, "GET", path, &[], b"").await;
    assert_eq!((code, value["note"].as_str()), (200, Some("hello")), "{value}");
}

#[tokio::test]
async fn bodies_that_nest_too_deep_are_refused() {
    let server = Server::start().await;
    let client = server.admin();
    let deep = format!("{}1{}", "[".repeat(3000), "]".repeat(3000));
    let body = format!("{{\"metadata\":{{\"name\":\"a\"}},\"data\":{deep}}}");
    let path = "/api/v1/namespaces/default/configmaps";
    for format in ["application/json", "application/yaml"] {
        let (code, _, status) =
            send(&client, "POST", path, &[("content-type", format)], body.as_bytes()).await;
        assert_eq!(code, 400, "{format}: {status}");
    }
}
