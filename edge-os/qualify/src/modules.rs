//! The modules that a system could load: names, files and what is built in, from a folder `lib/modules/<release>`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Most files of modules in one folder; Debian's generic kernel has 4,230.
pub const MODULES_MAX: usize = 50_000;

/// Modules by name, `-` written as `_`.
#[derive(Debug, Clone, Default)]
pub struct Modules {
    files: BTreeMap<String, String>,
    place: PathBuf,
}

/// Why there are none.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// The folder cannot be read.
    #[error("could not read modules in `{path}`: {source}")]
    Read {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Several releases, and nobody said which.
    #[error("`{path}` has modules of several kernels: {}; hint: name one of these folders", releases.join(", "))]
    Several {
        /// The folder.
        path: PathBuf,
        /// The releases.
        releases: Vec<String>,
    },
    /// No module at all.
    #[error(
        "no modules in `{0}`; hint: give `/lib/modules/<release>`, or the root of a mounted image"
    )]
    Nothing(PathBuf),
}

impl Modules {
    /// Reads the modules of `folder`: `lib/modules/<release>` itself, `lib/modules`, or the root of a mounted image.
    ///
    /// # Errors
    ///
    /// [`ModulesError`].
    pub fn read(folder: &Path) -> Result<Self, ModulesError> {
        let place = Self::release_folder(folder)?;
        let mut modules = Self { files: BTreeMap::new(), place: place.clone() };
        for list in ["modules.builtin", "modules.dep"] {
            // Either may be absent: an image that was never booted has no modules.dep.
            let text = std::fs::read_to_string(place.join(list)).unwrap_or_default();
            for line in text.lines() {
                let file = line.split(':').next().unwrap_or_default().trim();
                modules.add(file);
            }
        }
        if modules.files.is_empty() {
            modules.walk(&place, 0)?;
        }
        match modules.files.is_empty() {
            true => Err(ModulesError::Nothing(folder.into())),
            false => Ok(modules),
        }
    }

    fn release_folder(folder: &Path) -> Result<PathBuf, ModulesError> {
        let is_one = |path: &Path| {
            ["modules.dep", "modules.builtin", "kernel"].iter().any(|name| path.join(name).exists())
        };
        if is_one(folder) {
            return Ok(folder.into());
        }
        for under in ["", "lib/modules", "usr/lib/modules"] {
            let path = folder.join(under);
            let Ok(entries) = std::fs::read_dir(&path) else { continue };
            let folders = entries.filter_map(Result::ok).map(|entry| entry.path());
            let mut found: Vec<PathBuf> = folders.filter(|path| is_one(path)).collect();
            found.sort();
            match found.len() {
                0 => {}
                1 => return Ok(found.remove(0)),
                _ => {
                    let name = |path: &PathBuf| {
                        path.file_name().unwrap_or_default().to_string_lossy().into_owned()
                    };
                    let releases = found.iter().map(name).collect();
                    return Err(ModulesError::Several { path, releases });
                }
            }
        }
        std::fs::read_dir(folder)
            .map_err(|source| ModulesError::Read { path: folder.into(), source })?;
        Err(ModulesError::Nothing(folder.into()))
    }

    fn walk(&mut self, folder: &Path, depth: usize) -> Result<(), ModulesError> {
        let read = |source| ModulesError::Read { path: folder.into(), source };
        for entry in std::fs::read_dir(folder).map_err(read)? {
            let entry = entry.map_err(read)?;
            let kind = entry.file_type().map_err(read)?;
            // Links (`build`, `source`) lead out of the folder.
            if kind.is_dir() && depth < 12 {
                self.walk(&entry.path(), depth + 1)?;
            } else if kind.is_file() {
                let path = entry.path();
                let file =
                    path.strip_prefix(&self.place).unwrap_or(&path).to_string_lossy().into_owned();
                self.add(&file);
            }
        }
        Ok(())
    }

    fn add(&mut self, file: &str) {
        let name = file.rsplit('/').next().unwrap_or_default();
        let Some((name, ending)) = name.split_once(".ko") else { return };
        if !matches!(ending, "" | ".xz" | ".zst" | ".gz") || self.files.len() >= MODULES_MAX {
            return;
        }
        self.files.insert(name.replace('-', "_"), file.into());
    }

    /// The file of a module; `-` and `_` are the same.
    pub fn find(&self, name: &str) -> Option<&str> {
        self.files.get(&name.replace('-', "_")).map(String::as_str)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.files.len()
    }

    /// The folder.
    pub fn place(&self) -> String {
        self.place.display().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_found_by_name_in_a_mounted_image() {
        let root = tempfile::tempdir().expect("folder");
        let place = root.path().join("usr/lib/modules/6.12.1/kernel/net");
        std::fs::create_dir_all(&place).expect("folder");
        std::fs::write(place.join("br-net.ko.xz"), "").expect("file");
        std::fs::write(place.join("notes.txt"), "").expect("file");
        let modules = Modules::read(root.path()).expect("modules");
        assert_eq!(modules.count(), 1);
        assert_eq!(modules.find("br_net"), Some("kernel/net/br-net.ko.xz"));
        std::fs::create_dir_all(root.path().join("usr/lib/modules/6.1.9/kernel")).expect("folder");
        let error = Modules::read(root.path()).expect_err("two").to_string();
        assert!(error.contains("6.1.9, 6.12.1"), "{error}");
        let empty = tempfile::tempdir().expect("folder");
        assert!(matches!(Modules::read(empty.path()), Err(ModulesError::Nothing(_))));
    }
}
