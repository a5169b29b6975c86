//! What the API serves: every resource with its names, verbs, subresources and schema.
//!
//! The HTTP server looks up each request here; discovery, OpenAPI and tables are derived from it. The built-in part is
//! [`builtin::ROWS`] joined with the type facts; CustomResourceDefinitions are added with [`Catalog::with_crds`],
//! which makes a new catalogue and leaves the old one valid for requests under way. Nothing here stores objects.

mod builtin;
mod custom;

use crate::facts;
use crate::schema::{Node, Schemas};
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock};

/// Verbs of a resource that is stored.
pub const VERBS: &[&str] =
    &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

/// One resource in one version of its group.
#[derive(Debug, Clone)]
pub struct Resource {
    /// API group; empty for the core group.
    pub group: Arc<str>,
    /// Version, such as `v1`.
    pub version: Arc<str>,
    /// Kind, such as `Pod`.
    pub kind: Arc<str>,
    /// Kind of lists, such as `PodList`.
    pub list_kind: Arc<str>,
    /// Name in paths, such as `pods`.
    pub plural: Arc<str>,
    /// Name for people, such as `pod`.
    pub singular: Arc<str>,
    /// Objects are inside namespaces.
    pub namespaced: bool,
    /// Such as `po`.
    pub short_names: Vec<Arc<str>>,
    /// Such as `all`.
    pub categories: Vec<Arc<str>>,
    /// Verbs of the main path; only `create` for reviews, which are answered and not stored.
    pub verbs: Vec<&'static str>,
    /// Paths below an object.
    pub subresources: Vec<Subresource>,
    /// Type of an object.
    pub schema: Node,
    /// Defined by a CustomResourceDefinition.
    pub custom: bool,
    /// Columns of tables, of a custom resource; built-in kinds have theirs in [`crate::table`].
    pub columns: Vec<Column>,
    /// Where the scale subresource reads and writes, if there is one.
    pub scale_paths: Option<ScalePaths>,
    /// Dotted paths that field selectors may use beyond `metadata.name` and `metadata.namespace`.
    pub selectable_fields: Vec<String>,
    /// Writes to the main path leave `status` alone.
    pub has_status: bool,
    /// Objects are stored as those of another group (`events.k8s.io` events are core events); see [`crate::events`].
    pub stored_in_core: bool,
    /// `openAPIV3Schema` of a custom resource, as JSON text.
    pub open_api: Option<Arc<str>>,
}

/// A path below an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subresource {
    /// Last part of the path, such as `status`.
    pub name: Arc<str>,
    /// Kind of body and answer.
    pub kind: Arc<str>,
    /// Group of that kind.
    pub group: Arc<str>,
    /// Version of that kind.
    pub version: Arc<str>,
    /// Such as `get`.
    pub verbs: &'static [&'static str],
}

/// A printed column of a custom resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Heading.
    pub name: String,
    /// OpenAPI type: `string`, `integer`, `number`, `boolean`, `date`.
    pub ty: String,
    /// OpenAPI format, or empty.
    pub format: String,
    /// For people.
    pub description: String,
    /// 0: always shown; more: only in wide output.
    pub priority: i64,
    /// Such as `.spec.size`.
    pub json_path: String,
}

/// Fields behind the scale subresource, as dotted paths with a leading dot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScalePaths {
    /// Such as `.spec.replicas`.
    pub spec_replicas: String,
    /// Such as `.status.replicas`.
    pub status_replicas: String,
    /// A string or a `LabelSelector`.
    pub selector: Option<String>,
}

impl Resource {
    /// `v1` or `apps/v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_string()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// The subresource called `name`.
    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|one| &*one.name == name)
    }

    /// Whether objects are stored; reviews and bindings are only answered.
    pub fn is_stored(&self) -> bool {
        self.verbs.contains(&"get")
    }
}

/// All resources at one moment; cloning is cheap.
#[derive(Debug, Clone)]
pub struct Catalog {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    schemas: Arc<Schemas>,
    /// In the order of discovery: built-in groups first, a group's preferred version first.
    resources: Vec<Arc<Resource>>,
    by_plural: HashMap<(Arc<str>, Arc<str>, Arc<str>), usize>,
    by_kind: HashMap<(Arc<str>, Arc<str>, Arc<str>), usize>,
}

/// A group with its served versions, preferred one first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Group name; empty for the core group.
    pub name: Arc<str>,
    /// Versions.
    pub versions: Vec<Arc<str>>,
}

