//! The MQTT mapper against mosquitto.

use std::time::Duration;

use rumqttc::{AsyncClient, Event, MqttOptions, Packet, QoS};
use serde_json::json;
use tokio::sync::mpsc;

use crate::edgecore::{World, device, model};
use crate::foreign;

const PROGRAM: &str = env!("CARGO_BIN_EXE_skerry-mapper-mqtt");

/// A client that plays the device: publishes, and hands over what it hears on `cmd/#`.
fn play(port: u16) -> (AsyncClient, mpsc::UnboundedReceiver<(String, String)>) {
    let mut options = MqttOptions::new("device", "127.0.0.1", port);
    options.set_keep_alive(Duration::from_secs(30));
    let (client, mut events) = AsyncClient::new(options, 1024);
    let (heard, hears) = mpsc::unbounded_channel();
    let subscriber = client.clone();
    tokio::spawn(async move {
        loop {
            match events.poll().await {
                Ok(Event::Incoming(Packet::ConnAck(_))) => {
                    subscriber.try_subscribe("cmd/#", QoS::AtLeastOnce).unwrap();
                }
                Ok(Event::Incoming(Packet::Publish(message))) => {
                    let payload = String::from_utf8_lossy(&message.payload).into_owned();
                    if heard.send((message.topic, payload)).is_err() {
                        return;
                    }
                }
                Ok(_) => {}
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    });
    (client, hears)
}

async fn say(client: &AsyncClient, topic: &str, payload: &str) {
    // Retained: the device spoke before the mapper came.
    client.publish(topic, QoS::AtLeastOnce, true, payload).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mqtt_device_is_heard_and_told_and_comes_back_after_the_broker_was_away() {
    let directory = tempfile::tempdir().unwrap();
    let port = foreign::free_port();
    let broker = foreign::mosquitto(directory.path(), port);
    let (client, mut hears) = play(port);
    let model = model(&[
        ("open", "BOOLEAN", "ReadOnly"),
        ("temperature", "FLOAT", "ReadOnly"),
        ("light", "BOOLEAN", "ReadWrite"),
    ]);
    let door = device(
        "door",
        json!({"host": "127.0.0.1", "port": port, "availabilityTopic": "door/up"}),
        &[
            ("open", "", json!({"topic": "door/state", "path": "contact.open"})),
            ("temperature", "", json!({"topic": "door/state", "path": "temp"})),
            (
                "light",
                "true",
                json!({"topic": "door/light", "on": "ON", "off": "OFF", "setTopic": "cmd/light"}),
            ),
        ],
    );
    say(&client, "door/up", "online").await;
    say(&client, "door/state", r#"{"contact": {"open": false}, "temp": 4.5}"#).await;
    let world = World::start(PROGRAM, vec![door], model);
    world.until_reported("door", "open", "false").await;
    world.until_reported("door", "temperature", "4.5").await;
    world.until_state("door", "online").await;

    // The desired value reaches the device once, as its own word; what it answers is reported.
    assert_eq!(hears.recv().await.unwrap(), ("cmd/light".to_owned(), "ON".to_owned()));
    say(&client, "door/light", "ON").await;
    world.until_reported("door", "light", "true").await;
    world
        .until("the desired value is told as observed", |told| {
            told.twins
                .get(&("door".to_owned(), "light".to_owned()))
                .is_some_and(|twin| twin.1 == "true")
        })
        .await;

    // Broken payloads spoil the properties, and only until the next good one.
    for broken in ["{", "null", r#"{"contact": 7}"#, "\u{0}"] {
        say(&client, "door/state", broken).await;
    }
    world.until_state("door", "unhealthy").await;
    say(&client, "door/state", r#"{"contact": {"open": true}, "temp": "5"}"#).await;
    world.until_reported("door", "open", "true").await;
    world.until_state("door", "online").await;

    drop(broker);
    world.until_state("door", "offline").await;
    let _broker = foreign::mosquitto(directory.path(), port);
    say(&client, "door/state", r#"{"contact": {"open": false}, "temp": 6}"#).await;
    world.until_reported("door", "temperature", "6").await;
    world.until_state("door", "online").await;
    say(&client, "door/up", "offline").await;
    world.until_state("door", "offline").await;
    say(&client, "door/up", "online").await;
    world.until_state("door", "online").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mqtt_publisher_that_is_too_fast_costs_few_reports_and_the_last_value_is_right() {
    let directory = tempfile::tempdir().unwrap();
    let port = foreign::free_port();
    let _broker = foreign::mosquitto(directory.path(), port);
    let (client, _hears) = play(port);
    let model = model(&[("count", "INT", "ReadOnly")]);
    let settings = json!({"host": "127.0.0.1", "port": port});
    let counter = device("counter", settings, &[("count", "", json!({"topic": "count"}))]);
    let world = World::start(PROGRAM, vec![counter], model);
    world.until_state("counter", "online").await;
    let start = std::time::Instant::now();
    for count in 0..20_000 {
        client.publish("count", QoS::AtMostOnce, false, count.to_string()).await.unwrap();
    }
    client.publish("count", QoS::AtLeastOnce, false, "20000").await.unwrap();
    world.until_reported("counter", "count", "20000").await;
    // The property's cycle is 100 ms.
    let most = 5 + start.elapsed().as_millis() as usize / 100;
    let calls = world.told().calls;
    assert!(calls <= most, "{calls} calls in {:?}", start.elapsed());
}
