//! Kinds that hold data, addresses, storage and rights.

use super::pod::is_port_name;
use super::{Errors, items, text};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Bytes in all values of a ConfigMap or Secret.
const DATA_BYTES_MAX: usize = 1024 * 1024;
const KEY_LEN_MAX: usize = 253;

pub(super) fn check_config_map(object: &Value, old: Option<&Value>, errors: &mut Errors) {
    let (data, binary) = (&object["data"], &object["binaryData"]);
    let mut bytes = 0;
    for (key, value) in entries(data) {
        check_key(key, "data", errors);
        bytes += text(value).len();
        if binary.get(key).is_some() {
            let detail = "duplicate of key present in binaryData";
            errors.invalid(&format!("data[{key}]"), &json!(key), detail);
        }
    }
    for (key, value) in entries(binary) {
        check_key(key, "binaryData", errors);
        bytes += decoded_len(value, &format!("binaryData[{key}]"), errors);
    }
    if bytes > DATA_BYTES_MAX {
        errors.too_long("", DATA_BYTES_MAX);
    }
    check_immutable(object, old, &["data", "binaryData"], errors);
}

pub(super) fn check_secret(object: &Value, old: Option<&Value>, errors: &mut Errors) {
    let mut bytes = 0;
    for (key, value) in entries(&object["data"]) {
        check_key(key, "data", errors);
        bytes += decoded_len(value, &format!("data[{key}]"), errors);
    }
    if bytes > DATA_BYTES_MAX {
        errors.too_long("data", DATA_BYTES_MAX);
    }
    let needed: &[&str] = match text(&object["type"]) {
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        _ => &[],
    };
    for key in needed {
        if object["data"].get(*key).is_none() {
            errors.required(&format!("data[{key}]"), "");
        }
    }
    if object["type"] == "kubernetes.io/service-account-token" {
        const OWNER: &str = "kubernetes.io/service-account.name";
        if text(&object["metadata"]["annotations"][OWNER]).is_empty() {
            errors.required(&format!("metadata.annotations[{OWNER}]"), "");
        }
    }
    if old.is_some_and(|old| old["type"] != object["type"]) {
        errors.immutable("type", &object["type"]);
    }
    check_immutable(object, old, &["data"], errors);
}

fn entries(map: &Value) -> impl Iterator<Item = (&String, &Value)> {
    map.as_object().into_iter().flat_map(Map::iter)
}

fn check_key(key: &str, path: &str, errors: &mut Errors) {
    let inside = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let dots = key == "." || key.starts_with("..");
    if key.is_empty() || key.len() > KEY_LEN_MAX || !key.bytes().all(inside) || dots {
        let detail = "a key must consist of at most 253 alphanumeric characters, '-', '_' or '.', and must not be '.' or begin with '..'";
        errors.invalid(&format!("{path}[{key}]"), &json!(key), detail);
    }
}

fn decoded_len(value: &Value, field: &str, errors: &mut Errors) -> usize {
    match STANDARD.decode(text(value)) {
        Ok(bytes) => bytes.len(),
        Err(_) => {
            errors.invalid(field, &json!("…"), "must be base64");
            0
        }
    }
}

/// Once `immutable` is set, neither it nor the data changes.
fn check_immutable(object: &Value, old: Option<&Value>, data: &[&str], errors: &mut Errors) {
    let Some(old) = old.filter(|old| old["immutable"] == true) else { return };
    let detail = "field is immutable when `immutable` is set";
    if object["immutable"] != true {
        errors.forbidden("immutable", detail);
    }
    for field in data.iter().filter(|field| old[**field] != object[**field]) {
        errors.forbidden(field, detail);
    }
}

