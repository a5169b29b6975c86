//! Plots of a scenario as inline SVG: what happened when, and what passed the cable meanwhile.

use crate::report::{Evidence, Mark, text};
use std::fmt::Write as _;

/// Width of every plot, in its own units.
const WIDTH: f64 = 960.0;
/// Left and right edge of the axis.
const LEFT: f64 = 150.0;
const RIGHT: f64 = 945.0;
/// Height of a lane of the timeline.
const LANE: f64 = 46.0;
/// Height of a traffic plot.
const TRAFFIC: f64 = 90.0;
/// Marks of a lane closer than this to one with a label have none.
const LABEL_GAP: f64 = 52.0;
/// Words that a reader looks for.
const TELLING: [&str; 4] = ["ready", "problem", "emergency", "failed"];

/// Lanes of the scenario and of each boot, with a mark where something was said.
pub(crate) fn timeline(evidence: &Evidence) -> String {
    if evidence.timeline.is_empty() {
        return String::new();
    }
    let mut lanes: Vec<&str> = vec!["scenario"];
    lanes.extend(evidence.consoles.iter().map(|console| console.machine.as_str()));
    let height = LANE * lanes.len() as f64 + 34.0;
    let scale = Scale::new(evidence.wall_s);
    let mut svg = open(height, "Timeline");
    scale.axis(&mut svg, height - 18.0);
    for (index, lane) in lanes.iter().enumerate() {
        let y = LANE * index as f64 + 30.0;
        put(
            &mut svg,
            format_args!(
                "<text class=\"lane\" x=\"0\" y=\"{:.0}\">{}</text>",
                y + 4.0,
                text(&shortened(lane)),
            ),
        );
        put(
            &mut svg,
            format_args!(
                "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{y}\" y2=\"{y}\"/>"
            ),
        );
        let marks: Vec<&Mark> =
            evidence.timeline.iter().filter(|mark| mark.lane == **lane).collect();
        for mark in &marks {
            put(
                &mut svg,
                format_args!(
                    "<circle class=\"mark {}\" cx=\"{:.1}\" cy=\"{y}\" r=\"5\"><title>{:.1} s: {}: {}</title></circle>",
                    text(&mark.word),
                    scale.x(mark.at_s),
                    mark.at_s,
                    text(&mark.word),
                    text(&mark.text),
                ),
            );
        }
        for (x, word) in labels(&marks, &scale) {
            let anchor = if x > RIGHT - 30.0 { "end" } else { "middle" };
            put(
                &mut svg,
                format_args!(
                    "<text x=\"{x:.1}\" y=\"{:.0}\" text-anchor=\"{anchor}\">{}</text>",
                    y - 10.0,
                    text(word),
                ),
            );
        }
    }
    svg.push_str("</svg>");
    svg
}

/// Bytes a second, to the machine above the axis and from it below.
pub(crate) fn traffic(evidence: &Evidence) -> String {
    let mut plots = String::new();
    let scale = Scale::new(evidence.wall_s);
    for cable in &evidence.traffic {
        let rates: Vec<(f64, f64, f64)> = cable
            .samples
            .windows(2)
            .map(|pair| {
                let span = (pair[1].at_s - pair[0].at_s).max(0.001);
                let rate = |new: u64, old: u64| new.saturating_sub(old) as f64 / span;
                let (down, up) = (
                    rate(pair[1].down.bytes, pair[0].down.bytes),
                    rate(pair[1].up.bytes, pair[0].up.bytes),
                );
                (pair[1].at_s, down, up)
            })
            .collect();
        let most = rates.iter().fold(0.0_f64, |most, (_, down, up)| most.max(*down).max(*up));
        if most <= 0.0 {
            continue;
        }
        let mut svg = open(TRAFFIC + 20.0, "Traffic");
        let middle = TRAFFIC / 2.0;
        put(
            &mut svg,
            format_args!(
                "<text class=\"lane\" x=\"0\" y=\"{:.0}\">{}</text><text x=\"0\" y=\"{:.0}\">in, peak {}</text>\
             <text x=\"0\" y=\"{:.0}\">out below</text>",
                middle - 12.0,
                text(&shortened(&cable.machine)),
                middle + 4.0,
                rate_text(most),
                middle + 18.0,
            ),
        );
        for (class, sign) in [("down", -1.0), ("up", 1.0)] {
            let first = scale.x(rates[0].0);
            let mut path = format!("M{first:.1} {middle}");
            for (at, down, up) in &rates {
                let value = if sign < 0.0 { down } else { up };
                // A square root, so that heartbeats are seen beside image downloads.
                let height = (value / most).sqrt() * (middle - 4.0);
                put(&mut path, format_args!("L{:.1} {:.1}", scale.x(*at), middle + sign * height));
            }
            let last = scale.x(rates[rates.len() - 1].0);
            put(
                &mut svg,
                format_args!("<path class=\"{class}\" d=\"{path}L{last:.1} {middle}Z\"/>"),
            );
        }
        scale.axis(&mut svg, TRAFFIC + 4.0);
        svg.push_str("</svg>");
        plots.push_str(&svg);
    }
    plots
}

