//! Properties of a device as this node knows them, and what a change makes of them.
//!
//! A property has three values: what it is (`actual`, from the mapper or an MQTT client), what it should be
//! (`expected`, from the hub, or set here), and what the mapper has seen of the latter (`observed`). The hub is told the
//! first and the last; it knows what it wants itself.
//!
//! A change counts when something is different. Each local one gets the next number of the property (`edge`), and the
//! number never goes back; the numbers of the hub (`cloud`) are resource versions of the Device.
//!
//! No I/O, no clock. Caller: [`super::Twin`].
//!
//! Source: kubeedge/kubeedge, edge/pkg/devicetwin/dtmanager/twin.go, dttype/types.go.

use super::policy::Policy;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Longest value, in bytes (256 KiB); KubeEdge's is 512.
pub const VALUE_LEN_MAX: usize = 256 * 1024;
/// Longest name of a property, in bytes, as in KubeEdge.
pub const NAME_LEN_MAX: usize = 128;
/// Properties of one device, so that a client that invents names cannot fill the memory.
pub const PROPERTIES_MAX: usize = 1000;
/// Bytes of all values of one device (1 MiB).
pub const DEVICE_BYTES_MAX: usize = 1024 * 1024;

/// One value of a property.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// The value.
    #[serde(rename = "v")]
    pub value: String,
    /// When it was so, Unix milliseconds.
    #[serde(rename = "t")]
    pub timestamp: i64,
    /// Resource version of the Device that wanted it.
    #[serde(rename = "c", default, skip_serializing_if = "is_zero")]
    pub cloud: u64,
    /// Number of the local change that made it.
    #[serde(rename = "e", default, skip_serializing_if = "is_zero")]
    pub edge: u64,
}

/// One property.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Property {
    /// What it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<Side>,
    /// What the mapper, or whoever set it here, says that it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed: Option<Side>,
    /// What it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actual: Option<Side>,
    /// A client of the broker set `expected` since the hub did.
    #[serde(rename = "local", default, skip_serializing_if = "std::ops::Not::not")]
    pub is_local: bool,
    /// A rule of the node set `expected` some time, so the mapper hears of what is set here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_rule: bool,
    /// What the hub wanted last; stays when somebody set something else here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired: Option<String>,
    /// Whether an MQTT client may delete it.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub optional: bool,
    /// Type, as KubeEdge has it in `metadata.type`.
    #[serde(rename = "type", default = "string", skip_serializing_if = "is_string")]
    pub kind: String,
    /// It was deleted; the numbers stay.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
    /// Number of the last local change.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub edge: u64,
    /// Number of the last local change that the hub has confirmed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub told: u64,
    /// The connection in which the hub was told this one twice; see [`super::Twin`] about KubeEdge's cloud.
    #[serde(skip)]
    pub(super) repeated_in: u64,
}

impl Default for Property {
    fn default() -> Self {
        Self {
            expected: None,
            observed: None,
            actual: None,
            is_local: false,
            by_rule: false,
            desired: None,
            optional: true,
            kind: string(),
            deleted: false,
            edge: 0,
            told: 0,
            repeated_in: 0,
        }
    }
}

/// What somebody says of one property. Absent fields are not touched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// What it should be, or what the mapper has seen of that.
    pub expected: Option<String>,
    /// What it is.
    pub actual: Option<String>,
    /// When, by the clock of whoever says it; `None` is now.
    pub timestamp: Option<i64>,
    /// May only become false.
    pub optional: Option<bool>,
    /// Type, for a new property.
    pub kind: Option<String>,
}

/// Who says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A client of the broker: what it wants is wanted, and values must fit the type.
    Client,
    /// A mapper: it reports what it has seen of what is wanted, and any value is taken.
    Mapper,
}

