//! CNI plugins: `bridge`, `host-local`, `loopback` and `portmap`, by netlink and without helpers.
//!
//! The container runtime starts the binary under one of these names for every pod, with its
//! request in `CNI_*` variables and a configuration on standard input. Drop-in for the plugins of
//! the same names: the same configuration, the same results, the same files of `host-local`; the
//! differences are at the end of this header. The reason is time: the usual plugins run `iptables`
//! dozens of times for the first pod.
//!
//! [`run`] is the program, [`execute`] the same without the process around it.
//!
//! Differences: results of CNI 0.3.0 to 1.0.0 only (older ones have another shape; 1.1.0 is not
//! there yet); `bridge` knows no VLANs, no promiscuous and no isolated ports and refuses them with
//! code 2; packets are translated in the nf_tables table `skerry` ([`firewall`]), not by iptables;
//! `portmap` refuses conditions in iptables' language.
//!
//! Source: containernetworking/cni, SPEC.md 1.0.0; containernetworking/plugins, the documents of
//! the four plugins, and what they print.

pub mod bridge;
pub mod firewall;
pub mod host_local;
pub mod loopback;
pub mod portmap;
pub mod result;

use crate::netlink::NetlinkError;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Versions of the specification whose results can be given.
pub const VERSIONS: [&str; 4] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0"];
/// Longest configuration that is read.
const CONFIG_LEN_MAX: u64 = 1024 * 1024;
/// Longest id of a container.
const CONTAINER_ID_LEN_MAX: usize = 253;

/// Why a plugin did not do what it was asked; the runtime gets it as JSON with a code.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CniError {
    /// The configuration asks for another version of the specification.
    #[error("CNI version `{0}` is not supported")]
    Version(String),
    /// The configuration asks for what this plugin does not do.
    #[error("`{0}` is not supported")]
    Unsupported(String),
    /// A variable of the request is missing or wrong.
    #[error("{0}")]
    Environment(String),
    /// A file could not be used.
    #[error("could not {what} `{}`", path.display())]
    File { what: &'static str, path: PathBuf, source: std::io::Error },
    /// Standard input is no JSON, or not what the plugin reads.
    #[error("configuration cannot be read")]
    Decode(#[source] serde_json::Error),
    /// The configuration is readable and wrong.
    #[error("{0}")]
    Config(String),
    /// No address is left.
    #[error("no address is free in {0}")]
    Exhausted(String),
    /// The kernel refused.
    #[error("network of the container could not be set up")]
    Kernel(#[source] NetlinkError),
    /// Something is in the way.
    #[error("{0}")]
    Conflict(String),
    /// `CHECK` found that something is not as it was made.
    #[error("{0}")]
    Changed(String),
    /// Another plugin that this one asks failed; its own words.
    #[error("plugin `{plugin}` failed: {message}")]
    Delegate { plugin: String, message: String },
}

impl From<NetlinkError> for CniError {
    fn from(error: NetlinkError) -> Self {
        Self::Kernel(error)
    }
}

impl CniError {
    /// Returns the code of the specification; those from 100 on are ours.
    pub fn code(&self) -> u32 {
        match self {
            Self::Version(_) => 1,
            Self::Unsupported(_) => 2,
            Self::Environment(_) => 4,
            Self::File { .. } => 5,
            Self::Decode(_) => 6,
            Self::Config(_) => 7,
            Self::Exhausted(_) => 11,
            Self::Kernel(_) => 100,
            Self::Conflict(_) => 101,
            Self::Changed(_) => 102,
            Self::Delegate { .. } => 103,
        }
    }

    /// Returns the object that the specification asks for.
    pub fn to_json(&self, version: &str) -> Value {
        let mut details = Vec::new();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            details.push(error.to_string());
            source = error.source();
        }
        json!({
            "cniVersion": version, "code": self.code(), "msg": self.to_string(),
            "details": details.join(": "),
        })
    }
}

/// The variables of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// `ADD`, `DEL`, `CHECK` or `VERSION`.
    pub command: String,
    /// Whose network it is.
    pub container_id: String,
    /// Path of the network namespace; may be empty for `DEL`.
    pub netns: String,
    /// Name of the interface in the container.
    pub ifname: String,
    /// `KEY=value;KEY=value`.
    pub args: String,
    /// Folders with plugins, separated by colons.
    pub path: String,
}

impl Request {
    /// Reads the variables of this process.
    pub fn from_environment() -> Self {
        let read = |name: &str| std::env::var(name).unwrap_or_default();
        Self {
            command: read("CNI_COMMAND"),
            container_id: read("CNI_CONTAINERID"),
            netns: read("CNI_NETNS"),
            ifname: read("CNI_IFNAME"),
            args: read("CNI_ARGS"),
            path: read("CNI_PATH"),
        }
    }

