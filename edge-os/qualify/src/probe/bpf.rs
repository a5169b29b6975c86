//! Probes of `bpf(2)`: maps, programs, helpers, what the verifier accepts, type information.
//!
//! Everything made here goes with its descriptor: nothing is pinned, nothing is attached outside a private network
//! namespace or an own cgroup. Facts: include/uapi/linux/bpf.h and btf.h.

use super::sys::{self, Errno};
use crate::judge::Seen;
use std::os::fd::{AsRawFd, OwnedFd};

const MAP_CREATE: i32 = 0;
const MAP_LOOKUP_BATCH: i32 = 24;
const PROG_LOAD: i32 = 5;
const PROG_ATTACH: i32 = 8;
const PROG_DETACH: i32 = 9;
const TEST_RUN: i32 = 10;
const GET_INFO: i32 = 15;
const BTF_LOAD: i32 = 18;
const LINK_CREATE: i32 = 28;

const EPERM: Errno = 1;
const ENOENT: Errno = 2;
const E2BIG: Errno = 7;
const EBADF: Errno = 9;
const EACCES: Errno = 13;
const EINVAL: Errno = 22;
const ENOSYS: Errno = 38;
const EOPNOTSUPP: Errno = 95;
/// The kernel's internal ENOTSUPP, which BPF lets out.
const ENOTSUPP: Errno = 524;

/// An attribute being filled: fields at fixed offsets, as long as its last field.
struct Attr(Vec<u8>);

impl Attr {
    fn new(len: usize) -> Self {
        Self(vec![0; len])
    }

    fn u32(mut self, at: usize, value: u32) -> Self {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, at: usize, value: u64) -> Self {
        self.0[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }
}

/// One instruction: opcode, registers (destination in the low half), offset, immediate.
const fn i(op: u8, dst: u8, src: u8, off: i16, imm: i32) -> [u8; 8] {
    let (o, m) = (off.to_ne_bytes(), imm.to_ne_bytes());
    let regs = if cfg!(target_endian = "little") { src << 4 | dst } else { dst << 4 | src };
    [op, regs, o[0], o[1], m[0], m[1], m[2], m[3]]
}

const EXIT: [u8; 8] = i(0x95, 0, 0, 0, 0);
const RETURN_0: [u8; 8] = i(0xb7, 0, 0, 0, 0);
const RETURN_1: [u8; 8] = i(0xb7, 0, 0, 0, 1);

/// A program type: number, attach type that it is loaded with, whether it must return 0.
struct Kind {
    name: &'static str,
    number: u32,
    attach: u32,
    zero: bool,
    flags: u32,
    /// Kernel function in whose type information it hooks.
    of: Option<&'static str>,
}

const fn kind(name: &'static str, number: u32, attach: u32, zero: bool) -> Kind {
    Kind { name, number, attach, zero, flags: 0, of: None }
}

const KINDS: &[Kind] = &[
    kind("socket_filter", 1, 0, true),
    kind("kprobe", 2, 0, true),
    kind("sched_cls", 3, 0, true),
    kind("sched_act", 4, 0, true),
    kind("tracepoint", 5, 0, true),
    kind("xdp", 6, 0, false),
    kind("perf_event", 7, 0, true),
    kind("cgroup_skb", 8, 0, false),
    kind("cgroup_sock", 9, 2, false),
    kind("lwt_in", 10, 0, true),
    kind("sock_ops", 13, 3, false),
    kind("sk_skb", 14, 0, false),
    kind("cgroup_device", 15, 6, false),
    kind("sk_msg", 16, 7, false),
    kind("raw_tracepoint", 17, 0, true),
    kind("cgroup_sock_addr", 18, 10, false),
    kind("sk_reuseport", 21, 0, false),
    kind("flow_dissector", 22, 0, true),
    kind("cgroup_sysctl", 23, 18, false),
    kind("cgroup_sockopt", 25, 21, false),
    Kind { of: Some("vfs_read"), ..kind("tracing", 26, 24, true) },
    kind("struct_ops", 27, 0, true),
    Kind { of: Some("bpf_lsm_file_mprotect"), ..kind("lsm", 29, 27, true) },
    kind("sk_lookup", 30, 36, false),
    Kind { flags: 0x10, ..kind("syscall", 31, 0, true) },
    kind("netfilter", 32, 45, false),
];

fn kind_of(name: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|kind| kind.name == name)
}

