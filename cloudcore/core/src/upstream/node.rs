//! What a node may say about its own Node.
//!
//! Labels and annotations are taken, ownership is not. Of the labels in Kubernetes' own domains a node may set those
//! that describe it (NodeRestriction's list) and the two that make it an edge node for KubeEdge; the others choose
//! which pods it gets, and are left out.

use serde_json::{Map, Value, json};

/// KubeEdge's annotation on a Node: the address of the CloudCore that it registered with.
pub const CLOUD_ANNOTATION: &str = "cloudcore";
/// Conditions of a legacy status report whose heartbeat is older get the present time, in seconds.
pub const HEARTBEAT_AGE_MAX_S: i64 = 10;

const LABELS: [&str; 13] = [
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/instance-type",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/region",
    "node-role.kubernetes.io/edge",
    "node-role.kubernetes.io/agent",
];
const LABEL_DOMAINS: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];

/// Whether this label is in a domain of Kubernetes.
pub fn is_reserved(label: &str) -> bool {
    let Some((domain, _)) = label.split_once('/') else { return false };
    within(domain, "kubernetes.io") || within(domain, "k8s.io")
}

/// Whether a node may set this label on itself.
pub fn may_set(label: &str) -> bool {
    let domain = label.split_once('/').map_or("", |(domain, _)| domain);
    !is_reserved(label)
        || LABELS.contains(&label)
        || LABEL_DOMAINS.iter().any(|allowed| within(domain, allowed))
}

