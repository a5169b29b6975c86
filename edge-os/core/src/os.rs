//! What an appliance does about its OS: fetch, wait for a window, install, restart, prove itself, or go back.
//!
//! [`OsUpdate`] decides, from the order on the Node ([`OsOrder`]), from what PID 1 says of the machine ([`Machine`]), from the
//! clock on the wall and from how the fetch goes. The shell (`edge-os/src/os.rs`) fetches, asks PID 1 and publishes
//! [`OsUpdate::progress`]. PID 1 checks and writes everything by itself and is never told more than which folder to take.
//!
//! Whatever is begun is begun once: an output comes when its time has come and is not repeated until the machine, the order or
//! [`RETRY_INTERVAL`] says so. Nothing here is kept over a restart; the order is in the database, the rest PID 1 knows.

use serde::Deserialize;
use skerry_api::fleet::os::{Moment, OsOrder, OsProgress, OsStep};
use std::time::Duration;

/// After a failure that time may mend (no room, a hub without the version), the same is tried again.
pub const RETRY_INTERVAL: Duration = Duration::from_secs(30 * 60);
/// What was asked of PID 1 and has shown no effect by then is asked again.
const ASK_INTERVAL: Duration = Duration::from_secs(60);

/// What PID 1 says of versions; the part of its facts that is about updates.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// Versions on the disk.
    pub releases: Releases,
    /// An update that is being made, or how the last one ended.
    pub update: Option<MachineUpdate>,
    /// The running version proves itself.
    pub trial: Option<Trial>,
}

impl Machine {
    /// Whether it is in the middle of something that a person would watch.
    pub fn is_moving(&self) -> bool {
        let steps = ["checking", "writing", "verifying"];
        self.trial.is_some()
            || self.update.as_ref().is_some_and(|update| steps.contains(&&*update.step))
    }
}

/// Versions on the disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Releases {
    /// The one that runs.
    pub running: String,
    /// The highest counter that was good here.
    pub counter: u64,
    /// A good one in the other slot.
    pub other: Option<String>,
    /// Those that were given up here.
    pub bad: Vec<Bad>,
}

/// A version that was given up.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Bad {
    /// Its name.
    pub version: String,
    /// SHA-256 of its manifest, hexadecimal.
    pub digest: String,
    /// Why, a sentence.
    pub reason: String,
}

/// An update in PID 1's hands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct MachineUpdate {
    /// Version that it leads to.
    pub version: String,
    /// `checking`, `writing`, `verifying`, `committed`, `trial`, `blessed`, `rolled-back` or `failed`.
    pub step: String,
    /// Of this step.
    pub percent: Option<u8>,
    /// Why it went no further.
    pub reason: String,
    /// What a person can do; may be empty.
    pub hint: String,
}

/// What has to be there before the running version counts as good.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Trial {
    /// The running version.
    pub version: String,
    /// Pods that ran before, `namespace/name`.
    pub pods: Vec<String>,
    /// Whether the hub was there before.
    pub connected: bool,
}

/// Why something could not be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// A sentence.
    pub reason: String,
    /// What a person can do; may be empty.
    pub hint: String,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The order on the Node; none: the OS is left alone.
    Order(Option<OsOrder>),
    /// What PID 1 says.
    Machine(Machine),
    /// What the clock shows in the order's time zone, or why that is not known.
    Clock(Result<Moment, Failure>),
    /// How much of the version is here.
    Fetched {
        /// Its digest, hexadecimal.
        digest: String,
        /// Percent.
        percent: u8,
    },
    /// All of it is here.
    Complete {
        /// Its digest, hexadecimal.
        digest: String,
    },
    /// It could not be had.
    Missed {
        /// Its digest, hexadecimal.
        digest: String,
        /// Why.
        failure: Failure,
    },
    /// PID 1 refused what it was asked.
    Refused(Failure),
    /// Only time.
    Tick,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Fetch this version, instead of whatever is being fetched.
    Fetch(Box<OsOrder>),
    /// Stop to fetch; what is here stays.
    StopFetch,
    /// Nothing that was fetched is needed any more.
    Discard,
    /// Let PID 1 install the version with this digest, hexadecimal.
    Install(String),
    /// Let PID 1 go back to the version in the other slot.
    GoBack(String),
    /// Let PID 1 restart into this version.
    Restart(String),
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Fetch {
    #[default]
    None,
    Running {
        digest: String,
        percent: u8,
    },
    Complete {
        digest: String,
    },
    Failed {
        digest: String,
        failure: Failure,
        at: Duration,
    },
}

