//! Links, addresses, routes and neighbours of one network namespace.
//!
//! [`Route`] asks the kernel; [`read_notice`] reads what the kernel tells by itself. Both return
//! plain values. Called by the network service and the CNI plugins.
//!
//! Source: Linux, include/uapi/linux/{rtnetlink,if_link,if_addr,neighbour}.h; man 7 rtnetlink.

use super::{
    Family, Message, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NetlinkError, Request,
    Socket, attribute, attributes, number, text,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Longest name of an interface (`IFNAMSIZ` without its zero byte).
pub const NAME_MAX: usize = 15;
/// The table of routes that everybody uses.
const RT_TABLE_MAIN: u8 = 254;
/// Mark of the routes that the network service makes, as `ip route` shows them: `proto dhcp`.
pub const PROTOCOL_DHCP: u8 = 16;
/// Mark of routes from a configuration: `proto static`.
pub const PROTOCOL_STATIC: u8 = 4;

/// Notices: links, addresses of both families, options of router advertisements.
pub const GROUPS: u32 = 1 | 1 << 4 | 1 << 8 | 1 << 19;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_DELNEIGH: u16 = 29;
const RTM_NEWNDUSEROPT: u16 = 68;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_PROTINFO: u16 = 12;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_VLAN_ID: u16 = 1;
const IFLA_BRPORT_MODE: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 2;
const IFA_F_TENTATIVE: u32 = 0x40;
const IFA_F_PERMANENT: u32 = 0x80;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const NDA_DST: u16 = 1;
const AF_INET: u8 = 2;
const AF_BRIDGE: u8 = 7;
const AF_INET6: u8 = 10;
const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
const IFF_LOWER_UP: u32 = 0x1_0000;
const ARPHRD_ETHER: u16 = 1;
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number, at least 1.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address; empty for interfaces without one.
    pub mac: Vec<u8>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Number of the bridge or bond that it is part of.
    pub master: Option<u32>,
    /// Kind of a virtual interface, such as `bridge`, `veth` or `vlan`.
    pub kind: Option<String>,
    /// Whether it was set up.
    pub up: bool,
    /// Whether there is a carrier, such as a plugged cable. Only known while it is up.
    pub carrier: bool,
    /// Whether it is `lo`.
    pub loopback: bool,
    /// Whether its frames are Ethernet frames.
    pub ethernet: bool,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Number of the interface.
    pub index: u32,
    /// The address.
    pub ip: IpAddr,
    /// Length of the network's part in bits.
    pub prefix_len: u8,
    /// Whether it counts beyond its link.
    pub global: bool,
    /// Whether the kernel still checks that nobody else has it (IPv6).
    pub tentative: bool,
    /// Whether it has no end; addresses from router advertisements have one.
    pub permanent: bool,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteEntry {
    /// Network and length of its prefix; length 0 is the default route.
    pub destination: (IpAddr, u8),
    /// Next hop; `None` when the network is on the link itself.
    pub gateway: Option<IpAddr>,
    /// Number of the interface.
    pub index: u32,
    /// Lower wins. `None` is the kernel's default.
    pub metric: Option<u32>,
    /// Source address to prefer.
    pub source: Option<IpAddr>,
    /// Who made it: [`PROTOCOL_DHCP`], [`PROTOCOL_STATIC`] or one of the kernel's.
    pub protocol: u8,
    /// The gateway is reached on the link although no network covers it.
    pub on_link: bool,
}

/// What the kernel tells by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// An interface is new or has changed.
    Link(Link),
    /// An interface is gone.
    LinkGone(u32),
    /// An address is new or has changed.
    Address(Address),
    /// An address is gone.
    AddressGone(Address),
    /// Options of a router advertisement that are not for the kernel: interface, bytes.
    RouterOptions(u32, Vec<u8>),
}

