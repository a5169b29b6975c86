//! The CNI plugins against this host's kernel: namespaces stand for containers and for the outside.

mod network_support;

use network_support::{Namespace, wait_for};
use serde_json::{Value, json};
use skerry_init::cni::portmap::PORTS_MAX;
use skerry_init::cni::{self, Request};
use skerry_init::netlink::nft;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(5);
/// Where Debian keeps the plugins that ours stand in for.
const REFERENCE: &str = "/usr/lib/cni";
const SETS: [&str; 6] = ["masq4", "masq6", "ports4", "ports6", "ports4_at", "ports6_at"];

/// A host with a bridge, and containers behind it.
struct Host {
    namespace: Namespace,
    dir: tempfile::TempDir,
}

struct Container {
    id: String,
    namespace: Namespace,
    result: Value,
    ports: Value,
}

impl Host {
    fn new() -> Option<Self> {
        let namespace = Namespace::new()?;
        Some(Self { namespace, dir: tempfile::tempdir().expect("a folder") })
    }

    fn bridge_config(&self) -> Value {
        json!({
            "cniVersion": "1.0.0", "name": "test", "type": "bridge", "bridge": "cni-test",
            "isGateway": true, "ipMasq": true, "hairpinMode": true,
            "ipam": {
                "type": "host-local", "dataDir": self.dir.path(),
                "ranges": [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd00:77::/64"}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        })
    }

    fn portmap_config(&self, ports: &Value, previous: &Value) -> Value {
        json!({
            "cniVersion": "1.0.0", "name": "test", "type": "portmap",
            "capabilities": {"portMappings": true},
            "runtimeConfig": {"portMappings": ports}, "prevResult": previous,
        })
    }

    fn call(
        &self,
        plugin: &str,
        command: &str,
        container: (&str, &Namespace),
        config: &Value,
    ) -> Result<Value, String> {
        let request = Request {
            command: command.to_owned(),
            container_id: container.0.to_owned(),
            netns: container.1.path(),
            ifname: "eth0".to_owned(),
            ..Request::default()
        };
        self.namespace.run(|| {
            let result = cni::execute(plugin, &request, config.to_string().as_bytes());
            result
                .map(Option::unwrap_or_default)
                .map_err(|error| error.to_json("1.0.0").to_string())
        })
    }

    fn add(&self, id: &str, ports: Value) -> Container {
        let namespace = Namespace::new().expect("the first one worked");
        let result = self.call("bridge", "ADD", (id, &namespace), &self.bridge_config());
        let result = result.expect("the container is connected");
        let config = self.portmap_config(&ports, &result);
        let passed = self.call("portmap", "ADD", (id, &namespace), &config);
        assert_eq!(passed.expect("ports are mapped"), result);
        Container { id: id.to_owned(), namespace, result, ports }
    }

    fn check(&self, container: &Container) -> Result<(), String> {
        let who = (container.id.as_str(), &container.namespace);
        let config = self.portmap_config(&container.ports, &container.result);
        self.call("portmap", "CHECK", who, &config)?;
        let mut config = self.bridge_config();
        config["prevResult"] = container.result.clone();
        self.call("bridge", "CHECK", who, &config).map(|_| ())
    }

    fn delete(&self, container: &Container) {
        let who = (container.id.as_str(), &container.namespace);
        let config = self.portmap_config(&container.ports, &container.result);
        self.call("portmap", "DEL", who, &config).expect("ports are closed");
        let mut config = self.bridge_config();
        config["prevResult"] = container.result.clone();
        self.call("bridge", "DEL", who, &config).expect("the container is disconnected");
    }

    /// Everything that containers have left on the host.
    fn remains(&self) -> Vec<String> {
        let mut found: Vec<String> = self
            .namespace
            .links()
            .into_iter()
            .map(|link| link.name)
            .filter(|name| name.starts_with("veth"))
            .collect();
        let files = std::fs::read_dir(self.dir.path().join("test")).expect("the folder is there");
        let names = files.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        found.extend(names.filter(|name| name.parse::<std::net::IpAddr>().is_ok()));
        self.namespace.run(|| {
            let mut socket = nft::open().expect("netlink works");
            for set in SETS {
                let elements = nft::elements(&mut socket, "skerry", set).expect("netlink answers");
                found.extend(elements.into_iter().map(|one| format!("{set} {}", one.comment)));
            }
        });
        found
    }
}

impl Container {
    fn ip(&self, at: usize) -> String {
        let text = self.result["ips"][at]["address"].as_str().expect("an address");
        text.split('/').next().expect("a part").to_owned()
    }
}

/// Accepts one TCP connection at `address` in `namespace` while `client` connects; returns whom
/// the server saw.
fn seen_by_server(
    server: &Namespace,
    address: &str,
    client: &Namespace,
    target: &str,
) -> Result<SocketAddr, String> {
    let listener = server.run(|| TcpListener::bind(address)).map_err(|error| error.to_string())?;
    listener.set_nonblocking(true).expect("it can be set");
    let target: SocketAddr = target.parse().expect("an address with port");
    let connected = client.run(|| TcpStream::connect_timeout(&target, Duration::from_secs(2)));
    let mut stream = connected.map_err(|error| format!("connect to {target}: {error}"))?;
    let (mut accepted, seen) = wait_for("the connection", LIMIT, || listener.accept().ok());
    accepted.set_nonblocking(false).expect("it can be set");
    accepted.set_read_timeout(Some(LIMIT)).expect("it can be set");
    stream.write_all(b"hello").map_err(|error| error.to_string())?;
    let mut text = [0; 5];
    accepted.read_exact(&mut text).map_err(|error| error.to_string())?;
    assert_eq!(&text, b"hello");
    Ok(seen)
}

#[test]
fn containers_reach_each_other_and_the_outside_and_deleting_leaves_nothing() {
    let Some(host) = Host::new() else { return };
    let a = host.add("a", json!([]));
    let b = host.add("b", json!([]));
    assert_eq!((a.ip(0), a.ip(1)), ("10.77.0.2".to_owned(), "fd00:77::2".to_owned()));
    assert_eq!(b.ip(0), "10.77.0.3");
    assert_eq!(b.result["ips"][0]["gateway"], "10.77.0.1");
    assert_eq!(b.result["interfaces"][2]["sandbox"], json!(b.namespace.path()));

    // Between containers nothing is translated.
    let seen = seen_by_server(&b.namespace, "10.77.0.3:80", &a.namespace, "10.77.0.3:80");
    assert_eq!(seen.expect("a reaches b").ip().to_string(), "10.77.0.2");
    let seen = seen_by_server(&b.namespace, "[::]:80", &a.namespace, "[fd00:77::3]:80");
    assert_eq!(seen.expect("a reaches b").ip().to_string(), "fd00:77::2");
    let seen = seen_by_server(&host.namespace, "0.0.0.0:81", &a.namespace, "10.77.0.1:81");
    assert_eq!(seen.expect("a reaches the host").ip().to_string(), "10.77.0.2");

    // The outside sees the host.
    let outside = Namespace::new().expect("the first one worked");
    host.namespace.connect("up0", &outside, "eth0");
    host.namespace.address("up0", "192.0.2.1", 24);
    host.namespace.address("up0", "2001:db8::1", 64);
    outside.address("eth0", "192.0.2.9", 24);
    outside.address("eth0", "2001:db8::9", 64);
    let seen = seen_by_server(&outside, "192.0.2.9:80", &a.namespace, "192.0.2.9:80");
    assert_eq!(seen.expect("a reaches the outside").ip().to_string(), "192.0.2.1");
    let seen = seen_by_server(&outside, "[::]:80", &a.namespace, "[2001:db8::9]:80");
    assert_eq!(seen.expect("a reaches the outside").ip().to_string(), "2001:db8::1");

    host.check(&a).expect("all is as it was made");
    host.delete(&a);
    host.check(&a).expect_err("a is gone");
    host.check(&b).expect("b is still there");
    let seen = seen_by_server(&outside, "192.0.2.9:82", &b.namespace, "192.0.2.9:82");
    assert_eq!(seen.expect("b reaches the outside").ip().to_string(), "192.0.2.1");
    host.delete(&b);
    host.delete(&b); // once more is fine
    assert_eq!(host.remains(), Vec::<String>::new());
}

#[test]
fn mapped_ports_lead_to_the_container_from_everywhere() {
    let Some(host) = Host::new() else { return };
    let outside = Namespace::new().expect("the first one worked");
    host.namespace.connect("up0", &outside, "eth0");
    host.namespace.address("up0", "192.0.2.1", 24);
    host.namespace.address("up0", "2001:db8::1", 64);
    outside.address("eth0", "192.0.2.9", 24);
    outside.address("eth0", "2001:db8::9", 64);
    let web = host.add(
        "web",
        json!([
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 8081, "containerPort": 81, "protocol": "tcp", "hostIP": "192.0.2.1"},
            {"hostPort": 5353, "containerPort": 53, "protocol": "udp"},
        ]),
    );
    let other = host.add("other", json!([]));
    host.check(&web).expect("all is as it was made");

    let seen = seen_by_server(&web.namespace, "10.77.0.2:80", &outside, "192.0.2.1:8080");
    assert_eq!(seen.expect("from outside").ip().to_string(), "192.0.2.9");
    let seen = seen_by_server(&web.namespace, "10.77.0.2:81", &outside, "192.0.2.1:8081");
    assert_eq!(seen.expect("from outside, by address").ip().to_string(), "192.0.2.9");
    let seen = seen_by_server(&web.namespace, "[fd00:77::2]:80", &outside, "[2001:db8::1]:8080");
    assert_eq!(seen.expect("from outside by IPv6").ip().to_string(), "2001:db8::9");
    for target in ["127.0.0.1:8080", "192.0.2.1:8080", "10.77.0.1:8080"] {
        seen_by_server(&web.namespace, "10.77.0.2:80", &host.namespace, target)
            .expect("from the host");
    }
    seen_by_server(&web.namespace, "10.77.0.2:81", &host.namespace, "127.0.0.1:8081")
        .expect_err("that port is another address's");
    // With and without bridged packets passing the tables for routed ones, as container hosts set it.
    for bridged in ["0", "1"] {
        let set = host.namespace.run(|| {
            ["iptables", "ip6tables"].iter().all(|tables| {
                let path = format!("/proc/sys/net/bridge/bridge-nf-call-{tables}");
                std::fs::write(path, bridged).is_ok()
            })
        });
        if bridged == "1" && !set {
            eprintln!("SKIPPED: this kernel has no br_netfilter");
            continue;
        }
        for client in [&other.namespace, &web.namespace] {
            let seen = seen_by_server(&web.namespace, "10.77.0.2:80", client, "192.0.2.1:8080");
            assert_eq!(seen.expect("from a container").ip().to_string(), "10.77.0.1");
            let target = "[2001:db8::1]:8080";
            let seen = seen_by_server(&web.namespace, "[fd00:77::2]:80", client, target);
            assert_eq!(seen.expect("from a container").ip().to_string(), "fd00:77::1");
        }
        let seen = seen_by_server(&web.namespace, "10.77.0.2:90", &other.namespace, "10.77.0.2:90");
        assert_eq!(seen.expect("directly").ip().to_string(), "10.77.0.3");
    }

    let server = web.namespace.run(|| UdpSocket::bind("10.77.0.2:53")).expect("it can be bound");
    server.set_read_timeout(Some(LIMIT)).expect("it can be set");
    let client = outside.run(|| UdpSocket::bind("192.0.2.9:0")).expect("it can be bound");
    client.set_read_timeout(Some(LIMIT)).expect("it can be set");
    client.send_to(b"ask", "192.0.2.1:5353").expect("it can be sent");
    let mut buffer = [0; 16];
    let (_, from) = server.recv_from(&mut buffer).expect("the container hears it");
    server.send_to(b"say", from).expect("it can be sent");
    let (len, from) = client.recv_from(&mut buffer).expect("the answer comes back");
    assert_eq!((&buffer[..len], from.to_string().as_str()), (&b"say"[..], "192.0.2.1:5353"));

    // A port that somebody has is not taken away.
    let namespace = Namespace::new().expect("the first one worked");
    let result = host.call("bridge", "ADD", ("late", &namespace), &host.bridge_config());
    let result = result.expect("it is connected");
    let ports = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
    let config = host.portmap_config(&ports, &result);
    let error = host.call("portmap", "ADD", ("late", &namespace), &config).expect_err("taken");
    assert!(error.contains("host port 8080 is taken by container `web/eth0`"), "{error}");
    let mut config = host.bridge_config();
    config["prevResult"] = result;
    host.call("bridge", "DEL", ("late", &namespace), &config).expect("it is disconnected");

    host.delete(&web);
    seen_by_server(&web.namespace, "0.0.0.0:80", &outside, "192.0.2.1:8080").expect_err("closed");
    host.delete(&other);
    assert_eq!(host.remains(), Vec::<String>::new());
}

#[test]
fn udp_senders_from_before_reach_a_new_container() {
    let Some(host) = Host::new() else { return };
    let outside = Namespace::new().expect("the first one worked");
    host.namespace.connect("up0", &outside, "eth0");
    host.namespace.address("up0", "192.0.2.1", 24);
    outside.address("eth0", "192.0.2.9", 24);
    // Some other container makes the table, so that connections are tracked.
    let first = host.add("first", json!([]));
    let sender = outside.run(|| UdpSocket::bind("192.0.2.9:4000")).expect("it can be bound");
    sender.send_to(b"early", "192.0.2.1:5514").expect("it can be sent");
    let log = host.add("log", json!([{"hostPort": 5514, "containerPort": 514, "protocol": "udp"}]));
    let ip = format!("{}:514", log.ip(0));
    let server = log.namespace.run(|| UdpSocket::bind(ip)).expect("it can be bound");
    server.set_read_timeout(Some(Duration::from_millis(200))).expect("it can be set");
    let mut buffer = [0; 16];
    let deadline = Instant::now() + LIMIT;
    while server.recv_from(&mut buffer).is_err() {
        assert!(Instant::now() < deadline, "the sender keeps its old way");
        sender.send_to(b"late", "192.0.2.1:5514").expect("it can be sent");
    }
    host.delete(&first);
    host.delete(&log);
}

#[test]
fn containers_do_not_reach_the_loopback_of_the_host() {
    let Some(host) = Host::new() else { return };
    let ports = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "udp"}]);
    let web = host.add("web", ports);
    let secret = host.namespace.run(|| UdpSocket::bind("0.0.0.0:7000")).expect("it can be bound");
    secret.set_read_timeout(Some(Duration::from_millis(300))).expect("it can be set");
    // The container makes `lo` of its own forget 127.0.0.0/8 and sends there through its bridge.
    let ip = web.ip(0);
    web.namespace.run(|| {
        let mut route = skerry_init::netlink::route::Route::open().expect("netlink works");
        let lo = route.link("lo").expect("netlink answers").expect("it is there");
        route.delete_address(lo.index, [127, 0, 0, 1].into(), 8).expect("it can be deleted");
        std::fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1").expect("it can be set");
        let gateway: std::net::IpAddr = [10, 77, 0, 1].into();
        let eth0 = route.link("eth0").expect("netlink answers").expect("it is there");
        let entry = skerry_init::netlink::route::RouteEntry {
            destination: ([127, 0, 0, 0].into(), 8),
            gateway: Some(gateway),
            index: eth0.index,
            metric: None,
            source: None,
            protocol: 4,
            on_link: false,
        };
        route.replace_route(&entry).expect("it can be added");
        let socket = UdpSocket::bind(format!("{ip}:0")).expect("it can be bound");
        for _ in 0..3 {
            socket.send_to(b"x", "127.0.0.1:7000").expect("it can be sent");
        }
        socket.send_to(b"fine", "10.77.0.1:7000").expect("it can be sent");
    });
    let mut buffer = [0; 16];
    let (len, _) = secret.recv_from(&mut buffer).expect("the way to the host itself is open");
    assert_eq!(&buffer[..len], b"fine");
    secret.recv_from(&mut buffer).expect_err("nothing else came");
    host.delete(&web);
}

