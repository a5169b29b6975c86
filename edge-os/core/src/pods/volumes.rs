//! The volumes of a pod: what files they hold, and where containers see them.
//!
//! [`plan`] turns a volume into a [`Source`] that the shell only has to write or bind;
//! [`references`] says which objects a pod needs.
//!
//! Source: kubernetes/kubernetes pkg/volume/{configmap,secret,projected,downwardapi,hostpath,
//! emptydir}.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{
    Container, DownwardAPIVolumeFile, KeyToPath, Pod, PodSpec, Volume, VolumeMount,
};

use super::env::{self, ConfigError, Lookup, Place, expand};
use super::{init_containers, quantity};

/// Mode of files when a volume says nothing.
const MODE_DEFAULT: u32 = 0o644;
/// Lifetime of a token when a volume says nothing, in seconds.
const TOKEN_SECONDS_DEFAULT: i64 = 3600;
/// Bytes of a ConfigMap or Secret are bounded by the API; a projected volume joins several.
const FILES_BYTES_MAX: usize = 64 << 20;

/// What a volume is on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A directory that lives as long as the pod.
    EmptyDir {
        /// In memory, of at most this many bytes (0 for no bound of its own).
        memory: Option<u64>,
    },
    /// A path of the node.
    HostPath { path: String, kind: HostPathKind },
    /// Files that the agent writes and keeps fresh.
    Files(Files),
}

/// What has to be, or is made, at a host path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostPathKind {
    Unchecked,
    DirectoryOrCreate,
    Directory,
    FileOrCreate,
    File,
    Socket,
    CharDevice,
    BlockDevice,
}

/// The content of a volume that the agent writes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Files {
    /// Folder name of the plugin, `kubernetes.io~configmap`.
    pub plugin: &'static str,
    /// Whether the content must not reach a disk.
    pub in_memory: bool,
    /// By path inside the volume.
    pub files: BTreeMap<String, File>,
    /// Tokens to be written beside them, by path.
    pub tokens: BTreeMap<String, TokenFile>,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    pub bytes: Vec<u8>,
    pub mode: u32,
}

/// A file that holds a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenFile {
    pub audience: Option<String>,
    pub expiration_seconds: i64,
    pub mode: u32,
}

/// Why a volume cannot be set up; the message is what users see after the volume's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    #[error("configmap \"{name}\" not found")]
    ConfigMapNotFound { name: String },
    #[error("secret \"{name}\" not found")]
    SecretNotFound { name: String },
    #[error("configmap references non-existent config key: {key}")]
    ConfigMapKey { key: String },
    #[error("references non-existent secret key: {key}")]
    SecretKey { key: String },
    #[error("path `{path}` leads out of the volume")]
    Path { path: String },
    #[error("content is larger than {FILES_BYTES_MAX} bytes")]
    TooLarge,
    #[error("unknown hostPath type `{kind}`")]
    HostPathType { kind: String },
    #[error("volume type `{kind}` is not supported on this node")]
    Unsupported { kind: String },
    #[error(transparent)]
    Field(#[from] ConfigError),
}

