//! A scenario: one claim about the product, and the code that tries to prove it wrong.
//!
//! The claim is the first paragraph of the scenario's own file, so that code and report cannot say different things. A
//! [`Stage`] is what the code works on: it starts machines, asks questions and keeps the answers as evidence.

use crate::console::{Bound, Console, Line, Want};
use crate::lab::Lab;
use crate::link::Recorder;
use crate::machine::{Machine, Plan};
use crate::report::{Asserted, ConsoleLog, Evidence, Figure, Mark, Outcome, Traffic, Verdict};
use anyhow::Result;
use std::time::Instant;

/// Console lines of one machine in the report; our own lines come first, then those around the end.
const EXCERPT_MAX: usize = 400;
/// Points of a traffic plot.
const TRAFFIC_MAX: usize = 600;

/// A claim and its proof.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// As `--only` takes it.
    pub name: &'static str,
    /// The text of its file.
    pub source: &'static str,
    /// Among those that CI runs.
    pub ci: bool,
    /// The proof.
    pub run: fn(&mut Stage<'_>) -> Result<()>,
}

impl Scenario {
    /// First paragraph of the file's header.
    pub fn claim(&self) -> String {
        paragraphs(self.source).into_iter().next().unwrap_or_default()
    }

    /// The other paragraphs: how it is shown.
    pub fn method(&self) -> String {
        paragraphs(self.source).into_iter().skip(1).collect::<Vec<_>>().join("\n")
    }

    /// Runs it and gathers what was seen. A scenario that failed because of the emulation is played once more.
    pub fn play(&self, lab: &Lab) -> Outcome {
        let mut stage = Stage::new(lab);
        let mut result = (self.run)(&mut stage);
        let repeated = result.as_ref().err().and_then(|_| stage.fault());
        if let Some(fault) = &repeated {
            eprintln!("pilot: {}: played again, the emulation was at fault: {fault}", self.name);
            stage = Stage::new(lab);
            result = (self.run)(&mut stage);
        }
        let (verdict, reason) = match &result {
            Ok(()) => (Verdict::Passed, None),
            Err(error) => match error.downcast_ref::<Skipped>() {
                Some(skipped) => (Verdict::Skipped, Some(skipped.0.clone())),
                None => (Verdict::Failed, Some(format!("{error:#}"))),
            },
        };
        Outcome {
            name: self.name.into(),
            claim: self.claim(),
            method: self.method(),
            verdict,
            reason,
            repeated,
            evidence: stage.evidence(),
        }
    }
}

fn paragraphs(source: &str) -> Vec<String> {
    let header = source.lines().map_while(|line| line.strip_prefix("//!"));
    let mut paragraphs = vec![String::new()];
    for line in header.map(str::trim) {
        let last = paragraphs.last_mut().expect("starts with one");
        if line.is_empty() {
            paragraphs.push(String::new());
        } else {
            if !last.is_empty() {
                last.push(' ');
            }
            last.push_str(line);
        }
    }
    paragraphs.retain(|text| !text.is_empty());
    paragraphs
}

/// Why a scenario could not be played here; not a failure of the product.
#[derive(Debug, thiserror::Error)]
#[error("not played: {0}")]
pub struct Skipped(pub String);

/// A machine whose evidence is kept after its end.
struct Watched {
    /// Name of its plan; several boots share it.
    plan: String,
    name: String,
    console: Console,
    traffic: Recorder,
}

/// Where a scenario is played.
pub struct Stage<'a> {
    /// Image, hub, and new machines.
    pub lab: &'a Lab,
    start: Instant,
    machines: Vec<Watched>,
    marks: Vec<Mark>,
    asserted: Vec<Asserted>,
    figures: Vec<Figure>,
}

impl<'a> Stage<'a> {
    fn new(lab: &'a Lab) -> Self {
        Self {
            lab,
            start: Instant::now(),
            machines: Vec::new(),
            marks: Vec::new(),
            asserted: Vec::new(),
            figures: Vec::new(),
        }
    }

    /// Starts a machine and keeps what it writes.
    pub fn boot(&mut self, plan: &Plan) -> Result<Machine> {
        let machine = plan.start()?;
        let boots = self.machines.iter().filter(|old| old.plan == plan.name).count();
        let name = match boots {
            0 => plan.name.clone(),
            earlier => format!("{}, boot {}", plan.name, earlier + 1),
        };
        self.mark(format!("power on: {name}"));
        if self.lab.inputs.show_consoles {
            machine.console().follow(&name);
        }
        self.machines.push(Watched {
            plan: plan.name.clone(),
            name,
            console: machine.console().clone(),
            traffic: machine.link().recorder(),
        });
        Ok(machine)
    }

    /// Puts a moment on the timeline.
    pub fn mark(&mut self, text: impl Into<String>) {
        let text = text.into();
        eprintln!("pilot:   {:7.1} s  {text}", self.start.elapsed().as_secs_f64());
        self.marks.push(Mark {
            at_s: self.start.elapsed().as_secs_f64(),
            lane: "scenario".into(),
            word: "step".into(),
            text,
        });
    }

    /// Records a figure.
    pub fn figure(&mut self, name: &str, value: f64, unit: &str) {
        self.figures.push(Figure { name: name.into(), value, unit: unit.into() });
    }

