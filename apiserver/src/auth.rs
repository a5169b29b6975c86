//! Who a request comes from and what it may do.
//!
//! Identities come from client certificates, bearer tokens and the in-process client. What a group may do stands in the
//! tables below; there are no stored roles yet, so that nothing a client writes can widen its rights.

use crate::pki::{PkiError, write_private};
use crate::route::Target;
use crate::signer::KUBELET_SERVING;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};
use skerry_apiserver_core::status::ApiError;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Group of those who may do everything.
pub const MASTERS: &str = "system:masters";
/// Group of the controllers that run inside the server.
pub const CONTROLLERS: &str = "system:kube-controller-manager";
/// Group of CloudCore.
pub const CLOUDCORE: &str = "skerry:cloudcore";
/// Group of the reconciler.
pub const RECONCILER: &str = "skerry:reconciler";
/// Group of those who may read everything but Secrets.
pub const VIEWER: &str = "skerry:viewer";

/// Tokens that can be minted; each costs a line in a file and an entry in memory.
const TOKENS_MAX: usize = 10_000;

/// Who sends a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) groups: Vec<String>,
    /// Of a service account; else empty.
    pub(crate) uid: String,
    /// What else is known, under the keys of SubjectAccessReview.
    pub(crate) extra: BTreeMap<String, Vec<String>>,
}

impl User {
    pub(crate) fn new(name: &str, groups: &[impl AsRef<str>]) -> Self {
        let mut groups: Vec<String> = groups.iter().map(|group| group.as_ref().into()).collect();
        groups.push("system:authenticated".into());
        Self { name: name.into(), groups, uid: String::new(), extra: BTreeMap::new() }
    }

    pub(crate) fn anonymous() -> Self {
        Self {
            name: "system:anonymous".into(),
            groups: vec!["system:unauthenticated".into()],
            uid: String::new(),
            extra: BTreeMap::new(),
        }
    }

    pub(crate) fn is_anonymous(&self) -> bool {
        self.name == "system:anonymous"
    }

    pub(crate) fn to_value(&self) -> Value {
        let mut value = json!({"username": self.name, "groups": self.groups});
        if !self.uid.is_empty() {
            value["uid"] = self.uid.as_str().into();
        }
        if !self.extra.is_empty() {
            value["extra"] = json!(self.extra);
        }
        value
    }
}

/// What a request wants to do, in the words of SubjectAccessReview.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) verb: String,
    pub(crate) group: String,
    pub(crate) resource: String,
    pub(crate) subresource: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Path of a request that is about no resource.
    pub(crate) path: Option<String>,
}

impl Attributes {
    /// Attributes of a request for a resource.
    pub(crate) fn of(verb: &str, target: &Target) -> Self {
        Self {
            verb: verb.into(),
            group: target.group.clone(),
            resource: target.resource.clone(),
            subresource: target.subresource.clone(),
            namespace: target.namespace.clone().unwrap_or_default(),
            name: target.name.clone().unwrap_or_default(),
            path: None,
        }
    }
}

/// One line of what a group may do. `*` stands for everything; `*.x` as a group for every group below `x`.
struct Rule {
    verbs: &'static [&'static str],
    groups: &'static [&'static str],
    /// `pods`, `pods/status`; `*` includes subresources.
    resources: &'static [&'static str],
    /// Only in this namespace.
    namespace: Option<&'static str>,
    /// Only the object of this name; a `*` at its end stands for anything.
    name: Option<&'static str>,
}

const READ: &[&str] = &["get", "list", "watch"];
const WRITE: &[&str] = &["create", "update", "patch", "delete"];
const ALL: &[&str] = &["*"];
const CERTIFICATES: &[&str] = &["certificates.k8s.io"];

const fn rule(
    verbs: &'static [&'static str],
    groups: &'static [&'static str],
    resources: &'static [&'static str],
) -> Rule {
    Rule { verbs, groups, resources, namespace: None, name: None }
}

