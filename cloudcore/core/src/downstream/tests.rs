use super::*;
use crate::objectsync::{Action, Outcome, Scope, SyncId, SyncSpec};
use serde_json::json;
use skerry_protocol::delivery::ack_required;
use skerry_protocol::digest::Held;
use std::hash::{DefaultHasher, Hasher};

struct Hub {
    downstream: Downstream,
    now: Instant,
    sessions: SessionId,
    /// Version of the record that was written last.
    record_version: u64,
    /// Nodes acknowledge everything at once, and the API does every write.
    is_prompt: bool,
    /// Nodes whose pods the API is as prompt to list, because they have connected and told nothing: as the watch has
    /// shown them.
    unread: BTreeSet<String>,
}

impl Hub {
    /// A hub whose lists of every kind are complete and empty, in a cluster that keeps no records.
    fn listed() -> Self {
        let mut hub = Self::unlisted();
        hub.input(Input::Sync(Word::Unavailable));
        for kind in Kind::ALL {
            hub.input(Input::Listed(kind, BTreeSet::new()));
        }
        hub
    }

    /// The same in a cluster that has `edge1`, keeps records, and has these: name, kind and name of the object, version.
    fn recorded(records: &[(&str, Kind, &str, &str)]) -> Self {
        let mut hub = Self::unlisted();
        hub.change(Kind::Node, node("edge1", 1, true));
        for kind in Kind::ALL {
            let keys = if kind == Kind::Node { vec![key("null/node/edge1")] } else { vec![] };
            hub.input(Input::Listed(kind, keys.into_iter().collect()));
        }
        let mut names = BTreeSet::new();
        for (name, kind, object, version) in records {
            let namespace = (*kind != Kind::Node).then(|| Arc::from("default"));
            let spec = SyncSpec {
                api_version: kind.api_version().into(),
                kind: kind.api_kind().into(),
                name: (*object).into(),
            };
            let name: Arc<str> = (*name).into();
            names.insert((namespace.clone(), Arc::clone(&name)));
            let version = Some(Arc::from(*version));
            let (at, is_in_list) = (1, true);
            hub.input(Input::Sync(Word::Seen { name, namespace, spec, version, at, is_in_list }));
        }
        let (cluster, namespaced) =
            names.into_iter().partition(|(namespace, _)| namespace.is_none());
        hub.input(Input::Sync(Word::Listed(Scope::Cluster, cluster)));
        hub.input(Input::Sync(Word::Listed(Scope::Namespaced, namespaced)));
        hub
    }

    fn unlisted() -> Self {
        let downstream = Downstream::default();
        let (now, unread) = (Instant::now(), BTreeSet::new());
        Self { downstream, now, sessions: 0, record_version: 1, is_prompt: true, unread }
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
        let capabilities = Capabilities { digest, ..Capabilities::default() };
        self.unread.insert(node.clone());
        self.input(Input::Connected { node, session, capabilities });
        self.sessions
    }

    fn digest(&mut self, node: &str, held: &[(&str, &str, &str)]) {
        let held = held.iter().map(|(path, uid, rv)| {
            ((*path).to_owned(), Held { uid: (*uid).into(), rv: (*rv).into() })
        });
        self.send_digest(node, Digest { objects: held.collect(), ..Digest::default() });
    }

    fn send_digest(&mut self, node: &str, digest: Digest) {
        self.unread.remove(node);
        let resource = skerry_protocol::digest::RESOURCE;
        let request = Message::new(0, "metamanager", "meta", Operation::Query, resource, &digest);
        let (node, session) = (node.to_owned(), self.sessions);
        self.input(Input::Digest { node, session, digest, request: Box::new(request) });
    }

    fn poll(&mut self) -> Option<Output> {
        loop {
            let output = self.downstream.poll_output()?;
            match &output {
                Output::Relist(node) if self.unread.remove(node) => self.relist(&node.clone()),
                _ => return Some(output),
            }
        }
    }

    /// The API lists what the watch has shown.
    fn relist(&mut self, node: &str) {
        let pods = self.downstream.placed.iter();
        let pods = pods.filter(|(key, of)| key.kind() == Kind::Pod && *of.node == *node);
        let pods = pods.map(|(_, of)| serde_json::from_str(of.version.text.get()).expect("json"));
        let pods = pods.collect();
        let at = self.downstream.newest.get(&Kind::Pod).copied();
        self.input(Input::Relisted(node.into(), pods, at));
    }

    /// What came out, as short lines.
    fn outputs(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(output) = self.poll() {
            lines.push(line(&output));
            match output {
                Output::Send { node, session, message }
                    if self.is_prompt && ack_required(&message) =>
                {
                    self.ack(&node, session, *message);
                }
                Output::Sync(Write { node, id, .. }) if self.is_prompt => {
                    self.record_version += 1;
                    let outcome = Outcome::Done(self.record_version);
                    self.input(Input::Sync(Word::Written { node, id, outcome }));
                }
                _ => {}
            }
        }
        lines
    }

    fn ack(&mut self, node: &str, session: SessionId, message: Message) {
        let (node, message) = (node.to_owned(), Arc::new(message));
        self.input(Input::Acked { node, session, message });
    }

    /// The messages that came out; nobody has acknowledged them.
    fn messages(&mut self) -> Vec<Message> {
        let outputs = std::iter::from_fn(|| self.poll());
        let message = |output| match output {
            Output::Send { message, .. } => Some(*message),
            _ => None,
        };
        outputs.filter_map(message).collect()
    }

    fn push(&mut self, node: &str, path: &str, object: Value, operation: Operation) {
        let key = Key::watched(&path.parse().expect(path)).expect(path);
        let object = Watched::read(object).expect("an object");
        self.input(Input::Pushed { node: node.into(), key, object, operation });
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
        Output::Sync(write) => match &write.action {
            Action::Create(version) => format!("create {} {version}", write.name()),
            Action::Status(version) => format!("status {} {version}", write.name()),
            Action::Delete => format!("remove {}", write.name()),
        },
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
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 1)), None));
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
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 1)), None));
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
    let message = hub.messages().pop().expect("the pod is sent");
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
    for version in [15, 20] {
        let mut echo = pod("echoed", "edge1", version, &[]);
        echo["status"] = json!({"phase": "Running", "message": version.to_string()});
        hub.change(Kind::Pod, echo);
    }

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
    // No device has been seen yet, so the watch may lag behind.
    hub.check(&["fetch default/device/other"]);
    hub.input(Input::Fetched(key("default/device/other"), None, Some(20)));
    hub.check(&[
        "edge1: update default/pod/changed 12",
        "edge1: insert default/pod/missing 13",
        "edge1: delete default/pod/replaced",
        "edge1: delete default/device/other",
        "edge1: delete default/secret/gone",
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
    for kind in Kind::ALL.into_iter().filter(|kind| kind.is_custom()) {
        hub.input(Input::Unavailable(kind));
    }
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
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 1)), None));
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
    hub.is_prompt = false;
    hub.input(Input::Deleted(key("default/pod/web"), Value::Null));
    hub.check(&["edge1: delete default/pod/web 2"]);
    hub.connect("edge1", false);
    hub.is_prompt = true;
    hub.check(&["edge1: close 1", "edge1: delete default/pod/web"]);
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
    hub.unread.clear();
    hub.check(&["relist cloud1", "fetch null/node/cloud1"]);
    hub.input(Input::Deleted(key("default/pod/old"), Value::Null));
    hub.input(Input::Fetched(key("null/node/cloud1"), Some(node("cloud1", 1, false)), None));
    let pods = vec![pod("web", "cloud1", 2, &[]), pod("old", "cloud1", 1, &[])];
    hub.input(Input::Relisted("cloud1".into(), pods, None));
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

