//! What clients of the broker ask for, and the answers.

use super::payload::{self, Base};
use super::topic::{self, Place, Request};
use super::value::{Applied, Change, Origin};
use super::{Id, Output, REPORT_DELAY, ReportError, STATES, Twin, Weight};
use crate::Now;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// Why nothing came of a request, as KubeEdge says it in its code.
const BAD: u16 = 400;
const UNKNOWN: u16 = 404;

impl Twin {
    pub(super) fn hear_broker(&mut self, now: Now, topic: String, payload: Vec<u8>) {
        match topic::parse(&topic) {
            Request::Upload => {
                if payload.len() > payload::PAYLOAD_LEN_MAX {
                    return self.ignore(&topic, "the message is too long for the cloud");
                }
                self.outputs.push_back(Output::Upload { topic, payload });
            }
            Request::Unknown => self.ignore(&topic, "nothing that is taken from the broker"),
            Request::MembershipGet => self.answer_membership(now, &payload),
            Request::TwinUpdate(place) => self.answer_update(now, place, &payload),
            Request::TwinGet(place) => self.answer_get(now, place, &payload),
            Request::StateUpdate(place) => self.answer_state(now, place, &payload),
        }
    }

    /// The device that a topic names. A name alone is good when one device has it.
    fn find(&self, place: Place<'_>) -> Option<Id> {
        match place {
            Place::Device { .. } => {
                self.devices.get_key_value(place.to_string().as_str()).map(|(id, _)| id.clone())
            }
            Place::Legacy(name) => {
                let mut named = self
                    .devices
                    .keys()
                    .filter(|id| id.split_once('/').is_some_and(|(_, device)| device == name));
                let found = named.next().cloned();
                found.filter(|_| named.next().is_none())
            }
        }
    }

    fn answer_update(&mut self, now: Now, place: Place<'_>, payload: &[u8]) {
        const RESULT: &str = "twin/update/result";
        let place_text = place.to_string();
        let read = payload::read(payload);
        let base = read.as_ref().map(|(base, _)| base.clone()).unwrap_or_default();
        let changes = read.and_then(|(_, object)| payload::twin(&object));
        let changes = match changes {
            Ok(changes) => changes,
            Err(error) => {
                let answer = payload::error(&base, now.unix_ms(), BAD, &error.to_string());
                return self.publish(&place_text, RESULT, &answer, Weight::Each);
            }
        };
        let Some(id) = self.find(place) else {
            let reason = "update rejected due to the device is not existed";
            let answer = payload::error(&base, now.unix_ms(), UNKNOWN, reason);
            return self.publish(&place_text, RESULT, &answer, Weight::Each);
        };
        if let Err(error) = self.update(now, &id, Origin::Client, &changes, &place_text, &base) {
            let answer = payload::error(&base, now.unix_ms(), BAD, &error.to_string());
            self.publish(&place_text, RESULT, &answer, Weight::Each);
        }
    }

    /// Takes values of a device, and tells everybody. `place` is how topics are to name the device.
    pub(super) fn update(
        &mut self,
        now: Now,
        id: &Id,
        origin: Origin,
        changes: &BTreeMap<String, Option<Change>>,
        place: &str,
        base: &Base,
    ) -> Result<(), ReportError> {
        let allowed = self.allowed(id, origin, changes)?;
        let changes = allowed.as_ref().unwrap_or(changes);
        let Some(device) = self.devices.get_mut(id) else {
            return Err(ReportError::Unknown(id.to_string()));
        };
        let (twins, told) = (&mut device.row.twins, self.has_broker);
        let Applied { changed, result, document } =
            twins.apply_for(origin, changes, now.unix_ms(), told)?;
        if self.is_followed {
            let actual = |(name, change): (&String, &Option<Change>)| {
                let change = change.as_ref()?;
                let at = change.timestamp.unwrap_or(now.unix_ms());
                Some((name.clone(), change.actual.clone()?, at))
            };
            let values: Vec<_> = changes.iter().filter_map(actual).collect();
            if !values.is_empty() {
                self.outputs.push_back(Output::Reported { id: id.clone(), values });
            }
        }
        // Nobody waits for the answer to a mapper's report; KubeEdge gives one for what it took.
        if told && (origin == Origin::Client || changed) {
            let answer = payload::twin_result(base, now.unix_ms(), result);
            self.publish(place, "twin/update/result", &answer, Weight::Each);
        }
        if !changed {
            return Ok(());
        }
        // What somebody wants of a device is not as cheap to say again as what it is.
        let wants = origin == Origin::Client
            && changes
                .values()
                .any(|change| change.as_ref().is_none_or(|change| change.expected.is_some()));
        self.changed(now, id, if wants { Duration::ZERO } else { super::PERSIST_DELAY });
        if wants {
            self.tell_overrides(id);
        }
        if told {
            let document = payload::twin_result(base, now.unix_ms(), document);
            self.publish(place, "twin/update/document", &document, Weight::Each);
            self.publish_delta(now, id, place);
        }
        self.want_report(now, id, REPORT_DELAY);
        Ok(())
    }

