//! `cargo xtask interop`: our two ends and KubeEdge's, in four combinations, through one script.
//!
//! The upstream programs are the user's. Each combination runs in namespaces of its own ([`room`]), with an API, a
//! containerd and folders of its own, so that nothing is left on the machine and the fixed ports and paths of the Go
//! programs are nobody's business. This file builds what is ours, starts the rooms one after the other, and prints the
//! table; [`script`] is what happens inside.

use crate::{build, images, setup, sh};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::str::FromStr;

mod cloud;
mod cluster;
mod containerd;
mod edge;
mod http;
mod jobs;
mod part;
mod room;
mod script;
mod udp;

/// Where the upstream programs come from, said whenever one is missing.
const HINT: &str = "build them in a checkout of KubeEdge (`make all WHAT=\"cloudcore edgecore\"`) and name them with \
     --cloudcore and --edgecore, or run what needs none with `--only ours/ours`";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// KubeEdge's EdgeCore
    #[arg(long)]
    edgecore: Option<PathBuf>,
    /// KubeEdge's CloudCore
    #[arg(long)]
    cloudcore: Option<PathBuf>,
    /// Cluster to use; without it, each combination gets an embedded API
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// KubeEdge's CustomResourceDefinitions (`build/crds` of its checkout); without it, ours
    #[arg(long)]
    crds: Option<PathBuf>,
    /// Run only this combination, CLOUD/EDGE: ours/ours, ours/go, go/ours or go/go; may be repeated
    #[arg(long)]
    only: Vec<Combo>,
    /// Folder of logs and state (default: `interop` in Cargo's target folder)
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Folder with our programs as Cargo left them; without it, they are built
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Cargo profile of the programs
    #[arg(long, default_value = "dev")]
    profile: String,
    /// `table`, or `json`: one line per step, and the sums last
    #[arg(long, default_value = "table", value_parser = ["table", "json"])]
    output: String,
}

/// Whose program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Side {
    Ours,
    Go,
}

/// A CloudCore and an EdgeCore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Combo {
    cloud: Side,
    edge: Side,
}

const COMBOS: [Combo; 4] = [
    Combo { cloud: Side::Ours, edge: Side::Ours },
    Combo { cloud: Side::Ours, edge: Side::Go },
    Combo { cloud: Side::Go, edge: Side::Ours },
    Combo { cloud: Side::Go, edge: Side::Go },
];

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ours => "ours",
            Self::Go => "go",
        })
    }
}

impl fmt::Display for Combo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.cloud, self.edge)
    }
}

impl FromStr for Combo {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        COMBOS.into_iter().find(|combo| combo.to_string() == text).ok_or_else(|| {
            format!("`{text}` is none of ours/ours, ours/go, go/ours, go/go (cloud first)")
        })
    }
}

/// All that a room needs to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    combo: Combo,
    /// Folder of this combination.
    dir: PathBuf,
    /// Our programs.
    skerry: PathBuf,
    edgecore: PathBuf,
    /// Serves an embedded API alone.
    api: PathBuf,
    go_cloudcore: Option<PathBuf>,
    go_edgecore: Option<PathBuf>,
    kubectl: PathBuf,
    kubeconfig: Option<PathBuf>,
    /// A file or a folder for `kubectl apply`.
    crds: PathBuf,
    images: Vec<PathBuf>,
    /// Parent of all cgroups in the room; two runs at once must not share it.
    cgroup: String,
}

/// What became of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    Passed,
    Failed,
    NotOffered,
}

/// One line of the report.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Line {
    combo: String,
    step: String,
    result: Outcome,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    detail: String,
    seconds: f64,
}

