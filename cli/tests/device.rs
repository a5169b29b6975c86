//! `skerry device` as a program against a real API.

use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use skerry_apiserver::{ApiServer, Durability};
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

struct World {
    api: ApiServer,
    dir: tempfile::TempDir,
}

impl World {
    async fn start() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().expect("a folder");
        let config = skerry_apiserver::Config {
            dir: dir.path().join("api"),
            listen: ([127, 0, 0, 1], 0).into(),
            hostnames: vec!["127.0.0.1".into()],
            node_streams: None,
            durability: Durability::Relaxed,
            controllers: false,
        };
        let api = ApiServer::start(config).await.expect("the API starts");
        let text = api.kubeconfig("admin", &["system:masters"]).expect("a kubeconfig");
        std::fs::write(dir.path().join("kubeconfig"), text).expect("written");
        Self { api, dir }
    }

    async fn define(&self) {
        use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
        let api: Api<CustomResourceDefinition> =
            Api::all(self.api.client("admin", &["system:masters"]));
        for crd in skerry_api::crds().into_iter().chain(skerry_api::kubeedge::crds()) {
            if crd["spec"]["group"] == "devices.kubeedge.io" {
                let name = crd["metadata"]["name"].as_str().expect("a name").to_owned();
                api.patch(&name, &PatchParams::apply("test").force(), &Patch::Apply(crd))
                    .await
                    .expect("applied");
            }
        }
        let spaces: Api<k8s_openapi::api::core::v1::Namespace> =
            Api::all(self.api.client("admin", &["system:masters"]));
        let space = serde_json::from_value(json!({"metadata": {"name": "site-lisbon"}}))
            .expect("a namespace");
        spaces.create(&PostParams::default(), &space).await.expect("made");
    }

    fn kind(&self, kind: &str, plural: &str) -> Api<DynamicObject> {
        let resource = ApiResource {
            group: "devices.kubeedge.io".into(),
            version: "v1beta1".into(),
            api_version: "devices.kubeedge.io/v1beta1".into(),
            kind: kind.into(),
            plural: plural.into(),
        };
        let client = self.api.client("admin", &["system:masters"]);
        Api::namespaced_with(client, "site-lisbon", &resource)
    }

    async fn apply(&self, kind: &str, plural: &str, name: &str, mut value: Value) {
        value["apiVersion"] = json!("devices.kubeedge.io/v1beta1");
        value["kind"] = json!(kind);
        value["metadata"] = json!({"name": name});
        let params = PatchParams::apply("test").force();
        self.kind(kind, plural).patch(name, &params, &Patch::Apply(value)).await.expect("applied");
    }

    async fn fridge(&self) {
        let model = json!({"spec": {"properties": [
            {"name": "temperature", "type": "FLOAT", "accessMode": "ReadOnly", "unit": "C"},
            {"name": "setpoint", "type": "FLOAT", "accessMode": "ReadWrite", "minimum": "-30", "maximum": "8"},
        ]}});
        self.apply("DeviceModel", "devicemodels", "fridge", model).await;
        let device = json!({"spec": {
            "deviceModelRef": {"name": "fridge"}, "nodeName": "lisbon-1",
            "protocol": {"protocolName": "sim"},
            "properties": [{"name": "temperature", "reportToCloud": true}, {"name": "setpoint"}],
        }});
        self.apply("Device", "devices", "fridge", device).await;
    }

    async fn report(&self, temperature: &str, observed: &str) {
        let status = json!({"spec": {}, "status": {"state": "online", "twins": [
            {"propertyName": "temperature", "observedDesired": {"value": ""},
             "reported": {"value": temperature, "metadata": {"timestamp": "1787217243120", "type": "float"}}},
            {"propertyName": "setpoint", "observedDesired": {"value": observed}, "reported": {"value": observed}},
        ]}});
        self.apply("DeviceStatus", "devicestatuses", "fridge", status).await;
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_skerry"));
        command.args(words).arg("--kubeconfig").arg(self.dir.path().join("kubeconfig"));
        command
    }

    /// Exit code, standard output, standard error.
    async fn skerry(&self, words: &[&str]) -> (i32, String, String) {
        let output = self.command(words).output().await.expect("it runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    async fn json(&self, words: &[&str]) -> Value {
        let (code, out, err) = self.skerry(&[words, &["--output", "json"]].concat()).await;
        assert_eq!(code, 0, "{words:?}: {err}");
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{words:?}: {error}: {out}"))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_are_listed_shown_and_set() {
    let world = World::start().await;
    let (code, _, err) = world.skerry(&["device", "list"]).await;
    assert!(code == 2 && err.contains("hint: CloudCore installs"), "{err}");
    world.define().await;
    world.fridge().await;

    let list = world.json(&["device", "list"]).await;
    assert_eq!(list["devices"][0]["state"], "unknown");
    assert_eq!(list["devices"][0]["site"], "lisbon");
    world.report("4.5", "").await;
    let (code, out, _) = world.skerry(&["device", "list", "--site", "lisbon"]).await;
    assert_eq!(code, 0);
    let words: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0][..5], ["SITE", "DEVICE", "MODEL", "NODE", "STATE"]);
    assert_eq!(words[1][..6], ["lisbon", "fridge", "fridge", "lisbon-1", "online", "1/2"]);
    let (code, _, err) = world.skerry(&["device", "list", "--site", "vigo"]).await;
    assert!(code == 2 && err.contains("hint:"), "{err}");

    let (_, out, _) = world.skerry(&["device", "set", "lisbon/fridge", "setpoint=4.5"]).await;
    assert_eq!(out, "lisbon/fridge: setpoint = 4.5 is desired\n");
    let shown = world.json(&["device", "get", "lisbon/fridge"]).await;
    assert_eq!(shown["properties"][1]["desired"], "4.5");
    assert_eq!(shown["properties"][0]["reported"], "4.5");
    let live = world.kind("Device", "devices").get("fridge").await.expect("it is there");
    assert_eq!(
        live.data["spec"]["properties"][0],
        json!({"name": "temperature", "reportToCloud": true})
    );

    for (wish, part) in [
        ("setpoint=9", "hint: from -30 to 8"),
        ("setpoint=warm", "is no FLOAT"),
        ("temperature=1", "can only be read"),
        ("setpiont=1", "hint: it has temperature, setpoint"),
    ] {
        let (code, _, err) = world.skerry(&["device", "set", "lisbon/fridge", wish]).await;
        assert!(code == 2 && err.contains(part), "{wish}: {err}");
    }
    let (code, _, err) = world.skerry(&["device", "get", "lisbon/frigde"]).await;
    assert!(code == 2 && err.contains("hint:"), "{err}");

    // Nobody takes it, then somebody has.
    let words = ["device", "set", "lisbon/fridge", "setpoint=5", "--wait", "0"];
    let (code, out, _) = world.skerry(&words).await;
    assert!(code == 1 && out.contains("has not taken it"), "{out}");
    world.report("4.5", "5").await;
    let (code, out, _) = world.skerry(&words).await;
    assert!(code == 0 && out.contains("has taken it"), "{out}");
    world.api.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_prints_what_is_and_what_changes() {
    let world = World::start().await;
    world.define().await;
    world.fridge().await;
    world.report("4.5", "").await;
    let mut watch = world
        .command(&["device", "watch", "lisbon/fridge", "--output", "json"])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("it runs");
    let mut lines = BufReader::new(watch.stdout.take().expect("piped")).lines();
    let mut next = async || -> Value {
        let line =
            tokio::time::timeout(std::time::Duration::from_secs(30), lines.next_line()).await;
        let line = line.expect("in time").expect("readable").expect("a line");
        serde_json::from_str(&line).expect("JSON")
    };
    assert_eq!(next().await["value"], "online");
    assert_eq!(next().await["property"], "temperature");
    assert_eq!(next().await["property"], "setpoint");
    world.report("5.5", "").await;
    let change = next().await;
    assert_eq!((&change["property"], &change["value"]), (&json!("temperature"), &json!("5.5")));
    watch.kill().await.expect("it ends");
    world.api.shutdown().await;
}
