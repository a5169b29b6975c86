//! Asking the running kernel. The probes run in processes of their own, with a bound for each probe.
//!
//! The program starts itself again for each [`Part`] (`--probes net:0/4`); that child makes its namespaces, asks one
//! question after the other and writes one line before and one after each. A child that hangs or dies takes only the
//! probe with it that it was at; another goes on behind it. Everything made on the host goes with the child. Parts run
//! beside each other, because a probe waits most of its time: what the kernel takes down, it takes down after every
//! processor has been elsewhere for once.

mod bpf;
mod host;
mod net;
mod netlink;
mod sys;

use crate::judge::Seen;
use crate::table::{Check, Table};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longest time for one probe; under emulation one that loads a module takes a second.
pub const PROBE_BOUND: Duration = Duration::from_secs(15);
/// Most children that may die in one group before the rest of it is given up.
const DEATHS_MAX: usize = 8;

/// What runs alone, first: it measures the disk.
const FIRST: Part = Part::new("host", 0, 1);
/// What runs beside each other after it. Network probes take the longest by far, each part of them in a network namespace
/// of its own.
const REST: [Part; 6] = [
    Part::new("bpf", 0, 1),
    Part::new("fs", 0, 1),
    Part::new("net", 0, 4),
    Part::new("net", 1, 4),
    Part::new("net", 2, 4),
    Part::new("net", 3, 4),
];

/// Every `of`-th probe of a group, from the one at `index` on. As text: `net:1/4`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    group: &'static str,
    index: usize,
    of: usize,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}/{}", self.group, self.index, self.of)
    }
}

impl Part {
    const fn new(group: &'static str, index: usize, of: usize) -> Self {
        Self { group, index, of }
    }

    /// Reads one that [`run`] starts; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        [FIRST].into_iter().chain(REST).find(|part| part.to_string() == text)
    }

    /// Its checks, in the order in which they are tried.
    fn checks(self, table: &Table) -> impl Iterator<Item = (&Check, &[String])> {
        let group = table.checks.values().filter_map(move |check| {
            let words = check.probe.as_deref()?;
            (group_of(&words[0]) == self.group).then_some((check, words))
        });
        group.skip(self.index).step_by(self.of)
    }
}

/// Which probes may make the kernel load a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Autoload {
    /// Only what is loaded or built in is tried; the rest is judged by files.
    None,
    /// All but the modules that make devices in the host's own network namespace when loaded.
    Known,
    /// All: for the appliance and for a machine that is being tried out.
    All,
}

/// Modules that make `tunl0`, `sit0`, `bond0` and the like in the host's network namespace when they are loaded.
const MAKES_DEVICES: [&str; 8] = ["ipip", "sit", "gre", "ip6tnl", "dummy", "ifb", "bond", "vcan"];

/// How to ask.
#[derive(Debug, Clone)]
pub struct Plan {
    /// This program, and the arguments that make it the probing child.
    pub program: PathBuf,
    /// Arguments before `--probes`.
    pub prefix: Vec<String>,
    /// Which probes may load modules.
    pub autoload: Autoload,
    /// Folder whose disk is timed.
    pub state: PathBuf,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Found {
    /// By check id.
    pub seen: BTreeMap<String, Seen>,
    /// Measured values.
    pub measured: BTreeMap<String, f64>,
    /// Milliseconds of each probe.
    pub took_ms: BTreeMap<String, u64>,
}

/// One line of a probing child.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    /// A probe begins.
    Start(String),
    /// It ended: kind, evidence.
    Done(String, u8, String),
    /// It has nothing to say.
    Nothing(String),
    /// A measured value.
    Measured(String, f64),
}

/// Lets everything else on the machine go before the probes of this process.
pub fn give_way() {
    sys::give_way();
}

fn group_of(probe: &str) -> &'static str {
    match probe {
        "bpf-link" => "net",
        word if word.starts_with("bpf") || word.starts_with("btf") => "bpf",
        "mount" | "filesystem" | "overlay" | "device" | "device-mapper" | "dm-target"
        | "controller" | "cgroup-file" | "cgroup-attach" => "fs",
        "link" | "link-attribute" | "qdisc" | "filter" | "xdp" | "xdp-features" | "nfnetlink"
        | "conntrack" | "nft-chain" | "nft-expression" | "nft-compat" | "xt" | "ipset" | "genl"
        | "ipvs" | "rule" | "nexthop" | "managed-neighbour" | "socket" | "congestion" | "ulp"
        | "alg" => "net",
        _ => "host",
    }
}

