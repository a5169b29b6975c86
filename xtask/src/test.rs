//! Everything that CI runs: style, lints, tests of all rooms, the smoke run, the kubectl suite.
//!
//! Virtual machines are not in it yet: `cargo xtask pilot --ci` plays the scenarios that are meant for it.

use crate::{conformance, setup, sh, up};
use anyhow::{Result, ensure};
use std::process::ExitCode;

/// Runs it all; the first failure ends the run.
pub(crate) fn run(quick: bool) -> Result<()> {
    setup::run(!quick)?;
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
    }
    Ok(())
}
