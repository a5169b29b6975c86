//! `skerry-bench`: the figures of the link and of devices, measured on one machine.
//!
//! `link` makes two network namespaces, one for the hub and one for a node, joins them by an emulated wide-area link and
//! measures inside; it needs root, `ip` and `/dev/net/tun`. The other verbs are its parts.

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

mod child;
mod devices;
mod emulator;
mod figures;
mod fleet;
mod hostile;
mod hub;
mod nodes;
mod pki;

#[derive(Parser)]
#[command(
    name = "skerry-bench",
    about = "Figures of the link between hub and nodes, and of devices"
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Measure the link, and print one JSON line per figure
    Link(figures::Plan),
    /// Measure devices, and print one JSON line per figure
    Devices(devices::Plan),
    /// A mapper that makes load
    #[command(hide = true)]
    DevicesLoad {
        #[arg(long)]
        orders: PathBuf,
    },
    /// The same inside namespaces that exist
    #[command(hide = true)]
    Inside {
        #[arg(long)]
        hub_namespace: String,
        #[arg(long)]
        node_namespace: String,
        #[command(flatten)]
        plan: figures::Plan,
    },
    /// A hub alone
    #[command(hide = true)]
    Hub {
        #[arg(long)]
        kubeconfig: PathBuf,
        #[arg(long)]
        address: IpAddr,
    },
    /// Simulated nodes
    #[command(hide = true)]
    Nodes {
        #[arg(long)]
        orders: PathBuf,
    },
}

fn main() -> Result<ExitCode> {
    // Fails only when there is a provider already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("BENCH_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("error")),
        )
        .with_writer(std::io::stderr)
        .init();
    match Cli::parse().verb {
        Verb::Link(_) => return in_namespaces(),
        Verb::Inside { hub_namespace, node_namespace, plan } => {
            block_on(figures::run(plan, &hub_namespace, &node_namespace))?;
        }
        Verb::Hub { kubeconfig, address } => block_on(hub::run(&kubeconfig, address))?,
        Verb::Devices(plan) => block_on(devices::run(plan))?,
        // One thread: what it needs of the machine is not the agent's.
        Verb::DevicesLoad { orders } => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(devices::load::run(&orders))?,
        Verb::Nodes { orders } => block_on(nodes::run_file(&orders))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn block_on(work: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(work)
}

/// Makes the namespaces, runs this program again in the hub's, and removes them whatever happened.
fn in_namespaces() -> Result<ExitCode> {
    let pid = std::process::id();
    let names = [format!("skerry-{pid}-hub"), format!("skerry-{pid}-node")];
    let _removed = Namespaces::make(&names)?;
    let mut arguments: Vec<OsString> = std::env::args_os().skip(2).collect();
    arguments.splice(
        0..0,
        ["inside", "--hub-namespace", &names[0], "--node-namespace", &names[1]].map(OsString::from),
    );
    let status = Command::new("ip")
        .args(["netns", "exec", &names[0]])
        .arg(std::env::current_exe()?)
        .args(arguments)
        .status()
        .context("could not start `ip`")?;
    ensure!(status.success(), "the measurement failed ({status})");
    Ok(ExitCode::SUCCESS)
}

struct Namespaces<'a>(&'a [String; 2]);

impl<'a> Namespaces<'a> {
    fn make(names: &'a [String; 2]) -> Result<Self> {
        let made = Self(names);
        for name in names {
            emulator::ip(&["netns", "add", name])?;
        }
        Ok(made)
    }
}

impl Drop for Namespaces<'_> {
    fn drop(&mut self) {
        for name in self.0 {
            if let Err(error) = emulator::ip(&["netns", "del", name]) {
                eprintln!("bench: {error:#}");
            }
        }
    }
}
