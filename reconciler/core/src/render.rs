//! Renders every app for every site it is placed on.
//!
//! What an object gets here: variables, the site's namespace, common labels; workloads also node selector,
//! tolerations and the digest of their configuration. An app is one site's business: objects without a namespace
//! (ClusterRole, CustomResourceDefinition, …) and objects that name another namespace are refused, because two sites
//! would own them at once.
//!
//! One broken app leaves the others whole: it has [`Problem`]s instead of a [`CompleteRender`].

use crate::devices;
use crate::object::{Digest, ObjectId, is_cluster_scoped};
use crate::os;
use crate::repository::{AppEntry, OFFLINE_BUDGET, Repository, documents, place, problem};
use crate::source::Source;
use crate::vars::{Scope, substitute};
use crate::workload;
use crate::yaml::{self, Content, Node, Position};
use serde_json::{Map, Value, json};
use skerry_api::fleet::v1alpha1::{self as fleet, Problem, SiteSpec, UnknownNodes, site_namespace};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

/// One app on one site.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReleaseKey {
    /// Name of the site.
    pub site: String,
    /// Name of the app.
    pub app: String,
}

impl fmt::Display for ReleaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.site, self.app)
    }
}

/// Everything that one commit asks for, as far as it could be read.
#[derive(Debug, Clone, Default)]
pub struct Rendered {
    /// The fleet's name; `None` if `fleet.yaml` cannot be used, and then nothing else is rendered.
    pub fleet: Option<String>,
    /// Whether what left the repository is deleted from the cluster.
    pub prune: bool,
    /// Sites that could be read.
    pub sites: BTreeMap<String, RenderedSite>,
    /// Per site and app: the objects, or why there are none.
    pub releases: BTreeMap<ReleaseKey, Result<CompleteRender, Vec<Problem>>>,
    /// What is wrong outside a single release.
    pub problems: Vec<Problem>,
    /// Every name in the commit; `None` while a file that could hold one is unread.
    pub roster: Option<Roster>,
    /// What a node without a report means for its site.
    pub unknown_nodes: UnknownNodes,
    /// The fleet's own profiles for `skerry qualify`: path to TOML. What they say is checked by whoever knows the checks.
    pub profiles: BTreeMap<String, String>,
}

/// A site with the fleet's defaults filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct RenderedSite {
    /// Labels from its file.
    pub labels: BTreeMap<String, String>,
    /// Its spec, without vars.
    pub spec: SiteSpec,
    /// How long it may be silent.
    pub offline_budget: Duration,
    /// What its nodes should run, when it follows a channel.
    pub os: Option<os::Target>,
}

/// A render in which every source was read; only such a render may lead to a prune.
#[derive(Debug, Clone, PartialEq)]
pub struct CompleteRender {
    objects: BTreeMap<ObjectId, RenderedObject>,
    digest: Digest,
}

/// One object, ready to be applied.
#[derive(Debug, Clone, PartialEq)]
pub struct RenderedObject {
    /// The object.
    pub value: Value,
    /// Its digest.
    pub digest: Digest,
    /// File it comes from.
    pub file: String,
    /// Line in that file.
    pub line: u64,
}

/// Every site and release that a commit names; made only when every file that can name one was read, so what is not
/// in it is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roster {
    sites: BTreeSet<String>,
    releases: BTreeSet<ReleaseKey>,
}

impl Roster {
    /// Whether the commit has this site.
    pub fn has_site(&self, site: &str) -> bool {
        self.sites.contains(site)
    }

    /// Whether the commit places this app on this site.
    pub fn has_release(&self, release: &ReleaseKey) -> bool {
        self.releases.contains(release)
    }
}

impl CompleteRender {
    /// The objects in the order in which they are applied.
    pub fn objects(&self) -> &BTreeMap<ObjectId, RenderedObject> {
        &self.objects
    }

    /// Digest over all objects.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    pub(crate) fn new(objects: BTreeMap<ObjectId, RenderedObject>) -> Self {
        let digest =
            Digest::of_parts(objects.values().map(|object| object.digest.as_str().as_bytes()));
        Self { objects, digest }
    }
}

impl Rendered {
    /// All problems, of the repository and of every release, each once: what is wrong in the same way on several sites
    /// names no site.
    pub fn all_problems(&self) -> Vec<Problem> {
        let of_releases =
            self.releases.values().filter_map(|outcome| outcome.as_ref().err()).flatten();
        let mut all: Vec<Problem> = Vec::new();
        let mut seen: BTreeMap<(&str, u64, u64, &str), usize> = BTreeMap::new();
        for problem in self.problems.iter().chain(of_releases) {
            let place = (&*problem.file, problem.line, problem.column, &*problem.message);
            match seen.get(&place) {
                Some(index) if all[*index].site != problem.site => all[*index].site = None,
                Some(_) => {}
                None => {
                    seen.insert(place, all.len());
                    all.push(problem.clone());
                }
            }
        }
        all
    }

