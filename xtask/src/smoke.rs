//! The smoke run: a push reaches a real container, and goes on doing so through a cut and a killed agent.

use crate::fleet::{Fleet, PATIENCE, Running};
use crate::sh;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Site, app and container of the template that the run watches.
const NAMESPACE: &str = "site-lisbon-01";
const SITE_FILE: &str = "sites/lisbon-01.yaml";
const APP_FOLDER: &str = "apps/hello-web/manifests";
const CONTAINER: &str = "web";
const PORT: u16 = 8080;
const FRIDGE: &str = "lisbon-01/fridge";
const IMAGES: [&str; 2] = ["skerry.local/busybox:1", "skerry.local/busybox:2"];

/// Runs every step; returns the line of figures.
pub(crate) fn run(fleet: Fleet) -> Result<Value> {
    sh::say(format!("fleet is up after {:.1} s", fleet.start_time.as_secs_f64()));
    let (first, _) = one(&fleet, "first page", |web| web.page(PORT))?;

    let clone = fleet.dir.join("clone");
    if clone.exists() {
        std::fs::remove_dir_all(&clone)?;
    }
    let mut git = Command::new("git");
    sh::output(git.args(["clone", "-q", fleet.fact("/remote")?]).arg(&clone))?;
    fleet.fact("/devices/broker").context("`skerry up` runs no devices; its log says why")?;
    refresh(&fleet, &clone)?;

    // 1. A changed value reaches a container that was started for it. (The old one shows it earlier: its volume
    // follows the ConfigMap.)
    let greeting = format!("smoke {}", stamp());
    edit_greeting(&clone, &greeting)?;
    let start = Instant::now();
    push(&clone, "greeting")?;
    one(&fleet, "container with the pushed value", |web| {
        ensure!(web.id != first.id, "the old container is the only one");
        let page = web.page(PORT)?;
        ensure!(page.contains(&greeting), "the page is still the old one");
        Ok(page)
    })?;
    let push_to_running = start.elapsed();
    sh::say(format!("push to running: {:.2} s", push_to_running.as_secs_f64()));
    ready(&fleet)?;

    // 2. The link is cut and the agent killed; what runs goes on running, what dies is started from local data.
    let before = one(&fleet, "running container", |web| Ok(web.clone()))?.0;
    fleet.link.cut();
    let mut survived = 0;
    kill_agent(&fleet)?;
    let after = one(&fleet, "the container of before the kill", |web| {
        ensure!(*web == before, "container {} runs instead of {}", web.id, before.id);
        Ok(())
    })?;
    survived += 1;
    sh::say(format!("cut, agent killed: container {} still runs", short(&after.0)));
    fleet.ctr(&["tasks", "kill", "-s", "SIGKILL", &before.id])?;
    let reborn = one(&fleet, "a container started from local data", |web| {
        ensure!(web.id != before.id, "the killed container is still there");
        web.page(PORT)
    })?;
    sh::say(format!("cut, container killed: {} runs in its place", short(&reborn.0)));
    kill_agent(&fleet)?;
    one(&fleet, "the container of before the second kill", |web| {
        ensure!(web.id == reborn.0.id, "container {} runs instead", web.id);
        Ok(())
    })?;
    survived += 1;

    // 3. The link heals, and the next push arrives: another image.
    let image = edit_image(&clone)?;
    fleet.link.heal();
    let start = Instant::now();
    push(&clone, "image")?;
    one(&fleet, "container of the pushed image", |web| {
        let version = web.read("/etc/skerry-image-version")?;
        ensure!(image.ends_with(&format!(":{}", version.trim())), "still version {version}");
        web.page(PORT)
    })?;
    let push_to_running_after_cut = start.elapsed();
    sh::say(format!(
        "push to running after the cut: {:.2} s",
        push_to_running_after_cut.as_secs_f64()
    ));
    ready(&fleet)?;

    let devices = devices(&fleet)?;

    let services = rss(fleet.pid())?;
    let agent = rss(fleet.agent_pid()?.try_into()?)?;
    let figures = json!({
        "push_to_running_s": seconds(push_to_running),
        "push_to_running_after_cut_s": seconds(push_to_running_after_cut),
        "edgecore_rss_bytes": agent,
        "cloudcore_rss_bytes": services,
        "reconciler_rss_bytes": services,
        "apiserver_rss_bytes": services,
        "one_process": true,
        "restarts_survived": survived,
        "start_s": seconds(fleet.start_time),
        "device_wish_s": seconds(devices.wish),
        "device_rule_s": seconds(devices.rule),
        "device_history_values": devices.history_values,
    });
    let dir = fleet.dir.clone();
    let bridge = Path::new("/sys/class/net").join(fleet.fact("/nodes/0/bridge")?);
    fleet.stop()?;
    nothing_left(&dir)?;
    ensure!(!bridge.exists(), "the network bridge {} is still there", bridge.display());
    Ok(figures)
}

