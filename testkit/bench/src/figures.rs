//! The figures of the link, one JSON line each. Runs inside the hub's namespace; the API server is in this process, the
//! hub, the agent and the simulated nodes are processes of their own.

use crate::child::Child;
use crate::emulator::{self, Emulator, Weather};
use crate::pki::Pki;
use anyhow::{Context, Result, ensure};
use futures::stream::{self, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use kube::api::{Api, Patch, PatchParams, PostParams};
use rusqlite::{Connection, OpenFlags};
use serde_json::{Value, json};
use skerry_apiserver::{ApiServer, Durability};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// No step takes longer on a working machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// Objects of the bulk figure, and the length of each one's payload in bytes.
const BULK_OBJECTS: usize = 1000;
const BULK_LEN: usize = 2048;
/// Pods that refer to the objects of the bulk figure.
const BULK_PODS: usize = 10;
/// The weather of the bulk figure.
const FAR: Weather = Weather { delay: Duration::from_millis(100), loss: 0.01 };
/// The weather of the resume figure: a mobile network.
const NEAR: Weather = Weather { delay: Duration::from_millis(25), loss: 0.0 };
/// Time between two looks at the database of a peer, which is locked meanwhile.
const PEER_LOOK_PAUSE: Duration = Duration::from_millis(250);
/// A resume that takes longer is named.
const RESUME_SLOW: Duration = Duration::from_secs(1);
/// Lines of the agent's log that are shown when it did not start.
const LOG_LINES: usize = 20;
/// Requests of the API that are made at once while a fleet is set up.
pub(crate) const PARALLEL: usize = 16;
/// Seconds in a month of 30 days.
const MONTH_S: f64 = 30.0 * 24.0 * 3600.0;
/// KubeEdge's values: bulk sync is one message a round trip, the wait before it dials again is fixed, and its idle
/// traffic was measured beside it.
const KUBEEDGE_BULK_S: f64 = 200.0;
const KUBEEDGE_RESUME_S: f64 = 30.0;
const KUBEEDGE_IDLE_BYTES: f64 = 81e6;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Plan {
    /// Folder of the built programs
    #[arg(long)]
    programs: PathBuf,
    /// Only these figures: bulk, resume, upstream, idle, fleet, hostile, peer
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only this transport of the link: quic or websocket
    #[arg(long)]
    transport: Option<String>,
    /// A KubeEdge EdgeCore, for the figure of our hub with it
    #[arg(long)]
    peer: Option<PathBuf>,
    /// Cuts of the resume figure
    #[arg(long, default_value_t = 200)]
    cuts: usize,
    /// Length of the idle measurement, in seconds
    #[arg(long, default_value_t = 300)]
    idle_seconds: u64,
    /// Cuts that neither end is told of
    #[arg(long, default_value_t = 100)]
    upstream_cuts: usize,
    /// Honest nodes beside a hostile one
    #[arg(long, default_value_t = 200)]
    honest: usize,
    /// Nodes of the fleet figures
    #[arg(long, default_value_t = 10_000)]
    nodes: usize,
    /// File that gets a line for each packet on the emulated link
    #[arg(long)]
    packets: Option<PathBuf>,
    /// Seed of all that is random
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Measures and prints.
pub(crate) async fn run(plan: Plan, hub_namespace: &str, node_namespace: &str) -> Result<()> {
    let wants = |figure: &str| plan.only.is_empty() || plan.only.iter().any(|only| only == figure);
    emulator::ip(&["-n", hub_namespace, "link", "set", "lo", "up"])?;
    let on_link = ["bulk", "resume", "upstream", "idle"].into_iter().any(wants);
    let with_peer = plan.peer.is_some() && wants("peer");
    if on_link || with_peer {
        let emulator =
            Emulator::start(hub_namespace, node_namespace, plan.seed, plan.packets.as_deref())?;
        for quic in [true, false] {
            let name = if quic { "quic" } else { "websocket" };
            if !on_link || plan.transport.as_ref().is_some_and(|only| only != name) {
                continue;
            }
            if ["bulk", "resume", "upstream"].into_iter().any(wants) {
                let site = Site::start(&plan, node_namespace, quic).await?;
                if wants("bulk") {
                    bulk(&site, &emulator, &format!("bulk_sync_{name}_s")).await?;
                }
                if wants("resume") {
                    resume(&site, &emulator, &plan, Cut::Cable, name).await?;
                }
                if wants("upstream") {
                    resume(&site, &emulator, &plan, Cut::Upstream, name).await?;
                }
                site.stop().await;
            }
            if wants("idle") {
                idle(&plan, &emulator, node_namespace, quic, name).await?;
            }
        }
        if let Some(program) = plan.peer.as_deref().filter(|_| with_peer) {
            let site = Site::start_peer(program, node_namespace).await?;
            bulk(&site, &emulator, "bulk_sync_go_edge_s").await?;
            site.stop().await;
        }
    }
    if wants("hostile") {
        crate::hostile::measure(plan.honest).await?;
    }
    if wants("fleet") {
        crate::fleet::measure(plan.nodes).await?;
    }
    Ok(())
}

/// Prints one figure.
pub(crate) fn print(figure: &str, unit: &str, value: f64, peer: Option<f64>) {
    print_of("link", figure, unit, value, peer);
}

/// Prints one figure of a bench.
pub(crate) fn print_of(bench: &str, figure: &str, unit: &str, value: f64, peer: Option<f64>) {
    let round = |value: f64| (value * 10_000.0).round() / 10_000.0;
    let ratio = peer.map(|peer| round(value / peer));
    println!(
        "{}",
        json!({"bench": bench, "figure": figure, "unit": unit, "value": round(value), "peer": peer, "ratio": ratio})
    );
}

/// Says what is going on, on standard error.
pub(crate) fn say(text: impl AsRef<str>) {
    eprintln!("bench: {}", text.as_ref());
}

/// The cloud side: API server and hub, with a CA of its own.
pub(crate) struct Cloud {
    /// Administrator's client.
    pub(crate) admin: kube::Client,
    /// The CA of nodes.
    pub(crate) pki: Pki,
    /// The hub's process.
    pub(crate) hub: Child,
    /// The hub's addresses: `hub`, `quic`, `enrol`, `tunnel`, `monitor`.
    pub(crate) addresses: Value,
    api: ApiServer,
    dir: tempfile::TempDir,
}

impl Cloud {
    /// Starts both; the hub listens on `address` with free ports.
    pub(crate) async fn start(
        address: &str,
        objects: impl AsyncFnOnce(&kube::Client) -> Result<()>,
    ) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let config = skerry_apiserver::Config {
            dir: dir.path().join("api"),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            hostnames: Vec::new(),
            node_streams: None,
            durability: Durability::Relaxed,
            controllers: false,
        };
        let api = ApiServer::start(config).await?;
        let admin = api.client("admin", &[skerry_apiserver::auth::MASTERS]);
        let pki = Pki::install(&admin).await?;
        objects(&admin).await?;
        let kubeconfig = dir.path().join("hub.kubeconfig");
        std::fs::write(&kubeconfig, api.kubeconfig("cloudcore", &["skerry:cloudcore"])?)?;
        let path = kubeconfig.to_str().context("the path is no text")?;
        let mut hub = Child::of_self(&["hub", "--kubeconfig", path, "--address", address])?;
        let addresses = hub.answer().context("the hub did not start")?;
        Ok(Self { admin, pki, hub, addresses, api, dir })
    }

    /// The address with this name, as `host:port`.
    pub(crate) fn address(&self, name: &str) -> Result<&str> {
        self.addresses[name].as_str().with_context(|| format!("the hub has no address `{name}`"))
    }

    /// A folder that goes with the fleet.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Ends both.
    pub(crate) async fn stop(self) {
        drop(self.hub);
        self.api.shutdown().await;
    }
}

/// A cloud and one agent in the other namespace.
struct Site {
    cloud: Cloud,
    agent: Child,
    /// The agent's database, and the table in which it keeps objects.
    database: PathBuf,
    table: &'static str,
    /// Time between two looks at it.
    look_pause: Duration,
}

/// What is cut, and who is told.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// The cable of the node; its system is told.
    Cable,
    /// Something in between; nobody is told.
    Upstream,
}

