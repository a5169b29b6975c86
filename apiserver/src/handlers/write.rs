//! `create`, `update` and `patch`: every change to a stored object goes through here.
//!
//! A change is a function from the live object to the wanted one; [`Api::modify`] runs it in a loop of read, compute,
//! compare-and-swap. What must hold for every write (immutable metadata, defaults, validation, generation, field
//! ownership, finalizers) is done in one place, [`Writer::settle`], for requests and for the server's own upkeep.

use super::body::{self, PatchType};
use super::{kinds, shape};
use crate::api::{Api, Warnings, key, place, store_failed};
use crate::http::{Answer, Call};
use crate::route::Target;
use crate::store::{Key, StoreError, Write};
use http::Method;
use http::header::USER_AGENT;
use rand::Rng;
use serde_json::{Value, json};
use skerry_apiserver_core::catalog::{Catalog, Resource};
use skerry_apiserver_core::ownership::{self, Actor};
use skerry_apiserver_core::status::{ApiError, FieldError};
use skerry_apiserver_core::{defaults, events, patch, structural, validation};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Attempts of a change that does not insist on a revision.
const ATTEMPTS_MAX: u32 = 5;
/// Attempts to find a free name for `generateName`.
const NAMES_MAX: u32 = 8;
/// Characters of generated names: no vowels, no lookalikes.
const NAME_CHARACTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const NAME_SUFFIX: usize = 5;
const NAME_PREFIX_MAX: usize = 58;
const MANAGER_MAX: usize = 128;
/// Etcd refuses more in a real cluster; the same bound keeps objects portable.
const OBJECT_MAX: usize = 1_500_000;

/// What a request says about how to write.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) dry_run: bool,
    pub(crate) unknown: Unknown,
    pub(crate) manager: String,
    /// The request names its manager; else it was guessed.
    pub(crate) named: bool,
    pub(crate) force: bool,
}

/// `fieldValidation`: what becomes of fields that the kind does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unknown {
    Ignore,
    Warn,
    Refuse,
}

impl Options {
    /// Options of the server's own writes.
    pub(crate) fn internal(manager: &str) -> Self {
        Self {
            dry_run: false,
            unknown: Unknown::Ignore,
            manager: manager.into(),
            named: true,
            force: false,
        }
    }

    pub(crate) fn of(call: &Call) -> Result<Self, ApiError> {
        let unknown = match call.query.get("fieldValidation") {
            None | Some("Warn") => Unknown::Warn,
            Some("Ignore") => Unknown::Ignore,
            Some("Strict") => Unknown::Refuse,
            Some(other) => {
                let message = format!(
                    "Unsupported value: \"{other}\": supported values: \"Ignore\", \"Strict\", \"Warn\""
                );
                return Err(invalid_option("fieldValidation", &message));
            }
        };
        let manager = match call.query.get("fieldManager") {
            Some(manager) if manager.len() > MANAGER_MAX => {
                return Err(invalid_option(
                    "fieldManager",
                    "Too long: may not be more than 128 bytes",
                ));
            }
            Some(manager) => manager.to_owned(),
            None => {
                let agent = call.header(USER_AGENT).split('/').next().unwrap_or_default();
                let agent: String = agent.chars().take(MANAGER_MAX).collect();
                if agent.is_empty() { "unknown".into() } else { agent }
            }
        };
        Ok(Self {
            dry_run: dry_run(call)?,
            unknown,
            manager,
            named: call.query.get("fieldManager").is_some(),
            force: call.query.get("force").is_some_and(|force| force == "true"),
        })
    }
}

/// The `dryRun` parameter: only `All` exists.
pub(super) fn dry_run(call: &Call) -> Result<bool, ApiError> {
    match call.query.get("dryRun") {
        None => Ok(false),
        Some("All") => Ok(true),
        Some(other) => Err(invalid_option(
            "dryRun",
            &format!("Unsupported value: \"{other}\": supported values: \"All\""),
        )),
    }
}

