//! The controllers against the server in this process: one scenario each, with a kubelet of a few lines.

use http::{Method, Request};
use serde_json::{Value, json};
use skerry_apiserver::controllers::{Settings, run_with};
use skerry_apiserver::{ApiServer, Config, Durability};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Longest wait for a state; a loaded machine is slow, a broken one never gets there.
const PATIENCE: Duration = Duration::from_secs(30);

struct Cluster {
    server: ApiServer,
    client: kube::Client,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

impl Cluster {
    async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let server = ApiServer::start(Config {
            dir: dir.path().to_owned(),
            listen: "127.0.0.1:0".parse().expect("an address"),
            hostnames: Vec::new(),
            node_streams: None,
            durability: Durability::Relaxed,
            controllers: false,
        })
        .await
        .expect("the server starts");
        let stop = CancellationToken::new();
        let own = "system:kube-controller-manager";
        let settings = Settings { node_grace_seconds: 2, quarantine_seconds: 1 };
        tokio::spawn(run_with(server.client(own, &[own]), settings, stop.clone()));
        let client = server.client("admin", &["system:masters"]);
        Self { server, client, stop, _dir: dir }
    }

    async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> kube::Result<Value> {
        let content = if method == Method::PATCH {
            "application/merge-patch+json"
        } else {
            "application/json"
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", content)
            .body(body.map(|body| body.to_string().into_bytes()).unwrap_or_default())
            .expect("a request");
        self.client.request(request).await
    }

    async fn get(&self, path: &str) -> Option<Value> {
        self.send(Method::GET, path, None).await.ok()
    }

    async fn list(&self, path: &str) -> Vec<Value> {
        let list = self.send(Method::GET, path, None).await.expect("a list");
        list["items"].as_array().expect("items").clone()
    }

    async fn create(&self, path: &str, object: Value) -> Value {
        self.send(Method::POST, path, Some(&object)).await.expect("the object is accepted")
    }

    async fn patch(&self, path: &str, patch: Value) -> Value {
        self.send(Method::PATCH, path, Some(&patch)).await.expect("the patch is accepted")
    }

    /// Waits until the object at `path` satisfies `fits`.
    async fn until(&self, path: &str, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let object = self.get(path).await;
            if let Some(object) = object.as_ref().filter(|object| fits(object)) {
                return object.clone();
            }
            assert!(start.elapsed() < PATIENCE, "no {what} at {path}: {object:#?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Waits until the list at `path` satisfies `fits`.
    async fn until_list(
        &self,
        path: &str,
        what: &str,
        fits: impl Fn(&[Value]) -> bool,
    ) -> Vec<Value> {
        let list =
            self.until(path, what, |list| list["items"].as_array().is_some_and(|l| fits(l))).await;
        list["items"].as_array().expect("items").clone()
    }

    /// A node that is ready.
    async fn node(&self, name: &str, labels: Value) {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}});
        self.create(NODES, node).await;
        self.ready(name, "True").await;
        self.until(&format!("{NODES}/{name}"), "node without taints", |node| {
            node.pointer("/spec/taints").is_none_or(|taints| taints == &json!([]))
                && node.pointer("/spec/podCIDR").is_some()
        })
        .await;
    }

