//! Probes of links, traffic control, XDP, netfilter, routing and sockets, all in a private network namespace.
//!
//! The namespace goes with the process. Each family first asks for a thing that cannot exist: only when that fails in
//! the family's own way of saying "no such thing" do its answers mean anything. Facts: rtnetlink, nfnetlink, ipset and
//! IPVS uapi headers.

use super::bpf;
use super::netlink::{
    ASK, CREATE, DUMP, Message, Netlink, Refused, attribute, attributes, family, nest, text,
};
use super::sys;
use crate::judge::Seen;
use std::os::fd::AsRawFd;

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const EBUSY: i32 = 16;
const EEXIST: i32 = 17;
const EINVAL: i32 = 22;
const EPROTONOSUPPORT: i32 = 93;
const ESOCKTNOSUPPORT: i32 = 94;
const EOPNOTSUPP: i32 = 95;
const EAFNOSUPPORT: i32 = 97;
const ENOPROTOOPT: i32 = 92;
const ENOTCONN: i32 = 107;

/// ipset's "no such type", beyond errno.h.
const IPSET_NO_TYPE: i32 = 4098;

fn works(text: impl Into<String>) -> Seen {
    Seen::Works(text.into())
}

fn seen(result: Result<String, Refused>, absent: &[i32]) -> Seen {
    match result {
        Ok(text) => works(text),
        Err(refused) if refused.errno == EPERM => Seen::NotPermitted(refused.words()),
        Err(refused) if absent.contains(&refused.errno) => Seen::Absent(refused.words()),
        Err(refused) => Seen::Unclear(refused.words()),
    }
}

fn socket_error(errno: i32) -> Refused {
    Refused { errno, text: String::new() }
}

// ---- links ----

