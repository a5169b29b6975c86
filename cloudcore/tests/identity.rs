//! Identity over real TLS: what a token, a certificate and a CA are good for, from the first to the last day.

mod support;

use http_body_util::Full;
use kube::api::PostParams;
use rcgen::{CertificateParams, DnType, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use skerry_cloudcore::{
    Amnesty, allow_node, ca_status, create_batch_token, deny_node, finish_ca, identities,
    list_tokens, revoke_node, revoke_serial, revoke_token, rotate_ca, set_amnesty,
};
use skerry_protocol::Operation;
use skerry_protocol::capability::{self, Capabilities};
use skerry_protocol::certificate::{
    Bundle, CertificateReply, CertificateRequest, Der, bundle_resource, request_resource,
};
use skerry_protocol::enrol::{Claims, JoinToken};
use std::time::Duration;
use support::{Answer, Cluster, Identity, Link, PATIENCE, fetch};
use time::OffsetDateTime;
use tokio_tungstenite::tungstenite::Error as WsError;
use x509_parser::prelude::{FromDer, X509Certificate};

/// An edge of ours as far as certificates go.
const RENEW: Capabilities = Capabilities {
    digest: false,
    window: false,
    batch: false,
    lease: false,
    receipts: false,
    renew: true,
    qualify: false,
    history: false,
    beat: None,
};
const HOUR: Duration = Duration::from_secs(3600);

fn life_days(certificate: &[u8]) -> i64 {
    let (_, certificate) = X509Certificate::from_der(certificate).expect("a certificate");
    let validity = certificate.validity();
    (validity.not_after.timestamp() - validity.not_before.timestamp()) / 86_400
}

/// The text of a refused opening handshake.
fn refusal(result: Result<Link, WsError>) -> (u16, String) {
    match result {
        Err(WsError::Http(response)) => {
            let body = response.body().as_deref().unwrap_or_default();
            (response.status().as_u16(), String::from_utf8_lossy(body).into_owned())
        }
        Err(error) => panic!("not refused in words: {error}"),
        Ok(_) => panic!("accepted"),
    }
}

async fn until<F: Future<Output = bool>>(what: &str, mut check: impl FnMut() -> F) {
    let wait = async {
        while !check().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("in time: {what}"));
}

/// The CA of the cluster with its key, as the hub's machine has it.
async fn ca_issuer(cluster: &Cluster) -> Issuer<'static, KeyPair> {
    let secret = cluster.secrets("kubeedge").get("casecret").await.expect("casecret");
    let data = secret.data.expect("data");
    // SEC 1 to PKCS #8 by hand: the secret number is at byte 7, the point at the end.
    let sec1 = &data["cakeydata"].0;
    let inner = [&[0x30, 0x6b, 2, 1, 1, 4, 0x20], &sec1[7..39], &sec1[51..]].concat();
    let head = [
        0x30, 0x81, 0x87, 2, 1, 0, 0x30, 0x13, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 8,
        0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7, 4, 0x6d,
    ];
    let pkcs8 = [&head[..], &inner].concat();
    let key = KeyPair::from_pkcs8_der_and_sign_algo(
        &PrivatePkcs8KeyDer::from(pkcs8),
        &PKCS_ECDSA_P256_SHA256,
    );
    let der = CertificateDer::from(data["cadata"].0.clone());
    Issuer::from_ca_cert_der(&der, key.expect("a key")).expect("a CA")
}

/// A certificate for the node's key that ended so many seconds ago (or will end, when negative).
async fn ended(cluster: &Cluster, identity: Identity, ago_s: i64) -> Identity {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, format!("system:node:{}", identity.node));
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let end = OffsetDateTime::now_utc() - time::Duration::seconds(ago_s);
    params.not_before = end - time::Duration::days(30);
    params.not_after = end;
    let issued = params.signed_by(&identity.key, &ca_issuer(cluster).await).expect("signed");
    Identity { certificate: Some(issued.der().clone()), ..identity }
}

