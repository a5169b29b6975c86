//! What was played and seen: one JSON document, and one HTML page that a customer can read.
//!
//! The page is one file without references to others; it follows the reader's choice of light or dark.

use crate::console::Line;
use crate::link::Sample;
use crate::plot;
use anyhow::{Context, Result};
use serde::Serialize;
use std::fmt::Write as _;
use std::path::Path;

/// Outcome of a scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The claim held.
    Passed,
    /// It did not.
    Failed,
    /// It could not be played here.
    Skipped,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// A moment on the timeline.
#[derive(Debug, Clone, Serialize)]
pub struct Mark {
    /// Wall seconds since the scenario began.
    pub at_s: f64,
    /// `scenario`, or the machine.
    pub lane: String,
    /// `step`, `ok`, `failed`, or the word of the machine's line.
    pub word: String,
    /// The sentence.
    pub text: String,
}

/// Something that was asserted.
#[derive(Debug, Clone, Serialize)]
pub struct Asserted {
    /// The sentence.
    pub what: String,
    /// Whether it was true.
    pub holds: bool,
    /// What was seen instead.
    pub detail: Option<String>,
}

/// Something that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// As `ready_cpu_s`.
    pub name: String,
    /// How much.
    pub value: f64,
    /// Of what.
    pub unit: String,
}

/// Part of a console log.
#[derive(Debug, Clone, Serialize)]
pub struct ConsoleLog {
    /// The machine, and which of its boots.
    pub machine: String,
    /// Wall seconds from the scenario's begin to the start of QEMU.
    pub started_at_s: f64,
    /// CPU seconds that QEMU used in this boot.
    pub cpu_s: f64,
    /// Lines of the whole log.
    pub total: usize,
    /// Those that are shown: our own, and the last ones.
    pub lines: Vec<Line>,
}

/// What passed a machine's cable; times count from the scenario's begin.
#[derive(Debug, Clone, Serialize)]
pub struct Traffic {
    /// The machine, and which of its boots.
    pub machine: String,
    /// Counters over time.
    pub samples: Vec<Sample>,
}

/// Everything that was seen in one scenario.
#[derive(Debug, Clone, Serialize)]
pub struct Evidence {
    /// Wall seconds.
    pub wall_s: f64,
    /// CPU seconds of all its machines.
    pub cpu_s: f64,
    /// In order; the last one decided a failure.
    pub asserted: Vec<Asserted>,
    /// In order.
    pub figures: Vec<Figure>,
    /// In order of time.
    pub timeline: Vec<Mark>,
    /// One per boot.
    pub consoles: Vec<ConsoleLog>,
    /// One per boot.
    pub traffic: Vec<Traffic>,
}

/// One scenario's part of the report.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// As `--only` takes it.
    pub name: String,
    /// What was to be shown.
    pub claim: String,
    /// How.
    pub method: String,
    /// Whether it was.
    pub verdict: Verdict,
    /// Why not.
    pub reason: Option<String>,
    /// It was played a second time, because in the first the emulation was at fault; how that showed.
    pub repeated: Option<String>,
    /// What was seen.
    pub evidence: Evidence,
}

/// The whole report.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Of the image.
    pub version: String,
    /// Beginning of the run, UTC.
    pub started: String,
    /// Wall seconds of the run.
    pub wall_s: f64,
    /// QEMU's version.
    pub qemu: String,
    /// `tcg` or `kvm`, and why.
    pub accelerator: String,
    /// Bytes of the image's parts, as its manifest says.
    pub image: serde_json::Value,
    /// In the order of playing.
    pub scenarios: Vec<Outcome>,
}