/// `struct ifinfomsg` of an interface.
fn interface(index: u32, up: bool) -> Vec<u8> {
    let mut header = vec![0u8; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    if up {
        header[8..12].copy_from_slice(&1u32.to_ne_bytes());
        header[12..16].copy_from_slice(&1u32.to_ne_bytes());
    }
    header
}

fn add_link(
    route: &mut Netlink,
    name: &str,
    kind: &str,
    data: &[Vec<u8>],
    more: &[Vec<u8>],
) -> Result<(), Refused> {
    let mut info = vec![attribute(1, kind.as_bytes())];
    if !data.is_empty() {
        info.push(nest(2, data));
    }
    let mut message = Message::new(16, ASK | CREATE, &interface(0, false)).with(3, &text(name));
    for part in more {
        let (kind, value) = attributes(part)[0];
        message = message.with(kind, value);
    }
    route.ask(&message.with(18, &info.concat())).map(drop)
}

fn delete_link(route: &mut Netlink, name: &str) {
    let _ = route.ask(&Message::new(17, ASK, &interface(0, false)).with(3, &text(name)));
}

/// The number of an interface.
fn index_of(route: &mut Netlink, name: &str) -> Result<u32, Refused> {
    let ask = Message::new(18, ASK, &interface(0, false)).with(3, &text(name));
    let answers = route.ask(&ask)?;
    let index = answers.first().and_then(|(_, body)| body.get(4..8));
    let index = index.map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    index.ok_or(Refused { errno: ENOENT, text: "the answer has no number".into() })
}

fn up(route: &mut Netlink, index: u32) -> Result<(), Refused> {
    route.ask(&Message::new(19, ASK, &interface(index, true))).map(drop)
}

/// A veth pair, up; the number of its first end.
fn veth(route: &mut Netlink, name: &str) -> Result<u32, Refused> {
    add_link(route, name, "veth", &[], &[])?;
    let index = index_of(route, name)?;
    up(route, index)?;
    Ok(index)
}

/// A network device of a kind.
pub(super) fn link(kind: &str) -> Seen {
    let mut route = match Netlink::open(0) {
        Ok(route) => route,
        Err(errno) => return seen(Err(socket_error(errno)), &[EPROTONOSUPPORT]),
    };
    let control = add_link(&mut route, "kqnone0", "kqnone", &[], &[]);
    match &control {
        Err(refused) if refused.errno == EOPNOTSUPP => {}
        Err(refused) if refused.errno == EPERM => return Seen::NotPermitted(refused.words()),
        other => return Seen::Unclear(format!("a kind that cannot be got {other:?}")),
    }
    let be16 = |n: u16| n.to_be_bytes().to_vec();
    let u32 = |n: u32| n.to_ne_bytes().to_vec();
    let lower =
        |route: &mut Netlink| veth(route, "kqlow").map(|index| attribute(5, &index.to_ne_bytes()));
    let (real, data, on_top): (&str, Vec<Vec<u8>>, bool) = match kind {
        "bridge-vlan" => ("bridge", vec![attribute(7, &[1])], false),
        "vxlan" => (
            "vxlan",
            vec![attribute(1, &u32(42)), attribute(15, &be16(4789)), attribute(7, &[0])],
            false,
        ),
        "vxlan-metadata" => ("vxlan", vec![attribute(25, &[1]), attribute(15, &be16(8472))], false),
        "geneve" => ("geneve", vec![attribute(6, &[]), attribute(5, &be16(6081))], false),
        "ipvlan" => ("ipvlan", vec![attribute(1, &1u16.to_ne_bytes())], true),
        "macvlan" => ("macvlan", vec![attribute(1, &u32(4))], true),
        "vlan" => ("vlan", vec![attribute(1, &7u16.to_ne_bytes())], true),
        "netkit" => ("netkit", vec![attribute(5, &u32(1))], false),
        "vrf" => ("vrf", vec![attribute(1, &u32(77))], false),
        "xfrm" => ("xfrm", vec![attribute(2, &u32(1))], true),
        other => (other, vec![], false),
    };
    let more = match on_top {
        true => match lower(&mut route) {
            Ok(lower) => vec![lower],
            Err(refused) => {
                return Seen::Unclear(format!("no veth to put it on: {}", refused.words()));
            }
        },
        false => vec![],
    };
    let made = add_link(&mut route, "kqx0", real, &data, &more);
    delete_link(&mut route, "kqx0");
    if on_top {
        delete_link(&mut route, "kqlow");
    }
    match made {
        Ok(()) => works("made one"),
        // A fallback device of the namespace is there already.
        Err(refused) if refused.errno == EEXIST => works("one is there"),
        // The bridge itself is there, what it was asked for is not.
        Err(refused) if kind == "bridge-vlan" && refused.errno == EOPNOTSUPP => {
            Seen::Absent(refused.words())
        }
        Err(refused) => seen(Err(refused), &[EOPNOTSUPP]),
    }
}

/// An attribute that the kernel gives back, as proof that it knows it: larger segments.
pub(super) fn link_attribute(number: u16) -> Seen {
    let ask = || -> Result<bool, Refused> {
        let mut route = Netlink::open(0).map_err(socket_error)?;
        let index = index_of(&mut route, "lo")?;
        let answers = route.ask(&Message::new(18, ASK, &interface(index, false)))?;
        let body = answers.first().map(|(_, body)| body.as_slice()).unwrap_or_default();
        Ok(attributes(body.get(16..).unwrap_or_default()).iter().any(|(kind, _)| *kind == number))
    };
    match ask() {
        // IFLA_GSO_MAX_SIZE is in every kernel of this century; the larger sizes came with another limit.
        Ok(true) if number == 41 => big_segments(),
        Ok(true) => works("the kernel tells the attribute"),
        Ok(false) => Seen::TooOld("the kernel does not tell the attribute".into()),
        Err(refused) => Seen::Unclear(refused.words()),
    }
}

/// Segments of more than 64 KiB on a veth, set and read back.
fn big_segments() -> Seen {
    let ask = || -> Result<u32, Refused> {
        let mut route = Netlink::open(0).map_err(socket_error)?;
        let index = veth(&mut route, "kqbig")?;
        let set =
            Message::new(16, ASK, &interface(index, false)).with(41, &131_072u32.to_ne_bytes());
        let done = route.ask(&set);
        let answers = route.ask(&Message::new(18, ASK, &interface(index, false)))?;
        delete_link(&mut route, "kqbig");
        done?;
        let body = answers.first().map(|(_, body)| body.as_slice()).unwrap_or_default();
        let found = attributes(body.get(16..).unwrap_or_default());
        let value =
            found.iter().find(|(kind, _)| *kind == 41).and_then(|(_, value)| value.get(..4));
        Ok(value.map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]])))
    };
    match ask() {
        Ok(131_072) => works("set and read back"),
        Ok(other) => Seen::TooOld(format!("set 131072, read back {other}")),
        Err(refused) if refused.errno == EINVAL => Seen::TooOld(refused.words()),
        Err(refused) => seen(Err(refused), &[EOPNOTSUPP]),
    }
}

// ---- traffic control ----

/// `struct tcmsg`.
fn tc(index: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut header = vec![0u8; 20];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&handle.to_ne_bytes());
    header[12..16].copy_from_slice(&parent.to_ne_bytes());
    header[16..20].copy_from_slice(&info.to_ne_bytes());
    header
}

