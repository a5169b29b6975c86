//! The block index of a part of an update: a digest for each 4096 bytes of it.
//!
//! A node that knows the index of a part fetches only the blocks that it has nowhere yet, and checks each block as it
//! comes. The index is the concatenation of the SHA-256 of every block, the last block padded with zeros; the manifest
//! names the SHA-256 of the index, so that its signature covers each block. Unchanged content keeps its place modulo
//! 4096 in both parts: the root because file systems have blocks, the UKI because the builder aligns its sections.
//! Made by `skerry image`, read by the agent. Nothing here touches a file.

use crate::verity::hex;
use sha2::{Digest, Sha256};
use std::io::{self, Read};

/// Bytes of a block.
pub const BLOCK: usize = 4096;
/// Bytes of a digest in the index.
pub const DIGEST: usize = 32;
/// Longest part that has an index here: 4 GiB, which is an index of 32 MiB.
pub const PART_LEN_MAX: u64 = 4 << 30;

/// Why bytes are not the index of a part.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// The part is longer than [`PART_LEN_MAX`].
    #[error("a part of {0} bytes is larger than the {PART_LEN_MAX} that are possible")]
    Large(u64),
    /// It has not one digest for each block.
    #[error("the block index has {found} bytes, {wanted} are right")]
    Length {
        /// What it has.
        found: usize,
        /// What it should have.
        wanted: usize,
    },
    /// It is not the one that the manifest names.
    #[error("the block index is not the one that the manifest names")]
    Digest,
}

/// Makes the index of what `part` gives until its end.
///
/// # Errors
///
/// Those of reading.
pub fn index(mut part: impl Read) -> io::Result<Vec<u8>> {
    let mut digests = Vec::new();
    let mut block = [0; BLOCK];
    loop {
        let filled = fill(&mut part, &mut block)?;
        if filled == 0 {
            return Ok(digests);
        }
        digests.extend_from_slice(&digest(&block[..filled]));
        if filled < BLOCK {
            return Ok(digests);
        }
    }
}

/// The digest of one block; a short one is padded with zeros.
///
/// # Panics
///
/// When there are more than [`BLOCK`] bytes.
pub fn digest(block: &[u8]) -> [u8; DIGEST] {
    assert!(block.len() <= BLOCK, "a block has at most 4096 bytes");
    let padding = [0; BLOCK];
    Sha256::new().chain_update(block).chain_update(&padding[block.len()..]).finalize().into()
}

