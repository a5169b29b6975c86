//! The kernel's modules: what each says about itself, what a curated set needs besides, and the index for PID 1.
//!
//! [`scan`] reads `.modinfo` of every module of an unpacked kernel package once and keeps the answer in the cache;
//! [`select`] is pure: it resolves the catalogue's sets to the closure of modules, through names for hard
//! dependencies and through aliases for soft ones (`ext4` wishes for `crc32c`, which is no module's name).
//! [`index`] hands the result to [`skerry_init::modindex`]. Called by [`crate::root`].
//!
//! A kernel package brings no `modules.dep`: depmod is run by a maintainer script, and none runs here.
//!
//! Source: the kernel's include/linux/module.h and moduleparam.h (`.modinfo` is NUL-separated `key=value`);
//! modprobe.d(5), `softdep`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use skerry_init::modindex::{self, glob, normalize};

use crate::elf;
use crate::progress::Progress;
use crate::tree::hex;

/// Unpacked bytes of one module at most; the largest of Debian, amdgpu, has 35 MB.
pub const MODULE_MAX: u64 = 256 << 20;
/// `.modinfo` strings of one module at most.
pub const FACTS_MAX: usize = 100_000;

/// What one module says about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Path below `lib/modules/<uname>` as packed, for example `kernel/fs/ext4/ext4.ko.xz`.
    pub path: String,
    /// Length after unpacking.
    pub size: u64,
    /// SHA-256 after unpacking.
    pub sha256: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub depends: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// Soft dependencies as written: names or aliases.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub before: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<String>,
    /// Firmware files it may ask for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub firmware: Vec<String>,
}

impl Info {
    /// Path without the packing's extension.
    pub fn unpacked_path(&self) -> &str {
        self.path.strip_suffix(".xz").unwrap_or(&self.path)
    }
}

/// All modules of one kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// Release as `uname -r` says it.
    pub uname: String,
    /// By name, with underscores.
    pub modules: BTreeMap<String, Info>,
    /// Names of what is built in.
    pub built_in: BTreeSet<String>,
    /// Aliases of what is built in.
    pub built_in_aliases: BTreeSet<String>,
}

/// Why a kernel's modules could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScanError {
    #[error("could not read the modules of the kernel")]
    Read(#[source] io::Error),
    #[error("`{path}` is no module")]
    Elf { path: String, source: elf::ElfError },
    #[error("`{path}` is no module: {what}")]
    Broken { path: String, what: &'static str },
    #[error("two modules of the kernel are called `{0}`")]
    Twice(String),
}

/// Why a set of modules cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SelectError {
    /// A name or pattern of the catalogue matches no module of this kernel.
    #[error("set `{set}` asks for module `{name}`, which kernel {uname} does not have")]
    Missing { set: String, name: String, uname: String },
    #[error("module `{module}` depends on `{needs}`, which kernel {uname} does not have")]
    Dependency { module: String, needs: String, uname: String },
}

impl SelectError {
    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { .. } => {
                Some("correct `packages.toml`, or build for the other architecture".to_owned())
            }
            Self::Dependency { .. } => None,
        }
    }
}

/// The facts of a `.modinfo` section; unknown keys and broken strings are passed over, as the kernel's tools do.
pub fn parse_modinfo(section: &[u8]) -> Info {
    let mut info = Info::default();
    let words = |text: &str| -> Vec<String> {
        text.split([',', ' ', '\t']).filter(|word| !word.is_empty()).map(str::to_owned).collect()
    };
    for fact in section.split(|byte| *byte == 0).take(FACTS_MAX) {
        let Ok(fact) = std::str::from_utf8(fact) else { continue };
        let Some((key, value)) = fact.split_once('=') else { continue };
        match key {
            "depends" => info.depends.extend(words(value)),
            "alias" => info.aliases.push(value.to_owned()),
            "firmware" => info.firmware.push(value.to_owned()),
            "softdep" => {
                let mut list = None;
                for word in words(value) {
                    match word.as_str() {
                        "pre:" => list = Some(true),
                        "post:" => list = Some(false),
                        _ => match list {
                            Some(true) => info.before.push(word),
                            Some(false) => info.after.push(word),
                            None => {}
                        },
                    }
                }
            }
            _ => {}
        }
    }
    info
}