/// Why a message about properties is not taken. Nothing of it is then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// A name with other characters than letters, digits and `-_.,:/@#`, or too long.
    #[error("property name `{0}` is not allowed")]
    Name(String),
    /// Longer than [`VALUE_LEN_MAX`].
    #[error("the value of `{name}` has {len} bytes, the limit is {VALUE_LEN_MAX}")]
    Long {
        /// The property.
        name: String,
        /// Length, in bytes.
        len: usize,
    },
    /// The value is not of the property's type.
    #[error("the value of `{name}` is not of type `{kind}`")]
    Type {
        /// The property.
        name: String,
        /// Its type.
        kind: String,
    },
    /// A type that KubeEdge does not have either.
    #[error("`{name}` has type `{kind}`, which is not known")]
    UnknownType {
        /// The property.
        name: String,
        /// The type.
        kind: String,
    },
    /// A client of the broker wants something else than the hub, and the Device says that the hub decides.
    #[error("the hub decides what `{0}` should be")]
    HubDecides(String),
    /// What is not there cannot be deleted.
    #[error("`{0}` does not exist")]
    Absent(String),
    /// Over [`PROPERTIES_MAX`] or [`DEVICE_BYTES_MAX`].
    #[error("the device has too many properties or too much in them")]
    Full,
}

/// What a message changed, for whoever follows the device.
#[derive(Debug, Default, PartialEq)]
pub struct Applied {
    /// Anything is different.
    pub changed: bool,
    /// Everything that was named, as it is now; null for what was deleted.
    pub result: Map<String, Value>,
    /// What is different: before and after.
    pub document: Map<String, Value>,
}

/// All properties of one device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Properties(pub BTreeMap<String, Property>);

impl Properties {
    /// Takes what a client or mapper says, all or nothing.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing is changed then.
    pub fn apply(
        &mut self,
        origin: Origin,
        changes: &BTreeMap<String, Option<Change>>,
        now_ms: i64,
    ) -> Result<Applied, Refused> {
        self.apply_for(origin, changes, now_ms, true)
    }

    /// The same; without `told` nobody wants to know what changed, only whether.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing is changed then.
    pub fn apply_for(
        &mut self,
        origin: Origin,
        changes: &BTreeMap<String, Option<Change>>,
        now_ms: i64,
        told: bool,
    ) -> Result<Applied, Refused> {
        changes.iter().try_for_each(|(name, change)| self.check(origin, name, change.as_ref()))?;
        self.check_bounds(changes)?;
        let mut applied = Applied::default();
        for (name, change) in changes {
            let before = self.0.get(name).filter(|property| told && !property.deleted).cloned();
            let changed = match (change, self.0.get_mut(name)) {
                (Some(change), Some(property)) => property.apply(origin, change, now_ms),
                (Some(change), None) => {
                    let property = self.0.entry(name.clone()).or_default();
                    property.apply(origin, change, now_ms)
                }
                (None, property) => property.is_some_and(Property::delete),
            };
            applied.changed |= changed;
            if !told {
                continue;
            }
            let after = self.0.get(name).filter(|property| !property.deleted);
            if change.is_some() || changed {
                let now = after.map_or(Value::Null, |property| property.to_json(false));
                applied.result.insert(name.clone(), now);
            }
            if changed {
                let json = |property: Option<&Property>| {
                    property.map_or(Value::Null, |property| property.to_json(false))
                };
                let entry = json!({"last": json(before.as_ref()), "current": json(after)});
                applied.document.insert(name.clone(), entry);
            }
        }
        Ok(applied)
    }

    /// Takes what the hub wants, each property with value and type, all of it at `version` of the Device. What it does
    /// not want any more is wanted no more. Returns what is different, before and after.
    pub fn desire(
        &mut self,
        wanted: &BTreeMap<String, (String, Option<String>)>,
        version: u64,
        now_ms: i64,
    ) -> Map<String, Value> {
        self.desire_by(wanted, version, now_ms, |_| None).0
    }

