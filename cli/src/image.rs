//! `skerry image`: the appliance, from Debian packages and our own programs to a disk that boots.

mod release;

use crate::fault::hinted;
use crate::{Output, out, table};
use anyhow::{Context, Result};
use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};
use skerry_image::build::{self, Built, Order, Prepared};
use skerry_image::bundle::{self, BundleError, Trust};
use skerry_image::deb::Kind;
use skerry_image::erofs::Level;
use skerry_image::manifest::Manifest;
use skerry_image::packages::{self, Arch, Cache, Catalogue, Lock, Source};
use skerry_image::progress::Progress;
use skerry_image::root::{Request, Variant};
use skerry_image::sign::{ReleaseKey, Signer, TestKeys};
use skerry_init::gpt;
use std::fs::File;
use std::io::{BufReader, IsTerminal, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Build the disk image, the update bundle, the SBOM and the manifest; needs no root
    Build(Box<BuildArgs>),
    /// Move the lock file forward to what the mirror has now
    Lock(LockArgs),
    /// Show what is in a folder of `build`, a bundle or a disk image, and check its digests; exit code 1 when they differ
    Show {
        /// Folder, `.bundle` or `.img`
        path: PathBuf,
    },
    /// Make keys for tests of Secure Boot in a folder: PK, KEK and db, each as .key, .crt, .esl and .auth
    Keys {
        /// Made when it is not there; keys that are there are kept
        folder: PathBuf,
    },
    /// Make the key that signs releases, and its public half (FILE.pub)
    ReleaseKey {
        /// Never written over
        file: PathBuf,
    },
    /// Say which keys appliances trust from now on, signed by one that they trust now
    Trust(release::TrustArgs),
    /// Check a bundle, sign it if nobody has, and put it where a hub serves releases; prints its OsRelease
    Publish(release::PublishArgs),
    /// Show the releases of such a folder
    Releases {
        /// Folder that `publish` has filled
        #[arg(long, value_name = "DIR")]
        store: PathBuf,
    },
    /// Write a release back into one file, for a stick
    Export(release::ExportArgs),
    /// Fetch the UEFI firmware with which tests boot an image, and unpack it into a folder
    Firmware {
        /// Made when it is not there
        folder: PathBuf,
        #[command(flatten)]
        packages: PackageArgs,
    },
}

#[derive(clap::Args)]
pub(crate) struct PackageArgs {
    /// Where packages are kept between builds (default: $XDG_CACHE_HOME/skerry, else ~/.cache/skerry)
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// A Debian mirror instead of that of this machine's apt
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
    /// A keyring instead of Debian's as this machine has it
    #[arg(long, value_name = "FILE")]
    keyring: Option<PathBuf>,
}

