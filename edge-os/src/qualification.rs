//! What this machine's kernel can carry: judged once per kernel, in a process of its own, and told to the cluster.
//!
//! [`judge`] is that process (`edgecore qualify`): it runs every probe, signs the report with the node's key and keeps what
//! is to be told in [`FILE`]. [`keep`] is the agent's task: it starts such a process, at the lowest priority and after the
//! registration, when the kernel or the rules are new, when a person asks for it, and publishes whatever stands in the file.
//! The agent itself never probes, and holds only what goes on the Node.
//!
//! On the appliance probes may make the kernel load modules. On machines of others they try only what is loaded, and judge
//! the rest by the kernel's configuration and its folder of modules.

use crate::appliance;
use crate::config::Config;
use crate::enrol::Pki;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use skerry_edge_core::node::KernelCondition;
use skerry_qualify::live;
use skerry_qualify::probe::{Autoload, Plan};
use skerry_qualify::publish::{self, PREFIX, Publication};
use skerry_qualify::report::{self, Report};
use skerry_qualify::sign;
use skerry_qualify::table::Table;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What is to be told, in the agent's directory.
pub const FILE: &str = "qualification.json";
/// The signed report, for `skerry qualify verify`.
pub const REPORT: &str = "qualification-report.json";
/// What the hub was told last.
const TOLD: &str = "qualification.told";
/// First argument of the processes that probe.
pub const PROBE: &str = "probe-kernel";
/// Longest wait for the registration before a kernel is judged without a link.
const START_WAIT: Duration = Duration::from_secs(60);
/// How long one judgement may take; under emulation a minute is usual.
const JUDGE_TIMEOUT: Duration = Duration::from_secs(600);
/// Pause after a judgement that failed; it doubles up to [`RETRY_LAST`].
const RETRY_FIRST: Duration = Duration::from_secs(60);
const RETRY_LAST: Duration = Duration::from_secs(6 * 3600);
/// Time between two looks whether somebody else wrote the file.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// What the agent puts on its Node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Published {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// The condition `KernelQualified`.
    pub condition: KernelCondition,
    /// What tells one judgement from another; empty when there is none to be kept in the cluster.
    pub stamp: String,
}

/// [`FILE`].
#[derive(Serialize, Deserialize)]
struct Stored {
    /// Which kernel, see [`kernel_build`].
    kernel: String,
    /// Which checks and profiles.
    rules: String,
    /// Which request this answers.
    #[serde(default)]
    requested: String,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    condition: publish::Condition,
    /// The status of the object in the cluster; the agent hands it on as it is.
    object: Box<RawValue>,
}

