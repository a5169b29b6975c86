//! What is wrong with a DeviceRule of `devices/rules/`, or with what a Device says of its rules.
//!
//! A rule is written once and copied into the namespace of every site whose devices name it; there it is checked against
//! the devices of that site. What a node would refuse is refused here, with its line.

use super::check::{Checks, Model};
use super::items;
use crate::suggest::nearest;
use crate::yaml::Node;
pub(super) use skerry_api::fleet::rules::RULES_ANNOTATION;
use skerry_api::fleet::rules::{DeviceRuleSpec, RuleFault};
use std::collections::BTreeMap;

pub(super) const API_VERSION: &str = "fleet.skerry.dev/v1alpha1";

/// What rules need to know of a device.
pub(super) struct Seen {
    model: Model,
    properties: Vec<String>,
    node: Option<String>,
    /// The rules that it names.
    pub(super) rules: Vec<String>,
}

impl Seen {
    pub(super) fn new(device: &Node, model: Model, rules: Vec<String>) -> Self {
        let spec = device.get("spec");
        let properties = items(spec.and_then(|spec| spec.get("properties"))).iter();
        let name = |property: &Node| Some(property.get("name")?.as_text()?.to_owned());
        let node = spec.and_then(|spec| spec.get("nodeName")).and_then(Node::as_text);
        Self {
            model,
            properties: properties.filter_map(name).collect(),
            node: node.map(str::to_owned),
            rules,
        }
    }
}

/// `metadata.name`.
pub(super) fn name_of(node: &Node) -> Option<String> {
    Some(node.get("metadata")?.get("name")?.as_text()?.to_owned())
}

/// Whether a device, as it is written, may name a rule.
pub(super) fn may_name(device: &Node, rule: &str) -> bool {
    let text = annotation(device).and_then(Node::as_text).unwrap_or_default();
    text.contains(&format!("\"{rule}\"")) || text.contains("${")
}

fn annotation(device: &Node) -> Option<&Node> {
    device.get("metadata")?.get("annotations")?.get(RULES_ANNOTATION)
}

