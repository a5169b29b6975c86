//! A box with a second disk of the same image in it (a forgotten flashing stick) uses the disk that it booted from, and
//! without firmware it stops and says that it cannot tell the two apart.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::READY;
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "two-disks");
    let first = lab.new_copy()?;
    let second = lab.new_copy()?;
    let before = second.read_at(0, 1 << 20)?;
    let plan = lab.firmware_machine(name)?.disk(first.clone()).disk(second.clone());
    let machine = stage.boot(&lab.provisioned(plan, &lab.site(name)?)?)?;
    let wants = [Want::Word("ready"), Want::Word("problem"), Want::Word("emergency")];
    let (which, line) = stage.ask("it boots, or says what it found", || {
        Ok(machine.console().wait_any(0, &wants, READY)?)
    })?;
    drop(machine);
    if which == 0 {
        stage.ask("the state partition is on the first disk", || first.partition("state"))?;
    } else {
        // The two have the same identifiers until a first boot, so refusing is right as well.
        stage.mark(format!("it refused: {}", line.text));
    }
    stage.check("the second disk is as it was", second.read_at(0, 1 << 20)? == before)?;

    let plan = lab.kernel_machine("two-disks-kernel").disk(lab.new_copy()?).disk(lab.new_copy()?);
    let machine = stage.boot(&plan)?;
    let wants = [
        Want::Saying("problem", &["disk", "more than one", "two"]),
        Want::Saying("emergency", &["disk", "more than one", "two"]),
    ];
    stage.ask("without firmware it says that there are two", || {
        Ok(machine.console().wait_any(0, &wants, READY)?)
    })?;
    stage.silent(&machine, "and does not guess", Want::Word("stage1"))
}
