//! What a node reports about its devices: twins and state, into the DeviceStatus.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/devicecontroller/controller/upstream.go.

use super::answer::{self, Refused};
use super::rest::{self, Done, Merge};
use super::{Outcome, Upstream, content};
use serde_json::{Value, json};
use skerry_cloudcore_core::downstream::{Key, Kind};
use skerry_cloudcore_core::upstream::answer::ErrStatus;
use skerry_cloudcore_core::upstream::device::{self as rules, Report};
use skerry_protocol::{Message, Operation};

const ROOT: &str = "/apis/devices.kubeedge.io/v1beta1";
const SOURCE: &str = "devicecontroller";
const GROUP: &str = "twin";
/// Resource of every answer about devices.
const RESOURCE: &str = "twin";
/// How often a report is merged anew when somebody else wrote in between.
const CONFLICTS_MAX: usize = 3;

impl Upstream {
    /// `device/<ns>/<name>/twin/edge_updated` and `device/<ns>/<name>/state/update`.
    pub(super) async fn device(&self, node: &str, request: &Message) -> Outcome {
        let parsed = rules::parse(&request.route.resource);
        let (Some((namespace, name, report)), Some(Operation::Update)) =
            (parsed, request.operation())
        else {
            return Outcome::unsupported(request);
        };
        let done = self.report_device(node, namespace, name, report, request).await;
        let mut message = match &done {
            Ok(()) => request.response(answer::now_ms(), "OK"),
            // KubeEdge says nothing, and its edge sends the value again with the next one; an error would be dropped
            // there. Who wants receipts gets it.
            Err(refused) => {
                tracing::debug!(node, device = name, error = %refused, "a report about a device was refused");
                request.response(answer::now_ms(), &ErrStatus { status: refused.to_status() })
            }
        };
        message.route.source = SOURCE.into();
        message.route.group = GROUP.into();
        message.route.resource = RESOURCE.into();
        match done {
            Ok(()) => Outcome::Message(Box::new(message)),
            Err(_) => Outcome::Receipt(Box::new(message)),
        }
    }

    async fn report_device(
        &self,
        node: &str,
        namespace: &str,
        name: &str,
        report: Report,
        request: &Message,
    ) -> Result<(), Refused> {
        let mut said: Value = content(request)?;
        if let Value::String(text) = &said {
            said = serde_json::from_str(text)
                .map_err(|error| Refused::Invalid(format!("the content is no JSON: {error}")))?;
        }
        let name = rest::segment(name)?;
        if report == Report::State {
            let status = rules::state_status(&said)
                .ok_or_else(|| Refused::Invalid("the report names no state".into()))?;
            let device = self.own_device(node, namespace, name).await?;
            return self.write_status(namespace, name, &device, status, None).await;
        }
        let device = self.read_device(node, namespace, name).await?;
        self.merge_twins(namespace, name, &device, &said).await
    }

    /// What the owner of a DeviceStatus has to be called; from the hub's memory when it knows the device.
    async fn own_device(&self, node: &str, namespace: &str, name: &str) -> Done {
        if let Some(key) = Key::new(Kind::Device, namespace, name)
            && let Some((bound_to, uid)) = self.hub.binding(&key).await
            && bound_to == node
        {
            return Ok(json!({"metadata": {"namespace": namespace, "name": name, "uid": uid}}));
        }
        self.read_device(node, namespace, name).await
    }

    async fn read_device(&self, node: &str, namespace: &str, name: &str) -> Done {
        let device = self.own_rest().get(&rest::path(ROOT, namespace, "devices", name)?).await?;
        if device["spec"]["nodeName"] == node {
            return Ok(device);
        }
        Err(Refused::Forbidden(format!("device `{namespace}/{name}` is not on node `{node}`")))
    }

    async fn merge_twins(
        &self,
        namespace: &str,
        name: &str,
        device: &Value,
        said: &Value,
    ) -> Result<(), Refused> {
        let place = rest::path(ROOT, namespace, "devicestatuses", name)?;
        let mut conflicts = 0;
        loop {
            let known = match self.own_rest().get(&place).await {
                Err(refused) if refused.is_not_found() => Value::Null,
                known => known?,
            };
            let properties = &device["spec"]["properties"];
            let twins = rules::merged_twins(properties, &known["status"]["twins"], said);
            // A list is replaced whole, so it must be the list that was read.
            let version = known["metadata"]["resourceVersion"].as_str();
            let status = json!({ "twins": twins });
            match self.write_status(namespace, name, device, status, version).await {
                Err(refused)
                    if (refused.is_conflict() || refused.is_already_exists())
                        && conflicts < CONFLICTS_MAX =>
                {
                    conflicts += 1;
                }
                done => return done,
            }
        }
    }

    /// Merges `status`; makes the DeviceStatus when the device has none.
    async fn write_status(
        &self,
        namespace: &str,
        name: &str,
        device: &Value,
        status: Value,
        version: Option<&str>,
    ) -> Result<(), Refused> {
        let place = rest::path(ROOT, namespace, "devicestatuses", name)?;
        let mut patch = json!({ "status": status });
        if let Some(version) = version {
            patch["metadata"] = json!({ "resourceVersion": version });
        }
        match self.own_rest().patch(&place, Merge::Json, &patch).await {
            Err(refused) if refused.is_not_found() => {
                let all = rest::path(ROOT, namespace, "devicestatuses", "")?;
                let object = rules::new_status(device, patch["status"].take());
                self.own_rest().create(&all, &object).await.map(drop)
            }
            done => done.map(drop),
        }
    }
}
