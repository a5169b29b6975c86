use super::*;
use crate::MessageId;
use proptest::prelude::*;
use std::collections::{BTreeMap, HashSet};

fn object(operation: Operation, resource: &str, uid: &str, version: u64) -> Message {
    let body =
        serde_json::json!({"metadata": {"uid": uid, "resourceVersion": version.to_string()}});
    Message::new(0, "edgecontroller", "resource", operation, resource, &body)
        .with_version(version.to_string())
}

fn queued(messages: impl IntoIterator<Item = Message>) -> Delivery {
    let mut delivery = Delivery::default();
    for message in messages {
        delivery.queue(message).expect("there is room");
    }
    delivery
}

/// Acknowledges everything at once and returns what was written, as `operation resource version`.
fn drain(delivery: &mut Delivery, now: Instant) -> Vec<String> {
    let mut written = Vec::new();
    while let Some(message) = delivery.poll_transmit(now) {
        let Message { header, route, .. } = &*message;
        written.push(format!("{} {} {}", route.operation, route.resource, header.resourceversion));
        delivery.handle_ack(&header.msg_id);
    }
    written
}

#[test]
fn unanswered_message_is_written_five_times_in_25_seconds_then_queued_again() {
    let start = Instant::now();
    let mut delivery = queued([
        object(Operation::Update, "default/pod/a", "a", 1),
        object(Operation::Update, "default/pod/b", "b", 1),
    ]);

    let mut now = start;
    let mut written = Vec::new();
    while let Some(message) = delivery.poll_transmit(now) {
        written.push(((now - start).as_secs(), message.route.resource.clone()));
        if message.route.resource.ends_with('b') {
            break;
        }
        now = delivery.poll_timeout().expect("a message is in flight");
    }

    let seconds: Vec<_> = written.iter().map(|(at, _)| *at).collect();
    assert_eq!(seconds, [0, 5, 10, 15, 20, 25]);
    assert_eq!(written[5].1, "default/pod/b", "the next message gets its turn");
    assert!(
        matches!(delivery.poll_event(), Some(Event::Unanswered(message)) if message.route.resource == "default/pod/a")
    );
    assert_eq!(delivery.len(), 2, "the unanswered one waits again");
}

#[test]
fn late_ack_does_not_touch_the_next_message() {
    let now = Instant::now();
    let mut delivery = queued([object(Operation::Update, "default/pod/a", "a", 1)]);
    let first = delivery.poll_transmit(now).expect("due");
    delivery.handle_ack(&first.header.msg_id);
    delivery.queue(object(Operation::Update, "default/pod/b", "b", 1)).expect("room");
    let second = delivery.poll_transmit(now).expect("due");

    delivery.handle_ack(&first.header.msg_id);
    delivery.handle_ack("never sent");

    assert!(delivery.poll_transmit(now).is_none(), "`b` is still in flight");
    delivery.handle_ack(&second.header.msg_id);
    assert!(delivery.is_empty());
}

#[test]
fn ack_that_comes_after_the_last_write_still_counts() {
    let mut now = Instant::now();
    let mut delivery = queued([
        object(Operation::Update, "default/pod/a", "a", 1),
        object(Operation::Update, "default/pod/b", "b", 1),
    ]);
    let first = delivery.poll_transmit(now).expect("due");
    for _ in 0..WRITES_MAX {
        now += RETRY_INTERVAL;
        delivery.poll_transmit(now);
    }
    delivery.handle_ack(&first.header.msg_id);
    assert_eq!(drain(&mut delivery, now + RETRY_INTERVAL), ["update default/pod/b 1"]);
    assert!(delivery.is_empty());
}

