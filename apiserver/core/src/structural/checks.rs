//! The checks of a JSON schema beyond its structure: bounds, patterns, enumerations, formats, combinators.
//!
//! `rules` is the schema as written in the CRD. Keywords of the wrong type are ignored: compiling reports them.

use super::{
    child, format, invalid, not_supported, push_field, push_index, required, type_error, type_name,
};
use crate::ownership::{canonical, same};
use crate::status::FieldError;
use regex::Regex;
use serde_json::{Map, Value};
use std::collections::{BTreeSet, HashMap};
use std::sync::{LazyLock, Mutex, PoisonError};

/// Compiled patterns that are kept; past that all are dropped and compiled anew when needed.
const PATTERNS_MAX: usize = 1024;

/// Checks `value` against the value validations of `rules`; type, properties and items are the caller's.
pub(super) fn check(
    value: &Value,
    rules: &Map<String, Value>,
    path: &mut String,
    out: &mut Vec<FieldError>,
) {
    match value {
        Value::String(text) => check_string(value, text, rules, path, out),
        Value::Number(_) => check_number(value, rules, path, out),
        Value::Array(items) => check_array(value, items, rules, path, out),
        Value::Object(object) => check_object(value, object, rules, path, out),
        _ => {}
    }
    if let Some(Value::Array(allowed)) = rules.get("enum")
        && !allowed.iter().any(|one| same(one, value))
    {
        out.push(not_supported(path, value, allowed));
    }
    if let Some(Value::String(format)) = rules.get("format")
        && !format::fits(format, value)
    {
        out.push(FieldError {
            field: path.clone(),
            reason: "FieldValueTypeInvalid",
            message: format!(
                "Invalid value: {value}: {path} in body must be of type {format}: {value}"
            ),
        });
    }
    check_combinators(value, rules, path, out);
}

/// Checks `value` against all of a schema that stands inside a combinator.
fn check_all(
    value: &Value,
    rules: &Map<String, Value>,
    path: &mut String,
    out: &mut Vec<FieldError>,
) {
    let text = |name: &str| rules.get(name).and_then(Value::as_str);
    if let Some(expected) = text("type") {
        let found = type_name(value);
        let null_allowed = value.is_null() && rules.get("nullable") == Some(&Value::Bool(true));
        if expected != found && !(expected == "number" && found == "integer") && !null_allowed {
            out.push(type_error(path, expected, value));
            return;
        }
    }
    match value {
        Value::Object(object) => {
            for name in rules.get("required").and_then(Value::as_array).into_iter().flatten() {
                if let Some(name) = name.as_str().filter(|name| !object.contains_key(*name)) {
                    out.push(required(&child(path, name), ""));
                }
            }
            let properties = rules.get("properties").and_then(Value::as_object);
            let additional = rules.get("additionalProperties");
            for (name, below) in object {
                let field = properties.and_then(|fields| fields.get(name)).or(additional);
                if let Some(Value::Object(field)) = field {
                    let len = push_field(path, name);
                    check_all(below, field, path, out);
                    path.truncate(len);
                }
            }
        }
        Value::Array(items) => {
            if let Some(Value::Object(item_rules)) = rules.get("items") {
                for (at, item) in items.iter().enumerate() {
                    let len = push_index(path, at);
                    check_all(item, item_rules, path, out);
                    path.truncate(len);
                }
            }
        }
        _ => {}
    }
    check(value, rules, path, out);
}

fn check_string(
    value: &Value,
    text: &str,
    rules: &Map<String, Value>,
    path: &str,
    out: &mut Vec<FieldError>,
) {
    let len = text.chars().count() as u64;
    if let Some(max) = bound(rules, "maxLength").filter(|max| len > *max) {
        out.push(FieldError {
            field: path.to_owned(),
            reason: "FieldValueTooLong",
            message: format!("Too long: may not be more than {max} bytes"),
        });
    }
    if let Some(min) = bound(rules, "minLength").filter(|min| len < *min) {
        let detail = format!("{path} in body should be at least {min} chars long");
        out.push(invalid(path, value, detail));
    }
    if let Some(Value::String(pattern)) = rules.get("pattern")
        && !pattern_fits(pattern, text)
    {
        out.push(invalid(path, value, format!("{path} in body should match '{pattern}'")));
    }
}

fn check_number(value: &Value, rules: &Map<String, Value>, path: &str, out: &mut Vec<FieldError>) {
    let Some(number) = value.as_f64() else { return };
    let flag = |name: &str| rules.get(name) == Some(&Value::Bool(true));
    let mut fail = |detail: &str, bound: &Value| {
        out.push(invalid(path, value, format!("{path} in body should be {detail} {bound}")));
    };
    if let Some((bound, order)) = compare(value, rules.get("minimum")) {
        match flag("exclusiveMinimum") {
            true if order.is_le() => fail("greater than", bound),
            false if order.is_lt() => fail("greater than or equal to", bound),
            _ => {}
        }
    }
    if let Some((bound, order)) = compare(value, rules.get("maximum")) {
        match flag("exclusiveMaximum") {
            true if order.is_ge() => fail("less than", bound),
            false if order.is_gt() => fail("less than or equal to", bound),
            _ => {}
        }
    }
    if let Some(step) = rules.get("multipleOf")
        && let Some(divisor) = step.as_f64().filter(|divisor| *divisor > 0.0)
    {
        let exact = match (value.as_i64(), step.as_i64()) {
            (Some(value), Some(step)) => value % step == 0,
            // 0.3 is a multiple of 0.1, whatever binary fractions say.
            _ => {
                let ratio = number / divisor;
                (ratio - ratio.round()).abs() <= 1e-9 * ratio.abs().max(1.0)
            }
        };
        if !exact {
            fail("a multiple of", step);
        }
    }
}

