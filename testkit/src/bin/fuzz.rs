//! Feeds what reads a peer's bytes with seeded inputs: `fuzz [TARGET] --seconds 60`. An input that breaks a promise is
//! printed as hex, with the command that runs it again: `fuzz TARGET --input HEX`.
//!
//! Exit codes: 0 every promise held, 1 one was broken, 2 wrong usage.

use clap::Parser;
use serde_json::json;
use skerry_testkit::fuzz::{self, Failure, TARGETS, Target, from_hex, to_hex};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

#[derive(Parser)]
#[command(name = "fuzz", about = "Fuzz everything that reads what a peer sends")]
struct Cli {
    /// Only this target; all of them without it
    target: Option<String>,
    /// Run only this input, as hex
    #[arg(long, requires = "target")]
    input: Option<String>,
    /// Time per target, in seconds
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// First of the numbers from which inputs are made
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// `table` or `json`
    #[arg(long, default_value = "table", value_parser = ["table", "json"])]
    output: String,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let targets: Vec<&'static Target> = match &cli.target {
        None => TARGETS.iter().collect(),
        Some(name) => match fuzz::target(name) {
            Some(target) => vec![target],
            None => {
                let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
                eprintln!("error: there is no target `{name}`");
                eprintln!("hint: targets are {}", names.join(", "));
                return ExitCode::from(2);
            }
        },
    };
    let outcomes = match &cli.input {
        Some(hex) => {
            let Some(input) = from_hex(hex) else {
                eprintln!("error: `--input` is not hex");
                return ExitCode::from(2);
            };
            vec![(targets[0].name, targets[0].check(&input).map(|()| 1))]
        }
        None => run(&targets, cli.seed, Duration::from_secs(cli.seconds)),
    };
    let mut failures = 0;
    let mut cases = 0;
    for (name, outcome) in &outcomes {
        match outcome {
            Ok(count) => {
                cases += count;
                if cli.output == "table" {
                    println!("{name}: {count} inputs, every promise held");
                }
            }
            Err(failure) => {
                failures += 1;
                if cli.output == "table" {
                    println!("{failure}");
                } else {
                    println!(
                        "{}",
                        json!({"target": name, "input": to_hex(&failure.input), "violation": failure.what})
                    );
                }
            }
        }
    }
    if cli.output == "json" {
        println!("{}", json!({"targets": outcomes.len(), "inputs": cases, "violations": failures}));
    }
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs the targets on all processors; each takes its time.
fn run(
    targets: &[&'static Target],
    seed: u64,
    time: Duration,
) -> Vec<(&'static str, Result<u64, Failure>)> {
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(target) = targets.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = target.campaign(seed, u64::MAX, time);
                    outcomes.lock().expect("no holder panics").push((target.name, outcome));
                }
            });
        }
    });
    outcomes.into_inner().expect("no holder panics")
}