/// An object after a write, and whether it was stored anew.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) object: Arc<Value>,
    pub(crate) created: bool,
}

impl Api {
    pub(super) async fn create(
        &self,
        call: &Call,
        catalog: &Catalog,
        resource: &Resource,
        target: &Target,
        warnings: &mut Warnings,
    ) -> Result<Answer, ApiError> {
        let format = call.format()?;
        let options = Options::of(call)?;
        let mut object = body::read(call)?;
        body::expect_kind(&mut object, resource)?;
        kinds::note_requester(resource, &mut object, &call.user);
        let writer = Writer { api: self, catalog, resource, options: &options };
        let namespace = target.namespace.as_deref();
        let written = writer.create(namespace, target.name.as_deref(), object, warnings).await?;
        let object = shape::served(resource, (*written).clone());
        Ok(Answer::created(shape::one(&format, resource, object)))
    }

    /// PUT and PATCH of an object or of its status.
    pub(super) async fn change(
        &self,
        call: &Call,
        catalog: &Catalog,
        resource: &Resource,
        target: &Target,
        warnings: &mut Warnings,
    ) -> Result<Answer, ApiError> {
        let format = call.format()?;
        let options = Options::of(call)?;
        let writer = Writer { api: self, catalog, resource, options: &options };
        let name = target.name.as_deref().unwrap_or_default();
        let key = key(resource, target.namespace.as_deref(), name);
        let written = if call.method == Method::PUT {
            let mut object = body::read(call)?;
            body::expect_kind(&mut object, resource)?;
            writer.replace(&key, object, &target.subresource, warnings).await?
        } else {
            let (kind, patch) = body::read_patch(call)?;
            writer.patch(&key, kind, &patch, &target.subresource, warnings).await?
        };
        let object = shape::served(resource, (*written.object).clone());
        let object = shape::one(&format, resource, object);
        Ok(if written.created { Answer::created(object) } else { Answer::ok(object) })
    }
}

/// Writes objects of one resource.
pub(crate) struct Writer<'a> {
    pub(crate) api: &'a Api,
    pub(crate) catalog: &'a Catalog,
    pub(crate) resource: &'a Resource,
    pub(crate) options: &'a Options,
}

