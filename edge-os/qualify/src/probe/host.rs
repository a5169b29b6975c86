//! Probes of files, settings, system calls, cgroups, file systems and hardware.
//!
//! Mounts happen in a private mount namespace that goes with the process; the only thing made on the host is a cgroup
//! of our own, which is removed, and 64 KiB in a file of the state folder, which is too.

use super::bpf;
use super::sys;
use crate::judge::Seen;
use nix::libc;
use nix::mount::MsFlags;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const EPERM: i32 = 1;
const ENOSYS: i32 = 38;
const ENODEV: i32 = 19;
const ENXIO: i32 = 6;
const EINVAL: i32 = 22;
const EOPNOTSUPP: i32 = 95;
const ENOTBLK: i32 = 15;

fn works(text: impl Into<String>) -> Seen {
    Seen::Works(text.into())
}

/// A file's text, trimmed; nothing when it cannot be read.
pub(super) fn text(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Whether a file is there.
pub(super) fn file(path: &str) -> Seen {
    match std::fs::metadata(path) {
        Ok(_) => works("it is there"),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Seen::NotPermitted(error.to_string())
        }
        Err(error) => Seen::Absent(format!("{path}: {error}")),
    }
}

/// A sysctl's value in a range: `1..1`, `1..`, `0|2`.
pub(super) fn sysctl(key: &str, wanted: &str) -> Seen {
    // Dots separate, except inside the names of interfaces, which are not asked for.
    let path = format!("/proc/sys/{}", key.replace('.', "/"));
    let value = match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().to_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            return Seen::NotPermitted(error.to_string());
        }
        // A kernel without modules has no switch to forbid them.
        Err(_) if key == "kernel.modules_disabled" => return works("there is no such setting"),
        Err(_) => return Seen::Sysctl(format!("there is no {key}")),
    };
    let good = in_range(&value, wanted);
    match good {
        true => works(format!("{key} is as wanted")),
        false => Seen::Sysctl(format!("{key} is {value}, wanted {wanted}")),
    }
}

fn in_range(value: &str, wanted: &str) -> bool {
    let Ok(value) = value.parse::<i64>() else { return false };
    wanted.split('|').any(|part| match part.split_once("..") {
        Some((low, high)) => {
            low.parse().is_ok_and(|low: i64| value >= low)
                && (high.is_empty() || high.parse().is_ok_and(|high: i64| value <= high))
        }
        None => part.parse() == Ok(value),
    })
}

