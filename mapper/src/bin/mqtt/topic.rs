//! Which topics a device's properties come from and go to, and what is in a payload.
//!
//! Settings of a property (its visitors):
//!
//! | setting | what it is | default |
//! |---|---|---|
//! | `topic` | where its value is published; no wildcards | not heard |
//! | `path` | where the value is inside a JSON payload: `temp`, `sensors.0.temp` or a JSON pointer `/sensors/0/temp` | the whole payload |
//! | `on`, `off` | payloads or JSON values that mean true and false | `true`, `false` |
//! | `setTopic` | where a desired value is published | not written |
//! | `setPath` | the value is published inside a JSON object, under this path of names | the value alone |
//! | `setRetain` | whether the broker keeps it | false |
//!
//! Pure; payloads are foreign bytes and never more than an error.

use std::collections::BTreeMap;

use serde_json::Value as Json;
use skerry_mapper::{Device, DriverError, Kind, Property, SettingError, Value};

/// Longest payload that is looked at.
pub(crate) const PAYLOAD_MAX: usize = 256 << 10;
/// Most steps of a path.
const PATH_MAX: usize = 16;
/// Longest topic.
const TOPIC_MAX: usize = 1024;

/// A device's topics.
#[derive(Debug)]
pub(crate) struct Topics {
    heard: BTreeMap<String, Vec<Source>>,
    targets: BTreeMap<String, Target>,
    faults: BTreeMap<String, String>,
    /// Topic, and the payload that means that the device is there.
    availability: Option<(String, String)>,
}

#[derive(Debug)]
struct Source {
    property: String,
    kind: Kind,
    path: Vec<String>,
    on: Option<String>,
    off: Option<String>,
}

#[derive(Debug)]
struct Target {
    topic: String,
    path: Vec<String>,
    on: Option<String>,
    off: Option<String>,
    retain: bool,
}

/// What a message means.
#[derive(Debug, PartialEq)]
pub(crate) enum Heard {
    /// Values of properties.
    Values(Vec<(String, Result<Value, DriverError>)>),
    /// The device says whether it is there.
    Present(bool),
}

impl Topics {
    /// Reads a device's settings; a property with wrong ones becomes a fault and stops no other.
    ///
    /// # Errors
    ///
    /// [`SettingError`] if the device's own settings are wrong.
    pub(crate) fn parse(device: &Device) -> Result<Self, SettingError> {
        let mut topics = Self {
            heard: BTreeMap::new(),
            targets: BTreeMap::new(),
            faults: BTreeMap::new(),
            availability: None,
        };
        if let Some(topic) = topic(&device.settings, "availabilityTopic")? {
            let online = device.settings.text("online").unwrap_or_else(|| "online".to_owned());
            topics.availability = Some((topic, online));
        }
        for property in &device.properties {
            if let Err(error) = topics.add(property) {
                topics.faults.insert(property.name.clone(), error.to_string());
            }
        }
        Ok(topics)
    }

    fn add(&mut self, property: &Property) -> Result<(), SettingError> {
        let settings = &property.settings;
        let (on, off) = (settings.text("on"), settings.text("off"));
        let heard = topic(settings, "topic")?;
        let target = topic(settings, "setTopic")?;
        if heard.is_none() && target.is_none() {
            return Err(SettingError::Missing { key: "topic".to_owned() });
        }
        let target = match target {
            None => None,
            Some(topic) => Some(Target {
                topic,
                path: path(settings, "setPath")?,
                on: on.clone(),
                off: off.clone(),
                retain: settings.parsed("setRetain", "true or false")?.unwrap_or(false),
            }),
        };
        if let Some(topic) = heard {
            let path = path(settings, "path")?;
            let source =
                Source { property: property.name.clone(), kind: property.kind, path, on, off };
            self.heard.entry(topic).or_default().push(source);
        }
        self.targets.extend(target.map(|target| (property.name.clone(), target)));
        Ok(())
    }

