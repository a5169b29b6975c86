use super::*;
use serde_json::{Value as Json, json};

struct Node {
    history: History,
    start: Instant,
}

impl Node {
    fn new(annotation: Option<&str>) -> Self {
        let mut node =
            Self { history: History::new(false, Keeping::default()), start: Instant::now() };
        let annotations = annotation.map_or(json!({}), |text| json!({ANNOTATION: text}));
        node.object("device", "fridge", &annotations);
        node
    }

    fn object(&mut self, kind: &str, name: &str, annotations: &Json) {
        let path = ResourcePath::new("a", kind, name).expect("a path");
        let object = json!({
            "metadata": {"name": name, "annotations": annotations},
            "spec": {"deviceModelRef": {"name": "model"}},
        });
        let _ = self.history.handle_object(&path, &object);
    }

    fn at(&self, ms: i64) -> Instant {
        self.start + Duration::from_millis(ms.max(0).cast_unsigned())
    }

    fn report(&mut self, ms: i64, property: &str, text: &str) {
        self.history.report(self.at(ms), ms, &"a/fridge".into(), property, text, ms);
    }

    fn kept(&self, property: &str) -> Vec<(i64, String)> {
        let runs = self.history.recent("a/fridge", property);
        let text = |sample: &Sample| (sample.at_ms, sample.value.to_string());
        runs.iter().flatten().map(text).collect()
    }

    fn take(&mut self, ms: i64, all: bool) -> Changes {
        self.history.take_changes(self.at(ms), ms, all)
    }
}

fn kept(list: &[(i64, &str)]) -> Vec<(i64, String)> {
    list.iter().map(|(at, text)| (*at, (*text).to_owned())).collect()
}

