//! Figures of the appliance: how fast a machine is ready, what it uses when it idles, what listens in
//! it, what programs are in it.
//!
//! One JSON line each, in the form of the other benches: `{"bench","figure","unit","value","peer","ratio"}`, and a
//! `reason` where there is no value. `cargo xtask bench image` adds the figures of the files. CPU seconds are those of
//! the QEMU process at the moment of the console's `ready`.

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use skerry_qemu_tests::console::Want;
use skerry_qemu_tests::disk::{Disk, Format};
use skerry_qemu_tests::erofs;
use skerry_qemu_tests::lab::{Lab, NAMESPACE, NODE, PATIENCE, READY};
use skerry_qemu_tests::machine::Plan;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Boots of each kind; the median is the figure.
const BOOTS: usize = 3;
/// A machine idles so long after it was ready.
const SETTLE: Duration = Duration::from_secs(40);
/// Longest wait for the guest to tell its memory.
const MEMORY_LIMIT: Duration = Duration::from_secs(60);
/// State of a listening socket in /proc/net/tcp.
const LISTEN: &str = "0A";

/// Another system on the same kernel, to be held against.
#[derive(Debug, Clone)]
pub(crate) struct Reference {
    /// A disk that boots by firmware and finds a site file as ours does.
    pub(crate) disk: PathBuf,
    /// What its console writes when its node is Ready.
    pub(crate) text: String,
}

/// All figures, in the order of measuring.
const NAMES: [&str; 8] = [
    "executables",
    "setuid_files",
    "first_ready_cpu_s",
    "ready_cpu_s",
    "ready_uefi_cpu_s",
    "ready_ratio",
    "idle_used_bytes",
    "listening_sockets",
];

/// Measures and prints what is wanted, everything by default. A figure that cannot be had is printed without a value and
/// with the reason.
pub(crate) fn run(lab: &Lab, reference: Option<&Reference>, only: &[String]) -> Result<()> {
    if let Some(unknown) = only.iter().find(|name| !NAMES.contains(&name.as_str())) {
        bail!("there is no figure `{unknown}`\nhint: there are {}", NAMES.join(", "));
    }
    let wanted = |name: &str| only.is_empty() || only.iter().any(|one| one == name);
    if wanted("executables") || wanted("setuid_files") {
        files(lab)?;
    }
    if wanted("first_ready_cpu_s") {
        print("first_ready_cpu_s", "s", first_boot(lab)?);
    }
    if wanted("ready_cpu_s") {
        let kernel = || Ok(lab.kernel_machine(NODE).disk(lab.joined_disk()?));
        print("ready_cpu_s", "s", median_boot(kernel, Want::Word("ready"))?);
    }
    if wanted("ready_uefi_cpu_s") || wanted("ready_ratio") {
        by_firmware(lab, reference)?;
    }
    if wanted("idle_used_bytes") {
        print("idle_used_bytes", "bytes", idle(lab)?);
    }
    if wanted("listening_sockets") {
        match listening(lab) {
            Ok(sockets) => print("listening_sockets", "1", sockets.len() as f64),
            Err(why) => absent("listening_sockets", "1", &format!("{why:#}")),
        }
    }
    Ok(())
}

fn files(lab: &Lab) -> Result<()> {
    let root = lab.image.base().partition("root-a")?;
    let entries = erofs::entries(&lab.image.disk, root.start)?;
    let programs: Vec<_> = entries.iter().filter(|entry| entry.is_program()).collect();
    for program in &programs {
        eprintln!("pilot: program: {}", program.path);
    }
    print("executables", "1", programs.len() as f64);
    let setuid = entries.iter().filter(|entry| entry.is_setuid()).count();
    print("setuid_files", "1", setuid as f64);
    Ok(())
}

fn by_firmware(lab: &Lab, reference: Option<&Reference>) -> Result<()> {
    if let Err(why) = lab.firmware() {
        absent("ready_uefi_cpu_s", "s", &why.to_string());
        absent("ready_ratio", "1", "there is no firmware to boot either system");
        return Ok(());
    }
    let firmware = || Ok(lab.firmware_machine(NODE)?.disk(lab.joined_disk()?));
    let ours = median_boot(firmware, Want::Word("ready"))?;
    print("ready_uefi_cpu_s", "s", ours);
    match reference {
        Some(reference) => ratio("ready_ratio", ours, reference_boot(lab, reference)?),
        None => absent("ready_ratio", "1", "no reference system was supplied (--reference)"),
    }
    Ok(())
}

/// The very first boot: repartitioning, mkfs, import of images, enrolment.
fn first_boot(lab: &Lab) -> Result<f64> {
    let name = "figures-first";
    let plan = lab.kernel_machine(name).disk(lab.new_disk()?);
    let machine = lab.provisioned(plan, &lab.site(name)?)?.start()?;
    Ok(machine.expect(Want::Word("ready"), READY)?.cpu_s)
}

/// CPU seconds to a line, median of some boots.
fn median_boot(plan: impl Fn() -> Result<Plan>, want: Want<'_>) -> Result<f64> {
    let mut took = Vec::new();
    for _ in 0..BOOTS {
        took.push(plan()?.start()?.expect(want, READY)?.cpu_s);
    }
    took.sort_by(f64::total_cmp);
    Ok(took[took.len() / 2])
}

