//! The bundle: one file with everything that an update needs.
//!
//! A tar archive, so that people can look into it, in a fixed order: `manifest.json`, its signature
//! `manifest.json.sig` (Ed25519, 64 bytes; missing in an unsigned bundle), `uki.efi`, `root.img`. A reader knows after
//! the first kilobytes whether it wants the rest, and every byte is checked while it streams past. [`write`] is called
//! by the builder of the image, [`read`] by PID 1 for a stick and by `skerry image`.
//!
//! The reader knows plain files with short names and nothing else of tar: whatever else the format has grown (long
//! names, links, sparse files) is memory and behaviour that an unsigned file could ask for.
//!
//! Source: POSIX.1-2001, pax, "ustar Interchange Format".

use crate::manifest::{self, Manifest, ManifestError};
use crate::trust::{self, Key};
use crate::verity::hex;
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
    mut out: impl Write,
) -> io::Result<()> {
    let text = manifest.to_bytes();
    append(&mut out, manifest.epoch, MANIFEST, text.len() as u64, &mut text.as_slice())?;
    if let Some(mut signature) = signature {
        append(&mut out, manifest.epoch, SIGNATURE, signature.len() as u64, &mut signature)?;
    }
    for (part, content) in manifest.parts.iter().zip(parts) {
        append(&mut out, manifest.epoch, &part.name, part.bytes, *content)?;
    }
    out.write_all(&[0; 2 * RECORD])?;
    out.flush()
}

