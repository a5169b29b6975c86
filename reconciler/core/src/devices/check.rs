//! What is wrong with a Device or a DeviceModel, with the place where it stands and what would be right.

use super::items;
use crate::repository::problem;
use crate::suggest::nearest;
use crate::yaml::{Content, Key, Node, Position};
use skerry_api::fleet::v1alpha1::Problem;
use std::collections::BTreeMap;

const TYPES: [&str; 7] = ["INT", "FLOAT", "DOUBLE", "STRING", "BOOLEAN", "BYTES", "STREAM"];
const ACCESS: [&str; 2] = ["ReadWrite", "ReadOnly"];

/// What devices need to know of their model.
pub(super) struct Model {
    name: String,
    properties: BTreeMap<String, Declared>,
}

struct Declared {
    kind: String,
    writable: bool,
    minimum: Option<f64>,
    maximum: Option<f64>,
}

/// What is wrong in one file.
pub(super) struct Checks<'a> {
    file: &'a str,
    pub(super) faults: Vec<Problem>,
}

impl<'a> Checks<'a> {
    pub(super) fn new(file: &'a str) -> Self {
        Self { file, faults: Vec::new() }
    }

    pub(super) fn fault(&mut self, at: Position, message: String, hint: Option<String>) {
        self.faults.push(problem(self.file, at, &message, hint));
    }

    /// Checks what every object has; returns its name if that can be used.
    pub(super) fn header(&mut self, node: &Node, kind: &str, api_version: &str) -> Option<String> {
        if !matches!(node.content, Content::Map(_)) {
            self.fault(node.at, format!("expected a {kind}, found {}", node.kind()), None);
            return None;
        }
        for (field, wanted) in [("kind", kind), ("apiVersion", api_version)] {
            let Some(found) = node.get(field) else {
                self.fault(node.at, format!("`{field}` is missing, expected `{wanted}`"), None);
                return None;
            };
            if found.as_text() != Some(wanted) {
                let text = found.as_text().unwrap_or_else(|| found.kind());
                let hint = match (field, text) {
                    ("kind", "DeviceModel") => Some("models are in `devices/models/`".to_owned()),
                    ("kind", "DeviceRule") => Some("rules are in `devices/rules/`".to_owned()),
                    ("kind", "Device") => {
                        Some("devices are in the folder of a site or an app".to_owned())
                    }
                    _ => None,
                };
                self.fault(found.at, format!("`{field}` is `{text}`, expected `{wanted}`"), hint);
                return None;
            }
        }
        self.keys(node, "", &["apiVersion", "kind", "metadata", "spec", "status"]);
        let name = node.get("metadata").and_then(|metadata| metadata.get("name"));
        let Some(name) = name else {
            self.fault(node.at, "`metadata.name` is missing".to_owned(), None);
            return None;
        };
        match name.as_text() {
            Some(text) if is_name(text) => Some(text.to_owned()),
            // Of a device the name may come from a variable; the API judges that one.
            Some(text) if kind == "Device" && text.contains("${") => Some(text.to_owned()),
            text => {
                let text = text.unwrap_or_else(|| name.kind());
                let hint =
                    "use a-z, 0-9, `-` and `.`, with a letter or digit at both ends".to_owned();
                self.fault(name.at, format!("`{text}` cannot be a name"), Some(hint));
                None
            }
        }
    }

