//! Devices between a played cloud, a real broker (Debian's mosquitto) and a mapper that is played over the real socket.

use crate::cloud::{Cloud, Session};
use crate::{OURS, joined_with};
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, QoS};
use serde_json::{Value, json};
use skerry_dmi::v1beta1 as dmi;
use skerry_dmi::v1beta1::device_manager_service_client::DeviceManagerServiceClient;
use skerry_dmi::v1beta1::device_mapper_service_server::{
    DeviceMapperService, DeviceMapperServiceServer,
};
use skerry_protocol::{Message, Operation, bus};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tonic::{Code, Request, Response, Status};

/// Longest wait for a state; a test that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const UPDATES: &str = "$hw/events/device/plant/boiler/twin/update";
pub(crate) const REPORTS: &str = "device/plant/boiler/twin/edge_updated";

/// A broker of its own.
pub(crate) struct Mosquitto {
    child: Option<Child>,
    config: PathBuf,
    pub(crate) port: u16,
}

impl Mosquitto {
    pub(crate) fn start(dir: &Path) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = free.local_addr().expect("bound").port();
        drop(free);
        let config = dir.join("mosquitto.conf");
        let text =
            format!("listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\n");
        std::fs::write(&config, text).expect("written");
        let mut broker = Self { child: None, config, port };
        broker.run();
        broker
    }

    fn run(&mut self) {
        let program = ["/usr/sbin/mosquitto", "/usr/bin/mosquitto", "/usr/local/sbin/mosquitto"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .expect("this test needs the Debian package `mosquitto`; `cargo xtask setup --tests` installs it");
        let child = Command::new(program)
            .arg("-c")
            .arg(&self.config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the broker starts");
        self.child = Some(child);
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("it runs");
            child.wait().expect("it ends");
        }
    }

    /// Lines for the agent's configuration.
    pub(crate) fn lines(&self) -> String {
        format!("mqtt: {{server: 'tcp://127.0.0.1:{}'}}\nreportInterval: 1\n", self.port)
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A program that talks to the broker.
pub(crate) struct Client {
    client: AsyncClient,
    heard: mpsc::UnboundedReceiver<(String, Value)>,
    task: JoinHandle<()>,
}

impl Client {
    pub(crate) async fn connect(broker: &Mosquitto) -> Self {
        let mut options = MqttOptions::new("test", "127.0.0.1", broker.port);
        options.set_max_packet_size(1 << 21, 1 << 21);
        let (client, mut events) = AsyncClient::new(options, 64);
        client.subscribe("$hw/events/#", QoS::AtLeastOnce).await.expect("queued");
        let (tell, heard) = mpsc::unbounded_channel();
        let (up, is_up) = oneshot::channel();
        // The library sends and receives only while it is asked.
        let task = tokio::spawn(async move {
            let mut up = Some(up);
            loop {
                match events.poll().await {
                    Ok(Event::Incoming(Packet::SubAck(_))) => {
                        let _ = up.take().map(|up| up.send(()));
                    }
                    Ok(Event::Incoming(Packet::Publish(message))) => {
                        let content = serde_json::from_slice(&message.payload).unwrap_or_default();
                        let _ = tell.send((message.topic, content));
                    }
                    Ok(_) => {}
                    // It may be starting, or gone.
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        });
        tokio::time::timeout(PATIENCE, is_up).await.expect("the broker runs").expect("up");
        Self { client, heard, task }
    }

    pub(crate) async fn publish(&self, topic: &str, payload: &str) {
        self.client.publish(topic, QoS::AtLeastOnce, false, payload).await.expect("queued");
    }

    /// The next message on this topic.
    async fn until(&mut self, topic: &str) -> Value {
        self.until_match(topic, |_| true).await
    }

    async fn until_match(&mut self, topic: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut seen = Vec::new();
        let search = async {
            loop {
                let (on, content) = self.heard.recv().await.expect("the task runs");
                if on == topic && wanted(&content) {
                    return content;
                }
                seen.push(on);
            }
        };
        let found = tokio::time::timeout(PATIENCE, search).await;
        found.unwrap_or_else(|_| panic!("nothing on {topic}; seen: {seen:?}"))
    }

    /// Forgets what came so far.
    fn clear(&mut self) {
        while self.heard.try_recv().is_ok() {}
    }

    /// Asks until the agent answers: it may not follow the broker yet.
    pub(crate) async fn get(&mut self) -> Value {
        for number in 0..60 {
            self.publish(
                "$hw/events/device/plant/boiler/twin/get",
                &format!(r#"{{"event_id":"g{number}"}}"#),
            )
            .await;
            let answer = self.until("$hw/events/device/plant/boiler/twin/get/result");
            if let Ok(answer) = tokio::time::timeout(Duration::from_millis(500), answer).await
                && answer.get("code").is_none()
            {
                return answer;
            }
        }
        panic!("the agent does not answer on the broker");
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) fn device(version: u64, desired: &str) -> Value {
    json!({"apiVersion": "devices.kubeedge.io/v1beta1", "kind": "Device",
        "metadata": {"name": "boiler", "namespace": "plant", "uid": "d", "resourceVersion": version.to_string()},
        "spec": {"nodeName": "edge1", "deviceModelRef": {"name": "m"}, "protocol": {"protocolName": "modbus"},
            "properties": [{"name": "t"}, {"name": "s", "desired": {"value": desired}}]}})
}

fn model() -> Value {
    json!({"metadata": {"name": "m", "namespace": "plant", "uid": "m", "resourceVersion": "1"},
        "spec": {"properties": [{"name": "t", "type": "FLOAT"}]}})
}

/// Gives the node a boiler; as a resync does, in the name of another sender than the device controller.
pub(crate) async fn place(session: &mut Session, version: u64, desired: &str) {
    for (path, object) in
        [("plant/devicemodel/m", model()), ("plant/device/boiler", device(version, desired))]
    {
        let id = session.push(Operation::Update, path, &object).await;
        session.until_ack(&id).await;
    }
}

/// Takes reports until one says this of a property, and confirms each.
async fn until_reported(session: &mut Session, name: &str, side: &str, value: &str) -> Value {
    loop {
        let report = session.until(Operation::Update, REPORTS).await;
        confirm(session, &report).await;
        let content: Value = report.content_as().expect("JSON");
        if content["twin"][name][side]["value"] == value {
            return content;
        }
    }
}

pub(crate) async fn confirm(session: &mut Session, report: &Message) {
    let mut ok = report.response(1, "OK");
    ok.route.source = "devicecontroller".into();
    ok.route.group = "twin".into();
    ok.route.resource = "twin".into();
    session.send(&ok).await;
}

pub(crate) fn actual(value: &str) -> String {
    json!({"event_id": "e", "twin": {"t": {"actual": {"value": value}}}}).to_string()
}

#[tokio::test]
async fn what_the_hub_wants_reaches_the_broker_and_what_the_broker_says_reaches_the_hub() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let mut broker = Mosquitto::start(dir.path());
    let mut client = Client::connect(&broker).await;
    let (node, mut session) = joined_with(dir.path(), &cloud, Some(OURS), &broker.lines()).await;
    place(&mut session, 5, "4").await;
    let delta = client.until(&format!("{UPDATES}/delta")).await;
    assert_eq!(delta["delta"], json!({"s": "4"}));
    client.get().await;
    client.publish(UPDATES, &actual("5.1 °C {\"x\"}")).await;
    let result = client.until(&format!("{UPDATES}/result")).await;
    assert_eq!((&result["event_id"], &result["code"]), (&json!("e"), &Value::Null));
    client.until(&format!("{UPDATES}/document")).await;
    let report = until_reported(&mut session, "t", "actual", "5.1 °C {\"x\"}").await;
    assert!(report["epoch"].as_str().is_some_and(|epoch| epoch.starts_with("d/")));

    // The broker goes, and comes back with nothing in its memory; the hub is served meanwhile.
    drop(client);
    broker.stop();
    place(&mut session, 6, "7").await;
    broker.run();
    let mut client = Client::connect(&broker).await;
    let twins = client.get().await;
    assert_eq!(twins["twin"]["s"]["expected"]["value"], "7");
    client.publish(UPDATES, &actual("6")).await;
    until_reported(&mut session, "t", "actual", "6").await;

    // The hub goes; values change, and the agent is restarted in between.
    drop(session);
    for value in 0..20 {
        client.publish(UPDATES, &actual(&value.to_string())).await;
    }
    let last = |document: &Value| document["twin"]["t"]["current"]["actual"]["value"] == "19";
    client.until_match(&format!("{UPDATES}/document"), last).await;
    client.publish("$hw/events/device/plant/boiler/state/update", r#"{"state":"online"}"#).await;
    client.until("$hw/events/device/plant/boiler/state/update/result").await;
    node.stop().await;
    let (node, mut session) = joined_with(dir.path(), &cloud, Some(OURS), &broker.lines()).await;
    let state = session.until(Operation::Update, "device/plant/boiler/state/update").await;
    confirm(&mut session, &state).await;
    assert_eq!(state.content_as::<Value>().expect("JSON")["device"]["state"], "online");
    let report = session.until(Operation::Update, REPORTS).await;
    confirm(&mut session, &report).await;
    let content: Value = report.content_as().expect("JSON");
    assert_eq!(content["twin"]["t"]["actual"]["value"], "19", "the last one, and first");

    // The device goes.
    let id = session.push(Operation::Delete, "plant/device/boiler", &device(9, "")).await;
    session.until_ack(&id).await;
    client.until("$hw/events/node/edge1/membership/updated").await;
    client.clear();
    client.publish(UPDATES, &actual("1")).await;
    assert_eq!(client.until(&format!("{UPDATES}/result")).await["code"], 404);
    node.stop().await;
}

#[tokio::test]
async fn a_flood_of_nonsense_on_the_broker_costs_nothing_but_time() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let broker = Mosquitto::start(dir.path());
    let mut client = Client::connect(&broker).await;
    let (node, mut session) = joined_with(dir.path(), &cloud, Some(OURS), &broker.lines()).await;
    place(&mut session, 5, "").await;
    client.get().await;
    let payloads = [
        "",
        "{",
        "null",
        "[]",
        r#"{"twin":null}"#,
        r#"{"twin":{"t":{"actual":{}}}}"#,
        r#"{"twin":{"t":{"actual":{"value":null},"expected":null}}}"#,
        "\u{0}\u{1}",
    ];
    for round in 0..200 {
        for verb in ["twin/update", "twin/get", "twin/cloud_updated", "state/update"] {
            let payload = payloads[round % payloads.len()];
            let topic = format!("$hw/events/device/plant/boiler/{verb}");
            client.client.try_publish(&topic, QoS::AtMostOnce, false, payload).ok();
            client.client.try_publish("x/user/data", QoS::AtMostOnce, false, payload).ok();
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    client.publish(UPDATES, &actual("8")).await;
    until_reported(&mut session, "t", "actual", "8").await;
    node.stop().await;
}

#[tokio::test]
async fn rules_of_the_cloud_publish_and_follow_topics_and_uploads_outlive_a_cut() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let broker = Mosquitto::start(dir.path());
    let mut client = Client::connect(&broker).await;
    let (node, mut session) = joined_with(dir.path(), &cloud, Some(OURS), &broker.lines()).await;
    place(&mut session, 5, "").await;
    client.get().await;
    session.send(&bus::publish(1, "$hw/events/of/a/rule", "{\"a\":1}")).await;
    assert_eq!(client.until("$hw/events/of/a/rule").await, json!({"a": 1}));
    session.send(&bus::follow(1, "plant/lamp", true)).await;
    session.send(&bus::follow(1, "plant/#/no/filter", true)).await;
    // The topic is followed soon.
    let upload = loop {
        client.publish("plant/lamp", "on").await;
        let next = session.until(Operation::Upload, "plant/lamp");
        if let Ok(upload) = tokio::time::timeout(Duration::from_secs(1), next).await {
            break upload;
        }
    };
    assert_eq!((upload.route.source.as_str(), upload.route.group.as_str()), ("bus", "user"));
    assert_eq!(upload.content.get(), "\"on\"");

    // It is followed after a restart too, and what comes while the hub is away is told later.
    node.stop().await;
    drop(session);
    let (node, session) = joined_with(dir.path(), &cloud, Some(OURS), &broker.lines()).await;
    drop(session);
    client.get().await;
    client.publish("plant/lamp", "off").await;
    let mut session = cloud.accept(Some(OURS)).await;
    loop {
        let upload = session.until(Operation::Upload, "plant/lamp").await;
        session.answer(&upload, &json!("OK")).await;
        if upload.content.get() == "\"off\"" {
            break;
        }
    }
    node.stop().await;
}

/// A mapper that writes down what it is told.
struct Mapper {
    told: mpsc::UnboundedSender<String>,
    /// It takes this long for everything.
    delay: Duration,
}

impl Mapper {
    fn serve(socket: &Path, delay: Duration) -> (JoinHandle<()>, mpsc::UnboundedReceiver<String>) {
        let (told, heard) = mpsc::unbounded_channel();
        let listener = skerry_dmi::bind(socket).expect("a socket");
        let service = DeviceMapperServiceServer::new(Self { told, delay });
        (tokio::spawn(skerry_dmi::serve(listener, service, std::future::pending())), heard)
    }

    async fn note(&self, text: String) {
        tokio::time::sleep(self.delay).await;
        let _ = self.told.send(text);
    }
}

fn desired(device: Option<dmi::Device>) -> String {
    let device = device.expect("a device");
    let properties = device.spec.expect("a spec").properties;
    let value = properties.into_iter().find(|property| property.name == "s");
    value.and_then(|property| property.desired).expect("a value").value
}

#[tonic::async_trait]
impl DeviceMapperService for Mapper {
    async fn register_device(
        &self,
        request: Request<dmi::RegisterDeviceRequest>,
    ) -> Result<Response<dmi::RegisterDeviceResponse>, Status> {
        self.note(format!("register {}", desired(request.into_inner().device))).await;
        Ok(Response::new(dmi::RegisterDeviceResponse::default()))
    }

    async fn remove_device(
        &self,
        request: Request<dmi::RemoveDeviceRequest>,
    ) -> Result<Response<dmi::RemoveDeviceResponse>, Status> {
        let request = request.into_inner();
        self.note(format!("remove {}/{}", request.device_namespace, request.device_name)).await;
        Ok(Response::new(dmi::RemoveDeviceResponse::default()))
    }

    async fn update_device(
        &self,
        request: Request<dmi::UpdateDeviceRequest>,
    ) -> Result<Response<dmi::UpdateDeviceResponse>, Status> {
        self.note(format!("update {}", desired(request.into_inner().device))).await;
        Ok(Response::new(dmi::UpdateDeviceResponse::default()))
    }

    async fn create_device_model(
        &self,
        _: Request<dmi::CreateDeviceModelRequest>,
    ) -> Result<Response<dmi::CreateDeviceModelResponse>, Status> {
        self.note("model".into()).await;
        Ok(Response::new(dmi::CreateDeviceModelResponse::default()))
    }

    async fn remove_device_model(
        &self,
        _: Request<dmi::RemoveDeviceModelRequest>,
    ) -> Result<Response<dmi::RemoveDeviceModelResponse>, Status> {
        self.note("no model".into()).await;
        Ok(Response::new(dmi::RemoveDeviceModelResponse::default()))
    }

    async fn update_device_model(
        &self,
        _: Request<dmi::UpdateDeviceModelRequest>,
    ) -> Result<Response<dmi::UpdateDeviceModelResponse>, Status> {
        self.note("other model".into()).await;
        Ok(Response::new(dmi::UpdateDeviceModelResponse::default()))
    }

    async fn get_device(
        &self,
        _: Request<dmi::GetDeviceRequest>,
    ) -> Result<Response<dmi::GetDeviceResponse>, Status> {
        Err(Status::unimplemented("the agent never asks"))
    }
}

async fn heard(calls: &mut mpsc::UnboundedReceiver<String>, wanted: &str) {
    let search = async {
        while let Some(call) = calls.recv().await {
            if call == wanted {
                return;
            }
        }
        panic!("the mapper has ended");
    };
    tokio::time::timeout(PATIENCE, search).await.unwrap_or_else(|_| panic!("no call: {wanted}"));
}

fn registration(socket: &Path, protocol: &str, with_data: bool) -> dmi::MapperRegisterRequest {
    let mapper = dmi::MapperInfo {
        name: "m".into(),
        protocol: protocol.into(),
        address: socket.display().to_string().into_bytes(),
        ..Default::default()
    };
    dmi::MapperRegisterRequest { with_data, mapper: Some(mapper) }
}

pub(crate) fn twin_report(device: &str, value: &str) -> dmi::ReportDeviceStatusRequest {
    let side = |value: &str| Some(dmi::TwinProperty { value: value.into(), ..Default::default() });
    let twin = |name: &str, observed| dmi::Twin {
        property_name: name.into(),
        observed_desired: observed,
        reported: side(value),
    };
    dmi::ReportDeviceStatusRequest {
        device_name: device.into(),
        device_namespace: "plant".into(),
        reported_device: Some(dmi::DeviceStatus {
            twins: vec![twin("t", None), twin("s", side(value))],
            ..Default::default()
        }),
    }
}

#[tokio::test]
async fn mappers_are_told_what_they_should_know_and_report_through_cuts_and_crashes() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let socket = dir.path().join("dmi.sock");
    let more = format!("dmiSocket: {}\nreportInterval: 1\n", socket.display());
    let (node, mut session) = joined_with(dir.path(), &cloud, Some(OURS), &more).await;
    place(&mut session, 5, "4").await;
    let mut agent = DeviceManagerServiceClient::new(skerry_dmi::connect(&socket));

    // What makes no sense is refused and takes nothing down.
    let empty = dmi::MapperRegisterRequest::default();
    let code = |done: Result<(), Status>| done.expect_err("refused").code();
    assert_eq!(code(agent.mapper_register(empty).await.map(drop)), Code::InvalidArgument);
    let nobody = registration(Path::new("/m"), "", true);
    assert_eq!(code(agent.mapper_register(nobody).await.map(drop)), Code::InvalidArgument);
    let report = dmi::ReportDeviceStatusRequest::default();
    assert_eq!(code(agent.report_device_status(report).await.map(drop)), Code::InvalidArgument);
    let foreign = twin_report("nothing", "1");
    assert_eq!(code(agent.report_device_status(foreign).await.map(drop)), Code::NotFound);

    // A mapper that hangs, of another protocol, holds nobody up.
    let hung = dir.path().join("hung.sock");
    let _hung = tokio::net::UnixListener::bind(&hung).expect("a socket");
    agent.mapper_register(registration(&hung, "ble", false)).await.expect("registered");

    let path = dir.path().join("m.sock");
    let got = agent.mapper_register(registration(&path, "modbus", true)).await;
    let got = got.expect("registered").into_inner();
    assert_eq!((got.device_list.len(), got.model_list.len()), (1, 1));
    assert_eq!(desired(got.device_list.into_iter().next()), "4");
    // It serves late, and is told then.
    place(&mut session, 6, "5").await;
    place(&mut session, 7, "6").await;
    let (task, mut calls) = Mapper::serve(&path, Duration::from_millis(50));
    heard(&mut calls, "update 6").await;

    agent.report_device_status(twin_report("boiler", "6")).await.expect("taken");
    let report = until_reported(&mut session, "s", "expected", "6").await;
    assert_eq!(report["twin"]["t"]["actual"]["value"], "6");
    let state = dmi::ReportDeviceStatesRequest {
        device_name: "boiler".into(),
        device_namespace: "plant".into(),
        state: "disconnected".into(),
    };
    agent.report_device_states(state).await.expect("taken");
    let state = session.until(Operation::Update, "device/plant/boiler/state/update").await;
    assert_eq!(state.content_as::<Value>().expect("JSON")["device"]["state"], "offline");
    confirm(&mut session, &state).await;

    // It crashes; the device goes and the agent is restarted; the mapper comes back and is told.
    task.abort();
    let _ = task.await;
    let id = session.push(Operation::Delete, "plant/device/boiler", &device(9, "")).await;
    session.until_ack(&id).await;
    node.stop().await;
    let (node, _session) = joined_with(dir.path(), &cloud, Some(OURS), &more).await;
    let (_task, mut calls) = Mapper::serve(&path, Duration::ZERO);
    heard(&mut calls, "remove plant/boiler").await;
    heard(&mut calls, "no model").await;
    node.stop().await;
}

#[test]
fn a_node_without_devices_has_no_socket_and_no_broker() {
    let text = "nodeName: edge1\nhub: wss://h\nenrol: https://h\ndir: /d\n";
    let config = skerry_edge::config::Config::parse(Path::new("edge.yaml"), text).expect("fine");
    assert_eq!((config.bus, config.dmi_socket), (None, None));
}
