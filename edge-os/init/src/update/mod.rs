//! Updates of the whole system: written beside what runs, tried, proved, and taken back when they do not prove
//! themselves.
//!
//! [`core`] decides, [`check`] refuses, `execution` does, [`records`] remembers, `usb` reads sticks. [`Updates`] is the
//! part of PID 1's loop that holds them together: it takes orders, watches the thread that writes, passes a new version
//! through its gate, and says what the machine has to do. Writing takes minutes, and the loop pets the watchdog
//! meanwhile.
//!
//! Source of the protocol: the boot loader interface and the boot counting of the UAPI group; dm-verity.

pub mod check;
pub mod core;
mod execution;
pub mod records;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod usb;

use self::core::{Duty, Gate, RESTART_AFTER, Seen, Step, Trial, UNHEALTHY_MAX, Verdict};
use crate::boot;
use crate::console::{Console, Problem, Word, chain};
use crate::kernel::Kernel;
use crate::manifest::{self, Manifest};
use crate::modules::Modules;
use crate::{bundle, trust};
use check::{Refusal, fits};
use execution::{Engine, Order};
use records::Bad;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Bytes that the loader needs to see a UKI: one sector, which a disk writes whole or not at all.
pub const HEAD_LEN: usize = 512;
/// Pods of an order; more are not watched by name.
pub const PODS_MAX: usize = 256;
/// Name of the copy of the running version's boot file.
pub const RUNNING: &str = "running.efi";
/// Time between two looks at the thread that writes, and at the gate.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Part of the console's problems.
const PART: &str = "update";

/// How far an update is, for the answer to `facts`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The new version.
    pub version: String,
    /// The one before.
    pub from: String,
    /// `checking`, `writing`, `verifying`, `committed`, `trial`, `blessed`, `rolled-back`, `failed`.
    pub step: &'static str,
    /// Of the step, 0 to 100.
    pub percent: u8,
    /// Why it is in that step, or empty.
    pub reason: String,
}

/// The versions of this machine, for the answer to `facts`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Releases {
    /// That runs.
    pub running: String,
    /// Highest release counter that it has had.
    pub counter: u64,
    /// That can be gone back to.
    pub other: Option<String>,
    /// That failed here.
    pub bad: Vec<Bad>,
}

/// What a trial waits for, for the answer to `facts`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct TrialFacts {
    /// The version on trial, which runs.
    pub version: String,
    /// Pods that ran before, `namespace/name`.
    pub pods: Vec<String>,
    /// Whether there was a link before.
    pub connected: bool,
}

/// What somebody orders over the control socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ordered {
    /// Folder of `/state/update`.
    pub dir: String,
    /// Pods that run now.
    pub pods: Vec<String>,
    /// There is a link now.
    pub connected: bool,
}

/// What the loop has to do for an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// End the machine in order and start it again.
    Restart(String),
    /// The running version has proved itself.
    Blessed,
}

/// Where the thread that writes says how far it is.
#[derive(Debug, Clone, Default)]
struct Progress(Arc<Mutex<Shared>>);

#[derive(Debug, Default)]
struct Shared {
    status: Option<Status>,
    done: u64,
    /// What the thread has come to.
    outcome: Option<Result<Trial, (String, String)>>,
}

impl Progress {
    fn begin(&self, version: &str, from: &str) {
        let mut shared = self.0.lock().expect("nothing panics with it");
        let (version, from) = (version.into(), from.into());
        shared.status = Some(Status { version, from, step: "checking", ..Status::default() });
        shared.done = 0;
    }

    fn at(&self, step: &'static str, done: u64, total: u64) {
        let mut shared = self.0.lock().expect("nothing panics with it");
        shared.done = done;
        if let Some(status) = &mut shared.status {
            status.step = step;
            status.percent = u8::try_from(done.saturating_mul(100) / total.max(1)).unwrap_or(100);
        }
    }

    fn add(&self, step: &'static str, more: u64, total: u64) {
        let done = self.0.lock().expect("nothing panics with it").done;
        self.at(step, done + more, total);
    }

