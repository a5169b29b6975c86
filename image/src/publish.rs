//! From a bundle to a store that a hub serves, and back to a bundle for a stick.
//!
//! A store is a folder; each release is a folder of it, named after the SHA-256 of its manifest, with the manifest, its
//! signature, the parts, and the block index of each part (`uki.efi.blocks`, see [`crate::blocks`]). A release appears
//! at once or not at all: it is made beside its place, synced, and renamed. Called by `skerry image publish` and
//! `skerry image export`; nothing here serves anything.

use crate::blocks;
use crate::bundle::{self, BundleError, Trust};
use crate::manifest::{self, Manifest};
use crate::sign::ReleaseKey;
use crate::tree::hex;
use crate::trust::{self, Key};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What follows the name of a part in the name of its block index.
pub const INDEX_SUFFIX: &str = ".blocks";
/// Beginning of the names of releases that are being made.
const HALF: &str = ".publish-";

/// A release in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// What it is.
    pub manifest: Manifest,
    /// SHA-256 of the manifest's bytes, hexadecimal: its name in the store, and in an `OsRelease` after `sha256:`.
    pub digest: String,
    /// Its folder.
    pub folder: PathBuf,
    /// Name and length of each file.
    pub files: Vec<(String, u64)>,
}

/// What [`publish`] has done about a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is new in the store.
    New,
    /// It was there, with this signature.
    AsItWas,
    /// It was there with another signature, which was replaced.
    SignedAnew,
}

/// Why nothing was published or exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The file cannot be read or is no bundle.
    #[error("`{path}` cannot be published")]
    Bundle {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: BundleError,
    },
    /// Nobody signed it, and no key was given.
    #[error("`{0}` is not signed, and no key was given to sign it with")]
    Unsigned(PathBuf),
    /// Somebody else signed it.
    #[error("`{0}` is signed by another key than the one that was given")]
    Signature(PathBuf),
    /// The manifest names another block index than the part has.
    #[error("the block index of `{0}` is not the one that the manifest names")]
    Index(String),
    /// There is no such release, or it is not whole.
    #[error("the store `{store}` has no release `{wanted}`")]
    Missing {
        /// Which store.
        store: PathBuf,
        /// What was asked for.
        wanted: String,
    },
    /// Two releases have that version.
    #[error("the store has more than one release of version `{0}`")]
    Several(String),
    /// A file cannot be read or written.
    #[error("could not write or read `{path}`")]
    File {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl PublishError {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Bundle { source, .. } => Some(source.hint()),
            Self::Unsigned(_) => {
                Some("give --release-key KEY; `skerry image release-key KEY` makes one")
            }
            Self::Signature(_) => {
                Some("give the key that it was built with, or build it again with this one")
            }
            Self::Index(_) => {
                Some("build the bundle again with this release's `skerry image build`")
            }
            Self::Missing { .. } => {
                Some("`skerry image publish` puts releases there; name one by version or digest")
            }
            Self::Several(_) => Some("name it by its digest"),
            Self::File { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("make room, then again")
            }
            Self::File { .. } => None,
        }
    }
}

