//! The manifest: what an update is made of, in words that a signature covers.
//!
//! One JSON document, first in a bundle and beside the image. An appliance decides by it alone whether to take an
//! update; everything else in the bundle is checked against its digests. Unknown keys are refused by
//! [`Manifest::parse`], so that an old appliance never half-understands a new rule. Made by the builder of the image,
//! read by PID 1, by the agent and by `skerry image`.

use crate::verity::{hex, unhex};
use serde::{Deserialize, Serialize};

/// Value of [`Manifest::product`].
pub const PRODUCT: &str = "skerry-appliance";
/// Value of [`Manifest::format`].
pub const FORMAT: u32 = 1;
/// State layout that this tree writes; see [`Manifest::state_schema_min`].
pub const STATE_SCHEMA: u32 = 1;
/// Most bytes of a manifest.
pub const BYTES_MAX: usize = 64 * 1024;

/// What an update is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`PRODUCT`]; another one is somebody else's bundle.
    pub product: String,
    /// [`FORMAT`].
    pub format: u32,
    /// Version, as in the UKI's `IMAGE_VERSION`.
    pub version: String,
    /// Debian's word for the architecture.
    pub arch: String,
    /// `production` or `debug`.
    pub variant: String,
    /// Seconds since 1970 of every time stamp in it.
    pub epoch: u64,
    /// An appliance takes no lower one than it has had.
    pub release_counter: u64,
    /// Oldest layout of the state partition that this version can work with.
    pub state_schema_min: u32,
    /// Layout of the state partition that this version writes once it is blessed.
    pub state_schema: u32,
    /// `uname -r`.
    pub kernel: String,
    /// Root hash of the root file system, hexadecimal.
    pub root_hash: String,
    /// `<data blocks>,<hash start block>,<root hash>,<salt>`, as on the kernel command line.
    pub verity: String,
    /// The kernel command line.
    pub cmdline: String,
    /// SHA-256 of the lock file of packages, hexadecimal.
    pub packages_lock: String,
    /// UKI and root, in the order of the bundle.
    pub parts: Vec<Part>,
}

/// One part of the update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Its name in the bundle: `uki.efi`, `root.img`.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// SHA-256, hexadecimal.
    pub sha256: String,
    /// SHA-256 of its block index, hexadecimal; see [`crate::blocks`].
    pub blocks_sha256: String,
}

/// Why a manifest is none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Not the JSON that it should be.
    #[error("the manifest cannot be read")]
    Json(#[from] serde_json::Error),
    /// Larger than [`BYTES_MAX`].
    #[error("the manifest has more than {BYTES_MAX} bytes")]
    Large,
    /// Another product's.
    #[error("the bundle is for `{0}`, not for `{PRODUCT}`")]
    Product(String),
    /// A format of the future.
    #[error("the bundle has format {0}, known is {FORMAT}")]
    Format(u32),
    /// Values that do not fit each other.
    #[error("the manifest is not valid: {0}")]
    Value(&'static str),
}

impl Manifest {
    /// The bytes that are signed and stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("numbers and texts");
        bytes.push(b'\n');
        bytes
    }

    /// Reads and checks a manifest.
    ///
    /// # Errors
    ///
    /// [`ManifestError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        /// What is looked at first, so that other products and formats are told by name.
        #[derive(Deserialize)]
        struct Kind {
            product: String,
            format: u32,
        }
        if bytes.len() > BYTES_MAX {
            return Err(ManifestError::Large);
        }
        let kind: Kind = serde_json::from_slice(bytes)?;
        if kind.product != PRODUCT {
            return Err(ManifestError::Product(kind.product.chars().take(64).collect()));
        }
        if kind.format != FORMAT {
            return Err(ManifestError::Format(kind.format));
        }
        let manifest: Self = serde_json::from_slice(bytes)?;
        let verity: crate::verity::Verity = manifest
            .verity
            .parse()
            .map_err(|_| ManifestError::Value("`verity` is not of its form"))?;
        if hex(&verity.root) != manifest.root_hash {
            return Err(ManifestError::Value("`verity` and `root_hash` differ"));
        }
        let names: Vec<_> = manifest.parts.iter().map(|part| part.name.as_str()).collect();
        if names != [UKI, ROOT] {
            return Err(ManifestError::Value("the parts are not `uki.efi` and `root.img`"));
        }
        let good = |part: &Part| is_digest(&part.sha256) && is_digest(&part.blocks_sha256);
        if !manifest.parts.iter().all(good) {
            return Err(ManifestError::Value("a digest is not 64 hexadecimal digits"));
        }
        let blocks = manifest.parts[1].bytes / crate::verity::BLOCK as u64;
        if verity.blocks() != blocks
            || !manifest.parts[1].bytes.is_multiple_of(crate::verity::BLOCK as u64)
        {
            return Err(ManifestError::Value(
                "the size of `root.img` is not that of data and hash tree",
            ));
        }
        if !version_is_sound(&manifest.version) {
            return Err(ManifestError::Value("`version` cannot be part of a file name"));
        }
        Ok(manifest)
    }

    /// The part with this name.
    pub fn part(&self, name: &str) -> Option<&Part> {
        self.parts.iter().find(|part| part.name == name)
    }
}

