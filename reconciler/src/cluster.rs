//! The Kubernetes API as the reconciler uses it: discovery per kind, server-side apply, guarded deletes.

use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, Preconditions,
    PropagationPolicy,
};
use kube::core::GroupVersionKind;
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use skerry_api::fleet::os::ORDER_ANNOTATION;
use skerry_api::fleet::v1alpha1::{APP_LABEL, MANAGED_BY, MANAGED_BY_LABEL, SITE_LABEL};
use skerry_reconciler_core::{ObjectId, ReleaseKey, has_wishes, keep_wishes};
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

/// Field manager of everything that comes from the repository, and of our own reports.
pub(crate) const MANAGER: &str = "skerry";
/// Field manager of the site label on nodes, which the repository owns only in part.
pub(crate) const NODE_MANAGER: &str = "skerry-nodes";

/// An API server that does not answer a request in this time counts as unreachable.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a Device is applied while others change it at the same time.
const WISHES_TRIES: u32 = 5;

/// Why the API did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ClusterError {
    /// The API understood and refuses; the same request will not do.
    #[error("{message}")]
    Rejected { reason: String, message: String },
    /// The API does not serve this kind.
    #[error("the API does not know {kind} in `{api_version}`")]
    UnknownKind { api_version: String, kind: String },
    /// The kind has no namespace, so no site can own it.
    #[error("{kind} belongs to no namespace, and an app of a site cannot have it")]
    ClusterScoped { kind: String },
    /// The same request may succeed later.
    #[error("the API cannot be reached: {0}")]
    Unreachable(String),
}

impl ClusterError {
    /// One word for a condition.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Rejected { .. } => "Rejected",
            Self::UnknownKind { .. } => "UnknownKind",
            Self::ClusterScoped { .. } => "ClusterScoped",
            Self::Unreachable(_) => "Unreachable",
        }
    }

    fn reason_of_api(&self) -> Option<&str> {
        match self {
            Self::Rejected { reason, .. } => Some(reason),
            _ => None,
        }
    }

    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Rejected { reason, .. } if reason == "NotFound")
    }
}

impl From<kube::Error> for ClusterError {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status)
                if (400..500).contains(&status.code) && !matches!(status.code, 408 | 429) =>
            {
                let message = if status.message.is_empty() {
                    status.reason.clone()
                } else {
                    status.message.clone()
                };
                let message = unknown_fields(&message).unwrap_or(message);
                Self::Rejected { reason: status.reason.clone(), message }
            }
            other => Self::Unreachable(crate::git::chain(&other)),
        }
    }
}

/// Says in our words that fields are misspelt; `None` if `message` is about something else.
///
/// Source: kubernetes-sigs/structured-merge-diff, typed/validate.go; every server answers an apply with it.
fn unknown_fields(message: &str) -> Option<String> {
    if !message.starts_with("failed to create typed patch object") {
        return None;
    }
    let faults = message.split('\n').map(|line| {
        let line = line.strip_suffix(": field not declared in schema")?;
        let path = line.rsplit_once(' ').map_or(line, |(_, path)| path);
        Some(format!("unknown field `{}`", path.trim_start_matches('.')))
    });
    // With more than one fault, the first line only announces them.
    let faults: Vec<String> = faults.flatten().collect();
    (!faults.is_empty()).then(|| faults.join(", "))
}

/// What a delete found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pruned {
    /// Deleted.
    Deleted,
    /// Was not there any more.
    Gone,
    /// Carries other labels by now and was left alone.
    NotOurs,
}

/// A client with a memory for kinds.
pub(crate) struct Cluster {
    pub(crate) client: Client,
    kinds: Mutex<HashMap<(String, String), (ApiResource, bool)>>,
}

