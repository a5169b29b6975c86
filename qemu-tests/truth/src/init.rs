//! PID 1 of a machine that holds verdicts against the truth: for each case it takes modules away, lets `skerry-qualify` judge
//! the running kernel, sets every profile's data path up with the usual tools (paths.sh), and prints both.
//!
//! The same program is the machine's `modprobe`, and loads and attaches the few eBPF programs that the paths need. It shares no
//! code with the probes.

mod kernel;
mod plan;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use plan::{Case, END, Found, MARK, Plan};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longest time for one data path.
const PATH_TIMEOUT: &str = "120";
/// How long modules may be busy: network namespaces go away behind the back of who removes them.
const BUSY_MAX: Duration = Duration::from_secs(10);
const QUALIFY: &str = "/truth/skerry-qualify";
const USUAL_MODPROBE: &str = "/sbin/modprobe";

fn main() {
    let mut words = std::env::args();
    let own = words.next().unwrap_or_default();
    let words: Vec<String> = words.collect();
    let done = if own.ends_with("modprobe") {
        let name = words.iter().rfind(|word| !word.starts_with('-'));
        name.map_or(Ok(()), |name| load(name))
    } else if std::process::id() == 1 {
        let done = try_all();
        if let Err(error) = &done {
            println!("error: {error:#}");
        }
        println!("{END}");
        kernel::power_off();
        done
    } else {
        helper(&words)
    };
    if let Err(error) = done {
        eprintln!("{error:#}");
        std::process::exit(1);
    }
}

/// What paths.sh cannot do itself.
fn helper(words: &[String]) -> Result<()> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["pin", kind, answer, path] => kernel::pin(kind, answer.parse()?, path),
        ["deny-connect", folder] => denied(folder, kernel::Hook::Connect4, || {
            let address: std::net::SocketAddr = "127.0.0.1:1".parse().expect("an address");
            let error = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(2));
            error.err().and_then(|error| error.raw_os_error()) == Some(nix::libc::EPERM)
        }),
        ["deny-device", folder] => denied(folder, kernel::Hook::Device, || {
            let error = fs::File::open("/dev/null").err();
            error.and_then(|error| error.raw_os_error()) == Some(nix::libc::EPERM)
        }),
        _ => bail!("unknown helper"),
    }
}

/// Attaches a program that says no to a cgroup, and asks from inside whether it does; and that without it nothing is refused.
fn denied(folder: &str, hook: kernel::Hook, refused: impl Fn() -> bool) -> Result<()> {
    let folder = Path::new(folder);
    if !folder.exists() {
        fs::create_dir(folder).context("no cgroup")?;
    }
    fs::write(folder.join("cgroup.procs"), std::process::id().to_string()).context("not moved")?;
    let before = refused();
    let attached = kernel::attach(folder, hook)?;
    let during = refused();
    drop(attached);
    let after = refused();
    fs::write("/sys/fs/cgroup/cgroup.procs", std::process::id().to_string()).context("not back")?;
    let _ = fs::remove_dir(folder);
    if before || !during || after {
        bail!("refused before {before}, while it was attached {during}, after {after}");
    }
    Ok(())
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

fn modules() -> PathBuf {
    Path::new("/lib/modules").join(release())
}

/// As the kernel writes module names.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

fn stem(path: &str) -> String {
    plain(path.rsplit('/').next().unwrap_or_default().trim_end_matches(".ko"))
}

/// `modprobe NAME`, which may be an alias: everything that it depends on, then itself.
fn load(name: &str) -> Result<()> {
    let folder = modules();
    let wanted = plain(name);
    let index = fs::read_to_string(folder.join("modules.dep"))?;
    let mut names: BTreeSet<String> = [wanted.clone()].into();
    let aliases = fs::read_to_string(folder.join("modules.alias")).unwrap_or_default();
    for line in aliases.lines() {
        let mut words = line.split(' ').skip(1);
        if let (Some(pattern), Some(module)) = (words.next(), words.next())
            && (pattern == name
                || plain(pattern) == wanted
                || glob(pattern.as_bytes(), name.as_bytes()))
        {
            names.insert(plain(module));
        }
    }
    let mut found = false;
    for line in index.lines() {
        let Some((path, needs)) = line.split_once(':') else { continue };
        if !names.contains(&stem(path)) {
            continue;
        }
        for file in needs.split_whitespace().rev().chain([path]) {
            kernel::load(&folder.join(file)).with_context(|| format!("`{file}` was not loaded"))?;
        }
        found = true;
    }
    if !found {
        bail!("no module `{name}`");
    }
    Ok(())
}

/// A shell's pattern with `*` and `?`; sets of characters do not occur in what the kernel asks for here.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.first(), text.first()) {
        (None, None) => true,
        (Some(b'*'), _) => {
            glob(&pattern[1..], text) || (!text.is_empty() && glob(pattern, &text[1..]))
        }
        (Some(b'?'), Some(_)) => glob(&pattern[1..], &text[1..]),
        (Some(a), Some(b)) if a == b => glob(&pattern[1..], &text[1..]),
        _ => false,
    }
}