/// Node ports (30000-32767) do not collide with the ports of outgoing connections.
pub(super) fn node_ports() -> Seen {
    let range = text("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let reserved = text("/proc/sys/net/ipv4/ip_local_reserved_ports").unwrap_or_default();
    let mut ends = range.split_whitespace().filter_map(|end| end.parse::<u32>().ok());
    let (Some(low), Some(high)) = (ends.next(), ends.next()) else {
        return Seen::Unclear(format!("ip_local_port_range is `{range}`"));
    };
    let apart = high < 30_000 || low > 32_767;
    match apart || reserved.split(',').any(|part| part == "30000-32767") {
        true => works("apart"),
        false => Seen::Sysctl(format!("net.ipv4.ip_local_port_range is {low}-{high}")),
    }
}

/// A namespace of a kind, made in a child.
pub(super) fn namespace(name: &str) -> Seen {
    let flag = match name {
        "mnt" => libc::CLONE_NEWNS,
        "net" => libc::CLONE_NEWNET,
        "pid" => libc::CLONE_NEWPID,
        "ipc" => libc::CLONE_NEWIPC,
        "uts" => libc::CLONE_NEWUTS,
        "user" => libc::CLONE_NEWUSER,
        "cgroup" => libc::CLONE_NEWCGROUP,
        _ => 0x80,
    };
    let probe = || match sys::call(libc::SYS_unshare, [i64::from(flag), 0, 0, 0, 0, 0]) {
        Ok(_) => "0".to_owned(),
        Err(errno) => errno.to_string(),
    };
    match sys::in_child(probe).map(|text| text.parse::<i32>()) {
        Ok(Ok(0)) => works("made one"),
        Ok(Ok(EPERM)) => match name {
            "user" if text("/proc/sys/user/max_user_namespaces").as_deref() == Some("0") => {
                Seen::Sysctl("user.max_user_namespaces is 0".into())
            }
            _ => Seen::NotPermitted(sys::errno_text(EPERM)),
        },
        // ENOSPC: the limit is zero.
        Ok(Ok(28)) => Seen::Sysctl(format!("user.max_{name}_namespaces is 0")),
        Ok(Ok(errno)) if errno == EINVAL => Seen::Absent(sys::errno_text(errno)),
        Ok(Ok(errno)) => Seen::Unclear(sys::errno_text(errno)),
        Ok(Err(_)) => Seen::Unclear("the child said nothing".into()),
        Err(errno) => Seen::Unclear(sys::errno_text(errno)),
    }
}

/// A system call: what its number is, and arguments that it refuses without doing anything.
const SYSCALLS: &[(&str, i64, [i64; 6])] = &[
    ("epoll", libc::SYS_epoll_create1, [-1, 0, 0, 0, 0, 0]),
    ("eventfd", libc::SYS_eventfd2, [0, -1, 0, 0, 0, 0]),
    ("signalfd", libc::SYS_signalfd4, [-1, 0, 0, 0, 0, 0]),
    ("timerfd", libc::SYS_timerfd_create, [-1, 0, 0, 0, 0, 0]),
    ("inotify", libc::SYS_inotify_init1, [-1, 0, 0, 0, 0, 0]),
    ("memfd", libc::SYS_memfd_create, [0, -1, 0, 0, 0, 0]),
    ("keyctl", libc::SYS_keyctl, [-1, 0, 0, 0, 0, 0]),
    ("name_to_handle_at", libc::SYS_name_to_handle_at, [-1, 0, 0, 0, -1, 0]),
    ("clone3", libc::SYS_clone3, [0, 0, 0, 0, 0, 0]),
    ("pidfd_open", libc::SYS_pidfd_open, [-1, 0, 0, 0, 0, 0]),
    ("openat2", libc::SYS_openat2, [-1, 0, 0, 0, 0, 0]),
    ("close_range", libc::SYS_close_range, [9, 3, 0, 0, 0, 0]),
    ("mount_setattr", libc::SYS_mount_setattr, [-1, 0, -1, 0, 0, 0]),
    ("fsopen", libc::SYS_fsopen, [0, -1, 0, 0, 0, 0]),
    ("io_uring", libc::SYS_io_uring_setup, [0, 0, 0, 0, 0, 0]),
    ("userfaultfd", libc::SYS_userfaultfd, [-1, 0, 0, 0, 0, 0]),
];

/// Whether a system call is there: any answer but ENOSYS.
pub(super) fn system_call(name: &str) -> Seen {
    let Some((_, number, args)) = SYSCALLS.iter().find(|own| own.0 == name) else {
        return Seen::Unclear(format!("no call `{name}`"));
    };
    match sys::call(*number, *args) {
        Err(ENOSYS) => match filtered() {
            true => Seen::NotPermitted("ENOSYS under a seccomp filter".into()),
            false => Seen::Absent(sys::errno_text(ENOSYS)),
        },
        Err(EPERM) => match name {
            // Policies answer before the arguments are looked at.
            "io_uring" => Seen::Sysctl("kernel.io_uring_disabled forbids it".into()),
            _ => Seen::NotPermitted(sys::errno_text(EPERM)),
        },
        Err(errno) => works(format!("refuses wrong arguments: {}", sys::errno_text(errno))),
        Ok(_) => works("answers"),
    }
}

/// Whether this process runs under a seccomp filter.
fn filtered() -> bool {
    text("/proc/self/status").is_some_and(|status| status.contains("Seccomp:\t2"))
}

/// An action of seccomp filters.
pub(super) fn seccomp(action: &str) -> Seen {
    let value: u32 = match action {
        "errno" => 0x0005_0000,
        "user_notif" => 0x7fc0_0000,
        _ => 0x7fff_0000,
    };
    let bytes = value.to_ne_bytes();
    let args = [2, 0, sys::address(&bytes) as i64, 0, 0, 0];
    match sys::call(libc::SYS_seccomp, args) {
        Ok(_) => works("available"),
        Err(EOPNOTSUPP) => Seen::TooOld(sys::errno_text(EOPNOTSUPP)),
        Err(errno @ (ENOSYS | EINVAL)) => Seen::Absent(sys::errno_text(errno)),
        Err(errno) => Seen::Unclear(sys::errno_text(errno)),
    }
}

/// Landlock.
pub(super) fn landlock() -> Seen {
    // landlock_create_ruleset, asking for the version only.
    match sys::call(444, [0, 0, 1, 0, 0, 0]) {
        Ok(version) => works(format!("version {version}")),
        Err(ENOSYS) => Seen::Absent(sys::errno_text(ENOSYS)),
        Err(EOPNOTSUPP) => Seen::Boot("built in, and not in the list of active modules".into()),
        Err(errno) => Seen::Unclear(sys::errno_text(errno)),
    }
}

/// A security module is active.
pub(super) fn security_module(name: &str) -> Seen {
    let listed = text("/sys/kernel/security/lsm").or_else(|| {
        let at = Path::new("/sys/kernel/security");
        let none: Option<&str> = None;
        nix::mount::mount(Some("securityfs"), at, Some("securityfs"), MsFlags::empty(), none)
            .ok()?;
        text("/sys/kernel/security/lsm")
    });
    match listed {
        Some(list) if list.split(',').any(|own| own == name) => works(format!("active: {list}")),
        Some(list) => Seen::Absent(format!("active are only {list}")),
        None => Seen::Unclear("the list of active modules cannot be read".into()),
    }
}

/// What lockdown forbids: `none`, `integrity`, `confidentiality`.
pub(super) fn lockdown() -> String {
    let list = text("/sys/kernel/security/lockdown").unwrap_or_default();
    let chosen = list.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    chosen.unwrap_or("none").to_owned()
}

// ---- file systems ----

/// A folder of our own, on a tmpfs in a private mount namespace.
pub(super) struct Place(PathBuf);

impl Place {
    /// Makes the mount namespace and the tmpfs; everything goes with the process.
    pub(super) fn make() -> Result<Self, Seen> {
        let none: Option<&str> = None;
        let failed = |errno: nix::errno::Errno| match errno as i32 {
            EPERM => Seen::NotPermitted(sys::errno_text(EPERM)),
            other => Seen::Unclear(sys::errno_text(other)),
        };
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(failed)?;
        nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .map_err(failed)?;
        let at =
            ["/tmp", "/run", "/mnt", "/dev/shm"].into_iter().find(|path| Path::new(path).is_dir());
        let at = at.ok_or_else(|| Seen::Unclear("no folder to mount on".into()))?;
        let size = Some("size=16m,mode=0700");
        nix::mount::mount(Some("kq"), at, Some("tmpfs"), MsFlags::empty(), size).map_err(failed)?;
        Ok(Self(at.into()))
    }

    fn folder(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        let _ = std::fs::create_dir_all(&path);
        path
    }

    fn mount(&self, source: &str, kind: &str, options: Option<&str>) -> Result<PathBuf, i32> {
        let at = self.folder("mnt");
        nix::mount::mount(Some(source), &at, Some(kind), MsFlags::empty(), options)
            .map_err(|errno| errno as i32)?;
        Ok(at)
    }

    fn unmount(&self, at: &Path) {
        let _ = nix::mount::umount2(at, nix::mount::MntFlags::MNT_DETACH);
    }

    /// A file system without a disk, mounted.
    pub(super) fn mounts(&self, kind: &str, options: Option<&str>) -> Seen {
        match self.mount("kq", kind, options) {
            Ok(at) => {
                self.unmount(&at);
                works("mounted one")
            }
            Err(ENODEV) => Seen::Absent(sys::errno_text(ENODEV)),
            Err(EPERM) => Seen::NotPermitted(sys::errno_text(EPERM)),
            Err(EINVAL) if options.is_some() => {
                Seen::TooOld(format!("the option is not known: {}", sys::errno_text(EINVAL)))
            }
            // One is mounted with other options, and there can only be one.
            Err(16) => works("one is mounted"),
            Err(errno) => Seen::Unclear(sys::errno_text(errno)),
        }
    }

    /// A file system that the kernel knows, asked by mounting what is no disk.
    pub(super) fn knows(&self, kind: &str) -> Seen {
        let answer = self.mount("/dev/null", kind, None);
        if let Ok(at) = &answer {
            self.unmount(at);
        }
        let listed = text("/proc/filesystems").unwrap_or_default();
        let listed = listed.lines().any(|line| line.split_whitespace().last() == Some(kind));
        match answer {
            _ if listed => works("the kernel lists it"),
            Ok(_) | Err(ENOTBLK) => works("the kernel knows it"),
            Err(ENODEV) => Seen::Absent(sys::errno_text(ENODEV)),
            Err(EPERM) => Seen::NotPermitted(sys::errno_text(EPERM)),
            Err(errno) => Seen::Unclear(sys::errno_text(errno)),
        }
    }

    /// An overlay over folders here; a file is written through it.
    pub(super) fn overlay(&self, options: Option<&str>) -> Seen {
        let (lower, upper, work) =
            (self.folder("lower"), self.folder("upper"), self.folder("work"));
        let mut all = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        if let Some(options) = options {
            all = format!("{all},{options}");
        }
        match self.mount("overlay", "overlay", Some(&all)) {
            Ok(at) => {
                let written = std::fs::write(at.join("kq"), b"kq");
                self.unmount(&at);
                let _ = std::fs::remove_dir_all(&work);
                match written {
                    Ok(()) => works("wrote a file through one"),
                    Err(error) => Seen::Unclear(error.to_string()),
                }
            }
            Err(ENODEV) => Seen::Absent(sys::errno_text(ENODEV)),
            Err(EPERM) => Seen::NotPermitted(sys::errno_text(EPERM)),
            Err(EINVAL) if options.is_some() => {
                Seen::TooOld(format!("the options are not known: {}", sys::errno_text(EINVAL)))
            }
            Err(errno) => Seen::Unclear(sys::errno_text(errno)),
        }
    }

    /// Opens a character device, or one of its number made here when the host's folder lacks it.
    fn open(&self, path: &str, major: u64, minor: u64) -> Result<std::fs::File, i32> {
        let open = |path: &Path| {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(path);
            file.map_err(|error| error.raw_os_error().unwrap_or(0))
        };
        match open(Path::new(path)) {
            Err(2) => {
                let own = self.0.join(format!("node-{major}-{minor}"));
                let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
                let number = nix::sys::stat::makedev(major, minor);
                match nix::sys::stat::mknod(&own, nix::sys::stat::SFlag::S_IFCHR, mode, number) {
                    // Made for an earlier probe.
                    Ok(()) | Err(nix::errno::Errno::EEXIST) => open(&own),
                    Err(errno) => Err(errno as i32),
                }
            }
            other => other,
        }
    }

    /// A character device that can be opened.
    pub(super) fn device(&self, path: &str, major: u64, minor: u64) -> Seen {
        match self.open(path, major, minor) {
            Ok(_) => works("opened"),
            Err(errno @ (ENODEV | ENXIO)) => Seen::Absent(sys::errno_text(errno)),
            Err(errno @ (EPERM | 13)) => Seen::NotPermitted(sys::errno_text(errno)),
            Err(errno) => Seen::Unclear(sys::errno_text(errno)),
        }
    }

    /// Device mapper, or a target of it.
    pub(super) fn device_mapper(&self, target: Option<&str>) -> Seen {
        let control = match self.open("/dev/mapper/control", 10, mapper_minor()) {
            Ok(control) => control,
            Err(errno @ (ENODEV | ENXIO)) => return Seen::Absent(sys::errno_text(errno)),
            Err(errno @ (EPERM | 13)) => return Seen::NotPermitted(sys::errno_text(errno)),
            Err(errno) => return Seen::Unclear(sys::errno_text(errno)),
        };
        // struct dm_ioctl: version 4.0.0, sizes, name at 48.
        let mut buffer = vec![0u8; 4096];
        buffer[0..4].copy_from_slice(&4u32.to_ne_bytes());
        buffer[12..16].copy_from_slice(&4096u32.to_ne_bytes());
        buffer[16..20].copy_from_slice(&312u32.to_ne_bytes());
        let request = |command: u64| 0xc138_fd00 | command;
        let Some(target) = target else {
            return match sys::ioctl(&control, request(0), &mut buffer) {
                Ok(_) => works("tells its version"),
                Err(errno) => Seen::Unclear(sys::errno_text(errno)),
            };
        };
        buffer[48..48 + target.len()].copy_from_slice(target.as_bytes());
        match sys::ioctl(&control, request(17), &mut buffer) {
            Ok(_) => works("tells its version"),
            Err(errno @ EINVAL) => Seen::Absent(sys::errno_text(errno)),
            // The question is younger than 5.1; the configuration has to tell.
            Err(errno) => Seen::Unclear(sys::errno_text(errno)),
        }
    }

    // ---- cgroups ----

    /// The cgroup2 hierarchy: where the host has it, or mounted here.
    pub(super) fn cgroup2(&self) -> Result<PathBuf, Seen> {
        const CGROUP2: i64 = 0x6367_7270;
        for path in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            if sys::filesystem_type(path) == Ok(CGROUP2) {
                return Ok(path.into());
            }
        }
        let at = self.folder("cgroup2");
        let none: Option<&str> = None;
        match nix::mount::mount(Some("kq"), &at, Some("cgroup2"), MsFlags::empty(), none) {
            Ok(()) => Ok(at),
            Err(errno) if errno as i32 == ENODEV => Err(Seen::Absent(sys::errno_text(ENODEV))),
            Err(errno) if errno as i32 == EPERM => Err(Seen::NotPermitted(sys::errno_text(EPERM))),
            Err(errno) => Err(Seen::Unclear(sys::errno_text(errno as i32))),
        }
    }
}

