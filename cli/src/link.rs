//! `skerry link`: every node's connection as the hub sees it.
//!
//! Asks CloudCore's monitor listener, which is on loopback: this verb runs where CloudCore runs, or through a forwarded
//! port.

use crate::fault::hinted;
use crate::{Output, monitor, out, table};
use anyhow::{Context, Result};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use std::process::ExitCode;
use std::time::Duration;

/// Time for the whole answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest answer: 10,000 nodes at about 600 bytes, with room.
const ANSWER_LEN_MAX: usize = 64 * 1024 * 1024;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// CloudCore's monitor address
    #[arg(long, env = "SKERRY_MONITOR", default_value = "http://127.0.0.1:9091")]
    monitor: String,
    /// Only this node; exit code 1 when it is not connected
    #[arg(long)]
    node: Option<String>,
}

/// One link, as CloudCore's monitor tells it (`skerry_cloudcore::LinkInfo`, which documents the units).
#[derive(Debug, Serialize, Deserialize)]
struct Link {
    node: String,
    transport: String,
    peer: String,
    since: i64,
    rtt_ms: Option<u32>,
    window: u32,
    in_flight: u32,
    backlog: u32,
    backlog_bytes: u64,
    requests: u32,
    bytes_in: u64,
    bytes_out: u64,
    messages_in: u64,
    messages_out: u64,
    last_byte_ms_ago: u64,
    certificate_not_after: i64,
    capabilities: String,
}

/// Prints the links.
pub(crate) async fn run(args: Args, output: Output) -> Result<ExitCode> {
    let mut links =
        tokio::time::timeout(ANSWER_TIMEOUT, fetch(&args.monitor)).await.unwrap_or_else(|_| {
            let limit_s = ANSWER_TIMEOUT.as_secs();
            Err(hinted(
                format!(
                    "cloudcore's monitor at {} did not answer within {limit_s} s",
                    args.monitor
                ),
                "the hub is overloaded, or something else listens at that address",
            ))
        })?;
    if let Some(node) = &args.node {
        links.retain(|link| link.node == *node);
    }
    match output {
        Output::Json => out::line(serde_json::to_string(&links)?)?,
        Output::Table => print(&links)?,
    }
    let missing = args.node.is_some() && links.is_empty();
    match &args.node {
        Some(node) if missing => eprintln!("node {node} is not connected"),
        None if links.is_empty() => eprintln!("no node is connected"),
        _ => {}
    }
    Ok(if missing { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn fetch(monitor: &str) -> Result<Vec<Link>> {
    let address = format!("{}/links", monitor.trim_end_matches('/'));
    let (status, body) = monitor::ask(monitor, &address, ANSWER_LEN_MAX).await?;
    if !status.is_success() {
        return Err(hinted(
            format!("{address} answered {status}"),
            "something else than cloudcore listens there; name its monitor with --monitor",
        ));
    }
    serde_json::from_slice(&body).context("the answer is no list of links")
}

fn print(links: &[Link]) -> Result<()> {
    let now = Timestamp::now();
    let rows = links.iter().map(|link| row(link, now)).collect::<Vec<_>>();
    table::print(
        &[
            "NODE",
            "TRANSPORT",
            "RTT",
            "WINDOW",
            "BACKLOG",
            "IN",
            "OUT",
            "LAST BYTE",
            "UP",
            "CERTIFICATE",
        ],
        &rows,
    )?;
    Ok(())
}

fn row(link: &Link, now: Timestamp) -> Vec<String> {
    let backlog = match link.backlog {
        0 => "0".to_owned(),
        count => format!("{count} ({})", size(link.backlog_bytes)),
    };
    vec![
        link.node.clone(),
        link.transport.clone(),
        link.rtt_ms.map_or("-".to_owned(), |rtt| format!("{rtt} ms")),
        format!("{}/{}", link.in_flight, link.window),
        backlog,
        size(link.bytes_in),
        size(link.bytes_out),
        format!("{:.0} s ago", link.last_byte_ms_ago as f64 / 1000.0),
        age(SignedDuration::from_millis(now.as_millisecond() - link.since)),
        expiry(SignedDuration::from_secs(link.certificate_not_after - now.as_second())),
    ]
}

fn expiry(left: SignedDuration) -> String {
    match left.is_negative() {
        true => "expired".to_owned(),
        false => format!("{} left", age(left)),
    }
}

/// Bytes, in the units of `ls -h`.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["B", "KB", "MB", "GB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

/// The largest unit that fits, as kubectl writes ages.
fn age(span: SignedDuration) -> String {
    let seconds = span.as_secs().max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages_are_short() {
        assert_eq!(size(999), "999 B");
        assert_eq!(size(1_250_000), "1.2 MB");
        assert_eq!(age(SignedDuration::from_secs(119)), "119s");
        assert_eq!(age(SignedDuration::from_secs(7199)), "119m");
        assert_eq!(age(SignedDuration::from_hours(24 * 30)), "30d");
        assert_eq!(expiry(SignedDuration::from_secs(-1)), "expired");
        assert_eq!(expiry(SignedDuration::from_hours(49)), "2d left");
    }
}
