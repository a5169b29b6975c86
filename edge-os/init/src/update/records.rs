//! What an update leaves on the state partition: the trial, the highest release counter, versions that failed, and a
//! history for people. Each file is written whole and durable, or not at all; one that cannot be read counts as not
//! there, and the image's own release counter still holds then.

use super::core::Trial;
use crate::kernel::Kernel;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;

/// Where downloads and sticks are unpacked, a folder for each manifest.
pub const FOLDER: &str = "/state/update";
/// The record of a trial.
pub const TRIAL: &str = "/state/boot/trial.json";
const COUNTER: &str = "/state/boot/counter.json";
const BAD: &str = "/state/boot/bad.json";
const HISTORY: &str = "/state/boot/history.jsonl";
const STARTS: &str = "/state/boot/starts.json";
/// Versions that failed and are remembered; the oldest is forgotten first.
pub const BAD_MAX: usize = 32;
/// Lines of the history.
pub const HISTORY_MAX: usize = 200;
/// Longest file.
const BYTES_MAX: usize = 256 * 1024;
/// Longest reason that is kept.
const REASON_LEN_MAX: usize = 400;

/// A version that failed, and is not taken again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bad {
    /// Its version.
    pub version: String,
    /// SHA-256 of its manifest, hexadecimal.
    pub digest: String,
    /// Why it was given up.
    pub reason: String,
    /// When, Unix seconds.
    pub time: i64,
    /// It was good, and going back from it was ordered.
    pub ordered: bool,
}

/// A line of the history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Unix seconds.
    pub time: i64,
    /// `blessed`, `rolled-back`, `failed`.
    pub event: String,
    /// The version that it is about.
    pub version: String,
    /// The one before.
    pub from: String,
    /// Why, or empty.
    pub reason: String,
}

/// Starts of a version that did not become healthy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Starts {
    /// The version.
    pub version: String,
    /// Starts in a row.
    pub unhealthy: u32,
}

fn read<T: DeserializeOwned>(kernel: &dyn Kernel, path: &str) -> Option<T> {
    serde_json::from_slice(&kernel.read(path, BYTES_MAX).ok()?).ok()
}

fn write<T: Serialize>(kernel: &dyn Kernel, path: &str, value: &T) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(value).expect("texts and numbers");
    bytes.push(b'\n');
    kernel.write(path, &bytes, 0o600)
}

/// The trial that is noted.
pub fn trial(kernel: &dyn Kernel) -> Option<Trial> {
    read(kernel, TRIAL)
}

/// Notes a trial.
///
/// # Errors
///
/// What the system says.
pub fn note_trial(kernel: &dyn Kernel, trial: &Trial) -> io::Result<()> {
    write(kernel, TRIAL, trial)
}

/// Forgets the trial.
///
/// # Errors
///
/// What the system says.
pub fn forget_trial(kernel: &dyn Kernel) -> io::Result<()> {
    match kernel.remove(TRIAL) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        // Its folder, so that it is gone for good.
        _ => kernel.flush("/state/boot"),
    }
}

/// The highest release counter of a version that was blessed here.
pub fn counter(kernel: &dyn Kernel) -> u64 {
    #[derive(Deserialize)]
    struct File {
        counter: u64,
    }
    read::<File>(kernel, COUNTER).map_or(0, |file| file.counter)
}

/// Remembers a release counter, unless a higher one is remembered.
///
/// # Errors
///
/// What the system says.
pub fn keep_counter(kernel: &dyn Kernel, new: u64) -> io::Result<()> {
    match new > counter(kernel) {
        true => write(kernel, COUNTER, &serde_json::json!({ "counter": new })),
        false => Ok(()),
    }
}

/// The versions that failed, oldest first.
pub fn bad(kernel: &dyn Kernel) -> Vec<Bad> {
    read(kernel, BAD).unwrap_or_default()
}

