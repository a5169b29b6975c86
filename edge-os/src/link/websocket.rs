//! The link over WebSocket, KubeEdge's own transport: TLS, an HTTP upgrade, then frames of our own codec.
//!
//! Towards a stock hub every message is one Text frame with a line feed at its end. A hub that takes batches gets
//! several messages that are due together in one Binary frame. Reading and writing never wait for each other.
//!
//! Source: kubeedge/kubeedge, edge/pkg/edgehub/clients/wsclient/websocket.go (URL, headers).

use super::{
    Ended, LinkEvent, Outgoing, RETRY_AFTER_HEADER, Session, WRITE_TIMEOUT, bounded_retry, deliver,
    deliver_batch, tcp,
};
use crate::config::{Endpoint, PROJECT_ID};
use bytes::{Bytes, BytesMut};
use http::Request;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use skerry_protocol::capability::{self, BEAT_GRACE, Capabilities};
use skerry_protocol::message::MESSAGE_LEN_MAX;
use skerry_protocol::websocket::{self, CloseCode, Decoder, Message as Frame, Opcode, Role};
use skerry_protocol::{MessageId, batch};
use std::future::pending;
use std::os::fd::AsFd;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_rustls::client::TlsStream;

/// Time for the opening handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for an answer after the network has changed under the connection.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long after a write the kernel is asked whether it was acknowledged, beyond the time for an answer.
const LOOK_LATER: Duration = Duration::from_millis(350);
/// Repetitions in vain until another connection is dialled beside this one: one may be lost on any network.
const REPEATS_MAX: u8 = 2;
/// Bytes that are encoded ahead of the socket. What is encoded can no longer be overtaken.
const OUT_LEN_MAX: usize = 64 * 1024;
/// The most that is read of a refusal.
const REFUSAL_LEN_MAX: usize = 4 * 1024;
/// Buffers above this size are given back when they are empty.
const BUFFER_KEPT: usize = 16 * 1024;

/// An upgraded connection, with what came behind the upgrade.
pub(crate) struct Opened {
    pub(crate) stream: TlsStream<TcpStream>,
    pub(crate) incoming: BytesMut,
    headers: http::HeaderMap,
}

/// Why there is no WebSocket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("the hub refused the connection: {text}")]
    Refused { text: String, retry_after: Option<Duration> },
    #[error("the opening handshake failed: {0}")]
    Handshake(String),
    #[error("no answer to the opening handshake within {} s", HANDSHAKE_TIMEOUT.as_secs())]
    Timeout,
}

/// Sends `request` with the headers of an upgrade, and waits for the answer.
///
/// # Errors
///
/// [`OpenError`].
pub(crate) async fn upgrade(
    stream: TlsStream<TcpStream>,
    request: http::request::Builder,
) -> Result<Opened, OpenError> {
    let failed = |error: &dyn std::error::Error| OpenError::Handshake(super::chain(error));
    let exchange = async {
        let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
            .title_case_headers(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| failed(&error))?;
        let driver = tokio::spawn(connection.with_upgrades());
        let _stop = StopOnDrop(driver.abort_handle());
        let key = websocket::client_key(rand::random());
        let request = websocket::request_headers(&key)
            .into_iter()
            .fold(request, |request, (name, value)| request.header(name, value))
            .body(Empty::<Bytes>::new())
            .map_err(|error| failed(&error))?;
        let response = sender.send_request(request).await.map_err(|error| failed(&error))?;
        let (parts, body) = response.into_parts();
        let headers = parts.headers.clone();
        let texts =
            headers.iter().filter_map(|(name, value)| Some((name.as_str(), value.to_str().ok()?)));
        match websocket::check_response(parts.status.as_u16(), &key, texts) {
            Ok(()) => {}
            Err(websocket::HandshakeError::Status(_)) => {
                let body = Limited::new(body, REFUSAL_LEN_MAX).collect().await;
                let body = body.map(|body| body.to_bytes()).unwrap_or_default();
                let text = String::from_utf8_lossy(&body);
                let retry = headers.get(RETRY_AFTER_HEADER).and_then(|value| value.to_str().ok());
                let retry = retry.and_then(|value| value.trim().parse().ok()).map(bounded_retry);
                let text = format!("{} {}", parts.status, text.trim());
                return Err(OpenError::Refused { text, retry_after: retry });
            }
            Err(error) => return Err(failed(&error)),
        }
        let response = http::Response::from_parts(parts, body);
        let upgraded = hyper::upgrade::on(response).await.map_err(|error| failed(&error))?;
        let parts = upgraded
            .downcast::<TokioIo<TlsStream<TcpStream>>>()
            .map_err(|_| OpenError::Handshake("the connection has changed its type".into()))?;
        let incoming = BytesMut::from(&parts.read_buf[..]);
        Ok(Opened { stream: parts.io.into_inner(), incoming, headers })
    };
    tokio::time::timeout(HANDSHAKE_TIMEOUT, exchange).await.unwrap_or(Err(OpenError::Timeout))
}

