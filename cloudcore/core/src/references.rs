//! Which ConfigMaps and Secrets a pod needs to run, and what else goes with a pod or a device.
//!
//! KubeEdge looks at volumes (configMap, secret, projected), at containers' `envFrom` and `env.valueFrom`, and at
//! `imagePullSecrets`. Ours adds init and ephemeral containers, and the secret references inside other volume types.
//! What its service account may do is an object of the same name as that account.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/edgecontroller/manager/location.go, cloud/pkg/policycontroller/manager.

use crate::downstream::{Key, Kind};
use serde_json::Value;
use skerry_api::fleet::rules::RULES_ANNOTATION;
use std::collections::BTreeSet;

/// Rules that one device may name; more are not looked at.
const RULES_MAX: usize = 256;

/// Everything that `pod` refers to, in the pod's own namespace.
///
/// A pod that has finished needs nothing any more.
pub fn of_pod(pod: &Value) -> BTreeSet<Key> {
    let mut found = References {
        namespace: text(&pod["metadata"]["namespace"]).unwrap_or_default(),
        keys: BTreeSet::new(),
    };
    if matches!(text(&pod["status"]["phase"]), Some("Succeeded" | "Failed")) {
        return found.keys;
    }
    let spec = &pod["spec"];
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        items(&spec[list]).for_each(|container| found.container(container));
    }
    items(&spec["volumes"]).for_each(|volume| found.volume(volume));
    items(&spec["imagePullSecrets"]).for_each(|secret| found.add(Kind::Secret, &secret["name"]));
    found.add(Kind::ServiceAccountAccess, &spec["serviceAccountName"]);
    found.keys
}

/// The model of `device` and the rules that it names, in the device's own namespace.
pub fn of_device(device: &Value) -> BTreeSet<Key> {
    let mut found = References {
        namespace: text(&device["metadata"]["namespace"]).unwrap_or_default(),
        keys: BTreeSet::new(),
    };
    found.add(Kind::DeviceModel, &device["spec"]["deviceModelRef"]["name"]);
    let rules = device["metadata"]["annotations"][RULES_ANNOTATION].as_str();
    // Others than a list of names are none.
    let rules: Vec<Value> =
        rules.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    rules.iter().take(RULES_MAX).for_each(|rule| found.add(Kind::DeviceRule, rule));
    found.keys
}

struct References<'a> {
    namespace: &'a str,
    keys: BTreeSet<Key>,
}

impl References<'_> {
    fn add(&mut self, kind: Kind, name: &Value) {
        if let Some(name) = text(name).filter(|name| !name.is_empty()) {
            self.keys.extend(Key::new(kind, self.namespace, name));
        }
    }

    fn container(&mut self, container: &Value) {
        for source in items(&container["envFrom"]) {
            self.add(Kind::ConfigMap, &source["configMapRef"]["name"]);
            self.add(Kind::Secret, &source["secretRef"]["name"]);
        }
        for variable in items(&container["env"]) {
            let from = &variable["valueFrom"];
            self.add(Kind::ConfigMap, &from["configMapKeyRef"]["name"]);
            self.add(Kind::Secret, &from["secretKeyRef"]["name"]);
        }
    }

    fn volume(&mut self, volume: &Value) {
        self.add(Kind::ConfigMap, &volume["configMap"]["name"]);
        self.add(Kind::Secret, &volume["secret"]["secretName"]);
        for source in items(&volume["projected"]["sources"]) {
            self.add(Kind::ConfigMap, &source["configMap"]["name"]);
            self.add(Kind::Secret, &source["secret"]["name"]);
        }
        let with_secret =
            ["cephfs", "flexVolume", "iscsi", "rbd", "scaleIO", "storageos", "azureFile"];
        for kind in with_secret {
            self.add(Kind::Secret, &volume[kind]["secretRef"]["name"]);
            self.add(Kind::Secret, &volume[kind]["secretName"]);
        }
        self.add(Kind::Secret, &volume["csi"]["nodePublishSecretRef"]["name"]);
    }
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn text(value: &Value) -> Option<&str> {
    value.as_str()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(spec: Value, expected: &[&str]) {
        let pod = json!({"metadata": {"namespace": "ns"}, "spec": spec});
        let found: Vec<_> = of_pod(&pod).iter().map(Key::to_string).collect();
        assert_eq!(found, expected, "{pod}");
    }

    #[test]
    fn every_way_to_refer_counts() {
        check(json!({"containers": [{"name": "c"}]}), &[]);
        let env = json!([{"valueFrom": {"configMapKeyRef": {"name": "a"}}},
                         {"valueFrom": {"secretKeyRef": {"name": "b"}}}, {"value": "plain"}]);
        check(json!({"containers": [{"env": env}]}), &["ns/configmap/a", "ns/secret/b"]);
        let from = json!([{"configMapRef": {"name": "a"}}, {"secretRef": {"name": "b"}}]);
        for list in ["containers", "initContainers", "ephemeralContainers"] {
            check(json!({list: [{"envFrom": from}]}), &["ns/configmap/a", "ns/secret/b"]);
        }
        let volumes = json!([{"configMap": {"name": "a"}}, {"secret": {"secretName": "b"}},
            {"projected": {"sources": [{"configMap": {"name": "c"}}, {"secret": {"name": "d"}}]}},
            {"csi": {"nodePublishSecretRef": {"name": "e"}}}, {"emptyDir": {}}]);
        let all = ["ns/configmap/a", "ns/configmap/c", "ns/secret/b", "ns/secret/d", "ns/secret/e"];
        check(json!({"volumes": volumes}), &all);
        check(json!({"imagePullSecrets": [{"name": "p"}, {"name": ""}]}), &["ns/secret/p"]);
    }

    #[test]
    fn a_device_needs_its_model_and_the_rules_that_it_names() {
        let found = |rules: &str| -> Vec<String> {
            let device = json!({"metadata": {"namespace": "ns", "annotations": {RULES_ANNOTATION: rules}},
                "spec": {"deviceModelRef": {"name": "m"}}});
            of_device(&device).iter().map(Key::to_string).collect()
        };
        let both = ["ns/devicemodel/m", "ns/devicerule/alarm"];
        assert_eq!(found(r#"["alarm", "", 3, "a/b"]"#), both);
        assert_eq!(found("alarm"), both[..1]);
    }

    #[test]
    fn finished_pod_needs_nothing() {
        let pod = json!({"metadata": {"namespace": "ns"}, "status": {"phase": "Succeeded"},
            "spec": {"imagePullSecrets": [{"name": "p"}]}});
        assert!(of_pod(&pod).is_empty());
    }

    #[test]
    fn names_that_are_no_path_segment_are_left_out() {
        check(json!({"imagePullSecrets": [{"name": "../x"}, {"name": 3}]}), &[]);
    }
}
