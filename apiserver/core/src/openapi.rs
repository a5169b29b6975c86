//! OpenAPI v3 documents, made when a client asks and not kept.
//!
//! kubectl reads them to validate, to diff and to explain: it looks for the operations of a kind (by
//! `x-kubernetes-group-version-kind`), their query parameters, and the component schema of the kind. Paths are
//! therefore complete in number and skeletal in content, and the schemas of built-in kinds have no descriptions.
//! Custom resources bring their own schema, with its descriptions.
//!
//! Source: the OpenAPI v3 documents of Kubernetes 1.36 and what kubectl 1.34 to 1.37 ask of them.

use crate::catalog::{Catalog, Resource, Subresource};
use crate::facts::{Definition, Field, OBJECT_META, Shape, TABLE, facts};
use crate::schema::{ListType, Node};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const DELETE_OPTIONS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions";
const STATUS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Status";
const PATCH: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Patch";

/// `GET /openapi/v3`: one entry per group and version, with a hash that changes with the content.
pub fn index(catalog: &Catalog) -> Value {
    let mut paths = Map::new();
    for group in catalog.groups() {
        for version in &group.versions {
            let path = match &*group.name {
                "" => format!("api/{version}"),
                name => format!("apis/{name}/{version}"),
            };
            let hash = hash(catalog, &group.name, version);
            let url = format!("/openapi/v3/{path}?hash={hash}");
            paths.insert(path, json!({"serverRelativeURL": url}));
        }
    }
    json!({"paths": paths})
}

/// `GET /openapi/v3/<path>`, where `path` is `api/v1` or `apis/<group>/<version>`.
pub fn document(catalog: &Catalog, path: &str) -> Option<Value> {
    let parts: Vec<&str> = path.split('/').collect();
    let (group, version) = match parts.as_slice() {
        ["api", version] => ("", *version),
        ["apis", group, version] => (*group, *version),
        _ => return None,
    };
    let mut paths = Map::new();
    let mut components = Components::default();
    for resource in catalog.resources_of(group, version) {
        add_paths(&mut paths, resource, &mut components);
    }
    if paths.is_empty() {
        return None;
    }
    Some(json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.36"},
        "paths": paths,
        "components": {"schemas": components.finish()},
    }))
}

/// Upper-case hexadecimal digest of everything that [`document`] depends on.
fn hash(catalog: &Catalog, group: &str, version: &str) -> String {
    let mut digest = Sha256::new();
    digest.update(env!("CARGO_PKG_VERSION"));
    digest.update(TABLE);
    for resource in catalog.resources_of(group, version) {
        let subresources: Vec<&str> = resource.subresources.iter().map(|one| &*one.name).collect();
        let (plural, kind) = (&resource.plural, &resource.kind);
        let open_api = resource.open_api.as_deref().unwrap_or("");
        digest.update(format!("{plural}\n{kind}\n{}\n", resource.namespaced));
        digest.update(format!("{}\n{open_api}\n", subresources.join(",")));
    }
    digest.finalize().iter().map(|byte| format!("{byte:02X}")).collect()
}

/// Name of the component schema of a resource's kind.
pub fn component_name(resource: &Resource) -> String {
    match &resource.schema {
        Node::Ref(name) => name.to_string(),
        Node::Inline(_) => {
            let reversed: Vec<&str> = resource.group.rsplit('.').collect();
            format!("{}.{}.{}", reversed.join("."), resource.version, resource.kind)
        }
    }
}

