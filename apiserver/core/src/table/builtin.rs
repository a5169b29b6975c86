//! Columns and cells of the built-in kinds, after the name.

use super::{NONE, UNKNOWN, age, pod};
use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// How one kind is printed.
pub(super) struct Printer {
    pub(super) columns: &'static [Def],
    /// As many cells as columns.
    pub(super) cells: fn(&Value, Timestamp) -> Vec<Value>,
    /// Events print their name last, and only in wide output.
    pub(super) name_is_last: bool,
}

pub(super) struct Def {
    pub(super) name: &'static str,
    pub(super) ty: &'static str,
    pub(super) priority: i64,
}

const fn s(name: &'static str) -> Def {
    Def { name, ty: "string", priority: 0 }
}

const fn int(name: &'static str) -> Def {
    Def { name, ty: "integer", priority: 0 }
}

const fn boolean(name: &'static str) -> Def {
    Def { name, ty: "boolean", priority: 0 }
}

const fn wide(name: &'static str) -> Def {
    Def { name, ty: "string", priority: 1 }
}

const AGE: Def = s("Age");

macro_rules! printer {
    ([$($column:expr),*], $cells:expr) => {{
        const PRINTER: &Printer =
            &Printer { columns: &[$($column),*], cells: $cells, name_is_last: false };
        PRINTER
    }};
}