const CLOUDCORE_RULES: &[Rule] = &[
    rule(
        READ,
        &[""],
        &[
            "pods",
            "nodes",
            "configmaps",
            "secrets",
            "services",
            "endpoints",
            "namespaces",
            "serviceaccounts",
            "persistentvolumes",
            "persistentvolumeclaims",
            "events",
        ],
    ),
    rule(READ, &["discovery.k8s.io"], &["endpointslices"]),
    rule(WRITE, &[""], &["nodes", "nodes/status", "events"]),
    rule(WRITE, &["events.k8s.io"], &["events"]),
    rule(ALL, &["coordination.k8s.io"], &["leases"]),
    rule(&["get", "update", "patch"], &[""], &["pods/status"]),
    // Mirrors of static pods are created, in the name of their node.
    rule(&["create", "delete"], &[""], &["pods"]),
    rule(&["create"], &[""], &["namespaces"]),
    // What KubeEdge's nodes ask for through the hub: volumes, certificates of their own servers, tokens of their pods.
    rule(&["get", "list", "watch", "create"], CERTIFICATES, &["certificatesigningrequests"]),
    rule(&["get", "update", "patch"], CERTIFICATES, &["certificatesigningrequests/approval"]),
    Rule {
        verbs: &["approve"],
        groups: CERTIFICATES,
        resources: &["signers"],
        namespace: None,
        name: Some(KUBELET_SERVING),
    },
    // In the name of a node, whose rights are then the bound.
    Rule {
        verbs: &["impersonate"],
        groups: &[""],
        resources: &["users"],
        namespace: None,
        name: Some("system:node:*"),
    },
    Rule {
        verbs: &["impersonate"],
        groups: &[""],
        resources: &["groups"],
        namespace: None,
        name: Some("system:nodes"),
    },
    rule(READ, &["storage.k8s.io"], &["volumeattachments", "csinodes", "csidrivers"]),
    rule(&["create"], &[""], &["serviceaccounts/token"]),
    Rule {
        verbs: ALL,
        groups: &[""],
        resources: &["secrets", "configmaps", "services", "serviceaccounts"],
        namespace: Some("kubeedge"),
        name: None,
    },
    rule(ALL, &["*.kubeedge.io"], ALL),
    // What nodes say of their kernels; they themselves may not write it.
    rule(
        &["get", "list", "watch", "create", "update"],
        &["fleet.skerry.dev"],
        &["nodequalifications"],
    ),
    // Rules about devices go to nodes.
    rule(&["get", "list", "watch"], &["fleet.skerry.dev"], &["devicerules"]),
    rule(
        &["get", "list", "watch", "create", "update", "patch"],
        &["apiextensions.k8s.io"],
        &["customresourcedefinitions"],
    ),
    // Of its own certificates and of its nodes' requests.
    rule(
        &["create"],
        &["authentication.k8s.io", "authorization.k8s.io"],
        &["tokenreviews", "subjectaccessreviews"],
    ),
];

/// The reconciler also has every verb on every namespaced resource; see [`Access::allows`].
const RECONCILER_RULES: &[Rule] = &[
    rule(ALL, &[""], &["namespaces"]),
    rule(&["get", "list", "watch", "patch"], &[""], &["nodes"]),
    rule(ALL, &["apiextensions.k8s.io"], &["customresourcedefinitions"]),
    rule(ALL, &["fleet.skerry.dev"], ALL),
];

const CONTROLLER_RULES: &[Rule] = &[
    rule(
        ALL,
        &["", "apps", "batch", "discovery.k8s.io", "coordination.k8s.io", "events.k8s.io"],
        ALL,
    ),
    rule(READ, ALL, ALL),
];

/// Everything but Secrets and what reads like one.
const VIEWER_HIDDEN: &[&str] = &["secrets"];

/// Decides for one server; knows which resources are namespaced.
pub(crate) struct Access<'a> {
    /// Whether a resource (group, plural) is namespaced; `None` if it does not exist.
    pub(crate) namespaced: &'a dyn Fn(&str, &str) -> Option<bool>,
}

