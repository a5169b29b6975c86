//! The same image joins when a hypervisor loads the kernel itself, without firmware.
//!
//! Kernel, initial file system and command line are taken out of the UKI on the disk; everything after the start is the
//! same as on a box.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::{PATIENCE, READY};
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "first-boot-kernel");
    let plan = lab.kernel_machine(name).disk(lab.new_disk()?);
    let machine = stage.boot(&lab.provisioned(plan, &lab.site(name)?)?)?;
    let ready = stage.expect(&machine, "the console says `ready`", Want::Word("ready"), READY)?;
    stage.figure("first_ready_cpu_s", ready.cpu_s, "CPU s");
    stage.ask("the hub has the node, and it is Ready", || {
        lab.hub.wait("Ready node", PATIENCE, |hub| Ok(hub.is_ready(name)?.then_some(())))
    })?;
    stage.silent(&machine, "no problem was reported", Want::Word("problem"))
}
