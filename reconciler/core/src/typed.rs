//! From a [`Node`] to one of our types, with the position of what did not fit.

use crate::suggest::nearest;
use crate::yaml::{Content, Key, Node, Position};
use serde::de::value::StringDeserializer;
use serde::de::{self, DeserializeSeed, IntoDeserializer, Visitor};
use std::fmt;

/// Why a node is not a value of the wanted type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TypeError {
    pub(crate) at: Option<Position>,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

/// Reads `node` as a `T`; `null` counts as absent where a field is optional or has a default.
pub(crate) fn from_node<T: de::DeserializeOwned>(node: &Node) -> Result<T, TypeError> {
    T::deserialize(NodeReader(node))
}

impl fmt::Display for TypeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for TypeError {}

impl TypeError {
    /// Gives the error a place unless something further inside already did.
    fn or_at(mut self, at: Position) -> Self {
        self.at.get_or_insert(at);
        self
    }
}

impl de::Error for TypeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { at: None, message: message.to_string(), hint: None }
    }

    fn invalid_type(unexpected: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        let scalar = matches!(
            unexpected,
            de::Unexpected::Bool(_)
                | de::Unexpected::Signed(_)
                | de::Unexpected::Unsigned(_)
                | de::Unexpected::Float(_)
        );
        let hint =
            (scalar && expected.to_string() == "a string").then(|| "put it in quotes".to_owned());
        let found = match unexpected {
            de::Unexpected::Unit => "nothing".to_owned(),
            de::Unexpected::Seq => "a list".to_owned(),
            de::Unexpected::Map => "a map".to_owned(),
            other => other.to_string(),
        };
        Self { at: None, message: format!("expected {expected}, found {found}"), hint }
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        unknown("field", field, expected)
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        unknown("value", variant, expected)
    }

    fn missing_field(field: &'static str) -> Self {
        Self { at: None, message: format!("field `{field}` is missing"), hint: None }
    }
}

fn unknown(what: &str, found: &str, expected: &'static [&'static str]) -> TypeError {
    let list = expected.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let message = match expected {
        [] => format!("unknown {what} `{found}`, expected none"),
        [_] => format!("unknown {what} `{found}`, expected {list}"),
        _ => format!("unknown {what} `{found}`, expected one of {list}"),
    };
    let hint =
        nearest(found, expected.iter().copied()).map(|name| format!("did you mean `{name}`?"));
    TypeError { at: None, message, hint }
}

struct NodeReader<'a>(&'a Node);

