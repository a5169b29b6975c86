//! `fleet.skerry.dev/v1alpha1`.
//!
//! | kind | lives in | says |
//! |---|---|---|
//! | [`Fleet`] | `fleet.yaml`; status in the cluster, [`SYSTEM_NAMESPACE`] | what holds for all sites |
//! | [`Site`] | `sites/*.yaml`; status in the cluster, namespace `site-<name>` | one place with its nodes |
//! | [`App`] | `apps/<folder>/app.yaml` | what runs, and on which sites |
//! | [`OsReleaseFile`] | `os/*.yaml` | a channel of the appliance's OS, see [`super::os`] |
//! | [`NodeQualification`] | the cluster, named like its node | what the node's kernel was seen to carry |
//! | [`Release`] | the cluster, namespace `site-<name>` | one app on one site: what was applied, and how it fares |
//!
//! The types named `*File` are what Git holds: unknown fields are refused, so that a typing error is an error.

use super::Span;
use super::os::OsPolicy;
pub use super::os::OsReleaseSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// API group of everything here.
pub const GROUP: &str = "fleet.skerry.dev";
/// Version of everything here.
pub const VERSION: &str = "v1alpha1";
/// `apiVersion` of everything here.
pub const API_VERSION: &str = "fleet.skerry.dev/v1alpha1";
/// Namespace of objects that belong to the fleet as a whole.
pub const SYSTEM_NAMESPACE: &str = "skerry-system";
/// Name of the one [`Fleet`] object of a cluster; fixed, so that it exists when `fleet.yaml` cannot be read.
pub const FLEET_NAME: &str = "fleet";
/// Label with the site's name: on rendered objects, their pods, the site's namespace and its nodes.
pub const SITE_LABEL: &str = "fleet.skerry.dev/site";
/// Label with the app's name: on rendered objects and their pods.
pub const APP_LABEL: &str = "fleet.skerry.dev/app";
/// Kubernetes' common label; the value is [`MANAGED_BY`].
pub const MANAGED_BY_LABEL: &str = "app.kubernetes.io/managed-by";
/// Value of [`MANAGED_BY_LABEL`] on rendered objects.
pub const MANAGED_BY: &str = "skerry";
/// Pod-template annotation with the digest of the app's ConfigMaps and Secrets that the pods read.
pub const CONFIG_DIGEST_ANNOTATION: &str = "fleet.skerry.dev/config-digest";

/// Namespace of a site.
pub fn site_namespace(site: &str) -> String {
    format!("site-{site}")
}

/// `metadata` of a kind in the repository.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileMeta {
    /// A DNS label: at most 63 of `a-z`, `0-9` and `-`.
    pub name: String,
    /// Free; what selectors match for a site.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Free; never read.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// `fleet.yaml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FleetFile {
    /// Always [`API_VERSION`].
    pub api_version: String,
    /// Always `Fleet`.
    pub kind: String,
    /// The fleet's name; free.
    pub metadata: FileMeta,
    /// What holds for all sites.
    #[serde(default)]
    pub spec: FleetSpec,
}

/// What holds for all sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FleetSpec {
    /// Whether objects, apps and sites that left the repository are deleted from the cluster. Default: true.
    #[serde(default = "yes")]
    pub prune: bool,
    /// Values for `${fleet.vars.NAME}`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub vars: Map<String, Value>,
    /// For sites that do not say otherwise.
    #[serde(default)]
    pub defaults: SiteDefaults,
    /// What is asked of nodes before their site gets anything.
    #[serde(default)]
    pub qualification: QualificationPolicy,
    /// Not yet: keys that must have signed a commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signers: Option<Value>,
    /// Not yet: waves and gates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Value>,
}

impl Default for FleetSpec {
    fn default() -> Self {
        Self {
            prune: true,
            vars: Map::new(),
            defaults: SiteDefaults::default(),
            qualification: QualificationPolicy::default(),
            signers: None,
            rollout: None,
        }
    }
}

/// What is asked of nodes before their site gets anything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct QualificationPolicy {
    /// What a node means that has not reported on its kernel. Default: `allow`.
    #[serde(default)]
    pub unknown_nodes: UnknownNodes,
}

