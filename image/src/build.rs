//! One build from order to files: gather, plan, write, and only then show anything under its final name.
//!
//! [`prepare`] brings everything together and says what will be made; [`write`] makes it in a folder beside the wanted
//! one and moves it there when all is done. Both are called by `skerry image build` and by tests. The files:
//!
//! | file | for |
//! |---|---|
//! | `skerry-V.img`, `.img.zst` | flashing, whole disk |
//! | `skerry-V.bundle` | updates: manifest, signature, UKI, root |
//! | `skerry-V.spdx.json` | what is in it |
//! | `manifest.json`, `manifest.json.sig` | what an update is judged by |
//! | `uki.efi`, `root.img` | the parts of the bundle |
//! | `vmlinuz`, `initrd`, `cmdline` | starting a virtual machine without firmware |
//! | `SHA256SUMS` | all of the others |

use crate::disk::{self, DiskError};
use crate::erofs::{self, ErofsError, Level};
use crate::manifest::{self, Manifest};
use crate::packages::{Arch, Cache, Catalogue, Lock, Source};
use crate::progress::Progress;
use crate::root::{self, GatherError, Inputs, Plan, PlanError, Request, Variant};
use crate::sign::{KeyFile, ReleaseKey, SignError, Signer};
use crate::tree::hex;
use crate::uki::{PeError, Uki};
use crate::{blocks, bundle, cpio, fat, sbom, verity_file};
use sha2::{Digest, Sha256};
use skerry_init::boot;
use skerry_init::gpt::Part;
use skerry_init::site::{Site, SiteError};
use skerry_init::verity::Verity;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What somebody wants to have built.
#[derive(Debug)]
pub struct Order {
    /// What goes in.
    pub request: Request,
    /// Content of `site.toml`, when one is to be embedded.
    pub site: Option<String>,
    /// Signs what the firmware starts.
    pub signer: Option<Signer>,
    /// Signs the manifest.
    pub release_key: Option<ReleaseKey>,
    /// Keys that systemd-boot brings into a virtual machine's firmware in setup mode.
    pub enrol: Vec<KeyFile>,
    /// How hard everything is compressed.
    pub level: Level,
    /// Folder for the files; made when it is not there.
    pub out: PathBuf,
}

/// All that is needed to write; see [`Prepared::facts`].
#[derive(Debug)]
pub struct Prepared {
    /// The planned trees.
    pub plan: Plan,
    inputs: Inputs,
    /// SHA-256 of the lock file, hexadecimal.
    lock: String,
}

/// A file that was made.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Made {
    /// Its name in the folder.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// Bytes on this machine's disk, which are fewer for the flash file.
    pub allocated_bytes: u64,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

