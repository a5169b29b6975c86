//! `skerry-pilot`: plays the scenarios of the pilot and writes its report.
//!
//! `cargo xtask pilot` builds what it needs and calls it; `cargo xtask test` calls it for the part that CI runs. Standard
//! output is data, standard error is talk. Exit codes: 0 every claim held, 1 one did not, 2 it went wrong.

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use serde_json::json;
use skerry_qemu_tests::hub::Programs;
use skerry_qemu_tests::lab::{Inputs, Lab};
use skerry_qemu_tests::report::{Report, Verdict};
use skerry_qemu_tests::scenario::Scenario;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

mod demo;
mod figures;
mod powercut;
mod scenarios;
mod signals;

#[derive(Parser)]
#[command(name = "skerry-pilot", about = "Play the scenarios of the pilot")]
struct Args {
    /// Show the scenarios and stop
    #[arg(long)]
    list: bool,
    /// Folder of a built image, or its disk
    #[arg(long, required_unless_present = "list")]
    image: Option<PathBuf>,
    /// Folder with the programs `skerry` and `edgecore` (default: the folder of this program)
    #[arg(long)]
    programs: Option<PathBuf>,
    /// kubectl
    #[arg(long, default_value = "kubectl")]
    kubectl: PathBuf,
    /// Fleet folder that the hub's Git remote is made from
    #[arg(long, required_unless_present = "list")]
    template: Option<PathBuf>,
    /// Folder with UEFI firmware (OVMF); may be repeated
    #[arg(long)]
    firmware: Vec<PathBuf>,
    /// Folder of the same image signed for Secure Boot
    #[arg(long, requires = "keys")]
    signed: Option<PathBuf>,
    /// Folder of `skerry image keys`, with whose db key it is signed
    #[arg(long, requires = "signed")]
    keys: Option<PathBuf>,
    /// Key whose signature the image wants on updates
    #[arg(long, requires = "newer")]
    release_key: Option<PathBuf>,
    /// Folder of an image of a newer version
    #[arg(long, requires = "release_key")]
    newer: Option<PathBuf>,
    /// Where pilot.html and pilot.json go
    #[arg(long)]
    report: Option<PathBuf>,
    /// Only this scenario; may be repeated
    #[arg(long)]
    only: Vec<String>,
    /// Only those that CI runs
    #[arg(long)]
    ci: bool,
    /// Folder for disks and the hub's files (default: a new one that is removed at the end)
    #[arg(long)]
    work: Option<PathBuf>,
    /// Minutes for which the scenario of little memory watches its pods
    #[arg(long, default_value_t = 1)]
    hold: u64,
    /// Show the consoles on standard error while they are written
    #[arg(long)]
    consoles: bool,
    /// Measure instead, and print one JSON line per figure
    #[arg(long, conflicts_with_all = ["only", "ci", "report"])]
    figures: bool,
    /// With --figures: only this figure; may be repeated
    #[arg(long, requires = "figures")]
    figure: Vec<String>,
    /// With --figures: a disk of another system to be held against, and what its console writes when its node is Ready
    #[arg(long, num_args = 2, value_names = ["DISK", "TEXT"], requires = "figures")]
    reference: Option<Vec<String>>,
    /// Instead, check so many disks that a power cut may leave in an update; prints one JSON line at the end
    #[arg(long, value_name = "IMAGES", requires = "newer", conflicts_with_all = ["figures", "only", "ci", "report"])]
    powercut: Option<usize>,
    /// With --powercut: so many of them are booted
    #[arg(long, default_value_t = 2, requires = "powercut")]
    boots: usize,
    /// With --powercut: the seed of what is lost
    #[arg(long, default_value_t = 1, requires = "powercut")]
    seed: u64,
    /// Instead, run a hub and one machine as its node until Ctrl-C; both are kept in this folder
    #[arg(long, value_name = "DIR", conflicts_with_all = ["figures", "only", "ci", "report", "work"])]
    up: Option<PathBuf>,
    /// How to print the answer
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// For programs: one JSON document.
    Json,
}

fn main() -> ExitCode {
    run(Args::parse()).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}

