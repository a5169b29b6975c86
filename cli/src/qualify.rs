//! `skerry qualify --node NAME`: what a node has reported of its kernel to the cluster.
//!
//! Everything else of `skerry qualify` asks this machine or files, and is `skerry_qualify::command`.

use crate::fault::hinted;
use crate::{Output, cluster, out, table};
use anyhow::Result;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use skerry_api::fleet::v1alpha1::{NodeQualification, NodeQualificationStatus};
use skerry_qualify::publish::{PREFIX, REQUEST};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long a node may take to answer `--again`; under emulation a run takes a minute.
const AGAIN_TIMEOUT: Duration = Duration::from_secs(300);
/// Pause between two looks for the answer.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Time after which a person is told what is waited for.
const TOLD_AFTER: Duration = Duration::from_secs(2);

/// What is asked of a node's report.
#[derive(Debug, Default)]
pub(crate) struct Args {
    node: String,
    again: bool,
    output: Option<String>,
    kubeconfig: Option<PathBuf>,
}

/// Reads `--node NAME`, `--again`, `--output FORM` and `--kubeconfig FILE`; nothing when this is not about a node.
///
/// # Errors
///
/// An option that does not go with `--node`.
pub(crate) fn parse(words: &[String]) -> Option<Result<Args>> {
    let about_node = |word: &String| word == "--node" || word.starts_with("--node=");
    words.iter().any(about_node).then(|| {
        let mut args = Args::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let (name, inline) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (word.as_str(), None),
            };
            let mut value = || {
                let value = inline.clone().or_else(|| words.next().cloned());
                let hint = "`skerry qualify --node NAME [--again] [--output json]`";
                value.ok_or_else(|| hinted(format!("`{name}` needs a value"), hint))
            };
            match name {
                "--node" => args.node = value()?,
                "--output" => args.output = Some(value()?),
                "--kubeconfig" => args.kubeconfig = Some(value()?.into()),
                "--again" => args.again = true,
                other => {
                    let hint = "beside `--node` there are `--again`, `--output` and `--kubeconfig`";
                    return Err(hinted(format!("`{other}` does not go with `--node`"), hint));
                }
            }
        }
        Ok(args)
    })
}

/// Prints the report. Exit code 1 when the node's kernel is not qualified.
pub(crate) async fn run(
    args: Args,
    kubeconfig: Option<PathBuf>,
    output: Output,
) -> Result<ExitCode> {
    let client = cluster::connect(args.kubeconfig.or(kubeconfig)).await?;
    let json = match args.output.as_deref() {
        None => output == Output::Json,
        Some("json") => true,
        Some("text" | "table") => false,
        Some(other) => {
            return Err(hinted(format!("`--output {other}`"), "there are `table` and `json`"));
        }
    };
    if args.again {
        again(&client, &args.node).await?;
    }
    let reports: Api<NodeQualification> = Api::all(client.clone());
    let found = match reports.get_opt(&args.node).await {
        Ok(found) => found,
        // The kind comes with the first report.
        Err(kube::Error::Api(status)) if status.code == 404 => None,
        Err(error) => return Err(error.into()),
    };
    let Some(status) = found.and_then(|found| found.status) else {
        return Err(hinted(
            format!("node `{}` has not reported on its kernel", args.node),
            "a node reports soon after it has joined; `skerry status` shows who has. KubeEdge's CloudCore keeps no \
             reports: see the node's labels `qualification.skerry.dev/…`",
        ));
    };
    if json {
        // In the form of a report, so that `skerry qualify verify` and `diff` take it.
        let mut file = json!({"report": status.report, "digest": status.digest});
        if let Some(signature) = &status.signature {
            file["signature"] = signature.clone();
        }
        out::line(serde_json::to_string_pretty(&file)?)?;
    } else {
        print(&args.node, &status)?;
    }
    let good = matches!(status.verdict.as_str(), "Qualified" | "Degraded");
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn print(node: &str, status: &NodeQualificationStatus) -> Result<()> {
    let NodeQualificationStatus { kernel, arch, verdict, observed_at, rules, .. } = status;
    let signed = if status.signature.is_some() { "signed" } else { "not signed" };
    out::line(format_args!(
        "{node}: Linux {kernel}, {arch}: {verdict} (judged {observed_at} by rules {rules}, {signed})\n"
    ))?;
    let rows = status.profiles.iter().map(|row| {
        let dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        vec![row.profile.clone(), row.verdict.clone(), dash(&row.missing), dash(&row.hint)]
    });
    table::print(&["PROFILE", "VERDICT", "WHY", "HINT"], &rows.collect::<Vec<_>>())
}

/// Asks the node to judge its kernel now, and waits for its answer.
async fn again(client: &kube::Client, node: &str) -> Result<()> {
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(client.clone());
    let request = jiff::Timestamp::now().to_string();
    let patch = json!({"metadata": {"annotations": {REQUEST: request}}});
    nodes.patch(node, &PatchParams::default(), &Patch::Merge(&patch)).await.map_err(|error| {
        match &error {
            kube::Error::Api(status) if status.code == 404 => hinted(
                format!("there is no node `{node}`"),
                "`skerry status` shows the sites' nodes",
            ),
            _ => error.into(),
        }
    })?;
    let (start, mut told) = (Instant::now(), false);
    let answered = format!("{PREFIX}/answered");
    loop {
        let now = nodes.get(node).await?;
        let answer = now.metadata.annotations.as_ref().and_then(|all| all.get(&answered));
        if answer == Some(&request) {
            return Ok(());
        }
        if start.elapsed() >= AGAIN_TIMEOUT {
            let text = format!("node `{node}` has not answered in {} s", AGAIN_TIMEOUT.as_secs());
            return Err(hinted(
                text,
                "it answers when it is connected again; `skerry link` shows whether it is",
            ));
        }
        if !told && start.elapsed() >= TOLD_AFTER {
            eprintln!("waiting for node `{node}`");
            told = true;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(Into::into).collect()
    }

    #[test]
    fn only_what_names_a_node_asks_the_cluster() {
        assert!(parse(&words("--config f --output json")).is_none());
        let args = parse(&words("--node=a --again --output json")).expect("a node").expect("fine");
        assert_eq!(
            (args.node.as_str(), args.again, args.output.as_deref()),
            ("a", true, Some("json"))
        );
        assert!(parse(&words("--node a --config f")).expect("a node").is_err());
        assert!(parse(&words("--node")).expect("a node").is_err());
    }
}