/// Why a kernel could not be judged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QualifyError {
    /// This program cannot find itself.
    #[error("could not find this program's own file")]
    Program(#[source] std::io::Error),
    /// A file could not be written.
    #[error("could not write `{path}`")]
    Write {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Release and build of the running kernel: with another one, everything is judged anew.
fn kernel_build() -> String {
    std::fs::read_to_string("/proc/version").unwrap_or_default().trim().to_owned()
}

/// Judges this machine, keeps what is to be told, and returns the table and the report.
///
/// # Errors
///
/// [`QualifyError`]; a report that could not be signed is kept without a signature.
pub fn judge(
    config: &Config,
    autoload: Option<Autoload>,
    requested: &str,
) -> Result<(Table, Report), QualifyError> {
    let table = Table::built_in();
    let program = std::env::current_exe().map_err(QualifyError::Program)?;
    let autoload = autoload.unwrap_or(match appliance::socket() {
        Some(_) => Autoload::Known,
        None => Autoload::None,
    });
    let plan = Plan { program, prefix: vec![PROBE.into()], autoload, state: config.dir.clone() };
    let (report, volatile) = live::qualify(&table, &plan, None);
    let pair = Pki::new(config.pki()).load(&config.node_name).ok().flatten();
    let signature = pair.and_then(|pair| {
        // An older kind of key is no reason to know nothing of the kernel.
        sign::sign(&report, &volatile, &pair.identity.pem)
            .inspect_err(|error| tracing::warn!(%error, "the report is not signed"))
            .ok()
    });
    let published = Publication::new(&table, &report, &volatile, signature.clone());
    let object = serde_json::value::to_raw_value(&published.object);
    let stored = Stored {
        kernel: kernel_build(),
        rules: Table::built_in_digest(),
        requested: requested.to_owned(),
        labels: published.labels,
        annotations: published.annotations,
        condition: published.condition,
        object: object.expect("a report has only texts as keys"),
    };
    let file =
        report::File { digest: report.digest(), report, volatile: Some(volatile), signature };
    write(&config.dir.join(REPORT), &file.json())?;
    // Last: who sees this file finds the other one as well.
    let text = serde_json::to_string(&stored).expect("texts only");
    write(&config.dir.join(FILE), &text)?;
    Ok((table, file.report))
}

fn write(path: &Path, text: &str) -> Result<(), QualifyError> {
    let next = path.with_extension("next");
    std::fs::write(&next, text)
        .and_then(|()| std::fs::rename(&next, path))
        .map_err(|source| QualifyError::Write { path: path.to_owned(), source })
}

/// What [`keep`] needs.
pub struct Parts {
    /// The program that judges, `edgecore`.
    pub program: PathBuf,
    /// Whether the cluster has taken the Node in this run.
    pub registered: watch::Receiver<bool>,
    /// The Node's annotation [`publish::REQUEST`]; empty when it has none.
    pub requested: watch::Receiver<String>,
    /// What is to be published.
    pub published: watch::Sender<Option<Arc<Published>>>,
}

/// What is known of the file.
#[derive(Default)]
struct Known {
    modified: Option<SystemTime>,
    /// The file is about this kernel and these rules.
    current: bool,
    /// The request that it answers.
    requested: String,
}

/// Keeps what is published up to date until `stop`.
pub async fn keep(config: Arc<Config>, mut parts: Parts, stop: CancellationToken) {
    let work = async {
        let mut known = Known::default();
        read(&config, &mut known, &parts.published);
        if !known.current {
            // The registration comes first, and the pods of this machine with it.
            let registered = parts.registered.wait_for(|registered| *registered);
            let _ = tokio::time::timeout(START_WAIT, registered).await;
        }
        let mut pause = RETRY_FIRST;
        loop {
            let requested = parts.requested.borrow_and_update().clone();
            let asked = !requested.is_empty() && requested != known.requested;
            if known.current && !asked {
                tokio::select! {
                    () = tokio::time::sleep(LOOK_INTERVAL) => {}
                    changed = parts.requested.changed() => if changed.is_err() {
                        return; // the agent ends
                    },
                }
                read(&config, &mut known, &parts.published);
                continue;
            }
            tracing::info!(new_kernel = !known.current, asked, "judging this machine's kernel");
            let failure = match start(&config, &parts.program, &requested).await {
                Ok(()) => {
                    read(&config, &mut known, &parts.published);
                    let done = known.current && (!asked || known.requested == requested);
                    (!done).then(|| "it left no result".to_owned())
                }
                Err(error) => Some(error),
            };
            let Some(error) = failure else {
                pause = RETRY_FIRST;
                continue;
            };
            tracing::warn!(
                error,
                retry_s = pause.as_secs(),
                "this machine's kernel was not judged"
            );
            if !known.current {
                let condition = KernelCondition {
                    holds: None,
                    reason: "NotJudged".into(),
                    message: format!("the kernel could not be judged: {error}"),
                };
                let published = Published { condition, ..Published::default() };
                parts.published.send_replace(Some(Arc::new(published)));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_LAST);
        }
    };
    stop.run_until_cancelled(work).await;
}

/// Runs the process that judges; the error is a sentence.
async fn start(config: &Config, program: &Path, requested: &str) -> Result<(), String> {
    let mut command = tokio::process::Command::new(program);
    command.args(["qualify", "--background", "--config"]).arg(&config.file);
    command.args(["--requested", requested]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
    command.kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| format!("it did not start: {error}"))?;
    match tokio::time::timeout(JUDGE_TIMEOUT, child.wait()).await {
        // 1 is an answer, too: that the kernel is not qualified.
        Ok(Ok(status)) if matches!(status.code(), Some(0 | 1)) => Ok(()),
        Ok(Ok(status)) => Err(format!("it ended with {status}")),
        Ok(Err(error)) => Err(format!("it was lost: {error}")),
        Err(_) => {
            let _ = child.kill().await;
            Err(format!("it took more than {} s", JUDGE_TIMEOUT.as_secs()))
        }
    }
}

/// Reads the file when it changed, and publishes what is of this kernel.
fn read(config: &Config, known: &mut Known, published: &watch::Sender<Option<Arc<Published>>>) {
    let path = config.dir.join(FILE);
    let modified = std::fs::metadata(&path).and_then(|data| data.modified()).ok();
    if modified == known.modified {
        return;
    }
    known.modified = modified;
    let stored = std::fs::read_to_string(&path)
        .ok()
        .and_then(|text| serde_json::from_str::<Stored>(&text).ok());
    let Some(stored) = stored.filter(|stored| stored.kernel == kernel_build()) else {
        known.current = false;
        return;
    };
    // Older rules are better than none until the new ones have judged.
    known.current = stored.rules == Table::built_in_digest();
    known.requested = stored.requested;
    let mut annotations = stored.annotations;
    let stamp = format!(
        "{} {}",
        annotations.get(&format!("{PREFIX}/digest")).cloned().unwrap_or_default(),
        annotations.get(&format!("{PREFIX}/date")).cloned().unwrap_or_default()
    );
    if !known.requested.is_empty() {
        annotations.insert(format!("{PREFIX}/answered"), known.requested.clone());
    }
    let condition = KernelCondition {
        holds: stored.condition.holds,
        reason: stored.condition.reason,
        message: stored.condition.message,
    };
    let now = Published { labels: stored.labels, annotations, condition, stamp };
    published.send_replace(Some(Arc::new(now)));
}

/// The status of the object in the cluster, as the last judgement left it.
pub fn object(dir: &Path) -> Option<serde_json::Value> {
    let text = std::fs::read_to_string(dir.join(FILE)).ok()?;
    let stored: Stored = serde_json::from_str(&text).ok()?;
    serde_json::from_str(stored.object.get()).ok()
}

/// What the hub was told last: the judgement, and the Node that it was told about.
pub fn told(dir: &Path) -> Option<String> {
    std::fs::read_to_string(dir.join(TOLD)).ok()
}

/// Remembers what is on its way to the hub. When this is lost, the hub is told once more.
pub fn remember_told(dir: &Path, told: &str) {
    if let Err(error) = write(&dir.join(TOLD), told) {
        tracing::debug!(%error, "what the hub knows of this kernel was not kept");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    struct World {
        dir: tempfile::TempDir,
        config: Arc<Config>,
        registered: watch::Sender<bool>,
        requested: watch::Sender<String>,
        published: watch::Receiver<Option<Arc<Published>>>,
        stop: CancellationToken,
        task: tokio::task::JoinHandle<()>,
    }

    /// A judgement of this kernel with these rules, as a file.
    fn stored(kernel: &str, requested: &str) -> String {
        let condition = publish::Condition {
            holds: Some(true),
            reason: "Qualified".into(),
            message: "m".into(),
        };
        let annotations = [
            (format!("{PREFIX}/digest"), "sha256:1".to_owned()),
            (format!("{PREFIX}/date"), "now".to_owned()),
        ];
        let stored = Stored {
            kernel: kernel.into(),
            rules: Table::built_in_digest(),
            requested: requested.into(),
            labels: [("qualification.skerry.dev/cilium".to_owned(), "qualified".to_owned())].into(),
            annotations: annotations.into(),
            condition,
            object: RawValue::from_string(r#"{"kernel":"6.1"}"#.into()).expect("JSON"),
        };
        serde_json::to_string(&stored).expect("texts")
    }

    /// A task whose judge is a script, and a file that an earlier run left.
    fn world(script: &str, before: Option<String>) -> World {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().to_owned();
        if let Some(text) = before {
            std::fs::write(path.join(FILE), text).expect("written");
        }
        let program = path.join("judge");
        std::fs::write(path.join("good"), stored(&kernel_build(), "REQUESTED")).expect("written");
        let head = format!(
            "#!/bin/sh\ncd {}\necho \"$*\" >> calls\nanswer=$6\ngood() {{ sed \"s/REQUESTED/$answer/\" good > next && mv next {FILE}; }}\n",
            path.display()
        );
        std::fs::write(&program, head + script).expect("written");
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("a program");
        let text = format!(
            "nodeName: edge1\nhub: wss://127.0.0.1:1\nenrol: https://127.0.0.1:2\nruntimeSocket: /run/none\ndir: {}\n",
            path.display()
        );
        let config =
            Arc::new(Config::parse(&path.join("edge.yaml"), &text).expect("a configuration"));
        let (registered, registered_seen) = watch::channel(false);
        let (requested, requested_seen) = watch::channel(String::new());
        let (sender, published) = watch::channel(None);
        let stop = CancellationToken::new();
        let parts = Parts {
            program,
            registered: registered_seen,
            requested: requested_seen,
            published: sender,
        };
        let task = tokio::spawn(keep(config.clone(), parts, stop.clone()));
        World { dir, config, registered, requested, published, stop, task }
    }

    impl World {
        fn calls(&self) -> usize {
            let calls = std::fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default();
            calls.lines().count()
        }

        async fn next(&mut self) -> Arc<Published> {
            let wait = self.published.wait_for(Option::is_some);
            let seen = tokio::time::timeout(Duration::from_secs(20), wait).await;
            let seen = seen.expect("in time").expect("the task runs").clone().expect("there");
            self.published.mark_unchanged();
            seen
        }

        async fn end(self) {
            self.stop.cancel();
            self.task.await.expect("ends");
        }
    }

    #[tokio::test]
    async fn a_new_kernel_is_judged_once_and_not_before_the_registration() {
        let mut world = world("good", None);
        tokio::task::yield_now().await;
        assert_eq!(world.calls(), 0, "the registration comes first");
        world.registered.send_replace(true);
        let published = world.next().await;
        assert_eq!(published.condition.reason, "Qualified");
        assert_eq!(published.labels["qualification.skerry.dev/cilium"], "qualified");
        assert_eq!(published.stamp, "sha256:1 now");
        assert_eq!(object(&world.config.dir).expect("there")["kernel"], "6.1");
        assert_eq!(world.calls(), 1);
        world.end().await;
    }

    #[tokio::test]
    async fn a_kernel_that_was_judged_before_is_published_at_once_and_judged_on_request_only() {
        let mut world = world("good", Some(stored(&kernel_build(), "")));
        let published = world.next().await;
        assert_eq!(published.condition.reason, "Qualified");
        assert_eq!(world.calls(), 0);
        world.requested.send_replace("again".into());
        world.published.changed().await.expect("the task runs");
        let published = world.next().await;
        assert_eq!(published.annotations["qualification.skerry.dev/answered"], "again");
        assert_eq!(world.calls(), 1);
        world.end().await;
    }

    #[tokio::test]
    async fn what_is_known_of_another_kernel_is_not_published() {
        let mut world = world("good", Some(stored("Linux version 2.6", "")));
        world.registered.send_replace(true);
        world.next().await;
        assert_eq!(world.calls(), 1);
        world.end().await;
    }

    #[tokio::test]
    async fn a_judge_that_dies_leaves_a_condition_that_nobody_can_say() {
        let mut world = world("exit 2", Some("not JSON".into()));
        world.registered.send_replace(true);
        let published = world.next().await;
        assert_eq!(published.condition.holds, None);
        assert_eq!(published.condition.reason, "NotJudged");
        assert!(published.labels.is_empty() && published.stamp.is_empty());
        world.end().await;
    }
}
