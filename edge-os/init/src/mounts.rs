//! Everything that is mounted and everything that is set at boot, as tables.
//!
//! What is not in [`mounts`] or [`LINKS`] is not writable: the root is read-only and verified. Called by the second
//! stage; data only. Source of the values: the layout of the appliance and containerd's and kubelet's requirements.

use crate::kernel::{
    BIND, Kernel, MOVE, Mount, NOATIME, NODEV, NOEXEC, NOSUID, RDONLY, REC, SHARED,
};

/// One row: where, what, how, and who writes there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Mount point.
    pub target: &'static str,
    /// Filesystem; its name is the source.
    pub fstype: &'static str,
    /// `MS_*`.
    pub flags: u64,
    /// Options.
    pub data: &'static str,
    /// Module that has the filesystem; empty if it is built in.
    pub module: &'static str,
    /// Whether the boot goes on without it, as on a machine without this firmware.
    pub optional: bool,
    /// Who writes there.
    pub writer: &'static str,
}

const fn row(
    target: &'static str,
    fstype: &'static str,
    flags: u64,
    data: &'static str,
    writer: &'static str,
) -> Row {
    Row { target, fstype, flags, data, module: "", optional: false, writer }
}

impl Row {
    const fn optional(mut self) -> Self {
        self.optional = true;
        self
    }

    /// The call.
    pub fn mount(&self) -> Mount {
        Mount::new(self.fstype, self.target, self.fstype, self.flags, self.data)
    }
}

/// The first stage's own, moved along to the second.
pub const EARLY: [Row; 3] = [
    row("/dev", "devtmpfs", NOSUID | NOEXEC, "mode=0755", "kernel"),
    row("/proc", "proc", NOSUID | NODEV | NOEXEC, "", "kernel"),
    row("/sys", "sysfs", NOSUID | NODEV | NOEXEC, "", "kernel"),
];

const KERNEL_FS: u64 = NOSUID | NODEV | NOEXEC;

/// What the second stage mounts first, in order. `/state`, its bind `/var`, and the two that are mounted only while
/// they are used, `/efi` and `/config`, follow from the disk: [`state`], [`var`], [`config`].
pub const TABLE: [Row; 13] = [
    row("/dev/pts", "devpts", NOSUID | NOEXEC, "gid=5,mode=0620,ptmxmode=0666", "terminals"),
    row("/dev/shm", "tmpfs", NOSUID | NODEV, "mode=1777,size=10%", "services"),
    row("/dev/mqueue", "mqueue", KERNEL_FS, "", "services").optional(),
    row("/run", "tmpfs", NOSUID | NODEV, "mode=0755,size=20%", "services"),
    row("/tmp", "tmpfs", NOSUID | NODEV, "mode=1777,size=10%", "services"),
    row(
        "/sys/fs/cgroup",
        "cgroup2",
        KERNEL_FS,
        "nsdelegate,memory_recursiveprot",
        "init, containerd, agent",
    ),
    row("/sys/fs/bpf", "bpf", NOSUID | NODEV | NOEXEC, "mode=0700", "agent, network").optional(),
    row("/sys/fs/pstore", "pstore", KERNEL_FS, "", "kernel").optional(),
    row("/sys/kernel/security", "securityfs", KERNEL_FS, "", "kernel").optional(),
    row("/sys/kernel/tracing", "tracefs", KERNEL_FS, "mode=0700", "agent").optional(),
    row("/sys/kernel/debug", "debugfs", KERNEL_FS, "mode=0700", "kernel").optional(),
    Row {
        module: "efivarfs",
        ..row("/sys/firmware/efi/efivars", "efivarfs", KERNEL_FS | RDONLY, "", "init")
    }
    .optional(),
    row("/run/lock", "tmpfs", KERNEL_FS, "mode=0755,size=1m", "services").optional(),
];

/// The reserve of the filesystem is nobody's by name, so that only who has CAP_SYS_RESOURCE can use it: containerd and the
/// agent have, pods have not even as root. Without it a pod that fills the disk could not be removed any more, because
/// to remove it something has to be written.
///
/// Without `nodelalloc` the blocks of a file are chosen when it is written back, up to 30 s after the program wrote it, but
/// its name is on the disk as soon as anybody syncs anything. containerd syncs its database after it has unpacked an
/// image and does not sync the files: a power cut after that leaves an image that is called complete and has empty
/// programs in it. With it, and in the journal's `ordered` mode, data are on the disk before names that point to them.
const STATE_OPTIONS: &str = "errors=remount-ro,resuid=2147483646,data=ordered,nodelalloc";

/// The state partition. `readonly` when it could not be repaired.
pub fn state(device: &str, readonly: bool) -> Mount {
    let flags = NOSUID | NODEV | NOATIME | if readonly { RDONLY } else { 0 };
    // Not `noexec`: volumes of pods are binds of it and inherit the flag.
    Mount::new(device, "/state", "ext4", flags, STATE_OPTIONS)
}

/// A state in memory, for when there is none on the disk: all that a node needs to say so.
pub fn state_in_memory(target: &str) -> Mount {
    Mount::new("tmpfs", target, "tmpfs", NOSUID | NODEV, "mode=0755,size=25%")
}

