//! A CRD's `openAPIV3Schema` as a [`Schema`], or what keeps it from being structural.
//!
//! Paths of errors are relative to the schema, such as `properties[spec].type`.

use super::{forbidden, invalid, not_supported, required, unknown_fields};
use crate::facts::OBJECT_META;
use crate::schema::{ListType, Node, Schema, Schemas, Type};
use crate::status::FieldError;
use serde_json::{Map, Value};
use std::sync::Arc;

/// Deepest nesting of schemas that is compiled; deeper ones are refused.
pub const DEPTH_MAX: usize = 64;

const TYPES: [&str; 6] = ["array", "boolean", "integer", "number", "object", "string"];

/// Keywords that become [`Schema::checks`].
const CHECKS: [&str; 20] = [
    "allOf",
    "anyOf",
    "enum",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "multipleOf",
    "not",
    "oneOf",
    "pattern",
    "uniqueItems",
    "x-kubernetes-validations",
];

/// Keywords of JSON schema that a CRD must not use at all.
const UNSUPPORTED: [&str; 8] = [
    "$ref",
    "definitions",
    "dependencies",
    "discriminator",
    "id",
    "patternProperties",
    "readOnly",
    "writeOnly",
];

/// Compiles a CRD's schema. The result knows `apiVersion`, `kind` and `metadata`, whatever the CRD says of them.
///
/// # Errors
///
/// Every rule of structural schemas that is broken, with paths such as `properties[spec].type`.
pub fn compile(openapi_v3_schema: &Value) -> Result<Schema, Vec<FieldError>> {
    let mut compiler = Compiler::default();
    let Some(raw) = openapi_v3_schema.as_object() else {
        return Err(vec![required("", "schemas are required")]);
    };
    let mut schema = compiler.schema(raw, "", Level::Root);
    if let Some(metadata) = raw.get("properties").and_then(|fields| fields.get("metadata")) {
        compiler.root_metadata(metadata, &mut schema);
    }
    add_object_fields(&mut schema);
    if compiler.errors.is_empty() { Ok(schema) } else { Err(compiler.errors) }
}

/// Where a schema stands; decides the text when its type is missing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Root,
    Field,
    Item,
}

#[derive(Default)]
struct Compiler {
    errors: Vec<FieldError>,
    depth: usize,
}

impl Compiler {
    fn schema(&mut self, raw: &Map<String, Value>, path: &str, level: Level) -> Schema {
        if self.depth == DEPTH_MAX {
            self.errors.push(forbidden(path, format!("nested deeper than {DEPTH_MAX} schemas")));
            return Schema::default();
        }
        self.depth += 1;
        let schema = self.schema_at(raw, path, level);
        self.depth -= 1;
        schema
    }