impl Writer<'_> {
    /// Stores a new object. `name` is that of the URL, which has none for most creations.
    pub(crate) async fn create(
        &self,
        namespace: Option<&str>,
        name: Option<&str>,
        mut object: Value,
        warnings: &mut Warnings,
    ) -> Result<Arc<Value>, ApiError> {
        let resource = self.resource;
        self.check_fields(&mut object, warnings)?;
        if object["metadata"]["resourceVersion"].as_str().is_some_and(|rv| !rv.is_empty()) {
            return Err(ApiError::bad_request(
                "resourceVersion should not be set on objects to be created",
            ));
        }
        self.place_in_namespace(&mut object, namespace)?;
        if let Some(name) = name {
            expect_same(&object, "name", name)?;
            object["metadata"]["name"] = name.into();
        }
        self.api.check_namespace(resource, namespace).await?;

        let given = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let prefix = object["metadata"]["generateName"].as_str().unwrap_or_default().to_owned();
        let attempts = if given.is_empty() && !prefix.is_empty() { NAMES_MAX } else { 1 };
        let mut outcome = Err(ApiError::already_exists(&resource.group, &resource.plural, &prefix));
        for _ in 0..attempts {
            let mut object = object.clone();
            if given.is_empty() && !prefix.is_empty() {
                object["metadata"]["name"] = generated_name(&prefix).into();
            }
            outcome = self.create_named(namespace, object).await;
            match &outcome {
                Err(error) if error.reason == "AlreadyExists" => {}
                _ => break,
            }
        }
        outcome
    }

    async fn create_named(
        &self,
        namespace: Option<&str>,
        object: Value,
    ) -> Result<Arc<Value>, ApiError> {
        let resource = self.resource;
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            let error = FieldError {
                field: "metadata.name".into(),
                reason: "FieldValueRequired",
                message: "Required value: name or generateName is required".into(),
            };
            return Err(ApiError::invalid(&resource.group, &resource.kind, "", &[error]));
        }
        let key = key(resource, namespace, name);
        self.store_new(key, object, &now(), false).await
    }

    /// Completes and stores an object that does not exist yet. `owned` says that its field ownership is written
    /// already (server-side apply).
    async fn store_new(
        &self,
        key: Key,
        mut object: Value,
        now: &str,
        owned: bool,
    ) -> Result<Arc<Value>, ApiError> {
        let resource = self.resource;
        if let Some(metadata) = object["metadata"].as_object_mut() {
            for field in [
                "selfLink",
                "deletionTimestamp",
                "deletionGracePeriodSeconds",
                "resourceVersion",
                "generation",
            ] {
                metadata.remove(field);
            }
            metadata.insert("uid".into(), uuid::Uuid::new_v4().to_string().into());
            metadata.insert("creationTimestamp".into(), now.into());
        }
        // A node registers with its status; every other kind begins without one.
        let begins_without =
            resource.has_status && !(resource.group.is_empty() && &*resource.kind == "Node");
        if begins_without && let Some(map) = object.as_object_mut() {
            map.remove("status");
        }
        // Held from here to the commit when the kind draws addresses from a pool.
        let _addresses = match kinds::draws_addresses(resource, &object) {
            true => Some(self.api.addresses.lock().await),
            false => None,
        };
        self.default(&mut object);
        if has_generation(resource, &object) {
            object["metadata"]["generation"] = 1.into();
        }
        kinds::before_create(self.api, self.catalog, resource, &mut object).await?;
        self.validate(&object, None)?;
        if !owned {
            self.record(None, &mut object, "", now);
        }
        self.put(key, None, object, self.options.dry_run).await
    }

    async fn replace(
        &self,
        key: &Key,
        object: Value,
        subresource: &str,
        warnings: &mut Warnings,
    ) -> Result<Written, ApiError> {
        let mut object = object;
        self.check_fields(&mut object, warnings)?;
        expect_same(&object, "name", &key.name)?;
        let namespace = self.resource.namespaced.then_some(key.namespace.as_str());
        self.place_in_namespace(&mut object, namespace)?;
        object["metadata"]["name"] = key.name.as_str().into();
        let revision = object["metadata"]["resourceVersion"].as_str().unwrap_or_default();
        let insists = !revision.is_empty();
        if !insists && subresource.is_empty() && kinds::needs_revision(self.resource) {
            let error = FieldError {
                field: "metadata.resourceVersion".into(),
                reason: "FieldValueInvalid",
                message: "Invalid value: 0: must be specified for an update".into(),
            };
            let Resource { group, kind, .. } = self.resource;
            return Err(ApiError::invalid(group, kind, &key.name, &[error]));
        }
        let object = self.modify(key, subresource, !insists, |_| Ok(object.clone())).await?;
        Ok(Written { object, created: false })
    }

    async fn patch(
        &self,
        key: &Key,
        kind: PatchType,
        patch: &Value,
        subresource: &str,
        warnings: &mut Warnings,
    ) -> Result<Written, ApiError> {
        if kind == PatchType::Apply {
            return self.apply(key, patch, subresource).await;
        }
        if self.options.force {
            return Err(invalid_option(
                "force",
                "Forbidden: may not be specified for non-apply patch",
            ));
        }
        let resource = self.resource;
        if kind == PatchType::Strategic && resource.custom {
            return Err(ApiError::unsupported_media_type(
                "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
            ));
        }
        let insists = patch.pointer("/metadata/resourceVersion").is_some_and(Value::is_string);
        let mut first = true;
        let object = self
            .modify(key, subresource, !insists, |live| {
                let mut new = match kind {
                    PatchType::Json => patch::json_patch(live, patch)?,
                    PatchType::Merge => patch::merge_patch(live, patch),
                    PatchType::Strategic => patch::strategic_merge(
                        live,
                        patch,
                        &resource.schema,
                        self.catalog.schemas(),
                    )?,
                    PatchType::Apply => unreachable!("apply patches were taken out above"),
                };
                body::expect_kind(&mut new, resource)?;
                let mut ignored = Warnings::new();
                let noted = if first { &mut *warnings } else { &mut ignored };
                self.check_fields(&mut new, noted)?;
                first = false;
                Ok(new)
            })
            .await?;
        Ok(Written { object, created: false })
    }

    async fn apply(
        &self,
        key: &Key,
        config: &Value,
        subresource: &str,
    ) -> Result<Written, ApiError> {
        let resource = self.resource;
        if !self.options.named {
            let message = "Required value: is required for apply patch";
            return Err(invalid_option("fieldManager", message));
        }
        let mut config = config.clone();
        if config["apiVersion"].is_null() || config["kind"].is_null() {
            return Err(ApiError::bad_request("apiVersion and kind must be set in an apply patch"));
        }
        body::expect_kind(&mut config, resource)?;
        expect_same(&config, "name", &key.name)?;
        let namespace = resource.namespaced.then_some(key.namespace.as_str());
        self.place_in_namespace(&mut config, namespace)?;
        config["metadata"]["name"] = key.name.as_str().into();
        if config["metadata"].get("managedFields").is_some_and(|fields| !fields.is_null()) {
            return Err(ApiError::bad_request("metadata.managedFields must be nil"));
        }
        let unknown = structural::unknown_fields(&config, &resource.schema, self.catalog.schemas());
        if let Some(field) = unknown.first() {
            // Kubernetes refuses these whatever `fieldValidation` says: they cannot be owned.
            return Err(ApiError::bad_request(format!(
                "failed to create typed patch object ({}/{}; {}, Kind={}): .{field}: field not declared in schema",
                key.namespace,
                key.name,
                resource.api_version(),
                resource.kind
            )));
        }
        for _ in 0..ATTEMPTS_MAX {
            let found = self.api.store.get(key).await.map_err(store_failed)?;
            let now = now();
            let actor = Actor {
                manager: &self.options.manager,
                api_version: &resource.api_version(),
                subresource,
                has_status: resource.has_status,
                now: &now,
            };
            let Some(stored) = found else {
                if !subresource.is_empty() {
                    return Err(ApiError::not_found(&resource.group, &resource.plural, &key.name));
                }
                match self.create_applied(key, &config, &actor).await {
                    Err(error) if error.reason == "AlreadyExists" => continue,
                    outcome => {
                        return outcome.map(|object| Written { object, created: true });
                    }
                }
            };
            let live = shape::served(resource, stored.clone());
            if let Some(uid) = config["metadata"]["uid"].as_str()
                && live["metadata"]["uid"] != uid
            {
                let why = uid_differs(uid, &live);
                return Err(ApiError::conflict(&resource.group, &resource.plural, &key.name, &why));
            }
            let applied = ownership::apply(
                Some(&live),
                &config,
                &resource.schema,
                self.catalog.schemas(),
                &actor,
                self.options.force,
            );
            let new = applied.map_err(|error| {
                error.to_api_error(&resource.group, &resource.plural, &key.name)
            })?;
            let insists = config["metadata"]["resourceVersion"].is_string();
            match self.settle(key, stored, live, new, subresource, true).await {
                Err(Unsettled::Conflict) if !insists => continue,
                outcome => {
                    let object = outcome.map_err(|error| error.into_api(resource, key))?;
                    return Ok(Written { object, created: false });
                }
            }
        }
        Err(Unsettled::Conflict.into_api(resource, key))
    }

    async fn create_applied(
        &self,
        key: &Key,
        config: &Value,
        actor: &Actor<'_>,
    ) -> Result<Arc<Value>, ApiError> {
        let resource = self.resource;
        if config["metadata"]["uid"].is_string() {
            let why =
                "uid mismatch: the provided object specified uid, and no existing object was found";
            return Err(ApiError::conflict(&resource.group, &resource.plural, &key.name, why));
        }
        let namespace = resource.namespaced.then_some(key.namespace.as_str());
        self.api.check_namespace(resource, namespace).await?;
        let object = ownership::apply(
            None,
            config,
            &resource.schema,
            self.catalog.schemas(),
            actor,
            self.options.force,
        )
        .map_err(|error| error.to_api_error(&resource.group, &resource.plural, &key.name))?;
        self.store_new(key.clone(), object, actor.now, true).await
    }

    /// Changes a stored object by `change`, which gets the live object and returns the wanted one; with `again`, a
    /// write in between makes it run on the newer state.
    pub(crate) async fn modify(
        &self,
        key: &Key,
        subresource: &str,
        again: bool,
        mut change: impl FnMut(&Value) -> Result<Value, ApiError>,
    ) -> Result<Arc<Value>, ApiError> {
        for _ in 0..ATTEMPTS_MAX {
            let stored = self.api.get_stored(self.resource, key).await?;
            let live = shape::served(self.resource, stored.clone());
            let new = change(&live)?;
            match self.settle(key, stored, live, new, subresource, false).await {
                Err(Unsettled::Conflict) if again => {}
                outcome => return outcome.map_err(|error| error.into_api(self.resource, key)),
            }
        }
        Err(Unsettled::Conflict.into_api(self.resource, key))
    }

    /// Makes `new` a proper successor of `live` and stores it.
    ///
    /// `subresource` is `status` (or `approval`) for writes to the status, another name for the server's own writes to the whole
    /// object, empty for the main path. `owned` says that field ownership is settled already (server-side apply).
    async fn settle(
        &self,
        key: &Key,
        stored: Value,
        live: Value,
        mut new: Value,
        subresource: &str,
        owned: bool,
    ) -> Result<Arc<Value>, Unsettled> {
        let resource = self.resource;
        let now = now();
        let revision = new["metadata"]["resourceVersion"].as_str().unwrap_or_default();
        if !revision.is_empty() && live["metadata"]["resourceVersion"] != revision {
            return Err(Unsettled::Conflict);
        }
        if let Some(uid) = new["metadata"]["uid"].as_str().filter(|uid| !uid.is_empty())
            && live["metadata"]["uid"] != uid
        {
            let why = uid_differs(uid, &live);
            let Resource { group, plural, .. } = resource;
            return Err(ApiError::conflict(group, plural, &key.name, &why).into());
        }
        expect_same(&new, "name", &key.name)?;
        if resource.namespaced {
            expect_same(&new, "namespace", &key.namespace)?;
        }

        if matches!(subresource, "status" | "approval") {
            let mut whole = live.clone();
            copy_field(&new, &mut whole, "status");
            whole["metadata"]["managedFields"] = new["metadata"]["managedFields"].take();
            if whole["metadata"]["managedFields"].is_null()
                && let Some(metadata) = whole["metadata"].as_object_mut()
            {
                metadata.remove("managedFields");
            }
            new = whole;
        } else if subresource.is_empty() && resource.has_status {
            copy_field(&live, &mut new, "status");
        }
        for field in [
            "name",
            "namespace",
            "uid",
            "creationTimestamp",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "generation",
            "resourceVersion",
            "selfLink",
        ] {
            copy_field(&live["metadata"], &mut new["metadata"], field);
        }
        self.default(&mut new);
        kinds::before_update(self.api, self.catalog, resource, &live, &mut new, subresource)
            .await?;
        if live["metadata"]["deletionTimestamp"].is_string() {
            refuse_new_finalizers(resource, &key.name, &live, &new)?;
        }
        if live["metadata"]["generation"].is_number() && differs_in_spec(&live, &new) {
            let generation = live["metadata"]["generation"].as_i64().unwrap_or_default() + 1;
            new["metadata"]["generation"] = generation.into();
        }
        if subresource == "binding" {
            // The one write that may set the node of a pod.
            let mut bound = live.clone();
            bound["spec"]["nodeName"] = new["spec"]["nodeName"].clone();
            self.validate(&new, Some(&bound))?;
        } else {
            self.validate(&new, Some(&live))?;
        }

        if !owned {
            self.record(Some(&live), &mut new, subresource, &now);
        }
        if live == new {
            return Ok(Arc::new(stored));
        }

        let written = if is_done(&new) {
            self.remove(key.clone(), stored, new).await?
        } else {
            self.store(key.clone(), Some(stored), new, self.options.dry_run).await?
        };
        Ok(written)
    }

    /// Removes an object whose last finalizer is gone; `last` is its final state.
    async fn remove(&self, key: Key, stored: Value, last: Value) -> Result<Arc<Value>, Unsettled> {
        if self.options.dry_run {
            return Ok(Arc::new(last));
        }
        let write = Write { key, seen: Some(Arc::new(stored)), object: None, expires: None };
        self.api.store.write(write).await?;
        kinds::after_write(self.api, self.resource).await?;
        Ok(Arc::new(last))
    }

    async fn put(
        &self,
        key: Key,
        seen: Option<Value>,
        object: Value,
        dry_run: bool,
    ) -> Result<Arc<Value>, ApiError> {
        let Resource { group, plural, .. } = self.resource;
        if dry_run && seen.is_none() {
            let taken = self.api.store.get(&key).await.map_err(store_failed)?.is_some();
            if taken {
                return Err(ApiError::already_exists(group, plural, &key.name));
            }
        }
        let name = key.name.clone();
        self.store(key, seen, object, dry_run).await.map_err(|error| match error {
            Unsettled::Conflict => ApiError::already_exists(group, plural, &name),
            Unsettled::Failed(error) => error,
        })
    }

    async fn store(
        &self,
        key: Key,
        seen: Option<Value>,
        mut object: Value,
        dry_run: bool,
    ) -> Result<Arc<Value>, Unsettled> {
        if self.resource.stored_in_core {
            object = events::to_core(object);
        }
        if dry_run {
            return Ok(Arc::new(object));
        }
        let size = object.to_string().len();
        if size > OBJECT_MAX {
            let message = format!("object of {size} bytes is larger than {OBJECT_MAX} bytes");
            return Err(ApiError::new(413, "RequestEntityTooLarge", message).into());
        }
        let (group, plural) = place(self.resource);
        let expires = kinds::lifetime(&group, &plural)
            .map(|life| jiff::Timestamp::now().as_second() + life.as_secs().cast_signed());
        let write = Write { key, seen: seen.map(Arc::new), object: Some(object), expires };
        let written = self.api.store.write(write).await?;
        kinds::after_write(self.api, self.resource).await?;
        Ok(written)
    }

    /// Finds, reports and drops fields that the kind does not have.
    fn check_fields(&self, object: &mut Value, warnings: &mut Warnings) -> Result<(), ApiError> {
        let Resource { schema, kind, version, .. } = self.resource;
        let schemas = self.catalog.schemas();
        let unknown = structural::unknown_fields(object, schema, schemas);
        if unknown.is_empty() {
            return Ok(());
        }
        match self.options.unknown {
            Unknown::Ignore => {}
            Unknown::Warn => {
                warnings.extend(unknown.iter().map(|field| format!("unknown field \"{field}\"")));
            }
            Unknown::Refuse => {
                let fields: Vec<String> =
                    unknown.iter().map(|field| format!("unknown field \"{field}\"")).collect();
                return Err(ApiError::bad_request(format!(
                    "{kind} in version \"{version}\" cannot be handled as a {kind}: strict decoding error: {}",
                    fields.join(", ")
                )));
            }
        }
        structural::prune(object, schema, schemas);
        Ok(())
    }

    fn default(&self, object: &mut Value) {
        if self.resource.custom {
            structural::default(object, &self.resource.schema, self.catalog.schemas());
        } else {
            defaults::apply(self.resource, object);
        }
    }

    fn validate(&self, object: &Value, old: Option<&Value>) -> Result<(), ApiError> {
        let Resource { group, kind, schema, .. } = self.resource;
        let mut errors = structural::validate(object, schema, self.catalog.schemas());
        if errors.is_empty() {
            errors = validation::validate(self.resource, object, old);
        }
        if errors.is_empty() {
            return Ok(());
        }
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        Err(ApiError::invalid(group, kind, name, &errors))
    }

    fn record(&self, live: Option<&Value>, new: &mut Value, subresource: &str, now: &str) {
        let actor = Actor {
            manager: &self.options.manager,
            api_version: &self.resource.api_version(),
            subresource: if subresource == "status" { "status" } else { "" },
            has_status: self.resource.has_status,
            now,
        };
        ownership::record_update(live, new, &self.resource.schema, self.catalog.schemas(), &actor);
    }

    /// Checks the body's namespace against the URL's and fills it in.
    fn place_in_namespace(
        &self,
        object: &mut Value,
        namespace: Option<&str>,
    ) -> Result<(), ApiError> {
        match namespace {
            Some(namespace) => {
                expect_same(object, "namespace", namespace)?;
                object["metadata"]["namespace"] = namespace.into();
            }
            None => {
                if let Some(metadata) = object["metadata"].as_object_mut() {
                    metadata.remove("namespace");
                }
            }
        }
        Ok(())
    }
}

