//! The first stage: from the kernel's hand to the verified root.
//!
//! Runs from the initramfs. In order: kernel filesystems, command line, device events, modules, watchdog, boot disk
//! (with its missing partitions at the first boot), verity on root-a, else root-b, root. Everything that it does is a
//! call of [`Kernel`]; what it decides about disks is in [`crate::disk`]. [`prepare`] returns when the root is the
//! root, and `main` starts the second stage from there; an [`Emergency`] is what stops it, and [`end`] starts the
//! machine again, so that the loader's counter leads to the version before.

use crate::cmdline::CommandLine;
use crate::console::{Console, Problem, Word, chain};
use crate::disk::{self, Disk, DiskError, PrepareError, Prepared};
use crate::gpt::Part;
use crate::kernel::{Ending, Kernel, Mount, NODEV, NOSUID, RDONLY, line};
use crate::modules::Modules;
use crate::uevent::{self, Uevent};
use crate::verity::{BLOCK, Corruption, Verity};
use crate::{mapper, mounts};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Time of the watchdog from the first stage on.
pub const WATCHDOG_TIMEOUT: Duration = Duration::from_secs(60);
/// The watchdog that is used.
pub const WATCHDOG: &str = "/dev/watchdog0";
/// How long a disk may take before a person is told.
pub const DISK_TELL: Duration = Duration::from_secs(30);
/// How long a disk may take before the machine is started again.
pub const DISK_MAX: Duration = Duration::from_secs(90);
/// Two disks at once are told of sooner: time cannot mend that, but a disk may still be about to go.
const DISK_SETTLE: Duration = Duration::from_secs(2);
/// Time that the console stays readable before the machine starts again.
const END_WAIT: Duration = Duration::from_secs(10);
/// Longest sleep while waiting for a device.
const WAIT_STEP: Duration = Duration::from_millis(250);
/// Name of the verified device.
const ROOT_NAME: &str = "root";
const NEW_ROOT: &str = "/sysroot";
/// What has to be there for the root, first of all. Without an index the kernel may still have them inside.
const ROOT_MODULES: [&str; 4] = ["dm_mod", "dm_verity", "erofs", "efivarfs"];
/// What makes it faster, where the processor can.
const FAST_MODULES: [&str; 2] = ["sha256_ssse3", "crc32c_intel"];
/// Where erofs has its superblock, and its first bytes.
const SUPERBLOCK_AT: usize = 1024;
const SUPERBLOCK_MAGIC: [u8; 4] = [0xe2, 0xe1, 0xf5, 0xe0];

/// Why the boot cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Emergency(pub Problem);

fn emergency(what: impl Into<String>, hint: impl Into<String>) -> Emergency {
    Emergency(Problem::new(what, hint))
}

/// What the second stage is told by the first, as one JSON argument.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Handover {
    /// The boot disk, `vda`.
    pub disk: String,
    /// Which root runs: `a` or `b`.
    pub slot: String,
    /// Node of the partition `config`.
    pub config: Option<String>,
    /// Node of the partition `state`; none when the disk has no room for it.
    pub state: Option<String>,
    /// The armed watchdog's descriptor.
    pub watchdog: Option<i32>,
    /// Whether the partitions were made just now.
    pub first_boot: bool,
    /// What the first stage has told on the console.
    pub problems: Vec<Problem>,
    /// How often the second stage has been started again after a failure of its own; see [`crate::stage1`].
    pub resumed: u32,
}