/// What was made.
#[derive(Debug)]
pub struct Built {
    /// As it is in the folder.
    pub manifest: Manifest,
    /// All files, by name.
    pub files: Vec<Made>,
    /// Whether the compressed root came from the cache.
    pub root_was_cached: bool,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The version cannot be part of a file's name.
    #[error("`{0}` is no version")]
    Version(String),
    /// The epoch is before 1980 or after 2100.
    #[error("the epoch {0} is not between 1980 and 2100")]
    Epoch(u64),
    /// The site file has mistakes.
    #[error("the site file cannot be embedded")]
    Site(#[source] SiteError),
    /// Something could not be had.
    #[error(transparent)]
    Gather(GatherError),
    /// What was had does not go together.
    #[error(transparent)]
    Plan(PlanError),
    /// The root could not be compressed.
    #[error("could not make the root file system")]
    Root(#[source] ErofsError),
    /// The UKI could not be put together.
    #[error("could not make the UKI")]
    Uki(#[source] PeError),
    /// Nothing was signed.
    #[error("could not sign `{what}`")]
    Sign {
        /// Which program.
        what: &'static str,
        /// Why.
        source: SignError,
    },
    /// Two UKIs have to fit side by side, or there could never be an update.
    #[error(
        "the UKI has {have} bytes; two of them have to fit on the loader's partition, so at most {most} are possible"
    )]
    UkiTooLarge {
        /// Its size.
        have: u64,
        /// Largest possible.
        most: u64,
    },
    /// The disk could not be laid out.
    #[error(transparent)]
    Disk(DiskError),
    /// A file cannot be written or read.
    #[error("could not write {what}")]
    Write {
        /// Which one.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

impl BuildError {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Version(_) => Some("a version has at most 48 of a-z, A-Z, 0-9, . _ ~ ^ -, and begins with a letter or digit".into()),
            Self::Epoch(_) => Some("give seconds since 1970, in SOURCE_DATE_EPOCH or with --epoch".into()),
            Self::Site(error) => {
                let lines = error.mistakes.iter().map(|one| format!("line {}: {}", one.line, one.hint));
                Some(lines.collect::<Vec<_>>().join("; "))
            }
            Self::Gather(error) => error.hint(),
            Self::Sign { source, .. } => source.hint().map(str::to_owned),
            Self::UkiTooLarge { .. } => Some("take features with firmware and microcode out of the initramfs".into()),
            Self::Disk(DiskError::TooLarge { .. }) => {
                Some("take features or images out, or build without `--profile quick`".into())
            }
            _ => None,
        }
    }
}

/// Epoch of an order that gives none: when the newest of the locked package lists was made.
pub fn default_epoch(lock: &Lock) -> Option<u64> {
    lock.releases.iter().filter_map(|release| release.seconds()).max()
}

/// Checks the order, fetches what is missing, and plans. Writes into the cache only.
///
/// # Errors
///
/// [`BuildError`]; the order's own mistakes come first.
pub fn prepare(
    order: &Order,
    catalogue: &Catalogue,
    lock: &Lock,
    cache: &Cache,
    source: &Source,
    progress: &dyn Progress,
) -> Result<Prepared, BuildError> {
    check(order)?;
    let inputs = root::gather(&order.request, catalogue, lock, cache, source, progress);
    let inputs = inputs.map_err(BuildError::Gather)?;
    progress.step("planning");
    let plan = root::plan(&order.request, catalogue, &inputs).map_err(BuildError::Plan)?;
    Ok(Prepared { plan, inputs, lock: hex(&Sha256::digest(lock.text())) })
}

/// What can be told to be wrong without any package.
fn check(order: &Order) -> Result<(), BuildError> {
    let Request { version, epoch, .. } = &order.request;
    if !manifest::version_is_sound(version) {
        return Err(BuildError::Version(version.clone()));
    }
    if !EPOCHS.contains(epoch) {
        return Err(BuildError::Epoch(*epoch));
    }
    if let Some(text) = &order.site {
        Site::parse(text).map_err(BuildError::Site)?;
    }
    Ok(())
}

/// 1980, from which FAT counts, to 2100; the initramfs has 32 bits.
const EPOCHS: std::ops::Range<u64> = 315_532_800..4_102_444_800;

impl Prepared {
    /// What will be made, as rows for a person: what, and how much of it.
    pub fn facts(&self, order: &Order) -> Vec<(&'static str, String)> {
        let Request { arch, variant, version, epoch, release_counter, .. } = &order.request;
        let files = |tree: &crate::tree::Tree| {
            let files = tree.iter().filter(|(_, entry)| entry.size() > 0).count();
            format!("{files} files, {} bytes before compression", tree.bytes())
        };
        let signed = |is: bool| if is { "with your key" } else { "not signed" };
        let site = match order.site.as_deref().and_then(|text| Site::parse(text).ok()) {
            None => "none: the machine waits for one".into(),
            Some(site) => {
                let token = if site.token().is_some() { "a join token" } else { "no join token" };
                format!("revision {}, with {token}", site.revision)
            }
        };
        let updates = match &order.request.trust {
            None => "none are taken: no release key is trusted".into(),
            Some(set) => {
                format!("signed by one of {} keys, counter {}", set.keys.len(), set.counter)
            }
        };
        let images: Vec<_> = self.plan.images.iter().map(|image| image.name.as_str()).collect();
        vec![
            ("version", format!("{version}, release counter {release_counter}")),
            ("architecture", arch.to_string()),
            ("variant", variant.name().into()),
            ("epoch", epoch.to_string()),
            ("kernel", self.plan.uname.clone()),
            ("packages", self.plan.packages.len().to_string()),
            ("root", files(&self.plan.root)),
            ("executables", self.plan.executables().len().to_string()),
            ("initramfs", files(&self.plan.initramfs)),
            ("images", images.join(", ")),
            ("site", site),
            ("secure boot", signed(order.signer.is_some()).into()),
            ("manifest", signed(order.release_key.is_some()).into()),
            ("updates", updates),
        ]
    }
}

/// Writes everything. Until the last moment nothing of it is in `order.out`.
///
/// # Errors
///
/// [`BuildError`]; then nothing was left behind.
pub fn write(
    order: &Order,
    prepared: &Prepared,
    cache: &Cache,
    progress: &dyn Progress,
) -> Result<Built, BuildError> {
    let scratch = Scratch::beside(&order.out)?;
    let root = scratch.path(manifest::ROOT);
    progress.step("writing the root file system");
    let Request { epoch, .. } = order.request;
    let tools = &prepared.inputs.tools;
    let written =
        erofs::write(&prepared.plan.root, &root, order.level, epoch, tools, cache, progress);
    let written = written.map_err(BuildError::Root)?;
    progress.step("writing the list of everything in it");
    let document = sbom::document(&prepared.plan, &order.request);
    let document = document.map_err(|source| failed("the SBOM", source))?;
    let name = format!("skerry-{}.spdx.json", order.request.version);
    scratch.write(&name, document.as_bytes())?;
    let parts = Parts { plan: &prepared.plan, lock: &prepared.lock };
    let manifest = assemble(order, &parts, &scratch, progress)?;
    let files = scratch.finish(progress)?;
    Ok(Built { manifest, files, root_was_cached: written.cached })
}

/// What [`assemble`] needs to know of the plan.
struct Parts<'a> {
    plan: &'a Plan,
    lock: &'a str,
}

