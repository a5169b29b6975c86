//! Reads the typed kinds of a fleet repository: `fleet.yaml`, `sites/`, `apps/*/app.yaml`, `devices/`, `os/`.
//!
//! A file that cannot be read becomes a [`Problem`] and stops only what depends on it. What is not done yet is a
//! problem too, never something silently left out.

use crate::devices::Devices;
use crate::os::Channels;
use crate::source::{File, PROFILES, Source};
use crate::suggest::nearest;
use crate::typed::from_node;
use crate::yaml::{self, Content, Node, Position};
use serde::de::DeserializeOwned;
use skerry_api::fleet::v1alpha1::{
    API_VERSION, AppFile, FleetFile, OsReleaseFile, Problem, SiteFile,
};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long a site may be silent if neither it nor the fleet says: 72 hours, a long weekend.
pub const OFFLINE_BUDGET: Duration = Duration::from_secs(72 * 3_600);

/// Longest name of a site: its namespace, `site-<name>`, has to be a DNS label of 63.
const SITE_NAME_MAX: usize = 58;
/// Longest name of an app: a label value.
const APP_NAME_MAX: usize = 63;

/// The typed kinds of one commit.
#[derive(Debug)]
pub struct Repository {
    /// `fleet.yaml`, if it could be read and asks for nothing that is not done yet.
    pub fleet: Option<FleetFile>,
    /// Every site whose file could be read.
    pub sites: Vec<SiteEntry>,
    /// Every app whose `app.yaml` could be read.
    pub apps: Vec<AppEntry>,
    /// The fleet's own profiles, by path.
    pub profiles: BTreeMap<String, String>,
    pub(crate) devices: Devices,
    pub(crate) channels: Channels,
    /// What is wrong, in the order of files.
    pub problems: Vec<Problem>,
    /// Whether every file that names a site or an app could be read. Only then is a name that is absent here gone.
    pub names_complete: bool,
}

/// A site and where it stands.
#[derive(Debug)]
pub struct SiteEntry {
    /// Path of its file.
    pub file: String,
    /// What the file says.
    pub site: SiteFile,
    /// Whether it may be rendered: it shares neither its name nor a node with another site.
    pub usable: bool,
    at: Position,
}

/// An app and where it stands.
#[derive(Debug)]
pub struct AppEntry {
    /// Path of its `app.yaml`.
    pub file: String,
    /// Folder of `app.yaml`, with a `/` at the end.
    pub folder: String,
    /// What the file says.
    pub app: AppFile,
    /// Why it cannot be rendered anywhere; empty if it can.
    pub broken: Vec<Problem>,
    pub(crate) vars: Node,
    at: Position,
}

impl Repository {
    /// Reads a commit's files.
    pub fn read(source: &Source) -> Self {
        let mut reader = Reader { source, problems: Vec::new(), names_complete: true };
        let fleet = reader.fleet();
        let mut sites = reader.sites();
        let mut apps = reader.apps();
        let channels = reader.channels();
        reader.others();
        let profiles = reader.profiles();
        reader.unique_sites(&mut sites);
        reader.unique_nodes(&mut sites);
        reader.unique_apps(&mut apps);
        reader.known_site_names(&sites, &mut apps);
        let complete = reader.names_complete;
        let devices = Devices::read(source, &sites, &mut apps, complete, &mut reader.problems);
        Self {
            fleet,
            sites,
            apps,
            profiles,
            devices,
            channels,
            problems: reader.problems,
            names_complete: reader.names_complete,
        }
    }
}

struct Reader<'a> {
    source: &'a Source,
    problems: Vec<Problem>,
    names_complete: bool,
}