    /// Objects and problems as one JSON value: `fleet`, `releases` (`site`, `app`, `objects`, `problems`), `problems`.
    pub fn to_json(&self) -> Value {
        let releases: Vec<Value> = self
            .releases
            .iter()
            .map(|(key, outcome)| {
                let objects = outcome.iter().flat_map(|render| render.objects.values());
                json!({
                    "site": key.site,
                    "app": key.app,
                    "objects": objects.map(|object| &object.value).collect::<Vec<_>>(),
                    "problems": outcome.as_ref().err().cloned().unwrap_or_default(),
                })
            })
            .collect();
        json!({"fleet": self.fleet, "releases": releases, "problems": self.problems})
    }

    /// All objects as a YAML stream, site by site, app by app.
    pub fn to_yaml(&self) -> String {
        let mut text = String::new();
        for (release, outcome) in &self.releases {
            let Ok(render) = outcome else { continue };
            for object in render.objects.values() {
                text += &format!("---\n# {release} from {}:{}\n", object.file, object.line);
                text += &yaml::to_string(&object.value);
                if !text.ends_with('\n') {
                    text.push('\n');
                }
            }
        }
        text
    }
}

/// Reads and renders the files of one commit.
pub fn render(source: &Source) -> Rendered {
    let repository = Repository::read(source);
    let Some(fleet) = &repository.fleet else {
        return Rendered { problems: repository.problems, ..Rendered::default() };
    };
    let defaults = &fleet.spec.defaults;
    let mut sites = BTreeMap::new();
    let mut os_problems = Vec::new();
    for entry in repository.sites.iter().filter(|entry| entry.usable) {
        let spec = &entry.site.spec;
        let offline_budget = spec.offline_budget.or(defaults.offline_budget);
        let spec = SiteSpec {
            nodes: spec.nodes.clone(),
            vars: Map::new(),
            offline_budget,
            cni: spec.cni.clone().or_else(|| defaults.cni.clone()),
            os_channel: spec.os_channel.clone().or_else(|| defaults.os_channel.clone()),
            os: spec.os.clone().or_else(|| defaults.os.clone()),
        };
        let (os, problem) =
            repository.channels.target(spec.os_channel.as_deref(), spec.os.as_ref());
        // Where it stands: in the site's file, unless it is the fleet's word.
        let own = entry.site.spec.os_channel.is_some() || entry.site.spec.os.is_some();
        os_problems.extend(problem.map(|problem| Problem {
            file: if own { entry.file.clone() } else { "fleet.yaml".into() },
            site: own.then(|| entry.site.metadata.name.clone()),
            ..problem
        }));
        let site = RenderedSite {
            os,
            labels: entry.site.metadata.labels.clone(),
            spec,
            offline_budget: offline_budget.map_or(OFFLINE_BUDGET, |span| span.0),
        };
        sites.insert(entry.site.metadata.name.clone(), site);
    }

    let manifests: Vec<_> =
        repository.apps.iter().map(|app| Manifests::read(source, app)).collect();
    let fleet_vars = json_node(&fleet.spec.vars);
    let mut releases: BTreeMap<ReleaseKey, Result<CompleteRender, Vec<Problem>>> = BTreeMap::new();
    let mut named = BTreeSet::new();
    for entry in &repository.sites {
        let metadata = &entry.site.metadata;
        let scope = Scope::new()
            .value("site.name", &metadata.name)
            .value("site.namespace", &site_namespace(&metadata.name))
            .value("fleet.name", &fleet.metadata.name)
            .labels(&metadata.labels)
            .vars("site.vars", json_node(&entry.site.spec.vars))
            .vars("fleet.vars", fleet_vars.clone());
        for (app, manifests) in repository.apps.iter().zip(&manifests) {
            if !app.app.spec.placement.sites.matches(&metadata.name, &metadata.labels) {
                continue;
            }
            let key =
                ReleaseKey { site: metadata.name.clone(), app: app.app.metadata.name.clone() };
            named.insert(key.clone());
            if !entry.usable {
                continue;
            }
            let outcome = match manifests {
                _ if !app.broken.is_empty() => Err(app.broken.clone()),
                Ok(manifests) => render_app(app, manifests, &key, &scope),
                Err(problems) => Err(problems.clone()),
            };
            releases.entry(key).or_insert(outcome);
        }
        let folders = repository.devices.folders_of(entry, &repository.apps);
        if !folders.is_empty() {
            let key = ReleaseKey { site: metadata.name.clone(), app: devices::RELEASE.to_owned() };
            named.insert(key.clone());
            if entry.usable {
                let outcome = repository.devices.render(&folders, entry, &scope);
                releases.entry(key).or_insert(outcome);
            }
        }
    }
    refuse_shared_objects(&mut releases);

    let roster = repository.names_complete.then(|| Roster {
        sites: repository.sites.iter().map(|entry| entry.site.metadata.name.clone()).collect(),
        releases: named,
    });
    let unplaced = repository
        .apps
        .iter()
        .filter(|app| !releases.keys().any(|key| key.app == app.app.metadata.name));
    let problems = repository
        .problems
        .iter()
        .cloned()
        .chain(unplaced.flat_map(|app| app.broken.clone()))
        .chain(os_problems)
        .collect();
    Rendered {
        fleet: Some(fleet.metadata.name.clone()),
        prune: fleet.spec.prune,
        sites,
        releases,
        problems,
        roster,
        unknown_nodes: fleet.spec.qualification.unknown_nodes,
        profiles: repository.profiles.clone(),
    }
}

