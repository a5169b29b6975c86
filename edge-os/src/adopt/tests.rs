use super::rows::{Stored, plural, read_rows, v2_key};
use super::*;
use skerry_edge_core::meta::{Effect, Meta};
use std::os::unix::fs::PermissionsExt;

const NODE: &str = "edge1";

fn pod(name: &str, uid: &str, rv: &str) -> Value {
    json!({"kind": "Pod", "apiVersion": "v1",
        "metadata": {"name": name, "namespace": "default", "uid": uid, "resourceVersion": rv, "managedFields": [{}]},
        "spec": {"nodeName": NODE, "containers": [{"name": "c", "image": "i"}]}})
}

fn object(kind: &str, name: &str, rv: &str) -> Value {
    json!({"kind": kind, "apiVersion": "v1", "data": {"k": "v"},
        "metadata": {"name": name, "namespace": "default", "uid": name, "resourceVersion": rv}})
}

fn node() -> Value {
    json!({"kind": "Node", "apiVersion": "v1", "status": {"capacity": {"cpu": "4"}},
        "metadata": {"name": NODE, "uid": "n", "resourceVersion": "3"}})
}

fn stored(key: &str, value: &Value) -> Stored {
    let kind = key.split('/').nth(1).expect("a key").to_owned();
    Stored { key: key.into(), kind, value: value.to_string() }
}

fn changes(objects: &[PlannedObject]) -> Vec<(&str, Change)> {
    objects.iter().map(|object| (object.path.as_str(), object.change)).collect()
}

/// A directory with KubeEdge's configuration, and with its database when there are rows.
fn directory(rows: &[Stored]) -> (tempfile::TempDir, KubeEdge, Config) {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name).display().to_string();
    let text = format!(
        "apiVersion: edgecore.config.kubeedge.io/v1alpha2
database: {{dataSource: {}}}
modules:
  edgeHub:
    httpServer: https://10.1.2.3:10002
    websocket: {{enable: true, server: '10.1.2.3:10000'}}
    tlsCaFile: {}
    tlsCertFile: {}
    tlsPrivateKeyFile: {}
  edged: {{hostnameOverride: {NODE}, tailoredKubeletConfig: {{readOnlyPort: 0}}}}
",
        at("edgecore.db"),
        at("ca/rootCA.crt"),
        at("certs/server.crt"),
        at("certs/server.key"),
    );
    let path = dir.path().join("edgecore.yaml");
    fs::write(&path, text).expect("written");
    let (kubeedge, config) = read_configuration(&path).expect("a configuration");
    if !rows.is_empty() {
        let connection = Connection::open(&kubeedge.database).expect("opens");
        connection
            .execute_batch("CREATE TABLE meta (key text, type text, value text, PRIMARY KEY (key))")
            .expect("made");
        for row in rows {
            connection
                .execute("INSERT INTO meta VALUES (?1, ?2, ?3)", [&row.key, &row.kind, &row.value])
                .expect("inserted");
        }
    }
    (dir, kubeedge, config)
}

/// A certificate of the node that is valid from that year on; PEM of key and certificate.
fn certificate(name: &str, year: i32) -> (String, String) {
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.not_before = rcgen::date_time_ymd(year, 1, 1);
    let certificate = params.self_signed(&key).expect("signed");
    (key.serialize_pem(), certificate.pem())
}

#[test]
fn rows_of_kubeedge_become_ours_and_what_is_of_no_use_stays_behind() {
    let mut answered = pod("web", "a", "9");
    answered["status"] = json!({"phase": "Running"});
    let mut foreign = pod("other", "f", "4");
    foreign["spec"]["nodeName"] = json!("edge2");
    let rows = [
        stored("default/pod/web", &pod("web", "a", "5")),
        stored("default/podpatch/web", &answered),
        stored("default/podpatch/gone", &pod("gone", "g", "9")),
        stored("default/pod/other", &foreign),
        stored("default/configmap/web", &object("ConfigMap", "web", "x7")),
        // What KubeEdge keeps of an object that was not found.
        stored("default/configmap/none", &json!({"ErrStatus": {"status": "Failure", "code": 404}})),
        stored("default/device/lamp", &object("Device", "lamp", "2")),
        stored("kube-node-lease/lease/edge1", &object("Lease", NODE, "2")),
        stored("null/node/edge1", &node()),
        Stored { value: "{".into(), ..stored("default/secret/half", &json!({})) },
    ];
    let (rows, objects) = import(NODE, &rows);
    assert_eq!(
        changes(&objects),
        [
            ("default/pod/web", Change::Import),
            ("default/pod/other", Change::Import),
            ("default/configmap/web", Change::Import),
            ("default/configmap/none", Change::Skip),
            ("default/device/lamp", Change::Import),
            ("null/node/edge1", Change::Import),
            ("default/secret/half", Change::Skip),
        ]
    );
    let web = rows.iter().find(|row| row.path == "default/pod/web").expect("imported");
    assert_eq!((web.uid.as_str(), web.rv.as_str()), ("a", "9"));
    assert!(web.json.contains("Running") && !web.json.contains("managedFields"), "{}", web.json);
    let (meta, effects) = Meta::restore(NODE, rows, []);
    assert_eq!(meta.len(), 5);
    let runs = effects.iter().filter(|effect| matches!(effect, Effect::PodUpsert(_))).count();
    assert_eq!(runs, 1, "a pod of another node is not run");
}

