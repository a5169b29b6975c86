//! `skerry device history`: from a report to the node, over the link, to the terminal; the real API, CloudCore and agent.

use kube::api::{Api, ApiResource, DynamicObject, PostParams};
use serde_json::{Value, json};
use skerry_apiserver::{ApiServer, Durability};
use skerry_dmi::v1beta1::device_manager_service_client::DeviceManagerServiceClient;
use skerry_dmi::v1beta1::{DeviceStatus, ReportDeviceStatusRequest, Twin, TwinProperty};
use skerry_edge::agent::{self, AgentError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(90);
const ANY: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

struct Agent {
    stop: CancellationToken,
    task: JoinHandle<Result<(), AgentError>>,
}

impl Agent {
    fn start(text: &str) -> Self {
        let config = skerry_edge::config::Config::parse(Path::new("edge.yaml"), text);
        let stop = CancellationToken::new();
        let task = tokio::spawn(agent::run(config.expect("a configuration"), stop.clone()));
        Self { stop, task }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.expect("no panic").expect("an orderly end");
    }
}

/// Creates an object, once the cluster knows its kind: CloudCore defines it where it lacks.
async fn create(admin: &kube::Client, kind: &str, plural: &str, object: Value) {
    let resource = ApiResource {
        group: "devices.kubeedge.io".into(),
        version: "v1beta1".into(),
        api_version: "devices.kubeedge.io/v1beta1".into(),
        kind: kind.into(),
        plural: plural.into(),
    };
    let api: Api<DynamicObject> = Api::namespaced_with(admin.clone(), "site-lisbon", &resource);
    let object: DynamicObject = serde_json::from_value(object).expect("an object");
    let end = Instant::now() + PATIENCE;
    while let Err(error) = api.create(&PostParams::default(), &object).await {
        assert!(Instant::now() < end, "{kind} is not taken: {error}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Says what the temperature was, until the node knows the device.
async fn report(socket: &Path, value: &str, at_ms: i64) {
    let mut client = DeviceManagerServiceClient::new(skerry_dmi::connect(socket));
    let metadata = [("timestamp".to_owned(), at_ms.to_string())].into();
    let reported = Some(TwinProperty { value: value.into(), metadata });
    let twin = Twin { property_name: "temperature".into(), reported, observed_desired: None };
    let request = ReportDeviceStatusRequest {
        device_name: "fridge".into(),
        device_namespace: "site-lisbon".into(),
        reported_device: Some(DeviceStatus { twins: vec![twin], ..DeviceStatus::default() }),
    };
    let end = Instant::now() + PATIENCE;
    while let Err(error) = client.report_device_status(request.clone()).await {
        assert!(Instant::now() < end, "the report is not taken: {error}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

struct Cli {
    kubeconfig: PathBuf,
    monitor: String,
}

impl Cli {
    async fn history(&self, words: &[&str]) -> (i32, String, String) {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_skerry"));
        command.args(["device", "history", "lisbon/fridge"]).args(words);
        command.arg("--monitor").arg(&self.monitor).arg("--kubeconfig").arg(&self.kubeconfig);
        let output = command.output().await.expect("it runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    /// The rows as JSON, once the node is connected.
    async fn rows(&self, words: &[&str]) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let (code, out, err) = self.history(&[words, &["--output", "json"]].concat()).await;
            if let (0 | 1, Ok(answer)) = (code, serde_json::from_str(&out)) {
                return answer;
            }
            assert!(Instant::now() < end, "no answer: {out}{err}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_device_was_is_asked_from_its_node_and_outlives_a_restart() {
    skerry_edge::tls::install_provider();
    let dir = tempfile::tempdir().expect("a directory");
    let config = skerry_apiserver::Config {
        dir: dir.path().join("api"),
        listen: ANY.into(),
        hostnames: vec!["127.0.0.1".into()],
        node_streams: None,
        durability: Durability::Relaxed,
        controllers: false,
    };
    let api = ApiServer::start(config).await.expect("the API starts");
    let admin = api.client("admin", &["system:masters"]);
    let kubeconfig = dir.path().join("kubeconfig");
    let text = api.kubeconfig("admin", &["system:masters"]).expect("a kubeconfig");
    std::fs::write(&kubeconfig, text).expect("written");
    let config = skerry_cloudcore::Config {
        hub: ANY.into(),
        quic: None,
        monitor: Some(ANY.into()),
        admission: skerry_cloudcore::ADMISSION_RATE,
        enrol: ANY.into(),
        tunnel: ANY.into(),
        advertise: vec!["127.0.0.1".into()],
        os_store: None,
        node_certificate_ttl: skerry_cloudcore::NODE_CERTIFICATE_TTL,
        shared_token: false,
        router: None,
        impersonate: false,
    };
    let client = api.client("cloudcore", &["skerry:cloudcore"]);
    let cloud = skerry_cloudcore::CloudCore::start(client, config).await.expect("cloudcore starts");
    let token = skerry_cloudcore::create_token(&admin, "edge1", Duration::from_secs(600)).await;
    let socket = dir.path().join("dmi.sock");
    let text = format!(
        "nodeName: edge1\nhub: wss://{}\nquic: off\nenrol: https://{}\ntunnel: wss://{}\ntoken: {}\n\
         dir: {4}/edge\npodLogDir: {4}/logs\nruntimeSocket: {4}/none.sock\nnodeIP: 192.0.2.2\n\
         dmiSocket: {4}/dmi.sock\n",
        cloud.hub_addr(),
        cloud.enrol_addr(),
        cloud.tunnel_addr(),
        token.expect("a token"),
        dir.path().display(),
    );
    let monitor = cloud.monitor_addr().map(|address| format!("http://{address}"));
    let cli = Cli { kubeconfig, monitor: monitor.expect("it listens") };
    let agent = Agent::start(&text);

    let spaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(admin.clone());
    let space =
        serde_json::from_value(json!({"metadata": {"name": "site-lisbon"}})).expect("valid");
    spaces.create(&PostParams::default(), &space).await.expect("made");
    let head = |kind: &str, annotations: Value| {
        json!({"apiVersion": "devices.kubeedge.io/v1beta1", "kind": kind,
            "metadata": {"name": "fridge", "annotations": annotations}})
    };
    let mut model = head("DeviceModel", json!({}));
    model["spec"] =
        json!({"protocol": "sim", "properties": [{"name": "temperature", "type": "FLOAT"}]});
    create(&admin, "DeviceModel", "devicemodels", model).await;
    let kept = json!({"fleet.skerry.dev/history": r#"{"temperature": {"deadband": 0.05}}"#});
    let mut device = head("Device", kept);
    device["spec"] = json!({"deviceModelRef": {"name": "fridge"}, "nodeName": "edge1",
        "protocol": {"protocolName": "sim"}, "properties": [{"name": "temperature"}]});
    create(&admin, "Device", "devices", device).await;

    // Two hours of a value every 12 s, of which each second one is within the deadband.
    let start_ms = jiff::Timestamp::now().as_millisecond() / 3_600_000 * 3_600_000 - 3 * 3_600_000;
    let samples = 600;
    for n in 0..samples {
        let tenths = 40 + (n / 2) % 10;
        let value =
            format!("{}.{}{}", tenths / 10, tenths % 10, if n % 2 == 0 { "0" } else { "3" });
        report(&socket, &value, start_ms + n * 12_000).await;
    }
    let answer = cli.rows(&["temperature"]).await;
    let rows = answer["rows"].as_array().expect("a list");
    assert_eq!(rows.len() as i64, samples / 2, "{answer}");
    assert_eq!((&rows[0]["at"], &rows[0]["value"]), (&json!(start_ms), &json!("4")));
    assert_eq!(answer["node"], "edge1");
    assert_eq!(answer["lost"]["late"], 0);
    let hours = cli.rows(&["temperature", "--every", "1h"]).await;
    let hours = hours["rows"].as_array().expect("a list");
    assert_eq!(hours.len(), 2, "{hours:?}");
    assert_eq!(
        (&hours[0]["count"], &hours[0]["min"], &hours[0]["max"]),
        (&json!(150), &json!(4.0), &json!(4.9))
    );
    let (code, out, err) = cli.history(&["temperature", "--every", "1h"]).await;
    assert_eq!((code, out.lines().count()), (0, 3), "{out}{err}");

    let (code, out, err) = cli.history(&["humidity"]).await;
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    assert!(err.contains("nothing is known of humidity"), "{err}");

    // It is on the node and nowhere else.
    agent.stop().await;
    let (code, _, err) = cli.history(&["temperature"]).await;
    assert!(code == 2 && err.contains("not connected"), "{err}");
    let agent = Agent::start(&text);
    let again = cli.rows(&["temperature"]).await;
    assert_eq!(again["rows"].as_array().map(Vec::len), Some(rows.len()));
    assert_eq!(again["lost"]["cuts"], 0, "an orderly end");

    agent.stop().await;
    cloud.shutdown().await;
    api.shutdown().await;
}
