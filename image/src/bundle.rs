//! The bundle: one file with everything that an update needs.
//!
//! A tar archive, so that people can look into it, in a fixed order: `manifest.json`, its signature
//! `manifest.json.sig` (Ed25519, 64 bytes; missing in an unsigned bundle), `uki.efi`, `root.img`. A reader knows after
//! the first kilobytes whether it wants the rest, and every byte is checked while it streams past. [`write`] is called
//! by [`crate::build`], [`read`] by whoever takes a bundle.

use crate::manifest::{self, Manifest, ManifestError};
use sha2::{Digest, Sha256};
use std::io::{self, Read, Write};

/// Name of the manifest.
pub const MANIFEST: &str = "manifest.json";
/// Name of its signature.
pub const SIGNATURE: &str = "manifest.json.sig";
/// Bytes of a signature.
pub const SIGNATURE_BYTES: usize = 64;

/// Writes a bundle. `parts` are in the order of the manifest.
///
/// # Errors
///
/// Those of reading and writing; `InvalidInput` when a part is not as long as the manifest says.
pub fn write(
    manifest: &Manifest,
    signature: Option<&[u8]>,
    parts: &mut [&mut dyn Read],
    out: impl Write,
) -> io::Result<()> {
    let mut archive = tar::Builder::new(out);
    let mut append = |name: &str, bytes: u64, content: &mut dyn Read| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes);
        header.set_mode(0o644);
        header.set_mtime(manifest.epoch);
        header.set_uid(0);
        header.set_gid(0);
        header.set_entry_type(tar::EntryType::Regular);
        let mut counted = Counted { inner: content.take(bytes), bytes: 0 };
        archive.append_data(&mut header, name, &mut counted)?;
        match counted.bytes == bytes {
            true => Ok(()),
            false => {
                let what =
                    format!("`{name}` has {} bytes, the manifest says {bytes}", counted.bytes);
                Err(io::Error::new(io::ErrorKind::InvalidInput, what))
            }
        }
    };
    let text = manifest.to_bytes();
    append(MANIFEST, text.len() as u64, &mut text.as_slice())?;
    if let Some(mut signature) = signature {
        append(SIGNATURE, signature.len() as u64, &mut signature)?;
    }
    for (part, content) in manifest.parts.iter().zip(parts) {
        append(&part.name, part.bytes, *content)?;
    }
    archive.into_inner()?.flush()
}

struct Counted<R> {
    inner: R,
    bytes: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.bytes += read as u64;
        Ok(read)
    }
}

/// Why a bundle was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// It cannot be read, or is no archive, or ends too early.
    #[error("the bundle cannot be read")]
    Read(#[from] io::Error),
    /// The manifest is none.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Something else than what has to come now.
    #[error("the bundle has `{found}` where `{wanted}` has to be")]
    Order {
        /// What is there.
        found: String,
        /// What should be.
        wanted: String,
    },
    /// No signature, or by a key that is not trusted, or over something else.
    #[error("the bundle is not signed by a key that is trusted here")]
    Signature,
    /// A part is not the one that was signed.
    #[error("`{0}` is not what the manifest says")]
    Part(String),
}

/// Whose signature is wanted.
#[derive(Debug, Clone, Copy)]
pub enum Trust<'a> {
    /// One of these Ed25519 keys, 32 bytes each.
    Keys(&'a [Vec<u8>]),
    /// Nobody's: for a look at one's own bundle.
    Anybody,
}

