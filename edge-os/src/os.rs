//! The shell around `skerry_edge_core::os`: fetches what it says, asks PID 1 what it says, and tells it what happens.
//!
//! Runs on appliances only. Versions are fetched into [`STORE`], which PID 1 looks into.

mod fetch;

use crate::appliance::{Ask, Facts};
use crate::config::Endpoint;
use crate::enrol::Credentials;
use fetch::{FetchError, Tally};
use skerry_api::fleet::os::{KeyStatement, Moment, OsOrder, OsProgress};
pub use skerry_edge_core::os::Failure;
use skerry_edge_core::os::{Input, Machine, OsUpdate, Output};
use skerry_init::update::RUNNING;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Folder of versions, of which PID 1 knows.
pub const STORE: &str = "/state/update";
/// Time between two looks at the clock.
const CLOCK_INTERVAL: Duration = Duration::from_secs(20);
/// Events of a fetch and of PID 1 that wait.
const EVENTS_MAX: usize = 16;

/// What the part needs of the agent.
pub struct Parts {
    /// Where the hub serves versions.
    pub endpoint: Endpoint,
    /// The node's certificate.
    pub credentials: watch::Receiver<Option<Arc<Credentials>>>,
    /// The annotation of the Node with the order; none: there is none. Unknown before the Node was seen.
    pub order: watch::Receiver<Option<Option<String>>>,
    /// How the machine is.
    pub facts: watch::Receiver<Option<Facts>>,
    /// How the pods are and whether there is a link, at the moment of asking.
    pub pods: watch::Receiver<Running>,
    /// Questions to PID 1.
    pub asks: mpsc::Sender<Ask>,
    /// How far it is, for the Node.
    pub progress: watch::Sender<OsProgress>,
    /// Folder of versions.
    pub store: PathBuf,
    /// Files and devices that may have blocks of a version; none: the running root.
    pub sources: Option<Vec<PathBuf>>,
}

/// What has to run again after an update.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Running {
    /// Pods that run, `namespace/name`.
    pub pods: Vec<String>,
    /// Whether the hub is there.
    pub connected: bool,
}

enum Event {
    Percent(String, u8),
    Fetched(String, Result<Tally, FetchError>),
    Answered(Output, Result<(), Failure>),
}

/// Follows the order until `stop`.
pub async fn run(mut parts: Parts, stop: CancellationToken) {
    let (events, mut happened) = mpsc::channel(EVENTS_MAX);
    let mut shell = Shell {
        core: OsUpdate::default(),
        events,
        fetching: None,
        started: Instant::now(),
        order: parts.order.clone(),
        pods: parts.pods.clone(),
        asks: parts.asks.clone(),
        trusted: None,
        fetch: fetch::Parts {
            endpoint: parts.endpoint.clone(),
            credentials: parts.credentials.clone(),
            store: parts.store.clone(),
            sources: parts
                .sources
                .clone()
                .unwrap_or_else(|| fetch::running_root().into_iter().collect()),
        },
    };
    let mut clock = tokio::time::interval(CLOCK_INTERVAL);
    loop {
        let input = tokio::select! {
            () = stop.cancelled() => break,
            Ok(()) = parts.order.changed() => shell.read_order(),
            Ok(()) = parts.facts.changed() => {
                let facts = parts.facts.borrow_and_update().clone();
                facts.map(|facts| Input::Machine(facts.os))
            }
            _ = clock.tick() => shell.read_clock(),
            Some(event) = happened.recv() => shell.take(event),
        };
        for input in input.into_iter().chain([Input::Tick]) {
            shell.handle(input);
        }
        let progress = shell.core.progress();
        parts.progress.send_if_modified(|known| {
            let new = known != progress;
            if new {
                tracing::info!(
                    version = progress.version,
                    step = progress.step.word(),
                    percent = progress.percent,
                    reason = progress.reason,
                    "os"
                );
                known.clone_from(progress);
            }
            new
        });
    }
    shell.stop_fetch();
}

struct Shell {
    core: OsUpdate,
    events: mpsc::Sender<Event>,
    fetching: Option<JoinHandle<()>>,
    started: Instant,
    order: watch::Receiver<Option<Option<String>>>,
    pods: watch::Receiver<Running>,
    asks: mpsc::Sender<Ask>,
    fetch: fetch::Parts,
    /// The key statement that PID 1 was told last.
    trusted: Option<KeyStatement>,
}

impl Shell {
    fn handle(&mut self, input: Input) {
        let outputs = self.core.handle(input, self.started.elapsed());
        for output in outputs {
            self.carry_out(output);
        }
    }

    /// A Node whose annotation is not an order is as good as one without: its author is told where it was made.
    fn read_order(&mut self) -> Option<Input> {
        let text = self.order.borrow_and_update().clone()?;
        let order = text.as_deref().and_then(|text| {
            serde_json::from_str::<OsOrder>(text)
                .inspect_err(
                    |error| tracing::warn!(%error, "the order of an OS on the Node cannot be read"),
                )
                .ok()
        });
        if let Some(statement) = order.as_ref().and_then(|order| order.trust.clone()) {
            self.tell_trust(statement);
        }
        let clock = order.as_ref().map(|order| moment(order.policy.zone.as_deref()));
        if let Some(clock) = clock {
            self.handle(Input::Clock(clock));
        }
        Some(Input::Order(order))
    }