/// The printer of a kind; kinds without columns of their own show name and age.
#[rustfmt::skip] // a table
pub(super) fn printer(group: &str, kind: &str) -> &'static Printer {
    match (group, kind) {
        ("", "Pod") => printer!([s("Ready"), s("Status"), s("Restarts"), AGE, wide("IP"), wide("Node"), wide("Nominated Node"), wide("Readiness Gates")], pods),
        ("", "Node") => printer!([s("Status"), s("Roles"), AGE, s("Version"), wide("Internal-IP"), wide("External-IP"), wide("OS-Image"), wide("Kernel-Version"), wide("Container-Runtime")], nodes),
        ("", "Service") => printer!([s("Type"), s("Cluster-IP"), s("External-IP"), s("Port(s)"), AGE, wide("Selector")], services),
        ("", "ConfigMap") => printer!([int("Data"), AGE], |o, now| vec![json!(len(&o["data"]) + len(&o["binaryData"])), created(o, now)]),
        ("", "Secret") => printer!([s("Type"), int("Data"), AGE], |o, now| vec![text(&o["type"]), json!(len(&o["data"])), created(o, now)]),
        ("", "Namespace") => printer!([s("Status"), AGE], |o, now| vec![text(&o["status"]["phase"]), created(o, now)]),
        ("", "ServiceAccount") => printer!([int("Secrets"), AGE], |o, now| vec![json!(len(&o["secrets"])), created(o, now)]),
        ("", "Endpoints") => printer!([s("Endpoints"), AGE], endpoints),
        ("", "PersistentVolumeClaim") => printer!([s("Status"), s("Volume"), s("Capacity"), s("Access Modes"), s("StorageClass"), s("VolumeAttributesClass"), AGE, wide("VolumeMode")], claims),
        ("", "PersistentVolume") => printer!([s("Capacity"), s("Access Modes"), s("Reclaim Policy"), s("Status"), s("Claim"), s("StorageClass"), s("VolumeAttributesClass"), s("Reason"), AGE, wide("VolumeMode")], volumes),
        ("", "ReplicationController") => printer!([int("Desired"), int("Current"), int("Ready"), AGE, wide("Containers"), wide("Images"), wide("Selector")], replica_sets),
        ("", "Event") => { const PRINTER: &Printer = &Printer { columns: EVENT_COLUMNS, cells: events, name_is_last: true }; PRINTER }
        ("events.k8s.io", "Event") => { const PRINTER: &Printer = &Printer { columns: EVENT_COLUMNS, cells: new_events, name_is_last: true }; PRINTER }
        ("apps", "Deployment") => printer!([s("Ready"), int("Up-to-date"), int("Available"), AGE, wide("Containers"), wide("Images"), wide("Selector")], deployments),
        ("apps", "ReplicaSet") => printer!([int("Desired"), int("Current"), int("Ready"), AGE, wide("Containers"), wide("Images"), wide("Selector")], replica_sets),
        ("apps", "StatefulSet") => printer!([s("Ready"), AGE, wide("Containers"), wide("Images")], stateful_sets),
        ("apps", "DaemonSet") => printer!([int("Desired"), int("Current"), int("Ready"), int("Up-to-date"), int("Available"), s("Node Selector"), AGE, wide("Containers"), wide("Images"), wide("Selector")], daemon_sets),
        ("apps", "ControllerRevision") => printer!([s("Controller"), int("Revision"), AGE], |o, now| vec![owner(o), json!(number(&o["revision"])), created(o, now)]),
        ("batch", "Job") => printer!([s("Status"), s("Completions"), s("Duration"), AGE, wide("Containers"), wide("Images"), wide("Selector")], jobs),
        ("batch", "CronJob") => printer!([s("Schedule"), s("Timezone"), boolean("Suspend"), int("Active"), s("Last Schedule"), AGE, wide("Containers"), wide("Images"), wide("Selector")], cron_jobs),
        ("autoscaling", _) => printer!([s("Reference"), int("MinPods"), int("MaxPods"), int("Replicas"), AGE], autoscalers),
        ("coordination.k8s.io", "Lease") => printer!([s("Holder"), AGE], |o, now| vec![text(&o["spec"]["holderIdentity"]), created(o, now)]),
        ("discovery.k8s.io", "EndpointSlice") => printer!([s("AddressType"), s("Ports"), s("Endpoints"), AGE], endpoint_slices),
        ("networking.k8s.io", "Ingress") => printer!([s("Class"), s("Hosts"), s("Address"), s("Ports"), AGE], ingresses),
        ("networking.k8s.io", "IngressClass") => printer!([s("Controller"), s("Parameters"), AGE], |o, now| vec![text(&o["spec"]["controller"]), or(&o["spec"]["parameters"]["name"], NONE), created(o, now)]),
        ("networking.k8s.io", "NetworkPolicy") => printer!([s("Pod-Selector"), AGE], |o, now| vec![json!(label_selector(&o["spec"]["podSelector"])), created(o, now)]),
        ("policy", _) => printer!([s("Min Available"), s("Max Unavailable"), int("Allowed Disruptions"), AGE], budgets),
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => printer!([s("Role"), AGE, wide("Users"), wide("Groups"), wide("ServiceAccounts")], bindings),
        ("rbac.authorization.k8s.io", _) | ("apiextensions.k8s.io", _) | ("", "LimitRange") => printer!([s("Created At")], |o, _| vec![text(&o["metadata"]["creationTimestamp"])]),
        ("scheduling.k8s.io", _) => printer!([int("Value"), boolean("Global-Default"), AGE, s("PreemptionPolicy")], |o, now| vec![json!(number(&o["value"])), json!(o["globalDefault"] == true), created(o, now), text(&o["preemptionPolicy"])]),
        ("node.k8s.io", _) => printer!([s("Handler"), AGE], |o, now| vec![text(&o["handler"]), created(o, now)]),
        ("storage.k8s.io", "StorageClass") => printer!([s("Provisioner"), s("ReclaimPolicy"), s("VolumeBindingMode"), boolean("AllowVolumeExpansion"), AGE], storage_classes),
        ("storage.k8s.io", "VolumeAttachment") => printer!([s("Attacher"), s("PV"), s("Node"), boolean("Attached"), AGE], |o, now| vec![text(&o["spec"]["attacher"]), text(&o["spec"]["source"]["persistentVolumeName"]), text(&o["spec"]["nodeName"]), json!(o["status"]["attached"] == true), created(o, now)]),
        ("certificates.k8s.io", _) => printer!([AGE, s("SignerName"), s("Requestor"), s("RequestedDuration"), s("Condition")], signing_requests),
        _ => printer!([AGE], |o, now| vec![created(o, now)]),
    }
}

