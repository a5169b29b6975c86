//! Substitution on the parsed tree: `${site.vars.limit}`, `${site.name}` and so on.
//!
//! Alone in a scalar a value keeps its type, maps and lists included; inside a longer text it is text. `$${` is a
//! literal `${`. Only values are looked at, never keys, and what was put in is not looked at again. An unknown name is
//! an error. There is no template language.

use crate::suggest::nearest;
use crate::yaml::{Content, Node, Position};
use std::collections::BTreeMap;

/// What names mean for one app on one site.
#[derive(Debug, Clone)]
pub(crate) struct Scope {
    values: BTreeMap<&'static str, Node>,
    labels: BTreeMap<String, Node>,
    vars: BTreeMap<&'static str, Node>,
}

/// A name that could not be put in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unresolved {
    pub(crate) at: Position,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl Scope {
    pub(crate) fn new() -> Self {
        Self { values: BTreeMap::new(), labels: BTreeMap::new(), vars: BTreeMap::new() }
    }

    /// Defines a plain name, such as `site.name`.
    pub(crate) fn value(mut self, name: &'static str, value: &str) -> Self {
        self.values.insert(name, Node::new(Content::Text(value.to_owned())));
        self
    }

    /// Defines `site.labels.KEY` for every label.
    pub(crate) fn labels(mut self, labels: &BTreeMap<String, String>) -> Self {
        let labels = labels
            .iter()
            .map(|(key, value)| (key.clone(), Node::new(Content::Text(value.clone()))));
        self.labels = labels.collect();
        self
    }

    /// Defines everything under a prefix such as `site.vars`.
    pub(crate) fn vars(mut self, prefix: &'static str, vars: Node) -> Self {
        self.vars.insert(prefix, vars);
        self
    }

    fn lookup(&self, name: &str) -> Result<&Node, Option<String>> {
        if let Some(value) = self.values.get(name) {
            return Ok(value);
        }
        if let Some(key) = name.strip_prefix("site.labels.") {
            // Label keys contain dots, so everything after the prefix is the key.
            return self.labels.get(key).ok_or_else(|| {
                nearest(key, self.labels.keys().map(String::as_str))
                    .map(|key| format!("did you mean `${{site.labels.{key}}}`?"))
            });
        }
        for (prefix, vars) in &self.vars {
            let Some(path) = name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('.'))
            else {
                continue;
            };
            if let Some(node) = walk(vars, path) {
                return Ok(node);
            }
            let keys = match &vars.content {
                Content::Map(entries) => entries.iter().map(|(key, _)| key.text.as_str()).collect(),
                _ => Vec::new(),
            };
            let hint = nearest(path, keys.iter().copied())
                .map(|key| format!("did you mean `${{{prefix}.{key}}}`?"));
            let elsewhere =
                self.vars.iter().filter(|(other, _)| *other != prefix).find_map(|(other, vars)| {
                    walk(vars, path).map(|_| format!("did you mean `${{{other}.{path}}}`?"))
                });
            let known = match &keys[..] {
                [] => format!("nothing is defined in `{prefix}`"),
                keys => format!("`{prefix}` has {}", keys.join(", ")),
            };
            return Err(hint.or(elsewhere).or(Some(known)));
        }
        let plain = self.values.keys().copied();
        let hint = nearest(name, plain).map(|known| format!("did you mean `${{{known}}}`?"));
        Err(hint.or_else(|| {
            let vars = self
                .vars
                .iter()
                .find_map(|(prefix, vars)| walk(vars, name).map(|_| format!("{prefix}.{name}")));
            Some(match vars {
                Some(full) => format!("did you mean `${{{full}}}`?"),
                None => format!("write `$${{{name}}}` if the text is meant literally"),
            })
        }))
    }
}

/// Replaces every `${…}` in `node`; all that cannot be resolved is reported together.
pub(crate) fn substitute(node: &Node, scope: &Scope) -> Result<Node, Vec<Unresolved>> {
    let mut unresolved = Vec::new();
    let node = walk_node(node, scope, &mut unresolved);
    if unresolved.is_empty() { Ok(node) } else { Err(unresolved) }
}

fn walk_node(node: &Node, scope: &Scope, unresolved: &mut Vec<Unresolved>) -> Node {
    let content = match &node.content {
        Content::Text(text) if text.contains("${") => match text_content(text, scope) {
            Ok(content) => content,
            Err((message, hint)) => {
                unresolved.push(Unresolved { at: node.at, message, hint });
                Content::Null
            }
        },
        Content::List(items) => {
            Content::List(items.iter().map(|item| walk_node(item, scope, unresolved)).collect())
        }
        Content::Map(entries) => Content::Map(
            entries
                .iter()
                .map(|(key, value)| (key.clone(), walk_node(value, scope, unresolved)))
                .collect(),
        ),
        other => other.clone(),
    };
    Node { content, at: node.at }
}

type Fault = (String, Option<String>);

fn text_content(text: &str, scope: &Scope) -> Result<Content, Fault> {
    if let Some(name) = text.strip_prefix("${").and_then(|rest| rest.strip_suffix('}'))
        && !name.contains('}')
    {
        return Ok(resolve(name, scope)?.content.clone());
    }
    let mut output = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        if rest[..start].ends_with('$') {
            output.push_str(&rest[..start - 1]);
            output.push_str("${");
            rest = &rest[start + 2..];
            continue;
        }
        output.push_str(&rest[..start]);
        let Some(end) = rest[start..].find('}') else {
            return Err((
                "`${` without a closing `}`".to_owned(),
                Some("close it, or write `$${` if it is meant literally".to_owned()),
            ));
        };
        let name = &rest[start + 2..start + end];
        match &resolve(name, scope)?.content {
            Content::Text(value) => output.push_str(value),
            Content::Number(value) => output.push_str(&value.to_string()),
            Content::Bool(value) => output.push_str(if *value { "true" } else { "false" }),
            Content::Null | Content::List(_) | Content::Map(_) => {
                let kind = resolve(name, scope)?.kind();
                return Err((
                    format!("`${{{name}}}` is {kind} and cannot stand inside a text"),
                    None,
                ));
            }
        }
        rest = &rest[start + end + 1..];
    }
    output.push_str(rest);
    Ok(Content::Text(output))
}

