//! `skerry up`: a whole fleet on this machine.
//!
//! API server, CloudCore and reconciler run in this process; each edge node is a containerd and an `edgecore` of its
//! own below one folder. Everything that is started here is stopped here, also when a later step fails.

use crate::demo::{self, Demo};
use crate::fault::hinted;
use crate::services::Listen;
use crate::site::{self, Endpoints, Node};
use crate::{Output, out, seed};
use anyhow::{Context, Result};
use serde_json::json;
use skerry_apiserver::{ApiServer, Durability, NodeStream, NodeStreamError, NodeStreams};
use skerry_cloudcore::{CloudCore, RouterConfig, StreamError};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How often the reconciler looks at the local remote's branch, which costs one small read.
const POLL: Duration = Duration::from_millis(250);
/// Longest wait for a folder that another process holds.
const LOCK_WAIT: Duration = Duration::from_secs(1);
/// A step that takes longer says what it waits for.
const SILENCE_MAX: Duration = Duration::from_secs(2);
/// Longest wait for the services to stop, before the process ends all the same.
const STOP_LIMIT: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of everything that runs: databases, keys, Git remote, nodes
    #[arg(long)]
    dir: PathBuf,
    /// Fleet folder that the Git remote is made from, when there is none yet
    #[arg(long)]
    template: Option<PathBuf>,
    /// Folder of image archives (OCI layouts in tar files) that the nodes load
    #[arg(long)]
    images: Option<PathBuf>,
    /// Program of the agent (default: `edgecore` beside this program)
    #[arg(long)]
    edgecore: Option<PathBuf>,
    /// Edge nodes to run here, by name; `none` for no node
    #[arg(long = "node", default_value = "lisbon-01-a")]
    nodes: Vec<String>,
    /// A broker, mappers and a simulated fridge on the first node, where mosquitto is installed: `auto` or `off`
    #[arg(long, default_value = "auto")]
    devices: demo::Mode,
    /// Where the Kubernetes API listens
    #[arg(long, default_value = "127.0.0.1:6443")]
    api_listen: SocketAddr,
    /// Where the hub listens
    #[arg(long, default_value = "127.0.0.1:10000")]
    hub_listen: SocketAddr,
    /// Where the hub listens for QUIC of the nodes (UDP), or `off`
    #[arg(long, default_value = "127.0.0.1:10001")]
    quic_listen: Listen,
    /// Where nodes enrol
    #[arg(long, default_value = "127.0.0.1:10002")]
    enrol_listen: SocketAddr,
    /// Where the nodes' log tunnels arrive
    #[arg(long, default_value = "127.0.0.1:10004")]
    tunnel_listen: SocketAddr,
    /// Where links (/links) and counters (/metrics) are served, without authentication, or `off`
    #[arg(long, default_value = "127.0.0.1:9091")]
    monitor_listen: Listen,
    /// Where the router takes HTTPS for rules that join applications to the buses of nodes (KubeEdge's port is 9443), from
    /// whoever has a bearer token of the cluster and may create `rules/messages` of rules.kubeedge.io
    #[arg(long, default_value = "off")]
    router_listen: Listen,
    /// The router takes HTTP from everybody, without TLS and authentication, as KubeEdge's
    #[arg(long)]
    router_open: bool,
    /// What the nodes dial instead of the addresses above: HUB,ENROL,TUNNEL or HUB,ENROL,TUNNEL,QUIC; without QUIC they
    /// use the hub's WebSocket only
    #[arg(long, value_delimiter = ',')]
    node_endpoints: Option<Vec<SocketAddr>>,
    /// Folder with versions of the appliance's OS, as `skerry image publish` fills it (default: `os` in the folder of
    /// everything)
    #[arg(long)]
    os_store: Option<PathBuf>,
    /// Another name or address under which nodes reach this program; may be repeated
    #[arg(long)]
    advertise: Vec<String>,
    /// Write KubeEdge's shared join token to Secret `kubeedge/tokensecret` and accept it: whoever has it may join as
    /// any node
    #[arg(long)]
    kubeedge_shared_token: bool,
}

