//! Devices of a fleet: `devices/models/*.yaml` and `devices/<site or app>/*.yaml`, plain KubeEdge objects.
//!
//! A folder named after a site holds that site's devices; one named after an app holds devices of every site on which
//! the app is placed. All devices of a site are one release, named [`RELEASE`], so that each is applied and pruned like
//! an app's objects; the models that they use are copied into the site's namespace, once, and so are the rules of
//! `devices/rules/*.yaml` that they name.
//!
//! What Kubernetes would take and nobody could use is refused here, with its line: an unknown model or property, a
//! desired value that is out of range, of the wrong type, or of something that cannot be written. The CRDs themselves
//! have to accept whatever KubeEdge accepts.
//!
//! Source: kubeedge/kubeedge, build/crds/devices/devices_v1beta1_{device,devicemodel}.yaml.

mod check;
mod rules;
mod wishes;

use crate::object::{Digest, ObjectId};
use crate::render::{CompleteRender, ReleaseKey, RenderedObject, render_object, settle_text};
use crate::repository::{AppEntry, SiteEntry, documents, place, problem};
use crate::source::Source;
use crate::suggest::nearest;
use crate::vars::{Scope, substitute};
use crate::yaml::{Content, Node, Position};
use check::{Checks, Model};
use skerry_api::fleet::v1alpha1::Problem;
use std::collections::{BTreeMap, BTreeSet};
pub use wishes::{DESIRED_ANNOTATION, has_wishes, keep_wishes};

/// Name of the release that holds a site's devices; no app can have it.
pub const RELEASE: &str = "devices";

const API_VERSION: &str = "devices.kubeedge.io/v1beta1";
const FOLDER: &str = "devices/";
const MODELS: &str = "models";
const RULES: &str = "rules";

/// The devices of one commit, before substitution.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    models: BTreeMap<String, Document>,
    /// Files of `devices/models/` that could not be read; a device may need what is in there.
    broken_models: Vec<Problem>,
    rules: BTreeMap<String, Document>,
    /// Files of `devices/rules/` that could not be read.
    broken_rules: Vec<Problem>,
    folders: BTreeMap<String, Result<Vec<Document>, Vec<Problem>>>,
}

#[derive(Debug)]
struct Document {
    file: String,
    node: Node,
}

impl Devices {
    /// Reads `devices/`. What is wrong is also in `problems`; `names` are those of sites and apps, if all are known.
    pub(crate) fn read(
        source: &Source,
        sites: &[SiteEntry],
        apps: &mut [AppEntry],
        names_complete: bool,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let mut devices = Self::default();
        let mut documents_of: BTreeMap<String, Vec<(String, Result<Vec<Node>, Problem>)>> =
            BTreeMap::new();
        for (path, file) in source.under(FOLDER) {
            let Some((folder, _)) = path[FOLDER.len()..].split_once('/') else {
                let hint =
                    "put it in `devices/models/`, `devices/rules/`, or the folder of a site or an app"
                        .to_owned();
                problems.push(problem(
                    path,
                    Position::default(),
                    "a file here belongs to no site",
                    Some(hint),
                ));
                continue;
            };
            let read = (path.to_owned(), documents(path, file));
            documents_of.entry(folder.to_owned()).or_default().push(read);
        }
        if documents_of.is_empty() {
            return devices;
        }
        for (path, nodes) in documents_of.remove(MODELS).unwrap_or_default() {
            devices.add_models(&path, nodes);
        }
        problems.extend(devices.broken_models.iter().cloned());
        for (path, nodes) in documents_of.remove(RULES).unwrap_or_default() {
            devices.add_rules(&path, nodes);
        }
        problems.extend(devices.broken_rules.iter().cloned());
        let site_names: BTreeSet<&str> =
            sites.iter().map(|entry| entry.site.metadata.name.as_str()).collect();
        for (folder, files) in documents_of {
            let app = apps.iter().any(|entry| entry.app.metadata.name == folder);
            let first = files.first().map(|(path, _)| path.clone()).unwrap_or_default();
            let mut broken = Vec::new();
            if app && site_names.contains(&*folder) {
                let message = format!(
                    "`{folder}` is a site and an app, so nobody can tell whose devices these are"
                );
                broken.push(problem(
                    &first,
                    Position::default(),
                    &message,
                    Some("rename one of the two".to_owned()),
                ));
            } else if names_complete && !app && !site_names.contains(&*folder) {
                let known = site_names
                    .iter()
                    .copied()
                    .chain(apps.iter().map(|entry| &*entry.app.metadata.name));
                let hint =
                    nearest(&folder, known).map(|name| format!("did you mean `devices/{name}/`?"));
                let message = format!("there is no site and no app `{folder}`");
                problems.push(problem(&first, Position::default(), &message, hint));
                continue;
            }
            let mut found = Vec::new();
            for (file, nodes) in files {
                match nodes {
                    Ok(nodes) => found.extend(
                        nodes.into_iter().map(|node| Document { file: file.clone(), node }),
                    ),
                    Err(problem) => broken.push(problem),
                }
            }
            problems.extend(broken.iter().cloned());
            let outcome = if broken.is_empty() { Ok(found) } else { Err(broken) };
            devices.folders.insert(folder, outcome);
        }
        devices.note_idle_rules(problems);
        if let Some(app) = apps.iter_mut().find(|entry| entry.app.metadata.name == RELEASE) {
            let message =
                format!("an app cannot be named `{RELEASE}`: devices of `devices/` have that name");
            let problem = problem(
                &app.file,
                Position::default(),
                &message,
                Some("rename the app".to_owned()),
            );
            let problem = Problem { app: Some(RELEASE.to_owned()), ..problem };
            problems.push(problem.clone());
            app.broken.push(problem);
        }
        devices
    }

