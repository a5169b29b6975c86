//! What the results of a probe mean for a container.
//!
//! One [`Prober`] per container and kind of probe. The shell runs the check and hands in what it
//! found; the prober counts and says when the verdict changes. Initially a readiness probe counts
//! as failed, a liveness probe as passed, and of a startup probe nothing is known.
//!
//! Source: kubernetes/kubernetes pkg/kubelet/prober/worker.go.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// What a probe is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Startup,
    Liveness,
    Readiness,
}

impl Kind {
    /// Returns the word that events begin with.
    pub fn word(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }
}

/// Counts the results of one probe of one instance of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prober {
    kind: Kind,
    success_threshold: u32,
    failure_threshold: u32,
    last: Option<bool>,
    run: u32,
    verdict: Option<bool>,
}

impl Prober {
    /// Returns a prober that has seen nothing.
    pub fn new(kind: Kind, probe: &Probe) -> Self {
        let threshold = |value: Option<i32>, default| {
            value.and_then(|value| u32::try_from(value).ok()).filter(|n| *n > 0).unwrap_or(default)
        };
        let verdict = match kind {
            Kind::Startup => None,
            Kind::Liveness => Some(true),
            Kind::Readiness => Some(false),
        };
        Self {
            kind,
            success_threshold: threshold(probe.success_threshold, 1),
            failure_threshold: threshold(probe.failure_threshold, 3),
            last: None,
            run: 0,
            verdict,
        }
    }

    /// Returns what is to be believed now; `None` while nothing is known.
    pub fn verdict(&self) -> Option<bool> {
        self.verdict
    }

    /// Takes one result. Returns the verdict if this result changed it.
    pub fn handle_result(&mut self, success: bool) -> Option<bool> {
        if self.last == Some(success) {
            self.run = self.run.saturating_add(1);
        } else {
            self.last = Some(success);
            self.run = 1;
        }
        let threshold = if success { self.success_threshold } else { self.failure_threshold };
        if self.run < threshold || self.verdict == Some(success) {
            return None;
        }
        self.verdict = Some(success);
        Some(success)
    }

    /// Returns what the probe is for.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

/// Returns the container's probes.
pub fn probes(container: &Container) -> Vec<(Kind, &Probe)> {
    let all = [
        (Kind::Startup, &container.startup_probe),
        (Kind::Liveness, &container.liveness_probe),
        (Kind::Readiness, &container.readiness_probe),
    ];
    all.into_iter().filter_map(|(kind, probe)| Some((kind, probe.as_ref()?))).collect()
}

/// Time between two checks.
pub fn period(probe: &Probe) -> Duration {
    seconds(probe.period_seconds, 10)
}

/// Time a check may take.
pub fn timeout(probe: &Probe) -> Duration {
    seconds(probe.timeout_seconds, 1)
}

/// Time between the container's start and the first check.
pub fn initial_delay(probe: &Probe) -> Duration {
    let delay = probe.initial_delay_seconds.unwrap_or(0);
    Duration::from_secs(u64::try_from(delay).unwrap_or(0))
}

/// Returns the number of a port, which may be one of the container's names.
pub fn port(port: &IntOrString, container: &Container) -> Option<u16> {
    match port {
        IntOrString::Int(number) => u16::try_from(*number).ok().filter(|port| *port > 0),
        IntOrString::String(text) => {
            let mut named = container.ports.iter().flatten();
            let found = named.find(|port| port.name.as_deref() == Some(text));
            match found {
                Some(port) => u16::try_from(port.container_port).ok(),
                None => text.parse().ok(),
            }
        }
    }
}

fn seconds(value: Option<i32>, default: u64) -> Duration {
    let value = value.and_then(|value| u64::try_from(value).ok()).filter(|value| *value > 0);
    Duration::from_secs(value.unwrap_or(default))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(kind: Kind, success: i32, failure: i32, results: &str) -> String {
        let probe = Probe {
            success_threshold: Some(success),
            failure_threshold: Some(failure),
            ..Default::default()
        };
        let mut prober = Prober::new(kind, &probe);
        let verdict = |result| match prober.handle_result(result == '+') {
            Some(true) => '+',
            Some(false) => '-',
            None => '.',
        };
        results.chars().map(verdict).collect()
    }

    #[test]
    fn verdict_changes_when_a_run_reaches_its_threshold() {
        assert_eq!(verdicts(Kind::Readiness, 1, 3, "-++---+"), ".+...-+");
        assert_eq!(verdicts(Kind::Readiness, 2, 1, "+-+++-"), "...+.-");
        assert_eq!(verdicts(Kind::Liveness, 1, 3, "+--+---"), "......-");
        assert_eq!(verdicts(Kind::Startup, 1, 2, "-+"), ".+");
        assert_eq!(verdicts(Kind::Startup, 1, 2, "--"), ".-");
    }

    #[test]
    fn ports_are_numbers_or_the_containers_names() {
        let container: Container = serde_json::from_value(serde_json::json!({
            "name": "a", "ports": [{"name": "http", "containerPort": 8080}],
        }))
        .expect("container parses");
        let named = |text: &str| port(&IntOrString::String(text.to_owned()), &container);
        assert_eq!(named("http"), Some(8080));
        assert_eq!(named("81"), Some(81));
        assert_eq!(named("none"), None);
        assert_eq!(port(&IntOrString::Int(70000), &container), None);
    }
}
