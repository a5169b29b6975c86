//! Accepts TLS connections and gives each to a handler, in a task of its own.
//!
//! Handshakes cost a signature each, so only so many run at a time; the others wait in the system's queue, where they
//! cost this process nothing.
//!
//! The kernel is asked not to double the wait before it sends a lost segment again for as long as nothing gets through:
//! a node whose network comes back would hear from us only after as long as it was away.

use crate::monitor::Counters;
use nix::libc;
use nix::sys::socket::{getsockopt, setsockopt};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A peer that has not finished its handshakes by then is dropped.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Open connections per listener; more wait in the system's backlog.
pub(crate) const CONNECTIONS_MAX: usize = 20_000;
/// The same while more than half of [`HANDSHAKES_MAX`] are at it, so that those who never finish do not keep others out.
const HANDSHAKE_TIMEOUT_BUSY: Duration = Duration::from_secs(3);
/// Connections per listener whose handshakes are not done. Each costs up to 30 KiB for its time.
const HANDSHAKES_MAX: usize = 1024;
/// How many connections the system keeps for us to accept, as far as it lets us.
const BACKLOG: u32 = 4096;
/// Longest wait before a lost segment is sent again, in milliseconds; the least that the kernel allows. Kernels before
/// 6.15 know nothing of it, and double the wait after six repetitions.
const REPEAT_WAIT_MAX_MS: u32 = 1000;
/// On a slow path it is as many round trips as this: what is only late is not to be sent twice.
const REPEAT_ROUND_TRIPS: u32 = 4;
/// When the round trip is not known.
const ROUND_TRIP_UNKNOWN_MS: u32 = 750;
/// The kernel gives a connection up when nothing was acknowledged for so long. Sessions do that before; without this the
/// kernel would count repetitions, and give up after some fifteen.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(150);
/// Linux, include/uapi/linux/tcp.h: `TCP_RTO_MAX_MS`.
const RTO_MAX_MS: libc::c_int = 44;
/// Pause after a failed accept, which is mostly a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// An open listener.
pub(crate) struct Listener {
    pub(crate) name: &'static str,
    pub(crate) socket: TcpListener,
    pub(crate) tls: Arc<rustls::ServerConfig>,
    pub(crate) counters: Arc<Counters>,
}

/// The right to be open, and, until [`Self::opened`], the right to be in the opening handshake.
pub(crate) struct Place {
    handshake: Option<OwnedSemaphorePermit>,
    _open: OwnedSemaphorePermit,
}

impl Place {
    /// Of a connection whose handshakes are counted elsewhere.
    pub(crate) fn of(open: OwnedSemaphorePermit) -> Self {
        Self { handshake: None, _open: open }
    }

    /// The opening handshake is over, so that another connection may begin with its own.
    pub(crate) fn opened(&mut self) {
        self.handshake = None;
    }
}

/// Opens a listener whose queue is long enough for a fleet that comes back at once.
pub(crate) fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
        SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The part of `struct tcp_info` that every kernel has. With the whole structure the call fails, and `nix` panics, on a
/// kernel that is older than our headers: it gives fewer bytes than were asked for.
type TcpInfo = [u8; 104];

#[derive(Clone, Copy)]
struct RepeatWaitMax;
#[derive(Clone, Copy)]
struct Info;

nix::getsockopt_impl!(
    Info,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    TcpInfo,
    nix::sys::socket::sockopt::GetStruct<TcpInfo>
);

nix::setsockopt_impl!(
    RepeatWaitMax,
    libc::IPPROTO_TCP,
    RTO_MAX_MS,
    u32,
    nix::sys::socket::sockopt::SetStruct<u32>
);

/// A system that knows nothing of it is used as it is.
fn repeat_steadily(stream: &TcpStream) {
    let reference = socket2::SockRef::from(stream);
    let linear = reference.set_tcp_thin_linear_timeouts(true);
    let given_up = reference.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX));
    let at = std::mem::offset_of!(libc::tcp_info, tcpi_rtt);
    let rtt = |info: TcpInfo| u32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes"));
    let rtt_us = getsockopt(stream, Info).map_or(0, rtt);
    let rtt_ms = if rtt_us > 0 { rtt_us / 1000 } else { ROUND_TRIP_UNKNOWN_MS };
    let wait_ms = rtt_ms.saturating_mul(REPEAT_ROUND_TRIPS).max(REPEAT_WAIT_MAX_MS);
    let longest = setsockopt(stream, RepeatWaitMax, &wait_ms);
    tracing::trace!(?linear, ?given_up, ?longest, "TCP is told how to repeat");
}

/// Accepts until `stop`. `handle` gets the connection after the TLS handshake.
pub(crate) async fn accept<F, H>(
    listener: Listener,
    tasks: TaskTracker,
    stop: CancellationToken,
    handle: F,
) where
    F: Fn(TlsStream<TcpStream>, SocketAddr, Place) -> H + Send + Sync + 'static,
    H: Future<Output = ()> + Send + 'static,
{
    let Listener { name, socket, tls, counters } = listener;
    let tls = TlsAcceptor::from(tls);
    let open = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let handle = Arc::new(handle);
    loop {
        let permit = async {
            let open = Arc::clone(&open).acquire_owned().await.expect("never closed");
            let handshake = Arc::clone(&handshakes).acquire_owned().await.expect("never closed");
            Place { handshake: Some(handshake), _open: open }
        };
        let place = tokio::select! {
            () = stop.cancelled() => return,
            place = permit => place,
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
        let counters = Arc::clone(&counters);
        let is_busy = handshakes.available_permits() < HANDSHAKES_MAX / 2;
        let patience = if is_busy { HANDSHAKE_TIMEOUT_BUSY } else { HANDSHAKE_TIMEOUT };
        tasks.spawn(async move {
            // Messages are small and somebody waits for each.
            let _ = stream.set_nodelay(true);
            repeat_steadily(&stream);
            // On the heap, so that the long life of the connection does not keep room for it.
            let handshake = Box::pin(tokio::time::timeout(patience, tls.accept(stream)));
            let handshake = tokio::select! {
                () = stop.cancelled() => return,
                handshake = handshake => handshake,
            };
            match handshake {
                Ok(Ok(stream)) => handle(stream, peer, place).await,
                Ok(Err(error)) => {
                    counters.handshakes_failed.add(1);
                    tracing::info!(listener = name, %peer, %error, "TLS handshake failed");
                }
                Err(_) => {
                    counters.handshakes_failed.add(1);
                    tracing::info!(listener = name, %peer, "TLS handshake took too long");
                }
            }
        });
    }
}
