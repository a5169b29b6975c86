//! Writes a [`Tree`] as an erofs file system.
//!
//! There is no writer in Rust, so that `mkfs.erofs` of the image's own Debian release is run: unpacked into the cache
//! and started through its own dynamic loader, because the host's libraries are of another age. It gets sorted tar
//! archives and fixed identifiers, and runs with one worker, so that equal trees give equal bytes.
//!
//! A file system is made in two steps. The first has everything from packages, takes most of a minute, and is kept in
//! the cache; the second adds what is ours to a copy of it (`--incremental`), which takes a few seconds. Both steps
//! run for every new root, so that the bytes do not depend on what the cache had. That way of `mkfs.erofs` is young:
//! it loses data together with fragments (0.9 % of size, so that they are not used), and therefore every file system
//! is unpacked again by `fsck.erofs` and compared with the tree before it is given out.
//!
//! Called by the builder for the root.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use crate::elf;
use crate::packages::{Arch, Cache, Unpacked};
use crate::progress::Progress;
use crate::root::OURS;
use crate::tree::{Node, Tree, digest_of, hex};

/// How hard the file system is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Level {
    /// zstd 9: what is shipped. About 50 CPU seconds.
    #[default]
    Full,
    /// lz4: a third larger, some 5 CPU seconds. For tests and for work on the image.
    Quick,
}

impl Level {
    fn options(self) -> &'static [&'static str] {
        match self {
            Self::Full => &["-zzstd,level=9", "-C65536", "-Eztailpacking"],
            Self::Quick => &["-zlz4", "-C65536", "-Eztailpacking"],
        }
    }
}

/// The file system that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Bytes; a multiple of 4096.
    pub size: u64,
    pub sha256: [u8; 32],
    /// Whether it came from the cache.
    pub cached: bool,
}

