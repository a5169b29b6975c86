//! The figures of devices: a real API, hub and agent; a mapper in a process of its own reports for a thousand devices.
//!
//! ```text
//! this process: API ◄── hub (process) ◄── agent (process) ◄── DMI ── mapper (process, `load`)
//! ```
//!
//! The figures of the history are made from the agent's own parts in this process, with a clock that runs faster
//! (`history`): nobody waits a day for them.

mod history;
pub(crate) mod load;

use crate::child::Child;
use crate::figures::{Cloud, PARALLEL, object, print_of, say, wait};
use anyhow::{Context, Result, ensure};
use futures::stream::{self, StreamExt, TryStreamExt};
use kube::api::{Api, ApiResource, DynamicObject, ListParams, PartialObjectMeta, PostParams};
use kube::runtime::watcher::{self, watcher};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const NODE: &str = "bench-edge";
const NAMESPACE: &str = "default";
const MODEL: &str = "bench";
const DEVICES: &str = "devices.kubeedge.io/v1beta1";
/// Devices that have a rule.
const RULES: usize = 20;
/// How often each rule is made to begin; a node pauses one that begins more than 6 times in a minute.
const RULE_ROUNDS: usize = 3;
/// Time in which the agent and the hub get used to the load, before anything is measured.
const WARM_UP: Duration = Duration::from_secs(15);
/// The last values are at the hub after this time at most: one interval of reports, and some.
const SETTLE: Duration = Duration::from_secs(30);
/// Pause between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(500);
/// Clock ticks in a second, as `/proc` counts them; the same on every Linux that we run on.
const TICKS: f64 = 100.0;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Plan {
    /// Folder of the built programs
    #[arg(long)]
    programs: PathBuf,
    /// Devices of the node
    #[arg(long, default_value_t = 1000)]
    devices: usize,
    /// Properties of each
    #[arg(long, default_value_t = 50)]
    properties: usize,
    /// Length of the measurement in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Properties of the history; with fewer than 1,000 its size is scaled
    #[arg(long, default_value_t = 1000)]
    history_properties: usize,
    /// Only these figures: load, history
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

/// Measures and prints.
pub(crate) async fn run(plan: Plan) -> Result<()> {
    let wants = |figure: &str| plan.only.is_empty() || plan.only.iter().any(|only| only == figure);
    if wants("load") {
        load(&plan).await?;
    }
    if wants("history") {
        let properties = plan.history_properties;
        tokio::task::spawn_blocking(move || history::measure(properties)).await??;
    }
    Ok(())
}

fn print(figure: &str, unit: &str, value: f64) {
    print_of("devices", figure, unit, value, None);
}

fn device_name(index: usize) -> String {
    format!("d-{index:04}")
}

async fn load(plan: &Plan) -> Result<()> {
    ensure!(plan.devices >= 1 && plan.properties >= 1, "there is nothing to measure");
    let mut cloud = Cloud::start("127.0.0.1", async |_| Ok(())).await?;
    let dir = cloud.dir().join("edge");
    std::fs::create_dir_all(&dir)?;
    say(format!("{} devices of {} properties", plan.devices, plan.properties));
    objects(&cloud.admin, plan).await?;
    let edgecore = dir.join("dmi.sock");
    let agent = agent(&mut cloud, plan, &dir, &edgecore).await?;

    let orders = load::Orders {
        edgecore: edgecore.clone(),
        socket: dir.join("mapper.sock"),
        namespace: NAMESPACE.into(),
        devices: plan.devices,
        properties: plan.properties,
        rules: RULES.min(plan.devices),
    };
    let orders_file = dir.join("orders.json");
    std::fs::write(&orders_file, serde_json::to_vec(&orders)?)?;
    let orders_file = orders_file.to_str().context("the path is no text")?;
    let mut mapper = Child::of_self(&["devices-load", "--orders", orders_file])?;
    let start = Instant::now();
    while mapper.ask("register")?["devices"] != plan.devices {
        ensure!(start.elapsed() < SETTLE * 4, "the agent does not have all devices");
        tokio::time::sleep(LOOK_PAUSE).await;
    }
    say("the mapper has all devices");

    mapper.ask(&format!("load {} 0", WARM_UP.as_secs()))?;
    let writes = count_writes(&cloud.admin).await?;
    let before = (writes.load(Ordering::Relaxed), cpu_seconds(&agent)?, Instant::now());
    agent.forget_peak()?;
    // Standard input and output block; the API in this process goes on meanwhile.
    let question = format!("load {} {RULE_ROUNDS}", plan.seconds);
    let (mapper, answer) = tokio::task::spawn_blocking(move || {
        let answer = mapper.ask(&question);
        (mapper, answer)
    })
    .await?;
    let answer = answer?;
    let seconds = before.2.elapsed().as_secs_f64();
    let cores = (cpu_seconds(&agent)? - before.1) / seconds;
    let peak = agent.rss_peak()?;
    let written = writes.load(Ordering::Relaxed) - before.0;
    let number = |name: &str| answer[name].as_f64().with_context(|| format!("no `{name}`"));
    ensure!(answer["failed"] == 0, "calls failed: {}", answer["error"]);
    say(format!("{} calls, latest by {:.1} ms", answer["calls"], number("max_ms")?));
    print("twin_p50_ms", "ms", number("p50_ms")?);
    print("twin_p99_ms", "ms", number("p99_ms")?);
    print("agent_rss_bytes", "bytes", peak as f64);
    print("agent_cores", "cores", cores);
    let per_device = written as f64 / plan.devices as f64 / (seconds / 10.0);
    print("hub_writes_per_device_10s", "writes", per_device);
    rules(&answer, &dir)?;

    let last = answer["last"].as_str().context("no last value")?.to_owned();
    let start = Instant::now();
    let mut wrong = plan.devices;
    while wrong > 0 {
        ensure!(
            start.elapsed() < SETTLE,
            "{wrong} devices are not `{last}` at the hub, {} s after the end",
            SETTLE.as_secs()
        );
        tokio::time::sleep(LOOK_PAUSE).await;
        wrong = wrong_devices(&cloud.admin, plan.devices, &last).await?;
    }
    print("last_value_at_hub_s", "s", start.elapsed().as_secs_f64());
    drop((mapper, agent));
    cloud.stop().await;
    Ok(())
}

async fn agent(cloud: &mut Cloud, plan: &Plan, dir: &Path, dmi: &Path) -> Result<Child> {
    let token = skerry_cloudcore::create_token(&cloud.admin, NODE, SETTLE * 10).await?;
    let config = json!({
        "nodeName": NODE,
        "hub": format!("wss://{}", cloud.address("hub")?),
        "quic": format!("quic://{}", cloud.address("quic")?),
        "enrol": format!("https://{}", cloud.address("enrol")?),
        "tunnel": format!("wss://{}", cloud.address("tunnel")?),
        "token": token.to_string(),
        "dir": dir.join("state"),
        "podDir": dir.join("pods"),
        "podLogDir": dir.join("logs"),
        // Nobody listens there: there are devices and no pods.
        "runtimeSocket": dir.join("none.sock"),
        "nodeIP": "127.0.0.1",
        "dmiSocket": dmi,
    });
    let file = dir.join("edgecore.yaml");
    std::fs::write(&file, config.to_string())?;
    let file = file.to_str().context("the path is no text")?;
    let program = plan.programs.join("edgecore");
    let log = dir.join("edgecore.log");
    let agent = Child::of_program(&program, &["run", "--config", file], &log)?;
    wait("the agent's socket for mappers", async || Ok(dmi.exists())).await?;
    Ok(agent)
}

/// The model, the devices and the rules. CloudCore defines their kinds when it starts.
async fn objects(admin: &kube::Client, plan: &Plan) -> Result<()> {
    let rules = RULES.min(plan.devices);
    let mut properties: Vec<Value> = (0..plan.properties)
        .map(|index| json!({"name": load::property(index), "type": "FLOAT", "accessMode": "ReadOnly"}))
        .collect();
    properties.push(json!({"name": load::TRIGGER, "type": "FLOAT", "accessMode": "ReadOnly"}));
    properties.push(json!({"name": load::SWITCH, "type": "STRING", "accessMode": "ReadWrite"}));
    let models = api(admin, DEVICES, "DeviceModel", "devicemodels");
    let devices = api(admin, DEVICES, "Device", "devices");
    let all_rules = api(admin, "fleet.skerry.dev/v1alpha1", "DeviceRule", "devicerules");
    let model = object(json!({
        "apiVersion": DEVICES, "kind": "DeviceModel", "metadata": {"name": MODEL},
        "spec": {"protocol": load::PROTOCOL, "properties": properties},
    }))?;
    let create = PostParams::default();
    wait("kinds of devices at the API", async || {
        Ok(models.list(&ListParams::default()).await.is_ok())
    })
    .await?;
    models.create(&create, &model).await?;
    wait("kind of rules at the API", async || {
        Ok(all_rules.list(&ListParams::default()).await.is_ok())
    })
    .await?;
    for index in 0..rules {
        let name = device_name(index);
        let switch = |value: &str| json!({"set": {"device": name, "property": load::SWITCH, "value": value}});
        let rule = object(json!({
            "apiVersion": "fleet.skerry.dev/v1alpha1", "kind": "DeviceRule", "metadata": {"name": name},
            "spec": {"when": {"device": name, "property": load::TRIGGER, "above": 50},
                "then": [switch("on")], "otherwise": [switch("off")]},
        }))?;
        all_rules.create(&create, &rule).await?;
    }
    let (devices, create) = (&devices, &create);
    stream::iter(0..plan.devices)
        .map(Ok::<_, anyhow::Error>)
        .try_for_each_concurrent(PARALLEL, |index| async move {
            let name = device_name(index);
            let mut own: Vec<Value> = (0..plan.properties)
                .map(|index| json!({"name": load::property(index), "reportToCloud": true}))
                .collect();
            let mut annotations = json!({});
            if index < rules {
                own.push(json!({"name": load::TRIGGER, "reportToCloud": true}));
                own.push(json!({"name": load::SWITCH, "reportToCloud": true}));
                annotations = json!({
                    "fleet.skerry.dev/rules": json!([name]).to_string(),
                    "fleet.skerry.dev/local-desired": json!({load::SWITCH: "edge"}).to_string(),
                });
            }
            let device = object(json!({
                "apiVersion": DEVICES, "kind": "Device",
                "metadata": {"name": name, "annotations": annotations},
                "spec": {"nodeName": NODE, "deviceModelRef": {"name": MODEL},
                    "protocol": {"protocolName": load::PROTOCOL}, "properties": own},
            }))?;
            devices.create(create, &device).await?;
            Ok(())
        })
        .await
}

fn api(admin: &kube::Client, api_version: &str, kind: &str, plural: &str) -> Api<DynamicObject> {
    let resource = resource(api_version, kind, plural);
    Api::namespaced_with(admin.clone(), NAMESPACE, &resource)
}

fn resource(api_version: &str, kind: &str, plural: &str) -> ApiResource {
    let (group, version) = api_version.split_once('/').expect("a group and a version");
    ApiResource {
        group: group.into(),
        version: version.into(),
        api_version: api_version.into(),
        kind: kind.into(),
        plural: plural.into(),
    }
}

fn statuses(admin: &kube::Client) -> Api<DynamicObject> {
    api(admin, DEVICES, "DeviceStatus", "devicestatuses")
}

/// Counts every write of a DeviceStatus from here on.
async fn count_writes(admin: &kube::Client) -> Result<Arc<AtomicU64>> {
    let counter = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&counter);
    let resource = resource(DEVICES, "DeviceStatus", "devicestatuses");
    let api: Api<PartialObjectMeta<DynamicObject>> =
        Api::namespaced_with(admin.clone(), NAMESPACE, &resource);
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut ready = Some(ready);
        let mut events = std::pin::pin!(watcher(api, watcher::Config::default()));
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Apply(_)) => {
                    counted.fetch_add(1, Ordering::Relaxed);
                }
                Ok(watcher::Event::InitDone) => {
                    let _ = ready.take().map(|ready| ready.send(()));
                }
                _ => {}
            }
        }
    });
    is_ready.await.context("the statuses of devices cannot be watched")?;
    Ok(counter)
}

