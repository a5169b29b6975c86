//! A mapper in virtual time: a driver and an EdgeCore that answer as each test says.

use serde_json::json;

use super::*;

struct World {
    core: Core,
    start: Instant,
    now: Instant,
    /// What EdgeCore was told: seconds, device, property, value, observed desired.
    told: Vec<(u64, String, String, String, String)>,
    states: Vec<(u64, String, &'static str)>,
    calls: usize,
    reads: Vec<(u64, Vec<String>)>,
    writes: Vec<(u64, String, String)>,
    opened: Vec<u64>,
    notes: Vec<String>,
    /// What the devices say.
    value: fn(&str, u64) -> Result<Value, DriverError>,
    write: fn(&str, u64) -> Result<(), DriverError>,
    edge: fn(u64) -> Result<(), ReportFault>,
    pushed: BTreeSet<String>,
}

fn number(_: &str, second: u64) -> Result<Value, DriverError> {
    Ok(Value::Integer(second as i64))
}

impl World {
    fn new(reports_per_second: f64) -> Self {
        let start = Instant::now();
        Self {
            core: Core::new(reports_per_second, start),
            start,
            now: start,
            told: Vec::new(),
            states: Vec::new(),
            calls: 0,
            reads: Vec::new(),
            writes: Vec::new(),
            opened: Vec::new(),
            notes: Vec::new(),
            value: number,
            write: |_, _| Ok(()),
            edge: |_| Ok(()),
            pushed: BTreeSet::new(),
        }
    }

    fn second(&self) -> u64 {
        (self.now - self.start).as_secs()
    }

    fn handle(&mut self, input: Input) {
        self.core.handle(input, self.now);
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(output) = self.core.poll_output() {
            let second = self.second();
            let answer = match output {
                Output::Open { device, generation } => {
                    self.opened.push(second);
                    let result = match (self.value)("", second) {
                        Err(error @ DriverError::Lost(_)) => Err(error),
                        _ => Ok(self.pushed.clone()),
                    };
                    Input::Opened { device: device.id.clone(), generation, result }
                }
                Output::Read { device, generation, properties } => {
                    self.reads.push((second, properties.clone()));
                    let value = |name: String| ((name.clone()), (self.value)(&name, second));
                    let values = properties.into_iter().map(value).collect();
                    Input::Read { device, generation, values }
                }
                Output::Write { device, generation, property, value, desired } => {
                    self.writes.push((second, property.clone(), value.to_string()));
                    let result = (self.write)(&property, second);
                    Input::Wrote { device, generation, property, desired, result }
                }
                Output::Report { device, twins } => {
                    self.calls += 1;
                    let result = (self.edge)(second);
                    if result.is_ok() {
                        let told = |twin: Sample| {
                            let value = twin.value.to_string();
                            (
                                second,
                                device.name.clone(),
                                twin.property,
                                value,
                                twin.observed_desired,
                            )
                        };
                        self.told.extend(twins.into_iter().map(told));
                    }
                    Input::Reported { device, result }
                }
                Output::ReportState { device, state } => {
                    self.calls += 1;
                    let result = (self.edge)(second);
                    if result.is_ok() {
                        self.states.push((second, device.name.clone(), state.word()));
                    }
                    Input::StateReported { device, result }
                }
                Output::Note { text, .. } => {
                    self.notes.push(text);
                    continue;
                }
                Output::Close { .. } | Output::Change { .. } => continue,
            };
            self.core.handle(answer, self.now);
        }
    }

    /// Lets the time pass, from one timeout to the next.
    fn run_to(&mut self, second: u64) {
        let end = self.start + Duration::from_secs(second);
        let mut turns = 0;
        while let Some(at) = self.core.poll_timeout().filter(|at| *at < end) {
            turns += 1;
            assert!(turns < 1_000_000, "the core asks for a turn again and again");
            self.now = self.now.max(at);
            self.handle(Input::Tick);
        }
        self.now = end;
    }

