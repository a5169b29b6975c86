//! The local Git remote of `skerry up`: a bare repository whose first commit is the fleet template.

use crate::fault::hinted;
use anyhow::{Context, Result};
use std::path::Path;
use tokio::process::Command;

/// Branch that the reconciler follows.
pub(crate) const BRANCH: &str = "main";

/// Makes the bare repository unless it is there already.
///
/// It is built beside its place and moved there when complete, so that a half-made remote is never used.
pub(crate) async fn remote(remote: &Path, template: Option<&Path>) -> Result<()> {
    if remote.join("HEAD").exists() {
        return Ok(());
    }
    let template =
        template.filter(|folder| folder.join("fleet.yaml").is_file()).ok_or_else(|| {
            hinted(
                format!(
                    "the fleet remote `{}` is to be made, and no template is known",
                    remote.display()
                ),
                "name a folder that holds fleet.yaml with --template",
            )
        })?;
    let half = remote.with_extension("half");
    if half.exists() {
        tokio::fs::remove_dir_all(&half).await?;
    }
    git(&["init", "--quiet", "--bare", "--initial-branch", BRANCH], &half, None).await?;
    let tree = ["--git-dir", &half.to_string_lossy(), "--work-tree", &template.to_string_lossy()]
        .map(str::to_owned);
    git(&["add", "--all", "."], &half, Some(&tree)).await?;
    git(&["commit", "--quiet", "--message", "Start from the template"], &half, Some(&tree)).await?;
    // A bare repository has no index of its own; the one that `add` made is of no use to anybody.
    tokio::fs::remove_file(half.join("index")).await?;
    tokio::fs::rename(&half, remote).await?;
    Ok(())
}

async fn git(args: &[&str], half: &Path, tree: Option<&[String]>) -> Result<()> {
    let mut command = Command::new("git");
    match tree {
        Some(tree) => {
            // The template's own folder is the working tree; nothing is written into it.
            command.args(tree).args(args).current_dir(&tree[3]);
        }
        None => {
            command.args(args).arg(half);
        }
    }
    for (key, value) in [
        ("GIT_AUTHOR_NAME", "Skerry"),
        ("GIT_AUTHOR_EMAIL", "skerry@localhost"),
        ("GIT_COMMITTER_NAME", "Skerry"),
        ("GIT_COMMITTER_EMAIL", "skerry@localhost"),
    ] {
        command.env(key, value);
    }
    let done = command.output().await.map_err(|error| {
        hinted(
            format!("could not start git: {error}"),
            "run `cargo xtask setup`, which installs it",
        )
    })?;
    if !done.status.success() {
        let text = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        return Err(anyhow::anyhow!(text)).with_context(|| format!("`git {}` failed", args[0]));
    }
    Ok(())
}
