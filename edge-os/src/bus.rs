//! The event bus: the node's MQTT broker, as far as devices and rules of the cloud need it.
//!
//! Two connections, as in KubeEdge: one that follows topics, one that publishes. Each is dialled again for ever, with a
//! session that the broker keeps, so that a broker that is down, slow or restarted costs delay and nothing else. What is
//! to be published waits in a [`Queue`] with a bound, apart from everything that goes to the hub: deltas in their newest
//! form, of the rest the oldest is dropped first and counted.
//!
//! The twin task is the only caller. MQTT 3.1.1 or 5 ([`wire`]), with or without TLS ([`tls`]); what a topic means is told
//! in [`skerry_edge_core::twin::topic`].
//!
//! Source: kubeedge/kubeedge, edge/pkg/eventbus/mqtt/client.go for keep-alive, quality of service and client names.

mod tls;
mod wire;

use skerry_edge_core::backoff::Backoff;
use skerry_edge_core::twin::Weight;
use skerry_edge_core::twin::payload::PAYLOAD_LEN_MAX;
use skerry_edge_core::twin::topic::FOLLOWED;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use tls::BusTls;
use wire::Heard;

/// Messages that wait for the broker; a document of every property of a busy device for minutes.
pub const QUEUE_MAX: usize = 4096;
/// Their bytes (8 MiB).
pub const QUEUE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Messages from the broker that wait for the twin; then the broker is not read.
pub const INCOMING_MAX: usize = 1024;
/// Topics of rules.
pub const TOPICS_MAX: usize = 10_000;
/// Longest name of a topic, by the standard.
const TOPIC_LEN_MAX: usize = 65_535;
/// Longest packet: a payload, its topic, and a little.
const PACKET_LEN_MAX: usize = PAYLOAD_LEN_MAX + TOPIC_LEN_MAX + 64;
/// As KubeEdge's.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// Seconds that a connect may take.
const CONNECT_TIMEOUT_S: u64 = 5;
/// Pauses between tries to connect; KubeEdge's is 5 s.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));
/// Requests that the library holds: more than messages on the way, so that giving it one never waits.
const REQUESTS_MAX: usize = 256;
/// Messages on the way to the broker and not acknowledged by it.
const INFLIGHT_MAX: u16 = 64;

/// Version of MQTT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// 3.1.1.
    V3,
    /// 5.
    V5,
}

/// Which broker, and as who.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BusConfig {
    /// Host name or address.
    pub host: String,
    /// TCP port, usually 1883.
    pub port: u16,
    /// In which version.
    pub version: Version,
    /// With TLS.
    pub tls: Option<BusTls>,
    /// Name of the connection that follows topics.
    pub subscriber: String,
    /// Name of the connection that publishes.
    pub publisher: String,
    /// User and password; the password counts only with a user.
    pub login: Option<(String, String)>,
    /// Forget at the broker what came while this node was away, as KubeEdge does.
    pub clean_session: bool,
}

/// What came from the broker.
#[derive(Debug)]
pub struct Received {
    /// Its topic.
    pub topic: String,
    /// Its bytes.
    pub payload: Vec<u8>,
}