/// The minor number of device mapper's control device, which is not fixed in old kernels.
fn mapper_minor() -> u64 {
    let misc = text("/proc/misc").unwrap_or_default();
    let line = misc.lines().find(|line| line.ends_with(" device-mapper"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(236)
}

/// Whether all of the host is on cgroup v2.
pub(super) fn cgroup_v2() -> Seen {
    match sys::filesystem_type("/sys/fs/cgroup") {
        Ok(0x6367_7270) => works("/sys/fs/cgroup is cgroup2"),
        Ok(_) => Seen::Boot("/sys/fs/cgroup is cgroup v1 or mixed".into()),
        Err(errno) => Seen::Absent(sys::errno_text(errno)),
    }
}

/// A controller, on either version.
pub(super) fn controller(place: &Place, name: &str) -> Seen {
    let offered = place
        .cgroup2()
        .ok()
        .and_then(|root| std::fs::read_to_string(root.join("cgroup.controllers")).ok());
    if offered.is_some_and(|list| list.split_whitespace().any(|own| own == name)) {
        return works("cgroup v2 offers it");
    }
    // name, hierarchy, groups, enabled
    let v1 = if name == "io" { "blkio" } else { name };
    let table = text("/proc/cgroups").unwrap_or_default();
    let row = table.lines().find(|line| line.split_whitespace().next() == Some(v1));
    let Some(row) = row else { return Seen::Absent("the kernel does not list it".into()) };
    let numbers: Vec<u32> = row.split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    match numbers.as_slice() {
        [_, _, 0] => {
            Seen::Boot("the kernel lists it as disabled: a boot option or the firmware".into())
        }
        [0, ..] => Seen::Boot("it is in no hierarchy".into()),
        _ => works("cgroup v1 has it"),
    }
}

/// An own cgroup below the root, removed when dropped.
struct Group(PathBuf);

/// Name of our cgroups; the number of the process follows.
const GROUP: &str = "skerry-qualify-";

impl Group {
    fn make(root: &Path) -> Result<Self, Seen> {
        // What a killed run left.
        for entry in std::fs::read_dir(root).into_iter().flatten().filter_map(Result::ok) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let pid = name.strip_prefix(GROUP);
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = std::fs::remove_dir(entry.path());
            }
        }
        let path = root.join(format!("{GROUP}{}", std::process::id()));
        match std::fs::create_dir(&path) {
            Ok(()) => Ok(Self(path)),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                Err(Seen::NotPermitted(error.to_string()))
            }
            Err(error) => Err(Seen::Unclear(error.to_string())),
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// A file of a cgroup below the root; nothing is said when its controller is not passed on to such groups.
pub(super) fn cgroup_file(place: &Place, controller: &str, name: &str) -> Option<Seen> {
    let root = match place.cgroup2() {
        Ok(root) => root,
        Err(seen) => return Some(seen),
    };
    if controller != "-" {
        let passed = std::fs::read_to_string(root.join("cgroup.subtree_control")).ok()?;
        // To pass it on would change groups that are not ours.
        passed.split_whitespace().find(|own| *own == controller)?;
    }
    let group = match Group::make(&root) {
        Ok(group) => group,
        Err(seen) => return Some(seen),
    };
    Some(match group.0.join(name).exists() {
        true => works("a new group has it"),
        false => Seen::Absent("a new group lacks it".into()),
    })
}

/// A program of a kind on an own cgroup.
pub(super) fn cgroup_attach(place: &Place) -> Seen {
    let group = match place.cgroup2().and_then(|root| Group::make(&root)) {
        Ok(group) => group,
        Err(seen) => return seen,
    };
    bpf::cgroup_device(&group.0)
}

// ---- hardware ----

/// Network cards with a driver of their own: (name, number).
pub(super) fn cards() -> Vec<(String, u32)> {
    let mut cards = Vec::new();
    for entry in std::fs::read_dir("/sys/class/net").into_iter().flatten().filter_map(Result::ok) {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().join("device").exists()
            && let Some(index) =
                text(&format!("/sys/class/net/{name}/ifindex")).and_then(|n| n.parse().ok())
        {
            cards.push((name, index));
        }
    }
    cards.sort();
    cards
}

/// A network card with a driver.
pub(super) fn nic() -> Seen {
    let cards = cards();
    let drivers: Vec<String> = cards
        .iter()
        .map(|(name, _)| {
            let link = std::fs::read_link(format!("/sys/class/net/{name}/device/driver"))
                .unwrap_or_default();
            format!("{name} ({})", link.file_name().unwrap_or_default().to_string_lossy())
        })
        .collect();
    match drivers.is_empty() {
        true => Seen::NoDevice("no network card".into()),
        false => works(drivers.join(", ")),
    }
}

/// Something that a network card does by itself, asked from its driver as `ethtool -k` does.
///
/// Source: Linux, include/uapi/linux/ethtool.h, the commands with a `struct ethtool_value`.
pub(super) fn nic_feature(name: &str) -> Seen {
    let command: u32 = match name {
        "checksum" => 0x16,
        "tso" => 0x1e,
        "gro" => 0x2b,
        "link" => 0x0a,
        _ => return Seen::Unclear(format!("`{name}` is not known")),
    };
    let socket = match sys::socket(libc::AF_INET, libc::SOCK_DGRAM, 0) {
        Ok(socket) => socket,
        Err(errno) => return Seen::Unclear(sys::errno_text(errno)),
    };
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for (card, _) in cards() {
        let mut value = [0; 8];
        value[..4].copy_from_slice(&command.to_ne_bytes());
        match sys::ethtool(&socket, &card, &mut value) {
            Ok(()) if value[4..] != [0; 4] => with.push(card),
            Ok(()) => without.push(card),
            Err(EPERM) => return Seen::NotPermitted(sys::errno_text(EPERM)),
            Err(EOPNOTSUPP) => without.push(card),
            Err(errno) => return Seen::Unclear(format!("{card}: {}", sys::errno_text(errno))),
        }
    }
    match (with.is_empty(), without.is_empty()) {
        (true, true) => Seen::NoDevice("no network card".into()),
        (true, false) => Seen::Absent(format!("off or not there: {}", without.join(", "))),
        _ => works(with.join(", ")),
    }
}

/// Device files whose name begins with `prefix`, opened for reading, the first that can be.
fn first_device(prefix: &str, class_name: &str) -> Result<(String, std::fs::File), Seen> {
    let entries = std::fs::read_dir("/dev").into_iter().flatten().filter_map(Result::ok);
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| name.starts_with(prefix));
    names.sort();
    let Some(name) = names.into_iter().next() else {
        // Without a file there is no device, whatever the class says.
        return Err(match class(class_name) {
            Seen::Works(what) => Seen::NotPermitted(format!("{what} has no file in /dev")),
            other => other,
        });
    };
    match std::fs::File::open(format!("/dev/{name}")) {
        Ok(file) => Ok((name, file)),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(Seen::NotPermitted(error.to_string()))
        }
        Err(error) => Err(Seen::Unclear(format!("/dev/{name}: {error}"))),
    }
}

