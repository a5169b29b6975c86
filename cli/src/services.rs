//! `skerry reconciler` and `skerry cloudcore`: one service each, against any Kubernetes that a kubeconfig names.

use crate::cluster;
use crate::fault::hinted;
use anyhow::Result;
use skerry_cloudcore::CloudCore;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

#[derive(clap::Args)]
pub(crate) struct ReconcilerArgs {
    /// The fleet repository: a path, file://, http:// or https://
    #[arg(long)]
    remote: String,
    /// Branch in force
    #[arg(long, default_value = "main")]
    branch: String,
    /// Folder for the copy of a distant repository
    #[arg(long, default_value = "/var/lib/skerry/reconciler")]
    dir: PathBuf,
}

#[derive(clap::Args)]
pub(crate) struct CloudCoreArgs {
    /// Where the hub listens (WebSocket over TCP)
    #[arg(long, default_value = "0.0.0.0:10000")]
    hub_listen: SocketAddr,
    /// Where the hub listens for QUIC of our own nodes (UDP; KubeEdge's QUIC is another protocol and not offered), or
    /// `off`
    #[arg(long, default_value = "0.0.0.0:10001")]
    quic_listen: Listen,
    /// Where nodes enrol
    #[arg(long, default_value = "0.0.0.0:10002")]
    enrol_listen: SocketAddr,
    /// Where the nodes' log tunnels arrive
    #[arg(long, default_value = "0.0.0.0:10004")]
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
    /// How many nodes may connect a second before more are told to come back later; twice as many at once
    #[arg(long, default_value_t = skerry_cloudcore::ADMISSION_RATE.per_s, value_parser = clap::value_parser!(u32).range(1..))]
    connections_per_second: u32,
    /// Folder with versions of the appliance's OS, as `skerry image publish` fills it; nodes fetch from it
    #[arg(long)]
    os_store: Option<PathBuf>,
    /// Name or address under which nodes reach this program; may be repeated
    #[arg(long, required = true)]
    advertise: Vec<String>,
    /// Write KubeEdge's shared join token to Secret `kubeedge/tokensecret` and accept it: whoever has it may join as
    /// any node
    #[arg(long)]
    kubeedge_shared_token: bool,
}

/// An address, or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Listen(pub(crate) Option<SocketAddr>);

impl std::str::FromStr for Listen {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" { Ok(Self(None)) } else { text.parse().map(|address| Self(Some(address))) }
    }
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(address) => write!(f, "{address}"),
            None => f.write_str("off"),
        }
    }
}

/// Keeps a cluster as a repository says, until Ctrl-C.
pub(crate) async fn reconciler(
    args: ReconcilerArgs,
    kubeconfig: Option<PathBuf>,
) -> Result<ExitCode> {
    let client = cluster::connect(kubeconfig).await?;
    let distant = args.remote.starts_with("http://") || args.remote.starts_with("https://");
    let config = skerry_reconciler::Config {
        remote: args.remote,
        branch: args.branch,
        dir: args.dir,
        poll: if distant { skerry_reconciler::POLL_DISTANT } else { skerry_reconciler::POLL_LOCAL },
    };
    let stop = CancellationToken::new();
    let ask = stop.clone();
    tokio::spawn(async move {
        // Without signal handlers the program still ends, only less orderly.
        if let Err(error) = stop_asked().await {
            tracing::warn!(error = format!("{error:#}"), "signals are not heard");
        }
        ask.cancel();
    });
    eprintln!("skerry: the reconciler follows {} at {}", config.remote, config.branch);
    skerry_reconciler::run(client, config, stop).await.map_err(|error| match error.hint() {
        Some(hint) => hinted(error.to_string(), hint),
        None => error.into(),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Serves the edge nodes of a cluster, until Ctrl-C.
pub(crate) async fn cloudcore(
    args: CloudCoreArgs,
    kubeconfig: Option<PathBuf>,
) -> Result<ExitCode> {
    let client = cluster::connect(kubeconfig).await?;
    let config = skerry_cloudcore::Config {
        hub: args.hub_listen,
        quic: args.quic_listen.0,
        monitor: args.monitor_listen.0,
        admission: skerry_cloudcore::Rate {
            per_s: args.connections_per_second,
            burst: args.connections_per_second.saturating_mul(2),
        },
        enrol: args.enrol_listen,
        tunnel: args.tunnel_listen,
        advertise: args.advertise,
        os_store: args.os_store,
        node_certificate_ttl: skerry_cloudcore::NODE_CERTIFICATE_TTL,
        shared_token: args.kubeedge_shared_token,
        router: args
            .router_listen
            .0
            .map(|listen| skerry_cloudcore::RouterConfig { listen, open: args.router_open }),
        impersonate: false,
    };
    let cloud = CloudCore::start(client, config).await?;
    eprintln!(
        "skerry: cloudcore listens on {} (hub), {} (QUIC), {} (enrolment), {} (tunnels), {} (monitor)",
        cloud.hub_addr(),
        Listen(cloud.quic_addr()),
        cloud.enrol_addr(),
        cloud.tunnel_addr(),
        Listen(cloud.monitor_addr()),
    );
    stop_asked().await?;
    cloud.shutdown().await;
    Ok(ExitCode::SUCCESS)
}

/// Waits for Ctrl-C or SIGTERM.
async fn stop_asked() -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}