impl From<BundleError> for PublishError {
    fn from(source: BundleError) -> Self {
        Self::Bundle { path: PathBuf::new(), source }
    }
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> PublishError {
    move |source| PublishError::File { path: path.into(), source }
}

/// Who vouches for what is published.
#[derive(Debug, Clone, Copy)]
pub enum By<'a> {
    /// This key signs what nobody has signed, and must be the one that has signed the rest.
    Key(&'a ReleaseKey),
    /// One of these must have signed it.
    Keys(&'a [Key]),
    /// Somebody must have signed it; who is not checked.
    Somebody,
}

/// Checks a bundle and puts it into the store, which is made when it is not there.
///
/// # Errors
///
/// [`PublishError`]; the store is as it was then.
pub fn publish(
    bundle: &Path,
    store: &Path,
    by: By<'_>,
) -> Result<(Release, Outcome), PublishError> {
    fs::create_dir_all(store).map_err(file_error(store))?;
    let half =
        tempfile::Builder::new().prefix(HALF).tempdir_in(store).map_err(file_error(store))?;
    let file = File::open(bundle).map_err(file_error(bundle))?;
    let mut parts = Parts { folder: half.path(), open: None, indexes: Vec::new() };
    let signed = bundle::read::<PublishError>(
        BufReader::new(file),
        Trust::Anybody,
        |signed| vouched(signed, by, bundle).map(drop),
        |name, piece| parts.take(name, piece),
    );
    let signed = signed.map_err(|error| match error {
        PublishError::Bundle { source, .. } => PublishError::Bundle { path: bundle.into(), source },
        other => other,
    })?;
    parts.close()?;
    let manifest = &signed.manifest;
    for part in &manifest.parts {
        let index = parts.indexes.iter().find(|(name, _)| *name == part.name);
        let digest = index.map(|(_, index)| hex(&Sha256::digest(index)));
        if digest.as_ref() != Some(&part.blocks_sha256) {
            return Err(PublishError::Index(part.name.clone()));
        }
    }
    let signature = vouched(&signed, by, bundle)?;
    for (name, index) in &parts.indexes {
        write(&half.path().join(format!("{name}{INDEX_SUFFIX}")), index)?;
    }
    write(&half.path().join(bundle::MANIFEST), &signed.text)?;
    write(&half.path().join(bundle::SIGNATURE), &signature)?;

    let folder = store.join(signed.digest());
    let outcome = if folder.is_dir() {
        let kept = folder.join(bundle::SIGNATURE);
        if fs::read(&kept).is_ok_and(|kept| kept == signature) {
            Outcome::AsItWas
        } else {
            fs::rename(half.path().join(bundle::SIGNATURE), &kept).map_err(file_error(&kept))?;
            Outcome::SignedAnew
        }
    } else {
        let readable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(half.path(), readable).map_err(file_error(half.path()))?;
        sync(half.path())?;
        fs::rename(half.path(), &folder).map_err(file_error(&folder))?;
        Outcome::New
    };
    sync(store)?;
    Ok((open(store, &signed.digest())?, outcome))
}

/// The signature that goes into the store.
fn vouched(signed: &bundle::Signed, by: By<'_>, path: &Path) -> Result<Vec<u8>, PublishError> {
    match (&signed.signature, by) {
        (None, By::Key(key)) => Ok(key.sign(&signed.text)),
        (None, _) => Err(PublishError::Unsigned(path.into())),
        (Some(signature), By::Somebody) => Ok(signature.clone()),
        (Some(signature), by) => {
            let keys = match by {
                By::Key(key) => vec![key.public()],
                By::Keys(keys) => keys.to_vec(),
                By::Somebody => Vec::new(),
            };
            match trust::is_signed(&keys, &signed.text, signature) {
                true => Ok(signature.clone()),
                false => Err(PublishError::Signature(path.into())),
            }
        }
    }
}

/// Writes the parts as they come, and makes their block indexes.
struct Parts<'a> {
    folder: &'a Path,
    open: Option<(String, PathBuf, BufWriter<File>, Vec<u8>)>,
    indexes: Vec<(String, Vec<u8>)>,
}

impl Parts<'_> {
    fn take(&mut self, name: &str, piece: &[u8]) -> Result<(), PublishError> {
        if self.open.as_ref().is_none_or(|(open, ..)| open != name) {
            self.close()?;
            let path = self.folder.join(name);
            let file = File::create(&path).map_err(file_error(&path))?;
            self.open = Some((name.into(), path, BufWriter::new(file), Vec::new()));
            self.indexes.push((name.into(), Vec::new()));
        }
        let (_, path, file, rest) = self.open.as_mut().expect("just opened");
        file.write_all(piece).map_err(file_error(path))?;
        rest.extend_from_slice(piece);
        let whole = rest.len() / blocks::BLOCK * blocks::BLOCK;
        let (_, index) = self.indexes.last_mut().expect("pushed with the file");
        rest[..whole].chunks(blocks::BLOCK).for_each(|block| index.extend(blocks::digest(block)));
        rest.drain(..whole);
        Ok(())
    }

