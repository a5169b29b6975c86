//! `skerry os`: which version of the appliance's OS each node runs and should run, and how far it is.

use crate::fault::hinted;
use crate::{Output, cluster, out, table};
use anyhow::Result;
use clap::Subcommand;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use serde::Serialize;
use skerry_api::fleet::os::{
    ORDER_ANNOTATION, OsOrder, OsProgress, OsStep, PROGRESS_ANNOTATION, VERSION_ANNOTATION,
};
use skerry_api::fleet::v1alpha1::SITE_LABEL;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Show the appliances: the version that runs, the one that is ordered, and how far it is. Exit code 1 when one has
    /// given its order up
    List {
        /// Only this site
        #[arg(long)]
        site: Option<String>,
    },
}

/// One appliance.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    site: Option<String>,
    node: String,
    running: String,
    /// Nothing: its OS is left alone.
    ordered: Option<OsOrder>,
    progress: OsProgress,
}

/// Runs the verb.
pub(crate) async fn run(
    verb: Verb,
    kubeconfig: Option<PathBuf>,
    output: Output,
) -> Result<ExitCode> {
    let Verb::List { site } = verb;
    let client = cluster::connect(kubeconfig).await?;
    let params = match &site {
        Some(site) => ListParams::default().labels(&format!("{SITE_LABEL}={site}")),
        None => ListParams::default(),
    };
    let nodes = Api::<Node>::all(client).list(&params).await.map_err(|error| {
        hinted(format!("the nodes could not be read: {error}"), "check the kubeconfig")
    })?;
    let mut rows: Vec<Row> = nodes.iter().filter_map(row).collect();
    rows.sort_by(|a, b| (&a.site, &a.node).cmp(&(&b.site, &b.node)));
    if rows.is_empty()
        && let Some(site) = &site
    {
        let what = format!("site `{site}` has no appliance that has joined");
        return Err(hinted(
            what,
            "`skerry status` lists all sites, `skerry os list` all appliances",
        ));
    }
    match output {
        Output::Json => out::line(serde_json::to_string(&rows)?)?,
        Output::Table if rows.is_empty() => out::line("no appliance has joined")?,
        Output::Table => print(&rows)?,
    }
    let failed = rows.iter().any(|row| row.progress.step == OsStep::Failed);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// What a Node says; nothing when it is no appliance.
fn row(node: &Node) -> Option<Row> {
    let annotation = |key: &str| node.annotations().get(key);
    let read = |key: &str| annotation(key).map(String::as_str);
    Some(Row {
        site: node.labels().get(SITE_LABEL).cloned(),
        node: node.name_any(),
        running: annotation(VERSION_ANNOTATION)?.clone(),
        ordered: read(ORDER_ANNOTATION).and_then(|text| serde_json::from_str(text).ok()),
        progress: read(PROGRESS_ANNOTATION)
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default(),
    })
}

fn print(rows: &[Row]) -> Result<()> {
    let dash = || "-".to_owned();
    let cells = rows.iter().map(|row| {
        let ordered = row.ordered.as_ref();
        // A node that has not seen its order yet says nothing of it.
        let seen = ordered.is_some_and(|order| order.version == row.progress.version);
        let OsProgress { step, percent, reason, .. } = &row.progress;
        let state = match (ordered, seen, percent) {
            (None, ..) => dash(),
            (Some(_), false, _) => "not seen yet".into(),
            (Some(_), true, Some(percent)) => format!("{} {percent} %", step.word()),
            (Some(_), true, None) => step.word().into(),
        };
        vec![
            row.site.clone().unwrap_or_else(dash),
            row.node.clone(),
            row.running.clone(),
            ordered.map_or_else(dash, |order| order.version.clone()),
            ordered.map_or_else(dash, |order| order.channel.clone()),
            state,
            if seen { reason.clone() } else { String::new() },
        ]
    });
    let header = ["SITE", "NODE", "RUNNING", "ORDERED", "CHANNEL", "STATE", "MESSAGE"];
    table::print(&header, &cells.collect::<Vec<_>>())?;
    let failed = |row: &&Row| row.progress.step == OsStep::Failed && !row.progress.hint.is_empty();
    for row in rows.iter().filter(failed) {
        out::line(format_args!("{}: hint: {}", row.node, row.progress.hint))?;
    }
    Ok(())
}
