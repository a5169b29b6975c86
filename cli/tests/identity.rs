//! The real agent and the real CloudCore over a real API: joining, renewing, a CA that is replaced, revocation, and the
//! way back after a certificate has expired. No container runtime is there; nothing of this needs one.

mod support;

use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use serde_json::Value;
use skerry_apiserver::ApiServer;
use skerry_cloudcore::{
    CloudCore, ca_status, create_token, finish_ca, identities, revoke_node, rotate_ca,
};
use std::time::Duration;
use support::{ANY, Agent, start_api, start_cloud};

const PATIENCE: Duration = Duration::from_secs(40);
const NODE: &str = "edge1";

struct World {
    api: ApiServer,
    cloud: CloudCore,
    admin: kube::Client,
    dir: tempfile::TempDir,
}

impl World {
    /// Certificates of the node live for `ttl`.
    async fn start(ttl: Duration) -> Self {
        skerry_edge::tls::install_provider();
        let dir = tempfile::tempdir().expect("a folder");
        let api = start_api(dir.path()).await;
        let admin = api.client("admin", &["system:masters"]);
        let cloud = start_cloud(&api, ANY.into(), ANY.into(), ttl).await;
        Self { api, cloud, admin, dir }
    }

    fn write_token(&self, token: &str) {
        std::fs::write(self.dir.path().join("token"), token).expect("written");
    }

    async fn new_token(&self) {
        let ttl = Duration::from_secs(600);
        let token = create_token(&self.admin, NODE, ttl).await.expect("a token");
        self.write_token(&token.to_string());
    }

    fn agent(&self) -> Agent {
        let dir = self.dir.path().display();
        let text = format!(
            "nodeName: {NODE}\nhub: wss://{}\nquic: off\nenrol: https://{}\ntokenFile: {dir}/token\n\
             dir: {dir}/edge\npodLogDir: {dir}/logs\nruntimeSocket: {dir}/none.sock\nnodeIP: 192.0.2.2\n",
            self.cloud.hub_addr(),
            self.cloud.enrol_addr(),
        );
        Agent::start(&text)
    }

    async fn serial(&self) -> Option<String> {
        let list = identities(&self.admin).await.expect("records");
        list.into_iter().find(|identity| identity.node == NODE)?.record.serial
    }

    /// CA certificates that the node has stored.
    fn stored_cas(&self) -> usize {
        let text = std::fs::read_to_string(self.dir.path().join("edge/pki/ca.crt"));
        text.unwrap_or_default().matches("BEGIN CERTIFICATE").count()
    }

    async fn is_registered(&self) -> bool {
        let nodes: Api<Node> = Api::all(self.admin.clone());
        nodes.get_opt(NODE).await.expect("readable").is_some()
    }

    /// When the node's link began, Unix milliseconds; `None` without a link.
    async fn link_since(&self) -> Option<i64> {
        let links = self.cloud.links().await;
        links.iter().find(|link| link.node == NODE).map(|link| link.since)
    }

    async fn stop(self) {
        self.cloud.shutdown().await;
        self.api.shutdown().await;
    }
}

