//! A file tree in memory: what a file system will hold, before any file system exists.
//!
//! [`crate::root`] plans such trees; [`crate::erofs`] and the writer of the initramfs turn them into bytes. A tree
//! has no owners and no times: everything belongs to 0:0 and carries the epoch that the writer is given. Contents are
//! either bytes or files of the cache, whose digest is compared whenever they are read, so that a changed cache is an
//! error and never a changed image.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

/// Bytes of one file of an image at most; the largest, containerd, has 54 MB.
pub const FILE_MAX: u64 = 1 << 30;

/// Paths without a leading slash, sorted, with all their parents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    entries: BTreeMap<String, Entry>,
}

/// One path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Permission bits, for example `0o755`; never setuid or setgid, see [`TreeError::Setuid`].
    pub mode: u32,
    /// What is there.
    pub node: Node,
    /// Where it came from: the name of a package, or `skerry`.
    pub part: String,
}

/// What a path is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    Folder,
    File(Content),
    /// A symbolic link and its target as it is written.
    Link(String),
    CharDevice {
        major: u32,
        minor: u32,
    },
}

/// What a file holds; cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    data: Data,
    size: u64,
    sha256: [u8; 32],
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Data {
    Bytes(Arc<[u8]>),
    File(PathBuf),
}

/// Why a path cannot be in a tree.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TreeError {
    /// Empty, absolute, or with `.`, `..` or an empty component.
    #[error("`{0}` is no path for an image")]
    Path(String),
    /// Something else is there already.
    #[error("`{path}` of `{part}` is there already, from `{first}`")]
    Twice { path: String, part: String, first: String },
    /// A parent is no folder.
    #[error("`{path}` cannot be placed: `{parent}` is no folder")]
    Parent { path: String, parent: String },
    /// An image has no file that changes its user.
    #[error("`{path}` has mode {mode:o}: an image has no setuid or setgid file")]
    Setuid { path: String, mode: u32 },
}

impl Content {
    /// Takes bytes.
    pub fn bytes(bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        let sha256 = Sha256::digest(&bytes).into();
        Self { size: bytes.len() as u64, sha256, data: Data::Bytes(bytes.into()) }
    }

    /// Takes a file as it is now; reads it once for its digest.
    ///
    /// # Errors
    ///
    /// The file cannot be read, is no regular file, or is longer than [`FILE_MAX`].
    pub fn file(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        let (size, sha256) = digest_of(&path)?;
        Ok(Self { data: Data::File(path), size, sha256 })
    }

    /// Takes a file whose size and digest were written down when it was unpacked; reading checks them.
    pub fn known_file(path: impl Into<PathBuf>, size: u64, sha256: [u8; 32]) -> Self {
        Self { data: Data::File(path.into()), size, sha256 }
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// SHA-256 of the content.
    pub fn sha256(&self) -> [u8; 32] {
        self.sha256
    }

    /// The whole content, checked.
    ///
    /// # Errors
    ///
    /// The file is gone or not the one that was taken.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(usize::try_from(self.size).unwrap_or(0));
        self.copy(&mut bytes)?;
        Ok(bytes)
    }

    /// Writes the content to `out` and checks it on the way; on an error `out` may have got a part of it.
    ///
    /// # Errors
    ///
    /// As [`Content::read`], and those of `out`.
    pub fn copy(&self, out: &mut impl Write) -> io::Result<()> {
        let path = match &self.data {
            Data::Bytes(bytes) => return out.write_all(bytes),
            Data::File(path) => path,
        };
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        let mut file = File::open(path).map_err(named)?;
        let mut hash = Sha256::new();
        let mut left = self.size;
        let mut buffer = vec![0; COPY_LEN];
        loop {
            let read = file.read(&mut buffer).map_err(named)?;
            if read == 0 {
                break;
            }
            let Some(rest) = left.checked_sub(read as u64) else {
                return Err(changed(path));
            };
            left = rest;
            hash.update(&buffer[..read]);
            out.write_all(&buffer[..read])?;
        }
        if left != 0 || <[u8; 32]>::from(hash.finalize()) != self.sha256 {
            return Err(changed(path));
        }
        Ok(())
    }
}

