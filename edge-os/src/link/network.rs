//! Tells when the way out of this machine has changed or is there again: another default route, another address, a
//! cable that is put back.
//!
//! The kernel says so over netlink (`netlink`); what it said is then looked at, because most of it is about pods. Where
//! there is no such socket it is looked at now and then instead.

use super::netlink::{Listener, News, Seen};
use crate::node;
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

/// Time between two looks while there is no link, and nobody tells.
pub(super) const LOOK_INTERVAL_DOWN: Duration = Duration::from_secs(1);
/// Time between two looks while there is one, and nobody tells.
pub(super) const LOOK_INTERVAL_UP: Duration = Duration::from_secs(10);
/// Time between two looks although the kernel tells; it may have lost a message.
const LOOK_INTERVAL_TOLD: Duration = Duration::from_secs(60);
/// A change comes in pieces, address and route apart: what comes this soon after the first belongs to it.
const SETTLE: Duration = Duration::from_millis(20);

/// The way out of this machine, and who tells about it.
pub(super) struct Network {
    way: Way,
    listener: Option<Listener>,
    seen: Seen,
    /// What was said and not looked at yet: whoever waits here may stop waiting at any time.
    pending: Vec<News>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Way {
    address: Option<IpAddr>,
    routes: Vec<String>,
}

impl Way {
    fn look() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let routes = default_routes(&read("/proc/net/route"), &read("/proc/net/ipv6_route"));
        Self { address: node::default_address(), routes }
    }

    /// Whether packets may leave. A machine without a default route has its hub on its own network, or is offline.
    fn is_open(&self) -> bool {
        self.address.is_some() || !self.routes.is_empty()
    }

    fn uses(&self, interface: &str) -> bool {
        let of = |route: &String| route.split(' ').next() == Some(interface);
        self.routes.is_empty() || self.routes.iter().any(of)
    }
}

impl Network {
    /// As it is now.
    pub(super) fn look() -> Self {
        let listener = Listener::open();
        if let Err(error) = &listener {
            tracing::info!(%error, "the kernel does not tell of changes of the network; looking now and then");
        }
        Self {
            listener: listener.ok(),
            seen: Seen::default(),
            pending: Vec::new(),
            way: Way::look(),
        }
    }

    /// Waits until packets may get out in another way than before, or again, and takes note of that. Without a kernel
    /// that tells it looks every `interval`.
    pub(super) async fn changed(&mut self, interval: Duration) {
        loop {
            self.listen(interval).await;
            let news = std::mem::take(&mut self.pending);
            let way = Way::look();
            let is_other = way != self.way;
            let is_back = news.iter().any(|news| match news {
                News::Link(interface) => way.uses(interface),
                News::Way => true,
                News::Less => false,
            });
            self.way = way;
            if is_back || (is_other && self.way.is_open()) {
                tracing::info!(address = ?self.way.address, "the network has changed");
                return;
            }
        }
    }

    /// Waits for what the kernel says next, or until it is time to look anyway.
    async fn listen(&mut self, interval: Duration) {
        let Some(listener) = &self.listener else { return tokio::time::sleep(interval).await };
        let until_told = if self.pending.is_empty() { LOOK_INTERVAL_TOLD } else { SETTLE };
        let mut until = Instant::now() + until_told;
        loop {
            match tokio::time::timeout_at(until, listener.next(&mut self.seen)).await {
                Err(_) => return,
                Ok(Ok(news)) if news.is_empty() => {}
                Ok(Ok(news)) => {
                    if self.pending.is_empty() {
                        until = Instant::now() + SETTLE;
                    }
                    self.pending.extend(news);
                }
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the kernel no longer tells of changes of the network");
                    self.listener = None;
                    return;
                }
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
