//! Definitions of KubeEdge's other kinds, for a cluster in which a Go CloudCore is to run and nobody has installed them.
//!
//! Names, scopes, versions and subresources are KubeEdge's; the schemas let every field through, so that an object of
//! a newer or older KubeEdge passes. KubeEdge's own definitions check more and may be applied over these at any time.
//!
//! Source: kubeedge/kubeedge, build/crds.

use serde_json::{Value, json};

/// One kind.
struct Kind {
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static [&'static str],
    namespaced: bool,
    /// Served versions; the last one is stored.
    versions: &'static [&'static str],
    status: bool,
}

const DEVICES: &str = "devices.kubeedge.io";
const OPERATIONS: &str = "operations.kubeedge.io";
const RULES: &str = "rules.kubeedge.io";
const APPS: &str = "apps.kubeedge.io";

const fn kind(
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    versions: &'static [&'static str],
) -> Kind {
    Kind { group, kind, plural, short: &[], namespaced: true, versions, status: false }
}

const fn job(kind: &'static str, plural: &'static str, versions: &'static [&'static str]) -> Kind {
    Kind { group: OPERATIONS, kind, plural, short: &[], namespaced: false, versions, status: true }
}

const KINDS: &[Kind] = &[
    kind(DEVICES, "Device", "devices", &["v1alpha2", "v1beta1"]),
    kind(DEVICES, "DeviceModel", "devicemodels", &["v1alpha2", "v1beta1"]),
    kind(DEVICES, "DeviceStatus", "devicestatuses", &["v1alpha2", "v1beta1"]),
    job("ConfigUpdateJob", "configupdatejobs", &["v1alpha2"]),
    job("ImagePrePullJob", "imageprepulljobs", &["v1alpha1", "v1alpha2"]),
    job("NodeUpgradeJob", "nodeupgradejobs", &["v1alpha1", "v1alpha2"]),
    kind(RULES, "Rule", "rules", &["v1"]),
    Kind { short: &["re"], ..kind(RULES, "RuleEndpoint", "ruleendpoints", &["v1"]) },
    Kind {
        short: &["eapp"],
        status: true,
        ..kind(APPS, "EdgeApplication", "edgeapplications", &["v1alpha1"])
    },
    Kind {
        short: &["ng"],
        namespaced: false,
        status: true,
        ..kind(APPS, "NodeGroup", "nodegroups", &["v1alpha1"])
    },
    Kind {
        short: &["saaccess"],
        status: true,
        ..kind(
            "policy.kubeedge.io",
            "ServiceAccountAccess",
            "serviceaccountaccesses",
            &["v1alpha1"],
        )
    },
];

/// The CustomResourceDefinitions of KubeEdge's kinds that [`crate::crds`] does not have.
pub fn crds() -> Vec<Value> {
    KINDS.iter().map(definition).collect()
}

/// Those of node jobs, which CloudCore makes where they are missing.
pub fn operations() -> Vec<Value> {
    KINDS.iter().filter(|kind| kind.group == OPERATIONS).map(definition).collect()
}

/// Those of the router, which CloudCore makes where they are missing and it has one.
pub fn rules() -> Vec<Value> {
    KINDS.iter().filter(|kind| kind.group == RULES).map(definition).collect()
}

fn definition(kind: &Kind) -> Value {
    let stored = kind.versions.last();
    let versions: Vec<Value> = kind
        .versions
        .iter()
        .map(|version| {
            let mut value = json!({
                "name": version, "served": true, "storage": stored == Some(version),
                "schema": {"openAPIV3Schema": {
                    "type": "object", "x-kubernetes-preserve-unknown-fields": true,
                }},
            });
            if kind.status {
                value["subresources"] = json!({"status": {}});
            }
            value
        })
        .collect();
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{}.{}", kind.plural, kind.group)},
        "spec": {
            "group": kind.group,
            "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
            "names": {
                "kind": kind.kind, "listKind": format!("{}List", kind.kind),
                "plural": kind.plural, "singular": kind.kind.to_lowercase(),
                "shortNames": kind.short,
            },
            "versions": versions,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_definition_is_there_twice_and_each_stores_its_newest_version() {
        let all: Vec<Value> = crate::crds().into_iter().chain(crds()).collect();
        let names: std::collections::BTreeSet<&str> =
            all.iter().filter_map(|crd| crd["metadata"]["name"].as_str()).collect();
        assert_eq!(names.len(), all.len());
        for crd in crds() {
            let versions = crd["spec"]["versions"].as_array().unwrap();
            assert!(versions.last().unwrap()["storage"] == true);
            assert_eq!(versions.iter().filter(|version| version["storage"] == true).count(), 1);
        }
    }
}
