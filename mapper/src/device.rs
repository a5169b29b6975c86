//! A device as a mapper sees it: the message of the interface together with its model, parsed.
//!
//! Called by the core when EdgeCore hands over a device or a model. EdgeCore has merged the model's
//! settings into the device's before it sends them. What cannot be used is left out and said in
//! [`Device::notes`]; a device is never refused as a whole, as EdgeCore would not ask again.

use std::fmt;
use std::time::Duration;

use serde_json::Map;
use skerry_dmi::{unbox_map, v1beta1 as dmi};

use crate::settings::Settings;
use crate::value::{Kind, Value};

/// Shortest time between two reads of a property; a cycle of 1 ms is a typing error more often than a wish.
pub const CYCLE_MIN: Duration = Duration::from_millis(10);
/// Cycle of a property or a state that says nothing.
pub const CYCLE_DEFAULT: Duration = Duration::from_secs(1);
/// Most properties of one device that are served.
pub const PROPERTIES_MAX: usize = 1024;

/// Namespace and name of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId {
    /// Namespace; empty stands for `default`.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl DeviceId {
    /// Names a device.
    pub fn new(namespace: &str, name: &str) -> Self {
        let namespace = if namespace.is_empty() { "default" } else { namespace };
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One device with its settings and properties.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// Who it is.
    pub id: DeviceId,
    /// Name of its model.
    pub model: String,
    /// How it is reached: `spec.protocol.configData`, the model's merged in.
    pub settings: Settings,
    /// What it has.
    pub properties: Vec<Property>,
    /// How often its state is repeated; `None`: only changes are reported.
    pub state_cycle: Option<Duration>,
    /// What was left out, in words for the log.
    pub notes: Vec<String>,
}

/// One property of a device.
#[derive(Debug, Clone, PartialEq)]
pub struct Property {
    /// Unique in its device.
    pub name: String,
    /// Type, from the model.
    pub kind: Kind,
    /// Whether the model allows writing.
    pub writable: bool,
    /// Smallest and largest value that the model allows.
    pub range: (Option<f64>, Option<f64>),
    /// How it is read and written: `visitors.configData`, the model's merged in.
    pub settings: Settings,
    /// What it should be; `None` if nothing is desired.
    pub desired: Option<String>,
    /// Time between two reads.
    pub collect: Duration,
    /// Time between two reports; at least [`Property::collect`].
    pub report: Duration,
    /// Whether it is reported at all.
    pub to_cloud: bool,
    /// `deadband` of the visitors: a smaller change of a number is not reported.
    pub deadband: Option<f64>,
    /// `reportOnChange` of the visitors: the same value again is reported only every ten minutes.
    pub on_change: bool,
}

impl Device {
    /// Parses what EdgeCore sent; properties that the model lacks are text and cannot be written.
    pub fn parse(device: &dmi::Device, model: &dmi::DeviceModel) -> Self {
        let mut notes = Vec::new();
        let spec = device.spec.clone().unwrap_or_default();
        let settings = settings(spec.protocol.and_then(|p| p.config_data), "protocol", &mut notes);
        let declared = model.spec.clone().unwrap_or_default().properties;
        let mut properties: Vec<Property> = Vec::new();
        for property in spec.properties {
            if properties.len() == PROPERTIES_MAX {
                notes.push(format!("more than {PROPERTIES_MAX} properties, the rest is left out"));
                break;
            }
            if properties.iter().any(|known| known.name == property.name) {
                notes.push(format!("property `{}` is there twice", property.name));
                continue;
            }
            let declared = declared.iter().find(|declared| declared.name == property.name);
            if declared.is_none() {
                let model = &model.name;
                notes.push(format!("model `{model}` has no property `{}`", property.name));
            }
            let parsed =
                Property::parse(property, declared.cloned().unwrap_or_default(), &mut notes);
            properties.extend(parsed);
        }
        let status = device.status.clone().unwrap_or_default();
        let state_cycle = status.report_to_cloud.then(|| cycle(status.report_cycle));
        Self {
            id: DeviceId::new(&device.namespace, &device.name),
            model: spec.device_model_reference,
            settings,
            properties,
            state_cycle,
            notes,
        }
    }

