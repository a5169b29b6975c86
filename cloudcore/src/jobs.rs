//! Node jobs: what nodes report about their share of them, into the status of the job.
//!
//! Reports come on the link ([`crate::upstream`]) and over HTTPS ([`crate::enrolment`]). A node reports about itself
//! only. Jobs are written whole, with the version that was read, and read anew when somebody else was faster: many
//! nodes report about one job. [`run`] is the task that tells nodes their jobs.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/taskmanager/{upstream,status,v1alpha1};
//! cloud/pkg/cloudhub/servers/httpserver/nodetask.

mod run;

use crate::enrolment::{JobReport, JobReports};
use crate::hub::Hub;
use crate::upstream::answer::{Refused, now_ms};
use crate::upstream::node::seconds;
use crate::upstream::rest::{self, Rest};
use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::Value;
use skerry_cloudcore_core::jobs::{Job, Links};
use skerry_cloudcore_core::upstream::job::{self, Denied};
use skerry_protocol::Message;
use skerry_protocol::job::{self as wire, ActionReport, Kind, TaskReport};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How often a report is written anew when another node's came in between.
const CONFLICTS_MAX: u32 = 8;
/// The pause before that, drawn between nothing and this; it grows with each conflict.
const CONFLICT_PAUSE: Duration = Duration::from_millis(50);

/// Secrets by (namespace, name), with the nodes that may read them.
type Grants = BTreeMap<(String, String), BTreeSet<String>>;

/// Writes reports about jobs, and knows what their task has to know of links.
#[derive(Clone)]
pub(crate) struct Jobs {
    client: kube::Client,
    hub: Hub,
    links: Arc<Mutex<(Links, u64)>>,
    /// Told when a link comes up or ends.
    linked: Arc<Notify>,
    grants: Arc<Mutex<Grants>>,
    /// Whether reports over HTTPS count when their sender shows no certificate of the node. `keadm` shows none.
    unproven: bool,
}

impl Jobs {
    pub(crate) fn new(client: kube::Client, hub: Hub, unproven: bool) -> Self {
        let (links, linked, grants) = Default::default();
        Self { client, hub, links, linked, grants, unproven }
    }

    /// Starts the task that tells nodes their jobs.
    pub(crate) fn spawn(&self, tasks: &TaskTracker, stop: &CancellationToken) {
        run::spawn(self.clone(), tasks, stop);
    }

    /// A new connection of `node` is up.
    pub(crate) fn connected(&self, node: &str) {
        let mut links = self.links.lock().expect("never held over a panic");
        links.1 += 1;
        let number = links.1;
        links.0.insert(node.into(), number);
        self.linked.notify_one();
    }

    /// The last connection of `node` has ended.
    pub(crate) fn disconnected(&self, node: &str) {
        self.links.lock().expect("never held over a panic").0.remove(node);
        self.linked.notify_one();
    }

    /// Whether a job that `node` works on names this Secret for its images.
    pub(crate) fn grants(&self, node: &str, namespace: &str, name: &str) -> bool {
        let grants = self.grants.lock().expect("never held over a panic");
        let key = (namespace.to_owned(), name.to_owned());
        grants.get(&key).is_some_and(|nodes| nodes.contains(node))
    }