/// A loaded program, or the errno and the verifier's last words.
struct Refused {
    errno: Errno,
    log: String,
}

impl Refused {
    fn text(&self) -> String {
        let last = self.log.lines().rfind(|line| !line.starts_with("processed ")).unwrap_or("");
        match last.is_empty() {
            true => sys::errno_text(self.errno),
            false => format!("{}: {last}", sys::errno_text(self.errno)),
        }
    }
}

/// More fields of a program.
#[derive(Default)]
struct Extra<'a> {
    flags: u32,
    attach: u32,
    attach_btf_id: u32,
    btf: Option<&'a OwnedFd>,
    func_info: &'a [u8],
}

fn load(number: u32, code: &[[u8; 8]], extra: &Extra) -> Result<OwnedFd, Refused> {
    let code: Vec<u8> = code.concat();
    let license = b"GPL\0";
    let mut log = vec![0u8; 16 << 10];
    // Old kernels refuse an attribute with fields that they do not know, so it is as long as what is used.
    let len = match extra {
        Extra { attach_btf_id: 1.., .. } => 112,
        Extra { btf: Some(_), .. } => 96,
        Extra { attach: 1.., .. } => 72,
        _ => 48,
    };
    let mut attr = Attr::new(len)
        .u32(0, number)
        .u32(4, (code.len() / 8) as u32)
        .u64(8, sys::address(&code))
        .u64(16, sys::address(license))
        .u32(24, 1)
        .u32(28, log.len() as u32)
        .u64(32, sys::address(&log))
        .u32(44, extra.flags);
    if len >= 72 {
        attr = attr.u32(68, extra.attach);
    }
    if let Some(btf) = extra.btf {
        attr = attr
            .u32(72, btf.as_raw_fd() as u32)
            .u32(76, 8)
            .u64(80, sys::address(extra.func_info))
            .u32(88, (extra.func_info.len() / 8) as u32);
    }
    if extra.attach_btf_id > 0 {
        attr = attr.u32(108, extra.attach_btf_id);
    }
    sys::bpf_fd(PROG_LOAD, &mut attr.0).or_else(|errno| {
        // A long program's log did not fit (ENOSPC): the same without one.
        if errno == 28 {
            attr.0[24..40].fill(0);
            if let Ok(program) = sys::bpf_fd(PROG_LOAD, &mut attr.0) {
                return Ok(program);
            }
        }
        let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
        log.truncate(end);
        Err(Refused { errno, log: String::from_utf8_lossy(&log).into_owned() })
    })
}

/// What a refusal without a known meaning is.
fn refused(refused: &Refused) -> Seen {
    let text = refused.text();
    match refused.errno {
        EPERM => Seen::NotPermitted(text),
        ENOSYS | EINVAL | ENOTSUPP | EOPNOTSUPP | ENOENT => Seen::Absent(text),
        E2BIG => Seen::TooOld(text),
        _ => Seen::Unclear(text),
    }
}

fn works(text: impl Into<String>) -> Seen {
    Seen::Works(text.into())
}

/// Type, key, value and entries of each map.
const MAPS: &[(&str, u32, u32, u32, u32, u32)] = &[
    ("hash", 1, 4, 4, 1, 0),
    ("array", 2, 4, 4, 1, 0),
    ("prog_array", 3, 4, 4, 1, 0),
    ("perf_event_array", 4, 4, 4, 1, 0),
    ("percpu_hash", 5, 4, 4, 1, 0),
    ("percpu_array", 6, 4, 4, 1, 0),
    ("stack_trace", 7, 4, 8, 1, 0),
    ("cgroup_array", 8, 4, 4, 1, 0),
    ("lru_hash", 9, 4, 4, 1, 0),
    ("lru_percpu_hash", 10, 4, 4, 1, 0),
    ("lpm_trie", 11, 8, 8, 1, 1),
    ("array_of_maps", 12, 4, 4, 1, 0),
    ("hash_of_maps", 13, 4, 4, 1, 0),
    ("devmap", 14, 4, 4, 1, 0),
    ("sockmap", 15, 4, 4, 1, 0),
    ("cpumap", 16, 4, 4, 1, 0),
    ("xskmap", 17, 4, 4, 1, 0),
    ("sockhash", 18, 4, 4, 1, 0),
    ("cgroup_storage", 19, 16, 4, 0, 0),
    ("reuseport_sockarray", 20, 4, 4, 1, 0),
    ("queue", 22, 0, 4, 1, 0),
    ("stack", 23, 0, 4, 1, 0),
    ("sk_storage", 24, 4, 4, 0, 1),
    ("devmap_hash", 25, 4, 4, 1, 0),
    ("struct_ops", 26, 4, 4, 1, 0),
    ("ringbuf", 27, 0, 0, 4096, 0),
    ("inode_storage", 28, 4, 4, 0, 1),
    ("task_storage", 29, 4, 4, 0, 1),
    ("bloom_filter", 30, 0, 4, 1, 0),
    ("user_ringbuf", 31, 0, 0, 4096, 0),
    ("cgrp_storage", 32, 4, 4, 0, 1),
    ("arena", 33, 0, 0, 1, 0x400),
];

