//! What of a report goes to the cluster: labels, annotations and a condition of the Node, and the object beside it.
//!
//! Pure. EdgeCore is the caller, once per kernel; every cluster takes the Node's parts, the object only goes to a hub that
//! knows it. Labels always have a value and never go away: a cloud of KubeEdge merges what a node sends and deletes nothing.
//!
//! Facts: kubernetes-sigs/node-feature-discovery, docs/usage/features.md (names of the kernel's labels); Kubernetes' rules
//! of label values.

use crate::judge::{Advice, Verdict};
use crate::report::{Mode, Report, Volatile, reason};
use crate::sign::Signature;
use crate::table::Table;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Domain of our labels and annotations.
pub const PREFIX: &str = "qualification.skerry.dev";
/// Domain of labels that other tools read as well.
pub const FEATURE_PREFIX: &str = "feature.node.kubernetes.io";
/// Type of the Node's condition.
pub const CONDITION: &str = "KernelQualified";
/// Annotation that a person sets, to any new value, to have the node judged again.
pub const REQUEST: &str = "qualification.skerry.dev/requested";
/// Longest list of problems in an annotation, in bytes; the object has all of them.
const PROBLEMS_LEN_MAX: usize = 2048;
/// Longest reason or hint of one profile, in bytes.
const REASON_LEN_MAX: usize = 500;
/// Longest value of a label.
const LABEL_LEN_MAX: usize = 63;

/// Everything that a node says of its kernel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Publication {
    /// Labels of the Node.
    pub labels: BTreeMap<String, String>,
    /// Annotations of the Node.
    pub annotations: BTreeMap<String, String>,
    /// The condition [`CONDITION`].
    pub condition: Condition,
    /// Status of the object, which is named like the node.
    pub object: Object,
}

/// A condition without its times.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Whether it holds; nothing: nobody can say.
    pub holds: Option<bool>,
    /// One word: `Qualified`, `Degraded`, `Unsupported`, `NotPermitted` or `Unknown`.
    pub reason: String,
    /// A sentence.
    pub message: String,
}

/// Status of the object in the cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Object {
    /// Release of the kernel that was judged.
    pub kernel: String,
    /// Machine.
    pub arch: String,
    /// Release of the rules.
    pub rules: String,
    /// SHA-256 of the stable part.
    pub digest: String,
    /// When it was judged, RFC 3339.
    pub observed_at: String,
    /// The condition's reason.
    pub verdict: String,
    /// What to run.
    pub advice: Advice,
    /// Verdict over each profile, with what is missing.
    pub profiles: Vec<ProfileRow>,
    /// The node's signature.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<Signature>,
    /// The stable part, whole.
    pub report: Report,
}

/// One profile's verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileRow {
    /// Its id.
    pub profile: String,
    /// The verdict.
    pub verdict: Verdict,
    /// Why it is not qualified; empty when it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub missing: String,
    /// The smallest change that helps; empty when nothing is known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hint: String,
}

impl Publication {
    /// What to say of a report that was made at the time of `volatile`.
    pub fn new(
        table: &Table,
        report: &Report,
        volatile: &Volatile,
        signature: Option<Signature>,
    ) -> Self {
        let observed_at = rfc3339(volatile.at_s);
        let condition = condition(report);
        let profiles: Vec<ProfileRow> = report
            .profiles
            .iter()
            .map(|judgement| ProfileRow {
                profile: judgement.profile.clone(),
                verdict: judgement.verdict,
                missing: shortened(reason(judgement), REASON_LEN_MAX),
                hint: shortened(report.hint(table, judgement).unwrap_or_default(), REASON_LEN_MAX),
            })
            .collect();
        let problems = profiles
            .iter()
            .zip(&report.profiles)
            .filter(|(_, judgement)| judgement.part_of.is_empty())
            .filter(|(row, _)| !matches!(row.verdict, Verdict::Qualified))
            .map(|(row, _)| format!("{} {}: {}", row.profile, row.verdict.words(), row.missing))
            .collect::<Vec<_>>()
            .join("\n");
        let advice = match (&report.advice.cni, &report.advice.proxy) {
            (Some(cni), Some(proxy)) => format!("{cni}, services by {proxy}"),
            (Some(cni), None) => cni.clone(),
            (None, _) => "no network plugin runs here".into(),
        };
        let annotations = [
            ("digest", report.digest()),
            ("date", observed_at.clone()),
            ("kernel", report.subject.kernel.clone()),
            ("rules", report.rules.clone()),
            ("advice", advice),
            ("problems", shortened(problems, PROBLEMS_LEN_MAX)),
        ]
        .map(|(name, value)| (format!("{PREFIX}/{name}"), value));
        let object = Object {
            kernel: report.subject.kernel.clone(),
            arch: report.subject.arch.clone(),
            rules: report.rules.clone(),
            digest: report.digest(),
            observed_at,
            verdict: condition.reason.clone(),
            advice: report.advice.clone(),
            profiles,
            signature,
            report: report.clone(),
        };
        let labels = labels(table, report);
        Self { labels, annotations: annotations.into(), condition, object }
    }
}

