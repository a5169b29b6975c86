//! The controllers that a bare API needs: scheduler, workloads, node lifecycle, endpoints, pod collection.
//!
//! [`run`] watches each kind once and keeps a slim cache of it; every change is turned into keys for the controllers
//! that care, and each controller works its keys off: it reads what it is about to change from the API (which is in
//! this process, so that a list costs well under a millisecond and nothing is made twice from a stale view), asks its
//! planner in `skerry_apiserver_core::workloads`, and executes the steps. A conflict is no error: the key comes again.
//!
//! Nothing here decides anything; deciding is in the planners. Namespaces, owner references, service accounts and
//! the expiry of events are the API server's own upkeep.

mod cache;
mod cluster;
mod cron_job;
mod daemon_set;
mod deployment;
mod endpoints;
mod events;
mod job;
mod node;
mod pod_gc;
mod queue;
mod replica_set;
mod scheduler;

use cache::{Caches, Change, Key, Kind, slim};
use cluster::{Cluster, ClusterError};
use events::Recorder;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use kube::Api;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::{WatchStreamExt, watcher};
use queue::Queue;
use skerry_apiserver_core::workloads::node_health::GRACE_SECONDS;
use skerry_apiserver_core::workloads::pod_gc::QUARANTINE_SECONDS;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Name under which the fields written here are owned.
const MANAGER: &str = "kube-controller-manager";
/// Requests of one sync that are under way together. The store commits them in groups.
const REQUESTS_MAX: usize = 8;
/// Every object is looked at once in this time even if nothing happens, in case something was missed.
const RESYNC: Duration = Duration::from_secs(600);

/// The times that an installation may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Time without a beat after which a node is unreachable, in seconds. Default 40: four missed beats.
    pub node_grace_seconds: i64,
    /// Time that a node has to be gone before its pods go, in seconds. Default 40.
    pub quarantine_seconds: i64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { node_grace_seconds: GRACE_SECONDS, quarantine_seconds: QUARANTINE_SECONDS }
    }
}

/// What all controllers share.
#[derive(Clone)]
struct World {
    settings: Settings,
    cluster: Cluster,
    caches: Arc<Caches>,
    recorder: Recorder,
}

/// One controller: which keys a change concerns, and what to do about a key.
trait Controller: Send + Sync + 'static {
    /// For logs.
    const NAME: &'static str;
    /// Keys worked on at the same time.
    const WORKERS: usize;
    /// The kind that the keys name; all of them are looked at from time to time. `None` for a controller with the one
    /// key [`whole`].
    const KIND: Option<Kind>;

    /// The keys to look at after a change.
    fn keys(&self, change: &Change<'_>) -> Vec<Key>;

    /// Looks at one key, and says when to look again without a change.
    fn sync(
        &self,
        key: &Key,
    ) -> impl Future<Output = Result<Option<Duration>, ClusterError>> + Send;
}

/// The key of a controller that looks at everything together.
fn whole() -> Key {
    Key::new("", "*")
}

/// A controller as the watches see it.
trait Route: Send + Sync {
    fn route(&self, change: &Change<'_>);
    fn resync(&self);
    fn start(&self, tasks: &mut JoinSet<()>);
}

struct Running<C> {
    controller: Arc<C>,
    queue: Arc<Queue>,
    caches: Arc<Caches>,
}

impl<C: Controller> Route for Running<C> {
    fn route(&self, change: &Change<'_>) {
        for key in self.controller.keys(change) {
            self.queue.add(key);
        }
    }

    fn resync(&self) {
        match C::KIND {
            Some(kind) => self.caches.keys(kind).into_iter().for_each(|key| self.queue.add(key)),
            None => self.queue.add(whole()),
        }
    }