/// A pair of connected interfaces to make, one end in another namespace.
#[derive(Debug, Clone, Copy)]
pub struct VethPair<'a> {
    /// Name of the end that stays; it is set up at once.
    pub host_name: &'a str,
    /// Name of the end in the other namespace; it is not set up yet.
    pub peer_name: &'a str,
    /// Namespace of that end.
    pub peer_namespace: BorrowedFd<'a>,
    /// Hardware address of that end; the kernel chooses one without.
    pub peer_mac: Option<[u8; 6]>,
    /// Largest packet of both ends; the kernel's default without.
    pub mtu: Option<u32>,
    /// Bridge that the end that stays becomes a port of.
    pub master: Option<u32>,
}

/// The kernel's tables of one namespace.
#[derive(Debug)]
pub struct Route {
    socket: Socket,
}

impl Route {
    /// Opens the tables of the namespace that this thread is in.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self { socket: Socket::open(Family::Route)? })
    }

    /// Returns all interfaces.
    pub fn links(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let mut found: Vec<Link> = Vec::new();
        let request = Request::new(RTM_GETLINK, 0, &link_header(0, 0, 0));
        self.socket.dump("list interfaces", request, |message| {
            if let Some(link) = read_link(message.payload) {
                found.retain(|known| known.index != link.index);
                found.push(link);
            }
        })?;
        Ok(found)
    }

    /// Returns the interface of that name, or `None`.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let mut request = Request::new(RTM_GETLINK, 0, &link_header(0, 0, 0));
        request.text(IFLA_IFNAME, name);
        self.one_link(&format!("look at interface `{name}`"), request)
    }

    /// Returns the interface of that number, or `None`.
    pub fn link_by_index(&mut self, index: u32) -> Result<Option<Link>, NetlinkError> {
        let request = Request::new(RTM_GETLINK, 0, &link_header(index, 0, 0));
        self.one_link(&format!("look at interface {index}"), request)
    }

    fn one_link(&mut self, what: &str, request: Request) -> Result<Option<Link>, NetlinkError> {
        match self.socket.get(what, request) {
            Ok(payload) => Ok(read_link(&payload)),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a bridge, not yet up. With `mac` its address does not follow its ports.
    pub fn create_bridge(
        &mut self,
        name: &str,
        mac: Option<[u8; 6]>,
        mtu: Option<u32>,
    ) -> Result<(), NetlinkError> {
        let header = link_header(0, 0, 0);
        let mut request = Request::new(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &header);
        request.text(IFLA_IFNAME, name);
        if let Some(mac) = mac {
            request.attribute(IFLA_ADDRESS, &mac);
        }
        if let Some(mtu) = mtu {
            request.number(IFLA_MTU, mtu);
        }
        request.nest(IFLA_LINKINFO, |info| {
            info.text(IFLA_INFO_KIND, "bridge");
        });
        self.socket.execute(&format!("create bridge `{name}`"), request)
    }

    /// Makes a pair of interfaces in one step.
    pub fn create_veth(&mut self, pair: &VethPair<'_>) -> Result<(), NetlinkError> {
        let header = link_header(0, IFF_UP, IFF_UP);
        let mut request = Request::new(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &header);
        request.text(IFLA_IFNAME, pair.host_name);
        if let Some(mtu) = pair.mtu {
            request.number(IFLA_MTU, mtu);
        }
        if let Some(master) = pair.master {
            request.number(IFLA_MASTER, master);
        }
        request.nest(IFLA_LINKINFO, |info| {
            info.text(IFLA_INFO_KIND, "veth");
            info.nest(IFLA_INFO_DATA, |data| {
                data.nest(VETH_INFO_PEER, |peer| {
                    peer.raw(&link_header(0, 0, 0)).text(IFLA_IFNAME, pair.peer_name);
                    peer.number(IFLA_NET_NS_FD, pair.peer_namespace.as_raw_fd() as u32);
                    if let Some(mtu) = pair.mtu {
                        peer.number(IFLA_MTU, mtu);
                    }
                    if let Some(mac) = pair.peer_mac {
                        peer.attribute(IFLA_ADDRESS, &mac);
                    }
                });
            });
        });
        self.socket.execute(&format!("create interface `{}`", pair.host_name), request)
    }

    /// Makes an 802.1Q interface over `parent` and sets it up.
    pub fn create_vlan(&mut self, name: &str, parent: u32, id: u16) -> Result<(), NetlinkError> {
        let header = link_header(0, IFF_UP, IFF_UP);
        let mut request = Request::new(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &header);
        request.text(IFLA_IFNAME, name).number(IFLA_LINK, parent);
        request.nest(IFLA_LINKINFO, |info| {
            info.text(IFLA_INFO_KIND, "vlan");
            info.nest(IFLA_INFO_DATA, |data| {
                data.attribute(IFLA_VLAN_ID, &id.to_ne_bytes());
            });
        });
        self.socket.execute(&format!("create VLAN {id} as `{name}`"), request)
    }

    /// Removes an interface; the other end of a pair goes with it.
    pub fn delete_link(&mut self, index: u32) -> Result<(), NetlinkError> {
        let request = Request::new(RTM_DELLINK, 0, &link_header(index, 0, 0));
        self.socket.execute(&format!("delete interface {index}"), request)
    }

    /// Sets an interface up or down.
    pub fn set_up(&mut self, index: u32, up: bool) -> Result<(), NetlinkError> {
        let flags = if up { IFF_UP } else { 0 };
        let request = Request::new(RTM_NEWLINK, 0, &link_header(index, flags, IFF_UP));
        let way = if up { "up" } else { "down" };
        self.socket.execute(&format!("set interface {index} {way}"), request)
    }

    /// Sets the largest packet of an interface, in bytes.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<(), NetlinkError> {
        let mut request = Request::new(RTM_NEWLINK, 0, &link_header(index, 0, 0));
        request.number(IFLA_MTU, mtu);
        self.socket.execute(&format!("set MTU {mtu} of interface {index}"), request)
    }

    /// Renames an interface; it has to be down.
    pub fn rename(&mut self, index: u32, name: &str) -> Result<(), NetlinkError> {
        let mut request = Request::new(RTM_NEWLINK, 0, &link_header(index, 0, 0));
        request.text(IFLA_IFNAME, name);
        self.socket.execute(&format!("name interface {index} `{name}`"), request)
    }

    /// Makes an interface a port of bridge `master`, or of none with 0.
    pub fn set_master(&mut self, index: u32, master: u32) -> Result<(), NetlinkError> {
        let mut request = Request::new(RTM_NEWLINK, 0, &link_header(index, 0, 0));
        request.number(IFLA_MASTER, master);
        self.socket.execute(&format!("make interface {index} a port of {master}"), request)
    }

    /// Moves an interface to another namespace.
    pub fn move_to(&mut self, index: u32, namespace: BorrowedFd<'_>) -> Result<(), NetlinkError> {
        let mut request = Request::new(RTM_NEWLINK, 0, &link_header(index, 0, 0));
        request.number(IFLA_NET_NS_FD, namespace.as_raw_fd() as u32);
        self.socket.execute(&format!("move interface {index}"), request)
    }

    /// Lets a bridge send a packet back through the port it came from.
    pub fn set_hairpin(&mut self, port: u32) -> Result<(), NetlinkError> {
        let mut header = link_header(port, 0, 0);
        header[0] = AF_BRIDGE;
        let mut request = Request::new(RTM_SETLINK, 0, &header);
        request.nest(IFLA_PROTINFO, |info| {
            info.attribute(IFLA_BRPORT_MODE, &[1]);
        });
        self.socket.execute(&format!("set hairpin mode of interface {port}"), request)
    }

    /// Returns all addresses.
    pub fn addresses(&mut self) -> Result<Vec<Address>, NetlinkError> {
        let mut found: Vec<Address> = Vec::new();
        let request = Request::new(RTM_GETADDR, 0, &[0; 8]);
        self.socket.dump("list addresses", request, |message| {
            if let Some(address) = read_address(message.payload)
                && !found.contains(&address)
            {
                found.push(address);
            }
        })?;
        Ok(found)
    }

    /// Gives an interface an address. IPv6 addresses are used at once, without asking the link
    /// whether somebody has them, when `trusted`.
    pub fn add_address(
        &mut self,
        index: u32,
        ip: IpAddr,
        prefix_len: u8,
        trusted: bool,
    ) -> Result<(), NetlinkError> {
        let mut request = address_request(RTM_NEWADDR, index, ip, prefix_len);
        request.add_flags(NLM_F_CREATE | NLM_F_EXCL);
        if let IpAddr::V4(v4) = ip
            && prefix_len < 31
        {
            let broadcast = u32::from(v4) | u32::MAX.checked_shr(prefix_len.into()).unwrap_or(0);
            request.attribute(IFA_BROADCAST, &broadcast.to_be_bytes());
        }
        if ip.is_ipv6() && trusted {
            request.number(IFA_FLAGS, IFA_F_NODAD);
        }
        self.socket.execute(&format!("add address {ip}/{prefix_len} to interface {index}"), request)
    }

    /// Takes an address from an interface.
    pub fn delete_address(
        &mut self,
        index: u32,
        ip: IpAddr,
        prefix_len: u8,
    ) -> Result<(), NetlinkError> {
        let request = address_request(RTM_DELADDR, index, ip, prefix_len);
        self.socket.execute(&format!("delete address {ip}/{prefix_len}"), request)
    }

    /// Returns the routes of the main table.
    pub fn routes(&mut self) -> Result<Vec<RouteEntry>, NetlinkError> {
        let mut found: Vec<RouteEntry> = Vec::new();
        let request = Request::new(RTM_GETROUTE, 0, &[0; 12]);
        self.socket.dump("list routes", request, |message| {
            if let Some(route) = read_route(message.payload)
                && !found.contains(&route)
            {
                found.push(route);
            }
        })?;
        Ok(found)
    }

    /// Adds a route, or replaces the one with the same destination and metric.
    pub fn replace_route(&mut self, route: &RouteEntry) -> Result<(), NetlinkError> {
        let request = route_request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, route);
        self.socket.execute(&route_words("add", route), request)
    }

    /// Adds a route beside others with the same destination; it is an error if this one exists.
    pub fn add_route(&mut self, route: &RouteEntry) -> Result<(), NetlinkError> {
        let request = route_request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_APPEND, route);
        self.socket.execute(&route_words("add", route), request)
    }

    /// Removes a route.
    pub fn delete_route(&mut self, route: &RouteEntry) -> Result<(), NetlinkError> {
        let request = route_request(RTM_DELROUTE, 0, route);
        self.socket.execute(&route_words("delete", route), request)
    }

    /// Returns the number of the interface through which `ip` is reached.
    pub fn interface_to(&mut self, ip: IpAddr) -> Result<Option<u32>, NetlinkError> {
        let mut header = [0; 12];
        header[0] = family_of(ip);
        header[1] = prefix_max(ip);
        let mut request = Request::new(RTM_GETROUTE, 0, &header);
        request.attribute(RTA_DST, &octets(ip));
        match self.socket.get(&format!("look for the way to {ip}"), request) {
            Ok(payload) => {
                let body = payload.get(12..).unwrap_or_default();
                Ok(attribute(body, RTA_OIF).and_then(number))
            }
            Err(error)
                if error.is_absent()
                    || error.errno() == Some(nix::libc::ENETUNREACH)
                    || error.errno() == Some(nix::libc::EHOSTUNREACH) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Forgets which hardware address `ip` had on the link; absent is fine.
    pub fn forget_neighbour(&mut self, index: u32, ip: IpAddr) -> Result<(), NetlinkError> {
        let mut header = [0; 12];
        header[0] = family_of(ip);
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        let mut request = Request::new(RTM_DELNEIGH, 0, &header);
        request.attribute(NDA_DST, &octets(ip));
        match self.socket.execute(&format!("forget neighbour {ip}"), request) {
            Err(error) if !error.is_absent() => Err(error),
            _ => Ok(()),
        }
    }
}

/// Reads a notice; `None` for those that nobody here asks for.
pub fn read_notice(message: &Message<'_>) -> Option<Notice> {
    match message.kind {
        RTM_NEWLINK => {
            // Bridges tell of their ports in a message of another family, with less in it.
            let family = message.payload.first()?;
            (*family != AF_BRIDGE).then(|| read_link(message.payload).map(Notice::Link))?
        }
        RTM_DELLINK => {
            let family = message.payload.first()?;
            (*family != AF_BRIDGE)
                .then(|| read_link(message.payload).map(|link| Notice::LinkGone(link.index)))?
        }
        RTM_NEWADDR => read_address(message.payload).map(Notice::Address),
        RTM_DELADDR => read_address(message.payload).map(Notice::AddressGone),
        RTM_NEWNDUSEROPT => {
            // family, pad, length of the options (2), interface (4), ICMP type, ICMP code, pad (6)
            let header = message.payload.first_chunk::<16>()?;
            let len = usize::from(u16::from_ne_bytes([header[2], header[3]]));
            let index = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
            let options = message.payload.get(16..16 + len)?;
            let is_advertisement = header[0] == AF_INET6 && header[8] == 134;
            is_advertisement.then(|| Notice::RouterOptions(index, options.to_vec()))
        }
        _ => None,
    }
}

fn read_link(payload: &[u8]) -> Option<Link> {
    let header = payload.first_chunk::<16>()?;
    let arp_type = u16::from_ne_bytes([header[2], header[3]]);
    let flags = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
    let mut link = Link {
        index: u32::from_ne_bytes([header[4], header[5], header[6], header[7]]),
        name: String::new(),
        mac: Vec::new(),
        mtu: 0,
        master: None,
        kind: None,
        up: flags & IFF_UP != 0,
        carrier: flags & IFF_LOWER_UP != 0,
        loopback: flags & IFF_LOOPBACK != 0,
        ethernet: arp_type == ARPHRD_ETHER,
    };
    for (kind, value) in attributes(&payload[16..]) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            IFLA_ADDRESS => link.mac = value.to_vec(),
            IFLA_MTU => link.mtu = number(value)?,
            IFLA_MASTER => link.master = number(value),
            IFLA_LINKINFO => link.kind = attribute(value, IFLA_INFO_KIND).map(text),
            _ => {}
        }
    }
    (link.index > 0 && !link.name.is_empty()).then_some(link)
}

