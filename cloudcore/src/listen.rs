//! Accepts TLS connections and gives each to a handler, in a task of its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A peer that has not finished its handshake by then is dropped.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Open connections per listener; more wait in the system's backlog.
const CONNECTIONS_MAX: usize = 20_000;
/// Pause after a failed accept, which is mostly a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// An open listener.
pub(crate) struct Listener {
    pub(crate) name: &'static str,
    pub(crate) socket: TcpListener,
    pub(crate) tls: Arc<rustls::ServerConfig>,
}

/// Accepts until `stop`.
pub(crate) async fn accept<F, H>(
    listener: Listener,
    tasks: TaskTracker,
    stop: CancellationToken,
    handle: F,
) where
    F: Fn(TlsStream<TcpStream>, SocketAddr) -> H + Send + Sync + 'static,
    H: Future<Output = ()> + Send + 'static,
{
    let Listener { name, socket, tls } = listener;
    let tls = TlsAcceptor::from(tls);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let handle = Arc::new(handle);
    loop {
        let slot = tokio::select! {
            () = stop.cancelled() => return,
            slot = Arc::clone(&slots).acquire_owned() => slot.expect("never closed"),
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = socket.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(listener = name, %error, "could not accept a connection, trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (tls, handle, stop) = (tls.clone(), Arc::clone(&handle), stop.clone());
        tasks.spawn(async move {
            let _slot = slot;
            // Messages are small and somebody waits for each.
            let _ = stream.set_nodelay(true);
            let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream));
            let handshake = tokio::select! {
                () = stop.cancelled() => return,
                handshake = handshake => handshake,
            };
            match handshake {
                Ok(Ok(stream)) => handle(stream, peer).await,
                Ok(Err(error)) => {
                    tracing::info!(listener = name, %peer, %error, "TLS handshake failed");
                }
                Err(_) => tracing::info!(listener = name, %peer, "TLS handshake took too long"),
            }
        });
    }
}
