//! Steps of the script about node jobs and the router.
//!
//! Go CloudCore needs KubeEdge's controller manager to begin a job; where only CloudCore runs, the script begins it as
//! that program would.

use super::script::{Done, NODE, Room, wait_for};
use super::{Side, http};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const GROUP: &str = "operations.kubeedge.io";

impl Room {
    /// An image is fetched onto the node before it is needed; one that is not there is told.
    pub(super) fn pre_pull(&mut self) -> Result<Done> {
        let image = self.plan.images.last().context("no image was packed")?;
        let registry = http::registry(image)?;
        let (there, missing) =
            (format!("{registry}/prepull:1"), format!("{registry}/prepull:none"));
        let job = |images: &[&str]| json!({"imagePrePullTemplate": {"images": images, "nodeNames": [NODE], "timeoutSeconds": 120}});
        self.begin_job("ImagePrePullJob", "imageprepulljobs", "fetched", job(&[&there]))?;
        let task = self.ended_job("imageprepulljobs", "fetched")?;
        ensure!(task["phase"] == "Successful", "the node's task: {task}");
        ensure!(task["imageStatus"][0]["status"] == "True", "the image: {task}");
        let images = self.containerd.ctr(&["images", "ls", "-q"])?;
        ensure!(images.lines().any(|name| name == there), "the image is not on the node");
        self.begin_job("ImagePrePullJob", "imageprepulljobs", "missing", job(&[&missing]))?;
        let task = self.ended_job("imageprepulljobs", "missing")?;
        ensure!(task["phase"] == "Failure", "the node's task: {task}");
        ensure!(task["imageStatus"][0]["status"] == "False", "the image: {task}");
        Ok(Done::Passed)
    }

    /// A field of the agent's configuration is changed, and it goes on with it; containers run on.
    pub(super) fn configure(&mut self) -> Result<Done> {
        if self.plan.combo.edge == Side::Go {
            return Ok(Done::NotOffered(
                "Go EdgeCore leaves changes of its configuration to keadm, which is not here"
                    .into(),
            ));
        }
        let before = self.containerd.running(super::cluster::NAMESPACE, "stays")?;
        let spec =
            json!({"updateFields": {"beat": "20"}, "nodeNames": [NODE], "timeoutSeconds": 120});
        self.begin_job("ConfigUpdateJob", "configupdatejobs", "beat", spec)?;
        let task = self.ended_job("configupdatejobs", "beat")?;
        ensure!(task["phase"] == "Successful", "the node's task: {task}");
        let spec = json!({"updateFields": {"nodeName": "other"}, "nodeNames": [NODE]});
        self.begin_job("ConfigUpdateJob", "configupdatejobs", "refused", spec)?;
        let task = self.ended_job("configupdatejobs", "refused")?;
        ensure!(task["phase"] == "Failure", "the node's task: {task}");
        self.follows("ninth", &before)
    }

    /// HTTP in the cloud reaches an application on the node, and its answer comes back.
    pub(super) fn router(&mut self) -> Result<Done> {
        let Some(router) = self.cloud.router else {
            return Ok(Done::NotOffered(match self.plan.combo.cloud {
                Side::Go => {
                    "Go CloudCore's router finds nodes by an address of the machine's".into()
                }
                Side::Ours => "the router is off on a cluster of yours".into(),
            }));
        };
        let application = http::echo()?;
        let rules = "rules.kubeedge.io/v1";
        let namespace = super::cluster::NAMESPACE;
        let endpoint = |name: &str, spec: Value| {
            json!({"apiVersion": rules, "kind": "RuleEndpoint",
                "metadata": {"name": name, "namespace": namespace}, "spec": spec})
        };
        let port = application.port().to_string();
        wait_for("kinds of the router", || {
            self.cluster().apply(&endpoint("rest", json!({"ruleEndpointType": "rest"}))).map(Some)
        })?;
        let bus = json!({"ruleEndpointType": "servicebus", "properties": {"service_port": port}});
        self.cluster().apply(&endpoint("bus", bus))?;
        self.cluster().apply(&json!({"apiVersion": rules, "kind": "Rule",
            "metadata": {"name": "call", "namespace": namespace}, "spec": {
                "source": "rest", "sourceResource": {"path": "/door"},
                "target": "bus", "targetResource": {"path": "/open"}}}))?;
        let path = format!("/{NODE}/{namespace}/door/now");
        let (status, said) = wait_for("answer of the router", || {
            let (status, said) = http::post(router, &path, "please")?;
            ensure!(status != 404, "{said}");
            Ok(Some((status, said)))
        })?;
        if self.plan.combo.edge == Side::Ours {
            ensure!(status == 501 && said.contains("no service bus"), "{status} {said}");
            return Ok(Done::Noted("our EdgeCore has no service bus yet, and says so".into()));
        }
        ensure!(status == 200 && said == "POST /open/now please", "{status} {said}");
        Ok(Done::Passed)
    }

    fn begin_job(&self, kind: &str, plural: &str, name: &str, spec: Value) -> Result<()> {
        let job = json!({"apiVersion": format!("{GROUP}/v1alpha2"), "kind": kind,
            "metadata": {"name": name}, "spec": spec});
        wait_for("kinds of node jobs", || self.cluster().apply(&job).map(Some))?;
        if self.plan.combo.cloud == Side::Go {
            let status = json!({"status": {"phase": "Init", "nodeStatus": [{"nodeName": NODE, "phase": "Pending"}]}});
            let resource = format!("{plural}.v1alpha2.{GROUP}");
            let patch = status.to_string();
            let args =
                ["patch", &resource, name, "--subresource=status", "--type=merge", "-p", &patch];
            self.cluster().kubectl(&args)?;
        }
        Ok(())
    }

    /// Waits for the end of the node's part of a job, and returns it.
    fn ended_job(&self, plural: &str, name: &str) -> Result<Value> {
        let resource = format!("{plural}.v1alpha2.{GROUP}");
        wait_for(&format!("end of job `{name}`"), || {
            let job = self.cluster().get(&[&resource, name])?.context("the job is gone")?;
            let task = &job["status"]["nodeStatus"][0];
            let phase = task["phase"].as_str().unwrap_or_default();
            ensure!(
                matches!(phase, "Successful" | "Failure" | "Unknown"),
                "status {}",
                job["status"]
            );
            // Our cloud ends the job as well; with Go's, that is the controller manager's part.
            let whole = job["status"]["phase"].as_str().unwrap_or_default();
            ensure!(
                self.plan.combo.cloud == Side::Go || matches!(whole, "Completed" | "Failure"),
                "the job is {whole}"
            );
            Ok(Some(task.clone()))
        })
    }
}
