//! cpio archives of the form that the kernel unpacks (`newc`): the initramfs, and microcode before it.
//!
//! Sorted, owner 0:0, one time stamp, inode numbers from the order: equal trees give equal bytes. Called by
//! [`crate::build`].
//!
//! Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst and
//! Documentation/arch/x86/microcode.rst.

use crate::tree::{Content, Entry, Node, Tree};
use std::io::{self, Write};

/// Writes `tree` with every time stamp `epoch` seconds since 1970.
///
/// # Errors
///
/// Those of `out` and of contents that changed; `InvalidInput` for a file over 4 GiB or an epoch after 2106.
pub fn write(tree: &Tree, epoch: u64, mut out: impl Write) -> io::Result<()> {
    let epoch = fits(epoch)?;
    let mut inode = 0;
    for (path, entry) in tree.iter() {
        inode += 1;
        let Entry { mode, node, .. } = entry;
        let (kind, links, device, size) = match node {
            Node::Folder => (0o040_000, 2, (0, 0), 0),
            Node::File(content) => (0o100_000, 1, (0, 0), content.size()),
            Node::Link(target) => (0o120_000, 1, (0, 0), target.len() as u64),
            Node::CharDevice { major, minor } => (0o020_000, 1, (*major, *minor), 0),
        };
        header(&mut out, path, inode, kind | mode, links, epoch, fits(size)?, device)?;
        match node {
            Node::File(content) => {
                content.copy(&mut out)?;
                pad(&mut out, size)?;
            }
            Node::Link(target) => {
                out.write_all(target.as_bytes())?;
                pad(&mut out, size)?;
            }
            _ => {}
        }
    }
    header(&mut out, "TRAILER!!!", 0, 0, 1, 0, 0, (0, 0))?;
    out.flush()
}

/// The archive with microcode that the kernel reads before it unpacks anything, uncompressed. `files` are paths in it
/// and contents. `None` without files.
///
/// # Errors
///
/// Contents that changed; `InvalidInput` for a path that is none.
pub fn microcode(files: &[(String, Content)], epoch: u64) -> io::Result<Option<Vec<u8>>> {
    if files.is_empty() {
        return Ok(None);
    }
    let mut tree = Tree::new();
    for (path, content) in files {
        let placed = tree.file(path, 0o644, content.clone(), "microcode");
        placed.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    }
    let mut bytes = Vec::new();
    write(&tree, epoch, &mut bytes)?;
    Ok(Some(bytes))
}

fn fits(number: u64) -> io::Result<u32> {
    u32::try_from(number).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

#[expect(clippy::too_many_arguments, reason = "they are the fields of the header")]
fn header(
    out: &mut impl Write,
    path: &str,
    inode: u32,
    mode: u32,
    links: u32,
    epoch: u32,
    size: u32,
    (major, minor): (u32, u32),
) -> io::Result<()> {
    let name_len = path.len() as u32 + 1;
    write!(out, "070701")?;
    for field in [inode, mode, 0, 0, links, epoch, size, 0, 0, major, minor, name_len, 0] {
        write!(out, "{field:08X}")?;
    }
    out.write_all(path.as_bytes())?;
    out.write_all(&[0])?;
    pad(out, HEADER_BYTES + u64::from(name_len))
}

/// Zeros up to the next multiple of four.
fn pad(out: &mut impl Write, written: u64) -> io::Result<()> {
    out.write_all(&[0; 3][..(written.next_multiple_of(4) - written) as usize])
}

const HEADER_BYTES: u64 = 110;

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        let mut tree = Tree::new();
        tree.file("init", 0o755, Content::bytes(*b"program"), "skerry").unwrap();
        tree.char_device("dev/console", 0o600, (5, 1), "skerry").unwrap();
        tree.link("lib/here", "../there", "skerry").unwrap();
        tree.file("empty", 0o644, Content::bytes(Vec::new()), "skerry").unwrap();
        tree
    }

    fn archive() -> Vec<u8> {
        let mut bytes = Vec::new();
        write(&tree(), 1_700_000_000, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn archive_is_the_same_every_time_and_aligned() {
        let bytes = archive();
        assert!(bytes == archive());
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        let paths: Vec<_> =
            ["dev", "dev/console", "empty", "init", "lib", "lib/here", "TRAILER!!!"].into();
        let mut at = 0;
        for path in paths {
            let field = |number: usize| {
                let text = std::str::from_utf8(&bytes[at + 6 + 8 * number..][..8]).unwrap();
                u32::from_str_radix(text, 16).unwrap() as usize
            };
            assert_eq!(&bytes[at + 110..][..path.len()], path.as_bytes());
            assert_eq!(field(11), path.len() + 1);
            let (size, name) = (field(6), field(11));
            match path {
                "dev" => assert_eq!((field(1), field(4)), (0o040_755, 2)),
                "dev/console" => assert_eq!((field(1), field(9), field(10)), (0o020_600, 5, 1)),
                "init" => assert_eq!((field(1), field(5), size), (0o100_755, 1_700_000_000, 7)),
                "lib/here" => assert_eq!((field(1), size), (0o120_777, 8)),
                _ => {}
            }
            at = (at + 110 + name).next_multiple_of(4) + size.next_multiple_of(4);
        }
        assert_eq!(at, bytes.len());
    }

    #[test]
    fn cpio_program_lists_what_is_in_it() {
        let mut command = std::process::Command::new("cpio");
        command.args(["--list", "--quiet"]).stdin(std::process::Stdio::piped());
        let Ok(mut child) = command.stdout(std::process::Stdio::piped()).spawn() else {
            eprintln!("not compared: there is no cpio here");
            return;
        };
        child.stdin.take().unwrap().write_all(&archive()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let listed = String::from_utf8(output.stdout).unwrap();
        assert_eq!(
            listed.lines().collect::<Vec<_>>(),
            ["dev", "dev/console", "empty", "init", "lib", "lib/here"]
        );
    }

    #[test]
    fn microcode_is_where_the_kernel_looks() {
        let path = "kernel/x86/microcode/AuthenticAMD.bin";
        let files = [(path.to_owned(), Content::bytes([b'A'; 4]))];
        let bytes = microcode(&files, 0).unwrap().unwrap();
        assert!(bytes.windows(path.len()).any(|part| part == path.as_bytes()));
        assert!(bytes.windows(4).any(|part| part == b"AAAA"));
        assert_eq!(microcode(&[], 0).unwrap(), None);
        assert!(microcode(&[("/etc".into(), Content::bytes([1]))], 0).is_err());
    }
}