    /// Returns the name under which translations belong to this interface of this container.
    pub(crate) fn owner(&self) -> String {
        format!("{}/{}", self.container_id, self.ifname)
    }

    fn check(&self) -> Result<(), CniError> {
        let wrong = |text: String| Err(CniError::Environment(text));
        let id_fits = self.container_id.len() <= CONTAINER_ID_LEN_MAX
            && self.container_id.starts_with(|c: char| c.is_ascii_alphanumeric())
            && self.container_id.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
        if !id_fits {
            return wrong(format!("CNI_CONTAINERID `{}` is no container id", self.container_id));
        }
        let name_fits = (1..=crate::netlink::route::NAME_MAX).contains(&self.ifname.len())
            && !matches!(self.ifname.as_str(), "." | "..")
            && self.ifname.chars().all(|c| c.is_ascii_graphic() && c != '/' && c != ':');
        if !name_fits {
            return wrong(format!("CNI_IFNAME `{}` is no name of an interface", self.ifname));
        }
        if self.netns.is_empty() && self.command != "DEL" {
            return wrong("CNI_NETNS is missing".to_owned());
        }
        Ok(())
    }
}

/// Is the plugin `name` (`bridge`, `host-local`, `loopback` or `portmap`): reads the request, does
/// it, prints result or error.
pub fn run(name: &str) -> ExitCode {
    let request = Request::from_environment();
    let mut stdin = Vec::new();
    if let Err(error) = std::io::stdin().lock().take(CONFIG_LEN_MAX).read_to_end(&mut stdin) {
        eprintln!("standard input: {error}");
    }
    match execute(name, &request, &stdin) {
        Ok(Some(result)) => {
            println!("{result}");
            ExitCode::SUCCESS
        }
        Ok(None) => ExitCode::SUCCESS,
        Err(error) => {
            let config: Option<Value> = serde_json::from_slice(&stdin).ok();
            let version = config.as_ref().and_then(|config| config["cniVersion"].as_str());
            println!("{}", error.to_json(version.unwrap_or(VERSIONS[VERSIONS.len() - 1])));
            ExitCode::FAILURE
        }
    }
}

/// Does one request in this process; returns what has to be printed.
///
/// The calling thread visits the container's namespace and comes back.
pub fn execute(name: &str, request: &Request, stdin: &[u8]) -> Result<Option<Value>, CniError> {
    if request.command == "VERSION" {
        let config: Value = serde_json::from_slice(stdin).unwrap_or_default();
        let version = config["cniVersion"].as_str().unwrap_or(VERSIONS[VERSIONS.len() - 1]);
        return Ok(Some(json!({"cniVersion": version, "supportedVersions": VERSIONS})));
    }
    if !matches!(request.command.as_str(), "ADD" | "DEL" | "CHECK") {
        let text = format!("CNI_COMMAND `{}` is not known", request.command);
        return Err(CniError::Environment(text));
    }
    request.check()?;
    let config: Value = serde_json::from_slice(stdin).map_err(CniError::Decode)?;
    let version = config["cniVersion"].as_str().unwrap_or_default();
    if !VERSIONS.contains(&version) {
        return Err(CniError::Version(version.to_owned()));
    }
    if request.command == "CHECK" && version < "0.4.0" {
        return Err(CniError::Version(format!("{version} with CHECK")));
    }
    let network = config["name"].as_str().unwrap_or_default();
    let name_fits = network.starts_with(|c: char| c.is_ascii_alphanumeric())
        && network.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if !name_fits {
        return Err(CniError::Config(format!("`name` is `{network}`, which names no network")));
    }
    match (name, request.command.as_str()) {
        ("bridge", "ADD") => bridge::add(request, config).map(Some),
        ("bridge", "DEL") => bridge::delete(request, config).map(|()| None),
        ("bridge", _) => bridge::check(request, config).map(|()| None),
        ("host-local", "ADD") => {
            let version = version.to_owned();
            host_local::add(request, &config).map(|result| Some(result.to_json(&version)))
        }
        ("host-local", "DEL") => host_local::delete(request, &config).map(|()| None),
        ("host-local", _) => host_local::check(request, &config).map(|()| None),
        ("loopback", "ADD") => loopback::add(request, config).map(Some),
        ("loopback", "DEL") => loopback::delete(request).map(|()| None),
        ("loopback", _) => loopback::check(request).map(|()| None),
        ("portmap", "ADD") => portmap::add(request, config).map(Some),
        ("portmap", "DEL") => portmap::delete(request, config).map(|()| None),
        ("portmap", _) => portmap::check(request, config).map(|()| None),
        _ => Err(CniError::Unsupported(name.to_owned())),
    }
}