fn create(name: &str) -> Result<OwnedFd, Errno> {
    let Some((_, number, key, value, entries, flags)) = MAPS.iter().find(|map| map.0 == name)
    else {
        return Err(EINVAL);
    };
    let storage = name.ends_with("_storage") && name != "cgroup_storage";
    let entries = match name {
        // Page sizes differ; a page is the least.
        "ringbuf" | "user_ringbuf" => page_size(),
        _ => *entries,
    };
    let of_maps = name.ends_with("_of_maps");
    let inner = if of_maps { Some(create("hash")?) } else { None };
    let len = if name == "struct_ops" {
        64
    } else if storage {
        60
    } else {
        24
    };
    let mut attr =
        Attr::new(len).u32(0, *number).u32(4, *key).u32(8, *value).u32(12, entries).u32(16, *flags);
    if let Some(inner) = &inner {
        attr = attr.u32(20, inner.as_raw_fd() as u32);
    }
    if storage {
        attr = attr.u32(48, u32::MAX).u32(52, 1).u32(56, 1);
    }
    if name == "struct_ops" {
        attr = attr.u32(60, 1);
    }
    sys::bpf_fd(MAP_CREATE, &mut attr.0)
}

fn page_size() -> u32 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .map_or(4096, |n| n as u32)
}

/// A map of a type.
pub(super) fn map(name: &str) -> Seen {
    let storage = name.ends_with("_storage") && name != "cgroup_storage";
    match create(name) {
        Ok(_) => works("made one"),
        // The kernel knows the type and asks for type information that is not given.
        Err(EBADF) if storage => works("EBADF for a wrong type description: the type is known"),
        Err(ENOTSUPP) if name == "struct_ops" => {
            works("ENOTSUPP for a wrong type: the type is known")
        }
        Err(errno) => refused(&Refused { errno, log: String::new() }),
    }
}

/// Batches of map entries.
pub(super) fn batch() -> Seen {
    let Ok(hash) = create("hash") else { return Seen::Unclear("no hash map".into()) };
    let (next, keys, values) = ([0u8; 4], [0u8; 4], [0u8; 4]);
    let mut attr = Attr::new(56)
        .u64(8, sys::address(&next))
        .u64(16, sys::address(&keys))
        .u64(24, sys::address(&values))
        .u32(32, 1)
        .u32(36, hash.as_raw_fd() as u32);
    match sys::bpf(MAP_LOOKUP_BATCH, &mut attr.0) {
        Ok(_) | Err(ENOENT) => works("an empty map has no batch"),
        Err(errno) => refused(&Refused { errno, log: String::new() }),
    }
}

/// A program of a type, loaded.
pub(super) fn program(name: &str) -> Seen {
    let Some(kind) = kind_of(name) else { return Seen::Unclear(format!("no type `{name}`")) };
    let mut extra = Extra { flags: kind.flags, attach: kind.attach, ..Extra::default() };
    if let Some(function) = kind.of {
        match kernel_btf().map(|btf| btf.function(function)) {
            Ok(Some(id)) => extra.attach_btf_id = id,
            Ok(None) => return Seen::Absent(format!("the kernel has no function {function}")),
            Err(error) => return Seen::Absent(error),
        }
    }
    let code = [if kind.zero { RETURN_0 } else { RETURN_1 }, EXIT];
    match load(kind.number, &code, &extra) {
        Ok(_) => works("loaded one"),
        Err(Refused { errno: ENOTSUPP, .. }) if name == "struct_ops" => {
            works("ENOTSUPP without a structure: the type is known")
        }
        Err(error) => refused(&error),
    }
}

