//! `edgecore`: the agent of one edge node.

use anyhow::Context;
use clap::{Parser, Subcommand};
use skerry_edge::adopt::{self, AdoptError};
use skerry_edge::agent::{self, AgentError};
use skerry_edge::config::{Config, ConfigError};
use skerry_edge::{jobs, link, qualification};
use skerry_qualify::probe::Autoload;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Threads for file work. Each keeps memory of its own, and a small disk is no faster for more of them.
const BLOCKING_THREADS_MAX: usize = 8;
/// Such a thread goes soon: most of an agent's day is quiet.
const BLOCKING_THREAD_IDLE: Duration = Duration::from_secs(2);
/// File work has short stacks.
const BLOCKING_STACK_LEN: usize = 512 * 1024;

#[derive(Parser)]
#[command(
    name = "edgecore",
    version,
    about = "Runs the pods of one edge node, with or without a link to the cloud.",
    args_conflicts_with_subcommands = true
)]
struct Arguments {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Without a verb: run with this file, as KubeEdge's service file starts its edgecore.
    #[arg(long, default_value = KUBEEDGE_FILE)]
    config: PathBuf,
}

/// Where KubeEdge's installer puts its configuration.
const KUBEEDGE_FILE: &str = "/etc/kubeedge/config/edgecore.yaml";

#[derive(Subcommand)]
enum Verb {
    /// Run the agent. SIGTERM and SIGINT stop it; containers keep running.
    Run {
        /// Configuration file (YAML).
        #[arg(long)]
        config: PathBuf,
    },
    /// Stop and remove all pods of this node; forget its certificate and what it was told to run.
    Reset {
        /// Configuration file (YAML).
        #[arg(long)]
        config: PathBuf,
    },
    /// Take this node over from KubeEdge's EdgeCore, which must not run; running containers go on.
    Adopt {
        /// KubeEdge's configuration file.
        #[arg(long)]
        config: PathBuf,
    },
    /// Give this node back to KubeEdge's EdgeCore; running containers go on.
    Release {
        /// KubeEdge's configuration file.
        #[arg(long)]
        config: PathBuf,
    },
    /// Print how the link to the hub is, as JSON, as the running agent has last written it.
    Status {
        /// Configuration file (YAML).
        #[arg(long)]
        config: PathBuf,
    },
    /// Judge what this machine's kernel can carry, and keep it: the running agent tells the cluster. Exit code 1 when
    /// containers or every network lack something that they need.
    Qualify {
        /// Configuration file (YAML).
        #[arg(long)]
        config: PathBuf,
        /// Modules that probes may make the kernel load: none, known, all. Default: known on the appliance, none elsewhere.
        #[arg(long)]
        autoload: Option<String>,
        /// Print nothing, and let everything else on the machine go first.
        #[arg(long)]
        background: bool,
        /// Which request this answers.
        #[arg(long, default_value = "", hide = true)]
        requested: String,
    },
    /// Print the version.
    Version,
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(qualification::PROBE) {
        // One group of probes, in a process with one thread.
        return skerry_qualify::command::run(&[qualification::PROBE], words);
    }
    let arguments = Arguments::parse();
    skerry_edge::tls::install_provider();
    let filter = EnvFilter::try_from_env("EDGECORE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    match run(arguments.verb.unwrap_or(Verb::Run { config: arguments.config })) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            if let Some(hint) = hint(&error) {
                eprintln!("hint: {hint}");
            }
            ExitCode::from(2)
        }
    }
}

fn run(verb: Verb) -> anyhow::Result<ExitCode> {
    // One thread: an edge node has a small core to spare, and memory matters more than parallel work.
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .thread_keep_alive(BLOCKING_THREAD_IDLE)
            .thread_stack_size(BLOCKING_STACK_LEN)
            .enable_all()
            .build()
    };
    let done: anyhow::Result<()> = match verb {
        Verb::Qualify { config, autoload, background, requested } => {
            return qualify(&Config::read(&config)?, autoload.as_deref(), background, &requested);
        }
        Verb::Version => {
            println!("edgecore {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Verb::Status { config } => {
            let dir = Config::read(&config)?.dir;
            let facts = link::facts::read(&dir).context("could not read the state of the link")?;
            println!("{}", serde_json::to_string(&facts)?);
            Ok(())
        }
        Verb::Run { config } => {
            let path = config;
            let config = Config::read(&path)?;
            adopt::check_ours(&path, &config).map_err(anyhow::Error::msg)?;
            let dir = config.dir.clone();
            let runtime = runtime().context("could not start the runtime")?;
            let ended = runtime.block_on(async {
                let stop = stop_on_signal().context("could not listen for signals")?;
                anyhow::Ok(agent::run(config, stop).await)
            })?;
            match ended {
                Ok(()) => Ok(()),
                Err(AgentError::Restart) => start_again(),
                Err(error) if jobs::undo_after_failure(&dir, &error.to_string()) => start_again(),
                Err(error) => Err(error.into()),
            }
        }
        Verb::Adopt { config } => hand_over(&runtime()?, adopt::plan_adopt(&config)),
        Verb::Release { config } => hand_over(&runtime()?, adopt::plan_release(&config)),
        Verb::Reset { config } => {
            let config = Config::read(&config)?;
            let reset = agent::reset(config);
            Ok(runtime().context("could not start the runtime")?.block_on(reset)?)
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

fn qualify(
    config: &Config,
    autoload: Option<&str>,
    background: bool,
    requested: &str,
) -> anyhow::Result<ExitCode> {
    let autoload = match autoload {
        None => None,
        Some("none") => Some(Autoload::None),
        Some("known") => Some(Autoload::Known),
        Some("all") => Some(Autoload::All),
        Some(other) => anyhow::bail!("`--autoload {other}`: expected none, known or all"),
    };
    if background {
        skerry_qualify::probe::give_way();
    }
    let (table, report) = qualification::judge(config, autoload, requested)?;
    if !background {
        print!("{}", report.text(&table));
    }
    let good = skerry_qualify::publish::condition(&report).holds == Some(true);
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Goes on as a new start of the same program with the same arguments; whoever watches this process sees the same one.
fn start_again() -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt;
    tracing::info!("starting again with the configuration in the file; containers keep running");
    let mut arguments = std::env::args_os();
    let mut program = std::process::Command::new("/proc/self/exe");
    if let Some(name) = arguments.next() {
        program.arg0(name);
    }
    Err(program.args(arguments).exec()).context("could not start again")
}

/// Prints what is planned as JSON, and does it when no container is restarted by it.
fn hand_over(
    runtime: &tokio::runtime::Runtime,
    plan: impl Future<Output = Result<adopt::Plan, AdoptError>>,
) -> anyhow::Result<()> {
    let plan = runtime.block_on(plan)?;
    println!("{}", serde_json::to_string(&plan)?);
    let restarts = plan.restarts().count();
    anyhow::ensure!(
        restarts == 0,
        "{restarts} container(s) would be restarted, so nothing was done"
    );
    Ok(plan.carry_out()?)
}

fn stop_on_signal() -> std::io::Result<CancellationToken> {
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; containers keep running");
        stopping.cancel();
    });
    Ok(stop)
}

fn hint(error: &anyhow::Error) -> Option<String> {
    let agent = error.downcast_ref::<AgentError>().and_then(AgentError::hint);
    let agent = agent.or_else(|| error.downcast_ref::<AdoptError>().and_then(AdoptError::hint));
    agent.or_else(|| error.downcast_ref::<ConfigError>().and_then(ConfigError::hint))
}