fn model(name: &str, version: u64) -> Value {
    json!({"metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"),
        "resourceVersion": version.to_string()}, "spec": {"v": version}})
}

fn device(name: &str, node: &str, model: &str, version: u64) -> Value {
    json!({"metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"),
        "resourceVersion": version.to_string(), "labels": {"description": "boiler"}},
        "spec": {"nodeName": node, "deviceModelRef": {"name": model}, "v": version}})
}

#[test]
fn device_waits_for_its_model_and_the_model_leaves_after_it() {
    let mut hub = Hub::listed();
    hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.check(&["edge1: response skerry/digest"]);
    hub.change(Kind::Device, device("d", "edge1", "m", 2));
    hub.check(&[]);
    hub.change(Kind::DeviceModel, model("m", 3));
    hub.change(Kind::DeviceModel, model("unused", 4));
    hub.check(&["edge1: insert default/devicemodel/m 3", "edge1: insert default/device/d 2"]);
    hub.change(Kind::DeviceModel, model("m", 5));
    hub.check(&["edge1: update default/devicemodel/m 5"]);
    let mut freed = device("d", "edge1", "m", 6);
    freed["spec"]["nodeName"] = json!("");
    hub.change(Kind::Device, freed);
    hub.check(&["edge1: delete default/device/d 2", "edge1: delete default/devicemodel/m"]);
}

#[test]
fn rules_go_where_a_device_names_them_and_not_to_a_kubeedge_edge() {
    let named = |node: &str, version, rules: &str| {
        let mut device = device("d", node, "m", version);
        device["metadata"]["annotations"] = json!({"fleet.skerry.dev/rules": rules});
        device
    };
    let mut hub = Hub::listed();
    hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.connect("edge2", false);
    hub.check(&["edge1: response skerry/digest"]);
    hub.change(Kind::DeviceModel, model("m", 3));
    hub.change(Kind::DeviceRule, model("alarm", 4));
    hub.change(Kind::Device, named("edge1", 5, r#"["alarm", "absent"]"#));
    hub.check(&[
        "edge1: insert default/devicemodel/m 3",
        "edge1: insert default/device/d 5",
        "edge1: insert default/devicerule/alarm 4",
    ]);
    hub.change(Kind::DeviceRule, model("alarm", 6));
    hub.check(&["edge1: update default/devicerule/alarm 6"]);
    hub.change(Kind::Device, named("edge1", 7, "[]"));
    hub.check(&["edge1: update default/device/d 7", "edge1: delete default/devicerule/alarm"]);
    let mut other = named("edge2", 8, r#"["alarm"]"#);
    other["metadata"]["name"] = "e".into();
    other["metadata"]["uid"] = "uid-e".into();
    hub.change(Kind::Device, other);
    let sent = hub.messages();
    let resources: Vec<_> = sent.iter().map(|message| &*message.route.resource).collect();
    assert!(resources.contains(&"default/device/e"), "{resources:?}");
    assert!(!resources.contains(&"default/devicerule/alarm"), "{resources:?}");
}

#[test]
fn model_stays_while_the_end_of_its_device_is_under_way() {
    let mut hub = Hub::listed();
    let session = hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.change(Kind::DeviceModel, model("m", 3));
    hub.change(Kind::Device, device("d", "edge1", "m", 2));
    hub.outputs();
    hub.is_prompt = false;
    hub.input(Input::Deleted(key("default/device/d"), Value::Null));
    let mut deleted = hub.messages();
    assert_eq!(deleted.len(), 1, "{deleted:?}");
    assert_eq!(deleted[0].route.source, "devicecontroller");
    hub.ack("edge1", session, deleted.remove(0));
    hub.check(&["edge1: delete default/devicemodel/m"]);
}

#[test]
fn stock_device_twin_is_told_who_joins_and_leaves_and_everything_after_a_reconnect() {
    let mut hub = Hub::listed();
    hub.connect("edge1", false);
    hub.check(&[]);
    hub.change(Kind::DeviceModel, model("m", 3));
    hub.change(Kind::Device, device("d", "edge1", "m", 2));
    hub.is_prompt = false;
    let messages = hub.messages();
    let resources: Vec<_> = messages.iter().map(|message| &*message.route.resource).collect();
    assert_eq!(resources, ["membership", "default/devicemodel/m", "default/device/d"]);
    assert_eq!(
        (&*messages[0].route.group, &*messages[0].route.source),
        ("twin", "devicecontroller")
    );
    let body: Value = messages[0].content_as().expect("an object");
    let id = &body["added_devices"][0];
    assert_eq!((&id["id"], &id["description"]), (&json!("default/d"), &json!("boiler")));
    assert_eq!(body["removed_devices"], Value::Null);
    assert!(!ack_required(&messages[0]));

    hub.connect("edge1", false);
    let messages = hub.messages();
    assert_eq!(messages[0].route.resource, "membership/detail");
    assert!(!ack_required(&messages[0]));
    let body: Value = messages[0].content_as().expect("an object");
    assert_eq!(body["devices"][0]["id"], "default/d");
    assert_eq!(messages[2].route.operation, "update", "{:?}", messages[2]);
    for message in messages.into_iter().skip(1) {
        hub.ack("edge1", 2, message);
    }
    hub.input(Input::Deleted(key("default/device/d"), Value::Null));
    let messages = hub.messages();
    let body: Value = messages[0].content_as().expect("an object");
    assert_eq!(body["removed_devices"][0]["id"], "default/d");
    let last: Value = messages[1].content_as().expect("the device");
    assert_eq!(last["spec"]["nodeName"], "edge1", "a mapper needs the whole object");
}

#[test]
fn access_goes_to_the_nodes_of_its_account_and_names_no_node() {
    let mut hub = Hub::listed();
    hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.outputs();
    let mut with_account = pod("web", "edge1", 2, &[]);
    with_account["spec"]["serviceAccountName"] = json!("app");
    hub.change(Kind::Pod, with_account);
    hub.check(&["edge1: insert default/pod/web 2"]);
    let mut access = model("app", 3);
    access["status"] = json!({"nodeList": ["edge1", "edge2"]});
    hub.is_prompt = false;
    hub.change(Kind::ServiceAccountAccess, access);
    let message = hub.messages().pop().expect("the access");
    assert_eq!(message.route.source, "policycontroller");
    let body: Value = message.content_as().expect("an object");
    assert_eq!(body["status"]["nodeList"], json!([]));
    assert_eq!(body["apiVersion"], "policy.kubeedge.io/v1alpha1");
}

#[test]
fn kind_that_the_cluster_lacks_is_not_judged_until_it_is_there() {
    let mut hub = Hub::unlisted();
    hub.input(Input::Sync(Word::Unavailable));
    for kind in Kind::ALL {
        let is_device = kind == Kind::Device;
        hub.input(if is_device {
            Input::Unavailable(kind)
        } else {
            Input::Listed(kind, BTreeSet::new())
        });
    }
    hub.connect("edge1", true);
    hub.digest("edge1", &[("default/device/d", "uid-d", "2"), ("default/pod/p", "uid-p", "2")]);
    hub.check(&["relist edge1"]);
    hub.input(Input::Relisted("edge1".into(), Vec::new(), Some(3)));
    hub.check(&["edge1: delete default/pod/p", "edge1: response skerry/digest"]);
    hub.input(Input::Listed(Kind::Device, BTreeSet::new()));
    hub.check(&["edge1: delete default/device/d"]);
}

#[test]
fn node_that_does_not_answer_costs_keys_and_gets_only_the_newest_versions() {
    let mut hub = Hub::listed();
    let session = hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.outputs();
    hub.is_prompt = false;
    for version in 1..=3 {
        for number in 0..2 * OUTSTANDING_MAX {
            let name = format!("pod{number:04}");
            hub.change(Kind::Pod, {
                let mut pod = pod(&name, "edge1", 10 + version, &[]);
                pod["spec"]["hostname"] = json!(version.to_string());
                pod
            });
        }
    }
    let mut unacked = hub.messages();
    assert_eq!(unacked.len(), OUTSTANDING_MAX);
    let backlog = hub.downstream.backlog("edge1").expect("connected");
    assert_eq!((backlog.outstanding, backlog.waiting), (OUTSTANDING_MAX, OUTSTANDING_MAX));
    let mut sent: BTreeMap<String, Vec<String>> = BTreeMap::new();
    while !unacked.is_empty() {
        for message in std::mem::take(&mut unacked) {
            let version = message.header.resourceversion.clone();
            sent.entry(message.route.resource.clone()).or_default().push(version);
            hub.ack("edge1", session, message);
        }
        let backlog = hub.downstream.backlog("edge1").expect("connected");
        assert!(backlog.outstanding <= OUTSTANDING_MAX);
        unacked = hub.messages();
    }
    assert_eq!(sent.len(), 2 * OUTSTANDING_MAX);
    assert!(sent.values().all(|versions| *versions == ["13"]), "{sent:?}");
    assert_eq!(hub.downstream.backlog("edge1"), Some(Backlog::default()));
}

#[test]
fn bytes_outstanding_are_bounded_and_a_larger_object_still_goes() {
    let mut hub = Hub::listed();
    let session = hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.outputs();
    hub.is_prompt = false;
    for number in 0..4 {
        let mut pod = pod(&format!("pod{number}"), "edge1", 10, &[]);
        pod["metadata"]["annotations"] = json!({"fill": "x".repeat(OUTSTANDING_LEN_MAX * 3 / 4)});
        hub.change(Kind::Pod, pod);
    }
    let first = hub.messages();
    assert_eq!(first.len(), 2, "the second one goes over the bound");
    for message in first {
        hub.ack("edge1", session, message);
    }
    assert_eq!(hub.messages().len(), 2);
}

#[test]
fn object_with_a_message_under_way_waits_and_goes_once_in_its_newest_version() {
    let mut hub = Hub::listed();
    let session = hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.outputs();
    hub.is_prompt = false;
    let labelled = |version: u64| {
        let mut pod = pod("web", "edge1", version, &[]);
        pod["metadata"]["labels"] = json!({"v": version.to_string()});
        pod
    };
    hub.change(Kind::Pod, labelled(2));
    let mut first = hub.messages();
    hub.change(Kind::Pod, labelled(3));
    hub.change(Kind::Pod, labelled(4));
    assert!(hub.messages().is_empty());
    let first = first.remove(0);
    // The node does not take this version, so the next one gets its chance; a late answer changes nothing.
    let message = Arc::new(first.clone());
    let node = "edge1".to_owned();
    hub.input(Input::Unanswered { node, session, message, dropped: false });
    let second = hub.messages();
    assert_eq!(second[0].header.resourceversion, "4");
    hub.ack("edge1", session, first);
    assert_eq!(hub.downstream.backlog("edge1").expect("connected").outstanding, 1);
}

#[test]
fn change_to_a_config_of_all_nodes_shares_one_body() {
    let mut hub = Hub::listed();
    for number in 0..100 {
        let node = format!("edge{number}");
        hub.connect(&node, true);
        hub.digest(&node, &[]);
        hub.change(Kind::Pod, pod(&format!("pod{number}"), &node, 2, &["page"]));
    }
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 1)), None));
    hub.outputs();
    hub.is_prompt = false;
    hub.change(Kind::ConfigMap, config("page", 3));
    let messages = hub.messages();
    assert_eq!(messages.len(), 100);
    let body = messages[0].content.get().as_ptr();
    assert!(messages.iter().all(|message| std::ptr::eq(message.content.get().as_ptr(), body)));
}

