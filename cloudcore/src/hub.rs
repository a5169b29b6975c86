//! The one task that owns what every node should have.
//!
//! Watches, sessions and requests speak to it through [`Hub`]; nothing else touches the state, so there is no lock. It
//! never waits for a node: a session that does not take its messages is ended, and its next connection starts over.

use crate::api;
use crate::session::Command;
use kube::api::ListParams;
use serde_json::Value;
use skerry_cloudcore_core::downstream::{Access, Downstream, Input, Key, Kind, Output, SessionId};
use skerry_protocol::capability::Capabilities;
use std::collections::HashMap;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Inputs on their way to the hub. Those who send wait when it is full: watches and sessions can.
const EVENTS_MAX: usize = 1024;
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
    /// To which node is this pod bound, and what is its uid?
    Binding { pod: Key, answer: oneshot::Sender<Option<(String, String)>> },
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

    pub(crate) async fn binding(&self, pod: &Key) -> Option<(String, String)> {
        let pod = pod.clone();
        self.ask(|answer| Event::Binding { pod, answer }).await.flatten()
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
    stop: CancellationToken,
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
        client,
        stop: stop.clone(),
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
                if answer.send(session).is_err() {
                    self.sessions.remove(&session);
                    return;
                }
                self.handle(Input::Connected { node, session, capabilities });
            }
            Event::Access { node, key, answer } => {
                let _ = answer.send(self.downstream.access(&node, &key));
            }
            Event::Binding { pod, answer } => {
                let binding = self.downstream.binding(&pod);
                let _ = answer.send(binding.map(|(node, uid)| (node.to_owned(), uid.to_owned())));
            }
        }
    }

    fn handle(&mut self, input: Input) {
        if let Input::Disconnected { session, .. } = &input {
            self.sessions.remove(session);
        }
        let now_ms = jiff::Timestamp::now().as_millisecond();
        self.downstream.handle(input, Instant::now(), now_ms);
    }

    fn drain(&mut self) {
        while let Some(output) = self.downstream.poll_output() {
            match output {
                Output::Send { node, session, message } => {
                    self.command(node, session, Command::Send(message));
                }
                Output::Close { node, session, reason } => {
                    self.command(node, session, Command::Close(reason));
                    self.sessions.remove(&session);
                }
                Output::Fetch(key) => self.fetch(key),
                Output::Relist(node) => self.relist(node),
            }
        }
    }

    fn command(&mut self, node: String, session: SessionId, command: Command) {
        let Some(commands) = self.sessions.get(&session) else { return };
        if commands.try_send(command).is_err() {
            // It ended, or does not keep up. Without its sender the session closes the connection.
            self.handle(Input::Disconnected { node, session });
        }
    }

    fn fetch(&self, key: Key) {
        let (hub, stop) = (self.hub.clone(), self.stop.clone());
        let api = api::objects(&self.client, key.kind(), key.namespace());
        tokio::spawn(async move {
            let read = until_read(&stop, || api.get_opt(key.name())).await;
            if let Some(object) = read {
                hub.input(Input::Fetched(key, object.map(api::to_json))).await;
            }
        });
    }

    fn relist(&self, node: String) {
        let (hub, stop) = (self.hub.clone(), self.stop.clone());
        let api = api::all_objects(&self.client, Kind::Pod);
        tokio::spawn(async move {
            let of_node = ListParams::default().fields(&format!("spec.nodeName={node}"));
            if let Some(list) = until_read(&stop, || api.list(&of_node)).await {
                let pods: Vec<Value> = list.items.into_iter().map(api::to_json).collect();
                hub.input(Input::Relisted(node, pods)).await;
            }
        });
    }
}

/// Reads until the API answers; `None` when it is time to stop.
async fn until_read<T, F>(stop: &CancellationToken, read: impl Fn() -> F) -> Option<T>
where
    F: Future<Output = kube::Result<T>>,
{
    let mut pause = RETRY_MIN;
    loop {
        let result = tokio::select! {
            () = stop.cancelled() => return None,
            result = read() => result,
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