/// Asks for a certificate over HTTPS as an edge of ours does.
async fn ask_as_ours(cluster: &Cluster, identity: &Identity, token: Option<&JoinToken>) -> Answer {
    let mut request = http::Request::get("/edge.crt")
        .header("NodeName", &identity.node)
        .header(capability::HEADER, RENEW.to_string());
    if let Some(token) = token {
        request = request.header("Authorization", format!("Bearer {}", token.jwt()));
    }
    let csr = identity.csr(&format!("system:node:{}", identity.node));
    let request = request.body(Full::from(csr)).expect("a request");
    fetch(cluster.cloud.enrol_addr(), Some((cluster.ca().await, identity)), request).await
}

/// Renews on the link; pushes that come before the answer are given back.
async fn renew(link: &mut Link, identity: &Identity) -> CertificateReply {
    let csr = identity.csr(&format!("system:node:{}", identity.node));
    let request = CertificateRequest { csr: Der(csr) };
    let resource = request_resource(&identity.node);
    let (operation, answer) = link.ask(Operation::Query, &resource, &request).await;
    assert_eq!(operation, "response", "{answer}");
    serde_json::from_value(answer).expect("a certificate")
}

/// The refusal of a request on the link.
async fn refused(link: &mut Link, resource: &str, content: &Value) -> String {
    let (operation, answer) = link.ask(Operation::Query, resource, content).await;
    assert_eq!(operation, "error", "{answer}");
    answer.as_str().expect("a text").to_owned()
}

async fn wait_closed(link: &mut Link) {
    let closed = async {
        loop {
            use futures::StreamExt;
            match link.socket.next().await {
                None | Some(Err(_) | Ok(tokio_tungstenite::tungstenite::Message::Close(_))) => {
                    return;
                }
                Some(Ok(_)) => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, closed).await.expect("the hub closes in time");
}

#[tokio::test]
async fn batch_token_is_good_for_so_many_nodes_whose_names_match() {
    let cluster = Cluster::start().await;
    let made = create_batch_token(&cluster.admin, "lisbon-*", 2, HOUR).await.expect("a token");
    let names = ["lisbon-1", "lisbon-2", "lisbon-3", "porto-1"];
    let [one, two, three, other] = names.map(Identity::new);
    // Both at once: one of them meets the other's write.
    let (a, b) = tokio::join!(one.join(&cluster, &made.token), two.join(&cluster, &made.token));
    assert_eq!((a.status, b.status), (200, 200), "{} {}", a.text(), b.text());
    assert_eq!(one.join(&cluster, &made.token).await.status, 200, "the same key may ask again");
    let refused = three.join(&cluster, &made.token).await;
    assert!(refused.text().contains("has been used by 2 node(s), which is all it is good for"));
    let refused = other.join(&cluster, &made.token).await;
    assert!(refused.text().contains("token is for node `lisbon-*`, not for node `porto-1`"));

    let listed = list_tokens(&cluster.admin).await.expect("a list");
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].id.as_str(), listed[0].uses_max), (made.id.as_str(), 2));
    assert_eq!(listed[0].used_by, ["lisbon-1", "lisbon-2"]);
    assert!(!listed[0].expired);
    assert!(revoke_token(&cluster.admin, &made.id).await.expect("revoked"));
    let refused = one.join(&cluster, &made.token).await;
    assert!(refused.text().contains("was revoked"), "{}", refused.text());
    for (pattern, uses) in [("edge1", 2), ("a*", 0), ("a*", 1001), ("A*", 1), ("", 1)] {
        assert!(
            create_batch_token(&cluster.admin, pattern, uses, HOUR).await.is_err(),
            "{pattern}"
        );
    }
    cluster.stop().await;
}

