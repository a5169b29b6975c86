use super::*;
use serde_json::json;
use skerry_protocol::digest::Held;

struct Hub {
    downstream: Downstream,
    now: Instant,
    sessions: SessionId,
}

impl Hub {
    /// A hub whose lists of every kind are complete and empty.
    fn listed() -> Self {
        let mut hub = Self::unlisted();
        for kind in Kind::ALL {
            hub.input(Input::Listed(kind, BTreeSet::new()));
        }
        hub
    }

    fn unlisted() -> Self {
        Self { downstream: Downstream::default(), now: Instant::now(), sessions: 0 }
    }

    fn input(&mut self, input: Input) {
        self.downstream.handle(input, self.now, 0);
    }

    fn change(&mut self, kind: Kind, object: Value) {
        self.input(Input::Changed(kind, object));
    }

    fn connect(&mut self, node: &str, digest: bool) -> SessionId {
        self.sessions += 1;
        let (node, session) = (node.to_owned(), self.sessions);
        self.input(Input::Connected { node, session, capabilities: Capabilities { digest } });
        self.sessions
    }

    fn digest(&mut self, node: &str, held: &[(&str, &str, &str)]) {
        let held = held.iter().map(|(path, uid, rv)| {
            ((*path).to_owned(), Held { uid: (*uid).into(), rv: (*rv).into() })
        });
        let digest = Digest { objects: held.collect() };
        let resource = skerry_protocol::digest::RESOURCE;
        let request = Message::new(0, "metamanager", "meta", Operation::Query, resource, &digest);
        let (node, session) = (node.to_owned(), self.sessions);
        self.input(Input::Digest { node, session, digest, request: Box::new(request) });
    }

    /// What came out, as short lines.
    fn outputs(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.downstream.poll_output()).map(|output| line(&output)).collect()
    }

    fn check(&mut self, expected: &[&str]) {
        assert_eq!(self.outputs(), expected);
    }
}

fn line(output: &Output) -> String {
    match output {
        Output::Send { node, message, .. } => {
            let Message { header, route, .. } = &**message;
            format!("{node}: {} {} {}", route.operation, route.resource, header.resourceversion)
                .trim_end()
                .to_owned()
        }
        Output::Close { node, session, .. } => format!("{node}: close {session}"),
        Output::Fetch(key) => format!("fetch {key}"),
        Output::Relist(node) => format!("relist {node}"),
    }
}

fn node(name: &str, version: u64, edge: bool) -> Value {
    let labels = if edge { json!({EDGE_LABEL: ""}) } else { json!({}) };
    json!({"metadata": {"name": name, "uid": format!("uid-{name}"), "resourceVersion": version.to_string(),
        "labels": labels, "managedFields": [{"manager": "x"}]}, "spec": {}, "status": {"beat": version}})
}

fn pod(name: &str, node: &str, version: u64, configs: &[&str]) -> Value {
    let from: Vec<_> = configs.iter().map(|name| json!({"configMapRef": {"name": name}})).collect();
    json!({"metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"),
        "resourceVersion": version.to_string(), "managedFields": [{"manager": "x"}]},
        "spec": {"nodeName": node, "containers": [{"name": "c", "envFrom": from}]}})
}

fn config(name: &str, version: u64) -> Value {
    json!({"metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"),
        "resourceVersion": version.to_string()}, "data": {"v": version.to_string()}})
}

fn key(path: &str) -> Key {
    Key::of_path(&path.parse().expect(path)).expect(path)
}

