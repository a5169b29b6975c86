//! A push changes the OS of a box: it fetches what it lacks over its link, proves the new version with its pods running, and a
//! second push takes it back.
//!
//! The new version lies in the hub's store, and an `OsRelease` with its digest is pushed. The node fetches it (blocks that its
//! root has are not fetched), PID 1 writes and commits it, and the agent asks for the restart. The new version runs from the
//! other root, is proved by the hub's link and by the app's pod being back, and the hub says so. Then the old version is
//! ordered by a push: the node starts it from its own slot, without a download.

use super::parts::{app_is_ready, boots};
use super::update_usb::WRITTEN;
use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::hub::{self, Fleet, Hub};
use skerry_qemu_tests::lab::{NODE, PATIENCE, READY, SHUTDOWN};
use skerry_qemu_tests::machine::Machine;
use skerry_qemu_tests::release;
use skerry_qemu_tests::scenario::Stage;

const SITE: &str = "sites/lisbon-01.yaml";
const CHANNEL: &str = "os/stable.yaml";

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let fleet = stage.lab.hub.clone_fleet(&stage.lab.file("fleet"))?;
    let before = fleet.read(SITE)?;
    let played = play(stage, &fleet);
    // Whatever came of it, the next scenario's node follows no channel.
    fleet.write(SITE, &before)?;
    let _ = fleet.remove(CHANNEL); // it may not have come so far
    fleet.push("no channel")?;
    played
}

fn play(stage: &mut Stage<'_>, fleet: &Fleet) -> Result<()> {
    let lab = stage.lab;
    let hub = &lab.hub;
    let old = lab.image.version()?;
    let new = release::newer(lab, '8', |_| Ok(()))?;
    let plan = lab.firmware_machine(NODE)?.disk(lab.joined_copy()?);
    let mut machine = boots(stage, &plan, &old, "a")?;
    stage.expect(&machine, "the node is back at its hub", Want::Word("ready"), READY)?;
    let good = Want::Saying("boot", &["is good"]);
    stage.expect(&machine, "the running version is called good", good, READY)?;
    stage.ask("the app runs", || app_is_ready(hub))?;

    let store = hub.dir().join("os");
    let (bundle, store) = (new.bundle.to_string_lossy(), store.to_string_lossy());
    let published = stage.ask("`skerry image publish` takes the bundle", || {
        hub.skerry(&["image", "publish", "--bundle", &bundle, "--store", &store])
    })?;
    let yaml = published["os_release"].as_str().context("no OsRelease was printed")?;
    fleet.write(CHANNEL, yaml)?;
    fleet.edit(SITE, |text| text.replace("spec:\n", "spec:\n  osChannel: stable\n"))?;
    let (_, before) = machine.link().counts();
    fleet.push("a new version")?;
    let said = format!("version {} is written", new.version);
    let written = Want::Saying("update", &[&said]);
    stage.expect(&machine, "the node fetches it, and it is written and committed", written, WRITTEN)?;
    let (_, down) = machine.link().counts();
    let bytes = down.bytes.saturating_sub(before.bytes);
    let all = std::fs::metadata(&new.bundle)?.len();
    stage.figure("fetched_bytes", bytes as f64, "bytes");
    stage.figure("update_bytes_ratio", bytes as f64 / all as f64, "");
    restarts(stage, &mut machine)?;

    let mut machine = boots(stage, &plan, &new.version, "b")?;
    let proved = Want::Saying("update", &["has proved itself"]);
    let proved = stage.expect(&machine, "the new version proves itself", proved, READY)?;
    stage.figure("trial_cpu_s", proved.cpu_s, "CPU s");
    stage.ask("the hub knows that the node runs it", || running(hub, &new.version))?;
    stage.ask("the app runs", || app_is_ready(hub))?;

    let manifest = std::fs::read(lab.inputs.image.join("manifest.json"))?;
    let digest: String = Sha256::digest(&manifest).iter().map(|byte| format!("{byte:02x}")).collect();
    let counter = lab.image.manifest["release_counter"].as_u64().context("no counter")?;
    let order = yaml_of(&old, counter, &digest);
    fleet.write(CHANNEL, &order)?;
    fleet.push("back to the version before")?;
    restarts(stage, &mut machine)?;
    let mut machine = boots(stage, &plan, &old, "a")?;
    let back = stage.expect(&machine, "the node is back at its hub", Want::Word("ready"), READY)?;
    stage.figure("rollback_cpu_s", back.cpu_s, "CPU s");
    stage.ask("the hub knows that the old version runs", || running(hub, &old))?;
    stage.ask("the power button switches it off", || machine.power_off(SHUTDOWN))
}

/// Waits until a machine has ended by itself, pods and all.
fn restarts(stage: &mut Stage<'_>, machine: &mut Machine) -> Result<()> {
    stage.ask("the machine restarts by itself", || {
        hub::wait("end of the machine", PATIENCE, || Ok(machine.is_off().then_some(())))
    })
}

fn yaml_of(version: &str, counter: u64, digest: &str) -> String {
    format!(
        "apiVersion: fleet.skerry.dev/v1alpha1\nkind: OsRelease\nmetadata:\n  name: stable\nspec:\n  version: \"{version}\"\n  counter: {counter}\n  digest: sha256:{digest}\n"
    )
}

/// Waits until `skerry os list` says that the node runs a version, and has nothing left to do.
fn running(hub: &Hub, version: &str) -> Result<()> {
    hub.wait("version in `skerry os list`", PATIENCE, |hub| {
        let rows = hub.skerry(&["os", "list"])?;
        let rows = rows.as_array().context("no rows")?;
        let row = rows.iter().find(|row| row["node"] == NODE).context("no row of the node")?;
        ensure!(row["running"].as_str().is_some_and(|is| is.starts_with(version)), "{row}");
        ensure!(row["progress"]["step"] == "current", "{row}");
        Ok(Some(()))
    })
}