const ROOT: u32 = 0xffff_ffff;
const CLSACT: u32 = 0xffff_fff1;

fn add_qdisc(route: &mut Netlink, index: u32, kind: &str) -> Result<(), Refused> {
    let (handle, parent) = match kind {
        "clsact" | "ingress" => (0xffff_0000, CLSACT),
        _ => (0x0001_0000, ROOT),
    };
    let mut message =
        Message::new(36, ASK | CREATE, &tc(index, handle, parent, 0)).with(1, &text(kind));
    if kind == "htb" {
        // struct tc_htb_glob: version 3, rate to quantum 10.
        let mut glob = vec![0u8; 20];
        glob[0..4].copy_from_slice(&3u32.to_ne_bytes());
        glob[4..8].copy_from_slice(&10u32.to_ne_bytes());
        message = message.with(2, &attribute(2, &glob));
    }
    route.ask(&message).map(drop)
}

fn delete_qdisc(route: &mut Netlink, index: u32, kind: &str) {
    let parent = if matches!(kind, "clsact" | "ingress") { CLSACT } else { ROOT };
    let _ = route.ask(&Message::new(37, ASK, &tc(index, 0, parent, 0)));
}

fn on_veth(name: &str, probe: impl FnOnce(&mut Netlink, u32) -> Seen) -> Seen {
    let mut route = match Netlink::open(0) {
        Ok(route) => route,
        Err(errno) => return seen(Err(socket_error(errno)), &[EPROTONOSUPPORT]),
    };
    match veth(&mut route, name) {
        Ok(index) => {
            let seen = probe(&mut route, index);
            delete_link(&mut route, name);
            seen
        }
        // Without a veth there is nothing to try it on, and that says nothing of it.
        Err(refused) if refused.errno == EPERM => Seen::NotPermitted(refused.words()),
        Err(refused) => Seen::Unclear(format!("no veth to try it on: {}", refused.words())),
    }
}

/// A queueing discipline of a kind.
pub(super) fn qdisc(kind: &str) -> Seen {
    on_veth("kqtc", |route, index| {
        match add_qdisc(route, index, "kqnone") {
            Err(refused) if refused.errno == ENOENT => {}
            Err(refused) if refused.errno == EPERM => return Seen::NotPermitted(refused.words()),
            other => return Seen::Unclear(format!("a kind that cannot be got {other:?}")),
        }
        let made = add_qdisc(route, index, kind);
        delete_qdisc(route, index, kind);
        match made {
            Ok(()) => works("added one"),
            // The kind is there and wants other options.
            Err(refused) if matches!(refused.errno, EINVAL | EOPNOTSUPP) => works(refused.words()),
            Err(refused) => seen(Err(refused), &[ENOENT]),
        }
    })
}

/// A classifier or an action on clsact.
pub(super) fn filter(kind: &str) -> Seen {
    on_veth("kqcls", |route, index| {
        if let Err(refused) = add_qdisc(route, index, "clsact") {
            return seen(Err(refused), &[ENOENT]);
        }
        // A priority holds filters of one kind, also when there is none in it any more: each question has its own.
        let info = |priority: u32| priority << 16 | u32::from(3u16.to_be());
        let program = if kind == "bpf" { bpf::classifier().ok() } else { None };
        let (real, options): (&str, Vec<Vec<u8>>) = match kind {
            "bpf" => match &program {
                Some(program) => (
                    "bpf",
                    vec![
                        attribute(6, &(program.as_raw_fd() as u32).to_ne_bytes()),
                        attribute(7, &text("kq")),
                        attribute(8, &1u32.to_ne_bytes()),
                    ],
                ),
                None => return Seen::Unclear("no program to attach".into()),
            },
            "flower" => ("flower", vec![attribute(8, &0x0800u16.to_be_bytes())]),
            "u32" => {
                // struct tc_u32_sel with one key that matches everything.
                let mut selector = vec![0u8; 16 + 16];
                selector[0] = 1;
                selector[2] = 1;
                ("u32", vec![attribute(1, &0x0001_0001u32.to_ne_bytes()), attribute(5, &selector)])
            }
            "mirred" => {
                // struct tc_mirred: action pipe, redirect out, to the device itself.
                let mut parameters = vec![0u8; 28];
                parameters[8..12].copy_from_slice(&4u32.to_ne_bytes());
                parameters[20..24].copy_from_slice(&1u32.to_ne_bytes());
                parameters[24..28].copy_from_slice(&index.to_ne_bytes());
                let options = nest(2, &[attribute(2, &parameters)]);
                let action = nest(1, &[attribute(1, &text("mirred")), options]);
                // On whichever classifier the kernel has.
                match filter_without_action(route, index, info(3), "u32") {
                    true => {
                        let mut selector = vec![0u8; 32];
                        selector[0] = 1;
                        selector[2] = 1;
                        ("u32", vec![attribute(5, &selector), nest(7, &[action])])
                    }
                    false => ("matchall", vec![nest(2, &[action])]),
                }
            }
            other => (other, vec![]),
        };
        let add = |route: &mut Netlink, priority: u32, kind: &str, options: &[Vec<u8>]| {
            let header = tc(index, 0, 0xffff_fff2, info(priority));
            let message = Message::new(44, ASK | CREATE, &header).with(1, &text(kind));
            route.ask(&message.with(2, &options.concat())).map(|_| "added one".to_owned())
        };
        match add(route, 2, "kqnone", &[]) {
            Err(refused) if refused.errno == ENOENT => {}
            other => return Seen::Unclear(format!("a kind that cannot be got {other:?}")),
        }
        match add(route, 1, real, &options) {
            // ENOENT of the classifier says nothing of the action.
            Err(refused) if kind == "mirred" && refused.text.contains("classifier") => {
                Seen::Unclear(refused.words())
            }
            Err(refused) if refused.errno == EINVAL && kind != "mirred" => works(refused.words()),
            other => seen(other, &[ENOENT]),
        }
    })
}

