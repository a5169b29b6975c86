//! Services that stay within a group of nodes: what a node sees of their endpoints.
//!
//! A Service with the annotation `apps.kubeedge.io/service-topology: range-nodegroup` is served to a node only by
//! endpoints on nodes of its own group (a NodeGroup of KubeEdge, which labels its nodes with its name). [`Topology`]
//! holds the labels and the annotations; [`Topology::narrow`] takes the foreign endpoints out of an EndpointSlice or
//! Endpoints object for one node.
//!
//! As in KubeEdge, nodes without a group are one group together, a node that is not known belongs to no group but its
//! own, and an address without a node is taken out of Endpoints. Differences: an endpoint of a slice without a node is
//! taken out as well (KubeEdge's cloud ends itself there), and a change of a group or annotation is told with the next
//! change of the endpoints, as there.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/dynamiccontroller/filter/{endpointresource,util.go},
//! cloud/pkg/controllermanager/nodegroup.

use super::Resource;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Label of a node with the name of its group.
const GROUP: &str = "apps.kubeedge.io/belonging-to";
/// Annotation of a Service that stays within groups.
const TOPOLOGY: &str = "apps.kubeedge.io/service-topology";
const RANGE: &str = "range-nodegroup";
/// Label of a slice with the name of its Service.
const SERVICE: &str = "kubernetes.io/service-name";

/// Groups of nodes, and Services that stay within them.
#[derive(Debug, Default)]
pub struct Topology {
    /// Group by node; empty for a node without.
    groups: BTreeMap<String, String>,
    /// Namespace and name.
    ranged: BTreeSet<(String, String)>,
}

impl Topology {
    /// Whether objects of `resource` may have to be narrowed.
    pub fn concerns(resource: &Resource) -> bool {
        matches!(
            (resource.group.as_str(), resource.plural.as_str()),
            ("", "endpoints") | ("discovery.k8s.io", "endpointslices")
        )
    }

    /// The resources that decide: nodes and Services.
    pub fn sources() -> [Resource; 2] {
        ["nodes", "services"].map(|plural| Resource {
            group: String::new(),
            version: "v1".into(),
            plural: plural.into(),
        })
    }

    /// Takes a Node or Service.
    pub fn changed(&mut self, plural: &str, object: &Value) {
        let Some(name) = object["metadata"]["name"].as_str() else { return };
        if plural == "nodes" {
            let group = object["metadata"]["labels"][GROUP].as_str().unwrap_or_default();
            self.groups.insert(name.into(), group.into());
        } else {
            let id = id(object, name);
            match object["metadata"]["annotations"][TOPOLOGY] == RANGE {
                true => self.ranged.insert(id),
                false => self.ranged.remove(&id),
            };
        }
    }

    /// The Node or Service is gone.
    pub fn deleted(&mut self, plural: &str, object: &Value) {
        let Some(name) = object["metadata"]["name"].as_str() else { return };
        match plural {
            "nodes" => drop(self.groups.remove(name)),
            _ => drop(self.ranged.remove(&id(object, name))),
        }
    }

    /// Whether there is any Service that stays within groups.
    pub fn has_ranges(&self) -> bool {
        !self.ranged.is_empty()
    }

    /// Whether `object`, an EndpointSlice or Endpoints, looks different on different nodes.
    pub fn is_ranged(&self, object: &Value) -> bool {
        let metadata = &object["metadata"];
        let service = match is_slice(object) {
            true => &metadata["labels"][SERVICE],
            false => &metadata["name"],
        };
        service.as_str().is_some_and(|service| self.ranged.contains(&id(object, service)))
    }

    /// Takes out what is not in the group of `node`, if the Service says so. Returns whether it does.
    pub fn narrow(&self, node: &str, object: &mut Value) -> bool {
        if !self.is_ranged(object) {
            return false;
        }
        let near = |endpoint: &Value| {
            endpoint["nodeName"].as_str().is_some_and(|other| self.same_group(node, other))
        };
        if let Some(endpoints) = object.get_mut("endpoints").and_then(Value::as_array_mut) {
            endpoints.retain(near);
        }
        for subset in object.get_mut("subsets").and_then(Value::as_array_mut).into_iter().flatten()
        {
            for addresses in ["addresses", "notReadyAddresses"] {
                if let Some(list) = subset.get_mut(addresses).and_then(Value::as_array_mut) {
                    list.retain(near);
                }
            }
        }
        true
    }

