//! Walks of one or two values along their schema: which paths a value sets, what changed, merge, removal.
//!
//! Source: kubernetes-sigs/structured-merge-diff, typed/{tofieldset,compare,merge,remove,helpers}.go.

use super::fieldset::{FieldSet, Step, canonical, same};
use crate::schema::{ListType, Node, Schema, Schemas, Type};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, LazyLock};

/// How a value is taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// As a whole: scalars, atomic lists and maps, whatever does not fit its schema.
    Leaf,
    /// Field by field.
    Map,
    /// Item by item, by key fields or by value.
    List,
}

/// An item of a list has no identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ItemError {
    /// A key field is absent and has no default.
    MissingKey { path: String, at: usize, key: String },
    /// Two items have the same identity.
    Duplicate { path: String, step: String },
    /// An item of a map list is no object, or one of a set is no scalar.
    Shape { path: String, at: usize },
}

/// What changed between two values, as sets of paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Diff {
    pub(super) added: FieldSet,
    pub(super) modified: FieldSet,
    pub(super) removed: FieldSet,
}

impl Diff {
    fn attach(&mut self, step: &Step, child: Diff) {
        self.added.attach(step.clone(), child.added);
        self.modified.attach(step.clone(), child.modified);
        self.removed.attach(step.clone(), child.removed);
    }
}

/// The schema for what no schema describes: maps are granular, lists atomic.
static UNTYPED: LazyLock<Node> = LazyLock::new(|| {
    Node::Inline(Arc::new(Schema { preserve_unknown: true, ..Schema::default() }))
});

fn field_node<'a>(schema: &'a Schema, field: &str) -> &'a Node {
    schema.properties.get(field).or(schema.additional.as_ref()).unwrap_or(&UNTYPED)
}

fn item_node(schema: &Schema) -> &Node {
    schema.items.as_ref().unwrap_or(&UNTYPED)
}

fn shape(schema: &Schema, value: &Value) -> Shape {
    match value {
        Value::Object(_) if !schema.atomic_map && matches!(schema.ty, Type::Object | Type::Any) => {
            Shape::Map
        }
        Value::Array(_) if schema.ty == Type::Array && schema.list != ListType::Atomic => {
            Shape::List
        }
        _ => Shape::Leaf,
    }
}

/// The identity of an item in a list of type set or map.
fn step_of(item: &Value, at: usize, list: &Schema, schemas: &Schemas) -> Result<Step, ItemError> {
    let wrong = || ItemError::Shape { path: String::new(), at };
    match (list.list, item) {
        (ListType::Map, Value::Object(object)) => {
            let item_schema = schemas.resolve(item_node(list));
            let mut key = Map::new();
            for name in &list.list_map_keys {
                let default = || {
                    let field = item_schema.properties.get(name)?;
                    schemas.resolve(field).default.as_ref()
                };
                let Some(value) = object.get(&**name).or_else(default) else {
                    let key = name.to_string();
                    return Err(ItemError::MissingKey { path: String::new(), at, key });
                };
                key.insert(name.to_string(), value.clone());
            }
            Ok(Step::Key(canonical(&Value::Object(key))))
        }
        (ListType::Set, Value::Object(_) | Value::Array(_)) => Err(wrong()),
        (ListType::Set, scalar) => Ok(Step::Value(canonical(scalar))),
        _ => Err(wrong()),
    }
}

/// As [`step_of`], but an item without identity is known by its place.
fn step_or_place(item: &Value, at: usize, list: &Schema, schemas: &Schemas) -> Step {
    step_of(item, at, list, schemas).unwrap_or(Step::Index(at as i64))
}

/// Items by identity; duplicates share one entry.
fn items_by_step<'a>(
    items: &'a [Value],
    list: &Schema,
    schemas: &Schemas,
) -> BTreeMap<Step, Vec<&'a Value>> {
    let mut by_step: BTreeMap<Step, Vec<&Value>> = BTreeMap::new();
    for (at, item) in items.iter().enumerate() {
        by_step.entry(step_or_place(item, at, list, schemas)).or_default().push(item);
    }
    by_step
}

