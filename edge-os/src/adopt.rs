//! A node changes hands, and no container notices: from KubeEdge's Go EdgeCore to this agent and back.
//!
//! Each way is planned first ([`plan_adopt`], [`plan_release`]: they read and change nothing) and then carried out
//! ([`Plan::carry_out`]). The last act of both is one rename, so that a node is always one agent's or the other's; what
//! was done before it is done again when the same command is repeated.
//!
//! - Adopt: rows of `meta` in KubeEdge's database become ours, its certificate is copied, and what runs is compared with
//!   what the pods ask for. KubeEdge's own files stay as they are.
//! - Release: KubeEdge's rows are brought up to date in one transaction after a copy of its database was made, its
//!   certificate too if ours is newer, and our database is set aside.
//!
//! The containers themselves are recognised by their marks; see [`skerry_edge_core::pods::kubelet`].
//!
//! Callers: `edgecore adopt|release`, `skerry edge adopt|release`. Neither agent may run meanwhile.
//!
//! Source: kubeedge/kubeedge, edge/pkg/metamanager/dao/models, edge/pkg/metamanager/process.go,
//! pkg/metaserver/key.go.

mod files;
mod rows;

use crate::config::{Config, ConfigError};
use crate::cri::{CriError, Runtime};
use crate::kubeedge::{self, KubeEdge};
use crate::meta_store::{self, OpenError};
use crate::node;
use crate::pods::RuntimeInfo;
use crate::pods::preview::{self, Preview};
use crate::tls::Identity;
use files::{
    copy_database, make_directory, read_credentials, read_own_credentials, rename,
    scratch_directory, split_pem, suffixed, write_file,
};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use rows::{export, import, read_copy, write_rows};
use rusqlite::Connection;
use serde::Serialize;
use serde_json::{Value, json};
use skerry_edge_core::meta::Row;
use skerry_protocol::ResourcePath;
use std::collections::HashMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Time for KubeEdge's port to show that somebody listens; it is on this machine.
const PORT_TIMEOUT: Duration = Duration::from_millis(500);
/// Rows of KubeEdge's database that are no objects: its own reports, and tokens under keys of their own.
const REPORT_KINDS: [&str; 6] =
    ["lease", "podpatch", "nodepatch", "serviceaccounttoken", "podstatus", "nodestatus"];
/// As kubelet's default, which the Node of this agent has too.
const PODS_MAX: u32 = 110;
/// Kinds of which a row that we do not hold is removed from KubeEdge's database: the object is gone.
const REMOVED_KINDS: [&str; 6] =
    ["pod", "configmap", "secret", "device", "devicemodel", "serviceaccountaccess"];

/// Which way a node goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From KubeEdge to us.
    Adopt,
    /// From us to KubeEdge.
    Release,
}

/// What becomes of an object's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// It is taken over as it is.
    Import,
    /// It is written into KubeEdge's database.
    Write,
    /// It is removed from KubeEdge's database: the object is gone.
    Remove,
    /// It is right as it is.
    Keep,
    /// It is of no use and left behind.
    Skip,
}

/// One object of a [`Plan`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedObject {
    /// `namespace/type/name`.
    pub path: String,
    /// What becomes of it.
    pub change: Change,
    /// Why, when that is not plain.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// One running container of a [`Plan`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlannedContainer {
    /// `namespace/name`.
    pub pod: String,
    /// Name in the pod.
    pub container: String,
    /// Id in the runtime.
    pub id: String,
    /// Number of the instance.
    pub restart_count: u32,
    /// Why it will be stopped; absent when it goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart: Option<String>,
}

/// All that a change of hands would do.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// Name of the Node.
    pub node: String,
    /// Which way.
    pub direction: Direction,
    /// The node is that agent's already: there is nothing to do.
    pub already: bool,
    /// An agent that runs and has to be stopped first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running: Option<String>,
    /// What becomes of the node's certificate.
    pub certificate: String,
    /// Every object, by path.
    pub objects: Vec<PlannedObject>,
    /// Every running container of a pod of the cluster.
    pub containers: Vec<PlannedContainer>,
    /// What a person should know.
    pub warnings: Vec<String>,
    #[serde(skip)]
    work: Work,
}

