//! The link to the hub: dial, keep alive, hand messages over, dial again.
//!
//! One task. Each connection has its own channel for messages up, so that nothing written for one connection can go
//! out on the next; dropping its sender ends the connection. What the messages mean is the agent's business.
//!
//! A connection on which nothing arrives for [`SILENCE_MAX`] is dead: a WebSocket ping goes out every
//! [`PING_INTERVAL`], which any WebSocket peer answers, KubeEdge's included.
//!
//! Source: kubeedge/kubeedge, edge/pkg/edgehub/clients/wsclient/websocket.go (URL, headers).

use crate::config::{Config, Endpoint};
use crate::enrol::{self, Credentials, EnrolError};
use crate::tls::{self, TlsError};
use futures::{SinkExt, StreamExt};
use http::Request;
use skerry_edge_core::backoff::{Backoff, Random};
use skerry_protocol::capability::{self, Capabilities};
use skerry_protocol::message::MESSAGE_LEN_MAX;
use skerry_protocol::{Message, MessageError};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{self, Message as Frame, protocol::WebSocketConfig};
use tokio_util::sync::CancellationToken;

/// Time between two WebSocket pings.
pub const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Time without a byte after which the other end is gone.
pub const SILENCE_MAX: Duration = Duration::from_secs(25);
/// Time for the opening handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for one message to leave; as KubeEdge's write deadline.
const WRITE_TIMEOUT: Duration = Duration::from_secs(15);
/// Messages that may wait for the socket. Few: what waits here can no longer be overtaken by a lease, nor replaced by
/// a newer status.
const OUTGOING_MAX: usize = 8;
/// Messages that may wait for the agent; then the socket is not read.
pub const INCOMING_MAX: usize = 32;
/// Time after which a refused token is looked at again; a person has to act first.
const REFUSED_INTERVAL: Duration = Duration::from_secs(60);

/// What the link tells the agent.
#[derive(Debug)]
pub enum LinkEvent {
    /// The hub has accepted us.
    Connected {
        /// What both ends can do beyond KubeEdge.
        capabilities: Capabilities,
        /// The way up of this connection; dropping it closes the connection.
        outgoing: mpsc::Sender<Message>,
    },
    /// A message came.
    Message(Box<Message>),
    /// Something came that is no message.
    Garbled(MessageError),
    /// The connection is gone; the next one is being dialled.
    Disconnected {
        /// Why, for the log.
        reason: String,
    },
    /// There is no certificate, and trying again will not help.
    NotEnrolled(EnrolError),
}

/// Runs until `stop`; publishes the credentials it uses for the tunnel.
pub async fn run(
    config: Arc<Config>,
    events: mpsc::Sender<LinkEvent>,
    credentials: watch::Sender<Option<Arc<Credentials>>>,
    seed: u64,
    stop: CancellationToken,
) {
    let link = Link { config, events, credentials, random: Random::new(seed) };
    stop.run_until_cancelled_owned(link.run()).await;
}

struct Link {
    config: Arc<Config>,
    events: mpsc::Sender<LinkEvent>,
    credentials: watch::Sender<Option<Arc<Credentials>>>,
    random: Random,
}

/// Why a connection ended or never began.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the hub refused the connection: {0}")]
    Refused(String),
    #[error("WebSocket failed: {0}")]
    WebSocket(String),
    #[error("nothing came for {} s", SILENCE_MAX.as_secs())]
    Silent,
    #[error("a message did not leave within {} s", WRITE_TIMEOUT.as_secs())]
    Stuck,
    #[error("the hub closed the connection")]
    Closed,
    #[error("the hub closed the connection: {0}")]
    ClosedWith(String),
    #[error("closed by this agent")]
    Dropped,
}

