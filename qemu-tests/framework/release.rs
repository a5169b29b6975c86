//! Releases that are newer than the image under test: a newer image with a version of its own in its boot file, signed
//! and bundled by the product's own command. Whatever a scenario changes in the boot file is in the version that a box is
//! then given.

use crate::disk::run;
use crate::image::Image;
use crate::lab::Lab;
use crate::scenario::Skipped;
use crate::uki;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use std::process::Command;

/// Bytes of a block in a block index.
const BLOCK: usize = 4096;

/// A release, as one file for a stick.
#[derive(Debug, Clone)]
pub struct Release {
    /// Its version.
    pub version: String,
    /// The signed bundle.
    pub bundle: PathBuf,
    /// Its boot file.
    pub uki: Vec<u8>,
    /// File of its root.
    pub root: PathBuf,
}

/// Makes a release whose version begins with another digit; `change` may spoil its boot file.
///
/// # Errors
///
/// [`Skipped`] when the caller has no newer image.
pub fn newer(
    lab: &Lab,
    first: char,
    change: impl FnOnce(&mut Vec<u8>) -> Result<()>,
) -> Result<Release> {
    let skip = || Skipped("there is no image of a newer version; see --newer".into());
    let (folder, key) = lab.inputs.newer.as_ref().ok_or_else(skip)?;
    let Image { manifest, .. } = &Image::open(folder)?;
    let old = manifest["version"].as_str().context("the manifest has no version")?;
    let version = format!("{first}{}", old.get(1..).context("a version is plain text")?);
    let mut uki = std::fs::read(folder.join("uki.efi"))?;
    for name in ["IMAGE_VERSION", "VERSION_ID"] {
        let (from, to) = (format!("{name}={old}"), format!("{name}={version}"));
        ensure!(uki::replace(&mut uki, ".osrel", &from, &to)? > 0, "no `{from}`");
    }
    let (from, to) = (format!("skerry.version={old}"), format!("skerry.version={version}"));
    ensure!(uki::replace(&mut uki, ".cmdline", &from, &to)? > 0, "no `{from}`");
    change(&mut uki)?;

    let made = lab.file(&format!("release-{version}"));
    std::fs::create_dir_all(&made)?;
    let mut manifest = manifest.clone();
    manifest["version"] = Value::from(version.as_str());
    let part = &mut manifest["parts"][0];
    part["bytes"] = Value::from(uki.len());
    part["sha256"] = Value::from(hex(&uki));
    let index: Vec<u8> = uki.chunks(BLOCK).flat_map(block).collect();
    part["blocks_sha256"] = Value::from(hex(&index));
    // In the form of the builder, so that what is exported is what was published.
    let text = in_order(&manifest)?;
    std::fs::write(made.join("manifest.json"), text)?;
    std::fs::write(made.join("uki.efi"), &uki)?;
    let unsigned = made.join("unsigned.bundle");
    let mut tar = Command::new("tar");
    tar.args(["--format=ustar", "-cf"]).arg(&unsigned);
    tar.arg("-C").arg(&made).args(["manifest.json", "uki.efi"]);
    run(tar.arg("-C").arg(std::path::absolute(folder)?).arg("root.img"))?;
    let (store, bundle) = (made.join("store"), made.join("update.bundle"));
    let mut publish = Command::new(&lab.inputs.programs.skerry);
    publish.args(["image", "publish", "--bundle"]).arg(&unsigned).arg("--store").arg(&store);
    run(publish.arg("--release-key").arg(key))?;
    let mut export = Command::new(&lab.inputs.programs.skerry);
    export.args(["image", "export", "--store"]).arg(&store).arg("--out").arg(&bundle);
    run(export.arg(&version))?;
    std::fs::remove_file(unsigned)?;
    std::fs::remove_dir_all(store)?;
    let root = folder.join("root.img");
    Ok(Release { version, bundle, uki, root })
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn block(block: &[u8]) -> Vec<u8> {
    let mut padded = block.to_vec();
    padded.resize(BLOCK, 0);
    Sha256::digest(&padded).to_vec()
}

/// The keys in the order that the builder writes them; a JSON value sorts them.
fn in_order(manifest: &Value) -> Result<String> {
    const KEYS: [&str; 14] = [
        "product",
        "format",
        "version",
        "arch",
        "variant",
        "epoch",
        "release_counter",
        "state_schema_min",
        "state_schema",
        "kernel",
        "root_hash",
        "verity",
        "cmdline",
        "packages_lock",
    ];
    let mut text = String::from("{\n");
    for key in KEYS {
        let value = manifest.get(key).with_context(|| format!("the manifest has no `{key}`"))?;
        text += &format!("  \"{key}\": {value},\n");
    }
    text += "  \"parts\": [\n";
    let parts = manifest["parts"].as_array().context("the manifest has no parts")?;
    for (number, part) in parts.iter().enumerate() {
        let fields = ["name", "bytes", "sha256", "blocks_sha256"];
        let lines: Vec<_> =
            fields.iter().map(|key| format!("      \"{key}\": {}", part[*key])).collect();
        let end = if number + 1 < parts.len() { "," } else { "" };
        text += &format!("    {{\n{}\n    }}{end}\n", lines.join(",\n"));
    }
    Ok(text + "  ]\n}\n")
}
