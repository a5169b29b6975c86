//! Node jobs on this node: images are fetched through the container runtime, the configuration is changed.
//!
//! `skerry_edge_core::jobs` reads the orders and words the reports. Each job is a task of its own beside the agent's
//! loop, which hands orders in by [`Jobs::take`] and reads [`Done`]s; reports go through its outbox.
//!
//! A change of the configuration is proven before it is told as done: the old file is kept, the new one is checked and
//! put in its place, EdgeCore starts again with it (the same process, by `exec`; containers run on), and only a link to
//! the hub counts as success. Without one within [`TRIAL`], or when the start fails, the old file comes back and the
//! job is told as failed and rolled back. What is under way is kept in `config-update.json` in EdgeCore's directory.
//!
//! Data for the event and service bus is answered with an error: there are none yet.

use crate::config::Config;
use crate::cri::{self, Runtime, v1};
use crate::kubeedge;
use crate::node;
use crate::objects::{Found, LookupRequest};
use base64::Engine as _;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use skerry_edge_core::jobs::{self, Images, Order, Report, Work};
use skerry_edge_core::outbox::REMOVE_DELAY;
use skerry_edge_core::pods::image::{Keyring, with_tag};
use skerry_protocol::job::{ImageStatus, Kind};
use skerry_protocol::{Message, Operation, ResourcePath};
use std::collections::{BTreeMap, HashSet};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Jobs at the same time; one more is told to come later.
const JOBS_MAX: usize = 8;
/// Reports that wait for the agent; jobs wait when it is full.
const DONE_MAX: usize = 32;
/// Pause before a failed image is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How long a new configuration has to find the hub.
pub const TRIAL: Duration = Duration::from_secs(120);
/// Pause before EdgeCore starts again: reports get out, and the outbox forgets them on the disk as well. A cloud of
/// KubeEdge that was told one again would take the job for begun anew.
const RESTART_PAUSE: Duration = REMOVE_DELAY.saturating_add(Duration::from_secs(1));
/// How long the use of the CPU is measured.
const CPU_WINDOW: Duration = Duration::from_millis(200);
/// What is under way, in EdgeCore's directory.
const TRIAL_FILE: &str = "config-update.json";
/// The configuration before the change.
const BACKUP_FILE: &str = "config-before-update.yaml";

/// What the agent has to do.
pub(crate) enum Done {
    /// To be told to the cloud.
    Report(Report),
    /// A job has ended.
    Ended(Kind, String),
    /// EdgeCore has to start again with what is in its file.
    Restart,
}

/// The jobs of this node.
pub(crate) struct Jobs {
    config: Arc<Config>,
    lookups: mpsc::Sender<LookupRequest>,
    done: mpsc::Sender<Done>,
    running: HashSet<(Kind, String)>,
    trial: Option<tokio::task::AbortHandle>,
}

impl Jobs {
    /// Takes up a change of the configuration that was under way when EdgeCore started.
    pub(crate) fn start(
        config: Arc<Config>,
        lookups: mpsc::Sender<LookupRequest>,
    ) -> (Self, mpsc::Receiver<Done>) {
        Self::start_with(config, lookups, TRIAL)
    }

    fn start_with(
        config: Arc<Config>,
        lookups: mpsc::Sender<LookupRequest>,
        trial_time: Duration,
    ) -> (Self, mpsc::Receiver<Done>) {
        let (done, from_jobs) = mpsc::channel(DONE_MAX);
        let mut jobs = Self { config, lookups, done, running: HashSet::new(), trial: None };
        match Trial::read(&jobs.config.dir) {
            None => {}
            Some(trial) if trial.undone.is_some() => {
                tokio::spawn(told_undone(jobs.config.clone(), trial, jobs.done.clone()));
            }
            Some(trial) => {
                tracing::info!(
                    job = trial.job,
                    "the new configuration is on trial until the hub is reached"
                );
                let task =
                    tokio::spawn(end_trial(jobs.config.clone(), jobs.done.clone(), trial_time));
                jobs.trial = Some(task.abort_handle());
            }
        }
        (jobs, from_jobs)
    }

