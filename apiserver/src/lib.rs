//! The embedded Kubernetes API: SQLite below, HTTPS and an in-process client above.
//!
//! One process, one file, the same client code as against a real cluster. [`ApiServer::start`] opens the store, makes
//! or loads the certificates, listens, and keeps the stored objects consistent; [`ApiServer::client`] speaks to the
//! same handlers without a socket. It is API-compatible for fleet work, not a conformance-tested Kubernetes:
//! admission webhooks, API aggregation and stored RBAC roles are not there.
//!
//! Layers, each in its file: [`store`] and [`hub`] know revisions and bytes; [`api`] and [`handlers`] the meaning of
//! requests (with `skerry-apiserver-core`, which has no I/O); [`auth`] who may do what; [`server`] and [`pki`] sockets
//! and certificates; [`upkeep`] and [`signer`] what has to happen without a request; [`controllers`] pods, nodes and workloads.

mod api;
pub mod auth;
pub mod controllers;
mod handlers;
mod http;
mod hub;
mod nodes;
mod pki;
mod route;
mod server;
mod service_tokens;
mod signer;
mod store;
mod upkeep;

pub use nodes::{NodeStream, NodeStreamError, NodeStreams};
pub use pki::PkiError;
pub use store::{Durability, OpenError};

use api::Api;
use auth::{Tokens, User};
use hub::Hub;
use pki::Pki;
use serde_json::json;
use service_tokens::ServiceTokens;
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use store::Store;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Time that requests under way and background tasks get when the server stops.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// Names that the server's certificate always carries.
const OWN_NAMES: [&str; 8] = [
    "localhost",
    "127.0.0.1",
    "::1",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
    handlers::kinds::API_ADDRESS,
];

/// How to run the server.
#[derive(Clone)]
pub struct Config {
    /// Folder of the database (`objects.db`) and of the certificates (`pki/`).
    pub dir: PathBuf,
    /// Where HTTPS listens; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Names and addresses under which clients reach the server, besides localhost. The first one goes into
    /// kubeconfigs.
    pub hostnames: Vec<String>,
    /// The way to nodes, for `pods/log`.
    pub node_streams: Option<Arc<dyn NodeStreams>>,
    /// When a write is acknowledged.
    pub durability: Durability,
    /// Run the scheduler and the controllers of workloads and nodes.
    pub controllers: bool,
}

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The database.
    #[error("the API's store cannot be opened")]
    Store(#[from] OpenError),
    /// The certificates.
    #[error("certificates are not usable")]
    Pki(#[from] PkiError),
    /// The address is taken or not ours.
    #[error("could not listen on {address}")]
    Listen { address: SocketAddr, source: std::io::Error },
    /// The objects that every cluster has could not be made.
    #[error("first objects were not created: {detail}")]
    Bootstrap { detail: String },
}

impl StartError {
    /// What to do about it, shown after the error as `hint: …`.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Store(error) => error.hint(),
            Self::Listen { .. } => Some("choose another address"),
            Self::Pki(_) | Self::Bootstrap { .. } => None,
        }
    }
}

/// A running server; dropping it stops it, [`ApiServer::shutdown`] also waits.
pub struct ApiServer {
    api: Arc<Api>,
    pki: Arc<Pki>,
    addr: SocketAddr,
    hostnames: Vec<String>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl ApiServer {
    /// Opens the store, creates what is missing, and serves.
    ///
    /// The rustls crypto provider is passed explicitly; the process need not have installed one.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let names: BTreeSet<String> = OWN_NAMES
            .iter()
            .map(|name| (*name).to_owned())
            .chain(config.hostnames.iter().cloned())
            .chain((!config.listen.ip().is_unspecified()).then(|| config.listen.ip().to_string()))
            .collect();
        let pki_dir = config.dir.join("pki");
        let (dir, durability) = (config.dir.clone(), config.durability);
        let opened = tokio::task::spawn_blocking(move || {
            let store = Store::open(&dir, durability, Arc::new(Hub::new()))?;
            let pki = Pki::open(&pki_dir, &names)?;
            let tokens = (Tokens::open(&pki_dir)?, ServiceTokens::open(&pki_dir)?);
            Ok::<_, StartError>((store, Arc::new(pki), tokens))
        });
        let (store, pki, (tokens, service_tokens)) =
            opened.await.map_err(|error| StartError::Bootstrap { detail: error.to_string() })??;

        let listen = |source| StartError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
        let addr = listener.local_addr().map_err(listen)?;
        let tls = TlsAcceptor::from(Arc::new(pki.server_config()?));

        let stop = CancellationToken::new();
        let api =
            Arc::new(Api::new(store, tokens, service_tokens, config.node_streams, stop.clone()));
        let bootstrap = |detail: String| StartError::Bootstrap { detail };
        api.reload_catalog().await.map_err(|error| bootstrap(error.to_string()))?;
        // Establishes where the marks of compaction begin.
        api.store.compact(Instant::now()).await.map_err(|error| bootstrap(error.to_string()))?;
        upkeep::bootstrap(&api, addr.port()).await.map_err(|error| bootstrap(error.message))?;

        let tasks = TaskTracker::new();
        tasks.spawn(upkeep::run(api.clone(), pki.authority_pem().to_owned(), stop.clone()));
        tasks.spawn(signer::run(api.clone(), pki.clone(), stop.clone()));
        tasks.spawn(server::listen(listener, tls, api.clone(), stop.clone()));
        let server = Self { api, pki, addr, hostnames: config.hostnames, stop, tasks };
        if config.controllers {
            let client = server.client(auth::CONTROLLERS, &[auth::CONTROLLERS]);
            server.tasks.spawn(controllers::run(client, server.stop.clone()));
        }
        tracing::info!(%addr, "API server listens");
        Ok(server)
    }

