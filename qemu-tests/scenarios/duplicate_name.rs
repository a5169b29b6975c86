//! A second box under the name of one that has joined does not take its place unnoticed.
//!
//! The second machine has a token of its own for the same name. Whatever the hub decides, both consoles and the hub must
//! not end with two boxes that believe to be the same node: the second one reports a problem, or the first one does.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::READY;
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "duplicate-name");
    let first = lab.kernel_machine(name).disk(lab.new_disk()?);
    let first = stage.boot(&lab.provisioned(first, &lab.site(name)?)?)?;
    stage.expect(&first, "the first box joins", Want::Word("ready"), READY)?;
    let mark = first.console().mark();
    let second = lab.kernel_machine("duplicate-name-2").disk(lab.new_disk()?);
    let second = stage.boot(&lab.provisioned(second, &lab.site(name)?)?)?;
    stage
        .ask("one of the two says that the name is taken", || {
            let wanted = Want::Saying("hint", &["same name"]);
            let told = second.expect(wanted, READY);
            match told {
                Ok(line) => Ok(line),
                Err(error) => first.console().find(mark, wanted).ok_or(error.into()),
            }
        })
        .map(drop)
}