/// Starts everything, says so, waits for Ctrl-C, stops everything.
pub(crate) async fn run(args: Args, output: Output) -> Result<ExitCode> {
    let start = Instant::now();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    std::fs::create_dir_all(&args.dir)
        .with_context(|| format!("could not make the folder `{}`", args.dir.display()))?;
    let dir = args.dir.canonicalize()?;
    let _lock = lock(&dir).await?;
    let facts = dir.join("up.json");
    remove_if_there(&facts)?;
    let edgecore = check_nodes(&args)?;

    let mut stack = tokio::select! {
        stack = patient("API, CloudCore and reconciler", Stack::start(&args, &dir)) => stack?,
        _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
        _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
    };
    let outcome = async {
        tokio::select! {
            started = stack.start_nodes(&args, &dir, edgecore.as_deref()) => started?,
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        }
        let description = stack.describe(&dir);
        write_whole(&facts, &serde_json::to_vec_pretty(&description)?)?;
        let told = match output {
            Output::Json => out::line(&description),
            Output::Table => out::text(&guide(&description, start.elapsed())),
        };
        if let Err(error) = told {
            // Whoever started this does not read; the fleet runs all the same.
            tracing::debug!(error = format!("{error:#}"), "standard output is closed");
        }
        tokio::select! {
            _ = interrupt.recv() => Ok(()),
            _ = terminate.recv() => Ok(()),
            error = stack.failed() => Err(error),
        }
    }
    .await;
    eprintln!("skerry: stopping");
    let stopped = stack.stop().await;
    remove_if_there(&facts)?;
    outcome.and(stopped)?;
    Ok(ExitCode::SUCCESS)
}

/// Everything that runs.
struct Stack {
    api: ApiServer,
    cloud: CloudCore,
    reconciler: tokio::task::JoinHandle<Result<()>>,
    stop: CancellationToken,
    nodes: Vec<Node>,
    /// Ports of the devices, and what runs for them.
    ports: Option<demo::Ports>,
    demo: Option<Demo>,
    /// Folders of nodes whose start has begun: one that broke off leaves processes, and is in no other list.
    begun: Vec<PathBuf>,
    kubeconfig: PathBuf,
    remote: PathBuf,
}

impl Stack {
    async fn start(args: &Args, dir: &Path) -> Result<Self> {
        let remote = dir.join("fleet.git");
        let template = args.template.as_deref().map(|folder| {
            folder.canonicalize().with_context(|| {
                format!("could not find the template folder `{}`", folder.display())
            })
        });
        let template = template.transpose()?;
        let mode = if node_names(args).next().is_none() { demo::Mode::Off } else { args.devices };
        let ports = demo::Ports::choose(dir, mode, remote.exists())?;
        let vars = ports.map(demo::Ports::vars).unwrap_or_default();
        seed::remote(&remote, template.as_deref(), &vars).await?;

        let streams = Arc::new(TunnelStreams::default());
        let api = ApiServer::start(skerry_apiserver::Config {
            dir: dir.join("api"),
            listen: free(args.api_listen),
            hostnames: vec!["localhost".into(), "127.0.0.1".into()],
            node_streams: Some(Arc::clone(&streams) as Arc<dyn NodeStreams>),
            durability: Durability::Full,
            controllers: true,
        })
        .await
        .map_err(|error| match error.hint() {
            Some(hint) => hinted(format!("{:#}", anyhow::Error::new(error)), hint),
            None => error.into(),
        })?;
        let kubeconfig = dir.join("kubeconfig");
        let admin = api.kubeconfig("admin", &["system:masters"])?;
        write_secret(&kubeconfig, admin.as_bytes())?;

        let cloud = CloudCore::start(
            api.client("system:cloudcore", &["skerry:cloudcore"]),
            skerry_cloudcore::Config {
                hub: free(args.hub_listen),
                quic: args.quic_listen.0.map(free_udp),
                monitor: args.monitor_listen.0.map(free),
                admission: skerry_cloudcore::ADMISSION_RATE,
                enrol: free(args.enrol_listen),
                tunnel: free(args.tunnel_listen),
                advertise: [&["localhost".into(), "127.0.0.1".into()][..], &args.advertise]
                    .concat(),
                os_store: Some(args.os_store.clone().unwrap_or_else(|| dir.join("os"))),
                node_certificate_ttl: skerry_cloudcore::NODE_CERTIFICATE_TTL,
                shared_token: args.kubeedge_shared_token,
                router: args
                    .router_listen
                    .0
                    .map(|address| RouterConfig { listen: free(address), open: args.router_open }),
                impersonate: false,
            },
        )
        .await?;
        // Set once, here: the API server had to exist before the hub.
        let _ = streams.cloud.set(cloud.streams());

        let stop = CancellationToken::new();
        let reconciler = tokio::spawn({
            let client = api.client("system:reconciler", &["skerry:reconciler"]);
            let config = skerry_reconciler::Config {
                remote: remote.to_string_lossy().into_owned(),
                branch: seed::BRANCH.into(),
                dir: dir.join("reconciler"),
                poll: POLL,
            };
            let stop = stop.clone();
            async move { Ok(skerry_reconciler::run(client, config, stop).await?) }
        });
        Ok(Self {
            api,
            cloud,
            reconciler,
            stop,
            nodes: Vec::new(),
            ports,
            demo: None,
            begun: Vec::new(),
            kubeconfig,
            remote,
        })
    }

