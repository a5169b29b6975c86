//! The network service against this host's kernel, DHCP servers that others wrote, and small
//! servers for names and time, each in a namespace of its own.

mod network_support;

use network_support::{Namespace, wait_for};
use serde_json::Value;
use skerry_init::console::Word;
use skerry_init::netlink::route::Route;
use skerry_init::network::clock::Clock;
use skerry_init::network::service::{Places, Service};
use skerry_init::site::{Cidr, Interface, Ipv6, Match, Method, Network};
use std::net::{IpAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

const LIMIT: Duration = Duration::from_secs(10);

/// The service in a namespace, until it is dropped.
struct Node<'scope> {
    files: tempfile::TempDir,
    said: Arc<Mutex<Vec<String>>>,
    steps: Arc<Mutex<Vec<f64>>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::ScopedJoinHandle<'scope, ()>>,
}

/// A clock that is a year behind and only remembers what it was told.
struct LateClock(Arc<Mutex<Vec<f64>>>);

const BEHIND: Duration = Duration::from_secs(365 * 86_400);

impl Clock for LateClock {
    fn now(&self) -> Duration {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.expect("after 1970") - BEHIND
    }

    fn step(&mut self, seconds: f64) -> std::io::Result<()> {
        self.0.lock().expect("no panic").push(seconds);
        Ok(())
    }

    fn slew(&mut self, _: f64) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'scope> Node<'scope> {
    fn start<'env>(
        scope: &'scope std::thread::Scope<'scope, 'env>,
        namespace: &'env Namespace,
        interfaces: Vec<Interface>,
        ntp: Vec<String>,
    ) -> Self {
        let files = tempfile::tempdir().expect("a folder");
        Self::start_in(scope, namespace, interfaces, ntp, files)
    }

    fn start_in<'env>(
        scope: &'scope std::thread::Scope<'scope, 'env>,
        namespace: &'env Namespace,
        interfaces: Vec<Interface>,
        ntp: Vec<String>,
        files: tempfile::TempDir,
    ) -> Self {
        let (said, steps) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
        let stop = Arc::new(AtomicBool::new(false));
        let places = Places {
            site: files.path().join("site.toml"),
            run: files.path().join("run"),
            report: files.path().join("run/skerry/network.json"),
            state: files.path().join("state"),
        };
        let thread = scope.spawn({
            let (said, steps, stop) = (said.clone(), steps.clone(), stop.clone());
            move || {
                namespace.run(|| {
                    let say = |word: Word, text: &str| {
                        said.lock().expect("no panic").push(format!("{word}: {text}"));
                    };
                    let config = Network { interfaces, ..Network::default() };
                    let clock = Box::new(LateClock(steps));
                    let mut service = Service::start(config, ntp, places, clock, Box::new(say))
                        .expect("it can start");
                    while !stop.load(Ordering::Relaxed) {
                        service.turn(Some(Duration::from_millis(50))).expect("it goes on");
                    }
                });
            }
        });
        Self { files, said, steps, stop, thread: Some(thread) }
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.files.path().join(name)).unwrap_or_default()
    }

    fn report(&self) -> Value {
        serde_json::from_str(&self.file("run/skerry/network.json")).unwrap_or_default()
    }

    fn has_said(&self, text: &str) -> bool {
        self.said.lock().expect("no panic").iter().any(|line| line.contains(text))
    }

    fn end(mut self) -> tempfile::TempDir {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("it runs").join().expect("no panic");
        std::mem::replace(&mut self.files, tempfile::tempdir().expect("a folder"))
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if std::thread::panicking() {
            eprintln!("said: {:#?}\nreport: {:#}", self.said.lock(), self.report());
        }
    }
}

/// A program that ends with the test.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn dhcp_rule() -> Interface {
    rule("eth0", Method::Dhcp)
}

fn rule(name: &str, method: Method) -> Interface {
    Interface {
        matches: Match { name: Some(name.to_owned()), ..Match::default() },
        method,
        dns: Vec::new(),
        vlan: None,
        ipv6: Ipv6::Auto,
        mtu: None,
    }
}

/// A network with a router at 10.5.0.1 (interface `lan`), and a box on it (interface `eth0`).
fn lan() -> Option<(Namespace, Namespace)> {
    let router = Namespace::new()?;
    let node = Namespace::new()?;
    router.connect("lan", &node, "eth0");
    router.address("lan", "10.5.0.1", 24);
    Some((router, node))
}

