//! What a node may ask for, and the shapes of the answers.
//!
//! A node reads and reports only its own: its Node and Lease, pods bound to it, what those pods refer to, events about
//! these, certificate requests in its own name, service account tokens bound to its pods, its devices, its share of a
//! job. The rules are those of Kubernetes' node authorizer and NodeRestriction admission, for the requests that
//! KubeEdge's edge sends. Here they are functions over JSON objects; `cloudcore/src/upstream` reads the objects, asks
//! these functions and writes. Nothing here asks an API.
//!
//! Sources: kubeedge/kubeedge, cloud/pkg/edgecontroller/controller/upstream.go,
//! cloud/pkg/devicecontroller/controller/upstream.go, cloud/pkg/taskmanager; kubernetes/kubernetes,
//! plugin/pkg/auth/authorizer/node and plugin/pkg/admission/noderestriction.

pub mod answer;
pub mod device;
pub mod event;
pub mod job;
pub mod node;
pub mod pod;
pub mod reports;

/// Whether `text` can be a segment of a path of the API: names are letters, digits and a few signs (`:` in RBAC), and
/// nothing that has a meaning in a URL.
pub fn is_segment(text: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:".contains(&byte);
    !text.is_empty() && text != "." && text != ".." && text.bytes().all(known)
}