    fn schema_at(&mut self, raw: &Map<String, Value>, path: &str, level: Level) -> Schema {
        let at = |name: &str| join(path, name);
        self.keywords(raw, path);
        let int_or_string = self.flag(raw, path, "x-kubernetes-int-or-string");
        let mut schema = Schema {
            ty: self.type_of(raw, path, level, int_or_string),
            preserve_unknown: self.flag(raw, path, "x-kubernetes-preserve-unknown-fields"),
            embedded: self.flag(raw, path, "x-kubernetes-embedded-resource"),
            nullable: self.flag(raw, path, "nullable"),
            required: self.words(raw, path, "required"),
            ..Schema::default()
        };
        if let Some(list) = self.object(raw, path, "properties") {
            for (name, field) in list {
                let path = at(&format!("properties[{name}]"));
                match field.as_object() {
                    Some(field) => {
                        let field = self.schema(field, &path, Level::Field);
                        schema.properties.insert(name.as_str().into(), inline(field));
                    }
                    None => self.wrong(&path, field, "must be a schema object"),
                }
            }
        }
        match raw.get("additionalProperties") {
            None | Some(Value::Null) => {}
            Some(Value::Bool(true)) => schema.preserve_unknown = true,
            Some(Value::Object(field)) => {
                let path = at("additionalProperties");
                let field = self.schema(field, &path, Level::Field);
                schema.additional = Some(inline(field));
            }
            Some(_) => {
                let path = at("additionalProperties");
                self.errors.push(forbidden(&path, "additionalProperties cannot be set to false"));
            }
        }
        if raw.contains_key("additionalProperties")
            && (!schema.properties.is_empty() || level == Level::Root)
        {
            let why = if level == Level::Root {
                "additionalProperties cannot be used at the root"
            } else {
                "additionalProperties and properties are mutual exclusive"
            };
            self.errors.push(forbidden(&at("additionalProperties"), why));
        }
        self.items(raw, path, &mut schema);
        self.lists(raw, path, &mut schema);
        if schema.embedded {
            self.embedded(raw, path, &mut schema);
        }
        self.combinators(raw, path, int_or_string);

        let mut checks: Map<String, Value> = raw
            .iter()
            .filter(|(name, _)| CHECKS.contains(&name.as_str()))
            .map(|(name, rule)| (name.clone(), rule.clone()))
            .collect();
        if int_or_string {
            // `anyOf: [{type: integer}, {type: string}]` only repeats what the extension says.
            if checks.get("anyOf").is_some_and(|any| {
                any.as_array().into_iter().flatten().all(|one| {
                    one.as_object().is_some_and(|one| one.len() == 1 && one.contains_key("type"))
                })
            }) {
                checks.remove("anyOf");
            }
        }
        if !checks.is_empty() {
            schema.checks = Some(Arc::new(Value::Object(checks)));
        }
        self.set_default(raw, path, level, &mut schema);
        schema
    }

    /// Keywords that are not supported, or whose values have the wrong type.
    fn keywords(&mut self, raw: &Map<String, Value>, path: &str) {
        for name in UNSUPPORTED {
            if raw.get(name).is_some_and(|value| *value != Value::Bool(false) && !value.is_null()) {
                self.errors.push(forbidden(&join(path, name), format!("{name} is not supported")));
            }
        }
        if raw.get("uniqueItems") == Some(&Value::Bool(true)) {
            let why = "uniqueItems cannot be set to true since the runtime complexity becomes \
                       quadratic";
            self.errors.push(forbidden(&join(path, "uniqueItems"), why));
        }
        for (name, value) in raw {
            let (fits, expected) = match name.as_str() {
                "minLength" | "maxLength" | "minItems" | "maxItems" | "minProperties"
                | "maxProperties" => (value.as_u64().is_some(), "must be a non-negative integer"),
                "minimum" | "maximum" => (value.is_number(), "must be a number"),
                "multipleOf" => {
                    (value.as_f64().is_some_and(|n| n > 0.0), "must be a number greater than 0")
                }
                "exclusiveMinimum" | "exclusiveMaximum" => {
                    (value.is_boolean(), "must be a boolean")
                }
                "format" | "description" | "title" => (value.is_string(), "must be a string"),
                "enum" => (
                    value.as_array().is_some_and(|values| !values.is_empty()),
                    "must be a list with at least one value",
                ),
                "pattern" => {
                    let detail = match value.as_str().map(regex::Regex::new) {
                        Some(Ok(_)) => continue,
                        Some(Err(_)) => "must be a valid regular expression, but isn't",
                        None => "must be a string",
                    };
                    (false, detail)
                }
                _ => continue,
            };
            if !fits && !value.is_null() {
                self.wrong(&join(path, name), value, expected);
            }
        }
    }

