//! The agent: one loop that owns the node's state.
//!
//! `select` turns link, pod engine, timers and lookups into one [`Action`]; [`Agent::apply`] feeds the machines of
//! `skerry_edge_core` and drains them. Nothing else touches `Meta` and `Uplink`, so there is no lock; what it costs is
//! that a slow disk delays everything, the link included.
//!
//! Order that matters: a push is durable before it is acknowledged, and known to the engine after that. Pods start
//! from the database before the link is dialled.

use crate::appliance;
use crate::config::Config;
use crate::enrol::EnrolError;
use crate::enrol::{self, Credentials};
use crate::history;
use crate::jobs::{Done, Jobs};
use crate::link::{self, LinkEvent, LinkParts, Outgoing, chain};
use crate::meta_store::{self, OpenError, Store, Trust, WriteError};
use crate::metaserver::{self, ApiRequest, Desk};
use crate::node;
use crate::objects::{Found, LookupRequest, StoredObjects};
use crate::os;
use crate::pods::{
    Engine, EngineConfig, EngineEvent, Limit, ObjectKind, ResetError, RuntimeInfo, StartError,
};
use crate::preload;
use crate::qualification::{self, Published};
use crate::tunnel;
use crate::twin::{self, Event as TwinEvent, Up};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodStatus;
use serde_json::Value;
use skerry_api::fleet::os::{ORDER_ANNOTATION, OsProgress, PROGRESS_ANNOTATION};
use skerry_edge_core::Now;
use skerry_edge_core::event::EventReport;
use skerry_edge_core::meta::{Effect, Meta, Step};
use skerry_edge_core::node::COMPUTE_INTERVAL;
use skerry_edge_core::rules::RuleLimits;
use skerry_edge_core::status::PodKey;
use skerry_edge_core::uplink::{Output, Ticket, Uplink};
use skerry_protocol::bus::EVENT_ROUTER;
use skerry_protocol::capability::Capabilities;
use skerry_protocol::tunnel::DEMAND;
use skerry_protocol::{Message, Operation, ResourcePath};
use skerry_qualify::publish::REQUEST;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// Lookups of the engine that wait for the loop; then the engine's workers wait.
const LOOKUPS_MAX: usize = 64;
/// Messages that are looked at before what they ask for is made durable. A transaction costs about as much for many
/// rows as for one, and nobody else is served meanwhile.
const PUSHES_MAX: usize = 32;
/// Messages about devices that wait for the link; more of them wait in the twin, as names.
const TWIN_UP_MAX: usize = 16;
/// Looks at the machine between two looks at the images.
const IMAGES_EVERY: u32 = 30;
/// Images in the Node's status, as kubelet's default.
const IMAGES_MAX: usize = 50;

/// How long pods wait for the images that come with the machine.
const PRELOAD_WAIT: Duration = Duration::from_secs(20);

