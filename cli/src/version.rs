//! `skerry version`.

use crate::{Output, out};
use serde_json::json;
use std::process::ExitCode;

/// Prints the version of this program.
pub(crate) fn run(output: Output) -> anyhow::Result<ExitCode> {
    let version = env!("CARGO_PKG_VERSION");
    match output {
        Output::Table => out::line(format_args!("skerry {version}"))?,
        Output::Json => out::line(json!({"version": version}))?,
    }
    Ok(ExitCode::SUCCESS)
}
