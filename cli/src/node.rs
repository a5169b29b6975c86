//! `skerry node`: whose certificates count.

use crate::token::{chain, second};
use crate::{Output, cluster, out, table};
use anyhow::Result;
use clap::Subcommand;
use serde_json::json;
use skerry_cloudcore::{Amnesty, DecisionError, IdentityRow};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Show the nodes with a certificate: serial number, end, and whether it counts
    Identities,
    /// End every certificate of a node and cut its connections; it may join again with a new token only
    Revoke {
        /// Name of the node
        node: String,
        /// Only the certificate with this serial number, in hex
        #[arg(long)]
        serial: Option<String>,
    },
    /// Deny a node to renew a certificate that has expired; it needs a new token then
    Deny {
        /// Name of the node
        node: String,
    },
    /// Take back every `revoke` and `deny` for a node
    Allow {
        /// Name of the node
        node: String,
    },
    /// Show or set for how long after its end a certificate may still be renewed
    Amnesty {
        /// `never`, `unlimited`, or a number and s, m, h or d
        policy: Option<Amnesty>,
    },
}

/// Runs the verb.
pub(crate) async fn run(
    verb: Verb,
    kubeconfig: Option<PathBuf>,
    output: Output,
) -> Result<ExitCode> {
    let client = cluster::connect(kubeconfig).await?;
    let (node, done) = match verb {
        Verb::Identities => return identities(&client, output).await,
        Verb::Amnesty { policy } => {
            let policy = match policy {
                Some(policy) => {
                    skerry_cloudcore::set_amnesty(&client, policy).await.map(|()| policy)
                }
                None => skerry_cloudcore::amnesty(&client).await,
            };
            let policy = policy.map_err(|error| anyhow::Error::msg(chain(&error)))?.to_string();
            match output {
                Output::Table => out::line(policy)?,
                Output::Json => out::line(json!({"amnesty": policy}))?,
            }
            return Ok(ExitCode::SUCCESS);
        }
        Verb::Revoke { node, serial: None } => {
            let result = skerry_cloudcore::revoke_node(&client, &node).await;
            (node, result.map(|()| "revoked"))
        }
        Verb::Revoke { node, serial: Some(serial) } => {
            let result = skerry_cloudcore::revoke_serial(&client, &node, &serial).await;
            (node, result.map(|()| "revoked"))
        }
        Verb::Deny { node } => {
            let result = skerry_cloudcore::deny_node(&client, &node).await;
            (node, result.map(|()| "denied"))
        }
        Verb::Allow { node } => {
            let result = skerry_cloudcore::allow_node(&client, &node).await;
            (node, result.map(|()| "allowed"))
        }
    };
    let done = done.map_err(|error: DecisionError| anyhow::Error::msg(chain(&error)))?;
    match output {
        Output::Table => out::line(format_args!("node `{node}` is {done}"))?,
        Output::Json => out::line(json!({"node": node, "decision": done}))?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn identities(client: &kube::Client, output: Output) -> Result<ExitCode> {
    let list = skerry_cloudcore::identities(client).await?;
    let rows: Vec<IdentityRow> = list.into_iter().map(IdentityRow::from).collect();
    match output {
        Output::Json => out::line(json!({"nodes": rows}))?,
        Output::Table => {
            let dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
            let cells = rows.iter().map(|row| {
                vec![
                    row.node.clone(),
                    row.certificate.to_owned(),
                    second(&dash(&row.not_after)),
                    if row.denied { "denied".into() } else { "-".into() },
                    dash(&row.serial),
                ]
            });
            let header = ["NODE", "CERTIFICATE", "UNTIL", "AMNESTY", "SERIAL"];
            table::print(&header, &cells.collect::<Vec<_>>())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
