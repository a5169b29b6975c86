//! A containerd of our own: root, state, socket and network all below one directory.
//!
//! `skerry up` and tests start one beside whatever else runs on the machine. Containers outlive the
//! daemon as they should: [`Containerd::stop`] ends the daemon only, [`cleanup`] also ends what it
//! left and removes mounts, the bridge and cgroup-free state. Nothing outside the directory is
//! touched, except the bridge and the shims that name the directory's socket in their arguments.
//!
//! Source: containerd's `config default` (version 2 of its configuration), containernetworking
//! plugins' documentation of `bridge`, `host-local` and `portmap`.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::cri::{CriError, Runtime};
use crate::pods::mounts_below;

/// Time that the daemon gets to answer.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Time that the daemon gets to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two looks while waiting for the daemon.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Longest path of a unix socket.
const SOCKET_PATH_MAX: usize = 107;
/// Longest name of a network interface.
const BRIDGE_NAME_MAX: usize = 15;
/// The bit of CAP_SYS_RESOURCE in a capability set.
const CAP_SYS_RESOURCE: u64 = 1 << 24;

/// What a daemon is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Addresses of pods, `10.88.0.0/24`.
    pub pod_cidr: String,
    /// Name of the bridge that pods hang on; at most 15 bytes, and nobody else's.
    pub bridge: String,
    /// Whether pods reach the outside through the node's address. Needs iptables.
    pub masquerade: bool,
    /// Image of sandboxes; it has to be imported before the first pod.
    pub sandbox_image: String,
    /// The daemon's binary.
    pub binary: PathBuf,
    /// The client's binary, for [`Containerd::import`].
    pub client: PathBuf,
    /// Directory of the CNI plugins; found by itself if `None`.
    pub cni_bin: Option<PathBuf>,
    /// Snapshotter; `overlayfs` where it works and else `native` if `None`.
    pub snapshotter: Option<String>,
}

impl Options {
    /// Returns the defaults for a network of pods on a bridge.
    pub fn new(pod_cidr: &str, bridge: &str, sandbox_image: &str) -> Self {
        Self {
            pod_cidr: pod_cidr.to_owned(),
            bridge: bridge.to_owned(),
            masquerade: false,
            sandbox_image: sandbox_image.to_owned(),
            binary: PathBuf::from("containerd"),
            client: PathBuf::from("ctr"),
            cni_bin: None,
            snapshotter: None,
        }
    }
}

/// Why containerd could not be started, used or cleaned up.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    #[error("socket path `{path}` is longer than {SOCKET_PATH_MAX} bytes")]
    SocketPath { path: PathBuf },
    #[error("bridge name `{name}` is not an interface name of at most {BRIDGE_NAME_MAX} bytes")]
    BridgeName { name: String },
    #[error("no CNI plugins found in {tried}")]
    CniPlugins { tried: String },
    #[error("could not prepare `{path}`")]
    Prepare { path: PathBuf, source: io::Error },
    #[error("could not run `{program}`")]
    Run { program: PathBuf, source: io::Error },
    #[error("containerd ended at once; the end of its log: {log}")]
    Ended { log: String },
    #[error("containerd does not answer after {} s; the end of its log: {log}", .after.as_secs())]
    Silent { after: Duration, log: String },
    #[error("could not import `{path}`: {message}")]
    Import { path: PathBuf, message: String },
    #[error("could not ask for the imported image")]
    Image { source: CriError },
    #[error("could not unmount `{path}`")]
    Unmount { path: PathBuf, source: io::Error },
}

/// A running daemon. Dropping it leaves the daemon running; call [`Containerd::stop`].
#[derive(Debug)]
pub struct Containerd {
    child: Child,
    socket: PathBuf,
    client: PathBuf,
}

