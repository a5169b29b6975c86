//! Who decides what a property should be when a client of the broker at the node wants something else than the hub.
//!
//! A Device says it per property in the annotation [`ANNOTATION`]: `{"setpoint": "newest", "*": "hub"}`. Without a word
//! about a property things are as in KubeEdge: a client's wish is told on the broker until the hub wants something new,
//! and no mapper hears of it. With one, a wish that holds reaches the mapper as if the hub had it.
//!
//! | policy | a client's wish | a new wish of the hub |
//! |---|---|---|
//! | `hub` | is refused where the hub wants something else | holds at once |
//! | `newest` | holds | holds at once |
//! | `edge` | holds | waits until the client takes its own back |
//!
//! A client takes its wish back with an empty one; then that of the hub holds again.
//!
//! No I/O, no clock. Caller: [`super::Twin`].

use super::payload::Base;
use super::value::{Change, Origin, Properties, Refused};
use super::{Id, ReportError, Twin};
use crate::Now;
use serde::Deserialize;
use std::collections::BTreeMap;

/// See the head of this file.
pub const ANNOTATION: &str = "fleet.skerry.dev/local-desired";
/// Longest annotation that is read, in bytes.
const LEN_MAX: usize = 64 * 1024;

/// Who decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Whoever speaks at the node.
    Edge,
    /// The hub.
    Hub,
    /// Whoever spoke last.
    Newest,
}

/// What a Device says; `*` stands for all properties that are not named.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Policies(BTreeMap<String, Policy>);

/// Why an annotation is of no use.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "annotation `{ANNOTATION}` is not like `{{\"setpoint\": \"newest\"}}` with edge, hub or newest: {0}"
)]
pub struct PolicyError(String);

impl Policies {
    /// Reads the annotation.
    ///
    /// # Errors
    ///
    /// [`PolicyError`].
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        if text.len() > LEN_MAX {
            return Err(PolicyError("it is too long".into()));
        }
        serde_json::from_str(text).map_err(|error| PolicyError(error.to_string()))
    }

    /// What was said of a property.
    pub fn of(&self, property: &str) -> Option<Policy> {
        self.0.get(property).or_else(|| self.0.get("*")).copied()
    }

    /// Puts the policies into what a client says. An empty wish becomes the hub's.
    pub(super) fn check(
        &self,
        twins: &Properties,
        changes: &BTreeMap<String, Option<Change>>,
    ) -> Result<BTreeMap<String, Option<Change>>, Refused> {
        let mut checked = changes.clone();
        for (name, change) in &mut checked {
            let Some(change) = change else { continue };
            let (Some(wish), Some(policy)) = (&change.expected, self.of(name)) else { continue };
            let of_hub = twins.0.get(name).and_then(|property| property.desired.as_ref());
            match (policy, of_hub) {
                (Policy::Hub, Some(of_hub)) if of_hub != wish => {
                    return Err(Refused::HubDecides(name.clone()));
                }
                (_, Some(of_hub)) if wish.is_empty() => change.expected = Some(of_hub.clone()),
                _ => {}
            }
        }
        Ok(checked)
    }

    /// Wishes of clients that hold, and of which the mapper is to hear.
    pub(super) fn overrides(&self, twins: &Properties) -> BTreeMap<String, String> {
        let held = twins.0.iter().filter_map(|(name, property)| {
            let policy = self.of(name).or(property.by_rule.then_some(Policy::Newest));
            policy.filter(|policy| *policy != Policy::Hub || property.desired.is_none())?;
            let side = property.expected.as_ref().filter(|_| property.is_overridden())?;
            Some((name.clone(), side.value.clone()))
        });
        held.collect()
    }
}

