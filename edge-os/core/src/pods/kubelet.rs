//! What kubelet knows its own containers by, so that a node changes hands without restarting one.
//!
//! Containers that we make carry everything that kubelet reads back: labels, annotations, the hash of the definition.
//! Containers that kubelet made are recognised by the same marks.
//!
//! Source: kubernetes/kubernetes pkg/kubelet/container/helpers.go (`HashContainer`), pkg/kubelet/kuberuntime/labels.go,
//! pkg/kubelet/types/pod_update.go.

use k8s_openapi::api::core::v1::{Container, Pod};
use std::collections::BTreeMap;

/// Hash of the definition that a container was made from, in hex; see [`definition_hash`].
pub const ANNOTATION_HASH: &str = "io.kubernetes.container.hash";
/// Number of the instance, 0 for the first.
pub const ANNOTATION_RESTARTS: &str = "io.kubernetes.container.restartCount";
/// Where in the container its last words are written.
pub const ANNOTATION_MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
/// `File` or `FallbackToLogsOnError`.
pub const ANNOTATION_MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
/// The container's ports, as JSON.
pub const ANNOTATION_PORTS: &str = "io.kubernetes.container.ports";
/// The container's hook before a stop, as JSON: kubelet runs it also when the pod's object is gone.
pub const ANNOTATION_PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
/// Seconds that the pod may take to stop.
pub const ANNOTATION_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
/// The same as the delete said it.
pub const ANNOTATION_DELETION_GRACE: &str = "io.kubernetes.pod.deletionGracePeriod";

/// Where a pod comes from: `file` and `http` for those that the node was told of without an API.
pub const ANNOTATION_SOURCE: &str = "kubernetes.io/config.source";
/// On the API's image of a pod that comes from a file; nobody runs the image.
pub const ANNOTATION_MIRROR: &str = "kubernetes.io/config.mirror";

/// Returns the value of [`ANNOTATION_HASH`] as kubelet 1.31 and newer compute it: FNV-1a (32 bits) over a dump of the
/// bytes of a JSON object with image and name.
///
/// Older kubelets hash the whole container in the order of Go's fields; such a value cannot be told from a changed
/// definition, so what ran under one is recorded when the node is taken over.
pub fn definition_hash(container: &Container) -> String {
    let text = |value: &str| {
        let quoted = serde_json::to_string(value).expect("a text is always JSON");
        // Go's encoder also escapes what would matter inside a web page.
        ['<', '>', '&', '\u{2028}', '\u{2029}'].into_iter().fold(quoted, |quoted, special| {
            quoted.replace(special, &format!("\\u{:04x}", u32::from(special)))
        })
    };
    let image = container.image.as_deref().unwrap_or_default();
    let json = format!("{{\"image\":{},\"name\":{}}}", text(image), text(&container.name));
    let bytes: Vec<String> = json.bytes().map(|byte| byte.to_string()).collect();
    format!("{:x}", fnv_1a(format!("([]uint8)[{}]", bytes.join(" ")).as_bytes()))
}

/// Returns the annotations that kubelet puts on a container.
pub fn annotations(
    pod: &Pod,
    container: &Container,
    restart_count: u32,
    message_path: &str,
) -> BTreeMap<String, String> {
    let grace = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    let policy = container.termination_message_policy.as_deref().unwrap_or("File");
    let mut annotations = BTreeMap::from([
        (ANNOTATION_HASH.to_owned(), definition_hash(container)),
        (ANNOTATION_RESTARTS.to_owned(), restart_count.to_string()),
        (ANNOTATION_MESSAGE_PATH.to_owned(), message_path.to_owned()),
        (ANNOTATION_MESSAGE_POLICY.to_owned(), policy.to_owned()),
        (ANNOTATION_GRACE.to_owned(), grace.unwrap_or(30).to_string()),
    ]);
    if let Some(grace) = pod.metadata.deletion_grace_period_seconds {
        annotations.insert(ANNOTATION_DELETION_GRACE.to_owned(), grace.to_string());
    }
    let hook = container.lifecycle.as_ref().and_then(|hooks| hooks.pre_stop.as_ref());
    if let Some(Ok(hook)) = hook.map(serde_json::to_string) {
        annotations.insert(ANNOTATION_PRE_STOP.to_owned(), hook);
    }
    let ports = container.ports.as_ref().filter(|ports| !ports.is_empty());
    if let Some(Ok(ports)) = ports.map(serde_json::to_string) {
        annotations.insert(ANNOTATION_PORTS.to_owned(), ports);
    }
    annotations
}

/// Whether this pod is only the API's image of one that runs from a file.
pub fn is_mirror(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(ANNOTATION_MIRROR))
}

/// Whether a sandbox with these annotations was made from a file or an address on the node, not from an API's pod.
pub fn is_static(annotations: &BTreeMap<String, String>) -> bool {
    annotations.get(ANNOTATION_SOURCE).is_some_and(|source| source == "file" || source == "http")
}

fn fnv_1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn container(value: serde_json::Value) -> Container {
        serde_json::from_value(value).expect("a container")
    }

    #[test]
    fn hash_is_the_one_of_kubelets_own_test() {
        // pkg/kubelet/container/container_hash_test.go: the same for all versions of the sample.
        let one = container(json!({"name": "test_container", "image": "foo/image:v1",
            "command": ["/bin/testcmd"], "env": [{"name": "K", "value": "V"}]}));
        assert_eq!(definition_hash(&one), "8e45cbd0");
        let other = container(json!({"name": "test_container", "image": "foo/image:v2"}));
        assert_ne!(definition_hash(&other), "8e45cbd0");
    }

    #[test]
    fn annotations_tell_kubelet_how_to_stop_a_container_whose_pod_is_gone() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "a", "namespace": "b", "uid": "c", "deletionGracePeriodSeconds": 3},
            "spec": {"containers": [], "terminationGracePeriodSeconds": 45},
        }))
        .expect("a pod");
        let one = container(json!({
            "name": "web", "image": "i", "terminationMessagePolicy": "FallbackToLogsOnError",
            "ports": [{"containerPort": 80, "protocol": "TCP"}],
            "lifecycle": {"preStop": {"exec": {"command": ["/stop"]}}},
        }));
        let annotations = annotations(&pod, &one, 2, "/dev/termination-log");
        let read = |key: &str| annotations[key].as_str();
        assert_eq!(read(ANNOTATION_RESTARTS), "2");
        assert_eq!(read(ANNOTATION_GRACE), "45");
        assert_eq!(read(ANNOTATION_DELETION_GRACE), "3");
        assert_eq!(read(ANNOTATION_MESSAGE_POLICY), "FallbackToLogsOnError");
        assert_eq!(read(ANNOTATION_PRE_STOP), r#"{"exec":{"command":["/stop"]}}"#);
        assert_eq!(read(ANNOTATION_PORTS), r#"[{"containerPort":80,"protocol":"TCP"}]"#);
        assert_eq!(annotations.len(), 8);
    }

    #[test]
    fn pods_from_files_are_told_from_those_of_an_api() {
        let of = |source: &str| BTreeMap::from([(ANNOTATION_SOURCE.to_owned(), source.to_owned())]);
        assert!(is_static(&of("file")) && is_static(&of("http")));
        assert!(!is_static(&of("api")) && !is_static(&BTreeMap::new()));
    }
}
