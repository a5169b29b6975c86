//! Objects against their schema: unknown fields, pruning, defaulting, validation; and the compiling of a CRD's
//! schema.
//!
//! The HTTP layer calls [`unknown_fields`] and [`prune`] on what a client sent, [`default`] on what it stores and
//! reads (which also drops nulls that mean nothing, for built-in kinds as well), and [`validate`] before it stores.
//! The catalogue calls [`compile`]. Rules in CEL (`x-kubernetes-validations`) are kept in [`Schema::checks`] and not
//! evaluated.
//!
//! Source: kubernetes/apiextensions-apiserver, pkg/apiserver/schema/{structural,validation,complete}.go,
//! schema/{pruning,defaulting,listtype,objectmeta}/, pkg/apiserver/validation/validation.go; texts from
//! kubernetes/kube-openapi, pkg/validation/errors/ and kubernetes/apimachinery, pkg/util/validation/field/errors.go.

mod checks;
mod compile;
mod format;
#[cfg(test)]
mod tests;

pub use compile::{DEPTH_MAX, compile};

use crate::ownership::canonical;
use crate::schema::{ListType, Node, Schema, Schemas, Type};
use crate::status::FieldError;
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// Paths of the fields that the schema does not know, such as `spec.containers[0].foo`.
pub fn unknown_fields(object: &Value, node: &Node, schemas: &Schemas) -> Vec<String> {
    let mut out = Vec::new();
    collect_unknown(object, node, schemas, &mut String::new(), &mut out);
    out
}

fn collect_unknown(
    value: &Value,
    node: &Node,
    schemas: &Schemas,
    path: &mut String,
    out: &mut Vec<String>,
) {
    let schema = schemas.resolve(node);
    match value {
        Value::Object(object) => {
            for (name, below) in object {
                let len = push_field(path, name);
                match known_field(schema, name) {
                    Known::As(field) => collect_unknown(below, field, schemas, path, out),
                    Known::Free => {}
                    Known::Not => out.push(path.clone()),
                }
                path.truncate(len);
            }
        }
        Value::Array(items) => {
            let Some(item_node) = &schema.items else { return };
            for (at, item) in items.iter().enumerate() {
                let len = push_index(path, at);
                collect_unknown(item, item_node, schemas, path, out);
                path.truncate(len);
            }
        }
        _ => {}
    }
}

/// Takes out the fields that the schema does not know.
pub fn prune(object: &mut Value, node: &Node, schemas: &Schemas) {
    let schema = schemas.resolve(node);
    match object {
        Value::Object(object) => object.retain(|name, below| match known_field(schema, name) {
            Known::As(field) => {
                prune(below, field, schemas);
                true
            }
            Known::Free => true,
            Known::Not => false,
        }),
        Value::Array(items) => {
            let Some(item_node) = &schema.items else { return };
            for item in items {
                prune(item, item_node, schemas);
            }
        }
        _ => {}
    }
}

/// Sets absent fields to their defaults. A null where none is allowed gives way to the default, or is taken out.
pub fn default(object: &mut Value, node: &Node, schemas: &Schemas) {
    let schema = schemas.resolve(node);
    match object {
        Value::Object(object) => {
            for (name, field) in &schema.properties {
                let Some(default) = &schemas.resolve(field).default else { continue };
                let field = schemas.resolve(field);
                match object.get(&**name) {
                    None => {}
                    Some(Value::Null) if !field.nullable => {}
                    Some(_) => continue,
                }
                object.insert(name.to_string(), default.clone());
            }
            object.retain(|name, below| {
                let Known::As(field) = known_field(schema, name) else { return true };
                let field_schema = schemas.resolve(field);
                if below.is_null() {
                    return field_schema.nullable || field_schema.ty == Type::Any;
                }
                default(below, field, schemas);
                true
            });
        }
        Value::Array(items) => {
            let Some(item_node) = &schema.items else { return };
            let item_schema = schemas.resolve(item_node);
            for item in items {
                if item.is_null()
                    && !item_schema.nullable
                    && let Some(default) = &item_schema.default
                {
                    *item = default.clone();
                }
                default(item, item_node, schemas);
            }
        }
        _ => {}
    }
}

/// What is wrong with `object`, in the order of its fields.
pub fn validate(object: &Value, node: &Node, schemas: &Schemas) -> Vec<FieldError> {
    let mut out = Vec::new();
    check_value(object, node, schemas, &mut String::new(), &mut out);
    out
}

fn check_value(
    value: &Value,
    node: &Node,
    schemas: &Schemas,
    path: &mut String,
    out: &mut Vec<FieldError>,
) {
    let schema = schemas.resolve(node);
    if value.is_null() && (schema.nullable || schema.ty == Type::Any) {
        return;
    }
    if let Some(expected) = expected_type(schema.ty, value) {
        out.push(type_error(path, expected, value));
        return;
    }
    match value {
        Value::Object(object) => check_object(object, schema, schemas, path, out),
        Value::Array(items) => check_items(items, schema, schemas, path, out),
        _ => {}
    }
    if let Some(Value::Object(rules)) = schema.checks.as_deref() {
        checks::check(value, rules, path, out);
    }
}