/// Starts busybox's server in `router`; the lease lasts `seconds`.
fn udhcpd(router: &Namespace, dir: &Path, seconds: u32) -> Option<Program> {
    let config = dir.join("udhcpd.conf");
    let leases = dir.join("leases");
    std::fs::write(&leases, "").expect("it can be written");
    let text = format!(
        "start 10.5.0.20\nend 10.5.0.30\ninterface lan\nlease_file {}\npidfile {}\n\
         option subnet 255.255.255.0\noption router 10.5.0.1\noption dns 10.5.0.1\n\
         option domain site.example\noption lease {seconds}\nmin_lease 10\noption ntpsrv 10.5.0.1\noption mtu 1400\n\
         option staticroutes 10.9.0.0/16 10.5.0.7, 0.0.0.0/0 10.5.0.1\n",
        leases.display(),
        dir.join("pid").display(),
    );
    std::fs::write(&config, text).expect("it can be written");
    let spawned = router.run(|| {
        Command::new("busybox")
            .args(["udhcpd", "-f", "-S"])
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
    });
    match spawned {
        Ok(child) => Some(Program(child)),
        Err(error) => {
            eprintln!("SKIPPED: no busybox here: {error}");
            None
        }
    }
}

/// Answers questions for the time with the true one, on port 123 of `router`.
fn time_server<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    router: &Namespace,
    stop: &'scope AtomicBool,
) {
    let socket = router.run(|| UdpSocket::bind("10.5.0.1:123")).expect("it can be bound");
    socket.set_read_timeout(Some(Duration::from_millis(50))).expect("it can be set");
    scope.spawn(move || {
        let mut buffer = [0; 48];
        while !stop.load(Ordering::Relaxed) {
            let Ok((_, from)) = socket.recv_from(&mut buffer) else { continue };
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let now = skerry_init::network::ntp::timestamp(now.expect("after 1970"));
            let mut answer = [0; 48];
            answer[0] = 4 << 3 | 4;
            answer[1] = 1;
            answer[24..32].copy_from_slice(&buffer[40..48]);
            answer[32..40].copy_from_slice(&now.to_be_bytes());
            answer[40..48].copy_from_slice(&now.to_be_bytes());
            let _ = socket.send_to(&answer, from);
        }
    });
}

/// Tells the other threads of a test to end, also when it fails.
struct Flag<'a>(&'a AtomicBool);

impl Drop for Flag<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn dhcp_gives_address_routes_names_and_time_and_a_restart_changes_nothing() {
    let Some((router, node)) = lan() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let Some(_server) = udhcpd(&router, dir.path(), 600) else { return };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _flag = Flag(&stop);
        time_server(scope, &router, &stop);
        let service = Node::start(scope, &node, vec![dhcp_rule()], Vec::new());
        let own = wait_for("an address", LIMIT, || node.addresses("eth0").first().cloned());
        assert!(own.starts_with("10.5.0.2") || own.starts_with("10.5.0.30"), "{own}");
        wait_for("the report", LIMIT, || service.report()["online"].as_bool().filter(|is| *is));
        let report = service.report();
        let eth0 = &report["interfaces"][0];
        assert_eq!(
            (eth0["state"].as_str(), eth0["method"].as_str()),
            (Some("configured"), Some("dhcp"))
        );
        assert_eq!((eth0["gateway"].as_str(), &eth0["problem"]), (Some("10.5.0.1"), &Value::Null));
        let resolv_conf = service.file("run/resolv.conf");
        assert!(
            resolv_conf.ends_with("\nnameserver 10.5.0.1\nsearch site.example\n"),
            "{resolv_conf}"
        );
        let routes = node.routes();
        let to = |text: &str, prefix: u8| {
            let ip: IpAddr = text.parse().expect("an address");
            routes
                .iter()
                .find(|route| route.destination == (ip, prefix))
                .and_then(|route| route.gateway)
        };
        assert_eq!(to("10.9.0.0", 16).map(|ip| ip.to_string()).as_deref(), Some("10.5.0.7"));
        assert_eq!(to("0.0.0.0", 0).map(|ip| ip.to_string()).as_deref(), Some("10.5.0.1"));
        let mtu = node.links().into_iter().find(|link| link.name == "eth0").map(|link| link.mtu);
        assert_eq!(mtu, Some(1400));

        // The clock is set from the server that DHCP named.
        let step = wait_for("the time", LIMIT, || {
            service.steps.lock().expect("no panic").first().copied()
        });
        assert!((step - BEHIND.as_secs_f64()).abs() < 1.0, "{step}");
        wait_for("the report", LIMIT, || {
            service.report()["ntp"]["synced"].as_bool().filter(|is| *is)
        });
        assert_eq!(service.report()["ntp"]["server"], "10.5.0.1");