#[test]
fn pod_goes_to_its_node_only_and_its_configs_go_first() {
    let mut hub = Hub::listed();
    for name in ["edge1", "edge2"] {
        hub.change(Kind::Node, node(name, 1, true));
        hub.connect(name, false);
    }
    hub.check(&["edge1: update null/node/edge1 1", "edge2: update null/node/edge2 1"]);

    hub.change(Kind::Pod, pod("web", "edge1", 2, &["page"]));
    hub.check(&["fetch default/configmap/page", "edge1: insert default/pod/web 2"]);
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 1))));
    hub.check(&["edge1: insert default/configmap/page 1"]);

    hub.change(Kind::ConfigMap, config("page", 3));
    hub.change(Kind::ConfigMap, config("other", 3));
    hub.change(Kind::Pod, pod("web2", "edge2", 4, &["page"]));
    hub.check(&[
        "edge1: update default/configmap/page 3",
        "edge2: insert default/configmap/page 3",
        "edge2: insert default/pod/web2 4",
    ]);
    let page = key("default/configmap/page");
    assert!(matches!(hub.downstream.access("edge2", &page), Access::Held { .. }));
    assert!(matches!(hub.downstream.access("edge3", &page), Access::Denied));
    assert_eq!(hub.downstream.binding(&key("default/pod/web")), Some(("edge1", "uid-web")));
}

#[test]
fn config_leaves_the_node_with_the_last_pod_that_uses_it() {
    let mut hub = Hub::listed();
    hub.connect("edge1", false);
    hub.change(Kind::Pod, pod("a", "edge1", 1, &["page"]));
    hub.change(Kind::Pod, pod("b", "edge1", 2, &["page"]));
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 1))));
    hub.outputs();
    hub.input(Input::Deleted(key("default/pod/a"), pod("a", "edge1", 5, &["page"])));
    hub.check(&["edge1: delete default/pod/a 5"]);
    let mut finished = pod("b", "edge1", 6, &["page"]);
    finished["status"] = json!({"phase": "Succeeded"});
    hub.change(Kind::Pod, finished);
    hub.check(&["edge1: delete default/configmap/page"]);
}

#[test]
fn echoes_are_not_sent_and_changes_that_matter_are() {
    let mut hub = Hub::listed();
    hub.change(Kind::Node, node("edge1", 1, true));
    hub.connect("edge1", false);
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    hub.outputs();

    hub.change(Kind::Node, node("edge1", 3, true));
    let mut echo = pod("web", "edge1", 4, &[]);
    echo["status"] = json!({"phase": "Running", "conditions": [{"type": "Ready"}]});
    echo["metadata"]["managedFields"] = json!([{"manager": "y"}]);
    hub.change(Kind::Pod, echo);
    hub.check(&[]);

    let mut deleted = pod("web", "edge1", 5, &[]);
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    hub.change(Kind::Pod, deleted);
    hub.check(&["edge1: update default/pod/web 5"]);
}

#[test]
fn condition_that_is_a_readiness_gate_is_sent() {
    let mut hub = Hub::listed();
    hub.connect("edge1", false);
    let mut gated = pod("web", "edge1", 2, &[]);
    gated["spec"]["readinessGates"] = json!([{"conditionType": "lb"}]);
    hub.change(Kind::Pod, gated.clone());
    hub.outputs();
    gated["metadata"]["resourceVersion"] = json!("3");
    gated["status"] = json!({"conditions": [{"type": "lb", "status": "True"}]});
    hub.change(Kind::Pod, gated);
    hub.check(&["edge1: update default/pod/web 3"]);
}

#[test]
fn managed_fields_do_not_go_over_the_link() {
    let mut hub = Hub::listed();
    hub.connect("edge1", false);
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    let Some(Output::Send { message, .. }) = hub.downstream.poll_output() else {
        panic!("the pod is sent")
    };
    let body: Value = message.content_as().expect("an object");
    assert_eq!((&body["kind"], &body["apiVersion"]), (&json!("Pod"), &json!("v1")));
    assert!(body["metadata"].get("managedFields").is_none());
}

