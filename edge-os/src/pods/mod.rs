//! The pod engine: runs the pods it is given on the container runtime of this node.
//!
//! One owner loop ([`owner`]) knows which pods there are and listens to the runtime; one worker
//! task per pod ([`worker`]) asks `skerry_edge_core::pods` what to do next and does it. The agent
//! hands in pods and reads [`EngineEvent`]s; where pods come from and where statuses go is not the
//! engine's business. It decides from what is on this machine and never waits for the link: a
//! ConfigMap or Secret that is not here yet is asked for through [`Objects::fetch`] beside the pod's
//! own work.
//!
//! Containers belong to the runtime, not to this process: dropping an [`Engine`] stops its tasks
//! and leaves every container running; the next engine adopts them by their labels.
//!
//! Behaviour follows kubelet as users see it; facts: kubernetes/kubernetes pkg/kubelet.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use futures::future::BoxFuture;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, ContainerImage, Pod, PodStatus, Secret};
use tokio::sync::{mpsc, oneshot, watch};

use crate::cri::{CriError, Runtime};

mod container;
mod files;
mod images;
mod logs;
mod owner;
pub mod preview;
mod probes;
mod worker;

pub(crate) use files::mounts_below;
pub use skerry_edge_core::pods::backoff::RestartRecord;

/// Commands that may wait for the owner loop; it takes one in microseconds, so this is only
/// reached when a caller floods it, and then the caller waits.
const COMMANDS_MAX: usize = 256;

/// Events that may wait for the agent; workers wait when it is full, and nothing is lost.
const EVENTS_MAX: usize = 1024;

/// What the engine has to know about this node and its machine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Name of the node; pods with another `spec.nodeName` are ignored.
    pub node_name: String,
    /// Directory of pod data (`<root>/pods/<uid>`); made if missing.
    pub root: PathBuf,
    /// Directory of container logs, one folder per pod; made if missing.
    pub log_root: PathBuf,
    /// Unix socket of the runtime (containerd).
    pub cri_socket: PathBuf,
    /// Address of the node, given as `hostIP` and as the IP of host-network pods.
    pub node_ip: Option<IpAddr>,
    /// Addresses of the cluster's DNS; empty makes `ClusterFirst` behave as `Default`.
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster, `cluster.local` by default.
    pub cluster_domain: String,
    /// The resolver file of the node, `/etc/resolv.conf` by default.
    pub resolv_conf: PathBuf,
    /// CPU of the node in millicores, from the machine by default.
    pub cpu_milli: u64,
    /// Memory of the node in bytes, from the machine by default.
    pub memory_bytes: u64,
    /// Longest delay between two starts of a crashing container, 300 s by default.
    pub restart_delay_max: Duration,
    /// A log of this size is rotated, 10 MiB by default.
    pub log_size_max: u64,
    /// Files kept per container log, the live one included; 5 by default.
    pub log_files_max: usize,
    /// `<key>=<value>` pairs that every container gets first, for example
    /// `KUBERNETES_SERVICE_HOST` of the node's local API.
    pub env: Vec<(String, String)>,
    /// Parent cgroup of all pods, `/kubepods` by default; one that ends in `.slice` is systemd's, empty leaves it to
    /// the runtime.
    pub cgroup_root: String,
}

impl EngineConfig {
    /// Returns the defaults for a node whose pod data lies in `root`.
    pub fn new(node_name: &str, root: PathBuf, log_root: PathBuf, cri_socket: PathBuf) -> Self {
        let memory_bytes = std::fs::read_to_string("/proc/meminfo")
            .ok()
            .and_then(|text| {
                let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
                line.split_whitespace().nth(1)?.parse::<u64>().ok()
            })
            .map_or(0, |kib| kib * 1024);
        let cpus = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
        Self {
            node_name: node_name.to_owned(),
            root,
            log_root,
            cri_socket,
            node_ip: None,
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".to_owned(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            cpu_milli: cpus * 1000,
            memory_bytes,
            restart_delay_max: Duration::from_secs(300),
            log_size_max: 10 << 20,
            log_files_max: 5,
            env: Vec::new(),
            cgroup_root: "/kubepods".to_owned(),
        }
    }
}