#[test]
fn node_goes_without_its_images() {
    let mut hub = Hub::listed();
    hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.outputs();
    hub.is_prompt = false;
    let mut node = node("edge1", 2, true);
    node["status"] = json!({"images": [{"names": ["x"]}], "phase": "kept"});
    hub.change(Kind::Node, node);
    let body: Value = hub.messages()[0].content_as().expect("a node");
    assert_eq!(body["status"], json!({"phase": "kept"}));
}

#[test]
fn answer_to_a_digest_waits_for_all_that_differed_and_for_nothing_that_came_later() {
    let mut hub = Hub::listed();
    let session = hub.connect("edge1", true);
    hub.change(Kind::Pod, pod("a", "edge1", 2, &[]));
    hub.is_prompt = false;
    hub.digest("edge1", &[("default/pod/gone", "g", "1")]);
    let first = hub.messages();
    assert_eq!(first.len(), 2);
    hub.change(Kind::Pod, pod("later", "edge1", 3, &[]));
    assert_eq!(hub.messages().len(), 1);
    let mut first = first.into_iter();
    hub.ack("edge1", session, first.next().expect("two"));
    hub.check(&[]);
    hub.ack("edge1", session, first.next().expect("two"));
    hub.check(&["edge1: response skerry/digest"]);
}

// Records of KubeEdge's edges

#[test]
fn object_goes_to_a_stock_node_when_its_record_is_there_and_the_record_follows() {
    let mut hub = Hub::recorded(&[]);
    hub.connect("edge1", false);
    hub.check(&[
        "create edge1.uid-edge1 0",
        "edge1: update null/node/edge1 1",
        "status edge1.uid-edge1 1",
    ]);
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    hub.check(&[
        "create edge1.uid-web 0",
        "edge1: insert default/pod/web 2",
        "status edge1.uid-web 2",
    ]);
    hub.input(Input::Deleted(key("default/pod/web"), Value::Null));
    hub.check(&["edge1: delete default/pod/web 2", "remove edge1.uid-web"]);
}

#[test]
fn own_node_has_no_records_and_those_of_an_earlier_life_go() {
    let mut hub = Hub::recorded(&[("edge1.uid-web", Kind::Pod, "web", "2")]);
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    hub.connect("edge1", true);
    hub.check(&["remove edge1.uid-web"]);
    hub.digest("edge1", &[]);
    hub.check(&[
        "edge1: update null/node/edge1 1",
        "edge1: insert default/pod/web 2",
        "edge1: response skerry/digest",
    ]);
}

