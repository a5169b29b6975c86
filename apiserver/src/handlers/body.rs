//! From the bytes of a request to an object.

use crate::http::Call;
use serde_json::Value;
use skerry_apiserver_core::catalog::Resource;
use skerry_apiserver_core::protobuf;
use skerry_apiserver_core::status::ApiError;

const READ: &str = "application/json, application/yaml, application/vnd.kubernetes.protobuf";
const READ_PATCH: &str = "application/json-patch+json, application/merge-patch+json, \
     application/strategic-merge-patch+json, application/apply-patch+yaml";

/// Deepest nesting of a YAML body; the reader needs up to 20 KiB of stack for each level. Schemas of definitions nest
/// to about 40.
const YAML_DEPTH_MAX: usize = 64;

/// How a PATCH changes an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PatchType {
    Json,
    Merge,
    Strategic,
    Apply,
}

/// Reads the object in a request's body; an empty body is `Null`.
pub(crate) fn read(call: &Call) -> Result<Value, ApiError> {
    if call.body.is_empty() {
        return Ok(Value::Null);
    }
    match call.content_type() {
        // Some clients send no type, or the one of forms, with JSON.
        "application/json" | "" | "*/*" => json(&call.body),
        "application/yaml" | "application/x-yaml" | "text/yaml" => yaml(&call.body),
        "application/vnd.kubernetes.protobuf" => protobuf::decode(&call.body),
        _ => Err(ApiError::unsupported_media_type(READ)),
    }
}

/// Reads a patch and its type.
pub(crate) fn read_patch(call: &Call) -> Result<(PatchType, Value), ApiError> {
    let kind = match call.content_type() {
        "application/json-patch+json" => PatchType::Json,
        "application/merge-patch+json" => PatchType::Merge,
        "application/strategic-merge-patch+json" => PatchType::Strategic,
        "application/apply-patch+yaml" | "application/apply-patch+json" => PatchType::Apply,
        _ => return Err(ApiError::unsupported_media_type(READ_PATCH)),
    };
    // An apply patch is YAML by its name and JSON in nearly every request.
    let patch = match (kind, json(&call.body)) {
        (PatchType::Apply, Err(_)) => yaml(&call.body)?,
        (_, patch) => patch?,
    };
    Ok((kind, patch))
}

/// Checks that `object` is of the kind that the URL names, and fills in apiVersion and kind if it says neither.
pub(crate) fn expect_kind(object: &mut Value, resource: &Resource) -> Result<(), ApiError> {
    let api_version = resource.api_version();
    let Some(map) = object.as_object_mut() else {
        return Err(ApiError::bad_request(format!(
            "the body is not an object; expected a {} of {api_version}",
            resource.kind
        )));
    };
    for (field, expected) in [("apiVersion", api_version.as_str()), ("kind", &*resource.kind)] {
        match map.get(field).and_then(Value::as_str).unwrap_or_default() {
            "" => {
                map.insert(field.into(), expected.into());
            }
            found if found == expected => {}
            found => {
                return Err(ApiError::bad_request(match field {
                    "kind" => format!(
                        "{found} in version \"{}\" cannot be handled as a {}: the kind in the data ({found}) does not match the expected kind ({expected})",
                        resource.version, resource.kind
                    ),
                    _ => format!(
                        "the API version in the data ({found}) does not match the expected API version ({expected})"
                    ),
                }));
            }
        }
    }
    match map.get("metadata") {
        None | Some(Value::Null) => {
            map.insert("metadata".into(), Value::Object(<_>::default()));
            Ok(())
        }
        Some(Value::Object(_)) => Ok(()),
        Some(_) => Err(ApiError::bad_request("`metadata` is not an object")),
    }
}

pub(crate) fn json(bytes: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(bytes)
        .map_err(|error| ApiError::bad_request(format!("the body is not valid JSON: {error}")))
}

fn yaml(bytes: &[u8]) -> Result<Value, ApiError> {
    let options = serde_saphyr::options! {
        legacy_octal_numbers: true,
        duplicate_keys: serde_saphyr::options::DuplicateKeyPolicy::LastWins,
        budget: serde_saphyr::budget! { max_depth: YAML_DEPTH_MAX },
    };
    let text = std::str::from_utf8(bytes)
        .map_err(|error| ApiError::bad_request(format!("the body is not UTF-8: {error}")))?;
    let mut value = serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| ApiError::bad_request(format!("the body is not valid YAML: {error}")))?;
    whole_numbers(&mut value);
    Ok(value)
}

/// Makes `1e3` and `2.0` integers, as they are after Go's way from YAML over JSON.
fn whole_numbers(value: &mut Value) {
    /// Above this, floats skip integers.
    const EXACT: f64 = (1_i64 << 53) as f64;
    match value {
        Value::Number(number) if number.is_f64() => {
            let float = number.as_f64().unwrap_or_default();
            if float.fract() == 0.0 && float.abs() < EXACT {
                *value = (float as i64).into();
            }
        }
        Value::Array(items) => items.iter_mut().for_each(whole_numbers),
        Value::Object(fields) => fields.values_mut().for_each(whole_numbers),
        _ => {}
    }
}
