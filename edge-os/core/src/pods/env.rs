//! The environment of a container, and the commands that are expanded with it.
//!
//! Source: kubernetes/kubernetes pkg/kubelet/kubelet_pods.go (`makeEnvironmentVariables`),
//! third_party/forked/golang/expansion, pkg/fieldpath.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    ConfigMap, Container, EnvVarSource, Pod, ResourceFieldSelector, Secret,
};

use super::{find_container, quantity};

/// The objects of a pod's namespace.
pub trait Lookup {
    fn config_map(&self, name: &str) -> Option<Arc<ConfigMap>>;
    fn secret(&self, name: &str) -> Option<Arc<Secret>>;
}

/// What is known of the pod's place once its sandbox runs.
#[derive(Debug, Clone, Default)]
pub struct Place {
    pub node_name: String,
    pub host_ip: Option<String>,
    pub pod_ips: Vec<String>,
    /// CPU of the node in thousandths, for containers without a limit.
    pub cpu_milli: u64,
    /// Memory of the node in bytes, for containers without a limit.
    pub memory_bytes: u64,
}

/// A container's environment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    pub variables: Vec<(String, String)>,
    /// Keys of ConfigMaps and Secrets that are no names of variables, with where they came from.
    pub skipped: Vec<SkippedKeys>,
}

/// Keys that `envFrom` left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedKeys {
    pub keys: Vec<String>,
    /// `ConfigMap ns/name`.
    pub source: String,
}

/// Why a container cannot be configured; the message is the one users see.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("configmap \"{name}\" not found")]
    ConfigMapNotFound { name: String },
    #[error("secret \"{name}\" not found")]
    SecretNotFound { name: String },
    #[error("couldn't find key {key} in ConfigMap {namespace}/{name}")]
    ConfigMapKey { key: String, namespace: String, name: String },
    #[error("couldn't find key {key} in Secret {namespace}/{name}")]
    SecretKey { key: String, namespace: String, name: String },
    #[error("field path \"{path}\" is not supported")]
    FieldPath { path: String },
    #[error("resource \"{resource}\" of container \"{container}\" cannot be exposed")]
    Resource { resource: String, container: String },
    #[error("environment variable source of \"{name}\" is not supported on this node")]
    Source { name: String },
}

/// Returns the container's environment. `first` comes before all that the pod says.
pub fn environment(
    pod: &Pod,
    container: &Container,
    place: &Place,
    lookup: &dyn Lookup,
    first: &[(String, String)],
) -> Result<Environment, ConfigError> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let mut skipped = Vec::new();
    let mut variables = Variables::default();
    for (name, value) in first {
        variables.set(name, value.clone());
    }
    for from in container.env_from.as_deref().unwrap_or_default() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let mut add = |entries: Vec<(String, String)>, source: String| {
            let mut bad = Vec::new();
            for (key, value) in entries {
                let name = format!("{prefix}{key}");
                if is_variable_name(&name) {
                    variables.set(&name, value);
                } else {
                    bad.push(name);
                }
            }
            if !bad.is_empty() {
                skipped.push(SkippedKeys { keys: bad, source });
            }
        };
        if let Some(reference) = &from.config_map_ref {
            let name = &reference.name;
            match lookup.config_map(name) {
                Some(map) => add(
                    map.data.clone().unwrap_or_default().into_iter().collect(),
                    format!("ConfigMap {namespace}/{name}"),
                ),
                None if reference.optional == Some(true) => {}
                None => return Err(ConfigError::ConfigMapNotFound { name: name.clone() }),
            }
        }
        if let Some(reference) = &from.secret_ref {
            let name = &reference.name;
            match lookup.secret(name) {
                Some(secret) => add(
                    secret
                        .data
                        .iter()
                        .flatten()
                        .map(|(key, value)| (key.clone(), text(&value.0)))
                        .collect(),
                    format!("Secret {namespace}/{name}"),
                ),
                None if reference.optional == Some(true) => {}
                None => return Err(ConfigError::SecretNotFound { name: name.clone() }),
            }
        }
    }
    for variable in container.env.as_deref().unwrap_or_default() {
        let value = match (&variable.value, &variable.value_from) {
            (Some(value), _) if !value.is_empty() => Some(expand(value, &variables.values)),
            (_, Some(source)) => {
                from_source(pod, container, &variable.name, source, place, lookup)?
            }
            _ => Some(String::new()),
        };
        if let Some(value) = value {
            variables.set(&variable.name, value);
        }
    }
    let Variables { order, mut values } = variables;
    let variables = order
        .into_iter()
        .filter_map(|name| values.remove(&name).map(|value| (name, value)))
        .collect();
    Ok(Environment { variables, skipped })
}

