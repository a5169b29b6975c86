//! YAML as Kubernetes means it, with positions. The only place that touches the YAML library.
//!
//! Scalars follow what kubectl makes of them (YAML 1.1 booleans, `0644` is octal, `1e3` is the integer 1000); two
//! things are stricter on purpose: a key that is written twice is an error, and so is `.inf`. Every [`Node`] knows
//! where it stands, so that a mistake found later is still reported with line and column.

use serde::Deserialize;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::Spanned;
use serde_saphyr::options::DuplicateKeyPolicy;
use std::cell::Cell;
use std::fmt;

/// Where something stands in a file; both 1-based, 0 when unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line.
    pub line: u64,
    /// Column, in characters.
    pub column: u64,
}

/// One YAML node and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// What it is.
    pub content: Content,
    /// Where it starts.
    pub at: Position,
}

/// What a [`Node`] is. Maps keep the order of the file.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// `null`, `~` or nothing.
    Null,
    /// `true`, `yes`, `on` and their opposites.
    Bool(bool),
    /// Integer or float.
    Number(Number),
    /// Anything else that is a scalar.
    Text(String),
    /// `- a` or `[a]`.
    List(Vec<Node>),
    /// `a: b` or `{a: b}`.
    Map(Vec<(Key, Node)>),
}

/// A key of a map and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The key's text.
    pub text: String,
    /// Where it starts.
    pub at: Position,
}

/// Why a text is not the YAML that we read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct YamlError {
    /// Where the reader gave up.
    pub at: Position,
    /// What was wrong, one line.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// Reads a stream of documents separated by `---`; empty documents are skipped.
///
/// # Errors
///
/// [`YamlError`] with the position for broken syntax, a key written twice, a number that JSON cannot hold, nesting
/// deeper than [`DEPTH_MAX`], and alias bombs.
pub fn parse(text: &str) -> Result<Vec<Node>, YamlError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let options = serde_saphyr::options! {
        legacy_octal_numbers: true,
        duplicate_keys: DuplicateKeyPolicy::Error,
        strict_booleans: false,
    };
    DEPTH.set(0);
    let documents =
        serde_saphyr::from_multiple_with_options::<Raw>(text, options).map_err(error)?;
    Ok(documents.into_iter().map(|raw| node(raw, text)).collect())
}

/// Writes one value as a document without a leading `---`.
pub fn to_string(value: &Value) -> String {
    serde_saphyr::to_string(value).expect("a JSON value has string keys and finite numbers")
}

/// Deepest nesting that is read; every recursion over a [`Node`] relies on it, and so does the YAML reader, which needs
/// some 20 KiB of stack for each level when it is not optimised. Pods nest to about 15.
pub const DEPTH_MAX: usize = 32;

impl Node {
    /// A node that stands nowhere.
    pub fn new(content: Content) -> Self {
        Self { content, at: Position::default() }
    }

    /// The value under `key`, if this is a map that has it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.content {
            Content::Map(entries) => {
                entries.iter().find(|(k, _)| k.text == key).map(|(_, node)| node)
            }
            _ => None,
        }
    }

    /// The text, if this is one.
    pub fn as_text(&self) -> Option<&str> {
        match &self.content {
            Content::Text(text) => Some(text),
            _ => None,
        }
    }

    /// What this is, for messages.
    pub fn kind(&self) -> &'static str {
        match &self.content {
            Content::Null => "nothing",
            Content::Bool(_) => "a boolean",
            Content::Number(_) => "a number",
            Content::Text(_) => "text",
            Content::List(_) => "a list",
            Content::Map(_) => "a map",
        }
    }

    /// The same without positions.
    pub fn to_json(&self) -> Value {
        match &self.content {
            Content::Null => Value::Null,
            Content::Bool(value) => Value::Bool(*value),
            Content::Number(value) => Value::Number(value.clone()),
            Content::Text(value) => Value::String(value.clone()),
            Content::List(items) => Value::Array(items.iter().map(Node::to_json).collect()),
            Content::Map(entries) => {
                let entries = entries.iter().map(|(key, node)| (key.text.clone(), node.to_json()));
                Value::Object(entries.collect::<Map<_, _>>())
            }
        }
    }

    /// The node that stands for `value`, all of it at one position.
    pub fn from_json(value: &Value, at: Position) -> Self {
        let content = match value {
            Value::Null => Content::Null,
            Value::Bool(value) => Content::Bool(*value),
            Value::Number(value) => Content::Number(value.clone()),
            Value::String(value) => Content::Text(value.clone()),
            Value::Array(items) => {
                Content::List(items.iter().map(|item| Self::from_json(item, at)).collect())
            }
            Value::Object(entries) => Content::Map(
                entries
                    .iter()
                    .map(|(key, value)| (Key { text: key.clone(), at }, Self::from_json(value, at)))
                    .collect(),
            ),
        };
        Self { content, at }
    }
}

