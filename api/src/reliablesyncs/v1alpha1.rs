//! `reliablesyncs.kubeedge.io/v1alpha1`: ObjectSync (namespaced objects) and ClusterObjectSync (cluster-scoped ones).
//!
//! One object per node and synchronised object, named `<node>.<uid of the object>`; the status holds the last
//! resource version that the node acknowledged. Go CloudCore reads and writes the same objects.
//!
//! Source: kubeedge/kubeedge, staging/src/github.com/kubeedge/api/apis/reliablesyncs/v1alpha1/type.go, build/crds/reliablesyncs.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// API group.
pub const GROUP: &str = "reliablesyncs.kubeedge.io";
/// Version.
pub const VERSION: &str = "v1alpha1";
/// `status.objectResourceVersion` before the first acknowledgement.
pub const NEVER_ACKED: &str = "0";

/// Delivery state of a namespaced object to one node; in the namespace of that object.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectSync {
    /// Object metadata; see [`object_sync_name`].
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// Which object.
    #[serde(default)]
    pub spec: ObjectSyncSpec,
    /// What the node has acknowledged.
    #[serde(default)]
    pub status: Option<ObjectSyncStatus>,
}

/// Delivery state of a cluster-scoped object to one node.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterObjectSync {
    /// Object metadata; see [`object_sync_name`].
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// Which object.
    #[serde(default)]
    pub spec: ObjectSyncSpec,
    /// What the node has acknowledged.
    #[serde(default)]
    pub status: Option<ObjectSyncStatus>,
}

/// Which object is synchronised. The keys are KubeEdge's: `objectAPIVersion` has two capitals more than camel case.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectSyncSpec {
    /// `apiVersion` of the object.
    #[serde(rename = "objectAPIVersion", default, skip_serializing_if = "String::is_empty")]
    pub object_api_version: String,
    /// Kind of the object.
    #[serde(rename = "objectKind", default, skip_serializing_if = "String::is_empty")]
    pub object_kind: String,
    /// Name of the object.
    #[serde(rename = "objectName", default, skip_serializing_if = "String::is_empty")]
    pub object_name: String,
}

/// What the node has acknowledged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectSyncStatus {
    /// Resource version of the object as the node last acknowledged it; [`NEVER_ACKED`] before the first time.
    #[serde(rename = "objectResourceVersion", default, skip_serializing_if = "String::is_empty")]
    pub object_resource_version: String,
}

/// Name of the (Cluster)ObjectSync for an object on a node.
pub fn object_sync_name(node: &str, uid: &str) -> String {
    format!("{node}.{uid}")
}

/// Node and object UID in the name of a (Cluster)ObjectSync. The node is everything before the last dot, because a
/// node's name may contain dots and a UID never does.
pub fn parse_object_sync_name(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('.').filter(|(node, uid)| !node.is_empty() && !uid.is_empty())
}

crate::resource!(
    ObjectSync,
    "reliablesyncs.kubeedge.io",
    "v1alpha1",
    "objectsyncs",
    k8s_openapi::NamespaceResourceScope
);
crate::resource!(
    ClusterObjectSync,
    "reliablesyncs.kubeedge.io",
    "v1alpha1",
    "clusterobjectsyncs",
    k8s_openapi::ClusterResourceScope
);

/// The definitions of ObjectSync and ClusterObjectSync.
pub fn crds() -> Vec<Value> {
    vec![
        crd("ObjectSync", "objectsyncs", "objectsync", "Namespaced"),
        crd("ClusterObjectSync", "clusterobjectsyncs", "clusterobjectsync", "Cluster"),
    ]
}

fn crd(kind: &str, plural: &str, singular: &str, scope: &str) -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.{GROUP}")},
        "spec": {
            "group": GROUP,
            "scope": scope,
            "names": {"kind": kind, "listKind": format!("{kind}List"), "plural": plural, "singular": singular},
            "versions": [{
                "name": VERSION,
                "served": true,
                "storage": true,
                "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {
                    "type": "object",
                    "properties": {
                        "apiVersion": {"type": "string"},
                        "kind": {"type": "string"},
                        "metadata": {"type": "object"},
                        "spec": {
                            "type": "object",
                            "properties": {
                                "objectAPIVersion": {"type": "string"},
                                "objectKind": {"type": "string"},
                                "objectName": {"type": "string"},
                            },
                        },
                        "status": {
                            "type": "object",
                            "properties": {"objectResourceVersion": {"type": "string"}},
                        },
                    },
                }},
            }],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_name_with_dots_survives_the_object_sync_name() {
        let name = object_sync_name("edge.lisbon.example", "4f7c1a52-0000-4000-8000-2f6c0d1e9b11");
        let parsed = parse_object_sync_name(&name);
        assert_eq!(parsed, Some(("edge.lisbon.example", "4f7c1a52-0000-4000-8000-2f6c0d1e9b11")));
        assert_eq!(parse_object_sync_name("plain"), None);
    }

    #[test]
    fn keys_are_spelled_as_kubeedge_spells_them() {
        let sync = ObjectSync {
            spec: ObjectSyncSpec {
                object_api_version: "v1".into(),
                object_kind: "Pod".into(),
                object_name: "web".into(),
            },
            status: Some(ObjectSyncStatus { object_resource_version: NEVER_ACKED.into() }),
            ..ObjectSync::default()
        };
        let value = serde_json::to_value(&sync).unwrap();
        assert_eq!(value["apiVersion"], "reliablesyncs.kubeedge.io/v1alpha1");
        assert_eq!(value["kind"], "ObjectSync");
        assert_eq!(
            value["spec"],
            json!({"objectAPIVersion": "v1", "objectKind": "Pod", "objectName": "web"})
        );
        assert_eq!(value["status"], json!({"objectResourceVersion": "0"}));
    }
}
