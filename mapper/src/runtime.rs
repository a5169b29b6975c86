//! The running mapper: one loop that owns the core, a task per device, one per report, the socket.
//!
//! Started by [`crate::main`] and by tests. Everything that happens comes through one bounded queue;
//! nothing else touches the core, so there is no lock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use skerry_dmi::ServeError;
use skerry_dmi::v1beta1::device_mapper_service_server::DeviceMapperServiceServer;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::config::Config;
use crate::core::{Core, Input, Output};
use crate::device::DeviceId;
use crate::driver::{Order, Protocol, drive};
use crate::edge::{Edge, inode};
use crate::metrics;
use crate::service::{Question, Service};

/// Inputs that may wait for the loop; a task that has more to say waits.
const INPUTS_MAX: usize = 1024;
/// Orders that may wait for a driver: one order at a time, and changes of the device beside it.
const ORDERS_MAX: usize = 8;
/// Time that drivers have to let go of their devices at the end.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a mapper could not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Its own socket cannot be made.
    #[error("could not serve edgecore")]
    Serve(#[from] ServeError),
    /// Its metrics address cannot be had.
    #[error("could not listen on `{address}` for metrics")]
    Metrics {
        /// As configured.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
}

/// Runs a mapper until `stop` is ready, then lets go of its devices and returns.
///
/// Listens before it registers, so that no call of EdgeCore's is lost, and returns an error only if
/// that is impossible; everything else is tried again for as long as it takes.
///
/// # Errors
///
/// [`RunError`] if a socket cannot be made.
pub async fn run<P: Protocol>(
    protocol: P,
    config: Config,
    stop: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let config = Arc::new(config);
    let listener = skerry_dmi::bind(&config.grpc_server.socket_path)?;
    let own = inode(&config.grpc_server.socket_path);
    let page = match config.common.metrics {
        None => None,
        Some(address) => {
            let page = metrics::bind(address)
                .await
                .map_err(|source| RunError::Metrics { address, source })?;
            Some(page)
        }
    };

    let (inputs, incoming) = mpsc::channel(INPUTS_MAX);
    let (questions, asked) = mpsc::channel(INPUTS_MAX);
    let (stopped, stopping) = oneshot::channel::<()>();
    let service = Service { inputs: inputs.clone(), questions: questions.clone() };
    let service = DeviceMapperServiceServer::new(service)
        .max_decoding_message_size(skerry_dmi::MESSAGE_MAX)
        .max_encoding_message_size(skerry_dmi::MESSAGE_MAX);
    let server = tokio::spawn(skerry_dmi::serve(listener, service, async { drop(stopping.await) }));
    let edge = Edge::new(&config);
    let mut background = JoinSet::new();
    background.spawn(edge.clone().keep_registered(config.clone(), inputs.clone()));
    if let Some(page) = page {
        background.spawn(metrics::serve(page, questions));
    }
    let mut owner = Owner {
        core: Core::new(config.common.reports_per_second, Instant::now()),
        protocol: Arc::new(protocol),
        edge,
        inputs,
        drivers: BTreeMap::new(),
        tasks: JoinSet::new(),
        reports: JoinSet::new(),
    };
    owner.run(incoming, asked, stop).await;

    background.abort_all();
    drop(stopped);
    owner.drivers.clear();
    let rest = async {
        while owner.tasks.join_next().await.is_some() {}
        let _ = server.await;
    };
    if tokio::time::timeout(STOP_TIMEOUT, rest).await.is_err() {
        tracing::warn!("a device did not let go in time");
    }
    // A socket without a listener only makes EdgeCore wait; one that another mapper has put there since is not ours.
    if inode(&config.grpc_server.socket_path) == own {
        let _ = std::fs::remove_file(&config.grpc_server.socket_path);
    }
    Ok(())
}

struct Owner<P> {
    core: Core,
    protocol: Arc<P>,
    edge: Edge,
    inputs: mpsc::Sender<Input>,
    drivers: BTreeMap<DeviceId, (u64, mpsc::Sender<Order>)>,
    tasks: JoinSet<()>,
    reports: JoinSet<Input>,
}

impl<P: Protocol> Owner<P> {
    async fn run(
        &mut self,
        mut incoming: mpsc::Receiver<Input>,
        mut asked: mpsc::Receiver<Question>,
        stop: impl Future<Output = ()>,
    ) {
        tokio::pin!(stop);
        loop {
            let wake = self.core.poll_timeout();
            let timer = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let input = tokio::select! {
                () = &mut stop => return,
                Some(input) = incoming.recv() => input,
                Some(answer) = self.reports.join_next() => match answer {
                    Ok(input) => input,
                    Err(error) => {
                        tracing::error!(%error, "a report broke down");
                        continue;
                    }
                },
                Some(_) = self.tasks.join_next() => continue,
                Some(question) = asked.recv() => {
                    // Whoever does not wait for the answer any more does not need it.
                    match question {
                        Question::Device(id, answer) => drop(answer.send(self.core.device(&id))),
                        Question::Counts(answer) => drop(answer.send(self.core.counts())),
                    }
                    continue;
                }
                () = timer => Input::Tick,
            };
            self.core.handle(input, Instant::now());
            while let Some(output) = self.core.poll_output() {
                self.execute(output);
            }
        }
    }

    fn execute(&mut self, output: Output) {
        match output {
            Output::Open { device, generation } => {
                let (orders, taken) = mpsc::channel(ORDERS_MAX);
                self.drivers.insert(device.id.clone(), (generation, orders));
                let (protocol, inputs) = (self.protocol.clone(), self.inputs.clone());
                self.tasks.spawn(drive(protocol, device, generation, taken, inputs));
            }
            Output::Close { device, generation } => {
                if self.drivers.get(&device).is_some_and(|(open, _)| *open == generation) {
                    self.drivers.remove(&device);
                }
            }
            Output::Change { device, generation } => {
                let id = device.id.clone();
                self.order(&id, generation, Order::Change { device });
            }
            Output::Read { device, generation, properties } => {
                self.order(&device, generation, Order::Read { properties });
            }
            Output::Write { device, generation, property, value, desired } => {
                self.order(&device, generation, Order::Write { property, value, desired });
            }
            Output::Report { device, twins } => {
                let edge = self.edge.clone();
                self.reports.spawn(async move { edge.report(device, twins).await });
            }
            Output::ReportState { device, state } => {
                let edge = self.edge.clone();
                self.reports.spawn(async move { edge.report_state(device, state).await });
            }
            Output::Note { device, text } => tracing::info!(%device, "{text}"),
        }
    }

    fn order(&mut self, id: &DeviceId, generation: u64, order: Order) {
        let Some((open, orders)) = self.drivers.get(id) else { return };
        if *open != generation {
            return;
        }
        // A driver that does not even take orders is hung; its order's deadline ends it, and then
        // it is opened again with the newest device.
        if let Err(error) = orders.try_send(order) {
            tracing::warn!(device = %id, %error, "a driver takes no orders");
        }
    }
}
