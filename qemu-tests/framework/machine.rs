//! A machine: one QEMU process with a console log, a monitor, disks and a cable.
//!
//! A [`Plan`] says what the machine is made of and can start it any number of times on the same disks: QEMU runs with
//! `-no-reboot`, so that a restart of the guest ends the process (a warm reset is slow under emulation), and the test
//! starts the next one. A dropped [`Machine`] is killed, which is what a power cut looks like from inside.
//!
//! Source of the facts: QEMU's manual, sections "Invocation" and "fw_cfg".

use crate::console::{Bound, Console, Line, WaitError, Want};
use crate::disk::Disk;
use crate::link::{Link, Profile};
use crate::qmp::Qmp;
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for QEMU to open its monitor.
const MONITOR_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for a process that was told to quit.
const QUIT_LIMIT: Duration = Duration::from_secs(20);
/// Presses of the power button, and the wait after each: a machine that still boots does not hear the first.
const PRESSES_MAX: u32 = 4;
const PRESS_PAUSE: Bound = Bound::wall_s(15);
/// Name of the device through which the guest tells its memory.
const BALLOON: &str = "balloon0";
/// Interval at which it does, in seconds.
const BALLOON_INTERVAL_S: u64 = 1;
/// Name of the network card in the monitor.
const CARD: &str = "card0";

/// How guest code is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// By the processor; only after a probe.
    Kvm,
    /// By translation; works everywhere.
    Tcg,
}

impl Accel {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// How the machine comes to its kernel.
#[derive(Debug, Clone)]
pub enum Boot {
    /// QEMU loads it.
    Kernel {
        /// bzImage.
        linux: PathBuf,
        /// cpio archive.
        initrd: Option<PathBuf>,
        /// Its command line.
        cmdline: String,
    },
    /// UEFI firmware loads what is on the disk.
    Firmware {
        /// The program.
        code: PathBuf,
        /// The machine's own variable store, which is written.
        vars: PathBuf,
        /// The firmware guards the store (system management mode), as Secure Boot needs it.
        secure: bool,
    },
}

/// What a machine is made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Name in reports, and source of the network card's address.
    pub name: String,
    /// QEMU.
    pub qemu: PathBuf,
    /// How guest code runs.
    pub accel: Accel,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// How it boots.
    pub boot: Boot,
    /// Disks, the first one first in boot order.
    pub disks: Vec<Disk>,
    /// USB sticks.
    pub sticks: Vec<Disk>,
    /// Files that the firmware offers: name and host file.
    pub fw_cfg: Vec<(String, PathBuf)>,
    /// SMBIOS strings of type 11; no commas.
    pub oem_strings: Vec<String>,
    /// Serial number of the board.
    pub serial_number: Option<String>,
    /// What the clock says at the start, as `1970-01-01T00:00:00`; the host's time by default.
    pub rtc: Option<String>,
    /// A network card is there.
    pub network: bool,
    /// The cable.
    pub profile: Profile,
    /// Seed of the cable's losses.
    pub seed: u64,
    /// TCP ports of the machine that this host reaches, as port of this host and port of the machine.
    pub forwards: Vec<(u16, u16)>,
    /// The guest's restart restarts the machine instead of ending it.
    pub warm_reset: bool,
    /// Signals of the terminal do not reach QEMU.
    pub own_group: bool,
}

impl Plan {
    /// A machine of 512 MiB with one processor and no disk.
    pub fn new(name: &str, qemu: &Path, accel: Accel, boot: Boot) -> Self {
        Self {
            name: name.into(),
            qemu: qemu.into(),
            accel,
            memory_mib: 512,
            cpus: 1,
            boot,
            disks: Vec::new(),
            sticks: Vec::new(),
            fw_cfg: Vec::new(),
            oem_strings: Vec::new(),
            serial_number: None,
            rtc: None,
            network: true,
            profile: Profile::default(),
            seed: 1,
            forwards: Vec::new(),
            warm_reset: false,
            own_group: false,
        }
    }

    /// Adds a disk.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Adds a USB stick.
    pub fn stick(mut self, stick: Disk) -> Self {
        self.sticks.push(stick);
        self
    }

    /// Lets the firmware offer a file.
    pub fn fw_cfg(mut self, name: &str, file: &Path) -> Self {
        self.fw_cfg.push((name.into(), file.into()));
        self
    }

    /// Sets the memory.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Sets the clock.
    pub fn rtc(mut self, rtc: &str) -> Self {
        self.rtc = Some(rtc.into());
        self
    }

