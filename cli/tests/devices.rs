//! A device from the Kubernetes API to a client of the node's broker and back: the real API, CloudCore, agent and broker.

mod support;

use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams, PostParams};
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, QoS};
use serde_json::{Value, json};
use skerry_cloudcore::NODE_CERTIFICATE_TTL;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use support::{ANY, Agent, start_api, start_cloud};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// Longest wait for a state; an edge that has lost its hub waits up to 30 s before it dials again.
const PATIENCE: Duration = Duration::from_secs(90);
const UPDATES: &str = "$hw/events/device/default/boiler/twin/update";

struct Broker(Child, u16);

impl Broker {
    fn start(dir: &Path) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = free.local_addr().expect("bound").port();
        drop(free);
        let config = dir.join("mosquitto.conf");
        std::fs::write(&config, format!("listener {port} 127.0.0.1\nallow_anonymous true\n"))
            .expect("written");
        let program = ["/usr/sbin/mosquitto", "/usr/bin/mosquitto"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .expect("this test needs the Debian package `mosquitto`; `cargo xtask setup --tests` installs it");
        let mut broker = Command::new(program);
        broker.arg("-c").arg(config).stdout(Stdio::null()).stderr(Stdio::null());
        Self(broker.spawn().expect("the broker starts"), port)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Client {
    client: AsyncClient,
    heard: mpsc::UnboundedReceiver<(String, Value)>,
    task: JoinHandle<()>,
}

impl Client {
    async fn connect(port: u16) -> Self {
        let options = MqttOptions::new("test", "127.0.0.1", port);
        let (client, mut events) = AsyncClient::new(options, 64);
        client.subscribe("$hw/events/#", QoS::AtLeastOnce).await.expect("queued");
        let (tell, heard) = mpsc::unbounded_channel();
        let (up, is_up) = oneshot::channel();
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
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        });
        tokio::time::timeout(PATIENCE, is_up).await.expect("the broker runs").expect("up");
        Self { client, heard, task }
    }

    /// Says what the property `t` is, until the agent has taken it: it may not follow the broker yet.
    async fn say(&mut self, value: &str) {
        let payload = json!({"event_id": value, "twin": {"t": {"actual": {"value": value}}}});
        for _ in 0..100 {
            let text = payload.to_string();
            self.client.publish(UPDATES, QoS::AtLeastOnce, false, text).await.expect("queued");
            let taken = |content: &Value| content["event_id"] == value && content["code"].is_null();
            let result = format!("{UPDATES}/result");
            let answer = self.until(&result, taken);
            if tokio::time::timeout(Duration::from_secs(1), answer).await.is_ok() {
                return;
            }
        }
        panic!("the agent does not take {value}");
    }

