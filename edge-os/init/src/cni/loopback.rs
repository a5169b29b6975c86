//! The plugin `loopback`: sets `lo` of the container up.

use super::{CniError, Request, namespace_if_there, open_namespace, result, within};
use crate::netlink::route::{Link, Route};
use crate::site::Cidr;
use result::{CniResult, Interface, Ip};
use serde_json::Value;

/// Sets `lo` up; the kernel gives it its addresses.
pub(crate) fn add(request: &Request, config: Value) -> Result<Value, CniError> {
    let version = config["cniVersion"].as_str().unwrap_or_default().to_owned();
    let namespace = open_namespace(&request.netns)?;
    let (link, addresses) = within(&namespace, || {
        let mut route = Route::open()?;
        let link = loopback(&mut route)?;
        if !link.up {
            route.set_up(link.index, true)?;
        }
        let mut addresses = route.addresses()?;
        addresses.retain(|address| address.index == link.index);
        Ok((link, addresses))
    })?;
    if let Some(previous) = config.get("prevResult").filter(|value| value.is_object()) {
        return Ok(previous.clone());
    }
    let interface = Interface {
        name: link.name,
        mac: result::mac_text(&link.mac),
        sandbox: request.netns.clone(),
    };
    let ips = addresses.iter().map(|address| Ip {
        interface: Some(0),
        address: Cidr { address: address.ip, prefix: address.prefix_len },
        gateway: None,
    });
    let result =
        CniResult { interfaces: vec![interface], ips: ips.collect(), ..CniResult::default() };
    Ok(result.to_json(&version))
}

/// Sets `lo` down; a namespace that is gone is fine.
pub(crate) fn delete(request: &Request) -> Result<(), CniError> {
    let Some(namespace) = namespace_if_there(&request.netns) else { return Ok(()) };
    within(&namespace, || {
        let mut route = Route::open()?;
        let link = loopback(&mut route)?;
        Ok(route.set_up(link.index, false)?)
    })
}

/// Looks whether `lo` is up.
pub(crate) fn check(request: &Request) -> Result<(), CniError> {
    let namespace = open_namespace(&request.netns)?;
    let link = within(&namespace, || loopback(&mut Route::open()?))?;
    if link.up { Ok(()) } else { Err(CniError::Changed("`lo` is down".to_owned())) }
}

fn loopback(route: &mut Route) -> Result<Link, CniError> {
    let link = route.link("lo")?;
    link.ok_or_else(|| CniError::Changed("container has no `lo`".to_owned()))
}