    /// Takes what the agent does not use itself. Returns an answer to send, if there is one.
    pub(crate) fn take(&mut self, message: &Message) -> Option<Message> {
        let route = &message.route;
        match route.group.as_str() {
            skerry_protocol::job::MODULE | skerry_protocol::job::OLD_UPGRADES => {
                match Order::read(message, &self.config.node_name) {
                    Ok(order) => self.begin(order),
                    Err(reason) => {
                        tracing::warn!(resource = route.resource, reason, "of no use here");
                    }
                }
                None
            }
            skerry_protocol::bus::GROUP => {
                Some(jobs::refuse_data(Timestamp::now().as_millisecond(), message))
            }
            _ => {
                tracing::debug!(
                    group = route.group,
                    resource = route.resource,
                    "nobody here takes this yet"
                );
                None
            }
        }
    }

    /// The hub is reached: a configuration on trial is proven.
    pub(crate) fn handle_connected(&mut self) {
        let Some(trial) = self.trial.take() else { return };
        trial.abort();
        if let Some(trial) = Trial::read(&self.config.dir) {
            tokio::spawn(told_proven(self.config.clone(), trial, self.done.clone()));
        }
    }

    /// A job has ended and may be ordered again.
    pub(crate) fn handle_ended(&mut self, kind: Kind, job: String) {
        self.running.remove(&(kind, job));
    }

    fn begin(&mut self, order: Order) {
        let key = (order.kind, order.job.clone());
        if self.running.contains(&key) {
            return; // told again by a cloud that does not know whether it was heard
        }
        let worker = Worker {
            config: self.config.clone(),
            lookups: self.lookups.clone(),
            done: self.done.clone(),
            order,
        };
        let is_busy = self.running.len() >= JOBS_MAX;
        let is_on_trial = self.trial.is_some() && worker.order.kind == Kind::ConfigUpdate;
        self.running.insert(key);
        tokio::spawn(async move {
            tracing::info!(
                job = worker.order.job,
                kind = worker.order.kind.token(),
                "a node job begins"
            );
            match (is_busy, is_on_trial) {
                (true, _) => {
                    worker.refuse(format!("{JOBS_MAX} jobs are at work on this node already")).await
                }
                (_, true) => {
                    worker.refuse("another change of the configuration is on trial".into()).await
                }
                _ => worker.run().await,
            }
            let _ =
                worker.done.send(Done::Ended(worker.order.kind, worker.order.job.clone())).await;
        });
    }
}

/// One job at work.
struct Worker {
    config: Arc<Config>,
    lookups: mpsc::Sender<LookupRequest>,
    done: mpsc::Sender<Done>,
    order: Order,
}

impl Worker {
    async fn run(&self) {
        match &self.order.work {
            Work::Refuse(action, reason) => self.report(*action, &Err(reason.clone()), &[]).await,
            Work::Begin => self.report(Operation::JobCheck, &Ok(()), &[]).await,
            Work::Check(items) => {
                let checked = check(&self.config, items).await;
                self.report(Operation::JobCheck, &checked, &[]).await;
            }
            Work::Images(images) => {
                if !self.order.is_older() {
                    let checked = check(&self.config, &images.checks).await;
                    self.report(Operation::JobCheck, &checked, &[]).await;
                    if checked.is_err() {
                        return;
                    }
                }
                let (fetched, images) = self.fetch(images).await;
                self.report(Operation::JobPull, &fetched, &images).await;
            }
            Work::Configure(fields) => self.configure(fields).await,
        }
    }

    async fn refuse(&self, reason: String) {
        let action = match self.order.work {
            Work::Images(_) if self.order.is_older() => Operation::JobPull,
            _ => Operation::JobCheck,
        };
        self.report(action, &Err(reason), &[]).await;
    }

