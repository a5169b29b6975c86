//! Building the programs that the other verbs drive.

use crate::sh;
use anyhow::{Context, Result};
use std::path::PathBuf;
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
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(sh::root()).args(["build", "--locked", "--profile", profile]);
    // The whole workspace, as the tests build it: another selection would build dependencies anew with other features.
    sh::run(cargo.args(["--workspace", "--bins"]))?;
    let folder = target()?.join(if profile == "dev" { "debug" } else { profile });
    Ok(Programs { skerry: folder.join("skerry"), edgecore: folder.join("edgecore") })
}

/// Cargo's target folder of this workspace.
pub(crate) fn target() -> Result<PathBuf> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(sh::root()).args(["metadata", "--locked", "--no-deps", "--format-version=1"]);
    let metadata: serde_json::Value = serde_json::from_str(&sh::output(&mut cargo)?)?;
    let folder = metadata["target_directory"].as_str().context("cargo names no target folder")?;
    Ok(folder.into())
}
