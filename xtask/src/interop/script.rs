//! What every combination has to do, from a join to the removal of the node.
//!
//! Each step waits for states, on both sides: what the cluster says, and what runs on the node. A failed step does not
//! end the script, unless nothing could follow it.

use super::cloud::{self, Cloud};
use super::cluster::{Cluster, NAMESPACE};
use super::containerd::Containerd;
use super::edge::{Edge, Endpoints, META_SERVER};
use super::part::Part;
use super::udp::UdpRelay;
use super::{Line, Outcome, Plan, Side};
use crate::fleet::Running;
use crate::relay::{Relay, Target};
use crate::sh;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// In the order of the script; the table has a row for each.
pub(super) const STEPS: [&str; 21] = [
    "enrol",
    "ready",
    "create",
    "token",
    "configmap",
    "secret",
    "update",
    "events",
    "logs",
    "delete",
    "cut",
    "hub",
    "local-api",
    "pre-pull",
    "configure",
    "router",
    "take-over",
    "restart",
    "rotation",
    "revocation",
    "removal",
];

/// Longest time for anything. Go EdgeCore's volumes follow once a minute, and it dials again after 30 s.
const PATIENCE: Duration = Duration::from_secs(180);
/// Pause between two looks, each of which starts programs.
const PAUSE: Duration = Duration::from_millis(300);
pub(super) const NODE: &str = "interop-node";
const CONTAINER: &str = "main";
const IMAGES: [&str; 2] = ["skerry.local/busybox:1", "skerry.local/busybox:2"];
/// How long a removed node is watched for coming back.
const AWAY: Duration = Duration::from_secs(5);

/// A step's good ends.
pub(super) enum Done {
    Passed,
    /// Passed, with something to tell.
    Noted(String),
    NotOffered(String),
}

/// A combination that runs.
pub(super) struct Room {
    pub(super) plan: Plan,
    pub(super) cloud: Cloud,
    pub(super) containerd: Containerd,
    relay: Relay,
    quic: Option<UdpRelay>,
    edge: Option<Edge>,
}

/// Runs the script and prints a line per step.
pub(super) fn run(plan: &Plan) -> Result<()> {
    let start = Instant::now();
    let room = Room::start(plan);
    let mut room = match room {
        Ok(room) => room,
        Err(error) => {
            // Nothing could be asked of either end.
            report(plan, STEPS[0], start, Err(error))?;
            return skip(plan, &STEPS[1..], "after a failed start");
        }
    };
    let mut left = STEPS.as_slice();
    while let [step, rest @ ..] = left {
        left = rest;
        let start = Instant::now();
        let outcome = match *step {
            "enrol" => room.enrol(),
            "ready" => room.ready(),
            "create" => room.create(),
            "token" => room.token(),
            "configmap" => room.config_map(),
            "secret" => room.secret(),
            "update" => room.update(),
            "events" => room.events(),
            "logs" => room.logs(),
            "delete" => room.delete(),
            "cut" => room.cut_and_heal(),
            "restart" => room.restart(),
            "hub" => room.restart_hub(),
            "local-api" => room.local_api(),
            "pre-pull" => room.pre_pull(),
            "configure" => room.configure(),
            "router" => room.router(),
            "take-over" => room.take_over(),
            "rotation" => room.rotation(),
            "revocation" => room.revocation(),
            "removal" => room.removal(),
            other => bail!("`{other}` is no step"),
        };
        let alive = room.alive();
        let vital = matches!(*step, "enrol" | "ready");
        let failed = outcome.is_err();
        report(plan, step, start, outcome.and_then(|done| alive.map(|()| done)))?;
        if failed && vital {
            skip(plan, left, &format!("after a failed `{step}`"))?;
            break;
        }
        if failed && *step == "create" {
            let next = left.iter().position(|step| *step == "cut").unwrap_or(left.len());
            skip(plan, &left[..next], "after a failed `create`")?;
            left = &left[next..];
        }
    }
    room.stop()
}

fn report(plan: &Plan, step: &str, start: Instant, outcome: Result<Done>) -> Result<()> {
    let (result, detail) = match outcome {
        Ok(Done::Passed) => (Outcome::Passed, String::new()),
        Ok(Done::Noted(what)) => (Outcome::Passed, what),
        Ok(Done::NotOffered(why)) => (Outcome::NotOffered, why),
        Err(error) => (Outcome::Failed, format!("{error:#}").replace('\n', " ")),
    };
    let seconds = (start.elapsed().as_secs_f64() * 10.0).round() / 10.0;
    let line = Line { combo: plan.combo.to_string(), step: step.into(), result, detail, seconds };
    println!("{}", serde_json::to_string(&line)?);
    Ok(())
}