    fn close(&mut self) -> Result<(), PublishError> {
        let Some((_, path, file, rest)) = self.open.take() else { return Ok(()) };
        let (_, index) = self.indexes.last_mut().expect("pushed with the file");
        if !rest.is_empty() {
            index.extend(blocks::digest(&rest));
        }
        let file = file.into_inner().map_err(io::IntoInnerError::into_error);
        file.and_then(|file| file.sync_all()).map_err(file_error(&path))
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), PublishError> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(file_error(path))
}

fn sync(folder: &Path) -> Result<(), PublishError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(file_error(folder))
}

/// Opens a release by its digest and looks whether its files are there with their lengths; reads the manifest only.
///
/// # Errors
///
/// [`PublishError::Missing`], or the manifest cannot be read.
pub fn open(store: &Path, digest: &str) -> Result<Release, PublishError> {
    let missing = || PublishError::Missing { store: store.into(), wanted: digest.into() };
    let folder = store.join(digest);
    let text = fs::read(folder.join(bundle::MANIFEST)).map_err(|_| missing())?;
    if !manifest::is_digest(digest) || hex(&Sha256::digest(&text)) != digest {
        return Err(missing());
    }
    let manifest = Manifest::parse(&text).map_err(BundleError::Manifest)?;
    let mut files = Vec::new();
    let mut names = vec![bundle::MANIFEST.to_owned(), bundle::SIGNATURE.to_owned()];
    for part in &manifest.parts {
        names.extend([part.name.clone(), format!("{}{INDEX_SUFFIX}", part.name)]);
    }
    for name in names {
        let len = fs::metadata(folder.join(&name)).map_err(|_| missing())?.len();
        if manifest.part(&name).is_some_and(|part| part.bytes != len) {
            return Err(missing());
        }
        files.push((name, len));
    }
    Ok(Release { manifest, digest: digest.into(), folder, files })
}

/// All whole releases of a store, the highest counter last; what is half-made or foreign is passed over.
///
/// # Errors
///
/// The store cannot be read.
pub fn list(store: &Path) -> Result<Vec<Release>, PublishError> {
    let entries = fs::read_dir(store).map_err(file_error(store))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut releases: Vec<_> = names.filter_map(|name| open(store, &name).ok()).collect();
    releases.sort_by(|a, b| {
        (a.manifest.release_counter, &a.digest).cmp(&(b.manifest.release_counter, &b.digest))
    });
    Ok(releases)
}

/// Finds a release by digest (with or without `sha256:`) or by version.
///
/// # Errors
///
/// [`PublishError::Missing`], [`PublishError::Several`].
pub fn find(store: &Path, wanted: &str) -> Result<Release, PublishError> {
    let digest = wanted.strip_prefix("sha256:").unwrap_or(wanted);
    if manifest::is_digest(digest) {
        return open(store, digest);
    }
    let mut fit = list(store)?;
    fit.retain(|release| release.manifest.version == wanted);
    match (fit.pop(), fit.pop()) {
        (Some(release), None) => Ok(release),
        (None, _) => Err(PublishError::Missing { store: store.into(), wanted: wanted.into() }),
        (Some(_), Some(_)) => Err(PublishError::Several(wanted.into())),
    }
}