impl Report {
    /// How many have a verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.scenarios.iter().filter(|outcome| outcome.verdict == verdict).count()
    }

    /// Writes `pilot.json` and `pilot.html` into a folder.
    pub fn write(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("could not make the folder `{}`", folder.display()))?;
        std::fs::write(folder.join("pilot.json"), serde_json::to_vec_pretty(self)?)?;
        Ok(std::fs::write(folder.join("pilot.html"), self.html())?)
    }

    /// The page.
    pub fn html(&self) -> String {
        let mut page = String::from(HEAD);
        self.summary(&mut page);
        for outcome in &self.scenarios {
            section(&mut page, outcome);
        }
        page.push_str("<footer>Times on the axes are wall seconds; CPU seconds are those of the QEMU process, which \
            stay steady on a busy host.</footer></main></body></html>\n");
        page
    }

    fn summary(&self, page: &mut String) {
        let (passed, failed, skipped) = (
            self.count(Verdict::Passed),
            self.count(Verdict::Failed),
            self.count(Verdict::Skipped),
        );
        let cpu: f64 = self.scenarios.iter().map(|outcome| outcome.evidence.cpu_s).sum();
        put(
            page,
            format_args!(
                "<header><h1>Skerry appliance: pilot report</h1><p class=\"lead\">Image {} was booted in virtual machines, \
             linked to a hub, and treated as boxes in the field are. {passed} of {} claims held{}{}.</p><dl>",
                text(&self.version),
                self.scenarios.len() - skipped,
                if failed == 0 {
                    String::new()
                } else {
                    format!(", <b class=\"failed\">{failed} did not</b>")
                },
                if skipped == 0 {
                    String::new()
                } else {
                    format!("; {skipped} could not be played here")
                },
            ),
        );
        for (name, value) in [
            ("Started", self.started.clone()),
            ("Took", format!("{:.0} s ({cpu:.0} CPU seconds of machines)", self.wall_s)),
            ("QEMU", self.qemu.clone()),
            ("Processor", self.accelerator.clone()),
        ] {
            put(page, format_args!("<dt>{name}</dt><dd>{}</dd>", text(&value)));
        }
        page.push_str(
            "</dl></header><main><table><thead><tr><th>Verdict</th><th>Claim</th>\
            <th class=\"n\">CPU\u{a0}s</th><th class=\"n\">Wall\u{a0}s</th></tr></thead><tbody>",
        );
        for outcome in &self.scenarios {
            put(
                page,
                format_args!(
                    "<tr><td><span class=\"badge {0}\">{0}</span></td><td><a href=\"#{1}\">{2}</a></td>\
                 <td class=\"n\">{3:.0}</td><td class=\"n\">{4:.0}</td></tr>",
                    outcome.verdict.word(),
                    text(&outcome.name),
                    text(&outcome.claim),
                    outcome.evidence.cpu_s,
                    outcome.evidence.wall_s,
                ),
            );
        }
        page.push_str("</tbody></table>");
    }
}

fn section(page: &mut String, outcome: &Outcome) {
    let evidence = &outcome.evidence;
    put(
        page,
        format_args!(
            "<section id=\"{0}\"><h2><span class=\"badge {1}\">{1}</span> {0}</h2><p class=\"claim\">{2}</p>",
            text(&outcome.name),
            outcome.verdict.word(),
            text(&outcome.claim),
        ),
    );
    if !outcome.method.is_empty() {
        put(page, format_args!("<p>{}</p>", text(&outcome.method)));
    }
    if let Some(reason) = &outcome.reason {
        put(page, format_args!("<pre class=\"reason\">{}</pre>", text(reason)));
    }
    if let Some(fault) = &outcome.repeated {
        let words = "Played a second time; in the first the emulation was at fault:";
        put(page, format_args!("<p>{words} <code>{}</code></p>", text(fault)));
    }
    if !evidence.asserted.is_empty() {
        page.push_str("<ul class=\"checks\">");
        for asserted in &evidence.asserted {
            let class = if asserted.holds { "ok" } else { "no" };
            put(page, format_args!("<li class=\"{class}\">{}</li>", text(&asserted.what)));
        }
        page.push_str("</ul>");
    }
    if !evidence.figures.is_empty() {
        page.push_str("<dl class=\"figures\">");
        for figure in &evidence.figures {
            put(
                page,
                format_args!(
                    "<dt>{}</dt><dd>{} {}</dd>",
                    text(&figure.name),
                    number(figure.value),
                    text(&figure.unit),
                ),
            );
        }
        page.push_str("</dl>");
    }
    page.push_str(&plot::timeline(evidence));
    page.push_str(&plot::traffic(evidence));
    said(page, evidence);
    for console in &evidence.consoles {
        put(
            page,
            format_args!(
                "<details><summary>Console of {} ({} of {} lines, {:.1} CPU s)</summary><div class=\"log\"><table>",
                text(&console.machine),
                console.lines.len(),
                console.total,
                console.cpu_s,
            ),
        );
        for line in &console.lines {
            let class = line.word().map(|found| found.word).filter(|word| LOUD.contains(word));
            put(
                page,
                format_args!(
                    "<tr class=\"{}\"><td>{:.2}</td><td>{:.2}</td><td>{}</td></tr>",
                    class.unwrap_or_default(),
                    line.wall_s,
                    line.cpu_s,
                    text(&line.text),
                ),
            );
        }
        page.push_str("</table></div></details>");
    }
    page.push_str("</section>");
}

