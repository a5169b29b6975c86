//! One WebSocket over TLS: the opening handshake, and frames straight on the TLS stream after it.
//!
//! hyper answers the opening request and gives the stream back, with what it has read beyond the request. From there on
//! the frames are ours ([`skerry_protocol::websocket`]), because the tunnel carries bytes in Text frames and because an
//! idle connection must not hold a buffer: bytes are read onto the stack and kept only while a message is incomplete,
//! and what is to be written is freed once it is written.
//!
//! The link's sessions and the stream tunnel are the callers.
//!
//! Source: kubeedge/kubeedge, pkg/viaduct/pkg/server/ws.go; RFC 6455.

use crate::listen::HANDSHAKE_TIMEOUT;
use crate::transport::{FAREWELL_LEN_MAX, FAREWELL_TIMEOUT, Farewell, Received, TransportError};
use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use skerry_protocol::websocket::{
    CloseCode, Decoder, FrameError, Message as Ws, Opcode, Role, check_request, encode,
    encode_close, encode_header,
};
use skerry_protocol::{Message, batch};
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// What is read at once.
const READ_LEN: usize = 16 * 1024;
/// What hyper may hold of the opening request.
const REQUEST_LEN_MAX: usize = 8 * 1024;
/// With this much not written, pings are not answered: a peer that sends nothing else must not fill our memory.
const PONG_OUT_MAX: usize = 64 * 1024;
/// A buffer for writing is kept up to this size, and freed when it has grown beyond it.
const KEPT_LEN: usize = 512;
/// What one write gives to TLS.
const WRITE_LEN: usize = 64 * 1024;
/// Servers do not mask.
const NO_MASK: [u8; 4] = [0; 4];

/// An answer to an opening request that is not to become a WebSocket.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) status: StatusCode,
    pub(crate) text: String,
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
}

impl Refused {
    pub(crate) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into(), headers: Vec::new() }
    }
}

/// Why a connection did not become a WebSocket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("{text}")]
    Refused { status: StatusCode, text: String },
    #[error("the opening request is not readable: {0}")]
    Http(hyper::Error),
    #[error("the connection ended before its opening request")]
    Closed,
    #[error("opening handshake took too long")]
    TooSlow,
}

/// What a frame, or the end of the stream, means.
#[derive(Debug)]
pub(crate) enum Arrived {
    Text(Bytes),
    Binary(Bytes),
    /// A ping, which has its pong, or a pong.
    Beat,
    Closed,
}

/// Our end of one WebSocket.
pub(crate) struct WebSocket {
    stream: TlsStream<TcpStream>,
    decoder: Decoder,
    /// What has been read and is no whole message yet.
    input: BytesMut,
    out: BytesMut,
    /// TLS may hold bytes that are not on their way.
    unflushed: bool,
    bytes_in: u64,
    bytes_out: u64,
    heard: Instant,
    /// The peer has sent its close frame, and wants one.
    closing: bool,
}

