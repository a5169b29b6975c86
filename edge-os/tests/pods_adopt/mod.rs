//! A node changes hands on a real container runtime, and no container notices.
//!
//! Containers are made through the runtime's interface as KubeEdge's kubelet makes them: its labels, its annotations, its
//! files. What the engine then does is seen in container ids. Skipped where the machine cannot run pods.

use crate::pods_support::{Agent, IMAGE, Machine, TURN, unable};
use rusqlite::Connection;
use serde_json::{Value, json};
use skerry_edge::adopt::{self, Change};
use skerry_edge::config::Config;
use skerry_edge::cri::{Runtime, v1};
use skerry_edge::meta_store::Store;
use skerry_edge::objects::StoredObjects;
use skerry_edge::pods::{Engine, EngineConfig};
use skerry_edge_core::meta::{Effect, Meta};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::mpsc;

const NODE: &str = "edge-1";
/// FNV-1a of `([]uint8)[…]` over `{"image":"skerry.local/busybox:1","name":"a"}`, as kubelet 1.31 and newer have it.
const HASH: &str = "a3bbcbcd";

fn pod(name: &str, spec: Value) -> Value {
    json!({"kind": "Pod", "apiVersion": "v1", "spec": spec,
        "metadata": {"name": name, "namespace": "default", "uid": format!("{name}-uid"), "resourceVersion": "10",
            "labels": {"app": name}}})
}

fn spec(script: &str) -> Value {
    json!({"nodeName": NODE, "terminationGracePeriodSeconds": 1, "restartPolicy": "Always",
        "containers": [{"name": "a", "image": IMAGE, "imagePullPolicy": "IfNotPresent",
            "command": ["/bin/sh", "-c", script], "terminationMessagePath": "/dev/termination-log",
            "terminationMessagePolicy": "File", "ports": [{"containerPort": 80, "protocol": "TCP"}],
            "volumeMounts": [{"name": "text", "mountPath": "/text"}]}],
        "volumes": [{"name": "text", "configMap": {"name": "text"}}]})
}

fn config_map(text: &str, version: &str) -> Value {
    json!({"kind": "ConfigMap", "apiVersion": "v1", "data": {"file": text},
        "metadata": {"name": "text", "namespace": "default", "uid": "text", "resourceVersion": version}})
}

/// Where the node's things lie.
struct Node {
    dir: PathBuf,
    file: PathBuf,
    config: Config,
}

impl Node {
    fn new(machine: &Machine) -> Self {
        let dir = machine.dir.clone();
        let file = dir.join("edgecore.yaml");
        let socket = skerry_edge::containerd::socket_path(&dir);
        let text = json!({
            "apiVersion": "edgecore.config.kubeedge.io/v1alpha2",
            "database": {"dataSource": dir.join("kubeedge/edgecore.db")},
            "modules": {
                "edgeHub": {"httpServer": "https://192.0.2.1:10002",
                    "tlsCaFile": dir.join("ca.crt"), "tlsCertFile": dir.join("server.crt"),
                    "tlsPrivateKeyFile": dir.join("server.key"),
                    "websocket": {"enable": true, "server": "192.0.2.1:10000"}},
                "edged": {"hostnameOverride": NODE, "rootDirectory": dir.join("kubelet"),
                    "tailoredKubeletConfig": {"podLogsDir": dir.join("logs"), "readOnlyPort": 0,
                        "cgroupsPerQOS": false, "cgroupRoot": format!("/skt{}", std::process::id()),
                        "containerRuntimeEndpoint": format!("unix://{}", socket.display())}},
            },
        });
        fs::write(&file, text.to_string()).expect("written");
        let config = Config::read(&file).expect("a configuration");
        Self { dir, file, config }
    }

    /// Makes KubeEdge's database with these objects.
    fn fill(&self, objects: &[(&str, Value)]) {
        fs::create_dir_all(self.dir.join("kubeedge")).expect("made");
        let connection = self.database();
        connection
            .execute_batch("CREATE TABLE meta (key text, type text, value text, PRIMARY KEY (key))")
            .expect("made");
        for (key, object) in objects {
            let kind = key.split('/').nth(1).expect("a key");
            connection
                .execute("INSERT INTO meta VALUES (?1, ?2, ?3)", [*key, kind, &object.to_string()])
                .expect("inserted");
        }
    }

