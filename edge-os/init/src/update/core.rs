//! What an update does next, decided without looking: names of files, the record of a trial, and the time go in; steps
//! come out.
//!
//! The order of [`UPDATE`] is the whole promise: until [`Step::Commit`] writes the first sector of the new UKI, the
//! loader sees nothing but the version that runs; from then on it sees two, of which the old one is never written again.
//!
//! ```text
//!            UPDATE: free, write, verify, note, UKI without its head, compare, commit
//!  nothing ------------------------------------------------------------------------> committed
//!     ^                                                                                 | restart
//!     |            not started: the head was never written                              v
//!     +<----------------------------------------------------------------------------- trial
//!     |  rolled back: its tries are spent                       gate passed: BLESS      |
//!     +<--------------------------------------------------------------------------------+
//! ```
//!
//! [`assess`] says at every start of the machine where in this picture it is; each list of steps may be cut anywhere and
//! is begun again from what is found then. Carried out by [`super::execution`]; the simulation in the tests cuts the
//! power after every step and loses every write that was not flushed.
//!
//! Source of names and counters: the Boot Loader Specification of the UAPI group, "Boot counting".

use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::time::Duration;

/// Longest time that a new version has to prove itself.
pub const GATE_MAX: Duration = Duration::from_secs(600);
/// Looks without a hub that are enough where there was none before.
pub const LOCAL_CHECKS: u32 = 3;
/// Time between two of them.
pub const LOCAL_INTERVAL: Duration = Duration::from_secs(20);
/// The agent's sign of life may be this old.
pub const BEAT_MAX: Duration = Duration::from_secs(60);
/// Starts of a blessed version in a row that did not become healthy, until the other version is started once.
pub const UNHEALTHY_MAX: u32 = 5;
/// Without a link for so long after the commit, PID 1 restarts by itself.
pub const RESTART_AFTER: Duration = Duration::from_secs(300);

/// A version's file on the ESP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The file's name.
    pub name: String,
    /// The version in it.
    pub version: String,
    /// Tries that are left; `None` when the version has proved itself.
    pub left: Option<u32>,
    /// Tries that were made.
    pub done: u32,
    /// Whether its first sector is there, without which the loader does not see it.
    pub whole: bool,
}

impl Entry {
    /// Reads `skerry_V.efi`, `skerry_V+LEFT.efi`, `skerry_V+LEFT-DONE.efi`; `None` for another name.
    pub fn parse(name: &str, whole: bool) -> Option<Self> {
        let rest = name.strip_prefix("skerry_")?.strip_suffix(".efi")?;
        let (version, left, done) = match rest.rsplit_once('+') {
            None => (rest, None, 0),
            Some((version, counter)) => {
                let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
                (version, Some(left.parse().ok()?), done.parse().ok()?)
            }
        };
        crate::manifest::version_is_sound(version).then(|| Self {
            name: name.into(),
            version: version.into(),
            left,
            done,
            whole,
        })
    }

    /// Whether the loader counts it no more and it can be gone back to.
    pub fn is_blessed(&self) -> bool {
        self.left.is_none() && self.whole
    }
}

/// What is known of an update from before its commit until its end; `/state/boot/trial.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Trial {
    /// The new version.
    pub version: String,
    /// The one that it comes after.
    pub from: String,
    /// Release counter of the new version.
    pub counter: u64,
    /// SHA-256 of its manifest, hexadecimal.
    pub digest: String,
    /// Pods that ran before, `namespace/name`.
    pub pods: Vec<String>,
    /// How many pods ran before, when their names are not known.
    pub pods_count: u32,
    /// Whether there was a link to the hub before.
    pub connected: bool,
    /// Id of the boot that has noted it.
    pub boot_id: String,
    /// Why it is given up, once it is.
    pub reason: Option<String>,
    /// Going back was ordered, of a version that was good: it may come again.
    pub ordered: bool,
}

/// Where an update stands at the start of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Duty {
    /// There is none.
    Nothing,
    /// The running version has to pass the gate.
    Gate,
    /// The running version has passed, and this was not written down to its end.
    Finish,
    /// The running version was given up, and was started once more.
    GiveUp(String),
    /// The running version was given up, and there is no other one.
    Stranded(String),
    /// It is committed, and this is still the boot that has done so.
    Committed,
    /// The version before runs again.
    RolledBack(String),
    /// It never came so far that it could be started.
    NotStarted(&'static str),
}

