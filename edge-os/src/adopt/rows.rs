//! KubeEdge's rows and ours: what one becomes as the other, and how KubeEdge's are read and written.
//!
//! Source: kubeedge/kubeedge, edge/pkg/metamanager/dao/models, edge/pkg/metamanager/metaserver/kubernetes/storage/sqlite,
//! pkg/metaserver/key.go.

use super::files::{copy_database, scratch_directory};
use super::{AdoptError, Change, PlannedObject, REMOVED_KINDS, REPORT_KINDS};
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, params};
use serde_json::Value;
use skerry_edge_core::Now;
use skerry_edge_core::meta::{Effect, Meta, Row, Write};
use skerry_protocol::{Message, Operation};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::time::Instant;

/// A row of KubeEdge's table `meta`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) key: String,
    pub(super) kind: String,
    pub(super) value: String,
}

/// Reads the rows from a copy: opening the file itself could finish or undo what KubeEdge left half done.
pub(super) fn read_copy(path: &Path) -> Result<Vec<Stored>, AdoptError> {
    let scratch = scratch_directory()?;
    let rows = copy_database(path, &scratch).and_then(|copy| {
        let database = |source| AdoptError::Database { path: path.to_owned(), source };
        let connection = Connection::open(&copy).map_err(database)?;
        read_rows(&connection).map_err(database)
    });
    let _ = fs::remove_dir_all(&scratch);
    rows
}

pub(super) fn read_rows(connection: &Connection) -> rusqlite::Result<Vec<Stored>> {
    let mut query = connection.prepare("SELECT key, type, value FROM meta ORDER BY key")?;
    let rows = query.query_map([], |row| {
        Ok(Stored { key: row.get(0)?, kind: row.get(1)?, value: row.get(2)? })
    })?;
    rows.collect()
}

/// Turns KubeEdge's rows into ours, by the same rules as a push of the hub.
pub(super) fn import(node: &str, stored: &[Stored]) -> (Vec<Row>, Vec<PlannedObject>) {
    let patches: HashMap<&str, &Stored> = stored
        .iter()
        .filter(|row| row.kind == "podpatch")
        .map(|row| (row.key.as_str(), row))
        .collect();
    let (mut meta, _) = Meta::restore(node, [], []);
    let now = Now { mono: Instant::now(), wall: Timestamp::now() };
    let mut rows = Vec::new();
    let mut objects = Vec::new();
    for one in stored.iter().filter(|row| !REPORT_KINDS.contains(&row.kind.as_str())) {
        let mut note = |change, reason: &str| {
            objects.push(PlannedObject {
                path: one.key.clone(),
                change,
                reason: reason.to_owned(),
            });
        };
        let Ok(mut object) = serde_json::from_str::<Value>(&one.value) else {
            note(Change::Skip, "not JSON");
            continue;
        };
        // The answer to a status report is the pod in its newest form.
        let patch = one.key.replacen("/pod/", "/podpatch/", 1);
        let answer = patches.get(patch.as_str()).filter(|_| one.kind == "pod");
        let answer = answer.and_then(|row| serde_json::from_str::<Value>(&row.value).ok());
        if let Some(answer) = answer
            && answer["metadata"]["uid"] == object["metadata"]["uid"]
            && answer["spec"].is_object()
            && version(&answer) > version(&object)
        {
            object = answer;
        }
        // As a watched object: pods and nodes of others may be there for the node's own API.
        let source = "dynamiccontroller";
        let push = Message::new(0, source, "resource", Operation::Update, one.key.clone(), &object);
        let step = meta.handle_push(now, &push);
        let row = match &step.write {
            Some(Write::Put(row)) => Some(row.clone()),
            _ => None,
        };
        let (_, effects) = meta.commit(step);
        let refused = effects.into_iter().find_map(|effect| match effect {
            Effect::Ignored { reason, .. } => Some(reason),
            _ => None,
        });
        match (row, refused) {
            (Some(row), _) => {
                note(Change::Import, "");
                rows.push(row);
            }
            (None, refused) => note(Change::Skip, &refused.unwrap_or_default()),
        }
    }
    (rows, objects)
}

pub(super) fn version(object: &Value) -> Option<u64> {
    object["metadata"]["resourceVersion"].as_str()?.parse().ok()
}

