//! What a machine writes on its serial line, each line with the time at which it came.
//!
//! A reader thread takes the bytes; tests wait for lines. Escape sequences of firmware and loader are removed. Lines of
//! our own PID 1 have the form `skerry: <seconds since boot>: <word>: <text>` and are found wherever they start, since
//! firmware does not always end its last line.

use serde::Serialize;
use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Lines that are kept of one boot; later ones are counted only.
pub const LINES_MAX: usize = 50_000;
/// Bytes of one line; the rest of a longer one becomes the next line.
const LINE_MAX: usize = 4096;
/// How often a wait looks at the CPU time of a machine that says nothing.
const LOOK: Duration = Duration::from_millis(200);
/// Lines that an error shows.
const TAIL: usize = 12;
/// What the kernel writes when the emulated timer did not tick while it looked for it: on a busy host QEMU's threads get
/// their time too late. Nothing of the image has run by then.
const FAULTS: [&str; 2] =
    ["IO-APIC + timer doesn't work", "timer doesn't work through Interrupt-remapped IO-APIC"];
/// Beginning of our own lines.
const OURS: &str = "skerry: ";

/// One line.
#[derive(Debug, Clone, Serialize, PartialEq)]
pub struct Line {
    /// Wall seconds since QEMU was started.
    pub wall_s: f64,
    /// CPU seconds of the QEMU process.
    pub cpu_s: f64,
    /// Without its end and without escape sequences.
    pub text: String,
}

impl Line {
    /// The line as one of our own.
    pub fn word(&self) -> Option<Word<'_>> {
        word(&self.text)
    }
}

/// A line of our PID 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Word<'a> {
    /// Seconds since the kernel started.
    pub boot_s: f64,
    /// As `ready`.
    pub word: &'a str,
    /// The sentence.
    pub text: &'a str,
}

/// Reads one of our own lines.
pub fn word(line: &str) -> Option<Word<'_>> {
    let ours = &line[line.find(OURS)? + OURS.len()..];
    let mut parts = ours.splitn(3, ": ");
    let boot_s = parts.next()?.trim().parse().ok()?;
    let word = parts.next()?;
    // A word without a text may end with its colon.
    let (word, text) = (word.trim_end_matches(':'), parts.next().unwrap_or_default());
    let is_word = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric());
    is_word.then_some(Word { boot_s, word, text })
}

/// What is waited for.
#[derive(Debug, Clone, Copy)]
pub enum Want<'a> {
    /// Our line with this word.
    Word(&'a str),
    /// Our line with this word and, in any case of letters, one of these texts in its sentence.
    Saying(&'a str, &'a [&'a str]),
    /// Any line with this text in it.
    Text(&'a str),
}

impl Want<'_> {
    /// Whether a line is it.
    pub fn matches(&self, line: &Line) -> bool {
        match self {
            Self::Word(wanted) => line.word().is_some_and(|found| found.word == *wanted),
            Self::Saying(wanted, texts) => line.word().is_some_and(|found| {
                let said = found.text.to_lowercase();
                found.word == *wanted
                    && texts.iter().any(|text| said.contains(&text.to_lowercase()))
            }),
            Self::Text(text) => line.text.contains(text),
        }
    }
}

impl std::fmt::Display for Want<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Word(word) => write!(f, "`{word}`"),
            Self::Saying(word, texts) => write!(f, "`{word}` with {}", texts.join(" or ")),
            Self::Text(text) => write!(f, "\"{text}\""),
        }
    }
}

/// How long something may take: the CPU bound judges, the wall bound ends a machine that hangs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// CPU seconds of the QEMU process, counted from the start of the wait.
    pub cpu: Duration,
    /// Wall time, counted in the same way.
    pub wall: Duration,
}

impl Bound {
    /// So many CPU seconds, and wall time for a host that does a lot beside.
    pub const fn cpu_s(seconds: u64) -> Self {
        Self { cpu: Duration::from_secs(seconds), wall: Duration::from_secs(60 + 6 * seconds) }
    }