/// Prepares the root and makes it the root of this process.
///
/// # Errors
///
/// [`Emergency`], which was not told yet.
pub fn prepare(kernel: &dyn Kernel, console: &Console) -> Result<Handover, Emergency> {
    for row in mounts::EARLY {
        // A kernel that was told to mount devtmpfs itself has done so.
        let mounted = kernel.mount(&row.mount());
        mounted
            .or_else(|error| {
                if kernel.exists(&format!("{}/kmsg", row.target)) { Ok(()) } else { Err(error) }
            })
            .map_err(|error| {
                emergency(
                    format!("could not mount `{}`: {error}", row.target),
                    "this kernel is not the image's own",
                )
            })?;
    }
    console.say(Word::Boot, format_args!("kernel {}", kernel.uname().0));
    let text = line(kernel, "/proc/cmdline");
    let command_line = CommandLine::parse(&text).map_err(|error| {
        emergency(chain(&error), "start the machine through the image's own boot file")
    })?;
    let variant = if command_line.debug { " (debug)" } else { "" };
    console.say(Word::Stage0, format_args!("version {}{variant}", command_line.version));

    let uevents = kernel.open_uevents().map_err(|error| {
        emergency(
            format!("could not listen for devices: {error}"),
            "this kernel is not the image's own",
        )
    })?;
    let modules = Modules::open(kernel);
    let modules = match &modules {
        Ok(modules) => Some(modules),
        Err(error) => {
            let hint = "the initramfs was made for another kernel; build the image again";
            console.problem("modules", Problem::new(chain(error), hint));
            None
        }
    };
    if let Some(modules) = modules {
        for name in ROOT_MODULES {
            if let Err(error) = modules.load(name) {
                // efivarfs is of no use on a machine without EFI; the others fail again below, with a better word.
                if name != "efivarfs" {
                    console.say(Word::Stage0, chain(&error));
                }
            }
        }
        FAST_MODULES.iter().for_each(|name| drop(modules.load(name)));
        let count = modules.load_for(&uevent::aliases(kernel));
        console.say(Word::Stage0, format_args!("{count} modules for the devices"));
    }

    let mut boot = Boot { kernel, console, modules, uevents, watchdog: None };
    boot.take_events();
    let mut disk = boot.find_disk()?;
    console.say(
        Word::Disk,
        format_args!("{} ({} MB)", disk.name, disk.sectors * crate::gpt::SECTOR / 1_000_000),
    );
    let prepared = disk::prepare(kernel, &mut disk);
    let first_boot = boot.tell_of_table(&disk, prepared);
    let slot = boot.open_root(&disk, &command_line.verity, command_line.debug)?;
    let root = Mount::new("/dev/dm-0", NEW_ROOT, "erofs", RDONLY | NODEV | NOSUID, "");
    kernel.mount(&root).map_err(|error| {
        emergency(format!("could not mount the root: {error}"), "flash the disk again")
    })?;
    console.say(Word::Root, format_args!("root-{slot} of {}", disk.name));
    for row in mounts::EARLY {
        kernel.mount(&mounts::moved(row.target, NEW_ROOT)).map_err(|error| {
            emergency(format!("could not move `{}`: {error}", row.target), "flash the disk again")
        })?;
    }
    kernel.switch_root(NEW_ROOT).map_err(|error| {
        emergency(format!("could not change to the root: {error}"), "flash the disk again")
    })?;
    let node = |label: &str| disk.partition(label).map(|name| format!("/dev/{name}"));
    Ok(Handover {
        config: node(Part::CONFIG.label),
        state: node(Part::STATE.label).filter(|node| kernel.exists(node)),
        slot,
        watchdog: boot.watchdog,
        first_boot,
        problems: console.problems(),
        resumed: 0,
        disk: disk.name,
    })
}

/// Tells what happened, waits until somebody can have read it, and starts the machine again. Returns only if the
/// machine does not end.
pub fn end(kernel: &dyn Kernel, console: &Console, problem: &Problem) {
    console.say(Word::Emergency, &problem.what);
    if !problem.hint.is_empty() {
        console.say(Word::Hint, &problem.hint);
    }
    console.say(Word::Shutdown, format_args!("starting again in {} s", END_WAIT.as_secs()));
    kernel.sleep(END_WAIT);
    kernel.sync();
    let error = kernel.end(Ending::Reboot);
    console.say(Word::Emergency, format_args!("could not start again: {error}"));
}

struct Boot<'a> {
    kernel: &'a dyn Kernel,
    console: &'a Console<'a>,
    modules: Option<&'a Modules<'a>>,
    uevents: i32,
    watchdog: Option<i32>,
}

