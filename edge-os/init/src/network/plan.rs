//! What an interface shall be, from `site.toml` and from what a DHCP server gave. Pure.

use super::dhcp::Lease;
use crate::netlink::route::{PROTOCOL_DHCP, PROTOCOL_STATIC, RouteEntry};
use crate::site::{Cidr, Interface, Ipv6, Method};
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// Name servers that resolvers use; more are not written.
pub const DNS_MAX: usize = 3;
/// Domains to search that are written.
const SEARCH_MAX: usize = 6;
/// Metric of the default route of the first rule; each further rule adds [`METRIC_STEP`].
const METRIC_FIRST: u32 = 100;
/// Rules that have a metric of their own.
const RULES_MAX: usize = 1000;
/// Room for the interfaces of one rule, in the order of their numbers.
const METRIC_STEP: u32 = 100;
/// Smallest packet size that IPv6 works with.
const IPV6_MTU_MIN: u32 = 1280;

/// What the kernel and the drivers say of an interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Hardware address as text.
    pub mac: String,
    /// Name of its driver; empty if it has none.
    pub driver: String,
    /// It has a cable: Ethernet, of no virtual kind, and not radio.
    pub wired: bool,
    /// It was made by software (bridge, veth, tunnel).
    pub made: bool,
}

/// What one interface shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortPlan {
    /// Number of the rule, for order and metrics; interfaces without a rule come last.
    pub order: usize,
    /// A rule names it; without, it is there by default.
    pub by_rule: bool,
    /// How it gets addresses.
    pub method: Method,
    /// Its name servers, instead of those of DHCP.
    pub dns: Vec<IpAddr>,
    /// IPv6.
    pub ipv6: Ipv6,
    /// Size of packets.
    pub mtu: Option<u32>,
}

/// What a device shall be, and which VLANs are made over it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DevicePlan {
    /// Itself; `None` is left alone unless it carries VLANs.
    pub own: Option<PortPlan>,
    /// VLANs by id.
    pub vlans: Vec<(u16, PortPlan)>,
}

/// Applies the rules to a device. Interfaces that software made are only meant by a rule with
/// exactly their name: `*` is not for the bridges of pods.
pub fn plan(rules: &[Interface], device: &Device) -> DevicePlan {
    let mut found = DevicePlan::default();
    for (order, rule) in rules.iter().enumerate() {
        let exact = rule.matches.name.as_deref() == Some(device.name.as_str());
        if !rule.matches.matches(&device.name, &device.mac, &device.driver)
            || (device.made && !exact)
        {
            continue;
        }
        let port = PortPlan {
            order,
            by_rule: true,
            method: rule.method.clone(),
            dns: rule.dns.clone(),
            ipv6: rule.ipv6,
            mtu: rule.mtu,
        };
        match rule.vlan {
            Some(id) if found.vlans.iter().all(|(known, _)| *known != id) => {
                found.vlans.push((id, port));
            }
            None if found.own.is_none() => found.own = Some(port),
            _ => {}
        }
    }
    if found.own.is_none() && found.vlans.is_empty() && device.wired {
        found.own = Some(PortPlan {
            order: rules.len(),
            by_rule: false,
            method: Method::Dhcp,
            dns: Vec::new(),
            ipv6: Ipv6::Auto,
            mtu: None,
        });
    }
    found
}

/// Addresses and routes that an interface shall have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// Addresses with their networks.
    pub addresses: Vec<Cidr>,
    /// Routes beside those of the networks.
    pub routes: Vec<RouteEntry>,
    /// Size of packets, if it is not to be left alone.
    pub mtu: Option<u32>,
}

