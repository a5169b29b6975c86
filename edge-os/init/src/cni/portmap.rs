//! The plugin `portmap`: ports of this host that lead to the container of the plugin before.
//!
//! The runtime gives them as capability `portMappings`: `hostPort`, `containerPort`, `protocol`
//! (`tcp`, `udp`, `sctp`) and perhaps `hostIP`. With `snat` (the default) they also work from
//! containers behind the same bridge, from the container itself, and by 127.0.0.1 on this host.
//! How it is done stands in [`super::firewall`].

use super::firewall::{self, PortMap};
use super::result::{CniResult, previous};
use super::{CniError, Request, set_sysctl};
use crate::netlink::conntrack;
use crate::netlink::route::Route;
use serde::Deserialize;
use serde_json::Value;
use std::net::IpAddr;

/// Ports of one container at most: what the kernel takes in one message of both families.
pub const PORTS_MAX: usize = 512;
const UDP: u8 = 17;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    snat: Option<bool>,
    runtime_config: RuntimeConfig,
    // What is not done, so that it is refused instead of ignored.
    external_set_mark_chain: Option<String>,
    #[serde(rename = "conditionsV4")]
    conditions_v4: Vec<String>,
    #[serde(rename = "conditionsV6")]
    conditions_v6: Vec<String>,
    masq_all: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RuntimeConfig {
    port_mappings: Option<Vec<Mapping>>,
}

/// The convention's names, and those of containerd: its structure has no names for JSON, so that they begin with a
/// capital; plugins written in Go read both.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    #[serde(default, alias = "HostPort")]
    host_port: i64,
    #[serde(alias = "ContainerPort")]
    container_port: i64,
    #[serde(default, alias = "Protocol")]
    protocol: String,
    #[serde(default, rename = "hostIP", alias = "HostIP")]
    host_ip: String,
}

impl Config {
    fn read(raw: &Value) -> Result<Self, CniError> {
        let config = Self::deserialize(raw).map_err(CniError::Decode)?;
        for (is_set, name) in [
            (config.external_set_mark_chain.is_some(), "externalSetMarkChain"),
            (!config.conditions_v4.is_empty(), "conditionsV4"),
            (!config.conditions_v6.is_empty(), "conditionsV6"),
            (config.masq_all, "masqAll"),
        ] {
            if is_set {
                return Err(CniError::Unsupported(name.to_owned()));
            }
        }
        Ok(config)
    }

    /// Returns the entries for the container's addresses: one IPv4 and one IPv6 at most.
    fn maps(&self, addresses: &[IpAddr]) -> Result<Vec<PortMap>, CniError> {
        let mappings = self.runtime_config.port_mappings.as_deref().unwrap_or_default();
        if mappings.len() > PORTS_MAX {
            return Err(CniError::Config(format!("more than {PORTS_MAX} port mappings")));
        }
        let port = |name: &str, value: i64| {
            let port = u16::try_from(value).ok().filter(|port| *port > 0);
            port.ok_or_else(|| CniError::Config(format!("`{name}` {value} is no port")))
        };
        let mut maps = Vec::new();
        // A mapping without a port of the host maps nothing.
        for mapping in mappings.iter().filter(|mapping| mapping.host_port != 0) {
            let protocol = match mapping.protocol.to_ascii_lowercase().as_str() {
                "tcp" => 6,
                "udp" => UDP,
                "sctp" => 132,
                other => {
                    let text = format!("`protocol` `{other}` is not tcp, udp or sctp");
                    return Err(CniError::Config(text));
                }
            };
            let host_ip: Option<IpAddr> =
                match mapping.host_ip.as_str() {
                    "" => None,
                    text => Some(text.parse().map_err(|_| {
                        CniError::Config(format!("`hostIP` `{text}` is no address"))
                    })?),
                };
            for is_ipv4 in [true, false] {
                let of_family = addresses.iter().find(|ip| ip.is_ipv4() == is_ipv4);
                let meant = host_ip.is_none_or(|ip| ip.is_ipv4() == is_ipv4);
                let Some(container_ip) = of_family.filter(|_| meant) else { continue };
                maps.push(PortMap {
                    protocol,
                    // 0.0.0.0 and :: mean any address of their family.
                    host_ip: host_ip.filter(|ip| !ip.is_unspecified()),
                    host_port: port("hostPort", mapping.host_port)?,
                    container_ip: *container_ip,
                    container_port: port("containerPort", mapping.container_port)?,
                });
            }
        }
        Ok(maps)
    }
}

/// Opens the ports and passes the result of the plugin before on.
pub(crate) fn add(request: &Request, raw: Value) -> Result<Value, CniError> {
    let config = Config::read(&raw)?;
    let Some(before) = previous(&raw)? else {
        return Err(CniError::Config("`portmap` has to come after another plugin".to_owned()));
    };
    let addresses = container_addresses(request, &before);
    let maps = config.maps(&addresses)?;
    if !maps.is_empty() {
        let snat = config.snat.unwrap_or(true);
        let bridge = if snat { way_to(&maps)? } else { None };
        firewall::add_ports(&request.owner(), bridge.as_deref(), &maps)?;
        if let Err(error) = settle(bridge.as_deref(), &maps) {
            let _ = firewall::delete_ports(&request.owner(), &addresses);
            return Err(error);
        }
    }
    Ok(raw["prevResult"].clone())
}