/// Where the update of `trial` stands. `entries` are the files of the ESP.
pub fn assess(running: &str, boot_id: &str, entries: &[Entry], trial: Option<&Trial>) -> Duty {
    let Some(trial) = trial else { return Duty::Nothing };
    // A power cut in a rename may leave both names; the one that counts nothing is the later one.
    let of_trial = entries.iter().filter(|entry| entry.version == trial.version);
    let found = of_trial.max_by_key(|entry| entry.left.is_none());
    if trial.version == running {
        let other = entries.iter().any(|entry| {
            entry.version != running && entry.whole && entry.left.is_none_or(|left| left > 0)
        });
        return match (&trial.reason, found) {
            (Some(reason), _) if other => Duty::GiveUp(reason.clone()),
            (Some(reason), _) => Duty::Stranded(reason.clone()),
            (None, Some(entry)) if entry.left.is_none() => Duty::Finish,
            _ => Duty::Gate,
        };
    }
    match found {
        Some(entry) if !entry.whole => Duty::NotStarted("it was cut off before it was complete"),
        Some(_) if trial.boot_id == boot_id && trial.reason.is_none() => Duty::Committed,
        Some(entry) => {
            let why = match (&trial.reason, entry.left, entry.done) {
                (Some(reason), ..) => reason.clone(),
                (None, Some(0), _) => {
                    format!("it did not become healthy in {} tries", crate::boot::TRIES)
                }
                (None, _, 0) => "the boot loader did not choose it".into(),
                (None, _, done) => format!("the firmware gave it up after {done} tries"),
            };
            Duty::RolledBack(why)
        }
        // Its reason is from the trial itself, or from the order to go back.
        None if trial.reason.is_some() => {
            Duty::RolledBack(trial.reason.clone().unwrap_or_default())
        }
        None => Duty::NotStarted("its file is not on the boot partition"),
    }
}

/// One thing to do. Each is durable when it is done, and can be done again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Remove every UKI but the running one, so that nothing refers to the other root any more.
    FreeSlot,
    /// Write the root into the other partition.
    WriteRoot,
    /// Read it back through verity.
    VerifyRoot,
    /// Note the trial.
    NoteTrial,
    /// Write the UKI, its first sector all zeros.
    WriteUki,
    /// Read it back from the disk and compare.
    VerifyUki,
    /// Write its first sector.
    Commit,
    /// Have the firmware's second entry name the version that runs.
    LastGood,
    /// Take the counter out of the running version's file name; the firmware's second entry follows.
    Bless,
    /// Remember the release counter.
    KeepCounter,
    /// Remember the version as bad, with its reason.
    MarkBad,
    /// Note the reason in the trial.
    NoteReason,
    /// Take the last tries from the running version.
    SpendTries,
    /// Remove the UKI of the trial.
    RemoveUki,
    /// A line for people, with how it ended.
    Record,
    /// Forget the trial.
    ForgetTrial,
    /// Start the machine again.
    Restart,
}

/// An update up to its commit.
pub const UPDATE: [Step; 8] = [
    Step::FreeSlot,
    Step::WriteRoot,
    Step::VerifyRoot,
    Step::NoteTrial,
    Step::WriteUki,
    Step::VerifyUki,
    Step::Commit,
    Step::LastGood,
];
/// The running version has passed.
pub const BLESS: [Step; 4] = [Step::Bless, Step::KeepCounter, Step::Record, Step::ForgetTrial];
/// The running version is given up, by the gate or by order.
pub const GIVE_UP: [Step; 4] = [Step::NoteReason, Step::MarkBad, Step::SpendTries, Step::Restart];
/// The version before runs again.
pub const ROLLED_BACK: [Step; 4] =
    [Step::MarkBad, Step::Record, Step::RemoveUki, Step::ForgetTrial];
/// The new version was never complete, or an update has failed before its commit.
pub const NOT_STARTED: [Step; 3] = [Step::Record, Step::RemoveUki, Step::ForgetTrial];

/// What a duty has to be done for at once.
pub fn steps(duty: &Duty) -> &'static [Step] {
    match duty {
        Duty::Nothing | Duty::Gate | Duty::Committed => &[],
        Duty::Finish | Duty::Stranded(_) => &BLESS,
        Duty::GiveUp(_) => &GIVE_UP,
        Duty::RolledBack(_) => &ROLLED_BACK,
        Duty::NotStarted(_) => &NOT_STARTED,
    }
}

/// What is seen of the machine while a new version proves itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// The state partition is mounted and can be written.
    pub state: bool,
    /// The runtime of pods answers.
    pub containerd: bool,
    /// There is something to run an agent for.
    pub agent: bool,
    /// Age of its last sign of life.
    pub beat: Option<Duration>,
    /// It has a link to the hub.
    pub connected: bool,
    /// Pods that it runs.
    pub pods: u32,
    /// Pods that ran before and do not, with why; `None` while the agent has not said.
    pub missing: Option<Vec<String>>,
}

/// What the gate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Not yet.
    Wait,
    /// Everything is as it was.
    Bless,
    /// Everything but the hub, which was not there before either.
    BlessOffline,
    /// The time is over.
    Fail(String),
}

/// The gate that a new version has to pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gate {
    until: Duration,
    checks: u32,
    next_check: Duration,
}

