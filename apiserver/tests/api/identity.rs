//! Tokens of service accounts and signed certificates.

use crate::support::*;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenReview};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{Api, DeleteParams, PostParams};
use kube::{Client, ResourceExt};
use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use skerry_apiserver::auth;
use x509_parser::prelude::{FromDer, X509Certificate};

async fn review(client: &Client, token: &str) -> Value {
    let reviews: Api<TokenReview> = Api::all(client.clone());
    let wanted = parse(json!({"spec": {"token": token}}));
    let answer = reviews.create(&PostParams::default(), &wanted).await.unwrap();
    serde_json::to_value(answer.status.unwrap()).unwrap()
}

#[tokio::test]
async fn token_of_a_service_account_ends_with_the_pod_that_it_is_bound_to() {
    let server = Server::start().await;
    let admin = server.admin();
    let accounts: Api<ServiceAccount> = Api::namespaced(admin.clone(), "default");
    create(&accounts, json!({"metadata": {"name": "robot"}})).await;
    let created = create(&pods(&admin), pod("p")).await;
    let request: TokenRequest = parse(json!({"spec": {
        "audiences": [], "expirationSeconds": 600,
        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": created.uid()},
    }}));
    let answer =
        accounts.create_token_request("robot", &PostParams::default(), &request).await.unwrap();
    let token = answer.status.unwrap().token.unwrap();
    let status = review(&admin, &token).await;
    assert_eq!(status["authenticated"], true);
    assert_eq!(status["user"]["username"], "system:serviceaccount:default:robot");
    let extra = &status["user"]["extra"]["authentication.kubernetes.io/pod-name"];
    assert_eq!(extra, &json!(["p"]));

    // It opens the API under the account's name, which has no rights yet.
    let bearer = format!("Bearer {token}");
    let headers = [("authorization", bearer.as_str())];
    let plain = anonymous(&server).await;
    let (code, _, text) = send(&plain, "GET", "/api/v1/pods", &headers, b"").await;
    assert_eq!(code, 403);
    assert!(text.to_string().contains("system:serviceaccount:default:robot"), "{text}");

    let other: TokenRequest = parse(json!({"spec": {"audiences": ["elsewhere"],
        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "another"}}}));
    let outcome = accounts.create_token_request("robot", &PostParams::default(), &other).await;
    assert_eq!(refused(outcome).0, 409);
    let short: TokenRequest = parse(json!({"spec": {"audiences": [], "expirationSeconds": 1}}));
    let outcome = accounts.create_token_request("robot", &PostParams::default(), &short).await;
    assert_eq!(refused(outcome).0, 422);

    pods(&admin).delete("p", &DeleteParams::default().grace_period(0)).await.unwrap();
    gone(&pods(&admin), "p").await;
    assert_eq!(review(&admin, &token).await["authenticated"], json!(false));
    let (code, _, _) = send(&plain, "GET", "/api/v1/pods", &headers, b"").await;
    assert_eq!(code, 401);
}

/// A client over TLS that sends no credentials of its own.
async fn anonymous(server: &Server) -> Client {
    rustls::crypto::ring::default_provider().install_default().ok();
    let mut config = kube::Config::new(server.api.url().parse().unwrap());
    let authority = CertificateDer::from_pem_slice(server.api.authority().as_bytes()).unwrap();
    config.root_cert = Some(vec![authority.to_vec()]);
    Client::try_from(config).unwrap()
}

fn request(organization: &str, name: &str, names: &[&str]) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.distinguished_name.push(DnType::OrganizationName, organization);
    params.subject_alt_names =
        names.iter().map(|name| SanType::DnsName((*name).try_into().unwrap())).collect();
    let key = KeyPair::generate().unwrap();
    params.serialize_request(&key).unwrap().pem().unwrap()
}

fn signing_request(name: &str, signer: &str, usage: &str, pem: &str) -> CertificateSigningRequest {
    use base64::Engine;
    let request = base64::engine::general_purpose::STANDARD.encode(pem);
    parse(json!({"metadata": {"name": name}, "spec": {
        "signerName": signer, "request": request, "username": "somebody else",
        "usages": ["digital signature", usage], "expirationSeconds": 3600,
    }}))
}

async fn approve(client: &Client, name: &str) -> kube::Result<CertificateSigningRequest> {
    let requests: Api<CertificateSigningRequest> = Api::all(client.clone());
    let mut live = requests.get(name).await.unwrap();
    live.status = Some(parse(json!({"conditions": [
        {"type": "Approved", "status": "True", "reason": "Test", "message": "by hand"}]})));
    requests.replace_subresource("approval", name, &PostParams::default(), &live).await
}

