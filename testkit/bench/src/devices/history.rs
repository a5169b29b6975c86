//! The figures of the history: the agent's own parts write a day of values, with a clock that is not the machine's, and
//! answer questions about it.

use super::{percentile, print};
use crate::figures::say;
use anyhow::{Result, ensure};
use rand::{Rng, SeedableRng, rngs::StdRng};
use skerry_edge::history_store::HistoryStore;
use skerry_edge_core::history::query::Question;
use skerry_edge_core::history::{History, Keeping};
use skerry_edge_core::twin::Id;
use std::path::Path;
use std::time::{Duration, Instant};

const DAY_S: u64 = 86_400;
/// Properties of a device.
const PER_DEVICE: usize = 50;
/// The figure is for so many properties.
const NOMINAL: f64 = 1000.0;
/// Bytes that the history may take, as in an agent's configuration.
const ROOM: u64 = 256 * 1000 * 1000;
/// Questions whose median is printed.
const QUESTIONS: usize = 50;
/// 2026-01-01T00:00:00Z.
const FIRST_MS: i64 = 1_767_225_600_000;

/// Measures and prints.
pub(super) fn measure(properties: usize) -> Result<()> {
    ensure!(properties > 0, "there is no history without properties");
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("history.db");
    let store = HistoryStore::new(path.clone(), ROOM);
    let mut history = History::new(true, Keeping::default());
    let mut random = StdRng::seed_from_u64(1);
    let names: Vec<(Id, String)> = (0..properties)
        .map(|index| {
            let device = format!("default/d-{:04}", index / PER_DEVICE);
            (Id::from(device), format!("p-{:02}", index % PER_DEVICE))
        })
        .collect();
    // Tenths of a degree that wander: what a thermometer says that is read each second.
    let mut tenths: Vec<i32> = (0..properties).map(|_| random.random_range(-200..400)).collect();
    let (start, mono) = (Instant::now(), Instant::now());
    for second in 0..DAY_S {
        let now = mono + Duration::from_secs(second);
        let now_ms = FIRST_MS + i64::try_from(second)? * 1000;
        for ((device, property), value) in names.iter().zip(&mut tenths) {
            *value += random.random_range(-2..=2);
            let sign = if *value < 0 { "-" } else { "" };
            let text = format!("{sign}{}.{}", value.abs() / 10, value.abs() % 10);
            history.report(now, now_ms, device, property, &text, now_ms);
        }
        write(&mut history, &store, now, now_ms, false)?;
    }
    let (end, end_ms) =
        (mono + Duration::from_secs(DAY_S), FIRST_MS + i64::try_from(DAY_S)? * 1000);
    write(&mut history, &store, end, end_ms, true)?;
    let took = start.elapsed().as_secs_f64();
    store.close()?;
    let values = properties as f64 * DAY_S as f64;
    say(format!("a day of {properties} properties is written after {took:.0} s"));
    print("history_day_bytes", "bytes", size(&path)? as f64 * NOMINAL / properties as f64);
    print("history_values_per_s", "values", values / took);

    let store = HistoryStore::new(path, ROOM);
    let mut ask = |every_ms: Option<i64>| -> Result<f64> {
        let mut times = Vec::with_capacity(QUESTIONS);
        for _ in 0..QUESTIONS {
            let (device, property) = &names[random.random_range(0..names.len())];
            let question = Question {
                device: device.to_string(),
                property: property.clone(),
                from_ms: FIRST_MS,
                to_ms: end_ms,
                every_ms,
                limit: skerry_edge_core::history::query::ROWS_MAX,
            };
            let start = Instant::now();
            let page = store.query(&question, Vec::new())?;
            times.push(start.elapsed().as_secs_f64() * 1000.0);
            ensure!(page.rows.len() > 1000, "the answer has {} rows", page.rows.len());
        }
        Ok(percentile(&mut times, 50.0))
    };
    print("history_query_ms", "ms", ask(Some(60_000))?);
    print("history_page_ms", "ms", ask(None)?);
    Ok(())
}

fn write(
    history: &mut History,
    store: &HistoryStore,
    now: Instant,
    now_ms: i64,
    all: bool,
) -> Result<()> {
    loop {
        let changes = history.take_changes(now, now_ms, all);
        if changes.is_empty() {
            return Ok(());
        }
        store.write(&changes, now_ms)?;
        history.handle_stored(now, true);
    }
}

/// The database with what SQLite keeps beside it.
fn size(path: &Path) -> Result<u64> {
    let folder = path.parent().unwrap_or(path);
    let mut sum = 0;
    for entry in std::fs::read_dir(folder)? {
        sum += entry?.metadata()?.len();
    }
    Ok(sum)
}
