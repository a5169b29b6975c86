//! Addresses of sockets that the standard library has no type for, `poll`, and random numbers.
//!
//! The only place of the network code that needs `unsafe`, beside the clock
//! (`network/clock.rs`).

#![allow(unsafe_code)]

use nix::libc;
use socket2::SockAddr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Returns the kernel's netlink address, or for binding ours, with the groups to hear.
pub(crate) fn netlink_address(groups: u32) -> SockAddr {
    // SAFETY: `sockaddr_netlink` is shorter than `sockaddr_storage`, has no invalid bit patterns,
    // and the length set is that of what was written.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, len| {
            let address = storage.cast::<libc::sockaddr_nl>();
            (*address).nl_family = libc::AF_NETLINK as libc::sa_family_t;
            (*address).nl_pid = 0;
            (*address).nl_groups = groups;
            *len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
            Ok(())
        })
    }
    .expect("the closure cannot fail");
    address
}

/// Returns a link-layer address: packets of `protocol` (an EtherType) on interface `index`, sent to
/// `hardware`.
pub(crate) fn packet_address(index: u32, protocol: u16, hardware: [u8; 6]) -> SockAddr {
    // SAFETY: `sockaddr_ll` is shorter than `sockaddr_storage`, has no invalid bit patterns, and
    // the length set is that of what was written.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, len| {
            let address = storage.cast::<libc::sockaddr_ll>();
            (*address).sll_family = libc::AF_PACKET as libc::sa_family_t;
            (*address).sll_protocol = protocol.to_be();
            (*address).sll_ifindex = index as i32;
            (*address).sll_hatype = 0;
            (*address).sll_pkttype = 0;
            (*address).sll_halen = 6;
            (*address).sll_addr = [0; 8];
            (&mut (*address).sll_addr)[..6].copy_from_slice(&hardware);
            *len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    }
    .expect("the closure cannot fail");
    address
}

/// Waits until one of `sources` can be read or `timeout` is over; says which can be read.
///
/// A signal ends the wait early with nothing ready.
pub(crate) fn poll(sources: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    let mut entries: Vec<libc::pollfd> = sources
        .iter()
        .map(|source| libc::pollfd { fd: source.as_raw_fd(), events: libc::POLLIN, revents: 0 })
        .collect();
    // Rounded up, or a timer would be polled for in a busy loop during its last millisecond.
    let timeout = match timeout {
        None => -1,
        Some(timeout) => i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX),
    };
    let count = entries.len() as libc::nfds_t;
    // SAFETY: `entries` is a valid array of `count` entries that outlives the call.
    let result = unsafe { libc::poll(entries.as_mut_ptr(), count, timeout) };
    if result < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
        return Ok(vec![false; sources.len()]);
    }
    Ok(entries.iter().map(|entry| entry.revents != 0).collect())
}

/// Fills `bytes` with random ones.
///
/// They are as good as the kernel has them now. It is not asked to wait until it has gathered
/// enough: right after a start it would gather by turning in a loop, which takes two seconds of
/// the processor on a machine without a source of its own. What is made of these bytes is no
/// secret: hardware addresses, waits, numbers of questions.
pub(crate) fn fill_random(bytes: &mut [u8]) {
    // SAFETY: the pointer and the length are those of `bytes`.
    let len =
        unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_INSECURE) };
    // Short requests are never interrupted, and every kernel since 5.6 knows the flag.
    assert_eq!(usize::try_from(len), Ok(bytes.len()), "getrandom: {}", io::Error::last_os_error());
}