/// What the fridge showed.
struct Devices {
    /// From the start of `skerry device set` until the device has the value.
    wish: Duration,
    /// From there until the rule at the node has lit the lamp and the workload has heard; the air has to get warm first.
    rule: Duration,
    /// Values of the temperature that the node kept.
    history_values: usize,
}

/// 4. Readings arrive, a wish reaches the fridge, and the rule at its node fires and ends, link or no link.
fn devices(fleet: &Fleet) -> Result<Devices> {
    set(fleet, 4)?;
    reading(fleet, "a cold fridge", |_, air| air < 6.0)?;
    sh::wait_for("word of the door", PATIENCE, || {
        let door = property(fleet, "lisbon-01/fridge-door", "open")?;
        Ok((!door.is_empty()).then_some(()))
    })?;
    let before = alarms(fleet)?;

    let wish = set(fleet, 8)?;
    // From here on the node is alone.
    fleet.link.cut();
    let start = Instant::now();
    sh::wait_for("a workload that hears of the alarm", PATIENCE, || {
        let all = alarms(fleet)?;
        let new: Vec<&str> = all.lines().skip(before.lines().count()).collect();
        Ok(new.iter().any(|line| line.contains("too warm")).then_some(()))
    })?;
    let rule = start.elapsed();
    fleet.link.heal();
    reading(fleet, "a lamp that the rule has lit", |lamp, air| lamp == "true" && air > 6.5)?;
    sh::say(format!(
        "wish to device {:.2} s, rule and workload {:.2} s later with the link cut",
        wish.as_secs_f64(),
        rule.as_secs_f64()
    ));
    set(fleet, 4)?;
    reading(fleet, "a lamp that the rule has put out", |lamp, _| lamp == "false")?;
    let monitor = fleet.fact("/monitor")?;
    let history =
        fleet.skerry(&["device", "history", FRIDGE, "temperature", "--monitor", monitor])?;
    let values = history["rows"].as_array().context("the history has no rows")?;
    ensure!(values.len() > 2, "the node kept {} values", values.len());
    Ok(Devices { wish, rule, history_values: values.len() })
}

/// Sets what the thermostat aims at; returns how long it took until the fridge has it.
fn set(fleet: &Fleet, degrees: i16) -> Result<Duration> {
    let start = Instant::now();
    fleet.skerry(&["device", "set", FRIDGE, &format!("setpoint={degrees}")])?;
    sh::wait_for("a fridge with the new setpoint", PATIENCE, || {
        Ok((setpoint(fleet)? == degrees * 10).then_some(()))
    })?;
    Ok(start.elapsed())
}

/// What the fridge's holding register 0 says: tenths of a degree.
fn setpoint(fleet: &Fleet) -> Result<i16> {
    let address: SocketAddr = fleet.fact("/devices/fridge")?.parse()?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(&[0, 1, 0, 0, 0, 6, 1, 3, 0, 0, 0, 1])?;
    let mut answer = [0; 11];
    stream.read_exact(&mut answer)?;
    ensure!(answer[7..9] == [3, 2], "the fridge answers {answer:?}");
    Ok(i16::from_be_bytes([answer[9], answer[10]]))
}