    fn end(&self, outcome: Result<Trial, (String, String)>) {
        self.0.lock().expect("nothing panics with it").outcome = Some(outcome);
    }
}

/// The updates of a machine.
pub struct Updates {
    engine: Engine,
    console: &'static Console<'static>,
    progress: Progress,
    /// Whether a thread writes.
    writing: bool,
    /// What comes next, once committed or on trial.
    trial: Option<Trial>,
    gate: Option<Gate>,
    /// What the agent says about pods of the trial.
    missing: Option<Vec<String>>,
    status: Option<Status>,
    other: Option<String>,
    /// Since when it is committed and there is no link.
    unlinked: Option<Duration>,
    next_look: Duration,
    /// The step that was told last.
    told: &'static str,
    /// What is to be done for it at the next look.
    pending: Vec<Effect>,
}

/// What [`Updates::new`] has to know of the machine.
pub struct Machine {
    /// All that is asked of it.
    pub kernel: &'static dyn Kernel,
    /// Where problems are told.
    pub console: &'static Console<'static>,
    /// Drivers.
    pub modules: Option<Arc<Modules<'static>>>,
    /// The boot disk, `vda`.
    pub disk: String,
    /// Which root runs: `a` or `b`.
    pub slot: String,
    /// The running version.
    pub version: String,
    /// `amd64` or `arm64`.
    pub arch: String,
    /// `production` or `debug`.
    pub variant: String,
    /// Release counter of the running image.
    pub counter: u64,
    /// Id of this boot.
    pub boot_id: String,
}

impl Updates {
    /// Nothing is looked at yet.
    pub fn new(machine: Machine) -> Self {
        let Machine {
            kernel,
            console,
            modules,
            disk,
            slot,
            version,
            arch,
            variant,
            counter,
            boot_id,
        } = machine;
        let engine =
            Engine { kernel, modules, disk, slot, version, arch, variant, counter, boot_id };
        Self {
            engine,
            console,
            progress: Progress::default(),
            writing: false,
            trial: None,
            gate: None,
            missing: None,
            status: None,
            other: None,
            unlinked: None,
            next_look: Duration::ZERO,
            told: "",
            pending: Vec::new(),
        }
    }

    /// Looks where an update stands, and ends what was cut off. `started` is false when only PID 1 itself was.
    pub fn begin(&mut self, now: Duration, started: bool) {
        let kernel = self.engine.kernel;
        let seen = boot::seen_versions(kernel);
        self.other = seen.into_iter().find(|version| *version != self.engine.version);
        let Some(trial) = records::trial(kernel) else {
            if started && boot::has_loader(kernel) {
                self.count_start();
            }
            return;
        };
        let entries = match self.engine.entries() {
            Ok(entries) => entries,
            Err(error) => return self.tell(&error),
        };
        let Engine { version, boot_id, .. } = &self.engine;
        let duty = self::core::assess(version, boot_id, &entries, Some(&trial));
        let blessed = entries.iter().find(|entry| entry.is_blessed() && entry.version != *version);
        self.other = blessed.map(|entry| entry.version.clone());
        let status = |step, reason: &str| {
            let (version, from) = (trial.version.clone(), trial.from.clone());
            Some(Status { version, from, step, percent: 100, reason: reason.into() })
        };
        let (event, reason) = match &duty {
            Duty::Nothing => return,
            Duty::Gate => {
                self.say(format_args!("version {version} is on trial, after {}", trial.from));
                self.status = status("trial", "");
                self.gate = Some(Gate::new(now));
                self.trial = Some(trial);
                return;
            }
            Duty::Committed => {
                self.status = status("committed", "");
                self.trial = Some(trial);
                return;
            }
            Duty::Finish => ("blessed", String::new()),
            Duty::GiveUp(reason) | Duty::RolledBack(reason) => ("rolled-back", reason.clone()),
            Duty::Stranded(reason) => {
                let what =
                    format!("version {version} was given up ({reason}), and there is no other");
                self.console.problem(PART, Problem::new(what, "send a version that is good"));
                ("blessed", reason.clone())
            }
            Duty::NotStarted(reason) => ("failed", (*reason).to_owned()),
        };
        self.status = status(event, &reason);
        match &duty {
            Duty::RolledBack(_) => {
                let what = format!("version {} was taken back: {reason}", trial.version);
                let what = format!("{what}; {version} runs");
                self.console.problem("version", Problem::new(what, "publish another version"));
            }
            Duty::NotStarted(_) => {
                self.say(format_args!("the update to {} was not started: {reason}", trial.version))
            }
            _ => {}
        }
        let steps = self::core::steps(&duty);
        self.settle(steps, &trial, event, &reason);
    }

