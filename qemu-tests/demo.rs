//! `skerry-pilot --up DIR`: a hub and one machine as its edge node, until Ctrl-C. `cargo xtask up --vm` calls it.
//!
//! The machine keeps its disk in the folder, so that it is the same node at the next start and needs no token then. Its
//! console goes to standard error.

use anyhow::Result;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::disk::{Disk, Format};
use skerry_qemu_tests::lab::{DISK_LENGTH, Lab, NODE, SHUTDOWN};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How often the console is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Runs until Ctrl-C, or until the machine goes off by itself.
pub(crate) fn run(lab: &Lab, dir: &Path, stop: &AtomicBool) -> Result<()> {
    // A copy, since the image may be built anew while the node keeps its disk.
    let disk = dir.join(format!("{NODE}.raw"));
    let is_new = !disk.exists();
    let disk = if is_new {
        Disk::copy(&lab.image.base(), &disk, DISK_LENGTH)?
    } else {
        Disk { path: disk, format: Format::Raw, read_only: false, log: None }
    };
    let plan = match lab.firmware_machine(NODE) {
        Ok(plan) => plan,
        Err(why) => {
            eprintln!("pilot: the machine starts without firmware: {why}");
            lab.kernel_machine(NODE)
        }
    };
    let mut site = lab.site(NODE)?;
    // The hub's ports are others at each start, so the machine has to take the new file instead of its copy.
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    site.revision = now.unwrap_or_default().as_secs();
    let mut plan = lab.provisioned(plan.disk(disk), &site)?;
    // Ctrl-C reaches this program alone, which then presses the power button.
    plan.own_group = true;
    let mut machine = plan.start()?;
    machine.console().follow(NODE);
    eprintln!("pilot: machine `{NODE}` starts{}", if is_new { " for the first time" } else { "" });
    let mut told = false;
    while !stop.load(Ordering::Relaxed) && !machine.is_off() {
        if !told && machine.console().find(0, Want::Word("ready")).is_some() {
            told = true;
            println!("{}", guide(lab)?);
        }
        std::thread::sleep(LOOK);
    }
    if machine.is_off() {
        eprintln!("pilot: the machine went off");
        return Ok(());
    }
    eprintln!("pilot: stopping the machine");
    if let Err(error) = machine.power_off(SHUTDOWN) {
        eprintln!("pilot: it did not stop in order: {error:#}");
        machine.kill()?;
    }
    Ok(())
}

fn guide(lab: &Lab) -> Result<String> {
    let kubeconfig = lab.hub.kubeconfig()?;
    let kubeconfig = kubeconfig.display();
    Ok(format!(
        "The appliance is at its hub.\n\n  clone    git clone {} my-fleet\n  push     change a file, git commit -a, git push\n  \
         look     {} --kubeconfig {kubeconfig} status\n           kubectl --kubeconfig {kubeconfig} get pods -A\n  \
         stop     Ctrl-C\n",
        lab.hub.remote()?,
        lab.inputs.programs.skerry.display(),
    ))
}
