//! CloudCore: the cloud end of the link to every edge node.
//!
//! [`CloudCore::start`] needs a Kubernetes API and nothing else; which one it is, it never knows. It opens three
//! listeners with TLS: the hub (one WebSocket per node), enrolment (HTTPS) and the tunnel (logs). All of its decisions
//! are in `cloudcore/core`; here are the sockets, the watches and the writes.
//!
//! - `authority`: the KubeEdge CA and the server certificate, kept in Secrets.
//! - `token`: join tokens and their records. `enrolment`: who asks for a certificate.
//! - `hub`: the one task that owns what every node should have. `watch`: what feeds it. `session`: one node's
//!   connection. `upstream`: what a node asks for.
//! - `tunnel`: log streams.

mod api;
mod authority;
mod enrolment;
mod hub;
mod listen;
mod session;
mod tls;
mod token;
mod tunnel;
mod upstream;
mod watch;

pub use authority::AuthorityError;
pub use skerry_protocol::enrol::JoinToken;
pub use token::{TokenError, create_token, revoke_token};
pub use tunnel::{NodeStream, StreamError, Streams};

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Where CloudCore listens, and the names under which nodes reach it.
#[derive(Debug, Clone)]
pub struct Config {
    /// WebSocket of the nodes; KubeEdge's is port 10000.
    pub hub: SocketAddr,
    /// Enrolment over HTTPS; KubeEdge's is port 10002.
    pub enrol: SocketAddr,
    /// Stream tunnel of the nodes; KubeEdge's is port 10004.
    pub tunnel: SocketAddr,
    /// DNS names and addresses in the server certificate. A node refuses a server that it did not reach under one.
    pub advertise: Vec<String>,
    /// Not used: everything that lasts is in the cluster.
    pub dir: Option<PathBuf>,
}

/// Why CloudCore did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The CA or the server certificate could not be read or made.
    #[error("could not prepare the certificate authority")]
    Authority(#[from] AuthorityError),
    /// A TLS configuration could not be made of them.
    #[error("could not prepare TLS for the {listener} listener")]
    Tls {
        /// Which one.
        listener: &'static str,
        /// What rustls said.
        source: tls::TlsError,
    },
    /// An address is taken, or not ours.
    #[error("could not listen on {address} for the {listener} listener")]
    Listen {
        /// Which one.
        listener: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A started CloudCore.
pub struct CloudCore {
    hub_addr: SocketAddr,
    enrol_addr: SocketAddr,
    tunnel_addr: SocketAddr,
    streams: Streams,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl CloudCore {
    /// Prepares certificates, opens the listeners and begins to watch.
    ///
    /// # Errors
    ///
    /// [`StartError`]; nothing keeps running then.
    pub async fn start(client: kube::Client, config: Config) -> Result<Self, StartError> {
        Self::start_with(client, config, Streams::default()).await
    }

    /// The same, with streams that were handed out before: an API server in the same process needs them to start, and
    /// CloudCore needs that API server.
    ///
    /// # Errors
    ///
    /// [`StartError`]; nothing keeps running then.
    pub async fn start_with(
        client: kube::Client,
        config: Config,
        streams: Streams,
    ) -> Result<Self, StartError> {
        let authority = authority::Authority::open(&client, &config.advertise).await?;
        let authority = Arc::new(authority);
        let tls = |listener, clients| {
            tls::server_config(&authority, clients)
                .map_err(|source| StartError::Tls { listener, source })
        };
        let hub_tls = tls("hub", tls::Clients::Required)?;
        let enrol_tls = tls("enrolment", tls::Clients::VerifiedLater)?;
        let (hub_listener, hub_addr) = bind("hub", config.hub).await?;
        let (enrol_listener, enrol_addr) = bind("enrolment", config.enrol).await?;
        let (tunnel_listener, tunnel_addr) = bind("tunnel", config.tunnel).await?;

        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let (hub, events) = hub::Hub::new();
        tasks.spawn(hub::run(events, hub.clone(), client.clone(), stop.clone()));
        watch::spawn_all(&client, &hub, &tasks, &stop);

        let upstream = Arc::new(upstream::Upstream::new(client.clone(), hub.clone()));
        let sessions = session::Acceptor::new(hub, upstream, tasks.clone(), stop.clone());
        tasks.spawn(listen::accept(
            listen::Listener { name: "hub", socket: hub_listener, tls: Arc::clone(&hub_tls) },
            tasks.clone(),
            stop.clone(),
            move |stream, peer| sessions.clone().serve(stream, peer),
        ));
        let enrolment = enrolment::Enrolment::new(client, Arc::clone(&authority), stop.clone());
        tasks.spawn(listen::accept(
            listen::Listener { name: "enrolment", socket: enrol_listener, tls: enrol_tls },
            tasks.clone(),
            stop.clone(),
            move |stream, peer| enrolment.clone().serve(stream, peer),
        ));
        let tunnels = streams.clone();
        let tunnel_stop = stop.clone();
        tasks.spawn(listen::accept(
            listen::Listener { name: "tunnel", socket: tunnel_listener, tls: hub_tls },
            tasks.clone(),
            stop.clone(),
            move |stream, peer| tunnels.clone().serve(stream, peer, tunnel_stop.clone()),
        ));
        tracing::info!(hub = %hub_addr, enrol = %enrol_addr, tunnel = %tunnel_addr, "cloudcore listens");
        Ok(Self { hub_addr, enrol_addr, tunnel_addr, streams, stop, tasks })
    }

    /// Where nodes connect.
    pub fn hub_addr(&self) -> SocketAddr {
        self.hub_addr
    }

    /// Where nodes enrol.
    pub fn enrol_addr(&self) -> SocketAddr {
        self.enrol_addr
    }

    /// Where nodes open their stream tunnel.
    pub fn tunnel_addr(&self) -> SocketAddr {
        self.tunnel_addr
    }

    /// Log streams from connected nodes.
    pub fn streams(&self) -> Streams {
        self.streams.clone()
    }

    /// Closes every connection and waits until all tasks have ended.
    pub async fn shutdown(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

async fn bind(
    listener: &'static str,
    address: SocketAddr,
) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Listen { listener, address, source };
    let socket = TcpListener::bind(address).await.map_err(failed)?;
    let bound = socket.local_addr().map_err(failed)?;
    Ok((socket, bound))
}