/// Returns what interface `index` shall have; `lease` is what DHCP gave.
pub fn desired(port: &PortPlan, index: u32, lease: Option<&Lease>) -> Desired {
    let order = u32::try_from(port.order.min(RULES_MAX)).unwrap_or(0);
    let metric = METRIC_FIRST + METRIC_STEP * order + index.min(METRIC_STEP - 1);
    let any = |ip: IpAddr| match ip {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), 0),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED.into(), 0),
    };
    let mut wanted = Desired { mtu: port.mtu, ..Desired::default() };
    let route = |destination, gateway: IpAddr, networks: &[Cidr], protocol| {
        let gateway = Some(gateway).filter(|gateway| !gateway.is_unspecified());
        let covered = |gateway: IpAddr| {
            networks.iter().any(|network| network.contains(gateway))
                || matches!(gateway, IpAddr::V6(ip) if ip.is_unicast_link_local())
        };
        RouteEntry {
            destination,
            gateway,
            index,
            metric: Some(metric),
            source: None,
            protocol,
            on_link: gateway.is_some_and(|gateway| !covered(gateway)),
        }
    };
    match (&port.method, lease) {
        (Method::Static { addresses, gateways }, _) => {
            wanted.addresses.clone_from(addresses);
            for gateway in gateways {
                let entry = route(any(*gateway), *gateway, addresses, PROTOCOL_STATIC);
                wanted.routes.push(entry);
            }
        }
        (Method::Dhcp, Some(lease)) => {
            let address = Cidr { address: lease.address.into(), prefix: lease.prefix_len };
            wanted.addresses.push(address);
            if let Some(router) = lease.routers.first() {
                let router = IpAddr::V4(*router);
                wanted.routes.push(route(any(router), router, &[address], PROTOCOL_DHCP));
            }
            for (network, bits, next_hop) in &lease.routes {
                let destination = (IpAddr::V4(*network), *bits);
                let entry = route(destination, (*next_hop).into(), &[address], PROTOCOL_DHCP);
                if !wanted.routes.contains(&entry) {
                    wanted.routes.push(entry);
                }
            }
            let smallest = if port.ipv6 == Ipv6::Off { 0 } else { IPV6_MTU_MIN };
            let mtu = lease.mtu.map(|mtu| u32::from(mtu).max(smallest));
            wanted.mtu = wanted.mtu.or(mtu);
        }
        (Method::Dhcp, None) | (Method::Off, _) => {}
    }
    wanted
}

/// What one interface knows of names, in the order of the interfaces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// Servers, the best first. Those of a link have its number as scope.
    pub servers: Vec<SocketAddr>,
    /// Domain to search.
    pub domain: Option<String>,
}

/// Port of name servers.
const DNS_PORT: u16 = 53;

/// Returns the address as that of a name server on the link with number `index`.
pub fn name_server(ip: IpAddr, index: u32) -> SocketAddr {
    match ip {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => {
            SocketAddrV6::new(ip, DNS_PORT, 0, index).into()
        }
        ip => SocketAddr::new(ip, DNS_PORT),
    }
}

/// Writes a name server as resolvers read it.
pub fn server_text(server: &SocketAddr) -> String {
    match server {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("{}%{}", v6.ip(), v6.scope_id()),
        _ => server.ip().to_string(),
    }
}

/// Returns the name servers of all interfaces, each once, at most [`DNS_MAX`]; those that only this
/// host can reach, not its pods, come last.
pub fn servers(all: &[Names]) -> Vec<SocketAddr> {
    let scoped = |server: &&SocketAddr| matches!(server, SocketAddr::V6(v6) if v6.scope_id() != 0);
    let listed = || all.iter().flat_map(|names| &names.servers);
    let mut found = Vec::new();
    for server in listed().filter(|server| !scoped(server)).chain(listed().filter(scoped)) {
        if !found.contains(server) && found.len() < DNS_MAX {
            found.push(*server);
        }
    }
    found
}

