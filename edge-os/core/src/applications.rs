//! Requests of the node's own API to the cloud, and what it watches there.
//!
//! A request is one message, its answer another with the same parent; a watch is a request whose answer only says that
//! objects will be pushed. Nothing survives a lost link: whoever asked gets an error and serves what is stored. What is
//! watched is told again after each connect, because a hub keeps that in memory only.
//!
//! The caller is the agent's loop, for `skerry_edge`'s local API. Content is opaque here.
//!
//! Source: kubeedge/kubeedge, edge/pkg/metamanager/metaserver/agent/agent.go, pkg/metaserver/application.go.

use crate::Now;
use serde_json::{Map, Value};
use skerry_protocol::{Message, MessageId, Operation};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Requests that may wait for their answer; more are refused, so that no client floods the link.
pub const REQUESTS_MAX: usize = 64;
/// Things that may be watched in the cloud.
pub const WATCHES_MAX: usize = 256;
/// How long an answer may take.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// What a client is told while there is no link.
pub const NOT_CONNECTED: &str = "connection lost between EdgeCore and CloudCore";

/// `route.resource` of a request.
const REQUEST_RESOURCE: &str = "null";
/// `route.resource` of the list of what is watched.
const SYNC_RESOURCE: &str = "watchapp/sync";

/// Number of a request, for whoever waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// An answer: the application as the cloud filled it in, or why there is none.
pub type Answer = Result<Value, String>;

#[derive(Debug)]
struct Request {
    /// Digest of the request; the same request shares the answer.
    id: String,
    content: Value,
    tickets: Vec<Ticket>,
    sent: Option<MessageId>,
    deadline: Instant,
}

/// Requests under way, and watches in force.
#[derive(Debug, Default)]
pub struct Applications {
    connected: bool,
    last: u64,
    requests: Vec<Request>,
    /// By id: the application, and how many clients want it.
    watches: BTreeMap<String, (Value, usize)>,
    sync_due: bool,
    answers: VecDeque<(Ticket, Answer)>,
}

impl Applications {
    /// Asks the cloud. The answer comes from [`Self::poll_answer`], at once without a link.
    pub fn request(&mut self, now: Now, id: &str, content: Value) -> Ticket {
        self.last += 1;
        let ticket = Ticket(self.last);
        if !self.connected {
            self.answers.push_back((ticket, Err(NOT_CONNECTED.into())));
        } else if let Some(same) = self.requests.iter_mut().find(|request| request.id == id) {
            same.tickets.push(ticket);
        } else if self.requests.len() >= REQUESTS_MAX {
            let text = format!("{REQUESTS_MAX} requests to the cloud are under way already");
            self.answers.push_back((ticket, Err(text)));
        } else {
            let deadline = now.mono + TIMEOUT;
            let tickets = vec![ticket];
            self.requests.push(Request { id: id.into(), content, tickets, sent: None, deadline });
        }
        ticket
    }

    /// Wants what `content` describes to be pushed from now on, until as many calls of [`Self::unwatch`].
    ///
    /// Returns whether it is kept; [`WATCHES_MAX`] are.
    pub fn watch(&mut self, id: &str, content: Value) -> bool {
        if let Some((_, clients)) = self.watches.get_mut(id) {
            *clients += 1;
            return true;
        }
        if self.watches.len() >= WATCHES_MAX {
            return false;
        }
        self.watches.insert(id.into(), (content, 1));
        true
    }

    /// One client less wants it.
    pub fn unwatch(&mut self, id: &str) {
        let Some((_, clients)) = self.watches.get_mut(id) else { return };
        *clients -= 1;
        if *clients == 0 {
            self.watches.remove(id);
            self.sync_due = self.connected;
        }
    }

    /// The link is up.
    pub fn handle_connected(&mut self) {
        self.connected = true;
        self.sync_due = !self.watches.is_empty();
    }

    /// The link is down: nobody waits any longer.
    pub fn handle_disconnected(&mut self) {
        self.connected = false;
        self.sync_due = false;
        for request in std::mem::take(&mut self.requests) {
            self.answer(request, Err(NOT_CONNECTED.into()));
        }
    }

    /// Takes a reply; returns whether it was to one of ours.
    pub fn handle_reply(&mut self, message: &Message) -> bool {
        let parent = Some(&message.header.parent_msg_id);
        let found = self.requests.iter().position(|request| request.sent.as_ref() == parent);
        let Some(found) = found else { return message.route.resource == SYNC_RESOURCE };
        let request = self.requests.swap_remove(found);
        let answer = match message.operation() {
            Some(Operation::Error) => Err(message.content.get().to_owned()),
            _ => message.content_as().map_err(|error| error.to_string()),
        };
        self.answer(request, answer);
        true
    }

    fn answer(&mut self, request: Request, answer: Answer) {
        for ticket in request.tickets {
            self.answers.push_back((ticket, answer.clone()));
        }
    }