    /// Which keys may sign versions is told before any version that they sign: the fetch takes longer.
    fn tell_trust(&mut self, statement: KeyStatement) {
        if self.trusted.as_ref() == Some(&statement) {
            return;
        }
        self.trusted = Some(statement.clone());
        let KeyStatement { statement, signature } = statement;
        let line = serde_json::json!({"trust": {"statement": statement, "signature": signature}});
        let (answer, answered) = oneshot::channel();
        let asks = self.asks.clone();
        tokio::spawn(async move {
            if asks.send(Ask { line, answer }).await.is_err() {
                return;
            }
            match answered.await {
                Ok(Ok(())) => tracing::info!("init trusts other release keys now"),
                // Mostly one that it knows already.
                Ok(Err(failure)) => {
                    tracing::info!(reason = failure.reason, "init did not take the release keys")
                }
                Err(_) => {}
            }
        });
    }

    fn read_clock(&self) -> Option<Input> {
        let order = self.core.order()?;
        Some(Input::Clock(moment(order.policy.zone.as_deref())))
    }

    fn take(&mut self, event: Event) -> Option<Input> {
        Some(match event {
            Event::Percent(digest, percent) => Input::Fetched { digest, percent },
            Event::Fetched(digest, Ok(tally)) => {
                let Tally { fetched, copied, total } = tally;
                tracing::info!(digest, fetched, copied, total, "a version of the OS is here");
                Input::Complete { digest }
            }
            Event::Fetched(digest, Err(error)) => {
                tracing::warn!(digest, %error, "a version of the OS cannot be had");
                Input::Missed { digest, failure: error.failure() }
            }
            Event::Answered(_, Ok(())) => return None,
            Event::Answered(asked, Err(failure)) => {
                tracing::warn!(?asked, reason = failure.reason, "init refused");
                Input::Refused(failure)
            }
        })
    }

    fn stop_fetch(&mut self) {
        if let Some(task) = self.fetching.take() {
            task.abort();
        }
    }

    fn carry_out(&mut self, output: Output) {
        let line = match &output {
            Output::Fetch(order) => return self.begin_fetch((**order).clone()),
            Output::StopFetch => return self.stop_fetch(),
            Output::Discard => {
                self.stop_fetch();
                if let Err(error) = fetch::discard(&self.fetch.store) {
                    tracing::warn!(%error, "what was fetched could not be removed");
                }
                return;
            }
            Output::Install(digest) => {
                let Running { pods, connected } = self.pods.borrow().clone();
                let dir = self.fetch.store.join(digest);
                serde_json::json!({"update": {"dir": dir, "pods": pods, "connected": connected}})
            }
            Output::GoBack(version) => {
                serde_json::json!({"rollback": {"reason": format!("version {version} is ordered")}})
            }
            Output::Restart(version) => {
                serde_json::json!({"reboot": {"reason": format!("update to {version}")}})
            }
        };
        let (answer, answered) = oneshot::channel();
        let (asks, events) = (self.asks.clone(), self.events.clone());
        tokio::spawn(async move {
            let gone = || Failure { reason: "init does not answer".into(), hint: String::new() };
            let answered = match asks.send(Ask { line, answer }).await {
                Ok(()) => answered.await.unwrap_or_else(|_| Err(gone())),
                Err(_) => Err(gone()),
            };
            let _ = events.send(Event::Answered(output, answered)).await;
        });
    }

    fn begin_fetch(&mut self, order: OsOrder) {
        self.stop_fetch();
        let (mut parts, events) = (self.fetch.clone(), self.events.clone());
        let asks = self.asks.clone();
        self.fetching = Some(tokio::spawn(async move {
            let digest = order.digest.hex().to_owned();
            // The boot partition is PID 1's: it puts the file of the running version where it can be read. Without it, its
            // blocks are fetched.
            let dir = parts.store.join(&digest);
            let line = serde_json::json!({"boot-file": {"dir": dir}});
            let (answer, answered) = oneshot::channel();
            if std::fs::create_dir_all(&dir).is_ok()
                && asks.send(Ask { line, answer }).await.is_ok()
                && let Ok(Ok(())) = answered.await
            {
                parts.sources.push(dir.join(RUNNING));
            }
            let told = |percent| {
                // One that finds no room is followed by another.
                let _ = events.try_send(Event::Percent(digest.clone(), percent));
            };
            let outcome = fetch::fetch(&parts, &order, told).await;
            let _ = std::fs::remove_file(dir.join(RUNNING)); // only room
            let _ = events.send(Event::Fetched(digest.clone(), outcome)).await;
        }));
    }
}

/// What the clock shows in a zone; without one in UTC.
fn moment(zone: Option<&str>) -> Result<Moment, Failure> {
    let zone = match zone {
        None => jiff::tz::TimeZone::UTC,
        Some(name) => jiff::tz::TimeZone::get(name).map_err(|_| Failure {
            reason: format!("time zone `{name}` is not known on this node"),
            hint: "name it as in `Europe/Lisbon`, or leave `os.zone` out for UTC".into(),
        })?,
    };
    let now = jiff::Timestamp::now().to_zoned(zone);
    let day = u8::try_from(now.weekday().to_monday_zero_offset()).unwrap_or(0);
    let minute = u16::try_from(i32::from(now.hour()) * 60 + i32::from(now.minute())).unwrap_or(0);
    Ok(Moment { day, minute })
}

/// The part of PID 1's facts that is about versions.
pub(crate) type OsFacts = Machine;
