//! What a machine is to try, shared by the driver and by PID 1 of the machine.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The cases of one boot.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// In order.
    pub(crate) cases: Vec<Case>,
}

/// What is taken away from the kernel, and which data paths are tried then.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Case {
    /// For people.
    pub(crate) name: String,
    /// Modules that are not there.
    pub(crate) remove: Vec<String>,
    /// Settings before the report is made.
    pub(crate) sysctl: BTreeMap<String, String>,
    /// `kernel.modprobe`, when it is not the usual one.
    pub(crate) modprobe: Option<String>,
    /// Boot options; such a case has a boot of its own.
    pub(crate) cmdline: Option<String>,
    /// `bpftool feature probe` is asked as well.
    pub(crate) bpftool: bool,
    /// Profiles whose data path is tried.
    pub(crate) paths: Vec<String>,
}

/// What a machine found in one case; one line of its console, behind [`MARK`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Found {
    /// [`Case::name`].
    pub(crate) case: String,
    /// `uname -r`.
    pub(crate) kernel: String,
    /// What kept the case from being tried.
    pub(crate) broken: String,
    /// By profile.
    pub(crate) verdicts: BTreeMap<String, String>,
    /// By profile: empty when traffic went through, else why not.
    pub(crate) paths: BTreeMap<String, String>,
    /// The checks that decide a verdict which is not "qualified", by profile.
    pub(crate) lacks: BTreeMap<String, String>,
    /// What `bpftool feature probe` says otherwise than the report, and what both were asked.
    pub(crate) bpftool_differs: Vec<String>,
    /// How many features both were asked for.
    pub(crate) bpftool_agrees: usize,
    /// How long the report took.
    pub(crate) qualify_ms: u64,
    /// Its checks.
    pub(crate) checks: usize,
    /// Most memory that a process of it had at once.
    pub(crate) peak_rss_kib: u64,
}

/// What a line with a [`Found`] begins with.
pub(crate) const MARK: &str = "TRUTH ";
/// The last line of a machine that has tried everything.
pub(crate) const END: &str = "TRUTH-END";
