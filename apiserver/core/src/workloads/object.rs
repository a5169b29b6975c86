//! Small readers over objects as JSON, shared by all planners: names, labels, owners, conditions, pod states, and the
//! making of a pod from a template.
//!
//! A missing or mistyped field reads as empty: the API validated the object, and a planner must not fail on one.

use crate::selector::LabelSelector;
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// Alphabet of generated name parts: no vowels, so that no words appear.
const NAME_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
/// Length of a template hash: 27^10 is about 2^47, so that two templates of one owner do not meet.
const HASH_LEN: usize = 10;

/// The text at a JSON pointer, or `""`.
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or("")
}

/// The integer at a JSON pointer.
pub fn number(object: &Value, pointer: &str) -> Option<i64> {
    object.pointer(pointer).and_then(Value::as_i64)
}

/// Whether the value at a JSON pointer is `true`.
pub fn flag(object: &Value, pointer: &str) -> bool {
    object.pointer(pointer).and_then(Value::as_bool).unwrap_or(false)
}

/// The elements of the array at a JSON pointer.
pub fn list<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The time at a JSON pointer.
pub fn time(object: &Value, pointer: &str) -> Option<Timestamp> {
    text(object, pointer).parse().ok()
}

/// `metadata.name`.
pub fn name(object: &Value) -> &str {
    text(object, "/metadata/name")
}

/// `metadata.namespace`, empty for cluster-wide objects.
pub fn namespace(object: &Value) -> &str {
    text(object, "/metadata/namespace")
}

/// `metadata.uid`.
pub fn uid(object: &Value) -> &str {
    text(object, "/metadata/uid")
}

/// `metadata.labels`.
pub fn labels(object: &Value) -> Option<&Map<String, Value>> {
    object.pointer("/metadata/labels").and_then(Value::as_object)
}

/// The value of one label.
pub fn label<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    labels(object).and_then(|labels| labels.get(key)).and_then(Value::as_str)
}

/// The value of one annotation.
pub fn annotation<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object.pointer("/metadata/annotations").and_then(|map| map.get(key)).and_then(Value::as_str)
}

/// `metadata.generation`.
pub fn generation(object: &Value) -> i64 {
    number(object, "/metadata/generation").unwrap_or(0)
}

/// `metadata.creationTimestamp`; an object without one counts as created at the epoch.
pub fn created(object: &Value) -> Timestamp {
    time(object, "/metadata/creationTimestamp").unwrap_or(Timestamp::UNIX_EPOCH)
}

/// Whether deletion was asked for.
pub fn is_deleting(object: &Value) -> bool {
    !text(object, "/metadata/deletionTimestamp").is_empty()
}

/// A time as `metav1.Time` is written: UTC, whole seconds.
pub fn stamp(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second()).unwrap_or(time).to_string()
}

/// The owner reference with `controller: true`.
pub fn controller_of(object: &Value) -> Option<&Value> {
    list(object, "/metadata/ownerReferences").iter().find(|owner| flag(owner, "/controller"))
}

/// Whether `owner` controls `object`.
pub fn is_controlled_by(object: &Value, owner: &Value) -> bool {
    controller_of(object).is_some_and(|reference| text(reference, "/uid") == uid(owner))
}

/// The reference that makes `owner` the controller of another object.
pub fn owner_reference(owner: &Value, api_version: &str, kind: &str) -> Value {
    json!({
        "apiVersion": api_version, "kind": kind, "name": name(owner), "uid": uid(owner),
        "controller": true, "blockOwnerDeletion": true,
    })
}

/// The element of `status.conditions` of the given type.
pub fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    list(object, "/status/conditions").iter().find(|condition| text(condition, "/type") == kind)
}

/// Whether a condition of the given type is `True`.
pub fn has_condition(object: &Value, kind: &str) -> bool {
    condition(object, kind).is_some_and(|condition| text(condition, "/status") == "True")
}

/// Sets a condition in a list; `lastTransitionTime` moves only with the status, and a condition with the same status,
/// reason and message is left as it is. Returns whether something changed.
pub fn set_condition(
    conditions: &mut Vec<Value>,
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> bool {
    let mut fresh = json!({
        "type": kind, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": stamp(now),
    });
    let Some(old) = conditions.iter_mut().find(|old| text(old, "/type") == kind) else {
        conditions.push(fresh);
        return true;
    };
    if text(old, "/status") == status {
        if text(old, "/reason") == reason && text(old, "/message") == message {
            return false;
        }
        if let Some(since) = old.get("lastTransitionTime") {
            fresh["lastTransitionTime"] = since.clone();
        }
    }
    *old = fresh;
    true
}

/// What became of the objects that a selector could give to an owner.
#[derive(Debug, Default)]
pub struct Claim<'a> {
    /// Controlled by the owner and matching its selector.
    pub mine: Vec<&'a Value>,
    /// Matching, without a controller: the owner may take them.
    pub adopt: Vec<&'a Value>,
    /// Controlled by the owner, but no longer matching: to be let go.
    pub release: Vec<&'a Value>,
}

