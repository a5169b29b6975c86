//! Whether this machine takes an update: everything that can be told from the signed manifest and from the machine,
//! before anything is written. Every refusal is a sentence and a hint; nothing was changed by then.

use super::core::compare;
use super::records::Bad;
use crate::manifest::{self, Manifest, ManifestError};
use crate::trust::TrustError;
use std::cmp::Ordering;
use std::io;

/// Room on the state that an update leaves free.
pub const ROOM_LEFT: u64 = 64 << 20;

/// What is known of the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// `amd64` or `arm64`.
    pub arch: String,
    /// `production` or `debug`.
    pub variant: String,
    /// The version that runs.
    pub version: String,
    /// The highest release counter that it has had.
    pub counter: u64,
    /// Versions that failed.
    pub bad: Vec<Bad>,
    /// Bytes of the root's partition.
    pub slot_bytes: u64,
    /// Bytes that a UKI may have.
    pub uki_bytes: u64,
}

/// Why an update is not taken, or has failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Another one is under way.
    #[error("an update to {0} is under way")]
    Busy(String),
    /// The running version has not proved itself.
    #[error("version {0} has not proved itself yet")]
    Unproved(String),
    /// The state does not keep anything.
    #[error("the state partition cannot be written, so an update could not be remembered")]
    State,
    /// No loader that would choose.
    #[error(
        "this machine was not started by its own boot loader, so a new version would never be started"
    )]
    NoLoader,
    /// The path is none of ours.
    #[error("`{0}` is not a folder of updates")]
    Folder(String),
    /// The manifest is not there.
    #[error("the update has no manifest")]
    NoManifest(#[source] io::Error),
    /// Nobody who is trusted has signed it.
    #[error("the update is not signed by a key that is trusted here")]
    Signature,
    /// There are no keys.
    #[error(transparent)]
    Trust(TrustError),
    /// It is not understood.
    #[error(transparent)]
    Manifest(ManifestError),
    /// It is not in the folder that is named after it.
    #[error("the manifest is not the one that its folder is named after")]
    Digest,
    /// For another processor.
    #[error("the update is for {found}, this machine is {known}")]
    Arch {
        /// Of the update.
        found: String,
        /// Of the machine.
        known: String,
    },
    /// A debug version for a production machine, or the other way round.
    #[error("the update is a {found} version, this machine runs a {known} version")]
    Variant {
        /// Of the update.
        found: String,
        /// Of the machine.
        known: String,
    },
    /// It runs already.
    #[error("version {0} runs already")]
    Same(String),
    /// The loader would go on choosing the version that runs.
    #[error("version {found} is not newer than {known}, so the boot loader would not choose it")]
    Older {
        /// Of the update.
        found: String,
        /// Of the machine.
        known: String,
    },
    /// A downgrade.
    #[error("the update has release counter {found}, this machine has had {known}")]
    Counter {
        /// Of the update.
        found: u64,
        /// Of the machine.
        known: u64,
    },
    /// It failed before.
    #[error("version {version} failed here before: {reason}")]
    Bad {
        /// Which.
        version: String,
        /// Why.
        reason: String,
    },
    /// It needs a state that this version has not.
    #[error("the update needs state of layout {0}, this machine has {known}", known = manifest::STATE_SCHEMA)]
    Schema(u32),
    /// Larger than its place.
    #[error("`{part}` has {bytes} bytes, its place on this disk has {most}")]
    Large {
        /// Which part.
        part: &'static str,
        /// Its length.
        bytes: u64,
        /// The place's.
        most: u64,
    },
    /// The state is full.
    #[error("the update needs {needs} MB on the state partition, {free} MB are free")]
    Room {
        /// Megabytes.
        needs: u64,
        /// Megabytes.
        free: u64,
    },
    /// A part is not what was signed.
    #[error("`{0}` is not what the manifest says")]
    Part(&'static str),
    /// The disk gives back something else than was written.
    #[error("what was written to {0} is not what the disk gives back")]
    ReadBack(String),
    /// The bundle cannot be used.
    #[error(transparent)]
    Bundle(crate::bundle::BundleError),
    /// The disk or the system.
    #[error("could not {what}")]
    System {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The firmware wants a signature.
    #[error(
        "the update's boot file is not signed, and the firmware of this machine starts only what is"
    )]
    SecureBoot,
    /// There is nothing to go back to.
    #[error("there is no other version that has proved itself")]
    NoOther,
}