#[test]
fn digest_brings_differences_deletes_and_then_the_answer() {
    let mut hub = Hub::listed();
    hub.change(Kind::Node, node("edge1", 1, true));
    for (name, version) in [("same", 10), ("echoed", 11), ("changed", 12), ("missing", 13)] {
        hub.change(Kind::Pod, pod(name, "edge1", version, &[]));
    }
    let mut echo = pod("echoed", "edge1", 20, &[]);
    echo["status"] = json!({"phase": "Running"});
    hub.change(Kind::Pod, echo);

    hub.connect("edge1", true);
    hub.check(&[]);
    hub.digest(
        "edge1",
        &[
            ("default/pod/same", "uid-same", "10"),
            ("default/pod/echoed", "uid-echoed", "15"),
            ("default/pod/changed", "uid-changed", "9"),
            ("default/pod/replaced", "uid-gone", "9"),
            ("default/secret/gone", "uid-gone", "9"),
            ("default/device/other", "uid-other", "9"),
            ("no path", "", ""),
            ("null/node/edge1", "uid-edge1", "1"),
        ],
    );
    hub.check(&[
        "edge1: delete default/secret/gone",
        "edge1: update default/pod/changed 12",
        "edge1: insert default/pod/missing 13",
        "edge1: delete default/pod/replaced",
        "edge1: response skerry/digest",
    ]);
}

#[test]
fn pod_of_another_uid_under_the_same_name_is_deleted_first() {
    let mut hub = Hub::listed();
    hub.change(Kind::Pod, pod("web", "edge1", 10, &[]));
    hub.connect("edge1", true);
    hub.digest("edge1", &[("default/pod/web", "uid-old", "4")]);
    hub.check(&[
        "edge1: delete default/pod/web",
        "edge1: insert default/pod/web 10",
        "edge1: response skerry/digest",
    ]);
}

#[test]
fn everything_is_pushed_when_no_digest_comes_and_a_late_one_still_deletes() {
    let mut hub = Hub::listed();
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    hub.connect("edge1", true);
    assert_eq!(hub.downstream.poll_timeout(), Some(hub.now + DIGEST_WAIT));
    hub.now += DIGEST_WAIT - Duration::from_millis(1);
    hub.input(Input::Tick);
    hub.check(&[]);
    hub.now += Duration::from_millis(1);
    hub.input(Input::Tick);
    hub.check(&["edge1: update default/pod/web 2"]);
    assert_eq!(hub.downstream.poll_timeout(), None);
    hub.digest("edge1", &[("default/pod/old", "u", "1"), ("default/pod/web", "uid-web", "1")]);
    hub.check(&["edge1: delete default/pod/old", "edge1: response skerry/digest"]);
}

#[test]
fn nothing_is_judged_before_all_lists_are_complete() {
    let mut hub = Hub::unlisted();
    hub.connect("edge1", true);
    hub.digest("edge1", &[("default/pod/web", "uid-web", "2"), ("default/pod/gone", "g", "1")]);
    hub.change(Kind::Pod, pod("web", "edge1", 2, &["page"]));
    for kind in [Kind::Pod, Kind::Node, Kind::Secret] {
        hub.input(Input::Listed(kind, BTreeSet::from([key("default/pod/web")])));
    }
    hub.check(&[]);
    hub.change(Kind::ConfigMap, config("page", 1));
    hub.input(Input::Listed(Kind::ConfigMap, BTreeSet::from([key("default/configmap/page")])));
    hub.check(&[
        "edge1: insert default/configmap/page 1",
        "edge1: delete default/pod/gone",
        "edge1: response skerry/digest",
    ]);
}

#[test]
fn object_missing_from_a_new_list_is_gone() {
    let mut hub = Hub::listed();
    hub.connect("edge1", false);
    hub.change(Kind::Pod, pod("web", "edge1", 2, &["page"]));
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 1))));
    hub.outputs();
    hub.input(Input::Listed(Kind::ConfigMap, BTreeSet::new()));
    hub.check(&["edge1: delete default/configmap/page 1"]);
    hub.input(Input::Listed(Kind::Pod, BTreeSet::new()));
    hub.check(&["edge1: delete default/pod/web 2"]);
}

#[test]
fn stock_node_gets_everything_again_and_the_deletes_that_it_missed() {
    let mut hub = Hub::listed();
    let first = hub.connect("edge1", false);
    hub.change(Kind::Pod, pod("stays", "edge1", 2, &[]));
    hub.change(Kind::Pod, pod("goes", "edge1", 3, &[]));
    hub.outputs();
    hub.input(Input::Disconnected { node: "edge1".into(), session: first });
    hub.input(Input::Deleted(key("default/pod/goes"), Value::Null));
    hub.check(&[]);
    hub.connect("edge1", false);
    hub.check(&["edge1: delete default/pod/goes", "edge1: update default/pod/stays 2"]);
}

