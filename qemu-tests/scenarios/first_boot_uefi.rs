//! A box that was flashed and plugged in joins its hub by itself: UEFI firmware, boot loader, verified root, agent.
//!
//! A machine with OVMF and an overlay of the flash file boots for the first time. Nobody touches it; its site file comes
//! from the firmware. The hub must come to see its node Ready, and a second boot of the same disk must need no token.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::{PATIENCE, READY, SHUTDOWN};
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "first-boot-uefi");
    let plan = lab.firmware_machine(name)?.disk(lab.new_disk()?);
    let told = lab.provisioned(plan.clone(), &lab.site(name)?)?;
    let mut machine = stage.boot(&told)?;
    stage.expect(&machine, "the root file system is verified", Want::Word("verity"), READY)?;
    let ready = stage.expect(&machine, "the console says `ready`", Want::Word("ready"), READY)?;
    stage.figure("first_ready_uefi_cpu_s", ready.cpu_s, "CPU s");
    stage.ask("the hub has the node, and it is Ready", || {
        lab.hub.wait("Ready node", PATIENCE, |hub| Ok(hub.is_ready(name)?.then_some(())))
    })?;
    stage.silent(&machine, "no problem was reported", Want::Word("problem"))?;
    let (up, down) = machine.link().counts();
    stage.figure("first_boot_bytes", (up.bytes + down.bytes) as f64, "bytes");
    stage.ask("the power button switches it off in order", || machine.power_off(SHUTDOWN))?;

    // The second boot has no site file from outside: it lives on what it stored.
    let again = stage.boot(&plan)?;
    let ready =
        stage.expect(&again, "it is ready again without a token", Want::Word("ready"), READY)?;
    stage.figure("second_ready_uefi_cpu_s", ready.cpu_s, "CPU s");
    Ok(())
}