    /// The same where the Device says who decides. Returns whether anything is to be kept, too.
    pub fn desire_by(
        &mut self,
        wanted: &BTreeMap<String, (String, Option<String>)>,
        version: u64,
        now_ms: i64,
        policy: impl Fn(&str) -> Option<Policy>,
    ) -> (Map<String, Value>, bool) {
        let mut document = Map::new();
        let mut changed = false;
        let gone: Vec<String> = self
            .0
            .iter()
            .filter(|(name, property)| property.desired.is_some() && !wanted.contains_key(*name))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            let property = self.0.get_mut(&name).expect("listed just now");
            let before = property.to_json(false);
            property.desired = None;
            changed = true;
            // What somebody set here since stays.
            if property.expected.take_if(|side| side.cloud > 0).is_some() {
                let current = property.to_json(false);
                document.insert(name, json!({"last": before, "current": current}));
            }
        }
        for (name, (value, kind)) in wanted {
            if value.len() > VALUE_LEN_MAX
                || (!self.0.contains_key(name) && self.0.len() >= PROPERTIES_MAX)
            {
                continue; // an object of the cluster that large is refused there
            }
            let before = self.0.get(name).filter(|property| !property.deleted);
            let is_known = |property: &Property| property.desired.as_ref() == Some(value);
            let policy = policy(name);
            let is_overridden = before.is_some_and(Property::is_overridden);
            let ends = is_overridden && policy == Some(Policy::Hub);
            if before.is_some_and(is_known) && !ends {
                continue;
            }
            changed = true;
            if is_overridden && policy == Some(Policy::Edge) {
                self.0.get_mut(name).expect("overridden").desired = Some(value.clone());
                continue;
            }
            let last = before.map_or(Value::Null, |property| property.to_json(false));
            let property = self.0.entry(name.clone()).or_default();
            if property.deleted || last.is_null() {
                property.deleted = false;
                property.kind = kind.as_deref().map_or_else(string, str::to_lowercase);
            }
            property.is_local = false;
            property.desired = Some(value.clone());
            let edge = property.expected.as_ref().map_or(0, |side| side.edge);
            property.expected =
                Some(Side { value: value.clone(), timestamp: now_ms, cloud: version, edge });
            let current = property.to_json(false);
            document.insert(name.clone(), json!({"last": last, "current": current}));
        }
        (document, changed)
    }

    /// Every property that is not deleted, without versions.
    pub fn to_json(&self) -> Map<String, Value> {
        let live = self.0.iter().filter(|(_, property)| !property.deleted);
        live.map(|(name, property)| (name.clone(), property.to_json(false))).collect()
    }

    /// The properties that should be something, and those of them that are not that; `None` when all are.
    pub fn delta(&self) -> Option<(Map<String, Value>, Map<String, Value>)> {
        let mut twin = Map::new();
        let mut delta = Map::new();
        for (name, property) in self.0.iter().filter(|(_, property)| !property.deleted) {
            let Some(expected) = property.expected.as_ref().filter(|side| !side.value.is_empty())
            else {
                continue;
            };
            twin.insert(name.clone(), property.to_json(false));
            if property.actual.as_ref().map_or("", |side| &side.value) != expected.value {
                delta.insert(name.clone(), expected.value.clone().into());
            }
        }
        (!delta.is_empty()).then_some((twin, delta))
    }

    fn check(&self, origin: Origin, name: &str, change: Option<&Change>) -> Result<(), Refused> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.,:/@#".contains(&byte);
        if name.is_empty() || name.len() > NAME_LEN_MAX || !name.bytes().all(allowed) {
            return Err(Refused::Name(name.chars().take(NAME_LEN_MAX).collect()));
        }
        let known = self.0.get(name).filter(|property| !property.deleted);
        let Some(change) = change else {
            return match known {
                Some(_) => Ok(()),
                None => Err(Refused::Absent(name.into())),
            };
        };
        let kind = match (known, &change.kind) {
            (Some(known), _) => known.kind.as_str(),
            (None, Some(kind)) => kind,
            (None, None) => "string",
        };
        for value in [&change.expected, &change.actual].into_iter().flatten() {
            if value.len() > VALUE_LEN_MAX {
                return Err(Refused::Long { name: name.into(), len: value.len() });
            }
            if origin == Origin::Mapper {
                continue;
            }
            match fits(kind, value) {
                Some(true) => {}
                Some(false) => return Err(Refused::Type { name: name.into(), kind: kind.into() }),
                None => {
                    return Err(Refused::UnknownType { name: name.into(), kind: kind.into() });
                }
            }
        }
        Ok(())
    }

    fn check_bounds(&self, changes: &BTreeMap<String, Option<Change>>) -> Result<(), Refused> {
        let new =
            changes.iter().filter(|(name, change)| change.is_some() && !self.0.contains_key(*name));
        let added: usize = changes
            .values()
            .flatten()
            .flat_map(|change| [&change.expected, &change.actual])
            .flatten()
            .map(String::len)
            .sum();
        // The sum over all values is only looked at when it may matter.
        let held = || -> usize {
            let sides = |property: &Property| {
                let sides = [&property.expected, &property.observed, &property.actual];
                sides.into_iter().flatten().map(|side| side.value.len()).sum::<usize>()
            };
            self.0.values().map(sides).sum()
        };
        let many = self.0.len() + new.count() > PROPERTIES_MAX;
        match many || (added > 1024 && added + held() > DEVICE_BYTES_MAX) {
            true => Err(Refused::Full),
            false => Ok(()),
        }
    }
}

