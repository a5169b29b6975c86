//! What is shown of devices, and what may be set: pure functions over the objects of the cluster.

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde::Serialize;
use serde_json::{Value, json};
use skerry_reconciler_core::DESIRED_ANNOTATION;
use std::collections::{BTreeMap, BTreeSet};

/// One device.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DeviceRow {
    pub(crate) site: String,
    pub(crate) device: String,
    pub(crate) model: String,
    /// Empty if it has none.
    pub(crate) node: String,
    /// `unknown` while its node is away.
    pub(crate) state: String,
    /// What it was when its node was last heard of, while that is away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_state: Option<String>,
    /// Properties that it has.
    pub(crate) properties: usize,
    /// Properties that it has reported.
    pub(crate) reported: usize,
    /// When it reported last; RFC 3339.
    pub(crate) last: Option<String>,
}

impl DeviceRow {
    pub(crate) fn age(&self, now: jiff::Timestamp) -> String {
        age(self.last.as_deref(), now)
    }
}

/// One property of a device. What is not known is empty.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PropertyRow {
    pub(crate) property: String,
    pub(crate) r#type: String,
    pub(crate) access: String,
    pub(crate) unit: String,
    pub(crate) desired: String,
    /// The desired value that the device has taken.
    pub(crate) observed_desired: String,
    pub(crate) reported: String,
    /// When it was reported; RFC 3339.
    pub(crate) at: Option<String>,
}

impl PropertyRow {
    pub(crate) fn age(&self, now: jiff::Timestamp) -> String {
        age(self.at.as_deref(), now)
    }
}

/// `PROPERTY=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wish {
    pub(crate) property: String,
    pub(crate) value: String,
}

impl std::str::FromStr for Wish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((property, value)) if !property.is_empty() => {
                Ok(Self { property: property.to_owned(), value: value.to_owned() })
            }
            _ => Err("expected PROPERTY=VALUE, `setpoint=4.5` for example".to_owned()),
        }
    }
}

/// Why a value may not be set, and what could be done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) what: String,
    pub(crate) hint: String,
}

/// The nodes that nobody has heard of for a while, by the word of the cluster: their condition `Ready` is `Unknown`, or was
/// never there. A node that says itself that it is not ready (without a container runtime, say) is there.
pub(crate) fn away(nodes: &[Node]) -> BTreeSet<String> {
    let is_there = |node: &&Node| {
        let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.into_iter().any(|one| one.type_ == "Ready" && one.status != "Unknown")
    };
    nodes.iter().filter(|node| !is_there(node)).map(ResourceExt::name_any).collect()
}

/// A row per device, sorted by site and name.
pub(crate) fn devices(
    devices: &[DynamicObject],
    statuses: &[DynamicObject],
    away: &BTreeSet<String>,
) -> Vec<DeviceRow> {
    let key = |object: &DynamicObject| (object.namespace().unwrap_or_default(), object.name_any());
    let statuses: BTreeMap<_, _> =
        statuses.iter().map(|status| (key(status), &status.data)).collect();
    let mut rows: Vec<_> =
        devices.iter().map(|one| device(one, statuses.get(&key(one)).copied(), away)).collect();
    rows.sort_by(|a, b| (&a.site, &a.device).cmp(&(&b.site, &b.device)));
    rows
}

/// One device's row.
pub(crate) fn device(
    device: &DynamicObject,
    status: Option<&Value>,
    away: &BTreeSet<String>,
) -> DeviceRow {
    let namespace = device.namespace().unwrap_or_default();
    let site = namespace.strip_prefix("site-").unwrap_or(&namespace).to_owned();
    let twins = twins(status);
    let last = twins.iter().filter_map(|twin| timestamp(&twin["reported"])).max();
    let state = status.and_then(|status| status.pointer("/status/state")).and_then(Value::as_str);
    let state = state.filter(|state| !state.is_empty()).unwrap_or("unknown").to_owned();
    let node = text(device.data.pointer("/spec/nodeName"));
    // A node that is away cannot say that its devices are, too.
    let (state, last_state) = match away.contains(&node) {
        true => ("unknown".to_owned(), Some(state)),
        false => (state, None),
    };
    DeviceRow {
        site,
        device: device.name_any(),
        model: text(device.data.pointer("/spec/deviceModelRef/name")),
        node,
        state,
        last_state,
        properties: list(device.data.pointer("/spec/properties")).len(),
        reported: twins
            .iter()
            .filter(|twin| !text(twin.pointer("/reported/value")).is_empty())
            .count(),
        last: last.map(|last| last.to_string()),
    }
}