#[test]
fn queued_version_is_replaced_by_the_next_one_and_keeps_its_place() {
    let mut delivery = queued([
        object(Operation::Insert, "default/configmap/a", "a", 1),
        object(Operation::Insert, "default/configmap/b", "b", 2),
        object(Operation::Update, "default/configmap/a", "a", 3),
        object(Operation::Update, "default/configmap/a", "a", 4),
    ]);
    assert_eq!(
        drain(&mut delivery, Instant::now()),
        ["update default/configmap/a 4", "insert default/configmap/b 2"]
    );
}

#[test]
fn delete_is_never_replaced_by_the_object_that_follows_it_under_the_same_name() {
    let mut delivery = queued([
        object(Operation::Update, "default/pod/a", "old", 1),
        object(Operation::Delete, "default/pod/a", "old", 2),
        object(Operation::Update, "default/pod/a", "new", 3),
        object(Operation::Update, "default/pod/a", "new", 4),
    ]);
    assert_eq!(
        drain(&mut delivery, Instant::now()),
        ["delete default/pod/a 2", "update default/pod/a 4"]
    );
}

#[test]
fn unanswered_version_is_dropped_when_a_newer_one_waits() {
    let mut now = Instant::now();
    let mut delivery = queued([object(Operation::Update, "default/pod/a", "a", 1)]);
    delivery.poll_transmit(now);
    delivery.queue(object(Operation::Update, "default/pod/a", "a", 2)).expect("room");
    for _ in 1..WRITES_MAX {
        now += RETRY_INTERVAL;
        delivery.poll_transmit(now);
    }
    assert_eq!(drain(&mut delivery, now + RETRY_INTERVAL), ["update default/pod/a 2"]);
    assert!(matches!(delivery.poll_event(), Some(Event::Dropped(_))));
}

#[test]
fn unanswered_delete_stays_ahead_of_the_new_object_and_lets_others_pass() {
    let mut now = Instant::now();
    let mut delivery = queued([
        object(Operation::Delete, "default/pod/a", "old", 1),
        object(Operation::Update, "default/pod/a", "new", 2),
        object(Operation::Update, "default/pod/b", "b", 3),
    ]);
    for _ in 0..WRITES_MAX {
        delivery.poll_transmit(now);
        now += RETRY_INTERVAL;
    }
    assert_eq!(
        drain(&mut delivery, now),
        ["update default/pod/b 3", "delete default/pod/a 1", "update default/pod/a 2"]
    );
}

#[test]
fn answers_are_not_replaced_by_pushes_of_the_same_object() {
    let query = Message::new(0, "edged", "meta", Operation::Query, "default/configmap/a", &());
    let answer = query.response(0, &serde_json::json!({"metadata": {"uid": "a"}}));
    let mut delivery = queued([answer, object(Operation::Update, "default/configmap/a", "a", 2)]);
    assert_eq!(
        drain(&mut delivery, Instant::now()),
        ["response default/configmap/a ", "update default/configmap/a 2"]
    );
}

#[test]
fn messages_without_ack_pass_the_one_in_flight() {
    let now = Instant::now();
    let mut delivery = queued([object(Operation::Update, "default/pod/a", "a", 1)]);
    delivery.poll_transmit(now);
    let lease = object(Operation::Response, "kube-node-lease/lease/edge1", "", 0);
    delivery.queue(lease).expect("room");
    let passed = delivery.poll_transmit(now).expect("due at once");
    assert_eq!(passed.route.resource, "kube-node-lease/lease/edge1");
    assert!(delivery.poll_transmit(now).is_none());
}

