//! A box with a mistake in its site file names the line and the remedy on its console, and works with what it can.
//!
//! The key `adress` is misspelt in line 5. The machine must stay up; with a mended file the same disk joins.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::{READY, SITE_ITEM};
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "broken-site-file");
    let site = lab.site(name)?;
    let broken = site.text().replace("address = ", "adress = ");
    let plan = lab.kernel_machine(name).disk(lab.new_disk()?);
    let told = plan.clone().fw_cfg(SITE_ITEM, &lab.site_file(&broken)?);
    let mut machine = stage.boot(&told)?;
    let line = Want::Saying("problem", &["line 5", "adress"]);
    stage.expect(&machine, "the console names the line", line, READY)?;
    stage.expect(&machine, "and what to do about it", Want::Saying("hint", &["address"]), READY)?;
    stage.check("the box stays up", !machine.is_off())?;
    machine.kill()?;
    let machine = stage.boot(&lab.provisioned(plan, &site)?)?;
    stage.expect(&machine, "with the mended file it joins", Want::Word("ready"), READY).map(drop)
}
