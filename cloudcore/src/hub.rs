//! The one task that owns what every node should have.
//!
//! Watches, sessions and requests speak to it through [`Hub`]; nothing else touches the state, so there is no lock. It
//! never waits for a node: a session is given no more than it can hold, one that does not take even that is ended, and
//! its next connection starts over. Reads and writes of the API run beside it.

use crate::api;
use crate::objectsync::Writer;
use crate::session::Command;
use kube::api::ListParams;
use serde_json::Value;
use skerry_cloudcore_core::downstream::{
    Access, Backlog, Downstream, Input, Key, Kind, Output, SessionId, Totals,
};
use skerry_cloudcore_core::objectsync::{Word, Write};
use skerry_protocol::Message;
use skerry_protocol::capability::Capabilities;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Inputs on their way to the hub. Those who send wait when it is full: watches and sessions can.
const EVENTS_MAX: usize = 1024;
/// Reads of single objects and of the pods of single nodes that wait for the API at the same time: when CloudCore has
/// started, each KubeEdge node that connects needs one.
const READS_MAX: usize = 32;
/// First pause before a failed read of the API is tried again; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// What the hub's task is told or asked.
pub(crate) enum Event {
    /// For the decisions.
    Input(Input),
    /// A node has connected; the number of its session is the answer.
    Connected {
        node: String,
        capabilities: Capabilities,
        commands: mpsc::Sender<Command>,
        answer: oneshot::Sender<SessionId>,
    },
    /// May this node read this ConfigMap or Secret?
    Access { node: String, key: Key, answer: oneshot::Sender<Access> },
    /// To which node is this pod or device bound, and what is its uid?
    Binding { key: Key, answer: oneshot::Sender<Option<(String, String)>> },
    /// A message that is no state of the node.
    Send { node: String, message: Box<Message> },
    /// Does this node have pods in this namespace?
    HasPods { node: String, namespace: String, answer: oneshot::Sender<bool> },
    /// Which devices does this node have?
    Membership { node: String, answer: oneshot::Sender<Message> },
    /// What waits for this node?
    Backlog { node: String, answer: oneshot::Sender<Option<Backlog>> },
    /// How much is there?
    Metrics { answer: oneshot::Sender<Metrics> },
}

/// What the hub has and has done, for the monitor. Displays as the lines of a Prometheus exposition.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Metrics {
    pub(crate) totals: Totals,
    /// Messages given to sessions since the start.
    pub(crate) sent: u64,
    /// Messages acknowledged since the start.
    pub(crate) acked: u64,
    /// Connections opened since the start.
    pub(crate) connections: u64,
    /// Connections that the hub has ended since the start.
    pub(crate) closed: u64,
    /// Reads of the API that the hub asked for since the start.
    pub(crate) reads: u64,
}

impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { totals, sent, acked, connections, closed, reads } = *self;
        let gauges = [
            ("nodes", totals.nodes),
            ("nodes_connected", totals.connected),
            ("placed_objects", totals.placed),
            ("shared_objects", totals.shared),
            ("outstanding_messages", totals.outstanding),
            ("outstanding_bytes", totals.outstanding_bytes),
            ("waiting_objects", totals.waiting),
            ("objectsyncs", totals.syncs),
            ("objectsyncs_due", totals.syncs_due),
        ];
        let counters = [
            ("messages_sent_total", sent),
            ("messages_acked_total", acked),
            ("connections_total", connections),
            ("connections_closed_total", closed),
            ("api_reads_total", reads),
            ("objectsync_writes_total", totals.sync_writes),
        ];
        for (name, value) in gauges {
            writeln!(f, "# TYPE skerry_hub_{name} gauge\nskerry_hub_{name} {value}")?;
        }
        for (name, value) in counters {
            writeln!(f, "# TYPE skerry_hub_{name} counter\nskerry_hub_{name} {value}")?;
        }
        Ok(())
    }
}

/// The way to the hub's task.
#[derive(Clone)]
pub(crate) struct Hub {
    events: mpsc::Sender<Event>,
}

impl Hub {
    pub(crate) fn new() -> (Self, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        (Self { events }, receiver)
    }

    /// Gives an input; lost when the hub has ended.
    pub(crate) async fn input(&self, input: Input) {
        let _ = self.events.send(Event::Input(input)).await;
    }

    pub(crate) async fn connected(
        &self,
        node: &str,
        capabilities: Capabilities,
        commands: mpsc::Sender<Command>,
    ) -> Option<SessionId> {
        let node = node.to_owned();
        self.ask(|answer| Event::Connected { node, capabilities, commands, answer }).await
    }

