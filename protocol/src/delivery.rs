//! Delivery of messages from the cloud to one node over one connection.
//!
//! A message that wants an acknowledgement is written, written again every [`RETRY_INTERVAL`], and put back at the end
//! of the queue when [`WRITES_MAX`] writes have stayed unanswered. One such message is in flight at a time, so a node
//! sees them in the order they were queued. A queued version of an object that has not been written yet is replaced by
//! the next version of the same object. Messages that want no acknowledgement pass all others, but for the response to
//! a digest: it tells the node that it holds everything, so it leaves when everything queued before it is acknowledged.
//!
//! No I/O and no clock: call [`Delivery::queue`] and [`Delivery::handle_ack`], then drain [`Delivery::poll_transmit`]
//! and [`Delivery::poll_event`], then sleep until [`Delivery::poll_timeout`]. The hub's session task is the caller in
//! production, the tests are the other one. It never reads an object beyond `metadata.uid`, and it does not outlive a
//! connection: what was not acknowledged when the link broke is found again by the next resume.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/cloudhub/session/node_session.go and
//! cloud/pkg/cloudhub/dispatcher/message_dispatcher.go. Ours differs in one point on purpose: the class is read from
//! the type segment, not from any substring of the resource, so a ConfigMap named `membership` is acknowledged.

use crate::message::{Message, Operation};
use serde::Deserialize;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time between two writes of the same message.
pub const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Writes of one message, the first one included, before the next message gets its turn.
pub const WRITES_MAX: u32 = 5;
/// Messages waiting for one node. A node runs about a hundred pods, so this is reached only by a node that has stopped
/// answering while its objects come and go; [`Delivery::queue`] refuses more, and the owner ends the session.
pub const WAITING_MAX: usize = 10_000;

/// What became of a message.
#[derive(Debug, Clone)]
pub enum Event {
    /// The node acknowledged it.
    Delivered(Arc<Message>),
    /// Every write stayed unanswered; the message is at the end of the queue again.
    Unanswered(Arc<Message>),
    /// Every write stayed unanswered and nobody needs it any more: a newer version of the object is queued, or it was
    /// the answer to a request that the node has given up by now.
    Dropped(Arc<Message>),
}

/// More than [`WAITING_MAX`] messages wait for this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {WAITING_MAX} messages wait for the node")]
pub struct QueueFull;

/// One connection's queue and the message now in flight.
#[derive(Debug, Default)]
pub struct Delivery {
    passing: VecDeque<Arc<Message>>,
    waiting: VecDeque<Waiting>,
    flight: Option<Flight>,
    events: VecDeque<Event>,
}

#[derive(Debug)]
struct Waiting {
    message: Arc<Message>,
    kind: Kind,
}

#[derive(Debug)]
struct Flight {
    waiting: Waiting,
    writes: u32,
    next_write: Instant,
}

/// What a message means to others about the same resource.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// A version of an object; a newer one makes it pointless.
    Version { uid: String },
    /// The end of an object; nothing may take its place.
    Delete { uid: String },
    /// The answer to one request; somebody waits for exactly this message.
    Answer,
    /// Written once, and only when everything that was queued before it is acknowledged.
    Barrier,
}

impl Delivery {
    /// Takes one more message for the node.
    ///
    /// # Errors
    ///
    /// [`QueueFull`] at the bound; the message is not taken, and the owner has to end the session, because a resume
    /// finds what was missed and a gap would not be noticed otherwise.
    pub fn queue(&mut self, message: Message) -> Result<(), QueueFull> {
        if self.waiting.len() + self.passing.len() >= WAITING_MAX {
            return Err(QueueFull);
        }
        let message = Arc::new(message);
        if is_barrier(&message) {
            self.waiting.push_back(Waiting { message, kind: Kind::Barrier });
            return Ok(());
        }
        if !ack_required(&message) {
            self.passing.push_back(message);
            return Ok(());
        }
        let kind = Kind::of(&message);
        let resource = &message.route.resource;
        let older =
            self.waiting.iter_mut().rev().find(|older| older.message.route.resource == *resource);
        match older {
            Some(older) if older.kind.is_replaced_by(&kind) => *older = Waiting { message, kind },
            _ => self.waiting.push_back(Waiting { message, kind }),
        }
        Ok(())
    }

    /// Takes the acknowledgement of `parent`. One for anything that is not in flight or waiting is late and changes
    /// nothing.
    pub fn handle_ack(&mut self, parent: &str) {
        let in_flight = |flight: &mut Flight| flight.waiting.message.header.msg_id == parent;
        if let Some(flight) = self.flight.take_if(in_flight) {
            self.events.push_back(Event::Delivered(flight.waiting.message));
            return;
        }
        // The last write of a message that went back to the queue was answered after all.
        let position =
            self.waiting.iter().position(|waiting| waiting.message.header.msg_id == parent);
        if let Some(waiting) = position.and_then(|position| self.waiting.remove(position)) {
            self.events.push_back(Event::Delivered(waiting.message));
        }
    }