/// See the module.
#[derive(Debug, Default)]
pub struct OsUpdate {
    order: Option<OsOrder>,
    machine: Option<Machine>,
    clock: Option<Result<Moment, Failure>>,
    fetch: Fetch,
    /// What PID 1 was asked last, and when.
    asked: Option<(Output, Duration)>,
    /// Why PID 1 did not do it, and when it said so.
    refused: Option<(Failure, Duration)>,
    progress: OsProgress,
}

impl OsUpdate {
    /// Takes what happened at `now`, counted from any fixed moment, and says what to do.
    pub fn handle(&mut self, input: Input, now: Duration) -> Vec<Output> {
        let mut outputs = Vec::new();
        match input {
            Input::Order(order) => {
                let digest =
                    |order: &Option<OsOrder>| order.as_ref().map(|order| order.digest.clone());
                if digest(&order) != digest(&self.order) {
                    (self.asked, self.refused) = (None, None);
                }
                self.order = order;
            }
            Input::Machine(machine) => {
                let step = |machine: &Option<Machine>| {
                    machine.as_ref().and_then(|machine| Some(machine.update.as_ref()?.step.clone()))
                };
                let machine = Some(machine);
                if step(&machine) != step(&self.machine) {
                    self.asked = None;
                    if let Some(failure) = self.failure(&machine) {
                        self.refuse(failure, now);
                    }
                }
                self.machine = machine;
            }
            Input::Clock(clock) => self.clock = Some(clock),
            Input::Fetched { digest, percent } => {
                if self.is_fetching(&digest) {
                    self.fetch = Fetch::Running { digest, percent };
                }
            }
            Input::Complete { digest } => {
                if self.is_fetching(&digest) {
                    self.fetch = Fetch::Complete { digest };
                }
            }
            Input::Missed { digest, failure } => {
                if self.is_fetching(&digest) {
                    self.fetch = Fetch::Failed { digest, failure, at: now };
                }
            }
            Input::Refused(failure) => self.refuse(failure, now),
            Input::Tick => {}
        }
        self.progress = self.decide(now, &mut outputs);
        outputs
    }

    /// How far the node is, for people and for the hub.
    pub fn progress(&self) -> &OsProgress {
        &self.progress
    }

    /// The order in force.
    pub fn order(&self) -> Option<&OsOrder> {
        self.order.as_ref()
    }

    /// Why PID 1 gave an update up that is not on the disk yet.
    fn failure(&self, machine: &Option<Machine>) -> Option<Failure> {
        let update = machine.as_ref()?.update.as_ref().filter(|update| update.step == "failed")?;
        let wanted = &self.order.as_ref()?.version;
        let failure = Failure { reason: update.reason.clone(), hint: update.hint.clone() };
        (update.version == *wanted).then_some(failure)
    }

    /// PID 1 did not do it, and may have taken away what it was given.
    fn refuse(&mut self, failure: Failure, now: Duration) {
        self.refused = Some((failure, now));
        if matches!(self.fetch, Fetch::Complete { .. }) {
            self.fetch = Fetch::None;
        }
    }

    fn is_fetching(&self, wanted: &str) -> bool {
        matches!(&self.fetch, Fetch::Running { digest, .. } if digest == wanted)
    }

    fn stop_fetch(&mut self, outputs: &mut Vec<Output>) {
        if matches!(self.fetch, Fetch::Running { .. }) {
            outputs.push(Output::StopFetch);
            self.fetch = Fetch::None;
        }
    }

    /// Asks PID 1, unless it was asked the same a moment ago.
    fn ask(&mut self, output: Output, now: Duration, outputs: &mut Vec<Output>) {
        let again = |(last, at): &(Output, Duration)| *last != output || now >= *at + ASK_INTERVAL;
        if self.asked.as_ref().is_none_or(again) {
            self.asked = Some((output.clone(), now));
            outputs.push(output);
        }
    }

