//! The plugin `bridge`: a pair of interfaces between a container and a bridge of this host.
//!
//! Keys: `bridge` (`cni0`), `isGateway`, `isDefaultGateway`, `forceAddress`, `ipMasq`,
//! `hairpinMode`, `mtu`, `dns`, capability `mac`, and `ipam`. `host-local` runs in this process;
//! another `ipam.type` is started from `CNI_PATH`. Without `ipam` there is only the link.
//!
//! The bridge gets a hardware address of its own when it is made: otherwise it follows the lowest
//! of its ports, and containers lose their gateway for a moment whenever one ends.

use super::result::{CniResult, Interface, Route as ResultRoute, mac_text, network_of, previous};
use super::{
    CniError, Request, firewall, host_local, namespace_if_there, open_namespace, set_sysctl, within,
};
use crate::netlink::route::{Link, PROTOCOL_STATIC, Route, RouteEntry, VethPair};
use crate::netlink::sys;
use crate::site::Cidr;
use serde::Deserialize;
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Names that are tried for the host's end, each random.
const NAME_TRIES: u32 = 8;
/// Protocol number of the routes that a person would have made with `ip route`.
const PROTOCOL_BOOT: u8 = 3;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    cni_version: String,
    bridge: String,
    is_gateway: bool,
    is_default_gateway: bool,
    force_address: bool,
    ip_masq: bool,
    hairpin_mode: bool,
    mtu: u32,
    mac: Option<String>,
    dns: Option<Value>,
    ipam: Option<Value>,
    // What is not done, so that it is refused instead of ignored.
    promisc_mode: bool,
    vlan: u32,
    vlan_trunk: Option<Value>,
    macspoofchk: bool,
    port_isolation: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cni_version: String::new(),
            bridge: "cni0".to_owned(),
            is_gateway: false,
            is_default_gateway: false,
            force_address: false,
            ip_masq: false,
            hairpin_mode: false,
            mtu: 0,
            mac: None,
            dns: None,
            ipam: None,
            promisc_mode: false,
            vlan: 0,
            vlan_trunk: None,
            macspoofchk: false,
            port_isolation: false,
        }
    }
}

impl Config {
    fn read(config: &Value) -> Result<Self, CniError> {
        let mut this = Self::deserialize(config).map_err(CniError::Decode)?;
        this.is_gateway |= this.is_default_gateway;
        let trunk = this.vlan_trunk.as_ref().is_some_and(|value| !value.is_null());
        for (is_set, name) in [
            (this.promisc_mode, "promiscMode"),
            (this.vlan != 0, "vlan"),
            (trunk, "vlanTrunk"),
            (this.macspoofchk, "macspoofchk"),
            (this.port_isolation, "portIsolation"),
        ] {
            if is_set {
                return Err(CniError::Unsupported(name.to_owned()));
            }
        }
        if this.bridge.is_empty() || this.bridge.len() > crate::netlink::route::NAME_MAX {
            return Err(CniError::Config(format!("`bridge` `{}` is no name", this.bridge)));
        }
        if this.ipam.as_ref().is_none_or(|ipam| !ipam.is_object()) {
            return Err(CniError::Config("`ipam` is missing".to_owned()));
        }
        Ok(this)
    }

    /// Name of the plugin for addresses; empty when there shall be none.
    fn ipam_type(&self) -> &str {
        self.ipam.as_ref().and_then(|ipam| ipam["type"].as_str()).unwrap_or_default()
    }

    /// Hardware address that the container shall have.
    fn container_mac(&self, request: &Request, raw: &Value) -> Result<Option<[u8; 6]>, CniError> {
        let argument = request.args.split(';').find_map(|pair| pair.strip_prefix("MAC="));
        let places = ["/runtimeConfig/mac", "/args/cni/mac"];
        let listed = places.iter().find_map(|place| raw.pointer(place)?.as_str());
        let text = listed.or(argument).or(self.mac.as_deref()).filter(|text| !text.is_empty());
        let parse = |text: &str| {
            let mut mac = [0; 6];
            let mut parts = text.split(':');
            for byte in &mut mac {
                *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
            }
            parts.next().is_none().then_some(mac)
        };
        match text {
            None => Ok(None),
            Some(text) => parse(text)
                .map(Some)
                .ok_or_else(|| CniError::Config(format!("`{text}` is no hardware address"))),
        }
    }
}

