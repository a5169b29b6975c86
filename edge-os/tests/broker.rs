//! The event bus with a broker that trusts nobody: Debian's mosquitto with TLS, client certificates, users, and the list
//! of who may say what that is in the documentation.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use skerry_edge::bus::{self, BusConfig, BusTls, INCOMING_MAX, Queue, Received, Version};
use skerry_edge_core::twin::Weight;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(30);
const PASSWORD: &str = "correct horse";
const UPDATE: &str = "$hw/events/device/plant/boiler/twin/update";
const RESULT: &str = "$hw/events/device/plant/boiler/twin/update/result";

struct Pki {
    issuer: Issuer<'static, KeyPair>,
    dir: PathBuf,
}

impl Pki {
    fn new(dir: &Path, name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let ca = params.self_signed(&key).expect("a CA");
        let dir = dir.join(name);
        fs::create_dir(&dir).expect("made");
        fs::write(dir.join("ca.pem"), ca.pem()).expect("written");
        let issuer = Issuer::from_ca_cert_der(ca.der(), key).expect("a CA");
        Self { issuer, dir }
    }

    fn ca(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// Certificate and key of a name, which is also an address.
    fn identity(&self, name: &str, usage: ExtendedKeyUsagePurpose) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![usage];
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        let files = (self.dir.join(format!("{name}.pem")), self.dir.join(format!("{name}.key")));
        fs::write(&files.0, certificate.pem()).expect("written");
        fs::write(&files.1, key.serialize_pem()).expect("written");
        files
    }
}

struct Mosquitto {
    child: Option<Child>,
    config: PathBuf,
    port: u16,
}