impl Catalog {
    /// Only the built-in resources.
    pub fn builtin() -> Self {
        static BUILTIN: LazyLock<Catalog> = LazyLock::new(|| {
            Catalog::new(builtin::resources().into_iter().map(Arc::new).collect())
        });
        BUILTIN.clone()
    }

    /// The built-in resources and those of `crds`, which are CustomResourceDefinition objects.
    ///
    /// A definition that cannot be served is left out: its schema does not compile, its names collide with a
    /// resource that came before, or its status says that it is not established.
    pub fn with_crds<'a>(crds: impl IntoIterator<Item = &'a serde_json::Value>) -> Self {
        let mut resources = Self::builtin().inner.resources.clone();
        let mut added: Vec<Arc<Resource>> = Vec::new();
        for crd in crds {
            for resource in custom::resources(crd) {
                let taken = |other: &Arc<Resource>| {
                    other.group == resource.group
                        && other.version == resource.version
                        && (other.plural == resource.plural || other.kind == resource.kind)
                };
                if !resources.iter().chain(&added).any(taken) {
                    added.push(Arc::new(resource));
                }
            }
        }
        added.sort_by(|a, b| {
            let versions = compare_versions(&a.version, &b.version);
            a.group.cmp(&b.group).then(versions).then_with(|| a.plural.cmp(&b.plural))
        });
        resources.extend(added);
        Self::new(resources)
    }

    fn new(resources: Vec<Arc<Resource>>) -> Self {
        let (mut by_plural, mut by_kind) = (HashMap::new(), HashMap::new());
        for (index, resource) in resources.iter().enumerate() {
            let Resource { group, version, plural, kind, .. } = &**resource;
            by_plural.insert((group.clone(), version.clone(), plural.clone()), index);
            by_kind.insert((group.clone(), version.clone(), kind.clone()), index);
        }
        let schemas = facts::schemas().clone();
        Self { inner: Arc::new(Inner { schemas, resources, by_plural, by_kind }) }
    }

    /// The resource at `/apis/<group>/<version>/<plural>`; `group` is empty for `/api`.
    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Resource>> {
        let key = (group.into(), version.into(), plural.into());
        self.inner.by_plural.get(&key).map(|index| self.inner.resources[*index].clone())
    }

    /// The resource of a kind.
    pub fn find_kind(&self, group: &str, version: &str, kind: &str) -> Option<Arc<Resource>> {
        let key = (group.into(), version.into(), kind.into());
        self.inner.by_kind.get(&key).map(|index| self.inner.resources[*index].clone())
    }

    /// Definitions that the resources' schemas refer to.
    pub fn schemas(&self) -> &Schemas {
        &self.inner.schemas
    }

    /// All resources, in the order of discovery.
    pub fn resources(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.inner.resources.iter()
    }

    /// The resources of one version of a group.
    pub fn resources_of(&self, group: &str, version: &str) -> impl Iterator<Item = &Arc<Resource>> {
        self.resources().filter(move |one| &*one.group == group && &*one.version == version)
    }

    /// All groups, the core group first.
    pub fn groups(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        let mut position = BTreeMap::new();
        for resource in self.resources() {
            let index = *position.entry(resource.group.clone()).or_insert_with(|| {
                groups.push(Group { name: resource.group.clone(), versions: Vec::new() });
                groups.len() - 1
            });
            if !groups[index].versions.contains(&resource.version) {
                groups[index].versions.push(resource.version.clone());
            }
        }
        for group in &mut groups {
            group.versions.sort_by(|a, b| compare_versions(a, b));
        }
        groups
    }
}

/// Orders versions as Kubernetes prefers them: `v2`, `v1`, `v2beta1`, `v1beta1`, `v1alpha1`, then other names.
pub fn compare_versions(a: &str, b: &str) -> Ordering {
    fn rank(version: &str) -> Option<(u8, u64, u64)> {
        let rest = version.strip_prefix('v')?;
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (major, rest) = (rest[..end].parse().ok()?, &rest[end..]);
        if rest.is_empty() {
            return Some((2, major, 0));
        }
        let beta = rest.strip_prefix("beta").map(|minor| (1, minor));
        let (stability, minor) = beta.or(rest.strip_prefix("alpha").map(|minor| (0, minor)))?;
        Some((stability, major, minor.parse().ok()?))
    }
    match (rank(a), rank(b)) {
        (Some(x), Some(y)) => y.cmp(&x),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => a.cmp(b),
    }
}

#[cfg(test)]
mod tests;
