//! The report: JSON with a stable and a volatile part, a table for people, one HTML page, and the difference of two.
//!
//! The stable part says what the box is and can do, and is byte for byte the same at each run on an unchanged box; what
//! changes from run to run (times, counters) stands apart.

use crate::judge::{self, Advice, Evidence, Fact, Judgement, Lack, State, Verdict};
use crate::sign::Signature;
use crate::table::{Check, Table};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Version of the report's form.
pub const API_VERSION: &str = "qualify.skerry.dev/v1alpha1";

/// How the evidence was gathered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// On the running machine.
    Live,
    /// From files only.
    Static,
}

/// What was judged.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Subject {
    /// Host name, or the name of the file.
    pub name: String,
    /// Release of the kernel, whole (`uname -r`).
    pub kernel: String,
    /// Machine.
    pub arch: String,
    /// SHA-256 of the configuration's settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config_digest: Option<String>,
    /// Boot options.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Version of the appliance's image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

/// What changes from run to run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Volatile {
    /// Seconds since 1970.
    pub at_s: u64,
    /// How long it took.
    pub duration_ms: u64,
    /// Boot id of the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// Modules that the probes made the kernel load.
    pub modules_loaded: Vec<String>,
    /// Measured values by name: `fsync_p99_us`.
    pub measured: BTreeMap<String, f64>,
    /// Longest probes, milliseconds.
    pub slowest_ms: BTreeMap<String, u64>,
}

/// The stable part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// [`API_VERSION`].
    pub api_version: String,
    /// `QualificationReport`.
    pub kind: String,
    /// Release of the rules.
    pub rules: String,
    /// How the evidence was gathered.
    pub mode: Mode,
    /// What was judged.
    pub subject: Subject,
    /// Verdicts.
    pub profiles: Vec<Judgement>,
    /// What to run.
    pub advice: Advice,
    /// Every check.
    pub facts: BTreeMap<String, Fact>,
}

/// A file with a report: the stable part, and what changed from run to run beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct File {
    /// The stable part.
    pub report: Report,
    /// SHA-256 of the stable part's JSON.
    pub digest: String,
    /// The volatile part, when it was tried on a machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volatile: Option<Volatile>,
    /// Of the node that was judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<Signature>,
}

impl File {
    /// The whole file.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report has only texts as keys") + "\n"
    }
}

impl Report {
    /// Judges everything.
    pub fn new(table: &Table, evidence: &Evidence, mode: Mode, subject: Subject) -> Self {
        let facts = evidence.facts(table);
        let arch = evidence.arch.as_deref();
        let profiles = judge::judge_all(table, &facts, evidence.release, arch);
        let advice = judge::advise(table, &profiles);
        Self {
            api_version: API_VERSION.into(),
            kind: "QualificationReport".into(),
            rules: table.release.clone(),
            mode,
            subject,
            profiles,
            advice,
            facts,
        }
    }

