//! The second stage: from the verified root to services that are kept running, until the machine ends.
//!
//! [`set_up`] brings the machine up, step by step, each failure told and none of them the end: a node that can still
//! say what is wrong is worth more than one that stopped. [`Owner`] is the one loop after that: it turns descriptors
//! into events, feeds [`Supervisor`], and carries out what that says.
//!
//! When this program itself fails (a panic), it is executed again as `skerry-init resume` with the same process id:
//! services, their pipes and the watchdog go on, and only the loop is new. A parent that would watch it was not chosen:
//! it would have to be process 1 and do nothing wrong itself, for twice the memory. See `main`.

use crate::cmdline::CommandLine;
use crate::confirm::{self, Confirm};
use crate::console::{Console, Problem, Word, chain};
use crate::control::{self, BeatLine, Facts, FolderLine, Lines, Request, UpdateLine};
use crate::kernel::{Ending, Exit, Kernel, Mount, NODEV, NOSUID, RDONLY, REMOUNT, line};
use crate::logring::{self, Ring};
use crate::modules::Modules;
use crate::provision::{self, Decision, Source};
use crate::service::{self, AGENT, BROKER, CONTAINERD, NETWORK, SHELL, services};
use crate::site::{Places, Site};
use crate::stage0::{Handover, WATCHDOG, WATCHDOG_TIMEOUT};
use crate::state::{self, State};
use crate::supervise::{Action, Beat, REBOOTS_WITHIN, Supervisor};
use crate::uevent::Uevent;
use crate::update::core::Seen;
use crate::update::{self, Effect, Ordered, Updates};
use crate::{boot, clock, linux, mounts, trust, uevent};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

/// This program, for the kernel and for itself.
pub const PROGRAM: &str = "/usr/bin/skerry-init";
/// The first stage's words, kept for a second start of this one.
pub const HANDOVER: &str = "/run/skerry/handover.json";
/// The services that run, for the same.
const RUNNING: &str = "/run/skerry/services.json";
/// Where the network service says how it is.
const NETWORK_STATE: &str = "/run/skerry/network.json";
const IMAGE: &str = "/usr/share/skerry/image.json";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const MACHINE_ID: &str = "/state/machine-id";
const RANDOM_SEED: &str = "/state/secrets/random-seed";
const RANDOM_SEED_LEN: usize = 512;
const REBOOTS: &str = "/state/boot/reboots";
const KERNEL_LOG: &str = "/state/log/kernel.log";
/// Where the agent has its certificate.
const PKI: &str = "/state/edge/pki";
const CNI_CONFIG: &str = "/run/cni/net.d/10-skerry.conflist";
const CGROUPS: &str = "/sys/fs/cgroup";
/// Longest file of our own that is read.
const FILE_LEN_MAX: usize = 64 * 1024;
/// How long a stick may take to show up on a machine that was told nothing yet.
const STICK_WAIT: Duration = Duration::from_secs(3);
/// Time between two looks for a site while there is none; devices that come are looked at at once.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// Time between two looks at what the network service says, until it is online and after.
const NETWORK_SOON: Duration = Duration::from_millis(200);
const NETWORK_INTERVAL: Duration = Duration::from_secs(10);
/// Time between two looks at the room on the state.
const ROOM_INTERVAL: Duration = Duration::from_secs(30);
/// Time for the last users of the state to let go of it.
const UNMOUNT_MAX: Duration = Duration::from_secs(2);
/// Bytes taken from a pipe at once.
const CHUNK_LEN: usize = 16 * 1024;
/// Kernel messages may be that long.
const KERNEL_RECORD_LEN: usize = 8 * 1024;
/// Kernel messages that are taken at once.
const KERNEL_RECORDS_MAX: usize = 256;
/// Descriptors of buttons.
const BUTTONS_MAX: usize = 8;

/// What the builder has noted about the image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Image {
    /// Version.
    pub version: String,
    /// Time of the build, Unix seconds.
    pub epoch: i64,
    /// `amd64` or `arm64`.
    pub arch: String,
    /// `production` or `debug`.
    pub variant: String,
    /// A version with a lower one is not taken.
    pub release_counter: u64,
}

/// A service that ran when this program was started again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Ran {
    name: String,
    pid: i32,
    output: Option<i32>,
}

/// The machine, brought up.
pub struct Machine {
    kernel: &'static dyn Kernel,
    console: &'static Console<'static>,
    modules: Option<Arc<Modules<'static>>>,
    handover: Handover,
    image: Image,
    debug: bool,
    state: State,
    clock: clock::Source,
    machine_id: String,
    uevents: Option<i32>,
    kernel_log_from: bool,
}

/// Mounts, modules, state, clock, names, cgroups.
pub fn set_up(
    kernel: &'static dyn Kernel,
    console: &'static Console<'static>,
    mut handover: Handover,
) -> Machine {
    for problem in &handover.problems {
        console.remember("first stage", problem.clone());
    }
    let image: Image = kernel
        .read(IMAGE, FILE_LEN_MAX)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default();
    let command_line = CommandLine::parse(&line(kernel, "/proc/cmdline"));
    let debug = command_line.as_ref().is_ok_and(|line| line.debug);
    let version = command_line.map_or_else(|_| image.version.clone(), |line| line.version);
    let image = Image { version, ..image };
    console
        .say(Word::Stage1, format_args!("version {} from root-{}", image.version, handover.slot));
    check_architecture(kernel, console, &image);

    let modules = match Modules::open(kernel) {
        Ok(modules) => Some(Arc::new(modules)),
        Err(error) => {
            let hint = "root and kernel are of different versions; build the image again";
            console.problem("modules", Problem::new(chain(&error), hint));
            None
        }
    };
    for row in mounts::TABLE {
        if let (Some(modules), false) = (&modules, row.module.is_empty()) {
            let _ = modules.load(row.module);
        }
        if let Err(error) = kernel.mount(&row.mount())
            && !row.optional
        {
            let hint = "the kernel is not the image's own";
            let what = format!("could not mount `{}`: {error}", row.target);
            console.problem("mounts", Problem::new(what, hint));
        }
    }
    let _ = kernel.mount(&mounts::shared_root());
    for (path, mode) in mounts::FOLDERS {
        let _ = kernel.make_dir(path, mode);
    }
    save_handover(kernel, &handover);
    for path in mounts::set_all(kernel, &mounts::SYSCTLS) {
        console.say(Word::Stage1, format_args!("sysctl {path} was not taken"));
    }
    let _ = kernel.take_ctrl_alt_del();
    let uevents = kernel.open_uevents().ok();
    let coldplug = start_coldplug(kernel, modules.clone());

    if handover.watchdog.is_none() {
        // A driver that is only in the root, or none at all: then the kernel's own.
        if !kernel.exists(WATCHDOG)
            && let Some(modules) = &modules
        {
            let _ = modules.load("softdog");
        }
        handover.watchdog = kernel.open_watchdog(WATCHDOG, WATCHDOG_TIMEOUT).ok();
        save_handover(kernel, &handover);
    }
    let (state, problem) =
        state::open(kernel, modules.as_deref(), handover.state.as_deref(), handover.watchdog);
    if let Some(problem) = problem {
        console.problem("state", problem);
    }
    let how = match state {
        State::Kept { new: true } => "made",
        State::Kept { new: false } => "checked and mounted",
        State::Degraded => "read-only, changes are kept in memory",
        State::Memory => "in memory",
    };
    console.say(Word::State, how);
    let clock = match clock::set(kernel, image.epoch) {
        Ok((_, source)) => source,
        Err(error) => {
            let hint = "certificates may look as if they were not valid yet";
            let what = format!("the clock could not be set: {error}");
            console.problem("clock", Problem::new(what, hint));
            clock::Source::Rtc
        }
    };
    feed_random(kernel);
    let machine_id = machine_id(kernel);
    write_names(kernel, &format!("skerry-{}", &machine_id[machine_id.len() - 6..]));
    make_cgroups(kernel, console);
    write_cni_config(kernel);
    logring::turn_kernel_log(kernel, KERNEL_LOG);
    // The address of a wired interface may be a part of the node's name.
    drop(coldplug);
    Machine {
        kernel,
        console,
        modules,
        handover,
        image,
        debug,
        state,
        clock,
        machine_id,
        uevents,
        kernel_log_from: true,
    }
}

