//! `skerry version`.

use crate::Output;
use serde_json::json;
use std::process::ExitCode;

/// Prints the version of this program.
pub(crate) fn run(output: Output) -> anyhow::Result<ExitCode> {
    let version = env!("CARGO_PKG_VERSION");
    match output {
        Output::Table => println!("skerry {version}"),
        Output::Json => println!("{}", json!({"version": version})),
    }
    Ok(ExitCode::SUCCESS)
}
