//! The loop of the network service: the only part that touches the kernel.
//!
//! One port for each interface that is configured. Events (a notice of the kernel, a packet, a
//! timer) change the ports; then files are written if what they say has changed.

use super::clock::Clock;
use super::dhcp::{self, Event, Identity, Loss, Transmit};
use super::names::{self, Lookup};
use super::ntp::{self, Correction};
use super::packet::{self, Kind, PacketSocket};
use super::plan::{self, Desired, Device, Names, PortPlan};
use super::report::{self, Problem, Time, View};
use crate::cni::result::mac_text;
use crate::console::Word;
use crate::netlink::route::{
    self, Address, Link, Notice, PROTOCOL_DHCP, PROTOCOL_STATIC, Route, RouteEntry,
};
use crate::netlink::{self, Family, NetlinkError, Socket, sys};
use crate::site::{Cidr, Ipv6, Method, Network};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Interfaces that are configured; a box with more has virtual ones that are not meant.
pub const PORTS_MAX: usize = 64;
/// Name servers that are kept from one router.
const ROUTER_DNS_MAX: usize = 8;
/// Datagrams of one socket that are read before the others have their turn.
const READS_MAX: usize = 64;
/// Problems are looked at this often, beside when something happens.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Why the service ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServiceError {
    /// The kernel does not tell us what happens.
    #[error("network service cannot follow the kernel")]
    Netlink(#[from] NetlinkError),
    /// Waiting failed.
    #[error("network service cannot wait for events")]
    Poll(#[source] io::Error),
}

/// Where the service reads and writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// What PID 1 found.
    pub site: PathBuf,
    /// Folder of `resolv.conf` and `hosts`.
    pub run: PathBuf,
    /// What this service knows, for PID 1 and the agent.
    pub report: PathBuf,
    /// Folder for last addresses.
    pub state: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            site: "/run/skerry/site.toml".into(),
            run: "/run".into(),
            report: "/run/skerry/network.json".into(),
            state: "/state/network".into(),
        }
    }
}

/// Hears what the console shall say.
pub type Voice<'a> = Box<dyn Fn(Word, &str) + 'a>;

/// A configured interface.
struct Port {
    link: Link,
    plan: PortPlan,
    dhcp: Option<dhcp::Client>,
    packets: Option<PacketSocket>,
    arp: Option<PacketSocket>,
    /// Open while a lease is extended by a direct question; it hears that server alone. Through it
    /// the kernel finds the way, and does not refuse the answer as one to nobody.
    direct: Option<UdpSocket>,
    /// Name servers of routers, and until when they are good.
    router_dns: Vec<(Ipv6Addr, Option<Duration>)>,
    addresses: Vec<Address>,
    /// Since when it has no carrier.
    dark_since: Option<Duration>,
    /// Why its configuration could not be made.
    failure: Option<String>,
    told: Option<String>,
}

impl Port {
    fn names(&self) -> Names {
        let lease = self.dhcp.as_ref().and_then(dhcp::Client::lease);
        let mut servers = self.plan.dns.clone();
        if servers.is_empty() {
            servers.extend(lease.iter().flat_map(|lease| &lease.dns).map(|ip| IpAddr::V4(*ip)));
            servers.extend(self.router_dns.iter().map(|(ip, _)| IpAddr::V6(*ip)));
        }
        let index = self.link.index;
        let servers = servers.into_iter().map(|ip| plan::name_server(ip, index)).collect();
        Names { servers, domain: lease.and_then(|lease| lease.domain.clone()) }
    }

    fn global_addresses(&self) -> impl Iterator<Item = &Address> {
        self.addresses.iter().filter(|address| address.global && !address.tentative)
    }

    fn gateways(&self) -> Vec<IpAddr> {
        let lease = self.dhcp.as_ref().and_then(dhcp::Client::lease);
        let wanted = plan::desired(&self.plan, self.link.index, lease);
        let defaults = wanted.routes.iter().filter(|route| route.destination.1 == 0);
        defaults.filter_map(|route| route.gateway).collect()
    }

