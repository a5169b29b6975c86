//! The files of a pod on this node: volumes, `hosts`, termination messages.
//!
//! Layout below `<root>/pods/<uid>` as kubelet has it, so that tools and a migrated node find
//! their way. Content of ConfigMaps and Secrets is swapped in one rename: files lie in a folder
//! with a fresh name, `..data` points to it, and the names that users see are links through it.
//! All functions here block; workers call them from a blocking thread.
//!
//! Source: kubernetes/kubernetes pkg/volume/util/atomic_writer.go, pkg/kubelet/kubelet_getters.go.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use skerry_edge_core::pods::volumes::{File, HostPathKind, Source};

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";

/// Why a volume is not there.
#[derive(Debug, thiserror::Error)]
pub(super) enum SetUpError {
    #[error("hostPath type check failed: {path} is not a {wanted}")]
    HostPath { path: String, wanted: &'static str },
    #[error("could not prepare `{path}`: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("could not mount a file system in memory at `{path}`: {source}")]
    Mount { path: PathBuf, source: nix::Error },
}

/// The folder of one pod.
#[derive(Debug, Clone)]
pub(super) struct PodFolder {
    path: PathBuf,
}

impl PodFolder {
    pub(super) fn new(root: &Path, uid: &str) -> Self {
        Self { path: root.join("pods").join(uid) }
    }

    /// Makes the folder.
    pub(super) fn create(&self) -> Result<(), SetUpError> {
        for path in [self.path.clone(), self.path.join("volumes"), self.path.join("containers")] {
            fs::create_dir_all(&path).map_err(|source| io_error(&path, source))?;
            let _ = fs::set_permissions(&path, Permissions::from_mode(0o750));
        }
        Ok(())
    }

    /// Sets a volume up, or brings its content up to date. Returns the path to bind.
    pub(super) fn set_up(
        &self,
        volume: &str,
        source: &Source,
        tokens: &BTreeMap<String, File>,
        fs_group: Option<i64>,
    ) -> Result<PathBuf, SetUpError> {
        match source {
            Source::HostPath { path, kind } => {
                check_host_path(path, *kind)?;
                Ok(PathBuf::from(path))
            }
            Source::EmptyDir { memory } => {
                let path = self.volume("kubernetes.io~empty-dir", volume);
                make_dir(&path, 0o777)?;
                if let Some(bytes) = memory
                    && !is_mount(&path)
                {
                    mount_tmpfs(&path, *bytes, 0o777)?;
                }
                own(&path, fs_group, 0o777);
                Ok(path)
            }
            Source::Files(content) => {
                let path = self.volume(content.plugin, volume);
                make_dir(&path, 0o755)?;
                if content.in_memory
                    && !is_mount(&path)
                    && let Err(error) = mount_tmpfs(&path, 0, 0o755)
                {
                    // Without the right to mount, a folder that only root reads is what is left.
                    tracing::warn!(error = %error, "secret content is kept on disk");
                    let _ = fs::set_permissions(&path, Permissions::from_mode(0o700));
                }
                let mut files = content.files.clone();
                files.extend(tokens.iter().map(|(path, file)| (path.clone(), file.clone())));
                write_atomically(&path, &files, fs_group)
                    .map_err(|error| io_error(&path, error))?;
                Ok(path)
            }
        }
    }

    fn volume(&self, plugin: &str, volume: &str) -> PathBuf {
        self.path.join("volumes").join(plugin).join(volume)
    }

    /// Writes the pod's `hosts` file; returns its path.
    pub(super) fn write_hosts(&self, text: &str) -> Result<PathBuf, SetUpError> {
        let path = self.path.join("etc-hosts");
        // Written in place: containers have this very file bound.
        fs::write(&path, text).map_err(|source| io_error(&path, source))?;
        let _ = fs::set_permissions(&path, Permissions::from_mode(0o644));
        Ok(path)
    }

    /// Makes the file that takes a container's last words; returns its path.
    pub(super) fn termination_log(&self, container: &str) -> Result<PathBuf, SetUpError> {
        let folder = self.path.join("containers").join(container);
        make_dir(&folder, 0o750)?;
        let name = uuid::Uuid::new_v4().simple().to_string();
        let path = folder.join(&name[..8]);
        fs::write(&path, "").map_err(|source| io_error(&path, source))?;
        fs::set_permissions(&path, Permissions::from_mode(0o666))
            .map_err(|source| io_error(&path, source))?;
        Ok(path)
    }

