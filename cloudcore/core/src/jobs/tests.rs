use super::*;
use crate::upstream::job as reports;
use skerry_protocol::job::ActionReport;

fn node(name: &str, labels: Value, version: &str) -> (String, Node) {
    let mut labels = labels;
    labels[EDGE_ROLE] = "".into();
    let object = json!({"metadata": {"name": name, "labels": labels},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], "nodeInfo": {"kubeletVersion": version}}});
    (name.to_owned(), Node::read(&object).expect("a node"))
}

struct World {
    job: Job,
    object: Value,
    nodes: BTreeMap<String, Node>,
    links: Links,
    now: Instant,
}

impl World {
    fn new(kind: Kind, spec: Value, nodes: &[&str]) -> Self {
        let spec = match kind {
            Kind::ImagePrePull => json!({"imagePrePullTemplate": spec}),
            _ => spec,
        };
        Self {
            job: Job::new(kind, "j"),
            object: json!({"metadata": {"name": "j"}, "spec": spec}),
            nodes: nodes
                .iter()
                .map(|name| node(name, json!({"site": "a"}), "v1.32.10-skerry-0.1.0"))
                .collect(),
            links: nodes.iter().map(|name| ((*name).to_owned(), 1)).collect(),
            now: Instant::now(),
        }
    }

    /// Turns until nothing changes; who was told.
    fn settle(&mut self) -> Vec<String> {
        let mut told = Vec::new();
        loop {
            let turn = self.job.turn(&self.object, &self.nodes, &self.links, self.now, 5);
            told.extend(turn.orders.into_iter().map(|(node, message)| {
                format!("{node} {} {}", message.route.operation, message.route.resource)
            }));
            let Some(status) = turn.status else { return told };
            self.object["status"] = status;
        }
    }

    fn report(&mut self, node: &str, action: &str, succ: bool) {
        let report = ActionReport {
            action: action.into(),
            succ,
            finish_time: "t".into(),
            reason: String::new(),
            extend: String::new(),
        };
        reports::apply(self.job.kind, &mut self.object, node, &report).expect("taken");
    }

    fn phases(&self) -> Vec<&str> {
        let tasks = self.object["status"]["nodeStatus"].as_array();
        tasks.into_iter().flatten().map(phase_of).collect()
    }

    fn phase(&self) -> &str {
        self.object["status"]["phase"].as_str().unwrap_or_default()
    }
}

const PULL: &str = "operations.kubeedge.io/v1alpha2/imageprepulljob/j/node";

#[test]
fn no_more_nodes_work_at_once_than_the_job_allows_and_it_ends_with_the_last() {
    let spec =
        json!({"images": ["a"], "labelSelector": {"matchLabels": {"site": "a"}}, "concurrency": 2});
    let mut world = World::new(Kind::ImagePrePull, spec, &["n1", "n2", "n3"]);
    assert_eq!(world.settle(), [format!("n1 Check {PULL}/n1"), format!("n2 Check {PULL}/n2")]);
    assert_eq!(
        (world.phase(), world.phases()),
        ("InProgress", vec!["InProgress", "InProgress", "Pending"])
    );
    world.report("n2", "Check", true);
    assert!(world.settle().is_empty());
    world.report("n2", "Pull", true);
    assert_eq!(world.settle(), [format!("n3 Check {PULL}/n3")]);
    for name in ["n1", "n3"] {
        world.report(name, "Check", true);
        world.report(name, "Pull", true);
    }
    assert!(world.settle().is_empty());
    assert_eq!((world.phase(), world.phases()), ("Completed", vec!["Successful"; 3]));
    assert!(!Job::is_open(&world.object));
}

#[test]
fn a_node_that_says_nothing_is_unknown_and_the_next_one_gets_its_turn() {
    let spec = json!({"nodeNames": ["n1", "n2"], "timeoutSeconds": 60, "failureTolerate": "0.5"});
    let mut world = World::new(Kind::NodeUpgrade, spec, &["n1", "n2"]);
    assert_eq!(world.settle().len(), 1);
    world.now += Duration::from_secs(59);
    assert!(world.settle().is_empty());
    // A report begins the time anew.
    world.report("n1", "Check", true);
    world.settle();
    world.now += Duration::from_secs(59);
    assert!(world.settle().is_empty());
    world.now += Duration::from_secs(1);
    assert_eq!(
        world.settle(),
        ["n2 Check operations.kubeedge.io/v1alpha2/nodeupgradejob/j/node/n2"]
    );
    assert_eq!(world.phases(), ["Unknown", "InProgress"]);
    for action in ["Check", "WaitingConfirmation", "BackUp", "Upgrade"] {
        world.report("n2", action, true);
    }
    world.settle();
    assert_eq!((world.phase(), world.phases()), ("Completed", vec!["Unknown", "Successful"]));
}

