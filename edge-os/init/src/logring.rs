//! Logs on disk that cannot fill it: two files of a MiB for each service, and the kernel's words of the last boots.
//!
//! A flash disk wears out by being written, so each log also has a budget a minute; what is over it is counted and
//! dropped. A disk that does not take a line loses it: nobody waits for a log.

use crate::kernel::Kernel;
use std::time::Duration;

/// A file is put aside at this length.
pub const FILE_LEN_MAX: usize = 1 << 20;
/// Bytes that a log takes in a minute.
pub const MINUTE_LEN_MAX: usize = 256 * 1024;
/// Boots whose kernel log is kept, this one included.
pub const KERNEL_BOOTS: usize = 4;
/// Longest line; the rest of a longer one is another line.
const LINE_LEN_MAX: usize = 4096;
const MINUTE: Duration = Duration::from_secs(60);

/// The log of one service.
#[derive(Debug)]
pub struct Ring {
    path: String,
    len: usize,
    partial: Vec<u8>,
    minute: Duration,
    minute_len: usize,
    dropped: usize,
    last: LastWords,
}

/// What a program has said of its own end, in the form of our programs: `error: …`, then `hint: …`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LastWords {
    /// After `error: `.
    pub error: String,
    /// After `hint: `.
    pub hint: String,
}

impl Ring {
    /// Goes on with the file at `path`.
    pub fn open(kernel: &dyn Kernel, path: &str) -> Self {
        let len = kernel.read(path, FILE_LEN_MAX * 2).map_or(0, |bytes| bytes.len());
        Self {
            path: path.into(),
            len,
            partial: Vec::new(),
            minute: Duration::ZERO,
            minute_len: 0,
            dropped: 0,
            last: LastWords::default(),
        }
    }

    /// Takes what a service has said; whole lines are written with the time since the machine started. Returns them.
    pub fn take(&mut self, kernel: &dyn Kernel, now: Duration, bytes: &[u8]) -> Vec<String> {
        self.partial.extend_from_slice(bytes);
        let mut lines = Vec::new();
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            lines.push(self.partial.drain(..=end).collect::<Vec<_>>());
        }
        if self.partial.len() >= LINE_LEN_MAX {
            lines.push(std::mem::take(&mut self.partial));
        }
        let lines: Vec<String> =
            lines.iter().map(|line| String::from_utf8_lossy(line).trim_end().to_owned()).collect();
        let mut out = String::new();
        for line in &lines {
            if let Some(error) = line.strip_prefix("error: ") {
                self.last = LastWords { error: error.into(), hint: String::new() };
            } else if let Some(hint) = line.strip_prefix("hint: ") {
                self.last.hint = hint.into();
            }
            out.push_str(&format!("{}.{:03} {line}\n", now.as_secs(), now.subsec_millis()));
        }
        self.write(kernel, now, out.as_bytes());
        lines
    }

    /// Takes whole lines that have their time already.
    pub fn take_whole(&mut self, kernel: &dyn Kernel, now: Duration, lines: &[u8]) {
        self.write(kernel, now, lines);
    }

    /// What the program has said of its end; forgotten by this.
    pub fn take_last_words(&mut self) -> Option<LastWords> {
        let last = std::mem::take(&mut self.last);
        (!last.error.is_empty()).then_some(last)
    }

    fn write(&mut self, kernel: &dyn Kernel, now: Duration, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let mut out = Vec::new();
        if now.saturating_sub(self.minute) >= MINUTE {
            self.minute = now;
            self.minute_len = 0;
            if self.dropped > 0 {
                let dropped = std::mem::take(&mut self.dropped);
                out.extend(
                    format!("({dropped} bytes were dropped: too many in a minute)\n").bytes(),
                );
            }
        }
        if self.minute_len + bytes.len() > MINUTE_LEN_MAX {
            self.dropped += bytes.len();
        } else {
            out.extend_from_slice(bytes);
        }
        if out.is_empty() {
            return;
        }
        if self.len + out.len() > FILE_LEN_MAX {
            let _ = kernel.rename(&self.path, &format!("{}.1", self.path));
            self.len = 0;
        }
        self.minute_len += out.len();
        if kernel.append(&self.path, &out).is_ok() {
            self.len += out.len();
        }
    }
}

