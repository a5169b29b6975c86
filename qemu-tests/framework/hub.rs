//! The hub of the scenarios: a `skerry up` without nodes, and what an operator does with it.
//!
//! Machines reach it at 10.0.2.2, where QEMU's user-mode network puts this host's loopback. Everything is done with the
//! programs that an operator has: `skerry`, `git`, `kubectl`.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Address of this host inside a machine.
pub const HOST: &str = "10.0.2.2";
/// Longest wait for the hub to be up.
const START_LIMIT: Duration = Duration::from_secs(120);
/// Pause between two questions.
const ASK_PAUSE: Duration = Duration::from_millis(500);

/// Programs and files that the hub is made from.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The `skerry` command.
    pub skerry: PathBuf,
    /// kubectl.
    pub kubectl: PathBuf,
    /// The fleet folder that the Git remote is made from.
    pub template: PathBuf,
}

/// A running hub; dropped, it is stopped as Ctrl-C stops it.
pub struct Hub {
    programs: Programs,
    dir: PathBuf,
    child: Child,
    facts: Value,
}

/// What a machine is told about where it belongs: the text of `site.toml` as a value.
#[derive(Debug, Clone)]
pub struct Site {
    /// Counts up when a machine is told anew.
    pub revision: u64,
    /// Name of the node.
    pub name: String,
    /// Port of the hub's WebSocket on this host.
    pub hub: u16,
    /// Port of enrolment.
    pub enrol: u16,
    /// Port of QUIC; `None` is off.
    pub quic: Option<u16>,
    /// Port of the log tunnel.
    pub tunnel: u16,
    /// Join token.
    pub token: String,
    /// Digest of the authority, when it is not the token's.
    pub ca_hash: Option<String>,
    /// Time servers.
    pub ntp: Vec<String>,
}

impl Site {
    /// The file.
    pub fn text(&self) -> String {
        let mut lines = vec![format!("revision = {}", self.revision), "[node]".into()];
        lines.push(format!("name = \"{}\"", self.name));
        lines.push("[hub]".into());
        lines.push(format!("address = [\"wss://{HOST}:{}\"]", self.hub));
        lines.push(format!("enrol = \"https://{HOST}:{}\"", self.enrol));
        lines.push(match self.quic {
            Some(port) => format!("quic = \"quic://{HOST}:{port}\""),
            None => "quic = \"off\"".into(),
        });
        lines.push(format!("tunnel = \"wss://{HOST}:{}\"", self.tunnel));
        lines.extend(self.ca_hash.as_ref().map(|hash| format!("ca-hash = \"{hash}\"")));
        lines.push(format!("token = \"{}\"", self.token));
        if !self.ntp.is_empty() {
            let servers: Vec<String> = self.ntp.iter().map(|name| format!("\"{name}\"")).collect();
            lines.push(format!("[clock]\nntp = [{}]", servers.join(", ")));
        }
        lines.join("\n") + "\n"
    }
}

