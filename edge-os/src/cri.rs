//! Client of the container runtime: the reduced interface of `proto/cri.proto` over a unix socket.
//!
//! Called by the pod engine only. Every call has a deadline; the connection is made on the first
//! call and made again after the runtime was restarted, so a [`Runtime`] never has to be replaced.
//! "Not found" is success for every call that stops or removes, as runtimes forget on their own.
//!
//! Source: kubernetes/cri-api pkg/apis/runtime/v1/api.proto (names, numbers), kubernetes/cri-client
//! pkg/remote_runtime.go (deadlines), containerd/containerd api/services/events/v1 (exits).

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use prost::Message;
use skerry_edge_core::pods::image::Credentials;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};

/// Messages of the runtime interface, as generated.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

#[allow(missing_docs, unreachable_pub, clippy::all)]
mod events_v1 {
    tonic::include_proto!("containerd.services.events.v1");
}

use events_v1::events_client::EventsClient;
use v1::image_service_client::ImageServiceClient;
use v1::runtime_service_client::RuntimeServiceClient;

/// Deadline of a call that says nothing else.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// Deadline of the question how the runtime is; one that hangs should be noticed before the node's lease is old.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);
/// Deadline of a sandbox's start, which runs CNI plugins.
const SANDBOX_TIMEOUT: Duration = Duration::from_secs(240);
/// Added to a stop's grace period and to a command's own timeout.
const EXTRA_TIMEOUT: Duration = Duration::from_secs(120);
/// The runtime ends a pull that makes no progress; this only bounds a runtime that hangs.
const PULL_TIMEOUT: Duration = Duration::from_secs(3600);
/// Largest answer taken; a list of containers can be large.
const ANSWER_MAX: usize = 16 << 20;

/// Why a call to the runtime failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CriError {
    /// Nobody answers on the socket.
    #[error("container runtime is down: {message}")]
    Down { message: String },
    /// No answer in time.
    #[error("{call} timed out after {} s", .after.as_secs())]
    Timeout { call: &'static str, after: Duration },
    /// The runtime refused.
    #[error("rpc error: code = {code} desc = {message}")]
    Refused { code: &'static str, message: String, not_found: bool },
    /// The runtime's answer lacks what it has to have.
    #[error("answer of {call} is incomplete")]
    Incomplete { call: &'static str },
}

impl CriError {
    /// Whether the runtime does not know the thing that was asked for.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { not_found: true, .. })
    }

    /// Whether the runtime could not be reached at all.
    pub fn is_down(&self) -> bool {
        matches!(self, Self::Down { .. })
    }

    /// Returns the runtime's own words.
    pub fn reason(&self) -> String {
        match self {
            Self::Refused { message, .. } => message.clone(),
            other => other.to_string(),
        }
    }
}

/// Output of a command that ran to its end in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: i32,
}

/// The runtime behind one socket. Cheap to clone; clones share the connection.
#[derive(Debug, Clone)]
pub struct Runtime {
    runtime: RuntimeServiceClient<Channel>,
    image: ImageServiceClient<Channel>,
    events: EventsClient<Channel>,
}

/// What a registry is told, for [`Runtime::pull_image`].
pub(crate) fn auth(credentials: &Credentials) -> v1::AuthConfig {
    v1::AuthConfig {
        username: credentials.username.clone(),
        password: credentials.password.clone(),
        auth: credentials.auth.clone(),
        identity_token: credentials.identity_token.clone(),
        registry_token: credentials.registry_token.clone(),
        ..Default::default()
    }
}

