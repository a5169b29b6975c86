//! A box that was never told where it belongs says so, with what to do, and goes on looking; a stick that comes later is
//! enough.
//!
//! The machine boots without any source of a site file; its console must show how to provision it, and it must stay up.
//! Then the same disk boots with a stick.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::disk;
use skerry_qemu_tests::lab::READY;
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "no-site-file");
    let plan = lab.kernel_machine(name).disk(lab.new_disk()?);
    let mut machine = stage.boot(&plan)?;
    stage.expect(
        &machine,
        "the console says that there is no site file",
        Want::Word("problem"),
        READY,
    )?;
    stage.expect(&machine, "and what to do about it", Want::Word("hint"), READY)?;
    stage.check("the box stays up", !machine.is_off())?;
    machine.kill()?;
    let site = lab.site(name)?.text();
    let stick = disk::stick(&lab.file("stick.raw"), "site.toml", site.as_bytes())?;
    let machine = stage.boot(&plan.stick(stick))?;
    stage.expect(&machine, "with a stick it joins", Want::Word("ready"), READY).map(drop)
}