impl Link {
    async fn run(mut self) {
        let credentials = Arc::new(self.enrolled().await);
        self.credentials.send_replace(Some(credentials));
        let renewal = keep_renewed(
            self.config.clone(),
            self.credentials.clone(),
            Random::new(self.random.next_u64()),
        );
        let mut backoff = Backoff::new(self.random.next_u64());
        let dialling = async {
            // The first address at once; after a failure the next one.
            for hub in self.config.hubs.iter().cycle() {
                let started = Instant::now();
                let error = match self.session(hub).await {
                    Ok(never) => match never {},
                    Err(error) => error,
                };
                // A hub that lets us in and throws us out again must not be hammered either.
                if started.elapsed() > SILENCE_MAX {
                    backoff.reset();
                }
                let wait = backoff.next_wait();
                let reason = format!("{}; dialling again in {wait:.1?}", chain(&error));
                if self.events.send(LinkEvent::Disconnected { reason }).await.is_err() {
                    return;
                }
                tokio::time::sleep(wait).await;
            }
        };
        tokio::join!(dialling, renewal);
    }

    async fn enrolled(&mut self) -> Credentials {
        let mut backoff = Backoff::new(self.random.next_u64());
        loop {
            let wait = match enrol::ensure(&self.config).await {
                Ok(credentials) => return credentials,
                Err(error) if error.is_transient() => {
                    let wait = backoff.next_wait();
                    tracing::warn!(error = chain(&error), ?wait, "no certificate yet");
                    wait
                }
                Err(error) => {
                    let _ = self.events.send(LinkEvent::NotEnrolled(error)).await;
                    REFUSED_INTERVAL
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    async fn session(&self, hub: &Endpoint) -> Result<std::convert::Infallible, LinkError> {
        let credentials = self.credentials.borrow().clone().expect("set before the first session");
        let tls = tls::client_config(&credentials.ca, Some(&credentials.identity))?;
        let stream = tls::connect(hub, tls).await?;
        let (mut socket, capabilities) = self.open(hub, stream).await?;
        let (outgoing, mut to_send) = mpsc::channel(OUTGOING_MAX);
        self.tell(LinkEvent::Connected { capabilities, outgoing }).await?;

        let mut ping = tokio::time::interval(PING_INTERVAL);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                frame = socket.next() => {
                    let frame = frame.ok_or(LinkError::Closed)?;
                    match frame.map_err(|error| LinkError::WebSocket(error.to_string()))? {
                        Frame::Text(text) => self.deliver(text.as_bytes()).await?,
                        Frame::Binary(bytes) => self.deliver(&bytes).await?,
                        Frame::Close(Some(last)) if !last.reason.is_empty() => {
                            return Err(LinkError::ClosedWith(last.reason.to_string()));
                        }
                        Frame::Close(_) => return Err(LinkError::Closed),
                        _ => {}
                    }
                    heard = Instant::now(); // after the delivery: a slow disk here is no silence there
                }
                message = to_send.recv() => {
                    let message = message.ok_or(LinkError::Dropped)?;
                    tracing::debug!(
                        msg_id = message.header.msg_id,
                        operation = message.route.operation,
                        resource = message.route.resource,
                        "up"
                    );
                    write(&mut socket, Frame::text(message.encode())).await?;
                }
                () = tokio::time::sleep_until(heard + SILENCE_MAX) => return Err(LinkError::Silent),
                _ = ping.tick() => {
                    write(&mut socket, Frame::Ping(Default::default())).await?;
                }
            }
        }
    }

    async fn open(
        &self,
        hub: &Endpoint,
        stream: TlsStream<TcpStream>,
    ) -> Result<(WebSocketStream<TlsStream<TcpStream>>, Capabilities), LinkError> {
        let node = &self.config.node_name;
        let project = crate::config::PROJECT_ID;
        let request = Request::get(format!("wss://{hub}/{project}/{node}/events"))
            .header("Host", hub.to_string())
            .header("Connection", "Upgrade")
            .header("Upgrade", "websocket")
            .header("Sec-WebSocket-Version", "13")
            .header("Sec-WebSocket-Key", tungstenite::handshake::client::generate_key())
            .header("node_id", node)
            .header("project_id", project)
            .header("ConnectionUse", "msg")
            .header(capability::HEADER, Capabilities::OURS.to_string())
            .body(())
            .map_err(|error| LinkError::Refused(error.to_string()))?;
        let opening =
            tokio_tungstenite::client_async_with_config(request, stream, Some(socket_config()));
        let (socket, response) = tokio::time::timeout(HANDSHAKE_TIMEOUT, opening)
            .await
            .map_err(|_| LinkError::Refused("no answer to the opening handshake".into()))?
            .map_err(|error| LinkError::Refused(refusal(error)))?;
        let theirs =
            response.headers().get(capability::HEADER).and_then(|value| value.to_str().ok());
        Ok((socket, Capabilities::parse(theirs).and(Capabilities::OURS)))
    }

    async fn deliver(&self, bytes: &[u8]) -> Result<(), LinkError> {
        let event = match Message::decode(bytes) {
            Ok(message) => LinkEvent::Message(Box::new(message)),
            Err(error) => LinkEvent::Garbled(error),
        };
        self.tell(event).await
    }

    async fn tell(&self, event: LinkEvent) -> Result<(), LinkError> {
        self.events.send(event).await.map_err(|_| LinkError::Dropped)
    }
}

/// Small buffers, and the bound on messages.
pub(crate) fn socket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(8 * 1024)
        .write_buffer_size(0)
        .max_message_size(Some(MESSAGE_LEN_MAX))
        .max_frame_size(Some(MESSAGE_LEN_MAX))
}

/// The words of a hub that does not upgrade, if it has any.
pub(crate) fn refusal(error: tungstenite::Error) -> String {
    match error {
        tungstenite::Error::Http(response) => {
            let text = response.body().as_deref().map(String::from_utf8_lossy);
            format!("{} {}", response.status(), text.unwrap_or_default().trim())
        }
        other => other.to_string(),
    }
}

async fn write<S>(socket: &mut WebSocketStream<S>, frame: Frame) -> Result<(), LinkError>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    match tokio::time::timeout(WRITE_TIMEOUT, socket.send(frame)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(LinkError::WebSocket(error.to_string())),
        Err(_) => Err(LinkError::Stuck),
    }
}

