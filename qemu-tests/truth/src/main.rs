//! `skerry-truth`: holds the verdicts of `skerry-qualify` against the truth, in machines of QEMU.
//!
//! Debian's kernels, cloud and generic, of two releases, boot with an initramfs that has their modules and the usual tools. In
//! each case of cases.toml something is taken away; the machine's PID 1 (init.rs) lets the kernel be judged, sets each data path
//! up for real (paths.sh) and prints both. A verdict is wrong when a profile is qualified or degraded and no traffic goes
//! through, or unsupported and it does. `cargo xtask bench qualify` is the caller.
//!
//! Packages come from the apt of this machine (Debian 12's kernels and tools) and from the state that `skerry image build` keeps
//! (Debian 13's kernels). Nothing is installed.

mod plan;
mod ram;

use anyhow::{Context, Result, bail, ensure};
use plan::{Case, END, Found, MARK, Plan};
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longest time for one boot with all its cases.
const BOOT_TIMEOUT: Duration = Duration::from_secs(3600);
/// Cases in one boot: what holds this machine stays short, and a kernel that dies takes few with it.
const CASES_PER_BOOT: usize = 6;
const CASES: &str = include_str!("../cases.toml");
const PATHS: &str = include_str!("../paths.sh");
/// What paths.sh calls, with the libraries of those that this machine may lack.
const TOOLS: &[&str] = &[
    "busybox-static",
    "iproute2",
    "nftables",
    "iptables",
    "ipset",
    "ipvsadm",
    "wireguard-tools",
    "bpftool",
    "kmod",
    "util-linux",
    "libc6",
    "libmnl0",
    "libnftables1",
    "libnftnl11",
    "libjansson4",
    "libxtables12",
    "libip4tc2",
    "libip6tc2",
    "libnetfilter-conntrack3",
    "libnfnetlink0",
    "libipset13",
    "libpopt0",
    "libnl-3-200",
    "libnl-genl-3-200",
    "libkmod2",
    "libelf1",
    "libbpf1",
    "libcap2",
    "zlib1g",
    "libdb5.3",
    "libtirpc3",
    "libgssapi-krb5-2",
    "libkrb5-3",
    "libk5crypto3",
    "libkrb5support0",
    "libcom-err2",
    "libkeyutils1",
    "libbsd0",
    "libmd0",
    "libselinux1",
    "libpcre2-8-0",
    "libgmp10",
    "libreadline8",
    "libtinfo6",
    "libedit2",
    "liblzma5",
    "libzstd1",
    "libssl3",
];
/// Programs of the tools that go into the machine; others would only make it larger.
const PROGRAMS: &[&str] = &[
    "bpftool",
    "ip",
    "tc",
    "nft",
    "xtables-nft-multi",
    "xtables-legacy-multi",
    "ipset",
    "ipvsadm",
    "wg",
    "unshare",
];

/// cases.toml.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    paths: Vec<String>,
    case: Vec<Case>,
}

/// A kernel as Debian packages it.
struct Kernel {
    /// For people.
    name: &'static str,
    /// Its metapackage.
    package: &'static str,
    /// Debian 13's, from the state of the image builder.
    newer: bool,
}

const KERNELS: [Kernel; 4] = [
    Kernel { name: "debian-12-cloud", package: "linux-image-cloud-amd64", newer: false },
    Kernel { name: "debian-12-generic", package: "linux-image-amd64", newer: false },
    Kernel { name: "debian-13-cloud", package: "linux-image-cloud-amd64", newer: true },
    Kernel { name: "debian-13-generic", package: "linux-image-amd64", newer: true },
];

#[derive(Default)]
struct Args {
    work: PathBuf,
    init: PathBuf,
    qualify: PathBuf,
    /// Only kernels and cases whose name has this in it.
    kernel: String,
    case: String,
    /// When to stop; what was not tried by then is no case.
    until: Option<Instant>,
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(0) => std::process::ExitCode::SUCCESS,
        Ok(_) => std::process::ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::from(2)
        }
    }
}

