//! `skerry ca`: the certificate authority of the nodes, and its replacement.

use crate::fault::hinted;
use crate::token::{chain, second};
use crate::{Output, cluster, out, table};
use anyhow::Result;
use clap::Subcommand;
use skerry_cloudcore::{CaStatus, RotationError};
use std::path::PathBuf;
use std::process::ExitCode;

/// Characters of a fingerprint that a person needs.
const FINGERPRINT_LEN: usize = 16;

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Show the CAs in force, and which nodes have followed a rotation; exit code 1 when a ready node has not
    Status,
    /// Make a new CA that signs from now on, while certificates of the old one still count
    Rotate,
    /// End the trust in certificates of the old CA
    Finish {
        /// Also when connected nodes have not followed; they need a new token then
        #[arg(long)]
        force: bool,
    },
}

/// Runs the verb.
pub(crate) async fn run(
    verb: Verb,
    kubeconfig: Option<PathBuf>,
    output: Output,
) -> Result<ExitCode> {
    let client = cluster::connect(kubeconfig).await?;
    let is_question = matches!(verb, Verb::Status);
    let status = match verb {
        Verb::Status => skerry_cloudcore::ca_status(&client).await,
        Verb::Rotate => skerry_cloudcore::rotate_ca(&client).await,
        Verb::Finish { force } => skerry_cloudcore::finish_ca(&client, force).await,
    };
    let status = status.map_err(|error: RotationError| match error.hint() {
        Some(hint) => hinted(chain(&error), hint),
        None => anyhow::Error::msg(chain(&error)),
    })?;
    match output {
        Output::Json => out::line(serde_json::to_string(&status)?)?,
        Output::Table => print(&status)?,
    }
    let is_rotating = status.rotating_since.is_some();
    let behind = status.nodes.iter().any(|node| node.ready && node.is_behind());
    Ok(if is_question && is_rotating && behind { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print(status: &CaStatus) -> Result<()> {
    let rows: Vec<_> = status
        .authorities
        .iter()
        .map(|ca| {
            vec![
                ca.role.to_owned(),
                ca.fingerprint.get(..FINGERPRINT_LEN).unwrap_or_default().to_owned(),
                second(&ca.not_after),
                ca.subject.clone(),
            ]
        })
        .collect();
    table::print(&["ROLE", "FINGERPRINT", "UNTIL", "SUBJECT"], &rows)?;
    let Some(since) = &status.rotating_since else { return Ok(()) };
    out::line(format_args!("\nA rotation is in progress since {}.\n", second(since)))?;
    let word = |fact: Option<bool>| match fact {
        Some(true) => "new",
        Some(false) => "old",
        None => "-",
    };
    let rows: Vec<_> = status
        .nodes
        .iter()
        .map(|node| {
            vec![
                node.node.clone(),
                if node.ready { "ready" } else { "away" }.to_owned(),
                word(node.certificate_is_new).to_owned(),
                word(node.bundle_is_new).to_owned(),
                if node.is_behind() { "no" } else { "yes" }.to_owned(),
            ]
        })
        .collect();
    table::print(&["NODE", "STATE", "CERTIFICATE", "TRUST", "FOLLOWED"], &rows)
}
