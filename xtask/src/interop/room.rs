//! Where a combination runs: mount, PID and network namespaces that end with it.
//!
//! The Go programs write to `/etc`, `/var/lib` and `/var/log`, listen on fixed ports and may change iptables. Inside a
//! room these folders are overlays whose changes live in memory, `/run` is empty, and the network is a loopback and one
//! idle interface. When the room's first process ends, the kernel ends all others and undoes every mount. cgroups are
//! the one thing that no namespace takes along; [`sweep`] removes those of rooms. With a real cluster the network is
//! the machine's, because the cluster has to be reached.

use crate::sh;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bridge of the pods.
pub(super) const BRIDGE: &str = "interop0";
/// Folders that the programs change.
const CHANGED: [&str; 3] = ["/etc", "/var/lib", "/var/log"];
/// Address of a room's idle interface: reserved for documentation, so nobody's.
pub(super) const ADDRESS: &str = "192.0.2.2";

/// The command that runs `plan` in a room.
pub(super) fn command(plan: &Path, own_network: bool) -> Result<Command> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    if own_network {
        command.arg("--net");
    }
    command.arg(std::env::current_exe()?).arg("interop-room").arg(plan);
    Ok(command)
}

/// Ends the room when whoever started it is gone, for example by Ctrl-C: the first process of a PID namespace gets no
/// signal that it does not handle. Its end takes all others along.
pub(super) fn end_with_parent() {
    std::thread::spawn(|| {
        // Ends at the end of the pipe, or when it breaks, which is the same.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
}

/// Sets the room up, from inside.
pub(super) fn furnish(dir: &Path, own_network: bool) -> Result<()> {
    let memory = dir.join("room");
    std::fs::create_dir_all(&memory)?;
    mount(&["-t", "tmpfs", "tmpfs"], &memory)?;
    for folder in CHANGED {
        let name = folder.trim_start_matches('/').replace('/', "-");
        let (upper, work) = (memory.join(&name), memory.join(format!("{name}.work")));
        std::fs::create_dir_all(&upper)?;
        std::fs::create_dir_all(&work)?;
        let layers =
            format!("lowerdir={folder},upperdir={},workdir={}", upper.display(), work.display());
        mount(&["-t", "overlay", "overlay", "-o", &layers], Path::new(folder))?;
    }
    mount(&["-t", "tmpfs", "tmpfs"], Path::new("/run"))?;
    if own_network {
        ip(&["link", "set", "lo", "up"])?;
        // A bridge without members: there wherever pods can run, unlike dummy interfaces.
        ip(&["link", "add", "eth0", "type", "bridge"])?;
        ip(&["address", "add", &format!("{ADDRESS}/24"), "dev", "eth0"])?;
        ip(&["link", "set", "eth0", "up"])?;
        ip(&["route", "add", "default", "dev", "eth0"])?;
    }
    Ok(())
}

fn mount(args: &[&str], target: &Path) -> Result<()> {
    sh::output(Command::new("mount").args(args).arg(target)).map(drop)
}

fn ip(args: &[&str]) -> Result<()> {
    let ip = sh::find("ip").context("`ip` is not installed")?;
    sh::output(Command::new(ip).args(args)).map(drop)
}

/// The cgroup `name` in each hierarchy.
fn cgroups(name: &str) -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(top).into_iter().flatten().flatten();
    let inner = hierarchies.map(|entry| entry.path().join(name));
    inner.chain([top.join(name)]).filter(|path| path.is_dir()).collect()
}

/// Makes the cgroup `name` where there are hierarchies, as the kubelet expects its parent.
pub(super) fn make_cgroups(name: &str) -> Result<()> {
    let top = Path::new("/sys/fs/cgroup");
    if top.join("cgroup.controllers").exists() {
        std::fs::create_dir_all(top.join(name))?;
        return Ok(());
    }
    for entry in std::fs::read_dir(top)?.flatten() {
        let path = entry.path();
        if !path.is_symlink() && path.join("cgroup.procs").exists() {
            let own = path.join(name);
            std::fs::create_dir_all(&own)?;
            if path.ends_with("cpuset") {
                // A new cpuset has no processors until it is told.
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    std::fs::write(own.join(file), std::fs::read(path.join(file))?)?;
                }
            }
        }
    }
    Ok(())
}

/// Removes what a room left: cgroups, except those in which something runs, and its bridge on the machine's network.
pub(super) fn sweep(cgroup: &str, own_network: bool) {
    if !own_network && Path::new("/sys/class/net").join(BRIDGE).exists() {
        // Gone meanwhile is as good.
        let _ = ip(&["link", "delete", BRIDGE]);
    }
    for top in cgroups(cgroup) {
        remove(&top);
    }
}

fn remove(cgroup: &Path) {
    for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    // Refused by the kernel when a process is in it.
    let _ = std::fs::remove_dir(cgroup);
}
