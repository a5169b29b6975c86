//! What one hostile node costs the others: the time in which they have a change, and the hub's memory.
//!
//! Honest nodes are measured alone, then beside each kind of hostile node, then alone again, so that what the machine
//! does meanwhile shows. The hostile one has a certificate and dials again whenever it is thrown out.

use crate::child::Child;
use crate::figures::{Cloud, PARALLEL, object, payload, print, say};
use crate::fleet::until;
use crate::nodes::{Orders, VALUE, now_ms, text};
use anyhow::{Context, Result};
use base64::Engine;
use bytes::BytesMut;
use futures::stream::{self, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use skerry_protocol::digest::{self, Digest};
use skerry_protocol::message::UPSTREAM_LEN_MAX;
use skerry_protocol::websocket::{self, Opcode, Role};
use skerry_protocol::{Message, Operation};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

/// Changes in one measurement: with 200 nodes, 4,000 times for a p99.
const CHANGES: usize = 20;
/// Time between two changes.
const PAUSE: Duration = Duration::from_millis(250);
/// How long a hostile node is at it before the first change.
const RUN_UP: Duration = Duration::from_secs(3);
/// ConfigMaps that the hostile node should take and does not, and the bytes of each.
const LARGE_OBJECTS: usize = 4;
const LARGE_LEN: usize = 500_000;
/// A piece of junk, and the time between two: a megabyte a second.
const JUNK_LEN: usize = 64 * 1024;
const JUNK_PAUSE: Duration = Duration::from_millis(62);
/// Content of a large message: with its envelope just under what a hub takes of a node.
const MESSAGE_LEN: usize = UPSTREAM_LEN_MAX - 4096;
const NAME: &str = "hostile";

/// What a node does instead of what it should.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Hostile {
    /// A megabyte a second of what is no message.
    Junk,
    /// Asks for everything and reads nothing.
    Mute,
    /// Messages as long as a hub takes, as fast as it takes them.
    Large,
}

impl Hostile {
    const ALL: [Self; 3] = [Self::Junk, Self::Mute, Self::Large];

    /// One connection, until the hub ends it.
    pub(crate) async fn talk(self, mut stream: TlsStream<TcpStream>, name: &str) -> Result<()> {
        let mut out = BytesMut::new();
        match self {
            Self::Junk => {
                let junk = vec![b'{'; JUNK_LEN];
                loop {
                    out.clear();
                    websocket::encode(Role::Client, Opcode::Text, &junk, rand::random(), &mut out);
                    stream.write_all(&out).await?;
                    stream.flush().await?;
                    tokio::time::sleep(JUNK_PAUSE).await;
                }
            }
            Self::Mute => {
                let held = Digest::default();
                let resource = digest::RESOURCE;
                let query = Message::new(
                    now_ms(),
                    "metamanager",
                    "meta",
                    Operation::Query,
                    resource,
                    &held,
                );
                text(&query, &mut out);
                stream.write_all(&out).await?;
                stream.flush().await?;
                loop {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    out.clear();
                    websocket::encode(Role::Client, Opcode::Ping, &[], rand::random(), &mut out);
                    stream.write_all(&out).await?;
                    stream.flush().await?;
                }
            }
            Self::Large => {
                let content = payload(1, MESSAGE_LEN);
                let resource = format!("default/nodepatch/{name}");
                let (mut reader, mut writer) = tokio::io::split(stream);
                let read = async {
                    let mut buffer = vec![0; 64 * 1024];
                    while reader.read(&mut buffer).await? > 0 {}
                    anyhow::Ok(())
                };
                let write = async {
                    loop {
                        let message = Message::new(
                            now_ms(),
                            "edged",
                            "meta",
                            Operation::Patch,
                            &resource,
                            &content,
                        );
                        out.clear();
                        text(&message, &mut out);
                        writer.write_all(&out).await?;
                        writer.flush().await?;
                    }
                };
                tokio::select! {
                    read = read => read,
                    written = write => written,
                }
            }
        }
    }
}