impl Site {
    const NODE: &str = "bench-edge";

    async fn start(plan: &Plan, namespace: &str, quic: bool) -> Result<Self> {
        Self::start_with(plan, namespace, quic, 25).await
    }

    async fn start_with(plan: &Plan, namespace: &str, quic: bool, beat: u64) -> Result<Self> {
        let cloud = Cloud::start(emulator::HUB, async |_| Ok(())).await?;
        let dir = cloud.dir().join("edge");
        std::fs::create_dir_all(&dir)?;
        let token = skerry_cloudcore::create_token(&cloud.admin, Self::NODE, PATIENCE).await?;
        let config = json!({
            "nodeName": Self::NODE,
            "hub": format!("wss://{}", cloud.address("hub")?),
            "quic": if quic { format!("quic://{}", cloud.address("quic")?) } else { "off".to_owned() },
            "enrol": format!("https://{}", cloud.address("enrol")?),
            "tunnel": format!("wss://{}", cloud.address("tunnel")?),
            "token": token.to_string(),
            "dir": dir.join("state"),
            "podDir": dir.join("pods"),
            "podLogDir": dir.join("logs"),
            // Nobody listens there: pods stay pending, and the link is all that is measured.
            "runtimeSocket": dir.join("none.sock"),
            "nodeIP": emulator::NODE,
            "beat": beat,
        });
        let file = dir.join("edgecore.yaml");
        std::fs::write(&file, config.to_string())?;
        let program = plan.programs.join("edgecore");
        let agent = Child::in_namespace(
            namespace,
            &program,
            &["run", "--config", file.to_str().context("the path is no text")?],
            &dir.join("edgecore.log"),
        )?;
        let database = dir.join("state/state.db");
        let site = Self { cloud, agent, database, table: "objects", look_pause: Duration::ZERO };
        let nodes: Api<Node> = Api::all(site.cloud.admin.clone());
        let registered =
            wait("the node to register", async || Ok(nodes.get_opt(Self::NODE).await?.is_some()));
        if let Err(error) = registered.await {
            return Err(error.context(tail(&dir.join("edgecore.log"))));
        }
        Ok(site)
    }