    /// Unmounts and removes everything of the pod.
    pub(super) fn remove(&self) -> io::Result<()> {
        for path in mounts_below(&self.path)? {
            umount2(&path, MntFlags::MNT_DETACH).map_err(io::Error::from)?;
        }
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Unmounts and removes the pod's volumes; what the pod said last stays.
    pub(super) fn remove_volumes(&self) -> io::Result<()> {
        let path = self.path.join("volumes");
        for path in mounts_below(&path)? {
            umount2(&path, MntFlags::MNT_DETACH).map_err(io::Error::from)?;
        }
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Returns the path of `sub` inside `volume`, made if missing.
///
/// Every part that exists has to be a real folder or file: a link could lead out of the volume.
pub(super) fn sub_path(volume: &Path, sub: &str) -> io::Result<PathBuf> {
    let whole = volume.join(sub);
    // Links made by `write_atomically` lead to `..data`, which is inside.
    if let (Ok(found), Ok(base)) = (whole.canonicalize(), volume.canonicalize()) {
        if found.starts_with(&base) {
            return Ok(found);
        }
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "leads out of the volume"));
    }
    let mode = fs::metadata(volume)?.permissions().mode() & 0o7777;
    let mut path = volume.to_path_buf();
    for part in sub.split('/') {
        path.push(part);
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_symlink() => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "goes through a link"));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir(&path)?;
                fs::set_permissions(&path, Permissions::from_mode(mode))?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(path)
}

/// Returns mount points at or below `path`, the deepest first.
pub(crate) fn mounts_below(path: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let mut found: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(unescape(field)))
        .filter(|point| point.starts_with(path))
        .collect();
    // Later mounts lie over earlier ones.
    found.reverse();
    found.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    Ok(found)
}

/// The mount table writes blanks and the like as `\040`.
fn unescape(field: &str) -> String {
    let mut out = String::with_capacity(field.len());
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|code| u8::from_str_radix(code, 8).ok());
        match code {
            Some(code) => {
                out.push(char::from(code));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

fn is_mount(path: &Path) -> bool {
    mounts_below(path).is_ok_and(|points| points.iter().any(|point| point == path))
}

fn mount_tmpfs(path: &Path, bytes: u64, mode: u32) -> Result<(), SetUpError> {
    let mut options = format!("mode={mode:o}");
    if bytes > 0 {
        options.push_str(&format!(",size={bytes}"));
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some(options.as_str()))
        .map_err(|source| SetUpError::Mount { path: path.to_path_buf(), source })
}

fn make_dir(path: &Path, mode: u32) -> Result<(), SetUpError> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(|source| io_error(path, source))?;
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(|source| io_error(path, source))
}

/// Gives a folder to the pod's group.
fn own(path: &Path, group: Option<i64>, mode: u32) {
    let Some(group) = group.and_then(|group| u32::try_from(group).ok()) else { return };
    if std::os::unix::fs::chown(path, None, Some(group)).is_ok() {
        let _ = fs::set_permissions(path, Permissions::from_mode(mode | 0o2070));
    }
}

fn check_host_path(path: &str, kind: HostPathKind) -> Result<(), SetUpError> {
    let at = Path::new(path);
    let found = fs::metadata(at).ok().map(|meta| meta.file_type());
    let wrong = |wanted| Err(SetUpError::HostPath { path: path.to_owned(), wanted });
    match kind {
        HostPathKind::Unchecked => {
            // Runtimes refuse to bind what is not there; kubelet's runtimes make a folder.
            if found.is_none() {
                fs::create_dir_all(at).map_err(|source| io_error(at, source))?;
            }
            Ok(())
        }
        HostPathKind::DirectoryOrCreate => match found {
            None => make_dir(at, 0o755),
            Some(found) if found.is_dir() => Ok(()),
            Some(_) => wrong("directory"),
        },
        HostPathKind::FileOrCreate => match found {
            None => {
                fs::write(at, "").map_err(|source| io_error(at, source))?;
                fs::set_permissions(at, Permissions::from_mode(0o644))
                    .map_err(|source| io_error(at, source))
            }
            Some(found) if found.is_file() => Ok(()),
            Some(_) => wrong("file"),
        },
        HostPathKind::Directory if found.is_some_and(|found| found.is_dir()) => Ok(()),
        HostPathKind::Directory => wrong("directory"),
        HostPathKind::File if found.is_some_and(|found| found.is_file()) => Ok(()),
        HostPathKind::File => wrong("file"),
        HostPathKind::Socket if found.is_some_and(|found| found.is_socket()) => Ok(()),
        HostPathKind::Socket => wrong("socket file"),
        HostPathKind::CharDevice if found.is_some_and(|found| found.is_char_device()) => Ok(()),
        HostPathKind::CharDevice => wrong("character device"),
        HostPathKind::BlockDevice if found.is_some_and(|found| found.is_block_device()) => Ok(()),
        HostPathKind::BlockDevice => wrong("block device"),
    }
}

/// Makes `folder` show exactly `files`, all at once; does nothing if it does already.
fn write_atomically(
    folder: &Path,
    files: &BTreeMap<String, File>,
    group: Option<i64>,
) -> io::Result<()> {
    let data = folder.join(DATA);
    let before = fs::read_link(&data).ok();
    if let Some(current) = &before
        && holds(&folder.join(current), files)
    {
        return Ok(());
    }
    let fresh = format!("..{}", uuid::Uuid::new_v4().simple());
    let target = folder.join(&fresh);
    fs::create_dir(&target)?;
    fs::set_permissions(&target, Permissions::from_mode(0o755))?;
    for (path, file) in files {
        let at = target.join(path);
        if let Some(parent) = at.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&at, &file.bytes)?;
        let mut mode = file.mode;
        if let Some(group) = group.and_then(|group| u32::try_from(group).ok())
            && std::os::unix::fs::chown(&at, None, Some(group)).is_ok()
        {
            mode |= 0o440;
        }
        // After the write: the mode may forbid writing, also to the owner.
        fs::set_permissions(&at, Permissions::from_mode(mode))?;
    }
    let new = folder.join(DATA_NEW);
    let _ = fs::remove_file(&new);
    symlink(&fresh, &new)?;
    fs::rename(&new, &data)?;

    let shown: BTreeSet<&str> = files.keys().filter_map(|path| path.split('/').next()).collect();
    for name in &shown {
        let link = folder.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(format!("{DATA}/{name}"), &link)?;
        }
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with("..") && !shown.contains(name.as_ref()) {
            fs::remove_file(entry.path())?;
        }
    }
    if let Some(old) = before {
        let _ = fs::remove_dir_all(folder.join(old));
    }
    Ok(())
}