fn open(height: f64, title: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{title}\">")
}

fn put(svg: &mut String, arguments: std::fmt::Arguments<'_>) {
    svg.write_fmt(arguments).expect("a text takes everything");
}

/// Words that have room over a lane, with their places: those that decide first.
fn labels<'a>(marks: &[&'a Mark], scale: &Scale) -> Vec<(f64, &'a str)> {
    let decides = |mark: &Mark| TELLING.contains(&mark.word.as_str());
    let mut placed: Vec<(f64, &str)> = Vec::new();
    for wanted in [true, false] {
        for mark in marks.iter().filter(|mark| decides(mark) == wanted) {
            let x = scale.x(mark.at_s);
            if placed.iter().all(|(other, _)| (x - other).abs() >= LABEL_GAP) {
                placed.push((x, &mark.word));
            }
        }
    }
    placed
}

/// Names that fit left of the axis.
fn shortened(name: &str) -> String {
    if name.chars().count() <= 24 {
        return name.to_owned();
    }
    name.chars().take(23).chain(['…']).collect()
}

fn rate_text(bytes_per_s: f64) -> String {
    if bytes_per_s >= 1e6 {
        format!("{:.1} MB/s", bytes_per_s / 1e6)
    } else {
        format!("{:.0} kB/s", (bytes_per_s / 1e3).max(1.0))
    }
}

/// Seconds to places.
struct Scale {
    length_s: f64,
}

impl Scale {
    fn new(length_s: f64) -> Self {
        Self { length_s: length_s.max(1.0) }
    }

    fn x(&self, at_s: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * (at_s / self.length_s).clamp(0.0, 1.0)
    }

    fn axis(&self, svg: &mut String, y: f64) {
        let steps = [1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];
        let step = steps.into_iter().find(|step| self.length_s / step <= 10.0).unwrap_or(7200.0);
        let mut at = 0.0;
        while at <= self.length_s {
            let x = self.x(at);
            put(
                svg,
                format_args!(
                    "<line class=\"axis\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.0}\" y2=\"{y:.0}\"/>\
                 <text x=\"{x:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{at:.0} s</text>",
                    y - 4.0,
                    y + 12.0,
                ),
            );
            at += step;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeline_has_a_lane_per_boot_and_traffic_a_path_per_direction() {
        let evidence = crate::report::tests::evidence();
        let svg = timeline(&evidence);
        assert_eq!(svg.matches("<circle").count(), evidence.timeline.len());
        assert_eq!(svg.matches("class=\"lane\"").count(), 2);
        assert_eq!(traffic(&evidence).matches("<path").count(), 2);
    }

    #[test]
    fn silent_cables_and_empty_evidence_give_no_plot() {
        let mut evidence = crate::report::tests::evidence();
        evidence.traffic[0].samples.truncate(1);
        evidence.timeline.clear();
        assert!(traffic(&evidence).is_empty() && timeline(&evidence).is_empty());
    }

    #[test]
    fn axis_has_at_most_a_dozen_steps_at_any_length() {
        for length in [0.5, 9.0, 61.0, 3600.0, 36_000.0] {
            let mut svg = String::new();
            Scale::new(length).axis(&mut svg, 10.0);
            assert!((1..=12).contains(&svg.matches("<line").count()), "{length}");
        }
    }
}