impl Containerd {
    /// Writes the configuration below `dir`, starts the daemon, and waits until it answers.
    ///
    /// A directory that was used before is taken up again, with its images and containers.
    pub async fn start(dir: &Path, options: &Options) -> Result<Self, ContainerdError> {
        let socket = socket_path(dir);
        if socket.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(ContainerdError::SocketPath { path: socket });
        }
        let name_ok = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if options.bridge.is_empty()
            || options.bridge.len() > BRIDGE_NAME_MAX
            || !options.bridge.chars().all(name_ok)
        {
            return Err(ContainerdError::BridgeName { name: options.bridge.clone() });
        }
        let config = write_config(dir, options)?;
        let log_path = log_path(dir);
        let prepare = |source| ContainerdError::Prepare { path: log_path.clone(), source };
        let log = std::fs::File::create(&log_path).map_err(prepare)?;
        let errors = log.try_clone().map_err(prepare)?;
        let mut command = std::process::Command::new(&options.binary);
        command
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            // Its own group: an interrupt from the terminal is for us, not for it.
            .process_group(0);
        let mut child = Command::from(command)
            .spawn()
            .map_err(|source| ContainerdError::Run { program: options.binary.clone(), source })?;
        let runtime = Runtime::new(&socket);
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if let Ok(Some(_)) = child.try_wait() {
                return Err(ContainerdError::Ended { log: log_tail(dir) });
            }
            let asked = tokio::time::timeout(Duration::from_secs(2), runtime.status()).await;
            if let Ok(Ok(conditions)) = asked
                && conditions.iter().any(|one| one.r#type == "RuntimeReady" && one.status)
                && conditions.iter().any(|one| one.r#type == "NetworkReady" && one.status)
            {
                return Ok(Self { child, socket, client: options.client.clone() });
            }
            if Instant::now() > deadline {
                let _ = child.kill().await;
                let log = log_tail(dir);
                return Err(ContainerdError::Silent { after: START_TIMEOUT, log });
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Returns the path of the daemon's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns the daemon's process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Imports an archive with an OCI layout and waits until pods can use its images. Returns the
    /// images' names.
    pub async fn import(&self, archive: &Path) -> Result<Vec<String>, ContainerdError> {
        let output = Command::new(&self.client)
            .arg("-a")
            .arg(&self.socket)
            .args(["-n", "k8s.io", "images", "import"])
            .arg(archive)
            .stdin(Stdio::null())
            .output()
            .await
            .map_err(|source| ContainerdError::Run { program: self.client.clone(), source })?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(ContainerdError::Import { path: archive.to_path_buf(), message });
        }
        let names: Vec<String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("unpacking ")?.split_whitespace().next())
            .map(str::to_owned)
            .collect();
        let runtime = Runtime::new(&self.socket);
        for name in &names {
            let deadline = Instant::now() + STOP_TIMEOUT;
            loop {
                let found = runtime.image_status(name).await;
                if found.map_err(|source| ContainerdError::Image { source })?.is_some() {
                    break;
                }
                if Instant::now() > deadline {
                    let message = format!("image `{name}` does not show up");
                    return Err(ContainerdError::Import { path: archive.to_path_buf(), message });
                }
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        }
        Ok(names)
    }

    /// Waits until the daemon has ended by itself.
    pub async fn wait(&mut self) -> io::Result<std::process::ExitStatus> {
        self.child.wait().await
    }

    /// Ends the daemon and leaves its containers running.
    pub async fn stop(mut self) {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        if tokio::time::timeout(STOP_TIMEOUT, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }
}

/// Returns where the daemon of `dir` listens.
pub fn socket_path(dir: &Path) -> PathBuf {
    dir.join("containerd.sock")
}

fn log_path(dir: &Path) -> PathBuf {
    dir.join("containerd.log")
}

/// Whether this process may lower the OOM score of others.
///
/// Without that right, containerd has to be told not to try, or every sandbox fails.
pub fn may_lower_oom_score() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0);
    set & CAP_SYS_RESOURCE != 0
}

/// Ends everything that the daemon of `dir` left: containers with their shims, mounts, the bridge.
/// The daemon itself has to be stopped before. The files below `dir` stay.
pub async fn cleanup(dir: &Path, bridge: &str) -> Result<(), ContainerdError> {
    let socket = socket_path(dir);
    let worked = tokio::task::spawn_blocking({
        let dir = dir.to_path_buf();
        move || {
            kill_shims(&socket);
            let mounts = mounts_below(&dir)
                .map_err(|source| ContainerdError::Prepare { path: dir.clone(), source })?;
            for path in mounts {
                umount2(&path, MntFlags::MNT_DETACH).map_err(|error| ContainerdError::Unmount {
                    path: path.clone(),
                    source: error.into(),
                })?;
            }
            Ok(())
        }
    });
    match worked.await {
        Ok(result) => result?,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
    if Path::new("/sys/class/net").join(bridge).exists() {
        let deleted = Command::new("ip")
            .args(["link", "delete", bridge])
            .stdin(Stdio::null())
            .output()
            .await
            .map_err(|source| ContainerdError::Run { program: PathBuf::from("ip"), source })?;
        if !deleted.status.success() {
            tracing::warn!(bridge, "the bridge could not be deleted");
        }
    }
    let results = Path::new("/var/lib/cni/results");
    for entry in std::fs::read_dir(results).into_iter().flatten().flatten() {
        // Named after the network, which has the bridge's name.
        if entry.file_name().to_string_lossy().starts_with(&format!("{bridge}-")) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// Kills the shims that serve `socket`, and their containers.
fn kill_shims(socket: &Path) {
    // A shim that dies hands its containers to PID 1, so they go first.
    for pid in shims(socket) {
        for child in descendants(pid) {
            let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
        }
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        let deadline = std::time::Instant::now() + STOP_TIMEOUT;
        while shims(socket).contains(&pid) && std::time::Instant::now() < deadline {
            std::thread::sleep(LOOK_INTERVAL);
        }
    }
}

/// Returns the process ids of shims that were started for `socket`.
pub fn shims(socket: &Path) -> Vec<i32> {
    let socket = socket.to_string_lossy();
    let is_shim = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let program = words.first().copied().unwrap_or_default();
        let is_shim = String::from_utf8_lossy(program).contains("containerd-shim");
        let serves =
            words.windows(2).any(|pair| pair[0] == b"-address" && pair[1] == socket.as_bytes());
        is_shim && serves
    };
    pids().filter(is_shim).collect()
}

fn pids() -> impl Iterator<Item = i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
}

fn descendants(parent: i32) -> Vec<i32> {
    let parent_of = |pid: i32| -> Option<i32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may hold blanks and brackets; the fields after its last bracket do not.
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    let all: Vec<(i32, i32)> = pids().filter_map(|pid| Some((pid, parent_of(pid)?))).collect();
    let mut found = vec![parent];
    let mut at = 0;
    while at < found.len() {
        let current = found[at];
        found.extend(all.iter().filter(|(_, up)| *up == current).map(|(pid, _)| *pid));
        at += 1;
    }
    found.remove(0);
    found
}

fn write_config(dir: &Path, options: &Options) -> Result<PathBuf, ContainerdError> {
    let prepare = |path: &Path| {
        let path = path.to_path_buf();
        move |source| ContainerdError::Prepare { path, source }
    };
    let cni_conf = dir.join("cni/net.d");
    for path in [dir.join("root"), dir.join("state"), cni_conf.clone(), dir.join("cni/ipam")] {
        std::fs::create_dir_all(&path).map_err(prepare(&path))?;
    }
    let cni_bin = match &options.cni_bin {
        Some(path) => path.clone(),
        None => find_cni_plugins()?,
    };
    let snapshotter = match &options.snapshotter {
        Some(name) => name.clone(),
        None if overlay_works(dir) => "overlayfs".to_owned(),
        None => "native".to_owned(),
    };
    let conflist = cni_conf.join("10-skerry.conflist");
    std::fs::write(&conflist, cni_config(dir, options, &cni_bin)).map_err(prepare(&conflist))?;
    let path = dir.join("containerd.toml");
    std::fs::write(&path, daemon_config(dir, options, &cni_bin, &cni_conf, &snapshotter))
        .map_err(prepare(&path))?;
    Ok(path)
}

fn daemon_config(
    dir: &Path,
    options: &Options,
    cni_bin: &Path,
    cni_conf: &Path,
    snapshotter: &str,
) -> String {
    let quote = |path: &Path| serde_json::Value::from(path.to_string_lossy()).to_string();
    let text = |text: &str| serde_json::Value::from(text).to_string();
    format!(
        r#"version = 2
root = {root}
state = {state}
disabled_plugins = [
  "io.containerd.internal.v1.opt",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
  address = {socket}

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = {sandbox_image}
  restrict_oom_score_adj = {restrict}
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  netns_mounts_under_state_dir = true

[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = {cni_bin}
  conf_dir = {cni_conf}

[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = {snapshotter}
  default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  Root = {runc_root}
"#,
        root = quote(&dir.join("root")),
        state = quote(&dir.join("state")),
        socket = quote(&socket_path(dir)),
        sandbox_image = text(&options.sandbox_image),
        restrict = !may_lower_oom_score(),
        cni_bin = quote(cni_bin),
        cni_conf = quote(cni_conf),
        snapshotter = text(snapshotter),
        runc_root = quote(&dir.join("runc")),
    )
}

fn cni_config(dir: &Path, options: &Options, cni_bin: &Path) -> String {
    let mut plugins = vec![serde_json::json!({
        "type": "bridge",
        "bridge": options.bridge,
        "isGateway": true,
        "ipMasq": options.masquerade,
        "hairpinMode": true,
        "ipam": {
            "type": "host-local",
            "dataDir": dir.join("cni/ipam"),
            "ranges": [[{"subnet": options.pod_cidr}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    })];
    // Host ports are made with iptables; without it the plugin would fail pods that need none.
    if cni_bin.join("portmap").exists() && on_path("iptables") {
        plugins.push(serde_json::json!({
            "type": "portmap", "capabilities": {"portMappings": true},
        }));
    }
    let list = serde_json::json!({
        "cniVersion": "0.4.0", "name": options.bridge, "plugins": plugins,
    });
    format!("{list:#}\n")
}

fn find_cni_plugins() -> Result<PathBuf, ContainerdError> {
    let places = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"];
    let complete = |place: &&str| {
        ["bridge", "host-local", "loopback"].iter().all(|name| Path::new(place).join(name).exists())
    };
    match places.iter().find(|place| complete(place)) {
        Some(place) => Ok(PathBuf::from(place)),
        None => Err(ContainerdError::CniPlugins { tried: places.join(", ") }),
    }
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).exists())
}

/// Tries an overlay below `dir`: some file systems cannot carry one.
fn overlay_works(dir: &Path) -> bool {
    let base = dir.join("overlay-check");
    let folders = ["lower", "upper", "work", "merged"].map(|name| base.join(name));
    let made = folders.iter().all(|folder| std::fs::create_dir_all(folder).is_ok());
    let [lower, upper, work, merged] = &folders;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let works = made
        && mount(
            Some("overlay"),
            merged,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .is_ok();
    if works {
        let _ = umount2(merged, MntFlags::MNT_DETACH);
    }
    let _ = std::fs::remove_dir_all(&base);
    works
}

/// Returns the end of the daemon's log, for errors.
fn log_tail(dir: &Path) -> String {
    const LINES: usize = 8;
    let text = std::fs::read_to_string(log_path(dir)).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_configuration_stays_below_the_directory() {
        let options = Options::new("10.99.0.0/24", "sk-test", "pause:1");
        let text = cni_config(Path::new("/d"), &options, Path::new("/none"));
        let list: serde_json::Value = serde_json::from_str(&text).expect("is JSON");
        assert_eq!(list["plugins"][0]["ipam"]["dataDir"], "/d/cni/ipam");
        assert_eq!(list["plugins"][0]["bridge"], "sk-test");
        assert_eq!(list["plugins"][1], serde_json::Value::Null);
    }

    #[tokio::test]
    async fn names_that_the_system_cannot_take_are_refused() {
        let long = PathBuf::from(format!("/{}", "a".repeat(120)));
        let options = Options::new("10.99.0.0/24", "sk-test", "pause:1");
        let error = Containerd::start(&long, &options).await.expect_err("too long");
        assert!(matches!(error, ContainerdError::SocketPath { .. }));
        let options = Options { bridge: "a-name-that-is-too-long".to_owned(), ..options };
        let error = Containerd::start(Path::new("/d"), &options).await.expect_err("bad name");
        assert!(matches!(error, ContainerdError::BridgeName { .. }));
    }

    #[test]
    fn descendants_are_found_through_their_parents() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep runs");
        let pid = i32::try_from(child.id()).expect("small");
        let own = i32::try_from(std::process::id()).expect("small");
        assert!(descendants(own).contains(&pid));
        child.kill().expect("ends");
        child.wait().expect("is reaped");
    }
}
