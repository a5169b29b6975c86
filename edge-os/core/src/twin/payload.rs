//! The JSON of the broker's topics and of what goes up about devices, read without trust and written as KubeEdge does.
//!
//! Keys are found without regard to letter case, as Go finds them; keys that nobody knows are ignored, and null stands
//! for absent wherever that makes sense. Nothing here panics on any bytes.
//!
//! Caller: [`super::Twin`].
//!
//! Source: kubeedge/kubeedge, edge/pkg/devicetwin/dttype/types.go, types_helper.go.

use super::value::{Change, Property};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Longest payload that is read, in bytes (1 MiB).
pub const PAYLOAD_LEN_MAX: usize = 1024 * 1024;
/// Longest `event_id` that is repeated in an answer, in bytes.
const EVENT_ID_LEN_MAX: usize = 256;

/// What every request has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Base {
    /// Repeated in the answer.
    pub event_id: String,
}

/// Why a payload is no request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// Longer than [`PAYLOAD_LEN_MAX`].
    #[error("the message has {0} bytes, the limit is {PAYLOAD_LEN_MAX}")]
    Long(usize),
    /// Not JSON, or no object.
    #[error("the message is no JSON object")]
    Json,
    /// No `twin`.
    #[error("`twin` is missing")]
    NoTwin,
    /// A property is something else than an object or null.
    #[error("`{0}` is neither an object nor null")]
    Property(String),
    /// A value is no text.
    #[error("a value of `{0}` is no text")]
    Value(String),
    /// No `state`.
    #[error("`state` is missing")]
    NoState,
}

/// The field with this name in any letter case; an exact one wins.
pub(super) fn field<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let found = object.get(name).or_else(|| {
        object.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    });
    found.filter(|value| !value.is_null())
}

fn text<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    field(object, name).and_then(Value::as_str)
}

fn object_in<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Map<String, Value>> {
    field(object, name).and_then(Value::as_object)
}

/// Reads a payload as far as every request has the same.
///
/// # Errors
///
/// [`Malformed::Long`], [`Malformed::Json`].
pub fn read(payload: &[u8]) -> Result<(Base, Map<String, Value>), Malformed> {
    if payload.len() > PAYLOAD_LEN_MAX {
        return Err(Malformed::Long(payload.len()));
    }
    match serde_json::from_slice(payload) {
        Ok(Value::Object(object)) => {
            let event_id = text(&object, "event_id").unwrap_or_default();
            let event_id = event_id.chars().take(EVENT_ID_LEN_MAX).collect();
            Ok((Base { event_id }, object))
        }
        _ => Err(Malformed::Json),
    }
}

/// Reads the properties of a `twin/update`; `None` for one that is to be deleted.
///
/// # Errors
///
/// [`Malformed`].
pub fn twin(object: &Map<String, Value>) -> Result<BTreeMap<String, Option<Change>>, Malformed> {
    let twin = object_in(object, "twin").ok_or(Malformed::NoTwin)?;
    twin.iter()
        .map(|(name, said)| {
            let said = match said {
                Value::Null => return Ok((name.clone(), None)),
                Value::Object(said) => said,
                _ => return Err(Malformed::Property(name.clone())),
            };
            let change = Change {
                expected: side(name, said, "expected")?,
                actual: side(name, said, "actual")?,
                timestamp: None,
                optional: field(said, "optional").and_then(Value::as_bool),
                kind: object_in(said, "metadata")
                    .and_then(|metadata| text(metadata, "type"))
                    .map(str::to_owned),
            };
            Ok((name.clone(), Some(change)))
        })
        .collect()
}

fn side(
    property: &str,
    said: &Map<String, Value>,
    name: &str,
) -> Result<Option<String>, Malformed> {
    let Some(side) = object_in(said, name) else { return Ok(None) };
    match field(side, "value") {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(Malformed::Value(property.into())),
    }
}

/// A value that the hub gives with versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The value.
    pub value: String,
    /// Resource version on which it is based.
    pub cloud: u64,
    /// Last local change of which the hub knew.
    pub edge: u64,
}

/// Reads what the hub wants of one property with `expected_version`; `None` without value or version.
pub fn wanted(said: &Value) -> Option<(Wanted, Option<String>)> {
    let said = said.as_object()?;
    let value = text(object_in(said, "expected")?, "value")?.to_owned();
    let version = object_in(said, "expected_version")?;
    let number = |name| field(version, name).and_then(Value::as_u64).unwrap_or(0);
    let kind = object_in(said, "metadata").and_then(|metadata| text(metadata, "type"));
    let wanted = Wanted { value, cloud: number("cloud"), edge: number("edge") };
    Some((wanted, kind.map(str::to_owned)))
}