/// Runs every probe of the table.
pub fn run(table: &Table, plan: &Plan, progress: &mut dyn FnMut(&str)) -> Found {
    progress(FIRST.group);
    let mut found = run_part(table, plan, FIRST);
    progress("bpf, fs, net");
    std::thread::scope(|scope| {
        let parts = REST.map(|part| scope.spawn(move || run_part(table, plan, part)));
        for part in parts {
            let more = part.join().expect("no probe runs in this process");
            found.seen.extend(more.seen);
            found.measured.extend(more.measured);
            found.took_ms.extend(more.took_ms);
        }
    });
    found
}

fn run_part(table: &Table, plan: &Plan, part: Part) -> Found {
    let mut found = Found::default();
    let mut after: Option<String> = None;
    for death in 0.. {
        match one_child(plan, part, after.as_deref(), &mut found) {
            Ending::Whole => break,
            Ending::At(id, why) if death < DEATHS_MAX => {
                found.seen.insert(id.clone(), Seen::Unclear(why));
                after = Some(id);
            }
            Ending::At(_, why) | Ending::Nowhere(why) => {
                for (check, _) in part.checks(table) {
                    let seen = Seen::Unclear(why.clone());
                    found.seen.entry(check.id.clone()).or_insert(seen);
                }
                break;
            }
        }
    }
    found
}

enum Ending {
    /// All its probes are done.
    Whole,
    /// It ended while it was at one.
    At(String, String),
    /// It ended before or between probes.
    Nowhere(String),
}

fn one_child(plan: &Plan, part: Part, after: Option<&str>, found: &mut Found) -> Ending {
    let mut command = Command::new(&plan.program);
    command.args(&plan.prefix).arg("--probes").arg(part.to_string());
    command.args(["--after", after.unwrap_or("")]).arg("--state").arg(&plan.state);
    let policy = match plan.autoload {
        Autoload::None => "none",
        Autoload::Known => "known",
        Autoload::All => "all",
    };
    command.args(["--autoload", policy]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            return Ending::Nowhere(format!("the probing process did not start: {error}"));
        }
    };
    let Some(stdout) = child.stdout.take() else { return Ending::Nowhere("no pipe".into()) };
    let mut lines = BufReader::new(stdout);
    let mut at: Option<(String, Instant)> = None;
    let ending = loop {
        // A line that was read ahead is in the buffer, where poll does not see it.
        if lines.buffer().is_empty()
            && !sys::readable(lines.get_ref(), PROBE_BOUND.as_millis() as i32)
        {
            break match at.take() {
                Some((id, _)) => {
                    Ending::At(id, format!("no answer within {} s", PROBE_BOUND.as_secs()))
                }
                None => Ending::Nowhere("the probing process hangs".into()),
            };
        }
        let mut line = String::new();
        match lines.read_line(&mut line) {
            Ok(0) | Err(_) => {
                let status = child.wait().map(|status| status.to_string()).unwrap_or_default();
                break match at.take() {
                    Some((id, _)) => Ending::At(id, format!("the probing process died: {status}")),
                    None if status == "exit status: 0" => Ending::Whole,
                    None => Ending::Nowhere(format!("the probing process died: {status}")),
                };
            }
            Ok(_) => {}
        }
        match serde_json::from_str(&line) {
            Ok(Line::Start(id)) => at = Some((id, Instant::now())),
            Ok(Line::Done(id, kind, evidence)) => {
                let took = at.take().map(|(_, since)| since.elapsed()).unwrap_or_default();
                found.took_ms.insert(id.clone(), took.as_millis() as u64);
                found.seen.insert(id, from_line(kind, evidence));
            }
            Ok(Line::Nothing(_)) => at = None,
            Ok(Line::Measured(name, value)) => {
                found.measured.insert(name, value);
            }
            Err(_) => {}
        }
    };
    let _ = child.kill();
    let _ = child.wait();
    ending
}

fn to_line(seen: Seen) -> (u8, String) {
    match seen {
        Seen::Works(text) => (0, text),
        Seen::Absent(text) => (1, text),
        Seen::TooOld(text) => (2, text),
        Seen::NotPermitted(text) => (3, text),
        Seen::Sysctl(text) => (4, text),
        Seen::Boot(text) => (5, text),
        Seen::NoDevice(text) => (6, text),
        Seen::Unclear(text) => (7, text),
    }
}

fn from_line(kind: u8, text: String) -> Seen {
    match kind {
        0 => Seen::Works(text),
        1 => Seen::Absent(text),
        2 => Seen::TooOld(text),
        3 => Seen::NotPermitted(text),
        4 => Seen::Sysctl(text),
        5 => Seen::Boot(text),
        6 => Seen::NoDevice(text),
        _ => Seen::Unclear(text),
    }
}

