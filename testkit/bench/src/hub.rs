//! The hub alone in a process, so that its memory is its own. It prints its addresses and answers every question with
//! the number of requests it has made to the API, renewals of Leases left out, and the number of links that are up.

use anyhow::{Context, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::json;
use skerry_cloudcore::{CloudCore, Rate};
use std::io::BufRead;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tower::util::MapRequestLayer;

/// Connections that the hub lets in each second: the machine's processors are the bound to be measured here.
const CONNECTIONS: Rate = Rate { per_s: 5_000, burst: 5_000 };

/// Runs until standard input ends.
pub(crate) async fn run(kubeconfig: &Path, address: IpAddr) -> Result<()> {
    let file = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    let requests = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&requests);
    let layer = MapRequestLayer::new(move |request: http::Request<_>| {
        // A node's sign of life is written for as long as it lives, whether objects change or not.
        if !request.uri().path().contains("/leases") {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        request
    });
    let client = kube::client::ClientBuilder::try_from(config)?.with_layer(&layer).build();
    let any = SocketAddr::from((address, 0));
    let config = skerry_cloudcore::Config {
        hub: any,
        quic: Some(any),
        enrol: any,
        tunnel: any,
        monitor: Some(any),
        admission: CONNECTIONS,
        advertise: vec![address.to_string()],
        os_store: None,
        node_certificate_ttl: skerry_cloudcore::NODE_CERTIFICATE_TTL,
        shared_token: false,
        router: None,
        impersonate: false,
    };
    let cloud = CloudCore::start(client, config).await?;
    println!(
        "{}",
        json!({
            "hub": cloud.hub_addr().to_string(),
            "enrol": cloud.enrol_addr().to_string(),
            "tunnel": cloud.tunnel_addr().to_string(),
            "quic": cloud.quic_addr().map(|address| address.to_string()),
            "monitor": cloud.monitor_addr().map(|address| address.to_string()),
        })
    );
    // Standard input blocks, and nothing else may wait for it.
    let cloud = Arc::new(cloud);
    let asked = Arc::clone(&cloud);
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || {
        for line in std::io::stdin().lock().lines() {
            let links = match line.context("no more questions")?.as_str() {
                "links" => runtime.block_on(asked.links()).len(),
                _ => 0,
            };
            println!("{}", json!({"requests": requests.load(Ordering::Relaxed), "links": links}));
        }
        anyhow::Ok(())
    })
    .await??;
    if let Some(cloud) = Arc::into_inner(cloud) {
        cloud.shutdown().await;
    }
    Ok(())
}
