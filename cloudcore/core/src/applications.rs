//! Reads, writes and watches that applications on a node send through it: KubeEdge's MetaServer protocol.
//!
//! An [`Application`] is one request. [`Target`] is what it is about, [`check`] says whether a node may have it in
//! CloudCore's own name, [`watches::Watches`] turns watches into objects for nodes, [`filter`] changes what must
//! look different on every node and [`topology`] what on some. The shell (`cloudcore/src/applications`) asks the API.
//!
//! Source: kubeedge/kubeedge, pkg/metaserver/{application,key,constants}.go and cloud/pkg/dynamiccontroller.

pub mod filter;
pub mod selector;
pub mod topology;
pub mod watches;

use crate::upstream::answer::Status;
use crate::upstream::is_segment;
use serde::{Deserialize, Serialize};
use std::fmt;

/// `status` of an answer that holds a result.
pub const APPROVED: &str = "Approved";
/// `status` of an answer that holds a reason.
pub const REJECTED: &str = "Rejected";
/// Go's zero time.
const NEVER: &str = "0001-01-01T00:00:00Z";
/// The group segment of the core group in a key.
const CORE_GROUP: &str = "core";
/// A missing namespace or name in a key.
const NONE: &str = "null";

/// One request, and its answer. Byte fields are base64, as Go writes them.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Application {
    /// Digest of the request: the same request has the same id.
    #[serde(rename = "ID", default)]
    pub id: String,
    /// What it is about; see [`Target`], or a path of discovery.
    #[serde(default)]
    pub key: String,
    /// Such as `get`.
    #[serde(default)]
    pub verb: String,
    /// The node; what a node says here is not believed.
    #[serde(default)]
    pub nodename: String,
    /// Base64 of a JSON object with options.
    #[serde(default)]
    pub option: Option<String>,
    /// Base64 of a JSON object to write.
    #[serde(default)]
    pub req_body: Option<String>,
    /// Such as `scale`.
    #[serde(default)]
    pub subresource: String,
    /// Base64 of the result.
    #[serde(default)]
    pub resp_body: Option<String>,
    /// How far it is.
    #[serde(default)]
    pub status: String,
    /// Why it was rejected, when the API did not say.
    #[serde(default)]
    pub reason: String,
    /// Why the API rejected it. Not read: a request has none.
    #[serde(skip_deserializing)]
    pub error: Failure,
    /// Of the edge; comes back as it went.
    #[serde(default = "never")]
    pub timestamp: String,
}

fn never() -> String {
    NEVER.into()
}

/// `Error` of an [`Application`]: empty inside when there is none.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Failure {
    /// What the API said.
    #[serde(rename = "ErrStatus")]
    pub status: Said,
}

/// A [`Status`], or `{"metadata":{}}`.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub enum Said {
    /// Of a failure.
    Status(Status),
    /// Nothing.
    Nothing {
        /// Always an empty object.
        metadata: Metadata,
    },
}

/// The empty `metadata` of [`Said::Nothing`].
#[derive(Debug, Clone, Default, Serialize)]
pub struct Metadata {}

impl Default for Said {
    fn default() -> Self {
        Self::Nothing { metadata: Metadata {} }
    }
}

impl Application {
    /// The answer with a result; `body` is base64, `None` where there is none.
    #[must_use]
    pub fn approved(mut self, body: Option<String>) -> Self {
        self.status = APPROVED.into();
        self.resp_body = body;
        self.error = Failure::default();
        self
    }

    /// The answer without: what the API said, which the edge hands to its client.
    #[must_use]
    pub fn rejected(mut self, status: Status) -> Self {
        self.status = REJECTED.into();
        self.resp_body = None;
        self.error = Failure { status: Said::Status(status) };
        self
    }
}

/// A resource of the API: group, version and plural.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Resource {
    /// Empty for the core group.
    pub group: String,
    /// Such as `v1`.
    pub version: String,
    /// Such as `pods`.
    pub plural: String,
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.group.as_str() {
            "" => write!(f, "{}", self.plural),
            group => write!(f, "{}.{group}", self.plural),
        }
    }
}

impl Resource {
    /// `apiVersion` of its objects.
    pub fn api_version(&self) -> String {
        match self.group.as_str() {
            "" => self.version.clone(),
            group => format!("{group}/{}", self.version),
        }
    }