/// Labels of the Node. A feature has one only where something that it is part of runs.
fn labels(table: &Table, report: &Report) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    for judgement in &report.profiles {
        let runs = |id: &String| {
            matches!(report.verdict(id), Some(Verdict::Qualified | Verdict::Degraded))
        };
        if judgement.part_of.is_empty() || judgement.part_of.iter().any(runs) {
            let value = judgement.verdict.words().to_owned();
            labels.insert(format!("{PREFIX}/{}", judgement.profile), value);
        }
    }
    let mut feature = |name: &str, value: String| {
        labels.insert(format!("{FEATURE_PREFIX}/{name}"), value);
    };
    if report.mode == Mode::Live {
        feature("kernel-version.full", label_value(&report.subject.kernel));
        if let Some(release) = crate::kconfig::Release::parse(&report.subject.kernel) {
            feature("kernel-version.major", release.0.to_string());
            feature("kernel-version.minor", release.1.to_string());
            feature("kernel-version.revision", release.2.to_string());
        }
    }
    for label in &table.labels {
        let good = report.facts.get(&label.check).is_some_and(|fact| fact.state.good());
        feature(&label.name, good.to_string());
    }
    labels
}

/// Whether a node with this report can do its work: run containers, and give them a network.
pub fn condition(report: &Report) -> Condition {
    let runtime = report.verdict("containerd").unwrap_or(Verdict::Unknown);
    let network = match &report.advice.cni {
        Some(cni) => report.verdict(cni).unwrap_or(Verdict::Unknown),
        // No network is known to run: a "cannot say" among those that were asked leaves it open.
        None if report
            .profiles
            .iter()
            .any(|j| j.profile == "cni-bridge" && j.verdict == Verdict::Unknown) =>
        {
            Verdict::Unknown
        }
        None => Verdict::Unsupported,
    };
    let order = |verdict: Verdict| match verdict {
        Verdict::Qualified => 0,
        Verdict::Degraded => 1,
        Verdict::Unknown => 2,
        Verdict::Unsupported => 3,
    };
    let worst = if order(runtime) >= order(network) { runtime } else { network };
    let refused = report.facts.values().any(|fact| fact.state == crate::judge::State::NotPermitted);
    let (holds, word) = match worst {
        Verdict::Qualified => (Some(true), "Qualified"),
        Verdict::Degraded => (Some(true), "Degraded"),
        Verdict::Unsupported => (Some(false), "Unsupported"),
        Verdict::Unknown if refused => (None, "NotPermitted"),
        Verdict::Unknown => (None, "Unknown"),
    };
    let why = |id: &str| {
        let judgement = report.profiles.iter().find(|judgement| judgement.profile == id)?;
        (judgement.verdict != Verdict::Qualified)
            .then(|| format!("{id} {}: {}", judgement.verdict.words(), reason(judgement)))
    };
    let mut parts = Vec::new();
    match &report.advice.cni {
        Some(cni) => {
            parts.push(format!("the best network of this kernel is {cni}"));
            parts.extend(why(cni));
        }
        None => parts.push("no network plugin runs on this kernel".to_owned()),
    }
    parts.extend(why("containerd"));
    Condition {
        holds,
        reason: word.into(),
        message: shortened(parts.join("; "), 2 * REASON_LEN_MAX),
    }
}

