//! The power button ends a box in order within a bound: pods stop, data is written, the machine goes off.
//!
//! Afterwards the file system of the state partition must not ask for its journal to be played, and the next boot of the
//! disk must be ready.

use super::parts;
use anyhow::{Result, ensure};
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::{NODE, READY, SHUTDOWN};
use skerry_qemu_tests::scenario::Stage;
use std::time::Instant;

/// Where ext4's superblock is, and in it its magic number and the features that a reader must know.
const SUPERBLOCK: u64 = 1024;
const MAGIC_AT: usize = 0x38;
const INCOMPATIBLE_AT: usize = 0x60;
/// The journal has to be played.
const RECOVER: u32 = 0x4;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let lab = stage.lab;
    let disk = lab.joined_copy()?;
    let plan = lab.kernel_machine(NODE).disk(disk.clone());
    let mut machine = stage.boot(&plan)?;
    stage.expect(&machine, "the node is back at its hub", Want::Word("ready"), READY)?;
    stage.ask("its app runs", || parts::app_is_ready(&lab.hub))?;
    let begin = Instant::now();
    stage.ask("the power button switches it off", || machine.power_off(SHUTDOWN))?;
    stage.figure("power_off_s", begin.elapsed().as_secs_f64(), "s");
    stage.expect(&machine, "the console said that it ends", Want::Word("shutdown"), SHUTDOWN)?;
    stage.ask("the file system was closed in order", || {
        let state = disk.partition("state")?;
        let block = disk.read_at(state.start + SUPERBLOCK, 256)?;
        ensure!(block[MAGIC_AT..MAGIC_AT + 2] == [0x53, 0xef], "the state partition has no ext4");
        let features = block[INCOMPATIBLE_AT..INCOMPATIBLE_AT + 4].try_into()?;
        ensure!(u32::from_le_bytes(features) & RECOVER == 0, "its journal has to be played");
        Ok(())
    })?;
    let again = stage.boot(&plan)?;
    stage.expect(&again, "the next boot is ready", Want::Word("ready"), READY).map(drop)
}