impl Property {
    /// Whether a client of the broker wants something else than the hub.
    pub fn is_overridden(&self) -> bool {
        let wish = self.expected.as_ref().filter(|side| self.is_local && !side.value.is_empty());
        wish.is_some_and(|side| self.desired.as_ref() != Some(&side.value))
    }

    /// Whether the hub does not know the last change.
    pub fn is_dirty(&self) -> bool {
        self.told < self.edge
    }

    /// Returns whether anything is different.
    fn apply(&mut self, origin: Origin, change: &Change, now_ms: i64) -> bool {
        let timestamp = change.timestamp.unwrap_or(now_ms);
        let next = self.edge + 1;
        let fresh = self.edge == 0 && self.expected.is_none() && self.actual.is_none();
        let mut changed = fresh || self.deleted;
        if self.deleted || fresh {
            self.deleted = false;
            self.kind = change.kind.as_deref().map_or_else(string, str::to_lowercase);
        }
        if let Some(value) = &change.actual {
            changed |= set(&mut self.actual, value, timestamp, next);
        }
        if let Some(value) = &change.expected {
            // A mapper that knows nothing of a wanted value says so with an empty one.
            let unset = origin == Origin::Mapper && value.is_empty() && self.observed.is_none();
            if !unset {
                changed |= set(&mut self.observed, value, timestamp, next);
                // A mapper may still repeat what the hub wanted before.
                if origin == Origin::Client || (self.desired.is_none() && !self.is_local) {
                    if let Some(side) = &mut self.expected
                        && side.value != *value
                    {
                        side.cloud = 0;
                    }
                    changed |= set(&mut self.expected, value, timestamp, next);
                    self.is_local = origin == Origin::Client;
                }
            }
        }
        if change.optional == Some(false) && self.optional {
            self.optional = false;
            changed = true;
        }
        if changed {
            self.edge = next;
        }
        changed
    }

    fn delete(&mut self) -> bool {
        if !self.optional || self.deleted {
            return false;
        }
        (self.expected, self.observed, self.actual, self.desired) = (None, None, None, None);
        self.is_local = false;
        self.deleted = true;
        self.edge += 1;
        true
    }

    /// KubeEdge's `MsgTwin`. With `versions` it is what the hub is told: the wanted value is then the observed one.
    pub fn to_json(&self, versions: bool) -> Value {
        let mut twin = Map::new();
        let expected = if versions { &self.observed } else { &self.expected };
        for (name, side) in [("expected", expected), ("actual", &self.actual)] {
            let Some(side) = side else { continue };
            let value = json!({"value": side.value, "metadata": {"timestamp": side.timestamp}});
            twin.insert(name.into(), value);
            if versions {
                let version = json!({"cloud": side.cloud, "edge": side.edge});
                twin.insert(format!("{name}_version"), version);
            }
        }
        twin.insert("optional".into(), self.optional.into());
        let kind = if self.deleted { "deleted" } else { &self.kind };
        twin.insert("metadata".into(), json!({"type": kind}));
        twin.into()
    }
}