    /// The name of a device's model, if there is such a model.
    pub(super) fn model_of<'m>(
        &mut self,
        device: &Node,
        known: impl Iterator<Item = &'m str>,
    ) -> Option<String> {
        let reference = device.get("spec").and_then(|spec| spec.get("deviceModelRef"));
        let name = reference.and_then(|reference| reference.get("name"));
        let Some((text, at)) = name.and_then(|name| Some((name.as_text()?, name.at))) else {
            let at = reference.map_or(device.at, |reference| reference.at);
            self.fault(at, "`spec.deviceModelRef.name` is missing".to_owned(), None);
            return None;
        };
        let known: Vec<&str> = known.collect();
        if known.contains(&text) {
            return Some(text.to_owned());
        }
        let hint = match nearest(text, known.iter().copied()) {
            Some(name) => format!("did you mean `{name}`?"),
            None => "models are in `devices/models/`".to_owned(),
        };
        self.fault(at, format!("there is no model `{text}`"), Some(hint));
        None
    }

    /// The node to fill in, if the device names none.
    pub(super) fn node_name(
        &mut self,
        device: &Node,
        site: &str,
        nodes: &[String],
    ) -> Option<String> {
        let named = device.get("spec").and_then(|spec| spec.get("nodeName"));
        match named.filter(|named| named.as_text() != Some("") && named.content != Content::Null) {
            None => match nodes {
                [only] => Some(only.clone()),
                [] => {
                    let hint = format!("add `nodes` to the file of site `{site}`");
                    self.fault(
                        device.at,
                        format!("site `{site}` has no node for the device"),
                        Some(hint),
                    );
                    None
                }
                several => {
                    let hint = format!("add `spec.nodeName`, one of {}", several.join(", "));
                    let message = format!(
                        "site `{site}` has {} nodes, and the device names none",
                        several.len()
                    );
                    self.fault(device.at, message, Some(hint));
                    None
                }
            },
            Some(named) => {
                let text = named.as_text().unwrap_or_default();
                if !nodes.iter().any(|node| node == text) {
                    let near = nearest(text, nodes.iter().map(String::as_str));
                    let hint = near.map_or_else(
                        || format!("nodes of this site: {}", nodes.join(", ")),
                        |name| format!("did you mean `{name}`?"),
                    );
                    self.fault(
                        named.at,
                        format!("node `{text}` is not in site `{site}`"),
                        Some(hint),
                    );
                }
                None
            }
        }
    }

    /// Checks a model, and returns what devices need of it.
    pub(super) fn model(&mut self, node: &Node) -> Model {
        let name = node.get("metadata").and_then(|m| m.get("name")).and_then(Node::as_text);
        let mut model =
            Model { name: name.unwrap_or_default().to_owned(), properties: BTreeMap::new() };
        let Some(spec) = self.map(node, "spec") else { return model };
        self.keys(spec, "spec.", &["protocol", "protocolConfigData", "properties"]);
        self.list(spec, "properties");
        for (index, property) in items(spec.get("properties")).iter().enumerate() {
            let path = format!("spec.properties[{index}].");
            let known = [
                "name",
                "description",
                "type",
                "accessMode",
                "minimum",
                "maximum",
                "unit",
                "visitors",
            ];
            self.keys(property, &path, &known);
            if let Some(visitors) = property.get("visitors") {
                self.keys(visitors, &format!("{path}visitors."), &["protocolName", "configData"]);
            }
            let Some((name, at)) = self.property_name(property) else { continue };
            let kind = self.word(property, "type", &TYPES);
            let access = self.word(property, "accessMode", &ACCESS);
            let minimum = self.number(property, "minimum");
            let maximum = self.number(property, "maximum");
            if let (Some(minimum), Some(maximum)) = (minimum, maximum)
                && minimum > maximum
            {
                let message = format!(
                    "property `{name}`: the minimum {minimum} is more than the maximum {maximum}"
                );
                self.fault(at, message, None);
            }
            let declared = Declared {
                kind: kind.unwrap_or_else(|| "STRING".to_owned()),
                writable: access.as_deref() == Some("ReadWrite"),
                minimum,
                maximum,
            };
            if model.properties.insert(name.clone(), declared).is_some() {
                self.fault(at, format!("property `{name}` is there twice"), None);
            }
        }
        model
    }

    /// Checks a device against its model.
    pub(super) fn device(&mut self, node: &Node, model: &Model) {
        let Some(spec) = self.map(node, "spec") else { return };
        let known =
            ["deviceModelRef", "nodeName", "properties", "protocol", "methods", "stateReport"];
        self.keys(spec, "spec.", &known);
        match spec.get("protocol") {
            Some(protocol) => {
                self.keys(protocol, "spec.protocol.", &["protocolName", "configData"]);
                let name = protocol.get("protocolName").and_then(Node::as_text);
                if name.unwrap_or_default().is_empty() {
                    let hint = "it is the word by which a mapper takes its devices".to_owned();
                    self.fault(
                        protocol.at,
                        "`spec.protocol.protocolName` is missing".to_owned(),
                        Some(hint),
                    );
                }
            }
            None => {
                let hint = "without `protocolName` no mapper takes the device".to_owned();
                self.fault(spec.at, "`spec.protocol` is missing".to_owned(), Some(hint));
            }
        }
        if let Some(report) = spec.get("stateReport") {
            self.keys(report, "spec.stateReport.", &["reportToCloud", "reportCycle"]);
            self.cycle(report, "reportCycle");
        }
        self.list(spec, "properties");
        let mut seen = Vec::new();
        for (index, property) in items(spec.get("properties")).iter().enumerate() {
            self.device_property(property, &format!("spec.properties[{index}]."), model, &mut seen);
        }
        for method in items(spec.get("methods")) {
            for name in items(method.get("propertyNames")) {
                let text = name.as_text().unwrap_or_default();
                if !seen.iter().any(|seen| seen == text) {
                    let hint = nearest(text, seen.iter().map(String::as_str));
                    let hint = hint.map(|name| format!("did you mean `{name}`?"));
                    self.fault(name.at, format!("the device has no property `{text}`"), hint);
                }
            }
        }
    }

    fn device_property(
        &mut self,
        property: &Node,
        path: &str,
        model: &Model,
        seen: &mut Vec<String>,
    ) {
        let known = [
            "name",
            "desired",
            "visitors",
            "reportCycle",
            "collectCycle",
            "reportToCloud",
            "pushMethod",
        ];
        self.keys(property, path, &known);
        for (field, known) in [
            ("visitors", &["protocolName", "configData"][..]),
            ("desired", &["value", "metadata"]),
            ("pushMethod", &["http", "mqtt", "otel", "dbMethod", "anomalyDetection"]),
        ] {
            if let Some(inner) = property.get(field) {
                self.keys(inner, &format!("{path}{field}."), known);
            }
        }
        self.cycle(property, "reportCycle");
        self.cycle(property, "collectCycle");
        let Some((name, at)) = self.property_name(property) else { return };
        if seen.contains(&name) {
            self.fault(at, format!("property `{name}` is there twice"), None);
        }
        seen.push(name.clone());
        let Some(declared) = model.properties.get(&name) else {
            let hint = match nearest(&name, model.properties.keys().map(String::as_str)) {
                Some(name) => format!("did you mean `{name}`?"),
                None => format!(
                    "it has {}",
                    model.properties.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
                ),
            };
            self.fault(at, format!("model `{}` has no property `{name}`", model.name), Some(hint));
            return;
        };
        let Some(desired) = property.get("desired") else { return };
        let Some(value) = desired.get("value") else {
            self.fault(desired.at, format!("property `{name}`: `desired.value` is missing"), None);
            return;
        };
        let text = value.as_text().unwrap_or_default();
        if let Some((message, hint)) = declared.refuses(text) {
            self.fault(value.at, format!("property `{name}`: {message}"), hint);
        }
    }

    fn property_name(&mut self, property: &Node) -> Option<(String, Position)> {
        let name = property.get("name");
        match name.and_then(|name| Some((name.as_text()?, name.at))) {
            Some((text, at)) if !text.is_empty() => Some((text.to_owned(), at)),
            _ => {
                self.fault(
                    name.map_or(property.at, |name| name.at),
                    "the property has no `name`".to_owned(),
                    None,
                );
                None
            }
        }
    }

    pub(super) fn map<'n>(&mut self, node: &'n Node, field: &str) -> Option<&'n Node> {
        match node.get(field) {
            Some(found) if matches!(found.content, Content::Map(_)) => Some(found),
            Some(found) => {
                self.fault(
                    found.at,
                    format!("`{field}`: expected a map, found {}", found.kind()),
                    None,
                );
                None
            }
            None => {
                self.fault(node.at, format!("`{field}` is missing"), None);
                None
            }
        }
    }

    pub(super) fn list(&mut self, node: &Node, field: &str) {
        if let Some(found) = node.get(field)
            && !matches!(found.content, Content::List(_) | Content::Null)
        {
            self.fault(
                found.at,
                format!("`spec.{field}`: expected a list, found {}", found.kind()),
                None,
            );
        }
    }

    pub(super) fn keys(&mut self, node: &Node, path: &str, known: &[&str]) {
        let Content::Map(entries) = &node.content else { return };
        for (Key { text, at }, _) in entries {
            if !known.contains(&text.as_str()) {
                let hint = nearest(text, known.iter().copied())
                    .map(|key| format!("did you mean `{key}`?"));
                self.fault(*at, format!("unknown field `{path}{text}`"), hint);
            }
        }
    }

    fn word(&mut self, node: &Node, field: &str, words: &[&str]) -> Option<String> {
        let found = node.get(field)?;
        let text = found.as_text().unwrap_or_else(|| found.kind());
        if words.contains(&text) {
            return Some(text.to_owned());
        }
        let hint = nearest(text, words.iter().copied()).map_or_else(
            || format!("one of {}", words.join(", ")),
            |word| format!("did you mean `{word}`?"),
        );
        self.fault(found.at, format!("`{field}` cannot be `{text}`"), Some(hint));
        None
    }

    fn number(&mut self, node: &Node, field: &str) -> Option<f64> {
        let found = node.get(field)?;
        let text = found.as_text().unwrap_or_default().trim();
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Some(number),
            _ if text.is_empty() => None,
            _ => {
                self.fault(found.at, format!("`{field}`: `{text}` is no number"), None);
                None
            }
        }
    }

    fn cycle(&mut self, node: &Node, field: &str) {
        let Some(found) = node.get(field) else { return };
        let good = match &found.content {
            Content::Number(number) => number.as_u64().is_some_and(|ms| i64::try_from(ms).is_ok()),
            Content::Null => true,
            _ => false,
        };
        if !good {
            let hint = "a whole number of milliseconds, 1000 for a second".to_owned();
            self.fault(found.at, format!("`{field}` cannot be {}", found.to_json()), Some(hint));
        }
    }
}