#[test]
fn many_containers_at_once_are_all_connected_and_all_gone_after() {
    let Some(host) = Host::new() else { return };
    let host = &host;
    let (sender, made) = mpsc::channel();
    std::thread::scope(|scope| {
        for at in 0..12_u16 {
            let sender = sender.clone();
            scope.spawn(move || {
                let ports =
                    json!([{"hostPort": 9000 + at, "containerPort": 80, "protocol": "tcp"}]);
                sender.send(host.add(&format!("c{at}"), ports)).expect("the test waits");
            });
        }
    });
    drop(sender);
    let all: Vec<Container> = made.iter().collect();
    let mut ips: Vec<String> = all.iter().map(|container| container.ip(0)).collect();
    ips.sort();
    ips.dedup();
    assert_eq!(ips.len(), 12);
    std::thread::scope(|scope| {
        for container in &all {
            scope.spawn(|| host.check(container).expect("it is as it was made"));
        }
    });
    std::thread::scope(|scope| {
        for container in &all {
            scope.spawn(|| host.delete(container));
        }
    });
    assert_eq!(host.remains(), Vec::<String>::new());
}

#[test]
fn deleting_needs_neither_namespace_nor_earlier_result() {
    let Some(host) = Host::new() else { return };
    let ports = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
    let gone = host.add("gone", ports);
    let request = Request {
        command: "DEL".to_owned(),
        container_id: gone.id.clone(),
        netns: String::new(),
        ifname: "eth0".to_owned(),
        ..Request::default()
    };
    drop(gone.namespace); // its end of the pair goes with it
    let config = host.bridge_config();
    let portmap = json!({"cniVersion": "1.0.0", "name": "test", "type": "portmap"});
    for (plugin, config) in [("portmap", &portmap), ("bridge", &config)] {
        let deleted = host
            .namespace
            .run(|| cni::execute(plugin, &request, config.to_string().as_bytes()).map(|_| ()));
        deleted.expect("it is disconnected");
    }
    wait_for("the pair to be gone", LIMIT, || host.remains().is_empty().then_some(()));
}

