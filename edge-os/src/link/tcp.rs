//! What the kernel is told about a TCP connection of the link, and what it tells: how long it waits before it sends a
//! lost segment again, and whether it is doing so now.
//!
//! While nothing gets through, the kernel doubles that wait each time, up to two minutes; after a cut the link would
//! stay silent for as long as the cut lasted. Our links carry little, so a steady repetition costs next to nothing.
//! `tls`, which dials, and `websocket` are the callers.
//!
//! Source: tcp(7); Linux, include/uapi/linux/tcp.h.

use nix::libc;
use nix::sys::socket::{getsockopt, setsockopt};
use socket2::SockRef;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::time::Duration;

/// Longest wait before a segment is sent again; the least that the kernel allows. Kernels before 6.15 know nothing of
/// it, and double the wait after six repetitions.
const REPEAT_WAIT_MAX_MS: u32 = 1000;
/// On a slow path it is as many round trips as this: what is only late is not to be sent twice.
const REPEAT_ROUND_TRIPS: u32 = 4;
/// When the round trip is not known.
const ROUND_TRIP_UNKNOWN_MS: u32 = 750;
/// The kernel gives the connection up when nothing was acknowledged for so long. The beats do that before; without
/// this the kernel would count repetitions, and give up after some fifteen.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(150);
/// `TCP_RTO_MAX_MS`.
const RTO_MAX_MS: libc::c_int = 44;

/// The part of `struct tcp_info` that every kernel has. With the whole structure the call fails, and `nix` panics, on a
/// kernel that is older than our headers: it gives fewer bytes than were asked for.
type TcpInfo = [u8; 104];

fn field(info: &TcpInfo, at: usize) -> u32 {
    u32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes"))
}

#[derive(Clone, Copy)]
struct RepeatWaitMax;
#[derive(Clone, Copy)]
struct Info;

nix::setsockopt_impl!(
    RepeatWaitMax,
    libc::IPPROTO_TCP,
    RTO_MAX_MS,
    u32,
    nix::sys::socket::sockopt::SetStruct<u32>
);
nix::getsockopt_impl!(
    Info,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    TcpInfo,
    nix::sys::socket::sockopt::GetStruct<TcpInfo>
);

/// Sets what was said above; a system that knows none of it is used as it is.
pub(crate) fn tune(socket: &impl AsFd) {
    let reference = SockRef::from(socket);
    let linear = reference.set_tcp_thin_linear_timeouts(true);
    let given_up = reference.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX));
    let rtt_us = getsockopt(socket, Info)
        .map_or(0, |info| field(&info, offset_of!(libc::tcp_info, tcpi_rtt)));
    let rtt_ms = if rtt_us > 0 { rtt_us / 1000 } else { ROUND_TRIP_UNKNOWN_MS };
    let wait_ms = rtt_ms.saturating_mul(REPEAT_ROUND_TRIPS).max(REPEAT_WAIT_MAX_MS);
    let longest = setsockopt(socket, RepeatWaitMax, &wait_ms);
    tracing::trace!(?linear, ?given_up, ?longest, "TCP is told how to repeat");
}

/// What the kernel knows about segments that the peer has not acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Repeats {
    /// Whether there are any.
    pub(super) is_waiting: bool,
    /// How often the first of them was sent again in vain.
    pub(super) count: u8,
}

/// Asks the kernel; `None` when it does not say.
pub(super) fn repeats(socket: &impl AsFd) -> Option<Repeats> {
    let info = getsockopt(socket, Info).ok()?;
    let waiting = field(&info, offset_of!(libc::tcp_info, tcpi_unacked));
    let count = info[offset_of!(libc::tcp_info, tcpi_retransmits)];
    Some(Repeats { is_waiting: waiting > 0, count })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn kernel_takes_what_it_knows_and_says_what_waits() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        let mut near = TcpStream::connect(address).expect("connected");
        tune(&near);
        assert!(SockRef::from(&near).tcp_thin_linear_timeouts().expect("known since 2.6.34"));
        let (mut far, _) = listener.accept().expect("accepted");
        near.write_all(b"x").expect("written");
        far.read_exact(&mut [0]).expect("read");
        far.write_all(b"y").expect("written");
        near.read_exact(&mut [0]).expect("read");
        // The answer acknowledges what it answers.
        assert_eq!(repeats(&near), Some(Repeats { is_waiting: false, count: 0 }));
    }
}