impl Reader<'_> {
    fn fleet(&mut self) -> Option<FleetFile> {
        let Some(file) = self.source.get("fleet.yaml") else {
            self.problems.push(Problem {
                file: "fleet.yaml".to_owned(),
                message: "the repository has no `fleet.yaml`".to_owned(),
                hint: Some(
                    "add one at the top of the repository, or check the remote and the branch"
                        .to_owned(),
                ),
                ..Problem::default()
            });
            self.names_complete = false;
            return None;
        };
        let before = self.problems.len();
        let mut fleets = self.typed::<FleetFile>("fleet.yaml", file, "Fleet");
        if fleets.len() > 1 {
            let (node, _) = &fleets[1];
            self.problems.push(problem(
                "fleet.yaml",
                node.at,
                "only one Fleet can be in `fleet.yaml`",
                None,
            ));
        } else if fleets.is_empty() && self.problems.len() == before {
            self.problems.push(problem(
                "fleet.yaml",
                Position::default(),
                "the file is empty, expected a Fleet",
                None,
            ));
        }
        if let Some((node, _)) = fleets.first() {
            for field in ["signers", "rollout"] {
                let not_yet = not_yet("fleet.yaml", node, field);
                self.problems.extend(not_yet);
            }
        }
        if self.problems.len() > before {
            self.names_complete = false;
            return None;
        }
        Some(fleets.remove(0).1)
    }

    fn sites(&mut self) -> Vec<SiteEntry> {
        let mut sites = Vec::new();
        for (path, file) in self.source.under("sites/") {
            let before = self.problems.len();
            for (node, site) in self.typed::<SiteFile>(path, file, "Site") {
                let at = name_position(&node);
                let nodes = node.get("spec").and_then(|spec| spec.get("nodes"));
                if let Some(message) = name_fault(&site.metadata.name, SITE_NAME_MAX) {
                    self.problems.push(problem(path, at, &message, None));
                    continue;
                }
                if let Some((index, name)) =
                    site.spec.nodes.iter().enumerate().find(|(_, name)| !is_dns_subdomain(name))
                {
                    let at = match nodes.map(|nodes| &nodes.content) {
                        Some(Content::List(items)) => items[index].at,
                        _ => at,
                    };
                    let message = format!("`{name}` cannot be the name of a node");
                    let hint = "use at most 253 of a-z, 0-9, `-` and `.`, with a letter or digit at both ends";
                    self.problems.push(problem(path, at, &message, Some(hint.to_owned())));
                    continue;
                }
                sites.push(SiteEntry { file: path.to_owned(), site, usable: true, at });
            }
            self.names_complete &= self.problems.len() == before;
        }
        sites
    }

    fn apps(&mut self) -> Vec<AppEntry> {
        let folders: BTreeSet<&str> = self
            .source
            .under("apps/")
            .filter_map(|(path, _)| path["apps/".len()..].split_once('/').map(|(folder, _)| folder))
            .collect();
        let mut apps = Vec::new();
        for (path, file) in
            self.source.under("apps/").filter(|(path, _)| !path["apps/".len()..].contains('/'))
        {
            let hint = "put each app in a folder of its own: `apps/NAME/app.yaml`".to_owned();
            let stray =
                problem(path, Position::default(), "a file here belongs to no app", Some(hint));
            // Something unread (the folder is a link, say) has its own reason.
            self.problems.push(documents(path, file).err().unwrap_or(stray));
            self.names_complete = false;
        }
        for folder in folders {
            let folder = format!("apps/{folder}/");
            let path = format!("{folder}app.yaml");
            let Some(file) = self.source.get(&path) else {
                let hint = format!("add `{path}`, or remove the folder");
                let message = "the app's folder has no `app.yaml`";
                let missing = problem(&path, Position::default(), message, Some(hint));
                let unread =
                    self.source.get(&folder).and_then(|file| documents(&folder, file).err());
                self.problems.push(unread.unwrap_or(missing));
                self.names_complete = false;
                continue;
            };
            let before = self.problems.len();
            let mut found = self.typed::<AppFile>(&path, file, "App");
            if self.problems.len() == before && found.len() != 1 {
                let (at, message) = match found.get(1) {
                    Some((second, _)) => (second.at, "only one App can be in an `app.yaml`"),
                    None => (Position::default(), "the file is empty, expected an App"),
                };
                self.problems.push(problem(&path, at, message, None));
            }
            if let Some((node, app)) = found.first()
                && let Some(message) = name_fault(&app.metadata.name, APP_NAME_MAX)
            {
                self.problems.push(problem(&path, name_position(node), &message, None));
            }
            if self.problems.len() > before {
                for problem in &mut self.problems[before..] {
                    problem.app = Some(folder["apps/".len()..folder.len() - 1].to_owned());
                }
                self.names_complete = false;
                continue;
            }
            let (node, app) = found.remove(0);
            let mut broken: Vec<Problem> = ["patches", "dependsOn", "rollout"]
                .iter()
                .filter_map(|field| not_yet(&path, &node, field))
                .collect();
            if let Some(source) = node.get("spec").and_then(|spec| spec.get("source")) {
                for field in ["kustomize", "helm"] {
                    if let Some(value) = source.get(field) {
                        let message = format!("`source.{field}` is not supported yet");
                        let hint = "use `source.manifests`, with what the tool renders".to_owned();
                        broken.push(problem(&path, value.at, &message, Some(hint)));
                    }
                }
            }
            for problem in &mut broken {
                problem.app = Some(app.metadata.name.clone());
            }
            let vars = node.get("spec").and_then(|spec| spec.get("vars")).cloned();
            let vars = vars.unwrap_or_else(|| Node::new(Content::Map(Vec::new())));
            let at = name_position(&node);
            apps.push(AppEntry { file: path, folder, app, broken, vars, at });
        }
        apps
    }

    fn channels(&mut self) -> Channels {
        let mut channels = Channels::default();
        for (path, file) in self.source.under("os/") {
            for (node, release) in self.typed::<OsReleaseFile>(path, file, "OsRelease") {
                let at = name_position(&node);
                let name = release.metadata.name;
                let wrong = match name_fault(&name, APP_NAME_MAX) {
                    Some(message) => Some(problem(path, at, &message, None)),
                    None => not_yet(path, &node, "rollout")
                        .or_else(|| channels.add(path, at, &name, release.spec)),
                };
                self.problems.extend(wrong);
            }
        }
        channels
    }

    /// What is known but not acted on yet.
    fn others(&mut self) {
        if let Some((path, _)) = self.source.under("secrets/").next() {
            let message =
                "encrypted secrets are not supported yet; files in `secrets/` are not applied";
            self.problems.push(problem(path, Position::default(), message, None));
        }
    }

    /// Their text; what stands in them is checked by whoever knows the checks.
    fn profiles(&mut self) -> BTreeMap<String, String> {
        let mut profiles = BTreeMap::new();
        for (path, file) in self.source.under(PROFILES) {
            let text = match file {
                File::Read(bytes) => {
                    std::str::from_utf8(bytes).map_err(|_| "the file is no UTF-8".to_owned())
                }
                File::Unread { reason } => Err(reason.clone()),
            };
            match text {
                Ok(text) => {
                    profiles.insert(path.to_owned(), text.to_owned());
                }
                Err(reason) => {
                    self.problems.push(problem(path, Position::default(), &reason, None));
                }
            }
        }
        profiles
    }

    fn unique_sites(&mut self, sites: &mut [SiteEntry]) {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for index in 0..sites.len() {
            let name = sites[index].site.metadata.name.clone();
            if let Some(first) = seen.get(&name).copied() {
                let message = format!(
                    "site `{name}` is already defined at {}",
                    place(&sites[first].file, sites[first].at)
                );
                self.problems.push(Problem {
                    site: Some(name),
                    ..problem(
                        &sites[index].file,
                        sites[index].at,
                        &message,
                        Some("rename or remove one of the two".to_owned()),
                    )
                });
                sites[first].usable = false;
                sites[index].usable = false;
            } else {
                seen.insert(name, index);
            }
        }
    }

    fn unique_nodes(&mut self, sites: &mut [SiteEntry]) {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for index in 0..sites.len() {
            for node in sites[index].site.spec.nodes.clone() {
                match seen.get(&node).copied() {
                    None => {
                        seen.insert(node, index);
                    }
                    // Two files for one site were told already.
                    Some(first)
                        if first != index
                            && sites[first].site.metadata.name
                                == sites[index].site.metadata.name => {}
                    Some(first) => {
                        let message = format!(
                            "node `{node}` is already in site `{}` at {}",
                            sites[first].site.metadata.name,
                            place(&sites[first].file, sites[first].at)
                        );
                        let hint =
                            "a node belongs to one site, once; remove one of the two".to_owned();
                        self.problems.push(Problem {
                            site: Some(sites[index].site.metadata.name.clone()),
                            ..problem(&sites[index].file, sites[index].at, &message, Some(hint))
                        });
                        sites[first].usable = false;
                        sites[index].usable = false;
                    }
                }
            }
        }
    }

    fn unique_apps(&mut self, apps: &mut [AppEntry]) {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for index in 0..apps.len() {
            let name = apps[index].app.metadata.name.clone();
            if let Some(first) = seen.get(&name).copied() {
                let message = format!(
                    "app `{name}` is already defined at {}",
                    place(&apps[first].file, apps[first].at)
                );
                let problem = Problem {
                    app: Some(name),
                    ..problem(
                        &apps[index].file,
                        apps[index].at,
                        &message,
                        Some("rename or remove one of the two".to_owned()),
                    )
                };
                apps[first].broken.push(problem.clone());
                apps[index].broken.push(problem);
            } else {
                seen.insert(name, index);
            }
        }
    }

    /// A placement that names a site which does not exist is a typing error; unless a site's file is broken, when the
    /// name may be in there.
    fn known_site_names(&mut self, sites: &[SiteEntry], apps: &mut [AppEntry]) {
        if !self.names_complete {
            return;
        }
        let known: BTreeSet<&str> =
            sites.iter().map(|entry| entry.site.metadata.name.as_str()).collect();
        for entry in apps {
            for name in entry.app.spec.placement.sites.names.iter().flatten() {
                if !known.contains(name.as_str()) {
                    let hint = nearest(name, known.iter().copied())
                        .map(|name| format!("did you mean `{name}`?"));
                    let message = format!("placement names site `{name}`, which does not exist");
                    entry.broken.push(Problem {
                        app: Some(entry.app.metadata.name.clone()),
                        ..problem(&entry.file, entry.at, &message, hint)
                    });
                }
            }
        }
    }

    /// All documents of a file as `T`; what does not fit becomes a problem.
    fn typed<T: DeserializeOwned>(
        &mut self,
        path: &str,
        file: &File,
        kind: &str,
    ) -> Vec<(Node, T)> {
        let nodes = match documents(path, file) {
            Ok(nodes) => nodes,
            Err(problem) => {
                self.problems.push(problem);
                return Vec::new();
            }
        };
        let mut found = Vec::new();
        for node in nodes {
            if let Some(problem) = wrong_kind(path, &node, kind) {
                self.problems.push(problem);
                continue;
            }
            match from_node(&node) {
                Ok(value) => found.push((node, value)),
                Err(error) => {
                    let at = error.at.unwrap_or(node.at);
                    self.problems.push(problem(path, at, &error.message, error.hint));
                }
            }
        }
        found
    }
}