impl Gate {
    /// A gate that opens now; `now` is the time since the start of the machine, all of which counts.
    pub fn new(now: Duration) -> Self {
        Self { until: GATE_MAX.max(now), checks: 0, next_check: now }
    }

    /// When to look again, if nothing happens before.
    pub fn next(&self) -> Duration {
        self.next_check.min(self.until)
    }

    /// Looks once.
    pub fn look(&mut self, now: Duration, trial: &Trial, seen: &Seen) -> Verdict {
        let mut lacks = lacks(trial, seen);
        if lacks.is_empty() {
            if seen.connected || !seen.agent {
                return Verdict::Bless;
            }
            if trial.connected {
                lacks.push("there is no link to the hub, which was there before".into());
            } else if now >= self.next_check {
                self.checks += 1;
                self.next_check = now + LOCAL_INTERVAL;
                if self.checks >= LOCAL_CHECKS {
                    return Verdict::BlessOffline;
                }
            }
        } else {
            self.checks = 0;
            self.next_check = now + LOCAL_INTERVAL;
        }
        match now >= self.until && !lacks.is_empty() {
            true => Verdict::Fail(format!(
                "after {} minutes {}",
                GATE_MAX.as_secs() / 60,
                lacks.join("; ")
            )),
            false => Verdict::Wait,
        }
    }
}

/// What is not as it has to be, without the link.
fn lacks(trial: &Trial, seen: &Seen) -> Vec<String> {
    const PODS_SHOWN: usize = 4;
    let mut lacks = Vec::new();
    if !seen.state {
        lacks.push("the state partition cannot be written".to_owned());
    }
    if !seen.containerd {
        lacks.push("containerd does not answer".into());
    }
    if !seen.agent {
        return lacks;
    }
    if seen.beat.is_none_or(|age| age > BEAT_MAX) {
        lacks.push("the agent gives no sign of life".into());
        return lacks;
    }
    match &seen.missing {
        Some(missing) if !missing.is_empty() => {
            let shown = missing.iter().take(PODS_SHOWN).cloned().collect::<Vec<_>>().join(", ");
            lacks.push(format!("{} pods do not run: {shown}", missing.len()));
        }
        None if !trial.pods.is_empty() => {
            lacks.push("the agent does not say which pods run".into())
        }
        _ => {}
    }
    if seen.pods < trial.pods_count {
        lacks.push(format!("{} pods run, before there were {}", seen.pods, trial.pods_count));
    }
    lacks
}

/// Compares versions as the loader does when it chooses the newest.
///
/// Source: UAPI group, Version Format Specification.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    let counts = |byte: &u8| byte.is_ascii_alphanumeric() || b"~-^.".contains(byte);
    let run = |text: &[u8], of: fn(&u8) -> bool| text.iter().take_while(|byte| of(byte)).count();
    loop {
        while a.first().is_some_and(|byte| !counts(byte)) {
            a = &a[1..];
        }
        while b.first().is_some_and(|byte| !counts(byte)) {
            b = &b[1..];
        }
        let at = |text: &[u8], byte| text.first() == Some(&byte);
        if at(a, b'~') || at(b, b'~') {
            match (at(a, b'~'), at(b, b'~')) {
                (true, true) => (a, b) = (&a[1..], &b[1..]),
                (true, false) => return Ordering::Less,
                _ => return Ordering::Greater,
            }
            continue;
        }
        if a.is_empty() || b.is_empty() {
            return (!a.is_empty()).cmp(&!b.is_empty());
        }
        if let Some(mark) = b"-^.".iter().find(|mark| at(a, **mark) || at(b, **mark)) {
            match (at(a, *mark), at(b, *mark)) {
                (true, true) => (a, b) = (&a[1..], &b[1..]),
                (true, false) => return Ordering::Less,
                _ => return Ordering::Greater,
            }
            continue;
        }
        if a[0].is_ascii_digit() || b[0].is_ascii_digit() {
            let (len_a, len_b) = (run(a, u8::is_ascii_digit), run(b, u8::is_ascii_digit));
            let zeros =
                |text: &[u8], len| text[..len].iter().take_while(|byte| **byte == b'0').count();
            let (from_a, from_b) = (zeros(a, len_a), zeros(b, len_b));
            let order = (len_a > 0).cmp(&(len_b > 0)).then((len_a - from_a).cmp(&(len_b - from_b)));
            let order = order.then_with(|| a[from_a..len_a].cmp(&b[from_b..len_b]));
            if order.is_ne() {
                return order;
            }
            (a, b) = (&a[len_a..], &b[len_b..]);
        } else {
            let (len_a, len_b) = (run(a, u8::is_ascii_alphabetic), run(b, u8::is_ascii_alphabetic));
            let order = a[..len_a].cmp(&b[..len_b]);
            if order.is_ne() {
                return order;
            }
            (a, b) = (&a[len_a..], &b[len_b..]);
        }
    }
}