/// Writes a release back into one bundle, reads that through, and only then shows it under its name.
///
/// # Errors
///
/// [`PublishError`]; nothing is at `out` then that was not there before.
pub fn export(release: &Release, out: &Path) -> Result<u64, PublishError> {
    let signature_path = release.folder.join(bundle::SIGNATURE);
    let signature = fs::read(&signature_path).map_err(file_error(&signature_path))?;
    let out = std::path::absolute(out).map_err(file_error(out))?;
    let parent = out.parent().unwrap_or(Path::new("/"));
    let half =
        tempfile::Builder::new().prefix(HALF).tempfile_in(parent).map_err(file_error(&out))?;
    let open = |name: &str| {
        let path = release.folder.join(name);
        File::open(&path).map(BufReader::new).map_err(file_error(&path))
    };
    let (mut uki, mut root) = (open(manifest::UKI)?, open(manifest::ROOT)?);
    let parts: &mut [&mut dyn Read] = &mut [&mut uki, &mut root];
    bundle::write(&release.manifest, Some(&signature), parts, BufWriter::new(half.as_file()))
        .and_then(|()| half.as_file().sync_all())
        .map_err(file_error(&out))?;
    let made = BufReader::new(half.reopen().map_err(file_error(&out))?);
    let read = bundle::read::<BundleError>(made, Trust::Anybody, |_| Ok(()), |_, _| Ok(()));
    let same =
        read.map_err(|source| PublishError::Bundle { path: release.folder.clone(), source })?;
    if same.digest() != release.digest {
        // The manifest in the store was not written by this program's rules.
        return Err(PublishError::Index(bundle::MANIFEST.into()));
    }
    let readable = fs::Permissions::from_mode(0o644);
    fs::set_permissions(half.path(), readable).map_err(file_error(&out))?;
    let bytes = half.as_file().metadata().map_err(file_error(&out))?.len();
    half.persist(&out).map_err(|error| file_error(&out)(error.error))?;
    Ok(bytes)
}

/// The `OsRelease` that offers it on a channel, YAML.
pub fn os_release(release: &Release, channel: &str) -> String {
    let Manifest { version, release_counter, .. } = &release.manifest;
    format!(
        "apiVersion: fleet.skerry.dev/v1alpha1\nkind: OsRelease\nmetadata:\n  name: {channel}\nspec:\n  \
         version: \"{version}\"\n  counter: {release_counter}\n  digest: sha256:{}\n",
        release.digest
    )
}

