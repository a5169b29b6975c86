//! `namespace/type/name`: what a message is about.
//!
//! On the wire downstream and upstream the path has two or three segments; inside CloudCore it is prefixed with
//! `node/<node>/`. Cluster-scoped objects use the literal namespace `null`.
//!
//! Source: kubeedge/kubeedge, cloud/pkg/cloudhub/common/helper.go and edge/pkg/metamanager/process.go.

use std::fmt;
use std::str::FromStr;

/// The namespace segment of cluster-scoped objects.
pub const CLUSTER_SCOPE: &str = "null";

/// A parsed resource path. Segments are never empty and hold no slash.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourcePath {
    namespace: String,
    kind: String,
    name: Option<String>,
}

/// Why a text is not a resource path.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("resource `{path}` is not `namespace/type` or `namespace/type/name`")]
pub struct ResourceError {
    /// The text.
    pub path: String,
}

impl ResourcePath {
    /// The path of one object. `namespace` is [`CLUSTER_SCOPE`] for cluster-scoped objects.
    ///
    /// # Errors
    ///
    /// [`ResourceError`] when a segment is empty or holds a slash.
    pub fn new(namespace: &str, kind: &str, name: &str) -> Result<Self, ResourceError> {
        format!("{namespace}/{kind}/{name}").parse()
    }

    /// First segment.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Type token, such as `pod`, `configmap`, `nodepatch`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Third segment, absent for a collection.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }
}

impl FromStr for ResourcePath {
    type Err = ResourceError;

    fn from_str(path: &str) -> Result<Self, ResourceError> {
        let bad = || ResourceError { path: path.into() };
        let mut segments = path.split('/');
        let mut next = || segments.next().filter(|segment| !segment.is_empty());
        let namespace = next().ok_or_else(bad)?.to_owned();
        let kind = next().ok_or_else(bad)?.to_owned();
        let name = match path.matches('/').count() {
            1 => None,
            2 => Some(next().ok_or_else(bad)?.to_owned()),
            _ => return Err(bad()),
        };
        Ok(Self { namespace, kind, name })
    }
}

impl fmt::Display for ResourcePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.kind)?;
        self.name.iter().try_for_each(|name| write!(f, "/{name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_have_two_or_three_segments() {
        for path in ["default/pod/web-0", "null/node/edge1", "default/podstatus"] {
            assert_eq!(path.parse::<ResourcePath>().expect(path).to_string(), path);
        }
        for path in ["", "node", "a/b/c/d", "a//c", "/pod/x", "a/pod/"] {
            assert!(path.parse::<ResourcePath>().is_err(), "{path}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_to_itself_or_is_refused(path in "[a-z/.-]{0,24}") {
            if let Ok(parsed) = path.parse::<ResourcePath>() {
                prop_assert_eq!(parsed.to_string(), path);
            }
        }
    }
}
