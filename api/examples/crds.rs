//! Prints every definition, KubeEdge's included, as one List for `kubectl apply -f -`.

use serde_json::{Value, json};

fn main() {
    let crds: Vec<Value> =
        skerry_api::crds().into_iter().chain(skerry_api::kubeedge::crds()).collect();
    println!("{}", json!({"apiVersion": "v1", "kind": "List", "items": crds}));
}
