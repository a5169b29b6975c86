//! Everything that CI runs: style, lints, tests of all rooms, the smoke run, the kubectl suite, some scenarios of the pilot.
//!
//! Of the pilot only those that are marked for it are played, with unoptimised programs: `cargo xtask pilot --list` shows
//! which, the run names them, and `cargo xtask pilot` plays all.

use crate::{conformance, pilot, setup, sh, up};
use anyhow::{Context, Result, ensure};
use std::process::ExitCode;

/// Runs it all; the first failure ends the run.
pub(crate) fn run(quick: bool) -> Result<()> {
    setup::run(!quick)?;
    if !quick {
        // Before minutes of other work: without QEMU the run cannot end well.
        setup::run_for(setup::For::Machines)?;
    }
    for args in [
        &["fmt", "--all", "--check"][..],
        &["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"],
        &["test", "--locked", "--workspace"],
    ] {
        let mut cargo = sh::cargo();
        sh::run(cargo.current_dir(sh::root()).args(args))?;
    }
    if !quick {
        let smoke = up::run(up::Args::smoke("dev"))?;
        ensure!(smoke == ExitCode::SUCCESS, "the smoke run failed");
        let suite = conformance::run(conformance::Args::embedded("dev"))?;
        ensure!(suite == ExitCode::SUCCESS, "the kubectl suite failed");
        let machines = pilot::run(&pilot::Args::ci()).context(
            "the pilot could not be played; it needs QEMU and the Debian packages of image/packages.lock, which come \
             through this machine's apt",
        )?;
        ensure!(machines == ExitCode::SUCCESS, "a scenario of the pilot failed");
    }
    Ok(())
}