impl<'de> de::Deserializer<'de> for NodeReader<'_> {
    type Error = TypeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        let result = match &self.0.content {
            Content::Null => visitor.visit_unit(),
            Content::Bool(value) => visitor.visit_bool(*value),
            Content::Number(value) => match (value.as_u64(), value.as_i64(), value.as_f64()) {
                (Some(value), ..) => visitor.visit_u64(value),
                (_, Some(value), _) => visitor.visit_i64(value),
                (.., value) => visitor.visit_f64(value.unwrap_or(f64::NAN)),
            },
            Content::Text(value) => visitor.visit_str(value),
            Content::List(items) => visitor.visit_seq(Items(items.iter())),
            Content::Map(entries) => visitor.visit_map(Entries {
                entries: entries.iter(),
                value: None,
                skip_null: false,
            }),
        };
        result.map_err(|error: TypeError| error.or_at(self.0.at))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        match self.0.content {
            Content::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, TypeError> {
        match &self.0.content {
            Content::Map(entries) => visitor
                .visit_map(Entries { entries: entries.iter(), value: None, skip_null: true })
                .map_err(|error: TypeError| error.or_at(self.0.at)),
            _ => {
                let message = format!("expected a map, found {}", self.0.kind());
                Err(TypeError { at: Some(self.0.at), message, hint: None })
            }
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, TypeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, TypeError> {
        match &self.0.content {
            Content::Text(value) => visitor
                .visit_enum(value.as_str().into_deserializer())
                .map_err(|error: TypeError| error.or_at(self.0.at)),
            _ => {
                let message = format!("expected text, found {}", self.0.kind());
                Err(TypeError { at: Some(self.0.at), message, hint: None })
            }
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

struct Items<'a>(std::slice::Iter<'a, Node>);

impl<'de> de::SeqAccess<'de> for Items<'_> {
    type Error = TypeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, TypeError> {
        let read =
            |node: &Node| seed.deserialize(NodeReader(node)).map_err(|error| error.or_at(node.at));
        self.0.next().map(read).transpose()
    }
}

struct Entries<'a> {
    entries: std::slice::Iter<'a, (Key, Node)>,
    value: Option<&'a Node>,
    skip_null: bool,
}

impl<'de> de::MapAccess<'de> for Entries<'_> {
    type Error = TypeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, TypeError> {
        // A struct's `field:` with nothing after it is as good as no field, as in Kubernetes; its key is still checked
        // the next time somebody writes a value.
        let skip = self.skip_null;
        let Some((key, node)) =
            self.entries.find(|(_, node)| !(skip && node.content == Content::Null))
        else {
            return Ok(None);
        };
        self.value = Some(node);
        let reader: StringDeserializer<TypeError> = key.text.clone().into_deserializer();
        seed.deserialize(reader).map(Some).map_err(|error| error.or_at(key.at))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, TypeError> {
        let node = self.value.take().expect("serde asks for a value only after its key");
        seed.deserialize(NodeReader(node)).map_err(|error| error.or_at(node.at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_api::fleet::v1alpha1::{AppFile, SiteFile};

    fn check<T: de::DeserializeOwned + fmt::Debug>(
        text: &str,
        line: u64,
        column: u64,
        message: &str,
        hint: Option<&str>,
    ) {
        let node = crate::yaml::parse(text).unwrap().remove(0);
        let error = from_node::<T>(&node).unwrap_err();
        assert_eq!(error.message, message);
        assert_eq!(error.at, Some(Position { line, column }));
        assert_eq!(error.hint.as_deref(), hint);
    }

    const SITE: &str =
        "apiVersion: fleet.skerry.dev/v1alpha1\nkind: Site\nmetadata:\n  name: a\nspec:\n";

    #[test]
    fn what_does_not_fit_is_named_with_its_place() {
        check::<SiteFile>(
            &format!("{SITE}  node: [x]\n"),
            6,
            3,
            "unknown field `node`, expected one of `nodes`, `vars`, `offlineBudget`, `cni`, `osChannel`, `os`",
            Some("did you mean `nodes`?"),
        );
        check::<SiteFile>(
            &format!("{SITE}  nodes: [1]\n"),
            6,
            11,
            "expected a string, found integer `1`",
            Some("put it in quotes"),
        );
        check::<SiteFile>(
            &format!("{SITE}  nodes: x\n"),
            6,
            10,
            "expected a sequence, found string \"x\"",
            None,
        );
        check::<SiteFile>(
            "kind: Site\nmetadata: {name: a}\n",
            1,
            1,
            "field `apiVersion` is missing",
            None,
        );
        check::<SiteFile>(
            &format!("{SITE}  offlineBudget: 3 weeks\n"),
            6,
            18,
            "`3 weeks` is no length of time; expected numbers with the units s, m, h or d, such as `30m`, `72h` or `14d`",
            None,
        );
        check::<AppFile>(
            "apiVersion: x\nkind: App\nmetadata: {name: a}\nspec:\n  placement:\n    sites:\n      matchExpressions:\n        - {key: a, operator: in}\n",
            8,
            30,
            "unknown value `in`, expected one of `In`, `NotIn`, `Exists`, `DoesNotExist`",
            Some("did you mean `In`?"),
        );
    }

    #[test]
    fn a_field_with_nothing_after_it_counts_as_absent() {
        let node = crate::yaml::parse(&format!("{SITE}  nodes:\n  vars:\n")).unwrap().remove(0);
        assert_eq!(from_node::<SiteFile>(&node).unwrap().spec.nodes, Vec::<String>::new());
    }
}
