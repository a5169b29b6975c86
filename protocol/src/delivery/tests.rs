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
        delivery.handle_ack(&header.msg_id, now);
    }
    written
}

/// Everything that may be written at `now`, as `resource version`.
fn write_all(delivery: &mut Delivery, now: Instant) -> Vec<String> {
    let mut written = Vec::new();
    while let Some(message) = delivery.poll_transmit(now) {
        written.push(format!("{} {}", message.route.resource, message.header.resourceversion));
    }
    written
}

/// A window of one message, in which the order of everything can be seen.
fn one_at_a_time() -> Delivery {
    Delivery::new(Settings { window: 1, ..Settings::stock() })
}

#[test]
fn unanswered_message_is_written_five_times_in_25_seconds_then_queued_again() {
    let start = Instant::now();
    let mut delivery = one_at_a_time();
    delivery.queue(object(Operation::Update, "default/pod/a", "a", 1)).expect("room");
    delivery.queue(object(Operation::Update, "default/pod/b", "b", 1)).expect("room");

    let mut now = start;
    let mut written = Vec::new();
    while written.len() < 6 {
        let message = delivery.poll_transmit(now).expect("it is time");
        written.push(((now - start).as_secs(), message.route.resource.clone()));
        assert!(delivery.poll_transmit(now).is_none(), "the window is full");
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
fn window_is_full_of_different_keys_and_acks_make_room_in_any_order() {
    let now = Instant::now();
    let pods = (0..40).map(|n| object(Operation::Update, &format!("default/pod/{n:02}"), "u", 1));
    let mut delivery = queued(pods);
    let first: Vec<_> = std::iter::from_fn(|| delivery.poll_transmit(now)).collect();
    assert_eq!(first.len(), STOCK_WINDOW);
    assert_eq!((delivery.in_flight(), delivery.backlog_len(), delivery.len()), (16, 24, 40));
    for message in first.iter().rev().take(3) {
        delivery.handle_ack(&message.header.msg_id, now);
    }
    let next = write_all(&mut delivery, now);
    assert_eq!(next, ["default/pod/16 1", "default/pod/17 1", "default/pod/18 1"]);
}

#[test]
fn next_version_of_a_key_waits_for_the_ack_of_the_one_in_flight() {
    let now = Instant::now();
    let mut delivery = queued([object(Operation::Update, "default/pod/a", "a", 1)]);
    let first = delivery.poll_transmit(now).expect("due");
    for version in 2..5 {
        delivery.queue(object(Operation::Update, "default/pod/a", "a", version)).expect("room");
    }
    assert!(delivery.poll_transmit(now).is_none());
    assert_eq!(delivery.len(), 2, "versions in between are pointless");
    delivery.handle_ack(&first.header.msg_id, now);
    assert_eq!(write_all(&mut delivery, now), ["default/pod/a 4"]);
}

#[test]
fn most_urgent_class_goes_first_and_the_oldest_of_it() {
    let mut delivery = one_at_a_time();
    for resource in [
        "default/endpointslice/a",
        "default/device/a",
        "null/node/edge1",
        "default/pod/b",
        "default/pod/a",
        "skerry/bundle/edge1",
    ] {
        delivery.queue(object(Operation::Update, resource, "u", 1)).expect("room");
    }
    let order = [
        "update skerry/bundle/edge1 1",
        "update default/pod/b 1",
        "update default/pod/a 1",
        "update null/node/edge1 1",
        "update default/device/a 1",
        "update default/endpointslice/a 1",
    ];
    assert_eq!(drain(&mut delivery, Instant::now()), order);
}

#[test]
fn bytes_bound_the_window_and_one_oversized_message_goes_alone() {
    let now = Instant::now();
    let sized = |resource: &str, len: usize| {
        let body = serde_json::json!({"metadata": {"uid": resource}, "data": "x".repeat(len)});
        Message::new(0, "edgecontroller", "resource", Operation::Update, resource, &body)
            .with_version("1")
    };
    let large = WINDOW_BYTES + 1;
    let mut delivery = queued([
        sized("default/pod/a", 1000),
        sized("default/pod/b", large),
        sized("default/pod/c", 10),
    ]);
    assert_eq!(write_all(&mut delivery, now), ["default/pod/a 1"], "`c` does not overtake");
    assert!(delivery.in_flight_bytes() < 2000 && delivery.backlog_bytes() > large);
    let mut delivery = queued([sized("default/pod/b", large), sized("default/pod/c", 10)]);
    let alone = delivery.poll_transmit(now).expect("nothing else is in flight");
    assert!(delivery.poll_transmit(now).is_none());
    delivery.handle_ack(&alone.header.msg_id, now);
    assert_eq!(write_all(&mut delivery, now), ["default/pod/c 1"]);
}

#[test]
fn bytes_bound_what_waits() {
    let body = "x".repeat(WAITING_BYTES_MAX / 8);
    let large = |n: usize| {
        let resource = format!("default/configmap/{n}");
        Message::new(0, "edgecontroller", "resource", Operation::Update, resource, &body)
    };
    let mut delivery = queued((0..7).map(large));
    assert_eq!(delivery.queue(large(7)), Err(QueueFull));
    assert_eq!(delivery.len(), 7);
    delivery.queue(large(0)).expect("a newer version takes the place of the old one");
}

#[test]
fn late_ack_does_not_touch_the_next_message() {
    let now = Instant::now();
    let mut delivery = queued([object(Operation::Update, "default/pod/a", "a", 1)]);
    let first = delivery.poll_transmit(now).expect("due");
    delivery.handle_ack(&first.header.msg_id, now);
    delivery.queue(object(Operation::Update, "default/pod/a", "a", 2)).expect("room");
    let second = delivery.poll_transmit(now).expect("due");

    delivery.handle_ack(&first.header.msg_id, now);
    delivery.handle_ack("never sent", now);

    assert!(delivery.poll_transmit(now).is_none(), "the second version is still in flight");
    delivery.handle_ack(&second.header.msg_id, now);
    assert!(delivery.is_empty());
}

#[test]
fn round_trip_is_smoothed_and_ignores_messages_that_were_written_twice() {
    let start = Instant::now();
    let ms = Duration::from_millis;
    let mut delivery = Delivery::default();
    let mut ack_after = |writes: u32, wait: Duration| {
        delivery.queue(object(Operation::Update, "default/pod/a", "a", 1)).expect("room");
        let message = delivery.poll_transmit(start).expect("due");
        for write in 1..writes {
            delivery.poll_transmit(start + RETRY_INTERVAL * write).expect("due again");
        }
        delivery.handle_ack(&message.header.msg_id, start + wait);
        while delivery.poll_event().is_some() {}
        delivery.rtt()
    };
    assert_eq!(ack_after(2, RETRY_INTERVAL + ms(1)), None);
    assert_eq!(ack_after(1, ms(80)), Some(ms(80)));
    assert_eq!(ack_after(1, ms(160)), Some(ms(90)));
    assert_eq!(ack_after(3, ms(1)), Some(ms(90)));
}

#[test]
fn stock_node_gets_messages_without_ack_at_a_pace_that_its_reader_keeps() {
    let start = Instant::now();
    let notice = |n: u32| {
        Message::new(0, "router_eventbus", "user", Operation::Publish, format!("topic/{n}"), "data")
    };
    let mut delivery = queued((0..STOCK_BURST + 10).map(notice));
    assert_eq!(write_all(&mut delivery, start).len(), STOCK_BURST as usize);
    assert_eq!(delivery.poll_timeout(), Some(start + STOCK_PACE));
    delivery.queue(object(Operation::Update, "default/pod/a", "a", 1)).expect("room");
    assert_eq!(write_all(&mut delivery, start), ["default/pod/a 1"], "objects do not wait for it");
    assert_eq!(write_all(&mut delivery, start + STOCK_PACE).len(), 1);
    let next = delivery.poll_timeout().expect("more is to come");
    assert_eq!(next, start + STOCK_PACE * 2);
    assert_eq!(write_all(&mut delivery, start + Duration::from_secs(1)).len(), 9);

    let mut delivery = Delivery::new(Settings::ours());
    for n in 0..1000 {
        delivery.queue(notice(n)).expect("room");
    }
    assert_eq!(write_all(&mut delivery, start).len(), 1000, "ours keeps what it has read");
}

#[test]
fn idle_delivery_is_a_few_words() {
    let now = Instant::now();
    let mut delivery =
        queued((0..100).map(|n| object(Operation::Update, &format!("a/pod/{n}"), "u", 1)));
    drain(&mut delivery, now);
    assert!(delivery.busy.is_some(), "events are to be told");
    while delivery.poll_event().is_some() {}
    assert!(delivery.busy.is_none(), "nothing is kept");
    assert!(delivery.rtt().is_some(), "but what was learned");
    assert!(size_of::<Delivery>() <= 128, "{}", size_of::<Delivery>());
}

#[test]
fn ten_thousand_messages_of_many_keys_take_no_scans() {
    let now = Instant::now();
    let mut delivery = Delivery::new(Settings::ours());
    for round in 0..2 {
        for n in 0..WAITING_MAX {
            let resource = format!("default/configmap/{n}");
            delivery.queue(object(Operation::Update, &resource, "u", round)).expect("room");
        }
    }
    let mut acked = 0;
    while !delivery.is_empty() {
        let written: Vec<_> = std::iter::from_fn(|| delivery.poll_transmit(now)).collect();
        assert!(written.len() <= OUR_WINDOW);
        for message in written.iter().rev() {
            delivery.handle_ack(&message.header.msg_id, now);
            acked += 1;
        }
    }
    assert_eq!(acked, WAITING_MAX);
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
    delivery.handle_ack(&first.header.msg_id, now);
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
    let mut delivery = one_at_a_time();
    for message in [
        object(Operation::Delete, "default/pod/a", "old", 1),
        object(Operation::Update, "default/pod/a", "new", 2),
        object(Operation::Update, "default/pod/b", "b", 3),
    ] {
        delivery.queue(message).expect("room");
    }
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
            delivery.handle_ack(&next.header.msg_id, now);
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
fn barrier_waits_for_a_key_that_no_longer_fits_into_the_window() {
    let now = Instant::now();
    let request =
        Message::new(0, "metamanager", "meta", Operation::Query, crate::digest::RESOURCE, &());
    let mut delivery = one_at_a_time();
    let pods = ["default/pod/a", "default/pod/b"];
    for resource in pods {
        delivery.queue(object(Operation::Update, resource, "u", 1)).expect("room");
    }
    delivery.queue(request.response(0, "OK")).expect("room");
    delivery.queue(object(Operation::Update, "default/pod/c", "u", 1)).expect("room");
    let mut written = Vec::new();
    while let Some(message) = delivery.poll_transmit(now) {
        written.push(message.route.resource.clone());
        assert_eq!(delivery.in_flight(), usize::from(ack_required(&message)));
        delivery.handle_ack(&message.header.msg_id, now);
    }
    // Pods are more urgent than the barrier once it may go; what it promises is only what came before it.
    assert_eq!(
        written,
        ["default/pod/a", "default/pod/b", "default/pod/c", crate::digest::RESOURCE]
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
        message.content =
            serde_json::value::RawValue::from_string(content.into()).expect("json").into();
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
    check("response", "skerry/certificate/n", "edgecontroller", "{\"a\":1}", false);
    check("update", "skerry/bundle/n", "edgecontroller", "{\"a\":1}", true);
    check("update", "skerry/certificate/of-a-namespace", "dynamiccontroller", "{}", true);
    check("response", "default/event/e", "edgecontroller", "\"OK\"", false);
    check("applicationResponse", "ignore/Application/ignore", "dynamiccontroller", "{}", false);
    check("createvolume", "default/volume/v", "cloudhub", "\"{}\"", false);
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
                    self.delivery.handle_ack(&parent, *now);
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
    fn nothing_is_forgotten_reversed_or_resurrected(
        steps in proptest::collection::vec(step(), 0..120),
        window in 1..5usize,
    ) {
        let mut now = Instant::now();
        let settings = Settings { window, ..Settings::stock() };
        let mut world = World { delivery: Delivery::new(settings), ..World::default() };
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
