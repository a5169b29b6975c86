//! What a person types in this repository:
//! `cargo xtask setup|up|test|bench|image|pilot|powercut|conformance|sim|fuzz|interop|facts`.
//!
//! It installs what is missing, builds the programs and drives them from outside, as an operator would; it links none
//! of them. Standard output is data, standard error is talk.

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

mod bench;
mod bench_image;
mod bench_updates;
mod build;
mod conformance;
mod facts;
mod fleet;
mod image;
mod images;
mod interop;
mod pilot;
mod powercut;
mod relay;
mod setup;
mod sh;
mod sim;
mod smoke;
mod test;
mod up;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Build, run and check Skerry", disable_version_flag = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what is missing on this machine (Debian packages; needs root)
    Setup {
        /// Also install what only the tests need (a current kubectl)
        #[arg(long)]
        tests: bool,
        /// Also install what building images and booting them needs (QEMU)
        #[arg(long)]
        machines: bool,
    },
    /// Start a whole fleet on this machine: API, CloudCore, reconciler, a Git remote and an edge node
    Up(up::Args),
    /// Run everything that CI runs
    Test {
        /// Leave out what boots a node (the smoke run, the kubectl suite, virtual machines)
        #[arg(long)]
        quick: bool,
    },
    /// Measure, and print one JSON line per figure
    Bench {
        /// `up`, `link`, `devices`, `image` or `qualify`
        name: String,
        /// Cargo profile of the programs
        #[arg(long, default_value = "release")]
        profile: String,
        /// Further arguments of the bench, after `--`: `link -- --help` and `devices -- --help` list them
        #[arg(last = true)]
        more: Vec<String>,
    },
    /// Boot the appliance in every situation of the pilot's scenarios and write the report
    Pilot(pilot::Args),
    /// Check every disk that a power cut may leave in first boot, update and trial
    Powercut(powercut::Args),
    /// Build an appliance image from this tree
    Image(image::Args),
    /// Run the kubectl contract suite against a cluster (default: a fleet started for it)
    Conformance(conformance::Args),
    /// Simulate the link between hubs and nodes, one world per seed
    Sim(sim::Args),
    /// Feed everything that reads what a peer sends with seeded inputs
    Fuzz(sim::Args),
    /// Run our two ends and KubeEdge's in four combinations through one script
    Interop(interop::Args),
    /// What `interop` starts in namespaces of its own
    #[command(hide = true)]
    InteropRoom { plan: PathBuf },
    /// Rebuild the table of Kubernetes facts that the embedded API is made from
    Facts {
        /// `_definitions.json` of the Kubernetes JSON schemas
        definitions: PathBuf,
        /// Source folder of the k8s-pb crate
        k8s_pb: PathBuf,
        /// Where the table goes
        out: PathBuf,
    },
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().verb {
        Verb::Setup { tests, machines } => setup::run(tests)
            .and_then(|()| if machines { setup::run_for(setup::For::Machines) } else { Ok(()) })
            .map(|()| ExitCode::SUCCESS),
        Verb::Up(args) => up::run(args),
        Verb::Test { quick } => test::run(quick).map(|()| ExitCode::SUCCESS),
        Verb::Bench { name, profile, more } => {
            bench::run(&name, &profile, &more).map(|()| ExitCode::SUCCESS)
        }
        Verb::Pilot(args) => pilot::run(&args),
        Verb::Powercut(args) => powercut::run(&args),
        Verb::Image(args) => image::run(&args).map(|()| ExitCode::SUCCESS),
        Verb::Conformance(args) => conformance::run(args),
        Verb::Sim(args) => sim::run("sim", "release", &args),
        Verb::Fuzz(args) => sim::run("fuzz", "dev", &args),
        Verb::Interop(args) => interop::run(args),
        Verb::InteropRoom { plan } => interop::inside(&plan),
        Verb::Facts { definitions, k8s_pb, out } => {
            facts::run(&definitions, &k8s_pb, &out).map(|()| ExitCode::SUCCESS)
        }
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::from(2)
    })
}
