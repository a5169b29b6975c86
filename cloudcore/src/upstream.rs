//! What a node asks for: registration, status, leases, events, reads, devices, jobs, and its applications' requests.
//!
//! A node may act only for itself; `skerry_cloudcore_core::upstream` has the rules. What is not its own is answered with
//! an error that says so, and so is what nobody here can do: a peer that waits is never left without a word.
//!
//! One file per family of kinds. Each takes a request and gives an [`Outcome`]; here that becomes a message, or nothing
//! where KubeEdge answers nothing and the peer expects no receipts. The sessions are the callers; they give the requests
//! of one node one after the other, so that two patches of it cannot overtake each other.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/edgecontroller/controller/upstream.go and
//! cloud/pkg/cloudhub/dispatcher/message_dispatcher.go.

pub(crate) mod answer;
mod csr;
mod device;
mod event;
pub(crate) mod lease;
pub(crate) mod node;
mod pod;
mod qualification;
mod read;
pub(crate) mod rest;
mod token;

use crate::applications::Applications;
use crate::hub::Hub;
use crate::jobs::Jobs;
use crate::router::Router;
use answer::Refused;
use rest::{Done, Rest};
use serde_json::Value;
use skerry_cloudcore_core::upstream::answer::version;
use skerry_protocol::job;
use skerry_protocol::{Message, Operation, ResourcePath};
use std::time::Duration;

/// Resource of the query for the cluster's CA.
const CLUSTER_CA: &str = "k8s/ca.crt";
/// A request without an answer of its own is tried this often when the API fails, before its receipt says so.
const SILENT_TRIES: u32 = 3;
/// The pause before the second of these tries; it doubles.
const SILENT_PAUSE: Duration = Duration::from_millis(250);

/// What an operator decides about requests of nodes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Settings {
    /// Requests go to the API in the node's name, with its rights there. Needs the right to impersonate nodes. Without,
    /// CloudCore asks in its own name, after its own checks, and applications cannot write.
    pub(crate) impersonate: bool,
    /// What nodes get as annotation `cloudcore`: the address that KubeEdge's tools take for this CloudCore's.
    pub(crate) address: Option<String>,
}

/// Answers the requests of nodes.
pub(crate) struct Upstream {
    client: kube::Client,
    hub: Hub,
    settings: Settings,
    jobs: Jobs,
    applications: Applications,
    router: Option<Router>,
    devices: device::Devices,
}

/// What came of a request.
enum Outcome {
    /// Answered with `{"Object": …, "Err": …}`.
    Object { done: Done, version: bool },
    /// Answered with the object, or with an error.
    Read(Done),
    /// Answered with `"OK"` and the object's version, or with an error.
    Ok(Done),
    /// Answered with `"OK"` or an API error.
    Done(Result<(), Refused>),
    /// Answered with a receipt only, for peers that want it.
    Silent(Result<(), Refused>),
    /// The same, with a message of its own.
    Receipt(Box<Message>),
    /// Answered with this.
    Message(Box<Message>),
    /// Nothing happened and nobody waits.
    Nothing,
}

impl Outcome {
    fn unsupported(request: &Message) -> Self {
        let route = &request.route;
        let reason = format!("`{}` of `{}` is not supported", route.operation, route.resource);
        Self::Read(Err(Refused::Unsupported(reason)))
    }

    fn refusal(&self) -> Option<&Refused> {
        match self {
            Self::Object { done, .. } | Self::Read(done) | Self::Ok(done) => done.as_ref().err(),
            Self::Done(done) | Self::Silent(done) => done.as_ref().err(),
            _ => None,
        }
    }
}

impl Upstream {
    pub(crate) fn new(
        client: kube::Client,
        hub: Hub,
        jobs: Jobs,
        applications: Applications,
        settings: Settings,
    ) -> Self {
        let devices = device::Devices::new(client.clone(), hub.clone());
        Self { client, hub, settings, jobs, applications, router: None, devices }
    }

    /// The same, with a router for data of applications.
    pub(crate) fn with_router(mut self, router: Option<Router>) -> Self {
        self.router = router;
        self
    }

    /// Does what `request` asks for, as `node`. `None` when KubeEdge gives no answer either: for events, and for reports
    /// about devices and jobs that were refused.
    pub(crate) async fn answer(&self, node: &str, request: &Message) -> Option<Message> {
        let outcome = self.act(node, request).await;
        let message = match outcome {
            Outcome::Silent(_) | Outcome::Receipt(_) | Outcome::Nothing => return None,
            outcome => shaped(request, outcome)?,
        };
        Some(message)
    }