/// Answers the opening request. `check` sees it when it is one, and returns what the caller wants to remember and the
/// headers of the answer.
///
/// # Errors
///
/// [`OpenError`]; the connection has been closed then, and what `check` said has been told to the peer.
pub(crate) async fn open<T, C>(
    stream: TlsStream<TcpStream>,
    message_len_max: usize,
    check: C,
) -> Result<(WebSocket, T), OpenError>
where
    C: Fn(&Request<Incoming>) -> Result<(T, Vec<(HeaderName, HeaderValue)>), Refused>,
{
    let verdict = Mutex::new(None);
    let service = service_fn(|request: Request<Incoming>| {
        let (answer, found) = match judge(&request, &check) {
            Ok((answer, found)) => (answer, Ok(found)),
            Err(refused) => {
                let Refused { status, text, headers } = refused;
                let mut answer = Response::new(Full::new(Bytes::from(text.clone())));
                *answer.status_mut() = status;
                answer.headers_mut().extend(headers);
                let close = HeaderValue::from_static("close");
                answer.headers_mut().insert(header::CONNECTION, close);
                (answer, Err((status, text)))
            }
        };
        *verdict.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    let mut connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HANDSHAKE_TIMEOUT)
        .max_buf_size(REQUEST_LEN_MAX)
        // KubeEdge's answer has no more headers than a handshake needs.
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service);
    let served = poll_fn(|cx| connection.poll_without_shutdown(cx));
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(OpenError::Http(error)),
        Err(_) => return Err(OpenError::TooSlow),
    }
    let (mut stream, read_ahead) = {
        let parts = connection.into_parts();
        (parts.io.into_inner(), parts.read_buf)
    };
    match verdict.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(Ok(found)) => {
            let socket = WebSocket {
                stream,
                decoder: Decoder::new(Role::Server, message_len_max),
                input: BytesMut::from(&read_ahead[..]),
                out: BytesMut::new(),
                unflushed: true,
                bytes_in: 0,
                bytes_out: 0,
                heard: Instant::now(),
                closing: false,
            };
            Ok((socket, found))
        }
        Some(Err((status, text))) => {
            let _ = tokio::time::timeout(FAREWELL_TIMEOUT, stream.shutdown()).await;
            Err(OpenError::Refused { status, text })
        }
        None => Err(OpenError::Closed),
    }
}

/// Bytes of the frame with which `input` begins, whose length the decoder has found to be within its bound; `None`
/// without its header.
fn frame_len(input: &[u8]) -> Option<usize> {
    const HEADER_LEN_MAX: usize = 14;
    let payload_len = match *input.get(1)? & 0x7f {
        126 => u16::from_be_bytes(input.get(2..4)?.try_into().ok()?).into(),
        127 => u64::from_be_bytes(input.get(2..10)?.try_into().ok()?),
        short => u64::from(short),
    };
    Some(usize::try_from(payload_len).ok()?.saturating_add(HEADER_LEN_MAX))
}