fn add_paths(paths: &mut Map<String, Value>, resource: &Resource, components: &mut Components) {
    let base = match &*resource.group {
        "" => format!("/api/{}", resource.version),
        group => format!("/apis/{group}/{}", resource.version),
    };
    let plural = &resource.plural;
    let collection = if resource.namespaced {
        format!("{base}/namespaces/{{namespace}}/{plural}")
    } else {
        format!("{base}/{plural}")
    };
    let body = component_name(resource);
    components.want_resource(resource, &body);
    let list = format!("{body}List");
    let gvk = gvk(&resource.group, &resource.version, &resource.kind);
    let has = |verb: &str| resource.verbs.contains(&verb);

    let mut operations = Map::new();
    if has("list") {
        components.want_list(resource, &list, &body);
        operations.insert("get".into(), operation("list", &gvk, &[], None, &list));
        if resource.namespaced {
            let all = json!({"get": operation("list", &gvk, &[], None, &list)});
            paths.insert(format!("{base}/{plural}"), all);
        }
    }
    if has("create") {
        operations.insert("post".into(), operation("post", &gvk, WRITE, Some(&body), &body));
    }
    if has("deletecollection") {
        let delete = operation("deletecollection", &gvk, DELETE, Some(DELETE_OPTIONS), STATUS);
        operations.insert("delete".into(), delete);
    }
    insert_path(paths, &collection, operations, resource.namespaced, false);

    let mut operations = Map::new();
    if has("get") {
        operations.insert("get".into(), operation("get", &gvk, &[], None, &body));
    }
    if has("update") {
        operations.insert("put".into(), operation("put", &gvk, WRITE, Some(&body), &body));
    }
    if has("patch") {
        operations.insert("patch".into(), patch_operation(&gvk, &body));
    }
    if has("delete") {
        let delete = operation("delete", &gvk, DELETE, Some(DELETE_OPTIONS), STATUS);
        operations.insert("delete".into(), delete);
    }
    let item = format!("{collection}/{{name}}");
    insert_path(paths, &item, operations, resource.namespaced, true);

    for sub in &resource.subresources {
        let operations = subresource_operations(resource, sub, &body, components);
        let path = format!("{item}/{}", sub.name);
        insert_path(paths, &path, operations, resource.namespaced, true);
    }
}

fn subresource_operations(
    resource: &Resource,
    sub: &Subresource,
    owner: &str,
    components: &mut Components,
) -> Map<String, Value> {
    let gvk = gvk(&sub.group, &sub.version, &sub.kind);
    let own = sub.kind == resource.kind && sub.group == resource.group;
    let definition = facts().kind(&sub.group, &sub.version, &sub.kind);
    let body = match definition {
        _ if own => owner.to_owned(),
        Some(definition) => {
            components.want(&definition.name);
            definition.name.to_string()
        }
        None => STATUS.to_owned(), // streams: exec, attach, portforward have no body
    };
    let mut operations = Map::new();
    for verb in sub.verbs {
        match *verb {
            "get" => operations.insert("get".into(), operation("get", &gvk, &[], None, &body)),
            "update" => {
                let put = operation("put", &gvk, WRITE, Some(&body), &body);
                operations.insert("put".into(), put)
            }
            "patch" => operations.insert("patch".into(), patch_operation(&gvk, &body)),
            "create" => {
                let post = operation("post", &gvk, WRITE, Some(&body), &body);
                operations.insert("post".into(), post)
            }
            _ => None,
        };
    }
    operations
}

fn insert_path(
    paths: &mut Map<String, Value>,
    path: &str,
    mut operations: Map<String, Value>,
    namespaced: bool,
    named: bool,
) {
    if operations.is_empty() {
        return;
    }
    let in_path = |name: &str| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "uniqueItems": true}});
    let mut parameters = Vec::new();
    if named {
        parameters.push(in_path("name"));
    }
    if namespaced {
        parameters.push(in_path("namespace"));
    }
    operations.insert("parameters".into(), parameters.into());
    paths.insert(path.into(), operations.into());
}

const WRITE: &[&str] = &["dryRun", "fieldManager", "fieldValidation"];
const DELETE: &[&str] = &["dryRun", "gracePeriodSeconds", "orphanDependents", "propagationPolicy"];

fn patch_operation(gvk: &Value, body: &str) -> Value {
    let query = ["dryRun", "fieldManager", "fieldValidation", "force"];
    let mut operation = operation("patch", gvk, &query, None, body);
    let schema = json!({"schema": {"$ref": reference(PATCH)}});
    let types = [
        "application/apply-patch+yaml",
        "application/json-patch+json",
        "application/merge-patch+json",
        "application/strategic-merge-patch+json",
    ];
    let content: Map<String, Value> =
        types.iter().map(|ty| ((*ty).into(), schema.clone())).collect();
    operation["requestBody"] = json!({"content": content, "required": true});
    operation
}

fn operation(action: &str, gvk: &Value, query: &[&str], body: Option<&str>, answer: &str) -> Value {
    let parameters: Vec<Value> = query
        .iter()
        .map(|name| {
            let ty = match *name {
                "force" | "orphanDependents" => "boolean",
                "gracePeriodSeconds" => "integer",
                _ => "string",
            };
            json!({"name": name, "in": "query", "schema": {"type": ty, "uniqueItems": true}})
        })
        .collect();
    let content = |name: &str| json!({"application/json": {"schema": {"$ref": reference(name)}}});
    let mut operation = json!({
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": gvk,
        "parameters": parameters,
        "responses": {"200": {"description": "OK", "content": content(answer)}},
    });
    if let Some(body) = body {
        let required = action == "post" || action == "put";
        let mut request = json!({"content": {"*/*": {"schema": {"$ref": reference(body)}}}});
        if required {
            request["required"] = true.into();
        }
        operation["requestBody"] = request;
    }
    operation
}

