//! The cloud side of a room: an API, and our CloudCore or KubeEdge's on it.

use super::cluster::{Cluster, NAMESPACE};
use super::part::Part;
use super::{Plan, Side};
use crate::sh;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Longest time that a cloud may take to start. Go CloudCore waits up to 9 s before it does anything.
const START_LIMIT: Duration = Duration::from_secs(120);
/// Namespace of a CloudCore's secrets.
const SYSTEM: &str = "kubeedge";

/// A CloudCore and the API below it.
pub(super) struct Cloud {
    side: Side,
    /// Newest last; stopped from the end.
    parts: Vec<Part>,
    skerry: std::path::PathBuf,
    pub(super) cluster: Cluster,
    pub(super) hub: SocketAddr,
    pub(super) enrol: SocketAddr,
    pub(super) tunnel: SocketAddr,
    /// QUIC of our own hub.
    pub(super) quic: Option<SocketAddr>,
    /// Where our own router takes HTTP.
    pub(super) router: Option<SocketAddr>,
    /// URL of our own hub's monitor.
    monitor: Option<String>,
    logs: Logs,
}

/// How the logs of a pod are read.
enum Logs {
    /// `kubectl logs`: the API reaches the node through CloudCore.
    Api,
    /// CloudCore's own listener for the API server, asked directly.
    Stream(SocketAddr),
    /// Not at all, with the reason.
    No(&'static str),
}

impl Cloud {
    /// Starts the API, unless the user has one, and CloudCore.
    pub(super) fn start(plan: &Plan) -> Result<Self> {
        match (plan.combo.cloud, &plan.kubeconfig) {
            (Side::Ours, None) => Self::ours_with_api(plan),
            (Side::Ours, Some(kubeconfig)) => Self::ours_on(plan, kubeconfig),
            (Side::Go, None) => Self::go_with_api(plan),
            (Side::Go, Some(kubeconfig)) => {
                let cluster = foreign(plan, kubeconfig)?;
                Self::go_on(plan, cluster, kubeconfig, Vec::new(), None)
            }
        }
    }

    /// `skerry up` without a node: API, CloudCore and reconciler in one process.
    fn ours_with_api(plan: &Plan) -> Result<Self> {
        let dir = plan.dir.join("up");
        let mut command = Command::new(&plan.skerry);
        command.args(["up", "--node", "none", "--output", "json"]).arg("--dir").arg(&dir);
        command.args(["--router-listen", "127.0.0.1:9443", "--router-open"]);
        command.arg("--template").arg(sh::root().join("fleet-repo-template"));
        command.env("SKERRY_LOG", "info");
        let mut part = Part::start("skerry-up", &plan.dir, command)?;
        let file = dir.join("up.json");
        let facts: Value = wait_for_part("running `skerry up`", &mut part, || {
            let facts: Option<Value> =
                std::fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok());
            Ok(facts.filter(|facts| facts["ready"] == true))
        })?;
        let address = |name: &str| -> Result<SocketAddr> {
            facts[name]
                .as_str()
                .with_context(|| format!("up.json has no `{name}`"))?
                .parse()
                .context(format!("`{name}` of up.json is no address"))
        };
        let kubeconfig = dir.join("kubeconfig");
        Ok(Self {
            side: Side::Ours,
            skerry: plan.skerry.clone(),
            cluster: Cluster::new(&plan.kubectl, &kubeconfig, &plan.dir),
            hub: address("hub")?,
            enrol: address("enrol")?,
            tunnel: address("tunnel")?,
            router: facts["router"].as_str().and_then(|text| text.parse().ok()),
            quic: facts["quic"].as_str().and_then(|text| text.parse().ok()),
            monitor: facts["monitor"].as_str().map(str::to_owned),
            parts: vec![part],
            logs: Logs::Api,
        })
    }

    /// `skerry cloudcore` on the user's cluster.
    fn ours_on(plan: &Plan, kubeconfig: &Path) -> Result<Self> {
        let cluster = foreign(plan, kubeconfig)?;
        let [hub, enrol, tunnel, monitor] = [free()?, free()?, free()?, free()?];
        let quic = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = Command::new(&plan.skerry);
        command.arg("cloudcore").arg("--kubeconfig").arg(kubeconfig);
        command.args(["--advertise", "127.0.0.1", "--hub-listen", &hub.to_string()]);
        command.args([
            "--enrol-listen",
            &enrol.to_string(),
            "--tunnel-listen",
            &tunnel.to_string(),
        ]);
        command.args([
            "--quic-listen",
            &quic.to_string(),
            "--monitor-listen",
            &monitor.to_string(),
        ]);
        let mut part = Part::start("skerry-cloudcore", &plan.dir, command)?;
        wait_for_part("listening CloudCore", &mut part, || Ok(listens(&[hub, enrol])))?;
        Ok(Self {
            side: Side::Ours,
            skerry: plan.skerry.clone(),
            cluster,
            hub,
            enrol,
            tunnel,
            quic: Some(quic),
            router: None,
            monitor: Some(format!("http://{monitor}")),
            parts: vec![part],
            logs: Logs::No("our CloudCore gives logs to the embedded API only"),
        })
    }