fn reference_boot(lab: &Lab, reference: &Reference) -> Result<f64> {
    let format = if is_qcow2(&reference.disk)? { Format::Qcow2 } else { Format::Raw };
    let base = Disk { path: reference.disk.clone(), format, read_only: true, log: None };
    let site = lab.site("reference")?;
    let plan = || {
        let disk = Disk::overlay(&base, &lab.file("reference.qcow2"), None)?;
        lab.provisioned(lab.firmware_machine("reference")?.disk(disk), &site)
    };
    median_boot(plan, Want::Text(&reference.text)).context("the reference system")
}

fn is_qcow2(path: &Path) -> Result<bool> {
    use std::io::Read;
    let mut magic = [0; 4];
    let file = std::fs::File::open(path);
    let mut file = file.with_context(|| format!("could not open `{}`", path.display()))?;
    file.read_exact(&mut magic)?;
    Ok(&magic == b"QFI\xfb")
}

/// Used memory of a node that has joined and has no pods.
fn idle(lab: &Lab) -> Result<f64> {
    let name = "figures-idle";
    let plan = lab.kernel_machine(name).disk(lab.new_disk()?);
    let mut machine = lab.provisioned(plan, &lab.site(name)?)?.start()?;
    machine.expect(Want::Word("ready"), READY)?;
    std::thread::sleep(SETTLE);
    ensure!(!machine.is_off(), "the machine went off while it idled");
    Ok(machine.used_memory(MEMORY_LIMIT)? as f64)
}

/// Local addresses of the TCP sockets that listen on a node, as a pod in the node's network sees them.
fn listening(lab: &Lab) -> Result<Vec<String>> {
    let fleet = lab.hub.clone_fleet(&lab.file("fleet"))?;
    fleet.write("apps/look/app.yaml", LOOK_APP)?;
    fleet.write("apps/look/manifests/look.yaml", LOOK)?;
    fleet.push("an app that looks at the node's sockets")?;
    let machine = lab.kernel_machine(NODE).disk(lab.joined_disk()?).start()?;
    machine.expect(Want::Word("ready"), READY)?;
    let text = lab.hub.wait("list of sockets", PATIENCE, |hub| {
        let pods = hub.pods(NAMESPACE, "look")?;
        let pod = pods.iter().find(|pod| pod.ready).context("the app does not run yet")?;
        let text = hub.kubectl(&["logs", "-n", NAMESPACE, &pod.name])?;
        Ok(text.contains("end of list").then_some(text))
    })?;
    let sockets = sockets(&text);
    for socket in &sockets {
        eprintln!("pilot: listens: {socket}");
    }
    Ok(sockets)
}

/// Local addresses in state listening, in the text of /proc/net/tcp and tcp6.
fn sockets(text: &str) -> Vec<String> {
    let rows = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (local, state) = (words.next()?, words.nth(1)?);
        (state == LISTEN).then(|| local.to_owned())
    });
    rows.collect()
}

const LOOK: &str = r#"apiVersion: apps/v1
kind: Deployment
metadata:
  name: look
spec:
  replicas: 1
  selector:
    matchLabels:
      app: look
  template:
    metadata:
      labels:
        app: look
    spec:
      hostNetwork: true
      terminationGracePeriodSeconds: 1
      containers:
        - name: look
          image: skerry.local/busybox:1
          imagePullPolicy: IfNotPresent
          command: ["/bin/busybox", "sh", "-c", "cat /proc/net/tcp /proc/net/tcp6; echo end of list; busybox sleep 100000"]
"#;
const LOOK_APP: &str = "apiVersion: fleet.skerry.dev/v1alpha1\nkind: App\nmetadata:\n  name: look\nspec:\n  \
    placement:\n    sites:\n      matchLabels:\n        size: large\n";

fn round(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}

fn print(figure: &str, unit: &str, value: f64) {
    let value = round(value);
    println!(
        "{}",
        json!({"bench": "image", "figure": figure, "unit": unit, "value": value, "peer": null, "ratio": null})
    );
}

fn ratio(figure: &str, ours: f64, theirs: f64) {
    let ratio = round(ours / theirs);
    let line = json!({"bench": "image", "figure": figure, "unit": "1", "value": ratio, "peer": round(theirs), "ratio": ratio});
    println!("{line}");
}

fn absent(figure: &str, unit: &str, reason: &str) {
    let line = json!({"bench": "image", "figure": figure, "unit": unit, "value": null, "peer": null, "ratio": null, "reason": reason});
    println!("{line}");
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_listening_sockets_are_counted() {
        let text = "  sl  local_address rem_address   st tx_queue\n\
            \x20  0: 0100007F:1F90 00000000:0000 0A 00000000:00000000\n\
            \x20  1: 0F02000A:8000 0202000A:2710 01 00000000:00000000\n\
            \x20  0: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 0\nend of list\n";
        let found = super::sockets(text);
        assert_eq!(found, ["0100007F:1F90", "00000000000000000000000000000000:0016"]);
    }
}
