//! What a URL asks for.

use percent_encoding::percent_decode_str;
use std::borrow::Cow;

/// A request for a resource, such as `/apis/apps/v1/namespaces/default/deployments/web/status`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Target {
    /// Empty for the core group.
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) resource: String,
    pub(crate) namespace: Option<String>,
    pub(crate) name: Option<String>,
    /// Empty for the object itself; `proxy/a/b` keeps its tail.
    pub(crate) subresource: String,
}

/// Where a path leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    /// `/api` and `/apis`, `/apis/G`, `/api/v1` and `/apis/G/V`.
    CoreVersions,
    Groups,
    Group(String),
    Resources {
        group: String,
        version: String,
    },
    Resource(Target),
    /// Everything else.
    Other(String),
}

impl Route {
    pub(crate) fn parse(path: &str) -> Self {
        let parts: Vec<Cow<'_, str>> = path
            .split('/')
            .filter(|part| !part.is_empty())
            .map(|part| percent_decode_str(part).decode_utf8_lossy())
            .collect();
        let parts: Vec<&str> = parts.iter().map(|part| &**part).collect();
        match parts.as_slice() {
            ["api"] => Self::CoreVersions,
            ["apis"] => Self::Groups,
            ["apis", group] => Self::Group((*group).into()),
            ["api", version] => {
                Self::Resources { group: String::new(), version: (*version).into() }
            }
            ["apis", group, version] => {
                Self::Resources { group: (*group).into(), version: (*version).into() }
            }
            ["api", version, rest @ ..] => target("", version, rest),
            ["apis", group, version, rest @ ..] => target(group, version, rest),
            _ => Self::Other(path.into()),
        }
    }
}

fn target(group: &str, version: &str, rest: &[&str]) -> Route {
    let (namespace, rest) = match rest {
        // `/namespaces/x`, `/namespaces/x/status` and `/namespaces/x/finalize` are about the namespace itself.
        ["namespaces", _] | ["namespaces", _, "status" | "finalize"] => (None, rest),
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => {
            (Some((*namespace).to_owned()), rest)
        }
        _ => (None, rest),
    };
    Route::Resource(Target {
        group: group.into(),
        version: version.into(),
        resource: rest.first().copied().unwrap_or_default().into(),
        namespace,
        name: rest.get(1).map(|name| (*name).into()),
        subresource: rest.get(2..).unwrap_or_default().join("/"),
    })
}

/// Parameters of a URL; tolerates leading `&`, empty pairs and a lone `?`, as some clients send them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn parse(query: &str) -> Self {
        let decode = |text: &str| {
            let text = text.replace('+', " ");
            percent_decode_str(&text).decode_utf8_lossy().into_owned()
        };
        let pairs = query.split(['&', '?']).filter(|pair| !pair.is_empty()).map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(key), decode(value))
        });
        Self(pairs.collect())
    }

    /// The first value of `key`, if it is not empty.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        let (_, value) = self.0.iter().find(|(one, value)| one == key && !value.is_empty())?;
        Some(value)
    }

    pub(crate) fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(one, _)| one == key).map(|(_, value)| value.as_str())
    }

    /// `true` and `1`; a key without a value counts as set.
    pub(crate) fn flag(&self, key: &str) -> bool {
        self.all(key).next().is_some_and(|value| matches!(value, "" | "1" | "true" | "True"))
    }

    pub(crate) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, expected: Target) {
        assert_eq!(Route::parse(path), Route::Resource(expected), "{path}");
    }

    #[test]
    fn paths_of_resources_are_taken_apart() {
        let core = Target { version: "v1".into(), resource: "pods".into(), ..Target::default() };
        check("/api/v1/pods", core.clone());
        let namespaced = Target { namespace: Some("a".into()), ..core };
        check("/api/v1/namespaces/a/pods", namespaced.clone());
        check(
            "/api/v1/namespaces/a/pods/p/log",
            Target { name: Some("p".into()), subresource: "log".into(), ..namespaced },
        );
        let namespace = Target {
            version: "v1".into(),
            resource: "namespaces".into(),
            name: Some("a".into()),
            ..Target::default()
        };
        check("/api/v1/namespaces/a", namespace.clone());
        check("/api/v1/namespaces/a/", namespace.clone());
        check(
            "/api/v1/namespaces/a/finalize",
            Target { subresource: "finalize".into(), ..namespace },
        );
    }

    #[test]
    fn odd_query_strings_are_read() {
        let query =
            Query::parse("?&watch=true&&labelSelector=a%3Db%2Cc+in+%28d%29&timeoutSeconds=");
        assert!(query.flag("watch"));
        assert_eq!(query.get("labelSelector"), Some("a=b,c in (d)"));
        assert_eq!(query.get("timeoutSeconds"), None);
        assert!(Query::parse("?").get("watch").is_none());
    }
}