impl Boot<'_> {
    /// Takes what has come by now, and the watchdog as soon as there is one.
    fn take_events(&mut self) {
        while let Ok(Some(bytes)) = self.kernel.next_uevent(self.uevents) {
            let alias = Uevent::parse(&bytes).filter(|event| event.action == "add");
            if let (Some(modules), Some(alias)) =
                (self.modules, alias.and_then(|event| event.modalias))
            {
                modules.load_for(&[alias]);
            }
        }
        match self.watchdog {
            Some(watchdog) => drop(self.kernel.pet(watchdog)),
            None if self.kernel.exists(WATCHDOG) => {
                self.watchdog = self.kernel.open_watchdog(WATCHDOG, WATCHDOG_TIMEOUT).ok();
            }
            None => {}
        }
    }

    fn find_disk(&mut self) -> Result<Disk, Emergency> {
        if self.kernel.exists("/sys/firmware/efi") {
            let target = "/sys/firmware/efi/efivars";
            let mount = Mount::new("efivarfs", target, "efivarfs", RDONLY | NODEV | NOSUID, "");
            let _ = self.kernel.mount(&mount); // then exactly one disk may have the labels
        }
        let loader = disk::loader_partition(self.kernel);
        let start = self.kernel.uptime();
        loop {
            let (names, disks) = disk::look(self.kernel);
            let error = match disk::choose(&names, disks, loader) {
                Ok(disk) => {
                    self.console.solved("disk");
                    return Ok(disk);
                }
                Err(error) => error,
            };
            let waited = self.kernel.uptime().saturating_sub(start);
            let patience = match error {
                DiskError::Several(_) => DISK_SETTLE,
                _ => DISK_TELL,
            };
            if waited >= DISK_MAX {
                return Err(emergency(error.to_string(), error.hint()));
            }
            if waited >= patience {
                self.console.problem("disk", Problem::new(error.to_string(), error.hint()));
            }
            self.kernel.wait(self.uevents, WAIT_STEP);
            self.take_events();
        }
    }

    /// Returns whether this is the first boot.
    fn tell_of_table(&self, disk: &Disk, prepared: Result<Prepared, PrepareError>) -> bool {
        match prepared {
            Ok(Prepared::AsItWas) => return false,
            Ok(Prepared::Repaired) => {
                self.console.say(Word::Disk, "the partition table was repaired from its copy");
                return false;
            }
            Ok(Prepared::Extended) => {}
            Err(error) => {
                self.console.problem("disk", Problem::new(chain(&error), error.hint()));
                return false;
            }
        }
        let state = disk.table.by_label(Part::STATE.label).map_or(0, |state| state.bytes());
        let size = state / 1_000_000;
        self.console.say(Word::Disk, format_args!("first boot: state has {size} MB"));
        true
    }

    /// Verifies one of the two roots; returns which.
    fn open_root(&self, disk: &Disk, verity: &Verity, debug: bool) -> Result<String, Emergency> {
        let mut reasons = Vec::new();
        for part in [Part::ROOT_A, Part::ROOT_B] {
            let slot = part.label.trim_start_matches("root-");
            match self.try_root(disk, part.label, verity, debug) {
                Ok(()) => {
                    self.console
                        .say(Word::Verity, format_args!("{} is as it was built", part.label));
                    return Ok(slot.to_owned());
                }
                Err(reason) => {
                    self.console.say(Word::Verity, format_args!("{}: {reason}", part.label));
                    reasons.push(format!("{}: {reason}", part.label));
                }
            }
        }
        let what = format!("no root can be verified ({})", reasons.join("; "));
        Err(emergency(
            what,
            "the version before is started after three tries; else flash the disk again",
        ))
    }

    fn try_root(
        &self,
        disk: &Disk,
        label: &str,
        verity: &Verity,
        debug: bool,
    ) -> Result<(), String> {
        let name = disk.partition(label).ok_or("the disk has no such partition")?;
        let room = disk.table.by_label(label).map_or(0, |one| one.bytes());
        if verity.blocks() * BLOCK as u64 > room {
            return Err("the root of this version does not fit it".into());
        }
        let number = line(self.kernel, &format!("/sys/class/block/{name}/dev"));
        if number.is_empty() {
            return Err("the kernel does not know it".into());
        }
        let load = |corruption| verity.table(&number, corruption);
        // With plain errors first: the probe of a foreign root would panic otherwise.
        let probe = load(Corruption::Error);
        let node = mapper::create(self.kernel, ROOT_NAME, verity.sectors(), "verity", &probe)
            .map_err(|error| format!("the device mapper refused it: {error}"))?;
        let remove = |reason: String| {
            let _ = mapper::remove(self.kernel, ROOT_NAME);
            reason
        };
        let first = self.kernel.read_at(&node, 0, BLOCK).map_err(|error| {
            remove(match error.raw_os_error() {
                Some(5) => "it is not the root that this version was built with".into(),
                _ => format!("it cannot be read: {error}"),
            })
        })?;
        if first.get(SUPERBLOCK_AT..SUPERBLOCK_AT + 4) != Some(&SUPERBLOCK_MAGIC[..]) {
            return Err(remove("it holds no erofs".into()));
        }
        if !debug {
            let table = load(Corruption::Panic);
            mapper::load(self.kernel, ROOT_NAME, verity.sectors(), "verity", &table)
                .map_err(|error| remove(format!("the device mapper refused it: {error}")))?;
        }
        Ok(())
    }
}

