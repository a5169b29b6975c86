//! [`DeviceRule`]: what a node does by itself when a property of a device is beyond a threshold for a time.
//!
//! A Device names its rules in the annotation [`RULES_ANNOTATION`], and they go to the node with it.

use k8s_openapi::NamespaceResourceScope as Namespaced;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Annotation of a Device: names of DeviceRules of its namespace that its node keeps, as a JSON list.
pub const RULES_ANNOTATION: &str = "fleet.skerry.dev/rules";

/// Actions of one rule, each way.
pub const ACTIONS_MAX: usize = 16;
/// Longest message that a rule publishes, in bytes, and longest value that it sets.
pub const PAYLOAD_LEN_MAX: usize = 16 * 1024;
/// Longest `forSeconds` and `cooldownSeconds`: a week.
pub const SECONDS_MAX: f64 = 7.0 * 86_400.0;
/// Longest name of a device, a property or a workload, in bytes.
pub const NAME_LEN_MAX: usize = 253;

/// Why nobody can keep a rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RuleFault {
    /// None of the three, or more than one.
    #[error("a rule has exactly one of `above`, `below` and `equals`")]
    Condition,
    /// A number out of its range, or no number.
    #[error("`{0}` is out of range")]
    Range(&'static str),
    /// It does nothing, or too much.
    #[error(
        "a rule has 1 to {ACTIONS_MAX} actions, each with exactly one of `set`, `publish`, `restart` and `scale`"
    )]
    Actions,
    /// A text that is too long or missing.
    #[error("`{0}` is empty or too long")]
    Text(&'static str),
    /// Devices speak there; a rule would speak for them.
    #[error("`publish.topic` cannot be `{0}`: no wildcards, and no topics that begin with `$`")]
    Topic(String),
    /// It would set itself off.
    #[error("the rule sets `{0}`, which it watches")]
    Loop(String),
}

/// A rule.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceRule {
    /// Object metadata.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What it is.
    #[serde(default)]
    pub spec: DeviceRuleSpec,
    /// Not used.
    #[serde(default)]
    pub status: Option<Value>,
}

/// When something is done, and what.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeviceRuleSpec {
    /// When it begins to hold, and when no longer.
    pub when: RuleCondition,
    /// Done when it begins to hold, in this order.
    #[serde(default)]
    pub then: Vec<RuleAction>,
    /// Done when it no longer holds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub otherwise: Vec<RuleAction>,
    /// Least time between two beginnings, in seconds; 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cooldown_seconds: Option<f64>,
}

impl DeviceRuleSpec {
    /// Checks what the definition in the cluster cannot.
    ///
    /// # Errors
    ///
    /// [`RuleFault`], the first one.
    pub fn check(&self) -> Result<(), RuleFault> {
        let when = &self.when;
        let kinds = [when.above.is_some(), when.below.is_some(), when.equals.is_some()];
        if kinds.iter().filter(|is| **is).count() != 1 {
            return Err(RuleFault::Condition);
        }
        let finite = |number: Option<f64>| number.is_none_or(f64::is_finite);
        let within =
            |number: Option<f64>, most: f64| number.is_none_or(|n| (0.0..=most).contains(&n));
        for (fits, field) in [
            (finite(when.above), "above"),
            (finite(when.below), "below"),
            (within(when.hysteresis, f64::MAX), "hysteresis"),
            (within(when.for_seconds, SECONDS_MAX), "forSeconds"),
            (within(self.cooldown_seconds, SECONDS_MAX), "cooldownSeconds"),
        ] {
            if !fits {
                return Err(RuleFault::Range(field));
            }
        }
        text(&when.device, "when.device")?;
        text(&when.property, "when.property")?;
        if self.then.is_empty()
            || self.then.len() > ACTIONS_MAX
            || self.otherwise.len() > ACTIONS_MAX
        {
            return Err(RuleFault::Actions);
        }
        self.then.iter().chain(&self.otherwise).try_for_each(|action| action.check(when))
    }
}

impl RuleAction {
    fn check(&self, when: &RuleCondition) -> Result<(), RuleFault> {
        match (&self.set, &self.publish, &self.restart, &self.scale) {
            (Some(set), None, None, None) => {
                text(&set.device, "set.device")?;
                text(&set.property, "set.property")?;
                if set.value.len() > PAYLOAD_LEN_MAX {
                    return Err(RuleFault::Text("set.value"));
                }
                if set.device == when.device && set.property == when.property {
                    return Err(RuleFault::Loop(format!("{} {}", set.device, set.property)));
                }
                Ok(())
            }
            (None, Some(publish), None, None) => {
                if publish.topic.is_empty() || publish.topic.len() > 1024 {
                    return Err(RuleFault::Text("publish.topic"));
                }
                if publish.topic.contains(['+', '#', '\0']) || publish.topic.starts_with('$') {
                    return Err(RuleFault::Topic(publish.topic.clone()));
                }
                if publish.payload.len() > PAYLOAD_LEN_MAX {
                    return Err(RuleFault::Text("publish.payload"));
                }
                Ok(())
            }
            (None, None, Some(restart), None) => text(&restart.workload, "restart.workload"),
            (None, None, None, Some(scale)) => text(&scale.workload, "scale.workload"),
            _ => Err(RuleFault::Actions),
        }
    }
}

