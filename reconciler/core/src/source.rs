//! The files of one commit or one folder, as a value.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Largest file that is read: 1 MiB, the size at which an API server refuses an object anyway.
pub const FILE_MAX: usize = 1 << 20;
/// Largest sum over all files: 64 MiB, so that a wrong remote cannot fill the memory.
pub const SOURCE_MAX: usize = 64 << 20;

/// Folders that belong to the fleet format; everything else in a repository is ignored.
const FOLDERS: [&str; 6] = ["sites/", "apps/", "devices/", "os/", "profiles/", "secrets/"];
/// Folder of a fleet's own profiles for `skerry qualify`, in TOML.
pub(crate) const PROFILES: &str = "profiles/";

/// The files of one commit or one folder: `/`-separated path to content.
#[derive(Debug, Clone, Default)]
pub struct Source {
    files: BTreeMap<String, File>,
    size: usize,
}

#[derive(Debug, Clone)]
pub(crate) enum File {
    Read(Arc<[u8]>),
    /// Known to exist, not read; using it is a problem of whoever names it.
    Unread {
        reason: String,
    },
}

/// Why a [`Source`] could not take one more file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// See [`SOURCE_MAX`].
    #[error("the fleet's files are larger than {} MiB together (reached at `{path}`)", SOURCE_MAX >> 20)]
    TooLarge {
        /// The file that reached the bound.
        path: String,
    },
}

impl Source {
    /// Whether a file with this path is part of the fleet format and has to be read.
    pub fn wants(path: &str) -> bool {
        let yaml = [".yaml", ".yml", ".json"].iter().any(|ending| path.ends_with(ending));
        let profile = path.starts_with(PROFILES) && path.ends_with(".toml");
        let known = || FOLDERS.iter().any(|folder| path.starts_with(folder));
        path == "fleet.yaml" || profile || yaml && known()
    }

    /// Whether a folder at the top of a repository can hold files of the fleet format.
    pub fn wants_folder(name: &str) -> bool {
        FOLDERS.iter().any(|folder| folder.trim_end_matches('/') == name)
    }

    /// Adds a file. One larger than [`FILE_MAX`] is remembered without its content.
    ///
    /// # Errors
    ///
    /// [`SourceError::TooLarge`] when all files together would exceed [`SOURCE_MAX`].
    pub fn insert(
        &mut self,
        path: impl Into<String>,
        content: Arc<[u8]>,
    ) -> Result<(), SourceError> {
        let path = path.into();
        if content.len() > FILE_MAX {
            self.insert_unread(path, too_large(content.len() as u64));
            return Ok(());
        }
        if self.size + content.len() > SOURCE_MAX {
            return Err(SourceError::TooLarge { path });
        }
        self.size += content.len();
        if let Some(File::Read(old)) = self.files.insert(path, File::Read(content)) {
            self.size -= old.len();
        }
        Ok(())
    }

    /// Adds something that is there and was not read: a file above [`FILE_MAX`], a symbolic link, a submodule. Whoever
    /// needs it has a problem then, instead of a render that silently lacks it.
    ///
    /// A path that ends in `/` stands for a folder that could not be entered.
    pub fn insert_unread(&mut self, path: impl Into<String>, reason: impl Into<String>) {
        let file = File::Unread { reason: reason.into() };
        if let Some(File::Read(old)) = self.files.insert(path.into(), file) {
            self.size -= old.len();
        }
    }

    /// Adds a file that was not read because of its `size` in bytes.
    pub fn insert_too_large(&mut self, path: impl Into<String>, size: u64) {
        self.insert_unread(path, too_large(size));
    }

    /// Removes a file; does nothing if it is not there.
    pub fn remove(&mut self, path: &str) {
        if let Some(File::Read(old)) = self.files.remove(path) {
            self.size -= old.len();
        }
    }

    /// Paths of all files, sorted.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    pub(crate) fn get(&self, path: &str) -> Option<&File> {
        self.files.get(path)
    }

    /// Files whose path starts with `prefix`, sorted.
    pub(crate) fn under<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a File)> {
        self.files
            .range(prefix.to_owned()..)
            .take_while(move |(path, _)| path.starts_with(prefix))
            .map(|(path, file)| (path.as_str(), file))
    }
}

fn too_large(size: u64) -> String {
    format!("the file has {size} bytes; at most {FILE_MAX} are read")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_the_fleet_format_are_wanted() {
        for path in [
            "fleet.yaml",
            "sites/a.yaml",
            "apps/web/manifests/x/y.yml",
            "os/stable.yaml",
            "profiles/line-4.toml",
        ] {
            assert!(Source::wants(path), "{path}");
        }
        for path in [
            "README.md",
            "apps/web/README.md",
            "x/fleet.yaml",
            ".github/workflows/ci.yaml",
            "sites/a.txt",
            "sites/a.toml",
        ] {
            assert!(!Source::wants(path), "{path}");
        }
    }

    #[test]
    fn the_sum_of_all_files_is_bounded_and_a_replaced_file_frees_its_share() {
        let mut source = Source::default();
        let content: Arc<[u8]> = vec![b'#'; FILE_MAX].into();
        for index in 0..SOURCE_MAX / FILE_MAX {
            source.insert(format!("apps/{index}.yaml"), content.clone()).unwrap();
        }
        assert!(source.insert("apps/more.yaml", content.clone()).is_err());
        source.remove("apps/0.yaml");
        source.insert("apps/more.yaml", content).unwrap();
        source.insert("apps/huge.yaml", vec![b'#'; FILE_MAX + 1].into()).unwrap();
        assert!(matches!(source.get("apps/huge.yaml"), Some(File::Unread { .. })));
    }
}
