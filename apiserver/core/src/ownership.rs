//! Who owns which field: `metadata.managedFields` and server-side apply.
//!
//! The HTTP layer calls [`record_update`] on every create, PUT and patch, after defaulting, and [`apply`] on apply
//! patches, before defaulting. Neither checks names, uids or resourceVersions, and neither validates: an unknown
//! field in a config has to be refused or pruned before. Sets are not converted between versions, since each kind
//! has one storage version.
//!
//! Source of the rules: kubernetes/apimachinery, pkg/util/managedfields/internal/{fieldmanager,managedfieldsupdater,
//! capmanagers,skipnonapplied,lastappliedmanager,stripmeta,conflict,managedfields}.go, and
//! kubernetes-sigs/structured-merge-diff, merge/{update,conflict}.go.

mod fieldset;
#[cfg(test)]
mod tests;
mod walk;

pub use fieldset::{FieldSet, FieldsError, Step};
pub(crate) use fieldset::{canonical, same};

use crate::schema::{Node, Schemas};
use crate::status::ApiError;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use walk::{Diff, ItemError};

/// More entries of operation Update than this fold into [`ANCIENT_CHANGES`].
pub const UPDATE_ENTRIES_MAX: usize = 10;
/// Manager of the fields whose managers were folded.
pub const ANCIENT_CHANGES: &str = "ancient-changes";
/// Manager of what an object held before anybody tracked its fields.
pub const BEFORE_FIRST_APPLY: &str = "before-first-apply";

/// Metadata that belongs to the server: never owned, and never taken from an applied config.
const SERVER_METADATA: [&str; 8] = [
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "generation",
    "managedFields",
    "resourceVersion",
    "selfLink",
    "uid",
];

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Who writes, through which door.
#[derive(Debug, Clone, Copy)]
pub struct Actor<'a> {
    /// `fieldManager`, or what the caller puts in its place; never empty.
    pub manager: &'a str,
    /// Version of the written object, such as `apps/v1`.
    pub api_version: &'a str,
    /// `status`, `scale`, …; empty on the main endpoint.
    pub subresource: &'a str,
    /// The kind has a status subresource, so that the main endpoint does not write `status`.
    pub has_status: bool,
    /// RFC 3339, UTC, whole seconds.
    pub now: &'a str,
}

/// One field that an apply wants to change and another manager owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// Name of the other manager.
    pub manager: String,
    /// Path such as `.spec.replicas`.
    pub field: String,
    /// `conflict with "M"`, with subresource and version where they tell entries apart.
    pub message: String,
}

/// Why an apply was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// Others own what would change; `force` takes it from them.
    #[error("{}", conflict_text(.0))]
    Conflicts(Vec<Conflict>),
    /// The config is no object.
    #[error("the applied configuration must be an object")]
    NotAnObject,
    /// The config brings managedFields of its own.
    #[error("metadata.managedFields must be nil")]
    ManagedFields,
    /// An item of a list lacks a key field.
    #[error(
        "{field}: element {at}: associative list with keys has an element that omits key field \
         \"{key}\" (and doesn't have default value)"
    )]
    MissingKey { field: String, at: usize, key: String },
    /// Two items of a list are the same item.
    #[error("{field}: duplicate entries for key {key}")]
    DuplicateItem { field: String, key: String },
    /// An item is of a type that its list cannot identify.
    #[error("{field}: element {at}: an item of this list has to be of the list's element type")]
    ItemType { field: String, at: usize },
}

impl ApplyError {
    /// The error for the client: 409 with one cause per field for conflicts, else 400.
    pub fn to_api_error(&self, group: &str, resource: &str, name: &str) -> ApiError {
        let Self::Conflicts(conflicts) = self else {
            return ApiError::bad_request(match self {
                Self::ManagedFields => self.to_string(),
                other => format!("failed to create typed patch object ({name}): {other}"),
            });
        };
        let causes: Vec<Value> = conflicts
            .iter()
            .map(|conflict| {
                json!({
                    "reason": "FieldManagerConflict",
                    "message": conflict.message,
                    "field": conflict.field,
                })
            })
            .collect();
        let mut details = json!({"name": name, "kind": resource, "causes": causes});
        if !group.is_empty() {
            details["group"] = group.into();
        }
        ApiError {
            details: Some(Box::new(details)),
            ..ApiError::new(409, "Conflict", self.to_string())
        }
    }
}