#[derive(Debug)]
enum Work {
    Nothing,
    Adopt {
        config: Box<Config>,
        rows: Vec<Row>,
        taken_over: HashMap<String, String>,
        /// PEM of the CA, and of key and certificate.
        credentials: Option<(String, String)>,
    },
    Release {
        config: Box<Config>,
        kubeedge: Box<KubeEdge>,
        puts: Vec<(Row, String)>,
        removes: Vec<String>,
        /// PEM of key and certificate.
        credentials: Option<(String, String)>,
    },
}

/// Why a node does not change hands.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// The configuration cannot be used.
    #[error("the configuration cannot be used")]
    Config(#[from] ConfigError),
    /// Not KubeEdge's configuration.
    #[error("`{path}` is not a configuration of KubeEdge's edge")]
    NotKubeEdge {
        /// Which file.
        path: PathBuf,
    },
    /// KubeEdge has never run here.
    #[error("there is no database of KubeEdge at `{path}`")]
    NoDatabase {
        /// Where it should be.
        path: PathBuf,
    },
    /// Our agent has nothing here.
    #[error("this node was not taken over: there is no `{path}`")]
    NotOurs {
        /// Where our database would be.
        path: PathBuf,
    },
    /// KubeEdge's database cannot be read or written.
    #[error("could not use KubeEdge's database `{path}`")]
    Database {
        /// Which one.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// Our database cannot be read or written.
    #[error("could not use this agent's database")]
    Store(#[from] OpenError),
    /// An agent still runs.
    #[error("{what}")]
    Running {
        /// Which, and how that shows.
        what: String,
        /// Which way the node was to go.
        direction: Direction,
    },
    /// What runs on the node cannot be looked at.
    #[error("the container runtime at `{socket}` does not answer")]
    Runtime {
        /// Its socket.
        socket: PathBuf,
        /// What was said.
        source: CriError,
    },
    /// The certificate is not this node's.
    #[error("`{path}` is not the certificate of node `{node}`: {reason}")]
    Certificate {
        /// Which file.
        path: PathBuf,
        /// Whose it should be.
        node: String,
        /// What is wrong.
        reason: String,
    },
    /// A file cannot be read or written.
    #[error("could not use `{path}`")]
    File {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl AdoptError {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Config(error) => error.hint(),
            Self::Store(error) => error.hint(),
            Self::NotKubeEdge { .. } => {
                Some("give KubeEdge's own file, usually /etc/kubeedge/config/edgecore.yaml".into())
            }
            Self::NoDatabase { .. } => Some(
                "a node on which KubeEdge has never run needs no adoption: `edgecore run` joins with its token".into(),
            ),
            Self::NotOurs { .. } => Some("start KubeEdge's edgecore as it is".into()),
            Self::Running { .. } => Some(
                "stop it first, for example with `systemctl stop edgecore`; containers keep running".into(),
            ),
            Self::Runtime { .. } => Some("start containerd: what runs is compared with what is wanted".into()),
            Self::Certificate { .. } => Some(
                "check modules.edged.hostnameOverride; a node keeps its name when it changes hands".into(),
            ),
            _ => None,
        }
    }
}

impl Plan {
    /// The containers that would be stopped.
    pub fn restarts(&self) -> impl Iterator<Item = &PlannedContainer> {
        self.containers.iter().filter(|one| one.restart.is_some())
    }

    /// Does what was planned.
    ///
    /// # Errors
    ///
    /// [`AdoptError`]; the node is then the agent's that it was before, and the same can be tried again.
    pub fn carry_out(self) -> Result<(), AdoptError> {
        if let Some(what) = self.running {
            return Err(AdoptError::Running { what, direction: self.direction });
        }
        match self.work {
            Work::Nothing => Ok(()),
            Work::Adopt { config, rows, taken_over, credentials } => {
                carry_out_adopt(&config, &rows, &taken_over, credentials)
            }
            Work::Release { config, kubeedge, puts, removes, credentials } => {
                carry_out_release(&config, &kubeedge, &puts, &removes, credentials)
            }
        }
    }
}

/// Refuses to run on a node that is still KubeEdge's: without its rows nobody would know what to run there.
///
/// `path` is the configuration; any file of our own passes.
///
/// # Errors
///
/// A text that says what to do.
pub fn check_ours(path: &Path, config: &Config) -> Result<(), String> {
    let Ok(Some(kubeedge)) = read_kubeedge(path) else { return Ok(()) };
    if config.database().exists() || !kubeedge.database.exists() {
        return Ok(());
    }
    Err(format!(
        "this node is KubeEdge's (`{}`); take it over first: `edgecore adopt --config {}`",
        kubeedge.database.display(),
        path.display()
    ))
}

/// Plans to take a node over from KubeEdge; `path` is KubeEdge's configuration.
///
/// # Errors
///
/// [`AdoptError`] when there is nothing to take over, or it cannot be read.
pub async fn plan_adopt(path: &Path) -> Result<Plan, AdoptError> {
    let (kubeedge, config) = read_configuration(path)?;
    let mut plan = Plan {
        node: config.node_name.clone(),
        direction: Direction::Adopt,
        already: config.database().exists(),
        running: None,
        certificate: String::new(),
        objects: Vec::new(),
        containers: Vec::new(),
        warnings: kubeedge.warnings.clone(),
        work: Work::Nothing,
    };
    if plan.already {
        return Ok(plan);
    }
    if !kubeedge.database.exists() {
        return Err(AdoptError::NoDatabase { path: kubeedge.database });
    }
    plan.running = running_kubeedge(&kubeedge);

    let stored = read_copy(&kubeedge.database)?;
    let (rows, objects) = import(&config.node_name, &stored);
    plan.objects = objects;
    let runtime = Runtime::new(&config.runtime_socket);
    let seen = look(&runtime, &config, &rows).await?;
    let taken_over =
        seen.iter().filter_map(|(_, one)| Some((one.id.clone(), one.remember.clone()?))).collect();
    plan.containers =
        seen.iter().map(|(pod, one)| planned(pod, one, one.stopped_by_us.clone())).collect();
    let down = |source| AdoptError::Runtime { socket: config.runtime_socket.clone(), source };
    for pod in preview::static_pods(&runtime).await.map_err(down)? {
        plan.warnings.push(format!(
            "pod `{pod}` comes from a file in `{}`: it is left alone, and not restarted when it ends",
            kubeedge.static_pods.display()
        ));
    }
    let credentials = read_credentials(&kubeedge, &config.node_name)?;
    plan.certificate = match &credentials {
        Some((_, identity)) => {
            if identity.not_after <= Timestamp::now().as_second() {
                plan.warnings.push("the node's certificate has expired".into());
            }
            format!("copied from `{}`", kubeedge.certificate_file.display())
        }
        None if config.token.is_some() => "none: the node joins with its token".into(),
        None => {
            plan.warnings
                .push("there is no certificate and no token: the node cannot connect".into());
            "none".into()
        }
    };
    plan.work = Work::Adopt {
        config: Box::new(config),
        rows,
        taken_over,
        credentials: credentials.map(|(ca, identity)| (ca, identity.pem)),
    };
    Ok(plan)
}

/// Plans to give a node back to KubeEdge; `path` is KubeEdge's configuration.
///
/// # Errors
///
/// [`AdoptError`] when there is nothing to give back, or it cannot be read.
pub async fn plan_release(path: &Path) -> Result<Plan, AdoptError> {
    let (kubeedge, config) = read_configuration(path)?;
    let ours = config.database();
    let mut plan = Plan {
        node: config.node_name.clone(),
        direction: Direction::Release,
        already: !ours.exists() && kubeedge.database.exists(),
        running: None,
        certificate: String::new(),
        objects: Vec::new(),
        containers: Vec::new(),
        warnings: Vec::new(),
        work: Work::Nothing,
    };
    if plan.already {
        return Ok(plan);
    }
    if !ours.exists() {
        return Err(AdoptError::NotOurs { path: ours });
    }
    plan.running = holder(&ours)
        .map(|holder| format!("this agent runs: {holder} has `{}` open", ours.display()))
        .or_else(|| running_kubeedge(&kubeedge));

    // A copy: the agent may still run while this is only looked at.
    let scratch = scratch_directory()?;
    let copy = copy_database(&ours, &scratch)?;
    let rows = meta_store::read(&copy);
    let _ = fs::remove_dir_all(&scratch);
    let (rows, events) = rows?;
    if events > 0 {
        // States are told anew by KubeEdge's kubelet.
        plan.warnings.push(format!("{events} event(s) that the cluster was not told yet are lost"));
    }
    let stored = match kubeedge.database.exists() {
        true => read_copy(&kubeedge.database)?,
        false => Vec::new(),
    };
    let runtime = Runtime::new(&config.runtime_socket);
    let seen = look(&runtime, &config, &rows).await?;
    plan.containers =
        seen.iter().map(|(pod, one)| planned(pod, one, one.stopped_by_kubelet.clone())).collect();

    let (puts, removes, objects) = export(&config.node_name, rows, &stored, &node_status(&config));
    plan.objects = objects;
    let mine = read_own_credentials(&config)?;
    let theirs = read_credentials(&kubeedge, &config.node_name).ok().flatten();
    let newer = |mine: &Identity| {
        theirs.as_ref().is_none_or(|(_, theirs)| theirs.not_before < mine.not_before)
    };
    let credentials = mine.filter(|(_, mine)| newer(mine)).map(|(ca, mine)| (ca, mine.pem));
    plan.certificate = match (&credentials, &theirs) {
        (Some(_), _) => format!("written to `{}`", kubeedge.certificate_file.display()),
        (None, Some(_)) => "KubeEdge's own is as new".into(),
        (None, None) => {
            plan.warnings.push("there is no certificate: KubeEdge needs a token to join".into());
            "none".into()
        }
    };
    plan.work = Work::Release {
        config: Box::new(config),
        kubeedge: Box::new(kubeedge),
        puts,
        removes,
        credentials,
    };
    Ok(plan)
}

fn planned(pod: &str, one: &Preview, restart: Option<String>) -> PlannedContainer {
    PlannedContainer {
        pod: pod.to_owned(),
        container: one.container.clone(),
        id: one.id.clone(),
        restart_count: one.restart_count,
        restart,
    }
}

fn read_kubeedge(path: &Path) -> Result<Option<KubeEdge>, ConfigError> {
    let text = fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let value: Value = serde_saphyr::from_str(&text)
        .map_err(|error| ConfigError::Yaml { path: path.to_owned(), message: error.to_string() })?;
    if !kubeedge::is_kubeedge(&value) {
        return Ok(None);
    }
    let mistakes = |mistakes| ConfigError::Mistakes { path: path.to_owned(), mistakes };
    kubeedge::parse(&value).map(Some).map_err(mistakes)
}

fn read_configuration(path: &Path) -> Result<(KubeEdge, Config), AdoptError> {
    let kubeedge = read_kubeedge(path)?;
    let kubeedge = kubeedge.ok_or_else(|| AdoptError::NotKubeEdge { path: path.to_owned() })?;
    Ok((kubeedge, Config::read(path)?))
}

/// Says how KubeEdge's agent shows, if it runs.
fn running_kubeedge(kubeedge: &KubeEdge) -> Option<String> {
    if let Some(holder) = holder(&kubeedge.database) {
        let path = kubeedge.database.display();
        return Some(format!("KubeEdge's edgecore runs: {holder} has `{path}` open"));
    }
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, kubeedge.local_port));
    let answers =
        kubeedge.local_port != 0 && TcpStream::connect_timeout(&address, PORT_TIMEOUT).is_ok();
    answers.then(|| format!("KubeEdge's edgecore or a kubelet runs: {address} answers"))
}