/// What a node means that has not reported on its kernel, for a site with a `cni`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum UnknownNodes {
    /// Nothing: the site gets its apps, as before any node has joined.
    #[default]
    Allow,
    /// The site gets nothing new until all its nodes have reported.
    Stop,
}

fn yes() -> bool {
    true
}

/// Site settings that a fleet gives to all sites.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SiteDefaults {
    /// See [`SiteSpec::offline_budget`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offline_budget: Option<Span>,
    /// See [`SiteSpec::cni`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<String>,
    /// See [`SiteSpec::os_channel`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os_channel: Option<String>,
    /// See [`SiteSpec::os`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os: Option<OsPolicy>,
}

/// `sites/*.yaml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SiteFile {
    /// Always [`API_VERSION`].
    pub api_version: String,
    /// Always `Site`.
    pub kind: String,
    /// Name and labels of the site.
    pub metadata: FileMeta,
    /// The site.
    #[serde(default)]
    pub spec: SiteSpec,
}

/// One place with its nodes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SiteSpec {
    /// Names of the site's nodes; each gets the label [`SITE_LABEL`] once it has joined.
    #[serde(default)]
    pub nodes: Vec<String>,
    /// Values for `${site.vars.NAME}`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub vars: Map<String, Value>,
    /// How long the site may be silent before it counts as overdue. Default: the fleet's, else 72 h.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offline_budget: Option<Span>,
    /// Pod network of the site's nodes: a profile of `skerry qualify`, which every node that has reported must carry, or
    /// `auto`, which takes the best that they do. Default: none is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<String>,
    /// OS channel of the site's nodes, a name of `os/*.yaml`. Default: none; their OS is left alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os_channel: Option<String>,
    /// When the site's nodes may change their OS. Default: the fleet's, as a whole, else always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os: Option<OsPolicy>,
}

/// `apps/<folder>/app.yaml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AppFile {
    /// Always [`API_VERSION`].
    pub api_version: String,
    /// Always `App`.
    pub kind: String,
    /// The app's name, unique in the fleet.
    pub metadata: FileMeta,
    /// The app.
    pub spec: AppSpec,
}

/// What runs, and on which sites.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AppSpec {
    /// On which sites.
    pub placement: Placement,
    /// Where the manifests come from. Default: the folder `manifests` beside `app.yaml`.
    #[serde(default)]
    pub source: AppSource,
    /// Values for `${app.vars.NAME}`; they may themselves use `${site.…}` and `${fleet.…}`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub vars: Map<String, Value>,
    /// Not yet: patches by site selector.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patches: Option<Value>,
    /// Not yet: apps that have to be ready first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depends_on: Option<Value>,
    /// Not yet: waves and gates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Value>,
}

/// On which sites an app runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Placement {
    /// All conditions have to hold; `{}` is every site.
    pub sites: SiteSelector,
}

/// Picks sites by name and by label.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SiteSelector {
    /// Only these sites. An empty list is no site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub names: Option<Vec<String>>,
    /// Labels that the site has to carry.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
    /// As in a Kubernetes label selector.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<Requirement>,
}

impl SiteSelector {
    /// Whether the site with this name and these labels is picked.
    pub fn matches(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        self.names.as_ref().is_none_or(|names| names.iter().any(|wanted| wanted == name))
            && self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.match_expressions.iter().all(|requirement| requirement.matches(labels))
    }
}

/// One line of `matchExpressions`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Requirement {
    /// Label key.
    pub key: String,
    /// How to compare.
    pub operator: Operator,
    /// For `In` and `NotIn`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

impl Requirement {
    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.contains(value)),
            Operator::NotIn => value.is_none_or(|value| !self.values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

/// How a [`Requirement`] compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operator {
    /// The label has one of the values.
    In,
    /// The label is absent or has another value.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is not there.
    DoesNotExist,
}

/// Where an app's manifests come from; one of the fields at most.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AppSource {
    /// Plain Kubernetes YAML.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifests: Option<Manifests>,
    /// Not yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kustomize: Option<Value>,
    /// Not yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub helm: Option<Value>,
}