    async fn report(&self, action: Operation, went: &Result<(), String>, images: &[ImageStatus]) {
        report(&self.config, &self.order, &self.done, action, went, images).await;
    }

    async fn fetch(&self, images: &Images) -> (Result<(), String>, Vec<ImageStatus>) {
        let keyring = match &images.secret {
            None => Ok(Keyring::default()),
            Some((namespace, name)) => self.keyring(namespace, name).await,
        };
        let keyring = match keyring {
            Ok(keyring) => keyring,
            Err(reason) => return (Err(reason), Vec::new()),
        };
        let runtime = Runtime::new(&self.config.runtime_socket);
        let mut statuses = Vec::with_capacity(images.names.len());
        let mut failed = 0_usize;
        for image in &images.names {
            let mut fetched = fetch_one(&runtime, image, &keyring).await;
            for _ in 0..images.retries {
                if fetched.is_ok() {
                    break;
                }
                tokio::time::sleep(RETRY_PAUSE).await;
                fetched = fetch_one(&runtime, image, &keyring).await;
            }
            failed += usize::from(fetched.is_err());
            let (status, reason) = match fetched {
                Ok(()) => ("True", String::new()),
                Err(reason) => ("False", reason),
            };
            tracing::info!(job = self.order.job, image, status, reason, "an image of a node job");
            statuses.push(ImageStatus { image: image.clone(), status: status.into(), reason });
        }
        let all = statuses.len();
        let fetched = match failed {
            0 => Ok(()),
            failed => Err(format!("{failed} of {all} images could not be fetched")),
        };
        (fetched, statuses)
    }

    /// The credentials in a Secret that the cloud has.
    async fn keyring(&self, namespace: &str, name: &str) -> Result<Keyring, String> {
        let path =
            ResourcePath::new(namespace, "secret", name).map_err(|error| error.to_string())?;
        let found = self.look_up(path).await;
        let secret = found
            .map_err(|reason| format!("secret `{namespace}/{name}`: {reason}"))?
            .ok_or_else(|| format!("there is no secret `{namespace}/{name}`"))?;
        let text = |key: &str| {
            let text = secret["data"][key].as_str()?;
            base64::engine::general_purpose::STANDARD.decode(text).ok()
        };
        let mut keyring = Keyring::default();
        let added = match (text(".dockerconfigjson"), text(".dockercfg")) {
            (Some(bytes), _) => keyring.add_docker_config_json(&bytes),
            (None, Some(bytes)) => keyring.add_docker_cfg(&bytes),
            (None, None) => {
                return Err(format!(
                    "secret `{namespace}/{name}` holds no credentials of a registry"
                ));
            }
        };
        added.map_err(|error| format!("secret `{namespace}/{name}`: {error}"))?;
        Ok(keyring)
    }

    async fn look_up(&self, path: ResourcePath) -> Found {
        let (answer, found) = oneshot::channel();
        let stopped = || "the agent is stopping".to_owned();
        let request = LookupRequest { path, content: Value::Null, answer };
        self.lookups.send(request).await.map_err(|_| stopped())?;
        found.await.unwrap_or_else(|_| Err(stopped()))
    }