#[test]
fn adoption_is_one_rename_and_leaves_kubeedges_files_as_they_were() {
    let rows = [stored("default/pod/web", &pod("web", "a", "5"))];
    let (_dir, kubeedge, config) = directory(&rows);
    let (key, certificate) = certificate("system:node:edge1", 2024);
    for (path, text) in [
        (&kubeedge.ca_file, &certificate),
        (&kubeedge.certificate_file, &certificate),
        (&kubeedge.key_file, &key),
    ] {
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, text).expect("written");
    }
    let before = fs::read(&kubeedge.database).expect("the database");
    let (ca, identity) =
        read_credentials(&kubeedge, NODE).expect("readable").expect("a certificate");

    let (rows, _) = import(NODE, &read_copy(&kubeedge.database).expect("read"));
    let credentials = Some((ca, identity.pem));
    // What an attempt that was cut off has left.
    make_directory(&config.dir).expect("made");
    fs::write(suffixed(&config.database(), ".adopting"), "half").expect("written");
    let taken_over = HashMap::from([("id".to_owned(), "hash".to_owned())]);
    carry_out_adopt(&config, &rows, &taken_over, credentials).expect("done");

    assert_eq!(fs::read(&kubeedge.database).expect("the database"), before);
    assert_eq!(meta_store::read(&config.database()).expect("ours").0.len(), 1);
    let pem = fs::read_to_string(config.pki().join("edge.pem")).expect("copied");
    assert_eq!(split_pem(&pem), (key, certificate));
    let mode = fs::metadata(config.pki().join("edge.pem")).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn certificate_of_another_node_is_refused() {
    let (_dir, kubeedge, _) = directory(&[]);
    let (key, certificate) = certificate("system:node:edge2", 2024);
    for (path, text) in [
        (&kubeedge.ca_file, &certificate),
        (&kubeedge.certificate_file, &certificate),
        (&kubeedge.key_file, &key),
    ] {
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, text).expect("written");
    }
    let error = read_credentials(&kubeedge, NODE).err().expect("refused");
    assert!(error.to_string().contains("system:node:edge2"), "{error}");
    fs::remove_file(&kubeedge.key_file).expect("removed");
    assert!(read_credentials(&kubeedge, NODE).expect("no error").is_none());
}

#[test]
fn release_brings_kubeedges_rows_up_to_date_in_both_tables() {
    let stale = [
        stored("default/pod/web", &pod("web", "a", "5")),
        stored("default/podpatch/web", &pod("web", "a", "4")),
        stored("default/pod/gone", &pod("gone", "g", "5")),
        stored("default/podpatch/gone", &pod("gone", "g", "5")),
        stored("default/configmap/same", &object("ConfigMap", "same", "1")),
        stored("default/configmap/none", &json!({"ErrStatus": {"code": 404}})),
        stored("null/node/edge1", &node()),
        stored("kube-node-lease/lease/edge1", &object("Lease", NODE, "2")),
    ];
    let (_dir, kubeedge, config) = directory(&stale);
    let mut labelled = node();
    labelled["metadata"]["labels"] = json!({"site": "lisbon"});
    labelled.as_object_mut().expect("an object").remove("status");
    let now = [
        stored("default/pod/web", &pod("web", "a", "8")),
        stored("default/secret/new", &object("Secret", "new", "9")),
        stored("default/configmap/same", &object("ConfigMap", "same", "1")),
        stored("null/node/edge1", &labelled),
    ];
    let (rows, _) = import(NODE, &now);
    make_directory(&config.dir).expect("made");
    meta_store::create(&config.database(), &rows, &HashMap::new()).expect("made");
    let stored = read_copy(&kubeedge.database).expect("read");
    let (puts, removes, objects) = export(NODE, rows, &stored, &json!({"made": true}));
    assert_eq!(
        changes(&objects),
        [
            ("default/configmap/none", Change::Remove),
            ("default/configmap/same", Change::Keep),
            ("default/pod/gone", Change::Remove),
            ("default/pod/web", Change::Write),
            ("default/secret/new", Change::Write),
            ("null/node/edge1", Change::Write),
        ]
    );
    let credentials = Some(("ca\n".to_owned(), {
        let (key, certificate) = certificate("system:node:edge1", 2025);
        format!("{key}{certificate}")
    }));
    carry_out_release(&config, &kubeedge, &puts, &removes, credentials).expect("done");

    let connection = Connection::open(&kubeedge.database).expect("opens");
    let keys: Vec<String> =
        read_rows(&connection).expect("rows").into_iter().map(|row| row.key).collect();
    assert_eq!(
        keys,
        [
            "default/configmap/same",
            "default/pod/web",
            "default/secret/new",
            "kube-node-lease/lease/edge1",
            "null/node/edge1",
        ]
    );
    let value = |key: &str| -> Value {
        let text: String = connection
            .query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0))
            .expect("a row");
        serde_json::from_str(&text).expect("JSON")
    };
    assert_eq!(value("default/pod/web")["metadata"]["resourceVersion"], "8");
    let node = value("null/node/edge1");
    assert_eq!(node["metadata"]["labels"]["site"], "lisbon");
    assert_eq!(node["status"]["capacity"]["cpu"], "4", "kubelet admits pods by it");
    let second: Vec<(String, String, i64)> = connection
        .prepare("SELECT key, group_version_resource, resource_version FROM meta_v2 ORDER BY key")
        .expect("a table")
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .expect("rows")
        .collect::<rusqlite::Result<_>>()
        .expect("rows");
    assert_eq!(second[0], ("/core/v1/nodes/null/edge1".into(), "/v1, Resource=nodes".into(), 3));
    assert_eq!(second[1].0, "/core/v1/pods/default/web");
    assert_eq!(second[2].0, "/core/v1/secrets/default/new");
    assert!(!config.database().exists());
    assert!(suffixed(&kubeedge.database, ".before-release").exists());
    assert_eq!(fs::read_to_string(&kubeedge.ca_file).expect("written"), "ca\n");
    assert!(read_credentials(&kubeedge, NODE).expect("readable").is_some());
}

