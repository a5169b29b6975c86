//! A box in a network without DHCP says that nobody answers, goes on asking, and joins when an answer comes.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::lab::READY;
use skerry_qemu_tests::link::Profile;
use skerry_qemu_tests::scenario::Stage;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let (lab, name) = (stage.lab, "no-dhcp");
    let silent = Profile { no_dhcp: true, ..Profile::default() };
    let plan = lab.kernel_machine(name).disk(lab.new_disk()?).profile(silent);
    let machine = stage.boot(&lab.provisioned(plan, &lab.site(name)?)?)?;
    let wanted = Want::Saying("problem", &["dhcp"]);
    stage.expect(&machine, "the console says that DHCP does not answer", wanted, READY)?;
    stage.check("frames were lost on the way", machine.link().counts().0.dropped > 0)?;
    machine.link().change(|profile| profile.no_dhcp = false);
    stage.mark("DHCP answers again");
    stage.expect(&machine, "it joins by itself", Want::Word("ready"), READY).map(drop)
}
