//! A box without any download takes a new version from a stick, proves it, and keeps the old one to go back to.
//!
//! The stick has a signed bundle and is in the box from the start. The box joins, calls its version good, writes the
//! new one into its other slot, reads it back, and commits. After a restart the new version runs from the other root, on
//! trial until the node is at its hub again; then its file has no counter any more, and the old one is still there. At the
//! next start the same stick changes nothing.

use super::parts::{boots, end};
use anyhow::{Result, ensure};
use skerry_qemu_tests::console::{Bound, Want};
use skerry_qemu_tests::image::UKI_FOLDER;
use skerry_qemu_tests::lab::READY;
use skerry_qemu_tests::scenario::Stage;
use skerry_qemu_tests::{disk, release};

/// CPU seconds to read, check, write and read back a whole version.
pub(crate) const WRITTEN: Bound = Bound::cpu_s(400);

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "update-usb");
    let old = lab.image.version()?;
    let new = release::newer(lab, '9', |_| Ok(()))?;
    let stick = disk::stick(&lab.file("stick.raw"), "update.bundle", &std::fs::read(&new.bundle)?)?;
    let machine_disk = lab.new_copy()?;
    let plan = lab.firmware_machine(name)?.disk(machine_disk.clone()).stick(stick);
    let plan = lab.provisioned(plan, &lab.site(name)?)?;
    let mut machine = boots(stage, &plan, &old, "a")?;
    let begun = stage.expect(&machine, "the running version is called good", Want::Saying("boot", &["is good"]), READY)?;
    let said = format!("version {} is written", new.version);
    let said = Want::Saying("update", &[&said]);
    let written = stage.expect(&machine, "the new version is written and committed", said, WRITTEN)?;
    stage.figure("update_cpu_s", written.cpu_s - begun.cpu_s, "CPU s");
    end(stage, &mut machine)?;

    let mut machine = boots(stage, &plan, &new.version, "b")?;
    stage.expect(&machine, "it is on trial", Want::Saying("update", &["on trial"]), READY)?;
    let proved = Want::Saying("update", &["has proved itself"]);
    stage.expect(&machine, "it proves itself", proved, READY)?;
    end(stage, &mut machine)?;
    stage.ask("both versions are good files of the boot partition", || {
        let names = machine_disk.volume("esp")?.list(UKI_FOLDER)?;
        let wanted = [format!("skerry_{old}.efi"), format!("skerry_{}.efi", new.version)];
        ensure!(names == wanted, "there are {}", names.join(", "));
        Ok(())
    })?;

    let machine = boots(stage, &plan, &new.version, "b")?;
    stage.expect(&machine, "the node is at its hub", Want::Word("ready"), READY)?;
    stage.silent(&machine, "the same stick starts no update", Want::Word("update"))
}