/// The probing child: runs the probes of a part that stand behind `after`.
pub fn child(table: &Table, part: Part, after: &str, autoload: Autoload, state: &Path) {
    sys::die_with_parent();
    let _ = sys::raise_memlock();
    let say = |line: &Line| {
        let mut text = serde_json::to_string(line).expect("texts and numbers only");
        text.push('\n');
        // A parent that went away ends us with a signal.
        let _ = std::io::stdout().lock().write_all(text.as_bytes());
    };
    let mut bench = Bench {
        place: None,
        loaded: Loaded::read(),
        autoload,
        state: state.into(),
        measured: BTreeMap::new(),
    };
    let namespace = (part.group == "net").then(|| {
        let cards = net::xdp_features();
        let made = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET);
        (cards, made.err().map(|errno| errno as i32))
    });
    for (check, words) in part.checks(table).filter(|(check, _)| check.id.as_str() > after) {
        say(&Line::Start(check.id.clone()));
        let seen = match &namespace {
            Some((cards, _)) if words[0] == "xdp-features" => Some(cards.clone()),
            Some((_, Some(errno))) if words[0] != "alg" => Some(Seen::NotPermitted(format!(
                "no network namespace: {}",
                sys::errno_text(*errno)
            ))),
            _ => bench.probe(check, words),
        };
        match seen {
            Some(seen) => {
                let (kind, text) = to_line(seen);
                say(&Line::Done(check.id.clone(), kind, text));
            }
            None => say(&Line::Nothing(check.id.clone())),
        }
    }
    for (name, value) in &bench.measured {
        say(&Line::Measured(name.clone(), *value));
    }
}

/// What is loaded or built in.
struct Loaded {
    names: Vec<String>,
    /// Nothing could be loaded at all: probing has no side effect.
    closed: bool,
}

impl Loaded {
    fn read() -> Self {
        let release = host::text("/proc/sys/kernel/osrelease").unwrap_or_default();
        let folder = Path::new("/lib/modules").join(release);
        let loaded = host::text("/proc/modules").unwrap_or_default();
        let builtin = std::fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
        let first = |line: &str| line.split_whitespace().next().unwrap_or_default().to_owned();
        let stem = |line: &str| {
            line.rsplit('/').next().unwrap_or_default().trim_end_matches(".ko").to_owned()
        };
        let names = loaded.lines().map(first).chain(builtin.lines().map(stem));
        Self { names: names.map(|name| name.replace('-', "_")).collect(), closed: !folder.exists() }
    }

    fn has(&self, module: &str) -> bool {
        self.names.iter().any(|name| *name == module.replace('-', "_"))
    }
}

/// The probing child's things.
struct Bench {
    place: Option<Result<host::Place, Seen>>,
    loaded: Loaded,
    autoload: Autoload,
    state: PathBuf,
    measured: BTreeMap<String, f64>,
}