/// An I2C adapter says what it can do; nothing is put on the bus.
pub(super) fn i2c() -> Seen {
    const I2C_FUNCS: u64 = 0x0705;
    const PLAIN: u64 = 1;
    const SMBUS_BYTE: u64 = 0x0006_0000;
    let (name, file) = match first_device("i2c-", "i2c-dev") {
        Ok(found) => found,
        Err(seen) => return seen,
    };
    let mut functions = [0; 8];
    match sys::ioctl(&file, I2C_FUNCS, &mut functions) {
        Ok(_) => {
            let functions = u64::from_ne_bytes(functions);
            let can = |bits: u64, word: &'static str| (functions & bits != 0).then_some(word);
            let words: Vec<&str> =
                [can(PLAIN, "I2C"), can(SMBUS_BYTE, "SMBus")].into_iter().flatten().collect();
            works(format!("{name}: {}", words.join(" and ")))
        }
        Err(errno) => Seen::Unclear(format!("{name}: {}", sys::errno_text(errno))),
    }
}

/// An SPI device says how fast its bus may be; nothing is put on it.
pub(super) fn spi() -> Seen {
    /// `_IOR('k', 4, __u32)`.
    const SPI_IOC_RD_MAX_SPEED_HZ: u64 = 0x8004_6b04;
    let (name, file) = match first_device("spidev", "spidev") {
        Ok(found) => found,
        Err(seen) => return seen,
    };
    let mut speed = [0; 4];
    match sys::ioctl(&file, SPI_IOC_RD_MAX_SPEED_HZ, &mut speed) {
        Ok(_) => works(format!("{name}: up to {} Hz", u32::from_ne_bytes(speed))),
        Err(errno) => Seen::Unclear(format!("{name}: {}", sys::errno_text(errno))),
    }
}

