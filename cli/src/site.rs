//! One edge node on this machine: a containerd of its own, the agent, and their end.

use crate::demo;
use crate::fault::hinted;
use crate::supervise::{Program, Supervised};
use crate::up::{write_secret, write_whole};
use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};
use skerry_edge::containerd::{self, Containerd, ContainerdError};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::process::Command;

/// Pause between two tries to undo what an earlier run left.
const CLEAN_PAUSE: Duration = Duration::from_millis(100);
/// Longest wait for the processes of an earlier run to end.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// Longest time that stopping every pod may take; pods have their own grace periods.
const RESET_LIMIT: Duration = Duration::from_secs(60);

/// Tries to undo the mounts of a node; more than one when something else undoes them at the same time.
const CLEAN_ATTEMPTS: u32 = 20;

/// Flags before the configuration file in the command lines of what runs here.
const CONFIG_FLAGS: [&[u8]; 3] = [b"--config", b"--config-file", b"-c"];

/// Seconds between two reports about a device: whoever looks at a fleet on a desk wants to see things move.
const DEVICE_REPORT_SECONDS: u32 = 1;

/// Image of pod sandboxes, one of those that the project packs.
const SANDBOX_IMAGE: &str = "skerry.local/pause:1";

/// What the node dials.
pub(crate) struct Endpoints {
    pub(crate) hub: SocketAddr,
    pub(crate) enrol: SocketAddr,
    pub(crate) tunnel: SocketAddr,
    /// `None` when there is no QUIC on the way.
    pub(crate) quic: Option<SocketAddr>,
}

/// What the agent needs for devices.
pub(crate) struct DeviceSide {
    pub(crate) broker: SocketAddr,
    /// Where mappers find the agent.
    pub(crate) dmi_socket: PathBuf,
}

/// A node that runs.
pub(crate) struct Node {
    name: String,
    dir: PathBuf,
    containerd: Containerd,
    bridge: String,
    agent: Option<Agent>,
}

struct Agent {
    program: PathBuf,
    running: Supervised,
}

impl Node {
    /// Starts the node's containerd and loads the images.
    pub(crate) async fn start(dir: &Path, name: &str, images: Option<&Path>) -> Result<Self> {
        let dir = dir.join("nodes").join(name);
        std::fs::create_dir_all(&dir)
            .with_context(|| format!("could not make the folder `{}`", dir.display()))?;
        // What a killed run left would keep the new containerd from its socket and its bridge.
        clear(&dir).await?;
        let (bridge, pods) = network(&dir);
        let options = containerd::Options::new(&pods, &bridge, SANDBOX_IMAGE);
        let containerd = Containerd::start(&dir.join("containerd"), &options).await;
        let containerd = containerd.map_err(|error| explain(error, name))?;
        let node = Self { name: name.into(), dir, containerd, bridge, agent: None };
        if let Some(images) = images {
            node.load_images(images).await?;
        }
        Ok(node)
    }

    /// The folder of all that is the node's.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The name under which it joins.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the node has a certificate already, and so needs no token.
    pub(crate) fn is_enrolled(&self) -> bool {
        self.dir.join("edge/pki/edge.pem").exists()
    }