/// The machine as it was brought up by this program before it failed; nothing is done to it.
pub fn take_up(
    kernel: &'static dyn Kernel,
    console: &'static Console<'static>,
    handover: Handover,
) -> Machine {
    for problem in &handover.problems {
        console.remember("first stage", problem.clone());
    }
    let image = kernel.read(IMAGE, FILE_LEN_MAX).ok();
    let image = image.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    let command_line = CommandLine::parse(&line(kernel, "/proc/cmdline"));
    let mounts = kernel.read("/proc/self/mounts", 4 << 20).unwrap_or_default();
    let mounts = String::from_utf8_lossy(&mounts).into_owned();
    let state = mounts.lines().find(|line| line.split(' ').nth(1) == Some("/state"));
    let state = match state.and_then(|line| line.split(' ').nth(2)) {
        Some("ext4") => State::Kept { new: false },
        Some("overlay") => State::Degraded,
        _ => State::Memory,
    };
    Machine {
        kernel,
        console,
        modules: Modules::open(kernel).ok().map(Arc::new),
        image,
        debug: command_line.is_ok_and(|line| line.debug),
        state,
        clock: clock::Source::Kept,
        machine_id: line(kernel, MACHINE_ID),
        uevents: kernel.open_uevents().ok(),
        // Its end is in the file already, and would be written again from its start.
        kernel_log_from: false,
        handover,
    }
}

fn check_architecture(kernel: &dyn Kernel, console: &Console, image: &Image) {
    let machine = match kernel.uname().1.as_str() {
        "x86_64" => "amd64".to_owned(),
        "aarch64" => "arm64".to_owned(),
        other => other.to_owned(),
    };
    if !image.arch.is_empty() && image.arch != machine {
        let what = format!("the image is for {}, this machine is {machine}", image.arch);
        let hint = format!("build the image with `--arch {machine}`");
        console.problem("architecture", Problem::new(what, hint));
    }
}

/// Drivers of everything that is there, beside the check of the state and the start of containerd. The network's come
/// first, and what containerd asks for at its start; the rest waits for whoever else has something to do, because
/// nothing else of the way to the hub needs it.
fn start_coldplug(
    kernel: &'static dyn Kernel,
    modules: Option<Arc<Modules<'static>>>,
) -> Option<std::thread::JoinHandle<()>> {
    let work = move || {
        kernel.warm("/usr/bin/containerd");
        if let Some(modules) = modules {
            let aliases = uevent::aliases(kernel);
            let (urgent, rest): (Vec<_>, Vec<_>) =
                aliases.iter().cloned().partition(|alias| is_urgent(alias));
            modules.load_for(&urgent);
            // The power button has to be heard from early on.
            for name in ["overlay", "evdev", "button"] {
                let _ = modules.load(name); // as below
            }
            kernel.step_back();
            for name in mounts::MODULES {
                let _ = modules.load(name); // an image without it has no use for it
            }
            modules.load_for(&rest);
            // Once more: a driver may bring devices with it.
            let more: Vec<_> =
                uevent::aliases(kernel).into_iter().filter(|one| !aliases.contains(one)).collect();
            modules.load_for(&more);
        }
        mounts::set_all(kernel, &mounts::LATE_SYSCTLS);
        kernel.warm("/usr/bin/edgecore");
    };
    std::thread::Builder::new().name("coldplug".into()).spawn(work).ok()
}

/// Whether a device is a network adapter or a source of random numbers, by the alias that it asks with.
fn is_urgent(alias: &str) -> bool {
    const VIRTIO: [&str; 2] = ["virtio:d00000001v", "virtio:d00000004v"];
    VIRTIO.iter().any(|start| alias.starts_with(start))
        || (alias.starts_with("pci:") && alias.contains("bc02sc"))
}

fn save_handover(kernel: &dyn Kernel, handover: &Handover) {
    if let Ok(json) = serde_json::to_vec(handover) {
        let _ = kernel.write(HANDOVER, &json, 0o600);
    }
}

/// Mixes what the last boot has left into the kernel's pool, without credit, and leaves something for the next.
fn feed_random(kernel: &dyn Kernel) {
    if let Ok(seed) = kernel.read(RANDOM_SEED, RANDOM_SEED_LEN) {
        let _ = kernel.append("/dev/urandom", &seed);
    }
    let _ = kernel.write(RANDOM_SEED, &kernel.random(RANDOM_SEED_LEN), 0o600);
}

fn machine_id(kernel: &dyn Kernel) -> String {
    let kept = line(kernel, MACHINE_ID);
    let is_id = |id: &str| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let id = if is_id(&kept) { kept } else { crate::verity::hex(&kernel.random(16)) };
    let text = format!("{id}\n");
    if line(kernel, MACHINE_ID) != id {
        let _ = kernel.write(MACHINE_ID, text.as_bytes(), 0o444);
    }
    let _ = kernel.write("/run/machine-id", text.as_bytes(), 0o444);
    id
}

/// Host name and the files of /etc that are links into /run.
fn write_names(kernel: &dyn Kernel, name: &str) {
    let _ = kernel.set_hostname(name);
    let hosts = format!("127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 {name}\n");
    let _ = kernel.write("/run/hosts", hosts.as_bytes(), 0o644);
    let _ = kernel.write("/run/hostname", format!("{name}\n").as_bytes(), 0o644);
    if !kernel.exists("/run/resolv.conf") {
        let _ = kernel.write("/run/resolv.conf", b"", 0o644);
    }
    if !kernel.exists("/run/localtime") {
        let _ = kernel.link("/run/localtime", "/usr/share/zoneinfo/UTC");
    }
}

fn make_cgroups(kernel: &dyn Kernel, console: &Console) {
    let hand_down = |group: &str| {
        for controller in service::CONTROLLERS {
            // A kernel without one of them lacks that limit, and nothing else.
            let path = format!("{CGROUPS}{group}/cgroup.subtree_control");
            let _ = kernel.set(&path, &format!("+{controller}"));
        }
    };
    hand_down("");
    for group in service::CGROUPS {
        if let Err(error) = kernel.make_dir(&format!("{CGROUPS}/{group}"), 0o755) {
            let what = format!("cgroup `{group}` could not be made: {error}");
            console.problem("cgroups", Problem::new(what, "pods will not start"));
        }
        if !group.contains('/') {
            hand_down(&format!("/{group}"));
        }
    }
    for service in services(false) {
        if service.memory_low_mib > 0 {
            let path = format!("{CGROUPS}/{}/memory.low", service.cgroup);
            let _ = kernel.set(&path, &format!("{}M", service.memory_low_mib));
        }
    }
}