/// Makes the link, gives addresses and routes, masquerades.
pub(crate) fn add(request: &Request, raw: Value) -> Result<Value, CniError> {
    let config = Config::read(&raw)?;
    let mac = config.container_mac(request, &raw)?;
    let namespace = open_namespace(&request.netns)?;
    let mut inside = within(&namespace, || Ok(Route::open()?))?;
    if inside.link(&request.ifname)?.is_some() {
        let text = format!("container has an interface `{}` already", request.ifname);
        return Err(CniError::Conflict(text));
    }
    let mut route = Route::open()?;
    let bridge = ensure_bridge(&mut route, &config)?;
    let mut result = assign(request, &config, &raw)?;
    let sockets = (&mut route, &mut inside);
    let made = connect(request, &config, mac, &namespace, sockets, &bridge, &mut result);
    if let Err(error) = made {
        // What was made is taken back, or the next try would find it in the way. The error that is
        // told is the first one.
        let _ = remove_link(request, &namespace);
        let _ = release(request, &config, &raw);
        if config.ip_masq {
            let _ = firewall::delete_masquerade(&request.owner(), &addresses_of(&result));
        }
        return Err(error);
    }
    Ok(result.to_json(&config.cni_version))
}

fn connect(
    request: &Request,
    config: &Config,
    mac: Option<[u8; 6]>,
    namespace: &File,
    (route, inside): (&mut Route, &mut Route),
    bridge: &Link,
    result: &mut CniResult,
) -> Result<(), CniError> {
    let has_ipv6 = result.ips.iter().any(|ip| ip.address.address.is_ipv6());
    let host = create_pair(request, config, mac, namespace, route, bridge)?;
    let gone = || CniError::Changed("the interface is gone again".to_owned());
    let container = inside.link(&request.ifname)?.ok_or_else(gone)?;

    if config.is_gateway {
        for ip in &mut result.ips {
            let network = network_of(ip.address);
            let gateway = *ip.gateway.get_or_insert_with(|| first_host(network));
            ensure_gateway(route, config, bridge, Cidr { address: gateway, ..ip.address })?;
        }
        for (family, setting) in
            [(false, "net/ipv4/ip_forward"), (true, "net/ipv6/conf/all/forwarding")]
        {
            if result.ips.iter().any(|ip| ip.address.address.is_ipv6() == family) {
                set_sysctl(setting, "1")?;
            }
        }
    }
    if config.is_default_gateway {
        for ip in &result.ips {
            let text = if ip.address.address.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
            let default = Cidr::parse(text).expect("both are networks");
            if !result.routes.iter().any(|route| route.destination == default) {
                result.routes.push(ResultRoute { destination: default, gateway: ip.gateway });
            }
        }
    }
    if !result.ips.is_empty() {
        within(namespace, || {
            // The kernel then tells the others on the bridge who has the address now, as soon as
            // the interface is up; they may remember an earlier container.
            let name = &request.ifname;
            set_sysctl(&format!("net/ipv4/conf/{name}/arp_notify"), "1")?;
            if has_ipv6 {
                set_sysctl(&format!("net/ipv6/conf/{name}/accept_dad"), "0")?;
                set_sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "0")?;
            }
            Ok(())
        })?;
    }
    for ip in &mut result.ips {
        ip.interface = Some(2);
        inside.add_address(container.index, ip.address.address, ip.address.prefix, true)?;
        route.forget_neighbour(bridge.index, ip.address.address)?;
    }
    inside.set_up(container.index, true)?;
    for entry in &result.routes {
        add_route(inside, container.index, entry, result)?;
    }
    if config.ip_masq {
        let addresses: Vec<Cidr> = result.ips.iter().map(|ip| ip.address).collect();
        firewall::add_masquerade(&request.owner(), &addresses)?;
    }
    if let Some(dns) = config.dns.as_ref().filter(|dns| has_dns(dns)) {
        result.dns = Some(dns.clone());
    }
    let interface = |link: &Link, sandbox: &str| Interface {
        name: link.name.clone(),
        mac: mac_text(&link.mac),
        sandbox: sandbox.to_owned(),
    };
    result.interfaces =
        vec![interface(bridge, ""), interface(&host, ""), interface(&container, &request.netns)];
    Ok(())
}

