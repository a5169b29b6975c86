//! What the engine would do about the containers of a pod, without doing it: for a node that changes hands.
//!
//! The decision is the worker's own ([`skerry_edge_core::pods::plan`]) over what the runtime says now. Nothing is
//! changed.

use std::collections::HashSet;
use std::path::Path;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use skerry_edge_core::pods::plan::{Facts, Step, plan};
use skerry_edge_core::pods::runtime::{Instance, PodRuntime};
use skerry_edge_core::pods::{PodName, definition_hash, find_container, kubelet};

use super::container;
use super::worker::LABEL_POD_UID;
use crate::cri::{CriError, Runtime};

/// A running container, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preview {
    /// Name in the pod.
    pub container: String,
    /// Id in the runtime.
    pub id: String,
    /// Number of the instance.
    pub restart_count: u32,
    /// Why this engine would stop it; absent when it goes on.
    pub stopped_by_us: Option<String>,
    /// Why kubelet would stop it; absent when it goes on.
    pub stopped_by_kubelet: Option<String>,
    /// [`definition_hash`] to remember it by, when its own marks are those of an older kubelet.
    pub remember: Option<String>,
}

/// Looks at the running containers of `pod`.
///
/// # Errors
///
/// [`CriError`] when the runtime does not answer.
pub async fn preview(
    runtime: &Runtime,
    log_root: &Path,
    pod: &Pod,
) -> Result<Vec<Preview>, CriError> {
    let (Some(spec), Some(name)) = (&pod.spec, PodName::of(pod)) else { return Ok(Vec::new()) };
    let label = [(LABEL_POD_UID, name.uid.as_str())];
    let mut found = PodRuntime::default();
    for sandbox in runtime.list_sandboxes(&label).await? {
        let status = runtime.sandbox_status(&sandbox.id).await?;
        found.sandboxes.extend(status.map(container::sandbox_from));
    }
    let folder = container::log_folder(log_root, &name);
    let mut facts = Facts::default();
    for one in runtime.list_containers(&label).await? {
        let Some(status) = runtime.container_status(&one.id).await? else { continue };
        let used = [one.image_ref.clone(), status.image_ref.clone()];
        let instance = container::instance_from(status, &one.pod_sandbox_id, &folder);
        let wanted = find_container(spec, &instance.name).map(|(container, _)| container);
        if let Some(wanted) = wanted
            && instance.hash.is_none()
            && instance.kubelet_hash.as_deref() != Some(&kubelet::definition_hash(wanted))
        {
            // Marked by an older kubelet. An image may have several names, so the name alone proves nothing.
            let image = wanted.image.as_deref().unwrap_or_default();
            let same_image = runtime.image_status(image).await?.is_some_and(|image| {
                let names: HashSet<&String> =
                    image.repo_digests.iter().chain([&image.id]).collect();
                used.iter().any(|used| names.contains(used))
            });
            if same_image {
                facts.taken_over.insert(instance.id.clone(), definition_hash(wanted));
            }
        }
        found.containers.push(instance);
    }

    let steps = plan(pod, &found, &facts, Timestamp::now()).steps;
    let whole_pod = steps.iter().any(|step| matches!(step, Step::KillPod { .. }));
    let stopped_by_us = |one: &Instance| {
        let killed = steps.iter().find_map(|step| match step {
            Step::Kill { id, message, .. } if *id == one.id => Some(message.clone()),
            _ => None,
        });
        killed.or_else(|| whole_pod.then(|| "the pod's sandbox is not usable any more".to_owned()))
    };
    let stopped_by_kubelet = |one: &Instance| {
        if whole_pod {
            return Some("the pod's sandbox is not usable any more".to_owned());
        }
        let (wanted, _) = find_container(spec, &one.name)?;
        match &one.kubelet_hash {
            None => Some("it was made without the marks that kubelet looks for".to_owned()),
            // Made by a kubelet: that one knows its own marks.
            Some(_) if one.hash.is_none() => stopped_by_us(one),
            Some(hash) if *hash != kubelet::definition_hash(wanted) => {
                Some("its definition has changed".to_owned())
            }
            Some(_) => None,
        }
    };
    Ok(found
        .containers
        .iter()
        .filter(|one| one.is_running())
        .map(|one| Preview {
            container: one.name.clone(),
            id: one.id.clone(),
            restart_count: one.restart_count,
            stopped_by_us: stopped_by_us(one),
            stopped_by_kubelet: stopped_by_kubelet(one),
            remember: facts.taken_over.get(&one.id).cloned(),
        })
        .collect())
}

/// Returns `namespace/name` of pods that run here and came from a file or an address, not from the cluster.
///
/// # Errors
///
/// [`CriError`] when the runtime does not answer.
pub async fn static_pods(runtime: &Runtime) -> Result<Vec<String>, CriError> {
    let sandboxes = runtime.list_sandboxes(&[]).await?;
    let found = sandboxes.into_iter().filter(|sandbox| kubelet::is_static(&sandbox.annotations));
    let mut names: Vec<String> = found
        .filter_map(|sandbox| sandbox.metadata)
        .map(|metadata| format!("{}/{}", metadata.namespace, metadata.name))
        .collect();
    names.sort();
    names.dedup();
    Ok(names)
}