#[test]
fn after_a_restart_a_stock_node_gets_what_is_newer_or_gone_and_nothing_else() {
    let mut hub = Hub::recorded(&[
        ("edge1.uid-edge1", Kind::Node, "edge1", "1"),
        ("edge1.uid-same", Kind::Pod, "same", "7"),
        ("edge1.uid-newer", Kind::Pod, "newer", "7"),
        ("edge1.uid-never", Kind::Pod, "never", "0"),
        ("edge1.uid-gone", Kind::Pod, "gone", "7"),
        ("edge1.uid-former", Kind::Pod, "again", "7"),
        ("edge1.uid-page", Kind::ConfigMap, "page", "7"),
    ]);
    for (name, version) in [("same", 7), ("newer", 9), ("never", 6), ("again", 8), ("new", 8)] {
        hub.change(Kind::Pod, pod(name, "edge1", version, &[]));
    }
    hub.connect("edge1", false);
    hub.check(&[
        "edge1: update null/node/edge1 1",
        "edge1: delete default/pod/again",
        "edge1: delete default/pod/gone",
        "edge1: update default/pod/never 6",
        "edge1: update default/pod/newer 9",
        "create edge1.uid-new 0",
        "edge1: update default/pod/new 8",
        "remove edge1.uid-former",
        "remove edge1.uid-gone",
        "status edge1.uid-never 6",
        "status edge1.uid-newer 9",
        "create edge1.uid-again 0",
        "edge1: insert default/pod/again 8",
        "status edge1.uid-new 8",
        "status edge1.uid-page 0",
        "edge1: delete default/configmap/page",
        "status edge1.uid-again 8",
        "remove edge1.uid-page",
    ]);
}

#[test]
fn records_of_a_node_that_is_gone_are_removed() {
    let mut hub = Hub::recorded(&[("edge9.uid-web", Kind::Pod, "web", "7")]);
    hub.check(&["fetch null/node/edge9"]);
    hub.input(Input::Fetched(key("null/node/edge9"), None, Some(20)));
    hub.check(&["remove edge9.uid-web"]);
    hub.connect("edge1", false);
    hub.outputs();
    hub.input(Input::Deleted(key("null/node/edge1"), node("edge1", 30, true)));
    hub.check(&["edge1: close 1", "remove edge1.uid-edge1"]);
}

#[test]
fn records_of_a_node_that_the_watch_has_not_got_to_stay() {
    let mut hub = Hub::recorded(&[("edge9.uid-web", Kind::Pod, "web", "7")]);
    hub.check(&["fetch null/node/edge9"]);
    hub.input(Input::Fetched(key("null/node/edge9"), Some(node("edge9", 6, true)), Some(20)));
    hub.check(&[]);
    // Nor does late word of the end of its predecessor touch them, or a read that is older than they are.
    let record = |version: &str, at: u64| {
        Input::Sync(Word::Seen {
            name: "edge9.uid-web".into(),
            namespace: Some("default".into()),
            spec: SyncSpec { api_version: "v1".into(), kind: "Pod".into(), name: "web".into() },
            version: Some(version.into()),
            at,
            is_in_list: false,
        })
    };
    hub.change(Kind::Node, node("edge9", 6, true));
    hub.input(record("8", 25));
    hub.input(Input::Deleted(key("null/node/edge9"), node("edge9", 7, true)));
    hub.check(&[]);
    let names = BTreeSet::from([(Some("default".into()), "edge9.uid-web".into())]);
    hub.input(Input::Sync(Word::Listed(Scope::Namespaced, names)));
    hub.check(&["fetch null/node/edge9"]);
    hub.input(record("9", 35));
    hub.input(Input::Fetched(key("null/node/edge9"), None, Some(30)));
    hub.check(&[]);
}

#[test]
fn record_that_the_api_refuses_does_not_hold_the_object_back() {
    let mut hub = Hub::recorded(&[]);
    hub.connect("edge1", false);
    hub.outputs();
    hub.is_prompt = false;
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    hub.check(&["create edge1.uid-web 0"]);
    let id = SyncId { namespace: Some("default".into()), uid: "uid-web".into() };
    let outcome = Outcome::Refused;
    hub.input(Input::Sync(Word::Written { node: "edge1".into(), id, outcome }));
    hub.check(&["edge1: insert default/pod/web 2"]);
}

#[test]
fn nothing_waits_for_records_when_the_cluster_loses_their_kinds() {
    let mut hub = Hub::recorded(&[]);
    hub.connect("edge1", false);
    hub.outputs();
    hub.is_prompt = false;
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    hub.check(&["create edge1.uid-web 0"]);
    hub.input(Input::Sync(Word::Unavailable));
    hub.check(&["edge1: insert default/pod/web 2"]);
}

// Watched objects

fn service(name: &str, uid: &str, version: u64) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default",
        "uid": uid, "resourceVersion": version.to_string(), "managedFields": []}})
}

#[test]
fn watched_object_goes_last_and_is_recorded_as_what_it_is() {
    let mut hub = Hub::recorded(&[]);
    hub.connect("edge1", false);
    hub.outputs();
    hub.push("edge1", "default/service/web", service("web", "u", 5), Operation::Insert);
    hub.push("edge2", "default/service/web", service("web", "u", 5), Operation::Insert);
    hub.check(&["edge1: insert default/service/web 5", "create edge1.u 5"]);
    hub.push("edge1", "default/service/web", service("web", "u", 5), Operation::Insert);
    hub.check(&[]);
    hub.push("edge1", "default/service/web", service("web", "u", 6), Operation::Delete);
    hub.check(&["edge1: delete default/service/web 6", "remove edge1.u"]);
}

#[test]
fn watched_object_that_the_node_gets_anyway_is_not_sent_twice() {
    let mut hub = Hub::listed();
    hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    hub.outputs();
    let mut pushed = pod("web", "edge1", 2, &[]);
    pushed["apiVersion"] = json!("v1");
    pushed["kind"] = json!("Pod");
    hub.push("edge1", "default/pod/web", pushed.clone(), Operation::Insert);
    hub.check(&[]);
    pushed["metadata"]["name"] = json!("other");
    hub.push("edge1", "default/pod/other", pushed, Operation::Insert);
    hub.check(&["edge1: insert default/pod/other 2"]);
}

#[test]
fn watched_object_of_which_a_record_tells_is_neither_taken_away_nor_kept_back() {
    // Of an earlier connection, on which an application watched these.
    let mut hub = Hub::recorded(&[
        ("edge1.uid-cloud1", Kind::Node, "cloud1", "4"),
        ("edge1.uid-page", Kind::ConfigMap, "page", "4"),
    ]);
    hub.connect("edge1", false);
    for (path, kind, mut object) in [
        ("null/node/cloud1", "Node", node("cloud1", 5, false)),
        ("default/configmap/page", "ConfigMap", config("page", 5)),
    ] {
        object["apiVersion"] = json!("v1");
        object["kind"] = json!(kind);
        hub.push("edge1", path, object, Operation::Insert);
    }
    let outputs = hub.outputs();
    for line in ["edge1: insert null/node/cloud1 5", "edge1: insert default/configmap/page 5"] {
        assert!(outputs.contains(&line.to_owned()), "{outputs:?}");
    }
    assert!(!outputs.iter().any(|line| line.contains("delete")), "{outputs:?}");
}

