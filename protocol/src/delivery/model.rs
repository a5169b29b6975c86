//! Seeded runs of [`Delivery`] beside a slow, obvious account of what is queued, in flight and acknowledged.
//!
//! A failure prints its seed; `SKERRY_SEED=<seed>` runs only that one.

use super::*;
use serde_json::json;

const SEEDS: u64 = 150;
const STEPS: usize = 300;
/// Calls after the last fault until everything has to be acknowledged.
const SETTLE_CALLS: usize = 20_000;

const KEYS: [&str; 7] = [
    "skerry/bundle/edge1",
    "default/pod/a",
    "default/pod/b",
    "default/configmap/a",
    "null/node/edge1",
    "default/device/a",
    "default/endpointslice/a",
];

#[test]
fn delivery_keeps_its_promises_in_seeded_runs() {
    let seeds = match std::env::var("SKERRY_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 0..SEEDS,
    };
    for seed in seeds {
        println!("seed {seed}");
        World::new(seed).run();
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }
}

/// What has become of a message that wants an acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Waiting,
    Flying {
        writes: u32,
        last: Instant,
    },
    Acked,
    /// Replaced before it was written, or dropped after it was given up.
    Gone,
}

struct Item {
    message: Message,
    kind: Kind,
    class: Class,
    state: State,
    /// Whether it was written at all, so that an acknowledgement may come at any time.
    written: bool,
}

struct Barrier {
    id: MessageId,
    /// Items that have to be acknowledged first.
    needs: BTreeSet<usize>,
}

