//! What all scenarios share: the image, the programs, the hub, and one disk of a machine that has joined.

use crate::console::{Bound, Want};
use crate::disk::Disk;
use crate::firmware::Firmware;
use crate::hub::{self, Hub, Site};
use crate::image::Image;
use crate::machine::{Accel, Boot, Plan};
use crate::ntp::Server;
use anyhow::{Context, Result, anyhow, ensure};
use std::cell::{OnceCell, RefCell};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Size of machines' disks: the smallest that is supported.
pub const DISK_LENGTH: u64 = 2_000_000_000;
/// CPU seconds from the start to `ready`, generous: figures judge speed, scenarios judge that it happens.
pub const READY: Bound = Bound::cpu_s(90);
/// CPU seconds for an orderly end.
pub const SHUTDOWN: Bound = Bound::cpu_s(60);
/// Longest wait for something that the hub must come to know.
pub const PATIENCE: Duration = Duration::from_secs(420);
/// The probe of KVM may take so long; under emulation it takes 3 s.
const PROBE_LIMIT: Duration = Duration::from_secs(10);
/// Name of the node whose disk is shared; the template's first site has it.
pub const NODE: &str = "lisbon-01-a";
/// Its namespace in the cluster.
pub const NAMESPACE: &str = "site-lisbon-01";
/// The template's app.
pub const APP: &str = "hello-web";

/// What the caller has.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Folder of the built image, or its disk.
    pub image: PathBuf,
    /// Folders that may have UEFI firmware.
    pub firmware: Vec<PathBuf>,
    /// Programs of the hub.
    pub programs: hub::Programs,
    /// The same image, signed with a key that machines are told to trust, where there is one: its folder, and the
    /// folder of the keys.
    pub signed: Option<(PathBuf, PathBuf)>,
    /// Folder of an image of a newer version, and the key whose signature the image under test wants on it.
    pub newer: Option<(PathBuf, PathBuf)>,
    /// How long the scenario of little memory watches its pods.
    pub hold: Duration,
    /// Consoles are shown on standard error while they are written.
    pub show_consoles: bool,
}

/// The laboratory.
pub struct Lab {
    /// What the caller has.
    pub inputs: Inputs,
    /// The image under test.
    pub image: Image,
    /// How guest code runs, and why.
    pub accel: (Accel, String),
    /// The hub.
    pub hub: Hub,
    /// The time server of all machines; none when its port is taken.
    pub clock: Option<Server>,
    qemu: PathBuf,
    dir: PathBuf,
    kernel: Boot,
    firmware: Result<Firmware, String>,
    /// The shared disk, or why there is none: a boot that failed once is not tried for every scenario.
    joined: OnceCell<Result<Disk, String>>,
    count: RefCell<u32>,
}

impl Lab {
    /// Sets everything up in `dir`; what an earlier run left of the hub there is used again.
    pub fn open(inputs: Inputs, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let dir = dir.canonicalize()?;
        let image = Image::open(&inputs.image)?;
        let parts = image.parts()?;
        let (linux, initrd) = (dir.join("linux"), dir.join("initrd"));
        std::fs::write(&linux, parts.linux)?;
        std::fs::write(&initrd, parts.initrd)?;
        let qemu = PathBuf::from("qemu-system-x86_64");
        let accel = accel(&qemu, &linux);
        let mut cmdline = parts.cmdline;
        if accel.0 == Accel::Tcg {
            // The kernel looks whether its timer ticks, and panics when a busy host lets QEMU's tick too late.
            cmdline += " no_timer_check";
        }
        let kernel = Boot::Kernel { linux, initrd: Some(initrd), cmdline };
        let firmware = crate::firmware::find(&inputs.firmware).map_err(|error| error.to_string());
        let hub = Hub::start(&inputs.programs, &dir.join("hub"))?;
        let clock = Server::start();
        if let Err(error) = &clock {
            eprintln!(
                "pilot: machines have no time server, port 123 of this host is not free: {error}"
            );
        }
        Ok(Self {
            inputs,
            image,
            accel,
            hub,
            clock: clock.ok(),
            qemu,
            dir,
            kernel,
            firmware,
            joined: OnceCell::new(),
            count: RefCell::new(0),
        })
    }

    /// A file name of its own, below the folder of this run.
    pub fn file(&self, name: &str) -> PathBuf {
        *self.count.borrow_mut() += 1;
        self.dir.join(format!("{:03}-{name}", self.count.borrow()))
    }

    /// The firmware, or why there is none.
    pub fn firmware(&self) -> Result<&Firmware> {
        self.firmware.as_ref().map_err(|why| anyhow!("{why}"))
    }

    /// A machine without disks whose kernel QEMU loads.
    pub fn kernel_machine(&self, name: &str) -> Plan {
        Plan::new(name, &self.qemu, self.accel.0, self.kernel.clone())
    }

    /// A machine without disks that boots by firmware, with an empty variable store of its own.
    pub fn firmware_machine(&self, name: &str) -> Result<Plan> {
        let firmware = self.firmware()?;
        let vars = self.file("vars.fd");
        std::fs::copy(&firmware.vars, &vars)?;
        let boot = Boot::Firmware { code: firmware.code.clone(), vars, secure: false };
        Ok(Plan::new(name, &self.qemu, self.accel.0, boot))
    }

