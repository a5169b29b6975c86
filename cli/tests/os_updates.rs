//! A version of the appliance's OS on its way: out of the store of the real CloudCore, over a line that is cut again and again, into
//! the folder that PID 1 is told. PID 1 itself is played here; machines with the real one are in `qemu-tests`.

mod support;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use skerry_api::fleet::os::{OsProgress, OsStep};
use skerry_apiserver::ApiServer;
use skerry_cloudcore::{CloudCore, create_token};
use skerry_edge::appliance::{Ask, Facts};
use skerry_edge::config::{Config, Endpoint};
use skerry_edge::enrol::Credentials;
use skerry_edge::os::{self, Failure, Running};
use skerry_init::blocks;
use skerry_init::manifest::{FORMAT, Manifest, PRODUCT, Part};
use skerry_init::verity::{self, hex};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use support::{ANY, start_api, start_cloud_with_store};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(60);
const BLOCK: usize = blocks::BLOCK;

/// Bytes that look like nothing, the same for the same seed.
fn noise(seed: u64, blocks: usize) -> Vec<u8> {
    let mut state = seed;
    let word = |_| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    (0..blocks * BLOCK / 4).map(word).flat_map(u32::to_le_bytes).collect()
}

/// Puts a version with this UKI and these blocks of a root into the store, as `skerry image publish` does; returns its digest and
/// the whole root.
fn publish(
    store: &Path,
    version: &str,
    counter: u64,
    uki: &[u8],
    data: &[u8],
) -> (String, Vec<u8>) {
    let tree = verity::build(data, (data.len() / BLOCK) as u64, b"salt", [0; 16]).expect("a tree");
    let root = [data, &tree.bytes].concat();
    let sha256 = |bytes: &[u8]| hex(&Sha256::digest(bytes));
    let index = |content: &[u8]| blocks::index(content).expect("memory");
    let part = |(name, content): &(&str, &[u8])| Part {
        name: (*name).into(),
        bytes: content.len() as u64,
        sha256: sha256(content),
        blocks_sha256: sha256(&index(content)),
    };
    let parts = [("uki.efi", uki), ("root.img", &root)];
    let verity = tree.verity.to_string();
    let manifest = Manifest {
        product: PRODUCT.into(),
        format: FORMAT,
        version: version.into(),
        arch: "amd64".into(),
        variant: "production".into(),
        epoch: 0,
        release_counter: counter,
        state_schema_min: 1,
        state_schema: 1,
        kernel: "6.12".into(),
        cmdline: format!("skerry.version={version} skerry.verity={verity}"),
        root_hash: hex(&tree.verity.root),
        verity,
        packages_lock: "0".repeat(64),
        parts: parts.iter().map(part).collect(),
    };
    let text = manifest.to_bytes();
    let digest = sha256(&text);
    let folder = store.join(&digest);
    std::fs::create_dir_all(&folder).expect("a folder");
    let write =
        |name: &str, bytes: &[u8]| std::fs::write(folder.join(name), bytes).expect("written");
    write("manifest.json", &text);
    write("manifest.json.sig", &[7; 64]);
    for (name, content) in parts {
        write(name, content);
        write(&format!("{name}.blocks"), &index(content));
    }
    (digest, root)
}

/// A line to `target` that counts what comes back over it, and is cut each time that so many bytes have.
struct Relay {
    address: SocketAddr,
    down: Arc<AtomicU64>,
    cuts: Arc<AtomicU64>,
}

impl Relay {
    async fn start(target: SocketAddr, cut_after: u64) -> Self {
        let listener = TcpListener::bind(SocketAddr::from(ANY)).await.expect("listens");
        let address = listener.local_addr().expect("an address");
        let (down, cuts) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (counted, cut) = (Arc::clone(&down), Arc::clone(&cuts));
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let far = TcpStream::connect(target).await.expect("the hub listens");
                let (counted, cut) = (Arc::clone(&counted), Arc::clone(&cut));
                tokio::spawn(async move {
                    let (mut near_in, mut near_out) = near.into_split();
                    let (mut far_in, mut far_out) = far.into_split();
                    let up = tokio::spawn(async move {
                        let _ = tokio::io::copy(&mut near_in, &mut far_out).await;
                    });
                    let mut buffer = vec![0; 2000];
                    let mut came = 0;
                    while let Ok(count @ 1..) = far_in.read(&mut buffer).await {
                        came += count as u64;
                        counted.fetch_add(count as u64, Ordering::Relaxed);
                        if came > cut_after {
                            cut.fetch_add(1, Ordering::Relaxed);
                            break;
                        }
                        if near_out.write_all(&buffer[..count]).await.is_err() {
                            break;
                        }
                    }
                    up.abort();
                });
            }
        });
        Self { address, down, cuts }
    }
}

