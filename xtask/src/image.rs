//! `cargo xtask image`: an appliance image from this tree; the pilot, the benches and `up --vm` use the same recipe.

use crate::{build, images, setup, sh};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Cargo profile of the programs in it; `quick` builds it fast and large
    #[arg(long, default_value = "edge")]
    profile: String,
    /// More arguments for `skerry image build`, after `--`
    #[arg(last = true)]
    more: Vec<String>,
}

/// How an image is built.
#[derive(Clone, Copy)]
pub(crate) struct Recipe<'a> {
    /// Cargo profile of the programs in it, or [`build::QUICK`].
    profile: &'a str,
    /// Sign it for Secure Boot with the keys of this folder.
    keys: Option<&'a Path>,
    /// Key that signs its bundle, and that it trusts.
    release_key: Option<&'a Path>,
    /// Another version than that of the tree, with its release counter.
    version: Option<(&'a str, u64)>,
    /// Further arguments of the builder.
    more: &'a [String],
}

impl<'a> Recipe<'a> {
    /// Unsigned, with the programs of a profile.
    pub(crate) fn new(profile: &'a str) -> Self {
        Self { profile, keys: None, release_key: None, version: None, more: &[] }
    }

    /// The same as another version.
    pub(crate) fn version(self, version: &'a str, counter: u64) -> Self {
        Self { version: Some((version, counter)), ..self }
    }

    /// The same, which takes updates that are signed with a key.
    pub(crate) fn trusting(self, release_key: &'a Path) -> Self {
        Self { release_key: Some(release_key), ..self }
    }

    /// The same, with further arguments of the builder.
    pub(crate) fn with(self, more: &'a [String]) -> Self {
        Self { more, ..self }
    }

    /// The same, signed for Secure Boot with the keys of a folder.
    pub(crate) fn signed(profile: &'a str, keys: &'a Path) -> Self {
        Self { keys: Some(keys), ..Self::new(profile) }
    }
}

/// What was built.
pub(crate) struct Built {
    /// Folder of the image.
    pub(crate) folder: PathBuf,
    /// The `skerry` command that built it.
    pub(crate) skerry: PathBuf,
    /// The program that boots it.
    pub(crate) pilot: PathBuf,
}

/// Builds an image and prints its folder.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::run_for(setup::For::Machines)?;
    let built = build(&Recipe { more: &args.more, ..Recipe::new(&args.profile) })?;
    println!("{}", built.folder.display());
    Ok(())
}

/// Builds an image with the container images of the template in it.
pub(crate) fn build(recipe: &Recipe<'_>) -> Result<Built> {
    let programs = build::programs("dev")?;
    let appliance = build::appliance(recipe.profile)?;
    let target = build::target()?;
    let archives = images::pack(&target.join("images"))?;
    let mut name = recipe.profile.to_owned();
    name += if recipe.keys.is_some() { "-signed" } else { "" };
    name += &recipe.version.map(|(version, _)| format!("-{version}")).unwrap_or_default();
    let folder = target.join("image").join(name);
    let mut skerry = Command::new(&programs.skerry);
    skerry.args(["image", "build", "--arch", "amd64", "--out"]).arg(&folder);
    skerry.arg("--binaries").arg(&appliance);
    for archive in archives {
        // The builder brings a pause of its own.
        if !archive.to_string_lossy().contains("pause") {
            skerry.arg("--image").arg(archive);
        }
    }
    if recipe.profile == build::QUICK {
        skerry.args(["--profile", "quick"]);
    }
    if let Some(keys) = recipe.keys {
        skerry.arg("--sign-key").arg(keys.join("db.key"));
        skerry.arg("--sign-cert").arg(keys.join("db.crt"));
    }
    if let Some(key) = recipe.release_key {
        skerry.arg("--release-key").arg(key);
    }
    if let Some((version, counter)) = recipe.version {
        skerry.args(["--version", version, "--release-counter", &counter.to_string()]);
    }
    if let Err(error) = sh::run(skerry.args(recipe.more)) {
        let newer = match recipe.profile == build::QUICK {
            true => newer_lock(&programs.skerry, &target)?,
            false => None,
        };
        let Some(newer) = newer else { return Err(error) };
        sh::say(
            "the mirror has moved on since image/packages.lock: once more with what it has now",
        );
        sh::run(skerry.arg("--lock").arg(newer))?;
    }
    let pilot = programs.skerry.with_file_name("skerry-pilot");
    Ok(Built { folder, skerry: programs.skerry, pilot })
}

/// A lock file of what the mirror has now, if that is not what the tree's says: a mirror drops the predecessors of security
/// updates, and what only has to be booted once may be newer than what is released.
fn newer_lock(skerry: &Path, target: &Path) -> Result<Option<PathBuf>> {
    let (old, new) =
        (sh::root().join("image/packages.lock"), target.join("image").join("packages.lock"));
    std::fs::create_dir_all(new.parent().context("a file lies in a folder")?)?;
    std::fs::copy(&old, &new)?;
    sh::run(Command::new(skerry).args(["image", "lock", "--file"]).arg(&new))?;
    Ok((std::fs::read(&old)? != std::fs::read(&new)?).then_some(new))
}

/// A folder with UEFI firmware: that of the image's own Debian release, which is faster than an older one.
pub(crate) fn firmware(skerry: &Path) -> Result<PathBuf> {
    let folder = build::target()?.join("firmware");
    sh::run(Command::new(skerry).args(["image", "firmware"]).arg(&folder))?;
    Ok(folder)
}

/// A key for releases of tests, made once.
pub(crate) fn release_key() -> Result<PathBuf> {
    let file = build::target()?.join("release.key");
    if !file.exists() {
        let skerry = build::programs("dev")?.skerry;
        sh::run(Command::new(skerry).args(["image", "release-key"]).arg(&file))?;
    }
    Ok(file)
}

/// A folder of keys for tests of Secure Boot, made once.
pub(crate) fn keys() -> Result<PathBuf> {
    let skerry = build::programs("dev")?.skerry;
    let folder = build::target()?.join("secure-boot");
    sh::run(Command::new(skerry).args(["image", "keys"]).arg(&folder))?;
    Ok(folder)
}