#[test]
fn watched_objects_of_a_node_that_does_not_answer_are_bounded() {
    let mut hub = Hub::listed();
    hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.outputs();
    hub.is_prompt = false;
    for number in 0..=OUTSTANDING_MAX + PUSHED_MAX {
        let name = format!("s{number}");
        let path = format!("default/service/{name}");
        hub.push("edge1", &path, service(&name, &name, 5), Operation::Insert);
        assert!(
            hub.outputs()
                .iter()
                .all(|line| number == OUTSTANDING_MAX + PUSHED_MAX || !line.contains("close"))
        );
    }
    assert_eq!(hub.downstream.session("edge1"), None, "it was cut");
}

#[test]
fn watched_object_that_our_own_node_tells_to_hold_is_not_sent_again() {
    let held = |uid: &str, rv: &str| Held { uid: uid.into(), rv: rv.into() };
    let mut hub = Hub::listed();
    hub.connect("edge1", true);
    let names = ["same", "older", "other-uid", "twice"];
    for name in names {
        let path = format!("default/service/{name}");
        hub.push("edge1", &path, service(name, "u", 5), Operation::Insert);
    }
    hub.check(&[]);
    let told =
        [("same", "u", "5"), ("older", "u", "4"), ("other-uid", "v", "5"), ("twice", "u", "5")];
    let path = |name: &str| format!("default/service/{name}");
    let watched = told.map(|(name, uid, rv)| (path(name), held(uid, rv)));
    hub.send_digest("edge1", Digest { watched: watched.into(), ..Digest::default() });
    let outputs = hub.outputs();
    for (name, is_sent) in [("same", false), ("older", true), ("other-uid", true), ("twice", false)]
    {
        let line = format!("edge1: insert default/service/{name} 5");
        assert_eq!(outputs.contains(&line), is_sent, "{name}: {outputs:?}");
    }
    // What the node told is used once: another watch may have been told of its end meanwhile.
    hub.push("edge1", "default/service/twice", service("twice", "u", 5), Operation::Insert);
    hub.check(&["edge1: insert default/service/twice 5"]);
    // The end of one is told whatever the node held.
    hub.connect("edge1", true);
    hub.outputs();
    let watched = [(path("same"), held("u", "5"))].into();
    hub.send_digest("edge1", Digest { watched, ..Digest::default() });
    hub.outputs();
    hub.push("edge1", "default/service/same", service("same", "u", 5), Operation::Delete);
    hub.check(&["edge1: delete default/service/same 5"]);
}

#[test]
fn object_that_is_only_watched_is_not_taken_away_as_one_that_no_pod_needs() {
    let mut hub = Hub::listed();
    hub.change(Kind::ConfigMap, config("page", 5));
    hub.connect("edge1", true);
    let held = Held { uid: "uid-page".into(), rv: "5".into() };
    let watched = BTreeMap::from([("default/configmap/page".to_owned(), held)]);
    hub.send_digest("edge1", Digest { watched: watched.clone(), ..Digest::default() });
    hub.check(&["edge1: response skerry/digest"]);
    // Where a pod needs it, too, the node has it already.
    hub.change(Kind::Pod, pod("web", "edge1", 6, &["page"]));
    hub.outputs();
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 5)), Some(6)));
    hub.outputs();
    hub.connect("edge1", true);
    hub.outputs();
    let held = Held { uid: "uid-web".into(), rv: "6".into() };
    let objects = BTreeMap::from([("default/pod/web".to_owned(), held)]);
    hub.send_digest("edge1", Digest { objects, watched, ..Digest::default() });
    hub.check(&["edge1: response skerry/digest"]);
}

#[test]
fn watched_changes_that_wait_are_one() {
    let mut hub = Hub::listed();
    let session = hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.outputs();
    hub.is_prompt = false;
    hub.push("edge1", "default/service/a", service("a", "u", 5), Operation::Insert);
    let first = hub.messages().pop().expect("a message");
    hub.push("edge1", "default/service/a", service("a", "u", 6), Operation::Update);
    hub.push("edge1", "default/service/a", service("a", "u", 7), Operation::Update);
    assert!(hub.messages().is_empty());
    hub.ack("edge1", session, first);
    hub.check(&["edge1: update default/service/a 7"]);
}

// Many of everything, in any order

/// A small generator, so that a seed gives the same run everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.0);
        self.0 = hasher.finish();
        usize::try_from(self.0 % bound as u64).expect("below the bound")
    }
}

#[test]
fn acks_in_any_order_keep_the_order_per_object_and_the_bounds() {
    for seed in 0..8 {
        let mut random = Random(seed);
        let mut hub = Hub::listed();
        hub.is_prompt = false;
        let session = hub.connect("edge1", seed % 2 == 0);
        if seed % 2 == 0 {
            hub.digest("edge1", &[]);
        }
        let mut unacked: Vec<Message> = Vec::new();
        let mut last: BTreeMap<String, u64> = BTreeMap::new();
        let mut held: BTreeMap<String, u64> = BTreeMap::new();
        let mut api: BTreeMap<String, u64> = BTreeMap::new();
        for version in 1..1500_u64 {
            let name = format!("p{}", random.below(700));
            let path = format!("default/pod/{name}");
            if random.below(5) == 0 && api.remove(&path).is_some() {
                hub.input(Input::Deleted(key(&path), Value::Null));
            } else {
                let mut pod = pod(&name, "edge1", version, &[]);
                pod["metadata"]["labels"] = json!({"v": version.to_string()});
                hub.change(Kind::Pod, pod);
                api.insert(path, version);
            }
            unacked.extend(hub.messages().into_iter().filter(ack_required));
            assert!(unacked.len() <= OUTSTANDING_MAX, "seed {seed}");
            let resources: BTreeSet<_> = unacked.iter().map(|of| &of.route.resource).collect();
            assert_eq!(resources.len(), unacked.len(), "seed {seed}: one per object");
            for _ in 0..random.below(3) {
                if !unacked.is_empty() {
                    let message = unacked.swap_remove(random.below(unacked.len()));
                    deliver(&message, &mut held, &mut last);
                    hub.ack("edge1", session, message);
                }
            }
        }
        loop {
            unacked.extend(hub.messages().into_iter().filter(ack_required));
            if unacked.is_empty() {
                break;
            }
            let message = unacked.swap_remove(random.below(unacked.len()));
            deliver(&message, &mut held, &mut last);
            hub.ack("edge1", session, message);
        }
        assert_eq!(held, api, "seed {seed}");
    }
}

fn deliver(message: &Message, held: &mut BTreeMap<String, u64>, last: &mut BTreeMap<String, u64>) {
    let path = message.route.resource.clone();
    if message.route.operation == "delete" {
        held.remove(&path);
        return;
    }
    let version = message.header.resourceversion.parse().expect("a number");
    assert!(last.insert(path.clone(), version).is_none_or(|last| last < version), "{path}");
    held.insert(path, version);
}

