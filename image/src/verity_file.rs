//! The root partition's content: a file system with its hash tree behind it.
//!
//! The tree itself is [`skerry_init::verity`]; this is the part that reads and writes files. Called by
//! [`crate::build`]. The salt follows from the content, so that one content gives one root hash.

use sha2::{Digest, Sha256};
use skerry_init::verity::{self, BLOCK, Verity};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// Appends superblock and tree to the file system in `path`, whose length is a whole number of blocks.
///
/// # Errors
///
/// Those of the file; `InvalidInput` when its length is no multiple of 4096, or 0.
pub fn append(path: &Path) -> io::Result<Verity> {
    let mut file = File::options().read(true).write(true).open(path)?;
    let bytes = file.metadata()?.len();
    if bytes == 0 || bytes % BLOCK as u64 != 0 {
        let what =
            format!("a file system of {bytes} bytes is no whole number of blocks of {BLOCK}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let content = digest(&file)?;
    let salt = derive("skerry verity salt", &content);
    let uuid = derive("skerry verity uuid", &content);
    let mut first = [0; 16];
    first.copy_from_slice(&uuid[..16]);
    file.seek(SeekFrom::Start(0))?;
    let tree = verity::build(
        BufReader::with_capacity(READ_BYTES, &file),
        bytes / BLOCK as u64,
        &salt,
        first,
    )?;
    file.seek(SeekFrom::Start(bytes))?;
    file.write_all(&tree.bytes)?;
    Ok(tree.verity)
}

/// Bytes that are read at once.
const READ_BYTES: usize = 1 << 20;

fn digest(mut file: &File) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; READ_BYTES];
    file.seek(SeekFrom::Start(0))?;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().into()),
            read => hash.update(&buffer[..read]),
        }
    }
}

fn derive(word: &str, content: &[u8]) -> [u8; 32] {
    Sha256::new_with_prefix(word).chain_update(content).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tree_follows_the_data_and_depends_on_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, byte: u8| {
            let path = dir.path().join(name);
            std::fs::write(&path, vec![byte; 200 * BLOCK]).unwrap();
            let verity = append(&path).unwrap();
            (verity, std::fs::read(&path).unwrap())
        };
        let (first, bytes) = make("a", 1);
        assert_eq!(make("b", 1), (first.clone(), bytes.clone()));
        assert_eq!(bytes.len() as u64, first.blocks() * BLOCK as u64);
        assert_eq!(bytes[200 * BLOCK..][..6], *b"verity");
        let (other, _) = make("c", 2);
        assert!(other.root != first.root && other.salt != first.salt);
    }

    #[test]
    fn half_a_block_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("odd");
        for length in [0, 1, BLOCK + 512] {
            std::fs::write(&path, vec![1; length]).unwrap();
            assert_eq!(append(&path).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{length}");
        }
    }

    /// `veritysetup` is asked where there is one; it wants no root for files.
    #[test]
    fn veritysetup_accepts_the_file_and_makes_the_same_one() {
        let Ok(version) = std::process::Command::new("veritysetup").arg("--version").output()
        else {
            eprintln!("not compared: there is no veritysetup here");
            return;
        };
        assert!(version.status.success());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root");
        // More than one block of hashes, and an end in the middle of one.
        let data: Vec<u8> =
            (0..20_000_u32).flat_map(|block| [block.to_le_bytes(); 1024].concat()).collect();
        let data = &data[..300 * BLOCK];
        std::fs::write(&path, data).unwrap();
        let verity = append(&path).unwrap();
        let size = (300 * BLOCK).to_string();
        let file = path.to_str().unwrap();
        let root = verity::hex(&verity.root);
        let veritysetup = |arguments: &[&str]| {
            std::process::Command::new("veritysetup").args(arguments).output().unwrap()
        };
        let offset = format!("--hash-offset={size}");
        let verified = veritysetup(&["verify", file, file, &root, &offset]);
        assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));

        let other = dir.path().join("other");
        std::fs::write(&other, data).unwrap();
        let other = other.to_str().unwrap();
        let made = std::fs::read(&path).unwrap();
        let uuid = &made[300 * BLOCK + 16..][..16];
        let uuid = skerry_init::gpt::Guid(uuid.try_into().unwrap()).printed();
        // The superblock holds the UUID as it is printed; `Guid` swaps.
        let uuid = skerry_init::gpt::Guid(uuid).to_string();
        let (salt, uuid) =
            (format!("--salt={}", verity::hex(&verity.salt)), format!("--uuid={uuid}"));
        let formatted =
            veritysetup(&["format", other, other, &offset, &salt, &uuid, "--data-blocks=300"]);
        let told = String::from_utf8_lossy(&formatted.stdout);
        assert!(formatted.status.success(), "{told}");
        assert!(told.contains(&root), "{told}");
        assert!(std::fs::read(other).unwrap() == made, "the same bytes, superblock and tree");
    }
}
