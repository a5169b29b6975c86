//! Strategic merge patch: a merge patch in which lists merge by key, guided by the schema and by directives.

use crate::ownership::{canonical, same};
use crate::schema::{Node, Schema, Schemas};
use crate::status::ApiError;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_PRIMITIVES: &str = "$deleteFromPrimitiveList/";
const ELEMENT_ORDER: &str = "$setElementOrder/";

/// Applies a strategic merge patch.
///
/// Maps merge, `null` deletes, lists whose schema says `merge` merge by merge key or, for scalars, as sets; other
/// lists are replaced. Directives: `$patch: delete|replace|merge` in a map or a list item, `$retainKeys`,
/// `$deleteFromPrimitiveList/<field>`, `$setElementOrder/<field>`. In a merged list the patched items come in the
/// order of `$setElementOrder`, else of the patch; the others keep their places relative to them, and items that are
/// new come before the others.
///
/// # Errors
///
/// 400 for a patch that is no object, an item without its merge key, or a malformed directive.
pub fn strategic_merge(
    live: &Value,
    patch: &Value,
    node: &Node,
    schemas: &Schemas,
) -> Result<Value, ApiError> {
    let Some(patch) = patch.as_object() else {
        return Err(ApiError::bad_request("a strategic merge patch must be an object"));
    };
    let nothing = Map::new();
    let live = live.as_object().unwrap_or(&nothing);
    let merged = merge_map(live, patch, schemas.resolve(node), schemas)?;
    Ok(Value::Object(merged.unwrap_or_default()))
}

static UNTYPED: LazyLock<Node> = LazyLock::new(|| {
    Node::Inline(Arc::new(Schema { preserve_unknown: true, ..Schema::default() }))
});

fn field_schema<'a>(schema: &'a Schema, name: &str, schemas: &'a Schemas) -> &'a Schema {
    let node = schema.properties.get(name).or(schema.additional.as_ref());
    schemas.resolve(node.unwrap_or(&UNTYPED))
}

/// What `$patch` says in a map.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Directive {
    Merge,
    Replace,
    Delete,
}

fn directive(patch: &Map<String, Value>) -> Result<Directive, ApiError> {
    match patch.get(DIRECTIVE) {
        None => Ok(Directive::Merge),
        Some(value) => match value.as_str() {
            Some("merge") => Ok(Directive::Merge),
            Some("replace") => Ok(Directive::Replace),
            Some("delete") => Ok(Directive::Delete),
            _ => Err(ApiError::bad_request(format!(
                "unknown patch type: {value} (`{DIRECTIVE}` is one of `delete`, `merge`, `replace`)"
            ))),
        },
    }
}

/// `None`: the patch deletes the map.
fn merge_map(
    live: &Map<String, Value>,
    patch: &Map<String, Value>,
    schema: &Schema,
    schemas: &Schemas,
) -> Result<Option<Map<String, Value>>, ApiError> {
    let nothing = Map::new();
    let live = match directive(patch)? {
        Directive::Delete => return Ok(None),
        Directive::Replace => &nothing,
        Directive::Merge => live,
    };
    let mut out = live.clone();
    retain_keys(&mut out, patch)?;
    for (name, value) in patch {
        if let Some(field) = name.strip_prefix(DELETE_PRIMITIVES) {
            delete_primitives(&mut out, field, value)?;
        } else if let Some(field) = name.strip_prefix(ELEMENT_ORDER)
            && !patch.contains_key(field)
        {
            let below = field_schema(schema, field, schemas);
            if let Some(Value::Array(items)) = out.get(field) {
                let merged = merge_list(items, &[], Some(order(field, value)?), below, schemas)?;
                out.insert(field.to_owned(), Value::Array(merged));
            }
        } else if !name.starts_with('$') {
            merge_field(&mut out, name, value, patch, schema, schemas)?;
        }
    }
    Ok(Some(out))
}

