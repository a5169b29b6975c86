use super::*;
use crate::catalog::Catalog;
use crate::defaults;
use serde_json::json;

fn resource(kind: &str) -> std::sync::Arc<Resource> {
    let catalog = Catalog::builtin();
    let mut resources = catalog.resources();
    resources.find(|one| &*one.kind == kind).expect("a served kind").clone()
}

/// The object, defaulted and with the metadata that it needs.
fn object(kind: &str, mut fields: Value) -> Value {
    let resource = resource(kind);
    if fields["metadata"].is_null() {
        fields["metadata"] = json!({"name": "x"});
    }
    if resource.namespaced {
        fields["metadata"]["namespace"] = "ns".into();
    }
    defaults::apply(&resource, &mut fields);
    fields
}

fn texts(kind: &str, new: &Value, old: Option<&Value>) -> Vec<String> {
    let errors = validate(&resource(kind), new, old);
    errors.iter().map(|one| format!("{}: {}", one.field, one.message)).collect()
}

#[track_caller]
fn check(kind: &str, fields: Value, expected: &[&str]) {
    assert_eq!(texts(kind, &object(kind, fields), None), expected);
}

#[track_caller]
fn check_change(kind: &str, old: Value, change: impl FnOnce(&mut Value), expected: &[&str]) {
    let old = object(kind, old);
    let mut new = old.clone();
    change(&mut new);
    assert_eq!(texts(kind, &new, Some(&old)), expected);
}

fn web() -> Value {
    json!({"spec": {"containers": [{"name": "web", "image": "web:1"}]}})
}

fn deployment() -> Value {
    json!({"spec": {"selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "web", "image": "web:1"}]}}}})
}

#[test]
fn names_labels_and_owners_are_checked_for_every_kind() {
    check(
        "ConfigMap",
        json!({"metadata": {"name": "Bad_Name"}}),
        &[
            "metadata.name: Invalid value: \"Bad_Name\": must be a lowercase RFC 1123 subdomain: letters, digits, '-' or '.', with a letter or digit at both ends of each part",
        ],
    );
    check("ConfigMap", json!({"metadata": {"name": "kube-root-ca.crt"}}), &[]);
    check("ClusterRole", json!({"metadata": {"name": "system:node"}}), &[]);
    check("Namespace", json!({"metadata": {"name": "site-lisbon-01"}}), &[]);
    let errors = texts("Namespace", &json!({"metadata": {"name": "a.b"}}), None);
    assert!(
        errors[0].starts_with(
            "metadata.name: Invalid value: \"a.b\": must be a lowercase RFC 1123 label"
        )
    );
    let errors = texts(
        "Service",
        &object("Service", json!({"metadata": {"name": "1a"}, "spec": {"clusterIP": "None"}})),
        None,
    );
    assert!(errors[0].contains("DNS-1035"), "{errors:?}");
    let labels = json!({"metadata": {"name": "x", "labels": {"a b": "c"}}});
    assert_eq!(texts("ConfigMap", &object("ConfigMap", labels), None).len(), 1);
    let owners = json!({"metadata": {"name": "x", "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": ""}]}});
    check(
        "ConfigMap",
        owners,
        &["metadata.ownerReferences[0].uid: Invalid value: \"\": must not be empty"],
    );
    let long = "x".repeat(256 * 1024);
    check(
        "ConfigMap",
        json!({"metadata": {"name": "x", "annotations": {"a": long}}}),
        &["metadata.annotations: Too long: may not be more than 262144 bytes"],
    );
    assert_eq!(
        texts("ConfigMap", &json!({"metadata": {"name": "x"}}), None),
        ["metadata.namespace: Required value"]
    );
}

#[test]
fn good_objects_of_common_kinds_pass() {
    check("Pod", web(), &[]);
    check("Deployment", deployment(), &[]);
    check("DaemonSet", deployment(), &[]);
    check("ReplicaSet", deployment(), &[]);
    check("StatefulSet", deployment(), &[]);
    check("Service", json!({"spec": {"ports": [{"port": 80}], "selector": {"app": "web"}}}), &[]);
    check("Secret", json!({"stringData": {"a": "b"}}), &[]);
    let mut job = deployment();
    job["spec"]["template"]["spec"]["restartPolicy"] = "Never".into();
    check("Job", job.clone(), &[]);
    check("CronJob", json!({"spec": {"schedule": "*/5 * * * *", "jobTemplate": job}}), &[]);
}

#[test]
fn pod_needs_containers_with_names_images_and_known_volumes() {
    check("Pod", json!({"spec": {"containers": []}}), &["spec.containers: Required value"]);
    check(
        "Pod",
        json!({"spec": {"containers": [
            {"name": "a", "image": ""},
            {"name": "a", "image": "i:1", "ports": [{"containerPort": 70000}],
             "volumeMounts": [{"name": "none", "mountPath": "/a"}]},
        ]}}),
        &[
            "spec.containers[0].image: Required value",
            "spec.containers[1].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
            "spec.containers[1].volumeMounts[0].name: Not found: \"none\"",
            "spec.containers[1].name: Duplicate value: \"a\"",
        ],
    );
    check(
        "Pod",
        json!({"spec": {
            "volumes": [{"name": "v", "emptyDir": {}, "hostPath": {"path": "/a"}}, {"name": "v"}],
            "restartPolicy": "Sometimes",
            "containers": [{"name": "a", "image": "i:1", "livenessProbe": {},
                "resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1500m", "memory": "lots"}}}],
        }}),
        &[
            "spec.volumes[0]: Forbidden: may not specify more than 1 volume type",
            "spec.volumes[1].name: Duplicate value: \"v\"",
            "spec.containers[0].resources.limits[memory]: Invalid value: \"lots\": must be a quantity such as 500m or 64Mi",
            "spec.containers[0].resources.requests[memory]: Invalid value: \"lots\": must be a quantity such as 500m or 64Mi",
            "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1500m",
            "spec.containers[0].livenessProbe: Required value: must specify a handler type",
            "spec.restartPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"OnFailure\", \"Never\"",
        ],
    );
}

