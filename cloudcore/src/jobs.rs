//! What nodes report about their share of node jobs, into the status of the job.
//!
//! Reports come on the link ([`crate::upstream`]) and over HTTPS ([`crate::enrolment`]). A node reports about itself
//! only. Jobs are written whole, with the version that was read, and read anew when somebody else was faster: many
//! nodes report about one job. Sending jobs to nodes is not done here.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/taskmanager/{upstream,status,v1alpha1};
//! cloud/pkg/cloudhub/servers/httpserver/nodetask.

use crate::enrolment::{JobReport, JobReports};
use crate::upstream::answer::Refused;
use crate::upstream::node::seconds;
use crate::upstream::rest::{self, Rest};
use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::Value;
use skerry_cloudcore_core::upstream::job::{self, ActionReport, Denied, Kind, TaskReport};
use skerry_protocol::Message;
use std::time::Duration;

/// How often a report is written anew when another node's came in between.
const CONFLICTS_MAX: u32 = 8;
/// The pause before that, drawn between nothing and this; it grows with each conflict.
const CONFLICT_PAUSE: Duration = Duration::from_millis(50);

/// Writes reports about jobs.
#[derive(Clone)]
pub(crate) struct Jobs {
    client: kube::Client,
    /// Whether reports over HTTPS count when their sender shows no certificate of the node. `keadm` shows none.
    unproven: bool,
}

impl Jobs {
    pub(crate) fn new(client: kube::Client, unproven: bool) -> Self {
        Self { client, unproven }
    }

    /// A report of version `v1alpha2`: `operations.kubeedge.io/v1alpha2/<type>/<job>/node/<node>`.
    pub(crate) async fn action(&self, node: &str, request: &Message) -> Result<(), Refused> {
        let resource = &request.route.resource;
        let (kind, name, of_node) = job::parse_path(resource)
            .ok_or_else(|| Refused::Invalid(format!("`{resource}` is no path of a node job")))?;
        own(node, of_node)?;
        let report: ActionReport =
            request.content_as().map_err(|error| Refused::Invalid(error.to_string()))?;
        self.write(job::V1ALPHA2, kind, name, |job| job::apply(kind, job, node, &report)).await
    }

    /// A report of version `v1alpha1`: `task/<job>/node/<node>`, the kind is the operation.
    pub(crate) async fn task(&self, node: &str, request: &Message) -> Result<(), Refused> {
        let route = &request.route;
        let bad = || Refused::Invalid(format!("`{}` is no path of a node task", route.resource));
        let (name, of_node) = job::parse_task_path(&route.resource).ok_or_else(bad)?;
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
        let apply = |job: &mut Value| job::apply_task(kind, job, node, report, &now);
        self.write(job::V1ALPHA1, kind, name, apply).await
    }

    async fn write(
        &self,
        version: &str,
        kind: Kind,
        name: &str,
        apply: impl Fn(&mut Value) -> Result<(), Denied>,
    ) -> Result<(), Refused> {
        let name = rest::segment(name)?;
        let place = rest::path(&format!("/apis/{version}"), "", kind.plural(), name)?;
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
                return Ok(());
            }
            match api.replace(&format!("{place}/status"), &job).await {
                Err(refused) if refused.is_conflict() && conflicts < CONFLICTS_MAX => {
                    conflicts += 1;
                    let pause = CONFLICT_PAUSE * conflicts;
                    tokio::time::sleep(pause.mul_f64(rand::random::<f64>())).await;
                }
                done => return done.map(drop),
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
        external_message: String::new(),
    })
}

fn own(node: &str, found: &str) -> Result<(), Refused> {
    if node == found {
        return Ok(());
    }
    Err(Refused::Forbidden(format!("node `{node}` may not report for node `{found}`")))
}
