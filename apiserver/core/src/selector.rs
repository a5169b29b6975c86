//! Label and field selectors: the text forms of query parameters and the object form of specs.
//!
//! Lists, watches, deletecollection and the controllers call this. It never knows which field labels a resource
//! supports: the caller checks [`FieldSelector::requirements`] against its own list.
//!
//! Source of the grammar: kubernetes/apimachinery, pkg/labels/selector.go and pkg/fields/selector.go;
//! label syntax: pkg/util/validation/validation.go.

use crate::status::ApiError;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fmt;

/// Longest name part of a label key, and longest label value.
pub const LABEL_LEN_MAX: usize = 63;
/// Longest prefix part of a label key.
pub const LABEL_PREFIX_LEN_MAX: usize = 253;

/// Why a selector was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SelectorError {
    /// The text ends or goes on where the grammar wants something else.
    #[error("unable to parse requirement: found `{found}`, expected: {expected}")]
    Unexpected { found: String, expected: &'static str },
    /// The key is no qualified name.
    #[error("invalid label key `{key}`: {why}")]
    Key { key: String, why: &'static str },
    /// The value is no label value.
    #[error("invalid label value `{value}` of key `{key}`: {why}")]
    Value { key: String, value: String, why: &'static str },
    /// `in` and `notin` need values.
    #[error("for `in`, `notin` operators, values set can't be empty (key `{key}`)")]
    NoValues { key: String },
    /// `Exists` and `DoesNotExist` take none.
    #[error("values set must be empty for exists and does not exist (key `{key}`)")]
    Values { key: String },
    /// `>` and `<` compare integers.
    #[error("for `Gt`, `Lt` operators, the value must be an integer (key `{key}`)")]
    NotAnInteger { key: String },
    /// An operator that does not exist.
    #[error("`{operator}` is not a valid label selector operator")]
    Operator { operator: String },
    /// The object form has a part of the wrong type.
    #[error("label selector: `{field}` must be {expected}")]
    Shape { field: String, expected: &'static str },
    /// A term of a field selector has no operator.
    #[error("invalid selector: `{selector}`; can't understand `{term}`")]
    Term { selector: String, term: String },
    /// A backslash before anything but `\`, `,` or `=`.
    #[error("invalid field selector: invalid escape sequence in `{term}`")]
    Escape { term: String },
}

impl From<SelectorError> for ApiError {
    fn from(error: SelectorError) -> Self {
        ApiError::bad_request(error.to_string())
    }
}

/// What is asked of one label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelOperator {
    /// Present, with one of these values.
    In(BTreeSet<String>),
    /// Absent, or present with none of these values.
    NotIn(BTreeSet<String>),
    /// Present.
    Exists,
    /// Absent.
    Absent,
    /// Present, an integer, and greater.
    Greater(i64),
    /// Present, an integer, and less.
    Less(i64),
}

/// One term of a label selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelRequirement {
    /// The label's key.
    pub key: String,
    /// What is asked of its value.
    pub operator: LabelOperator,
}

/// All of some requirements on labels.
///
/// `Display` gives the query form, sorted by key, as the `selector` of a Scale needs it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<LabelRequirement>,
    nothing: bool,
}