    fn type_of(
        &mut self,
        raw: &Map<String, Value>,
        path: &str,
        level: Level,
        int_or_string: bool,
    ) -> Type {
        let at = join(path, "type");
        let preserved = raw.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
        let name = match raw.get("type") {
            None | Some(Value::Null) => "",
            Some(Value::String(name)) => name,
            Some(other) => {
                self.wrong(&at, other, "must be a string");
                return Type::Any;
            }
        };
        if level == Level::Root && !name.is_empty() && name != "object" {
            self.wrong(&at, &name.into(), "must be object at the root");
        }
        if int_or_string {
            if !name.is_empty() {
                let why = "must be empty if x-kubernetes-int-or-string is true";
                self.wrong(&at, &name.into(), why);
            }
            return Type::IntOrString;
        }
        match name {
            "" => {
                let why = match level {
                    Level::Root => "must not be empty at the root",
                    Level::Field => "must not be empty for specified object fields",
                    Level::Item => "must not be empty for specified array items",
                };
                if !preserved || level == Level::Root {
                    self.errors.push(required(&at, why));
                }
                Type::Any
            }
            "array" => Type::Array,
            "boolean" => Type::Boolean,
            "integer" => Type::Integer,
            "number" => Type::Number,
            "object" => Type::Object,
            "string" => Type::String,
            other => {
                self.errors.push(not_supported(&at, &other.into(), &TYPES.map(Value::from)));
                Type::Any
            }
        }
    }

    fn items(&mut self, raw: &Map<String, Value>, path: &str, schema: &mut Schema) {
        let at = join(path, "items");
        match raw.get("items") {
            None | Some(Value::Null) => {
                if schema.ty == Type::Array {
                    self.errors.push(required(&at, "must be specified"));
                }
            }
            Some(Value::Object(item)) => {
                schema.items = Some(inline(self.schema(item, &at, Level::Item)));
            }
            Some(_) => {
                let why = "items must be a schema object and not an array";
                self.errors.push(forbidden(&at, why));
            }
        }
    }

    /// `x-kubernetes-list-type`, `-list-map-keys` and `-map-type`.
    fn lists(&mut self, raw: &Map<String, Value>, path: &str, schema: &mut Schema) {
        let at = |name: &str| join(path, name);
        schema.list_map_keys = self.words(raw, path, "x-kubernetes-list-map-keys");
        let list_type = raw.get("x-kubernetes-list-type").filter(|value| !value.is_null());
        if let Some(list_type) = list_type {
            let at = at("x-kubernetes-list-type");
            if schema.ty != Type::Array {
                self.wrong(
                    &join(path, "type"),
                    &raw_type(raw),
                    "must be array if x-kubernetes-list-type is specified",
                );
            }
            schema.list = match list_type.as_str() {
                Some("atomic") => ListType::Atomic,
                Some("set") => ListType::Set,
                Some("map") => ListType::Map,
                _ => {
                    let known = ["atomic", "set", "map"].map(Value::from);
                    self.errors.push(not_supported(&at, list_type, &known));
                    ListType::Atomic
                }
            };
        }
        let item = match &schema.items {
            Some(Node::Inline(item)) => Some(item.clone()),
            _ => None,
        };
        match (schema.list, item) {
            (ListType::Set, Some(item)) => {
                let granular_map = item.ty == Type::Object && !item.atomic_map;
                let granular_list = item.ty == Type::Array && item.list != ListType::Atomic;
                if granular_map || granular_list || item.ty == Type::Any {
                    let why = "items of a set must be scalars, atomic maps or atomic lists";
                    self.errors.push(forbidden(&at("items"), why));
                }
                if item.nullable {
                    let why = "cannot be nullable when x-kubernetes-list-type is set";
                    self.errors.push(forbidden(&at("items.nullable"), why));
                }
            }
            (ListType::Map, Some(item)) => self.map_list(path, schema, &item),
            _ => {}
        }
        if schema.list != ListType::Map && !schema.list_map_keys.is_empty() {
            let why = "must be map if x-kubernetes-list-map-keys is non-empty";
            let found = list_type.cloned().unwrap_or(Value::Null);
            self.wrong(&at("x-kubernetes-list-type"), &found, why);
        }
        if let Some(map_type) = raw.get("x-kubernetes-map-type").filter(|value| !value.is_null()) {
            if schema.ty != Type::Object {
                self.wrong(
                    &join(path, "type"),
                    &raw_type(raw),
                    "must be object if x-kubernetes-map-type is specified",
                );
            }
            match map_type.as_str() {
                Some("atomic") => schema.atomic_map = true,
                Some("granular") => {}
                _ => {
                    let known = ["granular", "atomic"].map(Value::from);
                    let at = at("x-kubernetes-map-type");
                    self.errors.push(not_supported(&at, map_type, &known));
                }
            }
        }
    }