impl Model {
    /// Why a text cannot be desired of a property, and what could.
    pub(super) fn refuses(&self, property: &str, text: &str) -> Option<(String, Option<String>)> {
        self.properties.get(property)?.refuses(text)
    }
}

impl Declared {
    /// Why a text cannot be desired, and what could.
    fn refuses(&self, text: &str) -> Option<(String, Option<String>)> {
        // Nothing is desired.
        if text.is_empty() {
            return None;
        }
        if !self.writable {
            let hint = "remove `desired`, or make it ReadWrite in the model".to_owned();
            return Some((
                "it cannot be written, so nothing can be desired".to_owned(),
                Some(hint),
            ));
        }
        let number = match self.kind.as_str() {
            "INT" => match text.parse::<i64>() {
                Ok(number) => number as f64,
                Err(_) => {
                    return Some((
                        format!("`{text}` is no INT"),
                        Some("a whole number".to_owned()),
                    ));
                }
            },
            "FLOAT" | "DOUBLE" => match text.parse::<f64>() {
                Ok(number) if number.is_finite() => number,
                _ => {
                    return Some((
                        format!("`{text}` is no {}", self.kind),
                        Some("a number".to_owned()),
                    ));
                }
            },
            "BOOLEAN" => {
                let good = matches!(text, "true" | "false");
                let hint = || Some("`\"true\"` or `\"false\"`".to_owned());
                return (!good).then(|| (format!("`{text}` is no BOOLEAN"), hint()));
            }
            "STREAM" => return Some(("nothing can be desired of a STREAM".to_owned(), None)),
            _ => return None,
        };
        let (word, bound) = match (self.minimum, self.maximum) {
            (Some(minimum), _) if number < minimum => ("less than the minimum", minimum),
            (_, Some(maximum)) if number > maximum => ("more than the maximum", maximum),
            _ => return None,
        };
        Some((format!("`{text}` is {word} {bound}"), None))
    }
}

