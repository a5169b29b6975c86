//! Debian packages: which ones an image is made of, at which version, and their verified files in a cache.
//!
//! [`catalogue`] reads `packages.toml` (what we want), [`lockfile`] reads and writes `packages.lock` (at which version
//! and with which digest), [`apt`] talks to the host's apt with a state of its own. [`lock`] is the only way to a new
//! version; [`fetch`] gives exactly what the lock file names, or an error. Called by [`crate::root::gather`] and the
//! verbs of the command line.
//!
//! What is trusted: the archive keys of the host. apt checks the signature of each `InRelease` and the digests of the
//! package lists, [`lock`] takes the digests of packages from those lists, and every package is hashed again here
//! each time it is used. Neither the lock file nor anything else that we write names a mirror.

pub mod apt;
pub mod catalogue;
pub mod lockfile;
pub mod store;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

pub use apt::{AptError, Source};
pub use catalogue::{Catalogue, CatalogueError};
pub use lockfile::{Lock, LockFileError, Locked, Release};
pub use store::{UnpackError, Unpacked, unpack};

use crate::progress::Progress;
use crate::tree::{digest_of, hex, unhex};

/// Architectures that an image can be built for, by Debian's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Amd64, Self::Arm64];

    /// Debian's name, for example `amd64`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// Folder below `usr/lib` with the libraries of this architecture.
    pub fn triplet(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu",
            Self::Arm64 => "aarch64-linux-gnu",
        }
    }

    /// The architecture that this program runs on; `None` when no image can be built on it.
    pub fn of_host() -> Option<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Self::Amd64),
            "aarch64" => Some(Self::Arm64),
            _ => None,
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Arch {
    type Err = UnknownArch;

    fn from_str(text: &str) -> Result<Self, UnknownArch> {
        let named = Self::ALL.into_iter().find(|arch| arch.name() == text);
        named.ok_or_else(|| UnknownArch(text.to_owned()))
    }
}

/// The architecture is none that images are built for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("no image is built for architecture `{0}`: it is `amd64` or `arm64`")]
pub struct UnknownArch(String);

/// A folder that builds share: packages, what was unpacked from them, and root file systems.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// `$XDG_CACHE_HOME/skerry`, else `~/.cache/skerry`; `None` when neither variable is set to an absolute path.
    pub fn default_folder() -> Option<PathBuf> {
        let absolute = |name| {
            let path = PathBuf::from(std::env::var_os(name)?);
            path.is_absolute().then_some(path)
        };
        let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        base.map(|base| base.join("skerry"))
    }

    /// Opens the folder, which is made when it is not there.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn open(folder: impl Into<PathBuf>) -> io::Result<Self> {
        let folder = folder.into();
        fs::create_dir_all(&folder).map_err(|e| {
            io::Error::new(e.kind(), format!("cache folder {}: {e}", folder.display()))
        })?;
        // apt and the loader of the tools are given paths, and run in other folders.
        let cache = Self { folder: folder.canonicalize()? };
        cache.clear_scratch();
        Ok(cache)
    }

    /// Removes what builds that were killed left behind; a failure only costs room.
    fn clear_scratch(&self) {
        let Ok(entries) = fs::read_dir(self.folder.join("scratch")) else { return };
        for entry in entries.flatten() {
            let modified = entry.metadata().and_then(|meta| meta.modified());
            let age = modified.ok().and_then(|time| time.elapsed().ok()).unwrap_or_default();
            if age > SCRATCH_AGE_MAX {
                drop(fs::remove_dir_all(entry.path()));
            }
        }
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A folder below it, made when it is not there.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn sub(&self, name: &str) -> io::Result<PathBuf> {
        let folder = self.folder.join(name);
        fs::create_dir_all(&folder)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", folder.display())))?;
        Ok(folder)
    }

    /// A fresh folder on the cache's file system, removed when dropped; what is finished is renamed out of it.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn scratch(&self) -> io::Result<tempfile::TempDir> {
        tempfile::Builder::new().prefix("part-").tempdir_in(self.sub("scratch")?)
    }

    fn package_path(&self, sha256: &str) -> io::Result<PathBuf> {
        Ok(self.sub("packages")?.join(format!("{sha256}.deb")))
    }
}

/// After this no build still works in a scratch folder.
const SCRATCH_AGE_MAX: Duration = Duration::from_secs(24 * 3600);

/// A package file that was verified against the lock file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    pub locked: Locked,
    /// The file in the cache.
    pub path: PathBuf,
}