/// Finds another process that has the file at `path` open, also under another name for it.
fn holder(path: &Path) -> Option<String> {
    let wanted = fs::metadata(path).ok()?;
    let own = std::process::id().to_string();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        else {
            continue;
        };
        if pid == own {
            continue;
        }
        let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
        let open = files.flatten().filter_map(|file| fs::metadata(file.path()).ok());
        if open.into_iter().any(|file| (file.dev(), file.ino()) == (wanted.dev(), wanted.ino())) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", name.trim()));
        }
    }
    None
}

/// The least status of this machine's Node by which kubelet admits pods. Without a Node in its database KubeEdge's
/// agent ends soon after an offline start, and with one that has no capacity it refuses every pod.
fn node_status(config: &Config) -> Value {
    let facts = node::facts(config, &RuntimeInfo::default(), Vec::new());
    let amounts = json!({
        "cpu": facts.cpus.to_string(),
        "memory": format!("{}Ki", facts.memory_kib),
        "ephemeral-storage": format!("{}Ki", facts.storage_kib),
        "pods": PODS_MAX.to_string(),
    });
    let addresses = facts.addresses.iter().map(|one| json!({"type": "InternalIP", "address": one}));
    json!({
        "capacity": amounts,
        "allocatable": amounts,
        "addresses": addresses.collect::<Vec<_>>(),
        "nodeInfo": {"machineID": facts.machine_id, "systemUUID": facts.system_uuid, "bootID": facts.boot_id,
            "kernelVersion": facts.kernel, "osImage": facts.os_image, "containerRuntimeVersion": "",
            "kubeletVersion": "", "kubeProxyVersion": "", "operatingSystem": "linux",
            "architecture": facts.architecture},
    })
}