impl Access<'_> {
    pub(crate) fn allows(&self, user: &User, wanted: &Attributes) -> bool {
        if let Some(path) = &wanted.path {
            return open_path(path) || (!user.is_anonymous() && readable_path(path, user));
        }
        // What everyone may ask: about themselves.
        if !user.is_anonymous()
            && wanted.verb == "create"
            && matches!(
                (wanted.group.as_str(), wanted.resource.as_str()),
                ("authorization.k8s.io", "selfsubjectaccessreviews" | "selfsubjectrulesreviews")
                    | ("authentication.k8s.io", "selfsubjectreviews")
            )
        {
            return true;
        }
        user.groups.iter().any(|group| match group.as_str() {
            MASTERS => true,
            CLOUDCORE => CLOUDCORE_RULES.iter().any(|rule| rule.allows(wanted)),
            CONTROLLERS => CONTROLLER_RULES.iter().any(|rule| rule.allows(wanted)),
            RECONCILER => {
                RECONCILER_RULES.iter().any(|rule| rule.allows(wanted))
                    || (self.namespaced)(&wanted.group, &wanted.resource) == Some(true)
            }
            VIEWER => {
                READ.contains(&wanted.verb.as_str())
                    && !VIEWER_HIDDEN.contains(&wanted.resource.as_str())
            }
            _ => false,
        })
    }

    /// # Errors
    ///
    /// 403, or 401 for a request without credentials.
    pub(crate) fn check(&self, user: &User, wanted: &Attributes) -> Result<(), ApiError> {
        if self.allows(user, wanted) {
            return Ok(());
        }
        if user.is_anonymous() {
            return Err(ApiError::unauthorized());
        }
        Err(ApiError::forbidden(
            &wanted.group,
            &wanted.resource,
            &wanted.name,
            &refusal(user, wanted),
        ))
    }
}

/// Rules of `user` in the form of SelfSubjectRulesReview: (resourceRules, nonResourceRules).
pub(crate) fn rules_of(user: &User) -> (Vec<Value>, Vec<Value>) {
    let everything = json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]});
    let mut resources = vec![json!({
        "verbs": ["create"], "apiGroups": ["authorization.k8s.io"],
        "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
    })];
    let mut paths = vec![json!({"verbs": ["get"], "nonResourceURLs": [
        "/healthz", "/livez", "/readyz", "/version", "/api", "/api/*", "/apis", "/apis/*", "/openapi/*"]})];
    for group in &user.groups {
        let table = match group.as_str() {
            MASTERS => {
                resources.push(everything.clone());
                paths.push(json!({"verbs": ["*"], "nonResourceURLs": ["*"]}));
                continue;
            }
            CLOUDCORE => CLOUDCORE_RULES,
            CONTROLLERS => CONTROLLER_RULES,
            RECONCILER => {
                resources.push(everything.clone());
                RECONCILER_RULES
            }
            VIEWER => {
                resources.push(json!({"verbs": READ, "apiGroups": ["*"], "resources": ["*"]}));
                continue;
            }
            _ => continue,
        };
        resources.extend(table.iter().map(|rule| {
            json!({"verbs": rule.verbs, "apiGroups": rule.groups, "resources": rule.resources})
        }));
    }
    (resources, paths)
}

impl Rule {
    fn allows(&self, wanted: &Attributes) -> bool {
        let any = |list: &[&str], value: &str| list.iter().any(|one| *one == "*" || *one == value);
        let group = self.groups.iter().any(|group| match group.strip_prefix("*.") {
            Some(domain) => wanted.group == domain || wanted.group.ends_with(&group[1..]),
            None => *group == "*" || *group == wanted.group,
        });
        let resource = if wanted.subresource.is_empty() {
            any(self.resources, &wanted.resource)
        } else {
            any(self.resources, &format!("{}/{}", wanted.resource, wanted.subresource))
        };
        group
            && resource
            && any(self.verbs, &wanted.verb)
            && self.namespace.is_none_or(|namespace| namespace == wanted.namespace)
            && self.name.is_none_or(|name| match name.strip_suffix('*') {
                Some(prefix) => wanted.name.starts_with(prefix),
                None => name == wanted.name,
            })
    }
}

