//! The real machine: [`Kernel`] by Linux system calls.
//!
//! The only file of PID 1 with `unsafe`: each call that the standard library does not have, with why it is sound.
//! Nothing here decides; the boot and the supervision do.

#![allow(unsafe_code)]

use crate::kernel::{Ending, Exit, Kernel, Launch, Mount, Room, Started};
use nix::libc;
use std::ffi::{CString, c_int, c_void};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// `BLKRRPART`.
const BLKRRPART: libc::c_ulong = 0x125f;
/// `BLKPG`.
const BLKPG: libc::c_ulong = 0x1269;
/// `BLKGETSIZE64`, for a 64-bit size.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// `_IOWR(0xfd, n, struct dm_ioctl)`; the structure has 312 bytes.
const DEVICE_MAPPER: libc::c_ulong = 0xc138_fd00;
/// `WDIOC_SETTIMEOUT`.
const WDIOC_SETTIMEOUT: libc::c_ulong = 0xc004_5706;
/// `WDIOC_KEEPALIVE`.
const WDIOC_KEEPALIVE: libc::c_ulong = 0x8004_5705;
/// `RTC_RD_TIME`.
const RTC_RD_TIME: libc::c_ulong = 0x8024_7009;
/// `MODULE_INIT_COMPRESSED_FILE`.
const MODULE_COMPRESSED: c_int = 4;
/// `PR_CAPBSET_DROP`.
const PR_CAPBSET_DROP: c_int = 24;
/// Time between two looks at a program that is run to its end.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// What is kept of the words of a program that is run to its end.
const OUTPUT_LEN_MAX: usize = 16 * 1024;
/// The kernel's device events may be that long.
const UEVENT_LEN_MAX: usize = 16 * 1024;
/// Buffer of the socket for device events: a coldplug of a large machine is some thousand events.
const UEVENT_BUFFER_LEN: c_int = 4 * 1024 * 1024;
/// Consoles that lines are written to. `/dev/console` is the last `console=` of the command line only.
const CONSOLES: [&str; 2] = ["/dev/tty0", "/dev/console"];

/// The machine that this process runs on.
#[derive(Debug, Default, Clone, Copy)]
pub struct Linux;

impl Kernel for Linux {
    fn uptime(&self) -> Duration {
        clock(libc::CLOCK_BOOTTIME)
    }

    fn wall(&self) -> i64 {
        i64::try_from(clock(libc::CLOCK_REALTIME).as_secs()).unwrap_or(i64::MAX)
    }

