//! `skerry edge`: what concerns one edge node, on that node: taking it over from KubeEdge, and giving it back.

use crate::{Output, fault::hinted, out, table};
use anyhow::Result;
use clap::{Args, Subcommand};
use skerry_edge::adopt::{self, AdoptError, Change, Direction, Plan};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Take this node over from KubeEdge's EdgeCore; running containers go on
    Adopt(Arguments),
    /// Give this node back to KubeEdge's EdgeCore; running containers go on
    Release(Arguments),
}

#[derive(Args)]
pub(crate) struct Arguments {
    /// KubeEdge's configuration
    #[arg(long, default_value = "/etc/kubeedge/config/edgecore.yaml")]
    config: PathBuf,
    /// Only show what would be done; exit code 1 when a container would be restarted
    #[arg(long)]
    dry_run: bool,
    /// Go on also when a container would be restarted
    #[arg(long)]
    allow_restarts: bool,
}

/// Runs the verb.
pub(crate) async fn run(verb: Verb, output: Output) -> Result<ExitCode> {
    let (plan, arguments) = match verb {
        Verb::Adopt(arguments) => (adopt::plan_adopt(&arguments.config).await, arguments),
        Verb::Release(arguments) => (adopt::plan_release(&arguments.config).await, arguments),
    };
    let plan = plan.map_err(told)?;
    match output {
        Output::Table => show(&plan)?,
        Output::Json => {
            let mut value = serde_json::to_value(&plan)?;
            value["dryRun"] = arguments.dry_run.into();
            out::line(value)?;
        }
    }
    let restarts = plan.restarts().count();
    if arguments.dry_run {
        if let Some(running) = &plan.running {
            eprintln!("note: {running}; stop it before this is done");
        }
        if plan.already {
            eprintln!("note: there is nothing to do, this was done before");
        }
        return Ok(if restarts == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) });
    }
    if restarts > 0 && !arguments.allow_restarts && plan.running.is_none() {
        return Err(hinted(
            format!("{restarts} container(s) would be restarted, so nothing was done"),
            "see the list with --dry-run; --allow-restarts goes on all the same",
        ));
    }
    let (direction, node, already) = (plan.direction, plan.node.clone(), plan.already);
    plan.carry_out().map_err(told)?;
    let config = arguments.config.display();
    match (direction, already) {
        (Direction::Adopt, true) => eprintln!("node `{node}` was taken over before; nothing to do"),
        (Direction::Release, true) => eprintln!("node `{node}` is KubeEdge's; nothing to do"),
        (Direction::Adopt, false) => {
            eprintln!("node `{node}` is taken over; start it: edgecore run --config {config}");
        }
        (Direction::Release, false) => {
            eprintln!(
                "node `{node}` is KubeEdge's again; start its edgecore with --config {config}"
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(plan: &Plan) -> Result<()> {
    for warning in &plan.warnings {
        eprintln!("warning: {warning}");
    }
    if plan.already {
        return Ok(());
    }
    let rows: Vec<Vec<String>> = plan
        .containers
        .iter()
        .map(|one| {
            let fate = one
                .restart
                .as_ref()
                .map_or("goes on".to_owned(), |why| format!("is restarted: {why}"));
            let short = one.id.get(..13).unwrap_or(&one.id).to_owned();
            vec![one.pod.clone(), one.container.clone(), short, one.restart_count.to_string(), fate]
        })
        .collect();
    table::print(&["POD", "CONTAINER", "ID", "RESTARTS", "RUNNING CONTAINER"], &rows)?;
    out::line("")?;
    let count = |change| plan.objects.iter().filter(|object| object.change == change).count();
    let rows: Vec<Vec<String>> = plan
        .objects
        .iter()
        .filter(|object| object.change != Change::Keep)
        .map(|object| {
            let change = match object.change {
                Change::Import => "import",
                Change::Write => "write",
                Change::Remove => "remove",
                Change::Keep => "keep",
                Change::Skip => "skip",
            };
            vec![object.path.clone(), change.to_owned(), object.reason.clone()]
        })
        .collect();
    table::print(&["OBJECT", "CHANGE", "WHY"], &rows)?;
    out::line("")?;
    out::line(format!("{} object(s) stay as they are", count(Change::Keep)))?;
    out::line(format!("certificate: {}", plan.certificate))
}

fn told(error: AdoptError) -> anyhow::Error {
    match error.hint() {
        Some(hint) => {
            let causes = std::iter::successors(
                Some(&error as &(dyn std::error::Error + 'static)),
                |error| error.source(),
            );
            let text: Vec<String> = causes.map(ToString::to_string).collect();
            hinted(text.join(": "), hint)
        }
        None => error.into(),
    }
}
