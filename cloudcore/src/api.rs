//! Small words about the Kubernetes API that several files need.

use kube::api::{Api, ApiResource, DynamicObject};
use serde_json::Value;
use skerry_cloudcore_core::downstream::Kind;

/// The objects of a kind that goes down, in one namespace; `null` for a kind without. Untyped, so that no field is
/// lost on the way through.
pub(crate) fn objects(client: &kube::Client, kind: Kind, namespace: &str) -> Api<DynamicObject> {
    let resource = resource_of(kind);
    match kind {
        Kind::Node => Api::all_with(client.clone(), &resource),
        _ => Api::namespaced_with(client.clone(), namespace, &resource),
    }
}

/// The objects of a kind that goes down, in all namespaces.
pub(crate) fn all_objects(client: &kube::Client, kind: Kind) -> Api<DynamicObject> {
    Api::all_with(client.clone(), &resource_of(kind))
}

fn resource_of(kind: Kind) -> ApiResource {
    let plural = match kind {
        Kind::Node => "nodes",
        Kind::ConfigMap => "configmaps",
        Kind::Secret => "secrets",
        Kind::Pod => "pods",
        Kind::DeviceModel => "devicemodels",
        Kind::Device => "devices",
        Kind::DeviceRule => "devicerules",
        Kind::ServiceAccountAccess => "serviceaccountaccesses",
        Kind::Watched => unreachable!("nothing asks the API for what applications watch"),
    };
    let api_version = kind.api_version();
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    ApiResource {
        group: group.into(),
        version: version.into(),
        api_version: api_version.into(),
        kind: kind.api_kind().into(),
        plural: plural.into(),
    }
}

/// An object as JSON, without `managedFields`.
pub(crate) fn to_json(mut object: DynamicObject) -> Value {
    object.metadata.managed_fields = None;
    serde_json::to_value(object).expect("objects have only string keys")
}

pub(crate) fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

pub(crate) fn is_already_exists(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.reason == "AlreadyExists")
}

pub(crate) fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.reason == "Conflict")
}

/// Whether the API knows no such kind, or does not show it to us.
pub(crate) fn is_kind_missing(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404 || status.code == 403)
}
