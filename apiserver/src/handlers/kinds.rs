//! What is special to a kind when it is written: addresses of Services, status of CustomResourceDefinitions,
//! finalizers of Namespaces, first status of Pods.

use crate::api::{Api, store_failed};
use crate::auth::User;
use crate::store::Range;
use serde_json::{Value, json};
use skerry_apiserver_core::catalog::{Catalog, Resource};
use skerry_apiserver_core::crd;
use skerry_apiserver_core::status::{ApiError, FieldError};
use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::time::Duration;

/// Service addresses: 10.96.0.0/16, as kubeadm has it; the first one is the API's own.
const SERVICE_NET: [u8; 2] = [10, 96];
/// The address of service `default/kubernetes`.
pub(crate) const API_ADDRESS: &str = "10.96.0.1";
const NODE_PORTS: std::ops::RangeInclusive<u16> = 30000..=32767;
/// Life of an Event after its last change, as in Kubernetes.
const EVENT_LIFE: Duration = Duration::from_secs(3600);
/// Life of a signing request after its last change, as of one that nobody decides about in Kubernetes.
const SIGNING_REQUEST_LIFE: Duration = Duration::from_secs(24 * 3600);
const CERTIFICATES: &str = "certificates.k8s.io";
/// Keeps a definition until its objects are gone.
pub(crate) const CRD_FINALIZER: &str = "customresourcecleanup.apiextensions.k8s.io";

/// Whether creating the object draws from a pool, so that creations have to queue.
pub(crate) fn draws_addresses(resource: &Resource, object: &Value) -> bool {
    is(resource, "", "services") && object["spec"]["type"] != "ExternalName"
}

/// How long objects of a resource live after their last change; `None`: until they are deleted.
pub(crate) fn lifetime(group: &str, plural: &str) -> Option<Duration> {
    match (group, plural) {
        ("", "events") => Some(EVENT_LIFE),
        (CERTIFICATES, "certificatesigningrequests") => Some(SIGNING_REQUEST_LIFE),
        _ => None,
    }
}

/// Whether an update has to name the revision that it is based on.
pub(crate) fn needs_revision(resource: &Resource) -> bool {
    resource.custom || is(resource, "apiextensions.k8s.io", "customresourcedefinitions")
}

/// Writes who asks into a signing request, whatever its body says.
pub(super) fn note_requester(resource: &Resource, object: &mut Value, user: &User) {
    if !is(resource, CERTIFICATES, "certificatesigningrequests") || !object["spec"].is_object() {
        return;
    }
    let spec = &mut object["spec"];
    spec["username"] = user.name.as_str().into();
    spec["groups"] = user.groups.clone().into();
    if let Some(map) = spec.as_object_mut() {
        map.remove("uid");
        map.remove("extra");
    }
    if !user.uid.is_empty() {
        spec["uid"] = user.uid.as_str().into();
    }
    if !user.extra.is_empty() {
        spec["extra"] = json!(user.extra);
    }
}

/// Completes a defaulted object before it is validated and stored for the first time.
pub(crate) async fn before_create(
    api: &Api,
    catalog: &Catalog,
    resource: &Resource,
    object: &mut Value,
) -> Result<(), ApiError> {
    match (&*resource.group, &*resource.plural) {
        ("", "namespaces") => {
            object["spec"]["finalizers"] = json!(["kubernetes"]);
            object["status"] = json!({"phase": "Active"});
            let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name.into();
        }
        ("", "pods") => {
            object["status"] = json!({"phase": "Pending", "qosClass": qos_class(&object["spec"])});
        }
        ("", "persistentvolumeclaims" | "persistentvolumes") => {
            object["status"] = json!({"phase": "Pending"});
        }
        ("", "services") => assign_addresses(api, object, None).await?,
        ("apiextensions.k8s.io", "customresourcedefinitions") => {
            check_definition(catalog, resource, object)?;
        }
        _ => {}
    }
    if resource.custom {
        api.refuse_if_terminating(resource).await?;
    }
    Ok(())
}

/// Completes the wanted state of an object that exists.
pub(crate) async fn before_update(
    api: &Api,
    catalog: &Catalog,
    resource: &Resource,
    live: &Value,
    object: &mut Value,
    subresource: &str,
) -> Result<(), ApiError> {
    match (&*resource.group, &*resource.plural) {
        ("", "namespaces") if subresource != "finalize" => {
            // A client that leaves them out must not skip the emptying of the namespace.
            object["spec"]["finalizers"] = live["spec"]["finalizers"].clone();
        }
        ("", "services") => {
            // Addresses stay when a client replaces the object without naming them.
            for field in ["clusterIP", "clusterIPs"] {
                if object["spec"][field].is_null() && live["spec"]["type"] != "ExternalName" {
                    object["spec"][field] = live["spec"][field].clone();
                }
            }
            assign_addresses(api, object, Some(live)).await?;
        }
        (CERTIFICATES, "certificatesigningrequests") => {
            check_decision(live, object, subresource)?;
        }
        ("apiextensions.k8s.io", "customresourcedefinitions")
            if live["metadata"]["deletionTimestamp"].is_null() =>
        {
            check_definition(catalog, resource, object)?;
        }
        _ => {}
    }
    Ok(())
}