/// Closes the ports; none open is fine.
pub(crate) fn delete(request: &Request, raw: Value) -> Result<(), CniError> {
    let addresses = match previous(&raw) {
        Ok(Some(before)) => container_addresses(request, &before),
        _ => Vec::new(),
    };
    firewall::delete_ports(&request.owner(), &addresses)
}

/// Looks whether the ports are open.
pub(crate) fn check(request: &Request, raw: Value) -> Result<(), CniError> {
    let config = Config::read(&raw)?;
    let Some(before) = previous(&raw)? else {
        return Err(CniError::Config("`prevResult` is missing".to_owned()));
    };
    let maps = config.maps(&container_addresses(request, &before))?;
    if maps.is_empty() || firewall::has_ports(&maps)? {
        return Ok(());
    }
    Err(CniError::Changed("a port of the container is not mapped any more".to_owned()))
}

/// Addresses that the plugin before gave to this interface.
fn container_addresses(request: &Request, before: &CniResult) -> Vec<IpAddr> {
    let own = before.ips.iter().filter(|ip| {
        let interface = ip.interface.and_then(|at| before.interfaces.get(at));
        interface.is_none_or(|one| one.name == request.ifname && !one.sandbox.is_empty())
    });
    own.map(|ip| ip.address.address).collect()
}

/// Name of the interface behind which the container is.
fn way_to(maps: &[PortMap]) -> Result<Option<String>, CniError> {
    let mut route = Route::open()?;
    for map in maps {
        if let Some(index) = route.interface_to(map.container_ip)? {
            return Ok(route.link_by_index(index)?.map(|link| link.name));
        }
    }
    Ok(None)
}

/// What else a new mapping needs: answers to 127.0.0.1 and no memory of the time before.
fn settle(bridge: Option<&str>, maps: &[PortMap]) -> Result<(), CniError> {
    if let Some(bridge) = bridge
        && maps.iter().any(|map| map.container_ip.is_ipv4())
    {
        set_sysctl(&format!("net/ipv4/conf/{bridge}/route_localnet"), "1")?;
    }
    for (family, is_ipv4) in [(2, true), (10, false)] {
        let meant = |map: &&PortMap| map.protocol == UDP && map.container_ip.is_ipv4() == is_ipv4;
        let ports: Vec<u16> = maps.iter().filter(meant).map(|map| map.host_port).collect();
        if !ports.is_empty() {
            // Without connection tracking over netlink old senders reach the container later.
            let _ = conntrack::forget(family, UDP, &ports);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn maps(mappings: Value) -> Result<Vec<PortMap>, CniError> {
        let raw = json!({"runtimeConfig": {"portMappings": mappings}});
        let addresses = [[10, 1, 0, 2].into(), "fd00::2".parse().expect("an address")];
        Config::read(&raw)?.maps(&addresses)
    }

    #[test]
    fn mappings_are_made_for_the_families_they_are_meant_for() {
        let one = |host_ip: &str| json!([{"hostPort": 80, "containerPort": 8080, "protocol": "TCP", "hostIP": host_ip}]);
        assert_eq!(maps(one("")).expect("fine").len(), 2);
        let v4 = maps(one("0.0.0.0")).expect("fine");
        assert_eq!((v4.len(), v4[0].host_ip, v4[0].protocol), (1, None, 6));
        let v6 = maps(one("::1")).expect("fine");
        assert_eq!((v6.len(), v6[0].container_ip.is_ipv6()), (1, true));
        assert!(maps(json!([{"hostPort": 0, "containerPort": 80}])).expect("fine").is_empty());
    }

    #[test]
    fn names_that_containerd_writes_are_read() {
        let raw = json!([{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "0.0.0.0"}]);
        let map = maps(raw).expect("fine");
        assert_eq!((map.len(), map[0].host_port, map[0].container_port), (1, 8080, 80));
    }

    #[test]
    fn wrong_mappings_are_refused() {
        for (mapping, code) in [
            (json!({"hostPort": 70000, "containerPort": 80, "protocol": "tcp"}), 7),
            (json!({"hostPort": 80, "containerPort": -1, "protocol": "tcp"}), 7),
            (json!({"hostPort": 80, "containerPort": 80, "protocol": "icmp"}), 7),
            (json!({"hostPort": 80, "containerPort": 80, "protocol": "tcp", "hostIP": "x"}), 7),
            (json!({"hostPort": "80"}), 6),
        ] {
            let error = maps(json!([mapping])).expect_err("it is wrong");
            assert_eq!(error.code(), code, "{mapping}");
        }
        let raw = json!({"conditionsV4": ["-s", "10.0.0.0/8"]});
        assert_eq!(Config::read(&raw).expect_err("not done").code(), 2);
    }
}