impl LabelSelector {
    /// Parses the query form, such as `app=web,tier in (front, back),!canary`. Empty text matches everything.
    ///
    /// # Errors
    ///
    /// When the text is not in the grammar, or a key or value is no label key or value.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut parser = Parser { rest: text };
        let mut requirements = Vec::new();
        if parser.peek(Context::Text) == Token::End {
            return Ok(Self::default());
        }
        loop {
            requirements.push(parser.requirement()?);
            match parser.next(Context::Text) {
                Token::End => break,
                Token::Comma => {
                    // `a,` is refused, as is `a,,b`.
                    let next = parser.peek(Context::Text);
                    if !matches!(next, Token::Word(_) | Token::Not) {
                        return Err(unexpected(next, "identifier after `,`"));
                    }
                }
                other => return Err(unexpected(other, "`,` or end of text")),
            }
        }
        requirements.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(Self { requirements, nothing: false })
    }

    /// Reads a `metav1.LabelSelector`. An empty object matches everything, `null` matches nothing.
    ///
    /// # Errors
    ///
    /// When a part has the wrong type, an operator is unknown, or its values do not fit it.
    pub fn from_object(selector: &Value) -> Result<Self, SelectorError> {
        let shape =
            |field: &str, expected| SelectorError::Shape { field: field.to_owned(), expected };
        let object = match selector {
            Value::Null => return Ok(Self { requirements: Vec::new(), nothing: true }),
            Value::Object(object) => object,
            _ => return Err(shape("selector", "an object")),
        };
        let mut requirements = Vec::new();
        match object.get("matchLabels") {
            None | Some(Value::Null) => {}
            Some(Value::Object(labels)) => {
                for (key, value) in labels {
                    let value = value
                        .as_str()
                        .ok_or_else(|| shape(&format!("matchLabels.{key}"), "a string"))?;
                    let values = BTreeSet::from([value.to_owned()]);
                    requirements.push(requirement(key.clone(), LabelOperator::In(values))?);
                }
            }
            Some(_) => return Err(shape("matchLabels", "an object")),
        }
        match object.get("matchExpressions") {
            None | Some(Value::Null) => {}
            Some(Value::Array(expressions)) => {
                for (at, expression) in expressions.iter().enumerate() {
                    requirements.push(expression_requirement(at, expression)?);
                }
            }
            Some(_) => return Err(shape("matchExpressions", "an array")),
        }
        requirements.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(Self { requirements, nothing: false })
    }

    /// Whether an object with these labels is selected; `None` is an object without labels.
    pub fn matches(&self, labels: Option<&Map<String, Value>>) -> bool {
        !self.nothing
            && self.requirements.iter().all(|requirement| {
                let label = labels
                    .and_then(|labels| labels.get(&requirement.key))
                    .and_then(|value| value.as_str());
                let number = || label.and_then(|label| label.parse::<i64>().ok());
                match &requirement.operator {
                    LabelOperator::In(values) => label.is_some_and(|label| values.contains(label)),
                    LabelOperator::NotIn(values) => {
                        label.is_none_or(|label| !values.contains(label))
                    }
                    LabelOperator::Exists => label.is_some(),
                    LabelOperator::Absent => label.is_none(),
                    LabelOperator::Greater(bound) => number().is_some_and(|value| value > *bound),
                    LabelOperator::Less(bound) => number().is_some_and(|value| value < *bound),
                }
            })
    }

    /// Whether every object is selected.
    pub fn is_empty(&self) -> bool {
        !self.nothing && self.requirements.is_empty()
    }

    /// The terms, sorted by key.
    pub fn requirements(&self) -> &[LabelRequirement] {
        &self.requirements
    }
}

impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, LabelRequirement { key, operator }) in self.requirements.iter().enumerate() {
            if at > 0 {
                f.write_str(",")?;
            }
            let list = |values: &BTreeSet<String>| -> String {
                values.iter().map(String::as_str).collect::<Vec<_>>().join(",")
            };
            match operator {
                LabelOperator::In(values) if values.len() == 1 => {
                    write!(f, "{key}={}", list(values))
                }
                LabelOperator::In(values) => write!(f, "{key} in ({})", list(values)),
                LabelOperator::NotIn(values) if values.len() == 1 => {
                    write!(f, "{key}!={}", list(values))
                }
                LabelOperator::NotIn(values) => write!(f, "{key} notin ({})", list(values)),
                LabelOperator::Exists => write!(f, "{key}"),
                LabelOperator::Absent => write!(f, "!{key}"),
                LabelOperator::Greater(bound) => write!(f, "{key}>{bound}"),
                LabelOperator::Less(bound) => write!(f, "{key}<{bound}"),
            }?;
        }
        Ok(())
    }
}

/// One term of a field selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldRequirement {
    /// Field label, a dotted path such as `spec.nodeName`.
    pub path: String,
    /// `=` or `==`; otherwise `!=`.
    pub equal: bool,
    /// The value to compare with.
    pub value: String,
}

/// All of some comparisons of fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSelector {
    requirements: Vec<FieldRequirement>,
}

