//! Defaults of pods and of the pod templates inside workloads.

use super::{items, set, set_at};
use serde_json::{Value, json};

/// Seconds that a pod stays on a node that is not ready or unreachable.
const TOLERATION_SECONDS: i64 = 300;

/// A pod: everything that a template gets, and what only a pod gets.
pub(super) fn pod(object: &mut Value) {
    let Some(spec) = object.get_mut("spec").filter(|spec| spec.is_object()) else { return };
    pod_spec(spec);
    set(spec, "enableServiceLinks", true);
    if let Some(old) = spec["serviceAccount"].as_str().map(str::to_owned) {
        set(spec, "serviceAccountName", old); // the deprecated name of the same field
    }
    set(spec, "serviceAccountName", "default");
    let name = spec["serviceAccountName"].clone();
    set(spec, "serviceAccount", name);
    match spec["priorityClassName"].as_str() {
        None | Some("") => set(spec, "priority", 0),
        Some("system-node-critical") => set(spec, "priority", 2_000_001_000),
        Some("system-cluster-critical") => set(spec, "priority", 2_000_000_000),
        Some(_) => {} // needs the PriorityClass
    }
    set(spec, "preemptionPolicy", "PreemptLowerPriority");
    for list in ["containers", "initContainers"] {
        for container in items(spec.get_mut(list)) {
            if let Some(resources) = container.get_mut("resources") {
                requests_from_limits(resources);
            }
        }
    }
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        tolerate(spec, key);
    }
}

/// The pod template in `owner`: only what is the same for every pod made from it.
pub(super) fn template(owner: &mut Value) {
    if let Some(spec) = owner.get_mut("template").and_then(|template| template.get_mut("spec")) {
        pod_spec(spec);
    }
}

fn pod_spec(spec: &mut Value) {
    if !spec.is_object() {
        return;
    }
    set(spec, "restartPolicy", "Always");
    set(spec, "dnsPolicy", "ClusterFirst");
    set(spec, "schedulerName", "default-scheduler");
    set(spec, "terminationGracePeriodSeconds", 30);
    set(spec, "securityContext", json!({}));
    let host_network = spec["hostNetwork"] == true;
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        for one in items(spec.get_mut(list)) {
            container(one, host_network);
        }
    }
    items(spec.get_mut("volumes")).for_each(volume);
}

fn container(container: &mut Value, host_network: bool) {
    let image = container["image"].as_str().unwrap_or("");
    set(container, "imagePullPolicy", pull_policy(image));
    set(container, "terminationMessagePath", "/dev/termination-log");
    set(container, "terminationMessagePolicy", "File");
    set(container, "resources", json!({}));
    for port in items(container.get_mut("ports")) {
        set(port, "protocol", "TCP");
        if host_network && port["containerPort"].is_number() {
            let number = port["containerPort"].clone();
            set(port, "hostPort", number);
        }
    }
    for variable in items(container.get_mut("env")) {
        if let Some(reference) = variable.get_mut("valueFrom").and_then(|v| v.get_mut("fieldRef")) {
            set(reference, "apiVersion", "v1");
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.get_mut(probe).filter(|probe| probe.is_object()) {
            for (field, value) in [
                ("timeoutSeconds", 1),
                ("periodSeconds", 10),
                ("successThreshold", 1),
                ("failureThreshold", 3),
            ] {
                if probe[field] == 0 {
                    probe[field] = Value::Null; // zero is "not set" here
                }
                set(probe, field, value);
            }
            handler(probe);
        }
    }
    for hook in ["postStart", "preStop"] {
        if let Some(hook) = container.get_mut("lifecycle").and_then(|all| all.get_mut(hook)) {
            handler(hook);
        }
    }
}

/// The way a probe or hook reaches into its container.
fn handler(handler: &mut Value) {
    if let Some(get) = handler.get_mut("httpGet") {
        set(get, "path", "/");
        set(get, "scheme", "HTTP");
    }
    if let Some(grpc) = handler.get_mut("grpc") {
        set(grpc, "service", "");
    }
}

/// `Always` for a tag that moves, `IfNotPresent` for one that does not and for digests.
fn pull_policy(image: &str) -> &'static str {
    let name = image.rsplit('/').next().unwrap_or("");
    let moving = match name.split_once('@') {
        Some(_) => false,
        None => name.split_once(':').is_none_or(|(_, tag)| tag == "latest"),
    };
    if moving { "Always" } else { "IfNotPresent" }
}

fn volume(volume: &mut Value) {
    let Some(fields) = volume.as_object() else { return };
    if fields.keys().all(|key| key == "name") {
        set(volume, "emptyDir", json!({}));
        return;
    }
    const MODE: i64 = 0o644;
    for source in ["secret", "configMap", "projected", "downwardAPI"] {
        if let Some(source) = volume.get_mut(source) {
            set(source, "defaultMode", MODE);
        }
    }
    if let Some(path) = volume.get_mut("hostPath") {
        set(path, "type", "");
    }
    if let Some(down) = volume.get_mut("downwardAPI") {
        field_refs(down);
    }
    if let Some(projected) = volume.get_mut("projected") {
        for source in items(projected.get_mut("sources")) {
            if let Some(token) = source.get_mut("serviceAccountToken") {
                set(token, "expirationSeconds", 3600);
            }
            if let Some(down) = source.get_mut("downwardAPI") {
                field_refs(down);
            }
        }
    }
    if let Some(claim) = volume.get_mut("ephemeral").and_then(|e| e.get_mut("volumeClaimTemplate"))
    {
        set_at(claim, "spec", "volumeMode", "Filesystem");
    }
}

fn field_refs(downward: &mut Value) {
    for item in items(downward.get_mut("items")) {
        if let Some(reference) = item.get_mut("fieldRef") {
            set(reference, "apiVersion", "v1");
        }
    }
}

fn requests_from_limits(resources: &mut Value) {
    let Some(limits) = resources["limits"].as_object().cloned() else { return };
    set(resources, "requests", json!({}));
    for (name, amount) in limits {
        set_at(resources, "requests", &name, amount);
    }
}

fn tolerate(spec: &mut Value, key: &str) {
    let covers = |one: &Value| {
        let effect = one["effect"].as_str().unwrap_or("");
        let wanted = one["key"].as_str().unwrap_or("");
        (effect.is_empty() || effect == "NoExecute") && (wanted.is_empty() || wanted == key)
    };
    set(spec, "tolerations", json!([]));
    let tolerations = spec.get_mut("tolerations").and_then(Value::as_array_mut);
    let Some(tolerations) = tolerations else { return };
    if !tolerations.iter().any(covers) {
        tolerations.push(json!({
            "key": key, "operator": "Exists", "effect": "NoExecute",
            "tolerationSeconds": TOLERATION_SECONDS,
        }));
    }
}