/// Returns what a volume of the pod is.
pub fn plan(
    pod: &Pod,
    volume: &Volume,
    place: &Place,
    lookup: &dyn Lookup,
) -> Result<Source, VolumeError> {
    if let Some(empty) = &volume.empty_dir {
        let limit = empty.size_limit.as_ref().and_then(|limit| quantity::value(&limit.0));
        let limit = limit.and_then(|bytes| u64::try_from(bytes).ok()).filter(|bytes| *bytes > 0);
        return match empty.medium.as_deref().unwrap_or_default() {
            "" => Ok(Source::EmptyDir { memory: None }),
            "Memory" => {
                let bound = memory_bound(pod, place);
                let bytes = limit.map_or(bound, |limit| limit.min(bound));
                Ok(Source::EmptyDir { memory: Some(bytes) })
            }
            medium => Err(unsupported(&format!("emptyDir with medium {medium}"))),
        };
    }
    if let Some(host) = &volume.host_path {
        let kind = match host.type_.as_deref().unwrap_or_default() {
            "" => HostPathKind::Unchecked,
            "DirectoryOrCreate" => HostPathKind::DirectoryOrCreate,
            "Directory" => HostPathKind::Directory,
            "FileOrCreate" => HostPathKind::FileOrCreate,
            "File" => HostPathKind::File,
            "Socket" => HostPathKind::Socket,
            "CharDevice" => HostPathKind::CharDevice,
            "BlockDevice" => HostPathKind::BlockDevice,
            kind => return Err(VolumeError::HostPathType { kind: kind.to_owned() }),
        };
        return Ok(Source::HostPath { path: host.path.clone(), kind });
    }
    let mut files = Files::default();
    if let Some(source) = &volume.config_map {
        files.plugin = "kubernetes.io~configmap";
        let mode = mode(source.default_mode);
        let optional = source.optional == Some(true);
        add_config_map(&mut files, &source.name, source.items.as_deref(), mode, optional, lookup)?;
    } else if let Some(source) = &volume.secret {
        files.plugin = "kubernetes.io~secret";
        files.in_memory = true;
        let mode = mode(source.default_mode);
        let optional = source.optional == Some(true);
        let name = source.secret_name.as_deref().unwrap_or_default();
        add_secret(&mut files, name, source.items.as_deref(), mode, optional, lookup)?;
    } else if let Some(source) = &volume.downward_api {
        files.plugin = "kubernetes.io~downward-api";
        files.in_memory = true;
        let mode = mode(source.default_mode);
        add_downward(&mut files, pod, source.items.as_deref(), mode, place)?;
    } else if let Some(source) = &volume.projected {
        files.plugin = "kubernetes.io~projected";
        files.in_memory = true;
        let mode = mode(source.default_mode);
        for part in source.sources.as_deref().unwrap_or_default() {
            if let Some(map) = &part.config_map {
                let optional = map.optional == Some(true);
                let items = map.items.as_deref();
                add_config_map(&mut files, &map.name, items, mode, optional, lookup)?;
            } else if let Some(secret) = &part.secret {
                let optional = secret.optional == Some(true);
                let items = secret.items.as_deref();
                add_secret(&mut files, &secret.name, items, mode, optional, lookup)?;
            } else if let Some(downward) = &part.downward_api {
                add_downward(&mut files, pod, downward.items.as_deref(), mode, place)?;
            } else if let Some(token) = &part.service_account_token {
                let file = TokenFile {
                    audience: token.audience.clone().filter(|audience| !audience.is_empty()),
                    expiration_seconds: token.expiration_seconds.unwrap_or(TOKEN_SECONDS_DEFAULT),
                    mode,
                };
                files.tokens.insert(clean_path(&token.path)?, file);
            } else {
                return Err(unsupported("projected clusterTrustBundle or podCertificate"));
            }
        }
    } else {
        return Err(unsupported(kind_of(volume)));
    }
    if files.files.values().map(|file| file.bytes.len()).sum::<usize>() > FILES_BYTES_MAX {
        return Err(VolumeError::TooLarge);
    }
    Ok(Source::Files(files))
}

/// An object that a pod refers to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reference {
    ConfigMap(String),
    Secret(String),
}

