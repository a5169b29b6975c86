//! `skerry device history`: what a property of a device was, asked from the node that keeps it.
//!
//! The cluster says which node has the device, with the rights of the caller; CloudCore's monitor, which is on loopback,
//! passes the question on over the node's link. A long answer comes in pages, and each is printed when it is there.

use super::{Name, device};
use crate::fault::hinted;
use crate::{Output, monitor, out};
use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use skerry_api::fleet::v1alpha1::site_namespace;
use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

/// Time for one page.
const PAGE_TIMEOUT: Duration = Duration::from_secs(40);
/// The longest page, in bytes.
const PAGE_LEN_MAX: usize = 2 * 1024 * 1024;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// SITE/NAME of the device
    device: Name,
    /// Name of the property
    property: String,
    /// Where it begins: a time (RFC 3339), or how long ago (`90s`, `30m`, `12h`, `7d`)
    #[arg(long, default_value = "24h", value_name = "WHEN")]
    from: When,
    /// Where it ends; now if absent
    #[arg(long, value_name = "WHEN")]
    to: Option<When>,
    /// One row for each piece of time of this length (mean, least and greatest), `1m` for example; every value if absent
    #[arg(long, value_name = "TIME")]
    every: Option<Length>,
    /// CloudCore's monitor address
    #[arg(long, env = "SKERRY_MONITOR", default_value = "http://127.0.0.1:9091")]
    monitor: String,
}

/// A length of time on the command line, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Length(i64);

impl std::str::FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is no length of time, such as `90s`, `30m`, `12h` or `7d`");
        let unit = text.chars().next_back().ok_or_else(bad)?;
        let factor = match unit {
            's' => 1_000,
            'm' => 60_000,
            'h' => 3_600_000,
            'd' => 86_400_000,
            _ => return Err(bad()),
        };
        let count: i64 = text[..text.len() - 1].parse().map_err(|_| bad())?;
        let length = count.checked_mul(factor).filter(|length| *length > 0);
        length.map(Self).ok_or_else(bad)
    }
}

/// A moment on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    At(Timestamp),
    Ago(Length),
}

impl When {
    fn unix_ms(self, now: Timestamp) -> i64 {
        match self {
            Self::At(at) => at.as_millisecond(),
            Self::Ago(Length(ago)) => now.as_millisecond().saturating_sub(ago),
        }
    }
}

impl std::str::FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ago = || text.parse().map(Self::Ago);
        let bad = |_| {
            format!("`{text}` is neither a time (2026-01-31T12:00:00Z) nor how long ago (`12h`)")
        };
        text.parse().map(Self::At).or_else(|_| ago()).map_err(bad)
    }
}

/// A page as the node makes it; what the fields mean is told in `skerry_edge_core::history`.
#[derive(Debug, Default, Deserialize)]
struct Page {
    #[serde(default)]
    rows: Vec<Value>,
    next: Option<i64>,
    oldest: Option<i64>,
    #[serde(default)]
    lost: Map<String, Value>,
    error: Option<String>,
}