/// An attach type that the kernel checks when a program is loaded.
pub(super) fn attach_type(name: &str, attach: u32) -> Seen {
    let Some(kind) = kind_of(name) else { return Seen::Unclear(format!("no type `{name}`")) };
    match load(kind.number, &[RETURN_1, EXIT], &Extra { attach, ..Extra::default() }) {
        Ok(_) => works("loaded one"),
        Err(error) => refused(&error),
    }
}

/// A helper, called from a program of a type.
pub(super) fn helper(name: &str, id: i32) -> Seen {
    let Some(kind) = kind_of(name) else { return Seen::Unclear(format!("no type `{name}`")) };
    let code = [i(0x85, 0, 0, 0, id), if kind.zero { RETURN_0 } else { RETURN_1 }, EXIT];
    let extra = Extra { attach: kind.attach, flags: kind.flags, ..Extra::default() };
    // Reading the kernel's memory is what lockdown=confidentiality forbids, with the same answer as "no such helper".
    const READS_MEMORY: [i32; 4] = [4, 45, 113, 115];
    match load(kind.number, &code, &extra) {
        Ok(_) => works("called it"),
        // The verifier got as far as its arguments.
        Err(error) if error.errno == EACCES => works("the verifier knows its arguments"),
        Err(error) if error.errno == EINVAL => {
            let unknown = ["unknown func", "cannot use helper", "invalid func"];
            let said = unknown.iter().any(|phrase| error.log.contains(phrase));
            let locked = READS_MEMORY.contains(&id) && super::host::lockdown() == "confidentiality";
            match (said, locked) {
                (true, true) => {
                    Seen::NotPermitted(format!("{}; lockdown=confidentiality", error.text()))
                }
                (true, false) => Seen::Absent(error.text()),
                (false, _) => {
                    works(format!("the verifier complains of something else: {}", error.text()))
                }
            }
        }
        Err(error) => refused(&error),
    }
}

/// Whether the verifier accepts what newer data planes are compiled to.
pub(super) fn verify(what: &str) -> Seen {
    let mut long = vec![RETURN_1; 4096];
    long.push(EXIT);
    let (number, code): (u32, Vec<[u8; 8]>) = match what {
        "large_insns" => (1, long),
        "bounded_loop" => {
            (1, vec![i(0xb7, 0, 0, 0, 10), i(0x17, 0, 0, 0, 1), i(0x55, 0, 0, -2, 0), EXIT])
        }
        "isa_v2" => (1, vec![RETURN_0, i(0xa5, 0, 0, 1, 0), RETURN_1, EXIT]),
        "isa_v3" => (1, vec![RETURN_0, i(0xa6, 0, 0, 1, 0), RETURN_1, EXIT]),
        "isa_v4" => (1, vec![RETURN_0, i(0x15, 0, 0, 1, 1), i(0x06, 0, 0, 0, 1), RETURN_1, EXIT]),
        "queue_mapping" => (3, vec![RETURN_0, i(0x63, 1, 0, 12, 0), EXIT]),
        "edt_tstamp" => (3, vec![i(0xb7, 2, 0, 0, 0), i(0x7b, 1, 2, 152, 0), RETURN_0, EXIT]),
        "dead_code" => return dead_code(),
        other => return Seen::Unclear(format!("no program `{other}`")),
    };
    match load(number, &code, &Extra::default()) {
        Ok(_) => works("the verifier accepts it"),
        // A verifier that knows nothing of it says EINVAL; EACCES and EPERM with a log are its judgement too.
        Err(error) if !error.log.is_empty() && matches!(error.errno, EACCES | EPERM) => {
            Seen::Absent(error.text())
        }
        Err(error) => refused(&error),
    }
}

/// An XDP program with a branch that is never taken.
fn branchy() -> Result<OwnedFd, Refused> {
    let code = [
        i(0xb7, 1, 0, 0, 0),
        i(0x15, 1, 0, 2, 1),
        i(0xb7, 0, 0, 0, 2),
        i(0x05, 0, 0, 1, 0),
        i(0xb7, 0, 0, 0, 3),
        EXIT,
    ];
    load(6, &code, &Extra::default())
}

