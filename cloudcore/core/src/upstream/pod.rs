//! What a node may say about its pods, and what it may read because of them.

use crate::references;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Marks a pod that exists because its node has it in a file.
pub const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";
/// The key under which a Go edge sends a pod's status.
const LEGACY_STATUS: &str = "Status";

/// Why a node may not have this.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The pod is of another node.
    #[error("pod `{pod}` is not bound to node `{node}`")]
    NotBound {
        /// The pod's name.
        pod: String,
        /// The node that asks.
        node: String,
    },
    /// A node creates pods for its files only.
    #[error("a node may create mirror pods only")]
    NotMirror,
    /// A mirror pod would open what its node may not read otherwise.
    #[error("a mirror pod may not refer to `{what}`")]
    MirrorRefers {
        /// The field.
        what: &'static str,
    },
    /// The owner of a mirror pod is its node.
    #[error("a mirror pod may be owned by its own node only")]
    MirrorOwner,
    /// A token that is bound to no pod outlives the reason for it.
    #[error("node `{node}` may ask for tokens that are bound to one of its pods only")]
    TokenUnbound {
        /// The node that asks.
        node: String,
    },
    /// The pod was made again since.
    #[error("pod `{pod}` has uid {found}, not {wanted}")]
    OtherPod {
        /// The pod's name.
        pod: String,
        /// Its uid.
        found: String,
        /// The uid in the request.
        wanted: String,
    },
    /// The pod runs as somebody else.
    #[error("pod `{pod}` runs as service account `{found}`, not `{wanted}`")]
    OtherAccount {
        /// The pod's name.
        pod: String,
        /// Its service account.
        found: String,
        /// The service account in the request.
        wanted: String,
    },
}

/// Checks a pod that `node` wants to create.
///
/// # Errors
///
/// [`Denied`]: it must be a mirror pod, bound to this node, without references to what the API would then let the
/// node read.
pub fn check_mirror(node: &str, pod: &Value) -> Result<(), Denied> {
    check_bound(node, pod)?;
    if pod["metadata"]["annotations"].get(MIRROR_ANNOTATION).is_none() {
        return Err(Denied::NotMirror);
    }
    for owner in pod["metadata"]["ownerReferences"].as_array().into_iter().flatten() {
        if owner["kind"] != "Node" || owner["name"] != node {
            return Err(Denied::MirrorOwner);
        }
    }
    // References count in the pod's namespace, and what a node sends may name none.
    let mut named = pod.clone();
    named["metadata"]["namespace"] = "any".into();
    let account = &pod["spec"]["serviceAccountName"];
    let what = if account.as_str().is_some_and(|account| !account.is_empty()) {
        "serviceAccountName"
    } else if !references::of_pod(&named).is_empty() {
        "configmaps and secrets"
    } else if !claims_of(pod).is_empty() {
        "persistentVolumeClaim"
    } else if pod["spec"]["resourceClaims"].as_array().is_some_and(|claims| !claims.is_empty()) {
        "resourceClaims"
    } else {
        return Ok(());
    };
    Err(Denied::MirrorRefers { what })
}

/// Checks that `pod` is bound to `node`.
///
/// # Errors
///
/// [`Denied::NotBound`].
pub fn check_bound(node: &str, pod: &Value) -> Result<(), Denied> {
    if pod["spec"]["nodeName"] == node {
        return Ok(());
    }
    let pod = text(&pod["metadata"]["name"]).to_owned();
    Err(Denied::NotBound { pod, node: node.into() })
}

/// The pod to which a TokenRequest is bound: its name and uid.
///
/// # Errors
///
/// [`Denied::TokenUnbound`] when it is bound to no pod.
pub fn token_pod<'a>(node: &str, request: &'a Value) -> Result<(&'a str, &'a str), Denied> {
    let bound = &request["spec"]["boundObjectRef"];
    let (name, uid) = (text(&bound["name"]), text(&bound["uid"]));
    if bound["kind"] != "Pod" || name.is_empty() || uid.is_empty() {
        return Err(Denied::TokenUnbound { node: node.into() });
    }
    Ok((name, uid))
}

/// Checks that `node` may have a token of service account `account` bound to `pod` with `uid`.
///
/// # Errors
///
/// [`Denied`], when the pod is of another node, was made again, or runs as another account.
pub fn check_token(node: &str, account: &str, uid: &str, pod: &Value) -> Result<(), Denied> {
    check_bound(node, pod)?;
    let name = text(&pod["metadata"]["name"]).to_owned();
    let found = text(&pod["metadata"]["uid"]);
    if found != uid {
        return Err(Denied::OtherPod { pod: name, found: found.into(), wanted: uid.into() });
    }
    let found = match text(&pod["spec"]["serviceAccountName"]) {
        "" => "default",
        found => found,
    };
    if found != account {
        return Err(Denied::OtherAccount {
            pod: name,
            found: found.into(),
            wanted: account.into(),
        });
    }
    Ok(())
}