    fn database(&self) -> Connection {
        Connection::open(self.dir.join("kubeedge/edgecore.db")).expect("opens")
    }

    /// Makes and starts a container as KubeEdge's kubelet does; returns its id.
    async fn start_as_kubelet(
        &self,
        runtime: &Runtime,
        pod: &Value,
        hash: &str,
        source: &str,
    ) -> String {
        let text = |pointer: &str| pod.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let (name, uid) = (text("/metadata/name"), text("/metadata/uid"));
        let folder = self.dir.join("kubelet/pods").join(uid);
        let logs = self.dir.join("logs").join(format!("default_{name}_{uid}"));
        fs::create_dir_all(logs.join("a")).expect("made");
        // A ConfigMap volume as kubelet's atomic writer leaves it.
        let volume = folder.join("volumes/kubernetes.io~configmap/text");
        fs::create_dir_all(volume.join("..2026_08_06_14_58_26.1")).expect("made");
        fs::write(volume.join("..2026_08_06_14_58_26.1/file"), "before").expect("written");
        symlink("..2026_08_06_14_58_26.1", volume.join("..data")).expect("linked");
        symlink("..data/file", volume.join("file")).expect("linked");
        fs::write(folder.join("etc-hosts"), "127.0.0.1 localhost\n").expect("written");
        fs::create_dir_all(folder.join("containers/a")).expect("made");
        fs::write(folder.join("containers/a/1a2b3c4d"), "").expect("written");

        let identity = BTreeMap::from([
            ("io.kubernetes.pod.name".to_owned(), name.to_owned()),
            ("io.kubernetes.pod.namespace".to_owned(), "default".to_owned()),
            ("io.kubernetes.pod.uid".to_owned(), uid.to_owned()),
        ]);
        let mut labels = identity.clone();
        labels.insert("app".to_owned(), name.to_owned());
        let namespaces = v1::NamespaceOption {
            network: v1::NamespaceMode::Pod as i32,
            pid: v1::NamespaceMode::Container as i32,
            ipc: v1::NamespaceMode::Pod as i32,
            ..Default::default()
        };
        let sandbox = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.to_owned(),
                uid: uid.to_owned(),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: logs.display().to_string(),
            labels,
            annotations: BTreeMap::from([
                ("kubernetes.io/config.seen".to_owned(), "2026-08-06T14:58:26Z".to_owned()),
                ("kubernetes.io/config.source".to_owned(), source.to_owned()),
            ]),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: format!(
                    "{}/besteffort/pod{uid}",
                    self.config.cgroup_root.clone().unwrap_or_default()
                ),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let sandbox_id = runtime.run_sandbox(sandbox.clone()).await.expect("a sandbox");
        let mut labels = identity;
        labels.insert("io.kubernetes.container.name".to_owned(), "a".to_owned());
        let annotations = [
            ("io.kubernetes.container.hash", hash),
            ("io.kubernetes.container.restartCount", "2"),
            ("io.kubernetes.container.terminationMessagePath", "/dev/termination-log"),
            ("io.kubernetes.container.terminationMessagePolicy", "File"),
            ("io.kubernetes.container.ports", r#"[{"containerPort":80,"protocol":"TCP"}]"#),
            ("io.kubernetes.pod.terminationGracePeriod", "1"),
        ];
        let bind = |container_path: &str, host_path: PathBuf| v1::Mount {
            container_path: container_path.to_owned(),
            host_path: host_path.display().to_string(),
            ..Default::default()
        };
        let image = runtime.image_status(IMAGE).await.expect("answers").expect("is there");
        let config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "a".to_owned(), attempt: 2 }),
            image: Some(v1::ImageSpec { image: image.id, ..Default::default() }),
            command: pod["spec"]["containers"][0]["command"]
                .as_array()
                .expect("a command")
                .iter()
                .map(|word| word.as_str().expect("a word").to_owned())
                .collect(),
            mounts: vec![
                bind("/text", volume),
                bind("/etc/hosts", folder.join("etc-hosts")),
                bind("/dev/termination-log", folder.join("containers/a/1a2b3c4d")),
            ],
            labels,
            annotations: annotations
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into_iter()
                .collect(),
            log_path: "a/2.log".to_owned(),
            linux: Some(v1::LinuxContainerConfig {
                security_context: Some(v1::LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let id = runtime.create_container(&sandbox_id, config, sandbox).await.expect("is made");
        runtime.start_container(&id).await.expect("starts");
        id
    }

    /// Starts our engine on what was taken over, as the agent does; returns it and the pods.
    async fn engine(&self) -> (Agent, Arc<Store>) {
        let (store, opened) = Store::open(&self.config.database()).expect("opens");
        let store = Arc::new(store);
        let (_, effects) = Meta::restore(NODE, opened.rows, opened.tombstones);
        let (lookups, _) = mpsc::channel(1);
        let objects = Arc::new(StoredObjects::new(store.clone(), lookups));
        let mut config = EngineConfig::new(
            NODE,
            self.config.pod_dir.clone(),
            self.config.pod_log_dir.clone(),
            self.config.runtime_socket.clone(),
        );
        config.cgroup_root = self.config.cgroup_root.clone().unwrap_or_default();
        let (engine, events) = Engine::start(config, objects, store.clone()).await.expect("starts");
        let pods = effects.into_iter().filter_map(|effect| match effect {
            Effect::PodUpsert(pod) => Some(Arc::new(*pod)),
            _ => None,
        });
        engine.set_pods(pods.collect()).await;
        (Agent::new(engine, events), store)
    }
}

async fn until(what: &str, mut met: impl FnMut() -> bool) {
    for _ in 0..600 {
        if met() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("{what} did not come to pass");
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_goes_from_kubeedge_to_us_and_back_and_no_container_is_restarted() {
    if let Some(why) = unable() {
        eprintln!("skipped: {why}");
        return;
    }
    let _turn = TURN.lock().await;
    let machine = Machine::start().await;
    let node = Node::new(&machine);
    let runtime = machine.runtime();

    // What KubeEdge left: two running pods, one of them made by an older kubelet.
    let (web, old) = (pod("web", spec("sleep 1000")), pod("old", spec("sleep 1000")));
    let web_id = node.start_as_kubelet(&runtime, &web, HASH, "api").await;
    let old_id = node.start_as_kubelet(&runtime, &old, "3f2a91c4", "api").await;
    let fixed_id =
        node.start_as_kubelet(&runtime, &pod("fixed", spec("sleep 1000")), HASH, "file").await;
    node.fill(&[
        ("default/pod/web", web),
        ("default/pod/old", old),
        ("default/configmap/text", config_map("before", "7")),
    ]);

    let plan = adopt::plan_adopt(&node.file).await.expect("a plan");
    assert!(!plan.already && plan.running.is_none(), "{plan:?}");
    assert_eq!(plan.restarts().count(), 0, "{:?}", plan.containers);
    let mut ids: Vec<&str> = plan.containers.iter().map(|one| one.id.as_str()).collect();
    ids.sort_unstable();
    let mut expected = [web_id.as_str(), old_id.as_str()];
    expected.sort_unstable();
    assert_eq!(ids, expected);
    assert!(!node.config.database().exists(), "a plan changes nothing");
    let told = plan.warnings.iter().any(|warning| warning.contains("pod `default/fixed`"));
    assert!(told, "{:?}", plan.warnings);
    plan.carry_out().expect("done");
    assert!(adopt::plan_adopt(&node.file).await.expect("a plan").already);

    let (mut agent, store) = node.engine().await;
    for (uid, id) in [("web-uid", &web_id), ("old-uid", &old_id)] {
        let status = agent.wait_running(uid).await;
        let container = &status["containerStatuses"][0];
        assert_eq!(container["containerID"], format!("containerd://{id}"));
        assert_eq!(container["restartCount"], 2);
    }
    // The volume that kubelet made goes on as ours: swapped as a whole, seen by the running container.
    let row = skerry_edge_core::meta::Row {
        path: "default/configmap/text".into(),
        kind: "configmap".into(),
        uid: "text".into(),
        rv: "8".into(),
        json: config_map("after", "8").to_string(),
    };
    store.write(skerry_edge_core::meta::Write::Put(row)).await.expect("written");
    let kind = skerry_edge::pods::ObjectKind::ConfigMap;
    agent.engine.objects_changed(kind, "default", "text").await;
    // A pod from a file on the node is nobody's to stop, and its image in the API is not run.
    let mut mirror = pod("mirror", spec("sleep 1000"));
    mirror["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "x"});
    let mirror = serde_json::from_value(mirror).expect("a pod");
    agent.engine.upsert(Arc::new(mirror)).await;
    let seen = node.dir.join("kubelet/pods/web-uid/volumes/kubernetes.io~configmap/text/file");
    until("the new content", || read(&seen) == "after").await;
    let output = runtime
        .exec_sync(
            &web_id,
            &["cat".into(), "/text/file".into()],
            std::time::Duration::from_secs(10),
        )
        .await
        .expect("runs");
    assert_eq!(output.stdout, b"after");

    // One of them ends; what follows it is ours, and carries kubelet's marks.
    runtime.stop_container(&web_id, std::time::Duration::ZERO).await.expect("stops");
    let status = agent
        .wait("web-uid", "a restart", |status| {
            status["containerStatuses"][0]["restartCount"] == 3
                && status["containerStatuses"][0]["state"]["running"].is_object()
        })
        .await;
    let made = status["containerStatuses"][0]["containerID"].as_str().expect("an id").to_owned();
    let made = made.trim_start_matches("containerd://").to_owned();
    let answer = runtime.container_status(&made).await.expect("answers").expect("is there");
    let marks = &answer.annotations;
    assert_eq!(marks["io.kubernetes.container.hash"], HASH);
    assert_eq!(marks["io.kubernetes.container.restartCount"], "3");
    assert_eq!(marks["io.kubernetes.pod.terminationGracePeriod"], "1");
    assert_eq!(
        marks["io.kubernetes.container.ports"],
        r#"[{"containerPort":80,"protocol":"TCP"}]"#
    );
    assert!(answer.log_path.ends_with("default_web_web-uid/a/3.log"), "{}", answer.log_path);

    // And back.
    drop(agent);
    until("the database to be left", || Arc::strong_count(&store) == 1).await;
    drop(store);
    let plan = adopt::plan_release(&node.file).await.expect("a plan");
    assert!(!plan.already && plan.running.is_none(), "{plan:?}");
    assert_eq!(plan.restarts().count(), 0, "{:?}", plan.containers);
    let written: Vec<&str> = plan
        .objects
        .iter()
        .filter(|object| object.change == Change::Write)
        .map(|object| object.path.as_str())
        .collect();
    assert_eq!(written, ["default/configmap/text"]);
    plan.carry_out().expect("done");
    assert!(adopt::plan_release(&node.file).await.expect("a plan").already);
    let value: String = node
        .database()
        .query_row("SELECT value FROM meta WHERE key = 'default/configmap/text'", [], |row| {
            row.get(0)
        })
        .expect("a row");
    assert!(value.contains("after"), "{value}");

    // And here once more: nothing has moved.
    let plan = adopt::plan_adopt(&node.file).await.expect("a plan");
    assert_eq!(plan.restarts().count(), 0, "{:?}", plan.containers);
    plan.carry_out().expect("done");
    let (mut agent, store) = node.engine().await;
    for (uid, id) in [("web-uid", &made), ("old-uid", &old_id)] {
        let status = agent.wait_running(uid).await;
        let id = format!("containerd://{id}");
        assert_eq!(status["containerStatuses"][0]["containerID"], id);
    }
    let fixed = runtime.container_status(&fixed_id).await.expect("answers").expect("is there");
    assert_eq!(fixed.state, v1::ContainerState::ContainerRunning as i32);
    let sandboxes = runtime.list_sandboxes(&[]).await.expect("lists");
    let made = |name: &str| {
        let named = sandboxes.iter().filter_map(|sandbox| sandbox.metadata.as_ref());
        named.filter(|metadata| metadata.name == name).count()
    };
    assert_eq!((made("fixed"), made("mirror"), sandboxes.len()), (1, 0, 3));
    let fixed = sandboxes
        .iter()
        .find(|sandbox| sandbox.metadata.as_ref().is_some_and(|metadata| metadata.name == "fixed"));
    let fixed = fixed.expect("is there").id.clone();
    runtime.stop_sandbox(&fixed).await.expect("stops");
    runtime.remove_sandbox(&fixed).await.expect("is removed");
    let cgroup = format!("skt{}/besteffort/podfixed-uid", std::process::id());
    for top in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        let _ = fs::remove_dir(top.path().join(&cgroup)); // kubelet's to remove
    }
    let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&cgroup));
    drop(store);
    machine.finish(agent).await;
}
