//! What a push would change, asked of the API itself: every object of a render as a server-side dry run, compared with
//! what is live; and what would be pruned.

use crate::cluster::{Cluster, ClusterError, within};
use kube::Client;
use kube::api::{Api, DynamicObject, ListParams};
use serde::Serialize;
use serde_json::Value;
use skerry_api::fleet::v1alpha1::Release;
use skerry_reconciler_core::{Inventory, ReleaseKey, Rendered, Step, plan, plan_removals};
use std::collections::BTreeMap;

/// One object that a push would change.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    /// Site.
    pub site: String,
    /// App.
    pub app: String,
    /// What would happen.
    pub action: Action,
    /// `apiVersion` of the object.
    pub api_version: String,
    /// Kind of the object.
    pub kind: String,
    /// Namespace of the object.
    pub namespace: String,
    /// Name of the object.
    pub name: String,
    /// File it comes from; empty for a prune.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub file: String,
    /// Fields that would change: `spec.replicas: 1 -> 2`. Content of Secrets is not shown.
    pub fields: Vec<String>,
    /// Why the API refuses it, for [`Action::Rejected`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What a push would do to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Make it.
    Create,
    /// Change it.
    Update,
    /// Delete it.
    Prune,
    /// The API would refuse it.
    Rejected,
}

/// Why no comparison could be made.
#[derive(Debug, thiserror::Error)]
#[error("the cluster could not be asked: {0}")]
pub struct DiffError(String);

impl DiffError {
    /// What to do about it, shown after the error as `hint: …`.
    pub fn hint(&self) -> String {
        "check the kubeconfig and that the API is up".to_owned()
    }
}

impl From<ClusterError> for DiffError {
    fn from(error: ClusterError) -> Self {
        Self(error.to_string())
    }
}

