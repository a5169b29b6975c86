//! `cargo xtask bench updates`: what an update moves and how long it takes, one JSON line each, in the form of the other
//! benches.
//!
//! The bytes are told by the block indexes of built versions: what a node fetches is what it has in no block of its root and of
//! its boot file, and the indexes themselves. The times, and the bytes that really passed a machine's cable, come from the
//! scenarios `update_by_push` and `update_panics`, in CPU seconds of QEMU.

use crate::{image, pilot, setup};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// Parts of an update.
const PARTS: [&str; 2] = ["uki.efi", "root.img"];
/// Bytes of a block, and of its digest in an index.
const BLOCK: usize = 4096;
const DIGEST: u64 = 32;
/// A version with one package more than the one before.
const CHANGED: (&str, u64) = ("9.0.1", 9);
/// The scenarios that are timed.
const SCENARIOS: [&str; 2] = ["update_by_push", "update_panics"];

/// Builds three versions, compares them, plays the scenarios, and prints every line.
pub(crate) fn run(profile: &str) -> Result<()> {
    setup::run_for(setup::For::Machines)?;
    let profile = if profile == "release" { "edge" } else { profile };
    let key = image::release_key()?;
    let recipe = || image::Recipe::new(profile).trusting(&key);
    let built = image::build(&recipe())?;
    let (version, counter) = pilot::NEWER;
    let newer = image::build(&recipe().version(version, counter))?;
    let one_more = ["--with".to_owned(), "mosquitto".to_owned()];
    let changed = image::build(&recipe().version(CHANGED.0, CHANGED.1).with(&one_more))?;
    let old = blocks_of(&built.folder)?;
    print("same_packages_bytes_ratio", "", fetched(&old, &newer.folder)?);
    print("update_bytes_ratio", "", fetched(&old, &changed.folder)?);

    let report = crate::build::target()?.join("bench").join("updates");
    let mut player = pilot::player(&built)?;
    player.arg("--release-key").arg(&key).arg("--newer").arg(&newer.folder);
    player.arg("--report").arg(&report).args(SCENARIOS.iter().flat_map(|name| ["--only", name]));
    // Its table is for people.
    let status = player.stdout(std::process::Stdio::null()).status();
    let status = status.context("could not start `skerry-pilot`")?;
    let text = std::fs::read(report.join("pilot.json")).context("the scenarios left no report")?;
    let report: Value = serde_json::from_slice(&text)?;
    for scenario in report["scenarios"].as_array().into_iter().flatten() {
        for figure in scenario["evidence"]["figures"].as_array().into_iter().flatten() {
            let name = figure["name"].as_str().unwrap_or_default();
            let unit = figure["unit"].as_str().unwrap_or_default();
            print(name, unit, figure["value"].as_f64().unwrap_or(f64::NAN));
        }
    }
    ensure!(status.success(), "a scenario failed ({status}); `{}` says why", "pilot.html");
    Ok(())
}

/// Digests of all blocks of a version.
fn blocks_of(folder: &Path) -> Result<HashSet<[u8; 32]>> {
    let mut found = HashSet::new();
    for part in PARTS {
        each_block(&folder.join(part), |digest, _| {
            found.insert(digest);
        })?;
    }
    Ok(found)
}

/// Share of a version that a node with these blocks fetches, indexes included.
fn fetched(old: &HashSet<[u8; 32]>, new: &Path) -> Result<f64> {
    let (mut all, mut moved) = (0, 0);
    for part in PARTS {
        each_block(&new.join(part), |digest, bytes| {
            all += bytes;
            moved += DIGEST + if old.contains(&digest) { 0 } else { bytes };
        })?;
    }
    Ok(moved as f64 / all as f64)
}

fn each_block(path: &Path, mut seen: impl FnMut([u8; 32], u64)) -> Result<()> {
    let missing = || format!("could not read `{}`", path.display());
    let mut file = BufReader::new(File::open(path).with_context(missing)?);
    loop {
        let mut block = Vec::with_capacity(BLOCK);
        let bytes = file.by_ref().take(BLOCK as u64).read_to_end(&mut block)?;
        if bytes == 0 {
            return Ok(());
        }
        block.resize(BLOCK, 0);
        seen(Sha256::digest(&block).into(), bytes as u64);
    }
}

fn print(figure: &str, unit: &str, value: f64) {
    let value = (value * 10_000.0).round() / 10_000.0;
    let line = json!({
        "bench": "updates", "figure": figure, "unit": unit, "value": value, "peer": null, "ratio": null,
    });
    println!("{line}");
}
