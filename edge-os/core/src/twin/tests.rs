//! The twin between a hub, a broker, mappers and a disk that are played here, with virtual time.

use super::mapper::{Object, Tell};
use super::*;
use crate::backoff::Random;
use jiff::Timestamp;
use proptest::prelude::*;
use std::collections::HashMap;

const NODE: &str = "edge1";
const ID: &str = "plant/boiler";

/// The world around one twin.
struct World {
    twin: Twin,
    now: Now,
    /// Rows as they are on the disk.
    devices: BTreeMap<String, DeviceRow>,
    infos: BTreeMap<String, Info>,
    knows: BTreeMap<(String, Object), String>,
    disk_works: bool,
    objects: BTreeMap<String, Value>,
    published: Vec<(String, Value)>,
    ignored: Vec<String>,
    reported: Vec<(Id, Vec<(String, String, i64)>)>,
}

impl World {
    fn new() -> Self {
        let wall = Timestamp::from_millisecond(1_787_217_243_120).expect("a time");
        Self {
            twin: Twin::restore(NODE, Kept::default(), REPORT_INTERVAL),
            now: Now { mono: Instant::now(), wall },
            devices: BTreeMap::new(),
            infos: BTreeMap::new(),
            knows: BTreeMap::new(),
            disk_works: true,
            objects: BTreeMap::new(),
            published: Vec::new(),
            ignored: Vec::new(),
            reported: Vec::new(),
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now.mono += time;
        self.now.wall += jiff::SignedDuration::try_from(time).expect("short");
    }

    fn give(&mut self, input: Input) {
        self.twin.handle(self.now, input);
        self.settle();
    }

    fn object(&mut self, path: &str, object: Value) {
        self.objects.insert(path.into(), object.clone());
        self.give(Input::Object { path: path.parse().expect("a path"), object });
    }

    fn remove(&mut self, path: &str) {
        self.objects.remove(path);
        self.give(Input::Gone(path.parse().expect("a path")));
    }

    fn mqtt(&mut self, topic: &str, payload: &str) {
        let payload = payload.as_bytes().to_vec();
        self.give(Input::Mqtt { topic: format!("$hw/events/{topic}"), payload });
    }

    fn report(&mut self, id: &str, name: &str, value: &str) {
        let twin =
            Reported { name: name.into(), actual: Some(value.into()), ..Reported::default() };
        self.twin.report_twins(self.now, id, vec![twin]).expect("taken");
        self.settle();
    }

    fn settle(&mut self) {
        while let Some(output) = self.twin.poll_output() {
            match output {
                Output::Publish { topic, payload, .. } => {
                    let payload = serde_json::from_slice(&payload).expect("JSON");
                    self.published.push((topic, payload));
                }
                Output::Ignored { what, reason } => self.ignored.push(format!("{what}: {reason}")),
                Output::Upload { topic, .. } => self.published.push((topic, Value::Null)),
                Output::Reported { id, values } => self.reported.push((id, values)),
            }
        }
        self.store(false);
    }

    fn store(&mut self, all: bool) {
        loop {
            let writes = self.twin.take_changes(self.now.mono, all);
            if writes.is_empty() {
                return;
            }
            if self.disk_works {
                writes.into_iter().for_each(|write| self.write(write));
            }
            self.twin.handle_stored(self.now.mono, self.disk_works);
            if !self.disk_works {
                return;
            }
        }
    }

    fn write(&mut self, write: Write) {
        match write {
            // As the database has it: through JSON.
            Write::Device(id, row) => {
                let text = serde_json::to_string(&row).expect("JSON");
                self.devices.insert(id.to_string(), serde_json::from_str(&text).expect("JSON"));
            }
            Write::Forget(id) => drop(self.devices.remove(&*id)),
            Write::Mapper(mapper::Change::Mapper(info)) => {
                self.knows.retain(|(protocol, _), _| *protocol != info.protocol);
                self.infos.insert(info.protocol.clone(), info);
            }
            Write::Mapper(mapper::Change::Knows { protocol, of, digest }) => match digest {
                Some(digest) => drop(self.knows.insert((protocol, of), digest)),
                None => drop(self.knows.remove(&(protocol, of))),
            },
        }
    }

    /// Ends without a word when `crash`, and begins anew from the disk.
    fn restart(&mut self, crash: bool) {
        if !crash {
            self.store(true);
        }
        let knows = self
            .knows
            .iter()
            .map(|((of, object), digest)| (of.clone(), object.clone(), digest.clone()));
        let kept = Kept {
            devices: self.devices.clone().into_iter().collect(),
            mappers: self.infos.values().cloned().collect(),
            knows: knows.collect(),
        };
        self.twin = Twin::restore(NODE, kept, REPORT_INTERVAL);
        let objects = self.objects.clone();
        for (path, object) in objects {
            self.give(Input::Object { path: path.parse().expect("a path"), object });
        }
        self.give(Input::Restored);
    }

    fn connect(&mut self) {
        self.give(Input::Connected(Capabilities::OURS));
    }

    /// What goes up now, with everything stored that has to be before.
    fn transmit(&mut self) -> Option<Message> {
        for _ in 0..3 {
            if let Some(message) = self.twin.poll_transmit(self.now) {
                return Some(message);
            }
            self.store(false);
            self.pass(Duration::from_millis(1));
        }
        None
    }

    fn answer(&mut self, message: &Message) {
        let reply = message.response(self.now.unix_ms(), "OK");
        self.give(Input::Reply(Box::new(reply)));
    }

    fn topics(&mut self) -> Vec<String> {
        self.published.drain(..).map(|(topic, _)| topic).collect()
    }

    fn value(&self, id: &str, name: &str) -> Option<String> {
        let property = self.twin.properties(id)?.0.get(name)?;
        property.actual.as_ref().map(|side| side.value.clone())
    }
}

fn device(name: &str, version: u64, desired: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "plant", "uid": format!("uid-{name}"),
            "resourceVersion": version.to_string()},
        "spec": {"nodeName": NODE, "deviceModelRef": {"name": "m"}, "protocol": {"protocolName": "modbus"},
            "properties": [{"name": "t"}, {"name": "s", "desired": {"value": desired}}]}})
}