    /// Starts the agent and keeps it running.
    pub(crate) fn run_agent(
        &mut self,
        program: &Path,
        endpoints: &Endpoints,
        token: Option<String>,
        devices: Option<&DeviceSide>,
    ) -> Result<()> {
        let token_file = self.dir.join("token");
        if let Some(token) = token {
            write_secret(&token_file, token.as_bytes())?;
        }
        let mut config = json!({
            "nodeName": self.name,
            "hub": format!("wss://{}", endpoints.hub),
            "enrol": format!("https://{}", endpoints.enrol),
            "tunnel": format!("wss://{}", endpoints.tunnel),
            "quic": endpoints.quic.map_or("off".into(), |quic| format!("quic://{quic}")),
            "tokenFile": token_file,
            "dir": self.dir.join("edge"),
            "runtimeSocket": self.containerd.socket(),
            "podLogDir": self.dir.join("logs"),
        });
        if let Some(devices) = devices {
            config["mqtt"] = json!({"server": format!("tcp://{}", devices.broker)});
            config["dmiSocket"] = json!(devices.dmi_socket);
            config["reportInterval"] = DEVICE_REPORT_SECONDS.into();
        }
        // JSON is YAML.
        write_whole(&self.config(), &serde_json::to_vec_pretty(&config)?)?;
        let running = Supervised::start(Program {
            name: "edgecore",
            program: program.to_owned(),
            args: vec!["run".into(), "--config".into(), self.config().into()],
            log: self.log(),
            pid_file: Some(self.pid_file()),
        });
        self.agent = Some(Agent { program: program.to_owned(), running });
        Ok(())
    }

    /// Ends the agent, every pod, containerd, and what they mounted and made.
    pub(crate) async fn stop(self) -> Result<()> {
        let mut outcome = Ok(());
        if let Some(agent) = self.agent {
            agent.running.stop().await;
            let mut reset = Command::new(&agent.program);
            reset.arg("reset").arg("--config").arg(self.dir.join("edgecore.yaml"));
            reset.stdin(std::process::Stdio::null()).kill_on_drop(true);
            outcome = match tokio::time::timeout(RESET_LIMIT, reset.output()).await {
                Ok(Ok(done)) if done.status.success() => Ok(()),
                Ok(Ok(done)) => Err(anyhow::anyhow!(
                    "the pods of node `{}` did not stop in order: {}",
                    self.name,
                    String::from_utf8_lossy(&done.stderr).trim()
                )),
                Ok(Err(error)) => Err(anyhow::Error::new(error).context(format!(
                    "the pods of node `{}` could not be stopped: `{}` did not start",
                    self.name,
                    agent.program.display()
                ))),
                Err(_) => Err(anyhow::anyhow!(
                    "the pods of node `{}` did not stop within {} s",
                    self.name,
                    RESET_LIMIT.as_secs()
                )),
            };
        }
        self.containerd.stop().await;
        outcome.and(clear(&self.dir).await)
    }

    /// The node's part of `up.json`.
    pub(crate) fn describe(&self) -> serde_json::Value {
        json!({
            "name": self.name,
            "dir": self.dir,
            "pid_file": self.pid_file(),
            "log": self.log(),
            "containerd_socket": self.containerd.socket(),
            "bridge": self.bridge,
        })
    }

    /// Loads image archives that this containerd has not loaded before, told by their digests.
    async fn load_images(&self, images: &Path) -> Result<()> {
        let list = std::fs::read_dir(images)
            .with_context(|| format!("could not read the image folder `{}`", images.display()))?;
        for entry in list {
            let file = entry?.path();
            if file.extension().is_none_or(|extension| extension != "tar") {
                continue;
            }
            let digest = Sha256::digest(std::fs::read(&file)?);
            let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            let mark = self.dir.join("images").join(digest);
            if mark.exists() {
                continue;
            }
            self.containerd.import(&file).await?;
            std::fs::create_dir_all(self.dir.join("images"))?;
            std::fs::write(mark, "")?;
        }
        Ok(())
    }

    fn config(&self) -> PathBuf {
        self.dir.join("edgecore.yaml")
    }

    fn pid_file(&self) -> PathBuf {
        self.dir.join("edgecore.pid")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("edgecore.log")
    }
}