/// Gives a repository that was made from an older template what the run needs of devices.
fn refresh(fleet: &Fleet, clone: &Path) -> Result<()> {
    let template = sh::root().join("fleet-repo-template");
    let git = |args: &[&str]| sh::output(Command::new("git").current_dir(clone).args(args));
    for folder in ["devices", "apps/fridge-watch"] {
        git(&["rm", "-rq", "--ignore-unmatch", folder])?;
        let to = clone.join(folder);
        std::fs::create_dir_all(to.parent().context("a folder has a parent")?)?;
        sh::output(Command::new("cp").arg("-r").arg(template.join(folder)).arg(to))?;
    }
    let site = clone.join(SITE_FILE);
    if !std::fs::read_to_string(&site)?.contains("fridgePort:") {
        std::fs::copy(template.join(SITE_FILE), &site)?;
        for (name, fact) in [("fridgePort", "/devices/fridge"), ("brokerPort", "/devices/broker")] {
            let address: SocketAddr = fleet.fact(fact)?.parse()?;
            edit(&site, |line| {
                let key = line.trim_start().starts_with(&format!("{name}:"));
                key.then(|| format!("{}{name}: {}", indent(line), address.port()))
            })?;
        }
    }
    git(&["add", "-A"])?;
    if !git(&["status", "--porcelain"])?.trim().is_empty() {
        push(clone, "devices of the template")?;
    }
    Ok(())
}

/// Waits until `check` is content with lamp and air of the fridge, as the cluster knows them.
fn reading(fleet: &Fleet, what: &str, check: impl Fn(&str, f64) -> bool) -> Result<()> {
    sh::wait_for(what, PATIENCE, || {
        let (lamp, air) =
            (property(fleet, FRIDGE, "lamp")?, property(fleet, FRIDGE, "temperature")?);
        let number = air.parse().with_context(|| format!("the air is `{air}`"))?;
        ensure!(check(&lamp, number), "lamp {lamp}, air {air}");
        Ok(Some(()))
    })
}

/// What `skerry device get` says that a property is.
fn property(fleet: &Fleet, device: &str, name: &str) -> Result<String> {
    let about = fleet.skerry(&["device", "get", device])?;
    let properties = about["properties"].as_array().context("the device has no properties")?;
    let one = properties.iter().find(|property| property["property"] == name);
    let reported = &one.context("no such property")?["reported"];
    Ok(reported.as_str().unwrap_or_default().to_owned())
}

/// What the workload has heard so far.
fn alarms(fleet: &Fleet) -> Result<String> {
    let running = fleet.running(NAMESPACE, "watch")?;
    let watch = running.first().context("no container `watch` runs")?;
    // Absent until the first one.
    Ok(watch.read("/tmp/alarms").unwrap_or_default())
}

/// Waits until exactly one container of the app runs and `check` is content with it.
fn one<T>(
    fleet: &Fleet,
    what: &str,
    check: impl Fn(&Running) -> Result<T>,
) -> Result<(Running, T)> {
    sh::wait_for(what, PATIENCE, || {
        let running = fleet.running(NAMESPACE, CONTAINER)?;
        match running.as_slice() {
            [] => bail!("no container `{CONTAINER}` runs"),
            all => {
                let mut last = None;
                for web in all {
                    match check(web) {
                        Ok(found) => return Ok(Some((web.clone(), found))),
                        Err(error) => last = Some(error),
                    }
                }
                Err(last.context("no container was checked")?)
            }
        }
    })
}

/// Waits until `skerry status` calls the site's app ready at the newest revision, with nothing of the old one left.
fn ready(fleet: &Fleet) -> Result<()> {
    sh::wait_for("word of `skerry status` that the app is ready", PATIENCE, || {
        let status = fleet.skerry(&["status"])?;
        let apps = status["releases"].as_array().context("`skerry status` lists no releases")?;
        let app = apps.iter().find(|app| app["site"] == "lisbon-01" && app["app"] == "hello-web");
        let app = app.context("`skerry status` does not list hello-web at lisbon-01")?;
        ensure!(app["health"] == "Ready", "hello-web is {}: {}", app["health"], app["message"]);
        let running = fleet.running(NAMESPACE, CONTAINER)?.len();
        ensure!(running == 1, "{running} containers run");
        Ok(Some(()))
    })
}