const EVENT_COLUMNS: &[Def] = &[
    s("Last Seen"),
    s("Type"),
    s("Reason"),
    s("Object"),
    wide("Subobject"),
    wide("Source"),
    s("Message"),
    wide("First Seen"),
    wide("Count"),
];

fn pods(object: &Value, now: Timestamp) -> Vec<Value> {
    let pod::Summary { status, ready, total, restarts } = pod::summary(object, now);
    let mut cells = vec![
        json!(format!("{ready}/{total}")),
        json!(status),
        json!(restarts),
        created(object, now),
    ];
    cells.extend(pod::wide(object).map(Value::from));
    cells
}

fn nodes(object: &Value, now: Timestamp) -> Vec<Value> {
    let status = &object["status"];
    let ready = items(&status["conditions"]).iter().find(|one| one["type"] == "Ready");
    let mut words = match ready.map(|one| &one["status"]) {
        Some(status) if status == "True" => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if object["spec"]["unschedulable"] == true {
        words.push_str(",SchedulingDisabled");
    }
    let mut roles = BTreeSet::new();
    for (key, value) in object["metadata"]["labels"].as_object().into_iter().flatten() {
        if let Some(role) = key.strip_prefix("node-role.kubernetes.io/").filter(|r| !r.is_empty()) {
            roles.insert(role);
        } else if key == "kubernetes.io/role" {
            roles.extend(value.as_str().filter(|role| !role.is_empty()));
        }
    }
    let roles = join_or_none(roles.into_iter().map(str::to_owned));
    let address = |ty: &str| {
        let found = items(&status["addresses"]).iter().find(|one| one["type"] == ty);
        found.map_or(json!(NONE), |one| or(&one["address"], NONE))
    };
    let info = &status["nodeInfo"];
    vec![
        json!(words),
        json!(roles),
        created(object, now),
        text(&info["kubeletVersion"]),
        address("InternalIP"),
        address("ExternalIP"),
        or(&info["osImage"], UNKNOWN),
        or(&info["kernelVersion"], UNKNOWN),
        or(&info["containerRuntimeVersion"], UNKNOWN),
    ]
}

fn services(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    let ty = spec["type"].as_str().unwrap_or("ClusterIP");
    let external = strings(&spec["externalIPs"]);
    let external = match ty {
        "ExternalName" => spec["externalName"].as_str().unwrap_or("").to_owned(),
        "LoadBalancer" => {
            let ingress = items(&object["status"]["loadBalancer"]["ingress"]).iter();
            let mut addresses: Vec<String> = ingress
                .filter_map(|one| one["ip"].as_str().or(one["hostname"].as_str()))
                .map(str::to_owned)
                .collect();
            addresses.extend(external);
            if addresses.is_empty() { "<pending>".into() } else { addresses.join(",") }
        }
        _ => join_or_none(external),
    };
    let ports = items(&spec["ports"]).iter().map(|port| {
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        match number(&port["nodePort"]) {
            0 => format!("{}/{protocol}", number(&port["port"])),
            node => format!("{}:{node}/{protocol}", number(&port["port"])),
        }
    });
    vec![
        json!(ty),
        or(&spec["clusterIP"], NONE),
        json!(external),
        json!(join_or_none(ports)),
        created(object, now),
        json!(labels(&spec["selector"])),
    ]
}

fn endpoints(object: &Value, now: Timestamp) -> Vec<Value> {
    let mut found = Vec::new();
    for subset in items(&object["subsets"]) {
        for address in items(&subset["addresses"]).iter().filter_map(|one| one["ip"].as_str()) {
            match items(&subset["ports"]) {
                [] => found.push(address.to_owned()),
                ports => found.extend(
                    ports.iter().map(|port| format!("{address}:{}", number(&port["port"]))),
                ),
            }
        }
    }
    vec![json!(some_of(&found)), created(object, now)]
}

fn endpoint_slices(object: &Value, now: Timestamp) -> Vec<Value> {
    let ports: Vec<String> = items(&object["ports"])
        .iter()
        .map(|port| match port["port"].as_i64() {
            Some(port) => port.to_string(),
            None => "*".into(),
        })
        .collect();
    let addresses: Vec<String> =
        items(&object["endpoints"]).iter().flat_map(|one| strings(&one["addresses"])).collect();
    let ports = if ports.is_empty() { "<unset>".into() } else { some_of(&ports) };
    let addresses = if addresses.is_empty() { "<unset>".into() } else { some_of(&addresses) };
    vec![text(&object["addressType"]), json!(ports), json!(addresses), created(object, now)]
}

fn claims(object: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let phase = match object["metadata"]["deletionTimestamp"].is_null() {
        true => text(&status["phase"]),
        false => json!("Terminating"),
    };
    let bound = !text(&spec["volumeName"]).as_str().unwrap_or("").is_empty();
    let (capacity, modes) = match bound {
        true => (text(&status["capacity"]["storage"]), access_modes(&status["accessModes"])),
        false => (json!(""), String::new()),
    };
    vec![
        phase,
        text(&spec["volumeName"]),
        capacity,
        json!(modes),
        text(&spec["storageClassName"]),
        or(&spec["volumeAttributesClassName"], "<unset>"),
        created(object, now),
        or(&spec["volumeMode"], "<unset>"),
    ]
}

fn volumes(object: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let phase = match object["metadata"]["deletionTimestamp"].is_null() {
        true => text(&status["phase"]),
        false => json!("Terminating"),
    };
    let claim = match spec["claimRef"]["name"].as_str() {
        Some(name) => format!("{}/{name}", spec["claimRef"]["namespace"].as_str().unwrap_or("")),
        None => String::new(),
    };
    vec![
        text(&spec["capacity"]["storage"]),
        json!(access_modes(&spec["accessModes"])),
        text(&spec["persistentVolumeReclaimPolicy"]),
        phase,
        json!(claim),
        text(&spec["storageClassName"]),
        or(&spec["volumeAttributesClassName"], "<unset>"),
        text(&status["reason"]),
        created(object, now),
        or(&spec["volumeMode"], "<unset>"),
    ]
}

fn deployments(object: &Value, now: Timestamp) -> Vec<Value> {
    let status = &object["status"];
    let desired = number(&object["spec"]["replicas"]);
    let (containers, images) = containers(&object["spec"]["template"]["spec"]);
    vec![
        json!(format!("{}/{desired}", number(&status["readyReplicas"]))),
        json!(number(&status["updatedReplicas"])),
        json!(number(&status["availableReplicas"])),
        created(object, now),
        json!(containers),
        json!(images),
        json!(label_selector(&object["spec"]["selector"])),
    ]
}

fn replica_sets(object: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let (containers, images) = containers(&spec["template"]["spec"]);
    let selector = match object["kind"] == "ReplicationController" {
        true => labels(&spec["selector"]),
        false => label_selector(&spec["selector"]),
    };
    vec![
        json!(number(&spec["replicas"])),
        json!(number(&status["replicas"])),
        json!(number(&status["readyReplicas"])),
        created(object, now),
        json!(containers),
        json!(images),
        json!(selector),
    ]
}

fn stateful_sets(object: &Value, now: Timestamp) -> Vec<Value> {
    let desired = number(&object["spec"]["replicas"]);
    let (containers, images) = containers(&object["spec"]["template"]["spec"]);
    vec![
        json!(format!("{}/{desired}", number(&object["status"]["readyReplicas"]))),
        created(object, now),
        json!(containers),
        json!(images),
    ]
}

fn daemon_sets(object: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let (containers, images) = containers(&spec["template"]["spec"]);
    let counts = [
        "desiredNumberScheduled",
        "currentNumberScheduled",
        "numberReady",
        "updatedNumberScheduled",
        "numberAvailable",
    ];
    let mut cells: Vec<Value> = counts.iter().map(|key| json!(number(&status[*key]))).collect();
    cells.extend([
        json!(labels(&spec["template"]["spec"]["nodeSelector"])),
        created(object, now),
        json!(containers),
        json!(images),
        json!(label_selector(&spec["selector"])),
    ]);
    cells
}

fn jobs(object: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let has = |ty: &str| {
        let mut conditions = items(&status["conditions"]).iter();
        conditions.any(|one| one["type"] == ty && one["status"] == "True")
    };
    let word = if has("Complete") {
        "Complete"
    } else if has("Failed") {
        "Failed"
    } else if !object["metadata"]["deletionTimestamp"].is_null() {
        "Terminating"
    } else if has("Suspended") {
        "Suspended"
    } else if has("FailureTarget") {
        "FailureTarget"
    } else if has("SuccessCriteriaMet") {
        "SuccessCriteriaMet"
    } else {
        "Running"
    };
    let succeeded = number(&status["succeeded"]);
    let completions = match (spec["completions"].as_i64(), number(&spec["parallelism"])) {
        (Some(completions), _) => format!("{succeeded}/{completions}"),
        (None, parallelism) if parallelism > 1 => format!("{succeeded}/1 of {parallelism}"),
        (None, _) => format!("{succeeded}/1"),
    };
    let time = |value: &Value| value.as_str().and_then(|text| text.parse::<Timestamp>().ok());
    let duration = time(&status["startTime"]).map_or(String::new(), |start| {
        let end = time(&status["completionTime"]).unwrap_or(now);
        super::human_duration(end.as_second() - start.as_second())
    });
    let (containers, images) = containers(&spec["template"]["spec"]);
    vec![
        json!(word),
        json!(completions),
        json!(duration),
        created(object, now),
        json!(containers),
        json!(images),
        json!(label_selector(&spec["selector"])),
    ]
}

fn cron_jobs(object: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let last =
        status["lastScheduleTime"].as_str().map_or(NONE.into(), |text| age::since(text, now));
    let template = &spec["jobTemplate"]["spec"];
    let (containers, images) = containers(&template["template"]["spec"]);
    vec![
        text(&spec["schedule"]),
        or(&spec["timeZone"], NONE),
        json!(spec["suspend"] == true),
        json!(len(&status["active"])),
        json!(last),
        created(object, now),
        json!(containers),
        json!(images),
        json!(label_selector(&template["selector"])),
    ]
}

fn autoscalers(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    let part = |key: &str| spec["scaleTargetRef"][key].as_str().unwrap_or("").to_owned();
    vec![
        json!(format!("{}/{}", part("kind"), part("name"))),
        json!(number(&spec["minReplicas"])),
        json!(number(&spec["maxReplicas"])),
        json!(number(&object["status"]["currentReplicas"])),
        created(object, now),
    ]
}

fn ingresses(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    let rules = items(&spec["rules"]).iter();
    let hosts: Vec<String> = rules
        .map(|rule| rule["host"].as_str().filter(|h| !h.is_empty()).unwrap_or("*").into())
        .collect();
    let hosts = if hosts.is_empty() { "*".into() } else { some_of(&hosts) };
    let addresses: Vec<&str> = items(&object["status"]["loadBalancer"]["ingress"])
        .iter()
        .filter_map(|one| one["ip"].as_str().or(one["hostname"].as_str()))
        .collect();
    let ports = if len(&spec["tls"]) > 0 { "80, 443" } else { "80" };
    vec![
        or(&spec["ingressClassName"], NONE),
        json!(hosts),
        json!(addresses.join(",")),
        json!(ports),
        created(object, now),
    ]
}

fn budgets(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    let count = |value: &Value| match value {
        Value::Null => json!("N/A"),
        Value::String(text) => json!(text),
        other => json!(other.to_string()),
    };
    vec![
        count(&spec["minAvailable"]),
        count(&spec["maxUnavailable"]),
        json!(number(&object["status"]["disruptionsAllowed"])),
        created(object, now),
    ]
}

fn bindings(object: &Value, now: Timestamp) -> Vec<Value> {
    let role = &object["roleRef"];
    let subjects = |kind: &str| {
        let subjects = items(&object["subjects"]).iter().filter(move |one| one["kind"] == kind);
        let names: Vec<String> = subjects
            .map(|one| {
                let name = one["name"].as_str().unwrap_or("");
                match one["namespace"].as_str() {
                    Some(namespace) => format!("{namespace}/{name}"),
                    None => name.to_owned(),
                }
            })
            .collect();
        json!(names.join(", "))
    };
    let part = |key: &str| role[key].as_str().unwrap_or("");
    vec![
        json!(format!("{}/{}", part("kind"), part("name"))),
        created(object, now),
        subjects("User"),
        subjects("Group"),
        subjects("ServiceAccount"),
    ]
}

fn storage_classes(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![
        text(&object["provisioner"]),
        or(&object["reclaimPolicy"], "Delete"),
        or(&object["volumeBindingMode"], "<unset>"),
        json!(object["allowVolumeExpansion"] == true),
        created(object, now),
    ]
}

fn signing_requests(object: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let conditions = items(&status["conditions"]);
    let has = |ty: &str| conditions.iter().any(|one| one["type"] == ty);
    let mut word = if has("Denied") {
        "Denied"
    } else if has("Approved") {
        "Approved"
    } else {
        "Pending"
    }
    .to_owned();
    if has("Failed") {
        word.push_str(",Failed");
    }
    if !status["certificate"].as_str().unwrap_or("").is_empty() {
        word.push_str(",Issued");
    }
    let duration = spec["expirationSeconds"].as_i64().map_or(NONE.into(), super::human_duration);
    vec![
        created(object, now),
        or(&spec["signerName"], NONE),
        text(&spec["username"]),
        json!(duration),
        json!(word),
    ]
}

fn events(object: &Value, now: Timestamp) -> Vec<Value> {
    let involved = &object["involvedObject"];
    let source = match (&object["source"]["component"], &object["source"]["host"]) {
        (Value::String(component), Value::String(host)) => format!("{component}, {host}"),
        (Value::String(component), _) => component.clone(),
        _ => object["reportingComponent"].as_str().unwrap_or("").to_owned(),
    };
    let event_time = &object["eventTime"];
    let first = first_text(&[&object["firstTimestamp"], event_time]);
    let last = first_text(&[
        &object["series"]["lastObservedTime"],
        &object["lastTimestamp"],
        &object["firstTimestamp"],
        event_time,
    ]);
    let count = object["series"]["count"].as_i64().or(object["count"].as_i64()).unwrap_or(1);
    event_cells(object, involved, source, &object["message"], first, last, count, now)
}

/// Events as `events.k8s.io` writes them.
fn new_events(object: &Value, now: Timestamp) -> Vec<Value> {
    let source = object["reportingController"].as_str().unwrap_or("").to_owned();
    let first = first_text(&[&object["deprecatedFirstTimestamp"], &object["eventTime"]]);
    let last = first_text(&[
        &object["series"]["lastObservedTime"],
        &object["deprecatedLastTimestamp"],
        &object["eventTime"],
    ]);
    let series = object["series"]["count"].as_i64();
    let count = series.or(object["deprecatedCount"].as_i64()).unwrap_or(1);
    event_cells(object, &object["regarding"], source, &object["note"], first, last, count, now)
}

#[expect(clippy::too_many_arguments)] // the cells of one row, in order
fn event_cells(
    object: &Value,
    about: &Value,
    source: String,
    message: &Value,
    first: &str,
    last: &str,
    count: i64,
    now: Timestamp,
) -> Vec<Value> {
    let kind = about["kind"].as_str().unwrap_or("").to_lowercase();
    let name = about["name"].as_str().unwrap_or("");
    let target = if name.is_empty() { kind } else { format!("{kind}/{name}") };
    vec![
        json!(age::since(last, now)),
        text(&object["type"]),
        text(&object["reason"]),
        json!(target),
        text(&about["fieldPath"]),
        json!(source),
        json!(message.as_str().unwrap_or("").trim()),
        json!(age::since(first, now)),
        json!(count.to_string()),
    ]
}

fn first_text<'a>(values: &[&'a Value]) -> &'a str {
    values.iter().find_map(|value| value.as_str()).unwrap_or("")
}