/// (length of the machine code, instructions after the verifier), as the kernel tells them.
fn info(program: &OwnedFd) -> Result<(u32, Vec<u8>), Errno> {
    let xlated = [0u8; 512];
    let mut info = vec![0u8; 80];
    info[20..24].copy_from_slice(&(xlated.len() as u32).to_ne_bytes());
    info[32..40].copy_from_slice(&sys::address(&xlated).to_ne_bytes());
    let mut attr = Attr::new(16)
        .u32(0, program.as_raw_fd() as u32)
        .u32(4, info.len() as u32)
        .u64(8, sys::address(&info));
    sys::bpf(GET_INFO, &mut attr.0)?;
    let u32_at =
        |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    let len = (u32_at(20) as usize).min(xlated.len());
    Ok((u32_at(16), xlated[..len].to_vec()))
}

fn dead_code() -> Seen {
    let program = match branchy() {
        Ok(program) => program,
        Err(error) => return refused(&error),
    };
    match info(&program) {
        // A hardened kernel shows nothing; nothing seen is nothing known.
        Ok((_, code)) if code.is_empty() => {
            Seen::Unclear("the kernel does not show the program".into())
        }
        Ok((_, code)) => {
            let jumps = code.chunks(8).filter(|insn| insn[0] & 7 == 5 && insn[0] != 0x95).count();
            match jumps {
                0 => works(format!("{} of 6 instructions are left", code.len() / 8)),
                _ => Seen::Absent(format!("{jumps} needless jumps are left")),
            }
        }
        Err(errno) => Seen::Unclear(sys::errno_text(errno)),
    }
}

/// Whether programs become machine code.
pub(super) fn jit() -> Seen {
    let program = match branchy() {
        Ok(program) => program,
        Err(error) => return refused(&error),
    };
    match info(&program) {
        Ok((0, _)) => match std::fs::read_to_string("/proc/sys/net/core/bpf_jit_enable") {
            Ok(text) if text.trim() == "0" => Seen::Sysctl("net.core.bpf_jit_enable is 0".into()),
            _ => Seen::Absent("a loaded program has no machine code".into()),
        },
        // How many bytes differs with the processor's features, not with the kernel.
        Ok(_) => works("a loaded program has machine code"),
        Err(errno) => Seen::Unclear(sys::errno_text(errno)),
    }
}

fn test_run(program: &OwnedFd, packet: &[u8]) -> Result<i32, Errno> {
    let out = [0u8; 512];
    let mut attr = Attr::new(48)
        .u32(0, program.as_raw_fd() as u32)
        .u32(8, packet.len() as u32)
        .u32(12, out.len() as u32)
        .u64(16, sys::address(packet))
        .u64(24, sys::address(&out))
        .u32(32, 1);
    sys::bpf(TEST_RUN, &mut attr.0)?;
    Ok(i32::from_ne_bytes([attr.0[4], attr.0[5], attr.0[6], attr.0[7]]))
}

/// A program that is run, not only loaded.
pub(super) fn run(what: &str) -> Seen {
    if what != "adjust_room_mac" {
        return Seen::Unclear(format!("no program `{what}`"));
    }
    let code = [
        i(0xb7, 2, 0, 0, 20),
        i(0xb7, 3, 0, 0, 1),
        i(0xb7, 4, 0, 0, 0),
        i(0x85, 0, 0, 0, 50),
        EXIT,
    ];
    let program = match load(3, &code, &Extra::default()) {
        Ok(program) => program,
        Err(error) => return refused(&error),
    };
    // Ethernet, IPv4 and UDP headers and some bytes.
    let mut packet = vec![0u8; 63];
    packet[12..14].copy_from_slice(&[0x08, 0]);
    packet[14] = 0x45;
    packet[16..18].copy_from_slice(&49u16.to_be_bytes());
    packet[22] = 64;
    packet[23] = 17;
    match test_run(&program, &packet) {
        Ok(0) => works("made room in a packet"),
        Ok(other) => Seen::Absent(format!("the helper answers {other}")),
        Err(errno) => refused(&Refused { errno, log: String::new() }),
    }
}

