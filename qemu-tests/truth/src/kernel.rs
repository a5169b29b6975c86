//! The system calls of the machine's PID 1: modules, and a few eBPF programs that only say yes or no.
//!
//! Written apart from the probes of `skerry-qualify`, so that a mistake there is not repeated here.
//! Source: Linux, include/uapi/linux/bpf.h.
#![allow(unsafe_code)]

use anyhow::{Context, Result, bail};
use nix::libc;
use std::ffi::CString;
use std::fs::File;
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

const PROG_LOAD: i32 = 5;
const OBJ_PIN: i32 = 6;
const PROG_ATTACH: i32 = 8;
const PROG_DETACH: i32 = 9;
const SCHED_CLS: u32 = 3;
const CGROUP_DEVICE: u32 = 15;
const CGROUP_SOCK_ADDR: u32 = 18;
const ATTACH_DEVICE: u32 = 6;
const ATTACH_CONNECT4: u32 = 10;

/// Where a program says no.
#[derive(Clone, Copy)]
pub(crate) enum Hook {
    /// To IPv4 connections.
    Connect4,
    /// To devices.
    Device,
}

/// Loads one module file; one that is loaded is fine.
pub(crate) fn load(path: &Path) -> Result<()> {
    let file = File::open(path).context("no file")?;
    let none = CString::default();
    // SAFETY: the descriptor and the empty text live over the call.
    let done = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), none.as_ptr(), 0) };
    let error = Error::last_os_error();
    match done {
        0 => Ok(()),
        _ if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        _ => Err(error.into()),
    }
}

/// Unloads one module that nothing uses.
pub(crate) fn unload(name: &str) -> Result<()> {
    let name = CString::new(name)?;
    // SAFETY: the text lives over the call.
    let done = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    if done == 0 { Ok(()) } else { Err(Error::last_os_error().into()) }
}

/// Ends the machine.
pub(crate) fn power_off() {
    nix::unistd::sync();
    // SAFETY: a number; on success it does not return.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
}

/// Most memory that one child had at once.
pub(crate) fn children_peak_rss_kib() -> u64 {
    // SAFETY: a struct of numbers, all zero is one of its values; the kernel fills it.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the struct lives over the call.
    unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) };
    usage.ru_maxrss as u64
}

fn bpf(command: i32, attr: &mut [u64; 16]) -> Result<i32> {
    // SAFETY: `attr` lives over the call and is as long as is told; the pointers in it are of buffers of the callers, who
    // keep them that long.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(attr)) };
    if done < 0 {
        let error = Error::last_os_error();
        bail!("bpf({command}): {error}");
    }
    Ok(done as i32)
}

/// A program that answers with a number.
fn program(kind: u32, attach: u32, answer: i32) -> Result<OwnedFd> {
    // r0 = answer; exit
    let code: [u64; 2] = [0xb7 | (answer as u32 as u64) << 32, 0x95];
    let license = CString::new("GPL").expect("no NUL");
    let mut attr = [0u64; 16];
    attr[0] = u64::from(kind) | 2 << 32;
    attr[1] = code.as_ptr() as u64;
    attr[2] = license.as_ptr() as u64;
    // expected_attach_type, at byte 68.
    attr[8] = u64::from(attach) << 32;
    let fd = bpf(PROG_LOAD, &mut attr)?;
    // SAFETY: the kernel gave this descriptor just now.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a program that answers with a number, at a path of the BPF file system.
pub(crate) fn pin(kind: &str, answer: i32, path: &str) -> Result<()> {
    let kind = match kind {
        "sched_cls" => SCHED_CLS,
        other => bail!("no kind `{other}`"),
    };
    let program = program(kind, 0, answer)?;
    let path = CString::new(path)?;
    let mut attr = [0u64; 16];
    attr[0] = path.as_ptr() as u64;
    attr[1] = program.as_raw_fd() as u64;
    bpf(OBJ_PIN, &mut attr).map(drop)
}

/// A program on a cgroup, until it is dropped.
pub(crate) struct Attached {
    folder: File,
    program: OwnedFd,
    attach: u32,
}

/// Attaches a program that says no.
pub(crate) fn attach(folder: &Path, hook: Hook) -> Result<Attached> {
    let (kind, attach) = match hook {
        Hook::Connect4 => (CGROUP_SOCK_ADDR, ATTACH_CONNECT4),
        Hook::Device => (CGROUP_DEVICE, ATTACH_DEVICE),
    };
    let program = program(kind, attach, 0)?;
    let attached = Attached { folder: File::open(folder)?, program, attach };
    attached.call(PROG_ATTACH)?;
    Ok(attached)
}

impl Attached {
    fn call(&self, command: i32) -> Result<()> {
        let mut attr = [0u64; 16];
        attr[0] = self.folder.as_raw_fd() as u64 | (self.program.as_raw_fd() as u64) << 32;
        attr[1] = u64::from(self.attach);
        bpf(command, &mut attr).map(drop)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.call(PROG_DETACH);
    }
}