/// Returns the objects of its namespace that the pod needs: volumes, environment, pull secrets.
pub fn references(pod: &Pod) -> BTreeSet<Reference> {
    let mut found = BTreeSet::new();
    let Some(spec) = &pod.spec else { return found };
    let config_map = |name: &str| Reference::ConfigMap(name.to_owned());
    let secret = |name: &str| Reference::Secret(name.to_owned());
    for volume in spec.volumes.as_deref().unwrap_or_default() {
        found.extend(volume.config_map.iter().map(|source| config_map(&source.name)));
        let secret_name = volume.secret.as_ref().and_then(|source| source.secret_name.as_deref());
        found.extend(secret_name.map(secret));
        let parts = volume.projected.iter().flat_map(|all| all.sources.iter().flatten());
        for part in parts {
            found.extend(part.config_map.iter().map(|source| config_map(&source.name)));
            found.extend(part.secret.iter().map(|source| secret(&source.name)));
        }
    }
    for container in init_containers(spec).iter().chain(&spec.containers) {
        for from in container.env_from.iter().flatten() {
            found.extend(from.config_map_ref.iter().map(|source| config_map(&source.name)));
            found.extend(from.secret_ref.iter().map(|source| secret(&source.name)));
        }
        let sources = container.env.iter().flatten().filter_map(|env| env.value_from.as_ref());
        for source in sources {
            let key = source.config_map_key_ref.iter();
            found.extend(key.map(|source| config_map(&source.name)));
            found.extend(source.secret_key_ref.iter().map(|source| secret(&source.name)));
        }
    }
    let pull = spec.image_pull_secrets.iter().flatten();
    found.extend(pull.map(|source| secret(&source.name)));
    found.retain(|reference| match reference {
        Reference::ConfigMap(name) | Reference::Secret(name) => !name.is_empty(),
    });
    found
}

/// Where in a volume a mount begins.
///
/// # Errors
///
/// A path that is absolute or leaves the volume.
pub fn sub_path(
    mount: &VolumeMount,
    variables: &BTreeMap<String, String>,
) -> Result<Option<String>, VolumeError> {
    let path = match (mount.sub_path.as_deref(), mount.sub_path_expr.as_deref()) {
        (Some(path), _) if !path.is_empty() => path.to_owned(),
        (_, Some(text)) if !text.is_empty() => expand(text, variables),
        _ => return Ok(None),
    };
    clean_path(&path).map(Some)
}

/// Names the volumes that some container of the pod mounts.
pub fn mounted(spec: &PodSpec) -> BTreeSet<&str> {
    let containers = init_containers(spec).iter().chain(&spec.containers);
    let mounts = containers.flat_map(|container: &Container| container.volume_mounts.iter());
    mounts.flatten().map(|mount| mount.name.as_str()).collect()
}

/// Checks a path inside a volume: relative, and never upwards.
pub fn clean_path(path: &str) -> Result<String, VolumeError> {
    let bad = || VolumeError::Path { path: path.to_owned() };
    if path.is_empty() || path.starts_with('/') || path.contains('\0') {
        return Err(bad());
    }
    let parts: Vec<&str> =
        path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.is_empty() || parts.contains(&"..") {
        return Err(bad());
    }
    Ok(parts.join("/"))
}

fn add_config_map(
    files: &mut Files,
    name: &str,
    items: Option<&[KeyToPath]>,
    mode: u32,
    optional: bool,
    lookup: &dyn Lookup,
) -> Result<(), VolumeError> {
    let Some(map) = lookup.config_map(name) else {
        let name = name.to_owned();
        return if optional { Ok(()) } else { Err(VolumeError::ConfigMapNotFound { name }) };
    };
    let text = map.data.iter().flatten().map(|(key, value)| (key, value.as_bytes()));
    let binary = map.binary_data.iter().flatten().map(|(key, value)| (key, value.0.as_slice()));
    let data: BTreeMap<&String, &[u8]> = text.chain(binary).collect();
    add_keys(files, &data, items, mode, optional, |key| VolumeError::ConfigMapKey { key })
}

fn add_secret(
    files: &mut Files,
    name: &str,
    items: Option<&[KeyToPath]>,
    mode: u32,
    optional: bool,
    lookup: &dyn Lookup,
) -> Result<(), VolumeError> {
    let Some(secret) = lookup.secret(name) else {
        let name = name.to_owned();
        return if optional { Ok(()) } else { Err(VolumeError::SecretNotFound { name }) };
    };
    let bytes = |(key, value): (_, &ByteString)| (key, value.0.clone());
    let data: BTreeMap<&String, Vec<u8>> = secret.data.iter().flatten().map(bytes).collect();
    let data = data.iter().map(|(key, value)| (*key, value.as_slice())).collect();
    add_keys(files, &data, items, mode, optional, |key| VolumeError::SecretKey { key })
}