// A hub that lags behind another one, which the node has left

#[test]
fn pods_of_a_stock_node_are_read_before_anything_goes_to_it() {
    let mut hub = Hub::recorded(&[("edge1.uid-web", Kind::Pod, "web", "2")]);
    hub.unread.clear();
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    hub.change(Kind::Pod, pod("web", "edge1", 3, &[]));
    hub.connect("edge1", false);
    hub.unread.clear();
    hub.check(&["relist edge1"]);
    // Another hub has taken it away, and its record; neither watch has shown that.
    hub.input(Input::Relisted("edge1".into(), Vec::new(), Some(9)));
    let outputs = hub.outputs();
    assert!(outputs.contains(&"edge1: delete default/pod/web".to_owned()), "{outputs:?}");
    assert!(!outputs.iter().any(|line| line.contains("update default/pod/web")), "{outputs:?}");
}

#[test]
fn answer_to_an_older_list_of_pods_does_not_count_for_a_newer_connection() {
    let mut hub = Hub::listed();
    let list = |hub: &mut Hub, pods, at| hub.input(Input::Relisted("edge1".into(), pods, Some(at)));
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    for _ in 0..2 {
        hub.connect("edge1", false);
        hub.unread.clear();
        assert!(hub.outputs().contains(&"relist edge1".to_owned()));
    }
    list(&mut hub, vec![pod("web", "edge1", 2, &[])], 3);
    hub.check(&[]);
    list(&mut hub, Vec::new(), 9);
    let outputs = hub.outputs();
    assert!(!outputs.iter().any(|line| line.contains("pod/web")), "{outputs:?}");
    // Nor does it when it is the last to arrive.
    hub.change(Kind::Pod, pod("new", "edge1", 12, &[]));
    for _ in 0..2 {
        hub.connect("edge1", false);
        hub.unread.clear();
        hub.outputs();
    }
    list(&mut hub, vec![pod("new", "edge1", 20, &[])], 20);
    list(&mut hub, vec![pod("new", "edge1", 12, &[])], 15);
    let outputs = hub.outputs();
    assert!(outputs.contains(&"edge1: update default/pod/new 20".to_owned()), "{outputs:?}");
}

#[test]
fn what_a_node_holds_in_a_newer_version_is_read_before_anything_is_sent() {
    let mut hub = Hub::listed();
    hub.change(Kind::Pod, pod("web", "edge1", 5, &[]));
    hub.connect("edge1", true);
    hub.digest("edge1", &[("default/pod/web", "uid-web", "9")]);
    hub.check(&["relist edge1"]);
    hub.input(Input::Relisted("edge1".into(), vec![pod("web", "edge1", 9, &[])], Some(12)));
    hub.check(&["edge1: response skerry/digest"]);
    // The watch goes on where it was.
    hub.change(Kind::Pod, pod("web", "edge1", 7, &[]));
    hub.check(&[]);
}

#[test]
fn pod_that_the_watch_has_not_got_to_is_not_deleted() {
    let mut hub = Hub::listed();
    hub.change(Kind::Pod, pod("other", "edge2", 5, &[]));
    hub.connect("edge1", true);
    hub.digest("edge1", &[("default/pod/web", "uid-web", "9")]);
    hub.check(&["relist edge1"]);
    hub.input(Input::Relisted("edge1".into(), vec![pod("web", "edge1", 9, &[])], Some(12)));
    hub.check(&["edge1: response skerry/digest"]);
    // A list that is older than the read leaves it where it is, and another read decides.
    hub.input(Input::Listed(Kind::Pod, BTreeSet::from([key("default/pod/other")])));
    hub.check(&["relist edge1"]);
    hub.input(Input::Relisted("edge1".into(), Vec::new(), Some(15)));
    hub.check(&["edge1: delete default/pod/web 9"]);
}

#[test]
fn pod_that_a_read_did_not_find_does_not_come_back_with_a_late_word_of_the_watch() {
    let mut hub = Hub::listed();
    hub.change(Kind::Pod, pod("web", "edge1", 5, &[]));
    hub.connect("edge1", true);
    hub.digest("edge1", &[("default/pod/web", "uid-web", "9")]);
    hub.check(&["relist edge1"]);
    hub.input(Input::Relisted("edge1".into(), Vec::new(), Some(12)));
    hub.check(&["edge1: delete default/pod/web", "edge1: response skerry/digest"]);
    hub.change(Kind::Pod, pod("web", "edge1", 9, &[]));
    hub.input(Input::Deleted(key("default/pod/web"), pod("web", "edge1", 10, &[])));
    hub.check(&[]);
    hub.change(Kind::Pod, pod("new", "edge1", 13, &[]));
    hub.check(&["edge1: insert default/pod/new 13"]);
}

#[test]
fn delete_tells_the_version_at_which_a_pod_was_gone_for_sure() {
    let mut hub = Hub::listed();
    hub.connect("edge1", true);
    hub.digest("edge1", &[("default/pod/web", "uid-web", "9")]);
    hub.outputs();
    hub.input(Input::Relisted("edge1".into(), Vec::new(), Some(12)));
    let delete = hub.messages().swap_remove(0);
    let stub: Value = delete.content_as().expect("an object");
    assert_eq!(stub["metadata"]["resourceVersion"], "12");
}

#[test]
fn a_cluster_that_was_set_back_is_believed_after_a_read() {
    let mut hub = Hub::listed();
    hub.change(Kind::Pod, pod("web", "edge1", 5, &["page"]));
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 4)), Some(5)));
    hub.outputs();
    hub.connect("edge1", true);
    hub.digest(
        "edge1",
        &[("default/pod/web", "uid-web", "90"), ("default/configmap/page", "uid-page", "80")],
    );
    hub.check(&["fetch default/configmap/page", "relist edge1"]);
    hub.input(Input::Relisted("edge1".into(), vec![pod("web", "edge1", 5, &["page"])], Some(6)));
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 4)), Some(6)));
    hub.check(&[
        "edge1: update default/configmap/page 4",
        "edge1: update default/pod/web 5",
        "edge1: response skerry/digest",
    ]);
}

#[test]
fn only_the_last_of_two_reads_of_an_object_counts() {
    let page = || key("default/configmap/page");
    let mut hub = Hub::listed();
    hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.change(Kind::Pod, pod("a", "edge1", 1, &["page"]));
    hub.outputs();
    // The pod goes and another one comes, which needs the object too; then the answers come.
    hub.input(Input::Deleted(key("default/pod/a"), pod("a", "edge1", 2, &["page"])));
    hub.change(Kind::Pod, pod("b", "edge1", 3, &["page"]));
    hub.check(&[
        "fetch default/configmap/page",
        "edge1: delete default/pod/a 2",
        "edge1: insert default/pod/b 3",
    ]);
    hub.input(Input::Fetched(page(), Some(config("page", 1)), Some(1)));
    hub.check(&[]);
    hub.input(Input::Fetched(page(), Some(config("page", 3)), Some(3)));
    hub.check(&["edge1: insert default/configmap/page 3"]);
}