    /// Sets the cable.
    pub fn profile(mut self, profile: Profile) -> Self {
        self.profile = profile;
        self
    }

    /// Lets this host reach a TCP port of the machine.
    pub fn forward(mut self, host: u16, guest: u16) -> Self {
        self.forwards.push((host, guest));
        self
    }

    /// QEMU's arguments; sockets lie in `folder`.
    pub fn arguments(&self, folder: &Path, ends: &crate::link::Ends) -> Vec<String> {
        let mut args: Vec<String> = Vec::new();
        let mut put = |words: &[&str]| args.extend(words.iter().map(|word| (*word).to_owned()));
        let secure = matches!(self.boot, Boot::Firmware { secure: true, .. });
        put(&["-machine", if secure { "q35,smm=on" } else { "q35" }, "-accel", self.accel.name()]);
        put(&["-cpu", if self.accel == Accel::Kvm { "host" } else { "max" }]);
        put(&["-m", &self.memory_mib.to_string(), "-smp", &self.cpus.to_string()]);
        put(&["-nodefaults", "-no-user-config", "-display", "none"]);
        put(&["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]);
        let monitor = monitor(folder);
        put(&["-qmp", &format!("unix:{},server=on,wait=off", escaped(&monitor))]);
        put(&["-device", "virtio-rng-pci", "-device", "qemu-xhci,id=usb"]);
        put(&["-device", &format!("virtio-balloon-pci,id={BALLOON}")]);
        if !self.warm_reset {
            put(&["-no-reboot"]);
        }
        match &self.boot {
            Boot::Kernel { linux, initrd, cmdline } => {
                put(&["-kernel", &linux.to_string_lossy(), "-append", cmdline]);
                if let Some(initrd) = initrd {
                    put(&["-initrd", &initrd.to_string_lossy()]);
                }
            }
            Boot::Firmware { code, vars, .. } => {
                let flash = |file: &Path, more: &str| {
                    format!("if=pflash,format=raw,file={}{more}", escaped(file))
                };
                put(&["-drive", &flash(code, ",readonly=on"), "-drive", &flash(vars, "")]);
                if secure {
                    put(&["-global", "driver=cfi.pflash01,property=secure,value=on"]);
                }
            }
        }
        for (index, disk) in self.disks.iter().enumerate() {
            match &disk.log {
                None => put(&["-drive", &drive(disk, &format!("disk{index}"))]),
                Some(log) => {
                    let node = |name: &str, file: &Path| {
                        format!("driver=file,node-name={name}{index},filename={}", escaped(file))
                    };
                    put(&["-blockdev", &node("file", &disk.path), "-blockdev", &node("log", log)]);
                    let filter = format!(
                        "driver=blklogwrites,node-name=disk{index},file=file{index},log=log{index}"
                    );
                    put(&["-blockdev", &filter]);
                }
            }
            // QEMU's own loader of kernels has index 0.
            let boot = index + 1;
            // Merged requests have as many pieces as QEMU takes, and the filter of the log adds two of its own.
            let merge = if disk.log.is_some() { ",request-merging=off" } else { "" };
            let device =
                format!("virtio-blk-pci,drive=disk{index},id=vd{index},bootindex={boot}{merge}");
            put(&["-device", &device]);
        }
        for (index, stick) in self.sticks.iter().enumerate() {
            put(&["-drive", &drive(stick, &format!("stick{index}"))]);
            put(&["-device", &format!("usb-storage,bus=usb.0,drive=stick{index},removable=on")]);
        }
        for (name, file) in &self.fw_cfg {
            put(&["-fw_cfg", &format!("name={name},file={}", escaped(file))]);
        }
        for text in &self.oem_strings {
            put(&["-smbios", &format!("type=11,value={text}")]);
        }
        if let Some(serial) = &self.serial_number {
            put(&["-smbios", &format!("type=1,serial={serial}")]);
        }
        put(&["-rtc", &format!("base={}", self.rtc.as_deref().unwrap_or("utc"))]);
        if self.network {
            let forwards: String = self
                .forwards
                .iter()
                .map(|(host, guest)| format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}"))
                .collect();
            put(&["-netdev", &format!("user,id=world{forwards}")]);
            put(&["-netdev", "hubport,id=hub0,hubid=0,netdev=world"]);
            put(&["-netdev", &cable("net", &ends.net, &ends.net_link)]);
            put(&["-netdev", "hubport,id=hub1,hubid=0,netdev=net"]);
            put(&["-netdev", &cable("card", &ends.card, &ends.card_link)]);
            let mac = mac(&self.name);
            put(&["-device", &format!("virtio-net-pci,id={CARD},netdev=card,mac={mac},romfile=")]);
        }
        args
    }

    /// Starts a machine of this plan.
    pub fn start(&self) -> Result<Machine> {
        // Paths of sockets are limited to 107 bytes, so they go to the system's folder for such things.
        let folder = tempfile::Builder::new().prefix("skerry-vm").tempdir()?;
        let link = Link::start(folder.path(), self.seed, self.profile.clone())
            .context("could not open the sockets of the link")?;
        let arguments = self.arguments(folder.path(), link.ends());
        let log = std::fs::File::create(folder.path().join("qemu.log"))?;
        let start = Instant::now();
        let mut command = Command::new(&self.qemu);
        if self.own_group {
            command.process_group(0);
        }
        let mut child = command
            .args(&arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("could not start `{}`", self.qemu.display()))?;
        let output = child.stdout.take().context("QEMU has no output")?;
        let console = Console::read(output, child.id(), start);
        let mut machine =
            Machine { plan: self.clone(), child, console, link, qmp: None, folder, ended: None };
        match Qmp::connect(&monitor(machine.folder.path()), MONITOR_LIMIT) {
            Ok(qmp) => machine.qmp = Some(qmp),
            Err(error) => {
                let words = machine.qemu_words();
                bail!("QEMU did not start ({error}): {words}");
            }
        }
        Ok(machine)
    }
}

fn monitor(folder: &Path) -> PathBuf {
    folder.join("qmp")
}

fn cable(id: &str, local: &Path, remote: &Path) -> String {
    let (local, remote) = (escaped(local), escaped(remote));
    format!(
        "dgram,id={id},local.type=unix,local.path={local},remote.type=unix,remote.path={remote}"
    )
}

fn drive(disk: &Disk, id: &str) -> String {
    let read_only = if disk.read_only { ",readonly=on" } else { ",discard=unmap" };
    let (file, format) = (escaped(&disk.path), disk.format.name());
    format!("if=none,id={id},file={file},format={format},cache=writeback{read_only}")
}

/// QEMU splits its options at commas; a doubled one stands for itself.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// A locally administered address from a name (FNV-1a).
fn mac(name: &str) -> String {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let bytes = hash.to_be_bytes();
    format!(
        "52:54:00:{:02x}:{:02x}:{:02x}",
        bytes[0] ^ bytes[5],
        bytes[1] ^ bytes[6],
        bytes[2] ^ bytes[7]
    )
}

/// A running machine.
pub struct Machine {
    plan: Plan,
    child: Child,
    console: Console,
    link: Link,
    qmp: Option<Qmp>,
    /// Sockets and QEMU's own words.
    folder: tempfile::TempDir,
    ended: Option<ExitStatus>,
}

impl Machine {
    /// What it is made of; starts the next machine on the same disks.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What it wrote.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Its cable.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line of this boot, also one that was there before.
    pub fn expect(&self, want: Want<'_>, bound: Bound) -> Result<Line, WaitError> {
        self.console.wait(0, want, bound)
    }

    /// Runs a command of the monitor.
    pub fn monitor(
        &mut self,
        command: &str,
        arguments: serde_json::Value,
    ) -> Result<serde_json::Value> {
        let qmp = self.qmp.as_mut().context("the machine has no monitor")?;
        Ok(qmp.execute(command, arguments)?)
    }

    /// Plugs the network cable in or out.
    pub fn set_carrier(&mut self, up: bool) -> Result<()> {
        self.monitor("set_link", json!({"name": CARD, "up": up})).map(drop)
    }

    /// Stops the processor.
    pub fn pause(&mut self) -> Result<()> {
        self.monitor("stop", serde_json::Value::Null).map(drop)
    }

    /// Lets it go on.
    pub fn resume(&mut self) -> Result<()> {
        self.monitor("cont", serde_json::Value::Null).map(drop)
    }

    /// Pulls the reset line; with `-no-reboot` that ends the machine.
    pub fn reset(&mut self) -> Result<()> {
        self.monitor("system_reset", serde_json::Value::Null).map(drop)
    }

    /// Slows a disk's writes down to so many bytes a second; 0 is no limit.
    pub fn limit_writes(&mut self, disk: usize, bytes_per_s: u64) -> Result<()> {
        let limits = json!({
            "id": format!("vd{disk}"),
            "bps": 0, "bps_rd": 0, "bps_wr": bytes_per_s, "iops": 0, "iops_rd": 0, "iops_wr": 0,
        });
        self.monitor("block_set_io_throttle", limits).map(drop)
    }

    /// Bytes of memory that the guest uses: all that its kernel has, less what it calls available.
    pub fn used_memory(&mut self, limit: Duration) -> Result<u64> {
        let path = format!("/machine/peripheral/{BALLOON}");
        let interval = json!({
            "path": path, "property": "guest-stats-polling-interval", "value": BALLOON_INTERVAL_S,
        });
        self.monitor("qom-set", interval)?;
        let start = Instant::now();
        loop {
            let stats =
                self.monitor("qom-get", json!({"path": path, "property": "guest-stats"}))?;
            let stat =
                |name: &str| stats["stats"][name].as_u64().filter(|bytes| *bytes != u64::MAX);
            let known = stat("stat-total-memory").zip(stat("stat-available-memory"));
            if let Some((total, available)) = known.filter(|_| stats["last-update"] != 0) {
                return Ok(total.saturating_sub(available));
            }
            if start.elapsed() > limit {
                bail!("the guest does not tell its memory");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Presses the power button, as a person does who sees nothing happen again and again, and waits until the machine
    /// is off.
    pub fn power_off(&mut self, bound: Bound) -> Result<()> {
        let mut pressed = 0;
        while pressed < PRESSES_MAX && self.console.find(0, Want::Word("shutdown")).is_none() {
            self.monitor("system_powerdown", serde_json::Value::Null)?;
            pressed += 1;
            match self.console.wait(0, Want::Word("shutdown"), PRESS_PAUSE) {
                Ok(_) | Err(WaitError::Off { .. }) => break,
                Err(_) => {}
            }
        }
        self.console.wait_off(bound)?;
        self.wait().map(drop)
    }

    /// Cuts the power.
    pub fn kill(&mut self) -> Result<()> {
        if self.ended.is_none() {
            self.child.kill()?;
            self.wait()?;
        }
        Ok(())
    }

    /// Waits for the end of a process that is ending.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let start = Instant::now();
        loop {
            // The last look at its CPU time, before the system forgets it.
            self.console.cpu();
            if let Some(status) = self.child.try_wait()? {
                self.ended = Some(status);
                return Ok(status);
            }
            if start.elapsed() > QUIT_LIMIT {
                bail!("QEMU does not end");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether the process has ended.
    pub fn is_off(&mut self) -> bool {
        self.ended.is_some() || matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// What QEMU itself complained about.
    pub fn qemu_words(&self) -> String {
        let text = std::fs::read_to_string(self.folder.path().join("qemu.log"));
        text.unwrap_or_default().trim().to_owned()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.console.cpu();
        // Gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::Ends;

    fn plan(boot: Boot) -> Plan {
        Plan::new("lisbon-01-a", Path::new("qemu"), Accel::Tcg, boot)
    }

    #[test]
    fn kernel_machine_has_no_firmware_and_every_frame_passes_the_cable() {
        let boot = Boot::Kernel {
            linux: "/k".into(),
            initrd: Some("/i".into()),
            cmdline: "quiet a".into(),
        };
        let plan = plan(boot).forward(2222, 80).memory_mib(192).rtc("1970-01-01T00:00:00");
        let line = plan.arguments(Path::new("/s"), &Ends::below(Path::new("/s"))).join(" ");
        for part in [
            "-m 192",
            "-kernel /k -append quiet a -initrd /i",
            "base=1970-01-01T00:00:00",
            "user,id=world,hostfwd=tcp:127.0.0.1:2222-:80",
            "dgram,id=card,local.type=unix,local.path=/s/card,remote.type=unix,remote.path=/s/card-link",
            "netdev=card,mac=52:54:00:",
            "-no-reboot",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        // Only the side of the world is behind the hub: nothing reaches the card but through the cable.
        assert!(!line.contains("pflash") && !line.contains("netdev=world,"));
    }

    #[test]
    fn firmware_machine_has_its_own_variables_and_commas_are_kept() {
        let boot = Boot::Firmware { code: "/c".into(), vars: "/a,b".into(), secure: true };
        let disk = Disk::original(Path::new("/disk"));
        let plan = plan(boot).disk(disk.clone()).disk(disk);
        let line = plan.arguments(Path::new("/s"), &Ends::below(Path::new("/s"))).join(" ");
        for part in
            ["q35,smm=on", "file=/c,readonly=on", "file=/a,,b", "bootindex=2", "secure,value=on"]
        {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }

    #[test]
    fn names_give_addresses_of_their_own() {
        assert_eq!(mac("a"), mac("a"));
        assert_ne!(mac("a"), mac("b"));
    }
}