fn model(version: u64) -> Value {
    json!({"metadata": {"name": "m", "namespace": "plant", "uid": "uid-m"},
        "spec": {"properties": [{"name": "t", "type": "FLOAT", "unit": version.to_string()}, {"name": "s"}]}})
}

fn world_with_boiler() -> World {
    let mut world = World::new();
    world.object("plant/devicemodel/m", model(1));
    world.object("plant/device/boiler", device("boiler", 5, "4"));
    world
}

#[test]
fn a_device_is_here_when_its_object_is_and_the_broker_hears_what_it_should_be() {
    let mut world = world_with_boiler();
    let updates = "$hw/events/device/plant/boiler/twin/update";
    let document = format!("{updates}/document");
    let delta = format!("{updates}/delta");
    assert_eq!(world.published[0].0, "$hw/events/node/edge1/membership/updated");
    assert_eq!(world.published[0].1["added_devices"][0]["id"], ID);
    assert_eq!(world.published[1].0, document);
    assert_eq!(
        (&world.published[2].0, &world.published[2].1["delta"]),
        (&delta, &json!({"s": "4"}))
    );
    world.topics();
    world.object("plant/device/boiler", device("boiler", 6, "4"));
    assert!(world.topics().is_empty(), "nothing is different");
    world.object("plant/device/boiler", device("boiler", 7, "5"));
    assert_eq!(world.topics(), [document, delta]);
    world.connect();
    world.pass(REPORT_INTERVAL);
    assert_eq!(world.transmit(), None, "the hub knows what it wants");
    world.remove("plant/device/boiler");
    assert!(world.twin.is_empty() && world.devices.is_empty());
    assert_eq!(world.published.last().expect("some").1["removed_devices"][0]["id"], ID);
}

#[test]
fn a_device_of_another_node_is_taken_away() {
    let mut world = world_with_boiler();
    let mut moved = device("boiler", 9, "4");
    moved["spec"]["nodeName"] = "edge2".into();
    world.give(Input::Object {
        path: "plant/device/boiler".parse().expect("a path"),
        object: moved,
    });
    assert!(world.twin.is_empty());
    let gone = world.twin.report_twins(world.now, ID, Vec::new());
    assert_eq!(gone, Err(ReportError::Unknown(ID.into())));
}

#[test]
fn the_hub_is_told_once_per_interval_and_the_last_value_is_right() {
    let mut world = world_with_boiler();
    world.connect();
    world.report(ID, "t", "1");
    assert_eq!(world.transmit(), None);
    world.pass(REPORT_DELAY);
    let first = world.transmit().expect("a report");
    assert_eq!(first.route.resource, "device/plant/boiler/twin/edge_updated");
    let content: Value = first.content_as().expect("JSON");
    assert_eq!(content["twin"]["t"]["actual"]["value"], "1");
    let run = content["epoch"].as_str().and_then(|epoch| epoch.strip_prefix("uid-boiler/"));
    assert_eq!(run.map(str::len), Some(8));
    assert!(world.devices[ID].twins.0["t"].edge >= 1, "it is on the disk first");
    world.answer(&first);
    for value in 2..200 {
        world.report(ID, "t", &value.to_string());
        world.pass(Duration::from_millis(40));
        assert_eq!(world.transmit(), None);
    }
    world.pass(REPORT_INTERVAL);
    let second = world.transmit().expect("a report");
    let content: Value = second.content_as().expect("JSON");
    assert_eq!(content["twin"]["t"]["actual"]["value"], "199");
    world.answer(&second);
    world.pass(REPORT_INTERVAL * 10);
    world.report(ID, "t", "199");
    world.pass(REPORT_INTERVAL);
    assert_eq!(world.transmit(), None, "the same value is no news");
}

