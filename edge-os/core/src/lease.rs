//! The node's lease: the sign of life that the cluster reads.
//!
//! States: `Query` (what does the cluster have?) -> `Insert` if nothing, else `Update`; every 10 s an update; a
//! conflict leads back to `Query`. Never stored; a lease is of no use after a restart.
//!
//! Source: kubernetes/component-helpers apimachinery/lease/controller.go; golden session, `lease` messages.

use crate::Now;
use serde_json::{Value, json};
use skerry_protocol::{MessageId, Operation};
use std::time::{Duration, Instant};

/// `spec.leaseDurationSeconds`.
pub const DURATION_S: u32 = 40;
/// Time between two renewals: a quarter of the duration, as kubelet does.
pub const RENEW_INTERVAL: Duration = Duration::from_secs(10);
/// Time after which a renewal without reply is tried again.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two tries when the cluster refuses.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// The lease of one node.
#[derive(Debug)]
pub struct Lease {
    node: String,
    state: State,
    flight: Option<(MessageId, Instant)>,
    next: Instant,
    renewed: Option<Instant>,
}

#[derive(Debug)]
enum State {
    Query,
    Insert,
    Update(Value),
}

impl Lease {
    /// Due at once.
    pub fn new(node: &str, now: Instant) -> Self {
        Self { node: node.into(), state: State::Query, flight: None, next: now, renewed: None }
    }

    /// The link is new: renew now. The known lease is tried first, which saves a round trip.
    pub fn handle_connected(&mut self, now: Instant) {
        self.flight = None;
        self.next = now;
    }

    /// When the cluster took the lease last.
    pub fn renewed(&self) -> Option<Instant> {
        self.renewed
    }

    /// Returns operation and content of the message that is due; the caller sends it and calls [`Self::sent`].
    pub fn poll(&mut self, now: Now, node_uid: Option<&str>) -> Option<(Operation, Value)> {
        if self.flight.as_ref().is_some_and(|(_, deadline)| *deadline <= now.mono) {
            self.flight = None;
            self.state = State::Query; // whether the update was done is not known
        }
        if self.flight.is_some() || self.next > now.mono {
            return None;
        }
        Some(match &self.state {
            State::Query => (Operation::Query, Value::Null),
            State::Insert => {
                let metadata = json!({"name": self.node, "namespace": "kube-node-lease"});
                (Operation::Insert, self.renewal(json!({ "metadata": metadata }), now, node_uid))
            }
            State::Update(lease) => (Operation::Update, self.renewal(lease.clone(), now, node_uid)),
        })
    }

    /// The message of the last poll is on its way as `id`.
    pub fn sent(&mut self, id: MessageId, now: Instant) {
        self.flight = Some((id, now + REPLY_TIMEOUT));
        self.next = now + RENEW_INTERVAL;
    }

    /// Whether `parent` is the message in flight.
    pub fn is_mine(&self, parent: &str) -> bool {
        self.flight.as_ref().is_some_and(|(id, _)| id == parent)
    }

    /// Takes the reply to the message in flight: the lease as it is now, or the code of the refusal.
    pub fn handle_reply(&mut self, now: Instant, reply: Result<Value, u16>) {
        self.flight = None;
        let queried = matches!(self.state, State::Query | State::Insert);
        self.state = match reply {
            Ok(lease) if lease.is_object() => {
                match self.state {
                    State::Query => self.next = now, // now that it is known, renew it
                    _ => self.renewed = Some(now),
                }
                State::Update(lease)
            }
            Err(404) => {
                self.next = now;
                State::Insert
            }
            Err(409) if !queried => {
                self.next = now;
                State::Query
            }
            _ => {
                self.next = now + RETRY_INTERVAL;
                State::Query
            }
        };
    }

    /// When to poll again.
    pub fn poll_timeout(&self) -> Instant {
        self.flight.as_ref().map_or(self.next, |(_, deadline)| *deadline)
    }

    fn renewal(&self, mut lease: Value, now: Now, node_uid: Option<&str>) -> Value {
        lease["spec"]["holderIdentity"] = json!(self.node);
        lease["spec"]["leaseDurationSeconds"] = json!(DURATION_S);
        lease["spec"]["renewTime"] = json!(format!("{:.6}", now.wall));
        if let Some(uid) = node_uid {
            lease["metadata"]["ownerReferences"] =
                json!([{"apiVersion": "v1", "kind": "Node", "name": self.node, "uid": uid}]);
        }
        if let Some(metadata) = lease["metadata"].as_object_mut() {
            metadata.remove("managedFields");
        }
        lease
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(mono: Instant) -> Now {
        Now { mono, wall: "2026-11-22T16:23:31.770624Z".parse().expect("a time") }
    }

    fn send(lease: &mut Lease, now: Instant) -> (Operation, Value) {
        let (operation, content) = lease.poll(at(now), Some("n")).expect("something is due");
        lease.sent("m".into(), now);
        (operation, content)
    }

    #[test]
    fn absent_lease_is_queried_inserted_and_then_updated_every_ten_seconds() {
        let start = Instant::now();
        let mut lease = Lease::new("edge1", start);
        assert_eq!(send(&mut lease, start).0, Operation::Query);
        lease.handle_reply(start, Err(404));
        let (operation, content) = send(&mut lease, start);
        assert_eq!(operation, Operation::Insert);
        let expected = json!({
            "metadata": {"name": "edge1", "namespace": "kube-node-lease",
                "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "edge1", "uid": "n"}]},
            "spec": {"holderIdentity": "edge1", "leaseDurationSeconds": 40, "renewTime": "2026-11-22T16:23:31.770624Z"}});
        assert_eq!(content, expected);
        let mut stored = content;
        stored["metadata"]["resourceVersion"] = json!("7");
        lease.handle_reply(start, Ok(stored));
        assert_eq!(lease.renewed(), Some(start));
        assert_eq!(lease.poll(at(start), None), None);
        assert_eq!(lease.poll_timeout(), start + RENEW_INTERVAL);
        let (operation, content) = send(&mut lease, start + RENEW_INTERVAL);
        assert_eq!(operation, Operation::Update);
        assert_eq!(content["metadata"]["resourceVersion"], "7");
    }

    #[test]
    fn conflict_and_silence_lead_back_to_a_query() {
        let start = Instant::now();
        let mut lease = Lease::new("edge1", start);
        send(&mut lease, start);
        lease.handle_reply(start, Ok(json!({"metadata": {"resourceVersion": "7"}})));
        assert_eq!(send(&mut lease, start).0, Operation::Update);
        lease.handle_reply(start, Err(409));
        assert_eq!(send(&mut lease, start).0, Operation::Query);
        let later = start + REPLY_TIMEOUT;
        assert_eq!(send(&mut lease, later).0, Operation::Query);
    }

    #[test]
    fn refusal_is_not_answered_in_a_tight_loop() {
        let start = Instant::now();
        let mut lease = Lease::new("edge1", start);
        send(&mut lease, start);
        lease.handle_reply(start, Err(403));
        assert_eq!(lease.poll_timeout(), start + RETRY_INTERVAL);
    }
}
