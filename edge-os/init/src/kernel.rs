//! What PID 1 asks of the machine: every system call that it makes, as a trait.
//!
//! [`crate::linux::Linux`] carries it out; the double in [`crate::recorder`] writes down what was asked and answers from
//! a machine in memory, so that order and every error path of the boot are tested without one. Nothing here decides.
//!
//! Paths are texts: PID 1 only meets paths that it or the image has named.

use std::io;
use std::time::Duration;

/// A mount, as in the table of [`crate::mounts`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Device, or the filesystem's name where there is none.
    pub source: String,
    /// Where; made if it is not there and can be made.
    pub target: String,
    /// `erofs`, `tmpfs`, ...; empty for binds and moves.
    pub fstype: String,
    /// `MS_*` of mount(2).
    pub flags: u64,
    /// Options of the filesystem.
    pub data: String,
}

impl Mount {
    /// A mount without options.
    pub fn new(source: &str, target: &str, fstype: &str, flags: u64, data: &str) -> Self {
        Self {
            source: source.into(),
            target: target.into(),
            fstype: fstype.into(),
            flags,
            data: data.into(),
        }
    }
}

/// `MS_RDONLY`.
pub const RDONLY: u64 = 1;
/// `MS_NOSUID`.
pub const NOSUID: u64 = 2;
/// `MS_NODEV`.
pub const NODEV: u64 = 4;
/// `MS_NOEXEC`.
pub const NOEXEC: u64 = 8;
/// `MS_REMOUNT`.
pub const REMOUNT: u64 = 32;
/// `MS_NOATIME`.
pub const NOATIME: u64 = 1024;
/// `MS_BIND`.
pub const BIND: u64 = 4096;
/// `MS_MOVE`.
pub const MOVE: u64 = 8192;
/// `MS_REC`.
pub const REC: u64 = 16384;
/// `MS_SHARED`.
pub const SHARED: u64 = 1 << 20;

/// How the machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// Start again.
    Reboot,
    /// Power off.
    Poweroff,
}

/// A program that is started and not waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Below /sys/fs/cgroup; empty for the root.
    pub cgroup: String,
    /// `oom_score_adj`, -1000 to 1000.
    pub oom_score: i32,
    /// Capabilities by number that it, and all that it starts, can never have.
    pub without_capabilities: Vec<u8>,
    /// A terminal that becomes its own, instead of the pipe.
    pub console: Option<String>,
}