#[test]
fn what_happened_without_a_link_is_told_as_it_is_now_also_after_a_restart() {
    let mut world = world_with_boiler();
    for value in 0..50 {
        world.report(ID, "t", &value.to_string());
        world.pass(Duration::from_millis(300));
    }
    world.twin.report_state(world.now, ID, "Online").expect("taken");
    world.restart(false);
    assert_eq!(world.value(ID, "t").as_deref(), Some("49"));
    world.connect();
    let state = world.transmit().expect("the state first");
    assert_eq!(state.route.resource, "device/plant/boiler/state/update");
    assert_eq!(state.content_as::<Value>().expect("JSON")["device"]["state"], "online");
    let twins = world.transmit().expect("then the values");
    let content: Value = twins.content_as().expect("JSON");
    assert_eq!(content["twin"]["t"]["actual"]["value"], "49");
    assert_eq!(world.transmit(), None);
    // No answer came: again on the next connection, when the interval has passed.
    world.give(Input::Disconnected);
    world.connect();
    assert_eq!(world.transmit(), None);
    world.pass(REPORT_INTERVAL);
    let state = world.transmit().expect("again");
    let twins = world.transmit().expect("again");
    world.answer(&state);
    world.answer(&twins);
    world.pass(REPORT_INTERVAL * 2);
    assert_eq!(world.transmit(), None);
    world.restart(false);
    world.connect();
    assert_eq!(world.transmit(), None, "what was confirmed is not told again");
}

#[test]
fn a_cloud_of_kubeedge_is_told_each_property_twice_and_asked_for_the_list_once() {
    let mut world = world_with_boiler();
    world.report(ID, "t", "1");
    world.give(Input::Connected(Capabilities::default()));
    let get = world.transmit().expect("the question");
    assert_eq!(
        (get.route.operation.as_str(), get.route.resource.as_str()),
        ("get", "membership/detail")
    );
    world.pass(REPORT_DELAY);
    let first = world.transmit().expect("a report");
    world.answer(&first);
    world.pass(REPEAT_AFTER);
    let second = world.transmit().expect("the same again");
    let edge = |message: &Message| {
        message.content_as::<Value>().expect("JSON")["twin"]["t"]["actual_version"]["edge"].as_u64()
    };
    assert_eq!(edge(&first), edge(&second), "it is the same value");
    world.answer(&second);
    world.pass(REPORT_INTERVAL * 3);
    assert_eq!(world.transmit(), None);
}

#[test]
fn a_report_that_is_refused_or_not_answered_comes_back_later_as_it_is_then() {
    let mut world = world_with_boiler();
    world.connect();
    world.report(ID, "t", "1");
    world.pass(REPORT_DELAY);
    let first = world.transmit().expect("a report");
    let refusal = first.error(0, "devicecontroller", "twin", "not now");
    world.give(Input::Reply(Box::new(refusal)));
    world.report(ID, "t", "2");
    world.pass(REPORT_INTERVAL + Duration::from_secs(5));
    let second = world.transmit().expect("again");
    assert_eq!(second.content_as::<Value>().expect("JSON")["twin"]["t"]["actual"]["value"], "2");
    world.pass(ANSWER_TIMEOUT + Duration::from_secs(1));
    world.give(Input::Tick);
    world.pass(Duration::from_secs(20));
    assert!(world.transmit().is_some(), "no answer is no confirmation");
}