/// As the library delivers it: floats are not yet told from integers that were written with an exponent.
struct Raw(Spanned<RawContent>);

enum RawContent {
    Null,
    Bool(bool),
    Number(Number),
    Float(f64),
    Text(String),
    List(Vec<Raw>),
    Map(Vec<(Spanned<String>, Raw)>),
}

thread_local! {
    // The library bounds nesting by its own budget, far above what our recursions should meet; serde gives a visitor
    // no place to carry a depth, so it is counted here.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let depth = DEPTH.get();
        if depth > DEPTH_MAX {
            return Err(serde::de::Error::custom(format_args!(
                "nested deeper than {DEPTH_MAX} levels"
            )));
        }
        DEPTH.set(depth + 1);
        let result = Spanned::<RawContent>::deserialize(deserializer).map(Self);
        DEPTH.set(depth);
        result
    }
}

impl<'de> Deserialize<'de> for RawContent {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyNode;

        impl<'de> Visitor<'de> for AnyNode {
            type Value = RawContent;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a YAML node")
            }
            fn visit_unit<E>(self) -> Result<RawContent, E> {
                Ok(RawContent::Null)
            }
            fn visit_none<E>(self) -> Result<RawContent, E> {
                Ok(RawContent::Null)
            }
            fn visit_some<D: serde::Deserializer<'de>>(
                self,
                inner: D,
            ) -> Result<RawContent, D::Error> {
                RawContent::deserialize(inner)
            }
            fn visit_bool<E>(self, value: bool) -> Result<RawContent, E> {
                Ok(RawContent::Bool(value))
            }
            fn visit_i64<E>(self, value: i64) -> Result<RawContent, E> {
                Ok(RawContent::Number(value.into()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<RawContent, E> {
                Ok(RawContent::Number(value.into()))
            }
            fn visit_i128<E: serde::de::Error>(self, value: i128) -> Result<RawContent, E> {
                Number::from_i128(value)
                    .map(RawContent::Number)
                    .ok_or_else(|| E::custom("integer out of range"))
            }
            fn visit_u128<E: serde::de::Error>(self, value: u128) -> Result<RawContent, E> {
                Number::from_u128(value)
                    .map(RawContent::Number)
                    .ok_or_else(|| E::custom("integer out of range"))
            }
            fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<RawContent, E> {
                if value.is_finite() {
                    Ok(RawContent::Float(value))
                } else {
                    Err(E::custom("number is not finite"))
                }
            }
            fn visit_str<E>(self, value: &str) -> Result<RawContent, E> {
                Ok(RawContent::Text(value.to_owned()))
            }
            fn visit_string<E>(self, value: String) -> Result<RawContent, E> {
                Ok(RawContent::Text(value))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<RawContent, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    list.push(item);
                }
                Ok(RawContent::List(list))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<RawContent, A::Error> {
                let mut map = Vec::new();
                while let Some(key) = entries.next_key()? {
                    map.push((key, entries.next_value()?));
                }
                Ok(RawContent::Map(map))
            }
        }

        deserializer.deserialize_any(AnyNode)
    }
}

fn node(raw: Raw, text: &str) -> Node {
    let Raw(Spanned { value, referenced, defined }) = raw;
    let content = match value {
        RawContent::Null => Content::Null,
        RawContent::Bool(value) => Content::Bool(value),
        RawContent::Number(value) => Content::Number(value),
        RawContent::Text(value) => Content::Text(value),
        RawContent::Float(value) => {
            let span = defined.span();
            let written = span.byte_offset().zip(span.byte_len()).and_then(|(start, len)| {
                text.get(
                    usize::try_from(start).ok()?..usize::try_from(start.checked_add(len)?).ok()?,
                )
            });
            Content::Number(number(value, written.unwrap_or("")))
        }
        RawContent::List(items) => {
            Content::List(items.into_iter().map(|item| node(item, text)).collect())
        }
        RawContent::Map(entries) => {
            let entries = entries.into_iter().map(|(key, value)| {
                let key = Key { at: position(key.referenced), text: key.value };
                (key, node(value, text))
            });
            Content::Map(entries.collect())
        }
    };
    Node { content, at: position(referenced) }
}

/// `1e3` and `0899` are integers to kubectl; `1.0` is kept as it is written.
fn number(value: f64, written: &str) -> Number {
    // Up to 2^53 every whole float is exactly one integer.
    if value.fract() == 0.0 && value.abs() <= 9_007_199_254_740_992.0 && !written.contains('.') {
        return Number::from(value as i64);
    }
    Number::from_f64(value).expect("checked to be finite when it was read")
}

fn position(location: serde_saphyr::Location) -> Position {
    Position { line: location.line(), column: location.column() }
}