    fn set_wall(&self, unix_s: i64) -> io::Result<()> {
        let time = libc::timespec { tv_sec: unix_s, tv_nsec: 0 };
        // SAFETY: `time` is a whole timespec that outlives the call.
        check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &time) }).map(drop)
    }

    fn rtc(&self) -> io::Result<i64> {
        let file = fs::File::open("/dev/rtc0")?;
        let mut fields = [0_i32; 9];
        // SAFETY: `struct rtc_time` is nine ints, which `fields` has room for.
        check(unsafe { libc::ioctl(file.as_raw_fd(), RTC_RD_TIME, fields.as_mut_ptr()) })?;
        let [second, minute, hour, day, month, year, ..] = fields.map(i64::from);
        Ok(crate::clock::unix_s(year + 1900, month + 1, day, hour, minute, second))
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }

    fn mount(&self, mount: &Mount) -> io::Result<()> {
        if !self.exists(&mount.target) {
            // Fails where the place is read-only; then the mount says so.
            let _ = self.make_dir(&mount.target, 0o755);
        }
        let text = |text: &str| (!text.is_empty()).then(|| c_string(text)).transpose();
        let (source, target) = (c_string(&mount.source)?, c_string(&mount.target)?);
        let (fstype, data) = (text(&mount.fstype)?, text(&mount.data)?);
        let pointer =
            |text: &Option<CString>| text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr());
        // SAFETY: every pointer is null or a C string that outlives the call.
        check(unsafe {
            libc::mount(
                source.as_ptr(),
                target.as_ptr(),
                pointer(&fstype),
                mount.flags,
                pointer(&data).cast::<c_void>(),
            )
        })
        .map(drop)
    }

    fn unmount(&self, target: &str, lazy: bool) -> io::Result<()> {
        let target = c_string(target)?;
        let flags = if lazy { libc::MNT_DETACH } else { 0 };
        // SAFETY: `target` is a C string that outlives the call.
        check(unsafe { libc::umount2(target.as_ptr(), flags) }).map(drop)
    }

    fn switch_root(&self, new_root: &str) -> io::Result<()> {
        let old_root = fs::metadata("/")?.dev();
        std::env::set_current_dir(new_root)?;
        // What stays in the old root is memory that nobody can reach any more.
        remove_below("/", old_root, new_root);
        self.mount(&Mount::new(".", "/", "", crate::kernel::MOVE, ""))?;
        std::os::unix::fs::chroot(".")?;
        std::env::set_current_dir("/")
    }

    fn sync(&self) {
        // SAFETY: takes nothing, returns nothing.
        unsafe { libc::sync() }
    }

    fn room(&self, path: &str) -> io::Result<Room> {
        let stat = nix::sys::statvfs::statvfs(path)?;
        let block = stat.fragment_size();
        Ok(Room { total: stat.blocks() * block, free: stat.blocks_available() * block })
    }

    fn make_dir(&self, path: &str, mode: u32) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(mode).create(path)
    }

    fn own(&self, path: &str, id: u32) -> io::Result<()> {
        std::os::unix::fs::lchown(path, Some(id), Some(id))
    }

    fn link(&self, path: &str, target: &str) -> io::Result<()> {
        if fs::symlink_metadata(path).is_ok() {
            fs::remove_file(path)?;
        }
        std::os::unix::fs::symlink(target, path)
    }

    fn read_link(&self, path: &str) -> io::Result<String> {
        Ok(fs::read_link(path)?.to_string_lossy().into_owned())
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn is_folder(&self, path: &str) -> bool {
        fs::symlink_metadata(path).is_ok_and(|found| found.is_dir())
    }

    fn exists(&self, path: &str) -> bool {
        fs::symlink_metadata(path).is_ok()
    }

    fn read(&self, path: &str, len_max: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        fs::File::open(path)?.take(len_max as u64 + 1).read_to_end(&mut bytes)?;
        if bytes.len() > len_max {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("it is longer than {len_max} bytes"),
            ));
        }
        Ok(bytes)
    }

    fn read_at(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        fs::File::open(path)?.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn set(&self, path: &str, text: &str) -> io::Result<()> {
        fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
    }

    fn write(&self, path: &str, bytes: &[u8], mode: u32) -> io::Result<()> {
        let next = format!("{path}.next");
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .custom_flags(libc::O_CLOEXEC)
            .open(&next)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&next, path)?;
        let folder = path.rsplit_once('/').map_or("/", |(folder, _)| folder);
        fs::File::open(if folder.is_empty() { "/" } else { folder })?.sync_all()
    }

    fn write_at(&self, path: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let file = fs::OpenOptions::new().write(true).open(path)?;
        file.write_all_at(bytes, offset)?;
        file.sync_all()
    }

    fn read_direct(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let file = direct(fs::OpenOptions::new().read(true), path)?;
        let room = len.next_multiple_of(DIRECT_ALIGN);
        let mut buffer = vec![0; room + DIRECT_ALIGN];
        let start = buffer.as_ptr().align_offset(DIRECT_ALIGN);
        let place = &mut buffer[start..start + room];
        let mut filled = 0;
        while filled < len {
            match file.read_at(&mut place[filled..], offset + filled as u64)? {
                0 => break,
                count => filled += count,
            }
            // Only the end of a file is at an odd place, and there is nothing behind it.
            if !filled.is_multiple_of(DIRECT_ALIGN) {
                break;
            }
        }
        Ok(place[..filled.min(len)].to_vec())
    }

    fn write_direct(&self, path: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let file = direct(fs::OpenOptions::new().write(true), path)?;
        let mut buffer = vec![0; bytes.len() + DIRECT_ALIGN];
        let start = buffer.as_ptr().align_offset(DIRECT_ALIGN);
        buffer[start..start + bytes.len()].copy_from_slice(bytes);
        file.write_all_at(&buffer[start..start + bytes.len()], offset)
    }

    fn flush(&self, path: &str) -> io::Result<()> {
        fs::File::open(path)?.sync_all()
    }

    fn file_len(&self, path: &str) -> io::Result<u64> {
        Ok(fs::metadata(path)?.len())
    }

    fn remove_folder(&self, path: &str) -> io::Result<()> {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn write_variable(&self, path: &str, bytes: &[u8]) -> io::Result<()> {
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o644);
        // Each write is a variable of its own, so a part of it would be another one.
        match options.open(path)?.write(bytes)? {
            written if written == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    fn append(&self, path: &str, bytes: &[u8]) -> io::Result<()> {
        fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path)?.write_all(bytes)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn step_back(&self) {
        const LOWEST: i32 = 19;
        // SAFETY: three numbers; 0 is the calling thread, and a refusal changes nothing but the pace.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, LOWEST) };
    }

    fn warm(&self, path: &str) {
        if let Ok(file) = fs::File::open(path) {
            // SAFETY: the descriptor is open, and the call changes nothing but the page cache.
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_WILLNEED) };
        }
    }

    fn device_len(&self, path: &str) -> io::Result<u64> {
        let file = fs::File::open(path)?;
        let mut len = 0_u64;
        // SAFETY: the ioctl writes one u64, which `len` is.
        check(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut len) })?;
        Ok(len)
    }

    fn reread_partitions(&self, path: &str) -> io::Result<()> {
        let file = fs::File::open(path)?;
        // SAFETY: the ioctl takes no argument.
        check(unsafe { libc::ioctl(file.as_raw_fd(), BLKRRPART, 0) }).map(drop)
    }

    fn add_partition(&self, disk: &str, number: u32, start: u64, len: u64) -> io::Result<()> {
        #[repr(C)]
        struct Partition {
            start: i64,
            len: i64,
            number: c_int,
            device_name: [u8; 64],
            volume_name: [u8; 64],
        }
        #[repr(C)]
        struct Request {
            op: c_int,
            flags: c_int,
            len: c_int,
            data: *mut Partition,
        }
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let mut partition = Partition {
            start: i64::try_from(start).map_err(invalid)?,
            len: i64::try_from(len).map_err(invalid)?,
            number: c_int::try_from(number).map_err(invalid)?,
            device_name: [0; 64],
            volume_name: [0; 64],
        };
        const ADD: c_int = 1;
        let request = Request {
            op: ADD,
            flags: 0,
            len: c_int::try_from(size_of::<Partition>()).expect("about 150 bytes"),
            data: &raw mut partition,
        };
        let file = fs::File::open(disk)?;
        // SAFETY: both structures have the layout of linux/blkpg.h and outlive the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), BLKPG, &raw const request) }).map(drop)
    }

    fn device_mapper(&self, command: u8, request: &mut Vec<u8>) -> io::Result<()> {
        let control = fs::OpenOptions::new().read(true).write(true).open("/dev/mapper/control")?;
        let code = DEVICE_MAPPER | libc::c_ulong::from(command);
        // SAFETY: the header of `request` states its own length, `crate::mapper` builds it so; the kernel writes no
        // more than that.
        check(unsafe { libc::ioctl(control.as_raw_fd(), code, request.as_mut_ptr()) }).map(drop)
    }

    fn load_module(&self, path: &str) -> io::Result<()> {
        let file = fs::File::open(path)?;
        let compressed = [".xz", ".gz", ".zst"].iter().any(|end| path.ends_with(end));
        let flags = if compressed { MODULE_COMPRESSED } else { 0 };
        // SAFETY: an open descriptor, an empty C string, a flag word.
        let result =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), flags) };
        match result {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
                error => Err(error),
            },
        }
    }

    fn uname(&self) -> (String, String) {
        let names = nix::sys::utsname::uname();
        names.map_or_else(
            |_| Default::default(),
            |names| {
                let text = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
                (text(names.release()), text(names.machine()))
            },
        )
    }

    fn random(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0_u8; len];
        let mut filled = 0;
        while filled < len {
            let rest = &mut bytes[filled..];
            // SAFETY: pointer and length are those of one slice.
            let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
            match usize::try_from(count) {
                Ok(count) => filled += count,
                Err(_) => std::thread::sleep(LOOK_INTERVAL), // interrupted
            }
        }
        bytes
    }

    fn set_hostname(&self, name: &str) -> io::Result<()> {
        Ok(nix::unistd::sethostname(name)?)
    }

    fn open_watchdog(&self, path: &str, timeout: Duration) -> io::Result<i32> {
        let path = c_string(path)?;
        // No O_CLOEXEC: the second stage goes on with the same descriptor, as closing it would disarm or fire.
        // SAFETY: `path` is a C string that outlives the call.
        let watchdog = check(unsafe { libc::open(path.as_ptr(), libc::O_WRONLY) })?;
        // Some watchdogs have a fixed time; then theirs holds.
        let _ = self.set_watchdog(watchdog, timeout);
        Ok(watchdog)
    }

    fn set_watchdog(&self, watchdog: i32, timeout: Duration) -> io::Result<()> {
        let mut seconds = c_int::try_from(timeout.as_secs()).unwrap_or(c_int::MAX);
        // SAFETY: the ioctl reads and writes one int, which `seconds` is.
        check(unsafe { libc::ioctl(watchdog, WDIOC_SETTIMEOUT, &raw mut seconds) }).map(drop)
    }

    fn pet(&self, watchdog: i32) -> io::Result<()> {
        let mut unused: c_int = 0;
        // SAFETY: the ioctl takes an int that it does not use.
        check(unsafe { libc::ioctl(watchdog, WDIOC_KEEPALIVE, &raw mut unused) }).map(drop)
    }

    fn run(
        &self,
        argv: &[&str],
        limit: Duration,
        watchdog: Option<i32>,
    ) -> io::Result<(Exit, String)> {
        let (program, arguments) =
            argv.split_first().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut command = Command::new(program);
        let (output, input) = io::pipe()?;
        command.args(arguments).env_clear().envs(environment());
        command.stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input);
        let mut child = command.spawn()?;
        drop(command); // and with it our end for writing
        set_nonblocking(output.as_raw_fd())?;
        let mut output = fs::File::from(OwnedFd::from(output));
        let mut said = Vec::new();
        let mut buffer = [0; 1024];
        let mut hear = |said: &mut Vec<u8>| {
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                let room = OUTPUT_LEN_MAX.saturating_sub(said.len());
                said.extend_from_slice(&buffer[..count.min(room)]);
            }
        };
        let deadline = Instant::now() + limit;
        let mut petted = Instant::now();
        let status = loop {
            hear(&mut said);
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                child.wait()?;
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("it did not end within {} s", limit.as_secs()),
                ));
            }
            if let Some(watchdog) = watchdog.filter(|_| petted.elapsed().as_secs() >= 5) {
                let _ = self.pet(watchdog);
                petted = Instant::now();
            }
            std::thread::sleep(LOOK_INTERVAL);
        };
        hear(&mut said);
        let exit = status.code().map(Exit::Code);
        let exit = exit.unwrap_or_else(|| Exit::Signal(status.signal().unwrap_or(0)));
        Ok((exit, String::from_utf8_lossy(&said).into_owned()))
    }

    fn start(&self, launch: &Launch) -> io::Result<Started> {
        let (program, arguments) = launch
            .argv
            .split_first()
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut command = Command::new(program);
        command.args(arguments).env_clear();
        command.envs(launch.env.iter().map(|(key, value)| (key, value)));
        let mut output = None;
        match &launch.console {
            Some(path) => {
                // The console itself cannot be anybody's terminal; the device behind it can.
                let active =
                    fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
                let device = active.split_whitespace().last().map(|name| format!("/dev/{name}"));
                let path =
                    device.filter(|_| path == "/dev/console").unwrap_or_else(|| path.clone());
                let terminal = fs::OpenOptions::new().read(true).write(true).open(path)?;
                command.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?);
                command.stderr(terminal);
            }
            None => {
                let (ours, theirs) = io::pipe()?;
                command.stdin(Stdio::null()).stdout(theirs.try_clone()?).stderr(theirs);
                set_nonblocking(ours.as_raw_fd())?;
                // It outlives a second start of this program; children close it themselves, below.
                // SAFETY: an open descriptor and a flag word.
                check(unsafe { libc::fcntl(ours.as_raw_fd(), libc::F_SETFD, 0) })?;
                output = Some(OwnedFd::from(ours));
            }
        }
        let cgroup = (!launch.cgroup.is_empty())
            .then(|| c_string(&format!("/sys/fs/cgroup/{}/cgroup.procs", launch.cgroup)))
            .transpose()?;
        let oom_score = CString::new(launch.oom_score.to_string())?;
        let dropped = launch.without_capabilities.clone();
        let terminal = launch.console.is_some();
        // SAFETY: only calls that are allowed between fork and exec, on memory that was prepared before; the closure
        // neither allocates nor locks.
        unsafe {
            command.pre_exec(move || {
                libc::setsid();
                if terminal {
                    libc::ioctl(0, libc::TIOCSCTTY, 0);
                }
                if let Some(path) = &cgroup {
                    put(path, b"0");
                }
                put(c"/proc/self/oom_score_adj", oom_score.as_bytes());
                for capability in &dropped {
                    libc::prctl(PR_CAPBSET_DROP, libc::c_ulong::from(*capability), 0, 0, 0);
                }
                let mut none: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut none);
                libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
                // The watchdog and the pipes of the others are not theirs.
                libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, CLOSE_ON_EXEC);
                Ok(())
            });
        }
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).expect("process ids are positive ints");
        Ok(Started { pid, output: output.map(IntoRawFd::into_raw_fd) })
    }

    fn reap(&self) -> Option<(i32, Exit)> {
        let mut status: c_int = 0;
        // SAFETY: `status` is an int that outlives the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid <= 0 {
            return None;
        }
        let status = std::process::ExitStatus::from_raw(status);
        let exit = status.code().map(Exit::Code);
        Some((pid, exit.unwrap_or_else(|| Exit::Signal(status.signal().unwrap_or(0)))))
    }

    fn kill(&self, pid: i32, signal: i32) -> io::Result<()> {
        // SAFETY: two ints.
        check(unsafe { libc::kill(pid, signal) }).map(drop)
    }

    fn accepts(&self, path: &str) -> bool {
        let bytes = path.as_bytes();
        // SAFETY: an all-zero sockaddr_un is a valid value.
        let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        if bytes.len() >= address.sun_path.len() {
            return false;
        }
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: three ints; the result is checked.
        let socket = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
        if socket < 0 {
            return false;
        }
        // SAFETY: a descriptor that was just made and that nobody else has.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let len = libc::socklen_t::try_from(size_of_val(&address)).expect("about 110 bytes");
        // SAFETY: `address` is a whole sockaddr_un that outlives the call.
        unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) == 0 }
    }

    fn exec(&self, argv: &[&str]) -> io::Error {
        let Some((program, arguments)) = argv.split_first() else {
            return io::Error::from(io::ErrorKind::InvalidInput);
        };
        Command::new(program).args(arguments).exec()
    }

    fn end(&self, ending: Ending) -> io::Error {
        let how = match ending {
            Ending::Reboot => libc::RB_AUTOBOOT,
            Ending::Poweroff => libc::RB_POWER_OFF,
        };
        // SAFETY: one int.
        unsafe { libc::reboot(how) };
        io::Error::last_os_error()
    }

    fn take_ctrl_alt_del(&self) -> io::Result<()> {
        // SAFETY: one int.
        check(unsafe { libc::reboot(libc::RB_DISABLE_CAD) }).map(drop)
    }

    fn say(&self, line: &str) {
        self.show(line);
        self.note(line);
    }

    fn note(&self, line: &str) {
        if let Ok(mut log) = fs::OpenOptions::new().write(true).open("/dev/kmsg") {
            // Level 6, facility daemon: below what `quiet` shows, so that the console has each line once.
            let _ = log.write_all(format!("<30>{line}").as_bytes());
        }
    }

    fn show(&self, line: &str) {
        let text = format!("{line}\r\n");
        // The second name may be the same device as the first.
        let serial = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
        let one = !serial.split_whitespace().any(|name| name == "tty0") || serial.trim() == "tty0";
        for path in CONSOLES.iter().skip(usize::from(one)) {
            let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
            let open = fs::OpenOptions::new().write(true).custom_flags(flags).open(path);
            // A console that is slow or not there must not hold up the boot.
            let written = open.and_then(|mut file| write_for(&mut file, text.as_bytes()));
            if written.is_err() && *path == "/dev/console" {
                let _ = io::stderr().write_all(text.as_bytes());
            }
        }
    }

    fn open_uevents(&self) -> io::Result<i32> {
        let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: three ints; the result is checked.
        let socket =
            check(unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_KOBJECT_UEVENT) })?;
        let buffer_len = UEVENT_BUFFER_LEN;
        // SAFETY: an all-zero sockaddr_nl is a valid value; the buffer size is an int that outlives the call.
        unsafe {
            let mut address: libc::sockaddr_nl = std::mem::zeroed();
            address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
            address.nl_groups = 1; // the kernel's own events
            libc::setsockopt(
                socket,
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                (&raw const buffer_len).cast(),
                size_of::<c_int>() as libc::socklen_t,
            );
            let len = size_of_val(&address) as libc::socklen_t;
            check(libc::bind(socket, (&raw const address).cast(), len))?;
        }
        Ok(socket)
    }

    fn next_uevent(&self, socket: i32) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = vec![0_u8; UEVENT_LEN_MAX];
        // SAFETY: pointer and length are those of one vector.
        let count = unsafe { libc::recv(socket, bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => {
                bytes.truncate(count);
                Ok(Some(bytes))
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error => Err(error),
            },
        }
    }

    fn wait(&self, fd: i32, time: Duration) -> bool {
        poll(&[fd], Some(time)).is_ok_and(|ready| !ready.is_empty())
    }
}