/// Whether a classifier of a kind is there, asked without options.
fn filter_without_action(route: &mut Netlink, index: u32, info: u32, kind: &str) -> bool {
    let message =
        Message::new(44, ASK | CREATE, &tc(index, 0, 0xffff_fff2, info)).with(1, &text(kind));
    !matches!(route.ask(&message), Err(refused) if refused.errno == ENOENT)
}

/// A program attached by a link of bpf(2).
pub(super) fn bpf_link(what: &str) -> Seen {
    if matches!(what, "sockmap" | "netfilter" | "sk_lookup") {
        return bpf::link(what, 0);
    }
    if what == "netkit" {
        let mut route = match Netlink::open(0) {
            Ok(route) => route,
            Err(errno) => return Seen::Unclear(sys::errno_text(errno)),
        };
        let mode = attribute(5, &1u32.to_ne_bytes());
        if let Err(refused) = add_link(&mut route, "kqnkt", "netkit", &[mode], &[]) {
            return seen(Err(refused), &[EOPNOTSUPP]);
        }
        let seen = match index_of(&mut route, "kqnkt") {
            Ok(index) => bpf::link(what, index),
            Err(refused) => Seen::Unclear(refused.words()),
        };
        delete_link(&mut route, "kqnkt");
        return seen;
    }
    on_veth("kqlnk", |_, index| bpf::link(what, index))
}

/// XDP on the loopback (generic) or on a veth (in its driver).
pub(super) fn xdp(what: &str) -> Seen {
    let program = match bpf::pass() {
        Ok(program) => program,
        Err(EPERM) => return Seen::NotPermitted("a program that lets all pass: EPERM".into()),
        Err(errno) => return Seen::Absent(sys::errno_text(errno)),
    };
    let attach = |route: &mut Netlink, index: u32, fd: i32, mode: u32| {
        let parts = [attribute(1, &fd.to_ne_bytes()), attribute(3, &mode.to_ne_bytes())];
        let message = Message::new(19, ASK, &interface(index, false));
        route.ask(&message.with(43 | 0x8000, &parts.concat())).map(|_| "attached one".to_owned())
    };
    let mode = if what == "generic" { 2 } else { 4 };
    on_veth("kqxdp", |route, index| {
        let done = attach(route, index, program.as_raw_fd(), mode);
        let _ = attach(route, index, -1, mode);
        seen(done, &[EOPNOTSUPP, EINVAL])
    })
}

