//! `skerry token create`: how a new node gets in.

use crate::{Output, cluster, fault::hinted, out};
use anyhow::Result;
use clap::Subcommand;
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Make a join token for one node; it works once and expires
    Create {
        /// Name of the node, as in the site's `nodes`
        node: String,
        /// Time until it expires: a number and s, m, h or d
        #[arg(long, default_value = "24h", value_parser = span)]
        ttl: Duration,
    },
}

/// Runs the verb.
pub(crate) async fn run(
    verb: Verb,
    kubeconfig: Option<PathBuf>,
    output: Output,
) -> Result<ExitCode> {
    let Verb::Create { node, ttl } = verb;
    let client = cluster::connect(kubeconfig).await?;
    let token = skerry_cloudcore::create_token(&client, &node, ttl).await.map_err(|error| {
        let hint = "is CloudCore running? it makes the certificate authority at its first start";
        hinted(format!("no token for node `{node}`: {}", chain(&error)), hint)
    })?;
    match output {
        Output::Table => out::line(token)?,
        Output::Json => {
            let token = token.to_string();
            out::line(json!({"node": node, "token": token, "ttlSeconds": ttl.as_secs()}))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn span(text: &str) -> Result<Duration, String> {
    let expected = || format!("`{text}` is no span of time; expected a number and s, m, h or d");
    let unit = text.chars().last().ok_or_else(expected)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(expected()),
    };
    let count: u64 = text[..text.len() - 1].parse().map_err(|_| expected())?;
    count.checked_mul(seconds).map(Duration::from_secs).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_need_a_unit() {
        assert_eq!(span("90m"), Ok(Duration::from_secs(5400)));
        for text in ["", "5", "h", "5y", "-1h", "99999999999999999999d"] {
            assert!(span(text).is_err(), "{text}");
        }
    }
}