/// Returns how many verdicts were wrong.
fn run() -> Result<usize> {
    let mut args = Args::default();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("`{word}` needs a value"))?;
        match word.as_str() {
            "--work" => args.work = value.into(),
            "--init" => args.init = value.into(),
            "--qualify" => args.qualify = value.into(),
            "--kernel" => args.kernel = value,
            "--case" => args.case = value,
            "--seconds" => {
                let seconds = value.parse().context("`--seconds` is a number")?;
                args.until = Some(Instant::now() + Duration::from_secs(seconds));
            }
            other => {
                bail!(
                    "`{other}` is no option\nhint: --work, --init, --qualify, --kernel, --case, --seconds"
                )
            }
        }
    }
    ensure!(
        !args.work.as_os_str().is_empty(),
        "`--work` names the folder for kernels and archives"
    );
    let table: Table = toml::from_str(CASES).context("cases.toml")?;
    let cases: Vec<Case> = table
        .case
        .into_iter()
        .filter(|case| case.name.contains(&args.case))
        .map(|case| match case.paths.is_empty() {
            true => Case { paths: table.paths.clone(), ..case },
            false => case,
        })
        .collect();
    let (mut tried, mut wrong, mut undecided, mut broken) = (0, 0, 0, 0);
    let (mut agrees, mut differs) = (0, 0);
    let (mut slowest_ms, mut checks, mut peak_kib, mut compared) = (0, 0, 0, 0);
    for kernel in KERNELS.iter().filter(|kernel| kernel.name.contains(&args.kernel)) {
        let machine = prepare(&args, kernel).with_context(|| format!("kernel {}", kernel.name))?;
        for (cmdline, cases) in boots(&cases) {
            if args.until.is_some_and(|until| until <= Instant::now()) {
                continue;
            }
            let begun = Instant::now();
            let found = boot(&machine, &args, &cmdline, &cases)?;
            eprintln!("{}: {} cases in {} s", kernel.name, found.len(), begun.elapsed().as_secs());
            for case in &cases {
                let late = args.until.is_some_and(|until| until <= Instant::now());
                let Some(found) = found.iter().find(|found| found.case == case.name) else {
                    if late {
                        eprintln!("not tried in time {}: {}", kernel.name, case.name);
                        continue;
                    }
                    eprintln!("BROKEN {}: {}: the machine said nothing", kernel.name, case.name);
                    broken += 1;
                    continue;
                };
                if !found.broken.is_empty() {
                    // A kernel that has it built in cannot lose it: that is no case of this kernel.
                    eprintln!("left out {}: {}: {}", kernel.name, case.name, found.broken);
                    continue;
                }
                tried += 1;
                agrees += found.bpftool_agrees;
                for difference in &found.bpftool_differs {
                    differs += 1;
                    eprintln!("DIFFERS {}: {difference}", kernel.name);
                }
                slowest_ms = slowest_ms.max(found.qualify_ms);
                checks = checks.max(found.checks);
                peak_kib = peak_kib.max(found.peak_rss_kib);
                for (profile, why) in &found.paths {
                    let verdict = found.verdicts.get(profile).map_or("none", String::as_str);
                    compared += 1;
                    let runs = why.is_empty();
                    let fits = match verdict {
                        "qualified" | "degraded" => runs,
                        "unsupported" => !runs,
                        "unknown" => {
                            undecided += 1;
                            true
                        }
                        _ => false,
                    };
                    if !fits {
                        wrong += 1;
                        let truth = if runs { "traffic goes through" } else { why };
                        let lacks = found.lacks.get(profile).map_or("", String::as_str);
                        eprintln!(
                            "WRONG {}: {}: {profile} is {verdict} [{lacks}], but: {truth}",
                            kernel.name, case.name
                        );
                    }
                }
            }
        }
    }
    let figure = |name: &str, unit: &str, value: u64| {
        println!(
            "{}",
            json!({"bench": "qualify", "figure": name, "unit": unit, "value": value, "peer": null, "ratio": null})
        );
    };
    figure("checks", "", checks as u64);
    figure("seconds_in_tcg", "s", slowest_ms.div_ceil(1000));
    figure("binary_bytes", "bytes", fs::metadata(&args.qualify)?.len());
    figure("peak_rss_bytes", "bytes", peak_kib * 1024);
    figure("cases", "", tried as u64);
    figure("verdicts", "", compared as u64);
    figure("undecided_verdicts", "", undecided as u64);
    figure("bpftool_agrees", "", agrees as u64);
    figure("bpftool_differs", "", differs as u64);
    figure("broken_cases", "", broken as u64);
    figure("wrong_verdicts", "", wrong as u64);
    Ok(wrong + broken)
}