/// Why the agent ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The database cannot be used.
    #[error("no database")]
    Store(#[from] OpenError),
    /// The database broke while it was in use; the next start keeps it aside and makes a new one.
    #[error("the database broke while it was in use")]
    Broken(#[source] WriteError),
    /// A pod's row is known and cannot be read.
    #[error("`{0}` cannot be read from the database any more")]
    Unreadable(String),
    /// The pod engine did not start.
    #[error("the pod engine did not start")]
    Engine(#[from] StartError),
    /// The node has no certificate, no way to get one, and nothing to run meanwhile.
    #[error("the node could not join the cluster")]
    Enrol(#[from] EnrolError),
    /// Not everything was removed.
    #[error("could not remove the pods of this node")]
    Reset(#[from] ResetError),
    /// The configuration in the file is another now: start again with it.
    #[error("the configuration has changed")]
    Restart,
    /// A part that should run as long as the agent has ended.
    #[error("{0} has stopped")]
    Stopped(&'static str),
}

impl AgentError {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Store(error) => error.hint(),
            Self::Enrol(error) => error.hint(),
            Self::Broken(_) | Self::Unreadable(_) => Some(
                "containers keep running; start edgecore again, and check the disk if this comes back".into(),
            ),
            _ => None,
        }
    }
}

/// Runs the agent until `stop`; containers keep running after it.
///
/// # Errors
///
/// [`AgentError`] when it cannot start, or when a part of it has ended.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), AgentError> {
    let config = Arc::new(config);
    let (store, opened) = Store::open(&config.database())?;
    let store = Arc::new(store);
    if let Some((aside, reason)) = &opened.broken {
        tracing::error!(
            database = %config.database().display(), kept_as = %aside.display(), reason,
            "the database was broken and is being rebuilt from the hub; until then nothing that runs is stopped. \
             hint: if this comes back, check the disk"
        );
    }
    let deleted = opened.tombstones.iter().map(|tombstone| tombstone.uid.clone()).collect();
    let (meta, restored) = Meta::restore(&config.node_name, opened.rows, opened.tombstones);

    let (lookups, lookup_requests) = mpsc::channel(LOOKUPS_MAX);
    let objects = Arc::new(StoredObjects::new(store.clone(), lookups.clone()));
    let (engine, engine_events) = start_engine(&config, objects, store.clone()).await?;
    let engine = Arc::new(engine);

    let now = now();
    let seed = seed(&config.node_name, now);
    let runtime = engine.runtime();
    let facts = node::facts(&config, &runtime.borrow(), Vec::new());
    let (credentials, credentials_seen) = watch::channel(None);
    let rows = opened.outbox;
    if !rows.is_empty() {
        tracing::info!(
            rows = rows.len(),
            "the cluster is owed what was not told before the last end"
        );
    }
    let (jobs, from_jobs) = Jobs::start(config.clone(), lookups.clone());
    let (twin_events, events_of_twin) = mpsc::channel(twin::EVENTS_MAX);
    let (twin_up, from_twin) = mpsc::channel(twin::UP_MAX);
    let mut agent = Agent {
        twin: twin_events,
        twin_up: VecDeque::new(),
        jobs,
        uplink: Uplink::restore(facts, now, seed, rows, |seq| store.read_outbox(seq)),
        config: config.clone(),
        credentials: credentials.clone(),
        store: store.clone(),
        engine: engine.clone(),
        meta,
        trust: opened.trust,
        told_all: false,
        outgoing: None,
        waiting: HashMap::new(),
        images: Vec::new(),
        api: Desk::default(),
        tunnel: watch::Sender::default(),
        appliance: None,
        kernel: Kernel::new(&config),
    };
    let kernel_parts = agent.kernel.parts();
    let mut parts = tokio::task::JoinSet::new();
    let (facts, facts_seen) = watch::channel(link::LinkFacts::default());
    if let Some(socket) = appliance::socket() {
        let (signs, signs_seen) = watch::channel(appliance::Signs::default());
        let (machine, machine_seen) = watch::channel(None);
        let (asks, asked) = mpsc::channel(OS_ASKS_MAX);
        let os = Os::default();
        let versions = os::Parts {
            endpoint: config.enrol.clone(),
            credentials: credentials_seen.clone(),
            order: os.order.subscribe(),
            facts: machine_seen.clone(),
            pods: os.running.subscribe(),
            asks,
            progress: os.progress.clone(),
            store: os::STORE.into(),
            sources: None,
        };
        parts.spawn(os::run(versions, stop.clone()));
        let talk = appliance::Parts {
            signs: signs_seen,
            link: facts_seen.clone(),
            credentials: credentials_seen.clone(),
            facts: machine,
            asks: asked,
        };
        parts.spawn(appliance::run(socket, talk, stop.clone()));
        agent.appliance = Some(Appliance { signs, facts: machine_seen, os });
        let (imported, done) = oneshot::channel();
        let import = preload(config.clone(), imported);
        let import = stop.clone().run_until_cancelled_owned(import);
        parts.spawn(async move { import.await.unwrap_or_default() });
        // A runtime that is down runs no pods either; everything else goes on meanwhile.
        let _ = tokio::time::timeout(PRELOAD_WAIT, done).await;
    }
    agent.forget_settled_pods();
    agent.start_pods(restored, deleted).await;
    let rebuilding = opened.trust == Trust::Rebuilding;
    agent.node_event("Starting", false, "Starting edgecore.");
    if rebuilding {
        agent.node_event(
            "DatabaseLost",
            true,
            "The node's database was broken; it is being rebuilt from the hub.",
        );
    }

    let tunnel_demand = agent.tunnel.subscribe();
    let (api_requests, from_api) = mpsc::channel(metaserver::REQUESTS_MAX);
    let api_changes = agent.api.changes();

    let (asks, from_tunnel) = mpsc::channel(history::ASKS_MAX);
    let devices = twin::Parts {
        node: config.node_name.clone(),
        store: store.clone(),
        events: events_of_twin,
        up: twin_up,
        bus: config.bus.clone(),
        socket: config.dmi_socket.clone(),
        interval: config.report_interval,
        history: config.history,
        dir: config.dir.clone(),
        asks: from_tunnel,
    };
    parts.spawn(twin::run(devices, stop.clone()));

    // The link after the pods: they do not wait for it.
    let (link_events, from_link) = mpsc::channel(link::INCOMING_MAX);
    let timing = link::Timing::default();
    let link = LinkParts { events: link_events, credentials, lookups, facts, seed, timing };
    parts.spawn(link::run(config.clone(), link, stop.clone()));
    let written = link::facts::keep_written(config.dir.clone(), facts_seen);
    let written = stop.clone().run_until_cancelled_owned(written);
    parts.spawn(async move { written.await.unwrap_or_default() });
    if let Some(kernel_parts) = kernel_parts {
        parts.spawn(qualification::keep(config.clone(), kernel_parts, stop.clone()));
    }
    if let Some(address) = config.meta_server {
        let node = config.node_name.clone();
        let stop = stop.clone();
        parts.spawn(metaserver::run(address, node, store, api_requests, api_changes, stop));
    }
    if let Some(endpoint) = config.tunnel.clone() {
        let tunnel = tunnel::Tunnel::new(config, endpoint, engine, asks);
        parts.spawn(tunnel.run(credentials_seen, tunnel_demand, seed, stop.clone()));
    }
    let run = agent.run(
        from_link,
        engine_events,
        lookup_requests,
        from_api,
        from_jobs,
        from_twin,
        runtime,
        stop.clone(),
    );
    let result = run.await;
    stop.cancel();
    while parts.join_next().await.is_some() {}
    result
}

/// Stops and removes every pod of this node, its certificate and its database, so that it may join another cluster.
///
/// # Errors
///
/// [`AgentError`] when something is left.
pub async fn reset(config: Config) -> Result<(), AgentError> {
    let (store, _) = Store::open(&config.database())?;
    let store = Arc::new(store);
    let (lookups, _requests) = mpsc::channel(1);
    let objects = Arc::new(StoredObjects::new(store.clone(), lookups));
    let (engine, mut events) = start_engine(&config, objects, store).await?;
    // The engine waits for whoever reads its events.
    let drain = tokio::spawn(async move { while events.recv().await.is_some() {} });
    engine.reset().await?;
    drop(engine);
    drain.abort();
    crate::enrol::forget(&config.pki())?;
    // Last: a reset that fails before this can be run again and still knows everything.
    meta_store::remove(&config.database())?;
    Ok(())
}

async fn start_engine(
    config: &Config,
    objects: Arc<StoredObjects>,
    store: Arc<Store>,
) -> Result<(Engine, mpsc::Receiver<EngineEvent>), StartError> {
    let mut engine = EngineConfig::new(
        &config.node_name,
        config.pod_dir.clone(),
        config.pod_log_dir.clone(),
        config.runtime_socket.clone(),
    );
    engine.node_ip = config.node_ip.or_else(node::default_address);
    engine.cluster_dns = config.cluster_dns.clone();
    engine.cluster_domain = config.cluster_domain.clone();
    if let Some(root) = &config.cgroup_root {
        engine.cgroup_root = root.clone();
    }
    if let Some(file) = &config.resolv_conf {
        engine.resolv_conf = file.clone();
    }
    Engine::start(engine, objects, store).await
}

/// Why a pod does not run; nothing when its containers run or have done their work.
fn not_running(status: &PodStatus) -> Option<String> {
    match status.phase.as_deref() {
        Some("Succeeded") => return None,
        Some("Running") => {}
        other => return Some(other.unwrap_or("Unknown").to_owned()),
    }
    let containers = status.container_statuses.iter().flatten();
    let mut states =
        containers.filter_map(|container| Some((container, container.state.as_ref()?)));
    states.find_map(|(container, state)| {
        let waits = state.waiting.as_ref().map(|of| of.reason.clone().unwrap_or_default());
        let ended = state.terminated.as_ref().filter(|of| of.exit_code != 0);
        let why = waits.or_else(|| ended.map(|of| format!("ended with {}", of.exit_code)))?;
        Some(format!("container `{}` {why}", container.name))
    })
}

/// What all rules together let run.
fn limits_of(rules: &[RuleLimits]) -> Vec<Limit> {
    let of = |rule: &RuleLimits| {
        let namespace = rule.rule.split('/').next().unwrap_or_default().to_owned();
        let limits = rule.limits.clone().into_iter();
        limits.map(move |(workload, replicas)| Limit {
            namespace: namespace.clone(),
            workload,
            replicas,
        })
    };
    rules.iter().flat_map(of).collect()
}

/// Gives the runtime the images that come with the machine, as far as it lacks them; pods wait for it, as their sandboxes
/// need one of them.
async fn preload(config: Arc<Config>, done: oneshot::Sender<()>) {
    let folder = Path::new(preload::FOLDER);
    match preload::import_when_up(&config.runtime_socket, folder).await {
        Ok((images, failed)) => {
            for image in images.iter().filter(|image| image.new) {
                tracing::info!(image = image.name, "imported");
            }
            for error in failed {
                tracing::error!(error = chain(&error), "an image of this machine was not imported");
            }
        }
        Err(error) => tracing::error!(error = chain(&error), "no images were imported"),
    }
    let _ = done.send(()); // the agent may have gone on
}

/// The conversation with PID 1, where there is one.
struct Appliance {
    signs: watch::Sender<appliance::Signs>,
    facts: watch::Receiver<Option<appliance::Facts>>,
    os: Os,
}

/// What the part for versions of the OS is told, and what it says.
#[derive(Default)]
struct Os {
    /// The order on the Node, once that was seen.
    order: watch::Sender<Option<Option<String>>>,
    running: watch::Sender<os::Running>,
    progress: watch::Sender<OsProgress>,
}

/// Questions to PID 1 that wait.
const OS_ASKS_MAX: usize = 4;

/// The program whose verb `qualify` judges the kernel.
const PROGRAM: &str = "edgecore";

/// What the kernel was seen to carry, and who is told.
struct Kernel {
    registered: watch::Sender<bool>,
    requested: watch::Sender<String>,
    published: watch::Sender<Option<Arc<Published>>>,
    /// The hub of the present link keeps an object about it.
    hub_keeps: bool,
    /// What it was told last.
    told: Option<String>,
}

impl Kernel {
    fn new(config: &Config) -> Self {
        Self {
            registered: watch::Sender::new(false),
            requested: watch::Sender::default(),
            published: watch::Sender::default(),
            hub_keeps: false,
            told: qualification::told(&config.dir),
        }
    }

    /// For the task that judges; nothing when this program cannot start itself again, or is another one that has the
    /// agent in it and does not know the verb.
    fn parts(&self) -> Option<qualification::Parts> {
        let program = std::env::current_exe()
            .inspect_err(|error| tracing::warn!(%error, "the kernel is not judged: no own program"))
            .ok()
            .filter(|program| program.file_name().is_some_and(|name| name == PROGRAM))?;
        Some(qualification::Parts {
            program,
            registered: self.registered.subscribe(),
            requested: self.requested.subscribe(),
            published: self.published.clone(),
        })
    }
}

struct Agent {
    /// The owner of the devices.
    twin: mpsc::Sender<TwinEvent>,
    /// Its messages for the hub; at most [`TWIN_UP_MAX`].
    twin_up: VecDeque<Message>,
    kernel: Kernel,
    appliance: Option<Appliance>,
    config: Arc<Config>,
    store: Arc<Store>,
    engine: Arc<Engine>,
    meta: Meta,
    uplink: Uplink,
    trust: Trust,
    /// Whether the hub has told this process everything that it wants of the node.
    told_all: bool,
    credentials: watch::Sender<Option<Arc<Credentials>>>,
    outgoing: Option<mpsc::Sender<Outgoing>>,
    waiting: HashMap<Ticket, oneshot::Sender<Found>>,
    images: Vec<Value>,
    api: Desk,
    jobs: Jobs,
    /// When there has to be a tunnel for streams.
    tunnel: watch::Sender<tunnel::Demand>,
}

/// Pushes that are made durable together.
#[derive(Default)]
struct Pushes {
    steps: Vec<Step>,
    /// What they are about, each once.
    resources: HashSet<String>,
}

impl Pushes {
    fn take(&mut self) -> Vec<Step> {
        self.resources.clear();
        std::mem::take(&mut self.steps)
    }
}

/// All that can happen.
enum Action {
    Link(LinkEvent),
    Engine(EngineEvent),
    Lookup(LookupRequest),
    Api(ApiRequest),
    Job(Done),
    /// Something about devices for the hub.
    Twin(Up),
    /// Time to look at the machine, or the runtime's state is new.
    Look,
    /// A timer of the uplink, or room in the link's queue.
    Poll,
    /// A part of the agent has ended.
    Ended(&'static str),
    Stop,
}

impl Agent {
    #[allow(clippy::too_many_arguments)]
    async fn run(
        mut self,
        mut link: mpsc::Receiver<LinkEvent>,
        mut engine: mpsc::Receiver<EngineEvent>,
        mut lookups: mpsc::Receiver<LookupRequest>,
        mut api: mpsc::Receiver<ApiRequest>,
        mut jobs: mpsc::Receiver<Done>,
        mut twin: mpsc::Receiver<Up>,
        mut runtime: watch::Receiver<RuntimeInfo>,
        stop: CancellationToken,
    ) -> Result<(), AgentError> {
        let mut look = tokio::time::interval(COMPUTE_INTERVAL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looks: u32 = 0;
        loop {
            let blocked = self.drain().await?;
            self.tell_appliance();
            self.tell_kernel();
            let next = self.uplink.poll_timeout(now());
            let next = self.api.poll_timeout().map_or(next, |api| api.min(next));
            let next = tokio::time::Instant::from_std(next);
            let room = async {
                match (&self.outgoing, blocked) {
                    (Some(outgoing), true) => drop(outgoing.reserve().await),
                    _ => tokio::time::sleep_until(next).await,
                }
            };
            let action = tokio::select! {
                () = stop.cancelled() => Action::Stop,
                event = link.recv() => event.map_or(Action::Ended("the link"), Action::Link),
                event = engine.recv() => event.map_or(Action::Ended("the pod engine"), Action::Engine),
                Some(request) = lookups.recv() => Action::Lookup(request),
                Some(request) = api.recv() => Action::Api(request),
                Some(done) = jobs.recv() => Action::Job(done),
                // While the link is full, the twin waits.
                Some(up) = twin.recv(), if self.twin_up.len() < TWIN_UP_MAX => Action::Twin(up),
                changed = runtime.changed() => {
                    changed.map_or(Action::Ended("the pod engine"), |()| Action::Look)
                }
                _ = look.tick() => {
                    if looks.is_multiple_of(IMAGES_EVERY) {
                        self.look_at_images().await;
                    }
                    looks = looks.wrapping_add(1);
                    Action::Look
                }
                () = room => Action::Poll,
            };
            match action {
                Action::Stop => return Ok(()),
                // The parts are told to stop at the same time, and one may be faster than this loop.
                Action::Ended(_) if stop.is_cancelled() => return Ok(()),
                Action::Ended(part) => return Err(AgentError::Stopped(part)),
                Action::Look => {
                    let info = runtime.borrow_and_update().clone();
                    self.look(&info);
                }
                Action::Link(LinkEvent::Message(first)) => {
                    self.handle_messages(*first, &mut link).await?;
                }
                action => self.apply(action).await?,
            }
        }
    }

    /// Takes what has arrived by now, so that one transaction makes many pushes durable.
    async fn handle_messages(
        &mut self,
        first: Message,
        link: &mut mpsc::Receiver<LinkEvent>,
    ) -> Result<(), AgentError> {
        let mut pushes = Pushes::default();
        let mut next = Some(LinkEvent::Message(Box::new(first)));
        let mut count = 0;
        while let Some(event) = next.take() {
            match event {
                LinkEvent::Message(message) => self.handle_message(&message, &mut pushes).await?,
                other => {
                    self.carry_out(pushes.take()).await?;
                    self.apply(Action::Link(other)).await?;
                }
            }
            count += 1;
            if count < PUSHES_MAX {
                next = link.try_recv().ok();
            }
        }
        self.carry_out(pushes.take()).await.map(drop)
    }

    async fn apply(&mut self, action: Action) -> Result<(), AgentError> {
        match action {
            Action::Link(LinkEvent::Connected { transport, capabilities, outgoing }) => {
                tracing::info!(
                    %transport,
                    capabilities = %capabilities,
                    objects = self.meta.len(),
                    owed = self.uplink.outbox().len(),
                    "connected to the hub"
                );
                // When the link has moved, the end of the old channel tells the old connection that it is over.
                self.outgoing = Some(outgoing);
                let asks = capabilities != Capabilities::default();
                self.tunnel.send_modify(|demand| demand.handle_connected(asks));
                let digest = capabilities.digest.then(|| self.meta.start_digest());
                if digest.is_none() {
                    self.meta.link_lost();
                }
                self.kernel.hub_keeps = capabilities.qualify;
                self.uplink.handle_connected(now(), capabilities, digest);
                self.api.handle_connected();
                self.jobs.handle_connected();
                self.twin_up.clear();
                self.tell_twin(TwinEvent::Connected(capabilities)).await;
                self.engine.link_up().await;
            }
            Action::Link(LinkEvent::Written(id)) => self.uplink.handle_written(now(), &id),
            Action::Link(LinkEvent::Message(message)) => {
                let mut pushes = Pushes::default();
                self.handle_message(&message, &mut pushes).await?;
                self.carry_out(pushes.take()).await?;
            }
            Action::Link(LinkEvent::Garbled(error)) => {
                tracing::warn!(error = chain(&error), "the hub sent something that is no message");
            }
            Action::Link(LinkEvent::Disconnected { reason }) => {
                if self.uplink.is_connected() {
                    tracing::warn!(reason, "the link is down; pods go on from the database");
                } else {
                    tracing::info!(reason, "no link");
                }
                self.outgoing = None;
                self.meta.link_lost();
                self.uplink.handle_disconnected(now());
                self.api.handle_disconnected(now());
                self.twin_up.clear();
                self.tell_twin(TwinEvent::Disconnected).await;
            }
            Action::Link(LinkEvent::NotEnrolled(error)) => {
                if self.meta.is_empty() {
                    return Err(error.into()); // nothing to run meanwhile: say so and end
                }
                let hint = error.hint().unwrap_or_default();
                tracing::error!(
                    error = chain(&error),
                    hint,
                    "the node is not in the cluster; its pods go on"
                );
            }
            Action::Engine(EngineEvent::Status(update)) => {
                let key = PodKey::new(&update.namespace, &update.name, &update.uid);
                if self.holds(&key) {
                    let status = serde_json::to_value(&update.status).unwrap_or_default();
                    let store = self.store.clone();
                    let path = pod_path(&key);
                    self.uplink.report_pod(key, status, || {
                        let row: Value = serde_json::from_str(&store.read(&path)?).ok()?;
                        row.get("status").cloned()
                    });
                }
            }
            Action::Engine(EngineEvent::Gone(gone)) => {
                let key = PodKey::new(&gone.namespace, &gone.name, &gone.uid);
                if self.holds(&key) {
                    self.uplink.finish_pod(key);
                }
            }
            Action::Engine(EngineEvent::Event(event)) => {
                let report = EventReport {
                    kind: "Pod",
                    namespace: event.namespace,
                    name: event.name,
                    uid: event.uid,
                    field_path: event.field_path,
                    warning: event.warning,
                    reason: event.reason.into(),
                    message: event.message,
                };
                self.uplink.push_event(now(), report);
            }
            Action::Lookup(request) => {
                let ticket = self.uplink.lookup(now(), request.path, request.content);
                self.waiting.insert(ticket, request.answer);
            }
            Action::Api(request) => self.api.handle_request(now(), request),
            Action::Twin(Up::Message(message)) => {
                if self.outgoing.is_some() {
                    self.twin_up.push_back(*message);
                }
            }
            Action::Twin(Up::Event(report)) => self.uplink.push_event(now(), *report),
            Action::Twin(Up::Restart { rule, workload }) => {
                let (engine, twin) = (self.engine.clone(), self.twin.clone());
                // A task of its own: containers may take their time to stop. Rules are limited in how often they begin.
                tokio::spawn(async move {
                    let namespace = rule.split('/').next().unwrap_or_default();
                    let done = engine.restart(namespace, &workload).await;
                    let done = done.map_err(|error| chain(&error));
                    let what = format!("restarted {workload}");
                    let _ = twin.send(TwinEvent::RuleDone { rule, what, done }).await;
                });
            }
            Action::Twin(Up::Limit(limits)) => {
                self.limit(limits).await;
            }
            Action::Twin(Up::Upload { topic, text }) => self.uplink.push_upload(topic, text),
            Action::Job(Done::Report(report)) => {
                let content = &report.content;
                self.uplink.push_effect(report.key, report.operation, report.resource, content);
            }
            Action::Job(Done::Ended(kind, job)) => self.jobs.handle_ended(kind, job),
            Action::Job(Done::Restart) => return Err(AgentError::Restart),
            Action::Look | Action::Poll | Action::Ended(_) | Action::Stop => {}
        }
        Ok(())
    }

    /// Carries out what the uplink asks for. Returns whether messages wait for room in the link's queue.
    async fn drain(&mut self) -> Result<bool, AgentError> {
        self.uplink.want_digest(self.meta.digest_due());
        while let Some(output) = self.uplink.poll_output(now()) {
            self.handle_output(output).await?;
        }
        self.store_owed().await?;
        self.api.deliver(now());
        let Some(outgoing) = self.outgoing.clone() else { return Ok(false) };
        loop {
            let Ok(permit) = outgoing.try_reserve() else { return Ok(!outgoing.is_closed()) };
            match self.next_outgoing() {
                Some(message) => permit.send(message),
                None => return Ok(false),
            }
        }
    }

    /// Makes durable what must not be told before it is, in one transaction; does nothing when nothing is new.
    async fn store_owed(&mut self) -> Result<(), AgentError> {
        let changes = self.uplink.take_changes(now());
        if changes.is_empty() {
            return Ok(());
        }
        match self.store.write_outbox(changes).await {
            Ok(()) => self.uplink.handle_stored(now(), true),
            Err(error @ WriteError::Broken(_)) => return Err(AgentError::Broken(error)),
            Err(_) => self.uplink.handle_stored(now(), false), // logged by the store; tried again later
        }
        Ok(())
    }

    fn next_outgoing(&mut self) -> Option<Outgoing> {
        let store = &self.store;
        let message = self.uplink.poll_transmit(now(), |seq| store.read_outbox(seq));
        let message = message.or_else(|| self.twin_up.pop_front());
        let message = message.or_else(|| self.api.poll_transmit(now()))?;
        tracing::debug!(
            msg_id = message.header.msg_id,
            operation = message.route.operation,
            resource = message.route.resource,
            "up"
        );
        let report = self.uplink.wants_written(&message.header.msg_id);
        Some(Outgoing { message, report })
    }

    /// Handles a message; what a push asks for is put to `pushes`, which the caller carries out.
    async fn handle_message(
        &mut self,
        message: &Message,
        pushes: &mut Pushes,
    ) -> Result<(), AgentError> {
        let route = &message.route;
        tracing::debug!(
            msg_id = message.header.msg_id,
            operation = route.operation,
            resource = route.resource,
            "down"
        );
        if !message.header.parent_msg_id.is_empty() {
            if !self.uplink.handle_reply(now(), message) && !self.api.handle_reply(now(), message) {
                self.tell_twin(TwinEvent::Reply(Box::new(message.clone()))).await;
            }
            return Ok(());
        }
        if route.resource == DEMAND {
            self.tunnel.send_modify(tunnel::Demand::handle_asked);
            return Ok(());
        }
        if matches!(route.group.as_str(), "resource" | "func") {
            self.uplink.handle_push(now());
        }
        match enrol::handle_push(&self.config, &self.credentials, message) {
            None => {}
            Some(Ok(())) => {
                self.uplink.acknowledge(message.ack(now().unix_ms()));
                return Ok(());
            }
            Some(Err(error)) => {
                tracing::warn!(
                    error = chain(&error),
                    resource = route.resource,
                    "not taken, not acknowledged"
                );
                return Ok(());
            }
        }
        if !pushes.resources.insert(route.resource.clone()) {
            // The decision about an object needs the one before it.
            self.carry_out(pushes.take()).await?;
            pushes.resources.insert(route.resource.clone());
        }
        pushes.steps.push(self.meta.handle_push(now(), message));
        Ok(())
    }

    /// Makes steps about different objects durable, then acknowledges them, then lets them take effect, in their order.
    /// Returns whether all are durable.
    ///
    /// # Errors
    ///
    /// [`AgentError::Broken`]: only the next start can mend that.
    async fn carry_out(&mut self, steps: Vec<Step>) -> Result<bool, AgentError> {
        let changes: Vec<_> =
            steps.iter().map(|step| self.api.change(&self.store, step.write.as_ref()?)).collect();
        // The store makes one transaction of what waits for it.
        let store = &self.store;
        let writes = steps.iter().map(|step| async move {
            match step.write.clone() {
                Some(write) => store.write(write).await,
                None => Ok(()),
            }
        });
        let written = futures::future::join_all(writes).await;
        let mut all = true;
        for ((step, change), written) in steps.into_iter().zip(changes).zip(written) {
            match written {
                Ok(()) => change.into_iter().for_each(|change| self.api.publish(change)),
                Err(error @ WriteError::Broken(_)) => return Err(AgentError::Broken(error)),
                Err(_) => {
                    all = false; // logged by the store; the hub sends it again
                    continue;
                }
            }
            let (ack, effects) = self.meta.commit(step);
            if let Some(ack) = ack {
                self.uplink.acknowledge(ack);
                self.drain_acks();
            }
            for effect in effects {
                self.take_effect(effect).await;
            }
        }
        Ok(all)
    }

    /// Acknowledgements need not wait until the engine has taken an effect.
    fn drain_acks(&mut self) {
        let Some(outgoing) = &self.outgoing else { return };
        if let Ok(permit) = outgoing.clone().try_reserve()
            && let Some(message) = self.next_outgoing()
        {
            permit.send(message);
        }
    }

    async fn take_effect(&mut self, effect: Effect) {
        match effect {
            Effect::PodUpsert(pod) => self.engine.upsert(Arc::new(*pod)).await,
            Effect::PodRemove { namespace, name, uid } => {
                self.uplink.forget_pod(now(), &uid);
                self.engine.remove(&namespace, &name, &uid).await;
            }
            Effect::ObjectChanged { kind, namespace, name } => {
                let kind = match kind.as_str() {
                    "secret" => ObjectKind::Secret,
                    "configmap" => ObjectKind::ConfigMap,
                    "device" | "devicemodel" | "devicerule" => {
                        if let Ok(path) = ResourcePath::new(&namespace, &kind, &name) {
                            let text = self.store.read(&path.to_string());
                            let object = text.and_then(|text| serde_json::from_str(&text).ok());
                            self.tell_twin(TwinEvent::Object(path, object)).await;
                        }
                        return;
                    }
                    _ => return, // nobody here acts on it
                };
                self.engine.objects_changed(kind, &namespace, &name).await;
            }
            Effect::OwnNode(node) => {
                self.uplink.handle_own_node(&node);
                if let Some(appliance) = &self.appliance {
                    let order = node["metadata"]["annotations"][ORDER_ANNOTATION].as_str();
                    let order = Some(order.map(str::to_owned));
                    appliance.os.order.send_if_modified(|known| {
                        let new = *known != order;
                        *known = order;
                        new
                    });
                }
                let asked = node["metadata"]["annotations"][REQUEST].as_str().unwrap_or_default();
                self.kernel.requested.send_if_modified(|known| {
                    let new = known != asked;
                    asked.clone_into(known);
                    new
                });
            }
            Effect::OwnNodeGone => self.uplink.handle_own_node_gone(),
            Effect::HandOn(message) if message.route.group == "twin" => {
                self.tell_twin(TwinEvent::Hub(message)).await;
            }
            Effect::HandOn(message)
                if self.config.bus.is_some() && message.route.source == EVENT_ROUTER =>
            {
                self.tell_twin(TwinEvent::Bus(message)).await;
            }
            Effect::HandOn(message) => {
                if let Some(answer) = self.jobs.take(&message) {
                    self.uplink.acknowledge(answer);
                }
            }
            Effect::Ignored { resource, reason } => {
                tracing::warn!(resource, reason, "of no use here");
            }
        }
    }

    async fn handle_output(&mut self, output: Output) -> Result<(), AgentError> {
        match output {
            Output::Answer { ticket, path, found, ack } => {
                let mut found = found;
                if let Ok(Some(object)) = &found
                    && matches!(path.kind(), "configmap" | "secret")
                {
                    let step = self.meta.handle_answer(&path, object.clone());
                    if !self.carry_out(vec![step]).await? {
                        found = Err("the object could not be stored on this node".into());
                    }
                }
                if let (Some(ack), true) = (ack, found.is_ok()) {
                    self.uplink.acknowledge(ack);
                }
                if let Some(waiter) = self.waiting.remove(&ticket) {
                    let _ = waiter.send(found); // the engine may have given up
                }
            }
            Output::Object { path, object } => {
                let step = self.meta.handle_answer(&path, object);
                self.carry_out(vec![step]).await?;
            }
            Output::DigestAnswered => self.handle_digest_answered().await?,
            Output::PodFinished(key) => {
                tracing::info!(pod = %pod_path(&key), uid = key.uid, "finished pod was deleted in the cluster");
            }
            Output::Refused { resource, reason } => {
                tracing::warn!(resource, reason, "the hub refused a request");
            }
            Output::EventsDropped(count) => {
                tracing::warn!(count, "events were dropped: more than the queue holds");
            }
            Output::Reconnect(reason) => {
                tracing::warn!(reason, "dialling again");
                self.outgoing = None; // the link sees that its sender is gone
                self.meta.link_lost();
                self.uplink.handle_disconnected(now());
                self.api.handle_disconnected(now());
                self.twin_up.clear();
                self.tell_twin(TwinEvent::Disconnected).await;
            }
        }
        Ok(())
    }

    /// The hub has told everything: from now on, what is not in the database is not wanted.
    async fn handle_digest_answered(&mut self) -> Result<(), AgentError> {
        self.meta.digest_answered();
        if !self.told_all {
            let mut pods = Vec::with_capacity(self.meta.paths("pod").count());
            for path in self.meta.paths("pod") {
                // To go on without this pod would be to kill it.
                let read = self.store.read(path).and_then(|json| serde_json::from_str(&json).ok());
                pods.push(Arc::new(read.ok_or_else(|| AgentError::Unreadable(path.to_owned()))?));
            }
            self.engine.set_pods(pods).await;
            self.told_all = true;
        }
        if self.trust == Trust::Complete {
            return Ok(());
        }
        match self.store.set_trust(Trust::Complete).await {
            Ok(()) => {}
            Err(error @ WriteError::Broken(_)) => return Err(AgentError::Broken(error)),
            Err(_) => return Ok(()), // logged by the store; the next connection tries again
        }
        if self.trust == Trust::Rebuilding {
            tracing::info!(objects = self.meta.len(), "the database is rebuilt from the hub");
            self.node_event(
                "DatabaseRebuilt",
                false,
                "The node's database was rebuilt from the hub.",
            );
        }
        self.trust = Trust::Complete;
        Ok(())
    }

    /// The cluster knows of these by now: the row of the pod went before the note about it did.
    fn forget_settled_pods(&mut self) {
        let settled: Vec<_> =
            self.uplink.gone_pods().filter(|key| !self.holds(key)).cloned().collect();
        settled.iter().for_each(|key| self.uplink.forget_pod(now(), &key.uid));
    }

    /// Lets run what a rule says, from here on and after a restart.
    async fn limit(&mut self, limits: RuleLimits) {
        let (rule, twin) = (limits.rule.clone(), self.twin.clone());
        let list = limits.limits.iter().map(|(workload, most)| format!("{most} of {workload}"));
        let what = match list.collect::<Vec<_>>().join(", ") {
            list if list.is_empty() => "let all pods run here that the cluster wants".to_owned(),
            list => format!("let run here at most {list}"),
        };
        let written = self.store.write_limits(limits).await;
        if written.is_ok() {
            self.engine.set_limits(limits_of(&self.store.read_limits())).await;
        }
        let done = written.map_err(|error| chain(&error));
        // A task of its own: the twin may be waiting for this one.
        tokio::spawn(async move {
            let _ = twin.send(TwinEvent::RuleDone { rule, what, done }).await;
        });
    }

    /// Starts what the database holds, before any link.
    async fn start_pods(&mut self, restored: Vec<Effect>, deleted: HashSet<String>) {
        let mut pods = Vec::new();
        for effect in restored {
            match effect {
                Effect::PodUpsert(pod) => pods.push(Arc::new(*pod)),
                other => self.take_effect(other).await,
            }
        }
        tracing::info!(node = self.config.node_name, pods = pods.len(), trust = ?self.trust, "starting from the database");
        // Before the pods: one that may not run is not even begun.
        self.engine.set_limits(limits_of(&self.store.read_limits())).await;
        // A file can also be sound and old, or have lost its end: what else runs here is left to the hub's word.
        self.engine.resume(pods, deleted).await;
    }

    fn tell_appliance(&self) {
        let Some(appliance) = &self.appliance else { return };
        let trial = appliance.facts.borrow().as_ref().and_then(|facts| facts.os.trial.clone());
        let (running, waiting) = self.pods_by_state();
        let missing = trial.map(|trial| {
            let is_back = |pod: &&String| running.contains(*pod) || !waiting.contains_key(*pod);
            let missing = trial.pods.iter().filter(|pod| !is_back(pod));
            missing.map(|pod| format!("{pod}: {}", waiting[pod])).collect()
        });
        let connected = self.uplink.is_connected();
        let now = appliance::Signs {
            connected,
            registered: self.uplink.node().is_registered(),
            pods: running.len() + waiting.len(),
            missing,
        };
        appliance.signs.send_if_modified(|known| {
            let new = *known != now;
            *known = now;
            new
        });
        let running = os::Running { pods: running.into_iter().collect(), connected };
        appliance.os.running.send_if_modified(|known| {
            let new = *known != running;
            *known = running;
            new
        });
    }

    /// The pods of this node as `namespace/name`: those whose containers run or have done their work, and the others with
    /// the reason.
    fn pods_by_state(&self) -> (BTreeSet<String>, BTreeMap<String, String>) {
        let (mut running, mut waiting) = (BTreeSet::new(), BTreeMap::new());
        for path in self.meta.paths("pod") {
            let name = path.replacen("/pod/", "/", 1);
            let status = self.meta.held(path).and_then(|held| self.engine.status(&held.uid));
            match status.map_or_else(|| Some("not started yet".to_owned()), |of| not_running(&of)) {
                None => drop(running.insert(name)),
                Some(why) => drop(waiting.insert(name, why)),
            }
        }
        (running, waiting)
    }

    /// Hands the report about the kernel to a hub that keeps it, once per report and Node.
    fn tell_kernel(&mut self) {
        self.kernel.registered.send_if_modified(|known| {
            let now = self.uplink.node().is_registered();
            std::mem::replace(known, now) != now
        });
        if !self.kernel.hub_keeps || !self.uplink.is_connected() {
            return;
        }
        let Some(uid) = self.uplink.node().uid() else { return };
        let stamp = match &*self.kernel.published.borrow() {
            Some(published) if !published.stamp.is_empty() => format!("{} {uid}", published.stamp),
            _ => return,
        };
        if self.kernel.told.as_ref() == Some(&stamp) {
            return;
        }
        // A file that went away or broke is written anew with the next judgement.
        if let Some(object) = qualification::object(&self.config.dir) {
            let resource = skerry_protocol::qualification::resource(&self.config.node_name);
            let key = skerry_protocol::qualification::KIND.to_owned();
            self.uplink.push_effect(key, Operation::Update, resource, &object);
        }
        qualification::remember_told(&self.config.dir, &stamp);
        self.kernel.told = Some(stamp);
    }

    fn look(&mut self, runtime: &RuntimeInfo) {
        if *runtime == RuntimeInfo::default() {
            return; // not asked yet; a restart of the agent alone must not make the node look broken
        }
        let mut facts = node::facts(&self.config, runtime, self.images.clone());
        let mut health = node::health(&self.config, runtime, self.trust == Trust::Rebuilding);
        if let Some(machine) = self.appliance.as_ref().and_then(|one| one.facts.borrow().clone()) {
            facts.annotations = machine.annotations();
            if let Some(appliance) = &self.appliance {
                let progress = serde_json::to_string(&*appliance.os.progress.borrow());
                let progress = progress.expect("texts and numbers");
                facts.annotations.insert(PROGRESS_ANNOTATION.to_owned(), progress);
            }
            health.appliance = Some(machine.wrong());
        }
        if let Some(kernel) = self.kernel.published.borrow().clone() {
            // What a person configured stands.
            for (key, value) in &kernel.labels {
                facts.labels.entry(key.clone()).or_insert_with(|| value.clone());
            }
            facts.annotations.extend(kernel.annotations.clone());
            health.kernel = Some(kernel.condition.clone());
        }
        let message = health.not_ready.join(", ");
        match self.uplink.update_node(now(), facts, health) {
            Some(true) => {
                tracing::info!("the node is ready");
                self.node_event("NodeReady", false, "Node status is now: NodeReady");
            }
            Some(false) => {
                tracing::warn!(reason = message, "the node is not ready");
                self.node_event("NodeNotReady", false, "Node status is now: NodeNotReady");
            }
            None => {}
        }
    }

    async fn look_at_images(&mut self) {
        // A runtime that does not answer is reported by the node's conditions already.
        if let Ok(images) = self.engine.images().await {
            self.images = images.iter().take(IMAGES_MAX).map(node::image).collect();
        }
    }

    fn node_event(&mut self, reason: &str, warning: bool, message: &str) {
        let name = self.config.node_name.clone();
        let report = EventReport {
            kind: "Node",
            namespace: String::new(),
            uid: name.clone(),
            name,
            field_path: String::new(),
            warning,
            reason: reason.into(),
            message: message.into(),
        };
        self.uplink.push_event(now(), report);
    }

    /// The twin takes events faster than a link brings them; when it has ended, the agent is about to.
    async fn tell_twin(&self, event: TwinEvent) {
        let _ = self.twin.send(event).await;
    }

    fn holds(&self, key: &PodKey) -> bool {
        self.meta.held(&pod_path(key)).is_some_and(|held| held.uid == key.uid)
    }
}

fn pod_path(key: &PodKey) -> String {
    format!("{}/pod/{}", key.namespace, key.name)
}

fn now() -> Now {
    Now { mono: Instant::now(), wall: Timestamp::now() }
}

/// Different for each node and each start; jitter only.
fn seed(node: &str, now: Now) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (node, std::process::id(), now.wall.as_nanosecond()).hash(&mut hasher);
    hasher.finish()
}