    /// The next message to send.
    pub fn poll_transmit(&mut self, now: Now) -> Option<Message> {
        if !self.connected {
            return None;
        }
        let message = |resource: &str, content: &Value| {
            let operation = Operation::Application;
            let (source, group) = ("metaserver", "dynamiccontroller");
            Message::new(now.unix_ms(), source, group, operation, resource, content)
        };
        if std::mem::take(&mut self.sync_due) {
            let all: Map<String, Value> = self
                .watches
                .iter()
                .map(|(id, (content, _))| (id.clone(), content.clone()))
                .collect();
            return Some(message(SYNC_RESOURCE, &Value::Object(all)));
        }
        let request = self.requests.iter_mut().find(|request| request.sent.is_none())?;
        let message = message(REQUEST_RESOURCE, &request.content);
        request.sent = Some(message.header.msg_id.clone());
        Some(message)
    }

    /// The next answer for somebody who waits.
    pub fn poll_answer(&mut self, now: Now) -> Option<(Ticket, Answer)> {
        let late = self.requests.iter().position(|request| request.deadline <= now.mono);
        if let Some(late) = late {
            let request = self.requests.swap_remove(late);
            self.answer(
                request,
                Err(format!("no answer from the cloud in {} s", TIMEOUT.as_secs())),
            );
        }
        self.answers.pop_front()
    }

    /// When to call [`Self::poll_answer`] again, if nothing else happens.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.requests.iter().map(|request| request.deadline).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn at(seconds: u64) -> Now {
        static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
        Now { mono: *START + Duration::from_secs(seconds), wall: jiff::Timestamp::UNIX_EPOCH }
    }

    fn reply(to: &Message, content: &Value) -> Message {
        let mut reply = to.response(0, content);
        reply.route.operation = "applicationResponse".into();
        reply.route.resource = "ignore/Application/ignore".into();
        reply
    }

    #[test]
    fn same_request_is_sent_once_and_answered_to_everybody() {
        let mut applications = Applications::default();
        applications.handle_connected();
        let first = applications.request(at(0), "a", json!({"ID": "a"}));
        let second = applications.request(at(1), "a", json!({"ID": "a"}));
        let message = applications.poll_transmit(at(1)).expect("a request");
        assert_eq!(message.route.operation, "null");
        assert_eq!(message.route.resource, "null");
        assert_eq!(message.route.source, "metaserver");
        assert!(applications.poll_transmit(at(1)).is_none());
        assert!(applications.handle_reply(&reply(&message, &json!({"Status": "Approved"}))));
        let mut answered = Vec::new();
        while let Some((ticket, answer)) = applications.poll_answer(at(1)) {
            assert_eq!(answer.expect("an answer")["Status"], "Approved");
            answered.push(ticket);
        }
        assert_eq!(answered, [first, second]);
        assert!(!applications.handle_reply(&reply(&message, &json!({}))), "answered already");
    }

    #[test]
    fn nobody_waits_without_a_link_or_longer_than_ten_seconds() {
        let mut applications = Applications::default();
        let ticket = applications.request(at(0), "a", json!({}));
        assert_eq!(applications.poll_answer(at(0)), Some((ticket, Err(NOT_CONNECTED.into()))));
        applications.handle_connected();
        let late = applications.request(at(0), "a", json!({}));
        assert_eq!(applications.poll_answer(at(9)), None);
        assert_eq!(applications.poll_timeout(), Some(at(10).mono));
        let (ticket, answer) = applications.poll_answer(at(10)).expect("given up");
        assert_eq!((ticket, answer.is_err()), (late, true));
        let cut = applications.request(at(11), "b", json!({}));
        applications.poll_transmit(at(11)).expect("a request");
        applications.handle_disconnected();
        assert_eq!(applications.poll_answer(at(11)).map(|(ticket, _)| ticket), Some(cut));
        assert!(applications.poll_transmit(at(11)).is_none());
    }

    #[test]
    fn watches_are_told_after_each_connect_and_when_one_ends() {
        let mut applications = Applications::default();
        assert!(applications.watch("a", json!({"ID": "a"})) && applications.watch("a", json!({})));
        assert!(applications.watch("b", json!({"ID": "b"})));
        applications.handle_connected();
        let sync = applications.poll_transmit(at(0)).expect("the list of watches");
        assert_eq!(sync.route.resource, "watchapp/sync");
        let all: Value = sync.content_as().expect("a map");
        assert_eq!(all, json!({"a": {"ID": "a"}, "b": {"ID": "b"}}));
        let mut answer = sync.response(0, &json!({}));
        answer.route.operation = "applicationResponse".into();
        assert!(applications.handle_reply(&answer));
        applications.unwatch("a");
        assert!(applications.poll_transmit(at(0)).is_none(), "somebody still watches it");
        applications.unwatch("a");
        applications.unwatch("b");
        let sync = applications.poll_transmit(at(0)).expect("the list of watches");
        assert_eq!(sync.content.get(), "{}");
        applications.unwatch("never");
        for n in 0..WATCHES_MAX {
            assert!(applications.watch(&n.to_string(), json!({})));
        }
        assert!(!applications.watch("more", json!({})));
    }

    #[test]
    fn requests_are_bounded() {
        let mut applications = Applications::default();
        applications.handle_connected();
        for n in 0..REQUESTS_MAX {
            applications.request(at(0), &n.to_string(), json!({}));
        }
        assert_eq!(applications.poll_answer(at(0)), None);
        let ticket = applications.request(at(0), "more", json!({}));
        let (answered, answer) = applications.poll_answer(at(0)).expect("refused");
        assert_eq!((answered, answer.is_err()), (ticket, true));
    }
}