/// Ends the agent without warning and waits for the next one.
fn kill_agent(fleet: &Fleet) -> Result<()> {
    let pid = fleet.agent_pid()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
    sh::wait_for("restarted agent", PATIENCE, || {
        let next = fleet.agent_pid()?;
        Ok((next != pid && Path::new(&format!("/proc/{next}")).exists()).then_some(()))
    })
}

fn edit_greeting(clone: &Path, greeting: &str) -> Result<()> {
    edit(&clone.join(SITE_FILE), |line| {
        let key = line.trim_start().starts_with("greeting:");
        key.then(|| format!("{}greeting: \"{greeting}\"", indent(line)))
    })
}

/// Swaps the two images; returns the new one.
fn edit_image(clone: &Path) -> Result<&'static str> {
    let mut image = None;
    for entry in std::fs::read_dir(clone.join(APP_FOLDER))? {
        let file = entry?.path();
        let text = std::fs::read_to_string(&file)?;
        let found = IMAGES.iter().position(|name| text.contains(name));
        if let Some(old) = found {
            let new = IMAGES[1 - old];
            std::fs::write(&file, text.replace(IMAGES[old], new))?;
            image = Some(new);
        }
    }
    image.with_context(|| format!("no manifest in {APP_FOLDER} names an image of the template"))
}

fn edit(file: &Path, change: impl Fn(&str) -> Option<String>) -> Result<()> {
    let text = std::fs::read_to_string(file)?;
    let mut changed = false;
    let lines: Vec<String> = text
        .lines()
        .map(|line| change(line).inspect(|_| changed = true).unwrap_or_else(|| line.to_owned()))
        .collect();
    ensure!(changed, "{} has no such line", file.display());
    Ok(std::fs::write(file, lines.join("\n") + "\n")?)
}

fn push(clone: &Path, message: &str) -> Result<()> {
    for args in [
        &["-c", "user.name=smoke", "-c", "user.email=smoke@localhost", "commit", "-qam", message][..],
        &["push", "-q"],
    ] {
        sh::output(Command::new("git").current_dir(clone).args(args))?;
    }
    Ok(())
}

/// After a stop no process works in the folder, and nothing is mounted below it.
fn nothing_left(dir: &Path) -> Result<()> {
    let dir = dir.to_string_lossy().into_owned();
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let left: Vec<&str> = mounts.lines().filter(|line| line.contains(&dir)).collect();
    ensure!(left.is_empty(), "still mounted: {}", left.join("; "));
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let is_process = entry.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit());
        if !is_process || entry.file_name() == std::process::id().to_string().as_str() {
            continue;
        }
        // A process that ended meanwhile has no command line any more.
        let command = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        let program = command.split('\0').next().unwrap_or_default();
        let ours = [
            "skerry",
            "edgecore",
            "containerd",
            "containerd-shim-runc-v2",
            "mosquitto",
            "skerry-mapper-modbus",
            "skerry-mapper-mqtt",
        ]
        .iter()
        .any(|name| program.ends_with(name));
        ensure!(
            !(ours && command.contains(&dir)),
            "process {} still runs: {}",
            entry.file_name().to_string_lossy(),
            command.replace('\0', " "),
        );
    }
    Ok(())
}

/// Resident memory of a process, in bytes.
pub(crate) fn rss(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)).context("no VmRSS")?;
    Ok(kib.parse::<u64>()? * 1024)
}

fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}

fn stamp() -> u128 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map(|since| since.as_millis()).unwrap_or_default()
}

fn indent(line: &str) -> &str {
    &line[..line.len() - line.trim_start().len()]
}

fn short(container: &Running) -> &str {
    container.id.get(..12).unwrap_or(&container.id)
}