/// A row per property: those of the device, then those that only its status has.
pub(crate) fn properties(
    device: &Value,
    model: Option<&Value>,
    status: Option<&Value>,
) -> Vec<PropertyRow> {
    let declared = model.map(|model| list(model.pointer("/spec/properties"))).unwrap_or_default();
    let of = |list: &[Value], key: &str, name: &str| {
        list.iter().find(|item| item[key] == name).cloned().unwrap_or_default()
    };
    let twins = twins(status);
    let own = list(device.pointer("/spec/properties"));
    let names = own.iter().map(|property| text(property.get("name")));
    let mut names: Vec<String> = names.collect();
    for twin in twins {
        let name = text(twin.get("propertyName"));
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let row = |name: String| {
        let (property, declared) = (of(own, "name", &name), of(declared, "name", &name));
        let twin = of(twins, "propertyName", &name);
        PropertyRow {
            r#type: text(declared.get("type")),
            access: text(declared.get("accessMode")),
            unit: text(declared.get("unit")),
            desired: text(property.pointer("/desired/value")),
            observed_desired: text(twin.pointer("/observedDesired/value")),
            reported: text(twin.pointer("/reported/value")),
            at: timestamp(&twin["reported"]).map(|at| at.to_string()),
            property: name,
        }
    };
    names.into_iter().map(row).collect()
}

/// The device's list of properties with the wishes in it.
pub(crate) fn wished(
    device: &DynamicObject,
    model: Option<&Value>,
    wishes: &[Wish],
) -> Result<Value, Refusal> {
    let mut properties = list(device.data.pointer("/spec/properties")).to_vec();
    let declared = model.map(|model| list(model.pointer("/spec/properties"))).unwrap_or_default();
    let by_repository: Vec<String> = device
        .annotations()
        .get(DESIRED_ANNOTATION)
        .and_then(|names| serde_json::from_str(names).ok())
        .unwrap_or_default();
    for wish in wishes {
        let name = &wish.property;
        let known: Vec<String> =
            properties.iter().map(|property| text(property.get("name"))).collect();
        let Some(property) = properties.iter_mut().find(|property| property["name"] == **name)
        else {
            let hint = format!("it has {}", known.join(", "));
            return Err(Refusal { what: format!("there is no property `{name}`"), hint });
        };
        let Some(declared) = declared.iter().find(|declared| declared["name"] == **name) else {
            let hint = "`skerry device get` shows what the model has".to_owned();
            return Err(Refusal { what: format!("its model has no property `{name}`"), hint });
        };
        if by_repository.contains(name) {
            let hint = "change it there, or take `desired` out of it".to_owned();
            let what = format!("what is desired of `{name}` is said in the fleet's repository");
            return Err(Refusal { what, hint });
        }
        allowed(declared, wish)?;
        property["desired"]["value"] = Value::String(wish.value.clone());
    }
    Ok(json!(properties))
}

/// Whether all wishes have been taken, as the device says.
pub(crate) fn is_taken(status: Option<&Value>, wishes: &[Wish]) -> bool {
    wishes.iter().all(|wish| {
        let twin = twins(status).iter().find(|twin| twin["propertyName"] == *wish.property);
        wish.value.is_empty()
            || twin.is_some_and(|twin| {
                twin.pointer("/observedDesired/value").is_some_and(|v| *v == *wish.value)
            })
    })
}

fn allowed(declared: &Value, wish: &Wish) -> Result<(), Refusal> {
    let Wish { property, value } = wish;
    let refusal = |what: String, hint: &str| Err(Refusal { what, hint: hint.to_owned() });
    if declared["accessMode"] != "ReadWrite" {
        let hint = "only properties with access ReadWrite can be set";
        return refusal(format!("property `{property}` can only be read"), hint);
    }
    if value.is_empty() {
        return Ok(());
    }
    let kind = text(declared.get("type"));
    let number = match kind.as_str() {
        "INT" => value.parse::<i64>().ok().map(|number| number as f64),
        "FLOAT" | "DOUBLE" => value.parse::<f64>().ok().filter(|number| number.is_finite()),
        "BOOLEAN" if matches!(value.as_str(), "true" | "false") => return Ok(()),
        "BOOLEAN" => return refusal(format!("`{value}` is no BOOLEAN"), "true or false"),
        "STREAM" => {
            return refusal(
                "a STREAM cannot be set".to_owned(),
                "it can only be watched at the edge",
            );
        }
        _ => return Ok(()),
    };
    let Some(number) = number else {
        let hint = if kind == "INT" { "a whole number" } else { "a number" };
        return refusal(format!("`{value}` is no {kind}"), hint);
    };
    let bound = |key: &str| text(declared.get(key)).trim().parse::<f64>().ok();
    let (minimum, maximum) = (bound("minimum"), bound("maximum"));
    let range = || {
        let show = |bound: Option<f64>, none: &str| {
            bound.map_or(none.to_owned(), |bound| bound.to_string())
        };
        format!("from {} to {}", show(minimum, "anything"), show(maximum, "anything"))
    };
    if minimum.is_some_and(|minimum| number < minimum)
        || maximum.is_some_and(|maximum| number > maximum)
    {
        return refusal(format!("`{value}` is out of the range of `{property}`"), &range());
    }
    Ok(())
}

/// Twins of a DeviceStatus.
pub(crate) fn twins(status: Option<&Value>) -> &[Value] {
    list(status.and_then(|status| status.pointer("/status/twins")))
}

pub(crate) fn text(value: Option<&Value>) -> String {
    value.and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn list(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The time in a twin's metadata: milliseconds since 1970, as text.
fn timestamp(side: &Value) -> Option<jiff::Timestamp> {
    let milliseconds: i64 = text(side.pointer("/metadata/timestamp")).parse().ok()?;
    jiff::Timestamp::from_millisecond(milliseconds).ok()
}

fn age(at: Option<&str>, now: jiff::Timestamp) -> String {
    let Some(at) = at.and_then(|at| at.parse::<jiff::Timestamp>().ok()) else {
        return "-".to_owned();
    };
    match now.duration_since(at).as_secs() {
        seconds @ ..120 => format!("{}s", seconds.max(0)),
        seconds @ 120..7200 => format!("{}m", seconds / 60),
        seconds @ 7200..172_800 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> DynamicObject {
        serde_json::from_value(value).expect("an object")
    }

    fn fridge() -> DynamicObject {
        object(json!({
            "apiVersion": "devices.kubeedge.io/v1beta1", "kind": "Device",
            "metadata": {"name": "fridge", "namespace": "site-lisbon",
                "annotations": {DESIRED_ANNOTATION: "[\"fan\"]"}},
            "spec": {"deviceModelRef": {"name": "fridge"}, "nodeName": "lisbon-1", "properties": [
                {"name": "temperature"}, {"name": "setpoint", "desired": {"value": "4", "metadata": {"a": "b"}}},
                {"name": "light"}, {"name": "fan"}, {"name": "odd"},
            ]},
        }))
    }

    fn model() -> Value {
        json!({"spec": {"properties": [
            {"name": "temperature", "type": "FLOAT", "accessMode": "ReadOnly", "unit": "C"},
            {"name": "setpoint", "type": "FLOAT", "accessMode": "ReadWrite", "minimum": "-30", "maximum": "8"},
            {"name": "light", "type": "BOOLEAN", "accessMode": "ReadWrite"},
            {"name": "fan", "type": "INT", "accessMode": "ReadWrite"},
        ]}})
    }

    fn status() -> Value {
        json!({"status": {"state": "online", "twins": [
            {"propertyName": "temperature", "observedDesired": {"value": ""},
             "reported": {"value": "4.5", "metadata": {"timestamp": "1787217243120"}}},
            {"propertyName": "setpoint", "observedDesired": {"value": "4"}, "reported": {"value": "4"}},
            {"propertyName": "gone", "reported": {"value": "1"}},
        ]}})
    }

    #[test]
    fn a_device_is_shown_with_its_newest_report() {
        let all_there = BTreeSet::new();
        let row = device(&fridge(), Some(&status()), &all_there);
        assert_eq!(
            (row.site.as_str(), row.state.as_str(), row.node.as_str()),
            ("lisbon", "online", "lisbon-1")
        );
        assert_eq!((row.reported, row.properties), (3, 5));
        let now = jiff::Timestamp::from_millisecond(1_787_217_243_120 + 90_000).unwrap();
        assert_eq!(row.age(now), "90s");
        let silent = device(&fridge(), None, &all_there);
        assert_eq!((silent.state.as_str(), silent.age(now).as_str()), ("unknown", "-"));
    }

    #[test]
    fn a_device_of_a_node_that_is_away_is_unknown_whatever_it_said_last() {
        let node = |name: &str, ready: &str| -> Node {
            serde_json::from_value(json!({"metadata": {"name": name},
                "status": {"conditions": [{"type": "Ready", "status": ready}]}}))
            .unwrap()
        };
        let never: Node = serde_json::from_value(json!({"metadata": {"name": "new"}})).unwrap();
        let nodes = [
            node("lisbon-1", "Unknown"),
            node("lisbon-2", "True"),
            node("lisbon-3", "False"),
            never,
        ];
        let away = away(&nodes);
        assert_eq!(away.iter().map(String::as_str).collect::<Vec<_>>(), ["lisbon-1", "new"]);
        let row = device(&fridge(), Some(&status()), &away);
        assert_eq!((row.state.as_str(), row.last_state.as_deref()), ("unknown", Some("online")));
        assert_eq!(row.reported, 3, "what it said stays");
    }

    #[test]
    fn properties_are_shown_with_what_model_device_and_status_say() {
        let rows = properties(&fridge().data, Some(&model()), Some(&status()));
        let names: Vec<_> = rows.iter().map(|row| row.property.as_str()).collect();
        assert_eq!(names, ["temperature", "setpoint", "light", "fan", "odd", "gone"]);
        assert_eq!((rows[0].reported.as_str(), rows[0].unit.as_str()), ("4.5", "C"));
        assert_eq!((rows[1].desired.as_str(), rows[1].observed_desired.as_str()), ("4", "4"));
        assert_eq!(rows[4], PropertyRow { property: "odd".to_owned(), ..PropertyRow::default() });
    }

    #[test]
    fn only_what_the_model_allows_is_set() {
        let check = |wish: &str, expected: Result<&str, &str>| {
            let wishes = [wish.parse::<Wish>().expect("a wish")];
            let outcome = wished(&fridge(), Some(&model()), &wishes);
            let name = &wishes[0].property;
            let value = outcome.as_ref().map(|properties| {
                let all = properties.as_array().expect("a list");
                let property = all.iter().find(|property| property["name"] == **name).expect("it");
                property["desired"]["value"].as_str().expect("text").to_owned()
            });
            let refusal =
                outcome.as_ref().err().map(|refusal| refusal.what.clone()).unwrap_or_default();
            match expected {
                Ok(expected) => assert_eq!(value.ok().as_deref(), Some(expected)),
                Err(part) => assert!(refusal.contains(part), "{wish}: {refusal}"),
            }
        };
        check("setpoint=4.5", Ok("4.5"));
        check("setpoint=", Ok(""));
        check("light=true", Ok("true"));
        check("setpoint=9", Err("out of the range"));
        check("setpoint=warm", Err("is no FLOAT"));
        check("light=on", Err("is no BOOLEAN"));
        check("temperature=4", Err("can only be read"));
        check("setpiont=4", Err("there is no property"));
        check("odd=4", Err("its model has no property"));
        check("fan=4", Err("said in the fleet's repository"));
        assert!("setpoint".parse::<Wish>().is_err());
    }

    #[test]
    fn other_properties_and_metadata_stay_as_they_are() {
        let wishes = ["setpoint=5".parse::<Wish>().unwrap()];
        let properties = wished(&fridge(), Some(&model()), &wishes).unwrap();
        assert_eq!(
            properties[1],
            json!({"name": "setpoint", "desired": {"value": "5", "metadata": {"a": "b"}}})
        );
        assert_eq!(properties.as_array().unwrap().len(), 5);
    }

    #[test]
    fn a_wish_is_taken_when_the_device_says_so() {
        let taken = |wish: &str| is_taken(Some(&status()), &[wish.parse::<Wish>().unwrap()]);
        assert!(taken("setpoint=4") && taken("light="));
        assert!(!taken("setpoint=5") && !taken("light=true"));
        assert!(!is_taken(None, &["setpoint=4".parse::<Wish>().unwrap()]));
    }
}