fn try_all() -> Result<()> {
    let none: Option<&str> = None;
    for (kind, at) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
    ] {
        fs::create_dir_all(at)?;
        mount(Some(kind), at, Some(kind), MsFlags::empty(), none)
            .with_context(|| format!("could not mount {at}"))?;
    }
    for folder in ["/dev/pts", "/run/bpf"] {
        fs::create_dir_all(folder)?;
    }
    let _ = mount(Some("devpts"), "/dev/pts", Some("devpts"), MsFlags::empty(), none);
    for (kind, at) in [
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
        ("bpf", "/run/bpf"),
        ("securityfs", "/sys/kernel/security"),
    ] {
        let _ = mount(Some(kind), at, Some(kind), MsFlags::empty(), none);
    }
    let text = fs::read_to_string("/truth/plan.json").context("no plan")?;
    let plan: Plan = serde_json::from_str(&text)?;
    let folder = modules();
    // Everything of one case begins with what was there at the start.
    let index = ["modules.dep", "modules.alias"];
    let whole: Vec<String> = index
        .iter()
        .map(|name| fs::read_to_string(folder.join(name)))
        .collect::<Result<_, _>>()
        .context("no index of modules")?;
    for case in &plan.cases {
        let mut found = Found { case: case.name.clone(), kernel: release(), ..Found::default() };
        if let Err(error) = try_one(case, &folder, &whole, &mut found) {
            found.broken = format!("{error:#}");
        }
        println!("{MARK}{}", serde_json::to_string(&found).expect("texts and numbers"));
    }
    Ok(())
}

fn try_one(case: &Case, folder: &Path, whole: &[String], found: &mut Found) -> Result<()> {
    fs::write("/proc/sys/kernel/modprobe", USUAL_MODPROBE)?;
    take_away(&case.remove, folder, whole)?;
    for (name, value) in &case.sysctl {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::write(&path, value).with_context(|| format!("could not set {name}"))?;
    }
    if let Some(modprobe) = &case.modprobe {
        // Loaded modules would hide what this means.
        unload(&|_| true, false)?;
        fs::write("/proc/sys/kernel/modprobe", format!("{modprobe}\n"))?;
    }
    let begun = Instant::now();
    let out = Command::new(QUALIFY)
        .args(["--autoload", "all", "--state", "/tmp", "--output", "json"])
        .stderr(Stdio::null())
        .output()
        .context("skerry-qualify did not start")?;
    found.qualify_ms = begun.elapsed().as_millis() as u64;
    found.peak_rss_kib = kernel::children_peak_rss_kib();
    let file: Value = serde_json::from_slice(&out.stdout).context("it wrote no report")?;
    found.checks = file["report"]["facts"].as_object().map_or(0, |facts| facts.len());
    for judged in file["report"]["profiles"].as_array().into_iter().flatten() {
        let profile = judged["profile"].as_str().unwrap_or_default().to_owned();
        let lacks: Vec<String> = judged["lacks"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|lack| lack["lost"].is_null())
            .flat_map(|lack| lack["checks"].as_array().cloned().unwrap_or_default())
            .filter_map(|id| {
                let id = id.as_str()?.to_owned();
                let fact = &file["report"]["facts"][&id];
                Some(format!("{id} {} ({})", fact["state"].as_str()?, fact["evidence"].as_str()?))
            })
            .collect();
        if case.paths.contains(&profile) {
            found.lacks.insert(profile.clone(), lacks.join("; "));
            let verdict = judged["verdict"].as_str().unwrap_or_default().to_owned();
            found.verdicts.insert(profile, verdict);
        }
    }
    if case.bpftool {
        beside_bpftool(&file, found).context("bpftool")?;
    }
    for profile in &case.paths {
        let out = Command::new("/bin/busybox")
            .args(["timeout", PATH_TIMEOUT, "/bin/busybox", "sh", "/truth/paths.sh", profile])
            .output()
            .context("no shell")?;
        let said = String::from_utf8_lossy(&out.stdout);
        let last = said.lines().last().unwrap_or_default().to_owned();
        let why = match (out.status.success(), last.is_empty()) {
            (true, _) => String::new(),
            (false, true) => {
                format!("{}: {}", out.status, String::from_utf8_lossy(&out.stderr).trim())
            }
            (false, false) => last,
        };
        found.paths.insert(profile.clone(), why);
    }
    Ok(())
}