/// What the drivers of the real network cards can do with XDP. Asked in the host's own namespace.
pub(super) fn xdp_features() -> Seen {
    let cards = super::host::cards();
    if cards.is_empty() {
        return Seen::NoDevice("no network card".into());
    }
    let id = match family("netdev") {
        Ok(id) => id,
        Err(refused) => return seen(Err(refused), &[ENOENT]),
    };
    let ask = || -> Result<Vec<String>, Refused> {
        let mut netlink = Netlink::open(16).map_err(socket_error)?;
        let answers = netlink.ask(&Message::new(id, ASK | DUMP, &[1, 1, 0, 0]))?;
        let mut able = Vec::new();
        for (_, body) in answers {
            let parts = attributes(body.get(4..).unwrap_or_default());
            let number = |kind: u16| {
                let value = parts.iter().find(|(own, _)| *own == kind)?.1;
                let mut bytes = [0u8; 8];
                bytes[..value.len().min(8)].copy_from_slice(&value[..value.len().min(8)]);
                Some(u64::from_le_bytes(bytes))
            };
            let (index, features) = (number(1).unwrap_or(0), number(3).unwrap_or(0));
            if let Some((name, _)) = cards.iter().find(|(_, own)| u64::from(*own) == index)
                && features & 3 == 3
            {
                able.push(name.clone());
            }
        }
        Ok(able)
    };
    match ask() {
        Ok(able) if able.is_empty() => {
            let names: Vec<_> = cards.iter().map(|(name, _)| name.as_str()).collect();
            Seen::Absent(format!("not in the drivers of {}", names.join(", ")))
        }
        Ok(able) => works(format!("in the driver of {}", able.join(", "))),
        Err(refused) => Seen::Unclear(refused.words()),
    }
}

// ---- netfilter ----

fn netfilter() -> Result<Netlink, Seen> {
    Netlink::open(12).map_err(|errno| match errno {
        EPERM => Seen::NotPermitted(sys::errno_text(errno)),
        _ => Seen::Absent(sys::errno_text(errno)),
    })
}

/// `struct nfgenmsg`.
fn nf(family: u8, resource: u16) -> Vec<u8> {
    let [high, low] = resource.to_be_bytes();
    vec![family, 0, high, low]
}

/// Netlink of netfilter.
pub(super) fn nfnetlink() -> Seen {
    match netfilter() {
        Ok(_) => works("opened a socket"),
        Err(seen) => seen,
    }
}

/// The table of connections.
pub(super) fn conntrack() -> Seen {
    let mut netlink = match netfilter() {
        Ok(netlink) => netlink,
        Err(seen) => return seen,
    };
    let ask = Message::new(1 << 8 | 1, ASK | DUMP, &nf(2, 0));
    seen(netlink.ask(&ask).map(|_| "asked for its entries".into()), &[EINVAL, EOPNOTSUPP])
}

fn nft_family(name: &str) -> u8 {
    match name {
        "inet" => 1,
        "ip" => 2,
        "netdev" => 5,
        "bridge" => 7,
        _ => 10,
    }
}

/// One transaction: a table, a chain (with a hook of a type, or plain), a rule with an expression; then undone.
fn transaction(
    family: u8,
    chain: Option<&str>,
    expression: Option<(&str, Vec<Vec<u8>>)>,
) -> Result<String, Refused> {
    let mut netlink = Netlink::open(12).map_err(socket_error)?;
    let begin = Message::new(16, 1, &nf(0, 10));
    let end = || Message::new(17, 1, &nf(0, 10));
    let of = |command: u16, flags: u16| Message::new(10 << 8 | command, flags, &nf(family, 0));
    let mut messages = vec![begin, of(0, ASK | CREATE).with(1, &text("kq"))];
    let mut own = of(3, ASK | CREATE).with(1, &text("kq")).with(3, &text("kq"));
    if let Some(kind) = chain {
        // Output for route chains, ingress for devices, else prerouting.
        let hook: u32 = match kind {
            "route" => 3,
            _ if family == 5 => 0,
            _ => 0,
        };
        let mut parts = vec![attribute(1, &hook.to_be_bytes()), attribute(2, &0i32.to_be_bytes())];
        if family == 5 {
            parts.push(attribute(3, &text("lo")));
        }
        own = own.with(4 | 0x8000, &parts.concat()).with(7, &text(kind));
    }
    messages.push(own);
    if let Some((name, data)) = expression {
        let element = nest(1, &[attribute(1, &text(name)), nest(2, &data)]);
        let rule = of(6, ASK | CREATE | 0x800).with(1, &text("kq")).with(2, &text("kq"));
        messages.push(rule.with(4 | 0x8000, &element));
    }
    messages.push(end());
    let last = messages.len() - 2;
    let done = netlink.batch(&messages, last);
    if done.is_ok() {
        let begin = Message::new(16, 1, &nf(0, 10));
        let delete = of(2, ASK).with(1, &text("kq"));
        let _ = netlink.batch(&[begin, delete, end()], 1);
    }
    done.map(|_| "added one".into())
}

