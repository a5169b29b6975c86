//! Configuration values between JSON and the boxed form of the interface.
//!
//! Called by EdgeCore when it converts a device, and by mappers when they read one. What mappers
//! built with KubeEdge's framework can open is string, bool, 32-bit float, 32- and 64-bit integer;
//! anything else they skip silently. So an integral number travels as `Int64Value` (KubeEdge sends
//! every number as `FloatValue`, which loses precision above 2^24), and a nested value as its JSON
//! text.
//!
//! Source: kubeedge/kubeedge, staging/src/github.com/kubeedge/mapper-framework/pkg/common/
//! dataconverter.go (what is opened), edge/pkg/devicetwin/dtcommon/util.go (what is sent).

use std::collections::BTreeMap;

use prost::Message;
use prost_types::Any;
use serde_json::{Map, Value};

use crate::v1beta1::CustomizedValue;

/// What stands before the message's name in a type URL.
const PREFIX: &str = "type.googleapis.com/";

/// Boxes one JSON value. `null` becomes the empty string, as the key has to stay visible.
pub fn box_value(value: &Value) -> Any {
    match value {
        Value::Null => boxed("StringValue", &String::new()),
        Value::Bool(value) => boxed("BoolValue", value),
        Value::String(value) => boxed("StringValue", value),
        Value::Number(number) => match number.as_i64() {
            Some(integer) => boxed("Int64Value", &integer),
            // Too large for an integer that mappers can open: exact as text, wrong as a float.
            None if number.is_u64() => boxed("StringValue", &number.to_string()),
            None => boxed("FloatValue", &(number.as_f64().unwrap_or_default() as f32)),
        },
        nested => boxed("StringValue", &nested.to_string()),
    }
}

/// Boxes a map of configuration.
pub fn box_map(map: &Map<String, Value>) -> CustomizedValue {
    CustomizedValue {
        data: map.iter().map(|(key, value)| (key.clone(), box_value(value))).collect(),
    }
}

/// Opens one boxed value; `None` for a type that the interface does not use, or for broken bytes.
pub fn unbox(any: &Any) -> Option<Value> {
    let bytes = any.value.as_slice();
    Some(match any.type_url.rsplit('/').next()? {
        "google.protobuf.StringValue" => Value::from(String::decode(bytes).ok()?),
        "google.protobuf.BoolValue" => Value::from(bool::decode(bytes).ok()?),
        "google.protobuf.Int32Value" => Value::from(i32::decode(bytes).ok()?),
        "google.protobuf.Int64Value" => Value::from(i64::decode(bytes).ok()?),
        "google.protobuf.UInt32Value" => Value::from(u32::decode(bytes).ok()?),
        "google.protobuf.UInt64Value" => Value::from(u64::decode(bytes).ok()?),
        "google.protobuf.FloatValue" => number(shortest(f32::decode(bytes).ok()?)),
        "google.protobuf.DoubleValue" => number(f64::decode(bytes).ok()?),
        _ => return None,
    })
}

/// Opens a map of configuration; values that cannot be opened are left out and named in the second part.
pub fn unbox_map(map: &BTreeMap<String, Any>) -> (Map<String, Value>, Vec<String>) {
    let mut opened = Map::new();
    let mut unknown = Vec::new();
    for (key, any) in map {
        match unbox(any) {
            Some(value) => drop(opened.insert(key.clone(), value)),
            None => unknown.push(key.clone()),
        }
    }
    (opened, unknown)
}

fn boxed(name: &str, value: &impl Message) -> Any {
    Any { type_url: format!("{PREFIX}google.protobuf.{name}"), value: value.encode_to_vec() }
}

/// Returns the number that a person wrote: 0.1 and not 0.10000000149011612.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// Returns an integral float as an integer, as KubeEdge sends every number as a float.
fn number(value: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53
    if value.fract() == 0.0 && value.abs() < EXACT {
        return Value::from(value as i64);
    }
    Value::from(value)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_come_back_as_they_went() {
        for value in [
            json!("a b=?"),
            json!(true),
            json!(0),
            json!(-7),
            json!(9_007_199_254_740_993_i64),
            json!(0.1),
            json!(1.5e6),
        ] {
            assert_eq!(
                unbox(&box_value(&value)).map(|v| v.to_string().replace(".0", "")),
                Some(value.to_string().replace(".0", ""))
            );
        }
    }

    #[test]
    fn nested_values_and_huge_numbers_travel_as_text() {
        assert_eq!(unbox(&box_value(&json!({"a": [1]}))), Some(json!("{\"a\":[1]}")));
        assert_eq!(unbox(&box_value(&json!(u64::MAX))), Some(json!(u64::MAX.to_string())));
        assert_eq!(unbox(&box_value(&Value::Null)), Some(json!("")));
    }

    #[test]
    fn a_port_sent_as_float_is_an_integer() {
        assert_eq!(unbox(&boxed("FloatValue", &502.0_f32)), Some(json!(502)));
    }

    #[test]
    fn unknown_types_and_broken_bytes_are_named_not_guessed() {
        let mut map = BTreeMap::new();
        map.insert("ok".to_owned(), box_value(&json!(1)));
        map.insert("bad".to_owned(), Any { type_url: "x/y".to_owned(), value: vec![1] });
        map.insert(
            "cut".to_owned(),
            Any { type_url: "/google.protobuf.StringValue".to_owned(), value: vec![0x0a, 9, b'x'] },
        );
        let (opened, unknown) = unbox_map(&map);
        assert_eq!(opened.len(), 1);
        assert_eq!(unknown, ["bad", "cut"]);
    }
}
