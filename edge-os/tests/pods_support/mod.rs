//! A machine for pod tests: a containerd of its own, images packed from local files, and an agent
//! that answers the engine from memory.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, PodStatus, Secret};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use skerry_edge::containerd::{Containerd, Options, cleanup, shims, socket_path};
use skerry_edge::cri::Runtime;
use skerry_edge::pods::{
    Engine, EngineConfig, EngineEvent, FetchError, ObjectKind, Objects, PodEvent, RestartRecord,
    RestartState,
};
use tokio::sync::mpsc;

pub(crate) const IMAGE: &str = "skerry.local/busybox:1";
const PAUSE: &str = "skerry.local/pause:1";
const PATIENCE: Duration = Duration::from_secs(60);

/// One machine at a time: they share the host's processes and interfaces.
pub(crate) static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Why this host cannot run pods, if it cannot.
pub(crate) fn unable() -> Option<&'static str> {
    if !nix::unistd::Uid::effective().is_root() {
        return Some("not root");
    }
    let on_path = |name: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(name).exists())
    };
    for (name, why) in [
        ("containerd", "no containerd"),
        ("ctr", "no ctr"),
        ("runc", "no runc"),
        ("ip", "no ip"),
        ("busybox", "no busybox"),
    ] {
        if !on_path(name) {
            return Some(why);
        }
    }
    None
}

#[derive(Default)]
pub(crate) struct Store {
    config_maps: Mutex<HashMap<(String, String), Arc<ConfigMap>>>,
    secrets: Mutex<HashMap<(String, String), Arc<Secret>>>,
    restarts: Mutex<BTreeMap<(String, String), RestartRecord>>,
}

impl Store {
    pub(crate) fn put_config_map(&self, name: &str, data: Value) {
        let map = serde_json::from_value(json!({"data": data})).expect("config map parses");
        let key = ("default".to_owned(), name.to_owned());
        self.config_maps.lock().expect("lock").insert(key, Arc::new(map));
    }

    pub(crate) fn put_secret(&self, name: &str, data: Value) {
        let secret = serde_json::from_value(json!({"data": data})).expect("secret parses");
        let key = ("default".to_owned(), name.to_owned());
        self.secrets.lock().expect("lock").insert(key, Arc::new(secret));
    }

    pub(crate) fn restarts_of(&self, uid: &str) -> Vec<RestartRecord> {
        let all = self.restarts.lock().expect("lock");
        all.values().filter(|record| record.pod_uid == uid).cloned().collect()
    }
}

impl Objects for Store {
    fn config_map(&self, namespace: &str, name: &str) -> Option<Arc<ConfigMap>> {
        let key = (namespace.to_owned(), name.to_owned());
        self.config_maps.lock().expect("lock").get(&key).cloned()
    }

    fn secret(&self, namespace: &str, name: &str) -> Option<Arc<Secret>> {
        let key = (namespace.to_owned(), name.to_owned());
        self.secrets.lock().expect("lock").get(&key).cloned()
    }

    fn fetch<'a>(
        &'a self,
        _: ObjectKind,
        _: &'a str,
        _: &'a str,
    ) -> BoxFuture<'a, Result<(), FetchError>> {
        Box::pin(async { Err(FetchError("offline".to_owned())) })
    }
}

impl RestartState for Store {
    fn load(&self) -> Vec<RestartRecord> {
        self.restarts.lock().expect("lock").values().cloned().collect()
    }

    fn save(&self, record: &RestartRecord) {
        let key = (record.pod_uid.clone(), record.container.clone());
        self.restarts.lock().expect("lock").insert(key, record.clone());
    }

    fn forget(&self, pod_uid: &str) {
        self.restarts.lock().expect("lock").retain(|(uid, _), _| uid != pod_uid);
    }
}

/// A machine with a running containerd.
pub(crate) struct Machine {
    pub(crate) dir: PathBuf,
    _temp: tempfile::TempDir,
    bridge: String,
    containerd: Option<Containerd>,
    pub(crate) store: Arc<Store>,
}

impl Machine {
    pub(crate) async fn start() -> Self {
        let temp = tempfile::Builder::new().prefix("skp").tempdir().expect("temporary directory");
        let dir = temp.path().to_path_buf();
        let bridge = format!("skt{}", std::process::id());
        let options = options(&bridge);
        let containerd = Containerd::start(&dir, &options).await.expect("containerd starts");
        let archive = dir.join("images.tar");
        pack_images(&archive);
        let names = containerd.import(&archive).await.expect("images are imported");
        assert_eq!(names.len(), 2, "{names:?}");
        Self { dir, _temp: temp, bridge, containerd: Some(containerd), store: Arc::default() }
    }