#[tokio::test]
async fn shared_token_of_kubeedge_works_only_where_it_is_switched_on() {
    let cluster = Cluster::start_with(|config| config.shared_token = true).await;
    let secrets = cluster.secrets("kubeedge");
    until("the shared token is written", async || {
        secrets.get_opt("tokensecret").await.expect("readable").is_some()
    })
    .await;
    let secret = secrets.get("tokensecret").await.expect("tokensecret");
    let text = String::from_utf8(secret.data.expect("data")["tokendata"].0.clone()).expect("text");
    let token: JoinToken = text.parse().expect("a token");
    assert!(token.is_for_ca(&cluster.ca().await));
    let claims = token.jwt().split('.').nth(1).expect("claims");
    use base64::Engine;
    let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(claims).expect("base64");
    let claims: Value = serde_json::from_slice(&claims).expect("json");
    assert_eq!(claims.as_object().expect("claims").keys().collect::<Vec<_>>(), ["exp"]);
    let left_s =
        claims["exp"].as_i64().expect("a time") - OffsetDateTime::now_utc().unix_timestamp();
    assert!((86_000..=86_400).contains(&left_s), "{left_s}");

    for node in ["edge1", "edge2"] {
        let answer = Identity::new(node).join(&cluster, &token).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    // A new CA, a new token.
    rotate_ca(&cluster.admin).await.expect("begun");
    let mut new_ca = cluster.ca().await;
    while token.is_for_ca(&new_ca) {
        new_ca = cluster.ca().await;
    }
    until("the shared token names the new CA", async || {
        let secret = secrets.get("tokensecret").await.expect("tokensecret");
        let text = String::from_utf8_lossy(&secret.data.expect("data")["tokendata"].0).into_owned();
        text.parse::<JoinToken>().is_ok_and(|token| token.is_for_ca(&new_ca))
    })
    .await;
    // A revoked node cannot come back with it.
    revoke_node(&cluster.admin, "edge1").await.expect("recorded");
    until("the revocation has arrived", async || {
        Identity::new("edge1").join(&cluster, &token).await.status == 401
    })
    .await;
    let cluster = cluster.restart_cloud(&["127.0.0.1"]).await;
    let answer = Identity::new("edge3").join(&cluster, &token).await;
    assert_eq!(answer.status, 401);
    assert!(answer.text().contains("token is not bound to a node"), "{}", answer.text());
    cluster.stop().await;
}

#[tokio::test]
async fn certificates_live_for_30_days_at_ours_and_for_a_year_at_kubeedges() {
    let cluster = Cluster::start().await;
    let stock = cluster.enrolled("edge1").await;
    assert_eq!(life_days(stock.certificate.as_ref().expect("one")), 365);
    let ours = Identity::new("edge2");
    let token = cluster.token("edge2").await;
    let answer = ask_as_ours(&cluster, &ours, Some(&token)).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(life_days(&answer.body), 30);
    let ours = ours.with_certificate(answer.body);
    assert_eq!(life_days(&ask_as_ours(&cluster, &ours, None).await.body), 30);
    assert_eq!(
        life_days(&stock.ask(&cluster, None, stock.csr("system:node:edge1")).await.body),
        365
    );

    let list = identities(&cluster.admin).await.expect("records");
    let nodes: Vec<_> = list.iter().map(|identity| identity.node.as_str()).collect();
    assert_eq!(nodes, ["edge1", "edge2"]);
    cluster.stop().await;
}

#[tokio::test]
async fn key_of_another_node_and_a_weak_curve_are_refused() {
    let cluster = Cluster::start().await;
    let first = cluster.enrolled("edge1").await;
    let copied = Identity { node: "edge2".into(), certificate: None, key: first.key };
    let refused = copied.join(&cluster, &cluster.token("edge2").await).await;
    assert_eq!(refused.status, 500);
    assert!(
        refused.text().starts_with(
            "failed to sign certs for edgenode edge2, err: its key is that of node `edge1`"
        ),
        "{}",
        refused.text()
    );
    // It survives a restart.
    let cluster = cluster.restart_cloud(&["127.0.0.1"]).await;
    let refused = copied.join(&cluster, &cluster.token("edge2").await).await;
    assert!(refused.text().contains("its key is that of node `edge1`"), "{}", refused.text());

    for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
        let node = if algorithm == &rcgen::PKCS_ED25519 { "edge3" } else { "edge4" };
        let key = KeyPair::generate_for(algorithm).expect("a key");
        let identity = Identity { node: node.into(), key, certificate: None };
        let token = cluster.token(node).await;
        let answer = identity.join(&cluster, &token).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let identity = identity.with_certificate(answer.body);
        identity.connect(&cluster).await;
    }
    // A signature that is not of the key in the request.
    let identity = Identity::new("edge5");
    let mut csr = identity.csr("system:node:edge5");
    let last = csr.len() - 1;
    csr[last] ^= 1;
    let bearer = format!("Bearer {}", cluster.token("edge5").await.jwt());
    assert_eq!(identity.ask(&cluster, Some(&bearer), csr).await.status, 500);
    cluster.stop().await;
}