/// Reads until the block is full or there is no more.
fn fill(part: &mut impl Read, block: &mut [u8; BLOCK]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < BLOCK {
        match part.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// A block index that is the one of its manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    digests: Vec<u8>,
    part_len: u64,
}

impl Index {
    /// Checks the index of a part of `part_len` bytes against the digest that the manifest gives (hexadecimal).
    ///
    /// # Errors
    ///
    /// [`IndexError`].
    pub fn parse(bytes: Vec<u8>, part_len: u64, expected_sha256: &str) -> Result<Self, IndexError> {
        if part_len > PART_LEN_MAX {
            return Err(IndexError::Large(part_len));
        }
        let blocks = usize::try_from(part_len.div_ceil(BLOCK as u64)).expect("at most 2^20");
        if bytes.len() != blocks * DIGEST {
            return Err(IndexError::Length { found: bytes.len(), wanted: blocks * DIGEST });
        }
        if hex(&Sha256::digest(&bytes)) != expected_sha256 {
            return Err(IndexError::Digest);
        }
        Ok(Self { digests: bytes, part_len })
    }

    /// Length of an index for a part of `part_len` bytes.
    pub fn bytes_of(part_len: u64) -> u64 {
        part_len.div_ceil(BLOCK as u64) * DIGEST as u64
    }

    /// How many blocks the part has.
    pub fn blocks(&self) -> usize {
        self.digests.len() / DIGEST
    }

    /// The digests, in the order of the blocks.
    pub fn digests(&self) -> impl Iterator<Item = &[u8; DIGEST]> {
        self.digests.chunks_exact(DIGEST).map(|one| one.try_into().expect("chunks of that length"))
    }

    /// The digest of a block; `None` behind the end.
    pub fn digest(&self, block: usize) -> Option<&[u8; DIGEST]> {
        let at = block.checked_mul(DIGEST)?;
        self.digests.get(at..at.checked_add(DIGEST)?)?.try_into().ok()
    }

    /// Bytes of a block: [`BLOCK`], fewer for the last one, 0 behind the end.
    pub fn block_len(&self, block: usize) -> usize {
        let start = (block as u64).saturating_mul(BLOCK as u64);
        let rest = self.part_len.saturating_sub(start);
        usize::try_from(rest).map_or(BLOCK, |rest| rest.min(BLOCK))
    }

    /// Whether `bytes` are this block: its length without padding, its digest with.
    pub fn is_block(&self, block: usize, bytes: &[u8]) -> bool {
        bytes.len() == self.block_len(block)
            && self.digest(block).is_some_and(|wanted| digest(bytes) == *wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn checked(part: &[u8]) -> Index {
        let bytes = index(part).expect("memory can be read");
        let digest = hex(&Sha256::digest(&bytes));
        Index::parse(bytes, part.len() as u64, &digest).expect("its own index")
    }

    /// Gives few bytes at a time.
    struct Drops<'a>(&'a [u8], usize);

    impl Read for Drops<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(buffer.len()).min(self.0.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    #[test]
    fn index_has_a_digest_for_each_block_and_pads_the_last() {
        assert_eq!(checked(&[]).blocks(), 0);
        let mut part = vec![7; BLOCK];
        assert_eq!(checked(&part).blocks(), 1);
        part.push(9);
        let index = checked(&part);
        assert_eq!((index.blocks(), index.block_len(0), index.block_len(1)), (2, BLOCK, 1));
        let mut padded = vec![0; BLOCK];
        padded[0] = 9;
        assert_eq!(index.digest(1), Some(&digest(&padded)));
        assert!(index.is_block(1, &[9]) && !index.is_block(1, &padded), "its length counts");
        assert_eq!((index.digest(2), index.block_len(2)), (None, 0));
        assert_eq!(index.digest(usize::MAX), None);
    }

    #[test]
    fn wrong_lengths_and_digests_are_told_apart() {
        let bytes = index(&[1; 9000][..]).unwrap();
        let right = hex(&Sha256::digest(&bytes));
        let parse = |bytes: Vec<u8>, len, digest: &str| Index::parse(bytes, len, digest);
        let wrong = IndexError::Length { found: 96, wanted: 64 };
        assert_eq!(parse(bytes.clone(), 8000, &right), Err(wrong));
        assert_eq!(parse(bytes.clone(), 9000, &"00".repeat(32)), Err(IndexError::Digest));
        assert_eq!(parse(bytes, u64::MAX, &right), Err(IndexError::Large(u64::MAX)));
    }

    proptest! {
        #[test]
        fn every_block_is_found_under_its_digest_and_no_other_is(
            part in proptest::collection::vec(any::<u8>(), 0..3 * BLOCK + 5),
            step in 1_usize..5000, flip in any::<usize>(),
        ) {
            let index = checked(&part);
            prop_assert_eq!(&super::index(Drops(&part, step)).unwrap(), &index.digests);
            prop_assert_eq!(Index::bytes_of(part.len() as u64), index.digests.len() as u64);
            prop_assert_eq!(index.digests().count(), index.blocks());
            for (number, block) in part.chunks(BLOCK).enumerate() {
                prop_assert!(index.is_block(number, block));
                let mut other = block.to_vec();
                let at = flip % other.len();
                other[at] ^= 1;
                prop_assert!(!index.is_block(number, &other));
            }
        }

        #[test]
        fn any_bytes_are_an_index_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), len in any::<u64>(),
        ) {
            let digest = hex(&Sha256::digest(&bytes));
            let fits = len <= PART_LEN_MAX && Index::bytes_of(len) == bytes.len() as u64;
            prop_assert_eq!(Index::parse(bytes, len, &digest).is_ok(), fits);
        }
    }
}