#[test]
fn once_too_many_have_failed_no_other_node_is_told() {
    let spec = json!({"nodeNames": ["n1", "n2", "n3"], "updateFields": {"a": "b"}});
    let mut world = World::new(Kind::ConfigUpdate, spec, &["n1", "n2", "n3"]);
    assert_eq!(world.settle().len(), 1);
    world.report("n1", "Check", false);
    assert!(world.settle().is_empty());
    assert_eq!((world.phase(), world.phases()), ("Failure", vec!["Failure"; 3]));
    let reason = world.object["status"]["reason"].as_str().expect("why");
    assert!(reason.starts_with("3 of 3 nodes failed"), "{reason}");
    assert!(
        world.object["status"]["nodeStatus"][2]["reason"]
            .as_str()
            .expect("why")
            .starts_with("not begun")
    );
}

#[test]
fn a_node_that_is_away_is_waited_for_and_then_given_up() {
    let spec = json!({"images": ["a"], "nodeNames": ["n1", "n2"], "failureTolerate": "0.5"});
    let mut world = World::new(Kind::ImagePrePull, spec, &["n1", "n2"]);
    world.links.remove("n1");
    assert_eq!(world.settle(), [format!("n2 Check {PULL}/n2")]);
    world.report("n2", "Check", true);
    world.report("n2", "Pull", true);
    assert!(world.settle().is_empty());
    world.now += Duration::from_secs(TIMEOUT_S - 1);
    assert!(world.settle().is_empty());
    let mut late = World {
        job: Job::new(Kind::ImagePrePull, "j"),
        object: world.object.clone(),
        nodes: world.nodes.clone(),
        links: world.links.clone(),
        now: world.now,
    };
    late.settle();
    late.links.insert("n1".into(), 7);
    assert_eq!(late.settle(), [format!("n1 Check {PULL}/n1")]);
    world.now += Duration::from_secs(2);
    world.settle();
    assert_eq!((world.phase(), world.phases()), ("Completed", vec!["Failure", "Successful"]));
    let reason = world.object["status"]["nodeStatus"][0]["reason"].as_str().expect("why");
    assert!(reason.contains("not connected"), "{reason}");
}

#[test]
fn a_node_that_comes_back_is_told_again_what_may_be_done_twice() {
    let pull = json!({"images": ["a"], "nodeNames": ["n1"]});
    let update = json!({"updateFields": {"a": "b"}, "nodeNames": ["n1"]});
    for (kind, spec, again) in [(Kind::ImagePrePull, pull, 1), (Kind::ConfigUpdate, update, 0)] {
        let mut world = World::new(kind, spec, &["n1"]);
        assert_eq!(world.settle().len(), 1);
        world.report("n1", "Check", true);
        world.links.insert("n1".into(), 2);
        assert_eq!(world.settle().len(), again, "{kind:?}");
        assert!(world.settle().is_empty());
        // A cloud that has just started does not know on which link the node was told.
        world.job = Job::new(kind, "j");
        assert_eq!(world.settle().len(), again, "{kind:?}");
    }
}

#[test]
fn what_cannot_begin_says_why() {
    let cases = [
        (json!({}), "neither"),
        (json!({"nodeNames": ["n1"], "labelSelector": {}}), "both"),
        (json!({"labelSelector": {"matchLabels": {"site": "b"}}}), "no node"),
        (
            json!({"labelSelector": {"matchExpressions": [{"key": "site", "operator": "Near"}]}}),
            "operator",
        ),
    ];
    for (spec, expected) in cases {
        let mut world = World::new(Kind::NodeUpgrade, spec, &["n1"]);
        assert!(world.settle().is_empty());
        let reason = world.object["status"]["reason"].as_str().expect("why");
        assert!(world.phase() == "Failure" && reason.contains(expected), "{reason}");
    }
    let mut world = World::new(Kind::NodeUpgrade, json!({"nodeNames": ["n1", "none"]}), &["n1"]);
    assert_eq!(world.settle().len(), 1, "what never began does not stop the others");
    assert_eq!(world.phases(), ["InProgress", "Failure"]);
}