#[test]
fn a_container_may_have_as_many_ports_as_there_is_room_for_and_not_one_more() {
    let Some(host) = Host::new() else { return };
    let ports = |count: usize| {
        let one = |at| json!({"hostPort": 1000 + at, "containerPort": at + 1, "protocol": "tcp"});
        (0..count).map(one).collect::<Value>()
    };
    let most = host.add("most", ports(PORTS_MAX));
    host.check(&most).expect("all are open");
    let seen = seen_by_server(
        &most.namespace,
        "0.0.0.0:512",
        &host.namespace,
        &format!("127.0.0.1:{}", 1000 + PORTS_MAX - 1),
    );
    seen.expect("the last one is open");
    let config = host.portmap_config(&ports(PORTS_MAX + 1), &most.result);
    let error = host.call("portmap", "ADD", ("most", &most.namespace), &config);
    assert!(error.expect_err("one too many").contains("more than 512"));
    host.delete(&most);
    assert_eq!(host.remains(), Vec::<String>::new());
}

#[test]
fn deleting_takes_an_empty_file_for_a_namespace_that_is_gone() {
    let Some(host) = Host::new() else { return };
    let file = host.dir.path().join("cni-1234");
    std::fs::write(&file, "").expect("it can be written");
    let request = Request {
        command: "DEL".to_owned(),
        container_id: "old".to_owned(),
        netns: file.display().to_string(),
        ifname: "eth0".to_owned(),
        ..Request::default()
    };
    for plugin in ["portmap", "bridge", "loopback"] {
        let config = host.bridge_config().to_string();
        let deleted = host.namespace.run(|| cni::execute(plugin, &request, config.as_bytes()));
        assert_eq!(deleted.expect("nothing is left to delete"), None);
    }
}

