//! What the runtime is told about a pod's sandbox and containers, and how its answers are read.
//!
//! Pure translation between Kubernetes' objects, the core's types and the runtime interface.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use skerry_edge_core::pods::dns::{self, Resolver};
use skerry_edge_core::pods::kubelet::{
    self, ANNOTATION_GRACE, ANNOTATION_HASH, ANNOTATION_MESSAGE_PATH, ANNOTATION_MESSAGE_POLICY,
    ANNOTATION_RESTARTS,
};
use skerry_edge_core::pods::linux::{self, Profile, Resources, Security};
use skerry_edge_core::pods::runtime::{Exit, Instance, Sandbox, State};
use skerry_edge_core::pods::{HASH_ANNOTATION, PodName, definition_hash, host_network};

use super::EngineConfig;
use super::worker::{LABEL_CONTAINER_NAME, LABEL_POD_NAME, LABEL_POD_NAMESPACE, LABEL_POD_UID};
use crate::cri::v1;

/// Where a container's last words lie when the pod does not say.
const MESSAGE_PATH_DEFAULT: &str = "/dev/termination-log";
/// Bytes of a container's last words.
const MESSAGE_BYTES_MAX: u64 = 4096;
/// Bytes of last words that are taken from the log.
const MESSAGE_LOG_BYTES_MAX: u64 = 2048;
/// Lines of last words that are taken from the log.
const MESSAGE_LOG_LINES_MAX: usize = 80;

/// Returns the configuration of a sandbox.
pub(super) fn sandbox_config(
    config: &EngineConfig,
    pod: &Pod,
    name: &PodName,
    attempt: u32,
    resolver: Resolver,
) -> v1::PodSandboxConfig {
    let default = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&default);
    let mut labels = pod.metadata.labels.clone().unwrap_or_default();
    labels.extend(pod_labels(name));
    let mut annotations = pod.metadata.annotations.clone().unwrap_or_default();
    let grace = spec.termination_grace_period_seconds.unwrap_or(30);
    annotations.insert(ANNOTATION_GRACE.to_owned(), grace.to_string());
    let context = spec.security_context.clone().unwrap_or_default();
    let groups = context.fs_group.iter().chain(context.supplemental_groups.iter().flatten());
    let security = v1::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(spec, v1::NamespaceMode::Pod)),
        run_as_user: context.run_as_user.map(int64),
        run_as_group: context.run_as_user.and(context.run_as_group).map(int64),
        supplemental_groups: groups.copied().collect(),
        privileged: linux::any_privileged(spec),
        seccomp: Some(profile(&Profile::RuntimeDefault)),
        ..Default::default()
    };
    let sysctls = context.sysctls.unwrap_or_default();
    let cgroup_parent = match config.cgroup_root.as_str() {
        "" => String::new(),
        root => linux::cgroup_parent(root, spec, &name.uid),
    };
    let Resolver { servers, searches, options } = resolver;
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: name.name.clone(),
            uid: name.uid.clone(),
            namespace: name.namespace.clone(),
            attempt,
        }),
        hostname: if host_network(spec) { String::new() } else { dns::host_name(pod) },
        log_directory: log_folder(&config.log_root, name).to_string_lossy().into_owned(),
        dns_config: Some(v1::DnsConfig { servers, searches, options }),
        port_mappings: if host_network(spec) { Vec::new() } else { ports(spec) },
        labels,
        annotations,
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent,
            security_context: Some(security),
            sysctls: sysctls.into_iter().map(|one| (one.name, one.value)).collect(),
        }),
    }
}

/// What a container needs beside its own definition.
pub(super) struct Parts {
    pub(super) restart_count: u32,
    /// The runtime's reference to the image.
    pub(super) image: v1::Image,
    pub(super) variables: Vec<(String, String)>,
    pub(super) command: Vec<String>,
    pub(super) args: Vec<String>,
    pub(super) mounts: Vec<v1::Mount>,
    pub(super) resources: Resources,
    pub(super) security: Security,
    pub(super) seccomp_root: PathBuf,
}

/// Returns the configuration of a container.
pub(super) fn container_config(
    pod: &Pod,
    name: &PodName,
    container: &Container,
    parts: Parts,
) -> v1::ContainerConfig {
    let default = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&default);
    let mut labels = pod_labels(name);
    labels.insert(LABEL_CONTAINER_NAME.to_owned(), container.name.clone());
    let message_path = message_path(container);
    let mut annotations = kubelet::annotations(pod, container, parts.restart_count, message_path);
    annotations.insert(HASH_ANNOTATION.to_owned(), definition_hash(container));
    let envs = parts
        .variables
        .into_iter()
        .map(|(key, value)| v1::KeyValue { key, value: value.into_bytes() });
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: container.name.clone(),
            attempt: parts.restart_count,
        }),
        image: Some(v1::ImageSpec {
            image: parts.image.id.clone(),
            user_specified_image: container.image.clone().unwrap_or_default(),
            ..Default::default()
        }),
        command: parts.command,
        args: parts.args,
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: envs.collect(),
        mounts: parts.mounts,
        devices: Vec::new(),
        labels,
        annotations,
        log_path: format!("{}/{}.log", container.name, parts.restart_count),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        tty: container.tty.unwrap_or(false),
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(v1::LinuxContainerResources {
                cpu_period: parts.resources.cpu_period,
                cpu_quota: parts.resources.cpu_quota,
                cpu_shares: parts.resources.cpu_shares,
                memory_limit_in_bytes: parts.resources.memory_limit,
                oom_score_adj: parts.resources.oom_score_adj,
                ..Default::default()
            }),
            security_context: Some(container_security(
                spec,
                &parts.security,
                &parts.image,
                &parts.seccomp_root,
            )),
        }),
    }
}