/// Replaces `$(NAME)` by the value of a known variable; `$$` stands for `$`.
pub fn expand(text: &str, values: &BTreeMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            out.push('$');
            rest = tail;
        } else if let Some((name, tail)) =
            after.strip_prefix('(').and_then(|inner| inner.split_once(')'))
        {
            match values.get(name) {
                Some(value) => out.push_str(value),
                None => out.push_str(&format!("$({name})")),
            }
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// Returns the value of a field of the pod, as `fieldRef` names it.
pub fn field(pod: &Pod, path: &str, place: &Place) -> Result<String, ConfigError> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let keyed = |map: &Option<BTreeMap<String, String>>, key: &str| {
        map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default()
    };
    let pod_ips = || {
        let host_network = spec.is_some_and(super::host_network);
        if host_network { place.host_ip.iter().cloned().collect() } else { place.pod_ips.clone() }
    };
    Ok(match path {
        "metadata.name" => text(&meta.name),
        "metadata.namespace" => text(&meta.namespace),
        "metadata.uid" => text(&meta.uid),
        "metadata.labels" => lines(&meta.labels),
        "metadata.annotations" => lines(&meta.annotations),
        "spec.nodeName" => place.node_name.clone(),
        "spec.serviceAccountName" => {
            spec.and_then(|spec| spec.service_account_name.clone()).unwrap_or_default()
        }
        "status.hostIP" | "status.hostIPs" => place.host_ip.clone().unwrap_or_default(),
        "status.podIP" => pod_ips().first().cloned().unwrap_or_default(),
        "status.podIPs" => pod_ips().join(","),
        other => {
            let subscript = other
                .strip_suffix("']")
                .and_then(|open| open.split_once("['"))
                .filter(|(_, key)| !key.is_empty());
            match subscript {
                Some(("metadata.labels", key)) => keyed(&meta.labels, key),
                Some(("metadata.annotations", key)) => keyed(&meta.annotations, key),
                _ => return Err(ConfigError::FieldPath { path: other.to_owned() }),
            }
        }
    })
}

/// Returns the amount that `resourceFieldRef` asks for.
pub fn resource(
    pod: &Pod,
    default: Option<&Container>,
    selector: &ResourceFieldSelector,
    place: &Place,
) -> Result<String, ConfigError> {
    let container = match selector.container_name.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => pod
            .spec
            .as_ref()
            .and_then(|spec| find_container(spec, name))
            .map(|(container, _)| container),
        None => default,
    };
    let unknown = || ConfigError::Resource {
        resource: selector.resource.clone(),
        container: selector.container_name.clone().unwrap_or_default(),
    };
    let container = container.ok_or_else(unknown)?;
    let (kind, name) = selector.resource.split_once('.').ok_or_else(unknown)?;
    let set = match kind {
        "limits" => quantity::limit_milli(container, name),
        "requests" => quantity::request_milli(container, name),
        _ => return Err(unknown()),
    };
    let milli = match (set, kind, name) {
        (Some(milli), ..) => milli,
        (None, "limits", "cpu") => i128::from(place.cpu_milli),
        (None, "limits", "memory") => i128::from(place.memory_bytes) * 1000,
        (None, _, "cpu" | "memory" | "ephemeral-storage") => 0,
        (None, ..) if name.starts_with("hugepages-") => 0,
        _ => return Err(unknown()),
    };
    let divisor = selector
        .divisor
        .as_ref()
        .and_then(|divisor| quantity::milli(&divisor.0))
        .filter(|divisor| *divisor > 0)
        .unwrap_or(1000);
    Ok(((milli + divisor - 1) / divisor).to_string())
}

