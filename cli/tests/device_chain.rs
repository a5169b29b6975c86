//! The whole way of a device: `skerry device`, the real API, CloudCore and agent, and a mapper as a program of its own.

mod support;

use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, PostParams};
use serde_json::{Value, json};
use skerry_cloudcore::NODE_CERTIFICATE_TTL;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::{ANY, Agent, start_api, start_cloud};

const PATIENCE: Duration = Duration::from_secs(90);

/// The mapper, ended with the test.
struct Mapper(Child);

impl Mapper {
    fn start(dir: &Path) -> Self {
        let test = std::env::current_exe().expect("this program has a path");
        let programs = test.parent().and_then(Path::parent).expect("it is in target/…/deps");
        let program = programs.join("skerry-mapper-sim");
        assert!(program.exists(), "`cargo build --workspace --bins` builds {}", program.display());
        let config = dir.join("mapper.yaml");
        let text = json!({
            "grpc_server": {"socket_path": dir.join("sim.sock")},
            "common": {"name": "sim", "protocol": "sim", "edgecore_sock": dir.join("dmi.sock"),
                "reports_per_second": 50},
        });
        std::fs::write(&config, text.to_string()).expect("written");
        let log = std::fs::File::options().create(true).append(true).open(dir.join("mapper.log"));
        let mut command = Command::new(program);
        command.arg("--config-file").arg(config).stdin(Stdio::null()).stderr(log.expect("a log"));
        Self(command.spawn().expect("it starts"))
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn objects(admin: &kube::Client, kind: &str, plural: &str) -> Api<DynamicObject> {
    let resource = ApiResource {
        group: "devices.kubeedge.io".into(),
        version: "v1beta1".into(),
        api_version: "devices.kubeedge.io/v1beta1".into(),
        kind: kind.into(),
        plural: plural.into(),
    };
    Api::namespaced_with(admin.clone(), "site-lisbon", &resource)
}

/// Creates an object, once the cluster knows its kind: CloudCore defines it where it lacks.
async fn create(api: &Api<DynamicObject>, kind: &str, name: &str, spec: Value) {
    let object = json!({"apiVersion": "devices.kubeedge.io/v1beta1", "kind": kind,
        "metadata": {"name": name}, "spec": spec});
    let object: DynamicObject = serde_json::from_value(object).expect("an object");
    let end = Instant::now() + PATIENCE;
    while let Err(error) = api.create(&PostParams::default(), &object).await {
        assert!(Instant::now() < end, "{kind} is not taken: {error}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

struct Cli {
    kubeconfig: PathBuf,
    dir: PathBuf,
}

impl Cli {
    async fn run(&self, words: &[&str]) -> (i32, String, String) {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_skerry"));
        command.args(words).arg("--kubeconfig").arg(&self.kubeconfig);
        let output = command.output().await.expect("it runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    /// Sets a value and waits until the device has taken it.
    async fn set(&self, wish: &str) {
        let words = ["device", "set", "lisbon/fridge", wish, "--wait", "90"];
        let (code, out, err) = self.run(&words).await;
        let log = std::fs::read_to_string(self.dir.join("mapper.log")).unwrap_or_default();
        assert_eq!(code, 0, "{wish}: {out}{err}\n{log}");
    }

    /// Waits until a property is shown with this report.
    async fn until_reported(&self, property: &str, value: &str) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let (_, out, err) =
                self.run(&["device", "get", "lisbon/fridge", "--output", "json"]).await;
            let shown: Value =
                serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
            let rows = shown["properties"].as_array().cloned().unwrap_or_default();
            if rows.iter().any(|row| row["property"] == property && row["reported"] == value) {
                return shown;
            }
            assert!(Instant::now() < end, "{property} is not {value}: {shown:#}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_is_set_reaches_the_device_and_comes_back_through_restarts_of_all() {
    skerry_edge::tls::install_provider();
    let dir = tempfile::tempdir().expect("a directory");
    let api = start_api(dir.path()).await;
    let admin = api.client("admin", &["system:masters"]);
    let kubeconfig = dir.path().join("kubeconfig");
    let text = api.kubeconfig("admin", &["system:masters"]).expect("a kubeconfig");
    std::fs::write(&kubeconfig, text).expect("written");
    let cli = Cli { kubeconfig, dir: dir.path().to_path_buf() };
    let cloud = start_cloud(&api, ANY.into(), ANY.into(), NODE_CERTIFICATE_TTL).await;
    let token = skerry_cloudcore::create_token(&admin, "edge1", Duration::from_secs(600)).await;
    let text = format!(
        "nodeName: edge1\nhub: wss://{}\nquic: off\nenrol: https://{}\ntoken: {}\n\
         dir: {3}/edge\npodLogDir: {3}/logs\nruntimeSocket: {3}/none.sock\nnodeIP: 192.0.2.2\n\
         dmiSocket: {3}/dmi.sock\nreportInterval: 1\n",
        cloud.hub_addr(),
        cloud.enrol_addr(),
        token.expect("a token"),
        dir.path().display(),
    );
    let agent = Agent::start(&text);
    let mapper = Mapper::start(dir.path());

    let spaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(admin.clone());
    let space =
        serde_json::from_value(json!({"metadata": {"name": "site-lisbon"}})).expect("valid");
    spaces.create(&PostParams::default(), &space).await.expect("made");
    let models = objects(&admin, "DeviceModel", "devicemodels");
    let properties = json!([
        {"name": "temperature", "type": "FLOAT", "accessMode": "ReadOnly"},
        {"name": "setpoint", "type": "FLOAT", "accessMode": "ReadWrite", "maximum": "8"},
    ]);
    create(&models, "DeviceModel", "fridge", json!({"protocol": "sim", "properties": properties}))
        .await;
    let devices = objects(&admin, "Device", "devices");
    let property = |name: &str, value: f64| {
        json!({"name": name, "collectCycle": 200, "reportToCloud": true,
            "visitors": {"protocolName": "sim", "configData": {"value": value}}})
    };
    let spec = json!({
        "deviceModelRef": {"name": "fridge"}, "nodeName": "edge1", "protocol": {"protocolName": "sim"},
        "properties": [property("temperature", 4.25), property("setpoint", 1.0)],
    });
    create(&devices, "Device", "fridge", spec).await;

    let shown = cli.until_reported("temperature", "4.25").await;
    assert_eq!(shown["state"], "online");
    cli.set("setpoint=4.5").await;
    cli.until_reported("setpoint", "4.5").await;

    // What is desired while the mapper is away is done when it is back.
    drop(mapper);
    let (code, _, err) = cli.run(&["device", "set", "lisbon/fridge", "setpoint=5.5"]).await;
    assert_eq!(code, 0, "{err}");
    let mapper = Mapper::start(dir.path());
    cli.until_reported("setpoint", "5.5").await;

    // The agent goes and comes back; the mapper stays, and registers again.
    agent.stop().await;
    let agent = Agent::start(&text);
    cli.set("setpoint=6.5").await;
    cli.until_reported("setpoint", "6.5").await;

    devices.delete("fridge", &DeleteParams::default()).await.expect("deleted");
    let end = Instant::now() + PATIENCE;
    while known(dir.path()).await {
        assert!(Instant::now() < end, "the mapper keeps a device that is gone");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    drop(mapper);
    agent.stop().await;
    cloud.shutdown().await;
    api.shutdown().await;
}

/// Whether the mapper still serves the device.
async fn known(dir: &Path) -> bool {
    use skerry_dmi::v1beta1::GetDeviceRequest;
    use skerry_dmi::v1beta1::device_mapper_service_client::DeviceMapperServiceClient;
    let mut client = DeviceMapperServiceClient::new(skerry_dmi::connect(dir.join("sim.sock")));
    let request =
        GetDeviceRequest { device_name: "fridge".into(), device_namespace: "site-lisbon".into() };
    match client.get_device(request).await {
        Ok(_) => true,
        Err(status) => {
            assert_eq!(status.code(), tonic::Code::NotFound, "{status}");
            false
        }
    }
}