    fn decide(&mut self, now: Duration, outputs: &mut Vec<Output>) -> OsProgress {
        let Some(order) = self.order.clone() else {
            self.stop_fetch(outputs);
            return OsProgress::default();
        };
        let said = |step: OsStep| OsProgress {
            version: order.version.clone(),
            step,
            ..OsProgress::default()
        };
        let failed = |failure: &Failure| OsProgress {
            reason: failure.reason.clone(),
            hint: failure.hint.clone(),
            ..said(OsStep::Failed)
        };
        let Some(machine) = self.machine.clone() else { return self.progress.clone() };
        let digest = order.digest.hex().to_owned();
        let update = machine.update.as_ref().filter(|update| update.version == order.version);
        let step = update.map(|update| update.step.as_str());

        if machine.trial.as_ref().is_some_and(|trial| trial.version == order.version) {
            return said(OsStep::Trial);
        }
        if machine.releases.running == order.version {
            self.stop_fetch(outputs);
            if std::mem::take(&mut self.fetch) != Fetch::None {
                outputs.push(Output::Discard);
            }
            return said(OsStep::Current);
        }
        let bad = machine.releases.bad.iter().find(|bad| bad.digest == digest);
        if let Some(bad) = bad {
            self.stop_fetch(outputs);
            if std::mem::take(&mut self.fetch) != Fetch::None {
                outputs.push(Output::Discard);
            }
            let reason = format!("version {} was given up here: {}", order.version, bad.reason);
            let hint = "publish another version; this one is not tried on this node again".into();
            return failed(&Failure { reason, hint });
        }
        if let Some(update) = update
            && matches!(step, Some("checking" | "writing" | "verifying"))
        {
            return OsProgress { percent: update.percent, ..said(OsStep::Installing) };
        }
        // What is committed starts with the next restart, whoever makes that.
        let is_held = order.policy.hold == Some(true);
        if is_held && step != Some("committed") {
            self.stop_fetch(outputs);
            return said(OsStep::Held);
        }
        let window = self.window(&order);
        let waiting =
            || OsProgress { reason: "its time has not come".to_owned(), ..said(OsStep::Waiting) };
        if step == Some("committed") {
            return match window {
                Err(failure) => failed(&failure),
                Ok(true) if !is_held => {
                    self.ask(Output::Restart(order.version.clone()), now, outputs);
                    said(OsStep::Trial)
                }
                Ok(_) => waiting(),
            };
        }
        if let Some((failure, at)) = &self.refused
            && now < *at + RETRY_INTERVAL
        {
            return failed(failure);
        }
        self.refused = None;
        if machine.releases.other.as_ref() == Some(&order.version) {
            self.stop_fetch(outputs);
            return match window {
                Err(failure) => failed(&failure),
                Ok(true) => {
                    self.ask(Output::GoBack(order.version.clone()), now, outputs);
                    said(OsStep::Trial)
                }
                Ok(false) => waiting(),
            };
        }
        let wanted = |fetch: &Fetch| match fetch {
            Fetch::None => None,
            Fetch::Running { digest, .. }
            | Fetch::Complete { digest }
            | Fetch::Failed { digest, .. } => Some(digest.clone()),
        };
        let is_due = matches!(&self.fetch, Fetch::Failed { at, .. } if now >= *at + RETRY_INTERVAL);
        if wanted(&self.fetch).as_ref() != Some(&digest) || is_due {
            self.stop_fetch(outputs);
            outputs.push(Output::Fetch(Box::new(order.clone())));
            self.fetch = Fetch::Running { digest: digest.clone(), percent: 0 };
        }
        match &self.fetch {
            Fetch::Running { percent, .. } => {
                OsProgress { percent: Some(*percent), ..said(OsStep::Fetching) }
            }
            Fetch::Failed { failure, .. } => failed(failure),
            Fetch::Complete { .. } => match window {
                Err(failure) => failed(&failure),
                Ok(false) => waiting(),
                Ok(true) => {
                    self.ask(Output::Install(digest), now, outputs);
                    said(OsStep::Installing)
                }
            },
            Fetch::None => said(OsStep::Fetching),
        }
    }

    /// Whether the machine may restart now.
    fn window(&self, order: &OsOrder) -> Result<bool, Failure> {
        if order.policy.windows.is_empty() {
            return Ok(true);
        }
        match &self.clock {
            None => Ok(false),
            Some(Err(failure)) => Err(failure.clone()),
            Some(Ok(moment)) => {
                Ok(order.policy.windows.iter().any(|window| window.is_open(*moment)))
            }
        }
    }
}

#[cfg(test)]
mod tests;