/// Why there is no file system.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErofsError {
    #[error("could not write the tree")]
    Tree(#[source] io::Error),
    #[error("could not use the cache")]
    Cache(#[source] io::Error),
    #[error("could not write `{path}`")]
    Out { path: String, source: io::Error },
    #[error("could not start `mkfs.erofs` of the tool packages")]
    Start(#[source] io::Error),
    #[error("`{program}` failed: {text}")]
    Failed { program: &'static str, text: String },
    /// The tool wrote something else than it was given.
    #[error("the file system is not what was to be written: {0}")]
    Different(String),
}

/// Programs of the tool packages, ready to run on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tools {
    /// Holds [`PROGRAMS`], the loader and all libraries, each under the name by which it is asked for.
    folder: PathBuf,
    loader: String,
    /// Digest of all of them.
    digest: [u8; 32],
}

/// Why the tool packages cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ToolsError {
    #[error("the tool packages have no `{0}`")]
    Missing(String),
    #[error("could not put the tools together")]
    Install(#[source] io::Error),
    #[error("`{name}` of the tool packages is broken")]
    Elf { name: String, source: elf::ElfError },
}

const MKFS: &str = "mkfs.erofs";
const FSCK: &str = "fsck.erofs";
const PROGRAMS: [&str; 2] = [MKFS, FSCK];

impl Tools {
    /// Puts the programs, their loader and all their libraries from unpacked packages into one folder of the cache.
    ///
    /// # Errors
    ///
    /// See [`ToolsError`]. A missing library is an error here, because the loader would take the host's instead.
    pub fn install(packages: &[Unpacked], arch: Arch, cache: &Cache) -> Result<Self, ToolsError> {
        let find = |path: String| {
            let found = packages.iter().find_map(|p| p.content(&p.resolve(&path)?));
            found.ok_or(ToolsError::Missing(path))
        };
        let loader = match arch {
            Arch::Amd64 => "ld-linux-x86-64.so.2",
            Arch::Arm64 => "ld-linux-aarch64.so.1",
        };
        let mut files = BTreeMap::new();
        let mut open = PROGRAMS.map(str::to_owned).to_vec();
        open.push(loader.to_owned());
        while let Some(name) = open.pop() {
            if files.contains_key(&name) {
                continue;
            }
            let content = if PROGRAMS.contains(&name.as_str()) {
                find(format!("usr/bin/{name}"))?
            } else {
                find(format!("usr/lib/{}/{name}", arch.triplet()))?
            };
            let bytes = content.read().map_err(ToolsError::Install)?;
            // The loader of a test is no ELF file; it is started and needs nothing.
            if name != loader {
                let links = elf::links(&bytes)
                    .map_err(|source| ToolsError::Elf { name: name.clone(), source })?;
                open.extend(links.needed);
            }
            files.insert(name, (content.sha256(), bytes));
        }
        let mut hash = Sha256::new();
        for (name, (sha256, _)) in &files {
            hash.update(format!("{name}\0"));
            hash.update(sha256);
        }
        let digest: [u8; 32] = hash.finalize().into();
        let install = || {
            let folder = cache.sub("tools")?.join(hex(&digest));
            if !folder.exists() {
                let scratch = cache.scratch()?;
                for (name, (_, bytes)) in &files {
                    let path = scratch.path().join(name);
                    fs::write(&path, bytes)?;
                    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
                }
                // Another build may just have finished the same.
                if let Err(e) = fs::rename(scratch.path(), &folder)
                    && !folder.exists()
                {
                    return Err(e);
                }
            }
            Ok(folder)
        };
        let folder = install().map_err(ToolsError::Install)?;
        Ok(Self { folder, loader: loader.to_owned(), digest })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.folder.join(&self.loader));
        command.env_clear().env("LC_ALL", "C").arg("--inhibit-cache");
        command.arg("--library-path").arg(&self.folder).arg(self.folder.join(program));
        command
    }
}

/// Version of how we call the tools; raised whenever the same key would give other bytes.
const RECIPE: &str = "skerry-erofs-3";
/// Time between two looks at a running tool.
const LOOK: Duration = Duration::from_millis(200);
/// File systems of each step that the cache keeps; the oldest go first.
const KEPT_MAX: usize = 6;

/// Writes `tree` to `out` with every time stamp `epoch`.
///
/// # Errors
///
/// See [`ErofsError`]; `out` is then not there, or as long as it got.
pub fn write(
    tree: &Tree,
    out: &Path,
    level: Level,
    epoch: u64,
    tools: &Tools,
    cache: &Cache,
    progress: &dyn Progress,
) -> Result<Written, ErofsError> {
    let key = |tree: &Tree| {
        let mut key = Sha256::new();
        key.update(RECIPE);
        key.update(tools.digest);
        key.update(tree.digest());
        key.update(epoch.to_le_bytes());
        key.update(level.options().join(" "));
        hex(&key.finalize())
    };
    let failed = |source| ErofsError::Out { path: out.display().to_string(), source };
    let kept = kept(cache, "roots", &key(tree))?;
    let cached = kept.exists();
    if !cached {
        let (base, ours) = tree.split(OURS);
        let uuid = uuid_of(&tree.digest());
        let step = Step { level, epoch, uuid: &uuid, tools, progress };
        let kept_base = self::kept(cache, "bases", &key(&base))?;
        if !kept_base.exists() {
            let scratch = cache.scratch().map_err(ErofsError::Cache)?;
            let (files, size) = (base.len(), base.bytes() / 1_000_000);
            progress.step(&format!("compressing {files} files of packages, {size} MB"));
            let made = scratch.path().join("base.erofs");
            step.mkfs(&base, scratch.path(), &made, &[])?;
            fs::rename(&made, &kept_base).map_err(ErofsError::Cache)?;
        }
        keep(&kept_base);
        let scratch = cache.scratch().map_err(ErofsError::Cache)?;
        let (files, size) = (ours.len(), ours.bytes() / 1_000_000);
        progress.step(&format!("compressing {files} files of our own, {size} MB"));
        let made = scratch.path().join("root.erofs");
        fs::copy(&kept_base, &made).map_err(ErofsError::Cache)?;
        step.mkfs(&ours, scratch.path(), &made, &["--incremental=data"])?;
        progress.step("comparing the file system with what was to be written");
        step.verify(tree, scratch.path(), &made)?;
        fs::rename(&made, &kept).map_err(ErofsError::Cache)?;
    }
    keep(&kept);
    fs::copy(&kept, out).map_err(failed)?;
    let (size, sha256) = digest_of(out).map_err(failed)?;
    Ok(Written { size, sha256, cached })
}

/// How one file system is made.
struct Step<'a> {
    level: Level,
    epoch: u64,
    uuid: &'a str,
    tools: &'a Tools,
    progress: &'a dyn Progress,
}