        // Started anew, it asks for the same address and takes nothing away meanwhile.
        let files = service.end();
        let index =
            node.links().into_iter().find(|link| link.name == "eth0").expect("it is there").index;
        let before = node.routes();
        let service = Node::start_in(scope, &node, vec![dhcp_rule()], Vec::new(), files);
        wait_for("the lease", LIMIT, || {
            service
                .has_said("carrier")
                .then_some(())
                .or_else(|| service.report()["interfaces"][0]["gateway"].as_str().map(|_| ()))
        });
        assert_eq!(node.addresses("eth0"), std::slice::from_ref(&own));
        assert_eq!(node.routes(), before);
        // What somebody takes away comes back.
        let (ip, prefix_len) = own.split_once('/').expect("an address with network");
        let (ip, prefix_len): (IpAddr, u8) =
            (ip.parse().expect("an address"), prefix_len.parse().expect("a number"));
        node.run(|| {
            let mut route = Route::open().expect("netlink works");
            route.delete_address(index, ip, prefix_len).expect("it can be deleted");
        });
        wait_for("the address", LIMIT, || {
            (node.addresses("eth0") == std::slice::from_ref(&own)).then_some(())
        });
        wait_for("the route", LIMIT, || {
            node.routes().iter().any(|route| route.destination.1 == 0).then_some(())
        });
    });
}

#[test]
fn a_short_lease_is_extended_in_time() {
    let Some((router, node)) = lan() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let Some(_server) = udhcpd(&router, dir.path(), 10) else { return };
    std::thread::scope(|scope| {
        let service = Node::start(scope, &node, vec![dhcp_rule()], Vec::new());
        let own = wait_for("an address", LIMIT, || node.addresses("eth0").first().cloned());
        let end = Instant::now() + Duration::from_secs(12);
        while Instant::now() < end {
            assert_eq!(node.addresses("eth0"), std::slice::from_ref(&own));
            std::thread::sleep(Duration::from_millis(100));
        }
        assert!(!service.has_said("has lost its address"));
    });
}

#[test]
fn a_server_that_comes_late_and_a_cable_that_is_pulled_are_lived_with() {
    let Some((router, node)) = lan() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let set_carrier = |up: bool| {
        router.run(|| {
            let mut route = Route::open().expect("netlink works");
            let lan = route.link("lan").expect("netlink answers").expect("it is there");
            route.set_up(lan.index, up).expect("it can be set");
        });
    };
    set_carrier(false);
    std::thread::scope(|scope| {
        let service = Node::start(scope, &node, vec![dhcp_rule()], Vec::new());
        wait_for("the report", LIMIT, || {
            (service.report()["interfaces"][0]["state"] == "no-carrier").then_some(())
        });
        let Some(_server) = udhcpd(&router, dir.path(), 600) else { return };
        set_carrier(true);
        let own = wait_for("an address", LIMIT, || node.addresses("eth0").first().cloned());
        wait_for("the report", LIMIT, || service.report()["online"].as_bool().filter(|is| *is));
        set_carrier(false);
        wait_for("the report", LIMIT, || service.report()["online"].as_bool().filter(|is| !*is));
        assert!(service.has_said("eth0 has lost its carrier"));
        set_carrier(true);
        wait_for("the report", LIMIT, || service.report()["online"].as_bool().filter(|is| *is));
        assert_eq!(node.addresses("eth0"), [own]);
    });
}

#[test]
fn an_interface_that_appears_later_is_configured_and_one_that_goes_is_forgotten() {
    let Some(router) = Namespace::new() else { return };
    let node = Namespace::new().expect("the first one worked");
    let address = Cidr::parse("10.5.0.9/24").expect("a network");
    let method = Method::Static { addresses: vec![address], gateways: vec![[10, 5, 0, 1].into()] };
    std::thread::scope(|scope| {
        let mut fixed = rule("eth0", method);
        fixed.dns = vec![[10, 5, 0, 53].into()];
        fixed.mtu = Some(1300);
        fixed.ipv6 = Ipv6::Off;
        let service = Node::start(scope, &node, vec![fixed], Vec::new());
        wait_for("the files", LIMIT, || (!service.file("run/hosts").is_empty()).then_some(()));
        router.connect("lan", &node, "eth0");
        wait_for("the address", LIMIT, || {
            (node.addresses("eth0") == ["10.5.0.9/24"]).then_some(())
        });
        wait_for("the route", LIMIT, || {
            node.routes().iter().any(|route| route.destination.1 == 0).then_some(())
        });
        wait_for("the names", LIMIT, || {
            service.file("run/resolv.conf").contains("nameserver 10.5.0.53").then_some(())
        });
        assert_eq!(
            node.links().iter().find(|link| link.name == "eth0").map(|link| link.mtu),
            Some(1300)
        );
        router.run(|| {
            let mut route = Route::open().expect("netlink works");
            let lan = route.link("lan").expect("netlink answers").expect("it is there");
            route.delete_link(lan.index).expect("it can be deleted");
        });
        wait_for("the report", LIMIT, || {
            service.report()["interfaces"].as_array().filter(|list| list.is_empty()).map(|_| ())
        });
        assert!(service.has_said("eth0 is gone"));
    });
}