    /// Returns the next message to write at `now`, if one is due.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Arc<Message>> {
        if let Some(message) = self.passing.pop_front() {
            return Some(message);
        }
        let spent = |flight: &mut Flight| flight.writes == WRITES_MAX && flight.next_write <= now;
        if let Some(flight) = self.flight.take_if(spent) {
            self.give_up(flight.waiting);
        }
        if self.flight.is_none() {
            let waiting = self.waiting.pop_front()?;
            if waiting.kind == Kind::Barrier {
                return Some(waiting.message);
            }
            self.flight = Some(Flight { waiting, writes: 0, next_write: now });
        }
        let flight = self.flight.as_mut().filter(|flight| flight.next_write <= now)?;
        flight.writes += 1;
        flight.next_write = now + RETRY_INTERVAL;
        Some(Arc::clone(&flight.waiting.message))
    }

    /// Returns what became of a message, oldest first.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Self::poll_transmit`] has something to do next; `None` when only an input can change that. Right after
    /// [`Self::poll_transmit`] returned `None`, nothing waits unless something is in flight.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.flight.as_ref().map(|flight| flight.next_write)
    }

    /// Messages that wait or are in flight.
    pub fn len(&self) -> usize {
        self.passing.len() + self.waiting.len() + usize::from(self.flight.is_some())
    }

    /// Whether nothing waits and nothing is in flight.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts an unanswered message back. Everything else about the same resource moves behind it: the order per
    /// resource stays, and a node that cannot take this resource still gets all others.
    fn give_up(&mut self, unanswered: Waiting) {
        let resource = unanswered.message.route.resource.clone();
        let same = |waiting: &Waiting| waiting.message.route.resource == resource;
        let superseded = self
            .waiting
            .iter()
            .find(|waiting| same(waiting))
            .is_some_and(|next| unanswered.kind.is_replaced_by(&next.kind));
        // Whatever becomes of it, the node does not have the object, and a barrier speaks about that.
        let is_barrier = |waiting: &Waiting| waiting.kind == Kind::Barrier;
        let (barriers, others) = self.waiting.drain(..).partition::<Vec<_>, _>(is_barrier);
        if superseded || unanswered.kind == Kind::Answer {
            self.events.push_back(Event::Dropped(unanswered.message));
            self.waiting.extend(others);
        } else {
            self.events.push_back(Event::Unanswered(Arc::clone(&unanswered.message)));
            let (behind, others) = others.into_iter().partition::<Vec<_>, _>(same);
            self.waiting.extend(others);
            self.waiting.push_back(unanswered);
            self.waiting.extend(behind);
        }
        self.waiting.extend(barriers);
    }
}

impl Kind {
    fn of(message: &Message) -> Self {
        if !message.header.parent_msg_id.is_empty() {
            return Self::Answer;
        }
        let uid = uid(message);
        match message.operation() {
            Some(Operation::Delete) => Self::Delete { uid },
            _ => Self::Version { uid },
        }
    }

    fn is_replaced_by(&self, newer: &Self) -> bool {
        match (self, newer) {
            (Self::Version { .. }, Self::Version { .. }) => true,
            (Self::Version { uid } | Self::Delete { uid }, Self::Delete { uid: newer }) => {
                uid == newer
            }
            _ => false,
        }
    }
}

/// `metadata.uid` of the object in the body, empty when there is none.
fn uid(message: &Message) -> String {
    #[derive(Deserialize)]
    struct Object {
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    struct Metadata {
        #[serde(default)]
        uid: String,
    }
    message.content_as::<Object>().map(|object| object.metadata.uid).unwrap_or_default()
}

/// Whether a message speaks about all that were queued before it.
fn is_barrier(message: &Message) -> bool {
    let route = &message.route;
    route.resource == crate::digest::RESOURCE && message.operation() == Some(Operation::Response)
}

/// Whether the node acknowledges this message, so that it has to be written again until it does.
pub fn ack_required(message: &Message) -> bool {
    let route = &message.route;
    let never = ["membership", "k8s/ca.crt", crate::digest::RESOURCE];
    if never.contains(&route.resource.as_str())
        || route.resource.ends_with("/twin/cloud_updated")
        || route.group == "user"
        || ["taskmanager", "nodeupgradejobcontroller"].contains(&route.source.as_str())
    {
        return false;
    }
    let volume_operations = [
        "createvolume",
        "deletevolume",
        "controllerpublishvolume",
        "controllerunpublishvolume",
        "applicationResponse",
    ];
    let operation = message.operation();
    if volume_operations.contains(&route.operation.as_str()) || operation == Some(Operation::Error)
    {
        return false;
    }
    if operation == Some(Operation::Response) && is_ok_or_error(message.content.get()) {
        return false;
    }
    // The wire form is `namespace/type[/name]`; the second segment decides, whatever the name is.
    match route.resource.split('/').nth(1).unwrap_or_default() {
        "podlist" | "serviceaccounttoken" => false,
        _ if route.source != "edgecontroller" => true,
        "lease" | "nodepatch" | "podpatch" | "podstatus" | "certificatesigningrequest" => false,
        "node" => operation == Some(Operation::Update),
        "pod" => operation != Some(Operation::Response),
        _ => true,
    }
}

fn is_ok_or_error(content: &str) -> bool {
    content == "\"OK\"" || content == "{}" || content.starts_with("{\"ErrStatus\"")
}

#[cfg(test)]
mod tests;