impl Mosquitto {
    /// With these lines beside the port.
    fn start(dir: &Path, lines: &str) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = free.local_addr().expect("bound").port();
        drop(free);
        let config = dir.join("mosquitto.conf");
        // As root it would become another user, who may not read the test's folder.
        let text = format!("user root\nlistener {port} 127.0.0.1\n{lines}");
        fs::write(&config, text).expect("written");
        let mut broker = Self { child: None, config, port };
        broker.run();
        broker
    }

    fn run(&mut self) {
        let program = ["/usr/sbin/mosquitto", "/usr/bin/mosquitto"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .expect(
                "this test needs the Debian package `mosquitto`; `cargo xtask setup` installs it",
            );
        let log = fs::File::create(self.config.with_extension("log")).expect("a file");
        let mut command = Command::new(program);
        command.arg("-c").arg(&self.config).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().expect("the broker starts"));
    }

    /// Ends it in order, so that it writes down what it knows.
    fn end(&mut self) {
        let mut child = self.child.take().expect("it runs");
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it runs");
        child.wait().expect("it ends");
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn passwords(dir: &Path, users: &[&str]) -> PathBuf {
    let file = dir.join("passwords");
    for (index, user) in users.iter().enumerate() {
        let mut command = Command::new("mosquitto_passwd");
        command.arg("-b");
        if index == 0 {
            command.arg("-c");
        }
        let done = command.arg(&file).args([user, PASSWORD]).stderr(Stdio::null()).status();
        assert!(done.expect("mosquitto_passwd comes with mosquitto").success());
    }
    file
}

struct Bus {
    queue: Arc<Queue>,
    incoming: mpsc::Receiver<Received>,
    stop: CancellationToken,
    task: JoinHandle<()>,
    _topics: watch::Sender<BTreeSet<String>>,
}

impl Bus {
    fn start(config: BusConfig, topics: &[&str]) -> Self {
        let queue = Arc::new(Queue::default());
        let (sender, incoming) = mpsc::channel(INCOMING_MAX);
        let topics = topics.iter().map(|topic| (*topic).to_owned()).collect();
        let (topics, seen) = watch::channel(topics);
        let stop = CancellationToken::new();
        let task = tokio::spawn(bus::run(config, queue.clone(), sender, seen, stop.clone()));
        Self { queue, incoming, stop, task, _topics: topics }
    }

    /// Says something until `other` has heard it; returns what it heard.
    async fn reach(&self, other: &mut Self, topic: &str, payload: &str) -> Received {
        let reach = async {
            loop {
                self.queue.push(topic.into(), payload.into(), Weight::Each);
                let heard = tokio::time::timeout(Duration::from_millis(300), other.incoming.recv());
                match heard.await {
                    Ok(Some(heard)) if heard.topic == topic => return heard,
                    _ => {}
                }
            }
        };
        let reached = tokio::time::timeout(PATIENCE, reach).await;
        reached.unwrap_or_else(|_| panic!("nobody hears {topic}"))
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.expect("it ends");
    }
}

fn config(dir: &Path, port: u16, user: &str, version: Version) -> BusConfig {
    BusConfig {
        host: "127.0.0.1".into(),
        port,
        version,
        tls: None,
        subscriber: format!("{user}-sub-{version:?}"),
        publisher: format!("{user}-pub-{version:?}"),
        login: Some((user.into(), PASSWORD.into())),
        clean_session: dir.as_os_str().is_empty(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bus_speaks_tls_with_certificate_password_and_the_documented_list_in_both_versions() {
    skerry_edge::tls::install_provider();
    let temp = tempfile::tempdir().expect("a directory");
    let dir = temp.path();
    let pki = Pki::new(dir, "ours");
    let (certificate, key) = pki.identity("127.0.0.1", ExtendedKeyUsagePurpose::ServerAuth);
    let identity = pki.identity("edge", ExtendedKeyUsagePurpose::ClientAuth);
    let acl = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/mosquitto.acl");
    let broker = Mosquitto::start(
        dir,
        &format!(
            "cafile {}\ncertfile {}\nkeyfile {}\nrequire_certificate true\nallow_anonymous false\n\
             password_file {}\nacl_file {}\n",
            pki.ca().display(),
            certificate.display(),
            key.display(),
            passwords(dir, &["edge", "modbus", "panel"]).display(),
            acl.canonicalize().expect("it is there").display(),
        ),
    );
    for version in [Version::V3, Version::V5] {
        let as_user = |user: &str| {
            let socket = dir.join(format!("{user}-{version:?}.sock"));
            let tls = BusTls { ca: pki.ca(), identity: Some(identity.clone()), socket };
            BusConfig { tls: Some(tls), ..config(dir, broker.port, user, version) }
        };
        let mut agent = Bus::start(as_user("edge"), &[]);
        let mut mapper = Bus::start(as_user("modbus"), &[RESULT]);
        let mut panel = Bus::start(as_user("panel"), &["alarm/#"]);
        let heard = mapper.reach(&mut agent, UPDATE, "{\"a\":1}").await;
        assert_eq!(heard.payload, b"{\"a\":1}");
        agent.reach(&mut mapper, RESULT, "taken").await;
        agent.reach(&mut panel, "alarm/fridge", "warm").await;

        // A panel may not speak for a device, and a mapper only for its own.
        let other = "$hw/events/device/plant/other/twin/update";
        mapper.queue.push(other.into(), b"forged".to_vec(), Weight::Each);
        panel.queue.push(UPDATE.into(), b"forged".to_vec(), Weight::Each);
        for last in ["after", "last"] {
            let heard = mapper.reach(&mut agent, UPDATE, last).await;
            assert_ne!(heard.payload, b"forged", "{version:?}");
        }
        while let Ok(heard) = agent.incoming.try_recv() {
            assert_ne!(heard.payload, b"forged", "{version:?}");
        }
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &fs::metadata(dir.join(format!("edge-{version:?}.sock")))
                .expect("it is there")
                .permissions(),
        );
        assert_eq!(mode & 0o777, 0o600, "nobody else may use the agent's certificate");
        for bus in [agent, mapper, panel] {
            bus.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bus_talks_to_no_broker_of_another_ca_and_to_the_right_one_once_it_is_there() {
    skerry_edge::tls::install_provider();
    let temp = tempfile::tempdir().expect("a directory");
    let dir = temp.path();
    let (ours, other) = (Pki::new(dir, "ours"), Pki::new(dir, "other"));
    let lines = |pki: &Pki| {
        let (certificate, key) = pki.identity("127.0.0.1", ExtendedKeyUsagePurpose::ServerAuth);
        format!(
            "cafile {}\ncertfile {}\nkeyfile {}\nallow_anonymous true\n",
            pki.ca().display(),
            certificate.display(),
            key.display()
        )
    };
    let broker = Mosquitto::start(dir, &lines(&other));
    let tls = |name: &str, pki: &Pki| BusTls {
        ca: pki.ca(),
        identity: None,
        socket: dir.join(format!("{name}.sock")),
    };
    let base = config(dir, broker.port, "edge", Version::V3);
    let mut strict = Bus::start(
        BusConfig { tls: Some(tls("strict", &ours)), login: None, ..base.clone() },
        &["t"],
    );
    let mut trusting = Bus::start(
        BusConfig {
            tls: Some(tls("trusting", &other)),
            login: None,
            subscriber: "s".into(),
            publisher: "p".into(),
            ..base
        },
        &["t"],
    );
    strict.queue.push("t".into(), b"secret".to_vec(), Weight::Each);
    // Whoever trusts that broker talks through it, and by then the other one has tried more than once.
    let (queue, start) = (trusting.queue.clone(), std::time::Instant::now());
    while start.elapsed() < Duration::from_secs(3) {
        queue.push("t".into(), b"hello".to_vec(), Weight::Each);
        let heard = tokio::time::timeout(Duration::from_millis(500), trusting.incoming.recv());
        if let Ok(Some(heard)) = heard.await {
            assert_ne!(heard.payload, b"secret");
        }
    }
    assert!(strict.incoming.try_recv().is_err(), "it follows nothing there");
    // The CA file is another one by now: it counts from the next connection on, and nothing was lost.
    fs::copy(other.ca(), ours.ca()).expect("copied");
    let secret = async {
        loop {
            let heard = trusting.incoming.recv().await.expect("it runs");
            if heard.payload == b"secret" {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, secret).await.expect("it arrives");
    strict.stop().await;
    trusting.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bus_of_mqtt_5_loses_nothing_when_the_broker_is_restarted() {
    let temp = tempfile::tempdir().expect("a directory");
    let dir = temp.path();
    let lines = format!(
        "allow_anonymous true\npersistence true\npersistence_location {}/\nmax_queued_messages 0\n",
        dir.display()
    );
    let mut broker = Mosquitto::start(dir, &lines);
    let port = broker.port;
    let base = |name: &str| BusConfig { login: None, ..config(dir, port, name, Version::V5) };
    let agent = Bus::start(base("edge"), &[]);
    let mut panel = Bus::start(base("panel"), &["count"]);
    agent.reach(&mut panel, "count", "up").await;
    broker.end();
    for number in 0..200 {
        agent.queue.push("count".into(), number.to_string().into_bytes(), Weight::Each);
    }
    broker.run();
    let mut heard = BTreeSet::new();
    let all = async {
        while heard.len() < 200 {
            let message = panel.incoming.recv().await.expect("it runs");
            if let Ok(number) = String::from_utf8_lossy(&message.payload).parse::<u32>() {
                heard.insert(number);
            }
        }
    };
    let all = tokio::time::timeout(PATIENCE, all).await;
    assert!(all.is_ok(), "{} of 200 came", heard.len());
    assert_eq!(agent.queue.dropped(), 0);
    agent.stop().await;
    panel.stop().await;
}