impl FieldSelector {
    /// Parses the query form, such as `spec.nodeName=edge-1,status.phase!=Running`; `\` escapes `,`, `=` and itself.
    ///
    /// # Errors
    ///
    /// When a term has no operator, or an escape is unknown.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let requirements = unescaped_split(text)
            .into_iter()
            .filter(|term| !term.is_empty())
            .map(|term| {
                let (at, operator) = operator_of(term).ok_or_else(|| SelectorError::Term {
                    selector: text.to_owned(),
                    term: term.to_owned(),
                })?;
                Ok(FieldRequirement {
                    path: unescape(term[..at].trim())?,
                    equal: operator != "!=",
                    value: unescape(&term[at + operator.len()..])?,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { requirements })
    }

    /// The terms, in the order of the text.
    pub fn requirements(&self) -> &[FieldRequirement] {
        &self.requirements
    }

    /// Whether `object` is selected: scalars compare as text, and a missing field is the empty text.
    pub fn matches(&self, object: &Value) -> bool {
        self.requirements.iter().all(|requirement| {
            (field_text(object, &requirement.path) == requirement.value) == requirement.equal
        })
    }

    /// Whether every object is selected.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }
}

/// Fields that are booleans in the API's types: missing is `false`, not the empty text.
const FALSE_WHEN_MISSING: [&str; 2] = ["spec.unschedulable", "spec.hostNetwork"];

fn field_text(object: &Value, path: &str) -> String {
    let found = path.split('.').try_fold(object, |value, name| value.get(name));
    match found {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Bool(value)) => value.to_string(),
        Some(Value::Number(value)) => value.to_string(),
        // The field label `source` of events means the component.
        Some(Value::Object(source)) if path == "source" => {
            source.get("component").and_then(Value::as_str).unwrap_or_default().to_owned()
        }
        _ if FALSE_WHEN_MISSING.contains(&path) => "false".to_owned(),
        _ => String::new(),
    }
}

fn unescaped_split(text: &str) -> Vec<&str> {
    let mut terms = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                terms.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    terms.push(&text[start..]);
    terms
}

fn operator_of(term: &str) -> Option<(usize, &'static str)> {
    let mut escaped = false;
    for (at, c) in term.char_indices() {
        if escaped {
            escaped = false;
        } else if c == '\\' {
            escaped = true;
        } else if let Some(operator) =
            ["!=", "==", "="].into_iter().find(|operator| term[at..].starts_with(operator))
        {
            return Some((at, operator));
        }
    }
    None
}

fn unescape(term: &str) -> Result<String, SelectorError> {
    let escape = || SelectorError::Escape { term: term.to_owned() };
    let mut out = String::with_capacity(term.len());
    let mut chars = term.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some(c @ ('\\' | ',' | '=')) => out.push(c),
                _ => return Err(escape()),
            },
            // An operator inside a value has to be escaped, so that `a=b=c` is never half understood.
            '=' => return Err(escape()),
            c => out.push(c),
        }
    }
    Ok(out)
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token<'a> {
    Word(&'a str),
    Comma,
    Open,
    Close,
    Not,
    Equal,
    NotEqual,
    Greater,
    Less,
    In,
    NotIn,
    End,
}

impl fmt::Display for Token<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Word(word) => word,
            Self::Comma => ",",
            Self::Open => "(",
            Self::Close => ")",
            Self::Not => "!",
            Self::Equal => "=",
            Self::NotEqual => "!=",
            Self::Greater => ">",
            Self::Less => "<",
            Self::In => "in",
            Self::NotIn => "notin",
            Self::End => "",
        })
    }
}

