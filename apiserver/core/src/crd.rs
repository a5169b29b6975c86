//! CustomResourceDefinition objects: whether one can be served, and the status that says so.
//!
//! The HTTP server calls [`validate`] before it stores a definition and [`establish`] after; the catalogue
//! ([`crate::catalog::Catalog::with_crds`]) then serves its resources. Conversion webhooks are refused: versions of
//! one definition share their stored form.
//!
//! Source: Kubernetes 1.36, `staging/src/k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation`.

use crate::catalog::Catalog;
use crate::status::FieldError;
use crate::structural;
use crate::validation::{is_dns_label, is_dns_subdomain};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Selectable fields of one version.
const SELECTABLE_FIELDS_MAX: usize = 8;
const COLUMN_TYPES: &[&str] = &["boolean", "date", "integer", "number", "string"];
/// Groups that only Kubernetes itself defines, unless the author shows an approval.
const PROTECTED: &[&str] = &["k8s.io", "kubernetes.io"];
const APPROVAL: &str = "api-approved.kubernetes.io";
const LABEL: &str = "must be a lowercase RFC 1123 label: letters, digits or '-', with a letter or digit at both ends";

/// What is wrong with a definition, its schemas included.
pub fn validate(crd: &Value) -> Vec<FieldError> {
    let mut errors = Errors(Vec::new());
    let spec = &crd["spec"];
    let (group, plural) = (text(&spec["group"]), text(&spec["names"]["plural"]));
    if text(&crd["metadata"]["name"]) != format!("{plural}.{group}") {
        let detail = "must be spec.names.plural+\".\"+spec.group";
        errors.invalid("metadata.name", &crd["metadata"]["name"], detail);
    }
    check_group(crd, group, &mut errors);
    errors.one_of(&spec["scope"], "spec.scope", &["Cluster", "Namespaced"]);
    check_names(&spec["names"], &mut errors);
    if spec["preserveUnknownFields"] == true {
        let detail =
            "must be false: use x-kubernetes-preserve-unknown-fields in the schema instead";
        errors.invalid("spec.preserveUnknownFields", &json!(true), detail);
    }
    let strategy = &spec["conversion"]["strategy"];
    if !strategy.is_null() {
        errors.one_of(strategy, "spec.conversion.strategy", &["None"]);
    }

    let versions = items(&spec["versions"]);
    if versions.is_empty() {
        errors.required("spec.versions", "must have at least one version");
        return errors.0;
    }
    let mut names = BTreeSet::new();
    for (index, version) in versions.iter().enumerate() {
        let path = format!("spec.versions[{index}]");
        let name = text(&version["name"]);
        if !is_dns_label(name) || name.starts_with(|c: char| c.is_ascii_digit()) {
            errors.invalid(&format!("{path}.name"), &version["name"], LABEL);
        }
        if !names.insert(name) {
            errors.push(
                &format!("{path}.name"),
                "FieldValueDuplicate",
                format!("Duplicate value: \"{name}\""),
            );
        }
        check_version(version, &path, &mut errors);
    }
    if versions.iter().filter(|version| version["storage"] == true).count() != 1 {
        let detail = "must have exactly one version marked as storage version";
        errors.invalid("spec.versions", &json!(names), detail);
    }
    for (index, stored) in items(&crd["status"]["storedVersions"]).iter().enumerate() {
        if !names.contains(text(stored)) {
            let field = format!("status.storedVersions[{index}]");
            let detail = "missing from spec.versions: objects may still be stored in it";
            errors.invalid(&field, stored, detail);
        }
    }
    errors.0
}