/// Remembers a version that failed; the first reason stays.
///
/// # Errors
///
/// What the system says.
pub fn mark_bad(kernel: &dyn Kernel, new: Bad) -> io::Result<()> {
    let mut all = bad(kernel);
    if all.iter().any(|one| one.version == new.version && one.digest == new.digest) {
        return Ok(());
    }
    all.push(Bad { reason: new.reason.chars().take(REASON_LEN_MAX).collect(), ..new });
    let from = all.len().saturating_sub(BAD_MAX);
    write(kernel, BAD, &&all[from..])
}

/// Adds a line to the history, unless its last one says the same.
///
/// # Errors
///
/// What the system says.
pub fn record(kernel: &dyn Kernel, event: &Event) -> io::Result<()> {
    let text = kernel.read(HISTORY, BYTES_MAX).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut events: Vec<Event> =
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    if events.last().is_some_and(|last| Event { time: event.time, ..last.clone() } == *event) {
        return Ok(());
    }
    events.push(event.clone());
    let from = events.len().saturating_sub(HISTORY_MAX);
    let lines = events[from..].iter().map(|event| serde_json::to_string(event).expect("texts"));
    let text = lines.fold(String::new(), |text, line| text + &line + "\n");
    kernel.write(HISTORY, text.as_bytes(), 0o600)
}

/// The history, oldest first.
pub fn history(kernel: &dyn Kernel) -> Vec<Event> {
    let text = kernel.read(HISTORY, BYTES_MAX).unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

/// Counts a start of this version; returns how many in a row, this one among them, have not become healthy.
pub fn count_start(kernel: &dyn Kernel, version: &str) -> u32 {
    let known = read::<Starts>(kernel, STARTS).filter(|starts| starts.version == version);
    let unhealthy = known.map_or(0, |starts| starts.unhealthy).saturating_add(1);
    // On a state that cannot be written there is nothing to count on.
    let _ = write(kernel, STARTS, &Starts { version: version.into(), unhealthy });
    unhealthy
}

/// The running version has become healthy.
pub fn forget_starts(kernel: &dyn Kernel) {
    if kernel.exists(STARTS) {
        let _ = kernel.remove(STARTS); // counted once too often then
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Machine;

    #[test]
    fn failed_versions_and_history_are_bounded_and_repeat_nothing() {
        let machine = Machine::new();
        for number in 0..BAD_MAX + 5 {
            let one =
                Bad { version: number.to_string(), reason: "x".repeat(999), ..Bad::default() };
            mark_bad(&machine, one.clone()).unwrap();
            mark_bad(&machine, Bad { reason: "another".into(), ..one }).unwrap();
        }
        let all = bad(&machine);
        assert_eq!((all.len(), all[0].version.as_str()), (BAD_MAX, "5"));
        assert!(all.iter().all(|one| one.reason.len() == REASON_LEN_MAX));
        for number in 0..HISTORY_MAX as i64 + 5 {
            let version = number.to_string();
            let event = |time| Event {
                time,
                event: "blessed".into(),
                version: version.clone(),
                from: "0".into(),
                reason: String::new(),
            };
            record(&machine, &event(number)).unwrap();
            record(&machine, &event(number + 1)).unwrap();
        }
        let history = history(&machine);
        assert_eq!((history.len(), history[0].time), (HISTORY_MAX, 5));
    }

    #[test]
    fn counter_never_falls_and_starts_are_those_of_one_version() {
        let machine = Machine::new();
        for (new, kept) in [(3, 3), (2, 3), (4, 4)] {
            keep_counter(&machine, new).unwrap();
            assert_eq!(counter(&machine), kept);
        }
        machine.file(COUNTER, b"garbage");
        assert_eq!(counter(&machine), 0, "the image's own still holds");
        assert_eq!([count_start(&machine, "1"), count_start(&machine, "1")], [1, 2]);
        assert_eq!(count_start(&machine, "2"), 1);
        forget_starts(&machine);
        assert_eq!(count_start(&machine, "2"), 1);
    }
}
