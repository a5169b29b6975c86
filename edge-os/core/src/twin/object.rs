//! What the hub says: which devices are here, and what they should be.

use super::mapper::Placed;
use super::payload;
use super::policy::{self, Policies};
use super::value::{DEVICE_BYTES_MAX, Side};
use super::{DEVICES_MAX, Device, DeviceRow, Id, Twin, Weight, topic};
use crate::Now;
use serde_json::{Map, Value, json};
use skerry_protocol::{Message, ResourcePath};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Longest text of a Device or DeviceModel, in bytes; a cluster takes no larger one (1.5 MiB).
const OBJECT_LEN_MAX: usize = 3 * 512 * 1024;

impl Twin {
    pub(super) fn take_object(&mut self, now: Now, path: &ResourcePath, object: &Value) {
        let Some(id) = id_of(path) else { return };
        let text: Arc<str> = slim(object).to_string().into();
        if text.len() > OBJECT_LEN_MAX {
            return self.ignore(&id, "the object is larger than a cluster takes");
        }
        match path.kind() {
            "devicemodel" => {
                if self.objects.models.insert(id.clone(), text.clone()).as_ref() != Some(&text) {
                    self.mappers.model_changed(&id, &self.objects);
                }
            }
            "device" => {
                let wanted = object["spec"]["nodeName"].as_str().unwrap_or_default();
                if wanted != self.node {
                    // It was moved: the delete is on its way or will never come.
                    return self.lose_object(now, path);
                }
                self.take_device(now, id, object, text);
            }
            _ => {}
        }
    }

    fn take_device(&mut self, now: Now, id: Id, object: &Value, text: Arc<str>) {
        let metadata = &object["metadata"];
        let uid = metadata["uid"].as_str().unwrap_or_default().to_owned();
        let version = metadata["resourceVersion"].as_str().and_then(|text| text.parse().ok());
        let version: u64 = version.unwrap_or(0);
        let spec = &object["spec"];
        let model = spec["deviceModelRef"]["name"].as_str().filter(|name| !name.is_empty());
        let model = model.map(|name| Id::from(format!("{}/{name}", namespace(&id))));
        let properties = || spec["properties"].as_array().into_iter().flatten();
        let names = properties().filter_map(|property| property["name"].as_str());
        let policies = metadata["annotations"][policy::ANNOTATION].as_str().map(Policies::parse);
        let policies = policies.transpose().unwrap_or_else(|error| {
            self.ignore(&id, error.to_string());
            None
        });
        let policies = policies.unwrap_or_default();
        let placed = Placed {
            text,
            protocol: spec["protocol"]["protocolName"].as_str().unwrap_or_default().to_owned(),
            model: model.clone(),
            names: names.map(str::to_owned).collect(),
            policies: policies.clone(),
            overrides: BTreeMap::new(),
        };
        // Another device of the same name begins anew.
        if self.devices.get(&id).is_some_and(|device| {
            !device.row.uid.is_empty() && !uid.is_empty() && device.row.uid != uid
        }) {
            self.forget_device(&id);
        }
        let is_new = !self.devices.contains_key(&id);
        if is_new && self.devices.len() >= DEVICES_MAX {
            return self.ignore(&id, format!("{DEVICES_MAX} devices are here already"));
        }
        let old = self.objects.devices.insert(id.clone(), placed);
        if let (Some(old), Some(new)) = (&old, self.objects.devices.get_mut(&id)) {
            new.overrides.clone_from(&old.overrides);
        }
        let old_model = old.as_ref().and_then(|old| old.model.clone());
        let placed = &self.objects.devices[&id];
        if old.as_ref().is_none_or(|old| old.text != placed.text) {
            let models: Vec<&Id> = model.iter().chain(old_model.iter()).collect();
            self.mappers.device_changed(&id, &models);
        }
        if model.is_none() {
            self.ignore(&id, "the device names no model, so its mapper is not told of it");
        }
        let device =
            self.devices.entry(id.clone()).or_insert_with(|| Device::new(DeviceRow::new()));
        let description = metadata["labels"]["description"].as_str().unwrap_or_default();
        let row_changed = device.row.uid != uid || device.row.description != description;
        uid.clone_into(&mut device.row.uid);
        description.clone_into(&mut device.row.description);

        let kinds = self.objects.models.get(model.as_deref().unwrap_or_default());
        let kinds: Value =
            kinds.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        let wanted: BTreeMap<String, (String, Option<String>)> = properties()
            .filter_map(|property| {
                let name = property["name"].as_str()?;
                let desired = &property["desired"];
                let value = desired["value"].as_str().filter(|value| !value.is_empty())?;
                let kind = desired["metadata"]["type"].as_str().or_else(|| {
                    let models = kinds["spec"]["properties"].as_array()?;
                    models.iter().find(|model| model["name"] == name)?["type"].as_str()
                });
                Some((name.to_owned(), (value.to_owned(), kind.map(str::to_owned))))
            })
            .collect();
        let total: usize = wanted.values().map(|(value, _)| value.len()).sum();
        if total > DEVICE_BYTES_MAX {
            return self.ignore(&id, "the wanted values of the device are too long together");
        }
        let policy = |name: &str| policies.of(name);
        let twins = &mut device.row.twins;
        let (document, changed) = twins.desire_by(&wanted, version, now.unix_ms(), policy);
        if changed || row_changed || is_new {
            self.changed(now, &id, Duration::ZERO);
        }
        if is_new {
            self.publish_membership(now, &id, true);
        }
        self.tell_overrides(&id);
        self.publish_document(now, &id, document);
    }