/// The PersistentVolumeClaims that a pod uses, by name; they are in the pod's namespace.
///
/// An ephemeral volume has the claim `<pod>-<volume>`.
pub fn claims_of(pod: &Value) -> BTreeSet<String> {
    let mut claims = BTreeSet::new();
    for volume in pod["spec"]["volumes"].as_array().into_iter().flatten() {
        if let Some(claim) = volume["persistentVolumeClaim"]["claimName"].as_str() {
            claims.insert(claim.to_owned());
        }
        if volume["ephemeral"].is_object() {
            let (pod, volume) = (text(&pod["metadata"]["name"]), text(&volume["name"]));
            claims.insert(format!("{pod}-{volume}"));
        }
    }
    claims
}

/// The reports in a legacy message: one object, or an array of them. The second of a pair is the status.
pub fn legacy_reports(content: Value) -> Option<Vec<LegacyReport>> {
    let reports = match content {
        Value::Array(reports) => reports,
        report @ Value::Object(_) => vec![report],
        _ => return None,
    };
    reports
        .into_iter()
        .map(|mut report| {
            let status = report.get_mut(LEGACY_STATUS)?.take();
            let name = report["Name"].as_str()?.to_owned();
            let uid = report["UID"].as_str()?.to_owned();
            status.is_object().then_some(LegacyReport { name, uid, status })
        })
        .collect()
}

/// One pod's status, as edges sent it before they sent patches.
#[derive(Debug, PartialEq, Eq)]
pub struct LegacyReport {
    /// The pod's name.
    pub name: String,
    /// The pod's uid.
    pub uid: String,
    /// Its whole status.
    pub status: Value,
}

/// The pod with the status of a legacy report.
///
/// The times at which conditions changed, and the start, are the API's: a condition that did not change keeps its
/// time, one that did gets `now` (RFC 3339).
pub fn with_legacy_status(mut pod: Value, mut status: Value, now: &str) -> Value {
    if !status.is_object() {
        status = Value::Object(serde_json::Map::new()); // a node may send anything
    }
    let old = &pod["status"];
    let conditions = status.get_mut("conditions").and_then(Value::as_array_mut);
    for condition in conditions.into_iter().flatten() {
        if !matches!(text(&condition["type"]), "Ready" | "Initialized") {
            continue;
        }
        let same = old["conditions"].as_array().into_iter().flatten().find(|known| {
            known["type"] == condition["type"] && known["status"] == condition["status"]
        });
        condition["lastTransitionTime"] = match same {
            Some(known) => known["lastTransitionTime"].clone(),
            None => now.into(),
        };
    }
    if old["startTime"].is_string() {
        status["startTime"] = old["startTime"].clone();
    } else if !status["startTime"].is_string() {
        status["startTime"] = now.into();
    }
    if let Some(containers) = status.get_mut("containerStatuses").and_then(Value::as_array_mut) {
        containers.sort_by(|a, b| text(&a["name"]).cmp(text(&b["name"])));
    }
    pod["status"] = status;
    pod
}

/// Whether a pod that is being deleted has ended, so that its node, which does not say so itself, is done with it.
pub fn has_ended(pod: &Value) -> bool {
    let status = &pod["status"];
    let runs = |container: &Value| {
        container["state"]["terminated"].is_null() && container["state"]["waiting"].is_null()
    };
    pod["metadata"]["deletionTimestamp"].is_string()
        && matches!(text(&status["phase"]), "Succeeded" | "Failed")
        && !status["containerStatuses"].as_array().into_iter().flatten().any(runs)
}