#[test]
fn late_word_of_an_object_that_a_read_did_not_find_changes_nothing() {
    let page = || key("default/configmap/page");
    let mut hub = Hub::listed();
    hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.change(Kind::Pod, pod("a", "edge1", 1, &["page"]));
    hub.outputs();
    hub.input(Input::Fetched(page(), None, Some(8)));
    hub.change(Kind::ConfigMap, config("page", 5));
    hub.input(Input::Deleted(page(), config("page", 6)));
    hub.check(&[]);
    hub.change(Kind::ConfigMap, config("page", 9));
    hub.check(&["edge1: insert default/configmap/page 9"]);
}

#[test]
fn record_that_another_hub_wrote_late_still_leads_to_the_delete() {
    let mut hub = Hub::recorded(&[]);
    hub.connect("edge1", false);
    hub.outputs();
    hub.input(Input::Sync(Word::Seen {
        name: "edge1.uid-web".into(),
        namespace: Some("default".into()),
        spec: SyncSpec { api_version: "v1".into(), kind: "Pod".into(), name: "web".into() },
        version: Some("7".into()),
        at: 1000,
        is_in_list: false,
    }));
    hub.check(&["relist edge1"]);
    hub.input(Input::Relisted("edge1".into(), Vec::new(), Some(8)));
    let outputs = hub.outputs();
    assert!(outputs.contains(&"edge1: delete default/pod/web".to_owned()), "{outputs:?}");
}

#[test]
fn pod_of_which_only_a_record_tells_is_not_deleted_for_its_predecessor() {
    let mut hub = Hub::recorded(&[]);
    hub.connect("edge1", false);
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    hub.outputs();
    // Another hub has taken the pod away and given its successor; the watch of pods has got to neither.
    hub.input(Input::Sync(Word::Seen {
        name: "edge1.uid-next".into(),
        namespace: Some("default".into()),
        spec: SyncSpec { api_version: "v1".into(), kind: "Pod".into(), name: "web".into() },
        version: Some("7".into()),
        at: 1000,
        is_in_list: false,
    }));
    hub.check(&["relist edge1"]);
    let mut next = pod("web", "edge1", 7, &[]);
    next["metadata"]["uid"] = json!("uid-next");
    hub.input(Input::Relisted("edge1".into(), vec![next], Some(8)));
    hub.check(&["edge1: update default/pod/web 7"]);
}

#[test]
fn pod_that_changes_while_the_pods_of_its_node_are_read_goes_when_they_have_been() {
    let mut hub = Hub::listed();
    hub.connect("edge1", true);
    hub.digest("edge1", &[("default/pod/web", "uid-web", "9")]);
    hub.check(&["relist edge1"]);
    hub.change(Kind::Pod, pod("other", "edge1", 12, &[]));
    hub.check(&[]);
    // The list is older than what the watch has shown of the other pod meanwhile.
    let pods = vec![pod("web", "edge1", 9, &[]), pod("other", "edge1", 11, &[])];
    hub.input(Input::Relisted("edge1".into(), pods, Some(11)));
    hub.check(&["edge1: insert default/pod/other 12", "edge1: response skerry/digest"]);
}

#[test]
fn version_of_a_time_that_the_cluster_lost_is_not_taken_for_one_of_its_own() {
    let changed = |version: u64, label: &str| {
        let mut pod = pod("web", "edge1", version, &[]);
        pod["metadata"]["labels"] = json!({"l": label});
        pod
    };
    let mut hub = Hub::listed();
    // Restored at 5, the cluster has gone on to 9; the node was at 7 in the time that is lost.
    for (version, label) in [(5, "a"), (6, "b"), (9, "b")] {
        hub.change(Kind::Pod, changed(version, label));
    }
    hub.connect("edge1", true);
    hub.digest("edge1", &[("default/pod/web", "uid-web", "7")]);
    hub.check(&["edge1: update default/pod/web 9", "edge1: response skerry/digest"]);
    // One that it has shown with this content is.
    hub.connect("edge1", true);
    hub.outputs();
    hub.digest("edge1", &[("default/pod/web", "uid-web", "6")]);
    hub.check(&["edge1: response skerry/digest"]);
}

#[test]
fn what_a_node_disputes_is_read_and_sent_again_whatever_its_version() {
    let disputed = |uid: &str, rv: &str| {
        let held = Held { uid: uid.into(), rv: rv.into() };
        let disputed = BTreeMap::from([("default/pod/web".to_owned(), held)]);
        Digest { disputed, ..Digest::default() }
    };
    let mut hub = Hub::listed();
    hub.change(Kind::Pod, pod("web", "edge1", 5, &[]));
    for (told, at) in [("8", 6), ("8", 7)] {
        hub.connect("edge1", true);
        hub.outputs();
        hub.send_digest("edge1", disputed("uid-web", told));
        hub.check(&["relist edge1"]);
        hub.input(Input::Relisted("edge1".into(), vec![pod("web", "edge1", 5, &[])], Some(at)));
        hub.check(&["edge1: update default/pod/web 5", "edge1: response skerry/digest"]);
    }
    // Versions that are given out twice make no difference.
    hub.change(Kind::Pod, pod("web", "edge1", 8, &[]));
    hub.connect("edge1", true);
    hub.outputs();
    hub.send_digest("edge1", disputed("uid-web", "8"));
    hub.check(&["edge1: update default/pod/web 8", "edge1: response skerry/digest"]);
    // A successor of what is disputed is another matter, and what is gone is deleted.
    hub.connect("edge1", true);
    hub.outputs();
    let mut digest = disputed("uid-former", "8");
    let held = Held { uid: "uid-web".into(), rv: "8".into() };
    digest.objects.insert("default/pod/web".into(), held);
    hub.send_digest("edge1", digest);
    hub.check(&["edge1: response skerry/digest"]);
    hub.input(Input::Deleted(key("default/pod/web"), pod("web", "edge1", 9, &[])));
    hub.connect("edge1", true);
    hub.outputs();
    hub.send_digest("edge1", disputed("uid-web", "7"));
    hub.check(&["edge1: delete default/pod/web", "edge1: response skerry/digest"]);
}

#[test]
fn versions_of_the_same_content_that_an_object_remembers_are_bounded() {
    let mut hub = Hub::listed();
    for version in 1..=20 {
        hub.change(Kind::Pod, pod("web", "edge1", version, &[]));
    }
    for (held, expected) in [("13", 1), ("12", 2)] {
        hub.connect("edge1", true);
        hub.outputs();
        hub.digest("edge1", &[("default/pod/web", "uid-web", held)]);
        assert_eq!(hub.outputs().len(), expected, "{held}");
    }
}

#[test]
fn what_was_sent_before_the_cluster_went_back_is_compared_as_what_is_told() {
    let changed = |version: u64, label: &str| {
        let mut pod = pod("web", "edge1", version, &[]);
        pod["metadata"]["labels"] = json!({"l": label});
        pod
    };
    let mut hub = Hub::recorded(&[]);
    hub.connect("edge1", false);
    hub.change(Kind::Pod, changed(50, "lost"));
    hub.outputs();
    hub.is_prompt = false;
    hub.input(Input::Listing(Kind::Pod));
    hub.change(Kind::Pod, changed(40, "before"));
    hub.input(Input::Listed(Kind::Pod, [key("default/pod/web")].into()));
    // The record of what was sent is still to be written; meanwhile the pod reports.
    hub.change(Kind::Pod, changed(60, "before"));
    assert_eq!(hub.messages().len(), 1);
}