/// Bridge and pod addresses of a node, from its folder: two fleets on one machine must not meet.
fn network(dir: &Path) -> (String, String) {
    let digest = Sha256::digest(dir.as_os_str().as_encoded_bytes());
    let bridge: String = digest[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    // 10.64.0.0 to 10.191.255.0, away from the first and the last addresses that people use by hand.
    let pods = format!("10.{}.{}.0/24", 64 + digest[4] / 2, digest[5]);
    (format!("skerry{bridge}"), pods)
}

/// Ends what an earlier `skerry up`, or a start that broke off, left of the node below `dir`: agent, containerd, pods,
/// mounts, bridge. The node's files stay.
pub(crate) async fn clear(dir: &Path) -> Result<()> {
    let leftovers = dir.to_owned();
    tokio::task::spawn_blocking(move || end_leftovers(&leftovers)).await?;
    let (bridge, _) = network(dir);
    let mut attempt = 1;
    loop {
        match containerd::cleanup(&dir.join("containerd"), &bridge).await {
            // A shim that was just killed may take its mounts along between our look and our hand.
            Err(ContainerdError::Unmount { .. }) if attempt < CLEAN_ATTEMPTS => {
                attempt += 1;
                tokio::time::sleep(CLEAN_PAUSE).await;
            }
            result => return Ok(result?),
        }
    }
}

/// Kills the agent and the containerd that run with the configuration files below `dir`, and waits until they are
/// gone. They are told by their command lines: a process id in a file may belong to another program by now, and is not
/// there yet when a start was killed early.
fn end_leftovers(dir: &Path) {
    let mut configs = vec![dir.join("edgecore.yaml"), dir.join("containerd/containerd.toml")];
    configs.extend(demo::configs(dir));
    let deadline = Instant::now() + STOP_LIMIT;
    loop {
        let left = started_with(&configs);
        if left.is_empty() || Instant::now() > deadline {
            break;
        }
        for pid in left {
            signal(pid, nix::sys::signal::Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // Absent when it could not be written.
    let _ = std::fs::remove_file(dir.join("edgecore.pid"));
}

/// Processes with `--config`, `--config-file` or `-c`, and one of `configs` in their command line.
fn started_with(configs: &[PathBuf]) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let ours = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        words.windows(2).any(|pair| {
            let is_ours = |config: &PathBuf| config.as_os_str().as_encoded_bytes() == pair[1];
            CONFIG_FLAGS.contains(&pair[0]) && configs.iter().any(is_ours)
        })
    };
    pids.filter(ours).collect()
}

/// Adds what a person can do about a containerd that does not start.
fn explain(error: ContainerdError, name: &str) -> anyhow::Error {
    let hint = match &error {
        ContainerdError::Run { .. } | ContainerdError::CniPlugins { .. } => {
            "install containerd, runc and the CNI plugins (`cargo xtask setup` does), or run no node here with `--node none`"
        }
        ContainerdError::SocketPath { .. } => "choose a folder with a shorter path with --dir",
        _ if !nix::unistd::Uid::effective().is_root() => {
            "edge nodes need root: run this as root, or run no node here with `--node none`"
        }
        _ => "the whole log is containerd.log in the node's folder",
    };
    let error = anyhow::Error::new(error);
    hinted(format!("the container runtime of node `{name}` did not start: {error:#}"), hint)
}

fn signal(pid: i32, signal: nix::sys::signal::Signal) {
    // Gone already is as good as signalled.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_run_left_is_ended_and_other_programs_are_not() {
        let dir = tempfile::tempdir().unwrap();
        // A shell that waits, with the words of an agent behind it.
        let start = |config: PathBuf| {
            let script = "read -r line; exit 0";
            let mut command = std::process::Command::new("sh");
            command.args(["-c", script, "edgecore", "run", "--config"]).arg(config);
            command.stdin(std::process::Stdio::piped()).spawn().unwrap()
        };
        let mut left = start(dir.path().join("edgecore.yaml"));
        let mut runtime = start(dir.path().join("containerd/containerd.toml"));
        let mut other = start(dir.path().join("other/edgecore.yaml"));
        // Ended children stay in /proc until somebody asks for them, without a command line.
        end_leftovers(dir.path());
        assert!(!left.wait().unwrap().success());
        assert!(!runtime.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none(), "another node's agent keeps running");
        drop(other.stdin.take());
        other.wait().unwrap();
    }
}
