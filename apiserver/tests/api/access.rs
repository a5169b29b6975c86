//! Who may do what, over TLS and in the process; logs through a node.

use crate::support::*;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{AsyncBufReadExt, StreamExt, TryStreamExt};
use http_body_util::BodyExt;
use k8s_openapi::api::authorization::v1::SelfSubjectAccessReview;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Api, ListParams, LogParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Config, ResourceExt};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::json;
use skerry_apiserver::{ApiServer, NodeStream, NodeStreamError, NodeStreams, auth};
use std::os::unix::fs::PermissionsExt;
use std::pin::pin;
use std::sync::Arc;

async fn over_tls(server: &ApiServer, user: &str, groups: &[&str]) -> Client {
    rustls::crypto::ring::default_provider().install_default().ok();
    let kubeconfig = Kubeconfig::from_yaml(&server.kubeconfig(user, groups).unwrap()).unwrap();
    let options = KubeConfigOptions::default();
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
    Client::try_from(config).unwrap()
}

/// A client with nothing but `token`, or with nothing at all.
async fn with_token(server: &ApiServer, token: Option<&str>) -> Client {
    rustls::crypto::ring::default_provider().install_default().ok();
    let mut config = Config::new(server.url().parse().unwrap());
    let authority = CertificateDer::from_pem_slice(server.authority().as_bytes()).unwrap();
    config.root_cert = Some(vec![authority.to_vec()]);
    config.auth_info.token = token.map(|token| token.to_owned().into());
    Client::try_from(config).unwrap()
}

#[tokio::test]
async fn kubeconfig_works_over_tls_for_reads_writes_and_watches() {
    let server = Server::start().await;
    let client = over_tls(&server.api, "admin", &[auth::MASTERS]).await;
    assert!(client.apiserver_version().await.unwrap().git_version.contains("+skerry"));
    let maps = config_maps(&client);
    create(&maps, json!({"metadata": {"name": "a"}})).await;
    let stream = watcher(maps.clone(), watcher::Config::default().streaming_lists());
    let mut stream = pin!(stream);
    loop {
        let event = within("the watcher", stream.next()).await.unwrap().unwrap();
        if matches!(event, Event::InitDone) {
            break;
        }
    }
    create(&config_maps(&server.admin()), json!({"metadata": {"name": "b"}})).await;
    let event = within("the watcher", stream.next()).await.unwrap().unwrap();
    assert!(matches!(event, Event::Apply(object) if object.name_any() == "b"));
    server.api.shutdown().await;
}

#[tokio::test]
async fn roles_are_refused_what_they_do_not_need() {
    let server = Server::start().await;
    let secrets = |user: &Client| Api::<Secret>::namespaced(user.clone(), "default");
    let viewer = over_tls(&server.api, "eva", &[auth::VIEWER]).await;
    config_maps(&viewer).list(&ListParams::default()).await.unwrap();
    let (code, reason, message) = refused(secrets(&viewer).list(&ListParams::default()).await);
    assert_eq!((code, reason.as_str()), (403, "Forbidden"));
    assert_eq!(
        message,
        "secrets is forbidden: User \"eva\" cannot list resource \"secrets\" in API group \"\" \
         in the namespace \"default\""
    );
    let cloudcore = server.api.client("cloudcore", &[auth::CLOUDCORE]);
    secrets(&cloudcore).list(&ListParams::default()).await.unwrap();
    let maps = config_maps(&cloudcore);
    let attempt = maps.create(&PostParams::default(), &config_map("a", "1")).await;
    assert_eq!(refused(attempt).0, 403);
    let nobody = server.api.client("nobody", &[]);
    assert_eq!(refused(config_maps(&nobody).get("kube-root-ca.crt").await).0, 403);
}

#[tokio::test]
async fn token_opens_what_its_group_may_and_a_wrong_one_nothing() {
    let server = Server::start().await;
    let token = server.api.token("ann", &[auth::MASTERS]).unwrap();
    let ann = with_token(&server.api, Some(&token)).await;
    config_maps(&ann).list(&ListParams::default()).await.unwrap();
    let wrong = with_token(&server.api, Some("guess")).await;
    assert_eq!(refused(config_maps(&wrong).list(&ListParams::default()).await).0, 401);
    let anonymous = with_token(&server.api, None).await;
    assert_eq!(refused(config_maps(&anonymous).list(&ListParams::default()).await).0, 401);
    anonymous.apiserver_version().await.unwrap();
    let (code, _, text) = send(&anonymous, "GET", "/readyz", &[], b"").await;
    assert_eq!((code, text.as_str()), (200, Some("ok")));
}

#[tokio::test]
async fn certificate_of_another_authority_is_not_let_in() {
    let (here, there) = (Server::start().await, Server::start().await);
    let kubeconfig = there.api.kubeconfig("admin", &[auth::MASTERS]).unwrap();
    let mut kubeconfig = Kubeconfig::from_yaml(&kubeconfig).unwrap();
    let own = Kubeconfig::from_yaml(&here.api.kubeconfig("x", &[]).unwrap()).unwrap();
    kubeconfig.clusters = own.clusters;
    rustls::crypto::ring::default_provider().install_default().ok();
    let options = KubeConfigOptions::default();
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
    let client = Client::try_from(config).unwrap();
    let outcome = config_maps(&client).list(&ListParams::default()).await;
    assert!(outcome.is_err(), "{outcome:?}");
    assert!(!matches!(outcome, Err(kube::Error::Api(_))), "refused before any answer");
}