fn within(domain: &str, parent: &str) -> bool {
    domain.strip_suffix(parent).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// Takes the labels that a node may not set out of `labels`, and returns their names.
pub fn retain_allowed(labels: &mut Value) -> Vec<String> {
    let Some(labels) = labels.as_object_mut() else { return Vec::new() };
    let refused: Vec<String> = labels.keys().filter(|label| !may_set(label)).cloned().collect();
    refused.iter().for_each(|label| {
        labels.remove(label);
    });
    refused
}

/// What a node registers, reduced to what it may say. `cloud` is the value of [`CLOUD_ANNOTATION`].
///
/// Returns the object and the labels that were left out.
pub fn registration(mut object: Value, node: &str, cloud: Option<&str>) -> (Value, Vec<String>) {
    let mut labels = take(&mut object, "/metadata/labels");
    let refused = retain_allowed(&mut labels);
    let mut annotations = match take(&mut object, "/metadata/annotations") {
        Value::Object(annotations) => annotations,
        _ => Map::new(),
    };
    if let Some(cloud) = cloud {
        annotations.insert(CLOUD_ANNOTATION.into(), cloud.into());
    }
    let mut metadata = Map::from_iter([("name".to_owned(), Value::from(node))]);
    if labels.as_object().is_some_and(|labels| !labels.is_empty()) {
        metadata.insert("labels".into(), labels);
    }
    if !annotations.is_empty() {
        metadata.insert("annotations".into(), annotations.into());
    }
    let mut registered = json!({"kind": "Node", "apiVersion": "v1", "metadata": metadata});
    for field in ["spec", "status"] {
        if let Some(value) = object.get_mut(field).map(Value::take).filter(|value| !value.is_null())
        {
            registered[field] = value;
        }
    }
    (registered, refused)
}

/// Splits the labels in Kubernetes' domains off: a node's own rights do not suffice to set them at creation, so
/// KubeEdge adds them afterwards with its own.
pub fn split_reserved(object: &mut Value) -> Option<Value> {
    let labels = object.pointer_mut("/metadata/labels")?.as_object_mut()?;
    let reserved: Map<String, Value> = labels
        .iter()
        .filter(|(label, _)| is_reserved(label))
        .map(|(label, value)| (label.clone(), value.clone()))
        .collect();
    labels.retain(|label, _| !is_reserved(label));
    (!reserved.is_empty()).then(|| json!({"metadata": {"labels": reserved}}))
}

/// Takes a part out of what a node sent, which may have any shape; an index into what is no object would panic.
fn take(object: &mut Value, pointer: &str) -> Value {
    object.pointer_mut(pointer).map(Value::take).unwrap_or_default()
}

/// The patch that merges the labels and annotations of an updated Node, and the labels that were left out.
pub fn update_patch(object: &mut Value) -> (Value, Vec<String>) {
    let mut labels = take(object, "/metadata/labels");
    let refused = retain_allowed(&mut labels);
    let annotations = take(object, "/metadata/annotations");
    let mut metadata = Map::new();
    // A null would delete in a merge; a node that names none keeps all.
    let given = [("labels", labels), ("annotations", annotations)];
    for (field, value) in given.into_iter().filter(|(_, value)| value.is_object()) {
        metadata.insert(field.into(), value);
    }
    (json!({ "metadata": metadata }), refused)
}

/// Takes from a status patch what a node may not change with it: ownership, deletion marks, and labels as above.
///
/// Returns the labels that were left out.
pub fn restrict_patch(patch: &mut Value) -> Vec<String> {
    let Some(metadata) = patch.get_mut("metadata").and_then(Value::as_object_mut) else {
        return Vec::new();
    };
    metadata.retain(|field, _| {
        ["name", "uid", "resourceVersion", "labels", "annotations"].contains(&field.as_str())
    });
    metadata.get_mut("labels").map(retain_allowed).unwrap_or_default()
}

/// The Node after a legacy report `{UID, Status, ExtendResources}`.
///
/// Keeps what others own: attached volumes, and the kubelet port when it has been set. `is_old` says of an RFC 3339
/// time whether it is over [`HEARTBEAT_AGE_MAX_S`] ago, `now` is the present in that form.
pub fn with_legacy_status(
    mut node: Value,
    report: &Value,
    is_old: impl Fn(&str) -> bool,
    now: &str,
) -> Value {
    let mut status = report["Status"].clone();
    if !status.is_object() {
        status = json!({});
    }
    // What a node sends may be anything; an index into what is no object would panic.
    if !status["daemonEndpoints"].is_object() {
        status.as_object_mut().map(|status| status.remove("daemonEndpoints"));
    }
    let conditions = status.get_mut("conditions").and_then(Value::as_array_mut);
    for condition in conditions.into_iter().flatten().filter(|condition| condition.is_object()) {
        if condition["lastHeartbeatTime"].as_str().is_none_or(&is_old) {
            condition["lastHeartbeatTime"] = now.into();
        }
    }
    let old = &node["status"];
    match &old["volumesAttached"] {
        Value::Null => {
            status.as_object_mut().map(|status| status.remove("volumesAttached"));
        }
        attached => status["volumesAttached"] = attached.clone(),
    }
    let port = &old["daemonEndpoints"]["kubeletEndpoint"]["Port"];
    if port.as_u64().is_some_and(|port| port != 0) {
        status["daemonEndpoints"]["kubeletEndpoint"] = json!({"Port": port});
    }
    for (resource, devices) in report["ExtendResources"].as_object().into_iter().flatten() {
        if !node["metadata"]["annotations"].is_object() {
            node["metadata"]["annotations"] = json!({});
        }
        node["metadata"]["annotations"][resource] = devices.to_string().into();
    }
    node["status"] = status;
    node
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_choose_pods_are_not_taken_from_a_node() {
        for label in [
            "site",
            "example.com/rack",
            "kubernetes.io/hostname",
            "node-role.kubernetes.io/edge",
            "node.kubernetes.io/anything",
            "x.kubelet.kubernetes.io/anything",
            "notkubernetes.io/x",
        ] {
            assert!(may_set(label), "{label}");
        }
        for label in [
            "node-role.kubernetes.io/control-plane",
            "node-restriction.kubernetes.io/trusted",
            "kubernetes.io/anything",
            "k8s.io/anything",
            "cloud.k8s.io/x",
            "notnode.kubernetes.io/x",
        ] {
            assert!(!may_set(label), "{label}");
        }
    }

    #[test]
    fn a_registration_holds_only_what_a_node_may_say() {
        let object = json!({"metadata": {"name": "other", "uid": "u", "ownerReferences": [{}], "finalizers": ["f"],
            "labels": {"site": "a", "kubernetes.io/hostname": "edge1", "node-role.kubernetes.io/master": ""},
            "annotations": {"a": "b"}}, "spec": {"taints": []}, "status": {"phase": "x"}, "extra": 1});
        let (mut registered, refused) = registration(object, "edge1", Some("10.0.0.1"));
        assert_eq!(refused, ["node-role.kubernetes.io/master"]);
        assert_eq!(
            registered,
            json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "edge1",
                "labels": {"site": "a", "kubernetes.io/hostname": "edge1"},
                "annotations": {"a": "b", "cloudcore": "10.0.0.1"}},
                "spec": {"taints": []}, "status": {"phase": "x"}})
        );
        let later = split_reserved(&mut registered);
        let reserved = json!({"metadata": {"labels": {"kubernetes.io/hostname": "edge1"}}});
        assert_eq!(later, Some(reserved));
        assert_eq!(registered["metadata"]["labels"], json!({"site": "a"}));
        let (bare, refused) = registration(json!({"metadata": {}}), "edge1", None);
        assert_eq!(
            bare,
            json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "edge1"}})
        );
        assert!(refused.is_empty());
    }

    #[test]
    fn updates_merge_and_status_patches_change_no_ownership() {
        let mut object =
            json!({"metadata": {"labels": {"a": "b", "k8s.io/x": "y"}, "annotations": null}});
        let (patch, refused) = update_patch(&mut object);
        assert_eq!(patch, json!({"metadata": {"labels": {"a": "b"}}}));
        assert_eq!(refused, ["k8s.io/x"]);
        let mut patch = json!({"metadata": {"annotations": {"a": "b"}, "finalizers": [], "ownerReferences": [],
            "labels": {"k8s.io/x": "y"}}, "status": {}});
        assert_eq!(restrict_patch(&mut patch), ["k8s.io/x"]);
        assert_eq!(
            patch,
            json!({"metadata": {"annotations": {"a": "b"}, "labels": {}}, "status": {}})
        );
        assert!(restrict_patch(&mut json!({"status": {}})).is_empty());
    }

    #[test]
    fn a_legacy_report_keeps_what_others_own() {
        let node = json!({"metadata": {"name": "n"}, "status": {"volumesAttached": [{"name": "v"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10351}}}});
        let report = json!({"UID": "u", "Status": {"conditions": [{"type": "Ready", "lastHeartbeatTime": "old"},
            {"type": "X", "lastHeartbeatTime": "new"}, {"type": "Y"}], "daemonEndpoints": {"kubeletEndpoint": {"Port": 10350}}},
            "ExtendResources": {"nvidia.com/gpu": [{"name": "0"}]}});
        let merged = with_legacy_status(node, &report, |time| time == "old", "now");
        assert_eq!(
            merged,
            json!({"metadata": {"name": "n", "annotations": {"nvidia.com/gpu": "[{\"name\":\"0\"}]"}},
                "status": {"volumesAttached": [{"name": "v"}], "daemonEndpoints": {"kubeletEndpoint": {"Port": 10351}},
                "conditions": [{"type": "Ready", "lastHeartbeatTime": "now"},
                {"type": "X", "lastHeartbeatTime": "new"}, {"type": "Y", "lastHeartbeatTime": "now"}]}})
        );
    }
}