    /// The property of that name.
    pub fn property(&self, name: &str) -> Option<&Property> {
        self.properties.iter().find(|property| property.name == name)
    }

    /// Whether a driver opened for `self` can serve `other` as well: all that differs is what is
    /// desired and when.
    pub(crate) fn same_driver(&self, other: &Self) -> bool {
        let key = |property: &Property| {
            (property.name.clone(), property.kind, property.writable, property.settings.clone())
        };
        self.settings == other.settings
            && self.properties.len() == other.properties.len()
            && self.properties.iter().zip(&other.properties).all(|(a, b)| key(a) == key(b))
    }
}

impl Property {
    fn parse(
        property: dmi::DeviceProperty,
        declared: dmi::ModelProperty,
        notes: &mut Vec<String>,
    ) -> Option<Self> {
        let name = property.name;
        let kind = Kind::from_model(&declared.r#type).unwrap_or_else(|| {
            notes.push(format!("property `{name}`: type `{}` is unknown", declared.r#type));
            Kind::Text
        });
        if kind == Kind::Stream {
            notes.push(format!("property `{name}`: streams are not supported"));
            return None;
        }
        let settings = settings(property.visitors.and_then(|v| v.config_data), &name, notes);
        let mut number = |key: &str, text: &str| match text.trim() {
            "" => None,
            text => match text.parse::<f64>() {
                Ok(number) if number.is_finite() => Some(number),
                _ => {
                    notes.push(format!("property `{name}`: {key} `{text}` is no number"));
                    None
                }
            },
        };
        let range = (number("minimum", &declared.minimum), number("maximum", &declared.maximum));
        let deadband = number("deadband", &settings.text("deadband").unwrap_or_default());
        let collect = cycle(property.collect_cycle);
        let report = if property.report_cycle > 0 { cycle(property.report_cycle) } else { collect };
        Some(Self {
            kind,
            writable: declared.access_mode.eq_ignore_ascii_case("ReadWrite"),
            range,
            desired: property
                .desired
                .map(|desired| desired.value)
                .filter(|value| !value.is_empty()),
            collect,
            report: report.max(collect),
            to_cloud: property.report_to_cloud,
            deadband: deadband.filter(|deadband| *deadband > 0.0),
            on_change: settings.text("reportOnChange").as_deref() == Some("true"),
            settings,
            name,
        })
    }

    /// Reads a desired value as this property's type, inside its range.
    ///
    /// # Errors
    ///
    /// Words for the log: the wrong type, or out of the range.
    pub fn desired_value(&self, text: &str) -> Result<Value, String> {
        let value = Value::parse(self.kind, text).map_err(|error| error.to_string())?;
        if let Some(number) = value.number() {
            let (minimum, maximum) = self.range;
            if let Some(minimum) = minimum.filter(|minimum| number < *minimum) {
                return Err(format!("`{text}` is less than the minimum {minimum}"));
            }
            if let Some(maximum) = maximum.filter(|maximum| number > *maximum) {
                return Err(format!("`{text}` is more than the maximum {maximum}"));
            }
        }
        Ok(value)
    }
}

fn settings(map: Option<dmi::CustomizedValue>, what: &str, notes: &mut Vec<String>) -> Settings {
    let (map, unknown) = map.map_or((Map::new(), Vec::new()), |map| unbox_map(&map.data));
    for key in unknown {
        notes.push(format!("`{what}`: setting `{key}` has a type that cannot be read"));
    }
    Settings::new(map)
}

fn cycle(milliseconds: i64) -> Duration {
    match u64::try_from(milliseconds) {
        Ok(0) | Err(_) => CYCLE_DEFAULT,
        Ok(milliseconds) => Duration::from_millis(milliseconds).max(CYCLE_MIN),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn property(name: &str) -> dmi::DeviceProperty {
        dmi::DeviceProperty { name: name.to_owned(), ..Default::default() }
    }

    fn model() -> dmi::DeviceModel {
        let property = |name: &str, kind: &str, access: &str| dmi::ModelProperty {
            name: name.to_owned(),
            r#type: kind.to_owned(),
            access_mode: access.to_owned(),
            minimum: "-10".to_owned(),
            maximum: "10".to_owned(),
            ..Default::default()
        };
        let properties = vec![
            property("t", "FLOAT", "ReadOnly"),
            property("set", "INT", "ReadWrite"),
            property("cam", "STREAM", "ReadOnly"),
        ];
        dmi::DeviceModel {
            name: "fridge".to_owned(),
            spec: Some(dmi::DeviceModelSpec { properties }),
            ..Default::default()
        }
    }

    #[test]
    fn an_empty_message_is_a_device_without_properties() {
        let device = Device::parse(&dmi::Device::default(), &dmi::DeviceModel::default());
        assert_eq!(device.id, DeviceId::new("", ""));
        assert!(device.properties.is_empty() && device.notes.is_empty());
    }

    #[test]
    fn what_cannot_be_used_is_left_out_and_said() {
        let spec = dmi::DeviceSpec {
            properties: vec![property("t"), property("t"), property("cam"), property("other")],
            ..Default::default()
        };
        let device =
            Device::parse(&dmi::Device { spec: Some(spec), ..Default::default() }, &model());
        let names: Vec<_> = device.properties.iter().map(|p| (p.name.as_str(), p.kind)).collect();
        assert_eq!(names, [("t", Kind::Float), ("other", Kind::Text)]);
        assert_eq!(
            device.notes,
            [
                "property `t` is there twice",
                "property `cam`: streams are not supported",
                "model `fridge` has no property `other`"
            ]
        );
    }

    #[test]
    fn cycles_have_a_default_and_a_floor_and_reports_are_never_more_frequent_than_reads() {
        let mut notes = Vec::new();
        let mut check = |collect, report, expected: (u64, u64)| {
            let message = dmi::DeviceProperty {
                collect_cycle: collect,
                report_cycle: report,
                ..property("t")
            };
            let parsed = Property::parse(message, dmi::ModelProperty::default(), &mut notes)
                .expect("no stream");
            assert_eq!(
                (parsed.collect.as_millis() as u64, parsed.report.as_millis() as u64),
                expected
            );
        };
        check(0, 0, (1000, 1000));
        check(-5, 0, (1000, 1000));
        check(1, 0, (10, 10));
        check(500, 10_000, (500, 10_000));
        check(5_000, 100, (5_000, 5_000));
    }

    #[test]
    fn a_desired_value_has_to_fit_type_and_range() {
        let spec = dmi::DeviceSpec { properties: vec![property("set")], ..Default::default() };
        let device =
            Device::parse(&dmi::Device { spec: Some(spec), ..Default::default() }, &model());
        let set = device.property("set").expect("the property");
        assert!(set.writable);
        assert_eq!(set.desired_value("7"), Ok(Value::Integer(7)));
        assert_eq!(set.desired_value("11").unwrap_err(), "`11` is more than the maximum 10");
        assert_eq!(set.desired_value("x").unwrap_err(), "`x` is no int");
    }

    #[test]
    fn only_what_a_driver_sees_asks_for_a_new_driver() {
        let with = |desired: &str, register: i64| {
            let visitors = dmi::VisitorConfig {
                config_data: Some(skerry_dmi::box_map(
                    json!({"register": register}).as_object().expect("a map"),
                )),
                ..Default::default()
            };
            let property = dmi::DeviceProperty {
                desired: Some(dmi::TwinProperty {
                    value: desired.to_owned(),
                    ..Default::default()
                }),
                visitors: Some(visitors),
                ..property("set")
            };
            let spec = dmi::DeviceSpec { properties: vec![property], ..Default::default() };
            Device::parse(&dmi::Device { spec: Some(spec), ..Default::default() }, &model())
        };
        assert!(with("1", 4).same_driver(&with("2", 4)));
        assert!(!with("1", 4).same_driver(&with("1", 5)));
    }
}