/// Whether `in` and `notin` are operators here, or words like any other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Context {
    Operator,
    Text,
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn peek(&self, context: Context) -> Token<'a> {
        Parser { rest: self.rest }.next(context)
    }

    fn next(&mut self, context: Context) -> Token<'a> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
        let symbols = [
            ("!=", Token::NotEqual),
            ("==", Token::Equal),
            ("=", Token::Equal),
            (",", Token::Comma),
            ("(", Token::Open),
            (")", Token::Close),
            ("!", Token::Not),
            (">", Token::Greater),
            ("<", Token::Less),
        ];
        for (text, token) in symbols {
            if let Some(rest) = self.rest.strip_prefix(text) {
                self.rest = rest;
                return token;
            }
        }
        let end = self
            .rest
            .find(|c: char| "=!(),><".contains(c) || c.is_ascii_whitespace())
            .unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        match (word, context) {
            ("", _) => Token::End,
            ("in", Context::Operator) => Token::In,
            ("notin", Context::Operator) => Token::NotIn,
            (word, _) => Token::Word(word),
        }
    }

    fn requirement(&mut self) -> Result<LabelRequirement, SelectorError> {
        let absent = self.peek(Context::Text) == Token::Not;
        if absent {
            self.next(Context::Text);
        }
        let key = match self.next(Context::Text) {
            Token::Word(key) => key.to_owned(),
            other => return Err(unexpected(other, "identifier")),
        };
        if absent {
            return requirement(key, LabelOperator::Absent);
        }
        if matches!(self.peek(Context::Operator), Token::End | Token::Comma) {
            return requirement(key, LabelOperator::Exists);
        }
        let operator = match self.next(Context::Operator) {
            Token::Equal => LabelOperator::In(BTreeSet::from([self.exact_value()?])),
            Token::NotEqual => LabelOperator::NotIn(BTreeSet::from([self.exact_value()?])),
            Token::In => LabelOperator::In(self.value_list()?),
            Token::NotIn => LabelOperator::NotIn(self.value_list()?),
            token @ (Token::Greater | Token::Less) => {
                let bound = self
                    .exact_value()?
                    .parse()
                    .map_err(|_| SelectorError::NotAnInteger { key: key.clone() })?;
                if token == Token::Greater {
                    LabelOperator::Greater(bound)
                } else {
                    LabelOperator::Less(bound)
                }
            }
            other => {
                return Err(unexpected(other, "one of `in`, `notin`, `=`, `==`, `!=`, `>`, `<`"));
            }
        };
        requirement(key, operator)
    }

    /// The value after `=`; nothing before a comma or the end is the empty value.
    fn exact_value(&mut self) -> Result<String, SelectorError> {
        match self.peek(Context::Text) {
            Token::End | Token::Comma => Ok(String::new()),
            Token::Word(word) => {
                self.next(Context::Text);
                Ok(word.to_owned())
            }
            other => Err(unexpected(other, "identifier")),
        }
    }

    /// `(a, b)`; a missing word between commas is the empty value.
    fn value_list(&mut self) -> Result<BTreeSet<String>, SelectorError> {
        match self.next(Context::Text) {
            Token::Open => {}
            other => return Err(unexpected(other, "`(`")),
        }
        let mut values = BTreeSet::new();
        if self.peek(Context::Text) == Token::Close {
            self.next(Context::Text);
            return Ok(values);
        }
        loop {
            if let Token::Word(word) = self.peek(Context::Text) {
                self.next(Context::Text);
                values.insert(word.to_owned());
            } else {
                values.insert(String::new());
            }
            match self.next(Context::Text) {
                Token::Comma => {}
                Token::Close => return Ok(values),
                other => return Err(unexpected(other, "`,` or `)`")),
            }
        }
    }
}

fn unexpected(found: Token<'_>, expected: &'static str) -> SelectorError {
    SelectorError::Unexpected { found: found.to_string(), expected }
}

fn requirement(key: String, operator: LabelOperator) -> Result<LabelRequirement, SelectorError> {
    if let Err(why) = check_label_key(&key) {
        return Err(SelectorError::Key { key, why });
    }
    if let LabelOperator::In(values) | LabelOperator::NotIn(values) = &operator {
        if values.is_empty() {
            return Err(SelectorError::NoValues { key });
        }
        for value in values {
            if let Err(why) = check_label_value(value) {
                return Err(SelectorError::Value { key, value: value.clone(), why });
            }
        }
    }
    Ok(LabelRequirement { key, operator })
}

fn expression_requirement(at: usize, term: &Value) -> Result<LabelRequirement, SelectorError> {
    let shape = |field: &str, expected| SelectorError::Shape {
        field: format!("matchExpressions[{at}].{field}"),
        expected,
    };
    let text = |field: &'static str| {
        term.get(field).and_then(Value::as_str).ok_or_else(|| shape(field, "a string"))
    };
    let key = text("key")?.to_owned();
    let values = match term.get("values") {
        None | Some(Value::Null) => BTreeSet::new(),
        Some(Value::Array(values)) => values
            .iter()
            .map(|value| value.as_str().map(str::to_owned))
            .collect::<Option<_>>()
            .ok_or_else(|| shape("values", "an array of strings"))?,
        Some(_) => return Err(shape("values", "an array of strings")),
    };
    match text("operator")? {
        "In" => requirement(key, LabelOperator::In(values)),
        "NotIn" => requirement(key, LabelOperator::NotIn(values)),
        "Exists" | "DoesNotExist" if !values.is_empty() => Err(SelectorError::Values { key }),
        "Exists" => requirement(key, LabelOperator::Exists),
        "DoesNotExist" => requirement(key, LabelOperator::Absent),
        operator => Err(SelectorError::Operator { operator: operator.to_owned() }),
    }
}