/// From a root file system in the scratch folder to disk, bundle and manifest.
fn assemble(
    order: &Order,
    parts: &Parts<'_>,
    scratch: &Scratch,
    progress: &dyn Progress,
) -> Result<Manifest, BuildError> {
    let Request { arch, variant, version, epoch, release_counter, .. } = &order.request;
    let boot = &parts.plan.boot;
    let read = |what: &'static str, content: &crate::tree::Content| {
        content.read().map_err(|source| failed(what, source))
    };
    let root = scratch.path(manifest::ROOT);
    progress.step("hashing the root file system");
    let verity = verity_file::append(&root).map_err(|source| failed("the hash tree", source))?;

    progress.step("packing the initramfs");
    let initrd =
        initrd(order, &parts.plan.initramfs).map_err(|source| failed("the initramfs", source))?;
    let microcode = cpio::microcode(&boot.microcode, *epoch)
        .map_err(|source| failed("the microcode", source))?;
    let cmdline = cmdline(*arch, *variant, version, &verity);
    let (kernel, stub) = (read("the kernel", &boot.kernel)?, read("the stub", &boot.stub)?);
    let uki = Uki {
        os_release: &parts.plan.os_release,
        cmdline: &cmdline,
        uname: &parts.plan.uname,
        microcode: microcode.as_deref(),
        initrd: &initrd,
        linux: &kernel,
    };
    let mut uki = uki.write(&stub).map_err(BuildError::Uki)?;
    let mut loader = read("the loader", &boot.loader)?;
    if let Some(signer) = &order.signer {
        progress.step("signing loader and UKI");
        uki = signer.sign(&uki).map_err(|source| BuildError::Sign { what: "UKI", source })?;
        loader =
            signer.sign(&loader).map_err(|source| BuildError::Sign { what: "loader", source })?;
    }
    let most = (Part::ESP.bytes() - ESP_OTHER_BYTES - loader.len() as u64) / 2;
    if uki.len() as u64 > most {
        return Err(BuildError::UkiTooLarge { have: uki.len() as u64, most });
    }
    scratch.write("vmlinuz", &kernel)?;
    scratch.write("initrd", &initrd)?;
    scratch.write("cmdline", format!("{cmdline}\n").as_bytes())?;
    scratch.write(manifest::UKI, &uki)?;

    let part = |name: &str| {
        let (bytes, sha256) = digest(&scratch.path(name)).map_err(|source| failed(name, source))?;
        let index =
            File::open(scratch.path(name)).and_then(|file| blocks::index(BufReader::new(file)));
        let index = index.map_err(|source| failed(name, source))?;
        let blocks_sha256 = hex(&Sha256::digest(&index));
        Ok(manifest::Part { name: name.into(), bytes, sha256, blocks_sha256 })
    };
    let manifest = Manifest {
        product: manifest::PRODUCT.into(),
        format: manifest::FORMAT,
        version: version.clone(),
        arch: arch.to_string(),
        variant: variant.name().into(),
        epoch: *epoch,
        release_counter: *release_counter,
        state_schema_min: manifest::STATE_SCHEMA,
        state_schema: manifest::STATE_SCHEMA,
        kernel: parts.plan.uname.clone(),
        root_hash: hex(&verity.root),
        verity: verity.to_string(),
        cmdline,
        packages_lock: parts.lock.into(),
        parts: vec![part(manifest::UKI)?, part(manifest::ROOT)?],
    };
    progress.step("writing the flash file");
    flash_file(order, &manifest, (&boot.removable, loader), uki, scratch)?;
    progress.step("writing the bundle");
    write_bundle(order, &manifest, scratch)?;
    progress.step("compressing the flash file");
    compress(order, scratch).map_err(|source| failed("the compressed flash file", source))?;
    Ok(manifest)
}