    async fn start_nodes(
        &mut self,
        args: &Args,
        dir: &Path,
        edgecore: Option<&Path>,
    ) -> Result<()> {
        let Some(edgecore) = edgecore else { return Ok(()) };
        let endpoints = match args.node_endpoints.as_deref() {
            Some(&[hub, enrol, tunnel]) => Endpoints { hub, enrol, tunnel, quic: None },
            Some(&[hub, enrol, tunnel, quic]) => Endpoints { hub, enrol, tunnel, quic: Some(quic) },
            Some(_) => {
                let hint = "for example 127.0.0.1:1,127.0.0.1:2,127.0.0.1:3";
                return Err(hinted("--node-endpoints takes three or four addresses", hint));
            }
            None => Endpoints {
                hub: self.cloud.hub_addr(),
                enrol: self.cloud.enrol_addr(),
                tunnel: self.cloud.tunnel_addr(),
                quic: self.cloud.quic_addr(),
            },
        };
        // With a relay between, enrolment may need the hub's addresses before everything is up.
        write_whole(&dir.join("up.json"), &serde_json::to_vec_pretty(&self.addresses())?)?;
        for name in node_names(args) {
            self.begun.push(dir.join("nodes").join(name));
            let start = Node::start(dir, name, args.images.as_deref());
            let mut node =
                patient(&format!("containerd and images of node `{name}`"), start).await?;
            let token = if node.is_enrolled() {
                None
            } else {
                let client = self.api.client("admin", &["system:masters"]);
                let ttl = Duration::from_secs(3600);
                Some(skerry_cloudcore::create_token(&client, name, ttl).await?.to_string())
            };
            if let Some(ports) = self.ports.take() {
                match Demo::start(node.dir(), ports).await {
                    Ok(demo) => self.demo = Some(demo),
                    // A fleet without devices is a fleet.
                    Err(error) => eprintln!("skerry: no devices run here: {error:#}"),
                }
            }
            let devices = self.demo.as_ref().filter(|demo| demo.is_of(node.dir()));
            let run = node.run_agent(edgecore, &endpoints, token, devices.map(Demo::side));
            self.nodes.push(node);
            run?;
        }
        Ok(())
    }

    fn addresses(&self) -> serde_json::Value {
        json!({
            "ready": false,
            "hub": self.cloud.hub_addr().to_string(),
            "enrol": self.cloud.enrol_addr().to_string(),
            "tunnel": self.cloud.tunnel_addr().to_string(),
            "quic": self.cloud.quic_addr().map(|address| address.to_string()),
            "router": self.cloud.router_addr().map(|address| address.to_string()),
            "monitor": self.cloud.monitor_addr().map(|address| format!("http://{address}")),
        })
    }

    /// What `up.json` says, for people's scripts and our own tests.
    fn describe(&self, dir: &Path) -> serde_json::Value {
        let mut facts = self.addresses();
        facts["ready"] = true.into();
        facts["pid"] = std::process::id().into();
        facts["dir"] = dir.to_string_lossy().into();
        facts["api"] = format!("https://{}", self.api.addr()).into();
        facts["kubeconfig"] = self.kubeconfig.to_string_lossy().into();
        facts["remote"] = self.remote.to_string_lossy().into();
        facts["branch"] = seed::BRANCH.into();
        facts["nodes"] = self.nodes.iter().map(Node::describe).collect();
        facts["devices"] = self.demo.as_ref().map_or(serde_json::Value::Null, Demo::describe);
        facts
    }

