//! The Endpoints and EndpointSlices of a Service, from the pods that it selects.
//!
//! Source: the Endpoints and EndpointSlice controllers as documented. Slices hold at most [`SLICE_MAX`] endpoints and
//! have names made from the Service's, so that a late view of the API can never make a second set.

use super::object::{
    flag, is_deleting, is_ready, is_terminal, labels, list, name, namespace, number,
    owner_reference, short_hash, text, uid,
};
use crate::selector::LabelSelector;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};

/// Endpoints in one slice.
pub const SLICE_MAX: usize = 100;
/// Addresses in one Endpoints object; more are left out there, as in Kubernetes.
pub const ADDRESSES_MAX: usize = 1000;
/// Label of a slice that names its Service.
pub const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// Label of a slice that names who keeps it.
pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// This controller in [`MANAGED_BY`].
pub const MANAGER: &str = "endpointslice-controller.k8s.io";

/// What a Service should have.
#[derive(Debug, Clone, PartialEq)]
pub struct Desired {
    /// `v1 Endpoints`.
    pub endpoints: Value,
    /// `discovery.k8s.io/v1 EndpointSlice`, at least one.
    pub slices: Vec<Value>,
}

/// The selector of a Service whose endpoints are made here; `None` for one without selector or of type ExternalName.
pub fn selector(service: &Value) -> Option<LabelSelector> {
    if text(service, "/spec/type") == "ExternalName" {
        return None;
    }
    let labels = service.pointer("/spec/selector")?.as_object()?;
    if labels.is_empty() {
        return None;
    }
    LabelSelector::from_object(&json!({"matchLabels": labels})).ok()
}

/// Returns the endpoints of `service`; `None` if they are not this controller's to make.
///
/// `zones` maps a node to its zone label.
pub fn desired<'a>(
    service: &Value,
    pods: impl IntoIterator<Item = &'a Value>,
    zones: &HashMap<String, String>,
) -> Option<Desired> {
    let selector = selector(service)?;
    let unready_too = flag(service, "/spec/publishNotReadyAddresses");
    let mut selected: Vec<&Value> = pods
        .into_iter()
        .filter(|pod| selector.matches(labels(pod)))
        .filter(|pod| !text(pod, "/status/podIP").is_empty() && !is_terminal(pod))
        .collect();
    selected.sort_by_key(|pod| (text(pod, "/status/podIP"), name(pod)));
    selected.truncate(ADDRESSES_MAX);

    // Named target ports may differ between pods, so endpoints are grouped by the ports they resolve to.
    let mut groups: BTreeMap<String, (Vec<Value>, Vec<&Value>)> = BTreeMap::new();
    for pod in selected {
        let ports = ports(service, pod);
        groups.entry(json!(ports).to_string()).or_insert_with(|| (ports, Vec::new())).1.push(pod);
    }

    let mut subsets = Vec::new();
    let mut slices = Vec::new();
    for (ports, pods) in groups.values() {
        // Headless Services may have no port; all others need one that resolves.
        if ports.is_empty() && !list(service, "/spec/ports").is_empty() {
            continue;
        }
        let up = |pod: &&&Value| unready_too || (is_ready(pod) && !is_deleting(pod));
        let address = |pod: &&Value| {
            let mut address = json!({"ip": text(pod, "/status/podIP"), "targetRef": target(pod)});
            let node = text(pod, "/spec/nodeName");
            if !node.is_empty() {
                address["nodeName"] = json!(node);
            }
            let host = text(pod, "/spec/hostname");
            if !host.is_empty() && text(pod, "/spec/subdomain") == name(service) {
                address["hostname"] = json!(host);
            }
            address
        };
        let ready: Vec<Value> = pods.iter().filter(up).map(address).collect();
        let not_ready: Vec<Value> =
            pods.iter().filter(|pod| !up(pod) && !is_deleting(pod)).map(address).collect();
        let mut subset = json!({});
        if !ready.is_empty() {
            subset["addresses"] = json!(ready);
        }
        if !not_ready.is_empty() {
            subset["notReadyAddresses"] = json!(not_ready);
        }
        if subset != json!({}) {
            if !ports.is_empty() {
                subset["ports"] = json!(ports);
            }
            subsets.push(subset);
        }
        for chunk in pods.chunks(SLICE_MAX) {
            let endpoints: Vec<Value> =
                chunk.iter().map(|pod| endpoint(service, pod, unready_too, zones)).collect();
            slices.push(slice(service, slices.len(), ports, &endpoints));
        }
    }
    if slices.is_empty() {
        slices.push(slice(service, 0, &[], &[]));
    }
    let mut metadata = json!({
        "name": name(service), "namespace": namespace(service),
        "labels": {"endpoints.kubernetes.io/managed-by": "endpoint-controller"},
    });
    for (key, value) in labels(service).into_iter().flatten() {
        metadata["labels"][key] = value.clone();
    }
    if text(service, "/spec/clusterIP") == "None" {
        metadata["labels"]["service.kubernetes.io/headless"] = json!("");
    }
    let mut endpoints = json!({"apiVersion": "v1", "kind": "Endpoints", "metadata": metadata});
    if !subsets.is_empty() {
        endpoints["subsets"] = json!(subsets);
    }
    Some(Desired { endpoints, slices })
}