fn changed(path: &Path) -> io::Error {
    let text = format!("{}: the file changed since it was read", path.display());
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Size and SHA-256 of a regular file.
pub(crate) fn digest_of(path: &Path) -> io::Result<(u64, [u8; 32])> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let mut file = File::open(path).map_err(named)?;
    let meta = file.metadata().map_err(named)?;
    if !meta.is_file() || meta.len() > FILE_MAX {
        let text = format!("{}: not a regular file of at most {FILE_MAX} bytes", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut hash = Sha256::new();
    let mut size = 0;
    let mut buffer = vec![0; COPY_LEN];
    loop {
        let read = file.read(&mut buffer).map_err(named)?;
        if read == 0 {
            return Ok((size, hash.finalize().into()));
        }
        size += read as u64;
        hash.update(&buffer[..read]);
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        text
    })
}

/// The digest that 64 hexadecimal digits stand for.
pub fn unhex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |d: u8| char::from(d).to_digit(16);
        *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
    }
    Some(bytes)
}

impl Tree {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a folder; one that is there gets the mode.
    ///
    /// # Errors
    ///
    /// See [`TreeError`].
    pub fn folder(&mut self, path: &str, mode: u32, part: &str) -> Result<(), TreeError> {
        if let Some(Entry { node: Node::Folder, mode: old, .. }) = self.entries.get_mut(path) {
            *old = mode;
            return Ok(());
        }
        // A folder may have the sticky bit: /tmp.
        self.put(path, mode, Node::Folder, part)
    }

    /// Puts a file.
    ///
    /// # Errors
    ///
    /// See [`TreeError`].
    pub fn file(
        &mut self,
        path: &str,
        mode: u32,
        content: Content,
        part: &str,
    ) -> Result<(), TreeError> {
        if mode & 0o6000 != 0 {
            return Err(TreeError::Setuid { path: path.to_owned(), mode });
        }
        self.put(path, mode, Node::File(content), part)
    }

    /// Puts a symbolic link.
    ///
    /// # Errors
    ///
    /// See [`TreeError`].
    pub fn link(&mut self, path: &str, target: &str, part: &str) -> Result<(), TreeError> {
        self.put(path, 0o777, Node::Link(target.to_owned()), part)
    }

    /// Puts a character device.
    ///
    /// # Errors
    ///
    /// See [`TreeError`].
    pub fn char_device(
        &mut self,
        path: &str,
        mode: u32,
        (major, minor): (u32, u32),
        part: &str,
    ) -> Result<(), TreeError> {
        self.put(path, mode, Node::CharDevice { major, minor }, part)
    }

    fn put(&mut self, path: &str, mode: u32, node: Node, part: &str) -> Result<(), TreeError> {
        let sound = |piece: &str| !matches!(piece, "" | "." | "..") && !piece.contains('\0');
        if !path.split('/').all(sound) {
            return Err(TreeError::Path(path.to_owned()));
        }
        if let Some(first) = self.entries.get(path) {
            return Err(TreeError::Twice {
                path: path.to_owned(),
                part: part.to_owned(),
                first: first.part.clone(),
            });
        }
        for (at, _) in path.match_indices('/') {
            let parent = &path[..at];
            match self.entries.get(parent) {
                None => {
                    let folder = Entry { mode: 0o755, node: Node::Folder, part: part.to_owned() };
                    self.entries.insert(parent.to_owned(), folder);
                }
                Some(Entry { node: Node::Folder, .. }) => {}
                Some(_) => {
                    let parent = parent.to_owned();
                    return Err(TreeError::Parent { path: path.to_owned(), parent });
                }
            }
        }
        self.entries.insert(path.to_owned(), Entry { mode, node, part: part.to_owned() });
        Ok(())
    }

