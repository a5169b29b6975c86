//! A box whose disk cannot be written any more (worn-out flash goes read-only) says so instead of failing silently.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::READY;
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let lab = stage.lab;
    let words = ["read-only", "written", "write"];
    let wants = [Want::Saying("problem", &words), Want::Saying("emergency", &words)];
    let plan = lab.kernel_machine("read-only-new").disk(lab.new_disk()?.write_protected());
    let machine = stage.boot(&plan)?;
    stage.ask("at a first boot the console says that the disk cannot be written", || {
        Ok(machine.console().wait_any(0, &wants, READY)?)
    })?;
    drop(machine);
    let plan = lab.kernel_machine("read-only-used").disk(lab.joined_disk()?.write_protected());
    let machine = stage.boot(&plan)?;
    stage.ask("at a later boot too", || Ok(machine.console().wait_any(0, &wants, READY)?)).map(drop)
}
