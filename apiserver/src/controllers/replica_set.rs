//! Keeps the pods of ReplicaSets.
//!
//! Reads ReplicaSets and their pods; writes pods (create, delete, owner references) and the ReplicaSet's status.

use super::cache::{Caches, Change, Key, Kind};
use super::cluster::{Cluster, ClusterError, PODS, REPLICA_SETS, Resource};
use super::events::{Recorder, Weight};
use super::{Controller, REQUESTS_MAX, World, together};
use jiff::Timestamp;
use serde_json::{Value, json};
use skerry_apiserver_core::selector::LabelSelector;
use skerry_apiserver_core::workloads::object::{
    controller_of, is_controlled_by, labels, list, name, namespace, owner_reference,
    pod_from_template, selector_query, text, uid, until,
};
use skerry_apiserver_core::workloads::replica_set;
use std::time::Duration;

pub(super) struct ReplicaSets {
    world: World,
}

impl ReplicaSets {
    pub(super) fn new(world: &World) -> Self {
        let mut world = world.clone();
        world.recorder = world.recorder.with_component("replicaset-controller");
        Self { world }
    }
}

impl Controller for ReplicaSets {
    const NAME: &'static str = "replicaset";
    const WORKERS: usize = 4;
    const KIND: Option<Kind> = Some(Kind::ReplicaSet);

    fn keys(&self, change: &Change<'_>) -> Vec<Key> {
        match change.kind {
            Kind::ReplicaSet => change.new.map(Key::of).into_iter().collect(),
            Kind::Pod => owners(&self.world.caches, change, Kind::ReplicaSet),
            _ => Vec::new(),
        }
    }

    async fn sync(&self, key: &Key) -> Result<Option<Duration>, ClusterError> {
        let World { cluster, caches, recorder, .. } = &self.world;
        let Some(set) = cluster.get(&REPLICA_SETS, &key.namespace, &key.name).await? else {
            return Ok(None);
        };
        let (selector, query) = selector(&set)?;
        let mut pods = cluster.list(&PODS, &key.namespace, &query).await?;
        pods.extend(strays(caches, &set, &pods));
        let now = Timestamp::now();
        let plan = replica_set::plan(&set, &selector, &pods, now);

        release(cluster, &PODS, &set, &plan.release).await?;
        adopt(cluster, &PODS, &set, &REPLICA_SETS, &plan.adopt).await?;
        let gone: Vec<String> = plan.delete.iter().map(|pod| uid(pod).to_owned()).collect();
        let deleted = delete_pods(cluster, recorder, &REPLICA_SETS, &set, &plan.delete).await;
        let template = set.pointer("/spec/template").cloned().unwrap_or_default();
        let pod = pod_from_template(&set, "apps/v1", "ReplicaSet", &template);
        let wanted = vec![pod; plan.create];
        let (created, made) = create_pods(cluster, recorder, &REPLICA_SETS, &set, wanted).await;

        let failure = match (&made, &deleted) {
            (Err(error), _) => Some(("FailedCreate", error.text())),
            (_, Err(error)) => Some(("FailedDelete", error.text())),
            _ => None,
        };
        let adopted: Vec<String> = plan.adopt.iter().map(|pod| uid(pod).to_owned()).collect();
        let counted = pods
            .iter()
            .filter(|pod| is_controlled_by(pod, &set) || adopted.iter().any(|id| id == uid(pod)))
            .filter(|pod| selector.matches(labels(pod)))
            .filter(|pod| deleted.is_err() || !gone.iter().any(|id| id == uid(pod)))
            .chain(&created);
        let failure_text = failure.as_ref().map(|(reason, message)| (*reason, message.as_str()));
        let (status, next) = replica_set::status(&set, counted, failure_text, now);
        if set.get("status") != Some(&status) {
            let mut set = set.clone();
            set["status"] = status;
            cluster.replace_status(&REPLICA_SETS, &set).await?;
        }
        deleted?;
        forgive_namespace(made)?;
        Ok(next.map(|at| until(now, at)))
    }
}

/// The selector of an object, parsed and as a query.
pub(super) fn selector(object: &Value) -> Result<(LabelSelector, String), ClusterError> {
    let written = object.pointer("/spec/selector").unwrap_or(&Value::Null);
    let parsed = LabelSelector::from_object(written).ok().filter(|parsed| !parsed.is_empty());
    match (parsed, selector_query(written)) {
        (Some(parsed), Some(query)) => Ok((parsed, query)),
        // An empty selector would take everything in the namespace.
        _ => Err(ClusterError::Selector { name: Key::of(object).to_string() }),
    }
}

