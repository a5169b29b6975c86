//! The Modbus mapper against pymodbus, on TCP and on a serial line.

use serde_json::{Value, json};
use skerry_dmi::v1beta1 as dmi;

use crate::edgecore::{World, device, model};
use crate::foreign;

const PROGRAM: &str = env!("CARGO_BIN_EXE_skerry-mapper-modbus");

fn fridge_model() -> dmi::DeviceModel {
    model(&[
        ("temperature", "FLOAT", "ReadOnly"),
        ("input", "INT", "ReadOnly"),
        ("setpoint", "FLOAT", "ReadWrite"),
        ("precise", "FLOAT", "ReadWrite"),
        ("light", "BOOLEAN", "ReadWrite"),
        ("door", "BOOLEAN", "ReadOnly"),
        ("missing", "INT", "ReadOnly"),
    ])
}

fn fridge(name: &str, line: Value) -> dmi::Device {
    device(
        name,
        line,
        &[
            ("temperature", "", json!({"offset": 3, "dataType": "int16", "scale": 0.1})),
            ("input", "", json!({"register": "InputRegister", "offset": 5})),
            ("setpoint", "21.5", json!({"offset": 10, "limit": 1, "scale": 0.1})),
            ("precise", "", json!({"offset": 40})),
            ("light", "true", json!({"register": "coil", "offset": 0})),
            ("door", "", json!({"register": "discrete", "offset": 0})),
        ],
    )
}

async fn every_table_is_served(world: &World, name: &str) {
    world.until_reported(name, "temperature", "3").await;
    world.until_reported(name, "input", "50").await;
    world.until_reported(name, "precise", "4.5").await;
    world.until_reported(name, "door", "true").await;
    // What was written comes back from the device, with the desired value beside it.
    world.until_reported(name, "setpoint", "21.5").await;
    world.until_reported(name, "light", "true").await;
    let observed = |property: &str| {
        let told = world.told();
        told.twins[&(name.to_owned(), property.to_owned())].1.clone()
    };
    assert_eq!((observed("setpoint"), observed("temperature")), ("21.5".to_owned(), String::new()));
    world.until_state(name, "online").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn modbus_tcp_device_is_read_and_written_and_comes_back_after_an_outage() {
    let (server, port) = foreign::modbus(&["tcp", "0"]);
    let line = json!({"ip": "127.0.0.1", "port": port});
    let world = World::start(PROGRAM, vec![fridge("one", line)], fridge_model());
    every_table_is_served(&world, "one").await;

    drop(server);
    world.until_state("one", "offline").await;
    // Another device at the same address, with the values of a fresh one.
    let (_server, _) = foreign::modbus(&["tcp", &port]);
    world.until_state("one", "online").await;
    world.until_reported("one", "light", "false").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn modbus_devices_on_one_serial_line_take_turns_and_a_silent_one_stops_no_other() {
    let (_server, terminal) = foreign::modbus(&["serial"]);
    let line = |slave: u8| json!({"serialPort": terminal.clone(), "baudRate": 19200, "slaveID": slave, "timeoutMs": 500});
    let other =
        |name: &str, slave| device(name, line(slave), &[("input", "", json!({"offset": 0}))]);
    let devices = vec![fridge("one", line(1)), other("two", 2), other("silent", 9)];
    let world = World::start(PROGRAM, devices, fridge_model());
    every_table_is_served(&world, "one").await;
    world.until_reported("two", "input", "2222").await;
    world.until_state("silent", "offline").await;
    world.until_state("one", "online").await;
    let before = world.told().values.iter().filter(|value| value.0 == "two").count();
    world
        .until("the second device is read on", |told| {
            told.values.iter().filter(|value| value.0 == "two").count() > before + 5
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn modbus_register_that_is_not_there_spoils_only_its_property() {
    let (_server, port) = foreign::modbus(&["tcp", "0"]);
    let line = json!({"ip": "127.0.0.1", "port": port});
    let properties = [
        // The last register that there is, and the first that is not.
        ("input", "", json!({"offset": 99})),
        ("missing", "", json!({"offset": 100})),
    ];
    let mut world =
        World::start(PROGRAM, vec![device("one", line.clone(), &properties)], fridge_model());
    world.until_reported("one", "input", "990").await;
    world.until_state("one", "unhealthy").await;

    // EdgeCore hands over a device that asks for less.
    let better = device("one", line, &properties[..1]);
    let mut mapper = world.mapper();
    let request = dmi::UpdateDeviceRequest { device: Some(better) };
    mapper.update_device(request).await.unwrap();
    world.until_state("one", "online").await;
    assert!(world.stop_mapper().await);
    assert!(!world.socket().exists());
}