    /// Where HTTPS listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// A client inside this process: the same handlers, no socket, no TLS. Its default namespace is `default`.
    ///
    /// Has to be called on a tokio runtime.
    pub fn client(&self, user: &str, groups: &[&str]) -> kube::Client {
        let (api, user) = (self.api.clone(), User::new(user, groups));
        let service = tower::service_fn(move |request: ::http::Request<kube::client::Body>| {
            let (api, user) = (api.clone(), user.clone());
            async move { Ok::<_, Infallible>(api.serve(Some(user), request).await) }
        });
        kube::Client::new(service, "default")
    }

    /// A kubeconfig with a fresh client certificate for `user` in `groups`; valid for a year.
    pub fn kubeconfig(&self, user: &str, groups: &[&str]) -> Result<String, StartError> {
        use base64::Engine;
        use base64::engine::general_purpose::STANDARD;
        let identity = self.pki.client(user, groups)?;
        let value = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "skerry", "preferences": {},
            "clusters": [{"name": "skerry", "cluster": {
                "server": self.url(),
                "certificate-authority-data": STANDARD.encode(self.pki.authority_pem()),
            }}],
            "users": [{"name": user, "user": {
                "client-certificate-data": STANDARD.encode(&identity.certificate),
                "client-key-data": STANDARD.encode(&identity.key),
            }}],
            "contexts": [{"name": "skerry", "context": {"cluster": "skerry", "user": user}}],
        });
        // JSON is YAML; this one is written for people.
        Ok(serde_saphyr::to_string(&value).unwrap_or_else(|_| value.to_string()))
    }

    /// A bearer token for `user` in `groups`, valid until `pki/tokens` is removed.
    pub fn token(&self, user: &str, groups: &[&str]) -> Result<String, StartError> {
        Ok(self.api.tokens.mint(user, groups)?)
    }

    /// Certificate of the authority that signed the server's certificate, as PEM.
    pub fn authority(&self) -> &str {
        self.pki.authority_pem()
    }

    /// URL for clients on the first of `Config::hostnames`, or on the listening address.
    pub fn url(&self) -> String {
        let host = match self.hostnames.first() {
            Some(name) => name.clone(),
            None if self.addr.ip().is_unspecified() => Ipv4Addr::LOCALHOST.to_string(),
            None => self.addr.ip().to_string(),
        };
        match host.parse::<IpAddr>() {
            Ok(IpAddr::V6(v6)) => format!("https://[{v6}]:{}", self.addr.port()),
            _ => format!("https://{host}:{}", self.addr.port()),
        }
    }

    /// Forgets the history up to now, so that older watches and pages are answered with 410. For tests and backups.
    pub async fn compact(&self) -> Result<(), StartError> {
        let newest = self.api.store.current();
        let compacted = self.api.store.compact_to(newest).await;
        compacted.map(drop).map_err(|error| StartError::Bootstrap { detail: error.to_string() })
    }

    /// Ends watches and connections, commits what waits, closes the database.
    pub async fn shutdown(self) {
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, self.tasks.wait()).await.is_err() {
            tracing::warn!("some tasks did not end in time");
        }
        self.api.store.close().await;
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