    /// The stable part as JSON: keys sorted where they are data, in the order of the form where they are fields.
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report has only texts as keys") + "\n"
    }

    /// The whole file: stable part, its digest, volatile part.
    pub fn json_with(&self, volatile: Option<&Volatile>) -> String {
        let file = File {
            report: self.clone(),
            digest: self.digest(),
            volatile: volatile.cloned(),
            signature: None,
        };
        file.json()
    }

    /// SHA-256 of [`Self::json`], `sha256:<hex>`; what a signature is over.
    pub fn digest(&self) -> String {
        digest(self.json().as_bytes())
    }

    /// The verdict over a profile.
    pub fn verdict(&self, profile: &str) -> Option<Verdict> {
        self.profiles.iter().find(|own| own.profile == profile).map(|own| own.verdict)
    }

    /// How many checks are in each state, in the order of [`State`].
    pub fn counts(&self) -> BTreeMap<State, usize> {
        let mut counts = BTreeMap::new();
        for fact in self.facts.values() {
            *counts.entry(fact.state).or_default() += 1;
        }
        counts
    }

    /// The table for people, without colour.
    pub fn text(&self, table: &Table) -> String {
        let mut out = String::new();
        let how = match self.mode {
            Mode::Live => "tried on the running machine",
            Mode::Static => "read from files, nothing was tried",
        };
        let (name, kernel, arch) = (&self.subject.name, &self.subject.kernel, &self.subject.arch);
        let _ = writeln!(out, "{name}: Linux {kernel}, {arch} ({how})\n");
        let width = self.profiles.iter().map(|j| j.title.len()).max().unwrap_or(0);
        let _ = writeln!(out, "{:<width$}  {:<11}  WHY", "PROFILE", "VERDICT");
        for judgement in &self.profiles {
            let why = reason(judgement);
            let line =
                format!("{:<width$}  {:<11}  {why}", judgement.title, judgement.verdict.words());
            let _ = writeln!(out, "{}", line.trim_end());
        }
        out.push('\n');
        let advice = &self.advice;
        match &advice.cni {
            Some(cni) => {
                let title = |id: &String| {
                    table.profile(id).map_or(id.as_str(), |p| p.title.as_str()).to_owned()
                };
                let proxy = advice.proxy.as_ref().map(|p| format!(", services by {}", title(p)));
                let _ = writeln!(out, "Advice: {}{}", title(cni), proxy.unwrap_or_default());
            }
            None => out.push_str("Advice: no network plugin runs here\n"),
        }
        for lost in &advice.lost {
            let _ = writeln!(out, "  without {lost}");
        }
        let remedies = self.remedies(table);
        if !remedies.is_empty() {
            out.push_str("\nTo get more out of this box:\n");
            for remedy in remedies {
                let _ = writeln!(out, "  {remedy}");
            }
        }
        let counts = self.counts();
        let counts: Vec<_> =
            counts.iter().map(|(state, n)| format!("{n} {}", state.words())).collect();
        let _ = writeln!(out, "\n{} checks: {}", self.facts.len(), counts.join(", "));
        out
    }

    /// What would change a verdict, smallest change first; one line each.
    pub fn remedies(&self, table: &Table) -> Vec<String> {
        let mut of: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for judgement in &self.profiles {
            for id in judgement.lacks.iter().flat_map(|lack| &lack.checks) {
                let profiles = of.entry(id).or_default();
                if !profiles.contains(&judgement.profile.as_str()) {
                    profiles.push(&judgement.profile);
                }
            }
        }
        let mut lines: Vec<(u8, String, String)> = Vec::new();
        for (id, profiles) in of {
            let (Some(fact), Some(check)) = (self.facts.get(id), table.checks.get(id)) else {
                continue;
            };
            let Some((cost, what)) = remedy(check, fact.state) else { continue };
            let names = match profiles.as_slice() {
                few if few.len() <= 3 => few.join(", "),
                many => format!("{} and {} more", many[..2].join(", "), many.len() - 2),
            };
            lines.push((
                cost,
                what.clone(),
                format!("{} ({}): {what}; for {names}", check.what, fact.state.words()),
            ));
        }
        lines.sort();
        lines.dedup_by(|a, b| a.2 == b.2);
        lines.into_iter().map(|(_, _, line)| line).collect()
    }

    /// The smallest change that helps a profile which is not qualified; its needs come first.
    pub fn hint(&self, table: &Table, judgement: &Judgement) -> Option<String> {
        let of = |lack: &Lack| {
            let remedies = lack
                .checks
                .iter()
                .filter_map(|id| remedy(table.checks.get(id)?, self.facts.get(id)?.state));
            remedies.min()
        };
        let (needs, wants): (Vec<&Lack>, Vec<&Lack>) =
            judgement.lacks.iter().partition(|lack| lack.lost.is_none());
        let first = |lacks: Vec<&Lack>| lacks.into_iter().filter_map(of).min();
        first(needs).or_else(|| first(wants)).map(|(_, what)| what)
    }

    /// One page that needs nothing else.
    pub fn html(&self, table: &Table, volatile: Option<&Volatile>) -> String {
        let mut rows = String::new();
        for judgement in &self.profiles {
            let class = judgement.verdict.words();
            let _ = writeln!(
                rows,
                "<tr class=\"{}\"><td>{}</td><td class=\"v {class}\">{class}</td><td>{}</td></tr>",
                if !judgement.part_of.is_empty() { "part" } else { "" },
                escape(&judgement.title),
                escape(&reason(judgement)),
            );
        }
        let mut facts = String::new();
        for (id, fact) in &self.facts {
            let what = table.checks.get(id).map_or("", |check| check.what.as_str());
            let _ = writeln!(
                facts,
                "<tr><td><code>{}</code></td><td>{}</td><td>{}</td><td>{}</td></tr>",
                escape(id),
                escape(what),
                fact.state.words(),
                escape(&fact.evidence)
            );
        }
        let list = |lines: Vec<String>| {
            lines.iter().map(|line| format!("<li>{}</li>", escape(line))).collect::<String>()
        };
        let advice =
            self.advice.cni.clone().unwrap_or_else(|| "no network plugin runs here".into());
        let proxy =
            self.advice.proxy.as_ref().map(|p| format!(", services by {p}")).unwrap_or_default();
        let lost = list(self.advice.lost.iter().map(|lost| format!("without {lost}")).collect());
        let run = volatile.map(|v| format!("<p>{} ms.</p>", v.duration_ms)).unwrap_or_default();
        let subject = &self.subject;
        format!(
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
             <title>Qualification of {name}</title><style>{STYLE}</style>\
             <h1>{name}</h1><p>Linux {kernel}, {arch}, {mode}; rules {rules}; report {digest}</p>\
             <h2>Advice</h2><p><b>{advice}</b>{proxy}</p><ul>{lost}</ul>\
             <h2>Profiles</h2><table><tr><th>Profile<th>Verdict<th>Why</tr>{rows}</table>\
             <h2>To get more out of this box</h2><ul>{remedies}</ul>{run}\
             <details><summary>All {count} checks</summary><table><tr><th>Check<th>What<th>State<th>Evidence</tr>{facts}</table></details></html>\n",
            name = escape(&subject.name),
            kernel = escape(&subject.kernel),
            arch = escape(&subject.arch),
            mode = if self.mode == Mode::Live {
                "tried on the running machine"
            } else {
                "read from files"
            },
            rules = escape(&self.rules),
            digest = &self.digest()[..23],
            remedies = list(self.remedies(table)),
            count = self.facts.len(),
            advice = escape(&advice),
            proxy = escape(&proxy),
        )
    }
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#1b1f24;background:#fff}\
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25em .6em;border-bottom:1px solid #d8dee4;vertical-align:top}\
.v{font-weight:600;white-space:nowrap}.qualified{color:#1a7f37}.degraded{color:#9a6700}.unsupported{color:#cf222e}.unknown{color:#57606a}\
.part td:first-child{padding-left:1.6em}code{font-size:13px}\
@media(prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}td,th{border-color:#30363d}.qualified{color:#3fb950}.degraded{color:#d29922}.unsupported{color:#f85149}.unknown{color:#8b949e}}";

/// `sha256:<hex>` of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    let mut hex = String::from("sha256:");
    for byte in Sha256::digest(bytes) {
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// What would make a check good, with how much of a change that is; nothing when it is good or nobody knows.
fn remedy(check: &Check, state: State) -> Option<(u8, String)> {
    let symbols = check.config.as_ref().map(|expr| expr.to_string());
    let built = symbols.map(|symbols| format!("a kernel with {symbols}"));
    let module = check.module_name().map(|name| format!("the package with module {name}"));
    let (cost, what) = match state {
        State::Present | State::Unloaded | State::NotJudged => return None,
        State::DisabledBySysctl => (0, check.hint.clone()),
        State::DisabledAtBoot => (1, check.hint.clone().or(Some("another boot option".into()))),
        State::ModuleDenied => (2, Some("allow modules to be loaded".into())),
        State::ModuleMissing => (3, module.or(built)),
        State::Missing => (4, check.hint.clone().or(built)),
        State::TooOld => (5, check.since.map(|since| format!("a kernel from {since} on"))),
        State::NotPermitted => (6, Some("run again as root, outside a container".into())),
        State::Unknown => (7, Some("run again on the machine itself".into())),
    };
    Some((cost, what?))
}

/// Why a verdict is not "qualified", in one line.
pub(crate) fn reason(judgement: &Judgement) -> String {
    let mut parts: Vec<String> = judgement.notes.clone();
    let (needs, wants): (Vec<&Lack>, Vec<&Lack>) =
        judgement.lacks.iter().partition(|lack| lack.lost.is_none());
    let mut ids: Vec<String> = Vec::new();
    for lack in &needs {
        for id in &lack.checks {
            let text = format!("{id} {}", lack.state.words());
            if !ids.contains(&text) {
                ids.push(text);
            }
        }
    }
    const SHOWN: usize = 4;
    let more = ids.len().saturating_sub(SHOWN);
    ids.truncate(SHOWN);
    parts.extend(ids);
    if more > 0 {
        parts.push(format!("{more} more"));
    }
    if needs.is_empty() && !wants.is_empty() {
        let lost: Vec<&str> = wants.iter().filter_map(|lack| lack.lost.as_deref()).collect();
        parts.push(format!("without {}", lost.join("; without ")));
    }
    parts.join("; ")
}

/// One difference between two reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    /// `profile` or `check`.
    pub of: &'static str,
    /// Which one.
    pub id: String,
    /// In the first report.
    pub before: String,
    /// In the second.
    pub after: String,
    /// It got worse.
    pub regression: bool,
}

/// The differences from `before` to `after`: profiles first, regressions first.
pub fn diff(before: &Report, after: &Report) -> Vec<Change> {
    let mut changes = Vec::new();
    for old in &before.profiles {
        let Some(new) = after.profiles.iter().find(|new| new.profile == old.profile) else {
            continue;
        };
        if old.verdict != new.verdict {
            changes.push(Change {
                of: "profile",
                id: old.profile.clone(),
                before: old.verdict.words().into(),
                after: new.verdict.words().into(),
                regression: new.verdict > old.verdict,
            });
        }
    }
    for (id, old) in &before.facts {
        let Some(new) = after.facts.get(id) else { continue };
        // Loaded or loadable is the same to whoever asks.
        if old.state != new.state && !(old.state.good() && new.state.good()) {
            changes.push(Change {
                of: "check",
                id: id.clone(),
                before: old.state.words().into(),
                after: new.state.words().into(),
                regression: old.state.good(),
            });
        }
    }
    changes.sort_by_key(|change| (change.of != "profile", !change.regression));
    changes
}

/// What `after` lacks of what these profiles need or want and had in `before`: their verdicts that got worse, and the
/// checks that decide them. Nothing: a kernel can be replaced by the other where these profiles run.
pub fn lost(table: &Table, before: &Report, after: &Report, profiles: &[String]) -> Vec<Change> {
    let needed = |id: &str| {
        profiles.iter().filter_map(|profile| table.profile(profile)).any(|profile| {
            let wants = profile.wants.iter().map(|want| &want.expr);
            profile.needs.iter().chain(wants).any(|expr| expr.names().contains(&id))
        })
    };
    diff(before, after)
        .into_iter()
        .filter(|change| change.regression)
        .filter(|change| match change.of {
            "profile" => profiles.contains(&change.id),
            _ => needed(&change.id),
        })
        .collect()
}
