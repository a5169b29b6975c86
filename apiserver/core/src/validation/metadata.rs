//! Names, labels, annotations, owners and finalizers of every kind.

use super::{Errors, items, text};
use crate::catalog::Resource;
use crate::selector::{check_label_key, check_label_value};
use serde_json::Value;

const ANNOTATIONS_BYTES_MAX: usize = 256 * 1024;
const SUBDOMAIN_LEN_MAX: usize = 253;
const LABEL_LEN_MAX: usize = 63;

const SUBDOMAIN: &str = "must be a lowercase RFC 1123 subdomain: letters, digits, '-' or '.', with a letter or digit at both ends of each part";
const LABEL: &str = "must be a lowercase RFC 1123 label: letters, digits or '-', with a letter or digit at both ends";
const SERVICE: &str = "must be a DNS-1035 label: lowercase letters, digits or '-', beginning with a letter and ending with a letter or digit";

/// Whether `text` is a lowercase RFC 1123 label.
pub fn is_dns_label(text: &str) -> bool {
    let inside = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty()
        && text.len() <= LABEL_LEN_MAX
        && text.bytes().all(inside)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Whether `text` is a lowercase RFC 1123 subdomain. Its parts may be longer than labels, as in Kubernetes.
pub fn is_dns_subdomain(text: &str) -> bool {
    let part = |part: &str| {
        let inside = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !part.is_empty()
            && part.bytes().all(inside)
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    text.len() <= SUBDOMAIN_LEN_MAX && text.split('.').all(part)
}

pub(super) fn check(resource: &Resource, object: &Value, errors: &mut Errors) {
    let metadata = &object["metadata"];
    name(resource, &metadata["name"], errors);
    match (resource.namespaced, text(&metadata["namespace"])) {
        (true, "") => errors.required("metadata.namespace", ""),
        (true, namespace) if !is_dns_label(namespace) => {
            errors.invalid("metadata.namespace", &metadata["namespace"], LABEL);
        }
        (false, namespace) if !namespace.is_empty() => {
            errors.forbidden("metadata.namespace", "not allowed on this type");
        }
        _ => {}
    }
    labels(&metadata["labels"], "metadata.labels", errors);
    annotations(&metadata["annotations"], errors);
    for finalizer in items(&metadata["finalizers"]) {
        if let Err(problem) = check_label_key(text(finalizer)) {
            errors.invalid("metadata.finalizers", finalizer, problem);
        }
    }
    let mut controllers = 0;
    for (index, owner) in items(&metadata["ownerReferences"]).iter().enumerate() {
        let path = format!("metadata.ownerReferences[{index}]");
        for field in ["apiVersion", "kind", "name", "uid"] {
            if text(&owner[field]).is_empty() {
                errors.invalid(&format!("{path}.{field}"), &Value::from(""), "must not be empty");
            }
        }
        controllers += u32::from(owner["controller"] == true);
    }
    if controllers > 1 {
        let owners = &metadata["ownerReferences"];
        errors.invalid("metadata.ownerReferences", owners, "only one owner may be the controller");
    }
}

fn name(resource: &Resource, name: &Value, errors: &mut Errors) {
    let text = text(name);
    if text.is_empty() {
        errors.required("metadata.name", "name or generateName is required");
        return;
    }
    let problem = match (&*resource.group, &*resource.kind) {
        // These names appear as one path segment, and nothing else is asked of them.
        ("rbac.authorization.k8s.io", _) => {
            let bad = matches!(text, "." | "..") || text.contains(['/', '%']);
            bad.then_some("may not be '.' or '..' or contain '/' or '%'")
        }
        ("", "Namespace") => (!is_dns_label(text)).then_some(LABEL),
        ("", "Service") => {
            let bad = !is_dns_label(text) || text.starts_with(|c: char| c.is_ascii_digit());
            bad.then_some(SERVICE)
        }
        _ => (!is_dns_subdomain(text)).then_some(SUBDOMAIN),
    };
    if let Some(problem) = problem {
        errors.invalid("metadata.name", name, problem);
    }
}

/// A map of labels at `path`.
pub(super) fn labels(labels: &Value, path: &str, errors: &mut Errors) {
    for (key, value) in labels.as_object().into_iter().flatten() {
        if let Err(problem) = check_label_key(key) {
            errors.invalid(path, &Value::from(key.as_str()), problem);
        }
        if let Err(problem) = check_label_value(text(value)) {
            errors.invalid(path, value, problem);
        }
    }
}

fn annotations(annotations: &Value, errors: &mut Errors) {
    let mut bytes = 0;
    for (key, value) in annotations.as_object().into_iter().flatten() {
        if let Err(problem) = check_label_key(&key.to_lowercase()) {
            errors.invalid("metadata.annotations", &Value::from(key.as_str()), problem);
        }
        bytes += key.len() + text(value).len();
    }
    if bytes > ANNOTATIONS_BYTES_MAX {
        errors.too_long("metadata.annotations", ANNOTATIONS_BYTES_MAX);
    }
}
