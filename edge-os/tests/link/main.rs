//! The agent against a cloud that is played from the protocol: join, register, push, cut, restart.
//!
//! There is no container runtime in these tests: the pod engine waits for one, everything else goes on.

mod cloud;
mod devices;
mod flood;
mod jobs;
mod owed;
mod transports;
mod tunnel;

use cloud::{Cloud, Session};
use serde_json::{Value, json};
use skerry_edge::agent::{self, AgentError};
use skerry_edge::config::Config;
use skerry_protocol::Operation;
use std::path::Path;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const OURS: &str = "digest,window,batch,lease,receipts,renew,qualify,history,beat=25";

struct Node {
    stop: CancellationToken,
    task: JoinHandle<Result<(), AgentError>>,
}

impl Node {
    fn start(dir: &Path, cloud: &Cloud) -> Self {
        Self::start_with(dir, cloud, "")
    }

    /// The text of a configuration; `more` are lines of it.
    fn text(dir: &Path, cloud: &Cloud, more: &str) -> String {
        let dir = dir.display();
        format!(
            "nodeName: edge1\nhub: wss://127.0.0.1:{}\nquic: off\nenrol: https://127.0.0.1:{}\ntoken: {}\n\
             dir: {dir}/edge\npodLogDir: {dir}/logs\nruntimeSocket: {dir}/none.sock\nlabels: {{site: lisbon}}\nnodeIP: 192.0.2.2\n{more}",
            cloud.hub_port(),
            cloud.enrol_port,
            cloud.token(),
        )
    }

    /// `more` are lines of the configuration.
    fn start_with(dir: &Path, cloud: &Cloud, more: &str) -> Self {
        let text = Self::text(dir, cloud, more);
        let config = Config::parse(Path::new("edge.yaml"), &text).expect("a configuration");
        let stop = CancellationToken::new();
        let task = tokio::spawn(agent::run(config, stop.clone()));
        Self { stop, task }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.expect("no panic").expect("an orderly end");
    }
}

fn pod(name: &str, uid: &str, rv: &str) -> Value {
    json!({"kind": "Pod", "apiVersion": "v1",
        "metadata": {"name": name, "namespace": "default", "uid": uid, "resourceVersion": rv},
        "spec": {"nodeName": "edge1", "containers": [{"name": "c", "image": "registry.local/busybox:1"}]}})
}

fn stored(dir: &Path, key: &str) -> Option<(String, String)> {
    let database = rusqlite::Connection::open(dir.join("edge/state.db")).expect("a database");
    database
        .query_row("SELECT uid, rv FROM objects WHERE key = ?1", [key], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .ok()
}

async fn joined(dir: &Path, cloud: &Cloud, capabilities: Option<&'static str>) -> (Node, Session) {
    let node = Node::start(dir, cloud);
    let session = cloud.accept(capabilities).await;
    (node, session)
}

/// `more` are lines of the configuration.
async fn joined_with(
    dir: &Path,
    cloud: &Cloud,
    capabilities: Option<&'static str>,
    more: &str,
) -> (Node, Session) {
    let node = Node::start_with(dir, cloud, more);
    let session = cloud.accept(capabilities).await;
    (node, session)
}

#[tokio::test]
async fn node_joins_registers_and_keeps_its_lease() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let (node, mut session) = joined(dir.path(), &cloud, None).await;
    {
        let requests = cloud.requests.lock().expect("no panic");
        assert_eq!(requests.len(), 1);
        assert!(requests[0].0.starts_with("Bearer ey"), "the CA's hash is not sent");
        assert_eq!(requests[0].0.split('.').count(), 3);
        assert_eq!(requests[0].1, "edge1");
    }
    assert_eq!(session.path, "/e632aba927ea4ac2b575ec1603d56f10/edge1/events");
    for (name, value) in
        [("node_id", "edge1"), ("ConnectionUse", "msg"), ("Skerry-Capabilities", OURS)]
    {
        assert_eq!(session.headers.get(name).and_then(|value| value.to_str().ok()), Some(value));
    }
    assert!(!session.headers.contains_key("Sec-WebSocket-Extensions"));

    let insert = session.until(Operation::Insert, "null/node/edge1").await;
    assert_eq!(session.seen.first().map(String::as_str), Some("keepalive node"));
    let object: Value = insert.content_as().expect("a Node");
    assert_eq!(object["metadata"]["labels"]["site"], "lisbon");
    assert_eq!(object["status"]["conditions"][3]["type"], "Ready");
    assert_eq!(object["status"]["addresses"][0]["address"], "192.0.2.2");
    session.serve(&insert).await;
    session.until(Operation::Query, "kube-node-lease/lease/edge1").await;
    let query = session.next().await;
    session.serve(&query).await;

    // A certificate is there: the next start does not ask for another.
    node.stop().await;
    let (node, _session) = joined(dir.path(), &cloud, None).await;
    assert_eq!(cloud.requests.lock().expect("no panic").len(), 1);
    node.stop().await;
}

