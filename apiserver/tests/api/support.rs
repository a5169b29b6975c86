//! A server per test, and waiting for states.

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::api::{Api, PostParams};
use kube::{Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use skerry_apiserver::{ApiServer, Config, Durability, auth};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

/// Longer than anything takes on a loaded machine; only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Server {
    pub(crate) api: ApiServer,
    _dir: tempfile::TempDir,
}

impl Server {
    /// A server without controllers on a fresh folder.
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let api = ApiServer::start(config(dir.path())).await.unwrap();
        let server = Self { api, _dir: dir };
        // From here on nothing is written but by the test.
        let client = server.admin();
        for namespace in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
            eventually("the first namespaces are furnished", || async {
                maps.get_opt("kube-root-ca.crt").await.unwrap()
            })
            .await;
        }
        server
    }

    /// An administrator inside the process.
    pub(crate) fn admin(&self) -> Client {
        self.api.client("admin", &[auth::MASTERS])
    }
}

pub(crate) fn config(dir: &Path) -> Config {
    Config {
        dir: dir.into(),
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        hostnames: Vec::new(),
        node_streams: None,
        durability: Durability::Relaxed,
        controllers: false,
    }
}

/// Waits until `probe` returns something.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    probe: impl Fn() -> F,
) -> T {
    let wait = async {
        loop {
            if let Some(found) = probe().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("waited for: {what}"))
}

pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited for: {what}"))
}

pub(crate) async fn gone<K>(api: &Api<K>, name: &str)
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug,
{
    eventually(&format!("`{name}` is gone"), || async {
        api.get_opt(name).await.unwrap().is_none().then_some(())
    })
    .await;
}

pub(crate) async fn create<K>(api: &Api<K>, object: Value) -> K
where
    K: Resource + Clone + DeserializeOwned + Serialize + std::fmt::Debug,
{
    api.create(&PostParams::default(), &parse(object)).await.unwrap()
}

pub(crate) fn parse<K: DeserializeOwned>(object: Value) -> K {
    serde_json::from_value(object).unwrap()
}

pub(crate) fn config_map(name: &str, value: &str) -> ConfigMap {
    parse(json!({"metadata": {"name": name}, "data": {"key": value}}))
}

pub(crate) fn pod(name: &str) -> Value {
    json!({
        "metadata": {"name": name},
        "spec": {"containers": [{"name": "c", "image": "busybox:1"}]},
    })
}

pub(crate) fn namespaces(client: &Client) -> Api<Namespace> {
    Api::all(client.clone())
}

pub(crate) fn config_maps(client: &Client) -> Api<ConfigMap> {
    Api::namespaced(client.clone(), "default")
}

pub(crate) fn pods(client: &Client) -> Api<Pod> {
    Api::namespaced(client.clone(), "default")
}

/// Sends a request as it is and returns code, headers and body.
pub(crate) async fn send(
    client: &Client,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> (u16, http::HeaderMap, Value) {
    use http_body_util::BodyExt;
    let mut request = http::Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(kube::client::Body::from(body.to_vec())).unwrap();
    let response = client.send(request).await.unwrap();
    let (head, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    let value = serde_json::from_slice(&bytes)
        .unwrap_or_else(|_| String::from_utf8_lossy(&bytes).into_owned().into());
    (head.status.as_u16(), head.headers, value)
}

/// The Status of a failed call.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(outcome: kube::Result<T>) -> (u16, String, String) {
    match outcome {
        Err(kube::Error::Api(status)) => (status.code, status.reason, status.message),
        other => panic!("expected a refusal, got {other:?}"),
    }
}
