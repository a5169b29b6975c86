//! What PID 1 says: one line each on both consoles, readable by people and by the tests of the machine.
//!
//! `skerry: <seconds since boot>: <word>: <text>`; a problem is one plain sentence and is followed by a hint. The same
//! problem is said once; who asks for the facts gets all that still hold.

use crate::kernel::Kernel;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Problems that are kept; a box with more has one that matters.
pub const PROBLEMS_MAX: usize = 32;
/// Length of a line's text; a longer one is cut.
const TEXT_LEN_MAX: usize = 400;

/// What a line is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// The kernel has given over.
    Boot,
    /// First stage.
    Stage0,
    /// The boot disk.
    Disk,
    /// Verification of the root.
    Verity,
    /// The root filesystem.
    Root,
    /// Second stage.
    Stage1,
    /// The partition that is kept.
    State,
    /// What the owner wants.
    Site,
    /// The network.
    Network,
    /// The runtime of the pods.
    Containerd,
    /// EdgeCore.
    Agent,
    /// The MQTT broker.
    Broker,
    /// The link to the hub.
    Online,
    /// Connected, and the Node is registered.
    Ready,
    /// Another version.
    Update,
    /// What is wrong.
    Problem,
    /// What a person can do about it.
    Hint,
    /// The boot cannot go on.
    Emergency,
    /// The end.
    Shutdown,
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Boot => "boot",
            Self::Stage0 => "stage0",
            Self::Disk => "disk",
            Self::Verity => "verity",
            Self::Root => "root",
            Self::Stage1 => "stage1",
            Self::State => "state",
            Self::Site => "site",
            Self::Network => "network",
            Self::Containerd => "containerd",
            Self::Agent => "agent",
            Self::Broker => "broker",
            Self::Online => "online",
            Self::Ready => "ready",
            Self::Update => "update",
            Self::Problem => "problem",
            Self::Hint => "hint",
            Self::Emergency => "emergency",
            Self::Shutdown => "shutdown",
        })
    }
}

/// Something that a person should know.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Problem {
    /// What is wrong, one sentence.
    pub what: String,
    /// What to do; may be empty.
    #[serde(default)]
    pub hint: String,
}

impl Problem {
    /// A problem with a hint.
    pub fn new(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { what: what.into(), hint: hint.into() }
    }
}

/// The consoles, and the problems that were told.
pub struct Console<'a> {
    kernel: &'a dyn Kernel,
    problems: Mutex<Vec<(&'static str, Problem)>>,
    /// Only the kernel's log is written, and emergencies.
    silent: AtomicBool,
}

impl<'a> Console<'a> {
    /// Nothing was said yet.
    pub fn new(kernel: &'a dyn Kernel) -> Self {
        Self { kernel, problems: Mutex::new(Vec::new()), silent: AtomicBool::new(false) }
    }

    /// Whether the owner wants to see nothing there but emergencies; `false` at first.
    pub fn silence(&self, silent: bool) {
        self.silent.store(silent, Ordering::Relaxed);
    }

    /// One line.
    pub fn say(&self, word: Word, text: impl fmt::Display) {
        let now = self.kernel.uptime();
        let line = format!(
            "skerry: {}.{:03}: {word}: {}",
            now.as_secs(),
            now.subsec_millis(),
            plain(&text.to_string())
        );
        match self.silent.load(Ordering::Relaxed) && word != Word::Emergency {
            true => self.kernel.note(&line),
            false => self.kernel.say(&line),
        }
    }

    /// Tells of a problem of the part `of`, in place of the one that this part had. Says nothing when it is the same.
    pub fn problem(&self, of: &'static str, problem: Problem) {
        let mut problems = self.problems.lock().expect("no panic while it is held");
        if problems.iter().any(|(part, known)| *part == of && *known == problem) {
            return;
        }
        self.say(Word::Problem, &problem.what);
        if !problem.hint.is_empty() {
            self.say(Word::Hint, &problem.hint);
        }
        problems.retain(|(part, _)| *part != of);
        if problems.len() < PROBLEMS_MAX {
            problems.push((of, problem));
        }
    }

    /// The part `of` has no problem any more.
    pub fn solved(&self, of: &'static str) {
        self.problems.lock().expect("no panic while it is held").retain(|(part, _)| *part != of);
    }

    /// The problems that hold.
    pub fn problems(&self) -> Vec<Problem> {
        let problems = self.problems.lock().expect("no panic while it is held");
        problems.iter().map(|(_, problem)| problem.clone()).collect()
    }

    /// Takes over what an earlier stage has told already.
    pub fn remember(&self, of: &'static str, problem: Problem) {
        self.problems.lock().expect("no panic while it is held").push((of, problem));
    }
}

/// One line without control characters: what is said may come from a file or from the network.
pub fn plain(text: &str) -> String {
    let mut line: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(TEXT_LEN_MAX).collect();
    line.truncate(line.trim_end().len());
    line
}

/// An error with its sources, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Machine;

    #[test]
    fn silent_console_shows_emergencies_only_and_the_log_has_the_rest() {
        let machine = Machine::new();
        let console = Console::new(&machine);
        console.silence(true);
        console.problem("network", Problem::new("no answer", "plug it in"));
        console.say(Word::Emergency, "the end");
        assert_eq!(machine.said(), ["skerry: 0.000: emergency: the end"]);
        assert_eq!(machine.log_of("note skerry: 0.000: problem: no answer").len(), 1);
        console.silence(false);
        console.say(Word::Ready, "again");
        assert_eq!(machine.said().len(), 2);
    }

    #[test]
    fn lines_have_seconds_word_and_one_line_of_text_and_a_problem_is_said_once() {
        let machine = Machine::new();
        let console = Console::new(&machine);
        machine.advance_ms(1_234);
        console.say(Word::Disk, "vda\nsecond\u{1b}[2J");
        console.problem("network", Problem::new("no answer", "plug it in"));
        console.problem("network", Problem::new("no answer", "plug it in"));
        assert_eq!(
            machine.said(),
            [
                "skerry: 1.234: disk: vda second [2J",
                "skerry: 1.234: problem: no answer",
                "skerry: 1.234: hint: plug it in"
            ]
        );
        assert_eq!(console.problems().len(), 1);
        console.solved("network");
        assert!(console.problems().is_empty());
    }
}