/// Why packages could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The lock file is older than the catalogue.
    #[error("package `{name}` for {arch} is not in the lock file")]
    NotLocked { name: String, arch: Arch },
    /// The mirror has other versions by now.
    #[error("no longer on the mirror: {}", .0.join(", "))]
    Gone(Vec<String>),
    /// The mirror has the version, with other bytes than were locked.
    #[error("`{name}` {version}: the mirror's SHA-256 is {found}, the lock file says {wanted}")]
    OtherHash { name: String, version: String, wanted: String, found: String },
    /// What came is not what was promised.
    #[error("`{name}` {version}: the downloaded file has SHA-256 {found}, wanted is {wanted}")]
    WrongHash { name: String, version: String, wanted: String, found: String },
    #[error("apt did not bring `{0}`")]
    NotBrought(String),
    #[error("could not use the package cache")]
    Cache(#[source] io::Error),
    #[error("could not get packages through apt")]
    Apt(#[source] AptError),
}

impl FetchError {
    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotLocked { .. } | Self::Gone(_) => {
                Some("run `skerry image lock` to move the lock file forward".to_owned())
            }
            Self::OtherHash { .. } => Some(
                "a version never changes its bytes: compare with another mirror before you lock again"
                    .to_owned(),
            ),
            Self::WrongHash { .. } => Some("run it again; a proxy may have cut the file".to_owned()),
            Self::Apt(source) => source.hint(),
            Self::NotBrought(_) | Self::Cache(_) => None,
        }
    }
}

/// Returns the verified files of `names`, each at the version that the lock file pins for `arch`.
///
/// What is in the cache with the right digest is not fetched again; when all is there, nothing touches the network.
///
/// # Errors
///
/// See [`FetchError`]. Files that failed are not left in the cache.
pub fn fetch(
    lock: &Lock,
    arch: Arch,
    names: &[String],
    cache: &Cache,
    source: &Source,
    progress: &dyn Progress,
) -> Result<BTreeMap<String, Package>, FetchError> {
    let mut found = BTreeMap::new();
    let mut missing = Vec::new();
    for name in names {
        let locked = lock
            .find(name, arch)
            .ok_or_else(|| FetchError::NotLocked { name: name.clone(), arch })?;
        let path = cache.package_path(&locked.sha256).map_err(FetchError::Cache)?;
        if is_intact(&path, locked) {
            found.insert(name.clone(), Package { locked: locked.clone(), path });
        } else {
            missing.push(locked);
        }
    }
    if missing.is_empty() {
        return Ok(found);
    }
    let apt = apt::Apt::open(cache, arch, &lock.suite, &lock.components, source)
        .map_err(FetchError::Apt)?;
    // The lists of an earlier run will do as long as they know the locked versions.
    let mut offered = apt.known(&missing).map_err(FetchError::Apt)?;
    if offered.len() < missing.len() {
        progress.step("reading the package lists");
        apt.update().map_err(FetchError::Apt)?;
        offered = apt.known(&missing).map_err(FetchError::Apt)?;
    }
    check_offer(&missing, &offered)?;
    let total = missing.iter().map(|locked| locked.size).sum();
    progress.step(&format!("fetching {} packages, {} MB", missing.len(), total / 1_000_000));
    let scratch = cache.scratch().map_err(FetchError::Cache)?;
    apt.download(&missing, scratch.path(), &|done| progress.at(done, Some(total)))
        .map_err(FetchError::Apt)?;
    let mut brought = BTreeMap::new();
    for entry in fs::read_dir(scratch.path()).map_err(FetchError::Cache)? {
        let path = entry.map_err(FetchError::Cache)?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        // apt names a file `package_version_arch.deb`.
        if let Some((name, _)) = name.as_deref().and_then(|name| name.split_once('_')) {
            brought.insert(name.to_owned(), path);
        }
    }
    for locked in missing {
        let from =
            brought.get(&locked.name).ok_or_else(|| FetchError::NotBrought(locked.name.clone()))?;
        let path = admit(from, locked, cache)?;
        found.insert(locked.name.clone(), Package { locked: locked.clone(), path });
    }
    Ok(found)
}

/// Moves a downloaded file to its place when it is what the lock file says.
fn admit(from: &Path, locked: &Locked, cache: &Cache) -> Result<PathBuf, FetchError> {
    let (_, sha256) = digest_of(from).map_err(FetchError::Cache)?;
    if unhex(&locked.sha256) != Some(sha256) {
        return Err(FetchError::WrongHash {
            name: locked.name.clone(),
            version: locked.version.clone(),
            wanted: locked.sha256.clone(),
            found: hex(&sha256),
        });
    }
    let path = cache.package_path(&locked.sha256).map_err(FetchError::Cache)?;
    fs::rename(from, &path).map_err(FetchError::Cache)?;
    Ok(path)
}

