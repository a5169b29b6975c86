//! What every workload gets: the site's labels, its nodes, patience with an unreachable node, and the digest of the
//! configuration that it reads.

use crate::object::Digest;
use serde_json::{Map, Value, json};
use skerry_api::fleet::v1alpha1::{
    APP_LABEL, CONFIG_DIGEST_ANNOTATION, MANAGED_BY, MANAGED_BY_LABEL, SITE_LABEL,
};
use std::collections::BTreeSet;

/// Taints that Kubernetes puts on a node that does not answer. Without a toleration its pods are deleted after five
/// minutes; at an edge site that would stop work because of a cut line.
const NODE_TAINTS: [&str; 2] = ["node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"];

/// JSON pointer to the pod spec's owner (the object with `metadata` and `spec` of a pod) for workload kinds.
pub(crate) fn pod_template(group: &str, kind: &str) -> Option<&'static str> {
    match (group, kind) {
        ("", "Pod") => Some(""),
        ("", "ReplicationController")
        | ("apps", "Deployment" | "ReplicaSet" | "DaemonSet" | "StatefulSet")
        | ("batch", "Job") => Some("/spec/template"),
        ("batch", "CronJob") => Some("/spec/jobTemplate/spec/template"),
        _ => None,
    }
}

/// Whether a changed pod template makes the kind replace its pods.
fn rolls_out(group: &str, kind: &str) -> bool {
    matches!((group, kind), ("apps", "Deployment" | "DaemonSet" | "StatefulSet"))
}

/// Puts the common labels on `object`.
pub(crate) fn label(object: &mut Value, site: &str, app: &str) {
    let labels = map_at(map_at(object, "metadata"), "labels");
    for (key, value) in [(SITE_LABEL, site), (APP_LABEL, app), (MANAGED_BY_LABEL, MANAGED_BY)] {
        labels[key] = Value::from(value);
    }
}

/// Why an object's pods cannot be bound to the site: the JSON path below the pod spec, and what is wrong.
pub(crate) type BindFault = (&'static str, String);

/// Binds the pods of a workload to the site: labels, node selector, tolerations.
pub(crate) fn bind(
    object: &mut Value,
    pointer: &str,
    site: &str,
    app: &str,
) -> Result<(), BindFault> {
    if let Some(job) = object.pointer_mut("/spec/jobTemplate") {
        label(job, site, app);
    }
    let Some(template) = object.pointer_mut(pointer).filter(|template| template.is_object()) else {
        return Err(("spec", "the workload has no pod template".to_owned()));
    };
    label(template, site, app);
    if !template["spec"].is_object() {
        return Err(("spec", "the workload's pod template has no `spec`".to_owned()));
    }
    let spec = &mut template["spec"];
    let selector = map_at(spec, "nodeSelector");
    if let Some(other) = selector.get(SITE_LABEL).filter(|value| *value != site) {
        return Err((
            "nodeSelector",
            format!("the node selector asks for site {other}, the app is placed on `{site}`"),
        ));
    }
    selector[SITE_LABEL] = Value::from(site);

    if !spec["tolerations"].is_array() {
        spec["tolerations"] = json!([]);
    }
    let tolerations = spec["tolerations"].as_array_mut().expect("made an array above");
    for taint in NODE_TAINTS {
        // A toleration that names the taint is the author's decision, seconds included.
        if !tolerations.iter().any(|toleration| toleration["key"] == taint) {
            tolerations.push(json!({"key": taint, "operator": "Exists", "effect": "NoExecute"}));
        }
    }
    Ok(())
}

/// Writes into `object`'s pod template the digest of those `configs` (kind, name, digest) that its pods read, so that
/// a changed value replaces the pods: a running process does not see a changed environment, and many read their files
/// once.
pub(crate) fn note_config(
    object: &mut Value,
    group: &str,
    kind: &str,
    digest_of: impl Fn(&str, &str) -> Option<Digest>,
) {
    let Some(pointer) = pod_template(group, kind).filter(|_| rolls_out(group, kind)) else {
        return;
    };
    let Some(template) = object.pointer_mut(pointer) else { return };
    let mut parts = Vec::new();
    for (kind, name) in references(&template["spec"]) {
        if let Some(digest) = digest_of(kind, &name) {
            parts.push(format!("{kind}/{name}={digest}"));
        }
    }
    if !parts.is_empty() {
        let digest = Digest::of_parts(parts.iter().map(String::as_bytes));
        let annotations = map_at(map_at(template, "metadata"), "annotations");
        annotations[CONFIG_DIGEST_ANNOTATION] = Value::from(&digest.as_str()[..16]);
    }
}

/// ConfigMaps and Secrets that a pod spec reads, by kind and name.
fn references(spec: &Value) -> BTreeSet<(&'static str, String)> {
    let mut found = BTreeSet::new();
    let mut add = |kind: &'static str, name: &Value| {
        if let Some(name) = name.as_str() {
            found.insert((kind, name.to_owned()));
        }
    };
    for volume in array(&spec["volumes"]) {
        add("ConfigMap", &volume["configMap"]["name"]);
        add("Secret", &volume["secret"]["secretName"]);
        for source in array(&volume["projected"]["sources"]) {
            add("ConfigMap", &source["configMap"]["name"]);
            add("Secret", &source["secret"]["name"]);
        }
    }
    for container in array(&spec["containers"]).chain(array(&spec["initContainers"])) {
        for env in array(&container["env"]) {
            add("ConfigMap", &env["valueFrom"]["configMapKeyRef"]["name"]);
            add("Secret", &env["valueFrom"]["secretKeyRef"]["name"]);
        }
        for from in array(&container["envFrom"]) {
            add("ConfigMap", &from["configMapRef"]["name"]);
            add("Secret", &from["secretRef"]["name"]);
        }
    }
    found
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The map under `key`, made if there is none. `value` has to be a map or null.
fn map_at<'a>(value: &'a mut Value, key: &str) -> &'a mut Value {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    let slot = &mut value[key];
    if !slot.is_object() {
        *slot = Value::Object(Map::new());
    }
    slot
}
