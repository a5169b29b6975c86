//! What a request to the node's API is about, and how it is told to the cloud.
//!
//! Source: kubeedge/kubeedge, pkg/metaserver/{application,key}.go; Kubernetes API conventions for the paths.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::Method;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use skerry_protocol::application::is_discovery;
use std::collections::BTreeMap;

/// Query parameters that are options of lists and watches, with those that are numbers.
const LIST_OPTIONS: [(&str, bool); 6] = [
    ("labelSelector", false),
    ("fieldSelector", false),
    ("resourceVersion", false),
    ("continue", false),
    ("limit", true),
    ("timeoutSeconds", true),
];

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// A document of discovery.
    Discovery(String),
    /// One object or a collection.
    Resource(Target),
}

/// An object, or a collection when `name` is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Target {
    /// Empty for the core group.
    pub(super) group: String,
    pub(super) version: String,
    /// Plural, as in the path.
    pub(super) resource: String,
    /// Empty for cluster scope, or for all namespaces.
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) subresource: String,
}

/// What to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Get,
    List,
    Watch,
    Create,
    Update,
    UpdateStatus,
    Patch,
    Delete,
}

/// Parameters behind the `?`, decoded.
pub(super) type Query = BTreeMap<String, String>;

impl Asked {
    /// Reads a path; `None` when no API has such a one.
    pub(super) fn parse(path: &str) -> Option<Self> {
        let path = path.trim_end_matches('/');
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        if segments
            .iter()
            .any(|segment| segment.is_empty() || matches!(*segment, "." | ".." | "null"))
        {
            return None;
        }
        if is_discovery(path) {
            return Some(Self::Discovery(path.to_owned()));
        }
        let (group, version, rest) = match *segments.as_slice() {
            ["api", version, ref rest @ ..] if !rest.is_empty() => ("", version, rest),
            ["apis", group, version, ref rest @ ..] if !rest.is_empty() => (group, version, rest),
            _ => return None,
        };
        // `namespaces/x/status` is of the Namespace, `namespaces/x/pods` is in it.
        let (namespace, rest) = match *rest {
            ["namespaces", _, "status" | "finalize"] => ("", rest),
            ["namespaces", namespace, ref rest @ ..] if !rest.is_empty() => (namespace, rest),
            _ => ("", rest),
        };
        let (resource, name, sub) = match *rest {
            [resource] => (resource, "", String::new()),
            [resource, name, ref sub @ ..] => (resource, name, sub.join("/")),
            [] => return None,
        };
        Some(Self::Resource(Target {
            group: group.into(),
            version: version.into(),
            resource: resource.into(),
            namespace: namespace.into(),
            name: name.into(),
            subresource: sub,
        }))
    }
}

impl Target {
    /// The cloud's name for it.
    pub(super) fn key(&self) -> String {
        let or_null =
            |text: &str| if text.is_empty() { "null".to_owned() } else { text.to_owned() };
        let group = if self.group.is_empty() { "core" } else { &self.group };
        let (namespace, name) = (or_null(&self.namespace), or_null(&self.name));
        format!("/{group}/{}/{}/{namespace}/{name}", self.version, self.resource)
    }

    /// `apiVersion` of its objects.
    pub(super) fn api_version(&self) -> String {
        match self.group.as_str() {
            "" => self.version.clone(),
            group => format!("{group}/{}", self.version),
        }
    }

    /// Type of its rows: the lower-case singular, as far as KubeEdge can tell it.
    pub(super) fn token(&self) -> String {
        let plural = self.resource.to_lowercase();
        if matches!(plural.as_str(), "endpoints" | "leases") {
            return plural; // as KubeEdge's own table of words has them
        }
        if matches!(plural.as_str(), "endpointslices" | "nodes" | "namespaces" | "services") {
            return plural[..plural.len() - 1].to_owned();
        }
        match plural.strip_suffix("ies") {
            Some(stem) => format!("{stem}y"),
            None if plural.ends_with("ses") => plural[..plural.len() - 2].to_owned(),
            None => plural.strip_suffix('s').unwrap_or(&plural).to_owned(),
        }
    }

    /// Reads the verb; `None` when the method does not fit the path.
    pub(super) fn verb(&self, method: &Method, query: &Query) -> Option<Verb> {
        let named = !self.name.is_empty();
        let watch = query.get("watch").is_some_and(|watch| watch == "true" || watch == "1");
        match *method {
            Method::GET if watch && self.subresource.is_empty() => Some(Verb::Watch),
            Method::GET if named => Some(Verb::Get),
            Method::GET => Some(Verb::List),
            Method::POST if !named => Some(Verb::Create),
            Method::PUT if named && self.subresource == "status" => Some(Verb::UpdateStatus),
            Method::PUT if named => Some(Verb::Update),
            Method::PATCH if named => Some(Verb::Patch),
            Method::DELETE if named => Some(Verb::Delete),
            _ => None,
        }
    }
}

impl Verb {
    fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::UpdateStatus => "updatestatus",
            Self::Patch => "patch",
            Self::Delete => "delete",
        }
    }
}

