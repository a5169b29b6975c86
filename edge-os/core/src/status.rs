//! Pod status reports: one strategic-merge patch per pod, newest wins, one in flight.
//!
//! What a pod's row says is what the cluster has, so that after a restart of the agent only pods whose status differs
//! from their row are reported. A finished pod is deleted only after its last status has been taken.
//!
//! Source: kubeedge/kubeedge, pkg/kubelet status_manager.go and edge/pkg/metamanager/client/pod.go; golden session,
//! `podpatch` messages; `patchMergeKey` tags of kubernetes/api core/v1 PodStatus.

use crate::backoff::Backoff;
use serde_json::{Map, Value, json};
use skerry_protocol::MessageId;
use std::time::{Duration, Instant};

/// How long the reply to a report may take before it is sent again.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// Identity of a pod in reports.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodKey {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
}

impl PodKey {
    /// From borrowed parts.
    pub fn new(namespace: &str, name: &str, uid: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into(), uid: uid.into() }
    }
}

/// What the server is to be told next about one pod.
#[derive(Debug, PartialEq)]
pub enum Report {
    /// Content of a `patch namespace/podpatch/name`.
    Patch(String),
    /// Content of a `delete namespace/pod/name`.
    Delete(Value),
}

/// The reports of one pod.
#[derive(Debug)]
pub struct PodReports {
    uid: String,
    /// The newest status, until the server has it.
    wanted: Option<Value>,
    /// What the server has, as far as we know.
    server: Option<Value>,
    gone: bool,
    flight: Option<Flight>,
    next_try: Option<Instant>,
    backoff: Backoff,
}

#[derive(Debug)]
struct Flight {
    id: MessageId,
    status: Option<Value>,
    deadline: Instant,
}

impl PodReports {
    /// Nothing to report yet. `server` is `status` of the stored pod.
    pub fn new(uid: &str, server: Option<Value>, seed: u64) -> Self {
        Self {
            uid: uid.into(),
            wanted: None,
            server,
            gone: false,
            flight: None,
            next_try: None,
            backoff: Backoff::new(seed),
        }
    }

    /// Takes a new status; nothing will be sent when the server has it already.
    pub fn report(&mut self, status: Value) {
        let in_flight = self.flight.as_ref().and_then(|flight| flight.status.as_ref());
        let known = in_flight.or(self.server.as_ref());
        let settled = known.is_some_and(|known| is_settled(known, &status));
        let changed = self.wanted.as_ref() != Some(&status);
        self.wanted = (!settled).then_some(status);
        if changed && self.flight.is_none() {
            self.next_try = None; // news does not wait for the backoff of old news
        }
    }

    /// Nothing is left of the pod on this node: its object may go once its status is known.
    pub fn finish(&mut self) {
        self.gone = true;
    }

    /// Whether [`Self::finish`] was called.
    pub fn is_finished(&self) -> bool {
        self.gone
    }

    /// The newest status that the server is not known to have.
    pub fn owed(&self) -> Option<&Value> {
        self.wanted.as_ref().or_else(|| self.flight.as_ref()?.status.as_ref())
    }

    /// Whether `parent` is the message in flight.
    pub fn is_mine(&self, parent: &str) -> bool {
        self.flight.as_ref().is_some_and(|flight| flight.id == parent)
    }

    /// Whether a reply is awaited and not overdue.
    pub fn is_in_flight(&self, now: Instant) -> bool {
        self.flight.as_ref().is_some_and(|flight| flight.deadline > now)
    }

    /// Forgets what was on the way: the link is new, and a reply will not come.
    pub fn handle_connected(&mut self) {
        if let Some(flight) = self.flight.take() {
            self.wanted = self.wanted.take().or(flight.status);
        }
        self.next_try = None;
        self.backoff.reset();
    }

    /// Returns what is due at `now`; the caller sends it and calls [`Self::sent`].
    pub fn poll(&mut self, now: Instant) -> Option<Report> {
        if self.flight.as_ref().is_some_and(|flight| flight.deadline <= now) {
            let flight = self.flight.take().expect("looked at just now");
            self.wanted = self.wanted.take().or(flight.status);
        }
        if self.flight.is_some() || self.next_try.is_some_and(|at| at > now) {
            return None;
        }
        match &self.wanted {
            Some(status) => {
                Some(Report::Patch(patch(&self.uid, status, self.server.as_ref()).to_string()))
            }
            None if self.gone => {
                let uid = &self.uid;
                let options = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": uid}});
                Some(Report::Delete(options))
            }
            None => None,
        }
    }

    /// The report of the last poll is on its way as message `id`.
    pub fn sent(&mut self, id: MessageId, now: Instant) {
        let status = self.wanted.take();
        self.flight = Some(Flight { id, status, deadline: now + REPLY_TIMEOUT });
    }