    /// A new disk as the factory flashes it.
    pub fn new_disk(&self) -> Result<Disk> {
        Disk::overlay(&self.image.base(), &self.file("disk.qcow2"), Some(DISK_LENGTH))
    }

    /// The same as a raw copy, whose bytes can be spoiled.
    pub fn new_copy(&self) -> Result<Disk> {
        Disk::copy(&self.image.base(), &self.file("disk.raw"), DISK_LENGTH)
    }

    /// Everything that a new machine needs to join under a name.
    pub fn site(&self, node: &str) -> Result<Site> {
        let mut site = self.hub.site(node)?;
        site.ntp.extend(self.clock.is_some().then(|| hub::HOST.to_owned()));
        Ok(site)
    }

    /// A site file on this host.
    pub fn site_file(&self, text: &str) -> Result<PathBuf> {
        let file = self.file("site.toml");
        std::fs::write(&file, text)?;
        Ok(file)
    }

    /// A machine that is told its site by the firmware.
    pub fn provisioned(&self, plan: Plan, site: &Site) -> Result<Plan> {
        Ok(plan.fw_cfg(SITE_ITEM, &self.site_file(&site.text())?))
    }

    /// An overlay of the disk of [`NODE`], which has joined, runs the template's app and was switched off in order.
    ///
    /// The first call makes the disk, which is a first boot.
    pub fn joined_disk(&self) -> Result<Disk> {
        Disk::overlay(self.joined()?, &self.file("disk.qcow2"), None)
    }

    /// The same as a raw copy.
    pub fn joined_copy(&self) -> Result<Disk> {
        Disk::copy(self.joined()?, &self.file("disk.raw"), DISK_LENGTH)
    }

    fn joined(&self) -> Result<&Disk> {
        let made = self.joined.get_or_init(|| self.join().map_err(|error| format!("{error:#}")));
        made.as_ref().map_err(|why| anyhow!("the shared disk was not made: {why}"))
    }

    fn join(&self) -> Result<Disk> {
        eprintln!("pilot:            making the disk of node {NODE}");
        let disk = self.new_disk()?;
        let plan = self.kernel_machine(NODE).disk(disk.clone());
        let plan = self.provisioned(plan, &self.site(NODE)?)?;
        let start = || -> Result<_> {
            let machine = plan.start()?;
            if self.inputs.show_consoles {
                machine.console().follow(NODE);
            }
            let ready = machine.expect(Want::Word("ready"), READY);
            Ok((machine, ready))
        };
        let (mut machine, mut ready) = start()?;
        if let (Err(_), Some(fault)) = (&ready, machine.console().fault()) {
            eprintln!("pilot: {NODE}: started again, the emulation was at fault: {fault}");
            (machine, ready) = start()?;
        }
        ready?;
        self.hub.wait("running app", PATIENCE, |hub| {
            let pods = hub.pods(NAMESPACE, APP)?;
            ensure!(pods.iter().any(|pod| pod.ready), "{pods:?}");
            Ok(Some(()))
        })?;
        machine.power_off(SHUTDOWN)?;
        Ok(disk)
    }
}

/// Name under which the firmware offers the site file.
pub const SITE_ITEM: &str = "opt/skerry/site.toml";

/// KVM when it starts a kernel here, else emulation; with the reason.
///
/// That its device opens proves nothing: it does on hosts where the guest then hangs.
fn accel(qemu: &Path, linux: &Path) -> (Accel, String) {
    if !Path::new("/dev/kvm").exists() {
        return (Accel::Tcg, "this host has no KVM".into());
    }
    match probe(qemu, linux) {
        Ok(took) => {
            (Accel::Kvm, format!("a kernel started under KVM in {:.1} s", took.as_secs_f64()))
        }
        Err(why) => {
            // The first line says it; the console's end follows.
            let why = format!("{why:#}");
            let first =
                why.lines().next().unwrap_or_default().split(';').next().unwrap_or_default();
            (Accel::Tcg, format!("KVM does not work here: {first}"))
        }
    }
}

/// Starts the kernel without anything else: it finds no root file system, panics and restarts at once, which ends QEMU.
fn probe(qemu: &Path, linux: &Path) -> Result<Duration> {
    let start = Instant::now();
    let mut child = Command::new(qemu)
        .args(["-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256", "-no-reboot"])
        .args(["-nodefaults", "-display", "none", "-serial", "stdio", "-kernel"])
        .arg(linux)
        .args(["-append", "console=ttyS0 panic=-1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let output = child.stdout.take().context("QEMU has no output")?;
    let console = crate::console::Console::read(output, child.id(), start);
    let bound = Bound { cpu: PROBE_LIMIT, wall: PROBE_LIMIT };
    let panicked = console.wait(0, Want::Text("Kernel panic"), bound);
    let ended = panicked.map_err(anyhow::Error::from).and_then(|_| Ok(console.wait_off(bound)?));
    // Ended already, or it hangs and must end now.
    let _ = child.kill();
    let _ = child.wait();
    ended.map(|()| start.elapsed())
}
