//! Fuzzing of everything that reads what a peer sends, for longer than the tests do.
//!
//! `testkit` does it; this builds its program and hands the arguments on. Exit codes are the program's: 0 every promise
//! held, 1 one was broken, 2 wrong usage.

use crate::sim;
use anyhow::Result;
use std::process::ExitCode;

/// Arguments of `cargo xtask fuzz`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this target; all of them without it
    target: Option<String>,
    /// Run only this input, as hex
    #[arg(long, requires = "target")]
    input: Option<String>,
    /// Time per target, in seconds
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// First of the numbers from which inputs are made
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// `table` or `json`; the last line of the latter is `{"targets","inputs","violations"}`
    #[arg(long, default_value = "table", value_parser = ["table", "json"])]
    output: String,
    /// Cargo profile of the targets; with `dev`, arithmetic that overflows is found too
    #[arg(long, default_value = "dev")]
    profile: String,
}

/// Runs it.
pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let mut more: Vec<String> = args.target.into_iter().collect();
    let numbers = [("--seconds", args.seconds), ("--seed", args.seed)];
    more.extend(numbers.into_iter().flat_map(|(flag, number)| [flag.into(), number.to_string()]));
    more.extend(["--output".into(), args.output]);
    more.extend(args.input.into_iter().flat_map(|input| ["--input".into(), input]));
    sim::program("fuzz", &args.profile, &more)
}