/// Measures a hub with `count` honest nodes and prints.
pub(crate) async fn measure(count: usize) -> Result<()> {
    say(format!("{count} honest nodes and one that is not"));
    let cloud = Cloud::start("127.0.0.1", async |client| objects(client, count).await).await?;
    let mut honest = start(&cloud, (0..count).map(name), None)?;
    until(&mut honest, "connect", "synced", count).await?;
    let mut value = 0;
    // The first changes warm up what later ones find warm.
    p99(&cloud, &mut honest, count, &mut value).await?;
    let alone = p99(&cloud, &mut honest, count, &mut value).await?;
    let mut worst: f64 = 0.0;
    let mut memory: u64 = 0;
    for kind in Hostile::ALL {
        let rss = cloud.hub.rss()?;
        cloud.hub.forget_peak()?;
        let mut hostile = start(&cloud, [NAME.to_owned()].into_iter(), Some(kind))?;
        hostile.ask("connect")?;
        tokio::time::sleep(RUN_UP).await;
        let beside = p99(&cloud, &mut honest, count, &mut value).await?;
        let peak = cloud.hub.rss_peak()?.saturating_sub(rss);
        let stats = hostile.ask("stats")?;
        drop(hostile);
        say(format!(
            "{kind:?}: p99 {:.0} ms, the hub's memory {:.1} MiB more at most, dials {}, refused {}",
            beside * 1e3,
            peak as f64 / 1_048_576.0,
            stats["dialled"],
            stats["refused"]
        ));
        worst = worst.max(beside);
        memory = memory.max(peak);
        tokio::time::sleep(RUN_UP).await;
    }
    let alone_again = p99(&cloud, &mut honest, count, &mut value).await?;
    say(format!("alone: p99 {:.0} ms before, {:.0} ms after", alone * 1e3, alone_again * 1e3));
    print("honest_p99_alone_s", "s", alone.max(alone_again), None);
    print("hostile_p99_ratio", "ratio", worst / alone.max(alone_again), None);
    print("hostile_memory_bytes", "bytes", memory as f64, None);
    drop(honest);
    cloud.stop().await;
    Ok(())
}

fn start(
    cloud: &Cloud,
    names: impl Iterator<Item = String>,
    hostile: Option<Hostile>,
) -> Result<Child> {
    let base64 = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    let nodes = names
        .map(|name| {
            let certificate = cloud.pki.certificate(&name)?;
            Ok((name, base64(&certificate)))
        })
        .collect::<Result<_>>()?;
    let orders = Orders {
        hub: cloud.address("hub")?.parse()?,
        ca: base64(&cloud.pki.ca()),
        key: base64(cloud.pki.node_key().secret_der()),
        nodes,
        hostile,
    };
    let file = cloud.dir().join(if hostile.is_some() { "hostile.json" } else { "honest.json" });
    std::fs::write(&file, serde_json::to_vec(&orders)?)?;
    let path = file.to_str().context("the path is no text")?;
    let mut child = Child::of_self(&["nodes", "--orders", path])?;
    child.answer()?;
    Ok(child)
}

/// The time in which 99 of 100 have a change.
async fn p99(cloud: &Cloud, nodes: &mut Child, count: usize, value: &mut u64) -> Result<f64> {
    let configs: Api<ConfigMap> = Api::namespaced(cloud.admin.clone(), "default");
    nodes.ask("times")?;
    for _ in 0..CHANGES {
        *value += 1;
        let wanted = format!("change-{value}");
        // What the hostile node should take changes with it.
        let large = json!({"data": {"value": wanted}});
        let name = format!("large-{}", *value as usize % LARGE_OBJECTS);
        configs.patch(&name, &PatchParams::default(), &Patch::Merge(&large)).await?;
        nodes.ask(&format!("want {wanted}"))?;
        let patch = json!({"data": {VALUE: wanted}});
        configs.patch("shared", &PatchParams::default(), &Patch::Merge(&patch)).await?;
        until(nodes, "stats", "at_wanted", count).await?;
        tokio::time::sleep(PAUSE).await;
    }
    let answer = nodes.ask("times")?;
    let mut times: Vec<f64> = serde_json::from_value(answer["times"].clone())?;
    times.sort_by(f64::total_cmp);
    let index = (times.len() as f64 * 0.99).ceil() as usize;
    times.get(index.saturating_sub(1)).copied().context("no times")
}

fn name(index: usize) -> String {
    format!("node-{index:05}")
}

async fn objects(client: &kube::Client, count: usize) -> Result<()> {
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    let config = |name: &str, len| {
        object(
            json!({"metadata": {"name": name}, "data": {VALUE: "first", "payload": payload(1, len)}}),
        )
    };
    configs.create(&PostParams::default(), &config("shared", 2048)?).await?;
    let large: Vec<String> = (0..LARGE_OBJECTS).map(|index| format!("large-{index}")).collect();
    for name in &large {
        configs.create(&PostParams::default(), &config(name, LARGE_LEN)?).await?;
    }
    let nodes: Api<Node> = Api::all(client.clone());
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let all = (0..count).map(|index| (name(index), vec!["shared".to_owned()]));
    stream::iter(all.chain([(NAME.to_owned(), large)]))
        .map(Ok::<_, anyhow::Error>)
        .try_for_each_concurrent(PARALLEL, |(name, refers)| {
            let (nodes, pods) = (nodes.clone(), pods.clone());
            async move {
                let node = json!({"metadata": {
                    "name": name, "labels": {"node-role.kubernetes.io/edge": ""}}});
                nodes.create(&PostParams::default(), &object(node)?).await?;
                let sources: Vec<Value> =
                    refers.iter().map(|refer| json!({"configMapRef": {"name": refer}})).collect();
                let pod = json!({
                    "metadata": {"name": format!("app-{name}")},
                    "spec": {"nodeName": name, "automountServiceAccountToken": false,
                        "containers": [{"name": "c", "image": "none", "envFrom": sources}]},
                });
                pods.create(&PostParams::default(), &object(pod)?).await?;
                Ok(())
            }
        })
        .await
}