/// What waits for the broker.
#[derive(Debug, Default)]
pub struct Queue {
    inner: Mutex<Waiting>,
    more: Notify,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct Waiting {
    /// By number, oldest first.
    messages: VecDeque<(String, Vec<u8>)>,
    /// Number of the first.
    first: u64,
    bytes: usize,
    /// Numbers of messages of which only the newest is wanted.
    latest: HashMap<String, u64>,
}

impl Queue {
    /// Takes a message; never waits.
    pub fn push(&self, topic: String, payload: Vec<u8>, weight: Weight) {
        if topic.len() + payload.len() + 64 > PACKET_LEN_MAX || topic.len() > TOPIC_LEN_MAX {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut waiting = self.inner.lock().expect("nobody panics with it");
        if weight == Weight::Latest
            && let Some(number) = waiting.latest.get(&topic).copied()
        {
            waiting.replace(number, payload);
            return;
        }
        while waiting.messages.len() >= QUEUE_MAX || waiting.bytes + payload.len() > QUEUE_BYTES_MAX
        {
            if waiting.pop().is_none() {
                break;
            }
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        let number = waiting.first + waiting.messages.len() as u64;
        if weight == Weight::Latest {
            waiting.latest.insert(topic.clone(), number);
        }
        waiting.bytes += payload.len();
        waiting.messages.push_back((topic, payload));
        drop(waiting);
        self.more.notify_one();
    }

    /// Waits for the next message.
    pub async fn pop(&self) -> (String, Vec<u8>) {
        loop {
            if let Some(message) = self.inner.lock().expect("nobody panics with it").pop() {
                return message;
            }
            self.more.notified().await;
        }
    }

    /// Messages that were dropped since the start.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Waiting {
    fn pop(&mut self) -> Option<(String, Vec<u8>)> {
        let (topic, payload) = self.messages.pop_front()?;
        if self.latest.get(&topic) == Some(&self.first) {
            self.latest.remove(&topic);
        }
        self.first += 1;
        self.bytes -= payload.len();
        Some((topic, payload))
    }

    fn replace(&mut self, number: u64, payload: Vec<u8>) {
        let index = usize::try_from(number - self.first).expect("a place in memory");
        let (_, old) = &mut self.messages[index];
        self.bytes = self.bytes + payload.len() - old.len();
        *old = payload;
    }
}

/// Serves the bus until `stop`: publishes what is in `queue`, gives what comes to `incoming`, and follows `topics`
/// beside those of devices.
pub async fn run(
    config: BusConfig,
    queue: Arc<Queue>,
    incoming: mpsc::Sender<Received>,
    topics: watch::Receiver<BTreeSet<String>>,
    stop: CancellationToken,
) {
    let bridge = async {
        if let Some(tls) = &config.tls {
            tls::serve(&config, tls).await;
        }
    };
    let all = async {
        tokio::join!(bridge, publish(&config, &queue), follow(&config, incoming, topics));
    };
    stop.run_until_cancelled(all).await;
}

/// What was given to the library and not acknowledged by the broker. The library forgets all of it when the broker has
/// forgotten the session.
#[derive(Default)]
struct Flight {
    /// Oldest first; brokers acknowledge in order.
    sent: VecDeque<(String, Vec<u8>)>,
    /// To be sent again before anything else.
    again: VecDeque<(String, Vec<u8>)>,
}

async fn publish(config: &BusConfig, queue: &Queue) {
    let (speaker, mut listener) = wire::connection(config, &config.publisher);
    let flight = Mutex::<Flight>::default();
    let lock = || flight.lock().expect("nobody panics with it");
    let room = Notify::new();
    let send = async {
        loop {
            while lock().sent.len() >= usize::from(INFLIGHT_MAX) {
                room.notified().await;
            }
            let again = lock().again.pop_front();
            let (topic, payload) = match again {
                Some(message) => message,
                None => tokio::select! {
                    message = queue.pop() => message,
                    () = room.notified() => continue,
                },
            };
            lock().sent.push_back((topic.clone(), payload.clone()));
            // Never waits: the library holds more than may be on the way.
            if let Err(error) = speaker.publish(&topic, payload).await {
                tracing::warn!(topic, error, "a message was not published");
                lock().sent.pop_back();
                queue.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    let poll = async {
        let mut tries = Tries::new(config, "publish");
        loop {
            let heard = match listener.next().await {
                Ok(heard) => heard,
                Err(error) => {
                    tries.failed(&error).await;
                    continue;
                }
            };
            match &heard {
                Heard::Acknowledged { refused } => {
                    let message = lock().sent.pop_front();
                    room.notify_one();
                    if let (Some(reason), Some((topic, _))) = (refused, message) {
                        tracing::debug!(topic, reason, "the broker does not want a message");
                        queue.dropped.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Heard::Connected { session_present: false } => {
                    let mut flight = lock();
                    let mut sent = std::mem::take(&mut flight.sent);
                    sent.append(&mut flight.again);
                    flight.again = sent;
                    room.notify_one();
                }
                _ => {}
            }
            tries.handle(&heard);
        }
    };
    tokio::join!(send, poll);
}

async fn follow(
    config: &BusConfig,
    incoming: mpsc::Sender<Received>,
    mut topics: watch::Receiver<BTreeSet<String>>,
) {
    let (speaker, mut listener) = wire::connection(config, &config.subscriber);
    let (up, mut is_up) = watch::channel(0_u64);
    let subscribe = async {
        let mut followed: BTreeSet<String> = BTreeSet::new();
        let mut session = 0;
        loop {
            let now = *is_up.borrow_and_update();
            if now != session {
                session = now;
                followed.clear(); // a broker may have forgotten them
            }
            let wanted: BTreeSet<String> = {
                let own = topics.borrow_and_update();
                FOLLOWED.iter().map(|&topic| topic.to_owned()).chain(own.iter().cloned()).collect()
            };
            if session > 0 {
                let missing: Vec<_> = wanted.difference(&followed).cloned().collect();
                // In parts: a packet has a bound, and one topic that the broker refuses does not keep the others out.
                for part in missing.chunks(64) {
                    if let Err(error) = speaker.follow(part).await {
                        tracing::warn!(error, "topics cannot be followed");
                    }
                }
                for topic in followed.difference(&wanted) {
                    let _ = speaker.leave(topic).await; // asked again after the next connect
                }
                followed = wanted;
            }
            let changed = tokio::select! {
                changed = is_up.changed() => changed,
                changed = topics.changed() => changed,
            };
            if changed.is_err() {
                std::future::pending::<()>().await; // the agent is about to end
            }
        }
    };
    let poll = async {
        let mut tries = Tries::new(config, "follow");
        loop {
            match listener.next().await {
                Ok(Heard::Message(message)) => {
                    if incoming.send(message).await.is_err() {
                        return; // the agent is about to end
                    }
                }
                Ok(Heard::NotFollowed(what)) => tracing::warn!(
                    broker = tries.broker,
                    what,
                    "the broker does not let this node follow all topics. hint: see its access control list"
                ),
                Ok(heard) => {
                    if matches!(heard, Heard::Connected { .. }) {
                        up.send_modify(|session| *session += 1);
                    }
                    tries.handle(&heard);
                }
                Err(error) => tries.failed(&error).await,
            }
        }
    };
    tokio::join!(subscribe, poll);
}

/// Tries to connect, told once per outage.
struct Tries {
    what: &'static str,
    broker: String,
    up: bool,
    told: bool,
    backoff: Backoff,
}

impl Tries {
    fn new(config: &BusConfig, what: &'static str) -> Self {
        let broker = format!("{}:{}", config.host, config.port);
        let backoff = Backoff::between(RETRY.0, RETRY.1, u64::from(std::process::id()));
        Self { what, broker, up: false, told: false, backoff }
    }

    fn handle(&mut self, heard: &Heard) {
        if matches!(heard, Heard::Connected { .. }) {
            tracing::info!(broker = self.broker, to = self.what, "connected to the MQTT broker");
            (self.up, self.told) = (true, false);
            self.backoff.reset();
        }
    }

    async fn failed(&mut self, error: &str) {
        if std::mem::take(&mut self.up) || !self.told {
            tracing::warn!(
                broker = self.broker,
                to = self.what,
                error,
                "no MQTT broker; trying again. hint: see whether it runs and takes connections from this node"
            );
            self.told = true;
        }
        tokio::time::sleep(self.backoff.next_wait().max(RETRY.0)).await;
    }
}

/// Whether rules may follow this topic: a filter of MQTT, as far as one can be wrong.
pub fn is_filter(topic: &str) -> bool {
    let levels: Vec<&str> = topic.split('/').collect();
    !topic.is_empty()
        && topic.len() <= TOPIC_LEN_MAX
        && !topic.contains('\0')
        && levels.iter().enumerate().all(|(index, level)| match *level {
            "+" => true,
            "#" => index + 1 == levels.len(),
            level => !level.contains(['+', '#']),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_queue_keeps_the_newest_and_counts_what_it_drops() {
        let queue = Queue::default();
        queue.push("delta".into(), b"1".to_vec(), Weight::Latest);
        queue.push("doc".into(), b"a".to_vec(), Weight::Each);
        queue.push("delta".into(), b"2".to_vec(), Weight::Latest);
        queue.push("doc".into(), b"b".to_vec(), Weight::Each);
        let mut all = Vec::new();
        for _ in 0..3 {
            let (topic, payload) = queue.pop().await;
            all.push(format!("{topic}={}", String::from_utf8_lossy(&payload)));
        }
        assert_eq!(all, ["delta=2", "doc=a", "doc=b"]);
        assert_eq!(queue.dropped(), 0);
        for number in 0..QUEUE_MAX + 7 {
            queue.push("doc".into(), number.to_string().into_bytes(), Weight::Each);
        }
        assert_eq!((queue.dropped(), queue.pop().await.1), (7, b"7".to_vec()));
        for _ in 0..20 {
            queue.push("doc".into(), vec![0; PAYLOAD_LEN_MAX], Weight::Each);
        }
        let waiting = queue.inner.lock().expect("sound");
        assert!(waiting.bytes <= QUEUE_BYTES_MAX && waiting.messages.len() == 8);
        drop(waiting);
        let before = queue.dropped();
        queue.push("doc".into(), vec![0; PACKET_LEN_MAX], Weight::Each);
        assert_eq!(queue.dropped(), before + 1, "no broker would take it");
    }

    #[test]
    fn filters_are_checked_before_the_broker_sees_them() {
        for good in ["a/b", "+/user/#", "#", "a//b"] {
            assert!(is_filter(good), "{good}");
        }
        for bad in ["", "a/#/b", "a+/b", "a#", "a\0"] {
            assert!(!is_filter(bad), "{bad}");
        }
    }
}