fn failed(what: impl Into<String>, source: io::Error) -> BuildError {
    BuildError::Write { what: what.into(), source }
}

/// The kernel command line; PID 1 knows what it boots only from here.
fn cmdline(arch: Arch, variant: Variant, version: &str, verity: &Verity) -> String {
    let serial = match arch {
        Arch::Amd64 => "ttyS0",
        Arch::Arm64 => "ttyAMA0",
    };
    let variant = match variant {
        Variant::Production => "",
        Variant::Debug => " skerry.variant=debug",
    };
    format!(
        "console=tty0 console={serial},115200 quiet loglevel=4 panic=10 cryptomgr.notests skerry.version={version} \
         skerry.verity={verity}{variant}"
    )
}

fn initrd(order: &Order, tree: &crate::tree::Tree) -> io::Result<Vec<u8>> {
    let level = match order.level {
        Level::Full => 19,
        Level::Quick => 3,
    };
    let mut encoder = zstd::Encoder::new(Vec::new(), level)?;
    encoder.include_checksum(true)?;
    cpio::write(tree, order.request.epoch, &mut encoder)?;
    encoder.finish()
}

fn flash_file(
    order: &Order,
    manifest: &Manifest,
    (removable, loader): (&str, Vec<u8>),
    uki: Vec<u8>,
    scratch: &Scratch,
) -> Result<(), BuildError> {
    // What the loader shows and does; it starts the newest version that has tries left.
    let mut settings = String::from("timeout 0\neditor no\n");
    if !order.enrol.is_empty() {
        settings += "secure-boot-enroll if-safe\n";
    }
    let mut files = vec![
        (format!("EFI/BOOT/{removable}"), loader),
        (
            format!("{}/{}", boot::FOLDER, boot::file_name(&manifest.version, Some(boot::TRIES))),
            uki,
        ),
        ("loader/loader.conf".into(), settings.into_bytes()),
    ];
    for file in &order.enrol {
        files.push((format!("loader/keys/auto/{}.auth", file.variable), file.update.clone()));
    }
    let seed = format!("{} {} {}", manifest.arch, manifest.version, manifest.root_hash);
    let id = |word: &str| {
        let digest = Sha256::digest(format!("{word} {seed}"));
        u32::from_le_bytes([digest[0], digest[1], digest[2], digest[3]])
    };
    let esp =
        fat::esp(&files, id("esp")).map_err(|source| failed("the loader's partition", source))?;
    let site = order.site.iter().map(|text| ("site.toml".to_owned(), text.clone().into_bytes()));
    let config = fat::config(&site.collect::<Vec<_>>(), id("config"));
    let config = config.map_err(|source| failed("the configuration's partition", source))?;
    let root = scratch.path(manifest::ROOT);
    let contents = disk::Contents { esp: &esp, config: &config, root: &root, seed: &seed };
    disk::write(&contents, &scratch.path(&image_name(order))).map_err(BuildError::Disk)?;
    scratch.keep_secret(&image_name(order), has_token(order))
}

/// Room on the loader's partition for everything but UKIs: tables, keys, names.
const ESP_OTHER_BYTES: u64 = 4 << 20;

fn image_name(order: &Order) -> String {
    format!("skerry-{}.img", order.request.version)
}

fn has_token(order: &Order) -> bool {
    let site = order.site.as_deref().and_then(|text| Site::parse(text).ok());
    site.is_some_and(|site| site.token().is_some())
}

