//! Definitions of KubeEdge's other kinds, for a cluster in which a Go CloudCore is to run and nobody has installed them.
//!
//! Names, scopes, versions and subresources are KubeEdge's. The schemas let every unknown field through, so that an object
//! of a newer or older KubeEdge passes; those of devices and rules check the types of the known ones ([`schema`]).
//! KubeEdge's own definitions may be applied over these at any time.
//!
//! Source: kubeedge/kubeedge, build/crds.

mod schema;

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
    /// Of the stored version; others let everything through.
    schema: fn() -> Value,
    columns: &'static [(&'static str, &'static str, &'static str)],
}

/// After those of the kind.
const AGE: (&str, &str, &str) = ("Age", ".metadata.creationTimestamp", "date");

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
    Kind {
        group,
        kind,
        plural,
        short: &[],
        namespaced: true,
        versions,
        status: false,
        schema: schema::anything,
        columns: &[],
    }
}

const fn job(kind: &'static str, plural: &'static str, versions: &'static [&'static str]) -> Kind {
    Kind { namespaced: false, status: true, ..self::kind(OPERATIONS, kind, plural, versions) }
}

const KINDS: &[Kind] = &[
    Kind {
        schema: schema::device,
        columns: &[
            ("Node", ".spec.nodeName", "string"),
            ("Model", ".spec.deviceModelRef.name", "string"),
            ("Protocol", ".spec.protocol.protocolName", "string"),
            AGE,
        ],
        ..kind(DEVICES, "Device", "devices", &["v1alpha2", "v1beta1"])
    },
    Kind {
        schema: schema::device_model,
        columns: &[("Protocol", ".spec.protocol", "string"), AGE],
        ..kind(DEVICES, "DeviceModel", "devicemodels", &["v1alpha2", "v1beta1"])
    },
    Kind {
        schema: schema::device_status,
        columns: &[
            ("State", ".status.state", "string"),
            ("Last online", ".status.lastOnlineTime", "date"),
            AGE,
        ],
        ..kind(DEVICES, "DeviceStatus", "devicestatuses", &["v1alpha2", "v1beta1"])
    },
    job("ConfigUpdateJob", "configupdatejobs", &["v1alpha2"]),
    job("ImagePrePullJob", "imageprepulljobs", &["v1alpha1", "v1alpha2"]),
    job("NodeUpgradeJob", "nodeupgradejobs", &["v1alpha1", "v1alpha2"]),
    Kind {
        schema: schema::rule,
        columns: &[("Source", ".spec.source", "string"), ("Target", ".spec.target", "string"), AGE],
        ..kind(RULES, "Rule", "rules", &["v1"])
    },
    Kind {
        short: &["re"],
        schema: schema::rule_endpoint,
        columns: &[("Type", ".spec.ruleEndpointType", "string"), AGE],
        ..kind(RULES, "RuleEndpoint", "ruleendpoints", &["v1"])
    },
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

/// Those of devices, which CloudCore makes where they are missing.
pub fn devices() -> Vec<Value> {
    KINDS.iter().filter(|kind| kind.group == DEVICES).map(definition).collect()
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
            let is_stored = stored == Some(version);
            let schema = if is_stored { (kind.schema)() } else { schema::anything() };
            let mut value = json!({
                "name": version, "served": true, "storage": is_stored,
                "schema": {"openAPIV3Schema": schema},
            });
            if is_stored && !kind.columns.is_empty() {
                let columns =
                    kind.columns.iter().map(|(name, path, of)| schema::column(name, path, of));
                value["additionalPrinterColumns"] = columns.collect();
            }
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
    fn devices_and_rules_check_what_they_know_and_let_the_rest_through() {
        let of = |name: &str| {
            let all = crds();
            let found = all.into_iter().find(|crd| crd["spec"]["names"]["kind"] == name);
            let mut crd = found.expect("a definition");
            let versions = crd["spec"]["versions"].as_array_mut().expect("a list");
            versions.pop().expect("the stored one")
        };
        let device = of("Device");
        let schema = &device["schema"]["openAPIV3Schema"];
        let property = &schema["properties"]["spec"]["properties"]["properties"]["items"];
        assert_eq!(property["properties"]["desired"]["required"], json!(["value"]));
        assert_eq!(property["x-kubernetes-preserve-unknown-fields"], true);
        assert_eq!(device["additionalPrinterColumns"][0]["jsonPath"], ".spec.nodeName");
        let model = of("DeviceModel")["schema"]["openAPIV3Schema"].take();
        let types = &model["properties"]["spec"]["properties"]["properties"]["items"]["properties"];
        assert_eq!(types["type"]["enum"].as_array().map(Vec::len), Some(7));
        assert_eq!(of("DeviceStatus")["additionalPrinterColumns"][0]["name"], "State");
        assert!(
            of("Rule")["schema"]["openAPIV3Schema"]["properties"]["spec"]["required"].is_array()
        );
    }

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
