//! What a node reports about its devices, as patches of the DeviceStatus.
//!
//! A twin that is no property of the device is left out. KubeEdge loses every report of a property after the first
//! (it changes a copy of a twin that it has just added; the golden session shows it); here the last one stands.

use serde_json::{Map, Value, json};

/// Path of a device's message: what it reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// `device/<ns>/<name>/twin/edge_updated`
    Twins,
    /// `device/<ns>/<name>/state/update`
    State,
}

/// Reads `device/<ns>/<name>/…`; `None` for other paths.
pub fn parse(resource: &str) -> Option<(&str, &str, Report)> {
    let mut segments = resource.split('/');
    if segments.next() != Some("device") {
        return None;
    }
    let (namespace, name) = (segments.next()?, segments.next()?);
    let report = match (segments.next()?, segments.next()?, segments.next()) {
        ("twin", "edge_updated", None) => Report::Twins,
        ("state", "update", None) => Report::State,
        _ => return None,
    };
    (!namespace.is_empty() && !name.is_empty()).then_some((namespace, name, report))
}

/// The status after a report of state; `None` when it says nothing.
pub fn state_status(content: &Value) -> Option<Value> {
    // Go compares names without case, and its type has no name for this field.
    let device = content.get("device").or_else(|| content.get("Device"))?;
    let fields = ["state", "lastOnlineTime"]
        .into_iter()
        .filter_map(|field| Some((field.to_owned(), device[field].as_str()?.into())));
    let status = Map::from_iter(fields);
    (!status.is_empty()).then_some(Value::Object(status))
}

/// The twins after a report, to replace the list of the DeviceStatus.
///
/// `known` is that list, `properties` is the device's `spec.properties`.
pub fn merged_twins(properties: &Value, known: &Value, content: &Value) -> Value {
    let mut twins = known.as_array().cloned().unwrap_or_default();
    let is_property = |name: &str| {
        properties.as_array().into_iter().flatten().any(|property| property["name"] == name)
    };
    for (name, reported) in content["twin"].as_object().into_iter().flatten() {
        if !is_property(name) {
            continue;
        }
        let index =
            twins.iter().position(|twin| twin["propertyName"] == *name).unwrap_or_else(|| {
                twins.push(json!({ "propertyName": name }));
                twins.len() - 1
            });
        for (from, to) in [("actual", "reported"), ("expected", "observedDesired")] {
            if let Some(value) = twin_value(&reported[from], &reported["metadata"]) {
                twins[index][to] = value;
            }
        }
    }
    twins.into()
}

/// Value, time and type of one side of a twin; metadata is text throughout.
fn twin_value(side: &Value, metadata: &Value) -> Option<Value> {
    let value = side["value"].as_str()?;
    let mut about = Map::new();
    if let Some(timestamp) = side["metadata"]["timestamp"].as_i64() {
        about.insert("timestamp".into(), timestamp.to_string().into());
    }
    if metadata.is_object() {
        about.insert("type".into(), metadata["type"].as_str().unwrap_or_default().into());
    }
    Some(json!({"value": value, "metadata": about}))
}

/// The DeviceStatus of a device that has none yet; it goes away with the device.
pub fn new_status(device: &Value, status: Value) -> Value {
    let metadata = &device["metadata"];
    json!({"apiVersion": "devices.kubeedge.io/v1beta1", "kind": "DeviceStatus",
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"],
            "ownerReferences": [{"apiVersion": "devices.kubeedge.io/v1beta1", "kind": "Device",
                "name": metadata["name"], "uid": metadata["uid"], "controller": true,
                "blockOwnerDeletion": true}]},
        "spec": {}, "status": status})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_reports_are_read() {
        let twins = parse("device/default/fridge-1/twin/edge_updated");
        assert_eq!(twins, Some(("default", "fridge-1", Report::Twins)));
        assert_eq!(parse("device/a/b/state/update"), Some(("a", "b", Report::State)));
        for wrong in [
            "device/a/b/twin/cloud_updated",
            "device/a/b",
            "device///state/update",
            "default/device/b",
            "device/a/b/state/update/x",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_last_report_of_a_property_stands() {
        let properties = json!([{"name": "temperature"}, {"name": "limit"}]);
        let report = |value: &str, time: i64| {
            json!({"twin": {"temperature": {"actual": {"value": value, "metadata": {"timestamp": time}},
                "metadata": {"type": "float"}}, "unknown": {"actual": {"value": "1"}}}})
        };
        let first = merged_twins(&properties, &Value::Null, &report("5.1", 1));
        let second = merged_twins(&properties, &first, &report("5.2", 2));
        assert_eq!(
            second,
            json!([{"propertyName": "temperature",
                "reported": {"value": "5.2", "metadata": {"timestamp": "2", "type": "float"}}}])
        );
        let desired = json!({"twin": {"temperature": {"expected": {"value": "4"}}, "limit": {}}});
        let third = merged_twins(&properties, &second, &desired);
        assert_eq!(third[0]["observedDesired"], json!({"value": "4", "metadata": {}}));
        assert_eq!(third[0]["reported"]["value"], "5.2");
        assert_eq!(third[1], json!({"propertyName": "limit"}));
    }

    #[test]
    fn state_is_read_with_either_name() {
        let expected = json!({"state": "online", "lastOnlineTime": "t"});
        let content = json!({"device": {"state": "online", "lastOnlineTime": "t", "twin": {}}});
        assert_eq!(state_status(&content), Some(expected));
        assert_eq!(state_status(&json!({"Device": {"state": "s"}})), Some(json!({"state": "s"})));
        assert_eq!(state_status(&json!({"device": {}})), None);
        assert_eq!(state_status(&json!("x")), None);
    }
}