/// The first bytes of a root, for the double.
#[cfg(test)]
pub(crate) fn sample_superblock(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes[SUPERBLOCK_AT..SUPERBLOCK_AT + 4].copy_from_slice(&SUPERBLOCK_MAGIC);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::{Machine, flashed};

    fn boot(machine: &Machine) -> Result<Handover, Emergency> {
        let console = Console::new(machine);
        prepare(machine, &console)
    }

    #[test]
    fn first_boot_goes_through_every_step_in_order() {
        let machine = flashed();
        machine.file(WATCHDOG, b"");
        let handover = boot(&machine).expect("boots");
        let log = machine.log();
        let mut rest = log.iter();
        for step in [
            "mount devtmpfs /dev devtmpfs",
            "mount proc /proc",
            "mount sysfs /sys",
            "open_uevents",
            "load dm_mod",
            "load dm_verity",
            "load erofs",
            "watchdog /dev/watchdog0 60",
            "device_len /dev/vda",
            "write_at /dev/vda",
            "reread /dev/vda",
            "dm create root",
            "dm load root verity 1 8:3 8:3 4096 4096 100 101 sha256",
            "dm resume root",
            "read_at /dev/dm-0 0 4096",
            "dm load root verity 1 8:3",
            "dm resume root",
            "mount /dev/dm-0 /sysroot erofs ro",
            "move /dev /sysroot/dev",
            "move /proc /sysroot/proc",
            "move /sys /sysroot/sys",
            "switch_root /sysroot",
        ] {
            assert!(rest.any(|line| line.starts_with(step)), "no `{step}` in its place: {log:#?}");
        }
        assert!(machine.table_of("root").expect("a table").contains("panic_on_corruption"));
        assert_eq!(handover.slot, "a");
        assert_eq!(handover.state.as_deref(), Some("/dev/vda5"));
        assert_eq!(handover.config.as_deref(), Some("/dev/vda2"));
        assert_eq!(handover.watchdog, Some(9));
        assert!(handover.first_boot && handover.problems.is_empty());
        for (word, text) in [
            ("boot", "kernel 6.12-test"),
            ("stage0", "version 1.0"),
            ("disk", "vda (4294 MB)"),
            ("verity", "root-a is as it was built"),
            ("root", "root-a of vda"),
        ] {
            assert!(machine.has_said(word, text), "{word}: {:#?}", machine.said());
        }
        let json = serde_json::to_string(&handover).expect("plain");
        assert_eq!(serde_json::from_str::<Handover>(&json).expect("the same"), handover);

        machine.clear_log();
        let again = boot(&machine).expect("boots again");
        assert!(!again.first_boot);
        assert!(machine.log_of("write_at").is_empty(), "nothing is written at later boots");
    }

    #[test]
    fn foreign_root_a_leads_to_root_b_and_no_good_root_to_an_emergency() {
        let machine = flashed();
        boot(&machine).expect("makes the partitions");
        let other = flashed();
        other.good_root("8:4");
        other.fail("dm create nothing", 1);
        // Only root-b is good.
        let machine_b = crate::recorder::Machine::new();
        machine_b.flash("vda", 4 << 30);
        machine_b.good_root("8:4");
        machine_b.modules(&[("dm_verity", &[], &[])]);
        machine_b.file("/proc/cmdline", machine.text("/proc/cmdline").expect("one").as_bytes());
        let handover = boot(&machine_b).expect("boots from b");
        assert_eq!(handover.slot, "b");
        assert!(machine_b.has_said("verity", "root-a: it is not the root"));
        let removed = machine_b.log().iter().position(|line| line == "dm remove root");
        let second = machine_b.log().iter().rposition(|line| line == "dm create root");
        assert!(removed < second, "the first is taken away before the second is tried");

        let none = crate::recorder::Machine::new();
        none.flash("vda", 4 << 30);
        none.modules(&[("dm_verity", &[], &[])]);
        none.file("/proc/cmdline", machine.text("/proc/cmdline").expect("one").as_bytes());
        let Emergency(problem) = boot(&none).expect_err("nothing verifies");
        assert!(problem.what.contains("root-a") && problem.what.contains("root-b"), "{problem:?}");
        assert!(none.log_of("mount /dev/dm-0").is_empty());
        let console = Console::new(&none);
        end(&none, &console, &problem);
        let log = none.log();
        assert_eq!(log[log.len() - 3..], ["sleep 10000", "sync", "end Reboot"]);
        assert!(none.has_said("emergency", "no root can be verified"));
        assert!(none.has_said("hint", "flash the disk again"));
    }

    #[test]
    fn debug_variant_keeps_plain_errors() {
        let machine = flashed();
        let text = machine.text("/proc/cmdline").expect("one");
        machine.file("/proc/cmdline", format!("{} skerry.variant=debug", text.trim()).as_bytes());
        boot(&machine).expect("boots");
        assert!(!machine.table_of("root").expect("a table").contains("panic"));
    }

    #[test]
    fn no_disk_is_told_after_30_s_and_the_machine_starts_again_after_90() {
        let machine = Machine::new();
        let flashed = flashed();
        machine.file("/proc/cmdline", flashed.text("/proc/cmdline").expect("one").as_bytes());
        machine.modules(&[("dm_verity", &[], &[])]);
        let Emergency(problem) = boot(&machine).expect_err("no disk");
        assert!(problem.what.contains("there is no disk at all"), "{problem:?}");
        assert!(machine.has_said("problem", "no disk of this machine"));
        let told = machine.said().iter().find(|line| line.contains(": problem: ")).cloned();
        assert!(told.expect("told").starts_with("skerry: 30."));
        assert!(machine.uptime() >= DISK_MAX && machine.uptime() < DISK_MAX + DISK_SETTLE);
    }

    #[test]
    fn disk_that_shows_up_late_is_taken_with_the_driver_that_its_controller_asks_for() {
        let machine = flashed();
        let alias =
            b"add@/devices/x\0ACTION=add\0SUBSYSTEM=virtio\0MODALIAS=virtio:d00000002v00001AF4\0";
        machine.uevent_at(Duration::from_secs(3), alias);
        machine.fail_until("device_len /dev/vda", Duration::from_secs(4), 6);
        boot(&machine).expect("boots");
        assert!(machine.loaded().contains(&"virtio_blk".to_owned()));
    }

    #[test]
    fn two_disks_are_told_at_once_with_what_to_do() {
        let machine = flashed();
        machine.flash("sda", 4 << 30);
        let Emergency(problem) = boot(&machine).expect_err("two disks");
        assert!(
            problem.what.contains("sda, vda") && problem.hint.contains("unplug"),
            "{problem:?}"
        );
        let told = machine.said().iter().find(|line| line.contains(": problem: ")).cloned();
        assert!(told.expect("told").starts_with("skerry: 2."), "{:#?}", machine.said());
    }

    #[test]
    fn disk_too_small_or_read_only_boots_without_a_state_and_says_so() {
        let machine = flashed();
        machine.device("/dev/vda", 1 << 30);
        machine.flash("vda", 1 << 30);
        let handover = boot(&machine).expect("boots");
        assert_eq!(handover.state, None);
        assert!(handover.problems[0].hint.contains("2 GB"), "{:?}", handover.problems);

        let machine = flashed();
        machine.fail("write_at /dev/vda", 30);
        let handover = boot(&machine).expect("boots");
        assert_eq!(handover.state, None);
        assert!(handover.problems[0].what.contains("could not write"), "{:?}", handover.problems);
    }

    #[test]
    fn incomplete_command_line_and_mount_that_fails_are_emergencies() {
        let machine = flashed();
        machine.file("/proc/cmdline", b"quiet");
        let Emergency(problem) = boot(&machine).expect_err("incomplete");
        assert!(problem.what.contains("skerry.version"));

        let machine = flashed();
        machine.fail("mount proc", 1);
        let Emergency(problem) = boot(&machine).expect_err("no proc");
        assert!(problem.what.contains("`/proc`"));

        let machine = flashed();
        machine.fail("mount /dev/dm-0", 5);
        let Emergency(problem) = boot(&machine).expect_err("root damaged");
        assert!(problem.what.contains("could not mount the root"));
    }

    #[test]
    fn missing_module_index_is_told_and_the_boot_goes_on_with_what_the_kernel_has() {
        let machine = flashed();
        machine.remove_file("/lib/modules/6.12-test/skerry.index");
        let handover = boot(&machine).expect("boots");
        assert!(handover.problems[0].what.contains("module index"), "{:?}", handover.problems);
    }
}