impl From<ItemError> for ApplyError {
    fn from(error: ItemError) -> Self {
        match error {
            ItemError::MissingKey { path: field, at, key } => Self::MissingKey { field, at, key },
            ItemError::Duplicate { path: field, step: key } => Self::DuplicateItem { field, key },
            ItemError::Shape { path: field, at } => Self::ItemType { field, at },
        }
    }
}

/// Writes into `new` who owns its fields, after `actor` created it (`live` is `None`) or changed it from `live`.
///
/// `new` may carry managedFields: absent or empty means that those of `live` go on, `[{}]` forgets all of them, and
/// entries replace those of `live`. Entries that do not parse count as absent. A write that changes nothing changes
/// no entry.
pub fn record_update(
    live: Option<&Value>,
    new: &mut Value,
    node: &Node,
    schemas: &Schemas,
    actor: &Actor<'_>,
) {
    let sent = take_managed_fields(new);
    if !new.is_object() {
        return;
    }
    let mut managers = match sent {
        Some(Value::Array(entries)) if is_reset(&entries) => Managers::new(),
        Some(Value::Array(entries)) if !entries.is_empty() => {
            decode(&entries).unwrap_or_else(|| managers_of(live))
        }
        _ => managers_of(live),
    };
    let nothing = Value::Object(Map::new());
    if let Some(live) = live
        && managers.is_empty()
    {
        // An object that nobody tracks stays so until someone applies to it: an entry for this change alone would
        // make all other fields look free to take.
        let held = walk::compare(Some(&nothing), Some(live), node, schemas).added;
        if !strip(held, actor).is_empty() {
            return;
        }
    }
    let diff = stripped_diff(live.unwrap_or(&nothing), new, node, schemas, actor);
    let changed = diff.added.union(&diff.modified);
    for entry in managers.values_mut() {
        entry.set = entry.set.difference(&changed).difference(&diff.removed);
    }
    if !changed.is_empty() {
        let key = EntryKey::update(actor.manager, actor.api_version, actor.subresource);
        let entry = managers.entry(key).or_insert_with(|| Entry::new(actor.api_version));
        entry.set = std::mem::take(&mut entry.set).union(&changed);
        entry.time = Some(actor.now.to_owned());
    }
    managers.retain(|_, entry| !entry.set.is_empty());
    fold_old_updates(&mut managers);
    put_managed_fields(new, &managers);
}

/// The object that comes of applying `config` as `actor` to `live` (`None`: there is no such object yet).
///
/// Fields that the actor applied before, that left the config, and that nobody else owns are taken out. When neither
/// the object nor the ownership changes, the result equals `live`. From the config's metadata only what a client may
/// set is used: the caller compares `uid`; a `resourceVersion` is in the result, for the store to compare. A null in
/// the config takes the field out, unless its schema is nullable.
///
/// # Errors
///
/// [`ApplyError::Conflicts`] unless `force`; the others when the config cannot be merged.
pub fn apply(
    live: Option<&Value>,
    config: &Value,
    node: &Node,
    schemas: &Schemas,
    actor: &Actor<'_>,
    force: bool,
) -> Result<Value, ApplyError> {
    let config = effective_config(config, actor)?;
    walk::check_items(&config, node, schemas, &mut String::new())?;

    let nothing = Value::Object(Map::new());
    let mut old = live.cloned();
    if let Some(old) = &mut old {
        take_managed_fields(old);
    }
    let old = old.as_ref().unwrap_or(&nothing);
    let before = managers_of(live);
    let mut managers = before.clone();
    if managers.is_empty() && live.is_some() {
        let held = walk::compare(Some(&nothing), Some(old), node, schemas).added;
        let key = EntryKey::update(BEFORE_FIRST_APPLY, actor.api_version, "");
        let time = Some(actor.now.to_owned());
        let entry = Entry { set: strip(held, actor), time, ..Entry::new(actor.api_version) };
        managers.insert(key, entry);
    }

    let own_key = EntryKey::apply(actor.manager, actor.subresource);
    let last = managers.remove(&own_key);
    let set = walk::field_set(&config, node, schemas);
    let mut merged = walk::merge(Some(old), &config, node, schemas);
    if let Some(last) = &last {
        prune(&mut merged, &config, &set, &last.set, &managers, node, schemas);
    }

    let diff = stripped_diff(old, &merged, node, schemas, actor);
    let changed = diff.added.union(&diff.modified);
    if !force {
        let mut conflicts = conflicts(&managers, &changed);
        if !conflicts.is_empty() && actor.manager == "kubectl" {
            conflicts.retain({
                let own = unchanged_since_last_applied(old, node, schemas);
                move |conflict| !own.contains(&conflict.field)
            });
        }
        if !conflicts.is_empty() {
            return Err(ApplyError::Conflicts(conflicts));
        }
    }
    for entry in managers.values_mut() {
        entry.set = entry.set.difference(&changed).difference(&diff.removed);
    }
    let own = Entry {
        set: strip(set, actor),
        api_version: actor.api_version.to_owned(),
        time: last.and_then(|last| last.time),
    };
    managers.insert(own_key.clone(), own);
    managers.retain(|_, entry| !entry.set.is_empty());

    walk::drop_nulls(&mut merged, node, schemas);
    if let Some(live) = live
        && managers == before
        && fieldset::same(&merged, old)
    {
        return Ok(live.clone());
    }
    if let Some(own) = managers.get_mut(&own_key) {
        own.time = Some(actor.now.to_owned());
    }
    put_managed_fields(&mut merged, &managers);
    Ok(merged)
}

