//! The verdicts over every kernel in `tests/kernels/`, kept with their reasons in `tests/verdicts.txt`.
//!
//! A change of the table that changes a verdict shows here; `BLESS=1` writes the file anew, and the difference is for
//! a person to read.

use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Output};

fn qualify(args: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_skerry-qualify");
    Command::new(program).args(args).output().expect("the program starts")
}

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernels"))
}

#[test]
fn the_verdicts_over_all_kernels_are_the_kept_ones() {
    let mut names: Vec<_> = std::fs::read_dir(folder())
        .expect("folder")
        .map(|entry| entry.expect("entry").file_name().into_string().expect("name"))
        .filter(|name| name.ends_with(".gz"))
        .collect();
    names.sort();
    assert_eq!(names.len(), 24, "kernels are missing");
    let mut verdicts = String::new();
    for name in names {
        let file = folder().join(&name);
        let out = qualify(&["--config", &file.display().to_string()]);
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        let _ = writeln!(verdicts, "# {name}\n{}", String::from_utf8_lossy(&out.stdout));
    }
    let kept = folder().with_file_name("verdicts.txt");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&kept, &verdicts).expect("written");
    }
    let known = std::fs::read_to_string(&kept).unwrap_or_default();
    let differs = known.lines().zip(verdicts.lines()).enumerate().find(|(_, (a, b))| a != b);
    if let Some((line, (before, after))) = differs {
        panic!(
            "line {} of verdicts.txt\n  was {before}\n  is  {after}\nhint: BLESS=1 writes it anew",
            line + 1
        );
    }
    assert_eq!(known.lines().count(), verdicts.lines().count(), "hint: BLESS=1 writes it anew");
}

#[test]
fn what_the_published_verdicts_say_holds() {
    let verdict = |kernel: &str, profile: &str| {
        let file = folder().join(kernel);
        let out = qualify(&["--config", &file.display().to_string(), "--output", "json"]);
        let report: serde_json::Value = serde_json::from_slice(&out.stdout).expect("report");
        let own = report["report"]["profiles"]
            .as_array()
            .expect("profiles")
            .iter()
            .find(|p| p["profile"] == profile);
        own.expect("profile")["verdict"].as_str().expect("verdict").to_owned()
    };
    let debian13 = "debian13-6.12.117-amd64.config.gz";
    let microvm = "microvm-guest-6.18.44-x86_64.config.gz";
    let talos = "talos-6.18.45-amd64.config.gz";
    for (kernel, profile, expected) in [
        (debian13, "cilium", "qualified"),
        (debian13, "appliance", "qualified"),
        (debian13, "gateway", "qualified"),
        (microvm, "cilium-vxlan", "qualified"),
        (microvm, "cilium-wireguard", "unsupported"),
        (microvm, "cilium-bandwidth", "unsupported"),
        (microvm, "kube-router", "unsupported"),
        (talos, "iptables-legacy", "unsupported"),
        (talos, "iptables-nft", "qualified"),
        (talos, "appliance", "unsupported"),
        ("debian12-6.1.0-56-cloud-amd64.config.gz", "cilium-netkit", "unsupported"),
        ("firecracker-6.18-x86_64.config.gz", "cilium", "unsupported"),
        ("firecracker-6.18-x86_64.config.gz", "kube-proxy-iptables", "unsupported"),
        ("azurelinux3-kernel-uvm-x86_64.config.gz", "flannel-vxlan", "unsupported"),
        ("azurelinux3-kernel-uvm-x86_64.config.gz", "flannel-host-gw", "qualified"),
        ("openwrt-derived-6.12-x86_64.config.gz", "containerd", "unsupported"),
    ] {
        assert_eq!(verdict(kernel, profile), expected, "{profile} on {kernel}");
    }
}

#[test]
fn two_runs_give_the_same_bytes() {
    let file = folder().join("talos-6.18.45-arm64.config.gz").display().to_string();
    for form in ["json", "html", "text"] {
        let run = || qualify(&["--config", &file, "--output", form]).stdout;
        assert_eq!(run(), run());
    }
}

#[test]
fn a_kernel_that_lost_a_feature_is_a_regression() {
    let old = folder().join("debian13-6.12.117-amd64.config.gz").display().to_string();
    let new = folder().join("debian13-6.12.117-cloud-amd64.config.gz").display().to_string();
    let out = qualify(&["diff", &old, &new]);
    let text = String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert!(text.contains("dev.i2c") && text.contains("worse"), "{text}");
    let same = qualify(&["diff", &old, &old]);
    assert_eq!(same.status.code(), Some(0));
}

#[test]
fn wrong_input_is_told_and_never_a_verdict() {
    let folder = tempfile::tempdir().expect("folder");
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        path.display().to_string()
    };
    let whole =
        std::fs::read(self::folder().join("talos-6.18.45-amd64.config.gz")).expect("kernel");
    for (path, word) in [
        (file("cut.gz", &whole[..whole.len() / 2]), "unpack"),
        (file("text", b"hello\n"), "no kernel configuration"),
        (file("empty", b""), "no kernel configuration"),
        ("/nowhere/config".into(), "could not read"),
    ] {
        let out = qualify(&["--config", &path]);
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{path}");
        assert!(text.contains(word) && out.stdout.is_empty(), "{text}");
    }
    let out = qualify(&["--config", &file("c", b"CONFIG_A=y\n"), "--require", "cilum"]);
    assert!(String::from_utf8_lossy(&out.stderr).contains("no profile `cilum`"));
    // An old kernel: nothing of eBPF, and nobody says "qualified".
    let old = file("old", b"# Automatically generated make config: don't edit\n# Linux kernel version: 2.6.32\n# Automatically generated file\nCONFIG_NET=y\n");
    let out = qualify(&["--config", &old, "--kernel-version", "2.6.32", "--require", "containerd"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(!String::from_utf8_lossy(&out.stdout).contains(" qualified"));
}
