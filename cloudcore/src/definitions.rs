//! Definitions of kinds that CloudCore needs and the cluster lacks.

use crate::api;
use futures::future::BoxFuture;
use kube::api::{Api, ApiResource, DynamicObject, PostParams};
use serde_json::Value;
use std::time::Duration;

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

/// Waits until `look` finds them. Returns whether it did in time.
pub(crate) async fn served<'a>(look: impl Fn() -> BoxFuture<'a, bool>) -> bool {
    let waiting = async {
        while !look().await {
            tokio::time::sleep(SERVED_INTERVAL).await;
        }
    };
    tokio::time::timeout(SERVED_TIMEOUT, waiting).await.is_ok()
}