#[test]
fn expressions_of_a_selector_are_kuberneteses() {
    let labels = BTreeMap::from([("site".to_owned(), "a".to_owned())]);
    for (term, expected) in [
        (json!({"key": "site", "operator": "In", "values": ["a", "b"]}), true),
        (json!({"key": "site", "operator": "NotIn", "values": ["a"]}), false),
        (json!({"key": "none", "operator": "NotIn", "values": ["a"]}), true),
        (json!({"key": "site", "operator": "Exists"}), true),
        (json!({"key": "site", "operator": "DoesNotExist"}), false),
    ] {
        assert_eq!(matches(&json!({"matchExpressions": [term]}), &labels), Ok(expected), "{term}");
    }
    assert_eq!(matches(&json!({}), &labels), Ok(true));
}

#[test]
fn older_edges_are_told_in_their_own_words() {
    let spec = json!({"images": ["a"], "nodeNames": ["n1"], "checkItems": ["disk"], "imageSecrets": "ns/s"});
    let mut world = World::new(Kind::ImagePrePull, spec, &["n1"]);
    world.nodes = BTreeMap::from([node("n1", json!({}), "v1.29.6-kubeedge-v1.20.1")]);
    assert_eq!(world.settle(), ["n1 prepull prepull/j/node/n1"]);
    assert_eq!(world.job.secret(&world.object), Some(("ns", "s", vec!["n1"])));
    let report = |event: &str| TaskReport {
        event: event.into(),
        action: "Success".into(),
        ..TaskReport::default()
    };
    let content = |event: &str| {
        let message = world.job.next_stage(&world.object, "n1", &report(event), 5)?;
        Some(message.content.get().to_owned())
    };
    assert_eq!(
        content("Init").as_deref(),
        Some(r#"{"TaskID":"j","Type":"prepull","State":"Checking","Item":{"CheckItem":["disk"]}}"#)
    );
    let pulling: Value = serde_json::from_str(&content("Check").expect("a stage")).expect("json");
    assert_eq!(pulling["State"], "Pulling");
    assert_eq!(
        pulling["Item"],
        json!({"Images": ["a"], "NodeName": "", "Secret": "ns/s", "RetryTimes": 0, "CheckItems": ["disk"]})
    );
    assert_eq!(content("Pull"), None);

    let mut world = World::new(Kind::ConfigUpdate, json!({"nodeNames": ["n1"]}), &["n1"]);
    world.nodes = BTreeMap::from([node("n1", json!({}), "v1.29.6-kubeedge-v1.20.1")]);
    assert!(world.settle().is_empty());
    assert_eq!(world.phases(), ["Failure"]);

    let mut world =
        World::new(Kind::NodeUpgrade, json!({"nodeNames": ["n1"], "version": "v1.16.0"}), &["n1"]);
    world.nodes = BTreeMap::from([node("n1", json!({}), "v1.22.6-kubeedge-v1.12.0")]);
    let mut turn = world.job.turn(&world.object, &world.nodes, &world.links, world.now, 5);
    world.object["status"] = turn.status.take().expect("begun");
    turn = world.job.turn(&world.object, &world.nodes, &world.links, world.now, 5);
    let message = &turn.orders[0].1;
    assert_eq!(message.route.source, "nodeupgradejobcontroller");
    assert_eq!(message.route.resource, "upgrade/j/node/n1");
    let content: Value = message.content_as().expect("json");
    assert_eq!((&content["UpgradeID"], &content["Version"]), (&json!("j"), &json!("v1.16.0")));
}

#[test]
fn a_deletion_is_not_held_up_by_a_finalizer_of_kubeedges() {
    let mut world = World::new(Kind::ImagePrePull, json!({}), &[]);
    world.object["metadata"] = json!({"name": "j", "deletionTimestamp": "t",
        "finalizers": ["kubeedge.io/imageprepulljob-controller", "other"]});
    let turn = world.job.turn(&world.object, &world.nodes, &world.links, world.now, 5);
    assert_eq!(turn.finalizers, Some(vec![json!("other")]));
    world.object["metadata"]["finalizers"] = json!(["other"]);
    let turn = world.job.turn(&world.object, &world.nodes, &world.links, world.now, 5);
    assert!(turn.finalizers.is_none() && turn.status.is_none());
}

#[test]
fn a_job_that_kubeedge_keeps_in_the_older_form_is_left_alone() {
    let mut world = World::new(Kind::ImagePrePull, json!({"nodeNames": ["n1"]}), &["n1"]);
    world.object["status"] =
        json!({"state": "Pulling", "status": [{"nodeStatus": {"nodeName": "n1"}}]});
    let before = world.object.clone();
    assert!(world.settle().is_empty());
    assert_eq!(world.object, before);
}
