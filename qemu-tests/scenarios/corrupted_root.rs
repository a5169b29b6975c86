//! A box whose root file system was damaged on disk never runs the damaged data: it says so and restarts, each start
//! counted by the boot loader.
//!
//! Bytes are inverted, first at the start of the file system, then (on another disk) in the middle of it. The first must
//! be noticed before anything is mounted, the second when the block is read: the kernel panics.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::image::UKI_FOLDER;
use skerry_qemu_tests::lab::{READY, SITE_ITEM};
use skerry_qemu_tests::scenario::Stage;

/// Bytes between two places that are spoiled: closer than any program is long.
const STRIDE: u64 = 256 << 10;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let lab = stage.lab;
    let disk = lab.new_copy()?;
    let root = disk.partition("root-a")?;
    disk.spoil(root.start, 4096)?;
    let before = disk.volume("esp")?.list(UKI_FOLDER)?;
    let plan = lab.firmware_machine("damaged-start")?.disk(disk.clone());
    let mut machine = stage.boot(&plan)?;
    let wants = [Want::Word("emergency"), Want::Saying("problem", &["verif", "root", "damaged"])];
    stage.ask("the console says that the root does not verify", || {
        Ok(machine.console().wait_any(0, &wants, READY)?)
    })?;
    stage.silent(&machine, "nothing of it was mounted", Want::Word("stage1"))?;
    stage.ask("it restarts by itself", || Ok(machine.console().wait_off(READY)?))?;
    machine.wait()?;
    let after = disk.volume("esp")?.list(UKI_FOLDER)?;
    stage.mark(format!("kernels before: {}; after: {}", before.join(", "), after.join(", ")));
    let counted = before.iter().any(|name| name.contains('+'));
    if counted {
        stage.check("the boot loader has counted the start", before != after)?;
    }

    // The middle: read when programs start, under a table that panics.
    let disk = lab.new_copy()?;
    let root = disk.partition("root-a")?;
    let used = used_length(&disk, root.start, root.length)?;
    let mut at = root.start + (1 << 20);
    while at < root.start + used.saturating_sub(1 << 20) {
        disk.spoil(at, 64)?;
        at += STRIDE;
    }
    let site = lab.site("damaged-middle")?;
    let plan = lab.kernel_machine("damaged-middle").disk(disk);
    let mut machine = stage.boot(&plan.fw_cfg(SITE_ITEM, &lab.site_file(&site.text())?))?;
    let wants = [Want::Text("Kernel panic"), Want::Text("dm-verity"), Want::Word("emergency")];
    stage.ask("the damaged block is noticed when it is read", || {
        Ok(machine.console().wait_any(0, &wants, READY)?)
    })?;
    stage.ask("the machine restarts", || Ok(machine.console().wait_off(READY)?))?;
    stage.silent(&machine, "it never was ready", Want::Word("ready"))?;
    machine.wait().map(drop)
}

/// Bytes of a partition up to the last one that is not zero, found by looking at each MiB.
fn used_length(disk: &skerry_qemu_tests::disk::Disk, start: u64, length: u64) -> Result<u64> {
    const MIB: u64 = 1 << 20;
    let mut used = 0;
    for index in 0..length / MIB {
        if disk.read_at(start + index * MIB, MIB as usize)?.iter().any(|byte| *byte != 0) {
            used = (index + 1) * MIB;
        }
    }
    Ok(used)
}