impl Api {
    /// Refuses a creation in a namespace that is missing or going away.
    async fn check_namespace(
        &self,
        resource: &Resource,
        namespace: Option<&str>,
    ) -> Result<(), ApiError> {
        let Some(namespace) = namespace else { return Ok(()) };
        let found = self.store.get(&namespace_key(namespace)).await.map_err(store_failed)?;
        let Some(found) = found else {
            return Err(ApiError::not_found("", "namespaces", namespace));
        };
        if found["metadata"]["deletionTimestamp"].is_null() {
            return Ok(());
        }
        let why = format!(
            "unable to create new content in namespace {namespace} because it is being terminated"
        );
        let mut error = ApiError::forbidden(&resource.group, &resource.plural, "", &why);
        error.details = Some(Box::new(json!({
            "kind": &*resource.plural,
            "causes": [{
                "reason": "NamespaceTerminating", "field": "metadata.namespace",
                "message": format!("namespace {namespace} is being terminated"),
            }],
        })));
        Err(error)
    }
}

/// Why a change was not stored.
#[derive(Debug)]
enum Unsettled {
    /// Somebody else has written since the live object was read.
    Conflict,
    Failed(ApiError),
}

impl Unsettled {
    fn into_api(self, resource: &Resource, key: &Key) -> ApiError {
        match self {
            Self::Conflict => ApiError::conflict(
                &resource.group,
                &resource.plural,
                &key.name,
                "the object has been modified; please apply your changes to the latest version and try again",
            ),
            Self::Failed(error) => error,
        }
    }
}

