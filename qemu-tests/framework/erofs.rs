//! A look at the files of a built root: names and modes, without their content.
//!
//! Only what the image builder's file systems have is read: inodes and folders, which are never compressed. Anything
//! else is an error, so that a figure never rests on half a tree.
//!
//! Source of the facts: the Linux kernel's documentation and header of the on-disk format, `erofs_fs.h`.

use anyhow::{Context, Result, bail, ensure};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// First bytes of the superblock.
const MAGIC: u32 = 0xe0f5_e1e2;
/// Files of a tree that is read.
const FILES_MAX: usize = 100_000;
/// Largest folder, in bytes.
const FOLDER_MAX: u64 = 1 << 20;
/// Folders inside folders.
const DEPTH_MAX: usize = 40;

/// Kinds of an inode's mode.
const KIND: u16 = 0o170_000;
const FOLDER: u16 = 0o040_000;
const REGULAR: u16 = 0o100_000;

/// A file of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Without a leading slash.
    pub path: String,
    /// Kind and permissions.
    pub mode: u16,
}

impl Entry {
    /// Whether it is a program: a regular file that can be executed and is no library.
    pub fn is_program(&self) -> bool {
        self.mode & KIND == REGULAR && self.mode & 0o111 != 0 && !self.path.contains(".so")
    }

    /// Whether it gives its owner's or group's rights to who runs it.
    pub fn is_setuid(&self) -> bool {
        self.mode & KIND == REGULAR && self.mode & 0o6000 != 0
    }
}

/// Every file and folder of the file system that begins at `start` of a file.
pub fn entries(file: &Path, start: u64) -> Result<Vec<Entry>> {
    let open =
        std::fs::File::open(file).with_context(|| format!("could not open {}", file.display()))?;
    let bytes = |at: u64, length: usize| -> Result<Vec<u8>> {
        let mut buffer = vec![0; length];
        open.read_exact_at(&mut buffer, start + at).context("the root file system is cut")?;
        Ok(buffer)
    };
    let head = bytes(1024, 128)?;
    ensure!(u32_at(&head, 0) == MAGIC, "there is no erofs");
    let bits = u32::from(head[12]);
    ensure!((9..=16).contains(&bits), "blocks of 2^{bits} bytes");
    let tree = Tree { bytes: &bytes, block: 1 << bits, meta: u64::from(u32_at(&head, 40)) << bits };
    let mut found = Vec::new();
    tree.walk(u64::from(u16_at(&head, 14)), String::new(), 0, &mut found)?;
    Ok(found)
}

struct Tree<'a> {
    bytes: &'a dyn Fn(u64, usize) -> Result<Vec<u8>>,
    block: u64,
    meta: u64,
}

struct Inode {
    mode: u16,
    size: u64,
    layout: u16,
    block: u64,
    /// Where data beside the inode begins.
    behind: u64,
}

impl Tree<'_> {
    fn inode(&self, id: u64) -> Result<Inode> {
        let at = self.meta + 32 * id;
        let raw = (self.bytes)(at, 32)?;
        let format = u16_at(&raw, 0);
        let (extended, layout) = (format & 1 == 1, (format >> 1) & 7);
        let size = if extended {
            u64::from(u32_at(&raw, 8)) | (u64::from(u32_at(&raw, 12)) << 32)
        } else {
            u64::from(u32_at(&raw, 8))
        };
        let attributes = match u64::from(u16_at(&raw, 2)) {
            0 => 0,
            count => 12 + 4 * (count - 1),
        };
        let behind = at + if extended { 64 } else { 32 } + attributes;
        let block = u64::from(u32_at(&raw, 16));
        Ok(Inode { mode: u16_at(&raw, 4), size, layout, block, behind })
    }

    /// The content of a folder.
    fn folder(&self, inode: &Inode) -> Result<Vec<u8>> {
        ensure!(inode.size <= FOLDER_MAX, "a folder of {} bytes", inode.size);
        let start = inode.block * self.block;
        match inode.layout {
            0 => (self.bytes)(start, inode.size as usize),
            2 => {
                let tail = inode.size % self.block;
                let mut content = (self.bytes)(start, (inode.size - tail) as usize)?;
                content.extend((self.bytes)(inode.behind, tail as usize)?);
                Ok(content)
            }
            other => bail!("a folder with data layout {other}"),
        }
    }

    fn walk(&self, id: u64, path: String, depth: usize, found: &mut Vec<Entry>) -> Result<()> {
        ensure!(found.len() < FILES_MAX && depth < DEPTH_MAX, "the tree is too large");
        let inode = self.inode(id)?;
        if inode.mode & KIND == FOLDER {
            let content = self.folder(&inode)?;
            for block in content.chunks(self.block as usize) {
                for (id, name) in names(block)? {
                    if name == "." || name == ".." {
                        continue;
                    }
                    let inner = if path.is_empty() { name } else { format!("{path}/{name}") };
                    self.walk(id, inner, depth + 1, found)?;
                }
            }
        }
        found.push(Entry { path, mode: inode.mode });
        Ok(())
    }
}

