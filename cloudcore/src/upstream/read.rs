//! What a node reads because of its pods: ConfigMaps, Secrets, volumes, and the CA of the cluster.
//!
//! ConfigMaps and Secrets come from the hub's memory when it has them. Volumes are rare, so what a node's pods use is
//! looked up in the API each time.

use super::answer::{self, Refused};
use super::rest::{self, Done};
use super::{Outcome, Upstream};
use serde_json::Value;
use skerry_cloudcore_core::downstream::{Access, Key};
use skerry_cloudcore_core::references;
use skerry_cloudcore_core::upstream::pod;
use skerry_protocol::{Message, Operation, ResourcePath};
use std::collections::BTreeSet;

/// Where every cluster publishes its CA.
const ROOT_CA: (&str, &str) = ("kube-system", "kube-root-ca.crt");
/// Module that answers for the CA in KubeEdge.
const HUB_SOURCE: &str = "cloudhub";

impl Upstream {
    /// A ConfigMap or Secret.
    pub(super) async fn config(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Outcome {
        if request.operation() != Some(Operation::Query) {
            return Outcome::unsupported(request);
        }
        let key =
            Key::of_path(path).ok_or_else(|| Refused::Invalid(format!("`{path}` is no object")));
        let key = match key {
            Ok(key) => key,
            Err(refused) => return Outcome::Read(Err(refused)),
        };
        match self.hub.access(node, &key).await {
            None => Outcome::Read(Err(Refused::Stopping)),
            Some(Access::Denied | Access::Unlisted)
                if path.kind() == "secret"
                    && self.jobs.grants(node, key.namespace(), key.name()) =>
            {
                Outcome::Read(self.read_for_job(path).await)
            }
            Some(Access::Denied) => Outcome::Read(Err(Refused::Forbidden(format!(
                "no pod of node `{node}` refers to `{path}`"
            )))),
            Some(Access::Held { resource_version, object }) => {
                let message = answer::reply(request, &object).with_version(resource_version);
                Outcome::Message(Box::new(message))
            }
            Some(Access::Absent | Access::Unknown) => {
                Outcome::Read(self.read_config(node, path, key.kind().api_kind()).await)
            }
            // A hub that has just started must not tell a node that its pods need nothing.
            Some(Access::Unlisted) => {
                let done = match self.refers(node, &key).await {
                    Ok(true) => self.read_config(node, path, key.kind().api_kind()).await,
                    Ok(false) => Err(not_used(node, path)),
                    Err(refused) => Err(refused),
                };
                Outcome::Read(done)
            }
        }
    }

    /// Whether a pod of `node` refers to a ConfigMap or Secret, asked of the API.
    async fn refers(&self, node: &str, key: &Key) -> Result<bool, Refused> {
        let pods = self.pods(node, Some(key.namespace())).await?;
        let mut pods = pods["items"].as_array().into_iter().flatten();
        Ok(pods.any(|pod| references::of_pod(pod).contains(key)))
    }

    async fn read_config(&self, node: &str, path: &ResourcePath, kind: &str) -> Done {
        let plural = format!("{}s", path.kind());
        let name = rest::segment(path.name().unwrap_or_default())?;
        let place = rest::core(path.namespace(), &plural, name)?;
        Ok(with_type(self.rest(node).get(&place).await?, kind, "v1"))
    }

    /// The Secret for the images of a job, which no pod refers to: in CloudCore's own name.
    async fn read_for_job(&self, path: &ResourcePath) -> Done {
        let name = rest::segment(path.name().unwrap_or_default())?;
        let place = rest::core(path.namespace(), "secrets", name)?;
        Ok(with_type(self.own_rest().get(&place).await?, "Secret", "v1"))
    }

    /// A PersistentVolume, PersistentVolumeClaim or VolumeAttachment.
    pub(super) async fn volume(
        &self,
        node: &str,
        path: &ResourcePath,
        request: &Message,
    ) -> Outcome {
        if request.operation() != Some(Operation::Query) {
            return Outcome::unsupported(request);
        }
        let done = match path.kind() {
            "persistentvolume" => self.persistent_volume(node, path).await,
            "persistentvolumeclaim" => self.claim(node, path).await,
            _ => self.attachment(node, path).await,
        };
        Outcome::Read(done)
    }

    async fn claim(&self, node: &str, path: &ResourcePath) -> Done {
        let name = rest::segment(path.name().unwrap_or_default())?;
        let place = rest::core(path.namespace(), "persistentvolumeclaims", name)?;
        let used = self.claims(node, Some(path.namespace())).await?;
        if !used.contains(&(path.namespace().to_owned(), name.to_owned())) {
            return Err(not_used(node, path));
        }
        Ok(with_type(self.rest(node).get(&place).await?, "PersistentVolumeClaim", "v1"))
    }

    async fn persistent_volume(&self, node: &str, path: &ResourcePath) -> Done {
        let name = rest::segment(path.name().unwrap_or_default())?;
        let place = rest::core("", "persistentvolumes", name)?;
        let used = self.claims(node, None).await?;
        let volume = self.own_rest().get(&place).await?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let claim = &volume["spec"]["claimRef"];
        if !used.contains(&(text(&claim["namespace"]), text(&claim["name"]))) {
            return Err(not_used(node, path));
        }
        Ok(with_type(volume, "PersistentVolume", "v1"))
    }

    async fn attachment(&self, node: &str, path: &ResourcePath) -> Done {
        let name = rest::segment(path.name().unwrap_or_default())?;
        let place = rest::path("/apis/storage.k8s.io/v1", "", "volumeattachments", name)?;
        let attachment = self.rest(node).get(&place).await?;
        if attachment["spec"]["nodeName"] != node {
            return Err(not_used(node, path));
        }
        Ok(with_type(attachment, "VolumeAttachment", "storage.k8s.io/v1"))
    }

    /// The claims that pods of `node` use, as (namespace, name); in one namespace or in all.
    async fn claims(
        &self,
        node: &str,
        namespace: Option<&str>,
    ) -> Result<BTreeSet<(String, String)>, Refused> {
        let pods = self.pods(node, namespace).await?;
        let claims = pods["items"].as_array().into_iter().flatten().flat_map(|item| {
            let namespace = item["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
            pod::claims_of(item).into_iter().map(move |claim| (namespace.clone(), claim))
        });
        Ok(claims.collect())
    }

    /// The list of the pods of `node`, in one namespace or in all.
    async fn pods(&self, node: &str, namespace: Option<&str>) -> Done {
        let place = rest::core(namespace.unwrap_or_default(), "pods", "")?;
        let of_node = format!("{place}?fieldSelector=spec.nodeName%3D{}", rest::segment(node)?);
        self.own_rest().get(&of_node).await
    }

    /// The CA of the cluster, as PEM text.
    pub(super) async fn cluster_ca(&self, request: &Message) -> Outcome {
        if request.operation() != Some(Operation::Query) {
            return Outcome::unsupported(request);
        }
        let mut message = match self.read_cluster_ca().await {
            Ok(pem) => answer::reply(request, &pem),
            Err(refused) => answer::failed(request, &refused),
        };
        message.route.source = HUB_SOURCE.into();
        Outcome::Message(Box::new(message))
    }

    async fn read_cluster_ca(&self) -> Result<String, Refused> {
        let (namespace, name) = ROOT_CA;
        let map = self.own_rest().get(&rest::core(namespace, "configmaps", name)?).await?;
        match map["data"]["ca.crt"].as_str() {
            Some(pem) => Ok(pem.to_owned()),
            None => Err(Refused::Unreadable(format!("`{namespace}/{name}` holds no CA"))),
        }
    }
}

fn not_used(node: &str, path: &ResourcePath) -> Refused {
    Refused::Forbidden(format!("no pod of node `{node}` uses `{path}`"))
}

/// An object as KubeEdge answers it: with its kind, which lists and typed clients leave out.
fn with_type(mut object: Value, kind: &str, api_version: &str) -> Value {
    object["kind"] = kind.into();
    object["apiVersion"] = api_version.into();
    object
}