/// Paths that need no credentials.
fn open_path(path: &str) -> bool {
    let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    matches!(first, "healthz" | "livez" | "readyz" | "version")
}

/// Paths that anyone with credentials may read.
fn readable_path(path: &str, user: &User) -> bool {
    let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    matches!(first, "" | "api" | "apis" | "openapi" | "openid" | ".well-known")
        || user.groups.iter().any(|group| group == MASTERS)
}

/// Source: the message of Kubernetes' RBAC authorizer, as clients show and parse it.
fn refusal(user: &User, wanted: &Attributes) -> String {
    let mut text = format!("User \"{}\" cannot {}", user.name, wanted.verb);
    if let Some(path) = &wanted.path {
        write!(text, " path \"{path}\"").ok();
        return text;
    }
    write!(text, " resource \"{}", wanted.resource).ok();
    if !wanted.subresource.is_empty() {
        write!(text, "/{}", wanted.subresource).ok();
    }
    write!(text, "\" in API group \"{}\"", wanted.group).ok();
    match wanted.namespace.as_str() {
        "" => text.push_str(" at the cluster scope"),
        namespace => {
            write!(text, " in the namespace \"{namespace}\"").ok();
        }
    }
    text
}

/// Bearer tokens: only their digests are kept, in `dir/pki/tokens`, one `digest user group,group` a line.
pub(crate) struct Tokens {
    path: PathBuf,
    known: Mutex<HashMap<String, User>>,
}

impl Tokens {
    pub(crate) fn open(dir: &Path) -> Result<Self, PkiError> {
        let path = dir.join("tokens");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(PkiError::Io { path, source }),
        };
        let mut known = HashMap::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            let mut words = line.splitn(3, ' ');
            let (Some(digest), Some(user)) = (words.next(), words.next()) else {
                return Err(PkiError::Damaged { path, detail: "a line is cut".into() });
            };
            let groups: Vec<&str> =
                words.next().unwrap_or_default().split(',').filter(|g| !g.is_empty()).collect();
            known.insert(digest.to_owned(), User::new(user, &groups));
        }
        Ok(Self { path, known: Mutex::new(known) })
    }

    /// Makes a token for `user` in `groups`, valid until the file is removed.
    pub(crate) fn mint(&self, user: &str, groups: &[&str]) -> Result<String, PkiError> {
        let damaged =
            |detail: &str| PkiError::Damaged { path: self.path.clone(), detail: detail.into() };
        if user.is_empty() || user.contains(char::is_whitespace) {
            return Err(damaged("a user name without spaces is needed"));
        }
        let token = URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>());
        let mut known = self.known.lock().expect("no panic while held");
        if known.len() >= TOKENS_MAX {
            return Err(damaged("too many tokens"));
        }
        let mut next = known.clone();
        next.insert(hashed(&token), User::new(user, groups));
        let mut text = String::new();
        for (digest, user) in &next {
            let own: Vec<&str> = user
                .groups
                .iter()
                .map(String::as_str)
                .filter(|group| *group != "system:authenticated")
                .collect();
            writeln!(text, "{digest} {} {}", user.name, own.join(",")).ok();
        }
        write_private(&self.path, &text)?;
        *known = next;
        Ok(token)
    }

    pub(crate) fn user(&self, token: &str) -> Option<User> {
        self.known.lock().expect("no panic while held").get(&hashed(token)).cloned()
    }
}