    /// Carries out steps until one fails; the next start begins again.
    fn settle(&mut self, steps: &[Step], trial: &Trial, event: &str, reason: &str) {
        for step in steps {
            match step {
                Step::Restart => {
                    let why = format!("version {} is given up: {reason}", trial.version);
                    self.pending.push(Effect::Restart(why));
                }
                step => {
                    if let Err(error) = self.engine.settle(*step, trial, event, reason) {
                        self.tell(&error);
                        // A machine that has to go back goes back, whatever could not be written down.
                        if !steps.contains(&Step::Restart) {
                            return;
                        }
                    }
                }
            }
        }
        if manifest::is_digest(&trial.digest) {
            let folder = format!("{}/{}", records::FOLDER, trial.digest);
            let _ = self.engine.kernel.remove_folder(&folder); // only room
        }
    }

    /// A blessed version that does not become healthy several times gives way to the other one, once.
    fn count_start(&mut self) {
        let kernel = self.engine.kernel;
        if records::count_start(kernel, &self.engine.version) <= UNHEALTHY_MAX {
            return;
        }
        let entries = self.engine.entries().unwrap_or_default();
        let other =
            entries.iter().find(|entry| entry.is_blessed() && entry.version != self.engine.version);
        let Some(other) = other else { return };
        records::forget_starts(kernel);
        if boot::start_once(kernel, &other.version).is_err() {
            return; // a firmware that keeps no variables starts what it always starts
        }
        let reason = format!("it did not become healthy in {UNHEALTHY_MAX} starts");
        let trial = Trial {
            version: self.engine.version.clone(),
            from: other.version.clone(),
            ..Trial::default()
        };
        let _ = self.engine.settle(Step::Record, &trial, "unhealthy", &reason);
        let why = format!("{} is started once, because {} {reason}", other.version, trial.version);
        self.pending.push(Effect::Restart(why));
    }

    fn say(&self, text: std::fmt::Arguments<'_>) {
        self.console.say(Word::Update, text);
    }

    fn tell(&self, error: &Refusal) {
        self.console.problem(PART, Problem::new(chain(error), error.hint()));
    }

    /// Whether the running version has to pass the gate before it is called good.
    pub fn is_on_trial(&self) -> bool {
        self.gate.is_some()
    }

    /// Notes that a version which is not on trial is healthy.
    pub fn handle_healthy(&mut self) {
        records::forget_starts(self.engine.kernel);
    }

    /// What the agent says about the pods of a trial.
    pub fn handle_missing(&mut self, missing: Option<Vec<String>>) {
        self.missing = missing;
    }

