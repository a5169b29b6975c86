use super::*;
use crate::catalog::Catalog;

const NOW: &str = "2026-03-01T12:00:00Z";

/// One row, as column name to cell, with `*` after the names of wide columns.
fn row(
    catalog: &Catalog,
    group: &str,
    version: &str,
    plural: &str,
    object: &Value,
) -> Vec<(String, String)> {
    let resource = catalog.find(group, version, plural).expect("a served resource");
    let table = table(&resource, &[object], json!({}), "None", NOW.parse().unwrap());
    let columns = table["columnDefinitions"].as_array().unwrap();
    let cells = table["rows"][0]["cells"].as_array().unwrap();
    assert_eq!(columns.len(), cells.len(), "{plural}");
    let text = |value: &Value| value.as_str().map_or(value.to_string(), str::to_owned);
    columns
        .iter()
        .zip(cells)
        .map(|(column, cell)| {
            let mark = if column["priority"] == 0 { "" } else { "*" };
            (format!("{}{mark}", column["name"].as_str().unwrap()), text(cell))
        })
        .collect()
}

#[track_caller]
fn check(group: &str, plural: &str, object: Value, expected: &[(&str, &str)]) {
    let version = if group == "autoscaling" { "v2" } else { "v1" };
    let row = row(&Catalog::builtin(), group, version, plural, &object);
    let row: Vec<(&str, &str)> = row.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    assert_eq!(row, expected);
}

#[track_caller]
fn check_pod(spec: Value, status: Value, ready: &str, text: &str, restarts: &str) {
    let pod = json!({"metadata": {"name": "p", "creationTimestamp": NOW}, "spec": spec, "status": status});
    let row = row(&Catalog::builtin(), "", "v1", "pods", &pod);
    let cells: Vec<&str> = row[1..4].iter().map(|(_, cell)| cell.as_str()).collect();
    assert_eq!(cells, [ready, text, restarts]);
}

#[test]
fn every_built_in_resource_prints_an_empty_object_with_a_cell_per_column() {
    let catalog = Catalog::builtin();
    for resource in catalog.resources().filter(|resource| resource.is_stored()) {
        let object = json!({"metadata": {"name": "x"}});
        row(&catalog, &resource.group, &resource.version, &resource.plural, &object);
    }
}

#[test]
fn running_pod_shows_restarts_with_the_time_of_the_last() {
    check_pod(
        json!({"containers": [{"name": "a"}, {"name": "b"}]}),
        json!({"phase": "Running", "containerStatuses": [
            {"name": "a", "ready": true, "restartCount": 2, "state": {"running": {}},
             "lastState": {"terminated": {"finishedAt": "2026-03-01T11:54:48Z"}}},
            {"name": "b", "ready": false, "restartCount": 0, "state": {"running": {}}},
        ]}),
        "1/2",
        "Running",
        "2 (5m12s ago)",
    );
}