/// The part of `config` that this endpoint writes.
fn effective_config(config: &Value, actor: &Actor<'_>) -> Result<Value, ApplyError> {
    let mut config = config.as_object().ok_or(ApplyError::NotAnObject)?.clone();
    if let Some(Value::Object(metadata)) = config.get_mut("metadata") {
        let sent = metadata.get("managedFields");
        if sent.is_some_and(|sent| !sent.is_null() && sent.as_array().is_none_or(|e| !e.is_empty()))
        {
            return Err(ApplyError::ManagedFields);
        }
        metadata.retain(|name, value| match name.as_str() {
            "name" | "namespace" => true,
            // A version in the config is what the client last saw: the store compares it.
            "resourceVersion" => value.as_str().is_some_and(|version| !version.is_empty()),
            _ => actor.subresource != "status" && !SERVER_METADATA.contains(&name.as_str()),
        });
    }
    if actor.subresource == "status" {
        config.retain(|name, _| matches!(&**name, "apiVersion" | "kind" | "metadata" | "status"));
    } else if actor.has_status {
        config.remove("status");
    }
    Ok(Value::Object(config))
}

/// Takes out of `merged` what the actor applied last, does not apply now, and nobody else owns.
fn prune(
    merged: &mut Value,
    config: &Value,
    set: &FieldSet,
    last: &FieldSet,
    others: &Managers,
    node: &Node,
    schemas: &Schemas,
) {
    let owned = others.values().fold(set.clone(), |owned, entry| owned.union(&entry.set));
    let claimed = walk::with_struct_fields(&owned, node, schemas);
    let mut gone = walk::with_struct_fields(last, node, schemas).difference(&claimed);
    for name in ["apiVersion", "kind", "metadata"] {
        if let Some(root) = gone.children.get_mut(&Step::Field(name.to_owned())) {
            root.member = false;
        }
    }
    // What the config holds stays, even when it is left empty.
    let kept = owned.union(&walk::every_path(config, node, schemas));
    walk::remove(merged, &gone, &kept, node, schemas);
}

fn conflicts(others: &Managers, changed: &FieldSet) -> Vec<Conflict> {
    let mut found = Vec::new();
    for (key, entry) in others {
        let message = format!("conflict with {key}");
        for field in entry.set.intersection(changed).paths() {
            found.push(Conflict { manager: key.manager.clone(), field, message: message.clone() });
        }
    }
    found
}

