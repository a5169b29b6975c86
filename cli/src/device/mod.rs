//! `skerry device`: what the devices of the sites say, and what they are told.
//!
//! Reads Device, DeviceModel and DeviceStatus and writes only desired values, with the rights of the caller. What is
//! shown and what may be set is decided in `view`, without a cluster.

mod history;
mod view;
mod watch;

use crate::fault::hinted;
use crate::{Output, cluster, out, table};
use anyhow::{Context, Result};
use clap::Subcommand;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, ApiResource, DynamicObject, ListParams, Patch, PatchParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use skerry_api::fleet::v1alpha1::site_namespace;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use view::{DeviceRow, PropertyRow, Wish};

/// Objects that are asked for at once.
const PAGE: u32 = 500;
/// How often a desired value is written while others change the device at the same time.
const SET_TRIES: u32 = 5;
/// Pause between two looks whether a device has taken a value.
const LOOK_PAUSE: Duration = Duration::from_millis(500);

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Show all devices: model, node, state, when they spoke last
    List {
        /// Only this site
        #[arg(long)]
        site: Option<String>,
    },
    /// Show a device's properties: desired, reported, age
    Get {
        /// SITE/NAME of the device
        device: Name,
    },
    /// Set what is desired of a device's properties
    Set {
        /// SITE/NAME of the device
        device: Name,
        /// PROPERTY=VALUE; an empty value takes the wish back
        #[arg(required = true)]
        wishes: Vec<Wish>,
        /// Wait so many seconds until the device has taken the values; exit code 1 if it has not
        #[arg(long, value_name = "SECONDS")]
        wait: Option<u64>,
    },
    /// Print what a property was, from the node that keeps it
    History(history::Args),
    /// Print each value and state as it changes, until interrupted
    Watch {
        /// SITE, or SITE/NAME of a device; everything if absent
        what: Option<String>,
    },
}

/// A device as it is written on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    site: String,
    device: String,
}

impl std::str::FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((site, device))
                if !site.is_empty() && !device.is_empty() && !device.contains('/') =>
            {
                Ok(Self { site: site.to_owned(), device: device.to_owned() })
            }
            _ => Err("expected SITE/NAME, `lisbon/fridge` for example".to_owned()),
        }
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.site, self.device)
    }
}

/// Runs the verb.
pub(crate) async fn run(
    verb: Verb,
    kubeconfig: Option<PathBuf>,
    output: Output,
) -> Result<ExitCode> {
    let client = cluster::connect(kubeconfig).await?;
    match verb {
        Verb::List { site } => list(&client, site.as_deref(), output).await,
        Verb::Get { device } => get(&client, &device, output).await,
        Verb::Set { device, wishes, wait } => set(&client, &device, &wishes, wait, output).await,
        Verb::History(args) => history::run(&client, args, output).await,
        Verb::Watch { what } => watch::run(&client, what.as_deref(), output).await,
    }
}