/// Compares a render with a cluster. Broken releases are left out: they change nothing, as with a push.
///
/// # Errors
///
/// [`DiffError`] if the API cannot be reached or refuses to be read.
pub async fn diff(client: Client, rendered: &Rendered) -> Result<Vec<Change>, DiffError> {
    let cluster = Cluster::new(client.clone());
    let mut existing: BTreeMap<ReleaseKey, Inventory> = BTreeMap::new();
    match within(Api::<Release>::all(client).list(&ListParams::default())).await {
        Ok(releases) => {
            for release in releases {
                let key = ReleaseKey { site: release.spec.site, app: release.spec.app };
                let entries = release.status.map(|status| status.inventory).unwrap_or_default();
                if let Ok(inventory) = Inventory::from_entries(&entries) {
                    existing.insert(key, inventory);
                }
            }
        }
        // A cluster that never saw a fleet.
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error.into()),
    }

    let mut changes = Vec::new();
    for (key, outcome) in &rendered.releases {
        let Ok(render) = outcome else { continue };
        let first = changes.len();
        for (id, object) in render.objects() {
            let api_version = object.value["apiVersion"].as_str().unwrap_or_default();
            let change = |action, fields: Vec<String>, message: Option<String>| Change {
                site: key.site.clone(),
                app: key.app.clone(),
                action,
                api_version: api_version.to_owned(),
                kind: id.kind.clone(),
                namespace: id.namespace.clone(),
                name: id.name.clone(),
                file: format!("{}:{}", object.file, object.line),
                fields,
                message,
            };
            let live = match cluster.get(api_version, id).await {
                Ok(live) => live,
                Err(
                    error @ (ClusterError::UnknownKind { .. } | ClusterError::ClusterScoped { .. }),
                ) => {
                    changes.push(change(Action::Rejected, Vec::new(), Some(error.to_string())));
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let after = match cluster.apply(id, &object.value, true).await {
                Ok(after) => after,
                // The site's namespace is made before anything is put into it; until then the API cannot try.
                Err(error) if error.is_not_found() && live.is_none() => {
                    changes.push(change(Action::Create, Vec::new(), None));
                    continue;
                }
                Err(error @ ClusterError::Unreachable(_)) => return Err(error.into()),
                Err(error) => {
                    changes.push(change(Action::Rejected, Vec::new(), Some(error.to_string())));
                    continue;
                }
            };
            match live {
                None => changes.push(change(Action::Create, Vec::new(), None)),
                Some(live) => {
                    let fields = changed_fields(&live, &after, id.kind == "Secret");
                    if !fields.is_empty() {
                        changes.push(change(Action::Update, fields, None));
                    }
                }
            }
        }
        // A release of which one object is refused is not applied, and then nothing of it is pruned.
        let refused = changes[first..].iter().any(|change| change.action == Action::Rejected);
        if rendered.prune
            && !refused
            && let Some(inventory) = existing.get(key)
        {
            let steps = plan(render, inventory, &rendered.claimed(key));
            changes.extend(steps.iter().filter_map(|step| prune(key, step)));
        }
    }
    if let Some(roster) = rendered.roster.as_ref().filter(|_| rendered.prune) {
        for removal in plan_removals(roster, rendered, &existing) {
            changes.extend(removal.steps.iter().filter_map(|step| prune(&removal.release, step)));
        }
    }
    Ok(changes)
}

fn prune(key: &ReleaseKey, step: &Step) -> Option<Change> {
    let Step::Prune { id, api_version } = step else { return None };
    Some(Change {
        site: key.site.clone(),
        app: key.app.clone(),
        action: Action::Prune,
        api_version: api_version.clone(),
        kind: id.kind.clone(),
        namespace: id.namespace.clone(),
        name: id.name.clone(),
        file: String::new(),
        fields: Vec::new(),
        message: None,
    })
}

fn changed_fields(live: &DynamicObject, after: &DynamicObject, secret: bool) -> Vec<String> {
    let plain = |object: &DynamicObject| {
        let mut value = serde_json::to_value(object).unwrap_or_default();
        if let Some(fields) = value.as_object_mut() {
            fields.remove("status");
        }
        if let Some(metadata) = value["metadata"].as_object_mut() {
            for field in
                ["managedFields", "resourceVersion", "generation", "creationTimestamp", "uid"]
            {
                metadata.remove(field);
            }
        }
        value
    };
    let mut fields = Vec::new();
    compare(&mut String::new(), &plain(live), &plain(after), secret, &mut fields);
    fields
}

fn compare(path: &mut String, live: &Value, after: &Value, secret: bool, fields: &mut Vec<String>) {
    if live == after {
        return;
    }
    let mut step = |path: &mut String, name: &str, live: &Value, after: &Value| {
        let length = path.len();
        if !path.is_empty() && !name.starts_with('[') {
            path.push('.');
        }
        path.push_str(name);
        compare(path, live, after, secret, fields);
        path.truncate(length);
    };
    match (live, after) {
        (Value::Object(left), Value::Object(right)) => {
            let mut names: Vec<_> = left.keys().chain(right.keys()).collect();
            names.sort();
            names.dedup();
            for name in names {
                step(
                    path,
                    name,
                    left.get(name).unwrap_or(&Value::Null),
                    right.get(name).unwrap_or(&Value::Null),
                );
            }
        }
        (Value::Array(left), Value::Array(right)) if left.len() == right.len() => {
            for (index, (left, right)) in left.iter().zip(right).enumerate() {
                step(path, &format!("[{index}]"), left, right);
            }
        }
        _ if secret && (path.starts_with("data") || path.starts_with("stringData")) => {
            fields.push(format!("{path}: (not shown)"));
        }
        _ => fields.push(format!("{path}: {} -> {}", words(live), words(after))),
    }
}

fn words(value: &Value) -> String {
    match value {
        Value::Null => "(none)".to_owned(),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn changed_fields_are_named_by_path_and_secrets_stay_secret() {
        let object = |value: Value| serde_json::from_value::<DynamicObject>(value).unwrap();
        let live = object(json!({
            "metadata": {"name": "x", "resourceVersion": "1"},
            "spec": {"replicas": 1, "containers": [{"image": "a"}], "same": true},
            "data": {"password": "old"},
            "status": {"x": 1},
        }));
        let after = object(json!({
            "metadata": {"name": "x", "resourceVersion": "2", "labels": {"a": "b"}},
            "spec": {"replicas": 2, "containers": [{"image": "b"}], "same": true},
            "data": {"password": "new"},
        }));
        assert_eq!(
            changed_fields(&live, &after, true),
            [
                "data.password: (not shown)",
                "metadata.labels: (none) -> {\"a\":\"b\"}",
                "spec.containers[0].image: \"a\" -> \"b\"",
                "spec.replicas: 1 -> 2",
            ]
        );
    }
}