    pub(super) fn lose_object(&mut self, now: Now, path: &ResourcePath) {
        let Some(id) = id_of(path) else { return };
        match path.kind() {
            "devicemodel" => {
                if self.objects.models.remove(&id).is_some() {
                    self.mappers.model_changed(&id, &self.objects);
                }
            }
            "device" => {
                let known = self.objects.devices.remove(&id);
                let model = known.and_then(|placed| placed.model);
                self.mappers.device_changed(&id, &model.iter().collect::<Vec<_>>());
                if self.devices.contains_key(&id) {
                    self.forget_device(&id);
                    self.publish_membership(now, &id, false);
                }
            }
            _ => {}
        }
    }

    /// Rows without an object are of devices that went while nobody looked.
    pub(super) fn restored(&mut self, now: Now) {
        let gone: Vec<Id> = self
            .devices
            .keys()
            .filter(|id| !self.objects.devices.contains_key(*id))
            .cloned()
            .collect();
        for id in gone {
            self.forget_device(&id);
            self.publish_membership(now, &id, false);
        }
        self.mappers.look_at_all(&self.objects);
    }

    fn forget_device(&mut self, id: &Id) {
        if let Some(device) = self.devices.remove(id) {
            if let Some(at) = device.persist_at {
                self.persist.remove(&(at, id.clone()));
            }
            self.reports.forget(id);
            self.removed.insert(id.clone());
        }
    }

    /// Messages of group `twin`.
    pub(super) fn hear_hub(&mut self, now: Now, message: &Message) {
        let Ok(content) = message.content_as::<Value>() else {
            return self.ignore(&message.route.resource, "the content is no JSON");
        };
        let segments: Vec<&str> = message.route.resource.split('/').collect();
        match segments.as_slice() {
            ["membership"] => {
                for (id, description) in payload::members(&content, "added_devices") {
                    self.announce(now, &id, description);
                }
                let removed = payload::members(&content, "removed_devices");
                removed.iter().for_each(|(id, _)| self.revoke(now, id));
            }
            ["membership", "detail"] => {
                let listed = payload::members(&content, "devices");
                let ids: BTreeSet<&str> = listed.iter().map(|(id, _)| id.as_str()).collect();
                let hints: Vec<Id> =
                    self.devices.keys().filter(|id| !ids.contains(&***id)).cloned().collect();
                hints.iter().for_each(|id| self.revoke(now, id));
                for (id, description) in listed {
                    self.announce(now, &id, description);
                }
            }
            ["device", namespace, name, "twin", "cloud_updated"] => {
                self.hear_values(now, &format!("{namespace}/{name}"), &content);
            }
            _ => {
                self.ignore(&message.route.resource, "nothing that this agent knows about devices")
            }
        }
    }

    /// The hub speaks of a device whose object is still on its way: reports about it are good from now on.
    fn announce(&mut self, now: Now, id: &str, description: String) {
        let known = self.devices.contains_key(id);
        let shaped = matches!(id.split('/').collect::<Vec<_>>().as_slice(), [ns, name] if !ns.is_empty() && !name.is_empty());
        if known || !shaped || self.devices.len() >= DEVICES_MAX {
            return;
        }
        let id = Id::from(id);
        let mut device = Device::new(DeviceRow::new());
        device.row.description = description;
        self.devices.insert(id.clone(), device);
        self.removed.remove(&id);
        self.changed(now, &id, Duration::ZERO);
        self.publish_membership(now, &id, true);
    }

    /// Where there is an object it decides, not what the hub says beside.
    fn revoke(&mut self, now: Now, id: &str) {
        let hint = self.devices.contains_key(id) && !self.objects.devices.contains_key(id);
        if hint {
            let id = Id::from(id);
            self.forget_device(&id);
            self.publish_membership(now, &id, false);
        }
    }