fn target(pod: &Value) -> Value {
    json!({"kind": "Pod", "namespace": namespace(pod), "name": name(pod), "uid": uid(pod)})
}

fn endpoint(
    service: &Value,
    pod: &Value,
    unready_too: bool,
    zones: &HashMap<String, String>,
) -> Value {
    let (serving, terminating) = (is_ready(pod), is_deleting(pod));
    let mut endpoint = json!({
        "addresses": [text(pod, "/status/podIP")],
        "conditions": {
            "ready": unready_too || (serving && !terminating),
            "serving": serving, "terminating": terminating,
        },
        "targetRef": target(pod),
    });
    let node = text(pod, "/spec/nodeName");
    if !node.is_empty() {
        endpoint["nodeName"] = json!(node);
    }
    if let Some(zone) = zones.get(node) {
        endpoint["zone"] = json!(zone);
    }
    let host = text(pod, "/spec/hostname");
    if !host.is_empty() && text(pod, "/spec/subdomain") == name(service) {
        endpoint["hostname"] = json!(host);
    }
    endpoint
}

fn slice(service: &Value, index: usize, ports: &[Value], endpoints: &[Value]) -> Value {
    let address_type = match endpoints.first().map(|e| text(e, "/addresses/0")) {
        Some(ip) if ip.contains(':') => "IPv6",
        _ => "IPv4",
    };
    let hash = short_hash(&json!(uid(service)), i64::try_from(index).unwrap_or(i64::MAX));
    let mut slice_labels = json!({SERVICE_LABEL: name(service), MANAGED_BY: MANAGER});
    for (key, value) in labels(service).into_iter().flatten() {
        slice_labels[key] = value.clone();
    }
    if text(service, "/spec/clusterIP") == "None" {
        slice_labels["service.kubernetes.io/headless"] = json!("");
    }
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{}-{}", name(service), &hash[..5]), "namespace": namespace(service),
            "generateName": format!("{}-", name(service)), "labels": slice_labels,
            "ownerReferences": [owner_reference(service, "v1", "Service")],
        },
        "addressType": address_type, "ports": ports, "endpoints": endpoints,
    })
}

/// The ports of a Service as one pod serves them; a named port that the pod lacks is left out.
fn ports(service: &Value, pod: &Value) -> Vec<Value> {
    let mut ports = Vec::new();
    for port in list(service, "/spec/ports") {
        let protocol = match text(port, "/protocol") {
            "" => "TCP",
            protocol => protocol,
        };
        let target = match port.get("targetPort") {
            None | Some(Value::Null) => number(port, "/port"),
            Some(Value::String(wanted)) => match wanted.parse() {
                Ok(number) => Some(number),
                Err(_) => named_port(pod, wanted, protocol),
            },
            Some(value) => value.as_i64().filter(|n| *n > 0).or_else(|| number(port, "/port")),
        };
        let Some(target) = target else { continue };
        let mut out = json!({"port": target, "protocol": protocol});
        for field in ["name", "appProtocol"] {
            if let Some(value) = port.get(field) {
                out[field] = value.clone();
            }
        }
        ports.push(out);
    }
    ports
}

