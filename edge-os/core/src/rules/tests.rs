use super::*;
use crate::backoff::Random;
use serde_json::json;

struct Node {
    rules: Rules,
    start: Instant,
}

/// What happened, in one word each; actions as what they publish or set.
fn words(rules: &mut Rules) -> Vec<String> {
    std::iter::from_fn(|| rules.poll_output())
        .map(|output| match output {
            Output::Told(told) => told.reason.to_owned(),
            Output::Limit(RuleLimits { active, limits, .. }) => {
                format!("limit {active} {limits:?}")
            }
            Output::Act { action, .. } => match (action.publish, action.set) {
                (Some(publish), _) => publish.payload,
                (_, Some(set)) => format!("{}={}", set.property, set.value),
                _ => "restart".to_owned(),
            },
        })
        .collect()
}

impl Node {
    fn new(when: Value) -> Self {
        let mut node = Self { rules: Rules::default(), start: Instant::now() };
        node.rule("alarm", &rule(when));
        assert_eq!(words(&mut node.rules), [""; 0], "it is taken");
        node
    }

    fn rule(&mut self, name: &str, rule: &Value) {
        let path = ResourcePath::new("a", "devicerule", name).expect("a path");
        self.rules.handle_object(&path, rule);
    }

    fn at(&self, ms: u64) -> Instant {
        self.start + Duration::from_millis(ms)
    }

    fn report(&mut self, ms: u64, value: &str) -> Vec<String> {
        self.rules.report(self.at(ms), &"a/fridge".into(), "temperature", value);
        words(&mut self.rules)
    }

    fn time(&mut self, ms: u64) -> Vec<String> {
        self.rules.handle_time(self.at(ms));
        words(&mut self.rules)
    }
}

fn rule(mut when: Value) -> Value {
    when["device"] = "fridge".into();
    when["property"] = "temperature".into();
    json!({
        "metadata": {"name": "alarm", "uid": "u"},
        "spec": {
            "when": when,
            "then": [{"publish": {"topic": "alarm", "payload": "on {value}"}}],
            "otherwise": [{"set": {"device": "lamp", "property": "light", "value": ""}}],
        },
    })
}

#[test]
fn a_rule_begins_after_its_time_and_ends_behind_the_hysteresis() {
    let mut node = Node::new(json!({"above": 8, "hysteresis": 0.5, "forSeconds": 30}));
    assert_eq!(node.report(0, "8"), [""; 0], "not above");
    assert_eq!(node.report(1000, "8.1"), [""; 0]);
    assert_eq!(node.rules.poll_timeout(), Some(node.at(31_000)));
    assert_eq!(node.report(2000, "7.8"), [""; 0], "not far enough back to begin anew");
    assert_eq!(node.time(30_999), [""; 0]);
    assert_eq!(node.time(31_000), ["RuleBegan", "on 7.8"]);
    assert_eq!(node.report(32_000, "9"), [""; 0], "once");
    assert_eq!(node.report(33_000, "7.6"), [""; 0]);
    assert_eq!(node.report(34_000, "7.5"), ["RuleEnded", "light="]);
    assert_eq!(node.report(40_000, "9"), [""; 0]);
    assert_eq!(node.report(41_000, "7"), [""; 0], "back in time");
    assert_eq!(node.rules.poll_timeout(), None);
}

#[test]
fn below_and_equals_and_values_that_are_no_numbers() {
    let mut node = Node::new(json!({"below": -18, "hysteresis": 2}));
    assert_eq!(node.report(0, "-18"), [""; 0]);
    for text in ["", "warm", "nan", "-inf"] {
        assert_eq!(node.report(1, text), [""; 0], "{text}");
    }
    assert_eq!(node.report(2, "-18.5"), ["RuleBegan", "on -18.5"]);
    assert_eq!(node.report(3, "broken"), [""; 0], "says nothing");
    assert_eq!(node.report(4, "-16"), ["RuleEnded", "light="]);
    let mut node = Node::new(json!({"equals": "open"}));
    assert_eq!(node.report(0, "opened"), [""; 0]);
    assert_eq!(node.report(1, "open"), ["RuleBegan", "on open"]);
    assert_eq!(node.report(2, "closed"), ["RuleEnded", "light="]);
}

#[test]
fn other_properties_and_devices_and_a_rule_that_is_gone_do_nothing() {
    let mut node = Node::new(json!({"above": 8}));
    let now = node.start;
    node.rules.report(now, &"a/fridge".into(), "humidity", "9");
    node.rules.report(now, &"b/fridge".into(), "temperature", "9");
    assert_eq!(words(&mut node.rules), [""; 0]);
    node.rules.handle_gone(&ResourcePath::new("a", "devicerule", "alarm").expect("a path"));
    assert_eq!(node.report(0, "9"), [""; 0]);
    assert!(node.rules.is_empty() && node.rules.of_device.is_empty());
}

