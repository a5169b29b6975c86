//! `get` and `list`.

use super::shape;
use crate::api::{Api, key, place, store_failed};
use crate::http::{Answer, Call};
use crate::route::{Query, Target};
use crate::store::{Range, StoreError};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use skerry_apiserver_core::catalog::Resource;
use skerry_apiserver_core::selector::{FieldSelector, LabelSelector};
use skerry_apiserver_core::status::{ApiError, FieldError};

/// Label and field selector of a request, checked against what the resource allows.
pub(super) struct Selection {
    pub(super) labels: LabelSelector,
    pub(super) fields: FieldSelector,
}

impl Selection {
    pub(super) fn of(query: &Query, resource: &Resource) -> Result<Self, ApiError> {
        let labels = query.get("labelSelector").unwrap_or_default();
        let labels = LabelSelector::parse(labels).map_err(|error| {
            ApiError::bad_request(format!("unable to parse label selector `{labels}`: {error}"))
        })?;
        let fields = query.get("fieldSelector").unwrap_or_default();
        let fields = FieldSelector::parse(fields).map_err(|error| {
            ApiError::bad_request(format!("unable to parse field selector `{fields}`: {error}"))
        })?;
        for requirement in fields.requirements() {
            let path = requirement.path.as_str();
            let known = path == "metadata.name"
                || (path == "metadata.namespace" && resource.namespaced)
                || resource.selectable_fields.iter().any(|field| field == path);
            if !known {
                return Err(ApiError::bad_request(format!(
                    "field label not supported: {path} (for {})",
                    resource.plural
                )));
            }
        }
        Ok(Self { labels, fields })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.requirements().is_empty()
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        let labels = object.pointer("/metadata/labels").and_then(Value::as_object);
        self.labels.matches(labels) && self.fields.matches(object)
    }

    /// The value that `path` must be equal to.
    fn exactly(&self, path: &str) -> Option<String> {
        let requirement =
            self.fields.requirements().iter().find(|one| one.equal && one.path == path)?;
        Some(requirement.value.clone())
    }

    /// The narrowest range of the store that holds every match.
    pub(super) fn range(&self, resource: &Resource, target: &Target) -> Range {
        let (group, plural) = place(resource);
        let namespace = match resource.namespaced {
            true => target.namespace.clone().or_else(|| self.exactly("metadata.namespace")),
            false => Some(String::new()),
        };
        Range {
            name: target.name.clone().or_else(|| self.exactly("metadata.name")),
            ..Range::all(group, plural, namespace)
        }
    }
}

/// The `resourceVersion` parameter: absent, `0` (anything will do) or a revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Newest,
    Any,
    Revision(i64),
}

impl Wanted {
    pub(super) fn of(query: &Query) -> Result<Self, ApiError> {
        match query.get("resourceVersion") {
            None => Ok(Self::Newest),
            Some("0") => Ok(Self::Any),
            Some(text) => match text.parse() {
                Ok(revision) if revision > 0 => Ok(Self::Revision(revision)),
                _ => Err(ApiError::bad_request(format!(
                    "invalid resource version `{text}`: not a positive number"
                ))),
            },
        }
    }
}

impl Api {
    pub(super) async fn get(
        &self,
        call: &Call,
        resource: &Resource,
        target: &Target,
    ) -> Result<Answer, ApiError> {
        let format = call.format()?;
        if let Wanted::Revision(wanted) = Wanted::of(&call.query)? {
            self.not_older_than(wanted)?;
        }
        let name = target.name.as_deref().unwrap_or_default();
        let key = key(resource, target.namespace.as_deref(), name);
        let object = shape::served(resource, self.get_stored(resource, &key).await?);
        Ok(Answer::ok(shape::one(&format, resource, object)))
    }

