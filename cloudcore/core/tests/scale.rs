//! Ten thousand connected nodes: what they cost, and that a change for all of them goes out in one sweep.

#![expect(clippy::disallowed_methods, reason = "a test starts its clock somewhere")]

use serde_json::{Value, json};
use skerry_cloudcore_core::downstream::{Downstream, Input, Key, Kind, Output};
use skerry_protocol::capability::Capabilities;
use skerry_protocol::digest::{self, Digest};
use skerry_protocol::{Message, Operation};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

const NODES: usize = 10_000;
/// Of a node with one pod that uses a ConfigMap, beside the texts of its Node and its pod. Measured: 3.7 KiB, with what
/// the allocator wastes.
const NODE_COST_MAX: usize = 5 * 1024;

struct World {
    hub: Downstream,
    now: Instant,
    sends: usize,
}

impl World {
    fn input(&mut self, input: Input) {
        self.hub.handle(input, self.now, 0);
    }

    /// Every message is acknowledged at once; one is made after the other, so none of them adds up.
    fn drain(&mut self) {
        while let Some(output) = self.hub.poll_output() {
            if let Output::Send { node, session, message } = output {
                self.sends += 1;
                let (node, message) = (node.to_string(), Arc::from(message));
                self.input(Input::Acked { node, session, message });
            }
        }
    }
}

fn node(name: &str) -> Value {
    json!({"metadata": {"name": name, "uid": format!("uid-{name}"), "resourceVersion": "1",
        "labels": {"node-role.kubernetes.io/edge": ""}, "managedFields": [{"x": "y".repeat(2000)}]},
        "spec": {}, "status": {"images": [{"names": ["x".repeat(2000)]}], "phase": "x"}})
}

fn pod(name: &str, node: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"),
        "resourceVersion": "2"}, "spec": {"nodeName": node,
        "containers": [{"name": "c", "envFrom": [{"configMapRef": {"name": "page"}}]}]}})
}

fn config(version: usize) -> Value {
    json!({"metadata": {"name": "page", "namespace": "default", "uid": "uid-page",
        "resourceVersion": version.to_string()}, "data": {"v": version}})
}

/// Memory of this process that is in use, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a line");
    let kib: usize = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("KiB");
    kib * 1024
}

#[test]
fn a_connected_node_costs_little_and_a_change_for_all_is_one_sweep() {
    let mut world = World { hub: Downstream::default(), now: Instant::now(), sends: 0 };
    for kind in Kind::ALL {
        world.input(Input::Listed(kind, BTreeSet::new()));
    }
    world.input(Input::Changed(Kind::ConfigMap, config(1)));
    let before = resident();
    let mut texts = 0;
    for number in 0..NODES {
        let name = format!("edge{number}");
        let (object, placed) = (node(&name), pod(&format!("web-{number}"), &name));
        texts += 250 + placed.to_string().len();
        world.input(Input::Changed(Kind::Node, object));
        world.input(Input::Changed(Kind::Pod, placed));
        let session = number as u64;
        let capabilities = Capabilities { digest: true, ..Capabilities::default() };
        world.input(Input::Connected { node: name.clone(), session, capabilities });
        let digest = Digest::default();
        let resource = digest::RESOURCE;
        let request = Message::new(0, "metamanager", "meta", Operation::Query, resource, &digest);
        let request = Box::new(request);
        world.input(Input::Digest { node: name, session, digest, request });
        world.drain();
    }
    let page = Key::new(Kind::ConfigMap, "default", "page").expect("a key");
    world.input(Input::Fetched(page, Some(config(2)), None));
    world.drain();
    let cost = (resident() - before).saturating_sub(texts) / NODES;
    println!("{cost} bytes per node beside {} of texts", texts / NODES);
    assert!(cost < NODE_COST_MAX, "{cost} bytes per node");

    world.sends = 0;
    let start = Instant::now();
    world.input(Input::Changed(Kind::ConfigMap, config(3)));
    world.drain();
    println!("a change for {} nodes took {:?}", world.sends, start.elapsed());
    assert_eq!(world.sends, NODES);
    // No deadline is looked for among all nodes.
    let start = Instant::now();
    for _ in 0..NODES {
        assert_eq!(world.hub.poll_timeout(), None);
    }
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}
