//! The room's container runtime, for either edge.

use super::part::Part;
use super::room::BRIDGE;
use crate::fleet::Running;
use crate::sh;
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Image of pod sandboxes, one of those that the project packs.
pub(super) const SANDBOX_IMAGE: &str = "skerry.local/pause:1";
const START_LIMIT: Duration = Duration::from_secs(60);
/// The bit of CAP_SYS_RESOURCE in a capability set.
const CAP_SYS_RESOURCE: u64 = 1 << 24;

/// A containerd of the room's own.
pub(super) struct Containerd {
    part: Part,
    pub(super) socket: PathBuf,
}

impl Containerd {
    /// Starts it below `dir` and loads `images`.
    pub(super) fn start(dir: &Path, images: &[PathBuf]) -> Result<Self> {
        let own = dir.join("containerd");
        let socket = own.join("containerd.sock");
        let plugins = ["/usr/lib/cni", "/opt/cni/bin"];
        let plugins = plugins.into_iter().find(|folder| Path::new(folder).join("bridge").exists());
        let plugins = plugins.context("no CNI plugins found\nhint: `cargo xtask setup`")?;
        std::fs::create_dir_all(own.join("cni"))?;
        let network = json!({"cniVersion": "1.0.0", "name": "interop", "plugins": [
            {"type": "bridge", "bridge": BRIDGE, "isGateway": true, "ipMasq": false, "ipam": {
                "type": "host-local", "dataDir": own.join("ipam"),
                "ranges": [[{"subnet": "10.88.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
        ]});
        std::fs::write(own.join("cni/10-interop.conflist"), network.to_string())?;
        let quote = |path: PathBuf| json!(path.to_string_lossy()).to_string();
        let config = format!(
            r#"version = 2
root = {root}
state = {state}

[grpc]
  address = {socket}

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{SANDBOX_IMAGE}"
  restrict_oom_score_adj = {restrict}
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{plugins}"
  conf_dir = {cni}

[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "native"
  default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"#,
            root = quote(own.join("root")),
            state = quote(own.join("state")),
            socket = quote(socket.clone()),
            restrict = !may_lower_oom_score(),
            cni = quote(own.join("cni")),
        );
        let file = own.join("containerd.toml");
        std::fs::write(&file, config)?;
        let mut command = Command::new("containerd");
        command.arg("--config").arg(file);
        let mut this = Self { part: Part::start("containerd", dir, command)?, socket };
        sh::wait_for("containerd", START_LIMIT, || {
            this.part.check().map_err(|error| error.context("containerd cannot run"))?;
            this.ctr(&["version"]).map(Some)
        })?;
        for image in images {
            this.ctr(&["images", "import", &image.to_string_lossy()])?;
        }
        Ok(this)
    }

    /// A command of `ctr`.
    pub(super) fn ctr(&self, args: &[&str]) -> Result<String> {
        sh::output(Command::new("ctr").args(["-n", "k8s.io", "-a"]).arg(&self.socket).args(args))
    }

    /// The one container of a pod that runs.
    pub(super) fn running(&self, namespace: &str, pod: &str) -> Result<Running> {
        let all = self.all_running(namespace, pod)?;
        match all.as_slice() {
            [one] => Ok(one.clone()),
            [] => bail!("no container of pod `{pod}` runs on the node"),
            many => bail!("{} containers of pod `{pod}` run on the node", many.len()),
        }
    }

    /// All containers of a pod that run, its sandbox left out.
    pub(super) fn all_running(&self, namespace: &str, pod: &str) -> Result<Vec<Running>> {
        let filter = format!(
            "labels.\"io.kubernetes.pod.namespace\"=={namespace},\
             labels.\"io.kubernetes.pod.name\"=={pod},labels.\"io.cri-containerd.kind\"==container"
        );
        let ids = self.ctr(&["containers", "ls", "-q", &filter])?;
        let tasks = self.ctr(&["tasks", "ls"])?;
        Ok(Running::among(&ids, &tasks))
    }

    /// Ends the daemon; containers end with the room.
    pub(super) fn stop(self) -> Result<()> {
        self.part.stop()
    }
}

/// Without that right, containerd has to be told not to try, or every sandbox fails.
pub(super) fn may_lower_oom_score() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0);
    set & CAP_SYS_RESOURCE != 0
}