/// Refuses to delete what the server cannot do without.
pub(crate) fn before_delete(resource: &Resource, name: &str) -> Result<(), ApiError> {
    if is(resource, "", "namespaces") && matches!(name, "default" | "kube-system" | "kube-public") {
        return Err(ApiError::forbidden(
            "",
            "namespaces",
            name,
            "this namespace may not be deleted",
        ));
    }
    Ok(())
}

/// Lets the rest of the server see what was just written, before the answer is sent.
pub(crate) async fn after_write(api: &Api, resource: &Resource) -> Result<(), ApiError> {
    if is(resource, "apiextensions.k8s.io", "customresourcedefinitions") {
        api.reload_catalog().await.map_err(store_failed)?;
    }
    Ok(())
}

impl Api {
    async fn refuse_if_terminating(&self, resource: &Resource) -> Result<(), ApiError> {
        let name = format!("{}.{}", resource.plural, resource.group);
        let key = crate::store::Key {
            group: "apiextensions.k8s.io".into(),
            resource: "customresourcedefinitions".into(),
            namespace: String::new(),
            name,
        };
        let definition = self.store.get(&key).await.map_err(store_failed)?;
        match definition {
            Some(definition) if definition["metadata"]["deletionTimestamp"].is_null() => Ok(()),
            _ => Err(ApiError::new(
                405,
                "MethodNotAllowed",
                "create not allowed while custom resource definition is terminating",
            )),
        }
    }
}

fn is(resource: &Resource, group: &str, plural: &str) -> bool {
    &*resource.group == group && &*resource.plural == plural
}

/// A decision on a signing request is made at `approval`, once, and never taken back; all else of its status elsewhere.
fn check_decision(live: &Value, object: &mut Value, subresource: &str) -> Result<(), ApiError> {
    let name = live["metadata"]["name"].as_str().unwrap_or_default();
    let decided = |object: &Value, kind: &str| {
        let conditions = object["status"]["conditions"].as_array();
        conditions.is_some_and(|list| list.iter().any(|one| one["type"] == kind))
    };
    let refuse = |detail: String| {
        let error = FieldError {
            field: "status.conditions".into(),
            reason: "FieldValueForbidden",
            message: format!("Forbidden: {detail}"),
        };
        Err(ApiError::invalid(CERTIFICATES, "CertificateSigningRequest", name, &[error]))
    };
    for kind in ["Approved", "Denied"] {
        match (decided(live, kind), decided(object, kind)) {
            (true, false) => {
                return refuse(format!("updates may not remove a condition of type \"{kind}\""));
            }
            (false, true) if subresource != "approval" => {
                return refuse(format!("updates may not add a condition of type \"{kind}\""));
            }
            _ => {}
        }
    }
    if decided(object, "Approved") && decided(object, "Denied") {
        return refuse("Approved and Denied conditions are mutually exclusive".into());
    }
    if subresource == "approval" {
        let certificate = live["status"]["certificate"].clone();
        if certificate.is_null() {
            if let Some(status) = object["status"].as_object_mut() {
                status.remove("certificate");
            }
        } else {
            object["status"]["certificate"] = certificate;
        }
        let now = super::write::now();
        for condition in object["status"]["conditions"].as_array_mut().into_iter().flatten() {
            for field in ["lastUpdateTime", "lastTransitionTime"] {
                if condition[field].is_null() {
                    condition[field] = now.as_str().into();
                }
            }
        }
    }
    Ok(())
}

/// Refuses a definition that could not be served, and writes the status of one that can: it is established at once,
/// because the catalogue is swapped before the answer to this write is sent.
fn check_definition(
    catalog: &Catalog,
    resource: &Resource,
    object: &mut Value,
) -> Result<(), ApiError> {
    let errors = crd::validate(object);
    if !errors.is_empty() {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        return Err(ApiError::invalid(&resource.group, &resource.kind, name, &errors));
    }
    let finalizers = &mut object["metadata"]["finalizers"];
    match finalizers.as_array_mut() {
        Some(list) if list.iter().any(|one| one == CRD_FINALIZER) => {}
        Some(list) => list.push(CRD_FINALIZER.into()),
        None => *finalizers = json!([CRD_FINALIZER]),
    }
    crd::establish(object, catalog, &super::write::now());
    Ok(())
}