/// Which kind of object a pod refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ObjectKind {
    ConfigMap,
    Secret,
}

/// A token for a projected volume.
#[derive(Debug, Clone)]
pub struct ServiceAccountToken {
    pub token: String,
    pub expires: Timestamp,
}

/// What a token is asked for; fields as in `authentication.k8s.io/v1` TokenRequest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TokenQuery {
    pub namespace: String,
    pub service_account: String,
    pub audiences: Vec<String>,
    pub expiration_seconds: i64,
    pub pod_name: String,
    pub pod_uid: String,
}

/// Why an object could not be fetched; the text ends in pod events.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct FetchError(pub String);

/// The objects pods refer to. The agent answers from its database.
pub trait Objects: Send + Sync + 'static {
    /// Returns the ConfigMap as it is stored here.
    fn config_map(&self, namespace: &str, name: &str) -> Option<Arc<ConfigMap>>;

    /// Returns the Secret as it is stored here.
    fn secret(&self, namespace: &str, name: &str) -> Option<Arc<Secret>>;

    /// Asks the cloud for an object that is not stored here, and stores it.
    ///
    /// The engine looks it up again when this returns, with or without success. While offline it
    /// should return an error at once. The engine bounds the wait.
    fn fetch<'a>(
        &'a self,
        kind: ObjectKind,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<(), FetchError>>;

    /// Returns a token for a pod, from the store or from the cloud.
    fn token<'a>(
        &'a self,
        query: &'a TokenQuery,
    ) -> BoxFuture<'a, Result<ServiceAccountToken, FetchError>> {
        let _ = query;
        Box::pin(async { Err(FetchError("service account tokens are not available".to_owned())) })
    }
}

/// Restart counts and delays that outlive the agent. Called seldom: once per container start.
pub trait RestartState: Send + Sync + 'static {
    /// Returns everything stored; called once at start.
    fn load(&self) -> Vec<RestartRecord>;

    /// Stores `record` over the one with the same pod and container.
    fn save(&self, record: &RestartRecord);

    /// Removes the records of a pod.
    fn forget(&self, pod_uid: &str);

    /// Returns containers that ran when the node was taken over from another agent: the hash of the definition each
    /// had then, by container id. Called once at start.
    fn taken_over(&self) -> HashMap<String, String> {
        HashMap::new()
    }
}

/// Something the agent has to pass on.
#[derive(Debug, Clone)]
pub enum EngineEvent {
    /// A pod's status is new. The newest one replaces the ones before it.
    Status(PodUpdate),
    /// A deleted pod's containers, mounts and directories are gone; its API object may go.
    Gone(PodGone),
    /// Something worth telling the user about a pod.
    Event(PodEvent),
}

/// A pod's status, complete, as the API's `status` should read.
#[derive(Debug, Clone)]
pub struct PodUpdate {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub status: PodStatus,
}

/// A deleted pod of which nothing is left on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodGone {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

/// An event about a pod; the agent adds source and host, and aggregates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodEvent {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// `spec.containers{x}`, or empty.
    pub field_path: String,
    /// Whether the type is `Warning`; `Normal` otherwise.
    pub warning: bool,
    pub reason: &'static str,
    pub message: String,
    pub time: Timestamp,
}

/// State of the container runtime, for the node's conditions and `nodeInfo`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeInfo {
    /// `containerd://1.6.20`; empty until the runtime has answered once.
    pub version: String,
    /// Whether the runtime answers and says it is ready.
    pub ready: bool,
    /// Whether the runtime has a working network configuration.
    pub network_ready: bool,
    /// Why one of the above is false, in kubelet's words; empty when all is well.
    pub message: String,
}

/// Why the engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("could not make directory `{path}`")]
    Directory { path: PathBuf, source: std::io::Error },
}

/// Why there is no log file to read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogPathError {
    #[error("pod \"{0}\" not found")]
    PodNotFound(String),
    #[error("container {container} is not valid for pod {pod}")]
    ContainerNotFound { pod: String, container: String },
    #[error("container \"{container}\" in pod \"{pod}\" is waiting to start: {reason}")]
    Waiting { pod: String, container: String, reason: String },
    #[error("previous terminated container \"{container}\" in pod \"{pod}\" not found")]
    NoPrevious { pod: String, container: String },
}

