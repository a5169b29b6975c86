//! The system calls of the probes: the only place with `unsafe`. Each gives the errno back as it is, since the errno is
//! the evidence.
#![allow(unsafe_code)]

use nix::libc;
use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// An errno.
pub(super) type Errno = i32;

/// Its name and words: `EINVAL (Invalid argument)`.
pub(super) fn errno_text(errno: Errno) -> String {
    match errno {
        // Not in errno.h: what BPF answers for what a JIT or type cannot do, and ipset's own.
        524 => "errno 524 (ENOTSUPP)".into(),
        4098 => "errno 4098 (ipset: no such type)".into(),
        other => {
            let errno = nix::errno::Errno::from_raw(other);
            format!("{errno:?} ({})", errno.desc())
        }
    }
}

fn result(value: i64) -> Result<i64, Errno> {
    // libc's wrapper of syscall sets errno; nix reads it.
    if value < 0 { Err(nix::errno::Errno::last_raw()) } else { Ok(value) }
}

fn fd(value: i64) -> OwnedFd {
    // SAFETY: called only with a descriptor that the kernel has just given to us and that nothing else owns.
    unsafe { OwnedFd::from_raw_fd(value as RawFd) }
}

/// `bpf(2)` with an attribute of the size given. Commands that make something answer with its descriptor.
pub(super) fn bpf(command: i32, attr: &mut [u8]) -> Result<i64, Errno> {
    // SAFETY: `attr` is live and writable for the length that is told; pointers inside it are of buffers that the
    // callers keep alive over the call.
    result(unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), attr.len()) })
}

/// As [`bpf`], for commands that answer with a descriptor.
pub(super) fn bpf_fd(command: i32, attr: &mut [u8]) -> Result<OwnedFd, Errno> {
    bpf(command, attr).map(fd)
}

/// A system call that takes numbers only.
pub(super) fn call(number: i64, args: [i64; 6]) -> Result<i64, Errno> {
    // SAFETY: the callers pass numbers and null pointers only (src/probe/host.rs, `SYSCALLS`), which the kernel checks.
    result(unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4], args[5]) })
}

/// Closes a descriptor that a system call gave.
pub(super) fn close(value: i64) {
    drop(fd(value));
}

/// Lets everything else on the machine go first: lowest priority of the processor, idle class of the disk. Children
/// inherit it.
pub(super) fn give_way() {
    const LOWEST: i32 = 19;
    /// `IOPRIO_WHO_PROCESS`, and `IOPRIO_CLASS_IDLE` in its place.
    const WHO_PROCESS: i64 = 1;
    const CLASS_IDLE: i64 = 3 << 13;
    // SAFETY: numbers only; a refusal leaves the priority as it is.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, LOWEST) };
    let _ = call(libc::SYS_ioprio_set, [WHO_PROCESS, 0, CLASS_IDLE, 0, 0, 0]);
}

/// `socket(2)`.
pub(super) fn socket(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: numbers only.
    result(i64::from(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })).map(fd)
}

/// `setsockopt(2)` with raw bytes.
pub(super) fn set_option(
    socket: &OwnedFd,
    level: i32,
    option: i32,
    value: &[u8],
) -> Result<(), Errno> {
    // SAFETY: `value` is live for the length that is told.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            value.as_ptr().cast(),
            value.len() as u32,
        )
    };
    result(i64::from(done)).map(drop)
}

/// `getsockopt(2)` with raw bytes in and out.
pub(super) fn get_option(
    socket: &OwnedFd,
    level: i32,
    option: i32,
    value: &mut [u8],
) -> Result<(), Errno> {
    let mut len = value.len() as u32;
    // SAFETY: `value` is live and writable for the length that is told.
    let done = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, value.as_mut_ptr().cast(), &mut len)
    };
    result(i64::from(done)).map(drop)
}

/// `bind(2)` with raw bytes of an address.
pub(super) fn bind(socket: &OwnedFd, address: &[u8]) -> Result<(), Errno> {
    // SAFETY: `address` is live for the length that is told.
    let done =
        unsafe { libc::bind(socket.as_raw_fd(), address.as_ptr().cast(), address.len() as u32) };
    result(i64::from(done)).map(drop)
}

/// `send(2)`.
pub(super) fn send(socket: &OwnedFd, bytes: &[u8]) -> Result<(), Errno> {
    // SAFETY: `bytes` is live for the length that is told.
    let sent = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
    result(sent as i64).map(drop)
}