    fn grant<'a>(&self, secrets: impl Iterator<Item = (&'a str, &'a str, Vec<&'a str>)>) {
        let mut grants = Grants::new();
        for (namespace, name, nodes) in secrets {
            let granted = grants.entry((namespace.into(), name.into())).or_default();
            granted.extend(nodes.into_iter().map(str::to_owned));
        }
        *self.grants.lock().expect("never held over a panic") = grants;
    }

    fn links(&self) -> Links {
        self.links.lock().expect("never held over a panic").0.clone()
    }

    /// A report of version `v1alpha2`: `operations.kubeedge.io/v1alpha2/<type>/<job>/node/<node>`.
    pub(crate) async fn action(&self, node: &str, request: &Message) -> Result<(), Refused> {
        let resource = &request.route.resource;
        let (kind, name, of_node) = wire::parse_path(resource)
            .ok_or_else(|| Refused::Invalid(format!("`{resource}` is no path of a node job")))?;
        own(node, of_node)?;
        let report: ActionReport =
            request.content_as().map_err(|error| Refused::Invalid(error.to_string()))?;
        let apply = |job: &mut Value| job::apply(kind, job, node, &report);
        self.write(wire::V1ALPHA2, kind, name, apply).await.map(drop)
    }

    /// A report of version `v1alpha1`: `task/<job>/node/<node>`, the kind is the operation.
    pub(crate) async fn task(&self, node: &str, request: &Message) -> Result<(), Refused> {
        let route = &request.route;
        let bad = || Refused::Invalid(format!("`{}` is no path of a node task", route.resource));
        let (name, of_node) = wire::parse_task_path(&route.resource).ok_or_else(bad)?;
        let kind = Kind::of_task(&route.operation).ok_or_else(bad)?;
        own(node, of_node)?;
        let report: TaskReport =
            request.content_as().map_err(|error| Refused::Invalid(error.to_string()))?;
        self.write_task(kind, name, node, &report).await
    }

    async fn write_task(
        &self,
        kind: Kind,
        name: &str,
        node: &str,
        report: &TaskReport,
    ) -> Result<(), Refused> {
        if !report.node_name.is_empty() {
            own(node, &report.node_name)?;
        }
        let now = seconds(jiff::Timestamp::now());
        // Each version of the kind may know the fields of its own form only.
        let place = place(wire::V1ALPHA2, kind, name)?;
        let current = Rest::new(&self.client).get(&place).await;
        if !current.is_ok_and(|job| job::is_current(&job)) {
            let apply = |job: &mut Value| job::apply_task(kind, job, node, report, &now);
            return self.write(wire::V1ALPHA1, kind, name, apply).await.map(drop);
        }
        let apply = |job: &mut Value| job::apply_older(kind, job, node, report, &now);
        let written = self.write(wire::V1ALPHA2, kind, name, apply).await?;
        if let Some(stage) = Job::new(kind, name).next_stage(&written, node, report, now_ms()) {
            self.hub.send(node, stage).await;
        }
        Ok(())
    }

    async fn write(
        &self,
        version: &str,
        kind: Kind,
        name: &str,
        apply: impl Fn(&mut Value) -> Result<(), Denied>,
    ) -> Result<Value, Refused> {
        let place = place(version, kind, name)?;
        let api = Rest::new(&self.client);
        let mut conflicts = 0;
        loop {
            let before = api.get(&place).await?;
            let mut job = before.clone();
            apply(&mut job).map_err(|denied| match denied {
                Denied::Node(_) => Refused::Forbidden(denied.to_string()),
                _ => Refused::Invalid(denied.to_string()),
            })?;
            if job == before {
                return Ok(job);
            }
            match api.replace(&format!("{place}/status"), &job).await {
                Err(refused) if refused.is_conflict() && conflicts < CONFLICTS_MAX => {
                    conflicts += 1;
                    let pause = CONFLICT_PAUSE * conflicts;
                    tokio::time::sleep(pause.mul_f64(rand::random::<f64>())).await;
                }
                done => return done,
            }
        }
    }

    async fn reported(&self, report: JobReport) -> Result<(), String> {
        let JobReport { kind, job, node, certified, body } = report;
        if certified.as_deref() != Some(node.as_str()) && !self.unproven {
            return Err(format!("a report about node `{node}` needs its client certificate"));
        }
        let (kind, report) = match kind.as_str() {
            "nodeupgrade" => (Kind::NodeUpgrade, upgrade_report(&body)?),
            other => {
                let kind =
                    Kind::of_task(other).ok_or_else(|| format!("`{other}` is no kind of task"))?;
                let report = serde_json::from_value(body).map_err(|error| error.to_string())?;
                (kind, report)
            }
        };
        self.write_task(kind, &job, &node, &report).await.map_err(|refused| refused.to_string())
    }
}

impl JobReports for Jobs {
    fn report(&self, report: JobReport) -> BoxFuture<'_, Result<(), String>> {
        self.reported(report).boxed()
    }
}

/// The result of an upgrade as older edges report it: one word for event and result.
fn upgrade_report(body: &Value) -> Result<TaskReport, String> {
    let text = |field: &str| body[field].as_str().unwrap_or_default().to_owned();
    let (event, action) = match body["Status"].as_str().unwrap_or_default() {
        "upgrade_success" => ("Upgrade", "Success"),
        "upgrade_failed_rollback_success" => ("Rollback", "Success"),
        "upgrade_failed_rollback_failed" => ("Rollback", "Failure"),
        other => return Err(format!("`{other}` is no result of an upgrade")),
    };
    Ok(TaskReport {
        node_name: text("NodeName"),
        event: event.into(),
        action: action.into(),
        reason: text("Reason"),
        ..TaskReport::default()
    })
}

fn place(version: &str, kind: Kind, name: &str) -> Result<String, Refused> {
    rest::path(&format!("/apis/{version}"), "", kind.plural(), rest::segment(name)?)
}

fn own(node: &str, found: &str) -> Result<(), Refused> {
    if node == found {
        return Ok(());
    }
    Err(Refused::Forbidden(format!("node `{node}` may not report for node `{found}`")))
}
