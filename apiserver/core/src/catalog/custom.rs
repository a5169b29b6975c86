//! Resources of CustomResourceDefinitions.

use super::{Column, Resource, ScalePaths, Subresource, VERBS};
use crate::schema::Node;
use crate::structural;
use serde_json::{Value, json};
use std::sync::{Arc, LazyLock};

/// Schema of a version that has none.
static ANY_OBJECT: LazyLock<Value> =
    LazyLock::new(|| json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}));

/// One resource per served version; none when the definition cannot be served.
pub(super) fn resources(crd: &Value) -> Vec<Resource> {
    if !is_established(crd) {
        return Vec::new();
    }
    let versions = crd["spec"]["versions"].as_array();
    let served = versions.into_iter().flatten().filter(|version| version["served"] == true);
    served.filter_map(|version| resource(crd, version)).collect()
}

/// False only when the status says so: a definition without conditions is one that was just validated.
fn is_established(crd: &Value) -> bool {
    let conditions = crd["status"]["conditions"].as_array();
    !conditions.into_iter().flatten().any(|condition| {
        matches!(condition["type"].as_str(), Some("Established" | "NamesAccepted"))
            && condition["status"] == "False"
    })
}

fn resource(crd: &Value, version: &Value) -> Option<Resource> {
    let spec = &crd["spec"];
    let names = &spec["names"];
    let group: Arc<str> = spec["group"].as_str()?.into();
    let version_name: Arc<str> = version["name"].as_str()?.into();
    let kind: Arc<str> = names["kind"].as_str()?.into();
    let plural = names["plural"].as_str()?;
    let open_api = version.get("schema").and_then(|schema| schema.get("openAPIV3Schema"));
    let schema = match open_api {
        Some(open_api) => structural::compile(open_api).ok()?,
        None => structural::compile(&ANY_OBJECT).ok()?,
    };

    let sub = &version["subresources"];
    let has_status = sub["status"].is_object();
    let mut subresources = Vec::new();
    let own = |name: &str| Subresource {
        name: name.into(),
        kind: kind.clone(),
        group: group.clone(),
        version: version_name.clone(),
        verbs: &["get", "patch", "update"],
    };
    if has_status {
        subresources.push(own("status"));
    }
    let path = |key: &str| sub["scale"][key].as_str().map(str::to_owned);
    let scale_paths =
        path("specReplicasPath").zip(path("statusReplicasPath")).map(|(spec, status)| ScalePaths {
            spec_replicas: spec,
            status_replicas: status,
            selector: path("labelSelectorPath"),
        });
    if scale_paths.is_some() {
        let (kind, group, version) = ("Scale".into(), "autoscaling".into(), "v1".into());
        subresources.push(Subresource { kind, group, version, ..own("scale") });
    }

    let words = |list: &Value| -> Vec<Arc<str>> {
        list.as_array()
            .into_iter()
            .flatten()
            .filter_map(|one| one.as_str())
            .map(Arc::from)
            .collect()
    };
    let or = |name: &Value, fallback: String| name.as_str().map_or(fallback, str::to_owned).into();
    Some(Resource {
        list_kind: or(&names["listKind"], format!("{kind}List")),
        plural: plural.into(),
        singular: or(&names["singular"], kind.to_ascii_lowercase()),
        namespaced: spec["scope"] == "Namespaced",
        short_names: words(&names["shortNames"]),
        categories: words(&names["categories"]),
        verbs: VERBS.to_vec(),
        subresources,
        schema: Node::Inline(Arc::new(schema)),
        custom: true,
        columns: columns(version),
        scale_paths,
        selectable_fields: version["selectableFields"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|field| {
                Some(field["jsonPath"].as_str()?.trim_start_matches('.').to_owned())
            })
            .collect(),
        has_status,
        stored_in_core: false,
        open_api: open_api.map(|open_api| open_api.to_string().into()),
        group,
        version: version_name,
        kind,
    })
}

fn columns(version: &Value) -> Vec<Column> {
    let columns = version["additionalPrinterColumns"].as_array();
    let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
    columns
        .into_iter()
        .flatten()
        .map(|column| Column {
            name: text(&column["name"]),
            ty: text(&column["type"]),
            format: text(&column["format"]),
            description: text(&column["description"]),
            priority: column["priority"].as_i64().unwrap_or(0),
            json_path: text(&column["jsonPath"]),
        })
        .collect()
}