    fn register(&mut self, devices: Vec<dmi::Device>) {
        self.handle(Input::Registered { models: vec![model()], devices });
    }
}

fn model() -> dmi::DeviceModel {
    let property = |name: &str, kind: &str, access: &str, maximum: &str| dmi::ModelProperty {
        name: name.to_owned(),
        r#type: kind.to_owned(),
        access_mode: access.to_owned(),
        maximum: maximum.to_owned(),
        ..Default::default()
    };
    let properties =
        vec![property("t", "FLOAT", "ReadOnly", ""), property("set", "INT", "ReadWrite", "10")];
    dmi::DeviceModel {
        name: "fridge".to_owned(),
        namespace: "site-a".to_owned(),
        spec: Some(dmi::DeviceModelSpec { properties }),
    }
}

/// A device with the properties that are named; cycles in ms.
fn device(name: &str, properties: &[(&str, i64, &str)]) -> dmi::Device {
    let property = |(name, cycle, desired): &(&str, i64, &str)| dmi::DeviceProperty {
        name: (*name).to_owned(),
        collect_cycle: *cycle,
        report_to_cloud: true,
        desired: Some(dmi::TwinProperty { value: (*desired).to_owned(), ..Default::default() }),
        ..Default::default()
    };
    let spec = dmi::DeviceSpec {
        device_model_reference: "fridge".to_owned(),
        properties: properties.iter().map(property).collect(),
        ..Default::default()
    };
    dmi::Device {
        name: name.to_owned(),
        namespace: "site-a".to_owned(),
        spec: Some(spec),
        ..Default::default()
    }
}

fn with_visitors(mut device: dmi::Device, visitors: serde_json::Value) -> dmi::Device {
    let map = skerry_dmi::box_map(visitors.as_object().expect("a map"));
    for property in &mut device.spec.get_or_insert_default().properties {
        property.visitors =
            Some(dmi::VisitorConfig { config_data: Some(map.clone()), ..Default::default() });
    }
    device
}

fn id(name: &str) -> DeviceId {
    DeviceId::new("site-a", name)
}

#[test]
fn a_property_is_read_once_per_cycle_and_reported_as_often() {
    let mut world = World::new(100.0);
    world.register(vec![device("one", &[("t", 2000, "")])]);
    world.run_to(10);
    let seconds: Vec<_> = world.reads.iter().map(|(second, _)| *second).collect();
    assert_eq!(seconds, [0, 2, 4, 6, 8]);
    let told: Vec<_> = world.told.iter().map(|told| (told.0, told.3.as_str())).collect();
    assert_eq!(told, [(0, "0"), (2, "2"), (4, "4"), (6, "6"), (8, "8")]);
    assert_eq!(world.states, [(0, "one".to_owned(), "online")]);
}

#[test]
fn properties_that_are_due_together_are_one_read_and_one_report() {
    let mut world = World::new(100.0);
    world.register(vec![device("one", &[("t", 1000, ""), ("set", 2000, "")])]);
    world.run_to(4);
    let counts: Vec<_> = world.reads.iter().map(|(_, names)| names.len()).collect();
    assert_eq!(counts, [2, 1, 2, 1]);
    // One for the state.
    assert_eq!(world.calls, 5);
}

#[test]
fn a_hundred_devices_share_one_call_per_second_and_none_is_forgotten() {
    let mut world = World::new(1.0);
    let devices =
        (0..100).map(|n| device(&format!("d{n:02}"), &[("t", 1000, ""), ("set", 1000, "")]));
    world.register(devices.collect());
    world.run_to(400);
    assert!(world.calls <= 405, "{} calls in 400 s", world.calls);
    let mut last: BTreeMap<&str, u64> = BTreeMap::new();
    for told in &world.told {
        last.insert(&told.1, told.0);
    }
    assert_eq!(last.len(), 100);
    assert!(last.values().all(|second| *second >= 290), "{last:?}");
    // What was told is what was newest then.
    assert!(
        world.told.iter().all(|told| told.3.parse::<u64>().is_ok_and(|value| told.0 - value <= 1))
    );
    assert!(world.core.counts().replaced > 0);
}

#[test]
fn too_many_requests_pause_all_reports_and_the_newest_value_is_told_afterwards() {
    let mut world = World::new(1.0);
    world.edge = |second| if second < 30 { Err(ReportFault::Busy) } else { Ok(()) };
    world.register(vec![device("one", &[("t", 1000, "")])]);
    world.run_to(120);
    let refused = world.calls - world.told.len() - world.states.len();
    assert!(refused <= 5, "{refused} calls in 30 s of refusals");
    assert!(world.told[0].3.parse::<u64>().unwrap() >= 29, "{:?}", world.told[0]);
}

#[test]
fn a_desired_value_is_written_once_and_told_when_the_device_took_it() {
    let mut world = World::new(100.0);
    world.write = |_, second| {
        if second < 2 { Err(DriverError::Refused("not now".to_owned())) } else { Ok(()) }
    };
    world.register(vec![device("one", &[("set", 1000, "7")])]);
    world.run_to(20);
    let writes: Vec<_> = world.writes.iter().map(|write| write.0).collect();
    assert_eq!(
        writes,
        [0, 1, 3],
        "two refusals with pauses of 1 and 2 s, then the value was taken"
    );
    let observed = |told: &&(u64, String, String, String, String)| told.4 == "7";
    assert_eq!(world.told.iter().find(observed).map(|told| told.0), Some(3));
    assert!(world.told.iter().filter(|told| told.0 > 3).all(|told| told.4 == "7"));
}

#[test]
fn another_wish_is_written_without_opening_the_device_again() {
    let mut world = World::new(100.0);
    world.register(vec![device("one", &[("set", 1000, "7")])]);
    world.run_to(5);
    world.handle(Input::PutDevice(device("one", &[("set", 1000, "8")])));
    world.handle(Input::PutDevice(device("one", &[("set", 1000, "8")])));
    world.run_to(10);
    let values: Vec<_> = world.writes.iter().map(|write| write.2.as_str()).collect();
    assert_eq!(values, ["7", "8"]);
    assert_eq!(world.opened, [0]);
    assert_eq!(world.told.last().map(|told| told.4.as_str()), Some("8"));
}

#[test]
fn wishes_that_cannot_be_are_said_and_not_written() {
    let mut world = World::new(100.0);
    world.register(vec![
        device("high", &[("set", 1000, "11")]),
        device("text", &[("set", 1000, "warm")]),
        device("fixed", &[("t", 1000, "1")]),
    ]);
    world.run_to(10);
    assert_eq!(world.writes, []);
    for part in ["more than the maximum 10", "`warm` is no int", "cannot be written"] {
        assert_eq!(world.notes.iter().filter(|note| note.contains(part)).count(), 1, "{part}");
    }
    assert!(world.told.iter().all(|told| told.4.is_empty()));
}

#[test]
fn a_device_that_goes_away_is_offline_and_opened_again_with_growing_pauses() {
    let mut world = World::new(100.0);
    world.value = |name, second| match second {
        10..100 => Err(DriverError::Lost("gone".to_owned())),
        _ => number(name, second),
    };
    world.register(vec![device("one", &[("t", 1000, "")])]);
    world.run_to(200);
    let words: Vec<_> = world.states.iter().map(|(_, _, word)| *word).collect();
    assert_eq!(words, ["online", "offline", "online"]);
    assert_eq!(world.states[1].0, 10);
    let pauses: Vec<_> = world.opened.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(pauses, [11, 2, 4, 8, 16, 32, 60]);
}

#[test]
fn one_property_that_cannot_be_read_makes_the_device_unhealthy_and_is_said_once() {
    let mut world = World::new(100.0);
    world.value = |name, second| match (name, second) {
        ("set", 0..10) => Err(DriverError::Refused("illegal address".to_owned())),
        _ => number(name, second),
    };
    world.register(vec![device("one", &[("t", 1000, ""), ("set", 1000, "")])]);
    world.run_to(20);
    let words: Vec<_> = world.states.iter().map(|(second, _, word)| (*second, *word)).collect();
    assert_eq!(words, [(0, "unhealthy"), (10, "online")]);
    assert_eq!(world.notes.iter().filter(|note| note.contains("illegal address")).count(), 1);
    assert!(world.told.iter().any(|told| told.2 == "t" && told.0 < 10));
}

#[test]
fn a_value_of_the_wrong_type_is_not_told() {
    let mut world = World::new(100.0);
    world.value = |_, _| Ok(Value::Text("warm".to_owned()));
    world.register(vec![device("one", &[("set", 1000, "")])]);
    world.run_to(5);
    assert_eq!(world.told, []);
    assert_eq!(world.states.last().map(|state| state.2), Some("unhealthy"));
}

#[test]
fn a_new_edgecore_is_told_everything_again_and_what_it_does_not_name_is_gone() {
    let mut world = World::new(100.0);
    let (one, two) = (device("one", &[("t", 60_000, "")]), device("two", &[("t", 60_000, "")]));
    world.register(vec![one.clone(), two]);
    world.run_to(10);
    world.handle(Input::EdgeCoreLost);
    world.told.clear();
    world.states.clear();
    world.register(vec![one]);
    world.run_to(20);
    assert_eq!(world.told.iter().map(|told| told.1.as_str()).collect::<Vec<_>>(), ["one"]);
    assert_eq!(world.states, [(10, "one".to_owned(), "online")]);
    assert_eq!(world.opened, [0, 0], "the driver that is open stays");
    assert_eq!(world.core.device(&id("two")), None);
}

#[test]
fn while_edgecore_is_away_nothing_is_told_and_the_newest_value_waits() {
    let mut world = World::new(100.0);
    world.edge = |second| if (5..8).contains(&second) { Err(ReportFault::Away) } else { Ok(()) };
    world.register(vec![device("one", &[("t", 1000, "")])]);
    world.run_to(30);
    assert_eq!(world.calls, 7, "the state, five values, and the one that found nobody");
    world.told.clear();
    world.register(vec![device("one", &[("t", 1000, "")])]);
    world.run_to(31);
    assert_eq!(world.told[0].3, "30");
}

#[test]
fn a_device_waits_for_its_model_and_changes_with_it() {
    let mut world = World::new(100.0);
    world.handle(Input::Registered {
        models: Vec::new(),
        devices: vec![device("one", &[("set", 1000, "7")])],
    });
    world.run_to(5);
    assert!(world.opened.is_empty());
    assert!(world.core.device(&id("one")).is_some());
    world.handle(Input::PutModel(model()));
    world.run_to(10);
    assert_eq!((world.opened.as_slice(), world.writes.len()), ([5].as_slice(), 1));
    let mut other = model();
    other.spec.get_or_insert_default().properties[1].access_mode = "ReadOnly".to_owned();
    world.handle(Input::PutModel(other));
    world.run_to(15);
    assert_eq!(world.opened, [5, 10]);
}

#[test]
fn other_settings_open_the_device_again_and_old_answers_change_nothing() {
    let mut world = World::new(100.0);
    let (first, second) = (json!({"register": 1}), json!({"register": 2}));
    world.register(vec![with_visitors(device("one", &[("t", 1000, "")]), first)]);
    world.run_to(5);
    world.handle(Input::PutDevice(with_visitors(device("one", &[("t", 1000, "")]), second)));
    world.run_to(10);
    assert_eq!(world.opened, [0, 5]);
    let told = world.told.len();
    let values = vec![("t".to_owned(), Ok(Value::Float(99.0)))];
    world.handle(Input::Read { device: id("one"), generation: 1, values });
    world.run_to(11);
    assert!(world.told[told..].iter().all(|told| told.3 != "99"));
}

#[test]
fn small_changes_inside_the_deadband_are_not_told() {
    let mut world = World::new(100.0);
    world.value = |_, second| Ok(Value::Float(second as f64 * 0.1));
    world.register(vec![with_visitors(
        device("one", &[("t", 1000, "")]),
        json!({"deadband": 0.45}),
    )]);
    world.run_to(12);
    let told: Vec<_> = world.told.iter().map(|told| told.0).collect();
    assert_eq!(told, [0, 5, 10]);
}

#[test]
fn a_value_that_stays_the_same_is_told_every_ten_minutes_on_change() {
    let mut world = World::new(100.0);
    world.value = |_, _| Ok(Value::Integer(4));
    let device =
        with_visitors(device("one", &[("set", 1000, "")]), json!({"reportOnChange": true}));
    world.register(vec![device]);
    world.run_to(1300);
    let told: Vec<_> = world.told.iter().map(|told| told.0).collect();
    assert_eq!(told, [0, 600, 1200]);
}

#[test]
fn what_is_pushed_is_told_and_never_read() {
    let mut world = World::new(100.0);
    world.pushed.insert("t".to_owned());
    world.register(vec![device("one", &[("t", 1000, "")])]);
    world.run_to(3);
    assert_eq!(world.states, [(0, "one".to_owned(), "online")]);
    for count in 0..10 {
        let values = [("t".to_owned(), Ok(Value::Integer(count)))].into_iter().collect();
        world.handle(Input::Pushed { device: id("one"), generation: 1, values, present: None });
    }
    world.run_to(10);
    assert_eq!(world.reads, []);
    let told: Vec<_> = world.told.iter().map(|told| (told.0, told.3.as_str())).collect();
    assert_eq!(
        told,
        [(3, "0"), (4, "9")],
        "the report cycle keeps a device that speaks too fast in check"
    );
}

#[test]
fn a_device_that_says_it_has_left_is_offline_until_it_says_it_is_back() {
    let mut world = World::new(100.0);
    world.pushed.insert("t".to_owned());
    world.register(vec![device("one", &[("t", 1000, "")])]);
    let push = |world: &mut World, value: Option<i64>, present| {
        let value = value.map(|value| ("t".to_owned(), Ok(Value::Integer(value))));
        let values = value.into_iter().collect();
        world.handle(Input::Pushed { device: id("one"), generation: 1, values, present });
        let second = world.second();
        world.run_to(second + 5);
    };
    push(&mut world, Some(1), None);
    push(&mut world, None, Some(false));
    // What was still on the way changes nothing.
    push(&mut world, Some(2), None);
    push(&mut world, None, Some(true));
    let words: Vec<_> = world.states.iter().map(|state| state.2).collect();
    assert_eq!(words, ["online", "offline", "online"]);
    assert_eq!(world.opened, [0]);
}

#[test]
fn a_device_that_edgecore_refuses_is_left_alone_for_longer_and_longer() {
    let mut world = World::new(100.0);
    world.edge = |_| Err(ReportFault::Refused("unknown device".to_owned()));
    world.register(vec![device("one", &[("t", 1000, "")])]);
    world.run_to(600);
    assert!((5..12).contains(&world.calls), "{} calls", world.calls);
}

#[test]
fn a_device_with_very_many_properties_is_told_in_parts() {
    let mut world = World::new(100.0);
    let names: Vec<String> = (0..1_000).map(|n| format!("p{n}")).collect();
    let properties: Vec<_> = names.iter().map(|name| (name.as_str(), 60_000, "")).collect();
    world.register(vec![device("wide", &properties)]);
    world.run_to(10);
    assert_eq!(world.told.len(), 1_000);
    assert_eq!(world.calls, 3, "the state and two halves");
}

#[test]
fn there_is_room_for_so_many_devices_and_no_more() {
    let mut world = World::new(100_000.0);
    world.handle(Input::PutModel(model()));
    for n in 0..DEVICES_MAX + 3 {
        world.handle(Input::PutDevice(device(&format!("d{n}"), &[])));
    }
    let counts = world.core.counts();
    assert_eq!((counts.devices, counts.refused), (DEVICES_MAX, 3));
    world.handle(Input::RemoveDevice(id("d0")));
    world.handle(Input::PutDevice(device("late", &[])));
    assert_eq!(world.core.counts().devices, DEVICES_MAX);
}

#[test]
fn a_device_is_answered_with_its_newest_values() {
    let mut world = World::new(100.0);
    world.register(vec![device("one", &[("set", 1000, "7")])]);
    world.run_to(3);
    let twins = world.core.device(&id("one")).unwrap().status.unwrap().twins;
    assert_eq!(twins.len(), 1);
    assert_eq!(twins[0].reported.as_ref().unwrap().value, "2");
    assert_eq!(twins[0].observed_desired.as_ref().unwrap().value, "7");
}