    /// Ends the daemon, as an upgrade of it would.
    pub(crate) async fn stop_containerd(&mut self) {
        self.containerd.take().expect("runs").stop().await;
    }

    pub(crate) async fn start_containerd(&mut self) {
        let started = Containerd::start(&self.dir, &options(&self.bridge)).await;
        self.containerd = Some(started.expect("containerd starts again"));
    }

    pub(crate) async fn engine(&self) -> Agent {
        let mut config = EngineConfig::new(
            "edge-1",
            self.dir.join("kubelet"),
            self.dir.join("logs"),
            socket_path(&self.dir),
        );
        config.node_ip = Some("192.0.2.7".parse().expect("address"));
        config.cgroup_root = format!("/skt{}", std::process::id());
        let (engine, events) =
            Engine::start(config, self.store.clone(), self.store.clone()).await.expect("starts");
        Agent::new(engine, events)
    }

    pub(crate) fn runtime(&self) -> Runtime {
        Runtime::new(&socket_path(&self.dir))
    }

    /// Stops everything; fails if the engine left something behind.
    pub(crate) async fn finish(mut self, agent: Agent) {
        agent.engine.reset().await.expect("everything is removed");
        let left = self.runtime().list_sandboxes(&[]).await.expect("lists");
        assert!(left.is_empty(), "sandboxes are left: {left:?}");
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mount table");
        let pods = self.dir.join("kubelet").to_string_lossy().into_owned();
        assert!(!mounts.contains(&pods), "mounts are left:\n{mounts}");
        let cgroup = format!("skt{}", std::process::id());
        for top in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            assert!(!top.path().join(&cgroup).exists(), "cgroups are left in {top:?}");
        }
        drop(agent);
        self.clean().await;
        assert!(shims(&socket_path(&self.dir)).is_empty(), "shims are left");
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mount table");
        let own = self.dir.to_string_lossy().into_owned();
        assert!(!mounts.contains(&own), "mounts are left:\n{mounts}");
        let bridge = Path::new("/sys/class/net").join(&self.bridge);
        assert!(!bridge.exists(), "the bridge is left");
    }

    async fn clean(&mut self) {
        if let Some(containerd) = self.containerd.take() {
            containerd.stop().await;
        }
        cleanup(&self.dir, &self.bridge).await.expect("cleans up");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // A test that failed: end what it left, so that the next one starts on clean ground.
        let Some(containerd) = self.containerd.take() else { return };
        let (dir, bridge) = (self.dir.clone(), self.bridge.clone());
        let cleaned = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("runtime");
            let log = std::fs::read_to_string(dir.join("containerd.log")).unwrap_or_default();
            let errors = log.lines().filter(|line| line.contains("level=error"));
            for line in errors.take(10) {
                eprintln!("{line}");
            }
            if let Some(pid) = containerd.pid().and_then(|pid| i32::try_from(pid).ok()) {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
            std::thread::sleep(Duration::from_millis(200));
            let _ = runtime.block_on(cleanup(&dir, &bridge));
        });
        let _ = cleaned.join();
    }
}

fn options(bridge: &str) -> Options {
    Options::new("10.197.0.0/24", bridge, PAUSE)
}

/// The engine, and all it has said.
pub(crate) struct Agent {
    pub(crate) engine: Engine,
    events: mpsc::Receiver<EngineEvent>,
    pub(crate) statuses: HashMap<String, PodStatus>,
    pub(crate) gone: Vec<String>,
    pub(crate) told: Vec<PodEvent>,
}

impl Agent {
    pub(crate) fn new(engine: Engine, events: mpsc::Receiver<EngineEvent>) -> Self {
        Self { engine, events, statuses: HashMap::new(), gone: Vec::new(), told: Vec::new() }
    }

    async fn next(&mut self, what: &str) {
        let event = tokio::time::timeout(PATIENCE, self.events.recv()).await;
        match event {
            Ok(Some(EngineEvent::Status(update))) => {
                self.statuses.insert(update.uid, update.status);
            }
            Ok(Some(EngineEvent::Gone(gone))) => self.gone.push(gone.uid),
            Ok(Some(EngineEvent::Event(event))) => self.told.push(event),
            Ok(None) => panic!("the engine has stopped while waiting for {what}"),
            Err(_) => panic!(
                "{what} did not come to pass; statuses: {}; events: {:#?}",
                serde_json::to_string_pretty(&self.statuses).expect("serialises"),
                self.told.iter().map(|event| (event.reason, &event.message)).collect::<Vec<_>>(),
            ),
        }
    }

