//! A program that a room runs, with its output in a file.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest time that a program gets to end after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Lines of a log that an error shows.
const TAIL: usize = 3;

/// A running program; dropped, it is killed.
pub(super) struct Part {
    name: &'static str,
    command: Command,
    child: Child,
    log: PathBuf,
}

impl Part {
    /// Starts `command` with its output added to `NAME.log` in `dir`.
    pub(super) fn start(name: &'static str, dir: &Path, mut command: Command) -> Result<Self> {
        let path = dir.join(format!("{name}.log"));
        let log = File::options().create(true).append(true).open(&path)?;
        let program = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("could not start `{program}`"))?;
        Ok(Self { name, command, child, log: path })
    }

    /// Ends the program, in order or by a blow, and starts it again.
    pub(super) fn restart(&mut self, in_order: bool) -> Result<()> {
        if in_order {
            self.end()?;
        } else {
            self.child.kill()?;
            self.child.wait()?;
        }
        self.child = self.command.spawn().context("could not start it again")?;
        Ok(())
    }

    /// Fails, with the end of its log, when the program has ended.
    pub(super) fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended ({status}): {}", self.name, self.tail());
        }
        Ok(())
    }

    /// Everything that it has said so far.
    pub(super) fn said(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The last lines of its log, in one.
    fn tail(&self) -> String {
        let text = self.said();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL)..].join(" | ")
    }

    /// Ends the program.
    pub(super) fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        // It may have ended by itself.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let start = Instant::now();
        while self.child.try_wait()?.is_none() {
            if start.elapsed() > STOP_LIMIT {
                self.child.kill()?;
                self.child.wait()?;
                bail!("{} did not end within {} s", self.name, STOP_LIMIT.as_secs());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // Ended already, or ends now; nobody is left to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
