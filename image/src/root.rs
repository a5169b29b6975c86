//! What an image holds: which path of the root and of the initramfs gets which content.
//!
//! [`gather`] brings everything that a plan can need into the cache and reads it; [`plan`] is a function of what was
//! gathered and touches no disk. The result is two [`Tree`]s, the files of the boot loader, and the packages that
//! were really used. Called by the builder of the disk.
//!
//! The layout follows a merged `/usr`. The root is read-only on the device: what changes is a link into `/run` or
//! lies on the state partition, see [`LINKS`] and [`FOLDERS`].

use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::json;
use skerry_init::modindex::{self, glob};
use skerry_init::service;

use crate::deb::Kind;
use crate::elf::{self, Links, Machine};
use crate::erofs::{Tools, ToolsError};
use crate::modules::{self, Kernel, ScanError, SelectError, Selection, Wanted};
use crate::oci::{self, Image, OciError};
use crate::packages::catalogue::Place;
use crate::packages::{
    self, Arch, Cache, Catalogue, CatalogueError, FetchError, Lock, Locked, Source, UnpackError,
    Unpacked, store,
};
use crate::progress::Progress;
use crate::tree::{Content, Entry, Node, Tree, TreeError, hex};
use crate::trust::{self, KeySet};

/// Which kind of appliance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Variant {
    /// No shell, nothing to log in to.
    #[default]
    Production,
    /// A shell on the console, and `ctr`; says so in `os-release`.
    Debug,
}

impl Variant {
    /// The word in `os-release`, in `image.json` and on the kernel's command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Production => "production",
            Self::Debug => "debug",
        }
    }
}

/// What is to be built.
#[derive(Debug, Clone)]
pub struct Request {
    pub arch: Arch,
    pub variant: Variant,
    /// Version of the image, for example `1.4.0`.
    pub version: String,
    /// Seconds since 1970 of every time stamp; the device's clock never starts before it.
    pub epoch: u64,
    /// Never lower than that of the version before: an update to a lower one is refused by the device.
    pub release_counter: u64,
    /// Whose signature the device wants on an update; without any it takes none.
    pub trust: Option<KeySet>,
    /// Folder with `skerry-init` and `edgecore` for the architecture, stripped.
    pub binaries: PathBuf,
    /// Archives of container images that go along.
    pub images: Vec<PathBuf>,
    /// Names of features of the catalogue.
    pub with: Vec<String>,
}

/// Everything a plan is made from.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Unpacked packages by name.
    pub packages: BTreeMap<String, Unpacked>,
    /// Name of the kernel's package.
    pub kernel_package: String,
    pub kernel: Kernel,
    /// Modules of the root, the initramfs' among them.
    pub root_modules: Selection,
    pub initramfs_modules: Selection,
    /// Content of the modules of both, by name and whether unpacked.
    pub modules: BTreeMap<(String, bool), Content>,
    /// What the dynamic loader needs, by SHA-256 of the file.
    pub links: BTreeMap<[u8; 32], Links>,
    /// Our own programs by name.
    pub binaries: BTreeMap<String, Content>,
    pub images: Vec<Image>,
    /// Files joined from several: the certificates, and microcode by its path in the early cpio.
    pub certificates: Content,
    pub microcode: Vec<(String, Content)>,
    /// `mkfs.erofs` for this machine.
    pub tools: Tools,
}

/// What is to be written.
#[derive(Debug, Clone)]
pub struct Plan {
    pub root: Tree,
    /// `/init`, modules with their index, `/dev/console`, and the folders for the first mounts.
    pub initramfs: Tree,
    pub boot: Boot,
    /// Release of the kernel.
    pub uname: String,
    /// Content of `os-release`.
    pub os_release: String,
    /// Packages of which at least one file is used, sorted by name.
    pub packages: Vec<Locked>,
    pub images: Vec<Image>,
}

/// Files that the boot needs outside of both trees.
#[derive(Debug, Clone)]
pub struct Boot {
    pub kernel: Content,
    /// The stub that the UKI begins with.
    pub stub: Content,
    /// systemd-boot.
    pub loader: Content,
    /// Its name in `EFI/BOOT`, for example `BOOTX64.EFI`.
    pub removable: String,
    /// Path in the early cpio to content, for example `kernel/x86/microcode/AuthenticAMD.bin`.
    pub microcode: Vec<(String, Content)>,
}

