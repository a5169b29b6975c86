//! The owner loop: which pods there are, what the runtime has, and who has to be told.
//!
//! The only place that knows all pods. It starts one worker per pod, turns the runtime's exits and
//! lists into nudges of the right worker, and removes what belongs to no pod once the list of pods
//! is trusted. It makes no decision about a pod and never waits for one.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use skerry_edge_core::pods::volumes::Reference;
use skerry_edge_core::pods::{PodName, kubelet, volumes};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};

use super::logs::LogRotation;
use super::worker::{self, Orders, Shared};
use super::{
    Board, Command, EngineConfig, EngineEvent, Limit, ObjectKind, Objects, PodGone, ResetError,
    RestartRecord, RestartState, RuntimeInfo,
};
use crate::cri::{CriError, Exits, Runtime, v1};

/// Time between two lists while the runtime tells of exits by itself.
const LIST_INTERVAL: Duration = Duration::from_secs(60);
/// Time between two lists while it does not.
const LIST_INTERVAL_DEAF: Duration = Duration::from_secs(1);
/// Time that a list may take before the loop goes on without it.
const LIST_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two looks at the runtime's own state.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Time between two looks at the sizes of logs.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Exits that may wait for the loop; more are found by the next list.
const EXITS_MAX: usize = 1024;

/// Everything the loop starts with.
pub(super) struct Start {
    pub(super) config: EngineConfig,
    pub(super) objects: Arc<dyn Objects>,
    pub(super) restarts: Arc<dyn RestartState>,
    pub(super) runtime: Runtime,
    pub(super) inbox: mpsc::Receiver<Command>,
    pub(super) events: mpsc::Sender<EngineEvent>,
    pub(super) info: watch::Sender<RuntimeInfo>,
    pub(super) board: Arc<Board>,
}

/// Which pod a container or sandbox belongs to.
pub(super) type Index = Mutex<HashMap<String, String>>;

struct Worker {
    name: PodName,
    orders: watch::Sender<Orders>,
    references: HashSet<Reference>,
    task: tokio::task::JoinHandle<()>,
}

struct Owner {
    shared: Arc<Shared>,
    records: HashMap<String, Vec<RestartRecord>>,
    workers: HashMap<String, Worker>,
    /// Pods whose name is still held by a pod with another UID.
    waiting: Vec<Arc<Pod>>,
    /// What the last list had, by pod.
    listed: Option<HashMap<String, PodListing>>,
    /// Whether the runtime answered the last time.
    answers: bool,
    /// Whether the list of pods is complete, so that what is unknown may be removed.
    trusted: bool,
    /// UIDs of pods that may be removed before that, because somebody has deleted them.
    deleted: HashSet<String>,
    resetting: Option<oneshot::Sender<Result<(), ResetError>>>,
    /// What rules of the node let run at most.
    limits: Vec<Limit>,
    done: mpsc::Sender<PodName>,
}

/// What one pod has in the runtime, as far as a list tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct PodListing {
    namespace: String,
    name: String,
    grace_seconds: i64,
    /// State by id of sandbox or container.
    states: BTreeMap<String, i32>,
}