/// Plain Kubernetes YAML.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Manifests {
    /// Folder, relative to the one of `app.yaml`; read with all folders below it.
    pub path: String,
}

/// `os/*.yaml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OsReleaseFile {
    /// Always [`API_VERSION`].
    pub api_version: String,
    /// Always `OsRelease`.
    pub kind: String,
    /// The channel's name.
    pub metadata: FileMeta,
    /// The version that the channel stands for.
    pub spec: OsReleaseSpec,
}

/// The fleet as the reconciler sees it: the object [`FLEET_NAME`] in [`SYSTEM_NAMESPACE`].
///
/// It carries what belongs to no single release: which commit is in force, whether the remote answers, and every
/// problem found in the repository.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Fleet {
    /// Object metadata.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// Mirrors `fleet.yaml`; free-form, because a broken file must not keep the object from existing.
    #[serde(default)]
    pub spec: Value,
    /// What the reconciler found.
    #[serde(default)]
    pub status: Option<FleetStatus>,
}

/// What the reconciler found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FleetStatus {
    /// Where the repository is.
    pub remote: String,
    /// The branch in force.
    pub branch: String,
    /// The newest commit that was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// `Ready` (everything could be read and applied), `Fetched` (the remote answers), `Stalled` (a person has to act).
    pub conditions: Vec<Condition>,
    /// What is wrong in the repository, at most [`PROBLEMS_MAX`].
    pub problems: Vec<Problem>,
    /// Sites in the commit.
    pub sites: i64,
    /// Releases in the commit.
    pub releases: i64,
}

/// Problems listed in a [`FleetStatus`]; the rest is counted in the condition's message.
pub const PROBLEMS_MAX: usize = 50;

/// One thing that is wrong in a repository.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Problem {
    /// Path in the repository.
    pub file: String,
    /// 1-based; 0 if the problem has no line.
    pub line: u64,
    /// 1-based; 0 if the problem has no column.
    pub column: u64,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The site concerned, if only one is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub site: Option<String>,
    /// The app concerned, if only one is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub app: Option<String>,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.file.is_empty() {
            f.write_str(&self.file)?;
            if self.line > 0 {
                write!(f, ":{}:{}", self.line, self.column)?;
            }
            f.write_str(": ")?;
        }
        f.write_str(&self.message)
    }
}

/// A site as the reconciler sees it: an object named like the site, in the site's namespace.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Site {
    /// Object metadata; the site's labels are on it.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// Mirrors the file, without `vars`; the fleet's defaults are filled in.
    #[serde(default)]
    pub spec: SiteSpec,
    /// What the reconciler sees of the nodes.
    #[serde(default)]
    pub status: Option<SiteStatus>,
}

/// What the reconciler sees of a site's nodes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SiteStatus {
    /// One word: `Connected`, `Disconnected`, `Overdue`, or `Unknown` when no node has joined yet.
    pub health: String,
    /// Nodes that are ready.
    pub nodes_ready: i64,
    /// Nodes that the site names.
    pub nodes_total: i64,
    /// A sentence about it.
    pub message: String,
    /// When the health word changed, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// The site's network, when it asks for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<SiteNetwork>,
    /// The site's OS, when it follows a channel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub os: Option<SiteOs>,
}

/// The OS that a site's nodes should run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SiteOs {
    /// The channel.
    pub channel: String,
    /// The version that it stands for; empty when there is no such channel.
    pub version: String,
    /// Nodes that run it.
    pub nodes_current: i64,
    /// Nodes that are appliances.
    pub nodes_total: i64,
    /// Whether the version is kept from the site.
    pub stopped: bool,
    /// A sentence about it.
    pub message: String,
    /// What a person can do; only when something is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// The network that a site gets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SiteNetwork {
    /// Its profile; none before one can be chosen, or when none runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cni: Option<String>,
    /// Profile that carries services.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
    /// Whether the site is stopped at the gate.
    pub stopped: bool,
    /// A sentence about it.
    pub message: String,
    /// What a person can do, when it is stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// One app on one site: inventory, state, and the anchor for questions. In the site's namespace, named like the app.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Release {
    /// Object metadata.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// Which app, which site.
    #[serde(default)]
    pub spec: ReleaseSpec,
    /// What was applied and how it fares.
    #[serde(default)]
    pub status: Option<ReleaseStatus>,
}