    pub(crate) async fn access(&self, node: &str, key: &Key) -> Option<Access> {
        let (node, key) = (node.to_owned(), key.clone());
        self.ask(|answer| Event::Access { node, key, answer }).await
    }

    /// Name of the node to which a pod or a device is bound, and its uid.
    pub(crate) async fn binding(&self, key: &Key) -> Option<(String, String)> {
        let key = key.clone();
        self.ask(|answer| Event::Binding { key, answer }).await.flatten()
    }

    /// Gives a message that is no state of the node, and that nobody remembers, to its session; lost when it has none.
    pub(crate) async fn send(&self, node: &str, message: Message) {
        let (node, message) = (node.to_owned(), Box::new(message));
        let _ = self.events.send(Event::Send { node, message }).await;
    }

    /// Whether a node has pods in this namespace.
    pub(crate) async fn has_pods(&self, node: &str, namespace: &str) -> bool {
        let (node, namespace) = (node.to_owned(), namespace.to_owned());
        self.ask(|answer| Event::HasPods { node, namespace, answer }).await.unwrap_or_default()
    }

    /// The list of a node's devices as a message for a KubeEdge edge that asks for it.
    pub(crate) async fn membership(&self, node: &str) -> Option<Message> {
        let node = node.to_owned();
        self.ask(|answer| Event::Membership { node, answer }).await
    }

    /// What waits for a node; `None` when it is not connected.
    pub(crate) async fn backlog(&self, node: &str) -> Option<Backlog> {
        let node = node.to_owned();
        self.ask(|answer| Event::Backlog { node, answer }).await.flatten()
    }

    pub(crate) async fn metrics(&self) -> Option<Metrics> {
        self.ask(|answer| Event::Metrics { answer }).await
    }

    async fn ask<T>(&self, event: impl FnOnce(oneshot::Sender<T>) -> Event) -> Option<T> {
        let (sender, answer) = oneshot::channel();
        self.events.send(event(sender)).await.ok()?;
        answer.await.ok()
    }
}

struct Owner {
    downstream: Downstream,
    sessions: HashMap<SessionId, mpsc::Sender<Command>>,
    next_session: SessionId,
    hub: Hub,
    client: kube::Client,
    writer: Arc<Writer>,
    reads: Arc<Semaphore>,
    stop: CancellationToken,
    metrics: Metrics,
}

/// Runs the hub until `stop`.
pub(crate) async fn run(
    mut events: mpsc::Receiver<Event>,
    hub: Hub,
    client: kube::Client,
    stop: CancellationToken,
) {
    let mut owner = Owner {
        downstream: Downstream::default(),
        sessions: HashMap::new(),
        next_session: 1,
        hub,
        writer: Arc::new(Writer::new(client.clone())),
        reads: Arc::new(Semaphore::new(READS_MAX)),
        client,
        stop: stop.clone(),
        metrics: Metrics::default(),
    };
    loop {
        let timeout = owner.downstream.poll_timeout();
        let event = tokio::select! {
            () = stop.cancelled() => return,
            () = sleep_until(timeout) => Event::Input(Input::Tick),
            event = events.recv() => event.expect("the owner holds a sender"),
        };
        owner.apply(event);
        owner.drain();
    }
}

impl Owner {
    fn apply(&mut self, event: Event) {
        match event {
            Event::Input(input) => self.handle(input),
            Event::Connected { node, capabilities, commands, answer } => {
                let session = self.next_session;
                self.next_session += 1;
                self.sessions.insert(session, commands);
                self.metrics.connections += 1;
                if answer.send(session).is_err() {
                    self.sessions.remove(&session);
                    return;
                }
                self.handle(Input::Connected { node, session, capabilities });
            }
            Event::Access { node, key, answer } => {
                let _ = answer.send(self.downstream.access(&node, &key));
            }
            Event::Binding { key, answer } => {
                let binding = self.downstream.binding(&key);
                let _ = answer.send(binding.map(|(node, uid)| (node.to_owned(), uid.to_owned())));
            }
            Event::Send { node, message } => {
                if let Some(session) = self.downstream.session(&node) {
                    self.metrics.sent += 1;
                    self.command(&node, session, Command::Send(message));
                }
            }
            Event::HasPods { node, namespace, answer } => {
                let _ = answer.send(self.downstream.has_pods(&node, &namespace));
            }
            Event::Membership { node, answer } => {
                let now_ms = jiff::Timestamp::now().as_millisecond();
                let _ = answer.send(self.downstream.membership(&node, now_ms));
            }
            Event::Backlog { node, answer } => {
                let _ = answer.send(self.downstream.backlog(&node));
            }
            Event::Metrics { answer } => {
                let totals = self.downstream.totals();
                let _ = answer.send(Metrics { totals, ..self.metrics });
            }
        }
    }