/// Puts `spec.nodeName` into a device.
pub(super) fn set_node_name(device: &mut Node, name: String) {
    let Content::Map(entries) = &mut device.content else { return };
    let Some((_, spec)) = entries.iter_mut().find(|(key, _)| key.text == "spec") else { return };
    let at = spec.at;
    let Content::Map(entries) = &mut spec.content else { return };
    entries.retain(|(key, _)| key.text != "nodeName");
    let key = Key { text: "nodeName".to_owned(), at };
    entries.push((key, Node { content: Content::Text(name), at }));
}

/// Whether the scalar at `path` of a Device is text to Kubernetes.
pub(super) fn is_text_of_device(path: &[String]) -> bool {
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    matches!(
        path[..],
        ["spec", "nodeName"]
            | ["spec", "deviceModelRef", "name"]
            | ["spec", "protocol", "protocolName"]
            | ["spec", "properties", _, "name"]
            | ["spec", "properties", _, "visitors", "protocolName"]
            | ["spec", "properties", _, "desired", "value"]
            | ["spec", "properties", _, "desired", "metadata", _]
            | ["spec", "methods", _, "name" | "description"]
            | ["spec", "methods", _, "propertyNames", _]
    )
}

/// Whether the scalar at `path` of a DeviceModel is text to Kubernetes.
pub(super) fn is_text_of_model(path: &[String]) -> bool {
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    matches!(
        path[..],
        ["spec", "protocol"]
            | [
                "spec",
                "properties",
                _,
                "name" | "description" | "type" | "accessMode" | "minimum" | "maximum" | "unit"
            ]
            | ["spec", "properties", _, "visitors", "protocolName"]
    )
}

fn is_name(text: &str) -> bool {
    let end = |byte: Option<&u8>| {
        byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    let inner =
        |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(byte);
    let bytes = text.as_bytes();
    bytes.len() <= 253 && end(bytes.first()) && end(bytes.last()) && bytes.iter().all(inner)
}