/// Puts the kernel's log of the boots before aside.
pub fn turn_kernel_log(kernel: &dyn Kernel, path: &str) {
    for boot in (1..KERNEL_BOOTS).rev() {
        let from = if boot == 1 { path.to_owned() } else { format!("{path}.{}", boot - 1) };
        if kernel.exists(&from) {
            let _ = kernel.rename(&from, &format!("{path}.{boot}"));
        }
    }
}

/// The line of a record of /dev/kmsg, which has priority, number and microseconds, then the text. `None` for anything
/// else.
pub fn kernel_line(record: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(record);
    let (head, rest) = text.split_once(';')?;
    let micros: u64 = head.split(',').nth(2)?.parse().ok()?;
    let line = rest.lines().next()?;
    Some(format!("[{:5}.{:06}] {line}\n", micros / 1_000_000, micros % 1_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Machine;

    #[test]
    fn log_is_two_files_of_a_mib_whatever_comes() {
        let machine = Machine::new();
        let mut ring = Ring::open(&machine, "/state/log/a.log");
        let line = format!("{}\n", "x".repeat(1000));
        for minute in 0..40 {
            for _ in 0..100 {
                ring.take(&machine, MINUTE * minute, line.as_bytes());
            }
        }
        let [current, before] = ["/state/log/a.log", "/state/log/a.log.1"]
            .map(|path| machine.text(path).expect("there"));
        assert!(current.len() <= FILE_LEN_MAX && before.len() <= FILE_LEN_MAX);
        assert!(before.len() > FILE_LEN_MAX / 2);
        assert!(machine.text("/state/log/a.log.2").is_none());
        let again = Ring::open(&machine, "/state/log/a.log");
        assert_eq!(again.len, current.len());
    }

    #[test]
    fn flood_is_cut_to_a_budget_and_counted() {
        let machine = Machine::new();
        let mut ring = Ring::open(&machine, "/l");
        for _ in 0..1000 {
            ring.take(&machine, MINUTE, format!("{}\n", "x".repeat(1000)).as_bytes());
        }
        assert!(machine.text("/l").expect("there").len() <= MINUTE_LEN_MAX);
        ring.take(&machine, MINUTE * 2, b"calm\n");
        let text = machine.text("/l").expect("there");
        assert!(
            text.contains("bytes were dropped") && text.ends_with("calm\n"),
            "{}",
            &text[text.len() - 200..]
        );
    }

    #[test]
    fn lines_are_put_together_and_last_words_kept() {
        let machine = Machine::new();
        let mut ring = Ring::open(&machine, "/l");
        assert!(ring.take(&machine, MINUTE, b"err").is_empty());
        let lines = ring.take(&machine, MINUTE, b"or: no token\nhint: make one\n");
        assert_eq!(lines, ["error: no token", "hint: make one"]);
        let last = ring.take_last_words().expect("said");
        assert_eq!((last.error.as_str(), last.hint.as_str()), ("no token", "make one"));
        assert_eq!(ring.take_last_words(), None);
        assert!(machine.text("/l").expect("there").starts_with("60.000 error: no token\n"));
    }

    #[test]
    fn disk_that_takes_nothing_loses_lines_and_stops_nobody() {
        let machine = Machine::new();
        machine.fail("append", 28);
        let mut ring = Ring::open(&machine, "/l");
        assert_eq!(ring.take(&machine, MINUTE, b"x\n").len(), 1);
    }

    #[test]
    fn kernel_logs_of_four_boots_are_kept() {
        let machine = Machine::new();
        for boot in 0..6 {
            turn_kernel_log(&machine, "/k");
            machine.file("/k", format!("{boot}").as_bytes());
        }
        let kept = ["/k", "/k.1", "/k.2", "/k.3", "/k.4"].map(|path| machine.text(path));
        assert_eq!(kept.map(|one| one.unwrap_or_default()), ["5", "4", "3", "2", ""]);
        let line = kernel_line(b"6,339,5140900,-;NET: Registered\n SUBSYSTEM=x\n");
        assert_eq!(line.as_deref(), Some("[    5.140900] NET: Registered\n"));
        assert_eq!(kernel_line(b"garbage"), None);
    }
}