    /// Narrows an object or the items of a list for `node`.
    pub fn narrow_all(&self, node: &str, content: &mut Value) {
        match content.get_mut("items").and_then(Value::as_array_mut) {
            Some(items) => {
                for item in items {
                    self.narrow(node, item);
                }
            }
            None => {
                self.narrow(node, content);
            }
        }
    }

    fn same_group(&self, node: &str, other: &str) -> bool {
        node == other
            || match (self.groups.get(node), self.groups.get(other)) {
                (Some(group), Some(others)) => group == others,
                _ => false,
            }
    }
}

/// Items of a list carry no kind; only slices have a type of address.
fn is_slice(object: &Value) -> bool {
    object["addressType"].is_string()
}

fn id(object: &Value, name: &str) -> (String, String) {
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
    (namespace.into(), name.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn topology() -> Topology {
        let mut topology = Topology::default();
        for (node, group) in
            [("a1", Some("a")), ("a2", Some("a")), ("b1", Some("b")), ("x", None), ("y", None)]
        {
            let labels = group.map_or(json!({}), |group| json!({GROUP: group}));
            topology.changed("nodes", &json!({"metadata": {"name": node, "labels": labels}}));
        }
        for (service, annotation) in [("near", RANGE), ("all", "")] {
            let object = json!({"metadata": {"namespace": "ns", "name": service, "annotations": {TOPOLOGY: annotation}}});
            topology.changed("services", &object);
        }
        topology
    }

    fn slice(service: &str) -> Value {
        json!({"addressType": "IPv4", "metadata": {"namespace": "ns", "name": format!("{service}-1"), "labels": {SERVICE: service}},
            "endpoints": [{"addresses": ["1"], "nodeName": "a1"}, {"addresses": ["2"], "nodeName": "a2"},
                {"addresses": ["3"], "nodeName": "b1"}, {"addresses": ["4"], "nodeName": "x"}, {"addresses": ["5"]}]})
    }

    fn near(topology: &Topology, node: &str) -> Vec<String> {
        let mut slice = slice("near");
        assert!(topology.narrow(node, &mut slice));
        let endpoints = slice["endpoints"].as_array().cloned().unwrap_or_default();
        endpoints
            .iter()
            .map(|endpoint| endpoint["addresses"][0].as_str().unwrap_or_default().to_owned())
            .collect()
    }

    #[test]
    fn a_node_sees_the_endpoints_of_its_group_only() {
        let mut topology = topology();
        assert_eq!(near(&topology, "a1"), ["1", "2"]);
        assert_eq!(near(&topology, "b1"), ["3"]);
        assert_eq!(near(&topology, "y"), ["4"], "nodes without a group are one");
        assert!(near(&topology, "unknown").is_empty());
        topology.deleted("nodes", &json!({"metadata": {"name": "a2"}}));
        assert_eq!(near(&topology, "a1"), ["1"]);
        assert_eq!(near(&topology, "a2"), ["2"], "itself, always");
    }

    #[test]
    fn other_services_are_as_they_are_and_endpoints_are_narrowed_alike() {
        let mut topology = topology();
        let mut all = slice("all");
        assert!(!topology.narrow("a1", &mut all));
        assert_eq!(all, slice("all"));
        let endpoints = json!({"metadata": {"namespace": "ns", "name": "near"}, "subsets": [{
            "addresses": [{"ip": "1", "nodeName": "a1"}, {"ip": "3", "nodeName": "b1"}, {"ip": "5"}],
            "notReadyAddresses": [{"ip": "6", "nodeName": "b1"}]}]});
        let mut list = json!({"items": [endpoints]});
        topology.narrow_all("a2", &mut list);
        let subset = &list["items"][0]["subsets"][0];
        assert_eq!(subset["addresses"], json!([{"ip": "1", "nodeName": "a1"}]));
        assert_eq!(subset["notReadyAddresses"], json!([]));
        topology.deleted("services", &json!({"metadata": {"namespace": "ns", "name": "near"}}));
        assert!(!topology.is_ranged(&slice("near")));
    }
}