/// Sorts `objects` by what `owner` has to do with them.
pub fn claim<'a>(
    owner: &Value,
    selector: &LabelSelector,
    objects: impl IntoIterator<Item = &'a Value>,
) -> Claim<'a> {
    let mut claim = Claim::default();
    for object in objects {
        let matches = selector.matches(labels(object));
        match controller_of(object) {
            Some(reference) if text(reference, "/uid") == uid(owner) => {
                if matches {
                    claim.mine.push(object);
                } else if !is_deleting(object) && !is_deleting(owner) {
                    claim.release.push(object);
                }
            }
            None if matches && !is_deleting(object) && !is_deleting(owner) => {
                claim.adopt.push(object);
            }
            _ => {}
        }
    }
    claim
}

/// `status.phase` of a pod.
pub fn phase(pod: &Value) -> &str {
    text(pod, "/status/phase")
}

/// Whether the pod has ended, with success or not.
pub fn is_terminal(pod: &Value) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Whether the pod counts for its owner: it has not ended and is not being deleted.
pub fn is_active(pod: &Value) -> bool {
    !is_terminal(pod) && !is_deleting(pod)
}

/// Whether the pod's Ready condition is true.
pub fn is_ready(pod: &Value) -> bool {
    has_condition(pod, "Ready")
}

/// When the pod became ready, if it is.
pub fn ready_since(pod: &Value) -> Option<Timestamp> {
    let ready = condition(pod, "Ready").filter(|ready| text(ready, "/status") == "True")?;
    time(ready, "/lastTransitionTime")
}

/// Whether the pod has been ready for `min_ready_seconds`; `Err` holds when it will have been.
pub fn availability(
    pod: &Value,
    min_ready_seconds: i64,
    now: Timestamp,
) -> Result<bool, Timestamp> {
    if !is_ready(pod) {
        return Ok(false);
    }
    if min_ready_seconds <= 0 {
        return Ok(true);
    }
    let Some(since) = ready_since(pod) else { return Ok(false) };
    let at = later(since, min_ready_seconds);
    if at <= now { Ok(true) } else { Err(at) }
}

/// Restarts of all containers of a pod.
pub fn restarts(pod: &Value) -> i64 {
    ["/status/initContainerStatuses", "/status/containerStatuses"]
        .iter()
        .flat_map(|pointer| list(pod, pointer))
        .filter_map(|status| number(status, "/restartCount"))
        .sum()
}

/// `time` plus whole seconds, saturating.
pub fn later(time: Timestamp, seconds: i64) -> Timestamp {
    Timestamp::from_second(time.as_second().saturating_add(seconds)).map_or(
        Timestamp::MAX,
        |whole| {
            whole
                .saturating_add(jiff::SignedDuration::from_nanos(time.subsec_nanosecond().into()))
                .unwrap_or(Timestamp::MAX)
        },
    )
}

/// Time from `now` until `at`; zero when it has passed.
pub fn until(now: Timestamp, at: Timestamp) -> std::time::Duration {
    at.duration_since(now).try_into().unwrap_or_default()
}

/// The earlier of two optional times.
pub fn earliest(a: Option<Timestamp>, b: Option<Timestamp>) -> Option<Timestamp> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// An absolute or percent value of `total`; percentages round up or down as asked.
pub fn scaled(value: Option<&Value>, total: i64, round_up: bool) -> Option<i64> {
    match value? {
        Value::Number(number) => number.as_i64(),
        Value::String(string) => {
            let percent: i64 = string.strip_suffix('%')?.parse().ok()?;
            let hundredths = percent.checked_mul(total)?;
            Some(if round_up { (hundredths + 99).div_euclid(100) } else { hundredths / 100 })
        }
        _ => None,
    }
}