impl Runtime {
    /// Returns a client of the runtime at `socket`; connects on the first call.
    pub fn new(socket: &Path) -> Self {
        let channel = channel(socket.to_path_buf());
        Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(ANSWER_MAX),
            image: ImageServiceClient::new(channel.clone()).max_decoding_message_size(ANSWER_MAX),
            events: EventsClient::new(channel).max_decoding_message_size(ANSWER_MAX),
        }
    }

    /// Returns name and version of the runtime.
    pub async fn version(&self) -> Result<v1::VersionResponse, CriError> {
        let request = v1::VersionRequest { version: "v1".to_owned() };
        let mut client = self.runtime.clone();
        call("Version", CALL_TIMEOUT, client.version(request)).await
    }

    /// Returns the runtime's conditions (`RuntimeReady`, `NetworkReady`).
    pub async fn status(&self) -> Result<Vec<v1::RuntimeCondition>, CriError> {
        let mut client = self.runtime.clone();
        let request = v1::StatusRequest { verbose: false };
        let answer = call("Status", STATUS_TIMEOUT, client.status(request)).await?;
        Ok(answer.status.map(|status| status.conditions).unwrap_or_default())
    }

    /// Tells the runtime the node's pod network.
    pub async fn update_pod_cidr(&self, pod_cidr: &str) -> Result<(), CriError> {
        let network_config = Some(v1::NetworkConfig { pod_cidr: pod_cidr.to_owned() });
        let request = v1::UpdateRuntimeConfigRequest {
            runtime_config: Some(v1::RuntimeConfig { network_config }),
        };
        let mut client = self.runtime.clone();
        call("UpdateRuntimeConfig", CALL_TIMEOUT, client.update_runtime_config(request)).await?;
        Ok(())
    }

    /// Makes and starts a sandbox; returns its id.
    pub async fn run_sandbox(&self, config: v1::PodSandboxConfig) -> Result<String, CriError> {
        let request =
            v1::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        let mut client = self.runtime.clone();
        let answer =
            call("RunPodSandbox", SANDBOX_TIMEOUT, client.run_pod_sandbox(request)).await?;
        Ok(answer.pod_sandbox_id)
    }

    /// Stops a sandbox and everything in it.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), CriError> {
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let mut client = self.runtime.clone();
        let answer = call("StopPodSandbox", CALL_TIMEOUT, client.stop_pod_sandbox(request)).await;
        found(answer).map(drop)
    }

    /// Removes a sandbox and everything in it.
    pub async fn remove_sandbox(&self, id: &str) -> Result<(), CriError> {
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let mut client = self.runtime.clone();
        let answer =
            call("RemovePodSandbox", CALL_TIMEOUT, client.remove_pod_sandbox(request)).await;
        found(answer).map(drop)
    }

    /// Returns a sandbox's status, or `None` if the runtime does not know it.
    pub async fn sandbox_status(&self, id: &str) -> Result<Option<v1::PodSandboxStatus>, CriError> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let mut client = self.runtime.clone();
        let answer =
            call("PodSandboxStatus", CALL_TIMEOUT, client.pod_sandbox_status(request)).await;
        Ok(found(answer)?.and_then(|answer| answer.status))
    }

    /// Lists sandboxes that carry all of `labels`.
    pub async fn list_sandboxes(
        &self,
        labels: &[(&str, &str)],
    ) -> Result<Vec<v1::PodSandbox>, CriError> {
        let filter =
            v1::PodSandboxFilter { label_selector: label_map(labels), ..Default::default() };
        let request = v1::ListPodSandboxRequest { filter: Some(filter) };
        let mut client = self.runtime.clone();
        let answer = call("ListPodSandbox", CALL_TIMEOUT, client.list_pod_sandbox(request)).await?;
        Ok(answer.items)
    }

    /// Makes a container in a sandbox; returns its id.
    pub async fn create_container(
        &self,
        sandbox: &str,
        config: v1::ContainerConfig,
        sandbox_config: v1::PodSandboxConfig,
    ) -> Result<String, CriError> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let mut client = self.runtime.clone();
        let answer =
            call("CreateContainer", CALL_TIMEOUT, client.create_container(request)).await?;
        Ok(answer.container_id)
    }

    /// Starts a container that was created.
    pub async fn start_container(&self, id: &str) -> Result<(), CriError> {
        let request = v1::StartContainerRequest { container_id: id.to_owned() };
        let mut client = self.runtime.clone();
        call("StartContainer", CALL_TIMEOUT, client.start_container(request)).await?;
        Ok(())
    }

    /// Stops a container: its stop signal, then after `grace` the kill signal.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), CriError> {
        let timeout = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        let request = v1::StopContainerRequest { container_id: id.to_owned(), timeout };
        let mut client = self.runtime.clone();
        let deadline = grace.saturating_add(EXTRA_TIMEOUT);
        found(call("StopContainer", deadline, client.stop_container(request)).await).map(drop)
    }

    /// Removes a container, and stops it first if it runs.
    pub async fn remove_container(&self, id: &str) -> Result<(), CriError> {
        let request = v1::RemoveContainerRequest { container_id: id.to_owned() };
        let mut client = self.runtime.clone();
        let answer = call("RemoveContainer", CALL_TIMEOUT, client.remove_container(request)).await;
        found(answer).map(drop)
    }

    /// Lists containers that carry all of `labels`.
    pub async fn list_containers(
        &self,
        labels: &[(&str, &str)],
    ) -> Result<Vec<v1::Container>, CriError> {
        let filter =
            v1::ContainerFilter { label_selector: label_map(labels), ..Default::default() };
        let request = v1::ListContainersRequest { filter: Some(filter) };
        let mut client = self.runtime.clone();
        let answer = call("ListContainers", CALL_TIMEOUT, client.list_containers(request)).await?;
        Ok(answer.containers)
    }

    /// Returns a container's status, or `None` if the runtime does not know it.
    pub async fn container_status(
        &self,
        id: &str,
    ) -> Result<Option<v1::ContainerStatus>, CriError> {
        let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let mut client = self.runtime.clone();
        let answer = call("ContainerStatus", CALL_TIMEOUT, client.container_status(request)).await;
        Ok(found(answer)?.and_then(|answer| answer.status))
    }

    /// Makes the runtime open a container's log file again after it was renamed.
    pub async fn reopen_log(&self, id: &str) -> Result<(), CriError> {
        let request = v1::ReopenContainerLogRequest { container_id: id.to_owned() };
        let mut client = self.runtime.clone();
        call("ReopenContainerLog", CALL_TIMEOUT, client.reopen_container_log(request)).await?;
        Ok(())
    }

    /// Runs a command in a container and waits for its end, `timeout` at most.
    pub async fn exec_sync(
        &self,
        id: &str,
        command: &[String],
        timeout: Duration,
    ) -> Result<ExecOutput, CriError> {
        let request = v1::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.to_vec(),
            timeout: i64::try_from(timeout.as_secs().max(1)).unwrap_or(i64::MAX),
        };
        let mut client = self.runtime.clone();
        let deadline = timeout.saturating_add(EXTRA_TIMEOUT);
        let answer = call("ExecSync", deadline, client.exec_sync(request)).await?;
        let v1::ExecSyncResponse { stdout, stderr, exit_code } = answer;
        Ok(ExecOutput { stdout, stderr, exit_code })
    }

    /// Lists the images of this node.
    pub async fn list_images(&self) -> Result<Vec<v1::Image>, CriError> {
        let mut client = self.image.clone();
        let request = v1::ListImagesRequest { filter: None };
        Ok(call("ListImages", CALL_TIMEOUT, client.list_images(request)).await?.images)
    }

    /// Returns an image, or `None` if it is not on this node.
    pub async fn image_status(&self, image: &str) -> Result<Option<v1::Image>, CriError> {
        let request = v1::ImageStatusRequest { image: Some(image_spec(image)), verbose: false };
        let mut client = self.image.clone();
        Ok(call("ImageStatus", CALL_TIMEOUT, client.image_status(request)).await?.image)
    }

    /// Pulls an image; returns the runtime's reference to it.
    pub async fn pull_image(
        &self,
        image: &str,
        auth: Option<v1::AuthConfig>,
        sandbox_config: Option<v1::PodSandboxConfig>,
    ) -> Result<String, CriError> {
        let request = v1::PullImageRequest { image: Some(image_spec(image)), auth, sandbox_config };
        let mut client = self.image.clone();
        Ok(call("PullImage", PULL_TIMEOUT, client.pull_image(request)).await?.image_ref)
    }

    /// Removes an image.
    pub async fn remove_image(&self, image: &str) -> Result<(), CriError> {
        let request = v1::RemoveImageRequest { image: Some(image_spec(image)) };
        let mut client = self.image.clone();
        found(call("RemoveImage", CALL_TIMEOUT, client.remove_image(request)).await).map(drop)
    }

    /// Returns the file systems that hold images.
    pub async fn image_filesystems(&self) -> Result<Vec<v1::FilesystemUsage>, CriError> {
        let mut client = self.image.clone();
        let request = v1::ImageFsInfoRequest {};
        let answer = call("ImageFsInfo", CALL_TIMEOUT, client.image_fs_info(request)).await?;
        Ok(answer.image_filesystems)
    }

    /// Subscribes to the ends of containers and sandboxes.
    pub async fn exits(&self) -> Result<Exits, CriError> {
        let filters = vec![r#"namespace==k8s.io,topic=="/tasks/exit""#.to_owned()];
        let request = events_v1::SubscribeRequest { filters };
        let mut client = self.events.clone();
        let stream = call("Subscribe", CALL_TIMEOUT, client.subscribe(request)).await?;
        Ok(Exits { stream })
    }
}