    /// The type segment of its objects on the wire: the lower-case singular, as far as KubeEdge can tell it.
    pub fn token(&self) -> String {
        let plural = self.plural.to_lowercase();
        // Words that KubeEdge knows; for the rest it goes by the ending, right or wrong, and so must its peers.
        match plural.as_str() {
            "endpoints" | "leases" => plural,
            "podstatus" | "nodestatus" => plural,
            "endpointslices"
            | "nodes"
            | "namespaces"
            | "services"
            | "customresourcedefinitions" => plural[..plural.len() - 1].to_owned(),
            _ => match plural.as_str() {
                word if word.ends_with("ies") => format!("{}y", &word[..word.len() - 3]),
                word if word.ends_with("ses") => word[..word.len() - 2].to_owned(),
                word => word.strip_suffix('s').unwrap_or(word).to_owned(),
            },
        }
    }
}

/// What an [`Application`] is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Resource.
    pub resource: Resource,
    /// Namespace; empty for a cluster-scoped object or for all namespaces.
    pub namespace: String,
    /// Name; empty for a collection.
    pub name: String,
}

impl Target {
    /// Reads `/<group>/<version>/<resource>/<namespace>/<name>`.
    ///
    /// `None` when it is not such a key, or when a segment could lead to another path of the API.
    pub fn parse(key: &str) -> Option<Self> {
        let mut segments = key.strip_prefix('/')?.trim_end_matches('/').split('/');
        let mut next = || segments.next().filter(|segment| is_segment(segment));
        let group = match next()? {
            CORE_GROUP => "",
            group => group,
        };
        let resource =
            Resource { group: group.into(), version: next()?.into(), plural: next()?.into() };
        let mut optional = || match segments.next() {
            None | Some(NONE) => Some(String::new()),
            Some(segment) => is_segment(segment).then(|| segment.to_owned()),
        };
        let (namespace, name) = (optional()?, optional()?);
        segments.next().is_none().then_some(Self { resource, namespace, name })
    }

    /// Its path in the API, with `subresource` when that is not empty.
    ///
    /// `None` when `subresource` would lead elsewhere.
    pub fn path(&self, subresource: &str) -> Option<String> {
        let Resource { group, version, plural } = &self.resource;
        let mut path = match group.as_str() {
            "" => format!("/api/{version}"),
            group => format!("/apis/{group}/{version}"),
        };
        // Namespaces are in no namespace.
        let is_namespaces = group.is_empty() && plural == "namespaces";
        if !self.namespace.is_empty() && !is_namespaces {
            path = format!("{path}/namespaces/{}", self.namespace);
        }
        path = format!("{path}/{plural}");
        if !self.name.is_empty() {
            path = format!("{path}/{}", self.name);
        }
        for segment in subresource.split('/').filter(|segment| !segment.is_empty()) {
            if !is_segment(segment) {
                return None;
            }
            path = format!("{path}/{segment}");
        }
        Some(path)
    }
}

/// Resources that every node needs to find its peers, in all namespaces: (group, plural).
const SHARED: [(&str, &str); 4] =
    [("", "nodes"), ("", "services"), ("", "endpoints"), ("discovery.k8s.io", "endpointslices")];