    pub(super) async fn list(
        &self,
        call: &Call,
        resource: &Resource,
        target: &Target,
    ) -> Result<Answer, ApiError> {
        let format = call.format()?;
        let selection = Selection::of(&call.query, resource)?;
        if call.query.flag("sendInitialEvents") {
            return Err(invalid_options(
                "sendInitialEvents",
                "Forbidden: sendInitialEvents is forbidden for list",
            ));
        }
        let mut range = selection.range(resource, target);
        range.limit = match call.query.get("limit") {
            Some(limit) => limit
                .parse::<usize>()
                .map(|limit| Some(limit).filter(|limit| *limit > 0))
                .map_err(|_| ApiError::bad_request(format!("invalid limit `{limit}`")))?,
            None => None,
        };
        let wanted = Wanted::of(&call.query)?;
        let matching = call.query.get("resourceVersionMatch");
        match (matching, wanted) {
            (Some(_), Wanted::Newest) => {
                return Err(invalid_options(
                    "resourceVersionMatch",
                    "Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided",
                ));
            }
            (Some("Exact"), Wanted::Any) => {
                return Err(invalid_options(
                    "resourceVersionMatch",
                    "Forbidden: resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
                ));
            }
            (None | Some("NotOlderThan" | "Exact"), _) => {}
            (Some(other), _) => {
                return Err(invalid_options(
                    "resourceVersionMatch",
                    &format!(
                        "Unsupported value: \"{other}\": supported values: \"Exact\", \"NotOlderThan\""
                    ),
                ));
            }
        }
        if let Some(token) = call.query.get("continue") {
            if matches!(wanted, Wanted::Revision(_)) {
                return Err(ApiError::bad_request(
                    "specifying resource version is not allowed when using continue",
                ));
            }
            let place = Continue::parse(token)?;
            range.at = place.at;
            range.after = Some(place.after);
        } else if let Wanted::Revision(revision) = wanted {
            let exact = match matching {
                Some(matching) => matching == "Exact",
                None => range.limit.is_some(),
            };
            if exact {
                range.at = Some(revision);
            } else {
                self.not_older_than(revision)?;
            }
        }

        let after = range.after.clone();
        let everything = selection.is_empty();
        let whole = range.name.is_none();
        // Field selectors speak of the served form; only the two forms of events differ from the stored one.
        let converted = resource.stored_in_core.then(|| resource.clone());
        let keep = move |object: &Value| match &converted {
            Some(resource) => selection.matches(&shape::served(resource, object.clone())),
            None => selection.matches(object),
        };
        let listing = match self.store.list(range, keep).await {
            Ok(listing) => listing,
            Err(StoreError::Compacted { .. }) if after.is_some() => {
                return Err(expired_continue(after.unwrap_or_default()));
            }
            Err(error) => return Err(store_failed(error)),
        };
        let mut list = json!({"resourceVersion": listing.revision.to_string()});
        if let Some(next) = listing.next {
            list["continue"] =
                Continue { at: Some(listing.revision), after: next }.to_token().into();
            if everything && whole {
                list["remainingItemCount"] = listing.remaining.into();
            }
        }
        let objects =
            listing.items.into_iter().map(|object| shape::served(resource, object)).collect();
        Ok(Answer::ok(shape::many(&format, resource, objects, list)))
    }

    fn not_older_than(&self, wanted: i64) -> Result<(), ApiError> {
        let current = self.store.current();
        if wanted > current {
            return Err(ApiError::revision_too_large(wanted, current));
        }
        Ok(())
    }
}

/// Where the next page starts.
struct Continue {
    /// Revision of all pages; `None` in a token that was given with a 410: carry on with the newest state.
    at: Option<i64>,
    after: (String, String),
}

impl Continue {
    fn parse(token: &str) -> Result<Self, ApiError> {
        let invalid = || ApiError::bad_request("continue key is not valid");
        let bytes = URL_SAFE_NO_PAD.decode(token.trim_end_matches('=')).map_err(|_| invalid())?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|_| invalid())?;
        let start = value["start"].as_str().ok_or_else(invalid)?;
        let (namespace, name) = start.split_once('/').ok_or_else(invalid)?;
        let at = match value["rv"].as_i64().ok_or_else(invalid)? {
            -1 => None,
            revision if revision > 0 => Some(revision),
            _ => return Err(invalid()),
        };
        if value["v"] != "meta.k8s.io/v1" {
            return Err(invalid());
        }
        Ok(Self { at, after: (namespace.into(), name.into()) })
    }

    fn to_token(&self) -> String {
        let start = format!("{}/{}", self.after.0, self.after.1);
        let revision = self.at.map_or(json!(-1), Value::from);
        let value = json!({"v": "meta.k8s.io/v1", "rv": revision, "start": start});
        URL_SAFE_NO_PAD.encode(value.to_string())
    }
}

fn expired_continue(after: (String, String)) -> ApiError {
    let mut error = ApiError::expired(
        "The provided continue parameter is too old to display a consistent list result. You can start a new list \
         without the continue parameter, or use the continue token in this response to retrieve the remainder of the \
         results. Continuing with the provided token results in an inconsistent list - objects that were created, \
         modified, or deleted between the time the first chunk was returned and now may show up in the list.",
    );
    error.continue_token = Some(Continue { at: None, after }.to_token());
    error
}

pub(super) fn invalid_options(field: &str, message: &str) -> ApiError {
    let reason = if message.starts_with("Unsupported") {
        "FieldValueNotSupported"
    } else {
        "FieldValueForbidden"
    };
    let error = FieldError { field: field.into(), reason, message: message.into() };
    ApiError::invalid("meta.k8s.io", "ListOptions", "", &[error])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continue_token_is_read_back() {
        let token = Continue { at: Some(7), after: ("a".into(), "b".into()) }.to_token();
        let place = Continue::parse(&token).unwrap();
        assert_eq!((place.at, place.after), (Some(7), ("a".into(), "b".into())));
        assert!(Continue::parse("garbage").is_err());
    }
}
