//! What must look different on a node: the API's own address.
//!
//! A workload finds the API through the EndpointSlice `default/kubernetes`. On a node it is to find the node's own
//! API, which answers offline as well. The other filter of KubeEdge, topology of services by node group, is [`super::topology`].
//!
//! Source: kubeedge/kubeedge, cloud/pkg/dynamiccontroller/filter/defaultmaster. There a list whose first item is an
//! EndpointSlice gets all of its items rewritten; here only the API's own is.

use serde_json::{Value, json};

/// Where a node serves its own API.
pub const NODE_API: (&str, u16) = ("127.0.0.1", 10550);

/// Rewrites an object or the items of a list.
pub fn apply(content: &mut Value) {
    if let Some(items) = content.get_mut("items").and_then(Value::as_array_mut) {
        items.iter_mut().for_each(|item| rewrite(item, true));
    } else {
        rewrite(content, false);
    }
}

fn rewrite(object: &mut Value, in_list: bool) {
    let metadata = &object["metadata"];
    // Items of a list of a built-in kind carry no kind; only slices have both lists at the top.
    let slice = object["kind"] == "EndpointSlice"
        || (in_list && object["kind"].is_null() && object["addressType"].is_string());
    if !slice || metadata["namespace"] != "default" || metadata["name"] != "kubernetes" {
        return;
    }
    let (address, port) = NODE_API;
    let Some(endpoints) = object["endpoints"].as_array_mut() else { return };
    endpoints.truncate(1);
    let Some(endpoint) = endpoints.first_mut().and_then(Value::as_object_mut) else { return };
    endpoint.insert("addresses".into(), json!([address]));
    for known in object["ports"].as_array_mut().into_iter().flatten() {
        if known["name"] == "https" {
            known["port"] = port.into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_apis_own_slice_is_rewritten() {
        let slice = |name: &str| {
            json!({"kind": "EndpointSlice", "addressType": "IPv4", "metadata": {"namespace": "default", "name": name},
                "endpoints": [{"addresses": ["10.0.0.1", "10.0.0.2"]}, {"addresses": ["10.0.0.3"]}],
                "ports": [{"name": "https", "port": 6443}, {"name": "x", "port": 1}]})
        };
        let mut own = slice("kubernetes");
        apply(&mut own);
        assert_eq!(own["endpoints"], json!([{"addresses": ["127.0.0.1"]}]));
        assert_eq!(
            own["ports"],
            json!([{"name": "https", "port": 10550}, {"name": "x", "port": 1}])
        );
        let mut bare = slice("kubernetes");
        bare.as_object_mut().map(|slice| slice.remove("kind"));
        let mut list = json!({"kind": "EndpointSliceList", "items": [slice("web"), bare]});
        apply(&mut list);
        assert_eq!(list["items"][0], slice("web"));
        assert_eq!(list["items"][1]["ports"][0]["port"], 10550);
    }
}
