//! The figures of a hub with many nodes: memory, one change for all, and all back after a cut.

use crate::child::Child;
use crate::figures::{Cloud, PARALLEL, object, print, say};
use crate::nodes::{Orders, VALUE};
use anyhow::{Result, ensure};
use base64::Engine;
use futures::stream::{self, StreamExt, TryStreamExt};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How long all nodes together may take for a step.
const PATIENCE: Duration = Duration::from_secs(300);
/// Changes of the object that all nodes hold; the median is printed.
const CHANGES: usize = 5;
/// Renewals of Leases whose time is measured.
const LEASE_WRITES: usize = 2000;

/// Measures a hub with `count` nodes and prints.
pub(crate) async fn measure(count: usize) -> Result<()> {
    say(format!("{count} nodes, each with a pod that refers to one ConfigMap"));
    let mut cloud = Cloud::start("127.0.0.1", async |client| objects(client, count).await).await?;
    let orders = cloud.dir().join("orders.json");
    let base64 = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    let certificates = (0..count)
        .map(|index| {
            let name = name(index);
            Ok((name.clone(), base64(&cloud.pki.certificate(&name)?)))
        })
        .collect::<Result<_>>()?;
    let written = Orders {
        hub: cloud.address("hub")?.parse()?,
        ca: base64(&cloud.pki.ca()),
        key: base64(cloud.pki.node_key().secret_der()),
        nodes: certificates,
        hostile: None,
    };
    std::fs::write(&orders, serde_json::to_vec(&written)?)?;
    let mut nodes =
        Child::of_self(&["nodes", "--orders", orders.to_str().expect("a temporary folder")])?;
    nodes.answer()?;

    let rss_alone = cloud.hub.rss()?;
    let requests_alone = requests(&mut cloud.hub)?;
    let first = until(&mut nodes, "connect", "synced", count).await?;
    say(format!("all {count} in sync after {first:.1} s"));
    let requests_synced = requests(&mut cloud.hub)?;
    // What the first connections needed and the idle ones do not is given back by then.
    tokio::time::sleep(Duration::from_secs(20)).await;
    let rss = cloud.hub.rss()?;
    let per_node = rss as f64 / count as f64;
    print("rss_per_node_bytes", "bytes", per_node, None);
    print("hub_rss_bytes", "bytes", rss as f64, None);
    print("hub_rss_before_nodes_bytes", "bytes", rss_alone as f64, None);
    // Own Node, pod and ConfigMap of each.
    let objects = (3 * count) as f64;
    print(
        "api_requests_per_object",
        "requests",
        (requests_synced - requests_alone) / objects,
        None,
    );

    print("lease_writes_per_s", "writes", lease_writes(&cloud.admin).await?, None);

    let configs: Api<ConfigMap> = Api::namespaced(cloud.admin.clone(), "default");
    let mut times = Vec::with_capacity(CHANGES);
    for change in 0..CHANGES {
        let value = format!("change-{change}");
        nodes.ask(&format!("want {value}"))?;
        let patch = json!({"data": {VALUE: value}});
        let start = Instant::now();
        configs.patch("shared", &PatchParams::default(), &Patch::Merge(&patch)).await?;
        until(&mut nodes, "stats", "at_wanted", count).await?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    print(&format!("fanout_{count}_s"), "s", times[times.len() / 2], None);

    nodes.ask("cut")?;
    let start = Instant::now();
    while nodes.ask("stats")?["connected"] != 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    say(format!("all cut after {:.1} s", start.elapsed().as_secs_f64()));
    let patch = json!({"data": {VALUE: "after the cut"}});
    configs.patch("shared", &PatchParams::default(), &Patch::Merge(&patch)).await?;
    nodes.ask("want after the cut")?;
    let start = Instant::now();
    until(&mut nodes, "connect", "synced", count).await?;
    until(&mut nodes, "stats", "at_wanted", count).await?;
    print(&format!("storm_{count}_s"), "s", start.elapsed().as_secs_f64(), None);
    let stats = nodes.ask("stats")?;
    say(format!("dials {}, refused {}", stats["dialled"], stats["refused"]));
    drop(nodes);
    cloud.stop().await;
    Ok(())
}

/// How many renewals of Leases the embedded API takes in a second, beside those of the hub.
async fn lease_writes(client: &kube::Client) -> Result<f64> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), "kube-node-lease");
    stream::iter(0..PARALLEL)
        .map(Ok::<_, anyhow::Error>)
        .try_for_each_concurrent(PARALLEL, |index| {
            let leases = leases.clone();
            async move {
                let name = format!("bench-{index}");
                let lease = object(json!({"metadata": {"name": name}, "spec": {}}))?;
                leases.create(&PostParams::default(), &lease).await?;
                Ok(())
            }
        })
        .await?;
    let start = Instant::now();
    stream::iter(0..LEASE_WRITES)
        .map(Ok::<_, anyhow::Error>)
        .try_for_each_concurrent(PARALLEL, |index| {
            let leases = leases.clone();
            async move {
                let renewed = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string();
                let patch = json!({"spec": {"renewTime": renewed, "leaseDurationSeconds": 40}});
                let name = format!("bench-{}", index % PARALLEL);
                leases.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
                Ok(())
            }
        })
        .await?;
    Ok(LEASE_WRITES as f64 / start.elapsed().as_secs_f64())
}

fn name(index: usize) -> String {
    format!("node-{index:05}")
}

fn requests(hub: &mut Child) -> Result<f64> {
    Ok(hub.ask("requests")?["requests"].as_f64().unwrap_or_default())
}

/// Asks first `question`, then for the numbers, until `figure` is `count`; the seconds that took.
pub(crate) async fn until(
    nodes: &mut Child,
    question: &str,
    figure: &str,
    count: usize,
) -> Result<f64> {
    let start = Instant::now();
    let mut told = start;
    let mut stats = nodes.ask(question)?;
    while stats[figure] != count {
        ensure!(start.elapsed() < PATIENCE, "no {count} nodes {figure}: {stats}");
        if told.elapsed() > Duration::from_secs(5) {
            told = Instant::now();
            say(format!("waiting for {count} {figure}: {stats}"));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        stats = nodes.ask("stats")?;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// The objects of the fleet, before the hub starts.
async fn objects(client: &kube::Client, count: usize) -> Result<()> {
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    let shared = object(json!({
        "metadata": {"name": "shared"},
        "data": {VALUE: "first", "payload": crate::figures::payload(1, 2048)},
    }))?;
    configs.create(&PostParams::default(), &shared).await?;
    let nodes: Api<Node> = Api::all(client.clone());
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    stream::iter(0..count)
        .map(Ok::<_, anyhow::Error>)
        .try_for_each_concurrent(PARALLEL, |index| {
            let (nodes, pods) = (nodes.clone(), pods.clone());
            async move {
                let node = object(json!({"metadata": {
                    "name": name(index), "labels": {"node-role.kubernetes.io/edge": ""}}}))?;
                nodes.create(&PostParams::default(), &node).await?;
                let pod = object(pod(index))?;
                pods.create(&PostParams::default(), &pod).await?;
                if index % 1000 == 999 {
                    say(format!("{} nodes made", index + 1));
                }
                Ok(())
            }
        })
        .await
}

fn pod(index: usize) -> Value {
    json!({
        "metadata": {"name": format!("app-{index:05}")},
        "spec": {"nodeName": name(index), "automountServiceAccountToken": false,
            "containers": [{"name": "c", "image": "none", "envFrom": [{"configMapRef": {"name": "shared"}}]}]},
    })
}