    /// Takes the reply to message `parent`; a late one changes nothing. Returns whether the pod is done with.
    pub fn handle_reply(&mut self, now: Instant, parent: &str, verdict: Verdict) -> bool {
        let Some(flight) = self.flight.take_if(|flight| flight.id == parent) else {
            return false;
        };
        let was_delete = flight.status.is_none();
        match verdict {
            Verdict::Taken => {
                self.backoff.reset();
                self.server = flight.status.or(self.server.take());
                was_delete
            }
            // The pod is gone in the cluster, or is another one, or the report can never be taken.
            Verdict::Refused => {
                self.wanted = None;
                was_delete
            }
            Verdict::Later => {
                self.wanted = self.wanted.take().or(flight.status);
                self.next_try = Some(now + self.backoff.next_wait());
                false
            }
        }
    }

    /// When to poll again, if nothing else happens.
    pub fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        match &self.flight {
            Some(flight) => Some(flight.deadline),
            None if self.wanted.is_some() || self.gone => Some(self.next_try.unwrap_or(now)),
            None => None,
        }
    }
}

/// What became of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The server has it.
    Taken,
    /// The server will never take it.
    Refused,
    /// The server could not now.
    Later,
}

/// The strategic-merge patch that makes the server's status read as `status`. Conditions of others stay.
pub fn patch(uid: &str, status: &Value, server: Option<&Value>) -> Value {
    /// Fields that come and go, and that only a node writes.
    const OWNED: [&str; 5] = ["message", "reason", "podIP", "podIPs", "initContainerStatuses"];
    let mut fields = status.as_object().cloned().unwrap_or_default();
    for name in OWNED {
        if !fields.contains_key(name) && server.is_some_and(|server| server.get(name).is_some()) {
            fields.insert(name.into(), Value::Null);
        }
    }
    if let Some(Value::Array(conditions)) = fields.get_mut("conditions") {
        let order: Vec<_> =
            conditions.iter().map(|condition| json!({"type": condition["type"]})).collect();
        for condition in conditions.iter_mut().filter_map(Value::as_object_mut) {
            for name in ["reason", "message"] {
                condition.entry(name).or_insert(Value::Null);
            }
        }
        fields.insert("$setElementOrder/conditions".into(), order.into());
    }
    // These lists merge by address; an address that is no longer there has to be taken out by name.
    for list in ["podIPs", "hostIPs"] {
        let Some(Value::Array(addresses)) = fields.get_mut(list) else { continue };
        let gone: Vec<_> = server
            .and_then(|server| server.get(list)?.as_array())
            .into_iter()
            .flatten()
            .filter(|old| !addresses.iter().any(|new| new["ip"] == old["ip"]))
            .map(|old| json!({"ip": old["ip"], "$patch": "delete"}))
            .collect();
        addresses.extend(gone);
    }
    json!({"metadata": {"uid": uid}, "status": fields})
}

/// Whether `server` says all that `status` says. Conditions of others, and fields that only the server sets, are not
/// looked at; a null or empty field is the same as none.
pub fn is_settled(server: &Value, status: &Value) -> bool {
    let (server, status) = (trimmed(server), trimmed(status));
    let (Some(server), Some(status)) = (server.as_object(), status.as_object()) else {
        return false;
    };
    const COME_AND_GO: [&str; 4] = ["message", "reason", "podIP", "containerStatuses"];
    let vanished =
        COME_AND_GO.iter().any(|name| server.contains_key(*name) && !status.contains_key(*name));
    !vanished
        && status.iter().all(|(name, value)| match (name.as_str(), value) {
            ("conditions", Value::Array(conditions)) => conditions.iter().all(|mine| {
                let theirs = server.get("conditions").and_then(Value::as_array);
                theirs.into_iter().flatten().any(|theirs| theirs == mine)
            }),
            _ => server.get(name) == Some(value),
        })
}