#[tokio::test]
async fn push_is_in_the_database_before_it_is_acknowledged() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let (node, mut session) = joined(dir.path(), &cloud, None).await;
    let key = "default/pod/web";
    let id = session.push(Operation::Insert, key, &pod("web", "a", "5")).await;
    let ack = session.until_ack(&id).await;
    assert_eq!(stored(dir.path(), key), Some(("a".into(), "5".into())));
    assert_eq!(ack.content.get(), "\"OK\"");
    assert_eq!(ack.route.resource, key);

    // Repeated, late and unusable messages are acknowledged too, and change nothing.
    for content in [pod("web", "a", "5"), pod("web", "a", "4"), json!("nonsense")] {
        let id = session.push(Operation::Update, key, &content).await;
        session.until_ack(&id).await;
        assert_eq!(stored(dir.path(), key), Some(("a".into(), "5".into())));
    }
    let id = session.push(Operation::Delete, key, &pod("web", "a", "6")).await;
    session.until_ack(&id).await;
    assert_eq!(stored(dir.path(), key), None);
    node.stop().await;
}

#[tokio::test]
async fn after_a_cut_the_node_dials_again_and_tells_what_it_holds() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let (node, mut session) = joined(dir.path(), &cloud, Some("digest")).await;
    let digest = session.until(Operation::Query, "skerry/digest").await;
    assert_eq!(digest.content.get(), r#"{"objects":{}}"#);
    let id = session.push(Operation::Update, "default/pod/web", &pod("web", "a", "5")).await;
    session.until_ack(&id).await;
    session.answer(&digest, &json!("OK")).await;
    drop(session); // cut, without a close frame

    let mut session = cloud.accept(Some("digest")).await;
    let digest = session.until(Operation::Query, "skerry/digest").await;
    let content: Value = digest.content_as().expect("a digest");
    assert_eq!(content["objects"]["default/pod/web"], json!({"uid": "a", "rv": "5"}));
    node.stop().await;

    // And so it does after a restart.
    let (node, mut session) = joined(dir.path(), &cloud, Some("digest")).await;
    let digest = session.until(Operation::Query, "skerry/digest").await;
    let content: Value = digest.content_as().expect("a digest");
    assert!(content["objects"]["default/pod/web"].is_object());
    node.stop().await;
}

#[tokio::test]
async fn node_that_was_deleted_in_the_cluster_registers_again() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let (node, mut session) = joined(dir.path(), &cloud, None).await;
    let insert = session.until(Operation::Insert, "null/node/edge1").await;
    session.serve(&insert).await;
    let patch = session.until(Operation::Patch, "null/nodepatch/edge1").await;
    let gone = json!({"ErrStatus": {"code": 404, "reason": "NotFound", "message": "nodes \"edge1\" not found"}});
    session.answer(&patch, &json!({"Object": null, "Err": gone})).await;
    session.until(Operation::Insert, "null/node/edge1").await;
    node.stop().await;
}

#[tokio::test]
async fn refused_token_ends_a_node_that_has_nothing_to_run() {
    let text = "token validation failure, err: token is expired by 3 s";
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(Some(text)).await);
    let node = Node::start(dir.path(), &cloud);
    let error = node.task.await.expect("no panic").expect_err("no certificate");
    assert!(error.hint().is_some_and(|hint| hint.contains("skerry token create edge1")));
    let source = std::error::Error::source(&error).expect("the cause").to_string();
    assert!(source.contains(text), "{source}");
}

#[tokio::test]
async fn token_of_another_cluster_is_noticed_before_anything_is_sent() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    let other = Cloud::start(None).await;
    let text = format!(
        "nodeName: edge1\nhub: wss://127.0.0.1:{}\nenrol: https://127.0.0.1:{}\ntoken: {}\ndir: {}\n",
        cloud.hub_port(),
        cloud.enrol_port,
        other.token(),
        dir.path().display(),
    );
    let config = Config::parse(Path::new("edge.yaml"), &text).expect("a configuration");
    let error = agent::run(config, CancellationToken::new()).await.expect_err("refused");
    let source = std::error::Error::source(&error).expect("the cause").to_string();
    assert!(source.contains("the join token was made for"), "{source}");
    assert!(cloud.requests.lock().expect("no panic").is_empty());
}

#[tokio::test]
async fn broken_database_is_said_in_the_cluster_and_rebuilt_from_the_hub() {
    let (dir, cloud) = (tempfile::tempdir().expect("a directory"), Cloud::start(None).await);
    std::fs::create_dir_all(dir.path().join("edge")).expect("a directory");
    std::fs::write(dir.path().join("edge/state.db"), "this is no database".repeat(100))
        .expect("written");
    let (node, mut session) = joined(dir.path(), &cloud, Some("digest")).await;
    let digest = session.until(Operation::Query, "skerry/digest").await;
    session.until_text("DatabaseLost").await;
    let id = session.push(Operation::Update, "default/pod/web", &pod("web", "a", "5")).await;
    session.until_ack(&id).await;
    session.answer(&digest, &json!("OK")).await;
    session.until_text("DatabaseRebuilt").await;
    node.stop().await;
    let kept = std::fs::read_dir(dir.path().join("edge")).expect("a directory").flatten();
    assert_eq!(
        kept.filter(|entry| entry.file_name().to_string_lossy().contains(".corrupt-")).count(),
        1
    );
    assert!(stored(dir.path(), "default/pod/web").is_some());
}
