//! What a built-in object gets when its author left something out.
//!
//! The HTTP server calls [`apply`] on every write of a built-in kind, before it validates, so that stored objects say
//! what they mean. Custom resources have the defaults of their schema instead ([`crate::structural::default`]).
//! Nothing here needs other objects: addresses, token volumes and priorities by class are not set here.
//!
//! Source: Kubernetes 1.36, `pkg/apis/*/v1/defaults.go`, and the admission plugins ServiceAccount, Priority and
//! DefaultTolerationSeconds.

mod pod;

use crate::catalog::Resource;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

/// Sets the fields of `object` that are absent or null to their defaults, and drops the other nulls.
///
/// A Job gets its selector and labels from its uid, and only when it has one.
pub fn apply(resource: &Resource, object: &mut Value) {
    if resource.custom || !object.is_object() {
        return;
    }
    drop_nulls(object, 0);
    match (&*resource.group, &*resource.kind) {
        ("", "Pod") => pod::pod(object),
        ("", "PodTemplate") => pod::template(object),
        ("", "Service") => in_spec(object, service),
        ("", "Secret") => secret(object),
        ("", "Endpoints") => {
            for subset in items(object.get_mut("subsets")) {
                items(subset.get_mut("ports")).for_each(|port| set(port, "protocol", "TCP"));
            }
        }
        ("", "PersistentVolumeClaim") => set_at(object, "spec", "volumeMode", "Filesystem"),
        ("", "PersistentVolume") => {
            set_at(object, "spec", "volumeMode", "Filesystem");
            set_at(object, "spec", "persistentVolumeReclaimPolicy", "Retain");
        }
        ("", "ReplicationController") => {
            let labels = object["spec"]["template"]["metadata"]["labels"].clone();
            if labels.is_object() {
                set_at(object, "spec", "selector", labels);
            }
            set_at(object, "spec", "replicas", 1);
            in_spec(object, pod::template);
        }
        ("apps", kind) => in_spec(object, |spec| workload(kind, spec)),
        ("batch", "Job") => job(object),
        ("batch", "CronJob") => {
            set_at(object, "spec", "concurrencyPolicy", "Allow");
            set_at(object, "spec", "suspend", false);
            set_at(object, "spec", "successfulJobsHistoryLimit", 3);
            set_at(object, "spec", "failedJobsHistoryLimit", 1);
            if let Some(job) = object.pointer_mut("/spec/jobTemplate/spec") {
                pod::template(job);
            }
        }
        ("autoscaling", _) => set_at(object, "spec", "minReplicas", 1),
        ("discovery.k8s.io", _) => {
            for port in items(object.get_mut("ports")) {
                set(port, "name", "");
                set(port, "protocol", "TCP");
            }
        }
        ("networking.k8s.io", "NetworkPolicy") => in_spec(object, network_policy),
        ("rbac.authorization.k8s.io", _) => binding(object),
        ("scheduling.k8s.io", _) => set(object, "preemptionPolicy", "PreemptLowerPriority"),
        ("storage.k8s.io", "StorageClass") => {
            set(object, "reclaimPolicy", "Delete");
            set(object, "volumeBindingMode", "Immediate");
        }
        ("apiextensions.k8s.io", _) => in_spec(object, definition),
        _ => {}
    }
}

fn in_spec(object: &mut Value, set_defaults: impl FnOnce(&mut Value)) {
    if let Some(spec) = object.get_mut("spec").filter(|spec| spec.is_object()) {
        set_defaults(spec);
    }
}

/// Kubernetes reads a null as "not set"; only free-form JSON keeps its nulls.
fn drop_nulls(value: &mut Value, depth: usize) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            for (key, value) in map {
                let free_form = (depth == 0 && key == "data") || key == "openAPIV3Schema";
                if !free_form {
                    drop_nulls(value, depth + 1);
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| drop_nulls(value, depth + 1)),
        _ => {}
    }
}

/// Sets `key` when it is absent, null or (as Go clients write what is not set) an empty string; does nothing to a
/// value that is not an object.
fn set(object: &mut Value, key: &str, value: impl Into<Value>) {
    if let Value::Object(map) = object {
        let slot = map.entry(key).or_insert(Value::Null);
        if slot.is_null() || slot == "" {
            *slot = value.into();
        }
    }
}

/// Like [`set`], in the value at `inner`; an absent one is not made.
fn set_at(object: &mut Value, inner: &str, key: &str, value: impl Into<Value>) {
    if let Some(inner) = object.get_mut(inner) {
        set(inner, key, value);
    }
}

/// The items of a list; none when there is no list. (Indexing for writing would panic on other types.)
fn items(list: Option<&mut Value>) -> impl Iterator<Item = &mut Value> {
    list.and_then(Value::as_array_mut).into_iter().flatten()
}

fn service(spec: &mut Value) {
    set(spec, "type", "ClusterIP");
    set(spec, "sessionAffinity", "None");
    if spec["sessionAffinity"] == "ClientIP" {
        set(spec, "sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": 10800}}));
    }
    for port in items(spec.get_mut("ports")) {
        set(port, "protocol", "TCP");
        let number = port["port"].clone();
        set(port, "targetPort", number);
    }
    let ty = spec["type"].as_str().unwrap_or("").to_owned();
    if ty == "ExternalName" {
        return;
    }
    set(spec, "internalTrafficPolicy", "Cluster");
    set(spec, "ipFamilies", json!(["IPv4"]));
    set(spec, "ipFamilyPolicy", "SingleStack");
    if matches!(ty.as_str(), "NodePort" | "LoadBalancer") {
        set(spec, "externalTrafficPolicy", "Cluster");
    }
    if ty == "LoadBalancer" {
        set(spec, "allocateLoadBalancerNodePorts", true);
    }
}