fn text(text: &str, field: &'static str) -> Result<(), RuleFault> {
    let fits = !text.is_empty() && text.len() <= NAME_LEN_MAX;
    if fits { Ok(()) } else { Err(RuleFault::Text(field)) }
}

/// Exactly one of `above`, `below` and `equals`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RuleCondition {
    /// Name of the device, in the rule's namespace.
    pub device: String,
    /// The property.
    pub property: String,
    /// Holds while the number is greater.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub above: Option<f64>,
    /// Holds while the number is less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<f64>,
    /// Holds while the value is this text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub equals: Option<String>,
    /// How far a number has to come back behind the threshold; 0 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hysteresis: Option<f64>,
    /// How long it has to hold, in seconds; 0 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_seconds: Option<f64>,
}

/// Exactly one of these.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RuleAction {
    /// Sets what a property of a device on the same node should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<SetAction>,
    /// Publishes on the node's broker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publish: Option<PublishAction>,
    /// Restarts the containers of a workload on the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart: Option<RestartAction>,
    /// Lets at most so many pods of a workload run on the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<ScaleAction>,
}

/// See [`RuleAction::set`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SetAction {
    /// Name of the device, in the rule's namespace.
    pub device: String,
    /// The property.
    pub property: String,
    /// The value; an empty one takes back what a rule set before.
    pub value: String,
}

/// See [`RuleAction::publish`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PublishAction {
    /// The topic.
    pub topic: String,
    /// The message; `{value}` in it becomes the value of the property.
    pub payload: String,
}

/// See [`RuleAction::restart`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RestartAction {
    /// A pod of the rule's namespace, or a workload whose pods have this name before a `-`.
    pub workload: String,
}

/// See [`RuleAction::scale`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ScaleAction {
    /// A pod of the rule's namespace, or a workload whose pods have this name before a `-`.
    pub workload: String,
    /// How many of its pods on this node may run at most; without it as many as the cluster gave the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
}

crate::resource!(DeviceRule, "fleet.skerry.dev", "v1alpha1", "devicerules", Namespaced);

/// The definition of DeviceRule.
pub fn device_rule_crd() -> Value {
    let text = || json!({"type": "string"});
    let name = || json!({"type": "string", "minLength": 1});
    let number = || json!({"type": "number"});
    let positive = || json!({"type": "number", "minimum": 0});
    let object = |required: &[&str], properties: Value| json!({"type": "object", "required": required, "properties": properties});
    let mut action = object(
        &[],
        json!({
            "set": object(&["device", "property", "value"],
                json!({"device": name(), "property": name(), "value": text()})),
            "publish": object(&["topic", "payload"], json!({"topic": name(), "payload": text()})),
            "restart": object(&["workload"], json!({"workload": name()})),
            "scale": object(&["workload"],
                json!({"workload": name(), "replicas": {"type": "integer", "minimum": 0, "maximum": 1000}})),
        }),
    );
    action["minProperties"] = 1.into();
    action["maxProperties"] = 1.into();
    let actions = json!({"type": "array", "maxItems": 16, "items": action});
    let when = object(
        &["device", "property"],
        json!({
            "device": name(), "property": name(), "above": number(), "below": number(), "equals": text(),
            "hysteresis": positive(), "forSeconds": positive(),
        }),
    );
    let spec = object(
        &["when", "then"],
        json!({"when": when, "then": actions, "otherwise": actions, "cooldownSeconds": positive()}),
    );
    let columns = json!([
        {"name": "Device", "type": "string", "jsonPath": ".spec.when.device"},
        {"name": "Property", "type": "string", "jsonPath": ".spec.when.property"},
        {"name": "Above", "type": "number", "jsonPath": ".spec.when.above"},
        {"name": "Below", "type": "number", "jsonPath": ".spec.when.below"},
    ]);
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "devicerules.fleet.skerry.dev"},
        "spec": {
            "group": "fleet.skerry.dev",
            "scope": "Namespaced",
            "names": {"plural": "devicerules", "singular": "devicerule", "kind": "DeviceRule", "listKind": "DeviceRuleList"},
            "versions": [{
                "name": "v1alpha1", "served": true, "storage": true,
                "additionalPrinterColumns": columns,
                "schema": {"openAPIV3Schema": {
                    "type": "object", "required": ["spec"],
                    "properties": {"spec": spec},
                }},
            }],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_read_and_a_typing_error_is_an_error() {
        let text = json!({
            "metadata": {"name": "alarm", "namespace": "site-a"},
            "spec": {
                "when": {"device": "fridge", "property": "temperature", "above": 8, "hysteresis": 0.5, "forSeconds": 30},
                "then": [{"publish": {"topic": "alarm", "payload": "{value}"}}],
            },
        });
        let rule: DeviceRule = serde_json::from_value(text.clone()).expect("a rule");
        assert_eq!((rule.spec.when.above, rule.spec.when.for_seconds), (Some(8.0), Some(30.0)));
        assert!(
            serde_json::to_value(&rule).expect("JSON")["spec"]["then"][0]["publish"].is_object()
        );
        let mut wrong = text;
        wrong["spec"]["when"]["hysterese"] = 1.into();
        assert!(serde_json::from_value::<DeviceRule>(wrong).is_err());
    }
}
