//! What the controllers know of the cluster: one watch per kind, shared by all, without what none of them reads.

use super::cluster::{self, Resource};
use kube::core::DynamicObject;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

/// Namespace and name; the namespace is empty for cluster-wide objects.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
}

impl Key {
    pub(super) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    pub(super) fn of(object: &Value) -> Self {
        use skerry_apiserver_core::workloads::object;
        Self::new(object::namespace(object), object::name(object))
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// The kinds that are watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Pod,
    Node,
    Lease,
    ReplicaSet,
    Deployment,
    DaemonSet,
    Job,
    CronJob,
    Service,
}

impl Kind {
    pub(super) const ALL: [Self; 9] = [
        Self::Pod,
        Self::Node,
        Self::Lease,
        Self::ReplicaSet,
        Self::Deployment,
        Self::DaemonSet,
        Self::Job,
        Self::CronJob,
        Self::Service,
    ];

    pub(super) fn resource(self) -> &'static Resource {
        match self {
            Self::Pod => &cluster::PODS,
            Self::Node => &cluster::NODES,
            Self::Lease => &cluster::LEASES,
            Self::ReplicaSet => &cluster::REPLICA_SETS,
            Self::Deployment => &cluster::DEPLOYMENTS,
            Self::DaemonSet => &cluster::DAEMON_SETS,
            Self::Job => &cluster::JOBS,
            Self::CronJob => &cluster::CRON_JOBS,
            Self::Service => &cluster::SERVICES,
        }
    }

    /// The only namespace that is watched, if not all are.
    pub(super) fn namespace(self) -> Option<&'static str> {
        matches!(self, Self::Lease).then_some("kube-node-lease")
    }
}

/// One object changed. `old` is missing when it appeared, `new` when it went.
pub(super) struct Change<'a> {
    pub(super) kind: Kind,
    pub(super) old: Option<&'a Value>,
    pub(super) new: Option<&'a Value>,
}

impl Change<'_> {
    /// The object, as it is or was.
    pub(super) fn object(&self) -> Option<&Value> {
        self.new.or(self.old)
    }

    /// The object in its states that exist.
    pub(super) fn states(&self) -> impl Iterator<Item = &Value> {
        self.old.into_iter().chain(self.new)
    }
}

type Table = BTreeMap<Key, Arc<Value>>;

/// The last seen state of all watched objects.
#[derive(Debug, Default)]
pub(super) struct Caches {
    tables: [RwLock<Table>; Kind::ALL.len()],
}

impl Caches {
    pub(super) fn get(&self, kind: Kind, key: &Key) -> Option<Arc<Value>> {
        self.read(kind).get(key).cloned()
    }

    pub(super) fn all(&self, kind: Kind) -> Vec<Arc<Value>> {
        self.read(kind).values().cloned().collect()
    }

    /// The objects of one namespace.
    pub(super) fn within(&self, kind: Kind, namespace: &str) -> Vec<Arc<Value>> {
        let from = Key::new(namespace, "");
        self.read(kind)
            .range(from..)
            .take_while(|(key, _)| &*key.namespace == namespace)
            .map(|(_, object)| object.clone())
            .collect()
    }

    pub(super) fn keys(&self, kind: Kind) -> Vec<Key> {
        self.read(kind).keys().cloned().collect()
    }

    /// Stores an object; returns what was there.
    pub(super) fn put(&self, kind: Kind, object: Arc<Value>) -> Option<Arc<Value>> {
        self.write(kind).insert(Key::of(&object), object)
    }

    /// Forgets an object; returns what was there.
    pub(super) fn remove(&self, kind: Kind, key: &Key) -> Option<Arc<Value>> {
        self.write(kind).remove(key)
    }

    fn read(&self, kind: Kind) -> std::sync::RwLockReadGuard<'_, Table> {
        // A table is whole after every statement, so that a panic elsewhere does not spoil it.
        self.tables[kind as usize].read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, kind: Kind) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.tables[kind as usize].write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The object as it is kept: without managed fields, and without the parts of its kind that no controller reads from
/// the cache. What a controller writes from, it reads from the API.
pub(super) fn slim(kind: Kind, object: DynamicObject) -> Value {
    let DynamicObject { mut metadata, data, .. } = object;
    metadata.managed_fields = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
    let mut value = data;
    if !value.is_object() {
        value = Value::Object(serde_json::Map::new());
    }
    match kind {
        Kind::Pod => slim_pod(&mut value),
        Kind::Node => {
            keep_out(&mut value, "/status", &["images", "nodeInfo", "volumesInUse", "config"]);
        }
        Kind::ReplicaSet | Kind::Deployment | Kind::DaemonSet | Kind::Job | Kind::CronJob => {
            let selector = value.pointer("/spec/selector").cloned();
            value = serde_json::json!({"spec": {"selector": selector}});
        }
        Kind::Lease | Kind::Service => {}
    }
    value["metadata"] = serde_json::to_value(metadata).unwrap_or_default();
    value
}

fn slim_pod(pod: &mut Value) {
    keep_out(pod, "/spec", &["volumes", "imagePullSecrets", "securityContext", "dnsConfig"]);
    for list in ["/spec/containers", "/spec/initContainers"] {
        for container in pod.pointer_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(container) = container.as_object_mut() {
                container.retain(|field, _| {
                    matches!(field.as_str(), "name" | "resources" | "ports" | "restartPolicy")
                });
            }
        }
    }
    keep_out(pod, "/status", &["initContainerStatuses", "ephemeralContainerStatuses"]);
}

fn keep_out(object: &mut Value, at: &str, fields: &[&str]) {
    if let Some(map) = object.pointer_mut(at).and_then(Value::as_object_mut) {
        for field in fields {
            map.remove(*field);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_cached_pod_keeps_what_the_scheduler_reads_and_nothing_bulky() {
        let pod: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "p", "namespace": "a", "managedFields": [{"manager": "m"}]},
            "spec": {"nodeName": "n", "volumes": [{"name": "v"}],
                "containers": [{"name": "c", "image": "i", "env": [], "ports": [{"hostPort": 1}]}]},
            "status": {"phase": "Running"},
        }))
        .expect("an object");
        let slim = slim(Kind::Pod, pod);
        assert_eq!(
            slim,
            json!({"metadata": {"name": "p", "namespace": "a"},
                "spec": {"nodeName": "n", "containers": [{"name": "c", "ports": [{"hostPort": 1}]}]},
                "status": {"phase": "Running"}})
        );
    }

    #[test]
    fn a_namespace_is_read_alone() {
        let caches = Caches::default();
        for (namespace, name) in [("a", "x"), ("a-b", "y"), ("a", "z"), ("b", "w")] {
            let object = json!({"metadata": {"namespace": namespace, "name": name}});
            caches.put(Kind::Pod, Arc::new(object));
        }
        assert_eq!(caches.within(Kind::Pod, "a").len(), 2);
        assert_eq!(caches.within(Kind::Pod, "c").len(), 0);
    }
}