/// The cases, boot by boot.
fn boots(cases: &[Case]) -> Vec<(String, Vec<Case>)> {
    let mut boots: Vec<(String, Vec<Case>)> = Vec::new();
    for case in cases {
        let cmdline = case.cmdline.clone().unwrap_or_default();
        match boots.iter_mut().find(|(own, has)| *own == cmdline && has.len() < CASES_PER_BOOT) {
            Some((_, has)) => has.push(case.clone()),
            None => boots.push((cmdline, vec![case.clone()])),
        }
    }
    boots
}

/// What a boot needs; the archive lacks only the plan.
struct Machine {
    linux: PathBuf,
    archive: PathBuf,
}

fn command(program: &str, change: impl FnOnce(&mut Command)) -> Result<String> {
    let mut command = Command::new(program);
    change(&mut command);
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("no `{program}`"))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        bail!("`{program}` failed: {}", said.trim().lines().last().unwrap_or_default());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Downloads packages into `folder`, those that are not there yet, and unpacks them into `root`.
fn packages(names: &[String], options: &[String], folder: &Path, root: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    fs::create_dir_all(root)?;
    let unpacked = |name: &str| folder.join(format!("{name}.unpacked"));
    let missing: Vec<&String> = names.iter().filter(|name| !unpacked(name).exists()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    command("apt-get", |apt| {
        apt.args(options).arg("download").args(&missing).current_dir(folder);
    })?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "deb") {
            command("dpkg-deb", |dpkg| {
                dpkg.arg("-x").arg(&path).arg(root);
            })?;
            fs::remove_file(path)?;
        }
    }
    for name in missing {
        fs::write(unpacked(name), "")?;
    }
    Ok(())
}

/// Options that make apt read the state of the image builder.
fn newer_state(work: &Path) -> Result<Vec<String>> {
    let home = std::env::var("HOME").context("no HOME")?;
    let state = Path::new(&home).join(".cache/skerry/apt/trixie-amd64");
    if !state.join("state/lists").exists() {
        bail!("no package lists of Debian 13\nhint: `cargo xtask image` makes them");
    }
    let at = |name: &str| state.join(name).display().to_string();
    let cache = work.join("apt");
    fs::create_dir_all(cache.join("archives/partial"))?;
    let options = [
        ("Dir::Etc::sourcelist", "/dev/null".to_owned()),
        ("Dir::Etc::sourceparts", at("sources")),
        ("Dir::State", at("state")),
        ("Dir::State::status", at("status")),
        ("Dir::Cache", cache.display().to_string()),
        ("APT::Architecture", "amd64".to_owned()),
    ];
    Ok(options
        .iter()
        .flat_map(|(key, value)| ["-o".to_owned(), format!("{key}={value}")])
        .collect())
}

