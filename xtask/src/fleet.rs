//! A running `skerry up` that a test or a bench drives from outside, through a link that it can cut.

use crate::build::Programs;
use crate::relay::{Relay, Target};
use crate::sh;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A container that runs on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Running {
    /// containerd's id.
    pub(crate) id: String,
    /// Its first process.
    pub(crate) pid: u32,
}

impl Running {
    /// Those of the containers in `ids` (`ctr containers ls -q`) that run according to `tasks` (`ctr tasks ls`).
    pub(crate) fn among(ids: &str, tasks: &str) -> Vec<Self> {
        let running = tasks.lines().skip(1).filter_map(|line| {
            let mut words = line.split_whitespace();
            let (id, pid, state) = (words.next()?, words.next()?, words.next()?);
            let ours = ids.lines().any(|known| known.trim() == id);
            (ours && state == "RUNNING")
                .then(|| Some(Self { id: id.into(), pid: pid.parse().ok()? }))?
        });
        running.collect()
    }

    /// Reads a file inside the container.
    pub(crate) fn read(&self, path: &str) -> Result<String> {
        let file = format!("/proc/{}/root/{}", self.pid, path.trim_start_matches('/'));
        std::fs::read_to_string(&file).with_context(|| format!("could not read {file}"))
    }

    /// The page that a web server in the container gives, fetched over the pod's network.
    pub(crate) fn page(&self, port: u16) -> Result<String> {
        let pid = self.pid.to_string();
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["-t", &pid, "-n", "ip", "-4", "-o", "addr", "show", "eth0"]);
        let line = sh::output(&mut nsenter)?;
        let address = line.split_whitespace().nth(3).and_then(|net| net.split('/').next());
        let address: std::net::IpAddr = address.context("the pod has no address")?.parse()?;
        let peer = SocketAddr::new(address, port);
        let mut stream = std::net::TcpStream::connect_timeout(&peer, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        if !answer.starts_with("HTTP/1.0 200") && !answer.starts_with("HTTP/1.1 200") {
            bail!("{peer} answered {}", answer.lines().next().unwrap_or_default());
        }
        Ok(answer)
    }
}

/// Longest time that anything on this machine may take before the run gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// The fleet; dropped, it is stopped as Ctrl-C stops it.
pub(crate) struct Fleet {
    skerry: PathBuf,
    child: Child,
    /// Everything that `skerry up` said about itself (`up.json`).
    facts: Value,
    /// The folder of everything that runs.
    pub(crate) dir: PathBuf,
    /// The link between node and hub.
    pub(crate) link: Relay,
    /// From the start of the program to its word that all is up.
    pub(crate) start_time: Duration,
}