fn gvk(group: &str, version: &str, kind: &str) -> Value {
    json!({"group": group, "version": version, "kind": kind})
}

fn reference(name: &str) -> String {
    format!("#/components/schemas/{name}")
}

/// Schemas of one document: those asked for and all that they refer to.
#[derive(Default)]
struct Components {
    done: BTreeMap<String, Value>,
    wanted: BTreeSet<Arc<str>>,
}

impl Components {
    fn want(&mut self, definition: &Arc<str>) {
        self.wanted.insert(definition.clone());
    }

    fn want_resource(&mut self, resource: &Resource, component: &str) {
        if let Node::Ref(name) = &resource.schema {
            self.want(name);
            return;
        }
        let text = resource.open_api.as_deref().unwrap_or("{}");
        // The text was written from a `Value`, so that it parses; anything is a valid fallback.
        let mut schema: Value = serde_json::from_str(text).unwrap_or_else(|_| json!({}));
        if !schema.is_object() {
            schema = json!({});
        }
        schema["type"] = "object".into();
        if !schema["properties"].is_object() {
            schema["properties"] = json!({});
        }
        schema["properties"]["apiVersion"] = json!({"type": "string"});
        schema["properties"]["kind"] = json!({"type": "string"});
        schema["properties"]["metadata"] = json!({"allOf": [{"$ref": reference(OBJECT_META)}]});
        let kind = gvk(&resource.group, &resource.version, &resource.kind);
        schema["x-kubernetes-group-version-kind"] = json!([kind]);
        self.want(&OBJECT_META.into());
        self.done.insert(component.into(), schema);
    }

    fn want_list(&mut self, resource: &Resource, list: &str, item: &str) {
        self.want(&crate::facts::LIST_META.into());
        let schema = json!({
            "type": "object",
            "required": ["items"],
            "properties": {
                "apiVersion": {"type": "string"},
                "kind": {"type": "string"},
                "metadata": {"allOf": [{"$ref": reference(crate::facts::LIST_META)}], "default": {}},
                "items": {"type": "array", "items": {"allOf": [{"$ref": reference(item)}], "default": {}}},
            },
            "x-kubernetes-group-version-kind": [gvk(&resource.group, &resource.version, &resource.list_kind)],
        });
        self.done.insert(list.into(), schema);
    }

