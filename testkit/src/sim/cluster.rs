//! A Kubernetes API, as far as the link sees it: versions, a log of changes, and what a node's requests do.

use serde_json::{Value, json};
use skerry_cloudcore_core::downstream::{Key, Kind};
use skerry_cloudcore_core::objectsync::{Action, Outcome, SyncSpec, Write};
use skerry_protocol::{Message, Operation, ResourcePath};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// One entry of the log that watches follow.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) key: Key,
    /// The object, or its last state.
    pub(super) object: Value,
    pub(super) deleted: bool,
}

/// Namespace and name of an ObjectSync record.
pub(super) type SyncName = (Option<String>, String);

/// An ObjectSync record.
#[derive(Debug, Clone)]
pub(super) struct SyncRecord {
    pub(super) spec: SyncSpec,
    /// Acknowledged version, if it was written.
    pub(super) version: Option<Arc<str>>,
    /// Its own version.
    pub(super) at: u64,
}

/// One entry of the log of records.
#[derive(Debug)]
pub(super) struct SyncChange {
    pub(super) name: SyncName,
    pub(super) record: SyncRecord,
    pub(super) deleted: bool,
}

/// Distance of two versions: how often a cluster may be restored and still never give out a version twice. (Where it
/// does, nobody can tell the two apart.)
const VERSION_STEP: u64 = 2;

/// What a backup holds.
#[derive(Debug)]
pub(super) struct Backup {
    objects: BTreeMap<Key, Value>,
    syncs: BTreeMap<SyncName, SyncRecord>,
    pub(super) version: u64,
}

/// The objects, and what happened to them.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    objects: BTreeMap<Key, Value>,
    pub(super) log: Vec<Arc<Change>>,
    /// Version of the last change; what a consistent read tells.
    pub(super) version: u64,
    uids: u64,
    /// Texts of the events that arrived.
    pub(super) texts: BTreeSet<String>,
    /// ObjectSync records by namespace and name.
    pub(super) syncs: BTreeMap<SyncName, SyncRecord>,
    /// What happened to them, for those who watch them.
    pub(super) sync_log: Vec<Arc<SyncChange>>,
}

impl Cluster {
    pub(super) fn backup(&self) -> Backup {
        let (objects, syncs) = (self.objects.clone(), self.syncs.clone());
        Backup { objects, syncs, version: self.version }
    }

    /// Goes back to a backup, once. Pods that have ended since are there again.
    pub(super) fn restore(&mut self, backup: Backup) {
        self.objects = backup.objects;
        self.syncs = backup.syncs;
        self.version = backup.version + 1;
    }

    /// Whether there is a pod of this uid.
    pub(super) fn has_pod(&self, uid: &str) -> bool {
        let is_pod =
            |(key, pod): (&Key, &Value)| key.kind() == Kind::Pod && pod["metadata"]["uid"] == *uid;
        self.objects.iter().any(is_pod)
    }

    /// Uids of all pods.
    pub(super) fn pod_uids(&self) -> BTreeSet<String> {
        let pods = self.objects.iter().filter(|(key, _)| key.kind() == Kind::Pod);
        pods.filter_map(|(_, pod)| pod["metadata"]["uid"].as_str().map(str::to_owned)).collect()
    }

    pub(super) fn get(&self, key: &Key) -> Option<&Value> {
        self.objects.get(key)
    }

    pub(super) fn objects(&self) -> impl Iterator<Item = (&Key, &Value)> {
        self.objects.iter()
    }

    /// Creates or replaces; versions and uid are the cluster's.
    pub(super) fn put(&mut self, key: &Key, mut object: Value) {
        self.version += VERSION_STEP;
        let uid = match self.objects.get(key) {
            Some(old) => old["metadata"]["uid"].clone(),
            None => {
                self.uids += 1;
                format!("uid-{}", self.uids).into()
            }
        };
        let metadata = &mut object["metadata"];
        metadata["name"] = key.name().into();
        if key.kind() != Kind::Node {
            metadata["namespace"] = key.namespace().into();
        }
        metadata["uid"] = uid;
        metadata["resourceVersion"] = self.version.to_string().into();
        self.objects.insert(key.clone(), object.clone());
        self.log.push(Arc::new(Change { key: key.clone(), object, deleted: false }));
    }