/// Devices of a class. Serial ports are not opened: that raises DTR, which resets some boards behind them.
pub(super) fn class(name: &str) -> Seen {
    let folder = match name {
        "gpio" => "/sys/bus/gpio/devices".into(),
        "edac" => "/sys/devices/system/edac/mc".into(),
        other => format!("/sys/class/{other}"),
    };
    let entries = std::fs::read_dir(&folder).into_iter().flatten().filter_map(Result::ok);
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    match name {
        // Only ports with hardware behind them.
        "tty" => names.retain(|name| {
            let kind = text(&format!("/sys/class/tty/{name}/type"));
            kind.is_some_and(|kind| kind != "0")
                || name.starts_with("ttyUSB")
                || name.starts_with("ttyACM")
        }),
        "edac" => names.retain(|name| name.starts_with("mc")),
        _ => {}
    }
    names.sort();
    match names.as_slice() {
        [] => Seen::NoDevice("no device".into()),
        [one, ..] => {
            works(format!("{one} and {} more", names.len() - 1).replace(" and 0 more", ""))
        }
    }
}

/// A TPM, and its version.
pub(super) fn tpm() -> Seen {
    match text("/sys/class/tpm/tpm0/tpm_version_major").as_deref() {
        Some("2") => works("version 2"),
        Some(other) => Seen::TooOld(format!("version {other}")),
        None => Seen::NoDevice("no device".into()),
    }
}

