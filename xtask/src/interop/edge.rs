//! The edge side of a room: our EdgeCore or KubeEdge's, on the room's containerd.

use super::containerd::{SANDBOX_IMAGE, may_lower_oom_score};
use super::part::Part;
use super::{Plan, Side, room};
use crate::sh;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where either EdgeCore serves the Kubernetes API to applications on the node; plain HTTP.
pub(super) const META_SERVER: &str = "127.0.0.1:10550";

/// What the edge dials.
pub(super) struct Endpoints {
    pub(super) hub: SocketAddr,
    pub(super) enrol: SocketAddr,
    pub(super) tunnel: SocketAddr,
    /// Only where there is a hub of ours.
    pub(super) quic: Option<SocketAddr>,
}

/// An EdgeCore.
pub(super) struct Edge {
    part: Part,
    config: PathBuf,
    /// Where it keeps its certificate.
    pub(super) certificate: PathBuf,
}

impl Edge {
    /// Writes the configuration and starts the program.
    pub(super) fn start(
        plan: &Plan,
        node: &str,
        socket: &Path,
        endpoints: &Endpoints,
        token: &str,
    ) -> Result<Self> {
        let side = plan.combo.edge;
        let dir = plan.dir.join("edge");
        std::fs::create_dir_all(&dir)?;
        room::make_cgroups(&plan.cgroup)?;
        let (mut config, certificate) = match side {
            Side::Ours => {
                (ours(&dir, node, socket, endpoints, token), dir.join("data/pki/edge.pem"))
            }
            Side::Go => (go(&dir, node, socket, endpoints, token), dir.join("edge.crt")),
        };
        let cgroup = format!("/{}", plan.cgroup);
        match side {
            Side::Ours => config["cgroupRoot"] = cgroup.into(),
            Side::Go => {
                config["modules"]["edged"]["tailoredKubeletConfig"]["cgroupRoot"] = cgroup.into();
            }
        }
        if plan.kubeconfig.is_none() {
            // The room's own; on the machine's network the address is found by the default route.
            match side {
                Side::Ours => config["nodeIP"] = room::ADDRESS.into(),
                Side::Go => config["modules"]["edged"]["nodeIP"] = room::ADDRESS.into(),
            }
        }
        let path = dir.join("edgecore.yaml");
        // JSON is YAML.
        std::fs::write(&path, serde_json::to_vec_pretty(&config)?)?;
        Ok(Self { part: run(plan, side, &path)?, config: path, certificate })
    }

    /// Hands the node to the other program, which reads the same configuration; containers run on.
    pub(super) fn hand_over(self, plan: &Plan, to: Side) -> Result<Self> {
        self.part.stop()?;
        let verb = match to {
            Side::Ours => "adopt",
            Side::Go => "release",
        };
        let mut skerry = Command::new(&plan.skerry);
        sh::output(skerry.args(["edge", verb, "--config"]).arg(&self.config))?;
        Ok(Self { part: run(plan, to, &self.config)?, ..self })
    }

    /// Kills the program and starts it again.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.part.restart(false)
    }

    /// Fails when the program has ended.
    pub(super) fn check(&mut self) -> Result<()> {
        self.part.check()
    }

    pub(super) fn stop(self) -> Result<()> {
        self.part.stop()
    }
}

fn run(plan: &Plan, side: Side, config: &Path) -> Result<Part> {
    let (program, name) = match side {
        Side::Ours => (Some(&plan.edgecore), "edgecore"),
        Side::Go => (plan.go_edgecore.as_ref(), "go-edgecore"),
    };
    let mut command = Command::new(program.context("there is no Go EdgeCore")?);
    match side {
        Side::Ours => command.arg("run").arg("--config").arg(config),
        Side::Go => command.arg("--config").arg(config).arg("-v=4"),
    };
    command.env("SKERRY_LOG", "info");
    Part::start(name, &plan.dir, command)
}

fn ours(dir: &Path, node: &str, socket: &Path, endpoints: &Endpoints, token: &str) -> Value {
    let mut config = json!({
        "nodeName": node,
        "hub": format!("wss://{}", endpoints.hub),
        "enrol": format!("https://{}", endpoints.enrol),
        "tunnel": format!("wss://{}", endpoints.tunnel),
        "token": token,
        "dir": dir.join("data"),
        "runtimeSocket": socket,
        "podLogDir": dir.join("logs"),
        "metaServer": META_SERVER,
    });
    // Left to its default, the edge asks a Go hub in vain, as it would in the field.
    if let Some(quic) = endpoints.quic {
        config["quic"] = format!("quic://{quic}").into();
    }
    config
}

fn go(dir: &Path, node: &str, socket: &Path, endpoints: &Endpoints, token: &str) -> Value {
    let runtime = format!("unix://{}", socket.display());
    let (ca, certificate, key) = (dir.join("ca.crt"), dir.join("edge.crt"), dir.join("edge.key"));
    json!({
        "apiVersion": "edgecore.config.kubeedge.io/v1alpha2",
        "kind": "EdgeCore",
        "database": {"dataSource": dir.join("edgecore.db")},
        "modules": {
            "edgeHub": {
                "enable": true,
                "httpServer": format!("https://{}", endpoints.enrol),
                "token": token,
                "tlsCaFile": ca, "tlsCertFile": certificate, "tlsPrivateKeyFile": key,
                "websocket": {"enable": true, "server": endpoints.hub.to_string()},
                "quic": {"enable": false},
            },
            "edgeStream": {
                "enable": true, "server": endpoints.tunnel.to_string(),
                "tlsTunnelCAFile": ca, "tlsTunnelCertFile": certificate,
                "tlsTunnelPrivateKeyFile": key,
            },
            "edged": {
                "enable": true,
                "reportEvent": true,
                "hostnameOverride": node,
                "rootDirectory": dir.join("kubelet"),
                "registerSchedulable": true,
                "registerNodeNamespace": "default",
                "podSandboxImage": SANDBOX_IMAGE,
                        "tailoredKubeletConfig": {
                    "containerRuntimeEndpoint": runtime, "imageServiceEndpoint": runtime,
                    "cgroupDriver": "cgroupfs",
                    "failSwapOn": false, "makeIPTablesUtilChains": false,
                    // Lowering it needs a right that not every machine gives; 0 asks for nothing.
                    "oomScoreAdj": if may_lower_oom_score() { -999 } else { 0 },
                    "resolvConf": "/etc/resolv.conf", "staticPodPath": dir.join("manifests"),
                    "podLogsDir": "/var/log/pods", "volumePluginDir": dir.join("volumeplugins"),
                    // The machine's disk is not this test's business.
                    "evictionHard": {
                        "memory.available": "1Mi", "nodefs.available": "0%",
                        "nodefs.inodesFree": "0%", "imagefs.available": "0%",
                        "imagefs.inodesFree": "0%", "pid.available": "0%",
                    },
                    "imageGCHighThresholdPercent": 100,
                },
            },
            // No broker runs here.
            "eventBus": {"enable": false},
            "deviceTwin": {"enable": true, "dmiSockPath": dir.join("dmi.sock")},
            "metaManager": {
                "enable": true,
                "metaServer": {"enable": true, "server": META_SERVER},
            },
            "serviceBus": {"enable": true},
            "taskManager": {"enable": true},
        },
    })
}
