//! Requests of applications on a node to the Kubernetes API, as far as both ends have to agree on more than a shape.
//!
//! The edge's own API (`edge-os/src/metaserver`) and the cloud's answers (`cloudcore/core/src/applications.rs`) ask the
//! same question about a path.
//!
//! Source: kubeedge/kubeedge, pkg/util/pass-through/pass_through.go.

/// Paths of discovery that stand for themselves.
const EXACT: [&str; 8] =
    ["/api", "/apis", "/version", "/healthz", "/livez", "/readyz", "/openapi/v2", "/openapi/v3"];

/// Whether a `get` of this path is discovery, whose answer the API gives as it is: one of the eight fixed paths,
/// `/api/<version>`, `/apis/<group>` or `/apis/<group>/<version>`, with or without a `/` at the end.
///
/// Segments that would leave their place in a path (`..`, queries, escapes) make it none.
pub fn is_discovery(path: &str) -> bool {
    let path = path.trim_end_matches('/');
    if EXACT.contains(&path) {
        return true;
    }
    let mut segments = path.split('/').skip(1);
    let first = segments.next();
    let rest: Vec<&str> = segments.collect();
    rest.iter().all(|segment| is_name(segment))
        && match first {
            Some("api") => rest.len() == 1,
            Some("apis") => (1..=2).contains(&rest.len()),
            _ => false,
        }
}

fn is_name(segment: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    !segment.is_empty() && segment.bytes().all(plain) && !matches!(segment, "." | "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discovery_is_what_kubeedge_passes_through() {
        for path in [
            "/api",
            "/apis/",
            "/version",
            "/openapi/v2",
            "/api/v1",
            "/apis/apps",
            "/apis/apps/v1",
            "/apis/devices.kubeedge.io/v1beta1/",
            "/healthz",
            "/livez",
            "/readyz",
            "/openapi/v3",
        ] {
            assert!(is_discovery(path), "{path}");
        }
        for path in [
            "/core/v1/pods/a/b",
            "/api/v1/pods",
            "/apis/apps/v1/deployments",
            "/metrics",
            "/api/..",
            "/api/v1?x",
            "/apis/a%2fb",
            "/apis//v1",
            "",
        ] {
            assert!(!is_discovery(path), "{path}");
        }
    }
}
