//! Qualifying the running machine: its configuration, its modules, its settings, and every probe.

use crate::judge::Evidence;
use crate::kconfig::{Config, Release};
use crate::modules::Modules;
use crate::probe::{self, Plan};
use crate::report::{self, Mode, Report, Subject, Volatile};
use crate::table::Table;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

fn text(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Where the configuration of a running kernel is looked for, in this order.
fn config_places(release: &str) -> Vec<PathBuf> {
    let modules = |name: &str| format!("/lib/modules/{release}/{name}");
    let places = [
        "/proc/config.gz".to_owned(),
        format!("/boot/config-{release}"),
        format!("/usr/lib/modules/{release}/config"),
        modules("config"),
        format!("/usr/lib/kernel/config-{release}"),
        format!("/usr/lib/ostree-boot/config-{release}"),
        format!("/usr/src/linux-headers-{release}/.config"),
        modules("build/.config"),
        format!("/usr/src/linux-{release}/.config"),
    ];
    places.into_iter().map(PathBuf::from).collect()
}

/// Why no module can be loaded at all, if so.
fn modules_denied() -> Option<String> {
    if text("/proc/sys/kernel/modules_disabled").as_deref() == Some("1") {
        return Some("kernel.modules_disabled is 1".into());
    }
    let modprobe = text("/proc/sys/kernel/modprobe")?;
    if modprobe.is_empty() {
        return Some("kernel.modprobe is empty".into());
    }
    (!Path::new(&modprobe).exists()).then(|| format!("{modprobe} (kernel.modprobe) is not there"))
}

fn loaded() -> BTreeSet<String> {
    let list = text("/proc/modules").unwrap_or_default();
    list.lines().filter_map(|line| line.split_whitespace().next()).map(Into::into).collect()
}

/// Qualifies the machine that this runs on. `modules` instead of `/lib/modules/<release>`.
pub fn qualify(table: &Table, plan: &Plan, modules: Option<Modules>) -> (Report, Volatile) {
    let start = Instant::now();
    let release = text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let config = config_places(&release).into_iter().find_map(|place| {
        // A damaged one counts as none: the next place may have a good one.
        std::fs::read(place).ok().and_then(|bytes| Config::read(&bytes).ok())
    });
    let modules = modules.or_else(|| Modules::read(&Path::new("/lib/modules").join(&release)).ok());
    let before = loaded();
    let found = probe::run(table, plan, &mut |group| {
        // Two seconds are the bound of a good run; people see where a longer one is.
        if start.elapsed().as_secs() >= 2 {
            eprintln!("asking: {group}");
        }
    });
    let arch = match std::env::consts::ARCH {
        "aarch64" => "arm64",
        other => other,
    };
    let settings = config.as_ref().map(|config| {
        let lines: String =
            config.symbols().map(|(name, value)| format!("{name}={value}\n")).collect();
        report::digest(lines.as_bytes())
    });
    let evidence = Evidence {
        config,
        modules,
        release: Release::parse(&release),
        arch: Some(arch.into()),
        seen: found.seen,
        modules_denied: modules_denied(),
    };
    let image = text("/etc/os-release").and_then(|lines| {
        let version = lines.lines().find_map(|line| line.strip_prefix("IMAGE_VERSION="))?;
        Some(version.trim_matches('"').to_owned())
    });
    let subject = Subject {
        name: text("/proc/sys/kernel/hostname").unwrap_or_default(),
        kernel: release,
        arch: arch.into(),
        config_digest: settings,
        cmdline: text("/proc/cmdline"),
        image,
    };
    let report = Report::new(table, &evidence, Mode::Live, subject);
    let mut slowest: Vec<_> = found.took_ms.into_iter().collect();
    slowest.sort_by_key(|(_, ms)| std::cmp::Reverse(*ms));
    slowest.truncate(5);
    let volatile = Volatile {
        at_s: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map(|since| since.as_secs())
            .unwrap_or(0),
        duration_ms: start.elapsed().as_millis() as u64,
        boot_id: text("/proc/sys/kernel/random/boot_id"),
        modules_loaded: loaded().difference(&before).cloned().collect(),
        measured: found.measured,
        slowest_ms: slowest.into_iter().collect(),
    };
    (report, volatile)
}
