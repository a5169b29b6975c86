//! A box behind a bad link (400 ms there and 400 ms back, 3 % of frames lost, 32 kB a second) joins like any other.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::{PATIENCE, READY};
use skerry_qemu_tests::link::Profile;
use skerry_qemu_tests::scenario::Stage;
use std::time::Duration;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "bad-link");
    let bad = Profile {
        delay: Duration::from_millis(400),
        jitter: Duration::from_millis(40),
        loss: 0.03,
        rate: Some(32_000),
        ..Profile::default()
    };
    let plan = lab.kernel_machine(name).disk(lab.new_disk()?).profile(bad);
    let machine = stage.boot(&lab.provisioned(plan, &lab.site(name)?)?)?;
    let ready = stage.expect(&machine, "it joins", Want::Word("ready"), READY)?;
    stage.figure("bad_link_ready_s", ready.wall_s, "s");
    stage.ask("the hub calls the node Ready", || {
        lab.hub.wait("Ready node", PATIENCE, |hub| Ok(hub.is_ready(name)?.then_some(())))
    })?;
    let (up, down) = machine.link().counts();
    stage.check("frames were lost on the way", up.dropped + down.dropped > 0)
}
