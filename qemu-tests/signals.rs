//! Ctrl-C and SIGTERM: no machine and no hub outlives this program.

use anyhow::Result;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

/// Calls `act` at each of the two signals, from a thread of its own.
///
/// They are handled, not blocked: children would inherit a blocked signal and could not be stopped with it.
pub(crate) fn hear(act: impl Fn() + Send + 'static) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => act(),
                    _ = terminate.recv() => act(),
                }
            }
        });
    });
    Ok(())
}

/// Ends every child in its own way, then this program.
pub(crate) fn end_all() {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    for task in tasks {
        let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for pid in children.split_whitespace().filter_map(|word| word.parse().ok()) {
            // Ended by itself is as good.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
    }
    std::process::exit(2);
}
