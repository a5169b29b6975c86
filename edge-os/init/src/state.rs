//! The state partition: made once, checked at every boot, never made again over something unknown.
//!
//! [`examine`] looks, [`open`] acts. A power cut while it is being made is told by a mark in its last blocks, which the
//! filesystem does not reach: it is written before `mke2fs` and taken away when that has ended.
//!
//! A state that cannot be repaired is mounted read-only with memory over it: the node still has its name and its
//! certificate and can say what is wrong, nothing is lost that could be saved, and nothing is kept until a person has
//! acted. A state that is not ours, or not there, is replaced by memory alone.
//!
//! Source of the exit codes: e2fsprogs, e2fsck(8). Of the magic: Linux, fs/ext4/ext4.h, at byte 1080.

use crate::console::Problem;
use crate::kernel::{Exit, Kernel, Mount, NODEV, NOSUID};
use crate::modules::Modules;
use crate::mounts;
use std::io;
use std::time::Duration;

/// First bytes of the mark, and of the block that holds it.
const MARK: &[u8; 24] = b"SKERRY STATE IS BEING MA";
/// Blocks at the end that the filesystem does not have.
const TAIL_LEN: u64 = 64 * 1024;
const BLOCK: u64 = 4096;
/// What has to be zero before something unknown is taken for empty.
const BLANK_LEN: u64 = 1 << 20;
const MAGIC_AT: usize = 1080;
const MAGIC: [u8; 2] = [0x53, 0xef];
/// A large disk with many errors takes long; the watchdog is petted meanwhile.
const CHECK_LIMIT: Duration = Duration::from_secs(3600);
const MAKE_LIMIT: Duration = Duration::from_secs(600);
/// Room that is kept for containerd and the agent; see [`mounts::state`].
const RESERVE_LEN: u64 = 256 << 20;
/// Below this share of free room the state is as good as full, in percent.
const ROOM_MIN_PERCENT: u64 = 2;

/// What the partition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Nothing.
    Blank,
    /// A filesystem that was not finished.
    HalfMade,
    /// A filesystem of the right kind.
    Filesystem,
    /// Something else.
    Foreign,
}

/// How the state is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// On the disk; `true` when it was made just now.
    Kept {
        /// Made at this boot.
        new: bool,
    },
    /// Read-only on the disk, with memory over it.
    Degraded,
    /// In memory: nothing on the disk can be used.
    Memory,
}

/// What is on `device`.
///
/// # Errors
///
/// What the system says when it cannot be read.
pub fn examine(kernel: &dyn Kernel, device: &str) -> io::Result<Content> {
    let len = kernel.device_len(device)?;
    if len < BLANK_LEN + TAIL_LEN {
        return Ok(Content::Foreign);
    }
    if kernel.read_at(device, mark_at(len), MARK.len())? == MARK {
        return Ok(Content::HalfMade);
    }
    let start = kernel.read_at(device, 0, BLANK_LEN as usize)?;
    Ok(match start.get(MAGIC_AT..MAGIC_AT + MAGIC.len()) {
        Some(magic) if *magic == MAGIC => Content::Filesystem,
        _ if start.iter().all(|byte| *byte == 0) => Content::Blank,
        _ => Content::Foreign,
    })
}

/// Mounts the state at `/state` and its `var` at `/var`, and says how it is. Whatever happens, both are there and
/// writable afterwards, unless even memory cannot be mounted.
pub fn open(
    kernel: &dyn Kernel,
    modules: Option<&Modules<'_>>,
    device: Option<&str>,
    watchdog: Option<i32>,
) -> (State, Option<Problem>) {
    if let Some(modules) = modules {
        let _ = modules.load("ext4"); // the mount fails with a better word
    }
    let (state, problem) = match device {
        None => (
            State::Memory,
            Some(Problem::new(
                "there is no state partition; nothing that this node learns or runs is kept",
                "use a disk of at least 2 GB that can be written to",
            )),
        ),
        Some(device) => Open { kernel, device, watchdog }.open(),
    };
    let mounted = match state {
        State::Memory => kernel.mount(&mounts::state_in_memory("/state")),
        _ => Ok(()),
    };
    if mounted.is_ok() {
        for (path, mode) in mounts::STATE_FOLDERS {
            let _ = kernel.make_dir(path, mode); // on a full disk they are there already, or somebody else says so
        }
        let _ = kernel.mount(&mounts::var());
        for (path, target) in mounts::LINKS {
            if kernel.read_link(path).ok().as_deref() != Some(target) {
                let _ = kernel.link(path, target);
            }
        }
    }
    (state, problem.or_else(|| full(kernel)))
}