/// Inodes and names in one block of a folder.
fn names(block: &[u8]) -> Result<Vec<(u64, String)>> {
    const ENTRY: usize = 12;
    let cut = "a folder is damaged";
    ensure!(block.len() >= ENTRY, cut);
    let count = usize::from(u16_at(block, 8)) / ENTRY;
    ensure!(count * ENTRY <= block.len(), cut);
    let start = |index: usize| usize::from(u16_at(block, index * ENTRY + 8));
    let mut names = Vec::new();
    for index in 0..count {
        let end = if index + 1 < count { start(index + 1) } else { block.len() };
        let name = block.get(start(index)..end).context(cut)?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let id = u64::from(u32_at(block, index * ENTRY))
            | (u64::from(u32_at(block, index * ENTRY + 4)) << 32);
        names.push((id, String::from_utf8_lossy(name).into_owned()));
    }
    Ok(names)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 4096;

    fn inode(image: &mut [u8], id: usize, layout: u16, mode: u16, size: u32, block: u32) {
        let at = BLOCK + 32 * id;
        image[at..at + 2].copy_from_slice(&(layout << 1).to_le_bytes());
        image[at + 4..at + 6].copy_from_slice(&mode.to_le_bytes());
        image[at + 8..at + 12].copy_from_slice(&size.to_le_bytes());
        image[at + 16..at + 20].copy_from_slice(&block.to_le_bytes());
    }

    fn folder(entries: &[(u64, &str)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut at = 12 * entries.len();
        for (id, name) in entries {
            bytes.extend(id.to_le_bytes());
            bytes.extend((at as u16).to_le_bytes());
            bytes.extend([0, 0]);
            at += name.len();
        }
        bytes.extend(entries.iter().flat_map(|(_, name)| name.bytes()));
        bytes
    }

    #[test]
    fn programs_and_setuid_files_are_found_in_folders_of_both_layouts() {
        let mut image = vec![0; 4 * BLOCK];
        image[1024..1028].copy_from_slice(&MAGIC.to_le_bytes());
        image[1036] = 12;
        image[1038..1040].copy_from_slice(&2u16.to_le_bytes());
        image[1064..1068].copy_from_slice(&1u32.to_le_bytes());
        // The root is inline, behind its inode; `bin` has a block of its own.
        let root = folder(&[(2, "."), (2, ".."), (20, "bin"), (21, "lib.so.1")]);
        inode(&mut image, 2, 2, FOLDER | 0o755, root.len() as u32, 0);
        image[BLOCK + 96..BLOCK + 96 + root.len()].copy_from_slice(&root);
        let bin = folder(&[(22, "crun"), (23, "data"), (24, "su")]);
        inode(&mut image, 20, 0, FOLDER | 0o755, bin.len() as u32, 2);
        image[2 * BLOCK..2 * BLOCK + bin.len()].copy_from_slice(&bin);
        for (id, mode) in [(21, 0o755), (22, 0o755), (23, 0o644), (24, 0o4755)] {
            inode(&mut image, id, 3, REGULAR | mode, 100, 0);
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("root");
        std::fs::write(&file, [vec![0; 512], image].concat()).unwrap();
        let found = entries(&file, 512).unwrap();
        let paths = |keep: fn(&Entry) -> bool| -> Vec<&str> {
            found.iter().filter(|entry| keep(entry)).map(|entry| entry.path.as_str()).collect()
        };
        assert_eq!(paths(Entry::is_program), ["bin/crun", "bin/su"]);
        assert_eq!(paths(Entry::is_setuid), ["bin/su"]);
        assert!(entries(&file, 0).is_err());
    }
}