    fn view(&self, now: Duration) -> View {
        let mut addresses: Vec<String> = self
            .global_addresses()
            .map(|address| format!("{}/{}", address.ip, address.prefix_len))
            .collect();
        addresses.sort();
        View {
            name: self.link.name.clone(),
            mac: mac_text(&self.link.mac),
            carrier: self.link.carrier,
            dark_for: self.dark_since.map(|since| now.saturating_sub(since)),
            by_rule: self.plan.by_rule,
            method: self.plan.method.clone(),
            addresses,
            gateways: self.gateways(),
            dns: self.names().servers.iter().map(plan::server_text).collect(),
            waiting_for: self.dhcp.as_ref().and_then(|client| client.waiting_for(now)),
            failure: self.failure.clone(),
        }
    }
}

/// The service.
pub struct Service<'a> {
    config: Network,
    places: Places,
    say: Voice<'a>,
    clock: Box<dyn Clock>,
    notices: Socket,
    route: Route,
    ports: BTreeMap<u32, Port>,
    /// VLANs by name, made or to be made.
    vlans: BTreeMap<String, (u32, PortPlan)>,
    ntp: ntp::Client,
    lookup: Lookup,
    questions: Vec<(IpAddr, UdpSocket)>,
    started: Instant,
    online_since: Option<Duration>,
    written: BTreeMap<PathBuf, String>,
    problems: Vec<Problem>,
}

impl<'a> Service<'a> {
    /// Looks at all interfaces and configures them.
    pub fn start(
        config: Network,
        ntp_servers: Vec<String>,
        places: Places,
        clock: Box<dyn Clock>,
        say: Voice<'a>,
    ) -> Result<Self, ServiceError> {
        // Listening comes before looking, or what happens in between would be missed.
        let notices = Socket::listen(Family::Route, route::GROUPS)?;
        let mut this = Self {
            config,
            places,
            say,
            clock,
            notices,
            route: Route::open()?,
            ports: BTreeMap::new(),
            vlans: BTreeMap::new(),
            ntp: ntp::Client::default(),
            lookup: Lookup::new(&ntp_servers),
            questions: Vec::new(),
            started: Instant::now(),
            online_since: None,
            written: BTreeMap::new(),
            problems: Vec::new(),
        };
        for dir in
            [Some(this.places.run.as_path()), this.places.report.parent()].into_iter().flatten()
        {
            let _ = fs::create_dir_all(dir);
        }
        this.look_at_everything()?;
        this.settle();
        Ok(this)
    }

    /// Runs for ever.
    pub fn run(&mut self) -> Result<Infallible, ServiceError> {
        loop {
            self.turn(None)?;
        }
    }

