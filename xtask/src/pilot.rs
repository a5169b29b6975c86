//! `cargo xtask pilot`: builds the appliance, boots it in every situation of the scenarios, and writes the report.

use crate::{build, image, setup, sh};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::{Command, ExitCode};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where pilot.html and pilot.json go (default: `pilot` in Cargo's target folder)
    #[arg(long)]
    report: Option<PathBuf>,
    /// Only this scenario; may be repeated
    #[arg(long)]
    only: Vec<String>,
    /// Show the scenarios and stop
    #[arg(long)]
    list: bool,
    /// Only those that CI runs
    #[arg(long)]
    ci: bool,
    /// Cargo profile of the programs in the image; `quick` builds it fast and large
    #[arg(long, default_value = "edge")]
    profile: String,
    /// Minutes for which the scenario of little memory watches its pods
    #[arg(long, default_value_t = 1)]
    hold: u64,
    /// `table` or `json`
    #[arg(long, default_value = "table")]
    output: String,
}

impl Args {
    /// The scenarios that are marked for CI, with programs that are there after the tests.
    pub(crate) fn ci() -> Self {
        Self {
            report: None,
            only: Vec::new(),
            list: false,
            ci: true,
            profile: build::QUICK.into(),
            hold: 1,
            output: "table".into(),
        }
    }
}

/// The version that boxes are updated to, and its release counter.
pub(crate) const NEWER: (&str, u64) = ("9.0.0", 9);
/// How the names of scenarios begin that need it.
const UPDATES: [&str; 2] = ["update_", "rollback_"];

/// Builds what is needed and plays the scenarios.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if args.list {
        let mut pilot = Command::new(build::pilot()?);
        pilot.args(["--list", "--output", &args.output]).args(args.ci.then_some("--ci"));
        return code(&mut pilot);
    }
    let report = match &args.report {
        Some(folder) => std::path::absolute(folder)?,
        None => build::target()?.join("pilot"),
    };
    setup::run_for(setup::For::Machines)?;
    let release_key = image::release_key()?;
    let recipe = image::Recipe::new(&args.profile).trusting(&release_key);
    let built = image::build(&recipe)?;
    let mut pilot = player(&built)?;
    let updates = args.only.is_empty() && !args.ci
        || args.only.iter().any(|name| UPDATES.iter().any(|start| name.starts_with(start)));
    if updates {
        pilot.arg("--release-key").arg(&release_key);
        pilot.arg("--newer").arg(image::build(&recipe.version(NEWER.0, NEWER.1))?.folder);
    }
    pilot.arg("--report").arg(&report).args(["--output", &args.output]);
    pilot.args(["--hold", &args.hold.to_string()]).args(args.ci.then_some("--ci"));
    pilot.args(args.only.iter().flat_map(|name| ["--only", name]));
    let signs =
        args.only.is_empty() && !args.ci || args.only.iter().any(|name| name == "secure_boot");
    if signs {
        let keys = image::keys()?;
        let signed = image::build(&image::Recipe::signed(&args.profile, &keys))?;
        pilot.arg("--signed").arg(&signed.folder).arg("--keys").arg(&keys);
    }
    code(&mut pilot)
}

/// `skerry-pilot` with everything that it needs to know of an image.
pub(crate) fn player(built: &image::Built) -> Result<Command> {
    let mut pilot = Command::new(&built.pilot);
    pilot.arg("--image").arg(&built.folder);
    pilot.arg("--programs").arg(built.skerry.parent().context("a program lies in a folder")?);
    pilot.arg("--template").arg(sh::root().join("fleet-repo-template"));
    pilot.arg("--kubectl").arg(setup::kubectl()?);
    pilot.arg("--firmware").arg(image::firmware(&built.skerry)?);
    Ok(pilot)
}

pub(crate) fn code(command: &mut Command) -> Result<ExitCode> {
    let status = command.status().with_context(|| {
        format!("could not start `{}`", command.get_program().to_string_lossy())
    })?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(2)))
}
