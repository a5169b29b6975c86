//! The `skerry` command: thin verbs over the rooms' public functions.
//!
//! Standard output is data, standard error is talk. Exit codes: 0 done, 1 the answer is no, 2 it went wrong.

use clap::{Parser, Subcommand, ValueEnum};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

mod ca;
mod cluster;
mod demo;
mod device;
mod edge;
mod fault;
mod image;
mod link;
mod monitor;
mod node;
mod os;
mod out;
mod qualify;
mod render;
mod seed;
mod services;
mod site;
mod site_file;
mod status;
mod supervise;
mod table;
mod token;
mod up;
mod version;

#[derive(Parser)]
#[command(
    name = "skerry",
    about = "Run fleets of edge sites from a Git repository",
    disable_version_flag = true
)]
struct Cli {
    /// How to print the answer
    #[arg(long, global = true, value_enum, default_value = "table")]
    output: Output,
    /// Credentials of the cluster (default: $KUBECONFIG, then ~/.kube/config)
    #[arg(long, global = true)]
    kubeconfig: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

/// What is logged unless `SKERRY_LOG` says otherwise. The client tells its failures to its caller as well, who prints
/// them once.
const LOG_FILTER: &str = "warn,kube_client=off";

/// Form of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// For programs: one JSON document.
    Json,
}

#[derive(Subcommand)]
enum Verb {
    /// Run a whole fleet on this machine: API, CloudCore, reconciler, Git remote, edge node
    Up(up::Args),
    /// Show every site and app: revision, pods, health, age
    Status(status::Args),
    /// Print what a fleet folder renders to, per site and app
    Render(render::RenderArgs),
    /// Show what a fleet folder would change in the cluster; exit code 1 when it would
    Diff(render::DiffArgs),
    /// Show every node's link to the hub: transport, round trip, window, backlog, bytes, certificate
    Link(link::Args),
    /// Join tokens of edge nodes
    #[command(subcommand)]
    Token(token::Verb),
    /// Certificates of edge nodes: revoke, deny, allow
    #[command(subcommand)]
    Node(node::Verb),
    /// Devices of the sites: what they say, and what they are told
    #[command(subcommand)]
    Device(device::Verb),
    /// The certificate authority of the nodes, and its replacement
    #[command(subcommand)]
    Ca(ca::Verb),
    /// Take this machine over from KubeEdge's EdgeCore, or give it back
    #[command(subcommand)]
    Edge(edge::Verb),
    /// The appliance: build its disk image, move its packages forward, look into what was built
    #[command(subcommand)]
    Image(image::Verb),
    /// Versions of the appliance's OS: who runs which, who should, and how far they are
    #[command(subcommand)]
    Os(os::Verb),
    /// `site.toml`, what an appliance is told before it can ask its hub
    #[command(subcommand)]
    Site(site_file::Verb),
    /// Say which networks and runtimes this machine, or a kernel's configuration, can carry
    #[command(disable_help_flag = true)]
    Qualify {
        /// `--help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
        options: Vec<String>,
    },
    /// Run the reconciler alone, against the cluster of the kubeconfig
    Reconciler(services::ReconcilerArgs),
    /// Run CloudCore alone, against the cluster of the kubeconfig
    #[command(name = "cloudcore")]
    CloudCore(services::CloudCoreArgs),
    /// Print the version
    Version,
}

fn main() -> ExitCode {
    // It has a command line of its own, shared with `skerry-qualify`, and wants a process with one thread.
    // Only a node's report in the cluster needs the rest of this program.
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == "qualify") && qualify::parse(&words[1..]).is_none()
    {
        return skerry_qualify::command::run(&["qualify"], words.into_iter().skip(1));
    }
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("SKERRY_LOG")
        .unwrap_or_else(|_| LOG_FILTER.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        eprintln!("error: a TLS provider was installed twice");
        return ExitCode::from(2);
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(run(cli)),
        Err(error) => Err(anyhow::Error::new(error).context("could not start the runtime")),
    };
    outcome.unwrap_or_else(|error| {
        if out::reader_left(&error) {
            return ExitCode::SUCCESS;
        }
        fault::print(&error);
        ExitCode::from(2)
    })
}

async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let Cli { output, kubeconfig, verb } = cli;
    match verb {
        Verb::Up(args) => up::run(args, output).await,
        Verb::Status(args) => status::run(args, kubeconfig, output).await,
        Verb::Render(args) => render::render(args, output),
        Verb::Diff(args) => render::diff(args, kubeconfig, output).await,
        Verb::Link(args) => link::run(args, output).await,
        Verb::Token(verb) => token::run(verb, kubeconfig, output).await,
        Verb::Node(verb) => node::run(verb, kubeconfig, output).await,
        Verb::Device(verb) => device::run(verb, kubeconfig, output).await,
        Verb::Ca(verb) => ca::run(verb, kubeconfig, output).await,
        Verb::Edge(verb) => edge::run(verb, output).await,
        Verb::Image(verb) => image::run(verb, output),
        Verb::Os(verb) => os::run(verb, kubeconfig, output).await,
        Verb::Qualify { options } => match qualify::parse(&options) {
            Some(args) => qualify::run(args?, kubeconfig, output).await,
            None => Ok(skerry_qualify::command::run(&["qualify"], options.into_iter())),
        },
        Verb::Site(verb) => site_file::run(verb, kubeconfig, output).await,
        Verb::Reconciler(args) => services::reconciler(args, kubeconfig).await,
        Verb::CloudCore(args) => services::cloudcore(args, kubeconfig).await,
        Verb::Version => version::run(output),
    }
}