/// A problem when there is hardly any room left.
pub fn full(kernel: &dyn Kernel) -> Option<Problem> {
    let room = kernel.room("/state").ok()?;
    (room.total > 0 && room.free * 100 < room.total * ROOM_MIN_PERCENT).then(|| {
        Problem::new(
            format!("the state partition is full ({} MB free)", room.free / 1_000_000),
            "remove pods or images that are not needed, or use a larger disk",
        )
    })
}

struct Open<'a> {
    kernel: &'a dyn Kernel,
    device: &'a str,
    watchdog: Option<i32>,
}

impl Open<'_> {
    fn open(&self) -> (State, Option<Problem>) {
        let content = match examine(self.kernel, self.device) {
            Ok(content) => content,
            Err(error) => {
                let what = format!("the state partition cannot be read: {error}");
                return (
                    State::Memory,
                    Some(Problem::new(what, "the disk may be worn out; replace it")),
                );
            }
        };
        match content {
            Content::Filesystem => self.check_and_mount(),
            Content::Blank | Content::HalfMade => self.make_and_mount(),
            Content::Foreign => (
                State::Memory,
                Some(Problem::new(
                    "the state partition holds something that is not the appliance's; it was not touched",
                    "save what is on it, then erase its first MiB, or flash the disk again",
                )),
            ),
        }
    }

    fn make_and_mount(&self) -> (State, Option<Problem>) {
        match self.make() {
            Ok(()) => match self.kernel.mount(&mounts::state(self.device, false)) {
                Ok(()) => (State::Kept { new: true }, None),
                Err(error) => {
                    self.lost(format!("the new state partition cannot be mounted: {error}"))
                }
            },
            Err(error) => self.lost(format!("the state partition could not be made: {error}")),
        }
    }

    fn lost(&self, what: String) -> (State, Option<Problem>) {
        (
            State::Memory,
            Some(Problem::new(what, "the disk may be write-protected or worn out; replace it")),
        )
    }

    fn make(&self) -> io::Result<()> {
        let len = self.kernel.device_len(self.device)?;
        let mark = mark_at(len);
        let mut block = vec![0; BLOCK as usize];
        block[..MARK.len()].copy_from_slice(MARK);
        self.kernel.write_at(self.device, mark, &block)?;
        let blocks = (mark / BLOCK).to_string();
        let reserve = reserve_percent(len);
        let argv = [
            "/usr/sbin/mke2fs",
            "-q",
            "-F", // a half-made filesystem is no reason to ask
            "-t",
            "ext4",
            "-L",
            "state",
            "-b",
            "4096",
            "-m",
            &reserve,
            "-E",
            "lazy_itable_init=1,discard",
            self.device,
            &blocks,
        ];
        let (exit, said) = self.kernel.run(&argv, MAKE_LIMIT, self.watchdog)?;
        if exit != Exit::Code(0) {
            let said = said.lines().last().unwrap_or_default();
            return Err(io::Error::other(format!("mke2fs ended with {exit} {said}")));
        }
        self.kernel.write_at(self.device, mark, &vec![0; BLOCK as usize])
    }

    fn check_and_mount(&self) -> (State, Option<Problem>) {
        if self.is_write_protected() {
            return self.degrade("the disk cannot be written: its state is read-only".into());
        }
        let argv = ["/usr/sbin/e2fsck", "-p", self.device];
        let run = || self.kernel.run(&argv, CHECK_LIMIT, self.watchdog);
        let checked = match run() {
            // It asks for another start of the machine, which is for a filesystem that is mounted meanwhile. This one is
            // not, so that it is enough to look again, and a disk that always says so cannot make the machine restart
            // for ever.
            Ok((Exit::Code(2 | 3), _)) => run(),
            other => other,
        };
        let problem = match checked {
            Ok((Exit::Code(0 | 1), _)) => None,
            Ok((exit, said)) => {
                let said = said.lines().last().unwrap_or_default().to_owned();
                return self.degrade(format!(
                    "the state partition could not be repaired ({exit}: {said})"
                ));
            }
            // Not being able to check is not a finding: the journal is replayed by the mount.
            Err(error) => Some(Problem::new(
                format!("the state partition could not be checked: {error}"),
                "the disk may be slow or worn out",
            )),
        };
        match self.kernel.mount(&mounts::state(self.device, false)) {
            Ok(()) => (State::Kept { new: false }, problem),
            Err(error) => self.degrade(format!("the state partition cannot be mounted: {error}")),
        }
    }

    /// Whether the disk itself refuses to be written, as flash does at the end of its life; a check would only say so in its
    /// own words.
    fn is_write_protected(&self) -> bool {
        let name = self.device.trim_start_matches("/dev/");
        let told = self.kernel.read(&format!("/sys/class/block/{name}/ro"), 16);
        told.is_ok_and(|told| told.trim_ascii() == b"1")
    }

    /// Read-only, with memory over it.
    fn degrade(&self, what: String) -> (State, Option<Problem>) {
        let hint =
            "nothing is kept until the disk is replaced or repaired; what is on it was not touched";
        let problem = Some(Problem::new(what, hint));
        let below =
            Mount { target: "/run/state-readonly".into(), ..mounts::state(self.device, true) };
        let memory =
            Mount::new("tmpfs", "/run/state-memory", "tmpfs", NOSUID | NODEV, "mode=0700,size=25%");
        let mounted = self.kernel.mount(&below).and_then(|()| {
            self.kernel.mount(&memory)?;
            self.kernel.make_dir("/run/state-memory/upper", 0o755)?;
            self.kernel.make_dir("/run/state-memory/work", 0o755)?;
            self.kernel.mount(&mounts::state_overlay())
        });
        match mounted {
            Ok(()) => (State::Degraded, problem),
            Err(_) => (State::Memory, problem),
        }
    }
}