#[derive(clap::Args)]
pub(crate) struct BuildArgs {
    /// amd64 or arm64 (default: that of this machine)
    #[arg(long)]
    arch: Option<String>,
    /// Folder for the files
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A site.toml for the configuration's partition
    #[arg(long, value_name = "FILE")]
    site: Option<PathBuf>,
    /// An archive of a container image that goes along; may be repeated
    #[arg(long = "image", value_name = "OCI")]
    images: Vec<PathBuf>,
    /// A feature of the catalogue, for example `intel-microcode`; may be repeated
    #[arg(long = "with", value_name = "FEATURE")]
    with: Vec<String>,
    /// RSA key (PEM) that signs loader and UKI for Secure Boot
    #[arg(long, value_name = "FILE", requires = "sign_cert")]
    sign_key: Option<PathBuf>,
    /// Its certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "sign_key")]
    sign_cert: Option<PathBuf>,
    /// Ed25519 key (PEM) that signs the manifest of the bundle; the image trusts its public half
    #[arg(long, value_name = "FILE")]
    release_key: Option<PathBuf>,
    /// Public key (PEM) whose signature the image wants on an update; may be repeated
    #[arg(long = "trust-key", value_name = "FILE")]
    trust_keys: Vec<PathBuf>,
    /// Counter of these keys: that of the last statement of `skerry image trust`
    #[arg(long, default_value_t = 1)]
    trust_counter: u64,
    /// Folder of `skerry image keys`: the loader enrols them in a virtual machine whose firmware is in setup mode
    #[arg(long, value_name = "DIR")]
    enroll_keys: Option<PathBuf>,
    /// `debug` has a shell on the console, and says so
    #[arg(long, value_enum, default_value = "production")]
    variant: VariantArg,
    /// Folder with skerry-init and edgecore (default: that of this program)
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
    /// Version of the image
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    version: String,
    /// An appliance takes no update with a lower one than it has had
    #[arg(long, default_value_t = 1)]
    release_counter: u64,
    /// `quick` compresses little: for tests
    #[arg(long, value_enum, default_value = "full")]
    profile: Profile,
    /// Seconds since 1970 of every time stamp (default: the time of the locked package lists)
    #[arg(long, env = "SOURCE_DATE_EPOCH")]
    epoch: Option<u64>,
    /// Packages and their versions, instead of those this program was built with
    #[arg(long, value_name = "FILE")]
    lock: Option<PathBuf>,
    /// Only say what would be built
    #[arg(long)]
    plan: bool,
    #[command(flatten)]
    packages: PackageArgs,
}