fn from_source(
    pod: &Pod,
    container: &Container,
    name: &str,
    source: &EnvVarSource,
    place: &Place,
    lookup: &dyn Lookup,
) -> Result<Option<String>, ConfigError> {
    let namespace = pod.metadata.namespace.clone().unwrap_or_default();
    if let Some(reference) = &source.field_ref {
        return field(pod, &reference.field_path, place).map(Some);
    }
    if let Some(reference) = &source.resource_field_ref {
        return resource(pod, Some(container), reference, place).map(Some);
    }
    if let Some(reference) = &source.config_map_key_ref {
        let optional = reference.optional == Some(true);
        let (name, key) = (reference.name.clone(), reference.key.clone());
        let Some(map) = lookup.config_map(&name) else {
            return if optional { Ok(None) } else { Err(ConfigError::ConfigMapNotFound { name }) };
        };
        return match map.data.as_ref().and_then(|data| data.get(&key)) {
            Some(value) => Ok(Some(value.clone())),
            None if optional => Ok(None),
            None => Err(ConfigError::ConfigMapKey { key, namespace, name }),
        };
    }
    if let Some(reference) = &source.secret_key_ref {
        let optional = reference.optional == Some(true);
        let (name, key) = (reference.name.clone(), reference.key.clone());
        let Some(secret) = lookup.secret(&name) else {
            return if optional { Ok(None) } else { Err(ConfigError::SecretNotFound { name }) };
        };
        return match secret.data.as_ref().and_then(|data| data.get(&key)) {
            Some(value) => Ok(Some(text(&value.0))),
            None if optional => Ok(None),
            None => Err(ConfigError::SecretKey { key, namespace, name }),
        };
    }
    Err(ConfigError::Source { name: name.to_owned() })
}

/// Variables in the order in which they were first set; the last value wins.
#[derive(Default)]
struct Variables {
    order: Vec<String>,
    values: BTreeMap<String, String>,
}

impl Variables {
    fn set(&mut self, name: &str, value: String) {
        if self.values.insert(name.to_owned(), value).is_none() {
            self.order.push(name.to_owned());
        }
    }
}

fn is_variable_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b'=')
}

