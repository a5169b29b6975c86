//! The pod engine against a real containerd.
//!
//! Each test has a containerd of its own below a temporary directory and leaves no process, mount
//! or interface behind. Without root or without the programs, a test says so and passes.

mod pods_adopt;
mod pods_support;

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use pods_support::{Agent, IMAGE, Machine, TURN, pod, shell, unable};
use serde_json::{Value, json};
use skerry_edge::pods::{Limit, ObjectKind};

/// Runs a test on a machine of its own; the body ends with the agent that is left.
macro_rules! on_machine {
    ($machine:ident, $agent:ident, $body:block) => {
        if let Some(why) = unable() {
            eprintln!("SKIPPED: this host cannot run pods: {why}");
            return;
        }
        let _turn = TURN.lock().await;
        #[allow(unused_mut)]
        let mut $machine = Machine::start().await;
        let mut $agent = $machine.engine().await;
        let last = $body;
        $machine.finish(last).await;
    };
}

fn container_id(status: &Value, index: usize) -> String {
    status["containerStatuses"][index]["containerID"].as_str().expect("has an id").to_owned()
}

async fn output(agent: &Agent, pod: &str, command: &[&str]) -> String {
    let command: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
    let timeout = std::time::Duration::from_secs(10);
    let output = agent.engine.exec("default", pod, "a", &command, timeout).await.expect("runs");
    assert_eq!(output.exit_code, 0, "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn deleted(pod: &Pod, grace: i64) -> Arc<Pod> {
    let mut pod = pod.clone();
    pod.metadata.deletion_grace_period_seconds = Some(grace);
    pod.metadata.deletion_timestamp =
        Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).expect("time parses"));
    Arc::new(pod)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pod_runs_with_its_environment_and_volumes() {
    on_machine!(machine, agent, {
        let host = machine.dir.join("host");
        std::fs::create_dir(&host).expect("made");
        std::fs::write(host.join("file"), "from the host").expect("written");
        machine.store.put_config_map("settings", json!({"colour": "green", "app.conf": "x=1"}));
        machine.store.put_secret("login", json!({"password": "aHVudGVyMg=="}));
        let mut container = shell("a", "echo out; echo err >&2; exec sleep 1000");
        container["env"] = json!([
            {"name": "PLAIN", "value": "p"},
            {"name": "COLOUR", "valueFrom":
                {"configMapKeyRef": {"name": "settings", "key": "colour"}}},
            {"name": "BOTH", "value": "$(PLAIN)-$(COLOUR)"},
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "PASSWORD", "valueFrom":
                {"secretKeyRef": {"name": "login", "key": "password"}}},
        ]);
        container["volumeMounts"] = json!([
            {"name": "settings", "mountPath": "/settings"},
            {"name": "login", "mountPath": "/login", "readOnly": true},
            {"name": "scratch", "mountPath": "/scratch"},
            {"name": "memory", "mountPath": "/memory"},
            {"name": "host", "mountPath": "/host"},
            {"name": "settings", "mountPath": "/one.conf", "subPath": "app.conf"},
        ]);
        container["resources"] = json!({"limits": {"memory": "64Mi", "cpu": "500m"}});
        let pod = pod(
            "web",
            json!({
                "containers": [container],
                "volumes": [
                    {"name": "settings", "configMap": {"name": "settings"}},
                    {"name": "login", "secret": {"secretName": "login", "defaultMode": 256}},
                    {"name": "scratch", "emptyDir": {}},
                    {"name": "memory", "emptyDir": {"medium": "Memory"}},
                    {"name": "host", "hostPath": {"path": host, "type": "Directory"}},
                ],
            }),
        );
        agent.engine.set_pods(vec![pod.clone()]).await;
        let status = agent.wait_running("web-uid").await;

        assert_eq!(status["qosClass"], "Guaranteed");
        assert_eq!(status["hostIP"], "192.0.2.7");
        let ip = status["podIP"].as_str().expect("has an address").to_owned();
        assert!(ip.starts_with("10.197.0."), "{ip}");
        let environment = output(&agent, "web", &["env"]).await;
        for line in ["BOTH=p-green", "PASSWORD=hunter2", &format!("POD_IP={ip}")] {
            assert!(environment.lines().any(|found| found == line), "{line}: {environment}");
        }
        assert_eq!(output(&agent, "web", &["cat", "/settings/app.conf"]).await, "x=1");
        assert_eq!(output(&agent, "web", &["cat", "/one.conf"]).await, "x=1");
        assert_eq!(output(&agent, "web", &["cat", "/login/password"]).await, "hunter2");
        assert_eq!(output(&agent, "web", &["cat", "/host/file"]).await, "from the host");
        output(&agent, "web", &["sh", "-c", "touch /scratch/f /memory/f"]).await;
        let hosts = output(&agent, "web", &["cat", "/etc/hosts"]).await;
        assert!(hosts.contains(&format!("{ip}\tweb")), "{hosts}");

        let log = agent.engine.log_path("default", "web", "", false).expect("has a log");
        assert!(log.running);
        let text = std::fs::read_to_string(&log.path).expect("log can be read");
        assert!(text.contains(" stdout F out") && text.contains(" stderr F err"), "{text}");
        let images = agent.engine.images().await.expect("lists");
        let named = |image: &&str| {
            images.iter().any(|one| one.names.iter().flatten().any(|name| name == image))
        };
        assert!(named(&IMAGE), "{images:?}");

        // A changed object reaches the volume, and nothing is restarted.
        machine.store.put_config_map("settings", json!({"app.conf": "x=2"}));
        agent.engine.objects_changed(ObjectKind::ConfigMap, "default", "settings").await;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while output(&agent, "web", &["cat", "/settings/app.conf"]).await != "x=2" {
            assert!(std::time::Instant::now() < deadline, "the volume stays old");
        }
        let now = agent.engine.status("web-uid").expect("has a status");
        let now = serde_json::to_value(now).expect("serialises");
        assert_eq!(container_id(&now, 0), container_id(&status, 0));

        // Runtime state is read on the side.
        let info = agent.engine.runtime().borrow().clone();
        assert!(info.ready && info.network_ready, "{info:?}");
        assert!(info.version.starts_with("containerd://"), "{info:?}");
        agent
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn init_containers_come_first_and_a_job_ends() {
    on_machine!(machine, agent, {
        let mut init = shell("i", "echo made > /scratch/file");
        let mut main = shell("a", "cat /scratch/file; echo last words > /dev/termination-log");
        let mount = json!([{"name": "work", "mountPath": "/scratch"}]);
        init["volumeMounts"] = mount.clone();
        main["volumeMounts"] = mount;
        let pod = pod(
            "job",
            json!({
                "restartPolicy": "Never",
                "initContainers": [init],
                "containers": [main],
                "volumes": [{"name": "work", "emptyDir": {}}],
            }),
        );
        agent.engine.set_pods(vec![pod]).await;
        let status =
            agent.wait("job-uid", "a finished job", |status| status["phase"] == "Succeeded").await;
        let ended = &status["containerStatuses"][0]["state"]["terminated"];
        assert_eq!(ended["reason"], "Completed");
        assert_eq!(ended["message"], "last words\n");
        assert_eq!(status["initContainerStatuses"][0]["ready"], true);
        assert_eq!(status["conditions"][1]["reason"], "PodCompleted");
        let log = agent.engine.log_path("default", "job", "a", false).expect("has a log");
        assert!(std::fs::read_to_string(log.path).expect("is kept").contains("made"));
        agent
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crashing_container_is_restarted_at_once_and_then_backs_off() {
    on_machine!(machine, agent, {
        agent
            .engine
            .set_pods(vec![pod("crash", json!({"containers": [shell("a", "exit 7")]}))])
            .await;
        let status = agent
            .wait("crash-uid", "a back-off", |status| {
                status["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
            })
            .await;
        let container = &status["containerStatuses"][0];
        assert_eq!(container["restartCount"], 1);
        assert_eq!(container["lastState"]["terminated"]["exitCode"], 7);
        assert_eq!(status["phase"], "Running");
        assert_eq!(
            container["state"]["waiting"]["message"],
            "back-off 10s restarting failed container=a pod=crash_default(crash-uid)"
        );
        let record = &machine.store.restarts_of("crash-uid")[0];
        assert_eq!((record.restart_count, record.delay_secs), (1, 10));

        // Neither the count nor the delay is lost with the agent.
        drop(agent);
        let mut agent = machine.engine().await;
        agent
            .engine
            .set_pods(vec![pod("crash", json!({"containers": [shell("a", "exit 7")]}))])
            .await;
        let status = agent
            .wait("crash-uid", "a back-off", |status| {
                status["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
            })
            .await;
        assert_eq!(status["containerStatuses"][0]["restartCount"], 1);
        agent.engine.log_path("default", "crash", "a", true).expect("the first log is kept");
        let status = agent
            .wait("crash-uid", "a second restart", |status| {
                status["containerStatuses"][0]["restartCount"] == 2
            })
            .await;
        assert_eq!(status["phase"], "Running");
        agent
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn running_containers_are_adopted_by_the_next_agent() {
    on_machine!(machine, agent, {
        let pods = || vec![pod("stay", json!({"containers": [shell("a", "exec sleep 1000")]}))];
        agent.engine.set_pods(pods()).await;
        let before = agent.wait_running("stay-uid").await;
        drop(agent);
        let mut agent = machine.engine().await;
        agent.engine.set_pods(pods()).await;
        let after = agent.wait_running("stay-uid").await;
        assert_eq!(container_id(&before, 0), container_id(&after, 0));
        assert_eq!(after["containerStatuses"][0]["restartCount"], 0);
        assert_eq!(after["podIP"], before["podIP"]);
        assert!(agent.told.is_empty(), "nothing was done: {:?}", agent.told);
        agent
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_pod_gets_its_grace_and_leaves_nothing() {
    on_machine!(machine, agent, {
        let host = machine.dir.join("traces");
        std::fs::create_dir(&host).expect("made");
        let mut container = shell(
            "a",
            "trap 'echo term >> /host/trace; exit 0' TERM; while true; do sleep 1 & wait; done",
        );
        container["volumeMounts"] = json!([{"name": "host", "mountPath": "/host"}]);
        container["lifecycle"] =
            json!({"preStop": {"exec": {"command": ["sh", "-c", "echo hook >> /host/trace"]}}});
        let pod = pod(
            "end",
            json!({
                "containers": [container],
                "volumes": [{"name": "host", "hostPath": {"path": host}}],
            }),
        );
        agent.engine.set_pods(vec![pod.clone()]).await;
        agent.wait_running("end-uid").await;
        agent.engine.upsert(deleted(&pod, 20)).await;
        agent.wait_gone("end-uid").await;
        let trace = std::fs::read_to_string(host.join("trace")).expect("left a trace");
        assert_eq!(trace, "hook\nterm\n");
        let last = serde_json::to_value(&agent.statuses["end-uid"]).expect("serialises");
        assert_eq!(last["phase"], "Succeeded");
        assert!(!machine.dir.join("kubelet/pods/end-uid").exists());
        assert!(!machine.dir.join("logs/default_end_end-uid").exists());
        assert!(machine.runtime().list_containers(&[]).await.expect("lists").is_empty());
        assert!(agent.engine.status("end-uid").is_none());

        // A pod that nobody knows is gone already.
        agent.engine.remove("default", "none", "none-uid").await;
        agent.wait_gone("none-uid").await;
        agent
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn image_that_cannot_be_had_shows_as_kubelet_shows_it() {
    on_machine!(machine, agent, {
        let missing = json!({"name": "a", "image": "127.0.0.1:1/none:1"});
        let never =
            json!({"name": "a", "image": "skerry.local/none:1", "imagePullPolicy": "Never"});
        let mut always = shell("a", "exec sleep 1000");
        always["imagePullPolicy"] = json!("Always");
        agent
            .engine
            .set_pods(vec![
                pod("missing", json!({"containers": [missing]})),
                pod("never", json!({"containers": [never]})),
                pod("always", json!({"containers": [always]})),
            ])
            .await;
        let reason =
            |status: &Value| status["containerStatuses"][0]["state"]["waiting"]["reason"].clone();
        agent.wait("missing-uid", "a failed pull", |status| reason(status) == "ErrImagePull").await;
        let status = agent
            .wait("missing-uid", "a delayed pull", |status| reason(status) == "ImagePullBackOff")
            .await;
        assert_eq!(status["phase"], "Pending");
        let message = status["containerStatuses"][0]["state"]["waiting"]["message"].clone();
        let message = message.as_str().expect("has a message");
        assert!(
            message.starts_with("Back-off pulling image \"127.0.0.1:1/none:1\": ErrImagePull: "),
            "{message}"
        );
        agent
            .wait("never-uid", "a refused pull", |status| reason(status) == "ErrImageNeverPull")
            .await;
        // Offline, the copy on the node is better than nothing.
        agent.wait_running("always-uid").await;
        agent.wait_told("ImagePullSkippedOffline").await;
        agent
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_that_are_not_in_the_list_are_removed_only_once_there_is_a_list() {
    on_machine!(machine, agent, {
        let kept = || pod("kept", json!({"containers": [shell("a", "exec sleep 1000")]}));
        let lost = pod(
            "lost",
            json!({
                "containers": [shell("a", "exec sleep 1000")],
            }),
        );
        let deleted = pod("deleted", json!({"containers": [shell("a", "exec sleep 1000")]}));
        agent.engine.set_pods(vec![kept(), lost, deleted]).await;
        let before = agent.wait_running("kept-uid").await;
        agent.wait_running("lost-uid").await;
        agent.wait_running("deleted-uid").await;
        drop(agent);

        let mut agent = machine.engine().await;
        let known_deleted = ["deleted-uid".to_owned()].into();
        agent.engine.resume(vec![kept()], known_deleted).await;
        agent.wait_running("kept-uid").await;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        let left = loop {
            let left = machine.runtime().list_sandboxes(&[]).await.expect("lists");
            if left.len() < 3 {
                break left;
            }
            assert!(std::time::Instant::now() < deadline, "the deleted pod stays");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        };
        let uids: std::collections::BTreeSet<&str> =
            left.iter().map(|one| one.labels["io.kubernetes.pod.uid"].as_str()).collect();
        let expected = ["kept-uid", "lost-uid"].into();
        assert_eq!(uids, expected, "what nobody deleted stays until the list is trusted");
        agent.engine.set_pods(vec![kept()]).await;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while machine.runtime().list_sandboxes(&[]).await.expect("lists").len() > 1 {
            assert!(std::time::Instant::now() < deadline, "the orphan stays");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        let after = agent.wait_running("kept-uid").await;
        assert_eq!(container_id(&before, 0), container_id(&after, 0));
        assert!(agent.gone.is_empty(), "nobody asked about the orphan");
        agent
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_objects_hold_a_pod_back_until_they_come() {
    on_machine!(machine, agent, {
        let mut mounts = shell("a", "exec sleep 1000");
        mounts["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
        let mut env = shell("a", "exec sleep 1000");
        env["envFrom"] = json!([{"configMapRef": {"name": "late"}}]);
        agent
            .engine
            .set_pods(vec![
                pod(
                    "mounts",
                    json!({"containers": [mounts],
                    "volumes": [{"name": "v", "configMap": {"name": "late"}}]}),
                ),
                pod("env", json!({"containers": [env]})),
            ])
            .await;
        let event = agent.wait_told("FailedMount").await;
        assert_eq!(
            event.message,
            "MountVolume.SetUp failed for volume \"v\" : configmap \"late\" not found"
        );
        let status = agent
            .wait("env-uid", "a configuration error", |status| {
                status["containerStatuses"][0]["state"]["waiting"]["reason"]
                    == "CreateContainerConfigError"
            })
            .await;
        assert_eq!(
            status["containerStatuses"][0]["state"]["waiting"]["message"],
            "configmap \"late\" not found"
        );
        machine.store.put_config_map("late", json!({"K": "v"}));
        agent.engine.objects_changed(ObjectKind::ConfigMap, "default", "late").await;
        agent.wait_running("env-uid").await;
        agent.wait_running("mounts-uid").await;
        agent
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_decide_about_readiness_and_life() {
    on_machine!(machine, agent, {
        let mut container = shell("a", "touch /tmp/alive; exec httpd -f -p 8080 -h /tmp");
        let fast = |check: Value| {
            let mut probe = json!({"periodSeconds": 1, "failureThreshold": 1});
            probe
                .as_object_mut()
                .expect("object")
                .extend(check.as_object().expect("object").clone());
            probe
        };
        container["startupProbe"] =
            fast(json!({"tcpSocket": {"port": 8080}, "failureThreshold": 30}));
        container["readinessProbe"] = fast(json!({"httpGet": {"path": "/ready", "port": 8080}}));
        container["livenessProbe"] =
            fast(json!({"exec": {"command": ["test", "-e", "/tmp/alive"]}}));
        container["terminationMessagePath"] = json!("/dev/termination-log");
        let pod = pod("probed", json!({"containers": [container]}));
        agent.engine.set_pods(vec![pod]).await;
        let status = agent
            .wait("probed-uid", "a start", |status| {
                status["containerStatuses"][0]["started"] == true
            })
            .await;
        assert_eq!(status["containerStatuses"][0]["ready"], false);
        let event = agent.wait_told("Unhealthy").await;
        assert!(event.message.contains("probe failed"), "{}", event.message);
        output(&agent, "probed", &["touch", "/tmp/ready"]).await;
        agent.wait_running("probed-uid").await;
        output(&agent, "probed", &["rm", "/tmp/alive"]).await;
        let status = agent
            .wait("probed-uid", "a restart", |status| {
                status["containerStatuses"][0]["restartCount"] == 1
                    && status["containerStatuses"][0]["state"]["running"].is_object()
            })
            .await;
        assert_ne!(status["containerStatuses"][0]["lastState"], Value::Null);
        assert!(agent.told.iter().any(|event| {
            event.message == "Container a failed liveness probe, will be restarted"
        }));
        agent
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_pods_start_at_once() {
    on_machine!(machine, agent, {
        let make = |name: &str| pod(name, json!({"containers": [shell("a", "exec sleep 1000")]}));
        agent.engine.set_pods(Vec::new()).await;
        let started = std::time::Instant::now();
        agent.engine.upsert(make("alone")).await;
        agent.wait_running("alone-uid").await;
        let one = started.elapsed();
        let started = std::time::Instant::now();
        for number in 0..10 {
            agent.engine.upsert(make(&format!("many-{number}"))).await;
        }
        for number in 0..10 {
            agent.wait_running(&format!("many-{number}-uid")).await;
        }
        let ten = started.elapsed();
        eprintln!("one pod ran after {one:?}, ten after {ten:?}");
        let addresses: std::collections::BTreeSet<Option<String>> =
            agent.statuses.values().map(|status| status.pod_ip.clone()).collect();
        assert_eq!(addresses.len(), 11, "each pod has its own address");
        agent
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_outlive_the_runtime_and_the_engine_finds_it_again() {
    on_machine!(machine, agent, {
        let make = |name: &str| pod(name, json!({"containers": [shell("a", "exec sleep 1000")]}));
        agent.engine.set_pods(vec![make("old")]).await;
        let before = agent.wait_running("old-uid").await;
        let mut info = agent.engine.runtime();
        machine.stop_containerd().await;
        info.wait_for(|info| !info.ready).await.expect("the engine lives");
        assert_eq!(info.borrow().message, "container runtime is down");
        agent.engine.upsert(make("new")).await;
        machine.start_containerd().await;
        agent.wait_running("new-uid").await;
        info.wait_for(|info| info.ready && info.network_ready).await.expect("the engine lives");
        let after = agent.wait_running("old-uid").await;
        assert_eq!(container_id(&before, 0), container_id(&after, 0));
        assert_eq!(after["containerStatuses"][0]["restartCount"], 0);
        agent
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pod_of_the_same_name_waits_until_the_old_one_is_gone() {
    on_machine!(machine, agent, {
        let make = || pod("twin", json!({"containers": [shell("a", "exec sleep 1000")]}));
        agent.engine.set_pods(vec![make()]).await;
        agent.wait_running("twin-uid").await;
        let mut second = Pod::clone(&make());
        second.metadata.uid = Some("twin-2".to_owned());
        agent.engine.upsert(Arc::new(second)).await;
        agent.engine.upsert(deleted(&make(), 1)).await;
        agent.wait_running("twin-2").await;
        assert_eq!(agent.gone, ["twin-uid"], "the first was gone before the second ran");
        agent
    });
}

/// A container that ends when it is asked to.
fn polite(name: &str) -> Value {
    shell(name, "trap 'exit 0' TERM; while true; do sleep 0.1; done")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workload_is_restarted_for_a_rule_and_others_are_left_alone() {
    on_machine!(machine, agent, {
        let make = |name: &str| pod(name, json!({"containers": [polite("a")]}));
        agent.engine.set_pods(vec![make("web-1"), make("web-2"), make("webber")]).await;
        let mut before = Vec::new();
        for uid in ["web-1-uid", "web-2-uid", "webber-uid"] {
            before.push(container_id(&agent.wait_running(uid).await, 0));
        }
        agent.engine.restart("default", "web").await.expect("restarts");
        for (uid, old) in [("web-1-uid", &before[0]), ("web-2-uid", &before[1])] {
            let restarted = |status: &Value| {
                status["containerStatuses"][0]["restartCount"] == 1
                    && status["containerStatuses"][0]["state"]["running"].is_object()
            };
            let status = agent.wait(uid, "a restarted container", restarted).await;
            assert_ne!(container_id(&status, 0), *old);
        }
        let other = agent.wait_running("webber-uid").await;
        assert_eq!(container_id(&other, 0), before[2], "`webber` is no pod of `web`");
        let error = agent.engine.restart("other", "web").await.expect_err("another namespace");
        assert_eq!(error.to_string(), "no container of it runs on this node");
        agent
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_lets_fewer_pods_of_a_workload_run_also_after_a_restart_and_lets_them_go_on() {
    on_machine!(machine, agent, {
        let limit = |replicas| {
            vec![Limit { namespace: "default".into(), workload: "web".into(), replicas }]
        };
        let make = |name: &str| pod(name, json!({"containers": [polite("a")]}));
        let held = |status: &Value| {
            status["containerStatuses"][0]["state"]["waiting"]["reason"] == "HeldByRule"
        };
        agent.engine.set_pods(vec![make("web-1"), make("web-2"), make("other")]).await;
        let first = container_id(&agent.wait_running("web-1-uid").await, 0);
        agent.wait_running("web-2-uid").await;
        let other = container_id(&agent.wait_running("other-uid").await, 0);

        agent.engine.set_limits(limit(1)).await;
        let status = agent.wait("web-2-uid", "a held pod", held).await;
        let is_ready = |condition: &Value| condition["type"] == "Ready";
        let ready =
            status["conditions"].as_array().expect("conditions").iter().find(|c| is_ready(c));
        assert_eq!(ready.expect("one")["status"], "False", "nobody sends it work");
        agent.wait_told("HeldByRule").await;
        assert_eq!(container_id(&agent.wait_running("web-1-uid").await, 0), first);

        // The next agent is told before it hears of pods, and begins nothing that may not run.
        agent.engine.set_limits(limit(0)).await;
        agent.wait("web-1-uid", "the other held pod", held).await;
        drop(agent);
        let mut agent = machine.engine().await;
        agent.engine.set_limits(limit(0)).await;
        agent
            .engine
            .set_pods(vec![make("web-1"), make("web-2"), make("web-3"), make("other")])
            .await;
        for uid in ["web-1-uid", "web-2-uid", "web-3-uid"] {
            agent.wait(uid, "a pod that stays held", held).await;
        }
        assert_eq!(container_id(&agent.wait_running("other-uid").await, 0), other);

        // When one goes another one takes its place, and without a limit all run.
        agent.engine.set_limits(limit(1)).await;
        agent.wait_running("web-1-uid").await;
        agent.engine.upsert(deleted(&make("web-1"), 1)).await;
        agent.wait_running("web-2-uid").await;
        agent.engine.set_limits(Vec::new()).await;
        agent.wait_running("web-3-uid").await;
        agent
    });
}
