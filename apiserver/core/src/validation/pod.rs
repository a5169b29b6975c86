//! Pods and pod templates.

use super::metadata::{self, is_dns_label, is_dns_subdomain};
use super::{Errors, items, text};
use crate::workloads::quantity;
use serde_json::{Value, json};
use std::collections::BTreeSet;

const NAME: &str = "must be a lowercase RFC 1123 label: letters, digits or '-', with a letter or digit at both ends";
const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];
const PULL_POLICIES: &[&str] = &["Always", "IfNotPresent", "Never"];
const DNS_POLICIES: &[&str] = &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
const HANDLERS: &[&str] = &["exec", "grpc", "httpGet", "sleep", "tcpSocket"];

pub(super) fn check_pod(spec: &Value, old: Option<&Value>, errors: &mut Errors) {
    match old {
        None => check_spec(spec, "spec", errors),
        // What was accepted once is not judged again; only the change is.
        Some(old) => check_update(spec, old, errors),
    }
}

/// The pod template at `path`.
pub(super) fn check_template(template: &Value, path: &str, errors: &mut Errors) {
    metadata::labels(&template["metadata"]["labels"], &format!("{path}.metadata.labels"), errors);
    check_spec(&template["spec"], &format!("{path}.spec"), errors);
}

fn check_spec(spec: &Value, path: &str, errors: &mut Errors) {
    let volumes = check_volumes(&spec["volumes"], &format!("{path}.volumes"), errors);
    if items(&spec["containers"]).is_empty() {
        errors.required(&format!("{path}.containers"), "");
    }
    let mut names = BTreeSet::new();
    for list in ["containers", "initContainers"] {
        for (index, container) in items(&spec[list]).iter().enumerate() {
            let path = format!("{path}.{list}[{index}]");
            check_container(container, &path, &volumes, errors);
            if !names.insert(text(&container["name"])) {
                errors.duplicate(&format!("{path}.name"), &container["name"]);
            }
        }
    }
    check_host_ports(spec, path, errors);
    errors.one_of(spec, "restartPolicy", path, &["Always", "OnFailure", "Never"]);
    errors.one_of(spec, "dnsPolicy", path, DNS_POLICIES);
    errors.one_of(spec, "preemptionPolicy", path, &["Never", "PreemptLowerPriority"]);
    errors.not_negative(spec, "terminationGracePeriodSeconds", path);
    if spec["activeDeadlineSeconds"].as_i64().is_some_and(|seconds| seconds < 1) {
        let detail = "must be between 1 and 2147483647, inclusive";
        let field = format!("{path}.activeDeadlineSeconds");
        errors.invalid(&field, &spec["activeDeadlineSeconds"], detail);
    }
    metadata::labels(&spec["nodeSelector"], &format!("{path}.nodeSelector"), errors);
    for name in ["hostname", "subdomain"] {
        let value = &spec[name];
        if !text(value).is_empty() && !is_dns_label(text(value)) {
            errors.invalid(&format!("{path}.{name}"), value, NAME);
        }
    }
    for name in ["nodeName", "serviceAccountName", "priorityClassName"] {
        let value = &spec[name];
        if !text(value).is_empty() && !is_dns_subdomain(text(value)) {
            errors.invalid(
                &format!("{path}.{name}"),
                value,
                "must be a lowercase RFC 1123 subdomain",
            );
        }
    }
    for (index, toleration) in items(&spec["tolerations"]).iter().enumerate() {
        check_toleration(toleration, &format!("{path}.tolerations[{index}]"), errors);
    }
}

/// Returns the names of the volumes.
fn check_volumes<'a>(volumes: &'a Value, path: &str, errors: &mut Errors) -> BTreeSet<&'a str> {
    let mut names = BTreeSet::new();
    for (index, volume) in items(volumes).iter().enumerate() {
        let path = format!("{path}[{index}]");
        let name = text(&volume["name"]);
        if name.is_empty() {
            errors.required(&format!("{path}.name"), "");
        } else if !is_dns_label(name) {
            errors.invalid(&format!("{path}.name"), &volume["name"], NAME);
        } else if !names.insert(name) {
            errors.duplicate(&format!("{path}.name"), &volume["name"]);
        }
        let sources = volume.as_object().map_or(0, |volume| {
            volume.iter().filter(|(key, value)| *key != "name" && !value.is_null()).count()
        });
        match sources {
            0 => errors.required(&path, "must specify a volume type"),
            1 => check_volume_source(volume, &path, errors),
            _ => errors.forbidden(&path, "may not specify more than 1 volume type"),
        }
    }
    names
}