/// Runs until the engine's front is dropped.
pub(super) async fn run(start: Start) {
    let Start { config, objects, restarts, runtime, mut inbox, events, info, board } = start;
    let mut records: HashMap<String, Vec<RestartRecord>> = HashMap::new();
    for record in restarts.load() {
        records.entry(record.pod_uid.clone()).or_default().push(record);
    }
    let taken_over = restarts.taken_over();
    let (done, mut finished) = mpsc::channel(64);
    let rotation = LogRotation::new(&config);
    let checker = AbortOnDrop(tokio::spawn(check_runtime(runtime.clone(), info.clone())));
    let (exits_in, mut exits) = mpsc::channel(EXITS_MAX);
    let (hearing_in, mut hearing) = watch::channel(false);
    let listener = AbortOnDrop(tokio::spawn(listen(runtime.clone(), exits_in, hearing_in)));
    let index = Arc::new(Index::default());
    let shared = Arc::new(Shared {
        config,
        objects,
        restarts,
        runtime,
        events,
        info: info.subscribe(),
        board: board.clone(),
        index,
        taken_over,
    });
    let mut owner = Owner {
        shared: shared.clone(),
        records,
        workers: HashMap::new(),
        waiting: Vec::new(),
        listed: None,
        answers: true,
        trusted: false,
        deleted: HashSet::new(),
        resetting: None,
        limits: Vec::new(),
        done,
    };

    let mut next_list = Instant::now();
    let mut log_tick = tokio::time::interval(LOG_INTERVAL);
    log_tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            command = inbox.recv() => match command {
                Some(command) => {
                    let list = owner.handle_command(command).await;
                    if list {
                        next_list = Instant::now();
                    }
                }
                None => break,
            },
            Some(name) = finished.recv() => owner.handle_finished(&name),
            Some(id) = exits.recv() => owner.handle_exit(&id),
            Ok(()) = hearing.changed() => next_list = Instant::now(),
            () = tokio::time::sleep_until(next_list) => {
                let answered = owner.list().await;
                let calm = answered && *hearing.borrow_and_update();
                next_list = Instant::now() + if calm { LIST_INTERVAL } else { LIST_INTERVAL_DEAF };
            }
            _ = log_tick.tick() => rotation.run(&shared.runtime, &board).await,
        }
    }
    drop((checker, listener));
    for worker in owner.workers.values() {
        worker.task.abort();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // The loop is aborted when the front is dropped; workers must not outlive it.
        for worker in self.workers.values() {
            worker.task.abort();
        }
    }
}