fn write_bundle(order: &Order, manifest: &Manifest, scratch: &Scratch) -> Result<(), BuildError> {
    let text = manifest.to_bytes();
    scratch.write(bundle::MANIFEST, &text)?;
    let signature = order.release_key.as_ref().map(|key| key.sign(&text));
    if let Some(signature) = &signature {
        scratch.write(bundle::SIGNATURE, signature)?;
    }
    let name = format!("skerry-{}.bundle", order.request.version);
    let make = || {
        let mut uki = BufReader::new(File::open(scratch.path(manifest::UKI))?);
        let mut root = BufReader::new(File::open(scratch.path(manifest::ROOT))?);
        let out = BufWriter::new(File::create(scratch.path(&name))?);
        bundle::write(manifest, signature.as_deref(), &mut [&mut uki, &mut root], out)
    };
    make().map_err(|source| failed("the bundle", source))
}

fn compress(order: &Order, scratch: &Scratch) -> Result<(), io::Error> {
    let level = match order.level {
        Level::Full => 9,
        Level::Quick => 1,
    };
    let name = image_name(order);
    let mut image = File::open(scratch.path(&name))?;
    let packed = scratch.path(&format!("{name}.zst"));
    let mut encoder = zstd::Encoder::new(BufWriter::new(File::create(&packed)?), level)?;
    encoder.include_checksum(true)?;
    // So that a flashing tool can say how far it is.
    encoder.set_pledged_src_size(Some(image.metadata()?.len()))?;
    encoder.include_contentsize(true)?;
    io::copy(&mut image, &mut encoder)?;
    encoder.finish()?.flush()?;
    if has_token(order) {
        std::fs::set_permissions(packed, std::fs::Permissions::from_mode(0o600))?;
    }
    Ok(())
}

fn digest(path: &Path) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let (mut bytes, mut buffer) = (0, vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((bytes, hex(&hash.finalize()))),
            read => {
                bytes += read as u64;
                hash.update(&buffer[..read]);
            }
        }
    }
}

/// The folder in which files are made; removed with everything in it unless [`Scratch::finish`] was called.
struct Scratch {
    folder: tempfile::TempDir,
    out: PathBuf,
}

impl Scratch {
    /// On the same file system as `out`, so that renaming is enough at the end.
    fn beside(out: &Path) -> Result<Self, BuildError> {
        let what = || format!("the folder `{}`", out.display());
        let out = std::path::absolute(out).map_err(|source| failed(what(), source))?;
        if out.exists() && !out.is_dir() {
            return Err(failed(what(), io::Error::from(io::ErrorKind::NotADirectory)));
        }
        let parent = out.parent().unwrap_or(Path::new("/")).to_owned();
        std::fs::create_dir_all(&parent).map_err(|source| failed(what(), source))?;
        let folder = tempfile::Builder::new().prefix(".skerry-image-").tempdir_in(parent);
        Ok(Self { folder: folder.map_err(|source| failed(what(), source))?, out })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), BuildError> {
        std::fs::write(self.path(name), bytes).map_err(|source| failed(format!("`{name}`"), source))
    }

    fn keep_secret(&self, name: &str, secret: bool) -> Result<(), BuildError> {
        if secret {
            let mode = std::fs::Permissions::from_mode(0o600);
            let set = std::fs::set_permissions(self.path(name), mode);
            set.map_err(|source| failed(format!("`{name}`"), source))?;
        }
        Ok(())
    }

    /// Writes `SHA256SUMS` and shows everything under its final name.
    fn finish(self, progress: &dyn Progress) -> Result<Vec<Made>, BuildError> {
        progress.step("checking the files");
        let list = || -> io::Result<Vec<Made>> {
            let mut names = Vec::new();
            for entry in std::fs::read_dir(self.folder.path())? {
                names.push(entry?.file_name().to_string_lossy().into_owned());
            }
            names.sort();
            let made = names.into_iter().map(|name| {
                let (bytes, sha256) = digest(&self.path(&name))?;
                let allocated_bytes = std::fs::metadata(self.path(&name))?.blocks() * 512;
                Ok(Made { name, bytes, allocated_bytes, sha256 })
            });
            made.collect()
        };
        let files = list().map_err(|source| failed("the digests", source))?;
        let sums: String =
            files.iter().map(|one| format!("{}  {}\n", one.sha256, one.name)).collect();
        self.write(SUMS, sums.as_bytes())?;
        let show = || -> io::Result<()> {
            std::fs::set_permissions(self.folder.path(), std::fs::Permissions::from_mode(0o755))?;
            if !self.out.exists() {
                // Everything appears at once.
                return std::fs::rename(self.folder.path(), &self.out);
            }
            for name in files.iter().map(|one| one.name.as_str()).chain([SUMS]) {
                std::fs::rename(self.path(name), self.out.join(name))?;
            }
            Ok(())
        };
        show().map_err(|source| failed(format!("the folder `{}`", self.out.display()), source))?;
        Ok(files)
    }
}