    /// Changes an object that is there.
    pub(super) fn change(&mut self, key: &Key, change: impl FnOnce(&mut Value)) {
        if let Some(mut object) = self.objects.get(key).cloned() {
            change(&mut object);
            self.put(key, object);
        }
    }

    pub(super) fn delete(&mut self, key: &Key) {
        if let Some(mut object) = self.objects.remove(key) {
            self.version += VERSION_STEP;
            object["metadata"]["resourceVersion"] = self.version.to_string().into();
            self.log.push(Arc::new(Change { key: key.clone(), object, deleted: true }));
        }
    }

    /// Pods bound to `node`.
    pub(super) fn pods(&self, node: &str) -> Vec<(&Key, &Value)> {
        self.objects
            .iter()
            .filter(|(key, object)| key.kind() == Kind::Pod && object["spec"]["nodeName"] == *node)
            .collect()
    }

    /// The object as somebody knows it who has seen so many entries of the log, and the version of the last of them.
    pub(super) fn get_at(&self, key: &Key, seen: usize) -> (Option<Value>, u64) {
        let last = self.log[..seen].iter().rev().find(|change| change.key == *key);
        let object = last.filter(|change| !change.deleted).map(|change| change.object.clone());
        (object, self.version_at(seen))
    }

    /// The same for the pods bound to `node`.
    pub(super) fn pods_at(&self, node: &str, seen: usize) -> (Vec<Value>, u64) {
        let keys = self.log[..seen].iter().map(|change| &change.key);
        let keys: BTreeSet<&Key> = keys.filter(|key| key.kind() == Kind::Pod).collect();
        let pods = keys.into_iter().filter_map(|key| self.get_at(key, seen).0);
        let pods = pods.filter(|pod| pod["spec"]["nodeName"] == *node).collect();
        (pods, self.version_at(seen))
    }

    fn version_at(&self, seen: usize) -> u64 {
        let last = seen.checked_sub(1).map(|last| &self.log[last].object);
        let version = last.and_then(|object| object["metadata"]["resourceVersion"].as_str());
        version.and_then(|version| version.parse().ok()).unwrap_or(0)
    }

    /// Carries out a write of an ObjectSync record, as the API and the hub's writer do. `half` is a bad moment: of the
    /// two requests of a creation only the first is done.
    pub(super) fn write_sync(&mut self, write: &Write, half: bool) -> Outcome {
        let name = (write.id.namespace.as_deref().map(str::to_owned), write.name());
        let is_seen = |at: u64| write.at == 0 || write.at == at;
        let found = self.syncs.get(&name).cloned();
        match (&write.action, found) {
            (Action::Create(version), None) => {
                let spec = write.spec.clone();
                self.put_sync(&name, SyncRecord { spec: spec.clone(), version: None, at: 0 });
                if half {
                    return Outcome::Failed;
                }
                let version = Some(Arc::clone(version));
                Outcome::Done(self.put_sync(&name, SyncRecord { spec, version, at: 0 }))
            }
            (Action::Create(_), Some(found)) => {
                Outcome::Found { version: found.version, at: found.at }
            }
            (Action::Status(version), Some(found)) if is_seen(found.at) => {
                let version = Some(Arc::clone(version));
                Outcome::Done(self.put_sync(&name, SyncRecord { version, ..found }))
            }
            (Action::Delete, Some(record)) if is_seen(record.at) => {
                self.version += VERSION_STEP;
                self.syncs.remove(&name);
                let record = SyncRecord { at: self.version, ..record };
                self.sync_log.push(Arc::new(SyncChange { name, record, deleted: true }));
                Outcome::Done(0)
            }
            (Action::Delete, None) => Outcome::Done(0),
            (Action::Status(_) | Action::Delete, _) => Outcome::Conflict,
        }
    }