impl Hub {
    /// Starts a hub in `dir`, on free ports.
    pub fn start(programs: &Programs, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let dir = dir.canonicalize()?;
        let facts_file = dir.join("up.json");
        if facts_file.exists() {
            std::fs::remove_file(&facts_file)?;
        }
        let log = File::create(dir.join("up.log"))?;
        let mut command = Command::new(&programs.skerry);
        command.arg("up").arg("--dir").arg(&dir).arg("--template").arg(&programs.template);
        command.args(["--node", "none", "--advertise", HOST, "--output", "json"]);
        for listener in ["api", "hub", "quic", "enrol", "tunnel", "monitor"] {
            command.args([&format!("--{listener}-listen"), "127.0.0.1:0"]);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("could not start `{}`", programs.skerry.display()))?;
        let mut hub = Self { programs: programs.clone(), dir, child, facts: Value::Null };
        let start = Instant::now();
        loop {
            let text = std::fs::read(&facts_file).unwrap_or_default();
            if let Ok(facts) = serde_json::from_slice::<Value>(&text)
                && facts["ready"] == true
            {
                hub.facts = facts;
                return Ok(hub);
            }
            let status = hub.child.try_wait()?;
            if status.is_some() || start.elapsed() > START_LIMIT {
                let words = std::fs::read_to_string(hub.log()).unwrap_or_default();
                bail!("`skerry up` did not start: {}", words.trim());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it said.
    pub fn log(&self) -> PathBuf {
        self.dir.join("up.log")
    }

    fn fact(&self, key: &str) -> Result<&str> {
        self.facts[key].as_str().with_context(|| format!("up.json has no `{key}`"))
    }

    fn port(&self, listener: &str) -> Result<u16> {
        let address = self.fact(listener)?;
        let port = address.rsplit(':').next().and_then(|port| port.parse().ok());
        port.with_context(|| format!("`{address}` has no port"))
    }

    /// Credentials of the administrator.
    pub fn kubeconfig(&self) -> Result<PathBuf> {
        Ok(self.fact("kubeconfig")?.into())
    }

    /// The fleet's Git remote.
    pub fn remote(&self) -> Result<&str> {
        self.fact("remote")
    }

    /// A join token for a node.
    pub fn token(&self, node: &str, ttl: &str) -> Result<String> {
        let answer = self.skerry(&["token", "create", node, "--ttl", ttl])?;
        Ok(answer["token"].as_str().context("`skerry token` printed no token")?.into())
    }

    /// Everything that a new machine needs to join under a name.
    pub fn site(&self, node: &str) -> Result<Site> {
        Ok(Site {
            revision: 1,
            name: node.into(),
            hub: self.port("hub")?,
            enrol: self.port("enrol")?,
            quic: Some(self.port("quic")?),
            tunnel: self.port("tunnel")?,
            token: self.token(node, "1h")?,
            ca_hash: None,
            ntp: Vec::new(),
        })
    }

    /// What `skerry VERB... --output json` says. Exit code 1 is an answer, not a failure.
    pub fn skerry(&self, args: &[&str]) -> Result<Value> {
        let done = Command::new(&self.programs.skerry)
            .args(args)
            .args(["--output", "json"])
            .env("KUBECONFIG", self.kubeconfig()?)
            .stdin(Stdio::null())
            .output()?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(
            done.status.code() != Some(2),
            "`skerry {}` failed: {}",
            args.join(" "),
            said.trim()
        );
        serde_json::from_slice(&done.stdout)
            .with_context(|| format!("`skerry {}` printed no JSON", args.join(" ")))
    }

    /// What kubectl prints.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.programs.kubectl);
        command.arg("--kubeconfig").arg(self.kubeconfig()?).args(args);
        command.env("KUBECACHEDIR", self.dir.join("kubectl"));
        crate::disk::run(&mut command)
    }

    /// Objects that the API has, as `kubectl get ARGS -o json` shows them.
    pub fn get(&self, args: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get"], args, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).context("kubectl printed no JSON")
    }

    /// A Node, if it is registered.
    pub fn node(&self, name: &str) -> Result<Option<Value>> {
        let text = self.kubectl(&["get", "node", name, "--ignore-not-found", "-o", "json"])?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_str(&text).context("kubectl printed no JSON")?))
    }

    /// Whether the Node is registered and Ready.
    pub fn is_ready(&self, name: &str) -> Result<bool> {
        Ok(self
            .node(name)?
            .is_some_and(|node| condition(&node, "Ready").as_deref() == Some("True")))
    }

    /// Pods of an app at a site: name, phase, restarts, readiness.
    pub fn pods(&self, namespace: &str, app: &str) -> Result<Vec<Pod>> {
        let label = format!("app={app}");
        let list = self.get(&["pods", "-n", namespace, "-l", &label])?;
        let items = list["items"].as_array().context("kubectl listed no pods")?;
        Ok(items.iter().map(Pod::read).collect())
    }

    /// A working copy of the fleet repository.
    pub fn clone_fleet(&self, at: &Path) -> Result<Fleet> {
        let mut git = Command::new("git");
        crate::disk::run(git.args(["clone", "-q", self.remote()?]).arg(at))?;
        Ok(Fleet { folder: at.into() })
    }

    /// Asks until the answer is `Some`; the last error is told when there is none.
    pub fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        mut question: impl FnMut(&Self) -> Result<Option<T>>,
    ) -> Result<T> {
        wait(what, limit, || question(self))
    }

    fn interrupt(&self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        // It may have ended by itself; then there is nothing to stop.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT);
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.interrupt();
            // Ended either way.
            let _ = self.child.wait();
        }
    }
}

/// Asks until the answer is `Some`.
pub fn wait<T>(
    what: &str,
    limit: Duration,
    mut question: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        let answer = question();
        if let Ok(Some(answer)) = answer {
            return Ok(answer);
        }
        if start.elapsed() > limit {
            let last = answer.err().map(|error| format!("; last error: {error:#}"));
            bail!("no {what} after {} s{}", limit.as_secs(), last.unwrap_or_default());
        }
        std::thread::sleep(ASK_PAUSE);
    }
}

