//! The local Git remote of `skerry up`: a bare repository whose first commit is the fleet template.

use crate::fault::hinted;
use anyhow::{Context, Result};
use std::path::Path;
use tokio::process::Command;

/// Branch that the reconciler follows.
pub(crate) const BRANCH: &str = "main";

/// Makes the bare repository unless it is there already. In the sites' files `NAME: number` of `vars` gets another number.
///
/// It is built beside its place and moved there when complete, so that a half-made remote is never used.
pub(crate) async fn remote(
    remote: &Path,
    template: Option<&Path>,
    vars: &[(&str, u16)],
) -> Result<()> {
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
    let copy = remote.with_extension("tree");
    if copy.exists() {
        tokio::fs::remove_dir_all(&copy).await?;
    }
    let tree = if vars.is_empty() {
        template
    } else {
        copy_tree(template, &copy, vars)
            .with_context(|| format!("could not copy the template to `{}`", copy.display()))?;
        &copy
    };
    let tree = ["--git-dir", &half.to_string_lossy(), "--work-tree", &tree.to_string_lossy()]
        .map(str::to_owned);
    git(&["add", "--all", "."], &half, Some(&tree)).await?;
    git(&["commit", "--quiet", "--message", "Start from the template"], &half, Some(&tree)).await?;
    // A bare repository has no index of its own; the one that `add` made is of no use to anybody.
    tokio::fs::remove_file(half.join("index")).await?;
    if copy.exists() {
        tokio::fs::remove_dir_all(&copy).await?;
    }
    tokio::fs::rename(&half, remote).await?;
    Ok(())
}

/// Copies files and folders; what is in `sites/` gets the numbers.
fn copy_tree(from: &Path, to: &Path, vars: &[(&str, u16)]) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    let is_sites = from.file_name().is_some_and(|name| name == "sites");
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (path, copy) = (entry.path(), to.join(entry.file_name()));
        match entry.file_type()? {
            kind if kind.is_dir() => copy_tree(&path, &copy, vars)?,
            kind if kind.is_file() && is_sites => {
                std::fs::write(&copy, with_vars(&std::fs::read_to_string(&path)?, vars))?;
            }
            kind if kind.is_file() => std::fs::copy(&path, &copy).map(drop)?,
            _ => {}
        }
    }
    Ok(())
}

fn with_vars(text: &str, vars: &[(&str, u16)]) -> String {
    let line = |line: &str| {
        let trimmed = line.trim_start();
        let indent = &line[..line.len() - trimmed.len()];
        let known = vars.iter().find(|(name, _)| {
            trimmed.split_once(": ").is_some_and(|(key, value)| {
                key == *name && value.trim_end().bytes().all(|byte| byte.is_ascii_digit())
            })
        });
        known.map_or_else(|| line.to_owned(), |(name, value)| format!("{indent}{name}: {value}"))
    };
    text.lines().map(|text| line(text) + "\n").collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_site_are_replaced_and_nothing_else() {
        let text = "spec:\n  vars:\n    brokerPort: 1883\n    # brokerPort: 1\n    port: 5\n    xbrokerPort: 2\n";
        let after = with_vars(text, &[("brokerPort", 40_000)]);
        assert_eq!(after, text.replace("brokerPort: 1883", "brokerPort: 40000"));
    }
}