/// Runs the combinations; exit code 1 when a step failed.
pub(crate) fn run(args: Args) -> Result<ExitCode> {
    let combos = if args.only.is_empty() { COMBOS.to_vec() } else { args.only.clone() };
    let wants = |side: fn(&Combo) -> Side| combos.iter().any(|combo| side(combo) == Side::Go);
    let go_cloudcore = upstream(&args.cloudcore, "--cloudcore", wants(|combo| combo.cloud))?;
    let go_edgecore = upstream(&args.edgecore, "--edgecore", wants(|combo| combo.edge))?;
    ensure!(
        nix::unistd::Uid::effective().is_root(),
        "edge nodes and their namespaces need root\nhint: run this as root"
    );
    setup::run(true)?;
    let dir = match &args.dir {
        Some(dir) => std::path::absolute(dir)?,
        None => build::target()?.join("interop"),
    };
    std::fs::create_dir_all(&dir)?;
    let folder = match &args.programs {
        Some(folder) => std::path::absolute(folder)?,
        None => programs(&args.profile)?,
    };
    let crds = match &args.crds {
        Some(folder) => folder.canonicalize().context("the folder of --crds is not there")?,
        None => {
            let file = dir.join("crds.json");
            std::fs::write(&file, sh::output(&mut Command::new(folder.join("examples/crds")))?)?;
            file
        }
    };
    let plan = Plan {
        combo: COMBOS[0],
        dir: dir.clone(),
        skerry: folder.join("skerry"),
        edgecore: folder.join("edgecore"),
        api: folder.join("examples/serve"),
        go_cloudcore,
        go_edgecore,
        kubectl: setup::kubectl()?,
        kubeconfig: args.kubeconfig.as_ref().map(|file| file.canonicalize()).transpose()?,
        crds,
        images: images::pack(&dir.join("images"))?,
        cgroup: format!("skerry-interop-{}", std::process::id()),
    };
    for program in [&plan.skerry, &plan.edgecore, &plan.api] {
        ensure!(program.is_file(), "`{}` is not there", program.display());
    }
    let mut lines = Vec::new();
    for combo in combos {
        let found = run_in_room(&Plan { combo, ..plan.clone() }, &dir)?;
        if args.output == "json" {
            for line in &found {
                println!("{}", serde_json::to_string(line)?);
            }
        }
        lines.extend(found);
    }
    let count = |result: Outcome| lines.iter().filter(|line| line.result == result).count();
    let (passed, failed) = (count(Outcome::Passed), count(Outcome::Failed));
    if args.output == "json" {
        println!("{}", json!({"passed": passed, "failed": failed}));
    } else {
        print!("{}", table(&lines));
        println!("{passed} passed, {failed} failed, {} not offered", count(Outcome::NotOffered));
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The user's program, if a combination needs it.
fn upstream(program: &Option<PathBuf>, flag: &str, wanted: bool) -> Result<Option<PathBuf>> {
    match program {
        Some(file) => {
            let found = file.canonicalize().ok().filter(|file| file.is_file());
            match found {
                Some(found) => Ok(Some(found)),
                None => bail!("`{}` ({flag}) is no program\nhint: {HINT}", file.display()),
            }
        }
        None if wanted => bail!("KubeEdge's own program is needed: {flag}\nhint: {HINT}"),
        None => Ok(None),
    }
}

/// Builds our programs and returns their folder.
fn programs(profile: &str) -> Result<PathBuf> {
    sh::say(format!("building (profile {profile}; the first build takes minutes)"));
    let mut cargo = sh::cargo();
    cargo.current_dir(sh::root()).args(["build", "--locked", "--profile", profile, "--workspace"]);
    sh::run(cargo.args(["--bins", "--example", "serve", "--example", "crds"]))?;
    Ok(build::target()?.join(if profile == "dev" { "debug" } else { profile }))
}

/// Runs one combination in namespaces of its own and returns what it reported.
fn run_in_room(plan: &Plan, dir: &Path) -> Result<Vec<Line>> {
    let own = dir.join(plan.combo.to_string().replace('/', "-"));
    if own.exists() {
        std::fs::remove_dir_all(&own).with_context(|| {
            format!("`{}` of an earlier run could not be removed", own.display())
        })?;
    }
    std::fs::create_dir_all(&own)?;
    let file = own.join("plan.json");
    let plan = Plan { dir: own, ..plan.clone() };
    std::fs::write(&file, serde_json::to_vec_pretty(&plan)?)?;
    sh::say(format!("{}: logs are in {}", plan.combo, plan.dir.display()));

    // Its end tells the room that nobody waits for it any more.
    let mut child = room::command(&file, plan.kubeconfig.is_none())?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("could not start `unshare`")?;
    let output = child.stdout.take().context("the room has no standard output")?;
    let mut lines: Vec<Line> = Vec::new();
    for text in BufReader::new(output).lines() {
        let line: Line =
            serde_json::from_str(&text?).context("the room's report is not readable")?;
        let detail =
            if line.detail.is_empty() { String::new() } else { format!(": {}", line.detail) };
        let result = match line.result {
            Outcome::Passed => "passed",
            Outcome::Failed => "FAILED",
            Outcome::NotOffered => "not offered",
        };
        sh::say(format!("{} {}: {result} ({:.1} s){detail}", line.combo, line.step, line.seconds));
        lines.push(line);
    }
    let status = child.wait()?;
    room::sweep(&plan.cgroup, plan.kubeconfig.is_none());
    // A room that broke down reports what it did not come to.
    for step in script::STEPS {
        if !lines.iter().any(|line| line.step == step) {
            lines.push(Line {
                combo: plan.combo.to_string(),
                step: step.into(),
                result: Outcome::Failed,
                detail: format!("not reached ({status})"),
                seconds: 0.0,
            });
        }
    }
    Ok(lines)
}

/// Runs inside a room: what `unshare` was told to start.
pub(crate) fn inside(plan: &Path) -> Result<ExitCode> {
    let plan: Plan = serde_json::from_slice(&std::fs::read(plan)?)?;
    room::end_with_parent();
    room::furnish(&plan.dir, plan.kubeconfig.is_none())?;
    script::run(&plan)?;
    Ok(ExitCode::SUCCESS)
}

/// Combinations across, steps down, and below it why something is not as it should be.
fn table(lines: &[Line]) -> String {
    let mut combos: Vec<&str> = Vec::new();
    for line in lines {
        if !combos.contains(&line.combo.as_str()) {
            combos.push(&line.combo);
        }
    }
    let mut text = format!("{:<10}", "cloud/edge");
    for combo in &combos {
        text += &format!("  {combo:<12}");
    }
    text = text.trim_end().to_owned() + "\n";
    for step in script::STEPS {
        let mut row = format!("{step:<10}");
        for combo in &combos {
            let found = lines.iter().find(|line| line.step == step && line.combo == *combo);
            let cell = match found.map(|line| (&line.result, line.seconds)) {
                Some((Outcome::Passed, seconds)) => format!("{seconds:.1} s"),
                Some((Outcome::Failed, _)) => "FAILED".into(),
                Some((Outcome::NotOffered, _)) => "not offered".into(),
                None => "-".into(),
            };
            row += &format!("  {cell:<12}");
        }
        text += row.trim_end();
        text.push('\n');
    }
    for line in lines.iter().filter(|line| line.result != Outcome::Passed) {
        let word = if line.result == Outcome::Failed { "failed" } else { "not offered" };
        text += &format!("{} {}: {word}: {}\n", line.combo, line.step, line.detail);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_has_a_column_per_combination_and_says_why() {
        let line = |combo: &str, step: &str, result: Outcome, detail: &str| Line {
            combo: combo.into(),
            step: step.into(),
            result,
            detail: detail.into(),
            seconds: 1.25,
        };
        let text = table(&[
            line("ours/go", "enrol", Outcome::Passed, ""),
            line("go/go", "enrol", Outcome::Failed, "no certificate"),
            line("go/go", "logs", Outcome::NotOffered, "off"),
        ]);
        let rows: Vec<&str> = text.lines().collect();
        assert_eq!(rows[0], "cloud/edge  ours/go       go/go");
        assert_eq!(rows[1], "enrol       1.2 s         FAILED");
        assert!(
            text.ends_with("go/go enrol: failed: no certificate\ngo/go logs: not offered: off\n")
        );
    }

    #[test]
    fn combination_is_read_cloud_first() {
        assert_eq!("ours/go".parse(), Ok(Combo { cloud: Side::Ours, edge: Side::Go }));
        assert!("go".parse::<Combo>().is_err());
    }

    #[test]
    fn missing_upstream_program_is_told_with_a_hint() {
        let error = upstream(&None, "--edgecore", true).unwrap_err().to_string();
        assert!(error.contains("--edgecore") && error.contains("hint: "), "{error}");
        assert!(upstream(&None, "--edgecore", false).unwrap().is_none());
        assert!(upstream(&Some("no/such/file".into()), "--edgecore", false).is_err());
    }
}
