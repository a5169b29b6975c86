//! Translations of addresses: the nf_tables table `skerry` of the family for both IP versions.
//!
//! ```text
//! chain guard        filter, prerouting -300   from a bridge to 127.0.0.0/8: drop
//! chain prerouting   nat, prerouting -100      to this host: mark it if it came from a bridge; jump ports
//! chain output       nat, output -100          to this host: jump ports
//! chain ports        no hook                   dnat to the value of ports4_at, ports4, ports6_at, ports6
//! chain postrouting  nat, postrouting 100      marked and dnat, or from 127.0.0.0/8 and dnat: masquerade;
//!                                              source in masq4 or masq6: goto the chain of its network
//! chain masq_<net>   no hook                   to its own network or to a group: return; masquerade
//! set bridges        interface name            bridges with port mappings
//! map masq4, masq6   address : goto masq_<net> containers whose traffic is masqueraded
//! map ports4, ports6       protocol . port : address . port
//! map ports4_at, ports6_at address . protocol . port : address . port
//! ```
//!
//! A container is a few elements of these sets, each with the comment `<container>/<interface>`:
//! adding and deleting it is one batch of elements, whatever else is in the table, and two
//! containers that are added at once do not see each other. The chain of a network goes with its
//! last container; the chains with a hook and the empty sets stay. The first ADD after boot finds
//! no table (`ENOENT`) and makes it in the same batch.
//!
//! The mark is [`MARK`]. The packet is marked and not the connection, and only until it leaves.
//! Marking is needed because a packet from a container to a host port that leads back to the same
//! bridge would get its answer directly, from an address that it does not know. The guard belongs
//! to `route_localnet`, which [`super::portmap`] sets so that 127.0.0.1:port works on the host.
//!
//! Kernel: nf_tables, nft_chain_nat, nft_ct, nft_fib_inet, nft_masq, nft_nat.

use super::CniError;
use super::result::network_of;
use crate::netlink::nft::{
    self, Batch, ChainKind, Datum, Element, Expr, Hook, Meta, NFPROTO_IPV4, NFPROTO_IPV6, Part,
    Value, Values, key,
};
use crate::netlink::{NetlinkError, Socket};
use crate::site::Cidr;
use std::net::IpAddr;

/// Name of the table.
pub const TABLE: &str = "skerry";
/// Bit of the packet mark; the one that other port mappers use for the same thing.
pub const MARK: u32 = 0x2000;
/// Status of a connection whose destination was translated (`IPS_DST_NAT`).
const STATUS_DNAT: u32 = 0x20;
/// Destination type of this host's own addresses (`RTN_LOCAL`).
const TYPE_LOCAL: u32 = 2;
const PORT_SETS: [&str; 4] = ["ports4", "ports6", "ports4_at", "ports6_at"];
const MASQUERADE_SETS: [&str; 2] = ["masq4", "masq6"];

/// A port of this host that leads to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortMap {
    /// Number of the IP protocol: 6 TCP, 17 UDP, 132 SCTP.
    pub protocol: u8,
    /// Address of this host; any without.
    pub host_ip: Option<IpAddr>,
    /// Port of this host.
    pub host_port: u16,
    /// Address of the container.
    pub container_ip: IpAddr,
    /// Port of the container.
    pub container_port: u16,
}

impl PortMap {
    fn set(&self) -> &'static str {
        match (self.container_ip.is_ipv4(), self.host_ip) {
            (true, None) => "ports4",
            (true, Some(_)) => "ports4_at",
            (false, None) => "ports6",
            (false, Some(_)) => "ports6_at",
        }
    }

    fn element(&self, owner: &str) -> Element {
        let mut parts = vec![Part::Protocol(self.protocol), Part::Port(self.host_port)];
        if let Some(ip) = self.host_ip {
            parts.insert(0, Part::Ip(ip));
        }
        let to = [Part::Ip(self.container_ip), Part::Port(self.container_port)];
        Element { key: key(&parts), value: Some(Value::Data(key(&to))), comment: owner.to_owned() }
    }
}

/// Masquerades what `addresses` send beyond their own networks.
pub fn add_masquerade(owner: &str, addresses: &[Cidr]) -> Result<(), CniError> {
    if addresses.is_empty() {
        return Ok(());
    }
    let fill = |batch: &mut Batch| {
        for cidr in addresses {
            let element = Element {
                key: key(&[Part::Ip(cidr.address)]),
                value: Some(Value::Goto(chain_name(*cidr))),
                comment: owner.to_owned(),
            };
            batch.add_elements(masquerade_set(cidr.address), &[element]);
        }
    };
    let frame = |batch: &mut Batch| {
        lay_frame(batch);
        for cidr in addresses {
            batch.chain(&chain_name(*cidr), None, &masquerade_rules(network_of(*cidr)));
        }
    };
    let mut socket = nft::open()?;
    commit(&mut socket, "masquerade a container", fill, frame)?;
    Ok(())
}

