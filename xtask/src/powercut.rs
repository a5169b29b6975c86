//! `cargo xtask powercut`: every disk that a power cut may leave in first boot, update and trial; see docs/powercut.md.

use crate::{image, pilot, setup};
use anyhow::Result;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Disks that are checked
    #[arg(long, default_value_t = 500)]
    images: usize,
    /// Of these, disks that are booted as well
    #[arg(long, default_value_t = 2)]
    boots: usize,
    /// Seed of what is lost; another one, other disks
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Cargo profile of the programs in the image; `quick` builds it fast and large
    #[arg(long, default_value = "quick")]
    profile: String,
    /// `table` or `json`
    #[arg(long, default_value = "table")]
    output: String,
}

/// Builds two versions and has the disks checked; exit code 1 when a claim does not hold.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    setup::run_for(setup::For::Machines)?;
    let release_key = image::release_key()?;
    let recipe = image::Recipe::new(&args.profile).trusting(&release_key);
    let built = image::build(&recipe)?;
    let newer = image::build(&recipe.version(pilot::NEWER.0, pilot::NEWER.1))?;
    let mut pilot = pilot::player(&built)?;
    pilot.arg("--release-key").arg(&release_key).arg("--newer").arg(newer.folder);
    pilot.args(["--powercut", &args.images.to_string(), "--boots", &args.boots.to_string()]);
    pilot.args(["--seed", &args.seed.to_string(), "--output", &args.output]);
    pilot::code(&mut pilot)
}
