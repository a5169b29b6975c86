//! Label and field selectors, as a watch names them.
//!
//! Source of the grammar: Kubernetes' documentation of labels and selectors; kubernetes/apimachinery, pkg/labels and
//! pkg/fields.

use serde_json::Value;
use std::collections::BTreeSet;

/// Both selectors of a watch; everything matches the empty one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<Requirement>,
}

/// Why a text is no selector.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no selector")]
pub struct SelectorError(pub String);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    In(BTreeSet<String>),
    NotIn(BTreeSet<String>),
    Exists,
    Absent,
    Greater(i64),
    Less(i64),
}

/// Terms of one selector; more is no honest selector.
const TERMS_MAX: usize = 256;

impl Selector {
    /// Reads both; an empty text matches everything.
    ///
    /// # Errors
    ///
    /// [`SelectorError`] with the text that is not understood.
    pub fn parse(labels: &str, fields: &str) -> Result<Self, SelectorError> {
        Ok(Self { labels: terms(labels, true)?, fields: terms(fields, false)? })
    }

    /// The same, restricted to one namespace; an empty one restricts nothing.
    #[must_use]
    pub fn within(mut self, namespace: &str) -> Self {
        if !namespace.is_empty() {
            let test = Test::In(BTreeSet::from([namespace.to_owned()]));
            self.fields.push(Requirement { key: "metadata.namespace".into(), test });
        }
        self
    }

    /// The same, restricted to one name.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        let test = Test::In(BTreeSet::from([name.to_owned()]));
        self.fields.push(Requirement { key: "metadata.name".into(), test });
        self
    }

    /// Whether `object` matches both.
    pub fn matches(&self, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        self.labels.iter().all(|one| one.test.holds(labels[one.key.as_str()].as_str()))
            && self.fields.iter().all(|one| {
                let found = one.key.split('.').fold(object, |value, field| &value[field]);
                let text = match found {
                    Value::String(text) => text.clone(),
                    // A field that is not there is empty, as in the API.
                    Value::Null => String::new(),
                    other => other.to_string(),
                };
                one.test.holds(Some(&text))
            })
    }
}

impl Test {
    fn holds(&self, value: Option<&str>) -> bool {
        let number = || value.and_then(|value| value.parse::<i64>().ok());
        match self {
            Self::In(values) => value.is_some_and(|value| values.contains(value)),
            Self::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Self::Exists => value.is_some(),
            Self::Absent => value.is_none(),
            Self::Greater(bound) => number().is_some_and(|number| number > *bound),
            Self::Less(bound) => number().is_some_and(|number| number < *bound),
        }
    }
}

fn terms(text: &str, labels: bool) -> Result<Vec<Requirement>, SelectorError> {
    let bad = || SelectorError(text.to_owned());
    let mut found = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        // A comma inside parentheses separates values, not terms.
        let mut depth = 0;
        let end = rest.find(|sign| {
            depth += i32::from(sign == '(') - i32::from(sign == ')');
            sign == ',' && depth <= 0
        });
        let (term, after) = match end {
            Some(end) => (&rest[..end], rest[end + 1..].trim_start()),
            None => (rest, ""),
        };
        let one = if labels { label_term(term.trim()) } else { equality(term.trim()) };
        found.push(one.ok_or_else(bad)?);
        if found.len() > TERMS_MAX || (end.is_some() && after.is_empty()) {
            return Err(bad());
        }
        rest = after;
    }
    Ok(found)
}

fn label_term(term: &str) -> Option<Requirement> {
    if let Some((head, values)) = term.strip_suffix(')').and_then(|term| term.split_once('(')) {
        let values = values.split(',').map(|value| value.trim().to_owned()).collect();
        let mut words = head.split_whitespace();
        let (key, word) = (words.next()?, words.next()?);
        let test = match (word, words.next()) {
            ("in", None) => Test::In(values),
            ("notin", None) => Test::NotIn(values),
            _ => return None,
        };
        return requirement(key, test);
    }
    if let Some(key) = term.strip_prefix('!') {
        return requirement(key.trim(), Test::Absent);
    }
    if let Some(found) = equality(term) {
        return Some(found);
    }
    for (sign, test) in [('>', Test::Greater as fn(i64) -> Test), ('<', Test::Less)] {
        if let Some((key, bound)) = term.split_once(sign) {
            return requirement(key.trim(), test(bound.trim().parse().ok()?));
        }
    }
    requirement(term, Test::Exists)
}

fn equality(term: &str) -> Option<Requirement> {
    let one = |value: &str| BTreeSet::from([value.trim().to_owned()]);
    if let Some((key, value)) = term.split_once("!=") {
        return requirement(key.trim(), Test::NotIn(one(value)));
    }
    let (key, value) = term.split_once('=')?;
    let value = value.strip_prefix('=').unwrap_or(value);
    requirement(key.trim(), Test::In(one(value)))
}

fn requirement(key: &str, test: Test) -> Option<Requirement> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-._/".contains(&byte);
    (!key.is_empty() && key.bytes().all(known)).then(|| Requirement { key: key.into(), test })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn label_selectors_have_kubernetes_meaning() {
        let object = json!({"metadata": {"labels": {"app": "web", "tier": "2"}}});
        for (text, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier=2", true),
            ("app!=web", false),
            ("other!=web", true),
            ("app", true),
            ("!app", false),
            ("!other", true),
            ("app in (db, web)", true),
            ("app in (db),tier", false),
            ("app notin (db,x), tier in (2)", true),
            ("other notin (x)", true),
            ("other in (x)", false),
            ("tier>1", true),
            ("tier < 2", false),
        ] {
            let selector = Selector::parse(text, "").expect(text);
            assert_eq!(selector.matches(&object), expected, "{text}");
        }
        for wrong in ["app=web,", ",", "a in x", "a within (b)", "a b", "in (x)", "=x", "a>b"] {
            assert!(Selector::parse(wrong, "").is_err(), "{wrong}");
        }
    }

    #[test]
    fn field_selectors_look_at_any_field() {
        let object = json!({"metadata": {"name": "p", "namespace": "a"}, "spec": {"nodeName": "edge1", "port": 3}});
        for (text, expected) in [
            ("spec.nodeName=edge1", true),
            ("metadata.name=p,spec.nodeName!=edge2", true),
            ("spec.port=3", true),
            ("status.phase=Running", false),
            ("status.phase!=Running", true),
        ] {
            let selector = Selector::parse("", text).expect(text);
            assert_eq!(selector.matches(&object), expected, "{text}");
        }
        assert!(Selector::parse("", "spec.nodeName").is_err());
        assert!(Selector::default().within("a").matches(&object));
        assert!(!Selector::default().within("b").matches(&object));
        assert!(Selector::default().within("").matches(&object));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[a-z=!<>,() ]{0,20}") {
            if let Ok(selector) = Selector::parse(&text, &text) {
                selector.matches(&json!({}));
            }
        }
    }
}
