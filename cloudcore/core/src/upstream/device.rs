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

/// Whether a report is about the Device with this uid, as far as it says of which one it is: `<uid>/<run>`.
pub fn is_about(epoch: &str, uid: &str) -> bool {
    epoch.split('/').next().is_none_or(|of| of.is_empty() || of == uid)
}

/// The twins after a report, to replace the list of the DeviceStatus.
///
/// `known` is that list, `properties` is the device's `spec.properties`, `twins` what was reported. With an `epoch`
/// (`<uid>/<run>`) the number of each value goes into its metadata, and a value with a lower number of the same run is
/// late and left out.
pub fn merged_twins(
    properties: &Value,
    known: &Value,
    reported: &Map<String, Value>,
    epoch: &str,
) -> Value {
    let run = epoch.split('/').nth(1).unwrap_or_default();
    let mut twins = known.as_array().cloned().unwrap_or_default();
    let is_property = |name: &str| {
        properties.as_array().into_iter().flatten().any(|property| property["name"] == name)
    };
    for (name, reported) in reported {
        if !is_property(name) {
            continue;
        }
        let index =
            twins.iter().position(|twin| twin["propertyName"] == *name).unwrap_or_else(|| {
                twins.push(json!({ "propertyName": name }));
                twins.len() - 1
            });
        for (from, to) in [("actual", "reported"), ("expected", "observedDesired")] {
            let Some(mut value) = twin_value(&reported[from], &reported["metadata"]) else {
                continue;
            };
            let edge = reported[format!("{from}_version")]["edge"].as_u64();
            if let Some(edge) = edge.filter(|_| !run.is_empty()) {
                let held = twins[index][to]["metadata"]["version"].as_str();
                let held = held.and_then(|held| held.strip_prefix(run)?.strip_prefix('.'));
                if held.and_then(|held| held.parse::<u64>().ok()).is_some_and(|held| held > edge) {
                    continue;
                }
                value["metadata"]["version"] = format!("{run}.{edge}").into();
            }
            twins[index][to] = value;
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
        let merged = |known: &Value, report: &Value| {
            merged_twins(&properties, known, report["twin"].as_object().expect("a map"), "")
        };
        let first = merged(&Value::Null, &report("5.1", 1));
        let second = merged(&first, &report("5.2", 2));
        assert_eq!(
            second,
            json!([{"propertyName": "temperature",
                "reported": {"value": "5.2", "metadata": {"timestamp": "2", "type": "float"}}}])
        );
        let desired = json!({"twin": {"temperature": {"expected": {"value": "4"}}, "limit": {}}});
        let third = merged(&second, &desired);
        assert_eq!(third[0]["observedDesired"], json!({"value": "4", "metadata": {}}));
        assert_eq!(third[0]["reported"]["value"], "5.2");
        assert_eq!(third[1], json!({"propertyName": "limit"}));
    }

    #[test]
    fn a_late_value_of_the_same_run_is_left_out_and_another_run_begins_anew() {
        let properties = json!([{"name": "t"}]);
        let merged = |known: &Value, edge: u64, epoch: &str| {
            let twin = json!({"t": {"actual": {"value": edge.to_string()}, "actual_version": {"edge": edge}}});
            merged_twins(&properties, known, twin.as_object().expect("a map"), epoch)
        };
        let first = merged(&Value::Null, 5, "u/aa");
        assert_eq!(first[0]["reported"]["metadata"]["version"], "aa.5");
        assert_eq!(merged(&first, 4, "u/aa"), first);
        assert_eq!(merged(&first, 6, "u/aa")[0]["reported"]["value"], "6");
        assert_eq!(merged(&first, 1, "u/bb")[0]["reported"]["value"], "1");
        assert_eq!(
            merged(&first, 1, "")[0]["reported"]["value"],
            "1",
            "KubeEdge's edge says no run"
        );
        assert!(is_about("u/aa", "u") && is_about("", "u") && !is_about("v/aa", "u"));
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