    /// Topics to subscribe to.
    pub(crate) fn heard(&self) -> impl Iterator<Item = &str> {
        let availability = self.availability.iter().map(|(topic, _)| topic.as_str());
        self.heard.keys().map(String::as_str).chain(availability)
    }

    /// Properties with wrong settings, and what is wrong.
    pub(crate) fn faults(&self) -> impl Iterator<Item = (&str, &String)> {
        self.faults.iter().map(|(property, why)| (property.as_str(), why))
    }

    /// What a message on `topic` means.
    pub(crate) fn handle(&self, topic: &str, payload: &[u8]) -> Heard {
        if let Some((availability, online)) = &self.availability
            && availability == topic
        {
            return Heard::Present(payload == online.as_bytes());
        }
        let Some(sources) = self.heard.get(topic) else { return Heard::Values(Vec::new()) };
        let json = parse(payload);
        let value = |source: &Source| {
            let value = source.value(&json, payload).map_err(DriverError::Refused);
            (source.property.clone(), value)
        };
        Heard::Values(sources.iter().map(value).collect())
    }

    /// What is published where for a desired value.
    pub(crate) fn command(
        &self,
        property: &Property,
        value: &Value,
    ) -> Result<(String, Vec<u8>, bool), DriverError> {
        let target = self
            .targets
            .get(&property.name)
            .ok_or_else(|| DriverError::Refused("the property has no `setTopic`".to_owned()))?;
        let word = match value {
            Value::Boolean(true) => target.on.clone(),
            Value::Boolean(false) => target.off.clone(),
            _ => None,
        };
        let payload = match (target.path.is_empty(), word) {
            (true, Some(word)) => word,
            (true, None) => value.to_string(),
            (false, word) => {
                let inner = match (word, value) {
                    (Some(word), _) => Json::from(word),
                    (None, Value::Integer(number)) => Json::from(*number),
                    (None, Value::Float(number)) => Json::from(*number),
                    (None, Value::Boolean(value)) => Json::from(*value),
                    (None, value) => Json::from(value.to_string()),
                };
                let wrap = |inner: Json, name: &String| {
                    Json::Object([(name.clone(), inner)].into_iter().collect())
                };
                target.path.iter().rev().fold(inner, wrap).to_string()
            }
        };
        Ok((target.topic.clone(), payload.into_bytes(), target.retain))
    }
}

impl Source {
    fn value(&self, json: &Result<Json, String>, payload: &[u8]) -> Result<Value, String> {
        let found;
        let text = if self.path.is_empty() {
            match json {
                // A JSON text stands for what is in it, everything else for itself.
                Ok(Json::String(text)) => text.as_str(),
                _ if payload.len() > PAYLOAD_MAX => {
                    return Err(json.clone().expect_err("too long to parse"));
                }
                _ => {
                    std::str::from_utf8(payload).map_err(|_| "the payload is no text".to_owned())?
                }
            }
        } else {
            let mut at = json.as_ref().map_err(Clone::clone)?;
            for step in &self.path {
                let next = match at {
                    Json::Array(items) => {
                        step.parse().ok().and_then(|index: usize| items.get(index))
                    }
                    other => other.get(step),
                };
                at = next.ok_or_else(|| format!("the payload has no `{}`", self.path.join(".")))?;
            }
            match at {
                Json::String(text) => text.as_str(),
                Json::Null => return Err(format!("`{}` is null", self.path.join("."))),
                other => {
                    found = other.to_string();
                    found.as_str()
                }
            }
        };
        if self.kind == Kind::Boolean {
            if self.on.as_deref() == Some(text) {
                return Ok(Value::Boolean(true));
            }
            if self.off.as_deref() == Some(text) {
                return Ok(Value::Boolean(false));
            }
        }
        let text = if matches!(self.kind, Kind::Text | Kind::Bytes) { text } else { text.trim() };
        let value = Value::parse(self.kind, text);
        // A whole number that was written with a point.
        let value = value.or_else(|error| match text.parse::<f64>() {
            Ok(number) => Value::Float(number).into_kind(self.kind),
            Err(_) => Err(error),
        });
        value.map_err(|error| error.to_string())
    }
}