fn judge<T, C>(
    request: &Request<Incoming>,
    check: &C,
) -> Result<(Response<Full<Bytes>>, T), Refused>
where
    C: Fn(&Request<Incoming>) -> Result<(T, Vec<(HeaderName, HeaderValue)>), Refused>,
{
    let texts = request.headers().iter();
    let texts = texts.filter_map(|(name, value)| Some((name.as_str(), value.to_str().ok()?)));
    let accept = check_request(request.method().as_str(), texts).map_err(|error| {
        let mut refused = Refused::new(StatusCode::BAD_REQUEST, error.to_string());
        let version = (header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        refused.headers.push(version);
        refused
    })?;
    let (found, headers) = check(request)?;
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let accept = HeaderValue::from_str(&accept).expect("base64");
    let all = answer.headers_mut();
    all.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    all.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    all.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    all.extend(headers);
    Ok((answer, found))
}

impl WebSocket {
    /// The next message, or the end.
    pub(crate) fn poll_message(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Arrived, TransportError>> {
        loop {
            match self.decoder.decode(&mut self.input) {
                Ok(Some(message)) => {
                    if self.input.is_empty() {
                        self.input = BytesMut::new();
                    }
                    return Poll::Ready(Ok(match message {
                        Ws::Text(payload) => Arrived::Text(payload),
                        Ws::Binary(payload) => Arrived::Binary(payload),
                        Ws::Ping(payload) => {
                            if self.out.len() < PONG_OUT_MAX {
                                encode(
                                    Role::Server,
                                    Opcode::Pong,
                                    &payload,
                                    NO_MASK,
                                    &mut self.out,
                                );
                            }
                            Arrived::Beat
                        }
                        Ws::Pong(_) => Arrived::Beat,
                        Ws::Close(_) => {
                            self.closing = true;
                            Arrived::Closed
                        }
                    }));
                }
                Ok(None) => {}
                Err(FrameError::TooLong { .. }) => {
                    return Poll::Ready(Err(TransportError::OverBound));
                }
                Err(error) => {
                    return Poll::Ready(Err(TransportError::Malformed(error.to_string())));
                }
            }
            let mut chunk = [std::mem::MaybeUninit::uninit(); READ_LEN];
            let mut chunk = ReadBuf::uninit(&mut chunk);
            match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut chunk)) {
                Ok(()) if chunk.filled().is_empty() => return Poll::Ready(Ok(Arrived::Closed)),
                Ok(()) => {
                    self.bytes_in += chunk.filled().len() as u64;
                    self.heard = Instant::now();
                    if self.input.capacity() - self.input.len() < chunk.filled().len() {
                        // Room for the whole frame at once: grown bit by bit, a long one is there twice for a moment.
                        let whole = frame_len(&self.input).unwrap_or_default();
                        let missing = whole.saturating_sub(self.input.len());
                        self.input.reserve(missing.max(chunk.filled().len()));
                    }
                    self.input.extend_from_slice(chunk.filled());
                }
                // KubeEdge cuts the connection without a word.
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                    return Poll::Ready(Ok(Arrived::Closed));
                }
                Err(error) => {
                    return Poll::Ready(Err(TransportError::Broken(error.to_string())));
                }
            }
        }
    }

    pub(crate) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Received, TransportError>> {
        self.poll_message(cx).map_ok(|incoming| match incoming {
            Arrived::Text(bytes) => Received::Message(bytes),
            Arrived::Binary(bytes) => Received::Batch(bytes),
            Arrived::Beat => Received::Beat,
            Arrived::Closed => Received::Closed,
        })
    }

    /// Takes messages to be written: one as text, several as a batch.
    pub(crate) fn send(&mut self, messages: &[Arc<Message>]) {
        match messages {
            [] => {}
            [message] => {
                let mut json = BytesMut::new();
                message.encode_to(&mut json);
                self.write(Opcode::Text, &json);
            }
            several => self.write(Opcode::Binary, &batch::encode(several)),
        }
    }

    /// Takes one frame to be written.
    pub(crate) fn write(&mut self, opcode: Opcode, payload: &[u8]) {
        encode_header(Role::Server, opcode, payload.len(), NO_MASK, &mut self.out);
        self.out.extend_from_slice(payload);
    }

    /// Writes; ready when nothing is left.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TransportError>> {
        let broken = |error: std::io::Error| TransportError::Broken(error.to_string());
        while !self.out.is_empty() {
            let piece = &self.out[..self.out.len().min(WRITE_LEN)];
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, piece));
            let written = written.map_err(broken)?;
            self.out.advance(written);
            self.bytes_out += written as u64;
            self.unflushed = true;
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.stream).poll_flush(cx)).map_err(broken)?;
            self.unflushed = false;
            if self.out.capacity() > KEPT_LEN {
                self.out = BytesMut::new();
            }
        }
        Poll::Ready(Ok(()))
    }

    pub(crate) fn unwritten(&self) -> usize {
        self.out.len()
    }

    pub(crate) fn traffic(&self) -> (u64, u64) {
        (self.bytes_out, self.bytes_in)
    }

    pub(crate) fn heard(&self) -> Instant {
        self.heard
    }

    /// Ends the connection, with a close frame when there is something to say.
    pub(crate) async fn close(mut self: Box<Self>, farewell: Option<Farewell>) {
        let farewell = match farewell {
            None if self.closing => Farewell { code: 1000, reason: String::new(), talks: false },
            None => return,
            Some(farewell) => farewell,
        };
        let Farewell { code, reason, talks } = farewell;
        encode_close(Role::Server, CloseCode(code), &reason, NO_MASK, &mut self.out);
        let close = async {
            poll_fn(|cx| self.poll_flush(cx)).await.ok()?;
            if !talks {
                return Some(());
            }
            // A peer in the middle of a long message sees the close frame only after it has written all of it; with
            // unread bytes in our buffers the system would reset the connection instead.
            self.stream.shutdown().await.ok()?;
            let mut buffer = vec![0; READ_LEN];
            let mut left = FAREWELL_LEN_MAX;
            while left > 0 {
                match self.stream.read(&mut buffer).await.ok()? {
                    0 => break,
                    read => left = left.saturating_sub(read),
                }
            }
            Some(())
        };
        let _ = tokio::time::timeout(FAREWELL_TIMEOUT, close).await;
    }
}