#[test]
fn pod_update_changes_images_and_adds_tolerations_only() {
    check_change("Pod", web(), |pod| pod["spec"]["containers"][0]["image"] = "web:2".into(), &[]);
    check_change(
        "Pod",
        web(),
        |pod| {
            let more = json!({"key": "a", "operator": "Exists"});
            pod["spec"]["tolerations"].as_array_mut().unwrap().push(more);
        },
        &[],
    );
    check_change("Pod", web(), |pod| pod["spec"]["activeDeadlineSeconds"] = 5.into(), &[]);
    check_change("Pod", web(), |pod| pod["status"] = json!({"phase": "Running"}), &[]);
    for (field, value) in
        [("tolerations", json!([])), ("hostNetwork", json!(true)), ("nodeName", json!("n"))]
    {
        check_change(
            "Pod",
            web(),
            |pod| pod["spec"][field] = value,
            &[&format!(
                "spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`, `spec.initContainers[*].image`, `spec.activeDeadlineSeconds`, `spec.tolerations` (only additions); changed: {field}"
            )],
        );
    }
    check_change(
        "Pod",
        web(),
        |pod| pod["spec"]["containers"] = json!([]),
        &["spec.containers: Forbidden: pod updates may not add or remove containers"],
    );
}

#[test]
fn selector_matches_the_template_and_stays() {
    let mut wrong = deployment();
    wrong["spec"]["template"]["metadata"]["labels"] = json!({"app": "other"});
    check(
        "Deployment",
        wrong,
        &[
            "spec.template.metadata.labels: Invalid value: {\"app\":\"other\"}: `selector` does not match template `labels`",
        ],
    );
    let mut empty = deployment();
    empty["spec"]["selector"] = json!({});
    check(
        "Deployment",
        empty,
        &["spec.selector: Invalid value: {}: empty selector is invalid for deployment"],
    );
    check_change(
        "Deployment",
        deployment(),
        |deployment| {
            deployment["spec"]["selector"]["matchLabels"]["tier"] = "a".into();
            deployment["spec"]["template"]["metadata"]["labels"]["tier"] = "a".into();
        },
        &[
            "spec.selector: Invalid value: {\"matchLabels\":{\"app\":\"web\",\"tier\":\"a\"}}: field is immutable",
        ],
    );
    let mut never = deployment();
    never["spec"]["template"]["spec"]["restartPolicy"] = "Never".into();
    check(
        "Deployment",
        never,
        &[
            "spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \"Always\"",
        ],
    );
}

