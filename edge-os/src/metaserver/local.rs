//! What the node's API serves from rows: which of them a request means.
//!
//! Selectors are those of the Kubernetes API; of fields only name and namespace can be asked, as in KubeEdge.

use super::request::{Query, Target};
use serde_json::{Value, json};

/// Which objects of one type are meant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Selection {
    namespace: String,
    name: String,
    labels: Vec<(String, Test)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
}

impl Selection {
    /// Reads what a request selects.
    ///
    /// # Errors
    ///
    /// A text with the part that is not understood.
    pub(super) fn new(target: &Target, query: &Query) -> Result<Self, String> {
        let mut selection = Self {
            namespace: target.namespace.clone(),
            name: target.name.clone(),
            labels: Vec::new(),
        };
        for term in terms(query.get("labelSelector").map_or("", String::as_str)) {
            selection.labels.push(label_term(term).ok_or(format!("label selector `{term}`"))?);
        }
        for term in terms(query.get("fieldSelector").map_or("", String::as_str)) {
            let (key, value) = term.split_once('=').ok_or(format!("field selector `{term}`"))?;
            let value = value.trim_start_matches('=').to_owned();
            match key {
                "metadata.name" => selection.name = value,
                "metadata.namespace" => selection.namespace = value,
                _ => return Err(format!("field selector `{term}` without the cloud")),
            }
        }
        Ok(selection)
    }

    /// Whether `object` is meant.
    pub(super) fn takes(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        let is = |field: &str, wanted: &str| wanted.is_empty() || metadata[field] == wanted;
        is("namespace", &self.namespace)
            && is("name", &self.name)
            && self.labels.iter().all(|(key, test)| {
                let label = metadata["labels"][key.as_str()].as_str();
                match test {
                    Test::In(values) => {
                        label.is_some_and(|label| values.iter().any(|v| v == label))
                    }
                    Test::NotIn(values) => {
                        label.is_none_or(|label| values.iter().all(|v| v != label))
                    }
                    Test::Exists => label.is_some(),
                    Test::Absent => label.is_none(),
                }
            })
    }
}

/// The parts of a selector; a comma inside parentheses separates values, not parts.
fn terms(text: &str) -> Vec<&str> {
    let mut depth = 0;
    let parts = text.split(move |sign| {
        depth += i32::from(sign == '(') - i32::from(sign == ')');
        sign == ',' && depth == 0
    });
    parts.map(str::trim).filter(|part| !part.is_empty()).collect()
}

fn label_term(term: &str) -> Option<(String, Test)> {
    let words = |text: &str| -> Vec<String> {
        text.split(',').map(|value| value.trim().to_owned()).collect()
    };
    let (key, test) = if let Some((head, values)) =
        term.strip_suffix(')').and_then(|term| term.split_once('('))
    {
        match *head.split_whitespace().collect::<Vec<_>>().as_slice() {
            [key, "in"] => (key, Test::In(words(values))),
            [key, "notin"] => (key, Test::NotIn(words(values))),
            _ => return None,
        }
    } else if let Some((key, value)) = term.split_once("!=") {
        (key, Test::NotIn(words(value)))
    } else if let Some((key, value)) = term.split_once('=') {
        (key, Test::In(words(value.trim_start_matches('='))))
    } else if let Some(key) = term.strip_prefix('!') {
        (key, Test::Absent)
    } else {
        (term, Test::Exists)
    };
    let key = key.trim();
    let plain = !key.is_empty() && !key.contains([' ', '(', ')', '<', '>', '!', '=']);
    plain.then(|| (key.to_owned(), test))
}

/// A list of `items`, as the API would give it.
pub(super) fn list(target: &Target, items: Vec<Value>) -> Value {
    let version = |item: &Value| {
        item["metadata"]["resourceVersion"].as_str().and_then(|text| text.parse::<u64>().ok())
    };
    let newest = items.iter().filter_map(version).max().unwrap_or(0);
    let kind =
        items.iter().find_map(|item| item["kind"].as_str()).map(|kind| format!("{kind}List"));
    json!({
        "kind": kind.unwrap_or_else(|| "List".into()), "apiVersion": target.api_version(),
        "metadata": {"resourceVersion": newest.to_string()}, "items": items,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metaserver::request::query;

    #[test]
    fn selectors_take_what_the_api_takes() {
        let object = json!({"metadata": {"name": "web", "namespace": "shop",
            "labels": {"app": "web", "tier": "front"}}});
        let check = |text: &str| {
            Selection::new(&Target::default(), &query(text)).map(|one| one.takes(&object))
        };
        for (text, expected) in [
            ("", true),
            ("labelSelector=app=web", true),
            ("labelSelector=app==web,tier!=back", true),
            ("labelSelector=app in (api, web),!gone", true),
            ("labelSelector=tier notin (front)", false),
            ("labelSelector=gone", false),
            ("fieldSelector=metadata.name=web", true),
            ("fieldSelector=metadata.namespace=other", false),
        ] {
            assert_eq!(check(text), Ok(expected), "{text}");
        }
        assert!(check("fieldSelector=spec.nodeName=edge1").is_err());
        assert!(check("labelSelector=a b").is_err());
        let target = Target { namespace: "other".into(), ..Target::default() };
        assert!(!Selection::new(&target, &Query::new()).expect("plain").takes(&object));
    }

    #[test]
    fn list_has_the_kind_of_its_items_and_the_newest_version() {
        let target = Target { version: "v1".into(), ..Target::default() };
        let item = |version: &str| json!({"kind": "Pod", "metadata": {"resourceVersion": version}});
        let found = list(&target, vec![item("9"), item("10"), item("x")]);
        assert_eq!((&found["kind"], &found["apiVersion"]), (&json!("PodList"), &json!("v1")));
        assert_eq!(found["metadata"]["resourceVersion"], "10");
        assert_eq!(list(&target, Vec::new())["items"], json!([]));
    }
}