/// Status of a condition of an object.
pub fn condition(object: &Value, kind: &str) -> Option<String> {
    let conditions = object["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|condition| condition["type"] == kind)?;
    found["status"].as_str().map(str::to_owned)
}

/// What a scenario wants to know of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// As `Running`.
    pub phase: String,
    /// All containers are ready.
    pub ready: bool,
    /// Restarts of its first container.
    pub restarts: u64,
    /// Reason of the first container that waits.
    pub waiting: Option<String>,
}

impl Pod {
    fn read(object: &Value) -> Self {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
        let waiting = text("/status/containerStatuses/0/state/waiting/reason");
        Self {
            name: text("/metadata/name").unwrap_or_default().into(),
            phase: text("/status/phase").unwrap_or("Unknown").into(),
            ready: condition(object, "Ready").as_deref() == Some("True"),
            restarts: object["status"]["containerStatuses"][0]["restartCount"]
                .as_u64()
                .unwrap_or_default(),
            waiting: waiting.map(str::to_owned),
        }
    }
}

/// A working copy of the fleet repository.
pub struct Fleet {
    folder: PathBuf,
}

impl Fleet {
    /// A file of the working copy.
    pub fn read(&self, path: &str) -> Result<String> {
        std::fs::read_to_string(self.folder.join(path))
            .with_context(|| format!("the fleet has no file `{path}`"))
    }

    /// Changes one file of the working copy.
    pub fn edit(&self, path: &str, change: impl FnOnce(&str) -> String) -> Result<()> {
        let old = self.read(path)?;
        let new = change(&old);
        ensure!(new != old, "the change of `{path}` changes nothing");
        self.write(path, &new)
    }

    /// Writes a file, also a new one.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let file = self.folder.join(path);
        std::fs::create_dir_all(file.parent().context("a file lies in a folder")?)?;
        Ok(std::fs::write(file, text)?)
    }

    /// Removes a folder or a file.
    pub fn remove(&self, path: &str) -> Result<()> {
        let path = self.folder.join(path);
        if path.is_dir() {
            return Ok(std::fs::remove_dir_all(path)?);
        }
        Ok(std::fs::remove_file(path)?)
    }

    /// Commits everything and pushes it.
    pub fn push(&self, message: &str) -> Result<()> {
        for args in [
            &["add", "-A"][..],
            &[
                "-c",
                "user.name=pilot",
                "-c",
                "user.email=pilot@localhost",
                "commit",
                "-qm",
                message,
            ],
            &["push", "-q"],
        ] {
            crate::disk::run(Command::new("git").current_dir(&self.folder).args(args))?;
        }
        Ok(())
    }
}

/// The page that a web server at a TCP port of this host gives.
pub fn page(port: u16) -> Result<String> {
    use std::io::{Read, Write};
    let limit = Some(Duration::from_secs(10));
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit)?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: pilot\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let first = answer.lines().next().unwrap_or_default();
    ensure!(first.starts_with("HTTP/1.") && first.contains(" 200"), "the answer is `{first}`");
    Ok(answer)
}

/// A TCP port of this host that was free a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn site_file_names_this_host_as_machines_see_it() {
        let site = Site {
            revision: 3,
            name: "lisbon-01-a".into(),
            hub: 1,
            enrol: 2,
            quic: None,
            tunnel: 4,
            token: "hash.jwt".into(),
            ca_hash: Some("sha256:00".into()),
            ntp: vec!["10.0.2.2".into()],
        };
        assert_eq!(
            site.text(),
            "revision = 3\n[node]\nname = \"lisbon-01-a\"\n[hub]\naddress = [\"wss://10.0.2.2:1\"]\n\
             enrol = \"https://10.0.2.2:2\"\nquic = \"off\"\ntunnel = \"wss://10.0.2.2:4\"\n\
             ca-hash = \"sha256:00\"\ntoken = \"hash.jwt\"\n[clock]\nntp = [\"10.0.2.2\"]\n"
        );
    }

    #[test]
    fn pods_are_read_also_without_a_status() {
        let pod = Pod::read(&json!({
            "metadata": {"name": "web-1"},
            "status": {
                "phase": "Running",
                "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [{"restartCount": 2}],
            },
        }));
        assert!(pod.ready && pod.restarts == 2 && pod.phase == "Running");
        assert_eq!(Pod::read(&json!({})).phase, "Unknown");
    }
}
