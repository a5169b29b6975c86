//! The answer to a request that failed: `v1 Status`, with the codes, reasons and causes that clients act on.

use serde_json::{Value, json};

/// What is wrong with one field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// Path such as `spec.containers[0].image`.
    pub field: String,
    /// `FieldValueRequired`, `FieldValueInvalid`, `FieldValueDuplicate`, `FieldValueForbidden`,
    /// `FieldValueNotSupported`, `FieldValueTooLong`, `FieldValueTypeInvalid`, ….
    pub reason: &'static str,
    /// The whole text without the field, such as `Required value: must be set`.
    pub message: String,
}

/// A failed request.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status code.
    pub code: u16,
    /// Machine-readable reason, such as `NotFound`.
    pub reason: &'static str,
    /// For a person.
    pub message: String,
    /// `details` of the Status, if any.
    pub details: Option<Box<Value>>,
    /// `metadata.continue`, with which the rest of an expired list can still be read.
    pub continue_token: Option<String>,
}

impl ApiError {
    /// Any error without details.
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: None, continue_token: None }
    }

    /// 400 BadRequest.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 500 InternalError.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "InternalError", message)
    }

    /// 404 for one object; `group` is empty for the core group, `resource` is the plural.
    pub fn not_found(group: &str, resource: &str, name: &str) -> Self {
        let full = qualified(group, resource);
        Self {
            details: Some(Box::new(details(group, resource, name))),
            ..Self::new(404, "NotFound", format!("{full} \"{name}\" not found"))
        }
    }

    /// 409 on create.
    pub fn already_exists(group: &str, resource: &str, name: &str) -> Self {
        let full = qualified(group, resource);
        Self {
            details: Some(Box::new(details(group, resource, name))),
            ..Self::new(409, "AlreadyExists", format!("{full} \"{name}\" already exists"))
        }
    }

    /// 409 on a stale resourceVersion or a failed precondition.
    pub fn conflict(group: &str, resource: &str, name: &str, why: &str) -> Self {
        let full = qualified(group, resource);
        Self {
            details: Some(Box::new(details(group, resource, name))),
            ..Self::new(
                409,
                "Conflict",
                format!("Operation cannot be fulfilled on {full} \"{name}\": {why}"),
            )
        }
    }

    /// 401: no credentials, or none that are known here.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 403; `why` says who may not do what.
    pub fn forbidden(group: &str, resource: &str, name: &str, why: &str) -> Self {
        let full = qualified(group, resource);
        let object = if name.is_empty() { full } else { format!("{full} \"{name}\"") };
        Self {
            details: Some(Box::new(details(group, resource, name))),
            ..Self::new(403, "Forbidden", format!("{object} is forbidden: {why}"))
        }
    }

    /// 404 for a path that leads nowhere.
    pub fn unknown_path() -> Self {
        Self {
            details: Some(Box::new(json!({}))),
            ..Self::new(404, "NotFound", "the server could not find the requested resource")
        }
    }

    /// 405; the resource exists, the verb does not.
    pub fn method_not_allowed(verb: &str) -> Self {
        let message =
            format!("the server does not allow this method on the requested resource: {verb}");
        Self::new(405, "MethodNotAllowed", message)
    }

    /// 406: none of the types in `Accept` can be produced.
    pub fn not_acceptable(accepted: &str) -> Self {
        let message = format!("only the following media types are accepted: {accepted}");
        Self::new(406, "NotAcceptable", message)
    }

    /// 410 on a watch or a page of a list whose revision is no longer kept.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 413; `max` in bytes.
    pub fn too_large(max: usize) -> Self {
        let message = format!("request body is larger than {max} bytes");
        Self::new(413, "RequestEntityTooLarge", message)
    }

    /// 415; `supported` lists the media types that can be read.
    pub fn unsupported_media_type(supported: &str) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {supported}"
        );
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 501: Kubernetes has it, this server does not yet.
    pub fn not_yet(what: &str) -> Self {
        Self::new(501, "NotImplemented", format!("{what}: not yet supported by this server"))
    }

    /// 504 for a resourceVersion from the future.
    pub fn revision_too_large(wanted: i64, current: i64) -> Self {
        Self {
            details: Some(Box::new(json!({
                "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
                "retryAfterSeconds": 1,
            }))),
            ..Self::new(
                504,
                "Timeout",
                format!("Too large resource version: {wanted}, current: {current}"),
            )
        }
    }

    /// 422 with one cause per field; `kind` is the object's kind.
    pub fn invalid(group: &str, kind: &str, name: &str, errors: &[FieldError]) -> Self {
        let texts: Vec<String> =
            errors.iter().map(|error| format!("{}: {}", error.field, error.message)).collect();
        let text = match texts.as_slice() {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let full = qualified(group, kind);
        let causes: Vec<Value> = errors
            .iter()
            .map(|error| {
                json!({"reason": error.reason, "message": error.message, "field": error.field})
            })
            .collect();
        let mut details = details(group, kind, name);
        details["causes"] = causes.into();
        Self {
            details: Some(Box::new(details)),
            ..Self::new(422, "Invalid", format!("{full} \"{name}\" is invalid: {text}"))
        }
    }

    /// The `v1 Status` object of this error.
    pub fn to_status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {},
            "status": "Failure", "message": self.message, "reason": self.reason, "code": self.code,
        });
        if let Some(details) = &self.details {
            status["details"] = (**details).clone();
        }
        if let Some(token) = &self.continue_token {
            status["metadata"]["continue"] = token.as_str().into();
        }
        status
    }
}

/// `deployments.apps`, or `pods` in the core group.
fn qualified(group: &str, resource: &str) -> String {
    if group.is_empty() { resource.into() } else { format!("{resource}.{group}") }
}

fn details(group: &str, kind: &str, name: &str) -> Value {
    let mut details = json!({"kind": kind});
    if !name.is_empty() {
        details["name"] = name.into();
    }
    if !group.is_empty() {
        details["group"] = group.into();
    }
    details
}