fn error(error: serde_saphyr::Error) -> YamlError {
    let at = error.location().map(position).unwrap_or_default();
    let text = error.without_snippet().to_string();
    // The library writes its own position into the text; ours is in front of it already.
    let mut message = text.lines().next().unwrap_or("cannot be read").trim().to_owned();
    // Nor does its advice on its own options help anybody here.
    for cut in [" at line ", ", set DuplicateKeyPolicy"] {
        if let Some(cut) = message.rfind(cut) {
            message.truncate(cut);
        }
    }
    let lower = message.to_lowercase();
    let hint = if lower.contains("duplicate") {
        Some("remove one of the two".to_owned())
    } else if lower.contains("tab") {
        Some("indent with spaces".to_owned())
    } else {
        None
    };
    YamlError { at, message, hint }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn check(text: &str, expected: Value) {
        let nodes =
            parse(text).unwrap_or_else(|error| panic!("{text:?}: {error} at {:?}", error.at));
        let values: Vec<Value> = nodes.iter().map(Node::to_json).collect();
        assert_eq!(values, [expected], "{text:?}");
    }

    fn check_error(text: &str, line: u64, column: u64, message: &str) {
        let error = parse(text).unwrap_err();
        assert!(error.message.contains(message), "{text:?}: {:?}", error.message);
        assert_eq!(
            (error.at.line, error.at.column),
            (line, column),
            "{text:?}: {:?}",
            error.message
        );
    }

    #[test]
    fn scalars_mean_what_kubectl_makes_of_them() {
        check("a: 0644", json!({"a": 420}));
        check("a: 0o644", json!({"a": 420}));
        check("a: 0899", json!({"a": 899}));
        check(
            "a: [yes, Yes, on, y, NO, off, n]",
            json!({"a": [true, true, true, true, false, false, false]}),
        );
        check("a: 1_000", json!({"a": 1000}));
        check("a: 0b101", json!({"a": 5}));
        check("a: 1e3", json!({"a": 1000}));
        check("a: 1.5", json!({"a": 1.5}));
        check("a: 1.0", json!({"a": 1.0}));
        check("a: 1:30", json!({"a": "1:30"}));
        check("a: 2026-01-02", json!({"a": "2026-01-02"}));
        check("a: '0644'", json!({"a": "0644"}));
        check("a: !!binary aGVsbG8=", json!({"a": "hello"}));
        check("on: 1\ny: 2", json!({"on": 1, "y": 2}));
        check("b: &b {x: 1}\na: {<<: *b, y: 2}", json!({"b": {"x": 1}, "a": {"x": 1, "y": 2}}));
        check("\u{feff}a: 1\r\nb: 2\r\n", json!({"a": 1, "b": 2}));
        check("a:", json!({"a": null}));
    }

    #[test]
    fn a_stream_gives_its_documents_in_order_and_skips_empty_ones() {
        let nodes = parse("---\na: 1\n---\n---\n# nothing\n---\nb: 2\n").unwrap();
        assert_eq!(
            nodes.iter().map(Node::to_json).collect::<Vec<_>>(),
            [json!({"a": 1}), json!({"b": 2})]
        );
        assert_eq!(nodes[1].get("b").unwrap().at, Position { line: 7, column: 4 });
    }

    #[test]
    fn errors_say_where() {
        check_error("a: 1\nb: 2\na: 3\n", 3, 1, "duplicate");
        check_error("a: .inf\n", 1, 4, "finite");
        check_error("a: [1, 2\nb: 3\n", 2, 2, "");
        let error = parse(&"[".repeat(500)).unwrap_err();
        assert!(!error.message.is_empty());
    }

    #[test]
    fn nesting_and_alias_bombs_are_bounded() {
        let deep = format!("{}1{}", "[".repeat(DEPTH_MAX + 5), "]".repeat(DEPTH_MAX + 5));
        assert!(parse(&deep).unwrap_err().message.contains("nested deeper"));
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..10 {
            let before = level - 1;
            bomb +=
                &format!("a{level}: &a{level} [{}]\n", vec![format!("*a{before}"); 10].join(", "));
        }
        assert!(parse(&bomb).is_err());
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        let value = json!({"a": "yes", "b": "0644", "c": "1e3", "n": ["on", "", " x", "a: b", "~", "1_000"], "t": "x\ny\n"});
        check(&to_string(&value), value);
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[ -~\n]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-zA-Z./-]{1,8}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused_without_a_panic(text in "[ -~\n\t\u{e9}\u{20ac}]{0,80}") {
            let _ = parse(&text);
        }

        #[test]
        fn any_value_that_is_written_reads_back_the_same(value in any_json().prop_filter("empty documents are skipped", |value| !value.is_null())) {
            let text = to_string(&value);
            let nodes = parse(&text).map_err(|error| TestCaseError::fail(format!("{error}: {text:?}")))?;
            prop_assert_eq!(nodes.iter().map(Node::to_json).collect::<Vec<_>>(), vec![value], "{:?}", text);
        }
    }
}