/// `recv(2)` into `buffer`; how much came.
pub(super) fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: `buffer` is live and writable for the length that is told.
    let got =
        unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    result(got as i64).map(|got| got as usize)
}

/// `SIOCETHTOOL` about the network card of this name. `value` begins with the command; the answer comes back in it.
pub(super) fn ethtool(socket: &OwnedFd, card: &str, value: &mut [u8; 8]) -> Result<(), Errno> {
    const SIOCETHTOOL: u64 = 0x8946;
    /// Offset and length of the name and of the pointer in `struct ifreq`.
    const NAME_MAX: usize = 15;
    const POINTER_AT: usize = 16;
    let mut request = [0; 40];
    let name = card.as_bytes().get(..NAME_MAX).unwrap_or(card.as_bytes());
    request[..name.len()].copy_from_slice(name);
    let pointer = (value.as_mut_ptr() as usize).to_ne_bytes();
    request[POINTER_AT..POINTER_AT + pointer.len()].copy_from_slice(&pointer);
    // The commands of the callers read and write a `struct ethtool_value`, which `value` is, and it lives over the call.
    ioctl(socket, SIOCETHTOOL, &mut request).map(drop)
}

/// `ioctl(2)` with a buffer.
pub(super) fn ioctl(file: &impl AsRawFd, request: u64, buffer: &mut [u8]) -> Result<i64, Errno> {
    // SAFETY: every request of the callers reads and writes at most `buffer`'s length.
    result(i64::from(unsafe { libc::ioctl(file.as_raw_fd(), request as _, buffer.as_mut_ptr()) }))
}

/// Runs `probe` in a forked child, so that what it changes of itself goes with it; its text comes back.
///
/// Only called in the probing process, which has one thread.
pub(super) fn in_child(probe: impl FnOnce() -> String) -> Result<String, Errno> {
    let mut pipe = [0; 2];
    // SAFETY: `pipe` has room for two descriptors.
    result(i64::from(unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) }))?;
    let (read, write) = (fd(pipe[0].into()), fd(pipe[1].into()));
    // SAFETY: this process has one thread, so the child may do anything.
    match result(i64::from(unsafe { libc::fork() }))? {
        0 => {
            drop(read);
            let text = probe();
            let _ = std::fs::File::from(write).write_all(text.as_bytes());
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(0) }
        }
        child => {
            drop(write);
            let mut text = String::new();
            let _ = std::fs::File::from(read).take(64 << 10).read_to_string(&mut text);
            let mut status = 0;
            // SAFETY: `status` is live; `child` is ours.
            unsafe { libc::waitpid(child as i32, &mut status, 0) };
            Ok(text)
        }
    }
}

/// Dies with the parent, so that nothing of a killed run stays behind.
pub(super) fn die_with_parent() {
    // SAFETY: numbers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Waits until `file` can be read, at most `ms` milliseconds; whether it can.
pub(super) fn readable(file: &impl AsRawFd, ms: i32) -> bool {
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one live pollfd.
    unsafe { libc::poll(&mut poll, 1, ms) > 0 }
}

/// Raises the limit of locked memory, which older kernels charge BPF to.
pub(super) fn raise_memlock() -> Result<(), Errno> {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `limit` is live.
    result(i64::from(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) })).map(drop)
}

/// State and status bits of the kernel's clock discipline (`adjtimex`): (state, status, maximum error in µs).
pub(super) fn clock_state() -> Result<(i32, i32, i64), Errno> {
    // SAFETY: all zero is a valid timex that changes nothing.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `timex` is live and writable.
    let state = result(i64::from(unsafe { libc::adjtimex(&mut timex) }))?;
    Ok((state as i32, timex.status, timex.maxerror as i64))
}

/// Whether random numbers are ready.
pub(super) fn random_ready() -> Result<(), Errno> {
    let mut bytes = [0u8; 8];
    // SAFETY: `bytes` is live and writable.
    let got =
        unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    result(got as i64).map(drop)
}

/// File system type of a path (`statfs`).
pub(super) fn filesystem_type(path: &str) -> Result<i64, Errno> {
    let path = CString::new(path).map_err(|_| libc::EINVAL)?;
    // SAFETY: all zero is a valid statfs.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` ends with NUL and `stat` is writable.
    result(i64::from(unsafe { libc::statfs(path.as_ptr(), &mut stat) }))?;
    Ok(stat.f_type as i64)
}

/// A buffer's address as BPF attributes and messages carry it.
pub(super) fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr() as u64
}
