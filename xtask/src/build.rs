//! Building the programs that the other verbs drive.

use crate::sh;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The built programs.
pub(crate) struct Programs {
    /// The `skerry` command.
    pub(crate) skerry: PathBuf,
    /// The agent.
    pub(crate) edgecore: PathBuf,
}

/// Builds `skerry` and `edgecore` with a Cargo profile.
pub(crate) fn programs(profile: &str) -> Result<Programs> {
    sh::say(format!("building (profile {profile}; the first build takes minutes)"));
    let mut cargo = sh::cargo();
    cargo.current_dir(sh::root()).args(["build", "--locked", "--profile", profile]);
    // The whole workspace, as the tests build it: another selection would build dependencies anew with other features.
    sh::run(cargo.args(["--workspace", "--bins"]))?;
    let folder = target()?.join(if profile == "dev" { "debug" } else { profile });
    Ok(Programs { skerry: folder.join("skerry"), edgecore: folder.join("edgecore") })
}

/// Triple of the appliance's programs. Named although it may be this machine's own: only then do flags for the static
/// program leave build scripts alone.
const APPLIANCE_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds what runs on the appliance, and puts stripped copies into one folder, which it returns.
///
/// PID 1 is static. The agent is dynamic; `quick` takes the one of the workspace's own build, which is there already.
pub(crate) fn appliance(profile: &str) -> Result<PathBuf> {
    let quick = profile == QUICK;
    let cargo_profile = if quick { "dev" } else { profile };
    let target = target()?;
    let out = target.join("appliance");
    sh::say(format!("building the appliance's programs (profile {profile})"));
    let cargo = || {
        let mut cargo = sh::cargo();
        cargo.current_dir(sh::root()).args(["build", "--locked", "--profile", cargo_profile]);
        cargo
    };
    let mut init = cargo();
    init.args(["--package", "skerry-init", "--bins", "--target", APPLIANCE_TARGET]);
    init.env("RUSTFLAGS", "-C target-feature=+crt-static").arg("--target-dir").arg(&out);
    sh::run(&mut init)?;
    let inner = if cargo_profile == "dev" { "debug" } else { cargo_profile };
    let init = out.join(APPLIANCE_TARGET).join(inner).join("skerry-init");
    let edgecore = if quick {
        programs(cargo_profile)?.edgecore
    } else {
        // Alone, so that no other room's features come in.
        sh::run(cargo().args(["--package", "skerry-edge", "--bin", "edgecore"]))?;
        target.join(inner).join("edgecore")
    };
    let folder = out.join(format!("programs-{profile}"));
    std::fs::create_dir_all(&folder)?;
    for program in [init, edgecore] {
        let name = program.file_name().context("a program has a name")?;
        strip(&program, &folder.join(name))?;
    }
    Ok(folder)
}

/// What holds verdicts against the truth; all static, stripped.
pub(crate) struct Truth {
    /// `skerry-qualify`.
    pub(crate) qualify: PathBuf,
    /// The driver.
    pub(crate) truth: PathBuf,
    /// PID 1 of its machines.
    pub(crate) init: PathBuf,
}

/// Builds `skerry-qualify` and the programs that check it.
pub(crate) fn truth(profile: &str) -> Result<Truth> {
    sh::say(format!("building skerry-qualify and its machines (profile {profile})"));
    let out = target()?.join("appliance");
    let mut cargo = sh::cargo();
    cargo.current_dir(sh::root()).args(["build", "--locked", "--profile", profile]);
    cargo.args(["--package", "skerry-qualify", "--package", "skerry-truth", "--bins"]);
    cargo.args(["--target", APPLIANCE_TARGET]).arg("--target-dir").arg(&out);
    sh::run(cargo.env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
    let inner = if profile == "dev" { "debug" } else { profile };
    let folder = out.join(APPLIANCE_TARGET).join(inner);
    let to = out.join(format!("truth-{profile}"));
    std::fs::create_dir_all(&to)?;
    let copy = |name: &str| -> Result<PathBuf> {
        strip(&folder.join(name), &to.join(name))?;
        Ok(to.join(name))
    };
    Ok(Truth {
        qualify: copy("skerry-qualify")?,
        truth: copy("skerry-truth")?,
        init: copy("skerry-truth-init")?,
    })
}

/// Profile of images that are built fast: unoptimised programs, light compression.
pub(crate) const QUICK: &str = "quick";

/// Copies a program without symbols. A copy that is the same already is left alone, so that its time stamp stays.
fn strip(program: &Path, to: &Path) -> Result<()> {
    let half = to.with_extension("half");
    sh::output(Command::new("strip").arg("--strip-all").arg("-o").arg(&half).arg(program))?;
    if to.exists() && std::fs::read(&half)? == std::fs::read(to)? {
        return Ok(std::fs::remove_file(half)?);
    }
    Ok(std::fs::rename(half, to)?)
}

/// Builds `skerry-pilot`, with the whole workspace: alone it would get dependencies with other features, built anew.
pub(crate) fn pilot() -> Result<PathBuf> {
    programs("dev")?;
    Ok(target()?.join("debug/skerry-pilot"))
}

/// Cargo's target folder of this workspace.
pub(crate) fn target() -> Result<PathBuf> {
    let mut cargo = sh::cargo();
    cargo.current_dir(sh::root()).args(["metadata", "--locked", "--no-deps", "--format-version=1"]);
    let metadata: serde_json::Value = serde_json::from_str(&sh::output(&mut cargo)?)?;
    let folder = metadata["target_directory"].as_str().context("cargo names no target folder")?;
    Ok(folder.into())
}