/// Renews the certificate when its time has come; whoever dials next shows the new one.
async fn keep_renewed(
    config: Arc<Config>,
    credentials: watch::Sender<Option<Arc<Credentials>>>,
    mut random: Random,
) {
    /// The wall clock may jump, so it is looked at again now and then.
    const LOOK_INTERVAL: Duration = Duration::from_secs(600);
    let hour = Duration::from_secs(3600);
    let mut backoff = Backoff::between(Duration::from_secs(30), hour, random.next_u64());
    let Some(mut current) = credentials.borrow().clone() else { return };
    let mut due_s = enrol::renewal_time_s(&current.identity, &mut random);
    loop {
        let left_s = u64::try_from(due_s - jiff::Timestamp::now().as_second()).unwrap_or(0);
        if left_s > 0 {
            tokio::time::sleep(Duration::from_secs(left_s).min(LOOK_INTERVAL)).await;
            continue;
        }
        match enrol::renew(&config, &current).await {
            Ok(next) => {
                tracing::info!(
                    valid_until_s = next.identity.not_after,
                    "renewed the node's certificate"
                );
                current = Arc::new(next);
                credentials.send_replace(Some(current.clone()));
                due_s = enrol::renewal_time_s(&current.identity, &mut random);
                backoff.reset();
            }
            Err(error) => {
                let wait = backoff.next_wait();
                tracing::warn!(
                    error = chain(&error),
                    ?wait,
                    "could not renew the node's certificate"
                );
                tokio::time::sleep(wait).await;
            }
        }
    }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}