/// Reads a bundle. `wanted` sees the manifest once its signature was checked, and may refuse; then `sink` gets the
/// parts, piece by piece, by name. What `sink` got is good only when this returns without an error.
///
/// # Errors
///
/// [`BundleError`], and whatever `wanted` and `sink` say.
pub fn read<E: From<BundleError>>(
    bundle: impl Read,
    trust: Trust<'_>,
    wanted: impl FnOnce(&Manifest) -> Result<(), E>,
    mut sink: impl FnMut(&str, &[u8]) -> Result<(), E>,
) -> Result<Manifest, E> {
    let mut archive = tar::Archive::new(bundle);
    let mut entries = archive.entries().map_err(BundleError::Read)?;
    let mut next = || -> Result<_, BundleError> {
        let Some(entry) = entries.next() else { return Ok(None) };
        let entry = entry?;
        let regular = entry.header().entry_type() == tar::EntryType::Regular;
        let name = String::from_utf8_lossy(&entry.path_bytes()).chars().take(100).collect();
        // What is no file has no name that anybody waits for.
        Ok(Some((if regular { name } else { String::from("?") }, entry)))
    };
    let mut manifest_entry = expect(MANIFEST, next()?)?;
    let text = whole(&mut manifest_entry, manifest::BYTES_MAX)?;
    let mut ahead = next()?;
    let signature = match &mut ahead {
        Some((name, entry)) if name == SIGNATURE => {
            let signature = whole(entry, SIGNATURE_BYTES)?;
            ahead = next()?;
            Some(signature)
        }
        _ => None,
    };
    if let Trust::Keys(keys) = trust {
        let signature = signature.ok_or(BundleError::Signature)?;
        let good = |key: &&Vec<u8>| {
            let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, key);
            key.verify(&text, &signature).is_ok()
        };
        keys.iter().find(good).ok_or(BundleError::Signature)?;
    }
    // Only now: a manifest that nobody signed is not worth a look.
    let manifest = Manifest::parse(&text).map_err(BundleError::Manifest)?;
    wanted(&manifest)?;
    for part in &manifest.parts {
        let mut entry = expect(&part.name, ahead.take())?;
        let mut hash = Sha256::new();
        let (mut bytes, mut buffer) = (0, vec![0; PIECE_BYTES]);
        loop {
            let read = entry.read(&mut buffer).map_err(BundleError::Read)?;
            if read == 0 {
                break;
            }
            bytes += read as u64;
            if bytes > part.bytes {
                return Err(BundleError::Part(part.name.clone()).into());
            }
            hash.update(&buffer[..read]);
            sink(&part.name, &buffer[..read])?;
        }
        if bytes != part.bytes || crate::tree::hex(&hash.finalize()) != part.sha256 {
            return Err(BundleError::Part(part.name.clone()).into());
        }
        ahead = next()?;
    }
    match ahead {
        None => Ok(manifest),
        Some((found, _)) => Err(BundleError::Order { found, wanted: "the end".into() }.into()),
    }
}

fn expect<T>(wanted: &str, found: Option<(String, T)>) -> Result<T, BundleError> {
    match found {
        Some((name, entry)) if name == wanted => Ok(entry),
        other => {
            let found = other.map_or_else(|| "nothing".into(), |(name, _)| name);
            Err(BundleError::Order { found, wanted: wanted.into() })
        }
    }
}