    /// The same for a peer with receipts: every request that has an effect, or was to have one, is answered.
    pub(crate) async fn receipt(&self, node: &str, request: &Message) -> Option<Message> {
        let mut pause = SILENT_PAUSE;
        for _ in 1..SILENT_TRIES {
            match self.act(node, request).await {
                // The peer forgets it when it is answered, and sends it again only after the next reconnect.
                Outcome::Silent(Err(refused)) if refused.is_transient() => {
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                outcome => return shaped(request, outcome),
            }
        }
        shaped(request, self.act(node, request).await)
    }

    /// A new connection of `node` is up: what its applications watch is told again.
    pub(crate) async fn connected(&self, node: &str) {
        self.jobs.connected(node);
        if let Some(router) = &self.router {
            router.connected(node).await;
        }
        self.applications.connected(node).await;
    }

    /// The last connection of `node` has ended.
    pub(crate) async fn disconnected(&self, node: &str) {
        self.jobs.disconnected(node);
        self.applications.disconnected(node).await;
    }

    async fn act(&self, node: &str, request: &Message) -> Outcome {
        let outcome = self.dispatch(node, request).await;
        if let Some(refused) = outcome.refusal() {
            tracing::debug!(
                node,
                msg_id = request.header.msg_id,
                operation = request.route.operation,
                resource = request.route.resource,
                error = %refused,
                "a request of the node was refused"
            );
        }
        outcome
    }

    async fn dispatch(&self, node: &str, request: &Message) -> Outcome {
        let route = &request.route;
        match (request.operation(), route.resource.as_str()) {
            (Some(Operation::Upload), _) => return self.upload(node, request),
            (Some(Operation::UpdateNodeActionStatus), _) => {
                return Outcome::Silent(self.jobs.action(node, request).await);
            }
            (Some(Operation::Upgrade | Operation::Prepull), resource)
                if job::parse_task_path(resource).is_some() =>
            {
                return Outcome::Silent(self.jobs.task(node, request).await);
            }
            (Some(Operation::Application), resource) => {
                let watched = resource == crate::applications::SYNC;
                let answer = if watched {
                    self.applications.sync(node, request).await
                } else {
                    self.applications.answer(node, request).await
                };
                return match answer {
                    Ok(message) => Outcome::Message(Box::new(message)),
                    Err(refused) => Outcome::Done(Err(refused)),
                };
            }
            (_, CLUSTER_CA) => return self.cluster_ca(request).await,
            // KubeEdge's cloud does not answer; its edge takes the list and would otherwise ask again.
            (Some(Operation::Get), "membership/detail") => {
                let list = self.hub.membership(node).await;
                return list.map_or(Outcome::Nothing, |list| Outcome::Message(Box::new(list)));
            }
            (_, resource) if resource.starts_with("device/") => {
                return self.device(node, request).await;
            }
            _ => {}
        }
        let Ok(path) = route.resource.parse::<ResourcePath>() else {
            return Outcome::unsupported(request);
        };
        match path.kind() {
            "node" => self.node(node, &path, request).await,
            "nodepatch" if is(request, Operation::Patch) => {
                self.patch_node(node, &path, request).await
            }
            skerry_protocol::qualification::KIND => self.qualification(node, &path, request).await,
            "nodestatus" => self.legacy_node_status(node, &path, request).await,
            "pod" => self.pod(node, &path, request).await,
            "podpatch" if is(request, Operation::Patch) => {
                self.patch_pod(node, &path, request).await
            }
            "podstatus" => self.legacy_pod_status(node, &path, request).await,
            "lease" => self.lease(node, &path, request).await,
            "event" => self.event(node, &path, request).await,
            "configmap" | "secret" => self.config(node, &path, request).await,
            "persistentvolume" | "persistentvolumeclaim" | "volumeattachment" => {
                self.volume(node, &path, request).await
            }
            "serviceaccounttoken" => self.token(node, &path, request).await,
            "certificatesigningrequest" => self.csr(node, &path, request).await,
            _ => Outcome::unsupported(request),
        }
    }

    /// Data of an application for a rule of the router.
    fn upload(&self, node: &str, request: &Message) -> Outcome {
        let answer = match &self.router {
            Some(router) => router.upload(node, request),
            None => {
                let reason = "this cloud has no router; data of applications is not taken";
                Some(request.error(answer::now_ms(), "cloudhub", "user", reason))
            }
        };
        answer.map_or(Outcome::Silent(Ok(())), |message| Outcome::Message(Box::new(message)))
    }

    /// The API, in the node's name where that is wanted.
    fn rest<'a>(&'a self, node: &'a str) -> Rest<'a> {
        match self.settings.impersonate {
            true => Rest::as_node(&self.client, node),
            false => Rest::new(&self.client),
        }
    }

    /// The API in CloudCore's own name, for what a node's rights cannot do or would not find.
    fn own_rest(&self) -> Rest<'_> {
        Rest::new(&self.client)
    }
}

/// The message that an outcome becomes.
fn shaped(request: &Message, outcome: Outcome) -> Option<Message> {
    Some(match outcome {
        Outcome::Object { done, version } => answer::object(request, &done, version),
        Outcome::Read(done) => answer::read(request, &done),
        Outcome::Ok(Ok(object)) => answer::reply(request, "OK").with_version(version(&object)),
        Outcome::Ok(Err(refused)) => answer::failed(request, &refused),
        Outcome::Done(done) | Outcome::Silent(done) => answer::ok(request, &done),
        Outcome::Receipt(message) | Outcome::Message(message) => *message,
        Outcome::Nothing => return None,
    })
}

fn is(request: &Message, operation: Operation) -> bool {
    request.operation() == Some(operation)
}

/// Refuses what is of another node.
fn own(node: &str, found: &str, what: &str) -> Result<(), Refused> {
    if node == found {
        return Ok(());
    }
    Err(Refused::Forbidden(format!("node `{node}` may not act for {what} `{found}`")))
}

fn content<T: serde::de::DeserializeOwned>(request: &Message) -> Result<T, Refused> {
    request.content_as().map_err(|error| Refused::Invalid(error.to_string()))
}

fn content_object(request: &Message) -> Result<Value, Refused> {
    let object: Value = content(request)?;
    match object["metadata"].is_object() {
        true => Ok(object),
        false => {
            Err(Refused::Invalid(format!("content of `{}` is no object", request.route.resource)))
        }
    }
}

/// A patch comes as a string that holds JSON; an object is taken as well.
fn content_patch(request: &Message) -> Result<Value, Refused> {
    patch_of(content(request)?)
}

fn patch_of(patch: Value) -> Result<Value, Refused> {
    let patch = match patch {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| Refused::Invalid(format!("the patch is no JSON: {error}")))?,
        other => other,
    };
    match patch {
        Value::Object(_) => Ok(patch),
        _ => Err(Refused::Invalid("the patch is no JSON object".into())),
    }
}

#[cfg(test)]
mod tests;