/// Whether this can be the name of a channel, which is the name of an object of the cluster.
pub fn is_channel(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(allowed)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::tests::{make, order, plan};

    struct World {
        dir: tempfile::TempDir,
        key: ReleaseKey,
    }

    impl World {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let key = ReleaseKey::make(&dir.path().join("release.key")).unwrap();
            Self { dir, key }
        }

        fn at(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        /// Builds a version; returns its bundle.
        fn build(&self, version: &str, signed: bool) -> PathBuf {
            let mut order = order(&self.at(version));
            order.request.version = version.into();
            if signed {
                order.release_key = Some(ReleaseKey::read(&self.at("release.key")).unwrap());
            }
            make(&order, &plan()).unwrap();
            self.at(version).join(format!("skerry-{version}.bundle"))
        }

        fn names(&self, folder: &str) -> Vec<String> {
            let entries = fs::read_dir(self.at(folder)).into_iter().flatten().flatten();
            let mut names: Vec<_> =
                entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    #[test]
    fn bundle_is_published_found_and_exported_as_it_was() {
        let world = World::new();
        let (store, bundle) = (world.at("store"), world.build("1.0", true));
        let (release, outcome) = publish(&bundle, &store, By::Key(&world.key)).unwrap();
        assert_eq!(outcome, Outcome::New);
        assert_eq!(world.names("store"), [release.digest.as_str()]);
        let folder = format!("store/{}", release.digest);
        let wanted = [
            "manifest.json",
            "manifest.json.sig",
            "root.img",
            "root.img.blocks",
            "uki.efi",
            "uki.efi.blocks",
        ];
        assert_eq!(world.names(&folder), wanted);
        for part in &release.manifest.parts {
            let index = fs::read(world.at(&folder).join(format!("{}.blocks", part.name))).unwrap();
            let index = blocks::Index::parse(index, part.bytes, &part.blocks_sha256).unwrap();
            let content = fs::read(world.at(&folder).join(&part.name)).unwrap();
            for (number, block) in content.chunks(blocks::BLOCK).enumerate() {
                assert!(index.is_block(number, block));
            }
        }
        let keys = [world.key.public()];
        assert_eq!(publish(&bundle, &store, By::Keys(&keys)).unwrap().1, Outcome::AsItWas);
        for wanted in ["1.0", &release.digest, &format!("sha256:{}", release.digest)] {
            assert_eq!(find(&store, wanted).unwrap(), release);
        }
        assert!(matches!(find(&store, "2"), Err(PublishError::Missing { .. })));
        let out = world.at("stick.bundle");
        assert_eq!(export(&release, &out).unwrap(), fs::metadata(&out).unwrap().len());
        assert!(fs::read(&out).unwrap() == fs::read(&bundle).unwrap());
        let yaml = os_release(&release, "stable");
        assert!(yaml.contains(&format!("digest: sha256:{}\n", release.digest)), "{yaml}");
        assert!(yaml.contains("version: \"1.0\"\n  counter: 2\n"), "{yaml}");
        // Whatever reads tar reads it.
        let mut archive = tar::Archive::new(File::open(&out).unwrap());
        let names: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(names, ["manifest.json", "manifest.json.sig", "uki.efi", "root.img"]);
    }

    #[test]
    fn unsigned_bundle_is_signed_and_a_foreign_signature_is_refused_or_replaced_on_purpose() {
        let world = World::new();
        let (store, bundle) = (world.at("store"), world.build("1.0", false));
        for by in [By::Somebody, By::Keys(&[[1; 32]])] {
            assert!(matches!(publish(&bundle, &store, by), Err(PublishError::Unsigned(_))));
        }
        assert!(world.names("store").is_empty(), "nothing half-made is left");
        let (release, _) = publish(&bundle, &store, By::Key(&world.key)).unwrap();
        let kept = fs::read(release.folder.join(bundle::SIGNATURE)).unwrap();
        let text = fs::read(release.folder.join(bundle::MANIFEST)).unwrap();
        assert!(trust::is_signed(&[world.key.public()], &text, &kept));

        let other = ReleaseKey::make(&world.at("other.key")).unwrap();
        let (again, outcome) = publish(&bundle, &store, By::Key(&other)).unwrap();
        assert_eq!((&again.digest, outcome), (&release.digest, Outcome::SignedAnew));
        let signed = world.build("2.0", true);
        let refused = publish(&signed, &store, By::Key(&other));
        assert!(matches!(refused, Err(PublishError::Signature(_))));
        assert_eq!(publish(&signed, &store, By::Somebody).unwrap().1, Outcome::New);
    }

    #[test]
    fn broken_bundles_and_full_disks_leave_the_store_as_it_was() {
        let world = World::new();
        let (store, bundle) = (world.at("store"), world.build("1.0", true));
        let whole = fs::read(&bundle).unwrap();
        let broken = world.at("broken.bundle");
        for (what, bytes) in [
            ("cut", whole[..whole.len() - 4096].to_vec()),
            ("empty", Vec::new()),
            ("changed at the last block", {
                let mut bytes = whole.clone();
                let at = bytes.len() - 1024 - 1;
                bytes[at] ^= 1;
                bytes
            }),
        ] {
            fs::write(&broken, bytes).unwrap();
            let error = publish(&broken, &store, By::Key(&world.key)).unwrap_err();
            assert!(
                matches!(&error, PublishError::Bundle { path, .. } if *path == broken),
                "{what}"
            );
            assert!(error.hint().is_some());
            assert!(world.names("store").is_empty(), "{what}");
        }
        let (release, _) = publish(&bundle, &store, By::Key(&world.key)).unwrap();
        // A store that somebody has cut is not offered and not exported.
        let root = release.folder.join(manifest::ROOT);
        let content = fs::read(&root).unwrap();
        fs::write(&root, &content[1..]).unwrap();
        assert!(matches!(find(&store, "1.0"), Err(PublishError::Missing { .. })));
        fs::write(&root, vec![0; content.len()]).unwrap();
        let out = world.at("out.bundle");
        assert!(matches!(export(&release, &out), Err(PublishError::Bundle { .. })));
        assert!(!out.exists());
    }

    #[test]
    fn channels_are_names_of_objects() {
        for (name, good) in [
            ("stable", true),
            ("beta-2", true),
            ("", false),
            ("-a", false),
            ("A", false),
            ("a b", false),
        ] {
            assert_eq!(is_channel(name), good, "{name}");
        }
    }
}