#[derive(clap::Args)]
pub(crate) struct LockArgs {
    /// The lock file
    #[arg(long, value_name = "FILE", default_value = "image/packages.lock")]
    file: PathBuf,
    /// Only this architecture; the others stay as they are
    #[arg(long)]
    arch: Option<String>,
    #[command(flatten)]
    packages: PackageArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum VariantArg {
    Production,
    Debug,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Profile {
    Full,
    Quick,
}

/// Runs the verb.
pub(crate) fn run(verb: Verb, output: Output) -> Result<ExitCode> {
    match verb {
        Verb::Build(args) => build(&args, output),
        Verb::Lock(args) => lock(&args, output),
        Verb::Show { path } => show(&path, output),
        Verb::ReleaseKey { file } => release::release_key(&file, output),
        Verb::Trust(args) => release::trust(&args, output),
        Verb::Publish(args) => release::publish(&args, output),
        Verb::Releases { store } => release::releases(&store, output),
        Verb::Export(args) => release::export(&args, output),
        Verb::Firmware { folder, packages } => firmware(&folder, &packages),
        Verb::Keys { folder } => {
            TestKeys::in_folder(&folder).map_err(|error| explain(&error, error.hint()))?;
            eprintln!(
                "keys for tests are in `{}`: whoever has them owns the machine",
                folder.display()
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn build(args: &BuildArgs, output: Output) -> Result<ExitCode> {
    let steps = Steps::new();
    let lock = match &args.lock {
        Some(file) => Lock::read(file).map_err(|error| explain(&error, error.hint()))?,
        None => Lock::embedded(),
    };
    let order = order(args, &lock)?;
    let (cache, source) = open(&args.packages)?;
    let prepared = build::prepare(&order, &Catalogue::embedded(), &lock, &cache, &source, &steps);
    let prepared = prepared.map_err(|error| explain(&error, error.hint()))?;
    if output == Output::Table {
        for (what, value) in prepared.facts(&order) {
            eprintln!("{what:14}{value}");
        }
    }
    if args.plan {
        print_plan(&order, &prepared, output)?;
        return Ok(ExitCode::SUCCESS);
    }
    let built = build::write(&order, &prepared, &cache, &steps);
    let built = built.map_err(|error| explain(&error, error.hint()))?;
    steps.end();
    print_built(&order, &built, output)?;
    Ok(ExitCode::SUCCESS)
}

fn order(args: &BuildArgs, lock: &Lock) -> Result<Order> {
    let arch = arch(args.arch.as_deref())?;
    let binaries = match &args.binaries {
        Some(folder) => folder.clone(),
        None => {
            let program =
                std::env::current_exe().context("could not find this program's folder")?;
            program.parent().map(Path::to_owned).unwrap_or_default()
        }
    };
    let site = match &args.site {
        None => None,
        Some(file) => {
            let text = std::fs::read_to_string(file);
            Some(
                text.with_context(|| format!("could not read the site file `{}`", file.display()))?,
            )
        }
    };
    let signer = match (&args.sign_key, &args.sign_cert) {
        (Some(key), Some(certificate)) => {
            Some(Signer::read(key, certificate).map_err(|error| explain(&error, error.hint()))?)
        }
        _ => None,
    };
    let release_key = args.release_key.as_deref().map(ReleaseKey::read).transpose();
    let release_key = release_key.map_err(release::bad_key)?;
    let trust = release::key_set(args.trust_counter, release_key.as_ref(), &args.trust_keys)?;
    let enrol = match &args.enroll_keys {
        None => Vec::new(),
        Some(folder) => {
            if !folder.join("db.crt").exists() {
                let what = format!("`{}` has no keys", folder.display());
                return Err(hinted(what, "`skerry image keys DIR` makes them"));
            }
            let keys =
                TestKeys::in_folder(folder).map_err(|error| explain(&error, error.hint()))?;
            skerry_image::sign::enrolment(&keys.owner())
                .map_err(|error| explain(&error, error.hint()))?
        }
    };
    let epoch = args.epoch.or_else(|| build::default_epoch(lock));
    let epoch =
        epoch.ok_or_else(|| hinted("the lock file is empty", "`skerry image lock` fills it"))?;
    Ok(Order {
        request: Request {
            arch,
            variant: match args.variant {
                VariantArg::Production => Variant::Production,
                VariantArg::Debug => Variant::Debug,
            },
            version: args.version.clone(),
            epoch,
            release_counter: args.release_counter,
            trust,
            binaries,
            images: args.images.clone(),
            with: args.with.clone(),
        },
        site,
        signer,
        release_key,
        enrol,
        level: match args.profile {
            Profile::Full => Level::Full,
            Profile::Quick => Level::Quick,
        },
        out: args.out.clone(),
    })
}

fn arch(word: Option<&str>) -> Result<Arch> {
    match word {
        Some(word) => word
            .parse::<Arch>()
            .map_err(|error| explain(&error, Some("--arch amd64 or --arch arm64"))),
        None => Arch::of_host()
            .ok_or_else(|| hinted("this machine's architecture is not known", "give --arch amd64")),
    }
}

fn open(args: &PackageArgs) -> Result<(Cache, Source)> {
    let folder = args.cache.clone().or_else(Cache::default_folder);
    let folder =
        folder.ok_or_else(|| hinted("there is no folder for a cache", "give one with --cache"))?;
    let cache = Cache::open(&folder);
    let cache =
        cache.with_context(|| format!("could not open the cache `{}`", folder.display()))?;
    Ok((cache, Source { mirror: args.mirror.clone(), keyring: args.keyring.clone() }))
}

fn print_plan(order: &Order, prepared: &Prepared, output: Output) -> Result<()> {
    if output == Output::Json {
        let facts = prepared.facts(order).into_iter();
        let facts: serde_json::Map<_, _> =
            facts.map(|(key, value)| (key.to_owned(), Value::from(value))).collect();
        let packages = prepared.plan.packages.iter();
        let packages = packages.map(|one| json!({"name": one.name, "version": one.version}));
        out::line(json!({"plan": facts, "packages": packages.collect::<Vec<_>>()}))?;
    }
    Ok(())
}

fn print_built(order: &Order, built: &Built, output: Output) -> Result<()> {
    if output == Output::Json {
        return out::line(json!({
            "folder": order.out,
            "manifest": built.manifest,
            "files": built.files,
            "root_was_cached": built.root_was_cached,
        }));
    }
    let rows: Vec<_> = built
        .files
        .iter()
        .map(|file| {
            let on_disk = file.allocated_bytes.min(file.bytes);
            vec![
                file.name.clone(),
                file.bytes.to_string(),
                on_disk.to_string(),
                file.sha256.clone(),
            ]
        })
        .collect();
    table::print(&["FILE", "BYTES", "ON DISK", "SHA-256"], &rows)?;
    let slot: u64 = built.manifest.parts.iter().map(|part| part.bytes).sum();
    eprintln!("an update takes {slot} bytes; everything is in `{}`", order.out.display());
    Ok(())
}

fn firmware(folder: &Path, args: &PackageArgs) -> Result<ExitCode> {
    let (cache, source) = open(args)?;
    let (arch, catalogue, steps) = (arch(None)?, Catalogue::embedded(), Steps::new());
    let names = catalogue.test_packages(arch);
    let found = packages::fetch(&Lock::embedded(), arch, names, &cache, &source, &steps);
    // Unpacking never writes over a file; what was unpacked takes the place of what an earlier call has left.
    let half = folder.join(".unpacking");
    let place = |path: &str| -> std::io::Result<()> {
        let to = folder.join(path);
        std::fs::create_dir_all(to.parent().expect("a path of a package is inside of the folder"))?;
        std::fs::rename(half.join(path), to)
    };
    for package in found.map_err(|error| explain(&error, error.hint()))?.values() {
        remove_folder(&half)?;
        let files = skerry_image::deb::unpack(&package.path, &half, |path| path.ends_with(".fd"))
            .map_err(|error| explain(&error, None::<String>))?;
        let files = files.iter().filter(|(_, file)| matches!(file.kind, Kind::File { .. }));
        for (path, _) in files {
            place(path).with_context(|| format!("could not write `{path}`"))?;
        }
    }
    remove_folder(&half)?;
    steps.end();
    Ok(ExitCode::SUCCESS)
}

/// Removes a folder, which need not be there.
fn remove_folder(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("could not remove `{}`", folder.display()))
        }
        _ => Ok(()),
    }
}

fn lock(args: &LockArgs, output: Output) -> Result<ExitCode> {
    let arches = match &args.arch {
        Some(word) => vec![arch(Some(word))?],
        None => Arch::ALL.to_vec(),
    };
    let old = match args.file.exists() {
        true => Some(Lock::read(&args.file).map_err(|error| explain(&error, error.hint()))?),
        false
            if args
                .file
                .parent()
                .is_some_and(|folder| folder.as_os_str().is_empty() || folder.is_dir()) =>
        {
            None
        }
        false => {
            let what = format!("there is no folder for the lock file `{}`", args.file.display());
            return Err(hinted(what, "run this in the source tree, or name a file with --file"));
        }
    };
    let (cache, source) = open(&args.packages)?;
    let steps = Steps::new();
    let new =
        packages::lock(&Catalogue::embedded(), old.as_ref(), &arches, &cache, &source, &steps);
    let new = new.map_err(|error| explain(&error, error.hint()))?;
    steps.end();
    let half = args.file.with_extension("lock.half");
    std::fs::write(&half, new.text())
        .and_then(|()| std::fs::rename(&half, &args.file))
        .with_context(|| format!("could not write `{}`", args.file.display()))?;
    let changes = changes(old.as_ref(), &new);
    match output {
        Output::Json => out::line(json!({"file": args.file, "changes": changes.iter().map(|row| {
            json!({"package": row[0], "arch": row[1], "from": row[2], "to": row[3]})
        }).collect::<Vec<_>>()}))?,
        Output::Table if changes.is_empty() => {
            eprintln!("nothing is newer; `{}` stays", args.file.display())
        }
        Output::Table => table::print(&["PACKAGE", "ARCH", "FROM", "TO"], &changes)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Package, architecture, old and new version, for each that is another one.
fn changes(old: Option<&Lock>, new: &Lock) -> Vec<Vec<String>> {
    let version = |lock: Option<&Lock>, name: &str, arch| {
        let found = lock.and_then(|lock| lock.find(name, arch));
        found.map_or_else(|| "-".to_owned(), |one| one.version.clone())
    };
    let gone = old.iter().flat_map(|old| &old.packages);
    let gone = gone.filter(|one| new.find(&one.name, one.for_arch).is_none());
    let rows = new.packages.iter().chain(gone).map(|one| {
        let versions =
            [version(old, &one.name, one.for_arch), version(Some(new), &one.name, one.for_arch)];
        (one, versions)
    });
    let rows = rows.filter(|(_, [from, to])| from != to);
    rows.map(|(one, [from, to])| vec![one.name.clone(), one.for_arch.to_string(), from, to])
        .collect()
}

/// What `show` found.
struct Shown {
    manifest: Option<Manifest>,
    /// Name, bytes, remark.
    rows: Vec<[String; 3]>,
    /// Whether everything is as it was made.
    good: bool,
}

fn show(path: &Path, output: Output) -> Result<ExitCode> {
    let read = || format!("could not read `{}`", path.display());
    let shown = if path.is_dir() {
        show_folder(path)?
    } else {
        let mut file = BufReader::new(File::open(path).with_context(read)?);
        let mut first = [0; 512];
        let got = file.read(&mut first).with_context(read)?;
        file.seek(SeekFrom::Start(0)).with_context(read)?;
        // A protective MBR ends so; in a tar archive there is a name at the start.
        match got == 512 && first[510..] == [0x55, 0xaa] && first[450] == 0xee {
            true => show_disk(path).with_context(read)?,
            false => show_bundle(file)?,
        }
    };
    match output {
        Output::Json => out::line(json!({
            "manifest": shown.manifest,
            "parts": shown.rows.iter().map(|[name, bytes, note]| json!({"name": name, "bytes": bytes.parse::<u64>().ok(), "note": note})).collect::<Vec<_>>(),
            "good": shown.good,
        }))?,
        Output::Table => {
            if let Some(it) = &shown.manifest {
                eprintln!(
                    "{} {} for {}, {}, release counter {}",
                    it.product, it.version, it.arch, it.variant, it.release_counter
                );
                eprintln!("kernel {}, root hash {}", it.kernel, it.root_hash);
            }
            let rows: Vec<_> = shown.rows.iter().map(|row| row.to_vec()).collect();
            table::print(&["PART", "BYTES", "NOTE"], &rows)?;
        }
    }
    Ok(if shown.good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show_folder(folder: &Path) -> Result<Shown> {
    let at = |name: &str| folder.join(name);
    let text = std::fs::read(at(bundle::MANIFEST)).map_err(|error| {
        let what = format!("`{}` has no manifest: {error}", folder.display());
        hinted(what, "name a folder that `skerry image build` wrote")
    })?;
    let manifest = Manifest::parse(&text)?;
    let sums = std::fs::read_to_string(at(build::SUMS));
    let sums = sums.with_context(|| format!("could not read `{}`", at(build::SUMS).display()))?;
    let mut shown = Shown { manifest: Some(manifest), rows: Vec::new(), good: true };
    for line in sums.lines() {
        let Some((wanted, name)) = line.split_once("  ") else { continue };
        let found = File::open(at(name)).and_then(digest);
        let (bytes, note) = match found {
            Ok((bytes, sha256)) if sha256 == wanted => (bytes.to_string(), "good".to_owned()),
            Ok((bytes, _)) => (bytes.to_string(), "changed".into()),
            Err(error) => ("-".into(), error.to_string()),
        };
        shown.good &= note == "good";
        shown.rows.push([name.to_owned(), bytes, note]);
    }
    Ok(shown)
}

fn digest(mut file: File) -> std::io::Result<(u64, String)> {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    let (mut bytes, mut buffer) = (0, vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((bytes, skerry_image::tree::hex(&hash.finalize()))),
            read => {
                bytes += read as u64;
                hash.update(&buffer[..read]);
            }
        }
    }
}

fn show_bundle(file: impl Read) -> Result<Shown> {
    let mut manifest = None;
    let outcome = bundle::read::<BundleError>(
        file,
        Trust::Anybody,
        |found| {
            manifest = Some(found.manifest.clone());
            Ok(())
        },
        |_, _| Ok(()),
    );
    let bad = outcome.err().map(anyhow::Error::new);
    let Some(manifest) = manifest else {
        let what = bad.map_or_else(|| "there is no manifest".into(), |error| format!("{error:#}"));
        let hint = "name a `.bundle`, a `.img` or a folder that `skerry image build` wrote";
        return Err(hinted(what, hint));
    };
    let good = bad.is_none();
    let note = bad.map_or_else(|| "good".into(), |error| format!("{error:#}"));
    let rows = manifest.parts.iter();
    let rows = rows.map(|part| [part.name.clone(), part.bytes.to_string(), note.clone()]).collect();
    Ok(Shown { manifest: Some(manifest), rows, good })
}

fn show_disk(path: &Path) -> std::io::Result<Shown> {
    let mut file = File::open(path)?;
    let bytes = file.seek(SeekFrom::End(0))?;
    let mut read = |at: u64, length: usize| -> std::io::Result<Vec<u8>> {
        file.seek(SeekFrom::Start(at))?;
        let mut bytes = vec![0; length];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    let head = read(0, gpt::HEAD_BYTES)?;
    let tail = read(bytes.saturating_sub(gpt::TAIL_BYTES as u64), gpt::TAIL_BYTES)?;
    let decoded = gpt::Table::decode(&head, &tail, bytes / gpt::SECTOR);
    let (table, origin) = decoded.map_err(std::io::Error::other)?;
    let mut rows = Vec::new();
    for one in &table.partitions {
        let start = read(one.offset(), 2048)?;
        let kind = match &start {
            start if &start[82..87] == b"FAT32" => "FAT32",
            start if &start[54..59] == b"FAT16" => "FAT16",
            start if start[1024..1028] == [0xe2, 0xe1, 0xf5, 0xe0] => "erofs",
            start if start[1080..1082] == [0x53, 0xef] => "ext4",
            start if start.iter().all(|byte| *byte == 0) => "empty",
            _ => "unknown",
        };
        rows.push([one.label.clone(), one.bytes().to_string(), format!("{kind}, {}", one.id)]);
    }
    let note = match origin {
        gpt::Origin::Primary => "both tables are good",
        gpt::Origin::PrimaryOnly => "the table at the end is missing or another one",
        gpt::Origin::Backup => "the table at the start is broken",
    };
    rows.push(["(table)".into(), bytes.to_string(), format!("{note}, disk {}", table.disk)]);
    Ok(Shown { manifest: None, rows, good: origin == gpt::Origin::Primary })
}

fn explain(
    error: &(dyn std::error::Error + 'static),
    hint: Option<impl Into<String>>,
) -> anyhow::Error {
    let what = crate::token::chain(error);
    match hint {
        Some(hint) => hinted(what, hint),
        None => anyhow::Error::msg(what),
    }
}

/// Shows on standard error what a build does: a line for each step, with a counter behind it on a terminal.
struct Steps {
    start: Instant,
    terminal: bool,
    now: Mutex<Option<(String, Instant)>>,
}

impl Steps {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            terminal: std::io::stderr().is_terminal(),
            now: Mutex::new(None),
        }
    }

    /// Closes the line of the last step.
    fn end(&self) {
        let last = self.now.lock().expect("nothing panics with it").take();
        if last.is_some() && self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}

impl Progress for Steps {
    fn step(&self, text: &str) {
        let mut now = self.now.lock().expect("nothing panics with it");
        if self.terminal {
            eprint!("\r\x1b[K");
        }
        eprintln!("{:6.1} s  {text}", self.start.elapsed().as_secs_f32());
        *now = Some((text.to_owned(), Instant::now()));
    }

    fn at(&self, done: u64, total: Option<u64>) {
        let mut now = self.now.lock().expect("nothing panics with it");
        let Some((text, last)) = now.as_mut().filter(|_| self.terminal) else { return };
        if last.elapsed() < REDRAW {
            return;
        }
        *last = Instant::now();
        match total.filter(|total| *total > 0) {
            Some(total) => {
                eprint!("\r\x1b[K          {text}: {} %", done.saturating_mul(100) / total)
            }
            None => eprint!("\r\x1b[K          {text}: {done}"),
        }
    }
}

/// Time between two drawings of a counter.
const REDRAW: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        verb: Verb,
    }

    fn parse(words: &str) -> Result<Verb, clap::Error> {
        Line::try_parse_from(words.split_whitespace()).map(|line| line.verb)
    }

    #[test]
    fn build_takes_key_and_certificate_together() {
        assert!(parse("t build --out d").is_ok());
        assert!(
            parse(
                "t build --out d --arch arm64 --variant debug --profile quick --image a --image b"
            )
            .is_ok()
        );
        assert!(parse("t build --out d --sign-key k").is_err());
        assert!(parse("t build --out d --sign-key k --sign-cert c").is_ok());
        assert!(parse("t build").is_err());
    }

    #[test]
    fn order_says_what_is_wrong_with_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let lock = Lock::embedded();
        let made = |words: &str| match parse(&format!(
            "t build --epoch 1700000000 --out {} {words}",
            at("out")
        )) {
            Ok(Verb::Build(args)) => order(&args, &lock).map_err(|error| format!("{error:#}")),
            _ => panic!("`{words}` does not parse"),
        };
        assert_eq!(made("").unwrap().request.epoch, 1_700_000_000);
        assert!(made("--arch sparc").unwrap_err().contains("sparc"));
        assert!(
            made(&format!("--site {}", at("none")))
                .unwrap_err()
                .contains("could not read the site file")
        );
        assert!(
            made(&format!("--enroll-keys {}", at("none"))).unwrap_err().contains("has no keys")
        );
        assert!(
            made(&format!("--sign-key {0} --sign-cert {0}", at("none")))
                .unwrap_err()
                .contains("could not read")
        );
    }

    #[test]
    fn show_tells_disks_bundles_and_folders_apart() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.img");
        let root = dir.path().join("root");
        std::fs::write(&root, [0; 4096]).unwrap();
        let esp = skerry_image::fat::esp(&[], 1).unwrap();
        let config = skerry_image::fat::config(&[], 2).unwrap();
        let contents =
            skerry_image::disk::Contents { esp: &esp, config: &config, root: &root, seed: "x" };
        skerry_image::disk::write(&contents, &image).unwrap();
        let shown = show_disk(&image).unwrap();
        assert!(shown.good);
        let kinds: Vec<_> = shown
            .rows
            .iter()
            .map(|[name, _, note]| (name.as_str(), note.split(',').next().unwrap()))
            .collect();
        assert_eq!(kinds[..3], [("esp", "FAT32"), ("config", "FAT16"), ("root-a", "empty")]);
        assert_eq!(show(&image, Output::Json).unwrap(), ExitCode::SUCCESS);
        let error = show(dir.path(), Output::Table).unwrap_err().to_string();
        assert!(error.contains("has no manifest"), "{error}");
        let text = dir.path().join("text");
        std::fs::write(&text, "no bundle").unwrap();
        assert!(show(&text, Output::Table).is_err());
    }
}