fn add_keys(
    files: &mut Files,
    data: &BTreeMap<&String, &[u8]>,
    items: Option<&[KeyToPath]>,
    mode: u32,
    optional: bool,
    missing: impl Fn(String) -> VolumeError,
) -> Result<(), VolumeError> {
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        for (key, bytes) in data {
            let file = File { bytes: bytes.to_vec(), mode };
            files.files.insert(clean_path(key)?, file);
        }
        return Ok(());
    };
    for item in items {
        match data.get(&item.key) {
            Some(bytes) => {
                let mode = item.mode.map_or(mode, bits);
                files.files.insert(clean_path(&item.path)?, File { bytes: bytes.to_vec(), mode });
            }
            None if optional => {}
            None => return Err(missing(item.key.clone())),
        }
    }
    Ok(())
}

fn add_downward(
    files: &mut Files,
    pod: &Pod,
    items: Option<&[DownwardAPIVolumeFile]>,
    mode: u32,
    place: &Place,
) -> Result<(), VolumeError> {
    for item in items.unwrap_or_default() {
        let value = if let Some(field) = &item.field_ref {
            env::field(pod, &field.field_path, place)?
        } else if let Some(resource) = &item.resource_field_ref {
            env::resource(pod, None, resource, place)?
        } else {
            String::new()
        };
        let mode = item.mode.map_or(mode, bits);
        let file = File { bytes: value.into_bytes(), mode };
        files.files.insert(clean_path(&item.path)?, file);
    }
    Ok(())
}

/// Bytes that an in-memory volume may hold: what the pod's containers may, else the node's memory.
fn memory_bound(pod: &Pod, place: &Place) -> u64 {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let limits: Option<Vec<i128>> =
        containers.map(|container| quantity::limit_milli(container, "memory")).collect();
    let bound = limits
        .map(|limits| limits.into_iter().map(|milli| milli / 1000).sum::<i128>())
        .and_then(|bytes| u64::try_from(bytes).ok())
        .filter(|bytes| *bytes > 0);
    bound.unwrap_or(place.memory_bytes)
}

fn mode(mode: Option<i32>) -> u32 {
    mode.map_or(MODE_DEFAULT, bits)
}

fn bits(mode: i32) -> u32 {
    u32::try_from(mode).map_or(MODE_DEFAULT, |mode| mode & 0o777)
}

fn unsupported(kind: &str) -> VolumeError {
    VolumeError::Unsupported { kind: kind.to_owned() }
}