    /// An order of the agent. It was checked and is being carried out when this returns without an error.
    ///
    /// # Errors
    ///
    /// [`Refusal`]; nothing was changed.
    pub fn handle_update(&mut self, ordered: &Ordered) -> Result<(), Refusal> {
        self.is_free()?;
        let kernel = self.engine.kernel;
        let digest = ordered.dir.strip_prefix(&format!("{}/", records::FOLDER));
        let digest = digest.filter(|digest| manifest::is_digest(digest));
        let digest = digest.ok_or_else(|| Refusal::Folder(ordered.dir.clone()))?;
        let read = |name: &str, most| kernel.read(&format!("{}/{name}", ordered.dir), most);
        let text = read(bundle::MANIFEST, manifest::BYTES_MAX).map_err(Refusal::NoManifest)?;
        let signature = read(bundle::SIGNATURE, bundle::SIGNATURE_BYTES).unwrap_or_default();
        let keys = trust::current(kernel).map_err(Refusal::Trust)?;
        if !trust::is_signed(&keys.keys, &text, &signature) {
            return Err(Refusal::Signature);
        }
        if crate::verity::hex(&Sha256::digest(&text)) != digest {
            return Err(Refusal::Digest);
        }
        let manifest = Manifest::parse(&text).map_err(Refusal::Manifest)?;
        // Who has ordered to go back may order to go on; a stick that was left in may not.
        let mut known = self.engine.known();
        known.bad.retain(|bad| !bad.ordered);
        fits(&manifest, digest, &known)?;
        let trial = Trial {
            version: manifest.version.clone(),
            from: self.engine.version.clone(),
            counter: manifest.release_counter,
            digest: digest.into(),
            pods: ordered.pods.iter().take(PODS_MAX).cloned().collect(),
            connected: ordered.connected,
            boot_id: self.engine.boot_id.clone(),
            ..Trial::default()
        };
        let order = Order { manifest, dir: ordered.dir.clone(), compared: false, trial };
        self.progress.begin(&order.trial.version, &self.engine.version);
        self.spawn(move |engine, progress| carry_out(engine, &order, progress));
        Ok(())
    }

    /// Puts the running version's boot file into a folder of `/state/update`, as [`RUNNING`]: what is fetched shares most of
    /// its blocks with it.
    ///
    /// # Errors
    ///
    /// [`Refusal`]; the agent fetches these blocks then.
    pub fn copy_boot_file(&self, dir: &str) -> Result<(), Refusal> {
        if self.writing {
            return Err(Refusal::Busy(self.status().unwrap_or_default().version));
        }
        if !boot::has_loader(self.engine.kernel) {
            return Err(Refusal::NoLoader);
        }
        let digest = dir.strip_prefix(&format!("{}/", records::FOLDER));
        match digest.is_some_and(manifest::is_digest) {
            true => self.engine.copy_running(&format!("{dir}/{RUNNING}")),
            false => Err(Refusal::Folder(dir.into())),
        }
    }

    /// Looks whether a stick has an update. `connected` and `pods` are what the agent has said last.
    pub fn look_for_stick(&mut self, connected: bool, pods: u32) {
        if self.writing || self.trial.is_some() {
            return;
        }
        let sticks = usb::sticks(&self.engine);
        let Some(device) = sticks.into_iter().find(|device| usb::has_update(&self.engine, device))
        else {
            return;
        };
        if let Err(error) = self.is_free() {
            return self.tell(&error);
        }
        let trial = Trial { connected, pods_count: pods, ..Trial::default() };
        self.spawn(move |engine, progress| match usb::unpack(engine, &device, &trial, progress)? {
            Some(order) => carry_out(engine, &order, progress).map(Some),
            None => Ok(None),
        });
    }

    /// Whether an update could begin now.
    fn is_free(&self) -> Result<(), Refusal> {
        if let Some(status) = self.status().filter(|_| self.writing || self.trial.is_some()) {
            return Err(Refusal::Busy(status.version));
        }
        if self.writing {
            return Err(Refusal::Busy("what is on the stick".into()));
        }
        if !boot::has_loader(self.engine.kernel) {
            return Err(Refusal::NoLoader);
        }
        let entries = self.engine.entries()?;
        let own = entries.iter().any(|one| one.is_blessed() && one.version == self.engine.version);
        match own {
            true => Ok(()),
            false => Err(Refusal::Unproved(self.engine.version.clone())),
        }
    }