fn check_volume_source(volume: &Value, path: &str, errors: &mut Errors) {
    for (source, field) in [
        ("configMap", "name"),
        ("hostPath", "path"),
        ("persistentVolumeClaim", "claimName"),
        ("secret", "secretName"),
        ("csi", "driver"),
        ("nfs", "server"),
    ] {
        if volume[source].is_object() {
            errors.require(&volume[source], field, &format!("{path}.{source}"));
        }
    }
    if text(&volume["hostPath"]["path"]).split('/').any(|part| part == "..") {
        let path = format!("{path}.hostPath.path");
        errors.invalid(&path, &volume["hostPath"]["path"], "must not contain '..'");
    }
}

fn check_container(container: &Value, path: &str, volumes: &BTreeSet<&str>, errors: &mut Errors) {
    let name = text(&container["name"]);
    if name.is_empty() {
        errors.required(&format!("{path}.name"), "");
    } else if !is_dns_label(name) {
        errors.invalid(&format!("{path}.name"), &container["name"], NAME);
    }
    let image = text(&container["image"]);
    if image.is_empty() {
        errors.required(&format!("{path}.image"), "");
    } else if image.trim() != image {
        let detail = "must not have leading or trailing whitespace";
        errors.invalid(&format!("{path}.image"), &container["image"], detail);
    }
    errors.one_of(container, "imagePullPolicy", path, PULL_POLICIES);
    let message_policies = ["File", "FallbackToLogsOnError"];
    errors.one_of(container, "terminationMessagePolicy", path, &message_policies);

    let mut port_names = BTreeSet::new();
    for (index, port) in items(&container["ports"]).iter().enumerate() {
        let path = format!("{path}.ports[{index}]");
        errors.port(port, "containerPort", &path);
        if port["hostPort"].as_i64().unwrap_or(0) != 0 {
            errors.port(port, "hostPort", &path);
        }
        errors.one_of(port, "protocol", &path, PROTOCOLS);
        let name = text(&port["name"]);
        if !name.is_empty() && !is_port_name(name) {
            let detail = "must be at most 15 lowercase letters, digits or single '-', with at least one letter";
            errors.invalid(&format!("{path}.name"), &port["name"], detail);
        }
        if !name.is_empty() && !port_names.insert(name) {
            errors.duplicate(&format!("{path}.name"), &port["name"]);
        }
    }
    for (index, variable) in items(&container["env"]).iter().enumerate() {
        let path = format!("{path}.env[{index}]");
        match text(&variable["name"]) {
            "" => errors.required(&format!("{path}.name"), ""),
            name if name.contains('=') => {
                errors.invalid(&format!("{path}.name"), &variable["name"], "must not contain '='");
            }
            _ => {}
        }
        let from = &variable["valueFrom"];
        if from.is_object() && !text(&variable["value"]).is_empty() {
            let detail = "may not be specified when `value` is not empty";
            errors.invalid(&format!("{path}.valueFrom"), &json!(""), detail);
        }
        if from.as_object().is_some_and(|from| from.len() != 1) {
            let detail = "must specify exactly one source";
            errors.invalid(&format!("{path}.valueFrom"), &json!(""), detail);
        }
    }
    let mut mounts = BTreeSet::new();
    for (index, mount) in items(&container["volumeMounts"]).iter().enumerate() {
        let path = format!("{path}.volumeMounts[{index}]");
        let name = text(&mount["name"]);
        if name.is_empty() {
            errors.required(&format!("{path}.name"), "");
        } else if !volumes.contains(name) {
            errors.not_found(&format!("{path}.name"), &mount["name"]);
        }
        let target = text(&mount["mountPath"]);
        if target.is_empty() {
            errors.required(&format!("{path}.mountPath"), "");
        } else if !mounts.insert(target) {
            errors.invalid(&format!("{path}.mountPath"), &mount["mountPath"], "must be unique");
        }
        let sub_path = text(&mount["subPath"]);
        if sub_path.starts_with('/') || sub_path.split('/').any(|part| part == "..") {
            let detail = "must be a relative path without '..'";
            errors.invalid(&format!("{path}.subPath"), &mount["subPath"], detail);
        }
    }
    check_resources(&container["resources"], &format!("{path}.resources"), errors);
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if container[probe].is_object() {
            check_probe(&container[probe], probe, &format!("{path}.{probe}"), errors);
        }
    }
    for hook in ["postStart", "preStop"] {
        let hook_value = &container["lifecycle"][hook];
        if hook_value.is_object() {
            check_handler(hook_value, &format!("{path}.lifecycle.{hook}"), errors);
        }
    }
}

