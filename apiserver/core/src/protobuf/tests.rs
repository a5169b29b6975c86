use super::*;
use proptest::prelude::*;

/// A message under construction.
#[derive(Default, Clone)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn int(mut self, field: u64, value: i64) -> Self {
        self.varint(field << 3);
        self.varint(value as u64);
        self
    }

    fn bytes(mut self, field: u64, value: impl AsRef<[u8]>) -> Self {
        self.varint(field << 3 | 2);
        self.varint(value.as_ref().len() as u64);
        self.0.extend(value.as_ref());
        self
    }

    fn message(self, field: u64, value: Message) -> Self {
        self.bytes(field, value.0)
    }

    fn entry(self, field: u64, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.message(field, new().bytes(1, key).bytes(2, value))
    }

    fn body(self, api_version: &str, kind: &str) -> Vec<u8> {
        let type_meta = new().bytes(1, api_version).bytes(2, kind);
        let mut body = MAGIC.to_vec();
        body.extend(new().message(1, type_meta).bytes(2, self.0).bytes(3, "").bytes(4, "").0);
        body
    }
}

fn new() -> Message {
    Message::default()
}

/// ObjectMeta as Go writes it: empty strings, and an empty creation time.
fn metadata(name: &str) -> Message {
    let empty = new().bytes(2, "").bytes(3, "").bytes(4, "").bytes(5, "").bytes(6, "").int(7, 0);
    Message(new().bytes(1, name).0.into_iter().chain(empty.0).collect()).message(8, new())
}

fn deployment() -> Vec<u8> {
    let requests = new().entry(2, "cpu", new().bytes(1, "500m").0);
    let volume = new().bytes(1, "tmp").message(2, new().message(2, new().bytes(1, "")));
    let probe = new()
        .message(
            1,
            new().message(
                2,
                new().bytes(1, "/ok").message(2, new().int(1, 1).int(2, 0).bytes(3, "http")),
            ),
        )
        .int(2, 0);
    let container = new()
        .bytes(1, "web")
        .bytes(2, "web:1")
        .bytes(5, "")
        .message(6, new().bytes(1, "http").int(2, 0).int(3, 8080).bytes(4, "TCP").bytes(5, ""))
        .message(8, requests)
        .message(10, probe)
        .message(15, new().int(4, 0).int(5, 0))
        .int(16, 0);
    let pod = new().message(2, container).message(1, volume).bytes(3, "").int(4, 0).int(11, 0);
    let template = new().message(1, metadata("").entry(11, "app", "")).message(2, pod);
    let spec = new()
        .int(1, 0)
        .message(2, new().entry(1, "app", ""))
        .message(3, template)
        .message(4, new().bytes(1, ""))
        .int(5, 0);
    new()
        .message(1, metadata("web"))
        .message(2, spec)
        .message(3, new())
        .body("apps/v1", "Deployment")
}

#[test]
fn deployment_of_a_go_client_becomes_its_json() {
    assert_eq!(
        decode(&deployment()).unwrap(),
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "web"},
            "spec": {
                "replicas": 0,
                "selector": {"matchLabels": {"app": ""}},
                "strategy": {},
                "template": {
                    "metadata": {"labels": {"app": ""}},
                    "spec": {
                        "terminationGracePeriodSeconds": 0,
                        "volumes": [{"name": "tmp", "emptyDir": {}}],
                        "containers": [{
                            "name": "web", "image": "web:1",
                            "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                            "resources": {"requests": {"cpu": "500m"}},
                            "livenessProbe": {"httpGet": {"path": "/ok", "port": "http"}},
                            "securityContext": {"runAsUser": 0, "runAsNonRoot": false},
                        }],
                    },
                },
            },
            "status": {},
        })
    );
}

/// Recorded from kubectl 1.36.3: `create deployment web --image=web:1 --replicas=2 --port=80`, `create ingress i
/// --rule=a.b/c=svc:80`, `create role r --verb=get,list --resource=pods,deployments.apps`.
#[rustfmt::skip] // recorded bytes
const RECORDED: [&str; 3] = [
    "azhzAAoVCgdhcHBzL3YxEgpEZXBsb3ltZW50ErYBCh8KA3dlYhIAGgAiACoAMgA4AEIAWgoKA2FwcBIDd2ViEoQBCAISDAoKCgNhcHASA3dlYhpqChwKABIAGgAiACoAMgA4AEIAWgoKA2FwcBIDd2ViEkoSLAoDd2ViEgV3ZWI6MSoAMgoKABAAGFAiACoAQgBqAHIAgAEAiAEAkAEAogEAGgAyAEIASgBSAFgAYABoAIIBAIoBAJoBAMIBACICCgAoADgAGgwIABAAGAAgACgAOAAaACIA",
    "azhzAAofChRuZXR3b3JraW5nLms4cy5pby92MRIHSW5ncmVzcxJAChEKAWkSABoAIgAqADIAOABCABInGiUKA2EuYhIeChwKGgoCL2MSDSILCgNzdmMSBAoAEFAaBUV4YWN0GgIKABoAIgA=",
    "azhzAAokChxyYmFjLmF1dGhvcml6YXRpb24uazhzLmlvL3YxEgRSb2xlEkgKEQoBchIAGgAiACoAMgA4AEIAEhMKA2dldAoEbGlzdBIAGgRwb2RzEh4KA2dldAoEbGlzdBIEYXBwcxoLZGVwbG95bWVudHMaACIA",
];

