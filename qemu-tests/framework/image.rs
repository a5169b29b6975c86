//! The built image, as a folder of files that `skerry image build` wrote.

use crate::disk::Disk;
use crate::uki::{self, Parts};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Folder of the kernels on the ESP.
pub const UKI_FOLDER: &str = "EFI/Linux";

/// A built image.
#[derive(Debug, Clone)]
pub struct Image {
    /// The bootable disk, raw.
    pub disk: PathBuf,
    /// What the builder says about its files; `null` when the folder has no manifest.
    pub manifest: Value,
}

impl Image {
    /// Opens the folder of a build, or one disk file.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Ok(Self { disk: path.into(), manifest: Value::Null });
        }
        let manifest = match std::fs::read(path.join("manifest.json")) {
            Ok(text) => serde_json::from_slice(&text)
                .with_context(|| format!("{}/manifest.json is not JSON", path.display()))?,
            Err(_) => Value::Null,
        };
        // Earlier versions may lie in the same folder; the manifest is the newest one's.
        let newest = manifest["version"].as_str().map(|it| path.join(format!("skerry-{it}.img")));
        if let Some(disk) = newest.filter(|disk| disk.is_file()) {
            return Ok(Self { disk, manifest });
        }
        let entries = std::fs::read_dir(path)
            .with_context(|| format!("could not read the image folder `{}`", path.display()))?;
        let mut disks: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|file| file.extension().is_some_and(|ext| ext == "img" || ext == "raw"))
            // A part of the update, not a disk.
            .filter(|file| file.file_name().is_none_or(|name| name != "root.img"))
            .collect();
        disks.sort();
        match disks.as_slice() {
            [disk] => Ok(Self { disk: disk.clone(), manifest }),
            [] => bail!(
                "there is no disk image in `{}`\nhint: `cargo xtask image` builds one",
                path.display()
            ),
            _ => bail!("there is more than one disk image in `{}`", path.display()),
        }
    }

    /// The disk, for overlays and copies.
    pub fn base(&self) -> Disk {
        Disk::original(&self.disk)
    }

    /// Name and content of the kernel on the ESP.
    pub fn uki(&self) -> Result<(String, Vec<u8>)> {
        let volume = self.base().volume("esp")?;
        let names = volume.list(UKI_FOLDER)?;
        let name = names.iter().find(|name| name.to_lowercase().ends_with(".efi"));
        let name = name.context("the ESP has no kernel in EFI/Linux")?;
        Ok((name.clone(), volume.read(&format!("{UKI_FOLDER}/{name}"))?))
    }

    /// Kernel, initial file system and command line.
    pub fn parts(&self) -> Result<Parts> {
        uki::parts(&self.uki()?.1)
    }

    /// The version in the kernel's command line.
    pub fn version(&self) -> Result<String> {
        let parts = self.parts()?;
        let mut words = parts.cmdline.split_whitespace();
        let version = words.find_map(|word| word.strip_prefix("skerry.version="));
        Ok(version.context("the kernel's command line names no version")?.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_of_the_manifests_version_is_taken_and_a_part_is_no_disk() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        std::fs::write(file("root.img"), "").unwrap();
        let error = Image::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("no disk image"), "{error}");
        for name in ["skerry-1.img", "skerry-2.img"] {
            std::fs::write(file(name), "").unwrap();
        }
        assert!(Image::open(folder.path()).is_err());
        std::fs::write(file("manifest.json"), r#"{"version": "2"}"#).unwrap();
        assert_eq!(Image::open(folder.path()).unwrap().disk, file("skerry-2.img"));
        assert_eq!(Image::open(&file("skerry-1.img")).unwrap().manifest, Value::Null);
    }
}