    fn handle(&mut self, input: Input) {
        match &input {
            Input::Disconnected { session, .. } => {
                self.sessions.remove(session);
            }
            Input::Acked { .. } => self.metrics.acked += 1,
            _ => {}
        }
        let now_ms = jiff::Timestamp::now().as_millisecond();
        self.downstream.handle(input, Instant::now(), now_ms);
    }

    fn drain(&mut self) {
        while let Some(output) = self.downstream.poll_output() {
            match output {
                Output::Send { node, session, message } => {
                    self.metrics.sent += 1;
                    self.command(&node, session, Command::Send(message));
                }
                Output::Close { node, session, reason } => {
                    self.metrics.closed += 1;
                    self.command(&node, session, Command::Close(reason));
                    self.sessions.remove(&session);
                }
                Output::Fetch(key) => self.fetch(key),
                Output::Relist(node) => self.relist(node),
                Output::Sync(write) => self.write_sync(write),
            }
        }
    }

    fn command(&mut self, node: &str, session: SessionId, command: Command) {
        let Some(commands) = self.sessions.get(&session) else { return };
        if commands.try_send(command).is_err() {
            // It ended, or does not keep up. Without its sender the session closes the connection.
            self.handle(Input::Disconnected { node: node.to_owned(), session });
        }
    }

    fn write_sync(&self, write: Write) {
        let (hub, writer, stop) = (self.hub.clone(), Arc::clone(&self.writer), self.stop.clone());
        tokio::spawn(async move {
            let outcome = tokio::select! {
                () = stop.cancelled() => return,
                outcome = writer.write(&write) => outcome,
            };
            let Write { node, id, .. } = write;
            hub.input(Input::Sync(Word::Written { node, id, outcome })).await;
        });
    }

    fn fetch(&mut self, key: Key) {
        self.metrics.reads += 1;
        let (hub, stop, turns) = (self.hub.clone(), self.stop.clone(), Arc::clone(&self.reads));
        let api = api::objects(&self.client, key.kind(), key.namespace());
        tokio::spawn(async move {
            // A list of one tells its version also when there is no such object.
            let of_name = ListParams::default().fields(&format!("metadata.name={}", key.name()));
            if let Some(list) = until_read(&turns, &stop, || api.list(&of_name)).await {
                let at = list.metadata.resource_version.and_then(|version| version.parse().ok());
                let object = list.items.into_iter().next().map(api::to_json);
                hub.input(Input::Fetched(key, object, at)).await;
            }
        });
    }

    fn relist(&mut self, node: String) {
        self.metrics.reads += 1;
        let (hub, stop, turns) = (self.hub.clone(), self.stop.clone(), Arc::clone(&self.reads));
        let api = api::all_objects(&self.client, Kind::Pod);
        tokio::spawn(async move {
            let of_node = ListParams::default().fields(&format!("spec.nodeName={node}"));
            if let Some(list) = until_read(&turns, &stop, || api.list(&of_node)).await {
                let at = list.metadata.resource_version.and_then(|version| version.parse().ok());
                let pods: Vec<Value> = list.items.into_iter().map(api::to_json).collect();
                hub.input(Input::Relisted(node, pods, at)).await;
            }
        });
    }
}

/// Reads until the API answers, each time in its turn; `None` when it is time to stop.
async fn until_read<T, F>(
    turns: &Semaphore,
    stop: &CancellationToken,
    read: impl Fn() -> F,
) -> Option<T>
where
    F: Future<Output = kube::Result<T>>,
{
    let mut pause = RETRY_MIN;
    loop {
        let in_turn = async {
            let _turn = turns.acquire().await.ok()?;
            Some(read().await)
        };
        let result = tokio::select! {
            () = stop.cancelled() => return None,
            result = in_turn => result?,
        };
        match result {
            Ok(value) => return Some(value),
            Err(error) => {
                tracing::warn!(%error, ?pause, "could not read from the API, trying again");
            }
        }
        tokio::select! {
            () = stop.cancelled() => return None,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(RETRY_MAX);
    }
}

/// Sleeps until `deadline`, or for ever without one.
pub(crate) async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