/// Why the inputs could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GatherError {
    #[error("could not understand what the image is made of")]
    Catalogue(#[source] CatalogueError),
    #[error("the lock file has no kernel for {0}")]
    NoKernel(Arch),
    #[error("no image can be built on this machine's architecture")]
    Host,
    #[error("could not get the packages")]
    Fetch(#[source] FetchError),
    #[error("could not unpack the packages")]
    Unpack(#[source] UnpackError),
    #[error("could not use the tool packages")]
    Tools(#[source] ToolsError),
    #[error("could not read the kernel's package")]
    Scan(#[source] ScanError),
    #[error("could not select the kernel's modules")]
    Select(#[source] SelectError),
    #[error("package `{package}` has no file that matches `{pattern}`")]
    NoFile { package: String, pattern: String },
    #[error("could not read `{path}` of a package")]
    Read { path: String, source: io::Error },
    #[error("could not use the cache")]
    Cache(#[source] io::Error),
    #[error("there is no program `{path}` for {arch}")]
    NoBinary { path: String, arch: Arch },
    #[error("`{path}` is no program for {arch}: {what}")]
    Binary { path: String, arch: Arch, what: String },
    #[error("could not take the container image `{path}`")]
    Image { path: String, source: OciError },
}

impl GatherError {
    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Fetch(source) => source.hint(),
            Self::Select(source) => source.hint(),
            Self::Image { source, .. } => source.hint(),
            Self::NoKernel(_) => Some("run `skerry image lock`".to_owned()),
            Self::NoBinary { arch, .. } | Self::Binary { arch, .. } => Some(format!(
                "give a folder with `skerry-init` (static) and `edgecore` built for {} with `--binaries`",
                target(*arch)
            )),
            _ => None,
        }
    }
}

/// Why no plan can be made of the inputs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    #[error("could not understand what the image is made of")]
    Catalogue(#[source] CatalogueError),
    #[error("could not place a file")]
    Tree(#[source] TreeError),
    #[error("`{program}` needs library `{library}`, which no package of the catalogue has")]
    NoLibrary { program: String, library: String },
    #[error("package `{package}` has no file `{path}`")]
    NoFile { package: String, path: String },
    #[error("`{path}` of `{package}` is a link that leads nowhere")]
    DeadLink { package: String, path: String },
    #[error("could not write the index of modules")]
    Index(#[source] modindex::EncodeError),
    #[error("two container images are called `{0}`")]
    ImageTwice(String),
    /// The version stands in files and on a command line.
    #[error("`{0}` is no version: letters, digits, `.`, `-`, `+` and `~`, at most 64")]
    Version(String),
}

impl From<TreeError> for PlanError {
    fn from(source: TreeError) -> Self {
        Self::Tree(source)
    }
}

/// Rust's name of what our programs are built for.
fn target(arch: Arch) -> &'static str {
    match arch {
        Arch::Amd64 => "x86_64-unknown-linux-gnu",
        Arch::Arm64 => "aarch64-unknown-linux-gnu",
    }
}

/// Our own programs.
const BINARIES: [&str; 2] = ["skerry-init", "edgecore"];
/// CNI plugins that `skerry-init` is under another name.
const CNI: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];
/// The part of what is ours.
pub(crate) const OURS: &str = "skerry";

/// Links of the root: path to target.
pub const LINKS: &[(&str, &str)] = &[
    ("bin", "usr/bin"),
    ("sbin", "usr/sbin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
    ("etc/cni/net.d", "/run/cni/net.d"),
    ("etc/hostname", "/run/hostname"),
    ("etc/hosts", "/run/hosts"),
    ("etc/localtime", "/run/localtime"),
    ("etc/machine-id", "/run/machine-id"),
    ("etc/mtab", "/proc/self/mounts"),
    ("etc/os-release", "../usr/lib/os-release"),
    ("etc/resolv.conf", "/run/resolv.conf"),
    ("usr/sbin/modprobe", "../bin/skerry-init"),
];

/// Empty folders of the root, for mounts, and their modes.
pub const FOLDERS: &[(&str, u32)] = &[
    ("config", 0o700),
    ("dev", 0o755),
    ("efi", 0o700),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("state", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var", 0o755),
];

/// Files copied from `extra/` as they are.
const EXTRA: &[(&str, &str)] = &[
    ("etc/passwd", include_str!("../extra/etc/passwd")),
    ("etc/group", include_str!("../extra/etc/group")),
    ("etc/nsswitch.conf", include_str!("../extra/etc/nsswitch.conf")),
];
const CONTAINERD_CONFIG: &str = include_str!("../extra/etc/containerd/config.toml");
const RUNC_CONFIG: &str = include_str!("../extra/runc.toml");
const BROKER_CONFIG: &str = include_str!("../extra/etc/mosquitto/mosquitto.conf");

/// Fetches, unpacks and reads everything that [`plan`] needs.
///
/// With a warm cache this takes a second or two; a new kernel is read once, which takes some more.
///
/// # Errors
///
/// See [`GatherError`].
pub fn gather(
    request: &Request,
    catalogue: &Catalogue,
    lock: &Lock,
    cache: &Cache,
    source: &Source,
    progress: &dyn Progress,
) -> Result<Inputs, GatherError> {
    let with = catalogue.features(&request.with).map_err(GatherError::Catalogue)?;
    let debug = request.variant == Variant::Debug;
    let arch = request.arch;
    // What costs nothing is refused first.
    let binaries = binaries(request)?;
    let images = images(request)?;
    let kernel_package = lock.kernel(arch).ok_or(GatherError::NoKernel(arch))?.name.clone();
    let parts = catalogue.parts(arch, debug, &with);
    let microcode = catalogue.microcode(arch, debug, &with);

    let mut names: BTreeSet<String> = parts.iter().map(|part| part.package.clone()).collect();
    names.extend(microcode.iter().map(|entry| entry.package.clone()));
    names.extend(catalogue.libraries(&with).into_iter().cloned());
    names.insert(catalogue.boot(arch).package.clone());
    names.insert(kernel_package.clone());
    let names: Vec<String> = names.into_iter().collect();
    let fetched =
        packages::fetch(lock, arch, &names, cache, source, progress).map_err(GatherError::Fetch)?;
    let tools = tools(catalogue, lock, cache, source, progress)?;

    let mut packages = BTreeMap::new();
    for (name, package) in &fetched {
        if !store::is_unpacked(package, cache) {
            progress.step(&format!("unpacking `{name}`"));
        }
        packages.insert(name.clone(), store::unpack(package, cache).map_err(GatherError::Unpack)?);
    }

    let unpacked = &packages[&kernel_package];
    let kernel = kernel(unpacked, cache, progress)?;
    let sets = catalogue.modules(arch, debug, &with);
    let wanted = |all: bool| -> Vec<Wanted<'_>> {
        let mut wanted = Vec::new();
        for set in sets.iter().filter(|set| all || set.place == Place::Initramfs) {
            let names = set.names(arch).map(String::as_str).collect();
            wanted.push(Wanted { set: &set.set, names, packed: set.packed });
        }
        wanted
    };
    let root_modules = modules::select(&kernel, &wanted(true)).map_err(GatherError::Select)?;
    let mut initramfs_modules =
        modules::select(&kernel, &wanted(false)).map_err(GatherError::Select)?;
    // The initramfs is compressed as a whole, and its modules are all loaded at once.
    initramfs_modules.modules.values_mut().for_each(|unpacked| *unpacked = true);
    let mut contents = BTreeMap::new();
    for (name, unpack) in root_modules.modules.iter().chain(&initramfs_modules.modules) {
        let key = (name.clone(), *unpack);
        if let btree_map::Entry::Vacant(free) = contents.entry(key) {
            free.insert(module(unpacked, &kernel, name, *unpack, cache)?);
        }
    }

    let mut links = BTreeMap::new();
    for part in &parts {
        for path in matching(&packages[&part.package], &part.files, &part.except)? {
            add_links(&packages[&part.package], &path, &mut links)?;
        }
    }
    for name in catalogue.libraries(&with) {
        let unpacked = &packages[name];
        let library = |path: &&String| path.contains(".so");
        for path in unpacked.items.keys().filter(library) {
            add_links(unpacked, path, &mut links)?;
        }
    }
    for (name, content) in &binaries {
        links.insert(content.sha256(), program(name, content, request)?);
    }

    let mut joined = Vec::new();
    for entry in microcode {
        let content = join(&packages[&entry.package], &entry.files)?;
        joined.push((entry.target.clone(), content));
    }
    let certificates =
        join(&packages[CERTIFICATES], &["usr/share/ca-certificates/mozilla/*.crt".to_owned()])?;
    Ok(Inputs {
        packages,
        kernel_package,
        kernel,
        root_modules,
        initramfs_modules,
        modules: contents,
        links,
        binaries,
        images,
        certificates,
        microcode: joined,
        tools,
    })
}

/// Package with the certificates of authorities.
const CERTIFICATES: &str = "ca-certificates";

/// `mkfs.erofs` for this machine, from the tool packages.
///
/// # Errors
///
/// See [`GatherError`].
pub fn tools(
    catalogue: &Catalogue,
    lock: &Lock,
    cache: &Cache,
    source: &Source,
    progress: &dyn Progress,
) -> Result<Tools, GatherError> {
    let host = Arch::of_host().ok_or(GatherError::Host)?;
    let fetched = packages::fetch(lock, host, &catalogue.tools, cache, source, progress)
        .map_err(GatherError::Fetch)?;
    let unpacked: Result<Vec<Unpacked>, UnpackError> =
        fetched.values().map(|package| store::unpack(package, cache)).collect();
    Tools::install(&unpacked.map_err(GatherError::Unpack)?, host, cache).map_err(GatherError::Tools)
}

/// Unpacked packages for tests of an image, such as the firmware of a virtual machine.
///
/// # Errors
///
/// See [`GatherError`].
pub fn test_packages(
    arch: Arch,
    catalogue: &Catalogue,
    lock: &Lock,
    cache: &Cache,
    source: &Source,
    progress: &dyn Progress,
) -> Result<Vec<Unpacked>, GatherError> {
    let names = catalogue.test_packages(arch);
    let fetched =
        packages::fetch(lock, arch, names, cache, source, progress).map_err(GatherError::Fetch)?;
    fetched.values().map(|p| store::unpack(p, cache).map_err(GatherError::Unpack)).collect()
}

fn binaries(request: &Request) -> Result<BTreeMap<String, Content>, GatherError> {
    let mut found = BTreeMap::new();
    for name in BINARIES {
        let path = request.binaries.join(name);
        let content = Content::file(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => {
                GatherError::NoBinary { path: path.display().to_string(), arch: request.arch }
            }
            _ => GatherError::Read { path: path.display().to_string(), source },
        })?;
        program(name, &content, request)?;
        found.insert(name.to_owned(), content);
    }
    Ok(found)
}

/// Checks that one of our programs can run on the device.
fn program(name: &str, content: &Content, request: &Request) -> Result<Links, GatherError> {
    let path = request.binaries.join(name).display().to_string();
    let arch = request.arch;
    let bytes =
        content.read().map_err(|source| GatherError::Read { path: path.clone(), source })?;
    let wrong = |what: String| GatherError::Binary { path: path.clone(), arch, what };
    let links = elf::links(&bytes).map_err(|e| wrong(e.to_string()))?;
    let machine = match arch {
        Arch::Amd64 => Machine::X86_64,
        Arch::Arm64 => Machine::Aarch64,
    };
    if links.machine != machine {
        return Err(wrong(format!("it is built for {:?}", links.machine)));
    }
    if name == "skerry-init" && (links.loader.is_some() || !links.needed.is_empty()) {
        // In the initramfs there is no library.
        return Err(wrong("it is not static".to_owned()));
    }
    Ok(links)
}

fn images(request: &Request) -> Result<Vec<Image>, GatherError> {
    let mut images = vec![oci::pause(request.arch)];
    for path in &request.images {
        let image = oci::check(path, request.arch)
            .map_err(|source| GatherError::Image { path: path.display().to_string(), source })?;
        images.push(image);
    }
    Ok(images)
}

fn kernel(
    unpacked: &Unpacked,
    cache: &Cache,
    progress: &dyn Progress,
) -> Result<Kernel, GatherError> {
    let prefix = "usr/lib/modules/";
    let uname = unpacked.items.keys().find_map(|path| {
        let (uname, rest) = path.strip_prefix(prefix)?.split_once('/')?;
        (rest == "modules.builtin").then(|| uname.to_owned())
    });
    let uname = uname.ok_or_else(|| GatherError::NoFile {
        package: unpacked.package.locked.name.clone(),
        pattern: format!("{prefix}*/modules.builtin"),
    })?;
    let file = cache
        .sub("kernels")
        .map_err(GatherError::Cache)?
        .join(format!("{KERNEL_RECIPE}-{}.json", unpacked.package.locked.sha256));
    let known =
        fs::read(&file).ok().and_then(|bytes| serde_json::from_slice::<Kernel>(&bytes).ok());
    if let Some(kernel) = known {
        return Ok(kernel);
    }
    let folder = unpacked.folder.join(prefix).join(&uname);
    let kernel = modules::scan(&folder, &uname, progress).map_err(GatherError::Scan)?;
    let save = || {
        let scratch = cache.scratch()?;
        let path = scratch.path().join("kernel.json");
        fs::write(&path, serde_json::to_vec(&kernel)?)?;
        fs::rename(path, &file)
    };
    save().map_err(GatherError::Cache)?;
    Ok(kernel)
}

/// Raised when [`modules::scan`] learns to read something more.
const KERNEL_RECIPE: &str = "1";

/// The content of a module, unpacked into the cache when it is to be unpacked.
fn module(
    package: &Unpacked,
    kernel: &Kernel,
    name: &str,
    unpack: bool,
    cache: &Cache,
) -> Result<Content, GatherError> {
    let info = &kernel.modules[name];
    let path = format!("usr/lib/modules/{}/{}", kernel.uname, info.path);
    let packed = package.content(&path).ok_or_else(|| GatherError::NoFile {
        package: package.package.locked.name.clone(),
        pattern: path.clone(),
    })?;
    if !unpack || info.path == info.unpacked_path() {
        return Ok(packed);
    }
    let file =
        cache.sub("modules").map_err(GatherError::Cache)?.join(format!("{}.ko", info.sha256));
    if fs::metadata(&file).map_or(0, |meta| meta.len()) != info.size {
        let bytes = modules::unpacked(&package.folder.join(&path))
            .map_err(|source| GatherError::Read { path: path.clone(), source })?;
        let save = || {
            let scratch = cache.scratch()?;
            let made = scratch.path().join("module");
            fs::write(&made, bytes)?;
            fs::rename(made, &file)
        };
        save().map_err(GatherError::Cache)?;
    }
    let sha256 = crate::tree::unhex(&info.sha256).ok_or_else(|| {
        let text = "the cache says no digest for it";
        GatherError::Read { path, source: io::Error::new(io::ErrorKind::InvalidData, text) }
    })?;
    Ok(Content::known_file(file, info.size, sha256))
}

/// Paths of files and links of a package that a list of patterns asks for; each pattern must match.
fn matching(
    unpacked: &Unpacked,
    patterns: &[String],
    except: &[String],
) -> Result<Vec<String>, GatherError> {
    let fits = |pattern: &String, path: &str| glob(pattern.as_bytes(), path.as_bytes());
    let files = || {
        let file = |(path, item): (&String, &crate::deb::Item)| {
            (item.kind != Kind::Folder).then(|| path.clone())
        };
        unpacked.items.iter().filter_map(file)
    };
    for pattern in patterns {
        if !files().any(|path| fits(pattern, &path)) {
            return Err(GatherError::NoFile {
                package: unpacked.package.locked.name.clone(),
                pattern: pattern.clone(),
            });
        }
    }
    let wanted = |path: &String| {
        patterns.iter().any(|p| fits(p, path)) && !except.iter().any(|p| fits(p, path))
    };
    Ok(files().filter(wanted).collect())
}

fn add_links(
    unpacked: &Unpacked,
    path: &str,
    links: &mut BTreeMap<[u8; 32], Links>,
) -> Result<(), GatherError> {
    let Some(content) = unpacked.content(path) else { return Ok(()) };
    if links.contains_key(&content.sha256()) {
        return Ok(());
    }
    let bytes =
        content.read().map_err(|source| GatherError::Read { path: path.to_owned(), source })?;
    if elf::is_elf(&bytes)
        && let Ok(found) = elf::links(&bytes)
    {
        links.insert(content.sha256(), found);
    }
    Ok(())
}

/// One content of all files of a package that match, in the order of their names.
fn join(unpacked: &Unpacked, patterns: &[String]) -> Result<Content, GatherError> {
    let mut joined = Vec::new();
    for path in matching(unpacked, patterns, &[])? {
        let Some(content) = unpacked.content(&path) else { continue };
        content.copy(&mut joined).map_err(|source| GatherError::Read { path, source })?;
    }
    Ok(Content::bytes(joined))
}

/// Decides what goes where. Pure.
///
/// # Errors
///
/// See [`PlanError`].
pub fn plan(request: &Request, catalogue: &Catalogue, inputs: &Inputs) -> Result<Plan, PlanError> {
    if !is_version(&request.version) {
        return Err(PlanError::Version(request.version.clone()));
    }
    let with = catalogue.features(&request.with).map_err(PlanError::Catalogue)?;
    let debug = request.variant == Variant::Debug;
    let arch = request.arch;
    let mut root = Tree::new();
    for (path, mode) in FOLDERS {
        root.folder(path, *mode, OURS)?;
    }
    for (path, target) in LINKS {
        root.link(path, target, OURS)?;
    }
    let broker = with.contains("mosquitto");
    for (path, text) in EXTRA {
        let mut text = (*text).to_owned();
        // A user of its own; images without the broker have nobody but root.
        let (name, id) = (service::BROKER, service::BROKER_ID);
        match *path {
            "etc/passwd" if broker => {
                text += &format!("{name}:x:{id}:{id}::/nonexistent:/nonexistent\n");
            }
            "etc/group" if broker => text += &format!("{name}:x:{id}:\n"),
            _ => {}
        }
        root.file(path, 0o644, Content::bytes(text), OURS)?;
    }
    if broker {
        let path = service::BROKER_CONFIG.trim_start_matches('/');
        root.file(path, 0o644, Content::bytes(BROKER_CONFIG), OURS)?;
    }
    let mut config = CONTAINERD_CONFIG.to_owned();
    if with.contains("runc") {
        config.push_str(RUNC_CONFIG);
    }
    root.file("etc/containerd/config.toml", 0o644, Content::bytes(config), OURS)?;
    for (name, content) in &inputs.binaries {
        root.file(&format!("usr/bin/{name}"), 0o755, content.clone(), OURS)?;
    }
    if !with.contains("go-cni") {
        for name in CNI {
            root.link(&format!("usr/lib/cni/{name}"), "../../bin/skerry-init", OURS)?;
        }
    }
    for part in catalogue.parts(arch, debug, &with) {
        place_part(&mut root, part, inputs)?;
    }
    place_libraries(&mut root, request, catalogue, &with, inputs)?;
    root.file(
        "etc/ssl/certs/ca-certificates.crt",
        0o644,
        inputs.certificates.clone(),
        CERTIFICATES,
    )?;

    let uname = &inputs.kernel.uname;
    let kernel = &inputs.packages[&inputs.kernel_package];
    let of_kernel = |path: String| need(kernel, &path);
    let config = of_kernel(format!("boot/config-{uname}"))?;
    let config_path = format!("usr/lib/kernel/config-{uname}");
    root.file(&config_path, 0o644, config, &inputs.kernel_package)?;
    place_modules(&mut root, "usr/lib/modules", &inputs.root_modules, inputs)?;
    place_firmware(&mut root, inputs);

    let mut names = BTreeSet::new();
    for image in &inputs.images {
        if !names.insert(&image.name) {
            return Err(PlanError::ImageTwice(image.name.clone()));
        }
        let path = format!("usr/share/skerry/images/{}.tar", file_name(&image.name));
        root.file(&path, 0o644, image.content.clone(), OURS)?;
    }
    let os_release = os_release(request);
    root.file("usr/lib/os-release", 0o644, Content::bytes(os_release.as_str()), OURS)?;
    if let Some(trust) = &request.trust {
        let path = trust::ROOT_KEYS.trim_start_matches('/');
        root.file(path, 0o644, Content::bytes(trust.to_json()), OURS)?;
    }
    let facts = json!({
        "version": request.version,
        "epoch": request.epoch,
        "release_counter": request.release_counter,
        "arch": arch.name(),
        "variant": request.variant.name(),
        "uname": uname,
    });
    let facts = format!("{facts:#}\n");
    root.file("usr/share/skerry/image.json", 0o644, Content::bytes(facts), OURS)?;

    let mut initramfs = Tree::new();
    for folder in ["proc", "sys", "dev", "sysroot"] {
        initramfs.folder(folder, 0o755, OURS)?;
    }
    initramfs.char_device("dev/console", 0o600, (5, 1), OURS)?;
    initramfs.file("init", 0o755, inputs.binaries["skerry-init"].clone(), OURS)?;
    place_modules(&mut initramfs, "lib/modules", &inputs.initramfs_modules, inputs)?;

    let boot = catalogue.boot(arch);
    let loader = &inputs.packages[&boot.package];
    let boot = Boot {
        kernel: of_kernel(format!("boot/vmlinuz-{uname}"))?,
        stub: need(loader, &boot.stub)?,
        loader: need(loader, &boot.loader)?,
        removable: boot.removable.clone(),
        microcode: inputs.microcode.clone(),
    };
    let used = used_packages(&root, request, catalogue, &with, inputs);
    Ok(Plan {
        root,
        initramfs,
        boot,
        uname: uname.clone(),
        os_release,
        packages: used,
        images: inputs.images.clone(),
    })
}

fn used_packages(
    root: &Tree,
    request: &Request,
    catalogue: &Catalogue,
    with: &BTreeSet<String>,
    inputs: &Inputs,
) -> Vec<Locked> {
    let mut names: BTreeSet<&str> = root.iter().map(|(_, entry)| entry.part.as_str()).collect();
    names.insert(&inputs.kernel_package);
    names.insert(&catalogue.boot(request.arch).package);
    let debug = request.variant == Variant::Debug;
    let microcode = catalogue.microcode(request.arch, debug, with);
    names.extend(microcode.into_iter().map(|entry| entry.package.as_str()));
    let unpacked = names.into_iter().filter_map(|name| inputs.packages.get(name));
    unpacked.map(|unpacked| unpacked.package.locked.clone()).collect()
}

fn need(unpacked: &Unpacked, path: &str) -> Result<Content, PlanError> {
    unpacked.content(path).ok_or_else(|| PlanError::NoFile {
        package: unpacked.package.locked.name.clone(),
        path: path.to_owned(),
    })
}

fn place_part(
    root: &mut Tree,
    part: &packages::catalogue::Part,
    inputs: &Inputs,
) -> Result<(), PlanError> {
    let unpacked = &inputs.packages[&part.package];
    let fits = |patterns: &[String], path: &str| {
        patterns.iter().any(|pattern| glob(pattern.as_bytes(), path.as_bytes()))
    };
    for (path, item) in &unpacked.items {
        if !fits(&part.files, path) || fits(&part.except, path) {
            continue;
        }
        match &item.kind {
            Kind::Folder => {}
            Kind::Link(target) => root.link(path, target, &part.package)?,
            Kind::File { .. } => {
                let mode = if item.mode & 0o111 != 0 { 0o755 } else { 0o644 };
                root.file(path, mode, need(unpacked, path)?, &part.package)?;
            }
        }
    }
    for (path, target) in &part.links {
        root.link(path, target, &part.package)?;
    }
    // A link whose file was left out would only be found on the device.
    for (path, item) in &unpacked.items {
        let Some(Entry { node: Node::Link(target), part: owner, .. }) = root.get(path) else {
            continue;
        };
        let leads = store::join(path, target).is_some_and(|to| root.get(&to).is_some());
        if *owner == part.package && matches!(item.kind, Kind::Link(_)) && !leads {
            return Err(PlanError::DeadLink { package: part.package.clone(), path: path.clone() });
        }
    }
    Ok(())
}

/// Puts every library that a file of the root needs, and the dynamic loader, from the packages for libraries.
fn place_libraries(
    root: &mut Tree,
    request: &Request,
    catalogue: &Catalogue,
    with: &BTreeSet<String>,
    inputs: &Inputs,
) -> Result<(), PlanError> {
    let sources: Vec<(&String, &Unpacked)> = catalogue
        .libraries(with)
        .into_iter()
        .filter_map(|name| Some((name, inputs.packages.get(name)?)))
        .collect();
    let folder = format!("usr/lib/{}", request.arch.triplet());
    let mut open: Vec<(String, [u8; 32])> = root
        .iter()
        .filter_map(|(path, entry)| match &entry.node {
            Node::File(content) => Some((path.to_owned(), content.sha256())),
            _ => None,
        })
        .collect();
    while let Some((program, sha256)) = open.pop() {
        let Some(links) = inputs.links.get(&sha256) else { continue };
        // The loader's own path begins in a folder that is a link of the root.
        let loader = links.loader.iter().map(|path| {
            let path = path.trim_start_matches('/');
            let usr = if path.starts_with("usr/") { "" } else { "usr/" };
            (format!("{usr}{path}"), true)
        });
        let libraries = links.needed.iter().map(|name| (format!("{folder}/{name}"), false));
        for (path, is_loader) in loader.chain(libraries).collect::<Vec<_>>() {
            if root.get(&path).is_some() {
                continue;
            }
            let found = sources.iter().find_map(|(name, unpacked)| {
                let file = unpacked.resolve(&path)?;
                Some((*name, unpacked, file))
            });
            let Some((package, unpacked, file)) = found else {
                return Err(PlanError::NoLibrary { program, library: path });
            };
            let content = need(unpacked, &file)?;
            open.push((path.clone(), content.sha256()));
            if is_loader {
                // The real file lies with the libraries, where others need it by name.
                if root.get(&file).is_none() {
                    root.file(&file, 0o755, content, package)?;
                }
                if file != path {
                    let up = "../".repeat(path.matches('/').count());
                    root.link(&path, &format!("{up}{file}"), package)?;
                }
            } else {
                let is_ld = path.rsplit('/').next().is_some_and(|name| name.starts_with("ld-"));
                root.file(&path, if is_ld { 0o755 } else { 0o644 }, content, package)?;
            }
        }
    }
    Ok(())
}

fn place_modules(
    tree: &mut Tree,
    below: &str,
    selection: &Selection,
    inputs: &Inputs,
) -> Result<(), PlanError> {
    let kernel = &inputs.kernel;
    let folder = format!("{below}/{}", kernel.uname);
    for (name, unpacked) in &selection.modules {
        let info = &kernel.modules[name];
        let path = if *unpacked { info.unpacked_path() } else { &info.path };
        let content = &inputs.modules[&(name.clone(), *unpacked)];
        let path = format!("{folder}/{path}");
        tree.file(&path, 0o644, content.clone(), &inputs.kernel_package)?;
    }
    let index = modules::index(kernel, selection).map_err(PlanError::Index)?;
    let path = format!("{folder}/{}", modindex::FILE_NAME);
    tree.file(&path, 0o644, Content::bytes(index), OURS)?;
    Ok(())
}

/// Removes firmware that no module of the root asks for.
fn place_firmware(root: &mut Tree, inputs: &Inputs) {
    let asked: BTreeSet<String> = inputs
        .root_modules
        .modules
        .keys()
        .flat_map(|name| &inputs.kernel.modules[name].firmware)
        .map(|file| format!("usr/lib/firmware/{file}"))
        .collect();
    root.retain_files(|path| !path.starts_with("usr/lib/firmware/") || asked.contains(path));
}

fn os_release(request: &Request) -> String {
    let (name, version) = ("Skerry", &request.version);
    let variant = match request.variant {
        Variant::Production => "",
        Variant::Debug => "VARIANT=\"Debug: a shell is open on the console\"\nVARIANT_ID=debug\n",
    };
    format!(
        "NAME=\"{name}\"\nID=skerry\nID_LIKE=debian\nVERSION_ID={version}\nIMAGE_ID=skerry\n\
         IMAGE_VERSION={version}\nPRETTY_NAME=\"{name} {version}\"\n{variant}"
    )
}

/// Whether a version can stand on a command line, in a file's name and in `os-release` without quotes.
fn is_version(text: &str) -> bool {
    let sound = |c: char| c.is_ascii_alphanumeric() || ".-+~".contains(c);
    (1..=64).contains(&text.len())
        && text.chars().all(sound)
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// A file's name for an image's name.
fn file_name(name: &str) -> String {
    name.chars()
        .map(|c| if c.is_ascii_alphanumeric() || ".-".contains(c) { c } else { '_' })
        .collect()
}

/// One row of a table of sizes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartSize {
    pub part: String,
    pub files: usize,
    /// Bytes before compression.
    pub bytes: u64,
    /// Bytes after zstd 9 over all files of the part together: what the part roughly costs in the file system.
    pub packed: u64,
}

impl Plan {
    /// Paths of files of the root that can be executed.
    pub fn executables(&self) -> Vec<&str> {
        let programs = self.root.iter().filter(|(path, entry)| {
            let library = path.contains(".so");
            entry.is_executable() && !library
        });
        programs.map(|(path, _)| path).collect()
    }

    /// What each part costs, largest first; reads and compresses everything, which takes a minute.
    ///
    /// # Errors
    ///
    /// A content changed since it was gathered.
    pub fn sizes(&self) -> io::Result<Vec<PartSize>> {
        let mut parts: BTreeMap<&str, (usize, u64, zstd::stream::Encoder<'_, Counter>)> =
            BTreeMap::new();
        for (path, entry) in self.root.iter() {
            let Node::File(content) = &entry.node else { continue };
            let part = match path {
                _ if path.contains("/modules/") => "kernel modules",
                _ if entry.part == OURS => path.rsplit('/').next().unwrap_or(OURS),
                _ => &entry.part,
            };
            if !parts.contains_key(part) {
                parts.insert(part, (0, 0, zstd::stream::Encoder::new(Counter(0), 9)?));
            }
            let row = parts.get_mut(part).expect("it was just inserted");
            row.0 += 1;
            row.1 += content.size();
            content.copy(&mut row.2)?;
        }
        let mut rows = Vec::new();
        for (part, (files, bytes, encoder)) in parts {
            let packed = encoder.finish()?.0;
            rows.push(PartSize { part: part.to_owned(), files, bytes, packed });
        }
        rows.sort_by(|a, b| b.packed.cmp(&a.packed).then(a.part.cmp(&b.part)));
        Ok(rows)
    }

    /// Files of the root with their digests, for manifests: path, size, SHA-256.
    pub fn files(&self) -> impl Iterator<Item = (&str, u64, String)> {
        self.root.iter().filter_map(|(path, entry)| match &entry.node {
            Node::File(content) => Some((path, content.size(), hex(&content.sha256()))),
            _ => None,
        })
    }
}

/// Counts what is written to it.
struct Counter(u64);

impl io::Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether `folder` has both of our programs, for a better message before anything else is done.
pub fn has_binaries(folder: &Path) -> bool {
    BINARIES.iter().all(|name| folder.join(name).is_file())
}

#[cfg(test)]
mod tests;