/// The opening handshake of the link.
///
/// # Errors
///
/// [`OpenError`].
pub(super) async fn open(
    hub: &Endpoint,
    stream: TlsStream<TcpStream>,
    node: &str,
    ours: Capabilities,
) -> Result<(Opened, Capabilities), OpenError> {
    let request = Request::get(format!("/{PROJECT_ID}/{node}/events"))
        .header("Host", hub.to_string())
        .header("node_id", node)
        .header("project_id", PROJECT_ID)
        .header("ConnectionUse", "msg")
        .header(capability::HEADER, ours.to_string());
    let opened = upgrade(stream, request).await?;
    let theirs = opened.headers.get(capability::HEADER).and_then(|value| value.to_str().ok());
    let agreed = ours.and(Capabilities::parse(theirs));
    Ok((opened, agreed))
}

struct StopOnDrop(tokio::task::AbortHandle);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Carries messages until the connection ends; returns why it did.
pub(super) async fn run(
    opened: Opened,
    session: &Session,
    mut to_send: mpsc::Receiver<Outgoing>,
    mut network: watch::Receiver<u64>,
) -> Ended {
    let agreed = session.capabilities;
    // A hub without beats answers pings all the same, and is given as much time.
    let beat = agreed.beat.unwrap_or(session.stock_ping);
    let silence_max = agreed.silence_max().unwrap_or(beat * 2 + BEAT_GRACE);
    let socket = opened.stream.get_ref().0.as_fd().try_clone_to_owned();
    let socket = socket.map_err(super::SessionError::Io)?;
    let (mut reader, mut writer) = tokio::io::split(opened.stream);
    let mut decoder = Decoder::new(Role::Client, MESSAGE_LEN_MAX);
    let mut incoming = opened.incoming;
    let mut out = Out::default();
    let mut ticks = tokio::time::interval_at(Instant::now() + beat, beat);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    let mut deadline = heard + silence_max;
    // The first ping at once: its answer is the first round trip that is known.
    out.push(Opcode::Ping, &[]);
    let mut pinged = Some(Instant::now());
    // When to ask the kernel whether what was sent has been acknowledged, and since when it repeats.
    let mut look_at = None;
    let mut repeats_since = None;
    // When to doubt the link, after the network has changed, and whether only a word of the hub ends that doubt.
    let mut doubt_at = None;
    let mut unanswered = false;
    loop {
        let mut delivered = false;
        loop {
            let frame = decoder.decode(&mut incoming);
            delivered |= matches!(frame, Ok(Some(_)));
            match frame {
                Ok(Some(Frame::Text(bytes))) => deliver(session, &bytes).await?,
                Ok(Some(Frame::Binary(bytes))) if agreed.batch => {
                    deliver_batch(session, &bytes).await?;
                }
                // KubeEdge's peers take both opcodes for the same.
                Ok(Some(Frame::Binary(bytes))) => deliver(session, &bytes).await?,
                Ok(Some(Frame::Ping(bytes))) => out.push(Opcode::Pong, &bytes),
                Ok(Some(Frame::Pong(_))) => {
                    if let Some(at) = pinged.take() {
                        session.set_rtt(at.elapsed());
                    }
                }
                Ok(Some(Frame::Close(close))) => {
                    let reason = String::from_utf8_lossy(&close.reason).trim().to_owned();
                    return Err(match reason.is_empty() {
                        true => super::SessionError::Closed,
                        false => super::SessionError::ClosedWith(reason),
                    });
                }
                Ok(None) => break,
                Err(error) => {
                    let text = error.to_string();
                    out.push_close(CloseCode::PROTOCOL, &text);
                    let last = writer.write_all(&out.bytes);
                    let _ = tokio::time::timeout(Duration::from_secs(1), last).await;
                    return Err(super::SessionError::Framing(text));
                }
            }
        }
        if delivered {
            // The agent may have been slow to take them: a slow disk here is no silence there.
            heard = Instant::now();
            deadline = heard + silence_max;
        }
        if incoming.is_empty() && incoming.capacity() > BUFFER_KEPT {
            incoming = BytesMut::new();
        }
        let stuck_at = out.stuck_at();
        tokio::select! {
            read = reader.read_buf(&mut incoming) => match read {
                Ok(0) => return Err(super::SessionError::Closed),
                Ok(len) => {
                    session.counters.add_in(len);
                    session.set_doubt(false);
                    (doubt_at, repeats_since, unanswered) = (None, None, false);
                    heard = Instant::now();
                    deadline = heard + silence_max;
                }
                Err(error) => return Err(super::SessionError::Io(error)),
            },
            written = out.write(&mut writer) => {
                session.counters.add_out(written.map_err(super::SessionError::Io)?);
                look_at.get_or_insert(Instant::now() + session.answer_wait() + LOOK_LATER);
                for id in out.take_written() {
                    session.tell(LinkEvent::Written(id)).await?;
                }
            }
            () = until(stuck_at) => return Err(super::SessionError::Stuck),
            message = to_send.recv(), if out.bytes.len() < OUT_LEN_MAX => {
                let Some(first) = message else { return Err(super::SessionError::Dropped) };
                out.push_messages(first, &mut to_send, agreed.batch);
            }
            () = tokio::time::sleep_until(deadline) => {
                return Err(super::SessionError::Silent(heard.elapsed()));
            }
            _ = ticks.tick() => {
                out.push(Opcode::Ping, &[]);
                pinged.get_or_insert(Instant::now());
            }
            () = until(look_at) => {
                let repeats = tcp::repeats(&socket).filter(|repeats| repeats.is_waiting);
                match repeats {
                    None => {
                        session.set_doubt(unanswered);
                        (look_at, repeats_since) = (None, None);
                    }
                    Some(repeats) => {
                        let since = *repeats_since.get_or_insert(Instant::now());
                        look_at = Some(Instant::now() + super::probe_wait(since.elapsed()));
                        if repeats.count >= REPEATS_MAX {
                            session.set_doubt(true);
                        }
                    }
                }
            }
            () = until(doubt_at) => {
                (doubt_at, unanswered) = (None, true);
                session.set_doubt(true);
            }
            Ok(()) = network.changed() => {
                let now = Instant::now();
                out.push(Opcode::Ping, &[]);
                doubt_at = Some(now + session.answer_wait());
                deadline = deadline.min(now + PROBE_TIMEOUT);
                pinged.get_or_insert(now);
            }
        }
    }
}