#[test]
fn the_same_rule_again_goes_on_and_another_form_begins_idle() {
    let mut node = Node::new(json!({"above": 8}));
    assert_eq!(node.report(0, "9").len(), 2);
    node.rule("alarm", &rule(json!({"above": 8})));
    assert_eq!(node.report(2000, "9"), [""; 0]);
    node.rule("alarm", &rule(json!({"above": 7})));
    assert_eq!(node.report(4000, "9").len(), 2);
}

#[test]
fn between_two_beginnings_there_is_a_pause() {
    let mut when = rule(json!({"above": 8}));
    when["spec"]["cooldownSeconds"] = 10.into();
    let mut node = Node::new(json!({"above": 8}));
    node.rule("alarm", &when);
    assert_eq!(node.report(0, "9").len(), 2);
    assert_eq!(node.report(1000, "7").len(), 2);
    assert_eq!(node.report(2000, "9"), [""; 0]);
    assert_eq!(node.time(10_000), ["RuleBegan", "on 9"], "late, not lost");
}

#[test]
fn a_rule_that_begins_too_often_pauses_and_says_so() {
    let mut node = Node::new(json!({"above": 8}));
    let mut all = Vec::new();
    for n in 0..100_u64 {
        all.extend(node.report(n * 1100, if n % 2 == 0 { "9" } else { "7" }));
    }
    let count = |word: &str| all.iter().filter(|one| *one == word).count();
    assert_eq!((count("RuleBegan"), count("RulePaused")), (BEGINNINGS_MAX, 1));
    let later = u64::try_from(PAUSE.as_millis()).expect("short") + 110_000;
    assert_eq!(node.report(later, "9")[0], "RuleBegan");
}

#[test]
fn rules_that_make_no_sense_are_refused_with_the_reason() {
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut wrong = rule(json!({"above": 8}));
        change(&mut wrong["spec"]);
        let error = read(&wrong).expect_err("refused").to_string();
        let mut node = Node::new(json!({"above": 8}));
        node.rule("alarm", &wrong);
        assert_eq!(words(&mut node.rules), ["RuleRefused"]);
        assert!(node.rules.is_empty(), "the former does not go on");
        error
    };
    assert!(refused(&|spec| spec["when"]["below"] = 1.into()).contains("exactly one"));
    assert!(refused(&|spec| spec["when"]["above"] = Value::Null).contains("exactly one"));
    assert!(refused(&|spec| spec["when"]["hysteresis"] = (-1).into()).contains("hysteresis"));
    assert!(refused(&|spec| spec["when"]["forSeconds"] = 1e9.into()).contains("forSeconds"));
    assert!(refused(&|spec| spec["when"]["abvoe"] = 1.into()).contains("abvoe"));
    assert!(refused(&|spec| spec["then"] = json!([])).contains("1 to 16 actions"));
    assert!(refused(&|spec| spec["then"] = json!([{}])).contains("exactly one of `set`"));
    assert!(refused(&|spec| spec["then"][0]["publish"]["topic"] = "a/#".into()).contains("topic"));
    let devices = "$hw/events/device/a/b/twin/update";
    assert!(
        refused(&|spec| spec["then"][0]["publish"]["topic"] = devices.into()).contains("topic")
    );
    let itself = json!([{"set": {"device": "fridge", "property": "temperature", "value": "1"}}]);
    assert!(refused(&|spec| spec["otherwise"] = itself.clone()).contains("which it watches"));
}

#[test]
fn what_came_of_an_action_is_told() {
    let mut node = Node::new(json!({"above": 8}));
    node.rules.done(&"a/alarm".into(), "publish on alarm", Ok(()));
    node.rules.done(&"a/alarm".into(), "publish on alarm", Err("there is no broker".into()));
    node.rules.done(&"a/gone".into(), "publish on alarm", Ok(()));
    assert_eq!(words(&mut node.rules), ["RuleActed", "RuleFailed"]);
}