/// A container's log file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFile {
    pub path: PathBuf,
    /// Whether the container still runs, so that following makes sense.
    pub running: bool,
}

/// The engine's front. Dropping it stops the engine's tasks and no container.
pub struct Engine {
    commands: mpsc::Sender<Command>,
    runtime_info: watch::Receiver<RuntimeInfo>,
    board: Arc<Board>,
    runtime: Runtime,
    log_root: PathBuf,
    owner: tokio::task::JoinHandle<()>,
}

/// What workers publish for readers that must not wait.
#[derive(Default)]
pub(crate) struct Board {
    pods: RwLock<HashMap<String, BoardEntry>>,
}

#[derive(Clone)]
pub(crate) struct BoardEntry {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) status: PodStatus,
}

/// How many pods of a workload may run on this node at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    pub namespace: String,
    /// A pod, or what is before a `-` in the names of pods.
    pub workload: String,
    pub replicas: u32,
}

impl Limit {
    pub(crate) fn is_of(&self, namespace: &str, pod: &str) -> bool {
        self.namespace == namespace && is_of(&self.workload, pod)
    }
}

/// Whether a pod belongs to a workload, as far as names tell.
fn is_of(workload: &str, pod: &str) -> bool {
    let rest = pod.strip_prefix(workload);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// What callers ask of the owner loop.
pub(crate) enum Command {
    SetPods(Vec<Arc<Pod>>),
    Resume { pods: Vec<Arc<Pod>>, deleted: HashSet<String> },
    Upsert(Arc<Pod>),
    Remove { namespace: String, name: String, uid: String },
    ObjectsChanged { kind: ObjectKind, namespace: String, name: String },
    LinkUp,
    SetLimits(Vec<Limit>),
    Reset { done: oneshot::Sender<Result<(), ResetError>> },
}

/// Why not everything was removed.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    #[error("could not list what runs on this node")]
    List { source: CriError },
    #[error("the engine has stopped")]
    Stopped,
}

impl Engine {
    /// Starts the engine. The runtime need not be up: the engine waits for it and goes on.
    ///
    /// What belongs to no pod is not killed before [`Engine::set_pods`] was called. The receiver must be drained.
    pub async fn start(
        config: EngineConfig,
        objects: Arc<dyn Objects>,
        restarts: Arc<dyn RestartState>,
    ) -> Result<(Self, mpsc::Receiver<EngineEvent>), StartError> {
        for path in [config.root.join("pods"), config.log_root.clone()] {
            tokio::fs::create_dir_all(&path)
                .await
                .map_err(|source| StartError::Directory { path, source })?;
        }
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let (events, outbox) = mpsc::channel(EVENTS_MAX);
        let (info, runtime_info) = watch::channel(RuntimeInfo::default());
        let board = Arc::new(Board::default());
        let runtime = Runtime::new(&config.cri_socket);
        let log_root = config.log_root.clone();
        let owner = tokio::spawn(owner::run(owner::Start {
            config,
            objects,
            restarts,
            runtime: runtime.clone(),
            inbox,
            events,
            info,
            board: board.clone(),
        }));
        Ok((Self { commands, runtime_info, board, runtime, log_root, owner }, outbox))
    }

    /// Replaces the set of pods by `pods`, a list that was read completely and is trusted: pods
    /// and containers that are not in it are stopped and removed.
    pub async fn set_pods(&self, pods: Vec<Arc<Pod>>) {
        self.send(Command::SetPods(pods)).await;
    }

    /// Adds pods that were read from this machine, which may not be all that are wanted. Of what else runs here,
    /// only the pods in `deleted` (their UIDs) are stopped; the rest waits for [`Engine::set_pods`].
    pub async fn resume(&self, pods: Vec<Arc<Pod>>, deleted: HashSet<String>) {
        self.send(Command::Resume { pods, deleted }).await;
    }

