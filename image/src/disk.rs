//! The flash file: partition table, loader's partition, configuration, root; everything else is zeros and is not
//! stored.
//!
//! [`write`] is called by [`crate::build`]. It writes a plain file and needs neither root nor a loop device; the
//! partitions that are missing in the file are made by PID 1 at the first boot.

use skerry_init::gpt::{IMAGE_BYTES, Part, Table};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// What is on the disk.
#[derive(Debug, Clone, Copy)]
pub struct Contents<'a> {
    /// The ESP, a volume made by [`crate::fat::esp`].
    pub esp: &'a [u8],
    /// The configuration's, by [`crate::fat::config`].
    pub config: &'a [u8],
    /// The root with its hash tree.
    pub root: &'a Path,
    /// A word for all of it, for the GUIDs: equal words give equal GUIDs.
    pub seed: &'a str,
}

/// Why there is no flash file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// A part is larger than its partition.
    #[error("`{label}` has {have} bytes, its partition has {most}")]
    TooLarge {
        /// Which one.
        label: &'static str,
        /// Its size.
        have: u64,
        /// The partition's size.
        most: u64,
    },
    /// A file cannot be read or written.
    #[error("could not write the flash file")]
    File(#[from] io::Error),
}

/// Writes the flash file; what is at `out` is replaced.
///
/// # Errors
///
/// [`DiskError`]; `out` is then not to be used.
pub fn write(contents: &Contents<'_>, out: &Path) -> Result<(), DiskError> {
    let root_bytes = std::fs::metadata(contents.root)?.len();
    let sizes = [
        (Part::ESP, contents.esp.len() as u64),
        (Part::CONFIG, contents.config.len() as u64),
        (Part::ROOT_A, root_bytes),
    ];
    for (part, have) in sizes {
        if have > part.bytes() {
            return Err(DiskError::TooLarge { label: part.label, have, most: part.bytes() });
        }
    }
    let table = Table::of_image(contents.seed);
    let at =
        |part: Part| table.by_label(part.label).expect("the layout of the image has it").offset();
    let mut file = File::create(out)?;
    file.set_len(IMAGE_BYTES)?;
    let writes = table.writes().expect("the layout of the image is a table");
    for (offset, bytes) in writes.backup.iter().chain(&writes.primary) {
        sparse(&mut file, *offset, &mut bytes.as_slice())?;
    }
    sparse(&mut file, at(Part::ESP), &mut &*contents.esp)?;
    sparse(&mut file, at(Part::CONFIG), &mut &*contents.config)?;
    let mut root = BufReader::with_capacity(PIECE_BYTES, File::open(contents.root)?);
    sparse(&mut file, at(Part::ROOT_A), &mut root)?;
    file.sync_all()?;
    Ok(())
}

/// Bytes that are looked at together: a piece of zeros leaves a hole.
const PIECE_BYTES: usize = 64 * 1024;
static ZEROS: [u8; PIECE_BYTES] = [0; PIECE_BYTES];

fn sparse(out: &mut File, mut offset: u64, content: &mut impl Read) -> io::Result<()> {
    let mut piece = Vec::with_capacity(PIECE_BYTES);
    loop {
        piece.clear();
        content.take(PIECE_BYTES as u64).read_to_end(&mut piece)?;
        if piece.is_empty() {
            return Ok(());
        }
        if piece != ZEROS[..piece.len()] {
            out.seek(SeekFrom::Start(offset))?;
            out.write_all(&piece)?;
        }
        offset += piece.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fat;
    use skerry_init::gpt::{HEAD_BYTES, Origin, SECTOR, TAIL_BYTES};
    use std::os::unix::fs::MetadataExt;

    fn make(dir: &Path, root_bytes: usize) -> Result<std::path::PathBuf, DiskError> {
        let root = dir.join("root");
        std::fs::write(&root, vec![3; root_bytes]).unwrap();
        let esp = fat::esp(&[("EFI/BOOT/BOOTX64.EFI".into(), vec![1; 5000])], 1).unwrap();
        let config = fat::config(&[("site.toml".into(), b"x".to_vec())], 2).unwrap();
        let out = dir.join("disk");
        write(&Contents { esp: &esp, config: &config, root: &root, seed: "test" }, &out)?;
        Ok(out)
    }

    #[test]
    fn flash_file_has_a_table_at_both_ends_and_takes_little_space() {
        let dir = tempfile::tempdir().unwrap();
        let path = make(dir.path(), 5 << 20).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, IMAGE_BYTES);
        let allocated = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(allocated < 16 << 20, "{allocated} bytes are stored");
        let (head, tail) = (&bytes[..HEAD_BYTES], &bytes[bytes.len() - TAIL_BYTES..]);
        let (table, origin) = Table::decode(head, tail, IMAGE_BYTES / SECTOR).unwrap();
        assert_eq!(origin, Origin::Primary);
        let at = |label: &str| table.by_label(label).unwrap().offset() as usize;
        assert_eq!(&bytes[at("esp") + 71..][..3], b"ESP");
        assert_eq!(&bytes[at("config") + 43..][..9], b"SKERRYCFG");
        assert!(bytes[at("root-a")..][..5 << 20].iter().all(|byte| *byte == 3));
        std::fs::rename(&path, dir.path().join("first")).unwrap();
        assert!(
            bytes == std::fs::read(make(dir.path(), 5 << 20).unwrap()).unwrap(),
            "two are equal"
        );
    }

    #[test]
    fn root_that_is_too_large_is_refused_with_figures() {
        let dir = tempfile::tempdir().unwrap();
        let error = make(dir.path(), Part::ROOT_A.bytes() as usize + 1).unwrap_err().to_string();
        assert_eq!(error, "`root-a` has 201326593 bytes, its partition has 201326592");
    }

    #[test]
    fn sgdisk_finds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = make(dir.path(), 4096).unwrap();
        let Ok(output) = std::process::Command::new("sgdisk").arg("--verify").arg(&path).output()
        else {
            eprintln!("not compared: there is no sgdisk here");
            return;
        };
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && told.contains("No problems found"), "{told}");
    }
}