/// How `value` stands to a numeric bound.
fn compare<'a>(value: &Value, bound: Option<&'a Value>) -> Option<(&'a Value, std::cmp::Ordering)> {
    let bound = bound?;
    let order = match (value.as_i64(), bound.as_i64()) {
        (Some(value), Some(bound)) => value.cmp(&bound),
        _ => value.as_f64()?.partial_cmp(&bound.as_f64()?)?,
    };
    Some((bound, order))
}

fn check_array(
    value: &Value,
    items: &[Value],
    rules: &Map<String, Value>,
    path: &str,
    out: &mut Vec<FieldError>,
) {
    let len = items.len() as u64;
    if let Some(max) = bound(rules, "maxItems").filter(|max| len > *max) {
        out.push(too_many(path, len, max));
    }
    if let Some(min) = bound(rules, "minItems").filter(|min| len < *min) {
        let detail = format!("{path} in body should have at least {min} items");
        out.push(invalid(path, &Value::from(len), detail));
    }
    if rules.get("uniqueItems") == Some(&Value::Bool(true)) {
        let unique: BTreeSet<String> = items.iter().map(canonical).collect();
        if unique.len() != items.len() {
            let detail = format!("{path} in body shouldn't contain duplicates");
            out.push(invalid(path, value, detail));
        }
    }
}

fn check_object(
    value: &Value,
    object: &Map<String, Value>,
    rules: &Map<String, Value>,
    path: &str,
    out: &mut Vec<FieldError>,
) {
    let len = object.len() as u64;
    if let Some(max) = bound(rules, "maxProperties").filter(|max| len > *max) {
        out.push(too_many(path, len, max));
    }
    if let Some(min) = bound(rules, "minProperties").filter(|min| len < *min) {
        let detail = format!("{path} in body should have at least {min} properties");
        out.push(invalid(path, value, detail));
    }
}

fn too_many(path: &str, len: u64, max: u64) -> FieldError {
    FieldError {
        field: path.to_owned(),
        reason: "FieldValueTooMany",
        message: format!("Too many: {len}: must have at most {max} items"),
    }
}

fn check_combinators(
    value: &Value,
    rules: &Map<String, Value>,
    path: &mut String,
    out: &mut Vec<FieldError>,
) {
    let list = |name: &str| match rules.get(name) {
        Some(Value::Array(list)) if !list.is_empty() => Some(list.as_slice()),
        _ => None,
    };
    let empty = Value::String(String::new());
    if let Some(all) = list("allOf") {
        let before = out.len();
        for one in all.iter().filter_map(Value::as_object) {
            check_all(value, one, path, out);
        }
        if out.len() > before {
            let detail = format!("\"{path}\" must validate all the schemas (allOf)");
            out.insert(before, invalid(path, &empty, detail));
        }
    }
    if let Some(any) = list("anyOf") {
        let tries = attempts(value, any, path);
        if !tries.iter().any(Vec::is_empty) {
            let detail = format!("\"{path}\" must validate at least one schema (anyOf)");
            out.push(invalid(path, &empty, detail));
            out.extend(best(tries));
        }
    }
    if let Some(one) = list("oneOf") {
        let tries = attempts(value, one, path);
        let valid = tries.iter().filter(|errors| errors.is_empty()).count();
        if valid != 1 {
            let found = match valid {
                0 => "Found none valid".to_owned(),
                many => format!("Found {many} valid alternatives"),
            };
            let detail =
                format!("\"{path}\" must validate one and only one schema (oneOf). {found}");
            out.push(invalid(path, &empty, detail));
            if valid == 0 {
                out.extend(best(tries));
            }
        }
    }
    if let Some(Value::Object(not)) = rules.get("not") {
        let mut errors = Vec::new();
        check_all(value, not, path, &mut errors);
        if errors.is_empty() {
            let detail = format!("\"{path}\" must not validate the schema (not)");
            out.push(invalid(path, &empty, detail));
        }
    }
}

fn attempts(value: &Value, schemas: &[Value], path: &mut String) -> Vec<Vec<FieldError>> {
    schemas
        .iter()
        .map(|schema| {
            let mut errors = Vec::new();
            if let Some(rules) = schema.as_object() {
                check_all(value, rules, path, &mut errors);
            }
            errors
        })
        .collect()
}

/// The errors of the alternative that came nearest.
fn best(tries: Vec<Vec<FieldError>>) -> Vec<FieldError> {
    tries.into_iter().min_by_key(Vec::len).unwrap_or_default()
}

fn bound(rules: &Map<String, Value>, name: &str) -> Option<u64> {
    rules.get(name).and_then(Value::as_u64)
}

/// Whether `pattern` occurs in `text`. A pattern that does not compile fits nothing.
fn pattern_fits(pattern: &str, text: &str) -> bool {
    static PATTERNS: LazyLock<Mutex<HashMap<String, Option<Regex>>>> =
        LazyLock::new(Mutex::default);
    let regex = {
        let mut patterns = PATTERNS.lock().unwrap_or_else(PoisonError::into_inner);
        match patterns.get(pattern) {
            Some(known) => known.clone(),
            None => {
                if patterns.len() >= PATTERNS_MAX {
                    patterns.clear();
                }
                let regex = Regex::new(pattern).ok();
                patterns.insert(pattern.to_owned(), regex.clone());
                regex
            }
        }
    };
    regex.is_some_and(|regex| regex.is_match(text))
}