    fn map_list(&mut self, path: &str, schema: &Schema, item: &Schema) {
        let keys_at = join(path, "x-kubernetes-list-map-keys");
        if item.ty != Type::Object {
            let why = "must be object if parent array's x-kubernetes-list-type is map";
            self.wrong(&join(path, "items.type"), &type_word(item.ty).into(), why);
        }
        if schema.list_map_keys.is_empty() {
            let why = "must not be empty if x-kubernetes-list-type is map";
            self.errors.push(required(&keys_at, why));
        }
        for (at, key) in schema.list_map_keys.iter().enumerate() {
            let value = Value::from(&**key);
            let key_at = format!("{keys_at}[{at}]");
            if schema.list_map_keys[..at].contains(key) {
                self.errors.push(FieldError {
                    field: key_at,
                    reason: "FieldValueDuplicate",
                    message: format!("Duplicate value: {value}"),
                });
                continue;
            }
            let field = match item.properties.get(key) {
                Some(Node::Inline(field)) => field,
                _ => {
                    self.wrong(&key_at, &value, "must be the name of an item property");
                    continue;
                }
            };
            let field_at = join(path, &format!("items.properties[{key}]"));
            if matches!(field.ty, Type::Object | Type::Array | Type::Any) {
                let why = "must be a scalar type if parent array's x-kubernetes-list-type is map";
                self.wrong(&join(&field_at, "type"), &type_word(field.ty).into(), why);
            }
            if field.nullable {
                let why =
                    "this property is in x-kubernetes-list-map-keys, so it cannot be nullable";
                self.errors.push(forbidden(&join(&field_at, "nullable"), why));
            }
            if field.default.is_none() && !item.required.contains(key) {
                let why = "this property is in x-kubernetes-list-map-keys, so it must have a \
                           default or be a required property";
                self.errors.push(required(&join(&field_at, "default"), why));
            }
        }
    }

    fn embedded(&mut self, raw: &Map<String, Value>, path: &str, schema: &mut Schema) {
        if schema.ty != Type::Object {
            let why = "must be object if x-kubernetes-embedded-resource is true";
            self.wrong(&join(path, "type"), &raw_type(raw), why);
        }
        if schema.properties.is_empty() && !schema.preserve_unknown {
            let why = "must not be empty if x-kubernetes-embedded-resource is true without \
                       x-kubernetes-preserve-unknown-fields";
            self.errors.push(required(&join(path, "properties"), why));
        }
        add_object_fields(schema);
    }

    /// Checks the value validations below `allOf`, `anyOf`, `oneOf` and `not` for structure of their own.
    fn combinators(&mut self, raw: &Map<String, Value>, path: &str, int_or_string: bool) {
        for (name, list) in raw {
            match name.as_str() {
                "allOf" | "anyOf" | "oneOf" => {
                    let Some(list) = list.as_array() else {
                        self.wrong(&join(path, name), list, "must be a list of schemas");
                        continue;
                    };
                    for (at, one) in list.iter().enumerate() {
                        let at = join(path, &format!("{name}[{at}]"));
                        let typed = int_or_string && name != "oneOf";
                        self.validation(one, &at, Some(raw), path, typed);
                    }
                }
                "not" => self.validation(list, &join(path, name), Some(raw), path, false),
                _ => {}
            }
        }
    }