struct World {
    random: Random,
    settings: Settings,
    now: Instant,
    version: u64,
    delivery: Delivery,
    items: Vec<Item>,
    /// Live items of each key in order: at most the first is in flight.
    keys: BTreeMap<&'static str, VecDeque<usize>>,
    passing: Vec<Message>,
    barriers: Vec<Barrier>,
    /// Items that an acknowledgement is expected to report.
    reported: BTreeSet<usize>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let settings = Settings {
            window: 1 + random.below(6),
            window_bytes: 400 + random.below(3000),
            retry: RETRY_INTERVAL,
            writes_max: 1 + random.below(4) as u32,
            ..Settings::ours()
        };
        Self {
            random,
            settings,
            now: Instant::now(),
            version: 0,
            delivery: Delivery::new(settings),
            items: Vec::new(),
            keys: BTreeMap::new(),
            passing: Vec::new(),
            barriers: Vec::new(),
            reported: BTreeSet::new(),
        }
    }

    fn run(mut self) {
        for _ in 0..STEPS {
            match self.random.below(20) {
                0..=4 => self.queue_object(),
                5 => self.queue_passing(),
                6 => self.queue_barrier(),
                7..=12 => {
                    self.transmit();
                }
                13..=16 => self.ack_something(),
                17 => self.delivery.handle_ack("never sent", self.now),
                18 => self.now += Duration::from_millis(self.random.below(9000) as u64),
                _ => {
                    while self.transmit() {}
                    if let Some(at) = self.delivery.poll_timeout() {
                        self.now = self.now.max(at);
                    }
                }
            }
            self.check();
        }
        for _ in 0..SETTLE_CALLS {
            if self.delivery.is_empty() {
                break;
            }
            if !self.transmit() {
                let flying: Vec<_> = self.flying().collect();
                assert!(!flying.is_empty(), "nothing is in flight and nothing leaves");
                flying.into_iter().for_each(|item| self.ack(item));
            }
            self.check();
        }
        assert!(self.delivery.is_empty(), "{} messages are left", self.delivery.len());
        assert!(self.delivery.busy.is_none(), "an idle delivery holds nothing");
        assert!(self.barriers.is_empty() && self.passing.is_empty());
        assert!(self.items.iter().all(|item| matches!(item.state, State::Acked | State::Gone)));
    }

    fn flying(&self) -> impl Iterator<Item = usize> {
        let is_flying = |index: &usize| matches!(self.items[*index].state, State::Flying { .. });
        (0..self.items.len()).filter(is_flying)
    }

    fn queue_object(&mut self) {
        let key = KEYS[self.random.below(KEYS.len())];
        self.version += 1;
        // Few uids, so that an object often follows another one of its name.
        let uid = self.random.below(3).to_string();
        let body = json!({"metadata": {"uid": uid}, "data": "x".repeat(self.random.below(1500))});
        let operation = match self.random.below(4) {
            0 => Operation::Delete,
            _ => Operation::Update,
        };
        let mut message = Message::new(0, "edgecontroller", "resource", operation, key, &body)
            .with_version(self.version.to_string());
        let kind = match (self.random.below(6), operation) {
            // Answers about pods want no acknowledgement.
            (0, Operation::Update) if !key.contains("/pod/") && !key.contains("/node/") => {
                message.header.parent_msg_id = "request".into();
                message.route.operation = "response".into();
                Kind::Answer
            }
            (_, Operation::Delete) if !key.contains("/node/") => Kind::Delete,
            _ => {
                message.route.operation = "update".into();
                Kind::Version
            }
        };
        assert!(ack_required(&message));
        let live = self.keys.entry(key).or_default();
        let index = self.items.len();
        let last = live.back().copied();
        let replaced = last.filter(|last| {
            let last = &self.items[*last];
            let same_uid = super::uid(&last.message) == uid;
            last.state == State::Waiting
                && match (last.kind, kind) {
                    (Kind::Version, Kind::Version) => true,
                    (Kind::Version | Kind::Delete, Kind::Delete) => same_uid,
                    _ => false,
                }
        });
        if let Some(replaced) = replaced {
            live.pop_back();
            self.items[replaced].state = State::Gone;
            for barrier in &mut self.barriers {
                if barrier.needs.remove(&replaced) {
                    barrier.needs.insert(index);
                }
            }
        }
        live.push_back(index);
        let class = Class::of(&message);
        self.items.push(Item {
            message: message.clone(),
            kind,
            class,
            state: State::Waiting,
            written: false,
        });
        self.delivery.queue(message).expect("there is room");
    }

    fn queue_passing(&mut self) {
        let resource =
            ["kube-node-lease/lease/edge1", "default/podpatch/a", "operations/x/y/node/z"]
                [self.random.below(3)];
        let source = if resource.contains("node/z") { "taskmanager" } else { "edgecontroller" };
        let message = Message::new(0, source, "resource", Operation::Response, resource, "OK");
        assert!(!ack_required(&message));
        self.passing.push(message.clone());
        self.delivery.queue(message).expect("there is room");
    }

    fn queue_barrier(&mut self) {
        let request =
            Message::new(0, "metamanager", "meta", Operation::Query, crate::digest::RESOURCE, &());
        let message = request.response(0, "OK");
        let needs = self.keys.values().flatten().copied().collect();
        self.barriers.push(Barrier { id: message.header.msg_id.clone(), needs });
        self.delivery.queue(message).expect("there is room");
    }

    /// Lets one message leave, checks that it may, and returns whether there was one.
    fn transmit(&mut self) -> bool {
        let message = self.delivery.poll_transmit(self.now);
        self.hear_events();
        let Some(message) = message else {
            self.check_nothing_is_due();
            return false;
        };
        let id = &message.header.msg_id;
        if let Some(place) = self.passing.iter().position(|passing| passing.header.msg_id == *id) {
            let passing = self.passing.remove(place);
            self.check_most_urgent(Class::of(&passing));
            let older = &self.passing[..place];
            assert!(older.iter().all(|older| Class::of(older) != Class::of(&passing)));
        } else if let Some(place) = self.barriers.iter().position(|barrier| barrier.id == *id) {
            assert_eq!(place, 0, "barriers keep their order");
            let barrier = self.barriers.remove(0);
            assert!(barrier.needs.is_empty(), "{:?} are not acknowledged", barrier.needs);
            self.check_most_urgent(Class::Node);
        } else {
            let item = self.items.iter().position(|item| item.message.header.msg_id == *id);
            self.written(item.expect("a message that was queued"));
        }
        true
    }

    fn written(&mut self, index: usize) {
        let item = &self.items[index];
        let writes = match item.state {
            State::Flying { writes, last } => {
                assert!(self.now >= last + self.settings.retry, "written again too early");
                assert!(writes < self.settings.writes_max, "written too often");
                writes + 1
            }
            State::Waiting => {
                let live = &self.keys[item.message.route.resource.as_str()];
                assert_eq!(live.front(), Some(&index), "written before an older one of its key");
                let bytes = |index: usize| self.items[index].message.len_hint();
                let flying: Vec<_> = self.flying().collect();
                let bytes: usize = flying.iter().copied().chain([index]).map(bytes).sum();
                assert!(flying.len() < self.settings.window, "more messages than the window");
                assert!(bytes <= self.settings.window_bytes || flying.is_empty(), "{bytes} bytes");
                self.check_most_urgent(item.class);
                1
            }
            state => panic!("written although it is {state:?}"),
        };
        let item = &mut self.items[index];
        item.written = true;
        item.state = State::Flying { writes, last: self.now };
    }

    /// First items of keys with nothing in flight.
    fn free(&self) -> impl Iterator<Item = &Item> {
        let heads = self.keys.values().filter_map(|live| live.front());
        heads.map(|head| &self.items[*head]).filter(|item| item.state == State::Waiting)
    }

    fn check_most_urgent(&self, class: Class) {
        let objects = self.free().map(|item| item.class).filter(|_| self.has_room());
        let passing = self.passing.iter().map(Class::of);
        if let Some(other) = objects.chain(passing).min() {
            assert!(class <= other, "{class:?} leaves before {other:?}");
        }
    }

    /// Whether the window has room for the largest message of a run, so that nothing is held back by it.
    fn has_room(&self) -> bool {
        let bytes: usize = self.flying().map(|index| self.items[index].message.len_hint()).sum();
        self.flying().count() < self.settings.window && bytes + 2100 <= self.settings.window_bytes
    }

    fn check_nothing_is_due(&self) {
        assert!(self.passing.is_empty(), "messages without acknowledgement always leave");
        let is_ready = |barrier: &Barrier| barrier.needs.is_empty();
        assert!(!self.barriers.first().is_some_and(is_ready), "the barrier is kept back");
        for index in self.flying() {
            let State::Flying { last, .. } = self.items[index].state else { continue };
            assert!(self.now < last + self.settings.retry, "a repetition is due");
        }
        if self.flying().next().is_none() || self.has_room() {
            assert!(self.free().next().is_none(), "an object is kept back");
        }
    }

    fn ack_something(&mut self) {
        let written: Vec<_> =
            (0..self.items.len()).filter(|index| self.items[*index].written).collect();
        if written.is_empty() {
            return;
        }
        // Mostly of something recent; now and then of anything that was ever written, as late ones are.
        let recent = if self.random.below(4) == 0 { written.len() } else { written.len().min(6) };
        let index = written[written.len() - 1 - self.random.below(recent)];
        for _ in 0..=self.random.below(2) {
            self.ack(index);
        }
    }

    fn ack(&mut self, index: usize) {
        let item = &mut self.items[index];
        if matches!(item.state, State::Flying { .. } | State::Waiting) {
            item.state = State::Acked;
            let live = self.keys.get_mut(item.message.route.resource.as_str()).expect("a key");
            assert_eq!(live.pop_front(), Some(index), "only the first of a key was written");
            self.barriers.iter_mut().for_each(|barrier| {
                barrier.needs.remove(&index);
            });
            self.reported.insert(index);
        }
        let id = self.items[index].message.header.msg_id.clone();
        self.delivery.handle_ack(&id, self.now);
        self.hear_events();
        assert!(self.reported.is_empty(), "an acknowledgement was not reported");
    }

    fn hear_events(&mut self) {
        while let Some(event) = self.delivery.poll_event() {
            let (Event::Delivered(message) | Event::Unanswered(message) | Event::Dropped(message)) =
                &event;
            let id = &message.header.msg_id;
            let index = self.items.iter().position(|item| item.message.header.msg_id == *id);
            let index = index.expect("a message that was queued");
            if matches!(event, Event::Delivered(_)) {
                assert!(self.reported.remove(&index), "reported twice or without a cause");
                continue;
            }
            let item = &self.items[index];
            let State::Flying { writes, last } = item.state else { panic!("{:?}", item.state) };
            assert_eq!(writes, self.settings.writes_max, "given up too early");
            assert!(self.now >= last + self.settings.retry, "given up too early");
            if matches!(event, Event::Unanswered(_)) {
                assert!(item.kind != Kind::Answer, "nobody waits for an old answer");
                self.items[index].state = State::Waiting;
                continue;
            }
            let kind = item.kind;
            let live = self.keys.get_mut(item.message.route.resource.as_str()).expect("a key");
            assert_eq!(live.pop_front(), Some(index));
            let newer = live.front().copied();
            self.items[index].state = State::Gone;
            assert!(kind == Kind::Answer || newer.is_some(), "a version is dropped for nothing");
            for barrier in &mut self.barriers {
                if barrier.needs.remove(&index)
                    && let Some(newer) = newer.filter(|_| kind != Kind::Answer)
                {
                    barrier.needs.insert(newer);
                }
            }
        }
    }

    fn check(&self) {
        let flying: Vec<_> = self.flying().collect();
        assert!(flying.len() <= self.settings.window);
        assert_eq!(self.delivery.in_flight(), flying.len());
        let bytes = |index: &usize| self.items[*index].message.len_hint();
        assert_eq!(self.delivery.in_flight_bytes(), flying.iter().map(bytes).sum::<usize>());
        let live: usize = self.keys.values().map(VecDeque::len).sum();
        let waiting = live - flying.len() + self.passing.len() + self.barriers.len();
        assert_eq!(self.delivery.backlog_len(), waiting);
        assert_eq!(self.delivery.len(), waiting + flying.len());
        assert_eq!(self.delivery.backlog_bytes() == 0, waiting == 0);
        for live in self.keys.values() {
            let flying = live.iter().skip(1).filter(|index| flying.contains(index)).count();
            assert_eq!(flying, 0, "a key has two messages in flight");
        }
        assert_eq!(self.delivery.poll_timeout().is_some(), !flying.is_empty());
    }
}
