//! Tells when the way out of this machine has changed: another default route, another address on it.
//!
//! It is looked at, not listened to: two small reads cost less than a netlink socket, and only a link that is down
//! looks every second.

use crate::node;
use std::net::IpAddr;
use std::time::Duration;

/// Time between two looks while there is no link.
pub(super) const LOOK_INTERVAL_DOWN: Duration = Duration::from_secs(1);
/// Time between two looks while there is one.
pub(super) const LOOK_INTERVAL_UP: Duration = Duration::from_secs(10);

/// The way out of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Network {
    address: Option<IpAddr>,
    routes: Vec<String>,
}

impl Network {
    /// As it is now.
    pub(super) fn look() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let routes = default_routes(&read("/proc/net/route"), &read("/proc/net/ipv6_route"));
        Self { address: node::default_address(), routes }
    }

    /// Waits until it is another one, and takes note of that.
    pub(super) async fn changed(&mut self, interval: Duration) {
        loop {
            tokio::time::sleep(interval).await;
            let now = Self::look();
            if now != *self {
                tracing::info!(address = ?now.address, "the network has changed");
                *self = now;
                return;
            }
        }
    }
}

/// Interface and gateway of each default route. Routes to pods come and go and say nothing about the way out.
fn default_routes(v4: &str, v6: &str) -> Vec<String> {
    let fields = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let v4 = v4.lines().map(fields).filter_map(|fields| match fields.as_slice() {
        [interface, destination, gateway, ..] if destination == "00000000" => {
            Some(format!("{interface} {gateway}"))
        }
        _ => None,
    });
    let v6 = v6.lines().map(fields).filter_map(|fields| match fields.as_slice() {
        [destination, length, _, _, gateway, .., interface]
            if length == "00"
                && destination.bytes().all(|byte| byte == b'0')
                && interface != "lo" =>
        {
            Some(format!("{interface} {gateway}"))
        }
        _ => None,
    });
    let mut routes: Vec<_> = v4.chain(v6).collect();
    routes.sort_unstable();
    routes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_default_routes_count() {
        let v4 = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n\
            eth0\t00000000\t0102A8C0\t0003\t0\t0\t100\t00000000\n\
            veth1\t05F40A0A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\n";
        let v6 = "00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
            fe800000000000000000000000000001 00000400 00000001 00000000 00450003     eth0\n\
            00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
            00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n\
            fe800000000000000000000000000000 40 00000000000000000000000000000000 00 \
            00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n";
        let expected = ["eth0 0102A8C0", "eth0 fe800000000000000000000000000001"];
        assert_eq!(default_routes(v4, v6), expected);
        assert_eq!(default_routes("", "junk\n"), Vec::<String>::new());
    }
}
