//! What this machine is and how it is, read from the files of the kernel and the system.
//!
//! A file that is missing gives an empty fact, never an error: containers and small systems lack some of them. What
//! becomes of the facts is decided in `skerry_edge_core::node`.

use crate::config::Config;
use crate::pods::RuntimeInfo;
use serde_json::json;
use skerry_edge_core::node::{Facts, Health};
use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::path::Path;

/// Below this much available memory the node is under memory pressure: kubelet's `memory.available<100Mi`.
const MEMORY_AVAILABLE_MIN_KIB: u64 = 100 * 1024;
/// Below this share of free blocks or inodes the node is under disk pressure: kubelet's `nodefs.available<10%`,
/// `nodefs.inodesFree<5%`.
const DISK_FREE_MIN: f64 = 0.10;
const INODES_FREE_MIN: f64 = 0.05;
/// Below this share of free process ids the node is under pid pressure.
const PIDS_FREE_MIN: f64 = 0.05;

/// Looks at the machine. `images` is `status.images`.
pub fn facts(config: &Config, runtime: &RuntimeInfo, images: Vec<serde_json::Value>) -> Facts {
    let machine_id = line("/etc/machine-id");
    let system_uuid = Some(line("/sys/class/dmi/id/product_uuid")).filter(|uuid| !uuid.is_empty());
    let memory = meminfo();
    let address = config.node_ip.or_else(default_address);
    Facts {
        name: config.node_name.clone(),
        labels: config.labels.clone(),
        annotations: BTreeMap::new(),
        addresses: address.iter().map(IpAddr::to_string).collect(),
        cpus: std::thread::available_parallelism().map_or(1, |count| count.get() as u64),
        memory_kib: memory.get("MemTotal").copied().unwrap_or(0),
        storage_kib: disk(&config.pod_dir).map_or(0, |disk| disk.total_kib),
        hugepages: hugepages(),
        system_uuid: system_uuid.unwrap_or_else(|| machine_id.clone()),
        machine_id,
        boot_id: line("/proc/sys/kernel/random/boot_id"),
        kernel: line("/proc/sys/kernel/osrelease"),
        os_image: os_image(&fs::read_to_string("/etc/os-release").unwrap_or_default()),
        runtime: runtime.version.clone(),
        architecture: go_architecture(std::env::consts::ARCH).into(),
        agent: env!("CARGO_PKG_VERSION").into(),
        images,
    }
}

/// Looks at how the machine and its runtime are.
pub fn health(config: &Config, runtime: &RuntimeInfo, rebuilding: bool) -> Health {
    let memory = meminfo();
    let available = memory.get("MemAvailable").copied().unwrap_or(u64::MAX);
    let disk = disk(&config.pod_dir);
    let mut not_ready = Vec::new();
    if !(runtime.ready && runtime.network_ready) {
        not_ready.push(match runtime.message.as_str() {
            "" => "container runtime status check may not have completed yet".into(),
            message => message.to_owned(),
        });
    }
    Health {
        memory_pressure: available < MEMORY_AVAILABLE_MIN_KIB,
        disk_pressure: disk
            .is_some_and(|disk| disk.free < DISK_FREE_MIN || disk.inodes_free < INODES_FREE_MIN),
        pid_pressure: pids_free().is_some_and(|free| free < PIDS_FREE_MIN),
        not_ready,
        rebuilding,
        appliance: None,
        kernel: None,
    }
}

/// The address that packets to the rest of the world leave from; nothing is sent to find it.
pub fn default_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    // TEST-NET-1: connecting a datagram socket only looks up the route.
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_unspecified())
}

#[derive(Clone, Copy)]
struct Disk {
    total_kib: u64,
    free: f64,
    inodes_free: f64,
}