fn check_object(
    object: &Map<String, Value>,
    schema: &Schema,
    schemas: &Schemas,
    path: &mut String,
    out: &mut Vec<FieldError>,
) {
    for name in &schema.required {
        if !object.contains_key(&**name) {
            out.push(required(&child(path, name), ""));
        }
    }
    if schema.embedded {
        for name in ["apiVersion", "kind"] {
            if object.get(name).is_none_or(|value| value.as_str() == Some("")) {
                out.push(required(&child(path, name), "must not be empty"));
            }
        }
    }
    for (name, below) in object {
        if let Known::As(field) = known_field(schema, name) {
            let len = push_field(path, name);
            check_value(below, field, schemas, path, out);
            path.truncate(len);
        }
    }
}

fn check_items(
    items: &[Value],
    schema: &Schema,
    schemas: &Schemas,
    path: &mut String,
    out: &mut Vec<FieldError>,
) {
    if let Some(item_node) = &schema.items {
        for (at, item) in items.iter().enumerate() {
            let len = push_index(path, at);
            check_value(item, item_node, schemas, path, out);
            path.truncate(len);
        }
    }
    if schema.list == ListType::Atomic {
        return;
    }
    let mut seen = BTreeSet::new();
    for (at, item) in items.iter().enumerate() {
        let Some(identity) = identity(item, schema, schemas) else { continue };
        if !seen.insert(canonical(&identity)) {
            out.push(FieldError {
                field: format!("{path}[{at}]"),
                reason: "FieldValueDuplicate",
                message: format!("Duplicate value: {identity}"),
            });
        }
    }
}

/// What must be unique among the items of a set or a map list; `None` for an item whose type is wrong.
fn identity(item: &Value, list: &Schema, schemas: &Schemas) -> Option<Value> {
    if list.list == ListType::Set {
        return Some(item.clone());
    }
    let item = item.as_object()?;
    let item_schema = list.items.as_ref().map(|node| schemas.resolve(node));
    let mut key = Map::new();
    for name in &list.list_map_keys {
        let default = || schemas.resolve(item_schema?.properties.get(name)?).default.as_ref();
        if let Some(value) = item.get(&**name).or_else(default) {
            key.insert(name.to_string(), value.clone());
        }
    }
    Some(Value::Object(key))
}

/// What a schema says about a field.
enum Known<'a> {
    /// It has this schema.
    As(&'a Node),
    /// Nothing, and it may be there.
    Free,
    /// It should not be there.
    Not,
}

fn known_field<'a>(schema: &'a Schema, name: &str) -> Known<'a> {
    match schema.properties.get(name).or(schema.additional.as_ref()) {
        Some(field) => Known::As(field),
        None if schema.preserve_unknown || schema.ty != Type::Object => Known::Free,
        None => Known::Not,
    }
}

/// The type that `value` should have had.
fn expected_type(ty: Type, value: &Value) -> Option<&'static str> {
    let (fits, expected) = match ty {
        Type::Any => return None,
        Type::Object => (value.is_object(), "object"),
        Type::Array => (value.is_array(), "array"),
        Type::String => (value.is_string(), "string"),
        Type::Integer => (is_integer(value), "integer"),
        Type::Number => (value.is_number(), "number"),
        Type::Boolean => (value.is_boolean(), "boolean"),
        Type::IntOrString => (is_integer(value) || value.is_string(), "integer,string"),
    };
    (!fits).then_some(expected)
}

fn is_integer(value: &Value) -> bool {
    value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|n| n.fract() == 0.0)
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) if is_integer(value) => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn type_error(path: &str, expected: &str, value: &Value) -> FieldError {
    let found = type_name(value);
    FieldError {
        field: path.to_owned(),
        reason: "FieldValueTypeInvalid",
        message: format!(
            "Invalid value: \"{found}\": {path} in body must be of type {expected}: \"{found}\""
        ),
    }
}

fn required(path: &str, detail: &str) -> FieldError {
    let mut message = "Required value".to_owned();
    if !detail.is_empty() {
        message.push_str(": ");
        message.push_str(detail);
    }
    FieldError { field: path.to_owned(), reason: "FieldValueRequired", message }
}

fn invalid(path: &str, value: &Value, detail: impl std::fmt::Display) -> FieldError {
    FieldError {
        field: path.to_owned(),
        reason: "FieldValueInvalid",
        message: format!("Invalid value: {value}: {detail}"),
    }
}

fn not_supported(path: &str, value: &Value, supported: &[Value]) -> FieldError {
    let supported: Vec<String> = supported
        .iter()
        .map(|value| match value {
            Value::String(_) => value.to_string(),
            // Values that are no strings appear as the text of their JSON.
            other => Value::String(other.to_string()).to_string(),
        })
        .collect();
    FieldError {
        field: path.to_owned(),
        reason: "FieldValueNotSupported",
        message: format!("Unsupported value: {value}: supported values: {}", supported.join(", ")),
    }
}

fn forbidden(path: &str, detail: impl std::fmt::Display) -> FieldError {
    FieldError {
        field: path.to_owned(),
        reason: "FieldValueForbidden",
        message: format!("Forbidden: {detail}"),
    }
}

/// `path` with a field; returns the old length, for truncating.
fn push_field(path: &mut String, name: &str) -> usize {
    let len = path.len();
    if len > 0 {
        path.push('.');
    }
    path.push_str(name);
    len
}

fn push_index(path: &mut String, at: usize) -> usize {
    use std::fmt::Write as _;
    let len = path.len();
    write!(path, "[{at}]").expect("writing to a string cannot fail");
    len
}

fn child(path: &str, name: &str) -> String {
    let mut path = path.to_owned();
    push_field(&mut path, name);
    path
}