    /// An embedded API alone, and Go CloudCore with the rights that ours has.
    fn go_with_api(plan: &Plan) -> Result<Self> {
        let dir = plan.dir.join("api");
        std::fs::create_dir_all(&dir)?;
        let mut command = Command::new(&plan.api);
        command.arg(&dir).arg("0").env("RUST_LOG", "info");
        let mut api = Part::start("api", &plan.dir, command)?;
        let admin = dir.join("admin.kubeconfig");
        let cluster = Cluster::new(&plan.kubectl, &admin, &plan.dir);
        wait_for_part("embedded API", &mut api, || {
            ensure!(admin.exists(), "there is no kubeconfig yet");
            cluster.kubectl(&["get", "--raw", "/readyz"]).map(Some)
        })?;
        cluster.kubectl(&["apply", "--server-side", "-R", "-f", &plan.crds.to_string_lossy()])?;
        let own = dir.join("cloudcore.kubeconfig");
        let pki = dir.join("pki");
        Self::go_on(plan, cluster, &own, vec![api], Some(&pki))
    }

    /// Go CloudCore. `pki` holds a server certificate of the cluster, without which there is no stream server.
    fn go_on(
        plan: &Plan,
        cluster: Cluster,
        kubeconfig: &Path,
        mut parts: Vec<Part>,
        pki: Option<&Path>,
    ) -> Result<Self> {
        let [hub, enrol, tunnel, stream, monitor] = [free()?, free()?, free()?, free()?, free()?];
        let own = plan.dir.join("cloudcore");
        std::fs::create_dir_all(&own)?;
        let listener =
            |at: SocketAddr| json!({"enable": true, "address": "127.0.0.1", "port": at.port()});
        let file = |name: &str| own.join(name);
        let mut config = json!({
            "apiVersion": "cloudcore.config.kubeedge.io/v1alpha1",
            "kind": "CloudCore",
            "commonConfig": {"monitorServer": {"bindAddress": monitor.to_string()}},
            "kubeAPIConfig": {"kubeConfig": kubeconfig},
            "modules": {
                "cloudHub": {
                    "enable": true,
                    "advertiseAddress": ["127.0.0.1"],
                    "dnsNames": ["localhost"],
                    "nodeLimit": 10,
                    "edgeCertSigningDuration": 1,
                    "tlsCAFile": file("ca.crt"), "tlsCAKeyFile": file("ca.key"),
                    "tlsCertFile": file("hub.crt"), "tlsPrivateKeyFile": file("hub.key"),
                    "unixsocket": {
                        "enable": true,
                        "address": format!("unix://{}", file("kubeedge.sock").display()),
                    },
                    "websocket": listener(hub),
                    "https": listener(enrol),
                },
                "dynamicController": {"enable": true},
                "taskManager": {"enable": true},
                // What it would write is for the control plane's host.
                "iptablesManager": {"enable": false, "mode": "external"},
                "router": {"enable": false},
            },
        });
        if let Some(pki) = pki {
            config["modules"]["cloudStream"] = json!({
                "enable": true, "tunnelPort": tunnel.port(), "streamPort": stream.port(),
                "tlsTunnelCAFile": file("ca.crt"), "tlsTunnelCertFile": file("hub.crt"),
                "tlsTunnelPrivateKeyFile": file("hub.key"), "tlsStreamCAFile": pki.join("ca.crt"),
                "tlsStreamCertFile": pki.join("server.crt"),
                "tlsStreamPrivateKeyFile": pki.join("server.key"),
            });
        }
        let path = file("cloudcore.yaml");
        // JSON is YAML.
        std::fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
        let program = plan.go_cloudcore.as_ref().context("there is no Go CloudCore")?;
        let mut command = Command::new(program);
        command.arg("--config").arg(path).arg("-v=4");
        let mut part = Part::start("go-cloudcore", &plan.dir, command)?;
        let start = wait_for_part("listening Go CloudCore", &mut part, || {
            let wanted: &[SocketAddr] =
                if pki.is_some() { &[hub, enrol, tunnel, stream] } else { &[hub, enrol] };
            Ok(listens(wanted))
        });
        parts.push(part);
        start?;
        let logs = match pki {
            Some(_) => Logs::Stream(stream),
            None => Logs::No("Go CloudCore streams with a certificate of the cluster only"),
        };
        Ok(Self {
            side: Side::Go,
            skerry: plan.skerry.clone(),
            parts,
            cluster,
            hub,
            enrol,
            tunnel,
            quic: None,
            router: None,
            monitor: None,
            logs,
        })
    }

