//! A box that loses power and link at once comes back by itself with its pods, from what it has stored.
//!
//! QEMU is killed the moment the app's first page is seen, when its image has just been unpacked and nothing had time to
//! be written back. The next boot of the same disk has a cut cable, which spares only the page's port and the DHCP of the
//! site. The page must come back, also after a second cut right then; when the link heals, the node must become Ready
//! without help.

use super::parts;
use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::hub;
use skerry_qemu_tests::lab::{NODE, PATIENCE, READY};
use skerry_qemu_tests::link::Profile;
use skerry_qemu_tests::scenario::Stage;

/// Times that the box loses power.
const POWER_CUTS: usize = 2;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let lab = stage.lab;
    let fleet = parts::fleet_with_page(lab)?;
    let (mut machine, port) = parts::joined(stage)?;
    parts::greet(&fleet, "Before the power cut")?;
    stage.ask("the box serves the app's page", || {
        parts::page_shows(port, "Before the power cut", parts::PAGE_LIMIT)
    })?;

    // The router of the site answers DHCP; it is the uplink behind it that is gone.
    let cut = Profile { cut: true, spared_ports: vec![parts::PORT, 67, 68], ..Profile::default() };
    for _ in 0..POWER_CUTS {
        machine.kill()?;
        stage.mark("power cut");
        let mut plan = machine.plan().clone().profile(cut.clone());
        plan.forwards.clear();
        let port = hub::free_port()?;
        machine = stage.boot(&plan.forward(port, parts::PORT))?;
        stage.expect(&machine, "the agent runs", Want::Word("agent"), READY)?;
        stage.ask("the page is back without the hub", || {
            parts::page_shows(port, "Before the power cut", parts::PAGE_LIMIT)
        })?;
    }
    stage.figure("offline_page_cpu_s", machine.console().cpu().as_secs_f64(), "CPU s");
    stage.silent(&machine, "the console does not claim to be at the hub", Want::Word("ready"))?;
    machine.link().heal();
    stage.mark("link healed");
    stage.expect(&machine, "the node is at its hub again", Want::Word("ready"), READY)?;
    stage.ask("the hub calls it Ready", || {
        lab.hub.wait("Ready node", PATIENCE, |hub| Ok(hub.is_ready(NODE)?.then_some(())))
    })
}
