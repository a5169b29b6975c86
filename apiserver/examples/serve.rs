//! Serves an embedded API from a folder and prints the path of a kubeconfig for it:
//! `cargo run --example serve -- /some/folder [port]`. Beside it lies one with the rights of CloudCore.

use skerry_apiserver::{ApiServer, Config, Durability, auth};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    rustls::crypto::ring::default_provider().install_default().ok();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let mut arguments = std::env::args().skip(1);
    let dir = PathBuf::from(arguments.next().ok_or_else(|| anyhow::anyhow!("give a folder"))?);
    let port = arguments.next().map_or(Ok(0), |port| port.parse())?;
    let server = ApiServer::start(Config {
        dir: dir.clone(),
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        hostnames: Vec::new(),
        node_streams: None,
        durability: Durability::Full,
        controllers: std::env::var_os("NO_CONTROLLERS").is_none(),
    })
    .await?;
    let kubeconfig = dir.join("admin.kubeconfig");
    std::fs::write(&kubeconfig, server.kubeconfig("admin", &[auth::MASTERS])?)?;
    let cloudcore = server.kubeconfig("system:cloudcore", &[auth::CLOUDCORE])?;
    std::fs::write(dir.join("cloudcore.kubeconfig"), cloudcore)?;
    println!("{}", kubeconfig.display());
    tokio::signal::ctrl_c().await?;
    server.shutdown().await;
    Ok(())
}