/// The network of pods: a bridge of the node's own. Leases lie in memory, so that a power cut leaks no address.
fn write_cni_config(kernel: &dyn Kernel) {
    let config = serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "skerry",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "skerry0",
                "isGateway": true,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/cni/leases",
                    "ranges": [[{"subnet": "10.88.0.0/16"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    let _ = kernel.write(CNI_CONFIG, format!("{config:#}\n").as_bytes(), 0o644);
}

/// What device events have brought.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Brought {
    block: bool,
    net: bool,
}

/// The loop, and all that it owns.
pub struct Owner {
    machine: Machine,
    supervisor: Supervisor,
    site: Option<Site>,
    source: Option<Source>,
    /// Whether a file was found that is of no use, and was told so.
    broken: bool,
    next_look: Duration,
    next_network: Duration,
    next_keep: Duration,
    next_room: Duration,
    online: bool,
    /// Whether the running version was marked as good, or could not be, in this boot.
    blessed: bool,
    /// Whether a token is left at the site's source.
    token_left: bool,
    rings: BTreeMap<&'static str, Ring>,
    /// Service by the end of its pipe.
    outputs: BTreeMap<i32, &'static str>,
    kernel_log: Option<(i32, Ring)>,
    listener: Option<UnixListener>,
    clients: BTreeMap<i32, (UnixStream, Lines)>,
    buttons: Vec<i32>,
    signals: Option<i32>,
    finished: bool,
    updates: Updates,
    /// The agent's last word of this start of it.
    beat: Option<(Duration, BeatLine)>,
    /// A change of the site that is being tried, and the agent's process before it.
    confirm: Option<(Confirm, Option<i32>)>,
    changed: Option<confirm::Status>,
}

impl Owner {
    /// Takes over a machine that was brought up.
    pub fn new(machine: Machine) -> Self {
        let kernel = machine.kernel;
        let now = kernel.uptime();
        let wall = kernel.wall();
        let age = |at: &str| u64::try_from(wall - at.trim().parse::<i64>().ok()?).ok();
        let reboots: Vec<_> = line(kernel, REBOOTS)
            .lines()
            .filter_map(age)
            .map(Duration::from_secs)
            .filter(|age| *age < REBOOTS_WITHIN)
            .collect();
        let kernel_log = machine.kernel_log_from.then(|| linux::open_nonblocking("/dev/kmsg").ok());
        let kernel_log = kernel_log.flatten().map(|fd| (fd, Ring::open(kernel, KERNEL_LOG)));
        let Image { version, arch, variant, release_counter: counter, .. } = machine.image.clone();
        let updates = Updates::new(update::Machine {
            kernel,
            console: machine.console,
            modules: machine.modules.clone(),
            disk: machine.handover.disk.clone(),
            slot: machine.handover.slot.clone(),
            version,
            arch,
            variant,
            counter,
            boot_id: line(kernel, BOOT_ID),
        });
        Self {
            updates,
            beat: None,
            confirm: None,
            changed: None,
            supervisor: Supervisor::new(services(machine.debug), now, &reboots),
            machine,
            site: None,
            source: None,
            broken: false,
            next_look: now,
            next_network: now,
            next_keep: now + clock::KEEP_INTERVAL,
            next_room: now + ROOM_INTERVAL,
            online: false,
            blessed: false,
            token_left: false,
            rings: BTreeMap::new(),
            outputs: BTreeMap::new(),
            kernel_log,
            listener: None,
            clients: BTreeMap::new(),
            buttons: Vec::new(),
            signals: None,
            finished: false,
        }
    }

    /// Goes on with the services that ran before this program was started again.
    pub fn resume(&mut self) {
        let now = self.kernel().uptime();
        self.machine.handover.resumed = self.machine.handover.resumed.max(1);
        let bytes = self.kernel().read(RUNNING, FILE_LEN_MAX).unwrap_or_default();
        let ran: Vec<Ran> = serde_json::from_slice(&bytes).unwrap_or_default();
        for one in ran {
            let known = self.supervisor.service(&one.name).map(|service| service.name);
            if let Some(name) = known.filter(|_| self.kernel().kill(one.pid, 0).is_ok()) {
                self.supervisor.adopt(now, name, one.pid);
                self.take_output(name, one.output);
            }
        }
    }

    /// Looks for the site and wants the services that follow from it and from how the machine is.
    pub fn begin(&mut self) {
        if matches!(self.machine.state, State::Kept { .. }) {
            let started = self.machine.handover.resumed == 0;
            self.updates.begin(self.kernel().uptime(), started);
            self.revert_site("the machine was started again before there was a link");
        }
        self.look_for_site();
        let first = self.site.is_none() && !self.broken && !self.kernel().exists(provision::STORED);
        if first && self.machine.handover.first_boot {
            let end = self.kernel().uptime() + STICK_WAIT;
            while self.site.is_none() && self.kernel().uptime() < end {
                let uevents = self.machine.uevents.unwrap_or(-1);
                self.kernel().wait(uevents, Duration::from_millis(100));
                if self.take_uevents().block {
                    self.look_for_site();
                }
            }
        }
        if self.site.is_none() && !self.broken {
            self.tell_of_nothing();
        }
        let now = self.kernel().uptime();
        self.supervisor.want(now, NETWORK);
        // Without a disk for images and snapshots there is nothing that pods could run on.
        if matches!(self.machine.state, State::Kept { .. }) {
            self.supervisor.want(now, CONTAINERD);
        }
        if self.kernel().exists(service::BROKER_PROGRAM) {
            let _ = self.kernel().make_dir(service::BROKER_FOLDER, 0o700);
            let _ = self.kernel().own(service::BROKER_FOLDER, service::BROKER_ID); // its log says what it lacks
            self.supervisor.want(now, BROKER);
        }
        self.supervisor.want(now, SHELL);
        self.want_agent(now);
    }

    /// The loop; returns when the machine should have ended and has not.
    ///
    /// `signals` is what [`linux::signals`] gave before any thread was made.
    pub fn run(mut self, signals: Option<i32>) {
        self.signals = signals;
        self.listen();
        self.find_buttons();
        self.begin();
        while !self.finished {
            let now = self.kernel().uptime();
            while let Some(action) = self.supervisor.poll_action(now) {
                self.carry_out(now, action);
            }
            self.tick(now);
            if self.finished {
                break;
            }
            let next = self.supervisor.poll_timeout().min(self.next_tick());
            let wait = next.saturating_sub(self.kernel().uptime());
            let fds = self.descriptors();
            match linux::poll(&fds, Some(wait)) {
                Ok(ready) => ready.into_iter().for_each(|fd| self.handle_ready(fd)),
                // Nothing that PID 1 could do about it, and it must not spin.
                Err(_) => self.kernel().sleep(Duration::from_millis(100)),
            }
            self.reap();
        }
    }

    fn kernel(&self) -> &'static dyn Kernel {
        self.machine.kernel
    }

    fn console(&self) -> &'static Console<'static> {
        self.machine.console
    }

    fn descriptors(&self) -> Vec<i32> {
        let listener = self.listener.as_ref().map(AsRawFd::as_raw_fd);
        let kernel_log = self.kernel_log.as_ref().map(|(fd, _)| *fd);
        let single = [self.signals, self.machine.uevents, listener, kernel_log];
        let mut fds: Vec<i32> = single.into_iter().flatten().collect();
        fds.extend(self.outputs.keys().chain(self.clients.keys()).chain(&self.buttons));
        fds
    }

    fn handle_ready(&mut self, fd: i32) {
        if Some(fd) == self.signals {
            self.handle_signals(fd);
        } else if Some(fd) == self.machine.uevents {
            let brought = self.take_uevents();
            // A stick may bring a newer site; an address may complete the name.
            if brought.block || (brought.net && self.site.is_none()) {
                self.look_for_site();
            }
            if brought.block && self.blessed {
                self.look_for_update();
            }
        } else if self.listener.as_ref().is_some_and(|listener| listener.as_raw_fd() == fd) {
            self.accept();
        } else if self.clients.contains_key(&fd) {
            self.handle_client(fd);
        } else if self.outputs.contains_key(&fd) {
            self.handle_output(fd);
        } else if self.buttons.contains(&fd) {
            self.handle_button(fd);
        } else {
            self.handle_kernel_log();
        }
    }

    fn handle_signals(&mut self, fd: i32) {
        const SIGHUP: i32 = 1;
        const SIGINT: i32 = 2;
        const SIGTERM: i32 = 15;
        const SIGPWR: i32 = 30;
        while let Some(signal) = linux::next_signal(fd) {
            let now = self.kernel().uptime();
            let (ending, reason) = match signal {
                SIGINT => (Ending::Reboot, "Ctrl-Alt-Del"),
                SIGTERM => (Ending::Reboot, "SIGTERM"),
                SIGPWR => (Ending::Poweroff, "SIGPWR"),
                SIGHUP => {
                    self.look_for_site();
                    continue;
                }
                _ => continue,
            };
            self.supervisor.order(now, ending, reason);
        }
    }

    fn reap(&mut self) {
        while let Some((pid, exit)) = self.kernel().reap() {
            let now = self.kernel().uptime();
            if let Some(name) = self.supervisor.name_of(pid) {
                if name == AGENT {
                    self.beat = None;
                }
                self.drain_output(name);
                self.tell_last_words(name, exit);
            }
            self.supervisor.handle_exit(now, pid, exit);
        }
    }

    /// A program that says why it ends says it to the person at the console as well.
    fn tell_last_words(&mut self, name: &'static str, exit: Exit) {
        let words = self.rings.get_mut(name).and_then(Ring::take_last_words);
        if let Some(words) = words.filter(|_| exit != Exit::Code(0) && !self.supervisor.is_ending())
        {
            let what = format!("{name}: {}", words.error);
            self.console().problem(name, Problem::new(what, words.hint));
        }
    }

    fn carry_out(&mut self, now: Duration, action: Action) {
        let kernel = self.kernel();
        match action {
            Action::Start(name) => self.start(now, name),
            Action::Signal { pid, signal } => drop(kernel.kill(pid, signal)),
            Action::Probe(name) => {
                let socket = self.supervisor.service(name).and_then(|service| service.socket);
                let accepts = socket.is_none_or(|socket| kernel.accepts(socket));
                self.supervisor.handle_probe(now, name, accepts);
            }
            Action::Pet => {
                if let Some(watchdog) = self.machine.handover.watchdog {
                    let _ = kernel.pet(watchdog);
                }
            }
            Action::ArmWatchdog(timeout) => {
                if let Some(watchdog) = self.machine.handover.watchdog {
                    let _ = kernel.set_watchdog(watchdog, timeout);
                    let _ = kernel.pet(watchdog);
                }
            }
            Action::Pods(signal) => {
                let left = self.signal_pods(signal);
                self.supervisor.handle_pods(now, left);
            }
            Action::Everybody(signal) => {
                // Nobody restarts what ends now.
                let _ = kernel.kill(-1, signal);
            }
            Action::NoteReboot => {
                let mut text = line(kernel, REBOOTS);
                let from = text.len().saturating_sub(FILE_LEN_MAX / 2);
                text = text.get(from..).unwrap_or_default().to_owned();
                let text = format!("{text}\n{}\n", kernel.wall());
                let _ = kernel.write(REBOOTS, text.trim_start().as_bytes(), 0o600);
            }
            Action::Say(word, text) => self.console().say(word, text),
            Action::Tell(of, problem) => self.console().problem(of, problem),
            Action::Solved(of) => self.console().solved(of),
            Action::Finish(ending) => self.finish(ending),
        }
    }

    fn start(&mut self, now: Duration, name: &'static str) {
        let Some(service) = self.supervisor.service(name) else { return };
        let proxy = self.site.as_ref().and_then(|site| site.network.proxy.as_deref());
        let launch = service.launch(proxy);
        if let Some(socket) = service.socket {
            // The socket of a daemon that was killed answers nobody and looks as if it were there.
            let _ = self.kernel().remove(socket);
        }
        match self.kernel().start(&launch) {
            Ok(started) => {
                self.supervisor.handle_started(now, name, started.pid);
                self.take_output(name, started.output);
                self.save_running();
            }
            Err(error) => {
                self.supervisor.handle_start_failed(now, name, &error.to_string());
            }
        }
    }

    fn take_output(&mut self, name: &'static str, output: Option<i32>) {
        let kernel = self.kernel();
        if let Some(fd) = output {
            self.outputs.insert(fd, name);
            let path = format!("/state/log/{name}.log");
            self.rings.entry(name).or_insert_with(|| Ring::open(kernel, &path));
        }
    }

    fn save_running(&self) {
        let output = |name| self.outputs.iter().find(|(_, one)| **one == name).map(|(fd, _)| *fd);
        let ran: Vec<_> = self
            .supervisor
            .running()
            .map(|(name, pid)| Ran { name: name.into(), pid, output: output(name) })
            .collect();
        if let Ok(json) = serde_json::to_vec(&ran) {
            let _ = self.kernel().write(RUNNING, &json, 0o600);
        }
    }

    fn drain_output(&mut self, name: &'static str) {
        let fds: Vec<_> =
            self.outputs.iter().filter(|(_, one)| **one == name).map(|(fd, _)| *fd).collect();
        fds.into_iter().for_each(|fd| self.handle_output(fd));
    }

    fn handle_output(&mut self, fd: i32) {
        let Some(name) = self.outputs.get(&fd).copied() else { return };
        let kernel = self.kernel();
        loop {
            match linux::read_some(fd, CHUNK_LEN) {
                Ok(Some(bytes)) if !bytes.is_empty() => {
                    let Some(ring) = self.rings.get_mut(name) else { return };
                    let lines = ring.take(kernel, kernel.uptime(), &bytes);
                    if self.machine.debug {
                        lines.iter().for_each(|line| kernel.show(&format!("{name}: {line}")));
                    }
                }
                Ok(None) => return,
                Ok(Some(_)) | Err(_) => {
                    self.outputs.remove(&fd);
                    linux::close(fd);
                    return;
                }
            }
        }
    }

    fn handle_kernel_log(&mut self) {
        let kernel = self.kernel();
        let Some((fd, ring)) = &mut self.kernel_log else { return };
        let mut lines = String::new();
        // A record at a time; EPIPE means that some were lost, and the next read goes on.
        for _ in 0..KERNEL_RECORDS_MAX {
            match linux::read_some(*fd, KERNEL_RECORD_LEN) {
                Ok(Some(record)) => {
                    lines.push_str(&logring::kernel_line(&record).unwrap_or_default());
                }
                Ok(None) => break,
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
                Err(_) => {
                    linux::close(*fd);
                    self.kernel_log = None;
                    return;
                }
            }
        }
        ring.take_whole(kernel, kernel.uptime(), lines.as_bytes());
    }

    /// Returns whether a disk, a stick or a network interface has come.
    fn take_uevents(&mut self) -> Brought {
        let mut brought = Brought::default();
        let Some(socket) = self.machine.uevents else { return brought };
        let mut input = false;
        loop {
            match self.kernel().next_uevent(socket) {
                Ok(Some(bytes)) => {
                    let Some(event) = Uevent::parse(&bytes) else { continue };
                    if let (Some(modules), Some(alias), "add") =
                        (&self.machine.modules, &event.modalias, event.action.as_str())
                    {
                        modules.load_for(std::slice::from_ref(alias));
                    }
                    let device = event.device.as_deref().unwrap_or_default();
                    let real = !["dm-", "loop"].iter().any(|prefix| device.starts_with(prefix));
                    brought.block |= event.brings_block() && real;
                    brought.net |= event.subsystem == "net" && event.action == "add";
                    input |= event.subsystem == "input";
                }
                Ok(None) => break,
                // More came than the buffer holds; what was missed is found by the next walk.
                Err(_) => {
                    if let Some(modules) = &self.machine.modules {
                        modules.load_for(&uevent::aliases(self.kernel()));
                    }
                    brought = Brought { block: true, net: true };
                    break;
                }
            }
        }
        if input {
            self.find_buttons();
        }
        brought
    }

    fn find_buttons(&mut self) {
        self.buttons.drain(..).for_each(linux::close);
        let names = self.kernel().list("/sys/class/input").unwrap_or_default();
        for name in names.iter().filter(|name| name.starts_with("event")) {
            let title = line(self.kernel(), &format!("/sys/class/input/{name}/device/name"));
            if title.contains("Power Button") && self.buttons.len() < BUTTONS_MAX {
                self.buttons.extend(linux::open_nonblocking(&format!("/dev/input/{name}")));
            }
        }
    }

    fn handle_button(&mut self, fd: i32) {
        match linux::read_some(fd, CHUNK_LEN) {
            Ok(Some(bytes)) if !bytes.is_empty() => {
                if pressed(&bytes) {
                    let now = self.kernel().uptime();
                    self.supervisor.order(now, Ending::Poweroff, "the power button");
                }
            }
            Ok(None) => {}
            _ => {
                self.buttons.retain(|one| *one != fd);
                linux::close(fd);
            }
        }
    }

    fn listen(&mut self) {
        let _ = self.kernel().remove(control::SOCKET);
        match UnixListener::bind(control::SOCKET).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        }) {
            Ok(listener) => self.listener = Some(listener),
            Err(error) => {
                let what = format!("`{}` could not be opened: {error}", control::SOCKET);
                let hint =
                    "the agent cannot say that it lives; the machine starts again in a while";
                self.console().problem("control", Problem::new(what, hint));
            }
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        while let Ok((client, _)) = listener.accept() {
            let fd = client.as_raw_fd();
            let root = linux::peer_uid(fd).is_ok_and(|uid| uid == 0);
            if root
                && self.clients.len() < control::CLIENTS_MAX
                && client.set_nonblocking(true).is_ok()
            {
                self.clients.insert(fd, (client, Lines::default()));
            }
        }
    }

    fn handle_client(&mut self, fd: i32) {
        let bytes = match linux::read_some(fd, CHUNK_LEN) {
            Ok(Some(bytes)) if !bytes.is_empty() => bytes,
            Ok(None) => return,
            _ => {
                self.clients.remove(&fd);
                return;
            }
        };
        let Some((_, lines)) = self.clients.get_mut(&fd) else { return };
        let Ok(lines) = lines.take(&bytes) else {
            self.clients.remove(&fd);
            return;
        };
        for line in lines {
            let answer = match control::parse(&line) {
                Ok(request) => self.handle_request(request),
                Err(error) => Some(control::refusal(&error)),
            };
            if let (Some(answer), Some((client, _))) = (answer, self.clients.get_mut(&fd)) {
                use std::io::Write;
                // A client that does not read its answers is not waited for.
                if client.write_all(format!("{answer}\n").as_bytes()).is_err() {
                    self.clients.remove(&fd);
                    return;
                }
            }
        }
    }

    /// Does what a client asks for; returns the answer, if there is one.
    pub fn handle_request(&mut self, request: Request) -> Option<String> {
        let now = self.kernel().uptime();
        match request {
            Request::Beat(line) => {
                let missing = line.trial.as_ref().map(|trial| trial.missing.clone());
                self.updates.handle_missing(missing);
                self.beat = Some((now, line.clone()));
                self.supervisor.handle_beat(now, &Beat::from(line));
            }
            Request::Reboot(reason) => {
                self.supervisor.order(
                    now,
                    Ending::Reboot,
                    &format!("the agent asks for it ({})", reason.reason),
                );
            }
            Request::Poweroff(reason) => {
                self.supervisor.order(
                    now,
                    Ending::Poweroff,
                    &format!("the agent asks for it ({})", reason.reason),
                );
            }
            Request::TokenUsed(true) => self.destroy_token(),
            Request::TokenUsed(false) => {}
            Request::Facts(_) => return serde_json::to_string(&self.facts()).ok(),
            Request::Update(UpdateLine { dir, pods, connected }) => {
                let taken = self.updates.handle_update(&Ordered { dir, pods, connected });
                let taken = taken.map_err(|error| (chain(&error), error.hint()));
                return Some(control::answer("update", taken));
            }
            Request::Rollback(reason) => {
                let taken = self.updates.handle_rollback(&reason.reason);
                let taken = taken.map_err(|error| (chain(&error), error.hint()));
                return Some(control::answer("rollback", taken));
            }
            Request::BootFile(FolderLine { dir }) => {
                let taken = self.updates.copy_boot_file(&dir);
                let taken = taken.map_err(|error| (chain(&error), error.hint()));
                return Some(control::answer("boot-file", taken));
            }
            Request::Site(new) => {
                let taken = self.change_site(now, &new.text);
                let taken = taken.map_err(|error| (chain(&error), error.hint()));
                return Some(control::answer("site", taken));
            }
            Request::Trust(line) => {
                let signature = crate::verity::unhex(&line.signature).unwrap_or_default();
                let taken = trust::take(self.kernel(), line.statement.as_bytes(), &signature);
                let taken = taken.map(drop).map_err(|error| (chain(&error), error.hint().into()));
                return Some(control::answer("trust", taken));
            }
        }
        None
    }

    /// Tries another site; see [`crate::confirm`].
    fn change_site(&mut self, now: Duration, text: &str) -> Result<(), confirm::ChangeError> {
        if self.confirm.is_some() {
            return Err(confirm::ChangeError::Busy);
        }
        confirm::check(text, self.site.as_ref())?;
        confirm::write(self.kernel(), text)?;
        let connected = self.beat.as_ref().is_some_and(|(_, beat)| beat.connected);
        let agent = self.agent_pid();
        self.confirm = Some((Confirm::new(now, connected), agent));
        self.changed = Some(confirm::Status { step: "trial", reason: String::new() });
        self.console().say(Word::Site, "another site is being tried");
        self.look_for_site();
        Ok(())
    }

    fn agent_pid(&self) -> Option<i32> {
        self.supervisor.running().find(|(name, _)| *name == AGENT).map(|(_, pid)| pid)
    }

    fn look_at_change(&mut self, now: Duration) {
        let Some((confirm, agent)) = &self.confirm else { return };
        // The agent of before may still say that it is connected.
        let new = self.agent_pid() != *agent;
        let connected = new && self.beat.as_ref().is_some_and(|(_, beat)| beat.connected);
        match confirm.look(now, connected) {
            None => {}
            Some(Ok(reason)) => {
                self.confirm = None;
                if confirm::keep(self.kernel()).is_ok() {
                    self.console().say(Word::Site, format_args!("the new site holds: {reason}"));
                }
                self.changed = Some(confirm::Status { step: "kept", reason: reason.into() });
            }
            Some(Err(reason)) => {
                self.confirm = None;
                self.revert_site(&reason);
                self.look_for_site();
            }
        }
    }

    /// Puts the site before back, if one is being tried.
    fn revert_site(&mut self, reason: &str) {
        match confirm::revert(self.kernel()) {
            Ok(false) => {}
            Ok(true) => {
                self.console()
                    .say(Word::Site, format_args!("the site before holds again: {reason}"));
                self.changed = Some(confirm::Status { step: "reverted", reason: reason.into() });
            }
            Err(error) => {
                let what = format!("the site before could not be put back: {error}");
                self.console()
                    .problem("change", Problem::new(what, "it is tried again at the next start"));
            }
        }
    }

    fn look_for_update(&mut self) {
        let (connected, pods) =
            self.beat.as_ref().map_or((false, 0), |(_, beat)| (beat.connected, beat.pods));
        self.updates.look_for_stick(connected, pods);
    }

    /// What the gate of a new version sees.
    fn seen(&self, now: Duration) -> Seen {
        let mounts = self.kernel().read("/proc/self/mounts", 4 << 20).unwrap_or_default();
        let mounts = String::from_utf8_lossy(&mounts).into_owned();
        let state = mounts.lines().find(|line| line.split(' ').nth(1) == Some("/state"));
        let read_only = state
            .and_then(|line| line.split(' ').nth(3))
            .is_some_and(|options| options.split(',').any(|option| option == "ro"));
        let beat = self.beat.as_ref();
        Seen {
            state: matches!(self.machine.state, State::Kept { .. }) && !read_only,
            containerd: self.supervisor.is_up(CONTAINERD),
            agent: self.site.is_some(),
            beat: beat.map(|(at, _)| now.saturating_sub(*at)),
            connected: beat.is_some_and(|(_, beat)| beat.connected),
            pods: beat.map_or(0, |(_, beat)| beat.pods),
            missing: None,
        }
    }

    fn facts(&self) -> Facts {
        let source = self.source.as_ref().map_or("none".into(), Source::to_string);
        let state = match self.machine.state {
            State::Kept { new: true } => "new",
            State::Kept { new: false } => "kept",
            State::Degraded => "degraded",
            State::Memory => "memory",
        };
        let clock = match self.machine.clock {
            clock::Source::Rtc => "rtc",
            clock::Source::Image => "image",
            clock::Source::Kept => "kept",
        };
        Facts {
            version: self.machine.image.version.clone(),
            variant: if self.machine.debug { "debug" } else { "production" }.into(),
            boot_id: line(self.kernel(), BOOT_ID),
            source,
            problems: self.console().problems(),
            uptime_s: self.kernel().uptime().as_secs(),
            clock: clock.into(),
            slot: self.machine.handover.slot.clone(),
            state: state.into(),
            update: self.updates.status(),
            releases: self.updates.releases(),
            trial: self.updates.trial_facts(),
            site: self.changed.clone(),
        }
    }

    fn destroy_token(&mut self) {
        let Some(source) = &self.source else { return };
        let kernel = self.kernel();
        let kept = kernel.exists(provision::RUN_TOKEN) || !kernel.exists(provision::ENROLLED);
        // The agent tells it at every start; mounting the medium for nothing would write to it.
        if !self.token_left && !kept {
            return;
        }
        // In memory only: the next boot needs the token once more, as the certificate will be gone.
        if !matches!(self.machine.state, State::Kept { .. }) {
            return;
        }
        match provision::destroy_token(self.kernel(), self.machine.modules.as_deref(), source) {
            Ok(()) => {
                self.token_left = false;
                self.console().solved("token");
                self.console().say(Word::Site, "the node has joined, the token is destroyed");
            }
            Err(error) => {
                let what =
                    format!("the used token could not be overwritten on the {source}: {error}");
                let hint = "take the medium away; the token cannot be used a second time";
                self.console().problem("token", Problem::new(what, hint));
            }
        }
    }

    /// Looks at all sources and takes what holds.
    fn look_for_site(&mut self) {
        let kernel = self.kernel();
        self.next_look = kernel.uptime() + LOOK_INTERVAL;
        let handover = &self.machine.handover;
        let modules = self.machine.modules.as_deref();
        let found = provision::find(kernel, modules, handover.config.as_deref(), &handover.disk);
        // What the medium says when the kept copy holds: its token is to be overwritten as well.
        let medium = found.as_ref().map(|found| found.source.clone());
        let enrolled = kernel.exists(provision::ENROLLED);
        let handed = matches!(medium, Some(Source::FwCfg | Source::Smbios | Source::Cidata(_)));
        self.token_left = found.as_ref().is_some_and(|found| {
            // What the host hands over cannot be overwritten, and is there at every boot.
            Site::without_token(&found.text).is_some() && !(handed && enrolled)
        });
        let (decision, problem) = provision::decide(found, provision::stored(kernel), enrolled);
        self.broken = problem.is_some() && matches!(decision, Decision::None);
        match problem {
            Some(problem) => self.console().problem("site", problem),
            None if !matches!(decision, Decision::None) => self.console().solved("site"),
            None => {}
        }
        let kept = matches!(decision, Decision::Kept(_));
        let (found, source) = match decision {
            Decision::None => return,
            Decision::Kept(found) => (found, medium.unwrap_or(Source::Stored)),
            Decision::New(found) => {
                if let Err(error) = provision::keep(kernel, &found) {
                    let what = format!("site.toml could not be kept: {error}");
                    let hint = "it is read from its source again at the next start";
                    self.console().problem("keep", Problem::new(what, hint));
                }
                let source = found.source.clone();
                (found, source)
            }
        };
        let hash = found.hash();
        let Ok(site) = found.site else { return };
        // The copy has lost its token meanwhile; that is no reason to start the agent again.
        let same =
            |known: &Site| *known == site || (kept && provision::differ_by_token(known, &site));
        if self.site.as_ref().is_some_and(same) {
            return;
        }
        let machine = provision::machine(kernel, &self.machine.machine_id);
        let name = match site.node.name.resolve(&machine) {
            Ok(name) => name,
            Err(error) => {
                // A network card may still show up.
                self.console().problem("name", Problem::new(error.to_string(), error.hint()));
                return;
            }
        };
        self.console().solved("name");
        self.console().solved("nothing");
        let revision = site.revision;
        // Before the first line about it; the debug variant is there to be looked at.
        self.console().silence(!site.console && !self.machine.debug);
        self.console().say(
            Word::Site,
            format_args!("node {name} from {} (revision {revision}, sha256 {hash})", found.source),
        );
        write_names(kernel, &name);
        let yaml = site.edgecore_yaml(&name, &Places::APPLIANCE);
        let token =
            site.token().map(|token| kernel.write(provision::RUN_TOKEN, token.as_bytes(), 0o600));
        let written = kernel
            .write(provision::RUN_SITE, found.text.as_bytes(), 0o600)
            .and_then(|()| kernel.write(service::AGENT_CONFIG, yaml.as_bytes(), 0o600))
            .and(token.unwrap_or(Ok(())));
        if let Err(error) = written {
            let what = format!("the configuration could not be written: {error}");
            self.console().problem("configuration", Problem::new(what, "memory may be full"));
        }
        let again = self.site.replace(site).is_some();
        self.source = Some(source);
        let now = kernel.uptime();
        if again {
            self.supervisor.restart(now, AGENT);
        }
        if self.supervisor.running().any(|(name, _)| name == NETWORK) {
            self.supervisor.restart(now, NETWORK);
        }
    }

    fn want_agent(&mut self, now: Duration) {
        if self.site.is_none() {
            return;
        }
        let kept = matches!(self.machine.state, State::Kept { .. });
        // With a certificate it can at least say what is wrong; to join anew would waste the token.
        let joined = || self.kernel().list(PKI).is_ok_and(|names| !names.is_empty());
        if kept || joined() {
            self.supervisor.want(now, AGENT);
        } else {
            let what = "this node does not join: its certificate could not be kept";
            self.console().problem("join", Problem::new(what, "replace or repair the disk first"));
        }
    }

    fn tell_of_nothing(&self) {
        let machine = provision::machine(self.kernel(), &self.machine.machine_id);
        self.console().problem("nothing", provision::nothing(&machine));
    }

    fn next_tick(&self) -> Duration {
        let look = if self.site.is_none() { self.next_look } else { self.next_keep };
        let rest = look.min(self.next_network).min(self.next_keep).min(self.next_room);
        if self.supervisor.is_ending() {
            return rest;
        }
        let change = self.confirm.as_ref().map(|(confirm, _)| confirm.until());
        self.updates.poll_timeout().into_iter().chain(change).fold(rest, Duration::min)
    }

    fn tick(&mut self, now: Duration) {
        if self.supervisor.is_ending() {
            (self.next_network, self.next_look) = (now + NETWORK_INTERVAL, now + LOOK_INTERVAL);
            (self.next_keep, self.next_room) = (now + clock::KEEP_INTERVAL, now + ROOM_INTERVAL);
            return;
        }
        if self.site.is_none() && self.next_look <= now {
            self.look_for_site();
        }
        self.want_agent(now);
        if self.next_network <= now {
            self.look_at_network();
            let soon = now < Duration::from_secs(60) && !self.online;
            self.next_network = now + if soon { NETWORK_SOON } else { NETWORK_INTERVAL };
        }
        if !self.blessed && !self.updates.is_on_trial() && self.is_healthy(now) {
            self.blessed = true;
            self.bless();
            self.updates.handle_healthy();
            self.look_for_update();
        }
        let waits = self.updates.poll_timeout().is_some_and(|next| next <= now);
        let seen = if waits { self.seen(now) } else { Seen::default() };
        for effect in self.updates.poll(now, &seen) {
            match effect {
                Effect::Restart(reason) => self.supervisor.order(now, Ending::Reboot, &reason),
                Effect::Blessed => {
                    self.blessed = true;
                    self.look_for_update();
                }
            }
        }
        self.look_at_change(now);
        if self.next_keep <= now {
            clock::keep(self.kernel());
            self.next_keep = now + clock::KEEP_INTERVAL;
        }
        if self.next_room <= now {
            self.next_room = now + ROOM_INTERVAL;
            match state::full(self.kernel()) {
                Some(problem) => self.console().problem("room", problem),
                None => self.console().solved("room"),
            }
        }
    }

    /// Whether the running version has proved itself: the node is at its hub, or all of it runs and only the hub is not
    /// there. A state that cannot be written is no proof: another version may be able to.
    fn is_healthy(&self, now: Duration) -> bool {
        matches!(self.machine.state, State::Kept { .. })
            && (self.supervisor.is_ready() || self.supervisor.is_sound(now))
    }

    fn bless(&self) {
        let Machine { handover, image, modules, .. } = &self.machine;
        let (modules, version) = (modules.as_deref(), image.version.as_str());
        match boot::bless(self.kernel(), modules, &handover.disk, version) {
            Ok(done) if done.counter => {
                self.console().say(Word::Boot, format_args!("version {version} is good"));
            }
            Ok(_) => {}
            Err(error) => {
                let hint = "the machine starts this version again; if it is a new one, at most three times";
                self.console().problem("boot", Problem::new(chain(&error), hint));
            }
        }
        if let Some(other) = boot::passed_over(self.kernel(), modules, &handover.disk, version) {
            let what =
                format!("version {other} did not start in {} tries; {version} runs", boot::TRIES);
            let hint = "send another version, or this one again";
            self.console().problem("version", Problem::new(what, hint));
        }
    }

    /// Tells what the network service says.
    fn look_at_network(&mut self) {
        let Ok(bytes) = self.kernel().read(NETWORK_STATE, FILE_LEN_MAX) else { return };
        let Some((online, text, problem)) = network_words(&bytes) else { return };
        if std::mem::replace(&mut self.online, online) != online {
            self.console().say(Word::Network, text);
        }
        match problem {
            Some(what) => {
                let hint = "check the cable and the switch, or set a static address in site.toml";
                self.console().problem("network", Problem::new(what, hint));
            }
            None => self.console().solved("network"),
        }
    }

    /// Signals every process of a pod and returns how many there are that can end by SIGTERM.
    fn signal_pods(&self, signal: i32) -> usize {
        const SIGKILL: i32 = 9;
        let root = format!("{CGROUPS}/kubepods");
        if signal == SIGKILL {
            let _ = self.kernel().set(&format!("{root}/cgroup.kill"), "1");
        }
        let mut pids = Vec::new();
        let mut folders = vec![root];
        while let Some(folder) = folders.pop() {
            pids.extend(
                line(self.kernel(), &format!("{folder}/cgroup.procs"))
                    .lines()
                    .filter_map(|pid| pid.parse::<i32>().ok()),
            );
            let names = self.kernel().list(&folder).unwrap_or_default();
            let below = names.into_iter().map(|name| format!("{folder}/{name}"));
            folders.extend(below.filter(|path| self.kernel().is_folder(path)));
        }
        if signal > 0 {
            pids.iter().for_each(|pid| drop(self.kernel().kill(*pid, signal)));
        }
        pids.retain(|pid| !is_deaf(&line(self.kernel(), &format!("/proc/{pid}/status"))));
        pids.len()
    }

    /// Keeps time and seed, unmounts, ends.
    fn finish(&mut self, ending: Ending) {
        let kernel = self.kernel();
        self.finished = true;
        clock::keep(kernel);
        let _ = kernel.write(RANDOM_SEED, &kernel.random(RANDOM_SEED_LEN), 0o600);
        self.handle_kernel_log();
        kernel.sync();
        let patience = kernel.uptime() + UNMOUNT_MAX;
        for target in mounted_below(kernel) {
            // Those that were killed need a moment to be gone.
            let mut unmounted = kernel.unmount(&target, false);
            while unmounted.is_err() && kernel.uptime() < patience {
                while kernel.reap().is_some() {}
                kernel.sleep(Duration::from_millis(20));
                unmounted = kernel.unmount(&target, false);
            }
            if unmounted.is_err() && target == "/state" {
                let flags = REMOUNT | RDONLY | NOSUID | NODEV;
                let _ = kernel.mount(&Mount::new("none", &target, "", flags, ""));
            } else if unmounted.is_err() {
                let _ = kernel.unmount(&target, true);
            }
        }
        kernel.sync();
        self.console().say(
            Word::Shutdown,
            match ending {
                Ending::Reboot => "restart",
                Ending::Poweroff => "power off",
            },
        );
        let error = kernel.end(ending);
        self.console().say(Word::Emergency, format_args!("the machine did not end: {error}"));
        kernel.sleep(Duration::from_secs(5));
        let _ = kernel.end(Ending::Reboot);
    }
}