fn read_address(payload: &[u8]) -> Option<Address> {
    let header = payload.first_chunk::<8>()?;
    let body = &payload[8..];
    // On links with a peer, `IFA_ADDRESS` is the other side's.
    let ip = attribute(body, IFA_LOCAL).or_else(|| attribute(body, IFA_ADDRESS))?;
    let flags = attribute(body, IFA_FLAGS).and_then(number).unwrap_or(header[2].into());
    Some(Address {
        index: u32::from_ne_bytes([header[4], header[5], header[6], header[7]]),
        ip: read_ip(header[0], ip)?,
        prefix_len: header[1],
        global: header[3] == SCOPE_UNIVERSE,
        tentative: flags & IFA_F_TENTATIVE != 0,
        permanent: flags & IFA_F_PERMANENT != 0,
    })
}

fn read_route(payload: &[u8]) -> Option<RouteEntry> {
    let header = payload.first_chunk::<12>()?;
    let body = &payload[12..];
    let family = header[0];
    if header[4] != RT_TABLE_MAIN || header[7] != RTN_UNICAST {
        return None;
    }
    let destination = match attribute(body, RTA_DST) {
        Some(value) => read_ip(family, value)?,
        None if family == AF_INET => Ipv4Addr::UNSPECIFIED.into(),
        None if family == AF_INET6 => Ipv6Addr::UNSPECIFIED.into(),
        None => return None,
    };
    let flags = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
    Some(RouteEntry {
        destination: (destination, header[1]),
        gateway: attribute(body, RTA_GATEWAY).and_then(|value| read_ip(family, value)),
        index: attribute(body, RTA_OIF).and_then(number)?,
        metric: attribute(body, RTA_PRIORITY).and_then(number),
        source: attribute(body, RTA_PREFSRC).and_then(|value| read_ip(family, value)),
        protocol: header[5],
        on_link: flags & RTNH_F_ONLINK != 0,
    })
}

