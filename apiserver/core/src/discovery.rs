//! Discovery documents: what kubectl and controllers read before anything else.
//!
//! The HTTP server answers `/api`, `/apis`, `/apis/<group>` and `/apis/<group>/<version>` with these values. The
//! aggregated form is one document for all groups and is sent only to clients that ask for it by
//! [`AGGREGATED_V2`] or [`AGGREGATED_V2BETA1`].
//!
//! Source: Kubernetes, `staging/src/k8s.io/api/apidiscovery/v2/types.go` and the answers of its API server.

use crate::catalog::{Catalog, Group, Resource, Subresource};
use serde_json::{Value, json};

/// Content type of [`aggregated_core`] and [`aggregated_groups`] at version `v2`.
pub const AGGREGATED_V2: &str =
    "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
/// Content type of the same documents at version `v2beta1`.
pub const AGGREGATED_V2BETA1: &str =
    "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList";

/// `GET /api`.
pub fn core_versions() -> Value {
    json!({
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [],
    })
}

/// `GET /apis`.
pub fn groups(catalog: &Catalog) -> Value {
    let groups: Vec<Value> = named_groups(catalog).iter().map(api_group).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `GET /apis/<group>`; `None` when the group is unknown.
pub fn group(catalog: &Catalog, name: &str) -> Option<Value> {
    let groups = named_groups(catalog);
    let found = groups.iter().find(|group| &*group.name == name)?;
    let mut value = api_group(found);
    value["kind"] = "APIGroup".into();
    value["apiVersion"] = "v1".into();
    Some(value)
}

/// `GET /api/v1` (with an empty `group`) and `GET /apis/<group>/<version>`; `None` when nothing is served there.
pub fn resources(catalog: &Catalog, group: &str, version: &str) -> Option<Value> {
    let mut rows = Vec::new();
    for resource in catalog.resources_of(group, version) {
        rows.push(legacy_resource(resource));
        rows.extend(resource.subresources.iter().map(|sub| legacy_subresource(resource, sub)));
    }
    if rows.is_empty() {
        return None;
    }
    Some(json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": group_version(group, version),
        "resources": rows,
    }))
}

/// `GET /api` in aggregated form; `beta` asks for `v2beta1`.
pub fn aggregated_core(catalog: &Catalog, beta: bool) -> Value {
    aggregated(catalog, beta, |group| group.name.is_empty())
}

/// `GET /apis` in aggregated form; `beta` asks for `v2beta1`.
pub fn aggregated_groups(catalog: &Catalog, beta: bool) -> Value {
    aggregated(catalog, beta, |group| !group.name.is_empty())
}

fn named_groups(catalog: &Catalog) -> Vec<Group> {
    catalog.groups().into_iter().filter(|group| !group.name.is_empty()).collect()
}

fn group_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.into() } else { format!("{group}/{version}") }
}

fn api_group(group: &Group) -> Value {
    let versions: Vec<Value> = group
        .versions
        .iter()
        .map(|version| json!({"groupVersion": group_version(&group.name, version), "version": version}))
        .collect();
    json!({"name": group.name, "preferredVersion": versions.first(), "versions": versions})
}