/// Two rules set each other off through a device that does what it is told; it ends by itself.
#[test]
fn rules_that_set_each_other_off_come_to_rest() {
    let flip = |name: &str, equals: &str, value: &str| {
        json!({"metadata": {"name": name}, "spec": {
            "when": {"device": "fridge", "property": "a", "equals": equals}, "cooldownSeconds": 0,
            "then": [{"set": {"device": "fridge", "property": "b", "value": value}}]}})
    };
    let mut node = Node::new(json!({"above": 8}));
    node.rule("on", &flip("on", "1", "0"));
    node.rule("off", &flip("off", "0", "1"));
    let mut value = "1".to_owned();
    let mut sets = 0;
    for ms in 0..10_000 {
        // The device copies b to a.
        node.rules.report(node.at(ms), &"a/fridge".into(), "a", &value);
        while let Some(output) = node.rules.poll_output() {
            if let Output::Act { action: RuleAction { set: Some(set), .. }, .. } = output {
                value = set.value;
                sets += 1;
            }
        }
    }
    assert_eq!(sets, BEGINNINGS_MAX * 2);
}

/// Against a model that looks at the whole past at every step.
#[test]
fn any_sequence_of_values_ends_as_the_model_says() {
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let held = random.below(4);
        let mut wrong = rule(json!({"above": 5, "hysteresis": 2, "forSeconds": held}));
        wrong["spec"]["cooldownSeconds"] = 0.into();
        let mut node = Node::new(json!({"above": 8}));
        node.rule("alarm", &wrong);
        let (mut active, mut since) = (false, None::<u64>);
        for step in 0..60_u64 {
            // 70 s apart at times, so that no rule pauses.
            let ms = step * 20_000;
            let number = random.below(9);
            let mut expected = Vec::new();
            let mut begin = |at: u64, active: &mut bool, since: &mut Option<u64>| {
                if since.is_some_and(|since| since + held * 1000 <= at) {
                    (*active, *since) = (true, None);
                    expected.push("RuleBegan");
                }
            };
            begin(ms, &mut active, &mut since);
            if number > 5 && !active && since.is_none() {
                since = Some(ms);
            }
            begin(ms, &mut active, &mut since);
            if number <= 3 {
                since = None;
                if std::mem::take(&mut active) {
                    expected.push("RuleEnded");
                }
            }
            let mut happened = node.time(ms);
            happened.extend(node.report(ms, &number.to_string()));
            happened.retain(|word| word.starts_with("Rule"));
            assert_eq!(happened, expected, "seed {seed}, step {step}, value {number}");
        }
    }
}

fn scaling() -> Value {
    let mut scaling = rule(json!({"above": 8}));
    scaling["spec"]["then"] = json!([
        {"scale": {"workload": "heater", "replicas": 0}},
        {"publish": {"topic": "alarm", "payload": "on"}},
    ]);
    scaling["spec"]["otherwise"] =
        json!([{"scale": {"workload": "fan", "replicas": 1}}, {"scale": {"workload": "heater"}}]);
    scaling
}

#[test]
fn a_limit_lasts_until_the_rule_ends_or_is_gone() {
    let mut node = Node { rules: Rules::default(), start: Instant::now() };
    node.rule("alarm", &scaling());
    assert_eq!(node.report(0, "9"), ["RuleBegan", r#"limit true [("heater", 0)]"#, "on"]);
    assert_eq!(node.report(2000, "7"), ["RuleEnded", r#"limit false [("fan", 1)]"#]);
    let path = ResourcePath::new("a", "devicerule", "alarm").expect("a path");
    node.rules.handle_gone(&path);
    assert_eq!(words(&mut node.rules), ["limit false []"]);

    // Another form of the rule begins idle, and so without limits.
    node.rule("alarm", &scaling());
    node.report(4000, "9");
    let mut other = scaling();
    other["spec"]["when"]["above"] = 10.into();
    node.rule("alarm", &other);
    assert_eq!(words(&mut node.rules), ["limit false []"]);
}

#[test]
fn a_limit_outlives_a_restart_and_its_rule_lifts_it() {
    let kept = |active, name: &str| RuleLimits {
        rule: format!("a/{name}").as_str().into(),
        active,
        limits: vec![("heater".into(), 0)],
    };
    let mut node = Node { rules: Rules::default(), start: Instant::now() };
    node.rule("alarm", &scaling());
    node.rules.resume(&kept(true, "alarm"));
    assert_eq!(words(&mut node.rules), [""; 0], "it stays as it is");
    assert_eq!(node.report(0, "9"), [""; 0], "it has begun before");
    assert_eq!(node.report(1000, "7"), ["RuleEnded", r#"limit false [("fan", 1)]"#]);

    // What a rule that is no more has limited runs again.
    node.rules.resume(&kept(true, "gone"));
    assert_eq!(words(&mut node.rules), ["limit false []"]);
    // One that had ended begins as usual.
    let mut node = Node { rules: Rules::default(), start: Instant::now() };
    node.rule("alarm", &scaling());
    node.rules.resume(&kept(false, "alarm"));
    assert_eq!(node.report(0, "9").len(), 3);
}
