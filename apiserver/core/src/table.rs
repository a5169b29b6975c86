//! Tables: objects as the rows that `kubectl get` prints.
//!
//! The HTTP server calls [`table`] when a client accepts `as=Table`. Built-in kinds have their columns in
//! [`builtin`], custom resources print the JSON paths of their definition. Nothing here changes an object.
//!
//! Source: Kubernetes, `pkg/printers/internalversion/printers.go` for the columns, `k8s.io/apimachinery` for ages.

mod age;
mod builtin;
mod json_path;
mod pod;

pub use age::human_duration;

use crate::catalog::{Column, Resource};
use jiff::Timestamp;
use serde_json::{Value, json};

/// What a cell shows when there is nothing to show.
const NONE: &str = "<none>";
/// What a cell shows when the object should say and does not.
const UNKNOWN: &str = "<unknown>";

/// The `meta.k8s.io/v1 Table` of `objects`.
///
/// `list_meta` becomes its metadata. `include` is the query parameter `includeObject`: `Object` puts whole objects
/// into the rows, `None` nothing, and anything else their metadata.
pub fn table(
    resource: &Resource,
    objects: &[&Value],
    list_meta: Value,
    include: &str,
    now: Timestamp,
) -> Value {
    let printer = Printer::of(resource);
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let cells = printer.cells(object, now);
            match include {
                "None" => json!({"cells": cells}),
                "Object" => json!({"cells": cells, "object": object}),
                _ => json!({"cells": cells, "object": {
                    "kind": "PartialObjectMetadata",
                    "apiVersion": "meta.k8s.io/v1",
                    "metadata": object["metadata"],
                }}),
            }
        })
        .collect();
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": list_meta,
        "columnDefinitions": printer.definitions(),
        "rows": rows,
    })
}

enum Printer<'a> {
    Builtin(&'static builtin::Printer),
    Custom(&'a [Column]),
}

impl<'a> Printer<'a> {
    fn of(resource: &'a Resource) -> Self {
        if resource.custom && !resource.columns.is_empty() {
            return Self::Custom(&resource.columns);
        }
        Self::Builtin(builtin::printer(&resource.group, &resource.kind))
    }

    fn definitions(&self) -> Vec<Value> {
        let mut definitions = vec![definition("Name", "string", "name", "Name of the object", 0)];
        match self {
            Self::Builtin(printer) => {
                definitions.extend(printer.columns.iter().map(|column| {
                    definition(column.name, column.ty, "", column.name, column.priority)
                }));
                if printer.name_is_last {
                    definitions.rotate_left(1);
                    if let Some(name) = definitions.last_mut() {
                        name["priority"] = 1.into();
                    }
                }
            }
            Self::Custom(columns) => definitions.extend(columns.iter().map(|column| {
                let Column { name, ty, format, description, priority, .. } = column;
                definition(name, ty, format, description, *priority)
            })),
        }
        definitions
    }

    fn cells(&self, object: &Value, now: Timestamp) -> Vec<Value> {
        let mut cells = vec![object["metadata"]["name"].clone()];
        match self {
            Self::Builtin(printer) => {
                cells.extend((printer.cells)(object, now));
                if printer.name_is_last {
                    cells.rotate_left(1);
                }
            }
            Self::Custom(columns) => {
                cells.extend(columns.iter().map(|column| custom_cell(column, object, now)));
            }
        }
        cells
    }
}

fn definition(name: &str, ty: &str, format: &str, description: &str, priority: i64) -> Value {
    json!({
        "name": name, "type": ty, "format": format, "description": description, "priority": priority,
    })
}

/// The first value at the column's path, in the column's type; null when there is none.
fn custom_cell(column: &Column, object: &Value, now: Timestamp) -> Value {
    let found = json_path::find(&column.json_path, object);
    let Some(value) = found.first() else { return Value::Null };
    match column.ty.as_str() {
        "integer" => match value.as_i64().or(value.as_f64().map(|number| number as i64)) {
            Some(number) => number.into(),
            None => Value::Null,
        },
        "number" if value.is_number() => (*value).clone(),
        "boolean" if value.is_boolean() => (*value).clone(),
        "date" => match value.as_str() {
            Some(text) => age::since(text, now).into(),
            None => Value::Null,
        },
        "string" => match value {
            Value::String(text) => text.as_str().into(),
            Value::Null => Value::Null,
            other => other.to_string().into(),
        },
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests;