/// Whether this is a SHA-256 as it is written everywhere here: 64 lower-case hexadecimal digits.
pub fn is_digest(text: &str) -> bool {
    unhex(text).is_some_and(|bytes| bytes.len() == 32 && hex(&bytes) == text)
}

/// Name of the UKI in bundles and beside the image.
pub const UKI: &str = "uki.efi";
/// Name of the root with its hash tree.
pub const ROOT: &str = "root.img";

/// Whether a version can be part of the UKI's name: the loader reads `+` and what follows as counters.
pub fn version_is_sound(version: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._~^-".contains(&byte);
    (1..=48).contains(&version.len())
        && version.bytes().all(allowed)
        && version.as_bytes()[0].is_ascii_alphanumeric()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A manifest of parts with these lengths and digests; the root has one block of data.
    pub(crate) fn manifest(uki: (u64, String), root: (u64, String)) -> Manifest {
        let hash = "11".repeat(32);
        Manifest {
            product: PRODUCT.into(),
            format: FORMAT,
            version: "0.1.0".into(),
            arch: "amd64".into(),
            variant: "production".into(),
            epoch: 1_700_000_000,
            release_counter: 3,
            state_schema_min: STATE_SCHEMA,
            state_schema: STATE_SCHEMA,
            kernel: "6.12".into(),
            verity: format!("1,2,{hash},00"),
            root_hash: hash,
            cmdline: "quiet".into(),
            packages_lock: "22".repeat(32),
            parts: vec![
                Part {
                    name: UKI.into(),
                    bytes: uki.0,
                    sha256: uki.1,
                    blocks_sha256: "55".repeat(32),
                },
                Part {
                    name: ROOT.into(),
                    bytes: root.0,
                    sha256: root.1,
                    blocks_sha256: "66".repeat(32),
                },
            ],
        }
    }

    #[test]
    fn manifest_is_read_back_and_foreign_ones_are_named() {
        let good = manifest((5, "33".repeat(32)), (2 * 4096, "44".repeat(32)));
        assert_eq!(Manifest::parse(&good.to_bytes()).unwrap(), good);
        let refused = |change: fn(&mut Manifest)| {
            let mut changed = good.clone();
            change(&mut changed);
            Manifest::parse(&changed.to_bytes()).unwrap_err().to_string()
        };
        assert!(refused(|it| it.product = "toaster".into()).contains("`toaster`"));
        assert!(refused(|it| it.format = 2).contains("format 2"));
        assert!(refused(|it| it.root_hash = "12".repeat(32)).contains("differ"));
        assert!(refused(|it| it.parts.swap(0, 1)).contains("parts"));
        assert!(refused(|it| it.parts[1].bytes += 4096).contains("size"));
        assert!(refused(|it| it.parts[0].sha256.truncate(10)).contains("digest"));
        assert!(refused(|it| it.parts[1].blocks_sha256 = "AA".repeat(32)).contains("digest"));
        assert!(refused(|it| it.version = "../../etc".into()).contains("file name"));
        let unknown = String::from_utf8(good.to_bytes()).unwrap().replacen('{', "{\"rule\": 1,", 1);
        assert!(Manifest::parse(unknown.as_bytes()).is_err());
        assert!(matches!(Manifest::parse(&vec![b' '; BYTES_MAX + 1]), Err(ManifestError::Large)));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_and_any_change_are_a_manifest_or_an_error(
            noise in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
            at in 0_usize..4000, byte in proptest::num::u8::ANY,
        ) {
            let _ = Manifest::parse(&noise);
            let good = manifest((5, "33".repeat(32)), (2 * 4096, "44".repeat(32)));
            let mut bytes = good.to_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(read) = Manifest::parse(&bytes) {
                // What is taken can be written and read again.
                proptest::prop_assert_eq!(Manifest::parse(&read.to_bytes()).expect("its own"), read);
            }
        }
    }

    #[test]
    fn versions_fit_into_file_names() {
        for (version, good) in [
            ("1.2.3", true),
            ("1.2.3-rc1~4", true),
            ("", false),
            ("1+3", false),
            ("-1", false),
            ("a/b", false),
        ] {
            assert_eq!(version_is_sound(version), good, "{version}");
        }
    }
}