/// `Apply failed with …`, as clients print it.
fn conflict_text(conflicts: &[Conflict]) -> String {
    if let [one] = conflicts {
        return format!("Apply failed with 1 conflict: {}: {}", one.message, one.field);
    }
    let mut by_manager: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for conflict in conflicts {
        by_manager.entry(&conflict.message).or_default().push(&conflict.field);
    }
    let mut lines = Vec::new();
    for (message, fields) in by_manager {
        lines.push(format!("{}:", message.replacen("conflict", "conflicts", 1)));
        lines.extend(fields.into_iter().map(|field| format!("- {field}")));
    }
    format!("Apply failed with {} conflicts: {}", conflicts.len(), lines.join("\n"))
}

/// Paths that client-side apply wrote and that hold the same value still: `kubectl apply --server-side` may take
/// them over without force, because they came from the same files.
fn unchanged_since_last_applied(live: &Value, node: &Node, schemas: &Schemas) -> Vec<String> {
    let annotation = live.pointer("/metadata/annotations").and_then(|all| all.get(LAST_APPLIED));
    let applied: Option<Value> =
        annotation.and_then(Value::as_str).and_then(|text| serde_json::from_str(text).ok());
    let Some(applied) = applied.filter(Value::is_object) else { return Vec::new() };
    let diff = walk::compare(Some(live), Some(&applied), node, schemas);
    let mut paths = walk::field_set(&applied, node, schemas)
        .difference(&diff.modified)
        .difference(&diff.added)
        .paths();
    // The annotation is never part of itself.
    paths.push(format!(".metadata.annotations.{LAST_APPLIED}"));
    paths
}

fn stripped_diff(
    old: &Value,
    new: &Value,
    node: &Node,
    schemas: &Schemas,
    actor: &Actor<'_>,
) -> Diff {
    let diff = walk::compare(Some(old), Some(new), node, schemas);
    Diff {
        added: strip(diff.added, actor),
        modified: strip(diff.modified, actor),
        removed: strip(diff.removed, actor),
    }
}

/// Without what nobody owns, and without `status` on the main endpoint of a kind that has a status endpoint.
fn strip(mut set: FieldSet, actor: &Actor<'_>) -> FieldSet {
    set.member = false;
    let field = |name: &str| Step::Field(name.to_owned());
    set.children.remove(&field("apiVersion"));
    set.children.remove(&field("kind"));
    if let Some(mut metadata) = set.children.remove(&field("metadata")) {
        metadata.member = false;
        for name in SERVER_METADATA.iter().chain(&["name", "namespace"]) {
            metadata.children.remove(&field(name));
        }
        set.attach(field("metadata"), metadata);
    }
    if actor.has_status && actor.subresource.is_empty() {
        set.children.remove(&field("status"));
    }
    set
}

/// What tells entries of managedFields apart; in the order in which they are listed, time aside.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct EntryKey {
    operation: Operation,
    manager: String,
    /// Empty for Apply: an applier is one manager, whichever version it applies.
    api_version: String,
    subresource: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    Apply,
    Update,
}

impl EntryKey {
    fn update(manager: &str, api_version: &str, subresource: &str) -> Self {
        Self {
            operation: Operation::Update,
            manager: manager.to_owned(),
            api_version: api_version.to_owned(),
            subresource: subresource.to_owned(),
        }
    }

    fn apply(manager: &str, subresource: &str) -> Self {
        Self { operation: Operation::Apply, ..Self::update(manager, "", subresource) }
    }
}

/// As a conflict names it. The time is no part of it: upstream leaves it out as well.
impl std::fmt::Display for EntryKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "\"{}\"", self.manager)?;
        if !self.subresource.is_empty() {
            write!(f, " with subresource \"{}\"", self.subresource)?;
        }
        if self.operation == Operation::Update {
            write!(f, " using {}", self.api_version)?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    set: FieldSet,
    api_version: String,
    time: Option<String>,
}

impl Entry {
    fn new(api_version: &str) -> Self {
        Self { set: FieldSet::default(), api_version: api_version.to_owned(), time: None }
    }
}

type Managers = BTreeMap<EntryKey, Entry>;

fn is_reset(entries: &[Value]) -> bool {
    matches!(entries, [Value::Object(entry)] if entry.is_empty())
}

fn take_managed_fields(object: &mut Value) -> Option<Value> {
    object.get_mut("metadata")?.as_object_mut()?.remove("managedFields")
}