/// Whether `folder` has exactly `files` (content only; modes never change in place).
fn holds(folder: &Path, files: &BTreeMap<String, File>) -> bool {
    let same = |(path, file): (&String, &File)| {
        fs::read(folder.join(path)).is_ok_and(|bytes| bytes == file.bytes)
    };
    files.iter().all(same) && count_files(folder).is_ok_and(|count| count == files.len())
}

fn count_files(folder: &Path) -> io::Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        count += if entry.file_type()?.is_dir() { count_files(&entry.path())? } else { 1 };
    }
    Ok(count)
}

fn io_error(path: &Path, source: io::Error) -> SetUpError {
    SetUpError::Io { path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(entries: &[(&str, &str)]) -> BTreeMap<String, File> {
        let file = |text: &str| File { bytes: text.as_bytes().to_vec(), mode: 0o640 };
        entries.iter().map(|(path, text)| ((*path).to_owned(), file(text))).collect()
    }

    #[test]
    fn content_is_swapped_as_a_whole_and_old_names_vanish() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let read = |path: &str| fs::read_to_string(dir.path().join(path)).ok();
        write_atomically(dir.path(), &files(&[("a", "1"), ("d/b", "2")]), None).expect("writes");
        assert_eq!((read("a"), read("d/b")), (Some("1".into()), Some("2".into())));
        let first = fs::read_link(dir.path().join(DATA)).expect("link");

        write_atomically(dir.path(), &files(&[("a", "1"), ("d/b", "2")]), None).expect("writes");
        assert_eq!(fs::read_link(dir.path().join(DATA)).expect("link"), first);

        write_atomically(dir.path(), &files(&[("a", "9"), ("c", "3")]), None).expect("writes");
        assert_eq!((read("a"), read("c")), (Some("9".into()), Some("3".into())));
        assert_eq!(read("d/b"), None);
        assert!(!dir.path().join(first).exists(), "the old content is removed");
        let mode = fs::metadata(dir.path().join("a")).expect("file").permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
    }

    #[test]
    fn sub_path_is_made_and_never_leaves_the_volume() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let inside = sub_path(dir.path(), "x/y").expect("is made");
        assert!(inside.is_dir());
        symlink("/etc", dir.path().join("out")).expect("link");
        assert!(sub_path(dir.path(), "out").is_err());
        assert!(sub_path(dir.path(), "out/none").is_err());
    }

    #[test]
    fn host_path_is_checked_by_type() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        check_host_path(&path("made"), HostPathKind::DirectoryOrCreate).expect("is made");
        assert!(dir.path().join("made").is_dir());
        let error = check_host_path(&path("none"), HostPathKind::Directory).expect_err("missing");
        assert_eq!(
            error.to_string(),
            format!("hostPath type check failed: {} is not a directory", path("none"))
        );
        check_host_path("/dev/null", HostPathKind::CharDevice).expect("is one");
    }

    #[test]
    fn mount_table_names_are_unescaped() {
        assert_eq!(unescape("/a\\040b"), "/a b");
    }
}
