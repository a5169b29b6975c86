use super::*;
use crate::catalog::Catalog;
use proptest::prelude::*;

fn defaulted(group: &str, kind: &str, mut object: Value) -> Value {
    let version = if group == "autoscaling" { "v2" } else { "v1" };
    let resource = Catalog::builtin().find_kind(group, version, kind).expect("a served kind");
    apply(&resource, &mut object);
    object
}

#[test]
fn pod_gets_what_a_kubelet_and_a_scheduler_rely_on() {
    let pod = defaulted(
        "",
        "Pod",
        json!({"metadata": {"name": "p", "creationTimestamp": null}, "spec": {
        "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute"}],
        "volumes": [{"name": "a"}, {"name": "b", "secret": {"secretName": "s"}}],
        "containers": [{"name": "c", "image": "web:1", "ports": [{"containerPort": 80}],
            "resources": {"limits": {"cpu": "1"}},
            "readinessProbe": {"httpGet": {"port": 80}, "periodSeconds": 3}}]}}),
    );

    assert_eq!(pod["metadata"], json!({"name": "p"}));
    assert_eq!(
        pod["spec"],
        json!({
            "restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler",
            "terminationGracePeriodSeconds": 30, "securityContext": {}, "enableServiceLinks": true,
            "serviceAccountName": "default", "serviceAccount": "default",
            "priority": 0, "preemptionPolicy": "PreemptLowerPriority",
            "tolerations": [
                {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute"},
                {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
            ],
            "volumes": [{"name": "a", "emptyDir": {}}, {"name": "b", "secret": {"secretName": "s", "defaultMode": 420}}],
            "containers": [{"name": "c", "image": "web:1", "imagePullPolicy": "IfNotPresent",
                "ports": [{"containerPort": 80, "protocol": "TCP"}],
                "resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "1"}},
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                "readinessProbe": {"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "periodSeconds": 3,
                    "timeoutSeconds": 1, "successThreshold": 1, "failureThreshold": 3}}],
        })
    );
}

#[test]
fn defaulting_twice_changes_nothing() {
    let catalog = Catalog::builtin();
    for resource in catalog.resources() {
        let mut once = json!({"metadata": {"name": "x", "uid": "u"}, "spec": {
            "template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}, "ports": [{"port": 1}]}});
        apply(resource, &mut once);
        let mut twice = once.clone();
        apply(resource, &mut twice);
        assert_eq!(once, twice, "{}", resource.kind);
    }
}

#[test]
fn images_with_moving_tags_are_pulled_always() {
    for (image, policy) in [
        ("web", "Always"),
        ("web:latest", "Always"),
        ("web:1", "IfNotPresent"),
        ("host:5000/web", "Always"),
        ("host:5000/web:1", "IfNotPresent"),
        ("web@sha256:00", "IfNotPresent"),
        ("web:latest@sha256:00", "IfNotPresent"),
    ] {
        let pod = defaulted("", "Pod", json!({"spec": {"containers": [{"image": image}]}}));
        assert_eq!(pod["spec"]["containers"][0]["imagePullPolicy"], policy, "{image}");
    }
}

#[test]
fn deployment_rolls_by_quarters_and_a_template_gets_no_pod_fields() {
    let template = json!({"spec": {"containers": [{"name": "c", "image": "i:1"}]}});
    let deployment = defaulted("apps", "Deployment", json!({"spec": {"template": template}}));
    let spec = &deployment["spec"];
    assert_eq!(spec["replicas"], 1);
    assert_eq!(
        spec["strategy"],
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}})
    );
    assert_eq!(spec["template"]["spec"]["restartPolicy"], "Always");
    assert_eq!(spec["template"]["spec"].get("serviceAccountName"), None);
    assert_eq!(spec["template"]["spec"].get("tolerations"), None);

    let recreate =
        defaulted("apps", "Deployment", json!({"spec": {"strategy": {"type": "Recreate"}}}));
    assert_eq!(recreate["spec"]["strategy"], json!({"type": "Recreate"}));
}

#[test]
fn job_selects_its_pods_by_its_uid() {
    let job = json!({"metadata": {"name": "j", "uid": "u-1"}, "spec": {"template": {"spec": {}}}});
    let job = defaulted("batch", "Job", job);
    assert_eq!(
        job["spec"]["selector"],
        json!({"matchLabels": {"batch.kubernetes.io/controller-uid": "u-1"}})
    );
    assert_eq!(job["spec"]["template"]["metadata"]["labels"]["job-name"], "j");
    assert_eq!(job["spec"]["completions"], 1);

    let parallel = defaulted("batch", "Job", json!({"spec": {"parallelism": 3}}));
    assert_eq!(parallel["spec"].get("completions"), None);
    assert_eq!(parallel["spec"].get("selector"), None);
}

#[test]
fn secret_folds_plain_text_into_data() {
    let secret = defaulted(
        "",
        "Secret",
        json!({"data": {"a": "eA==", "b": "eQ=="}, "stringData": {"b": "new"}}),
    );
    assert_eq!(secret, json!({"type": "Opaque", "data": {"a": "eA==", "b": "bmV3"}}));
}

#[test]
fn service_port_targets_itself() {
    let service = defaulted("", "Service", json!({"spec": {"ports": [{"port": 80}]}}));
    assert_eq!(
        service["spec"]["ports"],
        json!([{"port": 80, "targetPort": 80, "protocol": "TCP"}])
    );
    assert_eq!(service["spec"]["type"], "ClusterIP");
    let external = defaulted("", "Service", json!({"spec": {"type": "ExternalName"}}));
    assert_eq!(external["spec"].get("ipFamilies"), None);
}

#[test]
fn free_form_json_keeps_its_nulls() {
    let revision =
        defaulted("apps", "ControllerRevision", json!({"data": {"a": null}, "revision": null}));
    assert_eq!(revision, json!({"data": {"a": null}}));
}

/// JSON whose keys are those that the defaults look at, with values of any type.
fn any_object() -> impl Strategy<Value = Value> {
    let keys = "(spec|template|metadata|labels|containers|env|valueFrom|fieldRef|volumes|secret|projected|sources|ports|strategy|rollingUpdate|resources|limits|tolerations|data|stringData|roleRef|subjects|names|selector|lifecycle|postStart|livenessProbe|httpGet|jobTemplate|ingress|egress|volumeClaimTemplates)";
    let leaf = prop_oneof![
        Just(Value::Null),
        Just(json!(true)),
        Just(json!(1)),
        Just(json!("RollingUpdate")),
        Just(json!([])),
        Just(json!({})),
    ];
    leaf.prop_recursive(6, 60, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            proptest::collection::btree_map(keys, inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_shape_of_json_makes_the_defaults_panic(object in any_object()) {
        for resource in Catalog::builtin().resources() {
            apply(resource, &mut object.clone());
        }
    }
}
