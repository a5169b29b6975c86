//! The status text, readiness and restarts of a pod, which are spread over many fields.

use super::{NONE, age};
use jiff::Timestamp;
use serde_json::Value;

pub(super) struct Summary {
    pub(super) status: String,
    pub(super) ready: usize,
    pub(super) total: usize,
    pub(super) restarts: String,
}

/// What `kubectl get pods` shows of a pod besides its name and age.
pub(super) fn summary(pod: &Value, now: Timestamp) -> Summary {
    let (spec, status) = (&pod["spec"], &pod["status"]);
    let phase = status["phase"].as_str().unwrap_or("");
    let pod_reason = status["reason"].as_str().unwrap_or("");
    let mut text = if pod_reason.is_empty() { phase } else { pod_reason }.to_owned();
    if condition(status, "PodScheduled").is_some_and(|one| one["reason"] == "SchedulingGated") {
        text = "SchedulingGated".into();
    }
    let (mut ready, mut restarts) = (0, Restarts::default());

    let mut initializing = false;
    let mut sidecar_restarts = Restarts::default();
    let init_specs = items(&spec["initContainers"]);
    let init_statuses = items(&status["initContainerStatuses"]);
    for (index, one) in init_statuses.iter().enumerate() {
        restarts.add(one);
        let sidecar = is_sidecar(init_specs, one);
        if sidecar {
            sidecar_restarts.add(one);
        }
        let (waiting, terminated) = (&one["state"]["waiting"], &one["state"]["terminated"]);
        if terminated.is_object() && terminated["exitCode"].as_i64().unwrap_or(0) == 0 {
            continue;
        }
        if sidecar && one["started"] == true {
            ready += usize::from(one["ready"] == true);
            continue;
        }
        let waiting_reason = waiting["reason"].as_str().unwrap_or("");
        text = if terminated.is_object() {
            format!("Init:{}", end_text(terminated))
        } else if !waiting_reason.is_empty() && waiting_reason != "PodInitializing" {
            format!("Init:{waiting_reason}")
        } else {
            format!("Init:{index}/{}", init_specs.len())
        };
        initializing = true;
        break;
    }

    let initialized = condition(status, "Initialized").is_some_and(|one| one["status"] == "True");
    if !initializing || initialized {
        restarts = sidecar_restarts;
        let mut running = false;
        // From the last to the first, so that the first container has the last word.
        for one in items(&status["containerStatuses"]).iter().rev() {
            restarts.add(one);
            let state = &one["state"];
            let waiting_reason = state["waiting"]["reason"].as_str().unwrap_or("");
            if !waiting_reason.is_empty() {
                text = waiting_reason.into();
            } else if state["terminated"].is_object() {
                text = end_text(&state["terminated"]);
            } else if one["ready"] == true && state["running"].is_object() {
                running = true;
                ready += 1;
            }
        }
        if text == "Completed" && running {
            let is_ready = condition(status, "Ready").is_some_and(|one| one["status"] == "True");
            text = if is_ready { "Running" } else { "NotReady" }.into();
        }
    }

    let deleted = !pod["metadata"]["deletionTimestamp"].is_null();
    if deleted && pod_reason == "NodeLost" {
        text = "Unknown".into();
    } else if deleted && !matches!(phase, "Succeeded" | "Failed") {
        text = "Terminating".into();
    }
    let sidecars = init_specs.iter().filter(|one| one["restartPolicy"] == "Always").count();
    let total = items(&spec["containers"]).len() + sidecars;
    Summary { status: text, ready, total, restarts: restarts.text(now) }
}

/// The wide columns: address, node, nominated node, readiness gates.
pub(super) fn wide(pod: &Value) -> [String; 4] {
    let or_none = |value: &Value| match value.as_str() {
        None | Some("") => NONE.to_owned(),
        Some(text) => text.to_owned(),
    };
    let status = &pod["status"];
    let first = &status["podIPs"][0]["ip"];
    let address = if first.is_string() { first } else { &status["podIP"] };
    let gates = items(&pod["spec"]["readinessGates"]);
    let passed = gates
        .iter()
        .filter(|gate| {
            let name = gate["conditionType"].as_str().unwrap_or("");
            condition(status, name).is_some_and(|one| one["status"] == "True")
        })
        .count();
    let gates = match gates.len() {
        0 => NONE.to_owned(),
        count => format!("{passed}/{count}"),
    };
    let node = or_none(&pod["spec"]["nodeName"]);
    [or_none(address), node, or_none(&status["nominatedNodeName"]), gates]
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn condition<'a>(status: &'a Value, ty: &str) -> Option<&'a Value> {
    items(&status["conditions"]).iter().find(|condition| condition["type"] == ty)
}

/// Whether the init container of `status` keeps running beside the others.
fn is_sidecar(specs: &[Value], status: &Value) -> bool {
    specs.iter().any(|spec| spec["name"] == status["name"] && spec["restartPolicy"] == "Always")
}

fn end_text(terminated: &Value) -> String {
    match terminated["reason"].as_str() {
        Some(reason) if !reason.is_empty() => reason.into(),
        _ => match terminated["signal"].as_i64() {
            Some(signal) if signal != 0 => format!("Signal:{signal}"),
            _ => format!("ExitCode:{}", terminated["exitCode"].as_i64().unwrap_or(0)),
        },
    }
}

#[derive(Default)]
struct Restarts {
    count: i64,
    /// RFC 3339 in UTC, so that the latest is the greatest text.
    last: String,
}

impl Restarts {
    fn add(&mut self, status: &Value) {
        self.count += status["restartCount"].as_i64().unwrap_or(0);
        let finished = status["lastState"]["terminated"]["finishedAt"].as_str().unwrap_or("");
        if finished > self.last.as_str() {
            self.last = finished.into();
        }
    }

    fn text(&self, now: Timestamp) -> String {
        if self.count == 0 || self.last.is_empty() {
            return self.count.to_string();
        }
        format!("{} ({} ago)", self.count, age::since(&self.last, now))
    }
}