/// A pod as `owner` would make it from `template`. The API completes the generated name.
pub fn pod_from_template(owner: &Value, api_version: &str, kind: &str, template: &Value) -> Value {
    let mut metadata = json!({
        "generateName": format!("{}-", name(owner)),
        "namespace": namespace(owner),
        "ownerReferences": [owner_reference(owner, api_version, kind)],
    });
    for field in ["labels", "annotations", "finalizers"] {
        if let Some(value) = template.pointer(&format!("/metadata/{field}")) {
            metadata[field] = value.clone();
        }
    }
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": metadata,
        "spec": template.get("spec").cloned().unwrap_or_else(|| json!({})),
    })
}

/// A template without what does not make a difference: nulls, empty metadata maps, the creation time, and the label
/// `ignore`.
pub fn normal_template(template: &Value, ignore: &str) -> Value {
    let mut template = template.clone();
    drop_nulls(&mut template);
    if let Some(metadata) = template.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("creationTimestamp");
        if let Some(labels) = metadata.get_mut("labels").and_then(Value::as_object_mut) {
            labels.remove(ignore);
        }
        metadata.retain(|_, value| value.as_object().is_none_or(|map| !map.is_empty()));
    }
    template
}

/// A short, name-safe hash of a value and a salt.
pub fn short_hash(value: &Value, salt: i64) -> String {
    let mut hasher = Sha256::new();
    // Maps are sorted, so that equal values have equal text.
    hasher.update(value.to_string().as_bytes());
    hasher.update(salt.to_be_bytes());
    hasher.finalize()[..HASH_LEN]
        .iter()
        .map(|byte| char::from(NAME_ALPHABET[usize::from(*byte) % NAME_ALPHABET.len()]))
        .collect()
}

/// A label selector as it stands in the query of a list; `None` if it is malformed.
pub fn selector_query(selector: &Value) -> Option<String> {
    let mut parts = Vec::new();
    if let Some(labels) = selector.get("matchLabels").and_then(Value::as_object) {
        for (key, value) in labels {
            parts.push(format!("{key}={}", value.as_str()?));
        }
    }
    for expression in list(selector, "/matchExpressions") {
        let key = text(expression, "/key");
        let values: Vec<&str> =
            list(expression, "/values").iter().filter_map(Value::as_str).collect();
        parts.push(match text(expression, "/operator") {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "Exists" => key.to_owned(),
            "DoesNotExist" => format!("!{key}"),
            _ => return None,
        });
    }
    Some(parts.join(","))
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_round_as_asked_and_numbers_stand() {
        assert_eq!(scaled(Some(&json!("25%")), 3, true), Some(1));
        assert_eq!(scaled(Some(&json!("25%")), 3, false), Some(0));
        assert_eq!(scaled(Some(&json!(2)), 3, false), Some(2));
        assert_eq!(scaled(Some(&json!("x")), 3, false), None);
        assert_eq!(scaled(None, 3, false), None);
    }

    #[test]
    fn a_transition_time_moves_only_with_the_status() {
        let first: Timestamp = "2026-01-01T00:00:00Z".parse().expect("a time");
        let second = later(first, 60);
        let mut conditions = Vec::new();
        assert!(set_condition(&mut conditions, "Ready", "True", "A", "m", first));
        assert!(!set_condition(&mut conditions, "Ready", "True", "A", "m", second));
        assert!(set_condition(&mut conditions, "Ready", "True", "B", "m", second));
        assert_eq!(text(&conditions[0], "/lastTransitionTime"), "2026-01-01T00:00:00Z");
        assert!(set_condition(&mut conditions, "Ready", "False", "B", "m", second));
        assert_eq!(text(&conditions[0], "/lastTransitionTime"), "2026-01-01T00:01:00Z");
    }

    #[test]
    fn a_template_hash_ignores_its_own_label_and_empty_maps() {
        let plain = json!({"metadata": {"labels": {"app": "a"}}, "spec": {"x": 1, "y": null}});
        let stored = json!({"metadata": {"labels": {"app": "a", "pod-template-hash": "zz"},
            "annotations": {}, "creationTimestamp": null}, "spec": {"x": 1}});
        let normal = |template| normal_template(template, "pod-template-hash");
        assert_eq!(normal(&plain), normal(&stored));
        assert_eq!(short_hash(&normal(&plain), 0), short_hash(&normal(&stored), 0));
        assert_ne!(short_hash(&normal(&plain), 0), short_hash(&normal(&plain), 1));
    }

    #[test]
    fn a_selector_is_written_as_a_query() {
        let selector = json!({"matchLabels": {"a": "1"}, "matchExpressions": [
            {"key": "b", "operator": "In", "values": ["x", "y"]}, {"key": "c", "operator": "DoesNotExist"}]});
        assert_eq!(selector_query(&selector).as_deref(), Some("a=1,b in (x,y),!c"));
    }
}