#[test]
fn waiting_container_names_the_status() {
    check_pod(
        json!({"containers": [{"name": "a"}]}),
        json!({"phase": "Running", "containerStatuses": [{"name": "a", "ready": false, "restartCount": 3,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}),
        "0/1",
        "CrashLoopBackOff",
        "3",
    );
    check_pod(
        json!({"containers": [{"name": "a"}]}),
        json!({"phase": "Pending"}),
        "0/1",
        "Pending",
        "0",
    );
}

#[test]
fn ended_containers_show_reason_or_exit_code() {
    let ended = |terminated: Value| {
        json!({"phase": "Failed", "containerStatuses": [{"name": "a", "restartCount": 0,
            "state": {"terminated": terminated}}]})
    };
    let spec = json!({"containers": [{"name": "a"}]});
    check_pod(
        spec.clone(),
        ended(json!({"reason": "OOMKilled", "exitCode": 137})),
        "0/1",
        "OOMKilled",
        "0",
    );
    check_pod(spec.clone(), ended(json!({"exitCode": 3})), "0/1", "ExitCode:3", "0");
    check_pod(spec, ended(json!({"exitCode": 0, "signal": 9})), "0/1", "Signal:9", "0");
}

#[test]
fn init_containers_show_progress_and_failures() {
    let spec =
        json!({"initContainers": [{"name": "i"}, {"name": "j"}], "containers": [{"name": "a"}]});
    let with = |second: Value| {
        json!({"phase": "Pending", "initContainerStatuses": [
            {"name": "i", "restartCount": 0, "state": {"terminated": {"exitCode": 0}}},
            {"name": "j", "restartCount": 1, "state": second},
        ]})
    };
    check_pod(spec.clone(), with(json!({"running": {}})), "0/1", "Init:1/2", "1");
    check_pod(
        spec.clone(),
        with(json!({"waiting": {"reason": "PodInitializing"}})),
        "0/1",
        "Init:1/2",
        "1",
    );
    check_pod(
        spec.clone(),
        with(json!({"terminated": {"exitCode": 1}})),
        "0/1",
        "Init:ExitCode:1",
        "1",
    );
    check_pod(
        spec,
        with(json!({"waiting": {"reason": "ImagePullBackOff"}})),
        "0/1",
        "Init:ImagePullBackOff",
        "1",
    );
}

#[test]
fn sidecars_count_as_containers() {
    check_pod(
        json!({"initContainers": [{"name": "s", "restartPolicy": "Always"}], "containers": [{"name": "a"}]}),
        json!({"phase": "Running",
            "initContainerStatuses": [{"name": "s", "restartCount": 1, "started": true, "ready": true, "state": {"running": {}}}],
            "containerStatuses": [{"name": "a", "restartCount": 0, "ready": true, "state": {"running": {}}}]}),
        "2/2",
        "Running",
        "1",
    );
}

#[test]
fn deleted_pod_is_terminating_unless_it_ended() {
    let pod = |phase: &str, reason: &str| {
        json!({"metadata": {"name": "p", "creationTimestamp": NOW, "deletionTimestamp": NOW},
            "spec": {}, "status": {"phase": phase, "reason": reason}})
    };
    let status = |pod: Value| row(&Catalog::builtin(), "", "v1", "pods", &pod)[2].1.clone();
    assert_eq!(status(pod("Running", "")), "Terminating");
    assert_eq!(status(pod("Succeeded", "")), "Succeeded");
    assert_eq!(status(pod("Running", "NodeLost")), "Unknown");
}

#[test]
fn nodes_services_and_workloads_print_as_kubectl_users_know_them() {
    check(
        "",
        "nodes",
        json!({
            "metadata": {"name": "n", "creationTimestamp": "2026-02-27T08:00:00Z",
                "labels": {"node-role.kubernetes.io/edge": "", "node-role.kubernetes.io/agent": ""}},
            "spec": {"unschedulable": true},
            "status": {"conditions": [{"type": "Ready", "status": "Unknown"}],
                "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}],
                "nodeInfo": {"kubeletVersion": "v1.36.0", "osImage": "Skerry", "kernelVersion": "6.12", "containerRuntimeVersion": "containerd://1.7"}},
        }),
        &[
            ("Name", "n"),
            ("Status", "NotReady,SchedulingDisabled"),
            ("Roles", "agent,edge"),
            ("Age", "2d4h"),
            ("Version", "v1.36.0"),
            ("Internal-IP*", "10.0.0.1"),
            ("External-IP*", "<none>"),
            ("OS-Image*", "Skerry"),
            ("Kernel-Version*", "6.12"),
            ("Container-Runtime*", "containerd://1.7"),
        ],
    );
    check(
        "",
        "services",
        json!({
            "metadata": {"name": "s", "creationTimestamp": NOW},
            "spec": {"type": "NodePort", "clusterIP": "10.96.0.9", "selector": {"app": "x"},
                "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]},
        }),
        &[
            ("Name", "s"),
            ("Type", "NodePort"),
            ("Cluster-IP", "10.96.0.9"),
            ("External-IP", "<none>"),
            ("Port(s)", "80:30080/TCP,53/UDP"),
            ("Age", "0s"),
            ("Selector*", "app=x"),
        ],
    );
    check(
        "apps",
        "deployments",
        json!({
            "metadata": {"name": "d", "creationTimestamp": "2026-03-01T09:00:00Z"},
            "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "x"}, "matchExpressions": [{"key": "tier", "operator": "In", "values": ["a", "b"]}]},
                "template": {"spec": {"containers": [{"name": "c", "image": "i:1"}, {"name": "e", "image": "j:2"}]}}},
            "status": {"readyReplicas": 1, "updatedReplicas": 2, "availableReplicas": 1},
        }),
        &[
            ("Name", "d"),
            ("Ready", "1/3"),
            ("Up-to-date", "2"),
            ("Available", "1"),
            ("Age", "3h"),
            ("Containers*", "c,e"),
            ("Images*", "i:1,j:2"),
            ("Selector*", "app=x,tier in (a,b)"),
        ],
    );
    check(
        "batch",
        "jobs",
        json!({
            "metadata": {"name": "j", "creationTimestamp": NOW},
            "spec": {"completions": 2, "template": {}},
            "status": {"succeeded": 2, "startTime": "2026-03-01T11:00:00Z", "completionTime": "2026-03-01T11:01:30Z",
                "conditions": [{"type": "Complete", "status": "True"}]},
        }),
        &[
            ("Name", "j"),
            ("Status", "Complete"),
            ("Completions", "2/2"),
            ("Duration", "90s"),
            ("Age", "0s"),
            ("Containers*", ""),
            ("Images*", ""),
            ("Selector*", "<none>"),
        ],
    );
}

#[test]
fn events_print_their_name_last() {
    check(
        "",
        "events",
        json!({
            "metadata": {"name": "e.1", "creationTimestamp": NOW},
            "involvedObject": {"kind": "Pod", "name": "p"}, "reason": "Started", "type": "Normal",
            "message": "Started container a\n", "source": {"component": "edged", "host": "n"},
            "firstTimestamp": "2026-03-01T11:00:00Z", "lastTimestamp": "2026-03-01T11:59:00Z", "count": 4,
        }),
        &[
            ("Last Seen", "60s"),
            ("Type", "Normal"),
            ("Reason", "Started"),
            ("Object", "pod/p"),
            ("Subobject*", ""),
            ("Source*", "edged, n"),
            ("Message", "Started container a"),
            ("First Seen*", "60m"),
            ("Count*", "4"),
            ("Name*", "e.1"),
        ],
    );
}

#[test]
fn custom_resource_prints_its_columns_by_type() {
    let column =
        |name: &str, ty: &str, path: &str| json!({"name": name, "type": ty, "jsonPath": path});
    let crd = json!({"spec": {"group": "shop.example", "scope": "Namespaced",
    "names": {"plural": "fridges", "kind": "Fridge"},
    "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object"}},
        "additionalPrinterColumns": [
            column("Ready", "string", ".status.conditions[?(@.type==\"Ready\")].status"),
            column("Size", "integer", ".spec.size"),
            column("Since", "date", ".status.since"),
            column("Open", "boolean", ".spec.open"),
            column("Wrong", "integer", ".spec.open"),
            column("Absent", "string", ".spec.absent"),
        ]}]}});
    let catalog = Catalog::with_crds(&[crd]);
    let fridge = json!({"metadata": {"name": "f"}, "spec": {"size": 3, "open": true},
        "status": {"since": "2026-03-01T11:00:00Z", "conditions": [{"type": "Ready", "status": "True"}]}});

    let cells: Vec<String> = row(&catalog, "shop.example", "v1", "fridges", &fridge)
        .into_iter()
        .map(|(_, cell)| cell)
        .collect();
    assert_eq!(cells, ["f", "True", "3", "60m", "true", "null", "null"]);
}

#[test]
fn rows_carry_what_the_client_asked_for() {
    let resource = Catalog::builtin().find("", "v1", "configmaps").unwrap();
    let object = json!({"metadata": {"name": "c", "uid": "u"}, "data": {"a": "b"}});
    let of = |include: &str| {
        let list = json!({"resourceVersion": "7"});
        let table = table(&resource, &[&object], list, include, NOW.parse().unwrap());
        assert_eq!(table["metadata"]["resourceVersion"], "7");
        table["rows"][0]["object"].clone()
    };
    assert_eq!(of("None"), Value::Null);
    assert_eq!(of("Object"), object);
    assert_eq!(of("Metadata")["kind"], "PartialObjectMetadata");
    assert_eq!(of("")["metadata"]["uid"], "u");
}