fn run(args: Args) -> Result<ExitCode> {
    let chosen = chosen(&args)?;
    if args.list {
        list(&chosen, args.output);
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(dir) = &args.up {
        let stop = Arc::new(AtomicBool::new(false));
        let raised = Arc::clone(&stop);
        signals::hear(move || raised.store(true, Ordering::Relaxed))?;
        let lab = Lab::open(inputs(&args)?, dir)?;
        demo::run(&lab, dir, &stop)?;
        return Ok(ExitCode::SUCCESS);
    }
    signals::hear(signals::end_all)?;
    let temporary;
    let work = match &args.work {
        Some(work) => work.clone(),
        None => {
            temporary = tempfile::Builder::new().prefix("skerry-pilot").tempdir()?;
            temporary.path().to_owned()
        }
    };
    let started = utc_now();
    let start = Instant::now();
    let lab = Lab::open(inputs(&args)?, &work)?;
    eprintln!("pilot: processor: {} ({})", lab.accel.0.name(), lab.accel.1);
    if args.figures {
        let reference = args.reference.as_deref().map(|words| figures::Reference {
            disk: words[0].clone().into(),
            text: words[1].clone(),
        });
        figures::run(&lab, reference.as_ref(), &args.figure)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(images) = args.powercut {
        let verdict = powercut::run(&lab, images, args.boots, args.seed)?;
        if args.output == Output::Table {
            eprintln!(
                "{} images, {} booted: {} unbootable, {} mixed, {} lost their identity",
                verdict.images,
                verdict.booted,
                verdict.unbootable,
                verdict.mixed,
                verdict.lost_identity
            );
        }
        println!("{}", serde_json::to_string(&verdict)?);
        return Ok(if verdict.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let mut outcomes = Vec::new();
    for scenario in &chosen {
        eprintln!("pilot: {}: {}", scenario.name, scenario.claim());
        let outcome = scenario.play(&lab);
        let word = match outcome.verdict {
            Verdict::Passed => "passed",
            Verdict::Failed => "FAILED",
            Verdict::Skipped => "skipped",
        };
        let evidence = &outcome.evidence;
        eprintln!(
            "pilot: {}: {word}, {:.1} CPU s, {:.1} s{}",
            scenario.name,
            evidence.cpu_s,
            evidence.wall_s,
            outcome.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default(),
        );
        outcomes.push(outcome);
    }
    let report = Report {
        version: lab.image.version().unwrap_or_else(|_| "of unknown version".into()),
        started,
        wall_s: start.elapsed().as_secs_f64(),
        qemu: qemu_version(),
        accelerator: format!("{}: {}", lab.accel.0.name(), lab.accel.1),
        image: lab.image.manifest.clone(),
        scenarios: outcomes,
    };
    if let Some(folder) = &args.report {
        report.write(folder)?;
        eprintln!("pilot: the report is {}", folder.join("pilot.html").display());
    }
    print(&report, args.output)?;
    let failed = report.count(Verdict::Failed);
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn chosen(args: &Args) -> Result<Vec<Scenario>> {
    let all = scenarios::ALL;
    if let Some(unknown) = args.only.iter().find(|name| all.iter().all(|one| one.name != **name)) {
        bail!("there is no scenario `{unknown}`\nhint: --list shows them");
    }
    let wanted = |one: &&Scenario| {
        (args.only.is_empty() || args.only.iter().any(|name| name == one.name))
            && (!args.ci || one.ci)
    };
    Ok(all.iter().filter(wanted).copied().collect())
}

fn inputs(args: &Args) -> Result<Inputs> {
    let folder = match &args.programs {
        Some(folder) => folder.clone(),
        None => {
            let own = std::env::current_exe()?;
            own.parent().context("a program lies in a folder")?.to_owned()
        }
    };
    Ok(Inputs {
        image: args.image.clone().context("--image is missing")?,
        firmware: args.firmware.clone(),
        programs: Programs {
            skerry: folder.join("skerry"),
            kubectl: args.kubectl.clone(),
            template: args.template.clone().context("--template is missing")?,
        },
        newer: args.newer.clone().zip(args.release_key.clone()),
        signed: args.signed.clone().zip(args.keys.clone()),
        hold: Duration::from_secs(args.hold * 60),
        show_consoles: args.consoles,
    })
}

fn list(chosen: &[Scenario], output: Output) {
    match output {
        Output::Json => {
            let rows: Vec<_> = chosen
                .iter()
                .map(|one| json!({"name": one.name, "claim": one.claim(), "ci": one.ci}))
                .collect();
            println!("{}", json!({ "scenarios": rows }));
        }
        Output::Table => {
            for one in chosen {
                println!("{:<22} {} {}", one.name, if one.ci { "ci" } else { "  " }, one.claim());
            }
        }
    }
}

fn print(report: &Report, output: Output) -> Result<()> {
    match output {
        Output::Json => println!("{}", serde_json::to_string(report)?),
        Output::Table => {
            for outcome in &report.scenarios {
                let word = match outcome.verdict {
                    Verdict::Passed => "passed",
                    Verdict::Failed => "failed",
                    Verdict::Skipped => "skipped",
                };
                let evidence = &outcome.evidence;
                println!("{:<22} {word:<8} {:>7.1} CPU s", outcome.name, evidence.cpu_s);
            }
            println!(
                "{} passed, {} failed, {} skipped",
                report.count(Verdict::Passed),
                report.count(Verdict::Failed),
                report.count(Verdict::Skipped),
            );
        }
    }
    Ok(())
}

fn qemu_version() -> String {
    let said = Command::new("qemu-system-x86_64").arg("--version").output();
    let said = said.map(|done| String::from_utf8_lossy(&done.stdout).into_owned());
    said.unwrap_or_default().lines().next().unwrap_or("of unknown version").to_owned()
}

/// Now, as `2026-01-31T12:00:00Z`.
fn utc_now() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = now.unwrap_or_default().as_secs();
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days to a date of the Gregorian calendar, with years that begin in March.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, year) = if month < 10 { (month + 3, year) } else { (month - 9, year + 1) };
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z", year + 400 * era)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_has_a_claim_and_a_name_of_its_own() {
        let all = scenarios::ALL;
        for (index, one) in all.iter().enumerate() {
            assert!(one.claim().len() > 20, "{} claims nothing", one.name);
            assert!(all[..index].iter().all(|other| other.name != one.name), "{}", one.name);
        }
        assert!((2..=5).contains(&all.iter().filter(|one| one.ci).count()));
    }

    #[test]
    fn unknown_scenarios_and_missing_inputs_are_told() {
        let parse = |words: &[&str]| Args::try_parse_from([&["skerry-pilot"], words].concat());
        let args = parse(&["--list", "--only", "nothing"]).unwrap();
        assert!(chosen(&args).is_err());
        assert!(parse(&[]).is_err());
        assert!(parse(&["--image", "a", "--template", "b", "--signed", "c"]).is_err());
        let args = parse(&["--list", "--ci"]).unwrap();
        assert!(chosen(&args).unwrap().len() < scenarios::ALL.len());
    }

    #[test]
    fn now_is_a_date_of_this_century() {
        let now = utc_now();
        assert!(now.starts_with("20") && now.ends_with('Z') && now.len() == 20, "{now}");
    }
}
