//! Figures, one JSON line each: `{"bench","figure","unit","value","peer","ratio"}`.
//!
//! `peer` is the value that ours is held against: measured in the same run where the peer can run here, else
//! KubeEdge's figure that docs/figures.md names, measured beside it on a like machine. `ratio` is ours by theirs;
//! `null` where there is no peer.

use crate::fleet::{Fleet, PATIENCE};
use crate::{build, images, setup, sh, smoke};
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::process::Command;
use std::time::{Duration, Instant};

/// KubeEdge's EdgeCore, idle, resident bytes.
const KUBEEDGE_EDGECORE_RSS: f64 = 84e6;
/// KubeEdge: pod created to seen Running, one pod, image present, seconds.
const KUBEEDGE_POD_RUNNING: f64 = 1.3;
/// Runs of each timed command; the median is printed.
const RUNS: usize = 7;

/// Runs one bench by name.
pub(crate) fn run(name: &str, profile: &str, more: &[String]) -> Result<()> {
    match name {
        "up" if more.is_empty() => up(profile),
        "up" => bail!("bench `up` takes no further arguments"),
        "link" => of_skerry_bench("link", profile, more),
        "devices" => of_skerry_bench("devices", profile, more),
        "image" => crate::bench_image::run(profile, more),
        "qualify" => qualify(profile, more),
        "updates" if more.is_empty() => crate::bench_updates::run(profile),
        "updates" => bail!("bench `updates` takes no further arguments"),
        other => bail!(
            "no bench `{other}`\nhint: there are `up`, `link`, `devices`, `image`, `qualify` and `updates`"
        ),
    }
}

/// Figures that `skerry-bench` measures, with namespaces and processes of its own.
fn of_skerry_bench(name: &str, profile: &str, more: &[String]) -> Result<()> {
    setup::run(true)?;
    let programs = build::programs(profile)?;
    let folder = programs.edgecore.parent().context("a program lies in a folder")?;
    let mut command = Command::new(folder.join("skerry-bench"));
    command.args([name, "--programs"]).arg(folder).args(more);
    let status = command.status().context("could not start `skerry-bench`")?;
    ensure!(status.success(), "`skerry-bench {name}` failed ({status})");
    Ok(())
}

/// The verdicts of `skerry-qualify` on this machine, and against the truth in machines of QEMU. `more` goes to
/// `skerry-truth`: `--kernel NAME`, `--case NAME`.
fn qualify(profile: &str, more: &[String]) -> Result<()> {
    let programs = build::truth(profile)?;
    let work = build::target()?.join("truth");
    std::fs::create_dir_all(&work)?;
    let seconds = median(
        (0..RUNS)
            .map(|_| {
                let begun = Instant::now();
                let mut command = Command::new(&programs.qualify);
                command.args(["--autoload", "all", "--output", "json", "--state"]).arg(&work);
                sh::output(&mut command)?;
                Ok(begun.elapsed().as_secs_f64())
            })
            .collect::<Result<_>>()?,
    );
    let seconds = (seconds * 1000.0).round() / 1000.0;
    println!(
        "{}",
        json!({"bench": "qualify", "figure": "seconds", "unit": "s", "value": seconds, "peer": null, "ratio": null})
    );
    let mut command = Command::new(&programs.truth);
    command.arg("--work").arg(work).arg("--init").arg(&programs.init);
    command.arg("--qualify").arg(&programs.qualify).args(more);
    let status = command.status().context("could not start `skerry-truth`")?;
    ensure!(status.success(), "verdicts were wrong, or cases could not be tried ({status})");
    Ok(())
}

