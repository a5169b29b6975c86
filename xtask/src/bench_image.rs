//! `cargo xtask bench image`: the appliance's figures, one JSON line each, in the form of the other benches.
//!
//! The size of an update comes from the build's manifest; everything else is measured on the image and on booted
//! machines by `skerry-pilot --figures`.

use crate::{image, pilot, setup};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::path::Path;

/// Parts of an update.
const PARTS: [&str; 2] = ["uki.efi", "root.img"];

/// Builds the image, measures files and machines, and prints every line. `more` goes to `skerry-pilot`, as
/// `--reference DISK TEXT`.
pub(crate) fn run(profile: &str, more: &[String]) -> Result<()> {
    setup::run_for(setup::For::Machines)?;
    // The profile of the image is the appliance's own unless somebody asks for a quick look.
    let profile = if profile == "release" { "edge" } else { profile };
    let built = image::build(&image::Recipe::new(profile))?;
    files(&built.folder)?;
    let status = pilot::player(&built)?.arg("--figures").args(more).status();
    let status = status.context("could not start `skerry-pilot`")?;
    ensure!(status.success(), "`skerry-pilot --figures` failed ({status})");
    Ok(())
}

fn files(folder: &Path) -> Result<()> {
    let text = std::fs::read(folder.join("manifest.json"))
        .with_context(|| format!("`{}` has no manifest", folder.display()))?;
    let manifest: Value = serde_json::from_slice(&text)?;
    print("slot_bytes", "bytes", slot_bytes(&manifest)?);
    Ok(())
}

/// Bytes of what an update replaces.
fn slot_bytes(manifest: &Value) -> Result<u64> {
    let parts = manifest["parts"].as_array().context("the manifest lists no parts")?;
    let mut bytes = 0;
    for name in PARTS {
        let part = parts.iter().find(|part| part["name"] == name);
        let Some(length) = part.and_then(|part| part["bytes"].as_u64()) else {
            bail!("the manifest has no part `{name}`");
        };
        bytes += length;
    }
    Ok(bytes)
}

fn print(figure: &str, unit: &str, value: u64) {
    let line = json!({
        "bench": "image", "figure": figure, "unit": unit, "value": value, "peer": null, "ratio": null,
    });
    println!("{line}");
}