fn put_managed_fields(object: &mut Value, managers: &Managers) {
    let Some(object) = object.as_object_mut() else { return };
    if managers.is_empty() {
        return;
    }
    let metadata = object.entry("metadata").or_insert_with(|| Value::Object(Map::new()));
    if let Some(metadata) = metadata.as_object_mut() {
        metadata.insert("managedFields".to_owned(), encode(managers));
    }
}

/// The managers of a stored object; entries that do not parse are as good as none.
fn managers_of(object: Option<&Value>) -> Managers {
    object
        .and_then(|object| object.pointer("/metadata/managedFields"))
        .and_then(Value::as_array)
        .and_then(|entries| decode(entries))
        .unwrap_or_default()
}

/// `None` when any entry is malformed: half of the owners would be worse than none.
fn decode(entries: &[Value]) -> Option<Managers> {
    let mut managers = Managers::new();
    for entry in entries {
        let entry = entry.as_object()?;
        let text = |name: &str| match entry.get(name) {
            None | Some(Value::Null) => Some(""),
            Some(value) => value.as_str(),
        };
        let (manager, api_version) = (text("manager")?, text("apiVersion")?);
        let key = match text("operation")? {
            "Apply" => EntryKey::apply(manager, text("subresource")?),
            "Update" => EntryKey::update(manager, api_version, text("subresource")?),
            _ => return None,
        };
        if text("fieldsType")? != "FieldsV1" {
            return None;
        }
        let set = FieldSet::from_json(entry.get("fieldsV1")?).ok()?;
        let time = Some(text("time")?).filter(|time| !time.is_empty()).map(str::to_owned);
        let known = managers.entry(key).or_insert_with(|| Entry::new(api_version));
        known.set = std::mem::take(&mut known.set).union(&set);
        known.time = known.time.take().max(time);
    }
    managers.retain(|_, entry| !entry.set.is_empty());
    Some(managers)
}

fn encode(managers: &Managers) -> Value {
    let mut entries: Vec<(&EntryKey, &Entry)> = managers.iter().collect();
    entries.sort_by_key(|(key, entry)| (key.operation, &entry.time, *key));
    entries
        .into_iter()
        .map(|(key, entry)| {
            let mut object = json!({
                "manager": key.manager,
                "operation": match key.operation {
                    Operation::Apply => "Apply",
                    Operation::Update => "Update",
                },
                "apiVersion": entry.api_version,
                "fieldsType": "FieldsV1",
                "fieldsV1": entry.set.to_json(),
            });
            if let Some(time) = &entry.time {
                object["time"] = time.as_str().into();
            }
            if !key.subresource.is_empty() {
                object["subresource"] = key.subresource.as_str().into();
            }
            object
        })
        .collect()
}

/// Folds the oldest Update entries into one per version until at most [`UPDATE_ENTRIES_MAX`] are left.
fn fold_old_updates(managers: &mut Managers) {
    let updates = |managers: &Managers| {
        let mut keys: Vec<EntryKey> =
            managers.keys().filter(|key| key.operation == Operation::Update).cloned().collect();
        keys.sort_by_key(|key| (managers[key].time.clone(), key.clone()));
        keys
    };
    let keys = updates(managers);
    let mut excess = keys.len().saturating_sub(UPDATE_ENTRIES_MAX);
    // The oldest of each version goes into the bucket together with the second oldest, not before: one entry moved
    // into a bucket of its own saves nothing.
    let mut firsts: BTreeMap<String, EntryKey> = BTreeMap::new();
    for key in keys {
        if excess == 0 {
            break;
        }
        let Some(first) = firsts.get(&key.api_version) else {
            firsts.insert(key.api_version.clone(), key);
            continue;
        };
        let bucket = EntryKey::update(ANCIENT_CHANGES, &key.api_version, "");
        for folded in [first.clone(), key] {
            if folded == bucket {
                continue;
            }
            if let Some(entry) = managers.remove(&folded) {
                let target = managers
                    .entry(bucket.clone())
                    .or_insert_with(|| Entry::new(&entry.api_version));
                target.set = std::mem::take(&mut target.set).union(&entry.set);
                target.time = target.time.take().max(entry.time);
            }
        }
        excess = updates(managers).len().saturating_sub(UPDATE_ENTRIES_MAX);
    }
}