/// Which app, which site.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReleaseSpec {
    /// Name of the app.
    pub app: String,
    /// Name of the site.
    pub site: String,
}

/// What was applied and how it fares.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReleaseStatus {
    /// Newest commit whose objects are all applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The same, 8 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision_short: Option<String>,
    /// Newest commit that was tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempted_revision: Option<String>,
    /// SHA-256 over the objects of `revision`, hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// One word: `Ready`, `Progressing`, `Pending` (the site cannot answer), `Failed`, `Stalled` (not applied).
    pub health: String,
    /// A sentence about it.
    pub message: String,
    /// Pods that are ready.
    pub pods_ready: i64,
    /// Pods that should be.
    pub pods_total: i64,
    /// When `digest` changed, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub applied_at: Option<String>,
    /// When the fields above last changed, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_at: Option<String>,
    /// `Ready`, `Reconciling`, `Stalled` as kstatus defines them.
    pub conditions: Vec<Condition>,
    /// Objects in the cluster that belong to this release; the only ones that a prune may touch.
    pub inventory: Vec<InventoryEntry>,
}

/// One condition, as Kubernetes writes them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// One word.
    pub reason: String,
    /// A sentence.
    pub message: String,
    /// When `status` changed, RFC 3339.
    pub last_transition_time: String,
}

/// One object that belongs to a release.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InventoryEntry {
    /// `apiVersion` it was applied with.
    pub api_version: String,
    /// Kind.
    pub kind: String,
    /// Namespace; empty for a cluster-scoped object.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Name.
    pub name: String,
    /// SHA-256 of the rendered object, hexadecimal; empty while it is not applied yet.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub digest: String,
}

/// What a node's kernel was seen to carry; named like the node, written by the hub in the node's word only.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeQualification {
    /// Object metadata.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// Which node.
    #[serde(default)]
    pub spec: NodeQualificationSpec,
    /// What was found.
    #[serde(default)]
    pub status: Option<NodeQualificationStatus>,
}

/// Which node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeQualificationSpec {
    /// Name of the node.
    pub node: String,
}

/// What was found on a node; the whole report stays JSON, as `skerry qualify` has its own types for it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeQualificationStatus {
    /// Release of the kernel that was judged, as in the Node's `nodeInfo.kernelVersion`.
    pub kernel: String,
    /// Machine.
    pub arch: String,
    /// Release of the rules.
    pub rules: String,
    /// SHA-256 of the report.
    pub digest: String,
    /// When it was judged, RFC 3339.
    pub observed_at: String,
    /// One word: `Qualified`, `Degraded`, `Unsupported`, `NotPermitted` or `Unknown`.
    pub verdict: String,
    /// What to run, as the node's own table says.
    pub advice: Value,
    /// Verdict over each profile.
    pub profiles: Vec<ProfileVerdict>,
    /// The node's signature over the report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signature: Option<Value>,
    /// The report's stable part.
    pub report: Value,
}

/// One profile's verdict.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProfileVerdict {
    /// Id of the profile.
    pub profile: String,
    /// `qualified`, `degraded`, `unsupported` or `unknown`.
    pub verdict: String,
    /// Why it is not qualified.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub missing: String,
    /// The smallest change that helps.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hint: String,
}

use k8s_openapi::{ClusterResourceScope as Cluster, NamespaceResourceScope as Namespaced};
crate::resource!(NodeQualification, "fleet.skerry.dev", "v1alpha1", "nodequalifications", Cluster);
crate::resource!(Fleet, "fleet.skerry.dev", "v1alpha1", "fleets", Namespaced);
crate::resource!(Site, "fleet.skerry.dev", "v1alpha1", "sites", Namespaced);
crate::resource!(Release, "fleet.skerry.dev", "v1alpha1", "releases", Namespaced);