fn created(object: &Value, now: Timestamp) -> Value {
    let text = object["metadata"]["creationTimestamp"].as_str().unwrap_or("");
    json!(age::since(text, now))
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn strings(value: &Value) -> Vec<String> {
    items(value).iter().filter_map(|one| one.as_str().map(str::to_owned)).collect()
}

fn number(value: &Value) -> i64 {
    value.as_i64().unwrap_or(0)
}

/// Entries of a list or map.
fn len(value: &Value) -> usize {
    match value {
        Value::Array(list) => list.len(),
        Value::Object(map) => map.len(),
        _ => 0,
    }
}

fn text(value: &Value) -> Value {
    or(value, "")
}

fn or(value: &Value, fallback: &str) -> Value {
    json!(value.as_str().filter(|text| !text.is_empty()).unwrap_or(fallback))
}

fn join_or_none(words: impl IntoIterator<Item = String>) -> String {
    let words: Vec<String> = words.into_iter().collect();
    if words.is_empty() { NONE.into() } else { words.join(",") }
}

/// At most three of `words`, and how many more there are.
fn some_of(words: &[String]) -> String {
    const SHOWN: usize = 3;
    match words.len() {
        0 => NONE.into(),
        count if count <= SHOWN => words.join(","),
        count => format!("{} + {} more...", words[..SHOWN].join(","), count - SHOWN),
    }
}

/// A map of labels, as a selector.
fn labels(value: &Value) -> String {
    let pairs = value.as_object().into_iter().flatten();
    join_or_none(pairs.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or(""))))
}

