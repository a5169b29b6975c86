//! `skerry render` and `skerry diff`: what a fleet folder means, before it is pushed.

use crate::fault::hinted;
use crate::{Output, cluster, out, table};
use anyhow::Result;
use serde_json::{Value, json};
use skerry_reconciler::{Action, Change, render_dir};
use skerry_reconciler_core::{Problem, Rendered};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct RenderArgs {
    /// The folder that holds fleet.yaml
    #[arg(default_value = ".")]
    folder: PathBuf,
    /// Only this site
    #[arg(long)]
    site: Option<String>,
    /// Only this app
    #[arg(long)]
    app: Option<String>,
}

#[derive(clap::Args)]
pub(crate) struct DiffArgs {
    /// The folder that holds fleet.yaml
    #[arg(default_value = ".")]
    folder: PathBuf,
}

/// Prints the objects of every site and app. Exit code 1 when something does not render.
pub(crate) fn render(args: RenderArgs, output: Output) -> Result<ExitCode> {
    let mut rendered = read(&args.folder)?;
    rendered.releases.retain(|release, _| {
        args.site.as_ref().is_none_or(|site| *site == release.site)
            && args.app.as_ref().is_none_or(|app| *app == release.app)
    });
    let problems = rendered.all_problems();
    match output {
        Output::Table => out::text(&rendered.to_yaml())?,
        Output::Json => out::line(json!({"releases": releases(&rendered), "problems": problems}))?,
    }
    Ok(verdict(&problems))
}

/// Prints what would change. Exit code 1 when something would, or when something does not render.
pub(crate) async fn diff(
    args: DiffArgs,
    kubeconfig: Option<PathBuf>,
    output: Output,
) -> Result<ExitCode> {
    let rendered = read(&args.folder)?;
    let client = cluster::connect(kubeconfig).await?;
    let changes = skerry_reconciler::diff(client, &rendered)
        .await
        .map_err(|error| hinted(error.to_string(), error.hint()))?;
    let problems = rendered.all_problems();
    match output {
        Output::Table => print_changes(&changes, &problems)?,
        Output::Json => out::line(json!({"changes": changes, "problems": problems}))?,
    }
    let verdict = verdict(&problems);
    Ok(if changes.is_empty() { verdict } else { ExitCode::FAILURE })
}

fn read(folder: &Path) -> Result<Rendered> {
    render_dir(folder).map_err(|error| {
        let hint = error.hint();
        let error = anyhow::Error::new(error);
        match hint {
            Some(hint) => hinted(format!("{error:#}"), hint),
            None => error,
        }
    })
}

fn releases(rendered: &Rendered) -> Vec<Value> {
    let complete = rendered.releases.iter().filter_map(|(release, outcome)| {
        let render = outcome.as_ref().ok()?;
        let objects: Vec<&Value> = render.objects().values().map(|object| &object.value).collect();
        Some(json!({
            "site": release.site,
            "app": release.app,
            "digest": render.digest().as_str(),
            "objects": objects,
        }))
    });
    complete.collect()
}

fn print_changes(changes: &[Change], problems: &[Problem]) -> Result<()> {
    if changes.is_empty() {
        if problems.is_empty() {
            eprintln!("nothing would change");
        } else {
            eprintln!("nothing would change, and what follows would be held back");
        }
        return Ok(());
    }
    let row = |change: &Change| {
        let action = match change.action {
            Action::Create => "create",
            Action::Update => "update",
            Action::Prune => "prune",
            Action::Rejected => "rejected",
        };
        let fields = change.message.clone().unwrap_or_else(|| change.fields.join(", "));
        let object = format!("{}/{}", change.kind, change.name);
        vec![change.site.clone(), change.app.clone(), action.into(), object, fields]
    };
    let rows: Vec<Vec<String>> = changes.iter().map(row).collect();
    table::print(&["SITE", "APP", "ACTION", "OBJECT", "FIELDS"], &rows)
}

/// Tells every problem on standard error.
fn verdict(problems: &[Problem]) -> ExitCode {
    for problem in problems {
        eprintln!("error: {problem}");
        if let Some(hint) = &problem.hint {
            eprintln!("hint: {hint}");
        }
    }
    if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