pub(super) fn check_service(spec: &Value, old: Option<&Value>, errors: &mut Errors) {
    let types = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
    errors.one_of(spec, "type", "spec", &types);
    errors.one_of(spec, "sessionAffinity", "spec", &["ClientIP", "None"]);
    let ty = text(&spec["type"]);
    let ports = items(&spec["ports"]);
    if ty == "ExternalName" {
        errors.require(spec, "externalName", "spec");
    } else if ports.is_empty() && spec["clusterIP"] != "None" {
        errors.required("spec.ports", "");
    }
    if spec["clusterIP"] == "None" && matches!(ty, "NodePort" | "LoadBalancer") {
        let detail = format!("may not be set to 'None' for {ty} services");
        errors.invalid("spec.clusterIP", &spec["clusterIP"], detail);
    }
    let (mut names, mut numbers, mut node_ports) =
        (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (index, port) in ports.iter().enumerate() {
        let path = format!("spec.ports[{index}]");
        let name = text(&port["name"]);
        if name.is_empty() && ports.len() > 1 {
            errors.required(&format!("{path}.name"), "");
        } else if !name.is_empty() && !super::is_dns_label(name) {
            let detail = "must be a lowercase RFC 1123 label";
            errors.invalid(&format!("{path}.name"), &port["name"], detail);
        } else if !name.is_empty() && !names.insert(name) {
            errors.duplicate(&format!("{path}.name"), &port["name"]);
        }
        errors.port(port, "port", &path);
        errors.one_of(port, "protocol", &path, &["SCTP", "TCP", "UDP"]);
        let protocol = text(&port["protocol"]);
        if !numbers.insert((protocol, port["port"].as_i64())) {
            errors.duplicate(&path, &json!({"protocol": protocol, "port": port["port"]}));
        }
        match &port["targetPort"] {
            Value::Number(_) => errors.port(port, "targetPort", &path),
            Value::String(name) if !is_port_name(name) => {
                let detail = "must be a port name: at most 15 lowercase letters, digits or single '-', with a letter";
                errors.invalid(&format!("{path}.targetPort"), &port["targetPort"], detail);
            }
            _ => {}
        }
        let node_port = port["nodePort"].as_i64().unwrap_or(0);
        if node_port != 0 {
            if !matches!(ty, "NodePort" | "LoadBalancer") {
                let detail = format!("may not be used when `type` is '{ty}'");
                errors.forbidden(&format!("{path}.nodePort"), detail);
            }
            if !node_ports.insert((protocol, node_port)) {
                errors.duplicate(&format!("{path}.nodePort"), &port["nodePort"]);
            }
        }
    }
    super::metadata::labels(&spec["selector"], "spec.selector", errors);
    let Some(old) = old else { return };
    let kept = text(&old["clusterIP"]);
    let was_external = old["type"] == "ExternalName" || ty == "ExternalName";
    if !kept.is_empty() && !was_external && old["clusterIP"] != spec["clusterIP"] {
        errors.immutable("spec.clusterIP", &spec["clusterIP"]);
    }
}

pub(super) fn check_claim(spec: &Value, old: Option<&Value>, errors: &mut Errors) {
    if items(&spec["accessModes"]).is_empty() {
        errors.required("spec.accessModes", "at least 1 access mode is required");
    }
    if spec["resources"]["requests"]["storage"].is_null() {
        errors.required("spec.resources[storage]", "");
    }
    let Some(old) = old else { return };
    let without_mutable = |spec: &Value| {
        let mut spec = spec.clone();
        if let Some(fields) = spec.as_object_mut() {
            fields.remove("resources");
            fields.remove("volumeAttributesClassName");
            fields.remove("volumeName"); // bound once, below
        }
        spec
    };
    let rebound = !text(&old["volumeName"]).is_empty() && old["volumeName"] != spec["volumeName"];
    if without_mutable(old) != without_mutable(spec) || rebound {
        let detail = "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
        errors.forbidden("spec", detail);
    }
}

pub(super) fn check_volume(spec: &Value, errors: &mut Errors) {
    if items(&spec["accessModes"]).is_empty() {
        errors.required("spec.accessModes", "");
    }
    if spec["capacity"]["storage"].is_null() {
        errors.required("spec.capacity", "");
    }
    let policies = ["Delete", "Recycle", "Retain"];
    errors.one_of(spec, "persistentVolumeReclaimPolicy", "spec", &policies);
}

pub(super) fn check_ingress(spec: &Value, errors: &mut Errors) {
    if items(&spec["rules"]).is_empty() && !spec["defaultBackend"].is_object() {
        let detail = "either `defaultBackend` or `rules` must be specified";
        errors.invalid("spec", spec, detail);
    }
    for (index, rule) in items(&spec["rules"]).iter().enumerate() {
        for (at, path) in items(&rule["http"]["paths"]).iter().enumerate() {
            let field = format!("spec.rules[{index}].http.paths[{at}]");
            let types = ["Exact", "ImplementationSpecific", "Prefix"];
            if path["pathType"].is_null() {
                errors.required(&format!("{field}.pathType"), "pathType must be specified");
            }
            errors.one_of(path, "pathType", &field, &types);
            let strict = matches!(path["pathType"].as_str(), Some("Exact" | "Prefix"));
            if strict && !text(&path["path"]).starts_with('/') {
                errors.invalid(&format!("{field}.path"), &path["path"], "must be an absolute path");
            }
        }
    }
}

pub(super) fn check_endpoint_slice(object: &Value, old: Option<&Value>, errors: &mut Errors) {
    let types = ["FQDN", "IPv4", "IPv6"];
    if object["addressType"].is_null() {
        errors.required("addressType", "");
    }
    errors.one_of(object, "addressType", "", &types);
    if old.is_some_and(|old| old["addressType"] != object["addressType"]) {
        errors.immutable("addressType", &object["addressType"]);
    }
    for (index, endpoint) in items(&object["endpoints"]).iter().enumerate() {
        errors.require(endpoint, "addresses", &format!("endpoints[{index}]"));
    }
}

pub(super) fn check_rbac(kind: &str, object: &Value, old: Option<&Value>, errors: &mut Errors) {
    match kind {
        "Role" | "ClusterRole" => {
            for (index, rule) in items(&object["rules"]).iter().enumerate() {
                let path = format!("rules[{index}]");
                errors.require(rule, "verbs", &path);
                let urls = !items(&rule["nonResourceURLs"]).is_empty();
                if urls && kind == "Role" {
                    let field = format!("{path}.nonResourceURLs");
                    let detail = "namespaced rules cannot apply to non-resource URLs";
                    errors.invalid(&field, &rule["nonResourceURLs"], detail);
                } else if !urls {
                    errors.require(rule, "apiGroups", &path);
                    errors.require(rule, "resources", &path);
                }
            }
        }
        _ => {
            let role = &object["roleRef"];
            let kinds: &[&str] = match kind {
                "ClusterRoleBinding" => &["ClusterRole"],
                _ => &["ClusterRole", "Role"],
            };
            errors.one_of(role, "kind", "roleRef", kinds);
            errors.require(role, "name", "roleRef");
            if old.is_some_and(|old| old["roleRef"] != *role) {
                errors.invalid("roleRef", role, "cannot change roleRef");
            }
            for (index, subject) in items(&object["subjects"]).iter().enumerate() {
                let path = format!("subjects[{index}]");
                errors.one_of(subject, "kind", &path, &["ServiceAccount", "User", "Group"]);
                errors.require(subject, "name", &path);
                let account = subject["kind"] == "ServiceAccount";
                if account && kind == "ClusterRoleBinding" {
                    errors.require(subject, "namespace", &path);
                }
            }
        }
    }
}