/// One document of an app's manifests, before substitution.
struct Manifest {
    file: String,
    node: Node,
}

struct Manifests(Vec<Manifest>);

impl Manifests {
    fn read(source: &Source, app: &AppEntry) -> Result<Self, Vec<Problem>> {
        let path =
            app.app.spec.source.manifests.as_ref().map_or("manifests", |manifests| &manifests.path);
        let path = path.trim_start_matches("./").trim_end_matches('/');
        let own =
            |problem: Problem| Problem { app: Some(app.app.metadata.name.clone()), ..problem };
        if path.is_empty() || path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            let message = format!(
                "`source.manifests.path` cannot be `{path}`; expected a folder beside `app.yaml`"
            );
            return Err(vec![own(problem(&app.file, Position::default(), &message, None))]);
        }
        let folder = format!("{}{path}/", app.folder);
        let mut manifests = Vec::new();
        let mut problems = Vec::new();
        for (path, file) in source.under(&folder) {
            match documents(path, file) {
                Ok(nodes) => {
                    manifests.extend(
                        nodes
                            .into_iter()
                            .flat_map(expand_list)
                            .map(|node| Manifest { file: path.to_owned(), node }),
                    );
                }
                Err(problem) => problems.push(own(problem)),
            }
        }
        if manifests.is_empty() && problems.is_empty() {
            let message = format!("no manifests in `{folder}`");
            let hint = "an app that should run nowhere keeps its manifests and places on `sites: {names: []}`".to_owned();
            problems.push(own(problem(&app.file, Position::default(), &message, Some(hint))));
        }
        if problems.is_empty() { Ok(Self(manifests)) } else { Err(problems) }
    }
}

/// `kind: List` stands for its items.
fn expand_list(node: Node) -> Vec<Node> {
    let is_list = node.get("kind").and_then(Node::as_text) == Some("List");
    match node.get("items").map(|items| &items.content) {
        Some(Content::List(items)) if is_list => items.clone(),
        _ => vec![node],
    }
}

