//! A box without a clock battery, which starts in 1970, joins its hub all the same.
//!
//! Certificates are not valid in 1970, so the box has to learn the time first: a time server is in its site file.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::{PATIENCE, READY};
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "clock-1970");
    let Some(clock) = &lab.clock else {
        return Err(stage.skip("there is no time server: port 123 of this host is not free"));
    };
    let before = clock.asked();
    let plan = lab.kernel_machine(name).disk(lab.new_disk()?).rtc("1970-01-01T00:00:00");
    let machine = stage.boot(&lab.provisioned(plan, &lab.site(name)?)?)?;
    stage.expect(&machine, "it joins", Want::Word("ready"), READY)?;
    stage.check("it asked for the time", clock.asked() > before)?;
    stage.ask("the hub calls the node Ready", || {
        lab.hub.wait("Ready node", PATIENCE, |hub| Ok(hub.is_ready(name)?.then_some(())))
    })
}