/// The YAML documents of a file.
pub(crate) fn documents(path: &str, file: &File) -> Result<Vec<Node>, Problem> {
    let bytes = match file {
        File::Read(bytes) => bytes,
        File::Unread { reason } => return Err(problem(path, Position::default(), reason, None)),
    };
    let text = std::str::from_utf8(bytes).map_err(|error| {
        problem(path, Position::default(), &format!("the file is not UTF-8 ({error})"), None)
    })?;
    yaml::parse(text).map_err(|error| problem(path, error.at, &error.message, error.hint))
}

pub(crate) fn problem(file: &str, at: Position, message: &str, hint: Option<String>) -> Problem {
    Problem {
        file: file.to_owned(),
        line: at.line,
        column: at.column,
        message: message.to_owned(),
        hint,
        ..Problem::default()
    }
}

pub(crate) fn place(file: &str, at: Position) -> String {
    format!("{file}:{}:{}", at.line, at.column)
}

fn wrong_kind(path: &str, node: &Node, kind: &str) -> Option<Problem> {
    if !matches!(node.content, Content::Map(_)) {
        return Some(problem(
            path,
            node.at,
            &format!("expected a {kind}, found {}", node.kind()),
            None,
        ));
    }
    let mismatch = |field: &str, wanted: &str| {
        let found = node.get(field)?;
        let text = found.as_text().unwrap_or_default();
        if text == wanted {
            return None;
        }
        let hint = (nearest(text, [wanted]).is_some()).then(|| format!("did you mean `{wanted}`?"));
        let message = match found.as_text() {
            Some(text) => format!("unknown {field} `{text}`, expected `{wanted}`"),
            None => format!("expected `{wanted}`, found {}", found.kind()),
        };
        Some(problem(path, found.at, &message, hint))
    };
    mismatch("kind", kind).or_else(|| mismatch("apiVersion", API_VERSION))
}

fn not_yet(path: &str, node: &Node, field: &str) -> Option<Problem> {
    let value = node.get("spec")?.get(field).filter(|value| value.content != Content::Null)?;
    let hint = "remove it; it would be ignored, and that is worse than an error".to_owned();
    Some(problem(path, value.at, &format!("`{field}` is not supported yet"), Some(hint)))
}

fn name_position(node: &Node) -> Position {
    node.get("metadata").and_then(|metadata| metadata.get("name")).map_or(node.at, |name| name.at)
}

fn name_fault(name: &str, max: usize) -> Option<String> {
    let ends = |byte: Option<&u8>| {
        byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    let bytes = name.as_bytes();
    let good = bytes.len() <= max
        && ends(bytes.first())
        && ends(bytes.last())
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-');
    (!good).then(|| {
        format!("`{name}` cannot be a name: use at most {max} of a-z, 0-9 and `-`, with a letter or digit at both ends")
    })
}

fn is_dns_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(|part| name_fault(part, 63).is_none())
}
