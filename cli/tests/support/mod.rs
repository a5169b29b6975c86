//! The services that tests of whole ways start: the real API, CloudCore and agent, in this process.

#![allow(dead_code)] // each test takes what it needs

use skerry_apiserver::{ApiServer, Durability};
use skerry_cloudcore::CloudCore;
use skerry_edge::agent::{self, AgentError};
use skerry_edge::config::Config;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A free port of this machine's own.
pub(crate) const ANY: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

/// An API without controllers, with its files below `dir`.
pub(crate) async fn start_api(dir: &Path) -> ApiServer {
    let config = skerry_apiserver::Config {
        dir: dir.join("api"),
        listen: ANY.into(),
        hostnames: vec!["127.0.0.1".into()],
        node_streams: None,
        durability: Durability::Relaxed,
        controllers: false,
    };
    ApiServer::start(config).await.expect("the API starts")
}

/// CloudCore on WebSocket alone; certificates of its nodes live for `ttl`.
pub(crate) async fn start_cloud(
    api: &ApiServer,
    hub: SocketAddr,
    enrol: SocketAddr,
    ttl: Duration,
) -> CloudCore {
    start_cloud_with_store(api, hub, enrol, ttl, None).await
}

/// The same, with a folder of versions of the appliance's OS.
pub(crate) async fn start_cloud_with_store(
    api: &ApiServer,
    hub: SocketAddr,
    enrol: SocketAddr,
    ttl: Duration,
    os_store: Option<PathBuf>,
) -> CloudCore {
    let config = skerry_cloudcore::Config {
        hub,
        quic: None,
        monitor: None,
        admission: skerry_cloudcore::ADMISSION_RATE,
        enrol,
        tunnel: ANY.into(),
        advertise: vec!["127.0.0.1".into()],
        os_store,
        node_certificate_ttl: ttl,
        shared_token: false,
        router: None,
        impersonate: false,
    };
    let client = api.client("cloudcore", &["skerry:cloudcore"]);
    CloudCore::start(client, config).await.expect("cloudcore starts")
}

/// A running agent.
pub(crate) struct Agent {
    stop: CancellationToken,
    task: JoinHandle<Result<(), AgentError>>,
}

impl Agent {
    /// Starts one with the text of a configuration file.
    pub(crate) fn start(text: &str) -> Self {
        let config = Config::parse(Path::new("edge.yaml"), text).expect("a configuration");
        let stop = CancellationToken::new();
        Self { task: tokio::spawn(agent::run(config, stop.clone())), stop }
    }

    /// Ends it in order.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.task.await.expect("no panic").expect("an orderly end");
    }
}
