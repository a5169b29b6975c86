//! One pod's task: looks, plans, does, and tells.
//!
//! A worker alone touches its pod's sandboxes, containers and files. It reads the runtime's state
//! when something says that it changed, does the steps of the plan one after the other, and
//! publishes the status that follows. Everything that takes long gives way to a stop.
//!
//! ```text
//! running ──(deletionTimestamp, or gone from the list)──► stopping ──► cleaned, task ends
//!    └─(phase Succeeded or Failed)─► ended: dead containers and logs stay until the pod is deleted
//! ```
//!
//! Source: kubernetes/kubernetes pkg/kubelet/pod_workers.go, pkg/kubelet/kuberuntime.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, LifecycleHandler, Pod, PodSpec, PodStatus, Secret,
};
use skerry_edge_core::pods::backoff::{Backoff, Entry, RestartRecord};
use skerry_edge_core::pods::env::{self, Environment, Lookup, Place, expand};
use skerry_edge_core::pods::image::Keyring;
use skerry_edge_core::pods::linux::{self, ImageUser};
use skerry_edge_core::pods::plan::{
    Facts, FailedProbe, HELD_REASON, Plan, Step, Waiting, backoff_key, may_be_held, plan,
    plan_held, plan_stop,
};
use skerry_edge_core::pods::probe::{self, Kind};
use skerry_edge_core::pods::runtime::{Instance, PodRuntime};
use skerry_edge_core::pods::status::{StatusInput, is_terminal, status};
use skerry_edge_core::pods::volumes::{self, File, Reference, Source};
use skerry_edge_core::pods::{
    PodName, definition_hash, dns, find_container, grace_seconds, host_network, init_containers,
    is_sidecar,
};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::container::{self, Parts};
use super::files::{self, PodFolder};
use super::images::{Note, Outcome, Pulls};
use super::owner::Index;
use super::probes::{self, Report};
use super::{
    Board, BoardEntry, EngineConfig, EngineEvent, ObjectKind, Objects, PodEvent, PodGone,
    PodUpdate, RestartState, RuntimeInfo, TokenQuery,
};
use crate::cri::{CriError, Runtime, v1};

pub(super) const LABEL_POD_NAME: &str = "io.kubernetes.pod.name";
pub(super) const LABEL_POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub(super) const LABEL_POD_UID: &str = "io.kubernetes.pod.uid";
pub(super) const LABEL_CONTAINER_NAME: &str = "io.kubernetes.container.name";

/// Time between two looks at a pod with which nothing happens.
const RESYNC_INTERVAL: Duration = Duration::from_secs(60);
/// Delay before a failed step is tried again; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Time between two tries of a container that cannot be configured.
const CONFIG_RETRY: Duration = Duration::from_secs(10);
/// Time after which a failed pull is shown as being in its delay.
const PULL_REVIEW: Duration = Duration::from_secs(1);
/// The runtime says that a container ended before its own status says so; time until another look,
/// doubled each time, [`EXIT_LOOKS_MAX`] times at most.
const EXIT_LOOK_MIN: Duration = Duration::from_millis(10);
const EXIT_LOOKS_MAX: u32 = 8;
/// Time that the cloud gets to answer for an object that is not here.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// Shortest time between the stop and the kill signal.
const STOP_GRACE_MIN: Duration = Duration::from_secs(2);
/// Changes of probes that may wait for the worker.
const REPORTS_MAX: usize = 64;

/// What all workers share.
pub(super) struct Shared {
    pub(super) config: EngineConfig,
    pub(super) objects: Arc<dyn Objects>,
    pub(super) restarts: Arc<dyn RestartState>,
    pub(super) runtime: Runtime,
    pub(super) events: mpsc::Sender<EngineEvent>,
    pub(super) info: watch::Receiver<RuntimeInfo>,
    pub(super) board: Arc<Board>,
    pub(super) index: Arc<Index>,
    /// [`RestartState::taken_over`].
    pub(super) taken_over: HashMap<String, String>,
}

/// What the owner tells a worker. Counters only grow; the worker compares.
#[derive(Debug, Clone)]
pub(super) struct Orders {
    pub(super) pod: Arc<Pod>,
    /// The pod is not in the list of pods any more.
    pub(super) gone: bool,
    /// One of its containers or sandboxes ended.
    pub(super) exits: u64,
    /// A list showed something new.
    pub(super) listings: u64,
    /// An object it refers to changed.
    pub(super) object_changes: u64,
    /// The link to the cloud came up.
    pub(super) link_ups: u64,
    /// A rule of the node lets it not run.
    pub(super) held: bool,
}

impl Orders {
    pub(super) fn new(pod: Arc<Pod>) -> Self {
        Self {
            pod,
            gone: false,
            exits: 0,
            listings: 0,
            object_changes: 0,
            link_ups: 0,
            held: false,
        }
    }

    fn stops(&self) -> bool {
        self.gone || self.pod.metadata.deletion_timestamp.is_some()
    }
}

/// Everything a worker starts with.
pub(super) struct Start {
    pub(super) shared: Arc<Shared>,
    pub(super) name: PodName,
    pub(super) orders: watch::Receiver<Orders>,
    /// Whether the runtime may have something of this pod already.
    pub(super) in_runtime: bool,
    /// Whether the agent wants to hear of this pod.
    pub(super) announce: bool,
    pub(super) records: Vec<RestartRecord>,
    pub(super) done: mpsc::Sender<PodName>,
}

/// Runs one pod until nothing of it is left.
pub(super) async fn run(start: Start) {
    let Start { shared, name, orders, in_runtime, announce, records, done } = start;
    let seen = orders.borrow().clone();
    let mut facts =
        Facts { restarts: Backoff::new(shared.config.restart_delay_max), ..Default::default() };
    for record in records {
        facts.restart_counts.insert(record.container.clone(), record.restart_count);
        if let Some(raised_at) = record.raised_at {
            let delay = Duration::from_secs(record.delay_secs);
            let key = backoff_key(&record.container, &record.hash);
            facts.restarts.restore(&key, Entry { delay, raised_at });
        }
    }
    let (reports_in, reports) = mpsc::channel(REPORTS_MAX);
    let status = seen.pod.status.clone().unwrap_or_default();
    let start_time = status.start_time.as_ref().map_or_else(Timestamp::now, |time| time.0);
    let mut worker = Worker {
        folder: PodFolder::new(&shared.config.root, &name.uid),
        pod: seen.pod.clone(),
        seen,
        orders,
        runtime: PodRuntime::default(),
        known: !in_runtime,
        facts,
        plan: Plan::default(),
        status,
        published: None,
        announce,
        start_time,
        verdict: None,
        pulls: Pulls::default(),
        volumes: None,
        written_at: Instant::now(),
        looks: 0,
        retry: RETRY_MIN,
        probes: HashMap::new(),
        reports,
        reports_in,
        last_notes: BTreeMap::new(),
        ended_cleaned: false,
        shared,
        name,
    };
    worker.run().await;
    for (_, probe) in worker.probes.drain() {
        probe.abort();
    }
    let _ = done.send(worker.name.clone()).await;
}