    /// A schema inside a combinator: `outer` at `outer_path` is the structure that it speaks about.
    fn validation(
        &mut self,
        raw: &Value,
        path: &str,
        outer: Option<&Map<String, Value>>,
        outer_path: &str,
        typed: bool,
    ) {
        let Some(raw) = raw.as_object() else {
            self.wrong(path, raw, "must be a schema object");
            return;
        };
        if self.depth == DEPTH_MAX {
            self.errors.push(forbidden(path, format!("nested deeper than {DEPTH_MAX} schemas")));
            return;
        }
        self.depth += 1;
        self.keywords(raw, path);
        for (name, value) in raw {
            let why = match name.as_str() {
                "type" if !typed => "must be empty to be structural",
                "description" | "title" => "must be empty to be structural",
                "additionalProperties" | "default" => "must be undefined to be structural",
                "nullable" if *value == Value::Bool(true) => "must be false to be structural",
                "x-kubernetes-preserve-unknown-fields"
                | "x-kubernetes-embedded-resource"
                | "x-kubernetes-int-or-string"
                    if *value == Value::Bool(true) =>
                {
                    "must be false to be structural"
                }
                "x-kubernetes-list-type"
                | "x-kubernetes-list-map-keys"
                | "x-kubernetes-map-type" => "must be undefined to be structural",
                _ => continue,
            };
            self.errors.push(forbidden(&join(path, name), why));
        }
        let outer_fields = outer.and_then(|outer| outer.get("properties"));
        for (name, field) in raw.get("properties").and_then(Value::as_object).into_iter().flatten()
        {
            let outer_at = join(outer_path, &format!("properties[{name}]"));
            let at = join(path, &format!("properties[{name}]"));
            let found = outer_fields
                .and_then(|fields| fields.get(name))
                .or_else(|| outer?.get("additionalProperties"))
                .and_then(Value::as_object);
            // The three fields of every object are there without being said.
            let implied =
                outer_path.is_empty() && ["metadata", "kind", "apiVersion"].contains(&&**name);
            if found.is_none() && !implied {
                self.errors.push(required(&outer_at, &format!("because it is defined in {at}")));
            }
            self.validation(field, &at, found, &outer_at, false);
        }
        if let Some(item) = raw.get("items") {
            let outer_at = join(outer_path, "items");
            let at = join(path, "items");
            let found = outer.and_then(|outer| outer.get("items")).and_then(Value::as_object);
            if found.is_none() {
                self.errors.push(required(&outer_at, &format!("because it is defined in {at}")));
            }
            self.validation(item, &at, found, &outer_at, false);
        }
        for name in ["allOf", "anyOf", "oneOf"] {
            for (at, one) in
                raw.get(name).and_then(Value::as_array).into_iter().flatten().enumerate()
            {
                let at = join(path, &format!("{name}[{at}]"));
                self.validation(one, &at, outer, outer_path, typed);
            }
        }
        if let Some(not) = raw.get("not") {
            self.validation(not, &join(path, "not"), outer, outer_path, false);
        }
        self.depth -= 1;
    }

    fn set_default(
        &mut self,
        raw: &Map<String, Value>,
        path: &str,
        level: Level,
        schema: &mut Schema,
    ) {
        let Some(default) = raw.get("default").filter(|default| !default.is_null()) else { return };
        let at = join(path, "default");
        if level == Level::Root {
            self.errors.push(forbidden(&at, "must not be set at the root"));
            return;
        }
        let node = inline(schema.clone());
        let schemas = Schemas::default();
        if let Some(unknown) = unknown_fields(default, &node, &schemas).first() {
            self.wrong(&at, default, &format!("must not have unknown field {unknown}"));
        }
        let mut complete = default.clone();
        super::default(&mut complete, &node, &schemas);
        for error in super::validate(&complete, &node, &schemas) {
            self.errors.push(FieldError { field: field_below(&at, &error.field), ..error });
        }
        schema.default = Some(default.clone());
    }

