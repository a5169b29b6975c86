//! CustomResourceDefinitions and their objects.

use crate::support::*;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Client;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::GroupVersionKind;
use kube::runtime::{conditions, wait::await_condition};
use serde_json::{Value, json};

fn definition() -> Value {
    json!({
        "metadata": {"name": "wells.example.com"},
        "spec": {
            "group": "example.com", "scope": "Namespaced",
            "names": {"plural": "wells", "singular": "well", "kind": "Well", "listKind": "WellList"},
            "versions": [{
                "name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                    "spec": {"type": "object", "required": ["depth"], "properties": {
                        "depth": {"type": "integer", "minimum": 1},
                        "unit": {"type": "string", "default": "m", "enum": ["m", "ft"]},
                    }},
                    "status": {"type": "object", "properties": {"wet": {"type": "boolean"}}},
                }}},
            }],
        },
    })
}

fn well(name: &str, depth: Value) -> DynamicObject {
    parse(json!({
        "apiVersion": "example.com/v1", "kind": "Well", "metadata": {"name": name},
        "spec": {"depth": depth, "colour": "blue"},
    }))
}

fn wells(client: &Client) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("example.com", "v1", "Well");
    let resource = ApiResource::from_gvk_with_plural(&kind, "wells");
    Api::namespaced_with(client.clone(), "default", &resource)
}

fn definitions(client: &Client) -> Api<CustomResourceDefinition> {
    Api::all(client.clone())
}

#[tokio::test]
async fn definition_is_established_and_its_objects_are_served_at_once() {
    let server = Server::start().await;
    let client = server.admin();
    create(&definitions(&client), definition()).await;
    let established = conditions::is_crd_established();
    let wait = await_condition(definitions(&client), "wells.example.com", established);
    within("the definition is established", wait).await.unwrap();

    let created =
        wells(&client).create(&PostParams::default(), &well("a", json!(3))).await.unwrap();
    assert_eq!(created.data["spec"], json!({"depth": 3, "unit": "m"}), "pruned and defaulted");
    let (code, _, document) = send(&client, "GET", "/apis/example.com/v1", &[], b"").await;
    assert_eq!((code, document["resources"][0]["name"].as_str()), (200, Some("wells")));
}

#[tokio::test]
async fn object_that_breaks_its_schema_is_refused_field_by_field() {
    let server = Server::start().await;
    let client = server.admin();
    create(&definitions(&client), definition()).await;
    let wells = wells(&client);
    let post = PostParams::default();
    for depth in [json!(0), json!("deep"), Value::Null] {
        let (code, reason, message) = refused(wells.create(&post, &well("a", depth)).await);
        assert_eq!((code, reason.as_str()), (422, "Invalid"));
        assert!(message.contains("spec.depth"), "{message}");
    }
}

#[tokio::test]
async fn status_of_a_custom_object_is_a_subresource() {
    let server = Server::start().await;
    let client = server.admin();
    create(&definitions(&client), definition()).await;
    let wells = wells(&client);
    wells.create(&PostParams::default(), &well("a", json!(3))).await.unwrap();
    let none = PatchParams::default();
    let patch = Patch::Merge(json!({"spec": {"depth": 9}, "status": {"wet": true}}));
    let after = wells.patch_status("a", &none, &patch).await.unwrap();
    assert_eq!(
        (&after.data["spec"]["depth"], &after.data["status"]["wet"]),
        (&json!(3), &json!(true))
    );
    assert_eq!(after.metadata.generation, Some(1));
    let after = wells.patch("a", &none, &patch).await.unwrap();
    assert_eq!((after.metadata.generation, &after.data["spec"]["depth"]), (Some(2), &json!(9)));
}

#[tokio::test]
async fn custom_objects_are_applied_with_ownership() {
    let server = Server::start().await;
    let client = server.admin();
    create(&definitions(&client), definition()).await;
    let wells = wells(&client);
    let config = |depth: i64| {
        Patch::Apply(json!({"apiVersion": "example.com/v1", "kind": "Well",
            "metadata": {"name": "a"}, "spec": {"depth": depth}}))
    };
    wells.patch("a", &PatchParams::apply("one"), &config(1)).await.unwrap();
    let conflict = refused(wells.patch("a", &PatchParams::apply("two"), &config(2)).await);
    assert_eq!(conflict.0, 409);
    assert!(conflict.2.contains(".spec.depth"), "{}", conflict.2);
}

#[tokio::test]
async fn deleted_definition_takes_its_objects_along() {
    let server = Server::start().await;
    let client = server.admin();
    let definitions = definitions(&client);
    create(&definitions, definition()).await;
    wells(&client).create(&PostParams::default(), &well("a", json!(3))).await.unwrap();
    definitions.delete("wells.example.com", &DeleteParams::default()).await.unwrap();
    gone(&definitions, "wells.example.com").await;
    assert_eq!(refused(wells(&client).get("a").await).0, 404);

    create(&definitions, definition()).await;
    assert!(wells(&client).get_opt("a").await.unwrap().is_none(), "the old object stays gone");
}

#[tokio::test]
async fn definition_that_cannot_be_served_is_refused() {
    let server = Server::start().await;
    let definitions = definitions(&server.admin());
    let mut broken = definition();
    broken["metadata"]["name"] = "well.example.com".into();
    let (code, _, message) =
        refused(definitions.create(&PostParams::default(), &parse(broken)).await);
    assert_eq!(code, 422);
    assert!(message.contains("metadata.name"), "{message}");
}

#[tokio::test]
async fn definitions_are_served_again_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let server = skerry_apiserver::ApiServer::start(config(dir.path())).await.unwrap();
    let client = server.client("admin", &[skerry_apiserver::auth::MASTERS]);
    create(&definitions(&client), definition()).await;
    wells(&client).create(&PostParams::default(), &well("a", json!(3))).await.unwrap();
    server.shutdown().await;
    drop(client);

    let server = skerry_apiserver::ApiServer::start(config(dir.path())).await.unwrap();
    let client = server.client("admin", &[skerry_apiserver::auth::MASTERS]);
    assert_eq!(wells(&client).get("a").await.unwrap().data["spec"]["depth"], 3);
    server.shutdown().await;
}