/// A flag of the route look-up helper.
pub(super) fn fib(flag: i32) -> Seen {
    // struct bpf_fib_lookup (64 bytes) on the stack: family 2 at 0, interface 1 at 8.
    let mut code = vec![i(0xbf, 6, 1, 0, 0), i(0xb7, 2, 0, 0, 0)];
    code.extend((0..8).map(|n| i(0x7b, 10, 2, -64 + n * 8, 0)));
    code.extend([
        i(0xb7, 2, 0, 0, 2),
        i(0x73, 10, 2, -64, 0),
        i(0xb7, 2, 0, 0, 1),
        i(0x63, 10, 2, -56, 0),
        i(0xbf, 1, 6, 0, 0),
        i(0xbf, 2, 10, 0, 0),
        i(0x07, 2, 0, 0, -64),
        i(0xb7, 3, 0, 0, 64),
        i(0xb7, 4, 0, 0, flag),
        i(0x85, 0, 0, 0, 69),
        i(0x07, 0, 0, 0, 1000),
        EXIT,
    ]);
    let program = match load(3, &code, &Extra::default()) {
        Ok(program) => program,
        Err(error) => return refused(&error),
    };
    match test_run(&program, &[0u8; 64]) {
        Ok(value) if value - 1000 == -EINVAL => {
            Seen::Absent("the helper does not know the flag".into())
        }
        Ok(_) => works("the helper takes the flag"),
        Err(errno) => refused(&Refused { errno, log: String::new() }),
    }
}

/// The kernel's type information, parsed as far as needed.
struct Btf {
    types: usize,
    functions: Vec<(String, u32)>,
}

impl Btf {
    fn function(&self, name: &str) -> Option<u32> {
        self.functions.iter().find(|(own, _)| own == name).map(|(_, id)| *id)
    }

    /// Walks the types of `bytes`; `wanted` are the functions worth keeping.
    fn parse(bytes: &[u8], wanted: &[&str]) -> Result<Self, String> {
        let wrong = |what: &str| format!("the kernel's type information is damaged: {what}");
        let u32_at = |at: usize| -> Result<u32, String> {
            let four = bytes.get(at..at + 4).ok_or_else(|| wrong("it ends early"))?;
            Ok(u32::from_ne_bytes([four[0], four[1], four[2], four[3]]))
        };
        if bytes.get(..2) != Some(&0xeb9fu16.to_ne_bytes()[..]) {
            return Err(wrong("wrong first bytes"));
        }
        let header = u32_at(4)? as usize;
        let (types_at, types_len) = (header + u32_at(8)? as usize, u32_at(12)? as usize);
        let (texts_at, texts_len) = (header + u32_at(16)? as usize, u32_at(20)? as usize);
        let texts = bytes.get(texts_at..texts_at + texts_len).ok_or_else(|| wrong("no texts"))?;
        let end = types_at + types_len;
        let mut btf = Self { types: 0, functions: Vec::new() };
        let mut at = types_at;
        while at < end {
            let (name, info) = (u32_at(at)? as usize, u32_at(at + 4)?);
            let (kind, vlen) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            btf.types += 1;
            if kind == 12 {
                let text = texts.get(name..).unwrap_or_default();
                let len = text.iter().position(|byte| *byte == 0).unwrap_or(0);
                let text = std::str::from_utf8(&text[..len]).unwrap_or_default();
                if wanted.contains(&text) {
                    btf.functions.push((text.into(), btf.types as u32));
                }
            }
            at += 12
                + match kind {
                    1 | 14 | 17 => 4,
                    3 => 12,
                    4 | 5 | 15 | 19 => 12 * vlen,
                    6 | 13 => 8 * vlen,
                    _ => 0,
                };
        }
        Ok(btf)
    }
}

const WANTED: &[&str] =
    &["vfs_read", "bpf_lsm_file_mprotect", "bpf_rcu_read_lock", "bpf_rcu_read_unlock"];

fn kernel_btf() -> Result<Btf, String> {
    let path = "/sys/kernel/btf/vmlinux";
    let bytes = std::fs::read(path).map_err(|error| format!("{path}: {error}"))?;
    Btf::parse(&bytes, WANTED)
}

/// Type information of the kernel.
pub(super) fn btf() -> Seen {
    match kernel_btf() {
        Ok(btf) if btf.types < 10_000 => Seen::Absent(format!("only {} types", btf.types)),
        Ok(btf) if btf.function("vfs_read").is_none() => Seen::Absent("it lacks vfs_read".into()),
        Ok(btf) => works(format!("{} types", btf.types)),
        Err(error) => Seen::Absent(error),
    }
}

/// One integer type, as programs bring it.
fn tiny_btf() -> Vec<u8> {
    let texts = b"\0int\0";
    let mut bytes = btf_header(16, texts.len());
    for word in [1u32, 1 << 24, 4, 32 | 1 << 24] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(texts);
    bytes
}

fn btf_header(types: usize, texts: usize) -> Vec<u8> {
    let mut bytes = 0xeb9fu16.to_ne_bytes().to_vec();
    bytes.extend([1, 0]);
    for word in [24, 0, types as u32, types as u32, texts as u32] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes
}