/// `CLOSE_RANGE_CLOEXEC`: the standard library still needs its own pipe until the exec.
const CLOSE_ON_EXEC: c_int = 4;

/// The environment of what PID 1 starts.
pub fn environment() -> [(&'static str, &'static str); 3] {
    // containerd looks for iptables and runc there.
    [("PATH", "/usr/sbin:/usr/bin"), ("HOME", "/root"), ("TERM", "linux")]
}

/// Waits until one of `fds` has something to read or has ended; `None` waits for ever. Returns those that have.
///
/// # Errors
///
/// What poll(2) says; an interruption is an empty answer.
pub fn poll(fds: &[i32], time: Option<Duration>) -> io::Result<Vec<i32>> {
    let mut polled: Vec<libc::pollfd> =
        fds.iter().map(|fd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 }).collect();
    // Rounded up: to wake a moment too early would be to spin.
    let millis = time
        .map_or(-1, |time| c_int::try_from(time.as_micros().div_ceil(1000)).unwrap_or(c_int::MAX));
    let count = libc::nfds_t::try_from(polled.len()).expect("few descriptors");
    // SAFETY: pointer and count are those of one vector.
    match check(unsafe { libc::poll(polled.as_mut_ptr(), count, millis) }) {
        Ok(_) => Ok(polled.iter().filter(|one| one.revents != 0).map(|one| one.fd).collect()),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Turns SIGCHLD, SIGTERM, SIGINT (Ctrl-Alt-Del), SIGPWR and SIGHUP into a descriptor, for this thread and all that it
/// makes later.
///
/// # Errors
///
/// What the system says.
pub fn signals() -> io::Result<i32> {
    // SAFETY: a zeroed set is made valid by sigemptyset; all pointers outlive their calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in
            [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGPWR, libc::SIGHUP, libc::SIGUSR1]
        {
            libc::sigaddset(&raw mut set, signal);
        }
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))?;
        // A write to a console that was hung up must not end PID 1.
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        check(libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC))
    }
}