#[tokio::test]
async fn certificate_without_an_organization_is_refused_in_words() {
    let cluster = Cluster::start().await;
    let identity = Identity::new("edge1");
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "system:node:edge1");
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let issued = params.signed_by(&identity.key, &ca_issuer(&cluster).await).expect("signed");
    let identity = Identity { certificate: Some(issued.der().clone()), ..identity };
    let refused = identity.ask(&cluster, None, identity.csr("system:node:edge1")).await;
    assert_eq!(refused.status, 401);
    assert!(
        refused.text().contains("its organization is `` instead of `system:nodes`"),
        "{}",
        refused.text()
    );
    let (status, text) = refusal(identity.open(&cluster, "edge1", RENEW).await);
    assert_eq!(status, 403, "{text}");
    cluster.stop().await;
}

#[tokio::test]
async fn certificate_is_renewed_on_the_link_which_stays() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let mut link = identity.open(&cluster, "edge1", RENEW).await.expect("connected");
    let reply = renew(&mut link, &identity).await;
    assert_eq!(life_days(&reply.certificate.0), 30);
    assert_eq!(reply.bundle, [Der(cluster.ca().await.to_vec())]);
    // The link goes on, and the new certificate is good for the next one.
    link.register().await;
    let renewed = identity.with_certificate(reply.certificate.0.into());
    let mut next = renewed.open(&cluster, "edge1", RENEW).await.expect("connected");

    let text = refused(&mut next, &request_resource("edge2"), &json!({"csr": "AQID"})).await;
    assert!(text.contains("is not of node `edge1`"), "{text}");
    let text = refused(&mut next, &request_resource("edge1"), &json!({"csr": "AQID"})).await;
    assert!(text.contains("the body is no CSR in DER"), "{text}");
    let text = refused(&mut next, &request_resource("edge1"), &json!({"csr": 5})).await;
    assert!(text.contains("failed to sign certs for edgenode edge1"), "{text}");
    let other = json!({"csr": serde_json::to_value(Der::<8192>(renewed.csr("system:node:edge2"))).expect("json")});
    let text = refused(&mut next, &request_resource("edge1"), &other).await;
    assert!(text.contains("it is for node `edge2`"), "{text}");
    cluster.stop().await;
}

#[tokio::test]
async fn expired_certificate_renews_on_the_link_and_does_nothing_else() {
    let cluster = Cluster::start().await;
    let identity = ended(&cluster, cluster.enrolled("edge1").await, 400 * 86_400).await;
    let mut link = identity.open(&cluster, "edge1", RENEW).await.expect("connected");
    // The node's clock may be wrong: it is told to renew.
    link.until("update", &request_resource("edge1")).await;
    let node = json!({"kind": "Node", "metadata": {"name": "edge1"}});
    let (operation, answer) = link.ask(Operation::Insert, "null/node/edge1", &node).await;
    assert_eq!(operation, "error", "{answer}");
    assert_eq!(cluster.nodes().get_opt("edge1").await.expect("readable"), None);
    let reply = renew(&mut link, &identity).await;
    wait_closed(&mut link).await;
    let renewed = identity.with_certificate(reply.certificate.0.into());
    let mut link = renewed.open(&cluster, "edge1", RENEW).await.expect("connected");
    link.register().await;
    cluster.stop().await;
}