fn merge_field(
    out: &mut Map<String, Value>,
    name: &str,
    value: &Value,
    patch: &Map<String, Value>,
    schema: &Schema,
    schemas: &Schemas,
) -> Result<(), ApiError> {
    let below = field_schema(schema, name, schemas);
    let merged = match (value, out.get(name)) {
        (Value::Null, _) => None,
        (Value::Object(value), live) => {
            let nothing = Map::new();
            let live = live.and_then(Value::as_object).unwrap_or(&nothing);
            // Upstream leaves an empty object where `$patch: delete` empties one that is a field.
            let merged = merge_map(live, value, below, schemas)?;
            Some(Value::Object(merged.unwrap_or_default()))
        }
        (Value::Array(value), live) if below.patch_merge => {
            let live = live.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let order = match patch.get(&format!("{ELEMENT_ORDER}{name}")) {
                Some(list) => Some(order(name, list)?),
                None => None,
            };
            Some(Value::Array(merge_list(live, value, order, below, schemas)?))
        }
        (Value::Array(value), _) => Some(Value::Array(new_items(value, below, schemas)?)),
        (value, _) => Some(value.clone()),
    };
    match merged {
        Some(merged) => out.insert(name.to_owned(), merged),
        None => out.remove(name),
    };
    Ok(())
}

/// Items of a list that is replaced: directives are carried out, nulls dropped.
fn new_items(items: &[Value], list: &Schema, schemas: &Schemas) -> Result<Vec<Value>, ApiError> {
    let schema = item_schema(list, schemas);
    let mut out = Vec::with_capacity(items.len());
    for item in items {
        match item {
            Value::Object(item) => {
                let replace = is_lone_replace(item);
                if let Some(item) = merge_map(&Map::new(), item, schema, schemas)?
                    && !replace
                {
                    out.push(Value::Object(item));
                }
            }
            Value::Array(below) => out.push(Value::Array(new_items(below, schema, schemas)?)),
            other => out.push(other.clone()),
        }
    }
    Ok(out)
}

fn item_schema<'a>(list: &'a Schema, schemas: &'a Schemas) -> &'a Schema {
    schemas.resolve(list.items.as_ref().unwrap_or(&UNTYPED))
}

/// `{$patch: replace}` as an item: the list of the patch replaces that of the object.
fn is_lone_replace(item: &Map<String, Value>) -> bool {
    item.len() == 1 && item.get(DIRECTIVE).and_then(Value::as_str) == Some("replace")
}

fn retain_keys(out: &mut Map<String, Value>, patch: &Map<String, Value>) -> Result<(), ApiError> {
    let Some(list) = patch.get(RETAIN_KEYS) else { return Ok(()) };
    let keys: Option<Vec<&str>> =
        list.as_array().and_then(|keys| keys.iter().map(Value::as_str).collect());
    let keys = keys.ok_or_else(|| {
        ApiError::bad_request(format!("invalid patch format of `{RETAIN_KEYS}`: {list}"))
    })?;
    let stray = patch.iter().find(|(name, value)| {
        !name.starts_with('$') && !value.is_null() && !keys.contains(&&***name)
    });
    if let Some((name, _)) = stray {
        return Err(ApiError::bad_request(format!(
            "invalid patch format of `{RETAIN_KEYS}`: `{name}` is set and not in the list {list}"
        )));
    }
    out.retain(|name, _| keys.contains(&name.as_str()));
    Ok(())
}

fn delete_primitives(
    out: &mut Map<String, Value>,
    field: &str,
    value: &Value,
) -> Result<(), ApiError> {
    let Some(values) = value.as_array().filter(|values| values.iter().all(is_scalar)) else {
        return Err(ApiError::bad_request(format!(
            "invalid patch format of primitive list: `{DELETE_PRIMITIVES}{field}` must be a list of scalars"
        )));
    };
    if let Some(Value::Array(items)) = out.get_mut(field) {
        items.retain(|item| !values.iter().any(|value| same(value, item)));
    }
    Ok(())
}

/// The items of `$setElementOrder/<field>`.
fn order<'a>(field: &str, value: &'a Value) -> Result<&'a [Value], ApiError> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| {
        ApiError::bad_request(format!(
            "invalid patch format of `{ELEMENT_ORDER}{field}`: {value} is no list"
        ))
    })
}