/// The keys of those that a changed pod belongs to, or could belong to if nobody controls it.
pub(super) fn owners(caches: &Caches, change: &Change<'_>, kind: Kind) -> Vec<Key> {
    let mut keys = Vec::new();
    for state in change.states() {
        match controller_of(state) {
            Some(owner) if text(owner, "/kind") == kind.resource().kind => {
                let key = Key::new(namespace(state), text(owner, "/name"));
                if !keys.contains(&key) {
                    keys.push(key);
                }
            }
            Some(_) => {}
            None => {
                for candidate in caches.within(kind, namespace(state)) {
                    if selector(&candidate).is_ok_and(|(s, _)| s.matches(labels(state))) {
                        keys.push(Key::of(&candidate));
                    }
                }
            }
        }
    }
    keys
}

/// Pods that `owner` controls although a list by its selector did not bring them.
pub(super) fn strays(caches: &Caches, owner: &Value, listed: &[Value]) -> Vec<Value> {
    caches
        .within(Kind::Pod, namespace(owner))
        .into_iter()
        .filter(|pod| is_controlled_by(pod, owner))
        .filter(|pod| !listed.iter().any(|other| uid(other) == uid(pod)))
        // The cache may be behind: a pod whose labels still match is merely gone.
        .filter(|pod| selector(owner).is_ok_and(|(selector, _)| !selector.matches(labels(pod))))
        .map(|pod| (*pod).clone())
        .collect()
}

/// Makes `owner` the controller of objects without one.
pub(super) async fn adopt(
    cluster: &Cluster,
    resource: &Resource,
    owner: &Value,
    owner_resource: &Resource,
    objects: &[&Value],
) -> Result<(), ClusterError> {
    for object in objects {
        let mut owners = list(object, "/metadata/ownerReferences").to_vec();
        owners.push(owner_reference(owner, &owner_resource.api_version(), owner_resource.kind));
        let patch = json!({"metadata": {"ownerReferences": owners}});
        cluster.merge(resource, object, "", patch).await?;
    }
    Ok(())
}

/// Lets objects go that `owner` controlled.
pub(super) async fn release(
    cluster: &Cluster,
    resource: &Resource,
    owner: &Value,
    objects: &[&Value],
) -> Result<(), ClusterError> {
    for object in objects {
        let owners: Vec<&Value> = list(object, "/metadata/ownerReferences")
            .iter()
            .filter(|reference| text(reference, "/uid") != uid(owner))
            .collect();
        let patch = json!({"metadata": {"ownerReferences": owners}});
        match cluster.merge(resource, object, "", patch).await {
            Err(error) if error.is_not_found() => {}
            other => drop(other?),
        }
    }
    Ok(())
}

/// Creates pods, and says so in events about `owner`. Returns those that were made, and the first failure.
pub(super) async fn create_pods(
    cluster: &Cluster,
    recorder: &Recorder,
    resource: &Resource,
    owner: &Value,
    pods: Vec<Value>,
) -> (Vec<Value>, Result<(), ClusterError>) {
    let mut made = Vec::with_capacity(pods.len());
    let mut failure = Ok(());
    let mut rest = pods.into_iter();
    // In growing batches: if pods are refused, a thousand of them are not asked for.
    let mut batch = REQUESTS_MAX;
    loop {
        let now: Vec<Value> = rest.by_ref().take(batch).collect();
        if now.is_empty() || failure.is_err() {
            return (made, failure);
        }
        batch *= 2;
        let requests = now.iter().map(|pod| cluster.create(&PODS, pod)).collect();
        for answer in together(requests).await {
            match answer {
                Ok(pod) => {
                    let message = format!("Created pod: {}", name(&pod));
                    recorder.record(resource, owner, Weight::Normal, "SuccessfulCreate", message);
                    made.push(pod);
                }
                Err(error) => {
                    if failure.is_ok() && !error.is_namespace_gone() {
                        let message = format!("Error creating: {}", error.text());
                        recorder.record(resource, owner, Weight::Warning, "FailedCreate", message);
                    }
                    failure = Err(error);
                }
            }
        }
    }
}

/// Deletes pods, and says so in events about `owner`.
pub(super) async fn delete_pods(
    cluster: &Cluster,
    recorder: &Recorder,
    resource: &Resource,
    owner: &Value,
    pods: &[&Value],
) -> Result<(), ClusterError> {
    let delete =
        async |pod: &Value| cluster.delete(&PODS, pod, None).await.map(|()| name(pod).to_owned());
    let mut failure = Ok(());
    for answer in together(pods.iter().map(|pod| delete(pod)).collect()).await {
        match answer {
            Ok(pod) => {
                let message = format!("Deleted pod: {pod}");
                recorder.record(resource, owner, Weight::Normal, "SuccessfulDelete", message);
            }
            Err(error) => {
                let message = format!("Error deleting: {}", error.text());
                recorder.record(resource, owner, Weight::Warning, "FailedDelete", message);
                failure = Err(error);
            }
        }
    }
    failure
}

/// A namespace that goes takes its workloads along; that is no failure.
pub(super) fn forgive_namespace(result: Result<(), ClusterError>) -> Result<(), ClusterError> {
    match result {
        Err(error) if error.is_namespace_gone() => Ok(()),
        other => other,
    }
}