/// Lines of consoles that the page shows without being asked.
const SAID_MAX: usize = 8;

/// The lines of the machines that tell an outcome.
fn said(page: &mut String, evidence: &Evidence) {
    let loud = |mark: &&Mark| mark.lane != "scenario" && LOUD.contains(&mark.word.as_str());
    let marks: Vec<&Mark> = evidence.timeline.iter().filter(loud).take(SAID_MAX).collect();
    if marks.is_empty() {
        return;
    }
    page.push_str("<div class=\"log said\"><table>");
    for mark in marks {
        put(
            page,
            format_args!(
                "<tr class=\"{0}\"><td>{1:.1} s</td><td>{2}</td><td>{0}: {3}</td></tr>",
                text(&mark.word),
                mark.at_s,
                text(&mark.lane),
                text(&mark.text),
            ),
        );
    }
    page.push_str("</table></div>");
}

/// Words of the machine that the page colours.
const LOUD: [&str; 5] = ["ready", "online", "problem", "hint", "emergency"];

/// Writing to a text cannot fail.
fn put(page: &mut String, arguments: std::fmt::Arguments<'_>) {
    page.write_fmt(arguments).expect("a text takes everything");
}

/// Text as HTML shows it.
pub(crate) fn text(plain: &str) -> String {
    let mut safe = String::with_capacity(plain.len());
    for letter in plain.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            _ => safe.push(letter),
        }
    }
    safe
}

fn number(value: f64) -> String {
    if value.abs() >= 1000.0 || value.fract() == 0.0 {
        // Thousands are easier to read apart.
        let digits = format!("{value:.0}");
        let first = digits.len() % 3;
        let mut groups: Vec<&str> = Vec::new();
        if first > 0 {
            groups.push(&digits[..first]);
        }
        groups.extend((first..digits.len()).step_by(3).map(|at| &digits[at..at + 3]));
        return groups.join("\u{202f}");
    }
    format!("{value:.2}")
}

const HEAD: &str = r#"<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Skerry pilot report</title><style>
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5d6b7a; --paper: #fbfcfd; --card: #ffffff; --line: #dde3ea;
  --blue: #1767b3; --green: #1c7f4d; --red: #c03434; --amber: #a66a00; --fill: #1767b322; --fill2: #1c7f4d22; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e9f0; --soft: #94a3b3; --paper: #11171e; --card: #18212b;
  --line: #2b3744; --blue: #66aef0; --green: #58c48d; --red: #f08080; --amber: #e0ac4a; --fill: #66aef022;
  --fill2: #58c48d22; } }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
header, main { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; } h1 { font-size: 1.8rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 0 0 .4rem; }
.lead { font-size: 1.1rem; max-width: 46rem; } .failed { color: var(--red); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 1rem 0; } dt { color: var(--soft); }
dd { margin: 0; } .figures dd { font-variant-numeric: tabular-nums; }
main > table { width: 100%; border-collapse: collapse; margin: 1rem 0 2rem; }
main > table td, main > table th { text-align: left; padding: .45rem .6rem .45rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } .n { text-align: right !important; font-variant-numeric: tabular-nums; }
a { color: inherit; text-decoration-color: var(--line); text-underline-offset: .2em; } a:hover { color: var(--blue); }
.badge { font-size: .78rem; font-weight: 600; padding: .1rem .5rem; border-radius: 1rem; border: 1px solid currentColor; }
.badge.passed { color: var(--green); } .badge.failed { color: var(--red); } .badge.skipped { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1.1rem 1.25rem;
  margin: 0 0 1.25rem; } .claim { font-size: 1.05rem; margin: 0 0 .4rem; }
.checks { list-style: none; padding: 0; margin: .6rem 0; } .checks li { padding-left: 1.5rem; position: relative; }
.checks li::before { position: absolute; left: 0; font-weight: 700; } .ok::before { content: "✓"; color: var(--green); }
.no::before { content: "✗"; color: var(--red); }
pre.reason { white-space: pre-wrap; color: var(--red); border-left: 3px solid var(--red); padding-left: .8rem;
  font-size: .85rem; } svg { width: 100%; height: auto; display: block; margin: .6rem 0; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } svg .lane { fill: var(--ink); }
svg .axis { stroke: var(--line); } svg .mark { fill: var(--blue); } svg .mark.ready, svg .mark.ok, svg .mark.online {
  fill: var(--green); } svg .mark.problem, svg .mark.emergency, svg .mark.failed { fill: var(--red); }