fn load_btf(bytes: &[u8]) -> Result<OwnedFd, Errno> {
    let mut attr = Attr::new(24).u64(0, sys::address(bytes)).u32(16, bytes.len() as u32);
    sys::bpf_fd(BTF_LOAD, &mut attr.0)
}

/// Type information of programs.
pub(super) fn btf_load() -> Seen {
    match load_btf(&tiny_btf()) {
        Ok(_) => works("loaded one type"),
        Err(errno) => refused(&Refused { errno, log: String::new() }),
    }
}

/// Kernel functions, called from a tc program one after the other.
pub(super) fn kfunc(names: &[String]) -> Seen {
    let btf = match kernel_btf() {
        Ok(btf) => btf,
        Err(error) => return Seen::Absent(error),
    };
    let mut code = Vec::new();
    for name in names {
        let Some(id) = btf.function(name) else {
            return Seen::Absent(format!("the kernel has no function {name}"));
        };
        code.push(i(0x85, 0, 2, 0, id as i32));
    }
    code.extend([RETURN_0, EXIT]);
    match load(3, &code, &Extra::default()) {
        Ok(_) => works("called them"),
        Err(error) => refused(&error),
    }
}

/// A global function that takes the context, as Cilium's newer programs have them.
pub(super) fn global_function() -> Seen {
    let texts = b"\0int\0__sk_buff\0ctx\0main\0sub\0";
    let at = |name: &[u8]| texts.windows(name.len()).position(|w| w == name).unwrap_or(0) as u32;
    let (int, skb, ctx) = (at(b"int\0"), at(b"__sk_buff\0"), at(b"ctx\0"));
    let (main, sub) = (at(b"main\0"), at(b"sub\0"));
    let mut types: Vec<u8> = Vec::new();
    let words: [&[u32]; 6] = [
        &[int, 1 << 24, 4, 32 | 1 << 24], // 1: int
        &[skb, 4 << 24, 4],               // 2: struct __sk_buff, no members
        &[0, 2 << 24, 2],                 // 3: pointer to it
        &[0, 13 << 24 | 1, 1, ctx, 3],    // 4: int (*)(ctx)
        &[main, 12 << 24 | 1, 4],         // 5: global function
        &[sub, 12 << 24 | 1, 4],          // 6: global function
    ];
    for word in words.concat() {
        types.extend(word.to_ne_bytes());
    }
    let bytes = [btf_header(types.len(), texts.len()), types, texts.to_vec()].concat();
    let btf = match load_btf(&bytes) {
        Ok(btf) => btf,
        Err(errno) => return refused(&Refused { errno, log: String::new() }),
    };
    let func_info: Vec<u8> = [0u32, 5, 2, 6].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let code = [i(0x85, 0, 1, 0, 1), EXIT, RETURN_0, EXIT];
    match load(3, &code, &Extra { btf: Some(&btf), func_info: &func_info, ..Extra::default() }) {
        Ok(_) => works("loaded one"),
        Err(error) => refused(&error),
    }
}

/// Programs on cgroups, asked without a cgroup: a descriptor of something else is refused as such.
pub(super) fn cgroup_link() -> Seen {
    let program = match load(8, &[RETURN_1, EXIT], &Extra::default()) {
        Ok(program) => program,
        Err(error) => return refused(&error),
    };
    let Ok(null) = std::fs::File::open("/dev/null") else {
        return Seen::Unclear("no /dev/null".into());
    };
    let mut attr = Attr::new(16).u32(0, program.as_raw_fd() as u32).u32(4, null.as_raw_fd() as u32);
    match sys::bpf(LINK_CREATE, &mut attr.0) {
        Ok(link) => {
            sys::close(link);
            Seen::Unclear("the kernel attached to /dev/null".into())
        }
        Err(EBADF) => works("EBADF for what is no cgroup"),
        Err(errno) => refused(&Refused { errno, log: String::new() }),
    }
}

