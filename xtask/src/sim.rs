//! The simulation of the link: many worlds from seeds, or one again with every step told.
//!
//! `testkit` does it; this builds its program and hands the arguments on. Exit codes are the program's: 0 every promise
//! held, 1 one was broken.

use crate::{build, sh};
use anyhow::{Context, Result};
use std::process::{Command, ExitCode};

/// Arguments of `cargo xtask sim`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many worlds, each from its own seed
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Run only this seed, and tell every step
    #[arg(long, conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
    /// `table` or `json`; the last line of the latter is `{"seeds","violations"}`
    #[arg(long, default_value = "table", value_parser = ["table", "json"])]
    output: String,
    /// Cargo profile of the simulation
    #[arg(long, default_value = "release")]
    profile: String,
}

/// Runs it.
pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let mut more = vec!["--output".to_owned(), args.output];
    match args.seed {
        Some(seed) => more.extend(["--seed".into(), seed.to_string()]),
        None => more.extend([
            "--seeds".into(),
            args.seeds.to_string(),
            "--from".into(),
            args.from.to_string(),
        ]),
    }
    program("sim", &args.profile, &more)
}

/// Builds and runs a program of `testkit`; its output is ours.
pub(crate) fn program(name: &str, profile: &str, args: &[String]) -> Result<ExitCode> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(sh::root()).args(["build", "--locked", "--profile", profile]);
    sh::run(cargo.args(["-p", "skerry-testkit", "--bin", name]))?;
    let folder = build::target()?.join(if profile == "dev" { "debug" } else { profile });
    let status = Command::new(folder.join(name)).args(args).status();
    let status = status.with_context(|| format!("could not start `{name}`"))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::from(2), Into::into))
}
