//! CloudCore: the cloud end of the link to every edge node.
//!
//! [`CloudCore::start`] needs a Kubernetes API and nothing else; which one it is, it never knows. It opens listeners
//! with TLS: the hub (one link per node, over WebSocket or QUIC), enrolment (HTTPS) and the tunnel (logs); and one
//! without for the operator's monitor. All of its decisions are in `cloudcore/core`; here are the sockets, the watches
//! and the writes.
//!
//! - `authority`: the KubeEdge CA, its replacement, and the server certificate, kept in Secrets. `gate`: which
//!   certificates of nodes still count. `renewal`: certificates issued, and renewed on the link.
//! - `token`: join tokens and their records. `enrolment`: who asks for a certificate.
//! - `listen`: TLS connections. `admission`: which of them may become links, and when. `transport`, `websocket`, `quic`:
//!   what carries a link. `session`: one node's link. `monitor`: what an operator sees of them.
//! - `hub`: the one task that owns what every node should have. `watch`: what feeds it. `upstream`: what a node asks for.
//! - `tunnel`: log streams. `os`: versions of the appliance's OS. `heap`: memory that a long message took is given back.

mod admission;
mod api;
mod applications;
mod authority;
mod definitions;
mod enrolment;
mod gate;
mod heap;
mod hub;
mod jobs;
mod leases;
mod listen;
mod monitor;
mod objectsync;
mod os;
mod quic;
mod renewal;
mod router;
mod session;
mod tls;
mod token;
mod transport;
mod tunnel;
mod upstream;
mod watch;
mod websocket;

pub use admission::RATE as ADMISSION_RATE;
pub use authority::{
    AuthorityError, CaInfo, CaNode, CaStatus, RotationError, ca_status, finish_ca, rotate_ca,
};
pub use gate::{
    Amnesty, DecisionError, GateError, IdentityRow, NodeIdentity, Record, allow_node, amnesty,
    deny_node, identities, revoke_node, revoke_serial, set_amnesty,
};
pub use monitor::LinkInfo;
pub use renewal::NODE_CERTIFICATE_TTL;
pub use skerry_cloudcore_core::admission::Rate;
pub use skerry_protocol::enrol::JoinToken;
pub use token::{
    NewToken, TokenError, TokenInfo, create_batch_token, create_token, list_tokens, revoke_token,
};
pub use tunnel::{NodeStream, StreamError, Streams};

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch as tokio_watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Where the router takes HTTP, and from whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouterConfig {
    /// KubeEdge's is port 9443.
    pub listen: SocketAddr,
    /// From everybody who can reach it, without TLS, as KubeEdge's. Else with TLS, and from those whom the cluster lets
    /// create `rules/messages` of `rules.kubeedge.io`, by their bearer tokens.
    pub open: bool,
}

/// Where CloudCore listens, and the names under which nodes reach it.
#[derive(Debug, Clone)]
pub struct Config {
    /// WebSocket of the nodes; KubeEdge's is port 10000.
    pub hub: SocketAddr,
    /// QUIC of our own nodes over UDP, port 10001 by default; `None` for no QUIC. It has nothing in common with
    /// KubeEdge's QUIC (Google QUIC, without client certificates), which is not offered.
    pub quic: Option<SocketAddr>,
    /// Enrolment over HTTPS; KubeEdge's is port 10002.
    pub enrol: SocketAddr,
    /// Stream tunnel of the nodes; KubeEdge's is port 10004.
    pub tunnel: SocketAddr,
    /// Plain HTTP for the operator, without authentication: links as JSON and counters as Prometheus text. KubeEdge's is
    /// 127.0.0.1:9091; `None` for none.
    pub monitor: Option<SocketAddr>,
    /// HTTP of the router for rules that join applications to the buses of nodes; `None` for no router.
    pub router: Option<RouterConfig>,
    /// How many links may come up a second, [`ADMISSION_RATE`] by default; more are told when to come back.
    pub admission: Rate,
    /// DNS names and addresses in the server certificate. A node refuses a server that it did not reach under one.
    pub advertise: Vec<String>,
    /// Folder with versions of the appliance's OS, as `skerry image publish` fills it; nodes with a certificate fetch from
    /// it at the enrolment's address. `None` for none. Everything else that lasts is in the cluster.
    pub os_store: Option<PathBuf>,
    /// Life of the certificates of our own edges, [`NODE_CERTIFICATE_TTL`] by default; those of KubeEdge's edges live
    /// for a year.
    pub node_certificate_ttl: Duration,
    /// Whether KubeEdge's shared join token is written and accepted. Its holders may join as any node.
    pub shared_token: bool,
    /// Whether requests of nodes go to the API in the node's name, with its rights there; applications on nodes can then
    /// write. Needs the right to impersonate nodes. Without, CloudCore asks in its own name after its own checks.
    pub impersonate: bool,
}