/// Checks that every item of the lists in `value` has an identity of its own.
pub(super) fn check_items(
    value: &Value,
    node: &Node,
    schemas: &Schemas,
    path: &mut String,
) -> Result<(), ItemError> {
    let schema = schemas.resolve(node);
    match (shape(schema, value), value) {
        (Shape::Map, Value::Object(object)) => {
            for (name, below) in object {
                let len = path.len();
                path.push('.');
                path.push_str(name);
                check_items(below, field_node(schema, name), schemas, path)?;
                path.truncate(len);
            }
        }
        (Shape::List, Value::Array(items)) => {
            let mut seen = BTreeSet::new();
            for (at, item) in items.iter().enumerate() {
                let step = step_of(item, at, schema, schemas).map_err(|error| match error {
                    ItemError::MissingKey { at, key, .. } => {
                        ItemError::MissingKey { path: path.clone(), at, key }
                    }
                    ItemError::Duplicate { step, .. } => {
                        ItemError::Duplicate { path: path.clone(), step }
                    }
                    ItemError::Shape { at, .. } => ItemError::Shape { path: path.clone(), at },
                })?;
                let text = step.to_string();
                if !seen.insert(step) {
                    return Err(ItemError::Duplicate { path: path.clone(), step: text });
                }
                let len = path.len();
                path.push_str(&text);
                check_items(item, item_node(schema), schemas, path)?;
                path.truncate(len);
            }
        }
        _ => {}
    }
    Ok(())
}

/// The paths that `value` sets. Leaves, list items and map keys are members; fields of a struct that hold something
/// granular are not, unless they are empty.
pub(super) fn field_set(value: &Value, node: &Node, schemas: &Schemas) -> FieldSet {
    let schema = schemas.resolve(node);
    let mut set = FieldSet::default();
    match (shape(schema, value), value) {
        (Shape::Map, Value::Object(object)) => {
            for (name, below) in object {
                let mut child = field_set(below, field_node(schema, name), schemas);
                // Upstream does not own an empty list; then one that an applier emptied would come and go.
                let empty = below.is_null() || is_empty(below);
                if empty || !schema.properties.contains_key(&**name) {
                    child.member = true;
                }
                set.attach(Step::Field(name.clone()), child);
            }
        }
        (Shape::List, Value::Array(items)) => {
            for (step, same_step) in items_by_step(items, schema, schemas) {
                let mut child = match same_step.as_slice() {
                    [one] => field_set(one, item_node(schema), schemas),
                    // Nobody can say which of the duplicates a path below means.
                    _ => FieldSet::default(),
                };
                child.member = true;
                set.attach(step, child);
            }
        }
        _ => set.member = true,
    }
    set
}

/// What changed from `old` to `new`. When a whole object or list came or went, its own path is in the set too.
pub(super) fn compare(
    old: Option<&Value>,
    new: Option<&Value>,
    node: &Node,
    schemas: &Schemas,
) -> Diff {
    let schema = schemas.resolve(node);
    // Where null means nothing, it is as good as absent.
    let null_counts = schema.nullable || schema.ty == Type::Any;
    let absent = |value: Option<&Value>, other: Option<&Value>| {
        value.is_none() || (value == Some(&Value::Null) && other.is_none() && !null_counts)
    };
    if absent(old, new) && absent(new, old) {
        return Diff::default();
    }
    let mut diff = Diff::default();
    let shape = match (old, new) {
        (Some(one), None | Some(Value::Null)) | (None | Some(Value::Null), Some(one)) => {
            shape(schema, one)
        }
        (Some(old), Some(new)) if shape(schema, old) == shape(schema, new) => shape(schema, new),
        _ => Shape::Leaf,
    };
    match shape {
        Shape::Leaf => match (old, new) {
            (Some(old), Some(new)) => diff.modified.member = !same(old, new),
            (None, Some(_)) => diff.added.member = true,
            _ => diff.removed.member = true,
        },
        Shape::Map => {
            let (old_fields, new_fields) =
                (old.and_then(Value::as_object), new.and_then(Value::as_object));
            let names: BTreeSet<&String> = old_fields
                .into_iter()
                .flat_map(Map::keys)
                .chain(new_fields.into_iter().flat_map(Map::keys))
                .collect();
            for name in names {
                let below = compare(
                    old_fields.and_then(|fields| fields.get(name)),
                    new_fields.and_then(|fields| fields.get(name)),
                    field_node(schema, name),
                    schemas,
                );
                diff.attach(&Step::Field(name.clone()), below);
            }
        }
        Shape::List => {
            let (old_items, new_items) = (items_of(old), items_of(new));
            let old_items = items_by_step(old_items, schema, schemas);
            let new_items = items_by_step(new_items, schema, schemas);
            let steps: BTreeSet<&Step> = old_items.keys().chain(new_items.keys()).collect();
            for step in steps {
                let old = old_items.get(step).map_or(&[][..], Vec::as_slice);
                let new = new_items.get(step).map_or(&[][..], Vec::as_slice);
                diff.attach(step, compare_items(old, new, schema, schemas));
            }
        }
    }
    if shape != Shape::Leaf {
        let whole = |value: Option<&Value>| value.is_some_and(|value| !value.is_null());
        match (whole(old), whole(new)) {
            (false, true) => diff.added.member = true,
            (true, false) => diff.removed.member = true,
            _ => {}
        }
    }
    diff
}