async fn list(client: &Client, site: Option<&str>, output: Output) -> Result<ExitCode> {
    let namespace = site.map(site_namespace);
    let devices = all(client, "Device", "devices", namespace.as_deref()).await?;
    let statuses = all(client, "DeviceStatus", "devicestatuses", namespace.as_deref()).await?;
    if let Some(site) = site
        && devices.is_empty()
    {
        let hint = "`skerry device list` lists the devices of all sites";
        return Err(hinted(format!("site `{site}` has no devices"), hint));
    }
    let now = jiff::Timestamp::now();
    let rows = view::devices(&devices, &statuses, &away(client, None).await);
    match output {
        Output::Json => out::line(json!({"devices": rows}))?,
        Output::Table => {
            let cells = rows.iter().map(|row: &DeviceRow| {
                vec![
                    row.site.clone(),
                    row.device.clone(),
                    row.model.clone(),
                    dash(&row.node),
                    row.state.clone(),
                    format!("{}/{}", row.reported, row.properties),
                    row.age(now),
                ]
            });
            let header = ["SITE", "DEVICE", "MODEL", "NODE", "STATE", "REPORTED", "LAST"];
            table::print(&header, &cells.collect::<Vec<_>>())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn get(client: &Client, name: &Name, output: Output) -> Result<ExitCode> {
    let device = device(client, name).await?;
    let (model, status) = (model_of(client, name, &device).await?, status_of(client, name).await?);
    let now = jiff::Timestamp::now();
    let rows = view::properties(&device.data, model.as_ref(), status.as_ref());
    let node = device.data.pointer("/spec/nodeName").and_then(Value::as_str);
    let about = view::device(&device, status.as_ref(), &away(client, node).await);
    match output {
        Output::Json => {
            let mut value = serde_json::to_value(&about)?;
            value["properties"] = serde_json::to_value(&rows)?;
            out::line(value)?;
        }
        Output::Table => {
            let DeviceRow { site, device, model, node, state, last_state, .. } = &about;
            let node = dash(node);
            let state = match last_state {
                Some(last) => format!("{state} (its node is away; it was {last})"),
                None => state.clone(),
            };
            out::line(format_args!("{site}/{device}: {state}, model {model}, node {node}\n"))?;
            let cells = rows.iter().map(|row: &PropertyRow| {
                vec![
                    row.property.clone(),
                    dash(&row.r#type),
                    dash(&row.access),
                    dash(&row.desired),
                    dash(&row.observed_desired),
                    dash(&row.reported),
                    dash(&row.unit),
                    row.age(now),
                ]
            });
            let header =
                ["PROPERTY", "TYPE", "ACCESS", "DESIRED", "TAKEN", "REPORTED", "UNIT", "AGE"];
            table::print(&header, &cells.collect::<Vec<_>>())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn set(
    client: &Client,
    name: &Name,
    wishes: &[Wish],
    wait: Option<u64>,
    output: Output,
) -> Result<ExitCode> {
    let api = api(client, "Device", "devices", Some(&site_namespace(&name.site)));
    let mut tries = SET_TRIES;
    loop {
        let device = device(client, name).await?;
        let model = model_of(client, name, &device).await?;
        let properties = view::wished(&device, model.as_ref(), wishes).map_err(|refusal| {
            hinted(format!("device `{name}`: {}", refusal.what), refusal.hint)
        })?;
        let patch = json!({
            // Somebody else's change in between is not undone by the whole list.
            "metadata": {"resourceVersion": device.resource_version()},
            "spec": {"properties": properties},
        });
        let params =
            PatchParams { field_manager: Some("skerry-device".to_owned()), ..Default::default() };
        tries -= 1;
        match api.patch(&name.device, &params, &Patch::Merge(patch)).await {
            Ok(_) => break,
            Err(kube::Error::Api(status)) if status.code == 409 && tries > 0 => {}
            Err(error) => {
                return Err(error).with_context(|| format!("could not set device `{name}`"));
            }
        }
    }
    let taken = match wait {
        None => None,
        Some(seconds) => {
            Some(until_taken(client, name, wishes, Duration::from_secs(seconds)).await?)
        }
    };
    match output {
        Output::Json => out::line(json!({
            "site": name.site, "device": name.device, "taken": taken,
            "desired": wishes.iter().map(|wish| (wish.property.clone(), json!(wish.value))).collect::<serde_json::Map<_, _>>(),
        }))?,
        Output::Table => {
            for Wish { property, value } in wishes {
                match value.as_str() {
                    "" => out::line(format_args!("{name}: nothing is desired of {property}"))?,
                    value => out::line(format_args!("{name}: {property} = {value} is desired"))?,
                }
            }
            match taken {
                Some(true) => out::line("the device has taken it")?,
                Some(false) => out::line("the device has not taken it yet")?,
                None => {}
            }
        }
    }
    Ok(if taken == Some(false) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn until_taken(
    client: &Client,
    name: &Name,
    wishes: &[Wish],
    patience: Duration,
) -> Result<bool> {
    let end = Instant::now() + patience;
    loop {
        let status = status_of(client, name).await?;
        if view::is_taken(status.as_ref(), wishes) {
            return Ok(true);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

/// The API of one of KubeEdge's kinds; of all namespaces if none is named.
fn api(client: &Client, kind: &str, plural: &str, namespace: Option<&str>) -> Api<DynamicObject> {
    let resource = ApiResource {
        group: "devices.kubeedge.io".to_owned(),
        version: "v1beta1".to_owned(),
        api_version: "devices.kubeedge.io/v1beta1".to_owned(),
        kind: kind.to_owned(),
        plural: plural.to_owned(),
    };
    match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    }
}

async fn all(
    client: &Client,
    kind: &str,
    plural: &str,
    namespace: Option<&str>,
) -> Result<Vec<DynamicObject>> {
    let api = api(client, kind, plural, namespace);
    let mut params = ListParams::default().limit(PAGE);
    let mut objects = Vec::new();
    loop {
        let page = api.list(&params).await.map_err(|error| not_served(error, plural))?;
        let more = page.metadata.continue_.clone().filter(|token| !token.is_empty());
        objects.extend(page.items);
        match more {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(objects),
        }
    }
}

/// Says in our words that a cluster has no devices at all.
fn not_served(error: kube::Error, plural: &str) -> anyhow::Error {
    match error {
        kube::Error::Api(status) if status.code == 404 => hinted(
            format!("the cluster does not know `{plural}.devices.kubeedge.io`"),
            "CloudCore installs the definitions when it starts; is it running?",
        ),
        error => anyhow::Error::new(error).context(format!("could not list {plural}")),
    }
}

/// The nodes that are away, of all or of one. Whoever may not read nodes sees the states as they were reported last.
async fn away(client: &Client, only: Option<&str>) -> BTreeSet<String> {
    let nodes: Api<Node> = Api::all(client.clone());
    let found = match only {
        Some(name) => nodes.get_opt(name).await.map(|node| node.into_iter().collect()),
        None => nodes.list(&ListParams::default()).await.map(|nodes| nodes.items),
    };
    match found {
        Ok(nodes) => view::away(&nodes),
        Err(error) => {
            tracing::debug!(%error, "nodes cannot be read");
            eprintln!("note: nodes cannot be read, so states are as they were reported last");
            BTreeSet::new()
        }
    }
}

async fn device(client: &Client, name: &Name) -> Result<DynamicObject> {
    let api = api(client, "Device", "devices", Some(&site_namespace(&name.site)));
    match api
        .get_opt(&name.device)
        .await
        .with_context(|| format!("could not get device `{name}`"))?
    {
        Some(device) => Ok(device),
        None => {
            let hint = "`skerry device list` lists all devices";
            Err(hinted(format!("there is no device `{name}`"), hint))
        }
    }
}

async fn model_of(client: &Client, name: &Name, device: &DynamicObject) -> Result<Option<Value>> {
    let Some(model) = device.data.pointer("/spec/deviceModelRef/name").and_then(Value::as_str)
    else {
        return Ok(None);
    };
    let api = api(client, "DeviceModel", "devicemodels", Some(&site_namespace(&name.site)));
    let model =
        api.get_opt(model).await.with_context(|| format!("could not get model `{model}`"))?;
    Ok(model.map(|model| model.data))
}

async fn status_of(client: &Client, name: &Name) -> Result<Option<Value>> {
    let api = api(client, "DeviceStatus", "devicestatuses", Some(&site_namespace(&name.site)));
    let status = api.get_opt(&name.device).await;
    let status = status.with_context(|| format!("could not get the status of device `{name}`"))?;
    Ok(status.map(|status| status.data))
}

fn dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}