/// Sets the status of a valid definition: accepted names, stored versions, and the conditions `NamesAccepted` and
/// `Established`.
///
/// `catalog` is what is served at the moment, `now` an RFC 3339 time. A definition whose kind or short names belong
/// to another resource of its group is not established, unless it was before.
pub fn establish(crd: &mut Value, catalog: &Catalog, now: &str) {
    let conflict = name_conflict(crd, catalog);
    let spec = &crd["spec"];
    let names = with_default_names(&spec["names"]);
    let storage = items(&spec["versions"]).iter().find(|version| version["storage"] == true);
    let storage = storage.map_or(Value::Null, |version| version["name"].clone());

    let mut status = crd["status"].as_object().cloned().unwrap_or_default();
    let mut stored = items(&crd["status"]["storedVersions"]).to_vec();
    if storage.is_string() && !stored.contains(&storage) {
        stored.push(storage);
    }
    status.insert("storedVersions".into(), stored.into());
    let mut conditions = items(&crd["status"]["conditions"]).to_vec();
    let was_established =
        conditions.iter().any(|one| one["type"] == "Established" && one["status"] == "True");
    match conflict {
        None => {
            status.insert("acceptedNames".into(), names);
            let accepted =
                ("NamesAccepted", "True", "NoConflicts", "no conflicts found".to_owned());
            set_condition(&mut conditions, accepted, now);
            let message = "the initial names have been accepted".to_owned();
            let established = ("Established", "True", "InitialNamesAccepted", message);
            set_condition(&mut conditions, established, now);
        }
        Some(message) => {
            status.entry("acceptedNames").or_insert_with(|| json!({"plural": "", "kind": ""}));
            set_condition(
                &mut conditions,
                ("NamesAccepted", "False", "NamesConflict", message),
                now,
            );
            if !was_established {
                let message = "not all names are accepted".to_owned();
                set_condition(
                    &mut conditions,
                    ("Established", "False", "NotAccepted", message),
                    now,
                );
            }
        }
    }
    status.insert("conditions".into(), conditions.into());
    if let Some(fields) = crd.as_object_mut() {
        fields.insert("status".into(), status.into());
    }
}

fn set_condition(
    conditions: &mut Vec<Value>,
    (ty, status, reason, message): (&str, &str, &str, String),
    now: &str,
) {
    let old = conditions.iter().position(|one| one["type"] == ty);
    let since = match old.map(|index| &conditions[index]) {
        Some(old) if old["status"] == status => old["lastTransitionTime"].clone(),
        _ => now.into(),
    };
    let condition = json!({
        "type": ty, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": since,
    });
    match old {
        Some(index) => conditions[index] = condition,
        None => conditions.push(condition),
    }
}

/// Which name is another resource's.
fn name_conflict(crd: &Value, catalog: &Catalog) -> Option<String> {
    let spec = &crd["spec"];
    let (group, plural) = (text(&spec["group"]), text(&spec["names"]["plural"]));
    let kind = text(&spec["names"]["kind"]);
    let short = items(&spec["names"]["shortNames"]);
    let others = || {
        let same_group = catalog.resources().filter(move |other| &*other.group == group);
        same_group.filter(move |other| !other.custom || &*other.plural != plural)
    };
    for other in others() {
        if &*other.kind == kind {
            return Some(format!("\"{kind}\" is already in use"));
        }
        if !other.custom && &*other.plural == plural {
            return Some(format!("\"{plural}\" is already in use"));
        }
        for name in short {
            if other.short_names.iter().any(|taken| **taken == *text(name)) {
                return Some(format!("\"{}\" is already in use", text(name)));
            }
        }
    }
    None
}

fn with_default_names(names: &Value) -> Value {
    let mut names: Map<String, Value> = names.as_object().cloned().unwrap_or_default();
    let kind = names.get("kind").map_or("", text).to_owned();
    names.entry("singular").or_insert_with(|| kind.to_lowercase().into());
    names.entry("listKind").or_insert_with(|| format!("{kind}List").into());
    names.into()
}

fn check_group(crd: &Value, group: &str, errors: &mut Errors) {
    if group.is_empty() {
        errors.required("spec.group", "");
    } else if !is_dns_subdomain(group) || !group.contains('.') {
        let detail = "should be a domain with at least one dot";
        errors.invalid("spec.group", &json!(group), detail);
    }
    let protected = PROTECTED.iter().any(|domain| {
        group.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    });
    if protected && text(&crd["metadata"]["annotations"][APPROVAL]).is_empty() {
        let field = format!("metadata.annotations[{APPROVAL}]");
        errors.required(&field, "protected groups must have an approval annotation");
    }
}

fn check_names(names: &Value, errors: &mut Errors) {
    for field in ["plural", "kind"] {
        if text(&names[field]).is_empty() {
            errors.required(&format!("spec.names.{field}"), "");
        }
    }
    // Kinds are compared as labels too, apart from their case.
    for field in ["plural", "singular", "kind", "listKind"] {
        let name = text(&names[field]);
        let lower = name.to_ascii_lowercase();
        let label = if field.ends_with("ind") { &*lower } else { name };
        if !name.is_empty()
            && (!is_dns_label(label) || name.starts_with(|c: char| c.is_ascii_digit()))
        {
            errors.invalid(&format!("spec.names.{field}"), &names[field], LABEL);
        }
    }
    for field in ["shortNames", "categories"] {
        for (index, name) in items(&names[field]).iter().enumerate() {
            if !is_dns_label(text(name)) {
                errors.invalid(&format!("spec.names.{field}[{index}]"), name, LABEL);
            }
        }
    }
    if !text(&names["kind"]).is_empty() && names["kind"] == names["listKind"] {
        let detail = "kind and listKind may not be the same";
        errors.invalid("spec.names.listKind", &names["listKind"], detail);
    }
}