    /// Removes the files for which `keep` says no; folders and links stay.
    pub fn retain_files(&mut self, keep: impl Fn(&str) -> bool) {
        self.entries.retain(|path, entry| !matches!(entry.node, Node::File(_)) || keep(path));
    }

    /// All entries; a folder comes before what is in it.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(path, entry)| (path.as_str(), entry))
    }

    /// What is at a path.
    pub fn get(&self, path: &str) -> Option<&Entry> {
        self.entries.get(path)
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Sum of the sizes of all files.
    pub fn bytes(&self) -> u64 {
        self.iter().map(|(_, entry)| entry.size()).sum()
    }

    /// Everything but the files and links of `part`, with all folders; and those, with the folders they lie in.
    pub(crate) fn split(&self, part: &str) -> (Self, Self) {
        let (mut rest, mut own) = (self.clone(), Self::new());
        rest.entries.retain(|_, entry| entry.node == Node::Folder || entry.part != part);
        for (path, entry) in &self.entries {
            if entry.node == Node::Folder || entry.part != part {
                continue;
            }
            let parents = path.match_indices('/').map(|(at, _)| &path[..at]);
            for path in parents.chain([path.as_str()]) {
                own.entries.insert(path.to_owned(), self.entries[path].clone());
            }
        }
        (rest, own)
    }

    /// Digest of everything that a writer will see; equal digests give equal file systems for one epoch.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for (path, entry) in self.iter() {
            let (kind, detail) = match &entry.node {
                Node::Folder => ("folder", String::new()),
                Node::File(content) => ("file", hex(&content.sha256)),
                Node::Link(target) => ("link", target.clone()),
                Node::CharDevice { major, minor } => ("char", format!("{major}:{minor}")),
            };
            // NUL cannot be in a path, so that no two trees give the same text.
            hash.update(format!("{path}\0{:o}\0{kind}\0{detail}\0\n", entry.mode));
        }
        hash.finalize().into()
    }

    /// Writes the tree as a tar archive: sorted, owner 0:0, every time stamp `epoch` seconds since 1970.
    ///
    /// # Errors
    ///
    /// Those of `out`, and of contents that changed.
    pub fn write_tar(&self, out: impl Write, epoch: u64) -> io::Result<()> {
        let mut archive = tar::Builder::new(out);
        let header = |mode| {
            let mut header = tar::Header::new_gnu();
            header.set_mode(mode);
            header.set_mtime(epoch);
            header.set_uid(0);
            header.set_gid(0);
            header.set_size(0);
            header
        };
        // Without an entry of its own the root would be writable for everybody.
        let mut top = header(0o755);
        top.set_entry_type(tar::EntryType::Directory);
        archive.append_data(&mut top, "./", io::empty())?;
        for (path, entry) in self.iter() {
            let mut header = header(entry.mode);
            match &entry.node {
                Node::Folder => {
                    header.set_entry_type(tar::EntryType::Directory);
                    archive.append_data(&mut header, format!("{path}/"), io::empty())?;
                }
                Node::File(content) => {
                    header.set_entry_type(tar::EntryType::Regular);
                    header.set_size(content.size());
                    let mut bytes = Vec::new();
                    content.copy(&mut bytes)?;
                    archive.append_data(&mut header, path, bytes.as_slice())?;
                }
                Node::Link(target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    archive.append_link(&mut header, path, target)?;
                }
                Node::CharDevice { major, minor } => {
                    header.set_entry_type(tar::EntryType::Char);
                    header.set_device_major(*major)?;
                    header.set_device_minor(*minor)?;
                    archive.append_data(&mut header, path, io::empty())?;
                }
            }
        }
        archive.into_inner()?.flush()
    }
}

impl Entry {
    /// Bytes of the file, 0 for everything else.
    pub fn size(&self) -> u64 {
        match &self.node {
            Node::File(content) => content.size(),
            _ => 0,
        }
    }

    /// Whether this is a file that may be executed: a program, or a library whose mode says so.
    pub fn is_executable(&self) -> bool {
        matches!(self.node, Node::File(_)) && self.mode & 0o111 != 0
    }
}