    /// Adds a pod, or tells that it changed (also that it got a `deletionTimestamp`).
    pub async fn upsert(&self, pod: Arc<Pod>) {
        self.send(Command::Upsert(pod)).await;
    }

    /// Tells that the pod's object is gone; what is left of it is stopped with its own grace.
    /// Answered with [`EngineEvent::Gone`], also when the engine never heard of the pod.
    pub async fn remove(&self, namespace: &str, name: &str, uid: &str) {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.send(Command::Remove { namespace, name, uid: uid.to_owned() }).await;
    }

    /// Tells that a ConfigMap or Secret changed, so that volumes are refreshed at once and pods
    /// that wait for it go on.
    pub async fn objects_changed(&self, kind: ObjectKind, namespace: &str, name: &str) {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.send(Command::ObjectsChanged { kind, namespace, name }).await;
    }

    /// Tells that the link to the cloud came up: image pulls in backoff are tried at once.
    pub async fn link_up(&self) {
        self.send(Command::LinkUp).await;
    }

    /// Returns the newest status of the pod with `uid`.
    pub fn status(&self, uid: &str) -> Option<PodStatus> {
        self.board.pods.read().expect("board lock").get(uid).map(|entry| entry.status.clone())
    }

    /// Returns the runtime's state, and lets the caller wait for changes of it.
    pub fn runtime(&self) -> watch::Receiver<RuntimeInfo> {
        self.runtime_info.clone()
    }

    /// Lists the images on this node, largest first, as `status.images` of a node wants them.
    pub async fn images(&self) -> Result<Vec<ContainerImage>, CriError> {
        let mut images = self.runtime.list_images().await?;
        images.sort_by_key(|image| std::cmp::Reverse(image.size));
        let convert = |image: crate::cri::v1::Image| {
            let names = image.repo_digests.into_iter().chain(image.repo_tags);
            ContainerImage {
                names: Some(names.take(IMAGE_NAMES_MAX).collect()),
                size_bytes: i64::try_from(image.size).ok(),
            }
        };
        Ok(images.into_iter().map(convert).collect())
    }

    /// Runs a command in the pod's running container and waits for it.
    pub async fn exec(
        &self,
        namespace: &str,
        name: &str,
        container: &str,
        command: &[String],
        timeout: Duration,
    ) -> Result<crate::cri::ExecOutput, ExecError> {
        let status = self.find(namespace, name).ok_or(ExecError::NotRunning)?.status;
        let id = container_status(&status, container)
            .filter(|found| found.state.as_ref().is_some_and(|state| state.running.is_some()))
            .and_then(|found| found.container_id.as_deref())
            .and_then(|id| id.strip_prefix(CONTAINER_ID_PREFIX))
            .ok_or(ExecError::NotRunning)?;
        Ok(self.runtime.exec_sync(id, command, timeout).await?)
    }

    /// Stops the running containers of a pod, or of all pods whose names begin with `workload` and a `-`; they start again as
    /// their pods' restart policies say.
    pub async fn restart(&self, namespace: &str, workload: &str) -> Result<(), RestartError> {
        let ids: Vec<String> = {
            let pods = self.board.pods.read().expect("board lock");
            let pods = pods
                .values()
                .filter(|pod| pod.namespace == namespace && is_of(workload, &pod.name));
            let containers = pods.flat_map(|pod| pod.status.container_statuses.iter().flatten());
            let running = containers
                .filter(|one| one.state.as_ref().is_some_and(|state| state.running.is_some()));
            let ids = running.filter_map(|one| one.container_id.as_deref());
            ids.filter_map(|id| id.strip_prefix(CONTAINER_ID_PREFIX)).map(str::to_owned).collect()
        };
        if ids.is_empty() {
            return Err(RestartError::NotRunning);
        }
        for id in ids {
            self.runtime.stop_container(&id, RESTART_GRACE).await?;
        }
        Ok(())
    }

    /// Says how many pods of workloads may run here at most; what was said before counts no more. Of a workload's pods the
    /// oldest run, and the others are stopped until they may; pods that come later are counted, too. Only pods that are
    /// always restarted are held.
    pub async fn set_limits(&self, limits: Vec<Limit>) {
        self.send(Command::SetLimits(limits)).await;
    }