/// Reads the state of a `state/update`.
///
/// # Errors
///
/// [`Malformed::NoState`].
pub fn state(object: &Map<String, Value>) -> Result<&str, Malformed> {
    text(object, "state").ok_or(Malformed::NoState)
}

/// Identities and descriptions of the devices in a list of memberships.
pub fn members(content: &Value, list: &str) -> Vec<(String, String)> {
    let devices = content.as_object().and_then(|content| field(content, list));
    devices
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_object)
        .filter_map(|device| {
            let description = text(device, "description").unwrap_or_default();
            Some((text(device, "id")?.to_owned(), description.to_owned()))
        })
        .collect()
}

/// An answer with properties, or to a request for them.
pub fn twin_result(base: &Base, now_ms: i64, twin: Map<String, Value>) -> Value {
    json!({"event_id": base.event_id, "timestamp": now_ms, "twin": twin})
}

/// An answer that says why not.
pub fn error(base: &Base, now_ms: i64, code: u16, reason: &str) -> Value {
    json!({"event_id": base.event_id, "timestamp": now_ms, "code": code, "reason": reason})
}

/// What should be and is not.
pub fn delta(
    event_id: &str,
    now_ms: i64,
    (twin, delta): (Map<String, Value>, Map<String, Value>),
) -> Value {
    json!({"event_id": event_id, "timestamp": now_ms, "twin": twin, "delta": delta})
}

/// The state of a device, for the broker and for the hub. `last_online` is empty unless the device is there.
pub fn state_message(
    event_id: &str,
    now_ms: i64,
    name: &str,
    state: &str,
    last_online: &str,
) -> Value {
    let mut device = json!({"name": name, "state": state});
    if !last_online.is_empty() {
        device["lastOnlineTime"] = last_online.into();
    }
    json!({"event_id": event_id, "timestamp": now_ms, "device": device})
}

/// What the hub is told of properties; `epoch` is the uid of the Device and which run of numbers these are, so that word of
/// a device that is another one by now can be told apart. KubeEdge ignores it.
pub fn report<'a>(
    event_id: &str,
    now_ms: i64,
    epoch: &str,
    properties: impl Iterator<Item = (&'a str, &'a Property)>,
) -> Value {
    let twin: Map<String, Value> = properties
        .map(|(name, property)| {
            let json = if property.deleted { Value::Null } else { property.to_json(true) };
            (name.to_owned(), json)
        })
        .collect();
    let mut report = json!({"event_id": event_id, "timestamp": now_ms, "twin": twin});
    if !epoch.is_empty() {
        report["epoch"] = epoch.into();
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_are_found_in_any_letter_case_and_null_is_absent() {
        let (base, object) = read(
            br#"{"Event_ID":"7","TWIN":{"a":{"Actual":{"VALUE":"1"},"expected":null,"metadata":{"Type":"INT"}},
                "b":null,"c":{"actual":{"value":null}},"d":{"actual":{}}},"x":1}"#,
        )
        .expect("readable");
        assert_eq!(base.event_id, "7");
        let twin = twin(&object).expect("a twin");
        let a = twin["a"].as_ref().expect("no delete");
        assert_eq!(
            (a.actual.as_deref(), a.kind.as_deref(), &a.expected),
            (Some("1"), Some("INT"), &None)
        );
        assert_eq!(twin["b"], None);
        assert_eq!(twin["c"], Some(Change::default()));
        assert_eq!(twin["d"], Some(Change::default()));
    }

    #[test]
    fn what_is_no_request_is_named() {
        assert_eq!(read(b"[]").unwrap_err(), Malformed::Json);
        assert_eq!(
            read(&vec![b' '; PAYLOAD_LEN_MAX + 1]).unwrap_err(),
            Malformed::Long(PAYLOAD_LEN_MAX + 1)
        );
        let check = |text: &str| twin(&read(text.as_bytes()).expect("JSON").1).unwrap_err();
        assert_eq!(check(r#"{"twin":null}"#), Malformed::NoTwin);
        assert_eq!(check(r#"{"twin":{"a":1}}"#), Malformed::Property("a".into()));
        assert_eq!(check(r#"{"twin":{"a":{"actual":{"value":1}}}}"#), Malformed::Value("a".into()));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok((_, object)) = read(&bytes) {
                let _ = (twin(&object), state(&object));
            }
        }

        #[test]
        fn no_json_panics(text in r#"\{("(twin|state|actual|value|a)":(null|1|"x"|\[\]|\{"a":(null|\{"actual":(null|1|\{"value":(null|2|"v")\})\})\}),?){0,3}"e":1\}"#) {
            if let Ok((_, object)) = read(text.as_bytes()) {
                let _ = (twin(&object), state(&object));
            }
        }
    }
}