    fn put_sync(&mut self, name: &SyncName, record: SyncRecord) -> u64 {
        self.version += VERSION_STEP;
        let record = SyncRecord { at: self.version, ..record };
        self.syncs.insert(name.clone(), record.clone());
        let change = SyncChange { name: name.clone(), record, deleted: false };
        self.sync_log.push(Arc::new(change));
        self.version
    }

    /// Does what a node asks for; `None` when it expects no answer.
    pub(super) fn answer(
        &mut self,
        node: &str,
        request: &Message,
        receipts: bool,
        now_ms: i64,
    ) -> Option<Message> {
        let path: ResourcePath = request.route.resource.parse().ok()?;
        let name = path.name()?;
        let key = |kind| Key::new(kind, path.namespace(), name);
        let body: Value = request.content_as().ok()?;
        // A patch is a text that holds JSON.
        let body = match body.as_str().map(serde_json::from_str) {
            Some(Ok(inner)) => inner,
            _ => body,
        };
        let object = |object: &Value| json!({"Object": object, "Err": null});
        let refusal = |reason: &str, code: u16| json!({"Object": null, "Err": error(reason, code)});
        let answer = match (request.operation()?, path.kind()) {
            (Operation::Insert, "node") => {
                let key = key(Kind::Node)?;
                if self.objects.contains_key(&key) {
                    refusal("AlreadyExists", 409)
                } else {
                    self.put(&key, body);
                    object(&self.objects[&key])
                }
            }
            (Operation::Update, "node") => json!("OK"),
            (Operation::Patch, "nodepatch") => {
                let key = key(Kind::Node)?;
                match self.objects.contains_key(&key) {
                    true => {
                        self.change(&key, |node| merge(&mut node["status"], &body["status"]));
                        object(&self.objects[&key])
                    }
                    false => refusal("NotFound", 404),
                }
            }
            (Operation::Patch, "podpatch") => {
                let key = key(Kind::Pod)?;
                match self.objects.get(&key) {
                    Some(pod) if pod["metadata"]["uid"] == body["metadata"]["uid"] => {
                        self.change(&key, |pod| merge(&mut pod["status"], &body["status"]));
                        object(&self.objects[&key])
                    }
                    Some(_) => refusal("Conflict", 409),
                    None => refusal("NotFound", 404),
                }
            }
            (Operation::Delete, "pod") => {
                let key = key(Kind::Pod)?;
                let uid = &body["preconditions"]["uid"];
                if self.objects.get(&key).is_some_and(|pod| pod["metadata"]["uid"] == *uid) {
                    self.delete(&key);
                }
                json!("OK")
            }
            (Operation::Insert | Operation::Update | Operation::Patch, "event") => {
                if let Some(text) = find_text(&body) {
                    self.texts.insert(text);
                }
                if !receipts {
                    return None;
                }
                json!("OK")
            }
            (Operation::Query, "lease") => refusal("NotFound", 404),
            (Operation::Insert | Operation::Update, "lease") => object(&body),
            (_, kind) => {
                let text =
                    format!("`{}` of `{kind}` is not modelled for {node}", request.route.operation);
                return Some(request.error(now_ms, "edgecontroller", "resource", &text));
            }
        };
        let mut answer = request.response(now_ms, &answer);
        answer.route.source = "edgecontroller".into();
        answer.route.group = "resource".into();
        Some(answer)
    }
}

fn error(reason: &str, code: u16) -> Value {
    json!({"ErrStatus": {"metadata": {}, "status": "Failure", "message": reason, "reason": reason, "code": code}})
}

fn find_text(event: &Value) -> Option<String> {
    event["message"].as_str().or(event["event"]["message"].as_str()).map(str::to_owned)
}

/// A merge patch without lists, which is all that the modelled statuses need.
fn merge(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else { return };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in fields.iter().filter(|(name, _)| !name.starts_with('$')) {
        match value {
            Value::Null => drop(target.as_object_mut().map(|target| target.remove(name))),
            Value::Object(_) => merge(&mut target[name], value),
            _ => target[name] = value.clone(),
        }
    }
}
