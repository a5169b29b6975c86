//! Sets of field paths, and their JSON form `FieldsV1`.
//!
//! A set is a tree: a node says whether its own path is in the set and holds the steps below it.
//!
//! Source: kubernetes-sigs/structured-merge-diff, fieldpath/{element,serialize-pe,serialize}.go.

use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt;

/// One step of a path.
///
/// Keys and values are kept as canonical JSON text (keys sorted, no spaces, integral numbers without fraction), so
/// that equal steps are equal text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// `f:`: a field of an object, or a key of a map.
    Field(String),
    /// `k:`: the item of a list with these key fields, a JSON object.
    Key(String),
    /// `v:`: the item of a set with this value.
    Value(String),
    /// `i:`: the item at this place.
    Index(i64),
}

impl Step {
    fn parse(text: &str) -> Result<Self, FieldsError> {
        let bad = || FieldsError::Step { step: text.to_owned() };
        let (kind, rest) = text.split_once(':').ok_or_else(bad)?;
        match kind {
            "f" => Ok(Self::Field(rest.to_owned())),
            "k" => match serde_json::from_str(rest) {
                Ok(key @ Value::Object(_)) => Ok(Self::Key(canonical(&key))),
                _ => Err(bad()),
            },
            "v" => {
                let value: Value = serde_json::from_str(rest).map_err(|_| bad())?;
                Ok(Self::Value(canonical(&value)))
            }
            "i" => rest.parse().map(Self::Index).map_err(|_| bad()),
            _ => Err(bad()),
        }
    }

    fn encode(&self) -> String {
        match self {
            Self::Field(name) => format!("f:{name}"),
            Self::Key(key) => format!("k:{key}"),
            Self::Value(value) => format!("v:{value}"),
            Self::Index(at) => format!("i:{at}"),
        }
    }
}

/// As people see a step in a conflict: `.spec`, `[name="web"]`, `[="value"]`, `[0]`.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Field(name) => write!(f, ".{name}"),
            Self::Key(key) => {
                let key: Map<String, Value> = serde_json::from_str(key).unwrap_or_default();
                let parts: Vec<String> =
                    key.iter().map(|(name, value)| format!("{name}={value}")).collect();
                write!(f, "[{}]", parts.join(","))
            }
            Self::Value(value) => write!(f, "[={value}]"),
            Self::Index(at) => write!(f, "[{at}]"),
        }
    }
}

/// Why a `FieldsV1` is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FieldsError {
    /// A key is none of `f:`, `k:`, `v:`, `i:`, `.`, or what follows is malformed.
    #[error("`{step}` is no field path element")]
    Step { step: String },
    /// Below a step stands something else than an object.
    #[error("field set: expected an object")]
    NotAnObject,
}

/// A set of paths, seen from one node of the tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSet {
    /// The path of this node itself is in the set (`.`).
    pub member: bool,
    /// Steps below; never holds an empty set.
    pub children: BTreeMap<Step, FieldSet>,
}

impl FieldSet {
    /// The set of the node's own path alone.
    pub fn leaf() -> Self {
        Self { member: true, ..Self::default() }
    }

    /// Whether the set has no path.
    pub fn is_empty(&self) -> bool {
        !self.member && self.children.is_empty()
    }

    /// Puts `child` below `step`; an empty child changes nothing.
    pub fn attach(&mut self, step: Step, child: FieldSet) {
        if !child.is_empty() {
            self.children.entry(step).or_default().merge(child);
        }
    }

    /// The set below a field.
    pub fn field(&self, name: &str) -> Option<&FieldSet> {
        self.children.get(&Step::Field(name.to_owned()))
    }

    fn merge(&mut self, other: FieldSet) {
        self.member |= other.member;
        for (step, child) in other.children {
            self.children.entry(step).or_default().merge(child);
        }
    }

    /// Paths in either.
    #[must_use]
    pub fn union(mut self, other: &FieldSet) -> Self {
        self.merge(other.clone());
        self
    }

    /// Paths in both.
    #[must_use]
    pub fn intersection(&self, other: &FieldSet) -> Self {
        let mut out = Self { member: self.member && other.member, ..Self::default() };
        for (step, child) in &self.children {
            if let Some(theirs) = other.children.get(step) {
                out.attach(step.clone(), child.intersection(theirs));
            }
        }
        out
    }

    /// Paths here and not in `other`; a path below one of `other` stays.
    #[must_use]
    pub fn difference(&self, other: &FieldSet) -> Self {
        let mut out = Self { member: self.member && !other.member, ..Self::default() };
        for (step, child) in &self.children {
            let left = match other.children.get(step) {
                Some(theirs) => child.difference(theirs),
                None => child.clone(),
            };
            out.attach(step.clone(), left);
        }
        out
    }

    /// Every path as people see it, such as `.spec.replicas`.
    pub fn paths(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.collect_paths(&mut String::new(), &mut out);
        out
    }

    fn collect_paths(&self, prefix: &mut String, out: &mut Vec<String>) {
        if self.member && !prefix.is_empty() {
            out.push(prefix.clone());
        }
        for (step, child) in &self.children {
            let len = prefix.len();
            prefix.push_str(&step.to_string());
            child.collect_paths(prefix, out);
            prefix.truncate(len);
        }
    }

    /// The `fieldsV1` object of a managedFields entry.
    pub fn to_json(&self) -> Value {
        let mut object = Map::new();
        if self.member && !self.children.is_empty() {
            object.insert(".".to_owned(), Value::Object(Map::new()));
        }
        for (step, child) in &self.children {
            object.insert(step.encode(), child.to_json());
        }
        Value::Object(object)
    }

    /// Reads a `fieldsV1` object. The root itself is never a member.
    ///
    /// # Errors
    ///
    /// When a key is no path element or a value is no object.
    pub fn from_json(fields: &Value) -> Result<Self, FieldsError> {
        let mut set = Self::parse(fields)?;
        set.member = false;
        Ok(set)
    }

    fn parse(fields: &Value) -> Result<Self, FieldsError> {
        let object = fields.as_object().ok_or(FieldsError::NotAnObject)?;
        let mut set = Self { member: object.is_empty(), ..Self::default() };
        for (key, below) in object {
            if key == "." {
                set.member = true;
            } else {
                set.attach(Step::parse(key)?, Self::parse(below)?);
            }
        }
        Ok(set)
    }
}

/// JSON text that is equal for equal values: keys sorted, no spaces, integral floats as integers.
pub(crate) fn canonical(value: &Value) -> String {
    fn normal(value: &Value) -> Value {
        match value {
            Value::Number(number) => integral(number).map_or_else(|| value.clone(), Value::from),
            Value::Array(items) => items.iter().map(normal).collect(),
            Value::Object(object) => Value::Object(
                object.iter().map(|(key, value)| (key.clone(), normal(value))).collect(),
            ),
            other => other.clone(),
        }
    }
    normal(value).to_string()
}

/// Equality in which `1` and `1.0` are the same number.
pub(crate) fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => {
            x == y || integral(x).is_some_and(|x| Some(x) == integral(y))
        }
        (Value::Array(x), Value::Array(y)) => {
            x.len() == y.len() && x.iter().zip(y).all(|(x, y)| same(x, y))
        }
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(key, x)| y.get(key).is_some_and(|y| same(x, y)))
        }
        (a, b) => a == b,
    }
}

/// The number as an integer, if it is one that a float holds exactly.
fn integral(number: &serde_json::Number) -> Option<i64> {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53
    number.as_i64().or_else(|| {
        number.as_f64().filter(|n| n.fract() == 0.0 && n.abs() <= EXACT).map(|n| n as i64)
    })
}
