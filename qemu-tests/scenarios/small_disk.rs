//! A disk that is too small for a second system and for data is told on the console, with how large it must be.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::disk::Disk;
use skerry_qemu_tests::lab::READY;
use skerry_qemu_tests::scenario::Stage;

/// Words of a sentence about the size.
const WORDS: [&str; 3] = ["small", "at least", "needed"];

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let lab = stage.lab;
    // As long as the flash file itself: nothing is left behind the first root.
    let disk = Disk::copy(&lab.image.base(), &lab.file("disk.raw"), 0)?;
    let machine = stage.boot(&lab.kernel_machine("small-disk").disk(disk))?;
    let wants = [Want::Saying("problem", &WORDS), Want::Saying("emergency", &WORDS)];
    stage.ask("the console says that the disk is too small", || {
        Ok(machine.console().wait_any(0, &wants, READY)?)
    })?;
    stage.expect(&machine, "and what to do about it", Want::Word("hint"), READY).map(drop)
}