/// Share of the partition that pods cannot use, as `mke2fs` takes it: [`RESERVE_LEN`], at most a twentieth.
fn reserve_percent(len: u64) -> String {
    let hundredths = (RESERVE_LEN * 10_000 / len.max(1)).clamp(1, 500);
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

fn mark_at(len: u64) -> u64 {
    (len - TAIL_LEN) / BLOCK * BLOCK
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Room;
    use crate::recorder::Machine;

    const DEVICE: &str = "/dev/vda5";
    const LEN: u64 = 1 << 30;

    fn machine() -> Machine {
        let machine = Machine::new();
        machine.device(DEVICE, LEN);
        machine
    }

    fn open_it(machine: &Machine) -> (State, Option<Problem>) {
        open(machine, None, Some(DEVICE), None)
    }

    #[test]
    fn blank_partition_is_marked_made_unmarked_and_mounted() {
        let machine = machine();
        assert_eq!(open_it(&machine), (State::Kept { new: true }, None));
        let steps: Vec<_> = machine
            .log()
            .iter()
            .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
            .filter(|word| ["write_at", "run", "mount"].contains(&word.as_str()))
            .collect();
        assert_eq!(steps, ["write_at", "run", "write_at", "mount", "mount"]);
        let made = &machine.log_of("run")[0];
        assert!(
            made.contains("lazy_itable_init=1,discard") && !made.contains("has_journal"),
            "{made}"
        );
        assert!(made.ends_with(&format!("{DEVICE} {}", (LEN - TAIL_LEN) / BLOCK)), "{made}");
        assert_eq!(examine(&machine, DEVICE).expect("readable"), Content::Filesystem);
        machine.clear_log();
        assert_eq!(open_it(&machine), (State::Kept { new: false }, None));
        assert!(machine.log_of("run /usr/sbin/e2fsck -p").len() == 1);
        assert!(machine.log_of("write_at").is_empty());
    }

    #[test]
    fn power_cut_while_it_is_made_is_repeated_however_far_it_came() {
        // Cut before the mark, at mke2fs, and before the mark is taken away.
        for line in ["write_at", "run /usr/sbin/mke2fs"] {
            let machine = machine();
            machine.fail(line, 5);
            assert_eq!(open_it(&machine).0, State::Memory);
            machine.heal();
            assert_eq!(open_it(&machine).0, State::Kept { new: true });
        }
        let machine = machine();
        machine.fail_after("write_at", 1, 5);
        assert_eq!(open_it(&machine).0, State::Memory);
        machine.heal();
        assert_eq!(examine(&machine, DEVICE).expect("readable"), Content::HalfMade);
        assert_eq!(open_it(&machine).0, State::Kept { new: true });
    }

    #[test]
    fn unknown_data_is_never_formatted() {
        let machine = machine();
        machine.write_at(DEVICE, 900_000, b"somebody's").expect("written");
        machine.clear_log();
        let (state, problem) = open_it(&machine);
        assert_eq!(state, State::Memory);
        assert!(problem.expect("told").what.contains("not touched"));
        assert!(machine.log_of("run").is_empty() && machine.log_of("write_at").is_empty());
        assert_eq!(machine.mounts()["/state"], "tmpfs");
    }

    #[test]
    fn exit_codes_of_the_check_are_told_apart() {
        let answer = |exit| {
            let machine = machine();
            open_it(&machine);
            machine.clear_log();
            machine.answer("/usr/sbin/e2fsck", exit);
            let answer = open_it(&machine);
            assert!(machine.log_of("run /usr/sbin/mke2fs").is_empty(), "never made again");
            (answer.0, answer.1.is_some(), machine)
        };
        assert_eq!(answer(Exit::Code(1)).0, State::Kept { new: false });
        for bad in [
            Exit::Code(2),
            Exit::Code(3),
            Exit::Code(4),
            Exit::Code(12),
            Exit::Code(8),
            Exit::Signal(11),
        ] {
            let (state, told, machine) = answer(bad);
            assert_eq!((state, told), (State::Degraded, true), "{bad}");
            let mounts = machine.log_of("mount /dev/vda5");
            assert!(mounts[0].contains("/run/state-readonly ext4 ro"), "{mounts:?}");
            assert_eq!(machine.mounts()["/state"], "overlay");
        }
    }

    #[test]
    fn disk_that_refuses_to_be_written_is_told_in_plain_words_and_not_checked() {
        let machine = machine();
        open_it(&machine);
        machine.clear_log();
        machine.file("/sys/class/block/vda5/ro", b"1\n");
        let (state, problem) = open_it(&machine);
        assert_eq!(state, State::Degraded);
        assert!(problem.expect("told").what.contains("cannot be written"));
        assert!(machine.log_of("run").is_empty());
        machine.file("/sys/class/block/vda5/ro", b"0\n");
        assert_eq!(open_it(&machine).0, State::Kept { new: false });
    }

    #[test]
    fn check_that_asks_for_another_start_is_run_again_and_never_restarts_the_machine() {
        let machine = machine();
        open_it(&machine);
        machine.clear_log();
        machine.answer("/usr/sbin/e2fsck", Exit::Code(3));
        machine.answer("/usr/sbin/e2fsck", Exit::Code(0));
        assert_eq!(open_it(&machine), (State::Kept { new: false }, None));
        assert_eq!(machine.log_of("run /usr/sbin/e2fsck").len(), 2);

        let machine = self::machine();
        open_it(&machine);
        machine.answer("/usr/sbin/e2fsck", Exit::Code(2));
        let (state, problem) = open_it(&machine);
        assert_eq!(machine.log_of("run /usr/sbin/e2fsck").len(), 2);
        assert_eq!((state, problem.is_some()), (State::Degraded, true));
    }

    #[test]
    fn disk_that_cannot_be_read_mounted_or_is_not_there_leaves_a_state_in_memory_or_read_only() {
        let machine = machine();
        machine.fail("read_at", 5);
        let (state, problem) = open_it(&machine);
        assert_eq!(state, State::Memory);
        assert!(problem.expect("told").what.contains("cannot be read"));

        let machine = self::machine();
        open_it(&machine);
        machine.fail("mount /dev/vda5 /state", 117);
        let (state, problem) = open_it(&machine);
        assert_eq!(state, State::Degraded);
        assert!(problem.expect("told").what.contains("cannot be mounted"));

        let (state, problem) = open(&machine, None, None, None);
        assert_eq!(state, State::Memory);
        assert!(problem.expect("told").what.contains("no state partition"));
    }

    #[test]
    fn reserve_is_a_twentieth_of_small_disks_and_never_more_than_its_length() {
        for (len, percent) in [(1 << 30, "5.00"), (64 << 30, "0.39"), (1 << 42, "0.01")] {
            assert_eq!(reserve_percent(len), percent);
        }
        let machine = machine();
        open_it(&machine);
        assert!(machine.log_of("run /usr/sbin/mke2fs")[0].contains(" -m "));
        let mount = machine.log_of("mount /dev/vda5 /state");
        assert!(mount[0].contains("resuid="), "{mount:?}");
    }

    #[test]
    fn full_partition_is_mounted_and_told() {
        let machine = machine();
        machine.set_room(Room { total: 1_000_000_000, free: 1_000_000 });
        let (state, problem) = open_it(&machine);
        assert_eq!(state, State::Kept { new: true });
        assert!(problem.expect("told").what.contains("full (1 MB free)"));
    }
}