/// Prints a map as the files of a `downwardAPI` volume have it.
fn lines(map: &Option<BTreeMap<String, String>>) -> String {
    let entries = map.iter().flatten();
    entries.map(|(key, value)| format!("{key}={value:?}")).collect::<Vec<_>>().join("\n")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Objects by name.
    #[derive(Default)]
    pub(crate) struct Objects {
        pub(crate) config_maps: BTreeMap<String, Value>,
        pub(crate) secrets: BTreeMap<String, Value>,
    }

    impl Lookup for Objects {
        fn config_map(&self, name: &str) -> Option<Arc<ConfigMap>> {
            let value = self.config_maps.get(name)?.clone();
            Some(Arc::new(serde_json::from_value(value).expect("config map parses")))
        }

        fn secret(&self, name: &str) -> Option<Arc<Secret>> {
            let value = self.secrets.get(name)?.clone();
            Some(Arc::new(serde_json::from_value(value).expect("secret parses")))
        }
    }

    fn objects() -> Objects {
        Objects {
            config_maps: [("c".to_owned(), json!({"data": {"K": "v", "bad=key": "x"}}))].into(),
            secrets: [("s".to_owned(), json!({"data": {"P": "cHc="}}))].into(),
        }
    }

    fn run(container: Value) -> Result<Environment, ConfigError> {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {"app": "web"}},
            "spec": {"serviceAccountName": "sa", "containers": [container]},
        }))
        .expect("pod parses");
        let place = Place {
            node_name: "edge-1".to_owned(),
            host_ip: Some("192.168.1.5".to_owned()),
            pod_ips: vec!["10.0.0.2".to_owned()],
            cpu_milli: 2000,
            memory_bytes: 1 << 30,
        };
        let container = &pod.spec.as_ref().expect("has a spec").containers[0];
        environment(&pod, container, &place, &objects(), &[("FIRST".into(), "1".into())])
    }

    fn container(env: Value, env_from: Value) -> Value {
        json!({"name": "a", "env": env, "envFrom": env_from,
            "resources": {"limits": {"cpu": "250m"}, "requests": {"memory": "1Mi"}}})
    }

    #[track_caller]
    fn check(env: Value, expected: &[(&str, &str)]) {
        let found = run(container(env, json!([]))).expect("environment");
        let found: Vec<(&str, &str)> = found
            .variables
            .iter()
            .skip(1)
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn values_are_expanded_from_variables_defined_before() {
        check(
            json!([{"name": "A", "value": "1"}, {"name": "B", "value": "$(A)$(C)$$(A)$"},
                   {"name": "C", "value": "$(FIRST"}]),
            &[("A", "1"), ("B", "1$(C)$(A)$"), ("C", "$(FIRST")],
        );
    }

    #[test]
    fn fields_and_resources_of_the_pod_are_exposed() {
        let field = |path| json!({"fieldRef": {"fieldPath": path}});
        let resource = |name, divisor| {
            json!({
                "resourceFieldRef": {"resource": name, "divisor": divisor},
            })
        };
        for (source, expected) in [
            (field("metadata.name"), "p"),
            (field("metadata.labels['app']"), "web"),
            (field("metadata.annotations['none']"), ""),
            (field("spec.nodeName"), "edge-1"),
            (field("spec.serviceAccountName"), "sa"),
            (field("status.podIP"), "10.0.0.2"),
            (field("status.hostIP"), "192.168.1.5"),
            (resource("limits.cpu", "0"), "1"),
            (resource("limits.cpu", "1m"), "250"),
            (resource("limits.memory", "1Mi"), "1024"),
            (resource("requests.memory", "1Ki"), "1024"),
        ] {
            check(json!([{"name": "A", "valueFrom": source}]), &[("A", expected)]);
        }
    }

    #[test]
    fn env_from_comes_first_with_its_prefix_and_leaves_bad_names_out() {
        let from = json!([{"prefix": "X_", "configMapRef": {"name": "c"}},
                          {"secretRef": {"name": "s"}}]);
        let found = run(container(json!([{"name": "P", "value": "later"}]), from)).expect("env");
        assert_eq!(
            found.variables[1..],
            [("X_K".to_owned(), "v".to_owned()), ("P".to_owned(), "later".to_owned())]
        );
        assert_eq!(found.skipped[0].keys, ["X_bad=key"]);
        assert_eq!(found.skipped[0].source, "ConfigMap n/c");
    }

    #[test]
    fn what_is_missing_is_named_as_kubelet_names_it() {
        let config_map = |name, key| json!({"configMapKeyRef": {"name": name, "key": key}});
        for (source, expected) in [
            (config_map("none", "K"), "configmap \"none\" not found"),
            (config_map("c", "none"), "couldn't find key none in ConfigMap n/c"),
            (
                json!({"secretKeyRef": {"name": "s", "key": "none"}}),
                "couldn't find key none in Secret n/s",
            ),
        ] {
            let env = json!([{"name": "A", "valueFrom": source}]);
            let error = run(container(env, json!([]))).expect_err("must fail");
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn optional_sources_that_are_missing_set_nothing() {
        check(
            json!([{"name": "A", "valueFrom":
                {"secretKeyRef": {"name": "none", "key": "k", "optional": true}}}]),
            &[],
        );
    }
}