fn disk(path: &Path) -> Option<Disk> {
    // The directory may not be there yet; its filesystem is that of the nearest parent.
    let stat = path.ancestors().find_map(|path| nix::sys::statvfs::statvfs(path).ok())?;
    let (blocks, files) = (stat.blocks() as f64, stat.files() as f64);
    Some(Disk {
        total_kib: stat.blocks() * stat.fragment_size() / 1024,
        free: if blocks > 0.0 { stat.blocks_available() as f64 / blocks } else { 1.0 },
        // Some filesystems have no fixed number of inodes and report none.
        inodes_free: if files > 0.0 { stat.files_available() as f64 / files } else { 1.0 },
    })
}

/// Share of the filesystem of `path` in use, in percent.
pub(crate) fn disk_use(path: &Path) -> Option<f64> {
    disk(path).map(|disk| 100.0 * (1.0 - disk.free))
}

/// Share of the memory in use, in percent.
pub(crate) fn memory_use() -> Option<f64> {
    let info = meminfo();
    let (all, free) = (*info.get("MemTotal")?, *info.get("MemAvailable")?);
    (all > 0).then(|| 100.0 * (1.0 - free as f64 / all as f64))
}

fn pids_free() -> Option<f64> {
    let max: f64 = line("/proc/sys/kernel/pid_max").parse().ok()?;
    // `running/all` is the fourth field.
    let load = line("/proc/loadavg");
    let all: f64 = load.split_whitespace().nth(3)?.split_once('/')?.1.parse().ok()?;
    Some(1.0 - all / max)
}

fn meminfo() -> BTreeMap<String, u64> {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let wanted = |line: &&str| line.starts_with("MemTotal:") || line.starts_with("MemAvailable:");
    text.lines()
        .filter(wanted)
        .filter_map(|line| {
            let (name, rest) = line.split_once(':')?;
            Some((name.to_owned(), rest.split_whitespace().next()?.parse().ok()?))
        })
        .collect()
}

fn hugepages() -> BTreeMap<u64, u64> {
    let sizes = fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    sizes
        .filter_map(|entry| {
            let name = entry.file_name();
            let size = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?;
            let size_kib: u64 = size.parse().ok()?;
            let count: u64 = line(entry.path().join("nr_hugepages")).parse().ok()?;
            Some((size_kib, count * size_kib * 1024))
        })
        .collect()
}

fn os_image(os_release: &str) -> String {
    let name = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.unwrap_or("Linux").trim_matches('"').to_owned()
}

/// Go's name for an architecture, which is what image indexes and node labels have.
fn go_architecture(rust: &str) -> &str {
    match rust {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

fn line(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// An entry of `status.images`.
pub fn image(image: &k8s_openapi::api::core::v1::ContainerImage) -> serde_json::Value {
    json!({"names": image.names, "sizeBytes": image.size_bytes})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let text = "nodeName: edge1\nhub: wss://h\nenrol: https://h\ndir: /nonexistent/skerry\nlabels: {site: lisbon}\n";
        Config::parse(Path::new("edge.yaml"), text).expect("a configuration")
    }

    #[test]
    fn this_machine_has_facts_also_for_a_directory_that_is_not_there_yet() {
        let facts = facts(&config(), &RuntimeInfo::default(), Vec::new());
        assert!(facts.cpus > 0 && facts.memory_kib > 0 && facts.storage_kib > 0);
        assert!(!facts.kernel.is_empty() && !facts.boot_id.is_empty());
        assert_eq!(facts.labels["site"], "lisbon");
    }

    #[test]
    fn runtime_that_has_not_answered_makes_the_node_not_ready_in_kubelets_words() {
        let health = health(&config(), &RuntimeInfo::default(), false);
        let expected = "container runtime status check may not have completed yet";
        assert_eq!(health.not_ready, [expected]);
    }

    #[test]
    fn os_release_gives_the_pretty_name() {
        assert_eq!(
            os_image("ID=debian\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n"),
            "Debian GNU/Linux 12"
        );
        assert_eq!(os_image(""), "Linux");
    }
}