    fn spawn<T: Into<Option<Trial>> + Send + 'static>(
        &mut self,
        work: impl FnOnce(&Engine, &Progress) -> Result<T, Refusal> + Send + 'static,
    ) {
        let (engine, progress) = (self.engine.clone(), self.progress.clone());
        let run = move || {
            // Pods and agent go first.
            engine.kernel.step_back();
            let outcome = match work(&engine, &progress) {
                Ok(trial) => match trial.into() {
                    Some(trial) => Ok(trial),
                    None => Err((String::new(), String::new())),
                },
                Err(error) => Err((chain(&error), error.hint())),
            };
            progress.end(outcome);
        };
        self.writing = true;
        if std::thread::Builder::new().name("update".into()).spawn(run).is_err() {
            let what = "there is no memory for an update".to_owned();
            self.progress.end(Err((what, "run fewer pods, or use a larger machine".into())));
        }
    }

    /// Goes back to the version before, by order.
    ///
    /// # Errors
    ///
    /// [`Refusal`]; nothing was changed.
    pub fn handle_rollback(&mut self, reason: &str) -> Result<(), Refusal> {
        if self.writing {
            return Err(Refusal::Busy(
                self.status().map_or_else(String::new, |status| status.version),
            ));
        }
        if !boot::has_loader(self.engine.kernel) {
            return Err(Refusal::NoLoader);
        }
        let entries = self.engine.entries()?;
        let version = &self.engine.version;
        let other = entries.iter().find(|one| one.is_blessed() && one.version != *version);
        let other = other.ok_or(Refusal::NoOther)?.version.clone();
        let reason = match reason {
            "" => "it was ordered".to_owned(),
            reason => format!("it was ordered ({})", crate::console::plain(reason)),
        };
        let trial = match self.trial.take().filter(|trial| trial.version == *version) {
            Some(trial) => trial,
            None => Trial {
                version: version.clone(),
                from: other.clone(),
                boot_id: self.engine.boot_id.clone(),
                ordered: true,
                ..Trial::default()
            },
        };
        self.gate = None;
        self.settle(&self::core::GIVE_UP, &trial, "rolled-back", &reason);
        Ok(())
    }

    /// What is to be done now. `connected` is whether there is a link to the hub.
    pub fn poll(&mut self, now: Duration, seen: &Seen) -> Vec<Effect> {
        let mut effects = std::mem::take(&mut self.pending);
        if now < self.next_look {
            return effects;
        }
        self.next_look = now + LOOK_INTERVAL;
        let outcome = self.progress.0.lock().expect("nothing panics with it").outcome.take();
        self.tell_step();
        if let Some(outcome) = outcome {
            self.take_outcome(outcome);
        }
        match (&self.trial, &mut self.gate) {
            (Some(trial), Some(gate)) => {
                let seen = Seen { missing: self.missing.clone(), ..seen.clone() };
                let verdict = gate.look(now, trial, &seen);
                let trial = trial.clone();
                effects.extend(self.take_verdict(verdict, &trial));
            }
            (Some(trial), None) => {
                let since = *self.unlinked.get_or_insert(now);
                if seen.connected {
                    self.unlinked = None;
                } else if now.saturating_sub(since) >= RESTART_AFTER {
                    self.unlinked = None;
                    effects.push(Effect::Restart(format!("update to {}", trial.version)));
                }
            }
            _ => {}
        }
        effects
    }

    /// One line for each step, so that whoever stands before the machine sees that it goes on.
    fn tell_step(&mut self) {
        let Some(status) = self.status().filter(|_| self.writing) else { return };
        if std::mem::replace(&mut self.told, status.step) != status.step {
            self.say(format_args!("version {}: {}", status.version, status.step));
        }
    }

    /// When to call [`Self::poll`] again.
    pub fn poll_timeout(&self) -> Option<Duration> {
        let waits = self.writing || self.trial.is_some() || !self.pending.is_empty();
        waits.then_some(self.next_look)
    }

    fn take_outcome(&mut self, outcome: Result<Trial, (String, String)>) {
        self.writing = false;
        self.told = "";
        let begun = self.progress.0.lock().expect("nothing panics with it").status.take();
        match outcome {
            Ok(trial) => {
                self.say(format_args!(
                    "version {} is written; the next start tries it",
                    trial.version
                ));
                self.console.solved(PART);
                self.other = None;
                self.status =
                    begun.map(|status| Status { step: "committed", percent: 100, ..status });
                self.trial = Some(trial);
            }
            // A stick without a bundle, or with the version that runs.
            Err((what, _)) if what.is_empty() => {}
            Err((what, hint)) => {
                self.status =
                    begun.map(|status| Status { step: "failed", reason: what.clone(), ..status });
                self.console.problem(PART, Problem::new(what, hint));
            }
        }
    }

    fn take_verdict(&mut self, verdict: Verdict, trial: &Trial) -> Vec<Effect> {
        let reason = match verdict {
            Verdict::Wait => return Vec::new(),
            Verdict::Fail(reason) => {
                self.gate = None;
                self.trial = None;
                self.status = self.status.take().map(|status| Status {
                    step: "rolled-back",
                    reason: reason.clone(),
                    ..status
                });
                self.settle(&self::core::GIVE_UP, trial, "rolled-back", &reason);
                return std::mem::take(&mut self.pending);
            }
            Verdict::Bless => "",
            Verdict::BlessOffline => "offline",
        };
        self.gate = None;
        self.trial = None;
        self.other = Some(trial.from.clone());
        self.status = self.status.take().map(|status| Status {
            step: "blessed",
            reason: reason.into(),
            ..status
        });
        self.say(format_args!(
            "version {} has proved itself{}",
            trial.version,
            if reason.is_empty() { "" } else { ", without a hub as before" }
        ));
        self.settle(&self::core::BLESS, trial, "blessed", reason);
        vec![Effect::Blessed]
    }

    /// How far an update is.
    pub fn status(&self) -> Option<Status> {
        let writing = self.progress.0.lock().expect("nothing panics with it").status.clone();
        writing.filter(|_| self.writing).or_else(|| self.status.clone())
    }

    /// What the trial waits for.
    pub fn trial_facts(&self) -> Option<TrialFacts> {
        let trial = self.trial.as_ref().filter(|_| self.gate.is_some())?;
        Some(TrialFacts {
            version: trial.version.clone(),
            pods: trial.pods.clone(),
            connected: trial.connected,
        })
    }

    /// The versions of this machine.
    pub fn releases(&self) -> Releases {
        let kernel = self.engine.kernel;
        Releases {
            running: self.engine.version.clone(),
            counter: records::counter(kernel).max(self.engine.counter),
            other: self.other.clone(),
            bad: records::bad(kernel),
        }
    }
}