/// A program that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// Process id.
    pub pid: i32,
    /// The end of the pipe that its output comes from; not blocking. None on a console.
    pub output: Option<i32>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Exit {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Room on a filesystem, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Room {
    /// All.
    pub total: u64,
    /// Free, without what is kept for those with special rights.
    pub free: u64,
}

/// The machine.
///
/// Errors are those of the system, as they come: who calls knows the file and the reason.
pub trait Kernel: Send + Sync {
    /// Time since the machine started.
    fn uptime(&self) -> Duration;
    /// Unix seconds.
    fn wall(&self) -> i64;
    /// Sets the wall clock.
    fn set_wall(&self, unix_s: i64) -> io::Result<()>;
    /// The hardware clock in Unix seconds, if there is one.
    fn rtc(&self) -> io::Result<i64>;
    /// Does nothing for so long.
    fn sleep(&self, time: Duration);

    /// mount(2).
    fn mount(&self, mount: &Mount) -> io::Result<()>;
    /// umount2(2); `lazy` takes it out of sight at once and ends it with its last user.
    fn unmount(&self, target: &str, lazy: bool) -> io::Result<()>;
    /// Makes `new_root` the root of this process and of all that it starts, and frees what the old root holds.
    fn switch_root(&self, new_root: &str) -> io::Result<()>;
    /// sync(2).
    fn sync(&self);
    /// statvfs(3).
    fn room(&self, path: &str) -> io::Result<Room>;

    /// Makes a folder, with those above it.
    fn make_dir(&self, path: &str, mode: u32) -> io::Result<()>;
    /// Gives a file or folder to a user and the group of the same number.
    fn own(&self, path: &str, id: u32) -> io::Result<()>;
    /// Makes a link at `path`, in place of one that is there.
    fn link(&self, path: &str, target: &str) -> io::Result<()>;
    /// Where a link leads.
    fn read_link(&self, path: &str) -> io::Result<String>;
    /// Names in a folder, sorted.
    fn list(&self, path: &str) -> io::Result<Vec<String>>;
    /// Whether it is a folder, and no link to one.
    fn is_folder(&self, path: &str) -> bool;
    /// Whether something is there.
    fn exists(&self, path: &str) -> bool;
    /// A whole file; an error when it is longer than `len_max` bytes.
    fn read(&self, path: &str, len_max: usize) -> io::Result<Vec<u8>>;
    /// `len` bytes of a file or device.
    fn read_at(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>>;
    /// Writes into a file of the kernel, such as a sysctl: one write, nothing made, nothing cut.
    fn set(&self, path: &str, text: &str) -> io::Result<()>;
    /// Makes a file with mode `mode`, or replaces it, whole or not at all; durable when it returns.
    fn write(&self, path: &str, bytes: &[u8], mode: u32) -> io::Result<()>;
    /// Overwrites a part of a file or device; durable when it returns.
    fn write_at(&self, path: &str, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// `len` bytes past every cache, as the disk has them; fewer at the end of a file.
    fn read_direct(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>>;
    /// Overwrites a part of a device past every cache; offset and length are multiples of 4096. Durable after
    /// [`Kernel::flush`].
    fn write_direct(&self, path: &str, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// fsync(2) of a file, a folder or a device; the disk empties its own cache as well.
    fn flush(&self, path: &str) -> io::Result<()>;
    /// Length of a file in bytes.
    fn file_len(&self, path: &str) -> io::Result<u64>;
    /// Removes a folder with everything in it; one that is not there is no error.
    fn remove_folder(&self, path: &str) -> io::Result<()>;
    /// Makes or replaces a variable of the firmware, four bytes of attributes first: the whole of it in one write.
    fn write_variable(&self, path: &str, bytes: &[u8]) -> io::Result<()>;
    /// Adds to a file, which is made if needed; not synced.
    fn append(&self, path: &str, bytes: &[u8]) -> io::Result<()>;
    /// rename(2).
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// unlink(2).
    fn remove(&self, path: &str) -> io::Result<()>;
    /// Lets every other thread that has something to do go before this one, from now on.
    fn step_back(&self);
    /// Asks for the pages of a file ahead of their use.
    fn warm(&self, path: &str);

    /// Length of a block device in bytes.
    fn device_len(&self, path: &str) -> io::Result<u64>;
    /// Has the partition table of a disk read again.
    fn reread_partitions(&self, path: &str) -> io::Result<()>;
    /// Tells the kernel of one partition; offset and length in bytes.
    fn add_partition(&self, disk: &str, number: u32, start: u64, len: u64) -> io::Result<()>;
    /// An ioctl of the device mapper; the answer takes the place of the request.
    fn device_mapper(&self, command: u8, request: &mut Vec<u8>) -> io::Result<()>;
    /// finit_module(2); a module that is there already is no error.
    fn load_module(&self, path: &str) -> io::Result<()>;
    /// delete_module(2) is never used; this is `uname -r` and the machine, `x86_64`.
    fn uname(&self) -> (String, String);
    /// Random bytes, as soon as the kernel has them.
    fn random(&self, len: usize) -> Vec<u8>;
    /// sethostname(2).
    fn set_hostname(&self, name: &str) -> io::Result<()>;

    /// Opens a watchdog and sets its time; the descriptor outlives an exec.
    fn open_watchdog(&self, path: &str, timeout: Duration) -> io::Result<i32>;
    /// Sets the time of an open watchdog.
    fn set_watchdog(&self, watchdog: i32, timeout: Duration) -> io::Result<()>;
    /// Tells the watchdog that all is well.
    fn pet(&self, watchdog: i32) -> io::Result<()>;

    /// Runs a program to its end and returns how it ended and what it said; SIGKILL after `limit`. Pets `watchdog`
    /// meanwhile. Only before [`Kernel::reap`] is used and after: both would take the same child.
    fn run(
        &self,
        argv: &[&str],
        limit: Duration,
        watchdog: Option<i32>,
    ) -> io::Result<(Exit, String)>;
    /// Starts a program.
    fn start(&self, launch: &Launch) -> io::Result<Started>;
    /// A child that has ended and was not told of yet.
    fn reap(&self) -> Option<(i32, Exit)>;
    /// kill(2); `pid` -1 is everybody else.
    fn kill(&self, pid: i32, signal: i32) -> io::Result<()>;
    /// Whether a Unix socket takes connections.
    fn accepts(&self, path: &str) -> bool;
    /// execve(2) in place of this process; returns only on failure.
    fn exec(&self, argv: &[&str]) -> io::Error;
    /// reboot(2); returns only on failure.
    fn end(&self, ending: Ending) -> io::Error;
    /// Makes Ctrl-Alt-Del a signal to PID 1 instead of a reboot on the spot.
    fn take_ctrl_alt_del(&self) -> io::Result<()>;

    /// Writes one line to every console and to the kernel's log.
    fn say(&self, line: &str);
    /// Writes one line to the kernel's log only.
    fn note(&self, line: &str);
    /// Writes one line to every console only.
    fn show(&self, line: &str);
    /// Opens the kernel's device events; the descriptor does not block.
    fn open_uevents(&self) -> io::Result<i32>;
    /// The next device event, raw; `None` when there is none now.
    fn next_uevent(&self, socket: i32) -> io::Result<Option<Vec<u8>>>;
    /// Waits until `fd` has something, or the time is over. Returns whether it has.
    fn wait(&self, fd: i32, time: Duration) -> bool;
}

/// A text file of the kernel, trimmed; empty when it cannot be read.
pub fn line(kernel: &dyn Kernel, path: &str) -> String {
    const LEN_MAX: usize = 64 * 1024;
    let bytes = kernel.read(path, LEN_MAX).unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}