/// Older pods go first; the name decides between those of one second.
fn age(pod: &Pod) -> (Option<i64>, Option<&str>) {
    let metadata = &pod.metadata;
    let at = metadata.creation_timestamp.as_ref().map(|at| at.0.as_second());
    (at, metadata.name.as_deref())
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Owner {
    /// Returns whether the runtime should be listed at once.
    async fn handle_command(&mut self, command: Command) -> bool {
        match command {
            Command::SetPods(pods) => {
                // Adoption needs the runtime's list before the first worker starts.
                if self.listed.is_none() {
                    self.list().await;
                }
                let wanted: HashSet<String> =
                    pods.iter().filter_map(|pod| pod.metadata.uid.clone()).collect();
                let unwanted: Vec<String> =
                    self.workers.keys().filter(|uid| !wanted.contains(*uid)).cloned().collect();
                for uid in unwanted {
                    self.order(&uid, |orders| orders.gone = true);
                }
                self.waiting.clear();
                for pod in pods {
                    self.upsert(pod);
                }
                self.trusted = true;
                self.deleted.clear();
                self.remove_orphans();
                self.listed.is_none()
            }
            Command::Resume { pods, deleted } => {
                if self.listed.is_none() {
                    self.list().await;
                }
                let wanted: HashSet<&String> =
                    pods.iter().filter_map(|pod| pod.metadata.uid.as_ref()).collect();
                self.deleted = deleted.into_iter().filter(|uid| !wanted.contains(uid)).collect();
                // First, so that a successor of the same name waits for them.
                self.remove_orphans();
                for pod in pods {
                    self.upsert(pod);
                }
                self.listed.is_none()
            }
            Command::Upsert(pod) => {
                if self.listed.is_none() {
                    self.list().await;
                }
                self.upsert(pod);
                false
            }
            Command::Remove { namespace, name, uid } => {
                self.waiting.retain(|pod| pod.metadata.uid.as_deref() != Some(&uid));
                if self.workers.contains_key(&uid) {
                    self.order(&uid, |orders| orders.gone = true);
                } else if !self.stop_listed(&uid, false) {
                    let gone = PodGone { namespace, name, uid };
                    let _ = self.shared.events.send(EngineEvent::Gone(gone)).await;
                }
                false
            }
            Command::ObjectsChanged { kind, namespace, name } => {
                let reference = match kind {
                    ObjectKind::ConfigMap => Reference::ConfigMap(name),
                    ObjectKind::Secret => Reference::Secret(name),
                };
                for worker in self.workers.values() {
                    if worker.name.namespace == namespace && worker.references.contains(&reference)
                    {
                        worker.orders.send_modify(|orders| orders.object_changes += 1);
                    }
                }
                false
            }
            Command::LinkUp => {
                for worker in self.workers.values() {
                    worker.orders.send_modify(|orders| orders.link_ups += 1);
                }
                false
            }
            Command::SetLimits(limits) => {
                self.limits = limits;
                self.hold();
                false
            }
            Command::Reset { done } => {
                self.reset(done).await;
                false
            }
        }
    }

    fn upsert(&mut self, pod: Arc<Pod>) {
        let Some(name) = PodName::of(&pod) else { return };
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        if node.is_some_and(|node| !node.is_empty() && node != self.shared.config.node_name) {
            return;
        }
        if kubelet::is_mirror(&pod) {
            tracing::debug!(pod = %name.full(), "not run: it stands for a pod from a file");
            return;
        }
        let stopping =
            self.workers.get(&name.uid).is_some_and(|worker| worker.orders.borrow().gone);
        if let Some(worker) = self.workers.get_mut(&name.uid).filter(|_| !stopping) {
            worker.references = volumes::references(&pod).into_iter().collect();
            worker.orders.send_if_modified(|orders| {
                let same = orders.pod == pod;
                orders.pod = pod;
                !same
            });
            return;
        }
        let held = self
            .workers
            .values()
            .any(|worker| worker.name.namespace == name.namespace && worker.name.name == name.name);
        if held {
            self.waiting.retain(|pod| pod.metadata.uid.as_deref() != Some(&name.uid));
            self.waiting.push(pod);
            return;
        }
        let mut orders = Orders::new(pod);
        // Before its first step, so that a pod that may not run never begins.
        let older = |limit: &Limit| self.running_of(limit, &orders.pod);
        let limits = self.limits.iter().filter(|limit| limit.is_of(&name.namespace, &name.name));
        orders.held = limits.into_iter().any(|limit| older(limit) >= limit.replicas as usize);
        self.spawn(name, orders, true);
    }

    /// How many pods of a workload go before this one.
    fn running_of(&self, limit: &Limit, pod: &Pod) -> usize {
        let workers = self.workers.values();
        let same = workers.filter(|worker| limit.is_of(&worker.name.namespace, &worker.name.name));
        same.filter(|worker| {
            let orders = worker.orders.borrow();
            !orders.gone && age(&orders.pod) < age(pod)
        })
        .count()
    }

    /// Tells every pod whether it may run.
    fn hold(&self) {
        for worker in self.workers.values() {
            let pod = worker.orders.borrow().pod.clone();
            let PodName { namespace, name, .. } = &worker.name;
            let mut limits = self.limits.iter().filter(|limit| limit.is_of(namespace, name));
            let held = limits.any(|limit| self.running_of(limit, &pod) >= limit.replicas as usize);
            worker
                .orders
                .send_if_modified(|orders| std::mem::replace(&mut orders.held, held) != held);
        }
    }

    fn spawn(&mut self, name: PodName, orders: Orders, announce: bool) {
        let references = volumes::references(&orders.pod).into_iter().collect();
        let in_runtime = match &self.listed {
            Some(listed) => listed.contains_key(&name.uid),
            // Nobody knows: the worker has to look before it acts.
            None => true,
        };
        let records = self.records.remove(&name.uid).unwrap_or_default();
        let (orders, inbox) = watch::channel(orders);
        let start = worker::Start {
            shared: self.shared.clone(),
            name: name.clone(),
            orders: inbox,
            in_runtime,
            announce,
            records,
            done: self.done.clone(),
        };
        let task = tokio::spawn(worker::run(start));
        let uid = name.uid.clone();
        self.workers.insert(uid, Worker { name, orders, references, task });
    }

    fn order(&self, uid: &str, change: impl FnOnce(&mut Orders)) {
        if let Some(worker) = self.workers.get(uid) {
            worker.orders.send_modify(change);
        }
    }

    fn handle_finished(&mut self, name: &PodName) {
        self.workers.remove(&name.uid);
        if !self.limits.is_empty() {
            self.hold(); // another one may take its place
        }
        if let Some(listed) = &mut self.listed {
            listed.remove(&name.uid);
        }
        self.shared.index.lock().expect("index lock").retain(|_, uid| *uid != name.uid);
        let same_name = |pod: &Arc<Pod>| {
            pod.metadata.namespace.as_ref() == Some(&name.namespace)
                && pod.metadata.name.as_ref() == Some(&name.name)
        };
        if self.resetting.is_none()
            && let Some(at) = self.waiting.iter().position(same_name)
        {
            let pod = self.waiting.remove(at);
            self.upsert(pod);
        }
        if self.workers.is_empty()
            && let Some(done) = self.resetting.take()
        {
            worker::remove_cgroup_root(&self.shared.config.cgroup_root);
            let _ = done.send(Ok(()));
        }
    }

    fn handle_exit(&self, id: &str) {
        let uid = self.shared.index.lock().expect("index lock").get(id).cloned();
        if let Some(uid) = uid {
            self.order(&uid, |orders| orders.exits += 1);
        }
    }

    /// Compares what the runtime has with the list before; returns whether it answered.
    async fn list(&mut self) -> bool {
        let found = match tokio::time::timeout(LIST_TIMEOUT, list_pods(&self.shared.runtime)).await
        {
            Ok(Ok(found)) => found,
            failure => {
                tracing::debug!(?failure, "could not list containers");
                self.answers = false;
                return false;
            }
        };
        let back = !std::mem::replace(&mut self.answers, true);
        let before = self.listed.replace(found.clone()).unwrap_or_default();
        {
            let mut index = self.shared.index.lock().expect("index lock");
            for (uid, listing) in &found {
                for id in listing.states.keys() {
                    index.insert(id.clone(), uid.clone());
                }
            }
        }
        for uid in self.workers.keys() {
            // After a silence every worker looks for itself: it may be waiting to try again.
            if back || found.get(uid) != before.get(uid) {
                self.order(uid, |orders| orders.listings += 1);
            }
        }
        self.remove_orphans();
        true
    }

    /// Starts to stop what belongs to no pod; before the list of pods is trusted, only what is known to be deleted.
    fn remove_orphans(&mut self) {
        let listed = self.listed.iter().flat_map(HashMap::keys);
        let waiting =
            |uid: &str| self.waiting.iter().any(|pod| pod.metadata.uid.as_deref() == Some(uid));
        let orphans: Vec<String> = listed
            .filter(|uid| self.trusted || self.deleted.contains(*uid))
            .filter(|uid| !self.workers.contains_key(*uid) && !waiting(uid))
            .cloned()
            .collect();
        for uid in orphans {
            self.stop_listed(&uid, true);
        }
    }

    /// Stops a pod that is only known from the runtime's labels. Returns whether there is one.
    fn stop_listed(&mut self, uid: &str, orphan: bool) -> bool {
        let Some(listing) = self.listed.as_ref().and_then(|listed| listed.get(uid)) else {
            return false;
        };
        let name = PodName {
            namespace: listing.namespace.clone(),
            name: listing.name.clone(),
            uid: uid.to_owned(),
        };
        if orphan {
            tracing::info!(pod = %name.full(), "stopping a pod that is not in the list of pods");
        }
        let pod = Pod {
            metadata: ObjectMeta {
                namespace: Some(name.namespace.clone()),
                name: Some(name.name.clone()),
                uid: Some(name.uid.clone()),
                ..Default::default()
            },
            spec: Some(PodSpec {
                termination_grace_period_seconds: Some(listing.grace_seconds),
                ..Default::default()
            }),
            status: None,
        };
        let mut orders = Orders::new(Arc::new(pod));
        orders.gone = true;
        self.spawn(name, orders, !orphan);
        true
    }

    async fn reset(&mut self, done: oneshot::Sender<Result<(), ResetError>>) {
        match list_pods(&self.shared.runtime).await {
            Ok(found) => self.listed = Some(found),
            Err(source) => {
                let _ = done.send(Err(ResetError::List { source }));
                return;
            }
        }
        self.waiting.clear();
        for worker in self.workers.values() {
            worker.orders.send_modify(|orders| orders.gone = true);
        }
        let listed: Vec<String> = self.listed.iter().flat_map(HashMap::keys).cloned().collect();
        for uid in listed {
            if !self.workers.contains_key(&uid) {
                self.stop_listed(&uid, true);
            }
        }
        if self.workers.is_empty() {
            worker::remove_cgroup_root(&self.shared.config.cgroup_root);
            let _ = done.send(Ok(()));
        } else {
            self.resetting = Some(done);
        }
    }
}

async fn list_pods(runtime: &Runtime) -> Result<HashMap<String, PodListing>, CriError> {
    let (sandboxes, containers) =
        tokio::try_join!(runtime.list_sandboxes(&[]), runtime.list_containers(&[]))?;
    let mut found: HashMap<String, PodListing> = HashMap::new();
    let mut foreign = HashSet::new();
    for v1::PodSandbox { id, state, labels, annotations, .. } in sandboxes {
        // Kubelet's pods from files are not the cluster's to stop, and we do not run them.
        if kubelet::is_static(&annotations) {
            foreign.extend(labels.get(worker::LABEL_POD_UID).cloned());
            continue;
        }
        add(&mut found, id, state, &labels, &annotations);
    }
    for v1::Container { id, state, labels, annotations, .. } in containers {
        // Container states follow the two of sandboxes, so that no number means two things.
        add(&mut found, id, state + 2, &labels, &annotations);
    }
    found.retain(|uid, _| !foreign.contains(uid));
    Ok(found)
}

fn add(
    found: &mut HashMap<String, PodListing>,
    id: String,
    state: i32,
    labels: &BTreeMap<String, String>,
    annotations: &BTreeMap<String, String>,
) {
    let Some(uid) = labels.get(worker::LABEL_POD_UID) else { return };
    let text = |key: &str| labels.get(key).cloned().unwrap_or_default();
    let entry = found.entry(uid.clone()).or_insert_with(|| PodListing {
        namespace: text(worker::LABEL_POD_NAMESPACE),
        name: text(worker::LABEL_POD_NAME),
        grace_seconds: 30,
        states: BTreeMap::new(),
    });
    let grace = annotations.get(kubelet::ANNOTATION_GRACE).and_then(|text| text.parse().ok());
    entry.grace_seconds = grace.unwrap_or(entry.grace_seconds);
    entry.states.insert(id, state);
}

/// Keeps `info` up to date.
async fn check_runtime(runtime: Runtime, info: watch::Sender<RuntimeInfo>) {
    let mut version = String::new();
    loop {
        let mut found = RuntimeInfo { version: version.clone(), ..Default::default() };
        match runtime.status().await {
            Ok(conditions) => {
                let condition = |kind: &str| conditions.iter().find(|one| one.r#type == kind);
                found.ready = condition("RuntimeReady").is_some_and(|one| one.status);
                let network = condition("NetworkReady");
                found.network_ready = network.is_some_and(|one| one.status);
                if !found.ready {
                    found.message = "container runtime is down".to_owned();
                } else if let Some(one) = network.filter(|one| !one.status) {
                    found.message = format!(
                        "container runtime network not ready: NetworkReady=false reason:{} \
                         message:{}",
                        one.reason, one.message
                    );
                }
                if version.is_empty()
                    && let Ok(answer) = runtime.version().await
                {
                    version = format!("{}://{}", answer.runtime_name, answer.runtime_version);
                    found.version.clone_from(&version);
                }
            }
            Err(error) => {
                // It may be another version when it comes back.
                version.clear();
                tracing::debug!(error = %error, "the container runtime does not answer");
                found.message = "container runtime is down".to_owned();
            }
        }
        let well = found.ready && found.network_ready;
        info.send_if_modified(|old| {
            let changed = *old != found;
            *old = found;
            changed
        });
        let pause = if well { CHECK_INTERVAL } else { CHECK_INTERVAL / 10 };
        tokio::time::sleep(pause).await;
    }
}

/// Passes the runtime's exits on, and says whether it hears any.
async fn listen(runtime: Runtime, exits: mpsc::Sender<String>, hearing: watch::Sender<bool>) {
    loop {
        let stream: Result<Exits, CriError> = runtime.exits().await;
        if let Ok(mut stream) = stream {
            hearing.send_replace(true);
            while let Some(id) = stream.next().await {
                if exits.try_send(id).is_err() {
                    // Full: the list that follows the flag finds what was dropped.
                    break;
                }
            }
            hearing.send_replace(false);
        }
        tokio::time::sleep(LIST_INTERVAL_DEAF).await;
    }
}