impl Fleet {
    /// Starts a fleet from the template in `dir`. What an earlier run left of its state is used again.
    pub(crate) fn start(programs: &Programs, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let facts_file = dir.join("up.json");
        if facts_file.exists() {
            std::fs::remove_file(&facts_file)?;
        }
        let targets = ["hub", "enrol", "tunnel"].map(|name| -> Target {
            let file = facts_file.clone();
            Box::new(move || -> Option<SocketAddr> {
                let facts: Value = serde_json::from_slice(&std::fs::read(&file).ok()?).ok()?;
                facts[name].as_str()?.parse().ok()
            })
        });
        let link = Relay::start(targets.into())?;
        let endpoints: Vec<String> = link.addresses.iter().map(ToString::to_string).collect();

        let start = std::time::Instant::now();
        let log = File::create(dir.join("up.log"))?;
        let mut command = Command::new(&programs.skerry);
        command.arg("up").arg("--dir").arg(dir).arg("--images").arg(dir.join("images"));
        command.arg("--template").arg(sh::root().join("fleet-repo-template"));
        command.arg("--edgecore").arg(&programs.edgecore);
        command.args(["--api-listen", "127.0.0.1:0", "--hub-listen", "127.0.0.1:0"]);
        command.args(["--enrol-listen", "127.0.0.1:0", "--tunnel-listen", "127.0.0.1:0"]);
        command.args(["--node-endpoints", &endpoints.join(","), "--output", "json"]);
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("could not start `{}`", programs.skerry.display()))?;
        let mut fleet = Self {
            skerry: programs.skerry.clone(),
            child,
            facts: Value::Null,
            dir: dir.into(),
            link,
            start_time: Duration::ZERO,
        };
        fleet.facts = sh::wait_for("running fleet", PATIENCE, || {
            if let Some(status) = fleet.child.try_wait()? {
                return Ok(Some(Err(status)));
            }
            let facts: Option<Value> =
                std::fs::read(&facts_file).ok().and_then(|text| serde_json::from_slice(&text).ok());
            Ok(facts.filter(|facts| facts["ready"] == true).map(Ok))
        })?
        .map_err(|status| {
            let log = dir.join("up.log");
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            anyhow::anyhow!("`skerry up` ended ({status}): {}", text.trim())
        })?;
        fleet.start_time = start.elapsed();
        Ok(fleet)
    }

    /// Process id of the cloud side.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A text of `up.json`, by JSON pointer.
    pub(crate) fn fact(&self, pointer: &str) -> Result<&str> {
        let text = self.facts.pointer(pointer).and_then(Value::as_str);
        text.with_context(|| format!("up.json has no text at `{pointer}`"))
    }

    /// Administrator's credentials.
    pub(crate) fn kubeconfig(&self) -> Result<PathBuf> {
        Ok(self.fact("/kubeconfig")?.into())
    }

    /// Process id of the agent at this moment; it changes when the agent is restarted.
    pub(crate) fn agent_pid(&self) -> Result<i32> {
        let file = self.fact("/nodes/0/pid_file")?;
        let text =
            std::fs::read_to_string(file).with_context(|| format!("could not read {file}"))?;
        text.trim().parse().with_context(|| format!("{file} holds no process id"))
    }

    /// A command of `ctr` on the node's own containerd.
    pub(crate) fn ctr(&self, args: &[&str]) -> Result<String> {
        let socket = self.fact("/nodes/0/containerd_socket")?;
        sh::output(Command::new("ctr").args(["-n", "k8s.io", "-a", socket]).args(args))
    }

    /// What `skerry VERB... --output json` says. Exit code 1 is an answer, not a failure.
    pub(crate) fn skerry(&self, args: &[&str]) -> Result<Value> {
        let done = Command::new(&self.skerry)
            .args(args)
            .args(["--output", "json"])
            .env("KUBECONFIG", self.kubeconfig()?)
            .stdin(Stdio::null())
            .output()?;
        if done.status.code() == Some(2) {
            bail!("`skerry {}` failed: {}", args.join(" "), String::from_utf8_lossy(&done.stderr));
        }
        serde_json::from_slice(&done.stdout)
            .with_context(|| format!("`skerry {}` printed no JSON", args.join(" ")))
    }

    /// Containers of an app that run on the node: name in the pod, id, process.
    pub(crate) fn running(&self, namespace: &str, container: &str) -> Result<Vec<Running>> {
        let filter = format!(
            "labels.\"io.kubernetes.pod.namespace\"=={namespace},\
             labels.\"io.kubernetes.container.name\"=={container}"
        );
        let ids = self.ctr(&["containers", "ls", "-q", &filter])?;
        let tasks = self.ctr(&["tasks", "ls"])?;
        Ok(Running::among(&ids, &tasks))
    }

    /// Stops the fleet and says whether it went in order.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.interrupt();
        let status = self.child.wait()?;
        if !status.success() {
            bail!("`skerry up` did not stop in order ({status})");
        }
        Ok(())
    }

    fn interrupt(&self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        // It may have ended by itself; then there is nothing to stop.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT);
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.interrupt();
            // Ended either way; the status was asked for where it matters, in `stop`.
            let _ = self.child.wait();
        }
    }
}