/// Compares what the mirror offers with what is locked.
fn check_offer(missing: &[&Locked], offered: &[Locked]) -> Result<(), FetchError> {
    let mut gone = Vec::new();
    for locked in missing {
        let same = |other: &&Locked| other.name == locked.name && other.version == locked.version;
        match offered.iter().find(same) {
            None => gone.push(format!("`{}` {}", locked.name, locked.version)),
            Some(other) if other.sha256 != locked.sha256 => {
                return Err(FetchError::OtherHash {
                    name: locked.name.clone(),
                    version: locked.version.clone(),
                    wanted: locked.sha256.clone(),
                    found: other.sha256.clone(),
                });
            }
            Some(_) => {}
        }
    }
    if gone.is_empty() { Ok(()) } else { Err(FetchError::Gone(gone)) }
}

fn is_intact(path: &Path, locked: &Locked) -> bool {
    let Ok(meta) = fs::metadata(path) else { return false };
    if meta.len() == locked.size
        && digest_of(path).is_ok_and(|(_, sha256)| unhex(&locked.sha256) == Some(sha256))
    {
        return true;
    }
    tracing::warn!(package = locked.name, "a damaged package is removed from the cache");
    // A file that cannot be removed is replaced by the rename that follows.
    drop(fs::remove_file(path));
    false
}

/// Why the lock file could not be moved forward.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    #[error("could not read the package lists")]
    Apt(#[source] AptError),
    /// The mirror is older than what was locked last: it is stale, or somebody plays an old state back.
    #[error("the mirror's `{suite}` is of {found}, older than the {locked} of the lock file")]
    Backwards { suite: String, found: String, locked: String },
    #[error("the mirror has no package {} for {arch}", .names.join(", "))]
    NoPackage { names: Vec<String>, arch: Arch },
    /// The kernel's meta package names no kernel.
    #[error("package `{0}` depends on no `linux-image-…` package")]
    NoKernel(String),
}

impl LockError {
    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Apt(source) => source.hint(),
            Self::Backwards { .. } => Some(
                "try again later or with another `--mirror`; a lock file only moves forward".into(),
            ),
            Self::NoPackage { .. } => Some("correct the name in `packages.toml`".to_owned()),
            Self::NoKernel(_) => None,
        }
    }
}

/// Returns the lock file of what the mirror has now, for each of `arches`.
///
/// Entries of `old` for other architectures stay. Nothing is downloaded but the lists.
///
/// # Errors
///
/// See [`LockError`].
pub fn lock(
    catalogue: &Catalogue,
    old: Option<&Lock>,
    arches: &[Arch],
    cache: &Cache,
    source: &Source,
    progress: &dyn Progress,
) -> Result<Lock, LockError> {
    let mut packages: Vec<Locked> = match old {
        Some(old) => {
            old.packages.iter().filter(|p| !arches.contains(&p.for_arch)).cloned().collect()
        }
        None => Vec::new(),
    };
    let mut releases = Vec::new();
    for &arch in arches {
        progress.step(&format!("reading the package lists for {arch}"));
        let apt = apt::Apt::open(cache, arch, &catalogue.suite, &catalogue.components, source)
            .map_err(LockError::Apt)?;
        releases = apt.update().map_err(LockError::Apt)?;
        check_forward(old, &releases)?;
        let mut names = catalogue.packages(arch);
        let meta = catalogue.kernel(arch).to_owned();
        let depends = apt.depends(&meta).map_err(LockError::Apt)?;
        let kernel = depends.into_iter().find(|name| name.starts_with("linux-image-"));
        let kernel = kernel.ok_or(LockError::NoKernel(meta))?;
        names.insert(kernel.clone());
        let names: Vec<String> = names.into_iter().collect();
        let mut found = apt.newest(&names).map_err(LockError::Apt)?;
        let has = |name: &String| found.iter().any(|locked| locked.name == *name);
        let missing: Vec<String> = names.into_iter().filter(|name| !has(name)).collect();
        if !missing.is_empty() {
            return Err(LockError::NoPackage { names: missing, arch });
        }
        for locked in &mut found {
            locked.kernel = locked.name == kernel;
        }
        packages.extend(found);
    }
    packages.sort();
    Ok(Lock {
        suite: catalogue.suite.clone(),
        components: catalogue.components.clone(),
        releases,
        packages,
    })
}