impl Twin {
    /// What a client of the broker says, as the policies of the device have it.
    pub(super) fn allowed(
        &self,
        id: &Id,
        origin: Origin,
        changes: &BTreeMap<String, Option<Change>>,
    ) -> Result<Option<BTreeMap<String, Option<Change>>>, Refused> {
        let policies = self.objects.devices.get(id).map(|placed| &placed.policies);
        let policies = policies.filter(|policies| !policies.0.is_empty());
        match (origin, policies, self.devices.get(id)) {
            (Origin::Client, Some(policies), Some(device)) => {
                policies.check(&device.row.twins, changes).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// A rule of the node wants this of a property, as a client of the broker would, and its mapper hears of it. An empty
    /// value takes that back.
    ///
    /// # Errors
    ///
    /// [`ReportError`]; nothing is changed then.
    pub fn wish(
        &mut self,
        now: Now,
        id: &str,
        property: &str,
        value: &str,
    ) -> Result<(), ReportError> {
        let unknown = || ReportError::Unknown(id.into());
        let (id, device) = self.devices.get_key_value(id).ok_or_else(unknown)?;
        let id = id.clone();
        let placed = self.objects.devices.get(&id).ok_or_else(unknown)?;
        if !placed.names.iter().any(|name| name == property) {
            return Err(Refused::Absent(property.into()).into());
        }
        let of_hub = device.row.twins.0.get(property).and_then(|known| known.desired.clone());
        let value = match value.is_empty() {
            true => of_hub.unwrap_or_default(),
            false => value.to_owned(),
        };
        let change = Change { expected: Some(value), ..Change::default() };
        let changes = BTreeMap::from([(property.to_owned(), Some(change))]);
        self.update(now, &id, Origin::Client, &changes, &id.clone(), &Base::default())?;
        let device = self.devices.get_mut(&id);
        if let Some(known) = device.and_then(|device| device.row.twins.0.get_mut(property)) {
            known.by_rule = true;
        }
        self.tell_overrides(&id);
        Ok(())
    }

    /// Lets the mapper know of wishes at the node that hold now, or do not any more.
    pub(super) fn tell_overrides(&mut self, id: &Id) {
        let Some(device) = self.devices.get(id) else { return };
        let Some(placed) = self.objects.devices.get_mut(id) else { return };
        let overrides = placed.policies.overrides(&device.row.twins);
        if placed.overrides != overrides {
            placed.overrides = overrides;
            self.mappers.device_changed(id, &[]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn policies(text: &str) -> Policies {
        Policies::parse(text).expect(text)
    }

    fn wish(value: &str) -> BTreeMap<String, Option<Change>> {
        let change = Change { expected: Some(value.into()), ..Change::default() };
        BTreeMap::from([("t".to_owned(), Some(change))])
    }

    fn hub(value: &str) -> BTreeMap<String, (String, Option<String>)> {
        BTreeMap::from([("t".to_owned(), (value.to_owned(), None))])
    }

    /// A client says it; returns whether it was taken.
    fn say(twins: &mut Properties, policies: &Policies, value: &str, now_ms: i64) -> bool {
        let Ok(checked) = policies.check(twins, &wish(value)) else { return false };
        twins.apply(Origin::Client, &checked, now_ms).expect("fits");
        true
    }

    fn desire(twins: &mut Properties, policies: &Policies, value: &str, version: u64) {
        twins.desire_by(&hub(value), version, 0, |name| policies.of(name));
    }

    fn expected(twins: &Properties) -> &str {
        twins.0["t"].expected.as_ref().map_or("", |side| side.value.as_str())
    }

    #[test]
    fn annotations_are_read_or_say_what_is_wrong() {
        let both = policies(r#"{"t": "edge", "*": "hub"}"#);
        assert_eq!((both.of("t"), both.of("x")), (Some(Policy::Edge), Some(Policy::Hub)));
        assert_eq!(policies("{}").of("t"), None);
        let error = Policies::parse(r#"{"t": "cloud"}"#).expect_err("no policy").to_string();
        assert!(error.contains("edge, hub or newest"), "{error}");
        assert!(Policies::parse("edge").is_err());
    }

    #[test]
    fn where_the_hub_decides_a_client_is_refused_unless_the_hub_wants_nothing() {
        let mine = policies(r#"{"t": "hub"}"#);
        let mut twins = Properties::default();
        assert!(say(&mut twins, &mine, "5", 1));
        assert_eq!(mine.overrides(&twins).len(), 1);
        desire(&mut twins, &mine, "4", 1);
        assert_eq!(expected(&twins), "4");
        assert!(!say(&mut twins, &mine, "5", 2));
        assert!(say(&mut twins, &mine, "4", 2), "the same is no contradiction");
        assert!(mine.overrides(&twins).is_empty());
    }

    #[test]
    fn where_the_edge_decides_the_hub_waits_until_the_wish_is_taken_back() {
        let mine = policies(r#"{"t": "edge"}"#);
        let mut twins = Properties::default();
        desire(&mut twins, &mine, "4", 1);
        assert!(say(&mut twins, &mine, "5", 1));
        desire(&mut twins, &mine, "6", 2);
        assert_eq!((expected(&twins), twins.0["t"].desired.as_deref()), ("5", Some("6")));
        assert_eq!(mine.overrides(&twins)["t"], "5");
        assert!(say(&mut twins, &mine, "", 2));
        assert_eq!(expected(&twins), "6");
        assert!(mine.overrides(&twins).is_empty());
        desire(&mut twins, &mine, "7", 3);
        assert_eq!(expected(&twins), "7");
    }

    #[test]
    fn what_a_mapper_repeats_is_no_wish_of_the_edge() {
        let mine = policies(r#"{"t": "edge"}"#);
        let mut twins = Properties::default();
        twins.apply(Origin::Mapper, &wish("3"), 0).expect("taken");
        desire(&mut twins, &mine, "4", 1);
        assert_eq!(expected(&twins), "4");
    }

    #[test]
    fn a_policy_that_becomes_that_of_the_hub_ends_what_clients_wanted() {
        let mut twins = Properties::default();
        let before = policies(r#"{"t": "newest"}"#);
        desire(&mut twins, &before, "4", 1);
        assert!(say(&mut twins, &before, "5", 1));
        desire(&mut twins, &policies(r#"{"t": "hub"}"#), "4", 2);
        assert_eq!(expected(&twins), "4");
    }

    proptest! {
        /// Against a model of one line per policy.
        #[test]
        fn any_sequence_ends_as_the_policy_says(
            steps in prop::collection::vec((any::<bool>(), 0_u32..4), 1..40),
            which in 0_usize..3,
        ) {
            let (policy, name) =
                [(Policy::Edge, "edge"), (Policy::Hub, "hub"), (Policy::Newest, "newest")][which];
            let mine = policies(&format!(r#"{{"t": "{name}"}}"#));
            let mut twins = Properties::default();
            desire(&mut twins, &mine, "9", 1);
            let (mut of_hub, mut local): (String, Option<String>) = ("9".into(), None);
            for (version, (is_hub, value)) in steps.into_iter().enumerate() {
                // 0 of a client takes its wish back; the hub always wants something here.
                let text = if value == 0 && !is_hub { String::new() } else { value.to_string() };
                if is_hub {
                    let is_new = text != of_hub;
                    desire(&mut twins, &mine, &text, version as u64 + 2);
                    if policy == Policy::Hub || (policy == Policy::Newest && is_new) {
                        local = None;
                    }
                    of_hub = text;
                } else {
                    let taken = say(&mut twins, &mine, &text, 0);
                    prop_assert_eq!(taken, policy != Policy::Hub || text == of_hub);
                    if taken {
                        local = Some(text).filter(|text| !text.is_empty());
                    }
                }
                // What both want is nobody's contradiction any more.
                local = local.filter(|local| *local != of_hub);
                prop_assert_eq!(expected(&twins), local.as_ref().unwrap_or(&of_hub));
                prop_assert_eq!(mine.overrides(&twins).remove("t"), local.clone());
            }
        }
    }
}
