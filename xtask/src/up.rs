//! `cargo xtask up`: a whole fleet on this machine, and its smoke run.

use crate::{build, fleet::Fleet, images, setup, sh, smoke};
use anyhow::{Context, Result};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Change, cut, kill and heal the fleet, print one JSON line of figures, and stop
    #[arg(long)]
    smoke: bool,
    /// Folder of everything that runs (default: `up` or `smoke` in Cargo's target folder)
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Cargo profile of the programs; `release` takes four times as long to build and half the memory to run
    #[arg(long, default_value = "dev")]
    profile: String,
    /// More arguments for `skerry up`, after `--`: for example `--node lisbon-01-a --node porto-01-a`
    #[arg(last = true)]
    more: Vec<String>,
}

impl Args {
    /// A smoke run with programs of a profile.
    pub(crate) fn smoke(profile: &str) -> Self {
        Self { smoke: true, dir: None, profile: profile.into(), more: Vec::new() }
    }
}

/// Sets up, builds, and then becomes `skerry up`, or runs the smoke run.
pub(crate) fn run(args: Args) -> Result<ExitCode> {
    setup::run(false)?;
    let programs = build::programs(&args.profile)?;
    let folder = if args.smoke { "smoke" } else { "up" };
    let dir = match args.dir {
        Some(dir) => std::path::absolute(dir)?,
        None => build::target()?.join(folder),
    };
    let images = dir.join("images");
    images::pack(&images)?;
    if args.smoke {
        return match Fleet::start(&programs, &dir).and_then(smoke::run) {
            Ok(figures) => {
                println!("{figures}");
                Ok(ExitCode::SUCCESS)
            }
            Err(error) => {
                eprintln!("smoke failed: {error:#}");
                eprintln!("hint: the log is {}", dir.join("up.log").display());
                Ok(ExitCode::FAILURE)
            }
        };
    }
    let mut skerry = Command::new(&programs.skerry);
    skerry.arg("up").arg("--dir").arg(&dir).arg("--images").arg(images);
    skerry.arg("--template").arg(sh::root().join("fleet-repo-template"));
    skerry.arg("--edgecore").arg(&programs.edgecore).args(args.more);
    // Only returns when the program could not be started.
    Err(skerry.exec()).with_context(|| format!("could not start `{}`", programs.skerry.display()))
}
