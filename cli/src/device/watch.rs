//! `skerry device watch`: a line per change, from one watch on DeviceStatus.

use super::{Name, api, view};
use crate::fault::hinted;
use crate::{Output, out};
use anyhow::Result;
use futures::StreamExt;
use kube::api::DynamicObject;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use skerry_api::fleet::v1alpha1::site_namespace;
use std::collections::BTreeMap;
use std::process::ExitCode;

/// Failures in a row after which the watch is given up.
const FAILURES_MAX: u32 = 10;

/// Prints what is known now, then each change.
pub(super) async fn run(client: &Client, what: Option<&str>, output: Output) -> Result<ExitCode> {
    let (site, device) = match what {
        None => (None, None),
        Some(text) if text.contains('/') => {
            let name: Name = text.parse().map_err(anyhow::Error::msg)?;
            (Some(name.site), Some(name.device))
        }
        Some(site) => (Some(site.to_owned()), None),
    };
    let namespace = site.as_deref().map(site_namespace);
    let statuses = api(client, "DeviceStatus", "devicestatuses", namespace.as_deref());
    // Says at once what a watch would only repeat: no rights, no such kind.
    statuses
        .list(&kube::api::ListParams::default().limit(1))
        .await
        .map_err(|error| super::not_served(error, "devicestatuses"))?;
    let mut config = watcher::Config::default();
    if let Some(device) = &device {
        config = config.fields(&format!("metadata.name={device}"));
    }
    let mut events = std::pin::pin!(watcher(statuses, config));
    let mut seen = Seen::default();
    let mut failures = 0;
    while let Some(event) = events.next().await {
        let changes = match event {
            Ok(Event::Apply(status) | Event::InitApply(status)) => seen.changes(&status),
            Ok(Event::Delete(status)) => {
                seen.forget(&status);
                Vec::new()
            }
            Ok(Event::Init | Event::InitDone) => Vec::new(),
            Err(error) => {
                failures += 1;
                if failures >= FAILURES_MAX {
                    let hint = "is the cluster still there? `skerry status` asks it";
                    return Err(hinted(format!("the watch ended: {error}"), hint));
                }
                continue;
            }
        };
        failures = 0;
        for change in changes {
            match output {
                Output::Json => out::line(json!({
                    "site": change.site, "device": change.device, "property": change.property, "value": change.value,
                }))?,
                Output::Table => {
                    let Change { site, device, property, value } = &change;
                    let property = property.as_deref().unwrap_or("state");
                    out::line(format_args!("{}  {site}/{device}  {property}  {value}", now()))?;
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What was printed last, per device and property; no property stands for the state.
#[derive(Default)]
struct Seen {
    values: BTreeMap<(String, String), BTreeMap<Option<String>, String>>,
}

/// One thing that is another one now.
#[derive(Debug, PartialEq, Eq)]
struct Change {
    site: String,
    device: String,
    property: Option<String>,
    value: String,
}

impl Seen {
    fn changes(&mut self, status: &DynamicObject) -> Vec<Change> {
        let namespace = status.namespace().unwrap_or_default();
        let site = namespace.strip_prefix("site-").unwrap_or(&namespace).to_owned();
        let device = status.name_any();
        let mut now: Vec<(Option<String>, String)> = Vec::new();
        if let Some(state) = status.data.pointer("/status/state").and_then(Value::as_str) {
            now.push((None, state.to_owned()));
        }
        for twin in view::twins(Some(&status.data)) {
            let property = view::text(twin.get("propertyName"));
            now.push((Some(property), view::text(twin.pointer("/reported/value"))));
        }
        let seen = self.values.entry((namespace, device.clone())).or_default();
        let mut changes = Vec::new();
        for (property, value) in now {
            if seen.get(&property) != Some(&value) {
                seen.insert(property.clone(), value.clone());
                changes.push(Change {
                    site: site.clone(),
                    device: device.clone(),
                    property,
                    value,
                });
            }
        }
        changes
    }

    fn forget(&mut self, status: &DynamicObject) {
        self.values.remove(&(status.namespace().unwrap_or_default(), status.name_any()));
    }
}

fn now() -> String {
    jiff::Timestamp::now().strftime("%H:%M:%S").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_printed() {
        let status = |state: &str, value: &str| -> DynamicObject {
            serde_json::from_value(json!({
                "metadata": {"name": "fridge", "namespace": "site-a"},
                "status": {"state": state, "twins": [{"propertyName": "t", "reported": {"value": value}}]},
            }))
            .expect("an object")
        };
        let mut seen = Seen::default();
        assert_eq!(seen.changes(&status("online", "4")).len(), 2);
        assert_eq!(seen.changes(&status("online", "4")), []);
        let changes = seen.changes(&status("online", "5"));
        assert_eq!(changes.len(), 1);
        assert_eq!((changes[0].property.as_deref(), changes[0].value.as_str()), (Some("t"), "5"));
        seen.forget(&status("online", "5"));
        assert_eq!(seen.changes(&status("online", "5")).len(), 2);
    }
}