    /// Waits for the next event (no longer than `limit`) and does what it asks for.
    pub fn turn(&mut self, limit: Option<Duration>) -> Result<(), ServiceError> {
        let now = self.now();
        let timers = [self.ntp.poll_timeout(), self.lookup.poll_timeout()];
        let of_ports = self.ports.values().flat_map(|port| {
            let dns = port.router_dns.iter().filter_map(|(_, until)| *until);
            port.dhcp.as_ref().and_then(dhcp::Client::poll_timeout).into_iter().chain(dns)
        });
        let next = timers.into_iter().flatten().chain(of_ports).min();
        let wait = next.map_or(LOOK_INTERVAL, |next| next.saturating_sub(now).min(LOOK_INTERVAL));
        let wait = limit.map_or(wait, |limit| wait.min(limit));

        let mut sources: Vec<BorrowedFd<'_>> = vec![self.notices.as_fd()];
        sources.extend(self.lookup.source());
        sources.extend(self.questions.iter().map(|(_, socket)| socket.as_fd()));
        for port in self.ports.values() {
            sources.extend(port.packets.iter().chain(&port.arp).map(AsFd::as_fd));
        }
        let ready = sys::poll(&sources, Some(wait)).map_err(ServiceError::Poll)?;
        // What is ready is few; all sockets never wait, so they are simply all read.
        if ready.contains(&true) {
            self.read_answers();
            self.read_packets();
            self.lookup.handle_readable(self.now(), random);
            self.read_notices()?;
        }
        self.settle();
        Ok(())
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Does what timers and earlier events have made due, and tells about it.
    fn settle(&mut self) {
        let now = self.now();
        let indices: Vec<u32> = self.ports.keys().copied().collect();
        for index in indices {
            self.drive_dhcp(index);
            if let Some(port) = self.ports.get_mut(&index) {
                port.router_dns.retain(|(_, until)| until.is_none_or(|until| until > now));
            }
        }
        self.drive_time();
        self.report();
    }

    // Interfaces.

    fn look_at_everything(&mut self) -> Result<(), ServiceError> {
        let mut links = self.route.links()?;
        let addresses = self.route.addresses()?;
        let gone: Vec<u32> = self
            .ports
            .keys()
            .copied()
            .filter(|index| links.iter().all(|link| link.index != *index))
            .collect();
        gone.into_iter().for_each(|index| self.remove_port(index));
        // Parents before the VLANs over them.
        links.sort_by_key(|link| (link.kind.is_some(), link.index));
        for link in links {
            let index = link.index;
            self.handle_link(link);
            if let Some(port) = self.ports.get_mut(&index) {
                port.addresses =
                    addresses.iter().filter(|one| one.index == index).cloned().collect();
            }
        }
        Ok(())
    }

    fn read_notices(&mut self) -> Result<(), ServiceError> {
        for _ in 0..READS_MAX {
            let found = match self.notices.next_notices() {
                Ok(None) => return Ok(()),
                Ok(Some(bytes)) => {
                    let read = netlink::messages(bytes);
                    read.filter_map(|message| route::read_notice(&message)).collect()
                }
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {
                    self.look_at_everything()?;
                    Vec::new()
                }
                Err(source) => {
                    return Err(NetlinkError::Socket { what: "receive notices", source }.into());
                }
            };
            for notice in found {
                self.handle_notice(notice);
            }
        }
        Ok(())
    }

    fn handle_notice(&mut self, notice: Notice) {
        match notice {
            Notice::Link(link) => self.handle_link(link),
            Notice::LinkGone(index) => self.remove_port(index),
            Notice::Address(address) => {
                let Some(port) = self.ports.get_mut(&address.index) else { return };
                port.addresses.retain(|known| known.ip != address.ip);
                port.addresses.push(address);
            }
            Notice::AddressGone(address) => {
                let index = address.index;
                let Some(port) = self.ports.get_mut(&index) else { return };
                port.addresses.retain(|known| known.ip != address.ip);
                // Somebody may have taken away what has to be there.
                self.configure(index);
            }
            Notice::RouterOptions(index, options) => {
                let now = self.now();
                let Some(port) = self.ports.get_mut(&index) else { return };
                if port.plan.ipv6 != Ipv6::Auto {
                    return;
                }
                for (ip, lifetime) in plan::read_router_dns(&options) {
                    port.router_dns.retain(|(known, _)| *known != ip);
                    if lifetime > 0 && port.router_dns.len() < ROUTER_DNS_MAX {
                        let until = (lifetime != u32::MAX)
                            .then(|| now + Duration::from_secs(lifetime.into()));
                        port.router_dns.push((ip, until));
                    }
                }
            }
        }
    }

    fn handle_link(&mut self, link: Link) {
        if let Some(port) = self.ports.get_mut(&link.index) {
            let had_carrier = port.link.carrier;
            let was_up = port.link.up;
            port.link = link;
            let (index, name) = (port.link.index, port.link.name.clone());
            if was_up && !port.link.up {
                // Somebody set it down; that is not his to decide.
                self.set_up(index);
            }
            let carrier = self.ports[&index].link.carrier;
            if carrier != had_carrier {
                let way = if carrier { "has a carrier" } else { "has lost its carrier" };
                self.tell(Word::Network, &format!("{name} {way}"));
                self.handle_carrier(index);
            }
            return;
        }
        if link.loopback {
            if !link.up {
                self.set_up(link.index);
            }
            return;
        }
        if let Some((_, plan)) = self.vlans.get(&link.name).cloned() {
            self.add_port(link, plan);
            return;
        }
        let found = plan::plan(&self.config.interfaces, &device(&link));
        let (index, name) = (link.index, link.name.clone());
        for (id, plan) in &found.vlans {
            let vlan = format!("{name}.{id}");
            if self.vlans.contains_key(&vlan) {
                continue;
            }
            self.vlans.insert(vlan.clone(), (index, plan.clone()));
            self.make_vlan(&vlan, index, *id);
        }
        match found.own {
            Some(PortPlan { method: Method::Off, .. }) if found.vlans.is_empty() => {
                if link.up && link.kind.is_none() {
                    self.tell(Word::Network, &format!("{name} is off"));
                    if let Err(error) = self.route.set_up(index, false) {
                        self.tell(Word::Network, &crate::console::chain(&error));
                    }
                }
            }
            Some(plan) => self.add_port(link, plan),
            // It carries VLANs and has nothing of its own.
            None if !found.vlans.is_empty() => {
                let nothing = PortPlan {
                    order: self.config.interfaces.len() + 1,
                    by_rule: true,
                    method: Method::Off,
                    dns: Vec::new(),
                    ipv6: Ipv6::Off,
                    mtu: None,
                };
                self.add_port(link, nothing);
            }
            None => {}
        }
    }

    fn make_vlan(&mut self, name: &str, parent: u32, id: u16) {
        if name.len() > route::NAME_MAX {
            self.tell(Word::Problem, &format!("`{name}` is too long for the name of a VLAN"));
            self.tell(Word::Hint, "match the interface under a shorter name");
            return;
        }
        match self.route.create_vlan(name, parent, id) {
            // It is there since before a restart.
            Err(error) if error.is_exists() => {}
            Err(error) => {
                self.tell(Word::Problem, &crate::console::chain(&error));
                self.tell(Word::Hint, "the kernel needs its module `8021q` for VLANs");
            }
            Ok(()) => self.tell(Word::Network, &format!("{name} made")),
        }
    }

    fn add_port(&mut self, link: Link, plan: PortPlan) {
        if self.ports.len() >= PORTS_MAX {
            return;
        }
        let (index, name, now) = (link.index, link.name.clone(), self.now());
        let mac: Option<[u8; 6]> = link.mac.as_slice().try_into().ok();
        let dhcp = mac.filter(|_| plan.method == Method::Dhcp).map(|mac| {
            let identity = Identity {
                mac,
                hostname: hostname(),
                remembered: read_remembered(&self.places.state, &link.mac),
            };
            dhcp::Client::new(identity, random())
        });
        let is_up = link.up;
        let port = Port {
            link,
            plan,
            dhcp,
            packets: None,
            arp: None,
            direct: None,
            router_dns: Vec::new(),
            addresses: Vec::new(),
            dark_since: Some(now),
            failure: None,
            told: None,
        };
        prepare_ipv6(&name, port.plan.ipv6);
        self.ports.insert(index, port);
        if !is_up {
            self.set_up(index);
        }
        self.handle_carrier(index);
    }

    fn remove_port(&mut self, index: u32) {
        let over: Vec<String> = self
            .vlans
            .iter()
            .filter(|(_, (parent, _))| *parent == index)
            .map(|(name, _)| name.clone())
            .collect();
        over.into_iter().for_each(|name| drop(self.vlans.remove(&name)));
        if let Some(port) = self.ports.remove(&index) {
            self.tell(Word::Network, &format!("{} is gone", port.link.name));
        }
    }

    fn set_up(&mut self, index: u32) {
        if let Err(error) = self.route.set_up(index, true) {
            self.fail(index, &error);
        }
    }

    /// The carrier has come or gone.
    fn handle_carrier(&mut self, index: u32) {
        let now = self.now();
        let Some(port) = self.ports.get_mut(&index) else { return };
        if !port.link.carrier {
            port.dark_since.get_or_insert(now);
            if let Some(client) = &mut port.dhcp {
                client.handle_link_down();
            }
            return;
        }
        port.dark_since = None;
        if let Some(client) = &mut port.dhcp {
            client.handle_link_up(now);
            if port.packets.is_none() {
                match PacketSocket::open(Kind::Dhcp, index) {
                    Ok(socket) => port.packets = Some(socket),
                    Err(error) => port.failure = Some(format!("no packet socket: {error}")),
                }
            }
        }
        self.configure(index);
        self.ntp.hurry(now);
    }

    /// Makes addresses and routes of a port what they shall be. While DHCP has not said anything,
    /// what is there from before a restart stays.
    fn configure(&mut self, index: u32) {
        let Some(port) = self.ports.get(&index) else { return };
        let lease = port.dhcp.as_ref().and_then(dhcp::Client::lease);
        if port.plan.method == Method::Dhcp && lease.is_none() {
            return;
        }
        self.apply(index);
    }

    fn apply(&mut self, index: u32) {
        let Some(port) = self.ports.get(&index) else { return };
        let lease = port.dhcp.as_ref().and_then(dhcp::Client::lease);
        let wanted = plan::desired(&port.plan, index, lease);
        let (mtu, carrier) = (port.link.mtu, port.link.carrier);
        match reconcile(&mut self.route, index, &wanted, mtu, carrier) {
            Ok(()) => {
                if let Some(port) = self.ports.get_mut(&index) {
                    port.failure = None;
                }
            }
            Err(error) => self.fail(index, &error),
        }
    }

    fn fail(&mut self, index: u32, error: &NetlinkError) {
        if let Some(port) = self.ports.get_mut(&index) {
            port.failure = Some(crate::console::chain(error));
        }
    }

    // DHCP.

    fn read_packets(&mut self) {
        let now = self.now();
        for port in self.ports.values_mut() {
            let Some(client) = &mut port.dhcp else { continue };
            for _ in 0..READS_MAX {
                let Some(Ok(Some(bytes))) = port.packets.as_ref().map(PacketSocket::receive) else {
                    break;
                };
                if let Some(message) = packet::read_dhcp(&bytes) {
                    client.handle_message(now, message);
                }
            }
            for _ in 0..READS_MAX {
                let Some(Ok(Some(bytes))) = port.arp.as_ref().map(PacketSocket::receive) else {
                    break;
                };
                if let Some((mac, ip)) = packet::read_arp(&bytes)
                    && mac.as_slice() != port.link.mac
                {
                    client.handle_conflict(now, ip);
                }
            }
        }
    }

    fn drive_dhcp(&mut self, index: u32) {
        let now = self.now();
        let Some(port) = self.ports.get_mut(&index) else { return };
        let Some(client) = &mut port.dhcp else { return };
        let mac: [u8; 6] = port.link.mac.as_slice().try_into().unwrap_or_default();
        while let Some(transmit) = client.poll_transmit(now) {
            let sent = match &transmit {
                Transmit::Broadcast(message) => {
                    let ours = message.get(12..16).and_then(|bytes| bytes.first_chunk::<4>());
                    let from = ours.map_or(Ipv4Addr::UNSPECIFIED, |ip| Ipv4Addr::from(*ip));
                    let bytes = packet::write_dhcp(from, Ipv4Addr::BROADCAST, message);
                    port.packets.as_ref().map(|socket| socket.send(&bytes))
                }
                Transmit::Unicast { from, to, message } => {
                    match names::open_from(*from, packet::CLIENT_PORT, *to, packet::SERVER_PORT) {
                        Ok(socket) => {
                            let sent = socket.send(message).map(|_| ());
                            port.direct = Some(socket);
                            Some(sent)
                        }
                        Err(error) => Some(Err(error)),
                    }
                }
                Transmit::Probe(ip) => {
                    if port.arp.is_none() {
                        port.arp = PacketSocket::open(Kind::Arp, index).ok();
                    }
                    let bytes = packet::write_arp(mac, Ipv4Addr::UNSPECIFIED, *ip);
                    port.arp.as_ref().map(|socket| socket.send(&bytes))
                }
                Transmit::Announce(ip) => {
                    let bytes = packet::write_arp(mac, *ip, *ip);
                    port.arp.take().map(|socket| socket.send(&bytes))
                }
            };
            // A link that is just gone; the client asks again.
            let _ = sent;
        }
        if !client.is_renewing() {
            port.direct = None;
        }
        let mut events = Vec::new();
        while let Some(event) = client.poll_event() {
            events.push(event);
        }
        for event in events {
            self.handle_lease(index, event);
        }
    }

    fn handle_lease(&mut self, index: u32, event: Event) {
        let Some(port) = self.ports.get(&index) else { return };
        let name = port.link.name.clone();
        match event {
            Event::Bound(lease) => {
                let has = |address: &Address| address.ip == IpAddr::V4(lease.address);
                let is_new = !port.addresses.iter().any(has);
                write_remembered(&self.places.state, &port.link.mac, lease.address);
                self.apply(index);
                if is_new {
                    let router = lease.routers.first().copied();
                    let via = router.map(|ip| format!(", gateway {ip}")).unwrap_or_default();
                    let (ip, len, server) = (lease.address, lease.prefix_len, lease.server);
                    let text = format!("{name} has {ip}/{len}{via} by DHCP from {server}");
                    self.tell(Word::Network, &text);
                }
            }
            Event::Lost(loss) => {
                let why = match loss {
                    Loss::Expired => "its lease has run out",
                    Loss::Refused => "the server has refused it",
                    Loss::Conflict => "somebody else has it",
                };
                self.tell(Word::Network, &format!("{name} has lost its address: {why}"));
                self.apply(index);
            }
        }
    }

    // Time.

    fn drive_time(&mut self) {
        let now = self.now();
        let names: Vec<Names> = self.ordered().iter().map(|port| port.names()).collect();
        self.lookup.set_servers(now, &plan::servers(&names));
        self.lookup.advance(now, random);
        let servers = if self.lookup.is_empty() {
            self.found_time_servers()
        } else {
            self.lookup.addresses()
        };
        self.ntp.set_servers(now, &servers);
        while let Some((server, question)) = self.ntp.poll_transmit(now, random) {
            let opened = names::open(SocketAddr::new(server, 123));
            match opened.and_then(|socket| socket.send(&question).map(|_| socket)) {
                Ok(socket) => self.questions.push((server, socket)),
                Err(_) => self.ntp.handle_unreachable(server),
            }
        }
        let Some(end) = self.ntp.poll_timeout() else {
            self.questions.clear();
            return;
        };
        let was_synced = self.ntp.is_synced();
        let correction = self.ntp.poll_correction(now);
        if self.ntp.poll_timeout() != Some(end) {
            self.questions.clear(); // the round is over
        }
        let Some(correction) = correction else { return };
        let (seconds, result) = match correction {
            Correction::Step(seconds) => (seconds, self.clock.step(seconds)),
            Correction::Slew(seconds) => (seconds, self.clock.slew(seconds)),
        };
        if let Err(error) = result {
            self.tell(Word::Problem, &format!("the clock cannot be set: {error}"));
            return;
        }
        if !was_synced || matches!(correction, Correction::Step(_)) {
            let server = self.ntp.last().map(|sample| sample.server.to_string());
            let server = server.unwrap_or_default();
            self.tell(Word::Network, &format!("clock set by {seconds:+.3} s from {server}"));
        }
    }

    fn read_answers(&mut self) {
        // The time is taken first: what is done with the answers must not count as their way.
        let (now, wall) = (self.now(), self.clock.now());
        for (server, socket) in &self.questions {
            let mut buffer = [0; ntp::MESSAGE_LEN];
            match socket.recv(&mut buffer) {
                Ok(len) => {
                    let _ = self.ntp.handle_answer(now, wall, *server, &buffer[..len]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.ntp.handle_unreachable(*server),
            }
        }
    }

    /// Time servers that the site did not name: those of DHCP, else the gateways.
    fn found_time_servers(&self) -> Vec<IpAddr> {
        let ports = self.ordered();
        let leases = ports.iter().filter_map(|port| port.dhcp.as_ref()?.lease());
        let mut found: Vec<IpAddr> =
            leases.flat_map(|lease| &lease.ntp).map(|ip| IpAddr::V4(*ip)).collect();
        if found.is_empty() {
            found = ports.iter().flat_map(|port| port.gateways()).collect();
        }
        found.dedup();
        found
    }

    // Telling.

    fn ordered(&self) -> Vec<&Port> {
        let mut ports: Vec<&Port> = self.ports.values().collect();
        ports.sort_by_key(|port| (port.plan.order, port.link.index));
        ports
    }

    fn tell(&self, word: Word, text: &str) {
        (self.say)(word, text);
    }

    fn time(&self) -> Time {
        let last = self.ntp.last().map(|sample| (sample.server, sample.offset));
        Time { synced: self.ntp.is_synced(), last }
    }

    /// Looks what has changed since the last turn, says it, and writes the files.
    fn report(&mut self) {
        let now = self.now();
        let views: Vec<View> = self.ordered().iter().map(|port| port.view(now)).collect();
        match views.iter().any(View::is_online) {
            true => drop(self.online_since.get_or_insert(now)),
            false => self.online_since = None,
        }
        let online_for = self.online_since.map(|since| now.saturating_sub(since));
        let found = report::problems(&views, now, online_for, self.time());
        for problem in found.iter().filter(|problem| !self.problems.contains(problem)) {
            self.tell(Word::Problem, &problem.what);
            self.tell(Word::Hint, &problem.hint);
        }
        for problem in self.problems.iter().filter(|problem| !found.contains(problem)) {
            self.tell(Word::Network, &format!("solved: {}", problem.what));
        }
        self.problems = found;
        for port in self.ports.values_mut() {
            let Some(view) = views.iter().find(|view| view.name == port.link.name) else {
                continue;
            };
            let text = view.addresses.join(", ");
            if port.told.as_ref() == Some(&text) {
                continue;
            }
            // What DHCP alone gave was said with its server.
            let said = port.plan.method == Method::Dhcp && view.addresses.len() < 2;
            if !text.is_empty() && !said {
                (self.say)(Word::Network, &format!("{} has {text}", port.link.name));
            }
            port.told = Some(text);
        }
        self.write_files(&views);
    }

    fn write_files(&mut self, views: &[View]) {
        let names: Vec<Names> = self.ordered().iter().map(|port| port.names()).collect();
        let first = self.ordered().into_iter().find_map(|port| port.global_addresses().next());
        let hosts = plan::hosts(&hostname().unwrap_or_default(), first.map(|one| one.ip));
        let online = self.online_since.is_some();
        let proxy = self.config.proxy.as_deref();
        let report = report::to_json(views, online, self.time(), proxy, &self.problems);
        let files = [
            (self.places.run.join("resolv.conf"), plan::resolv_conf(&names)),
            (self.places.run.join("hosts"), hosts),
            (self.places.report.clone(), format!("{report}\n")),
        ];
        for (path, text) in files {
            if self.written.get(&path) == Some(&text) {
                continue;
            }
            match replace(&path, &text) {
                Ok(()) => drop(self.written.insert(path, text)),
                Err(error) => {
                    let text = format!("`{}` cannot be written: {error}", path.display());
                    if !self.written.contains_key(&path) {
                        self.tell(Word::Problem, &text);
                        self.written.insert(path, String::new());
                    }
                }
            }
        }
    }
}

/// Brings an interface to what is wanted. Addresses go first: those of a network that is left take
/// its routes with them.
fn reconcile(
    route: &mut Route,
    index: u32,
    wanted: &Desired,
    mtu: u32,
    carrier: bool,
) -> Result<(), NetlinkError> {
    if let Some(size) = wanted.mtu.filter(|size| *size != mtu) {
        route.set_mtu(index, size)?;
    }
    let present = route.addresses()?;
    let present: Vec<&Address> = present.iter().filter(|one| one.index == index).collect();
    let is_wanted = |one: &Address| {
        wanted.addresses.contains(&Cidr { address: one.ip, prefix: one.prefix_len })
    };
    for old in present.iter().filter(|one| one.ip.is_ipv4() && !is_wanted(one)) {
        match route.delete_address(index, old.ip, old.prefix_len) {
            Err(error) if !error.is_absent() => return Err(error),
            _ => {}
        }
    }
    for new in &wanted.addresses {
        let is_there =
            present.iter().any(|one| one.ip == new.address && one.prefix_len == new.prefix);
        if !is_there {
            match route.add_address(index, new.address, new.prefix, false) {
                Err(error) if !error.is_exists() => return Err(error),
                _ => {}
            }
        }
    }
    if !carrier {
        return Ok(()); // routes cannot be made yet; they are when the carrier comes
    }
    let mut routes = route.routes()?;
    routes.retain(|one| {
        one.index == index && matches!(one.protocol, PROTOCOL_DHCP | PROTOCOL_STATIC)
    });
    let same = |one: &RouteEntry, other: &RouteEntry| {
        (one.destination, one.gateway, one.metric)
            == (other.destination, other.gateway, other.metric)
    };
    for old in routes.iter().filter(|old| !wanted.routes.iter().any(|new| same(old, new))) {
        match route.delete_route(old) {
            Err(error) if !error.is_absent() => return Err(error),
            _ => {}
        }
    }
    for new in wanted.routes.iter().filter(|new| !routes.iter().any(|old| same(old, new))) {
        route.replace_route(new)?;
    }
    Ok(())
}

fn device(link: &Link) -> Device {
    let sys = Path::new("/sys/class/net").join(&link.name);
    let driver = fs::read_link(sys.join("device/driver")).ok();
    let driver = driver.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    let is_radio = sys.join("wireless").exists() || sys.join("phy80211").exists();
    Device {
        name: link.name.clone(),
        mac: mac_text(&link.mac),
        driver: driver.unwrap_or_default(),
        wired: link.ethernet && link.kind.is_none() && !is_radio && link.master.is_none(),
        made: link.kind.is_some(),
    }
}

/// Tells the kernel how an interface uses IPv6. Routers advertise to hosts; a box that forwards for
/// its pods is asked to listen all the same (2).
fn prepare_ipv6(name: &str, ipv6: Ipv6) {
    let dir = Path::new("/proc/sys/net/ipv6/conf").join(name);
    let settings: &[(&str, &str)] = match ipv6 {
        Ipv6::Auto => &[("accept_ra", "2"), ("autoconf", "1"), ("disable_ipv6", "0")],
        Ipv6::Static => &[("accept_ra", "0"), ("autoconf", "0"), ("disable_ipv6", "0")],
        Ipv6::Off => &[("disable_ipv6", "1")],
    };
    for (setting, value) in settings {
        // A kernel without IPv6 has no such file.
        let _ = fs::write(dir.join(setting), value);
    }
}

fn hostname() -> Option<String> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    let name = name.trim();
    (!name.is_empty() && name != "(none)" && name != "localhost").then(|| name.to_owned())
}

fn remembered_path(state: &Path, mac: &[u8]) -> PathBuf {
    state.join(format!("{}.json", mac_text(mac).replace(':', "-")))
}

fn read_remembered(state: &Path, mac: &[u8]) -> Option<Ipv4Addr> {
    let mut text = String::new();
    let file = fs::File::open(remembered_path(state, mac)).ok()?;
    file.take(4096).read_to_string(&mut text).ok()?;
    let value: Value = serde_json::from_str(&text).ok()?;
    value["address"].as_str()?.parse().ok()
}

/// Without this file the box only asks for any address after a restart, so that an error is no
/// problem of anybody's.
fn write_remembered(state: &Path, mac: &[u8], address: Ipv4Addr) {
    if read_remembered(state, mac) == Some(address) {
        return;
    }
    let _ = fs::create_dir_all(state);
    let _ = replace(&remembered_path(state, mac), &format!("{}\n", json!({"address": address})));
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o644).open(&new)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&new, path)
}

/// A number that others cannot guess.
fn random() -> u64 {
    let mut bytes = [0; 8];
    sys::fill_random(&mut bytes);
    u64::from_ne_bytes(bytes)
}
