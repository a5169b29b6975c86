//! dm-verity: the hash tree of the root file system, and how the kernel is told about it.
//!
//! The builder of the image makes the tree and appends it to the root; PID 1 reads [`Verity`] from the kernel command
//! line and gives [`Verity::table`] to the device mapper. Nothing here touches a device.
//!
//! SHA-256, blocks of 4096 bytes, hash type 1 (the salt comes before the data). A superblock of one block comes first,
//! as `veritysetup` writes it; nothing at run time reads it, it is there for people.
//!
//! Source: the kernel's Documentation/admin-guide/device-mapper/verity.rst and cryptsetup's description of the
//! superblock.

use sha2::{Digest, Sha256};
use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

/// Bytes in a block, of data and of hashes.
pub const BLOCK: usize = 4096;
/// Bytes of a digest.
pub const DIGEST: usize = 32;
/// Most bytes of salt that the superblock holds.
pub const SALT_MAX: usize = 256;
const DIGESTS_PER_BLOCK: usize = BLOCK / DIGEST;
const SUPERBLOCK_BYTES: usize = 512;

/// All that is needed to open a verified device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verity {
    /// Blocks of data.
    pub data_blocks: u64,
    /// Block at which the tree begins; the superblock is one before.
    pub hash_start: u64,
    /// Digest of the tree's top block.
    pub root: [u8; DIGEST],
    /// Salt, at most [`SALT_MAX`] bytes.
    pub salt: Vec<u8>,
}

/// What the kernel does when a block is not what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Corruption {
    /// The read fails.
    Error,
    /// The kernel panics, and starts again after `panic=` seconds.
    Panic,
}

/// A text that is not `<data blocks>,<hash start>,<root>,<salt>`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not `<data blocks>,<hash start block>,<root hash>,<salt>`")]
pub struct VerityParseError(String);

impl Verity {
    /// Sectors of the verified device.
    pub fn sectors(&self) -> u64 {
        self.data_blocks * (BLOCK as u64 / 512)
    }

    /// Blocks of data, superblock and tree together: what has to be read from the partition.
    pub fn blocks(&self) -> u64 {
        self.hash_start + tree_blocks(self.data_blocks)
    }

    /// The parameters of the device mapper's target `verity`, with data and tree on `device` (`major:minor` or a path).
    pub fn table(&self, device: &str, corruption: Corruption) -> String {
        let options = match corruption {
            Corruption::Error => "1 ignore_zero_blocks",
            Corruption::Panic => "2 ignore_zero_blocks panic_on_corruption",
        };
        let salt = if self.salt.is_empty() { "-".into() } else { hex(&self.salt) };
        format!(
            "1 {device} {device} {BLOCK} {BLOCK} {} {} sha256 {} {salt} {options}",
            self.data_blocks,
            self.hash_start,
            hex(&self.root),
        )
    }
}

/// The form of the kernel command line.
impl fmt::Display for Verity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { data_blocks, hash_start, root, salt } = self;
        write!(f, "{data_blocks},{hash_start},{},{}", hex(root), hex(salt))
    }
}

impl FromStr for Verity {
    type Err = VerityParseError;

    fn from_str(text: &str) -> Result<Self, VerityParseError> {
        let parse = || {
            let mut parts = text.split(',');
            let mut next = || parts.next();
            let data_blocks = number(next()?)?;
            let hash_start = number(next()?)?;
            let root = unhex(next()?)?.try_into().ok()?;
            let salt = unhex(next()?)?;
            let whole = parts.next().is_none()
                && data_blocks > 0
                && hash_start > data_blocks
                // Sector numbers stay far from the end of 64 bits.
                && hash_start < 1 << 48
                && salt.len() <= SALT_MAX;
            whole.then_some(Self { data_blocks, hash_start, root, salt })
        };
        parse().ok_or_else(|| VerityParseError(text.chars().take(400).collect()))
    }
}

/// Reads a decimal number without sign.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// A superblock and a tree, to be written behind the data, and what describes them.
#[derive(Debug, Clone)]
pub struct Tree {
    /// Superblock and tree, a whole number of blocks.
    pub bytes: Vec<u8>,
    /// What the kernel has to know.
    pub verity: Verity,
}

