//! The files that change hands: certificates and databases. Each is written whole or not at all, for root alone.

use super::AdoptError;
use crate::config::Config;
use crate::kubeedge::KubeEdge;
use crate::tls::Identity;
use skerry_protocol::enrol::common_name;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// KubeEdge's CA, and the node's identity; `None` when a file is missing.
pub(super) fn read_credentials(
    kubeedge: &KubeEdge,
    node: &str,
) -> Result<Option<(String, Identity)>, AdoptError> {
    let (Some(ca), Some(certificate), Some(key)) = (
        read_text(&kubeedge.ca_file)?,
        read_text(&kubeedge.certificate_file)?,
        read_text(&kubeedge.key_file)?,
    ) else {
        return Ok(None);
    };
    let path = &kubeedge.certificate_file;
    let bad = |reason| AdoptError::Certificate { path: path.clone(), node: node.into(), reason };
    let pem = format!("{}\n{}\n", key.trim_end(), certificate.trim_end());
    let identity = Identity::parse(path, pem).map_err(|error| bad(error.to_string()))?;
    if identity.common_name != common_name(node) {
        return Err(bad(format!("its subject is `{}`", identity.common_name)));
    }
    Ok(Some((ca, identity)))
}

pub(super) fn read_own_credentials(
    config: &Config,
) -> Result<Option<(String, Identity)>, AdoptError> {
    let path = config.pki().join("edge.pem");
    let (Some(ca), Some(pem)) = (read_text(&config.pki().join("ca.crt"))?, read_text(&path)?)
    else {
        return Ok(None);
    };
    Ok(Identity::parse(&path, pem).ok().map(|identity| (ca, identity)))
}

pub(super) fn read_text(path: &Path) -> Result<Option<String>, AdoptError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(AdoptError::File { path: path.to_owned(), source }),
    }
}

/// The blocks of a PEM text: the key, and the certificates.
pub(super) fn split_pem(pem: &str) -> (String, String) {
    let (mut keys, mut certificates) = (String::new(), String::new());
    let mut into = None;
    for line in pem.lines() {
        if let Some(label) = line.strip_prefix("-----BEGIN ") {
            into = Some(label.contains("CERTIFICATE"));
        }
        if let Some(certificate) = into {
            let text = if certificate { &mut certificates } else { &mut keys };
            text.push_str(line);
            text.push('\n');
        }
        if line.starts_with("-----END ") {
            into = None;
        }
    }
    (keys, certificates)
}

pub(super) fn scratch_directory() -> Result<PathBuf, AdoptError> {
    let path = std::env::temp_dir().join(format!("skerry-adopt-{}", uuid::Uuid::new_v4().simple()));
    let made = fs::DirBuilder::new().mode(0o700).create(&path);
    made.map_err(|source| AdoptError::File { path: path.clone(), source })?;
    Ok(path)
}

pub(super) fn copy_database(path: &Path, scratch: &Path) -> Result<PathBuf, AdoptError> {
    let copy = scratch.join("copy.db");
    fs::copy(path, &copy).map_err(|source| AdoptError::File { path: path.to_owned(), source })?;
    for suffix in ["-journal", "-wal"] {
        let beside = suffixed(path, suffix);
        if beside.exists() {
            fs::copy(&beside, suffixed(&copy, suffix))
                .map_err(|source| AdoptError::File { path: beside.clone(), source })?;
        }
    }
    Ok(copy)
}

pub(super) fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

pub(super) fn make_directory(path: &Path) -> Result<(), AdoptError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| AdoptError::File { path: path.to_owned(), source })
}

/// Writes a file for root alone, whole or not at all.
pub(super) fn write_file(path: &Path, text: &str) -> Result<(), AdoptError> {
    let next = path.with_extension("next");
    let write = || -> std::io::Result<()> {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&next)?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|source| AdoptError::File { path: path.to_owned(), source })?;
    rename(&next, path)
}

pub(super) fn rename(from: &Path, to: &Path) -> Result<(), AdoptError> {
    let rename = || -> std::io::Result<()> {
        fs::rename(from, to)?;
        fs::File::open(to.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    rename().map_err(|source| AdoptError::File { path: to.to_owned(), source })
}