fn check_resources(resources: &Value, path: &str, errors: &mut Errors) {
    for side in ["limits", "requests"] {
        for (name, amount) in resources[side].as_object().into_iter().flatten() {
            let field = format!("{path}.{side}[{name}]");
            match quantity::of(amount) {
                None => errors.invalid(&field, amount, "must be a quantity such as 500m or 64Mi"),
                Some(amount_milli) if amount_milli < 0 => {
                    errors.invalid(&field, amount, "must be greater than or equal to 0");
                }
                Some(_) => {}
            }
        }
    }
    for (name, request) in resources["requests"].as_object().into_iter().flatten() {
        let limit = &resources["limits"][name.as_str()];
        if let (Some(asked), Some(most)) = (quantity::of(request), quantity::of(limit))
            && asked > most
        {
            let detail = format!("must be less than or equal to {name} limit of {}", plain(limit));
            errors.invalid(&format!("{path}.requests"), request, detail);
        }
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn check_probe(probe: &Value, name: &str, path: &str, errors: &mut Errors) {
    check_handler(probe, path, errors);
    for field in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "failureThreshold"] {
        errors.not_negative(probe, field, path);
    }
    let successes = &probe["successThreshold"];
    if name != "readinessProbe" && successes.as_i64().is_some_and(|count| count != 1) {
        errors.invalid(&format!("{path}.successThreshold"), successes, "must be 1");
    }
}

/// Exactly one way in.
fn check_handler(handler: &Value, path: &str, errors: &mut Errors) {
    let ways: Vec<&&str> = HANDLERS.iter().filter(|way| handler[**way].is_object()).collect();
    match ways.as_slice() {
        [] => errors.required(path, "must specify a handler type"),
        [_] => {}
        [_, second, ..] => errors
            .forbidden(&format!("{path}.{second}"), "may not specify more than 1 handler type"),
    }
    let get = &handler["httpGet"];
    if get.is_object() {
        errors.one_of(get, "scheme", &format!("{path}.httpGet"), &["HTTP", "HTTPS"]);
        if !get["port"].is_string() {
            errors.port(get, "port", &format!("{path}.httpGet"));
        }
    }
    if handler["exec"].is_object() {
        errors.require(&handler["exec"], "command", &format!("{path}.exec"));
    }
}

fn check_host_ports(spec: &Value, path: &str, errors: &mut Errors) {
    let mut taken = BTreeSet::new();
    for (at, container) in items(&spec["containers"]).iter().enumerate() {
        for (index, port) in items(&container["ports"]).iter().enumerate() {
            let number = port["hostPort"].as_i64().unwrap_or(0);
            if number == 0 {
                continue;
            }
            let field = format!("{path}.containers[{at}].ports[{index}].hostPort");
            if !taken.insert((text(&port["protocol"]), text(&port["hostIP"]), number)) {
                errors.duplicate(&field, &port["hostPort"]);
            }
            if spec["hostNetwork"] == true && port["hostPort"] != port["containerPort"] {
                let detail = "must match `containerPort` when `hostNetwork` is true";
                errors.invalid(&field, &port["hostPort"], detail);
            }
        }
    }
}

fn check_toleration(toleration: &Value, path: &str, errors: &mut Errors) {
    let operators = ["Equal", "Exists", "Gt", "Lt"];
    errors.one_of(toleration, "operator", path, &operators);
    let effects = ["NoSchedule", "PreferNoSchedule", "NoExecute", ""];
    errors.one_of(toleration, "effect", path, &effects);
    let operator = text(&toleration["operator"]);
    if text(&toleration["key"]).is_empty() && operator != "Exists" {
        let detail = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
        errors.invalid(&format!("{path}.operator"), &json!(operator), detail);
    }
    if operator == "Exists" && !text(&toleration["value"]).is_empty() {
        let detail = "value must be empty when `operator` is 'Exists'";
        errors.invalid(&format!("{path}.operator"), &toleration["value"], detail);
    }
    if toleration["tolerationSeconds"].is_number() && toleration["effect"] != "NoExecute" {
        let detail = "effect must be 'NoExecute' when `tolerationSeconds` is set";
        errors.invalid(&format!("{path}.effect"), &toleration["effect"], detail);
    }
}

/// A pod's spec stays as it is, apart from images, more tolerations, an earlier deadline and fewer gates.
fn check_update(new: &Value, old: &Value, errors: &mut Errors) {
    let mut allowed = old.clone();
    for list in ["containers", "initContainers"] {
        let count = items(&old[list]).len();
        if items(&new[list]).len() != count {
            errors
                .forbidden(&format!("spec.{list}"), "pod updates may not add or remove containers");
            return;
        }
        for index in 0..count {
            let image = &new[list][index]["image"];
            if text(image).is_empty() {
                errors.required(&format!("spec.{list}[{index}].image"), "");
                return;
            }
            if let Some(container) = allowed.pointer_mut(&format!("/{list}/{index}")) {
                container["image"] = image.clone();
            }
        }
    }
    let old_tolerations = items(&old["tolerations"]);
    let new_tolerations = items(&new["tolerations"]);
    if old_tolerations.iter().all(|one| new_tolerations.contains(one)) {
        copy(&mut allowed, new, "tolerations");
    }
    let seconds = |spec: &Value| spec["activeDeadlineSeconds"].as_i64();
    match (seconds(old), seconds(new)) {
        (old, Some(new_seconds)) if old.is_none_or(|old| new_seconds <= old) => {
            copy(&mut allowed, new, "activeDeadlineSeconds");
        }
        (Some(_), Some(_)) => {
            let detail = "must be less than or equal to previous value";
            let value = &new["activeDeadlineSeconds"];
            errors.invalid("spec.activeDeadlineSeconds", value, detail);
            return;
        }
        _ => {}
    }
    let gates = |spec: &Value| items(&spec["schedulingGates"]).to_vec();
    if gates(new).iter().all(|gate| gates(old).contains(gate)) {
        copy(&mut allowed, new, "schedulingGates");
    }
    // Has its own path, which adds to it.
    copy(&mut allowed, new, "ephemeralContainers");
    if allowed != *new {
        let fields: Vec<&str> = new
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, value)| allowed[key.as_str()] != **value)
            .map(|(key, _)| key.as_str())
            .chain(
                allowed
                    .as_object()
                    .into_iter()
                    .flatten()
                    .filter(|(key, _)| new.get(key.as_str()).is_none())
                    .map(|(key, _)| key.as_str()),
            )
            .collect();
        errors.forbidden(
            "spec",
            format!(
                "pod updates may not change fields other than `spec.containers[*].image`, `spec.initContainers[*].image`, \
                 `spec.activeDeadlineSeconds`, `spec.tolerations` (only additions); changed: {}",
                fields.join(", "),
            ),
        );
    }
}

fn copy(to: &mut Value, from: &Value, key: &str) {
    if let Some(fields) = to.as_object_mut() {
        match from.get(key) {
            Some(value) => {
                fields.insert(key.into(), value.clone());
            }
            None => {
                fields.remove(key);
            }
        }
    }
}

/// An IANA service name.
pub(super) fn is_port_name(name: &str) -> bool {
    name.len() <= 15
        && is_dns_label(name)
        && !name.contains("--")
        && name.bytes().any(|b| b.is_ascii_lowercase())
}