#[tokio::test]
async fn expired_certificate_renews_over_https_unless_its_owner_denies_it() {
    let cluster = Cluster::start().await;
    let identity = ended(&cluster, cluster.enrolled("edge1").await, 3 * 86_400).await;
    let csr = || identity.csr("system:node:edge1");
    // An edge that cannot renew on the link is sent there.
    let (status, text) = refusal(identity.open(&cluster, "edge1", Capabilities::default()).await);
    assert_eq!(status, 403, "{text}");
    assert_eq!(identity.ask(&cluster, None, csr()).await.status, 200);

    let check = async |status: u16, part: &str| {
        until(part, async || {
            let answer = identity.ask(&cluster, None, csr()).await;
            answer.status == status && answer.text().contains(part)
        })
        .await;
    };
    deny_node(&cluster.admin, "edge1").await.expect("recorded");
    check(401, "the node is denied amnesty\nhint: run `skerry node allow edge1`").await;
    let (status, text) = refusal(identity.open(&cluster, "edge1", RENEW).await);
    assert_eq!(status, 403);
    assert!(text.contains("is denied amnesty"), "{text}");
    allow_node(&cluster.admin, "edge1").await.expect("recorded");
    check(200, "").await;
    set_amnesty(&cluster.admin, Amnesty::Never).await.expect("recorded");
    check(401, "amnesty is `never`").await;
    set_amnesty(&cluster.admin, "2d".parse().expect("a policy")).await.expect("recorded");
    check(401, "amnesty is `2d`").await;
    set_amnesty(&cluster.admin, "4d".parse().expect("a policy")).await.expect("recorded");
    check(200, "").await;
    cluster.stop().await;
}

#[tokio::test]
async fn certificate_of_another_ca_does_not_get_through_the_handshake() {
    let cluster = Cluster::start().await;
    let stranger = Identity::new("edge1");
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "KubeEdge");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let other_ca = Issuer::new(params, key);
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, "system:node:edge1");
    let issued = params.signed_by(&stranger.key, &other_ca).expect("signed").der().clone();
    let stranger = Identity { certificate: Some(issued), ..stranger };
    for identity in [stranger, Identity::new("edge1")] {
        match identity.open(&cluster, "edge1", RENEW).await {
            Err(WsError::Http(response)) => panic!("answered {}", response.status()),
            Err(_) => {}
            Ok(_) => panic!("accepted"),
        }
    }
    cluster.stop().await;
}

#[tokio::test]
async fn revocation_cuts_the_live_link_and_outlasts_a_restart() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let other = cluster.enrolled("edge2").await;
    let left_over = cluster.token("edge1").await;
    let mut link = identity.open(&cluster, "edge1", RENEW).await.expect("connected");
    let mut untouched = other.connect(&cluster).await;
    revoke_node(&cluster.admin, "edge1").await.expect("recorded");
    wait_closed(&mut link).await;
    let (status, text) = refusal(identity.open(&cluster, "edge1", RENEW).await);
    assert_eq!((status, text.contains("was revoked")), (403, true), "{text}");
    let refused = identity.ask(&cluster, None, identity.csr("system:node:edge1")).await;
    assert!(refused.text().contains("was revoked"), "{}", refused.text());
    untouched.register().await;
    drop(untouched);

    let cluster = cluster.restart_cloud(&["127.0.0.1"]).await;
    let (status, _) = refusal(identity.open(&cluster, "edge1", RENEW).await);
    assert_eq!(status, 403);
    // A token that was made before is no way back, one made after is.
    let again = Identity::new("edge1");
    let refused = again.join(&cluster, &left_over).await;
    assert_eq!(refused.status, 401);
    assert!(refused.text().contains("was revoked"), "{}", refused.text());
    let answer = again.join(&cluster, &cluster.token("edge1").await).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let again = again.with_certificate(answer.body);
    let mut link = again.open(&cluster, "edge1", RENEW).await.expect("connected");
    link.register().await;
    // The old certificate is still none.
    let (status, _) = refusal(identity.open(&cluster, "edge1", RENEW).await);
    assert_eq!(status, 403);
    allow_node(&cluster.admin, "edge1").await.expect("recorded");
    until("the old certificate counts again", async || {
        identity.open(&cluster, "edge1", RENEW).await.is_ok()
    })
    .await;
    cluster.stop().await;
}