fn items_of(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn compare_items(old: &[&Value], new: &[&Value], list: &Schema, schemas: &Schemas) -> Diff {
    let mut diff = Diff::default();
    match (old, new) {
        ([], [one]) => {
            diff = compare(None, Some(one), item_node(list), schemas);
            diff.added.member = true;
        }
        ([one], []) => {
            diff = compare(Some(one), None, item_node(list), schemas);
            diff.removed.member = true;
        }
        ([old], [new]) => diff = compare(Some(old), Some(new), item_node(list), schemas),
        ([], _) => diff.added.member = true,
        (_, []) => diff.removed.member = true,
        (old, new) => {
            let equal = old.len() == new.len() && old.iter().zip(new).all(|(a, b)| same(a, b));
            diff.modified.member = !equal;
        }
    }
    diff
}

/// `live` with everything that `config` says.
pub(super) fn merge(live: Option<&Value>, config: &Value, node: &Node, schemas: &Schemas) -> Value {
    let schema = schemas.resolve(node);
    match (shape(schema, config), live, config) {
        (Shape::Map, Some(Value::Object(live)), Value::Object(config)) => {
            let mut out = live.clone();
            for (name, value) in config {
                let merged = merge(live.get(name), value, field_node(schema, name), schemas);
                out.insert(name.clone(), merged);
            }
            Value::Object(out)
        }
        (Shape::List, Some(Value::Array(live)), Value::Array(config)) => {
            Value::Array(merge_list(live, config, schema, schemas))
        }
        (_, _, config) => config.clone(),
    }
}

/// Items of both lists: those of `config` in its order, those only in `live` where they stand relative to the items
/// that both have, and items new in `config` after the ones before them.
fn merge_list(live: &[Value], config: &[Value], list: &Schema, schemas: &Schemas) -> Vec<Value> {
    let step = |(at, item): (usize, &Value)| step_or_place(item, at, list, schemas);
    let live_steps: Vec<Step> = live.iter().enumerate().map(step).collect();
    let config_steps: Vec<Step> = config.iter().enumerate().map(step).collect();
    let in_config: BTreeSet<&Step> = config_steps.iter().collect();
    // The last of duplicates in live decides; config has none.
    let live_by_step: BTreeMap<&Step, &Value> = live_steps.iter().zip(live).collect();
    let mut shared: VecDeque<&Step> =
        config_steps.iter().filter(|step| live_by_step.contains_key(step)).collect();

    let mut out = Vec::with_capacity(live.len().max(config.len()));
    let mut pending = config_steps.iter().zip(config);
    let merged = |step: &Step, item: &Value| {
        merge(live_by_step.get(step).copied(), item, item_node(list), schemas)
    };
    for (step, item) in live_steps.iter().zip(live) {
        if !in_config.contains(step) {
            out.push(item.clone());
        } else if shared.front() == Some(&step) {
            shared.pop_front();
            for (config_step, config_item) in pending.by_ref() {
                out.push(merged(config_step, config_item));
                if config_step == step {
                    break;
                }
            }
        }
    }
    out.extend(pending.map(|(step, item)| merged(step, item)));
    out
}

/// Adds to the members every struct field below which the set has a path, so that dropping the last field below it
/// drops it as well.
pub(super) fn with_struct_fields(set: &FieldSet, node: &Node, schemas: &Schemas) -> FieldSet {
    let schema = schemas.resolve(node);
    let mut out = FieldSet { member: set.member, ..FieldSet::default() };
    for (step, child) in &set.children {
        let (below, named) = match step {
            Step::Field(name) => {
                (field_node(schema, name), schema.properties.contains_key(name.as_str()))
            }
            _ => (item_node(schema), false),
        };
        let mut child = with_struct_fields(child, below, schemas);
        child.member |= named;
        out.attach(step.clone(), child);
    }
    out
}

/// Takes the members of `remove` out of `value`. A container that this empties goes too, unless its own path is in
/// `kept`.
pub(super) fn remove(
    value: &mut Value,
    remove: &FieldSet,
    kept: &FieldSet,
    node: &Node,
    schemas: &Schemas,
) {
    static NONE: LazyLock<FieldSet> = LazyLock::new(FieldSet::default);
    let schema = schemas.resolve(node);
    match (shape(schema, value), value) {
        (Shape::Map, Value::Object(object)) => {
            for (step, below) in &remove.children {
                let Step::Field(name) = step else { continue };
                if below.member {
                    object.remove(name);
                } else if let Some(child) = object.get_mut(name) {
                    let kept = kept.children.get(step).unwrap_or(&NONE);
                    let held = !is_empty(child);
                    self::remove(child, below, kept, field_node(schema, name), schemas);
                    if held && is_empty(child) && !kept.member {
                        object.remove(name);
                    }
                }
            }
        }
        (Shape::List, Value::Array(items)) => {
            let steps: Vec<Step> = items
                .iter()
                .enumerate()
                .map(|(at, item)| step_or_place(item, at, schema, schemas))
                .collect();
            let mut steps = steps.iter();
            items.retain_mut(|item| {
                let step = steps.next().expect("one step for each item");
                match remove.children.get(step) {
                    Some(below) if below.member => false,
                    Some(below) => {
                        let kept = kept.children.get(step).unwrap_or(&NONE);
                        self::remove(item, below, kept, item_node(schema), schemas);
                        true
                    }
                    None => true,
                }
            });
        }
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Object(object) => object.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// Takes out the nulls that the schema does not allow: in a config they mean that the field goes.
pub(super) fn drop_nulls(value: &mut Value, node: &Node, schemas: &Schemas) {
    let schema = schemas.resolve(node);
    match value {
        Value::Object(object) => {
            object.retain(|name, below| {
                let field = field_node(schema, name);
                if below.is_null() {
                    let field = schemas.resolve(field);
                    return field.nullable || field.ty == Type::Any;
                }
                drop_nulls(below, field, schemas);
                true
            });
        }
        Value::Array(items) => {
            for item in items {
                drop_nulls(item, item_node(schema), schemas);
            }
        }
        _ => {}
    }
}

/// Every path of `value`, containers and leaves alike.
pub(super) fn every_path(value: &Value, node: &Node, schemas: &Schemas) -> FieldSet {
    let schema = schemas.resolve(node);
    let mut set = FieldSet::leaf();
    match (shape(schema, value), value) {
        (Shape::Map, Value::Object(object)) => {
            for (name, below) in object {
                let child = every_path(below, field_node(schema, name), schemas);
                set.attach(Step::Field(name.clone()), child);
            }
        }
        (Shape::List, Value::Array(items)) => {
            for (step, same_step) in items_by_step(items, schema, schemas) {
                for item in same_step {
                    set.attach(step.clone(), every_path(item, item_node(schema), schemas));
                }
            }
        }
        _ => {}
    }
    set
}