/// Removes the link and gives everything back; nothing there is fine.
pub(crate) fn delete(request: &Request, raw: Value) -> Result<(), CniError> {
    let config = Config::read(&raw)?;
    // Every step is tried even if one fails, and the first error is told.
    let removed = match namespace_if_there(&request.netns) {
        Some(namespace) => remove_link(request, &namespace),
        // The namespace is gone, and its end of the pair with it.
        None => Ok(Vec::new()),
    };
    let mut addresses = removed.as_ref().cloned().unwrap_or_default();
    if let Ok(Some(previous)) = previous(&raw) {
        addresses.extend(addresses_of(&previous));
    }
    let masquerade = if config.ip_masq {
        firewall::delete_masquerade(&request.owner(), &addresses)
    } else {
        Ok(())
    };
    let released = release(request, &config, &raw);
    removed?;
    masquerade?;
    released
}

/// Looks whether everything is as [`add`] left it.
pub(crate) fn check(request: &Request, raw: Value) -> Result<(), CniError> {
    let config = Config::read(&raw)?;
    let changed = |text: String| Err(CniError::Changed(text));
    let Some(expected) = previous(&raw)? else {
        return Err(CniError::Config("`prevResult` is missing".to_owned()));
    };
    if config.ipam_type() == "host-local" {
        host_local::check(request, &raw)?;
    } else if !config.ipam_type().is_empty() {
        delegate(request, &config, &raw, "CHECK")?;
    }
    let mut route = Route::open()?;
    let Some(bridge) = route.link(&config.bridge)? else {
        return changed(format!("bridge `{}` is gone", config.bridge));
    };
    let ports = route.links()?;
    let is_port = |interface: &Interface| {
        ports.iter().any(|link| link.name == interface.name && link.master == Some(bridge.index))
    };
    let on_host =
        expected.interfaces.iter().filter(|one| one.sandbox.is_empty() && one.name != bridge.name);
    for interface in on_host {
        if !is_port(interface) {
            return changed(format!("`{}` is no port of the bridge", interface.name));
        }
    }
    let namespace = open_namespace(&request.netns)?;
    let mut inside = within(&namespace, || Ok(Route::open()?))?;
    let Some(link) = inside.link(&request.ifname)?.filter(|link| link.up) else {
        return changed(format!("container has no interface `{}` that is up", request.ifname));
    };
    let addresses = inside.addresses()?;
    let own = expected.ips.iter().filter(|ip| {
        let interface = ip.interface.and_then(|at| expected.interfaces.get(at));
        interface.is_none_or(|one| one.name == request.ifname)
    });
    for ip in own {
        let has =
            addresses.iter().any(|one| one.index == link.index && one.ip == ip.address.address);
        if !has {
            return changed(format!("container lost its address {}", ip.address));
        }
    }
    let routes = inside.routes()?;
    for entry in &expected.routes {
        let wanted = (entry.destination.address, entry.destination.prefix);
        if !routes.iter().any(|route| route.destination == wanted) {
            return changed(format!("container lost its route to {}", entry.destination));
        }
    }
    if config.ip_masq && !firewall::has_masquerade(&addresses_of(&expected))? {
        return changed("container is not masqueraded any more".to_owned());
    }
    Ok(())
}