/// The ends of containers and sandboxes as containerd tells them.
#[derive(Debug)]
pub struct Exits {
    stream: tonic::Streaming<events_v1::Envelope>,
}

impl Exits {
    /// Waits for the next end; returns the container's or sandbox's id, or `None` when the stream
    /// has ended. The end of a command that was run inside a container is passed over.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            let envelope = self.stream.message().await.ok()??;
            let Some(event) = envelope.event else { continue };
            let Ok(exit) = events_v1::TaskExit::decode(event.value.as_slice()) else { continue };
            if exit.id == exit.container_id {
                return Some(exit.container_id);
            }
        }
    }
}

pub(crate) fn channel(socket: PathBuf) -> Channel {
    let connect = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The address is never used: the connector always opens the socket.
    Endpoint::from_static("http://runtime.invalid").connect_with_connector_lazy(connect)
}

async fn call<T>(
    name: &'static str,
    timeout: Duration,
    answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, CriError> {
    match tokio::time::timeout(timeout, answer).await {
        Err(_) => Err(CriError::Timeout { call: name, after: timeout }),
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(refused(status)),
    }
}

fn refused(status: Status) -> CriError {
    let message = status.message().to_owned();
    if status.code() == Code::Unavailable {
        return CriError::Down { message };
    }
    CriError::Refused {
        code: code_name(status.code()),
        // Some calls answer `Unknown` around a "not found" of a lower layer.
        not_found: status.code() == Code::NotFound || message.ends_with(": not found"),
        message,
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::Unimplemented => "Unimplemented",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::Cancelled => "Canceled",
        Code::Internal => "Internal",
        _ => "Unknown",
    }
}

fn found<T>(answer: Result<T, CriError>) -> Result<Option<T>, CriError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

fn image_spec(image: &str) -> v1::ImageSpec {
    v1::ImageSpec { image: image.to_owned(), ..Default::default() }
}

fn label_map(labels: &[(&str, &str)]) -> std::collections::BTreeMap<String, String> {
    labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}
