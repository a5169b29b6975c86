//! One edge node on this machine: a containerd of its own, the agent, and their end.

use crate::up::{write_secret, write_whole};
use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};
use skerry_edge::containerd::{self, Containerd};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

/// Pause before an agent that died is started again; doubles while it dies young.
const RESTART_PAUSE: Duration = Duration::from_millis(100);
/// Longest such pause.
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(5);
/// An agent that lived this long did not die young.
const LIFE_MIN: Duration = Duration::from_secs(10);
/// Longest time that an agent may take to end after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// Longest time that stopping every pod may take; pods have their own grace periods.
const RESET_LIMIT: Duration = Duration::from_secs(60);

/// Image of pod sandboxes, one of those that the project packs.
const SANDBOX_IMAGE: &str = "skerry.local/pause:1";

/// What the node dials.
pub(crate) struct Endpoints {
    pub(crate) hub: SocketAddr,
    pub(crate) enrol: SocketAddr,
    pub(crate) tunnel: SocketAddr,
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
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Node {
    /// Starts the node's containerd and loads the images.
    pub(crate) async fn start(dir: &Path, name: &str, images: Option<&Path>) -> Result<Self> {
        let dir = dir.join("nodes").join(name);
        std::fs::create_dir_all(&dir)?;
        end_stale_agent(&dir)?;
        let (bridge, pods) = network(&dir);
        let containerd = dir.join("containerd");
        // What a killed run left would keep the new containerd from its socket and its bridge.
        containerd::cleanup(&containerd, &bridge).await?;
        let options = containerd::Options::new(&pods, &bridge, SANDBOX_IMAGE);
        let containerd = Containerd::start(&containerd, &options).await?;
        let node = Self { name: name.into(), dir, containerd, bridge, agent: None };
        if let Some(images) = images {
            node.load_images(images).await?;
        }
        Ok(node)
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
    ) -> Result<()> {
        let token_file = self.dir.join("token");
        if let Some(token) = token {
            write_secret(&token_file, token.as_bytes())?;
        }
        let config = json!({
            "nodeName": self.name,
            "hub": format!("wss://{}", endpoints.hub),
            "enrol": format!("https://{}", endpoints.enrol),
            "tunnel": format!("wss://{}", endpoints.tunnel),
            "tokenFile": token_file,
            "dir": self.dir.join("edge"),
            "runtimeSocket": self.containerd.socket(),
            "podLogDir": self.dir.join("logs"),
        });
        // JSON is YAML.
        write_whole(&self.config(), &serde_json::to_vec_pretty(&config)?)?;
        let stop = CancellationToken::new();
        let task = tokio::spawn(supervise(
            program.to_owned(),
            self.config(),
            self.pid_file(),
            self.log(),
            stop.clone(),
        ));
        self.agent = Some(Agent { program: program.to_owned(), stop, task });
        Ok(())
    }

    /// Ends the agent, every pod, containerd, and what they mounted and made.
    pub(crate) async fn stop(self) -> Result<()> {
        let mut outcome = Ok(());
        if let Some(agent) = &self.agent {
            agent.stop.cancel();
        }
        if let Some(agent) = self.agent {
            // Supervision ends by the token; a panic in it leaves nothing more to stop here.
            let _ = agent.task.await;
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
                Ok(Err(error)) => Err(error.into()),
                Err(_) => Err(anyhow::anyhow!(
                    "the pods of node `{}` did not stop within {} s",
                    self.name,
                    RESET_LIMIT.as_secs()
                )),
            };
        }
        self.containerd.stop().await;
        let cleaned = containerd::cleanup(&self.dir.join("containerd"), &self.bridge).await;
        outcome.and(cleaned.map_err(Into::into))
    }

    /// The node's part of `up.json`.
    pub(crate) fn describe(&self) -> serde_json::Value {
        json!({
            "name": self.name,
            "dir": self.dir,
            "pid_file": self.pid_file(),
            "log": self.log(),
            "containerd_socket": self.containerd.socket(),
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

/// Runs the agent until told to stop; an agent that ends by itself is started again.
async fn supervise(
    program: PathBuf,
    config: PathBuf,
    pid_file: PathBuf,
    log: PathBuf,
    stop: CancellationToken,
) {
    let mut pause = RESTART_PAUSE;
    loop {
        let born = Instant::now();
        match spawn(&program, &config, &log) {
            Ok(mut child) => {
                let pid = child.id().map(|pid| pid.to_string()).unwrap_or_default();
                if let Err(error) = write_whole(&pid_file, pid.as_bytes()) {
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "the agent's process id is not on disk"
                    );
                }
                tokio::select! {
                    status = child.wait() => {
                        let status = status.map_or_else(|e| e.to_string(), |s| s.to_string());
                        tracing::warn!(status, ?pause, "edgecore ended; starting it again");
                    }
                    () = stop.cancelled() => return end(child, &pid_file).await,
                }
            }
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    ?pause,
                    "edgecore could not be started"
                );
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => return,
        }
        let young = born.elapsed() < LIFE_MIN;
        pause = if young { (pause * 2).min(RESTART_PAUSE_MAX) } else { RESTART_PAUSE };
    }
}

fn spawn(program: &Path, config: &Path, log: &Path) -> Result<Child> {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
    let mut command = Command::new(program);
    command.arg("run").arg("--config").arg(config);
    command.stdin(std::process::Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // A group of its own, so that Ctrl-C reaches `skerry up` alone, which stops things in order.
    command.process_group(0).kill_on_drop(true);
    command.spawn().with_context(|| format!("could not start `{}`", program.display()))
}

async fn end(mut child: Child, pid_file: &Path) {
    if let Some(pid) = child.id() {
        signal(pid.cast_signed(), nix::sys::signal::Signal::SIGTERM);
    }
    if tokio::time::timeout(STOP_LIMIT, child.wait()).await.is_err() {
        tracing::warn!("edgecore did not end in {} s; killing it", STOP_LIMIT.as_secs());
        if let Err(error) = child.kill().await {
            tracing::warn!(%error, "edgecore could not be killed");
        }
    }
    // Absent when it could not be written.
    let _ = std::fs::remove_file(pid_file);
}

/// Ends an agent that an earlier `skerry up` left when it was killed itself.
fn end_stale_agent(dir: &Path) -> Result<()> {
    let pid_file = dir.join("edgecore.pid");
    let Some(pid) =
        std::fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse().ok())
    else {
        return Ok(());
    };
    // The id may belong to another program by now; the command line names the node's own configuration.
    let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if command.contains(&*dir.join("edgecore.yaml").to_string_lossy()) {
        signal(pid, nix::sys::signal::Signal::SIGKILL);
    }
    Ok(std::fs::remove_file(pid_file)?)
}

fn signal(pid: i32, signal: nix::sys::signal::Signal) {
    // Gone already is as good as signalled.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
}