fn read_ip(family: u8, value: &[u8]) -> Option<IpAddr> {
    match family {
        AF_INET => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
        AF_INET6 => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
        _ => None,
    }
}

fn link_header(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    header
}

fn address_request(kind: u16, index: u32, ip: IpAddr, prefix_len: u8) -> Request {
    let mut header = [0; 8];
    header[0] = family_of(ip);
    header[1] = prefix_len;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    let mut request = Request::new(kind, 0, &header);
    request.attribute(IFA_LOCAL, &octets(ip)).attribute(IFA_ADDRESS, &octets(ip));
    request
}

fn route_request(kind: u16, flags: u16, route: &RouteEntry) -> Request {
    let (destination, prefix_len) = route.destination;
    let mut header = [0; 12];
    header[0] = family_of(destination);
    header[1] = prefix_len;
    header[4] = RT_TABLE_MAIN;
    header[5] = route.protocol;
    let on_link_only = route.gateway.is_none() && destination.is_ipv4();
    header[6] = if on_link_only { SCOPE_LINK } else { SCOPE_UNIVERSE };
    header[7] = RTN_UNICAST;
    if route.on_link {
        header[8..12].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
    }
    let mut request = Request::new(kind, flags, &header);
    if prefix_len > 0 {
        request.attribute(RTA_DST, &octets(destination));
    }
    if let Some(gateway) = route.gateway {
        request.attribute(RTA_GATEWAY, &octets(gateway));
    }
    if let Some(source) = route.source {
        request.attribute(RTA_PREFSRC, &octets(source));
    }
    if let Some(metric) = route.metric {
        request.number(RTA_PRIORITY, metric);
    }
    request.number(RTA_OIF, route.index);
    request
}