impl Step<'_> {
    fn mkfs(
        &self,
        tree: &Tree,
        scratch: &Path,
        made: &Path,
        more: &[&str],
    ) -> Result<(), ErofsError> {
        let tar = scratch.join("tree.tar");
        let file = File::create(&tar).map_err(ErofsError::Cache)?;
        tree.write_tar(BufWriter::new(file), self.epoch).map_err(ErofsError::Tree)?;
        let mut command = self.tools.command(MKFS);
        command
            .args(["--quiet", "--tar=f", "--all-root", "--workers=1"])
            .args(self.level.options())
            .args(more)
            .arg(format!("-T{}", self.epoch))
            .arg(format!("-U{}", self.uuid))
            .arg(made)
            .arg(&tar);
        // The tool works in a sparse file of two terabytes.
        let size = || fs::metadata(made).map_or(0, |meta| 512 * meta.blocks());
        run(MKFS, command, &|| self.progress.at(size(), None))
    }

    /// Unpacks the file system and compares it with the tree, path by path.
    fn verify(&self, tree: &Tree, scratch: &Path, made: &Path) -> Result<(), ErofsError> {
        let folder = scratch.join("unpacked");
        let mut command = self.tools.command(FSCK);
        command
            .arg(format!("--extract={}", folder.display()))
            .args(["--preserve-perms", "--no-preserve-owner"])
            .arg(made);
        run(FSCK, command, &|| {})?;
        let different = |path: &str| ErofsError::Different(format!("`{path}`"));
        for (path, entry) in tree.iter() {
            let at = folder.join(path);
            let meta = fs::symlink_metadata(&at).map_err(|_| different(path))?;
            let mode = meta.permissions().mode() & 0o7777;
            let same = match &entry.node {
                Node::Folder => meta.is_dir() && mode == entry.mode,
                Node::File(content) => {
                    meta.is_file()
                        && mode == entry.mode
                        && digest_of(&at).is_ok_and(|(_, sha256)| sha256 == content.sha256())
                }
                Node::Link(target) => {
                    fs::read_link(&at).is_ok_and(|found| found == Path::new(target))
                }
                // It cannot be made without root; the root has none.
                Node::CharDevice { .. } => false,
            };
            if !same {
                return Err(different(path));
            }
        }
        let top = fs::metadata(&folder).map_err(ErofsError::Cache)?.permissions().mode() & 0o7777;
        if top != 0o755 {
            return Err(different("/"));
        }
        let found = count(&folder).map_err(ErofsError::Cache)?;
        if found != tree.len() {
            let text = format!("{found} entries instead of {}", tree.len());
            return Err(ErofsError::Different(text));
        }
        Ok(())
    }
}

fn count(folder: &Path) -> io::Result<usize> {
    let mut found = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        found += 1;
        if entry.file_type()?.is_dir() {
            found += count(&entry.path())?;
        }
    }
    Ok(found)
}

fn run(program: &'static str, mut command: Command, look: &dyn Fn()) -> Result<(), ErofsError> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(ErofsError::Start)?;
    let mut errors = child.stderr.take().expect("it was asked to be piped");
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        // A tool that says more than that has said enough.
        drop((&mut errors).take(64 * 1024).read_to_string(&mut text));
        drop(io::copy(&mut errors, &mut io::sink()));
        text
    });
    let status = loop {
        if let Some(status) = child.try_wait().map_err(ErofsError::Start)? {
            break status;
        }
        std::thread::sleep(LOOK);
        look();
    };
    let text = reader.join().expect("the reader does not panic");
    // fsck.erofs says what it missed and may end with 0 all the same.
    if status.success() && !text.contains("<E>") {
        return Ok(());
    }
    let mut said: Vec<&str> = text.lines().rev().take(3).collect();
    said.reverse();
    let ended = match status.signal() {
        Some(signal) => format!("ended by signal {signal}"),
        None => format!("exit code {}", status.code().unwrap_or(-1)),
    };
    Err(ErofsError::Failed { program, text: format!("{ended}; {}", said.join("; ")) })
}

