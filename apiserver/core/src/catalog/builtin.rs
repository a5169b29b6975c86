//! The built-in resources, one row each.
//!
//! Source: the API reference of Kubernetes 1.36 and the answers of its discovery endpoints. Left out, because storing
//! them without acting on them would mislead: admission webhooks and policies, API services, dynamic resource
//! allocation, flow control, component statuses, service CIDRs, `autoscaling/v1` (the same objects as `v2`).

use super::{Resource, ScalePaths, Subresource, VERBS};
use crate::facts::facts;
use crate::schema::{Node, Schema};
use std::sync::Arc;

/// One built-in resource.
pub(super) struct Row {
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
    /// Separated by spaces.
    short: &'static str,
    namespaced: bool,
    /// In the category `all`.
    all: bool,
    verbs: &'static [&'static str],
    /// Names, separated by spaces, as in [`subresource`].
    sub: &'static str,
}

const REVIEW: &[&str] = &["create"];
/// Namespaces and nodes are not deleted by the dozen through one call: namespaces lack `deletecollection`.
const NAMESPACE: &[&str] = &["create", "delete", "get", "list", "patch", "update", "watch"];
const NS: bool = true;
const CLUSTER: bool = false;

const fn row(
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static str,
    namespaced: bool,
    sub: &'static str,
) -> Row {
    Row { group, version: "v1", kind, plural, short, namespaced, all: false, verbs: VERBS, sub }
}

const fn all(row: Row) -> Row {
    Row { all: true, ..row }
}

const fn verbs(row: Row, verbs: &'static [&'static str]) -> Row {
    Row { verbs, ..row }
}

const APPS: &str = "apps";
const AUTHN: &str = "authentication.k8s.io";
const AUTHZ: &str = "authorization.k8s.io";
const RBAC: &str = "rbac.authorization.k8s.io";
const NET: &str = "networking.k8s.io";
const STORAGE: &str = "storage.k8s.io";

/// Groups in the order of discovery.
#[rustfmt::skip] // a table
pub(super) const ROWS: &[Row] = &[
    verbs(row("", "Binding", "bindings", "", NS, ""), REVIEW),
    row("", "ConfigMap", "configmaps", "cm", NS, ""),
    row("", "Endpoints", "endpoints", "ep", NS, ""),
    row("", "Event", "events", "ev", NS, ""),
    row("", "LimitRange", "limitranges", "limits", NS, ""),
    verbs(row("", "Namespace", "namespaces", "ns", CLUSTER, "finalize status"), NAMESPACE),
    row("", "Node", "nodes", "no", CLUSTER, "status"),
    row("", "PersistentVolumeClaim", "persistentvolumeclaims", "pvc", NS, "status"),
    row("", "PersistentVolume", "persistentvolumes", "pv", CLUSTER, "status"),
    all(row("", "Pod", "pods", "po", NS,
        "attach binding ephemeralcontainers eviction exec log portforward status")),
    row("", "PodTemplate", "podtemplates", "", NS, ""),
    all(row("", "ReplicationController", "replicationcontrollers", "rc", NS, "scale status")),
    row("", "ResourceQuota", "resourcequotas", "quota", NS, "status"),
    row("", "Secret", "secrets", "", NS, ""),
    row("", "ServiceAccount", "serviceaccounts", "sa", NS, "token"),
    all(row("", "Service", "services", "svc", NS, "status")),
    row("events.k8s.io", "Event", "events", "ev", NS, ""),
    verbs(row(AUTHN, "SelfSubjectReview", "selfsubjectreviews", "", CLUSTER, ""), REVIEW),
    verbs(row(AUTHN, "TokenReview", "tokenreviews", "", CLUSTER, ""), REVIEW),
    verbs(row(AUTHZ, "LocalSubjectAccessReview", "localsubjectaccessreviews", "", NS, ""), REVIEW),
    verbs(row(AUTHZ, "SelfSubjectAccessReview", "selfsubjectaccessreviews", "", CLUSTER, ""), REVIEW),
    verbs(row(AUTHZ, "SelfSubjectRulesReview", "selfsubjectrulesreviews", "", CLUSTER, ""), REVIEW),
    verbs(row(AUTHZ, "SubjectAccessReview", "subjectaccessreviews", "", CLUSTER, ""), REVIEW),
    row(APPS, "ControllerRevision", "controllerrevisions", "", NS, ""),
    all(row(APPS, "DaemonSet", "daemonsets", "ds", NS, "status")),
    all(row(APPS, "Deployment", "deployments", "deploy", NS, "scale status")),
    all(row(APPS, "ReplicaSet", "replicasets", "rs", NS, "scale status")),
    all(row(APPS, "StatefulSet", "statefulsets", "sts", NS, "scale status")),
    all(Row { version: "v2", ..row("autoscaling", "HorizontalPodAutoscaler", "horizontalpodautoscalers", "hpa", NS, "status") }),
    all(row("batch", "CronJob", "cronjobs", "cj", NS, "status")),
    all(row("batch", "Job", "jobs", "", NS, "status")),
    row("certificates.k8s.io", "CertificateSigningRequest", "certificatesigningrequests", "csr", CLUSTER, "approval status"),
    row("coordination.k8s.io", "Lease", "leases", "", NS, ""),
    row("discovery.k8s.io", "EndpointSlice", "endpointslices", "", NS, ""),
    row(NET, "IngressClass", "ingressclasses", "", CLUSTER, ""),
    row(NET, "Ingress", "ingresses", "ing", NS, "status"),
    row(NET, "NetworkPolicy", "networkpolicies", "netpol", NS, ""),
    row("node.k8s.io", "RuntimeClass", "runtimeclasses", "", CLUSTER, ""),
    row("policy", "PodDisruptionBudget", "poddisruptionbudgets", "pdb", NS, "status"),
    row(RBAC, "ClusterRoleBinding", "clusterrolebindings", "", CLUSTER, ""),
    row(RBAC, "ClusterRole", "clusterroles", "", CLUSTER, ""),
    row(RBAC, "RoleBinding", "rolebindings", "", NS, ""),
    row(RBAC, "Role", "roles", "", NS, ""),
    row("scheduling.k8s.io", "PriorityClass", "priorityclasses", "pc", CLUSTER, ""),
    row(STORAGE, "CSIDriver", "csidrivers", "", CLUSTER, ""),
    row(STORAGE, "CSINode", "csinodes", "", CLUSTER, ""),
    row(STORAGE, "CSIStorageCapacity", "csistoragecapacities", "", NS, ""),
    row(STORAGE, "StorageClass", "storageclasses", "sc", CLUSTER, ""),
    row(STORAGE, "VolumeAttachment", "volumeattachments", "", CLUSTER, "status"),
    row(STORAGE, "VolumeAttributesClass", "volumeattributesclasses", "vac", CLUSTER, ""),
    row("apiextensions.k8s.io", "CustomResourceDefinition", "customresourcedefinitions", "crd crds", CLUSTER, "status"),
];