/// The next signal that came, `None` when there is none now.
pub fn next_signal(fd: i32) -> Option<i32> {
    // SAFETY: signalfd_siginfo is plain data; the read is no longer than it.
    unsafe {
        let mut info: libc::signalfd_siginfo = std::mem::zeroed();
        let len = size_of_val(&info);
        let count = libc::read(fd, (&raw mut info).cast(), len);
        (usize::try_from(count) == Ok(len)).then_some(info.ssi_signo as i32)
    }
}

/// Reads what is there; `Ok(None)` when nothing is now, an empty vector at the end.
///
/// # Errors
///
/// What read(2) says.
pub fn read_some(fd: i32, len: usize) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0_u8; len];
    // SAFETY: pointer and length are those of one vector.
    let count = unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), bytes.len()) };
    match usize::try_from(count) {
        Ok(count) => {
            bytes.truncate(count);
            Ok(Some(bytes))
        }
        Err(_) => match io::Error::last_os_error() {
            error
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(None)
            }
            error => Err(error),
        },
    }
}

/// Opens `path` for reading without blocking; the descriptor is the caller's.
///
/// # Errors
///
/// What open(2) says.
pub fn open_nonblocking(path: &str) -> io::Result<i32> {
    let mut options = fs::OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    Ok(file.into_raw_fd())
}