    /// With a KubeEdge EdgeCore. Its pod engine is off, so that it needs no container runtime; the Node is made here.
    async fn start_peer(program: &Path, namespace: &str) -> Result<Self> {
        let cloud = Cloud::start(emulator::HUB, async |_| Ok(())).await?;
        let dir = cloud.dir().join("edge");
        std::fs::create_dir_all(&dir)?;
        let nodes: Api<Node> = Api::all(cloud.admin.clone());
        let node = json!({"metadata": {"name": Self::NODE, "labels": {"node-role.kubernetes.io/edge": ""}}});
        nodes.create(&PostParams::default(), &object(node)?).await?;
        let token = skerry_cloudcore::create_token(&cloud.admin, Self::NODE, PATIENCE).await?;
        let off = json!({"enable": false});
        let config = json!({
            "apiVersion": "edgecore.config.kubeedge.io/v1alpha2",
            "kind": "EdgeCore",
            "database": {"dataSource": dir.join("edgecore.db")},
            "modules": {
                "edgeHub": {
                    "enable": true,
                    "httpServer": format!("https://{}", cloud.address("enrol")?),
                    "token": token.to_string(),
                    "tlsCaFile": dir.join("ca.crt"), "tlsCertFile": dir.join("edge.crt"),
                    "tlsPrivateKeyFile": dir.join("edge.key"),
                    "websocket": {"enable": true, "server": cloud.address("hub")?},
                    "quic": off,
                },
                "edged": {"enable": false, "hostnameOverride": Self::NODE, "nodeIP": emulator::NODE},
                "metaManager": {"enable": true, "metaServer": off},
                "edgeStream": off, "eventBus": off, "deviceTwin": off, "serviceBus": off,
                "taskManager": off,
            },
        });
        let file = dir.join("edgecore.yaml");
        std::fs::write(&file, config.to_string())?;
        let log = dir.join("edgecore.log");
        let arguments = ["--config", file.to_str().context("the path is no text")?];
        let agent = Child::in_namespace(namespace, program, &arguments, &log)?;
        let database = dir.join("edgecore.db");
        let mut site = Self { cloud, agent, database, table: "meta", look_pause: PEER_LOOK_PAUSE };
        let connected = async {
            let start = Instant::now();
            while site.cloud.hub.ask("links")?["links"] != 1 {
                ensure!(start.elapsed() < PATIENCE, "the peer did not connect");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Ok(())
        };
        let connected = connected.await;
        connected.map_err(|error: anyhow::Error| error.context(tail(&log)))?;
        Ok(site)
    }

    async fn stop(self) {
        drop(self.agent);
        self.cloud.stop().await;
    }
}

/// The last lines of an agent's log.
fn tail(log: &Path) -> String {
    let log = std::fs::read_to_string(log).unwrap_or_default();
    let mut lines: Vec<&str> = log.lines().rev().take(LOG_LINES).collect();
    lines.reverse();
    format!("the agent said:\n{}", lines.join("\n"))
}

/// Waits until the answer is yes.
pub(crate) async fn wait(what: &str, question: impl AsyncFn() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    let mut told = start;
    while !question().await? {
        ensure!(start.elapsed() < PATIENCE, "waited {} s for {what}", PATIENCE.as_secs());
        if told.elapsed() > Duration::from_secs(5) {
            told = Instant::now();
            say(format!("waiting for {what} ({} s)", start.elapsed().as_secs()));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// The agent's database, read beside it.
fn open(path: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let database = Connection::open_with_flags(path, flags);
    let database = database.context("could not open the agent's database")?;
    database.busy_timeout(PATIENCE)?;
    Ok(database)
}

/// Text that deflate cannot shrink to nothing: hexadecimal digits, four bits of a byte each.
pub(crate) fn payload(seed: u64, len: usize) -> String {
    use rand::{Rng, SeedableRng, rngs::StdRng};
    let mut random = StdRng::seed_from_u64(seed);
    (0..len).map(|_| char::from_digit(random.random_range(0..16), 16).expect("a digit")).collect()
}

/// ConfigMaps first, then the pods that want them: the clock runs from the first pod to the last row on the node's disk.
async fn bulk(site: &Site, emulator: &Emulator, figure: &str) -> Result<()> {
    emulator.set(FAR);
    let configs: Api<ConfigMap> = Api::namespaced(site.cloud.admin.clone(), "default");
    stream::iter(0..BULK_OBJECTS)
        .map(Ok::<_, anyhow::Error>)
        .try_for_each_concurrent(PARALLEL, |index| {
            let configs = configs.clone();
            async move {
                let config = object(json!({
                    "metadata": {"name": format!("bulk-{index:04}")},
                    "data": {"payload": payload(index as u64, BULK_LEN)},
                }))?;
                configs.create(&PostParams::default(), &config).await?;
                Ok(())
            }
        })
        .await?;
    let pods: Api<Pod> = Api::namespaced(site.cloud.admin.clone(), "default");
    let start = Instant::now();
    let share = BULK_OBJECTS / BULK_PODS;
    for pod in 0..BULK_PODS {
        let sources: Vec<Value> = (pod * share..(pod + 1) * share)
            .map(|index| json!({"configMapRef": {"name": format!("bulk-{index:04}")}}))
            .collect();
        let pod = object(json!({
            "metadata": {"name": format!("bulk-{pod}")},
            "spec": {"nodeName": Site::NODE, "automountServiceAccountToken": false,
                "containers": [{"name": "c", "image": "none", "envFrom": sources}]},
        }))?;
        pods.create(&PostParams::default(), &pod).await?;
    }
    let database = open(&site.database)?;
    let held = format!(
        "SELECT count(*) FROM {} WHERE type = 'configmap' AND key LIKE 'default/configmap/bulk-%'",
        site.table
    );
    wait("the last object", async || {
        // A peer's database is locked while it is read.
        tokio::time::sleep(site.look_pause).await;
        let count: i64 = database.query_row(&held, [], |row| row.get(0))?;
        Ok(usize::try_from(count)? == BULK_OBJECTS)
    })
    .await?;
    let took = start.elapsed().as_secs_f64();
    print(figure, "s", took, Some(KUBEEDGE_BULK_S));
    emulator.set(Weather::default());
    Ok(())
}

/// Nothing gets through, an object changes, the way is open again: how long until the change is on the node's disk?
async fn resume(
    site: &Site,
    emulator: &Emulator,
    plan: &Plan,
    cut: Cut,
    transport: &str,
) -> Result<()> {
    use rand::{Rng, SeedableRng, rngs::StdRng};
    let mut random = StdRng::seed_from_u64(plan.seed);
    let configs: Api<ConfigMap> = Api::namespaced(site.cloud.admin.clone(), "default");
    let pods: Api<Pod> = Api::namespaced(site.cloud.admin.clone(), "default");
    let (delta, cuts, figure) = match cut {
        Cut::Cable => ("delta", plan.cuts, "resume"),
        Cut::Upstream => ("delta-upstream", plan.upstream_cuts, "resume_upstream"),
    };
    let config = object(json!({"metadata": {"name": delta}, "data": {"value": "start"}}))?;
    configs.create(&PostParams::default(), &config).await?;
    let pod = object(json!({
        "metadata": {"name": delta},
        "spec": {"nodeName": Site::NODE, "automountServiceAccountToken": false,
            "containers": [{"name": "c", "image": "none", "envFrom": [{"configMapRef": {"name": delta}}]}]},
    }))?;
    pods.create(&PostParams::default(), &pod).await?;
    let database = open(&site.database)?;
    let held = async |value: &str| {
        let row = database.query_row(
            "SELECT json FROM objects WHERE key = ?1",
            [format!("default/configmap/{delta}")],
            |row| row.get::<_, String>(0),
        );
        let json = match row {
            Ok(json) => json,
            Err(rusqlite::Error::QueryReturnedNoRows) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let object: Value = serde_json::from_str(&json)?;
        Ok(object["data"]["value"] == *value)
    };
    emulator.set(NEAR);
    wait("the object before the first cut", async || held("start").await).await?;
    let mut times = Vec::with_capacity(cuts);
    for number in 0..cuts {
        match cut {
            Cut::Cable => emulator.unplug()?,
            Cut::Upstream => emulator.block(),
        }
        let value = number.to_string();
        let patch = json!({"data": {"value": value}});
        configs.patch(delta, &PatchParams::default(), &Patch::Merge(&patch)).await?;
        let lasts = Duration::from_millis(random.random_range(200..3000));
        tokio::time::sleep(lasts).await;
        let start = Instant::now();
        match cut {
            Cut::Cable => emulator.plug()?,
            Cut::Upstream => emulator.unblock(),
        }
        wait("the change after a cut", async || held(&value).await).await?;
        let took = start.elapsed();
        if took > RESUME_SLOW {
            say(format!("cut {number} of {lasts:.1?} took {took:.2?}"));
        }
        times.push(took.as_secs_f64());
        if number % 20 == 19 {
            say(format!("{} of {cuts} cuts ({transport})", number + 1));
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(100..500))).await;
    }
    times.sort_by(f64::total_cmp);
    let at = |share: f64| {
        times[((times.len() as f64 * share).ceil() as usize).clamp(1, times.len()) - 1]
    };
    print(&format!("{figure}_p50_{transport}_s"), "s", at(0.5), Some(KUBEEDGE_RESUME_S));
    print(&format!("{figure}_p99_{transport}_s"), "s", at(0.99), Some(KUBEEDGE_RESUME_S));
    emulator.set(Weather::default());
    Ok(())
}

/// Bytes of a node that has nothing to do, with IP headers, both directions.
async fn idle(
    plan: &Plan,
    emulator: &Emulator,
    namespace: &str,
    quic: bool,
    transport: &str,
) -> Result<()> {
    emulator.set(NEAR);
    let site = Site::start_with(plan, namespace, quic, 60).await?;
    // Registration, first statuses and the search for the largest packet are not idle traffic.
    tokio::time::sleep(Duration::from_secs(45)).await;
    let (packets, bytes) = emulator.carried();
    say(format!("{} s of silence ({transport})", plan.idle_seconds));
    tokio::time::sleep(Duration::from_secs(plan.idle_seconds)).await;
    let (packets_after, bytes_after) = emulator.carried();
    let month = (bytes_after - bytes) as f64 * MONTH_S / plan.idle_seconds as f64;
    print(&format!("idle_bytes_per_month_{transport}"), "bytes", month, Some(KUBEEDGE_IDLE_BYTES));
    print(
        &format!("idle_packets_per_hour_{transport}"),
        "packets",
        (packets_after - packets) as f64 * 3600.0 / plan.idle_seconds as f64,
        None,
    );
    emulator.set(Weather::default());
    site.stop().await;
    Ok(())
}

/// Reads an object that this program wrote itself.
pub(crate) fn object<T: serde::de::DeserializeOwned>(value: Value) -> Result<T> {
    Ok(serde_json::from_value(value)?)
}