    fn add_models(&mut self, path: &str, nodes: Result<Vec<Node>, Problem>) {
        let nodes = match nodes {
            Ok(nodes) => nodes,
            Err(problem) => return self.broken_models.push(problem),
        };
        for node in nodes {
            let mut checks = Checks::new(path);
            if let Some(name) = checks.header(&node, "DeviceModel", API_VERSION) {
                if let Some(first) = self.models.get(&name) {
                    let message = format!(
                        "model `{name}` is already defined at {}",
                        place(&first.file, first.node.at)
                    );
                    checks.fault(
                        node.at,
                        message,
                        Some("rename or remove one of the two".to_owned()),
                    );
                } else {
                    self.models.insert(name, Document { file: path.to_owned(), node });
                }
            }
            self.broken_models.extend(checks.faults);
        }
    }

    fn add_rules(&mut self, path: &str, nodes: Result<Vec<Node>, Problem>) {
        let nodes = match nodes {
            Ok(nodes) => nodes,
            Err(problem) => return self.broken_rules.push(problem),
        };
        for node in nodes {
            let mut checks = Checks::new(path);
            if let Some(name) = checks.header(&node, "DeviceRule", rules::API_VERSION) {
                if let Some(first) = self.rules.get(&name) {
                    let first = place(&first.file, first.node.at);
                    let message = format!("rule `{name}` is already defined at {first}");
                    let hint = Some("rename or remove one of the two".to_owned());
                    checks.fault(node.at, message, hint);
                } else {
                    self.rules.insert(name, Document { file: path.to_owned(), node });
                }
            }
            self.broken_rules.extend(checks.faults);
        }
    }

    /// A rule that no device names goes to no node; whoever wrote it thinks that it does.
    fn note_idle_rules(&self, problems: &mut Vec<Problem>) {
        let documents = || self.folders.values().flatten().flatten();
        for (name, rule) in &self.rules {
            let is_named = documents().any(|device| rules::may_name(&device.node, name));
            if !is_named && self.folders.values().all(Result::is_ok) {
                let message = format!("no device names rule `{name}`, so no node has it");
                let annotation = rules::RULES_ANNOTATION;
                let hint = format!("annotate its device: `{annotation}: '[\"{name}\"]'`");
                problems.push(problem(&rule.file, rule.node.at, &message, Some(hint)));
            }
        }
    }

    /// The folders whose devices a site has; none means that it has no release of devices.
    pub(crate) fn folders_of<'a>(&self, site: &'a SiteEntry, apps: &'a [AppEntry]) -> Vec<&'a str> {
        let metadata = &site.site.metadata;
        let placed = apps
            .iter()
            .filter(|entry| {
                entry.app.spec.placement.sites.matches(&metadata.name, &metadata.labels)
            })
            .map(|entry| entry.app.metadata.name.as_str());
        let mut names: BTreeSet<&str> = placed.collect();
        names.insert(&metadata.name);
        names.into_iter().filter(|name| self.folders.contains_key(*name)).collect()
    }

    /// Renders the devices of one site.
    pub(crate) fn render(
        &self,
        folders: &[&str],
        site: &SiteEntry,
        scope: &Scope,
    ) -> Result<CompleteRender, Vec<Problem>> {
        let key = ReleaseKey { site: site.site.metadata.name.clone(), app: RELEASE.to_owned() };
        let mut rendering = Rendering {
            devices: self,
            site,
            scope,
            key,
            objects: BTreeMap::new(),
            seen: BTreeMap::new(),
            problems: Vec::new(),
        };
        rendering.problems.extend(self.broken_models.iter().cloned());
        rendering.problems.extend(self.broken_rules.iter().cloned());
        for folder in folders {
            match self.folders.get(*folder) {
                Some(Ok(documents)) => {
                    documents.iter().for_each(|document| rendering.device(document))
                }
                Some(Err(problems)) => rendering.problems.extend(problems.iter().cloned()),
                None => {}
            }
        }
        rendering.rules();
        let Rendering { objects, problems, key, .. } = rendering;
        if problems.is_empty() {
            return Ok(CompleteRender::new(objects));
        }
        let own = |problem| Problem {
            app: Some(key.app.clone()),
            site: Some(key.site.clone()),
            ..problem
        };
        Err(problems.into_iter().map(own).collect())
    }
}