    /// Returns when the reconciler ended by itself, which it does only when it cannot go on.
    async fn failed(&mut self) -> anyhow::Error {
        match (&mut self.reconciler).await {
            Ok(Ok(())) => anyhow::anyhow!("the reconciler ended"),
            Ok(Err(error)) => error.context("the reconciler ended"),
            Err(panic) => anyhow::Error::new(panic).context("the reconciler ended"),
        }
    }

    /// Stops the nodes first, so that nothing waits for a hub that is gone.
    async fn stop(self) -> Result<()> {
        let mut outcome = Ok(());
        for node in self.nodes {
            let what = format!("the pods of node `{}` to stop", node.name());
            outcome = outcome.and(patient(&what, node.stop()).await);
        }
        if let Some(demo) = self.demo {
            demo.stop().await;
        }
        for dir in self.begun {
            outcome = outcome.and(site::clear(&dir).await);
        }
        self.stop.cancel();
        let services = async {
            // Ended already, by cancellation or by an error that was reported where it happened.
            let _ = self.reconciler.await;
            self.cloud.shutdown().await;
            self.api.shutdown().await;
        };
        if tokio::time::timeout(STOP_LIMIT, services).await.is_err() {
            eprintln!("skerry: the services did not stop within {} s", STOP_LIMIT.as_secs());
        }
        outcome
    }
}

/// Hands `kubectl logs` to the tunnel of the node that has them.
#[derive(Default)]
struct TunnelStreams {
    cloud: OnceLock<skerry_cloudcore::Streams>,
}

impl NodeStreams for TunnelStreams {
    fn open(
        &self,
        node: &str,
        path_and_query: &str,
    ) -> futures::future::BoxFuture<'static, Result<NodeStream, NodeStreamError>> {
        let streams = self.cloud.get().cloned();
        let (node, path) = (node.to_owned(), path_and_query.to_owned());
        Box::pin(async move {
            let Some(streams) = streams else {
                return Err(NodeStreamError::NotConnected { node });
            };
            match streams.open(&node, &path).await {
                Ok(stream) => Ok(NodeStream { status: 200, body: Box::pin(stream) }),
                Err(StreamError::NotConnected { node }) => {
                    Err(NodeStreamError::NotConnected { node })
                }
                Err(error) => Err(NodeStreamError::Failed { node, detail: error.to_string() }),
            }
        })
    }
}

fn guide(facts: &serde_json::Value, took: Duration) -> String {
    let text = |pointer: &str| facts.pointer(pointer).and_then(|v| v.as_str()).unwrap_or("-");
    let skerry = std::env::current_exe()
        .map_or_else(|_| "skerry".into(), |program| program.to_string_lossy().into_owned());
    let kubeconfig = text("/kubeconfig");
    let mut lines = vec![format!("Skerry is up after {:.1} s.\n", took.as_secs_f64())];
    lines.push(format!("  clone    git clone {} my-fleet", text("/remote")));
    lines.push("  push     change a file, git commit -a, git push".to_owned());
    lines.push(format!("  look     {skerry} --kubeconfig {kubeconfig} status"));
    lines.push(format!("           kubectl --kubeconfig {kubeconfig} get pods -A"));
    if facts["monitor"].is_string() {
        lines.push(format!("           {skerry} link --monitor {}", text("/monitor")));
    }
    if facts["devices"].is_object() {
        let device = format!("{skerry} --kubeconfig {kubeconfig} device");
        lines.push(format!("  devices  {device} list"));
        lines.push(format!("           {device} get lisbon-01/fridge"));
        lines.push(format!("           {device} watch lisbon-01"));
        lines.push(format!("  warm it  {device} set lisbon-01/fridge setpoint=8"));
        lines.push(
            "           the rule `too-warm` lights its lamp and tells `fridge-watch`: its log says so".to_owned(),
        );
        lines.push(format!(
            "  broker   {}, simulated fridge at {}",
            text("/devices/broker"),
            text("/devices/fridge")
        ));
    }
    for node in facts["nodes"].as_array().into_iter().flatten() {
        let text = |key: &str| node[key].as_str().unwrap_or("-");
        lines.push(format!("  node     {}, its log is {}", text("name"), text("log")));
    }
    lines.push("  stop     Ctrl-C\n\n".to_owned());
    lines.join("\n")
}