fn render_app(
    app: &AppEntry,
    manifests: &Manifests,
    key: &ReleaseKey,
    scope: &Scope,
) -> Result<CompleteRender, Vec<Problem>> {
    let own = |mut problem: Problem| {
        problem.app = Some(key.app.clone());
        problem.site = Some(key.site.clone());
        problem
    };
    let unresolved = |file: &str, faults: Vec<crate::vars::Unresolved>| -> Vec<Problem> {
        faults
            .into_iter()
            .map(|fault| own(problem(file, fault.at, &fault.message, fault.hint)))
            .collect()
    };
    let app_vars = substitute(&app.vars, scope).map_err(|faults| unresolved(&app.file, faults))?;
    let scope = scope.clone().value("app.name", &key.app).vars("app.vars", app_vars);

    let mut objects: BTreeMap<ObjectId, RenderedObject> = BTreeMap::new();
    let mut places: BTreeMap<ObjectId, String> = BTreeMap::new();
    let mut problems = Vec::new();
    for Manifest { file, node } in &manifests.0 {
        let mut substituted = match substitute(node, &scope) {
            Ok(node) => node,
            Err(faults) => {
                problems.extend(unresolved(file, faults));
                continue;
            }
        };
        let mut faults = Vec::new();
        settle_text(is_text, &mut Vec::new(), Some(node), &mut substituted, &mut faults);
        let faulty = !faults.is_empty();
        problems.extend(
            faults.into_iter().map(|(at, message, hint)| own(problem(file, at, &message, hint))),
        );
        if faulty {
            continue;
        }
        match render_object(&substituted, key) {
            Ok((id, value)) => {
                let here = place(file, node.at);
                if let Some(first) = places.get(&id) {
                    let message = format!("{id} is already defined at {first}");
                    let hint = Some("rename or remove one of the two".to_owned());
                    problems.push(own(problem(file, node.at, &message, hint)));
                    continue;
                }
                places.insert(id.clone(), here);
                let digest = Digest::stored("");
                objects.insert(
                    id,
                    RenderedObject { value, digest, file: file.clone(), line: node.at.line },
                );
            }
            Err((at, message, hint)) => problems.push(own(problem(file, at, &message, hint))),
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }

    let configs: BTreeMap<(String, String), Digest> = objects
        .iter()
        .filter(|(id, _)| id.group.is_empty() && matches!(id.kind.as_str(), "ConfigMap" | "Secret"))
        .map(|(id, object)| ((id.kind.clone(), id.name.clone()), Digest::of(&object.value)))
        .collect();
    for (id, object) in &mut objects {
        workload::note_config(&mut object.value, &id.group, &id.kind, |kind, name| {
            configs.get(&(kind.to_owned(), name.to_owned())).cloned()
        });
        object.digest = Digest::of(&object.value);
    }
    Ok(CompleteRender::new(objects))
}

pub(crate) type Fault = (Position, String, Option<String>);

pub(crate) fn render_object(node: &Node, key: &ReleaseKey) -> Result<(ObjectId, Value), Fault> {
    if !matches!(node.content, Content::Map(_)) {
        return Err((
            node.at,
            format!("expected a Kubernetes object, found {}", node.kind()),
            None,
        ));
    }
    let fault = |node: &Node, message: String, hint: Option<&str>| {
        (node.at, message, hint.map(str::to_owned))
    };
    let text = |parent: &Node, field: &str, path: &str| match parent.get(field) {
        None => Err(fault(parent, format!("`{path}` is missing"), None)),
        Some(found) => match found.as_text() {
            Some(text) if !text.is_empty() => Ok((text.to_owned(), found.at)),
            _ => {
                Err(fault(found, format!("`{path}`: expected text, found {}", found.kind()), None))
            }
        },
    };
    let (api_version, api_version_at) = text(node, "apiVersion", "apiVersion")?;
    let (kind, kind_at) = text(node, "kind", "kind")?;
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    let Some(metadata) = node.get("metadata") else {
        return Err(fault(node, "`metadata` is missing".to_owned(), None));
    };
    if let Some(generate) = metadata.get("generateName") {
        let message = "`metadata.generateName` would make a new object each time".to_owned();
        return Err(fault(generate, message, Some("use `metadata.name`")));
    }
    let (name, _) = text(metadata, "name", "metadata.name")?;
    // Rules of devices come with the devices; no app can have the name of that release.
    if group == fleet::GROUP && !(kind == "DeviceRule" && key.app == devices::RELEASE) {
        let message = format!("{kind} of `{}` cannot be a manifest", fleet::GROUP);
        let hint = "Fleet is `fleet.yaml`, sites are in `sites/`, apps are `apps/NAME/app.yaml`, rules of devices are in \
                    `devices/rules/`"
            .to_owned();
        return Err((api_version_at, message, Some(hint)));
    }
    if is_cluster_scoped(group, &kind) {
        let message =
            format!("{kind} belongs to no namespace, and an app of a site cannot have it");
        let hint =
            "what is there once for the whole cluster is installed by its administrator".to_owned();
        return Err((kind_at, message, Some(hint)));
    }
    let namespace = site_namespace(&key.site);
    if let Some(named) = metadata.get("namespace")
        && named.as_text() != Some(&namespace)
    {
        let found =
            named.as_text().map_or_else(|| named.kind().to_owned(), |text| format!("`{text}`"));
        let message = format!(
            "`metadata.namespace` is {found}, but everything of this site is in `{namespace}`"
        );
        return Err(fault(named, message, Some("remove it; it is filled in for each site")));
    }

    let mut value = node.to_json();
    value["metadata"]["namespace"] = Value::String(namespace.clone());
    if let Some(object) = value.as_object_mut() {
        object.remove("status");
    }
    workload::label(&mut value, &key.site, &key.app);
    if let Some(pointer) = workload::pod_template(group, &kind) {
        workload::bind(&mut value, pointer, &key.site, &key.app)
            .map_err(|(_, message)| (node.at, message, None))?;
    }
    Ok((ObjectId::new(&api_version, &kind, &namespace, &name), value))
}

/// Makes text of variables where Kubernetes knows only text, and refuses other scalars that were written there.
///
/// `replicas: ${site.vars.n}` needs a number and `value: ${site.vars.n}` of an environment variable needs text; only
/// the place can tell. A literal `value: 8080` is refused with its line instead of by the API without one.
pub(crate) fn settle_text(
    is_text: fn(&[String]) -> bool,
    path: &mut Vec<String>,
    written: Option<&Node>,
    node: &mut Node,
    faults: &mut Vec<Fault>,
) {
    if is_text_map(path) && !matches!(node.content, Content::Map(_) | Content::Null) {
        let message = format!("`{}`: expected a map, found {}", path.join("."), node.kind());
        faults.push((node.at, message, None));
        return;
    }
    if is_text(path) {
        let text = match &node.content {
            Content::Number(value) => value.to_string(),
            Content::Bool(value) => value.to_string(),
            Content::Text(_) | Content::Null => return,
            Content::List(_) | Content::Map(_) => {
                let message = format!("`{}`: expected text, found {}", path.join("."), node.kind());
                faults.push((node.at, message, None));
                return;
            }
        };
        if written.and_then(Node::as_text).is_some() {
            node.content = Content::Text(text);
        } else {
            let message =
                format!("`{}`: expected text, found {} `{text}`", path.join("."), node.kind());
            faults.push((node.at, message, Some("put it in quotes".to_owned())));
        }
        return;
    }
    match &mut node.content {
        Content::List(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                let written = match written.map(|node| &node.content) {
                    Some(Content::List(written)) => written.get(index),
                    _ => written,
                };
                path.push(index.to_string());
                settle_text(is_text, path, written, item, faults);
                path.pop();
            }
        }
        Content::Map(entries) => {
            for (index, (key, item)) in entries.iter_mut().enumerate() {
                let written = match written.map(|node| &node.content) {
                    Some(Content::Map(written)) => written.get(index).map(|(_, node)| node),
                    _ => written,
                };
                path.push(key.text.clone());
                settle_text(is_text, path, written, item, faults);
                path.pop();
            }
        }
        _ => {}
    }
}