/// Looks at the running containers of the pods among `rows`; each with `namespace/name` of its pod.
async fn look(
    runtime: &Runtime,
    config: &Config,
    rows: &[Row],
) -> Result<Vec<(String, Preview)>, AdoptError> {
    let mut seen = Vec::new();
    for row in rows.iter().filter(|row| row.kind == "pod") {
        let Ok(pod) = serde_json::from_str::<Pod>(&row.json) else { continue };
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        if node != Some(&config.node_name) {
            continue;
        }
        let path: Option<ResourcePath> = row.path.parse().ok();
        let name = path.map_or_else(String::new, |path| {
            format!("{}/{}", path.namespace(), path.name().unwrap_or_default())
        });
        let previews = preview::preview(runtime, &config.pod_log_dir, &pod).await;
        let previews = previews.map_err(|source| AdoptError::Runtime {
            socket: config.runtime_socket.clone(),
            source,
        })?;
        seen.extend(previews.into_iter().map(|preview| (name.clone(), preview)));
    }
    Ok(seen)
}

fn carry_out_adopt(
    config: &Config,
    rows: &[Row],
    taken_over: &HashMap<String, String>,
    credentials: Option<(String, String)>,
) -> Result<(), AdoptError> {
    make_directory(&config.dir)?;
    if let Some((ca, identity)) = credentials {
        make_directory(&config.pki())?;
        write_file(&config.pki().join("ca.crt"), &ca)?;
        write_file(&config.pki().join("edge.pem"), &identity)?;
    }
    let next = suffixed(&config.database(), ".adopting");
    for stale in ["", "-wal", "-shm", "-journal"] {
        let _ = fs::remove_file(suffixed(&next, stale));
    }
    meta_store::create(&next, rows, taken_over)?;
    rename(&next, &config.database())
}