    /// So many seconds of wall time, whatever the machine does in them.
    pub const fn wall_s(seconds: u64) -> Self {
        Self { cpu: Duration::from_secs(100_000), wall: Duration::from_secs(seconds) }
    }
}

/// Why what was waited for was not seen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// The bound is over.
    #[error(
        "no {want} within {cpu_s:.0} CPU seconds ({wall_s:.0} s of wall time); the console ends with:\n{tail}"
    )]
    Late {
        /// What was waited for.
        want: String,
        /// CPU seconds that the machine used meanwhile.
        cpu_s: f64,
        /// Wall seconds.
        wall_s: f64,
        /// Last lines.
        tail: String,
    },
    /// The machine went off first.
    #[error("the machine went off before {want}; its console ends with:\n{tail}")]
    Off {
        /// What was waited for.
        want: String,
        /// Last lines.
        tail: String,
    },
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<Line>,
    dropped: u64,
    closed: bool,
    /// Newest known CPU time; kept when the process is gone.
    cpu: Duration,
}

/// The log of one boot; clones share it.
#[derive(Debug, Clone)]
pub struct Console {
    shared: Arc<(Mutex<State>, Condvar)>,
    start: Instant,
    pid: u32,
}

impl Console {
    /// Starts to read. `pid` is the process whose CPU time stamps the lines, `start` its beginning.
    pub fn read(mut from: impl Read + Send + 'static, pid: u32, start: Instant) -> Self {
        let console = Self { shared: Arc::default(), start, pid };
        let ours = console.clone();
        std::thread::spawn(move || {
            let mut cleaner = Cleaner::default();
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                let lines = cleaner.push(&buffer[..count]);
                if !lines.is_empty() {
                    ours.add(lines);
                }
            }
            let rest = cleaner.rest();
            ours.add(rest.into_iter().collect());
            ours.lock().closed = true;
            ours.shared.1.notify_all();
        });
        console
    }

    fn add(&self, texts: Vec<String>) {
        let cpu = self.cpu();
        let wall_s = self.start.elapsed().as_secs_f64();
        let mut state = self.lock();
        for text in texts {
            if state.lines.len() == LINES_MAX {
                state.dropped += 1;
            } else {
                state.lines.push(Line { wall_s, cpu_s: cpu.as_secs_f64(), text });
            }
        }
        self.shared.1.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().expect("no holder panics")
    }

    /// CPU time of the process: user and system, with that of its ended threads.
    pub fn cpu(&self) -> Duration {
        let now = cpu_time(self.pid);
        let mut state = self.lock();
        // Zero when the process is gone.
        state.cpu = state.cpu.max(now.unwrap_or_default());
        state.cpu
    }

    /// When the process was started.
    pub fn start(&self) -> Instant {
        self.start
    }

    /// How many lines there are; later waits may begin here.
    pub fn mark(&self) -> usize {
        self.lock().lines.len()
    }

    /// Every line so far.
    pub fn lines(&self) -> Vec<Line> {
        self.lock().lines.clone()
    }

    /// Shows every line on standard error as it comes, with a name before it, until the machine is off.
    pub fn follow(&self, name: &str) {
        let (console, name) = (self.clone(), name.to_owned());
        std::thread::spawn(move || {
            let mut shown = 0;
            loop {
                let (new, closed) = {
                    let state = console.lock();
                    (state.lines[shown..].to_vec(), state.closed)
                };
                for line in &new {
                    eprintln!("{name} {:7.2} {:7.2}  {}", line.wall_s, line.cpu_s, line.text);
                }
                shown += new.len();
                if closed {
                    break;
                }
                std::thread::sleep(LOOK);
            }
        });
    }

    /// The first line that is wanted, among those from `mark` on.
    pub fn find(&self, mark: usize, want: Want<'_>) -> Option<Line> {
        self.lock().lines.iter().skip(mark).find(|line| want.matches(line)).cloned()
    }

    /// The line that shows that the emulation was at fault, if there is one.
    pub fn fault(&self) -> Option<String> {
        let find = |text: &&str| self.find(0, Want::Text(text));
        FAULTS.iter().find_map(find).map(|line| line.text)
    }

    /// Waits for one of several things among the lines from `mark` on; returns its place in `wants` and its line.
    pub fn wait_any(
        &self,
        mark: usize,
        wants: &[Want<'_>],
        bound: Bound,
    ) -> Result<(usize, Line), WaitError> {
        let begin = Instant::now();
        let cpu_begin = self.cpu();
        let mut seen = mark;
        loop {
            let cpu = self.cpu().saturating_sub(cpu_begin);
            let state = self.lock();
            for line in state.lines.iter().skip(seen) {
                if let Some(which) = wants.iter().position(|want| want.matches(line)) {
                    return Ok((which, line.clone()));
                }
            }
            seen = seen.max(state.lines.len());
            let want = || wants.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
            if state.closed {
                return Err(WaitError::Off { want: want(), tail: tail(&state.lines) });
            }
            if cpu > bound.cpu || begin.elapsed() > bound.wall {
                return Err(WaitError::Late {
                    want: want(),
                    cpu_s: cpu.as_secs_f64(),
                    wall_s: begin.elapsed().as_secs_f64(),
                    tail: tail(&state.lines),
                });
            }
            // Woken early or late is the same: the loop looks again.
            let _ = self.shared.1.wait_timeout(state, LOOK);
        }
    }

    /// Waits for one thing among the lines from `mark` on.
    pub fn wait(&self, mark: usize, want: Want<'_>, bound: Bound) -> Result<Line, WaitError> {
        self.wait_any(mark, &[want], bound).map(|(_, line)| line)
    }

    /// Waits until the serial line is closed, which is when the machine is off.
    pub fn wait_off(&self, bound: Bound) -> Result<(), WaitError> {
        match self.wait_any(usize::MAX, &[], bound) {
            Err(WaitError::Late { cpu_s, wall_s, tail, .. }) => {
                Err(WaitError::Late { want: "power off".into(), cpu_s, wall_s, tail })
            }
            _ => Ok(()),
        }
    }
}

