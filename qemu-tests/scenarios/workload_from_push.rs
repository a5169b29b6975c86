//! A push to the fleet repository changes what a box serves, without anybody logging in anywhere.
//!
//! The greeting of a site is changed in Git and pushed; the time is taken until the page that the box serves shows it.

use super::parts;
use anyhow::Result;
use skerry_qemu_tests::hub;
use skerry_qemu_tests::scenario::Stage;
use std::time::Instant;

pub(crate) fn run(stage: &mut Stage<'_>) -> Result<()> {
    let lab = stage.lab;
    let fleet = parts::fleet_with_page(lab)?;
    let (machine, port) = parts::joined(stage)?;
    stage.ask("the box serves the app's page", || {
        hub::wait("page", parts::PAGE_LIMIT, || hub::page(port).map(Some))
    })?;
    let (begin, cpu) = (Instant::now(), machine.console().cpu());
    parts::greet(&fleet, "Pushed by the pilot")?;
    stage.mark("pushed a new greeting");
    stage.ask("the page shows what was pushed", || {
        parts::page_shows(port, "Pushed by the pilot", parts::PAGE_LIMIT)
    })?;
    stage.figure("push_to_page_s", begin.elapsed().as_secs_f64(), "s");
    let used = machine.console().cpu().saturating_sub(cpu);
    stage.figure("push_to_page_cpu_s", used.as_secs_f64(), "CPU s");
    stage.ask("the hub has a ready pod of the app", || parts::app_is_ready(&lab.hub))
}
