//! The JSON paths that printer columns use: fields, quoted fields, indices, wildcards and one comparison per filter.
//!
//! `.spec.x`, `.metadata.labels['a.b/c']`, `.metadata.annotations.a\.b`, `.items[0]`, `.items[*].name`,
//! `.status.conditions[?(@.type=="Ready")].status`, each also within `{…}`.

use serde_json::Value;

/// Every value at `path` in `object`; none when the path is malformed or leads nowhere.
pub(super) fn find<'a>(path: &str, object: &'a Value) -> Vec<&'a Value> {
    let path = path.trim();
    let path = path.strip_prefix('{').and_then(|path| path.strip_suffix('}')).unwrap_or(path);
    let mut rest = path.strip_prefix('$').unwrap_or(path);
    let mut found = vec![object];
    while !rest.is_empty() && !found.is_empty() {
        let Some((step, after)) = parse_step(rest) else { return Vec::new() };
        found = found.into_iter().flat_map(|value| step.apply(value)).collect();
        rest = after;
    }
    found
}

#[derive(Debug, PartialEq)]
enum Step<'a> {
    Field(String),
    Index(i64),
    Every,
    /// `[?(@.type=="Ready")]`: path, whether equal, value.
    Where(&'a str, bool, &'a str),
}

impl Step<'_> {
    fn apply<'v>(&self, value: &'v Value) -> Vec<&'v Value> {
        match (self, value) {
            (Self::Field(name), Value::Object(map)) => map.get(name).into_iter().collect(),
            (Self::Index(index), Value::Array(list)) => {
                let index = if *index < 0 { *index + list.len() as i64 } else { *index };
                usize::try_from(index).ok().and_then(|index| list.get(index)).into_iter().collect()
            }
            (Self::Every, Value::Array(list)) => list.iter().collect(),
            (Self::Every, Value::Object(map)) => map.values().collect(),
            (Self::Where(path, equal, wanted), Value::Array(list)) => {
                let is_wanted = |item: &&Value| {
                    let found = find(path, item);
                    let same = found.iter().any(|value| {
                        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                        text == *wanted
                    });
                    same == *equal
                };
                list.iter().filter(is_wanted).collect()
            }
            _ => Vec::new(),
        }
    }
}

fn parse_step(text: &str) -> Option<(Step<'_>, &str)> {
    if let Some(rest) = text.strip_prefix('[') {
        return parse_bracket(rest);
    }
    let rest = text.strip_prefix('.').unwrap_or(text);
    if let Some(bracket) = rest.strip_prefix('[') {
        return parse_bracket(bracket);
    }
    let (mut name, mut escaped) = (String::new(), false);
    let mut end = rest.len();
    for (index, c) in rest.char_indices() {
        match c {
            _ if escaped => {
                name.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '.' | '[' => {
                end = index;
                break;
            }
            c => name.push(c),
        }
    }
    match name.as_str() {
        "" => None,
        "*" => Some((Step::Every, &rest[end..])),
        _ => Some((Step::Field(name), &rest[end..])),
    }
}

/// What follows `[`.
fn parse_bracket(text: &str) -> Option<(Step<'_>, &str)> {
    if let Some(filter) = text.strip_prefix("?(") {
        let (filter, rest) = filter.split_once(")]")?;
        let (path, equal, value) = match filter.split_once("==") {
            Some((path, value)) => (path, true, value),
            None => filter.split_once("!=").map(|(path, value)| (path, false, value))?,
        };
        let path = path.trim().strip_prefix('@')?;
        return Some((Step::Where(path, equal, unquoted(value.trim())), rest));
    }
    for quote in ['\'', '"'] {
        if let Some(quoted) = text.strip_prefix(quote) {
            let (name, rest) = quoted.split_once(quote)?;
            return Some((Step::Field(name.replace("\\.", ".")), rest.strip_prefix(']')?));
        }
    }
    let (inside, rest) = text.split_once(']')?;
    match inside {
        "*" => Some((Step::Every, rest)),
        number => Some((Step::Index(number.parse().ok()?), rest)),
    }
}

fn unquoted(text: &str) -> &str {
    let strip = |quote: char| text.strip_prefix(quote).and_then(|text| text.strip_suffix(quote));
    strip('"').or(strip('\'')).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_of_printer_columns_find_their_values() {
        let object = json!({
            "metadata": {"annotations": {"a.b/c": "x"}},
            "spec": {"size": 3, "items": [{"name": "one"}, {"name": "two"}]},
            "status": {"conditions": [
                {"type": "Stalled", "status": "False"}, {"type": "Ready", "status": "True"},
            ]},
        });
        for (path, expected) in [
            (".spec.size", json!([3])),
            ("{.spec.size}", json!([3])),
            (".spec.items[*].name", json!(["one", "two"])),
            (".spec.items[0].name", json!(["one"])),
            (".spec.items[-1].name", json!(["two"])),
            (".spec.items[7].name", json!([])),
            (".metadata.annotations['a.b/c']", json!(["x"])),
            (r".metadata.annotations.a\.b/c", json!(["x"])),
            (r#".status.conditions[?(@.type=="Ready")].status"#, json!(["True"])),
            (".status.conditions[?(@.type == 'Stalled')].status", json!(["False"])),
            (".status.conditions[?(@.type!='Ready')].type", json!(["Stalled"])),
            (".spec.absent.size", json!([])),
            (".spec..size", json!([])),
            (".spec[", json!([])),
            (".status.conditions[?(@.type", json!([])),
        ] {
            assert_eq!(json!(find(path, &object)), expected, "{path}");
        }
    }
}