#[test]
fn clients_of_the_broker_get_result_document_and_delta_in_that_order_and_errors_where_they_listen()
{
    let mut world = world_with_boiler();
    world.topics();
    world.mqtt(
        "device/plant/boiler/twin/update",
        r#"{"event_id":"7","twin":{"t":{"actual":{"value":"a b=\"ä\""}}}}"#,
    );
    let verbs: Vec<_> = world.published.iter().map(|(topic, _)| topic.rsplit('/').next()).collect();
    assert_eq!(verbs, [Some("result"), Some("document"), Some("delta")]);
    assert_eq!(world.published[0].1["event_id"], "7");
    assert_eq!(world.published[1].1["twin"]["t"]["current"]["actual"]["value"], "a b=\"ä\"");
    world.topics();
    for (topic, payload, code) in [
        ("device/plant/boiler/twin/update", r#"{"event_id":"8","twin":null}"#, 400),
        ("device/plant/boiler/twin/update", r#"{"event_id":"8","twin":{"x y":{}}}"#, 400),
        (
            "device/plant/other/twin/update",
            r#"{"event_id":"8","twin":{"t":{"actual":{"value":"1"}}}}"#,
            404,
        ),
        ("device/plant/other/twin/get", r#"{"event_id":"8"}"#, 404),
    ] {
        world.mqtt(topic, payload);
        let (told, answer) = world.published.pop().expect("an answer");
        assert_eq!(told, format!("$hw/events/{topic}/result"));
        assert_eq!((&answer["code"], &answer["event_id"]), (&json!(code), &json!("8")));
    }
    world.mqtt("device/boiler/twin/get", "{}");
    let (topic, answer) = world.published.pop().expect("an answer");
    assert_eq!(topic, "$hw/events/device/boiler/twin/get/result", "in the form that was used");
    assert_eq!(answer["twin"]["s"]["expected"]["value"], "4");
    world.object("other/device/boiler", {
        let mut twin = device("boiler", 1, "");
        twin["metadata"]["uid"] = "u2".into();
        twin
    });
    world.mqtt("device/boiler/twin/get", "{}");
    assert_eq!(world.published.pop().expect("an answer").1["code"], 404, "two have that name");
    world.mqtt(
        "device/plant/boiler/twin/cloud_updated",
        r#"{"twin":{"t":{"expected":{"value":"9"}}}}"#,
    );
    assert!(world.ignored.last().expect("said").contains("cloud_updated"));
    world.mqtt("device/plant/boiler/state/update", r#"{"state":"OK"}"#);
    assert_eq!(world.twin.state(ID), Some("ok"));
    world.mqtt("device/plant/boiler/state/update", r#"{"state":"on fire"}"#);
    assert_eq!(world.twin.state(ID), Some("ok"));
    world.mqtt("node/edge1/membership/get", r#"{"event_id":"9"}"#);
    let (topic, list) = world.published.pop().expect("an answer");
    assert_eq!(topic, "$hw/events/node/edge1/membership/get/result");
    assert_eq!(list["devices"].as_array().map(Vec::len), Some(2));
}

#[test]
fn the_hub_may_speak_of_a_device_before_its_object_comes_and_only_the_object_decides() {
    let mut world = World::new();
    let say = |content: Value, resource: &str| {
        let update = Operation::Update;
        let message = Message::new(0, "devicecontroller", "twin", update, resource, &content);
        Input::Hub(Box::new(message))
    };
    let added = json!({"added_devices": [{"id": ID, "name": "boiler"}, {"id": "nonsense"}, {"id": null}, 7]});
    world.give(say(added, "membership"));
    assert_eq!(world.twin.len(), 1);
    world.report(ID, "t", "1");
    world.object("plant/device/boiler", device("boiler", 5, ""));
    assert_eq!(world.value(ID, "t").as_deref(), Some("1"), "it is the same device");
    world.give(say(json!({"removed_devices": [{"id": ID}]}), "membership"));
    world.give(say(json!({"devices": []}), "membership/detail"));
    assert_eq!(world.twin.len(), 1, "there is an object");
    let values = json!({"twin": {"s": {"expected": {"value": "8"}, "expected_version": {"cloud": 9, "edge": 0},
        "metadata": {"type": "string"}}, "t": {"expected": {}}, "x": null}});
    world.give(say(values, "device/plant/boiler/twin/cloud_updated"));
    let expected = world.twin.properties(ID).expect("here").0["s"].expected.clone();
    assert_eq!(expected.expect("wanted").value, "8");
    world.give(say(json!(null), "device/plant/boiler/twin/cloud_updated"));
}

#[test]
fn a_disk_that_takes_nothing_does_not_keep_the_hub_from_being_told() {
    let mut world = world_with_boiler();
    world.disk_works = false;
    world.connect();
    world.report(ID, "t", "1");
    for _ in 0..40 {
        world.pass(Duration::from_millis(100));
        world.store(false);
    }
    assert!(world.transmit().is_some());
    world.disk_works = true;
    world.pass(STORE_RETRY);
    world.store(false);
    assert_eq!(world.devices[ID].twins.0["t"].actual.as_ref().expect("stored").value, "1");
}

/// What a hub holds that takes only what is newer.
#[derive(Default)]
struct Hub {
    values: BTreeMap<(String, String), (u64, Option<String>)>,
    states: BTreeMap<String, String>,
    reported_at: HashMap<String, Instant>,
}

impl Hub {
    fn take(&mut self, now: Instant, message: &Message, connected_at: Instant) {
        let resource: Vec<&str> = message.route.resource.split('/').collect();
        let id = format!("{}/{}", resource[1], resource[2]);
        let content: Value = message.content_as().expect("JSON");
        if let Some(state) = content["device"]["state"].as_str() {
            self.states.insert(id, state.into());
            return;
        }
        if let Some(last) = self.reported_at.insert(id.clone(), now)
            && last > connected_at
        {
            assert!(now - last >= REPORT_INTERVAL - Duration::from_millis(50), "{:?}", now - last);
        }
        for (name, twin) in content["twin"].as_object().expect("a map") {
            let value = twin["actual"]["value"].as_str().map(str::to_owned);
            let edge = twin["actual_version"]["edge"].as_u64().unwrap_or(u64::MAX);
            let known = self.values.entry((id.clone(), name.clone())).or_default();
            assert!(edge >= known.0, "a number went back");
            assert!(edge > known.0 || value == known.1, "a number was given to two values");
            *known = (edge, value);
        }
    }
}

#[test]
fn in_a_thousand_worlds_the_hub_ends_up_knowing_what_is() {
    for seed in 0..1000 {
        let mut random = Random::new(seed);
        let mut world = World::new();
        let mut hub = Hub::default();
        let ids = ["plant/a", "plant/b", "plant/c"];
        world.object("plant/devicemodel/m", model(1));
        for name in ["a", "b", "c"] {
            world.object(&format!("plant/device/{name}"), device(name, 1, ""));
        }
        let (mut connected, mut connected_at) = (false, world.now.mono);
        let mut restarted_at = world.now.mono;
        for step in 0..150 {
            let id = ids[random.below(3) as usize];
            match random.below(20) {
                0..8 => {
                    let name = ["t", "s"][random.below(2) as usize];
                    world.report(id, name, &random.below(4).to_string());
                }
                8 => {
                    let state = ["online", "offline"][random.below(2) as usize];
                    world.twin.report_state(world.now, id, state).expect("taken");
                    world.settle();
                }
                9 => {
                    let payload =
                        format!(r#"{{"twin":{{"u":{{"actual":{{"value":"{step}"}}}}}}}}"#);
                    world.mqtt(&format!("device/{id}/twin/update"), &payload);
                }
                10 => {
                    connected = !connected;
                    if connected {
                        world.connect();
                        connected_at = world.now.mono;
                    } else {
                        world.give(Input::Disconnected);
                    }
                }
                11 if random.below(4) == 0 => {
                    world.restart(random.below(2) == 0);
                    (connected, restarted_at) = (false, world.now.mono);
                }
                12 => world.disk_works = !world.disk_works || random.below(2) == 0,
                _ => world.pass(Duration::from_millis(random.below(4000))),
            }
            world.store(false);
            // A broken disk forgets numbers; then only the end is looked at.
            world.disk_works = true;
            while connected && let Some(message) = world.transmit() {
                // Some get lost on the way, some answers on the way back.
                if random.below(5) > 0 {
                    hub.take(world.now.mono, &message, connected_at.max(restarted_at));
                    if random.below(5) > 0 {
                        world.answer(&message);
                    }
                }
            }
        }
        if connected {
            world.give(Input::Disconnected);
        }
        world.connect();
        connected_at = world.now.mono;
        for _ in 0..40 {
            while let Some(message) = world.transmit() {
                hub.take(world.now.mono, &message, connected_at);
                world.answer(&message);
            }
            world.pass(Duration::from_secs(1));
        }
        for id in ids {
            for (name, property) in &world.twin.properties(id).expect("here").0 {
                let value = property.actual.as_ref().map(|side| side.value.clone());
                let known = hub.values.get(&(id.to_owned(), name.clone()));
                assert_eq!(
                    known.and_then(|(_, value)| value.clone()),
                    value,
                    "seed {seed} {id} {name}"
                );
            }
            if world.twin.state(id) != Some("") {
                assert_eq!(
                    hub.states.get(id).map(String::as_str),
                    world.twin.state(id),
                    "seed {seed}"
                );
            }
        }
    }
}

/// A mapper that does what the framework of KubeEdge does.
#[derive(Default)]
struct Mapper {
    models: BTreeMap<Id, Value>,
    devices: BTreeMap<Id, Value>,
}

impl Mapper {
    fn call(&mut self, call: &Call) -> Called {
        let done = match &call.tell {
            Tell::CreateModel(model) => {
                self.models.insert(call.id.clone(), model.clone());
                true
            }
            Tell::UpdateModel(model) => {
                let known = self.models.get_mut(&call.id);
                known.map(|known| *known = model.clone()).is_some()
            }
            Tell::RemoveModel => self.models.remove(&call.id).is_some(),
            Tell::RemoveDevice => self.devices.remove(&call.id).is_some(),
            Tell::RegisterDevice(device) | Tell::UpdateDevice(device) => {
                let model: Id = format!(
                    "plant/{}",
                    device["spec"]["deviceModelRef"]["name"].as_str().unwrap_or_default()
                )
                .into();
                let known = self.models.contains_key(&model);
                let is_update = matches!(call.tell, Tell::UpdateDevice(_));
                if known && (is_update || !self.devices.contains_key(&call.id)) {
                    self.devices.insert(call.id.clone(), device.clone());
                }
                known
            }
        };
        if done { Called::Done } else { Called::Refused("no".into()) }
    }
}

fn info() -> Info {
    Info {
        name: "m".into(),
        protocol: "modbus".into(),
        address: "/tmp/m.sock".into(),
        ..Info::default()
    }
}

#[test]
fn what_a_rule_sets_reaches_the_mapper_until_it_is_taken_back() {
    let mut world = world_with_boiler();
    let mut mapper = Mapper::default();
    world.twin.register_mapper(info(), false).expect("registered");
    world.settle();
    let mut told = |world: &mut World| {
        while let Some(call) = world.twin.poll_call(world.now.mono) {
            let what = mapper.call(&call);
            let (protocol, number) = (call.protocol, call.number);
            world.give(Input::Called { protocol, number, what });
        }
        let value = &mapper.devices[ID]["spec"]["properties"][1]["desired"]["value"];
        value.as_str().expect("a text").to_owned()
    };
    let wish = |world: &mut World, property: &str, value: &str| {
        let done = world.twin.wish(world.now, ID, property, value);
        world.settle();
        done
    };
    assert_eq!(told(&mut world), "4");
    wish(&mut world, "s", "0").expect("taken");
    assert_eq!(told(&mut world), "0");
    world.restart(false);
    assert_eq!(told(&mut world), "0");
    wish(&mut world, "s", "").expect("taken");
    assert_eq!(told(&mut world), "4");
    assert!(wish(&mut world, "x", "0").expect_err("unknown").to_string().contains("`x`"));
    assert!(world.twin.wish(world.now, "plant/kettle", "s", "0").is_err());
    let mut strict = device("boiler", 6, "4");
    strict["metadata"]["annotations"] = json!({policy::ANNOTATION: r#"{"s": "hub"}"#});
    world.object("plant/device/boiler", strict);
    let refused = wish(&mut world, "s", "0").expect_err("the hub decides").to_string();
    assert!(refused.contains("the hub decides"), "{refused}");
}

#[test]
fn whoever_follows_hears_every_report_also_of_the_same_value() {
    let mut world = world_with_boiler();
    world.report(ID, "t", "1");
    assert_eq!(world.reported, [], "nobody follows");
    world.twin.follow(true);
    world.report(ID, "t", "1");
    let now_ms = world.now.unix_ms();
    let said = |value: &str| (Id::from(ID), vec![("t".to_owned(), value.to_owned(), now_ms)]);
    assert_eq!(world.reported, [said("1")]);
    let payload =
        json!({"twin": {"t": {"actual": {"value": "2"}}, "s": {"expected": {"value": "3"}}}});
    world.mqtt("device/plant/boiler/twin/update", &payload.to_string());
    assert_eq!(world.reported, [said("1"), said("2")], "a wish is no report");
}

#[test]
fn a_wish_at_the_node_reaches_the_mapper_as_the_device_says_and_outlives_a_restart() {
    const UPDATES: &str = "device/plant/boiler/twin/update";
    let wish = |value: &str| json!({"twin": {"s": {"expected": {"value": value}}}}).to_string();
    let boiler = |version, desired: &str, policy: &str| {
        let mut boiler = device("boiler", version, desired);
        boiler["metadata"]["annotations"] = json!({policy::ANNOTATION: policy});
        boiler
    };
    let mut world = World::new();
    world.object("plant/devicemodel/m", model(1));
    world.object("plant/device/boiler", boiler(5, "4", r#"{"s": "edge"}"#));
    let mut mapper = Mapper::default();
    world.twin.register_mapper(info(), false).expect("registered");
    world.settle();
    let told = |world: &mut World, mapper: &mut Mapper| {
        while let Some(call) = world.twin.poll_call(world.now.mono) {
            let what = mapper.call(&call);
            let (protocol, number) = (call.protocol, call.number);
            world.give(Input::Called { protocol, number, what });
        }
        let value = &mapper.devices[ID]["spec"]["properties"][1]["desired"]["value"];
        value.as_str().expect("a text").to_owned()
    };
    assert_eq!(told(&mut world, &mut mapper), "4");
    world.mqtt(UPDATES, &wish("5"));
    assert_eq!(told(&mut world, &mut mapper), "5");
    world.object("plant/device/boiler", boiler(6, "6", r#"{"s": "edge"}"#));
    assert_eq!(told(&mut world, &mut mapper), "5", "the edge decides");
    world.restart(false);
    assert_eq!(told(&mut world, &mut mapper), "5");
    world.mqtt(UPDATES, &wish(""));
    assert_eq!(told(&mut world, &mut mapper), "6", "taken back");
    world.mqtt(UPDATES, &wish("7"));
    world.object("plant/device/boiler", boiler(7, "6", r#"{"s": "hub"}"#));
    assert_eq!(told(&mut world, &mut mapper), "6", "the hub decides now");
    world.published.clear();
    world.mqtt(UPDATES, &wish("8"));
    let (topic, answer) = &world.published[0];
    assert_eq!(topic, &format!("$hw/events/{UPDATES}/result"));
    assert_eq!(answer["code"], 400);
    assert_eq!(told(&mut world, &mut mapper), "6");
    world.object("plant/device/boiler", boiler(8, "6", r#"{"s": "newest"}"#));
    world.mqtt(UPDATES, &wish("8"));
    assert_eq!(told(&mut world, &mut mapper), "8");
    world.object("plant/device/boiler", boiler(9, "9", r#"{"s": "newest"}"#));
    assert_eq!(told(&mut world, &mut mapper), "9");
    world.object("plant/device/boiler", boiler(10, "9", "newest"));
    assert!(world.ignored.last().is_some_and(|reason| reason.contains("local-desired")));
}

#[test]
fn a_mapper_gets_what_it_should_know_when_it_registers_and_every_change_after() {
    let mut world = world_with_boiler();
    let got = world.twin.register_mapper(info(), true).expect("registered");
    world.settle();
    assert_eq!((got.devices.len(), got.models.len()), (1, 1));
    assert_eq!(got.devices[0]["spec"]["properties"][1]["desired"]["value"], "4");
    assert_eq!(world.twin.poll_call(world.now.mono), None, "it knows everything");
    world.object("plant/device/boiler", device("boiler", 6, "5"));
    let call = world.twin.poll_call(world.now.mono).expect("a call");
    assert!(matches!(call.tell, Tell::UpdateDevice(_)));
    assert_eq!(world.twin.poll_call(world.now.mono), None, "one at a time");
    world.object("plant/device/boiler", device("boiler", 7, "6"));
    let done = |call: &Call, what| Input::Called {
        protocol: call.protocol.clone(),
        number: call.number,
        what,
    };
    world.give(done(&call, Called::Unreachable("timeout".into())));
    assert_eq!(world.twin.poll_call(world.now.mono), None, "not at once");
    world.pass(Duration::from_secs(61));
    let call = world.twin.poll_call(world.now.mono).expect("again");
    let Tell::UpdateDevice(device) = &call.tell else { panic!("{:?}", call.tell) };
    assert_eq!(device["spec"]["properties"][1]["desired"]["value"], "6", "the newest");
    world.give(done(&call, Called::Done));
    assert_eq!(world.twin.poll_call(world.now.mono), None);
    // The mapper is away while the device goes and the agent is restarted.
    world.remove("plant/device/boiler");
    world.restart(true);
    let call = world.twin.poll_call(world.now.mono).expect("a call");
    assert_eq!((&call.tell, &*call.id), (&Tell::RemoveDevice, ID));
    world.give(done(&call, Called::Refused("not known".into())));
    let call = world.twin.poll_call(world.now.mono).expect("a call");
    assert_eq!(call.tell, Tell::RemoveModel);
    world.give(done(&call, Called::Done));
    assert_eq!(world.twin.poll_call(world.now.mono), None);
    assert!(world.knows.is_empty());
    for bad in [Info { protocol: String::new(), ..info() }, Info { address: "x".into(), ..info() }]
    {
        assert!(world.twin.register_mapper(bad, true).is_err());
    }
}

#[test]
fn in_five_hundred_worlds_a_mapper_ends_up_with_what_it_should_know() {
    for seed in 0..500 {
        let mut random = Random::new(seed);
        let mut world = World::new();
        let mut mapper = Mapper::default();
        let mut calls: Vec<Call> = Vec::new();
        world.twin.register_mapper(info(), false).expect("registered");
        world.settle();
        let good = |world: &mut World, mapper: &mut Mapper, calls: &mut Vec<Call>, luck: u64| {
            if let Some(call) = world.twin.poll_call(world.now.mono) {
                assert!(calls.is_empty(), "one at a time");
                calls.push(call);
            }
            let Some(call) = calls.pop() else { return };
            // A removal is refused by a mapper that does not know the device, and for no other reason.
            let removal = matches!(call.tell, Tell::RemoveDevice | Tell::RemoveModel);
            let what = match luck {
                0 if !removal => Called::Refused("a bad day".into()),
                1 => Called::Unreachable("gone".into()),
                // Done, and the answer got lost.
                2 => {
                    mapper.call(&call);
                    Called::Unreachable("late".into())
                }
                _ => mapper.call(&call),
            };
            let (protocol, number) = (call.protocol.clone(), call.number);
            world.give(Input::Called { protocol, number, what });
        };
        for version in 1..80 {
            let name = ["a", "b", "c"][random.below(3) as usize];
            let path = format!("plant/device/{name}");
            match random.below(10) {
                0..3 => world.object(&path, device(name, version, &random.below(5).to_string())),
                3 => world.remove(&path),
                4 => world.object("plant/devicemodel/m", model(random.below(3))),
                5 => {
                    // It begins anew, and says so in one of two ways.
                    mapper = Mapper::default();
                    calls.clear();
                    let with_data = random.below(2) == 0;
                    let got = world.twin.register_mapper(info(), with_data).expect("registered");
                    let id = |object: &Value| -> Id {
                        format!("plant/{}", object["metadata"]["name"].as_str().expect("a name"))
                            .into()
                    };
                    mapper.models = got.models.into_iter().map(|one| (id(&one), one)).collect();
                    mapper.devices = got.devices.into_iter().map(|one| (id(&one), one)).collect();
                    world.settle();
                }
                6 if random.below(3) == 0 => {
                    world.restart(false);
                    calls.clear();
                }
                7 => {
                    let mut other = device(name, version, "1");
                    other["spec"]["protocol"]["protocolName"] = "ble".into();
                    world.object(&path, other);
                }
                _ => world.pass(Duration::from_secs(random.below(20))),
            }
            let luck = random.below(8);
            good(&mut world, &mut mapper, &mut calls, luck);
        }
        for _ in 0..200 {
            good(&mut world, &mut mapper, &mut calls, 9);
            world.pass(Duration::from_secs(2));
        }
        let wanted: BTreeMap<Id, Value> = world
            .objects
            .iter()
            .filter(|(path, object)| {
                path.contains("/device/")
                    && object["spec"]["protocol"]["protocolName"] == "modbus"
                    && world.objects.contains_key("plant/devicemodel/m")
            })
            .map(|(path, object)| {
                let model = &world.objects["plant/devicemodel/m"];
                (Id::from(path.replace("/device/", "/")), merge::device(object, model))
            })
            .collect();
        assert_eq!(mapper.devices, wanted, "seed {seed}");
        assert_eq!(mapper.models.is_empty(), wanted.is_empty(), "seed {seed}");
    }
}

proptest! {
    #[test]
    fn nothing_on_the_broker_panics(topic in r"(\$hw/events/(device|node)/)?[a-z/+#$]{0,24}(/(twin|state)/(update|get))?",
        payload in r#"\{"(twin|state|event_id)":(null|"x"|\[\]|\{"t":(null|1|\{"(actual|expected)":(null|\{"value":(null|"v"|3)\})\})\})\}"#) {
        let mut world = world_with_boiler();
        world.give(Input::Mqtt { topic: topic.clone(), payload: payload.clone().into_bytes() });
        world.mqtt("device/plant/boiler/twin/update", &payload);
        world.mqtt("device/plant/boiler/state/update", &payload);
        world.mqtt("device/plant/boiler/twin/get", &payload);
    }

    #[test]
    fn no_object_panics(object in r#"\{"(metadata|spec|status)":(null|1|\{"(nodeName|properties|labels|deviceModelRef)":("edge1"|null|\[(null|1|\{\})\]|\{\})\})\}"#) {
        let mut world = World::new();
        let object: Value = serde_json::from_str(&object).expect("JSON");
        world.object("plant/device/boiler", object.clone());
        world.object("plant/devicemodel/m", object);
    }
}