fn skip(plan: &Plan, steps: &[&str], why: &str) -> Result<()> {
    steps.iter().try_for_each(|step| {
        report(plan, step, Instant::now(), Err(anyhow::anyhow!("not tried {why}")))
    })
}

impl Room {
    fn start(plan: &Plan) -> Result<Self> {
        let containerd = Containerd::start(&plan.dir, &plan.images)?;
        let cloud = Cloud::start(plan)?;
        let targets = [cloud.hub, cloud.enrol, cloud.tunnel]
            .map(|address| -> Target { Box::new(move || Some(address)) });
        let relay = Relay::start(targets.into())?;
        let quic = cloud.quic.map(UdpRelay::start).transpose()?;
        let namespace = json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE},
        });
        cloud.cluster.apply(&namespace)?;
        wait_for("service account of the namespace", || {
            cloud.cluster.get(&["serviceaccount", "default", "-n", NAMESPACE])
        })?;
        Ok(Self { plan: plan.clone(), cloud, containerd, relay, quic, edge: None })
    }

    pub(super) fn cluster(&self) -> &Cluster {
        &self.cloud.cluster
    }

    /// Fails when a program has ended that should run.
    fn alive(&mut self) -> Result<()> {
        self.cloud.check()?;
        self.edge.as_mut().map_or(Ok(()), Edge::check)
    }

    fn stop(self) -> Result<()> {
        if let Some(edge) = self.edge {
            edge.stop()?;
        }
        if self.plan.kubeconfig.is_some() {
            cloud::clean(&self.cloud.cluster)?;
        }
        // What does not stop in order ends with the room; the steps have been reported.
        let _ = self.cloud.stop();
        let _ = self.containerd.stop();
        Ok(())
    }

    /// The edge makes a key and gets a certificate for a token.
    fn enrol(&mut self) -> Result<Done> {
        let token = self.cloud.token(NODE)?;
        let [hub, enrol, tunnel] = self.relay.addresses[..] else {
            bail!("the relay has not three addresses");
        };
        let quic = self.quic.as_ref().map(|quic| quic.address);
        let endpoints = Endpoints { hub, enrol, tunnel, quic };
        let edge = Edge::start(&self.plan, NODE, &self.containerd.socket, &endpoints, &token)?;
        let edge = self.edge.insert(edge);
        wait_for("certificate of the node", || {
            if let Err(error) = edge.check() {
                return Ok(Some(Err(error)));
            }
            Ok(edge.certificate.exists().then_some(Ok(())))
        })??;
        Ok(Done::Passed)
    }

    /// The Node is there, ready, and its lease is renewed.
    fn ready(&mut self) -> Result<Done> {
        wait_for("ready node", || {
            if let Err(error) = self.alive() {
                return Ok(Some(Err(error)));
            }
            let node = self.cluster().get(&["node", NODE])?.context("there is no Node")?;
            let ready = condition(&node, "Ready");
            ensure!(ready["status"] == "True", "not ready: {}", ready["message"]);
            let role = &node["metadata"]["labels"]["node-role.kubernetes.io/edge"];
            ensure!(role.is_string(), "the Node has not the role of an edge node");
            Ok(Some(Ok(())))
        })??;
        let renewed = || -> Result<Value> {
            let lease = self.cluster().get(&["lease", NODE, "-n", "kube-node-lease"])?;
            Ok(lease.context("there is no Lease")?["spec"]["renewTime"].clone())
        };
        let first = wait_for("lease", || renewed().map(Some))?;
        wait_for("renewed lease", || Ok((renewed()? != first).then_some(())))?;
        Ok(match self.cloud.link(NODE)? {
            Some(link) => Done::Noted(format!(
                "transport {}, capabilities `{}`",
                link["transport"].as_str().unwrap_or("?"),
                link["capabilities"].as_str().unwrap_or_default()
            )),
            None => Done::Passed,
        })
    }

    /// A pod with a ConfigMap, a Secret and a token runs.
    fn create(&mut self) -> Result<Done> {
        self.cluster().apply(&config_map("first"))?;
        self.cluster().apply(&secret("hidden"))?;
        self.cluster().apply(&pod("web"))?;
        self.running("web")?;
        let web = self.containerd.running(NAMESPACE, "web")?;
        ensure!(web.read("/conf/key")? == "first", "the ConfigMap's volume has another text");
        ensure!(web.read("/secret/key")? == "hidden", "the Secret's volume has another text");
        Ok(Done::Passed)
    }

    /// The pod got a token of its service account.
    fn token(&mut self) -> Result<Done> {
        let token = self.containerd.running(NAMESPACE, "web")?.read("/token/token")?;
        let parts: Vec<&str> = token.split('.').collect();
        ensure!(
            parts.len() == 3 && parts.iter().all(|part| !part.is_empty()),
            "no token in the volume"
        );
        Ok(Done::Passed)
    }

    /// A changed ConfigMap reaches the volume of the running container.
    fn config_map(&mut self) -> Result<Done> {
        self.cluster().apply(&config_map("second"))?;
        // Both at once: a stock kubelet looks once a minute.
        self.cluster().apply(&secret("changed"))?;
        self.volume("web", "/conf/key", "second")
    }

    /// A changed Secret reaches it too.
    fn secret(&mut self) -> Result<Done> {
        self.volume("web", "/secret/key", "changed")
    }

    fn volume(&self, pod: &str, file: &str, wanted: &str) -> Result<Done> {
        wait_for(&format!("`{wanted}` in {file}"), || {
            let text = self.containerd.running(NAMESPACE, pod)?.read(file)?;
            ensure!(text == wanted, "the file says `{text}`");
            Ok(Some(()))
        })?;
        Ok(Done::Passed)
    }

    /// Another image is run in the same pod, and the cluster hears of it.
    fn update(&mut self) -> Result<Done> {
        let patch = json!({"spec": {"containers": [{"name": CONTAINER, "image": IMAGES[1]}]}});
        let args = ["patch", "pod", "web", "-n", NAMESPACE, "-p", &patch.to_string()];
        self.cluster().kubectl(&args)?;
        wait_for("container of the other image", || {
            let web = self.containerd.running(NAMESPACE, "web")?;
            let version = web.read("/etc/skerry-image-version")?;
            ensure!(version.trim() == "2", "image version {} runs", version.trim());
            Ok(Some(()))
        })?;
        wait_for("word of it in the cluster", || {
            let pod = self.cluster().pod("web")?.context("the pod is gone")?;
            let status = &pod["status"]["containerStatuses"][0];
            ensure!(status["state"]["running"].is_object(), "state {}", status["state"]);
            ensure!(status["restartCount"] == 1, "{} restarts", status["restartCount"]);
            Ok(Some(()))
        })?;
        Ok(Done::Passed)
    }

    /// The edge's events about the pod are in the cluster.
    fn events(&mut self) -> Result<Done> {
        wait_for("event `Started`", || {
            let selector = "involvedObject.name=web";
            let list =
                self.cluster().get(&["events", "-n", NAMESPACE, "--field-selector", selector])?;
            let list = list.unwrap_or_default();
            let reasons: Vec<&str> = list["items"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|event| event["reason"].as_str())
                .collect();
            ensure!(reasons.contains(&"Started"), "reasons: {}", reasons.join(", "));
            Ok(Some(()))
        })?;
        Ok(Done::Passed)
    }

    /// The pod's log is read through the tunnel.
    fn logs(&mut self) -> Result<Done> {
        let wanted = "hello from web";
        let found = wait_for("the pod's log", || match self.cloud.logs("web", CONTAINER)? {
            Ok(text) if text.contains(wanted) => Ok(Some(None)),
            Ok(text) => bail!("the log says `{}`", text.trim()),
            Err(why) => Ok(Some(Some(why))),
        })?;
        Ok(found.map_or(Done::Passed, |why| Done::NotOffered(why.into())))
    }

    /// The pod goes, on both sides.
    fn delete(&mut self) -> Result<Done> {
        self.cluster().kubectl(&["delete", "pod", "web", "-n", NAMESPACE, "--wait=false"])?;
        self.gone("web")?;
        Ok(Done::Passed)
    }

    /// Both sides change while the link is down, and agree when it is back.
    fn cut_and_heal(&mut self) -> Result<Done> {
        for name in ["stays", "goes"] {
            self.cluster().apply(&pod(name))?;
        }
        for name in ["stays", "goes"] {
            self.running(name)?;
        }
        let before = self.containerd.running(NAMESPACE, "stays")?;
        self.relay.cut();
        self.quic.iter().for_each(UdpRelay::cut);
        self.cluster().kubectl(&["delete", "pod", "goes", "-n", NAMESPACE, "--wait=false"])?;
        self.cluster().apply(&config_map("third"))?;
        self.cluster().apply(&pod("comes"))?;
        self.containerd.ctr(&["tasks", "kill", "-s", "SIGKILL", &before.id])?;
        let reborn = wait_for("container restarted without a link", || {
            let now = self.containerd.running(NAMESPACE, "stays")?;
            ensure!(now.id != before.id, "the killed container is still there");
            Ok(Some(now))
        })?;
        self.containerd.running(NAMESPACE, "goes").context("deleted without a link")?;
        self.relay.heal();
        self.quic.iter().for_each(UdpRelay::heal);

        self.running("comes").context("created during the cut")?;
        self.gone("goes").context("deleted during the cut")?;
        self.volume("stays", "/conf/key", "third").context("changed during the cut")?;
        wait_for("restart of the cut in the cluster", || {
            let pod = self.cluster().pod("stays")?.context("the pod is gone")?;
            let status = &pod["status"]["containerStatuses"][0];
            let id = status["containerID"].as_str().unwrap_or_default();
            ensure!(status["restartCount"] == 1, "{} restarts", status["restartCount"]);
            ensure!(id.ends_with(&reborn.id), "container {id} is told, {} runs", reborn.id);
            Ok(Some(()))
        })?;
        let now = self.containerd.running(NAMESPACE, "stays")?;
        ensure!(now == reborn, "the container was started again when the link came back");
        Ok(Done::Passed)
    }

    /// The agent is killed; its containers run on, and it goes on where it was.
    fn restart(&mut self) -> Result<Done> {
        let before = self.containerd.running(NAMESPACE, "stays")?;
        self.edge.as_mut().context("no agent runs")?.restart()?;
        match self.plan.combo.edge {
            Side::Ours => self.follows("eighth", &before),
            Side::Go => self.survives("restarted", &before),
        }
    }

    /// The cloud is stopped and started; the node comes back by itself, and containers run on.
    fn restart_hub(&mut self) -> Result<Done> {
        let before = self.containerd.running(NAMESPACE, "stays")?;
        self.cloud.restart()?;
        wait_for("API after the restart", || {
            self.cluster().kubectl(&["get", "--raw", "/readyz"]).map(Some)
        })?;
        self.follows("fifth", &before)
    }

    /// A change still reaches the pod, in the container that ran before.
    pub(super) fn follows(&self, text: &str, before: &Running) -> Result<Done> {
        self.cluster().apply(&config_map(text))?;
        self.volume("stays", "/conf/key", text)?;
        let now = self.running("stays")?;
        ensure!(now == *before, "the container was started again");
        Ok(Done::Passed)
    }

    /// A new pod runs, and the container of before as well. That is all that can be asked of Go EdgeCore, which takes
    /// the volumes of running containers down when it starts, before it has read its pods.
    fn survives(&self, fresh: &str, before: &Running) -> Result<Done> {
        self.cluster().apply(&pod(fresh))?;
        self.running(fresh)?;
        let now = self.running("stays")?;
        ensure!(now == *before, "the container was started again");
        Ok(match now.read("/conf/key") {
            Ok(_) => Done::Passed,
            Err(_) => Done::Noted("the volumes of running containers are empty since".into()),
        })
    }

    /// An application on the node reads and watches the cluster through the edge.
    fn local_api(&mut self) -> Result<Done> {
        let server = format!("http://{META_SERVER}");
        let path = format!("/api/v1/namespaces/{NAMESPACE}/configmaps");
        let ask = |path: &str| -> Result<Value> {
            let text = self.cluster().kubectl(&["get", "--raw", path, "--server", &server])?;
            serde_json::from_str(&text).context("the local API answered no JSON")
        };
        wait_for("object by name", || {
            let found = ask(&format!("{path}/conf"))?;
            ensure!(found["data"]["key"] == "fifth", "it says {}", found["data"]);
            Ok(Some(()))
        })?;
        wait_for("list", || {
            let found = ask(&path)?;
            let names = found["items"].as_array().into_iter().flatten();
            let names: Vec<&str> =
                names.filter_map(|one| one["metadata"]["name"].as_str()).collect();
            // No pod uses this one, so only the cloud can have told.
            ensure!(names.contains(&"kube-root-ca.crt"), "found {}", names.join(", "));
            Ok(Some(()))
        })?;
        let watch = format!("{path}?watch=true&timeoutSeconds=300");
        let command = self.cluster().command_with(&["get", "--raw", &watch, "--server", &server]);
        let mut watcher = Part::start("local-watch", &self.plan.dir, command)?;
        wait_for("watch that shows what is there", || {
            watcher.check()?;
            Ok(watcher.said().contains("fifth").then_some(()))
        })?;
        let fresh = json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "unused", "namespace": NAMESPACE}, "data": {"key": "watched"}});
        self.cluster().apply(&fresh)?;
        wait_for("change in the watch", || Ok(watcher.said().contains("watched").then_some(())))?;
        watcher.stop()?;
        Ok(Done::Passed)
    }

    /// Our EdgeCore takes the node over from Go EdgeCore, and gives it back; no container is started again.
    fn take_over(&mut self) -> Result<Done> {
        if self.plan.combo.edge == Side::Ours {
            return Ok(Done::NotOffered("this node has never been KubeEdge's".into()));
        }
        let before = self.containerd.running(NAMESPACE, "stays")?;
        let edge = self.edge.take().context("no agent runs")?;
        self.edge = Some(edge.hand_over(&self.plan, Side::Ours)?);
        self.version(Side::Ours)?;
        self.follows("sixth", &before).context("our EdgeCore has the node")?;
        let edge = self.edge.take().context("no agent runs")?;
        self.edge = Some(edge.hand_over(&self.plan, Side::Go)?);
        self.version(Side::Go)?;
        self.survives("returned", &before).context("Go EdgeCore has the node again")
    }

    /// Waits until the Node says whose agent it has, and is ready.
    fn version(&self, side: Side) -> Result<()> {
        wait_for(&format!("Node with {side} agent"), || {
            let node = self.cluster().get(&["node", NODE])?.context("there is no Node")?;
            let version = node["status"]["nodeInfo"]["kubeletVersion"].as_str().unwrap_or_default();
            ensure!(version.contains("kubeedge") == (side == Side::Go), "version {version}");
            ensure!(condition(&node, "Ready")["status"] == "True", "not ready");
            Ok(Some(()))
        })
    }

    /// The node's certificate is replaced while it works: by a new authority, which is how an operator asks for it.
    fn rotation(&mut self) -> Result<Done> {
        match (self.plan.combo.cloud, self.plan.combo.edge) {
            (Side::Go, _) => {
                return Ok(Done::NotOffered(
                    "certificates of Go CloudCore live at least a day and are renewed near their end"
                        .into(),
                ));
            }
            (Side::Ours, Side::Go) => {
                return Ok(Done::NotOffered(
                    "Go EdgeCore renews in the last third of its certificate's year, and never learns of a new authority"
                        .into(),
                ));
            }
            (Side::Ours, Side::Ours) => {}
        }
        let edge = self.edge.as_ref().context("no agent runs")?;
        let before = std::fs::read(&edge.certificate)?;
        self.cloud.skerry(&["ca", "rotate"])?;
        wait_for("new certificate on the node", || {
            Ok((std::fs::read(&edge.certificate)? != before).then_some(()))
        })?;
        wait_for("word that the node has followed", || {
            // Exit code 1 means that a node has not, and is an error here until it has.
            self.cloud.skerry(&["ca", "status"]).map(Some)
        })?;
        self.cloud.skerry(&["ca", "finish"])?;
        self.cluster().apply(&pod("after"))?;
        self.running("after").context("after the old authority's end")?;
        Ok(Done::Passed)
    }

    /// A revoked node's link is cut and does not come back.
    fn revocation(&mut self) -> Result<Done> {
        if self.plan.combo.cloud == Side::Go {
            return Ok(Done::NotOffered(
                "Go CloudCore accepts every certificate of its authority".into(),
            ));
        }
        ensure!(self.cloud.link(NODE)?.is_some(), "the hub knows no link of the node");
        self.cloud.skerry(&["node", "revoke", NODE])?;
        wait_for("cut link", || Ok(self.cloud.link(NODE)?.is_none().then_some(())))?;
        let start = Instant::now();
        while start.elapsed() < AWAY {
            ensure!(self.cloud.link(NODE)?.is_none(), "the node is back");
            std::thread::sleep(PAUSE);
        }
        Ok(Done::Passed)
    }

    /// A node whose agent is stopped is removed with everything about it, and stays away.
    fn removal(&mut self) -> Result<Done> {
        if let Some(edge) = self.edge.take() {
            edge.stop()?;
        }
        self.cluster().kubectl(&["delete", "node", NODE, "--wait=false"])?;
        wait_for("removed node", || {
            ensure!(self.cluster().get(&["node", NODE])?.is_none(), "the Node is still there");
            Ok(Some(()))
        })?;
        wait_for("removed records of the node", || {
            for kind in ["objectsyncs", "clusterobjectsyncs"] {
                let resource = format!("{kind}.reliablesyncs.kubeedge.io");
                let list = self.cluster().get(&[&resource, "-A"])?.unwrap_or_default();
                let left = list["items"].as_array().into_iter().flatten();
                let name = |one: &Value| one["metadata"]["name"].as_str().map(str::to_owned);
                let left: Vec<String> = left.filter_map(name).collect();
                ensure!(
                    !left.iter().any(|name| name.starts_with(NODE)),
                    "{} {kind} are left",
                    left.len()
                );
            }
            Ok(Some(()))
        })?;
        wait_for("removed pods of the node", || {
            let selector = format!("spec.nodeName={NODE}");
            let list =
                self.cluster().get(&["pods", "-n", NAMESPACE, "--field-selector", &selector])?;
            let count = list.unwrap_or_default()["items"].as_array().map_or(0, Vec::len);
            ensure!(count == 0, "{count} pods are left");
            Ok(Some(()))
        })?;
        let start = Instant::now();
        while start.elapsed() < AWAY {
            ensure!(self.cluster().get(&["node", NODE])?.is_none(), "the Node came back");
            std::thread::sleep(PAUSE);
        }
        Ok(Done::Passed)
    }

    /// Waits until the cluster calls a pod ready and its container runs here.
    fn running(&self, name: &str) -> Result<Running> {
        wait_for(&format!("running pod `{name}`"), || {
            let pod = self.cluster().pod(name)?.context("the pod is gone")?;
            let ready = condition(&pod, "Ready");
            ensure!(
                pod["status"]["phase"] == "Running" && ready["status"] == "True",
                "phase {}, ready {}, {}",
                pod["status"]["phase"],
                ready["status"],
                pod["status"]["containerStatuses"][0]["state"]
            );
            self.containerd.running(NAMESPACE, name).map(Some)
        })
    }

    /// Waits until neither the cluster nor the node has a pod.
    fn gone(&self, name: &str) -> Result<()> {
        wait_for(&format!("end of pod `{name}`"), || {
            ensure!(self.cluster().pod(name)?.is_none(), "the cluster still has it");
            let left = self.containerd.all_running(NAMESPACE, name)?;
            ensure!(left.is_empty(), "its container still runs");
            Ok(Some(()))
        })
    }
}