#[test]
fn answer_to_a_digest_waits_until_everything_before_it_is_acknowledged() {
    let mut now = Instant::now();
    let request =
        Message::new(0, "metamanager", "meta", Operation::Query, crate::digest::RESOURCE, &());
    let barrier = request.response(0, "OK");
    let mut delivery = queued([
        object(Operation::Update, "default/pod/a", "a", 1),
        object(Operation::Update, "default/pod/b", "b", 1),
        barrier.clone(),
    ]);
    let first = delivery.poll_transmit(now).expect("due");
    // The next version of what is in flight comes after the barrier in the queue, not in what is promised.
    delivery.queue(object(Operation::Update, "default/pod/a", "a", 2)).expect("room");
    while delivery.poll_timeout().is_some_and(|at| at < now + RETRY_INTERVAL * WRITES_MAX) {
        now = delivery.poll_timeout().expect("in flight");
        let next = delivery.poll_transmit(now).expect("due");
        if next.header.msg_id != first.header.msg_id {
            delivery.handle_ack(&next.header.msg_id);
            break;
        }
    }
    assert_eq!(
        drain(&mut delivery, now),
        ["update default/pod/a 2".to_owned(), format!("response {} ", crate::digest::RESOURCE)],
    );
    assert!(delivery.is_empty());
}

#[test]
fn full_queue_refuses_and_keeps_what_it_has() {
    let mut delivery = queued(
        (0..WAITING_MAX).map(|n| object(Operation::Update, &format!("default/pod/{n}"), "u", 1)),
    );
    let more = object(Operation::Update, "default/pod/more", "u", 1);
    assert_eq!(delivery.queue(more), Err(QueueFull));
    assert_eq!(delivery.len(), WAITING_MAX);
}

#[test]
fn class_is_read_from_the_type_segment() {
    let check = |operation: &str, resource: &str, source: &str, content: &str, expected: bool| {
        let mut message = Message::new(0, source, "resource", Operation::Update, resource, &());
        message.route.operation = operation.into();
        message.content = serde_json::value::RawValue::from_string(content.into()).expect("json");
        assert_eq!(ack_required(&message), expected, "{operation} {resource} from {source}");
    };
    check("insert", "default/pod/web", "edgecontroller", "{}", true);
    check("update", "null/node/edge1", "edgecontroller", "{}", true);
    check("delete", "default/secret/s", "edgecontroller", "{}", true);
    check("response", "default/configmap/c", "edgecontroller", "{\"metadata\":{}}", true);
    check("insert", "default/device/d", "devicecontroller", "{}", true);
    check("update", "default/configmap/membership", "edgecontroller", "{}", true);
    check("update", "default/configmap/podlist", "edgecontroller", "{}", true);
    check("update", "membership", "devicecontroller", "{}", false);
    check("response", "null/node/edge1", "edgecontroller", "{\"Object\":null,\"Err\":null}", false);
    check(
        "response",
        "default/podpatch/p",
        "edgecontroller",
        "{\"Object\":null,\"Err\":null}",
        false,
    );
    check("response", "default/pod/p", "edgecontroller", "\"OK\"", false);
    check("response", "kube-node-lease/lease/n", "edgecontroller", "{}", false);
    check("response", "default/serviceaccounttoken/s", "edgecontroller", "{\"a\":1}", false);
    check("response", "default/secret/s", "edgecontroller", "{\"ErrStatus\":{}}", false);
    check("error", "default/secret/s", "edgecontroller", "\"no\"", false);
    check("response", "skerry/digest", "edgecontroller", "\"OK\"", false);
}

/// One step of a generated run.
#[derive(Debug, Clone)]
enum Step {
    /// The object with this number gets a new version.
    Change(u8),
    /// The object with this number is deleted; its next version has another uid.
    Delete(u8),
    /// The hub writes what is due; the flags say whether the message is lost, and whether it arrives twice.
    Write { lost: bool, twice: bool },
    /// One of the acks on their way arrives, any of them, once or twice.
    Ack { which: usize, twice: bool },
    /// One of the acks on their way is lost.
    LoseAck { which: usize },
    /// Time goes by.
    Wait(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..4u8).prop_map(Step::Change),
        2 => (0..4u8).prop_map(Step::Delete),
        6 => (proptest::bool::weighted(0.3), any::<bool>()).prop_map(|(lost, twice)| Step::Write { lost, twice }),
        4 => (any::<usize>(), any::<bool>()).prop_map(|(which, twice)| Step::Ack { which, twice }),
        1 => any::<usize>().prop_map(|which| Step::LoseAck { which }),
        3 => (1..7u8).prop_map(Step::Wait),
    ]
}