#[test]
fn failed_adds_leave_nothing() {
    let Some(host) = Host::new() else { return };
    let namespace = Namespace::new().expect("the first one worked");
    let other = Namespace::new().expect("the first one worked");
    namespace.connect("eth0", &other, "x");
    let error = host.call("bridge", "ADD", ("a", &namespace), &host.bridge_config());
    assert!(error.expect_err("eth0 is taken").contains("already"));
    assert!(namespace.links().iter().any(|link| link.name == "eth0"), "it is not ours to delete");
    let mut config = host.bridge_config();
    config["ipam"]["routes"] = json!([{"dst": "198.51.100.0/24", "gw": "203.0.113.1"}]);
    let error =
        host.call("bridge", "ADD", ("a", &other), &config).expect_err("no way to the gateway");
    assert!(error.contains("network of the container"), "{error}");
    assert_eq!(host.remains(), Vec::<String>::new());
}

#[test]
fn results_are_those_of_the_reference_plugins() {
    if !Path::new(REFERENCE).join("bridge").exists() {
        eprintln!("SKIPPED: no reference plugins in {REFERENCE}");
        return;
    }
    let Some(host) = Host::new() else { return };
    let Some(reference) = Host::new() else { return };
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let mut pairs = Vec::new();
        for (host, is_ours) in [(&host, true), (&reference, false)] {
            let namespace = Namespace::new().expect("the first one worked");
            let mut config = host.bridge_config();
            config["cniVersion"] = json!(version);
            let id = format!("c-{version}");
            let call = |plugin: &str, command: &str, config: &Value| {
                if is_ours {
                    return host.call(plugin, command, (&id, &namespace), config);
                }
                host.namespace.run(|| call_reference(plugin, command, &id, &namespace, config))
            };
            let mut result = call("bridge", "ADD", &config).expect("it is connected");
            let seen = (namespace.addresses("eth0"), normal_routes(&namespace));
            config["prevResult"] = result.clone();
            call("bridge", "DEL", &config).expect("it is disconnected");
            normalise(&mut result);
            pairs.push((result, seen));
        }
        assert_eq!(pairs[0], pairs[1], "version {version}");
    }
}

/// Leaves out what is random or another path in each.
fn normalise(result: &mut Value) {
    for interface in result["interfaces"].as_array_mut().expect("interfaces") {
        interface["mac"] = json!("");
        if interface.get("sandbox").is_some() {
            interface["sandbox"] = json!("");
        }
    }
    result["interfaces"][1]["name"] = json!("veth");
}

fn normal_routes(namespace: &Namespace) -> Vec<String> {
    let mut routes: Vec<String> = namespace
        .routes()
        .into_iter()
        .filter(|route| !route.destination.0.to_string().starts_with("fe80"))
        .map(|route| format!("{:?} {:?}", route.destination, route.gateway))
        .collect();
    routes.sort();
    routes
}

fn call_reference(
    plugin: &str,
    command: &str,
    id: &str,
    namespace: &Namespace,
    config: &Value,
) -> Result<Value, String> {
    let mut child = Command::new(Path::new(REFERENCE).join(plugin))
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", id)
        .env("CNI_NETNS", namespace.path())
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", REFERENCE)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(config.to_string().as_bytes()).map_err(|error| error.to_string())?;
    drop(stdin);
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        return Err(text);
    }
    Ok(serde_json::from_slice(&output.stdout).unwrap_or_default())
}