impl Checks<'_> {
    /// The rules that a device names.
    pub(super) fn rules_of<'m>(
        &mut self,
        device: &Node,
        known: impl Iterator<Item = &'m str>,
    ) -> Vec<String> {
        let Some(found) = annotation(device) else { return Vec::new() };
        let text = found.as_text().unwrap_or_default();
        let Ok(names) = serde_json::from_str::<Vec<String>>(text) else {
            let hint = format!("a list in JSON: `{RULES_ANNOTATION}: '[\"too-warm\"]'`");
            let message = format!("`{RULES_ANNOTATION}` is no list of names");
            self.fault(found.at, message, Some(hint));
            return Vec::new();
        };
        let known: Vec<&str> = known.collect();
        for name in &names {
            if !known.contains(&name.as_str()) {
                let hint = match nearest(name, known.iter().copied()) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => "rules are in `devices/rules/`".to_owned(),
                };
                self.fault(found.at, format!("there is no rule `{name}`"), Some(hint));
            }
        }
        names
    }

    /// Checks a rule against the devices of a site.
    pub(super) fn rule(&mut self, node: &Node, name: &str, devices: &BTreeMap<String, Seen>) {
        let before = self.faults.len();
        let Some(spec) = self.map(node, "spec") else { return };
        self.keys(spec, "spec.", &["when", "then", "otherwise", "cooldownSeconds"]);
        let Some(when) = self.map(spec, "when") else { return };
        let known = ["device", "property", "above", "below", "equals", "hysteresis", "forSeconds"];
        self.keys(when, "spec.when.", &known);
        for list in ["then", "otherwise"] {
            self.list(spec, list);
            for (index, action) in items(spec.get(list)).iter().enumerate() {
                let path = format!("spec.{list}[{index}].");
                self.keys(action, &path, &["set", "publish", "restart", "scale"]);
                for (field, known) in [
                    ("set", &["device", "property", "value"][..]),
                    ("publish", &["topic", "payload"]),
                    ("restart", &["workload"]),
                    ("scale", &["workload", "replicas"]),
                ] {
                    if let Some(inner) = action.get(field) {
                        self.keys(inner, &format!("{path}{field}."), known);
                    }
                }
            }
        }
        if self.faults.len() > before {
            return;
        }
        let parsed: DeviceRuleSpec = match serde_json::from_value(spec.to_json()) {
            Ok(parsed) => parsed,
            Err(error) => {
                return self.fault(spec.at, format!("the rule cannot be read: {error}"), None);
            }
        };
        if let Err(fault) = parsed.check() {
            let at = match &fault {
                RuleFault::Condition => when.at,
                RuleFault::Range(field) => {
                    when.get(field).or_else(|| spec.get(field)).unwrap_or(spec).at
                }
                _ => spec.get("then").unwrap_or(spec).at,
            };
            return self.fault(at, fault.to_string(), None);
        }
        let watched = self.device_of_rule(when, devices);
        if let Some(seen) = watched
            && !seen.rules.iter().any(|rule| rule == name)
        {
            let message = format!(
                "rule `{name}` watches `{}`, which does not name it, so it may be on another node",
                parsed.when.device
            );
            let hint = format!("add it to the annotation `{RULES_ANNOTATION}` of that device");
            self.fault(when.at, message, Some(hint));
        }
        let actions = ["then", "otherwise"].map(|list| items(spec.get(list)));
        for set in actions.into_iter().flatten().filter_map(|action| action.get("set")) {
            let Some(seen) = self.device_of_rule(set, devices) else { continue };
            if watched.is_some_and(|watched| watched.node != seen.node) {
                let message = "the device that is set is on another node".to_owned();
                let hint = "a rule reaches the devices of its own node only".to_owned();
                self.fault(set.at, message, Some(hint));
            }
            let text = |field| set.get(field).and_then(Node::as_text).unwrap_or_default();
            if let Some((message, hint)) = seen.model.refuses(text("property"), text("value")) {
                let at = set.get("value").unwrap_or(set).at;
                self.fault(at, format!("property `{}`: {message}", text("property")), hint);
            }
        }
    }

    /// The device that `device` and `property` of a condition or action name, if it has that property.
    fn device_of_rule<'d>(
        &mut self,
        node: &Node,
        devices: &'d BTreeMap<String, Seen>,
    ) -> Option<&'d Seen> {
        let (device, property) = (node.get("device")?, node.get("property")?);
        let did_you_mean = |near: Option<&str>| near.map(|near| format!("did you mean `{near}`?"));
        let name = device.as_text()?;
        let Some(seen) = devices.get(name) else {
            let hint = did_you_mean(nearest(name, devices.keys().map(String::as_str)));
            self.fault(device.at, format!("this site has no device `{name}`"), hint);
            return None;
        };
        let text = property.as_text()?;
        if seen.properties.iter().any(|known| known == text) {
            return Some(seen);
        }
        let hint = did_you_mean(nearest(text, seen.properties.iter().map(String::as_str)));
        self.fault(property.at, format!("device `{name}` has no property `{text}`"), hint);
        None
    }
}

/// Whether the scalar at `path` of a DeviceRule is text to Kubernetes.
pub(super) fn is_text_of_rule(path: &[String]) -> bool {
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    matches!(
        path[..],
        ["spec", "when", "device" | "property" | "equals"]
            | ["spec", "then" | "otherwise", _, "set", "device" | "property" | "value"]
            | ["spec", "then" | "otherwise", _, "publish", "topic" | "payload"]
            | ["spec", "then" | "otherwise", _, "restart" | "scale", "workload"]
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml::Content;

    #[test]
    fn only_a_device_that_may_name_a_rule_does() {
        let device = |text: &str| {
            let text = format!("metadata: {{annotations: {{{RULES_ANNOTATION}: '{text}'}}}}");
            crate::yaml::parse(&text).expect("YAML").remove(0)
        };
        assert!(may_name(&device(r#"["a", "b"]"#), "b"));
        assert!(may_name(&device("${site.vars.rules}"), "b"));
        assert!(!may_name(&device(r#"["ab"]"#), "b"));
        assert!(!may_name(&Node::new(Content::Null), "b"));
    }
}
