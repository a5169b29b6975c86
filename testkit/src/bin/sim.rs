//! Simulates the link, one world per seed: `sim --seeds 10000`. A seed that breaks a promise prints itself, and
//! `sim --seed N` runs it again and tells every step.
//!
//! Exit codes: 0 every promise held, 1 one was broken, 2 wrong usage.

use clap::Parser;
use serde_json::json;
use skerry_testkit::sim::{self, Summary};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Seeds between two looks at the clock for the progress line.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);
/// Violations that are told in full.
const TOLD_MAX: usize = 20;

#[derive(Parser)]
#[command(name = "sim", about = "Simulate the link between hubs and nodes")]
struct Cli {
    /// How many worlds, each from its own seed
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Run only this seed, and tell every step
    #[arg(long, conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
    /// `table` or `json`
    #[arg(long, default_value = "table", value_parser = ["table", "json"])]
    output: String,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(seed) = cli.seed {
        return match sim::run_aloud(seed) {
            Ok(summary) => {
                println!("seed {seed}: every promise held ({summary:?})");
                ExitCode::SUCCESS
            }
            Err(violation) => {
                println!("seed {seed}: {violation}");
                ExitCode::FAILURE
            }
        };
    }
    let next = AtomicU64::new(cli.from);
    let end = cli.from.saturating_add(cli.seeds);
    let done = Mutex::new((0_u64, Summary::default(), Vec::new()));
    let start = Instant::now();
    let told = Mutex::new(start);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let outcome = sim::run(seed);
                    let mut done = done.lock().expect("no holder panics");
                    done.0 += 1;
                    match outcome {
                        Ok(summary) => {
                            done.1.steps += summary.steps;
                            done.1.messages += summary.messages;
                            done.1.faults += summary.faults;
                        }
                        Err(violation) => done.2.push((seed, violation)),
                    }
                    let mut told = told.lock().expect("no holder panics");
                    if told.elapsed() > PROGRESS_EVERY {
                        *told = Instant::now();
                        eprintln!(
                            "sim: {} of {} seeds, {} violations",
                            done.0,
                            cli.seeds,
                            done.2.len()
                        );
                    }
                }
            });
        }
    });
    let (count, sum, mut violations) = done.into_inner().expect("no holder panics");
    violations.sort_by_key(|(seed, _)| *seed);
    if cli.output == "json" {
        for (seed, violation) in &violations {
            println!("{}", json!({"seed": seed, "violation": violation.to_string()}));
        }
        println!("{}", json!({"seeds": count, "violations": violations.len()}));
    } else {
        for (seed, violation) in violations.iter().take(TOLD_MAX) {
            println!("seed {seed}: {violation}");
        }
        if let Some((seed, _)) = violations.first() {
            println!("hint: `cargo xtask sim --seed {seed}` runs it again and tells every step");
        }
        println!(
            "{count} seeds, {} violations; {} steps, {} messages, {} faults in {:.0} s",
            violations.len(),
            sum.steps,
            sum.messages,
            sum.faults,
            start.elapsed().as_secs_f64()
        );
    }
    if violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