    fn finish(mut self) -> BTreeMap<String, Value> {
        self.wanted.extend([DELETE_OPTIONS, STATUS, PATCH].map(Arc::from));
        while let Some(name) = self.wanted.pop_first() {
            if self.done.contains_key(&*name) {
                continue;
            }
            let schema = match facts().definition(&name) {
                Some(definition) => self.definition(definition),
                None => json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}),
            };
            self.done.insert(name.to_string(), schema);
        }
        self.done
    }

    fn definition(&mut self, definition: &Definition) -> Value {
        let mut schema = match &definition.shape {
            Some(shape) => self.shape(shape),
            None => {
                let properties: Map<String, Value> = definition
                    .fields
                    .iter()
                    .map(|field| (field.name.to_string(), self.field(field)))
                    .collect();
                json!({"type": "object", "properties": properties})
            }
        };
        let required: Vec<&Arc<str>> =
            definition.fields.iter().filter(|f| f.required).map(|f| &f.name).collect();
        if !required.is_empty() {
            schema["required"] = json!(required);
        }
        if definition.atomic {
            schema["x-kubernetes-map-type"] = "atomic".into();
        }
        if !definition.kinds.is_empty() {
            let kinds: Vec<Value> = definition.kinds.iter().map(|(g, v, k)| gvk(g, v, k)).collect();
            schema["x-kubernetes-group-version-kind"] = kinds.into();
        }
        schema
    }

    fn field(&mut self, field: &Field) -> Value {
        let mut schema = self.shape(&field.shape);
        if schema.get("$ref").is_some() {
            // Siblings of `$ref` are ignored in OpenAPI 3.0.
            schema = json!({"allOf": [schema]});
        }
        match field.list {
            ListType::Map => schema["x-kubernetes-list-type"] = "map".into(),
            ListType::Set => schema["x-kubernetes-list-type"] = "set".into(),
            ListType::Atomic => {}
        }
        if !field.list_map_keys.is_empty() {
            schema["x-kubernetes-list-map-keys"] = json!(field.list_map_keys);
        }
        if field.atomic_map {
            schema["x-kubernetes-map-type"] = "atomic".into();
        }
        let strategy = match (field.patch_merge, field.patch_retain_keys) {
            (true, true) => "merge,retainKeys",
            (true, false) => "merge",
            (false, true) => "retainKeys",
            (false, false) => "",
        };
        if !strategy.is_empty() {
            schema["x-kubernetes-patch-strategy"] = strategy.into();
        }
        if let Some(key) = &field.patch_merge_key {
            schema["x-kubernetes-patch-merge-key"] = json!(key);
        }
        schema
    }

    fn shape(&mut self, shape: &Shape) -> Value {
        match shape {
            Shape::Ref(name) => {
                self.want(name);
                json!({"$ref": reference(name)})
            }
            Shape::List(items) => json!({"type": "array", "items": self.shape(items)}),
            Shape::Map(values) => {
                json!({"type": "object", "additionalProperties": self.shape(values)})
            }
            Shape::Any => json!({}),
            Shape::Object => json!({"type": "object"}),
            scalar => match scalar.openapi() {
                Some((ty, Some(format))) => json!({"type": ty, "format": format}),
                Some((ty, None)) => json!({"type": ty}),
                None => json!({}),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_in_every_document_resolves() {
        fn refs(value: &Value, found: &mut BTreeSet<String>) {
            match value {
                Value::Object(map) => {
                    if let Some(name) = map.get("$ref").and_then(Value::as_str) {
                        found.insert(name.to_owned());
                    }
                    map.values().for_each(|value| refs(value, found));
                }
                Value::Array(list) => list.iter().for_each(|value| refs(value, found)),
                _ => {}
            }
        }
        let catalog = Catalog::builtin();
        for path in index(&catalog)["paths"].as_object().unwrap().keys() {
            let document = document(&catalog, path).unwrap();
            let mut found = BTreeSet::new();
            refs(&document, &mut found);
            assert!(!found.is_empty());
            for name in found {
                let pointer = name.strip_prefix("#/components/schemas/").unwrap();
                let schemas = &document["components"]["schemas"];
                assert!(schemas.get(pointer).is_some(), "{path} refers to {name}");
            }
        }
        assert_eq!(document(&catalog, "apis/nowhere/v1"), None);
        assert_eq!(document(&catalog, "api"), None);
    }

    #[test]
    fn patch_of_a_deployment_takes_field_validation_and_force() {
        let document = document(&Catalog::builtin(), "apis/apps/v1").unwrap();
        let path = "/apis/apps/v1/namespaces/{namespace}/deployments/{name}";
        let patch = &document["paths"][path]["patch"];

        let kind = json!({"group": "apps", "version": "v1", "kind": "Deployment"});
        assert_eq!(patch["x-kubernetes-group-version-kind"], kind);
        assert_eq!(patch["x-kubernetes-action"], "patch");
        let names: Vec<&str> = patch["parameters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|parameter| parameter["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["dryRun", "fieldManager", "fieldValidation", "force"]);

        let schemas = &document["components"]["schemas"];
        let deployment = &schemas["io.k8s.api.apps.v1.Deployment"];
        assert_eq!(deployment["x-kubernetes-group-version-kind"], json!([kind]));
        let spec = &schemas["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
        assert_eq!(spec["x-kubernetes-list-type"], "map");
        assert_eq!(spec["x-kubernetes-patch-merge-key"], "name");
    }

    #[test]
    fn custom_resource_has_its_own_schema_and_changes_the_hash() {
        let crd = |field: &str| {
            json!({
                "spec": {"group": "shop.example", "scope": "Namespaced",
                    "names": {"plural": "fridges", "kind": "Fridge"},
                    "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                        "type": "object", "description": "Keeps things cold.",
                        "properties": {"spec": {"type": "object", "properties": {field: {"type": "string"}}}}}}}]},
            })
        };
        let one = Catalog::with_crds(&[crd("one")]);
        let two = Catalog::with_crds(&[crd("two")]);
        let path = "apis/shop.example/v1";
        assert_ne!(index(&one)["paths"][path], index(&two)["paths"][path]);
        assert_eq!(index(&one)["paths"]["api/v1"], index(&two)["paths"]["api/v1"]);

        let document = document(&one, path).unwrap();
        let fridge = &document["components"]["schemas"]["example.shop.v1.Fridge"];
        assert_eq!(fridge["description"], "Keeps things cold.");
        assert_eq!(fridge["properties"]["spec"]["properties"]["one"]["type"], "string");
        assert_eq!(fridge["x-kubernetes-group-version-kind"][0]["kind"], "Fridge");
    }
}
