//! What is wrong with a built-in object, beyond its types: names, required parts, references inside the object, and
//! fields that may not change.
//!
//! The HTTP server calls [`validate`] after defaulting, on creation and on every update of the main path (custom
//! resources: metadata only, their schema does the rest). It is a table of the rules that people and controllers run
//! into, not all of Kubernetes; references to other objects are not followed. Texts begin as Kubernetes' do
//! (`Required value`, `Invalid value: …`), because clients and people search for that.
//!
//! Source: Kubernetes 1.36, `pkg/apis/*/validation` and `k8s.io/apimachinery/pkg/util/validation`.

mod config;
mod metadata;
mod pod;
mod workload;

use crate::catalog::Resource;
use crate::status::FieldError;
use serde_json::Value;

pub use metadata::{is_dns_label, is_dns_subdomain};

/// The errors of `object`; `old` is the stored object that it would replace.
///
/// Binding a pod sets `spec.nodeName`, which no update may do: bindings are not validated here.
pub fn validate(resource: &Resource, object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Errors::default();
    metadata::check(resource, object, &mut errors);
    if resource.custom {
        return errors.0;
    }
    let spec = &object["spec"];
    let old_spec = old.map(|old| &old["spec"]);
    match (&*resource.group, &*resource.kind) {
        ("", "Pod") => pod::check_pod(spec, old_spec, &mut errors),
        ("", "PodTemplate") => pod::check_template(&object["template"], "template", &mut errors),
        ("", "ConfigMap") => config::check_config_map(object, old, &mut errors),
        ("", "Secret") => config::check_secret(object, old, &mut errors),
        ("", "Service") => config::check_service(spec, old_spec, &mut errors),
        ("", "PersistentVolumeClaim") => config::check_claim(spec, old_spec, &mut errors),
        ("", "PersistentVolume") => config::check_volume(spec, &mut errors),
        ("apps", "ControllerRevision") if old.is_some_and(|old| old["data"] != object["data"]) => {
            errors.immutable("data", &object["data"]);
        }
        // Its `data` is free; only the arm above has something to say.
        ("apps", "ControllerRevision") => {}
        ("apps", kind) => workload::check(kind, spec, old_spec, &mut errors),
        ("batch", "Job") => workload::check_job(spec, old_spec, "spec", &mut errors),
        ("batch", "CronJob") => workload::check_cron_job(spec, &mut errors),
        ("autoscaling", _) => workload::check_autoscaler(spec, &mut errors),
        ("policy", _) => workload::check_budget(spec, &mut errors),
        ("networking.k8s.io", "Ingress") => config::check_ingress(spec, &mut errors),
        ("discovery.k8s.io", _) => config::check_endpoint_slice(object, old, &mut errors),
        ("rbac.authorization.k8s.io", kind) => config::check_rbac(kind, object, old, &mut errors),
        ("scheduling.k8s.io", _) => {
            for field in ["value", "preemptionPolicy"] {
                if old.is_some_and(|old| old[field] != object[field]) {
                    errors.immutable(field, &object[field]);
                }
            }
        }
        ("node.k8s.io", _) => {
            errors.require(object, "handler", "");
            if old.is_some_and(|old| old["handler"] != object["handler"]) {
                errors.immutable("handler", &object["handler"]);
            }
        }
        ("storage.k8s.io", "StorageClass") => {
            errors.require(object, "provisioner", "");
            for field in ["provisioner", "parameters", "reclaimPolicy", "volumeBindingMode"] {
                if old.is_some_and(|old| old[field] != object[field]) {
                    errors.forbidden(field, format!("updates to {field} are forbidden."));
                }
            }
        }
        ("coordination.k8s.io", _) => {
            let duration = &spec["leaseDurationSeconds"];
            if duration.as_i64().is_some_and(|seconds| seconds <= 0) {
                errors.invalid("spec.leaseDurationSeconds", duration, "must be greater than 0");
            }
        }
        ("certificates.k8s.io", _) => {
            errors.require(spec, "request", "spec");
            errors.require(spec, "signerName", "spec");
            if old_spec.is_some_and(|old| old != spec) {
                errors.immutable("spec", spec);
            }
        }
        _ => {}
    }
    errors.0
}

/// Findings so far; the methods word them as Kubernetes does.
#[derive(Debug, Default)]
struct Errors(Vec<FieldError>);

impl Errors {
    fn push(&mut self, field: &str, reason: &'static str, message: String) {
        self.0.push(FieldError { field: field.into(), reason, message });
    }

    fn required(&mut self, field: &str, detail: &str) {
        let message = match detail {
            "" => "Required value".to_owned(),
            detail => format!("Required value: {detail}"),
        };
        self.push(field, "FieldValueRequired", message);
    }

    /// Requires a non-empty string, list or map at `owner[key]`; `path` is the owner's.
    fn require(&mut self, owner: &Value, key: &str, path: &str) {
        let empty = match &owner[key] {
            Value::Null => true,
            Value::String(text) => text.is_empty(),
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        if empty {
            self.required(&join(path, key), "");
        }
    }

    fn invalid(&mut self, field: &str, value: &Value, detail: impl AsRef<str>) {
        let message = format!("Invalid value: {value}: {}", detail.as_ref());
        self.push(field, "FieldValueInvalid", message);
    }

    fn immutable(&mut self, field: &str, value: &Value) {
        self.invalid(field, value, "field is immutable");
    }

    fn duplicate(&mut self, field: &str, value: &Value) {
        self.push(field, "FieldValueDuplicate", format!("Duplicate value: {value}"));
    }

    fn not_found(&mut self, field: &str, value: &Value) {
        self.push(field, "FieldValueNotFound", format!("Not found: {value}"));
    }

    fn forbidden(&mut self, field: &str, detail: impl AsRef<str>) {
        self.push(field, "FieldValueForbidden", format!("Forbidden: {}", detail.as_ref()));
    }

    fn too_long(&mut self, field: &str, bytes_max: usize) {
        let message = format!("Too long: may not be more than {bytes_max} bytes");
        self.push(field, "FieldValueTooLong", message);
    }

    /// Requires `owner[key]`, when it is there, to be one of `allowed`.
    fn one_of(&mut self, owner: &Value, key: &str, path: &str, allowed: &[&str]) {
        let value = &owner[key];
        if value.is_null() || value.as_str().is_some_and(|text| allowed.contains(&text)) {
            return;
        }
        let allowed: Vec<String> = allowed.iter().map(|one| format!("\"{one}\"")).collect();
        let message =
            format!("Unsupported value: {value}: supported values: {}", allowed.join(", "));
        self.push(&join(path, key), "FieldValueNotSupported", message);
    }

    /// Requires `owner[key]`, when it is there, not to be negative.
    fn not_negative(&mut self, owner: &Value, key: &str, path: &str) {
        if owner[key].as_i64().is_some_and(|number| number < 0) {
            let detail = "must be greater than or equal to 0";
            self.invalid(&join(path, key), &owner[key], detail);
        }
    }

    /// Requires a port number at `owner[key]`.
    fn port(&mut self, owner: &Value, key: &str, path: &str) {
        if !owner[key].as_i64().is_some_and(|port| (1..=65535).contains(&port)) {
            let value = if owner[key].is_null() { &Value::from(0) } else { &owner[key] };
            self.invalid(&join(path, key), value, "must be between 1 and 65535, inclusive");
        }
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.into() } else { format!("{path}.{key}") }
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

#[cfg(test)]
mod tests;