/// The unpacked bytes of a module file, by the extension of its path.
///
/// # Errors
///
/// The file cannot be read, is cut, or is longer than [`MODULE_MAX`].
pub fn unpacked(path: &Path) -> io::Result<Vec<u8>> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let file = fs::File::open(path).map_err(named)?;
    let reader: Box<dyn Read> = match path.extension().and_then(|ext| ext.to_str()) {
        Some("xz") => Box::new(liblzma::read::XzDecoder::new(file)),
        Some("zst") => Box::new(zstd::stream::read::Decoder::new(file)?),
        _ => Box::new(file),
    };
    let mut bytes = Vec::new();
    reader.take(MODULE_MAX + 1).read_to_end(&mut bytes).map_err(named)?;
    if bytes.len() as u64 > MODULE_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a module is too long"));
    }
    Ok(bytes)
}

/// Reads all modules below `folder`, which is an unpacked `lib/modules/<uname>`; takes seconds.
///
/// # Errors
///
/// See [`ScanError`].
pub fn scan(folder: &Path, uname: &str, progress: &dyn Progress) -> Result<Kernel, ScanError> {
    let mut paths = Vec::new();
    collect(&folder.join("kernel"), &mut paths).map_err(ScanError::Read)?;
    paths.sort();
    progress.step(&format!("reading {} modules of kernel {uname}", paths.len()));
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Vec::with_capacity(paths.len()));
    let work = || -> Result<(), ScanError> {
        while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
            let read = read_module(folder, path)?;
            found.lock().expect("no reader panics").push(read);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let readers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("no reader panics"))
    })?;
    let mut kernel = Kernel { uname: uname.to_owned(), ..Kernel::default() };
    for (name, info) in found.into_inner().expect("no reader panics") {
        if kernel.modules.insert(name.clone(), info).is_some() {
            return Err(ScanError::Twice(name));
        }
    }
    let text = fs::read_to_string(folder.join("modules.builtin")).map_err(ScanError::Read)?;
    kernel.built_in = text.lines().filter_map(|line| module_name(line.trim())).collect();
    let facts = fs::read(folder.join("modules.builtin.modinfo")).unwrap_or_default();
    for fact in facts.split(|byte| *byte == 0) {
        // `module.key=value`
        let fact = std::str::from_utf8(fact).unwrap_or_default();
        if let Some((key, value)) = fact.split_once('=')
            && key.ends_with(".alias")
        {
            kernel.built_in_aliases.insert(normalize(value));
        }
    }
    Ok(kernel)
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            collect(&path, paths)?;
        } else if path.to_str().and_then(module_name).is_some() {
            paths.push(path);
        }
    }
    Ok(())
}

/// The name of a module with this path, with underscores; `None` when it is no module's path.
fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem =
        ["", ".xz", ".zst"].iter().find_map(|ext| file.strip_suffix(ext)?.strip_suffix(".ko"))?;
    (!stem.is_empty()).then(|| normalize(stem))
}

fn read_module(folder: &Path, path: &Path) -> Result<(String, Info), ScanError> {
    let bytes = unpacked(path).map_err(ScanError::Read)?;
    let shown = path.strip_prefix(folder).unwrap_or(path).display().to_string();
    let section = elf::section(&bytes, ".modinfo")
        .map_err(|source| ScanError::Elf { path: shown.clone(), source })?;
    let section =
        section.ok_or(ScanError::Broken { path: shown.clone(), what: "it has no `.modinfo`" })?;
    let name = module_name(&shown)
        .ok_or(ScanError::Broken { path: shown.clone(), what: "its name is empty" })?;
    let info = Info {
        path: shown,
        size: bytes.len() as u64,
        sha256: hex(&Sha256::digest(&bytes)),
        ..parse_modinfo(section)
    };
    Ok((name, info))
}

/// Which modules go along.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// Name to whether the file is unpacked; a module that two sets want is unpacked when one of them says so.
    pub modules: BTreeMap<String, bool>,
}

/// A set as [`select`] wants it.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// Its name in messages.
    pub set: &'a str,
    /// Names, or patterns that must match something.
    pub names: Vec<&'a str>,
    /// Whether its files, and those it depends on, stay packed.
    pub packed: bool,
}