fn kind_of(volume: &Volume) -> &'static str {
    let kinds = [
        (volume.persistent_volume_claim.is_some(), "persistentVolumeClaim"),
        (volume.csi.is_some(), "csi"),
        (volume.ephemeral.is_some(), "ephemeral"),
        (volume.nfs.is_some(), "nfs"),
        (volume.image.is_some(), "image"),
        (volume.iscsi.is_some(), "iscsi"),
    ];
    kinds.into_iter().find(|(is, _)| *is).map_or("unknown", |(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::env::tests::Objects;
    use super::*;

    fn objects() -> Objects {
        Objects {
            config_maps: [(
                "c".to_owned(),
                json!({"data": {"a.conf": "A", "b.conf": "B"}, "binaryData": {"z": "AAE="}}),
            )]
            .into(),
            secrets: [("s".to_owned(), json!({"data": {"key": "cHc="}}))].into(),
        }
    }

    fn run(volume: Value) -> Result<Source, VolumeError> {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u",
                         "labels": {"a": "1", "b": "x\"y"}},
            "spec": {"containers": [
                {"name": "a", "resources": {"limits": {"memory": "32Mi"}}}]},
        }))
        .expect("pod parses");
        let mut volume = volume;
        volume["name"] = json!("v");
        let volume: Volume = serde_json::from_value(volume).expect("volume parses");
        let place = Place { memory_bytes: 1 << 30, ..Default::default() };
        plan(&pod, &volume, &place, &objects())
    }

    /// `path=content(mode)` for each file.
    #[track_caller]
    fn check(volume: Value, expected: &str) {
        let text = match run(volume) {
            Err(error) => error.to_string(),
            Ok(Source::Files(files)) => {
                let files = files.files.iter().map(|(path, file)| {
                    let content = String::from_utf8_lossy(&file.bytes).escape_debug().to_string();
                    format!("{path}={content}({:o})", file.mode)
                });
                files.collect::<Vec<_>>().join(" ")
            }
            Ok(other) => format!("{other:?}"),
        };
        assert_eq!(text, expected);
    }

    #[test]
    fn config_maps_and_secrets_become_files() {
        check(json!({"configMap": {"name": "c"}}), "a.conf=A(644) b.conf=B(644) z=\\0\\u{1}(644)");
        check(
            json!({"configMap": {"name": "c", "defaultMode": 256, "items": [
                {"key": "a.conf", "path": "x/y"}, {"key": "b.conf", "path": "b", "mode": 511}]}}),
            "b=B(777) x/y=A(400)",
        );
        check(json!({"secret": {"secretName": "s"}}), "key=pw(644)");
        check(
            json!({"downwardAPI": {"items": [
                {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}}),
            "labels=a=\\\"1\\\"\\nb=\\\"x\\\\\\\"y\\\"(644)",
        );
        check(
            json!({"projected": {"sources": [
                {"configMap": {"name": "c", "items": [{"key": "a.conf", "path": "a"}]}},
                {"secret": {"name": "s"}}]}}),
            "a=A(644) key=pw(644)",
        );
    }

    #[test]
    fn what_is_missing_or_unsafe_is_an_error() {
        for (volume, expected) in [
            (json!({"configMap": {"name": "none"}}), "configmap \"none\" not found"),
            (json!({"secret": {"secretName": "none"}}), "secret \"none\" not found"),
            (
                json!({"configMap": {"name": "c", "items": [{"key": "k", "path": "p"}]}}),
                "configmap references non-existent config key: k",
            ),
            (
                json!({"secret": {"secretName": "s", "items": [{"key": "k", "path": "p"}]}}),
                "references non-existent secret key: k",
            ),
            (
                json!({"configMap": {"name": "c", "items": [{"key": "a.conf", "path": "../p"}]}}),
                "path `../p` leads out of the volume",
            ),
            (
                json!({"persistentVolumeClaim": {"claimName": "x"}}),
                "volume type `persistentVolumeClaim` is not supported on this node",
            ),
        ] {
            check(volume, expected);
        }
        check(json!({"configMap": {"name": "none", "optional": true}}), "");
    }

    #[test]
    fn memory_volume_is_bounded_by_its_limit_or_the_containers() {
        let size = |volume| match run(volume).expect("plans") {
            Source::EmptyDir { memory } => memory,
            other => panic!("not an empty directory: {other:?}"),
        };
        assert_eq!(size(json!({"emptyDir": {}})), None);
        let limit = json!({"emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}});
        assert_eq!(size(limit), Some(1 << 20));
        let large = json!({"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}});
        assert_eq!(size(large), Some(32 << 20));
        assert_eq!(size(json!({"emptyDir": {"medium": "Memory"}})), Some(32 << 20));
    }

    #[test]
    fn references_name_every_object_that_a_pod_needs() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {}, "spec": {
                "imagePullSecrets": [{"name": "pull"}],
                "volumes": [
                    {"name": "v", "configMap": {"name": "c1"}},
                    {"name": "w", "projected": {"sources": [{"secret": {"name": "s1"}}]}}],
                "containers": [{"name": "a",
                    "envFrom": [{"configMapRef": {"name": "c2"}}],
                    "env": [{"name": "E", "valueFrom":
                        {"secretKeyRef": {"name": "s2", "key": "k"}}}]}]},
        }))
        .expect("pod parses");
        let names: Vec<String> =
            references(&pod).iter().map(|reference| format!("{reference:?}")).collect();
        assert_eq!(
            names.join(" "),
            "ConfigMap(\"c1\") ConfigMap(\"c2\") Secret(\"pull\") Secret(\"s1\") Secret(\"s2\")"
        );
    }
}