/// What waits for the socket.
#[derive(Default)]
pub(crate) struct Out {
    pub(crate) bytes: BytesMut,
    /// TLS holds a part of what was written.
    unflushed: bool,
    /// Since when nothing left although something should.
    waiting_since: Option<Instant>,
    /// To be told once everything up to now has left.
    ids: Vec<MessageId>,
}

impl Out {
    /// One frame.
    pub(crate) fn push(&mut self, opcode: Opcode, payload: &[u8]) {
        websocket::encode(Role::Client, opcode, payload, rand::random(), &mut self.bytes);
        self.waiting_since.get_or_insert(Instant::now());
    }

    fn push_close(&mut self, code: CloseCode, reason: &str) {
        websocket::encode_close(Role::Client, code, reason, rand::random(), &mut self.bytes);
    }

    /// `first`, and what else is due already.
    fn push_messages(
        &mut self,
        first: Outgoing,
        more: &mut mpsc::Receiver<Outgoing>,
        batched: bool,
    ) {
        let mut due = super::gather(first, more);
        self.ids.extend(due.iter_mut().filter_map(Outgoing::take_report));
        if batched && super::is_worth_a_batch(&due) {
            let messages: Vec<_> = due.into_iter().map(|outgoing| outgoing.message).collect();
            self.push(Opcode::Binary, &batch::encode(&messages));
            return;
        }
        for outgoing in due {
            let mut text = BytesMut::new();
            outgoing.message.encode_to(&mut text);
            self.push(Opcode::Text, &text);
        }
    }

    /// Writes a part of what waits, and returns how many bytes; never ends when nothing does. May be dropped at any
    /// time without a loss.
    pub(crate) async fn write(
        &mut self,
        writer: &mut (impl AsyncWriteExt + Unpin),
    ) -> std::io::Result<usize> {
        if !self.bytes.is_empty() {
            let written = writer.write_buf(&mut self.bytes).await?;
            if written == 0 {
                return Err(std::io::ErrorKind::WriteZero.into());
            }
            self.unflushed = true;
            self.waiting_since = Some(Instant::now());
            return Ok(written);
        }
        if !self.unflushed {
            return pending().await;
        }
        writer.flush().await?;
        self.unflushed = false;
        self.waiting_since = None;
        if self.bytes.capacity() > BUFFER_KEPT {
            self.bytes = BytesMut::new();
        }
        Ok(0)
    }

    /// Messages that have left, as far as anybody can tell.
    fn take_written(&mut self) -> Vec<MessageId> {
        match self.bytes.is_empty() && !self.unflushed {
            true => std::mem::take(&mut self.ids),
            false => Vec::new(),
        }
    }

    /// When the peer has not taken anything for too long, if something waits for it.
    pub(crate) fn stuck_at(&self) -> Option<Instant> {
        self.waiting_since.map(|since| since + WRITE_TIMEOUT)
    }
}

/// Sleeps until then; for ever without a time.
pub(crate) async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => pending().await,
    }
}