/// How many devices are not `last` at the hub, in all that the load reports.
async fn wrong_devices(admin: &kube::Client, devices: usize, last: &str) -> Result<usize> {
    let api = statuses(admin);
    let mut right = 0;
    let mut params = ListParams::default().limit(200);
    loop {
        let page = api.list(&params).await?;
        for status in &page.items {
            let twins = status.data.pointer("/status/twins").and_then(Value::as_array);
            let mut loaded = twins
                .into_iter()
                .flatten()
                .filter(|twin| twin["propertyName"].as_str().is_some_and(load::is_loaded));
            right += usize::from(
                twins.is_some() && loaded.all(|twin| twin["reported"]["value"] == *last),
            );
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(devices.saturating_sub(right)),
        }
    }
}

/// Time from a report to the word in the node's log that its rule began, and to the mapper that is told.
fn rules(answer: &Value, dir: &Path) -> Result<()> {
    let log =
        std::fs::read_to_string(dir.join("state/rules.log")).context("no rule did anything")?;
    let mut began: Vec<(String, f64)> = Vec::new();
    for line in log.lines() {
        let line: Value = serde_json::from_str(line)?;
        if line["reason"] == "RuleBegan" {
            let at: jiff::Timestamp = line["at"].as_str().context("no time")?.parse()?;
            let rule = line["rule"].as_str().context("no rule")?;
            let rule = rule.split_once('/').map_or(rule, |(_, name)| name);
            began.push((rule.to_owned(), at.as_nanosecond() as f64 / 1e6));
        }
    }
    let sent = answer["sent"].as_array().context("no `sent`")?;
    let mut delays = Vec::new();
    for one in sent {
        let (device, at) =
            (one[0].as_str().context("no device")?, one[1].as_f64().context("no time")?);
        // The log has whole nanoseconds, what was sent has some thousandths less.
        let began = began.iter().find(|(rule, began)| rule == device && *began >= at - 0.01);
        let (_, began) = began.with_context(|| format!("the rule of {device} did not begin"))?;
        delays.push(began - at);
    }
    let mut told: Vec<f64> =
        answer["told_ms"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
    ensure!(told.len() == sent.len(), "{} of {} wishes of rules arrived", told.len(), sent.len());
    print("rule_ms", "ms", percentile(&mut delays, 99.0));
    print("rule_to_device_ms", "ms", percentile(&mut told, 99.0));
    Ok(())
}

/// The value below which so many hundredths of all are; 0 of none.
pub(crate) fn percentile(values: &mut [f64], hundredths: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() as f64 * hundredths / 100.0).ceil() as usize;
    values.get(at.saturating_sub(1)).copied().unwrap_or_default()
}

/// Time that a process has had of all processors together.
fn cpu_seconds(child: &Child) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.pid()))?;
    // The name in brackets may have spaces; what follows has none.
    let fields = stat.rsplit_once(')').context("no such process")?.1.split_whitespace();
    let ticks: f64 = fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    Ok(ticks / TICKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let mut values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(percentile(&mut values, 99.0), 198.0);
        assert_eq!(percentile(&mut values, 100.0), 200.0);
        assert_eq!(percentile(&mut [7.0], 50.0), 7.0);
        assert_eq!(percentile(&mut [], 50.0), 0.0);
    }
}
