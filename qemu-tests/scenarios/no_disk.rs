//! A kernel that finds no disk of ours says what it looked for and what it saw, and never hangs silently.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::disk::Disk;
use skerry_qemu_tests::lab::{DISK_LENGTH, READY};
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let lab = stage.lab;
    let blank = Disk::blank(&lab.file("blank.raw"), DISK_LENGTH)?;
    let plan = lab.kernel_machine("no-disk").disk(blank);
    let mut machine = stage.boot(&plan)?;
    let wants = [Want::Saying("problem", &["disk"]), Want::Saying("emergency", &["disk"])];
    stage.ask("the console says that no disk of ours was found", || {
        Ok(machine.console().wait_any(0, &wants, READY)?)
    })?;
    stage.ask("it starts again by itself, so that a disk that comes late is found", || {
        Ok(machine.console().wait_off(READY)?)
    })?;
    machine.wait().map(drop)
}
