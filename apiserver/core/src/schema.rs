//! Types of objects: what the built-in definitions and the schemas of CRDs have in common.

use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Named definitions, such as `io.k8s.api.core.v1.Pod`.
#[derive(Debug, Clone, Default)]
pub struct Schemas {
    /// Name to definition.
    pub definitions: HashMap<Arc<str>, Arc<Schema>>,
}

/// A schema in place, or the name of one; names make recursive types possible.
#[derive(Debug, Clone)]
pub enum Node {
    /// Look the name up in [`Schemas`].
    Ref(Arc<str>),
    /// The schema itself.
    Inline(Arc<Schema>),
}

/// What a JSON value may be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Type {
    /// Anything (no schema known).
    #[default]
    Any,
    /// Object with `properties` and, or, `additional`.
    Object,
    /// Array of `items`.
    Array,
    /// String.
    String,
    /// Integer.
    Integer,
    /// Number.
    Number,
    /// Boolean.
    Boolean,
    /// Integer or string (IntOrString, Quantity).
    IntOrString,
}

/// How a list is merged by server-side apply.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ListType {
    /// Replaced as a whole.
    #[default]
    Atomic,
    /// Scalars without duplicates.
    Set,
    /// Objects identified by `Schema::list_map_keys`.
    Map,
}

/// One node of a type.
#[derive(Debug, Clone, Default)]
pub struct Schema {
    /// Kind of value.
    pub ty: Type,
    /// Known fields of an object.
    pub properties: BTreeMap<Arc<str>, Node>,
    /// Type of the values of other fields; `None`: no other field is known.
    pub additional: Option<Node>,
    /// Element type of an array.
    pub items: Option<Node>,
    /// `x-kubernetes-list-type`.
    pub list: ListType,
    /// `x-kubernetes-list-map-keys`.
    pub list_map_keys: Vec<Arc<str>>,
    /// `x-kubernetes-map-type: atomic`.
    pub atomic_map: bool,
    /// `x-kubernetes-patch-strategy` contains `merge`.
    pub patch_merge: bool,
    /// `x-kubernetes-patch-strategy` contains `retainKeys`.
    pub patch_retain_keys: bool,
    /// `x-kubernetes-patch-merge-key`.
    pub patch_merge_key: Option<Arc<str>>,
    /// `x-kubernetes-preserve-unknown-fields`.
    pub preserve_unknown: bool,
    /// `x-kubernetes-embedded-resource`.
    pub embedded: bool,
    /// `nullable`.
    pub nullable: bool,
    /// `required`.
    pub required: Vec<Arc<str>>,
    /// `default`.
    pub default: Option<Value>,
    /// JSON-schema checks beyond the type (format, enum, bounds, pattern, combinators), as written; CRDs only.
    pub checks: Option<Arc<Value>>,
}

impl Schemas {
    /// The schema behind `node`; an unknown name is a schema that allows anything.
    pub fn resolve<'a>(&'a self, node: &'a Node) -> &'a Schema {
        static ANY: std::sync::LazyLock<Schema> =
            std::sync::LazyLock::new(|| Schema { preserve_unknown: true, ..Schema::default() });
        match node {
            Node::Inline(schema) => schema,
            Node::Ref(name) => self.definitions.get(name).map_or(&*ANY, |schema| schema),
        }
    }
}
