//! What a plugin gives back, and what it gets from the one before it.
//!
//! Source: containernetworking/cni, SPEC.md 0.3.1, 0.4.0 and 1.0.0, section "Result types".

use super::CniError;
use crate::site::Cidr;
use serde_json::{Map, Value, json};
use std::net::IpAddr;

/// Interfaces, addresses or routes that are read from an earlier plugin.
const ENTRIES_MAX: usize = 256;

/// An interface that was made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address as text.
    pub mac: String,
    /// Path of the namespace it is in; empty for the host's.
    pub sandbox: String,
}

/// An address that was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ip {
    /// Which of the interfaces has it.
    pub interface: Option<usize>,
    /// The address with its network.
    pub address: Cidr,
    /// Next hop for everything else.
    pub gateway: Option<IpAddr>,
}

/// A route that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where to.
    pub destination: Cidr,
    /// Next hop; the gateway of the address without.
    pub gateway: Option<IpAddr>,
}

/// A result of any supported version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CniResult {
    /// Interfaces, host's and container's.
    pub interfaces: Vec<Interface>,
    /// Addresses.
    pub ips: Vec<Ip>,
    /// Routes.
    pub routes: Vec<Route>,
    /// Name servers, as they stand in the configuration.
    pub dns: Option<Value>,
}

impl CniResult {
    /// Returns the result in the shape of `version`.
    pub fn to_json(&self, version: &str) -> Value {
        let mut object = Map::new();
        object.insert("cniVersion".to_owned(), json!(version));
        if !self.interfaces.is_empty() {
            let list = self.interfaces.iter().map(|interface| {
                let mut object = json!({"name": interface.name});
                let mut put = |name: &str, value: &str| {
                    if !value.is_empty() {
                        object[name] = json!(value);
                    }
                };
                put("mac", &interface.mac);
                put("sandbox", &interface.sandbox);
                object
            });
            object.insert("interfaces".to_owned(), list.collect());
        }
        if !self.ips.is_empty() {
            let list = self.ips.iter().map(|ip| {
                let mut object = json!({"address": ip.address.to_string()});
                if !version.starts_with("1.") {
                    object["version"] = json!(if ip.address.address.is_ipv4() { "4" } else { "6" });
                }
                if let Some(interface) = ip.interface {
                    object["interface"] = json!(interface);
                }
                if let Some(gateway) = ip.gateway {
                    object["gateway"] = json!(gateway);
                }
                object
            });
            object.insert("ips".to_owned(), list.collect());
        }
        if !self.routes.is_empty() {
            let list = self.routes.iter().map(|route| {
                let mut object = json!({"dst": route.destination.to_string()});
                if let Some(gateway) = route.gateway {
                    object["gw"] = json!(gateway);
                }
                object
            });
            object.insert("routes".to_owned(), list.collect());
        }
        object.insert("dns".to_owned(), self.dns.clone().unwrap_or_else(|| json!({})));
        Value::Object(object)
    }

    /// Reads a result of any version with a list `ips`; entries that are not whole are an error.
    pub fn from_json(value: &Value) -> Result<Self, CniError> {
        let list = |name: &str| {
            let entries = value[name].as_array().map(Vec::as_slice).unwrap_or_default();
            if entries.len() > ENTRIES_MAX {
                let text = format!("result has more than {ENTRIES_MAX} `{name}`");
                return Err(CniError::Config(text));
            }
            Ok(entries)
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let wrong = |what: &str, value: &Value| {
            CniError::Config(format!("result has {value} where {what} belongs"))
        };
        let address = |value: &Value| match value.as_str() {
            None | Some("") => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| wrong("an address", value)),
        };
        let mut this = Self::default();
        for entry in list("interfaces")? {
            this.interfaces.push(Interface {
                name: text(&entry["name"]),
                mac: text(&entry["mac"]),
                sandbox: text(&entry["sandbox"]),
            });
        }
        for entry in list("ips")? {
            let cidr = entry["address"].as_str().and_then(Cidr::parse);
            this.ips.push(Ip {
                interface: entry["interface"].as_u64().and_then(|at| usize::try_from(at).ok()),
                address: cidr.ok_or_else(|| wrong("a network", &entry["address"]))?,
                gateway: address(&entry["gateway"])?,
            });
        }
        for entry in list("routes")? {
            let cidr = entry["dst"].as_str().and_then(Cidr::parse);
            this.routes.push(Route {
                destination: cidr.ok_or_else(|| wrong("a network", &entry["dst"]))?,
                gateway: address(&entry["gw"])?,
            });
        }
        this.dns = value.get("dns").filter(|dns| dns.is_object()).cloned();
        Ok(this)
    }
}

/// Returns the result of the plugin before, if the configuration has one.
pub(crate) fn previous(config: &Value) -> Result<Option<CniResult>, CniError> {
    match config.get("prevResult") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => CniResult::from_json(value).map(Some),
    }
}

/// Returns the network that an address is in: its host's bits cleared.
pub(crate) fn network_of(cidr: Cidr) -> Cidr {
    let address = match cidr.address {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(cidr.prefix)).unwrap_or(0);
            IpAddr::V4((ip.to_bits() & mask).into())
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(cidr.prefix)).unwrap_or(0);
            IpAddr::V6((ip.to_bits() & mask).into())
        }
    };
    Cidr { address, prefix: cidr.prefix }
}

/// Writes a hardware address as text.
pub fn mac_text(mac: &[u8]) -> String {
    let parts: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    parts.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_read_back_in_each_version() {
        let result = CniResult {
            interfaces: vec![Interface {
                name: "eth0".into(),
                mac: "02:00:00:00:00:01".into(),
                sandbox: "/ns".into(),
            }],
            ips: vec![Ip {
                interface: Some(0),
                address: Cidr::parse("10.1.0.2/24").expect("fits"),
                gateway: Some([10, 1, 0, 1].into()),
            }],
            routes: vec![Route {
                destination: Cidr::parse("0.0.0.0/0").expect("fits"),
                gateway: None,
            }],
            dns: None,
        };
        for version in super::super::VERSIONS {
            let json = result.to_json(version);
            assert_eq!(json["ips"][0].get("version").is_some(), version != "1.0.0");
            let mut read = CniResult::from_json(&json).expect("it is whole");
            assert_eq!(read.dns.take(), Some(json!({})));
            assert_eq!(read, result);
        }
    }

    #[test]
    fn broken_results_are_refused() {
        assert!(CniResult::from_json(&json!({"ips": [{"address": "10.1.0.2"}]})).is_err());
        assert!(CniResult::from_json(&json!({"routes": [{"dst": 7}]})).is_err());
        let many: Vec<Value> = (0..=ENTRIES_MAX).map(|_| json!({"name": "x"})).collect();
        assert!(CniResult::from_json(&json!({"interfaces": many})).is_err());
    }
}