#[test]
fn nothing_is_kept_unless_somebody_asks() {
    let mut node = Node::new(None);
    assert!(!node.history.is_wanted());
    node.report(0, "t", "1");
    assert_eq!(node.kept("t"), []);
    let model = json!({ANNOTATION: r#"{"*": {}, "secret": {"keep": false}}"#});
    node.object("devicemodel", "model", &model);
    assert!(node.history.is_wanted());
    node.report(1000, "t", "1");
    node.report(1000, "secret", "1");
    assert_eq!((node.kept("t"), node.kept("secret")), (kept(&[(1000, "1")]), kept(&[])));
}

#[test]
fn the_device_counts_before_the_model_and_both_before_the_configuration() {
    let mut node = Node::new(Some(r#"{"t": {"interval": 5}}"#));
    node.object(
        "devicemodel",
        "model",
        &json!({ANNOTATION: r#"{"t": {"interval": 9, "days": 2}}"#}),
    );
    let keeping = node.history.keeping(&"a/fridge".into(), "t").expect("kept");
    let expected = Keeping { interval_ms: 5000, deadband: 0.0, keep_ms: 2 * 86_400_000 };
    assert_eq!(keeping, expected);
    assert_eq!(node.history.keeping(&"a/other".into(), "t"), None);
}

#[test]
fn a_bad_annotation_says_what_is_wrong() {
    let bad = |text: &str| Wanted::parse(text).expect_err("bad").to_string();
    assert!(bad("temperature").contains("is not like"));
    assert!(bad(r#"{"t": {"dedband": 1}}"#).contains("dedband"));
    assert!(bad(r#"{"t": {"deadband": -1}}"#).contains("out of range"));
    assert!(bad(r#"{"t": {"days": 100000}}"#).contains("out of range"));
}

#[test]
fn small_changes_and_repeats_are_not_kept_and_a_straight_line_is_seen() {
    let mut node = Node::new(Some(r#"{"t": {"deadband": 0.5}}"#));
    for (ms, text) in [(0, "4"), (1000, "4.4"), (2000, "4.5"), (3000, "4.6"), (4000, "4.6")] {
        node.report(ms, "t", text);
    }
    assert_eq!(node.kept("t"), kept(&[(0, "4"), (3000, "4.6")]));
    node.report(3000 + REPEAT_MS - 1, "t", "4.6");
    node.report(3000 + REPEAT_MS, "t", "4.6");
    assert_eq!(node.kept("t").len(), 3);
}

#[test]
fn the_last_value_of_a_burst_is_kept() {
    let mut node = Node::new(Some(r#"{"door": {"interval": 10}}"#));
    node.report(0, "door", "closed");
    node.report(100, "door", "ajar");
    node.report(200, "door", "open");
    assert_eq!(node.kept("door"), kept(&[(0, "closed"), (200, "open")]), "it is seen at once");
    node.report(60_000, "door", "closed");
    assert_eq!(node.kept("door"), kept(&[(0, "closed"), (200, "open"), (60_000, "closed")]));
    node.report(60_100, "door", "open");
    node.report(60_200, "door", "closed");
    node.report(90_000, "door", "ajar");
    assert_eq!(node.kept("door").last(), kept(&[(90_000, "ajar")]).last());
    assert_eq!(node.kept("door").len(), 4, "open for 0.1 s is less than the interval");
    let changes = node.take(90_100, true);
    assert_eq!(changes.runs.len(), 1);
    assert_eq!(changes.runs[0].samples.len(), 4);
}

#[test]
fn late_and_long_values_are_counted_and_a_clock_that_was_set_back_is_followed() {
    let mut node = Node::new(Some(r#"{"*": {}}"#));
    let day = 86_400_000;
    node.report(day, "t", "1");
    node.report(day - 5000, "t", "2");
    node.report(day + 1000, "t", &"x".repeat(VALUE_LEN_MAX + 1));
    assert_eq!(node.take(day, false).lost, Lost { late: 1, long: 1, ..Lost::default() });
    node.history.handle_stored(node.at(day), true);
    node.report(1000, "t", "3");
    node.report(2000, "t", "4");
    assert_eq!(node.kept("t"), kept(&[(day, "1"), (1000, "3"), (2000, "4")]));
    assert_eq!(node.take(2000, true).runs.len(), 2, "each with rising times");
}

#[test]
fn a_full_block_is_written_once_and_an_open_one_from_time_to_time() {
    let mut node = Node::new(Some(r#"{"*": {}}"#));
    let seal = i64::try_from(SEAL_AT).expect("small");
    for second in 0..seal + 3 {
        node.report(second * 1000, "t", &second.to_string());
    }
    let changes = node.take(1000, false);
    assert_eq!(changes.runs.len(), 1);
    assert!(!changes.runs[0].is_tail && changes.runs[0].samples.len() == SEAL_AT);
    assert_eq!(node.kept("t").len(), SEAL_AT + 3, "while it is being written too");
    assert!(node.take(1000, false).is_empty(), "one write at a time");
    node.history.handle_stored(node.at(1000), false);
    assert!(node.take(2000, false).is_empty(), "the disk has a pause");
    assert_eq!(node.take(12_000, false), changes, "the same again");
    node.history.handle_stored(node.at(12_000), true);
    assert_eq!(node.kept("t").len(), 3);
    let later = (seal + 3) * 1000 + 120_000;
    let due = node.history.poll_timeout(node.at(12_000)).expect("a tail");
    assert!(due <= node.at(later));
    let tail = node.take(later, false);
    assert!(tail.runs[0].is_tail && tail.runs[0].samples.len() == 3);
    node.history.handle_stored(node.at(later), true);
    assert!(node.take(later + 500_000, false).is_empty(), "nothing new");
    assert_eq!(node.kept("t").len(), 3, "still open");
}

#[test]
fn numbers_and_texts_of_one_property_are_in_blocks_of_their_own() {
    let mut node = Node::new(Some(r#"{"*": {}}"#));
    node.report(0, "t", "4.5");
    node.report(1000, "t", "error");
    node.report(2000, "t", "4.5");
    let changes = node.take(2000, true);
    let counts: Vec<_> = changes.runs.iter().map(|run| (run.samples.len(), run.is_tail)).collect();
    assert_eq!(counts, [(1, false), (1, false), (1, true)]);
}

#[test]
fn memory_is_bounded_when_the_disk_takes_nothing_and_the_loss_is_counted() {
    let mut node = Node::new(Some(r#"{"*": {"interval": 0}}"#));
    let text = "x".repeat(VALUE_LEN_MAX - 8);
    let mut reported = 0;
    while node.history.lost.unwritten == 0 {
        reported += 1;
        assert!(reported < 100_000, "no bound");
        node.report(reported, "t", &format!("{text}{reported}"));
    }
    assert!(node.history.bytes <= OPEN_BYTES_MAX * 2);
    let kept = node.kept("t").len() as i64;
    assert_eq!(kept + node.history.lost.unwritten.cast_signed(), reported);
}

#[test]
fn more_properties_than_are_kept_are_counted() {
    let mut node = Node::new(Some(r#"{"*": {}}"#));
    for n in 0..SERIES_MAX + 2 {
        node.report(0, &format!("p{n}"), "1");
    }
    assert_eq!(node.take(0, false).lost.many, 2);
}

#[test]
fn what_was_kept_of_a_device_that_left_goes_to_the_disk() {
    let mut node = Node::new(Some(r#"{"*": {}}"#));
    node.report(0, "t", "1");
    node.history.handle_gone(&ResourcePath::new("a", "device", "fridge").expect("a path"));
    node.report(1000, "t", "2");
    let changes = node.take(1000, false);
    assert_eq!(changes.runs.len(), 1);
    assert_eq!(changes.runs[0].samples.len(), 1, "nothing after it left");
    node.history.handle_stored(node.at(1000), true);
    assert_eq!((node.history.bytes, node.history.count), (0, 0));
}
