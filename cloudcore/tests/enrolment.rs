//! Joining over real TLS: certificates, tokens, and everything that is refused.

mod support;

use http_body_util::Full;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, DeleteParams, ListParams};
use skerry_cloudcore::{create_token, revoke_token};
use skerry_protocol::enrol::{Claims, ca_hash};
use std::time::Duration;
use support::{Answer, Cluster, Identity, fetch};

fn check(answer: &Answer, status: u16, text: &str) {
    assert_eq!((answer.status, answer.text().as_str()), (status, text));
}

#[tokio::test]
async fn certificates_are_kept_in_the_secrets_of_kubeedge() {
    let cluster = Cluster::start().await;
    let ca = cluster.ca().await;
    let value = |secret: &Secret, key: &str| secret.data.as_ref().expect("data")[key].0.clone();

    let secret = cluster.secrets("kubeedge").get("casecret").await.expect("casecret");
    assert_eq!(value(&secret, "cadata"), ca.to_vec());
    assert_eq!(value(&secret, "cakeydata")[..5], [0x30, 0x77, 2, 1, 1], "SEC 1, as Go writes it");
    let server = cluster.secrets("kubeedge").get("cloudcoresecret").await.expect("cloudcoresecret");
    let first = value(&server, "cloudcoredata");
    assert_eq!(value(&server, "cloudcorekeydata").len(), 121);
    assert_eq!(cluster.token("edge1").await.ca_hash(), ca_hash(&ca));

    // The same names: nothing changes. Other names: another server certificate of the same CA.
    let cluster = cluster.restart_cloud(&["127.0.0.1"]).await;
    let server = cluster.secrets("kubeedge").get("cloudcoresecret").await.expect("cloudcoresecret");
    assert_eq!(value(&server, "cloudcoredata"), first);
    let cluster = cluster.restart_cloud(&["127.0.0.1", "hub.example"]).await;
    let server = cluster.secrets("kubeedge").get("cloudcoresecret").await.expect("cloudcoresecret");
    assert_ne!(value(&server, "cloudcoredata"), first);
    assert_eq!(cluster.ca().await, ca);
    cluster.enrolled("edge1").await.connect(&cluster).await;
    cluster.stop().await;
}

#[tokio::test]
async fn token_is_good_for_one_node_and_one_key() {
    let cluster = Cluster::start().await;
    let token = cluster.token("edge1").await;

    let other = Identity::new("edge2");
    check(
        &other.join(&cluster, &token).await,
        401,
        "token validation failure, err: token is for node `edge1`, not for node `edge2`\n\
         hint: run `skerry token create edge2` for a new token",
    );
    let identity = Identity::new("edge1");
    assert_eq!(identity.join(&cluster, &token).await.status, 200);
    // The answer may have been lost: the same key may ask again.
    assert_eq!(identity.join(&cluster, &token).await.status, 200);
    let refused = Identity::new("edge1").join(&cluster, &token).await;
    assert_eq!(refused.status, 401);
    assert!(refused.text().contains("has been used already\nhint: "), "{}", refused.text());
    cluster.stop().await;
}