fn node_names(args: &Args) -> impl Iterator<Item = &String> {
    args.nodes.iter().filter(|name| *name != "none")
}

/// Finds the mistakes in what the nodes need before anything runs; returns the agent's program, if there are nodes.
fn check_nodes(args: &Args) -> Result<Option<PathBuf>> {
    use std::os::unix::fs::PermissionsExt;
    if node_names(args).next().is_none() {
        return Ok(None);
    }
    // A name becomes a folder here; what else is wrong with it is told when the node's token is made.
    if let Some(name) = node_names(args)
        .find(|name| name.is_empty() || name.contains(['/', '\0']) || name.starts_with('.'))
    {
        let hint = "use lower-case letters, digits, `-` and `.`";
        return Err(hinted(format!("`{name}` cannot be the name of a node"), hint));
    }
    let program = match &args.edgecore {
        Some(program) => program.clone(),
        None => std::env::current_exe()?.with_file_name("edgecore"),
    };
    let hint =
        "name the `edgecore` program with --edgecore, or run no node here with `--node none`";
    let found = program.canonicalize().ok().filter(|file| {
        file.metadata()
            .is_ok_and(|facts| facts.is_file() && facts.permissions().mode() & 0o111 != 0)
    });
    let Some(program) = found else {
        return Err(hinted(format!("`{}` is no program", program.display()), hint));
    };
    if let Some(images) = &args.images {
        std::fs::read_dir(images)
            .with_context(|| format!("could not read the image folder `{}`", images.display()))?;
    }
    Ok(Some(program))
}

/// The address itself, or a free port of the same host when somebody listens there already.
fn free(wanted: SocketAddr) -> SocketAddr {
    free_if(wanted, TcpListener::bind(wanted).is_ok())
}

/// The same for UDP.
fn free_udp(wanted: SocketAddr) -> SocketAddr {
    free_if(wanted, UdpSocket::bind(wanted).is_ok())
}

fn free_if(wanted: SocketAddr, is_free: bool) -> SocketAddr {
    if is_free {
        return wanted;
    }
    eprintln!("skerry: {wanted} is in use; taking a free port instead");
    SocketAddr::new(wanted.ip(), 0)
}

/// One `skerry up` per folder. One that was just killed holds its folder for as long as the system takes to end it.
async fn lock(dir: &Path) -> Result<std::fs::File> {
    let path = dir.join("lock");
    let file = std::fs::File::create(&path)
        .with_context(|| format!("could not write `{}`", path.display()))?;
    let start = Instant::now();
    while file.try_lock().is_err() {
        if start.elapsed() > LOCK_WAIT {
            return Err(hinted(
                format!("another `skerry up` runs in `{}`", dir.display()),
                "stop it, or give this one a folder of its own with --dir",
            ));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(file)
}

/// Awaits `step`, and says so when that takes long.
async fn patient<T>(what: &str, step: impl Future<Output = T>) -> T {
    let mut step = std::pin::pin!(step);
    tokio::select! {
        done = &mut step => return done,
        () = tokio::time::sleep(SILENCE_MAX) => eprintln!("skerry: waiting for {what}"),
    }
    step.await
}

fn remove_if_there(file: &Path) -> Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Writes beside and renames, so that a reader sees the old or the new text.
pub(crate) fn write_whole(file: &Path, bytes: &[u8]) -> Result<()> {
    let half = file.with_extension("half");
    std::fs::write(&half, bytes)?;
    std::fs::rename(&half, file).with_context(|| format!("could not write {}", file.display()))
}

/// The same for a file that only its owner may read.
pub(crate) fn write_secret(file: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let half = file.with_extension("half");
    remove_if_there(&half)?;
    let mut open = std::fs::OpenOptions::new();
    let mut handle = open.write(true).create_new(true).mode(0o600).open(&half)?;
    handle.write_all(bytes)?;
    std::fs::rename(&half, file).with_context(|| format!("could not write {}", file.display()))
}