#[tokio::test]
async fn reviews_answer_what_the_rules_say() {
    let server = Server::start().await;
    let ask = async |client: Client, verb: &str, resource: &str| {
        let review: SelfSubjectAccessReview = parse(json!({"spec": {"resourceAttributes":
            {"verb": verb, "resource": resource, "namespace": "default"}}}));
        let reviews: Api<SelfSubjectAccessReview> = Api::all(client);
        let answer = reviews.create(&PostParams::default(), &review).await.unwrap();
        answer.status.unwrap().allowed
    };
    assert!(ask(server.admin(), "delete", "secrets").await);
    let viewer = server.api.client("eva", &[auth::VIEWER]);
    assert!(ask(viewer.clone(), "get", "pods").await);
    assert!(!ask(viewer, "delete", "pods").await);
}

#[tokio::test]
async fn keys_are_private_and_the_authority_outlives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let server = ApiServer::start(config(dir.path())).await.unwrap();
    let authority = server.authority().to_owned();
    server.token("ann", &[auth::VIEWER]).unwrap();
    server.shutdown().await;
    for file in ["ca.key", "server.key", "tokens"] {
        let mode = std::fs::metadata(dir.path().join("pki").join(file)).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600, "{file}");
    }
    let certificate = std::fs::read(dir.path().join("pki/server.crt")).unwrap();
    let server = ApiServer::start(config(dir.path())).await.unwrap();
    assert_eq!(server.authority(), authority);
    server.shutdown().await;
    assert!(std::fs::read(dir.path().join("pki/server.crt")).unwrap() == certificate);

    let mut renamed = config(dir.path());
    renamed.hostnames = vec!["api.example.com".into()];
    let server = ApiServer::start(renamed).await.unwrap();
    assert_eq!(server.authority(), authority);
    assert!(server.kubeconfig("a", &[]).unwrap().contains("https://api.example.com:"));
    server.shutdown().await;
    assert!(std::fs::read(dir.path().join("pki/server.crt")).unwrap() != certificate);
}

/// A node that answers each path with the path.
struct Echo;

impl NodeStreams for Echo {
    fn open(
        &self,
        node: &str,
        path: &str,
    ) -> BoxFuture<'static, Result<NodeStream, NodeStreamError>> {
        let (node, text) = (node.to_owned(), format!("{node} {path}\nsecond line\n"));
        Box::pin(async move {
            if node == "away" {
                return Err(NodeStreamError::NotConnected { node });
            }
            let lines = vec![Ok(Bytes::from(text))];
            Ok(NodeStream { status: 200, body: futures::stream::iter(lines).boxed() })
        })
    }
}

#[tokio::test]
async fn logs_come_from_the_node_of_the_pod() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.node_streams = Some(Arc::new(Echo));
    let server = ApiServer::start(config).await.unwrap();
    let pods = pods(&server.client("admin", &[auth::MASTERS]));
    let on = |name: &str, node: &str| {
        let mut object = pod(name);
        object["spec"]["nodeName"] = node.into();
        object
    };
    create(&pods, on("p", "n1")).await;
    let params = LogParams { follow: true, tail_lines: Some(5), ..LogParams::default() };
    let lines = pods.log_stream("p", &params).await.unwrap().lines();
    let lines: Vec<String> = within("the log", lines.try_collect()).await.unwrap();
    assert_eq!(lines[0], "n1 /containerLogs/default/p/c?follow=true&tailLines=5");
    assert_eq!(lines[1], "second line");

    create(&pods, on("q", "away")).await;
    let (code, _, message) = refused(pods.logs("q", &LogParams::default()).await);
    assert_eq!(code, 503);
    assert!(message.contains("node `away` is not connected"), "{message}");
    create(&pods, pod("unbound")).await;
    assert_eq!(refused(pods.logs("unbound", &LogParams::default()).await).0, 400);
    server.shutdown().await;
}

#[tokio::test]
async fn client_in_the_process_streams_a_large_list() {
    let server = Server::start().await;
    let maps = config_maps(&server.admin());
    for n in 0..30 {
        let big: ConfigMap = parse(json!({
            "metadata": {"name": format!("big-{n}")}, "data": {"x": "y".repeat(20_000)},
        }));
        maps.create(&PostParams::default(), &big).await.unwrap();
    }
    let over_tls = over_tls(&server.api, "admin", &[auth::MASTERS]).await;
    for client in [server.admin(), over_tls] {
        let list = config_maps(&client).list(&ListParams::default()).await.unwrap();
        assert!(list.items.len() >= 30);
    }
    let gzip = [("accept-encoding", "gzip")];
    let request = http::Request::get("/api/v1/namespaces/default/configmaps")
        .header(gzip[0].0, gzip[0].1)
        .body(kube::client::Body::empty())
        .unwrap();
    let body = server.admin().send(request).await.unwrap().into_body();
    let packed = body.collect().await.unwrap().to_bytes();
    assert!(packed.len() < 100_000 && packed.starts_with(&[0x1f, 0x8b]));
}

#[tokio::test]
async fn openapi_2_is_there_in_json_and_in_protobuf_for_clients_that_ask() {
    let server = Server::start().await;
    let (code, _, document) = send(&server.admin(), "GET", "/openapi/v2", &[], b"").await;
    assert_eq!((code, document["swagger"].as_str()), (200, Some("2.0")));
    let accept = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";
    let request = http::Request::get("/openapi/v2?timeout=32s").header("accept", accept);
    let request = request.body(kube::client::Body::empty()).unwrap();
    let (head, body) = server.admin().send(request).await.unwrap().into_parts();
    assert_eq!(head.headers["content-type"], accept.replace('@', "."));
    let bytes = body.collect().await.unwrap().to_bytes();
    assert!(bytes.starts_with(b"\x0a\x032.0\x12"), "{bytes:?}");
}
