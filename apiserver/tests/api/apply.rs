//! Server-side apply and field ownership through the server.

use crate::support::*;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

fn config(data: Value) -> Patch<Value> {
    Patch::Apply(json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": data,
    }))
}

async fn apply(maps: &Api<ConfigMap>, manager: &str, data: Value) -> kube::Result<ConfigMap> {
    maps.patch("a", &PatchParams::apply(manager), &config(data)).await
}

fn data(map: ConfigMap) -> Value {
    serde_json::to_value(map.data.unwrap_or_default()).unwrap()
}

#[tokio::test]
async fn apply_creates_merges_and_takes_back_what_left_the_configuration() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    apply(&maps, "one", json!({"a": "1", "b": "1"})).await.unwrap();
    apply(&maps, "two", json!({"c": "2"})).await.unwrap();
    let merged = apply(&maps, "one", json!({"a": "9"})).await.unwrap();
    assert_eq!(data(merged), json!({"a": "9", "c": "2"}));
}

#[tokio::test]
async fn apply_of_the_same_changes_nothing() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    let first = apply(&maps, "one", json!({"a": "1"})).await.unwrap();
    let second = apply(&maps, "one", json!({"a": "1"})).await.unwrap();
    assert_eq!(first.resource_version(), second.resource_version());
}

#[tokio::test]
async fn field_of_another_manager_is_a_conflict_unless_forced() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    apply(&maps, "one", json!({"a": "1"})).await.unwrap();
    let (code, reason, message) = refused(apply(&maps, "two", json!({"a": "2"})).await);
    assert_eq!((code, reason.as_str()), (409, "Conflict"));
    assert!(message.contains("conflict with \"one\""), "{message}");
    let params = PatchParams::apply("two").force();
    let forced = maps.patch("a", &params, &config(json!({"a": "2"}))).await.unwrap();
    assert_eq!(data(forced), json!({"a": "2"}));
}

#[tokio::test]
async fn every_write_names_its_manager() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    let params = PostParams { field_manager: Some("maker".into()), ..PostParams::default() };
    maps.create(&params, &config_map("a", "1")).await.unwrap();
    let patch = Patch::Merge(json!({"data": {"other": "2"}}));
    let patched = maps.patch("a", &PatchParams::default(), &patch).await.unwrap();
    let managers: Vec<_> = patched
        .metadata
        .managed_fields
        .unwrap()
        .into_iter()
        .map(|entry| (entry.manager.unwrap(), entry.operation.unwrap()))
        .collect();
    let update = |name: &str| (name.to_owned(), "Update".to_owned());
    assert_eq!(managers, [update("maker"), update("unknown")]);
}

#[tokio::test]
async fn apply_without_a_manager_or_with_unknown_fields_is_refused() {
    let server = Server::start().await;
    let client = server.admin();
    let headers = [("content-type", "application/apply-patch+yaml")];
    let path = "/api/v1/namespaces/default/configmaps/a";
    let body = br#"{"apiVersion":"v1","kind":"ConfigMap","data":{}}"#;
    let (code, _, status) = send(&client, "PATCH", path, &headers, body).await;
    assert_eq!(code, 422, "{status}");
    let typo = br#"{"apiVersion":"v1","kind":"ConfigMap","dada":{}}"#;
    let with_manager = format!("{path}?fieldManager=m");
    let (code, _, status) = send(&client, "PATCH", &with_manager, &headers, typo).await;
    assert_eq!(code, 400);
    let message = status["message"].as_str().unwrap();
    assert!(message.contains(".dada: field not declared in schema"), "{message}");
    assert!(config_maps(&client).get_opt("a").await.unwrap().is_none());
}
