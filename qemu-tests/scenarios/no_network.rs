//! A box without a network cable boots fully, says that the cable is missing, and joins when it is plugged in.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::READY;
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "no-network");
    let plan = lab.kernel_machine(name).disk(lab.new_disk()?);
    let mut machine = stage.boot(&lab.provisioned(plan, &lab.site(name)?)?)?;
    machine.set_carrier(false)?;
    stage.mark("cable unplugged");
    let words = ["cable", "carrier", "link", "network"];
    stage.expect(&machine, "the agent runs all the same", Want::Word("agent"), READY)?;
    stage.expect(
        &machine,
        "the console says what is missing",
        Want::Saying("problem", &words),
        READY,
    )?;
    stage.silent(&machine, "it does not claim to be ready", Want::Word("ready"))?;
    machine.set_carrier(true)?;
    stage.mark("cable plugged in");
    stage.expect(&machine, "it joins by itself", Want::Word("ready"), READY).map(drop)
}