/// The definition of NodeQualification, which CloudCore needs without the others.
pub fn node_qualification_crd() -> Value {
    let text = || json!({"type": "string"});
    let anything = || json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let spec = json!({"type": "object", "required": ["node"], "properties": {"node": text()}});
    let status = json!({
        "type": "object",
        "properties": {
            "kernel": text(), "arch": text(), "rules": text(), "digest": text(), "observedAt": text(),
            "verdict": {
                "type": "string",
                "enum": ["Qualified", "Degraded", "Unsupported", "NotPermitted", "Unknown"],
            },
            "advice": anything(),
            "profiles": {
                "type": "array",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["profile"],
                "items": {
                    "type": "object",
                    "required": ["profile", "verdict"],
                    "properties": {
                        "profile": text(),
                        "verdict": {
                            "type": "string",
                            "enum": ["qualified", "degraded", "unsupported", "unknown"],
                        },
                        "missing": text(),
                        "hint": text(),
                    },
                },
            },
            "signature": anything(),
            "report": anything(),
        },
    });
    let column = |name: &str, path: &str| json!({"name": name, "type": "string", "jsonPath": path});
    let columns = vec![
        column("Verdict", ".status.verdict"),
        column("Kernel", ".status.kernel"),
        column("Network", ".status.advice.cni"),
        column("Rules", ".status.rules"),
        json!({"name": "Judged", "type": "date", "jsonPath": ".status.observedAt"}),
    ];
    let mut crd = crd("NodeQualification", "nodequalifications", spec, status, columns);
    crd["spec"]["scope"] = "Cluster".into();
    // One writer, who writes all of it at once.
    if let Some(version) = crd["spec"]["versions"][0].as_object_mut() {
        version.remove("subresources");
    }
    crd
}

/// The definitions of the kinds that live in a cluster: Fleet, Site, Release, NodeQualification.
pub fn crds() -> Vec<Value> {
    let text = || json!({"type": "string"});
    let number = || json!({"type": "integer", "format": "int64"});
    let anything = || json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let conditions = json!({
        "type": "array",
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status"],
            "properties": {
                "type": text(),
                "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                "reason": text(),
                "message": text(),
                "lastTransitionTime": text(),
            },
        },
    });

    let fleet_status = json!({
        "type": "object",
        "properties": {
            "remote": text(), "branch": text(), "revision": text(), "sites": number(), "releases": number(),
            "conditions": conditions.clone(),
            "problems": {
                "type": "array",
                "x-kubernetes-list-type": "atomic",
                "maxItems": PROBLEMS_MAX,
                "items": {
                    "type": "object",
                    "properties": {
                        "file": text(), "line": number(), "column": number(), "message": text(), "hint": text(),
                        "site": text(), "app": text(),
                    },
                },
            },
        },
    });
    let site_spec = json!({
        "type": "object",
        "properties": {
            "nodes": {"type": "array", "x-kubernetes-list-type": "atomic", "items": text()},
            "vars": anything(),
            "offlineBudget": text(), "cni": text(), "osChannel": text(), "os": anything(),
        },
    });
    let site_status = json!({
        "type": "object",
        "properties": {
            "health": text(), "message": text(), "since": text(), "nodesReady": number(), "nodesTotal": number(),
            "network": {
                "type": "object",
                "properties": {
                    "cni": text(), "proxy": text(), "stopped": {"type": "boolean"}, "message": text(), "hint": text(),
                },
            },
            "os": {
                "type": "object",
                "properties": {
                    "channel": text(), "version": text(), "nodesCurrent": number(), "nodesTotal": number(),
                    "stopped": {"type": "boolean"}, "message": text(), "hint": text(),
                },
            },
        },
    });
    let release_spec = json!({
        "type": "object",
        "required": ["app", "site"],
        "properties": {"app": text(), "site": text()},
    });
    let release_status = json!({
        "type": "object",
        "properties": {
            "revision": text(), "revisionShort": text(), "attemptedRevision": text(), "digest": text(),
            "health": text(), "message": text(), "podsReady": number(), "podsTotal": number(),
            "appliedAt": text(), "observedAt": text(),
            "conditions": conditions,
            "inventory": {
                "type": "array",
                "x-kubernetes-list-type": "atomic",
                "items": {
                    "type": "object",
                    "properties": {
                        "apiVersion": text(), "kind": text(), "namespace": text(), "name": text(), "digest": text(),
                    },
                },
            },
        },
    });

    let column = |name: &str, path: &str| json!({"name": name, "type": "string", "jsonPath": path});
    let ready = || column("Ready", ".status.conditions[?(@.type==\"Ready\")].status");
    let age = || json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"});
    vec![
        super::rules::device_rule_crd(),
        crd(
            "Fleet",
            "fleets",
            anything(),
            fleet_status,
            vec![
                column("Revision", ".status.revision"),
                ready(),
                column("Message", ".status.conditions[?(@.type==\"Ready\")].message"),
                age(),
            ],
        ),
        crd(
            "Site",
            "sites",
            site_spec,
            site_status,
            vec![
                column("Health", ".status.health"),
                column("Network", ".status.network.cni"),
                column("OS", ".status.os.version"),
                column("Message", ".status.message"),
                age(),
            ],
        ),
        crd(
            "Release",
            "releases",
            release_spec,
            release_status,
            vec![
                column("App", ".spec.app"),
                column("Site", ".spec.site"),
                column("Revision", ".status.revisionShort"),
                ready(),
                column("Health", ".status.health"),
                column("Message", ".status.message"),
                age(),
            ],
        ),
        node_qualification_crd(),
    ]
}

