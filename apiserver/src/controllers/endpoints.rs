//! Keeps the Endpoints and EndpointSlices of Services.
//!
//! Reads Services, pods and nodes; writes Endpoints and the EndpointSlices with its own `managed-by` label.

use super::cache::{Change, Key, Kind};
use super::cluster::{ClusterError, ENDPOINTS, Resource, SERVICES, SLICES};
use super::{Controller, World};
use serde_json::Value;
use skerry_apiserver_core::workloads::endpoints::{
    MANAGED_BY, MANAGER, SERVICE_LABEL, desired, selector,
};
use skerry_apiserver_core::workloads::object::{is_controlled_by, label, labels, name, namespace};
use std::collections::HashMap;
use std::time::Duration;

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

pub(super) struct Endpoints {
    world: World,
}

impl Endpoints {
    pub(super) fn new(world: &World) -> Self {
        Self { world: world.clone() }
    }

    /// Creates or replaces `wanted`, unless the stored object says the same.
    async fn write(
        &self,
        resource: &Resource,
        wanted: &Value,
        stored: Option<&Value>,
        fields: &[&str],
    ) -> Result<(), ClusterError> {
        let cluster = &self.world.cluster;
        let result = match stored {
            None => cluster.create(resource, wanted).await,
            Some(stored) => {
                let same = |field: &&str| is_same(stored.get(*field), wanted.get(*field));
                if fields.iter().all(same) && labels(stored) == labels(wanted) {
                    return Ok(());
                }
                let mut object = wanted.clone();
                object["metadata"] = stored["metadata"].clone();
                object["metadata"]["labels"] = wanted["metadata"]["labels"].clone();
                cluster.replace(resource, &object).await
            }
        };
        match result {
            Err(error) if error.is_namespace_gone() => Ok(()),
            other => other.map(drop),
        }
    }
}

/// Absent and empty lists are the same.
fn is_same(a: Option<&Value>, b: Option<&Value>) -> bool {
    let empty = |value: Option<&Value>| {
        value.is_none_or(|v| v.is_null() || v.as_array().is_some_and(Vec::is_empty))
    };
    a == b || (empty(a) && empty(b))
}

impl Controller for Endpoints {
    const NAME: &'static str = "endpoints";
    const WORKERS: usize = 2;
    const KIND: Option<Kind> = Some(Kind::Service);

    fn keys(&self, change: &Change<'_>) -> Vec<Key> {
        match change.kind {
            Kind::Service => change.object().map(Key::of).into_iter().collect(),
            Kind::Pod => {
                let Some(pod) = change.object() else { return Vec::new() };
                let shown = |pod: &Value| pod.pointer("/status/podIP").is_some();
                if !change.states().any(shown) {
                    return Vec::new();
                }
                self.world
                    .caches
                    .within(Kind::Service, namespace(pod))
                    .iter()
                    .filter(|service| {
                        selector(service)
                            .is_some_and(|s| change.states().any(|pod| s.matches(labels(pod))))
                    })
                    .map(|service| Key::of(service))
                    .collect()
            }
            _ => Vec::new(),
        }
    }

    async fn sync(&self, key: &Key) -> Result<Option<Duration>, ClusterError> {
        let World { cluster, caches, .. } = &self.world;
        let endpoints = cluster.get(&ENDPOINTS, &key.namespace, &key.name).await?;
        let Some(service) = cluster.get(&SERVICES, &key.namespace, &key.name).await? else {
            // Slices go with their owner; Endpoints have none and go by name.
            if let Some(endpoints) = endpoints {
                cluster.delete(&ENDPOINTS, &endpoints, None).await?;
            }
            return Ok(None);
        };
        let pods = caches.within(Kind::Pod, &key.namespace);
        let zones: HashMap<String, String> = caches
            .all(Kind::Node)
            .iter()
            .filter_map(|node| Some((name(node).to_owned(), label(node, ZONE_LABEL)?.to_owned())))
            .collect();
        let Some(desired) = desired(&service, pods.iter().map(|pod| &**pod), &zones) else {
            return Ok(None);
        };
        self.write(&ENDPOINTS, &desired.endpoints, endpoints.as_ref(), &["subsets"]).await?;
        let query = format!("{SERVICE_LABEL}={},{MANAGED_BY}={MANAGER}", key.name);
        let stored = cluster.list(&SLICES, &key.namespace, &query).await?;
        for slice in &desired.slices {
            let same = stored.iter().find(|stored| name(stored) == name(slice));
            self.write(&SLICES, slice, same, &["endpoints", "ports", "addressType"]).await?;
        }
        for slice in stored.iter().filter(|slice| is_controlled_by(slice, &service)) {
            if !desired.slices.iter().any(|wanted| name(wanted) == name(slice)) {
                cluster.delete(&SLICES, slice, None).await?;
            }
        }
        Ok(None)
    }
}