fn kept(cache: &Cache, folder: &str, key: &str) -> Result<PathBuf, ErofsError> {
    Ok(cache.sub(folder).map_err(ErofsError::Cache)?.join(format!("{key}.erofs")))
}

/// Notes that a kept file system was of use, and removes those that were not for the longest time.
fn keep(kept: &Path) {
    let touched = File::options().append(true).open(kept);
    drop(touched.and_then(|file| file.set_modified(SystemTime::now())));
    forget_old(kept);
}

/// Keeps the newest file systems of the cache, `kept` among them.
fn forget_old(kept: &Path) {
    let Some(Ok(entries)) = kept.parent().map(fs::read_dir) else { return };
    let mut files: Vec<_> = entries
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .filter(|(_, path)| path != kept)
        .collect();
    files.sort();
    let many = files.len().saturating_sub(KEPT_MAX - 1);
    for (_, path) in &files[..many] {
        drop(fs::remove_file(path));
    }
}

/// A UUID of version 8 (RFC 9562: the bits are ours) from a digest.
pub(crate) fn uuid_of(digest: &[u8; 32]) -> String {
    let mut bytes: [u8; 16] = digest[..16].try_into().expect("half of a digest");
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex(&bytes);
    format!("{}-{}-{}-{}-{}", &text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deb::testing::{Packing, package};
    use crate::elf::testing::program;
    use crate::packages::{Locked, Package, store};
    use crate::progress::Silent;
    use crate::tree::Content;

    /// Tool packages whose loader is a shell script: it gets what mkfs would get.
    fn unpacked(cache: &Cache, script: &str, with_library: bool) -> Vec<Unpacked> {
        let lib = "usr/lib/x86_64-linux-gnu";
        let loader = format!("#!/bin/sh\n{script}\n");
        let mkfs = program(62, &["libz.so.1"], Some("/lib64/ld-linux-x86-64.so.2"));
        let library = program(62, &[], None);
        let (loader_at, real, link) = (
            format!("{lib}/ld-linux-x86-64.so.2"),
            format!("{lib}/libz.so.1.3"),
            format!("{lib}/libz.so.1"),
        );
        let mut entries: Vec<(&str, u32, &[u8])> =
            vec![(&loader_at, 0o755, loader.as_bytes()), ("usr/bin/mkfs.erofs", 0o755, &mkfs)];
        entries.push(("usr/bin/fsck.erofs", 0o755, &mkfs));
        if with_library {
            entries.push((&real, 0o644, &library));
            entries.push((&link, 0o777, b"-> libz.so.1.3"));
        }
        let bytes = package(&entries, Packing::Plain);
        let path = cache.folder().join("tools.deb");
        fs::write(&path, &bytes).unwrap();
        let locked = Locked {
            for_arch: Arch::Amd64,
            name: "tools".to_owned(),
            version: "1".to_owned(),
            arch: "amd64".to_owned(),
            size: bytes.len() as u64,
            sha256: hex(&Sha256::digest(&bytes)),
            kernel: false,
        };
        vec![store::unpack(&Package { locked, path }, cache).unwrap()]
    }

    fn tools(cache: &Cache, script: &str) -> Tools {
        Tools::install(&unpacked(cache, script, true), Arch::Amd64, cache).unwrap()
    }

    fn tree(content: &str) -> Tree {
        let mut tree = Tree::new();
        tree.file("etc/a", 0o644, Content::bytes("package"), "a").unwrap();
        tree.file("usr/bin/b", 0o755, Content::bytes(content), OURS).unwrap();
        tree.link("usr/bin/c", "b", OURS).unwrap();
        tree
    }

    /// A file system of its own: a tar archive.
    const TAR: &str = r#"
PATH=/usr/bin:/bin
for last; do made=$source; source=$last; done
case "$*" in
*--extract=*)
    folder=${5#--extract=}
    mkdir "$folder" && tar -xpf "$source" -C "$folder" --no-same-owner ;;
*--incremental=data*) tar -Af "$made" "$source" ;;
*) echo made >> "${0%/*}/log"; cp "$source" "$made" ;;
esac"#;

    #[test]
    fn equal_trees_come_from_the_cache_and_everything_else_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().join("cache")).unwrap();
        let tools = tools(&cache, TAR);
        let out = folder.path().join("out");
        let made = |tree: &Tree, level, epoch| {
            write(tree, &out, level, epoch, &tools, &cache, &Silent).unwrap()
        };
        let first = made(&tree("x"), Level::Full, 7);
        assert!(!first.cached);
        assert_eq!(fs::metadata(&out).unwrap().len(), first.size);
        assert_eq!(made(&tree("x"), Level::Full, 7), Written { cached: true, ..first });
        assert!(!made(&tree("x"), Level::Quick, 7).cached);
        assert!(!made(&tree("x"), Level::Full, 8).cached);
        let packed = || fs::read_to_string(tools.folder.join("log")).unwrap().lines().count();
        let before = packed();
        assert!(!made(&tree("y"), Level::Full, 7).cached);
        assert_eq!(packed(), before, "only what is ours was packed again");
        for n in 0..2 * KEPT_MAX {
            made(&tree(&n.to_string()), Level::Quick, 1);
        }
        let kept = fs::read_dir(cache.sub("roots").unwrap()).unwrap().count();
        assert_eq!(kept, KEPT_MAX);
    }

    #[test]
    fn what_the_tool_says_is_in_the_error_and_nothing_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().join("cache")).unwrap();
        let tools = tools(&cache, "echo 'no room' >&2; exit 3");
        let out = folder.path().join("out");
        let error = write(&tree("x"), &out, Level::Full, 1, &tools, &cache, &Silent).unwrap_err();
        assert_eq!(error.to_string(), "`mkfs.erofs` failed: exit code 3; no room");
        assert!(!out.exists());
        for folder in ["roots", "bases"] {
            assert_eq!(fs::read_dir(cache.sub(folder).unwrap()).unwrap().count(), 0);
        }
        assert_eq!(fs::read_dir(cache.sub("scratch").unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn a_tool_that_writes_something_else_is_found_out() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path().join("cache")).unwrap();
        for (spoil, expected) in [
            ("printf x >> $folder/usr/bin/b", "`usr/bin/b`"),
            ("rm $folder/etc/a", "`etc/a`"),
            ("chmod 700 $folder/etc", "`etc`"),
            ("chmod 777 $folder", "`/`"),
            ("ln -sf a $folder/usr/bin/c", "`usr/bin/c`"),
            ("touch $folder/more", "7 entries instead of 6"),
        ] {
            let script = TAR.replace("--no-same-owner ;;", &format!("--no-same-owner\n{spoil} ;;"));
            let tools = tools(&cache, &script);
            let out = folder.path().join("out");
            let error =
                write(&tree("x"), &out, Level::Full, 1, &tools, &cache, &Silent).unwrap_err();
            let text = format!("the file system is not what was to be written: {expected}");
            assert_eq!(error.to_string(), text);
            assert!(!out.exists());
        }
    }

    #[test]
    fn a_library_that_the_tool_packages_lack_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        let packages = unpacked(&cache, "", false);
        let error = Tools::install(&packages, Arch::Amd64, &cache).unwrap_err();
        assert!(error.to_string().contains("libz.so.1"), "{error}");
    }

    #[test]
    fn identifiers_come_from_the_content() {
        assert_eq!(uuid_of(&[0xff; 32]), "ffffffff-ffff-8fff-bfff-ffffffffffff");
    }
}