impl From<ApiError> for Unsettled {
    fn from(error: ApiError) -> Self {
        Self::Failed(error)
    }
}

impl From<StoreError> for Unsettled {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict { .. } => Self::Conflict,
            error => Self::Failed(store_failed(error)),
        }
    }
}

pub(crate) fn namespace_key(name: &str) -> Key {
    Key {
        group: "".into(),
        resource: "namespaces".into(),
        namespace: String::new(),
        name: name.into(),
    }
}

/// Now, as objects show it: RFC 3339 in whole seconds.
pub(crate) fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Whether an object that is being deleted has nothing left to wait for.
pub(crate) fn is_done(object: &Value) -> bool {
    let metadata = &object["metadata"];
    metadata["deletionTimestamp"].is_string()
        && metadata["finalizers"].as_array().is_none_or(Vec::is_empty)
        && metadata["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
        && !(object["kind"] == "Namespace"
            && object["spec"]["finalizers"].as_array().is_some_and(|list| !list.is_empty()))
}

/// Kinds with a spec count its versions; so do custom resources.
fn has_generation(resource: &Resource, object: &Value) -> bool {
    resource.custom
        || (object["spec"].is_object()
            && !matches!(
                (&*resource.group, &*resource.plural),
                (
                    "",
                    "nodes"
                        | "namespaces"
                        | "services"
                        | "persistentvolumes"
                        | "persistentvolumeclaims"
                ) | ("coordination.k8s.io", "leases")
            ))
}

fn differs_in_spec(live: &Value, new: &Value) -> bool {
    let (Some(live), Some(new)) = (live.as_object(), new.as_object()) else { return false };
    let keys: BTreeSet<&String> = live.keys().chain(new.keys()).collect();
    keys.into_iter()
        .filter(|key| !matches!(key.as_str(), "metadata" | "status" | "apiVersion" | "kind"))
        .any(|key| live.get(key) != new.get(key))
}

fn refuse_new_finalizers(
    resource: &Resource,
    name: &str,
    live: &Value,
    new: &Value,
) -> Result<(), ApiError> {
    let list = |object: &Value| -> BTreeSet<String> {
        let list = object["metadata"]["finalizers"].as_array();
        list.into_iter().flatten().filter_map(|one| one.as_str().map(str::to_owned)).collect()
    };
    let added: Vec<String> = list(new).difference(&list(live)).cloned().collect();
    if added.is_empty() {
        return Ok(());
    }
    let error = FieldError {
        field: "metadata.finalizers".into(),
        reason: "FieldValueForbidden",
        message: format!(
            "Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers {added:?}"
        ),
    };
    Err(ApiError::invalid(&resource.group, &resource.kind, name, &[error]))
}

/// Makes `to`'s field what it is in `from`, absent included.
fn copy_field(from: &Value, to: &mut Value, field: &str) {
    match from.get(field) {
        Some(value) => to[field] = value.clone(),
        None => {
            if let Some(map) = to.as_object_mut() {
                map.remove(field);
            }
        }
    }
}

/// Refuses a body that names another object than the URL.
fn expect_same(object: &Value, field: &str, expected: &str) -> Result<(), ApiError> {
    match object["metadata"][field].as_str() {
        None | Some("") => Ok(()),
        Some(found) if found == expected => Ok(()),
        Some(found) if field == "namespace" => Err(ApiError::bad_request(format!(
            "the namespace of the provided object does not match the namespace sent on the request: `{found}`, `{expected}`"
        ))),
        Some(found) => Err(ApiError::bad_request(format!(
            "the name of the object ({found}) does not match the name on the URL ({expected})"
        ))),
    }
}

fn uid_differs(uid: &str, live: &Value) -> String {
    let found = live["metadata"]["uid"].as_str().unwrap_or_default();
    format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {found}")
}

fn invalid_option(field: &str, message: &str) -> ApiError {
    let reason = if message.starts_with("Unsupported") {
        "FieldValueNotSupported"
    } else if message.starts_with("Forbidden") {
        "FieldValueForbidden"
    } else if message.starts_with("Required") {
        "FieldValueRequired"
    } else {
        "FieldValueInvalid"
    };
    let error = FieldError { field: field.into(), reason, message: message.into() };
    ApiError::invalid("meta.k8s.io", "PatchOptions", "", &[error])
}

fn generated_name(prefix: &str) -> String {
    let mut end = prefix.len().min(NAME_PREFIX_MAX);
    while !prefix.is_char_boundary(end) {
        end -= 1;
    }
    let mut name = prefix[..end].to_owned();
    let mut random = rand::rng();
    for _ in 0..NAME_SUFFIX {
        name.push(NAME_CHARACTERS[random.random_range(0..NAME_CHARACTERS.len())].into());
    }
    name
}