svg .mark.hint { fill: var(--amber); } svg .mark.step { fill: var(--soft); }
svg .down { fill: var(--fill); stroke: var(--blue); } svg .up { fill: var(--fill2); stroke: var(--green); }
summary { cursor: pointer; color: var(--soft); } .log { overflow-x: auto; max-height: 28rem; overflow-y: auto; }
.log table { border-collapse: collapse; font: 12px/1.45 ui-monospace, monospace; }
.log td { padding: 0 .8rem 0 0; white-space: pre; vertical-align: top; } .said td:last-child { white-space: normal; }
.log td:nth-child(-n+2) { color: var(--soft);
  text-align: right; font-variant-numeric: tabular-nums; }
tr.ready, tr.online { color: var(--green); } tr.problem, tr.emergency { color: var(--red); } tr.hint { color: var(--amber); }
footer { color: var(--soft); font-size: .85rem; margin: 2rem 0 3rem; }
</style></head><body>
"#;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::link::Counts;

    pub(crate) fn evidence() -> Evidence {
        let counts = |bytes| Counts { frames: bytes / 100, bytes, dropped: 0 };
        let mark = |at_s, lane: &str, word: &str, text: &str| Mark {
            at_s,
            lane: lane.into(),
            word: word.into(),
            text: text.into(),
        };
        let line = Line { wall_s: 9.0, cpu_s: 8.5, text: "skerry: 8.1: ready: <joined>".into() };
        Evidence {
            wall_s: 12.0,
            cpu_s: 11.0,
            asserted: vec![Asserted { what: "It joins & stays".into(), holds: true, detail: None }],
            figures: vec![Figure { name: "ready_cpu_s".into(), value: 8.5, unit: "s".into() }],
            timeline: vec![
                mark(0.0, "scenario", "step", "power on"),
                mark(9.0, "edge", "ready", "joined"),
                mark(11.0, "scenario", "ok", "It joins"),
            ],
            consoles: vec![ConsoleLog {
                machine: "edge".into(),
                started_at_s: 0.0,
                cpu_s: 11.0,
                total: 80,
                lines: vec![line],
            }],
            traffic: vec![Traffic {
                machine: "edge".into(),
                samples: (0..20)
                    .map(|index| Sample {
                        at_s: index as f64 * 0.5,
                        up: counts(index * 1000),
                        down: counts(index * 5000),
                    })
                    .collect(),
            }],
        }
    }

    #[test]
    fn page_is_one_file_and_shows_what_was_asserted_and_said() {
        let outcome = |name: &str, verdict| Outcome {
            name: name.into(),
            claim: "A box joins by itself.".into(),
            method: String::new(),
            verdict,
            reason: (verdict == Verdict::Failed).then(|| "no `ready`".into()),
            repeated: Some("IO-APIC + timer doesn't work".into()),
            evidence: evidence(),
        };
        let report = Report {
            version: "1.2.3".into(),
            started: "2026-01-01T00:00:00Z".into(),
            wall_s: 24.0,
            qemu: "QEMU emulator version 7.2".into(),
            accelerator: "tcg: this host has no KVM".into(),
            image: serde_json::Value::Null,
            scenarios: vec![
                outcome("first_boot", Verdict::Passed),
                outcome("cut", Verdict::Failed),
            ],
        };
        let page = report.html();
        for part in [
            "1 of 2 claims held",
            "1 did not",
            "id=\"first_boot\"",
            "It joins &amp; stays",
            "skerry: 8.1: ready: &lt;joined&gt;",
            "<svg",
            "no `ready`",
            "IO-APIC + timer",
        ] {
            assert!(page.contains(part), "{part}");
        }
        for outside in ["http://", "https://", "src=", "<link", "@import"] {
            assert!(!page.contains(outside), "{outside}");
        }
        let folder = tempfile::tempdir().unwrap();
        report.write(folder.path()).unwrap();
        let text = std::fs::read(folder.path().join("pilot.json")).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(value["scenarios"][1]["verdict"], "failed");
        assert_eq!(value["scenarios"][0]["evidence"]["timeline"][1]["word"], "ready");
    }

    #[test]
    fn large_numbers_are_grouped() {
        assert_eq!(number(62_914_560.0), "62\u{202f}914\u{202f}560");
        assert_eq!(number(8.5), "8.50");
        assert_eq!(number(0.0), "0");
    }
}
