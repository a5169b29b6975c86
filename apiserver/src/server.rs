//! The listening side: TLS, client certificates, one task per connection.

use crate::api::Api;
use crate::auth::User;
use crate::pki;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections at once; each holds a few kilobytes and at most [`STREAMS_MAX`] requests.
const CONNECTIONS_MAX: usize = 1024;
/// HTTP/2 requests at once on one connection.
const STREAMS_MAX: u32 = 250;
/// A peer that has not finished its handshake or its request's head by then is dropped.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// HTTP/2 pings find peers that vanished; HTTP/1 watches end with their timeout.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// Time to wait after `accept` failed, usually because file descriptors ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Accepts connections until `stop`.
pub(crate) async fn listen(
    listener: TcpListener,
    tls: TlsAcceptor,
    api: Arc<Api>,
    stop: CancellationToken,
) {
    let connections = TaskTracker::new();
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let permit = tokio::select! {
            () = stop.cancelled() => break,
            permit = permits.clone().acquire_owned() => permit.expect("the semaphore is never closed"),
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, peer)) => {
                let (tls, api, stop) = (tls.clone(), api.clone(), stop.clone());
                connections.spawn(async move {
                    let _permit = permit;
                    if let Err(error) = serve(socket, tls, api, stop).await {
                        tracing::debug!(%peer, error, "connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "connection was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    connections.close();
    connections.wait().await;
}

async fn serve(
    socket: TcpStream,
    tls: TlsAcceptor,
    api: Arc<Api>,
    stop: CancellationToken,
) -> Result<(), String> {
    socket.set_nodelay(true).map_err(|error| error.to_string())?;
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(socket))
        .await
        .map_err(|_| "TLS handshake took too long".to_owned())?
        .map_err(|error| error.to_string())?;
    let user = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| pki::subject(chain.first()?))
        .map(|(name, groups)| User::new(&name, &groups));
    let service = hyper::service::service_fn(move |request| {
        let (api, user) = (api.clone(), user.clone());
        async move { Ok::<_, Infallible>(api.serve(user, request).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .max_concurrent_streams(STREAMS_MAX);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => ended.map_err(|error| error.to_string()),
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await.map_err(|error| error.to_string())
        }
    }
}