#[test]
fn release_of_a_node_that_never_was_kubeedges_makes_its_database() {
    let (_dir, kubeedge, config) = directory(&[]);
    let now =
        [stored("default/pod/web", &pod("web", "a", "8")), stored("null/node/edge1", &node())];
    let (rows, _) = import(NODE, &now);
    make_directory(&config.dir).expect("made");
    meta_store::create(&config.database(), &rows, &HashMap::new()).expect("made");
    let (puts, removes, objects) = export(NODE, rows, &[], &node_status(&config));
    let expected = [("default/pod/web", Change::Write), ("null/node/edge1", Change::Write)];
    assert_eq!(changes(&objects), expected);
    carry_out_release(&config, &kubeedge, &puts, &removes, None).expect("done");
    let connection = Connection::open(&kubeedge.database).expect("opens");
    let rows = read_rows(&connection).expect("rows");
    assert_eq!(rows.len(), 2);
    let node: Value = serde_json::from_str(&rows[1].value).expect("JSON");
    assert_eq!(node["status"]["allocatable"]["pods"], "110");
    assert_ne!(node["status"]["capacity"]["memory"], "0Ki");
}

#[test]
fn node_of_kubeedge_is_not_run_before_it_was_taken_over() {
    let rows = [stored("default/pod/web", &pod("web", "a", "5"))];
    let (dir, _, config) = directory(&rows);
    let path = dir.path().join("edgecore.yaml");
    let text = check_ours(&path, &config).expect_err("not ours");
    assert!(text.contains("edgecore adopt --config"), "{text}");
    carry_out_adopt(&config, &[], &HashMap::new(), None).expect("done");
    check_ours(&path, &config).expect("ours");
}

#[test]
fn agent_that_runs_is_found_by_the_file_it_has_open() {
    let (_dir, mut kubeedge, _) = directory(&[stored("a/pod/b", &pod("b", "b", "1"))]);
    assert_eq!(running_kubeedge(&kubeedge), None, "this process does not count");
    let other = std::process::Command::new("sleep")
        .arg("60")
        .stdin(fs::File::open(&kubeedge.database).expect("opens"))
        .spawn();
    let mut other = other.expect("starts");
    let found = running_kubeedge(&kubeedge);
    other.kill().expect("ends");
    other.wait().expect("ends");
    let found = found.expect("found");
    assert!(found.contains(&format!("process {} (sleep)", other.id())), "{found}");

    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listens");
    kubeedge.local_port = listener.local_addr().expect("an address").port();
    assert!(running_kubeedge(&kubeedge).is_some_and(|text| text.contains("answers")));
}

#[test]
fn resources_are_named_as_kubernetes_guesses() {
    for (kind, name) in [
        ("pod", "pods"),
        ("endpoints", "endpoints"),
        ("networkpolicy", "networkpolicies"),
        ("ingress", "ingresses"),
    ] {
        assert_eq!(plural(kind), name);
    }
    let slice = json!({"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"name": "a", "namespace": "b"}});
    let (key, resource, ..) = v2_key(&slice).expect("a key");
    assert_eq!(key, "/discovery.k8s.io/v1/endpointslices/b/a");
    assert_eq!(resource, "discovery.k8s.io/v1, Resource=endpointslices");
}