impl Cluster {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, kinds: Mutex::default() }
    }

    /// How the API names a kind, and whether it has namespaces. What is unknown is asked again each time, because a
    /// definition may have been installed since.
    pub(crate) async fn resolve(
        &self,
        api_version: &str,
        kind: &str,
    ) -> Result<(ApiResource, bool), ClusterError> {
        let key = (api_version.to_owned(), kind.to_owned());
        if let Some(known) = self.kinds.lock().expect("no panic while it is held").get(&key) {
            return Ok(known.clone());
        }
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let gvk = GroupVersionKind::gvk(group, version, kind);
        let unknown = || ClusterError::UnknownKind {
            api_version: api_version.to_owned(),
            kind: kind.to_owned(),
        };
        let found = within(kube::discovery::pinned_kind(&self.client, &gvk)).await;
        let (resource, capabilities) = match found {
            Ok(found) => found,
            Err(ClusterError::Rejected { reason, .. }) if reason == "NotFound" => {
                return Err(unknown());
            }
            // kube reports a kind that is not in its group version as a discovery error of its own.
            Err(ClusterError::Unreachable(text))
                if text.contains("GVK") || text.contains("GroupVersion") =>
            {
                return Err(unknown());
            }
            Err(error) => return Err(error),
        };
        let namespaced = capabilities.scope == kube::discovery::Scope::Namespaced;
        let known = (resource, namespaced);
        self.kinds.lock().expect("no panic while it is held").insert(key, known.clone());
        Ok(known)
    }

    async fn api(
        &self,
        api_version: &str,
        id: &ObjectId,
    ) -> Result<Api<DynamicObject>, ClusterError> {
        let (resource, namespaced) = self.resolve(api_version, &id.kind).await?;
        match (namespaced, id.namespace.as_str()) {
            (true, namespace) => {
                Ok(Api::namespaced_with(self.client.clone(), namespace, &resource))
            }
            (false, "") => Ok(Api::all_with(self.client.clone(), &resource)),
            (false, _) => Err(ClusterError::ClusterScoped { kind: id.kind.clone() }),
        }
    }

    /// Server-side apply, forced: the repository is the owner of what it says. Of a Device, what somebody else desires
    /// of its properties is kept.
    pub(crate) async fn apply(
        &self,
        id: &ObjectId,
        value: &Value,
        dry_run: bool,
    ) -> Result<DynamicObject, ClusterError> {
        if !has_wishes(id) {
            return self.apply_as_it_is(id, value, dry_run).await;
        }
        let api_version = value["apiVersion"].as_str().unwrap_or_default();
        let mut tries = WISHES_TRIES;
        loop {
            let mut kept = value.clone();
            if let Some(live) = self.get(api_version, id).await? {
                // With the version, a wish that comes between the look and the apply is not lost.
                kept["metadata"]["resourceVersion"] = json!(live.resource_version());
                keep_wishes(&mut kept, &live.data);
            }
            tries -= 1;
            match self.apply_as_it_is(id, &kept, dry_run).await {
                Err(error) if error.reason_of_api() == Some("Conflict") && tries > 0 => {}
                result => return result,
            }
        }
    }

    async fn apply_as_it_is(
        &self,
        id: &ObjectId,
        value: &Value,
        dry_run: bool,
    ) -> Result<DynamicObject, ClusterError> {
        let api_version = value["apiVersion"].as_str().unwrap_or_default();
        let api = self.api(api_version, id).await?;
        let params = PatchParams { dry_run, ..PatchParams::apply(MANAGER).force() };
        let result = within(api.patch(&id.name, &params, &Patch::Apply(value))).await;
        if result.as_ref().is_err_and(ClusterError::is_not_found) {
            // The kind may be served elsewhere by now, or not at all.
            self.kinds
                .lock()
                .expect("no panic while it is held")
                .remove(&(api_version.to_owned(), id.kind.clone()));
        }
        result
    }

    /// Server-side apply to the status subresource.
    pub(crate) async fn apply_status(
        &self,
        id: &ObjectId,
        value: &Value,
    ) -> Result<DynamicObject, ClusterError> {
        let api = self.api(value["apiVersion"].as_str().unwrap_or_default(), id).await?;
        let params = PatchParams::apply(MANAGER).force();
        within(api.patch_status(&id.name, &params, &Patch::Apply(value))).await
    }

    /// The live object, if it is there.
    pub(crate) async fn get(
        &self,
        api_version: &str,
        id: &ObjectId,
    ) -> Result<Option<DynamicObject>, ClusterError> {
        let api = self.api(api_version, id).await?;
        within(api.get_opt(&id.name)).await
    }

    /// Deletes an object if it still carries the labels of `release`, with everything it owns.
    pub(crate) async fn prune(
        &self,
        id: &ObjectId,
        api_version: &str,
        release: &ReleaseKey,
    ) -> Result<Pruned, ClusterError> {
        let live = match self.get(api_version, id).await {
            Ok(Some(live)) => live,
            // A kind that is not served any more has taken its objects along.
            Ok(None) | Err(ClusterError::UnknownKind { .. }) => return Ok(Pruned::Gone),
            Err(error) => return Err(error),
        };
        let labels = live.labels();
        let ours = labels.get(SITE_LABEL) == Some(&release.site)
            && labels.get(APP_LABEL) == Some(&release.app)
            && labels.get(MANAGED_BY_LABEL).is_some_and(|by| by == MANAGED_BY);
        if !ours {
            return Ok(Pruned::NotOurs);
        }
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Background),
            // Another object of that name, made in between, is not what we looked at.
            preconditions: Some(Preconditions { uid: live.uid(), resource_version: None }),
            ..DeleteParams::default()
        };
        self.delete(api_version, id, &params).await
    }

    /// Deletes an object that is ours as a whole (a Release, a Site, a site's namespace).
    pub(crate) async fn delete(
        &self,
        api_version: &str,
        id: &ObjectId,
        params: &DeleteParams,
    ) -> Result<Pruned, ClusterError> {
        let api = self.api(api_version, id).await?;
        match within(api.delete(&id.name, params)).await {
            Ok(_) => Ok(Pruned::Deleted),
            Err(error) if error.is_not_found() => Ok(Pruned::Gone),
            Err(error) => Err(error),
        }
    }

    /// Changes the marks of a node that exists. A merge patch, because an apply would create the node.
    pub(crate) async fn mark_node(&self, node: &str, marks: &Marks) -> Result<(), ClusterError> {
        let api: Api<k8s_openapi::api::core::v1::Node> = Api::all(self.client.clone());
        let mut metadata = json!({});
        if let Some(site) = &marks.site {
            metadata["labels"] = json!({SITE_LABEL: site});
        }
        if let Some(os) = &marks.os {
            metadata["annotations"] = json!({ORDER_ANNOTATION: os});
        }
        let patch = json!({"metadata": metadata});
        let params =
            PatchParams { field_manager: Some(NODE_MANAGER.to_owned()), ..PatchParams::default() };
        within(api.patch_metadata(node, &params, &Patch::Merge(patch))).await.map(drop)
    }

    /// A namespace with our labels.
    pub(crate) async fn ensure_namespace(
        &self,
        name: &str,
        site: Option<&str>,
    ) -> Result<(), ClusterError> {
        let mut labels = json!({MANAGED_BY_LABEL: MANAGED_BY});
        if let Some(site) = site {
            labels[SITE_LABEL] = Value::from(site);
        }
        let value = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
        self.apply(&ObjectId::new("v1", "Namespace", "", name), &value, false).await.map(drop)
    }
}