#[tokio::test]
async fn one_certificate_is_revoked_by_its_serial_number() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    let der = identity.certificate.clone().expect("one");
    let (_, parsed) = X509Certificate::from_der(&der).expect("a certificate");
    let serial = parsed.raw_serial_as_string(); // with colons
    let newer = Identity {
        node: "edge1".into(),
        key: KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key"),
        certificate: None,
    };
    let token = cluster.token("edge1").await;
    let answer = newer.join(&cluster, &token).await;
    let newer = newer.with_certificate(answer.body);
    revoke_serial(&cluster.admin, "edge1", &serial).await.expect("recorded");
    until("the first certificate is refused", async || {
        identity.open(&cluster, "edge1", RENEW).await.is_err()
    })
    .await;
    newer.open(&cluster, "edge1", RENEW).await.expect("the other one counts");
    assert!(revoke_serial(&cluster.admin, "edge1", "xyz").await.is_err());
    assert!(revoke_serial(&cluster.admin, "Edge/1", "0a").await.is_err());
    cluster.stop().await;
}

#[tokio::test]
async fn ca_is_replaced_under_live_links_and_nobody_is_lost() {
    let cluster = Cluster::start().await;
    let old_ca = cluster.ca().await;
    let old_token = cluster.token("edge3").await;
    let ours = cluster.enrolled("edge1").await;
    let stock = cluster.enrolled("edge2").await;
    let mut link = ours.open(&cluster, "edge1", RENEW).await.expect("connected");
    link.register().await;
    ready(&cluster, "edge1").await;
    let confirm = async |link: &mut Link, bundle: &Bundle| {
        let resource = bundle_resource("edge1");
        let (operation, answer) = link.ask(Operation::Query, &resource, bundle).await;
        assert_eq!(operation, "response", "{answer}");
    };
    confirm(&mut link, &Bundle { bundle: vec![Der(old_ca.to_vec())] }).await;

    let status = rotate_ca(&cluster.admin).await.expect("begun");
    assert_eq!(
        status.authorities.iter().map(|ca| ca.role).collect::<Vec<_>>(),
        ["active", "previous"]
    );
    assert!(rotate_ca(&cluster.admin).await.expect_err("twice").hint().is_some());
    // The live link is told of both CAs.
    let mut both = Bundle { bundle: Vec::new() };
    while both.bundle.get(1) != Some(&Der(old_ca.to_vec())) {
        // Between the two steps of the rotation the new one may come second.
        let (push, _) = link.until("update", &bundle_resource("edge1")).await;
        both = push.content_as().expect("a bundle");
    }
    let new_ca = cluster.ca().await;
    assert_ne!(new_ca, old_ca);
    assert_eq!(both.bundle, [Der(new_ca.to_vec()), Der(old_ca.to_vec())]);
    let behind = finish_ca(&cluster.admin, false).await.expect_err("too early");
    assert_eq!(behind.to_string(), "1 connected node(s) have not followed yet: edge1");

    // Nodes that trust only one of them reach the hub, whichever it is; certificates of both count.
    for ca in [&old_ca, &new_ca] {
        let address = cluster.cloud.hub_addr();
        ours.tls(ca.clone(), address).await.expect("the server's chain leads to either CA");
    }
    stock.connect(&cluster).await;
    // A token from before still works, and its CA is still there for who asks for it.
    let uri = format!("/ca.crt?sha256={}", old_token.ca_hash());
    let request = http::Request::get(uri).body(Full::default()).expect("a request");
    let answer = fetch(cluster.cloud.enrol_addr(), None, request).await;
    assert_eq!(answer.body, old_ca.to_vec());
    let third = Identity::new("edge3");
    let answer = third.join(&cluster, &old_token).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(cluster.token("edge4").await.is_for_ca(&new_ca));

    // The edge follows: it stores, confirms, renews.
    confirm(&mut link, &both).await;
    let reply = renew(&mut link, &ours).await;
    let renewed =
        Identity { certificate: None, ..ours }.with_certificate(reply.certificate.0.into());
    let status = ca_status(&cluster.admin).await.expect("a status");
    let edge1 = status.nodes.iter().find(|node| node.node == "edge1").expect("listed");
    assert!(!edge1.is_behind(), "{edge1:?}");
    let edge2 = status.nodes.iter().find(|node| node.node == "edge2").expect("listed");
    assert!(edge2.is_behind() && !edge2.ready, "{edge2:?}");
    // The link on which it renewed counts as one of the new certificate.
    let mut stale = stock.connect(&cluster).await;

    let status = finish_ca(&cluster.admin, false).await.expect("finished");
    assert_eq!(status.authorities[1].role, "retired");
    wait_closed(&mut stale).await;
    until("certificates of the old CA are refused", async || {
        stock.open(&cluster, "edge2", Capabilities::default()).await.is_err()
    })
    .await;
    let (push, _) = link.until("update", &bundle_resource("edge1")).await;
    assert_eq!(push.content_as::<Bundle>().expect("a bundle").bundle, [Der(new_ca.to_vec())]);
    // A node that was away all the time and knows only the old CA still reaches the server.
    renewed.tls(old_ca, cluster.cloud.hub_addr()).await.expect("by the old CA's signature");
    assert!(finish_ca(&cluster.admin, false).await.is_err());
    let cluster = cluster.restart_cloud(&["127.0.0.1"]).await;
    renewed.open(&cluster, "edge1", RENEW).await.expect("connected");
    rotate_ca(&cluster.admin).await.expect("once more");
    cluster.stop().await;
}