#[test]
fn record_that_another_hub_removed_stays_removed_after_the_node_has_left() {
    let mut hub = Hub::recorded(&[]);
    let session = hub.connect("edge1", false);
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    hub.outputs();
    hub.input(Input::Disconnected { node: "edge1".into(), session });
    hub.input(Input::Sync(Word::Gone {
        name: "edge1.uid-web".into(),
        namespace: Some("default".into()),
        at: 1000,
    }));
    hub.check(&[]);
    // Nor does the node still have the object for sure.
    hub.connect("edge1", false);
    let outputs = hub.outputs();
    assert!(outputs.contains(&"edge1: update default/pod/web 2".to_owned()), "{outputs:?}");
}

/// A word about the record of the ConfigMap `page`.
fn record_of_page(version: &str, at: u64) -> Input {
    Input::Sync(Word::Seen {
        name: "edge1.uid-page".into(),
        namespace: Some("default".into()),
        spec: SyncSpec { api_version: "v1".into(), kind: "ConfigMap".into(), name: "page".into() },
        version: Some(version.into()),
        at,
        is_in_list: false,
    })
}

#[test]
fn config_whose_record_another_hub_removed_and_began_anew_goes_out() {
    let mut hub = Hub::recorded(&[("edge1.uid-page", Kind::ConfigMap, "page", "2")]);
    hub.change(Kind::Pod, pod("web", "edge1", 3, &["page"]));
    hub.outputs();
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 2)), Some(3)));
    // The other hub took it from the node, and was about to send it again when the node left.
    hub.input(record_of_page("0", 9));
    hub.connect("edge1", false);
    let outputs = hub.outputs();
    assert!(outputs.contains(&"edge1: update default/configmap/page 2".to_owned()), "{outputs:?}");
}

#[test]
fn word_of_another_hub_about_a_record_makes_the_object_go_once_more() {
    let mut hub = Hub::recorded(&[]);
    hub.connect("edge1", false);
    hub.change(Kind::ConfigMap, config("page", 2));
    hub.change(Kind::Pod, pod("web", "edge1", 3, &["page"]));
    hub.outputs();
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 2)), Some(3)));
    hub.outputs();
    hub.input(record_of_page("1", 1000));
    hub.check(&["edge1: update default/configmap/page 2", "status edge1.uid-page 2"]);
    let (name, namespace) = ("edge1.uid-page".into(), Some("default".into()));
    hub.input(Input::Sync(Word::Gone { name, namespace, at: 2000 }));
    hub.check(&[
        "create edge1.uid-page 0",
        "edge1: update default/configmap/page 2",
        "status edge1.uid-page 2",
    ]);
}

#[test]
fn record_says_no_version_before_its_config_leaves_a_stock_node() {
    let mut hub = Hub::recorded(&[]);
    hub.connect("edge1", false);
    hub.change(Kind::Pod, pod("web", "edge1", 3, &["page"]));
    hub.outputs();
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 2)), Some(3)));
    hub.outputs();
    hub.input(Input::Deleted(key("default/pod/web"), pod("web", "edge1", 4, &["page"])));
    hub.check(&[
        "edge1: delete default/pod/web 4",
        "remove edge1.uid-web",
        "status edge1.uid-page 0",
        "edge1: delete default/configmap/page",
        "remove edge1.uid-page",
    ]);
}

#[test]
fn connection_waits_while_a_watch_lists_again() {
    let mut hub = Hub::listed();
    hub.change(Kind::Pod, pod("web", "edge1", 2, &[]));
    hub.input(Input::Listing(Kind::Pod));
    hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.check(&[]);
    hub.change(Kind::Pod, pod("web", "edge1", 3, &[]));
    hub.input(Input::Listed(Kind::Pod, [key("default/pod/web")].into()));
    let outputs = hub.outputs();
    assert_eq!(outputs[0], "edge1: insert default/pod/web 3");
}

#[test]
fn list_of_a_cluster_that_was_set_back_counts_for_connected_nodes_too() {
    let mut hub = Hub::listed();
    hub.connect("ours", true);
    hub.digest("ours", &[]);
    hub.connect("stock", false);
    for name in ["ours", "stock"] {
        hub.change(Kind::Pod, pod(name, name, 50, &[]));
        hub.change(Kind::Pod, pod(&format!("late-{name}"), name, 51, &[]));
    }
    hub.outputs();
    hub.input(Input::Listing(Kind::Pod));
    let mut older = Vec::new();
    for (name, version) in [("ours", 20), ("stock", 21)] {
        let mut pod = pod(name, name, version, &[]);
        pod["spec"]["hostname"] = json!("before");
        older.push(pod.clone());
        hub.change(Kind::Pod, pod);
    }
    let keys = ["ours", "stock"].map(|name| key(&format!("default/pod/{name}")));
    hub.input(Input::Listed(Kind::Pod, keys.into()));
    let mut outputs = hub.outputs();
    outputs.sort();
    // Our own node takes an older version only while it is told what it lacks.
    assert_eq!(
        outputs,
        [
            "ours: close 1",
            "stock: delete default/pod/late-stock 51",
            "stock: update default/pod/stock 21"
        ]
    );
    // What comes next is new, whatever its number.
    let mut pod = older.remove(1);
    pod["metadata"]["resourceVersion"] = json!("30");
    pod["spec"]["hostname"] = json!("after");
    hub.change(Kind::Pod, pod);
    hub.check(&["stock: update default/pod/stock 30"]);
}

#[test]
fn list_that_is_older_than_a_read_under_way_is_settled_by_another_read() {
    let mut hub = Hub::listed();
    hub.connect("edge1", true);
    hub.digest("edge1", &[]);
    hub.change(Kind::Pod, pod("a", "edge1", 1, &["page"]));
    hub.outputs();
    hub.input(Input::Listing(Kind::ConfigMap));
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 9)), Some(9)));
    hub.check(&["edge1: insert default/configmap/page 9"]);
    hub.change(Kind::ConfigMap, config("page", 5));
    hub.input(Input::Listed(Kind::ConfigMap, [key("default/configmap/page")].into()));
    hub.check(&["fetch default/configmap/page"]);
    hub.input(Input::Fetched(key("default/configmap/page"), Some(config("page", 9)), Some(10)));
    hub.check(&[]);
}

#[test]
fn connection_does_not_wait_for_a_read_of_what_nothing_refers_to_any_more() {
    let mut hub = Hub::listed();
    hub.change(Kind::Pod, pod("web", "edge1", 3, &["page"]));
    hub.change(Kind::ConfigMap, config("page", 2));
    hub.connect("edge1", true);
    hub.outputs();
    hub.digest("edge1", &[("default/configmap/page", "uid-page", "9")]);
    hub.input(Input::Deleted(key("default/pod/web"), pod("web", "edge1", 4, &["page"])));
    hub.outputs();
    for _ in 0..2 {
        let page = Some(config("page", 9));
        hub.input(Input::Fetched(key("default/configmap/page"), page, Some(9)));
    }
    let outputs = hub.outputs();
    assert!(outputs.contains(&"edge1: response skerry/digest".to_owned()), "{outputs:?}");
}
