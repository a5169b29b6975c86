//! The simulation of the link: many worlds from seeds, or one again with every step told.
//!
//! `testkit` does it; this builds its program and hands all arguments on but `--profile`, which comes first. Exit codes
//! are the program's: 0 every promise held, 1 one was broken, 2 wrong usage.

use crate::{build, sh};
use anyhow::{Context, Result};
use std::process::{Command, ExitCode};

/// Arguments of `cargo xtask sim` and `cargo xtask fuzz`.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// Cargo profile of the program; with `dev`, arithmetic that overflows is found too
    #[arg(long)]
    profile: Option<String>,
    /// Arguments of the program; `--help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    more: Vec<String>,
}

/// Builds and runs the program `name` of `testkit`, in `profile` if the arguments name none; its output is ours.
pub(crate) fn run(name: &str, profile: &str, args: &Args) -> Result<ExitCode> {
    let profile = args.profile.as_deref().unwrap_or(profile);
    let mut cargo = sh::cargo();
    cargo.current_dir(sh::root()).args(["build", "--locked", "--profile", profile]);
    sh::run(cargo.args(["-p", "skerry-testkit", "--bin", name]))?;
    let folder = build::target()?.join(if profile == "dev" { "debug" } else { profile });
    let status = Command::new(folder.join(name)).args(&args.more).status();
    let status = status.with_context(|| format!("could not start `{name}`"))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::from(2), Into::into))
}