/// The closure of some sets. What is built in satisfies every wish and is not part of the result.
///
/// # Errors
///
/// See [`SelectError`].
pub fn select(kernel: &Kernel, sets: &[Wanted<'_>]) -> Result<Selection, SelectError> {
    let mut selection = Selection::default();
    let providers = Providers::new(kernel);
    // Sets that are unpacked come first, so that a second visit has nothing to change.
    for packed in [false, true] {
        for set in sets.iter().filter(|set| set.packed == packed) {
            let mut open: Vec<String> = Vec::new();
            for name in &set.names {
                let pattern = normalize(name);
                let matches = |module: &&String| glob(pattern.as_bytes(), module.as_bytes());
                let found: Vec<&String> = if kernel.modules.contains_key(&pattern) {
                    vec![&pattern]
                } else {
                    kernel.modules.keys().filter(matches).collect()
                };
                if found.is_empty() && !kernel.built_in.contains(&pattern) {
                    return Err(SelectError::Missing {
                        set: set.set.to_owned(),
                        name: (*name).to_owned(),
                        uname: kernel.uname.clone(),
                    });
                }
                open.extend(found.into_iter().cloned());
            }
            while let Some(name) = open.pop() {
                if selection.modules.contains_key(&name) {
                    continue;
                }
                let info = &kernel.modules[&name];
                for needs in &info.depends {
                    let needs = normalize(needs);
                    if kernel.modules.contains_key(&needs) {
                        open.push(needs);
                    } else if !kernel.built_in.contains(&needs) {
                        return Err(SelectError::Dependency {
                            module: name,
                            needs,
                            uname: kernel.uname.clone(),
                        });
                    }
                }
                for wish in info.before.iter().chain(&info.after) {
                    open.extend(providers.of(wish));
                }
                selection.modules.insert(name, !packed);
            }
        }
    }
    Ok(selection)
}

/// Who answers to a soft dependency.
struct Providers<'a> {
    kernel: &'a Kernel,
    /// Aliases without wildcards: a soft dependency is never a device.
    by_alias: BTreeMap<String, Vec<&'a str>>,
}

impl<'a> Providers<'a> {
    fn new(kernel: &'a Kernel) -> Self {
        let mut by_alias: BTreeMap<String, Vec<&'a str>> = BTreeMap::new();
        for (name, info) in &kernel.modules {
            for alias in info.aliases.iter().filter(|alias| !alias.contains(['*', '?', '['])) {
                by_alias.entry(normalize(alias)).or_default().push(name);
            }
        }
        Self { kernel, by_alias }
    }

    /// The modules behind a word of `softdep`, best by name; nothing when it is built in or unknown.
    fn of(&self, wish: &str) -> Vec<String> {
        let wish = normalize(wish);
        if self.kernel.modules.contains_key(&wish) {
            return vec![wish];
        }
        let crypto = format!("crypto_{wish}");
        let names = [&wish, &crypto].into_iter().find_map(|alias| self.by_alias.get(alias));
        names.into_iter().flatten().map(|name| (*name).to_owned()).collect()
    }
}

