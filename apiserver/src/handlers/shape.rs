//! From stored objects to what a client asked to see: a version, a table, metadata only.

use crate::http::{Format, Shape};
use serde_json::{Value, json};
use skerry_apiserver_core::catalog::Resource;
use skerry_apiserver_core::{events, table};

/// The stored object as an object of `resource`'s version.
pub(crate) fn served(resource: &Resource, mut object: Value) -> Value {
    if resource.stored_in_core {
        object = events::from_core(object);
    }
    object["apiVersion"] = resource.api_version().into();
    object["kind"] = (&*resource.kind).into();
    object
}

/// One object in the asked form.
pub(crate) fn one(format: &Format, resource: &Resource, object: Value) -> Value {
    match &format.shape {
        Shape::Table { include, version } => {
            let revision = object["metadata"]["resourceVersion"].clone();
            let list = json!({"resourceVersion": revision});
            rows(resource, &[&object], list, include, version)
        }
        Shape::Metadata => metadata(&object),
        Shape::Whole | Shape::Discovery(_) => object,
    }
}

/// A list in the asked form.
pub(crate) fn many(
    format: &Format,
    resource: &Resource,
    objects: Vec<Value>,
    list: Value,
) -> Value {
    match &format.shape {
        Shape::Table { include, version } => {
            let objects: Vec<&Value> = objects.iter().collect();
            rows(resource, &objects, list, include, version)
        }
        Shape::Metadata => json!({
            "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": list,
            "items": objects.iter().map(metadata).collect::<Vec<_>>(),
        }),
        Shape::Whole | Shape::Discovery(_) => {
            let mut answer = json!({
                "kind": &*resource.list_kind, "apiVersion": resource.api_version(), "metadata": list,
            });
            answer["items"] = Value::Array(objects);
            answer
        }
    }
}

fn metadata(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": object["metadata"].clone(),
    })
}

fn rows(
    resource: &Resource,
    objects: &[&Value],
    list: Value,
    include: &str,
    version: &str,
) -> Value {
    let mut table = table::table(resource, objects, list, include, jiff::Timestamp::now());
    table["apiVersion"] = format!("meta.k8s.io/{version}").into();
    table
}