fn ensure_bridge(route: &mut Route, config: &Config) -> Result<Link, CniError> {
    let name = &config.bridge;
    let mut link = route.link(name)?;
    if link.is_none() {
        let mut mac = [0; 6];
        sys::fill_random(&mut mac);
        mac[0] = mac[0] & 0xfe | 0x02; // not a group, locally made
        let mtu = (config.mtu > 0).then_some(config.mtu);
        match route.create_bridge(name, Some(mac), mtu) {
            // Another pod was faster.
            Err(error) if !error.is_exists() => return Err(error.into()),
            Err(_) => {}
            Ok(()) => {
                // Its address is its own: waiting for somebody who has it too would keep IPv6 from
                // the first pods for two seconds. And pods are no routers for this host.
                for setting in ["accept_dad", "accept_ra"] {
                    let _ = set_sysctl(&format!("net/ipv6/conf/{name}/{setting}"), "0");
                }
            }
        }
        link = route.link(name)?;
    }
    let link = link.ok_or_else(|| CniError::Changed(format!("bridge `{name}` is gone again")))?;
    if link.kind.as_deref() != Some("bridge") {
        return Err(CniError::Conflict(format!("interface `{name}` exists and is no bridge")));
    }
    if !link.up {
        route.set_up(link.index, true)?;
    }
    Ok(link)
}

fn create_pair(
    request: &Request,
    config: &Config,
    mac: Option<[u8; 6]>,
    namespace: &File,
    route: &mut Route,
    bridge: &Link,
) -> Result<Link, CniError> {
    let mut tries = 0;
    let name = loop {
        let mut bytes = [0_u8; 4];
        sys::fill_random(&mut bytes);
        let name: String = std::iter::once("veth".to_owned())
            .chain(bytes.iter().map(|b| format!("{b:02x}")))
            .collect();
        let pair = VethPair {
            host_name: &name,
            peer_name: &request.ifname,
            peer_namespace: namespace.as_fd(),
            peer_mac: mac,
            mtu: (config.mtu > 0).then_some(config.mtu),
            master: Some(bridge.index),
        };
        match route.create_veth(&pair) {
            Ok(()) => break name,
            Err(error) if error.is_exists() && tries < NAME_TRIES => tries += 1,
            Err(error) => return Err(error.into()),
        }
    };
    let gone = || CniError::Changed(format!("interface `{name}` is gone again"));
    let link = route.link(&name)?.ok_or_else(gone)?;
    if config.hairpin_mode {
        route.set_hairpin(link.index)?;
    }
    Ok(link)
}

