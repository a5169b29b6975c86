//! `skerry status`: the fleet at a glance.

use crate::fault::hinted;
use crate::{Output, cluster, out, table};
use anyhow::Result;
use skerry_api::fleet::v1alpha1::SiteOs;
use skerry_reconciler::{FleetStatus, status};
use std::path::PathBuf;
use std::process::ExitCode;

/// Characters of a revision that a person needs.
const REVISION_LEN: usize = 8;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this site
    #[arg(long)]
    site: Option<String>,
}

/// Prints sites and releases. Exit code 1 when the fleet, or what was asked for of it, is not ready.
pub(crate) async fn run(
    args: Args,
    kubeconfig: Option<PathBuf>,
    output: Output,
) -> Result<ExitCode> {
    let client = cluster::connect(kubeconfig).await?;
    let mut fleet = status(client).await.map_err(|error| match error.hint() {
        Some(hint) => hinted(error.to_string(), hint),
        None => error.into(),
    })?;
    let ready = match &args.site {
        None => fleet.ready,
        Some(site) => {
            fleet.sites.retain(|row| row.site == *site);
            fleet.releases.retain(|row| row.site == *site);
            if fleet.sites.is_empty() {
                let hint = "`skerry status` lists all sites";
                return Err(hinted(format!("the fleet has no site `{site}`"), hint));
            }
            fleet.releases.iter().all(|row| row.health == "Ready")
        }
    };
    match output {
        Output::Table => print(&fleet)?,
        Output::Json => out::line(serde_json::to_string(&fleet)?)?,
    }
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(fleet: &FleetStatus) -> Result<()> {
    let revision = short(fleet.revision.as_deref());
    let FleetStatus { remote, branch, message, .. } = fleet;
    out::line(format_args!("Fleet of {remote} at {branch}, {revision}: {message}\n"))?;
    for problem in &fleet.problems {
        out::line(format_args!("problem: {problem}"))?;
        if let Some(hint) = &problem.hint {
            out::line(format_args!("   hint: {hint}"))?;
        }
    }
    if !fleet.problems.is_empty() {
        out::line("")?;
    }
    let sites = fleet.sites.iter().map(|row| {
        let nodes = format!("{}/{}", row.nodes_ready, row.nodes_total);
        let network = row.network.as_ref().and_then(|network| network.cni.clone());
        vec![
            row.site.clone(),
            row.health.clone(),
            nodes,
            network.unwrap_or_else(|| "-".into()),
            row.os.as_ref().map_or_else(|| "-".into(), os),
            row.age.clone(),
            row.message.clone(),
        ]
    });
    let header = ["SITE", "HEALTH", "NODES", "NETWORK", "OS", "AGE", "MESSAGE"];
    table::print(&header, &sites.collect::<Vec<_>>())?;
    out::line("")?;
    let releases = fleet.releases.iter().map(|row| {
        vec![
            row.site.clone(),
            row.app.clone(),
            short(row.revision.as_deref()).to_owned(),
            format!("{}/{}", row.pods_ready, row.pods_total),
            row.health.clone(),
            row.age.clone(),
            row.message.clone(),
        ]
    });
    let header = ["SITE", "APP", "REVISION", "PODS", "HEALTH", "AGE", "MESSAGE"];
    table::print(&header, &releases.collect::<Vec<_>>())
}

/// The version that a site should run, and on how many of its appliances it does.
fn os(os: &SiteOs) -> String {
    let SiteOs { version, nodes_current, nodes_total, .. } = os;
    match nodes_current == nodes_total {
        true => version.clone(),
        false => format!("{version} ({nodes_current}/{nodes_total})"),
    }
}

fn short(revision: Option<&str>) -> &str {
    revision.map_or("-", |revision| revision.get(..REVISION_LEN).unwrap_or(revision))
}