    /// Stops CloudCore and starts it again; with it goes our API, Go CloudCore's stays.
    pub(super) fn restart(&mut self) -> Result<()> {
        let part = self.parts.last_mut().context("no CloudCore runs")?;
        part.restart(true)?;
        let wanted = [self.hub, self.enrol];
        wait_for_part("CloudCore that listens again", part, || Ok(listens(&wanted)))
    }

    /// A token with which `node` may join.
    pub(super) fn token(&self, node: &str) -> Result<String> {
        match self.side {
            Side::Ours => {
                let mut skerry = Command::new(&self.skerry);
                skerry
                    .args(["token", "create", node, "--kubeconfig"])
                    .arg(&self.cluster.kubeconfig);
                Ok(sh::output(&mut skerry)?.trim().to_owned())
            }
            Side::Go => {
                let template = "go-template={{.data.tokendata | base64decode}}";
                sh::wait_for("join token of Go CloudCore", START_LIMIT, || {
                    let token = self.cluster.kubectl(&[
                        "get",
                        "secret",
                        "tokensecret",
                        "-n",
                        SYSTEM,
                        "-o",
                        template,
                    ])?;
                    ensure!(!token.trim().is_empty(), "the secret has no token");
                    Ok(Some(token.trim().to_owned()))
                })
            }
        }
    }

    /// The log of a pod's only container, or why there is none to be had.
    pub(super) fn logs(&self, pod: &str, container: &str) -> Result<Result<String, &'static str>> {
        match &self.logs {
            Logs::Api => self.cluster.kubectl(&["logs", "-n", NAMESPACE, pod]).map(Ok),
            Logs::Stream(address) => {
                let server = format!("https://{address}");
                let path = format!("/containerLogs/{NAMESPACE}/{pod}/{container}");
                let args =
                    ["get", "--raw", &path, "--server", &server, "--insecure-skip-tls-verify"];
                self.cluster.kubectl(&args).map(Ok)
            }
            Logs::No(why) => Ok(Err(why)),
        }
    }

    /// What our hub says of a node's link; `None` without a link, and from Go CloudCore, which says nothing.
    pub(super) fn link(&self, node: &str) -> Result<Option<Value>> {
        let Some(monitor) = &self.monitor else { return Ok(None) };
        let text = self.cluster.kubectl(&["get", "--raw", "/links", "--server", monitor])?;
        let links: Value =
            serde_json::from_str(&text).context("the monitor's links are no JSON")?;
        let all = links.as_array().or_else(|| links["links"].as_array());
        Ok(all.into_iter().flatten().find(|link| link["node"] == node).cloned())
    }

    /// What `skerry ARGS` says; only our cloud has it.
    pub(super) fn skerry(&self, args: &[&str]) -> Result<String> {
        let mut skerry = Command::new(&self.skerry);
        sh::output(skerry.args(args).arg("--kubeconfig").arg(&self.cluster.kubeconfig))
    }

    /// Fails when a program has ended.
    pub(super) fn check(&mut self) -> Result<()> {
        self.parts.iter_mut().try_for_each(Part::check)
    }

    pub(super) fn stop(self) -> Result<()> {
        self.parts.into_iter().rev().try_for_each(Part::stop)
    }
}

/// The user's cluster, if no CloudCore has been there before: its secrets would be ours to break.
fn foreign(plan: &Plan, kubeconfig: &Path) -> Result<Cluster> {
    let cluster = Cluster::new(&plan.kubectl, kubeconfig, &plan.dir);
    if cluster.get(&["namespace", SYSTEM])?.is_some() {
        bail!(
            "the cluster has a namespace `{SYSTEM}` already\nhint: use a cluster without KubeEdge"
        );
    }
    cluster.kubectl(&["apply", "--server-side", "-R", "-f", &plan.crds.to_string_lossy()])?;
    Ok(cluster)
}

/// Removes what a combination left in the user's cluster, definitions excepted.
pub(super) fn clean(cluster: &Cluster) -> Result<()> {
    let args = ["delete", "namespace", SYSTEM, NAMESPACE, "--ignore-not-found", "--timeout=60s"];
    cluster.kubectl(&args).map(drop)
}

/// A port that nobody listens on; the Go programs do not tell one that they chose.
fn free() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn listens(addresses: &[SocketAddr]) -> Option<()> {
    addresses.iter().all(|address| TcpStream::connect(address).is_ok()).then_some(())
}

fn wait_for_part<T>(
    what: &str,
    part: &mut Part,
    mut question: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let found = sh::wait_for(what, START_LIMIT, || match part.check() {
        Err(error) => Ok(Some(Err(error))),
        Ok(()) => Ok(question()?.map(Ok)),
    });
    found?
}
