//! Serving one half of the interface on a Unix socket.
//!
//! [`bind`] makes the socket, [`serve`] accepts on it until told to stop, [`Incoming`] is one
//! connection with the front before it. EdgeCore and every mapper are the callers.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tower_service::Service;

use crate::front::Front;

/// Most connections at a time. Mappers built with KubeEdge's framework open one per report; the next
/// one waits in the socket's backlog.
pub const CONNECTIONS_MAX: usize = 256;
/// Most calls at a time on one connection.
const STREAMS_MAX: u32 = 64;
/// Bytes read from a socket at once.
const CHUNK: usize = 16 << 10;
/// A connection whose other end is gone or hangs is closed after this and [`PING_TIMEOUT`].
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Time that calls under way have to end once the server stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after an accept that failed, for want of file descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Why a socket could not be served.
#[derive(Debug, thiserror::Error)]
#[error("could not listen on `{}`", path.display())]
pub struct ServeError {
    path: PathBuf,
    source: io::Error,
}

/// Who is at the other end of a connection, as the kernel says; an extension of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The program's user.
    pub uid: u32,
    /// The program, where the kernel knows it.
    pub pid: Option<i32>,
    /// Counts connections of this listener; two requests with the same number share a connection.
    pub connection: u64,
}

/// Listens at `path`, in the place of whatever socket is there.
///
/// The socket is made under another name in the same directory and renamed, so that a client finds
/// the old one or the new one and never none.
///
/// # Errors
///
/// [`ServeError`] if the directory is missing or not ours, or the path too long for a socket (about
/// 100 bytes).
pub fn bind(path: impl AsRef<Path>) -> Result<UnixListener, ServeError> {
    let path = path.as_ref();
    let fail = |source| ServeError { path: path.to_path_buf(), source };
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let fresh = PathBuf::from(name);
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh).map_err(fail)?;
    std::fs::rename(&fresh, path).map_err(|error| {
        let _ = std::fs::remove_file(&fresh);
        fail(error)
    })?;
    Ok(listener)
}

/// Serves `service` (a generated server, or a mux of several) on
/// `listener` until `stop` is ready, then lets calls under way end for a few seconds.
///
/// Requests carry [`Peer`] as an extension. One connection that breaks the protocol is closed and
/// changes nothing for the others.
pub async fn serve<S, B>(listener: UnixListener, service: S, stop: impl Future<Output = ()>)
where
    S: Service<
            http::Request<hyper::body::Incoming>,
            Response = http::Response<B>,
            Error = Infallible,
        > + Clone
        + Send
        + 'static,
    S::Future: Send,
    B: hyper::body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let (stopping, _) = tokio::sync::watch::channel(false);
    let mut connections = JoinSet::new();
    let mut count = 0;
    tokio::pin!(stop);
    loop {
        let accept = async {
            let place = room.clone().acquire_owned().await.expect("the semaphore is never closed");
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection, trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        count += 1;
        let peer = stream.peer_cred().ok();
        let peer = Peer {
            uid: peer.as_ref().map_or(u32::MAX, tokio::net::unix::UCred::uid),
            pid: peer.and_then(|peer| peer.pid()),
            connection: count,
        };
        let service = service.clone();
        let mut stopped = stopping.subscribe();
        connections.spawn(async move {
            let _place = place;
            let answer = service_fn(move |mut request: http::Request<_>| {
                request.extensions_mut().insert(peer);
                let mut service = service.clone();
                async move {
                    std::future::poll_fn(|cx| service.poll_ready(cx)).await?;
                    service.call(request).await
                }
            });
            let connection = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .keep_alive_interval(PING_INTERVAL)
                .keep_alive_timeout(PING_TIMEOUT)
                .max_concurrent_streams(STREAMS_MAX)
                .serve_connection(TokioIo::new(Incoming::new(stream)), answer);
            tokio::pin!(connection);
            let ended = tokio::select! {
                ended = &mut connection => ended,
                () = async { drop(stopped.wait_for(|stopped| *stopped).await) } => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::debug!(?peer, %error, cause, "a connection ended early");
            }
        });
    }
    drop(listener);
    stopping.send_replace(true);
    let rest = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(STOP_TIMEOUT, rest).await;
}

/// An accepted connection as the HTTP/2 stack should see it: what is read has `localhost` as the
/// authority of every request, what is written passes.
#[derive(Debug)]
pub struct Incoming<T = UnixStream> {
    stream: T,
    front: Front,
    /// Read and not yet given to the front: `input[at..]`.
    input: Vec<u8>,
    at: usize,
    /// Come out of the front and not yet read: `output[read..]`.
    output: Vec<u8>,
    read: usize,
}

impl<T> Incoming<T> {
    /// Puts the front before `stream`, of which nothing may have been read.
    pub fn new(stream: T) -> Self {
        Self {
            stream,
            front: Front::default(),
            input: Vec::new(),
            at: 0,
            output: Vec::new(),
            read: 0,
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Incoming<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.read < this.output.len() {
                let len = buf.remaining().min(this.output.len() - this.read);
                buf.put_slice(&this.output[this.read..this.read + len]);
                this.read += len;
                return Poll::Ready(Ok(()));
            }
            this.output.clear();
            this.read = 0;
            if this.at == this.input.len() {
                this.at = 0;
                this.input.resize(CHUNK, 0);
                let mut chunk = ReadBuf::new(&mut this.input);
                let result = Pin::new(&mut this.stream).poll_read(cx, &mut chunk);
                let len = chunk.filled().len();
                this.input.truncate(len);
                ready!(result)?;
                if len == 0 {
                    return Poll::Ready(Ok(()));
                }
            }
            let taken = this
                .front
                .advance(&this.input[this.at..], &mut this.output)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            this.at += taken;
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Incoming<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
