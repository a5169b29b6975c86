//! `delete` and `deletecollection`: removal now, or a deletionTimestamp and somebody to finish the work.

use super::read::Selection;
use super::write::{Options, Writer, dry_run, is_done};
use super::{body, kinds, shape};
use crate::api::{Api, key, store_failed};
use crate::http::{Answer, Call};
use crate::route::Target;
use crate::store::{Key, Write};
use serde_json::{Value, json};
use skerry_apiserver_core::catalog::{Catalog, Resource};
use skerry_apiserver_core::status::{ApiError, FieldError};
use std::sync::Arc;

/// Attempts when somebody else writes the object at the same time.
const ATTEMPTS_MAX: u32 = 10;
/// Grace of a pod whose spec does not say (its default is the same).
const POD_GRACE_S: i64 = 30;
pub(crate) const FOREGROUND: &str = "foregroundDeletion";
pub(crate) const ORPHAN: &str = "orphan";

/// What becomes of the objects that the deleted one owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Propagation {
    Background,
    Foreground,
    Orphan,
}

/// `DeleteOptions`.
#[derive(Debug, Clone, Default)]
pub(crate) struct DeleteOptions {
    pub(crate) grace: Option<i64>,
    pub(crate) propagation: Option<Propagation>,
    pub(crate) uid: Option<String>,
    pub(crate) revision: Option<String>,
    pub(crate) dry_run: bool,
}

impl DeleteOptions {
    /// From the body, or from the query for clients that send none.
    pub(crate) fn of(call: &Call) -> Result<Self, ApiError> {
        let body = body::read(call)?;
        Self::parse(&body, call)
    }

    pub(crate) fn parse(body: &Value, call: &Call) -> Result<Self, ApiError> {
        let from_query = |name: &str| call.query.get(name).map(str::to_owned);
        let grace = match &body["gracePeriodSeconds"] {
            Value::Null => from_query("gracePeriodSeconds")
                .map(|text| text.parse())
                .transpose()
                .map_err(|_| ApiError::bad_request("gracePeriodSeconds is not a number"))?,
            value => Some(
                value
                    .as_i64()
                    .ok_or_else(|| ApiError::bad_request("gracePeriodSeconds is not a number"))?,
            ),
        };
        let word = body["propagationPolicy"].as_str().map(str::to_owned);
        let propagation = match word.or_else(|| from_query("propagationPolicy")).as_deref() {
            None | Some("") => match body["orphanDependents"].as_bool() {
                Some(true) => Some(Propagation::Orphan),
                Some(false) => Some(Propagation::Background),
                None => None,
            },
            Some("Background") => Some(Propagation::Background),
            Some("Foreground") => Some(Propagation::Foreground),
            Some("Orphan") => Some(Propagation::Orphan),
            Some(other) => {
                let error = FieldError {
                    field: "propagationPolicy".into(),
                    reason: "FieldValueNotSupported",
                    message: format!(
                        "Unsupported value: \"{other}\": supported values: \"Foreground\", \"Background\", \"Orphan\""
                    ),
                };
                return Err(ApiError::invalid("", "DeleteOptions", "", &[error]));
            }
        };
        let text = |value: &Value| value.as_str().map(str::to_owned);
        Ok(Self {
            grace: grace.map(|grace: i64| grace.max(0)),
            propagation,
            uid: text(&body["preconditions"]["uid"]),
            revision: text(&body["preconditions"]["resourceVersion"]),
            dry_run: dry_run(call)?
                || body["dryRun"]
                    .as_array()
                    .is_some_and(|list| list.iter().any(|one| one == "All")),
        })
    }
}

/// What a deletion came to.
pub(crate) struct Deleted {
    /// The object's last or marked state.
    pub(crate) object: Arc<Value>,
    /// It is gone, not only marked.
    pub(crate) removed: bool,
}