/// What a KubeEdge cloud pushes to have a pod removed that it does not know: a pod of which only the name is known.
pub fn stub(namespace: &str, name: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": namespace, "creationTimestamp": null},
        "spec": {"containers": null}, "status": {}})
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirror(spec: Value) -> Value {
        let mut pod = json!({"metadata": {"name": "m", "annotations": {MIRROR_ANNOTATION: "h"},
            "ownerReferences": [{"kind": "Node", "name": "edge1"}]}, "spec": spec});
        pod["spec"]["nodeName"] = "edge1".into();
        pod
    }

    #[test]
    fn a_mirror_pod_refers_to_nothing() {
        assert_eq!(check_mirror("edge1", &mirror(json!({}))), Ok(()));
        let refused =
            |spec: Value| check_mirror("edge1", &mirror(spec)).expect_err("refused").to_string();
        assert!(refused(json!({"serviceAccountName": "a"})).contains("serviceAccountName"));
        assert!(refused(json!({"volumes": [{"secret": {"secretName": "s"}}]})).contains("secrets"));
        let claim = json!({"volumes": [{"persistentVolumeClaim": {"claimName": "c"}}]});
        assert!(refused(claim).contains("persistentVolumeClaim"));
        assert!(refused(json!({"resourceClaims": [{}]})).contains("resourceClaims"));
        let mut foreign = mirror(json!({}));
        foreign["metadata"]["ownerReferences"][0]["name"] = "edge2".into();
        assert_eq!(check_mirror("edge1", &foreign), Err(Denied::MirrorOwner));
        let mut plain = mirror(json!({}));
        plain["metadata"]["annotations"] = Value::Null;
        assert_eq!(check_mirror("edge1", &plain), Err(Denied::NotMirror));
        assert!(matches!(check_mirror("edge2", &mirror(json!({}))), Err(Denied::NotBound { .. })));
    }

    #[test]
    fn tokens_are_for_the_account_of_the_pod_they_are_bound_to() {
        let request = json!({"spec": {"boundObjectRef": {"kind": "Pod", "name": "p", "uid": "u"}}});
        assert_eq!(token_pod("edge1", &request), Ok(("p", "u")));
        for bound in [
            json!(null),
            json!({"kind": "Secret", "name": "p", "uid": "u"}),
            json!({"kind": "Pod", "name": "p"}),
        ] {
            let request = json!({"spec": {"boundObjectRef": bound}});
            assert!(matches!(token_pod("edge1", &request), Err(Denied::TokenUnbound { .. })));
        }
        let pod = json!({"metadata": {"name": "p", "uid": "u"}, "spec": {"nodeName": "edge1"}});
        assert_eq!(check_token("edge1", "default", "u", &pod), Ok(()));
        assert!(matches!(check_token("edge2", "default", "u", &pod), Err(Denied::NotBound { .. })));
        assert!(matches!(check_token("edge1", "default", "v", &pod), Err(Denied::OtherPod { .. })));
        assert!(matches!(
            check_token("edge1", "root", "u", &pod),
            Err(Denied::OtherAccount { .. })
        ));
    }

    #[test]
    fn claims_are_found_by_reference_and_by_name() {
        let pod = json!({"metadata": {"name": "p"}, "spec": {"volumes": [{"name": "a", "emptyDir": {}},
            {"name": "b", "persistentVolumeClaim": {"claimName": "c"}}, {"name": "d", "ephemeral": {}}]}});
        assert_eq!(claims_of(&pod), BTreeSet::from(["c".to_owned(), "p-d".to_owned()]));
    }

    #[test]
    fn legacy_reports_come_alone_or_in_an_array() {
        let report = json!({"UID": "u", "Name": "p", "Status": {"phase": "Running"}});
        let one =
            LegacyReport { name: "p".into(), uid: "u".into(), status: json!({"phase": "Running"}) };
        assert_eq!(legacy_reports(json!([report])).as_deref(), Some([one].as_slice()));
        assert_eq!(legacy_reports(report).map(|reports| reports.len()), Some(1));
        for wrong in [
            json!("x"),
            json!([1]),
            json!({"Name": "p"}),
            json!([{"UID": "u", "Name": "p", "Status": 1}]),
        ] {
            assert_eq!(legacy_reports(wrong.clone()), None, "{wrong}");
        }
    }

    #[test]
    fn a_legacy_status_keeps_the_times_of_what_did_not_change() {
        let pod = json!({"metadata": {}, "status": {"startTime": "t0", "conditions": [
            {"type": "Ready", "status": "False", "lastTransitionTime": "t1"},
            {"type": "Initialized", "status": "True", "lastTransitionTime": "t2"}]}});
        let status = json!({"startTime": "t9", "conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "t9"},
            {"type": "Initialized", "status": "True", "lastTransitionTime": "t9"},
            {"type": "Other", "status": "True", "lastTransitionTime": "t9"}],
            "containerStatuses": [{"name": "b"}, {"name": "a"}]});
        let merged = with_legacy_status(pod, status, "now");
        let times: Vec<_> = merged["status"]["conditions"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|condition| condition["lastTransitionTime"].as_str().expect("a time"))
            .collect();
        assert_eq!(times, ["now", "t2", "t9"]);
        assert_eq!(merged["status"]["startTime"], "t0");
        assert_eq!(merged["status"]["containerStatuses"], json!([{"name": "a"}, {"name": "b"}]));
        assert_eq!(with_legacy_status(json!({}), json!({}), "now")["status"]["startTime"], "now");
    }

    #[test]
    fn a_terminating_pod_has_ended_when_nothing_runs() {
        let pod = |phase: &str, state: Value| {
            json!({"metadata": {"deletionTimestamp": "t"}, "status": {"phase": phase,
                "containerStatuses": [{"state": state}]}})
        };
        assert!(has_ended(&pod("Failed", json!({"terminated": {}}))));
        assert!(!has_ended(&pod("Failed", json!({"running": {}}))));
        assert!(!has_ended(&pod("Running", json!({"terminated": {}}))));
        assert!(!has_ended(&json!({"metadata": {}, "status": {"phase": "Failed"}})));
    }
}