fn named_port(pod: &Value, wanted: &str, protocol: &str) -> Option<i64> {
    list(pod, "/spec/containers").iter().flat_map(|container| list(container, "/ports")).find_map(
        |port| {
            let own = text(port, "/protocol");
            (text(port, "/name") == wanted && (own.is_empty() || own == protocol))
                .then(|| number(port, "/containerPort"))
                .flatten()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(spec: Value) -> Value {
        let mut service = json!({"metadata": {"name": "web", "namespace": "default", "uid": "s"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http", "protocol": "TCP"}]}});
        for (key, value) in spec.as_object().expect("an object") {
            service["spec"][key] = value.clone();
        }
        service
    }

    fn pod(index: usize, ready: bool) -> Value {
        json!({"metadata": {"name": format!("p{index}"), "uid": "u", "namespace": "default", "labels": {"app": "web"}},
            "spec": {"nodeName": "n", "containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIP": format!("10.0.{}.{}", index / 200, index % 200 + 1),
                "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}})
    }

    #[test]
    fn ready_and_unready_pods_stand_apart_with_resolved_ports() {
        let pods = [pod(0, true), pod(1, false)];
        let zones = HashMap::from([("n".to_owned(), "z".to_owned())]);
        let desired = desired(&service(json!({})), &pods, &zones).expect("a selector");
        let subset = &desired.endpoints["subsets"][0];
        assert_eq!(subset["addresses"][0]["ip"], "10.0.0.1");
        assert_eq!(subset["notReadyAddresses"][0]["ip"], "10.0.0.2");
        assert_eq!(subset["ports"], json!([{"port": 8080, "protocol": "TCP"}]));
        let endpoints = &desired.slices[0]["endpoints"];
        assert_eq!(
            endpoints[0]["conditions"],
            json!({"ready": true, "serving": true, "terminating": false})
        );
        assert_eq!(endpoints[0]["zone"], "z");
        assert_eq!(endpoints[1]["conditions"]["ready"], false);
    }

    #[test]
    fn many_pods_fill_several_slices_with_stable_names() {
        let pods: Vec<Value> = (0..250).map(|index| pod(index, true)).collect();
        let service = service(json!({}));
        let desired = desired(&service, &pods, &HashMap::new()).expect("a selector");
        let sizes: Vec<usize> =
            desired.slices.iter().map(|slice| list(slice, "/endpoints").len()).collect();
        assert_eq!(sizes, [100, 100, 50]);
        assert_ne!(name(&desired.slices[0]), name(&desired.slices[1]));
    }

    #[test]
    fn services_without_a_selector_are_left_to_their_owners() {
        assert!(desired(&service(json!({"selector": null})), [], &HashMap::new()).is_none());
        assert!(desired(&service(json!({"type": "ExternalName"})), [], &HashMap::new()).is_none());
        let empty = desired(&service(json!({})), [], &HashMap::new()).expect("a selector");
        assert_eq!(empty.endpoints.get("subsets"), None);
        assert_eq!(empty.slices.len(), 1);
    }

    #[test]
    fn an_ended_or_deleted_pod_serves_nobody() {
        let mut ended = pod(0, true);
        ended["status"]["phase"] = json!("Succeeded");
        let mut leaving = pod(1, true);
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        let pods = [ended, leaving];
        let desired = desired(&service(json!({})), &pods, &HashMap::new()).expect("a selector");
        assert_eq!(desired.endpoints.get("subsets"), None);
        assert_eq!(desired.slices[0]["endpoints"][0]["conditions"]["terminating"], true);
        assert_eq!(list(&desired.slices[0], "/endpoints").len(), 1);
    }
}