/// Checks `prefix/name` or `name`: the prefix a DNS subdomain, the name a label name.
///
/// # Errors
///
/// What is wrong, for a person.
pub fn check_label_key(key: &str) -> Result<(), &'static str> {
    let name = match key.split_once('/') {
        None => key,
        Some((prefix, name)) => {
            let labels_fit = prefix.split('.').all(|label| {
                !label.is_empty()
                    && label
                        .bytes()
                        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                    && !label.starts_with('-')
                    && !label.ends_with('-')
            });
            if prefix.is_empty() || prefix.len() > LABEL_PREFIX_LEN_MAX || !labels_fit {
                return Err(
                    "the prefix must be a lowercase RFC 1123 subdomain of at most 253 bytes",
                );
            }
            name
        }
    };
    if name.is_empty() {
        return Err("the name part must not be empty");
    }
    check_label_value(name)
}

/// Checks a label value: empty, or at most 63 bytes of alphanumerics, `-`, `_`, `.` with alphanumerics at both ends.
///
/// # Errors
///
/// What is wrong, for a person.
pub fn check_label_value(value: &str) -> Result<(), &'static str> {
    if value.len() > LABEL_LEN_MAX {
        return Err("must be no more than 63 bytes");
    }
    let ends_fit = |b: Option<&u8>| b.is_none_or(u8::is_ascii_alphanumeric);
    let bytes = value.as_bytes();
    let inside = bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b));
    if inside && ends_fit(bytes.first()) && ends_fit(bytes.last()) {
        Ok(())
    } else {
        Err(
            "must consist of alphanumeric characters, `-`, `_` or `.`, and must start and end with \
             an alphanumeric character",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn check(selector: &str, labels: Value, expected: bool) {
        let parsed =
            LabelSelector::parse(selector).unwrap_or_else(|error| panic!("`{selector}`: {error}"));
        assert_eq!(parsed.matches(labels.as_object()), expected, "`{selector}` on {labels}");
        let again = LabelSelector::parse(&parsed.to_string()).expect("printed form parses");
        assert_eq!(again, parsed, "printed form of `{selector}`");
    }

    #[test]
    fn every_form_of_label_selector_selects_what_it_says() {
        let web = || json!({"app": "web", "tier": "front", "n": "5"});
        for (selector, expected) in [
            ("", true),
            ("  ", true),
            ("app", true),
            ("!app", false),
            ("! missing", true),
            ("app=web", true),
            ("app==web", true),
            ("app = web", true),
            ("app=db", false),
            ("app!=web", false),
            ("app!=db", true),
            ("missing!=web", true),
            ("app in (web, db)", true),
            ("app in(db)", false),
            ("app notin (db,cache)", true),
            ("app notin (web)", false),
            ("missing notin (web)", true),
            ("missing in (web)", false),
            ("app=web,tier=front", true),
            ("app=web,tier=back", false),
            ("app,!missing,tier in (front)", true),
            ("n>4", true),
            ("n<5", false),
            ("app>4", false),
            ("in!=x,notin", false),
            ("missing=", false),
            ("example.com/x!=y", true),
            ("app in (,web)", true),
        ] {
            check(selector, web(), expected);
        }
        check("empty=", json!({"empty": ""}), true);
        check("empty=,b", json!({"empty": "", "b": "1"}), true);
        check("in in (in)", json!({"in": "in"}), true);
    }

    #[test]
    fn malformed_label_selectors_are_refused() {
        for selector in [
            ",",
            "a,",
            ",a",
            "a,,b",
            "a=b=c",
            "a b",
            "a in",
            "a in b",
            "a in (b",
            "a in ()",
            "a in (b c)",
            "=a",
            "!",
            "!a=b",
            "a>b",
            "a>",
            "a/b/c=d",
            "/a=b",
            "A_/x=y",
            "a=-b",
            "a=\u{e9}",
            "a===b",
            "a=b)",
            "(a)",
            "a.=b",
        ] {
            assert!(LabelSelector::parse(selector).is_err(), "`{selector}` should be refused");
        }
        let long = format!("a={}", "x".repeat(64));
        assert!(LabelSelector::parse(&long).is_err());
    }

    #[test]
    fn object_form_selects_as_the_query_form() {
        let selector = LabelSelector::from_object(&json!({
            "matchLabels": {"app": "web"},
            "matchExpressions": [
                {"key": "tier", "operator": "In", "values": ["front", "back"]},
                {"key": "zone", "operator": "NotIn", "values": ["a"]},
                {"key": "x", "operator": "Exists"},
                {"key": "y", "operator": "DoesNotExist", "values": []},
            ],
        }))
        .expect("valid");
        assert_eq!(selector.to_string(), "app=web,tier in (back,front),x,!y,zone!=a");
        let fits = json!({"app": "web", "tier": "back", "x": "1"});
        assert!(selector.matches(fits.as_object()));
        assert!(!selector.matches(json!({"app": "web", "tier": "back"}).as_object()));

        let all = LabelSelector::from_object(&json!({})).expect("valid");
        assert!(all.is_empty() && all.matches(None));
        let none = LabelSelector::from_object(&Value::Null).expect("valid");
        assert!(!none.is_empty() && !none.matches(None));
    }

    #[test]
    fn malformed_object_forms_are_refused() {
        for selector in [
            json!("app=web"),
            json!([]),
            json!({"matchLabels": []}),
            json!({"matchLabels": {"a": 1}}),
            json!({"matchExpressions": {}}),
            json!({"matchExpressions": [1]}),
            json!({"matchExpressions": [{"key": "a"}]}),
            json!({"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}),
            json!({"matchExpressions": [{"key": "a", "operator": "In"}]}),
            json!({"matchExpressions": [{"key": "a", "operator": "In", "values": [1]}]}),
            json!({"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["1"]}]}),
        ] {
            assert!(LabelSelector::from_object(&selector).is_err(), "{selector}");
        }
    }

    #[test]
    fn field_selectors_compare_dotted_paths() {
        let pod = json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"nodeName": "edge-1", "n": 3, "hostNetwork": true},
            "source": {"component": "kubelet"},
        });
        for (selector, expected) in [
            ("", true),
            ("metadata.name=web", true),
            ("metadata.name==web", true),
            ("metadata.name!=web", false),
            ("spec.nodeName=edge-1,metadata.namespace=default", true),
            ("spec.nodeName=edge-1,metadata.namespace=other", false),
            ("status.phase=", true),
            ("status.phase!=Running", true),
            ("spec.n=3", true),
            ("spec.hostNetwork=true", true),
            ("spec.unschedulable=false", true),
            ("spec=", true),
            ("source=kubelet", true),
            (",metadata.name=web,", true),
        ] {
            let parsed = FieldSelector::parse(selector).expect("valid");
            assert_eq!(parsed.matches(&pod), expected, "`{selector}`");
        }
        let escaped = FieldSelector::parse(r"metadata.name=a\,b\=c\\").expect("valid");
        assert_eq!(escaped.requirements()[0].value, r"a,b=c\");
    }

    #[test]
    fn malformed_field_selectors_are_refused() {
        for selector in ["metadata.name", "a=b=c", r"a=\x", r"a=b\", "a=b,c", r"a\=b"] {
            assert!(FieldSelector::parse(selector).is_err(), "`{selector}` should be refused");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused_without_panic(text in "[a-c!=,()<> in\\\\/.é-]{0,24}") {
            if let Ok(selector) = LabelSelector::parse(&text) {
                let printed = selector.to_string();
                // A value list that holds the empty value prints as `(,a)`, which reads back the same.
                prop_assert_eq!(LabelSelector::parse(&printed).ok(), Some(selector), "{}", printed);
            }
            let _ = FieldSelector::parse(&text);
        }

        #[test]
        fn notin_is_the_opposite_of_in(
            value in prop::option::of("[a-d]"),
            set in prop::collection::btree_set("[a-d]", 1..4),
        ) {
            let list = set.into_iter().collect::<Vec<_>>().join(",");
            let labels = value.map(|value| json!({"k": value}));
            let labels = labels.as_ref().and_then(Value::as_object);
            let inside = LabelSelector::parse(&format!("k in ({list})")).expect("valid");
            let outside = LabelSelector::parse(&format!("k notin ({list})")).expect("valid");
            prop_assert_ne!(inside.matches(labels), outside.matches(labels));
        }

        #[test]
        fn field_values_survive_escaping(value in "[a-c,=\\\\]{0,8}") {
            let escaped: String = value
                .chars()
                .flat_map(|c| if "\\,=".contains(c) { vec!['\\', c] } else { vec![c] })
                .collect();
            let selector = FieldSelector::parse(&format!("x={escaped}")).expect("valid");
            let object = json!({"x": value});
            prop_assert!(selector.matches(&object));
        }
    }
}
