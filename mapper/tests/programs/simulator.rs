//! The simulator, and what all mappers have in common: registration, calls of EdgeCore, restarts.

use serde_json::json;
use skerry_dmi::v1beta1 as dmi;

use crate::edgecore::{World, device, model};

const PROGRAM: &str = env!("CARGO_BIN_EXE_skerry-mapper-sim");

fn thermometer(name: &str, value: f64, desired: &str) -> dmi::Device {
    device(name, json!({}), &[("t", "", json!({"value": value})), ("set", desired, json!({}))])
}

fn thermometer_model() -> dmi::DeviceModel {
    model(&[("t", "FLOAT", "ReadOnly"), ("set", "INT", "ReadWrite")])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_come_change_and_go_as_edgecore_says() {
    let world = World::start(PROGRAM, vec![thermometer("one", 4.0, "7")], thermometer_model());
    world.until_reported("one", "t", "4").await;
    world.until_reported("one", "set", "7").await;
    let info = world.told().registrations[0].clone();
    assert_eq!(info.protocol, "test");
    assert_eq!(info.address, world.socket().as_os_str().as_encoded_bytes());

    assert!(world.http("/healthz").await.starts_with("HTTP/1.1 200"));
    let metrics = world.http("/metrics").await;
    assert!(metrics.contains("\nskerry_mapper_devices 1\n"), "{metrics}");
    assert!(metrics.contains("\nskerry_mapper_devices_online 1\n"), "{metrics}");
    assert!(metrics.contains("\nskerry_mapper_writes_total 1\n"), "{metrics}");

    let mut mapper = world.mapper();
    let request = dmi::RegisterDeviceRequest { device: Some(thermometer("two", 5.0, "")) };
    assert_eq!(mapper.register_device(request).await.unwrap().into_inner().device_name, "two");
    world.until_reported("two", "t", "5").await;

    let request = dmi::UpdateDeviceRequest { device: Some(thermometer("one", 4.0, "8")) };
    mapper.update_device(request).await.unwrap();
    world.until_reported("one", "set", "8").await;
    let request = dmi::GetDeviceRequest {
        device_name: "one".to_owned(),
        device_namespace: "site-a".to_owned(),
    };
    // A value may have been read before the write of the same value is acknowledged.
    let taken = async {
        loop {
            let known = mapper.get_device(request.clone()).await.unwrap().into_inner();
            let twins = known.device.unwrap().status.unwrap().twins;
            let set = twins.into_iter().find(|twin| twin.property_name == "set").unwrap();
            if set.observed_desired.is_some_and(|desired| desired.value == "8") {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), taken).await.expect("taken");

    let remove = dmi::RemoveDeviceRequest {
        device_name: "one".to_owned(),
        device_namespace: "site-a".to_owned(),
    };
    mapper.remove_device(remove.clone()).await.unwrap();
    mapper.remove_device(remove).await.unwrap();
    assert_eq!(mapper.get_device(request).await.unwrap_err().code(), tonic::Code::NotFound);
    let nameless = dmi::RegisterDeviceRequest { device: None };
    assert_eq!(
        mapper.register_device(nameless).await.unwrap_err().code(),
        tonic::Code::InvalidArgument
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mapper_registers_again_with_an_edgecore_that_was_restarted() {
    let mut world = World::start(PROGRAM, vec![thermometer("one", 4.0, "7")], thermometer_model());
    world.until_reported("one", "set", "7").await;
    world.set_devices(vec![thermometer("two", 5.0, "")]);
    world.restart_edgecore().await;
    world.until_reported("two", "t", "5").await;
    assert!(!world.told().registrations.is_empty());
    let mut mapper = world.mapper();
    let request = dmi::GetDeviceRequest {
        device_name: "one".to_owned(),
        device_namespace: "site-a".to_owned(),
    };
    let gone = mapper.get_device(request).await.unwrap_err();
    assert_eq!(gone.code(), tonic::Code::NotFound, "what EdgeCore does not name is gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mapper_that_was_killed_comes_back_with_everything() {
    let mut world = World::start(PROGRAM, vec![thermometer("one", 4.0, "7")], thermometer_model());
    world.until_reported("one", "set", "7").await;
    world.kill_mapper();
    *world.told() = Default::default();
    world.start_mapper();
    world.until_reported("one", "set", "7").await;
    world.until_state("one", "online").await;
    assert!(world.stop_mapper().await, "ends well when it is asked to");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_are_seen_as_states_and_stop_no_other_device() {
    let lossy =
        device("lossy", json!({"seed": 3}), &[("t", "", json!({"value": 1, "dropRate": 0.5}))]);
    let wrong = device(
        "wrong",
        json!({}),
        &[("t", "", json!({"dropRate": 7})), ("set", "", json!({"value": 2}))],
    );
    let away = device(
        "away",
        json!({"outageEveryMs": 1000, "outageMs": 500}),
        &[("t", "", json!({"value": 3}))],
    );
    let devices = vec![lossy, wrong, away, thermometer("good", 4.0, "")];
    let world = World::start(PROGRAM, devices, thermometer_model());
    world.until_reported("good", "t", "4").await;
    world.until_reported("wrong", "set", "2").await;
    world.until_state("wrong", "unhealthy").await;
    for state in ["unhealthy", "online", "unhealthy"] {
        world.until_state("lossy", state).await;
    }
    for state in ["online", "offline", "online"] {
        world.until_state("away", state).await;
    }
}
