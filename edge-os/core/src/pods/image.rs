//! Names of images, when to pull them, and which credentials fit.
//!
//! Source: kubernetes/kubernetes pkg/util/parsers, pkg/kubelet/images, pkg/credentialprovider;
//! distribution/reference for the grammar.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Registry of names that have none.
const DEFAULT_REGISTRY: &str = "docker.io";
/// Folder of names of one part in that registry.
const DEFAULT_FOLDER: &str = "library";
/// Key of that registry in Docker's configuration files.
const DEFAULT_REGISTRY_KEY: &str = "index.docker.io";

/// Why a name is not an image's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("couldn't parse image name \"{name}\": invalid reference format")]
pub struct ImageNameError {
    pub name: String,
}

/// When an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

/// Returns the policy, with the API server's default for a pod that has none.
pub fn pull_policy(policy: Option<&str>, image: &str) -> PullPolicy {
    match policy {
        Some("Always") => PullPolicy::Always,
        Some("Never") => PullPolicy::Never,
        Some("IfNotPresent") => PullPolicy::IfNotPresent,
        _ if split(image).is_some_and(|parts| parts.tag == "latest") => PullPolicy::Always,
        _ => PullPolicy::IfNotPresent,
    }
}

/// Returns the image's name with `:latest` if it has neither tag nor digest.
pub fn with_tag(image: &str) -> Result<String, ImageNameError> {
    let parts = split(image).ok_or_else(|| ImageNameError { name: image.to_owned() })?;
    let has_tag = !parts.digest.is_empty() || parts.explicit_tag;
    Ok(if has_tag { image.to_owned() } else { format!("{image}:latest") })
}

/// Returns the image's full name: registry, path, tag or digest.
pub fn normalize(image: &str) -> Result<String, ImageNameError> {
    let parts = split(image).ok_or_else(|| ImageNameError { name: image.to_owned() })?;
    let (registry, path) = (&parts.registry, &parts.path);
    Ok(match parts.digest.as_str() {
        "" => format!("{registry}/{path}:{}", parts.tag),
        digest => format!("{registry}/{path}@{digest}"),
    })
}

struct Parts {
    registry: String,
    path: String,
    tag: String,
    explicit_tag: bool,
    digest: String,
}

fn split(image: &str) -> Option<Parts> {
    let (rest, digest) = match image.split_once('@') {
        Some((rest, digest)) => {
            let (algorithm, hex) = digest.split_once(':')?;
            let is_hex = hex.len() >= 32 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
            (!algorithm.is_empty() && is_hex).then_some((rest, digest))?
        }
        None => (image, ""),
    };
    let last_slash = rest.rfind('/').map_or(0, |at| at + 1);
    let (name, tag) = match rest[last_slash..].find(':') {
        Some(at) => (&rest[..last_slash + at], Some(&rest[last_slash + at + 1..])),
        None => (rest, None),
    };
    let tag_ok = |tag: &str| {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        tag.len() <= 128
            && tag.starts_with(word)
            && tag.chars().all(|c| word(c) || c == '.' || c == '-')
    };
    if tag.is_some_and(|tag| !tag_ok(tag)) {
        return None;
    }
    let (registry, path) = match name.split_once('/') {
        Some((host, path))
            if host.contains(['.', ':'])
                || host == "localhost"
                || host.chars().any(|c| c.is_ascii_uppercase()) =>
        {
            (host.to_owned(), path.to_owned())
        }
        Some(_) => (DEFAULT_REGISTRY.to_owned(), name.to_owned()),
        None => (DEFAULT_REGISTRY.to_owned(), format!("{DEFAULT_FOLDER}/{name}")),
    };
    let registry =
        if registry == DEFAULT_REGISTRY_KEY { DEFAULT_REGISTRY.to_owned() } else { registry };
    let part_ok = |part: &str| {
        let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        part.starts_with(edge)
            && part.ends_with(edge)
            && part.chars().all(|c| edge(c) || matches!(c, '.' | '_' | '-'))
    };
    let registry_ok = !registry.is_empty()
        && registry.chars().all(|c| c.is_ascii_alphanumeric() || "-.:[]_".contains(c));
    if !registry_ok || !path.split('/').all(part_ok) {
        return None;
    }
    Some(Parts {
        registry,
        path,
        explicit_tag: tag.is_some(),
        tag: tag.unwrap_or("latest").to_owned(),
        digest: digest.to_owned(),
    })
}

/// What a registry is shown.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Credentials {
    pub username: String,
    pub password: String,
    /// Base64 of `user:password`; the caller passes it to the runtime as it is.
    pub auth: String,
    #[serde(rename = "identitytoken")]
    pub identity_token: String,
    #[serde(rename = "registrytoken")]
    pub registry_token: String,
}

/// Credentials by registry key, of all of a pod's pull secrets.
#[derive(Debug, Clone, Default)]
pub struct Keyring {
    entries: Vec<(String, Credentials)>,
}