fn parse(payload: &[u8]) -> Result<Json, String> {
    if payload.len() > PAYLOAD_MAX {
        return Err(format!("the payload is longer than {PAYLOAD_MAX} bytes"));
    }
    serde_json::from_slice(payload).map_err(|error| format!("the payload is no JSON: {error}"))
}

fn topic(settings: &skerry_mapper::Settings, key: &str) -> Result<Option<String>, SettingError> {
    let Some(topic) = settings.text(key).filter(|topic| !topic.is_empty()) else { return Ok(None) };
    if topic.len() > TOPIC_MAX || topic.contains(['+', '#', '\0']) {
        let wanted = "topic without wildcards".to_owned();
        return Err(SettingError::Wrong {
            key: key.to_owned(),
            found: topic.chars().take(64).collect(),
            wanted,
        });
    }
    Ok(Some(topic))
}

fn path(settings: &skerry_mapper::Settings, key: &str) -> Result<Vec<String>, SettingError> {
    let Some(text) = settings.text(key).filter(|path| !path.is_empty()) else {
        return Ok(Vec::new());
    };
    let path: Vec<String> = match text.strip_prefix('/') {
        Some(pointer) => {
            pointer.split('/').map(|step| step.replace("~1", "/").replace("~0", "~")).collect()
        }
        None => text.split('.').map(str::to_owned).collect(),
    };
    if path.len() > PATH_MAX || path.iter().any(String::is_empty) {
        let wanted = "path of at most 16 names".to_owned();
        return Err(SettingError::Wrong { key: key.to_owned(), found: text, wanted });
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use serde_json::json;
    use skerry_mapper::{DeviceId, Settings};

    use super::*;

    fn settings(value: &Json) -> Settings {
        Settings::new(value.as_object().cloned().unwrap_or_default())
    }

    fn device(own: Json, properties: &[(&str, Kind, Json)]) -> Device {
        let property = |(name, kind, json): &(&str, Kind, Json)| Property {
            name: (*name).to_owned(),
            kind: *kind,
            writable: true,
            range: (None, None),
            settings: settings(json),
            desired: None,
            collect: Duration::from_secs(1),
            report: Duration::from_secs(1),
            to_cloud: true,
            deadband: None,
            on_change: false,
        };
        Device {
            id: DeviceId::new("", "door"),
            model: "door".to_owned(),
            settings: settings(&own),
            properties: properties.iter().map(property).collect(),
            state_cycle: None,
            notes: Vec::new(),
        }
    }

    fn check(kind: Kind, visitors: Json, payload: &str, expected: Result<Value, &str>) {
        let device = device(json!({}), &[("p", kind, visitors)]);
        let topics = Topics::parse(&device).unwrap();
        let expected = expected.map_err(|why| DriverError::Refused(why.to_owned()));
        assert_eq!(
            topics.handle("t", payload.as_bytes()),
            Heard::Values(vec![("p".to_owned(), expected)])
        );
    }

    #[test]
    fn payloads_become_values() {
        check(Kind::Float, json!({"topic": "t"}), "4.5 ", Ok(Value::Float(4.5)));
        check(Kind::Int, json!({"topic": "t"}), "4.0", Ok(Value::Integer(4)));
        check(Kind::Text, json!({"topic": "t"}), "a b", Ok(Value::Text("a b".to_owned())));
        check(Kind::Text, json!({"topic": "t"}), "\"a\\nb\"", Ok(Value::Text("a\nb".to_owned())));
        check(
            Kind::Float,
            json!({"topic": "t", "path": "s.1.v"}),
            r#"{"s":[0,{"v":2}]}"#,
            Ok(Value::Float(2.0)),
        );
        check(
            Kind::Text,
            json!({"topic": "t", "path": "/a~1b"}),
            r#"{"a/b":{"c":1}}"#,
            Ok(Value::Text("{\"c\":1}".to_owned())),
        );
        check(
            Kind::Boolean,
            json!({"topic": "t", "on": "OPEN", "off": "CLOSED"}),
            "OPEN",
            Ok(Value::Boolean(true)),
        );
        check(
            Kind::Boolean,
            json!({"topic": "t", "path": "open"}),
            r#"{"open":false}"#,
            Ok(Value::Boolean(false)),
        );
    }

    #[test]
    fn payloads_that_are_no_value_are_said_to_be() {
        check(Kind::Float, json!({"topic": "t", "path": "v"}), r#"{"v":null}"#, Err("`v` is null"));
        check(Kind::Float, json!({"topic": "t", "path": "v"}), "{}", Err("the payload has no `v`"));
        check(Kind::Boolean, json!({"topic": "t"}), "ajar", Err("`ajar` is no boolean"));
    }

    #[test]
    fn a_device_that_says_it_is_away_is_away() {
        let device =
            device(json!({"availabilityTopic": "up"}), &[("p", Kind::Int, json!({"topic": "t"}))]);
        let topics = Topics::parse(&device).unwrap();
        assert_eq!(topics.handle("up", b"online"), Heard::Present(true));
        assert_eq!(topics.handle("up", b"offline"), Heard::Present(false));
        assert_eq!(topics.heard().collect::<Vec<_>>(), ["t", "up"]);
    }

    #[test]
    fn desired_values_are_published_as_the_device_wants_them() {
        let visitors = [
            ("plain", Kind::Float, json!({"setTopic": "a"})),
            ("word", Kind::Boolean, json!({"setTopic": "b", "on": "ON", "setRetain": true})),
            ("inner", Kind::Int, json!({"setTopic": "c", "setPath": "x.y"})),
            ("deaf", Kind::Int, json!({"topic": "d"})),
        ];
        let device = device(json!({}), &visitors);
        let topics = Topics::parse(&device).unwrap();
        let check = |name: &str, value: Value, expected: Option<(&str, &str, bool)>| {
            let command = topics.command(device.property(name).unwrap(), &value).ok();
            let expected = expected.map(|(topic, payload, retain)| {
                (topic.to_owned(), payload.as_bytes().to_vec(), retain)
            });
            assert_eq!(command, expected, "{name}");
        };
        check("plain", Value::Float(4.5), Some(("a", "4.5", false)));
        check("word", Value::Boolean(true), Some(("b", "ON", true)));
        check("word", Value::Boolean(false), Some(("b", "false", true)));
        check("inner", Value::Integer(3), Some(("c", r#"{"x":{"y":3}}"#, false)));
        check("deaf", Value::Integer(3), None);
    }

    #[test]
    fn a_property_with_wrong_settings_stops_no_other() {
        let device = device(
            json!({}),
            &[
                ("bad", Kind::Int, json!({"topic": "a/#"})),
                ("none", Kind::Int, json!({})),
                ("good", Kind::Int, json!({"topic": "t"})),
            ],
        );
        let topics = Topics::parse(&device).unwrap();
        assert_eq!(topics.faults().map(|(name, _)| name).collect::<Vec<_>>(), ["bad", "none"]);
        assert_eq!(topics.heard().collect::<Vec<_>>(), ["t"]);
    }

    proptest! {
        #[test]
        fn any_payload_is_a_value_or_an_error(payload in prop::collection::vec(any::<u8>(), 0..200), kind in 0..5) {
            let kind = [Kind::Int, Kind::Float, Kind::Text, Kind::Boolean, Kind::Bytes][kind as usize];
            let device = device(json!({}), &[("a", kind, json!({"topic": "t"})), ("b", kind, json!({"topic": "t", "path": "x"}))]);
            let heard = Topics::parse(&device).unwrap().handle("t", &payload);
            prop_assert!(matches!(heard, Heard::Values(values) if values.len() == 2));
        }
    }
}