/// The resources of [`ROWS`].
pub(super) fn resources() -> Vec<Resource> {
    ROWS.iter().map(resource).collect()
}

fn resource(row: &Row) -> Resource {
    let Row { group, version, kind, plural, .. } = *row;
    let schema = match facts().kind(group, version, kind) {
        Some(definition) => Node::Ref(definition.name.clone()),
        None => Node::Inline(Arc::new(Schema { preserve_unknown: true, ..Schema::default() })),
    };
    let mut categories: Vec<Arc<str>> = Vec::new();
    if row.all {
        categories.push("all".into());
    }
    if kind == "CustomResourceDefinition" {
        categories.push("api-extensions".into());
    }
    let scale = row.sub.split(' ').any(|name| name == "scale");
    Resource {
        group: group.into(),
        version: version.into(),
        kind: kind.into(),
        list_kind: format!("{kind}List").into(),
        plural: plural.into(),
        singular: kind.to_ascii_lowercase().into(),
        namespaced: row.namespaced,
        short_names: row.short.split_whitespace().map(Arc::from).collect(),
        categories,
        verbs: row.verbs.to_vec(),
        subresources: row.sub.split_whitespace().map(|name| subresource(row, name)).collect(),
        schema,
        custom: false,
        columns: Vec::new(),
        scale_paths: scale.then(|| ScalePaths {
            spec_replicas: ".spec.replicas".into(),
            status_replicas: ".status.replicas".into(),
            selector: Some(".spec.selector".into()),
        }),
        selectable_fields: selectable_fields(group, kind).iter().map(ToString::to_string).collect(),
        has_status: row.sub.split(' ').any(|name| name == "status"),
        stored_in_core: group == "events.k8s.io",
        open_api: None,
    }
}

fn subresource(row: &Row, name: &str) -> Subresource {
    const WRITE: &[&str] = &["get", "patch", "update"];
    const STREAM: &[&str] = &["create", "get"];
    let own = (row.kind, row.group, row.version);
    let ((kind, group, version), verbs): (_, &'static [&'static str]) = match name {
        "attach" => (("PodAttachOptions", "", "v1"), STREAM),
        "exec" => (("PodExecOptions", "", "v1"), STREAM),
        "portforward" => (("PodPortForwardOptions", "", "v1"), STREAM),
        "log" => (own, &["get"]),
        "binding" => (("Binding", "", "v1"), REVIEW),
        "eviction" => (("Eviction", "policy", "v1"), REVIEW),
        "finalize" => (own, &["update"]),
        "scale" => (("Scale", "autoscaling", "v1"), WRITE),
        "token" => (("TokenRequest", AUTHN, "v1"), REVIEW),
        _ => (own, WRITE), // status, approval, ephemeralcontainers
    };
    Subresource {
        name: name.into(),
        kind: kind.into(),
        group: group.into(),
        version: version.into(),
        verbs,
    }
}

/// Fields for selectors, beyond `metadata.name` and `metadata.namespace`.
fn selectable_fields(group: &str, kind: &str) -> &'static [&'static str] {
    match (group, kind) {
        ("", "Pod") => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        ("", "Node") => &["spec.unschedulable"],
        ("", "Event") => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        ("events.k8s.io", "Event") => &[
            "regarding.kind",
            "regarding.namespace",
            "regarding.name",
            "regarding.uid",
            "regarding.apiVersion",
            "regarding.resourceVersion",
            "regarding.fieldPath",
            "reason",
            "reportingController",
            "type",
        ],
        ("", "Secret") => &["type"],
        ("", "Namespace") => &["status.phase"],
        ("", "Service") => &["spec.clusterIP", "spec.type"],
        ("", "ReplicationController") | ("apps", "ReplicaSet") => &["status.replicas"],
        ("batch", "Job") => &["status.successful"],
        ("certificates.k8s.io", _) => &["spec.signerName"],
        _ => &[],
    }
}
