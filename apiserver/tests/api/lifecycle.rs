//! Deletion in all its forms, namespaces, owners.

use crate::support::*;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, ServiceAccount};
use kube::api::{
    Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy,
};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

async fn bind(client: &Client, name: &str, node: &str) -> kube::Result<Value> {
    let binding = json!({
        "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
        "target": {"apiVersion": "v1", "kind": "Node", "name": node},
    });
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    pods.create_subresource("binding", name, &PostParams::default(), &binding).await
}

async fn owned(maps: &Api<ConfigMap>, name: &str, owner: &ConfigMap) {
    let reference = json!({"apiVersion": "v1", "kind": "ConfigMap", "name": owner.name_any(),
        "uid": owner.uid(), "blockOwnerDeletion": true});
    create(maps, json!({"metadata": {"name": name, "ownerReferences": [reference]}})).await;
}

#[tokio::test]
async fn finalizer_holds_an_object_until_it_is_taken_off() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    create(&maps, json!({"metadata": {"name": "a", "finalizers": ["example.com/f"]}})).await;
    let marked = maps.delete("a", &DeleteParams::default()).await.unwrap().left().unwrap();
    assert!(marked.metadata.deletion_timestamp.is_some());

    let more =
        Patch::Merge(json!({"metadata": {"finalizers": ["example.com/f", "example.com/g"]}}));
    let none = PatchParams::default();
    let refusal = refused(maps.patch("a", &none, &more).await);
    assert_eq!(refusal.0, 422);
    assert!(refusal.2.contains("no new finalizers can be added"), "{}", refusal.2);

    let off = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    maps.patch("a", &none, &off).await.unwrap();
    assert!(maps.get_opt("a").await.unwrap().is_none());
}

#[tokio::test]
async fn preconditions_protect_another_object_of_the_same_name() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    create(&maps, json!({"metadata": {"name": "a"}})).await;
    let wrong = Preconditions { uid: Some("other".into()), resource_version: None };
    let params = DeleteParams::default().preconditions(wrong);
    assert_eq!(refused(maps.delete("a", &params).await).0, 409);
    assert!(maps.get_opt("a").await.unwrap().is_some());
}

#[tokio::test]
async fn unbound_pod_vanishes_and_bound_pod_waits_for_its_node() {
    let server = Server::start().await;
    let client = server.admin();
    let pods = pods(&client);
    create(&pods, pod("loose")).await;
    pods.delete("loose", &DeleteParams::default()).await.unwrap();
    assert!(pods.get_opt("loose").await.unwrap().is_none());

    create(&pods, pod("bound")).await;
    bind(&client, "bound", "n1").await.unwrap();
    assert_eq!(refused(bind(&client, "bound", "n2").await).0, 409);
    let found = pods.get("bound").await.unwrap();
    assert_eq!(found.spec.unwrap().node_name.as_deref(), Some("n1"));

    let marked = pods.delete("bound", &DeleteParams::default()).await.unwrap().left().unwrap();
    assert_eq!(marked.metadata.deletion_grace_period_seconds, Some(30));
    let shorter = DeleteParams { grace_period_seconds: Some(5), ..DeleteParams::default() };
    let marked = pods.delete("bound", &shorter).await.unwrap().left().unwrap();
    assert_eq!(marked.metadata.deletion_grace_period_seconds, Some(5));
    let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    pods.delete("bound", &now).await.unwrap();
    assert!(pods.get_opt("bound").await.unwrap().is_none());
}

#[tokio::test]
async fn eviction_deletes_a_pod() {
    let server = Server::start().await;
    let pods = pods(&server.admin());
    create(&pods, pod("p")).await;
    pods.evict("p", &Default::default()).await.unwrap();
    gone(&pods, "p").await;
}

#[tokio::test]
async fn collection_is_deleted_by_selector() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    for (name, label) in [("a", "x"), ("b", "x"), ("c", "y")] {
        create(&maps, json!({"metadata": {"name": name, "labels": {"l": label}}})).await;
    }
    let selected = ListParams::default().labels("l=x");
    maps.delete_collection(&DeleteParams::default(), &selected).await.unwrap();
    let left = maps.list(&ListParams::default().labels("l")).await.unwrap();
    assert_eq!(left.iter().map(ResourceExt::name_any).collect::<Vec<_>>(), ["c"]);
}