/// `stringData` is for writing only: it becomes part of `data`.
fn secret(object: &mut Value) {
    set(object, "type", "Opaque");
    let Some(fields) = object.as_object_mut() else { return };
    let Some(Value::Object(plain)) = fields.remove("stringData") else { return };
    if plain.is_empty() {
        return;
    }
    let data = fields.entry("data").or_insert_with(|| json!({}));
    if let Value::Object(data) = data {
        for (key, value) in plain {
            // What is not text is left as it is, for the validation to refuse.
            let encoded = value.as_str().map(|text| STANDARD.encode(text).into()).unwrap_or(value);
            data.insert(key, encoded);
        }
    }
}

fn workload(kind: &str, spec: &mut Value) {
    match kind {
        "Deployment" => {
            set(spec, "replicas", 1);
            set(spec, "revisionHistoryLimit", 10);
            set(spec, "progressDeadlineSeconds", 600);
            rolling_update(
                spec,
                "strategy",
                &[("maxUnavailable", json!("25%")), ("maxSurge", json!("25%"))],
            );
        }
        "ReplicaSet" => set(spec, "replicas", 1),
        "StatefulSet" => {
            set(spec, "replicas", 1);
            set(spec, "revisionHistoryLimit", 10);
            set(spec, "podManagementPolicy", "OrderedReady");
            set(spec, "serviceName", "");
            let policy = json!({"whenDeleted": "Retain", "whenScaled": "Retain"});
            set(spec, "persistentVolumeClaimRetentionPolicy", policy);
            rolling_update(spec, "updateStrategy", &[("partition", json!(0))]);
            for claim in items(spec.get_mut("volumeClaimTemplates")) {
                set(claim, "apiVersion", "v1");
                set(claim, "kind", "PersistentVolumeClaim");
                set_at(claim, "spec", "volumeMode", "Filesystem");
                set(claim, "status", json!({"phase": "Pending"}));
            }
        }
        "DaemonSet" => {
            set(spec, "revisionHistoryLimit", 10);
            rolling_update(
                spec,
                "updateStrategy",
                &[("maxUnavailable", json!(1)), ("maxSurge", json!(0))],
            );
        }
        _ => return, // ControllerRevision has no spec
    }
    pod::template(spec);
}

fn rolling_update(spec: &mut Value, field: &str, limits: &[(&str, Value)]) {
    set(spec, field, json!({}));
    set_at(spec, field, "type", "RollingUpdate");
    if spec[field]["type"] == "RollingUpdate" {
        set_at(spec, field, "rollingUpdate", json!({}));
        for (name, value) in limits {
            if let Some(strategy) = spec.get_mut(field) {
                set_at(strategy, "rollingUpdate", name, value.clone());
            }
        }
    }
}

fn job(object: &mut Value) {
    let metadata = &object["metadata"];
    let (uid, name) = (metadata["uid"].clone(), metadata["name"].clone());
    let Some(spec) = object.get_mut("spec").filter(|spec| spec.is_object()) else { return };
    if spec["completions"].is_null() && spec["parallelism"].is_null() {
        set(spec, "completions", 1);
    }
    set(spec, "parallelism", 1);
    set(spec, "backoffLimit", 6);
    set(spec, "completionMode", "NonIndexed");
    set(spec, "suspend", false);
    let failure_policy = spec["podFailurePolicy"].is_object();
    set(
        spec,
        "podReplacementPolicy",
        if failure_policy { "Failed" } else { "TerminatingOrFailed" },
    );
    pod::template(spec);
    if spec["manualSelector"] == true || spec["selector"].is_object() || !uid.is_string() {
        return;
    }
    const UID: &str = "batch.kubernetes.io/controller-uid";
    let labels = [
        (UID, &uid),
        ("batch.kubernetes.io/job-name", &name),
        ("controller-uid", &uid),
        ("job-name", &name),
    ];
    set_at(spec, "template", "metadata", json!({}));
    if let Some(metadata) = spec.pointer_mut("/template/metadata") {
        set(metadata, "labels", json!({}));
        for (key, value) in labels {
            set_at(metadata, "labels", key, value.clone());
        }
        spec["selector"] = json!({"matchLabels": {UID: uid}});
    }
}

fn network_policy(spec: &mut Value) {
    let egress = spec["egress"].as_array().is_some_and(|rules| !rules.is_empty());
    set(
        spec,
        "policyTypes",
        if egress { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) },
    );
    for direction in ["ingress", "egress"] {
        for rule in items(spec.get_mut(direction)) {
            items(rule.get_mut("ports")).for_each(|port| set(port, "protocol", "TCP"));
        }
    }
}

fn binding(object: &mut Value) {
    const GROUP: &str = "rbac.authorization.k8s.io";
    set_at(object, "roleRef", "apiGroup", GROUP);
    for subject in items(object.get_mut("subjects")) {
        if matches!(subject["kind"].as_str(), Some("User" | "Group")) {
            set(subject, "apiGroup", GROUP);
        }
    }
}

fn definition(spec: &mut Value) {
    set(spec, "conversion", json!({"strategy": "None"}));
    let Some(kind) = spec["names"]["kind"].as_str().map(str::to_owned) else { return };
    set_at(spec, "names", "singular", kind.to_lowercase());
    set_at(spec, "names", "listKind", format!("{kind}List"));
}

#[cfg(test)]
mod tests;