#[test]
fn dnsmasq_gives_ipv4_and_router_advertisements_with_a_name_server_and_names_of_time_servers() {
    let Some((router, node)) = lan() else { return };
    router.address("lan", "fd00:5::1", 64);
    router.run(|| {
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").expect("it can be set")
    });
    let dir = tempfile::tempdir().expect("a folder");
    let started = router.run(|| {
        Command::new("dnsmasq")
            .args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"])
            .args(["--user=root", "--interface=lan", "--except-interface=lo", "--bind-interfaces"])
            .arg("--dhcp-range=10.5.0.50,10.5.0.60,255.255.255.0,2m")
            .args(["--dhcp-range=fd00:5::,ra-only,64,10m", "--enable-ra", "--ra-param=lan,4"])
            .args(["--dhcp-authoritative", "--host-record=time.example,10.5.0.1"])
            .arg(format!("--dhcp-leasefile={}", dir.path().join("leases").display()))
            .arg("--pid-file=")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
    });
    let _server = match started {
        Ok(child) => Program(child),
        Err(error) => {
            eprintln!("SKIPPED: no dnsmasq here: {error}");
            return;
        }
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _flag = Flag(&stop);
        time_server(scope, &router, &stop);
        let service = Node::start(scope, &node, vec![dhcp_rule()], vec!["time.example".to_owned()]);
        wait_for("both addresses", LIMIT, || {
            let own = node.addresses("eth0");
            let has = |start: &str| own.iter().any(|one| one.starts_with(start));
            (has("10.5.0.5") || has("10.5.0.60")).then_some(()).filter(|()| has("fd00:5:"))
        });
        wait_for("both name servers", LIMIT, || {
            let text = service.file("run/resolv.conf");
            (text.contains("nameserver 10.5.0.1\n") && text.contains("nameserver fe80:")
                || text.contains("nameserver fd00:5::1\n"))
            .then_some(())
        });
        wait_for("the time", LIMIT, || service.steps.lock().expect("no panic").first().copied());
    });
}

#[test]
fn no_port_is_open_while_the_service_runs() {
    let Some((router, node)) = lan() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let Some(_server) = udhcpd(&router, dir.path(), 600) else { return };
    std::thread::scope(|scope| {
        let _service = Node::start(scope, &node, vec![dhcp_rule()], Vec::new());
        wait_for("an address", LIMIT, || node.addresses("eth0").first().cloned());
        for table in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6"] {
            let text = node.run(|| {
                std::fs::read_to_string(format!("/proc/thread-self/net/{table}"))
                    .expect("it is there")
            });
            // Sockets with a peer hear that peer alone: the third word is its address.
            let open = text.lines().skip(1).filter(|line| {
                let peer = line.split_whitespace().nth(2).unwrap_or_default();
                peer.ends_with(":0000")
            });
            assert_eq!(open.collect::<Vec<_>>(), Vec::<&str>::new(), "{table}");
        }
    });
}

#[test]
fn a_vlan_is_made_over_its_interface_and_carries_its_addresses() {
    let Some((router, node)) = lan() else { return };
    let made = router.run(|| {
        let mut route = Route::open().expect("netlink works");
        let lan = route.link("lan").expect("netlink answers").expect("it is there");
        route.create_vlan("lan.12", lan.index, 12)
    });
    if let Err(error) = made {
        eprintln!("SKIPPED: this kernel has no VLANs: {error:?}");
        return;
    }
    router.address("lan.12", "10.12.0.1", 24);
    let address = Cidr::parse("10.12.0.9/24").expect("a network");
    let mut tagged =
        rule("eth0", Method::Static { addresses: vec![address], gateways: Vec::new() });
    tagged.vlan = Some(12);
    std::thread::scope(|scope| {
        let service = Node::start(scope, &node, vec![tagged], Vec::new());
        wait_for("the address", LIMIT, || {
            (node.addresses("eth0.12") == ["10.12.0.9/24"]).then_some(())
        });
        wait_for("the report", LIMIT, || service.report()["online"].as_bool().filter(|is| *is));
        assert_eq!(node.addresses("eth0"), Vec::<String>::new());
        let server = router.run(|| UdpSocket::bind("10.12.0.1:9")).expect("it can be bound");
        server.set_read_timeout(Some(LIMIT)).expect("it can be set");
        let client = node.run(|| UdpSocket::bind("10.12.0.9:0")).expect("it can be bound");
        client.send_to(b"tagged", "10.12.0.1:9").expect("it can be sent");
        let mut buffer = [0; 16];
        let (len, _) = server.recv_from(&mut buffer).expect("it arrives");
        assert_eq!(&buffer[..len], b"tagged");
    });
}