#[test]
fn job_template_stays_and_restart_policy_is_not_always() {
    check(
        "Job",
        deployment(),
        &[
            "spec.template.spec.restartPolicy: Required value: valid values: \"OnFailure\", \"Never\"",
        ],
    );
    let mut job = deployment();
    job["spec"]["template"]["spec"]["restartPolicy"] = "Never".into();
    let old = object("Job", job);
    let mut new = old.clone();
    new["spec"]["template"]["spec"]["containers"][0]["image"] = "web:2".into();
    let errors = texts("Job", &new, Some(&old));
    assert_eq!(errors.len(), 1);
    assert!(errors[0].starts_with("spec.template: Invalid value: "), "{errors:?}");
    assert!(errors[0].ends_with(": field is immutable"));
    let cron = texts(
        "CronJob",
        &object("CronJob", json!({"spec": {"schedule": "nonsense", "jobTemplate": {}}})),
        None,
    );
    assert!(cron[0].starts_with("spec.schedule: Invalid value: \"nonsense\": "), "{cron:?}");
}

#[test]
fn config_maps_and_secrets_are_bounded_and_may_be_immutable() {
    check(
        "ConfigMap",
        json!({"data": {"a b": "x"}}),
        &[
            "data[a b]: Invalid value: \"a b\": a key must consist of at most 253 alphanumeric characters, '-', '_' or '.', and must not be '.' or begin with '..'",
        ],
    );
    let big = "x".repeat(1024 * 1024 + 1);
    check(
        "ConfigMap",
        json!({"data": {"a": big}}),
        &[": Too long: may not be more than 1048576 bytes"],
    );
    check_change(
        "ConfigMap",
        json!({"immutable": true, "data": {"a": "1"}}),
        |map| {
            map["data"]["a"] = "2".into();
            map["immutable"] = false.into();
        },
        &[
            "immutable: Forbidden: field is immutable when `immutable` is set",
            "data: Forbidden: field is immutable when `immutable` is set",
        ],
    );
    check(
        "Secret",
        json!({"data": {"a": "%%"}}),
        &["data[a]: Invalid value: \"…\": must be base64"],
    );
    check(
        "Secret",
        json!({"type": "kubernetes.io/tls", "data": {"tls.crt": ""}}),
        &["data[tls.key]: Required value"],
    );
    check_change(
        "Secret",
        json!({}),
        |secret| secret["type"] = "other".into(),
        &["type: Invalid value: \"other\": field is immutable"],
    );
}

#[test]
fn services_name_their_ports_and_keep_their_address() {
    check("Service", json!({"spec": {}}), &["spec.ports: Required value"]);
    check("Service", json!({"spec": {"clusterIP": "None"}}), &[]);
    check(
        "Service",
        json!({"spec": {"ports": [{"port": 80}, {"port": 80}]}}),
        &[
            "spec.ports[0].name: Required value",
            "spec.ports[1].name: Required value",
            "spec.ports[1]: Duplicate value: {\"port\":80,\"protocol\":\"TCP\"}",
        ],
    );
    check_change(
        "Service",
        json!({"spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 80}]}}),
        |service| service["spec"]["clusterIP"] = "10.96.0.10".into(),
        &["spec.clusterIP: Invalid value: \"10.96.0.10\": field is immutable"],
    );
}

#[test]
fn role_bindings_keep_their_role() {
    let binding = json!({"roleRef": {"kind": "Role", "name": "r"}, "subjects": [{"kind": "User", "name": "u"}]});
    check("RoleBinding", binding.clone(), &[]);
    let old = object("RoleBinding", binding);
    let mut new = old.clone();
    new["roleRef"]["name"] = "other".into();
    let errors = texts("RoleBinding", &new, Some(&old));
    assert!(errors[0].ends_with("cannot change roleRef"), "{errors:?}");
    check(
        "Role",
        json!({"rules": [{"apiGroups": [""], "resources": ["pods"]}]}),
        &["rules[0].verbs: Required value"],
    );
}

#[test]
fn no_kind_panics_on_wrong_types() {
    for wrong in [
        json!([]),
        json!("x"),
        json!(1),
        json!({"spec": []}),
        json!({"spec": {"template": "x", "selector": []}, "metadata": "m", "data": [], "roleRef": 1}),
    ] {
        for resource in Catalog::builtin().resources() {
            validate(resource, &wrong, Some(&wrong));
            validate(resource, &wrong, None);
        }
    }
}

#[test]
fn a_controller_revision_may_hold_anything_and_is_no_workload() {
    let part = json!({"spec": {"template": {"$patch": "replace"}}});
    check("ControllerRevision", json!({"revision": 1, "data": part}), &[]);
}