/// A text that can be the value of a label.
fn label_value(text: &str) -> String {
    let fit = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let text: String = text.chars().take(LABEL_LEN_MAX).map(fit).collect();
    text.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}

/// Cut to so many bytes, with a mark.
fn shortened(mut text: String, len_max: usize) -> String {
    if text.len() > len_max {
        let end = (0..=len_max - 3).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

/// Seconds since 1970 as Kubernetes writes times.
pub fn rfc3339(at_s: u64) -> String {
    // Days to a date of the Gregorian calendar, with years that begin in March.
    let (days, second) = (at_s / 86_400, at_s % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::{Evidence, Seen};
    use crate::report::Subject;

    fn report(seen: impl Fn(&str) -> Seen) -> (Table, Report) {
        let table = Table::built_in();
        let seen = table.checks.keys().map(|id| (id.clone(), seen(id))).collect();
        let evidence = Evidence { seen, arch: Some("x86_64".into()), ..Evidence::default() };
        let subject = Subject { kernel: "6.12.9+deb13~x".into(), ..Subject::default() };
        let report = Report::new(&table, &evidence, Mode::Live, subject);
        (table, report)
    }

    #[test]
    fn a_good_kernel_is_qualified_and_its_labels_can_be_labels() {
        let (table, report) = report(|_| Seen::Works("yes".into()));
        let published = Publication::new(&table, &report, &Volatile::default(), None);
        assert_eq!(published.condition.holds, Some(true), "{:?}", published.condition);
        assert_eq!(published.labels["qualification.skerry.dev/cilium"], "qualified");
        assert_eq!(
            published.labels["feature.node.kubernetes.io/kernel-version.full"],
            "6.12.9_deb13_x"
        );
        assert_eq!(published.labels["feature.node.kubernetes.io/kernel-qual.btf"], "true");
        for (key, value) in &published.labels {
            let (_, name) = key.split_once('/').expect("a domain");
            for text in [name, value] {
                assert!(text.len() <= LABEL_LEN_MAX, "{key}={value}");
                let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
                assert!(ends(text.chars().next()) && ends(text.chars().last()), "{key}={value}");
            }
        }
        assert_eq!(published.annotations["qualification.skerry.dev/digest"], report.digest());
        assert_eq!(published.object.verdict, "Qualified");
    }

    #[test]
    fn a_kernel_without_bridges_and_tunnels_has_no_network_and_says_so() {
        let (table, report) = report(|id| match id {
            "link.veth" | "link.netkit" => Seen::Absent("Unknown device type".into()),
            _ => Seen::Works("yes".into()),
        });
        let published = Publication::new(&table, &report, &Volatile::default(), None);
        assert_eq!(published.condition.holds, Some(false));
        assert_eq!(published.condition.reason, "Unsupported");
        assert!(published.condition.message.contains("no network plugin"));
        let row = published.object.profiles.iter().find(|row| row.profile == "flannel-vxlan");
        let row = row.expect("every profile has a row");
        assert!(row.missing.contains("link.veth missing"), "{row:?}");
        assert!(row.hint.contains("VETH"), "{row:?}");
        // Parts of what does not run say nothing.
        assert!(!published.labels.contains_key("qualification.skerry.dev/cilium-vxlan"));
        assert!(published.annotations["qualification.skerry.dev/problems"].contains("flannel"));
    }

    #[test]
    fn who_may_not_ask_is_never_qualified() {
        let (_, report) = report(|_| Seen::NotPermitted("EPERM".into()));
        let condition = condition(&report);
        assert_eq!((condition.holds, condition.reason.as_str()), (None, "NotPermitted"));
    }

    #[test]
    fn times_are_written_as_kubernetes_writes_them() {
        for (at_s, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_402_089, "2026-11-23T02:48:09Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(at_s), text);
        }
    }
}