/// The digest is what is compared, so that the time of a comparison says nothing about the token.
fn hashed(token: &str) -> String {
    URL_SAFE_NO_PAD.encode(digest(&SHA256, token.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(group: &str, verb: &str, api_group: &str, resource: &str, namespace: &str) -> bool {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let wanted = Attributes {
            verb: verb.into(),
            group: api_group.into(),
            resource: resource.into(),
            subresource: subresource.into(),
            namespace: namespace.into(),
            ..Attributes::default()
        };
        let namespaced =
            |_: &str, resource: &str| Some(!matches!(resource, "nodes" | "namespaces"));
        Access { namespaced: &namespaced }.allows(&User::new("u", &[group]), &wanted)
    }

    #[test]
    fn cloudcore_reads_secrets_everywhere_and_writes_them_only_in_its_namespace() {
        assert!(allowed(CLOUDCORE, "get", "", "secrets", "site-a"));
        assert!(!allowed(CLOUDCORE, "update", "", "secrets", "site-a"));
        assert!(allowed(CLOUDCORE, "update", "", "secrets", "kubeedge"));
    }

    #[test]
    fn cloudcore_creates_mirror_pods_and_writes_status_but_no_spec() {
        assert!(allowed(CLOUDCORE, "patch", "", "pods/status", "site-a"));
        assert!(allowed(CLOUDCORE, "create", "", "pods", "site-a"));
        assert!(!allowed(CLOUDCORE, "update", "", "pods", "site-a"));
        assert!(allowed(CLOUDCORE, "create", "", "serviceaccounts/token", "site-a"));
        assert!(!allowed(CLOUDCORE, "create", "", "serviceaccounts", "site-a"));
        assert!(allowed(CLOUDCORE, "update", "devices.kubeedge.io", "devices/status", "site-a"));
        assert!(!allowed(CLOUDCORE, "get", "notkubeedge.io", "devices", "site-a"));
    }

    #[test]
    fn cloudcore_approves_certificates_of_kubelets_servers_and_no_others() {
        let approve = |signer: &str| Attributes {
            verb: "approve".into(),
            group: "certificates.k8s.io".into(),
            resource: "signers".into(),
            name: signer.into(),
            ..Attributes::default()
        };
        let access = Access { namespaced: &|_, _| Some(false) };
        let cloudcore = User::new("c", &[CLOUDCORE]);
        assert!(access.allows(&cloudcore, &approve(KUBELET_SERVING)));
        assert!(!access.allows(&cloudcore, &approve("kubernetes.io/kube-apiserver-client")));
    }

    #[test]
    fn reconciler_writes_namespaced_objects_and_does_not_delete_nodes() {
        assert!(allowed(RECONCILER, "create", "apps", "deployments", "site-a"));
        assert!(allowed(RECONCILER, "delete", "", "namespaces", ""));
        assert!(allowed(RECONCILER, "patch", "", "nodes", ""));
        assert!(!allowed(RECONCILER, "delete", "", "nodes", ""));
    }

    #[test]
    fn viewer_reads_all_but_secrets_and_writes_nothing() {
        assert!(allowed(VIEWER, "list", "apps", "deployments", ""));
        assert!(!allowed(VIEWER, "list", "", "secrets", ""));
        assert!(!allowed(VIEWER, "create", "", "pods", "default"));
    }

    #[test]
    fn refusal_is_in_kubernetes_words() {
        let wanted = Attributes {
            verb: "create".into(),
            resource: "pods".into(),
            namespace: "default".into(),
            ..Attributes::default()
        };
        let error = Access { namespaced: &|_, _| Some(true) }
            .check(&User::new("eva", &[VIEWER]), &wanted)
            .unwrap_err();
        assert_eq!(
            error.message,
            "pods is forbidden: User \"eva\" cannot create resource \"pods\" in API group \"\" in the namespace \"default\""
        );
        assert_eq!(error.code, 403);
    }

    #[test]
    fn token_is_known_after_a_restart_and_its_text_is_not_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let token = Tokens::open(dir.path()).unwrap().mint("ann", &[VIEWER, "x"]).unwrap();
        let again = Tokens::open(dir.path()).unwrap();
        assert_eq!(again.user(&token), Some(User::new("ann", &[VIEWER, "x"])));
        assert_eq!(again.user("other"), None);
        assert!(!std::fs::read_to_string(dir.path().join("tokens")).unwrap().contains(&token));
    }
}