/// Closes a descriptor that this process owns.
pub fn close(fd: i32) {
    // SAFETY: the callers own what they pass and forget it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}

/// The user that a connected Unix socket belongs to.
///
/// # Errors
///
/// What getsockopt(2) says.
pub fn peer_uid(fd: i32) -> io::Result<u32> {
    // SAFETY: ucred is plain data, and the length says how long it is.
    unsafe {
        let mut peer: libc::ucred = std::mem::zeroed();
        let mut len = size_of_val(&peer) as libc::socklen_t;
        let pointer = (&raw mut peer).cast();
        check(libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, pointer, &raw mut len))?;
        Ok(peer.uid)
    }
}

fn set_nonblocking(fd: i32) -> io::Result<()> {
    // SAFETY: an open descriptor and a flag word.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) }).map(drop)
}

/// Writes what the console takes within a short time.
fn write_for(file: &mut fs::File, mut bytes: &[u8]) -> io::Result<()> {
    const WAIT_MAX: Duration = Duration::from_millis(200);
    let deadline = Instant::now() + WAIT_MAX;
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What every disk takes as place and length past the cache.
const DIRECT_ALIGN: usize = 4096;

/// Opens a file past the cache, or through it where the filesystem knows no other way.
fn direct(options: &mut fs::OpenOptions, path: &str) -> io::Result<fs::File> {
    match options.custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(path) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            options.custom_flags(libc::O_CLOEXEC).open(path)
        }
        other => other,
    }
}

/// One write to a file of the kernel, between fork and exec.
fn put(path: &std::ffi::CStr, bytes: &[u8]) {
    // SAFETY: a C string, a slice, and a descriptor that is closed where it was opened.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, bytes.as_ptr().cast(), bytes.len());
            libc::close(fd);
        }
    }
}

fn remove_below(path: &str, device: u64, keep: &str) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(found) = fs::symlink_metadata(&path) else { continue };
        if found.dev() != device || path.to_str() == Some(keep) {
            continue;
        }
        if found.is_dir() {
            if let Some(path) = path.to_str() {
                remove_below(path, device, keep);
            }
            let _ = fs::remove_dir(&path);
        } else {
            let _ = fs::remove_file(&path);
        }
    }
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a whole timespec that outlives the call.
    unsafe { libc::clock_gettime(id, &raw mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