/// The value without null and empty fields.
fn trimmed(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.iter().map(|(name, value)| (name.clone(), trimmed(value)));
            Value::Object(kept.filter(|(_, value)| !is_empty(value)).collect::<Map<_, _>>())
        }
        Value::Array(items) => items.iter().map(trimmed).collect(),
        other => other.clone(),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(fields) => fields.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(phase: &str, restarts: u32) -> Value {
        json!({"phase": phase,
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-22T16:23:50Z"}],
            "containerStatuses": [{"name": "c", "restartCount": restarts, "lastState": {}}]})
    }

    fn reports() -> (PodReports, Instant) {
        (PodReports::new("u", None, 1), Instant::now())
    }

    fn phase_of(report: Option<Report>) -> String {
        match report {
            Some(Report::Patch(patch)) => {
                let patch: Value = serde_json::from_str(&patch).expect("a patch is JSON");
                assert_eq!(patch["metadata"]["uid"], "u");
                patch["status"]["phase"].as_str().unwrap_or_default().into()
            }
            Some(Report::Delete(_)) => "delete".into(),
            None => "nothing".into(),
        }
    }

    #[test]
    fn newest_status_wins_while_one_is_in_flight() {
        let (mut pod, now) = reports();
        pod.report(status("Pending", 0));
        assert_eq!(phase_of(pod.poll(now)), "Pending");
        pod.sent("m1".into(), now);
        for restarts in 0..5 {
            pod.report(status("Running", restarts));
        }
        pod.report(status("Failed", 5));
        assert_eq!(phase_of(pod.poll(now)), "nothing");
        pod.handle_reply(now, "m1", Verdict::Taken);
        assert_eq!(phase_of(pod.poll(now)), "Failed");
        pod.sent("m2".into(), now);
        pod.handle_reply(now, "m2", Verdict::Taken);
        assert_eq!(phase_of(pod.poll(now)), "nothing");
    }

    #[test]
    fn report_lost_with_the_link_is_sent_again() {
        let (mut pod, now) = reports();
        pod.report(status("Running", 0));
        pod.sent("m1".into(), now);
        pod.handle_connected();
        assert_eq!(phase_of(pod.poll(now)), "Running");
        pod.sent("m2".into(), now);
        assert!(!pod.handle_reply(now, "m1", Verdict::Taken), "a late reply is nobody's");
        assert_eq!(phase_of(pod.poll(now + REPLY_TIMEOUT)), "Running");
    }

    #[test]
    fn status_that_goes_back_while_in_flight_is_sent_again() {
        let (mut pod, now) = reports();
        pod.report(status("Running", 0));
        pod.sent("m1".into(), now);
        pod.handle_reply(now, "m1", Verdict::Taken);
        pod.report(status("Failed", 0));
        pod.sent("m2".into(), now);
        pod.report(status("Running", 0));
        pod.handle_reply(now, "m2", Verdict::Taken);
        assert_eq!(phase_of(pod.poll(now)), "Running");
    }

    #[test]
    fn delete_waits_for_the_last_status_and_is_repeated_until_taken() {
        let (mut pod, now) = reports();
        pod.report(status("Succeeded", 0));
        pod.finish();
        assert_eq!(phase_of(pod.poll(now)), "Succeeded");
        pod.sent("m1".into(), now);
        pod.handle_reply(now, "m1", Verdict::Taken);
        assert_eq!(phase_of(pod.poll(now)), "delete");
        pod.sent("m2".into(), now);
        assert!(!pod.handle_reply(now, "m2", Verdict::Later));
        let later = pod.poll_timeout(now).expect("a retry is planned");
        assert_eq!(phase_of(pod.poll(later)), "delete");
        pod.sent("m3".into(), later);
        assert!(pod.handle_reply(later, "m3", Verdict::Taken));
    }

    #[test]
    fn refused_status_is_not_sent_again() {
        let (mut pod, now) = reports();
        pod.report(status("Running", 0));
        pod.sent("m1".into(), now);
        pod.handle_reply(now, "m1", Verdict::Refused);
        assert_eq!(pod.poll_timeout(now), None);
    }

    #[test]
    fn status_that_the_row_already_has_is_not_sent() {
        let stored = json!({"phase": "Running", "qosClass": "BestEffort",
            "conditions": [
                {"type": "Mine", "status": "True"},
                {"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-22T16:23:50Z", "lastProbeTime": null}],
            "containerStatuses": [{"name": "c", "restartCount": 0}]});
        let mut pod = PodReports::new("u", Some(stored), 1);
        pod.report(status("Running", 0));
        assert_eq!(phase_of(pod.poll(Instant::now())), "nothing");
        pod.report(status("Running", 1));
        assert_eq!(phase_of(pod.poll(Instant::now())), "Running");
    }

    #[test]
    fn patch_clears_what_went_away() {
        let server =
            json!({"reason": "Evicted", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}]});
        let now = json!({"phase": "Running", "podIPs": [{"ip": "10.0.0.2"}],
            "conditions": [{"type": "Ready", "status": "True"}]});
        let expected = json!({"metadata": {"uid": "u"}, "status": {
            "phase": "Running", "reason": null,
            "podIPs": [{"ip": "10.0.0.2"}, {"ip": "10.0.0.1", "$patch": "delete"}],
            "$setElementOrder/conditions": [{"type": "Ready"}],
            "conditions": [{"type": "Ready", "status": "True", "reason": null, "message": null}]}});
        assert_eq!(patch("u", &now, Some(&server)), expected);
    }
}