/// `/state` as it could not be repaired, with memory over it; see [`crate::state`].
pub fn state_overlay() -> Mount {
    let data = "lowerdir=/run/state-readonly,upperdir=/run/state-memory/upper,workdir=/run/state-memory/work";
    Mount::new("overlay", "/state", "overlay", NOSUID | NODEV, data)
}

/// What is kept under its usual name.
pub fn var() -> Mount {
    Mount::new("/state/var", "/var", "", BIND | REC, "")
}

/// Mounts of pods have to be seen by the agent and the other way round.
pub fn shared_root() -> Mount {
    Mount::new("none", "/", "", REC | SHARED, "")
}

/// The partition or stick that the site is read from; `writable` only while the token is overwritten.
pub fn config(device: &str, target: &str, fstype: &str, writable: bool) -> Mount {
    let flags = NOSUID | NODEV | NOEXEC | if writable { 0 } else { RDONLY };
    // The default character set of vfat needs a module that may not be there yet; this one is loaded with vfat.
    let data = if fstype == "vfat" { "umask=0077,iocharset=ascii" } else { "" };
    Mount::new(device, target, fstype, flags, data)
}

/// Takes `from` along to the new root.
pub fn moved(from: &str, new_root: &str) -> Mount {
    Mount::new(from, &format!("{new_root}{from}"), "", MOVE, "")
}

/// Folders that services expect; those below /var and /state are made after these are mounted.
pub const FOLDERS: [(&str, u32); 5] = [
    ("/run/skerry", 0o755),
    ("/run/cni/net.d", 0o755),
    ("/run/containerd", 0o711),
    ("/run/netns", 0o755),
    ("/run/lock", 0o755),
];

/// Folders of the state.
pub const STATE_FOLDERS: [(&str, u32); 12] = [
    ("/state/var/lib/containerd", 0o711),
    ("/state/var/lib/kubelet", 0o755),
    ("/state/var/log/pods", 0o755),
    ("/state/var/log/containers", 0o755),
    ("/state/var/tmp", 0o1777),
    ("/state/edge", 0o700),
    ("/state/log", 0o700),
    ("/state/site", 0o700),
    ("/state/secrets", 0o700),
    ("/state/boot", 0o700),
    ("/state/update", 0o700),
    ("/state/var/lib/cni", 0o755),
];

/// Names that programs expect outside of /run.
pub const LINKS: [(&str, &str); 1] = [("/var/run", "/run")];

/// Sysctls, by path below /proc/sys.
pub const SYSCTLS: [(&str, &str); 22] = [
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/modprobe", "/usr/sbin/modprobe"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
    ("kernel/kptr_restrict", "2"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/unprivileged_bpf_disabled", "2"),
    ("kernel/pid_max", "65536"),
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    // Forwarding switches router advertisements off otherwise, and with them the node's own address.
    ("net/ipv6/conf/all/accept_ra", "2"),
    ("net/ipv6/conf/default/accept_ra", "2"),
    ("net/ipv4/conf/all/rp_filter", "2"),
    ("net/ipv4/conf/all/route_localnet", "0"),
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/inotify/max_user_watches", "524288"),
    ("fs/protected_symlinks", "1"),
    ("fs/protected_hardlinks", "1"),
    ("net/core/somaxconn", "4096"),
];

/// Sysctls that are there only after the modules of [`MODULES`].
pub const LATE_SYSCTLS: [(&str, &str); 4] = [
    ("net/bridge/bridge-nf-call-iptables", "1"),
    ("net/bridge/bridge-nf-call-ip6tables", "1"),
    ("net/core/default_qdisc", "fq"),
    ("net/ipv4/tcp_congestion_control", "bbr"),
];

/// Modules that no device asks for: what the first pod needs with the plugins of this program.
/// Each that is loaded here saves a start of `modprobe` then; each that is not saves its time at every boot, so that
/// what only other plugins ask for (`xt_*`, `nft_compat`) is left to the kernel's own asking.
pub const MODULES: [&str; 12] = [
    "veth",
    "bridge",
    "br_netfilter",
    "nf_tables",
    "nft_chain_nat",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "nft_fib_inet",
    "nf_conntrack_netlink",
    "sch_fq",
    "tcp_bbr",
];

/// Sets a table of sysctls and returns those that could not be set.
pub fn set_all(
    kernel: &dyn Kernel,
    table: &'static [(&'static str, &'static str)],
) -> Vec<&'static str> {
    let failed =
        |(path, value): &&(&str, &str)| kernel.set(&format!("/proc/sys/{path}"), value).is_err();
    table.iter().filter(failed).map(|(path, _)| *path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_writable_by_services_cannot_have_devices_or_setuid_files() {
        for row in TABLE {
            assert_eq!(row.flags & NOSUID, NOSUID, "{}", row.target);
            assert!(row.flags & NODEV != 0 || row.target == "/dev/pts", "{}", row.target);
        }
        let state = state("/dev/vda5", false);
        assert_eq!(state.flags & (NOSUID | NODEV | NOEXEC), NOSUID | NODEV);
    }

    #[test]
    fn mount_points_come_after_those_they_lie_in() {
        let order: Vec<_> = EARLY.iter().chain(&TABLE).map(|row| row.target).collect();
        for (at, target) in order.iter().enumerate() {
            let later =
                order[at + 1..].iter().find(|later| target.starts_with(&format!("{later}/")));
            assert_eq!(later, None, "{target} before what holds it");
        }
    }
}