#[test]
fn new_connection_replaces_the_old_one_and_late_words_about_the_old_one_change_nothing() {
    let mut hub = Hub::listed();
    let first = hub.connect("edge1", false);
    let second = hub.connect("edge1", false);
    hub.check(&["edge1: close 1"]);
    hub.input(Input::Disconnected { node: "edge1".into(), session: first });
    assert_eq!(hub.downstream.session("edge1"), Some(second));
}

#[test]
fn delete_is_sent_again_until_it_is_acknowledged() {
    let mut hub = Hub::listed();
    hub.connect("edge1", false);
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    hub.outputs();
    hub.input(Input::Deleted(key("default/pod/web"), Value::Null));
    let Some(Output::Send { .. }) = hub.downstream.poll_output() else { panic!("no delete") };
    let third = hub.connect("edge1", false);
    let outputs: Vec<_> = std::iter::from_fn(|| hub.downstream.poll_output()).collect();
    let Some(Output::Send { message, .. }) = outputs.into_iter().last() else {
        panic!("no delete")
    };
    assert_eq!(message.route.operation, "delete");
    let message = Arc::from(message);
    hub.input(Input::Acked { node: "edge1".into(), session: third, message });
    hub.connect("edge1", false);
    hub.check(&["edge1: close 2"]);
}

#[test]
fn pods_of_other_nodes_are_not_kept_until_such_a_node_connects() {
    let mut hub = Hub::listed();
    hub.change(Kind::Node, node("cloud1", 1, false));
    hub.change(Kind::Pod, pod("web", "cloud1", 2, &["page"]));
    assert_eq!(hub.downstream.binding(&key("default/pod/web")), None);
    hub.connect("cloud1", false);
    hub.check(&["relist cloud1", "fetch null/node/cloud1"]);
    hub.input(Input::Deleted(key("default/pod/old"), Value::Null));
    hub.input(Input::Fetched(key("null/node/cloud1"), Some(node("cloud1", 1, false))));
    let pods = vec![pod("web", "cloud1", 2, &[]), pod("old", "cloud1", 1, &[])];
    hub.input(Input::Relisted("cloud1".into(), pods));
    hub.check(&["cloud1: update null/node/cloud1 1", "cloud1: update default/pod/web 2"]);
}

#[test]
fn older_versions_and_late_deletes_of_a_former_object_change_nothing() {
    let mut hub = Hub::listed();
    hub.connect("edge1", false);
    hub.change(Kind::Pod, pod("web", "edge1", 5, &[]));
    hub.outputs();
    let mut older = pod("web", "edge1", 4, &[]);
    older["spec"]["hostname"] = json!("older");
    hub.change(Kind::Pod, older);
    let mut former = pod("web", "edge1", 3, &[]);
    former["metadata"]["uid"] = json!("former");
    hub.input(Input::Deleted(key("default/pod/web"), former));
    hub.check(&[]);
}

#[test]
fn deleted_node_object_closes_a_stock_connection_and_tells_our_own_edge() {
    let mut hub = Hub::listed();
    for name in ["stock", "ours"] {
        hub.change(Kind::Node, node(name, 1, true));
        hub.connect(name, name == "ours");
    }
    hub.digest("ours", &[]);
    hub.outputs();
    hub.input(Input::Deleted(key("null/node/stock"), Value::Null));
    hub.input(Input::Deleted(key("null/node/ours"), Value::Null));
    hub.check(&["stock: close 1", "ours: delete null/node/ours"]);
}

#[test]
fn objects_without_identity_are_ignored() {
    let mut hub = Hub::listed();
    for object in [json!(null), json!({"metadata": {}}), json!({"metadata": {"name": 1}})] {
        for kind in Kind::ALL {
            hub.change(kind, object.clone());
        }
    }
    hub.change(
        Kind::Pod,
        json!({"metadata": {"name": "x", "namespace": "n"}, "spec": {"nodeName": "edge1"}}),
    );
    hub.check(&[]);
}