/// Whether all values of the map at `path` are text to Kubernetes.
fn is_text_map(path: &[String]) -> bool {
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    matches!(
        path[..],
        ["data" | "stringData" | "binaryData"]
            | [.., "metadata", "labels" | "annotations"]
            | [.., "template", "spec", "nodeSelector"]
    )
}

/// Whether the scalar at `path` is text to Kubernetes.
fn is_text(path: &[String]) -> bool {
    if path.split_last().is_some_and(|(_, parent)| is_text_map(parent)) {
        return true;
    }
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    matches!(
        path[..],
        [.., "containers" | "initContainers", _, "args" | "command", _]
            | [.., "containers" | "initContainers", _, "env", _, "value" | "name"]
    )
}

/// An object that two apps define on one site would change hands on each reconciliation; both apps are refused.
fn refuse_shared_objects(
    releases: &mut BTreeMap<ReleaseKey, Result<CompleteRender, Vec<Problem>>>,
) {
    let mut owners: BTreeMap<ObjectId, Vec<(ReleaseKey, String, u64)>> = BTreeMap::new();
    for (key, outcome) in releases.iter() {
        for (id, object) in outcome.iter().flat_map(|render| &render.objects) {
            owners.entry(id.clone()).or_default().push((
                key.clone(),
                object.file.clone(),
                object.line,
            ));
        }
    }
    for (id, owners) in owners.into_iter().filter(|(_, owners)| owners.len() > 1) {
        for (key, file, line) in &owners {
            let (other, other_file, other_line) = owners
                .iter()
                .find(|(other, ..)| other != key)
                .expect("a release holds each object once");
            let message =
                format!("{id} is also defined by app `{}` at {other_file}:{other_line}", other.app);
            let problem = Problem {
                file: file.clone(),
                line: *line,
                column: 1,
                message,
                hint: Some("rename or remove one of the two".to_owned()),
                site: Some(key.site.clone()),
                app: Some(key.app.clone()),
            };
            let outcome = releases.get_mut(key).expect("the key comes from this map");
            match outcome {
                Ok(_) => *outcome = Err(vec![problem]),
                Err(problems) => problems.push(problem),
            }
        }
    }
}

fn json_node(map: &Map<String, Value>) -> Node {
    Node::from_json(&Value::Object(map.clone()), Position::default())
}
