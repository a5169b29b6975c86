//! A publisher that writes faster than anybody can take it, on ten thousand topics: other devices, mappers and the hub go on.

use crate::cloud::Cloud;
use crate::devices::{
    Client, Mosquitto, REPORTS, UPDATES, actual, confirm, device, place, twin_report,
};
use crate::{OURS, joined_with};
use serde_json::Value;
use skerry_dmi::v1beta1::device_manager_service_client::DeviceManagerServiceClient;
use skerry_protocol::Operation;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const MESSAGES_PER_SECOND: usize = 50_000;
const SECONDS: usize = 2;
const TOPICS: usize = 10_000;
/// Messages are written in parts of this length.
const TICK: Duration = Duration::from_millis(50);
/// An unoptimised agent works off the flood in less.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longest that a mapper may wait for an answer meanwhile; it gives up after 10 s.
const ANSWER_MAX: Duration = Duration::from_secs(5);

fn packet(topic: &str, payload: &str, into: &mut Vec<u8>) {
    let mut len = 2 + topic.len() + payload.len();
    into.push(0x30);
    while len >= 0x80 {
        into.push((len & 0x7f) as u8 | 0x80);
        len >>= 7;
    }
    into.push(len as u8);
    into.extend(u16::try_from(topic.len()).expect("short").to_be_bytes());
    into.extend(topic.as_bytes());
    into.extend(payload.as_bytes());
}

/// A third for devices that are not here, each on a topic of its own; a third for one that is; a third of nonsense.
async fn flood(port: u16) -> Duration {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("the broker runs");
    let connect = b"\x10\x11\x00\x04MQTT\x04\x02\x00\x00\x00\x05flood";
    stream.write_all(connect).await.expect("written");
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).await.expect("an answer");
    assert_eq!(answer[3], 0, "the broker lets everybody in");
    let per_tick = MESSAGES_PER_SECOND * TICK.as_millis() as usize / 1000;
    let start = Instant::now();
    let mut number = 0;
    for tick in 0..SECONDS * 1000 / TICK.as_millis() as usize {
        let mut bytes = Vec::new();
        for _ in 0..per_tick {
            number += 1;
            match number % 3 {
                0 => {
                    let topic = format!("$hw/events/device/x/d{}/twin/update", number % TOPICS);
                    packet(&topic, &actual("1"), &mut bytes);
                }
                1 => packet(UPDATES, &actual(&number.to_string()), &mut bytes),
                _ => packet(UPDATES, "{\"twin\":{\"t\":[", &mut bytes),
            }
        }
        stream.write_all(&bytes).await.expect("written");
        let next = start + TICK * u32::try_from(tick + 1).expect("few");
        tokio::time::sleep_until(next.into()).await;
    }
    start.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publisher_of_50000_messages_a_second_on_10000_topics_takes_nothing_down() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let broker = Mosquitto::start(dir.path());
    let mut client = Client::connect(&broker).await;
    let socket = dir.path().join("dmi.sock");
    let lines = format!("{}dmiSocket: {}\n", broker.lines(), socket.display());
    let (node, mut session) = joined_with(dir.path(), &cloud, Some(OURS), &lines).await;
    place(&mut session, 5, "").await;
    let mut pump = device(6, "");
    pump["metadata"]["name"] = "pump".into();
    let id = session.push(Operation::Update, "plant/device/pump", &pump).await;
    session.until_ack(&id).await;
    client.get().await;

    let flood = tokio::spawn(flood(broker.port));
    // A mapper of another device is answered all the while.
    let mapper = tokio::spawn(async move {
        let mut mapper = DeviceManagerServiceClient::new(skerry_dmi::connect(&socket));
        let mut slowest = Duration::ZERO;
        let end = Instant::now() + Duration::from_secs(SECONDS as u64 + 3);
        let mut number = 0;
        while Instant::now() < end {
            number += 1;
            let start = Instant::now();
            let report = twin_report("pump", &number.to_string());
            mapper.report_device_status(report).await.expect("taken");
            slowest = slowest.max(start.elapsed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        (slowest, number)
    });
    // The hub hears of both devices, the last values in the end.
    let took = flood.await.expect("it ends");
    let (slowest, last_of_pump) = mapper.await.expect("it ends");
    assert!(slowest < ANSWER_MAX, "a mapper waited for {slowest:?}");
    client.publish(UPDATES, &actual("last")).await;
    let (mut boiler, mut pump) = (String::new(), String::new());
    let both = async {
        while boiler != "last" || pump != last_of_pump.to_string() {
            let report = session.next_of(Operation::Update, "device/plant/").await;
            confirm(&mut session, &report).await;
            let content: Value = report.content_as().expect("JSON");
            let value = content["twin"]["t"]["actual"]["value"].as_str();
            let value = value.unwrap_or_default().to_owned();
            match report.route.resource.as_str() {
                REPORTS => boiler = value,
                resource if resource.contains("/pump/") => pump = value,
                _ => {}
            }
        }
    };
    let settled = tokio::time::timeout(PATIENCE, both).await;
    assert!(
        settled.is_ok(),
        "boiler `{boiler}`, pump `{pump}` of {last_of_pump}; written in {took:?}"
    );
    node.stop().await;
}