fn ensure_gateway(
    route: &mut Route,
    config: &Config,
    bridge: &Link,
    gateway: Cidr,
) -> Result<(), CniError> {
    match route.add_address(bridge.index, gateway.address, gateway.prefix, true) {
        Ok(()) => {}
        Err(error) if error.is_exists() => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    // Only looked at when the address is new, which is once in the life of the bridge.
    let others = route.addresses()?.into_iter().filter(|other| {
        let network = Cidr { address: other.ip, prefix: other.prefix_len };
        other.index == bridge.index
            && other.ip != gateway.address
            && (gateway.contains(other.ip) || network.contains(gateway.address))
            && other.global
    });
    for other in others {
        if config.force_address {
            route.delete_address(bridge.index, other.ip, other.prefix_len)?;
        } else {
            let _ = route.delete_address(bridge.index, gateway.address, gateway.prefix);
            let text = format!(
                "bridge `{}` has address {}/{}, which is not {gateway}",
                bridge.name, other.ip, other.prefix_len
            );
            return Err(CniError::Conflict(text));
        }
    }
    Ok(())
}

fn add_route(
    inside: &mut Route,
    index: u32,
    entry: &ResultRoute,
    result: &CniResult,
) -> Result<(), CniError> {
    let family = entry.destination.address.is_ipv4();
    let of_family =
        result.ips.iter().find(|ip| ip.address.address.is_ipv4() == family && ip.gateway.is_some());
    let gateway = entry.gateway.or(of_family.and_then(|ip| ip.gateway));
    let destination = network_of(entry.destination);
    let made = inside.add_route(&RouteEntry {
        destination: (destination.address, destination.prefix),
        gateway,
        index,
        metric: None,
        source: None,
        protocol: if entry.gateway.is_some() { PROTOCOL_STATIC } else { PROTOCOL_BOOT },
        on_link: false,
    });
    match made {
        Err(error) if !error.is_exists() => Err(error.into()),
        _ => Ok(()),
    }
}

/// Removes the container's end and with it the pair; returns the addresses that it had.
fn remove_link(request: &Request, namespace: &File) -> Result<Vec<IpAddr>, CniError> {
    let mut inside = within(namespace, || Ok(Route::open()?))?;
    let Some(link) = inside.link(&request.ifname)? else { return Ok(Vec::new()) };
    let addresses = inside.addresses()?;
    match inside.delete_link(link.index) {
        Err(error) if !error.is_absent() => return Err(error.into()),
        _ => {}
    }
    let own = addresses.into_iter().filter(|one| one.index == link.index && one.global);
    Ok(own.map(|one| one.ip).collect())
}

fn assign(request: &Request, config: &Config, raw: &Value) -> Result<CniResult, CniError> {
    match config.ipam_type() {
        "" => Ok(CniResult::default()),
        "host-local" => host_local::add(request, raw),
        _ => {
            let answer = delegate(request, config, raw, "ADD")?;
            let result = CniResult::from_json(&answer)?;
            if result.ips.is_empty() {
                let text = format!("plugin `{}` gave no address", config.ipam_type());
                return Err(CniError::Config(text));
            }
            Ok(result)
        }
    }
}

fn release(request: &Request, config: &Config, raw: &Value) -> Result<(), CniError> {
    match config.ipam_type() {
        "" => Ok(()),
        "host-local" => host_local::delete(request, raw),
        _ => delegate(request, config, raw, "DEL").map(|_| ()),
    }
}

/// Starts another plugin for addresses with our own request.
fn delegate(
    request: &Request,
    config: &Config,
    raw: &Value,
    command: &str,
) -> Result<Value, CniError> {
    let plugin = config.ipam_type().to_owned();
    let failed = |message: String| CniError::Delegate { plugin: plugin.clone(), message };
    if plugin.contains('/') {
        return Err(CniError::Config(format!("`ipam.type` `{plugin}` is no name")));
    }
    let folders = request.path.split(':').filter(|folder| !folder.is_empty());
    let program =
        folders.map(|folder| PathBuf::from(folder).join(&plugin)).find(|path| path.exists());
    let program = program.ok_or_else(|| failed("it is not in CNI_PATH".to_owned()))?;
    let spawned = Command::new(&program)
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", &request.container_id)
        .env("CNI_NETNS", &request.netns)
        .env("CNI_IFNAME", &request.ifname)
        .env("CNI_ARGS", &request.args)
        .env("CNI_PATH", &request.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = spawned.map_err(|error| failed(error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        let written = stdin.write_all(raw.to_string().as_bytes());
        written.map_err(|error| failed(error.to_string()))?;
    }
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    if !output.status.success() {
        return Err(failed(answer["msg"].as_str().unwrap_or("no reason given").to_owned()));
    }
    Ok(answer)
}

fn addresses_of(result: &CniResult) -> Vec<IpAddr> {
    result.ips.iter().map(|ip| ip.address.address).collect()
}

fn has_dns(dns: &Value) -> bool {
    dns.as_object().is_some_and(|object| !object.is_empty())
}

fn first_host(network: Cidr) -> IpAddr {
    match network.address {
        IpAddr::V4(ip) => IpAddr::V4(ip.to_bits().wrapping_add(1).into()),
        IpAddr::V6(ip) => IpAddr::V6(ip.to_bits().wrapping_add(1).into()),
    }
}