    /// Returns the log file of a container, of the instance before the current one if `previous`.
    /// An empty `container` means the only one of the pod.
    pub fn log_path(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        previous: bool,
    ) -> Result<LogFile, LogPathError> {
        let (uid, entry) = self
            .board
            .pods
            .read()
            .expect("board lock")
            .iter()
            .find(|(_, entry)| entry.namespace == namespace && entry.name == pod)
            .map(|(uid, entry)| (uid.clone(), entry.clone()))
            .ok_or_else(|| LogPathError::PodNotFound(pod.to_owned()))?;
        let statuses = entry.status.container_statuses.as_deref().unwrap_or_default();
        let container = match (container, statuses) {
            ("", [only]) => only.name.as_str(),
            (name, _) => name,
        };
        let found = container_status(&entry.status, container).ok_or_else(|| {
            LogPathError::ContainerNotFound { pod: pod.to_owned(), container: container.to_owned() }
        })?;
        let directory = self.log_root.join(format!("{namespace}_{pod}_{uid}")).join(&found.name);
        let state = found.state.clone().unwrap_or_default();
        let running = state.running.is_some();
        let restart_count = found.restart_count;
        // In backoff the newest instance is the one that ended last; it has the current count.
        let instance = if previous { restart_count - 1 } else { restart_count };
        let path = directory.join(format!("{instance}.log"));
        let named = || (pod.to_owned(), found.name.clone());
        if previous && (instance < 0 || !path.exists()) {
            let (pod, container) = named();
            return Err(LogPathError::NoPrevious { pod, container });
        }
        if let Some(waiting) = state.waiting
            && !path.exists()
        {
            let (pod, container) = named();
            let reason = match waiting.reason.unwrap_or_default().as_str() {
                "ErrImagePull" => "image can't be pulled".to_owned(),
                "ImagePullBackOff" => "trying and failing to pull image".to_owned(),
                other => other.to_owned(),
            };
            return Err(LogPathError::Waiting { pod, container, reason });
        }
        Ok(LogFile { path, running: running && !previous })
    }

    /// Stops and removes every pod on this node, known or not, and waits for it.
    pub async fn reset(&self) -> Result<(), ResetError> {
        let (done, answer) = oneshot::channel();
        self.send(Command::Reset { done }).await;
        answer.await.unwrap_or(Err(ResetError::Stopped))
    }

    async fn send(&self, command: Command) {
        if self.commands.send(command).await.is_err() {
            tracing::error!("the pod engine has stopped");
        }
    }

    fn find(&self, namespace: &str, name: &str) -> Option<BoardEntry> {
        let pods = self.board.pods.read().expect("board lock");
        pods.values().find(|pod| pod.namespace == namespace && pod.name == name).cloned()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.owner.abort();
    }
}

/// Why a command was not run.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error("container is not running")]
    NotRunning,
    #[error("could not run the command")]
    Runtime(#[from] CriError),
}

/// Why nothing was restarted.
#[derive(Debug, thiserror::Error)]
pub enum RestartError {
    #[error("no container of it runs on this node")]
    NotRunning,
    #[error("could not stop a container")]
    Runtime(#[from] CriError),
}

/// What a container is given to end when it is to be restarted.
const RESTART_GRACE: Duration = Duration::from_secs(30);

/// Names per image in a node's status (kubelet's bound).
const IMAGE_NAMES_MAX: usize = 5;

const CONTAINER_ID_PREFIX: &str = "containerd://";

fn container_status<'a>(
    status: &'a PodStatus,
    name: &str,
) -> Option<&'a k8s_openapi::api::core::v1::ContainerStatus> {
    let lists = [&status.container_statuses, &status.init_container_statuses];
    lists.into_iter().flatten().flatten().find(|container| container.name == name)
}

impl Board {
    pub(crate) fn publish(&self, uid: &str, entry: BoardEntry) {
        self.pods.write().expect("board lock").insert(uid.to_owned(), entry);
    }

    pub(crate) fn remove(&self, uid: &str) {
        self.pods.write().expect("board lock").remove(uid);
    }
}