/// Random numbers are ready.
pub(super) fn entropy() -> Seen {
    match sys::random_ready() {
        Ok(()) => works("ready"),
        Err(11) => Seen::Unclear("not ready yet".into()),
        Err(errno) => Seen::Unclear(sys::errno_text(errno)),
    }
}

/// Uncorrected memory errors since boot.
pub(super) fn memory_errors() -> Seen {
    let controllers = std::fs::read_dir("/sys/devices/system/edac/mc").into_iter().flatten();
    let mut count = 0u64;
    for entry in controllers.filter_map(Result::ok) {
        let file = entry.path().join("ue_count");
        count +=
            std::fs::read_to_string(file).ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0);
    }
    match count {
        0 => works("none are reported"),
        n => Seen::Absent(format!("{n} uncorrected memory errors")),
    }
}

/// The clock source is one that does not stop or crawl.
pub(super) fn clocksource() -> Seen {
    let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    match text(path) {
        Some(name)
            if ["hpet", "acpi_pm", "jiffies", "refined-jiffies", "pit"]
                .contains(&name.as_str()) =>
        {
            Seen::Boot(format!("{name} is slow"))
        }
        Some(name) => works(name),
        None => Seen::Unclear("it cannot be read".into()),
    }
}

/// The clock is disciplined by something.
pub(super) fn time_sync() -> Seen {
    match sys::clock_state() {
        Ok((5, _, _)) => Seen::Sysctl("the kernel's clock is not synchronised".into()),
        Ok((_, status, _)) if status & 0x40 != 0 => {
            Seen::Sysctl("the kernel's clock is not synchronised".into())
        }
        Ok(_) => works("synchronised"),
        Err(errno) => Seen::Unclear(sys::errno_text(errno)),
    }
}