/// Writes a checked update up to its commit; what was begun is taken back when that fails.
fn carry_out(engine: &Engine, order: &Order, progress: &Progress) -> Result<Trial, Refusal> {
    let written = write_all(engine, order, progress);
    if let Err(error) = &written {
        let reason = chain(error);
        for step in self::core::NOT_STARTED {
            let _ = engine.settle(step, &order.trial, "failed", &reason); // the next start does it again
        }
    }
    // Slot and boot partition have all of it now, or it is of no use.
    let _ = engine.kernel.remove_folder(&order.dir);
    written.map(|()| order.trial.clone())
}

fn write_all(engine: &Engine, order: &Order, progress: &Progress) -> Result<(), Refusal> {
    if boot::is_secure(engine.kernel) && !is_signed_program(engine, order) {
        return Err(Refusal::SecureBoot);
    }
    if !order.compared {
        engine.compare(order, progress)?;
    }
    self::core::UPDATE.iter().try_for_each(|step| engine.write(*step, order, progress))
}

/// Whether the UKI carries any signature for the firmware; whose it is, the firmware tells.
fn is_signed_program(engine: &Engine, order: &Order) -> bool {
    /// From the optional header of PE32+ to the fifth directory.
    const CERTIFICATES_AT: usize = 24 + 112 + 4 * 8;
    let path = format!("{}/{}", order.dir, manifest::UKI);
    let Ok(head) = engine.kernel.read_at(&path, 0, 4096) else { return false };
    let number = |at: usize| {
        let bytes = head.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    let Some(pe) = number(0x3c).filter(|pe| *pe < head.len()) else { return false };
    number(pe + CERTIFICATES_AT + 4).is_some_and(|len| len > 0)
}