fn prepare(args: &Args, kernel: &Kernel) -> Result<Machine> {
    let tools = args.work.join("tools");
    let names: Vec<String> = TOOLS.iter().map(|name| (*name).to_owned()).collect();
    packages(&names, &[], &args.work.join("debs"), &tools).context("tools")?;
    let options = if kernel.newer { newer_state(&args.work)? } else { Vec::new() };
    let shown = command("apt-cache", |apt| {
        apt.args(&options).args(["show", "--no-all-versions", kernel.package]);
    })?;
    let image = shown
        .lines()
        .find_map(|line| line.strip_prefix("Depends: "))
        .and_then(|depends| depends.split([' ', ',']).next())
        .context("the metapackage depends on no kernel")?
        .to_owned();
    let release = image.trim_start_matches("linux-image-").to_owned();
    let root = args.work.join(kernel.name);
    packages(std::slice::from_ref(&image), &options, &root.join("debs"), &root.join("root"))?;
    // Newer packages have them below /usr.
    let places = ["root/lib/modules", "root/usr/lib/modules"];
    let modules = places.map(|place| root.join(place).join(&release));
    let modules = modules.into_iter().find(|folder| folder.exists()).context("no modules")?;
    if !root.join("ready").exists() {
        keep_networks(&modules)?;
        // depmod of the tools, in a root that has the modules.
        let place = tools.join("lib/modules").join(&release);
        fs::create_dir_all(place.parent().context("a parent")?)?;
        command("cp", |cp| {
            cp.arg("-a").arg(&modules).arg(&place);
        })?;
        command("chroot", |chroot| {
            chroot.arg(&tools).args(["/sbin/depmod", &release]);
        })?;
        fs::remove_dir_all(&modules)?;
        fs::rename(&place, &modules)?;
        fs::write(root.join("ready"), "")?;
    }
    let archive = root.join("base.cpio");
    let mut ram = ram::Archive::new(fs::File::create(&archive)?);
    ram.folder("lib/modules")?;
    ram.tree(&modules, &format!("lib/modules/{release}"), &|path| {
        // Nobody reads the binary indexes: the machine's modprobe reads text.
        !path.ends_with(".bin")
    })?;
    let config = root.join(format!("root/boot/config-{release}"));
    ram.file(&format!("boot/config-{release}"), &fs::read(config)?, 0o644)?;
    tools_of(&mut ram, &tools)?;
    ram.file("truth/init", &fs::read(&args.init)?, 0o755)?;
    ram.file("truth/skerry-qualify", &fs::read(&args.qualify)?, 0o755)?;
    ram.file("truth/paths.sh", PATHS.as_bytes(), 0o644)?;
    ram.link("init", "/truth/init")?;
    ram.link("sbin/modprobe", "/truth/init")?;
    ram.finish()?;
    Ok(Machine { linux: root.join(format!("root/boot/vmlinuz-{release}")), archive })
}

