//! UEFI firmware for machines: OVMF, as Debian packs it.
//!
//! The one of Debian 13 starts the loader in half the time of Debian 12's, so the folder that the caller names comes
//! first and this machine's own is the last resort.

use anyhow::{Result, bail};
use std::path::{Path, PathBuf};

/// Where Debian's package puts the files.
const SYSTEM: &str = "/usr/share/OVMF";

/// The files of one firmware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firmware {
    /// The program, without Secure Boot.
    pub code: PathBuf,
    /// An empty variable store.
    pub vars: PathBuf,
    /// The program that can enforce Secure Boot; needs system management mode.
    pub secure_code: Option<PathBuf>,
}

/// Looks below the folders, then at this machine's own.
pub fn find(folders: &[PathBuf]) -> Result<Firmware> {
    let places = folders
        .iter()
        .flat_map(|folder| [folder.clone(), folder.join("usr/share/OVMF"), folder.join("OVMF")]);
    let mut seen = Vec::new();
    for place in places.chain([PathBuf::from(SYSTEM)]) {
        if let Some(firmware) = at(&place) {
            return Ok(firmware);
        }
        seen.push(place.display().to_string());
    }
    bail!(
        "no UEFI firmware in {}\nhint: install the Debian package ovmf, or name a folder with --firmware",
        seen.join(", ")
    )
}

fn at(folder: &Path) -> Option<Firmware> {
    let file = |name: &str| Some(folder.join(name)).filter(|file| file.is_file());
    Some(Firmware {
        code: file("OVMF_CODE_4M.fd")?,
        vars: file("OVMF_VARS_4M.fd")?,
        secure_code: file("OVMF_CODE_4M.secboot.fd"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firmware_is_found_in_an_unpacked_package() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("usr/share/OVMF");
        std::fs::create_dir_all(&inner).unwrap();
        std::fs::write(inner.join("OVMF_CODE_4M.fd"), "").unwrap();
        assert_eq!(at(&inner), None);
        std::fs::write(inner.join("OVMF_VARS_4M.fd"), "").unwrap();
        let firmware = find(&[folder.path().into()]).unwrap();
        assert_eq!(firmware.code, inner.join("OVMF_CODE_4M.fd"));
        assert_eq!(firmware.secure_code, None);
    }
}