/// Mount points on the state, the deepest and latest first.
fn mounted_below(kernel: &dyn Kernel) -> Vec<String> {
    const LEN_MAX: usize = 4 << 20;
    let bytes = kernel.read("/proc/self/mounts", LEN_MAX).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let of_state = |target: &&str| {
        ["/state", "/var", "/run/containerd", "/run/state-readonly", "/run/netns"].iter().any(
            |top| {
                target
                    .strip_prefix(top)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            },
        )
    };
    let targets = text.lines().filter_map(|line| line.split(' ').nth(1));
    let mut targets: Vec<_> =
        targets.filter(of_state).map(|one| one.replace("\\040", " ")).collect();
    targets.reverse();
    // `/var` is a bind of a part of `/state`.
    targets.sort_by_key(|target| {
        (target == "/run/state-readonly", target == "/state", target == "/var")
    });
    targets
}

/// Whether a process, by its /proc/PID/status, is the first of its own namespace and has no handler for SIGTERM: the
/// kernel never delivers it then, and to wait for its end is to wait in vain. Most images start their program so.
fn is_deaf(status: &str) -> bool {
    const SIGTERM_BIT: u64 = 1 << 14;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let first = field("NSpid:").is_some_and(|pids| pids.split_whitespace().nth(1).is_some())
        && field("NSpid:").and_then(|pids| pids.split_whitespace().last()) == Some("1");
    let caught = field("SigCgt:").and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    first && caught.is_some_and(|mask| mask & SIGTERM_BIT == 0)
}