fn check_version(version: &Value, path: &str, errors: &mut Errors) {
    let schema_path = format!("{path}.schema.openAPIV3Schema");
    match &version["schema"]["openAPIV3Schema"] {
        Value::Null => errors.required(&schema_path, "schemas are required"),
        schema => {
            if let Err(problems) = structural::compile(schema) {
                errors.0.extend(problems.into_iter().map(|problem| {
                    let field = match problem.field.as_str() {
                        "" => schema_path.clone(),
                        field => format!("{schema_path}.{field}"),
                    };
                    FieldError { field, ..problem }
                }));
            }
        }
    }
    for (index, column) in items(&version["additionalPrinterColumns"]).iter().enumerate() {
        let path = format!("{path}.additionalPrinterColumns[{index}]");
        if text(&column["name"]).is_empty() {
            errors.required(&format!("{path}.name"), "");
        }
        errors.one_of(&column["type"], &format!("{path}.type"), COLUMN_TYPES);
        check_json_path(&column["jsonPath"], &format!("{path}.jsonPath"), errors);
    }
    let selectable = items(&version["selectableFields"]);
    if selectable.len() > SELECTABLE_FIELDS_MAX {
        let message = format!(
            "Too many: {}: must have at most {SELECTABLE_FIELDS_MAX} items",
            selectable.len()
        );
        errors.push(&format!("{path}.selectableFields"), "FieldValueTooMany", message);
    }
    for (index, field) in selectable.iter().enumerate() {
        let path = format!("{path}.selectableFields[{index}].jsonPath");
        check_json_path(&field["jsonPath"], &path, errors);
    }
    let scale = &version["subresources"]["scale"];
    if scale.is_object() {
        let fields = [
            ("specReplicasPath", &[".spec."][..], true),
            ("statusReplicasPath", &[".status."][..], true),
            ("labelSelectorPath", &[".spec.", ".status."][..], false),
        ];
        for (field, prefixes, needed) in fields {
            let value = &scale[field];
            let path = format!("{path}.subresources.scale.{field}");
            if text(value).is_empty() {
                if needed {
                    errors.required(&path, "");
                }
            } else if !prefixes.iter().any(|prefix| text(value).starts_with(prefix)) {
                let detail = format!("should be a json path under {}", prefixes.join(" or "));
                errors.invalid(&path, value, detail);
            }
        }
    }
}

fn check_json_path(value: &Value, path: &str, errors: &mut Errors) {
    match text(value) {
        "" => errors.required(path, ""),
        text if !text.starts_with('.') => {
            errors.invalid(path, value, "is not a valid JSON path: must begin with '.'");
        }
        _ => {}
    }
}

struct Errors(Vec<FieldError>);

impl Errors {
    fn push(&mut self, field: &str, reason: &'static str, message: String) {
        self.0.push(FieldError { field: field.into(), reason, message });
    }

    fn required(&mut self, field: &str, detail: &str) {
        let separator = if detail.is_empty() { "" } else { ": " };
        let message = format!("Required value{separator}{detail}");
        self.push(field, "FieldValueRequired", message);
    }

    fn invalid(&mut self, field: &str, value: &Value, detail: impl AsRef<str>) {
        let message = format!("Invalid value: {value}: {}", detail.as_ref());
        self.push(field, "FieldValueInvalid", message);
    }

    fn one_of(&mut self, value: &Value, field: &str, allowed: &[&str]) {
        if value.is_null() {
            self.required(field, "");
        } else if !allowed.contains(&text(value)) {
            let allowed: Vec<String> = allowed.iter().map(|one| format!("\"{one}\"")).collect();
            let message =
                format!("Unsupported value: {value}: supported values: {}", allowed.join(", "));
            self.push(field, "FieldValueNotSupported", message);
        }
    }
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-03-01T12:00:00Z";