#[tokio::test]
async fn forced_end_of_a_rotation_leaves_out_who_did_not_follow_until_a_new_token() {
    let cluster = Cluster::start().await;
    let left = cluster.enrolled("edge1").await;
    let mut link = left.connect(&cluster).await;
    link.register().await;
    ready(&cluster, "edge1").await;
    rotate_ca(&cluster.admin).await.expect("begun");
    assert!(finish_ca(&cluster.admin, false).await.is_err());
    finish_ca(&cluster.admin, true).await.expect("forced");
    wait_closed(&mut link).await;
    until("the old certificate is refused", async || {
        left.open(&cluster, "edge1", RENEW).await.is_err()
    })
    .await;
    let refused = left.ask(&cluster, None, left.csr("system:node:edge1")).await;
    assert_eq!(refused.status, 401, "{}", refused.text());
    let fresh = cluster.enrolled("edge1").await;
    fresh.connect(&cluster).await.register().await;
    cluster.stop().await;
}

async fn ready(cluster: &Cluster, node: &str) {
    let status = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    let params = kube::api::PatchParams::default();
    let patch = kube::api::Patch::Merge(&status);
    cluster.nodes().patch_status(node, &params, &patch).await.expect("patched");
}

#[tokio::test]
async fn certificates_that_a_go_cloudcore_left_are_used_as_they_are() {
    let cluster = Cluster::start().await;
    let secrets = cluster.secrets("kubeedge");
    let issuer = ca_issuer(&cluster).await;
    // KubeEdge's default configuration puts an empty name beside the addresses.
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("a key");
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![
        rcgen::SanType::DnsName("".try_into().expect("ASCII")),
        rcgen::SanType::IpAddress([127, 0, 0, 1].into()),
    ];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    params.not_after = OffsetDateTime::now_utc() + time::Duration::days(36_400);
    let server = params.signed_by(&key, &issuer).expect("signed").der().clone();
    let mut secret = secrets.get("cloudcoresecret").await.expect("cloudcoresecret");
    let pkcs8 = key.serialize_der();
    let sec1 = [
        &[0x30, 0x77, 2, 1, 1, 4, 0x20],
        &pkcs8[36..68],
        &[0xa0, 0x0a, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7, 0xa1, 0x44, 3, 0x42, 0],
        key.public_key_raw(),
    ]
    .concat();
    let data = secret.data.as_mut().expect("data");
    data.insert("cloudcoredata".into(), k8s_openapi::ByteString(server.to_vec()));
    data.insert("cloudcorekeydata".into(), k8s_openapi::ByteString(sec1));
    secrets.replace("cloudcoresecret", &PostParams::default(), &secret).await.expect("replaced");

    let cluster = cluster.restart_cloud(&["127.0.0.1"]).await;
    let stream = Identity::new("edge1").tls(cluster.ca().await, cluster.cloud.enrol_addr()).await;
    let stream = stream.expect("the chain is good");
    assert_eq!(stream.get_ref().1.peer_certificates().expect("shown")[0], server);
    cluster.stop().await;
}