/// What changes at a node; the outer `None` leaves a mark as it is, the inner one takes it away.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Marks {
    /// The label of its site.
    pub(crate) site: Option<Option<String>>,
    /// The annotation with the OS that it should run.
    pub(crate) os: Option<Option<String>>,
}

/// Bounds a request in time.
pub(crate) async fn within<T>(
    request: impl Future<Output = kube::Result<T>>,
) -> Result<T, ClusterError> {
    match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
        Ok(result) => result.map_err(ClusterError::from),
        Err(_) => {
            Err(ClusterError::Unreachable(format!("no answer in {} s", REQUEST_TIMEOUT.as_secs())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_fields_are_told_in_plain_words() {
        let check = |message: &str, expected: Option<&str>| {
            assert_eq!(unknown_fields(message).as_deref(), expected, "{message}");
        };
        check(
            "failed to create typed patch object (site-a/web; apps/v1, Kind=Deployment): .spec.replics: field not declared in schema",
            Some("unknown field `spec.replics`"),
        );
        check(
            "failed to create typed patch object (a/b; v1, Kind=Pod): errors:\n  .spec.containers[name=\"x\"].imag: field not declared in schema\n  .spec.nods: field not declared in schema",
            Some("unknown field `spec.containers[name=\"x\"].imag`, unknown field `spec.nods`"),
        );
        check(
            "failed to create typed patch object (a/b; v1, Kind=Pod): .spec.x: expected map",
            None,
        );
        check("Deployment.apps \"web\" is invalid", None);
    }
}