    fn fridge() -> Value {
        json!({
            "metadata": {"name": "fridges.shop.example"},
            "spec": {
                "group": "shop.example", "scope": "Namespaced",
                "names": {"plural": "fridges", "kind": "Fridge", "shortNames": ["fr"]},
                "versions": [{"name": "v1", "served": true, "storage": true,
                    "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                        "spec": {"type": "object", "properties": {"size": {"type": "integer"}}}}}}}],
            },
        })
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut Value), expected: &[&str]) {
        let mut crd = fridge();
        change(&mut crd);
        let errors: Vec<String> =
            validate(&crd).iter().map(|one| format!("{}: {}", one.field, one.message)).collect();
        assert_eq!(errors, expected);
    }

    #[test]
    fn good_definition_passes_and_mistakes_are_named() {
        check(|_| {}, &[]);
        check(
            |crd| crd["spec"]["scope"] = "Global".into(),
            &[
                "spec.scope: Unsupported value: \"Global\": supported values: \"Cluster\", \"Namespaced\"",
            ],
        );
        check(
            |crd| crd["metadata"]["name"] = "fridges".into(),
            &[
                "metadata.name: Invalid value: \"fridges\": must be spec.names.plural+\".\"+spec.group",
            ],
        );
        check(
            |crd| crd["spec"]["versions"][0]["storage"] = false.into(),
            &[
                "spec.versions: Invalid value: [\"v1\"]: must have exactly one version marked as storage version",
            ],
        );
        check(
            |crd| crd["spec"]["versions"][0]["schema"] = Value::Null,
            &["spec.versions[0].schema.openAPIV3Schema: Required value: schemas are required"],
        );
        check(
            |crd| crd["spec"]["conversion"] = json!({"strategy": "Webhook"}),
            &[
                "spec.conversion.strategy: Unsupported value: \"Webhook\": supported values: \"None\"",
            ],
        );
        check(
            |crd| crd["status"]["storedVersions"] = json!(["v1alpha1"]),
            &[
                "status.storedVersions[0]: Invalid value: \"v1alpha1\": missing from spec.versions: objects may still be stored in it",
            ],
        );
        check(
            |crd| {
                crd["spec"]["group"] = "shop.k8s.io".into();
                crd["metadata"]["name"] = "fridges.shop.k8s.io".into();
            },
            &[
                "metadata.annotations[api-approved.kubernetes.io]: Required value: protected groups must have an approval annotation",
            ],
        );
        check(
            |crd| {
                crd["spec"]["versions"][0]["additionalPrinterColumns"] =
                    json!([{"name": "A", "type": "text", "jsonPath": "spec"}]);
            },
            &[
                "spec.versions[0].additionalPrinterColumns[0].type: Unsupported value: \"text\": supported values: \"boolean\", \"date\", \"integer\", \"number\", \"string\"",
                "spec.versions[0].additionalPrinterColumns[0].jsonPath: Invalid value: \"spec\": is not a valid JSON path: must begin with '.'",
            ],
        );
    }

    #[test]
    fn errors_of_the_schema_are_below_the_version() {
        let mut crd = fridge();
        crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] = json!({});
        let errors = validate(&crd);
        assert!(!errors.is_empty());
        let prefix = "spec.versions[0].schema.openAPIV3Schema.";
        assert!(errors.iter().all(|error| error.field.starts_with(prefix)), "{errors:?}");
    }

    #[test]
    fn established_definition_keeps_its_times_and_stored_versions() {
        let catalog = Catalog::builtin();
        let mut crd = fridge();
        establish(&mut crd, &catalog, NOW);
        assert_eq!(crd["status"]["storedVersions"], json!(["v1"]));
        assert_eq!(crd["status"]["acceptedNames"]["listKind"], "FridgeList");
        let condition = |crd: &Value, ty: &str| {
            let found = items(&crd["status"]["conditions"]).iter().find(|one| one["type"] == ty);
            found.expect("a condition").clone()
        };
        assert_eq!(condition(&crd, "Established")["status"], "True");

        crd["spec"]["versions"][0]["name"] = "v2".into();
        let own = Catalog::with_crds(&[crd.clone()]);
        establish(&mut crd, &own, "2026-03-02T12:00:00Z");
        assert_eq!(crd["status"]["storedVersions"], json!(["v1", "v2"]));
        assert_eq!(condition(&crd, "NamesAccepted")["lastTransitionTime"], NOW);
    }

    #[test]
    fn second_definition_of_a_kind_is_not_established() {
        let first = fridge();
        let catalog = Catalog::with_crds(&[first]);
        let mut second = fridge();
        second["spec"]["names"] = json!({"plural": "coolers", "kind": "Fridge"});
        establish(&mut second, &catalog, NOW);
        let text = second["status"]["conditions"].to_string();
        assert!(text.contains("\\\"Fridge\\\" is already in use"), "{text}");
        let served = Catalog::with_crds(&[second]);
        assert!(served.find("shop.example", "v1", "coolers").is_none());
    }
}
