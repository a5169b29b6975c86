use super::*;
use serde_json::{Value, json};

fn fridge(group: &str) -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("fridges.{group}")},
        "spec": {
            "group": group, "scope": "Namespaced",
            "names": {"plural": "fridges", "singular": "fridge", "kind": "Fridge", "shortNames": ["fr"]},
            "versions": [
                {"name": "v1beta1", "served": true, "storage": false, "schema": {"openAPIV3Schema": {"type": "object"}}},
                {"name": "v1", "served": true, "storage": true,
                 "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                    "spec": {"type": "object", "properties": {"size": {"type": "integer"}}}}}},
                 "subresources": {"status": {}, "scale": {"specReplicasPath": ".spec.size", "statusReplicasPath": ".status.size"}},
                 "selectableFields": [{"jsonPath": ".spec.size"}]},
                {"name": "v1alpha1", "served": false, "storage": false, "schema": {"openAPIV3Schema": {"type": "object"}}},
            ],
        },
    })
}

#[test]
fn every_built_in_resource_has_a_schema() {
    for resource in Catalog::builtin().resources() {
        let Node::Ref(name) = &resource.schema else {
            panic!("{} has no definition", resource.kind);
        };
        assert!(Catalog::builtin().schemas().definitions.contains_key(name), "{name}");
    }
}

#[test]
fn resources_are_found_by_plural_and_by_kind() {
    let catalog = Catalog::builtin();
    let pods = catalog.find("", "v1", "pods").unwrap();
    assert_eq!(&*pods.kind, "Pod");
    assert!(pods.namespaced && pods.has_status && pods.is_stored());
    assert_eq!(pods.api_version(), "v1");
    assert_eq!(&*pods.subresource("eviction").unwrap().group, "policy");

    let deployment = catalog.find_kind("apps", "v1", "Deployment").unwrap();
    assert_eq!(deployment.scale_paths.as_ref().unwrap().spec_replicas, ".spec.replicas");
    assert_eq!(deployment.api_version(), "apps/v1");
    assert!(!catalog.find_kind("", "v1", "Binding").unwrap().is_stored());
    assert!(catalog.find("apps", "v1beta1", "deployments").is_none());
}

#[test]
fn custom_resources_are_served_in_their_served_versions() {
    let catalog = Catalog::with_crds(&[fridge("shop.example")]);
    let fridge = catalog.find("shop.example", "v1", "fridges").unwrap();

    assert!(fridge.custom && fridge.has_status);
    assert_eq!(fridge.selectable_fields, ["spec.size"]);
    assert_eq!(&*fridge.subresource("scale").unwrap().group, "autoscaling");
    let schema = catalog.schemas().resolve(&fridge.schema);
    assert!(schema.properties.contains_key("metadata"));
    assert!(catalog.find("shop.example", "v1beta1", "fridges").is_some());
    assert!(catalog.find("shop.example", "v1alpha1", "fridges").is_none());
    assert!(Catalog::builtin().find("shop.example", "v1", "fridges").is_none());

    let groups = catalog.groups();
    assert_eq!(&*groups.last().unwrap().versions[0], "v1");
    assert_eq!(groups[0].name, "".into());
}

#[test]
fn refused_and_colliding_definitions_are_not_served() {
    let mut refused = fridge("a.example");
    refused["status"]["conditions"] = json!([{"type": "NamesAccepted", "status": "False"}]);
    let mut second = fridge("b.example");
    second["spec"]["names"]["plural"] = "coolers".into();
    let catalog = Catalog::with_crds(&[refused, fridge("b.example"), second]);

    assert!(catalog.find("a.example", "v1", "fridges").is_none());
    assert!(catalog.find("b.example", "v1", "fridges").is_some());
    assert!(catalog.find("b.example", "v1", "coolers").is_none());
}

#[test]
fn versions_are_ordered_by_stability_and_then_by_number() {
    let mut versions = ["v1alpha1", "foo", "v1", "v10", "v2beta1", "v2", "v1beta2", "bar"];
    versions.sort_by(|a, b| compare_versions(a, b));
    assert_eq!(versions, ["v10", "v2", "v1", "v2beta1", "v1beta2", "v1alpha1", "bar", "foo"]);
}