fn container_security(
    spec: &PodSpec,
    security: &Security,
    image: &v1::Image,
    seccomp_root: &Path,
) -> v1::LinuxContainerSecurityContext {
    let user = security.run_as_user.or_else(|| image.uid.as_ref().map(|uid| uid.value));
    let seccomp = match &security.seccomp {
        None => Profile::Unconfined,
        Some(Profile::Localhost(file)) => {
            Profile::Localhost(seccomp_root.join(file).to_string_lossy().into_owned())
        }
        Some(other) => other.clone(),
    };
    v1::LinuxContainerSecurityContext {
        capabilities: Some(v1::Capability {
            add_capabilities: security.add_capabilities.clone(),
            drop_capabilities: security.drop_capabilities.clone(),
        }),
        privileged: security.privileged,
        namespace_options: Some(namespaces(spec, v1::NamespaceMode::Container)),
        selinux_options: security.selinux.clone().map(|options| v1::SeLinuxOption {
            user: options.user.unwrap_or_default(),
            role: options.role.unwrap_or_default(),
            r#type: options.type_.unwrap_or_default(),
            level: options.level.unwrap_or_default(),
        }),
        run_as_user: user.map(int64),
        // The runtime refuses a group without a user.
        run_as_group: user.is_some().then_some(security.run_as_group).flatten().map(int64),
        run_as_username: if user.is_none() { image.username.clone() } else { String::new() },
        readonly_rootfs: security.readonly_rootfs,
        supplemental_groups: security.supplemental_groups.clone(),
        no_new_privs: security.no_new_privs,
        masked_paths: security.masked_paths.clone(),
        readonly_paths: security.readonly_paths.clone(),
        seccomp: Some(profile(&seccomp)),
        apparmor: security.apparmor.as_ref().map(profile),
    }
}

fn namespaces(spec: &PodSpec, pid: v1::NamespaceMode) -> v1::NamespaceOption {
    let of = |host: Option<bool>, otherwise: v1::NamespaceMode| {
        if host == Some(true) { v1::NamespaceMode::Node as i32 } else { otherwise as i32 }
    };
    let shared = spec.share_process_namespace == Some(true);
    let pid = if shared { v1::NamespaceMode::Pod } else { pid };
    v1::NamespaceOption {
        network: of(spec.host_network, v1::NamespaceMode::Pod),
        pid: of(spec.host_pid, pid),
        ipc: of(spec.host_ipc, v1::NamespaceMode::Pod),
        target_id: String::new(),
    }
}

fn profile(profile: &Profile) -> v1::SecurityProfile {
    use v1::security_profile::ProfileType;
    let (kind, localhost_ref) = match profile {
        Profile::RuntimeDefault => (ProfileType::RuntimeDefault, String::new()),
        Profile::Unconfined => (ProfileType::Unconfined, String::new()),
        Profile::Localhost(name) => (ProfileType::Localhost, name.clone()),
    };
    v1::SecurityProfile { profile_type: kind as i32, localhost_ref }
}

fn ports(spec: &PodSpec) -> Vec<v1::PortMapping> {
    let all = spec.containers.iter().flat_map(|container| container.ports.iter().flatten());
    all.filter(|port| port.host_port.is_some_and(|port| port > 0))
        .map(|port| v1::PortMapping {
            protocol: match port.protocol.as_deref() {
                Some("UDP") => v1::Protocol::Udp as i32,
                Some("SCTP") => v1::Protocol::Sctp as i32,
                _ => v1::Protocol::Tcp as i32,
            },
            container_port: port.container_port,
            host_port: port.host_port.unwrap_or_default(),
            host_ip: port.host_ip.clone().unwrap_or_default(),
        })
        .collect()
}

fn pod_labels(name: &PodName) -> BTreeMap<String, String> {
    BTreeMap::from([
        (LABEL_POD_NAME.to_owned(), name.name.clone()),
        (LABEL_POD_NAMESPACE.to_owned(), name.namespace.clone()),
        (LABEL_POD_UID.to_owned(), name.uid.clone()),
    ])
}

/// Returns the folder of a pod's logs.
pub(super) fn log_folder(log_root: &Path, name: &PodName) -> PathBuf {
    log_root.join(name.log_folder())
}