    async fn configure(&self, fields: &BTreeMap<String, String>) {
        let planned = planned(&self.config, fields);
        self.report(Operation::JobCheck, &planned.as_ref().map(drop).map_err(Clone::clone), &[])
            .await;
        let Ok(text) = planned else { return };
        let (dir, file) = (&self.config.dir, &self.config.file);
        let kept =
            std::fs::read(file).and_then(|old| write_whole(&dir.join(BACKUP_FILE), &old, None));
        let kept = kept.map_err(|error| format!("the configuration could not be kept: {error}"));
        self.report(Operation::JobBackUp, &kept, &[]).await;
        if kept.is_err() {
            return;
        }
        let trial = Trial { job: self.order.job.clone(), file: file.clone(), undone: None };
        let put = trial.write(dir).and_then(|()| {
            let metadata = std::fs::metadata(file)?;
            write_whole(file, text.as_bytes(), Some(&metadata))
        });
        if let Err(error) = put {
            let _ = std::fs::remove_file(dir.join(TRIAL_FILE));
            let failed = Err(format!("the configuration could not be written: {error}"));
            self.report(Operation::JobUpdate, &failed, &[]).await;
            self.report(Operation::JobRollBack, &Ok(()), &[]).await;
            return;
        }
        // Whether it is good is told by whoever starts with it.
        tokio::time::sleep(RESTART_PAUSE).await;
        let _ = self.done.send(Done::Restart).await;
    }
}

async fn report(
    config: &Config,
    order: &Order,
    done: &mpsc::Sender<Done>,
    action: Operation,
    went: &Result<(), String>,
    images: &[ImageStatus],
) {
    let at = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let report = order.report(&config.node_name, action, went, images, &at);
    if let Err(reason) = went {
        tracing::warn!(job = order.job, action = action.as_str(), reason, "a node job failed");
    }
    let _ = done.send(Done::Report(report)).await;
}