/// Asks until the answer is `Some`; the last error is in the failure.
pub(super) fn wait_for<T>(
    what: &str,
    mut question: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    sh::wait_for(what, PATIENCE, || {
        let answer = question();
        if !matches!(answer, Ok(Some(_))) {
            std::thread::sleep(PAUSE);
        }
        answer
    })
}

fn condition<'a>(object: &'a Value, kind: &str) -> &'a Value {
    let list = object["status"]["conditions"].as_array();
    list.into_iter().flatten().find(|one| one["type"] == kind).unwrap_or(&Value::Null)
}

fn config_map(text: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap",
           "metadata": {"name": "conf", "namespace": NAMESPACE}, "data": {"key": text}})
}

fn secret(text: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Secret",
           "metadata": {"name": "secret", "namespace": NAMESPACE}, "stringData": {"key": text}})
}

fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": name}},
        "spec": {
            "nodeName": NODE,
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "dnsPolicy": "Default",
            "tolerations": [{"operator": "Exists"}],
            "containers": [{
                "name": CONTAINER, "image": IMAGES[0], "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-c", format!("echo hello from {name}; exec sleep 100000")],
                "volumeMounts": [
                    {"name": "conf", "mountPath": "/conf"},
                    {"name": "secret", "mountPath": "/secret"},
                    {"name": "token", "mountPath": "/token"},
                ],
            }],
            "volumes": [
                {"name": "conf", "configMap": {"name": "conf"}},
                {"name": "secret", "secret": {"secretName": "secret"}},
                {"name": "token", "projected": {"sources": [
                    {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}}]}},
            ],
        },
    })
}