fn resolve<'a>(name: &str, scope: &'a Scope) -> Result<&'a Node, Fault> {
    scope
        .lookup(name.trim())
        .map_err(|hint| (format!("unknown variable `${{{}}}`", name.trim()), hint))
}

/// `a.b` is the key `a.b`, or else the key `b` of the map `a`.
fn walk<'a>(node: &'a Node, path: &str) -> Option<&'a Node> {
    if let Some(found) = node.get(path) {
        return Some(found);
    }
    path.match_indices('.').find_map(|(dot, _)| walk(node.get(&path[..dot])?, &path[dot + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn scope() -> Scope {
        let vars = |value: Value| Node::from_json(&value, Position::default());
        Scope::new()
            .value("site.name", "lisbon-01")
            .labels(&BTreeMap::from([("topology.kubernetes.io/zone".to_owned(), "west".to_owned())]))
            .vars("site.vars", vars(json!({"limit": 5, "greeting": "ola", "on": true, "deep": {"port": 80}, "raw": "${site.name}"})))
            .vars("fleet.vars", vars(json!({"ntp": ["a", "b"]})))
    }

    fn check(input: Value, expected: Value) {
        let node = substitute(&Node::from_json(&input, Position::default()), &scope()).unwrap();
        assert_eq!(node.to_json(), expected, "{input}");
    }

    fn check_error(input: &str, message: &str, hint: Option<&str>) {
        let unresolved =
            substitute(&Node::from_json(&json!([input]), Position::default()), &scope())
                .unwrap_err();
        assert_eq!(unresolved.len(), 1);
        assert_eq!(
            (unresolved[0].message.as_str(), unresolved[0].hint.as_deref()),
            (message, hint)
        );
    }

    #[test]
    fn a_variable_alone_keeps_its_type_and_inside_a_text_is_text() {
        check(json!("${site.vars.limit}"), json!(5));
        check(json!("${site.vars.on}"), json!(true));
        check(json!({"a": ["${fleet.vars.ntp}"]}), json!({"a": [["a", "b"]]}));
        check(json!("${site.vars.limit}m"), json!("5m"));
        check(json!("${site.vars.greeting} from ${site.name}"), json!("ola from lisbon-01"));
        check(json!("${site.vars.deep.port}"), json!(80));
        check(json!("${ site.name }"), json!("lisbon-01"));
        check(json!("${site.labels.topology.kubernetes.io/zone}"), json!("west"));
    }

    #[test]
    fn a_doubled_dollar_is_literal_and_other_dollars_are_left_alone() {
        check(json!("$${site.name}"), json!("${site.name}"));
        check(json!("echo $$${site.name}"), json!("echo $${site.name}"));
        check(json!("$(POD_IP) $HOME $$ ${site.name}"), json!("$(POD_IP) $HOME $$ lisbon-01"));
        check(json!({"${site.name}": 1}), json!({"${site.name}": 1}));
        check(json!("${site.vars.raw}"), json!("${site.name}"));
    }

    #[test]
    fn what_cannot_be_put_in_is_an_error_with_the_nearest_name() {
        check_error(
            "${site.vars.greting}",
            "unknown variable `${site.vars.greting}`",
            Some("did you mean `${site.vars.greeting}`?"),
        );
        check_error(
            "x ${site.nam}",
            "unknown variable `${site.nam}`",
            Some("did you mean `${site.name}`?"),
        );
        check_error(
            "${fleet.vars.limit}",
            "unknown variable `${fleet.vars.limit}`",
            Some("did you mean `${site.vars.limit}`?"),
        );
        check_error(
            "${limit}",
            "unknown variable `${limit}`",
            Some("did you mean `${site.vars.limit}`?"),
        );
        check_error(
            "${HOSTNAME}",
            "unknown variable `${HOSTNAME}`",
            Some("write `$${HOSTNAME}` if the text is meant literally"),
        );
        check_error(
            "a ${site.name",
            "`${` without a closing `}`",
            Some("close it, or write `$${` if it is meant literally"),
        );
        check_error(
            "a ${fleet.vars.ntp}",
            "`${fleet.vars.ntp}` is a list and cannot stand inside a text",
            None,
        );
    }

    proptest! {
        #[test]
        fn any_text_is_substituted_or_refused_without_a_panic(text in "[${}a-z. \u{e9}]{0,40}") {
            let _ = substitute(&Node::new(Content::Text(text)), &scope());
        }

        #[test]
        fn text_without_a_variable_stays_as_it_is(text in "[^$]{0,40}") {
            let node = substitute(&Node::new(Content::Text(text.clone())), &scope()).unwrap();
            prop_assert_eq!(node.content, Content::Text(text));
        }

        #[test]
        fn an_escaped_text_comes_out_literally(text in "[a-z.${} ]{0,30}") {
            let escaped = text.replace("${", "$${");
            // A dollar right before `${` would itself be read as the escape's; that text has no escaped form to compare.
            prop_assume!(!text.contains("$${"));
            let node = substitute(&Node::new(Content::Text(escaped)), &scope()).unwrap();
            prop_assert_eq!(node.content, Content::Text(text));
        }
    }
}