#[test]
fn what_kubectl_sent_is_what_its_user_typed() {
    let [deployment, ingress, role] = RECORDED.map(|text| {
        let body = STANDARD.decode(text).expect("recorded in base64");
        decode(&body).expect("a body of kubectl")
    });

    assert_eq!(deployment["metadata"], json!({"name": "web", "labels": {"app": "web"}}));
    assert_eq!(deployment["spec"]["replicas"], 2);
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(container["image"], "web:1");
    assert_eq!(container["ports"], json!([{"containerPort": 80}]));
    assert_eq!(
        ingress["spec"]["rules"],
        json!([{"host": "a.b", "http": {"paths": [{"path": "/c", "pathType": "Exact",
            "backend": {"service": {"name": "svc", "port": {"number": 80}}}}]}}])
    );
    assert_eq!(
        role["rules"],
        json!([
            {"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"]},
            {"verbs": ["get", "list"], "apiGroups": ["apps"], "resources": ["deployments"]},
        ])
    );
}

#[test]
fn namespace_as_kubectl_creates_it() {
    let body = new().message(1, metadata("shop")).message(2, new()).message(3, new().bytes(1, ""));
    let expected = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}, "spec": {}, "status": {}});
    assert_eq!(decode(&body.body("v1", "Namespace")).unwrap(), expected);
}

#[test]
fn secret_data_is_base64_and_config_map_data_is_text() {
    let secret = new().message(1, metadata("s")).entry(2, "key", [0xff, 0x00]).bytes(3, "Opaque");
    let secret = decode(&secret.body("v1", "Secret")).unwrap();
    assert_eq!(secret["data"], json!({"key": "/wA="}));

    let map = new()
        .message(1, metadata("c"))
        .entry(2, "a", "x")
        .entry(2, "b", "")
        .body("v1", "ConfigMap");
    assert_eq!(decode(&map).unwrap()["data"], json!({"a": "x", "b": ""}));
}

#[test]
fn delete_options_are_found_in_every_group_and_keep_their_zero() {
    let options = new().int(1, 0).message(2, new().bytes(1, "u-1")).bytes(4, "Background");
    for api_version in ["v1", "apps/v1", "policy/v1", "meta.k8s.io/v1"] {
        let decoded = decode(&options.clone().body(api_version, "DeleteOptions")).unwrap();
        assert_eq!(decoded["gracePeriodSeconds"], 0);
        assert_eq!(decoded["preconditions"]["uid"], "u-1");
        assert_eq!(decoded["propagationPolicy"], "Background");
    }
}

#[test]
fn leases_events_and_reviews_decode_their_special_types() {
    let micro = new().int(1, 1_700_000_000).int(2, 5_000);
    let spec = new().bytes(1, "node-1").int(2, 40).message(4, micro);
    let lease =
        new().message(1, metadata("l")).message(2, spec).body("coordination.k8s.io/v1", "Lease");
    let lease = decode(&lease).unwrap();
    assert_eq!(lease["spec"]["renewTime"], "2023-11-14T22:13:20.000005Z");
    assert_eq!(lease["spec"]["leaseDurationSeconds"], 40);

    let time = new().int(1, 1_700_000_000).int(2, 5_000);
    let event = new().message(6, time.clone()).message(7, time).int(8, 1).body("v1", "Event");
    assert_eq!(decode(&event).unwrap()["firstTimestamp"], "2023-11-14T22:13:20Z");

    let attributes = new().bytes(1, "ns").bytes(2, "get").bytes(3, "").bytes(5, "pods");
    let review = new().message(2, new().message(1, attributes));
    let review =
        decode(&review.body("authorization.k8s.io/v1", "SelfSubjectAccessReview")).unwrap();
    let expected = json!({"namespace": "ns", "verb": "get", "resource": "pods"});
    assert_eq!(review["spec"]["resourceAttributes"], expected);

    let extra = new().message(5, new().bytes(1, "k").message(2, new().bytes(1, "a").bytes(1, "b")));
    let review = new().message(2, extra).body("authorization.k8s.io/v1", "SubjectAccessReview");
    assert_eq!(decode(&review).unwrap()["spec"]["extra"], json!({"k": ["a", "b"]}));
}

