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
    /// Where the hub listens
    #[arg(long, default_value = "0.0.0.0:10000")]
    hub_listen: SocketAddr,
    /// Where nodes enrol
    #[arg(long, default_value = "0.0.0.0:10002")]
    enrol_listen: SocketAddr,
    /// Where the nodes' log tunnels arrive
    #[arg(long, default_value = "0.0.0.0:10004")]
    tunnel_listen: SocketAddr,
    /// Name or address under which nodes reach this program; may be repeated
    #[arg(long, required = true)]
    advertise: Vec<String>,
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
        enrol: args.enrol_listen,
        tunnel: args.tunnel_listen,
        advertise: args.advertise,
        dir: None,
    };
    let cloud = CloudCore::start(client, config).await?;
    eprintln!(
        "skerry: cloudcore listens on {} (hub), {} (enrolment), {} (tunnels)",
        cloud.hub_addr(),
        cloud.enrol_addr(),
        cloud.tunnel_addr()
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