impl Bench {
    /// One probe; nothing when it may not run or has nothing to say.
    fn probe(&mut self, check: &Check, words: &[String]) -> Option<Seen> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        if !self.loaded.closed
            && let Some(module) = check.module_name()
        {
            let makes_devices =
                matches!(words[..], ["link", kind] if MAKES_DEVICES.contains(&kind));
            let allowed = match self.autoload {
                Autoload::All => true,
                Autoload::Known => !makes_devices,
                Autoload::None => false,
            };
            if !allowed && !self.loaded.has(&module) {
                return None;
            }
        }
        let number = |text: &str| text.parse::<i64>().unwrap_or_default();
        Some(match words[..] {
            ["file", path] => host::file(path),
            ["sysctl", key, wanted] => host::sysctl(key, wanted),
            ["node-ports"] => host::node_ports(),
            ["namespace", name] => host::namespace(name),
            ["syscall", name] => host::system_call(name),
            ["seccomp", action] => host::seccomp(action),
            ["landlock"] => host::landlock(),
            ["lsm", name] => host::security_module(name),
            ["cgroup-v2"] => host::cgroup_v2(),
            ["class", name] => host::class(name),
            ["tpm"] => host::tpm(),
            ["entropy"] => host::entropy(),
            ["memory-errors"] => host::memory_errors(),
            ["clocksource"] => host::clocksource(),
            ["time-sync"] => host::time_sync(),
            ["taint"] => host::taint(),
            ["fsync"] => host::fsync(&self.state.clone(), &mut self.measured),
            ["secure-boot"] => host::secure_boot(),
            ["nic"] => host::nic(),
            ["nic-feature", name] => host::nic_feature(name),
            ["i2c"] => host::i2c(),
            ["spi"] => host::spi(),
            ["no-swap"] => host::no_swap(),

            ["bpf-map", name] => bpf::map(name),
            ["bpf-prog", name] => bpf::program(name),
            ["bpf-attach-type", name, attach] => bpf::attach_type(name, number(attach) as u32),
            ["bpf-helper", name, id] => bpf::helper(name, number(id) as i32),
            ["bpf-verify", name] => bpf::verify(name),
            ["bpf-run", name] => bpf::run(name),
            ["bpf-fib", flag] => bpf::fib(number(flag) as i32),
            ["bpf-jit"] => bpf::jit(),
            ["bpf-batch"] => bpf::batch(),
            ["bpf-cgroup-link"] => bpf::cgroup_link(),
            ["bpf-kfunc", ..] => {
                bpf::kfunc(&words[1..].iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
            }
            ["bpf-global-func"] => bpf::global_function(),
            ["btf"] => bpf::btf(),
            ["btf-load"] => bpf::btf_load(),

            ["mount", ..]
            | ["filesystem", _]
            | ["overlay", ..]
            | ["device", ..]
            | ["device-mapper"]
            | ["dm-target", _]
            | ["controller", _]
            | ["cgroup-file", ..]
            | ["cgroup-attach", _] => return self.in_place(&words),

            ["link", kind] => net::link(kind),
            ["link-attribute", kind] => net::link_attribute(number(kind) as u16),
            ["qdisc", kind] => net::qdisc(kind),
            ["filter", kind] => net::filter(kind),
            ["bpf-link", what] => net::bpf_link(what),
            ["xdp", what] => net::xdp(what),
            ["nfnetlink"] => net::nfnetlink(),
            ["conntrack"] => net::conntrack(),
            ["nft-chain", family, kind] => net::nft_chain(family, kind),
            ["nft-expression", name] => net::nft_expression(name),
            ["nft-compat", what, name, revision] => {
                match net::nft_compat(what == "target", name, number(revision) as u32) {
                    Ok(text) => Seen::Works(text),
                    Err(refused) if refused.errno == 1 => Seen::NotPermitted(refused.words()),
                    Err(refused) => Seen::Absent(refused.words()),
                }
            }
            ["xt", what, name, revision] => net::xt(what, name, number(revision) as u8),
            ["ipset"] => net::ipset(None),
            ["ipset", kind] => net::ipset(Some(kind)),
            ["genl", name] => net::generic(name),
            ["ipvs", scheduler] => net::ipvs(scheduler),
            ["rule", family] => net::rule(family),
            ["nexthop"] => net::nexthop(),
            ["managed-neighbour"] => net::managed_neighbour(),
            ["socket", family, kind, protocol] => {
                net::socket(family, kind, number(protocol) as i32)
            }
            ["congestion", name] => net::congestion(name),
            ["ulp", name] => net::upper_layer(name),
            ["alg", kind, name] => return net::algorithm(kind, name),
            _ => Seen::Unclear(format!("no probe `{}`", words.join(" "))),
        })
    }

    /// Probes that need the private place.
    fn in_place(&mut self, words: &[&str]) -> Option<Seen> {
        let place = match self.place.get_or_insert_with(host::Place::make) {
            Ok(place) => place,
            Err(seen) => return Some(seen.clone()),
        };
        let number = |text: &str| text.parse::<u64>().unwrap_or_default();
        Some(match words {
            ["mount", kind] => place.mounts(kind, None),
            ["mount", kind, options] => place.mounts(kind, Some(options)),
            ["filesystem", kind] => place.knows(kind),
            ["overlay"] => place.overlay(None),
            ["overlay", options] => place.overlay(Some(options)),
            ["device", path, major, minor] => place.device(path, number(major), number(minor)),
            ["device-mapper"] => place.device_mapper(None),
            ["dm-target", name] => place.device_mapper(Some(name)),
            ["controller", name] => host::controller(place, name),
            ["cgroup-file", controller, name] => return host::cgroup_file(place, controller, name),
            ["cgroup-attach", _] => host::cgroup_attach(place),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_share_all_probes_among_themselves() {
        let table = Table::built_in();
        let all = table.checks.values().filter(|check| check.probe.is_some());
        let all: Vec<&str> = all.map(|check| check.id.as_str()).collect();
        let mut parts: Vec<&str> = [FIRST]
            .into_iter()
            .chain(REST)
            .inspect(|part| assert_eq!(Part::parse(&part.to_string()), Some(*part)))
            .flat_map(|part| part.checks(&table).map(|(check, _)| check.id.as_str()))
            .collect();
        parts.sort_unstable();
        assert_eq!(parts, all);
        assert_eq!(Part::parse("net:4/4"), None);
    }
}