/// Ends what [`add_masquerade`] began: for `owner`, and for `addresses` whoever they belonged to.
pub fn delete_masquerade(owner: &str, addresses: &[IpAddr]) -> Result<(), CniError> {
    let mut socket = nft::open()?;
    let keys: Vec<Vec<u8>> = addresses.iter().map(|ip| key(&[Part::Ip(*ip)])).collect();
    let removed = delete(&mut socket, &MASQUERADE_SETS, |element| {
        element.comment == owner || keys.contains(&element.key)
    })?;
    let mut chains: Vec<String> = removed
        .into_iter()
        .filter_map(|element| match element.value {
            Some(Value::Goto(chain)) => Some(chain),
            _ => None,
        })
        .collect();
    chains.sort();
    chains.dedup();
    for chain in chains {
        let mut batch = Batch::new(TABLE);
        batch.delete_chain(&chain);
        match batch.commit(&mut socket, "delete the chain of a network") {
            Ok(()) => {}
            // Other containers of the network are still there.
            Err(error) if error.errno() == Some(nix::libc::EBUSY) || error.is_absent() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Looks whether what `addresses` send is masqueraded.
pub fn has_masquerade(addresses: &[IpAddr]) -> Result<bool, CniError> {
    let mut socket = nft::open()?;
    let mut found = Vec::new();
    for set in MASQUERADE_SETS {
        found.extend(nft::elements(&mut socket, TABLE, set)?);
    }
    let has = |ip: &IpAddr| found.iter().any(|element| element.key == key(&[Part::Ip(*ip)]));
    Ok(addresses.iter().all(has))
}

/// Opens ports of this host that lead to a container behind `bridge`; with a bridge, also from
/// other containers behind it and from 127.0.0.1.
pub fn add_ports(owner: &str, bridge: Option<&str>, maps: &[PortMap]) -> Result<(), CniError> {
    let fill = |batch: &mut Batch| {
        if let Some(name) = bridge {
            let element =
                Element { key: key(&[Part::Interface(name)]), value: None, comment: String::new() };
            batch.add_elements("bridges", &[element]);
        }
        for map in maps {
            batch.add_elements(map.set(), &[map.element(owner)]);
        }
    };
    let mut socket = nft::open()?;
    match commit(&mut socket, "map ports", fill, lay_frame) {
        Err(error) if error.is_exists() => {
            let known = ports_of(&mut socket)?;
            let taken = maps.iter().find_map(|map| {
                let element = map.element(owner);
                let other = known
                    .iter()
                    .find(|other| other.key == element.key && other.value != element.value)?;
                Some((map, other))
            });
            Err(CniError::Conflict(match taken {
                Some((map, other)) => {
                    format!("host port {} is taken by container `{}`", map.host_port, other.comment)
                }
                None => "a host port is asked for twice".to_owned(),
            }))
        }
        other => Ok(other?),
    }
}

/// Closes the ports of `owner`, and those that lead to `addresses`.
pub fn delete_ports(owner: &str, addresses: &[IpAddr]) -> Result<(), CniError> {
    let mut socket = nft::open()?;
    let starts: Vec<Vec<u8>> = addresses.iter().map(|ip| key(&[Part::Ip(*ip)])).collect();
    delete(&mut socket, &PORT_SETS, |element| {
        let leads_to = |start: &Vec<u8>| match &element.value {
            Some(Value::Data(bytes)) => bytes.len() == start.len() + 4 && bytes.starts_with(start),
            _ => false,
        };
        element.comment == owner || starts.iter().any(leads_to)
    })?;
    Ok(())
}

/// Looks whether all of `maps` are open.
pub fn has_ports(maps: &[PortMap]) -> Result<bool, CniError> {
    let known = ports_of(&mut nft::open()?)?;
    let has = |map: &PortMap| {
        let wanted = map.element("");
        known.iter().any(|element| element.key == wanted.key && element.value == wanted.value)
    };
    Ok(maps.iter().all(has))
}

fn ports_of(socket: &mut Socket) -> Result<Vec<Element>, CniError> {
    let mut known = Vec::new();
    for set in PORT_SETS {
        known.extend(nft::elements(socket, TABLE, set)?);
    }
    Ok(known)
}

/// Commits what `fill` writes; when something that it needs is not there, `frame` comes before it.
fn commit(
    socket: &mut Socket,
    what: &str,
    fill: impl Fn(&mut Batch),
    frame: impl Fn(&mut Batch),
) -> Result<(), NetlinkError> {
    let mut batch = Batch::new(TABLE);
    fill(&mut batch);
    match batch.commit(socket, what) {
        Err(error) if error.is_absent() => {
            let mut batch = Batch::new(TABLE);
            frame(&mut batch);
            fill(&mut batch);
            batch.commit(socket, what)
        }
        other => other,
    }
}

/// Deletes the elements that are `meant` from `sets` and returns them.
fn delete(
    socket: &mut Socket,
    sets: &[&str],
    meant: impl Fn(&Element) -> bool,
) -> Result<Vec<Element>, CniError> {
    // Another DEL of the same container may be faster; then there is nothing left in the next turn.
    for _ in 0..3 {
        let mut batch = Batch::new(TABLE);
        let mut removed = Vec::new();
        for set in sets {
            let mut found = nft::elements(socket, TABLE, set)?;
            found.retain(|element| meant(element));
            batch.delete_elements(set, &found);
            removed.extend(found);
        }
        match batch.commit(socket, "delete translations of a container") {
            Ok(()) => return Ok(removed),
            Err(error) if error.is_absent() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(CniError::Conflict("translations change while they are deleted".to_owned()))
}

fn masquerade_set(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "masq4" } else { "masq6" }
}

/// Names as `nft` can write them: no colons.
fn chain_name(cidr: Cidr) -> String {
    format!("masq_{}", network_of(cidr).to_string().replace(':', "_"))
}

fn lay_frame(batch: &mut Batch) {
    use Datum::{InterfaceName, Ipv4, Ipv6, Port, Protocol};
    batch.table();
    batch.set("bridges", &[InterfaceName], Values::None);
    batch.set("masq4", &[Ipv4], Values::Verdict);
    batch.set("masq6", &[Ipv6], Values::Verdict);
    batch.set("ports4", &[Protocol, Port], Values::Data(&[Ipv4, Port]));
    batch.set("ports4_at", &[Ipv4, Protocol, Port], Values::Data(&[Ipv4, Port]));
    batch.set("ports6", &[Protocol, Port], Values::Data(&[Ipv6, Port]));
    batch.set("ports6_at", &[Ipv6, Protocol, Port], Values::Data(&[Ipv6, Port]));
    batch.chain("ports", None, &[ports4_at(), ports4(), ports6_at(), ports6()]);

    let from_bridge = || [Expr::Meta(Meta::InName, 0), Expr::InSet { set: "bridges", register: 0 }];
    let to_host = || [Expr::DestinationType(0), equal(0, &TYPE_LOCAL.to_ne_bytes())];
    let to_ports = || [&to_host()[..], &[Expr::Jump("ports".to_owned())]].concat();
    let to_loopback = [
        is_family(NFPROTO_IPV4).as_slice(),
        &[Expr::Network { register: 0, offset: 16, len: 1 }, equal(0, &[127])],
    ]
    .concat();
    let guard = [&to_loopback[..], &from_bridge(), &[Expr::Drop]].concat();
    batch.chain("guard", Some((ChainKind::Filter, Hook::Prerouting, -300)), &[guard]);
    let mark = [
        Expr::Meta(Meta::Mark, 0),
        Expr::Bitwise {
            register: 0,
            mask: (!MARK).to_ne_bytes().to_vec(),
            xor: MARK.to_ne_bytes().to_vec(),
        },
        Expr::SetMark(0),
    ];
    let mark = [&to_host()[..], &from_bridge(), &mark].concat();
    let nat = |hook, priority| Some((ChainKind::Nat, hook, priority));
    batch.chain("prerouting", nat(Hook::Prerouting, -100), &[mark, to_ports()]);
    batch.chain("output", nat(Hook::Output, -100), &[to_ports()]);

    let is_dnat = || [Expr::CtStatus(0), masked(0, STATUS_DNAT), not_equal(0, &[0; 4])];
    let is_marked = [Expr::Meta(Meta::Mark, 0), masked(0, MARK), equal(0, &MARK.to_ne_bytes())];
    let from_loopback = [
        is_family(NFPROTO_IPV4).as_slice(),
        &[Expr::Network { register: 0, offset: 12, len: 1 }, equal(0, &[127])],
    ]
    .concat();
    let rules = [
        [&is_marked[..], &is_dnat(), &[Expr::Masquerade]].concat(),
        [&from_loopback[..], &is_dnat(), &[Expr::Masquerade]].concat(),
        by_source(NFPROTO_IPV4, 12, 4, "masq4"),
        by_source(NFPROTO_IPV6, 8, 16, "masq6"),
    ];
    batch.chain("postrouting", nat(Hook::Postrouting, 100), &rules);
}

fn by_source(family: u8, offset: u32, len: u32, set: &'static str) -> Vec<Expr> {
    let look = [Expr::Network { register: 0, offset, len }, Expr::VerdictMap { set, register: 0 }];
    [is_family(family).as_slice(), &look].concat()
}

fn masquerade_rules(network: Cidr) -> Vec<Vec<Expr>> {
    let (offset, group, bits) = match network.address {
        IpAddr::V4(_) => (16, ([0xf0], [0xe0]), 32_u8),
        IpAddr::V6(_) => (24, ([0xff], [0xff]), 128),
    };
    let len = u32::from(bits / 8);
    let mut mask = vec![0_u8; usize::from(bits / 8)];
    for (at, byte) in mask.iter_mut().enumerate() {
        let left = usize::from(network.prefix).saturating_sub(at * 8).min(8);
        *byte = 0xff_u8.checked_shl(8 - left as u32).unwrap_or(0);
    }
    let xor = vec![0; mask.len()];
    let address = key(&[Part::Ip(network.address)]);
    vec![
        vec![
            Expr::Network { register: 0, offset, len },
            Expr::Bitwise { register: 0, mask, xor },
            equal(0, &address),
            Expr::Return,
        ],
        vec![
            Expr::Network { register: 0, offset, len: 1 },
            Expr::Bitwise { register: 0, mask: group.0.to_vec(), xor: vec![0] },
            equal(0, &group.1),
            Expr::Return,
        ],
        vec![Expr::Masquerade],
    ]
}

fn ports4() -> Vec<Expr> {
    ports(NFPROTO_IPV4, None, "ports4")
}

fn ports4_at() -> Vec<Expr> {
    ports(NFPROTO_IPV4, Some((16, 4)), "ports4_at")
}

fn ports6() -> Vec<Expr> {
    ports(NFPROTO_IPV6, None, "ports6")
}

fn ports6_at() -> Vec<Expr> {
    ports(NFPROTO_IPV6, Some((24, 16)), "ports6_at")
}

/// Translates by a map whose key begins with the destination address, if it has that.
fn ports(family: u8, address: Option<(u32, u32)>, set: &'static str) -> Vec<Expr> {
    let words = if family == NFPROTO_IPV4 { 1 } else { 4 };
    let mut rule = is_family(family).to_vec();
    let mut next = 0;
    if let Some((offset, len)) = address {
        rule.push(Expr::Network { register: 0, offset, len });
        next = words;
    }
    rule.push(Expr::Meta(Meta::L4Proto, next));
    rule.push(Expr::Transport { register: next + 1, offset: 2, len: 2 });
    rule.push(Expr::Map { set, register: 0, into: 0 });
    rule.push(Expr::Dnat { family, address: 0, port: words });
    rule
}

fn is_family(family: u8) -> [Expr; 2] {
    [Expr::Meta(Meta::NfProto, 0), equal(0, &[family])]
}

fn masked(register: u32, mask: u32) -> Expr {
    Expr::Bitwise { register, mask: mask.to_ne_bytes().to_vec(), xor: vec![0; 4] }
}

fn equal(register: u32, value: &[u8]) -> Expr {
    Expr::Equal { register, value: value.to_vec() }
}

fn not_equal(register: u32, value: &[u8]) -> Expr {
    Expr::NotEqual { register, value: value.to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_named_after_the_network() {
        let name = |text: &str| chain_name(Cidr::parse(text).expect("a network"));
        assert_eq!(name("10.1.2.3/24"), "masq_10.1.2.0/24");
        assert_eq!(name("fd00:1::5/64"), "masq_fd00_1__/64");
    }

    #[test]
    fn masks_are_made_of_the_length_of_the_prefix() {
        let mask = |text: &str| {
            let rules = masquerade_rules(Cidr::parse(text).expect("a network"));
            match &rules[0][1] {
                Expr::Bitwise { mask, .. } => mask.clone(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(mask("10.0.0.0/8"), [255, 0, 0, 0]);
        assert_eq!(mask("10.0.0.0/21"), [255, 255, 248, 0]);
        assert_eq!(mask("10.0.0.0/32"), [255; 4]);
        assert_eq!(mask("0.0.0.0/0"), [0; 4]);
    }
}