fn append(
    out: &mut impl Write,
    epoch: u64,
    name: &str,
    bytes: u64,
    content: &mut dyn Read,
) -> io::Result<()> {
    out.write_all(&header(name, bytes, epoch))?;
    let written = io::copy(&mut content.take(bytes), out)?;
    if written != bytes {
        let what = format!("`{name}` has {written} bytes, the manifest says {bytes}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    out.write_all(&[0; RECORD][..padding(bytes)])
}

/// Bytes of a record of tar.
const RECORD: usize = 512;
/// Where a header has its fields.
const NAME: std::ops::Range<usize> = 0..100;
const SIZE: std::ops::Range<usize> = 124..136;
const CHECKSUM: std::ops::Range<usize> = 148..156;
const KIND: usize = 156;
const MAGIC: std::ops::Range<usize> = 257..263;
const PREFIX: std::ops::Range<usize> = 345..500;

/// Bytes from the end of a file to the next record.
fn padding(bytes: u64) -> usize {
    let rest = usize::try_from(bytes % RECORD as u64).expect("less than a record");
    (RECORD - rest) % RECORD
}

fn header(name: &str, bytes: u64, epoch: u64) -> [u8; RECORD] {
    let mut header = [0; RECORD];
    let mut put =
        |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(NAME.start, name);
    put(100, "0000644\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(SIZE.start, &format!("{bytes:011o}\0"));
    put(136, &format!("{epoch:011o}\0"));
    put(KIND, "0");
    put(MAGIC.start, "ustar\0");
    put(263, "00");
    put(329, "0000000\0");
    put(337, "0000000\0");
    let sum = checksum(&header);
    header[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// The sum of a header's bytes, with spaces where the sum itself is.
fn checksum(header: &[u8; RECORD]) -> u32 {
    let own = |at: &usize| CHECKSUM.contains(at);
    header.iter().enumerate().map(|(at, byte)| if own(&at) { 32 } else { u32::from(*byte) }).sum()
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

impl BundleError {
    /// What a person can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Read(_) => "copy the whole file again; it may have been cut",
            Self::Manifest(_) => "take a bundle that `skerry image build` of this release made",
            Self::Order { .. } => "take the `.bundle` as `skerry image build` wrote it",
            Self::Signature => {
                "sign it with `skerry image publish --release-key KEY`, by a key that the appliance trusts"
            }
            Self::Part(_) => "copy the whole file again; if it stays so, build or fetch it again",
        }
    }
}

/// What comes before the parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// The manifest.
    pub manifest: Manifest,
    /// Its exact bytes, which are what was signed.
    pub text: Vec<u8>,
    /// The signature, when there is one.
    pub signature: Option<Vec<u8>>,
}

impl Signed {
    /// The digest by which a release names it: SHA-256 of the manifest's bytes, hexadecimal.
    pub fn digest(&self) -> String {
        hex(&Sha256::digest(&self.text))
    }
}

/// Whose signature is wanted.
#[derive(Debug, Clone, Copy)]
pub enum Trust<'a> {
    /// One of these Ed25519 keys.
    Keys(&'a [Key]),
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
    wanted: impl FnOnce(&Signed) -> Result<(), E>,
    mut sink: impl FnMut(&str, &[u8]) -> Result<(), E>,
) -> Result<Signed, E> {
    let mut archive = Archive { bundle, left: 0, padding: 0 };
    let text = archive.small(MANIFEST, manifest::BYTES_MAX)?;
    let mut ahead = archive.next()?;
    let mut signature = None;
    if ahead.as_ref().is_some_and(|(name, _)| name == SIGNATURE) {
        signature = Some(archive.rest(SIGNATURE_BYTES)?);
        ahead = archive.next()?;
    }
    if let Trust::Keys(keys) = trust {
        let signature = signature.as_ref().ok_or(BundleError::Signature)?;
        if !trust::is_signed(keys, &text, signature) {
            return Err(BundleError::Signature.into());
        }
    }
    // Only now: a manifest that nobody signed is not worth a look.
    let manifest = Manifest::parse(&text).map_err(BundleError::Manifest)?;
    let signed = Signed { manifest, text, signature };
    wanted(&signed)?;
    let mut buffer = vec![0; PIECE_BYTES];
    for part in &signed.manifest.parts {
        match ahead {
            Some((name, bytes)) if name == part.name => {
                if bytes != part.bytes {
                    return Err(BundleError::Part(part.name.clone()).into());
                }
            }
            other => return Err(order(&part.name, other).into()),
        }
        // In assembly whatever the profile: this is most of the time that a stick takes.
        let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
        loop {
            match archive.piece(&mut buffer)? {
                [] => break,
                piece => {
                    hash.update(piece);
                    sink(&part.name, piece)?;
                }
            }
        }
        if hex(hash.finish().as_ref()) != part.sha256 {
            return Err(BundleError::Part(part.name.clone()).into());
        }
        ahead = archive.next()?;
    }
    match ahead {
        None => Ok(signed),
        other => Err(order("the end", other).into()),
    }
}

fn order(wanted: &str, found: Option<(String, u64)>) -> BundleError {
    let found = found.map_or_else(|| "the end".into(), |(name, _)| name);
    BundleError::Order { found, wanted: wanted.into() }
}

/// A reader of plain files in a tar archive.
struct Archive<R> {
    bundle: R,
    /// Bytes of the current file that were not read yet.
    left: u64,
    /// Bytes behind it.
    padding: usize,
}

impl<R: Read> Archive<R> {
    /// Name and length of the next file; `None` at the archive's own end. The last one must have been read.
    fn next(&mut self) -> Result<Option<(String, u64)>, BundleError> {
        let mut header = [0; RECORD];
        self.bundle.read_exact(&mut header[..self.padding])?;
        self.bundle.read_exact(&mut header)?;
        self.padding = 0;
        if header.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let (name, bytes) = file(&header).ok_or_else(|| BundleError::Order {
            found: "something that is no plain file".into(),
            wanted: "a file".into(),
        })?;
        (self.left, self.padding) = (bytes, padding(bytes));
        Ok(Some((name, bytes)))
    }

    /// The next file, which has to have this name and at most so many bytes.
    fn small(&mut self, name: &str, most: usize) -> Result<Vec<u8>, BundleError> {
        match self.next()? {
            Some((found, _)) if found == name => self.rest(most),
            other => Err(order(name, other)),
        }
    }

    /// All of the current file.
    fn rest(&mut self, most: usize) -> Result<Vec<u8>, BundleError> {
        let len = usize::try_from(self.left).ok().filter(|len| *len <= most);
        let mut bytes = vec![0; len.ok_or(ManifestError::Large)?];
        self.bundle.read_exact(&mut bytes)?;
        self.left = 0;
        Ok(bytes)
    }

    /// The next piece of the current file, empty at its end.
    fn piece<'a>(&mut self, buffer: &'a mut [u8]) -> Result<&'a [u8], BundleError> {
        let len = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        self.bundle.read_exact(&mut buffer[..len])?;
        self.left -= len as u64;
        Ok(&buffer[..len])
    }
}

/// Name and length of a plain file; `None` for anything else.
fn file(header: &[u8; RECORD]) -> Option<(String, u64)> {
    let number = |range: std::ops::Range<usize>| {
        let text = std::str::from_utf8(&header[range]).ok()?;
        let text = text.trim_end_matches(['\0', ' ']).trim_start_matches(' ');
        let octal = !text.is_empty() && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        octal.then(|| u64::from_str_radix(text, 8).ok())?
    };
    let plain = header[MAGIC.start..MAGIC.start + 5] == *b"ustar"
        && matches!(header[KIND], b'0' | 0)
        && header[PREFIX].iter().all(|byte| *byte == 0)
        && number(CHECKSUM)? == u64::from(checksum(header));
    let name = header[NAME].split(|byte| *byte == 0).next()?;
    let name = std::str::from_utf8(name).ok().filter(|name| !name.is_empty())?;
    plain.then(|| Some((name.to_owned(), number(SIZE)?)))?
}

/// Bytes that a sink gets at once, at most.
pub const PIECE_BYTES: usize = 256 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::tests::manifest;
    use crate::trust::tests::{pair, public};

    fn digest(bytes: &[u8]) -> String {
        hex(&Sha256::digest(bytes))
    }

    fn trusted(seed: u8) -> Vec<Key> {
        vec![[1; 32], public(seed)]
    }

    fn bundle(signer: Option<u8>, change: fn(&mut Vec<u8>, &mut Vec<u8>)) -> Vec<u8> {
        let (mut uki, mut root) = (vec![5; 700], vec![6; 2 * 4096]);
        let manifest = manifest((700, digest(&uki)), (2 * 4096, digest(&root)));
        let signature = signer.map(|seed| pair(seed).sign(&manifest.to_bytes()).as_ref().to_vec());
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
        // The last 512 bytes are a second mark of the end.
        for length in (0..whole.len() - 512).step_by(97) {
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
            |signed| match signed.manifest.release_counter {
                3 => Err(BundleError::Part("too old".into())),
                _ => Ok(()),
            },
            |_, _| panic!("nothing is read after that"),
        );
        assert!(matches!(outcome, Err(BundleError::Part(why)) if why == "too old"));
    }

    #[test]
    fn what_tar_has_grown_is_refused_whatever_it_says() {
        let whole = bundle(Some(1), |_, _| {});
        let with = |change: fn(&mut [u8; RECORD])| {
            let mut bytes = whole.clone();
            let mut head: [u8; RECORD] = bytes[..RECORD].try_into().unwrap();
            change(&mut head);
            let sum = format!("{:06o}\0 ", checksum(&head));
            head[CHECKSUM].copy_from_slice(sum.as_bytes());
            bytes[..RECORD].copy_from_slice(&head);
            open(&bytes, Trust::Keys(&trusted(1)))
        };
        assert!(with(|_| {}).is_ok());
        // A link, a long name, a file with holes, a name in two parts, no checksum of its own.
        for kind in [b'1', b'2', b'5', b'L', b'x', b'S'] {
            let mut bytes = whole.clone();
            let mut head: [u8; RECORD] = bytes[..RECORD].try_into().unwrap();
            head[KIND] = kind;
            let sum = format!("{:06o}\0 ", checksum(&head));
            head[CHECKSUM].copy_from_slice(sum.as_bytes());
            bytes[..RECORD].copy_from_slice(&head);
            assert!(matches!(open(&bytes, Trust::Anybody), Err(BundleError::Order { .. })));
        }
        assert!(with(|head| head[PREFIX.start] = b'x').is_err());
        assert!(with(|head| head[SIZE.start] = 0x80).is_err(), "a number of more than 8 GiB");
        assert!(matches!(
            with(|head| head[SIZE].copy_from_slice(b"77777777777\0")),
            Err(BundleError::Manifest(ManifestError::Large))
        ));
        let mut bytes = whole.clone();
        bytes[0] ^= 1;
        assert!(open(&bytes, Trust::Anybody).is_err());
    }

    proptest::proptest! {
        #[test]
        fn changed_bytes_are_refused_or_were_not_signed(
            at in proptest::num::usize::ANY, bit in 0_u8..8,
            noise in proptest::collection::vec(proptest::num::u8::ANY, 0..2000),
        ) {
            let _ = open(&noise, Trust::Anybody);
            let mut bytes = bundle(Some(1), |_, _| {});
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let _ = open(&bytes, Trust::Anybody);
            if let Ok(seen) = open(&bytes, Trust::Keys(&trusted(1))) {
                // Only what no one reads may differ: padding, and numbers that are written in another way.
                proptest::prop_assert_eq!(seen, [("uki.efi".to_owned(), 700), ("root.img".to_owned(), 8192)]);
            }
        }
    }
}