/// The agent's part for versions, with PID 1 in the test's hands.
struct Node {
    order: watch::Sender<Option<Option<String>>>,
    facts: watch::Sender<Option<Facts>>,
    asks: mpsc::Receiver<Ask>,
    progress: watch::Receiver<OsProgress>,
    stop: CancellationToken,
}

impl Node {
    fn start(
        endpoint: Endpoint,
        credentials: &watch::Receiver<Option<Arc<Credentials>>>,
        store: PathBuf,
        source: PathBuf,
    ) -> Self {
        let (order, order_seen) = watch::channel(None);
        let (facts, facts_seen) = watch::channel(None);
        let (asks_in, asks) = mpsc::channel(4);
        let progress_in = watch::Sender::default();
        let progress = progress_in.subscribe();
        let running = Running { pods: vec!["ns/web".into()], connected: true };
        let pods = watch::Sender::new(running).subscribe();
        let parts = os::Parts {
            endpoint,
            credentials: credentials.clone(),
            order: order_seen,
            facts: facts_seen,
            pods,
            asks: asks_in,
            progress: progress_in,
            store,
            sources: Some(vec![source]),
        };
        let stop = CancellationToken::new();
        tokio::spawn(os::run(parts, stop.clone()));
        let node = Self { order, facts, asks, progress, stop };
        node.says(json!({}));
        node
    }

    /// PID 1 runs version 1, and has this to say besides.
    fn says(&self, more: Value) {
        let mut facts = json!({"version": "1", "releases": {"running": "1", "counter": 1}});
        facts.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
        self.facts.send_replace(Some(serde_json::from_value(facts).expect("facts")));
    }

    fn order(&self, version: &str, counter: u64, digest: &str) {
        let order = json!({"channel": "stable", "version": version, "counter": counter, "digest": format!("sha256:{digest}")});
        self.order.send_replace(Some(Some(order.to_string())));
    }

    /// The next question but those for the boot file, which this machine does not have.
    async fn ask(&mut self) -> Ask {
        loop {
            let ask = self.next_ask().await;
            if ask.line.get("boot-file").is_none() {
                return ask;
            }
            let failure = Failure { reason: "there is none".into(), hint: String::new() };
            let _ = ask.answer.send(Err(failure));
        }
    }

    async fn next_ask(&mut self) -> Ask {
        tokio::time::timeout(PATIENCE, self.asks.recv())
            .await
            .expect("in time")
            .expect("a question")
    }

    async fn wait_for(&mut self, good: impl Fn(&OsProgress) -> bool) -> OsProgress {
        let there = self.progress.wait_for(good);
        tokio::time::timeout(PATIENCE, there).await.expect("in time").expect("it runs").clone()
    }
}

/// A hub with a store, and what a node has that has joined it. The API goes last.
struct Hub {
    store: PathBuf,
    config: Config,
    credentials: watch::Receiver<Option<Arc<Credentials>>>,
    cloud: CloudCore,
    dir: tempfile::TempDir,
    _api: ApiServer,
}