#[tokio::test]
async fn token_made_with_another_key_is_refused_also_while_two_cas_count() {
    let cluster = Cluster::start().await;
    rotate_ca(&cluster.admin).await.expect("begun");
    let claims = Claims { exp: i64::MAX, node: Some("edge1".into()), jti: Some("x".into()) };
    let forged = claims.sign(|bytes| {
        use sha2::Digest;
        sha2::Sha256::digest(bytes).into()
    });
    let identity = Identity::new("edge1");
    let bearer = format!("Bearer {forged}");
    let refused = identity.ask(&cluster, Some(&bearer), identity.csr("system:node:edge1")).await;
    assert_eq!(refused.status, 401);
    assert!(refused.text().contains("token signature is invalid"), "{}", refused.text());
    cluster.stop().await;
}

#[tokio::test]
async fn resumed_session_is_looked_at_again() {
    let cluster = Cluster::start().await;
    let identity = cluster.enrolled("edge1").await;
    // One configuration for all connections, so that the client has tickets.
    let config = std::sync::Arc::new(identity.client_config(cluster.ca().await));
    let connect = async || {
        let stream = tokio::net::TcpStream::connect(cluster.cloud.hub_addr()).await?;
        let connector = tokio_rustls::TlsConnector::from(config.clone());
        let mut stream = connector.connect(support::server_name(), stream).await?;
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let request = "GET /p/edge1/events HTTP/1.1\r\nhost: hub\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
            sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nnode_id: edge1\r\n\
            project_id: p\r\nconnectionuse: msg\r\n\r\n";
        stream.write_all(request.as_bytes()).await?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await?;
        let kind = stream.get_ref().1.handshake_kind();
        std::io::Result::Ok((String::from_utf8_lossy(&answer).into_owned(), kind))
    };
    let (answer, kind) = connect().await.expect("connected");
    assert_eq!((answer.as_str(), kind), ("HTTP/1.1 101", Some(rustls::HandshakeKind::Full)));
    let (answer, kind) = connect().await.expect("connected");
    assert_eq!((answer.as_str(), kind), ("HTTP/1.1 101", Some(rustls::HandshakeKind::Resumed)));
    revoke_node(&cluster.admin, "edge1").await.expect("recorded");
    until("the revocation has arrived", async || {
        connect().await.is_ok_and(|(answer, _)| answer == "HTTP/1.1 403")
    })
    .await;
    allow_node(&cluster.admin, "edge1").await.expect("recorded");
    until("it is allowed again", async || {
        connect().await.is_ok_and(|(answer, _)| answer == "HTTP/1.1 101")
    })
    .await;
    // With another set of CAs no ticket counts.
    rotate_ca(&cluster.admin).await.expect("begun");
    until("a full handshake is asked for", async || {
        connect().await.is_ok_and(|(_, kind)| kind == Some(rustls::HandshakeKind::Full))
    })
    .await;
    cluster.stop().await;
}

#[tokio::test]
async fn report_of_a_job_needs_json_a_job_and_a_node() {
    let cluster = Cluster::start().await;
    let post = async |path: &str, body: &str| {
        let request = http::Request::post(path).body(Full::from(body.to_owned()));
        fetch(cluster.cloud.enrol_addr(), None, request.expect("a request")).await
    };
    let task = "/task/upgrade/name/job1/node/edge1/status";
    for (path, body) in
        [("/nodeupgrade", "{"), (task, "[1"), ("/nodeupgrade", r#"{"NodeName":"edge1"}"#)]
    {
        let answer = post(path, body).await;
        assert!(matches!(answer.status, 400 | 501), "{} {}", answer.status, answer.text());
    }
    let request = http::Request::get(task).body(Full::default()).expect("a request");
    assert_eq!(fetch(cluster.cloud.enrol_addr(), None, request).await.status, 405);
    cluster.stop().await;
}