/// One site's devices on the way to objects.
struct Rendering<'a> {
    devices: &'a Devices,
    site: &'a SiteEntry,
    scope: &'a Scope,
    key: ReleaseKey,
    objects: BTreeMap<ObjectId, RenderedObject>,
    /// What rules need to know of the devices, by name.
    seen: BTreeMap<String, rules::Seen>,
    problems: Vec<Problem>,
}

impl Rendering<'_> {
    fn device(&mut self, document: &Document) {
        let mut checks = Checks::new(&document.file);
        if checks.header(&document.node, "Device", API_VERSION).is_none() {
            return self.problems.extend(checks.faults);
        }
        let Some(mut node) = self.substituted(document, check::is_text_of_device) else { return };
        let known = self.devices.models.keys().map(String::as_str);
        let Some(name) = checks.model_of(&node, known) else {
            return self.problems.extend(checks.faults);
        };
        let Some(model) = self.model(&name) else { return };
        checks.device(&node, &model);
        if let Some(named) = checks.node_name(&node, &self.key.site, &self.site.site.spec.nodes) {
            check::set_node_name(&mut node, named);
        }
        let wanted = checks.rules_of(&node, self.devices.rules.keys().map(String::as_str));
        if checks.faults.is_empty() {
            if let Some(name) = rules::name_of(&node) {
                self.seen.insert(name, rules::Seen::new(&node, model, wanted));
            }
            self.add(&document.file, document.node.at, &node);
        }
        self.problems.extend(checks.faults);
    }

    /// The rules that the devices name, each once, when all devices are known.
    fn rules(&mut self) {
        if !self.problems.is_empty() {
            return; // a device may be missing for another reason, and nothing is applied in any case
        }
        let wanted: BTreeSet<String> =
            self.seen.values().flat_map(|seen| seen.rules.iter().cloned()).collect();
        for name in wanted {
            let Some(document) = self.devices.rules.get(&name) else { continue };
            let Some(node) = self.substituted(document, rules::is_text_of_rule) else { continue };
            let mut checks = Checks::new(&document.file);
            checks.rule(&node, &name, &self.seen);
            if checks.faults.is_empty() {
                self.add(&document.file, document.node.at, &node);
            }
            self.problems.extend(checks.faults);
        }
    }

    /// The model as this site has it, which becomes one of its objects.
    fn model(&mut self, name: &str) -> Option<Model> {
        let document = self.devices.models.get(name)?;
        let node = self.substituted(document, check::is_text_of_model)?;
        let mut checks = Checks::new(&document.file);
        let model = checks.model(&node);
        let good = checks.faults.is_empty();
        for fault in checks.faults {
            // Once, however many devices use it.
            if !self.problems.contains(&fault) {
                self.problems.push(fault);
            }
        }
        let namespace = skerry_api::fleet::v1alpha1::site_namespace(&self.key.site);
        let id = ObjectId::new(API_VERSION, "DeviceModel", &namespace, name);
        if good && !self.objects.contains_key(&id) {
            self.add(&document.file, document.node.at, &node);
        }
        good.then_some(model)
    }

    fn substituted(&mut self, document: &Document, is_text: fn(&[String]) -> bool) -> Option<Node> {
        let mut node = match substitute(&document.node, self.scope) {
            Ok(node) => node,
            Err(faults) => {
                for fault in faults {
                    let fault = problem(&document.file, fault.at, &fault.message, fault.hint);
                    if !self.problems.contains(&fault) {
                        self.problems.push(fault);
                    }
                }
                return None;
            }
        };
        let mut faults = Vec::new();
        settle_text(is_text, &mut Vec::new(), Some(&document.node), &mut node, &mut faults);
        let good = faults.is_empty();
        let faults = faults
            .into_iter()
            .map(|(at, message, hint)| problem(&document.file, at, &message, hint));
        self.problems.extend(faults);
        good.then_some(node)
    }

    fn add(&mut self, file: &str, at: Position, node: &Node) {
        match render_object(node, &self.key) {
            Ok((id, mut value)) => {
                if has_wishes(&id) {
                    wishes::note(&mut value);
                }
                if let Some(first) = self.objects.get(&id) {
                    let message =
                        format!("{id} is already defined at {}:{}", first.file, first.line);
                    let hint = "rename or remove one of the two".to_owned();
                    self.problems.push(problem(file, at, &message, Some(hint)));
                    return;
                }
                let digest = Digest::of(&value);
                let object = RenderedObject { value, digest, file: file.to_owned(), line: at.line };
                self.objects.insert(id, object);
            }
            Err((at, message, hint)) => self.problems.push(problem(file, at, &message, hint)),
        }
    }
}

/// The items of a list, or nothing.
fn items(node: Option<&Node>) -> &[Node] {
    match node.map(|node| &node.content) {
        Some(Content::List(items)) => items,
        _ => &[],
    }
}