/// Program and map types of the report beside those of `bpftool feature probe`, on the same kernel.
fn beside_bpftool(file: &Value, found: &mut Found) -> Result<()> {
    let out =
        Command::new("/usr/sbin/bpftool").args(["-j", "feature", "probe", "kernel"]).output()?;
    let theirs: Value = serde_json::from_slice(&out.stdout).context("no JSON")?;
    for (group, kind, ours) in
        [("program_types", "_prog_type", "bpf.prog."), ("map_types", "_map_type", "bpf.map.")]
    {
        for (name, has) in theirs[group].as_object().into_iter().flatten() {
            let name = name.trim_start_matches("have_").trim_end_matches(kind);
            let Some(fact) = file["report"]["facts"].get(format!("{ours}{name}")) else { continue };
            let state = fact["state"].as_str().unwrap_or_default();
            match (state == "present") == (*has == Value::Bool(true)) {
                true => found.bpftool_agrees += 1,
                false => {
                    found.bpftool_differs.push(format!("{ours}{name}: {state}, bpftool {has}"))
                }
            }
        }
    }
    Ok(())
}

/// Takes modules away, with all that depend on them: unloaded, out of the index, files aside; the others are put back.
fn take_away(remove: &[String], folder: &Path, whole: &[String]) -> Result<()> {
    let remove: BTreeSet<String> = remove.iter().map(|name| plain(name)).collect();
    let gone = |line: &str| {
        let Some((path, needs)) = line.split_once(':') else { return false };
        [path].into_iter().chain(needs.split_whitespace()).any(|file| remove.contains(&stem(file)))
    };
    let closure: BTreeSet<String> = whole[0]
        .lines()
        .filter(|line| gone(line))
        .filter_map(|line| Some(stem(line.split_once(':')?.0)))
        .collect();
    for name in &remove {
        if !closure.contains(name) {
            bail!("`{name}` is no module of this kernel");
        }
    }
    for line in whole[0].lines() {
        let Some((path, _)) = line.split_once(':') else { continue };
        let (file, aside) = (folder.join(path), folder.join(format!("{path}.aside")));
        match (closure.contains(&stem(path)), aside.exists()) {
            (true, false) => fs::rename(&file, &aside)?,
            (false, true) => fs::rename(&aside, &file)?,
            _ => {}
        }
    }
    let dep: String =
        whole[0].lines().filter(|line| !gone(line)).map(|line| format!("{line}\n")).collect();
    let alias: String = whole[1]
        .lines()
        .filter(|line| !closure.contains(&plain(line.rsplit(' ').next().unwrap_or_default())))
        .map(|line| format!("{line}\n"))
        .collect();
    fs::write(folder.join("modules.dep"), dep)?;
    fs::write(folder.join("modules.alias"), alias)?;
    unload(&|name| closure.contains(name), true)
}

/// Unloads what `wanted` says; with `all`, it is an error when one stays.
fn unload(wanted: &dyn Fn(&str) -> bool, all: bool) -> Result<()> {
    let begun = Instant::now();
    loop {
        let loaded = fs::read_to_string("/proc/modules")?;
        let left: Vec<String> = loaded
            .lines()
            .filter_map(|line| Some(plain(line.split(' ').next()?)))
            .filter(|name| wanted(name))
            .collect();
        let progress = left.iter().filter(|name| kernel::unload(name).is_ok()).count();
        if left.is_empty() || (progress == 0 && begun.elapsed() > BUSY_MAX) {
            if all && !left.is_empty() {
                bail!("in use: {}", left.join(", "));
            }
            return Ok(());
        }
        if progress == 0 {
            if !all {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}
