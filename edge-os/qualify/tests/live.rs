//! The probes on the machine that runs the tests: they tell the truth that the tests can see, and leave nothing behind.

use serde_json::Value;
use std::collections::BTreeSet;
use std::process::{Command, Output};

fn qualify(args: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_skerry-qualify");
    Command::new(program).args(args).output().expect("the program starts")
}

fn report(args: &[&str]) -> Value {
    let out = qualify(&[args, &["--output", "json"]].concat());
    serde_json::from_slice(&out.stdout).expect("a report")
}

fn state<'a>(report: &'a Value, id: &str) -> &'a str {
    report["report"]["facts"][id]["state"].as_str().unwrap_or_default()
}

/// What a run could leave behind: interfaces, mounts, cgroups, and BPF programs.
fn traces() -> [BTreeSet<String>; 4] {
    let names = |folder: &str| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect::<BTreeSet<_>>()
    };
    let lines = |path: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().map(Into::into).collect::<BTreeSet<String>>()
    };
    let ours =
        |names: BTreeSet<String>| names.into_iter().filter(|name| name.contains("kq")).collect();
    let groups = names("/sys/fs/cgroup").into_iter().chain(names("/sys/fs/cgroup/unified"));
    let groups = groups.filter(|name| name.starts_with("skerry-qualify-")).collect();
    [
        ours(names("/sys/class/net")),
        ours(lines("/proc/self/mounts")),
        groups,
        ours(names("/sys/fs/bpf")),
    ]
}

#[test]
fn what_surely_works_here_is_present_and_what_cannot_be_is_not() {
    let report = report(&[]);
    for id in ["base.epoll", "base.proc", "ns.mnt", "base.unix", "base.inet"] {
        // Without rights nothing is proven, and nothing is called missing.
        assert!(
            ["present", "not_permitted"].contains(&state(&report, id)),
            "{id} is {}",
            state(&report, id)
        );
    }
    let facts = report["report"]["facts"].as_object().expect("facts");
    assert!(facts.len() >= 150, "{} checks", facts.len());
    let unclear: Vec<_> = facts
        .iter()
        .filter(|(_, fact)| fact["state"] == "unknown")
        .map(|(id, fact)| format!("{id}: {}", fact["evidence"]))
        .collect();
    assert!(unclear.len() < 15, "{unclear:#?}");
    let root = nix::unistd::geteuid().is_root();
    let hangs = unclear.iter().filter(|line| line.contains("no answer") || line.contains("died"));
    assert!(!root || hangs.count() == 0, "{unclear:#?}");
}

#[test]
fn two_runs_agree_byte_for_byte_and_leave_nothing() {
    let before = traces();
    let (first, second) = (report(&[]), report(&[]));
    // What depends on the moment: the clock's discipline and the disk's speed.
    let stable = |report: &Value| {
        let mut facts = report["report"]["facts"].clone();
        for moment in ["hw.time-sync", "hw.fsync", "hw.entropy"] {
            facts.as_object_mut().expect("facts").remove(moment);
        }
        facts
    };
    assert_eq!(stable(&first), stable(&second));
    assert_eq!(traces(), before);
}

#[test]
fn without_rights_nothing_is_called_missing_that_needs_them() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    // As nobody, with the program where nobody can reach it.
    let folder = tempfile::Builder::new().permissions(open()).tempdir().expect("folder");
    let program = folder.path().join("skerry-qualify");
    std::fs::copy(env!("CARGO_BIN_EXE_skerry-qualify"), &program).expect("copied");
    let out = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .args(["--output", "json"])
        .current_dir("/")
        .output()
        .expect("setpriv starts");
    let report: Value = serde_json::from_slice(&out.stdout).expect("a report");
    for id in ["bpf.map.hash", "bpf.prog.sched_cls", "link.veth", "tc.clsact", "fs.overlay"] {
        assert_eq!(state(&report, id), "not_permitted", "{id}: {}", report["report"]["facts"][id]);
    }
    let verdicts = report["report"]["profiles"].as_array().expect("profiles");
    let cilium = verdicts.iter().find(|own| own["profile"] == "cilium").expect("cilium");
    assert_eq!(cilium["verdict"], "unknown");
}

fn open() -> std::fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    std::fs::Permissions::from_mode(0o755)
}

#[test]
fn a_killed_run_leaves_nothing_either() {
    let before = traces();
    let program = env!("CARGO_BIN_EXE_skerry-qualify");
    for wait_ms in [30, 120, 400] {
        let mut child = Command::new(program)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("the program starts");
        // Not a wait for a state: the kill has to fall into the middle of the run.
        std::thread::sleep(std::time::Duration::from_millis(wait_ms));
        let _ = child.kill();
        let _ = child.wait();
    }
    // The next run removes the group that a killed one may have left.
    let _ = report(&[]);
    assert_eq!(traces(), before);
}