/// Whether there is a press of the power key among input events.
fn pressed(events: &[u8]) -> bool {
    const EVENT_LEN: usize = 24;
    const EV_KEY: u16 = 1;
    const KEY_POWER: u16 = 116;
    let number = |event: &[u8], at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    events.chunks_exact(EVENT_LEN).any(|event| {
        number(event, 16) == EV_KEY
            && number(event, 18) == KEY_POWER
            && event[20..24] == 1_i32.to_ne_bytes()
    })
}

/// Whether the node is online, a line about it, and what is wrong.
fn network_words(json: &[u8]) -> Option<(bool, String, Option<String>)> {
    let state: serde_json::Value = serde_json::from_slice(json).ok()?;
    let online = state["online"].as_bool()?;
    let interfaces = state["interfaces"].as_array().map(Vec::as_slice).unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let up: Vec<_> = interfaces
        .iter()
        .filter(|one| one["addresses"].as_array().is_some_and(|all| !all.is_empty()))
        .map(|one| {
            format!(
                "{} {} ({})",
                text(&one["name"]),
                text(&one["addresses"][0]),
                text(&one["method"])
            )
        })
        .collect();
    let line = match online {
        true => format!("online: {}", up.join(", ")),
        false => "offline".into(),
    };
    let problems: Vec<_> = interfaces
        .iter()
        .filter(|one| !text(&one["problem"]).is_empty())
        .map(|one| format!("{}: {}", text(&one["name"]), text(&one["problem"])))
        .collect();
    let problem = match (online, problems.is_empty(), interfaces.is_empty()) {
        (true, true, _) | (false, true, false) => None,
        (_, true, true) => Some("there is no network interface".into()),
        _ => Some(problems.join("; ")),
    };
    Some((online, line, problem))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::{self, flashed};

    const SITE: &str = "revision = 1\n[node]\nname = \"edge-1\"\n[hub]\naddress = [\"wss://hub.example:10000\"]\n\
        enrol = \"https://hub.example:10002\"\n";

    fn machine() -> &'static recorder::Machine {
        let machine = flashed();
        machine.device("/dev/vda5", 1 << 30);
        machine.file(
            IMAGE,
            br#"{"version":"1.0","epoch":1700000000,"arch":"amd64","variant":"production"}"#,
        );
        Box::leak(Box::new(machine))
    }

    fn console(machine: &'static recorder::Machine) -> &'static Console<'static> {
        Box::leak(Box::new(Console::new(machine)))
    }

    fn handover() -> Handover {
        Handover {
            disk: "vda".into(),
            slot: "a".into(),
            config: Some("/dev/vda2".into()),
            state: Some("/dev/vda5".into()),
            watchdog: Some(9),
            first_boot: true,
            ..Handover::default()
        }
    }

    fn owner(machine: &'static recorder::Machine) -> Owner {
        let up = set_up(machine, console(machine), handover());
        Owner::new(Machine { kernel_log_from: false, ..up })
    }

    fn settle(owner: &mut Owner) {
        let now = owner.kernel().uptime();
        while let Some(action) = owner.supervisor.poll_action(now) {
            owner.carry_out(now, action);
        }
    }

    #[test]
    fn machine_comes_up_in_order() {
        let machine = machine();
        let up = set_up(machine, console(machine), handover());
        let log = machine.log();
        let mut rest = log.iter();
        for step in [
            "mount devpts /dev/pts",
            "mount tmpfs /run ",
            "mount cgroup2 /sys/fs/cgroup",
            "write /run/skerry/handover.json 600",
            "set /proc/sys/kernel/panic 10",
            "take_ctrl_alt_del",
            "open_uevents",
            "run /usr/sbin/mke2fs",
            "mount /dev/vda5 /state ext4 rw errors=remount-ro",
            "mount /state/var /var",
            "set_wall 1700000000",
            "write /state/secrets/random-seed 600",
            "write /state/machine-id 444",
            "hostname skerry-",
            "set /sys/fs/cgroup/cgroup.subtree_control +memory",
            "make_dir /sys/fs/cgroup/system/containerd",
            "set /sys/fs/cgroup/system/containerd/memory.low 64M",
            "write /run/cni/net.d/10-skerry.conflist",
        ] {
            assert!(rest.any(|line| line.starts_with(step)), "no `{step}` in its place: {log:#?}");
        }
        assert_eq!(up.clock, clock::Source::Image);
        assert!(machine.has_said("stage1", "version 1.0 from root-a"));
        assert!(machine.has_said("state", "made"));
    }

    #[test]
    fn box_without_a_site_runs_all_but_the_agent_says_how_it_is_told_and_takes_a_stick_later() {
        let machine = machine();
        let mut owner = owner(machine);
        owner.begin();
        settle(&mut owner);
        assert_eq!(machine.log_of("start ").len(), 2, "{:?}", machine.log_of("start "));
        assert!(machine.has_said("problem", "was not told what it is for"));
        assert!(machine.has_said("hint", "SKERRYCFG"));
        assert!(machine.uptime() >= STICK_WAIT, "a stick had its time");
        machine.file("/sys/firmware/qemu_fw_cfg/by_name/opt/skerry/site.toml/raw", SITE.as_bytes());
        machine.file(service::CONTAINERD_SOCKET, b"");
        machine.advance_ms(20_000);
        owner.tick(machine.uptime());
        settle(&mut owner);
        assert!(machine.has_said("site", "node edge-1 from fw_cfg (revision 1, sha256 "));
        let agent =
            machine.log_of("start /usr/bin/edgecore run --config /run/skerry/edgecore.yaml");
        assert_eq!(agent.len(), 1, "{:?}", machine.log_of("start"));
        assert!(machine.text("/run/skerry/edgecore.yaml").expect("there").contains("edge-1"));
        assert!(machine.text(provision::STORED).is_some());
        assert_eq!(machine.log_of("hostname edge-1").len(), 1);
    }

    #[test]
    fn broker_is_started_where_the_image_has_one() {
        let machine = machine();
        machine.file(service::BROKER_PROGRAM, b"");
        let mut owner = owner(machine);
        owner.begin();
        settle(&mut owner);
        let log = machine.log();
        let at = |line: &str| log.iter().position(|one| one.starts_with(line)).expect(line);
        assert!(
            at("own /var/lib/mosquitto 100") < at("start /usr/sbin/mosquitto -c /etc/mosquitto")
        );
    }

    #[test]
    fn broken_site_is_told_with_line_and_hint_and_the_rest_runs() {
        let machine = machine();
        let text = SITE.replace("name = \"edge-1\"", "nam = \"edge-1\"");
        machine.file("/sys/firmware/qemu_fw_cfg/by_name/opt/skerry/site.toml/raw", text.as_bytes());
        let mut owner = owner(machine);
        owner.begin();
        settle(&mut owner);
        assert!(
            machine.has_said("problem", "site.toml from fw_cfg, line "),
            "{:#?}",
            machine.said()
        );
        assert!(machine.has_said("hint", "name"));
        // All that is wrong at once, and not that there is no file, which would send somebody for another stick.
        assert!(machine.has_said("problem", "; line "), "{:#?}", machine.said());
        assert!(!machine.has_said("problem", "was not told"));
        assert_eq!(machine.log_of("start ").len(), 2);
    }

    #[test]
    fn degraded_state_starts_the_agent_only_with_a_certificate_and_never_containerd() {
        for joined in [false, true] {
            let machine = machine();
            machine.file(
                "/sys/firmware/qemu_fw_cfg/by_name/opt/skerry/site.toml/raw",
                SITE.as_bytes(),
            );
            machine.write_at("/dev/vda5", 1080, &[0x53, 0xef]).expect("fits");
            machine.answer("/usr/sbin/e2fsck", Exit::Code(4));
            if joined {
                machine.file("/state/edge/pki/edge.pem", b"x");
            }
            let mut owner = owner(machine);
            owner.begin();
            machine.advance_ms(60_000);
            settle(&mut owner);
            let started = machine.log_of("start ");
            assert!(!started.iter().any(|one| one.contains("containerd")), "{started:?}");
            assert_eq!(started.iter().any(|one| one.contains("edgecore")), joined, "{started:?}");
            assert!(machine.has_said("problem", "could not be repaired"));
            let answer =
                owner.handle_request(Request::Facts(control::Nothing {})).expect("one line");
            assert!(
                answer.contains(r#""state":"degraded""#)
                    && answer.contains("could not be repaired")
            );
        }
    }

    #[test]
    fn mounts_that_fail_and_foreign_images_are_told_and_the_boot_goes_on() {
        let machine = machine();
        machine.fail("mount cgroup2", 1);
        machine.file(IMAGE, br#"{"version":"1.0","epoch":1,"arch":"arm64"}"#);
        set_up(machine, console(machine), handover());
        assert!(machine.has_said("problem", "could not mount `/sys/fs/cgroup`"));
        assert!(machine.has_said("problem", "the image is for arm64, this machine is amd64"));
        assert!(machine.has_said("hint", "--arch amd64"));
    }

    #[test]
    fn order_of_the_agent_ends_the_machine_with_everything_kept_and_unmounted() {
        let machine = machine();
        machine.file("/sys/firmware/qemu_fw_cfg/by_name/opt/skerry/site.toml/raw", SITE.as_bytes());
        machine.file("/proc/self/mounts", b"/dev/vda5 /state ext4 rw 0 0\n/dev/vda5 /var ext4 rw 0 0\n\
            tmpfs /var/lib/kubelet/pods/u/volumes/x tmpfs rw 0 0\noverlay /run/containerd/x/rootfs overlay rw 0 0\n\
            proc /proc proc rw 0 0\n");
        machine.file("/sys/fs/cgroup/kubepods/pod1/c1/cgroup.procs", b"501\n502\n");
        let mut owner = owner(machine);
        owner.begin();
        settle(&mut owner);
        machine.clear_log();
        owner.handle_request(Request::Reboot(control::Reason { reason: "update".into() }));
        for _ in 0..300 {
            settle(&mut owner);
            machine.advance_ms(250);
        }
        assert!(owner.finished);
        let log = machine.log();
        let at = |line: &str| {
            let found = log.iter().position(|one| one.starts_with(line));
            found.unwrap_or_else(|| panic!("no `{line}`: {log:#?}"))
        };
        let steps = [
            at("set_watchdog 9 120"),
            at("kill 501 15"),
            at("set /sys/fs/cgroup/kubepods/cgroup.kill 1"),
            at("kill -1 15"),
            at("kill -1 9"),
            at("write /state/boot/time"),
            at("unmount /run/containerd/x/rootfs"),
            at("unmount /var/lib/kubelet/pods/u/volumes/x"),
            at("unmount /state"),
            at("unmount /var"),
            at("end Reboot"),
        ];
        assert!(steps[..8].is_sorted() && steps[10] > steps[9], "{log:#?}");
        assert!(machine.has_said("shutdown", "starting again: the agent asks for it (update)"));
    }

    #[test]
    fn site_without_a_link_is_taken_back_after_two_minutes_and_at_once_after_a_restart() {
        let newer =
            SITE.replace("revision = 1", "revision = 2").replace("hub.example", "new.example");
        let tried = || {
            let machine = machine();
            machine.file(provision::STORED, SITE.as_bytes());
            let mut owner = owner(machine);
            owner.begin();
            machine.file(service::CONTAINERD_SOCKET, b"");
            machine.advance_ms(60_000);
            settle(&mut owner);
            let beat = BeatLine { connected: true, ..BeatLine::default() };
            owner.handle_request(Request::Beat(beat));
            let site = control::SiteLine { text: newer.clone() };
            let answer = owner.handle_request(Request::Site(site.clone())).expect("answered");
            assert_eq!(answer, r#"{"site":{"accepted":true}}"#);
            let again = owner.handle_request(Request::Site(site)).expect("answered");
            assert!(again.contains("being tried"), "{again}");
            assert!(machine.text(service::AGENT_CONFIG).expect("there").contains("new.example"));
            (machine, owner)
        };
        let (machine, mut owner) = tried();
        owner.tick(machine.uptime());
        assert_eq!(owner.changed.as_ref().map(|status| status.step), Some("trial"), "an old beat");
        machine.advance_ms(121_000);
        owner.tick(machine.uptime());
        assert_eq!(owner.changed.as_ref().map(|status| status.step), Some("reverted"));
        assert_eq!(machine.text(provision::STORED).as_deref(), Some(SITE));
        assert!(machine.text(service::AGENT_CONFIG).expect("there").contains("hub.example"));

        let (machine, _) = tried();
        let mut again = super::tests::owner(machine);
        again.begin();
        assert_eq!(machine.text(provision::STORED).as_deref(), Some(SITE));
        let facts = again.handle_request(Request::Facts(control::Nothing {})).expect("one line");
        assert!(facts.contains(r#""site":{"step":"reverted""#), "{facts}");
        assert!(facts.contains(r#""update":null,"releases":{"running":"1.0""#), "{facts}");
    }

    #[test]
    fn first_process_of_a_container_without_a_handler_is_not_waited_for() {
        let status =
            |pids: &str, caught: &str| format!("Name:\tx\nNSpid:\t{pids}\nSigCgt:\t{caught}\n");
        assert!(is_deaf(&status("812\t1", "0000000000000000")));
        assert!(!is_deaf(&status("812\t1", "0000000000004002")), "it has a handler");
        assert!(!is_deaf(&status("813\t7", "0000000000000000")), "the default ends it");
        assert!(!is_deaf(&status("1", "0000000000000000")) && !is_deaf(""));
    }

    #[test]
    fn power_key_is_seen_among_other_events() {
        let event = |kind: u16, code: u16, value: i32| {
            let mut bytes = vec![0; 16];
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(code.to_ne_bytes());
            bytes.extend(value.to_ne_bytes());
            bytes
        };
        assert!(pressed(&[event(0, 0, 0), event(1, 116, 1)].concat()));
        assert!(!pressed(&[event(1, 116, 0), event(1, 30, 1), event(2, 116, 1)].concat()));
        assert!(!pressed(&[1; 10]));
    }

    #[test]
    fn network_is_told_in_one_line_and_its_problem_by_interface() {
        let json = br#"{"online":true,"interfaces":[{"name":"eth0","addresses":["10.0.2.15/24"],"method":"dhcp"},
            {"name":"eth1","addresses":[],"problem":"no DHCP answer"}]}"#;
        let (online, text, problem) = network_words(json).expect("readable");
        assert!(online);
        assert_eq!(text, "online: eth0 10.0.2.15/24 (dhcp)");
        assert_eq!(problem.as_deref(), Some("eth1: no DHCP answer"));
        let (_, _, problem) =
            network_words(br#"{"online":false,"interfaces":[]}"#).expect("readable");
        assert_eq!(problem.as_deref(), Some("there is no network interface"));
        assert_eq!(network_words(b"{"), None);
    }

    #[test]
    fn token_is_destroyed_after_use_but_not_while_nothing_can_be_kept() {
        let machine = machine();
        let token = format!("{}.eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln", "ab".repeat(32));
        let text = format!("{SITE}token = \"{token}\"\n");
        machine.file("/sys/firmware/qemu_fw_cfg/by_name/opt/skerry/site.toml/raw", text.as_bytes());
        let mut owner = owner(machine);
        owner.begin();
        assert_eq!(machine.text(provision::RUN_TOKEN).as_deref(), Some(token.as_str()));
        owner.machine.state = State::Memory;
        owner.handle_request(Request::TokenUsed(true));
        assert!(machine.text(provision::RUN_TOKEN).is_some());
        owner.machine.state = State::Kept { new: false };
        owner.handle_request(Request::TokenUsed(true));
        assert!(machine.text(provision::RUN_TOKEN).is_none());
        assert!(!machine.text(provision::STORED).expect("kept").contains(&token));
        assert!(machine.has_said("site", "token is destroyed"));
        // A stick that comes later is a reason to look again, and the copy without its token is the same site.
        settle(&mut owner);
        machine.clear_log();
        owner.look_for_site();
        settle(&mut owner);
        assert!(machine.log_of("kill").is_empty() && machine.log_of("start").is_empty());
        assert_eq!(machine.said().iter().filter(|line| line.contains("node edge-1")).count(), 1);
    }
}