/// A request as the cloud takes it: its id and its content.
pub(super) fn application(
    node: &str,
    key: &str,
    verb: Verb,
    option: &Value,
    body: Option<&[u8]>,
    subresource: &str,
) -> (String, Value) {
    let option = option.to_string();
    let mut digest = Sha256::new();
    for part in [node, key, verb.as_str(), &option] {
        digest.update(part.as_bytes());
    }
    digest.update(body.unwrap_or_default());
    digest.update(subresource.as_bytes());
    let id: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let content = json!({
        "ID": id, "Key": key, "Verb": verb.as_str(), "Nodename": node,
        "Option": STANDARD.encode(option), "ReqBody": body.map(|body| STANDARD.encode(body)),
        "Subresource": subresource, "RespBody": null, "Status": "PreApplying", "Reason": "",
        "Error": {"ErrStatus": {"metadata": {}}}, "Timestamp": "0001-01-01T00:00:00Z",
    });
    (id, content)
}

/// Options of a list or watch.
pub(super) fn list_options(query: &Query) -> Value {
    let mut options = Map::new();
    for (name, number) in LIST_OPTIONS {
        let Some(text) = query.get(name).filter(|text| !text.is_empty()) else { continue };
        let value = match number {
            true => text.parse::<i64>().map(Value::from).ok(),
            false => Some(Value::from(text.as_str())),
        };
        value.map(|value| options.insert(name.into(), value));
    }
    Value::Object(options)
}

/// Options of a write.
pub(super) fn write_options(query: &Query) -> Value {
    let mut options = Map::new();
    for name in ["fieldManager", "fieldValidation"] {
        query.get(name).map(|text| options.insert(name.into(), text.as_str().into()));
    }
    query.get("dryRun").map(|text| options.insert("dryRun".into(), json!([text])));
    query.get("force").map(|text| options.insert("force".into(), (text == "true").into()));
    Value::Object(options)
}

/// Options of a patch; the patch itself is among them.
pub(super) fn patch_options(target: &Target, query: &Query, kind: &str, patch: &[u8]) -> Value {
    let subresources: Vec<&str> =
        target.subresource.split('/').filter(|part| !part.is_empty()).collect();
    json!({
        "Name": target.name, "PatchType": kind, "Data": STANDARD.encode(patch),
        "Options": write_options(query), "Subresources": subresources,
    })
}

/// Reads what is behind the `?`.
pub(super) fn query(text: &str) -> Query {
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decoded(name), decoded(value))
        })
        .collect()
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        let code = (*byte == b'%').then(|| after.get(..2)).flatten();
        let code = code.and_then(|code| std::str::from_utf8(code).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(code) => {
                bytes.push(code);
                rest = &after[2..];
            }
            None => {
                bytes.push(if *byte == b'+' { b' ' } else { *byte });
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_keys_of_the_cloud_and_types_of_rows() {
        for (path, key, token) in [
            ("/api/v1/pods", "/core/v1/pods/null/null", "pod"),
            ("/api/v1/namespaces/a/pods/b", "/core/v1/pods/a/b", "pod"),
            ("/api/v1/namespaces/a/pods/b/status", "/core/v1/pods/a/b", "pod"),
            ("/api/v1/namespaces/a", "/core/v1/namespaces/null/a", "namespace"),
            ("/api/v1/namespaces/a/status", "/core/v1/namespaces/null/a", "namespace"),
            ("/api/v1/endpoints", "/core/v1/endpoints/null/null", "endpoints"),
            (
                "/apis/discovery.k8s.io/v1/endpointslices",
                "/discovery.k8s.io/v1/endpointslices/null/null",
                "endpointslice",
            ),
            (
                "/apis/networking.k8s.io/v1/namespaces/a/networkpolicies/b/",
                "/networking.k8s.io/v1/networkpolicies/a/b",
                "networkpolicy",
            ),
        ] {
            let Some(Asked::Resource(target)) = Asked::parse(path) else { panic!("{path}") };
            assert_eq!((target.key().as_str(), target.token().as_str()), (key, token), "{path}");
        }
        for path in ["/api", "/apis", "/apis/apps", "/apis/apps/v1", "/version", "/api/v1"] {
            assert_eq!(Asked::parse(path), Some(Asked::Discovery(path.into())));
        }
        for path in ["/", "/metrics", "/api/v1/a//b", "/api/v1/../x", "/apis/a/v1/null/x"] {
            assert_eq!(Asked::parse(path), None, "{path}");
        }
    }

    #[test]
    fn application_is_what_kubeedge_sends() {
        let query = query("labelSelector=a%3Db%2Cc&watch=true&limit=5&x");
        assert_eq!(query["labelSelector"], "a=b,c");
        let option = list_options(&query);
        assert_eq!(option, json!({"labelSelector": "a=b,c", "limit": 5}));
        let key = "/core/v1/pods/null/null";
        let (id, content) = application("edge1", key, Verb::List, &json!({}), None, "");
        // SHA-256 of `edge1/core/v1/pods/null/nulllist{}`.
        assert_eq!(id, "6793150c58b45190e3cc2a0288fd18cb946d18299eb3a90b3073c45f00794e00");
        assert_eq!(content["Option"], "e30=");
        assert_eq!(content["ReqBody"], Value::Null);
        let target = Target { name: "b".into(), subresource: "status".into(), ..Target::default() };
        let patch = patch_options(&target, &Query::new(), "application/merge-patch+json", b"{}");
        assert_eq!(patch["Data"], "e30=");
        assert_eq!(patch["Subresources"], json!(["status"]));
    }
}