impl Api {
    pub(super) async fn delete_one(
        &self,
        call: &Call,
        resource: &Resource,
        target: &Target,
    ) -> Result<Answer, ApiError> {
        let options = DeleteOptions::of(call)?;
        let name = target.name.as_deref().unwrap_or_default();
        let key = key(resource, target.namespace.as_deref(), name);
        let deleted = self.delete_object(resource, &key, &options).await?;
        if deleted.removed && !answers_object(resource) {
            let mut details = json!({
                "name": name, "kind": &*resource.plural, "uid": deleted.object["metadata"]["uid"],
            });
            if !resource.group.is_empty() {
                details["group"] = (&*resource.group).into();
            }
            return Ok(Answer::ok(json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
                "details": details,
            })));
        }
        Ok(Answer::ok(shape::served(resource, (*deleted.object).clone())))
    }

    pub(super) async fn delete_collection(
        &self,
        call: &Call,
        resource: &Resource,
        target: &Target,
    ) -> Result<Answer, ApiError> {
        let options = DeleteOptions::of(call)?;
        let selection = Selection::of(&call.query, resource)?;
        let range = selection.range(resource, target);
        let listing = self.store.list(range, move |object| selection.matches(object));
        let listing = listing.await.map_err(store_failed)?;
        let mut deleted = Vec::with_capacity(listing.items.len());
        for object in &listing.items {
            let metadata = &object["metadata"];
            let name = metadata["name"].as_str().unwrap_or_default();
            let key = key(resource, metadata["namespace"].as_str(), name);
            match self.delete_object(resource, &key, &options).await {
                Ok(one) => deleted.push(shape::served(resource, (*one.object).clone())),
                Err(error) if error.code == 404 => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Answer::ok(json!({
            "kind": &*resource.list_kind, "apiVersion": resource.api_version(),
            "metadata": {"resourceVersion": self.store.current().to_string()}, "items": deleted,
        })))
    }

    /// Removes an object, or marks it when its finalizers or its grace come first.
    pub(crate) async fn delete_object(
        &self,
        resource: &Resource,
        key: &Key,
        options: &DeleteOptions,
    ) -> Result<Deleted, ApiError> {
        let Resource { group, plural, .. } = resource;
        kinds::before_delete(resource, &key.name)?;
        for _ in 0..ATTEMPTS_MAX {
            let live = self.get_stored(resource, key).await?;
            check_preconditions(resource, key, &live, options)?;
            let marked = marked(resource, &live, options);
            let gone = is_done(&marked);
            if !gone && marked == live {
                return Ok(Deleted { object: Arc::new(live), removed: false });
            }
            if options.dry_run {
                return Ok(Deleted { object: Arc::new(marked), removed: gone });
            }
            let object = (!gone).then_some(marked);
            let expires = kinds::lifetime(&key.group, &key.resource)
                .filter(|_| object.is_some())
                .map(|_| jiff::Timestamp::now().as_second());
            let write = Write { key: key.clone(), seen: Some(Arc::new(live)), object, expires };
            match self.store.write(write).await {
                Ok(object) => {
                    kinds::after_write(self, resource).await?;
                    return Ok(Deleted { object, removed: gone });
                }
                Err(crate::store::StoreError::Conflict { .. }) => {}
                Err(error) => return Err(store_failed(error)),
            }
        }
        Err(ApiError::conflict(
            group,
            plural,
            &key.name,
            "the object is being written all the time; please try again",
        ))
    }

    /// Takes `finalizer` off an object; its last one removes the object. An object that is gone is fine.
    pub(crate) async fn drop_finalizer(
        &self,
        catalog: &Catalog,
        resource: &Resource,
        key: &Key,
        finalizer: &str,
    ) -> Result<(), ApiError> {
        let options = Options::internal("skerry-apiserver");
        let writer = Writer { api: self, catalog, resource, options: &options };
        let outcome = writer
            .modify(key, "finalizers", true, |live| {
                let mut new = live.clone();
                if let Some(list) = new["metadata"]["finalizers"].as_array_mut() {
                    list.retain(|one| one != finalizer);
                }
                Ok(new)
            })
            .await;
        match outcome {
            Err(error) if error.code != 404 => Err(error),
            _ => Ok(()),
        }
    }
}

/// Kinds whose removal is answered with the object instead of a Status.
fn answers_object(resource: &Resource) -> bool {
    resource.group.is_empty()
        && matches!(
            &*resource.plural,
            "pods"
                | "services"
                | "serviceaccounts"
                | "podtemplates"
                | "persistentvolumes"
                | "persistentvolumeclaims"
                | "resourcequotas"
        )
}

fn check_preconditions(
    resource: &Resource,
    key: &Key,
    live: &Value,
    options: &DeleteOptions,
) -> Result<(), ApiError> {
    let check = |what: &str, wanted: &Option<String>, found: &Value| match wanted {
        Some(wanted) if found.as_str() != Some(wanted) => Err(ApiError::conflict(
            &resource.group,
            &resource.plural,
            &key.name,
            &format!(
                "Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {}",
                found.as_str().unwrap_or_default()
            ),
        )),
        _ => Ok(()),
    };
    check("UID", &options.uid, &live["metadata"]["uid"])?;
    check("ResourceVersion", &options.revision, &live["metadata"]["resourceVersion"])
}

/// The object with the marks of its deletion.
fn marked(resource: &Resource, live: &Value, options: &DeleteOptions) -> Value {
    let mut object = live.clone();
    let deleting = live["metadata"]["deletionTimestamp"].is_string();
    if let Some(propagation) = options.propagation {
        let finalizers = object["metadata"]["finalizers"].take();
        let mut list: Vec<Value> = finalizers.as_array().cloned().unwrap_or_default();
        list.retain(|one| one != FOREGROUND && one != ORPHAN);
        match propagation {
            Propagation::Background => {}
            Propagation::Foreground => list.push(FOREGROUND.into()),
            Propagation::Orphan => list.push(ORPHAN.into()),
        }
        if list.is_empty() {
            if let Some(metadata) = object["metadata"].as_object_mut() {
                metadata.remove("finalizers");
            }
        } else {
            object["metadata"]["finalizers"] = list.into();
        }
    }
    let grace = grace(resource, live, options);
    let before = live["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0);
    if deleting && grace >= before {
        return object; // a grace is only ever shortened
    }
    let end = jiff::Timestamp::now()
        .saturating_add(jiff::SignedDuration::from_secs(grace))
        .unwrap_or(jiff::Timestamp::MAX);
    object["metadata"]["deletionTimestamp"] = end.strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into();
    object["metadata"]["deletionGracePeriodSeconds"] = grace.into();
    if !deleting && let Some(generation) = live["metadata"]["generation"].as_i64() {
        object["metadata"]["generation"] = (generation + 1).into();
    }
    if object["kind"] == "Namespace" {
        object["status"]["phase"] = "Terminating".into();
    }
    object
}

/// Seconds that a node gets to stop the object's processes: only pods that are bound and not over have any.
fn grace(resource: &Resource, live: &Value, options: &DeleteOptions) -> i64 {
    if !(resource.group.is_empty() && &*resource.plural == "pods") {
        return 0;
    }
    let bound = live["spec"]["nodeName"].as_str().is_some_and(|node| !node.is_empty());
    let over = matches!(live["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    if !bound || over {
        return 0;
    }
    let own = live["spec"]["terminationGracePeriodSeconds"].as_i64();
    options.grace.or(own).unwrap_or(POD_GRACE_S).max(0)
}