/// Digests of all files, in the form of `sha256sum`.
pub const SUMS: &str = "SHA256SUMS";

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::progress::Silent;
    use crate::root::Boot;
    use crate::tree::{Content, Tree};
    use std::collections::BTreeMap;

    const SITE: &str =
        "revision = 1\n[node]\nname = \"a\"\n[hub]\naddress = \"wss://h\"\nenrol = \"https://h\"\n";

    /// A plan with a kernel, a stub and a root that are none, but have their form.
    pub(crate) fn plan() -> Plan {
        let mut initramfs = Tree::new();
        initramfs.file("init", 0o755, Content::bytes([7; 9000]), "skerry").unwrap();
        Plan {
            root: Tree::new(),
            initramfs,
            boot: Boot {
                kernel: Content::bytes([3; 50_000]),
                stub: Content::bytes(crate::uki::tests::stub()),
                loader: Content::bytes(crate::uki::tests::stub()),
                removable: "BOOTX64.EFI".into(),
                microcode: vec![(
                    "kernel/x86/microcode/AuthenticAMD.bin".into(),
                    Content::bytes([4; 100]),
                )],
            },
            uname: "6.12-test".into(),
            os_release: "ID=skerry\n".into(),
            packages: Vec::new(),
            images: Vec::new(),
        }
    }

    pub(crate) fn order(out: &Path) -> Order {
        Order {
            request: Request {
                arch: Arch::Amd64,
                variant: Variant::Production,
                version: "0.1.0".into(),
                epoch: 1_700_000_000,
                release_counter: 2,
                trust: None,
                binaries: PathBuf::new(),
                images: Vec::new(),
                with: Vec::new(),
            },
            site: None,
            signer: None,
            release_key: None,
            enrol: Vec::new(),
            level: Level::Quick,
            out: out.to_owned(),
        }
    }

    pub(crate) fn make(
        order: &Order,
        plan: &Plan,
    ) -> Result<(Manifest, BTreeMap<String, String>), BuildError> {
        let scratch = Scratch::beside(&order.out)?;
        scratch.write(manifest::ROOT, &[9; 64 * 4096])?;
        let lock = "00".repeat(32);
        let manifest = assemble(order, &Parts { plan, lock: &lock }, &scratch, &Silent)?;
        let files = scratch.finish(&Silent)?;
        Ok((manifest, files.into_iter().map(|one| (one.name, one.sha256)).collect()))
    }

    #[test]
    fn two_builds_of_one_order_are_equal_and_another_version_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (first, files) = make(&order(&dir.path().join("a")), &plan()).unwrap();
        assert_eq!(make(&order(&dir.path().join("b")), &plan()).unwrap(), (first, files.clone()));
        let names: Vec<_> = files.keys().map(String::as_str).collect();
        let wanted = [
            "cmdline",
            "initrd",
            "manifest.json",
            "root.img",
            "skerry-0.1.0.bundle",
            "skerry-0.1.0.img",
            "skerry-0.1.0.img.zst",
            "uki.efi",
            "vmlinuz",
        ];
        assert_eq!(names, wanted);
        // Into a folder that has something else, and something old.
        let out = dir.path().join("c");
        std::fs::create_dir(&out).unwrap();
        std::fs::write(out.join("notes"), "mine").unwrap();
        std::fs::write(out.join("uki.efi"), "old").unwrap();
        let mut newer = order(&out);
        newer.request.version = "0.1.1".into();
        let (_, other) = make(&newer, &plan()).unwrap();
        assert_eq!(std::fs::read(out.join("notes")).unwrap(), b"mine");
        assert_eq!(digest(&out.join("uki.efi")).unwrap().1, other["uki.efi"]);
        assert_eq!(other["root.img"], files["root.img"]);
        assert_ne!(other["uki.efi"], files["uki.efi"]);
        assert_ne!(other["skerry-0.1.1.img"], files["skerry-0.1.0.img"]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "no scratch folder is left");
    }

    #[test]
    fn parts_agree_with_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut wanted = order(&out);
        let site = format!("{SITE}token = \"{}.a.b.c\"\n", "ab".repeat(32));
        wanted.site = Some(site.clone());
        let (manifest, files) = make(&wanted, &plan()).unwrap();
        let read = |name: &str| std::fs::read(out.join(name)).unwrap();
        assert_eq!(Manifest::parse(&read("manifest.json")).unwrap(), manifest);
        let cmdline = String::from_utf8(read("cmdline")).unwrap();
        assert!(cmdline.contains(" skerry.version=0.1.0 skerry.verity=64,65,"), "{cmdline}");
        assert!(cmdline.trim_end().ends_with(&manifest.verity));
        let uki = read("uki.efi");
        let section = |name: &[u8]| {
            let pe = crate::uki::Pe::parse(&uki).unwrap();
            let one = pe.sections().find(|one| one.name.starts_with(name)).unwrap();
            uki[one.raw_offset as usize..][..one.virtual_size as usize].to_vec()
        };
        assert_eq!(section(b".cmdline"), cmdline.trim_end().as_bytes());
        assert_eq!(section(b".linux"), read("vmlinuz"));
        assert_eq!(section(b".initrd"), read("initrd"));
        assert!(zstd::decode_all(read("initrd").as_slice()).unwrap().starts_with(b"070701"));
        assert!(section(b".ucode").starts_with(b"070701"));

        let image = read("skerry-0.1.0.img");
        assert!(zstd::decode_all(read("skerry-0.1.0.img.zst").as_slice()).unwrap() == image);
        let table =
            skerry_init::gpt::Table::of_image(&format!("amd64 0.1.0 {}", manifest.root_hash));
        let part = |label: &str| {
            let one = table.by_label(label).unwrap();
            image[one.offset() as usize..][..one.bytes() as usize].to_vec()
        };
        assert!(part("root-a").starts_with(&read("root.img")));
        let file = |label: &str, path: &str| {
            let volume = io::Cursor::new(part(label));
            let volume = fatfs::FileSystem::new(volume, fatfs::FsOptions::new()).unwrap();
            let mut content = Vec::new();
            volume.root_dir().open_file(path).unwrap().read_to_end(&mut content).unwrap();
            content
        };
        assert!(file("esp", "EFI/Linux/skerry_0.1.0+3.efi") == uki);
        assert_eq!(file("esp", "loader/loader.conf"), b"timeout 0\neditor no\n");
        assert_eq!(file("config", "site.toml"), site.as_bytes());
        // With a token in it, it is for its owner only.
        for (name, readable) in
            [("skerry-0.1.0.img", 0o600), ("skerry-0.1.0.img.zst", 0o600), ("uki.efi", 0o644)]
        {
            let mode = std::fs::metadata(out.join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o604, readable & 0o604, "{name}");
        }

        let bundle = read("skerry-0.1.0.bundle");
        let mut parts: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        bundle::read(
            bundle.as_slice(),
            bundle::Trust::Anybody,
            |_| Ok(()),
            |name, piece| {
                parts.entry(name.into()).or_default().extend_from_slice(piece);
                Ok::<_, bundle::BundleError>(())
            },
        )
        .unwrap();
        assert!(parts["uki.efi"] == uki && parts["root.img"] == read("root.img"));
        let sums = String::from_utf8(read(SUMS)).unwrap();
        assert_eq!(sums.lines().count(), files.len());
    }

    #[test]
    fn bad_orders_and_parts_leave_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut bad = order(&out);
        bad.request.version = "1+3".into();
        assert!(matches!(check(&bad), Err(BuildError::Version(_))));
        bad = order(&out);
        bad.request.epoch = 0;
        assert!(matches!(check(&bad), Err(BuildError::Epoch(0))));
        bad = order(&out);
        bad.site = Some("revision = 0\n[node]\nname = \"a\"\n".into());
        let error = check(&bad).unwrap_err();
        assert!(error.hint().is_some_and(|hint| hint.contains("line 1")), "{error}");
        let mut broken = plan();
        broken.boot.stub = Content::bytes(*b"#!/bin/sh");
        assert!(matches!(make(&order(&out), &broken), Err(BuildError::Uki(_))));
        let mut large = plan();
        large.boot.kernel = Content::bytes(vec![1; 63 << 20]);
        assert!(matches!(make(&order(&out), &large), Err(BuildError::UkiTooLarge { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        std::fs::write(&out, "a file").unwrap();
        assert!(matches!(make(&order(&out), &plan()), Err(BuildError::Write { .. })));
    }
}