async fn until<F: Future<Output = bool>>(what: &str, mut check: impl FnMut() -> F) {
    let wait = async {
        while !check().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("in time: {what}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agent_renews_on_its_link_and_follows_a_new_ca_without_a_cut() {
    let world = World::start(Duration::from_secs(12)).await;
    world.new_token().await;
    let agent = world.agent();
    until("the node is registered", async || world.is_registered().await).await;
    let since = world.link_since().await.expect("linked");
    let first = world.serial().await.expect("issued");

    rotate_ca(&world.admin).await.expect("begun");
    until("the node trusts both CAs", async || world.stored_cas() == 2).await;
    until("the node has followed", async || {
        let status = ca_status(&world.admin).await.expect("a status");
        status.nodes.iter().any(|node| node.node == NODE && !node.is_behind())
    })
    .await;
    assert_ne!(world.serial().await.expect("issued"), first);
    finish_ca(&world.admin, false).await.expect("everybody has followed");
    until("the node trusts the new CA only", async || world.stored_cas() == 1).await;
    let second = world.serial().await.expect("issued");
    until("the certificate is renewed once more", async || {
        world.serial().await.expect("issued") != second
    })
    .await;
    assert_eq!(world.link_since().await, Some(since), "all on the first link");
    agent.stop().await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agent_comes_back_with_a_certificate_that_expired_while_it_was_away() {
    let world = World::start(Duration::from_secs(10)).await;
    world.new_token().await;
    let agent = world.agent();
    until("the node is registered", async || world.is_registered().await).await;
    agent.stop().await;
    // Used up long ago, on a real node.
    world.write_token("");
    let expired = world.serial().await.expect("issued");
    let end_s = identities(&world.admin).await.expect("records")[0].record.not_after_s;
    let end_s = end_s.expect("a time");
    until("the certificate has expired", async || jiff::Timestamp::now().as_second() > end_s).await;
    let agent = world.agent();
    until("it has a new certificate", async || {
        world.serial().await.is_some_and(|serial| serial != expired)
    })
    .await;
    until("its link is up", async || world.link_since().await.is_some()).await;
    agent.stop().await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoked_agent_is_cut_and_comes_back_with_a_new_token() {
    let world = World::start(skerry_cloudcore::NODE_CERTIFICATE_TTL).await;
    world.new_token().await;
    let agent = world.agent();
    until("the node is registered", async || world.is_registered().await).await;
    let revoked = world.serial().await.expect("issued");
    revoke_node(&world.admin, NODE).await.expect("recorded");
    until("the link is cut", async || world.link_since().await.is_none()).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(world.link_since().await, None, "and stays so");
    agent.stop().await;
    world.new_token().await;
    let agent = world.agent();
    until("the node has joined again", async || {
        world.serial().await.is_some_and(|serial| serial != revoked)
    })
    .await;
    until("its link is up", async || world.link_since().await.is_some()).await;
    agent.stop().await;
    world.stop().await;
}

/// Runs `skerry` against the world; exit code, standard output, standard error.
async fn skerry(world: &World, words: &str) -> (i32, String, String) {
    let kubeconfig = world.dir.path().join("kubeconfig");
    if !kubeconfig.exists() {
        let text = world.api.kubeconfig("admin", &["system:masters"]).expect("a kubeconfig");
        std::fs::write(&kubeconfig, text).expect("written");
    }
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_skerry"))
        .args(words.split(' '))
        .arg("--kubeconfig")
        .arg(kubeconfig)
        .output()
        .await
        .expect("it runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

async fn json(world: &World, words: &str, code: i32) -> Value {
    let (found, out, err) = skerry(world, &format!("{words} --output json")).await;
    assert_eq!(found, code, "{words}: {err}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{words}: {error}: {out}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verbs_make_list_and_revoke_what_identity_has() {
    let world = World::start(skerry_cloudcore::NODE_CERTIFICATE_TTL).await;
    let one = json(&world, "token create edge1 --ttl 1h", 0).await;
    assert_eq!((one["node"].as_str(), one["ttlSeconds"].as_i64()), (Some("edge1"), Some(3600)));
    assert_eq!(one["token"].as_str().expect("a token").split('.').count(), 4);
    let three = json(&world, "token create --prefix lisbon- --count 3", 0).await;
    assert_eq!(three["tokens"][2]["node"], "lisbon-3");
    json(&world, "token create --any-node-matching porto-* --uses 9", 0).await;
    let (code, out, _) = skerry(&world, "token list").await;
    assert_eq!((code, out.lines().count()), (0, 6), "{out}");
    assert!(out.lines().any(|line| line.contains("porto-*") && line.contains("0/9")), "{out}");
    let id = one["id"].as_str().expect("an id");
    let revoked = json(&world, &format!("token revoke {id} none"), 1).await;
    assert_eq!(revoked, serde_json::json!({"revoked": [id], "absent": ["none"]}));
    let (code, _, err) = skerry(&world, "token create Edge_1").await;
    assert_eq!((code, err.contains("`Edge_1` is no node name")), (2, true), "{err}");

    let (code, out, _) = skerry(&world, "node amnesty").await;
    assert_eq!((code, out.as_str()), (0, "unlimited\n"));
    assert_eq!(json(&world, "node amnesty 90d", 0).await["amnesty"], "90d");
    json(&world, "node revoke edge1", 0).await;
    json(&world, "node deny edge2", 0).await;
    let nodes = json(&world, "node identities", 0).await;
    assert_eq!(nodes["nodes"][0]["certificate"], "revoked");
    assert_eq!(nodes["nodes"][1]["denied"], true);
    json(&world, "node allow edge1", 0).await;
    let nodes = json(&world, "node identities", 0).await;
    assert_eq!(nodes["nodes"][0]["certificate"], "none");

    let (code, _, err) = skerry(&world, "ca finish").await;
    assert_eq!(code, 2);
    assert!(err.contains("no rotation is in progress") && err.contains("hint: "), "{err}");
    assert_eq!(json(&world, "ca rotate", 0).await["authorities"][1]["role"], "previous");
    let (code, out, _) = skerry(&world, "ca status").await;
    assert_eq!((code, out.contains("A rotation is in progress since")), (0, true), "{out}");
    let finished = json(&world, "ca finish", 0).await;
    assert_eq!(finished["authorities"][1]["role"], "retired");
    assert!(finished["finished"].is_string() && finished["rotatingSince"].is_null());
    world.stop().await;
}