/// The objects of a node as the cloud wants them and as the node has them. A connection keeps the order of what it
/// carries, so messages to the node may be lost or doubled but not reordered; acks may come in any order.
#[derive(Default)]
struct World {
    delivery: Delivery,
    desired: BTreeMap<String, (String, u64)>,
    node: BTreeMap<String, (String, u64)>,
    deleted_at_node: HashSet<String>,
    acks: Vec<MessageId>,
    version: u64,
}

impl World {
    fn apply(&mut self, step: &Step, now: &mut Instant) {
        match *step {
            Step::Change(number) => {
                self.version += 1;
                let resource = format!("default/configmap/{number}");
                let uid = match self.desired.get(&resource) {
                    Some((uid, _)) => uid.clone(),
                    None => format!("uid-{number}-{}", self.version),
                };
                self.desired.insert(resource.clone(), (uid.clone(), self.version));
                let message = object(Operation::Update, &resource, &uid, self.version);
                self.delivery.queue(message).expect("few messages");
            }
            Step::Delete(number) => {
                let resource = format!("default/configmap/{number}");
                if let Some((uid, _)) = self.desired.remove(&resource) {
                    self.version += 1;
                    let message = object(Operation::Delete, &resource, &uid, self.version);
                    self.delivery.queue(message).expect("few messages");
                }
            }
            Step::Write { lost, twice } => {
                if let Some(message) = self.delivery.poll_transmit(*now)
                    && !lost
                {
                    for _ in 0..=u8::from(twice) {
                        self.receive(&message);
                    }
                }
            }
            Step::Ack { which, twice } if !self.acks.is_empty() => {
                let parent = self.acks.swap_remove(which % self.acks.len());
                for _ in 0..=u8::from(twice) {
                    self.delivery.handle_ack(&parent);
                }
            }
            Step::LoseAck { which } if !self.acks.is_empty() => {
                self.acks.swap_remove(which % self.acks.len());
            }
            Step::Ack { .. } | Step::LoseAck { .. } => {}
            Step::Wait(seconds) => *now += Duration::from_secs(seconds.into()),
        }
    }

    fn receive(&mut self, message: &Message) {
        let resource = message.route.resource.clone();
        let version: u64 = message.header.resourceversion.parse().expect("ours is a number");
        let uid = uid(message);
        if message.operation() == Some(Operation::Delete) {
            self.deleted_at_node.insert(uid.clone());
            if self.node.get(&resource).is_some_and(|(held, _)| *held == uid) {
                self.node.remove(&resource);
            }
        } else {
            assert!(!self.deleted_at_node.contains(&uid), "{resource} {uid} came back");
            if let Some((held, old)) = self.node.get(&resource) {
                assert!(*old <= version, "{resource} went back from {old} ({held}) to {version}");
            }
            self.node.insert(resource, (uid, version));
        }
        self.acks.push(message.header.msg_id.clone());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn nothing_is_forgotten_reversed_or_resurrected(steps in proptest::collection::vec(step(), 0..120)) {
        let mut now = Instant::now();
        let mut world = World::default();
        for step in &steps {
            world.apply(step, &mut now);
        }
        // From here on the link is good; the node has to end up with what is desired.
        for _ in 0..10_000 {
            if world.delivery.is_empty() {
                break;
            }
            world.apply(&Step::Write { lost: false, twice: false }, &mut now);
            while !world.acks.is_empty() {
                world.apply(&Step::Ack { which: 0, twice: false }, &mut now);
            }
            now += Duration::from_secs(1);
        }
        prop_assert!(world.delivery.is_empty());
        prop_assert_eq!(world.node, world.desired);
    }
}