/// Why CloudCore did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The CA or the server certificate could not be read or made.
    #[error("could not prepare the certificate authority")]
    Authority(#[from] AuthorityError),
    /// What the cluster knows of revoked certificates could not be read.
    #[error("could not tell which certificates still count")]
    Gate(#[from] GateError),
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
    quic_addr: Option<SocketAddr>,
    monitor_addr: Option<SocketAddr>,
    router_addr: Option<SocketAddr>,
    links: monitor::Links,
    hub: hub::Hub,
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
        heap::keep_large_blocks_apart();
        let authority = authority::Authority::open(&client, &config.advertise).await?;
        let authority = Arc::new(authority);
        let gate = gate::Gate::open(&client, Arc::clone(&authority)).await?;
        let issuing = renewal::Issuing::new(
            Arc::clone(&authority),
            gate.clone(),
            config.node_certificate_ttl,
        );
        let tls = |listener, clients, alpn| {
            tls::server_config(&authority, clients, alpn)
                .map_err(|source| StartError::Tls { listener, source })
        };
        let hub_tls = tls("hub", tls::Clients::Required, tls::ALPN_WEBSOCKET)?;
        let enrol_tls = tls("enrolment", tls::Clients::VerifiedLater, tls::ALPN_ENROLMENT)?;
        let quic_tls = tls("QUIC", tls::Clients::Required, &[skerry_protocol::frame::ALPN])?;
        let (hub_listener, hub_addr) = bind("hub", config.hub)?;
        let (enrol_listener, enrol_addr) = bind("enrolment", config.enrol)?;
        let (tunnel_listener, tunnel_addr) = bind("tunnel", config.tunnel)?;
        let monitor_listener =
            config.monitor.map(|address| bind("monitor", address)).transpose()?;
        let router_listener =
            config.router.map(|router| bind("router", router.listen)).transpose()?;
        let router_tls = match config.router {
            Some(RouterConfig { open: false, .. }) => {
                Some(tls("router", tls::Clients::VerifiedLater, tls::ALPN_WEBSOCKET)?)
            }
            _ => None,
        };
        let quic_listener = config.quic.map(|address| bind_quic(address, quic_tls)).transpose()?;

        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let (hub, events) = hub::Hub::new();
        tasks.spawn(hub::run(events, hub.clone(), client.clone(), stop.clone()));
        watch::spawn_all(&client, &hub, &tasks, &stop);
        objectsync::spawn(&client, &hub, &tasks, &stop);
        tasks.spawn(Arc::clone(&authority).follow(stop.clone()));
        tasks.spawn(gate.clone().follow(stop.clone()));
        if config.shared_token {
            tasks.spawn(token::keep_shared(
                client.clone(),
                authority.trust_changes(),
                stop.clone(),
            ));
        }

        let jobs = jobs::Jobs::new(client.clone(), hub.clone(), config.shared_token);
        jobs.spawn(&tasks, &stop);
        let applications = applications::Applications::spawn(
            client.clone(),
            hub.clone(),
            config.impersonate,
            &tasks,
            &stop,
        );
        let is_address = |name: &&String| name.parse::<std::net::IpAddr>().is_ok();
        let settings = upstream::Settings {
            impersonate: config.impersonate,
            address: config.advertise.iter().find(is_address).cloned(),
        };
        let router_addr = router_listener.as_ref().map(|(_, address)| *address);
        let router = router_listener.map(|(socket, _)| {
            router::Router::spawn(client.clone(), hub.clone(), socket, router_tls, &tasks, &stop)
        });
        let upstream = Arc::new(
            upstream::Upstream::new(
                client.clone(),
                hub.clone(),
                jobs.clone(),
                applications,
                settings,
            )
            .with_router(router),
        );
        let leases = leases::Leases::spawn(client.clone(), hub.clone(), &tasks, &stop);
        let links = monitor::Links::default();
        streams.set_links(links.clone(), hub.clone());
        let counters = Arc::clone(&links.counters);
        let renewals = renewal::Renewals::new(issuing.clone());
        let (changed, identity_changes) = tokio_watch::channel(0);
        tasks.spawn(merge_changes(
            gate.revoked(),
            renewals.bundle_changes(),
            changed,
            stop.clone(),
        ));
        let shared = Arc::new(session::Shared {
            hub,
            upstream,
            leases,
            gate: gate.clone(),
            renewals,
            identity_changes,
            links: links.clone(),
            tasks: tasks.clone(),
            stop: stop.clone(),
        });
        let door = Arc::new(admission::Door::new(
            Arc::clone(&authority),
            gate.clone(),
            config.admission,
            Arc::clone(&counters),
        ));
        let listener = |name, socket, tls: &Arc<rustls::ServerConfig>| listen::Listener {
            name,
            socket,
            tls: Arc::clone(tls),
            counters: Arc::clone(&counters),
        };
        tasks.spawn(listen::accept(
            listener("hub", hub_listener, &hub_tls),
            tasks.clone(),
            stop.clone(),
            {
                let (door, shared) = (Arc::clone(&door), Arc::clone(&shared));
                move |stream, peer, place| {
                    let (door, shared) = (Arc::clone(&door), Arc::clone(&shared));
                    admission::serve(door, shared, stream, peer, place)
                }
            },
        ));
        let quic_addr = quic_listener.as_ref().map(|(_, address)| *address);
        if let Some((endpoint, _)) = quic_listener {
            tasks.spawn(quic::accept(endpoint, Arc::clone(&door), Arc::clone(&shared)));
        }
        let monitor_addr = monitor_listener.as_ref().map(|(_, address)| *address);
        if let Some((socket, _)) = monitor_listener {
            tasks.spawn(monitor::serve(
                socket,
                links.clone(),
                shared.hub.clone(),
                streams.clone(),
                stop.clone(),
            ));
        }
        let enrolment = enrolment::Enrolment::new(enrolment::Inner {
            client,
            authority: Arc::clone(&authority),
            gate,
            issuing,
            shared_token: config.shared_token,
            jobs: Some(Arc::new(jobs)),
            os: config.os_store.map(os::Store::new),
            stop: stop.clone(),
        });
        tasks.spawn(listen::accept(
            listener("enrolment", enrol_listener, &enrol_tls),
            tasks.clone(),
            stop.clone(),
            move |stream, peer, place| {
                let enrolment = enrolment.clone();
                async move {
                    let _place = place;
                    enrolment.serve(stream, peer).await;
                }
            },
        ));
        tasks.spawn(listen::accept(
            listener("tunnel", tunnel_listener, &hub_tls),
            tasks.clone(),
            stop.clone(),
            {
                let (tunnels, stop) = (streams.clone(), stop.clone());
                move |stream, peer, place| {
                    let (tunnels, door) = (tunnels.clone(), Arc::clone(&door));
                    tunnels.serve(door, stream, peer, place, stop.clone())
                }
            },
        ));
        tracing::info!(hub = %hub_addr, enrol = %enrol_addr, tunnel = %tunnel_addr, "cloudcore listens");
        Ok(Self {
            hub_addr,
            quic_addr,
            monitor_addr,
            router_addr,
            links,
            hub: shared.hub.clone(),
            enrol_addr,
            tunnel_addr,
            streams,
            stop,
            tasks,
        })
    }

    /// Where nodes connect.
    pub fn hub_addr(&self) -> SocketAddr {
        self.hub_addr
    }

    /// Where our own nodes connect over QUIC, if they can.
    pub fn quic_addr(&self) -> Option<SocketAddr> {
        self.quic_addr
    }

    /// Where the monitor listens, if it does.
    pub fn monitor_addr(&self) -> Option<SocketAddr> {
        self.monitor_addr
    }

    /// Where the router takes HTTP, if there is one.
    pub fn router_addr(&self) -> Option<SocketAddr> {
        self.router_addr
    }

    /// Every link that is up, by node name. A node that is just moving to a better transport is there twice.
    pub async fn links(&self) -> Vec<LinkInfo> {
        self.links.with_waiting(&self.hub).await
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

fn bind(
    listener: &'static str,
    address: SocketAddr,
) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Listen { listener, address, source };
    let socket = listen::bind(address).map_err(failed)?;
    let bound = socket.local_addr().map_err(failed)?;
    Ok((socket, bound))
}

fn bind_quic(
    address: SocketAddr,
    tls: Arc<rustls::ServerConfig>,
) -> Result<(quinn::Endpoint, SocketAddr), StartError> {
    let failed = |source| StartError::Listen { listener: "QUIC", address, source };
    let endpoint = quic::bind(address, tls).map_err(failed)?;
    let bound = endpoint.local_addr().map_err(failed)?;
    Ok((endpoint, bound))
}

/// One signal of two, so that each session waits for one.
async fn merge_changes(
    mut revoked: tokio_watch::Receiver<u64>,
    mut cas: tokio_watch::Receiver<u64>,
    changed: tokio_watch::Sender<u64>,
    stop: CancellationToken,
) {
    loop {
        let told = tokio::select! {
            () = stop.cancelled() => return,
            told = revoked.changed() => told,
            told = cas.changed() => told,
        };
        if told.is_err() {
            return;
        }
        changed.send_modify(|generation| *generation += 1);
    }
}