/// Checks what a node asks for when CloudCore asks in its own name: nothing is written, and only what concerns the
/// node is read.
///
/// `has_pods` says whether the node has pods in a namespace; `refers` whether one of its pods refers to the ConfigMap
/// or Secret of the target; `field_selector` is that of a list or watch.
///
/// # Errors
///
/// The failure that the API would give to a user without rights.
pub fn check(
    node: &str,
    verb: &str,
    target: &Target,
    subresource: &str,
    field_selector: &str,
    has_pods: bool,
    refers: bool,
) -> Result<(), Status> {
    let Resource { group, plural, .. } = &target.resource;
    let is = |known: (&str, &str)| known == (group.as_str(), plural.as_str());
    let reads = matches!(verb, "get" | "list" | "watch") && subresource.is_empty();
    let mine = format!("spec.nodeName={node}");
    let allowed = reads
        && (SHARED.into_iter().any(is)
            || match (group.as_str(), plural.as_str()) {
                ("", "secrets") => verb == "get" && refers,
                ("", "pods") => has_pods || field_selector.split(',').any(|term| term == mine),
                _ => has_pods,
            });
    if allowed {
        return Ok(());
    }
    let Target { resource, namespace, name } = target;
    let at = if namespace.is_empty() {
        "at the cluster scope".into()
    } else {
        format!("in the namespace \"{namespace}\"")
    };
    let name = if name.is_empty() { String::new() } else { format!(" \"{name}\"") };
    let hint = if reads {
        "CloudCore reads for a node only what is near its pods"
    } else {
        "CloudCore writes for a node only with `impersonate`"
    };
    let message = format!(
        "{resource}{name} is forbidden: User \"system:node:{node}\" cannot {verb} resource \"{plural}\" in API group \"{group}\" {at}: {hint}"
    );
    Err(Status::new(403, "Forbidden", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(key: &str) -> Target {
        Target::parse(key).unwrap_or_else(|| panic!("{key}"))
    }

    #[test]
    fn keys_lead_to_paths_of_the_api() {
        let check = |key: &str, subresource: &str, path: &str| {
            assert_eq!(target(key).path(subresource).as_deref(), Some(path), "{key}");
        };
        check("/core/v1/pods/default/web", "", "/api/v1/namespaces/default/pods/web");
        check("/core/v1/pods/null/null", "", "/api/v1/pods");
        check("/core/v1/pods/default", "", "/api/v1/namespaces/default/pods");
        check(
            "/apps/v1/deployments/a/b",
            "scale",
            "/apis/apps/v1/namespaces/a/deployments/b/scale",
        );
        check("/core/v1/nodes/null/edge1", "status", "/api/v1/nodes/edge1/status");
        check("/core/v1/namespaces/null/a", "", "/api/v1/namespaces/a");
        for wrong in [
            "",
            "/",
            "core/v1/pods",
            "/core/v1",
            "/core/v1/pods/a/b/c",
            "/core/v1/pods/../x",
            "/core/v1/pods/a/b?x",
            "/core/v1/pods//b",
            "/core/v1/pods/a%2fb/c",
        ] {
            assert_eq!(Target::parse(wrong), None, "{wrong}");
        }
        assert_eq!(target("/core/v1/pods/a/b").path("../x"), None);
    }

    #[test]
    fn tokens_are_kubeedges() {
        let token = |plural: &str| {
            Resource { group: String::new(), version: "v1".into(), plural: plural.into() }.token()
        };
        for (plural, expected) in [
            ("pods", "pod"),
            ("endpoints", "endpoints"),
            ("endpointslices", "endpointslice"),
            ("services", "service"),
            ("networkpolicies", "networkpolicy"),
            ("ingressclasses", "ingressclass"),
            ("leases", "leases"),
            ("configmaps", "configmap"),
            ("storageclasses", "storageclass"),
            ("fish", "fish"),
        ] {
            assert_eq!(token(plural), expected);
        }
    }

    #[test]
    fn a_node_reads_what_is_near_its_pods_and_writes_nothing() {
        let check = |verb: &str, key: &str, fields: &str, has_pods: bool, refers: bool| {
            check("edge1", verb, &target(key), "", fields, has_pods, refers)
        };
        assert_eq!(check("list", "/core/v1/services/null/null", "", false, false), Ok(()));
        assert_eq!(check("get", "/apps/v1/deployments/a/b", "", true, false), Ok(()));
        assert!(check("get", "/apps/v1/deployments/a/b", "", false, false).is_err());
        assert_eq!(
            check("list", "/core/v1/pods/null/null", "spec.nodeName=edge1", false, false),
            Ok(())
        );
        assert!(
            check("list", "/core/v1/pods/null/null", "spec.nodeName=edge10", false, false).is_err()
        );
        assert!(check("list", "/core/v1/secrets/a/null", "", true, true).is_err());
        assert!(check("get", "/core/v1/secrets/a/b", "", true, false).is_err());
        assert_eq!(check("get", "/core/v1/secrets/a/b", "", true, true), Ok(()));
        let refused = check("delete", "/core/v1/pods/a/b", "", true, true).expect_err("a write");
        assert_eq!((refused.code, refused.reason.as_str()), (403, "Forbidden"));
        assert!(
            refused.message.contains("system:node:edge1")
                && refused.message.contains("impersonate")
        );
        let proxied =
            super::check("edge1", "get", &target("/core/v1/services/a/b"), "proxy", "", true, true);
        assert!(proxied.is_err());
    }

    #[test]
    fn an_answer_is_written_with_gos_keys() {
        let request = r#"{"ID":"x","Key":"/core/v1/pods/default/web","Verb":"get","Nodename":"edge1","Option":"e30=","ReqBody":null,"Subresource":"","RespBody":null,"Status":"InApplying","Reason":"","Error":{"ErrStatus":{"metadata":{}}},"Timestamp":"0001-01-01T00:00:00Z"}"#;
        let application: Application = serde_json::from_str(request).expect("an application");
        assert_eq!(serde_json::to_string(&application).expect("json"), request);
        let approved = application.clone().approved(Some("e30=".into()));
        assert_eq!(
            (approved.status.as_str(), approved.resp_body.as_deref()),
            (APPROVED, Some("e30="))
        );
        let rejected = application.rejected(Status::new(404, "NotFound", "m"));
        let json = serde_json::to_string(&rejected).expect("json");
        assert!(json.contains(r#""Error":{"ErrStatus":{"metadata":{},"status":"Failure","message":"m","reason":"NotFound","code":404}}"#), "{json}");
    }
}