/// No oops and no machine check since boot.
pub(super) fn taint() -> Seen {
    let taint: u64 = text("/proc/sys/kernel/tainted").and_then(|n| n.parse().ok()).unwrap_or(0);
    match (taint >> 4 & 1, taint >> 7 & 1) {
        (1, _) => Seen::Absent("a machine check happened".into()),
        (_, 1) => Seen::Absent("the kernel had an oops".into()),
        _ => works("none"),
    }
}

/// Secure Boot.
pub(super) fn secure_boot() -> Seen {
    let path = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";
    match std::fs::read(path) {
        Ok(bytes) if bytes.get(4) == Some(&1) => works("on"),
        Ok(_) => Seen::Boot("off in the firmware".into()),
        Err(_) if Path::new("/sys/firmware/efi").exists() => {
            Seen::Boot("the firmware has none".into())
        }
        Err(_) => Seen::Boot("not booted by EFI".into()),
    }
}

/// No swap is on.
pub(super) fn no_swap() -> Seen {
    let swaps = text("/proc/swaps").unwrap_or_default();
    match swaps.lines().count() > 1 {
        true => Seen::Sysctl("swap is on".into()),
        false => works("none"),
    }
}

/// How many writes the disk is timed over; each is 4 KiB and synced.
const SYNCS: usize = 16;

