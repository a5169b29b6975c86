//! The bodies of answers, with the keys in the order in which a Go peer writes them.
//!
//! Source: kubeedge/kubeedge, common/types/types.go (`ObjectResp`); kubernetes/apimachinery, `metav1.Status` and
//! `errors.StatusError`, as seen in `protocol/golden/session.jsonl`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A failure as the Kubernetes API describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Always an empty object.
    #[serde(default)]
    metadata: Empty,
    /// Always `Failure`.
    #[serde(default = "failure")]
    status: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// For programs, such as `NotFound`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// What it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Details>,
    /// HTTP status.
    #[serde(default)]
    pub code: u16,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Empty {}

fn failure() -> String {
    "Failure".into()
}

/// `details` of a [`Status`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Details {
    /// Name of the object.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Its API group; empty for the core group.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// Its kind, or the plural, depending on who writes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// Its uid.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// One entry per field that is wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
    /// When to try again, in seconds; 0 when not said.
    #[serde(default, rename = "retryAfterSeconds", skip_serializing_if = "is_zero")]
    pub retry_after_seconds: u32,
}

/// One entry of [`Details::causes`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// For programs.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Path of the field.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub field: String,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Status {
    /// A failure without details.
    pub fn new(code: u16, reason: &str, message: impl Into<String>) -> Self {
        Self {
            status: failure(),
            message: message.into(),
            reason: reason.into(),
            code,
            ..Self::default()
        }
    }

    /// Reads the body with which an API refuses; `None` when it is none.
    pub fn read(body: &[u8]) -> Option<Self> {
        let status: Self = serde_json::from_slice(body).ok()?;
        (status.code != 0 || !status.reason.is_empty()).then_some(status)
    }

    /// How a KubeEdge cloud says that an object is not in its cache: with the type token instead of the plural.
    pub fn not_found_in_cache(group: &str, token: &str, name: &str) -> Self {
        let qualified =
            if group.is_empty() { token.to_owned() } else { format!("{token}.{group}") };
        let details = Details {
            name: name.into(),
            group: group.into(),
            kind: token.into(),
            ..Details::default()
        };
        let message = format!("{qualified} \"{name}\" not found");
        Self { details: Some(details), ..Self::new(404, "NotFound", message) }
    }
}

/// A Go API error: `{"ErrStatus": …}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrStatus {
    /// The failure.
    #[serde(rename = "ErrStatus")]
    pub status: Status,
}

/// `ObjectResp`: an edge recognises it only when both keys are there, and takes any `Err` but null and `{}` for a
/// failure.
#[derive(Debug, Serialize)]
pub struct ObjectAnswer<'a> {
    /// The object that came of it.
    #[serde(rename = "Object")]
    pub object: Option<&'a Value>,
    /// Why nothing came of it.
    #[serde(rename = "Err")]
    pub err: Option<ErrStatus>,
}

/// `metadata.resourceVersion`; empty when the object has none.
pub fn version(object: &Value) -> &str {
    object["metadata"]["resourceVersion"].as_str().unwrap_or_default()
}

/// Takes `kind` and `apiVersion` away, as Go's typed clients do with the objects that they return.
pub fn without_type(mut object: Value) -> Value {
    if let Some(fields) = object.as_object_mut() {
        fields.remove("kind");
        fields.remove("apiVersion");
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_failure_is_written_as_go_writes_it() {
        let status = Status::not_found_in_cache("coordination.k8s.io", "lease", "edge1");
        let answer = ObjectAnswer { object: None, err: Some(ErrStatus { status }) };
        // From the golden session.
        let expected = r#"{"Object":null,"Err":{"ErrStatus":{"metadata":{},"status":"Failure","message":"lease.coordination.k8s.io \"edge1\" not found","reason":"NotFound","details":{"name":"edge1","group":"coordination.k8s.io","kind":"lease"},"code":404}}}"#;
        assert_eq!(serde_json::to_string(&answer).expect("json"), expected);
    }

    #[test]
    fn success_has_both_keys() {
        let object = json!({"metadata": {"resourceVersion": "7"}});
        let answer = ObjectAnswer { object: Some(&object), err: None };
        let expected = r#"{"Object":{"metadata":{"resourceVersion":"7"}},"Err":null}"#;
        assert_eq!(serde_json::to_string(&answer).expect("json"), expected);
        assert_eq!(version(&object), "7");
    }

    #[test]
    fn what_an_api_says_is_kept_and_what_is_no_status_is_not_taken_for_one() {
        let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": "m", "reason": "Invalid", "code": 422,
            "details": {"name": "n", "causes": [{"reason": "r", "field": "f"}], "retryAfterSeconds": 3}});
        let status = Status::read(body.to_string().as_bytes()).expect("a status");
        let expected = r#"{"metadata":{},"status":"Failure","message":"m","reason":"Invalid","details":{"name":"n","causes":[{"reason":"r","field":"f"}],"retryAfterSeconds":3},"code":422}"#;
        assert_eq!(serde_json::to_string(&status).expect("json"), expected);
        for body in ["", "no such host", "{}", "[]", "<html>"] {
            assert_eq!(Status::read(body.as_bytes()), None, "{body}");
        }
    }
}