/// Bytes moved at once; small enough to be no matter beside the largest file.
const COPY_LEN: usize = 256 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Tree {
        let mut tree = Tree::new();
        tree.file("usr/bin/a", 0o755, Content::bytes(*b"program"), "a").unwrap();
        tree.link("bin", "usr/bin", "skerry").unwrap();
        tree.folder("tmp", 0o1777, "skerry").unwrap();
        tree.char_device("dev/console", 0o600, (5, 1), "skerry").unwrap();
        tree
    }

    #[test]
    fn parents_are_made_and_come_before_what_is_in_them() {
        let tree = sample();
        let paths: Vec<&str> = tree.iter().map(|(path, _)| path).collect();
        assert_eq!(paths, ["bin", "dev", "dev/console", "tmp", "usr", "usr/bin", "usr/bin/a"]);
    }

    #[test]
    fn what_does_not_belong_into_an_image_is_refused() {
        let mut tree = sample();
        let nothing = || Content::bytes(Vec::new());
        for path in ["", "/etc", "etc/", "a/../b", "./a", "a//b"] {
            let expected = TreeError::Path(path.to_owned());
            assert_eq!(tree.file(path, 0o644, nothing(), "x"), Err(expected));
        }
        let twice = tree.file("usr/bin/a", 0o644, nothing(), "x").unwrap_err();
        assert_eq!(twice.to_string(), "`usr/bin/a` of `x` is there already, from `a`");
        assert!(matches!(tree.link("bin/b", "c", "x"), Err(TreeError::Parent { .. })));
        assert!(matches!(tree.file("su", 0o4755, nothing(), "x"), Err(TreeError::Setuid { .. })));
    }

    #[test]
    fn two_archives_of_one_tree_are_equal_and_carry_neither_owner_nor_time() {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        sample().write_tar(&mut first, 1_700_000_000).unwrap();
        sample().write_tar(&mut second, 1_700_000_000).unwrap();
        assert!(first == second);
        let mut archive = tar::Archive::new(first.as_slice());
        let mut seen = 0;
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            let header = entry.header();
            assert_eq!(header.mtime().unwrap(), 1_700_000_000);
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            seen += 1;
        }
        assert_eq!(seen, 8, "the root itself is among them");
    }

    #[test]
    fn a_file_that_changed_since_it_was_taken_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, b"before").unwrap();
        let content = Content::file(&path).unwrap();
        assert_eq!(content.read().unwrap(), b"before");
        for other in [&b"behind"[..], b"befor", b"before!"] {
            std::fs::write(&path, other).unwrap();
            assert_eq!(content.read().unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        std::fs::remove_file(&path).unwrap();
        assert!(content.read().unwrap_err().to_string().contains("/f"));
    }

    #[test]
    fn a_tree_splits_into_one_part_with_its_folders_and_the_rest() {
        let (rest, own) = sample().split("skerry");
        let paths = |tree: &Tree| tree.iter().map(|(path, _)| path.to_owned()).collect::<Vec<_>>();
        assert_eq!(paths(&rest), ["dev", "tmp", "usr", "usr/bin", "usr/bin/a"]);
        assert_eq!(paths(&own), ["bin", "dev", "dev/console"]);
        assert_eq!(rest.get("tmp").unwrap().mode, 0o1777);
    }

    #[test]
    fn a_digest_changes_with_path_mode_content_and_target() {
        let digests: std::collections::BTreeSet<[u8; 32]> = [
            sample(),
            {
                let mut tree = sample();
                tree.folder("tmp", 0o755, "skerry").unwrap();
                tree
            },
            {
                let mut tree = sample();
                tree.link("lib", "usr/lib", "skerry").unwrap();
                tree
            },
        ]
        .iter()
        .map(Tree::digest)
        .collect();
        assert_eq!(digests.len(), 3);
        assert_eq!(unhex(&hex(&[0xa5; 32])), Some([0xa5; 32]));
        assert_eq!(unhex("zz"), None);
    }
}