/// Source: kubernetes.io, "Pod Quality of Service Classes".
fn qos_class(spec: &Value) -> &'static str {
    let containers = || {
        ["containers", "initContainers"]
            .into_iter()
            .flat_map(|field| spec[field].as_array().into_iter().flatten())
    };
    let amount = |container: &Value, side: &str, what: &str| {
        let value = &container["resources"][side][what];
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        (!value.is_null() && text != "0").then_some(text)
    };
    let mut any = false;
    let mut guaranteed = true;
    for container in containers() {
        for what in ["cpu", "memory"] {
            let limit = amount(container, "limits", what);
            let request = amount(container, "requests", what);
            any |= limit.is_some() || request.is_some();
            guaranteed &= limit.is_some() && request.is_none_or(|request| Some(request) == limit);
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// Gives a Service its cluster address and node ports, or checks those that it asks for.
async fn assign_addresses(
    api: &Api,
    object: &mut Value,
    live: Option<&Value>,
) -> Result<(), ApiError> {
    let kind = object["spec"]["type"].as_str().unwrap_or("ClusterIP").to_owned();
    if kind == "ExternalName" {
        if let Some(spec) = object["spec"].as_object_mut() {
            spec.remove("clusterIP");
            spec.remove("clusterIPs");
        }
        return Ok(());
    }
    let uid = object["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
    let wants_ports = matches!(kind.as_str(), "NodePort" | "LoadBalancer");
    let settled = live.is_some_and(|live| {
        live["spec"]["clusterIP"].is_string()
            && live["spec"]["clusterIP"] == object["spec"]["clusterIP"]
    });
    if settled && !wants_ports {
        return Ok(());
    }
    let range = Range::all("".into(), "services".into(), None);
    let others = api.store.list(range, move |service| service["metadata"]["uid"] != uid.as_str());
    let others = others.await.map_err(store_failed)?.items;

    let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let refuse = |field: &str, value: &str, why: &str| {
        let error = FieldError {
            field: field.into(),
            reason: "FieldValueInvalid",
            message: format!("Invalid value: \"{value}\": {why}"),
        };
        ApiError::invalid("", "Service", &name, &[error])
    };
    let used: HashSet<&str> =
        others.iter().filter_map(|service| service["spec"]["clusterIP"].as_str()).collect();
    match object["spec"]["clusterIP"].as_str().unwrap_or_default().to_owned().as_str() {
        "None" => object["spec"]["clusterIPs"] = json!(["None"]),
        "" => {
            let free = (0..=u16::MAX).map(|_| {
                let [high, low] = rand::random_range(256..u16::MAX).to_be_bytes();
                Ipv4Addr::new(SERVICE_NET[0], SERVICE_NET[1], high, low).to_string()
            });
            let address = free
                .take(1 << 16)
                .find(|address| !used.contains(address.as_str()))
                .ok_or_else(|| ApiError::internal("no free service address"))?;
            object["spec"]["clusterIPs"] = json!([address]);
            object["spec"]["clusterIP"] = address.into();
        }
        wanted => {
            let inside = wanted
                .parse::<Ipv4Addr>()
                .is_ok_and(|address| address.octets()[..2] == SERVICE_NET);
            if !inside && !settled {
                let why = "failed to allocate IP: the provided network does not match the range 10.96.0.0/16";
                return Err(refuse("spec.clusterIPs", wanted, why));
            }
            if used.contains(wanted) {
                let why = "failed to allocate IP: provided IP is already allocated";
                return Err(refuse("spec.clusterIPs", wanted, why));
            }
            object["spec"]["clusterIPs"] = json!([wanted]);
        }
    }
    if !wants_ports {
        return Ok(());
    }
    let ports_of = |service: &Value| -> Vec<u64> {
        let ports = service["spec"]["ports"].as_array();
        ports.into_iter().flatten().filter_map(|port| port["nodePort"].as_u64()).collect()
    };
    let mut used: HashSet<u64> = others.iter().flat_map(ports_of).collect();
    for (index, port) in object["spec"]["ports"].as_array_mut().into_iter().flatten().enumerate() {
        match port["nodePort"].as_u64().unwrap_or(0) {
            0 => {
                let before =
                    live.and_then(|live| live["spec"]["ports"][index]["nodePort"].as_u64());
                let kept = before.filter(|port| !used.contains(port));
                let free = (0..NODE_PORTS.len())
                    .map(|_| u64::from(rand::random_range(NODE_PORTS)))
                    .find(|port| !used.contains(port));
                let chosen =
                    kept.or(free).ok_or_else(|| ApiError::internal("no free node port"))?;
                port["nodePort"] = chosen.into();
                used.insert(chosen);
            }
            wanted => {
                let field = format!("spec.ports[{index}].nodePort");
                if u16::try_from(wanted).map_or(true, |port| !NODE_PORTS.contains(&port)) {
                    let why = "provided port is not in the valid range. The range of valid ports is 30000-32767";
                    return Err(refuse(&field, &wanted.to_string(), why));
                }
                if !used.insert(wanted) {
                    return Err(refuse(
                        &field,
                        &wanted.to_string(),
                        "provided port is already allocated",
                    ));
                }
            }
        }
    }
    Ok(())
}