/// Whether no release is older than it was when the lock file was written.
fn check_forward(old: Option<&Lock>, releases: &[Release]) -> Result<(), LockError> {
    for release in releases {
        let before = old.and_then(|old| old.releases.iter().find(|r| r.suite == release.suite));
        if let Some(before) = before
            && release.seconds() < before.seconds()
        {
            return Err(LockError::Backwards {
                suite: release.suite.clone(),
                found: release.date.clone(),
                locked: before.date.clone(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::progress::Silent;

    fn locked(name: &str, content: &[u8]) -> Locked {
        Locked {
            for_arch: Arch::Amd64,
            name: name.to_owned(),
            version: "1.0-1".to_owned(),
            arch: "amd64".to_owned(),
            size: content.len() as u64,
            sha256: hex(&Sha256::digest(content)),
            kernel: false,
        }
    }

    fn lock_of(packages: Vec<Locked>) -> Lock {
        Lock {
            suite: "trixie".to_owned(),
            components: vec!["main".to_owned()],
            releases: Vec::new(),
            packages,
        }
    }

    #[test]
    fn what_is_in_the_cache_needs_no_apt_and_is_hashed_again() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().join("cache")).unwrap();
        let package = locked("a", b"package a");
        let path = cache.package_path(&package.sha256).unwrap();
        fs::write(&path, b"package a").unwrap();
        let lock = lock_of(vec![package.clone()]);
        // A mirror that cannot be: reaching for it would be an error.
        let source = Source { mirror: Some("nowhere:/".into()), keyring: Some("/nowhere".into()) };
        let names = ["a".to_owned()];
        let found = fetch(&lock, Arch::Amd64, &names, &cache, &source, &Silent).unwrap();
        assert_eq!(found["a"], Package { locked: package, path: path.clone() });

        fs::write(&path, b"package b").unwrap();
        let error = fetch(&lock, Arch::Amd64, &names, &cache, &source, &Silent).unwrap_err();
        assert!(matches!(error, FetchError::Apt(_)), "{error:?}");
        assert!(!path.exists(), "the damaged file is gone");
    }

    #[test]
    fn a_downloaded_file_with_another_hash_is_refused_and_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().join("cache")).unwrap();
        let from = folder.path().join("a_1.0-1_amd64.deb");
        fs::write(&from, b"something else").unwrap();
        let package = locked("a", b"package a");
        let error = admit(&from, &package, &cache).unwrap_err();
        assert!(matches!(error, FetchError::WrongHash { .. }));
        assert!(!cache.package_path(&package.sha256).unwrap().exists());
    }

    #[test]
    fn a_version_that_is_gone_and_one_with_other_bytes_are_told_apart() {
        let wanted = locked("a", b"package a");
        let newer = Locked { version: "1.0-2".to_owned(), ..wanted.clone() };
        let error = check_offer(&[&wanted], &[newer]).unwrap_err();
        assert_eq!(error.to_string(), "no longer on the mirror: `a` 1.0-1");
        assert!(error.hint().unwrap().contains("skerry image lock"));
        let other = Locked { sha256: hex(&[1; 32]), ..wanted.clone() };
        let error = check_offer(&[&wanted], &[other]).unwrap_err();
        assert!(matches!(error, FetchError::OtherHash { .. }));
        assert!(check_offer(&[&wanted], std::slice::from_ref(&wanted)).is_ok());
    }

    #[test]
    fn a_package_that_is_not_locked_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let names = ["a".to_owned()];
        let lock = lock_of(vec![locked("a", b"")]);
        let error = fetch(&lock, Arch::Arm64, &names, &cache, &Source::default(), &Silent);
        let error = error.unwrap_err();
        assert_eq!(error.to_string(), "package `a` for arm64 is not in the lock file");
    }

    #[test]
    fn a_lock_file_only_moves_forward() {
        let release = |date: &str| Release { suite: "trixie".to_owned(), date: date.to_owned() };
        let mut old = lock_of(Vec::new());
        old.releases = vec![release("Sat, 21 Nov 2026 00:53:03 UTC")];
        let older = [release("Fri, 20 Nov 2026 00:53:03 UTC")];
        assert!(matches!(check_forward(Some(&old), &older), Err(LockError::Backwards { .. })));
        let newer = [release("Sat, 21 Nov 2026 00:53:04 UTC")];
        assert!(check_forward(Some(&old), &newer).is_ok());
        assert!(check_forward(None, &older).is_ok());
    }
}