    /// Waits until the pod's status is as wanted; returns it.
    pub(crate) async fn wait(
        &mut self,
        uid: &str,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Value {
        loop {
            if let Some(status) = self.statuses.get(uid) {
                let status = serde_json::to_value(status).expect("serialises");
                if wanted(&status) {
                    return status;
                }
            }
            self.next(what).await;
        }
    }

    pub(crate) async fn wait_running(&mut self, uid: &str) -> Value {
        self.wait(uid, "a ready pod", |status| {
            let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
            status["phase"] == "Running"
                && conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True")
        })
        .await
    }

    pub(crate) async fn wait_gone(&mut self, uid: &str) {
        while !self.gone.iter().any(|gone| gone == uid) {
            self.next("the end of a pod").await;
        }
    }

    pub(crate) async fn wait_told(&mut self, reason: &str) -> PodEvent {
        loop {
            if let Some(event) = self.told.iter().find(|event| event.reason == reason) {
                return event.clone();
            }
            self.next(reason).await;
        }
    }
}

/// A pod of the namespace `default`; its UID is its name with `-uid`, its grace 1 s.
pub(crate) fn pod(name: &str, mut spec: Value) -> Arc<Pod> {
    // The first process of a container ignores the stop signal unless it asks for it.
    if spec["terminationGracePeriodSeconds"].is_null() {
        spec["terminationGracePeriodSeconds"] = json!(1);
    }
    let value = json!({
        "metadata": {"name": name, "namespace": "default", "uid": format!("{name}-uid"),
                     "labels": {"app": name}},
        "spec": spec,
    });
    Arc::new(serde_json::from_value(value).expect("pod parses"))
}

/// A container that runs a shell script.
pub(crate) fn shell(name: &str, script: &str) -> Value {
    json!({"name": name, "image": IMAGE, "imagePullPolicy": "IfNotPresent",
           "command": ["/bin/sh", "-c", script]})
}

/// Writes an OCI layout with the two images, made from the host's busybox.
fn pack_images(archive: &Path) {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find_map(|path| std::fs::read(path).ok())
        .expect("busybox can be read");
    let mut layer = tar::Builder::new(Vec::new());
    for folder in ["bin/", "tmp/", "etc/", "proc/", "sys/", "dev/"] {
        append(&mut layer, folder, &[], 0o777, tar::EntryType::Directory);
    }
    append(&mut layer, "bin/busybox", &busybox, 0o755, tar::EntryType::Regular);
    for name in ["sh", "sleep", "cat", "echo", "ls", "env", "id", "touch", "test", "httpd", "rm"] {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header.set_mode(0o777);
        layer.append_link(&mut header, format!("bin/{name}"), "busybox").expect("in memory");
    }
    let layer = layer.into_inner().expect("in memory");

    let mut blobs: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut add = |bytes: Vec<u8>, kind: &str| -> Value {
        let digest = hex(&Sha256::digest(&bytes));
        let size = bytes.len();
        blobs.insert(digest.clone(), bytes);
        json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": size})
    };
    let diff_id = format!("sha256:{}", hex(&Sha256::digest(&layer)));
    let layer = add(layer, "application/vnd.oci.image.layer.v1.tar");
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let mut manifests = Vec::new();
    for (name, command) in [(IMAGE, ["/bin/sh"].as_slice()), (PAUSE, &["/bin/sleep", "2147483647"])]
    {
        let config = json!({
            "architecture": architecture, "os": "linux",
            "config": {"Entrypoint": command, "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        });
        let config =
            add(config.to_string().into_bytes(), "application/vnd.oci.image.config.v1+json");
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": [layer],
        });
        let mut manifest =
            add(manifest.to_string().into_bytes(), "application/vnd.oci.image.manifest.v1+json");
        manifest["annotations"] = json!({"io.containerd.image.name": name});
        manifests.push(manifest);
    }
    let index = json!({"schemaVersion": 2, "manifests": manifests}).to_string();

    let file = std::fs::File::create(archive).expect("archive can be made");
    let mut out = tar::Builder::new(file);
    let layout = br#"{"imageLayoutVersion":"1.0.0"}"#;
    append(&mut out, "oci-layout", layout, 0o644, tar::EntryType::Regular);
    append(&mut out, "index.json", index.as_bytes(), 0o644, tar::EntryType::Regular);
    for (digest, bytes) in &blobs {
        let path = format!("blobs/sha256/{digest}");
        append(&mut out, &path, bytes, 0o644, tar::EntryType::Regular);
    }
    out.finish().expect("archive is complete");
}

fn append<W: std::io::Write>(
    out: &mut tar::Builder<W>,
    path: &str,
    bytes: &[u8],
    mode: u32,
    kind: tar::EntryType,
) {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(bytes.len() as u64);
    header.set_mode(mode);
    out.append_data(&mut header, path, bytes).expect("archive can be written");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
