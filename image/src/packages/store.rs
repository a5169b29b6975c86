//! Unpacked packages, kept in the cache under the digest of the package file.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use super::{Cache, Package};
use crate::deb::{self, DebError, Item, Kind};
use crate::tree::{Content, unhex};

/// A package whose files are there to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    pub package: Package,
    /// Folder with the files under their own paths.
    pub folder: PathBuf,
    /// Everything in the package but its documentation, by path without a leading slash.
    pub items: BTreeMap<String, Item>,
}

/// Why a package could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    #[error("could not unpack `{name}` {version}")]
    Deb { name: String, version: String, source: DebError },
    #[error("could not use the cache of unpacked packages")]
    Cache(#[source] io::Error),
}

/// What no image takes along; leaving it out keeps the cache small.
const LEFT_OUT: [&str; 6] = [
    "usr/share/doc/",
    "usr/share/man/",
    "usr/share/locale/",
    "usr/share/lintian/",
    "usr/share/bug/",
    "usr/share/bash-completion/",
];

/// Whether [`unpack`] will find the package unpacked, so that it takes no time.
pub fn is_unpacked(package: &Package, cache: &Cache) -> bool {
    cache.folder().join("unpacked").join(&package.locked.sha256).join("items.json").exists()
}

/// Unpacks a package, or finds it unpacked.
///
/// # Errors
///
/// See [`UnpackError`].
pub fn unpack(package: &Package, cache: &Cache) -> Result<Unpacked, UnpackError> {
    let folder = cache.sub("unpacked").map_err(UnpackError::Cache)?.join(&package.locked.sha256);
    let list = folder.join("items.json");
    let read = fs::read(&list).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let items = match read {
        Some(items) => items,
        None => {
            let scratch = cache.scratch().map_err(UnpackError::Cache)?;
            let wanted = |path: &str| !LEFT_OUT.iter().any(|prefix| path.starts_with(prefix));
            let items = deb::unpack(&package.path, &scratch.path().join("files"), wanted).map_err(
                |source| UnpackError::Deb {
                    name: package.locked.name.clone(),
                    version: package.locked.version.clone(),
                    source,
                },
            )?;
            let finish = || {
                fs::create_dir_all(scratch.path().join("files"))?;
                fs::write(scratch.path().join("items.json"), serde_json::to_vec(&items)?)?;
                if folder.exists() {
                    // Without a list it is of no use; another build may also just have finished the same.
                    fs::remove_dir_all(&folder)?;
                }
                fs::rename(scratch.path(), &folder)
            };
            finish().map_err(UnpackError::Cache)?;
            items
        }
    };
    Ok(Unpacked { package: package.clone(), folder: folder.join("files"), items })
}

impl Unpacked {
    /// The content of a file of the package; `None` when there is no file of that path.
    pub fn content(&self, path: &str) -> Option<Content> {
        match &self.items.get(path)?.kind {
            Kind::File { size, sha256 } => {
                Some(Content::known_file(self.folder.join(path), *size, unhex(sha256)?))
            }
            _ => None,
        }
    }

    /// The path of the file that `path` is or leads to by links inside of the package.
    pub fn resolve(&self, path: &str) -> Option<String> {
        /// Links after which it is a circle.
        const LINKS_MAX: usize = 8;
        let mut path = path.to_owned();
        for _ in 0..LINKS_MAX {
            match &self.items.get(&path)?.kind {
                Kind::File { .. } => return Some(path),
                Kind::Folder => return None,
                Kind::Link(target) => path = join(&path, target)?,
            }
        }
        None
    }
}

/// Where a link at `path` leads; `None` when it leaves the root.
pub(crate) fn join(path: &str, target: &str) -> Option<String> {
    let mut pieces: Vec<&str> = match target.strip_prefix('/') {
        Some(_) => Vec::new(),
        None => path.split('/').collect::<Vec<_>>().split_last().map(|(_, rest)| rest.to_vec())?,
    };
    for piece in target.split('/') {
        match piece {
            "" | "." => {}
            ".." => {
                pieces.pop()?;
            }
            piece => pieces.push(piece),
        }
    }
    Some(pieces.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deb::testing::{Packing, package};
    use crate::packages::{Arch, Locked};

    fn made(folder: &std::path::Path) -> Package {
        let bytes = package(
            &[
                ("usr/lib/liba.so.1.2", 0o644, b"library"),
                ("usr/lib/liba.so.1", 0o777, b"-> liba.so.1.2"),
                ("usr/lib64/a", 0o777, b"-> ../lib/liba.so.1"),
                ("usr/lib/circle", 0o777, b"-> circle"),
                ("usr/share/doc/a/copyright", 0o644, b"text"),
            ],
            Packing::Xz,
        );
        let path = folder.join("a.deb");
        fs::write(&path, bytes).unwrap();
        let locked = Locked {
            for_arch: Arch::Amd64,
            name: "a".to_owned(),
            version: "1".to_owned(),
            arch: "all".to_owned(),
            size: 0,
            sha256: "0".repeat(64),
            kernel: false,
        };
        Package { locked, path }
    }

    #[test]
    fn a_package_is_unpacked_once_and_links_are_followed() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().join("cache")).unwrap();
        let package = made(folder.path());
        let first = unpack(&package, &cache).unwrap();
        fs::remove_file(&package.path).unwrap();
        assert_eq!(
            unpack(&package, &cache).unwrap(),
            first,
            "the second time the file is not read"
        );
        assert_eq!(first.resolve("usr/lib64/a").as_deref(), Some("usr/lib/liba.so.1.2"));
        assert_eq!(first.resolve("usr/lib/circle"), None);
        assert_eq!(first.content("usr/lib/liba.so.1.2").unwrap().read().unwrap(), b"library");
        assert!(!first.items.keys().any(|path| path.starts_with("usr/share")));
    }

    #[test]
    fn a_package_that_is_cut_is_named_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().join("cache")).unwrap();
        let package = made(folder.path());
        let whole = fs::read(&package.path).unwrap();
        fs::write(&package.path, &whole[..whole.len() / 2]).unwrap();
        let error = unpack(&package, &cache).unwrap_err();
        assert_eq!(error.to_string(), "could not unpack `a` 1");
        assert_eq!(fs::read_dir(cache.sub("unpacked").unwrap()).unwrap().count(), 0);
    }
}
