//! What a mapper is told of a device: the Device with what its DeviceModel gives for all devices of a kind.
//!
//! The device wins key by key over the model's visitors and protocol settings; only the protocol of visitors comes from
//! the model when it has any. Mappers of KubeEdge's framework crash when a property has no visitors, no desired value,
//! or is not in the model, so all of these are filled in.
//!
//! Caller: [`super::mapper`].
//!
//! Source: kubeedge/kubeedge, edge/pkg/devicetwin/dmicache/dmicache.go, dtcommon/util.go.

use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// The device as its mapper gets it: `metadata.name` and `.namespace`, and `spec`, and what `status` says of reports.
/// Fields are those of the custom resource, `desired`, `visitors` and `configData` always there.
pub fn device(device: &Value, model: &Value) -> Value {
    let spec = &device["spec"];
    let mut protocol = Map::new();
    protocol.insert("protocolName".into(), text(&spec["protocol"]["protocolName"]).into());
    let settings = overlay(&model["spec"]["protocolConfigData"], &spec["protocol"]["configData"]);
    protocol.insert("configData".into(), settings);
    let properties: Vec<Value> = list(&spec["properties"])
        .filter(|property| property.is_object())
        .map(|own| {
            let name = text(&own["name"]);
            let shared = list(&model["spec"]["properties"])
                .find(|property| property["name"] == name)
                .map_or(&Value::Null, |property| &property["visitors"]);
            let mut property = own.clone();
            property["visitors"] = visitors(shared, &own["visitors"]);
            let desired = &own["desired"];
            property["desired"] = json!({"value": text(&desired["value"]),
                "metadata": if desired["metadata"].is_object() { desired["metadata"].clone() } else { json!({}) }});
            property
        })
        .collect();
    let state =
        if spec["stateReport"].is_object() { &spec["stateReport"] } else { &device["status"] };
    json!({
        "metadata": {"name": text(&device["metadata"]["name"]), "namespace": text(&device["metadata"]["namespace"])},
        "spec": {
            "deviceModelRef": {"name": text(&spec["deviceModelRef"]["name"])},
            "protocol": protocol,
            "properties": properties,
            "methods": if spec["methods"].is_array() { spec["methods"].clone() } else { json!([]) },
        },
        "status": {
            "reportToCloud": state["reportToCloud"].as_bool().unwrap_or(false),
            "reportCycle": state["reportCycle"].as_i64().unwrap_or(0),
        },
    })
}

/// The model as a mapper gets it. `used` are the names of properties that its devices have.
pub fn model<'a>(model: &Value, used: impl Iterator<Item = &'a str>) -> Value {
    let mut properties: Vec<Value> = list(&model["spec"]["properties"])
        .filter(|property| property.is_object())
        .map(|property| {
            let mut property = property.clone();
            if let Some(fields) = property.as_object_mut() {
                fields.remove("visitors");
            }
            property
        })
        .collect();
    let known: BTreeSet<String> =
        properties.iter().map(|property| text(&property["name"]).to_owned()).collect();
    let missing: BTreeSet<&str> = used.filter(|name| !known.contains(*name)).collect();
    let invented = |name| json!({"name": name, "type": "STRING", "accessMode": "ReadOnly"});
    properties.extend(missing.into_iter().map(invented));
    json!({
        "metadata": {"name": text(&model["metadata"]["name"]), "namespace": text(&model["metadata"]["namespace"])},
        "spec": {"properties": properties},
    })
}

fn visitors(shared: &Value, own: &Value) -> Value {
    let name = match shared.is_object() {
        true => text(&shared["protocolName"]),
        false => text(&own["protocolName"]),
    };
    json!({"protocolName": name, "configData": overlay(&shared["configData"], &own["configData"])})
}

fn overlay(below: &Value, above: &Value) -> Value {
    let mut merged = below.as_object().cloned().unwrap_or_default();
    merged.extend(above.as_object().cloned().unwrap_or_default());
    merged.into()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_wins_key_by_key_and_nothing_is_missing() {
        let shared = json!({"metadata": {"name": "m", "namespace": "a"}, "spec": {"protocolConfigData": {"ms": 8, "ip": "x"},
            "properties": [{"name": "t", "type": "FLOAT", "visitors": {"protocolName": "modbus", "configData": {"o": 1, "r": 2}}}]}});
        let own = json!({"metadata": {"name": "d", "namespace": "a"}, "spec": {"protocol": {"protocolName": "modbus",
            "configData": {"ip": "y"}}, "properties": [
            {"name": "t", "visitors": {"protocolName": "other", "configData": {"o": 9}}, "collectCycle": 5},
            {"name": "u"}]}, "status": {"reportCycle": 7}});
        let merged = device(&own, &shared);
        assert_eq!(merged["spec"]["protocol"]["configData"], json!({"ms": 8, "ip": "y"}));
        let first = &merged["spec"]["properties"][0];
        assert_eq!(
            first["visitors"],
            json!({"protocolName": "modbus", "configData": {"o": 9, "r": 2}})
        );
        assert_eq!((&first["collectCycle"], &first["desired"]["value"]), (&json!(5), &json!("")));
        assert_eq!(merged["spec"]["properties"][1]["visitors"]["configData"], json!({}));
        assert_eq!(merged["status"]["reportCycle"], 7);
        let told = model(&shared, ["t", "u"].into_iter());
        assert_eq!(
            told["spec"]["properties"][1],
            json!({"name": "u", "type": "STRING", "accessMode": "ReadOnly"})
        );
        assert!(told["spec"]["properties"][0].get("visitors").is_none());
    }

    #[test]
    fn objects_of_any_shape_are_merged_without_a_panic() {
        for odd in [
            Value::Null,
            json!([]),
            json!({"spec": 1}),
            json!({"spec": {"properties": [null, 1, {}]}}),
        ] {
            assert!(device(&odd, &odd)["spec"]["protocol"].is_object());
            assert!(model(&odd, std::iter::empty())["spec"].is_object());
        }
    }
}