impl Hub {
    async fn start() -> Self {
        skerry_edge::tls::install_provider();
        let dir = tempfile::tempdir().expect("a folder");
        let store = dir.path().join("hub");
        let api = start_api(dir.path()).await;
        let admin = api.client("admin", &["system:masters"]);
        let ttl = Duration::from_secs(3600);
        let cloud =
            start_cloud_with_store(&api, ANY.into(), ANY.into(), ttl, Some(store.clone())).await;
        let token = create_token(&admin, "edge1", Duration::from_secs(600)).await.expect("a token");
        let text = format!(
            "nodeName: edge1\nhub: wss://{}\nenrol: https://{}\ntoken: {token}\ndir: {}\n",
            cloud.hub_addr(),
            cloud.enrol_addr(),
            dir.path().join("edge").display(),
        );
        let config = Config::parse(Path::new("edge.yaml"), &text).expect("a configuration");
        let joined = skerry_edge::enrol::ensure(&config).await.expect("a certificate");
        let credentials = watch::Sender::new(Some(Arc::new(joined))).subscribe();
        Self { store, config, credentials, cloud, dir, _api: api }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_comes_over_a_line_that_is_cut_and_only_what_is_new_of_it() {
    let Hub { store: hub_store, config, credentials, cloud, dir, _api } = Hub::start().await;

    // The new root has most of the old one, elsewhere; 200 blocks and the tree are new. The UKI is new as a whole.
    let old = noise(1, 1000);
    let new = [&noise(2, 200), &old[..900 * BLOCK]].concat();
    let uki = [&noise(3, 64), &b"the end"[..]].concat();
    let source = dir.path().join("running");
    std::fs::write(&source, &old).expect("written");
    let (digest, root) = publish(&hub_store, "2", 2, &uki, &new);

    let relay = Relay::start(cloud.enrol_addr(), 80_000).await;
    let endpoint = Endpoint { port: relay.address.port(), ..config.enrol.clone() };
    let store = dir.path().join("update");
    let mut node = Node::start(endpoint, &credentials, store.clone(), source);
    node.order("2", 2, &digest);
    let Ask { line, answer } = node.ask().await;
    assert_eq!(line["update"]["dir"], store.join(&digest).to_str().expect("a path"));
    assert_eq!(
        (&line["update"]["pods"], &line["update"]["connected"]),
        (&json!(["ns/web"]), &json!(true))
    );
    let read = |name: &str| std::fs::read(store.join(&digest).join(name)).expect("there");
    assert!(read("root.img") == root && read("uki.efi") == uki, "every byte is right");
    assert_eq!(read("manifest.json.sig"), [7; 64]);

    let needed = (200 * BLOCK + (root.len() - new.len()) + uki.len()) as u64;
    let (came, cuts) = (relay.down.load(Ordering::Relaxed), relay.cuts.load(Ordering::Relaxed));
    assert!(cuts >= 10, "{cuts} cuts");
    // What is new, handshakes and indexes, and of each cut what was in the buffers of TLS.
    assert!(came < needed * 2, "{came} bytes for {needed} that are new, {cuts} cuts");

    // PID 1's work is followed, and its restart asked for.
    answer.send(Ok(())).expect("somebody waits");
    node.says(json!({"update": {"version": "2", "step": "writing", "percent": 10}}));
    let writing = |of: &OsProgress| of.step == OsStep::Installing && of.percent == Some(10);
    node.wait_for(writing).await;
    node.says(json!({"update": {"version": "2", "step": "committed"}}));
    let Ask { line, answer } = node.ask().await;
    assert!(line["reboot"]["reason"].as_str().is_some_and(|reason| reason.contains('2')), "{line}");
    answer.send(Ok(())).expect("somebody waits");

    // Back in the old version, with the reason.
    let bad = json!([{"version": "2", "digest": digest, "reason": "no link after 10 min"}]);
    node.says(json!({"releases": {"running": "1", "counter": 1, "bad": bad}}));
    let progress = node.wait_for(|progress| progress.step == OsStep::Failed).await;
    assert!(progress.reason.contains("no link after 10 min"), "{progress:?}");
    assert!(!store.join(&digest).exists(), "what was given up takes no room");
    node.stop.cancel();
    cloud.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_what_was_ordered_is_told_and_nothing_reaches_init() {
    let Hub { store: hub_store, config, credentials, cloud, dir, _api } = Hub::start().await;
    let content = noise(5, 20);
    let (good, _) = publish(&hub_store, "2", 2, &content, &content);
    let (spoiled, root) = publish(&hub_store, "3", 3, &content, &content);
    let path = hub_store.join(&spoiled).join("root.img");
    let mut bytes = root;
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(path, bytes).expect("written");

    let store = dir.path().join("update");
    let source = dir.path().join("nothing");
    let mut node = Node::start(config.enrol.clone(), &credentials, store, source);
    let absent = "cd".repeat(32);
    // Nobody answers the question for the boot file here: each is refused as it comes.
    let (told, asks) =
        (std::mem::replace(&mut node.asks, mpsc::channel(1).1), Arc::new(AtomicU64::new(0)));
    tokio::spawn({
        let (mut told, asks) = (told, Arc::clone(&asks));
        async move {
            while let Some(Ask { line, answer }) = told.recv().await {
                if line.get("boot-file").is_none() {
                    asks.fetch_add(1, Ordering::Relaxed);
                }
                let failure = Failure { reason: "no".into(), hint: String::new() };
                let _ = answer.send(Err(failure));
            }
        }
    });
    for (version, counter, digest, words) in [
        ("9", 9, &absent, "does not have this version"),
        ("2", 7, &good, "counter 2"),
        ("3", 3, &spoiled, "is not the one of the index"),
    ] {
        node.order(version, counter, digest);
        let there = node
            .progress
            .wait_for(|progress| progress.step == OsStep::Failed && progress.version == version);
        let progress =
            tokio::time::timeout(PATIENCE, there).await.expect("in time").expect("runs").clone();
        assert!(progress.reason.contains(words), "{progress:?}");
        assert!(!progress.hint.is_empty());
    }
    assert_eq!(asks.load(Ordering::Relaxed), 0, "init heard of none of them");
    node.stop.cancel();

    // A stranger gets nothing, not even a word of what there is.
    let config_of_nobody = skerry_edge::tls::unverified_config();
    let mut stream =
        skerry_edge::tls::connect(&config.enrol, config_of_nobody).await.expect("a connection");
    let request =
        format!("GET /os/{good}/manifest.json HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("written");
    let mut answer = vec![0; 12];
    stream.read_exact(&mut answer).await.expect("an answer");
    assert_eq!(answer, b"HTTP/1.1 401");
    cloud.shutdown().await;
}