/// Returns where in the container its last words are written.
pub(super) fn message_path(container: &Container) -> &str {
    let path = container.termination_message_path.as_deref();
    path.filter(|path| !path.is_empty()).unwrap_or(MESSAGE_PATH_DEFAULT)
}

/// Reads a sandbox's status.
pub(super) fn sandbox_from(status: v1::PodSandboxStatus) -> Sandbox {
    let network = status.network.unwrap_or_default();
    let more = network.additional_ips.into_iter().map(|one| one.ip);
    let ips = std::iter::once(network.ip).chain(more).filter(|ip| !ip.is_empty());
    let options = status.linux.and_then(|linux| linux.namespaces).and_then(|all| all.options);
    Sandbox {
        id: status.id,
        attempt: status.metadata.map_or(0, |metadata| metadata.attempt),
        ready: status.state == v1::PodSandboxState::SandboxReady as i32,
        host_network: options
            .is_some_and(|options| options.network == v1::NamespaceMode::Node as i32),
        ips: ips.collect(),
        created_at: nanos(status.created_at).unwrap_or(Timestamp::UNIX_EPOCH),
    }
}

/// Reads a container's status. `sandbox` is the sandbox it is in, which the status does not tell.
pub(super) fn instance_from(
    status: v1::ContainerStatus,
    sandbox: &str,
    log_folder: &Path,
) -> Instance {
    let state = match v1::ContainerState::try_from(status.state) {
        Ok(v1::ContainerState::ContainerCreated) => State::Created,
        Ok(v1::ContainerState::ContainerRunning) => State::Running,
        Ok(v1::ContainerState::ContainerExited) => State::Exited(Exit {
            code: status.exit_code,
            reason: status.reason.clone(),
            message: last_words(&status, log_folder).unwrap_or_else(|| status.message.clone()),
            finished_at: nanos(status.finished_at)
                .or_else(|| nanos(status.created_at))
                .unwrap_or(Timestamp::UNIX_EPOCH),
        }),
        _ => State::Unknown,
    };
    let metadata = status.metadata.unwrap_or_default();
    let restart_count = status
        .annotations
        .get(ANNOTATION_RESTARTS)
        .and_then(|text| text.parse().ok())
        .unwrap_or(metadata.attempt);
    let spec = status.image.unwrap_or_default();
    let user_image = [spec.user_specified_image, spec.image.clone()]
        .into_iter()
        .find(|image| !image.is_empty() && !image.starts_with("sha256:"));
    Instance {
        id: status.id,
        name: metadata.name,
        sandbox: sandbox.to_owned(),
        restart_count,
        state,
        created_at: nanos(status.created_at).unwrap_or(Timestamp::UNIX_EPOCH),
        started_at: nanos(status.started_at),
        image: spec.image,
        image_id: status.image_ref,
        hash: status.annotations.get(HASH_ANNOTATION).cloned(),
        kubelet_hash: status.annotations.get(ANNOTATION_HASH).cloned(),
        user_image,
    }
}

/// Reads what an ended container left: its message file, else the end of its log if it failed.
fn last_words(status: &v1::ContainerStatus, log_folder: &Path) -> Option<String> {
    let path = status.annotations.get(ANNOTATION_MESSAGE_PATH)?;
    let mount = status.mounts.iter().find(|mount| mount.container_path == *path);
    let text = mount.and_then(|mount| tail(Path::new(&mount.host_path), MESSAGE_BYTES_MAX, false));
    if let Some(text) = text.filter(|text| !text.is_empty()) {
        return Some(text);
    }
    let policy = status.annotations.get(ANNOTATION_MESSAGE_POLICY)?;
    if policy != "FallbackToLogsOnError" || status.exit_code == 0 {
        return None;
    }
    let attempt = status.metadata.as_ref().map_or(0, |metadata| metadata.attempt);
    let name = status.metadata.as_ref().map(|metadata| metadata.name.clone())?;
    let log = tail(&log_folder.join(name).join(format!("{attempt}.log")), 64 << 10, true)?;
    // Each line is "<time> <stream> <tag> <text>".
    let lines: Vec<&str> = log.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
    let text = lines[lines.len().saturating_sub(MESSAGE_LOG_LINES_MAX)..].join("\n");
    let mut start = text.len().saturating_sub(MESSAGE_LOG_BYTES_MAX as usize);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    Some(text[start..].to_owned())
}

/// Reads at most `max` bytes of a file, from its start or its end.
fn tail(path: &Path, max: u64, from_end: bool) -> Option<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = std::fs::File::open(path).ok()?;
    let len = file.metadata().ok()?.len();
    if from_end && len > max {
        file.seek(SeekFrom::Start(len - max)).ok()?;
    }
    let mut bytes = Vec::new();
    file.take(max).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn nanos(nanos: i64) -> Option<Timestamp> {
    if nanos <= 0 {
        return None;
    }
    Timestamp::from_nanosecond(i128::from(nanos)).ok()
}

fn int64(value: i64) -> v1::Int64Value {
    v1::Int64Value { value }
}