fn whole(entry: &mut impl Read, most: usize) -> Result<Vec<u8>, BundleError> {
    let mut bytes = Vec::new();
    // One more, so that too much is told from just enough.
    entry.take(most as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Bytes that a sink gets at once, at most.
pub const PIECE_BYTES: usize = 256 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::tests::manifest;
    use ring::signature::{Ed25519KeyPair, KeyPair};

    fn digest(bytes: &[u8]) -> String {
        crate::tree::hex(&Sha256::digest(bytes))
    }

    fn key(seed: u8) -> Ed25519KeyPair {
        Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
    }

    fn trusted(seed: u8) -> Vec<Vec<u8>> {
        vec![vec![1; 32], key(seed).public_key().as_ref().to_vec()]
    }

    fn bundle(signer: Option<u8>, change: fn(&mut Vec<u8>, &mut Vec<u8>)) -> Vec<u8> {
        let (mut uki, mut root) = (vec![5; 700], vec![6; 2 * 4096]);
        let manifest = manifest((700, digest(&uki)), (2 * 4096, digest(&root)));
        let signature = signer.map(|seed| key(seed).sign(&manifest.to_bytes()).as_ref().to_vec());
        change(&mut uki, &mut root);
        let mut out = Vec::new();
        let parts: &mut [&mut dyn Read] = &mut [&mut uki.as_slice(), &mut root.as_slice()];
        write(&manifest, signature.as_deref(), parts, &mut out).unwrap();
        out
    }

    fn open(bytes: &[u8], trust: Trust<'_>) -> Result<Vec<(String, usize)>, BundleError> {
        let mut seen: Vec<(String, usize)> = Vec::new();
        read(
            bytes,
            trust,
            |_| Ok(()),
            |name, piece| {
                match seen.last_mut().filter(|(last, _)| last == name) {
                    Some((_, bytes)) => *bytes += piece.len(),
                    None => seen.push((name.into(), piece.len())),
                }
                Ok::<_, BundleError>(())
            },
        )?;
        Ok(seen)
    }

    #[test]
    fn bundle_is_read_back_and_two_are_equal() {
        let bytes = bundle(Some(1), |_, _| {});
        assert!(bytes == bundle(Some(1), |_, _| {}));
        let seen = open(&bytes, Trust::Keys(&trusted(1))).unwrap();
        assert_eq!(seen, [("uki.efi".to_owned(), 700), ("root.img".to_owned(), 8192)]);
        assert!(open(&bundle(None, |_, _| {}), Trust::Anybody).is_ok());
    }

    #[test]
    fn unsigned_and_wrongly_signed_bundles_are_refused_before_their_parts_are_read() {
        for bytes in [bundle(None, |_, _| {}), bundle(Some(2), |_, _| {})] {
            let mut pieces = 0;
            let outcome = read(
                bytes.as_slice(),
                Trust::Keys(&trusted(1)),
                |_| Ok(()),
                |_, _| {
                    pieces += 1;
                    Ok::<_, BundleError>(())
                },
            );
            assert!(matches!(outcome, Err(BundleError::Signature)));
            assert_eq!(pieces, 0);
        }
    }

    #[test]
    fn changed_cut_and_reordered_bundles_are_refused() {
        let trust = trusted(1);
        let outcome = |bytes: &[u8]| open(bytes, Trust::Keys(&trust));
        let changed = bundle(Some(1), |_, root| *root.last_mut().unwrap() ^= 1);
        assert!(matches!(outcome(&changed), Err(BundleError::Part(part)) if part == "root.img"));
        let whole = bundle(Some(1), |_, _| {});
        // The last kilobyte is the padding of tar.
        for length in (0..whole.len() - 1024).step_by(97) {
            assert!(outcome(&whole[..length]).is_err(), "{length}");
        }
        // Each file is a header of 512 bytes and its content: move the last one to the front.
        let root = whole.len() - 1024 - 8192 - 512;
        let mut moved = whole[root..root + 512 + 8192].to_vec();
        moved.extend_from_slice(&whole[..root]);
        assert!(matches!(outcome(&moved), Err(BundleError::Order { .. })));
        let mut longer = whole[..whole.len() - 1024].to_vec();
        longer.extend_from_slice(&whole[root..]);
        assert!(matches!(outcome(&longer), Err(BundleError::Order { .. })));
    }

    #[test]
    fn reader_may_refuse_after_the_manifest() {
        let bytes = bundle(Some(1), |_, _| {});
        let outcome = read(
            bytes.as_slice(),
            Trust::Keys(&trusted(1)),
            |manifest| match manifest.release_counter {
                3 => Err(BundleError::Part("too old".into())),
                _ => Ok(()),
            },
            |_, _| panic!("nothing is read after that"),
        );
        assert!(matches!(outcome, Err(BundleError::Part(why)) if why == "too old"));
    }

    #[test]
    fn changed_bytes_never_panic() {
        let whole = bundle(Some(1), |_, _| {});
        let mut word = 77_u32;
        for _ in 0..300 {
            word = word.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
            let mut bytes = whole.clone();
            let at = (word >> 8) as usize % 4096;
            bytes[at] ^= 1 << (word & 7);
            let _ = open(&bytes, Trust::Anybody);
            let _ = open(&bytes, Trust::Keys(&trusted(1)));
        }
    }
}