/// A chain of a type in a family.
pub(super) fn nft_chain(family: &str, kind: &str) -> Seen {
    if let Err(seen) = netfilter() {
        return seen;
    }
    seen(
        transaction(nft_family(family), Some(kind), None),
        &[ENOENT, EOPNOTSUPP, EAFNOSUPPORT, EINVAL],
    )
}

/// An expression in a rule.
pub(super) fn nft_expression(name: &str) -> Seen {
    if let Err(seen) = netfilter() {
        return seen;
    }
    match transaction(2, None, Some(("kqnone", vec![]))) {
        Err(refused) if refused.errno == ENOENT => {}
        Err(refused) if refused.errno == EPERM => return Seen::NotPermitted(refused.words()),
        Err(refused) => return seen(Err(refused), &[EINVAL, EOPNOTSUPP, EAFNOSUPPORT]),
        Ok(_) => return Seen::Unclear("an expression that cannot be was taken".into()),
    }
    let be = |n: u32| n.to_be_bytes();
    // Options only where an expression without any would not even be looked for.
    let data: Vec<Vec<u8>> = match name {
        "ct" => vec![attribute(2, &be(0)), attribute(1, &be(8))],
        "reject" => vec![attribute(1, &be(0)), attribute(2, &[3])],
        "numgen" => vec![attribute(1, &be(8)), attribute(2, &be(2)), attribute(3, &be(0))],
        _ => vec![],
    };
    match transaction(2, None, Some((name, data))) {
        Ok(_) => works("added one"),
        Err(refused) if refused.errno == EPERM => Seen::NotPermitted(refused.words()),
        Err(refused) if refused.errno == ENOENT => Seen::Absent(refused.words()),
        // The expression is known and wants other options, another chain, or another family.
        Err(refused) => works(format!("known: {}", refused.words())),
    }
}

/// A match or target through nf_tables' compatibility layer.
pub(super) fn nft_compat(target: bool, name: &str, revision: u32) -> Result<String, Refused> {
    let mut netlink = Netlink::open(12).map_err(socket_error)?;
    let mut ask = |name: &str| {
        let message = Message::new(11 << 8, ASK, &nf(2, 0))
            .with(1, &text(name))
            .with(2, &revision.to_be_bytes())
            .with(3, &u32::from(target).to_be_bytes());
        netlink.ask(&message).map(|_| "the kernel has it (over nf_tables)".to_owned())
    };
    match ask("kqnone") {
        Err(refused) if refused.errno == ENOENT => ask(name),
        Err(refused) => Err(refused),
        Ok(_) => Err(Refused { errno: 0, text: "a match that cannot be was found".into() }),
    }
}

/// A match or target through the legacy tables.
fn xt_legacy(target: bool, name: &str, revision: u8) -> Result<String, Refused> {
    let socket = sys::socket(2, 3, 255).map_err(socket_error)?;
    let mut ask = [0u8; 30];
    ask[..name.len().min(28)].copy_from_slice(&name.as_bytes()[..name.len().min(28)]);
    ask[29] = revision;
    let option = if target { 67 } else { 66 };
    sys::get_option(&socket, 0, option, &mut ask).map_err(socket_error)?;
    Ok("the kernel has it (legacy tables)".into())
}

/// A match or target, by either way.
pub(super) fn xt(what: &str, name: &str, revision: u8) -> Seen {
    let target = what == "target";
    let over_nft = nft_compat(target, name, u32::from(revision));
    if let Ok(text) = over_nft {
        return works(text);
    }
    let legacy = xt_legacy(target, name, revision);
    match (legacy, over_nft) {
        (Ok(text), _) => works(text),
        (Err(legacy), _) if legacy.errno == EPERM => Seen::NotPermitted(legacy.words()),
        (Err(legacy), _) if legacy.errno == ENOENT => Seen::Absent(legacy.words()),
        // The legacy tables are not there (or not loaded), nf_tables says no.
        (Err(legacy), Err(nft)) if legacy.errno == ENOPROTOOPT && nft.errno == ENOENT => {
            Seen::Absent(nft.words())
        }
        (Err(legacy), Err(nft))
            if legacy.errno == ENOPROTOOPT
                && matches!(nft.errno, EINVAL | EPROTONOSUPPORT | EOPNOTSUPP) =>
        {
            Seen::Absent("neither legacy tables nor nf_tables' compatibility layer answer".into())
        }
        (Err(legacy), Err(nft)) => {
            Seen::Unclear(format!("{}; over nf_tables {}", legacy.words(), nft.words()))
        }
        (Err(legacy), Ok(_)) => Seen::Unclear(legacy.words()),
    }
}