/// What has to change in KubeEdge's rows: rows with their value there, keys to remove, and all of it for people.
/// `status` is for the Node when KubeEdge has none.
pub(super) fn export(
    node: &str,
    rows: Vec<Row>,
    stored: &[Stored],
    status: &Value,
) -> (Vec<(Row, String)>, Vec<String>, Vec<PlannedObject>) {
    let theirs: BTreeMap<&str, &Stored> =
        stored.iter().map(|row| (row.key.as_str(), row)).collect();
    let mut puts = Vec::new();
    let mut removes = Vec::new();
    let mut objects = Vec::new();
    let mut note = |path: &str, change, reason: &str| {
        objects.push(PlannedObject { path: path.into(), change, reason: reason.into() });
    };
    for row in rows {
        let known = theirs.get(row.path.as_str());
        let known: Option<Value> = known.and_then(|row| serde_json::from_str(&row.value).ok());
        let Ok(mut object) = serde_json::from_str::<Value>(&row.json) else {
            note(&row.path, Change::Skip, "not JSON");
            continue;
        };
        if row.path == format!("null/node/{node}") {
            // Our row has no status.
            let theirs = known.as_ref().map(|known| &known["status"]);
            object["status"] = theirs.filter(|theirs| theirs.is_object()).unwrap_or(status).clone();
        }
        let same = known.is_some_and(|mut known| {
            if let Some(metadata) = known["metadata"].as_object_mut() {
                metadata.remove("managedFields");
            }
            known == object
        });
        if same {
            note(&row.path, Change::Keep, "");
        } else {
            note(&row.path, Change::Write, "");
            puts.push((row, object.to_string()));
        }
    }
    let ours: std::collections::HashSet<&str> =
        objects.iter().map(|object| object.path.as_str()).collect();
    let gone: Vec<&Stored> = stored
        .iter()
        .filter(|row| {
            REMOVED_KINDS.contains(&row.kind.as_str()) && !ours.contains(row.key.as_str())
        })
        .collect();
    for row in gone {
        removes.push(row.key.clone());
        objects.push(PlannedObject {
            path: row.key.clone(),
            change: Change::Remove,
            reason: "gone".into(),
        });
    }
    objects.sort_by(|a, b| a.path.cmp(&b.path));
    (puts, removes, objects)
}

pub(super) fn write_rows(
    connection: &mut Connection,
    puts: &[(Row, String)],
    removes: &[String],
) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    // As KubeEdge's own library makes them, where KubeEdge has never run.
    transaction.execute_batch(
        "CREATE TABLE IF NOT EXISTS `meta` (`key` text,`type` text,`value` text,PRIMARY KEY (`key`));
         CREATE TABLE IF NOT EXISTS `meta_v2` (`key` text,`group_version_resource` text,`namespace` text,`name` text,
            `resource_version` integer,`value` text,PRIMARY KEY (`key`));",
    )?;
    for key in removes {
        let value: Option<String> = transaction
            .query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0))
            .optional()?;
        let object = value.and_then(|value| serde_json::from_str::<Value>(&value).ok());
        if let Some((key, ..)) = object.as_ref().and_then(v2_key) {
            transaction.execute("DELETE FROM meta_v2 WHERE key = ?1", [key])?;
        }
        transaction.execute("DELETE FROM meta WHERE key = ?1", [key])?;
        forget_report(&transaction, key)?;
    }
    for (row, value) in puts {
        transaction.execute(
            "INSERT OR REPLACE INTO meta (key, type, value) VALUES (?1, ?2, ?3)",
            params![row.path, row.kind, value],
        )?;
        forget_report(&transaction, &row.path)?;
        let object: Value = serde_json::from_str(value).unwrap_or_default();
        if let Some((key, resource, namespace, name)) = v2_key(&object) {
            let version = i64::try_from(version(&object).unwrap_or(0)).unwrap_or(i64::MAX);
            transaction.execute(
                "INSERT OR REPLACE INTO meta_v2
                 (key, group_version_resource, namespace, name, resource_version, value)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![key, resource, namespace, name, version, value],
            )?;
        }
    }
    transaction.commit()
}

/// Removes what KubeEdge last reported of a pod: it is older than the row now.
pub(super) fn forget_report(connection: &Connection, key: &str) -> rusqlite::Result<()> {
    if key.contains("/pod/") {
        let report = key.replacen("/pod/", "/podpatch/", 1);
        connection.execute("DELETE FROM meta WHERE key = ?1", [report])?;
    }
    Ok(())
}

/// Key, resource, namespace and name of an object in KubeEdge's second table, which its own API serves from.
pub(super) fn v2_key(object: &Value) -> Option<(String, String, String, String)> {
    let (api, kind) = (object["apiVersion"].as_str()?, object["kind"].as_str()?);
    let (group, version) = api.split_once('/').unwrap_or(("", api));
    let resource = plural(&kind.to_lowercase());
    let name = object["metadata"]["name"].as_str()?;
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
    let or =
        |text: &str, empty: &str| if text.is_empty() { empty.to_owned() } else { text.to_owned() };
    let (shown, scope) = (or(group, "core"), or(namespace, "null"));
    Some((
        format!("/{shown}/{version}/{resource}/{scope}/{name}"),
        format!("{group}/{version}, Resource={resource}"),
        namespace.to_owned(),
        name.to_owned(),
    ))
}

/// Kubernetes' guess of a resource's name from its kind.
pub(super) fn plural(singular: &str) -> String {
    if singular == "endpoints" {
        return singular.to_owned();
    }
    match singular.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None if singular.ends_with('s') => format!("{singular}es"),
        None => format!("{singular}s"),
    }
}