/// A device program on the cgroup `folder`, attached and detached.
pub(super) fn cgroup_device(folder: &std::path::Path) -> Seen {
    let program = match load(15, &[RETURN_1, EXIT], &Extra { attach: 6, ..Extra::default() }) {
        Ok(program) => program,
        Err(error) => return refused(&error),
    };
    let group = match std::fs::File::open(folder) {
        Ok(group) => group,
        Err(error) => return Seen::Unclear(error.to_string()),
    };
    let attr = |flags| {
        Attr::new(16)
            .u32(0, group.as_raw_fd() as u32)
            .u32(4, program.as_raw_fd() as u32)
            .u32(8, 6)
            .u32(12, flags)
    };
    match sys::bpf(PROG_ATTACH, &mut attr(2).0) {
        Ok(_) => {
            let _ = sys::bpf(PROG_DETACH, &mut attr(0).0);
            works("attached one to a cgroup")
        }
        Err(errno) => refused(&Refused { errno, log: String::new() }),
    }
}

/// A program attached for real; `interface` is that of a device in a private network namespace.
pub(super) fn link(what: &str, interface: u32) -> Seen {
    if what == "sockmap" {
        return sockmap();
    }
    let (number, attach, extra_attach) = match what {
        "tcx" => (3, 46, 0),
        "netkit" => (3, 54, 0),
        "xdp" => (6, 37, 37),
        "sk_lookup" => (30, 36, 36),
        "netfilter" => (32, 45, 45),
        other => return Seen::Unclear(format!("no attach point `{other}`")),
    };
    let code = [if what == "tcx" || what == "netkit" { RETURN_0 } else { RETURN_1 }, EXIT];
    let program = match load(number, &code, &Extra { attach: extra_attach, ..Extra::default() }) {
        Ok(program) => program,
        Err(error) => return refused(&error),
    };
    let namespace = std::fs::File::open("/proc/self/ns/net");
    let target = match (&namespace, what) {
        (Ok(namespace), "sk_lookup") => namespace.as_raw_fd() as u32,
        (Err(error), "sk_lookup") => return Seen::Unclear(error.to_string()),
        (_, "netfilter") => 0,
        _ => interface,
    };
    let len = if what == "netfilter" { 32 } else { 16 };
    let mut attr = Attr::new(len).u32(0, program.as_raw_fd() as u32).u32(4, target).u32(8, attach);
    if what == "netfilter" {
        attr = attr.u32(16, 2).u32(20, 0).u32(24, 100);
    }
    match sys::bpf(LINK_CREATE, &mut attr.0) {
        Ok(link) => {
            sys::close(link);
            works("attached one")
        }
        Err(errno) => refused(&Refused { errno, log: String::new() }),
    }
}

fn sockmap() -> Seen {
    let map = match create("sockmap") {
        Ok(map) => map,
        Err(errno) => return refused(&Refused { errno, log: String::new() }),
    };
    let program = match load(14, &[RETURN_1, EXIT], &Extra::default()) {
        Ok(program) => program,
        Err(error) => return refused(&error),
    };
    // BPF_SK_SKB_STREAM_VERDICT, the older of the two.
    let mut attr =
        Attr::new(16).u32(0, map.as_raw_fd() as u32).u32(4, program.as_raw_fd() as u32).u32(8, 5);
    match sys::bpf(PROG_ATTACH, &mut attr.0) {
        Ok(_) => works("attached one to a socket map"),
        Err(errno) => refused(&Refused { errno, log: String::new() }),
    }
}

/// A classifier or XDP program for other probes to attach.
pub(super) fn classifier() -> Result<OwnedFd, Errno> {
    load(3, &[RETURN_0, EXIT], &Extra::default()).map_err(|refused| refused.errno)
}

/// An XDP program that lets everything pass.
pub(super) fn pass() -> Result<OwnedFd, Errno> {
    load(6, &[i(0xb7, 0, 0, 0, 2), EXIT], &Extra::default()).map_err(|refused| refused.errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_type_information_is_an_error() {
        let whole = tiny_btf();
        assert_eq!(Btf::parse(&whole, WANTED).expect("whole").types, 1);
        for len in 0..whole.len() {
            let _ = Btf::parse(&whole[..len], WANTED);
        }
        assert!(Btf::parse(b"", WANTED).is_err());
    }

    #[test]
    fn every_bpf_check_names_a_known_map_or_program() {
        for check in crate::table::Table::built_in().checks.values() {
            let Some(words) = &check.probe else { continue };
            match words[0].as_str() {
                "bpf-map" => assert!(MAPS.iter().any(|map| map.0 == words[1]), "{}", check.id),
                "bpf-prog" | "bpf-helper" | "bpf-attach-type" => {
                    assert!(kind_of(&words[1]).is_some(), "{}", check.id);
                }
                _ => {}
            }
        }
    }
}
