//! What the pod engine decides, without doing any of it.
//!
//! [`plan`] says what to do next for one pod, [`status`] what its status is; the other modules
//! prepare what the runtime is told (environment, volumes, security, resources, names, DNS) and
//! read what users wrote (quantities, image names, probes). The caller is `skerry_edge`'s engine;
//! a seeded simulation over a model of the runtime is the other one.
//!
//! No I/O and no clock: time comes in as an argument. Behaviour is kubelet's as users see it.
//! Source: kubernetes/kubernetes pkg/kubelet.

pub mod backoff;
pub mod dns;
pub mod env;
pub mod image;
pub mod kubelet;
pub mod linux;
pub mod plan;
pub mod probe;
pub mod quantity;
pub mod runtime;
pub mod status;
pub mod volumes;

#[cfg(test)]
mod simulation;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

/// Annotation that holds [`definition_hash`] of the container it is on.
///
/// Beside kubelet's own ([`kubelet::ANNOTATION_HASH`]), whose formula changed between its versions.
pub const HASH_ANNOTATION: &str = "skerry.dev/container-hash";

/// When a pod's containers are started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

/// Returns the pod's restart policy; what is not known counts as the default, `Always`.
pub fn restart_policy(spec: &PodSpec) -> RestartPolicy {
    match spec.restart_policy.as_deref() {
        Some("Never") => RestartPolicy::Never,
        Some("OnFailure") => RestartPolicy::OnFailure,
        _ => RestartPolicy::Always,
    }
}

/// Whether an init container is a sidecar: started in order, then kept running.
pub fn is_sidecar(init_container: &Container) -> bool {
    init_container.restart_policy.as_deref() == Some("Always")
}

/// Whether the pod lives in the node's network.
pub fn host_network(spec: &PodSpec) -> bool {
    spec.host_network.unwrap_or(false)
}

/// Returns the pod's init containers, in order.
pub fn init_containers(spec: &PodSpec) -> &[Container] {
    spec.init_containers.as_deref().unwrap_or_default()
}

/// Returns the init container or container called `name`, and whether it is an init container.
pub fn find_container<'a>(spec: &'a PodSpec, name: &str) -> Option<(&'a Container, bool)> {
    let init = init_containers(spec).iter().map(|container| (container, true));
    let regular = spec.containers.iter().map(|container| (container, false));
    init.chain(regular).find(|(container, _)| container.name == name)
}

/// Returns a hash of what makes a running container outdated: its name and image.
///
/// All other fields of a running pod's containers are immutable or applied in place.
pub fn definition_hash(container: &Container) -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    hash.update(container.name.as_bytes());
    hash.update([0]);
    hash.update(container.image.as_deref().unwrap_or_default().as_bytes());
    hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A pod's names, which every message about it needs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

impl PodName {
    /// Reads the names; `None` if the object lacks one, which no pod from an API does.
    pub fn of(pod: &Pod) -> Option<Self> {
        let meta = &pod.metadata;
        Some(Self {
            namespace: meta.namespace.clone()?,
            name: meta.name.clone()?,
            uid: meta.uid.clone()?,
        })
    }

    /// Returns the name as kubelet prints it in messages.
    pub fn full(&self) -> String {
        format!("{}_{}({})", self.name, self.namespace, self.uid)
    }

    /// Returns the name of the pod's log folder.
    pub fn log_folder(&self) -> String {
        format!("{}_{}_{}", self.namespace, self.name, self.uid)
    }
}

/// Returns how long the pod may take to stop: what the delete said, else what the pod says.
pub fn grace_seconds(pod: &Pod) -> i64 {
    let from_spec = || pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    let from_delete = pod
        .metadata
        .deletion_grace_period_seconds
        .filter(|_| pod.metadata.deletion_timestamp.is_some());
    from_delete.or_else(from_spec).unwrap_or(30).max(0)
}
