//! Programs that `skerry up` runs beside itself: started, started again when they end, and stopped in order.
//!
//! Callers: [`crate::site`] for agents, [`crate::demo`] for a broker and mappers.

use crate::up::write_whole;
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Pause before a program that died is started again; doubles while it dies young.
const RESTART_PAUSE: Duration = Duration::from_millis(100);
/// Longest such pause.
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(5);
/// A program that lived this long did not die young.
const LIFE_MIN: Duration = Duration::from_secs(10);
/// Longest time that a program may take to end after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// What to run.
pub(crate) struct Program {
    /// For messages.
    pub(crate) name: &'static str,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// What it prints goes to the end of this file.
    pub(crate) log: PathBuf,
    /// Holds the id of its process while it runs.
    pub(crate) pid_file: Option<PathBuf>,
}

/// A program that is kept running; dropped, it is killed.
pub(crate) struct Supervised {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Supervised {
    pub(crate) fn start(program: Program) -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn(supervise(program, stop.clone()));
        Self { stop, task }
    }

    /// Ends it and waits until it is gone.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        // Supervision ends by the token; a panic in it leaves nothing more to stop here.
        let _ = self.task.await;
    }
}

async fn supervise(program: Program, stop: CancellationToken) {
    let mut pause = RESTART_PAUSE;
    let name = program.name;
    loop {
        let born = Instant::now();
        match spawn(&program) {
            Ok(mut child) => {
                let pid = child.id().map(|pid| pid.to_string()).unwrap_or_default();
                if let Some(file) = &program.pid_file
                    && let Err(error) = write_whole(file, pid.as_bytes())
                {
                    let error = format!("{error:#}");
                    tracing::warn!(name, error, "its process id is not on disk");
                }
                tokio::select! {
                    status = child.wait() => {
                        let status = status.map_or_else(|e| e.to_string(), |s| s.to_string());
                        tracing::warn!(status, ?pause, "{name} ended; starting it again");
                    }
                    () = stop.cancelled() => return end(child, name, program.pid_file.as_deref()).await,
                }
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(error, ?pause, "{name} could not be started");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => return,
        }
        let young = born.elapsed() < LIFE_MIN;
        pause = if young { (pause * 2).min(RESTART_PAUSE_MAX) } else { RESTART_PAUSE };
    }
}

fn spawn(program: &Program) -> Result<Child> {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(&program.log)?;
    let mut command = Command::new(&program.program);
    command.args(&program.args);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // A group of its own, so that Ctrl-C reaches `skerry up` alone, which stops things in order.
    command.process_group(0).kill_on_drop(true);
    command.spawn().with_context(|| format!("could not start `{}`", program.program.display()))
}

async fn end(mut child: Child, name: &str, pid_file: Option<&Path>) {
    if let Some(pid) = child.id() {
        let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
        // Gone already is as good as signalled.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
    }
    if tokio::time::timeout(STOP_LIMIT, child.wait()).await.is_err() {
        tracing::warn!("{name} did not end in {} s; killing it", STOP_LIMIT.as_secs());
        if let Err(error) = child.kill().await {
            tracing::warn!(%error, "{name} could not be killed");
        }
    }
    if let Some(file) = pid_file {
        // Absent when it could not be written.
        let _ = std::fs::remove_file(file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_that_ends_is_started_again_until_it_is_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let pid_file = dir.path().join("pid");
        let running = Supervised::start(Program {
            name: "sh",
            program: "/bin/sh".into(),
            args: ["-c", "echo born; sleep 0.01; [ -e stay ] && exec sleep 600"]
                .map(OsString::from)
                .into(),
            log: log.clone(),
            pid_file: Some(pid_file.clone()),
        });
        let births = || std::fs::read_to_string(&log).unwrap_or_default().lines().count();
        let end = Instant::now() + Duration::from_secs(30);
        while births() < 3 {
            assert!(Instant::now() < end, "{} births", births());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        running.stop().await;
        let last = births();
        tokio::time::sleep(RESTART_PAUSE * 2).await;
        assert_eq!(births(), last);
        assert!(!pid_file.exists() || last > 0);
    }
}