/// Opens the namespace of a container.
pub(crate) fn open_namespace(path: &str) -> Result<File, CniError> {
    let path = Path::new(path);
    File::open(path).map_err(|source| CniError::File {
        what: "open network namespace",
        path: path.to_path_buf(),
        source,
    })
}

/// Opens the namespace of a container if it is still one: after a restart of the machine its path
/// may be gone, or an empty file that nothing is mounted on.
pub(crate) fn namespace_if_there(path: &str) -> Option<File> {
    let namespace = open_namespace(path).ok()?;
    let kind = nix::sys::statfs::fstatfs(&namespace).ok()?.filesystem_type();
    (kind == nix::sys::statfs::NSFS_MAGIC).then_some(namespace)
}

/// Does `work` on this thread within the network namespace `namespace` and comes back.
pub(crate) fn within<T>(
    namespace: &File,
    work: impl FnOnce() -> Result<T, CniError>,
) -> Result<T, CniError> {
    use nix::sched::{CloneFlags, setns};
    let own_path = "/proc/thread-self/ns/net";
    let own = open_namespace(own_path)?;
    let enter = |target: &File| {
        setns(target, CloneFlags::CLONE_NEWNET).map_err(|error| CniError::File {
            what: "enter network namespace",
            path: PathBuf::from(own_path),
            source: error.into(),
        })
    };
    enter(namespace)?;
    let result = work();
    enter(&own)?;
    result
}

/// Writes a kernel setting of this thread's namespace, such as `net/ipv4/ip_forward`.
pub(crate) fn set_sysctl(name: &str, value: &str) -> Result<(), CniError> {
    let path = Path::new("/proc/sys").join(name);
    // What is set already is not written: on some hosts the file is read-only.
    if std::fs::read_to_string(&path).is_ok_and(|old| old.trim() == value) {
        return Ok(());
    }
    std::fs::write(&path, value).map_err(|source| CniError::File { what: "write", path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(command: &str) -> Request {
        Request {
            command: command.to_owned(),
            container_id: "c1".to_owned(),
            netns: "/proc/self/ns/net".to_owned(),
            ifname: "eth0".to_owned(),
            ..Request::default()
        }
    }

    fn code(name: &str, request: &Request, stdin: &str) -> u32 {
        execute(name, request, stdin.as_bytes()).expect_err("it is refused").code()
    }

    #[test]
    fn version_lists_what_is_supported() {
        let request = Request { command: "VERSION".to_owned(), ..Request::default() };
        let result = execute("bridge", &request, b"").expect("it answers").expect("with JSON");
        assert_eq!(result["supportedVersions"], json!(VERSIONS));
    }

    #[test]
    fn wrong_requests_get_the_codes_of_the_specification() {
        let good = r#"{"cniVersion":"1.0.0","name":"n","type":"bridge"}"#;
        assert_eq!(code("bridge", &request("ADDD"), good), 4);
        assert_eq!(
            code("bridge", &Request { container_id: "../x".into(), ..request("ADD") }, good),
            4
        );
        assert_eq!(code("bridge", &Request { ifname: "a/b".into(), ..request("ADD") }, good), 4);
        assert_eq!(code("bridge", &Request { netns: String::new(), ..request("ADD") }, good), 4);
        assert_eq!(code("bridge", &request("ADD"), "{"), 6);
        assert_eq!(code("bridge", &request("ADD"), r#"{"cniVersion":"9.9.9","name":"n"}"#), 1);
        assert_eq!(code("bridge", &request("CHECK"), r#"{"cniVersion":"0.3.1","name":"n"}"#), 1);
        assert_eq!(code("bridge", &request("ADD"), r#"{"cniVersion":"1.0.0","name":"../n"}"#), 7);
        assert_eq!(code("bridge", &request("ADD"), good), 7); // no `ipam`
        let vlan = r#"{"cniVersion":"1.0.0","name":"n","vlan":3,"ipam":{"type":"host-local"}}"#;
        assert_eq!(code("bridge", &request("ADD"), vlan), 2);
    }

    #[test]
    fn errors_are_objects_with_code_message_and_details() {
        let error = CniError::Decode(serde_json::from_str::<Value>("{").expect_err("cut"));
        let json = error.to_json("1.0.0");
        assert_eq!(json["code"], 6);
        assert_eq!(json["cniVersion"], "1.0.0");
        assert!(json["details"].as_str().is_some_and(|text| !text.is_empty()));
    }
}
