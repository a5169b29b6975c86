//! A box never formats data that it does not know: unknown bytes on the state partition stay as they are, and the console
//! says what was found.

use anyhow::{Context, Result};
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::{READY, SITE_ITEM};
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let lab = stage.lab;
    let disk = lab.new_copy()?;
    let plan = lab.kernel_machine("foreign-state").disk(disk.clone());
    // The first boot makes the partition.
    let mut machine = stage.boot(&plan)?;
    stage.expect(
        &machine,
        "the first boot makes the state partition",
        Want::Word("state"),
        READY,
    )?;
    machine.kill()?;
    let state = disk.partition("state").context("after the first boot")?;
    let foreign: Vec<u8> = b"somebody else's data ".iter().copied().cycle().take(1 << 20).collect();
    disk.write_at(state.start, &foreign)?;
    stage.mark("the state partition holds unknown data");
    let site = lab.site("foreign-state")?;
    let machine = stage.boot(&plan.fw_cfg(SITE_ITEM, &lab.site_file(&site.text())?))?;
    let wants = [Want::Saying("problem", &["state"]), Want::Saying("emergency", &["state"])];
    stage.ask("the console says what was found", || {
        Ok(machine.console().wait_any(0, &wants, READY)?)
    })?;
    stage.expect(&machine, "and what to do about it", Want::Word("hint"), READY)?;
    drop(machine);
    let kept = disk.read_at(state.start, foreign.len())? == foreign;
    stage.check("every byte of it is still there", kept)
}