impl Refusal {
    /// What a person can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Busy(_) => "wait until it has ended; `skerry status` shows how far it is",
            Self::Unproved(_) => "wait until the node is ready, at most ten minutes",
            Self::State => "repair or replace the disk first",
            Self::NoLoader => "start it from its disk with UEFI firmware",
            Self::Folder(_) => "updates are folders of /state/update, named after the digest of their manifest",
            Self::NoManifest(_) | Self::Digest => "fetch the update again",
            Self::Signature => {
                "sign it with `skerry image publish --release-key KEY`, by a key that this image trusts"
            }
            Self::Trust(error) => error.hint(),
            Self::Manifest(_) => "take a bundle that `skerry image build` of this release made",
            Self::Arch { known, .. } => return format!("build it with `--arch {known}`"),
            Self::Variant { known, .. } => return format!("build it with `--variant {known}`"),
            Self::Same(_) => "give what is new another version",
            Self::Older { .. } => "give it a higher version; versions are compared number by number",
            Self::Counter { known, .. } => {
                return format!("build it with `--release-counter {known}` or higher, if it is really meant");
            }
            Self::Bad { .. } => "publish another version",
            Self::Schema(_) => "update to a version in between first",
            Self::Large { .. } => "take features or images out of the image",
            Self::Room { .. } => "remove pods or images that are not needed, or use a larger disk",
            Self::Part(_) => "fetch or copy the update again",
            Self::ReadBack(_) => "the disk may be worn out; replace it",
            Self::Bundle(error) => error.hint(),
            Self::System { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "remove pods or images that are not needed, or use a larger disk"
            }
            Self::System { .. } => "the disk may be worn out; try once more, then replace it",
            Self::SecureBoot => "build it with `--sign-key` and `--sign-cert`",
            Self::NoOther => "publish a version that is good",
        }
        .into()
    }
}

/// Whether a signed manifest fits this machine.
///
/// # Errors
///
/// [`Refusal`].
pub fn fits(manifest: &Manifest, digest: &str, known: &Known) -> Result<(), Refusal> {
    let Manifest { version, arch, variant, release_counter, .. } = manifest;
    if *arch != known.arch {
        return Err(Refusal::Arch { found: arch.clone(), known: known.arch.clone() });
    }
    if *variant != known.variant {
        return Err(Refusal::Variant { found: variant.clone(), known: known.variant.clone() });
    }
    if *version == known.version {
        return Err(Refusal::Same(version.clone()));
    }
    let failed = |bad: &&Bad| bad.version == *version || bad.digest == digest;
    if let Some(bad) = known.bad.iter().find(failed) {
        return Err(Refusal::Bad { version: version.clone(), reason: bad.reason.clone() });
    }
    if *release_counter < known.counter {
        return Err(Refusal::Counter { found: *release_counter, known: known.counter });
    }
    if compare(version, &known.version) != Ordering::Greater {
        return Err(Refusal::Older { found: version.clone(), known: known.version.clone() });
    }
    if manifest.state_schema_min > manifest::STATE_SCHEMA {
        return Err(Refusal::Schema(manifest.state_schema_min));
    }
    for (part, most) in [(manifest::UKI, known.uki_bytes), (manifest::ROOT, known.slot_bytes)] {
        let bytes = manifest.part(part).map_or(0, |part| part.bytes);
        if bytes > most || bytes <= super::HEAD_LEN as u64 {
            return Err(Refusal::Large { part, bytes, most });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::tests::manifest;

    fn known() -> Known {
        Known {
            arch: "amd64".into(),
            variant: "production".into(),
            version: "0.0.9".into(),
            counter: 3,
            bad: Vec::new(),
            slot_bytes: 8192,
            uki_bytes: 1000,
        }
    }

    #[test]
    fn every_reason_to_refuse_has_its_sentence_and_hint() {
        let good = manifest((700, "33".repeat(32)), (2 * 4096, "44".repeat(32)));
        assert!(fits(&good, "d", &known()).is_ok());
        let refused = |change: fn(&mut Manifest, &mut Known)| {
            let (mut manifest, mut known) = (good.clone(), known());
            change(&mut manifest, &mut known);
            let error = fits(&manifest, "d", &known).unwrap_err();
            assert!(!error.hint().is_empty());
            error.to_string()
        };
        for (sentence, change) in [
            (
                "is for arm64, this machine is amd64",
                (|it, _| it.arch = "arm64".into()) as fn(&mut Manifest, &mut Known),
            ),
            ("is a debug version", |it, _| it.variant = "debug".into()),
            ("version 0.0.9 runs already", |it, _| it.version = "0.0.9".into()),
            ("0.0.8 is not newer than 0.0.9", |it, _| it.version = "0.0.8".into()),
            ("counter 2, this machine has had 3", |it, _| it.release_counter = 2),
            ("layout 2", |it, _| it.state_schema_min = 2),
            ("`uki.efi` has 700 bytes, its place on this disk has 600", |_, it| it.uki_bytes = 600),
            ("`root.img` has 8192 bytes", |_, it| it.slot_bytes = 4096),
            ("0.1.0 failed here before: it hung", |_, it| {
                it.bad.push(Bad {
                    version: "0.1.0".into(),
                    reason: "it hung".into(),
                    ..Bad::default()
                });
            }),
            ("failed here before", |_, it| {
                it.bad.push(Bad { version: "x".into(), digest: "d".into(), ..Bad::default() });
            }),
        ] {
            let told = refused(change);
            assert!(told.contains(sentence), "`{told}` does not say `{sentence}`");
        }
    }
}
