//! JSON patch, JSON merge patch and strategic merge patch.
//!
//! The HTTP layer calls these between reading an object and writing it back; apply patches are in
//! [`crate::ownership`]. Nothing here looks at resourceVersions.
//!
//! Source: RFC 6902, RFC 7386; kubernetes/apimachinery, pkg/util/strategicpatch/patch.go; kubernetes/apiserver,
//! pkg/endpoints/handlers/patch.go.

mod strategic;
#[cfg(test)]
mod tests;

pub use strategic::strategic_merge;

use crate::status::ApiError;
use json_patch::{Patch, PatchOperation};
use serde_json::{Value, json};

/// Most operations of one JSON patch, as upstream.
pub const OPERATIONS_MAX: usize = 10_000;
/// Most bytes that the `copy` operations of one JSON patch may add: without a bound, a few dozen doublings of a
/// small object fill the memory.
pub const COPIED_LEN_MAX: usize = 3 << 20;

/// Applies a JSON patch (RFC 6902).
///
/// # Errors
///
/// 400 when it is no JSON patch, 413 past [`OPERATIONS_MAX`] or [`COPIED_LEN_MAX`], 422 when an operation fails;
/// a failed `test` is such an operation.
pub fn json_patch(live: &Value, patch: &Value) -> Result<Value, ApiError> {
    let Some(operations) = patch.as_array() else {
        return Err(ApiError::bad_request(
            "error decoding patch: a JSON patch must be an array of operations",
        ));
    };
    if operations.len() > OPERATIONS_MAX {
        let text = format!(
            "The allowed maximum operations in a JSON patch is {OPERATIONS_MAX}, got {}",
            operations.len()
        );
        return Err(ApiError::new(413, "RequestEntityTooLarge", text));
    }
    let Patch(operations) = serde_json::from_value(patch.clone())
        .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?;
    let mut out = live.clone();
    let mut copied_len = 0;
    for (at, operation) in operations.into_iter().enumerate() {
        if let PatchOperation::Copy(copy) = &operation
            && let Ok(value) = copy.from.resolve(&out)
        {
            copied_len += text_len(value);
            if copied_len > COPIED_LEN_MAX {
                let text = format!(
                    "the copy operations of a JSON patch add more than {COPIED_LEN_MAX} bytes"
                );
                return Err(ApiError::new(413, "RequestEntityTooLarge", text));
            }
        }
        let verb = verb(&operation);
        let path = operation.path().to_string();
        // One at a time, so that the bound above sees what was copied before.
        json_patch::patch(&mut out, &[operation]).map_err(|error| {
            unprocessable(&format!("operation {at} (`{verb}` `{path}`): {}", error.kind))
        })?;
    }
    Ok(out)
}

/// Applies a JSON merge patch (RFC 7386): objects merge, `null` deletes, all else replaces.
pub fn merge_patch(live: &Value, patch: &Value) -> Value {
    let mut out = live.clone();
    json_patch::merge(&mut out, patch);
    out
}

fn verb(operation: &PatchOperation) -> &'static str {
    match operation {
        PatchOperation::Add(_) => "add",
        PatchOperation::Remove(_) => "remove",
        PatchOperation::Replace(_) => "replace",
        PatchOperation::Move(_) => "move",
        PatchOperation::Copy(_) => "copy",
        PatchOperation::Test(_) => "test",
    }
}

/// A patch that is well formed and cannot be applied to this object. The message is upstream's; what went wrong is
/// in the cause, which clients print.
fn unprocessable(what: &str) -> ApiError {
    let cause = json!({"reason": "UnexpectedServerResponse", "message": what, "field": "patch"});
    ApiError {
        details: Some(Box::new(json!({"causes": [cause]}))),
        ..ApiError::new(
            422,
            "Invalid",
            "the server rejected our request due to an error in our request",
        )
    }
}

/// Roughly the bytes of the value as JSON.
fn text_len(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
        Value::String(text) => text.len() + 8,
        Value::Array(items) => 8 + items.iter().map(text_len).sum::<usize>(),
        Value::Object(object) => {
            8 + object.iter().map(|(name, value)| name.len() + 8 + text_len(value)).sum::<usize>()
        }
    }
}
