//! `cargo xtask up`: a whole fleet on this machine, and its smoke run.

use crate::{build, fleet::Fleet, image, images, pilot, setup, sh, smoke};
use anyhow::{Context, Result};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Change, cut, kill and heal the fleet, print one JSON line of figures, and stop
    #[arg(long)]
    smoke: bool,
    /// Boot the appliance in QEMU as the edge node, instead of a node on this machine
    #[arg(long, conflicts_with_all = ["smoke", "more"])]
    vm: bool,
    /// Folder of everything that runs (default: `up`, `up-vm` or `smoke` in Cargo's target folder)
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
        Self { smoke: true, vm: false, dir: None, profile: profile.into(), more: Vec::new() }
    }
}

/// Sets up, builds, and then becomes `skerry up`, or runs the smoke run.
pub(crate) fn run(args: Args) -> Result<ExitCode> {
    if args.vm {
        return machine(args.dir);
    }
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

/// Builds the appliance and becomes `skerry-pilot --up`: a hub, and a machine as its node.
fn machine(dir: Option<PathBuf>) -> Result<ExitCode> {
    setup::run_for(setup::For::Machines)?;
    let built = image::build(&image::Recipe::new(build::QUICK))?;
    let dir = match dir {
        Some(dir) => std::path::absolute(dir)?,
        None => build::target()?.join("up-vm"),
    };
    let mut player = pilot::player(&built)?;
    let error = player.arg("--up").arg(dir).exec();
    // Only returns when the program could not be started.
    Err(error).context("could not start `skerry-pilot`")
}