fn up(profile: &str) -> Result<()> {
    setup::run(true)?;
    let programs = build::programs(profile)?;
    let dir = build::target()?.join("bench");
    images::pack(&dir.join("images"))?;
    let fleet = Fleet::start(&programs, &dir)?;
    print("start", "s", fleet.start_time.as_secs_f64(), None);
    sh::wait_for("running template", PATIENCE, || {
        let found = fleet.running("site-lisbon-01", "web")?;
        ensure!(!found.is_empty(), "no container `web` runs");
        Ok(Some(()))
    })?;

    let agent = smoke::rss(fleet.agent_pid()?.try_into()?)? as f64;
    let services = smoke::rss(fleet.pid())? as f64;
    print("edgecore_rss", "bytes", agent, Some(KUBEEDGE_EDGECORE_RSS));
    print("services_rss", "bytes", services, None);
    print("all_rss", "bytes", services + agent, None);

    let raw = median((0..RUNS).map(|index| ctr_run(&fleet, index)).collect::<Result<_>>()?);
    print("ctr_run", "s", raw, None);
    let pod = median((0..RUNS).map(|index| pod_run(&fleet, index)).collect::<Result<_>>()?);
    print("pod_created_to_running", "s", pod, Some(KUBEEDGE_POD_RUNNING));
    print("pod_created_to_running_by_ctr_run", "s", pod, Some(raw));
    for (figure, program) in
        [("skerry_size", &programs.skerry), ("edgecore_size", &programs.edgecore)]
    {
        print(figure, "bytes", std::fs::metadata(program)?.len() as f64, None);
    }
    fleet.stop()
}

/// The floor: containerd alone starts a container of the same image and sees it end.
fn ctr_run(fleet: &Fleet, index: usize) -> Result<f64> {
    let start = Instant::now();
    fleet.ctr(&[
        "run",
        "--rm",
        "skerry.local/busybox:1",
        &format!("bench-{index}"),
        "/bin/true",
    ])?;
    Ok(start.elapsed().as_secs_f64())
}

/// A pod is created through the API and watched by kubectl until it is seen Running.
fn pod_run(fleet: &Fleet, index: usize) -> Result<f64> {
    let kubectl = setup::kubectl()?;
    let kubeconfig = fleet.kubeconfig()?;
    let name = format!("bench-{index}");
    let node = fleet.fact("/nodes/0/name")?;
    let spec =
        json!({"apiVersion": "v1", "spec": {"nodeName": node, "terminationGracePeriodSeconds": 0}});
    let call = |args: &[&str]| {
        let mut command = Command::new(&kubectl);
        command.arg("--kubeconfig").arg(&kubeconfig).args(args);
        command.env("KUBECACHEDIR", fleet.dir.join("kubectl"));
        command
    };
    let mut watch = call(&[
        "get",
        "pods",
        "--watch",
        "--field-selector",
        &format!("metadata.name={name}"),
        "-o",
        "jsonpath={.status.phase}{\"\\n\"}",
    ])
    .stdout(std::process::Stdio::piped())
    .spawn()?;
    let lines = std::io::BufReader::new(watch.stdout.take().context("kubectl has no output")?);
    // The clock runs from before kubectl starts: its own start-up counts against us.
    let start = Instant::now();
    sh::output(&mut call(&[
        "run",
        &name,
        "--image=skerry.local/busybox:1",
        "--restart=Never",
        &format!("--overrides={spec}"),
        "--",
        "sleep",
        "1000",
    ]))?;
    let seen = seen_running(lines);
    watch.kill()?;
    watch.wait()?;
    seen?;
    let took = start.elapsed();
    sh::output(&mut call(&["delete", "pod", &name, "--grace-period=0", "--force"]))?;
    Ok(took.max(Duration::from_millis(1)).as_secs_f64())
}

fn seen_running(lines: impl std::io::BufRead) -> Result<()> {
    for line in lines.lines() {
        if line?.trim() == "Running" {
            return Ok(());
        }
    }
    bail!("the watch ended before the pod ran")
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn print(figure: &str, unit: &str, value: f64, peer: Option<f64>) {
    let round = |value: f64| (value * 10_000.0).round() / 10_000.0;
    let ratio = peer.map(|peer| round(value / peer));
    println!(
        "{}",
        json!({"bench": "up", "figure": figure, "unit": unit, "value": round(value), "peer": peer.map(round), "ratio": ratio})
    );
}