/// The index for PID 1 of what was selected.
///
/// # Errors
///
/// See [`modindex::EncodeError`].
pub fn index(kernel: &Kernel, selection: &Selection) -> Result<Vec<u8>, modindex::EncodeError> {
    let providers = Providers::new(kernel);
    let wishes = |wishes: &[String]| -> Vec<String> {
        let all: BTreeSet<String> = wishes.iter().flat_map(|wish| providers.of(wish)).collect();
        all.into_iter().filter(|name| selection.modules.contains_key(name)).collect()
    };
    let entry = |(name, unpacked): (&String, &bool)| {
        let info = &kernel.modules[name];
        modindex::Module {
            name: name.clone(),
            path: if *unpacked { info.unpacked_path().to_owned() } else { info.path.clone() },
            depends: info.depends.clone(),
            before: wishes(&info.before),
            after: wishes(&info.after),
            aliases: info.aliases.clone(),
        }
    };
    let modules: Vec<modindex::Module> = selection.modules.iter().map(entry).collect();
    let built_in: Vec<String> = kernel.built_in.iter().cloned().collect();
    modindex::encode(&modules, &built_in)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::elf::testing::with_section;
    use crate::progress::Silent;

    /// Writes a kernel of made-up modules: path without `.ko`, and `.modinfo` with `|` for NUL.
    pub(crate) fn write_kernel(folder: &Path, modules: &[(&str, &str)]) {
        for (path, facts) in modules {
            let file = folder.join(format!("kernel/{path}.ko.xz"));
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            let facts = facts.replace('|', "\0");
            let module = with_section(62, ".modinfo", facts.as_bytes());
            let mut out = liblzma::write::XzEncoder::new(Vec::new(), 1);
            out.write_all(&module).unwrap();
            fs::write(file, out.finish().unwrap()).unwrap();
        }
        fs::write(folder.join("modules.builtin"), "kernel/drivers/virtio/virtio-pci.ko\n").unwrap();
        fs::write(
            folder.join("modules.builtin.modinfo"),
            b"x.license=GPL\0x.alias=char-major-1-1\0",
        )
        .unwrap();
    }

    const SMALL: &[(&str, &str)] = &[
        ("fs/ext4/ext4", "alias=fs-ext4|depends=jbd2,mbcache|softdep=pre: crc32c"),
        ("fs/jbd2", "depends="),
        ("fs/mbcache", ""),
        ("crypto/crc32c_generic", "alias=crc32c|alias=crypto-crc32c"),
        ("crypto/crc32c-intel", "alias=crc32c|alias=crypto-crc32c|alias=cpu:type:x86*"),
        ("net/r8169", "alias=pci:v000010ECd00008168sv*|softdep=pre: realtek|firmware=rtl_nic/a.fw"),
        ("net/realtek", ""),
        ("net/orphan", "depends=gone"),
        ("net/virtio_net", "depends=virtio_pci"),
    ];

    fn kernel() -> Kernel {
        let folder = tempfile::tempdir().unwrap();
        write_kernel(folder.path(), SMALL);
        scan(folder.path(), "6.1-test", &Silent).unwrap()
    }

    fn wanted<'a>(names: &[&'a str], packed: bool) -> Wanted<'a> {
        Wanted { set: "test", names: names.to_vec(), packed }
    }

    #[test]
    fn a_kernel_is_read_with_dashes_for_underscores() {
        let kernel = kernel();
        assert_eq!(kernel.modules.len(), SMALL.len());
        assert!(kernel.modules.contains_key("crc32c_intel"));
        assert_eq!(kernel.modules["r8169"].firmware, ["rtl_nic/a.fw"]);
        assert_eq!(kernel.modules["ext4"].unpacked_path(), "kernel/fs/ext4/ext4.ko");
        assert!(kernel.built_in.contains("virtio_pci"));
        assert!(kernel.built_in_aliases.contains("char_major_1_1"));
    }

    #[test]
    fn a_selection_has_hard_and_soft_dependencies_through_aliases() {
        let kernel = kernel();
        let sets = [wanted(&["virtio-net", "r816?"], true), wanted(&["ext4"], false)];
        let selection = select(&kernel, &sets).unwrap();
        let names: Vec<String> = selection
            .modules
            .iter()
            .map(|(name, unpacked)| format!("{name}{}", if *unpacked { "" } else { ".xz" }))
            .collect();
        let expected = [
            "crc32c_generic",
            "crc32c_intel",
            "ext4",
            "jbd2",
            "mbcache",
            "r8169.xz",
            "realtek.xz",
            "virtio_net.xz",
        ];
        assert_eq!(names, expected);

        let index = modindex::Index::decode(index(&kernel, &selection).unwrap()).unwrap();
        let id = index.resolve("fs-ext4")[0];
        let order: Vec<&str> = index.load_order(id).map(|step| index.name(step.module)).collect();
        assert_eq!(order.last(), Some(&"ext4"));
        assert!(order.contains(&"crc32c_generic") && order.contains(&"jbd2"));
        assert_eq!(index.path(index.by_name("r8169").unwrap()), "kernel/net/r8169.ko.xz");
        assert!(index.is_built_in("virtio-pci"));
    }

    #[test]
    fn a_curated_module_that_the_kernel_does_not_have_fails_loudly() {
        let kernel = kernel();
        for name in ["ext5", "ext5*"] {
            let error = select(&kernel, &[wanted(&["ext4", name], false)]).unwrap_err();
            let text =
                format!("set `test` asks for module `{name}`, which kernel 6.1-test does not have");
            assert_eq!(error.to_string(), text);
        }
        let error = select(&kernel, &[wanted(&["orphan"], false)]).unwrap_err();
        assert!(matches!(error, SelectError::Dependency { .. }));
    }

    #[test]
    fn modules_that_are_cut_or_no_modules_are_named() {
        let folder = tempfile::tempdir().unwrap();
        write_kernel(folder.path(), SMALL);
        let path = folder.path().join("kernel/net/r8169.ko.xz");
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        let error = scan(folder.path(), "x", &Silent).unwrap_err();
        assert!(format!("{error:?}").contains("r8169"), "{error:?}");
        fs::remove_file(&path).unwrap();
        fs::write(folder.path().join("kernel/net/r8169.ko"), b"text").unwrap();
        let error = scan(folder.path(), "x", &Silent).unwrap_err();
        assert_eq!(error.to_string(), "`kernel/net/r8169.ko` is no module");
    }

    #[test]
    fn any_bytes_are_some_modinfo() {
        const FACTS: &[u8] = b"depends=,softdep: pre post\0alias\xff";
        let mut state = 3_u64;
        for round in 0..2_000 {
            let bytes: Vec<u8> = (0..round % 97)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    FACTS[(state >> 40) as usize % FACTS.len()]
                })
                .collect();
            parse_modinfo(&bytes);
        }
        let info = parse_modinfo(b"softdep=a pre: b c post: d\0softdep=pre:\0\xff=\0depends=a,,b");
        assert_eq!((info.before, info.after), (vec!["b".into(), "c".into()], vec!["d".into()]));
        assert_eq!(info.depends, ["a", "b"]);
    }
}
