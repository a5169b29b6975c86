//! What several scenarios do to the fleet repository: the app's page, and a port of the machine that shows it.

use anyhow::{Result, ensure};
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::hub::{self, Fleet, Hub, Site};
use skerry_qemu_tests::lab::{APP, Lab, NAMESPACE, NODE, PATIENCE, READY, SHUTDOWN};
use skerry_qemu_tests::machine::{Machine, Plan};
use skerry_qemu_tests::scenario::Stage;
use std::time::Duration;

/// Port of the machine behind which the app's page is.
pub(crate) const PORT: u16 = 8080;
/// Two pods cannot have the port at the same time, so the old one goes first. (`Recreate` would be refused: the
/// Deployment has defaults of the other kind already.)
const STRATEGY: &str =
    "  strategy:\n    rollingUpdate:\n      maxSurge: 0\n      maxUnavailable: 1\n  template:\n";
/// Longest wait for a page.
pub(crate) const PAGE_LIMIT: Duration = PATIENCE;

/// A working copy in which the app listens on a port of the machine, pushed if that is new.
pub(crate) fn fleet_with_page(lab: &Lab) -> Result<Fleet> {
    const MANIFEST: &str = "apps/hello-web/manifests/web.yaml";
    let fleet = lab.hub.clone_fleet(&lab.file("fleet"))?;
    if !fleet.read(MANIFEST)?.contains("hostPort") {
        fleet.edit(MANIFEST, |text| {
            let port = format!("containerPort: 8080\n              hostPort: {PORT}\n");
            text.replace("containerPort: 8080\n", &port).replace("  template:\n", STRATEGY)
        })?;
        fleet.push("open the page's port")?;
    }
    Ok(fleet)
}

/// Changes the greeting on the page of the first site.
pub(crate) fn greet(fleet: &Fleet, greeting: &str) -> Result<()> {
    fleet.edit("sites/lisbon-01.yaml", |text| {
        let line = text.lines().find(|line| line.trim_start().starts_with("greeting:"));
        text.replace(line.unwrap_or_default(), &format!("    greeting: \"{greeting}\""))
    })?;
    fleet.push(greeting)
}

/// Waits until the page behind a port of this host shows a text.
pub(crate) fn page_shows(port: u16, wanted: &str, limit: Duration) -> Result<()> {
    hub::wait(&format!("page with `{wanted}`"), limit, || {
        let page = hub::page(port)?;
        ensure!(page.contains(wanted), "the page is: {}", page.lines().last().unwrap_or_default());
        Ok(Some(()))
    })
}

/// The shared node, booted from an overlay of its disk and joined, with its page behind a port of this host.
pub(crate) fn joined(stage: &mut Stage<'_>) -> Result<(Machine, u16)> {
    let port = hub::free_port()?;
    let disk = stage.lab.joined_disk()?;
    let plan = stage.lab.kernel_machine(NODE).disk(disk).forward(port, PORT);
    let machine = stage.boot(&plan)?;
    stage.expect(&machine, "the node is back at its hub", Want::Word("ready"), READY)?;
    Ok((machine, port))
}

/// Boots a machine and sees which version runs from which root.
pub(crate) fn boots(
    stage: &mut Stage<'_>,
    plan: &Plan,
    version: &str,
    slot: &str,
) -> Result<Machine> {
    let machine = stage.boot(plan)?;
    let said = format!("version {version} from root-{slot}");
    let what = format!("version {version} runs from root-{slot}");
    stage.expect(&machine, &what, Want::Saying("stage1", &[&said]), READY)?;
    Ok(machine)
}

/// Switches a machine off in order.
pub(crate) fn end(stage: &mut Stage<'_>, machine: &mut Machine) -> Result<()> {
    stage.ask("the power button switches it off", || machine.power_off(SHUTDOWN))
}

/// Whether the app's newest pod is ready.
pub(crate) fn app_is_ready(hub: &Hub) -> Result<()> {
    hub.wait("ready pod of the app", PATIENCE, |hub| {
        let pods = hub.pods(NAMESPACE, APP)?;
        ensure!(pods.iter().any(|pod| pod.ready), "{pods:?}");
        Ok(Some(()))
    })
}

/// Boots a new machine with a site file that the hub must not accept: a problem with one of the words and a hint must be
/// on the console, the machine must stay up, and no node may appear at the hub.
pub(crate) fn refused(stage: &mut Stage<'_>, site: &Site, words: &[&str]) -> Result<()> {
    let lab = stage.lab;
    let plan = lab.kernel_machine(&site.name).disk(lab.new_disk()?);
    let mut machine = stage.boot(&lab.provisioned(plan, site)?)?;
    let wanted = Want::Saying("problem", words);
    stage.expect(&machine, "the console says what is wrong", wanted, READY)?;
    stage.expect(&machine, "and what to do about it", Want::Word("hint"), READY)?;
    stage.silent(&machine, "it does not claim to be ready", Want::Word("ready"))?;
    stage.check("the box stays up", !machine.is_off())?;
    stage.ask("the hub has no such node", || {
        ensure!(lab.hub.node(&site.name)?.is_none(), "it has");
        Ok(())
    })
}
