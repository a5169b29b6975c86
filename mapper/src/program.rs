//! The program around a mapper: flags, log, signals, exit code.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Arg, ArgAction, Command, value_parser};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::config::Config;
use crate::driver::Protocol;
use crate::runtime;

/// Runs a mapper as a program until SIGTERM or SIGINT: `NAME --config-file config.yaml`.
///
/// Logs to stderr; `-v` says more, `RUST_LOG` decides if set. Returns 0 after a signal and 2 if the
/// mapper could not start; the error and its causes are on stderr then.
pub fn main<P: Protocol>(name: &'static str, about: &'static str, protocol: P) -> ExitCode {
    let flags = Command::new(name)
        .about(about)
        .version(env!("CARGO_PKG_VERSION"))
        .arg(
            Arg::new("config-file")
                .long("config-file")
                .value_name("FILE")
                .help("The mapper's configuration")
                .default_value("config.yaml")
                .value_parser(value_parser!(PathBuf)),
        )
        .arg(Arg::new("verbose").short('v').help("Log each step").action(ArgAction::SetTrue))
        .get_matches();
    let level = if flags.get_flag("verbose") { "debug,h2=info,hyper=info" } else { "info" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let path = flags.get_one::<PathBuf>("config-file").expect("the flag has a default");
    match start(path, protocol) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn start<P: Protocol>(path: &std::path::Path, protocol: P) -> anyhow::Result<()> {
    let config = Config::read(path)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let stop = async {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            tracing::info!("stopping");
        };
        runtime::run(protocol, config, stop).await?;
        Ok(())
    })
}