/// Makes the tree over `data`, which has `data_blocks` blocks. `uuid` is for the superblock, in printed order.
///
/// Holds the tree in memory, which is 1/127 of the data.
///
/// # Errors
///
/// Those of reading; `UnexpectedEof` when there is less data; `InvalidInput` for no data or too much salt.
pub fn build(
    mut data: impl Read,
    data_blocks: u64,
    salt: &[u8],
    uuid: [u8; 16],
) -> io::Result<Tree> {
    if data_blocks == 0 || salt.len() > SALT_MAX {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let salted = Sha256::new_with_prefix(salt);
    let digest =
        |block: &[u8]| -> [u8; DIGEST] { salted.clone().chain_update(block).finalize().into() };
    let mut block = vec![0; BLOCK];
    let mut digests = Vec::new();
    for _ in 0..data_blocks {
        data.read_exact(&mut block)?;
        digests.push(digest(&block));
    }
    // From the leaves up; the kernel wants the top first.
    let mut levels: Vec<Vec<u8>> = Vec::new();
    while digests.len() > 1 {
        let mut level = Vec::with_capacity(digests.len().div_ceil(DIGESTS_PER_BLOCK) * BLOCK);
        for children in digests.chunks(DIGESTS_PER_BLOCK) {
            children.iter().for_each(|child| level.extend_from_slice(child));
            level.resize(level.len().next_multiple_of(BLOCK), 0);
        }
        digests = level.chunks(BLOCK).map(digest).collect();
        levels.push(level);
    }
    let mut bytes = superblock(data_blocks, salt, uuid);
    levels.iter().rev().for_each(|level| bytes.extend_from_slice(level));
    let verity =
        Verity { data_blocks, hash_start: data_blocks + 1, root: digests[0], salt: salt.to_vec() };
    Ok(Tree { bytes, verity })
}

/// Blocks of the tree over `data_blocks` blocks, without its superblock.
fn tree_blocks(data_blocks: u64) -> u64 {
    let (mut blocks, mut total) = (data_blocks, 0);
    while blocks > 1 {
        blocks = blocks.div_ceil(DIGESTS_PER_BLOCK as u64);
        total += blocks;
    }
    total
}

fn superblock(data_blocks: u64, salt: &[u8], uuid: [u8; 16]) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    bytes[..8].copy_from_slice(b"verity\0\0");
    bytes[8..12].copy_from_slice(&1_u32.to_le_bytes());
    bytes[12..16].copy_from_slice(&1_u32.to_le_bytes());
    bytes[16..32].copy_from_slice(&uuid);
    bytes[32..38].copy_from_slice(b"sha256");
    bytes[64..68].copy_from_slice(&(BLOCK as u32).to_le_bytes());
    bytes[68..72].copy_from_slice(&(BLOCK as u32).to_le_bytes());
    bytes[72..80].copy_from_slice(&data_blocks.to_le_bytes());
    bytes[80..82].copy_from_slice(&(salt.len() as u16).to_le_bytes());
    bytes[88..88 + salt.len()].copy_from_slice(salt);
    const { assert!(88 + SALT_MAX <= SUPERBLOCK_BYTES) };
    bytes
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Bytes of a hexadecimal text of even length.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|digit| digit.to_digit(16).map(|digit| digit as u8)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    Some(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Data that differs from block to block.
    fn data(blocks: u64) -> Vec<u8> {
        (0..blocks).flat_map(|block| [(block % 251) as u8 + 1; BLOCK]).collect()
    }

    fn tree(blocks: u64) -> Tree {
        build(data(blocks).as_slice(), blocks, &[0x5a; 32], *b"0123456789abcdef")
            .expect("in memory")
    }

    #[test]
    fn tree_has_the_shape_that_the_kernel_expects() {
        for (blocks, hashes) in
            [(1, 0), (2, 1), (128, 1), (129, 3), (128 * 128, 129), (128 * 128 + 1, 132)]
        {
            let tree = tree(blocks);
            assert_eq!(tree.bytes.len(), (1 + hashes) * BLOCK, "{blocks}");
            assert_eq!(tree.verity.hash_start, blocks + 1);
            assert_eq!(tree.verity.blocks(), blocks + 1 + hashes as u64);
        }
    }

    #[test]
    fn root_hash_is_the_salted_digest_of_the_top_block() {
        let tree = tree(300);
        let top = &tree.bytes[BLOCK..2 * BLOCK];
        let root: [u8; 32] =
            Sha256::new_with_prefix([0x5a; 32]).chain_update(top).finalize().into();
        assert_eq!(root, tree.verity.root);
        let leaf = &tree.bytes[2 * BLOCK..];
        let first: [u8; 32] =
            Sha256::new_with_prefix([0x5a; 32]).chain_update(data(1)).finalize().into();
        assert_eq!(leaf[..32], first);
    }

    #[test]
    fn command_line_form_is_read_back() {
        let verity = tree(5).verity;
        assert_eq!(verity.to_string().parse(), Ok(verity.clone()));
        let text = verity.to_string();
        for bad in [
            "",
            "5",
            "5,6",
            &text[..text.len() - 1],
            &format!("{text},"),
            &text.replace("5,6", "-5,6"),
            &text.replace("5,6", "+5,6"),
            &text.replace("5,6", "0,6"),
            &text.replace("5,6", "6,6"),
            &text.replace("5,6", "5,18446744073709551615"),
            &text.replace("5,6", "5,99999999999999999999"),
            "5,6,äöü,00",
        ] {
            assert!(bad.parse::<Verity>().is_err(), "{bad}");
        }
        let error = "x".repeat(10_000).parse::<Verity>().expect_err("bad").to_string();
        assert!(error.len() < 600, "a long text is not repeated as a whole");
    }

    #[test]
    fn table_names_the_device_twice_and_the_options() {
        let verity = Verity { data_blocks: 9, hash_start: 10, root: [1; 32], salt: vec![0xab] };
        let root = "01".repeat(32);
        assert_eq!(
            verity.table("254:3", Corruption::Error),
            format!("1 254:3 254:3 4096 4096 9 10 sha256 {root} ab 1 ignore_zero_blocks")
        );
        let unsalted = Verity { salt: Vec::new(), ..verity };
        assert_eq!(
            unsalted.table("/dev/vda3", Corruption::Panic),
            format!(
                "1 /dev/vda3 /dev/vda3 4096 4096 9 10 sha256 {root} - 2 ignore_zero_blocks panic_on_corruption"
            )
        );
        assert_eq!(unsalted.sectors(), 72);
    }

    #[test]
    fn missing_data_is_an_error() {
        assert!(build(data(4).as_slice(), 5, &[], [0; 16]).is_err());
        assert!(build(io::empty(), 0, &[], [0; 16]).is_err());
        assert!(build(data(1).as_slice(), 1, &[0; 257], [0; 16]).is_err());
    }
}