    /// Asserts something that is known already; false ends the scenario.
    pub fn check(&mut self, what: &str, holds: bool) -> Result<()> {
        self.ask(what, || if holds { Ok(()) } else { Err(anyhow::anyhow!("it does not hold")) })
    }

    /// Asserts something that has to be found out; an error ends the scenario.
    pub fn ask<T>(&mut self, what: &str, question: impl FnOnce() -> Result<T>) -> Result<T> {
        let answer = question();
        let detail = answer.as_ref().err().map(|error| format!("{error:#}"));
        let at_s = self.start.elapsed().as_secs_f64();
        let word = if detail.is_none() { "ok" } else { "failed" };
        eprintln!("pilot:   {at_s:7.1} s  {word}: {what}");
        self.marks.push(Mark {
            at_s,
            lane: "scenario".into(),
            word: word.into(),
            text: what.into(),
        });
        let holds = detail.is_none();
        self.asserted.push(Asserted { what: what.into(), holds, detail });
        answer.map_err(|error| error.context(format!("asserted: {what}")))
    }

    /// Asserts that a machine writes a line.
    pub fn expect(
        &mut self,
        machine: &Machine,
        what: &str,
        want: Want<'_>,
        bound: Bound,
    ) -> Result<Line> {
        self.ask(what, || Ok(machine.expect(want, bound)?))
    }

    /// Asserts that a machine has not written a line so far.
    pub fn silent(&mut self, machine: &Machine, what: &str, want: Want<'_>) -> Result<()> {
        self.ask(what, || match machine.console().find(0, want) {
            None => Ok(()),
            Some(line) => Err(anyhow::anyhow!("it wrote: {}", line.text)),
        })
    }

    /// Ends the scenario: it cannot be played here.
    pub fn skip(&self, why: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Skipped(why.into()))
    }

    /// What a machine has written when QEMU, not the product, was at fault.
    fn fault(&self) -> Option<String> {
        self.machines.iter().find_map(|watched| watched.console.fault())
    }

    fn evidence(self) -> Evidence {
        let mut marks = self.marks;
        let mut consoles = Vec::new();
        let mut traffic = Vec::new();
        let mut cpu_s = 0.0;
        for watched in self.machines {
            let lines = watched.console.lines();
            let offset = watched.console.start().duration_since(self.start).as_secs_f64();
            cpu_s += watched.console.cpu().as_secs_f64();
            for line in &lines {
                let Some(found) = line.word() else { continue };
                marks.push(Mark {
                    at_s: offset + line.wall_s,
                    lane: watched.name.clone(),
                    word: found.word.into(),
                    text: found.text.into(),
                });
            }
            let (start, samples) = (watched.traffic.start_time(), watched.traffic.samples());
            let offset_link = start.duration_since(self.start).as_secs_f64();
            let step = samples.len().div_ceil(TRAFFIC_MAX).max(1);
            let samples = samples.into_iter().step_by(step).map(|mut sample| {
                sample.at_s += offset_link;
                sample
            });
            traffic.push(Traffic { machine: watched.name.clone(), samples: samples.collect() });
            let cpu_s = watched.console.cpu().as_secs_f64();
            consoles.push(ConsoleLog {
                machine: watched.name,
                started_at_s: offset,
                cpu_s,
                total: lines.len(),
                lines: excerpt(lines),
            });
        }
        marks.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
        Evidence {
            wall_s: self.start.elapsed().as_secs_f64(),
            cpu_s,
            asserted: self.asserted,
            figures: self.figures,
            timeline: marks,
            consoles,
            traffic,
        }
    }
}

/// Our own lines and the last ones, in order, at most [`EXCERPT_MAX`].
fn excerpt(lines: Vec<Line>) -> Vec<Line> {
    let last = lines.len().saturating_sub(EXCERPT_MAX / 4);
    let kept = lines.into_iter().enumerate();
    let mut kept: Vec<Line> = kept
        .filter(|(index, line)| *index >= last || line.word().is_some())
        .map(|(_, line)| line)
        .collect();
    if kept.len() > EXCERPT_MAX {
        // The beginning tells the most about a boot, the end about a failure.
        kept.drain(EXCERPT_MAX / 2..kept.len() - EXCERPT_MAX / 2);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claim_is_the_first_paragraph_of_the_header() {
        let source =
            "//! A box joins\n//! by itself.\n//!\n//! Shown by a boot.\n\nuse x;\n//! no\n";
        assert_eq!(paragraphs(source), ["A box joins by itself.", "Shown by a boot."]);
        assert!(paragraphs("fn x() {}").is_empty());
    }

    #[test]
    fn excerpt_keeps_our_lines_and_the_end_within_its_bound() {
        let line = |text: String| Line { wall_s: 0.0, cpu_s: 0.0, text };
        let mut lines: Vec<Line> = (0..5000).map(|index| line(format!("noise {index}"))).collect();
        lines[10] = line("skerry: 0.1: boot: here".into());
        let kept = excerpt(lines);
        assert_eq!(kept.len(), 1 + EXCERPT_MAX / 4);
        assert!(kept[0].word().is_some());
        assert_eq!(kept.last().unwrap().text, "noise 4999");
        let words = (0..5000).map(|_| line("skerry: 0.1: boot: here".into())).collect();
        assert_eq!(excerpt(words).len(), EXCERPT_MAX);
    }
}