/// A list whose schema says `merge`.
fn merge_list(
    live: &[Value],
    patch: &[Value],
    order: Option<&[Value]>,
    list: &Schema,
    schemas: &Schemas,
) -> Result<Vec<Value>, ApiError> {
    let scalars = live.iter().chain(patch).all(is_scalar);
    let schema = item_schema(list, schemas);
    if patch.iter().any(|item| item.as_object().is_some_and(is_lone_replace)) {
        return new_items(patch, list, schemas);
    }
    let merge_key = list.patch_merge_key.as_deref();
    let key_of = |item: &Value| -> Result<String, ApiError> {
        match (item, merge_key) {
            (Value::Object(object), Some(name)) => match object.get(name) {
                Some(Value::Null) | None => Err(ApiError::bad_request(format!(
                    "map: {item} does not contain declared merge key: {name}"
                ))),
                Some(key) => Ok(canonical(key)),
            },
            (Value::Object(_) | Value::Array(_), _) => Err(ApiError::bad_request(format!(
                "unable to merge the list: {item} has no merge key"
            ))),
            (scalar, _) if scalars || merge_key.is_none() => Ok(canonical(scalar)),
            (scalar, _) => Err(ApiError::bad_request(format!(
                "the list is of maps, and the patch has the scalar {scalar}"
            ))),
        }
    };

    let live_keys = live.iter().map(&key_of).collect::<Result<Vec<_>, _>>()?;
    let mut merged: BTreeMap<String, Value> = BTreeMap::new();
    let mut merged_keys = Vec::new(); // in the order of live, then of the patch
    for (key, item) in live_keys.iter().zip(live) {
        if merged.insert(key.clone(), item.clone()).is_none() {
            merged_keys.push(key.clone());
        }
    }
    let mut patch_keys = Vec::new();
    for item in patch {
        let key = key_of(item)?;
        let Value::Object(item) = item else {
            if merged.insert(key.clone(), item.clone()).is_none() {
                merged_keys.push(key.clone());
            }
            patch_keys.push(key);
            continue;
        };
        let nothing = Map::new();
        let old = merged.get(&key).and_then(Value::as_object).unwrap_or(&nothing);
        match merge_map(old, item, schema, schemas)? {
            Some(item) => {
                if merged.insert(key.clone(), Value::Object(item)).is_none() {
                    merged_keys.push(key.clone());
                }
                patch_keys.push(key);
            }
            None => {
                merged.remove(&key);
                merged_keys.retain(|known| *known != key);
                patch_keys.retain(|known| *known != key);
            }
        }
    }
    let wanted = match order {
        Some(order) => {
            let wanted =
                order.iter().map(|item| order_key(item, &key_of)).collect::<Result<Vec<_>, _>>()?;
            if let Some(stray) = patch_keys.iter().find(|key| !wanted.contains(key)) {
                return Err(ApiError::bad_request(format!(
                    "the item {stray} of the patch is not in its `{ELEMENT_ORDER}` list"
                )));
            }
            wanted
        }
        None => patch_keys,
    };
    let keys = arrange(&live_keys, &merged_keys, &wanted);
    Ok(keys.into_iter().filter_map(|key| merged.remove(key)).collect())
}

/// An item of `$setElementOrder` is a scalar, or a map with the merge key.
fn order_key(
    item: &Value,
    key_of: &dyn Fn(&Value) -> Result<String, ApiError>,
) -> Result<String, ApiError> {
    if is_scalar(item) { Ok(canonical(item)) } else { key_of(item) }
}

/// The keys of a merged list in order: `wanted` keys in their order, and each other key before the first wanted key
/// that stood behind it in `live`.
fn arrange<'a>(live: &[String], merged: &'a [String], wanted: &[String]) -> Vec<&'a String> {
    let rank: BTreeMap<&String, usize> =
        wanted.iter().enumerate().rev().map(|(at, key)| (key, at)).collect();
    let place: BTreeMap<&String, usize> =
        live.iter().enumerate().rev().map(|(at, key)| (key, at)).collect();
    let (mut ordered, others): (Vec<&String>, Vec<&String>) =
        merged.iter().partition(|key| rank.contains_key(key));
    ordered.sort_by_key(|key| rank[key]);

    let mut out = Vec::with_capacity(merged.len());
    let mut others = others.into_iter().peekable();
    for key in ordered {
        while let (Some(other), Some(here)) = (others.peek(), place.get(key)) {
            if place.get(other).is_some_and(|there| there < here) {
                out.extend(others.next());
            } else {
                break;
            }
        }
        out.push(key);
    }
    out.extend(others);
    out
}

fn is_scalar(value: &Value) -> bool {
    !value.is_object() && !value.is_array()
}