    async fn until(&mut self, topic: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let search = async {
            loop {
                let (on, content) = self.heard.recv().await.expect("the task runs");
                if on == topic && wanted(&content) {
                    return content;
                }
            }
        };
        let found = tokio::time::timeout(PATIENCE, search).await;
        found.unwrap_or_else(|_| panic!("nothing on {topic}"))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn kind(kind: &str, plural: &str) -> ApiResource {
    ApiResource {
        group: "devices.kubeedge.io".into(),
        version: "v1beta1".into(),
        api_version: "devices.kubeedge.io/v1beta1".into(),
        kind: kind.into(),
        plural: plural.into(),
    }
}

fn objects(admin: &kube::Client, of: &ApiResource) -> Api<DynamicObject> {
    Api::namespaced_with(admin.clone(), "default", of)
}

/// Creates an object, once the cluster knows its kind: CloudCore defines it where it lacks.
async fn create(admin: &kube::Client, of: &ApiResource, name: &str, spec: Value) {
    let object = json!({"apiVersion": of.api_version, "kind": of.kind, "metadata": {"name": name}, "spec": spec});
    let object: DynamicObject = serde_json::from_value(object).expect("an object");
    let created = async {
        loop {
            match objects(admin, of).create(&PostParams::default(), &object).await {
                Ok(_) => return,
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, created).await.expect("the kind is defined");
}

/// Waits until the DeviceStatus says this of a property.
async fn until_status(admin: &kube::Client, property: &str, side: &str, value: &str) -> Value {
    let of = kind("DeviceStatus", "devicestatuses");
    let mut last = Value::Null;
    let wait = async {
        loop {
            if let Ok(status) = objects(admin, &of).get("boiler").await {
                last = serde_json::to_value(&status).expect("JSON");
                let twins = last["status"]["twins"].as_array().cloned().unwrap_or_default();
                let says =
                    |twin: &Value| twin["propertyName"] == property && twin[side]["value"] == value;
                if twins.iter().any(says) {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    if tokio::time::timeout(PATIENCE, wait).await.is_err() {
        panic!("{property} does not become {value}: {last:#}");
    }
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_converges_between_the_api_and_the_broker_through_cuts_and_a_restart() {
    skerry_edge::tls::install_provider();
    let dir = tempfile::tempdir().expect("a directory");
    let api = start_api(dir.path()).await;
    let admin = api.client("admin", &["system:masters"]);
    let cloud = start_cloud(&api, ANY.into(), ANY.into(), NODE_CERTIFICATE_TTL).await;
    let (hub, enrol) = (cloud.hub_addr(), cloud.enrol_addr());
    let token = skerry_cloudcore::create_token(&admin, "edge1", Duration::from_secs(600)).await;
    let token = token.expect("a token");
    let broker = Broker::start(dir.path());
    let mut client = Client::connect(broker.1).await;
    let text = format!(
        "nodeName: edge1\nhub: wss://{hub}\nquic: off\nenrol: https://{enrol}\ntoken: {token}\n\
         dir: {0}/edge\npodLogDir: {0}/logs\nruntimeSocket: {0}/none.sock\nnodeIP: 192.0.2.2\n\
         mqtt: {{server: 'tcp://127.0.0.1:{1}'}}\nreportInterval: 1\n",
        dir.path().display(),
        broker.1,
    );
    let agent = Agent::start(&text);

    // Down: what the cluster wants reaches the broker.
    let models = kind("DeviceModel", "devicemodels");
    let properties = json!([{"name": "t", "type": "FLOAT", "accessMode": "ReadOnly"},
        {"name": "s", "type": "FLOAT", "accessMode": "ReadWrite"}]);
    create(&admin, &models, "m", json!({"protocol": "modbus", "properties": properties})).await;
    let devices = kind("Device", "devices");
    let spec = json!({"nodeName": "edge1", "deviceModelRef": {"name": "m"}, "protocol": {"protocolName": "modbus"},
        "properties": [{"name": "t", "desired": {"value": ""}}, {"name": "s", "desired": {"value": "4"}}]});
    create(&admin, &devices, "boiler", spec).await;
    let document = client.until(&format!("{UPDATES}/document"), |_| true).await;
    assert_eq!(document["twin"]["s"]["current"]["expected"]["value"], "4");

    // Up: what the broker says reaches the cluster.
    client.say("5.1").await;
    let status = until_status(&admin, "t", "reported", "5.1").await;
    assert_eq!(status["metadata"]["ownerReferences"][0]["name"], "boiler");
    assert_eq!(status["status"]["twins"].as_array().map(Vec::len), Some(1));

    // The hub goes. Both sides change, many times, and the agent is restarted in between.
    cloud.shutdown().await;
    for wanted in ["5", "6", "7"] {
        let properties = json!([{"name": "t", "desired": {"value": ""}}, {"name": "s", "desired": {"value": wanted}}]);
        let patch = Patch::Merge(json!({"spec": {"properties": properties}}));
        let patched =
            objects(&admin, &devices).patch("boiler", &PatchParams::default(), &patch).await;
        patched.expect("patched");
    }
    for value in 6..12 {
        client.say(&value.to_string()).await;
    }
    agent.stop().await;
    let agent = Agent::start(&text);
    client.say("12.5").await;

    // It comes back, and both know the last of the other.
    let cloud = start_cloud(&api, hub, enrol, NODE_CERTIFICATE_TTL).await;
    let newest = |delta: &Value| delta["delta"]["s"] == "7";
    client.until(&format!("{UPDATES}/delta"), newest).await;
    until_status(&admin, "t", "reported", "12.5").await;

    // A rule goes to the node with the device that names it, and what it does is written down there.
    let rules = ApiResource {
        group: "fleet.skerry.dev".into(),
        version: "v1alpha1".into(),
        api_version: "fleet.skerry.dev/v1alpha1".into(),
        kind: "DeviceRule".into(),
        plural: "devicerules".into(),
    };
    let rule = json!({
        "when": {"device": "boiler", "property": "t", "above": 50},
        "then": [{"set": {"device": "boiler", "property": "s", "value": "0"}}],
    });
    create(&admin, &rules, "alarm", rule).await;
    let named = Patch::Merge(
        json!({"metadata": {"annotations": {"fleet.skerry.dev/rules": "[\"alarm\"]"}}}),
    );
    let patched = objects(&admin, &devices).patch("boiler", &PatchParams::default(), &named).await;
    patched.expect("patched");
    let is_off = |document: &Value| document["twin"]["s"]["current"]["expected"]["value"] == "0";
    let end = std::time::Instant::now() + PATIENCE;
    let document = format!("{UPDATES}/document");
    for n in 0.. {
        client.say(&format!("{}", 60 + n % 10)).await;
        let wait = client.until(&document, is_off);
        if tokio::time::timeout(Duration::from_secs(2), wait).await.is_ok() {
            break;
        }
        assert!(std::time::Instant::now() < end, "the rule does nothing");
    }
    let log = std::fs::read_to_string(dir.path().join("edge/rules.log")).expect("a log");
    assert!(log.contains("RuleBegan") && log.contains("RuleActed"), "{log}");
    let events: Api<k8s_openapi::api::core::v1::Event> = Api::all(admin.clone());
    let told = async {
        loop {
            let all = events.list(&Default::default()).await.expect("listed");
            let has = |reason: &str| {
                all.items.iter().any(|event| event.reason.as_deref() == Some(reason))
            };
            if has("RuleBegan") && has("RuleActed") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(PATIENCE, told).await.expect("the cluster is told");

    // A device that the cluster deletes is gone at the node.
    objects(&admin, &devices)
        .delete("boiler", &kube::api::DeleteParams::default())
        .await
        .expect("deleted");
    let gone = |membership: &Value| membership["removed_devices"][0]["id"] == "default/boiler";
    client.until("$hw/events/node/edge1/membership/updated", gone).await;

    agent.stop().await;
    cloud.shutdown().await;
    api.shutdown().await;
}