#[tokio::test]
async fn approved_request_of_a_kubelet_is_signed_and_a_wrong_one_fails() {
    let server = Server::start().await;
    let cloudcore = server.api.client("cloudcore", &[auth::CLOUDCORE]);
    let requests: Api<CertificateSigningRequest> = Api::all(cloudcore.clone());
    const SERVING: &str = "kubernetes.io/kubelet-serving";
    let pem = request("system:nodes", "system:node:n1", &["n1.example.com"]);
    let good = signing_request("good", SERVING, "server auth", &pem);
    let created = requests.create(&PostParams::default(), &good).await.unwrap();
    assert_eq!(created.spec.username.as_deref(), Some("cloudcore"));

    // A decision belongs to the `approval` path.
    let admin: Api<CertificateSigningRequest> = Api::all(server.admin());
    let mut early = created.clone();
    early.status = Some(parse(json!({"conditions": [{"type": "Approved", "status": "True"}]})));
    let outcome = admin.replace_subresource("status", "good", &PostParams::default(), &early).await;
    assert_eq!(refused(outcome).0, 422);

    approve(&cloudcore, "good").await.unwrap();
    let signed = eventually("the request is signed", || async {
        requests.get("good").await.unwrap().status?.certificate
    })
    .await;
    let der = CertificateDer::from_pem_slice(&signed.0).unwrap();
    let (_, certificate) = X509Certificate::from_der(&der).unwrap();
    assert_eq!(certificate.subject().to_string(), "CN=system:node:n1, O=system:nodes");
    let validity = certificate.validity();
    let left = validity.not_after.timestamp() - jiff::Timestamp::now().as_second();
    assert!((3000..=3600).contains(&left), "{left}");
    let usage = certificate.extended_key_usage().unwrap().unwrap().value.clone();
    assert!(usage.server_auth && !usage.client_auth);

    let pem = request("system:masters", "system:node:n1", &["n1.example.com"]);
    let wrong = signing_request("wrong", SERVING, "server auth", &pem);
    requests.create(&PostParams::default(), &wrong).await.unwrap();
    approve(&cloudcore, "wrong").await.unwrap();
    let failed = eventually("the request has failed", || async {
        let conditions = requests.get("wrong").await.unwrap().status?.conditions?;
        conditions.into_iter().find(|one| one.type_ == "Failed")
    })
    .await;
    assert!(failed.message.unwrap().contains("system:nodes"));

    let pem = request("team", "ann", &[]);
    let client =
        signing_request("client", "kubernetes.io/kube-apiserver-client", "client auth", &pem);
    admin.create(&PostParams::default(), &client).await.unwrap();
    let (code, ..) = refused(approve(&cloudcore, "client").await);
    assert_eq!(code, 403, "cloudcore decides about kubelets' servers only");
    approve(&server.admin(), "client").await.unwrap();
    eventually("the administrator's approval is followed", || async {
        requests.get("client").await.unwrap().status?.certificate
    })
    .await;
}

#[tokio::test]
async fn request_in_somebody_elses_name_has_their_rights_and_needs_the_right_to_ask() {
    let server = Server::start().await;
    let path = "/api/v1/namespaces/default/configmaps";
    let ask = async |user: &str, group: &str, headers: &[(&str, &str)]| {
        let client = server.api.client(user, &[group]);
        let (code, _, body) = send(&client, "GET", path, headers, b"").await;
        (code, body["message"].as_str().unwrap_or_default().to_owned())
    };
    let viewer = [("impersonate-user", "eva"), ("impersonate-group", auth::VIEWER)];
    assert_eq!(ask("admin", auth::MASTERS, &viewer).await.0, 200);
    let (code, message) = ask("admin", auth::MASTERS, &[("impersonate-user", "eva")]).await;
    assert_eq!(code, 403, "{message}");
    assert!(message.contains("User \"eva\" cannot list"), "{message}");
    let (code, message) = ask("mallory", auth::VIEWER, &viewer).await;
    assert_eq!(code, 403, "{message}");
    assert!(message.contains("impersonate"), "{message}");
    let node = [("impersonate-user", "system:node:n1"), ("impersonate-group", "system:nodes")];
    let (code, message) = ask("cloudcore", auth::CLOUDCORE, &node).await;
    assert_eq!(code, 403, "{message}");
    assert!(message.contains("User \"system:node:n1\""), "{message}");
    let master = [("impersonate-user", "x"), ("impersonate-group", auth::MASTERS)];
    assert_eq!(ask("cloudcore", auth::CLOUDCORE, &master).await.0, 403);
    assert_eq!(ask("admin", auth::MASTERS, &[("impersonate-group", "x")]).await.0, 400);
}