/// Of the modules only what networks and containers need: the drivers of a generic kernel have ten times as much.
fn keep_networks(modules: &Path) -> Result<()> {
    let kernel = modules.join("kernel");
    let drivers = kernel.join("drivers");
    for entry in fs::read_dir(&drivers)? {
        let entry = entry?;
        if !["net", "md", "block"].contains(&&*entry.file_name().to_string_lossy()) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    for entry in fs::read_dir(drivers.join("net"))? {
        let entry = entry?;
        let keep = ["wireguard", "vxlan", "ipvlan", "bonding", "can"];
        if entry.file_type()?.is_dir() && !keep.contains(&&*entry.file_name().to_string_lossy()) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    let _ = fs::remove_dir_all(kernel.join("sound"));
    // The kernel takes plain files only.
    command("find", |find| {
        find.arg(&kernel).args(["-name", "*.xz", "-exec", "xz", "-d", "{}", "+"]);
    })
    .map(drop)
}

/// The programs, with the libraries that they ask for, found by the loader of their own root.
fn tools_of(ram: &mut ram::Archive<fs::File>, tools: &Path) -> Result<()> {
    let busybox = ["bin/busybox", "usr/bin/busybox"].map(|path| tools.join(path));
    let busybox = busybox.iter().find(|path| path.exists()).context("no busybox")?;
    ram.file("bin/busybox", &fs::read(busybox)?, 0o755)?;
    let applets = command(&busybox.display().to_string(), |busybox| {
        busybox.arg("--list");
    })?;
    for applet in applets
        .lines()
        .filter(|one| !["busybox", "ip", "tc", "modprobe", "unshare", "init"].contains(one))
    {
        ram.link(&format!("bin/{applet}"), "/bin/busybox")?;
    }
    let mut libraries = BTreeMap::new();
    for name in PROGRAMS {
        let places =
            ["usr/sbin", "sbin", "usr/bin", "bin"].map(|folder| format!("{folder}/{name}"));
        let place = places.iter().find(|place| tools.join(place).exists());
        let place = place.with_context(|| format!("the packages have no `{name}`"))?;
        ram.file(&format!("usr/sbin/{name}"), &fs::read(tools.join(place))?, 0o755)?;
        let listed = command("chroot", |chroot| {
            chroot.arg(tools).args(["/lib64/ld-linux-x86-64.so.2", "--list", &format!("/{place}")]);
        })
        .with_context(|| format!("libraries of `{name}`"))?;
        for path in listed.lines().filter_map(|line| {
            let path = line.split("=> ").last()?.trim().split(' ').next()?;
            path.starts_with('/').then(|| path.to_owned())
        }) {
            libraries.insert(path.clone(), fs::read(tools.join(path.trim_start_matches('/')))?);
        }
    }
    libraries.insert(
        "/lib64/ld-linux-x86-64.so.2".into(),
        fs::read(tools.join("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"))?,
    );
    // Matches and targets are libraries, too.
    let extensions = tools.join("usr/lib/x86_64-linux-gnu/xtables");
    for entry in fs::read_dir(&extensions)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        libraries.insert(format!("/usr/lib/x86_64-linux-gnu/xtables/{name}"), fs::read(&path)?);
    }
    for (path, bytes) in libraries {
        ram.file(path.trim_start_matches('/'), &bytes, 0o755)?;
    }
    for (name, to) in
        [("iptables-nft", "xtables-nft-multi"), ("iptables-legacy", "xtables-legacy-multi")]
    {
        ram.link(&format!("usr/sbin/{name}"), &format!("/usr/sbin/{to}"))?;
    }
    ram.file("etc/protocols", b"icmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\n", 0o644)?;
    for folder in ["proc", "sys", "dev", "run", "tmp", "var"] {
        ram.folder(folder)?;
    }
    // Locks of iptables, and the names of network namespaces.
    ram.link("var/run", "/run")
}

/// Runs the cases of one boot; what a machine that died has said before counts.
fn boot(machine: &Machine, args: &Args, cmdline: &str, cases: &[Case]) -> Result<Vec<Found>> {
    let initrd = args.work.join("initrd.cpio");
    fs::copy(&machine.archive, &initrd)?;
    let file = fs::OpenOptions::new().append(true).open(&initrd)?;
    let mut ram = ram::Archive::new(file);
    let plan = serde_json::to_vec(&Plan { cases: cases.to_vec() })?;
    ram.file("truth/plan.json", &plan, 0o644)?;
    ram.finish()?;
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-machine", "q35", "-cpu", "max", "-m", "1536", "-smp", "1", "-nic", "none"]);
    qemu.args(["-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot"]);
    qemu.arg("-kernel").arg(&machine.linux).arg("-initrd").arg(&initrd);
    // On a busy host the emulated timer may not tick while the kernel looks whether it does, which ends in a panic.
    qemu.arg("-append").arg(format!(
        "console=ttyS0 quiet loglevel=1 panic=-1 no_timer_check net.ifnames=0 cgroup_no_v1=all {cmdline}"
    ));
    // By translation everywhere: a processor's own help differs from machine to machine, and so would the verdicts.
    qemu.args(["-accel", "tcg"]);
    let mut child = qemu
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .context("no qemu-system-x86_64\nhint: install qemu-system-x86")?;
    let console = child.stdout.take().context("no console")?;
    let mut log = fs::File::create(args.work.join("console.log"))?;
    let (lines, read) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + BOOT_TIMEOUT;
    let deadline = args.until.map_or(deadline, |until| until.min(deadline));
    let mut found = Vec::new();
    while let Ok(line) = read.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        writeln!(log, "{line}")?;
        if let Some(at) = line.find(MARK) {
            let one: Found = serde_json::from_str(&line[at + MARK.len()..])
                .with_context(|| format!("not a finding: {line}"))?;
            eprintln!("  {}: judged in {} ms", one.case, one.qualify_ms);
            found.push(one);
        } else if line.contains(END) {
            break;
        }
    }
    let _ = child.kill();
    child.wait()?;
    Ok(found)
}