fn crd(kind: &str, plural: &str, spec: Value, status: Value, columns: Vec<Value>) -> Value {
    let singular = kind.to_lowercase();
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.{GROUP}")},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": format!("{kind}List"),
                "plural": plural,
                "singular": singular,
                "categories": ["skerry"],
            },
            "versions": [{
                "name": VERSION,
                "served": true,
                "storage": true,
                "subresources": {"status": {}},
                "additionalPrinterColumns": columns,
                "schema": {"openAPIV3Schema": {
                    "type": "object",
                    "properties": {
                        "apiVersion": {"type": "string"},
                        "kind": {"type": "string"},
                        "metadata": {"type": "object"},
                        "spec": spec,
                        "status": status,
                    },
                }},
            }],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_without_conditions_picks_every_site_and_an_empty_name_list_none() {
        let labels = BTreeMap::from([("country".to_owned(), "pt".to_owned())]);
        let check = |selector: Value, expected: bool| {
            let selector: SiteSelector = serde_json::from_value(selector).unwrap();
            assert_eq!(selector.matches("lisbon-01", &labels), expected, "{selector:?}");
        };
        check(json!({}), true);
        check(json!({"names": []}), false);
        check(json!({"names": ["lisbon-01"]}), true);
        check(json!({"names": ["porto-01"]}), false);
        check(json!({"matchLabels": {"country": "pt"}}), true);
        check(json!({"matchLabels": {"country": "es"}}), false);
        check(
            json!({"matchExpressions": [{"key": "country", "operator": "In", "values": ["es", "pt"]}]}),
            true,
        );
        check(
            json!({"matchExpressions": [{"key": "country", "operator": "NotIn", "values": ["pt"]}]}),
            false,
        );
        check(json!({"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}), true);
        check(json!({"matchExpressions": [{"key": "tier", "operator": "Exists"}]}), false);
    }

    #[test]
    fn unknown_fields_of_repository_kinds_are_refused() {
        let text = json!({"apiVersion": API_VERSION, "kind": "Site", "metadata": {"name": "a"}, "spec": {"node": []}});
        let error = serde_json::from_value::<SiteFile>(text).unwrap_err().to_string();
        assert!(error.contains("unknown field `node`"), "{error}");
    }

    #[test]
    fn a_release_reads_back_what_it_wrote() {
        let release = Release {
            spec: ReleaseSpec { app: "web".into(), site: "lisbon-01".into() },
            status: Some(ReleaseStatus {
                health: "Ready".into(),
                pods_ready: 1,
                ..ReleaseStatus::default()
            }),
            ..Release::default()
        };
        let value = serde_json::to_value(&release).unwrap();
        assert_eq!(serde_json::from_value::<Release>(value).unwrap(), release);
    }
}
