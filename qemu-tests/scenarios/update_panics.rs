//! A version that panics at each start is tried three times; then the box is back at the old one, says why, and never
//! takes that version again.
//!
//! The new version's boot file names another root than the one that it brings, so its first stage ends in an emergency.
//! It comes by a stick, signed as a good one is. Each restart of the box is a new start of the machine. At the last one
//! the old version reports what happened, and the stick, which is still there, is refused with the reason.

use super::parts::{boots, end};
use super::update_usb::WRITTEN;
use anyhow::{Context, Result, ensure};
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::image::UKI_FOLDER;
use skerry_qemu_tests::lab::READY;
use skerry_qemu_tests::scenario::Stage;
use skerry_qemu_tests::{disk, release, uki};

/// Starts that a new version has.
const TRIES: usize = 3;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "update-panics");
    let old = lab.image.version()?;
    let new = release::newer(lab, '8', |kernel| {
        let cmdline = uki::parts(kernel)?.cmdline;
        let verity = cmdline.split_whitespace().find(|word| word.starts_with("skerry.verity="));
        let hash = verity.and_then(|word| word.split(',').nth(2)).context("no root hash")?;
        let other: String = hash.chars().rev().collect();
        ensure!(other != hash, "the root hash is the same backwards");
        uki::replace(kernel, ".cmdline", hash, &other).map(drop)
    })?;
    let stick = disk::stick(&lab.file("stick.raw"), "update.bundle", &std::fs::read(&new.bundle)?)?;
    let machine_disk = lab.new_copy()?;
    let plan = lab.firmware_machine(name)?.disk(machine_disk.clone()).stick(stick);
    let plan = lab.provisioned(plan, &lab.site(name)?)?;
    let mut machine = boots(stage, &plan, &old, "a")?;
    let said = format!("version {} is written", new.version);
    let said = Want::Saying("update", &[&said]);
    stage.expect(&machine, "the new version is written and committed", said, WRITTEN)?;
    end(stage, &mut machine)?;

    let mut spent = 0.0;
    for number in 1..=TRIES {
        let mut machine = stage.boot(&plan)?;
        let what = format!("try {number} ends in an emergency");
        stage.expect(&machine, &what, Want::Word("emergency"), READY)?;
        stage.ask("and in a restart", || Ok(machine.console().wait_off(READY)?))?;
        spent += machine.console().cpu().as_secs_f64();
        machine.wait()?;
    }
    let machine = boots(stage, &plan, &old, "a")?;
    let told = Want::Saying("problem", &["was taken back: it did not become healthy in 3 tries"]);
    let back = stage.expect(&machine, "the old version says what happened", told, READY)?;
    stage.figure("rollback_cpu_s", spent + back.cpu_s, "CPU s");
    stage.expect(&machine, "the node is at its hub", Want::Word("ready"), READY)?;
    let refused = Want::Saying("problem", &["failed here before"]);
    stage.expect(&machine, "the stick is refused from now on", refused, READY)?;
    let mut machine = machine;
    end(stage, &mut machine)?;
    stage.ask("nothing of the new version is left on the boot partition", || {
        let names = machine_disk.volume("esp")?.list(UKI_FOLDER)?;
        ensure!(names == [format!("skerry_{old}.efi")], "there are {}", names.join(", "));
        Ok(())
    })
}