#[tokio::test]
async fn expired_revoked_and_foreign_tokens_say_so() {
    let cluster = Cluster::start().await;
    let identity = Identity::new("edge1");
    let csr = || identity.csr("system:node:edge1");

    let expired = create_token(&cluster.admin, "edge1", Duration::ZERO).await.expect("a token");
    let refused = identity.join(&cluster, &expired).await;
    assert_eq!(refused.status, 401);
    assert!(refused.text().starts_with("token validation failure, err: token is expired by "));
    assert!(refused.text().ends_with("hint: run `skerry token create edge1` for a new token"));

    let token = cluster.token("edge1").await;
    let whole = format!("Bearer {token}");
    let refused = identity.ask(&cluster, Some(&whole), csr()).await;
    assert!(refused.text().contains("invalid number of segments: 4"), "{}", refused.text());

    let records = ListParams::default().labels("skerry.dev/join-token");
    let secrets: Api<Secret> = cluster.secrets("kubeedge");
    for secret in secrets.list(&records).await.expect("records") {
        let name = secret.metadata.name.expect("a name");
        let id = name.strip_prefix("join-token-").expect("our name");
        assert!(revoke_token(&cluster.admin, id).await.expect("revoked"));
        assert!(!revoke_token(&cluster.admin, id).await.expect("gone already"));
    }
    let refused = identity.join(&cluster, &token).await;
    assert!(refused.text().contains("was revoked"), "{}", refused.text());

    let foreign = Claims { exp: i64::MAX, node: Some("edge1".into()), jti: Some("x".into()) };
    let bearer = format!("Bearer {}", foreign.sign(|_| [7; 32]));
    let refused = identity.ask(&cluster, Some(&bearer), csr()).await;
    assert!(refused.text().contains("token signature is invalid"), "{}", refused.text());

    let refused = identity.ask(&cluster, None, csr()).await;
    assert!(refused.text().starts_with("token validation failure, token is empty"));
    let refused = identity.ask(&cluster, Some("nonsense"), csr()).await;
    check(&refused, 401, "token validation failure, token cannot be split");
    cluster.stop().await;
}

#[tokio::test]
async fn request_must_name_the_node_that_asks() {
    let cluster = Cluster::start().await;
    let token = cluster.token("edge1").await;
    let bearer = format!("Bearer {}", token.jwt());
    let identity = Identity::new("edge1");
    let refused = identity.ask(&cluster, Some(&bearer), identity.csr("system:node:edge2")).await;
    assert_eq!(refused.status, 500);
    assert!(
        refused
            .text()
            .starts_with("failed to sign certs for edgenode edge1, err: it is for node `edge2`"),
        "{}",
        refused.text()
    );
    let refused = identity.ask(&cluster, Some(&bearer), b"no CSR".to_vec()).await;
    assert_eq!(refused.status, 500);
    let long = vec![0; 1024 * 1024 + 1];
    let refused = identity.ask(&cluster, Some(&bearer), long).await;
    assert!(refused.text().contains("over the bound of 1048576 bytes"), "{}", refused.text());
    // None of that used the token up.
    assert_eq!(identity.join(&cluster, &token).await.status, 200);
    cluster.stop().await;
}

#[tokio::test]
async fn certificate_is_renewed_by_itself_and_for_its_own_node_only() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let renewed = identity.ask(&cluster, None, identity.csr("system:node:edge1")).await;
    assert_eq!(renewed.status, 200, "{}", renewed.text());

    let as_other = Identity { node: "edge2".into(), ..identity };
    check(
        &as_other.ask(&cluster, None, as_other.csr("system:node:edge2")).await,
        401,
        "failed to verify the certificate for edgenode: edge2, err: it is for node `edge1`",
    );
    // A certificate of somebody else's CA.
    let stranger = Identity::new("edge1");
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "system:node:edge1");
    let own = params.self_signed(&stranger.key).expect("self-signed").der().clone();
    let stranger = Identity { certificate: Some(own), ..stranger };
    let refused = stranger.ask(&cluster, None, stranger.csr("system:node:edge1")).await;
    assert_eq!(refused.status, 401);
    assert!(
        refused.text().starts_with("failed to verify the certificate for edgenode: edge1, err: "),
        "{}",
        refused.text()
    );
    cluster.stop().await;
}

#[tokio::test]
async fn other_paths_and_methods_answer_as_kubeedge_does() {
    let cluster = Cluster::start().await;
    let mut link = cluster.enrolled("edge1").await.connect(&cluster).await;
    link.register().await;
    let get = async |method: &str, path: &str| {
        let request = http::Request::builder().method(method).uri(path).body(Full::default());
        fetch(cluster.cloud.enrol_addr(), None, request.expect("a request")).await
    };
    check(&get("GET", "/node/edge1").await, 200, "Node found");
    check(&get("GET", "/node/edge2").await, 404, "Node not found");
    check(&get("POST", "/ca.crt").await, 405, "405: Method Not Allowed");
    assert_eq!(get("GET", "/other").await.status, 404);
    cluster.nodes().delete("edge1", &DeleteParams::default()).await.expect("deleted");
    drop(link);
    cluster.stop().await;
}