fn set(side: &mut Option<Side>, value: &str, timestamp: i64, edge: u64) -> bool {
    match side {
        Some(known) if known.value == value => {
            // Seen again: the time is news, but not worth telling alone.
            known.timestamp = known.timestamp.max(timestamp);
            false
        }
        Some(known) => {
            *known = Side { value: value.into(), timestamp, cloud: known.cloud, edge };
            true
        }
        None => {
            *side = Some(Side { value: value.into(), timestamp, cloud: 0, edge });
            true
        }
    }
}

/// Whether a value is of a type; `None` when there is no such type. Letter case of the type does not matter.
pub fn fits(kind: &str, value: &str) -> Option<bool> {
    Some(match kind.to_lowercase().as_str() {
        "" | "string" | "bytes" | "stream" | "deleted" => true,
        _ if value.is_empty() => true,
        "int" | "integer" => value.parse::<i64>().is_ok(),
        "float" | "double" => value.parse::<f64>().is_ok(),
        "bool" | "boolean" => matches!(value, "true" | "false"),
        _ => return None,
    })
}

fn yes() -> bool {
    true
}

fn is_true(value: &bool) -> bool {
    *value
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

fn string() -> String {
    "string".into()
}

fn is_string(kind: &str) -> bool {
    kind == "string"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn actual(value: &str) -> Option<Change> {
        Some(Change { actual: Some(value.into()), ..Change::default() })
    }

    fn one(name: &str, change: Option<Change>) -> BTreeMap<String, Option<Change>> {
        BTreeMap::from([(name.to_owned(), change)])
    }

    #[test]
    fn the_same_value_again_is_no_change() {
        let mut twin = Properties::default();
        let first = twin.apply(Origin::Client, &one("t", actual("5")), 1).expect("taken");
        assert_eq!(first.document["t"]["last"], Value::Null);
        let edge = twin.0["t"].edge;
        let second = twin.apply(Origin::Client, &one("t", actual("5")), 9).expect("taken");
        assert!(second.document.is_empty());
        assert_eq!(second.result["t"]["actual"]["value"], "5");
        assert_eq!(twin.0["t"].edge, edge);
        let third = twin.apply(Origin::Client, &one("t", actual("6")), 10).expect("taken");
        assert_eq!(third.document["t"]["last"]["actual"]["value"], "5");
        assert_eq!((twin.0["t"].edge, twin.0["t"].is_dirty()), (edge + 1, true));
    }

    #[test]
    fn a_message_is_taken_whole_or_not_at_all() {
        let mut twin = Properties::default();
        let kind = |kind: &str, value: &str| {
            Some(Change { kind: Some(kind.into()), ..actual(value).expect("some") })
        };
        let mut changes = one("a", actual("x"));
        changes.insert("b".into(), kind("INT", "x"));
        let refused = twin.apply(Origin::Client, &changes, 1);
        assert!(matches!(refused, Err(Refused::Type { .. })));
        assert!(twin.0.is_empty());
        assert!(twin.apply(Origin::Mapper, &changes, 1).is_ok());
        for (of, value, good) in [
            ("DOUBLE", "1e3", true),
            ("double", "x", false),
            ("Boolean", "true", true),
            ("BOOLEAN", "yes", false),
            ("bytes", "\u{0}ä {}\"=?", true),
        ] {
            let result = Properties::default().apply(Origin::Client, &one("t", kind(of, value)), 1);
            assert_eq!(result.is_ok(), good, "{of} {value}");
        }
        let odd = Properties::default().apply(Origin::Client, &one("t", kind("colour", "x")), 1);
        assert!(matches!(odd, Err(Refused::UnknownType { .. })));
        let space = Properties::default().apply(Origin::Client, &one("a b", actual("x")), 1);
        assert!(matches!(space, Err(Refused::Name(_))));
    }

    #[test]
    fn bounds_hold() {
        let mut twin = Properties::default();
        let long = "x".repeat(VALUE_LEN_MAX + 1);
        let refused = twin.apply(Origin::Mapper, &one("t", actual(&long)), 1);
        assert!(matches!(refused, Err(Refused::Long { .. })));
        let large = "x".repeat(VALUE_LEN_MAX);
        for index in 0..4 {
            let done = twin.apply(Origin::Mapper, &one(&format!("t{index}"), actual(&large)), 1);
            assert!(done.is_ok());
        }
        let full = twin.apply(Origin::Mapper, &one("t5", actual(&large)), 1);
        assert_eq!(full, Err(Refused::Full));
        let mut many = Properties::default();
        let all = (0..PROPERTIES_MAX).map(|index| (format!("p{index}"), actual("1"))).collect();
        assert!(many.apply(Origin::Mapper, &all, 1).is_ok());
        assert_eq!(many.apply(Origin::Mapper, &one("q", actual("1")), 1), Err(Refused::Full));
    }

    #[test]
    fn what_is_deleted_comes_back_with_the_next_number() {
        let mut twin = Properties::default();
        assert!(matches!(twin.apply(Origin::Client, &one("t", None), 1), Err(Refused::Absent(_))));
        twin.apply(Origin::Client, &one("t", actual("1")), 1).expect("taken");
        let gone = twin.apply(Origin::Client, &one("t", None), 1).expect("taken");
        assert_eq!(
            (&gone.result["t"], &gone.document["t"]["current"]),
            (&Value::Null, &Value::Null)
        );
        assert!(twin.to_json().is_empty());
        let edge = twin.0["t"].edge;
        twin.apply(Origin::Client, &one("t", actual("2")), 1).expect("taken");
        assert!(twin.0["t"].edge > edge);
        let fixed = Change { optional: Some(false), ..Change::default() };
        twin.apply(Origin::Client, &one("t", Some(fixed)), 1).expect("taken");
        let kept = twin.apply(Origin::Client, &one("t", None), 1).expect("silently ignored");
        assert!(kept.result.is_empty() && twin.0["t"].actual.is_some());
    }

    #[test]
    fn what_the_hub_wants_is_wanted_until_it_changes_and_a_late_echo_does_not_undo_it() {
        let mut twin = Properties::default();
        let want = |value: &str| BTreeMap::from([("s".to_owned(), (value.to_owned(), None))]);
        assert_eq!(twin.desire(&want("4"), 10, 1).len(), 1);
        assert!(!twin.0["s"].is_dirty(), "the hub knows what it wants");
        assert_eq!(twin.delta().expect("differs").1["s"], "4");
        let echo = Change { expected: Some("4".into()), ..actual("4").expect("some") };
        twin.apply(Origin::Mapper, &one("s", Some(echo.clone())), 2).expect("taken");
        assert!(twin.delta().is_none() && twin.0["s"].is_dirty());
        assert_eq!(twin.0["s"].to_json(true)["expected"]["value"], "4");
        twin.desire(&want("5"), 11, 3);
        twin.apply(Origin::Mapper, &one("s", Some(echo)), 4).expect("taken");
        assert_eq!(twin.delta().expect("differs").1["s"], "5");
        assert_eq!(
            twin.0["s"].to_json(true)["expected"]["value"],
            "4",
            "seen is still the old one"
        );
        let local = Change { expected: Some("6".into()), ..Change::default() };
        twin.apply(Origin::Client, &one("s", Some(local)), 5).expect("taken");
        assert_eq!(twin.delta().expect("differs").1["s"], "6");
        assert!(twin.desire(&want("5"), 12, 6).is_empty(), "the hub wants nothing new");
        assert_eq!(twin.delta().expect("differs").1["s"], "6");
        assert_eq!(twin.desire(&want("7"), 13, 7).len(), 1);
        assert_eq!(twin.delta().expect("differs").1["s"], "7");
        twin.desire(&BTreeMap::new(), 14, 8);
        assert!(twin.delta().is_none());
    }
}
