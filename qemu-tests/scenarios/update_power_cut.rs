//! A box that loses power at any step of an update runs the old version again, and takes the update at the next try.
//!
//! QEMU is killed right after the console says that the box checks, writes, reads back, and has committed the new
//! version. After each of the first three the old version must join again, and begins anew by itself, since the stick is
//! still there; after the last one the new version must run.

use super::parts::{boots, end};
use super::update_usb::WRITTEN;
use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::READY;
use skerry_qemu_tests::scenario::Stage;
use skerry_qemu_tests::{disk, release};

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "update-power-cut");
    let old = lab.image.version()?;
    let new = release::newer(lab, '7', |_| Ok(()))?;
    let stick = disk::stick(&lab.file("stick.raw"), "update.bundle", &std::fs::read(&new.bundle)?)?;
    let plan = lab.firmware_machine(name)?.disk(lab.new_copy()?).stick(stick);
    let plan = lab.provisioned(plan, &lab.site(name)?)?;
    for step in [": checking", ": writing", ": verifying", " is written"] {
        let mut machine = boots(stage, &plan, &old, "a")?;
        stage.expect(&machine, "the old version joins", Want::Word("ready"), READY)?;
        let said = format!("version {}{step}", new.version);
        stage.expect(&machine, &said, Want::Saying("update", &[&said]), WRITTEN)?;
        machine.kill()?;
        stage.mark("power cut");
    }
    let mut machine = boots(stage, &plan, &new.version, "b")?;
    let proved = Want::Saying("update", &["has proved itself"]);
    stage.expect(&machine, "the new version runs and proves itself", proved, READY)?;
    end(stage, &mut machine)
}