/// A `LabelSelector`, as text.
fn label_selector(value: &Value) -> String {
    let pairs = value["matchLabels"].as_object().into_iter().flatten();
    let mut words: Vec<String> =
        pairs.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or(""))).collect();
    for one in items(&value["matchExpressions"]) {
        let key = one["key"].as_str().unwrap_or("");
        let values = strings(&one["values"]).join(",");
        words.push(match one["operator"].as_str().unwrap_or("") {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    join_or_none(words)
}

fn access_modes(value: &Value) -> String {
    let short = |mode: &Value| {
        Some(match mode.as_str()? {
            "ReadWriteOnce" => "RWO",
            "ReadOnlyMany" => "ROX",
            "ReadWriteMany" => "RWX",
            "ReadWriteOncePod" => "RWOP",
            _ => return None,
        })
    };
    items(value).iter().filter_map(short).collect::<Vec<_>>().join(",")
}

/// Names and images of a pod template's containers.
fn containers(spec: &Value) -> (String, String) {
    let of = |key: &str| {
        let containers = items(&spec["containers"]).iter();
        containers.filter_map(|one| one[key].as_str()).collect::<Vec<_>>().join(",")
    };
    (of("name"), of("image"))
}

fn owner(object: &Value) -> Value {
    let owners = items(&object["metadata"]["ownerReferences"]).iter();
    let controller = owners.clone().find(|owner| owner["controller"] == true);
    match controller {
        Some(owner) => {
            let kind = owner["kind"].as_str().unwrap_or("").to_lowercase();
            let group = owner["apiVersion"].as_str().and_then(|v| v.split_once('/'));
            let group = group.map_or(String::new(), |(group, _)| format!(".{group}"));
            json!(format!("{kind}{group}/{}", owner["name"].as_str().unwrap_or("")))
        }
        None => json!(NONE),
    }
}