/// A type of set, or ipset itself.
pub(super) fn ipset(kind: Option<&str>) -> Seen {
    let mut netlink = match netfilter() {
        Ok(netlink) => netlink,
        Err(seen) => return seen,
    };
    let protocol = Message::new(6 << 8 | 1, ASK, &nf(2, 0)).with(1, &[6]);
    if let Err(refused) = netlink.ask(&protocol) {
        return seen(Err(refused), &[EINVAL, EOPNOTSUPP]);
    }
    let Some(kind) = kind else { return works("answers") };
    let mut ask = |kind: &str| {
        let family = if kind.starts_with("bitmap") { 0 } else { 2 };
        let message = Message::new(6 << 8 | 13, ASK, &nf(2, 0))
            .with(1, &[6])
            .with(3, &text(kind))
            .with(5, &[family]);
        netlink.ask(&message).map(|_| "the kernel has it".to_owned())
    };
    match ask("kq:none") {
        Err(refused) if refused.errno == IPSET_NO_TYPE => seen(ask(kind), &[IPSET_NO_TYPE]),
        Err(refused) if refused.errno == EPERM => Seen::NotPermitted(refused.words()),
        other => Seen::Unclear(format!("a type that cannot be got {other:?}")),
    }
}

/// A generic netlink family.
pub(super) fn generic(name: &str) -> Seen {
    seen(
        family(name).map(|id| format!("family {id}").replace(&id.to_string(), "answers")),
        &[ENOENT],
    )
}