    /// Values that the hub wants, each based on the last change of which it knew; one that is based on less loses, and
    /// the hub is told what is.
    fn hear_values(&mut self, now: Now, id: &str, content: &Value) {
        let Some((id, device)) = self.devices.get_key_value(id) else {
            return self.ignore(id, "the hub wants values of a device that is not on this node");
        };
        let id = id.clone();
        let mut twins = device.row.twins.clone();
        let mut document = Map::new();
        let mut stale = false;
        for (name, said) in content["twin"].as_object().into_iter().flatten() {
            let Some((wanted, kind)) = payload::wanted(said) else { continue };
            if wanted.value.len() > super::value::VALUE_LEN_MAX {
                continue;
            }
            if !twins.0.contains_key(name) && twins.0.len() >= super::value::PROPERTIES_MAX {
                continue;
            }
            let property = twins.0.entry(name.clone()).or_default();
            let held = property.expected.as_ref();
            if held.is_some_and(|side| side.cloud > wanted.cloud || side.edge > wanted.edge) {
                property.edge += 1;
                stale = true;
                continue;
            }
            let last = if held.is_some() { property.to_json(false) } else { Value::Null };
            if let Some(kind) = kind.filter(|_| property.edge == 0) {
                property.kind = kind;
            }
            property.deleted = false;
            property.is_local = false;
            property.desired = Some(wanted.value.clone());
            property.expected = Some(Side {
                value: wanted.value,
                timestamp: now.unix_ms(),
                cloud: wanted.cloud,
                edge: wanted.edge,
            });
            let current = property.to_json(false);
            document.insert(name.clone(), json!({"last": last, "current": current}));
        }
        self.devices.get_mut(&id).expect("found just now").row.twins = twins;
        if stale || !document.is_empty() {
            self.changed(now, &id, Duration::ZERO);
        }
        self.publish_document(now, &id, document);
        if stale {
            self.want_report(now, &id, super::REPORT_DELAY);
        }
    }

    pub(super) fn publish_document(&mut self, now: Now, id: &Id, document: Map<String, Value>) {
        if document.is_empty() || !self.has_broker {
            return;
        }
        let event_id = uuid::Uuid::new_v4().to_string();
        let base = payload::Base { event_id: event_id.clone() };
        let document = payload::twin_result(&base, now.unix_ms(), document);
        self.publish(id, "twin/update/document", &document, Weight::Each);
        self.publish_delta(now, id, id);
    }

    /// `place` is how the topic names the device.
    pub(super) fn publish_delta(&mut self, now: Now, id: &Id, place: &str) {
        let device = self.devices.get(id).filter(|_| self.has_broker);
        let delta = device.and_then(|device| device.row.twins.delta());
        if let Some(delta) = delta {
            let event_id = uuid::Uuid::new_v4().to_string();
            let delta = payload::delta(&event_id, now.unix_ms(), delta);
            self.publish(place, "twin/update/delta", &delta, Weight::Latest);
        }
    }

    fn publish_membership(&mut self, now: Now, id: &Id, added: bool) {
        if !self.has_broker {
            return;
        }
        let mut device = json!({"id": &**id, "name": id.split('/').next_back()});
        if let Some(known) = self.devices.get(id)
            && !known.row.description.is_empty()
        {
            device["description"] = known.row.description.as_str().into();
        }
        let (joins, leaves) = match added {
            true => (json!([device]), Value::Null),
            false => (Value::Null, json!([device])),
        };
        let event_id = uuid::Uuid::new_v4().to_string();
        let payload = json!({"event_id": event_id, "timestamp": now.unix_ms(),
            "added_devices": joins, "removed_devices": leaves});
        let topic = format!("{}/{}/membership/updated", topic::NODES, self.node);
        self.outputs.push_back(super::Output::Publish {
            topic,
            payload: payload.to_string().into_bytes(),
            weight: Weight::Each,
        });
    }

    /// Nobody has answered for a mapper for a while: nobody knows how its devices are.
    pub(super) fn lose_mapper(&mut self, now: Now, protocol: &str) {
        let of_protocol: Vec<Id> = self
            .objects
            .devices
            .iter()
            .filter(|(_, placed)| placed.protocol == protocol)
            .map(|(id, _)| id.clone())
            .collect();
        for id in of_protocol {
            let base = payload::Base::default();
            // A state of the list is never refused.
            let _ = self.set_state(now, &id, "unknown", &id.clone(), &base);
        }
    }
}

fn id_of(path: &ResourcePath) -> Option<Id> {
    let name = path.name()?;
    Some(format!("{}/{name}", path.namespace()).into())
}

fn namespace(id: &str) -> &str {
    id.split('/').next().unwrap_or_default()
}

/// The object without what changes without meaning.
fn slim(object: &Value) -> Value {
    let metadata = &object["metadata"];
    json!({
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]},
        "spec": object["spec"], "status": object["status"],
    })
}