fn carry_out_release(
    config: &Config,
    kubeedge: &KubeEdge,
    puts: &[(Row, String)],
    removes: &[String],
    credentials: Option<(String, String)>,
) -> Result<(), AdoptError> {
    let path = &kubeedge.database;
    if path.exists() {
        let kept = suffixed(path, ".before-release");
        fs::copy(path, &kept).map_err(|source| AdoptError::File { path: kept.clone(), source })?;
    } else if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)
            .map_err(|source| AdoptError::File { path: parent.to_owned(), source })?;
    }
    let database = |source| AdoptError::Database { path: path.clone(), source };
    let mut connection = Connection::open(path).map_err(database)?;
    write_rows(&mut connection, puts, removes).map_err(database)?;
    connection.close().map_err(|(_, source)| database(source))?;

    if let Some((ca, identity)) = credentials {
        let (key, certificate) = split_pem(&identity);
        for file in [&kubeedge.ca_file, &kubeedge.key_file, &kubeedge.certificate_file] {
            if let Some(parent) = file.parent() {
                fs::create_dir_all(parent)
                    .map_err(|source| AdoptError::File { path: parent.to_owned(), source })?;
            }
        }
        write_file(&kubeedge.ca_file, &ca)?;
        write_file(&kubeedge.key_file, &key)?;
        write_file(&kubeedge.certificate_file, &certificate)?;
    }
    rename(&config.database(), &suffixed(&config.database(), ".released"))
}

#[cfg(test)]
mod tests;