/// Prints the history.
pub(super) async fn run(client: &kube::Client, args: Args, output: Output) -> Result<ExitCode> {
    let Args { device: name, property, from, to, every, monitor } = args;
    let object = device(client, &name).await?;
    let node = object.data.pointer("/spec/nodeName").and_then(Value::as_str);
    let node = node.filter(|node| !node.is_empty()).ok_or_else(|| {
        let hint = "a device without a node has no history; its `spec.nodeName` says where it is";
        hinted(format!("device `{name}` is on no node"), hint)
    })?;
    let now = Timestamp::now();
    let (mut from, to) = (from.unix_ms(now), to.map(|to| to.unix_ms(now)));
    let to = to.unwrap_or(now.as_millisecond() + 1);
    if from >= to {
        return Err(hinted(
            "the history would end before it begins",
            "give --from an earlier time than --to",
        ));
    }
    let place = format!(
        "{}/nodes/{node}/history/{}/{}",
        monitor.trim_end_matches('/'),
        site_namespace(&name.site),
        name.device
    );
    let mut rows = Vec::new();
    let mut header = false;
    let last = loop {
        let mut address = format!("{place}?property={}&from={from}&to={to}", encoded(&property));
        if let Some(Length(every)) = every {
            let _ = write!(address, "&every={every}");
        }
        let mut page = patient(&monitor, &address).await?;
        if let Some(error) = page.error {
            let hint = "the node keeps what its configuration and the device's annotation ask for";
            return Err(hinted(format!("node `{node}` has no answer: {error}"), hint));
        }
        match output {
            Output::Json => rows.append(&mut page.rows),
            Output::Table => {
                for row in &page.rows {
                    if !std::mem::replace(&mut header, true) {
                        out::line(head(every.is_some()))?;
                    }
                    out::line(line(row))?;
                }
            }
        }
        match page.next {
            // A node that goes in circles is not followed.
            Some(next) if next > from => from = next,
            Some(_) => return Err(anyhow::anyhow!("node `{node}` repeats itself")),
            None => break page,
        }
    };
    let found = header || !rows.is_empty();
    match output {
        Output::Json => out::line(json!({
            "site": name.site, "device": name.device, "property": property, "node": node,
            "rows": rows, "oldest": last.oldest, "lost": last.lost,
        }))?,
        Output::Table => {
            if !found {
                eprintln!("{name}: nothing is known of {property} in that time");
                match last.oldest {
                    Some(oldest) => {
                        eprintln!("hint: the oldest value that is kept is of {}", time(oldest))
                    }
                    None => eprintln!(
                        "hint: is `{property}` in the device's annotation fleet.skerry.dev/history?"
                    ),
                }
            }
            if let Some(text) = losses(&last.lost) {
                eprintln!("note: node {node} has lost, since its history began: {text}");
            }
        }
    }
    Ok(if found { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn patient(monitor: &str, address: &str) -> Result<Page> {
    let asked = tokio::time::timeout(PAGE_TIMEOUT, fetch(monitor, address)).await;
    asked.unwrap_or_else(|_| {
        let limit_s = PAGE_TIMEOUT.as_secs();
        let what = format!("cloudcore's monitor at {monitor} did not answer within {limit_s} s");
        Err(hinted(what, "the hub is overloaded, or something else listens at that address"))
    })
}

async fn fetch(monitor: &str, address: &str) -> Result<Page> {
    let (status, body) = monitor::ask(monitor, address, PAGE_LEN_MAX).await?;
    if !status.is_success() {
        let text: String = String::from_utf8_lossy(&body).chars().take(500).collect();
        let hint = match status.as_u16() {
            503 => "the history is on the node; ask again when it is connected (`skerry link`)",
            404 => "something else than cloudcore listens there, or an older one",
            _ => "`skerry link` shows what the node can do",
        };
        return Err(hinted(text, hint));
    }
    serde_json::from_slice(&body).context("the answer of the node is no history")
}

fn head(pieces: bool) -> String {
    match pieces {
        true => format!(
            "{:24}  {:>16}  {:>16}  {:>16}  {:>7}",
            "FROM", "MEAN OR LAST", "LEAST", "GREATEST", "VALUES"
        ),
        false => format!("{:24}  VALUE", "TIME"),
    }
}

/// Columns have a width of their own, as rows are printed when they come.
fn line(row: &Value) -> String {
    let at = row["at"].as_i64().map(time).unwrap_or_default();
    // Of a device, so it may hold anything: no line breaks or escapes into the terminal.
    let value: String = row["value"].as_str().unwrap_or_default().escape_debug().collect();
    let Some(count) = row["count"].as_u64() else { return format!("{at:24}  {value}") };
    let number = |key: &str| row[key].as_f64().map_or_else(|| "-".to_owned(), short);
    let value = value.parse().map_or(value, short);
    format!("{at:24}  {value:>16}  {:>16}  {:>16}  {count:>7}", number("min"), number("max"))
}

/// At most six digits behind the point.
fn short(number: f64) -> String {
    let text = format!("{number:.6}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn time(unix_ms: i64) -> String {
    let at = Timestamp::from_millisecond(unix_ms);
    at.map_or_else(|_| unix_ms.to_string(), |at| format!("{at:.3}"))
}

/// What was lost, in words; `None` when nothing was.
fn losses(lost: &Map<String, Value>) -> Option<String> {
    const WORDS: [(&str, &str); 7] = [
        ("room", "values for want of room on the disk"),
        ("unwritten", "values that the disk did not take"),
        ("unreadable", "values in blocks that could not be read"),
        ("late", "values that came after later ones"),
        ("long", "values that were too long"),
        ("many", "values of properties beyond the limit"),
        ("cuts", "times the end (up to 2 minutes), in power cuts"),
    ];
    let count = |key: &str| lost.get(key).and_then(Value::as_u64).filter(|count| *count > 0);
    let parts: Vec<String> =
        WORDS.iter().filter_map(|(key, words)| Some(format!("{} {words}", count(key)?))).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
                out.push(char::from(byte))
            }
            byte => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::SignedDuration;

    #[test]
    fn moments_are_times_or_how_long_ago() {
        let now: Timestamp = "2026-01-31T12:00:00Z".parse().expect("a time");
        let ms = |text: &str| text.parse::<When>().map(|when| when.unix_ms(now));
        let before = |span: SignedDuration| Ok((now - span).as_millisecond());
        assert_eq!(ms("90s"), before(SignedDuration::from_secs(90)));
        assert_eq!(ms("7d"), before(SignedDuration::from_hours(7 * 24)));
        assert_eq!(ms("2026-01-31T11:00:00Z"), before(SignedDuration::from_hours(1)));
        for text in ["", "5", "d", "-5m", "0s", "1.5h", "yesterday", "9999999999999999d", "5µ"] {
            assert!(ms(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rows_are_for_people_and_cannot_move_the_cursor() {
        let row = json!({"at": 1_769_860_800_123_i64, "value": "a\u{1b}[2Jb\n"});
        assert_eq!(line(&row), "2026-01-31T12:00:00.123Z  a\\u{1b}[2Jb\\n");
        let row =
            json!({"at": 0, "value": "0.30000000000000004", "min": 0.1, "max": 12.5, "count": 3});
        let cells: Vec<String> = line(&row).split_whitespace().map(str::to_owned).collect();
        assert_eq!(cells, ["1970-01-01T00:00:00.000Z", "0.3", "0.1", "12.5", "3"]);
        assert_eq!(head(true).len(), line(&row).len());
    }

    #[test]
    fn losses_are_told_and_none_is_not() {
        let lost = json!({"late": 2, "room": 0, "cuts": 1});
        let text = losses(lost.as_object().expect("a map")).expect("some");
        assert_eq!(
            text,
            "2 values that came after later ones, 1 times the end (up to 2 minutes), in power cuts"
        );
        assert_eq!(losses(&Map::new()), None);
    }

    #[test]
    fn names_of_properties_are_encoded() {
        assert_eq!(encoded("a/b#ü"), "a%2Fb%23%C3%BC");
    }
}