    async fn ready(&self, node: &str, status: &str) {
        let beat = jiff::Timestamp::now().to_string();
        let status = json!({"status": {
            "allocatable": {"cpu": "4", "memory": "4Gi", "pods": "110"},
            "capacity": {"cpu": "4", "memory": "4Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": status, "reason": "KubeletReady", "message": "ok",
                "lastHeartbeatTime": beat, "lastTransitionTime": beat}]}});
        self.patch(&format!("{NODES}/{node}/status"), status).await;
    }

    /// What a kubelet does, in one round: starts bound pods, ends deleted ones, keeps nodes alive.
    async fn kubelet(&self, end: Option<&str>) {
        for pod in self.list("/api/v1/pods").await {
            let path = format!(
                "/api/v1/namespaces/{}/pods/{}",
                text(&pod, "/metadata/namespace"),
                text(&pod, "/metadata/name")
            );
            if text(&pod, "/spec/nodeName").is_empty() {
                continue;
            }
            let phase = text(&pod, "/status/phase");
            if pod.pointer("/metadata/deletionTimestamp").is_some() {
                let now = json!({"gracePeriodSeconds": 0});
                let _ = self.send(Method::DELETE, &path, Some(&now)).await;
            } else if matches!(phase, "" | "Pending") || (phase == "Running" && end.is_some()) {
                let ip = format!(
                    "10.0.0.{}",
                    1 + text(&pod, "/metadata/uid").bytes().map(u32::from).sum::<u32>() % 250
                );
                let ready = if end.is_some() { "False" } else { "True" };
                let status = json!({"status": {"phase": end.unwrap_or("Running"), "podIP": ip,
                    "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
                let _ = self.send(Method::PATCH, &format!("{path}/status"), Some(&status)).await;
            }
        }
        for node in self.list(NODES).await {
            self.ready(text(&node, "/metadata/name"), "True").await;
        }
    }

    /// Runs kubelet rounds until the object at `path` satisfies `fits`.
    async fn run_until(
        &self,
        end: Option<&str>,
        path: &str,
        what: &str,
        fits: impl Fn(&Value) -> bool,
    ) -> Value {
        let start = Instant::now();
        loop {
            self.kubelet(end).await;
            let object = self.get(path).await;
            if let Some(object) = object.as_ref().filter(|object| fits(object)) {
                return object.clone();
            }
            assert!(start.elapsed() < PATIENCE, "no {what} at {path}: {object:#?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn has_event(&self, reason: &str, message: &str) {
        self.until_list("/api/v1/events", &format!("event {reason}: {message}"), |events| {
            events.iter().any(|event| {
                text(event, "/reason") == reason && text(event, "/message").contains(message)
            })
        })
        .await;
    }

    async fn end(self) {
        self.stop.cancel();
        self.server.shutdown().await;
    }
}

const NODES: &str = "/api/v1/nodes";
const PODS: &str = "/api/v1/namespaces/default/pods";
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";
const REPLICA_SETS: &str = "/apis/apps/v1/namespaces/default/replicasets";
const DAEMON_SETS: &str = "/apis/apps/v1/namespaces/default/daemonsets";
const JOBS: &str = "/apis/batch/v1/namespaces/default/jobs";
const CRON_JOBS: &str = "/apis/batch/v1/namespaces/default/cronjobs";

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or("")
}

fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    object.pointer("/status/conditions")?.as_array()?.iter().find(|c| text(c, "/type") == kind)
}

fn reason<'a>(object: &'a Value, kind: &str) -> &'a str {
    condition(object, kind).map_or("", |condition| text(condition, "/reason"))
}

fn template(image: &str) -> Value {
    json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": image}]}})
}

fn deployment(replicas: i64) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": template("a")}})
}