/// Writes `resolv.conf`.
pub fn resolv_conf(all: &[Names]) -> String {
    let mut text = String::from("# written by skerry-init, in the order of the interfaces\n");
    for server in servers(all) {
        let _ = writeln!(text, "nameserver {}", server_text(&server));
    }
    let mut domains: Vec<&str> = Vec::new();
    for domain in all.iter().filter_map(|names| names.domain.as_deref()) {
        if !domains.contains(&domain) && domains.len() < SEARCH_MAX {
            domains.push(domain);
        }
    }
    if !domains.is_empty() {
        let _ = writeln!(text, "search {}", domains.join(" "));
    }
    text
}

/// Writes `hosts`; the node's own name leads to `address`, or to the loopback while there is none.
pub fn hosts(hostname: &str, address: Option<IpAddr>) -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
    if !hostname.is_empty() && hostname != "(none)" && hostname != "localhost" {
        let address = address.unwrap_or_else(|| [127, 0, 1, 1].into());
        let _ = writeln!(text, "{address} {hostname}");
    }
    text
}

/// Reads the name servers of a router advertisement's options: address and seconds that it is good
/// for. Source: RFC 8106 section 5.1.
pub fn read_router_dns(mut options: &[u8]) -> Vec<(Ipv6Addr, u32)> {
    const RDNSS: u8 = 25;
    let mut found = Vec::new();
    while let [kind, units, ..] = options {
        let len = usize::from(*units) * 8;
        if len == 0 || len > options.len() {
            break;
        }
        let (option, rest) = options.split_at(len);
        if *kind == RDNSS
            && let Some(lifetime) = option.get(4..8).and_then(|bytes| bytes.first_chunk::<4>())
        {
            let lifetime = u32::from_be_bytes(*lifetime);
            let (addresses, _) = option[8..].as_chunks::<16>();
            found.extend(addresses.iter().map(|octets| (Ipv6Addr::from(*octets), lifetime)));
        }
        options = rest;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::site::Match;
    use std::time::Duration;

    fn rule(name: &str, vlan: Option<u16>, method: Method) -> Interface {
        Interface {
            matches: Match { name: Some(name.to_owned()), ..Match::default() },
            method,
            dns: Vec::new(),
            vlan,
            ipv6: Ipv6::Auto,
            mtu: None,
        }
    }

    fn device(name: &str, made: bool) -> Device {
        Device {
            name: name.to_owned(),
            mac: "52:54:00:12:34:56".to_owned(),
            wired: !made,
            made,
            ..Device::default()
        }
    }

    fn lease() -> Lease {
        Lease {
            address: Ipv4Addr::new(10, 0, 0, 9),
            prefix_len: 24,
            server: Ipv4Addr::new(10, 0, 0, 1),
            routers: vec![Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)],
            routes: Vec::new(),
            dns: Vec::new(),
            domain: None,
            mtu: Some(1000),
            ntp: Vec::new(),
            duration: None,
            renew_after: Duration::ZERO,
            rebind_after: Duration::ZERO,
        }
    }

    #[test]
    fn without_rules_wired_interfaces_use_dhcp_and_made_ones_are_left_alone() {
        let own = plan(&[], &device("eth0", false)).own.expect("it is wired");
        assert_eq!((own.method, own.by_rule), (Method::Dhcp, false));
        assert_eq!(plan(&[], &device("cni0", true)), DevicePlan::default());
        assert_eq!(plan(&[rule("*", None, Method::Dhcp)], &device("cni0", true)).own, None);
        assert!(plan(&[rule("br0", None, Method::Dhcp)], &device("br0", true)).own.is_some());
    }

    #[test]
    fn the_first_rule_wins_and_vlans_are_beside_it() {
        let rules = [
            rule("eth*", Some(12), Method::Dhcp),
            rule("eth0", None, Method::Off),
            rule("eth*", None, Method::Dhcp),
            rule("eth0", Some(12), Method::Off),
        ];
        let found = plan(&rules, &device("eth0", false));
        assert_eq!(found.own.map(|own| (own.order, own.method)), Some((1, Method::Off)));
        assert_eq!(found.vlans.len(), 1);
        assert_eq!(plan(&rules, &device("eth1", false)).own.map(|own| own.order), Some(2));
        // Only VLANs: the interface itself gets nothing.
        let found = plan(&rules[..1], &device("eth0", false));
        assert_eq!((found.own.is_none(), found.vlans.len()), (true, 1));
        let last = PortPlan { order: usize::MAX, ..found.vlans[0].1.clone() };
        let routes = desired(&last, 7, Some(&lease())).routes;
        assert_eq!(routes[0].metric, Some(100_107));
    }

    #[test]
    fn a_lease_becomes_address_route_and_size() {
        let port = plan(&[], &device("eth0", false)).own.expect("it is wired");
        let wanted = desired(&port, 2, Some(&lease()));
        assert_eq!(wanted.addresses[0].to_string(), "10.0.0.9/24");
        assert_eq!(wanted.routes.len(), 1);
        assert_eq!((wanted.routes[0].metric, wanted.routes[0].on_link), (Some(102), false));
        assert_eq!(wanted.mtu, Some(1280), "IPv6 needs that much");

        // Classless routes: the link itself, and a router outside the network.
        let mut lease = lease();
        lease.prefix_len = 32;
        lease.routers.clear();
        lease.routes = vec![
            (Ipv4Addr::new(10, 0, 0, 1), 32, Ipv4Addr::UNSPECIFIED),
            (Ipv4Addr::UNSPECIFIED, 0, Ipv4Addr::new(10, 0, 0, 1)),
        ];
        let wanted = desired(&port, 2, Some(&lease));
        assert_eq!((wanted.routes[0].gateway, wanted.routes[0].on_link), (None, false));
        assert!(wanted.routes[1].on_link);
        assert_eq!(desired(&port, 2, None), Desired::default());
    }

    #[test]
    fn name_servers_are_merged_in_order_each_once_and_three_at_most() {
        let names = |servers: &[u8], domain: &str| Names {
            servers: servers.iter().map(|n| name_server([10, 0, 0, *n].into(), 2)).collect(),
            domain: (!domain.is_empty()).then(|| domain.to_owned()),
        };
        let all = [names(&[1, 2], "a.example"), names(&[2, 3, 4], "a.example"), names(&[], "b")];
        let text = resolv_conf(&all);
        let lines: Vec<&str> = text.lines().skip(1).collect();
        assert_eq!(
            lines,
            [
                "nameserver 10.0.0.1",
                "nameserver 10.0.0.2",
                "nameserver 10.0.0.3",
                "search a.example b"
            ]
        );
        assert_eq!(resolv_conf(&[]).lines().count(), 1);
        let link_local = name_server("fe80::1".parse().expect("an address"), 2);
        let mixed = Names { servers: vec![link_local], domain: None };
        let text = resolv_conf(&[mixed, names(&[1], "")]);
        assert!(text.ends_with("\nnameserver 10.0.0.1\nnameserver fe80::1%2\n"), "{text}");
    }

    #[test]
    fn router_options_give_name_servers_and_broken_ones_end_the_reading() {
        let mut options = vec![31, 1, 0, 0, 0, 0, 0, 0, 25, 3, 0, 0, 0, 0, 2, 88];
        options.extend(Ipv6Addr::LOCALHOST.octets());
        assert_eq!(read_router_dns(&options), [(Ipv6Addr::LOCALHOST, 600)]);
        for cut in 0..options.len() {
            assert!(read_router_dns(&options[..cut]).is_empty());
        }
        assert!(read_router_dns(&[25, 0, 0, 0]).is_empty());
        assert!(read_router_dns(&[25, 1, 0, 0, 0, 0, 0, 1]).is_empty());
    }

    #[test]
    fn hosts_has_the_name_of_the_node() {
        assert!(hosts("box", Some([10, 0, 0, 9].into())).ends_with("\n10.0.0.9 box\n"));
        assert!(hosts("box", None).ends_with("\n127.0.1.1 box\n"));
        assert_eq!(hosts("(none)", None).lines().count(), 2);
    }
}