#[tokio::test]
async fn dependents_follow_their_owner_in_the_background() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    let owner = create(&maps, json!({"metadata": {"name": "owner"}})).await;
    owned(&maps, "child", &owner).await;
    maps.delete("owner", &DeleteParams::background()).await.unwrap();
    assert!(maps.get_opt("owner").await.unwrap().is_none());
    gone(&maps, "child").await;
}

#[tokio::test]
async fn object_whose_owner_never_existed_is_collected() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    let mut ghost = create(&maps, json!({"metadata": {"name": "a"}})).await;
    ghost.metadata.uid = Some("11111111-2222-3333-4444-555555555555".into());
    owned(&maps, "child", &ghost).await;
    gone(&maps, "child").await;
}

#[tokio::test]
async fn foreground_deletion_keeps_the_owner_until_its_dependents_are_gone() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    let owner = create(&maps, json!({"metadata": {"name": "owner"}})).await;
    owned(&maps, "child", &owner).await;
    let hold = Patch::Merge(json!({"metadata": {"finalizers": ["example.com/hold"]}}));
    maps.patch("child", &PatchParams::default(), &hold).await.unwrap();
    maps.delete("owner", &DeleteParams::foreground()).await.unwrap();
    eventually("the child is marked", || async {
        maps.get("child").await.unwrap().metadata.deletion_timestamp
    })
    .await;
    assert!(maps.get_opt("owner").await.unwrap().is_some(), "the owner waits");
    let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    maps.patch("child", &PatchParams::default(), &release).await.unwrap();
    gone(&maps, "owner").await;
}

#[tokio::test]
async fn orphaned_dependents_stay_without_their_owner() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    let owner = create(&maps, json!({"metadata": {"name": "owner"}})).await;
    owned(&maps, "child", &owner).await;
    let orphan = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Orphan),
        ..DeleteParams::default()
    };
    maps.delete("owner", &orphan).await.unwrap();
    gone(&maps, "owner").await;
    assert!(maps.get("child").await.unwrap().owner_references().is_empty());
}

#[tokio::test]
async fn namespace_is_furnished_and_goes_with_all_it_holds() {
    let server = Server::start().await;
    let client = server.admin();
    let namespaces = namespaces(&client);
    let created: Namespace = create(&namespaces, json!({"metadata": {"name": "site"}})).await;
    assert_eq!(created.status.unwrap().phase.as_deref(), Some("Active"));
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "site");
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "site");
    eventually("the namespace is furnished", || async {
        accounts.get_opt("default").await.unwrap()?;
        maps.get_opt("kube-root-ca.crt").await.unwrap()
    })
    .await;
    create(&maps, json!({"metadata": {"name": "a", "finalizers": ["example.com/hold"]}})).await;

    let marked = namespaces.delete("site", &DeleteParams::default()).await.unwrap().left().unwrap();
    assert_eq!(marked.status.unwrap().phase.as_deref(), Some("Terminating"));
    let late = maps.create(&PostParams::default(), &config_map("late", "1")).await;
    let (code, _, message) = refused(late);
    assert_eq!(code, 403);
    assert!(message.contains("because it is being terminated"), "{message}");

    eventually("the map is marked", || async {
        maps.get("a").await.unwrap().metadata.deletion_timestamp
    })
    .await;
    assert!(namespaces.get_opt("site").await.unwrap().is_some());
    let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    maps.patch("a", &PatchParams::default(), &release).await.unwrap();
    gone(&namespaces, "site").await;
}

#[tokio::test]
async fn every_cluster_has_its_first_objects() {
    let server = Server::start().await;
    let client = server.admin();
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        assert!(namespaces(&client).get_opt(name).await.unwrap().is_some(), "{name}");
    }
    let (code, _, service) =
        send(&client, "GET", "/api/v1/namespaces/default/services/kubernetes", &[], b"").await;
    assert_eq!((code, service["spec"]["clusterIP"].as_str()), (200, Some("10.96.0.1")));
}

#[tokio::test]
async fn replaced_namespace_keeps_what_holds_it_and_vital_ones_stay() {
    let server = Server::start().await;
    let namespaces = namespaces(&server.admin());
    let mut site = create(&namespaces, json!({"metadata": {"name": "site"}})).await;
    site.spec = None;
    site.metadata.labels.get_or_insert_default().insert("a".into(), "b".into());
    let replaced = namespaces.replace("site", &PostParams::default(), &site).await.unwrap();
    assert_eq!(replaced.spec.unwrap().finalizers.unwrap(), ["kubernetes"]);
    let refusal = refused(namespaces.delete("kube-system", &DeleteParams::default()).await);
    assert_eq!(refusal.0, 403);
}