fn pod(name: &str, spec: Value) -> Value {
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "c", "image": "a"}]}});
    for (key, value) in spec.as_object().expect("an object") {
        pod["spec"][key] = value.clone();
    }
    pod
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_is_bound_quickly_rolls_undoes_and_scales() {
    let cluster = Cluster::start().await;
    cluster.node("n1", json!({})).await;
    let start = Instant::now();
    cluster.create(DEPLOYMENTS, deployment(3)).await;
    cluster
        .until_list(PODS, "three bound pods", |pods| {
            pods.iter().filter(|pod| text(pod, "/spec/nodeName") == "n1").count() == 3
        })
        .await;
    println!("deployment to three bound pods: {:?}", start.elapsed());
    let path = format!("{DEPLOYMENTS}/web");
    let done = |deployment: &Value| {
        reason(deployment, "Progressing") == "NewReplicaSetAvailable"
            && deployment["status"]["observedGeneration"] == deployment["metadata"]["generation"]
    };
    let deployment = cluster.run_until(None, &path, "complete rollout", done).await;
    assert_eq!(reason(&deployment, "Available"), "MinimumReplicasAvailable");
    assert_eq!(deployment["status"]["availableReplicas"], 3);
    assert_eq!(deployment["metadata"]["annotations"]["deployment.kubernetes.io/revision"], "1");

    cluster.patch(&path, json!({"spec": {"template": template("b")}})).await;
    let revision = |number: &'static str| {
        move |d: &Value| {
            done(d) && text(d, "/metadata/annotations/deployment.kubernetes.io~1revision") == number
        }
    };
    cluster.run_until(None, &path, "second revision", revision("2")).await;
    let sets = cluster.list(REPLICA_SETS).await;
    let mut sizes: Vec<i64> =
        sets.iter().filter_map(|set| set["spec"]["replicas"].as_i64()).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [0, 3]);

    cluster.patch(&path, json!({"spec": {"template": template("a")}})).await;
    cluster.run_until(None, &path, "third revision", revision("3")).await;
    assert_eq!(cluster.list(REPLICA_SETS).await.len(), 2);

    cluster.patch(&path, json!({"spec": {"replicas": 1}})).await;
    cluster
        .run_until(None, &path, "smaller deployment", |d| d["status"]["replicas"] == 1 && done(d))
        .await;
    cluster.has_event("ScalingReplicaSet", "Scaled up replica set web-").await;
    cluster.has_event("SuccessfulCreate", "Created pod: web-").await;
    cluster.has_event("Scheduled", "Successfully assigned default/web-").await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_fits_nowhere_says_why_and_is_bound_when_a_node_fits() {
    let cluster = Cluster::start().await;
    cluster.node("n1", json!({})).await;
    cluster.create(PODS, pod("p", json!({"nodeSelector": {"site": "x"}}))).await;
    let path = format!("{PODS}/p");
    let waiting = cluster
        .until(&path, "condition", |pod| reason(pod, "PodScheduled") == "Unschedulable")
        .await;
    let message = "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.";
    assert_eq!(condition(&waiting, "PodScheduled").map(|c| text(c, "/message")), Some(message));
    cluster.has_event("FailedScheduling", message).await;
    cluster.patch(&format!("{NODES}/n1"), json!({"metadata": {"labels": {"site": "x"}}})).await;
    cluster.until(&path, "bound pod", |pod| text(pod, "/spec/nodeName") == "n1").await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_set_replaces_lost_pods_and_adopts_orphans() {
    let cluster = Cluster::start().await;
    cluster.node("n1", json!({})).await;
    cluster.create(PODS, pod("orphan", json!({}))).await;
    let set = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {"name": "web"},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": template("a")}});
    cluster.create(REPLICA_SETS, set).await;
    let path = format!("{REPLICA_SETS}/web");
    cluster
        .run_until(None, &path, "two ready pods", |set| set["status"]["readyReplicas"] == 2)
        .await;
    let orphan = cluster.get(&format!("{PODS}/orphan")).await.expect("the pod");
    assert_eq!(text(&orphan, "/metadata/ownerReferences/0/name"), "web");
    cluster
        .patch(&format!("{PODS}/orphan"), json!({"metadata": {"labels": {"app": "free"}}}))
        .await;
    cluster
        .until(&format!("{PODS}/orphan"), "released pod", |pod| {
            pod.pointer("/metadata/ownerReferences").is_none_or(|owners| owners == &json!([]))
        })
        .await;
    let labelled = format!("{PODS}?labelSelector=app%3Dweb");
    cluster.until_list(&labelled, "replacement", |pods| pods.len() == 2).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_completes_is_counted_and_expires() {
    let cluster = Cluster::start().await;
    cluster.node("n1", json!({})).await;
    let job = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"},
        "spec": {"completions": 3, "parallelism": 2, "template": {"spec": {"restartPolicy": "Never",
            "containers": [{"name": "c", "image": "a"}]}}}});
    cluster.create(JOBS, job).await;
    let path = format!("{JOBS}/j");
    let job = cluster
        .run_until(Some("Succeeded"), &path, "complete job", |job| {
            condition(job, "Complete").is_some()
        })
        .await;
    assert_eq!(job["status"]["succeeded"], 3);
    assert_eq!(reason(&job, "SuccessCriteriaMet"), "CompletionsReached");
    let pods = cluster.list(PODS).await;
    assert_eq!(pods.len(), 3);
    assert!(
        pods.iter().all(|pod| pod.pointer("/metadata/finalizers").is_none_or(|f| f == &json!([])))
    );
    assert_eq!(text(&pods[0], "/metadata/labels/job-name"), "j");
    cluster.has_event("Completed", "Job completed").await;
    cluster.patch(&path, json!({"spec": {"ttlSecondsAfterFinished": 0}})).await;
    cluster.until_list(JOBS, "no job", <[Value]>::is_empty).await;
    cluster.until_list(PODS, "no pod", <[Value]>::is_empty).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_deleted_takes_its_tracked_pods_along() {
    let cluster = Cluster::start().await;
    cluster.node("n1", json!({})).await;
    let job = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"},
        "spec": {"template": {"spec": {"restartPolicy": "OnFailure", "containers": [{"name": "c", "image": "a"}]}}}});
    cluster.create(JOBS, job).await;
    cluster
        .run_until(None, &format!("{JOBS}/j"), "active job", |job| job["status"]["ready"] == 1)
        .await;
    let background = json!({"propagationPolicy": "Background"});
    cluster.send(Method::DELETE, &format!("{JOBS}/j"), Some(&background)).await.expect("deleted");
    cluster.run_until(None, PODS, "no pod", |list| list["items"] == json!([])).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cron_job_starts_jobs_and_keeps_its_history_short() {
    let cluster = Cluster::start().await;
    cluster.node("n1", json!({})).await;
    let cron = json!({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "tick"},
        "spec": {"schedule": "@every 1s", "successfulJobsHistoryLimit": 1, "jobTemplate": {"spec": {"template":
            {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "a"}]}}}}}});
    cluster.create(CRON_JOBS, cron).await;
    let path = format!("{CRON_JOBS}/tick");
    let cron = cluster
        .run_until(Some("Succeeded"), &path, "a success", |cron| {
            cron.pointer("/status/lastSuccessfulTime").is_some()
        })
        .await;
    assert!(cron.pointer("/status/lastScheduleTime").is_some());
    let jobs = cluster.list(JOBS).await;
    assert!(text(&jobs[0], "/metadata/name").starts_with("tick-"));
    assert_eq!(text(&jobs[0], "/metadata/ownerReferences/0/kind"), "CronJob");
    cluster.has_event("SuccessfulCreate", "Created job tick-").await;
    cluster.has_event("SawCompletedJob", "condition: Complete").await;

    let zone = json!({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "local"},
        "spec": {"schedule": "* * * * *", "timeZone": "Europe/Lisbon", "jobTemplate": {"spec": {"template":
            {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "a"}]}}}}}});
    cluster.create(CRON_JOBS, zone).await;
    cluster.has_event("UnknownTimeZone", "`Europe/Lisbon` is not supported").await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_set_follows_nodes_and_updates() {
    let cluster = Cluster::start().await;
    cluster.node("n1", json!({})).await;
    cluster.node("n2", json!({})).await;
    let set = json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "agent"},
        "spec": {"selector": {"matchLabels": {"app": "web"}}, "template": template("a")}});
    cluster.create(DAEMON_SETS, set).await;
    let path = format!("{DAEMON_SETS}/agent");
    let ready = |count: i64| {
        move |set: &Value| {
            set["status"]["numberAvailable"] == count
                && set["status"]["updatedNumberScheduled"] == count
                && set["status"]["observedGeneration"] == set["metadata"]["generation"]
        }
    };
    cluster.run_until(None, &path, "two pods", ready(2)).await;
    cluster.node("n3", json!({})).await;
    cluster.run_until(None, &path, "three pods", ready(3)).await;
    cluster.patch(&path, json!({"spec": {"template": template("b")}})).await;
    cluster.run_until(None, &path, "updated pods", ready(3)).await;
    let pods = cluster.list(PODS).await;
    let mut nodes: Vec<&str> = pods.iter().map(|pod| text(pod, "/spec/nodeName")).collect();
    nodes.sort_unstable();
    assert_eq!(nodes, ["n1", "n2", "n3"]);
    assert!(pods.iter().all(|pod| text(pod, "/spec/containers/0/image") == "b"));
    let revisions = cluster.list("/apis/apps/v1/namespaces/default/controllerrevisions").await;
    assert_eq!(revisions.len(), 2);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_node_is_tainted_and_emptied_and_an_edge_keeps_its_pods() {
    let cluster = Cluster::start().await;
    for (name, labels) in [
        ("cloud", json!({})),
        ("edge", json!({"node-role.kubernetes.io/edge": ""})),
        ("well", json!({})),
        ("fine", json!({})),
    ] {
        cluster.node(name, labels).await;
    }
    let brief = json!([{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute",
        "tolerationSeconds": 0}]);
    for name in ["cloud", "edge"] {
        cluster.create(PODS, pod(name, json!({"nodeName": name, "tolerations": brief}))).await;
        let status = json!({"status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [
            {"type": "Ready", "status": "True"}]}});
        cluster.patch(&format!("{PODS}/{name}/status"), status).await;
    }
    // Two of four go silent; the others beat on.
    let start = Instant::now();
    let unknown = |node: &Value| reason(node, "Ready") == "NodeStatusUnknown";
    let tainted = |node: &Value| {
        node.pointer("/spec/taints").and_then(Value::as_array).is_some_and(|taints| {
            taints.iter().filter(|t| text(t, "/key") == "node.kubernetes.io/unreachable").count()
                == 2
        })
    };
    loop {
        cluster.ready("well", "True").await;
        cluster.ready("fine", "True").await;
        let nodes = cluster.list(NODES).await;
        if nodes.iter().filter(|node| unknown(node) && tainted(node)).count() == 2 {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "the nodes were not judged: {nodes:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cluster
        .until(&format!("{PODS}/cloud"), "deleted pod", |pod| {
            pod.pointer("/metadata/deletionTimestamp").is_some()
        })
        .await;
    cluster.has_event("TaintManagerEviction", "Marking for deletion Pod default/cloud").await;
    let kept = cluster.get(&format!("{PODS}/edge")).await.expect("the pod");
    assert!(kept.pointer("/metadata/deletionTimestamp").is_none());
    assert_eq!(condition(&kept, "Ready").map(|c| text(c, "/status")), Some("True"));

    cluster.ready("edge", "True").await;
    cluster
        .until(&format!("{NODES}/edge"), "node without taints", |node| {
            node.pointer("/spec/taints").is_none_or(|taints| taints == &json!([]))
        })
        .await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_get_taints_and_networks_of_their_own() {
    let cluster = Cluster::start().await;
    for name in ["a", "b"] {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        cluster.create(NODES, node).await;
    }
    let nodes = cluster
        .until_list(NODES, "networks and taints", |nodes| {
            nodes.iter().all(|node| {
                text(node, "/spec/podCIDR").starts_with("10.244.")
                    && text(node, "/spec/taints/0/key") == "node.kubernetes.io/not-ready"
            })
        })
        .await;
    assert_ne!(nodes[0]["spec"]["podCIDR"], nodes[1]["spec"]["podCIDR"]);
    assert_eq!(nodes[0]["spec"]["podCIDRs"][0], nodes[0]["spec"]["podCIDR"]);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_lists_its_ready_pods() {
    let cluster = Cluster::start().await;
    cluster.node("n1", json!({})).await;
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}});
    cluster.create("/api/v1/namespaces/default/services", service).await;
    let endpoints = "/api/v1/namespaces/default/endpoints/web";
    cluster.until(endpoints, "empty endpoints", |_| true).await;
    cluster.create(PODS, pod("p", json!({}))).await;
    let found = cluster
        .run_until(None, endpoints, "an address", |e| e.pointer("/subsets/0/addresses/0").is_some())
        .await;
    assert_eq!(found["subsets"][0]["ports"][0]["port"], 8080);
    assert_eq!(text(&found, "/subsets/0/addresses/0/targetRef/name"), "p");
    let slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices?labelSelector=kubernetes.io%2Fservice-name%3Dweb";
    cluster
        .until_list(slices, "a ready endpoint", |slices| {
            slices.len() == 1
                && slices[0].pointer("/endpoints/0/conditions/ready") == Some(&json!(true))
        })
        .await;
    let path = "/api/v1/namespaces/default/services/web";
    cluster.send(Method::DELETE, path, None).await.expect("deleted");
    cluster
        .until_list("/api/v1/namespaces/default/endpoints", "no endpoints", |all| {
            all.iter().all(|endpoints| text(endpoints, "/metadata/name") != "web")
        })
        .await;
    cluster.until_list(slices, "no slice", <[Value]>::is_empty).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_a_removed_node_are_deleted_after_the_quarantine() {
    let cluster = Cluster::start().await;
    cluster.node("n1", json!({})).await;
    cluster.create(PODS, pod("p", json!({"nodeName": "n1"}))).await;
    cluster.send(Method::DELETE, &format!("{NODES}/n1"), None).await.expect("deleted");
    cluster.until_list(PODS, "no pod", <[Value]>::is_empty).await;
    cluster.end().await;
}