/// A scheduler of IPVS.
pub(super) fn ipvs(scheduler: &str) -> Seen {
    let id = match family("IPVS") {
        Ok(id) => id,
        Err(refused) => return seen(Err(refused), &[ENOENT]),
    };
    let ask = |scheduler: &str| -> Result<String, Refused> {
        let mut netlink = Netlink::open(16).map_err(socket_error)?;
        let mut address = [0u8; 16];
        address[..4].copy_from_slice(&[127, 0, 0, 9]);
        let service = [
            attribute(1, &2u16.to_ne_bytes()),
            attribute(2, &6u16.to_ne_bytes()),
            attribute(3, &address),
            attribute(4, &9u16.to_be_bytes()),
            attribute(6, &text(scheduler)),
            attribute(7, &[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
            attribute(8, &0u32.to_ne_bytes()),
            attribute(9, &u32::MAX.to_ne_bytes()),
        ];
        let of = |command| {
            Message::new(id, ASK, &[command, 1, 0, 0]).with(1 | 0x8000, &service.concat())
        };
        netlink.ask(&of(1))?;
        let _ = netlink.ask(&of(3));
        Ok("made a service with it".into())
    };
    match ask("kqnone") {
        Err(refused) if refused.errno == ENOENT => seen(ask(scheduler), &[ENOENT]),
        Err(refused) if refused.errno == EPERM => Seen::NotPermitted(refused.words()),
        other => Seen::Unclear(format!("a scheduler that cannot be got {other:?}")),
    }
}

// ---- routing ----

/// A rule on a mark.
pub(super) fn rule(name: &str) -> Seen {
    let family = if name == "inet6" { 10 } else { 2 };
    let mut route = match Netlink::open(0) {
        Ok(route) => route,
        Err(errno) => return Seen::Unclear(sys::errno_text(errno)),
    };
    // struct fib_rule_hdr: family, …, table 100, action 1 (to table).
    let header = [family, 0, 0, 0, 100, 0, 0, 1, 0, 0, 0, 0];
    let of = |command, flags| {
        Message::new(command, flags, &header)
            .with(10, &0x55u32.to_ne_bytes())
            .with(6, &30_000u32.to_ne_bytes())
    };
    let done = route.ask(&of(32, ASK | CREATE));
    let _ = route.ask(&of(33, ASK));
    seen(done.map(|_| "added one".into()), &[EOPNOTSUPP, EAFNOSUPPORT])
}

/// A nexthop object on the loopback.
pub(super) fn nexthop() -> Seen {
    let mut route = match Netlink::open(0) {
        Ok(route) => route,
        Err(errno) => return Seen::Unclear(sys::errno_text(errno)),
    };
    let index = match index_of(&mut route, "lo") {
        Ok(index) => index,
        Err(refused) => return Seen::Unclear(refused.words()),
    };
    if let Err(refused) = up(&mut route, index) {
        return Seen::Unclear(refused.words());
    }
    let header = [2, 0, 0, 0, 0, 0, 0, 0];
    let message = Message::new(104, ASK | CREATE, &header)
        .with(1, &991u32.to_ne_bytes())
        .with(5, &index.to_ne_bytes());
    let done = route.ask(&message);
    let _ = route.ask(&Message::new(105, ASK, &header).with(1, &991u32.to_ne_bytes()));
    match done {
        Err(refused) if matches!(refused.errno, EOPNOTSUPP | EINVAL) => {
            Seen::TooOld(refused.words())
        }
        other => seen(other.map(|_| "added one".into()), &[]),
    }
}

/// A neighbour that the kernel keeps fresh: set and read back.
pub(super) fn managed_neighbour() -> Seen {
    on_veth("kqngh", |route, index| {
        let mut header = vec![0u8; 12];
        header[0] = 2;
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        header[8..10].copy_from_slice(&0u16.to_ne_bytes());
        header[10] = 0x10;
        let address = [10, 255, 254, 9];
        let message =
            Message::new(28, ASK | CREATE, &header).with(1, &address).with(15, &1u32.to_ne_bytes());
        if let Err(refused) = route.ask(&message) {
            return match refused.errno {
                EINVAL | EOPNOTSUPP => Seen::TooOld(refused.words()),
                EBUSY | EEXIST => works("one is there"),
                _ => seen(Err(refused), &[]),
            };
        }
        let ask = Message::new(30, ASK | DUMP, &header[..12]);
        let answers = route.ask(&ask).unwrap_or_default();
        let managed = answers.iter().any(|(_, body)| {
            attributes(body.get(12..).unwrap_or_default()).iter().any(|(kind, value)| {
                *kind == 15 && value.first().is_some_and(|flags| flags & 1 == 1)
            })
        });
        match managed {
            true => works("set and read back"),
            false => Seen::TooOld("taken, but not read back".into()),
        }
    })
}

// ---- sockets ----

/// A socket of a family, type and protocol.
pub(super) fn socket(name: &str, kind: &str, protocol: i32) -> Seen {
    let family = match name {
        "unix" => 1,
        "inet" => 2,
        "inet6" => 10,
        "netlink" => 16,
        "packet" => 17,
        "can" => 29,
        "alg" => 38,
        "vsock" => 40,
        "xdp" => 44,
        other => return Seen::Unclear(format!("no family `{other}`")),
    };
    let kind = match kind {
        "stream" => 1,
        "dgram" => 2,
        "raw" => 3,
        _ => 5,
    };
    match sys::socket(family, kind, protocol) {
        Ok(_) => works("opened one"),
        Err(errno) => {
            let text = sys::errno_text(errno);
            match errno {
                EPERM | 13 => Seen::NotPermitted(text),
                EAFNOSUPPORT | EPROTONOSUPPORT | ESOCKTNOSUPPORT => Seen::Absent(text),
                _ => Seen::Unclear(text),
            }
        }
    }
}

/// A congestion control of TCP.
pub(super) fn congestion(name: &str) -> Seen {
    tcp_option(13, name, &[ENOENT], &[])
}

/// An upper layer protocol of TCP.
pub(super) fn upper_layer(name: &str) -> Seen {
    tcp_option(31, name, &[ENOENT, ENOPROTOOPT], &[ENOTCONN])
}

fn tcp_option(option: i32, name: &str, absent: &[i32], known: &[i32]) -> Seen {
    let socket = match sys::socket(2, 1, 0) {
        Ok(socket) => socket,
        Err(errno) => return Seen::Unclear(sys::errno_text(errno)),
    };
    match sys::set_option(&socket, 6, option, name.as_bytes()) {
        Ok(()) => works("set it on a socket"),
        Err(errno) if known.contains(&errno) => works("known: the socket is not connected"),
        Err(errno) => seen(Err(socket_error(errno)), absent),
    }
}

/// An algorithm of the kernel, asked through AF_ALG.
pub(super) fn algorithm(kind: &str, name: &str) -> Option<Seen> {
    let socket = sys::socket(38, 5, 0).ok()?;
    // struct sockaddr_alg: family, type[14], feature, mask, name[64].
    let mut address = vec![0u8; 88];
    address[..2].copy_from_slice(&38u16.to_ne_bytes());
    address[2..2 + kind.len()].copy_from_slice(kind.as_bytes());
    address[24..24 + name.len()].copy_from_slice(name.as_bytes());
    match sys::bind(&socket, &address) {
        Ok(()) => Some(works("bound one")),
        // The way to ask for this type is not built, or the algorithm is not: the configuration tells.
        Err(ENOENT) => None,
        Err(errno) => Some(Seen::Unclear(sys::errno_text(errno))),
    }
}