    /// Of the metadata at the root a CRD may only restrict `name` and `generateName`.
    fn root_metadata(&mut self, metadata: &Value, schema: &mut Schema) {
        let at = "properties[metadata]";
        let Some(metadata) = metadata.as_object() else { return };
        let fields = metadata.get("properties").and_then(Value::as_object);
        let other = |name: &&String| !["name", "generateName"].contains(&name.as_str());
        let extra = fields.and_then(|fields| fields.keys().find(other));
        let structure = ["items", "additionalProperties", "default", "nullable"];
        if extra.is_some() || structure.iter().any(|name| metadata.contains_key(*name)) {
            let why = "must not specify anything other than name and generateName, but metadata \
                       is implicitly specified";
            self.errors.push(forbidden(at, why));
        } else if fields.is_some_and(|fields| !fields.is_empty()) {
            // The structure is that of every object; what the CRD adds is one more thing to hold.
            let rule = serde_json::json!({"properties": {"metadata": metadata}});
            let mut checks = schema
                .checks
                .take()
                .map_or_else(Map::new, |checks| checks.as_object().cloned().unwrap_or_default());
            let all = checks.entry("allOf").or_insert_with(|| Value::Array(Vec::new()));
            if let Some(all) = all.as_array_mut() {
                all.push(rule);
            }
            schema.checks = Some(Arc::new(Value::Object(checks)));
        }
    }

    fn flag(&mut self, raw: &Map<String, Value>, path: &str, name: &str) -> bool {
        match raw.get(name) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(false)) if name == "x-kubernetes-preserve-unknown-fields" => {
                self.wrong(&join(path, name), &false.into(), "must be true or undefined");
                false
            }
            Some(Value::Bool(flag)) => *flag,
            Some(other) => {
                self.wrong(&join(path, name), other, "must be a boolean");
                false
            }
        }
    }

    fn words(&mut self, raw: &Map<String, Value>, path: &str, name: &str) -> Vec<Arc<str>> {
        let value = raw.get(name).unwrap_or(&Value::Null);
        let words: Option<Vec<Arc<str>>> = match value {
            Value::Null => Some(Vec::new()),
            Value::Array(words) => words.iter().map(|word| word.as_str().map(Arc::from)).collect(),
            _ => None,
        };
        words.unwrap_or_else(|| {
            self.wrong(&join(path, name), value, "must be a list of strings");
            Vec::new()
        })
    }

    fn object<'a>(
        &mut self,
        raw: &'a Map<String, Value>,
        path: &str,
        name: &str,
    ) -> Option<&'a Map<String, Value>> {
        match raw.get(name)? {
            Value::Null => None,
            Value::Object(object) => Some(object),
            other => {
                self.wrong(&join(path, name), other, "must be an object");
                None
            }
        }
    }

    fn wrong(&mut self, path: &str, value: &Value, why: &str) {
        self.errors.push(invalid(path, value, why));
    }
}

/// Gives a schema the fields that every Kubernetes object has.
fn add_object_fields(schema: &mut Schema) {
    let string = inline(Schema { ty: Type::String, ..Schema::default() });
    for name in ["apiVersion", "kind"] {
        schema.properties.entry(name.into()).or_insert_with(|| string.clone());
    }
    schema.properties.insert("metadata".into(), Node::Ref(OBJECT_META.into()));
}

fn inline(schema: Schema) -> Node {
    Node::Inline(Arc::new(schema))
}

fn raw_type(raw: &Map<String, Value>) -> Value {
    raw.get("type").cloned().unwrap_or_else(|| "".into())
}

fn type_word(ty: Type) -> &'static str {
    match ty {
        Type::Any | Type::IntOrString => "",
        Type::Object => "object",
        Type::Array => "array",
        Type::String => "string",
        Type::Integer => "integer",
        Type::Number => "number",
        Type::Boolean => "boolean",
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn field_below(path: &str, field: &str) -> String {
    if field.is_empty() || field.starts_with('[') {
        format!("{path}{field}")
    } else {
        join(path, field)
    }
}
