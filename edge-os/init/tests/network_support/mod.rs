//! Network namespaces as small machines: each with its own interfaces, routes and sockets.

#![allow(dead_code)]

use nix::sched::{CloneFlags, setns, unshare};
use skerry_init::netlink::route::{Link, Route, RouteEntry, VethPair};
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

/// A network namespace that lives as long as this value.
pub(crate) struct Namespace {
    file: File,
}

impl Namespace {
    /// Makes one with `lo` up; `None`, and a line that says so, where that is not allowed.
    pub(crate) fn new() -> Option<Self> {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)?;
            let mut route = Route::open().expect("netlink works in a new namespace");
            let lo = route.link("lo").expect("netlink answers").expect("`lo` is there");
            route.set_up(lo.index, true).expect("`lo` can be set up");
            File::open("/proc/thread-self/ns/net")
        });
        match made.join().expect("no panic") {
            Ok(file) => Some(Self { file }),
            Err(error) => {
                eprintln!("SKIPPED: no network namespace can be made here: {error}");
                None
            }
        }
    }

    /// Path by which others of this process can open it.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Runs `work` in it, on a thread of its own.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET).expect("it can be entered");
                work()
            });
            match thread.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Connects it with `other`: interface `name` here, `peer` there, both up, without addresses.
    pub(crate) fn connect(&self, name: &str, other: &Namespace, peer: &str) -> (Link, Link) {
        let here = self.run(|| {
            let mut route = Route::open().expect("netlink works");
            let pair = VethPair {
                host_name: name,
                peer_name: peer,
                peer_namespace: other.file.as_fd(),
                peer_mac: None,
                mtu: None,
                master: None,
            };
            route.create_veth(&pair).expect("the pair can be made");
            route.link(name).expect("netlink answers").expect("it is there")
        });
        let there = other.run(|| {
            let mut route = Route::open().expect("netlink works");
            let link = route.link(peer).expect("netlink answers").expect("it is there");
            route.set_up(link.index, true).expect("it can be set up");
            link
        });
        (here, there)
    }

    /// Gives an interface an address.
    pub(crate) fn address(&self, name: &str, ip: &str, prefix_len: u8) {
        self.run(|| {
            let mut route = Route::open().expect("netlink works");
            let link = route.link(name).expect("netlink answers").expect("it is there");
            let ip: IpAddr = ip.parse().expect("an address");
            route.add_address(link.index, ip, prefix_len, true).expect("it can be added");
        });
    }

    /// Sends what is for elsewhere to `gateway`.
    pub(crate) fn default_route(&self, name: &str, gateway: &str) {
        self.run(|| {
            let mut route = Route::open().expect("netlink works");
            let link = route.link(name).expect("netlink answers").expect("it is there");
            let gateway: IpAddr = gateway.parse().expect("an address");
            let any: IpAddr = if gateway.is_ipv4() { [0; 4].into() } else { [0_u8; 16].into() };
            let entry = RouteEntry {
                destination: (any, 0),
                gateway: Some(gateway),
                index: link.index,
                metric: None,
                source: None,
                protocol: 4,
                on_link: false,
            };
            route.replace_route(&entry).expect("it can be added");
        });
    }

    /// Returns its interfaces.
    pub(crate) fn links(&self) -> Vec<Link> {
        self.run(|| Route::open().expect("netlink works").links().expect("netlink answers"))
    }

    /// Returns the addresses of one interface as text with prefix, those of the link left out.
    pub(crate) fn addresses(&self, name: &str) -> Vec<String> {
        self.run(|| {
            let mut route = Route::open().expect("netlink works");
            let Some(link) = route.link(name).expect("netlink answers") else { return Vec::new() };
            let all = route.addresses().expect("netlink answers");
            let own = all.iter().filter(|one| one.index == link.index && one.global);
            own.map(|one| format!("{}/{}", one.ip, one.prefix_len)).collect()
        })
    }

    /// Returns its routes.
    pub(crate) fn routes(&self) -> Vec<RouteEntry> {
        self.run(|| Route::open().expect("netlink works").routes().expect("netlink answers"))
    }
}

/// Waits until `look` finds something, at most `limit`.
pub(crate) fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {limit:?} for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
