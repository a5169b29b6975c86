//! Desired values that people set in the cluster, beside those of the repository.
//!
//! A property for which the repository says what is desired is the repository's. Of all others somebody may say it
//! with `skerry device set`, and that stays. An API server cannot keep the two apart: to it the list of a Device's
//! properties is one value with one owner. So the reconciler carries over what is live before it applies.

use crate::object::ObjectId;
use serde_json::{Value, json};

/// Annotation of a Device: names of properties whose desired value is in the repository, as a JSON list.
pub const DESIRED_ANNOTATION: &str = "fleet.skerry.dev/desired-by-repository";

/// Whether live desired values have to be kept when an object is applied.
pub fn has_wishes(id: &ObjectId) -> bool {
    id.group == "devices.kubeedge.io" && id.kind == "Device"
}

/// Puts into `rendered` the desired values of `live` for which the repository says nothing.
pub fn keep_wishes(rendered: &mut Value, live: &Value) {
    let Some(live) = live.pointer("/spec/properties").and_then(Value::as_array) else { return };
    let properties = rendered.pointer_mut("/spec/properties").and_then(Value::as_array_mut);
    for property in properties.into_iter().flatten() {
        if property.get("desired").is_some() || !property.is_object() {
            continue;
        }
        let same = live.iter().find(|live| live["name"] == property["name"]);
        if let Some(desired) = same.and_then(|live| live.get("desired"))
            && desired["value"].is_string()
        {
            property["desired"] = desired.clone();
        }
    }
}

/// Notes on a rendered Device what the repository desires.
pub(super) fn note(device: &mut Value) {
    let properties = device.pointer("/spec/properties").and_then(Value::as_array);
    let names: Vec<&Value> = properties
        .into_iter()
        .flatten()
        .filter(|property| property.get("desired").is_some())
        .map(|property| &property["name"])
        .collect();
    if !names.is_empty() {
        let text = json!(names).to_string();
        device["metadata"]["annotations"][DESIRED_ANNOTATION] = Value::String(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn live_wishes_stay_where_the_repository_has_none() {
        let mut rendered = json!({"spec": {"properties": [
            {"name": "a", "desired": {"value": "1"}},
            {"name": "b"},
            {"name": "c", "collectCycle": 5},
            "odd",
        ]}});
        let live = json!({"spec": {"properties": [
            {"name": "c", "desired": {"value": "3", "metadata": {"type": "int"}}, "collectCycle": 9},
            {"name": "a", "desired": {"value": "2"}},
            {"name": "b", "desired": {"value": null}},
            {"name": "gone", "desired": {"value": "4"}},
        ]}});
        keep_wishes(&mut rendered, &live);
        assert_eq!(
            rendered["spec"]["properties"],
            json!([
                {"name": "a", "desired": {"value": "1"}},
                {"name": "b"},
                {"name": "c", "collectCycle": 5, "desired": {"value": "3", "metadata": {"type": "int"}}},
                "odd",
            ])
        );
        keep_wishes(&mut rendered, &json!({}));
        keep_wishes(&mut json!(null), &live);
    }

    #[test]
    fn what_the_repository_desires_is_noted() {
        let mut device = json!({"metadata": {}, "spec": {"properties": [
            {"name": "a,b", "desired": {"value": ""}}, {"name": "c"},
        ]}});
        note(&mut device);
        assert_eq!(device["metadata"]["annotations"][DESIRED_ANNOTATION], r#"["a,b"]"#);
        let mut none = json!({"metadata": {}, "spec": {}});
        note(&mut none);
        assert_eq!(none, json!({"metadata": {}, "spec": {}}));
    }
}