#[test]
fn token_requests_scales_and_evictions_are_known() {
    let request = new().message(2, new().bytes(1, "api").int(4, 600));
    let request = decode(&request.body("authentication.k8s.io/v1", "TokenRequest")).unwrap();
    assert_eq!(request["spec"], json!({"audiences": ["api"], "expirationSeconds": 600}));

    let scale =
        new().message(1, metadata("w")).message(2, new().int(1, 3)).body("autoscaling/v1", "Scale");
    assert_eq!(decode(&scale).unwrap()["spec"]["replicas"], 3);

    let eviction =
        new().message(1, metadata("p")).message(2, new().int(1, 0)).body("policy/v1", "Eviction");
    assert_eq!(decode(&eviction).unwrap()["deleteOptions"]["gracePeriodSeconds"], 0);
}

#[test]
fn roles_keep_the_empty_group() {
    let rule = new().bytes(1, "get").bytes(2, "").bytes(3, "pods");
    let role = new()
        .message(1, metadata("r"))
        .message(2, rule)
        .body("rbac.authorization.k8s.io/v1", "Role");
    let expected = json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}]);
    assert_eq!(decode(&role).unwrap()["rules"], expected);
}

#[test]
fn custom_resource_definition_schemas_decode_their_unions() {
    let props = new().bytes(5, "object").message(30, new().int(1, 1));
    let with_default = new().bytes(5, "integer").message(8, new().bytes(1, "3"));
    let root = new()
        .bytes(5, "object")
        .message(29, new().bytes(1, "a").message(2, props))
        .message(29, new().bytes(1, "b").message(2, with_default));
    let version = new().bytes(1, "v1").int(2, 1).int(3, 1).message(4, new().message(1, root));
    let crd = new().message(1, metadata("x")).message(2, new().message(7, version));
    let crd = decode(&crd.body("apiextensions.k8s.io/v1", "CustomResourceDefinition")).unwrap();
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    assert_eq!(schema["properties"]["a"]["additionalProperties"], true);
    assert_eq!(schema["properties"]["b"]["default"], 3);
}

#[test]
fn what_is_not_such_a_body_is_refused_with_a_code() {
    let code = |body: &[u8]| decode(body).unwrap_err().code;
    assert_eq!(code(b""), 400);
    assert_eq!(code(b"{\"kind\":\"Pod\"}"), 400);
    assert_eq!(code(&new().body("shop.example/v1", "Fridge")), 415);
    assert_eq!(code(&new().message(1, new().int(1, 3)).body("v1", "ConfigMap")), 400);
    assert_eq!(code(&new().message(1, new().bytes(1, [0xff])).body("v1", "ConfigMap")), 400);
}

#[test]
fn nesting_and_number_of_values_are_bounded() {
    let mut props = new();
    for _ in 0..400 {
        props = new().message(26, props); // `not`
    }
    let version = new().message(4, new().message(1, props));
    let crd = new().message(2, new().message(7, version));
    let error =
        decode(&crd.body("apiextensions.k8s.io/v1", "CustomResourceDefinition")).unwrap_err();
    assert!(error.message.contains("nested more than 100"), "{error}");

    let mut spec = new();
    for _ in 0..=VALUES_MAX {
        spec = spec.message(2, new());
    }
    let error = decode(&new().message(2, spec).body("v1", "Pod")).unwrap_err();
    assert!(error.message.contains("more than 200000 values"), "{error}");
}

#[test]
fn pointer_names_are_fields_of_the_table() {
    for name in POINTERS {
        let known =
            facts().definitions().iter().flat_map(|one| &one.fields).any(|f| &*f.name == *name);
        assert!(known, "{name}");
    }
    assert!(POINTERS.is_sorted());
}

#[test]
fn every_truncation_of_a_deployment_is_an_error_or_an_object() {
    let body = deployment();
    for len in 0..body.len() {
        if let Ok(value) = decode(&body[..len]) {
            assert!(value.is_object());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        for (api_version, kind) in [
            ("v1", "Pod"),
            ("v1", "DeleteOptions"),
            ("apiextensions.k8s.io/v1", "CustomResourceDefinition"),
        ] {
            let _ = decode(&Message(bytes.clone()).body(api_version, kind));
        }
        let _ = decode(&[MAGIC, &bytes].concat());
    }

    #[test]
    fn mangled_deployment_never_panics(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut body = deployment();
        let index = at.index(body.len());
        body[index] = byte;
        let _ = decode(&body);
    }
}