struct Worker {
    shared: Arc<Shared>,
    name: PodName,
    folder: PodFolder,
    pod: Arc<Pod>,
    /// The orders that were taken note of.
    seen: Orders,
    orders: watch::Receiver<Orders>,
    runtime: PodRuntime,
    /// Whether `runtime` is what the runtime has.
    known: bool,
    facts: Facts,
    plan: Plan,
    status: PodStatus,
    published: Option<PodStatus>,
    announce: bool,
    start_time: Timestamp,
    /// Why the engine ended the pod.
    verdict: Option<Waiting>,
    pulls: Pulls,
    /// Paths of the volumes that are set up, by name.
    volumes: Option<BTreeMap<String, PathBuf>>,
    /// When they were last compared with the objects they show.
    written_at: Instant,
    looks: u32,
    retry: Duration,
    probes: HashMap<(String, Kind), AbortHandle>,
    reports: mpsc::Receiver<Report>,
    reports_in: mpsc::Sender<Report>,
    /// Messages told last, by field and reason, so that one condition is told once.
    last_notes: BTreeMap<(String, &'static str), String>,
    ended_cleaned: bool,
}

/// The rest has to wait: something more important came up, or it failed and is tried later.
enum Pause {
    /// The pod is to stop.
    Stopping,
    /// Try again then.
    Retry(Duration),
}

impl Drop for Worker {
    fn drop(&mut self) {
        for probe in self.probes.values() {
            probe.abort();
        }
    }
}

impl Worker {
    async fn run(&mut self) {
        loop {
            self.take_orders();
            if self.seen.stops() {
                self.stop().await;
                return;
            }
            let pause = self.sync().await;
            let wake = Instant::now() + pause;
            tokio::select! {
                changed = self.orders.changed() => if changed.is_err() { return },
                Some(report) = self.reports.recv() => self.handle_report(report).await,
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// Takes note of what the owner said.
    fn take_orders(&mut self) {
        let orders = self.orders.borrow_and_update().clone();
        if orders.exits != self.seen.exits {
            self.known = false;
            self.looks = EXIT_LOOKS_MAX;
        }
        if orders.listings != self.seen.listings {
            self.known = false;
        }
        if orders.object_changes != self.seen.object_changes {
            self.volumes = None;
            // What failed for the lack of an object may go now.
            self.facts.start_errors.retain(|_, error| error.reason != "CreateContainerConfigError");
        }
        if orders.link_ups != self.seen.link_ups {
            self.pulls.reset();
            self.volumes = None;
        }
        if orders.pod != self.seen.pod {
            self.pod = orders.pod.clone();
            self.volumes = None;
        }
        self.seen = orders;
    }

    fn spec(&self) -> &PodSpec {
        static EMPTY: std::sync::LazyLock<PodSpec> = std::sync::LazyLock::new(PodSpec::default);
        self.pod.spec.as_ref().unwrap_or(&EMPTY)
    }

    /// Brings the pod as far as it goes now; returns when to look again.
    async fn sync(&mut self) -> Duration {
        if !self.known
            && let Err(error) = self.refresh().await
        {
            tracing::debug!(pod = %self.name.full(), error = %error, "could not read the runtime");
            return self.next_retry();
        }
        let mut pause = RESYNC_INTERVAL;
        if self.looks > 0 {
            // An end was announced. A change that is seen need not be that end (a start may be told meanwhile), so
            // every look is taken; an end that is missed here would stay unseen until the next full list.
            pause = EXIT_LOOK_MIN * 2_u32.pow(EXIT_LOOKS_MAX - self.looks);
            self.looks -= 1;
            self.known = false;
        }
        match self.advance().await {
            Ok(()) => self.retry = RETRY_MIN,
            Err(Pause::Stopping) => return Duration::ZERO,
            Err(Pause::Retry(after)) => pause = pause.min(after),
        }
        self.update_probes();
        self.publish(false).await;
        if let Some(at) = self.plan.retry_at {
            pause = pause.min(until(at));
        }
        if let Some(at) = self.deadline() {
            pause = pause.min(until(at));
        }
        pause
    }

    /// Plans and does, until there is nothing to do.
    async fn advance(&mut self) -> Result<(), Pause> {
        loop {
            if self.orders.borrow().stops() {
                return Err(Pause::Stopping);
            }
            let now = Timestamp::now();
            if self.deadline().is_some_and(|at| at <= now) && self.verdict.is_none() {
                self.verdict = Some(Waiting {
                    reason: "DeadlineExceeded".to_owned(),
                    message: "Pod was active on the node longer than the specified deadline"
                        .to_owned(),
                });
                let message = "Pod was active on the node longer than the specified deadline";
                self.tell(false, true, "DeadlineExceeded", message.to_owned(), "").await;
            }
            let ended = self.verdict.is_some() || is_terminal(&self.status);
            self.plan = if ended {
                plan_stop(&self.runtime)
            } else if self.orders.borrow().held && may_be_held(&self.pod) {
                plan_held(&self.pod, &self.runtime)
            } else {
                plan(&self.pod, &self.runtime, &self.facts, now)
            };
            if self.plan.steps.is_empty() {
                if !ended {
                    self.keep_volumes_fresh().await;
                    self.collect_dead().await;
                    // An exit may have ended the pod for good.
                    let status = self.make_status(false);
                    if is_terminal(&status) {
                        self.publish(false).await;
                        continue;
                    }
                    self.tell_backoff().await;
                } else if !self.ended_cleaned {
                    self.publish(false).await;
                    self.clean_ended().await;
                }
                return Ok(());
            }
            self.do_plan().await?;
        }
    }

    async fn do_plan(&mut self) -> Result<(), Pause> {
        let steps = std::mem::take(&mut self.plan.steps);
        let starts = steps.iter().any(|step| matches!(step, Step::Start { .. }));
        if starts {
            self.publish(false).await;
            self.set_up_volumes().await?;
        }
        let mut pause: Option<Duration> = None;
        let mut failed = false;
        for step in steps {
            let stops = self.orders.borrow().stops();
            if stops {
                return Err(Pause::Stopping);
            }
            match step {
                Step::KillPod { sandbox_changed } => {
                    if sandbox_changed && self.runtime.may_live() {
                        let message = "Pod sandbox changed, it will be killed and re-created.";
                        self.tell(true, false, "SandboxChanged", message.to_owned(), "").await;
                    }
                    self.kill_pod(None)
                        .await
                        .map_err(|error| self.failed("FailedKillPod", &error))?;
                }
                Step::Kill { id, container, message, probe } => {
                    let grace = self.kill_grace(&container, probe);
                    self.kill_container(&id, &container, message, grace).await;
                    self.known = false;
                    self.refresh().await.map_err(|error| self.failed("FailedSync", &error))?;
                    let lives =
                        self.runtime.containers.iter().any(|one| one.id == id && one.may_live());
                    if lives {
                        return Err(Pause::Retry(self.next_retry()));
                    }
                }
                Step::Remove { id } => {
                    let removed = self.shared.runtime.remove_container(&id).await;
                    removed.map_err(|error| self.failed("FailedSync", &error))?;
                    self.runtime.containers.retain(|one| one.id != id);
                }
                Step::CreateSandbox { attempt } => self.create_sandbox(attempt).await?,
                Step::Start { container, init: _, restart_count, after_exit } => {
                    let started = self.start(&container, restart_count, after_exit).await;
                    match started {
                        Ok(()) => {
                            self.facts.start_errors.remove(&container);
                            self.publish(false).await;
                        }
                        Err(StartError::Stopping) => return Err(Pause::Stopping),
                        Err(StartError::Waits { waiting, retry }) => {
                            failed = true;
                            self.facts.start_errors.insert(container, waiting);
                            pause = Some(pause.map_or(retry, |pause| pause.min(retry)));
                        }
                    }
                }
            }
        }
        if failed {
            return Err(Pause::Retry(pause.unwrap_or(CONFIG_RETRY)));
        }
        if !self.known {
            self.refresh().await.map_err(|error| self.failed("FailedSync", &error))?;
        }
        Ok(())
    }

    fn failed(&mut self, what: &'static str, error: &CriError) -> Pause {
        tracing::warn!(pod = %self.name.full(), step = what, error = %error, "a step failed");
        self.known = false;
        Pause::Retry(self.next_retry())
    }

    fn next_retry(&mut self) -> Duration {
        let now = self.retry;
        self.retry = (self.retry * 2).min(RETRY_MAX);
        now
    }

    fn deadline(&self) -> Option<Timestamp> {
        let seconds = self.spec().active_deadline_seconds?;
        if is_terminal(&self.status) {
            return None;
        }
        let start = self.status.start_time.as_ref().map_or(self.start_time, |time| time.0);
        start.checked_add(jiff::SignedDuration::from_secs(seconds)).ok()
    }

    // ---- what the runtime has ----

    /// Reads what the runtime has of this pod.
    async fn refresh(&mut self) -> Result<(), CriError> {
        let uid = self.name.uid.clone();
        let label = [(LABEL_POD_UID, uid.as_str())];
        let runtime = &self.shared.runtime;
        let (sandboxes, containers) =
            tokio::try_join!(runtime.list_sandboxes(&label), runtime.list_containers(&label))?;
        {
            let mut index = self.shared.index.lock().expect("index lock");
            let ids =
                sandboxes.iter().map(|one| &one.id).chain(containers.iter().map(|one| &one.id));
            for id in ids {
                index.insert(id.clone(), uid.clone());
            }
        }
        let sandboxes = join_all(sandboxes.iter().map(|one| runtime.sandbox_status(&one.id))).await;
        let mut found = PodRuntime::default();
        for status in sandboxes {
            found.sandboxes.extend(status?.map(container::sandbox_from));
        }
        let folder = container::log_folder(&self.shared.config.log_root, &self.name);
        // What ended stays as it is; asking again would only read files again.
        let ended = |id: &str| {
            self.runtime.containers.iter().find(|one| one.id == id && one.exit().is_some())
        };
        let asked = containers.iter().map(|one| async {
            if let Some(known) = ended(&one.id) {
                return Ok(Some(known.clone()));
            }
            let status = runtime.container_status(&one.id).await?;
            Ok(status.map(|status| container::instance_from(status, &one.pod_sandbox_id, &folder)))
        });
        let asked: Vec<Result<Option<Instance>, CriError>> = join_all(asked).await;
        for instance in asked {
            found.containers.extend(instance?);
        }
        for one in &found.containers {
            if let Some(hash) = self.shared.taken_over.get(&one.id) {
                self.facts.taken_over.insert(one.id.clone(), hash.clone());
            }
            let count = self.facts.restart_counts.entry(one.name.clone()).or_default();
            *count = one.restart_count.max(*count);
        }
        self.runtime = found;
        self.known = true;
        Ok(())
    }

    /// Keeps the newest dead instance of each container, for its log, and removes older ones.
    async fn collect_dead(&mut self) {
        let mut surplus = Vec::new();
        let mut names: BTreeSet<&str> = BTreeSet::new();
        names.extend(self.runtime.containers.iter().map(|one| one.name.as_str()));
        for name in names {
            let dead = self.runtime.instances(name).into_iter().filter(|one| one.exit().is_some());
            surplus.extend(dead.skip(1).map(|one| one.id.clone()));
        }
        for id in surplus {
            if self.shared.runtime.remove_container(&id).await.is_ok() {
                self.forget(&id);
            }
        }
        let current = self.runtime.sandbox().map(|sandbox| sandbox.id.clone());
        let empty: Vec<String> = self
            .runtime
            .sandboxes
            .iter()
            .filter(|sandbox| Some(&sandbox.id) != current.as_ref() && !sandbox.ready)
            .filter(|sandbox| self.runtime.containers.iter().all(|one| one.sandbox != sandbox.id))
            .map(|sandbox| sandbox.id.clone())
            .collect();
        for id in empty {
            if self.shared.runtime.remove_sandbox(&id).await.is_ok() {
                self.forget(&id);
            }
        }
    }

    fn forget(&mut self, id: &str) {
        self.runtime.containers.retain(|one| one.id != id);
        self.runtime.sandboxes.retain(|one| one.id != id);
        self.shared.index.lock().expect("index lock").remove(id);
    }

    // ---- telling ----

    fn make_status(&self, stopping: bool) -> PodStatus {
        let node_ip = self.shared.config.node_ip.map(|ip| ip.to_string());
        status(&StatusInput {
            pod: &self.pod,
            runtime: &self.runtime,
            facts: &self.facts,
            plan: &self.plan,
            previous: &self.status,
            node_ip: node_ip.as_deref(),
            start_time: self.start_time,
            stopping,
            verdict: self.verdict.as_ref(),
            now: Timestamp::now(),
        })
    }

    /// Computes the status and hands it on if it is new.
    async fn publish(&mut self, stopping: bool) {
        // Conditions of others come with the pod's own object.
        let foreign = self.pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        if let Some(foreign) = foreign {
            let own = self.status.conditions.get_or_insert_default();
            own.retain(|one| {
                skerry_edge_core::pods::status::OWN_CONDITIONS.contains(&one.type_.as_str())
            });
            own.extend(
                foreign
                    .iter()
                    .filter(|one| {
                        !skerry_edge_core::pods::status::OWN_CONDITIONS
                            .contains(&one.type_.as_str())
                    })
                    .cloned(),
            );
        }
        self.status = self.make_status(stopping);
        if !self.announce || self.published.as_ref() == Some(&self.status) {
            return;
        }
        self.published = Some(self.status.clone());
        let PodName { namespace, name, uid } = self.name.clone();
        let status = self.status.clone();
        let entry = BoardEntry { namespace: namespace.clone(), name: name.clone(), status };
        self.shared.board.publish(&uid, entry);
        let update = PodUpdate { namespace, name, uid, status: self.status.clone() };
        let _ = self.shared.events.send(EngineEvent::Status(update)).await;
    }

    /// Tells users something. `always` tells it also when it was the last thing told.
    async fn tell(
        &mut self,
        always: bool,
        warning: bool,
        reason: &'static str,
        message: String,
        container: &str,
    ) {
        if !self.announce {
            return;
        }
        let key = (container.to_owned(), reason);
        if !always && self.last_notes.get(&key) == Some(&message) {
            return;
        }
        self.last_notes.insert(key, message.clone());
        let field_path = match container {
            "" => String::new(),
            name if init_containers(self.spec()).iter().any(|one| one.name == name) => {
                format!("spec.initContainers{{{name}}}")
            }
            name => format!("spec.containers{{{name}}}"),
        };
        let PodName { namespace, name, uid } = self.name.clone();
        let time = Timestamp::now();
        let event = PodEvent { namespace, name, uid, field_path, warning, reason, message, time };
        let _ = self.shared.events.send(EngineEvent::Event(event)).await;
    }

    async fn tell_notes(&mut self, notes: Vec<Note>, container: &str) {
        for Note { warning, reason, message } in notes {
            let always = matches!(reason, "Pulled" | "Pulling" | "Failed");
            self.tell(always, warning, reason, message, container).await;
        }
    }

    async fn tell_backoff(&mut self) {
        let is_held = |waiting: &Waiting| waiting.reason == HELD_REASON;
        if self.plan.backing_off.values().any(is_held) {
            let message = format!("A rule of the node holds pod {}", self.name.full());
            self.tell(false, false, HELD_REASON, message, "").await;
            return;
        }
        let waits: Vec<String> = self.plan.backing_off.keys().cloned().collect();
        for name in waits {
            let message =
                format!("Back-off restarting failed container {name} in pod {}", self.name.full());
            self.tell(false, true, "BackOff", message, &name).await;
        }
    }

    // ---- sandbox and volumes ----

    fn place(&self) -> Place {
        let config = &self.shared.config;
        Place {
            node_name: config.node_name.clone(),
            host_ip: config.node_ip.map(|ip| ip.to_string()),
            pod_ips: self.runtime.sandbox().map(|one| one.ips.clone()).unwrap_or_default(),
            cpu_milli: config.cpu_milli,
            memory_bytes: config.memory_bytes,
        }
    }

    async fn create_sandbox(&mut self, attempt: u32) -> Result<(), Pause> {
        let spec = self.spec();
        let info = self.shared.info.borrow().clone();
        if !info.version.is_empty() && info.ready && !info.network_ready && !host_network(spec) {
            let message = format!("network is not ready: {}", info.message);
            self.tell(false, true, "NetworkNotReady", message, "").await;
            return Err(Pause::Retry(RETRY_MIN));
        }
        let config = self.sandbox_config(attempt).await;
        let folder = container::log_folder(&self.shared.config.log_root, &self.name);
        let _ = tokio::fs::create_dir_all(&folder).await;
        let id = match self.shared.runtime.run_sandbox(config).await {
            Ok(id) => id,
            Err(error) => {
                let message = format!("Failed to create pod sandbox: {error}");
                self.tell(false, true, "FailedCreatePodSandBox", message, "").await;
                return Err(self.failed("RunPodSandbox", &error));
            }
        };
        self.shared.index.lock().expect("index lock").insert(id.clone(), self.name.uid.clone());
        match self.shared.runtime.sandbox_status(&id).await {
            Ok(Some(status)) => self.runtime.sandboxes.push(container::sandbox_from(status)),
            Ok(None) => {
                self.known = false;
                return Err(Pause::Retry(RETRY_MIN));
            }
            Err(error) => return Err(self.failed("PodSandboxStatus", &error)),
        }
        Ok(())
    }

    async fn sandbox_config(&mut self, attempt: u32) -> v1::PodSandboxConfig {
        let config = &self.shared.config;
        let resolv_conf = tokio::fs::read_to_string(&config.resolv_conf).await.unwrap_or_default();
        let node = dns::NodeDns {
            host: dns::parse_resolv_conf(&resolv_conf),
            cluster_servers: config.cluster_dns.iter().map(ToString::to_string).collect(),
            cluster_domain: config.cluster_domain.clone(),
        };
        let made = dns::pod_dns(&self.pod, &node);
        if made.cut {
            let message = "Nameserver limits or search limits were exceeded, some have been \
                           omitted"
                .to_owned();
            self.tell(false, true, "DNSConfigForming", message, "").await;
        }
        let asked = self.spec().dns_policy.as_deref() == Some("ClusterFirstWithHostNet");
        if made.missing_cluster_dns && asked {
            let message = format!(
                "pod: \"{}\". kubelet does not have ClusterDNS IP configured and cannot create \
                 Pod using \"ClusterFirst\" policy. Falling back to \"Default\" policy.",
                self.name.full()
            );
            self.tell(false, true, "MissingClusterDNS", message, "").await;
        }
        container::sandbox_config(
            &self.shared.config,
            &self.pod,
            &self.name,
            attempt,
            made.resolver,
        )
    }

    fn lookup(&self) -> StoreLookup {
        StoreLookup { objects: self.shared.objects.clone(), namespace: self.name.namespace.clone() }
    }

    /// Asks the cloud for objects that are not here; all at once, and for a bounded time.
    async fn fetch_missing(&self) -> Result<(), Pause> {
        let lookup = self.lookup();
        let missing: Vec<(ObjectKind, String)> = volumes::references(&self.pod)
            .into_iter()
            .filter_map(|reference| match reference {
                Reference::ConfigMap(name) if lookup.config_map(&name).is_none() => {
                    Some((ObjectKind::ConfigMap, name))
                }
                Reference::Secret(name) if lookup.secret(&name).is_none() => {
                    Some((ObjectKind::Secret, name))
                }
                _ => None,
            })
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let objects = &self.shared.objects;
        let namespace = &self.name.namespace;
        let fetches = missing.iter().map(|(kind, name)| objects.fetch(*kind, namespace, name));
        let all = tokio::time::timeout(FETCH_TIMEOUT, join_all(fetches));
        match give_way(&self.orders, all).await {
            None => Err(Pause::Stopping),
            // Whether each came shows in the store.
            Some(_) => Ok(()),
        }
    }

    /// Makes sure that all volumes are there, and fresh, before containers start.
    async fn set_up_volumes(&mut self) -> Result<(), Pause> {
        if self.volumes.is_some() {
            return Ok(());
        }
        self.fetch_missing().await?;
        let folder = self.folder.clone();
        let made = tokio::task::spawn_blocking(move || folder.create()).await;
        if let Ok(Err(error)) = made {
            self.tell(false, true, "FailedMount", error.to_string(), "").await;
            return Err(Pause::Retry(self.next_retry()));
        }
        match self.write_volumes().await {
            Ok(paths) => {
                self.volumes = Some(paths);
                self.written_at = Instant::now();
                Ok(())
            }
            Err(failures) => {
                for message in failures {
                    self.tell(false, true, "FailedMount", message, "").await;
                }
                Err(Pause::Retry(self.next_retry()))
            }
        }
    }

    /// Writes what changed in volumes of running containers.
    async fn keep_volumes_fresh(&mut self) {
        let fresh = self.volumes.is_some() && self.written_at.elapsed() < RESYNC_INTERVAL;
        if fresh || !self.runtime.containers.iter().any(Instance::is_running) {
            return;
        }
        self.written_at = Instant::now();
        match self.write_volumes().await {
            Ok(paths) => self.volumes = Some(paths),
            Err(failures) => {
                for message in failures {
                    self.tell(false, true, "FailedMount", message, "").await;
                }
            }
        }
    }

    async fn write_volumes(&self) -> Result<BTreeMap<String, PathBuf>, Vec<String>> {
        let lookup = self.lookup();
        let place = self.place();
        let mounted = volumes::mounted(self.spec());
        let fs_group = self.spec().security_context.as_ref().and_then(|context| context.fs_group);
        let mut work = Vec::new();
        let mut failures = Vec::new();
        let failed = |name: &str, error: &dyn std::fmt::Display| {
            format!("MountVolume.SetUp failed for volume \"{name}\" : {error}")
        };
        for volume in self.spec().volumes.iter().flatten() {
            if !mounted.contains(volume.name.as_str()) {
                continue;
            }
            let source = match volumes::plan(&self.pod, volume, &place, &lookup) {
                Ok(source) => source,
                Err(error) => {
                    failures.push(failed(&volume.name, &error));
                    continue;
                }
            };
            match self.tokens(&source).await {
                Ok(tokens) => work.push((volume.name.clone(), source, tokens)),
                Err(error) => failures.push(failed(&volume.name, &error)),
            }
        }
        let folder = self.folder.clone();
        let written = tokio::task::spawn_blocking(move || {
            let mut paths = BTreeMap::new();
            let mut failures = Vec::new();
            for (name, source, tokens) in work {
                match folder.set_up(&name, &source, &tokens, fs_group) {
                    Ok(path) => {
                        paths.insert(name, path);
                    }
                    Err(error) => failures
                        .push(format!("MountVolume.SetUp failed for volume \"{name}\" : {error}")),
                }
            }
            (paths, failures)
        });
        match written.await {
            Ok((paths, more)) => {
                failures.extend(more);
                if failures.is_empty() { Ok(paths) } else { Err(failures) }
            }
            Err(_) => Err(vec!["writing volumes was interrupted".to_owned()]),
        }
    }

    async fn tokens(&self, source: &Source) -> Result<BTreeMap<String, File>, super::FetchError> {
        let mut found = BTreeMap::new();
        let Source::Files(files) = source else { return Ok(found) };
        for (path, token) in &files.tokens {
            let account = self.spec().service_account_name.clone();
            let query = TokenQuery {
                namespace: self.name.namespace.clone(),
                service_account: account.unwrap_or_else(|| "default".to_owned()),
                audiences: token.audience.iter().cloned().collect(),
                expiration_seconds: token.expiration_seconds,
                pod_name: self.name.name.clone(),
                pod_uid: self.name.uid.clone(),
            };
            let given = self.shared.objects.token(&query).await?;
            let file = File { bytes: given.token.into_bytes(), mode: token.mode };
            found.insert(path.clone(), file);
        }
        Ok(found)
    }

    // ---- containers ----

    async fn start(
        &mut self,
        name: &str,
        restart_count: u32,
        after_exit: Option<Timestamp>,
    ) -> Result<(), StartError> {
        let pod = self.pod.clone();
        let spec = pod.spec.as_ref().ok_or(StartError::Stopping)?;
        let Some((container, _)) = find_container(spec, name) else {
            return Err(StartError::Stopping);
        };
        let sandbox = match self.runtime.sandbox() {
            Some(sandbox) => sandbox.clone(),
            None => return Err(waits("CreateContainerError", "no sandbox", RETRY_MIN)),
        };
        let sandbox_config = self.sandbox_config(sandbox.attempt).await;
        let image = self.get_image(container, &sandbox_config).await?;
        let image_name = container.image.clone().unwrap_or_default();
        let config = match self.container_config(container, &sandbox, restart_count, image).await {
            Ok(config) => config,
            Err(message) => {
                let event = format!("Error: {message}");
                self.tell(false, true, "Failed", event, name).await;
                return Err(waits("CreateContainerConfigError", &message, CONFIG_RETRY));
            }
        };
        self.remember_start(container, restart_count, after_exit).await;
        tracing::debug!(pod = %self.name.full(), container = name, image = image_name, "starting");
        let created =
            self.shared.runtime.create_container(&sandbox.id, config, sandbox_config).await;
        let id = match created {
            Ok(id) => id,
            Err(error) => {
                self.known = false;
                let message = error.reason();
                self.tell(false, true, "Failed", format!("Error: {message}"), name).await;
                return Err(waits("CreateContainerError", &message, self.next_retry()));
            }
        };
        self.shared.index.lock().expect("index lock").insert(id.clone(), self.name.uid.clone());
        self.tell(true, false, "Created", format!("Created container: {name}"), name).await;
        if let Err(error) = self.shared.runtime.start_container(&id).await {
            self.known = false;
            let message = error.reason();
            self.tell(false, true, "Failed", format!("Error: {message}"), name).await;
            let _ = self.refresh().await;
            return Err(waits("RunContainerError", &message, self.next_retry()));
        }
        self.tell(true, false, "Started", format!("Started container {name}"), name).await;
        self.read_instance(&id, &sandbox.id).await;
        let hook = container.lifecycle.as_ref().and_then(|hooks| hooks.post_start.as_ref());
        if let Some(hook) = hook {
            let ran = give_way(&self.orders, self.run_hook(&id, container, hook)).await;
            match ran {
                None => return Err(StartError::Stopping),
                Some(Ok(())) => {}
                Some(Err(message)) => {
                    let event = format!("PostStartHook failed: {message}");
                    self.tell(true, true, "FailedPostStartHook", event, name).await;
                    let grace = self.kill_grace(name, None);
                    let text = "FailedPostStartHook".to_owned();
                    self.kill_container(&id, name, text, grace).await;
                    self.known = false;
                    let _ = self.refresh().await;
                    return Err(waits("PostStartHookError", &message, RETRY_MIN));
                }
            }
        }
        Ok(())
    }

    /// Stores count and delay of a restart before it happens.
    async fn remember_start(
        &mut self,
        container: &Container,
        restart_count: u32,
        after_exit: Option<Timestamp>,
    ) {
        let name = container.name.clone();
        let hash = definition_hash(container);
        let entry = after_exit.map(|finished| {
            let key = backoff_key(&name, &hash);
            self.facts.restarts.raise(&key, finished, Timestamp::now())
        });
        self.facts.restart_counts.insert(name.clone(), restart_count);
        // A first start is what is assumed without a record.
        if restart_count == 0 && entry.is_none() {
            return;
        }
        let record = RestartRecord {
            pod_uid: self.name.uid.clone(),
            container: name,
            restart_count,
            hash,
            delay_secs: entry.map_or(0, |entry| entry.delay.as_secs()),
            raised_at: entry.map(|entry| entry.raised_at),
        };
        let restarts = self.shared.restarts.clone();
        let _ = tokio::task::spawn_blocking(move || restarts.save(&record)).await;
    }

    async fn read_instance(&mut self, id: &str, sandbox: &str) {
        let folder = container::log_folder(&self.shared.config.log_root, &self.name);
        match self.shared.runtime.container_status(id).await {
            Ok(Some(status)) => {
                let instance = container::instance_from(status, sandbox, &folder);
                self.runtime.containers.retain(|one| one.id != id);
                self.runtime.containers.push(instance);
            }
            Ok(None) | Err(_) => self.known = false,
        }
    }

    async fn get_image(
        &mut self,
        container: &Container,
        sandbox: &v1::PodSandboxConfig,
    ) -> Result<v1::Image, StartError> {
        let name = container.name.clone();
        let keyring = self.keyring().await;
        let image = container.image.clone().unwrap_or_default();
        let policy = container.image_pull_policy.clone();
        let runtime = self.shared.runtime.clone();
        let mut notes = Vec::new();
        let mut pulls = std::mem::take(&mut self.pulls);
        let outcome = give_way(
            &self.orders,
            pulls.get(&runtime, &image, policy.as_deref(), &keyring, Some(sandbox), &mut notes),
        )
        .await;
        self.pulls = pulls;
        self.tell_notes(notes, &name).await;
        match outcome {
            None => Err(StartError::Stopping),
            Some(Outcome::Ready(image)) => Ok(image),
            Some(Outcome::Waits { waiting, retry_at }) => {
                let retry = match (waiting.reason.as_str(), retry_at) {
                    ("ErrImagePull", _) => PULL_REVIEW,
                    (_, Some(at)) => until(at),
                    (_, None) => CONFIG_RETRY,
                };
                Err(StartError::Waits { waiting, retry })
            }
        }
    }

    async fn keyring(&mut self) -> Keyring {
        let mut keyring = Keyring::default();
        let lookup = self.lookup();
        let names: Vec<String> = self
            .spec()
            .image_pull_secrets
            .iter()
            .flatten()
            .map(|reference| reference.name.clone())
            .filter(|name| !name.is_empty())
            .collect();
        let mut missing = Vec::new();
        for name in names {
            let Some(secret) = lookup.secret(&name) else {
                missing.push(name);
                continue;
            };
            let data = |key: &str| secret.data.as_ref().and_then(|data| data.get(key));
            let added = if let Some(bytes) = data(".dockerconfigjson") {
                keyring.add_docker_config_json(&bytes.0)
            } else if let Some(bytes) = data(".dockercfg") {
                keyring.add_docker_cfg(&bytes.0)
            } else {
                Ok(())
            };
            if let Err(error) = added {
                tracing::warn!(secret = name, error = %error, "pull secret cannot be used");
            }
        }
        if !missing.is_empty() {
            let message = format!(
                "Unable to retrieve some image pull secrets ({}); attempting to pull the image \
                 may not succeed.",
                missing.join(", ")
            );
            self.tell(false, true, "FailedToRetrieveImagePullSecret", message, "").await;
        }
        keyring
    }

    /// Puts a container's configuration together; an error is what users are told.
    async fn container_config(
        &mut self,
        container: &Container,
        sandbox: &skerry_edge_core::pods::runtime::Sandbox,
        restart_count: u32,
        image: v1::Image,
    ) -> Result<v1::ContainerConfig, String> {
        let pod = self.pod.clone();
        let spec = pod.spec.as_ref().ok_or("pod has no spec")?;
        let place = self.place();
        let lookup = self.lookup();
        let first = self.shared.config.env.clone();
        let Environment { variables, skipped } =
            env::environment(&pod, container, &place, &lookup, &first)
                .map_err(|error| error.to_string())?;
        for skipped in skipped {
            let message = format!(
                "Keys [{}] from the EnvFrom {} were skipped since they are considered invalid \
                 environment variable names.",
                skipped.keys.join(", "),
                skipped.source
            );
            let reason = "InvalidEnvironmentVariableNames";
            self.tell(false, true, reason, message, &container.name).await;
        }
        let values: BTreeMap<String, String> = variables.iter().cloned().collect();
        let expanded = |list: &Option<Vec<String>>| -> Vec<String> {
            list.iter().flatten().map(|text| expand(text, &values)).collect()
        };
        let security = linux::security(spec, container);
        let user = ImageUser {
            uid: image.uid.as_ref().map(|uid| uid.value),
            name: image.username.clone(),
        };
        linux::check_non_root(&security, &user, &self.name.full(), &container.name)
            .map_err(|error| error.to_string())?;
        let mounts = self.mounts(container, sandbox, &values).await?;
        let parts = Parts {
            restart_count,
            image,
            command: expanded(&container.command),
            args: expanded(&container.args),
            variables,
            mounts,
            resources: linux::resources(spec, container, self.shared.config.memory_bytes),
            security,
            seccomp_root: self.shared.config.root.join("seccomp"),
        };
        let log_folder = container::log_folder(&self.shared.config.log_root, &self.name);
        tokio::fs::create_dir_all(log_folder.join(&container.name))
            .await
            .map_err(|error| format!("failed to create the log folder: {error}"))?;
        Ok(container::container_config(&pod, &self.name, container, parts))
    }

    async fn mounts(
        &self,
        container: &Container,
        sandbox: &skerry_edge_core::pods::runtime::Sandbox,
        values: &BTreeMap<String, String>,
    ) -> Result<Vec<v1::Mount>, String> {
        let paths = self.volumes.clone().unwrap_or_default();
        let node_hosts = if host_network(self.spec()) {
            tokio::fs::read_to_string("/etc/hosts").await.unwrap_or_default()
        } else {
            String::new()
        };
        let domain = &self.shared.config.cluster_domain;
        let hosts = dns::hosts_file(&self.pod, &sandbox.ips, &node_hosts, domain);
        let folder = self.folder.clone();
        let container = container.clone();
        let values = values.clone();
        let built = tokio::task::spawn_blocking(move || {
            let mut mounts = Vec::new();
            for mount in container.volume_mounts.iter().flatten() {
                let volume = paths.get(&mount.name).ok_or_else(|| {
                    format!(
                        "cannot find volume \"{}\" to mount into container \"{}\"",
                        mount.name, container.name
                    )
                })?;
                let sub = volumes::sub_path(mount, &values).map_err(|error| {
                    format!(
                        "failed to prepare subPath for volumeMount \"{}\" of container \"{}\": \
                         {error}",
                        mount.name, container.name
                    )
                })?;
                let host_path = match sub {
                    None => volume.clone(),
                    Some(sub) => files::sub_path(volume, &sub).map_err(|error| {
                        format!(
                            "failed to create subPath directory for volumeMount \"{}\" of \
                             container \"{}\": {error}",
                            mount.name, container.name
                        )
                    })?,
                };
                let propagation = match mount.mount_propagation.as_deref() {
                    Some("HostToContainer") => v1::MountPropagation::PropagationHostToContainer,
                    Some("Bidirectional") => v1::MountPropagation::PropagationBidirectional,
                    _ => v1::MountPropagation::PropagationPrivate,
                };
                let container_path = match mount.mount_path.as_str() {
                    path if path.starts_with('/') => path.to_owned(),
                    path => format!("/{path}"),
                };
                mounts.push(v1::Mount {
                    container_path,
                    host_path: host_path.to_string_lossy().into_owned(),
                    readonly: mount.read_only.unwrap_or(false),
                    selinux_relabel: false,
                    propagation: propagation as i32,
                });
            }
            let mounted = |path: &str| {
                container.volume_mounts.iter().flatten().any(|mount| mount.mount_path == path)
            };
            let mut bind = |container_path: &str, host_path: PathBuf| {
                mounts.push(v1::Mount {
                    container_path: container_path.to_owned(),
                    host_path: host_path.to_string_lossy().into_owned(),
                    ..Default::default()
                });
            };
            if !mounted("/etc/hosts") {
                bind("/etc/hosts", folder.write_hosts(&hosts).map_err(|error| error.to_string())?);
            }
            let path = container::message_path(&container);
            if !mounted(path) {
                let log = folder.termination_log(&container.name);
                bind(path, log.map_err(|error| error.to_string())?);
            }
            Ok(mounts)
        });
        built.await.unwrap_or_else(|_| Err("preparing mounts was interrupted".to_owned()))
    }

    async fn run_hook(
        &self,
        id: &str,
        container: &Container,
        hook: &LifecycleHandler,
    ) -> Result<(), String> {
        if let Some(exec) = &hook.exec {
            let command = exec.command.clone().unwrap_or_default();
            let limit = Duration::from_secs(3600);
            let output = self.shared.runtime.exec_sync(id, &command, limit).await;
            return match output {
                Ok(output) if output.exit_code == 0 => Ok(()),
                Ok(output) => Err(format!(
                    "command '{}' exited with {}: {}",
                    command.join(" "),
                    output.exit_code,
                    String::from_utf8_lossy(&output.stderr)
                )),
                Err(error) => Err(error.reason()),
            };
        }
        if let Some(sleep) = &hook.sleep {
            let seconds = u64::try_from(sleep.seconds).unwrap_or(0);
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            return Ok(());
        }
        if let Some(get) = &hook.http_get {
            let host = get.host.clone().filter(|host| !host.is_empty()).or_else(|| self.address());
            let port = probe::port(&get.port, container);
            let (Some(host), Some(port)) = (host, port) else {
                return Err("no address or port to ask".to_owned());
            };
            let status = probes::http_get(get, &host, port, Duration::from_secs(30)).await?;
            return match status {
                200..400 => Ok(()),
                status => Err(format!("HTTP status {status}")),
            };
        }
        Err("this kind of hook is not supported".to_owned())
    }

    fn address(&self) -> Option<String> {
        if host_network(self.spec()) {
            let ip = self.shared.config.node_ip.map(|ip| ip.to_string());
            return ip.or_else(|| Some("127.0.0.1".to_owned()));
        }
        self.runtime.sandbox().and_then(|sandbox| sandbox.ips.first().cloned())
    }

    // ---- probes ----

    /// Starts and ends probes so that they fit what runs.
    fn update_probes(&mut self) {
        let mut wanted = HashMap::new();
        let spec = self.spec();
        let regular = spec.containers.iter();
        let sidecars = init_containers(spec).iter().filter(|one| is_sidecar(one));
        for container in regular.chain(sidecars) {
            let Some(one) = self.runtime.newest(&container.name).filter(|one| one.is_running())
            else {
                continue;
            };
            let all = probe::probes(container);
            let has_startup = all.iter().any(|(kind, _)| *kind == Kind::Startup);
            let probed = self.facts.probes.get(&one.id).copied().unwrap_or_default();
            let started = !has_startup || probed.started == Some(true);
            for (kind, probe) in all {
                if (kind == Kind::Startup) != started {
                    let age = one.started_at.map_or(Duration::ZERO, |at| {
                        Duration::try_from(Timestamp::now().duration_since(at)).unwrap_or_default()
                    });
                    let (container, probe) = (container.clone(), probe.clone());
                    wanted.insert((one.id.clone(), kind), (container, probe, age));
                }
            }
        }
        self.probes.retain(|key, task| {
            let keep = wanted.contains_key(key);
            if !keep {
                task.abort();
            }
            keep
        });
        for (key, (container, probe, age)) in wanted {
            if self.probes.contains_key(&key) {
                continue;
            }
            let target = probes::Target {
                runtime: self.shared.runtime.clone(),
                container_id: key.0.clone(),
                container,
                kind: key.1,
                probe,
                host: self.address(),
                age,
            };
            let task = tokio::spawn(probes::run(target, self.reports_in.clone()));
            self.probes.insert(key, task.abort_handle());
        }
        let ids: BTreeSet<&String> = self.runtime.containers.iter().map(|one| &one.id).collect();
        self.facts.probes.retain(|id, _| ids.contains(id));
    }

    async fn handle_report(&mut self, report: Report) {
        match report {
            Report::Failed { container, kind, message } => {
                tracing::debug!(pod = %self.name.full(), container, ?kind, message, "probe");
                self.tell(true, true, "Unhealthy", message, &container).await;
            }
            Report::Verdict { container_id, kind, success } => {
                let probed = self.facts.probes.entry(container_id).or_default();
                match (kind, success) {
                    (Kind::Readiness, ready) => probed.ready = Some(ready),
                    (Kind::Startup, true) => probed.started = Some(true),
                    (Kind::Startup, false) => probed.failed = Some(FailedProbe::Startup),
                    (Kind::Liveness, false) => probed.failed = Some(FailedProbe::Liveness),
                    (Kind::Liveness, true) => {}
                }
            }
        }
    }

    // ---- stopping ----

    fn kill_grace(&self, container: &str, probe: Option<FailedProbe>) -> Duration {
        let found = find_container(self.spec(), container).map(|(container, _)| container);
        let own = found.and_then(|container| match probe {
            Some(FailedProbe::Liveness) => container.liveness_probe.as_ref(),
            Some(FailedProbe::Startup) => container.startup_probe.as_ref(),
            None => None,
        });
        let seconds = own.and_then(|probe| probe.termination_grace_period_seconds);
        grace(seconds.unwrap_or_else(|| grace_seconds(&self.pod)))
    }

    /// Runs the container's hook and stops it; what fails shows when the runtime is read again.
    async fn kill_container(&mut self, id: &str, name: &str, message: String, grace: Duration) {
        self.tell(true, false, "Killing", message, name).await;
        if let Some(failure) = self.stop_one(id, name, grace).await {
            self.tell(true, true, "FailedPreStopHook", failure, name).await;
        }
    }

    /// Returns why the hook failed, if it did.
    async fn stop_one(&self, id: &str, name: &str, grace: Duration) -> Option<String> {
        let started = Instant::now();
        let found = find_container(self.spec(), name).map(|(container, _)| container);
        let hook = found.and_then(|container| {
            Some((container, container.lifecycle.as_ref()?.pre_stop.as_ref()?))
        });
        let mut failure = None;
        if let Some((container, hook)) = hook.filter(|_| !grace.is_zero()) {
            let ran = tokio::time::timeout(grace, self.run_hook(id, container, hook)).await;
            if let Ok(Err(message)) = ran {
                failure = Some(format!("PreStopHook failed: {message}"));
            }
        }
        let left = grace.saturating_sub(started.elapsed()).max(STOP_GRACE_MIN);
        if let Err(error) = self.shared.runtime.stop_container(id, left).await {
            tracing::warn!(pod = %self.name.full(), container = name, error = %error,
                "could not stop a container");
        }
        failure
    }

    /// Stops all containers, sidecars after the others, then all sandboxes.
    async fn kill_pod(&mut self, grace_override: Option<Duration>) -> Result<(), CriError> {
        let grace = grace_override.unwrap_or_else(|| grace(grace_seconds(&self.pod)));
        let deadline = Instant::now() + grace;
        let sidecar = |one: &Instance| {
            init_containers(self.spec())
                .iter()
                .any(|init| init.name == one.name && is_sidecar(init))
        };
        let alive = || self.runtime.containers.iter().filter(|one| one.may_live());
        let id_and_name = |one: &Instance| (one.id.clone(), one.name.clone());
        let regular: Vec<(String, String)> =
            alive().filter(|one| !sidecar(one)).map(id_and_name).collect();
        let mut sidecars: Vec<(String, String)> =
            alive().filter(|one| sidecar(one)).map(id_and_name).collect();
        let order: Vec<String> =
            init_containers(self.spec()).iter().map(|one| one.name.clone()).collect();
        sidecars.sort_by_key(|(_, name)| order.iter().position(|other| other == name));

        for (_, name) in regular.iter().chain(&sidecars) {
            let message = format!("Stopping container {name}");
            self.tell(true, false, "Killing", message, name).await;
        }
        let stops = regular.iter().map(|(id, name)| self.stop_one(id, name, grace));
        let failures: Vec<(String, Option<String>)> =
            regular.iter().map(|(_, name)| name.clone()).zip(join_all(stops).await).collect();
        for (name, failure) in failures {
            if let Some(failure) = failure {
                self.tell(true, true, "FailedPreStopHook", failure, &name).await;
            }
        }
        for (id, name) in sidecars.iter().rev() {
            let left = deadline.saturating_duration_since(Instant::now());
            self.stop_one(id, name, left).await;
        }
        let ids: Vec<String> =
            self.runtime.sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect();
        for id in ids {
            self.shared.runtime.stop_sandbox(&id).await?;
        }
        self.known = false;
        self.refresh().await
    }

    /// Stops the pod and removes everything of it. Tries until it is done.
    async fn stop(&mut self) {
        for (_, probe) in self.probes.drain() {
            probe.abort();
        }
        self.plan = Plan::default();
        self.retry = RETRY_MIN;
        let mut grace_now = grace(grace_seconds(&self.seen.pod));
        loop {
            let outcome = self.stop_once(grace_now).await;
            match outcome {
                Ok(true) => break,
                Ok(false) => {
                    // The grace period became shorter; stop again with the new one.
                    self.take_orders();
                    grace_now = grace_now.min(grace(grace_seconds(&self.seen.pod)));
                }
                Err(error) => {
                    let message = format!("error killing pod: {error}");
                    self.tell(false, true, "FailedKillPod", message, "").await;
                    let pause = self.next_retry();
                    tokio::time::sleep(pause).await;
                    self.take_orders();
                    grace_now = grace_now.min(grace(grace_seconds(&self.seen.pod)));
                }
            }
        }
        let restarts = self.shared.restarts.clone();
        let uid = self.name.uid.clone();
        let _ = tokio::task::spawn_blocking(move || restarts.forget(&uid)).await;
        self.shared.board.remove(&self.name.uid);
        if self.announce {
            let PodName { namespace, name, uid } = self.name.clone();
            let gone = PodGone { namespace, name, uid };
            let _ = self.shared.events.send(EngineEvent::Gone(gone)).await;
        }
    }

    /// Returns `false` if a shorter grace period was ordered before the pod was down.
    async fn stop_once(&mut self, grace_now: Duration) -> Result<bool, CriError> {
        if !self.known {
            self.refresh().await?;
        }
        if self.runtime.may_live() {
            let mut orders = self.orders.clone();
            let shorter = async move {
                let shorter = |orders: &Orders| grace(grace_seconds(&orders.pod)) < grace_now;
                if orders.wait_for(shorter).await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            let killed = tokio::select! {
                killed = self.kill_pod(Some(grace_now)) => Some(killed),
                () = shorter => None,
            };
            match killed {
                None => {
                    self.known = false;
                    return Ok(false);
                }
                Some(killed) => killed?,
            }
        } else if !self.runtime.sandboxes.is_empty() {
            let ids: Vec<String> =
                self.runtime.sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect();
            for id in ids {
                self.shared.runtime.stop_sandbox(&id).await?;
            }
        }
        if !self.spec().containers.is_empty() {
            self.publish(true).await;
        }
        self.clean_up().await?;
        Ok(true)
    }

    /// Removes a stopped pod's containers, sandboxes, files, logs and cgroup.
    async fn clean_up(&mut self) -> Result<(), CriError> {
        let containers = self.runtime.containers.iter().map(|one| one.id.clone());
        let containers: Vec<String> = containers.collect();
        for id in containers {
            self.shared.runtime.remove_container(&id).await?;
            self.forget(&id);
        }
        let sandboxes: Vec<String> =
            self.runtime.sandboxes.iter().map(|one| one.id.clone()).collect();
        for id in sandboxes {
            self.shared.runtime.remove_sandbox(&id).await?;
            self.forget(&id);
        }
        let folder = self.folder.clone();
        let logs = container::log_folder(&self.shared.config.log_root, &self.name);
        let uid = self.name.uid.clone();
        let cgroup_root = self.shared.config.cgroup_root.clone();
        let removed = tokio::task::spawn_blocking(move || {
            remove_cgroups(&cgroup_root, &uid);
            let removed = folder.remove();
            match std::fs::remove_dir_all(&logs) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => removed,
            }
        });
        if let Ok(Err(error)) = removed.await {
            tracing::warn!(pod = %self.name.full(), error = %error, "files of a pod are left");
        }
        Ok(())
    }

    /// Frees what an ended pod does not need any more; its logs and statuses stay.
    async fn clean_ended(&mut self) {
        let folder = self.folder.clone();
        let removed = tokio::task::spawn_blocking(move || folder.remove_volumes()).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(pod = %self.name.full(), error = %error, "volumes of a pod are left");
        }
        self.volumes = None;
        self.ended_cleaned = true;
    }
}

/// Why a container was not started.
enum StartError {
    /// The pod is to stop.
    Stopping,
    Waits {
        waiting: Waiting,
        retry: Duration,
    },
}

fn waits(reason: &str, message: &str, retry: Duration) -> StartError {
    let waiting = Waiting { reason: reason.to_owned(), message: message.to_owned() };
    StartError::Waits { waiting, retry }
}

/// Waits for `work`, and gives it up with `None` when the pod is to stop.
async fn give_way<T>(orders: &watch::Receiver<Orders>, work: impl Future<Output = T>) -> Option<T> {
    let mut orders = orders.clone();
    tokio::select! {
        biased;
        result = work => Some(result),
        stops = orders.wait_for(Orders::stops) => {
            // Without an owner there is nobody to stop for; the task is about to be aborted.
            drop(stops);
            None
        }
    }
}

fn grace(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

fn until(at: Timestamp) -> Duration {
    // A little later than the moment itself, so that the clock has surely passed it.
    let left = Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default();
    left + Duration::from_millis(5)
}

/// Removes the pod's cgroups; the runtime only removes those of containers.
fn remove_cgroups(root: &str, uid: &str) {
    let pod = format!("pod{uid}");
    remove_cgroup(root, &[&pod]);
    for class in ["burstable", "besteffort"] {
        remove_cgroup(root, &[class, &pod]);
    }
}

/// Removes the cgroups above pods, when there are no pods any more.
pub(super) fn remove_cgroup_root(root: &str) {
    for class in ["burstable", "besteffort"] {
        remove_cgroup(root, &[class]);
    }
    remove_cgroup(root, &[]);
}

/// Removes one cgroup from every hierarchy. Only empty ones go; the kernel refuses the rest.
fn remove_cgroup(root: &str, below: &[&str]) {
    if root.is_empty() {
        return;
    }
    let mut tops = vec![PathBuf::from("/sys/fs/cgroup")];
    if let Ok(entries) = std::fs::read_dir("/sys/fs/cgroup") {
        tops.extend(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()));
    }
    let path = linux::cgroup_path(root, below);
    for top in tops {
        let _ = std::fs::remove_dir(top.join(path.trim_start_matches('/')));
    }
}

/// The store, seen from one namespace.
struct StoreLookup {
    objects: Arc<dyn Objects>,
    namespace: String,
}

impl Lookup for StoreLookup {
    fn config_map(&self, name: &str) -> Option<Arc<ConfigMap>> {
        self.objects.config_map(&self.namespace, name)
    }

    fn secret(&self, name: &str) -> Option<Arc<Secret>> {
        self.objects.secret(&self.namespace, name)
    }
}

#[cfg(test)]
mod tests {
    use skerry_edge_core::pods::runtime::State;

    use super::*;

    #[tokio::test]
    async fn work_gives_way_to_a_stop_and_not_to_anything_else() {
        let pod = Arc::new(Pod::default());
        let (orders, inbox) = watch::channel(Orders::new(pod));
        assert_eq!(give_way(&inbox, async { 1 }).await, Some(1));
        orders.send_modify(|orders| orders.gone = true);
        assert_eq!(give_way(&inbox, std::future::pending::<()>()).await, None);
    }

    #[test]
    fn unknown_state_may_still_live() {
        let runtime = PodRuntime {
            sandboxes: Vec::new(),
            containers: vec![Instance {
                id: "1".to_owned(),
                name: "a".to_owned(),
                sandbox: String::new(),
                restart_count: 0,
                state: State::Unknown,
                created_at: Timestamp::UNIX_EPOCH,
                started_at: None,
                image: String::new(),
                image_id: String::new(),
                hash: None,
                kubelet_hash: None,
                user_image: None,
            }],
        };
        assert!(runtime.may_live());
    }
}