    fn start(&self, tasks: &mut JoinSet<()>) {
        self.resync();
        for _ in 0..C::WORKERS {
            tasks.spawn(work(self.controller.clone(), self.queue.clone()));
        }
    }
}

async fn work<C: Controller>(controller: Arc<C>, queue: Arc<Queue>) {
    loop {
        let key = queue.next().await;
        match controller.sync(&key).await {
            Ok(again) => {
                queue.done(key.clone(), false);
                if let Some(delay) = again {
                    queue.add_after(key, delay);
                }
            }
            Err(error) => {
                let conflict = error.is_conflict();
                let text = error.text();
                let shown = key.to_string();
                let retry_in = queue.done(key, true).unwrap_or_default();
                if conflict {
                    tracing::debug!(controller = C::NAME, key = shown, "conflict, looking again");
                } else {
                    tracing::warn!(controller = C::NAME, key = shown, ?retry_in, "{error}: {text}");
                }
            }
        }
    }
}

/// Runs all controllers against `client` until `stop`.
///
/// Returns when `stop` is cancelled; requests under way are dropped, which every controller survives because it starts
/// from what is stored.
pub async fn run(client: kube::Client, stop: CancellationToken) {
    run_with(client, Settings::default(), stop).await;
}

/// [`run`] with other times.
pub async fn run_with(client: kube::Client, settings: Settings, stop: CancellationToken) {
    let cluster = Cluster::new(client, MANAGER);
    let (recorder, writer) = Recorder::new(cluster.clone());
    let world = World { settings, cluster, caches: Arc::new(Caches::default()), recorder };
    let controllers: Vec<Box<dyn Route>> = vec![
        routed(&world, scheduler::Scheduler::new(&world)),
        routed(&world, replica_set::ReplicaSets::new(&world)),
        routed(&world, deployment::Deployments::new(&world)),
        routed(&world, node::Nodes::new(&world)),
        routed(&world, job::Jobs::new(&world)),
        routed(&world, cron_job::CronJobs::new(&world)),
        routed(&world, daemon_set::DaemonSets::new(&world)),
        routed(&world, endpoints::Endpoints::new(&world)),
        routed(&world, pod_gc::PodGc::new(&world)),
    ];

    let mut tasks = JoinSet::new();
    tasks.spawn(writer);
    let mut watches = stream::select_all(Kind::ALL.map(|kind| watch(world.cluster.client(), kind)));
    let mut intake = Intake::new(&world.caches);
    let mut resync = tokio::time::interval_at(tokio::time::Instant::now() + RESYNC, RESYNC);
    let mut started = false;
    loop {
        let (kind, event) = tokio::select! {
            () = stop.cancelled() => {
                // Nothing may be under way when the store closes.
                tasks.shutdown().await;
                return;
            }
            _ = resync.tick() => {
                controllers.iter().for_each(|controller| controller.resync());
                continue;
            }
            event = watches.next() => match event {
                Some(event) => event,
                None => return,
            },
        };
        match event {
            Ok(event) => intake.take(kind, event, &controllers),
            Err(error) => {
                // The watch goes on by itself, after a pause.
                tracing::warn!(kind = kind.resource().kind, "watch interrupted: {error}");
            }
        }
        if !started && intake.is_complete() {
            started = true;
            controllers.iter().for_each(|controller| controller.start(&mut tasks));
            tracing::info!("controllers started");
        }
    }
}

/// Carries requests out, [`REQUESTS_MAX`] at a time, and returns their answers in no order.
///
/// A vector, because a lazy iterator of borrowing futures cannot be held over an await in a future that has to be Send.
async fn together<F: Future>(requests: Vec<F>) -> Vec<F::Output> {
    stream::iter(requests).buffer_unordered(REQUESTS_MAX).collect().await
}

fn routed<C: Controller>(world: &World, controller: C) -> Box<dyn Route> {
    Box::new(Running {
        controller: Arc::new(controller),
        queue: Arc::new(Queue::default()),
        caches: world.caches.clone(),
    })
}

type Watched = (Kind, Result<watcher::Event<DynamicObject>, watcher::Error>);

fn watch(client: &kube::Client, kind: Kind) -> BoxStream<'static, Watched> {
    let resource = kind.resource();
    let gvk = GroupVersionKind::gvk(resource.group, resource.version, resource.kind);
    let resource = ApiResource::from_gvk_with_plural(&gvk, resource.plural);
    let api: Api<DynamicObject> = match kind.namespace() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    watcher_of(api).map(move |event| (kind, event)).boxed()
}

fn watcher_of(
    api: Api<DynamicObject>,
) -> impl futures::Stream<Item = Result<watcher::Event<DynamicObject>, watcher::Error>> + Send + 'static
{
    // The type of a dynamic object lives in the Api, which the watcher takes by value.
    watcher::watcher(api, watcher::Config::default()).default_backoff()
}

/// Turns watch events into cache contents and changes.
struct Intake {
    caches: Arc<Caches>,
    /// Objects seen since the restart of a kind's watch.
    listed: [Option<HashSet<Key>>; Kind::ALL.len()],
    complete: [bool; Kind::ALL.len()],
}

impl Intake {
    fn new(caches: &Arc<Caches>) -> Self {
        Self {
            caches: caches.clone(),
            listed: Default::default(),
            complete: [false; Kind::ALL.len()],
        }
    }

    /// Whether every kind has been listed once.
    fn is_complete(&self) -> bool {
        self.complete.iter().all(|complete| *complete)
    }

    fn take(&mut self, kind: Kind, event: watcher::Event<DynamicObject>, to: &[Box<dyn Route>]) {
        match event {
            watcher::Event::Apply(object) => {
                self.put(kind, object, to);
            }
            watcher::Event::Delete(object) => self.remove(kind, &Key::of(&slim(kind, object)), to),
            watcher::Event::Init => self.listed[kind as usize] = Some(HashSet::new()),
            watcher::Event::InitApply(object) => {
                let key = self.put(kind, object, to);
                if let Some(listed) = &mut self.listed[kind as usize] {
                    listed.insert(key);
                }
            }
            watcher::Event::InitDone => {
                let listed = self.listed[kind as usize].take().unwrap_or_default();
                for key in self.caches.keys(kind) {
                    if !listed.contains(&key) {
                        self.remove(kind, &key, to);
                    }
                }
                self.complete[kind as usize] = true;
            }
        }
    }

    fn put(&self, kind: Kind, object: DynamicObject, to: &[Box<dyn Route>]) -> Key {
        let new = Arc::new(slim(kind, object));
        let key = Key::of(&new);
        let old = self.caches.put(kind, new.clone());
        let change = Change { kind, old: old.as_deref(), new: Some(&new) };
        to.iter().for_each(|controller| controller.route(&change));
        key
    }

    fn remove(&self, kind: Kind, key: &Key, to: &[Box<dyn Route>]) {
        if let Some(old) = self.caches.remove(kind, key) {
            let change = Change { kind, old: Some(&old), new: None };
            to.iter().for_each(|controller| controller.route(&change));
        }
    }
}
