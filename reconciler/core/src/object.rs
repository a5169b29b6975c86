//! Identity, order and digest of Kubernetes objects.

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::fmt;

/// Identity of an object in a cluster. The version is not part of it: the same object is served at several.
///
/// Sorted in the order in which objects are applied: what others need comes first (namespaces, definitions, accounts,
/// configuration, then workloads). Prunes go the other way.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    rank: u8,
    /// API group; empty for the core group.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Namespace; empty for a cluster-scoped object.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// Kinds in the order in which they are applied; what is not listed comes after the configuration, before workloads.
const ORDER: [&str; 15] = [
    "Namespace",
    "CustomResourceDefinition",
    "PriorityClass",
    "StorageClass",
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "ResourceQuota",
    "LimitRange",
    "ConfigMap",
    "Secret",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "Service",
    "DeviceModel",
];
const WORKLOADS: [&str; 9] = [
    "DaemonSet",
    "Pod",
    "ReplicationController",
    "ReplicaSet",
    "Deployment",
    "StatefulSet",
    "Job",
    "CronJob",
    "HorizontalPodAutoscaler",
];
const RANK_OTHER: u8 = 50;
const RANK_WORKLOADS: u8 = 100;

/// Cluster-scoped kinds of Kubernetes itself, with their group.
const CLUSTER_SCOPED: [(&str, &str); 22] = [
    ("", "Namespace"),
    ("", "Node"),
    ("", "PersistentVolume"),
    ("admissionregistration.k8s.io", "MutatingWebhookConfiguration"),
    ("admissionregistration.k8s.io", "ValidatingAdmissionPolicy"),
    ("admissionregistration.k8s.io", "ValidatingAdmissionPolicyBinding"),
    ("admissionregistration.k8s.io", "ValidatingWebhookConfiguration"),
    ("apiextensions.k8s.io", "CustomResourceDefinition"),
    ("apiregistration.k8s.io", "APIService"),
    ("certificates.k8s.io", "CertificateSigningRequest"),
    ("flowcontrol.apiserver.k8s.io", "FlowSchema"),
    ("flowcontrol.apiserver.k8s.io", "PriorityLevelConfiguration"),
    ("networking.k8s.io", "IngressClass"),
    ("networking.k8s.io", "ServiceCIDR"),
    ("node.k8s.io", "RuntimeClass"),
    ("rbac.authorization.k8s.io", "ClusterRole"),
    ("rbac.authorization.k8s.io", "ClusterRoleBinding"),
    ("reliablesyncs.kubeedge.io", "ClusterObjectSync"),
    ("scheduling.k8s.io", "PriorityClass"),
    ("storage.k8s.io", "CSIDriver"),
    ("storage.k8s.io", "StorageClass"),
    ("storage.k8s.io", "VolumeAttachment"),
];

/// Whether a kind is known to have no namespace. Custom kinds are not known here; the API says so when it is asked.
pub fn is_cluster_scoped(group: &str, kind: &str) -> bool {
    CLUSTER_SCOPED.contains(&(group, kind))
}

/// Why a value names no Kubernetes object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is missing or no text")]
pub struct InvalidObject(pub &'static str);

impl ObjectId {
    /// The identity made of these parts; `api_version` is `v1` or `group/version`.
    pub fn new(api_version: &str, kind: &str, namespace: &str, name: &str) -> Self {
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        Self {
            rank: rank(kind),
            group: group.to_owned(),
            kind: kind.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }

    /// The identity of an object.
    ///
    /// # Errors
    ///
    /// [`InvalidObject`] with the field that is missing.
    pub fn of(object: &Value) -> Result<Self, InvalidObject> {
        let text =
            |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let api_version = text(&object["apiVersion"]).ok_or(InvalidObject("apiVersion"))?;
        let kind = text(&object["kind"]).ok_or(InvalidObject("kind"))?;
        let name = text(&object["metadata"]["name"]).ok_or(InvalidObject("metadata.name"))?;
        let namespace = text(&object["metadata"]["namespace"]).unwrap_or_default();
        Ok(Self::new(&api_version, &kind, &namespace, &name))
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

fn rank(kind: &str) -> u8 {
    let find = |list: &[&str], base: u8| {
        let position = list.iter().position(|known| *known == kind)?;
        Some(base + u8::try_from(position).expect("the lists are shorter than 50"))
    };
    find(&ORDER, 0).or_else(|| find(&WORKLOADS, RANK_WORKLOADS)).unwrap_or(RANK_OTHER)
}

/// SHA-256 over the canonical JSON (sorted keys) of what was rendered, hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(String);

impl Digest {
    /// Digest of one value. `serde_json` keeps maps sorted in this workspace, so equal values have equal digests.
    pub fn of(value: &Value) -> Self {
        Self::of_parts([value.to_string().as_bytes()])
    }

    /// Digest over several parts, each with its length, so that the borders count.
    pub fn of_parts<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        Self(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// A digest that was stored earlier; `""` equals no digest that is computed.
    pub fn stored(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Hexadecimal.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_others_need_sorts_first() {
        let id = |api_version: &str, kind: &str| ObjectId::new(api_version, kind, "n", "x");
        let mut ids = [
            id("batch/v1", "CronJob"),
            id("apps/v1", "Deployment"),
            id("example.com/v1", "Widget"),
            id("v1", "Service"),
            id("v1", "ConfigMap"),
            id("v1", "ServiceAccount"),
            id("v1", "Namespace"),
        ];
        ids.sort();
        let kinds: Vec<_> = ids.iter().map(|id| id.kind.as_str()).collect();
        assert_eq!(
            kinds,
            [
                "Namespace",
                "ServiceAccount",
                "ConfigMap",
                "Service",
                "Widget",
                "Deployment",
                "CronJob"
            ]
        );
    }

    #[test]
    fn identity_ignores_the_version_and_needs_a_name() {
        let object = |api_version: &str| json!({"apiVersion": api_version, "kind": "X", "metadata": {"name": "a"}});
        assert_eq!(ObjectId::of(&object("g/v1")), ObjectId::of(&object("g/v2")));
        assert_ne!(ObjectId::of(&object("g/v1")), ObjectId::of(&object("h/v1")));
        assert_eq!(
            ObjectId::of(&json!({"apiVersion": "v1", "kind": "X"})),
            Err(InvalidObject("metadata.name"))
        );
    }

    #[test]
    fn the_order_of_keys_does_not_change_a_digest_and_a_value_does() {
        let digest = |text: &str| Digest::of(&serde_json::from_str(text).unwrap());
        assert_eq!(digest(r#"{"a":1,"b":2}"#), digest(r#"{"b":2,"a":1}"#));
        assert_ne!(digest(r#"{"a":1}"#), digest(r#"{"a":2}"#));
        assert_eq!(digest("{}").as_str().len(), 64);
        assert_ne!(Digest::of_parts([&b"ab"[..], b"c"]), Digest::of_parts([&b"a"[..], b"bc"]));
    }
}
