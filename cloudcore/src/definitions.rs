//! Definitions of kinds that CloudCore needs and the cluster lacks.

use crate::api;
use crate::watch::LOOK_INTERVAL;
use kube::api::{Api, ApiResource, DynamicObject, ListParams, PostParams};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::fmt::Debug;
use std::time::Duration;

/// Pause after a look that the cluster did not answer.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Time between two looks whether a new definition is served.
const SERVED_INTERVAL: Duration = Duration::from_millis(100);
/// How long an API may take to serve one.
const SERVED_TIMEOUT: Duration = Duration::from_secs(20);

/// Creates those that are not there. Definitions of the same name are left as they are: KubeEdge's check more.
pub(crate) async fn create(client: &kube::Client, definitions: Vec<Value>) -> kube::Result<()> {
    let resource = ApiResource {
        group: "apiextensions.k8s.io".into(),
        version: "v1".into(),
        api_version: "apiextensions.k8s.io/v1".into(),
        kind: "CustomResourceDefinition".into(),
        plural: "customresourcedefinitions".into(),
    };
    let all: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    for definition in definitions {
        let definition: DynamicObject =
            serde_json::from_value(definition).expect("our own definitions are objects");
        match all.create(&PostParams::default(), &definition).await {
            Ok(_) => {
                let name = definition.metadata.name;
                tracing::info!(name, "created a definition that the cluster lacked");
            }
            Err(error) if api::is_already_exists(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Kinds of objects that a service follows in a cluster that may lack them.
pub(crate) trait Kinds: Sync {
    /// What they are, for the log: `rules`.
    fn what(&self) -> String;
    /// The cluster.
    fn client(&self) -> &kube::Client;
    /// Their definitions.
    fn definitions(&self) -> Vec<Value>;
    /// Whether the cluster has all of them.
    fn look(&self) -> impl Future<Output = kube::Result<bool>> + Send;
    /// Follows their objects; returns when the cluster no longer has one of the kinds.
    fn watch(&self) -> impl Future<Output = ()> + Send;
}

/// Follows the kinds whenever the cluster has them; makes the definitions where it lacks them. Never returns.
pub(crate) async fn follow(kinds: &impl Kinds) {
    let mut is_told = false;
    loop {
        match kinds.look().await {
            Ok(true) => {
                is_told = false;
                kinds.watch().await;
            }
            Ok(false) => {
                let created = create(kinds.client(), kinds.definitions()).await;
                if created.is_ok() && served(kinds).await {
                    continue;
                }
                if !std::mem::replace(&mut is_told, true) {
                    let error = created.err().map(|error| error.to_string()).unwrap_or_default();
                    tracing::warn!(
                        error,
                        "the cluster has no {}, looking again later",
                        kinds.what()
                    );
                }
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
            Err(error) => {
                tracing::warn!(%error, "could not look for {}, trying again", kinds.what());
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

/// Whether the cluster has the kind of these objects.
pub(crate) async fn is_there<K>(objects: &Api<K>) -> kube::Result<bool>
where
    K: Clone + DeserializeOwned + Debug,
{
    match objects.list(&ListParams::default().limit(1)).await {
        Ok(_) => Ok(true),
        Err(error) if api::is_kind_missing(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Waits until the cluster serves them. Returns whether it did in time.
async fn served(kinds: &impl Kinds) -> bool {
    let waiting = async {
        while !matches!(kinds.look().await, Ok(true)) {
            tokio::time::sleep(SERVED_INTERVAL).await;
        }
    };
    tokio::time::timeout(SERVED_TIMEOUT, waiting).await.is_ok()
}