fn tail(lines: &[Line]) -> String {
    let last = &lines[lines.len().saturating_sub(TAIL)..];
    last.iter().map(|line| format!("  {}", line.text)).collect::<Vec<_>>().join("\n")
}

/// User and system time of a process; `None` when it is gone.
pub fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain anything; the fields after it are plain.
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 1000 / ticks_per_s()))
}

fn ticks_per_s() -> u64 {
    let asked = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK);
    asked.ok().flatten().and_then(|ticks| u64::try_from(ticks).ok()).unwrap_or(100).max(1)
}

/// Makes lines of bytes: ends at LF, drops CR, escape sequences and other control characters.
#[derive(Debug, Default)]
struct Cleaner {
    line: Vec<u8>,
    escape: Escape,
}

#[derive(Debug, Default, PartialEq)]
enum Escape {
    #[default]
    No,
    Begun,
    /// Inside `ESC [ …`, which a letter ends.
    Sequence,
}

impl Cleaner {
    fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for &byte in bytes {
            match (&self.escape, byte) {
                (Escape::Begun, b'[') => self.escape = Escape::Sequence,
                (Escape::Begun, _) => self.escape = Escape::No,
                (Escape::Sequence, 0x40..=0x7e) => self.escape = Escape::No,
                (Escape::Sequence, _) => {}
                (Escape::No, 0x1b) => self.escape = Escape::Begun,
                (Escape::No, b'\n') => lines.extend(self.rest()),
                (Escape::No, b'\t' | 0x20..) => {
                    self.line.push(byte);
                    if self.line.len() == LINE_MAX {
                        lines.extend(self.rest());
                    }
                }
                (Escape::No, _) => {}
            }
        }
        lines
    }

    fn rest(&mut self) -> Option<String> {
        let line = std::mem::take(&mut self.line);
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        (!text.is_empty()).then_some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn console() -> (Console, std::io::PipeWriter) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Console::read(reader, std::process::id(), Instant::now()), writer)
    }

    #[test]
    fn our_lines_are_read_wherever_they_start() {
        let line = "BdsDxe: starting skerry: 12.345: problem: the token is wrong: it is expired";
        let found = word(line).unwrap();
        assert_eq!(found.boot_s, 12.345);
        assert_eq!((found.word, found.text), ("problem", "the token is wrong: it is expired"));
        assert_eq!(word("skerry: 1.000: ready:").unwrap().word, "ready");
        for foreign in ["skerry: is up", "skerry: 1.0", "skerry: 1.0: two words: x", "ready"] {
            assert_eq!(word(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn escapes_and_carriage_returns_are_removed() {
        let mut cleaner = Cleaner::default();
        let lines = cleaner.push(b"\x1b[2J\x1b[01;01Hhel\x1b[0mlo\r\n\r\nwor");
        assert_eq!(lines, ["hello"]);
        assert_eq!(cleaner.push(b"ld\n"), ["world"]);
        assert_eq!(cleaner.push(&[b'a'; LINE_MAX + 1]).len(), 1);
    }

    #[test]
    fn wait_sees_lines_of_before_and_after_its_start() {
        let (console, mut pipe) = console();
        writeln!(pipe, "skerry: 0.100: boot: here").unwrap();
        let bound = Bound::wall_s(10);
        console.wait(0, Want::Word("boot"), bound).unwrap();
        let mark = console.mark();
        let later = std::thread::spawn(move || {
            writeln!(pipe, "skerry: 0.2: problem: No address from DHCP").unwrap();
            pipe
        });
        let wanted = Want::Saying("problem", &["dhcp"]);
        let (which, line) = console.wait_any(mark, &[Want::Text("never"), wanted], bound).unwrap();
        assert_eq!(which, 1);
        assert!(line.text.contains("No address"));
        drop(later.join().unwrap());
        console.wait_off(bound).unwrap();
        let error = console.wait(0, Want::Word("ready"), bound).unwrap_err();
        assert!(matches!(error, WaitError::Off { .. }), "{error}");
    }

    #[test]
    fn fault_of_the_emulation_is_told_from_a_panic_of_the_product() {
        let (console, mut pipe) = console();
        writeln!(pipe, "Kernel panic - not syncing: dm-verity device corrupted").unwrap();
        console.wait(0, Want::Text("dm-verity"), Bound::wall_s(10)).unwrap();
        assert_eq!(console.fault(), None);
        writeln!(pipe, "Kernel panic - not syncing: IO-APIC + timer doesn't work!  Boot with")
            .unwrap();
        console.wait(0, Want::Text("IO-APIC"), Bound::wall_s(10)).unwrap();
        assert!(console.fault().is_some_and(|line| line.starts_with("Kernel panic")));
    }

    #[test]
    fn bound_ends_a_wait_and_shows_the_end_of_the_log() {
        let (console, mut pipe) = console();
        writeln!(pipe, "a last word").unwrap();
        console.wait(0, Want::Text("last"), Bound::wall_s(10)).unwrap();
        let short = Bound { cpu: Duration::from_secs(100), wall: Duration::from_millis(1) };
        let error = console.wait(0, Want::Word("ready"), short).unwrap_err().to_string();
        assert!(error.contains("no `ready`") && error.contains("a last word"), "{error}");
    }

    #[test]
    fn own_process_has_used_cpu_time_and_a_gone_one_has_none() {
        assert!(cpu_time(std::process::id()).is_some());
        assert_eq!(cpu_time(u32::MAX), None);
    }
}