    fn answer_get(&mut self, now: Now, place: Place<'_>, payload: &[u8]) {
        let place_text = place.to_string();
        let answer = match (payload::read(payload), self.find(place)) {
            (Err(error), _) => {
                payload::error(&Base::default(), now.unix_ms(), BAD, &error.to_string())
            }
            (Ok((base, _)), None) => {
                payload::error(&base, now.unix_ms(), UNKNOWN, "Device not found")
            }
            (Ok((base, _)), Some(id)) => {
                let twins = self.devices[&id].row.twins.to_json();
                payload::twin_result(&base, now.unix_ms(), twins)
            }
        };
        self.publish(&place_text, "twin/get/result", &answer, Weight::Each);
    }

    fn answer_state(&mut self, now: Now, place: Place<'_>, payload: &[u8]) {
        let place_text = place.to_string();
        let read = payload::read(payload);
        let said = read.and_then(|(base, object)| {
            payload::state(&object).map(|state| (base, state.to_owned()))
        });
        // KubeEdge is silent about what it does not take here, and so are we, but not in the log.
        let done = match said {
            Err(error) => Err(error.to_string()),
            Ok((base, state)) => match self.find(place) {
                None => Err("the device is not on this node".into()),
                Some(id) => self
                    .set_state(now, &id, &state, &place_text, &base)
                    .map_err(|error| error.to_string()),
            },
        };
        if let Err(reason) = done {
            self.ignore(&format!("{place_text}/state/update"), reason);
        }
    }

    pub(super) fn set_state(
        &mut self,
        now: Now,
        id: &Id,
        state: &str,
        place: &str,
        base: &Base,
    ) -> Result<(), ReportError> {
        let wanted = state.to_lowercase();
        // The word of KubeEdge's own mapper framework, which its edge does not know.
        let wanted = if wanted == "disconnected" { "offline".into() } else { wanted };
        if !STATES.contains(&wanted.as_str()) {
            return Err(ReportError::State(state.chars().take(64).collect()));
        }
        let Some(device) = self.devices.get_mut(id) else {
            return Err(ReportError::Unknown(id.to_string()));
        };
        let row = &mut device.row;
        let changed = row.state != wanted;
        let online = matches!(wanted.as_str(), "online" | "ok");
        if changed {
            row.state_edge += 1;
            row.state.clone_from(&wanted);
            row.last_online = if online {
                now.wall.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
            } else {
                String::new()
            };
        }
        let name = id.split('/').next_back().unwrap_or_default();
        let answer =
            payload::state_message(&base.event_id, now.unix_ms(), name, &wanted, &row.last_online);
        self.publish(place, "state/update/result", &answer, Weight::Each);
        if changed {
            self.changed(now, id, Duration::ZERO);
            self.want_report(now, id, REPORT_DELAY);
        }
        Ok(())
    }

    fn answer_membership(&mut self, now: Now, payload: &[u8]) {
        let answer = match payload::read(payload) {
            Err(error) => payload::error(&Base::default(), now.unix_ms(), BAD, &error.to_string()),
            Ok((base, _)) => {
                let devices: Vec<Value> = self
                    .devices
                    .iter()
                    .map(|(id, device)| {
                        let row = &device.row;
                        json!({"id": &**id, "name": id.split('/').next_back(),
                            "description": row.description, "state": row.state,
                            "last_online": row.last_online})
                    })
                    .collect();
                json!({"event_id": base.event_id, "timestamp": now.unix_ms(), "devices": devices})
            }
        };
        let topic = format!("{}/{}/membership/get/result", topic::NODES, self.node);
        let payload = answer.to_string().into_bytes();
        self.outputs.push_back(Output::Publish { topic, payload, weight: Weight::Each });
    }
}