async fn fetch_one(runtime: &Runtime, image: &str, keyring: &Keyring) -> Result<(), String> {
    let name = with_tag(image).map_err(|error| error.to_string())?;
    let found = keyring.find(&name);
    let mut tries: Vec<Option<v1::AuthConfig>> =
        found.into_iter().map(|credentials| Some(cri::auth(credentials))).collect();
    if tries.is_empty() {
        tries.push(None);
    }
    let mut last = String::new();
    for auth in tries {
        match runtime.pull_image(&name, auth, None).await {
            Ok(_) => return Ok(()),
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

async fn check(config: &Config, items: &[String]) -> Result<(), String> {
    let cpu = match items.iter().any(|item| item == "cpu") {
        true => cpu_use().await,
        false => None,
    };
    jobs::check(items, |item| match item {
        "cpu" => cpu,
        "mem" => node::memory_use(),
        _ => node::disk_use(&config.dir),
    })
}

/// Share of the CPU in use over a moment, in percent.
async fn cpu_use() -> Option<f64> {
    let read = || -> Option<(f64, f64)> {
        let text = std::fs::read_to_string("/proc/stat").ok()?;
        let numbers = text.lines().next()?.split_whitespace().skip(1).take(8);
        let times: Vec<f64> = numbers.filter_map(|number| number.parse().ok()).collect();
        // Idle and waiting for a disk are the fourth and fifth.
        Some((times.iter().sum(), times.get(3)? + times.get(4)?))
    };
    let (all, idle) = read()?;
    tokio::time::sleep(CPU_WINDOW).await;
    let (all, idle) = (read()?.0 - all, read()?.1 - idle);
    Some(if all > 0.0 { 100.0 * (1.0 - (idle / all).clamp(0.0, 1.0)) } else { 0.0 })
}

/// The text of the configuration with these fields, when EdgeCore can start with it.
fn planned(config: &Config, fields: &BTreeMap<String, String>) -> Result<String, String> {
    let file = &config.file;
    if file.starts_with("/run") {
        return Err("this node's configuration is made anew at each start of the machine; change its site.toml".into());
    }
    let text =
        std::fs::read_to_string(file).map_err(|error| format!("`{}`: {error}", file.display()))?;
    let mut value: Value = serde_saphyr::from_str(&text).map_err(|error| error.to_string())?;
    jobs::set_fields(&mut value, fields)?;
    let text = written(&value)?;
    let new = Config::parse(file, &text).map_err(|error| error.to_string())?;
    for (what, is_same) in
        [("name", new.node_name == config.node_name), ("directory", new.dir == config.dir)]
    {
        if !is_same {
            return Err(format!("the node's {what} cannot be changed; that would be another node"));
        }
    }
    Ok(text)
}

/// YAML where it says the same; else JSON, which is YAML. KubeEdge's programs read an older YAML, in which more words
/// stand for something else, so its files become JSON.
fn written(value: &Value) -> Result<String, String> {
    let says_the_same =
        |text: &String| serde_saphyr::from_str::<Value>(text).is_ok_and(|again| again == *value);
    let yaml = serde_saphyr::to_string(value).ok().filter(says_the_same);
    match yaml.filter(|_| !kubeedge::is_kubeedge(value)) {
        Some(yaml) => Ok(yaml),
        None => serde_json::to_string_pretty(value).map_err(|error| error.to_string()),
    }
}

/// A change of the configuration that is under way.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Trial {
    job: String,
    file: PathBuf,
    /// Why the old configuration is back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    undone: Option<String>,
}

impl Trial {
    fn read(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(dir.join(TRIAL_FILE)).ok()?).ok()
    }

    fn write(&self, dir: &Path) -> std::io::Result<()> {
        let text = serde_json::to_vec(self).expect("texts only");
        write_whole(&dir.join(TRIAL_FILE), &text, None)
    }

    /// Puts the old configuration back.
    fn undo(mut self, dir: &Path, reason: &str) -> std::io::Result<()> {
        let old = std::fs::read(dir.join(BACKUP_FILE))?;
        let metadata = std::fs::metadata(&self.file)?;
        write_whole(&self.file, &old, Some(&metadata))?;
        self.undone = Some(reason.to_owned());
        self.write(dir)
    }

    fn order(&self) -> Order {
        Order::configured(&self.job)
    }
}

/// Puts the old configuration back when EdgeCore cannot run with a new one. Returns whether it did; start again then.
pub fn undo_after_failure(dir: &Path, error: &str) -> bool {
    let Some(trial) = Trial::read(dir).filter(|trial| trial.undone.is_none()) else { return false };
    let undone = trial.undo(dir, &format!("edgecore did not run with it: {error}"));
    if let Err(error) = &undone {
        tracing::error!(%error, "the configuration before the change could not be put back");
    }
    undone.is_ok()
}

async fn end_trial(config: Arc<Config>, done: mpsc::Sender<Done>, time: Duration) {
    tokio::time::sleep(time).await;
    let Some(trial) = Trial::read(&config.dir) else { return };
    let reason = format!("the hub was not reached within {} s", time.as_secs());
    match trial.undo(&config.dir, &reason) {
        Ok(()) => drop(done.send(Done::Restart).await),
        Err(error) => {
            tracing::error!(%error, "the configuration before the change could not be put back")
        }
    }
}

async fn told_proven(config: Arc<Config>, trial: Trial, done: mpsc::Sender<Done>) {
    report(&config, &trial.order(), &done, Operation::JobUpdate, &Ok(()), &[]).await;
    let _ = std::fs::remove_file(config.dir.join(TRIAL_FILE));
}

async fn told_undone(config: Arc<Config>, trial: Trial, done: mpsc::Sender<Done>) {
    let order = trial.order();
    let failed = Err(trial.undone.unwrap_or_default());
    report(&config, &order, &done, Operation::JobUpdate, &failed, &[]).await;
    report(&config, &order, &done, Operation::JobRollBack, &Ok(()), &[]).await;
    let _ = std::fs::remove_file(config.dir.join(TRIAL_FILE));
}

/// Writes a file whole or not at all; with the owner and mode of `like`, else for root alone.
fn write_whole(path: &Path, bytes: &[u8], like: Option<&std::fs::Metadata>) -> std::io::Result<()> {
    let name =
        path.file_name().ok_or_else(|| std::io::Error::from(std::io::ErrorKind::InvalidInput))?;
    let mut new_name = name.to_owned();
    new_name.push(".new");
    let new = path.with_file_name(new_name);
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    if let Some(like) = like {
        file.set_permissions(std::fs::Permissions::from_mode(like.mode() & 0o7777))?;
        // A file of another user stays his, where we may give it.
        let _ = std::os::unix::fs::fchown(&file, Some(like.uid()), Some(like.gid()));
    }
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    std::fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use skerry_protocol::job;

    struct World {
        dir: tempfile::TempDir,
        config: Arc<Config>,
        lookups: mpsc::Receiver<LookupRequest>,
        sender: mpsc::Sender<LookupRequest>,
    }

    impl World {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a folder");
            let file = dir.path().join("edgecore.yaml");
            let place = dir.path().display();
            let text = format!(
                "# a comment\nnodeName: edge1\nhub: wss://127.0.0.1:1\nenrol: https://127.0.0.1:2\nbeat: 25\n\
                 runtimeSocket: {place}/none.sock\ndir: {place}\n"
            );
            std::fs::write(&file, text).expect("written");
            let config = Arc::new(Config::read(&file).expect("a configuration"));
            let (sender, lookups) = mpsc::channel(4);
            Self { dir, config, lookups, sender }
        }

        fn start(&self) -> (Jobs, mpsc::Receiver<Done>) {
            Jobs::start(self.config.clone(), self.sender.clone())
        }

        fn beat(&self) -> u64 {
            Config::read(&self.config.file).expect("a configuration").beat.as_secs()
        }
    }

    /// Reports until the job has ended or wants a restart: action, success, reason.
    async fn reports(
        done: &mut mpsc::Receiver<Done>,
        jobs: &mut Jobs,
    ) -> (Vec<(String, bool, String)>, bool) {
        let mut told = Vec::new();
        loop {
            match done.recv().await.expect("a word") {
                Done::Report(report) => {
                    let text =
                        |key: &str| report.content[key].as_str().unwrap_or_default().to_owned();
                    told.push((text("action"), report.content["succ"] == true, text("reason")));
                }
                Done::Ended(kind, job) => {
                    jobs.handle_ended(kind, job);
                    return (told, false);
                }
                Done::Restart => return (told, true),
            }
        }
    }

    fn update(fields: Value) -> Message {
        job::order(5, Kind::ConfigUpdate, "c", "edge1", &json!({"updateFields": fields}))
    }

    #[tokio::test]
    async fn a_changed_configuration_is_told_as_done_when_the_hub_is_reached_with_it() {
        let world = World::new();
        let (mut jobs, mut done) = world.start();
        assert!(jobs.take(&update(json!({"beat": "30"}))).is_none());
        let (told, restarts) = reports(&mut done, &mut jobs).await;
        assert!(restarts);
        let told: Vec<_> = told.iter().map(|(action, succ, _)| (action.as_str(), *succ)).collect();
        assert_eq!(told, [("Check", true), ("BackUp", true)]);
        assert_eq!(world.beat(), 30);

        let (mut jobs, mut done) = world.start();
        jobs.handle_connected();
        let Some(Done::Report(report)) = done.recv().await else { panic!("no report") };
        assert_eq!(
            (&report.content["action"], &report.content["succ"]),
            (&json!("Update"), &json!(true))
        );
        assert_eq!(report.resource, "operations.kubeedge.io/v1alpha2/configupdatejob/c/node/edge1");
        while world.dir.path().join(TRIAL_FILE).exists() {
            tokio::task::yield_now().await;
        }
        assert!(!undo_after_failure(world.dir.path(), "x"), "it is proven");
    }

    #[tokio::test]
    async fn a_configuration_that_cannot_run_is_taken_back_and_told_as_failed() {
        let world = World::new();
        let (mut jobs, mut done) = world.start();
        jobs.take(&update(json!({"hub": "wss://192.0.2.1:10000"})));
        assert!(reports(&mut done, &mut jobs).await.1);
        assert!(undo_after_failure(world.dir.path(), "no database"));
        assert!(!undo_after_failure(world.dir.path(), "again"), "only once");
        let text = std::fs::read_to_string(&world.config.file).expect("read");
        assert!(text.starts_with("# a comment"), "{text}");
        let (_jobs, mut done) = world.start();
        for (action, succ) in [("Update", false), ("RollBack", true)] {
            let Some(Done::Report(report)) = done.recv().await else { panic!("no report") };
            assert_eq!(
                (&report.content["action"], &report.content["succ"]),
                (&json!(action), &json!(succ))
            );
        }
    }

    #[tokio::test]
    async fn a_configuration_without_a_hub_is_taken_back_after_its_trial() {
        let world = World::new();
        let (mut jobs, mut done) = world.start();
        jobs.take(&update(json!({"beat": "31"})));
        assert!(reports(&mut done, &mut jobs).await.1);
        let soon = Duration::from_millis(10);
        let (_jobs, mut done) = Jobs::start_with(world.config.clone(), world.sender.clone(), soon);
        assert!(matches!(done.recv().await, Some(Done::Restart)));
        assert_eq!(world.beat(), 25);
        assert!(Trial::read(world.dir.path()).expect("a trial").undone.is_some());
    }

    #[tokio::test]
    async fn a_change_that_makes_no_configuration_is_refused() {
        let world = World::new();
        let (mut jobs, mut done) = world.start();
        for (fields, expected) in [
            (json!({"beat": "1"}), "beat"),
            (json!({"modules.edgeHub.heartbeat": "20"}), "modules"),
            (json!({"nodeName": "edge2"}), "another node"),
            (json!({"hub[7]": "x"}), "no list"),
        ] {
            jobs.take(&update(fields));
            let (told, restarts) = reports(&mut done, &mut jobs).await;
            assert!(!restarts && told.len() == 1 && !told[0].1, "{told:?}");
            assert!(told[0].2.contains(expected), "{told:?}");
        }
        assert_eq!(world.beat(), 25);
        assert!(Trial::read(world.dir.path()).is_none());
    }

    #[tokio::test]
    async fn images_that_cannot_be_fetched_are_each_told_with_their_reason() {
        let mut world = World::new();
        let (mut jobs, mut done) = world.start();
        let pull = |secret: &str| {
            let spec = json!({"imagePrePullTemplate": {"images": ["a:1", "UPPER"], "imageSecrets": secret}});
            job::order(5, Kind::ImagePrePull, "p", "edge1", &spec)
        };
        jobs.take(&pull(""));
        jobs.take(&pull("")); // told again: once is enough
        let Some(Done::Report(check)) = done.recv().await else { panic!("no report") };
        assert_eq!(check.content["succ"], true);
        let Some(Done::Report(pulled)) = done.recv().await else { panic!("no report") };
        assert_eq!(
            (&pulled.content["action"], &pulled.content["succ"]),
            (&json!("Pull"), &json!(false))
        );
        let images: Vec<ImageStatus> =
            serde_json::from_str(pulled.content["extend"].as_str().expect("a text"))
                .expect("images");
        assert_eq!(images.len(), 2);
        assert!(
            images.iter().all(|image| image.status == "False" && !image.reason.is_empty()),
            "{images:?}"
        );
        assert!(matches!(done.recv().await, Some(Done::Ended(..))));
        jobs.handle_ended(Kind::ImagePrePull, "p".into());

        jobs.take(&pull("ns/s"));
        let request = world.lookups.recv().await.expect("a lookup");
        assert_eq!(request.path.to_string(), "ns/secret/s");
        let _ = request.answer.send(Ok(None));
        let (told, _) = reports(&mut done, &mut jobs).await;
        assert!(told[1].2.contains("no secret `ns/s`"), "{told:?}");
    }
}
