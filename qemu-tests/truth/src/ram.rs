//! Writes cpio archives of the form that the kernel takes as its first root (`newc`). Archives can follow one another.
//!
//! Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.

use anyhow::Result;
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// An archive that is being written.
pub(crate) struct Archive<W: Write> {
    out: BufWriter<W>,
    inode: u32,
    folders: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    /// Writes to `out`.
    pub(crate) fn new(out: W) -> Self {
        Self { out: BufWriter::new(out), inode: 1, folders: BTreeSet::new() }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.inode += 1;
        let numbers = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(content.len())?,
            0,
            0,
            0,
            0,
            u32::try_from(path.len() + 1)?,
            0,
        ];
        let mut head = String::from("070701");
        for number in numbers {
            head.push_str(&format!("{number:08x}"));
        }
        let pad = |len: usize| [0u8; 3][..(4 - len % 4) % 4].to_vec();
        self.out.write_all(head.as_bytes())?;
        self.out.write_all(path.as_bytes())?;
        self.out.write_all(&[0])?;
        self.out.write_all(&pad(head.len() + path.len() + 1))?;
        self.out.write_all(content)?;
        self.out.write_all(&pad(content.len()))?;
        Ok(())
    }

    /// A folder, with those above it.
    pub(crate) fn folder(&mut self, path: &str) -> Result<()> {
        if path.is_empty() || !self.folders.insert(path.to_owned()) {
            return Ok(());
        }
        self.above(path)?;
        self.entry(path, FOLDER | 0o755, b"")
    }

    fn above(&mut self, path: &str) -> Result<()> {
        self.folder(path.rsplit_once('/').map_or("", |(above, _)| above))
    }

    /// A file.
    pub(crate) fn file(&mut self, path: &str, content: &[u8], mode: u32) -> Result<()> {
        self.above(path)?;
        self.entry(path, FILE | mode, content)
    }

    /// A symbolic link.
    pub(crate) fn link(&mut self, path: &str, to: &str) -> Result<()> {
        self.above(path)?;
        self.entry(path, LINK | 0o777, to.as_bytes())
    }

    /// A folder of this machine with what is in it, as far as `wanted` says.
    pub(crate) fn tree(
        &mut self,
        from: &Path,
        to: &str,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<()> {
        self.folder(to)?;
        let mut entries: Vec<_> = fs::read_dir(from)?.collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = format!("{to}/{}", entry.file_name().to_string_lossy());
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.tree(&entry.path(), &path, wanted)?;
            } else if kind.is_file() && wanted(&path) {
                let mode = entry.metadata()?.permissions().mode() & 0o777;
                self.file(&path, &fs::read(entry.path())?, mode)?;
            }
        }
        Ok(())
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.entry("TRAILER!!!", 0, b"")?;
        self.out.flush()?;
        Ok(())
    }
}