fn route_words(verb: &str, route: &RouteEntry) -> String {
    let (destination, prefix_len) = route.destination;
    match route.gateway {
        Some(gateway) => format!("{verb} route {destination}/{prefix_len} via {gateway}"),
        None => format!("{verb} route {destination}/{prefix_len}"),
    }
}

fn family_of(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn prefix_max(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

/// Returns the bytes of an address as they stand in packets.
pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::messages;

    #[test]
    fn readers_survive_cut_and_broken_messages() {
        let mut link = Request::new(RTM_NEWLINK, 0, &link_header(4, IFF_UP, 0));
        link.text(IFLA_IFNAME, "eth0").attribute(IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1]);
        link.number(IFLA_MTU, 1500);
        let address = address_request(RTM_NEWADDR, 4, Ipv4Addr::new(10, 0, 2, 15).into(), 24);
        let mut options = [0; 16];
        options[0] = AF_INET6;
        options[2] = 4;
        options[4] = 4;
        options[8] = 134;
        let mut router = Request::new(RTM_NEWNDUSEROPT, 0, &options);
        router.raw(&[25, 3, 0, 0]);
        let all: Vec<u8> =
            [link, address, router].into_iter().flat_map(|one| one.finish(0)).collect();
        let notices: Vec<Notice> =
            messages(&all).filter_map(|message| read_notice(&message)).collect();
        assert_eq!(notices.len(), 3);
        assert!(matches!(&notices[0], Notice::Link(link) if link.name == "eth0" && link.up));
        assert!(matches!(&notices[1], Notice::Address(address) if address.prefix_len == 24));
        assert_eq!(notices[2], Notice::RouterOptions(4, vec![25, 3, 0, 0]));

        for at in 0..all.len() {
            messages(&all[..at]).for_each(|message| drop(read_notice(&message)));
            for bit in 0..8 {
                let mut broken = all.clone();
                broken[at] ^= 1 << bit;
                messages(&broken).for_each(|message| drop(read_notice(&message)));
                messages(&broken).for_each(|message| {
                    let _ = read_route(message.payload);
                });
            }
        }
    }
}