fn legacy_resource(resource: &Resource) -> Value {
    let mut row = json!({
        "name": resource.plural,
        "singularName": resource.singular,
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": resource.verbs,
    });
    if !resource.short_names.is_empty() {
        row["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        row["categories"] = json!(resource.categories);
    }
    row
}

fn legacy_subresource(resource: &Resource, sub: &Subresource) -> Value {
    let mut row = json!({
        "name": format!("{}/{}", resource.plural, sub.name),
        "singularName": "",
        "namespaced": resource.namespaced,
        "kind": sub.kind,
        "verbs": sub.verbs,
    });
    // `kubectl drain` finds the eviction API by these two.
    if (&sub.group, &sub.version) != (&resource.group, &resource.version) {
        row["group"] = json!(sub.group);
        row["version"] = json!(sub.version);
    }
    row
}

fn aggregated(catalog: &Catalog, beta: bool, wanted: impl Fn(&Group) -> bool) -> Value {
    let items: Vec<Value> = catalog
        .groups()
        .iter()
        .filter(|group| wanted(group))
        .map(|group| {
            let versions: Vec<Value> = group
                .versions
                .iter()
                .map(|version| {
                    let resources: Vec<Value> = catalog
                        .resources_of(&group.name, version)
                        .map(|one| aggregated_resource(one))
                        .collect();
                    json!({"version": version, "freshness": "Current", "resources": resources})
                })
                .collect();
            let metadata = match &*group.name {
                "" => json!({"creationTimestamp": null}),
                name => json!({"name": name, "creationTimestamp": null}),
            };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    let version = if beta { "v2beta1" } else { "v2" };
    json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": format!("apidiscovery.k8s.io/{version}"),
        "metadata": {},
        "items": items,
    })
}

fn aggregated_resource(resource: &Resource) -> Value {
    let mut row = json!({
        "resource": resource.plural,
        "responseKind": {"group": resource.group, "version": resource.version, "kind": resource.kind},
        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": resource.singular,
        "verbs": resource.verbs,
    });
    if !resource.short_names.is_empty() {
        row["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        row["categories"] = json!(resource.categories);
    }
    if !resource.subresources.is_empty() {
        let subresources: Vec<Value> = resource
            .subresources
            .iter()
            .map(|sub| {
                json!({
                    "subresource": sub.name,
                    "responseKind": {"group": sub.group, "version": sub.version, "kind": sub.kind},
                    "verbs": sub.verbs,
                })
            })
            .collect();
        row["subresources"] = subresources.into();
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named<'a>(rows: &'a Value, key: &str, name: &str) -> &'a Value {
        let rows = rows.as_array().unwrap();
        rows.iter().find(|row| row[key] == name).unwrap_or_else(|| panic!("no {name}"))
    }

    #[test]
    fn drain_finds_eviction_with_its_own_group() {
        let list = resources(&Catalog::builtin(), "", "v1").unwrap();
        let eviction = named(&list["resources"], "name", "pods/eviction");
        assert_eq!(eviction["group"], "policy");
        assert_eq!(eviction["version"], "v1");
        assert_eq!(eviction["kind"], "Eviction");
        let status = named(&list["resources"], "name", "pods/status");
        assert_eq!(status.get("group"), None);
        assert_eq!(named(&list["resources"], "name", "pods")["shortNames"], json!(["po"]));
    }

    #[test]
    fn groups_are_listed_without_the_core_group() {
        let list = groups(&Catalog::builtin());
        let apps = named(&list["groups"], "name", "apps");
        assert_eq!(apps["preferredVersion"]["groupVersion"], "apps/v1");
        assert!(list["groups"].as_array().unwrap().iter().all(|group| group["name"] != ""));
        assert_eq!(group(&Catalog::builtin(), "apps").unwrap()["kind"], "APIGroup");
        assert_eq!(group(&Catalog::builtin(), "nowhere"), None);
        assert_eq!(resources(&Catalog::builtin(), "apps", "v2"), None);
    }

    #[test]
    fn aggregated_documents_split_core_from_named_groups() {
        let catalog = Catalog::builtin();
        let core = aggregated_core(&catalog, false);
        assert_eq!(core["apiVersion"], "apidiscovery.k8s.io/v2");
        assert_eq!(core["items"].as_array().unwrap().len(), 1);
        let pods = named(&core["items"][0]["versions"][0]["resources"], "resource", "pods");
        assert_eq!(pods["responseKind"], json!({"group": "", "version": "v1", "kind": "Pod"}));
        assert_eq!(named(&pods["subresources"], "subresource", "log")["verbs"], json!(["get"]));

        let named_groups = aggregated_groups(&catalog, true);
        assert_eq!(named_groups["apiVersion"], "apidiscovery.k8s.io/v2beta1");
        let names: Vec<&str> = named_groups["items"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|item| item["metadata"]["name"].as_str())
            .collect();
        assert_eq!(names.len(), catalog.groups().len() - 1);
        assert!(names.contains(&"rbac.authorization.k8s.io"));
    }
}
