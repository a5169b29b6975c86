//! `skerry token`: how new nodes get in.

use crate::fault::hinted;
use crate::{Output, cluster, out, table};
use anyhow::Result;
use clap::Subcommand;
use serde_json::json;
use skerry_cloudcore::{NewToken, TokenError};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// The most tokens made by one call; each is a Secret.
const COUNT_MAX: u32 = 1000;

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Make join tokens: for one node, for numbered nodes, or one for all nodes that match a pattern
    Create(CreateArgs),
    /// Show the tokens that have not been revoked, and who has used them
    List,
    /// Make tokens useless, by their ids
    Revoke {
        /// As `skerry token list` shows them
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("whose").required(true).args(["name", "node", "prefix", "any_node_matching"])))]
pub(crate) struct CreateArgs {
    /// Name of the node, as in the site's `nodes`
    name: Option<String>,
    /// The same
    #[arg(long)]
    node: Option<String>,
    /// Make a token each for nodes PREFIX1, PREFIX2 and so on; needs --count
    #[arg(long, requires = "count")]
    prefix: Option<String>,
    /// How many nodes with --prefix
    #[arg(
        long,
        requires = "prefix",
        conflicts_with_all = ["name", "node", "any_node_matching"],
        value_parser = clap::value_parser!(u32).range(1..=COUNT_MAX as i64)
    )]
    count: Option<u32>,
    /// Make one token for every node whose name matches; `*` stands for anything
    #[arg(long, value_name = "PATTERN")]
    any_node_matching: Option<String>,
    /// How many nodes may use a token with --any-node-matching, 1 by default
    #[arg(long, requires = "any_node_matching", conflicts_with_all = ["name", "node", "prefix"])]
    uses: Option<u32>,
    /// Time until it expires: a number and s, m, h or d
    #[arg(long, default_value = "24h", value_parser = span)]
    ttl: Duration,
}

/// Runs the verb.
pub(crate) async fn run(
    verb: Verb,
    kubeconfig: Option<PathBuf>,
    output: Output,
) -> Result<ExitCode> {
    let client = cluster::connect(kubeconfig).await?;
    match verb {
        Verb::Create(args) => create(&client, args, output).await,
        Verb::List => list(&client, output).await,
        Verb::Revoke { ids } => revoke(&client, &ids, output).await,
    }
}

async fn create(client: &kube::Client, args: CreateArgs, output: Output) -> Result<ExitCode> {
    let ttl = args.ttl;
    let make = async |pattern: &str, uses| {
        let made = skerry_cloudcore::create_batch_token(client, pattern, uses, ttl).await;
        made.map_err(|error| explain(pattern, &error))
    };
    let facts = |made: &NewToken| json!({"node": made.node, "id": made.id, "token": made.token.to_string(), "ttlSeconds": ttl.as_secs()});
    if let (Some(prefix), Some(count)) = (&args.prefix, args.count) {
        let mut tokens = Vec::new();
        for name in numbered(prefix, count) {
            tokens.push(make(&name, 1).await?);
        }
        match output {
            Output::Table => {
                let rows: Vec<_> = tokens
                    .iter()
                    .map(|made| vec![made.node.clone(), made.token.to_string()])
                    .collect();
                table::print(&["NODE", "TOKEN"], &rows)?;
            }
            Output::Json => {
                out::line(json!({"tokens": tokens.iter().map(facts).collect::<Vec<_>>()}))?;
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    let made = match (&args.any_node_matching, args.name.or(args.node)) {
        (Some(pattern), _) => make(pattern, args.uses.unwrap_or(1)).await?,
        (None, Some(node)) if node.contains('*') => {
            let hint = "use --any-node-matching for a pattern";
            return Err(hinted(format!("`{node}` is no node name"), hint));
        }
        (None, node) => make(&node.unwrap_or_default(), 1).await?,
    };
    match output {
        Output::Table => out::line(&made.token)?,
        Output::Json => out::line(facts(&made))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// `prefix` with the numbers from 1, all with as many digits as the last has.
fn numbered(prefix: &str, count: u32) -> impl Iterator<Item = String> {
    let width = count.to_string().len();
    (1..=count).map(move |number| format!("{prefix}{number:0width$}"))
}

async fn list(client: &kube::Client, output: Output) -> Result<ExitCode> {
    let tokens = skerry_cloudcore::list_tokens(client).await?;
    match output {
        Output::Json => out::line(json!({"tokens": tokens}))?,
        Output::Table => {
            let rows: Vec<_> = tokens
                .iter()
                .map(|token| {
                    let expires = token.expires.as_deref().unwrap_or("-");
                    let expires = if token.expired { "expired".into() } else { second(expires) };
                    vec![
                        token.id.clone(),
                        token.node.clone(),
                        format!("{}/{}", token.used_by.len(), token.uses_max),
                        expires,
                        token.used_by.join(","),
                    ]
                })
                .collect();
            table::print(&["ID", "NODE", "USED", "EXPIRES", "USED BY"], &rows)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn revoke(client: &kube::Client, ids: &[String], output: Output) -> Result<ExitCode> {
    let (mut revoked, mut absent) = (Vec::new(), Vec::new());
    for id in ids {
        let found = skerry_cloudcore::revoke_token(client, id).await?;
        if found { revoked.push(id) } else { absent.push(id) }
    }
    if output == Output::Json {
        out::line(json!({"revoked": revoked, "absent": absent}))?;
    }
    for id in &absent {
        eprintln!("skerry: there is no token `{id}`");
    }
    Ok(if absent.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub(crate) fn explain(node: &str, error: &TokenError) -> anyhow::Error {
    let what = format!("no token for node `{node}`: {}", chain(error));
    match error {
        TokenError::Authority(_) | TokenError::Record(_) => {
            let hint =
                "is CloudCore running? it makes the certificate authority at its first start";
            hinted(what, hint)
        }
        _ => anyhow::Error::msg(what),
    }
}

/// A time without the fraction of its second.
pub(crate) fn second(time: &str) -> String {
    match time.split_once('.') {
        Some((whole, _)) => format!("{whole}Z"),
        None => time.to_owned(),
    }
}

pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

pub(crate) fn span(text: &str) -> Result<Duration, String> {
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
    use clap::Parser;

    #[test]
    fn spans_need_a_unit() {
        assert_eq!(span("90m"), Ok(Duration::from_secs(5400)));
        for text in ["", "5", "h", "5y", "-1h", "99999999999999999999d"] {
            assert!(span(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbered_nodes_sort_by_name() {
        assert_eq!(numbered("a-", 3).collect::<Vec<_>>(), ["a-1", "a-2", "a-3"]);
        assert_eq!(numbered("a", 10).last().as_deref(), Some("a10"));
        assert_eq!(numbered("a", 10).next().as_deref(), Some("a01"));
    }

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        verb: Verb,
    }

    #[test]
    fn token_is_for_exactly_one_kind_of_nodes() {
        let ok = |words: &str| Line::try_parse_from(words.split(' ')).is_ok();
        for good in [
            "t create edge1",
            "t create --node edge1 --ttl 5m",
            "t create --prefix a- --count 3",
            "t create --any-node-matching a* --uses 5",
            "t list",
            "t revoke abc def",
        ] {
            assert!(ok(good), "{good}");
        }
        for bad in [
            "t create",
            "t create edge1 --node edge1",
            "t create --prefix a-",
            "t create --count 3",
            "t create edge1 --uses 5",
            "t create edge1 --count 5",
            "t create --prefix a --count 0",
            "t revoke",
        ] {
            assert!(!ok(bad), "{bad}");
        }
    }
}