/// Why a pull secret cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("not a Docker configuration")]
pub struct KeyringError(#[from] serde_json::Error);

impl Keyring {
    /// Adds the content of a secret of type `kubernetes.io/dockerconfigjson`.
    pub fn add_docker_config_json(&mut self, bytes: &[u8]) -> Result<(), KeyringError> {
        #[derive(Deserialize)]
        struct File {
            #[serde(default)]
            auths: BTreeMap<String, Credentials>,
        }
        let file: File = serde_json::from_slice(bytes)?;
        self.entries.extend(file.auths);
        Ok(())
    }

    /// Adds the content of a secret of type `kubernetes.io/dockercfg`.
    pub fn add_docker_cfg(&mut self, bytes: &[u8]) -> Result<(), KeyringError> {
        let file: BTreeMap<String, Credentials> = serde_json::from_slice(bytes)?;
        self.entries.extend(file);
        Ok(())
    }

    /// Returns the credentials that fit `image`, the most specific first.
    pub fn find(&self, image: &str) -> Vec<&Credentials> {
        let Some(parts) = split(image) else { return Vec::new() };
        let target = format!("{}/{}", parts.registry, parts.path);
        let mut found: Vec<(String, &Credentials)> = self
            .entries
            .iter()
            .map(|(key, credentials)| (clean_key(key), credentials))
            .filter(|(key, _)| key_matches(key, &target))
            .collect();
        found.sort_by(|a, b| b.0.cmp(&a.0));
        found.into_iter().map(|(_, credentials)| credentials).collect()
    }
}

fn clean_key(key: &str) -> String {
    let key = key.strip_prefix("https://").or(key.strip_prefix("http://")).unwrap_or(key);
    let key = key.trim_end_matches('/');
    let key = key.strip_suffix("/v1").or(key.strip_suffix("/v2")).unwrap_or(key);
    let (host, path) = key.split_once('/').unwrap_or((key, ""));
    let host = match host {
        DEFAULT_REGISTRY_KEY | "registry-1.docker.io" => DEFAULT_REGISTRY,
        host => host,
    };
    if path.is_empty() { host.to_owned() } else { format!("{host}/{path}") }
}

fn key_matches(key: &str, target: &str) -> bool {
    let (key_host, key_path) = key.split_once('/').unwrap_or((key, ""));
    let (host, path) = target.split_once('/').unwrap_or((target, ""));
    let (key_name, key_port) = key_host.split_once(':').unwrap_or((key_host, ""));
    let (name, port) = host.split_once(':').unwrap_or((host, ""));
    let labels_match = key_name.split('.').count() == name.split('.').count()
        && key_name.split('.').zip(name.split('.')).all(|(pattern, label)| glob(pattern, label));
    labels_match && key_port == port && path.starts_with(key_path)
}

/// Whether `label` fits `pattern`, in which `*` stands for any text.
fn glob(pattern: &str, label: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == label,
        Some((start, rest)) => label.strip_prefix(start).is_some_and(|label| {
            let ends = (0..=label.len()).filter(|at| label.is_char_boundary(*at));
            ends.into_iter().any(|at| glob(rest, &label[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_as_container_tools_do() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (name, expected) in [
            ("nginx", Some("docker.io/library/nginx:latest")),
            ("nginx:1.2", Some("docker.io/library/nginx:1.2")),
            ("team/app", Some("docker.io/team/app:latest")),
            ("localhost:5000/app", Some("localhost:5000/app:latest")),
            ("reg.io/a/b:t", Some("reg.io/a/b:t")),
            (&format!("reg.io/a@{digest}"), Some(&*format!("reg.io/a@{digest}"))),
            ("", None),
            ("UPPER", None),
            ("a:b:c", None),
            ("reg.io/a:", None),
            ("reg.io//a", None),
            ("a@sha256:1", None),
        ] {
            assert_eq!(normalize(name).ok().as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn only_a_name_without_tag_and_digest_gets_latest() {
        assert_eq!(with_tag("reg.io:5000/a").as_deref(), Ok("reg.io:5000/a:latest"));
        assert_eq!(with_tag("a:1").as_deref(), Ok("a:1"));
    }

    #[test]
    fn default_policy_pulls_latest_always() {
        assert_eq!(pull_policy(None, "a"), PullPolicy::Always);
        assert_eq!(pull_policy(None, "a:1"), PullPolicy::IfNotPresent);
        assert_eq!(pull_policy(Some("Never"), "a"), PullPolicy::Never);
    }

    #[test]
    fn most_specific_credentials_that_fit_come_first() {
        let mut keyring = Keyring::default();
        let config = br#"{"auths": {
            "*.reg.io": {"username": "any"},
            "https://eu.reg.io/v1/": {"username": "host"},
            "eu.reg.io/team": {"username": "team"},
            "other.io": {"username": "other"},
            "https://index.docker.io/v1/": {"username": "hub"}
        }}"#;
        keyring.add_docker_config_json(config).expect("parses");
        let names = |image| -> Vec<&str> {
            keyring.find(image).into_iter().map(|found| found.username.as_str()).collect()
        };
        assert_eq!(names("eu.reg.io/team/app:1"), ["team", "host", "any"]);
        assert_eq!(names("eu.reg.io:5000/team/app"), [""; 0]);
        assert_eq!(names("busybox"), ["hub"]);
        assert_eq!(names("a.eu.reg.io/x"), [""; 0]);
    }
}