/// 99th percentile of a synced write in `folder`, at most 50 ms; the measured values go to `measured`.
pub(super) fn fsync(folder: &Path, measured: &mut BTreeMap<String, f64>) -> Seen {
    use std::io::{Seek, SeekFrom, Write};
    let path = folder.join(format!(".skerry-qualify-{}", std::process::id()));
    let timed = || -> std::io::Result<Vec<f64>> {
        let mut file = std::fs::File::create(&path)?;
        let mut times = Vec::new();
        for n in 0..SYNCS {
            let start = std::time::Instant::now();
            file.seek(SeekFrom::Start((n * 4096) as u64))?;
            file.write_all(&[n as u8; 4096])?;
            file.sync_data()?;
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
        Ok(times)
    };
    let times = timed();
    let _ = std::fs::remove_file(&path);
    match times {
        Ok(mut times) => {
            times.sort_by(f64::total_cmp);
            let (p50, p99) = (times[SYNCS / 2], times[SYNCS - 1]);
            measured.insert("fsync_p50_us".into(), p50.round());
            measured.insert("fsync_p99_us".into(), p99.round());
            match p50 <= 50_000.0 {
                true => works("half of the synced writes take at most 50 ms"),
                false => Seen::Unclear("half of the synced writes take more than 50 ms".into()),
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Seen::NotPermitted(error.to_string())
        }
        Err(error) => Seen::Unclear(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read() {
        for (value, wanted, good) in [
            ("1", "1..1", true),
            ("2", "1..1", false),
            ("9", "1..", true),
            ("2", "0|2", true),
            ("1", "0|2", false),
            ("x", "1..", false),
        ] {
            assert_eq!(in_range(value, wanted), good, "{value} in {wanted}");
        }
    }

    #[test]
    fn every_probe_of_a_system_call_is_known() {
        for check in crate::table::Table::built_in().checks.values() {
            if let Some([word, name]) = check.probe.as_deref()
                && word == "syscall"
            {
                assert!(SYSCALLS.iter().any(|own| own.0 == name), "{}", check.id);
            }
        }
    }
}
